"""`GAN_WORKERS=auto`: how many workers a machine gets, and what the log says of it."""

import math
import os
import socket
from pathlib import Path

import pytest

from benchmarks.tools.process import running
from models.bundle import Bundle
from service.server.worker_count import Machine, choose_workers, has_gpu, memory_limit, weights_bytes
from service.settings import Settings

GIB = 2**30


@pytest.mark.parametrize(
    ("machine", "settings", "weights", "workers", "why"),
    [
        pytest.param(Machine(1, 64 * GIB), {}, 0, 1, "there is one processor", id="one processor"),
        pytest.param(Machine(2, 64 * GIB), {}, 0, 2, "one for each of 2 processors", id="two processors"),
        pytest.param(Machine(64, 64 * GIB), {}, 0, 4, "its share of 64 processors", id="many processors"),
        pytest.param(Machine(2, 3.8 * GIB), {}, 0, 2, "one for each of 2 processors", id="two, with 4 GB"),
        pytest.param(Machine(2, 2 * GIB), {}, 0, 1, "each may need 1.5 GiB of 2.0 GiB", id="little memory"),
        pytest.param(Machine(2, GIB / 4), {}, 0, 1, "each may need 1.5 GiB of 0.2 GiB", id="too little for one"),
        pytest.param(Machine(4, 8 * GIB), {}, GIB, 1, "each may need 4.5 GiB of 8.0 GiB", id="large weights"),
        pytest.param(Machine(2, math.inf), {}, 0, 2, "one for each", id="memory that nobody knows"),
        pytest.param(Machine(8, 64 * GIB, has_gpu=True), {}, 0, 1, "a GPU is best used by one", id="a GPU"),
        pytest.param(Machine(8, 64 * GIB, passes_connections=False), {}, 0, 1, "this system passes no", id="Windows"),
        pytest.param(
            Machine(4, 64 * GIB), {"max_queued_images": 8192}, 0, 2, "must hold GAN_MAX_COUNT", id="short queue"
        ),
        pytest.param(Machine(4, 64 * GIB), {"max_count": 16384}, 0, 1, "must hold GAN_MAX_COUNT", id="large requests"),
    ],
)
def test_the_scarcest_decides(machine: Machine, settings: dict[str, int], weights: int, workers: int, why: str) -> None:
    """Processors, memory, the queue, or a client with one connection; and always at least one worker."""
    choice = choose_workers(Settings.model_validate(settings), machine, weights)
    assert choice.workers == workers
    assert why in choice.why


def test_a_choice_never_contradicts_the_settings() -> None:
    """Whatever the queue and the largest request, each worker's share of the one holds the other."""
    for queued in (1, 100, 4096, 10000, 10**6):
        for count in (1, 99, 100, 4096):
            if count <= queued:
                settings = Settings(max_queued_images=queued, max_count=count)
                workers = choose_workers(settings, Machine(64, math.inf)).workers
                assert Settings(max_queued_images=queued, max_count=count, workers=workers).own_queued_images >= count


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        pytest.param({}, None, id="no cgroup"),
        pytest.param({"memory.max": "max\n"}, None, id="v2 without a limit"),
        pytest.param({"memory.max": "1048576\n"}, 2**20, id="v2"),
        pytest.param({"memory.max": "nonsense"}, None, id="v2, not understood"),
        pytest.param({"memory/memory.limit_in_bytes": "1048576\n"}, 2**20, id="v1"),
        pytest.param({"memory/memory.limit_in_bytes": "9223372036854771712\n"}, None, id="v1 without a limit"),
    ],
)
def test_the_containers_memory_counts_and_not_the_hosts(
    tmp_path: Path, files: dict[str, str], limit: int | None
) -> None:
    """Where there is no limit it is all that the machine has."""
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory_limit(tmp_path) == (limit or there)


@pytest.mark.parametrize(
    ("device", "torch", "files", "variables", "expected"),
    [
        pytest.param("cpu", "2.13.0", ["nvidia0"], {}, False, id="cpu is asked for"),
        pytest.param("cuda:1", "2.13.0", [], {}, True, id="a GPU is asked for"),
        pytest.param("auto", "2.13.0", ["nvidia0", "nvidiactl"], {}, True, id="a GPU is there"),
        pytest.param("auto", "2.13.0", ["dxg"], {}, True, id="a GPU under Windows"),
        pytest.param("auto", "2.13.0", ["nvidiactl"], {}, False, id="a driver without a GPU"),
        pytest.param("auto", "2.13.0", [], {}, False, id="none"),
        pytest.param("auto", "2.13.0+cpu", ["nvidia0"], {}, False, id="torch without CUDA"),
        pytest.param("auto", "2.13.0", ["nvidia0"], {"CUDA_VISIBLE_DEVICES": ""}, False, id="a hidden GPU"),
        pytest.param("auto", "2.13.0", ["nvidia0"], {"CUDA_VISIBLE_DEVICES": "0"}, True, id="a chosen GPU"),
    ],
)
def test_a_gpu_is_noticed_without_torch(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    torch: str,
    files: list[str],
    variables: dict[str, str],
    *,
    expected: bool,
) -> None:
    """By the setting, by torch's build and by the device's file."""
    monkeypatch.setattr("service.server.worker_count.version", lambda _: torch)
    for name in files:
        (tmp_path / name).touch()
    assert has_gpu(device, variables, tmp_path) is expected


def test_every_workers_copy_of_the_weights_counts(tiny_bundles: dict[str, Bundle], tmp_path: Path) -> None:
    """Those of as many bundles as are kept in memory, and nothing where there is no folder."""
    folder = tiny_bundles["tiny"].folder.parent
    assert weights_bytes(folder, 8) == sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    sizes = [weights_bytes(bundle.folder, 8) for bundle in tiny_bundles.values()]
    assert weights_bytes(folder, 2) == sum(sizes) - min(sizes)
    assert weights_bytes(tmp_path / "none", 8) == 0


@pytest.mark.anyio
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(socket, "send_fds"), reason="connections can't be passed to processes here")
async def test_by_default_the_service_has_as_many_and_says_why(tiny_bundles: dict[str, Bundle]) -> None:
    """Without a setting; the workers themselves are told the number."""
    folder = tiny_bundles["tiny"].folder.parent
    chosen = choose_workers(Settings(), Machine.here("cpu"), weights_bytes(folder, 8))
    with running(bundles=folder, default_bundle="tiny", device="cpu", workers="") as service:
        [line] = [line for line in service.log_lines() if line["message"].startswith("serving ")]
        assert (line["workers"], line["because"]) == chosen
        assert (await service.metrics()).total("gan_queue_capacity_images") == 16384
        assert (await service.get("/sample?count=4096&format=npy")).status == 200


def test_the_setting_bounds_the_processors() -> None:
    """A service that may use one has one worker, however many there are."""
    assert Machine.here("cpu", 1).processors == 1
    assert Machine.here("cpu", 10**6) == Machine.here("cpu")
