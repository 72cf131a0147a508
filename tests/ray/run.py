"""Runs the tests on real Ray in a network namespace that has nothing but `lo`, as Ray listens on every interface.

python tests/ray/run.py [ARGUMENTS OF PYTEST]    (`make test-ray`)
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

sys.path.insert(0, str(ROOT))

from benchmarks.tools.ray_cluster import enter_namespace  # noqa: E402


def main(arguments: list[str]) -> None:
    """Enter the namespace, then become pytest."""
    enter_namespace([sys.executable, __file__, *arguments])
    os.chdir(ROOT)
    # Nothing of tests/conftest.py but what tests/ray/conftest.py takes from it. Ray itself uses what is deprecated.
    options = ["-p", "no:xdist", f"--confcutdir={HERE}", "-W", "ignore::DeprecationWarning"]
    pytest = [sys.executable, "-m", "pytest", *options]
    os.execv(sys.executable, [*pytest, *(arguments or [str(HERE)])])


if __name__ == "__main__":
    main(sys.argv[1:])
