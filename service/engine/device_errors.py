"""Which errors mean that a device's memory is short, and which that the device is lost."""

import contextlib

import torch

from service.engine.batch import DeviceFailed, OutOfMemory

# The CPU's allocator, CUDA's runtime, and its libraries. None of them harms what is there already.
SHORT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "_ALLOC_FAILED")


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
