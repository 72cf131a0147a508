"""Augmentation: what D sees of few images, real and generated alike, so that it can't learn the real ones by heart.

All images on their way into D are changed at random, in both its turns: real ones, generated ones, and those through
which G learns. So G is never asked for a changed image, but for images that look right once they are changed, and
nothing leaks into its samples as long as D can tell which way round an image was: each kind leaves enough of them
unchanged, or changes them too little, for another distribution to look the same (Karras et al. 2020, §2.2).

- `flip`: every fourth image is mirrored. With half of them G couldn't learn which way round images are.
- `diffaugment`: colour, shift and cutout, each for every image (Zhao et al. 2020, arXiv 2006.10738).
- `ada`: reflections, quarter turns, scales, rotations, shifts and colours, each with probability p, which rises while
  D is surer of real images than `TARGET` and falls otherwise (Karras et al. 2020, arXiv 2006.06676).

Gradient penalties are by the pixels that D sees. Pixels are in [0, 1]. What is drawn is drawn for all rows on every
rank, as all else in a step, and p is a tensor of the run's state: a resumed run goes on with it.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.spec import AugmentName
from models.training.torchrun.ranks import Alone

FLIPPED = 0.25  # share of images
SHIFT, CUTOUT = 1 / 8, 1 / 2  # DiffAugment's, of a side
TARGET = 0.6  # E sign(D(x)): §3 of ADA's paper
RISE_IMAGES = 100_000  # real ones in which p goes from 0 to 1 if D is too sure all the time; the paper has 500,000
MOST = 0.8  # of p: over it, changes leak into the samples (§2.2)
MEMORY = 0.99  # of the mean of r_t that is reported

_UNIFORM, _NORMAL = 19, 7  # random numbers for an image


class Draws(NamedTuple):
    """The random numbers of n images: uniform (n, 19) in [0, 1), and normal (n, 7)."""

    uniform: Tensor
    normal: Tensor


class Augmentation:
    """One kind of augmentation, with ADA's controller.

    Attributes:
        p: Probability of each of ADA's changes, a tensor on the device, so that no step waits for it.
        r_t: Mean of E sign(D(x)) over about the last hundred updates of D.
    """

    def __init__(self, name: AugmentName, device: torch.device) -> None:
        self.name = name
        self.p, self.r_t = (torch.zeros((), device=device) for _ in range(2))

    def __call__(self, images: Tensor, rng: torch.Generator, ranks: Alone) -> Tensor:
        """Images (n, c, h, w), this rank's part of the batch, as D is to see them; differentiable by pixels."""
        if self.name == "none":
            return images
        rows = len(images) * ranks.size
        uniform = torch.rand((rows, _UNIFORM), generator=rng, device=images.device)
        normal = torch.randn((rows, _NORMAL), generator=rng, device=images.device)
        draws = Draws(ranks.mine(uniform), ranks.mine(normal))
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 is too coarse for places of pixels
            return self.changed(images.float(), draws)

    def changed(self, images: Tensor, draws: Draws) -> Tensor:
        """Images changed as the random numbers say."""
        if self.name == "flip":
            return _where(draws.uniform[:, 0] < FLIPPED, images.flip(3), images)
        if self.name == "diffaugment":
            return cut_out(shifted(recoloured(images, draws.uniform), draws.uniform), draws.uniform)
        return ada_colours(ada_geometry(images, draws, self.p), draws, self.p)

    def see(self, real: Tensor, generated: Tensor, ranks: Alone, *, paired: bool) -> None:
        """Move p by D's logits in one of its updates: up where it is too sure of real images, else down.

        A D that was trained on pairs knows only differences, so its zero is taken midway between both kinds.
        """
        if self.name != "ada":
            return
        with torch.no_grad():
            zero = (real.mean() + generated.mean()) / 2 if paired else 0.0
            (r_t,) = ranks.mean([(real - zero).sign().mean()])
            step = len(real) * ranks.size / RISE_IMAGES
            self.p = (self.p + step * (r_t - TARGET).sign()).clamp(0, MOST)
            self.r_t = MEMORY * self.r_t + (1 - MEMORY) * r_t

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: the controller's state."""
        return {"p": self.p, "r_t": self.r_t} if self.name == "ada" else {}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore the controller; where a run takes ADA up only now, it begins at 0."""
        if self.name == "ada" and tensors:
            self.p, self.r_t = tensors["p"], tensors["r_t"]

    def row(self) -> dict[str, float]:
        """The controller's figures for stats.jsonl."""
        return {"augment_p": self.p.item(), "r_t": self.r_t.item()} if self.name == "ada" else {}


# --- DiffAugment ---------------------------------------------------------------------------------------------------


def recoloured(images: Tensor, uniform: Tensor) -> Tensor:
    """Brightness ± ¼ of the range, saturation times 0 to 2, contrast times ½ to 3/2."""
    brightness, saturation, contrast = (uniform[:, place, None, None, None] for place in range(3))
    images = images + (brightness - 0.5) / 2
    grey = images.mean(dim=1, keepdim=True)
    images = grey + (images - grey) * 2 * saturation
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (images - mean) * (contrast + 0.5)


def shifted(images: Tensor, uniform: Tensor) -> Tensor:
    """Each image by whole pixels, up to an eighth of its side; what comes in is black."""
    height, width = images.shape[2:]
    reach = [max(1, round(side * SHIFT)) for side in (height, width)]
    down, right = (_whole(uniform[:, 3 + axis], 2 * reach[axis] + 1) for axis in range(2))
    padded = F.pad(images, (reach[1], reach[1], reach[0], reach[0]))
    rows = down[:, None] + torch.arange(height, device=images.device)
    columns = right[:, None] + torch.arange(width, device=images.device)
    each = torch.arange(len(images), device=images.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def cut_out(images: Tensor, uniform: Tensor) -> Tensor:
    """A rectangle of half the sides, anywhere, is black in each image."""
    inside = []
    for axis, side in enumerate(images.shape[2:]):
        size = round(side * CUTOUT)
        middle = _whole(uniform[:, 5 + axis], side + 1 - size % 2)[:, None]
        places = torch.arange(side, device=images.device)
        inside.append((places >= middle - size // 2) & (places < middle - size // 2 + size))
    return images * ~(inside[0][:, None, :, None] & inside[1][:, None, None, :])


# --- ADA -----------------------------------------------------------------------------------------------------------


def ada_geometry(images: Tensor, draws: Draws, p: Tensor) -> Tensor:
    """Mirror, quarter turns, whole shifts, scales, rotations and shifts, as one map, drawn by bilinear interpolation.

    Each with probability p; what comes in from outside is the image's reflection. Angles and scales are of pixels, so
    an image that is no square is not distorted.
    """
    (height, width), u, normal = images.shape[2:], draws.uniform, draws.normal
    on = [u[:, place] < p for place in range(4)]
    # So that an image is rotated at all with probability p (§B.2).
    turns = [u[:, place] < 1 - torch.sqrt(1 - p) for place in (4, 5)]
    angles = [torch.where(turn, (2 * u[:, 6 + place] - 1) * math.pi, 0.0) for place, turn in enumerate(turns)]
    mirror = 1 - 2 * (on[0] & (u[:, 8] < 0.5)).to(u.dtype)
    quarter = torch.where(on[1], _whole(u[:, 9], 4).to(u.dtype) * (math.pi / 2), 0.0)
    scale = torch.where(on[2], torch.exp2(0.2 * normal[:, 0]), 1.0)
    stretch = torch.where(on[3], torch.exp2(0.2 * normal[:, 1]), 1.0)
    one = torch.ones_like(scale)
    linear = _diagonal(mirror, one) @ _rotation(quarter) @ _diagonal(scale, scale)
    linear = linear @ _rotation(angles[0]) @ _diagonal(stretch, 1 / stretch) @ _rotation(angles[1])
    # From the grid's −1 … 1 to pixels and back.
    half = torch.tensor([width / 2, height / 2], dtype=images.dtype, device=images.device)
    linear = linear * half[None, None, :] / half[None, :, None]
    side = half.new_tensor([width, height])
    whole = torch.round((2 * u[:, 10:12] - 1) * side * SHIFT) / half
    part = 2 * SHIFT * normal[:, 2:4]
    shift = torch.where(u[:, 12:13] < p, whole, 0.0) + torch.where(u[:, 13:14] < p, part, 0.0)
    grid = F.affine_grid(torch.cat([linear, shift[:, :, None]], dim=2), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def ada_colours(images: Tensor, draws: Draws, p: Tensor) -> Tensor:
    """Brightness, contrast, and of colour images hue and saturation, each with probability p."""
    u, normal = draws.uniform[:, :, None, None, None], draws.normal[:, :, None, None, None]
    images = images + torch.where(u[:, 14] < p, 0.1 * normal[:, 4], 0.0)
    images = 0.5 + (images - 0.5) * torch.where(u[:, 15] < p, torch.exp2(0.5 * normal[:, 5]), 1.0)
    if images.shape[1] == 1:
        return images
    grey = images.mean(dim=1, keepdim=True)
    # A turn about the axis of greys: Rodrigues' formula, of what is at right angles to it.
    angle = torch.where(u[:, 16] < p, (2 * u[:, 17] - 1) * math.pi, 0.0)
    colour = images - grey
    across = (colour.roll(1, dims=1) - colour.roll(2, dims=1)) / math.sqrt(3)
    colour = colour * angle.cos() + across * angle.sin()
    return grey + colour * torch.where(u[:, 18] < p, torch.exp2(normal[:, 6]), 1.0)


def _whole(uniform: Tensor, count: int) -> Tensor:
    """A number from 0 to count − 1."""
    return (uniform * count).long().clamp(max=count - 1)


def _where(these: Tensor, images: Tensor, others: Tensor) -> Tensor:
    return torch.where(these[:, None, None, None], images, others)


def _diagonal(x: Tensor, y: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([x, y], dim=1))


def _rotation(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)], dim=1)
