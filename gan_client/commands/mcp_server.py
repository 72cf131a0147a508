"""gan-client mcp: gives the service to language models, as an MCP server with two tools on stdin and stdout."""

import argparse
import base64
import binascii
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from PIL import Image

from gan_client.async_client import AsyncClient
from gan_client.core.images import png_file
from gan_client.errors import GanServiceError

if TYPE_CHECKING:
    from mcp.server import MCPServer

MAX_IMAGES = 16
SHOWN_PIXELS = 256  # models see little in an image of 28 pixels
MAX_IMAGE_BYTES = 2**23

INSTRUCTIONS = "Draws images from a small generative adversarial net, and asks its discriminator how real images look."


def add_to(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("--images", type=Path, metavar="DIR", help="a folder whose image files may be judged by path")


def run(arguments: argparse.Namespace, client: AsyncClient) -> int:
    """Serve until stdin ends."""
    try:
        server = build_server(client, arguments.images)
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is missing: pip install 'gan-client[mcp]'") from None
    server.run("stdio")
    return 0


def build_server(client: AsyncClient, folder: Path | None) -> "MCPServer[Any]":
    """The server with its two tools."""
    from mcp.server import MCPServer  # noqa: PLC0415 - an extra
    from mcp.server.mcpserver import Image as Picture  # noqa: PLC0415
    from mcp.server.mcpserver.exceptions import ToolError  # noqa: PLC0415
    from pydantic import Field  # noqa: PLC0415

    async def draw_images(
        count: Annotated[int, Field(ge=1, le=MAX_IMAGES, description="How many.")] = 1,
        seed: Annotated[int | None, Field(ge=0, lt=2**53, description="Fixes the images. Default: a new one.")] = None,
        label: Annotated[int | str | None, Field(description="Class, by index or name. Default: any.")] = None,
        bundle: Annotated[str | None, Field(description="Name of the net. Default: the service's.")] = None,
        truncation: Annotated[float, Field(gt=0, le=1, description="Less is more typical and less varied.")] = 1.0,
    ) -> list[Any]:
        """Draw images. The reply says first with which seed and bundle they can be drawn again."""
        try:
            images = await client.sample(count, seed, label, bundle, truncation=truncation)
        except (GanServiceError, ValueError) as error:
            raise ToolError(str(error)) from None
        said = {name: images[0].info[name] for name in ("bundle", "seed")} | {"count": count, "label": label}
        return [json.dumps(said), *(Picture(data=png_file(enlarged(image)), format="png") for image in images)]

    async def judge_image(
        image_base64: Annotated[str | None, Field(description="A PNG, JPEG, WebP or BMP file in base64.")] = None,
        path: Annotated[str | None, Field(description="Or a file in the folder that was given to --images.")] = None,
        bundle: Annotated[str | None, Field(description="Whose discriminator judges. Default: the service's.")] = None,
    ) -> dict[str, Any]:
        """Ask how real an image looks: how probable it is that it is real, and the class that the net names."""
        try:
            content = read_image(image_base64, path, folder)
            (verdict,) = await client.discriminate(content, bundle=bundle)
        except (GanServiceError, ValueError, OSError) as error:
            raise ToolError(str(error)) from None
        if verdict.error:
            raise ToolError(verdict.error.detail)
        fields = {name: getattr(verdict, name) for name in ("probability_real", "logit", "label", "hint")}
        return {name: value for name, value in fields.items() if value is not None}

    server = MCPServer("gan-client", instructions=INSTRUCTIONS)
    server.add_tool(draw_images, structured_output=False)
    server.add_tool(judge_image)
    return server


def enlarged(image: Image.Image) -> Image.Image:
    """A small image with every pixel repeated."""
    factor = max(1, SHOWN_PIXELS // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def read_image(image_base64: str | None, path: str | None, folder: Path | None) -> bytes:
    """A file's content, from its base64 or from the folder. A model is not to send any other file of this machine.

    Raises:
        ValueError: Neither, or both, or a file elsewhere, or too large a one.
        OSError: The file can't be read.
    """
    if (image_base64 is None) == (path is None):
        raise ValueError("give image_base64, or path")
    if image_base64 is not None:
        return _decoded(image_base64)
    if folder is None:
        raise ValueError("this server was started without --images DIR, so it reads no files")
    found = (folder / str(path)).resolve()
    if not found.is_relative_to(folder.resolve()) or not found.is_file():
        raise ValueError(f"there is no file {path} in the folder of images")
    with found.open("rb") as file:
        return _bounded(file.read(MAX_IMAGE_BYTES + 1))


def _decoded(text: str) -> bytes:
    if len(text) > 2 * MAX_IMAGE_BYTES:
        raise ValueError("the image is too large")
    try:
        return _bounded(base64.b64decode(text.rpartition("base64,")[2], validate=True))
    except binascii.Error:
        raise ValueError("image_base64 is not base64") from None


def _bounded(content: bytes) -> bytes:
    if len(content) > MAX_IMAGE_BYTES:
        raise ValueError(f"the image has over {MAX_IMAGE_BYTES} bytes")
    return content
