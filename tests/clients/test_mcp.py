"""The official MCP SDK's own client draws and judges by `gan-client mcp`: run by `make test-clients`."""

import asyncio
import base64
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from mcp import Client, StdioServerParameters
from PIL import Image

PNG = "image/png"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder whose images may be judged, beside a file that may not."""
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def server(*flags: str, key: str | None = None) -> StdioServerParameters:
    """How a host starts the server."""
    environment = {"GAN_CLIENT_URL": os.environ["SERVICE_URL"], "GAN_CLIENT_KEY": key or os.environ["SERVICE_KEY"]}
    return StdioServerParameters(
        command=sys.executable, args=["-m", "gan_client", "mcp", "--retries", "0", *flags], env=environment
    )


def call(started: StdioServerParameters, *calls: tuple[str, dict[str, Any]]) -> list[Any]:
    """The results of a few calls in one session over stdio."""

    async def run() -> list[Any]:
        async with Client(started) as client:
            return [await client.call_tool(name, arguments) for name, arguments in calls]

    return asyncio.run(run())


def test_there_are_two_tools_with_words_for_every_argument() -> None:
    """A model has nothing else to go by."""

    async def ask() -> Any:
        async with Client(server()) as client:
            return (await client.list_tools()).tools

    tools = {tool.name: tool for tool in asyncio.run(ask())}
    assert set(tools) == {"draw_images", "judge_image"}
    for tool in tools.values():
        assert tool.description
        assert all(field.get("description") for field in tool.input_schema["properties"].values())


def test_images_are_drawn_and_can_be_drawn_again() -> None:
    """As image contents that a model can see, after a line with what they were made from."""
    arguments = {"count": 2, "seed": 7, "label": "3", "truncation": 0.8}
    first, again, other = call(server(), *[("draw_images", arguments)] * 2, ("draw_images", {}))
    said, *images = first.content
    assert not first.is_error
    told = json.loads(said.text)
    assert told["bundle"].startswith("mnist@")
    assert (told["seed"], told["count"], told["label"]) == (7, 2, "3")
    assert [image.mime_type for image in images] == [PNG, PNG]
    picture = Image.open(io.BytesIO(base64.b64decode(images[0].data)))
    assert picture.size == (252, 252)
    assert [image.data for image in again.content[1:]] == [image.data for image in images]
    assert isinstance(json.loads(other.content[0].text)["seed"], int)


def test_an_image_is_judged_by_content_or_path(folder: Path) -> None:
    """What was drawn is recognised, and a blank one has its hint."""
    (drawn,) = call(server(), ("draw_images", {"seed": 7, "label": "3"}))
    content = drawn.content[1].data
    (folder / "three.png").write_bytes(base64.b64decode(content))
    Image.new("L", (28, 28)).save(folder / "blank.png")
    by_content, by_path, blank = call(
        server("--images", str(folder)),
        ("judge_image", {"image_base64": content}),
        ("judge_image", {"path": "three.png"}),
        ("judge_image", {"path": "blank.png"}),
    )
    verdict = by_content.structured_content
    assert 0 < verdict["probability_real"] < 1
    assert verdict["label"] == "3"
    assert by_path.structured_content == verdict
    assert "blank" in blank.structured_content["hint"]


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("draw_images", {"label": "none"}, "label"),
    ("draw_images", {"bundle": "none"}, "none"),
    ("draw_images", {"count": 17}, "16"),
    ("judge_image", {}, "image_base64"),
    ("judge_image", {"image_base64": "%"}, "base64"),
    ("judge_image", {"image_base64": "AAAA"}, "image"),
    ("judge_image", {"path": "../secret.png"}, "no file"),
    ("judge_image", {"path": "/etc/passwd"}, "no file"),
    ("judge_image", {"path": "link.png"}, "no file"),
    ("judge_image", {"path": "missing.png"}, "no file"),
    ("judge_image", {"path": ""}, "no file"),
]


def test_mistakes_are_told_to_the_model(folder: Path) -> None:
    """In words, as a result that is an error: no other file of this machine is read."""
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    results = call(server("--images", str(folder)), *[(tool, arguments) for tool, arguments, _ in MISTAKES])
    for result, (_, arguments, said) in zip(results, MISTAKES, strict=True):
        assert result.is_error, arguments
        assert said in result.content[0].text, arguments


def test_without_a_folder_no_file_is_read(folder: Path) -> None:
    """Unless a person says which."""
    (result,) = call(server(), ("judge_image", {"path": str(folder / "blank.png")}))
    assert result.is_error
    assert "--images" in result.content[0].text


def test_a_wrong_key_is_told_to_the_model() -> None:
    """The server lives on, for its host knows best when to end it."""
    first, second = call(server(key="wrong"), ("draw_images", {}), ("draw_images", {}))
    assert first.is_error
    assert second.is_error
    assert "key" in first.content[0].text
