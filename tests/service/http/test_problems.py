"""Errors have a fixed status and code, and become replies of one shape without internal details."""

import json

import pytest

from service import errors
from service.errors import Internal, ServiceError
from service.http.problems import OPENAI, describe, problem_reply

# The public contract: a code never changes its status.
CODES = {
    "unauthorized": 401,
    "forbidden": 403,
    "malformed": 400,
    "not_found": 404,
    "unknown_bundle": 404,
    "method_not_allowed": 405,
    "not_acceptable": 406,
    "request_timeout": 408,
    "too_large": 413,
    "unsupported_media_type": 415,
    "invalid": 422,
    "no_discriminator": 422,
    "no_encoder": 422,
    "rate_limited": 429,
    "queue_full": 429,
    "internal": 500,
    "not_implemented": 501,
    "not_ready": 503,
    "draining": 503,
    "deadline_exceeded": 504,
}
EXAMPLES: list[tuple[ServiceError, dict[str, str]]] = [
    (errors.Malformed("Not JSON."), {}),
    (errors.Unauthorized("Who?"), {"www-authenticate": 'Bearer realm="gan-service"'}),
    (errors.Forbidden("You?"), {}),
    (errors.NotFound("No."), {}),
    (errors.UnknownBundle("x", ["a@1"]), {}),
    (errors.MethodNotAllowed(["GET", "HEAD"]), {"allow": "GET, HEAD"}),
    (errors.NotAcceptable("No."), {}),
    (errors.RequestTimeout("Slow."), {"connection": "close"}),
    (errors.UnknownTransferCoding(), {}),
    (errors.TooLarge("Big."), {}),
    (errors.UnsupportedMediaType("text/plain", ["image/png", "image/bmp"]), {"accept": "image/png, image/bmp"}),
    (errors.UnsupportedEncoding("gzip", ["identity"]), {"accept-encoding": "identity"}),
    (errors.Invalid("count: no."), {}),
    (errors.NoDiscriminator("x"), {}),
    (errors.NoEncoder("x"), {}),
    (errors.QueueFull(7), {"retry-after": "7"}),
    (errors.NotReady("loading"), {"retry-after": "2"}),
    (
        errors.RateLimited("Too many", 3, {"RateLimit": '"images";r=0;t=3'}),
        {"retry-after": "3", "ratelimit": '"images";r=0;t=3'},
    ),
    (errors.Draining(), {"retry-after": "1"}),
    (errors.DeadlinePassed(0.25), {}),
    (errors.Internal("a secret"), {}),
    (errors.EngineFailed("a secret"), {}),
]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.001, "1 ms"), (0.029, "29 ms"), (0.999, "999 ms"), (1, "1 s"), (1.001, "1.001 s"), (30.0, "30 s")],
)
def test_a_deadline_is_named_as_it_was_asked_for(seconds: float, words: str) -> None:
    """In milliseconds or seconds, exactly."""
    assert errors.DeadlinePassed(seconds).detail == f"The deadline of {words} passed before the answer was there."


def all_errors(base: type[ServiceError] = ServiceError) -> set[type[ServiceError]]:
    return {base}.union(*(all_errors(one) for one in base.__subclasses__())) if base.__subclasses__() else {base}


def test_the_codes_are_those_of_the_contract() -> None:
    """Every error has a documented code, and every code one status."""
    leaves = all_errors() - {ServiceError}
    assert {error.code: error.status for error in leaves} == CODES
    assert {type(example) for example, _ in EXAMPLES} == leaves
    assert len({error.title for error in leaves}) == len(CODES)


@pytest.mark.parametrize(("error", "headers"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_every_error_is_a_problem(error: ServiceError, headers: dict[str, str]) -> None:
    """A problem reply has the media type, the fields and the headers of its error, and is never cached."""
    reply = problem_reply(error, "the-id", "/sample")
    assert reply.status_code == error.status
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.headers["cache-control"] == "no-store"
    for name, value in headers.items():
        assert reply.headers[name] == value
    body = json.loads(bytes(reply.body))
    assert body == {
        "type": "about:blank",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
        "request_id": "the-id",
    }
    assert "secret" not in str(body)


@pytest.mark.parametrize(("error", "headers"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_every_error_has_the_shape_of_its_protocol(error: ServiceError, headers: dict[str, str]) -> None:
    """Under /v1 and /v2 bodies are those of other protocols; headers and all statuses but one are the same."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    openai = {"message": error.detail, "type": kind, "param": None, "code": error.code}
    if error.status == 429:
        openai["type"] = "rate_limit_error"
    for path, body in ("/v1/images/generations", {"error": openai}), ("/v2/models", {"error": error.detail}):
        reply = problem_reply(error, "the-id", path)
        is_other = path.startswith("/v1/") and error.code == "invalid"
        assert reply.status_code == (400 if is_other else error.status)
        assert reply.headers["content-type"] == "application/json"
        assert headers.items() <= dict(reply.headers).items()
        assert json.loads(bytes(reply.body)) == body


def test_long_names_are_cut() -> None:
    """A long value of a client is cut in the message."""
    assert len(errors.UnknownBundle("x" * 10**6, []).detail) < 200
    assert len(errors.UnsupportedMediaType("x" * 10**6, []).detail) < 200


def test_statuses_with_several_codes_are_described_together() -> None:
    """OpenAPI has one entry for each status, which names all its codes; 500 is always there."""
    assert set(describe(errors.Invalid, shape=OPENAI)) == {400, 500}
    described = describe(errors.NotReady, errors.Draining, errors.Invalid)
    assert set(described) == {503, 422, 500}
    assert "`not_ready`" in described[503]["description"]
    assert "`draining`" in described[503]["description"]
    assert "Retry-After" in described[503]["headers"]
    assert Internal.code in described[500]["description"]
