"""The directions of flow: who may import whom, what serving does without, and that importing does nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Who may import whom, beside their own room. A folder is a room; the files at the top of a package that know no room
# are its leaves.
LEAVES = {
    "service": ("__init__", "settings", "errors", "logs", "metrics"),
    "models": ("__init__", "spec", "files", "signing"),
    "gan_client": ("errors", "results"),
}
ROOMS = {
    # serving: server → http → engine → codecs → http → server
    "service": set[str](),  # the leaves: they can be read alone
    "service.machine": set[str](),  # what the process may use, and who is beside it
    "service.codecs": {"service", "models", "models.images", "models.inference"},  # arrays and files: no HTTP, no nets
    "service.engine": {  # no HTTP
        *("service", "service.machine"),
        *("models", "models.bundle", "models.inference", "models.networks"),
    },
    "service.http": {  # no sockets
        *("service", "service.machine", "service.engine", "service.codecs"),
        *("models", "models.bundle", "models.images", "models.inference"),
    },
    "service.app": {  # builds the parts
        *("service", "service.machine", "service.http", "service.engine", "service.codecs"),
        "models.bundle",
    },
    "service.server": {
        *("service", "service.machine", "service.http", "service.app", "service.__main__"),
        "models.bundle",
    },
    "service.ray": {"service", "service.app"},  # in the server's place
    "service.capacity": {"service"},  # sees the service from outside
    "service.__main__": {
        *("service", "service.machine", "service.http", "service.engine", "service.app", "service.server"),
        "service.capacity",
    },
    # training: images → data → networks → training → evaluation → bundle
    "models": set[str](),
    "models.images": set[str](),  # one image file; decoder processes bring it along: no torch, no pydantic
    "models.networks": {"models"},
    "models.data": {"models", "models.images"},  # files, no nets
    "models.inference": {"models", "models.networks"},  # serving brings it along: nothing of training
    "models.bundle": {"models", "models.images", "models.networks", "models.inference"},
    "models.exchange": {"models", "models.networks", "models.inference", "models.bundle"},  # to and from other programs
    "models.evaluation": {"models", "models.bundle", "models.data", "models.inference"},  # scores, whoever trained
    "models.training": {
        *("models", "models.networks", "models.bundle"),
        *("models.data", "models.inference", "models.evaluation"),
    },
    "models.experiments": {
        *("models", "models.bundle", "models.data", "models.inference"),
        *("models.evaluation", "models.training"),
    },
    "models.commands": {  # what people call: everything else, and nothing else knows them
        *("models", "models.images", "models.networks", "models.bundle", "models.exchange", "models.data"),
        *("models.inference", "models.evaluation", "models.training", "models.experiments"),
    },
    "models.__main__": {
        "models",
        "models.commands",
        "models.bundle",
        "models.data",
        "models.exchange",
        "models.training",
    },  # errors to codes
    # the client: a distribution of its own, which knows neither of them
    "gan_client": set[str](),
    "gan_client.core": {"gan_client"},  # requests and replies, nothing is sent
    "gan_client.client": {"gan_client", "gan_client.core"},
    "gan_client.async_client": {"gan_client", "gan_client.core"},
    "gan_client.dataset": {"gan_client", "gan_client.core", "gan_client.client"},  # the only one with torch
    "gan_client.__init__": {"gan_client", "gan_client.client", "gan_client.async_client"},  # what users import
    "gan_client.commands": {"gan_client", "gan_client.core", "gan_client.async_client"},
    "gan_client.__main__": {"gan_client", "gan_client.commands", "gan_client.async_client"},
}
# Where the two packages meet, and so all of `models` that serving brings along.
MEETING = ("models.bundle", "models.images", "models.inference", "models.networks", "models.spec")
TRACES = "service.http.layers.traces"  # imported only where the extra `otlp` is wanted
RAY = "service.ray"  # likewise the extra `ray`, which has an environment of its own
TRAINING_EXTRA = ("rich", "sklearn", "scipy", "matplotlib", "tensorboard")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


# pip leaves a copy of the client in gan_client/build.
FILES = [path for package in LEAVES for path in sorted((ROOT / package).rglob("*.py")) if "build" not in path.parts]
PATHS = {name_of(path): path for path in FILES}
MODULES = list(PATHS)


def room_of(module: str) -> str:
    """The folder that a file lies in; at the top of a package, the file itself, unless it is a leaf."""
    package, inner, *_ = module.split(".")
    return package if inner in LEAVES[package] else f"{package}.{inner}"


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def imports_of(module: str) -> Iterator[str]:
    """Every file of this repository that another one names in an import statement, wherever that stands."""
    for node in ast.walk(tree_of(PATHS[module])):
        named = []
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} imports by dots"
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in named:
            candidates = (name, name.rpartition(".")[0])
            yield from [found for one in candidates for found in (one, f"{one}.__init__") if found in PATHS][:1]


def test_every_room_has_its_rule() -> None:
    """The rules name each folder, and each file at the top of a package, so that a new one is placed with thought."""
    assert {room_of(module) for module in MODULES} == set(ROOMS)


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_what_its_room_may(module: str) -> None:
    """A room knows those that its rule names and no others."""
    room = room_of(module)
    assert {room_of(other) for other in imports_of(module)} <= ROOMS[room] | {room}


def test_there_are_no_circles() -> None:
    """Within a room, too, the flow has one direction: so a file can be read with those that it imports, and no more."""
    assert list(TopologicalSorter({module: set(imports_of(module)) for module in MODULES}).static_order())


def test_rooms_are_small_enough_to_be_seen_at_once() -> None:
    """At the top of each package, and in each room, a newcomer finds about a dozen names."""
    for folder in {path.parent for path in FILES}:
        names = {path.name for path in folder.iterdir()} - {"__pycache__", "__init__.py", "build"}
        names = {name for name in names if not name.endswith(".egg-info")}  # of an editable install
        assert len(names) <= 14, folder


@pytest.mark.parametrize("folder", sorted({path.parent for path in PATHS.values()}), ids=lambda path: path.name)
def test_a_room_says_what_lives_there(folder: Path) -> None:
    """The `__init__` of a room holds a docstring and nothing else, but for the version and some names."""
    tree = tree_of(folder / "__init__.py")
    assert ast.get_docstring(tree)
    allowed = ast.Expr | ast.Assign | (ast.ImportFrom if folder.name in {"gan_client", "networks"} else ast.Expr)
    assert all(isinstance(node, allowed) for node in tree.body)


def test_serving_works_without_the_training_extra() -> None:
    """The whole service but its traces is imported, and an application built, where no package of an extra exists."""
    modules = [
        name.removesuffix(".__init__") for name in MODULES if name.startswith("service") and name not in {TRACES, RAY}
    ]
    program = f"""
import importlib, sys
for name in ("opentelemetry.sdk", "opentelemetry.exporter", *{TRAINING_EXTRA}):
    sys.modules[name] = None
for name in {modules}:
    importlib.import_module(name)
from service.app import create_app
from service.settings import Settings
create_app(Settings())
print(*sorted(name for name in sys.modules if name.startswith("models.")))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    brought = {".".join(name.split(".")[:2]) for name in done.stdout.split()}
    assert brought <= {*MEETING, "models.files", "models.signing"}


def test_the_client_works_without_the_service() -> None:
    """It is imported where neither package exists, nor torch, nor any other that it does not say it needs."""
    modules = [name.removesuffix(".__init__") for name in MODULES if name.startswith("gan_client")]
    modules.remove("gan_client.dataset")
    program = f"""
import importlib, sys
for name in ("service", "models", "torch", "pydantic", "fastapi", "mcp", *{TRAINING_EXTRA}):
    sys.modules[name] = None
for name in {modules}:
    importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# Imports every module with a spy on what it reads. Only what our own code asks for counts, not what torch reads.
SPY = """
import builtins, importlib, os, sys
BETWEEN = {"os", "io", "pathlib", "collections.abc", "posixpath", "genericpath", "__main__", "tempfile", "shutil"}
OURS = {"models", "service", "gan_client"}
found = []

def note(what, subject):
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__") in BETWEEN:
        frame = frame.f_back
    if frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in OURS:
        found.append(f"{frame.f_globals['__name__']} {what} {subject}")

def spy(event, arguments):
    if event in {"open", "os.listdir", "os.scandir", "socket.__new__", "subprocess.Popen", "os.putenv"}:
        note(event, arguments[0] if arguments else "")

plain = os._Environ.__getitem__
def read(self, key):
    note("reads the variable", key)
    return plain(self, key)

os._Environ.__getitem__ = read
sys.addaudithook(spy)
from prometheus_client import REGISTRY
import threading
before, threads = {metric.name for metric in REGISTRY.collect()}, threading.active_count()
for name in sys.argv[1:]:
    importlib.import_module(name)
found += [f"somebody registers {name}" for name in {metric.name for metric in REGISTRY.collect()} - before]
found += [f"somebody starts {thread}" for thread in threading.enumerate()[threads:]]
print(*found, sep="\\n", end="")
"""


def test_importing_does_nothing() -> None:
    """No module reads the environment, opens a file or a socket, registers a metric or starts a thread on import."""
    done = subprocess.run(
        [sys.executable, "-c", SPY, *(name.removesuffix(".__init__") for name in MODULES if name != RAY)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_test_files_have_names_of_their_own() -> None:
    """`test_batcher` can only mean one thing, and no file's name says nothing."""
    tests = [path.stem for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(tests) == len(set(tests))
    assert not {name.rpartition(".")[2] for name in MODULES} & {"utils", "helpers", "common", "misc", "models"}


@pytest.mark.parametrize(
    "path",
    sorted(
        path
        for folder in ("models", "service", "gan_client", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
    ),
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_every_file_says_what_it_is_for(path: Path) -> None:
    """The first line of a module's docstring is its one job; a test's docstring is its story."""
    tree = tree_of(path)
    assert ast.get_docstring(tree), "no module docstring"
    silent = [
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.name.startswith("test_")
        and not ast.get_docstring(node)
    ]
    assert not silent
