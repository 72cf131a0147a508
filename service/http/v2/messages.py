"""What the protocol's requests and replies hold. Unknown fields are ignored, as its clients expect."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, RootModel

from service.http.schemas import Reply, Schema

_MAX_AXES = 8


def _without_nulls(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if value is not None}


Parameters = Annotated[dict[str, Any], AfterValidator(_without_nulls)]  # of the protocol's requests


class Message(Schema):
    """Base of the protocol's requests: unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")


class InputTensor(Message):
    """An input: its numbers are in `data`, or after the JSON where the parameter `binary_data_size` is set."""

    name: str = Field(max_length=256, description="Which input.", examples=["seed"])
    shape: list[int] = Field(max_length=_MAX_AXES, fail_fast=True, description="Its axes.", examples=[[1]])
    datatype: str = Field(max_length=16, description="INT64, FP32, UINT8, or BYTES for names.", examples=["INT64"])
    parameters: Parameters = Field(default={}, description="`binary_data_size`: its bytes after the JSON.")
    data: Any = Field(
        None,
        description="Its elements in row-major order, flat or nested; at most 131072 of all inputs together.",
        examples=[[7]],
    )


class RequestedOutput(Message):
    """An output that the client wants."""

    name: str = Field(max_length=256, description="Which output.", examples=["images"])
    parameters: Parameters = Field(default={}, description="`binary_data`: whether to send it after the JSON.")


class InferRequest(Message):
    """A request to run a model."""

    id: str | None = Field(None, max_length=1024, description="Comes back with the reply.")
    parameters: Parameters = Field(
        default={},
        description="`binary_data_output`: send outputs after the JSON. `timeout`: microseconds that the request may "
        "take. For a generator also the inputs of one element. Others are ignored.",
        examples=[{"count": 2}],
    )
    inputs: list[InputTensor] = Field(default=[], max_length=32, fail_fast=True, description="The inputs.")
    outputs: list[RequestedOutput] | None = Field(
        None, max_length=32, fail_fast=True, description="The outputs that are wanted. Default: all."
    )


class TensorMetadata(Reply):
    """An input or output of a model."""

    name: str
    datatype: str
    shape: list[int] = Field(description="−1 stands for any number.")


class ServerMetadata(Reply):
    """The service, and the extensions of the protocol that it has."""

    name: str
    version: str
    extensions: list[str]


class ServerHealth(Reply):
    """Whether the service is alive and ready. Under both keys, as clients differ in which they read."""

    live: bool
    ready: bool


class ModelReady(Reply):
    """Whether a model can be asked now."""

    name: str
    ready: bool


class ModelMetadata(Reply):
    """A model, its versions, and what goes in and out."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class OutputTensor(TensorMetadata):
    """An output: its numbers are in `data`, or after the JSON where the parameter `binary_data_size` is set."""

    parameters: dict[str, Any] = Field(default={}, description="`binary_data_size`: its bytes after the JSON.")
    data: list[float] | None = Field(None, description="Its elements in row-major order, flat.")


class InferReply(Reply):
    """What a model gave."""

    # Written by `tensors.encode_reply`.
    id: str | None = Field(None, description="As in the request; left out where it had none.")
    model_name: str
    model_version: str
    parameters: dict[str, Any] = Field(default={}, description="Of a generator: the `seed` and `first_index`.")
    outputs: list[OutputTensor]


class RepositoryQuery(Message):
    """Which bundles of the repository to list."""

    ready: bool = Field(default=False, description="List only what requests can ask for.")


def _refuse_files(parameters: dict[str, Any]) -> dict[str, Any]:
    """Refuse to take a bundle's contents from a request."""
    for name in parameters:
        if name == "config" or name.startswith("file:"):
            raise ValueError(f"{name[:100]} is not taken: a bundle is loaded as its folder is")
    return parameters


class RepositoryLoad(Message):
    """A load request. It needs no parameters: the bundle's manifest says all that is needed."""

    parameters: Annotated[Parameters, AfterValidator(_refuse_files)] = Field(
        default={}, description="`config` and `file:…` are refused, others ignored."
    )


class UnloadParameters(Message):
    """Parameters that the protocol's clients send."""

    unload_dependents: bool = Field(default=False, description="Ignored: no bundle depends on another.")


class RepositoryUnload(Message):
    """An unload request; its parameters are ignored."""

    parameters: UnloadParameters = Field(default=UnloadParameters(), description="Accepted for the protocol's clients.")


class RepositoryEntry(Reply):
    """A version of a bundle. Where a manifest can't be used, `name` is its folder's and `version` is empty."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str = Field(description="Why it is unavailable.")


class RepositoryIndex(RootModel[list[RepositoryEntry]]):
    """Every version of every bundle, and every folder whose manifest can't be used."""
