"""gan-client is a distribution of its own: built from its folder alone, installed without the service and torch."""

import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "gan_client"


def project(path: Path) -> dict[str, Any]:
    """A pyproject.toml's `project`."""
    found: dict[str, Any] = tomllib.loads(path.read_text())["project"]
    return found


def test_it_has_the_licence_of_the_repository() -> None:
    """Its own copy, because a distribution is built from its folder."""
    assert (FOLDER / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert project(FOLDER / "pyproject.toml")["license"] == "MIT"


def test_its_lowest_versions_are_the_service_s() -> None:
    """So `make test-lowest` tests both."""
    service = project(ROOT / "pyproject.toml")
    named = {Requirement(line) for line in service["dependencies"] + service["optional-dependencies"]["test"]}
    assert {Requirement(line) for line in project(FOLDER / "pyproject.toml")["dependencies"]} <= named


def test_every_folder_of_it_is_packaged() -> None:
    """They are listed by name, because the folder is the package itself."""
    listed = tomllib.loads((FOLDER / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent for path in FOLDER.rglob("__init__.py") if "build" not in path.parts}
    assert set(listed) == {".".join(folder.relative_to(ROOT).parts) for folder in folders}


def needed(names: list[str]) -> set[str]:
    """Distributions that these need, and those that they need, as installed here."""
    found, waiting = set[str](), list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            requirements = map(Requirement, importlib.metadata.requires(name) or [])
            waiting += [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def link(name: str, folder: Path) -> None:
    """Make an installed distribution appear in another environment."""
    distribution = importlib.metadata.distribution(name)
    tops = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
    for top in tops:
        (folder / top).symlink_to(str(distribution.locate_file(top)))


@pytest.mark.slow
def test_it_is_installed_alone_and_works(live: Any, tmp_path: Path) -> None:
    """A source archive, a wheel from it, and an environment with that and what it says it needs; then a request."""
    shutil.copytree(FOLDER, tmp_path / "source", ignore=shutil.ignore_patterns("*.egg-info", "build", "__pycache__"))
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path / "source", check=True, capture_output=True)
    (archive,) = tmp_path.glob("gan_client-*.tar.gz")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    offline = ["--no-index", "--no-deps"]
    subprocess.run([*pip, "wheel", *offline, "--no-build-isolation", archive], cwd=tmp_path, check=True)
    (wheel,) = tmp_path.glob("gan_client-*.whl")
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name for name in files if name.endswith(".py")} == {
        path.relative_to(ROOT).as_posix() for path in FOLDER.rglob("*.py") if "build" not in path.parts
    }
    assert "gan_client/py.typed" in files

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([*pip, "--python", python, "install", *offline, wheel], check=True)
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'), end='')"]
    packages = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout)
    for name in needed([Requirement(line).name for line in project(FOLDER / "pyproject.toml")["dependencies"]]):
        link(name, packages)
    assert not (packages / "torch").exists()
    done = subprocess.run(
        [python.with_name("gan-client"), "sample", "--url", live.url, "--count", "3", "--out", "images"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "images").glob("*.png"))) == 3
