"""Chooses where `make` and the Dockerfile take torch from, and says what will be installed and how large that is.

    python deploy/torch_index.py FOLDER [INDEX] [BUILD]

FOLDER is the environment that will be filled, INDEX what TORCH_INDEX says. BUILD is `cpu` or `cuda`; without it the
machine decides. Prints the index to take torch from, nothing for the default one; the words for people go to stderr.
Needs nothing beyond Python.
"""

import contextlib
import ctypes
import http.client
import platform
import re
import shutil
import sys
import threading
import urllib.request
from pathlib import Path
from typing import NamedTuple

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ANSWER_S = 5.0
MAX_PAGE_BYTES = 2**23
SIZES = {"cpu": "1.1 GB", "cuda": "about 5 GB"}  # of the whole environment on Linux
BUILDS = ("", "cpu", "cuda")
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


class Choice(NamedTuple):
    """Where torch comes from, empty for the default index, and what to say of it."""

    url: str
    words: str


def choose(wanted: str, build: str = "", *, cpu_index: str = CPU_INDEX) -> Choice:
    """The index that is wanted, or that of the build that is; without either, this machine's driver decides."""
    if wanted:
        return Choice(wanted, f"torch from {wanted}: {SIZES['cpu']} in all without CUDA, {SIZES['cuda']} with it")
    if not default_has_cuda():
        return Choice("", f"torch for CPUs, {SIZES['cpu']} in all")
    if build == "cuda" or (not build and has_driver()):
        why = "as it was asked for" if build else "as there is an NVIDIA driver"
        return Choice("", f"torch with CUDA, {why}: {SIZES['cuda']} in all")
    why = "as it was asked for" if build else "as there is no NVIDIA driver"
    if offers(cpu_index, pinned_version()):
        return Choice(cpu_index, f"torch without CUDA, {why}: {SIZES['cpu']} in all")
    return Choice(
        "",
        f"torch from the default index: {SIZES['cuda']} in all where that brings CUDA. It should be without, {why}, "
        f"but {cpu_index} did not offer this version within {ANSWER_S:g} s",
    )


def default_has_cuda() -> bool:
    """Whether the default index's torch for this system brings CUDA."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


def has_driver(proc: Path = Path("/proc/driver/nvidia/version"), library: str = "libcuda.so.1") -> bool:
    """Whether an NVIDIA driver is installed: its tool, its kernel module or its library."""
    if shutil.which("nvidia-smi") is not None or proc.exists():
        return True
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def pinned_version() -> str:
    """The version of torch that every install takes."""
    [version] = re.findall(r"^torch==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    return str(version)


def offers(index: str, version: str, within_s: float = ANSWER_S) -> bool:
    """Whether the index answers in time, and has this version of torch."""
    return f"torch-{version}" in read_page(f"{index}/torch/", within_s)


def read_page(url: str, within_s: float = ANSWER_S) -> str:
    """A page's text; empty where it does not come in time."""
    pages: list[bytes] = []

    def read() -> None:
        with (
            contextlib.suppress(OSError, http.client.HTTPException),
            urllib.request.urlopen(url, timeout=within_s) as reply,  # noqa: S310 - an https address
        ):
            pages.append(reply.read(MAX_PAGE_BYTES))

    # In a thread, because no time-out covers a name that is not resolved, or a page that comes byte by byte.
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(within_s)
    return pages[0].decode(errors="replace") if pages else ""


def main() -> None:
    """Choose, say it, and print the index."""
    folder, wanted, build = (*sys.argv[1:4], "", "")[:3]
    if build not in BUILDS:
        sys.exit(f"torch comes as {' or '.join(filter(None, BUILDS))}, not as {build!r}.")
    choice = choose(wanted, build)
    print(f"Installing what serving needs into {folder}: {choice.words}. This takes minutes.", file=sys.stderr)
    print("TORCH_INDEX=URL takes torch from another index.", file=sys.stderr)
    print(choice.url)


if __name__ == "__main__":
    main()
