"""A label means one thing: by index or by name, in a query and in JSON, for drawing and for judging."""

import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from models.bundle import Bundle
from models.spec import ImageSpec
from service.app import create_app
from service.settings import Settings

pytestmark = pytest.mark.anyio

IMAGE = ImageSpec(channels=1, height=8, width=8)
# Digits in the order of text; in the order of a camera's numbers; and names that look like something else.
NAMES = {
    "digits": ("0", "1", "10", "2"),
    "numbers": ("07", "1234567890123", "5", "3"),
    "odd": (
        "a,b",
        " c d ",
        "é\u4e00\U0001f98a",
        '["0"]',
        '"1"',
        "null",
        "true",
        "-1",
        "1.5",
        "[",
        "&labels=1",
        "+",
        "%2C",
    ),
}

Problem = Callable[[httpx.Response, int, str], str]


@pytest.fixture(scope="module")
async def client(
    make_tiny: Callable[..., Bundle],
    start: Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]],
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application on bundles with these classes."""
    folder = tmp_path_factory.mktemp("labelled")
    for name, labels in NAMES.items():
        make_tiny(folder / name, IMAGE, labels, None)
    make_tiny(folder / "plain", IMAGE, None, None)
    settings = Settings.model_validate({"bundles": folder, "device": "cpu"})
    async with start(create_app(settings)) as one:
        yield one


async def labels_of(client: httpx.AsyncClient, **query: Any) -> Any:
    """The classes that GET /sample draws for this query."""
    reply = await client.get("/sample", params=query | {"format": "json", "seed": 1})
    assert reply.status_code == 200, reply.text
    return reply.json()["labels"]


@pytest.mark.parametrize(
    ("bundle", "labels", "drawn"),
    [
        ("digits", "3", [3]),  # no class is called so
        ("digits", "0", [0]),
        ("digits", "1,0,3", [1, 0, 3]),
        ("digits", '"2"', [3]),
        ("digits", '["2"]', [3]),
        ("digits", "[2]", [2]),
        ("digits", '["10",2, "2"]', [2, 2, 3]),
        ("digits", '[ "10" ]', [2]),
        ("numbers", "0", [0]),
        ("numbers", '["5", 3, "07"]', [2, 3, 0]),
        ("numbers", "003", [3]),
        ("odd", "+", [11]),
        ("odd", " c d ,null", [1, 5]),
        ("odd", "true,-1,1.5", [6, 7, 8]),
        ("odd", '["a,b","[\\"0\\"]","\\"1\\"","["]', [0, 3, 4, 9]),
        ("odd", '"\\u00e9\u4e00\U0001f98a"', [2]),
    ],
)
async def test_labels_in_a_query(client: httpx.AsyncClient, bundle: str, labels: str, drawn: list[int]) -> None:
    """Digits are an index and other text a name; what begins as JSON means what it means in POST."""
    assert await labels_of(client, bundle=bundle, labels=labels) == drawn
    if labels[0] in '["':
        body = {"bundle": bundle, "labels": json.loads(labels), "format": "json"}
        assert (await client.post("/sample", json=body)).json()["labels"] == drawn


@pytest.mark.parametrize(
    ("bundle", "labels", "says"),
    [
        ("digits", "2", "that of '10', and also the name of another class; write labels=[2] for the index"),
        ("digits", "3,2", 'labels=["2"] for the name (in curl with -g).'),
        ("digits", "10", 'there is none so high; write labels=["10"] for the name'),
        ("digits", "4", "'4' is not one of 0 (0), 1 (1), 2 (10), 3 (2)"),
        ("digits", "9" * 5000, "is not one of"),
        ("numbers", "07", 'write labels=["07"] for the name'),
        ("numbers", "5", 'write labels=["5"]'),
        ("numbers", "1234567890123", 'write labels=["1234567890123"]'),
        ("odd", "a,b", "'a' is not one of"),
        *(
            ("odd", wrong, "begins as JSON")
            for wrong in ('["0"', '"', '"1', "[", "[]", "[null]", "[1.5]", "[true]", "[[1]]", '[{"a":1}]', "[-1]",
                          '[""]', '"a"b', "[1]]", "[" * 9000, "[" + "9" * 9000 + "]")
        ),
    ],
)  # fmt: skip
async def test_what_could_mean_two_things_is_refused(
    client: httpx.AsyncClient, problem: Problem, bundle: str, labels: str, says: str
) -> None:
    """The error says how to write the index and how the name; drawing and judging agree."""
    query = {"bundle": bundle, "labels": labels}
    count = 1 if labels[0] in '["' else labels.count(",") + 1
    for reply in (await client.get("/sample", params=query), await judge(client, count, query)):
        assert says in problem(reply, 422, "invalid")


async def judge(client: httpx.AsyncClient, count: int, query: dict[str, str]) -> httpx.Response:
    headers = {"Content-Type": "application/x-npy"}
    return await client.post("/discriminate", params=query, content=npy(count), headers=headers)


def npy(count: int) -> bytes:
    np.save(file := io.BytesIO(), np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8))
    return file.getvalue()


@pytest.mark.parametrize("bundle", NAMES)
async def test_what_one_route_answers_the_other_takes(client: httpx.AsyncClient, bundle: str) -> None:
    """Labels and their names of drawn images go into judging, and the labels that judging names into drawing."""
    drawn = (await client.get(f"/sample?bundle={bundle}&count=40&seed=3&format=json")).json()
    assert drawn["label_names"] == [NAMES[bundle][label] for label in drawn["labels"]]
    asked = {"bundle": bundle, "images": drawn["images"]}
    by_number, by_name = [
        (await client.post("/discriminate", json=asked | {"labels": drawn[field]})).json()["results"]
        for field in ("labels", "label_names")
    ]
    assert by_number == by_name
    assert not any("error" in result for result in by_number)

    judged = (await client.post("/discriminate", json=asked)).json()["results"]
    found = [result["label"] for result in judged]
    again: dict[str, Any] = {"bundle": bundle, "seed": 3, "labels": found, "format": "json"}
    by_body = (await client.post("/sample", json=again)).json()
    assert by_body["label_names"] == found
    by_query = await client.get("/sample", params=again | {"labels": json.dumps(found)})
    assert by_query.json() == by_body


async def test_a_bundle_without_classes_names_none(client: httpx.AsyncClient) -> None:
    """Both fields are there and null, and may be sent back so."""
    drawn = (await client.get("/sample?bundle=plain&format=json")).json()
    assert (drawn["labels"], drawn["label_names"]) == (None, None)
    asked = {"bundle": "plain", "images": drawn["images"], "labels": drawn["label_names"]}
    assert (await client.post("/discriminate", json=asked)).status_code == 200
