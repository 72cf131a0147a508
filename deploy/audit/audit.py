"""Asks PyPI's data base whether the pinned versions have known vulnerabilities, where it answers.

    python -m deploy.audit.audit

Exit code 1 where one has. Where the data base does not answer, as on a machine without internet, it says that nothing
was checked, within seconds, and ends with 0. pip-audit gets an environment of its own, .audit.
"""

import json
import subprocess
import sys
import venv
from pathlib import Path

from deploy.torch_index import ANSWER_S, CONSTRAINTS, pinned_version, read_page

DATABASE = "https://pypi.org/pypi/torch/{}/json"  # what pip-audit reads of each pin; mirrors of the index may lack it
ENVIRONMENT = Path(".audit")
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
MOST_S = 180  # for each step
ACCEPTED: dict[str, str] = {}  # the id of a vulnerability that does not concern us, and why


def install(environment: Path) -> Path:
    """The program, in an environment of its own."""
    program = environment / "bin" / "pip-audit"
    if not program.exists():
        venv.create(environment, with_pip=True)
        pip = environment / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"
        subprocess.run([*pip, "--requirement", REQUIREMENTS], check=True, timeout=MOST_S)  # noqa: S603
    return program


def audit(program: Path) -> list[str]:
    """A line for each vulnerability that is known of a pinned version."""
    options = "--no-deps", "--disable-pip", "--format", "json", "--progress-spinner", "off"
    command: list[str | Path] = [program, "--requirement", CONSTRAINTS, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=MOST_S)  # noqa: S603
    if not done.stdout:  # its exit code is 1 as where it has found something
        raise ValueError(done.stderr[-500:])
    packages = json.loads(done.stdout)["dependencies"]
    if left_out := [package["name"] for package in packages if "skip_reason" in package]:
        print(f"The data base does not know the pinned versions of: {', '.join(left_out)}.")
    return [
        f"{package['name']} {package['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'none'}"
        for package in packages
        for found in package.get("vulns", ())
        if found["id"] not in ACCEPTED
    ]


def main(database: str = DATABASE, environment: Path = ENVIRONMENT, within_s: float = ANSWER_S) -> int:
    """Ask, and say what came of it."""
    database = database.format(pinned_version())
    if '"vulnerabilities"' not in read_page(database, within_s):
        print(f"The pins were not audited: {database} gave no answer within {within_s:g} s.")
        return 0
    try:
        found = audit(install(environment))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print(f"The pins were not audited: {error}")
        return 0
    print("\n".join(found) or "No vulnerability of the pinned versions is known.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
