"""Error replies, all in one shape: application/problem+json (RFC 9457)."""

from typing import Any

from pydantic import BaseModel, Field
from starlette.responses import Response

from service.errors import Internal, ServiceError

MEDIA_TYPE = "application/problem+json"
PROTOCOL = "/v2/"  # the prefix of its paths
_WAIT = ("Retry-After", "Seconds after which to try again.", "integer")
_HEADERS = {
    401: ("WWW-Authenticate", "How to send a key.", "string"),
    415: ("Accept", "What the route reads; Accept-Encoding where the body is compressed.", "string"),
    429: _WAIT,
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


def problem_reply(error: ServiceError, request_id: str, path: str) -> Response:
    """An error as a reply that caches do not store; in the protocol's shape if the path is under /v2."""
    headers = {**error.headers, "Cache-Control": "no-store"}
    if f"{path}/".startswith(PROTOCOL):
        return Response(
            ProtocolProblem(error=error.detail).model_dump_json(), error.status, headers, "application/json"
        )
    return Response(problem(error, request_id).model_dump_json(), error.status, headers, MEDIA_TYPE)


def describe(
    *errors: type[ServiceError], shape: type[BaseModel] = Problem, media_type: str = MEDIA_TYPE
) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's `responses` for the errors that a route can end in; `Internal` is added."""
    responses: dict[int | str, dict[str, Any]] = {}
    possible: list[type[ServiceError]] = [*errors, Internal]
    for error in possible:
        line = f"`{error.code}`: {(error.__doc__ or '').splitlines()[0]}"
        if error.status in responses:
            responses[error.status]["description"] += f"\n\n{line}"
            continue
        responses[error.status] = {
            "description": line,
            "content": {media_type: {"schema": {"$ref": f"#/components/schemas/{shape.__name__}"}}},
        }
        if error.status in _HEADERS:
            name, description, kind = _HEADERS[error.status]
            responses[error.status]["headers"] = {name: {"description": description, "schema": {"type": kind}}}
    return responses
