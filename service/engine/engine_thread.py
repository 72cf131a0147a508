"""Threads that run batches and load bundles for an event loop."""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import torch

from service.engine.batching.batch import DeviceFailed, Then

T = TypeVar("T")


class EngineThread:
    """A thread that runs one function after another for an event loop.

    It is a daemon, so that a call that never returns can't keep the process from ending. It is in torch's inference
    mode: nothing on it needs gradients.

    Args:
        name: Of the thread.
        begin: What it does first.
    """

    def __init__(self, name: str, begin: Callable[[], None] | None = None) -> None:
        self._begin = begin
        self._inbox: queue.SimpleQueue[_Call[Any] | None] = queue.SimpleQueue()
        self._has_ended = False
        self._began: float | None = None  # when the running call did
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._thread.start()

    def run(self, function: Callable[..., T], *arguments: Any) -> "asyncio.Future[T]":
        """Call on the thread; the future belongs to the running loop. Cancelling it does not stop the call.

        The future raises what the function raises; DeviceFailed where the thread has ended, or ends before its turn.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.call(function, arguments, partial(settle, future))
        return future

    def call(self, function: Callable[..., T], arguments: Sequence[Any], then: Then[T]) -> None:
        """As `run`, but `then` is called with the outcome, on the running loop: sooner than whoever awaits a future."""
        self._inbox.put(_Call(function, arguments, then))
        if self._has_ended:
            self._refuse_rest()

    def busy_s(self) -> float:
        """Seconds since the running call began; 0 when none runs."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def is_alive(self) -> bool:
        """Whether the thread can still take calls."""
        return not self._has_ended

    def stop(self) -> None:
        """End after the calls that were sent before. Does not wait."""
        self._inbox.put(None)

    def _main(self) -> None:
        # Makes this thread use the number of torch's threads that was set. A new thread would do so only at its first
        # large operator, and until then MKL would divide sums among all processors, which changes their last bits.
        torch.get_num_threads()
        try:
            with torch.inference_mode():
                self._run_calls()
        finally:
            # In this order: `run` puts its call first and looks at the flag then, so one of the two finds every call.
            self._has_ended = True
            self._refuse_rest()

    def _run_calls(self) -> None:
        if self._begin is not None:
            self._begin()
        while (call := self._inbox.get()) is not None:
            self._began = time.monotonic()
            outcome = _outcome(call.function, call.arguments)
            self._began = None
            call.finish(*outcome)
            del call, outcome  # or both would be kept, payloads and answer, until the next call comes

    def _refuse_rest(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                call = self._inbox.get_nowait()
                if call is not None:
                    call.finish(None, DeviceFailed("the engine's thread has ended"))


class _Call(Generic[T]):
    """A function to call on the thread, and what the loop is to do with its outcome."""

    def __init__(self, function: Callable[..., T], arguments: Sequence[Any], then: Then[T]) -> None:
        self.function = function
        self.arguments = arguments
        self._then = then
        self._loop = asyncio.get_running_loop()

    def finish(self, result: T | None, error: Exception | None) -> None:
        """Hand over the error, or the result where there is none. From any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._then, result, error)


def settle(future: "asyncio.Future[Any]", result: object, error: Exception | None) -> None:
    """End a future with the error, or the result where there is none."""
    if future.done():  # its caller has left meanwhile
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def _outcome(function: Callable[..., T], arguments: Sequence[Any]) -> tuple[T | None, Exception | None]:
    """What a call returns, or raises.

    The error's traceback holds this frame, and those below it with the batch's tensors. So nothing here may refer to
    the error, nor to the future that will hold it: such a cycle would stay until the garbage collector runs.
    """
    try:
        return function(*arguments), None
    except BaseException as error:  # noqa: BLE001 - it belongs to the caller, and the thread lives on
        return None, _for_future(error)


def _for_future(error: BaseException) -> Exception:
    """The error in a form that a future takes: some would end whoever awaits them, and StopIteration is refused."""
    if isinstance(error, Exception) and not isinstance(error, StopIteration):
        return error
    stand_in = RuntimeError(f"the call ended with {error!r}")
    stand_in.__cause__ = error
    return stand_in
