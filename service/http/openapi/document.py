"""What the OpenAPI document says of every operation alike: its id, its group, common headers and examples of bodies."""

import re
from collections.abc import Iterator
from typing import Any

from fastapi.routing import APIRoute

from service.http.openapi.examples import BODIES, LIMIT_HEADERS

_JSON = "application/json"
_GROUPS = {
    "images": "Drawing images, and judging them.",
    "bundles": "What can be asked for.",
    "openai": "OpenAI's image API, for its clients.",
    "open-inference": "The Open Inference Protocol, version 2, for its clients; and the repository of bundles.",
    "machines": "Probes and metrics. They need no key and never wait for work.",
}
_GROUP_OF = {  # by the first segment of the path
    "bundles": "bundles",
    "v1": "openai",
    "v2": "open-inference",
    **dict.fromkeys(("livez", "readyz", "health", "startupz", "metrics"), "machines"),
}
_COMMON_HEADERS = {
    "X-Request-ID": {
        "description": "The request's id in the log: the one that it brought, if that was up to 128 letters, digits "
        "and ._:/+=@-.",
        "required": True,
        "schema": {"type": "string"},
    },
    "traceparent": {
        "description": "Where traces are on: the trace and the span of this request, as W3C Trace Context writes them.",
        "schema": {"type": "string"},
    },
}
_IF_NONE_MATCH = {
    "name": "If-None-Match",
    "in": "header",
    "description": "The entity tags of the copies that the client has. If one is current, the reply is 304.",
    "schema": {"type": "string"},
}


def operation_id(route: APIRoute) -> str:
    """The method and the path, as a name: `get_bundles_name`."""
    methods = "_".join(route.methods or ()).lower()
    return re.sub(r"\W+", "_", methods + route.path_format).strip("_")


def add_common(document: dict[str, Any]) -> None:
    """Add to each operation its group, the headers of all replies, and examples of its bodies."""
    document["tags"] = [{"name": name, "description": about} for name, about in _GROUPS.items()]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["tags"] = [_GROUP_OF.get(path.split("/")[1], "images")]
            responses = operation["responses"]
            is_limited = "429" in responses
            for status, response in responses.items():
                limits = LIMIT_HEADERS if is_limited and status < "4" else {}
                response["headers"] = {**response.get("headers", {}), **limits, **_COMMON_HEADERS}
            if "304" in responses:
                operation["parameters"] = [*operation["parameters"], _IF_NONE_MATCH]
            for content in _json_contents(operation):
                _add_example(content)
            body = operation.get("requestBody", {"required": True})
            if not body["required"] and _JSON in body["content"]:  # a body that is null counts as left out
                body["content"][_JSON]["schema"] = {"anyOf": [body["content"][_JSON]["schema"], {"type": "null"}]}


def _json_contents(operation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for body in (operation.get("requestBody", {}), *operation["responses"].values()):
        if _JSON in body.get("content", {}):
            yield body["content"][_JSON]


def _add_example(content: dict[str, Any]) -> None:
    name = content["schema"].get("$ref", "").rpartition("/")[2]
    if name in BODIES:
        content["example"] = BODIES[name]
