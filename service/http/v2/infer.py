"""Runs a model for a client of the protocol: translates its tensors to what `/sample` and `/discriminate` do.

A generator's inputs of one element may also be parameters. The reply's parameters have the seed, so that the same
images can be asked for again.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from models.bundle import Bundle
from models.inference.noise import Float32
from models.inference.pixels import UInt8
from service.engine.model_manager import Timing
from service.errors import Invalid, Malformed, TooLarge
from service.http.images.discriminate import judge
from service.http.images.drawing import draw
from service.http.images.given_latents import check_latents
from service.http.images.resolving import resolve_labels, resolve_sample
from service.http.requests.parsing import validate
from service.http.requests.request_context import RequestContext
from service.http.requests.responses import JSON, BytesResponse
from service.http.requests.route_context import Deadline, RouteContext, content_encoding, read_body
from service.http.schemas import Label, Labels, SampleRequest
from service.http.v2.catalogue import Model, model_of, split_name
from service.http.v2.compression import ENCODINGS, decompress
from service.http.v2.messages import RequestedOutput
from service.http.v2.tensors import (
    ADVICE,
    BYTES,
    HEADER,
    MAX_JSON_BYTES,
    Array,
    Request,
    Tensor,
    check_json_output,
    encode_reply,
    read_request,
)

BINARY = "application/octet-stream"
PARAMETERS = ("seed", "first_index", "count", "labels", "truncation")  # of a generator, of one element
_HEADER_KEY = HEADER.lower().encode()


class Answer(NamedTuple):
    """What a model gave: its outputs by name, and the parameters of the reply."""

    outputs: Mapping[str, Array]
    parameters: Mapping[str, int]
    timing: Timing


async def infer(context: RouteContext, request: RequestContext, name: str, version: str | None) -> BytesResponse:
    """Read the body, run the model, and write the reply."""
    deadline = Deadline(request, context.settings)
    json_length = request.header(_HEADER_KEY)
    body = await _read(context, request, deadline, is_json=json_length is None)
    steps = read_request(body, json_length, context.settings.max_count)
    asked, decode_s = await context.decode(steps, deadline)
    _shorten(deadline, asked.head.parameters)
    named, is_discriminator = split_name(name, version)
    bundle = await context.find(named, deadline)
    model = model_of(bundle, is_discriminator=is_discriminator)
    wanted = _wanted_outputs(model, asked)
    run = _discriminate if is_discriminator else _sample
    answer = await run(context, request, bundle, asked, wanted, deadline)
    head = {"model_name": model.name, "model_version": bundle.version, "parameters": answer.parameters}
    if asked.head.id is not None:
        head["id"] = asked.head.id
    outputs = {name: (answer.outputs[name], is_binary) for name, is_binary in wanted.items()}
    (content, written), encode_s = await context.decode(encode_reply(head, outputs), deadline)
    deadline.left_s()  # raises if the deadline has passed
    timing = answer.timing
    headers = request.took(decode=decode_s, queue=timing.queue_s, compute=timing.compute_s, encode=encode_s)
    if written is None:
        return BytesResponse(content, headers, JSON)
    return BytesResponse(content, headers | {_HEADER_KEY: b"%d" % written}, BINARY)


async def _read(context: RouteContext, request: RequestContext, deadline: Deadline, *, is_json: bool) -> bytes:
    """Read a body. If one that is JSON alone is too large, the client learns of the binary-data extension."""
    most = min(context.settings.max_body_bytes, MAX_JSON_BYTES) if is_json else context.settings.max_body_bytes
    try:
        request.limit_body(most)
        sent = await read_body(request, deadline, ENCODINGS)
        steps = decompress(sent, content_encoding(request), most, request.reserve_body)
        body, _ = await context.decode(steps, deadline)
    except TooLarge as error:
        raise TooLarge(f"{error.detail} {ADVICE}") if is_json else error from None
    return body


def _shorten(deadline: Deadline, parameters: Mapping[str, Any]) -> None:
    """Obey the parameter `timeout`, in microseconds; 0 is none."""
    timeout = parameters.get("timeout")
    if timeout is None:
        return
    if type(timeout) is not int or timeout < 0:
        raise Invalid("parameters: timeout must be a whole number of microseconds.")
    if timeout > 0:
        deadline.shorten(min(timeout, 10**12) / 1e6)


def _wanted_outputs(model: Model, asked: Request) -> dict[str, bool]:
    """The outputs to send, each with whether in binary."""
    known = [output.name for output in model.outputs]
    is_binary = asked.raw is not None or _flag(asked.head.parameters, "binary_data_output", default=False)
    if not asked.head.outputs:
        return dict.fromkeys(known, is_binary)
    wanted: dict[str, bool] = {}
    for output in asked.head.outputs:
        _check_output(output, known, wanted)
        wanted[output.name] = _flag(output.parameters, "binary_data", default=is_binary)
    return wanted


def _check_output(output: RequestedOutput, known: Iterable[str], wanted: Mapping[str, bool]) -> None:
    if output.name not in known:
        raise Invalid(f"outputs: there is no {output.name[:100]!r}; there is {', '.join(known)}.")
    if output.name in wanted:
        raise Invalid(f"outputs: {output.name!r} is asked for twice.")
    for name in output.parameters:
        if name == "classification" or name.startswith("shared_memory"):
            raise Invalid(f"outputs: {output.name}: {name} is not supported.")


def _flag(parameters: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = parameters.get(name)
    if value is None:
        return default
    if type(value) is not bool:
        raise Invalid(f"parameters: {name} must be true or false.")
    return value


async def _sample(
    context: RouteContext,
    request: RequestContext,
    bundle: Bundle,
    asked: Request,
    wanted: Mapping[str, bool],
    deadline: Deadline,
) -> Answer:
    """Draw images from the generator."""
    if asked.raw is not None:
        raise Malformed(f"{HEADER}: 0 is for models that have one input; send JSON before the tensors.")
    manifest, settings = bundle.manifest, context.settings
    fields, latents = _fields(asked, settings.max_count)
    options = validate(SampleRequest, fields | {"format": "json"}, strict=True)  # which bounds the pixels
    if latents is not None:
        check_latents(options, latents, manifest.latent, settings.max_count)
    plan = resolve_sample(options, manifest.image, manifest.labels, None, settings, latents)
    size = plan.count * manifest.image.size
    if not wanted["images"]:
        check_json_output(size)
    request.works_on(bundle, plan.count)
    context.manager.batcher.admit(plan.count)
    request.reserve_reply(size)
    images, _, timing = await deadline.wait_for(draw(context.manager, bundle, plan, deadline.left_s()))
    made_by = {"seed": plan.seed, "first_index": plan.first_index} if latents is None else {}
    return Answer({"images": images}, made_by, timing)


def _fields(asked: Request, max_count: int) -> tuple[dict[str, Any], Float32 | None]:
    """The fields of a request to `/sample` that the inputs and parameters mean, and the latents if there are any."""
    parameters = asked.head.parameters
    fields = {name: parameters[name] for name in PARAMETERS if name in parameters}
    inputs = dict(asked.inputs)
    latents = inputs.pop("latents", None)
    for name, tensor in inputs.items():
        if name not in PARAMETERS:
            raise Invalid(f"inputs: there is no {name[:100]!r}; there is {', '.join((*PARAMETERS, 'latents'))}.")
        if name in fields:
            raise Invalid(f"{name}: given both as an input and as a parameter.")
        fields[name] = _labels(tensor, max_count) if name == "labels" else _scalar(name, tensor)
    return fields, None if latents is None else _latents(latents)


def _scalar(name: str, tensor: Tensor) -> int | float:
    datatype = "FP32" if name == "truncation" else "INT64"
    values = _check(name, tensor, datatype)
    if values.size != 1:
        raise Invalid(f"{name}: has {values.size} elements; send 1.")
    number: int | float = values.item()
    return number


def _labels(tensor: Tensor, max_count: int) -> Labels:
    """Labels by index, or by name."""
    given = tensor.values if isinstance(tensor.values, list) else _check("labels", tensor, "INT64").reshape(-1)
    if len(given) > max_count:
        raise Invalid(f"labels: {len(given)} labels; one request may bring {max_count}.")
    labels: list[Label] = [*given] if isinstance(given, list) else given.tolist()
    return labels


def _latents(tensor: Tensor) -> Float32:
    latents = _check("latents", tensor, "FP32")
    if latents.ndim != 2:
        raise Invalid(f"latents: has {latents.ndim} axes; send [n, dim].")
    return latents


def _check(name: str, tensor: Tensor, datatype: str) -> Array:
    """The values of an input of this datatype."""
    if tensor.datatype != datatype or isinstance(tensor.values, list):
        raise Invalid(f"{name}: is {tensor.datatype}; send {datatype}{f' or {BYTES}' if name == 'labels' else ''}.")
    return tensor.values


async def _discriminate(
    context: RouteContext,
    request: RequestContext,
    bundle: Bundle,
    asked: Request,
    wanted: Mapping[str, bool],  # noqa: ARG001 - both are known at once, and small
    deadline: Deadline,
) -> Answer:
    """Judge images by the discriminator."""
    images, labels = _images(context, bundle, asked)
    request.works_on(bundle, len(images))
    classes = resolve_labels(labels, bundle.manifest.labels, len(images))
    context.manager.batcher.admit(len(images))
    verdicts, timing = await judge(context, bundle, images, classes, deadline)
    outputs = {"probability_real": verdicts.probabilities_real.astype(np.float32), "logit": verdicts.logits}
    return Answer(outputs, {}, timing)


def _images(context: RouteContext, bundle: Bundle, asked: Request) -> tuple[UInt8, Labels]:
    """The images of a request, and their labels if it has any."""
    image = bundle.manifest.image
    shape = image.height, image.width, image.channels
    inputs = dict(asked.inputs)
    if asked.raw is not None:
        if len(asked.raw) != image.size:
            raise Invalid(f"images: the body has {len(asked.raw)} bytes; one image has {image.size}.")
        inputs["images"] = Tensor("UINT8", np.frombuffer(asked.raw, np.uint8).reshape(1, *shape))
    if unknown := inputs.keys() - {"images", "labels"}:
        raise Invalid(f"inputs: there is no {min(unknown)[:100]!r}; there is images, labels.")
    if "images" not in inputs:
        raise Invalid("inputs: images is missing.")
    images = _check("images", inputs["images"], "UINT8")
    if images.ndim != 4 or images.shape[1:] != shape:
        raise Invalid(f"images: has shape {list(images.shape)}; send [n, {', '.join(map(str, shape))}].")
    if len(images) > context.settings.max_count:
        raise Invalid(f"images: {len(images)} images; one request may bring {context.settings.max_count}.")
    return images, _labels(inputs["labels"], context.settings.max_count) if "labels" in inputs else None
