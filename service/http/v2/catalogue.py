"""The models that the protocol's clients know: each bundle's two nets, with their inputs and outputs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from models.bundle import DISCRIMINATOR, GENERATOR, Bundle
from service.engine.bundles.index import Version
from service.errors import UnknownBundle
from service.http.v2.messages import ModelMetadata, TensorMetadata

SUFFIX = ".discriminator"
PLATFORM = "gan-service_safetensors"
ANY = -1  # an axis of any length


class Model(NamedTuple):
    """One net of a bundle, as a model of the protocol."""

    bundle: Bundle | Version
    is_discriminator: bool

    @property
    def name(self) -> str:
        """The bundle's name, with a suffix for its discriminator."""
        return self.bundle.name + SUFFIX * self.is_discriminator

    @property
    def operation(self) -> str:
        """What metrics call its work."""
        return "discriminate" if self.is_discriminator else "sample"

    @property
    def inputs(self) -> list[TensorMetadata]:
        """Its inputs."""
        labels = [] if self.bundle.manifest.labels is None else [_tensor("labels", "INT64", ANY)]
        if self.is_discriminator:
            return [self._images(), *labels]
        scalars = [_tensor(name, "INT64", 1) for name in ("seed", "first_index", "count")]
        latents = _tensor("latents", "FP32", ANY, self.bundle.manifest.latent.dim)
        return [*scalars, *labels, _tensor("truncation", "FP32", 1), latents]

    @property
    def outputs(self) -> list[TensorMetadata]:
        """Its outputs."""
        if self.is_discriminator:
            return [_tensor(name, "FP32", ANY) for name in ("probability_real", "logit")]
        return [self._images()]

    def _images(self) -> TensorMetadata:
        image = self.bundle.manifest.image
        return _tensor("images", "UINT8", ANY, image.height, image.width, image.channels)


def _tensor(name: str, datatype: str, *shape: int) -> TensorMetadata:
    return TensorMetadata(name=name, datatype=datatype, shape=list(shape))


def split_name(name: str, version: str | None) -> tuple[str, bool]:
    """What a model's name and version mean: the bundle, as `name` or `name@version`, and whether its D is meant."""
    bundle = name.removesuffix(SUFFIX)
    return bundle if version is None else f"{bundle}@{version}", name.endswith(SUFFIX)


def model_of(bundle: Bundle | Version, *, is_discriminator: bool) -> Model:
    """A bundle's net as a model.

    Raises:
        UnknownBundle: It has no discriminator.
    """
    model = Model(bundle, is_discriminator)
    if model not in models_of(bundle):
        raise UnknownBundle(model.name, [one.name for one in models_of(bundle)])
    return model


def models_of(bundle: Bundle | Version) -> list[Model]:
    """A bundle's nets as models."""
    has_discriminator = DISCRIMINATOR in bundle.manifest.files
    return [Model(bundle, is_discriminator=False), *([Model(bundle, is_discriminator=True)] * has_discriminator)]


def metadata(model: Model, versions: list[str]) -> ModelMetadata:
    """What the protocol's clients want to know of a model."""
    inputs, outputs = model.inputs, model.outputs
    return ModelMetadata(name=model.name, versions=versions, platform=PLATFORM, inputs=inputs, outputs=outputs)


def config(model: Model) -> Mapping[str, Any]:
    """The same as Triton's model configuration, which some clients ask for in its place."""
    required = {"images"} if model.is_discriminator else set()
    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": "gan-service",
        "version_policy": {"all": {}},
        "max_batch_size": 0,  # shapes are whole: no axis is put in front of them
        "input": [_config(tensor) | {"optional": tensor.name not in required} for tensor in model.inputs],
        "output": [_config(tensor) for tensor in model.outputs],
        "default_model_filename": DISCRIMINATOR if model.is_discriminator else GENERATOR,
        "parameters": {},
    }


def _config(tensor: TensorMetadata) -> dict[str, Any]:
    return {"name": tensor.name, "data_type": f"TYPE_{tensor.datatype}", "dims": tensor.shape}
