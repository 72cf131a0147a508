"""The schemas of OpenAI's image API: of its fields those that matter here. All others are ignored."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, WithJsonSchema

from service.http.schemas import BundleName, Index, Positive, Reply, Schema

PictureFormat = Literal["png", "jpeg", "webp"]
AUTO: Literal["auto"] = "auto"
MAX_PROMPT = 32_000  # characters, as that API documents
_SIZE = "(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})"


def _check_size(size: str) -> str:
    if not re.fullmatch(_SIZE, size):
        raise ValueError("must be auto, or width x height in pixels, such as 512x512")
    return size


def _check_false(value: object) -> object:
    if value is not False:  # 0 would do as well
        raise ValueError("must be false: there are no partial images here")
    return value


Size = Annotated[str, AfterValidator(_check_size), WithJsonSchema({"type": "string", "pattern": f"^{_SIZE}$"})]


class ImagesRequest(Schema):
    """Draw images of what a prompt names. Fields that are not listed here are ignored."""

    model_config = ConfigDict(extra="ignore")

    prompt: str = Field(
        max_length=MAX_PROMPT,
        description="Free text. The first class of the bundle that it names is drawn, in any case and as a word; of "
        "names that begin at the same word the longest. If it names none, classes are drawn at random.",
        examples=["a handwritten 3"],
    )
    model: BundleName | None = Field(
        None, description="A bundle: name, or name@version. Default: the service's default."
    )
    n: Positive = Field(1, description="Images to draw, up to GAN_MAX_COUNT.", examples=[2])
    size: Size = Field(
        AUTO,
        description="Width x height of each picture. The image is enlarged by the largest whole factor that fits, and "
        "lies in the middle of the bundle's background. Default: the image's own size.",
        examples=["512x512"],
    )
    output_format: PictureFormat = Field("png", description="Of the files.")
    seed: Index | None = Field(
        None, description="Not a field of that API: fixes the images. Default: a new one, which X-Seed names."
    )
    response_format: Literal["b64_json"] = Field("b64_json", description="There are no URLs of images here.")
    background: Literal["auto", "opaque"] = Field(AUTO, description="No picture here is transparent.")
    stream: Annotated[Literal[False], BeforeValidator(_check_false)] = Field(
        default=False, description="There are no partial images here."
    )


class ImageFile(Reply):
    """One picture."""

    b64_json: str = Field(description="The file in base64.")


class ImagesReply(Reply):
    """The pictures, in the order of their indices within the seed."""

    created: int = Field(description="When they were drawn, in seconds since 1970.")
    data: list[ImageFile]
    output_format: PictureFormat
    size: str = Field(description="Of each, width x height in pixels.")
    background: Literal["opaque"] = "opaque"


class ModelEntry(Reply):
    """A bundle, as that API describes a model."""

    id: str = Field(description="Its name.")
    object: Literal["model"] = "model"
    created: int = Field(description="In seconds since 1970.")
    owned_by: Literal["gan-service"] = "gan-service"


class ModelList(Reply):
    """The bundles that `model` can name."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]
