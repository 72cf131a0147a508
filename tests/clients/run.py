"""Runs the tests of other projects' clients against one service, each with the Python of its own environment.

    python tests/clients/run.py NAME …    (`make test-clients`)

NAME is a client's: its environment is .clients/NAME, its tests are tests/clients/test_NAME.py. They find the service
by the variables of `ADDRESS`. It serves the embedded bundles, and needs keys.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KEY, ADMIN_KEY = "key-of-a-client", "key-of-an-administrator"
ADDRESS = ("SERVICE_URL", "SERVICE_KEY", "SERVICE_ADMIN_KEY")
START_S = 300.0


def main(names: Sequence[str]) -> int:
    """Run the tests of these clients. Returns 1 if any failed."""
    with _service() as url:
        environment = os.environ | dict(zip(ADDRESS, (url, KEY, ADMIN_KEY), strict=True)) | {"NO_PROXY": "*"}
        failed = [name for name in names if _test(name, environment)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


@contextmanager
def _service() -> Iterator[str]:
    """The service as `python -m service` runs it, on a free port; gives its URL once it is ready."""
    settings = {
        "GAN_PORT": str(_free_port()),
        "GAN_API_KEYS": KEY,
        "GAN_ADMIN_KEYS": ADMIN_KEY,
        "GAN_LOG_LEVEL": "warning",
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GAN_")}
    url = f"http://127.0.0.1:{settings['GAN_PORT']}"
    process = subprocess.Popen([sys.executable, "-m", "service"], cwd=ROOT, env=inherited | settings)
    try:
        _wait(process, f"{url}/readyz")
        yield url
    finally:
        process.terminate()
        process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _wait(process: "subprocess.Popen[bytes]", probe: str) -> None:
    """Return once the service is ready."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            direct.open(probe).close()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
        else:
            return
    sys.exit("The service did not start.")


def _test(name: str, environment: dict[str, str]) -> int:
    python = ROOT / ".clients" / name / "bin" / "python"
    tests = HERE / f"test_{name.replace('-', '_')}.py"
    return subprocess.run(
        [python, "-m", "pytest", "-c", HERE / "pytest.ini", tests], env=environment, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
