"""The feature extractor: a small classifier of the data's own labels, whose features real and generated images share.

Nothing is downloaded: the net is trained on the spot, in about a minute for MNIST, and kept in a cache folder. Scores
compare only where they come from the same weights, so the net's `checksum` is recorded beside them. Data without labels
get the same net with random weights of a fixed seed, as Naeem et al. 2020 (arXiv 2002.09797) do where no classifier
fits. Beside a trained net, the untrained one is a control that no generator can have been fitted to.

Images come in as uint8 (n, h, w, c): scores are about the pixels that a viewer gets, rounded.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from models.data.load import Dataset, Split
from models.files import cache_folder, replace_file
from models.files import checksum_of as checksum_of_tensors
from models.inference.pixels import UInt8, to_pixels
from models.spec import half_cosine

FEATURES = 128
# Part of the cache's key: another net or another way to train it is another recipe.
RECIPE = "cnn-128/1"
BATCH, EPOCHS, LEAST_UPDATES, MOST_UPDATES = 128, 40, 200, 1_200
PEAK_LR, WEIGHT_DECAY = 4e-3, 1e-4
_WIDTHS = (32, 64, 96, 128, 128)
_CHUNK = 500  # images embedded at a time: bounds the memory


class FeatureNet(nn.Module):
    """Convolutions of stride 2 until a side is at most 4, one of stride 1, 128 ReLU features, and one logit a class.

    Takes images of any size with 1 or 3 channels. In eval mode, as `load_features` returns it, a row's features depend
    on that row alone.
    """

    def __init__(self, channels: int, height: int, width: int, classes: int) -> None:
        super().__init__()
        sides = [(height, width)]
        while min(sides[-1]) > 4 and len(sides) < len(_WIDTHS):
            sides.append((math.ceil(sides[-1][0] / 2), math.ceil(sides[-1][1] / 2)))
        widths = (channels, *_WIDTHS[: len(sides)])
        self.convolutions = nn.ModuleList(
            nn.Conv2d(a, b, 5 if stage == 0 else 3, stride=2 if stage < len(sides) - 1 else 1,
                      padding=2 if stage == 0 else 1, bias=False)
            for stage, (a, b) in enumerate(pairwise(widths))
        )  # fmt: skip
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.hidden = nn.Linear(widths[-1] * sides[-1][0] * sides[-1][1], FEATURES)
        self.output = nn.Linear(FEATURES, classes)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(n, c, h, w) pixels in [0, 1] → features (n, 128), not negative, and logits (n, classes)."""
        x = pixels * 2 - 1
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x)))
        features = F.relu(self.hidden(x.flatten(1)))
        return features, self.output(features)


class Embedding(NamedTuple):
    """The net's output for n images: `features` (n, 128) and `logits` (n, classes), float32 on the net's device."""

    features: Tensor
    logits: Tensor


@dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """A feature net that is ready for use, with what is recorded beside its scores.

    Attributes:
        kind: `trained` on the labels of the training split, or `untrained`, with random weights of a fixed seed.
        checksum: sha256, in hex, over every tensor of the net.
        accuracy: Share of the validation images that it classifies rightly; None for an untrained net.
    """

    net: FeatureNet
    kind: str
    checksum: str
    accuracy: float | None

    @torch.inference_mode()
    def embed(self, images: UInt8) -> Embedding:
        """Features and logits of uint8 images (n, h, w, c)."""
        device = self.net.output.weight.device
        pairs = [self.net(to_pixels(images[at : at + _CHUNK], device)) for at in range(0, len(images), _CHUNK)]
        features, logits = zip(*pairs, strict=True)
        return Embedding(torch.cat(features), torch.cat(logits))


def load_features(
    dataset: Dataset,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    updates: int | None = None,
    cache: Path | None = None,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> FeatureExtractor:
    """Return a net trained on the training split's labels, cached if possible; an untrained one if there are no labels.

    Equal data and seed give equal weights on one machine. The global random generators are neither read nor moved.

    Args:
        dataset: The net learns the training split; the validation split gives `accuracy`.
        device: Where the net is trained and stays.
        seed: Decides the first weights and the order of the images.
        updates: How often the net is updated; None is 40 epochs, but 200 to 1,200 batches of 128 (three epochs of
            MNIST).
        cache: Folder; None is `cache_folder()`. If it can't be written, the net is trained every time.
        progress: Called after each update with (done, of).
    """
    labels = dataset.train.labels
    if labels is None or dataset.label_names is None:
        return untrained_features(dataset, device, seed=seed)
    net = _empty(dataset, len(dataset.label_names))
    if updates is None:
        updates = updates_for(len(labels))
    key = hashlib.sha256(f"{RECIPE}/{dataset.checksum}/{seed}/{updates}".encode()).hexdigest()[:16]
    path = (cache or cache_folder()) / f"features-{key}.safetensors"
    if not _read(net, path, device):
        _fit(net.to_empty(device=device), dataset.train, seed, updates, progress)
        _write(net, path)
    extractor = FeatureExtractor(net.eval(), "trained", checksum_of(net), accuracy=None)
    predicted = extractor.embed(dataset.validation.images).logits.argmax(dim=1).cpu()
    accuracy = (predicted == torch.from_numpy(dataset.validation.labels)).double().mean().item()
    return replace(extractor, accuracy=accuracy)


def updates_for(images: int) -> int:
    """How often a classifier of so many images is updated: 40 epochs of 128, but 200 to 1,200 times."""
    return min(max(EPOCHS * images // BATCH, LEAST_UPDATES), MOST_UPDATES)


def fitted_classifier(
    dataset: Dataset,
    split: Split,
    device: torch.device | str = "cpu",
    *,
    seed: int = 0,
    updates: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> FeatureExtractor:
    """The same net, as it learns the data set's classes from these images and labels instead. Nothing is cached."""
    net = _empty(dataset, len(dataset.label_names or ())).to_empty(device=device)
    _fit(net, split, seed, updates_for(len(split.images)) if updates is None else updates, progress)
    return FeatureExtractor(net.eval(), "trained", checksum_of(net), accuracy=None)


def untrained_features(dataset: Dataset, device: torch.device | str = "cpu", *, seed: int = 0) -> FeatureExtractor:
    """Return the same net with random weights; it needs no labels, and its logits mean nothing."""
    net = _empty(dataset, classes=1).to_empty(device=device)
    _initialise(net, torch.Generator().manual_seed(seed))
    net.requires_grad_(requires_grad=False).eval()
    return FeatureExtractor(net, "untrained", checksum_of(net), accuracy=None)


def checksum_of(net: nn.Module) -> str:
    """sha256, in hex, over names, shapes and numbers of every tensor, in the order of the names."""
    return checksum_of_tensors(net.state_dict())


def _empty(dataset: Dataset, classes: int) -> FeatureNet:
    _, height, width, channels = dataset.train.images.shape
    with torch.device("meta"):
        return FeatureNet(channels, height, width, classes)


def _initialise(net: FeatureNet, rng: torch.Generator) -> None:
    """He et al. 2015 (arXiv 1502.01852) for the weights; everything else neutral."""
    for name, tensor in net.state_dict().items():
        if tensor.dim() > 1:
            fan_in = tensor[0].numel()
            tensor.copy_(torch.randn(tensor.shape, generator=rng) * math.sqrt(2 / fan_in))
        elif name.startswith("norms.") and name.endswith((".weight", ".running_var")):
            tensor.fill_(1)
        else:
            tensor.zero_()


def _fit(net: FeatureNet, split: Split, seed: int, updates: int, progress: Callable[[int, int], None]) -> None:
    """Minimise the cross-entropy by AdamW; the rate rises over the first fifth of the updates, then falls."""
    assert split.labels is not None  # noqa: S101 — the caller has looked
    rng = torch.Generator().manual_seed(seed)
    _initialise(net, rng)
    net.requires_grad_(requires_grad=True).train()
    device = net.output.weight.device
    labels = torch.from_numpy(split.labels)
    batch = min(BATCH, len(labels))
    parameters = list(net.parameters())
    optimiser = torch.optim.AdamW(parameters, lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
    order = torch.empty(0, dtype=torch.int64)
    for update in range(updates):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(labels), generator=rng)])
        rows, order = order[:batch], order[batch:]
        # Linearly up, then down to 0 along half a cosine.
        share = (update + 1) / updates
        optimiser.param_groups[0]["lr"] = PEAK_LR * (share / 0.2 if share < 0.2 else half_cosine((share - 0.2) / 0.8))
        _, logits = net(to_pixels(split.images[rows.numpy()], device))
        loss = F.cross_entropy(logits, labels[rows].to(device))
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        optimiser.step()
        progress(update + 1, updates)
    net.requires_grad_(requires_grad=False).eval()


def _read(net: FeatureNet, path: Path, device: torch.device | str) -> bool:
    """Fill the net from the cache; False if there is no file or its tensors do not fit."""
    try:
        net.load_state_dict(load_tensors(path.read_bytes()), assign=True)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError):
        return False
    net.to(device).requires_grad_(requires_grad=False).eval()
    return True


def _write(net: FeatureNet, path: Path) -> None:
    try:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in sorted(net.state_dict().items())}
        replace_file(path, save_tensors(tensors))
    except OSError:
        return  # without a cache the next evaluation trains the net again, which costs a minute
