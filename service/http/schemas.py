"""The shapes of requests and replies, and what a request comes to for a certain bundle.

A schema says what is allowed on its own; `resolve_…` says what is allowed for this bundle, under these settings. All
of it before anything is queued.
"""

import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, TypeVar
from urllib.parse import parse_qsl

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    JsonValue,
    RootModel,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import CoreSchema, to_json

from models.spec import Calibration, ImageSpec, LatentSpec
from service.codecs.encode import MAX_SIDE, MEDIA_TYPES, Format, RenderOptions, picture_size
from service.codecs.time_slices import Steps
from service.errors import Invalid, Malformed, NotAcceptable
from service.http.json_limits import JsonLimits, check_json
from service.http.problems import Problem
from service.settings import Settings

# Browsers read integers past this inexactly, and our page sends the seed back.
SEED_LIMIT = 2**53
MAX_QUERY_FIELDS = 32


def _readable(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    try:
        return handler(value)
    except ValidationError:
        raise ValueError("must be an index, a name, or a list of one or more of these") from None


def _digits(value: object) -> object:
    """Python reads 1_0, +1 and " 1" as numbers too; a query that says so is a mistake."""
    if isinstance(value, str) and not re.fullmatch("-?[0-9]{1,64}", value):
        raise ValueError("Input should be a whole number, in digits")
    return value


def _decimal(value: object) -> object:
    """Python's floats may be written in more ways than JSON's numbers, too."""
    if isinstance(value, str) and not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?", value):
        raise ValueError("Input should be a number, such as 0.7 or 7e-1")
    return value


Whole = Annotated[int, BeforeValidator(_digits)]
Real = Annotated[float, BeforeValidator(_decimal)]
# Bounds stand beside `int`: those of `Whole | None` are checked as well, but a JSON schema has no words for them then.
Positive = Annotated[int, Field(ge=1), BeforeValidator(_digits)]
Index = Annotated[int, Field(ge=0, lt=SEED_LIMIT), BeforeValidator(_digits)]
# "name@" would look pinned, and is not.
BundleName = Annotated[str, Field(pattern=r"^[^@]+(@[^@]+)?$", max_length=200)]
Label = Annotated[int, Field(ge=0)] | Annotated[str, Field(min_length=1)]
# A list ends at its first mistake: else each element of a body could make one, and each is kept until all are told.
Labels = Annotated[Label | Annotated[list[Label], Field(min_length=1, fail_fast=True)] | None, WrapValidator(_readable)]


_NULL = {"type": "null"}


class Schema(BaseModel):
    """Base of what clients send: unknown fields are refused, and null is as left out."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or name not in cls.model_fields}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Says of every field that may be left out that it may be null."""
        whole = handler.resolve_ref_schema(handler(schema))
        for name, field in whole.get("properties", {}).items():
            if name not in whole.get("required", ()) and _NULL not in field.get("anyOf", ()):
                about = {key: field.pop(key) for key in ("title", "description", "default", "examples") if key in field}
                whole["properties"][name] = {"anyOf": [field, _NULL], **about}
        return whole


class SampleRequest(Schema):
    """Draw `count` images. A seed fixes the latents, whatever batch they end up sharing."""

    count: Positive | None = Field(
        None,
        description="Images to draw, up to GAN_MAX_COUNT. Default: as many as labels, else 1.",
        examples=[64],
    )
    seed: Index | None = Field(None, description="Leave out for a new one; the reply names it.", examples=[7])
    first_index: Index = Field(0, description="Index, within the seed, of the first image: any range can be had alone.")
    labels: Labels = Field(
        None,
        description="Class by index or name, one for all images or one per image; in a query joined by commas. "
        "Default: drawn from the seed at the training data's frequencies.",
    )
    truncation: Real = Field(
        1.0, gt=0, le=1, description="Factor on the latent: smaller is more typical and less varied."
    )
    bundle: BundleName | None = Field(None, description="name, or name@version. Default: the service's default.")
    format: Format | None = Field(None, description="Wins over the Accept header. Default: by Accept, else png.")
    layout: Literal["grid", "strip"] | None = Field(
        None, description="How several images share one picture (png, webp, jpeg): a grid, the default, or one line."
    )
    columns: Positive | None = Field(
        None, description="Images in one line of a grid (not of a strip). Default: as many as make it about square."
    )
    scale: Whole = Field(1, ge=1, le=16, description="Repeat every pixel this often in both directions.")


class DiscriminateQuery(Schema):
    """What goes with images: in the query where they are files, multipart parts or an array, else in the JSON."""

    bundle: BundleName | None = Field(None, description="name, or name@version. Default: the service's default.")
    labels: Labels = Field(
        None,
        description="For a class-conditional bundle: class by index or name, one for all images or one per image. "
        "Default: its class head names each image's.",
    )


# A black pixel, as a PNG in base64.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="


class DiscriminateRequest(DiscriminateQuery):
    """Images to score, in JSON."""

    images: list[str] = Field(
        min_length=1,
        fail_fast=True,
        description="Image files (png, jpeg, webp or bmp) in base64.",
        examples=[[PIXEL]],
    )


class Reply(BaseModel):
    """Base of what the service sends. What there is nothing to say about is left out."""

    model_config = ConfigDict(frozen=True)


class SampleReply(Reply):
    """Images as JSON. `service.codecs.encode` writes it."""

    bundle: str
    version: str
    seed: int
    first_index: int
    labels: list[int] | None = Field(description="The class of each image, drawn or given; null without classes.")
    images: list[str] = Field(description="PNG files in base64.")


class DiscriminateResult(Reply):
    """What D says of one image, or why it said nothing."""

    probability_real: float | None = Field(
        None, description="σ(scale·logit + offset) with the bundle's calibration, for as many real as generated images."
    )
    logit: float | None = Field(None, description="D's raw output.")
    label: str | None = Field(
        None, description="The class that the bundle's class head names, where it has classes and none was given."
    )
    calibrated: Literal[False] | None = Field(
        None, description="false where the bundle has no calibration: probability_real is then σ(logit)."
    )
    converted: Literal[True] | None = Field(
        None, description="true where the image had another size or colour mode than the bundle's."
    )
    error: Problem | None = Field(
        None, description="Why D was not asked about this image, instead of all of the above."
    )


class DiscriminateReply(Reply):
    """One result an image, in the order of the request."""

    bundle: str
    version: str
    results: list[DiscriminateResult]


class Judged(NamedTuple):
    """What D says of images, one after the other, as `DiscriminateResult` shows each. `labels` is None for no names."""

    probabilities_real: Sequence[float]
    logits: Sequence[float]
    labels: Sequence[str] | None
    is_calibrated: bool
    converted: Sequence[bool]


def discriminate_reply(bundle: str, version: str, judged: Judged, problems: Mapping[int, Problem]) -> bytes:
    """A `DiscriminateReply` as JSON, without a model for each image, which takes longer (benchmarks/serving/pieces.py).

    Problems take the places that they have here; what was judged, those between.
    """
    shown = [
        b'"probability_real":%b,"logit":%b' % pair
        for pair in zip(_numbers(judged.probabilities_real), _numbers(judged.logits), strict=True)
    ]
    if judged.labels is not None:
        texts = {label: to_json(label) for label in set(judged.labels)}
        shown = [b'%b,"label":%b' % (one, texts[label]) for one, label in zip(shown, judged.labels, strict=True)]
    if not judged.is_calibrated:
        shown = [one + b',"calibrated":false' for one in shown]
    if any(judged.converted):
        marks = [b',"converted":true' if converted else b"" for converted in judged.converted]
        shown = [one + mark for one, mark in zip(shown, marks, strict=True)]
    for place in sorted(problems):  # from the first on, so that those that follow find their places
        shown.insert(place, b'"error":' + to_json(problems[place]))
    head = to_json({"bundle": bundle, "version": version})[:-1]
    return b'%b,"results":[{%b}]}' % (head, b"},{".join(shown))


def _numbers(values: Sequence[float]) -> list[bytes]:
    """Each as JSON."""
    return to_json(values)[1:-1].split(b",") if values else []


class BundleFacts(Reply):
    """A loaded bundle, by its manifest."""

    name: str
    version: str
    created: AwareDatetime
    image: ImageSpec
    latent: LatentSpec
    labels: tuple[str, ...] | None
    calibration: Calibration | None
    training: dict[str, JsonValue]
    evaluation: dict[str, JsonValue]


class BundleList(Reply):
    """What is loaded. `default` is the bundle of requests that name none."""

    default: str | None
    bundles: list[BundleFacts]


class RepositoryQuery(Schema):
    """Which bundles of the repository to list."""

    ready: bool = Field(default=False, description="Only those that serve.")


class RepositoryLoad(Schema):
    """Nothing: a bundle's own manifest says all that is needed to load it."""

    parameters: Schema = Field(default=Schema(), description="None.")


class UnloadParameters(Schema):
    """What the protocol's clients send along."""

    unload_dependents: bool = Field(default=False, description="Of no consequence: no bundle depends on another.")


class RepositoryUnload(Schema):
    """Nothing that matters."""

    parameters: UnloadParameters = Field(default=UnloadParameters(), description="Accepted for the protocol's clients.")


class RepositoryEntry(Reply):
    """A bundle of the repository. `name` is the folder's where it is not loaded, and `version` is then empty."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str = Field(description="Why it is unavailable.")


class RepositoryIndex(RootModel[list[RepositoryEntry]]):
    """Every bundle that is loaded, or has a folder."""


SchemaT = TypeVar("SchemaT", bound=Schema)


def parse_body(schema: type[SchemaT], body: bytes, limits: JsonLimits) -> Steps[SchemaT]:
    """A JSON body, types strictly as JSON has them; an empty body is an empty object.

    Raises:
        Malformed: Not JSON.
        Invalid: JSON, but over the limits, or not this schema.
    """
    yield from check_json(body, limits)
    try:
        return schema.model_validate_json(body or b"{}", strict=True)
    except ValidationError as error:
        raise _refusal(error) from None


def parse_query(schema: type[SchemaT], query: bytes) -> SchemaT:
    """A query string, every field at most once, lists joined by commas.

    Raises:
        Malformed: Not UTF-8, or far too many fields.
        Invalid: A field is unknown, out of range or given twice.
    """
    try:
        pairs = parse_qsl(
            query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_QUERY_FIELDS
        )
    except ValueError:
        raise Malformed(f"The query is not percent-encoded UTF-8 of at most {MAX_QUERY_FIELDS} fields.") from None
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise Invalid(f"{name[:100]}: given more than once.")
        fields[name] = [_label(part) for part in value.split(",")] if name == "labels" else value
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from None


def _label(text: str) -> Label:
    """In a query everything is text: digits are an index."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else text


def _refusal(error: ValidationError) -> Malformed | Invalid:
    """All that is wrong, one sentence a field."""
    reasons: dict[str, str] = {}
    for mistake in error.errors(include_url=False, include_context=False, include_input=False):
        if mistake["type"] == "json_invalid":
            return Malformed(f"The body is not JSON: {mistake['msg'].removeprefix('Invalid JSON: ')}.")
        field = ".".join(str(part)[:100] for part in mistake["loc"]) or "body"
        message = "unknown field" if mistake["type"] == "extra_forbidden" else mistake["msg"]
        reasons.setdefault(field, message.removeprefix("Value error, "))
    shown = [f"{field}: {reason}." for field, reason in list(reasons.items())[:8]]
    return Invalid(" ".join(shown))


def choose_format(wanted: Format | None, accept: str | None) -> Format:
    """The format a reply is written in: the one asked for by name, else the best that `Accept` allows (RFC 9110).

    Raises:
        NotAcceptable: `Accept` allows none of ours.
    """
    if wanted is not None:
        return wanted
    ranges = _accept_ranges(accept or "*/*")
    best = max(MEDIA_TYPES, key=lambda form: _quality(MEDIA_TYPES[form], ranges))  # max keeps the first of equals
    if _quality(MEDIA_TYPES[best], ranges) == 0:
        raise NotAcceptable(f"Accept allows none of {', '.join(MEDIA_TYPES.values())}.")
    return best


def _accept_ranges(accept: str) -> dict[str, float]:
    """Media ranges with their quality, as far as they can be read."""
    ranges = {}
    for part in accept.lower().split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        quality = next((p[2:].strip() for p in parameters if p.startswith("q=")), "1")
        if re.fullmatch(r"[01](\.[0-9]{0,3})?", quality):
            ranges[name] = min(float(quality), 1.0)
    return ranges


def _quality(media_type: str, ranges: dict[str, float]) -> float:
    """The most specific range that names this type decides, not the best."""
    for name in (media_type, media_type.split("/", maxsplit=1)[0] + "/*", "*/*"):
        if name in ranges:
            return ranges[name]
    return 0.0


def timeout_s(header: str | None, settings: Settings) -> float:
    """Seconds that a request may take, by its X-Timeout-Ms; more than the operator allows counts as what he allows.

    Raises:
        Invalid: Not a whole number of milliseconds from 1.
    """
    if header is None:
        return settings.deadline_s
    if not re.fullmatch("[0-9]{1,9}", header.strip()) or int(header) == 0:
        raise Invalid(f"X-Timeout-Ms: {header[:100]!r} is not a whole number of milliseconds from 1 to 999999999.")
    return min(int(header) / 1000, settings.max_deadline_s)


def resolve_labels(labels: Labels, names: Sequence[str] | None, count: int) -> list[int] | None:
    """Class indices, one per image; None where none were given.

    Args:
        labels: As the client gave them: by index or name, one for all or one per image.
        names: The bundle's labels; None for a bundle without.
        count: Images.

    Raises:
        Invalid: Labels for a bundle without, an unknown one, or another number of them.
    """
    if labels is None:
        return None
    if names is None:
        raise Invalid("labels: this bundle has no labels.")
    wanted = labels if isinstance(labels, list) else [labels]
    if len(wanted) not in {1, count}:
        raise Invalid(f"labels: {len(wanted)} labels for {count} images; give one for all or one per image.")
    indices = [_index(label, names) for label in wanted]
    return indices * count if len(indices) == 1 else indices


def _index(label: Label, names: Sequence[str]) -> int:
    if isinstance(label, int):
        if 0 <= label < len(names):
            return label
    elif label in names:
        return names.index(label)
    known = ", ".join(f"{index} ({name})" for index, name in list(enumerate(names))[:20])
    raise Invalid(f"labels: {str(label)[:100]!r} is not one of {known}{', …' if len(names) > 20 else ''}.")


@dataclass(slots=True)
class SamplePlan:
    """A sample request with nothing left open: these fields and the bundle decide every pixel, and every byte."""

    count: int
    seed: int
    first_index: int
    labels: list[int] | None
    truncation: float
    render: RenderOptions


def resolve_sample(
    request: SampleRequest, image: ImageSpec, names: Sequence[str] | None, accept: str | None, settings: Settings
) -> SamplePlan:
    """What a request comes to for a bundle with these images and labels.

    Raises:
        Invalid, NotAcceptable: It can't be done; nothing was queued.
    """
    count = request.count or (len(request.labels) if isinstance(request.labels, list) else 1)
    if not 1 <= count <= settings.max_count:
        raise Invalid(f"count: {count} images; one request may ask for 1 to {settings.max_count}.")
    if request.first_index + count > SEED_LIMIT:
        raise Invalid("first_index: the last image's index would be over 2^53 − 1.")
    asked = request.format, request.layout, request.columns, request.scale
    render = _render_options(*asked, accept, count, image.shape, settings.max_output_pixels)
    return SamplePlan(
        count=count,
        seed=secrets.randbelow(SEED_LIMIT) if request.seed is None else request.seed,
        first_index=request.first_index,
        labels=resolve_labels(request.labels, names, count),
        truncation=request.truncation,
        render=render,
    )


@lru_cache(maxsize=256)  # few clients think of an Accept of their own
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
    """How so many images of this shape (channels, height, width) become bytes.

    Raises:
        Invalid, NotAcceptable: It can't be done.
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
        pixels = count * shape[1] * shape[2] * render.scale**2
    elif max(height, width) > side:
        raise Invalid(
            f"format: {render.format} holds up to {side} pixels a side; this picture would be {width}×{height}."
        )
    else:
        pixels = height * width
    if pixels > max_pixels:
        raise Invalid(f"count, scale: the reply would have {pixels} pixels; the most is {max_pixels}.")


def fingerprint(plan: SamplePlan) -> str:
    """All of a plan as text: equal for equal plans, in every process."""
    drawn = f"{plan.count} {plan.seed} {plan.first_index} {plan.labels} {plan.truncation}"
    return f"{drawn} {plan.render.format} {plan.render.columns} {plan.render.scale}"
