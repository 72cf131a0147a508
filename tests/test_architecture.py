"""The directions of flow: who may import whom, what serving does without, and that importing does nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the leaves to the edge: a file imports only from those before it. A new file gets its place here.
ORDER = {
    "models": [
        "__init__",
        *("spec", "dataset", "idx", "imagecache", "imagefolder", "data"),
        *("networks", "losses", "sampler", "packing", "evaluation"),
        *("bundle", "features", "scores", "suite"),
        *("trainer", "health", "cost", "rundir", "report", "tensorboard", "display"),
        *("toy", "toyplot", "figures", "export", "__main__"),
    ],
    "service": [
        "__init__",
        *("settings", "errors", "headers", "held", "keys", "metrics", "merging", "logs", "exchange", "crew"),
        *("memory", "processors", "signals", "listener", "supervisor", "member"),
        *(
            "encode",
            "slices",
            "jsonlimits",
            "imagefile",
            "picture",
            "decoder",
            "decoders",
            "decode",
            "problems",
            "schemas",
            "caching",
        ),
        *("batcher", "tracing", "replay", "thread", "engine", "serving"),
        *(
            "client",
            "middleware",
            "desk",
            "openapi",
            "routes",
            "repository",
            "probes",
            "pages",
            "app",
            "head",
            "protocol",
            "server",
            "__main__",
            "script",
            "worker",
        ),
    ],
}
MODULES = [f"{package}.{name}" for package, names in ORDER.items() for name in names]

# Where the two packages meet. What these import in turn is all that serving brings along.
SERVICE_MAY_IMPORT = {"models.bundle", "models.sampler", "models.spec"}
SERVING_BRINGS = {"models", *SERVICE_MAY_IMPORT, "models.networks", "models.packing"}
TRAINING_EXTRA = ("rich", "sklearn", "scipy", "matplotlib", "onnx", "onnxruntime", "onnxscript", "tensorboard")


def path_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def imports_of(module: str) -> Iterator[str]:
    """Every module that a file names in an import statement, wherever it stands."""
    package = module.rpartition(".")[0]
    for node in ast.walk(tree_of(path_of(module))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(part for part in (package if node.level else "", node.module) if part)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if base in ORDER and path_of(inner).exists() else base


def ours(module: str) -> set[str]:
    """The modules of this repository that a file imports; a package counts as its `__init__`."""
    names = {name for name in imports_of(module) if name.partition(".")[0] in ORDER}
    return {f"{name}.__init__" if name in ORDER else name for name in names}


@pytest.mark.parametrize("package", ORDER)
def test_every_module_has_its_place_in_the_order(package: str) -> None:
    """The list above names each file of the package once, so that a new one is placed with thought."""
    assert sorted(path.stem for path in (ROOT / package).glob("*.py")) == sorted(ORDER[package])
    assert not [path for path in (ROOT / package).rglob("*.py") if path.parent != ROOT / package]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_those_before_it(module: str) -> None:
    """Within a package the flow has one direction, so there is no cycle and a leaf can be read alone."""
    package, name = module.split(".")
    before = {f"{package}.{other}" for other in ORDER[package][: ORDER[package].index(name)]}
    assert {other for other in ours(module) if other.startswith(f"{package}.")} <= before


def test_models_never_imports_service() -> None:
    """Training knows nothing of HTTP."""
    offenders = {name: ours(f"models.{name}") for name in ORDER["models"]}
    assert not {name for name, found in offenders.items() if any(other.startswith("service") for other in found)}


def test_service_meets_models_in_three_modules() -> None:
    """Bundles, the sampler and the specs: never data, losses, trainer or evaluation."""
    for name in ORDER["service"]:
        found = {other for other in ours(f"service.{name}") if other.startswith("models")}
        assert found <= SERVICE_MAY_IMPORT, name


def test_serving_brings_no_training_along() -> None:
    """What those three import in turn is the nets, and no more."""
    reached, waiting = set(), {"models.__init__", *SERVICE_MAY_IMPORT}
    while waiting:
        module = waiting.pop()
        reached.add(module.removesuffix(".__init__"))
        waiting |= {other for other in ours(module) if other.removesuffix(".__init__") not in reached}
    assert reached == SERVING_BRINGS


def test_serving_works_without_the_training_extra() -> None:
    """The whole service is imported, and an application built, where no package of an extra exists."""
    modules = [f"service.{name}" for name in ORDER["service"]]
    program = f"""
import importlib, sys
for name in {TRAINING_EXTRA}:
    sys.modules[name] = None
for name in {modules}:
    importlib.import_module(name)
from service.app import create_app
from service.settings import Settings
create_app(Settings())
print(*sorted(name for name in sys.modules if name.partition(".")[0] == "models"))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == SERVING_BRINGS


# Imports every module with a spy on what it reads. Only what our own code asks for counts, not what torch reads.
SPY = """
import builtins, importlib, os, sys
BETWEEN = {"os", "io", "pathlib", "collections.abc", "posixpath", "genericpath", "__main__", "tempfile", "shutil"}
OURS = {"models", "service"}
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
before, threads = set(REGISTRY._names_to_collectors), threading.active_count()
for name in sys.argv[1:]:
    importlib.import_module(name)
found += [f"somebody registers {name}" for name in set(REGISTRY._names_to_collectors) - before]
found += [f"somebody starts {thread}" for thread in threading.enumerate()[threads:]]
print(*found, sep="\\n", end="")
"""


def test_importing_does_nothing() -> None:
    """No module reads the environment, opens a file or a socket, registers a metric or starts a thread on import."""
    done = subprocess.run([sys.executable, "-c", SPY, *MODULES], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_module_names_are_unique_over_both_packages() -> None:
    """`tests/test_batcher.py` can only mean one thing, and no file's name says nothing."""
    models, service = (set(names) - {"__init__", "__main__"} for names in ORDER.values())
    assert not models & service
    assert not (models | service) & {"utils", "helpers", "common", "misc", "models", "service"}


@pytest.mark.parametrize(
    "path",
    sorted(path for folder in ("models", "service", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")),
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
