"""What the engine asks of the device that its nets run on. `Device` is a CPU; `service.engine.gpu` has the GPU."""

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch

from models.inference.fast_nets import FastGenerator
from models.inference.noise import Float32, Int64
from models.inference.pixels import UInt8
from models.spec import LatentSpec
from service.engine.batching.batch import DeviceFailed, OutOfMemory, Rows
from service.engine.payloads import SampleSlices, batch_latents
from service.machine.cpu import cpu_limit

Precision = Literal["float32", "tf32", "bfloat16"]
Call = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
MAX_BATCH_ROWS = 512
# The CPU's allocator, CUDA's runtime, and its libraries. None of them harms what is there already.
SHORT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "_ALLOC_FAILED")


class NoSuchPrecision(ValueError):  # noqa: N818 - as the errors of service.errors say it
    """The device can't compute in this precision."""


class DeviceErrors(contextlib.ContextDecorator):
    """Raises OutOfMemory or DeviceFailed in place of torch's errors that mean it.

    It is not a generator: since Python 3.12 contextlib's frame and an error that is thrown into it refer to each other,
    and would keep the batch's tensors until the garbage collector runs.
    """

    def __enter__(self) -> None:
        """Nothing."""

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Raise what the error means."""
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise OutOfMemory(str(error)) from None
        if not isinstance(error, RuntimeError):
            return
        text = str(error)
        if any(words in text for words in SHORT_OF_MEMORY):
            raise OutOfMemory(text) from None
        # "captur…": what is not allowed while another thread records a CUDA graph does the device no harm.
        if ("CUDA error" in text or "CUDA driver" in text) and "captur" not in text:
            raise DeviceFailed(text) from None


class Sampler(NamedTuple):
    """A generator with what it is given for each row.

    Attributes:
        net: (n, …) inputs and (n,) labels or None → pixels.
        levels: The same → uint8 (n, h, w, c).
        example: Inputs for the first images of `WARMUP_SEED`, one reference tile.
        draw: Inputs for a batch, as an array.
    """

    net: Call
    levels: Call
    example: torch.Tensor
    draw: Callable[[SampleSlices], Float32 | Int64]


class Device:
    """The CPU.

    It has an engine instance for each processor that it may use. Left to itself, torch would spread every operator of
    one batch over the processors and wait for the slowest at each operator's end, whatever the event loop or another
    program takes.

    Attributes:
        torch_device: As torch knows it.
        instances: Batches that it runs side by side, each on a thread of its own.
        loaders: Threads that may load bundles at once.
        max_batch_rows: Largest batch that any runner takes.
        shares_processor: Whether it has one processor, together with the event loop.
    """

    torch_device = torch.device("cpu")
    max_batch_rows = MAX_BATCH_ROWS

    def __init__(self, *, workers: int = 1, processors: int | None = None, precision: Precision = "float32") -> None:
        if precision == "tf32":
            raise NoSuchPrecision("there is no tf32 on cpu, but float32 and bfloat16")
        torch.set_num_threads(1)
        self.instances = self.loaders = max(1, min(cpu_limit(), processors or cpu_limit()) // workers)
        self.shares_processor = self.instances == 1

    @property
    def name(self) -> str:
        """As it stands in metrics and in the log."""
        return str(self.torch_device)

    def begin_thread(self) -> None:
        """Prepare the calling thread, which is to run batches."""

    def first_sizes(self, sizes: Sequence[int]) -> list[int]:  # noqa: ARG002 - for those that need them
        """Batches to run on a thread before its first request, for nets with tiles of these sizes."""
        return [1]

    def send(self, array: Float32 | Int64 | UInt8) -> torch.Tensor:
        """The array on the device."""
        return torch.from_numpy(array)

    def fetch(self, tensor: torch.Tensor) -> Rows:
        """The tensor as an array, once it is computed."""
        array: Rows = tensor.numpy()
        return array

    def sampler(self, latent: LatentSpec, generator: FastGenerator, latents: torch.Tensor) -> Sampler:
        """The generator of latents that clients give or the CPU draws; `latents` are the example."""
        return Sampler(generator, generator.levels, latents, partial(batch_latents, latent))

    def seed_sampler(
        self,
        latent: LatentSpec,  # noqa: ARG002 - for those that need them
        generator: FastGenerator,  # noqa: ARG002
        latents: torch.Tensor,  # noqa: ARG002
    ) -> Sampler | None:
        """The generator of what the device draws from seeds by itself; None where it leaves that to the CPU."""
        return None

    def image_call(self, sampler: Sampler, labels: torch.Tensor | None, sizes: Sequence[int]) -> Call:  # noqa: ARG002 - for those that need them
        """What makes uint8 images of a sampler's inputs, in batches of these sizes; `labels` are for its example."""
        return sampler.levels

    def verdict_call(
        self,
        net: Call,
        example: torch.Tensor,  # noqa: ARG002 - for those that need them
        labels: torch.Tensor | None,  # noqa: ARG002
        sizes: Sequence[int],  # noqa: ARG002
    ) -> Call:
        """What judges images or finds their latents, in batches of these sizes."""
        return net

    def release_unused_memory(self) -> None:
        """Give memory back that is kept for later."""

    def memory(self) -> dict[str, int]:
        """Bytes of the device's own memory that torch holds, by kind; a CPU has none."""
        return {}
