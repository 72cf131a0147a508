"""Has the engine draw the images of a sample request, of its seed or of the latents that it brought."""

from models.bundle import Bundle
from models.inference.pixels import UInt8
from service.engine.model_manager import ModelManager, Timing
from service.http.resolving import SamplePlan


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
