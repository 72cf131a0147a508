"""A GPU, with the same questions and answers as the CPU."""

from collections.abc import Sequence

import torch

from models.inference.fast_nets import FastGenerator
from models.inference.noise import Float32, Int64
from models.inference.pixels import UInt8, grey_levels
from models.spec import LatentSpec
from service.engine.batching.batch import Rows
from service.engine.device import Call, Device, NoSuchPrecision, Precision, Sampler
from service.engine.gpu.cuda_graphs import give_back, graphed
from service.engine.gpu.noise import device_sampler

INSTANCES = 2  # while the GPU computes one's batch, the other draws noise and copies
TENSOR_CORES = (8, 0)  # the least compute capability of a GPU that has tf32 and bfloat16


class GPU(Device):
    """One GPU.

    Args:
        device: Which one.
        exact: Whether its images have to agree with a CPU's; else it may draw its own noise.
        precision: Of the nets.
        cuda_graphs: Launch kernels as CUDA graphs.
    """

    max_batch_rows = 4096

    def __init__(self, device: torch.device, *, exact: bool, precision: Precision, cuda_graphs: bool) -> None:
        self.torch_device = device
        self.instances = INSTANCES
        self.loaders = 1
        self.shares_processor = False
        self.draws_noise = not exact
        self.has_graphs = cuda_graphs
        if precision != "float32" and device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            if capability < TENSOR_CORES:
                raise NoSuchPrecision(f"there is no {precision} on {self.name}, whose capability is {capability}")

    def begin_thread(self) -> None:
        """Have the calling thread launch on a stream of its own.

        torch takes streams of different priorities from different pools. Graphs are recorded on those of another one,
        so no other thread records what is launched here.
        """
        torch.cuda.set_stream(torch.cuda.Stream(self.torch_device, priority=-2))  # type: ignore[no-untyped-call]

    def first_sizes(self, sizes: Sequence[int]) -> list[int]:
        """All of them: each thread plans its convolutions, and each stream has memory of its own."""
        return list(sizes)

    def send(self, array: Float32 | Int64 | UInt8) -> torch.Tensor:
        """The array on the device, by pinned memory, which a GPU reads itself.

        Waits for the copy, so that no event is left to be recorded on a device that may be lost by then.
        """
        return torch.from_numpy(array).pin_memory().to(self.torch_device)

    def fetch(self, tensor: torch.Tensor) -> Rows:
        """The tensor as an array. Waits, for the same reason."""
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        pinned.copy_(tensor)
        array: Rows = pinned.numpy()
        return array

    def seed_sampler(self, latent: LatentSpec, generator: FastGenerator, latents: torch.Tensor) -> Sampler | None:
        """The generator of noise that the GPU draws, where it may and draws what a CPU does."""
        return device_sampler(latent, generator, latents) if self.draws_noise else None

    def image_call(self, sampler: Sampler, labels: torch.Tensor | None, sizes: Sequence[int]) -> Call:
        """As CUDA graphs, where they are on. They are compared before rounding to levels."""
        if not self.has_graphs:
            return sampler.levels
        graphs = graphed(sampler.net, sampler.example, labels, sizes)
        return lambda rows, labels: grey_levels(graphs(rows, labels))

    def verdict_call(self, net: Call, example: torch.Tensor, labels: torch.Tensor | None, sizes: Sequence[int]) -> Call:
        """As CUDA graphs, where they are on."""
        return graphed(net, example, labels, sizes) if self.has_graphs else net

    def release_unused_memory(self) -> None:
        """What warming took for this thread's stream, others can't use."""
        give_back(self.torch_device)

    def memory(self) -> dict[str, int]:
        """Bytes of the device's memory that torch holds."""
        return {
            "allocated": torch.cuda.memory_allocated(self.torch_device),
            "reserved": torch.cuda.memory_reserved(self.torch_device),
        }
