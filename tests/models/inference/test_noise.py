"""The named random numbers against published vectors and their statistics, and ways between latents."""

import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from models.inference.noise import LABEL_STREAM, LATENT_STREAM, Noise, draw_labels, draw_latents, latent_path
from models.spec import LatentSpec

LAST = 2**53 - 1
seeds = st.integers(0, LAST)


def latent(dim: int, distribution: str = "normal") -> LatentSpec:
    return LatentSpec.model_validate({"dim": dim, "distribution": distribution})


# --- Philox ------------------------------------------------------------------------------------------------------

MASK = 2**64 - 1


def philox_block(counter: int, key: int) -> list[int]:
    """Four words of Philox4x64-10, from the algorithm's description (Salmon et al. 2011, §3.3), in plain integers."""
    c = [counter >> shift & MASK for shift in (0, 64, 128, 192)]
    k = [key & MASK, key >> 64]
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [high >> 64 ^ c[1] ^ k[0], high & MASK, low >> 64 ^ c[3] ^ k[1], low & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def philox_uniforms(seed: int, stream: int, block: int) -> list[float]:
    return [((word >> 11) + 0.5) * 2.0**-53 for word in philox_block(block, seed | stream << 64)]


def test_the_reference_is_philox() -> None:
    """Random123's known answers hold for the plain reference that the other tests compare with."""
    words = 0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B
    assert philox_block(0, 0) == list(words)
    words = 0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0
    assert philox_block(2**256 - 1, 2**128 - 1) == list(words)


def test_the_first_latents_are_the_known_answer() -> None:
    """Seed 0, image 0: the words of Random123's zero vector, as the documented formulas turn them into numbers."""
    words = 0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B
    u = [((word >> 11) + 0.5) * 2.0**-53 for word in words]
    uniform = [math.sqrt(3) * (2 * x - 1) for x in u]
    np.testing.assert_array_equal(draw_latents(latent(4, "uniform"), 0, 0, 1)[0], np.array(uniform, np.float32))
    normal = [
        math.sqrt(-2 * math.log(u[j])) * turn(2 * math.pi * u[j + 1]) for j in (0, 2) for turn in (math.cos, math.sin)
    ]
    np.testing.assert_allclose(draw_latents(latent(4), 0, 0, 1)[0], np.array(normal, np.float32), rtol=3e-7)


@settings(deadline=None, max_examples=100)
@given(seed=seeds, index=seeds, dim=st.integers(1, 13))
def test_any_latent_is_the_block_that_its_index_names(seed: int, index: int, dim: int) -> None:
    """Image i owns blocks i·⌈dim/4⌉ …, for every seed and index there is: computed with plain integers."""
    blocks = -(-dim // 4)
    u = [x for block in range(blocks) for x in philox_uniforms(seed, LATENT_STREAM, index * blocks + block)]
    expected = [math.sqrt(3) * (2 * x - 1) for x in u[:dim]]
    got = draw_latents(latent(dim, "uniform"), seed, index, 1)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.array([expected], np.float32))


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(
    images=st.lists(st.tuples(seeds, seeds), min_size=1, max_size=9),
    dim=st.integers(1, 130) | st.integers(65_500, 65_536),  # whose counters have two words
    distribution=st.sampled_from(["normal", "uniform"]),
)
@example(images=[(7, 2**64 // 16383)], dim=4 * 16383, distribution="uniform")  # one that overflows half-way
def test_torch_draws_the_same_words(images: list[tuple[int, int]], dim: int, distribution: str) -> None:
    """Uniform noise is the same in every bit, wherever it is drawn; normal noise but for its functions' last bits."""
    spec = latent(dim, distribution)
    asked = torch.tensor(images)
    drawn = Noise(spec)(asked[:, 0], asked[:, 1])
    assert drawn.dtype == torch.float32
    expected = np.concatenate([draw_latents(spec, seed, index, 1) for seed, index in images])
    if distribution == "uniform":
        np.testing.assert_array_equal(drawn.numpy(), expected)
    else:
        np.testing.assert_allclose(drawn.numpy(), expected, rtol=3e-7, atol=1e-15)


@settings(deadline=None, max_examples=100)
@given(
    seed=seeds,
    first=st.integers(0, LAST - 40),
    count=st.integers(1, 40),
    dim=st.integers(1, 130),
    distribution=st.sampled_from(["normal", "uniform"]),
    data=st.data(),
)
def test_an_image_alone_has_the_noise_it_has_in_a_crowd(
    seed: int, first: int, count: int, dim: int, distribution: str, data: st.DataObject
) -> None:
    """Every bit of a row is the same whether drawn alone, in a part or in the whole range."""
    spec = latent(dim, distribution)
    whole = draw_latents(spec, seed, first, count)
    assert whole.shape == (count, dim)
    assert np.isfinite(whole).all()
    row = data.draw(st.integers(0, count - 1))
    np.testing.assert_array_equal(draw_latents(spec, seed, first + row, 1)[0], whole[row])
    stop = data.draw(st.integers(row + 1, count))
    np.testing.assert_array_equal(draw_latents(spec, seed, first + row, stop - row), whole[row:stop])


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_ten_thousand_images_one_by_one_are_the_bulk(distribution: str) -> None:
    """The bulk is drawn by wide instructions and a single row is not: no last bit may tell."""
    spec = latent(10, distribution)
    bulk = draw_latents(spec, 2014, 0, 10_000)
    singles = np.concatenate([draw_latents(spec, 2014, index, 1) for index in range(10_000)])
    np.testing.assert_array_equal(bulk, singles)


def test_seeds_and_images_differ() -> None:
    """Neighbours in seed and in index share no row, and labels come from a stream of their own."""
    spec = latent(4)
    rows = [draw_latents(spec, seed, index, 1)[0] for seed in (0, 1, LAST) for index in (0, 1, LAST)]
    assert len({row.tobytes() for row in rows}) == 9
    assert philox_uniforms(3, LATENT_STREAM, 0) != philox_uniforms(3, LABEL_STREAM, 0)


@pytest.mark.parametrize(
    ("distribution", "reference"),
    [("normal", stats.norm()), ("uniform", stats.uniform(-math.sqrt(3), 2 * math.sqrt(3)))],
    ids=["normal", "uniform"],
)
def test_the_numbers_have_their_distribution(distribution: str, reference: Any) -> None:
    """400,000 numbers: mean 0, variance 1, the fourth moment, Kolmogorov-Smirnov, and no correlation of neighbours."""
    z = draw_latents(latent(100, distribution), 7, 0, 4_000).astype(np.float64)
    assert abs(z.mean()) < 0.008  # five standard errors
    assert abs(z.var() - 1) < 0.012
    assert abs((z**4).mean() - reference.stats("k") - 3) < 0.09
    assert stats.kstest(z.ravel(), reference.cdf).pvalue > 1e-3
    assert abs(np.corrcoef(z[:, 0::2].ravel(), z[:, 1::2].ravel())[0, 1]) < 0.012
    assert abs(np.corrcoef(z[:-1].ravel(), z[1:].ravel())[0, 1]) < 0.008


def test_uniform_numbers_stay_within_the_square_root_of_three() -> None:
    """±√3 is the edge, as float32 rounds it."""
    z = draw_latents(latent(100, "uniform"), 8, 0, 4_000)
    assert np.abs(z).max() <= np.float32(math.sqrt(3))


# --- Labels ------------------------------------------------------------------------------------------------------


def test_labels_come_at_their_frequencies() -> None:
    """Over 100,000 images each class has its share, and one that never occurred is never drawn."""
    frequencies = [0.1, 0.0, 0.25, 0.6, 0.05]
    counts = np.bincount(draw_labels(frequencies, 5, 0, 100_000), minlength=5)
    assert counts[1] == 0
    drawn = np.array(counts)[[0, 2, 3, 4]]
    assert stats.chisquare(drawn, 100_000 * np.array([0.1, 0.25, 0.6, 0.05])).pvalue > 1e-3


@settings(deadline=None, max_examples=100)
@given(seed=seeds, first=st.integers(0, LAST - 30), count=st.integers(1, 30), classes=st.integers(1, 12))
def test_a_label_is_a_function_of_seed_and_index(seed: int, first: int, count: int, classes: int) -> None:
    """The first word of the block that the index names, on the label stream, against the running total of shares."""
    frequencies = [1 / classes] * classes
    got = draw_labels(frequencies, seed, first, count)
    assert got.dtype == np.int64
    row = count // 2
    u = philox_uniforms(seed, LABEL_STREAM, first + row)[0]
    edges = np.cumsum(frequencies)[:-1]
    assert got[row] == sum(u >= edge for edge in edges)
    np.testing.assert_array_equal(draw_labels(frequencies, seed, first + row, 1), got[row : row + 1])


# --- Ways between latents ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "spherical"])
@given(
    seed=seeds, steps=st.integers(2, 30), dim=st.integers(1, 40), distribution=st.sampled_from(["normal", "uniform"])
)
def test_a_path_begins_and_ends_at_its_latents(
    method: Literal["linear", "spherical"], seed: int, steps: int, dim: int, distribution: str
) -> None:
    """Both ends bit for bit, everything finite, and backwards the same way."""
    start, stop = draw_latents(latent(dim, distribution), seed, 0, 2)
    path = latent_path(start, stop, steps, method)
    assert path.shape == (steps, dim)
    assert path.dtype == np.float32
    np.testing.assert_array_equal(path[0], start)
    np.testing.assert_array_equal(path[-1], stop)
    assert np.isfinite(path).all()
    np.testing.assert_allclose(latent_path(stop, start, steps, method)[::-1], path, atol=1e-5)


def test_paths_are_the_line_and_the_arc() -> None:
    """From (1, 0) to (0, 1): the line meets (½, ½), the arc (√½, √½), and thirds of it are 30 and 60 degrees."""
    east, north = np.eye(2, dtype=np.float32)
    np.testing.assert_allclose(latent_path(east, north, 3, "linear")[1], [0.5, 0.5])
    np.testing.assert_allclose(latent_path(east, north, 3, "spherical")[1], [math.sqrt(0.5)] * 2, rtol=1e-6)
    degrees = np.degrees(np.arctan2(*latent_path(east, north, 4, "spherical").T[::-1]))
    np.testing.assert_allclose(degrees, [0, 30, 60, 90], atol=1e-4)


@pytest.mark.parametrize("stop", [[2.0, 4.0], [-1.0, -2.0], [0.0, 0.0], [1.0, 2.0]], ids=str)
def test_latents_on_one_line_through_zero_go_straight(stop: list[float]) -> None:
    """There is no one arc between them."""
    start, end = np.array([1, 2], np.float32), np.array(stop, np.float32)
    np.testing.assert_array_equal(latent_path(start, end, 5, "spherical"), latent_path(start, end, 5, "linear"))


def test_a_spherical_path_keeps_the_length_that_a_line_loses() -> None:
    """In 100 dimensions the middle of the line has some 0.7 of the length, the arc's all of it."""
    start, stop = draw_latents(latent(100), 1, 0, 2)
    length = np.linalg.norm([start, stop], axis=1).mean()
    assert np.linalg.norm(latent_path(start, stop, 3, "linear")[1]) < 0.8 * length
    assert np.linalg.norm(latent_path(start, stop, 3, "spherical")[1]) > 0.97 * length


def test_a_path_has_two_ends() -> None:
    """One step would have to be both."""
    with pytest.raises(ValueError, match="two steps"):
        latent_path(np.zeros(2, np.float32), np.ones(2, np.float32), 1, "linear")
