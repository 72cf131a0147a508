"""Runs the tests on real Ray in a network namespace that has nothing but `lo`, as Ray listens on every interface.

python tests/ray/run.py [ARGUMENTS OF PYTEST]    (`make test-ray`)
"""

import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

HERE = Path(__file__).parent
INSIDE = "--inside"
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1


def main(arguments: list[str]) -> None:
    """Enter the namespace, then become pytest."""
    if arguments[:1] != [INSIDE]:
        as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
        os.execvp("unshare", ["unshare", "--net", *as_root, sys.executable, __file__, INSIDE, *arguments])
    start_loopback()
    os.chdir(HERE.parents[1])
    # Nothing of tests/conftest.py but what tests/ray/conftest.py takes from it.
    pytest = [sys.executable, "-m", "pytest", "-p", "no:xdist", f"--confcutdir={HERE}"]
    os.execv(sys.executable, [*pytest, *(arguments[1:] or [str(HERE)])])


def start_loopback() -> None:
    """Do as `ip link set lo up`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        found = fcntl.ioctl(any_socket, SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0))
        name, flags = struct.unpack("16sh14x", found)
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", name, flags | IFF_UP))


if __name__ == "__main__":
    main(sys.argv[1:])
