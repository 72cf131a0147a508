"""The schemas of requests and replies.

A request's schema checks what can be checked without a bundle; images/resolving.py checks the rest. Both happen before
anything is queued.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    InstanceOf,
    JsonValue,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import CoreSchema

from models.images.preparation import Preparation
from models.inference.noise import PathMethod
from models.spec import Calibration, ImageSpec, LatentSpec
from service.codecs.animation import SequenceFormat
from service.codecs.encode import Format
from service.codecs.recipe import Recipe
from service.http.openapi.examples import PIXEL
from service.http.problems import Problem

# JavaScript's numbers are exact only up to this, and our page sends the seed back.
SEED_LIMIT = 2**53


def _integral(value: object) -> object:
    """3 for 3.0: JSON has one kind of number, and some clients write whole ones with a point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _explain_labels(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    with suppress(ValidationError):
        return handler(value)
    try:
        return handler([_integral(one) for one in value] if isinstance(value, list) else _integral(value))
    except ValidationError:
        raise ValueError("must be an index, a name, or a list of one or more of these") from None


def _digits(value: object) -> object:
    """Refuse texts such as 1_0, +1 and " 1", which Python would accept as integers."""
    if isinstance(value, str) and not re.fullmatch("-?[0-9]{1,64}", value):
        raise ValueError("Input should be a whole number, in digits")
    return _integral(value)


def _decimal(value: object) -> object:
    """Refuse texts that Python would accept as floats but JSON would not."""
    if isinstance(value, str) and not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?", value):
        raise ValueError("Input should be a number, such as 0.7 or 7e-1")
    return value


def _flag(value: object) -> object:
    """Refuse texts such as yes and 1, which pydantic would accept as booleans."""
    if isinstance(value, str) and value not in {"true", "false"}:
        raise ValueError("Input should be true or false")
    return value


def _explain_latents(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    try:
        return handler(value)
    except ValidationError:
        raise ValueError("must be rows of numbers, a row for each image, or true for those that are drawn") from None


Flag = Annotated[bool, BeforeValidator(_flag)]
Whole = Annotated[int, BeforeValidator(_digits)]
Real = Annotated[float, BeforeValidator(_decimal)]
# The bounds belong to `int`, not to `int | None`: there pydantic checks them but leaves them out of the JSON schema.
Positive = Annotated[int, Field(ge=1), BeforeValidator(_digits)]
Index = Annotated[int, Field(ge=0, lt=SEED_LIMIT), BeforeValidator(_digits)]
Milliseconds = Annotated[int, Field(ge=40, le=600_000), BeforeValidator(_digits)]
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
        """Adds null to the schema of every optional field; leaves out defaults that generators of clients refuse."""
        whole = handler.resolve_ref_schema(handler(schema))
        for name, field in whole.get("properties", {}).items():
            if isinstance(field.get("default"), dict):
                del field["default"]
            if name not in whole.get("required", ()) and _NULL not in field.get("anyOf", ()):
                about = {key: field.pop(key) for key in ("title", "description", "default", "examples") if key in field}
                whole["properties"][name] = {"anyOf": [*field.get("anyOf", [field]), _NULL], **about}
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
    select: Literal["none", "discriminator"] = Field(
        "none",
        description="`discriminator`: of up to 64 candidates for each image, the first that the bundle's calibrated "
        "discriminator lets pass; `X-Acceptance-Rate` says how many do.",
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
    latents: Flag = Field(
        default=False,
        description="true: a JSON reply has the latents that were drawn, before truncation. "
        "Sent back by POST they give the same images.",
    )
    recipe: Flag | None = Field(
        None,
        description="true: each picture carries the recipe that made it, for /verify, and says that it was generated; "
        "false: not. Default: as GAN_RECIPE says, which is not.",
    )


# Validation stops at the first mistake, as for labels.
_Row = Annotated[list[float], Field(min_length=1, fail_fast=True)]
_Rows = Annotated[list[_Row], Field(min_length=1, fail_fast=True)]


class SampleBody(SampleRequest):
    """Draw images of a seed, or of `latents`."""

    # More than a query can have.
    latents: Annotated[bool | _Rows, WrapValidator(_explain_latents)] = Field(  # type: ignore[assignment]
        default=False,
        description="Latents to draw from in place of `seed` and `first_index`: a row for each image, of as many "
        "numbers as the bundle's latent has. A bundle with classes then needs `labels`. "
        "Or true: a JSON reply has the latents that were drawn, before truncation.",
    )


class InterpolateRequest(Schema):
    """Go from one image to another, through the latents between theirs."""

    seed_from: Index = Field(description="Seed of the first image.", examples=[7])
    seed_to: Index = Field(description="Seed of the last image.", examples=[8])
    index_from: Index = Field(0, description="Index of the first image within its seed.")
    index_to: Index = Field(0, description="Index of the last image within its seed.")
    steps: Whole = Field(16, ge=2, le=256, description="Images, both ends included.")
    method: PathMethod = Field(
        "linear",
        description="`linear` goes straight; `spherical` keeps the latents' length, as normal noise has it.",
    )
    label: Labels = Field(
        None,
        description="For a class-conditional bundle: class by index or name, as in /sample. "
        "Default: the one that the seed draws for the first image.",
    )
    label_to: Labels = Field(
        None,
        description="Class of the images that are nearer to the last one. Default: the same as of the others.",
    )
    truncation: Real = Field(1.0, gt=0, le=1, description="Factor on the latents, as in /sample.")
    scale: Whole = Field(1, ge=1, le=16, description="Repeat every pixel this many times in both directions.")
    duration_ms: Milliseconds | None = Field(
        None,
        description="Of the whole animation in milliseconds, at least 20 for each image. "
        "Default: 2000, or more where the images need it.",
    )
    bundle: BundleName | None = Field(None, description="name, or name@version. Default: the service's default.")
    format: SequenceFormat | None = Field(
        None,
        description="png is a strip, the others are animations. Overrides the Accept header. "
        "Default: by Accept, else png.",
    )


class DiscriminateQuery(Schema):
    """Options beside the images: in the query for files, forms and arrays, in the body for JSON."""

    bundle: BundleName | None = Field(None, description="name, or name@version. Default: the service's default.")
    labels: Labels = Field(
        None,
        description="For a class-conditional bundle: class by index or name, one for all images or one per image. "
        "Default: the class that its class head predicts for each image.",
    )


class DiscriminateRequest(DiscriminateQuery):
    """Images to score, as JSON."""

    images: list[str] = Field(
        min_length=1,
        fail_fast=True,
        description="Image files (png, jpeg, webp or bmp) in base64.",
        examples=[[PIXEL]],
    )


class VerifyRequest(Schema):
    """Pictures to verify, as JSON."""

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
    seed: int | None = Field(description="null for images of given latents, as is first_index.")
    first_index: int | None
    labels: list[int] | None = Field(
        description="The class of each image, drawn or given; null for a bundle without classes."
    )
    label_names: list[str] | None = Field(
        description="The name of each image's class, as `labels` of another request takes it; null as above."
    )
    images: list[str] = Field(description="PNG files in base64.")
    latents: list[list[float]] | None = Field(
        None, description="Only where the request has latents=true: a row for each image, before truncation."
    )


Verdict = Literal["identical", "within_one_level", "different", "no_recipe", "unknown_bundle"]


class VerifyResult(Reply):
    """What became of one picture's recipe, or the error of a picture that could not be decoded."""

    verdict: Verdict | None = Field(
        None,
        description="`identical`: the recipe gives these pixels; `within_one_level`: it does but for a grey level, as "
        "on another kind of device or in another release; `different`: it gives others, or a picture of another size; "
        "`no_recipe`: there is none, or none of ours; `unknown_bundle`: the bundle that it names is not loaded here.",
    )
    recipe: Recipe | None = Field(None, description="The picture's recipe; left out where there is none.")
    error: Problem | None = Field(
        None, description="Why the picture could not be decoded; the other fields are then left out."
    )


class VerifyReply(Reply):
    """One result for each picture, in the order of the request."""

    results: list[VerifyResult]


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


class EncodeResult(Reply):
    """Where one image lies in the generator's latent space."""

    latent: list[float] | None = Field(
        None, description="Where the image lies. By POST /sample, as one of `latents`, it gives `image` again."
    )
    error: float | Problem | None = Field(
        None,
        description="Mean squared difference of the image's and `image`'s pixels, in [0, 1]; or why the image could "
        "not be decoded: the other fields are then left out.",
    )
    label: str | None = Field(
        None, description="The class that the encoder finds, if the bundle has classes and none was given."
    )
    image: str | None = Field(None, description="What the generator makes of the latent, as a PNG in base64.")


class EncodeReply(Reply):
    """One result for each image, in the order of the request."""

    bundle: str
    version: str
    results: list[EncodeResult]


class BundleVersion(Reply):
    """A version of a bundle, which `name@version` asks for."""

    version: str
    created: AwareDatetime


class BundleMetadata(Reply):
    """A version of a bundle, and the metadata of its manifest. `versions` are all of them, the newest first."""

    name: str
    version: str
    versions: list[BundleVersion]
    created: AwareDatetime
    image: ImageSpec
    latent: LatentSpec
    labels: tuple[str, ...] | None
    calibration: Calibration | None
    preparation: Preparation
    training: dict[str, JsonValue]
    evaluation: dict[str, JsonValue]
    networks: list[str] = Field(
        description="What it can do: `generator` draws, `discriminator` judges, `encoder` finds an image's latent."
    )


class BundleList(Reply):
    """Every bundle, in the version that its name means. `default` is the bundle for requests that name none."""

    default: str | None
    bundles: list[BundleMetadata]
    aliases: dict[str, str] = Field(description="The versions that aliases mean, by `name` or `name@alias`.")
