"""What was read of the data, as a plain structure for files, programs and pages, and as lines for a person."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from models.data.dataset import Dataset, Split, left_out_words, listed, printable

FEW_IMAGES = 30  # training images of a class, under which a net can do little more than repeat them
SPLIT_NAMES = ("train", "validation", "test")

Summary = Mapping[str, Any]


def summary(dataset: Dataset) -> dict[str, Any]:
    """Plain values: `name`, and

    image: `channels`, `height`, `width` as training sees them.
    images: How many in each split.
    classes: For each label in order its `name`, and how many images in each split; None without labels.
    sizes: Width and height of the smallest and of the largest image of a folder; None elsewhere.
    coloured: How many of a folder's images are not grey; None elsewhere.
    left_out: Why files of a folder were left out, and how many by suffix.
    by_folders: Whether folders called train, val and test divided them.
    notes: Sentences.
    """  # noqa: D400, D415
    _, height, width, channels = dataset.train.images.shape
    files = dataset.files
    return {
        "name": dataset.name,
        "image": {"channels": channels, "height": height, "width": width},
        "images": {name: len(split.images) for name, split in zip(SPLIT_NAMES, dataset.splits, strict=True)},
        "classes": _classes(dataset.label_names, dataset.splits),
        "sizes": files.sizes,
        "coloured": files.coloured,
        "left_out": files.left_out,
        "by_folders": files.by_folders,
        "notes": list(files.notes),
    }


def lines(found: Summary) -> list[str]:
    """The same for a person, without the notes, which `load_dataset` has printed: a line for each thing worth one."""
    image, classes = found["image"], found["classes"]
    train, validation, test = (f"{found['images'][name]:,}" for name in SPLIT_NAMES)
    shape = f"{image['width']}×{image['height']} {'grey' if image['channels'] == 1 else 'RGB'}"
    said = [f"{found['name']}: {train} images to train, {validation} to validate, {test} to test, {shape}"]
    if found["by_folders"]:
        said.append("divided as its folders are called; --splits none makes classes of them")
    if sizes := _sizes_before(found):
        said.append(f"made from images of {sizes}")
    if found["coloured"]:
        said.append(f"{found['coloured']:,} of {sum(found['images'].values()):,} are coloured")
    if classes:
        counts = [f"{printable(one['name'])}: {'/'.join(f'{one[name]:,}' for name in SPLIT_NAMES)}" for one in classes]
        said.append(f"{len(classes):,} {'class' if len(classes) == 1 else 'classes'}, "
                    f"images to train/validate/test: {listed(counts, '; ')}")  # fmt: skip
        if few := few_images(classes):
            said.append(f"under {FEW_IMAGES} images to train: {listed([printable(name) for name in few])}: "
                        "what is drawn of such a class will hardly vary")  # fmt: skip
    return [*said, *left_out_words(found["left_out"])]


def _sizes_before(found: Summary) -> str:
    """The sizes of a folder's images, where they had to change."""
    image = [found["image"]["width"], found["image"]["height"]]
    smallest, largest = found["sizes"] or (image, image)
    if list(smallest) == list(largest) == image:
        return ""
    ends = [f"{width:,}×{height:,}" for width, height in (smallest, largest)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def few_images(classes: Sequence[Mapping[str, Any]]) -> list[str]:
    """The classes with so few training images that more are wanted."""
    return [one["name"] for one in classes if one["train"] < FEW_IMAGES]


def left_out_by_suffix(found: Summary) -> dict[str, int]:
    """How many files were left out, whatever the reason."""
    total: dict[str, int] = {}
    for counts in found["left_out"].values():
        for suffix, count in counts.items():
            total[suffix] = total.get(suffix, 0) + count
    return total


def _classes(names: Sequence[str] | None, splits: Sequence[Split]) -> list[dict[str, Any]] | None:
    if names is None:
        return None
    counts = [
        [0] * len(names) if split.labels is None else np.bincount(split.labels, minlength=len(names)).tolist()
        for split in splits
    ]
    return [
        {"name": name, **dict(zip(SPLIT_NAMES, each, strict=True))}
        for name, each in zip(names, zip(*counts, strict=True), strict=True)
    ]
