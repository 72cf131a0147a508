"""Nets that were trained elsewhere: graphs of a closed table's operators, checked whole before anything is computed.

A graph comes from a manifest, which anyone can have written. Building one refuses it, with the node named, unless each
node is an operator of the table with fitting inputs and attributes, every value is made once and before it is read, and
the last one is the net's result. Shapes are then computed for two rows without any numbers: each result has at most
`MOST_NUMBERS` for a row, and the last has the image's shape. So what is run later takes the time and the memory of the
operators that the manifest shows, and ends.

On a CPU a graph runs in onnxruntime, as all nets do; here it is computed by torch, for GPUs and in bfloat16.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from models.networks.operators import OPERATORS, GraphError
from models.spec import GraphBody, GraphNode, ImageSpec, LatentSpec

MOST_NUMBERS = 2**26  # of one row in one value: 256 MiB
MOST_WEIGHTS = 2**29  # numbers: 2 GiB
IN_BFLOAT16 = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_ROWS = 2  # of the values whose shapes are computed


class GraphNet(nn.Module):
    """A graph as a module: weights are its parameters, under the names that the graph gives them.

    `largest` is how many numbers a row has in the largest of its values.
    """

    def __init__(self, body: GraphBody, classes: int) -> None:
        super().__init__()
        self.body = body
        self.classes = classes
        self.is_half = False
        self.largest = 0
        if sum(math.prod(shape) for shape in body.weights.values()) > MOST_WEIGHTS:
            raise GraphError(f"the graph has more than {MOST_WEIGHTS} weights")
        for name, shape in body.weights.items():
            if hasattr(self, name):
                raise GraphError(f"{name} can't be the name of a weight")
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self._done_with = _last_readers(body)

    def halve(self) -> None:
        """From now on compute products and convolutions in bfloat16. Weights that only they read become so."""
        self.is_half = True
        readers: dict[str, set[str]] = {}
        for node in self.body.nodes:
            for name in node.inputs:
                readers.setdefault(name, set()).add(node.op)
        for name, weight in list(self.named_parameters()):
            if readers.get(name, {""}) <= IN_BFLOAT16:
                setattr(self, name, nn.Parameter(weight.to(torch.bfloat16), requires_grad=False))

    def run(self, values: dict[str, Tensor]) -> Tensor:
        """The last node's result, from the values of the inputs. A value is let go once nobody reads it any more."""
        for node, done_with in zip(self.body.nodes, self._done_with, strict=True):
            inputs = [values[name] if name in values else cast("Tensor", getattr(self, name)) for name in node.inputs]
            values[node.output] = self.compute(node, inputs)
            for name in done_with:
                values.pop(name, None)
        return values[self.body.nodes[-1].output]

    def compute(self, node: GraphNode, inputs: Sequence[Tensor]) -> Tensor:
        """One node's result."""
        if node.op == "Constant":
            return cast("Tensor", getattr(self, _buffer(node)))
        if self.is_half and node.op in IN_BFLOAT16:
            return OPERATORS[node.op].compute(*(x.to(torch.bfloat16) for x in inputs), **node.attributes).float()
        return OPERATORS[node.op].compute(*inputs, **node.attributes)

    @torch.no_grad()
    def infer(self, kinds: Mapping[str, torch.dtype]) -> tuple[int, ...]:
        """Check every node, and compute the result's shape for two rows, without any numbers.

        Raises:
            GraphError: See the module.
        """
        body = self.body
        known = {name: torch.empty(shape, device="meta") for name, shape in body.weights.items()}
        for one in body.inputs:
            if one.name in known:
                raise GraphError(f"{one.name} stands for two values")
            known[one.name] = torch.empty(_ROWS, *one.shape, dtype=kinds[one.role], device="meta")
        for node in body.nodes:
            with _named(node):
                known[node.output] = result = self._infer(node, known)
                numbers = -(-result.numel() // _ROWS)
                if numbers > MOST_NUMBERS:
                    raise GraphError(f"makes {numbers} numbers a row; the limit is {MOST_NUMBERS}")
                self.largest = max(self.largest, numbers)
        return tuple(known[body.nodes[-1].output].shape)

    def _infer(self, node: GraphNode, known: Mapping[str, Tensor]) -> Tensor:
        operator = OPERATORS.get(node.op)
        if operator is None:
            raise GraphError("there is no such operator")
        operator.check(len(node.inputs), node.attributes)
        if node.output in known:
            raise GraphError(f"{node.output} stands for two values")
        if missing := [name for name in node.inputs if name not in known]:
            raise GraphError(f"{missing[0]} is read before it is there")
        if node.op == "Constant":
            self.register_buffer(_buffer(node), operator.compute(**node.attributes), persistent=False)
        return operator.infer([known[name] for name in node.inputs], node.attributes)


class GraphGenerator(GraphNet):
    """G as a graph. A row's latents are followed by the numbers of its noise inputs."""

    def __init__(self, body: GraphBody, image: ImageSpec, latent: LatentSpec, classes: int) -> None:
        super().__init__(body, classes)
        self.image_shape = image.shape
        sizes = {role: _numbers_of(body, role) for role in ("latent", "label", "onehot", "noise", "image")}
        if sizes["image"] or sizes["latent"] != latent.dim or sizes["noise"] != latent.noise:
            raise GraphError(
                f"the graph takes other inputs than {latent.dim} latents and {latent.noise} numbers of noise"
            )
        _check_labels(body, classes)
        if (found := self.infer(_KINDS)) != (_ROWS, *image.shape):
            raise GraphError(f"the graph makes {found} of two rows, not {(_ROWS, *image.shape)}")

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """(n, dim + noise) numbers and (n,) labels → (n, c, h, w) pixels in [0, 1]."""
        values, start = _labels_of(self.body, labels, self.classes), 0
        for role in ("latent", "noise"):
            for one in self.body.inputs:
                if one.role == role:
                    stop = start + math.prod(one.shape)
                    values[one.name] = latents[:, start:stop].reshape(-1, *one.shape)
                    start = stop
        return self.run(values)


class GraphDiscriminator(GraphNet):
    """D as a graph. With classes its own verdict for each class says which one is the likeliest."""

    def __init__(self, body: GraphBody, image: ImageSpec, classes: int) -> None:
        super().__init__(body, classes)
        if [one.shape for one in body.inputs if one.role == "image"] != [image.shape]:
            raise GraphError(f"the discriminator does not take images {image.shape}")
        if any(one.role in {"latent", "noise"} for one in body.inputs):
            raise GraphError("a discriminator takes no latents")
        _check_labels(body, classes)
        if (found := self.infer(_KINDS)) != (_ROWS,):
            raise GraphError(f"the discriminator makes {found} of two rows, not a number for each")

    def forward(self, images: Tensor, labels: Tensor | None = None, dropout: torch.Generator | None = None) -> Tensor:
        """(n, c, h, w) pixels → (n,) logits. Nothing is dropped."""
        del dropout
        values = _labels_of(self.body, labels, self.classes)
        values |= {one.name: images for one in self.body.inputs if one.role == "image"}
        return self.run(values)

    def judge(
        self, images: Tensor, labels: Tensor, dropout: torch.Generator | None = None, *, detach: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (n,); the labels that they are for, where −1 becomes the likeliest; the logit of each class."""
        del dropout, detach
        scores = torch.stack([self(images, torch.full_like(labels, one)) for one in range(self.classes)], dim=1)
        known = torch.where(labels < 0, scores.argmax(dim=1), labels)
        return scores.gather(1, known[:, None])[:, 0], known, scores


_KINDS = dict.fromkeys(("latent", "onehot", "noise", "image"), torch.float32) | {"label": torch.int64}


def _numbers_of(body: GraphBody, role: str) -> int:
    """How many numbers a row of all inputs of a role has."""
    return sum(math.prod(one.shape) for one in body.inputs if one.role == role)


def _check_labels(body: GraphBody, classes: int) -> None:
    taken = [one for one in body.inputs if one.role in {"label", "onehot"}]
    if bool(taken) != bool(classes):
        raise GraphError("labels go with nets that take them")
    for one in taken:
        if math.prod(one.shape) != (classes if one.role == "onehot" else 1):
            raise GraphError(f"{one.name} is {one.shape}, and there are {classes} labels")


def _labels_of(body: GraphBody, labels: Tensor | None, classes: int) -> dict[str, Tensor]:
    """The values of the inputs that are made of labels (n,)."""
    if (labels is None) != (classes == 0):
        raise ValueError("labels are needed by nets with classes, and by no others")
    if labels is None:
        return {}
    hot = (labels[:, None] == torch.arange(classes, device=labels.device)).to(torch.float32)
    made = {"label": labels, "onehot": hot}
    return {one.name: made[one.role].reshape(-1, *one.shape) for one in body.inputs if one.role in made}


def _last_readers(body: GraphBody) -> list[set[str]]:
    """The values that each node is the last to read."""
    later = {body.nodes[-1].output}
    done: list[set[str]] = []
    for node in reversed(body.nodes):
        read = {*node.inputs, node.output}
        done.append(read - later)
        later |= read
    return done[::-1]


def _buffer(node: GraphNode) -> str:
    return f"constant {node.output}"


@contextmanager
def _named(node: GraphNode) -> Iterator[None]:
    """Name the node in an error that comes of it, whoever raises it."""
    try:
        yield
    except (GraphError, RuntimeError, IndexError, TypeError, ValueError, NotImplementedError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise GraphError(f"node {node.name or node.output} ({node.op}): {reason}") from None
