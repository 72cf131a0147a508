"""Ways between seeds, samples by class, beside their nearest images, and by step: the right images in their places."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.__main__ import main
from models.bundle import Bundle
from models.experiments.figures import interpolation, nearest, neighbours
from models.inference.noise import draw_latents
from models.inference.pixels import grid
from models.training.run_folder import RunDir

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("method", ["linear", "spherical"])
@pytest.mark.parametrize(("name", "label"), [("tiny", None), ("rgb", None), ("cond", None), ("cond", "owl")])
def test_a_way_passes_through_its_seeds_own_images(
    tiny_bundles: dict[str, Bundle], method: str, name: str, label: str | None
) -> None:
    """Every fourth image is that of a seed, byte for byte, labels included; what lies between is neither."""
    bundle, seeds = tiny_bundles[name], [7, 2**53 - 1, 3]
    way = interpolation(bundle, seeds, 5, method, label)  # type: ignore[arg-type]
    assert len(way) == 9
    for place, seed in zip((0, 4, 8), seeds, strict=True):
        np.testing.assert_array_equal(way[place], bundle.draw(1, seed=seed, labels=label)[0])
    assert len({image.tobytes() for image in way}) == 9


def test_labels_change_in_the_middle_of_the_way(tiny_bundles: dict[str, Bundle]) -> None:
    """Between seeds of different labels each image has that of the nearer seed; in the very middle, the second's."""
    bundle = tiny_bundles["cond"]
    own = [
        next(k for k in range(3) if (bundle.draw(1, seed=s, labels=k) == bundle.draw(1, seed=s)).all())
        for s in range(9)
    ]
    first, second = 0, next(seed for seed in range(9) if own[seed] != own[0])
    way = interpolation(bundle, [first, second], 5, "linear")
    t = np.linspace(0, 1, 5)[:, None]
    ends = [draw_latents(bundle.manifest.latent, seed, 0, 1)[0].astype(np.float64) for seed in (first, second)]
    latents = ((1 - t) * ends[0] + t * ends[1]).astype(np.float32)
    labels = np.array([own[first]] * 2 + [own[second]] * 3)
    np.testing.assert_array_equal(way, bundle.images(latents, labels))


@pytest.mark.parametrize(
    ("seeds", "steps", "label", "reason"),
    [
        ([1], 5, None, "two or more"),
        ([1, 2], 1, None, "two steps"),
        ([1, -2], 5, None, "seed -2"),
        ([1, 2], 5, "owl", "no labels"),
    ],
)
def test_a_way_that_leads_nowhere_is_refused(
    tiny_bundles: dict[str, Bundle], seeds: list[int], steps: int, label: str | None, reason: str
) -> None:
    """One seed, one step, a seed that is none, a label for a bundle without: each is named."""
    with pytest.raises(ValueError, match=reason):
        interpolation(tiny_bundles["tiny"], seeds, steps, "linear", label)


def test_the_nearest_image_is_found_exactly() -> None:
    """Against a plain loop over more images than one chunk; a copy is at distance 0, and the first of two counts."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (5_003, 3, 4, 1), np.uint8)
    for query in random.integers(0, 256, (3, 3, 4, 1), np.uint8):
        distances = [float(np.sqrt(np.sum(np.square(query / 255 - image / 255)))) for image in images]
        index, distance = nearest(query, images)
        assert index == int(np.argmin(distances))
        assert distance == pytest.approx(min(distances))
    images[5_001] = images[17]
    assert nearest(images[5_001], images) == (17, 0.0)


@pytest.mark.parametrize("name", ["tiny", "rgb", "cond"])
def test_neighbours_stand_beside_their_samples(tiny_bundles: dict[str, Bundle], name: str) -> None:
    """The samples are the seed's first, in order; planted copies of those in the last column are found."""
    bundle = tiny_bundles[name]
    samples = bundle.draw(6, seed=4)
    random = np.random.default_rng(0)
    train = random.integers(0, 256, (50, *samples.shape[1:]), np.uint8)
    train[30], train[11] = samples[2], samples[5]
    picture, found = neighbours(bundle, train, seed=4, rows=2, columns=3)
    assert [(one.sample, one.training_image, one.distance) for one in found] == [(2, 30, 0.0), (5, 11, 0.0)]
    h, w = samples.shape[1:3]
    np.testing.assert_array_equal(picture[:, : 3 * w], grid(samples, 3))
    assert (picture[:, 3 * w : -w] == 255).all()
    np.testing.assert_array_equal(picture[:h, -w:], samples[2])
    np.testing.assert_array_equal(picture[h:, -w:], samples[5])


def test_interpolate_writes_both_ways_one_above_the_other(
    tiny_bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The linear way above the spherical, pixels repeated as asked, in folders that were not there."""
    folder, out = str(tiny_bundles["cond"].folder), tmp_path / "new" / "way.png"
    command = [
        "interpolate",
        folder,
        "--out",
        str(out),
        "--seeds",
        "4",
        "9",
        "--steps",
        "6",
        "--label",
        "dog",
        "--scale",
        "3",
    ]
    assert main(command) == 0
    ways = [interpolation(tiny_bundles["cond"], [4, 9], 6, method, "dog") for method in ("linear", "spherical")]
    with Image.open(out) as picture:
        np.testing.assert_array_equal(np.asarray(picture)[1::3, 1::3, None], grid(np.concatenate(ways), 6))
    assert "linear way above spherical way" in capsys.readouterr().out
    assert main([*command, "--method", "spherical"]) == 0
    with Image.open(out) as picture:
        np.testing.assert_array_equal(np.asarray(picture)[::3, ::3, None], grid(ways[1], 6))


def test_neighbours_takes_the_images_that_the_bundle_was_trained_on(
    tiny_bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy of a sample among the training images is reported at distance 0; images of another shape are refused."""
    bundle = tiny_bundles["tiny"]
    images = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1), np.uint8)
    images[:100] = bundle.draw(2)[1]  # some of a hundred copies end in the training split, whatever the division
    np.savez(tmp_path / "data.npz", images=images)
    command = ["neighbours", str(bundle.folder), "--out", str(tmp_path / "near.png"), "--rows", "1", "--columns", "2"]
    assert main([*command, "--data", str(tmp_path / "data.npz")]) == 0
    assert "sample 1: nearest is training image" in (told := capsys.readouterr().out)
    assert "at distance 0.00" in told
    with Image.open(tmp_path / "near.png") as picture:
        assert picture.size == (3 * 8 + 2, 8)
    np.savez(tmp_path / "other.npz", images=images[:, :4])
    assert main([*command, "--data", str(tmp_path / "other.npz")]) == 1
    assert "has images (1, 4, 8), tiny makes (1, 8, 8)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--out", "way.jpg"], "must end in .png"),
        (["--out", "way.png", "--seeds", "3"], "two or more"),
        (["--out", "way.png", "--steps", "1"], "two steps"),
        (["--out", "way.png", "--label", "fish"], "no labels"),
    ],
)
def test_a_picture_that_cannot_be_is_one_clear_line(
    tiny_bundles: dict[str, Bundle],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    reason: str,
) -> None:
    """Exit code 1, the reason on stderr, and no file."""
    monkeypatch.chdir(tmp_path)
    assert main(["interpolate", str(tiny_bundles["tiny"].folder), *more]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert not list(tmp_path.iterdir())


def test_each_class_has_a_row_of_the_seeds_images(
    tiny_bundles: dict[str, Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same images of the seed as each label in turn; a bundle without labels is refused."""
    bundle, out = tiny_bundles["cond"], tmp_path / "classes.png"
    command = ["--out", str(out), "--sample-seed", "4", "--columns", "5", "--scale", "2"]
    assert main(["classes", str(bundle.folder), *command]) == 0
    rows = [bundle.draw(5, seed=4, labels=label) for label in ("cat", "dog", "owl")]
    with Image.open(out) as picture:
        np.testing.assert_array_equal(np.asarray(picture)[::2, 1::2, None], grid(np.concatenate(rows), 5))
    capsys.readouterr()
    assert main(["classes", str(tiny_bundles["tiny"].folder), *command]) == 1
    assert "tiny has no labels" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [1, 3])
def test_a_runs_samples_are_rows_by_step(tmp_path: Path, capsys: pytest.CaptureFixture[str], channels: int) -> None:
    """The first images of each step's picture that is asked for, in that order; a step that has none is named."""
    run, out = RunDir(tmp_path / "run"), tmp_path / "evolution.png"
    run.begin({})
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 5, 4, channels), np.uint8)
    for step, of_step in zip((0, 50, 1_000_000), images, strict=True):
        run.save_samples(step, of_step)
    command = ["evolution", str(run.path), "--out", str(out), "--columns", "10"]
    for more, chosen in (([], images), (["--steps", "1000000", "0"], images[[2, 0]])):
        assert main([*command, *more]) == 0
        with Image.open(out) as picture:
            shown = np.asarray(picture).reshape(5 * len(chosen), 40, channels)
        np.testing.assert_array_equal(shown, grid(chosen[:, :10].reshape(-1, 5, 4, channels), 10))
    capsys.readouterr()
    assert main([*command, "--steps", "0", "7"]) == 1
    assert "no picture of step 7" in capsys.readouterr().err
    assert main(["evolution", str(tmp_path), "--out", str(out)]) == 1
    assert "no run with samples" in capsys.readouterr().err
