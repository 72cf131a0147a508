"""What several commands understand in the same way: numbers, devices, data sets, names of pictures."""

import argparse
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, get_args

import torch
from PIL import ImageColor

from models.bundle import MANIFEST, Bundle, read_bundle
from models.data.dataset import numbered_as_before, relabelled
from models.data.load import DataError, Dataset, load_dataset
from models.files import replace_file
from models.images.preparation import Fit
from models.inference.devices import find_device
from models.training import trainer
from models.training.run_folder import RunDir, RunError


class Subparsers(Protocol):
    """The commands of a command line, to which one more can be added."""

    def add_parser(self, name: str, *, help: str) -> argparse.ArgumentParser:  # noqa: A002 - argparse's word
        """A parser for what follows the command's name."""


def positive(text: str) -> int:
    """A number of things."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number of at least 1")
    return int(text)


def whole(text: str) -> int:
    """A seed, as the service takes them."""
    if not text.isdecimal() or int(text) >= 2**53:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number, 0 … 2⁵³ − 1")
    return int(text)


def add_data(parser: argparse.ArgumentParser) -> None:
    """The options that say which data set is read, and how."""
    parser.add_argument(
        "--data",
        required=True,
        help="mnist, fashion-mnist, digits, a folder of images, an .npz, or an IDX file of images",
    )
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("GAN_DATA_DIR") or None,
                        help="where mnist/ and fashion-mnist/ lie (default: GAN_DATA_DIR, else data/)")  # fmt: skip
    parser.add_argument("--image-size", type=int, metavar="S", help="make images squares of S×S pixels")
    parser.add_argument("--fit", choices=get_args(Fit), help="what becomes of an image of another shape: its middle is "
                        "cut out (crop, the default), it gets bars (pad), or it is distorted (squeeze)")  # fmt: skip
    parser.add_argument("--background", type=_colour, metavar="COLOUR",
                        help="under transparent images and in bars: a name or #rrggbb (default: white; for arrays of "
                        "grey images with dark edges, as MNIST's, black)")  # fmt: skip
    parser.add_argument("--skip-bad", action="store_true", help="leave out a folder's files that cannot be read")
    parser.add_argument("--splits", choices=["auto", "none"], default="auto", help="auto (default): a folder's train, "
                        "val and test are splits, where it has no others; none: they are classes")  # fmt: skip


def _colour(text: str) -> str:
    levels: tuple[int, ...] = ()
    with suppress(ValueError):
        levels = ImageColor.getrgb(text)
    if len(levels) != 3:  # four have an opacity
        raise argparse.ArgumentTypeError(f"{text!r} must be the name of a colour, or #rrggbb")
    return "#{:02x}{:02x}{:02x}".format(*levels)


def reading(arguments: argparse.Namespace, prepared: Mapping[str, Any]) -> dict[str, Any]:
    """How `--data` is read, for `load_dataset`: as it was `prepared`, where the command line does not say otherwise.

    A set that was made RGB stays so, also where all of its pixels are grey.
    """
    return {
        "image_size": arguments.image_size,
        "skip_bad": arguments.skip_bad,
        "splits": arguments.splits,
        "fit": arguments.fit or prepared.get("fit", "crop"),
        "background": arguments.background or prepared.get("background"),
        "colour": "rgb" if prepared.get("colour") == "rgb" else "pixels",
    }


def load_as_trained(arguments: argparse.Namespace, bundle: Bundle) -> Dataset:
    """The data set, divided by the command line's seed or else the bundle's: so training never saw the test images."""
    training: dict[str, Any] = bundle.manifest.training
    seed = training.get("seed", 0) if arguments.seed is None else arguments.seed
    if not isinstance(seed, int) or seed < 0:
        raise RunError(f"the seed must be a whole number of 0 or more, not {seed!r}")
    declared = bundle.manifest.preparation
    prepared = asdict(declared) if declared else {"colour": "rgb" if bundle.manifest.image.channels == 3 else "grey"}
    dataset = load_dataset(arguments.data, arguments.data_dir, seed=seed, **reading(arguments, prepared))
    image = trainer.image_spec(dataset)
    if image != bundle.manifest.image:
        size = bundle.manifest.image
        is_size = image.channels == size.channels and size.height == size.width
        hint = f": --image-size {size.height} makes them alike" if is_size else ""
        raise DataError(f"{dataset.name} has images {image.shape}, {bundle.name} makes {size.shape}{hint}")
    checksum = training.get("data", {}).get("checksum", dataset.checksum)
    dataset = _numbered_as_in(bundle, dataset, checksum)
    if checksum != dataset.checksum:
        print("warning: this is not the data that the bundle was trained on, or not divided as it was then: "
              "test images may be among those that it learnt from", file=sys.stderr, flush=True)  # fmt: skip
    return dataset


def bundle_of(arguments: argparse.Namespace, device: torch.device | str = "cpu") -> Bundle:
    """The bundle that the command line names.

    Raises:
        RunError: It names a run instead, or the bundle of one that is not finished.
        BundleError: It names no bundle that can be trusted.
    """
    folder: Path = arguments.bundle
    if not (folder / MANIFEST).exists():
        run = RunDir(folder.parent if folder.name == "bundle" else folder)
        if run.record() is not None:
            raise RunError(_instead_of(run))
    return read_bundle(folder, device)


def _instead_of(run: RunDir) -> str:
    """What can be given where a run was named."""
    if (run.bundle / MANIFEST).exists():
        return f"{run.path} is the folder of a run; its bundle is {run.bundle}"
    rows, steps = run.stats(), (run.record() or {}).get("options", {}).get("steps", "?")
    step = rows[-1]["step"] if rows else 0
    of_best = f", or with --resume --steps {step} makes a bundle of the best until now" if step else ""
    look = f"{run.preview} is a bundle of what is there so far; " if (run.preview / MANIFEST).exists() else ""
    return (
        f"{run.path}: no bundle yet: the run has come to step {step} of {steps}. {look}its train command with --resume "
        f"finishes it{of_best}"
    )


def _numbered_as_in(bundle: Bundle, dataset: Dataset, checksum: str) -> Dataset:
    """The data set with its labels in the bundle's order, where both have the same names."""
    names = bundle.manifest.labels
    if names is None:
        return numbered_as_before(dataset, checksum)
    if names == dataset.label_names or set(names) != set(dataset.label_names or ()):
        return dataset
    return relabelled(dataset, names)


def device_of(arguments: argparse.Namespace) -> torch.device:
    """The device that `--device` names."""
    try:
        return find_device(arguments.device)
    except ValueError as error:
        raise RunError(f"device {arguments.device}: {error}") from None


def require_png(path: Path) -> None:
    """See that a picture's name says what it is."""
    if path.suffix.lower() != ".png":
        raise RunError(f"{path}: pictures are written as PNG, so the name must end in .png")


def write_picture(path: Path, content: bytes) -> None:
    """Write a PNG."""
    require_png(path)
    replace_file(path, content)
