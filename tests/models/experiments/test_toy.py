"""The game in one dimension: what the paper proves of it holds, in numbers and in pictures."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.__main__ import main
from models.experiments.toy import (
    GRID,
    GRID_STEP,
    OPTIMUM,
    P_DATA,
    Game,
    ToyOptions,
    ToyResult,
    best_discriminator,
    game_value,
    measured,
    play,
)
from models.experiments.toy_plot import animation, panels

pytestmark = pytest.mark.usefixtures("one_thread")

# Half the default's batch and three quarters of its updates: a third of the time, the same thresholds.
QUICK = ToyOptions(steps=1_500, batch_size=1_024, d_updates=1_000)
TINY = ToyOptions(steps=3, batch_size=16, d_updates=5, samples=2_000)


@pytest.fixture(scope="module")
def result() -> ToyResult:
    """A whole game."""
    return play(QUICK)


@pytest.mark.slow
def test_trained_on_d_becomes_the_ratio_of_densities(result: ToyResult) -> None:
    """With G frozen at three stages, D's largest gap to p_data / (p_data + p_g) falls under 0.05 (proposition 1)."""
    assert [stage.step for stage in result.stages] == [0, 37, 1_500]
    assert QUICK.samples == 10**6
    for stage in result.stages:
        assert stage.gaps[-1][0] == QUICK.d_updates
        assert stage.gaps[-1][1] < 0.05
    assert result.stages[0].gaps[0][1] > 0.3  # it had to learn that
    assert result.stages[1].gaps[0][1] > 0.05


@pytest.mark.slow
def test_the_game_goes_from_far_off_to_its_optimum(result: ToyResult) -> None:
    """C(G) is at least −1.2 at first and within 2 % of −log 4 at last, and falls in between (theorem 1)."""
    start, middle, end = (stage.value for stage in result.stages)
    assert start >= -1.2
    assert start > middle > end
    assert abs(end + np.log(4)) <= 0.02 * np.log(4)
    assert [stage.jsd for stage in result.stages] == pytest.approx([(v + np.log(4)) / 2 for v in (start, middle, end)])


@pytest.mark.slow
def test_a_fresh_d_confirms_the_end(result: ToyResult) -> None:
    """A D that never saw the game finds the same value, and ½ within 0.05 wherever there is anything to see."""
    assert result.fresh.value == pytest.approx(result.stages[-1].value, rel=0.02)
    assert result.fresh.from_half < 0.05
    assert result.fresh.gap < 0.05
    assert all(result.claims().values())


@pytest.mark.slow
def test_the_panels_are_the_papers(result: ToyResult) -> None:
    """(a) D is off, (b) the same G with D = D*, (c) G nearer to the data, (d) both densities one and D = ½."""
    a, b, c, d = result.panels

    def off(index: int) -> float:
        view = result.panels[index]
        seen = measured(view.p_g)
        return float(np.abs(view.d - best_discriminator(view.p_g))[seen].max())

    assert off(0) > 0.3
    assert off(1) < 0.05
    assert (a.step, b.step, c.step, d.step) == (0, 0, 37, 1_500)
    np.testing.assert_array_equal(a.arrows, b.arrows)
    distances = [np.abs(view.p_g - P_DATA).max() for view in (b, c, d)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.03
    assert np.abs(d.d - 0.5)[measured(d.p_g)].max() < 0.05
    assert len(result.frames) >= 30
    assert [view.step for view in result.frames] == sorted(view.step for view in result.frames)


def test_a_wrong_game_is_not_confirmed() -> None:
    """Three updates do not make the densities one, and the claims say so; another seed gives other numbers."""
    tiny = play(TINY)
    assert tiny.stages != play(replace(TINY, seed=1)).stages
    claims = tiny.claims()
    assert not all(claims.values())
    assert not claims["C(G) is within 2 % of −log 4 at the end"]


def test_the_value_of_known_densities_is_the_known_one() -> None:
    """Equal densities give −log 4, disjoint ones 0, and N(μ, 1) what numerical integration elsewhere gives."""
    assert game_value(P_DATA) == pytest.approx(OPTIMUM, abs=1e-6)
    far = np.where(GRID > 5.5, 1 / (0.5 * 100 * GRID_STEP), 0.0) * 1.0
    assert game_value(far / (far.sum() * GRID_STEP)) == pytest.approx(0, abs=1e-4)
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal(400_000), 1 + rng.standard_normal(400_000)  # D*(x) = σ(½ − x)
    sampled = -np.log1p(np.exp(x - 0.5)).mean() - np.log1p(np.exp(0.5 - g)).mean()
    assert game_value(np.exp(-np.square(GRID - 1) / 2) / np.sqrt(2 * np.pi)) == pytest.approx(sampled, abs=5e-3)


def test_the_density_of_the_first_g_is_the_logistic_one() -> None:
    """G starts as −1.2 + ¼·logit(z), whose density is known: the histogram of 10⁶ samples is within 2 % of its peak."""
    p_g = Game(QUICK).density(10**6)
    exact = 1 / np.square(2 * np.cosh((GRID + 1.2) / 0.5)) / 0.25
    assert np.abs(p_g - exact).max() < 0.02 * exact.max()
    assert p_g.sum() * GRID_STEP == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_the_seed_fixes_everything_and_the_command_leaves_it_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command writes the numbers of its seed; a game too short to keep its promises exits with 1 and says why."""
    assert main(["toy", "--out", str(tmp_path), "--seed", "5", "--steps", "2", "--d-updates", "9"]) == 1
    told = capsys.readouterr()
    assert "not so: C(G) is within 2 % of −log 4 at the end" in told.err
    assert told.out.count("largest gap to p_data/(p_data+p_g)") == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy.gif", "toy.json", "toy.png"]
    again = play(ToyOptions(seed=5, steps=2, d_updates=9)).record()
    assert json.loads((tmp_path / "toy.json").read_text()) == json.loads(json.dumps(again))
    assert set(again) == {"options", "optimum", "stages", "fresh_discriminator", "claims"}


def test_a_folder_that_cannot_be_is_refused_before_the_game(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And not after half a minute of it."""
    (tmp_path / "file").write_text("mine")
    assert main(["toy", "--out", str(tmp_path / "file")]) == 1
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", f"error: {tmp_path / 'file'}: File exists\n")


@pytest.mark.slow
def test_the_pictures_show_four_panels_and_the_whole_game(result: ToyResult) -> None:
    """A wide picture with the three colours of the curves in it, and a film that ends where the game does."""
    with Image.open(io.BytesIO(panels(result))) as picture:
        assert picture.size == (1300, 390)
        pixels = np.asarray(picture.convert("RGB"))
    for panel in np.array_split(pixels, 4, axis=1):
        for colour in ((0x15, 0x80, 0x3D), (0x1D, 0x4E, 0xD8), (0xBF, 0xDB, 0xFE)):
            assert (panel == colour).all(axis=2).sum() > 50
    with Image.open(io.BytesIO(animation(result))) as film:
        assert film.format == "GIF"
        first = np.asarray(film.convert("RGB")).copy()
        film.seek(len(result.frames) - 1)
        assert (np.asarray(film.convert("RGB")) != first).any(axis=2).mean() > 0.01
        assert film.info["duration"] > 1_000
