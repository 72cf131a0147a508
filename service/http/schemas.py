"""The schemas of requests and replies, and how a request is resolved for a bundle.

A schema checks what can be checked without a bundle. The `resolve_…` functions check the rest, against a bundle and the
settings. Both happen before anything is queued.
"""

import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar
from urllib.parse import parse_qsl

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    InstanceOf,
    JsonValue,
    RootModel,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import CoreSchema, ErrorDetails, to_json

from models.images.preparation import Preparation
from models.spec import Calibration, ImageSpec, LatentSpec
from service.codecs.encode import MAX_SIDE, MEDIA_TYPES, Format, RenderOptions, picture_size
from service.codecs.time_slices import Steps, run_steps
from service.errors import Invalid, Malformed, NotAcceptable, did_you_mean
from service.http.json_limits import JsonLimits, check_json
from service.http.problems import Problem
from service.settings import Settings

# JavaScript's numbers are exact only up to this, and our page sends the seed back.
SEED_LIMIT = 2**53
MAX_QUERY_FIELDS = 32
MAX_INDEX_DIGITS = 9
_ALIASES = {"image/jpg": "image/jpeg"}  # in Accept
MAX_REASONS = 8  # in one error
_REPEATED = {"labels": "; join several by commas, as in labels=3,1"}
_REASONS = {  # in place of pydantic's words for these mistakes
    "string_pattern_mismatch": "must be a bundle's name, or name@version",  # of `BundleName`, the only pattern
    "too_short": "must hold at least one",
}


def _explain_labels(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    try:
        return handler(value)
    except ValidationError:
        raise ValueError("must be an index, a name, or a list of one or more of these") from None


def _digits(value: object) -> object:
    """Refuse texts such as 1_0, +1 and " 1", which Python would accept as integers."""
    if isinstance(value, str) and not re.fullmatch("-?[0-9]{1,64}", value):
        raise ValueError("Input should be a whole number, in digits")
    return value


def _decimal(value: object) -> object:
    """Refuse texts that Python would accept as floats but JSON would not."""
    if isinstance(value, str) and not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?", value):
        raise ValueError("Input should be a number, such as 0.7 or 7e-1")
    return value


Whole = Annotated[int, BeforeValidator(_digits)]
Real = Annotated[float, BeforeValidator(_decimal)]
# The bounds belong to `int`, not to `int | None`: there pydantic checks them but leaves them out of the JSON schema.
Positive = Annotated[int, Field(ge=1), BeforeValidator(_digits)]
Index = Annotated[int, Field(ge=0, lt=SEED_LIMIT), BeforeValidator(_digits)]
# "name@" is refused: it looks pinned to a version but is not.
BundleName = Annotated[str, Field(pattern=r"^[^@]+(@[^@]+)?$", max_length=200)]


@dataclass(slots=True)
class QueryDigits:
    """Digits among the labels of a query: an index, unless they are also the name of another class."""

    text: str


# An index or a name. In JSON the type says which; JSON never gives QueryDigits.
Label = SkipJsonSchema[InstanceOf[QueryDigits]] | Annotated[int, Field(ge=0)] | Annotated[str, Field(min_length=1)]
# Validation stops at a list's first mistake. Otherwise a body could make pydantic collect an error for each element.
Labels = Annotated[
    Label | Annotated[list[Label], Field(min_length=1, fail_fast=True)] | None, WrapValidator(_explain_labels)
]
_LABELS: TypeAdapter[Labels] = TypeAdapter(Labels)
_LABELS_LIMITS = JsonLimits(values=2**16, keys=0, containers=1, depth=1)


_NULL = {"type": "null"}


class Schema(BaseModel):
    """Base of request schemas: unknown fields are refused, and null counts as left out."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, given: Any) -> Any:
        if given is None:  # a body that is null
            return {}
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or name not in cls.model_fields}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Adds null to the schema of every optional field."""
        whole = handler.resolve_ref_schema(handler(schema))
        for name, field in whole.get("properties", {}).items():
            if name not in whole.get("required", ()) and _NULL not in field.get("anyOf", ()):
                about = {key: field.pop(key) for key in ("title", "description", "default", "examples") if key in field}
                whole["properties"][name] = {"anyOf": [field, _NULL], **about}
        return whole


class SampleRequest(Schema):
    """Draw `count` images. A seed fixes them, whatever batches they are computed in."""

    count: Positive | None = Field(
        None,
        description="Images to draw, up to GAN_MAX_COUNT. Default: as many as labels, else 1.",
        examples=[64],
    )
    seed: Index | None = Field(None, description="Leave out for a new one; the reply names it.", examples=[7])
    first_index: Index = Field(
        0, description="Index, within the seed, of the first image, so that any range can be drawn by itself."
    )
    labels: Labels = Field(
        None,
        description="Class by index (a number) or name (a string), one for all images or one per image. In a query "
        'joined by commas, digits being an index, or as JSON: `["3","a,b"]`. '
        "Default: drawn from the seed at the training data's frequencies.",
    )
    truncation: Real = Field(
        1.0, gt=0, le=1, description="Factor on the latent. Smaller gives more typical and less varied images."
    )
    bundle: BundleName | None = Field(None, description="name, or name@version. Default: the service's default.")
    format: Format | None = Field(None, description="Overrides the Accept header. Default: by Accept, else png.")
    layout: Literal["grid", "strip"] | None = Field(
        None,
        description="Arrangement of several images in one picture (png, webp, jpeg): a grid, the default, or one row.",
    )
    columns: Positive | None = Field(
        None,
        description="Images in each row of a grid; not for a strip. Default: as many as make it about square.",
    )
    scale: Whole = Field(1, ge=1, le=16, description="Repeat every pixel this many times in both directions.")


class DiscriminateQuery(Schema):
    """Options beside the images: in the query for files, forms and arrays, in the body for JSON."""

    bundle: BundleName | None = Field(None, description="name, or name@version. Default: the service's default.")
    labels: Labels = Field(
        None,
        description="For a class-conditional bundle: class by index or name, one for all images or one per image. "
        "Default: the class that its class head predicts for each image.",
    )


# A black pixel, as a PNG in base64.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="


class DiscriminateRequest(DiscriminateQuery):
    """Images to score, as JSON."""

    images: list[str] = Field(
        min_length=1,
        fail_fast=True,
        description="Image files (png, jpeg, webp or bmp) in base64.",
        examples=[[PIXEL]],
    )


class Reply(BaseModel):
    """Base of reply schemas."""

    model_config = ConfigDict(frozen=True)


class SampleReply(Reply):
    """Images as JSON."""

    # Written by `service.codecs.encode`.
    bundle: str
    version: str
    seed: int
    first_index: int
    labels: list[int] | None = Field(
        description="The class of each image, drawn or given; null for a bundle without classes."
    )
    label_names: list[str] | None = Field(
        description="The name of each image's class, as `labels` of another request takes it; null as above."
    )
    images: list[str] = Field(description="PNG files in base64.")


class DiscriminateResult(Reply):
    """The discriminator's output for one image, or the error of an image that could not be decoded."""

    probability_real: float | None = Field(
        None,
        description="σ(scale·logit + offset) with the bundle's calibration, if as many images are real as generated.",
    )
    logit: float | None = Field(None, description="The discriminator's raw output.")
    label: str | None = Field(
        None, description="The class that the bundle's class head predicts, if it has classes and none was given."
    )
    calibrated: Literal[False] | None = Field(
        None, description="false if the bundle has no calibration: probability_real is then σ(logit)."
    )
    converted: Literal[True] | None = Field(
        None, description="true if the image was converted from another size or colour mode to the bundle's."
    )
    hint: str | None = Field(
        None,
        description="In words, why the image can't be what was meant: it is blank, or it is dark on light where the "
        "bundle's images are light on dark, or the other way round.",
    )
    error: Problem | None = Field(
        None, description="Why the image could not be decoded; the other fields are then left out."
    )


class DiscriminateReply(Reply):
    """One result for each image, in the order of the request."""

    bundle: str
    version: str
    results: list[DiscriminateResult]


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


class BundleMetadata(Reply):
    """A loaded bundle: its version and the metadata of its manifest."""

    name: str
    version: str
    created: AwareDatetime
    image: ImageSpec
    latent: LatentSpec
    labels: tuple[str, ...] | None
    calibration: Calibration | None
    preparation: Preparation
    training: dict[str, JsonValue]
    evaluation: dict[str, JsonValue]


class BundleList(Reply):
    """The loaded bundles. `default` is the bundle for requests that name none."""

    default: str | None
    bundles: list[BundleMetadata]


class RepositoryQuery(Schema):
    """Which bundles of the repository to list."""

    ready: bool = Field(default=False, description="List only bundles that are loaded.")


class RepositoryLoad(Schema):
    """A load request. It has no parameters: the bundle's manifest says all that is needed."""

    parameters: Schema = Field(default=Schema(), description="None.")


class UnloadParameters(Schema):
    """Parameters that the protocol's clients send."""

    unload_dependents: bool = Field(default=False, description="Ignored: no bundle depends on another.")


class RepositoryUnload(Schema):
    """An unload request; its parameters are ignored."""

    parameters: UnloadParameters = Field(default=UnloadParameters(), description="Accepted for the protocol's clients.")


class RepositoryEntry(Reply):
    """A bundle of the repository. If it is not loaded, `name` is its folder's and `version` is empty."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str = Field(description="Why it is unavailable.")


class RepositoryIndex(RootModel[list[RepositoryEntry]]):
    """Every bundle that is loaded or has a folder."""


SchemaT = TypeVar("SchemaT", bound=Schema)


def parse_body(schema: type[SchemaT], body: bytes, limits: JsonLimits) -> Steps[SchemaT]:
    """Parse a JSON body without converting types; an empty body counts as an empty object.

    Raises:
        Malformed: Not JSON.
        Invalid: Over the limits, or does not match the schema.
    """
    yield from check_json(body, limits)
    try:
        return schema.model_validate_json(body or b"{}", strict=True)
    except ValidationError as error:
        raise _refusal(error, schema) from None


def parse_query(schema: type[SchemaT], query: bytes, body: type[Schema] = Schema) -> SchemaT:
    """Parse a query string. Each field may be given once; lists are joined by commas.

    Args:
        schema: Of the query.
        query: As it was sent.
        body: Of the body: a field that belongs there is refused by saying so.

    Raises:
        Malformed: Not percent-encoded UTF-8, or more than `MAX_QUERY_FIELDS` fields.
        Invalid: A field is unknown, out of range or given twice.
    """
    try:
        pairs = parse_qsl(
            query.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_QUERY_FIELDS
        )
    except ValueError:
        raise Malformed(f"The query is not percent-encoded UTF-8 of at most {MAX_QUERY_FIELDS} fields.") from None
    known, fields = schema.model_fields, dict[str, Any]()
    for name, value in pairs:
        if name not in known and name in body.model_fields:
            raise Invalid(f"{name}: belongs in the JSON body, not in the query.")
        if name in fields and name in known:
            raise Invalid(f"{name}: given more than once{_REPEATED.get(name, '')}.")
        fields[name] = _query_labels(value) if name == "labels" else value
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error, schema) from None


def _query_labels(text: str) -> Labels:
    """Labels in a query: JSON if they begin as such, else joined by commas.

    Raises:
        Invalid: They begin as JSON but are none.
    """
    if not text.startswith(("[", '"')):
        return [QueryDigits(part) if part.isascii() and part.isdecimal() else part for part in text.split(",")]
    try:
        run_steps(check_json(text.encode(), _LABELS_LIMITS))
        return _LABELS.validate_json(text, strict=True)
    except (Invalid, ValidationError):
        raise Invalid(
            'labels: begins as JSON but is no index, name or list of these in JSON, such as labels=[3,1], labels="a" '
            'or labels=["3","a,b"].'
        ) from None


def _refusal(error: ValidationError, schema: type[Schema]) -> Malformed | Invalid:
    """The error for a client: one sentence for each wrong field, up to `MAX_REASONS`."""
    mistakes: dict[str, ErrorDetails] = {}
    for mistake in error.errors(include_url=False, include_context=False, include_input=False):
        if mistake["type"] == "json_invalid":
            return Malformed(f"The body is not JSON: {mistake['msg'].removeprefix('Invalid JSON: ')}.")
        mistakes.setdefault(".".join(str(part)[:100] for part in mistake["loc"]) or "body", mistake)
    shown = list(mistakes.items())[:MAX_REASONS]
    return Invalid(" ".join(f"{field}: {_reason(mistake, schema)}" for field, mistake in shown))


def _reason(mistake: ErrorDetails, schema: Any) -> str:
    """What is wrong with a field of this schema, or of one within it."""
    if mistake["type"] != "extra_forbidden":
        return _REASONS.get(mistake["type"], mistake["msg"].removeprefix("Value error, ")) + "."
    *outer, name = map(str, mistake["loc"])
    for field in outer:
        schema = schema.model_fields[field].annotation
    return f"unknown field{did_you_mean(name, schema.model_fields) or '.'}"


def choose_format(wanted: Format | None, accept: str | None) -> Format:
    """The format of a reply: the one requested by name, else the best that `Accept` allows (RFC 9110, 12.5.1).

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


def timeout_s(header: str | None, settings: Settings) -> float:
    """Seconds that a request may take: its X-Timeout-Ms, capped at GAN_MAX_DEADLINE_S, or else GAN_DEADLINE_S.

    Raises:
        Invalid: Not a whole number of milliseconds from 1.
    """
    if header is None:
        return settings.deadline_s
    if not re.fullmatch("[0-9]{1,9}", header.strip()) or int(header) == 0:
        raise Invalid(f"X-Timeout-Ms: {header[:100]!r} is not a whole number of milliseconds from 1 to 999999999.")
    return min(int(header) / 1000, settings.max_deadline_s)


def resolve_labels(labels: Labels, names: Sequence[str] | None, count: int) -> list[int] | None:
    """Class indices, one per image; None if no labels were given.

    Args:
        labels: As the client gave them: by index or name, one for all or one per image.
        names: The bundle's labels; None for a bundle without.
        count: Number of images.

    Raises:
        Invalid: The bundle has no labels, a label is unknown, or their number is neither 1 nor `count`.
    """
    if labels is None:
        return None
    if names is None:
        raise Invalid("labels: this bundle has no labels.")
    wanted = labels if isinstance(labels, list) else [labels]
    if len(wanted) not in {1, count}:
        raise Invalid(f"labels: {len(wanted)} labels for {count} images; give one for all or one per image.")
    places = {name: place for place, name in enumerate(names)}
    indices = [_index(label, names, places) for label in wanted]
    return indices * count if len(indices) == 1 else indices


def _index(label: Label, names: Sequence[str], places: Mapping[str, int]) -> int:
    if isinstance(label, QueryDigits):
        shown = label.text
        index = int(shown) if len(shown) <= MAX_INDEX_DIGITS else len(names)
        if places.get(shown, index) != index:
            raise Invalid(_ambiguous(shown, index, names))
    else:
        index, shown = (label, str(label)) if isinstance(label, int) else (places.get(label, len(names)), label)
    if 0 <= index < len(names):
        return index
    known = ", ".join(f"{index} ({name[:100]})" for index, name in enumerate(names[:20]))
    raise Invalid(f"labels: {shown[:100]!r} is not one of {known}{', …' if len(names) > 20 else ''}.")


def _ambiguous(digits: str, index: int, names: Sequence[str]) -> str:
    """Why digits in a query are refused, and how to write what was meant."""
    by_name = f'labels=["{digits}"] for the name (in curl with -g)'  # else curl takes brackets for a range
    if index >= len(names):
        return f"labels: in a query {digits} is an index, and there is none so high; write {by_name}."
    return (
        f"labels: in a query {digits} is an index, that of {names[index][:100]!r}, and also the name of another class; "
        f"write labels=[{index}] for the index, {by_name}."
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


def resolve_sample(
    request: SampleRequest, image: ImageSpec, names: Sequence[str] | None, accept: str | None, settings: Settings
) -> SamplePlan:
    """Resolve a request for a bundle with this image shape and these labels; fills in the defaults.

    Raises:
        Invalid: Over a limit, or labels that the bundle does not have.
        NotAcceptable: See `choose_format`.
    """
    count = request.count or (len(request.labels) if isinstance(request.labels, list) else 1)
    is_beyond = request.first_index + count > SEED_LIMIT
    if not 1 <= count <= settings.max_count:
        following = request.first_index + settings.max_count
        others = "" if is_beyond else f" Ask for the others with the same seed and first_index={following}."
        raise Invalid(f"count: {count} images; one request may ask for 1 to {settings.max_count}.{others}")
    if is_beyond:
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
    """A plan's fields as text, the same in every process. Part of the entity tag."""
    drawn = f"{plan.count} {plan.seed} {plan.first_index} {plan.labels} {plan.truncation}"
    return f"{drawn} {plan.render.format} {plan.render.columns} {plan.render.scale}"
