"""The OpenAPI document is true: what it allows is accepted, what it excludes is refused, and keys are as it says.

That no reply of a test has a status or a media type that is not in it is seen to by `start_app` in conftest.py.
"""

import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from service.app import SCOPES, create_app
from service.http.layers.auth import KeyScope
from service.http.openapi.examples import BODIES, PIXEL
from service.http.openapi.routes import SCHEMAS
from service.settings import Settings

pytestmark = pytest.mark.anyio

# The keywords of JSON Schema 2020-12 that are used here. Tools ignore others, such as `ge`.
KEYWORDS = {
    *("$ref", "type", "const", "enum", "anyOf", "properties", "required", "additionalProperties", "minProperties"),
    *("items", "prefixItems", "minItems", "maxItems", "minLength", "maxLength", "pattern", "format", "propertyNames"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "oneOf", "discriminator"),
    *("title", "description", "default", "examples"),
}
JSON = {"Content-Type": "application/json"}
TYPES = {"5": "string", 1.5: "number", True: "boolean"}


@pytest.fixture
def document(app: FastAPI) -> dict[str, Any]:
    """The application's document."""
    return app.openapi()


@pytest.fixture(scope="module")
async def keyed(
    tiny_settings: Callable[..., Settings], start: Callable[[FastAPI], AbstractAsyncContextManager[httpx.AsyncClient]]
) -> AsyncIterator[tuple[httpx.AsyncClient, dict[str, Any]]]:
    """A client of an application that has keys, and its document."""
    app = create_app(tiny_settings(api_keys="alpha", admin_keys="root", max_count=5))
    async with start(app) as client:
        yield client, app.openapi()


def schemas(node: Any) -> Iterator[dict[str, Any]]:
    """Every schema within a part of the document."""
    if not isinstance(node, dict):
        return
    for name, value in node.items():
        if name in {"schema", "items", "additionalProperties", "propertyNames"} and isinstance(value, dict):
            yield value
        if name in {"properties", "schemas"}:
            yield from value.values()
        for part in value if isinstance(value, list) else [value]:
            if name in {"anyOf", "oneOf", "prefixItems"}:
                yield part
            yield from schemas(part)


async def test_schemas_say_what_they_say_in_words_that_exist(document: dict[str, Any]) -> None:
    """Unknown keywords would be ignored by generators of clients and tests."""
    found = list(schemas(document))
    assert len(found) > 100
    assert {word for schema in found for word in schema} <= KEYWORDS


async def test_a_class_is_described_field_by_field(document: dict[str, Any]) -> None:
    """What a docstring says of attributes stands at these, not in one paragraph with the rest."""
    fields = document["components"]["schemas"]["Preparation"]["properties"]
    assert fields["fit"]["description"].startswith("What becomes of an image of another shape: `crop` cuts")
    assert fields["fit"]["description"].endswith("`squeeze` distorts it.")
    assert all("description" in field for field in fields.values())
    assert "Attributes:" not in json.dumps(document)


def options(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return list(schema.get("anyOf", [schema]))


def allowed(schema: dict[str, Any]) -> Iterator[Any]:
    """Values at the edges of what a schema allows."""
    for option in options(schema):
        step = 1 if option.get("type") == "integer" else 2**-50
        yield from option.get("enum", ())
        for bound, value in option.items():
            match bound:
                case "minimum" | "maximum":
                    yield value
                case "exclusiveMinimum":
                    yield value + step
                case "exclusiveMaximum":
                    yield value - step
        if "const" in option:
            yield option["const"]
        elif option.get("type") in {"null", "boolean"}:
            yield from (None,) if option["type"] == "null" else (True, False)


def excluded(schema: dict[str, Any]) -> Iterator[Any]:
    """Values beyond those edges, and of other types, such as a number in quotes."""
    for option in options(schema):
        step = 1 if option.get("type") == "integer" else 2**-50
        for bound, value in option.items():
            match bound:
                case "minimum":
                    yield value - step
                case "maximum":
                    yield value + step
                case "exclusiveMinimum" | "exclusiveMaximum":
                    yield value
        if "enum" in option:
            yield "nothing of the kind"
        if isinstance(option.get("const"), bool):
            yield not option["const"]
    types = {option.get("type") for option in options(schema)}
    yield from (value for value, name in TYPES.items() if name not in types)
    yield from ({}, [])
    if "null" not in types:
        yield None


async def test_a_json_body_may_hold_what_the_document_says_and_nothing_else(
    client: httpx.AsyncClient, document: dict[str, Any]
) -> None:
    """The edges of every field's values are accepted, and null for optional fields; values beyond are refused."""
    given: dict[str, dict[str, Any]] = {
        "/sample": {"bundle": "cond"},
        "/discriminate": {"bundle": "cond", "images": [PIXEL]},
        "/verify": {"images": [PIXEL]},
        "/v2/repository/index": {},
        "/v1/images/generations": {"prompt": "a cat", "model": "cond"},
    }
    tried = 0
    for path, rest in given.items():
        is_lenient = path.startswith(("/v1/", "/v2/"))  # whose clients may send more than we know
        invalid = 400 if path.startswith("/v1/") else 422
        body = document["paths"][path]["post"]["requestBody"]
        own, *null = options(body["content"]["application/json"]["schema"])
        assert null == ([] if body["required"] else [{"type": "null"}])
        assert (await client.post(path, content=b"null", headers=JSON)).is_success == bool(null)
        schema = document["components"]["schemas"][own["$ref"].rpartition("/")[2]]
        for field, about in schema["properties"].items():
            for values, status in (allowed(about), 200), (excluded(about), invalid):
                for value in values:
                    reply = await client.post(path, json=rest | {field: value})
                    assert reply.status_code == status, (path, field, value, reply.text[:200])
                    tried += 1
        unknown = await client.post(path, json=rest | {"colour": None})
        assert unknown.status_code == (200 if is_lenient else 422)
    assert tried > 80


async def test_a_query_may_hold_what_the_document_says_and_nothing_else(
    client: httpx.AsyncClient, document: dict[str, Any]
) -> None:
    """Parameters, including headers, are accepted and refused as documented."""
    np.save(array := io.BytesIO(), np.zeros((1, 8, 8), np.uint8))
    tried = 0
    for method, path, needed, body in (
        ("get", "/sample", {"bundle": "rgb"}, b""),  # whose discriminator can choose
        ("get", "/interpolate", {"seed_from": 1, "seed_to": 2, "bundle": "cond"}, b""),
        ("post", "/discriminate", {}, array.getvalue()),
        ("post", "/verify", {}, array.getvalue()),
    ):

        async def ask(
            place: str,
            name: str,
            value: Any,
            method: str = method,
            path: str = path,
            needed: dict[str, Any] = needed,
            body: bytes = body,
        ) -> int:
            headers = {"Content-Type": "application/x-npy"} | ({name: str(value)} if place == "header" else {})
            query = needed | ({name: value} if place == "query" else {})
            return (await client.request(method, path, content=body, headers=headers, params=query)).status_code

        for parameter in document["paths"][path][method]["parameters"]:
            place, name, about = parameter["in"], parameter["name"], parameter["schema"]
            if name == "If-None-Match":  # whatever it is, it names no current copy
                continue
            right = [
                value for value in allowed(about) if (name, value) != ("X-Timeout-Ms", 1)
            ]  # a deadline of 1 ms would pass
            wrong = ["", "two"] if about["type"] != "string" or "enum" in about else [""]
            if about["type"] != "string":
                wrong += [value for value in excluded(about) if type(value) in {int, float}]
            for values, status in (right, 200), (wrong, 422):
                for value in values:
                    assert await ask(place, name, value) == status, (path, name, value)
                    tried += 1
        assert await ask("query", "colour", "red") == 422
    assert tried > 40


async def test_examples_go_together(client: httpx.AsyncClient, document: dict[str, Any]) -> None:
    """A request made of all examples of a route is answered."""
    for bundle in ("tiny", "rgb", "cond"):
        examples = {
            parameter["name"]: parameter["schema"]["examples"][0]
            for parameter in document["paths"]["/sample"]["get"]["parameters"]
            if "examples" in parameter["schema"]
        }
        assert len(examples) >= 2
        assert (await client.get("/sample", params=examples | {"bundle": bundle})).status_code == 200
        for path, name, field in (
            ("/sample", "SampleRequest", "bundle"),
            ("/discriminate", "DiscriminateRequest", "bundle"),
            ("/v1/images/generations", "ImagesRequest", "model"),
        ):
            fields = document["components"]["schemas"][name]["properties"]
            body = {field: about["examples"][0] for field, about in fields.items() if "examples" in about}
            assert (await client.post(path, json=body | {field: bundle})).status_code == 200


@pytest.mark.parametrize("target", ["/sample?seed=7", "/interpolate?seed_from=7&seed_to=9"])
async def test_a_current_copy_gets_the_headers_that_are_documented(
    client: httpx.AsyncClient, document: dict[str, Any], target: str
) -> None:
    """All of them, whatever the reply without a body leaves out, but for those of limits, which are not set here."""
    again = await client.get(target, headers={"If-None-Match": "*"})
    documented = dict(document["paths"][target.partition("?")[0]]["get"]["responses"]["304"]["headers"])
    del documented["traceparent"]  # sent where traces are on
    assert again.status_code == 304
    names = {name.lower() for name in documented} - {"ratelimit", "ratelimit-policy"}
    assert {"etag", "x-bundle"} <= names <= set(again.headers)


async def test_keys_are_documented_where_they_are_needed(
    document: dict[str, Any], keyed: tuple[httpx.AsyncClient, dict[str, Any]]
) -> None:
    """A route that needs a key says so and answers 401 without one; if keys are optional, it says that."""
    client, with_keys = keyed
    for path, methods in with_keys["paths"].items():
        for method, operation in methods.items():
            scope = SCOPES.get(path, KeyScope.USE)
            reply = await client.request(method, path.replace("{name}", "tiny"))
            assert (reply.status_code == 401) == (scope is not KeyScope.NONE)
            needed: list[dict[str, Any]] = [{"bearer": []}, {"key": []}] if scope is not KeyScope.NONE else []
            assert operation.get("security", []) == needed
            without = document["paths"][path][method].get("security", [])
            assert without == ([{}, *needed] if scope is KeyScope.USE else needed)
            assert ("401" in operation["responses"]) == (scope is not KeyScope.NONE)
            assert ("403" in operation["responses"]) == (scope is KeyScope.ADMIN)
    assert set(with_keys["components"]["securitySchemes"]) == {"bearer", "key"}


async def test_the_operators_limits_are_in_the_document(keyed: tuple[httpx.AsyncClient, dict[str, Any]]) -> None:
    """The documented maximum of `count` is the setting's."""
    client, document = keyed
    [count] = [one for one in document["paths"]["/sample"]["get"]["parameters"] if one["name"] == "count"]
    assert count["schema"]["maximum"] == 5
    assert document["components"]["schemas"]["SampleRequest"]["properties"]["count"]["anyOf"][0]["maximum"] == 5
    key = {"X-API-Key": "alpha"}
    assert [(await client.get(f"/sample?count={n}", headers=key)).status_code for n in (5, 6)] == [200, 422]


async def test_every_json_body_and_every_error_has_an_example(document: dict[str, Any]) -> None:
    """Each example is what its schema says."""
    for name, example in BODIES.items():
        kind: Any = next(model for model in SCHEMAS if model.__name__ == name)
        kind.model_validate_json(json.dumps(example))
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for status, response in operation["responses"].items():
                for kind, content in response.get("content", {}).items():
                    assert {"example", "examples"} & content.keys() or "json" not in kind, (path, status)
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            assert body is None or "example" in body, path


async def test_groups_and_names_are_for_people(document: dict[str, Any]) -> None:
    """Each operation is in a group that is described, and named by its method and path."""
    groups = {group["name"] for group in document["tags"]}
    assert {tag for one in document["paths"].values() for facts in one.values() for tag in facts["tags"]} == groups
    assert document["paths"]["/bundles/{name}"]["get"]["operationId"] == "get_bundles_name"


async def test_a_method_that_is_not_there_is_405_whoever_asks(
    keyed: tuple[httpx.AsyncClient, dict[str, Any]],
) -> None:
    """405 and Allow come without a key: the document, which says the same, is public."""
    client, document = keyed
    for path, methods in document["paths"].items():
        reply = await client.request("PATCH", path.replace("{name}", "tiny"))
        assert reply.status_code == 405
        assert {method.upper() for method in methods} <= set(reply.headers["allow"].split(", "))


async def test_the_document_that_is_served_is_that_one(client: httpx.AsyncClient, document: dict[str, Any]) -> None:
    """The route serves the application's document, the same each time."""
    for _ in range(2):
        assert (await client.get("/openapi.json")).json() == json.loads(json.dumps(document))
