"""Error replies: application/problem+json (RFC 9457), and under the prefixes of other protocols in their shapes."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from pydantic import BaseModel, Field
from starlette.responses import Response

from service.errors import Internal, Invalid, ServiceError
from service.http.openapi.examples import ERRORS, LIMIT_HEADERS, REQUEST_ID

MEDIA_TYPE = "application/problem+json"
_TEXT = {"type": "string"}
_WAIT = {"Retry-After": {"description": "Seconds after which to try again.", "schema": {"type": "integer"}}}
_HEADERS: dict[int, dict[str, Any]] = {
    401: {"WWW-Authenticate": {"description": "How to send a key.", "schema": _TEXT}},
    415: {
        "Accept": {"description": "What the route reads.", "schema": _TEXT},
        "Accept-Encoding": {"description": "In place of that, if the body is compressed.", "schema": _TEXT},
    },
    429: {**_WAIT, **LIMIT_HEADERS},
    503: _WAIT,
}


class Problem(BaseModel):
    """What went wrong, for people (`detail`) and for programs (`code`)."""

    type: str = Field("about:blank", description="Always about:blank; `code` says what kind of error it is.")
    title: str = Field(description="What the code means; the same for every occurrence.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What happened this time.")
    code: str = Field(description="For programs; a kind of error keeps its code.")
    request_id: str = Field(description="The request's id in the service's log.")


def problem(error: ServiceError, request_id: str) -> Problem:
    """An error as a problem."""
    return Problem(title=error.title, status=error.status, detail=error.detail, code=error.code, request_id=request_id)


class ProtocolProblem(BaseModel):
    """What went wrong, in the shape that the Open Inference Protocol prescribes."""

    error: str = Field(description="What happened this time.")


class OpenAIError(BaseModel):
    """What went wrong, for people (`message`) and for programs."""

    message: str = Field(description="What happened this time.")
    type: str = Field(description="`invalid_request_error`, `rate_limit_error` or `server_error`, as the status is.")
    param: str | None = Field(description="The field that it is about, where it is one.")
    code: str = Field(description="The code that a problem has elsewhere.")


class OpenAIProblem(BaseModel):
    """What went wrong, in the shape of OpenAI's API."""

    error: OpenAIError


class ErrorShape(NamedTuple):
    """How errors look to the clients of one protocol.

    Attributes:
        media_type: Of the reply.
        schema: Of its body.
        build: Makes the body from the error and the request's id.
        statuses: The protocol's status for a code, where it differs from the error's own.
    """

    media_type: str
    schema: type[BaseModel]
    build: Callable[[ServiceError, str], BaseModel]
    statuses: Mapping[str, int] = MappingProxyType({})

    def status(self, error: ServiceError | type[ServiceError]) -> int:
        """The HTTP status of an error."""
        return self.statuses.get(error.code, error.status)


def _openai_problem(error: ServiceError, _: str) -> OpenAIProblem:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    return OpenAIProblem(error=OpenAIError(message=error.detail, type=kind, param=error.field, code=error.code))


PROBLEM = ErrorShape(MEDIA_TYPE, Problem, problem)
OPEN_INFERENCE = ErrorShape("application/json", ProtocolProblem, lambda error, _: ProtocolProblem(error=error.detail))
OPENAI = ErrorShape("application/json", OpenAIProblem, _openai_problem, {Invalid.code: 400})
_SHAPES = {"/v1/": OPENAI, "/v2/": OPEN_INFERENCE}  # by the path's prefix


def problem_reply(error: ServiceError, request_id: str, path: str) -> Response:
    """An error as a reply that caches do not store, in the shape that the path's clients expect."""
    shape = next((shape for prefix, shape in _SHAPES.items() if f"{path}/".startswith(prefix)), PROBLEM)
    headers = {**error.headers, "Cache-Control": "no-store"}
    content = shape.build(error, request_id).model_dump_json()
    return Response(content, shape.status(error), headers, shape.media_type)


def describe(*errors: type[ServiceError], shape: ErrorShape = PROBLEM) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` for the errors that a route can end in; `Internal` is added."""
    responses: dict[int | str, dict[str, Any]] = {}
    possible: list[type[ServiceError]] = [*errors, Internal]
    for error in possible:
        line, status = f"`{error.code}`: {(error.__doc__ or '').splitlines()[0]}", shape.status(error)
        example = {error.code: {"value": shape.build(ERRORS[error], REQUEST_ID).model_dump()}}
        if status in responses:
            responses[status]["description"] += f"\n\n{line}"
            responses[status]["content"][shape.media_type]["examples"] |= example
            continue
        schema = {"$ref": f"#/components/schemas/{shape.schema.__name__}"}
        responses[status] = {
            "description": line,
            "content": {shape.media_type: {"schema": schema, "examples": example}},
        }
        if status in _HEADERS:
            responses[status]["headers"] = _HEADERS[status]
    return responses
