"""(seed, index) → latents and labels: the random numbers of every image, and ways between two latents.

Random numbers, `philox4x64-10/1`. Philox (Salmon et al. 2011) is a block function: key and counter in, four 64-bit
words out, no state. The key is (seed, stream): stream 0 for latents, 1 for labels, 2 for noise beside latents, 3 for
the chances that candidates are given, and 256 + k for candidate k ≥ 1. Image `index` has b = ⌈dim/4⌉ blocks, whose
counters are index·b … index·b + b − 1. So any range of images is one contiguous draw, and an image's noise depends on
its seed and index alone. A label takes the first word of block `index` of its stream. A word w becomes u = (⌊w/2¹¹⌋ +
½)·2⁻⁵³, which float64 rounds into (0, 1]. Uniform latents are √3·(2u − 1). Normal ones are Box-Muller pairs: √(−2 ln
u₁)·cos 2πu₂ and √(−2 ln u₁)·sin 2πu₂ from words 2j and 2j + 1. All of it in float64, rounded once to float32, which
hides nearly all differences between libraries in the last bits. `Noise` draws the same words on the nets' own device,
for GPUs that need not agree with CPUs in the last bits.
"""

import math
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models.spec import LatentSpec

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]
PathMethod = Literal["linear", "spherical"]

LATENT_STREAM, LABEL_STREAM, NOISE_STREAM, CHANCE_STREAM, CANDIDATE_STREAM = 0, 1, 2, 3, 256
_WORD, _HALF_WORD, _MANTISSA = 2**64 - 1, 2**32 - 1, 2**53 - 1
_MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157  # philox4x64-10's, for words 0 and 2 of a block
_KEY_STEPS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
_own = threading.local()


class LatentRange(NamedTuple):
    """Images first_index … first_index + count − 1 of a seed."""

    seed: int
    first_index: int
    images: int


def draw_latents(latent: LatentSpec, seed: int, first_index: int, count: int) -> Float32:
    """Noise of images first_index … first_index + count − 1 of a seed: float32 (count, dim), mean 0, variance 1."""
    return draw_latent_ranges(latent, [LatentRange(seed, first_index, count)])


def draw_latent_ranges(latent: LatentSpec, ranges: Sequence[LatentRange]) -> Float32:
    """Noise of several ranges, one after the other in one array: as by `draw_latents`, but faster than one by one."""
    return _draw(latent, latent.dim, LATENT_STREAM, ranges)


def draw_candidates(latent: LatentSpec, seed: int, first_index: int, count: int, candidate: int) -> Float32:
    """Candidate k for each image of a range: float32 (count, dim). Candidate 0 is the one that `draw_latents` gives."""
    stream = CANDIDATE_STREAM + candidate if candidate else LATENT_STREAM
    return _draw(latent, latent.dim, stream, [LatentRange(seed, first_index, count)])


def draw_chances(seed: int, first_index: int, count: int, candidates: int) -> NDArray[np.float64]:
    """A number in (0, 1] for each of an image's candidates, a multiple of four: (count, candidates)."""
    blocks = candidates // 4
    return _uniforms([(seed, CHANCE_STREAM, first_index * blocks, count * candidates)]).reshape(count, candidates)


def beside_noise(latent: LatentSpec, latents: Float32, ranges: Sequence[LatentRange]) -> Float32:
    """Latents, each followed by the further noise of its image where the net takes some: (n, dim + noise)."""
    if not latent.noise:
        return latents
    return np.concatenate([latents, _draw(latent, latent.noise, NOISE_STREAM, ranges)], axis=1)


def _draw(latent: LatentSpec, dim: int, stream: int, ranges: Sequence[LatentRange]) -> Float32:
    blocks = math.ceil(dim / 4)
    words = 4 * blocks
    u = _uniforms([(seed, stream, first * blocks, count * words) for seed, first, count in ranges])
    z = np.empty(len(u), np.float32)
    if latent.distribution == "uniform":
        z[:] = math.sqrt(3) * (2 * u - 1)
    else:
        # Contiguous, because NumPy computes strided numbers in another way, with other last bits. In place, because
        # new memory costs as much as several of these functions.
        radius, angle = np.ascontiguousarray(u.reshape(-1, 2).T)
        np.log(radius, out=radius)
        radius *= -2
        np.sqrt(radius, out=radius)
        angle *= 2 * math.pi
        angles = torch.from_numpy(angle)  # torch's sine and cosine take less than half of the time of NumPy's
        z[0::2] = radius * angles.cos().numpy()
        z[1::2] = radius * angles.sin().numpy()
    return np.ascontiguousarray(z.reshape(-1, words)[:, :dim])


def draw_labels(frequencies: Sequence[float], seed: int, first_index: int, count: int) -> Int64:
    """Labels of images first_index … of a seed, drawn at these frequencies (they sum to 1): int64 (count,)."""
    u = _uniforms([(seed, LABEL_STREAM, first_index, 4 * count)])[::4]
    return np.searchsorted(_edges(tuple(frequencies)), u, side="right").astype(np.int64, copy=False)


@lru_cache(maxsize=64)
def _edges(frequencies: tuple[float, ...]) -> NDArray[np.float64]:
    """Where in (0, 1] each label but the last ends."""
    return np.cumsum(np.asarray(frequencies, dtype=np.float64))[:-1]


def sampled_labels(latent: LatentSpec, seed: int, first_index: int, count: int) -> Int64 | None:
    """Labels that the seed draws at the latent's frequencies: int64 (count,). None where there are no labels."""
    frequencies = latent.label_frequencies
    return None if frequencies is None else draw_labels(frequencies, seed, first_index, count)


def _uniforms(draws: Sequence[tuple[int, int, int, int]]) -> NDArray[np.float64]:
    """Numbers in (0, 1] for each (seed, stream, first block, words), one after the other, from consecutive blocks."""
    bits = np.empty(sum([words for *_, words in draws]), np.uint64)
    philox, state = _generator()
    stop = 0
    for seed, stream, first_block, words in draws:
        # NumPy counts up before each block, the first one too: for block 0 the counter is set to 2²⁵⁶ − 1.
        before = (first_block - 1) % 2**256
        state["state"]["counter"] = before & _WORD, before >> 64 & _WORD, before >> 128 & _WORD, before >> 192
        state["state"]["key"] = seed, stream
        philox.state = state  # the whole state, with the buffer: nothing is left of an earlier draw
        start, stop = stop, stop + words
        bits[start:stop] = philox.random_raw(words)
    bits >>= np.uint64(11)
    u = bits.astype(np.float64)
    u += 0.5
    u *= 2.0**-53
    return u


def _generator() -> tuple[np.random.Philox, Any]:
    """The thread's generator, and the state of a new one. To make one takes longer than to draw a few images."""
    if not hasattr(_own, "philox"):
        _own.philox = np.random.Philox(0)
        _own.state = _own.philox.state
        # NumPy reads these numbers one by one, which is faster from a tuple than from an array.
        _own.state["buffer"] = tuple(_own.state["buffer"].tolist())
    return _own.philox, _own.state


class Noise(nn.Module):
    """`draw_latents` in torch, on the device of the buffers; each image has a seed and an index of its own.

    torch has no unsigned integers of 64 bits, but sums and low words of products of signed ones have the same bits.
    """

    multipliers: Tensor  # (2, 1, 1), as are the others
    lower_halves: Tensor
    upper_halves: Tensor
    key_steps: Tensor

    def __init__(self, latent: LatentSpec) -> None:
        super().__init__()
        self.latent = latent
        for name, words in {
            "multipliers": _MULTIPLIERS,
            "lower_halves": [word & _HALF_WORD for word in _MULTIPLIERS],
            "upper_halves": [word >> 32 for word in _MULTIPLIERS],
            "key_steps": _KEY_STEPS,
        }.items():
            self.register_buffer(name, torch.tensor([_signed(word) for word in words])[:, None, None])

    def forward(self, seeds: Tensor, indices: Tensor) -> Tensor:
        """int64 (n,) and (n,) → float32 (n, dim)."""
        blocks = math.ceil(self.latent.dim / 4)
        words = self._words(seeds, indices, blocks).view(len(seeds), 4 * blocks)
        u = ((words >> 11 & _MANTISSA).double() + 0.5) * 2.0**-53
        if self.latent.distribution == "uniform":
            z = math.sqrt(3) * (2 * u - 1)
        else:
            radius, angle = (-2 * u[:, 0::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
            z = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=2).view(len(seeds), 4 * blocks)
        return z[:, : self.latent.dim].float()

    def _words(self, seeds: Tensor, indices: Tensor, blocks: int) -> Tensor:
        """The words of each image's blocks: (n, blocks, 4)."""
        block = torch.arange(blocks, device=indices.device)
        carried, start = _product(indices[:, None], blocks, blocks, 0)
        low = start + block
        # The counter has two words. The lower one has overflowed where it is, as an unsigned number, less than before.
        carried = carried + ((low ^ _signed(2**63)) < (start ^ _signed(2**63))).long()
        even, odd = torch.stack([low, torch.zeros_like(low)]), torch.stack([carried, torch.zeros_like(low)])
        key = torch.stack([seeds, torch.full_like(seeds, LATENT_STREAM)])[:, :, None]
        for _ in range(10):
            high, low = _product(even, self.multipliers, self.lower_halves, self.upper_halves)
            even, odd = high.flip(0) ^ odd ^ key, low.flip(0)
            key = key + self.key_steps
        return torch.stack([even[0], odd[0], even[1], odd[1]], dim=2)


def _signed(word: int) -> int:
    """The signed number of 64 bits that has the bits of this word."""
    return word - 2**64 if word >= 2**63 else word


def _product(a: Tensor, b: Tensor | int, b_low: Tensor | int, b_high: Tensor | int) -> tuple[Tensor, Tensor]:
    """Upper and lower words of the products a·b, where b's halves are known."""
    a_low, a_high = a & _HALF_WORD, a >> 32 & _HALF_WORD
    first, second = a_low * b_high, a_high * b_low
    middle = (a_low * b_low >> 32 & _HALF_WORD) + (first & _HALF_WORD) + (second & _HALF_WORD)
    upper = a_high * b_high + (first >> 32 & _HALF_WORD) + (second >> 32 & _HALF_WORD) + (middle >> 32)
    return upper, a * b


def latent_path(start: Float32, stop: Float32, steps: int, method: PathMethod) -> Float32:
    """Latents from one (dim,) to another: float32 (steps, dim), which begin and end with these two, bit for bit.

    `linear` is the paper's Figure 3: (1 − t)·start + t·stop. In many dimensions the middle of this path is nearer to 0
    than normal noise ever is. `spherical` keeps the length: (sin((1 − t)Ω)·start + sin(tΩ)·stop) / sin Ω, where Ω is
    the angle between the two (Shoemake 1985; White 2016, arXiv 1609.04468). Two latents on one line through 0 have no
    such path, and get the linear one.

    Raises:
        ValueError: Fewer than two steps.
    """
    if steps < 2:
        raise ValueError(f"a path has at least two steps, got {steps}")
    a, b = start.astype(np.float64), stop.astype(np.float64)
    t = np.linspace(0, 1, steps)[:, None]
    weights = 1 - t, t
    lengths = float(np.linalg.norm(a) * np.linalg.norm(b))
    cosine = max(-1.0, min(1.0, float(a @ b) / lengths)) if lengths else 1.0
    if method == "spherical" and abs(cosine) < 1 - 1e-9:
        angle = math.acos(cosine)
        weights = np.sin((1 - t) * angle) / math.sin(angle), np.sin(t * angle) / math.sin(angle)
    return (weights[0] * a + weights[1] * b).astype(np.float32)
