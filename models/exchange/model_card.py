"""The model card: a bundle's README.md in the conventions of the Hugging Face Hub, made from the manifest alone.

It is for people and catalogues. Nothing reads it, and the manifest does not list it: so the version stays the same, and
signatures stay valid. A card that somebody has made their own, by deleting its last line, is left as it is.
"""

import html
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from models.bundle import Manifest, read_manifest
from models.files import replace_file

CARD = "README.md"
MOST_BYTES = 1 << 20  # of a card that is looked at before it is replaced
MADE = "<!-- Made from manifest.json, and made again with it. Delete this line to keep the card as it is. -->"
PIPELINE = "unconditional-image-generation"
# Of data sets that a manifest may name: the Hub's identifiers for them and for their licences, and a name for people.
KNOWN_DATA = {
    "mnist": ("ylecun/mnist", "cc-by-sa-3.0", "CC BY-SA 3.0"),
    "fashion-mnist": ("zalando-datasets/fashion_mnist", "mit", "MIT"),
    "digits": (None, "cc-by-4.0", "CC BY 4.0"),
}
FIGURES = {  # of the metric suite, in the card's words
    "frechet": "Fréchet distance in a small classifier's features",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "accuracy": "share of images of the class that was asked for",
    "authenticity": "authenticity",
    "two_sample_accuracy": "1-nearest-neighbour accuracy",
}
COLOURS = {1: "grey", 3: "RGB", 4: "RGBA"}
MOST_LABELS = 40  # named on the card


def write_card(folder: Path) -> Path | None:
    """Write a bundle's card; None where there is one that somebody has made their own.

    Raises:
        BundleError: The manifest can't be read.
        OSError: The disk.
    """
    path = folder / CARD
    manifest, version = read_manifest(folder)
    if path.exists():
        with path.open("rb") as file:
            if MADE.encode() not in file.read(MOST_BYTES):
                return None
    replace_file(path, card_of(manifest, version).encode())
    return path


def card_of(manifest: Manifest, version: str) -> str:
    """The card's text: Markdown, with YAML before it."""
    sections = (
        ("How to serve it", _serving(manifest)),
        ("Data and licence", _data(manifest)),
        ("Training", _training(manifest)),
        ("Scores", "\n".join(_scores(manifest))),
        ("Limits", "\n".join(_limits(manifest))),
    )
    text = "\n\n".join(f"## {title}\n\n{words}" for title, words in sections)
    return f"{_front_matter(manifest)}\n{_what_it_draws(manifest, version)}\n\n{text}\n\n{MADE}\n"


def _front_matter(manifest: Manifest) -> str:
    """What the Hub's catalogue reads. JSON is YAML."""
    dataset, licence, _ = KNOWN_DATA.get(_data_name(manifest), (None, "unknown", ""))
    facts: dict[str, Any] = {
        "license": licence,
        "library_name": "gan-service",
        "pipeline_tag": PIPELINE,
        "tags": ["gan", "image-generation", "safetensors"],
    }
    if dataset:
        facts["datasets"] = [dataset]
    if figures := _figures(manifest):
        metrics = [{"type": name, "name": FIGURES[name], "value": value["value"]} for name, value in figures.items()]
        results = {
            "task": {"type": PIPELINE},
            "dataset": {"type": dataset or "custom", "name": _data_name(manifest), "split": "test"},
            "metrics": metrics,
        }
        facts["model-index"] = [{"name": manifest.name, "results": [results]}]
    lines = (f"{key}: {json.dumps(value, ensure_ascii=True)}" for key, value in facts.items())
    return "\n".join(("---", *lines, "---"))


def _what_it_draws(manifest: Manifest, version: str) -> str:
    image, colour = manifest.image, COLOURS[manifest.image.channels]
    lines = [
        f"# {manifest.name}",
        "",
        f"A generative adversarial network that draws images of {image.width}×{image.height} pixels, {colour}.",
        f"Each is drawn from {manifest.latent.dim} random numbers. Version `{version}`.",
        "",
        "![64 of its images](samples.png)",
    ]
    if manifest.labels:
        named = ", ".join(_plain(label) for label in manifest.labels[:MOST_LABELS])
        more = f" and {len(manifest.labels) - MOST_LABELS} more" if len(manifest.labels) > MOST_LABELS else ""
        lines += ["", f"It draws {len(manifest.labels)} classes by name: {named}{more}."]
    return "\n".join(lines)


def _serving(manifest: Manifest) -> str:
    judged = (
        "Its discriminator comes with it, and answers `POST /discriminate`."
        if manifest.has_discriminator
        else ("It has no discriminator.")
    )
    image = manifest.image
    shape = f"uint8 (16, {image.height}, {image.width}, {image.channels})"
    return f"""With gan-service, where `bundles/{manifest.name}` is a copy of this folder:

```sh
GAN_BUNDLES=bundles python -m service
curl -o images.png 'http://127.0.0.1:8000/sample?bundle={manifest.name}&count=16&seed=7'
```

In Python, without a server:

```python
from models.bundle import read_bundle

images = read_bundle("bundles/{manifest.name}").draw(16, seed=7)  # {shape}
```

{judged} Weights are safetensors; nothing in the folder is code."""


def _data(manifest: Manifest) -> str:
    name, data = _data_name(manifest), manifest.training.get("data")
    if not name:
        return ("The manifest does not say what it was trained on, nor under which licence. Whoever passes it on has "
                "to find that out.")  # fmt: skip
    checksum = f", sha256 `{_plain(data['checksum'])}`" if isinstance(data, Mapping) and "checksum" in data else ""
    if name in KNOWN_DATA:
        licence = f"The data's licence is {KNOWN_DATA[name][2]}."
    else:
        licence = "The manifest records no licence of the data: whoever passes the bundle on has to know it."
    counts: Any = manifest.training.get("images")
    images = f" {counts['train']:,} images for training," if _counted(counts) else ""
    splits = f" {counts['validation']:,} for validation, {counts['test']:,} for tests." if _counted(counts) else ""
    return f"Trained on `{_plain(name)}`{checksum}.{images}{splits} {licence}"


def _training(manifest: Manifest) -> str:
    training = manifest.training
    words = {
        "preset": "preset", "steps": "steps", "images_seen": "images seen", "wall_seconds": "seconds",
        "device": "device", "torch": "torch", "seed": "seed", "source_commit": "source",
    }  # fmt: skip
    rows = [f"| {word} | {_plain(training[name])} |" for name, word in words.items() if training.get(name) is not None]
    options = training.get("options")
    if isinstance(options, Mapping):
        named = {name: options.get(name) for name in ("init", "augment")}
        rows += [f"| {name} | {_plain(value)} |" for name, value in named.items() if value and value != "none"]
    return "\n".join(("| | |", "|---|---|", *rows)) if rows else "Nothing is recorded."


def _scores(manifest: Manifest) -> Iterator[str]:
    figures = _figures(manifest)
    accuracy = manifest.evaluation.get("classification_accuracy")
    if not figures:
        yield "No scores on test images are recorded: `python -m models evaluate --record` adds them."
    else:
        yield "On test images, which training never saw. The floor is what real images get against one another."
        yield ""
        yield "| | these images | floor | better |"
        yield "|---|---|---|---|"
        for name, columns in figures.items():
            value, floor = _number(columns["value"]), _number(columns.get("floor"))
            yield f"| {FIGURES[name]} | {value} | {floor} | {_plain(columns.get('better', ''))} |"
    if isinstance(accuracy, Mapping):
        yield ""
        yield (f"A classifier that learns from its images alone names {_share(accuracy.get('generated'))} of the test "
               f"images right; one that learns from as many real ones, {_share(accuracy.get('real'))}.")  # fmt: skip


def _limits(manifest: Manifest) -> Iterator[str]:
    image = manifest.image
    yield f"- It draws {image.width}×{image.height} pixels and nothing larger, and only what its data held."
    yield "- Its images are made up. Some are flawed, and some may be near to training images."
    if manifest.has_discriminator:
        yield "- Its discriminator tells its own images from the data's; it is no detector of generated images."
        if manifest.calibration is None:
            yield "- The discriminator's probabilities are not calibrated."
    if not _figures(manifest):
        yield "- Nobody has measured yet how good it is."


def _figures(manifest: Manifest) -> dict[str, Mapping[str, Any]]:
    """Those figures of the recorded suite that the card shows. A manifest's `evaluation` may hold anything."""
    suite = manifest.evaluation.get("suite")
    found = suite.get("figures") if isinstance(suite, Mapping) else None
    if not isinstance(found, Mapping):
        return {}
    return {
        name: columns
        for name in FIGURES
        if isinstance(columns := found.get(name), Mapping) and _is_number(columns.get("value"))
    }


def _data_name(manifest: Manifest) -> str:
    data = manifest.training.get("data")
    name = data.get("name") if isinstance(data, Mapping) else data
    return name if isinstance(name, str) else ""


def _counted(counts: object) -> bool:
    return isinstance(counts, Mapping) and all(isinstance(counts.get(s), int) for s in ("train", "validation", "test"))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: object) -> str:
    return f"{value:.3g}" if _is_number(value) else "–"


def _share(value: object) -> str:
    return f"{value:.1%}" if _is_number(value) else "–"


def _plain(value: object) -> str:
    """Any value as words that are neither Markdown nor HTML."""
    text = "".join(c if c.isprintable() else " " for c in str(value))[:200]
    return html.escape(text, quote=False).replace("|", "\\|").replace("`", "'").replace("[", "\\[")
