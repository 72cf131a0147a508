"""Every request that the clients can make: its fields as the service names them, and how its reply is read."""

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gan_client.core.images import Images, Uploads, npy_file, to_images
from gan_client.core.paging import Pages, Part, Span
from gan_client.core.replies import (
    JSON,
    MAX_REPLY_BYTES,
    NPY,
    Call,
    Reply,
    optional_number,
    optional_text,
    read_array,
    read_base64,
    read_latent,
    read_object,
    read_picture,
    read_problem,
    read_results,
)
from gan_client.errors import BadReplyError, GanServiceError
from gan_client.results import Bundle, Encoding, Problem, UInt8, Verdict, Verification

T = TypeVar("T", Verdict, Encoding, Verification)

Label = int | str
Labels = Label | Sequence[Label] | NDArray[np.integer[Any]]
Fields = dict[str, Any]
FileFormat = Literal["png", "webp", "jpeg", "json", "zip", "npy"]
PathFormat = Literal["png", "gif", "webp", "apng"]
MEDIA_TYPES = {
    "png": "image/png",
    "webp": "image/webp",
    "jpeg": "image/jpeg",
    "json": JSON,
    "zip": "application/zip",
    "npy": NPY,
    "gif": "image/gif",
    "apng": "image/apng",
}
SEED_LIMIT = 2**53
_PINNED = re.compile(r"[^@\s]{1,200}@[0-9a-f]{12}")
_MAX_RESULT_BYTES = 2**16
_MAX_NPY_HEADER_BYTES = 2**12
_FIELDS = ("bundle", "labels")  # what an error's detail begins with where it is about the request


class SampleOptions(TypedDict, total=False):
    """Further options of drawing.

    Attributes:
        first_index: Where within the seed to begin.
        truncation: Factor on the latents, over 0 and up to 1: less is more typical and less varied.
        scale: Every pixel becomes this many in both directions, 1 … 16.
        latents: float32 (n, dim) in place of the seed.
    """

    first_index: int
    truncation: float
    scale: int
    latents: NDArray[Any]


class FileOptions(SampleOptions, total=False):
    """Options of one file with all images in it.

    Attributes:
        layout: `grid` or `strip`, where a picture holds several images.
        columns: Images in each line of a grid.
        recipe: Whether a picture carries what it was made from, so that `verify` can tell.
    """

    layout: Literal["grid", "strip"]
    columns: int
    recipe: bool


class PathOptions(TypedDict, total=False):
    """Options of the way from one image to another.

    Attributes:
        index_from, index_to: The images' indices within their seeds.
        method: `linear` or `spherical`.
        label, label_to: The class at the beginning and at the end.
        truncation, scale, bundle: As for `sample`.
    """

    index_from: int
    index_to: int
    method: Literal["linear", "spherical"]
    label: Label
    label_to: Label
    truncation: float
    scale: int
    bundle: str


class Drawing:
    """Images to draw. What is left open is settled here, once: so a repeated request asks for the same images.

    Args:
        count: None for as many as labels, or as latents, or one.
        labels: One for all, or one for each image.
        endless: There is no last image, and several labels take turns.
    """

    def __init__(
        self,
        count: int | None,
        seed: int | None,
        labels: Labels | None,
        options: Mapping[str, Any],
        *,
        endless: bool = False,
    ) -> None:
        fields = {name: value for name, value in options.items() if value is not None}
        latents: NDArray[Any] | None = fields.pop("latents", None)
        self.latents = None if latents is None else np.ascontiguousarray(latents, np.float32)
        if self.latents is not None and (seed is not None or "first_index" in fields):
            raise ValueError("latents take the place of seed and first_index")
        self.labels = _plain_labels(labels)
        self.first_index: int = fields.pop("first_index", 0)
        self.seed = secrets.randbelow(SEED_LIMIT) if seed is None else seed
        self.count = SEED_LIMIT if endless else self._count(count)
        if not endless and isinstance(self.labels, list) and len(self.labels) != self.count:
            raise ValueError(f"{len(self.labels)} labels for {self.count} images")
        self.fields = fields
        self._image_bytes: int | None = None

    def _count(self, count: int | None) -> int:
        several = next((len(one) for one in (self.latents, self.labels) if isinstance(one, np.ndarray | list)), 1)
        if count is not None and count < 1:
            raise ValueError(f"count is {count}: at least one image is needed")
        if self.latents is not None and count not in {None, len(self.latents)}:
            raise ValueError(f"{len(self.latents)} latents for {count} images")
        return several if count is None else count

    def pages(self, bundle: str | None, spans: Iterable[Span] | None = None) -> Pages[UInt8]:
        """The requests for all images as arrays, or for some of them."""
        return Pages([(0, self.count)] if spans is None else spans, bundle, self._array_call)

    def file(self, bundle: str | None, form: FileFormat) -> Call[bytes]:
        """The request for all images in one file."""
        return self._call((0, self.count), bundle, form, lambda reply: bytes(reply.body))

    def images(self, part: Part[UInt8]) -> list[Image.Image]:
        """The images of a part of the answer; each says how it can be drawn again."""
        images = to_images(part.value)
        for index, image in enumerate(images, self.first_index + part.span[0]):
            image.info = {"bundle": part.bundle}
            if self.latents is None:
                image.info |= {"seed": self.seed, "index": index}
        return images

    def _array_call(self, span: Span, bundle: str | None) -> Call[Part[UInt8]]:
        size = MAX_REPLY_BYTES if self._image_bytes is None else span[1] * self._image_bytes + _MAX_NPY_HEADER_BYTES
        return replace(self._call(span, bundle, "npy", partial(self._read, span, bundle)), most_bytes=size)

    def _call(self, span: Span, bundle: str | None, form: str, read: Callable[[Reply], Any]) -> Call[Any]:
        start, count = span
        fields = self.fields | {"count": count, "bundle": bundle, "labels": self.labels_of(span), "format": form}
        if self.latents is None:
            fields |= {"seed": self.seed, "first_index": self.first_index + start}
            return Call("POST", "/sample", MEDIA_TYPES[form], read, body=_json(fields), media_type=JSON)
        rows = npy_file(self.latents[start : start + count])
        return Call("POST", "/sample", MEDIA_TYPES[form], read, query=_query(fields), body=rows, media_type=NPY)

    def labels_of(self, span: Span) -> Label | list[Label] | None:
        """The labels of a span's images; one if all have the same."""
        if not isinstance(self.labels, list):
            return self.labels
        start, count = span
        return [self.labels[index % len(self.labels)] for index in range(start, start + count)]

    def _read(self, span: Span, bundle: str | None, reply: Reply) -> Part[UInt8]:
        """The images, if they are those that were asked for: a cache in between may give others."""
        start, count = span
        images = read_array(reply.body, count)
        answered = reply.headers.get("x-bundle")
        if answered is None or not _PINNED.fullmatch(answered):
            raise BadReplyError("it names no bundle")
        if bundle is not None and _PINNED.fullmatch(bundle) and answered != bundle:
            raise BadReplyError(f"asked for {bundle}, got {answered}")
        if self.latents is None:
            place = reply.headers.get("x-seed"), reply.headers.get("x-first-index")
            if place != (str(self.seed), str(self.first_index + start)):
                raise BadReplyError("it has the images of another seed or index")
        self._image_bytes = images[0].nbytes
        return Part(span, images, answered, images[0].nbytes, _compute_s(reply) / count)


def _compute_s(reply: Reply) -> float:
    """Seconds that the images took to compute; 0 where the reply does not say."""
    found = re.search(r"compute;dur=([0-9]{1,9}(?:\.[0-9]{1,9})?)", reply.headers.get("server-timing", ""))
    return float(found[1]) / 1000 if found else 0.0


def discriminate(images: Images, labels: Labels | None, bundle: str | None) -> Pages[list[Verdict]]:
    """The requests that judge images."""
    given = _plain_labels(labels)
    uploads = Uploads(images)
    if isinstance(given, list) and len(given) != len(uploads):
        raise ValueError(f"{len(given)} labels for {len(uploads)} images")

    def fields(span: Span) -> Fields:
        start, count = span
        if given is None:
            return {}
        return {"labels": given[start : start + count] if isinstance(given, list) else [given] * count}

    return _upload_pages("/discriminate", uploads, bundle, fields, _read_verdict, Verdict)


def encode(images: Images, bundle: str | None) -> Pages[list[Encoding]]:
    """The requests for where images lie in latent space."""
    return _upload_pages("/encode", Uploads(images), bundle, lambda _: {}, _read_encoding, Encoding)


def verify(pictures: Images) -> Pages[list[Verification]]:
    """The requests that compare pictures with their recipes."""
    return _upload_pages("/verify", Uploads(pictures), None, lambda _: {}, _read_verification, Verification)


def _upload_pages(
    path: str,
    uploads: Uploads,
    bundle: str | None,
    fields: Callable[[Span], Fields],
    read_one: Callable[[Mapping[str, Any]], T],
    failed: Callable[..., T],
) -> Pages[list[T]]:
    def read(span: Span, reply: Reply) -> Part[list[T]]:
        results = [read_one(result) for result in read_results(reply, span[1])]
        body = read_object(reply)
        pinned = f"{body['bundle']}@{body['version']}" if "bundle" in body else None
        return Part(span, results, pinned)

    def recover(span: Span, error: GanServiceError) -> Part[list[T]]:
        """Among several images one's error stands in its place; of a single one the service's answer is that error."""
        is_the_images = error.status == 413 or (error.code == "invalid" and not error.detail.startswith(_FIELDS))
        if not is_the_images:
            raise error
        return Part(span, [failed(error=Problem(error.status or 0, error.code or "", error.detail))], None)

    def call(span: Span, pinned: str | None) -> Call[Part[list[T]]]:
        body, kind = uploads.body(*span)
        query = _query({"bundle": pinned, **fields(span)})
        most = _MAX_RESULT_BYTES + span[1] * 2**21 if path == "/encode" else (span[1] + 1) * _MAX_RESULT_BYTES
        return Call(
            "POST",
            path,
            JSON,
            partial(read, span),
            query=query,
            body=body,
            media_type=kind,
            most_bytes=most,
            recover=partial(recover, span) if span[1] == 1 else None,
        )

    return Pages(uploads.spans(), bundle, call)


def _read_verdict(result: Mapping[str, Any]) -> Verdict:
    problem = read_problem(result)
    if problem:
        return Verdict(error=problem)
    return Verdict(
        probability_real=float(result["probability_real"]),
        logit=float(result["logit"]),
        label=optional_text(result, "label"),
        is_calibrated=result.get("calibrated") is not False,
        is_converted=result.get("converted") is True,
        hint=optional_text(result, "hint"),
    )


def _read_encoding(result: Mapping[str, Any]) -> Encoding:
    problem = read_problem(result)
    if problem:
        return Encoding(error=problem)
    image = read_picture(read_base64(result["image"]))
    latent, label = read_latent(result["latent"]), optional_text(result, "label")
    return Encoding(latent, optional_number(result, "error"), image, label=label)


def _read_verification(result: Mapping[str, Any]) -> Verification:
    problem = read_problem(result)
    if problem:
        return Verification(error=problem)
    recipe = result.get("recipe")
    if recipe is not None and not isinstance(recipe, dict):
        raise BadReplyError("the recipe is no JSON object")
    return Verification(str(result["verdict"]), recipe)


def interpolation(
    seed_from: int, seed_to: int, steps: int, form: PathFormat, duration_ms: int | None, options: PathOptions
) -> Call[bytes]:
    """The request for a way from one image to another, as a strip or an animation."""
    fields = {**options, "seed_from": seed_from, "seed_to": seed_to, "steps": steps, "format": form}
    query = _query(fields | {"duration_ms": duration_ms})
    return Call("GET", "/interpolate", MEDIA_TYPES[form], lambda reply: bytes(reply.body), query=query)


def cut_strip(strip: bytes, steps: int) -> list[Image.Image]:
    """The images of a strip.

    Raises:
        BadReplyError: It is no picture, or can't be of so many images.
    """
    picture = read_picture(strip)
    width = picture.width // steps
    if width * steps != picture.width:
        raise BadReplyError(f"The picture is {picture.width} pixels wide, which {steps} images can't be.")
    return [picture.crop((left, 0, left + width, picture.height)) for left in range(0, picture.width, width)]


def bundle_list() -> Call[list[Bundle]]:
    """The request for all bundles."""

    def read(reply: Reply) -> list[Bundle]:
        body = read_object(reply)
        return [_read_bundle(one, is_default=one["name"] == body["default"]) for one in body["bundles"]]

    return Call("GET", "/bundles", JSON, read)


def _read_bundle(found: Mapping[str, Any], *, is_default: bool) -> Bundle:
    image, labels = found["image"], found.get("labels")
    return Bundle(
        name=str(found["name"]),
        version=str(found["version"]),
        height=int(image["height"]),
        width=int(image["width"]),
        channels=int(image["channels"]),
        labels=None if labels is None else tuple(str(label) for label in labels),
        is_default=is_default,
        metadata=dict(found),
    )


def _plain_labels(labels: Labels | None) -> Label | list[Label] | None:
    """Labels as JSON has them: NumPy's integers are none of its numbers."""
    if labels is None or isinstance(labels, str):
        return labels
    if isinstance(labels, int | np.integer):
        return int(labels)
    found = [label if isinstance(label, str) else int(label) for label in labels]
    if not found:
        raise ValueError("there are no labels in the list")
    return found


def _json(fields: Fields) -> bytes:
    return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


def _query(fields: Fields) -> dict[str, str]:
    """Fields as a query has them: labels as JSON, in which a class called 3 differs from the fourth class."""
    return {name: _text(name, value) for name, value in fields.items() if value is not None}


def _text(name: str, value: object) -> str:
    if name in {"labels", "label", "label_to"} or isinstance(value, bool):
        return json.dumps(value)
    return str(value)
