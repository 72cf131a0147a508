"""What a classifier learns from generated images tells useful sets from useless ones."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from models.__main__ import main
from models.bundle import Bundle, read_bundle
from models.data.dataset import Dataset
from models.data.load import load_dataset
from models.evaluation.classification_accuracy import classification_accuracy
from models.spec import ImageSpec

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset("digits", None, seed=0)


def test_good_images_teach_as_much_as_real_ones_and_bad_ones_less(digits: Dataset) -> None:
    """The training images themselves give what they give; with a class drawn as another, that class is named."""
    assert digits.train.labels is not None
    same = classification_accuracy(digits, digits.train.images, digits.train.labels, updates=150)
    assert same.generated == same.real > 0.9
    assert (same.images, same.rows) == (len(digits.train.images), len(digits.test.images))
    mixed = digits.train.images.copy()
    sevens, ones = (np.flatnonzero(digits.train.labels == label) for label in (7, 1))
    mixed[sevens] = mixed[np.resize(ones, len(sevens))]
    worse = classification_accuracy(digits, mixed, digits.train.labels, updates=150)
    assert worse.real == same.real
    assert worse.generated < same.generated - 0.03
    assert worse.worst_class in {"7", "1"}
    assert worse.worst_class_generated < worse.worst_class_real - 0.2


def test_evaluate_says_whether_the_set_is_useful(
    make_tiny: Callable[..., Bundle],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Beside other figures, for the bundle's labels alone; recorded, and on the card."""
    monkeypatch.setattr("models.evaluation.classification_accuracy.updates_for", lambda _: 20)
    image, names = ImageSpec(channels=1, height=8, width=8), tuple("0123456789")
    bundle = make_tiny(tmp_path / "cond", image, names, None)
    command = ["--data", "digits", "--device", "cpu", "--verdicts-only", "--classification-accuracy", "--json"]
    assert main(["evaluate", str(bundle.folder), *command, "--record"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)["classification_accuracy"]
    assert found["split"] == "test"
    assert 0 <= found["generated"] < found["real"] <= 1
    assert "classification accuracy: a classifier that learns from" in err
    again = read_bundle(bundle.folder)
    assert again.version == bundle.version
    assert again.manifest.evaluation["classification_accuracy"] == found
    assert "A classifier that learns from its images alone" in (bundle.folder / "README.md").read_text("utf-8")
    plain = make_tiny(tmp_path / "plain", image, None, None)
    assert main(["evaluate", str(plain.folder), *command]) == 0
    said = json.loads(capsys.readouterr().out)
    assert "classification_accuracy" not in said
