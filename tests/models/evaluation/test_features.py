"""The feature extractor: it learns real digits, is the same every time, is kept, and works on any images."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.data.load import Dataset, Split
from models.evaluation.features import checksum_of, load_features, untrained_features

pytestmark = pytest.mark.usefixtures("one_thread")


def dataset(*shape: int, labels: bool = True, count: int = 90) -> Dataset:
    """Noise of three brightnesses, which are the labels; (h, w, c)."""
    random = np.random.default_rng(0)
    classes = np.arange(count) % 3
    images = (random.integers(0, 60, (count, *shape)) + 80 * classes[:, None, None, None]).astype(np.uint8)
    cuts = [slice(0, -20), slice(-20, -10), slice(-10, None)]
    train, validation, test = (Split(images[cut], classes[cut] if labels else None) for cut in cuts)
    return Dataset(
        "noise", train, validation, test, ("dark", "grey", "light") if labels else None, f"checksum {shape} {labels}"
    )


@pytest.mark.slow
def test_the_net_learns_real_digits(tmp_path: Path) -> None:
    """60 batches of 1,600 digits are enough to name more than nine of ten others."""
    with np.load(Path(__file__).parents[2] / "data" / "mnist-2000.npz") as sample:
        images, labels = sample["images"][..., None], sample["labels"].astype(np.int64)
    train, validation, test = (
        Split(images[cut], labels[cut]) for cut in (slice(0, 1600), slice(1600, 1800), slice(1800, None))
    )
    digits = Dataset("digits", train, validation, test, tuple("0123456789"), "some digits")
    extractor = load_features(digits, cache=tmp_path, updates=60)
    assert extractor.accuracy is not None
    assert extractor.accuracy > 0.9
    named = extractor.embed(digits.test.images).logits.argmax(dim=1).numpy()
    assert (named == digits.test.labels).mean() > 0.9


@pytest.mark.parametrize("shape", [(3, 5, 1), (8, 8, 1), (16, 16, 3), (10, 6, 3), (33, 33, 1), (128, 128, 3)], ids=str)
def test_any_size_and_both_kinds_of_channels_work(shape: tuple[int, ...], tmp_path: Path) -> None:
    """128 features that are finite and not negative, and a logit a class; each row's own, whatever stands beside it."""
    data = dataset(*shape, count=30)
    extractor = load_features(data, cache=tmp_path, updates=2)
    features, logits = extractor.embed(data.train.images)
    assert features.shape == (10, 128)
    assert logits.shape == (10, 3)
    assert bool(features.isfinite().all())
    assert features.min() >= 0
    alone = extractor.embed(data.train.images[3:4])
    torch.testing.assert_close(alone.features, features[3:4], rtol=1e-4, atol=1e-5)


def test_equal_seeds_give_equal_nets_and_others_other_ones(tmp_path: Path) -> None:
    """Deterministic on one machine, and independent of the global generator, which stays where it was."""
    data = dataset(8, 8, 1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load_features(data, cache=tmp_path / "a", updates=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert load_features(data, cache=tmp_path / "b", updates=5).checksum == first.checksum
    assert load_features(data, cache=tmp_path / "b", updates=5, seed=1).checksum != first.checksum
    assert untrained_features(data).checksum == untrained_features(data).checksum
    assert untrained_features(data).checksum != untrained_features(data, seed=1).checksum


def test_a_second_time_needs_no_training(tmp_path: Path) -> None:
    """The cached net is the one that was trained, to the last bit; a damaged file is made good."""
    data, done = dataset(8, 8, 1), []

    def note(update: int, _of: int) -> None:
        done.append(update)

    first = load_features(data, cache=tmp_path, updates=5, progress=note)
    assert done == [1, 2, 3, 4, 5]
    again = load_features(data, cache=tmp_path, updates=5, progress=note)
    assert len(done) == 5
    assert (again.checksum, again.accuracy) == (first.checksum, first.accuracy)
    assert torch.equal(again.embed(data.test.images).features, first.embed(data.test.images).features)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    assert load_features(data, cache=tmp_path, updates=5, progress=note).checksum == first.checksum
    assert len(done) == 10
    load_features(data, cache=tmp_path, updates=5, progress=note)
    assert len(done) == 10


def test_other_data_get_another_net(tmp_path: Path) -> None:
    """The cache is asked by the data's checksum, so no net is ever used on data that it was not trained on."""
    load_features(dataset(8, 8, 1), cache=tmp_path, updates=1)
    load_features(dataset(8, 8, 3), cache=tmp_path, updates=1)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    """A file where the folder should be: the net is trained all the same."""
    (tmp_path / "file").touch()
    assert load_features(dataset(8, 8, 1), cache=tmp_path / "file", updates=1).kind == "trained"


def test_the_cache_lies_where_the_system_keeps_such_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_CACHE_HOME where it is set, ~/.cache otherwise."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_features(dataset(8, 8, 1), updates=1)
    assert [path.suffix for path in (tmp_path / "xdg" / "gan-service").iterdir()] == [".safetensors"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    load_features(dataset(8, 8, 1), updates=1)
    assert len(list((tmp_path / ".cache" / "gan-service").iterdir())) == 1


def test_without_labels_the_net_is_untrained(tmp_path: Path) -> None:
    """It says so, claims no accuracy, and leaves nothing in the cache."""
    extractor = load_features(dataset(8, 8, 1, labels=False), cache=tmp_path)
    assert (extractor.kind, extractor.accuracy) == ("untrained", None)
    assert extractor.checksum == untrained_features(dataset(8, 8, 1, labels=False)).checksum
    assert not list(tmp_path.iterdir())


def test_the_checksum_sees_every_number(tmp_path: Path) -> None:
    """One changed weight, also of a running statistic, is another net."""
    net = load_features(dataset(8, 8, 1), cache=tmp_path, updates=1).net
    for name, tensor in net.state_dict().items():
        before = checksum_of(net)
        tensor.view(-1)[0] += 1
        assert checksum_of(net) != before, name
