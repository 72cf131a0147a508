"""The servers that compare.py measures: how each is started, asked, understood, looked at and stopped.

Peers run in environments of their own, `.bench/NAME`, which `make bench` makes; plain FastAPI and the fixed bytes run
in the service's, because they need the same packages. How many threads and workers a peer gets is found by trying.
"""

import base64
import contextlib
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.tools.client import HOST, Request
from benchmarks.tools.process import ROOT

CORES = len(os.sched_getaffinity(0))
ENVIRONMENTS = ROOT / ".bench"
REQUIREMENTS = Path(__file__).parents[1] / "peers"
START_S, STOP_S = 180, 20  # patience, on a busy machine
ANSWER_S = 60
POLL_S = 0.01
LONGEST_REASON = 160
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
OK = 200

FEW, GRID, MANY, ROWS = 16, 64, 1024, 256
# What is asked of a server, and the images in one reply or request.
KINDS = {"png": 1, "few": FEW, "grid": GRID, "json": GRID, "npy": MANY, "judge png": 1, "judge npy": ROWS}
SEED = "{seed}"  # in a body: a new one for each request

Numbers = NDArray[Any]


class NotServing(RuntimeError):  # noqa: N818 — what happened, not which error
    """A server could not be started, or does not give what it should; the message is one line."""


@dataclass(frozen=True)
class Uploads:
    """What is sent to /discriminate: one image as a PNG, and several as an array in NumPy's file format."""

    images: NDArray[np.uint8]

    @property
    def png(self) -> bytes:
        """The first of them."""
        out = io.BytesIO()
        Image.fromarray(self.images[0, ..., 0]).save(out, "png")
        return out.getvalue()

    @property
    def npy(self) -> bytes:
        """All of them."""
        out = io.BytesIO()
        np.save(out, self.images, allow_pickle=False)
        return out.getvalue()


def read_reply(kind: str, body: bytes) -> Numbers:
    """A reply of the service, or of a server that answers like it."""
    match kind:
        case "png":
            return _pixels(body)[np.newaxis]
        case "grid":
            side = round(GRID**0.5)
            picture = _pixels(body)
            height, width = (size // side for size in picture.shape[:2])
            return picture.reshape(side, height, side, width, 1).swapaxes(1, 2).reshape(GRID, height, width, 1)
        case "json":
            return np.stack([_pixels(base64.b64decode(text)) for text in json.loads(body)["images"]])
        case "npy" | "few":
            return np.asarray(np.load(io.BytesIO(body), allow_pickle=False))
        case _:
            return np.array([result["logit"] for result in json.loads(body)["results"]])


def _pixels(file: bytes) -> Numbers:
    with Image.open(io.BytesIO(file)) as picture:
        return np.asarray(picture)[..., np.newaxis]


class Tuning(NamedTuple):
    """How a peer uses the processors."""

    threads: int  # of torch in each process
    workers: int  # processes that hold the nets

    def __str__(self) -> str:
        return f"threads {self.threads}, workers {self.workers}"

    @property
    def variables(self) -> dict[str, str]:
        """What tells a peer."""
        return {"PEER_THREADS": str(self.threads), "PEER_WORKERS": str(self.workers)}


TUNINGS = tuple(dict.fromkeys((Tuning(1, 1), Tuning(CORES, 1), Tuning(1, CORES))))


@dataclass(frozen=True)
class Contender:
    """One server.

    Attributes:
        name: In tables.
        module: What `python -m` runs.
        requests: By kind (see KINDS); what is not there it is not asked.
        environment: The folder of its Python environment under `.bench`; None for the service's own.
        variables: Environment variables beside PEER_PORT and PEER_BUNDLE.
        tunings: More of them, of which those are taken that are best here.
        port_variable: The one that it takes its port from.
        read: A reply of a kind as numbers: images (n, h, w, 1), or logits (n,).
        says: What its replies really are.
        package: Whose version belongs to its name.
        is_checked: Whether replies are compared with what they should be.
    """

    name: str
    module: str
    requests: Mapping[str, Request]
    environment: str | None = None
    variables: Mapping[str, str] = field(default_factory=dict)
    tunings: Sequence[Tuning] = ()
    port_variable: str = "PEER_PORT"
    read: Callable[[str, bytes], Numbers] = read_reply
    says: str = ""
    package: str | None = None
    is_checked: bool = True

    @property
    def python(self) -> Path:
        """The interpreter that runs it."""
        if self.environment is None:
            return Path(sys.executable)
        return ENVIRONMENTS / self.environment / "bin" / "python"

    @property
    def title(self) -> str:
        """Name and version."""
        if self.package is None:
            return self.name
        if self.environment is None:
            return f"{self.name} {version(self.package)}"
        pins = (REQUIREMENTS / f"{self.environment}.txt").read_text().splitlines()
        return f"{self.name} {next(pin for pin in pins if pin.startswith(self.package)).partition('==')[2]}"


def _read_bentoml(kind: str, body: bytes) -> Numbers:
    """A JSON list with one text: a file in base64, or JSON."""
    (text,) = json.loads(body)
    return read_reply(kind, text.encode() if kind.startswith("judge") else base64.b64decode(text))


def _read_triton(kind: str, body: bytes) -> Numbers:
    """One tensor, its bytes behind a head in JSON."""
    head, _ = json.JSONDecoder().raw_decode(body.decode("latin-1"))
    (told,) = head["outputs"]
    data = body[-told["parameters"]["binary_data_size"] :]
    if kind.startswith("judge"):
        return np.frombuffer(data, np.float32)
    return np.frombuffer(data, np.uint8).reshape(-1, *told["shape"][-3:])


def _post(path: str, body: str | bytes, kind: str = "application/json", **headers: str) -> Request:
    more = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return Request("POST", path, 1, body.encode() if isinstance(body, str) else body, (("Content-Type", kind), *more))


def _asks() -> dict[str, str]:
    """The bodies of /sample."""
    return {
        "png": f'{{"count":1,"seed":{SEED}}}',
        "few": f'{{"count":{FEW},"seed":{SEED},"format":"npy"}}',
        "grid": f'{{"count":{GRID},"seed":{SEED}}}',
        "json": f'{{"count":{GRID},"seed":{SEED},"format":"json"}}',
        "npy": f'{{"count":{MANY},"seed":{SEED},"format":"npy"}}',
    }


def _plain(uploads: Uploads) -> dict[str, Request]:
    """The service's own requests."""
    return {
        **{kind: _post("/sample", body) for kind, body in _asks().items()},
        "judge png": _post("/discriminate", uploads.png, "image/png"),
        "judge npy": _post("/discriminate", uploads.npy, "application/x-npy"),
    }


def _litserve(uploads: Uploads) -> dict[str, Request]:
    """Uploads in base64 in JSON, which with forms is all that it reads."""
    files = {"judge png": uploads.png, "judge npy": uploads.npy}
    judged = {
        kind: _post("/discriminate", json.dumps({"file": base64.b64encode(file).decode()}))
        for kind, file in files.items()
    }
    return _plain(uploads) | judged


def _bentoml(uploads: Uploads) -> dict[str, Request]:
    """Lists of one: a batched API takes no other requests."""
    files = {"judge png": uploads.png, "judge npy": uploads.npy}
    return {
        **{kind: _post("/sample", f'{{"asked":[{body}]}}') for kind, body in _asks().items()},
        **{
            kind: _post("/discriminate", json.dumps({"files": [base64.b64encode(file).decode()]}))
            for kind, file in files.items()
        },
    }


def _triton(uploads: Uploads) -> dict[str, Request]:
    """Tensors; no pictures."""

    def head(inputs: list[dict[str, object]], output: str) -> str:
        outputs = [{"name": output, "parameters": {"binary_data": True}}]
        return json.dumps({"inputs": inputs, "outputs": outputs}).replace(f'"{SEED}"', SEED)

    def number(name: str, value: object, *shape: int) -> dict[str, object]:
        return {"name": name, "shape": shape, "datatype": "INT64", "data": [value]}

    pixels = uploads.images
    sent: dict[str, object] = {
        "name": "images",
        "shape": pixels.shape,
        "datatype": "UINT8",
        "parameters": {"binary_data_size": pixels.nbytes},
    }
    judged = head([sent], "logits")
    return {
        "png": _post("/v2/models/sample/infer", head([number("seed", SEED, 1, 1)], "images")),
        **{
            kind: _post(
                "/v2/models/sample_many/infer",
                head([number("seed", SEED, 1), number("count", KINDS[kind], 1)], "images"),
            )
            for kind in ("few", "npy")
        },
        "judge npy": _post(
            "/v2/models/discriminate/infer",
            judged.encode() + pixels.tobytes(),
            "application/octet-stream",
            Inference_Header_Content_Length=str(len(judged)),
        ),
    }


def contenders(uploads: Uploads, bundles: Path, bundle: str) -> list[Contender]:
    """All of them: the service first, the limit last."""
    plain = _plain(uploads)
    settings = {"GAN_HOST": HOST, "GAN_BUNDLES": str(bundles), "GAN_DEFAULT_BUNDLE": bundle, "GAN_WORKERS": "1"}
    service = partial(Contender, requests=plain, port_variable="GAN_PORT")
    peer = partial(Contender, requests=plain, tunings=TUNINGS)
    return [
        service("ours", "service", variables=settings, says="`GAN_WORKERS=1`: one process"),
        service(
            "ours, more workers",
            "service",
            variables=settings | {"GAN_WORKERS": "auto"},
            says="`GAN_WORKERS=auto`, the default",
        ),
        service(
            "unobserved",
            "benchmarks.serving.unobserved",
            requests={"png": plain["png"]},
            variables=settings | {"GAN_LOG_LEVEL": "warning"},
            says="ours without metrics and request log",
        ),
        peer("mosec", "benchmarks.peers.mosec_server", environment="mosec", package="mosec"),
        peer(
            "Triton",
            "benchmarks.peers.triton_server",
            requests=_triton(uploads),
            environment="triton",
            read=_read_triton,
            says="pixels and logits as binary tensors, no picture is encoded",
            package="nvidia-pytriton",
        ),
        peer(
            "LitServe",
            "benchmarks.peers.litserve_server",
            requests=_litserve(uploads),
            environment="litserve",
            says="uploads in base64",
            package="litserve",
        ),
        peer(
            "BentoML",
            "benchmarks.peers.bentoml_server",
            requests=_bentoml(uploads),
            environment="bentoml",
            variables={"BENTOML_HOME": str(ENVIRONMENTS / "bentoml" / "home"), "BENTOML_DO_NOT_TRACK": "True"},
            read=_read_bentoml,
            says="files in base64 in JSON, both ways",
            package="bentoml",
        ),
        peer("Ray Serve", "benchmarks.peers.ray_server", environment="ray", package="ray"),
        peer("plain FastAPI", "benchmarks.peers.plain_server", says="no batches", package="fastapi"),
        peer(
            "FastAPI, onnxruntime",
            "benchmarks.peers.plain_server",
            variables={"PEER_ENGINE": "onnxruntime"},
            says="the same with nets that were exported, as a careful user has it",
            package="onnxruntime",
        ),
        peer(
            "static bytes",
            "benchmarks.peers.static_server",
            requests={"png": plain["png"]},
            tunings=(),
            says="raw ASGI, one image's bytes for every request",
            is_checked=False,
        ),
    ]


class Server:
    """A contender that runs and has answered every kind of request.

    Raises:
        NotServing: It has no environment, it ended, or it did not answer in time; with the last line that it wrote.
    """

    def __init__(self, contender: Contender, bundle: Path) -> None:
        if not contender.python.exists():
            raise NotServing(f"there is no {contender.python.relative_to(ROOT)}: `make bench` installs it")
        self.contender = contender
        self.port = _free_port()
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("GAN_", "PEER_"))}
        environment |= {"PEER_BUNDLE": str(bundle), "PYTHONPATH": str(ROOT), **contender.variables}
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 — closed by `stop`
        started = time.perf_counter()
        self._process = subprocess.Popen(  # noqa: S603 — our own modules
            [contender.python, "-m", contender.module],
            cwd=ROOT,
            env=environment | {contender.port_variable: str(self.port)},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        try:
            self._wait("png", started + START_S)
            self.start_s = time.perf_counter() - started
            for kind in contender.requests:
                self._wait(kind, started + START_S)
        except BaseException:
            self.stop()
            raise

    def _wait(self, kind: str, until: float) -> None:
        while self._process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.ask(kind, 0)[0] == OK:
                    return
            if time.perf_counter() > until:
                raise NotServing(f"no answer to {kind!r} in {START_S} s; {self._last_words()}")
            time.sleep(POLL_S)
        raise NotServing(f"it ended with {self._process.returncode}; {self._last_words()}")

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode("utf-8", "replace").splitlines()]
        said = (line[:LONGEST_REASON] for line in reversed(lines) if any(map(str.isalpha, line)))
        return next(said, "it wrote nothing")

    def ask(self, kind: str, seed: int) -> tuple[int, bytes]:
        """One reply's status and body, over a connection of its own."""
        request = self.contender.requests[kind]
        connection = http.client.HTTPConnection(HOST, self.port, timeout=ANSWER_S)
        try:
            body = request.body.replace(SEED.encode(), str(seed).encode())
            connection.request(request.method, request.target, body, dict(request.headers))
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def cpu_s(self) -> float:
        """Processor time that all of its processes have taken."""
        return sum(sum(map(int, _stat(pid)[11:13])) for pid in self._processes()) / TICKS_PER_S

    def memory_bytes(self) -> int:
        """Resident memory of all of its processes; what several share counts once."""
        return sum(_kib(f"/proc/{pid}/smaps_rollup", "Pss:") for pid in self._processes()) * 1024

    def rss_bytes(self) -> int:
        """Resident memory of its first process."""
        return _kib(f"/proc/{self._process.pid}/status", "VmRSS:") * 1024

    def _processes(self) -> list[int]:
        """Its own, those that came of it, and those of its session."""
        found = {self._process.pid}
        stats = {pid: stat for path in Path("/proc").glob("[0-9]*") if (stat := _stat(pid := int(path.name)))}
        size = 0
        while len(found) > size:
            size = len(found)
            found |= {pid for pid, stat in stats.items() if int(stat[1]) in found or int(stat[3]) == self._process.pid}
        return sorted(found & stats.keys())

    def stop(self) -> None:
        """End it in order, and then whatever of it is left."""
        processes = {pid: _stat(pid)[19:20] for pid in self._processes()}  # with the moment at which each began
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_S)
        for pid, began in processes.items():
            if _stat(pid)[19:20] == began:  # it is the same one, and not another that got its number
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


@contextmanager
def serving(contender: Contender, bundle: Path) -> Iterator[Server]:
    """A server while the block lasts. A start that fails is tried once more: a port may have been taken, say."""
    try:
        server = Server(contender, bundle)
    except NotServing as error:
        print(f"{contender.title}: {error}; once more", file=sys.stderr, flush=True)
        server = Server(contender, bundle)
    try:
        yield server
    finally:
        server.stop()


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        return int(listener.getsockname()[1])


def _stat(pid: int) -> list[str]:
    """What the kernel says of a process, from its state on; nothing where it has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _kib(path: str, name: str) -> int:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)
