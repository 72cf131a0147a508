"""A bundle's nets as a device runs them fastest: on a CPU by onnxruntime, else by torch.

By torch run nets on a GPU, those in bfloat16, and those that are too large for a graph. What computes graphs of nets
that were trained elsewhere takes few rows at a time where one row's values are large.

onnxruntime takes from a fifth to two thirds less time than torch for a few rows, and no more for many; a row's bits
do not depend on how many there are, down to one; and a batch is one call that does not return to the interpreter, so
that it need not wait for a busy event loop at every layer (docs/decisions/onnxruntime-on-cpus.md).
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import onnxruntime
import torch
from torch import Tensor, nn

from models.inference.bfloat16 import in_bfloat16
from models.inference.onnx_nets import discriminator_graph, encoder_graph, fits_graph, generator_graph
from models.inference.pixels import grey_levels
from models.networks import Discriminator, Encoder, Generator, GraphDiscriminator, GraphNet

MOST_NUMBERS = 2**26  # in the values of all rows that a graph computes at once: 256 MiB


class FastGenerator(Protocol):
    """G, ready to run."""

    def __call__(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """(n, dim) latents and (n,) labels or None → (n, c, h, w) pixels in [0, 1]."""
        ...

    def levels(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """The same as uint8 (n, h, w, c)."""
        ...


class FastDiscriminator(Protocol):
    """D, ready to run."""

    def __call__(self, pixels: Tensor, labels: Tensor | None = None) -> Tensor:
        """See `Verdicts`."""
        ...


class FastEncoder(Protocol):
    """E, ready to run."""

    def __call__(self, pixels: Tensor, labels: Tensor | None = None) -> Tensor:
        """(n, c, h, w) pixels in [0, 1] → (n, dim + classes), as the module gives them. It needs no labels."""
        ...


def fast_generator(net: Generator, *, half: bool = False) -> FastGenerator:
    """G as its device runs it fastest; with `half`, with layers in bfloat16."""
    most_rows = most_rows_of(net)
    if half or not _is_for_onnxruntime(net):
        return _TorchGenerator(in_bfloat16(net) if half else net, most_rows)
    return _OnnxGenerator(generator_graph(net), most_rows)


def fast_discriminator(net: Discriminator, *, half: bool = False) -> FastDiscriminator:
    """D as its device runs it fastest; with `half`, with layers in bfloat16."""
    judges_each_class = isinstance(net, GraphDiscriminator) and net.classes
    if half or judges_each_class or not _is_for_onnxruntime(net):
        return Verdicts(in_bfloat16(net) if half else net)
    return _OnnxDiscriminator(discriminator_graph(net))


def fast_encoder(net: Encoder) -> FastEncoder:
    """E as its device runs it fastest; always in float32, for it is small."""
    run: Callable[[Tensor], Tensor] = net
    if _is_for_onnxruntime(net):
        session = _session(encoder_graph(net))

        def run(pixels: Tensor) -> Tensor:
            return _run(session, "codes", _fed("pixels", pixels, None))

    most_rows = most_rows_of(net)

    def encode(pixels: Tensor, labels: Tensor | None = None) -> Tensor:
        return _in_parts(lambda rows, _: run(rows), most_rows, pixels, labels)

    return encode


class Verdicts(nn.Module):
    """All that D says of images, in one tensor whose bits can be compared.

    (n, 1) logits without labels; with them (n, 2 + classes): the logit, the label that it is for, each class's score. A
    label of −1 is unknown, and becomes the likeliest one.
    """

    def __init__(self, discriminator: Discriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Tensor:
        """See the class."""
        if labels is None:
            logits: Tensor = self.discriminator(pixels)
            return logits[:, None]
        logits, labels, scores = self.discriminator.judge(pixels, labels)
        return torch.cat([logits[:, None], labels[:, None].to(scores.dtype), scores], dim=1)


class _TorchGenerator(nn.Module):
    def __init__(self, generator: Generator, most_rows: int) -> None:
        super().__init__()
        self.generator = generator
        self.most_rows = most_rows

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return _in_parts(self.generator, self.most_rows, latents, labels)

    def levels(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return grey_levels(self(latents, labels))


class _OnnxGenerator:
    def __init__(self, graph: bytes, most_rows: int) -> None:
        self._session = _session(graph)
        self._most_rows = most_rows

    def __call__(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self._made("pixels", latents, labels)

    def levels(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self._made("levels", latents, labels)

    def _made(self, output: str, latents: Tensor, labels: Tensor | None) -> Tensor:
        def run(rows: Tensor, labels: Tensor | None) -> Tensor:
            return _run(self._session, output, _fed("latents", rows, labels))

        return _in_parts(run, self._most_rows, latents, labels)


class _OnnxDiscriminator:
    def __init__(self, graph: bytes) -> None:
        self._session = _session(graph)

    def __call__(self, pixels: Tensor, labels: Tensor | None = None) -> Tensor:
        return _run(self._session, "verdicts", _fed("pixels", pixels, labels))


def most_rows_of(net: nn.Module) -> int:
    """Rows that a net takes at a time, so that its largest values stay within `MOST_NUMBERS`."""
    largest = net.largest if isinstance(net, GraphNet | Encoder) else 0
    return max(1, MOST_NUMBERS // largest) if largest else MOST_NUMBERS


def _in_parts(
    run: Callable[[Tensor, Tensor | None], Tensor], most_rows: int, rows: Tensor, labels: Tensor | None
) -> Tensor:
    if len(rows) <= most_rows:
        return run(rows, labels)
    parts = [slice(start, start + most_rows) for start in range(0, len(rows), most_rows)]
    return torch.cat([run(rows[part], None if labels is None else labels[part]) for part in parts])


def _session(graph: bytes) -> onnxruntime.InferenceSession:
    """The graph as onnxruntime runs it, on the calling thread: several threads may each run a batch."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    # Its own allocator keeps what the largest batch ever took.
    options.enable_cpu_mem_arena = False
    options.log_severity_level = 4  # nothing: errors are raised
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - its errors have no class in common
        raise RuntimeError(str(error)) from None


def _fed(source: str, rows: Tensor, labels: Tensor | None) -> Mapping[str, object]:
    fed = {source: rows.numpy()}
    return fed if labels is None else {**fed, "labels": labels.numpy()}


def _run(session: onnxruntime.InferenceSession, output: str, fed: Mapping[str, object]) -> Tensor:
    """Run a batch.

    Raises:
        MemoryError: There is not enough.
        RuntimeError: Any other error, in onnxruntime's words.
    """
    try:
        (found,) = session.run([output], fed)
    except Exception as error:  # noqa: BLE001 - its errors have no class in common
        kind = MemoryError if "alloc" in str(error) else RuntimeError
        raise kind(str(error)) from None
    return torch.from_numpy(found)


def _is_for_onnxruntime(net: nn.Module) -> bool:
    return next(net.parameters()).device.type == "cpu" and fits_graph(net)
