"""Fine-tuning: a run that begins with the weights of a bundle instead of random ones.

Both nets must be those of the bundle, tensor by tensor. Only what holds numbers for each class may grow: a class that
the bundle knows by name keeps its numbers, wherever it stands now, and a new one begins as it would without a bundle.
The optimisers begin anew, and so do the schedules.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from models.bundle import Bundle
from models.training.trainer import State, TrainingError

# Along which axis a tensor has a row for each class. The perceptrons take a label as numbers behind the others.
CLASS_AXES = {
    "embedding.weight": 0,
    "class_head.weight": 0,
    "class_head.bias": 0,
    "layers.0.weight": 1,
    "layers.0.linear.weight": 1,
}


def begin_with(state: State, bundle: Bundle, label_names: Sequence[str]) -> list[str]:
    """Give both nets, and the average of G, the bundle's weights; returns the classes that it does not know.

    Args:
        state: Of a run without a step yet.
        bundle: To begin with.
        label_names: Of the data.

    Raises:
        TrainingError: A tensor does not fit, and it says which; or the bundle has no discriminator.
    """
    if bundle.judge is None:
        raise TrainingError(f"--init: {bundle.name} has no discriminator, and a run needs both nets")
    known, now = bundle.manifest.labels or (), tuple(label_names) if state.classes else ()
    rows = {now.index(name): known.index(name) for name in known if name in now}
    for kind, net, there in (
        ("generator", state.generator, bundle.generator),
        ("discriminator", state.discriminator, bundle.judge),
    ):
        try:
            _copy(net, there.state_dict(), rows, len(known), len(now))
        except ValueError as error:
            raise TrainingError(
                f"--init: {bundle.name} does not fit: its {kind}'s {error}. It makes images of "
                f"{bundle.manifest.image.shape} by {bundle.manifest.network.family} nets for {len(known)} classes; "
                f"here they are of {state.image.shape}, by {state.options.network.family} nets for {len(now)}"
            ) from None
    if state.average is not None:
        state.average.load_state_dict(state.generator.state_dict())
    return [name for name in now if name not in known]


@torch.no_grad()
def _copy(net: nn.Module, tensors: Mapping[str, Tensor], rows: Mapping[int, int], known: int, now: int) -> None:
    """Overwrite a net's tensors; of those with a row for each class, the rest and the rows, `{here: there}`.

    Raises:
        ValueError: A tensor does not fit.
    """
    here = net.state_dict()
    for name in (*here, *sorted(tensors.keys() - here.keys())):
        if name not in tensors or name not in here:
            raise ValueError(f"{name} is {'missing' if name in here else 'one too many'}")
        to, source = here[name], tensors[name]
        axis, wanted = CLASS_AXES.get(name), list(to.shape)
        if axis is not None:
            wanted[axis] += known - now
        if list(source.shape) != wanted:
            raise ValueError(f"{name} is {_shape(source)}, and not {'×'.join(map(str, wanted))}")
        if axis is None:
            to.copy_(source)
            continue
        if known > now:
            raise ValueError(f"{name} has {known} classes, and the data {now}: it may gain some, but lose none")
        first = to.shape[axis] - now
        to.narrow(axis, 0, first).copy_(source.narrow(axis, 0, first))
        for place, before in rows.items():
            to.select(axis, first + place).copy_(source.select(axis, first + before))


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape))
