"""Prints what serving installs, in the versions that constraints.txt pins, for `make sbom`.

Run with the Python of an environment in which the service is installed: what each package needs is read from there.
"""

import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
# What torch's builds for GPUs bring, in versions that torch itself pins. The image has none of it.
_CUDA = re.compile("cuda-|nvidia-|triton$")


def needed(lines: Iterable[str]) -> set[str]:
    """The names of these requirements, and of all that they need on this machine."""
    found, waiting = set[tuple[str, str]](), [(line, "") for line in lines]
    while waiting:
        line, extra = waiting.pop()
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            name = canonicalize_name(requirement.name)
            if _CUDA.match(name):
                continue
            for one in {"", *requirement.extras}:
                if (name, one) not in found:
                    found.add((name, one))
                    waiting += [(needs, one) for needs in requires(name) or ()]
    return {name for name, _ in found}


def pins() -> dict[str, str]:
    """The lines of constraints.txt by name."""
    lines = re.findall(r"^[\w.-]+==\S+$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return {canonicalize_name(line.partition("==")[0]): line for line in lines}


def main() -> None:
    """Print the lines. A package without a pin is a KeyError: then the pins are not all that serving installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = pins()
    print(*(pinned[name] for name in sorted(needed(project["dependencies"]))), sep="\n")


if __name__ == "__main__":
    main()
