"""The examples of the user's pages, run: a page's blocks of one language are one program, against one real server."""

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageSequence

from models.__main__ import main
from service.settings import Settings

ROOT = Path(__file__).parents[1]
FOREIGN = re.compile(r"^(?:import|from) (?:openai|tritonclient|kserve)\b", re.MULTILINE)  # make test-clients runs these
PROGRAMS = {"sh": ("curl", ["bash", "-e"]), "python": (sys.executable, [sys.executable]), "js": ("node", ["node"])}
SUFFIXES = {"sh": ".sh", "python": ".py", "js": ".mjs"}

Run = Callable[[str, str, Path], None]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(live_server: Any) -> Iterator[Any]:
    """Serve the embedded bundles, with the key that the pages' examples for administrators send."""
    with live_server(Settings.model_validate({"device": "cpu", "admin_keys": "KEY"})).running() as server:
        yield server


def blocks(page: str, language: str) -> list[str]:
    """A page's examples in a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
    return [block for block in found if not FOREIGN.search(block)]


@pytest.fixture
def run(server: Any) -> Run:
    """Run a page's examples in a language, in a folder."""

    def run_page(page: str, language: str, folder: Path) -> None:
        needed, command = PROGRAMS[language]
        if shutil.which(needed) is None:
            pytest.skip(f"needs {needed}, which is not on this machine")
        lines = "\n".join(blocks(page, language)).replace("localhost:8000", f"127.0.0.1:{server.port}")
        program = folder / f"page{SUFFIXES[language]}"
        program.write_text(('curl() { command curl -sSf "$@"; }\n' if language == "sh" else "") + lines)
        done = subprocess.run(
            [*command, program],
            cwd=folder,
            env=os.environ
            | {"NO_PROXY": "*", "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    return run_page


def content(file: Path) -> Any:
    """What two languages' files of one name have in common: pixels, numbers, or the verdict."""
    match file.suffix:
        case ".npy":
            return np.load(file)
        case ".json":
            (result,) = json.loads(file.read_text())["results"]
            return np.array([result["probability_real"], int(result["label"])])
        case _:
            with Image.open(file) as image:
                return np.array([np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)])


@pytest.mark.parametrize("language", PROGRAMS)
def test_the_quick_start_gives_the_same_in_every_language(server: Any, run: Run, tmp_path: Path, language: str) -> None:
    """Whatever the language, its files have the pixels that the page's requests give."""
    run("docs/quick-start.md", language, tmp_path)
    between = httpx.post(
        f"{server.url}/sample",
        json={"labels": 3, "latents": latents_between(f"{server.url}/sample?seed=7&count=2&labels=3&format=json")},
    )
    expected = {
        "digit.png": "seed=7",
        "again.png": "seed=7",
        "marked.png": "seed=7",
        "grid.png": "seed=7&count=64&scale=4",
        "threes.png": "seed=7&labels=3&count=8&layout=strip",
        "year.png": "seed=7&labels=2,0,2,6&layout=strip",
        "paper.png": "seed=7&bundle=mnist-mlp",
        "digits.npy": "seed=7&count=256&format=npy",
    }
    replies = {name: httpx.get(f"{server.url}/sample?{query}") for name, query in expected.items()}
    way = f"{server.url}/interpolate?seed_from=7&seed_to=8&steps=10"
    replies |= {"way.png": httpx.get(way), "way.gif": httpx.get(f"{way}&scale=4&format=gif"), "between.png": between}
    right = tmp_path / "right"
    right.mkdir()
    for name, reply in replies.items():
        (right / name).write_bytes(reply.raise_for_status().content)
        np.testing.assert_array_equal(content(tmp_path / name), content(right / name), name)
    checked = httpx.post(f"{server.url}/verify", files={"images": (tmp_path / "marked.png").read_bytes()})
    assert checked.json()["results"][0]["verdict"] == "identical"
    judged = httpx.post(f"{server.url}/discriminate", files={"images": (right / "digit.png").read_bytes()})
    (right / "verdict.json").write_bytes(judged.content)
    np.testing.assert_allclose(content(tmp_path / "verdict.json"), content(right / "verdict.json"), rtol=1e-5)


def latents_between(url: str) -> list[list[float]]:
    """The latent half-way between the first two of a request."""
    first, second = httpx.get(f"{url}&latents=true").raise_for_status().json()["latents"]
    return [[(a + b) / 2 for a, b in zip(first, second, strict=True)]]


@pytest.fixture
def folder(server: Any, tmp_path: Path) -> Path:
    """A folder with the files that examples upload, and the bundles that they read."""
    image = httpx.get(f"{server.url}/sample?seed=1").raise_for_status().content
    for name in ("digit.png", "a.png"):
        (tmp_path / name).write_bytes(image)
    Image.open(io.BytesIO(image)).save(tmp_path / "b.jpg")
    shutil.copytree(ROOT / "bundles", tmp_path / "bundles")  # one of them is signed
    return tmp_path


def test_the_examples_of_the_api_run(run: Run, folder: Path) -> None:
    """In the shell and in Python."""
    for language in ("sh", "python"):
        run("docs/api.md", language, folder)


def test_the_examples_of_the_bundle_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator is exported, and drawn from with and without PyTorch."""
    monkeypatch.chdir(folder)
    for command in "".join(blocks("docs/bundle-format.md", "sh")).splitlines():
        assert main(shlex.split(command)[3:]) == 0
    names = dict[str, Any]()
    for example in blocks("docs/bundle-format.md", "python"):
        exec(example, names)  # noqa: S102 - our own page
        assert names["images"].shape[0] == 64


def test_every_step_of_the_quick_start_is_there_in_every_language() -> None:
    """Under each heading as many blocks of each language."""
    for part in re.split(r"^## ", (ROOT / "docs/quick-start.md").read_text(), flags=re.MULTILINE):
        counts = {len(re.findall(rf"^```{language}$", part, flags=re.MULTILINE)) for language in PROGRAMS}
        assert len(counts) == 1, part
