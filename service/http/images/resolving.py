"""Resolves a parsed request for a bundle: fills in defaults, and refuses what the bundle or the settings rule out."""

import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TypeVar

from models.inference.noise import Float32
from models.spec import ImageSpec
from service.codecs.encode import (
    MAX_SIDE,
    MAX_WEBP_PIXELS,
    MEDIA_TYPES,
    STREAMED,
    Format,
    RenderOptions,
    picture_size,
)
from service.codecs.recipe import MAX_RECIPE_IMAGES
from service.errors import Invalid, NotAcceptable
from service.http.schemas import SEED_LIMIT, Label, Labels, QueryDigits, SampleRequest
from service.settings import Settings

MAX_INDEX_DIGITS = 9
CANDIDATES_AT_ONCE = 4  # of an image, where D chooses: about as many as one takes
Kind = TypeVar("Kind", bound=str)
_ALIASES = {"image/jpg": "image/jpeg"}  # in Accept


def choose_format(wanted: Format | None, accept: str | None) -> Format:
    """The format of a reply: the one requested by name, else the best that `Accept` allows.

    Raises:
        NotAcceptable: `Accept` allows none of ours.
    """
    return negotiate(accept, MEDIA_TYPES) if wanted is None else wanted


def negotiate(accept: str | None, media_types: Mapping[Kind, str]) -> Kind:
    """The best of these formats that `Accept` allows (RFC 9110, 12.5.1).

    Raises:
        NotAcceptable: It allows none of them.
    """
    ranges = _accept_ranges(accept or "*/*")
    best = max(media_types, key=lambda form: _quality(media_types[form], ranges))  # max keeps the first of equals
    if _quality(media_types[best], ranges) == 0:
        raise NotAcceptable(f"Accept allows none of {', '.join(media_types.values())}.")
    return best


def _accept_ranges(accept: str) -> dict[str, float]:
    """The quality of each media range; malformed ones are skipped."""
    ranges = {}
    for part in accept.lower().split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        quality = next((p[2:].strip() for p in parameters if p.startswith("q=")), "1")
        if re.fullmatch(r"[01](\.[0-9]{0,3})?", quality):
            ranges[_ALIASES.get(name, name)] = min(float(quality), 1.0)
    return ranges


def _quality(media_type: str, ranges: dict[str, float]) -> float:
    """The quality of a media type, from the most specific range that matches it."""
    for name in (media_type, media_type.split("/", maxsplit=1)[0] + "/*", "*/*"):
        if name in ranges:
            return ranges[name]
    return 0.0


def resolve_label(label: Labels, names: Sequence[str] | None, field: str) -> int | None:
    """The class index of a field that holds a single label; None if none was given. See `resolve_labels`."""
    indices = resolve_labels(label, names, 1, field)
    return None if indices is None else indices[0]


def resolve_labels(labels: Labels, names: Sequence[str] | None, count: int, field: str = "labels") -> list[int] | None:
    """Class indices, one per image; None if no labels were given.

    Args:
        labels: As the client gave them: by index or name, one for all or one per image.
        names: The bundle's labels; None for a bundle without.
        count: Number of images.
        field: What the client calls them.

    Raises:
        Invalid: The bundle has no labels, a label is unknown, or their number is neither 1 nor `count`.
    """
    if labels is None:
        return None
    if names is None:
        raise Invalid(f"{field}: this bundle has no labels.")
    wanted = labels if isinstance(labels, list) else [labels]
    if len(wanted) not in {1, count}:
        raise Invalid(f"{field}: {len(wanted)} labels for {count} images; give one for all or one per image.")
    places = {name: place for place, name in enumerate(names)}
    indices = [_index(label, names, places, field) for label in wanted]
    return indices * count if len(indices) == 1 else indices


def _index(label: Label, names: Sequence[str], places: Mapping[str, int], field: str) -> int:
    if isinstance(label, QueryDigits):
        shown = label.text
        index = int(shown) if len(shown) <= MAX_INDEX_DIGITS else len(names)
        if places.get(shown, index) != index:
            raise Invalid(_ambiguous(shown, index, names, field))
    else:
        index, shown = (label, str(label)) if isinstance(label, int) else (places.get(label, len(names)), label)
    if 0 <= index < len(names):
        return index
    known = ", ".join(f"{index} ({name[:100]})" for index, name in enumerate(names[:20]))
    raise Invalid(f"{field}: {shown[:100]!r} is not one of {known}{', …' if len(names) > 20 else ''}.")


def _ambiguous(digits: str, index: int, names: Sequence[str], field: str) -> str:
    """Why digits in a query are refused, and how to write what was meant."""
    by_name = f'{field}=["{digits}"] for the name (in curl with -g)'  # else curl takes brackets for a range
    if index >= len(names):
        return f"{field}: in a query {digits} is an index, and there is none so high; write {by_name}."
    return (
        f"{field}: in a query {digits} is an index, that of {names[index][:100]!r}, and also the name of another "
        f"class; write {field}=[{index}] for the index, {by_name}."
    )


@dataclass(slots=True)
class SamplePlan:
    """A resolved sample request: these fields and the bundle determine every byte of the reply."""

    count: int
    seed: int
    first_index: int
    labels: list[int] | None
    truncation: float
    render: RenderOptions
    latents: Float32 | None = None  # take the place of seed and first_index
    shows_latents: bool = False
    is_marked: bool = False  # pictures say that they were generated, and by which recipe
    is_selected: bool = False  # D chooses among candidates

    @property
    def rows(self) -> int:
        """Rows that take room in the queue."""
        return self.count * (CANDIDATES_AT_ONCE if self.is_selected else 1)

    def part(self, start: int, count: int) -> "SamplePlan":
        """The plan for images start … start + count − 1 of this one's."""
        return replace(
            self,
            count=count,
            first_index=self.first_index + start,
            labels=None if self.labels is None else self.labels[start : start + count],
            latents=None if self.latents is None else self.latents[start : start + count],
        )


def resolve_sample(
    request: SampleRequest,
    image: ImageSpec,
    names: Sequence[str] | None,
    accept: str | None,
    settings: Settings,
    latents: Float32 | None = None,
) -> SamplePlan:
    """Resolve a request for a bundle with this image shape and these labels; fills in the defaults.

    Raises:
        Invalid: Over a limit, or labels that the bundle does not have.
        NotAcceptable: See `choose_format`.
    """
    count = request.count or (len(request.labels) if isinstance(request.labels, list) else 1)
    if latents is not None:
        count = len(latents)
    is_beyond = request.first_index + count > SEED_LIMIT
    if not 1 <= count <= settings.max_count:
        following = request.first_index + settings.max_count
        others = "" if is_beyond else f" Ask for the others with the same seed and first_index={following}."
        raise Invalid(f"count: {count} images; one request may ask for 1 to {settings.max_count}.{others}")
    if is_beyond:
        raise Invalid("first_index: the last image's index would be over 2^53 − 1.")
    asked = request.format, request.layout, request.columns, request.scale
    render = _render_options(*asked, accept, count, image.shape, settings.max_output_pixels)
    is_selected = request.select == "discriminator"
    if is_selected:
        _check_selected(render, count, image, settings, latents)
    return SamplePlan(
        count=count,
        seed=secrets.randbelow(SEED_LIMIT) if request.seed is None else request.seed,
        first_index=request.first_index,
        labels=resolve_labels(request.labels, names, count),
        truncation=request.truncation,
        render=render,
        latents=latents,
        shows_latents=request.latents is True and render.format == "json",
        is_marked=_is_marked(request, render, count, settings),
        is_selected=is_selected,
    )


def _check_selected(
    render: RenderOptions, count: int, image: ImageSpec, settings: Settings, latents: Float32 | None
) -> None:
    """Check what goes for images among whose candidates D chooses. Their replies are always made whole.

    Raises:
        Invalid: They can't be asked for so.
    """
    if latents is not None:
        raise Invalid("select: given latents have no other candidates; send a seed in their place.")
    if count > (most := settings.own_queued_images // CANDIDATES_AT_ONCE):
        raise Invalid(f"count: {count} images; with select=discriminator one request may ask for up to {most}.")
    if render.format in STREAMED:
        pixels = count * image.height * image.width * render.scale**2
        check_pixels("count, scale", pixels, settings.max_output_pixels)


def _is_marked(request: SampleRequest, render: RenderOptions, count: int, settings: Settings) -> bool:
    """Whether pictures carry their recipe.

    Raises:
        Invalid: It would be too long for one picture.
    """
    if not (settings.recipe if request.recipe is None else request.recipe):
        return False
    if render.format in MAX_SIDE and count > MAX_RECIPE_IMAGES:
        raise Invalid(
            f"recipe: a picture's recipe has room for {MAX_RECIPE_IMAGES} images. Ask for fewer, or recipe=false."
        )
    return render.format != "npy"


@lru_cache(maxsize=256)  # few different values of Accept are in use
def _render_options(
    wanted: Format | None,
    layout: str | None,
    columns: int | None,
    scale: int,
    accept: str | None,
    count: int,
    shape: tuple[int, int, int],
    max_pixels: int,
) -> RenderOptions:
    """The render options for `count` images of this shape (channels, height, width).

    Raises:
        Invalid: The picture would be too large, or `columns` does not fit the layout.
        NotAcceptable: See `choose_format`.
    """
    render = RenderOptions(choose_format(wanted, accept), _columns(layout, columns, count), scale)
    _check_size(render, count, shape, max_pixels)
    return render


def _columns(layout: str | None, columns: int | None, count: int) -> int:
    if layout == "strip":
        if columns is not None:
            raise Invalid("columns: a strip is one line; columns go with layout=grid.")
        return count
    return min(columns or math.isqrt(count - 1) + 1, count)


def _check_size(render: RenderOptions, count: int, shape: tuple[int, int, int], max_pixels: int) -> None:
    height, width = picture_size(render, count, *shape[1:])
    side = MAX_SIDE.get(render.format)
    if side is None:
        # Archives and arrays are streamed where they are large, an image at a time if need be.
        pixels = shape[1] * shape[2] * render.scale**2 * (1 if render.format in STREAMED else count)
    else:
        check_side(render.format, side, height, width)
        pixels = height * width
    check_pixels("count, scale", pixels, max_pixels)


def check_side(form: str, most: int, height: int, width: int) -> None:
    """Check that a format holds a picture of this size.

    Raises:
        Invalid: It does not.
    """
    if max(height, width) > most:
        raise Invalid(f"format: {form} holds up to {most} pixels a side; this picture would be {width}×{height}.")
    if form == "webp" and height * width > MAX_WEBP_PIXELS:
        raise Invalid(
            f"format: a webp has up to {MAX_WEBP_PIXELS} pixels here; this picture would have {height * width}. "
            "A png may have more."
        )


def check_pixels(fields: str, pixels: int, most: int) -> None:
    """Check that a reply is not too large; `fields` are those that decide about it.

    Raises:
        Invalid: It is.
    """
    if pixels > most:
        raise Invalid(f"{fields}: the reply would have {pixels} pixels; the most is {most}.")


def fingerprint(plan: SamplePlan) -> str:
    """A plan's fields as text, the same in every process. Part of the entity tag."""
    drawn = f"{plan.count} {plan.seed} {plan.first_index} {plan.labels} {plan.truncation} {plan.is_selected}"
    return (
        f"{drawn} {plan.shows_latents} {plan.is_marked} {plan.render.format} {plan.render.columns} {plan.render.scale}"
    )
