"""The routes' OpenAPI descriptions. FastAPI can't derive them: the routes parse bodies and queries themselves."""

import re
from collections.abc import Iterator, Mapping
from inspect import getdoc
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

from models.images.preparation import Preparation
from service.codecs.animation import SEQUENCE_TYPES
from service.codecs.decode import UPLOAD_TYPES
from service.codecs.encode import MEDIA_TYPES
from service.codecs.npy import NPY
from service.errors import (
    DeadlinePassed,
    Draining,
    Forbidden,
    Invalid,
    Malformed,
    NoDiscriminator,
    NoEncoder,
    NotAcceptable,
    NotReady,
    QueueFull,
    RateLimited,
    RequestTimeout,
    ServiceError,
    TooLarge,
    Unauthorized,
    UnknownBundle,
    UnsupportedMediaType,
)
from service.http.layers.auth import KeyScope
from service.http.openapi.document import add_common
from service.http.openapi.examples import MODEL_CONFIG, MODEL_STATISTICS
from service.http.problems import (
    OPEN_INFERENCE,
    OPENAI,
    PROBLEM,
    ErrorShape,
    OpenAIProblem,
    Problem,
    ProtocolProblem,
    describe,
)
from service.http.requests.parsing import LABEL_FIELDS
from service.http.schemas import (
    BundleList,
    BundleMetadata,
    DiscriminateQuery,
    DiscriminateReply,
    DiscriminateRequest,
    EncodeReply,
    InterpolateRequest,
    SampleBody,
    SampleReply,
    SampleRequest,
    VerifyReply,
    VerifyRequest,
)
from service.http.v1.messages import ImagesReply, ImagesRequest, ModelEntry, ModelList
from service.http.v2.messages import (
    InferReply,
    InferRequest,
    ModelMetadata,
    ModelReady,
    RepositoryIndex,
    RepositoryLoad,
    RepositoryQuery,
    RepositoryUnload,
    ServerHealth,
    ServerMetadata,
)

_REF = "#/components/schemas/{model}"
SCHEMAS: tuple[type[BaseModel], ...] = (
    Problem,
    SampleRequest,
    SampleBody,
    SampleReply,
    DiscriminateRequest,
    DiscriminateReply,
    VerifyRequest,
    VerifyReply,
    EncodeReply,
    BundleMetadata,
    BundleList,
    ProtocolProblem,
    RepositoryIndex,
    RepositoryLoad,
    RepositoryQuery,
    RepositoryUnload,
    InferRequest,
    InferReply,
    ServerMetadata,
    ServerHealth,
    ModelMetadata,
    ModelReady,
    OpenAIProblem,
    ImagesRequest,
    ImagesReply,
    ModelEntry,
    ModelList,
)
_BINARY = {"type": "string", "format": "binary"}
_LIMITS = (QueueFull, RateLimited)
_WORK = (Malformed, Unauthorized, UnknownBundle, TooLarge, Invalid, *_LIMITS, NotReady, Draining, DeadlinePassed)
_UPLOAD = (RequestTimeout, UnsupportedMediaType)
_KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
}
_TIMEOUT = {
    "name": "X-Timeout-Ms",
    "in": "header",
    "description": "Milliseconds that the request may take, instead of GAN_DEADLINE_S; GAN_MAX_DEADLINE_S at most.",
    "schema": {"type": "integer", "minimum": 1, "maximum": 999999999},
}


def _header(description: str, kind: str = "string") -> dict[str, Any]:
    return {"description": description, "schema": {"type": kind}}


_SAMPLE_HEADERS = {
    "X-Seed": _header("The seed, given or new. Send it again to get the same images.", "integer"),
    "X-First-Index": _header("Index, within the seed, of the first image.", "integer"),
    "X-Bundle": _header("name@version of the bundle that made them."),
    "Server-Timing": _header("Milliseconds spent in the queue, in computing and in encoding."),
    "X-Acceptance-Rate": _header("With select=discriminator: the share of candidates that passed.", "number"),
    "Content-Disposition": _header("A file's name, of npy and zip: of the bundle, the seed and the images' indices."),
}
_CACHE_HEADERS = {
    "ETag": _header("Entity tag; only with a seed."),
    "Cache-Control": _header(
        "With a seed public, or private if keys are set; for a year if bundle is name@version. Else no-store."
    ),
    "Vary": _header("Accept: a cache keeps the formats apart."),
}
_IMAGES = {
    media_type: {"schema": _BINARY if name != "json" else {"$ref": _REF.format(model="SampleReply")}}
    for name, media_type in MEDIA_TYPES.items()
}


def complete(
    document: dict[str, Any], scopes: Mapping[str, KeyScope], *, are_keys_needed: bool, max_count: int
) -> None:
    """Add what FastAPI can't know: the schemas that routes refer to, the keys they need, limits, headers, examples."""
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for model in SCHEMAS:
        schema = model.model_json_schema(ref_template=_REF)
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    # pydantic 2.10 leaves out what a dataclass says of itself.
    schemas["Preparation"].setdefault("description", getdoc(Preparation))
    for schema in schemas.values():
        _describe_fields(schema)
    components["securitySchemes"] = _KEYS
    for path, operations in document["paths"].items():
        scope = scopes.get(path, KeyScope.USE)
        without_key: list[dict[str, list[str]]] = [{}] if scope < KeyScope.ADMIN and not are_keys_needed else []
        for operation in operations.values():
            if scope is not KeyScope.NONE:
                operation["security"] = [*without_key, *({name: []} for name in _KEYS)]
    for schema in _count_schemas(document):
        schema["maximum"] = max_count
    add_common(document)


def _describe_fields(schema: dict[str, Any]) -> None:
    """Let each field say what the docstring of its class says of it under "Attributes"."""
    text, _, attributes = schema.get("description", "").partition("\n\nAttributes:\n")
    for name, about in re.findall(r"^ {4}(\w+): (.+(?:\n {5}.+)*)", attributes, re.MULTILINE):
        schema["properties"][name]["description"] = " ".join(about.split())
    if attributes:
        schema["description"] = text


def _count_schemas(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for model, field in ("SampleRequest", "count"), ("SampleBody", "count"), ("ImagesRequest", "n"):
        yield document["components"]["schemas"][model]["properties"][field]["anyOf"][0]
    for operation in document["paths"]["/sample"].values():
        for parameter in operation["parameters"]:
            if parameter["name"] == "count":
                yield parameter["schema"]


def _query(model: type[BaseModel], more: str = "") -> list[dict[str, Any]]:
    """A schema's fields as query parameters; `more` is added to each description."""
    whole = model.model_json_schema()
    properties, required = whole["properties"], whole.get("required", ())
    if more:  # generated clients send defaults, which some bodies forbid
        for schema in properties.values():
            schema.pop("default", None)
    return [
        {
            "name": name,
            "in": "query",
            **({"required": True} if name in required else {}),
            "description": schema.pop("description") + more,
            "schema": _in_query(name, schema),
        }
        for name, schema in properties.items()
    ]


def _in_query(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """A field's schema as a query parameter, which has no null."""
    if name in LABEL_FIELDS:
        return {"type": "string", "minLength": 1}
    given = [option for option in schema.pop("anyOf", []) if option != {"type": "null"}]
    without_null = {key: value for key, value in schema.items() if (key, value) != ("default", None)}
    return {**without_null, **(given[0] if given else {})}


def _body(*media_types: str, model: type[BaseModel] | None = None) -> dict[str, Any]:
    # Arrays first: generated clients send a file as the last type that takes one, and images are read as what they are.
    content: dict[str, Any] = {
        kind: {"schema": _BINARY} for kind in sorted(media_types, key="application/x-npy".__ne__)
    }
    if "multipart/form-data" in content:
        about = "Image files. Every part with a file is one, whatever its name."
        images = {"type": "array", "items": _BINARY, "minItems": 1, "description": about}
        form = {"type": "object", "properties": {"images": images}, "required": ["images"]}
        content["multipart/form-data"] = {"schema": form}
    if model is not None:
        content["application/json"] = {"schema": {"$ref": _REF.format(model=model.__name__)}}
    return {"required": bool(media_types), "content": content}


def _json_reply(description: str, model: type[BaseModel]) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": _REF.format(model=model.__name__)}}},
    }


def _route(
    summary: str, reply: dict[str, Any], *errors: type[ServiceError], shape: ErrorShape = PROBLEM, **extra: Any
) -> dict[str, Any]:
    """Keyword arguments for FastAPI's route decorators."""
    return {
        "summary": summary,
        "response_class": Response,
        "responses": {200: reply, **describe(*errors, shape=shape)},
        "openapi_extra": {key: value for key, value in extra.items() if value},
    }


def _protocol_route(summary: str, reply: dict[str, Any], *errors: type[ServiceError], **extra: Any) -> dict[str, Any]:
    """As `_route`, for routes of the Open Inference Protocol, whose errors have another shape."""
    return _route(summary, reply, *errors, shape=OPEN_INFERENCE, **extra)


def _openai_route(summary: str, reply: dict[str, Any], *errors: type[ServiceError], **extra: Any) -> dict[str, Any]:
    """As `_route`, for routes of OpenAI's API, whose errors have another shape."""
    return _route(summary, reply, Unauthorized, NotReady, *errors, shape=OPENAI, **extra)


def _images(headers: dict[str, Any]) -> dict[str, Any]:
    return {
        "description": "The images, in the requested format.",
        "content": _IMAGES,
        "headers": _SAMPLE_HEADERS | headers,
    }


def _not_modified(*names: str) -> dict[int, dict[str, Any]]:
    """The reply for a client whose copy is current; it has these headers, and those for caches."""
    return {
        304: {
            "description": "The client's copy, named in If-None-Match, is current.",
            "headers": {name: _SAMPLE_HEADERS[name] for name in names} | _CACHE_HEADERS,
        }
    }


SAMPLE_BY_QUERY = _route(
    "Draw images", _images(_CACHE_HEADERS), *_WORK, NotAcceptable, parameters=[*_query(SampleRequest), _TIMEOUT]
)
SAMPLE_BY_QUERY["responses"] |= _not_modified("X-Seed", "X-First-Index", "X-Bundle")
SAMPLE_BY_BODY = _route(
    "Draw images",
    _images({}),
    *_WORK,
    NotAcceptable,
    *_UPLOAD,
    parameters=[*_query(SampleRequest, " Only beside a body of latents: JSON has it itself."), _TIMEOUT],
    requestBody=_body(NPY, model=SampleBody) | {"required": False},
)
INTERPOLATE = _route(
    "Go from one image to another",
    {
        "description": "The images between, as a strip or an animation.",
        "content": {media_type: {"schema": _BINARY} for media_type in SEQUENCE_TYPES.values()},
        "headers": {
            "X-Bundle": _SAMPLE_HEADERS["X-Bundle"],
            "Server-Timing": _SAMPLE_HEADERS["Server-Timing"],
            "Content-Disposition": _header("A file's name: of the bundle, and of both images."),
            **_CACHE_HEADERS,
        },
    },
    *_WORK,
    NotAcceptable,
    parameters=[*_query(InterpolateRequest), _TIMEOUT],
)
INTERPOLATE["responses"] |= _not_modified("X-Bundle")
DISCRIMINATE = _route(
    "Judge images",
    _json_reply("One result for each image, in order.", DiscriminateReply)
    | {"headers": {"Server-Timing": _header("Milliseconds spent in decoding, in the queue and in computing.")}},
    *_WORK,
    NoDiscriminator,
    *_UPLOAD,
    parameters=[
        *_query(DiscriminateQuery, " With a JSON body it is a field of the body, and not allowed in the query."),
        _TIMEOUT,
    ],
    requestBody=_body(*UPLOAD_TYPES, model=DiscriminateRequest),
)
VERIFY = _route(
    "Verify pictures by their recipes",
    _json_reply("One result for each picture, in order.", VerifyReply)
    | {"headers": {"Server-Timing": _header("Milliseconds spent in decoding, in the queue and in computing.")}},
    *(error for error in _WORK if error is not UnknownBundle),
    *_UPLOAD,
    parameters=[_TIMEOUT],
    requestBody=_body(*UPLOAD_TYPES, model=VerifyRequest),
)
ENCODE = _route(
    "Find the latents of images",
    _json_reply("One result for each image, in order.", EncodeReply)
    | {
        "headers": {
            "Server-Timing": _header("Milliseconds spent in decoding, in the queue, in computing, in encoding.")
        }
    },
    *_WORK,
    NoEncoder,
    *_UPLOAD,
    parameters=DISCRIMINATE["openapi_extra"]["parameters"],
    requestBody=_body(*UPLOAD_TYPES, model=DiscriminateRequest),
)
BUNDLES = _route("The bundles", _json_reply("Every bundle.", BundleList), Malformed, Unauthorized, Invalid, NotReady)
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
BUNDLE = _route(
    "One bundle",
    _json_reply("The bundle.", BundleMetadata),
    Malformed,
    Unauthorized,
    UnknownBundle,
    Invalid,
    NotReady,
    parameters=[_NAME],
)
_BODY_ERRORS = (Malformed, Unauthorized, RequestTimeout, TooLarge, Invalid)
OPENAI_IMAGES = _openai_route(
    "Draw images, by OpenAI's API",
    _json_reply("The pictures.", ImagesReply)
    | {"headers": {name: _SAMPLE_HEADERS[name] for name in ("X-Seed", "X-Bundle", "Server-Timing")}},
    *(error for error in _WORK if error not in {Unauthorized, NotReady}),
    *_UPLOAD,
    parameters=[_TIMEOUT],
    requestBody=_body(model=ImagesRequest) | {"required": True},
)
OPENAI_MODELS = _openai_route("List bundles, by OpenAI's API", _json_reply("Every bundle.", ModelList))
OPENAI_MODEL = _openai_route(
    "One bundle, by OpenAI's API", _json_reply("The bundle.", ModelEntry), UnknownBundle, parameters=[_NAME]
)
REPOSITORY_INDEX = _protocol_route(
    "List the repository",
    _json_reply("Every version of every bundle.", RepositoryIndex),
    *_BODY_ERRORS,
    requestBody=_body(model=RepositoryQuery),
)


def _repository_change(summary: str, model: type[BaseModel]) -> dict[str, Any]:
    done = {"description": "Done.", "content": {"application/json": {"schema": {"type": "object"}, "example": {}}}}
    errors = *_BODY_ERRORS, Forbidden, UnknownBundle, NotReady, Draining
    return _protocol_route(summary, done, *errors, parameters=[_NAME], requestBody=_body(model=model))


REPOSITORY_LOAD = _repository_change("Load a bundle", RepositoryLoad)
REPOSITORY_UNLOAD = _repository_change("Unload a bundle", RepositoryUnload)
_JSON_LENGTH = {
    "name": "Inference-Header-Content-Length",
    "in": "header",
    "description": "Bytes of the JSON, where tensors in binary follow it. 0: the body is one tensor and nothing else.",
    "schema": {"type": "integer", "minimum": 0},
}
_MODEL_NAME = {
    "name": "name",
    "in": "path",
    "required": True,
    "description": "A bundle's name for its generator; with `.discriminator` after it for its discriminator.",
    "schema": {"type": "string"},
}


def _model_route(summary: str, reply: dict[str, Any], *errors: type[ServiceError], **extra: Any) -> dict[str, Any]:
    """A route of the protocol that names a model."""
    parameters = [_MODEL_NAME, *extra.pop("parameters", ())]
    errors = UnknownBundle, NotReady, Draining, *(errors or (Unauthorized,))
    return _protocol_route(summary, reply, *errors, parameters=parameters, **extra)


def _triton_reply(example: dict[str, Any]) -> dict[str, Any]:
    """A reply whose fields Triton's documentation describes."""
    content = {"schema": {"type": "object"}, "example": example}
    return {"description": "In Triton's form.", "content": {"application/json": content}}


def of_version(route: dict[str, Any]) -> dict[str, Any]:
    """The same route for a version of the model."""
    version = {"name": "version", "in": "path", "required": True, "schema": {"type": "string"}}
    extra = route["openapi_extra"]
    return route | {"openapi_extra": extra | {"parameters": [*extra["parameters"], version]}}


V2_SERVER = _protocol_route("The service", _json_reply("Its name and version.", ServerMetadata), Unauthorized)
V2_HEALTH = _protocol_route("Probe", _json_reply("Yes.", ServerHealth), NotReady, Draining)
V2_METADATA = _model_route("One model", _json_reply("The model.", ModelMetadata))
V2_READY = _model_route("Whether a model is ready", _json_reply("Yes.", ModelReady))
V2_CONFIG = _model_route("A model's configuration", _triton_reply(MODEL_CONFIG))
V2_STATISTICS = _model_route("Statistics of a model", _triton_reply(MODEL_STATISTICS))
V2_ALL_STATISTICS = _protocol_route("Statistics of all models", _triton_reply(MODEL_STATISTICS), Unauthorized, NotReady)
V2_INFER = _model_route(
    "Run a model",
    {
        "description": "The outputs: as JSON, or after the JSON if any of them is in binary.",
        "content": {
            "application/json": {"schema": {"$ref": _REF.format(model="InferReply")}},
            "application/octet-stream": {"schema": _BINARY},
        },
        "headers": {
            "Inference-Header-Content-Length": _header("Bytes of the JSON, if outputs in binary follow it.", "integer"),
            "Server-Timing": _header("Milliseconds spent in decoding, the queue, computing and encoding."),
        },
    },
    *_BODY_ERRORS,
    UnsupportedMediaType,
    *_LIMITS,
    DeadlinePassed,
    parameters=[_JSON_LENGTH, _TIMEOUT],
    requestBody=_body("application/octet-stream", model=InferRequest) | {"required": False},
)
PROBE = _route(
    "Probe",
    {
        "description": "Yes.",
        "content": {"application/json": {"schema": {"type": "object"}, "example": {"status": "ok"}}},
    },
    NotReady,
    Draining,
)
_TEXT = {"schema": {"type": "string"}}
METRICS = _route(
    "Metrics",
    {
        "description": "Prometheus' text format, or OpenMetrics where Accept asks for it.",
        "content": {"text/plain": _TEXT, "application/openmetrics-text": _TEXT},
    },
    NotReady,
)
