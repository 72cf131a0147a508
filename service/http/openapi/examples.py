"""Examples for the OpenAPI document: of every error, and of each schema that a JSON body has; and shared headers."""

from typing import Any

from service.errors import (
    DeadlinePassed,
    Draining,
    Forbidden,
    Internal,
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

LIMIT_HEADERS = {
    "RateLimit-Policy": {"description": "The limits of the client's key, if it has any.", "schema": {"type": "string"}},
    "RateLimit": {"description": "What is left of them.", "schema": {"type": "string"}},
}
REQUEST_ID = "8836b386bad8458d1b39000000000000"
# A black pixel, as a PNG in base64.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
_BUNDLE = {"bundle": "mnist", "version": "0123456789ab"}
_METADATA: dict[str, Any] = {
    "name": "mnist",
    "version": "0123456789ab",
    "versions": [{"version": "0123456789ab", "created": "2026-11-24T17:35:12Z"}],
    "created": "2026-11-24T17:35:12Z",
    "networks": ["generator", "discriminator"],
    "image": {"channels": 1, "height": 28, "width": 28},
    "latent": {"dim": 64, "distribution": "normal", "sampler": "philox4x64-10/1", "label_frequencies": [0.5, 0.5]},
    "labels": ["0", "1"],
    "calibration": {"scale": 0.5, "offset": -0.25, "auc": 0.9, "expected_calibration_error": 0.02},
    "preparation": {
        "fit": "crop",
        "background": "#000000",
        "resampling": "lanczos",
        "orientation": "exif",
        "colour": "grey",
    },
    "training": {"preset": "conv-ns", "steps": 40000},
    "evaluation": {},
}

ERRORS: dict[type[ServiceError], ServiceError] = {
    type(error): error
    for error in (
        Malformed("The body is not JSON: EOF while parsing an object at line 1 column 1."),
        Unauthorized("A key is needed: Authorization: Bearer KEY, or X-API-Key: KEY."),
        Forbidden("This key is not an administrator's."),
        UnknownBundle("minst", ["mnist@0123456789ab"]),
        NotAcceptable("Accept allows none of image/png, image/webp."),
        RequestTimeout("The body was not there within 30 s."),
        TooLarge("The body has more than 4194304 bytes."),
        UnsupportedMediaType("text/plain", ["application/json"]),
        NoDiscriminator("faces"),
        NoEncoder("mnist"),
        Invalid("seed: Input should be greater than or equal to 0.", "seed"),
        QueueFull(3),
        RateLimited(
            "This key may have 100 images a second computed",
            2,
            {"RateLimit-Policy": '"images";q=100;qu="images";w=1', "RateLimit": '"images";r=0;t=2'},
        ),
        NotReady("the bundles are being loaded"),
        Draining(),
        DeadlinePassed(30.0),
        Internal(),
    )
}

# By the name of the schema.
BODIES: dict[str, Any] = {
    "SampleRequest": {"count": 16, "seed": 7},
    "SampleBody": {"count": 16, "seed": 7},
    "SampleReply": {
        **_BUNDLE,
        "seed": 7,
        "first_index": 0,
        "labels": [3],
        "label_names": ["3"],
        "images": [PIXEL],
    },
    "DiscriminateRequest": {"images": [PIXEL]},
    "DiscriminateReply": {**_BUNDLE, "results": [{"probability_real": 0.93, "logit": 2.59, "label": "7"}]},
    "EncodeReply": {**_BUNDLE, "results": [{"latent": [0.25, -1.5], "error": 0.0125, "label": "7", "image": PIXEL}]},
    "VerifyRequest": {"images": [PIXEL]},
    "VerifyReply": {
        "results": [
            {
                "verdict": "identical",
                "recipe": {
                    "bundle": "mnist@0123456789ab",
                    "seed": 7,
                    "first_index": 0,
                    "count": 1,
                    "labels": [3],
                    "truncation": 1.0,
                    "select": "none",
                    "layout": "grid",
                    "columns": 1,
                    "scale": 1,
                    "format": "png",
                },
            }
        ]
    },
    "BundleMetadata": _METADATA,
    "BundleList": {"default": "mnist", "bundles": [_METADATA], "aliases": {"mnist@canary": "0123456789ab"}},
    "RepositoryQuery": {"ready": True},
    "RepositoryIndex": [{"name": "mnist", "version": "0123456789ab", "state": "READY", "reason": ""}],
    "RepositoryLoad": {},
    "RepositoryUnload": {},
    "ImagesRequest": {"model": "mnist", "prompt": "a handwritten 3", "n": 2, "size": "512x512"},
    "ImagesReply": {
        "created": 1796052464,
        "data": [{"b64_json": PIXEL}],
        "output_format": "png",
        "size": "512x512",
        "background": "opaque",
    },
    "ModelEntry": {"id": "mnist", "object": "model", "created": 1795528512, "owned_by": "gan-service"},
    "ModelList": {
        "object": "list",
        "data": [{"id": "mnist", "object": "model", "created": 1795528512, "owned_by": "gan-service"}],
    },
    "ServerMetadata": {"name": "gan-service", "version": "0.1.0", "extensions": ["binary_tensor_data"]},
    "ServerHealth": {"live": True, "ready": True},
    "ModelReady": {"name": "mnist", "ready": True},
    "ModelMetadata": {
        "name": "mnist.discriminator",
        "versions": ["0123456789ab"],
        "platform": "gan-service_safetensors",
        "inputs": [{"name": "images", "datatype": "UINT8", "shape": [-1, 28, 28, 1]}],
        "outputs": [{"name": "logit", "datatype": "FP32", "shape": [-1]}],
    },
    "InferRequest": {
        "inputs": [{"name": "seed", "datatype": "INT64", "shape": [1], "data": [7]}],
        "outputs": [{"name": "images", "parameters": {"binary_data": True}}],
    },
    "InferReply": {
        "model_name": "mnist.discriminator",
        "model_version": "0123456789ab",
        "outputs": [{"name": "logit", "datatype": "FP32", "shape": [1], "data": [2.59]}],
    },
}

# Of Triton's objects, which have no schema here.
MODEL_CONFIG = {
    "name": "mnist",
    "platform": "gan-service_safetensors",
    "max_batch_size": 0,
    "input": [{"name": "seed", "data_type": "TYPE_INT64", "dims": [1], "optional": True}],
    "output": [{"name": "images", "data_type": "TYPE_UINT8", "dims": [-1, 28, 28, 1]}],
}
MODEL_STATISTICS = {
    "model_stats": [
        {
            "name": "mnist",
            "version": "0123456789ab",
            "inference_count": 64,
            "execution_count": 2,
            "inference_stats": {"success": {"count": 4, "ns": 9000000}},
        }
    ]
}
