"""The container, compose and monitoring files agree with the code, the settings and each other."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import Settings

ROOT = Path(__file__).parent.parent
PROMETHEUS = ROOT / "deploy/prometheus/prometheus.yml"


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


# --- The image ---------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, rest of the line), comments dropped and continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined)]


def arguments(instruction: str) -> list[str]:
    """What follows each use of an instruction, in order."""
    return [rest for word, rest in instructions() if word == instruction]


def image_environment() -> dict[str, str]:
    """Variables that the image sets."""
    return dict(pair.split("=", 1) for pair in shlex.split(arguments("ENV")[-1]))


def copied_from_checkout() -> list[str]:
    """Paths that the Dockerfile takes from the checkout, rather than from an earlier stage."""
    return [path for line in arguments("COPY") if "--from" not in line for path in line.split()[:-1]]


def test_the_image_runs_as_a_number_that_is_not_root() -> None:
    """An orchestrator can verify a number, not a name; the last USER is the one that runs."""
    assert all(int(part) > 0 for part in arguments("USER")[-1].split(":"))


def test_the_signal_to_stop_reaches_python() -> None:
    """Exec form makes the service process 1; a shell in between would keep SIGTERM for itself."""
    assert json.loads(arguments("ENTRYPOINT")[-1]) == ["python", "-m", "service"]
    assert arguments("STOPSIGNAL") == ["SIGTERM"]


def test_the_image_installs_the_dependencies_of_serving_and_no_extra(tmp_path: Path) -> None:
    """The Dockerfile's own line, run here, lists what pyproject.toml says serving needs."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    extract = next(line for line in arguments("RUN") if line.startswith("["))
    subprocess.run([sys.executable, *json.loads(extract)[1:]], cwd=tmp_path, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (tmp_path / "requirements.txt").read_text().splitlines() == project["dependencies"]
    assert not re.search(r"\.\[|--extra|optional-dependencies", (ROOT / "Dockerfile").read_text())


def test_every_install_of_the_image_takes_the_pinned_versions() -> None:
    """No package may differ from what the tests ran with."""
    script = next(line for line in arguments("RUN") if "pip" in line)
    assert script.count(" install ") == 1
    assert "-c constraints.txt" in script


def test_an_edit_of_the_code_does_not_install_torch_again() -> None:
    """Layers are reused up to the first change, so code is copied after the dependencies are installed."""
    order = [f"{word} {rest}" for word, rest in instructions()]
    installed = next(index for index, line in enumerate(order) if "requirements.txt;" in line)
    assert all(order.index(f"COPY {folder}/ {folder}/") > installed for folder in ("service", "models", "bundles"))


def test_the_build_sees_what_it_copies_and_nothing_else() -> None:
    """Data sets, runs and .git stay out of the build; no rule swallows a package."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    assert sorted(rule[1:] for rule in rules if rule.startswith("!")) == sorted(copied_from_checkout())
    assert all("pyc" in rule for rule in rules[1:] if not rule.startswith("!"))
    assert all((ROOT / path).exists() for path in copied_from_checkout())


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
@pytest.mark.parametrize("path", ["models/data/load.py", "service/app.py", "bundles/mnist/generator.safetensors"])
def test_git_ignores_no_part_of_the_packages(path: str) -> None:
    """`models/` is a name that ignore files like to list."""
    assert subprocess.run(["git", "check-ignore", "--no-index", path], cwd=ROOT, check=False).returncode == 1


@contextmanager
def answering_readyz(status: int) -> Iterator[int]:
    """A server on a free port that answers /readyz with one status, and any other path with 404."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else HTTPStatus.NOT_FOUND)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            """Keep the tests' output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def health_check(port: int) -> int:
    """Exit code of the image's health check, run here with a proxy set that nothing answers on."""
    command = json.loads(arguments("HEALTHCHECK")[-1].partition("CMD ")[2])
    environment = os.environ | {"GAN_PORT": str(port), "http_proxy": "http://127.0.0.1:9"}
    return subprocess.run(
        [sys.executable, *command[1:]], env=environment, check=False, stderr=subprocess.DEVNULL
    ).returncode


@pytest.mark.parametrize(("status", "healthy"), [(200, True), (503, False), (404, False)])
def test_the_health_check_believes_readyz(status: int, healthy: bool) -> None:  # noqa: FBT001 (a row of the table above)
    """The container is healthy exactly when /readyz says 200, whatever proxy is configured."""
    with answering_readyz(status) as port:
        assert (health_check(port) == 0) is healthy


def test_the_health_check_fails_where_nobody_listens() -> None:
    """A service that isn't up yet, or not any more, is not healthy."""
    with answering_readyz(HTTPStatus.OK) as port:
        pass
    assert health_check(port) != 0


# --- Compose -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """The services of docker-compose.yml."""
    services: dict[str, Any] = read_yaml(ROOT / "docker-compose.yml")["services"]
    return services


def seconds(duration: str) -> int:
    """Whole seconds of a duration that compose writes as `35s`."""
    return int(duration.removesuffix("s"))


def test_nobody_is_killed_while_draining(compose: dict[str, Any]) -> None:
    """Docker waits longer than the drain can take; five seconds are for the interpreter to end."""
    drain_s = Settings.model_fields["drain_delay_s"].default + Settings.model_fields["drain_timeout_s"].default
    assert seconds(compose["service"]["stop_grace_period"]) >= drain_s + 5


def test_the_service_is_given_no_more_than_it_needs(compose: dict[str, Any]) -> None:
    """A read-only root, no capability, no way to new privileges, and a /tmp that dies with it."""
    service = compose["service"]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"] == ["/tmp"]  # noqa: S108 (a mount in the container)


def test_every_published_port_is_on_loopback(compose: dict[str, Any]) -> None:
    """Nothing is offered to the network before somebody decides so."""
    assert all(port.startswith("127.0.0.1:") for one in compose.values() for port in one["ports"])


def test_the_images_of_others_are_pinned(compose: dict[str, Any]) -> None:
    """A tag can be chosen, and has a default that names a version."""
    others = [one["image"] for name, one in compose.items() if name != "service"]
    assert all(re.search(r":\$\{[A-Z]+_TAG:-v?\d+\.\d+\.\d+\}$", image) for image in others)


def test_compose_publishes_the_port_that_the_service_listens_on(compose: dict[str, Any]) -> None:
    """Image, compose file and the setting's default name one port, and the image listens on every interface."""
    environment = image_environment()
    assert environment["GAN_HOST"] == "0.0.0.0"  # noqa: S104 (inside a container)
    port = environment["GAN_PORT"]
    assert arguments("EXPOSE") == [port]
    assert port == str(Settings.model_fields["port"].default)
    assert compose["service"]["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_every_variable_of_the_image_and_of_compose_is_a_setting(compose: dict[str, Any]) -> None:
    """A misspelled variable would be ignored, and the default would rule."""
    ours = [name for name in chain(image_environment(), compose["service"]["environment"]) if name.startswith("GAN_")]
    assert {name.removeprefix("GAN_").lower() for name in ours} <= set(Settings.model_fields)


def test_what_compose_mounts_exists(compose: dict[str, Any]) -> None:
    """Docker would silently make an empty folder of a path that isn't there."""
    volumes = set(read_yaml(ROOT / "docker-compose.yml")["volumes"])
    sources = [mount.split(":")[0] for one in compose.values() for mount in one.get("volumes", [])]
    assert all((ROOT / source).is_dir() for source in sources if source not in volumes)
    assert volumes <= set(sources)


def test_the_gpu_file_only_adds_to_the_service(compose: dict[str, Any]) -> None:
    """An override for a service of another name would start a second one instead."""
    assert set(read_yaml(ROOT / "docker-compose.gpu.yml")["services"]) == {"service"} <= set(compose)


# --- Prometheus --------------------------------------------------------------------------------------------------


def test_prometheus_scrapes_the_service_of_the_compose_file() -> None:
    """The target is the compose service's name, and the port that it listens on."""
    (job,) = read_yaml(PROMETHEUS)["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"service:{image_environment()['GAN_PORT']}"]}]
    assert job["metrics_path"] == "/metrics"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_accepts_its_configuration() -> None:
    """Prometheus' own checker reads the file that the container mounts."""
    subprocess.run(["promtool", "check", "config", PROMETHEUS], check=True, capture_output=True)
