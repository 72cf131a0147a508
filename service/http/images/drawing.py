"""Has the engine draw the images of a sample request, of its seed or of the latents; and says what they come from."""

from models.bundle import Bundle
from models.inference.pixels import UInt8
from service.codecs.encode import SampleMetadata
from service.engine.model_manager import ModelManager, Timing
from service.http.images.resolving import SamplePlan


async def draw(
    manager: ModelManager, bundle: Bundle, plan: SamplePlan, deadline_s: float, *, is_accepted: bool = False
) -> tuple[UInt8, list[int] | None, Timing]:
    """The images, uint8 (count, h, w, c), their labels, and how long they took. Errors: see `Batcher.submit`."""
    if plan.latents is not None:
        images, timing = await manager.sample_latents(
            bundle,
            plan.latents,
            labels=plan.labels,
            truncation=plan.truncation,
            deadline_s=deadline_s,
            is_accepted=is_accepted,
        )
        return images, plan.labels, timing
    return await manager.sample(
        bundle,
        seed=plan.seed,
        first_index=plan.first_index,
        labels=plan.labels,
        count=plan.count,
        truncation=plan.truncation,
        deadline_s=deadline_s,
        is_accepted=is_accepted,
    )


def metadata_of(bundle: Bundle, plan: SamplePlan, labels: list[int] | None) -> SampleMetadata:
    """What the images come from, `labels` being theirs; latents that were given have no seed."""
    names = bundle.manifest.labels
    label_names = [names[label] for label in labels] if names and labels else None
    seed, first_index = (plan.seed, plan.first_index) if plan.latents is None else (None, None)
    return SampleMetadata(
        bundle.name,
        bundle.version,
        seed,
        first_index,
        labels,
        label_names,
        truncation=plan.truncation,
        is_marked=plan.is_marked,
        select="discriminator" if plan.is_selected else "none",
    )
