"""The README's commands do what it says, taken from its text and run."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.settings import Settings

ROOT = Path(__file__).parent.parent
SAMPLE = Path(__file__).parent / "data" / "mnist-2000.npz"
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
REQUESTS = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.startswith("curl")]


def run(command: str, folder: Path, **environment: str) -> str:
    """Run a line of shell in a folder and give back what it printed."""
    done = subprocess.run(
        ["bash", "-ec", command], cwd=folder, capture_output=True, text=True, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_five_requests_give_what_the_readme_says(embedded: Any, tmp_path: Path) -> None:
    """A picture of 64 digits, the sixth of them alone, JSON, an array, and a judgement of the digit just fetched."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl, which is not on this machine")
    assert len(REQUESTS) == 5
    printed = [
        run(line.replace("localhost:8000", f"127.0.0.1:{embedded.port}").replace("curl ", "curl -sSf "), tmp_path)
        for line in REQUESTS
    ]
    whole, sixth = (np.asarray(Image.open(tmp_path / name)) for name in ("digits.png", "sixth.png"))
    assert whole.shape == (8 * 28, 8 * 28)
    np.testing.assert_array_equal(sixth, whole[:28, 5 * 28 : 6 * 28])
    assert [json.loads(printed[2])[key] for key in ("seed", "first_index")] == [7, 0]
    assert len(json.loads(printed[2])["images"]) == 2
    array = np.load(tmp_path / "digits.npy")
    assert array.shape == (256, 28, 28, 1)
    np.testing.assert_array_equal(array[5, :, :, 0], sixth)
    (result,) = json.loads(printed[4])["results"]
    assert 0 < result["probability_real"] < 1
    assert result.get("converted") is not True


def test_a_digit_in_black_on_white_is_named_and_its_inverse_is_not(embedded: Any) -> None:
    """What the README says of hints, with a real digit."""
    digit = np.load(SAMPLE)["images"][:1].reshape(1, 28, 28)
    both = np.concatenate([255 - digit, digit])
    file = io.BytesIO()
    np.save(file, both)
    headers = {"Content-Type": "application/x-npy"}
    for bundle in ("mnist", "mnist-mlp"):
        url = f"{embedded.url}/discriminate?bundle={bundle}"
        inverted, right = httpx.post(url, content=file.getvalue(), headers=headers).json()["results"]
        assert "dark on light" in inverted["hint"]
        assert "hint" not in right


def test_the_embedded_digits_have_the_brightness_of_real_ones(embedded: Any) -> None:
    """What is shipped was trained: its mean image is the real digits', pixel by pixel, and its samples differ."""
    reply = httpx.get(f"{embedded.url}/sample?count=1000&seed=1&format=npy")
    generated = np.load(io.BytesIO(reply.content)).squeeze().astype(float)
    real = np.load(SAMPLE)["images"].squeeze().astype(float)
    assert np.corrcoef(generated.mean(axis=0).ravel(), real.mean(axis=0).ravel())[0, 1] > 0.95
    assert generated.std(axis=0).mean() > 0.8 * real.std(axis=0).mean()


@pytest.mark.parametrize("target", ["serve", "test", "install"])
def test_the_make_targets_are_there(target: str) -> None:
    """Each target that the README names runs what it says."""
    assert any(f"make {target}" in block for block in BLOCKS)
    installed = "[train,export,import,tensorboard,otlp,bulk,test]"
    expected = {"serve": "python -m service", "test": "python -m pytest", "install": installed}
    assert expected[target] in run(f"make --dry-run --always-make {target}", ROOT)


def test_ci_runs_what_a_person_runs() -> None:
    """Green for a person means green in CI."""
    targets = re.findall(r"^ *make ([a-z-]+)", (ROOT / ".ci" / "run").read_text(), flags=re.MULTILINE)
    assert targets == ["test", "test-clients", "test-lowest", "site", "test-ray", "test-fast"]


@pytest.mark.slow
def test_three_lines_of_python_draw_what_the_service_gives(embedded: Any) -> None:
    """The README's lines, run from the repository's root."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert all(len([line for line in example.splitlines() if line]) <= 3 for example in examples)
    lines = "".join(examples).replace("http://localhost:8000", embedded.url)
    # Through memory: NumPy writes to files and to raw streams, but not to a buffered pipe.
    save = "import io, sys, numpy; numpy.save(file := io.BytesIO(), images); sys.stdout.buffer.write(file.getvalue())"
    done = subprocess.run([sys.executable, "-c", lines + save], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    reply = httpx.get(f"{embedded.url}/sample?count=64&seed=7&format=npy")
    np.testing.assert_array_equal(np.load(io.BytesIO(done.stdout)), np.load(io.BytesIO(reply.content)))


@pytest.mark.slow
def test_own_images_become_a_served_bundle(live_server: Any, tmp_path: Path) -> None:
    """From a folder of images to a server on them, by the README's lines, in twenty steps instead of many."""
    images = np.load(SAMPLE)["images"][:100].squeeze()
    folder = tmp_path / "path" / "to" / "images"
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    (block,) = (block for block in BLOCKS if "models train" in block)
    train, evaluate = (line for line in block.splitlines() if "-m models" in line)
    python = f"{sys.executable} -m models"
    for line, more in ((train, " --steps 20 --device cpu"), (evaluate, " --device cpu")):
        run(line.replace(".venv/bin/python -m models", python) + more, tmp_path, PYTHONPATH=str(ROOT))
    bundles = re.search(r"GAN_BUNDLES=(\S+) make serve", block)
    assert bundles is not None
    settings = Settings.model_validate({"bundles": tmp_path / bundles[1], "device": "cpu"})
    with live_server(settings).running() as server:
        assert server.app.state.manager.bundles.default == "mine"
