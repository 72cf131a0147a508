"""A bundle's model card says what the manifest says, in the Hub's conventions, and leaves the version as it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from models.__main__ import main
from models.bundle import Bundle, read_bundle, record_evaluation
from models.exchange.model_card import CARD, MADE, card_of, write_card
from models.spec import ImageSpec

EMBEDDED = Path(__file__).parents[3] / "bundles"
GREY = ImageSpec(channels=1, height=4, width=4)


def front_matter(text: str) -> dict[str, Any]:
    """What is between the first two lines of hyphens."""
    assert text.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


@pytest.mark.parametrize("name", ["mnist", "mnist-mlp"])
def test_the_card_of_an_embedded_bundle_has_what_its_manifest_has(name: str, tmp_path: Path) -> None:
    """What it draws, data, licence, scores with floors, limits and how to serve it; the version stays."""
    folder = tmp_path / name
    shutil.copytree(EMBEDDED / name, folder)
    before = read_bundle(folder).version
    assert write_card(folder) == folder / CARD
    bundle, text = read_bundle(folder), (folder / CARD).read_text("utf-8")
    assert bundle.version == before
    facts = front_matter(text)
    assert facts["pipeline_tag"] == "unconditional-image-generation"
    assert facts["license"] == "cc-by-sa-3.0"
    assert facts["datasets"] == ["ylecun/mnist"]
    (result,) = facts["model-index"][0]["results"]
    figures: Any = bundle.manifest.evaluation["suite"]
    measured = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert measured["frechet"] == figures["figures"]["frechet"]["value"]
    floor = f"{figures['figures']['frechet']['floor']:.3g}"
    for words in (f"# {name}", before, "28×28", "CC BY-SA 3.0", f"| {floor} |", "## Limits", "## How to serve it",
                  "python -m service", f"sample?bundle={name}", "samples.png"):  # fmt: skip
        assert words in text, words


def test_a_bundle_that_says_nothing_has_an_honest_card(make_tiny: Callable[..., Bundle], tmp_path: Path) -> None:
    """No data, no licence, no scores: it says so."""
    bundle = make_tiny(tmp_path / "plain", GREY, None, None)
    text = card_of(bundle.manifest, bundle.version)
    facts = front_matter(text)
    assert facts["license"] == "unknown"
    assert "model-index" not in facts
    assert "does not say what it was trained on" in text
    assert "No scores on test images are recorded" in text
    assert "not calibrated" in text


def test_names_and_numbers_of_any_kind_make_no_markup(make_tiny: Callable[..., Bundle], tmp_path: Path) -> None:
    """Labels, data sets and scores come from anywhere: they stay words, and the YAML stays YAML."""
    bundle = make_tiny(tmp_path / "odd", GREY, ("<script>", "a|b\n# c", "[x](y)"), None)
    data: Any = {"name": "x\n---\nlicense: mit", "checksum": "`<b>`"}
    figures: Any = {"frechet": {"value": "low"}, "precision": 3, "recall": {"value": True}, "coverage": {"value": 0.5}}
    manifest = bundle.manifest.model_copy(
        update={"training": {"data": data, "preset": "<img>"}, "evaluation": {"suite": {"figures": figures}}}
    )
    text = card_of(manifest, bundle.version)
    assert front_matter(text)["license"] == "unknown"
    assert [metric["type"] for metric in front_matter(text)["model-index"][0]["results"][0]["metrics"]] == ["coverage"]
    body = text.split("---\n", 2)[2]
    assert "<script>" not in body
    assert "<img>" not in body
    assert "\n# c" not in body
    assert "[x](" not in body.replace("\\[x](", "")
    others: list[Any] = [{"suite": 3}, {"suite": {"figures": []}}, {"classification_accuracy": {"generated": "x"}}]
    for evaluation in others:
        assert card_of(manifest.model_copy(update={"evaluation": evaluation}), bundle.version)


def test_a_card_of_ones_own_is_left_alone(
    make_tiny: Callable[..., Bundle], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is made again, with new scores, until somebody deletes its last line."""
    bundle = make_tiny(tmp_path / "mine", GREY, None, None)
    assert main(["card", str(bundle.folder)]) == 0
    record_evaluation(bundle, {"suite": {"figures": {"recall": {"value": 0.25, "floor": 0.5}}}})
    assert main(["card", str(bundle.folder)]) == 0
    path = bundle.folder / CARD
    text = path.read_text("utf-8")
    assert "| recall | 0.25 | 0.5 |" in text
    path.write_text(text.replace(MADE, "mine"), "utf-8")
    capsys.readouterr()
    assert main(["card", str(bundle.folder)]) == 0
    assert "somebody's own" in capsys.readouterr().out
    assert path.read_text("utf-8").endswith("mine\n")
    assert json.loads((bundle.folder / "manifest.json").read_text())["files"].keys().isdisjoint({CARD})
