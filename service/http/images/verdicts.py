"""What D says of images, as the JSON of a reply."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from pydantic_core import to_json

from service.http.problems import Problem


class DiscriminatorOutput(NamedTuple):
    """The fields of `DiscriminateResult`, as columns over the decoded images.

    `labels` is None if none are shown. `hints` has only those that there are, by the image's place.
    """

    probabilities_real: Sequence[float]
    logits: Sequence[float]
    labels: Sequence[str] | None
    is_calibrated: bool
    converted: Sequence[bool]
    hints: Mapping[int, str] = MappingProxyType({})


def discriminate_reply(
    bundle: str, version: str, output: DiscriminatorOutput, problems: Mapping[int, Problem]
) -> bytes:
    """A `DiscriminateReply` as JSON, built without a pydantic model for each image (benchmarks/serving/pieces.py).

    Args:
        bundle, version: Of the bundle.
        output: For the images that could be decoded, in order.
        problems: For the others, by their index in the request.
    """
    shown = [
        b'"probability_real":%b,"logit":%b' % pair
        for pair in zip(_json_numbers(output.probabilities_real), _json_numbers(output.logits), strict=True)
    ]
    if output.labels is not None:
        texts = {label: to_json(label) for label in set(output.labels)}
        shown = [b'%b,"label":%b' % (one, texts[label]) for one, label in zip(shown, output.labels, strict=True)]
    if not output.is_calibrated:
        shown = [one + b',"calibrated":false' for one in shown]
    if any(output.converted):
        marks = [b',"converted":true' if converted else b"" for converted in output.converted]
        shown = [one + mark for one, mark in zip(shown, marks, strict=True)]
    hints = {hint: b',"hint":' + to_json(hint) for hint in set(output.hints.values())}
    for place, hint in output.hints.items():
        shown[place] += hints[hint]
    for index in sorted(problems):  # in ascending order, so that each insertion ends up at its final index
        shown.insert(index, b'"error":' + to_json(problems[index]))
    head = to_json({"bundle": bundle, "version": version})[:-1]
    return b'%b,"results":[{%b}]}' % (head, b"},{".join(shown))


def _json_numbers(values: Sequence[float]) -> list[bytes]:
    """Each number as JSON."""
    return to_json(values)[1:-1].split(b",") if values else []
