"""Latents that a client sends in place of a seed: read from JSON or an .npy body, and checked against the bundle."""

from collections.abc import Sequence
from functools import partial

import numpy as np

from models.inference.noise import Float32
from models.spec import LatentSpec
from service.codecs.npy import read_npy
from service.codecs.time_slices import OffLoopWork, Steps
from service.errors import Invalid
from service.http.requests.json_limits import JsonLimits, json_limits
from service.http.schemas import SampleBody, SampleRequest

MAX_JSON_NUMBERS = 2**17
_SMALL = 2**16  # numbers that are checked on the event loop


def sample_limits(max_count: int) -> JsonLimits:
    """Limits that fit all fields of a sample request, with as many latents as JSON may hold, a row for each image."""
    usual = json_limits(max_count)
    return usual._replace(values=usual.values + MAX_JSON_NUMBERS, containers=usual.containers + max_count)


def latents_of_json(rows: Sequence[Sequence[float]]) -> Float32:
    """Latents (n, dim) as a JSON body has them.

    Raises:
        Invalid: Rows of different lengths, too many numbers, or one that float32 can't hold.
    """
    lengths = {len(row) for row in rows}
    if len(lengths) > 1:
        raise Invalid(f"latents: rows of {min(lengths)} to {max(lengths)} numbers; all need as many.")
    if len(rows) * max(lengths) > MAX_JSON_NUMBERS:
        raise Invalid(f"latents: as JSON at most {MAX_JSON_NUMBERS} numbers; send more as application/x-npy.")
    return _finite(np.asarray(rows, np.float64))


def latents_of_npy(body: bytes) -> Steps[Float32]:
    """Latents (n, dim) as the array of an .npy body.

    Raises:
        Malformed: Not an .npy file.
        Invalid: Another array than float32 (n, dim), or with a number that is not finite.
    """
    array = read_npy(body, np.float32, lambda shape: len(shape) == 2, "(n, dim)")
    if array.size <= _SMALL:
        return _finite(array)
    latents: Float32 = yield OffLoopWork(partial(_finite, array), array.size)
    return latents


def _finite(numbers: np.ndarray) -> Float32:
    """The numbers as float32, in memory of their own."""
    with np.errstate(over="ignore"):
        latents = np.array(numbers, np.float32, order="C")
    if not np.isfinite(latents).all():
        raise Invalid("latents: each has to be a number that float32 can hold.")
    return latents


def check_latents(asked: SampleRequest, latents: Float32, latent: LatentSpec, max_count: int) -> None:
    """Check that latents fit the bundle and the request's other fields.

    Raises:
        Invalid: They don't.
    """
    n, dim = latents.shape
    if dim != latent.dim:
        raise Invalid(f"latents: rows of {dim} numbers; this bundle's latents have {latent.dim}.")
    if n > max_count:
        raise Invalid(f"latents: {n} rows; one request may bring {max_count}.")
    if given := sorted({"seed", "first_index"} & asked.model_fields_set):
        raise Invalid(f"{given[0]}: latents take its place; send one of the two.")
    if asked.count not in {None, n}:
        raise Invalid(f"count: {asked.count} images of {n} latents; leave it out, or send {n}.")
    if latent.label_frequencies is not None and asked.labels is None:
        raise Invalid("labels: latents draw none; give one for all or one per image.")


def check_shown(numbers: int) -> None:
    """Check that a reply may show so many latents: no more than could be sent back as JSON.

    Raises:
        Invalid: It may not.
    """
    if numbers > MAX_JSON_NUMBERS:
        raise Invalid(f"latents: {numbers} numbers; a reply has at most {MAX_JSON_NUMBERS}. Ask for fewer images.")


def rows_of(asked: SampleRequest) -> list[list[float]] | None:
    """The latents within a JSON body; None if there are none."""
    return asked.latents if isinstance(asked, SampleBody) and isinstance(asked.latents, list) else None
