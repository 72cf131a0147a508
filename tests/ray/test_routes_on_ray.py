"""The service's own tests over HTTP, asked of replicas behind Ray's proxy."""

import os
import re
import subprocess
import sys

import pytest

from benchmarks.tools.ray_cluster import ROOT, URL

ASKING = ("tests/service/http", "tests/service/test_app.py", "tests/service/test_security.py")
AT_LEAST = 150


@pytest.mark.usefixtures("cluster")
def test_the_tests_over_http_pass() -> None:
    """All but those that over_ray.py names."""
    plugin = "tests.ray.over_ray"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", plugin, "-p", "no:xdist", "-q", "-rf", "--tb=short", *ASKING],
        env=os.environ | {"SERVICE_URL": URL},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) >= AT_LEAST
