"""The processes of one run, its ranks, which torchrun starts: which rows each computes, and how they agree.

All ranks take the same steps, each on its part of the mini-batch. What is drawn (the order of the images, noise, masks
of dropout) is drawn for all rows on every rank, which keeps its own, and the gradients are averaged before the
optimisers see them. So several ranks compute what one process does, but for the order of sums; and as each makes the
same update of the same weights, nothing but gradients need be sent. DistributedDataParallel would not do: it averages
in `backward()`, and where gradients come from `torch.autograd.grad` it does nothing, and does not say so.

Rank 0 leads. It alone reads and writes the run's folder, prints, judges and scores. The others follow: they have no
folder and no opinion. When the leader has done what comes between two steps, it leaves a word in torchrun's store: to
go on, or to end, with the exit code of all. Followers wait for it without a limit, for work may last; that somebody is
at work at all is what the heartbeat says. A bell rings with each word, a collective like the sums and the wish to stop:
those who take part in one notice at once when a rank dies.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from torch import distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from models.training.torchrun.heartbeat import STORE_TIMEOUT, Heartbeat, Stop

START_TIMEOUT = timedelta(minutes=5)  # until all ranks have come
FOREVER = timedelta(days=365)
LAST_BELL_S = 5.0  # the leader may end while followers are in the midst of a step, and hear none
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.0005, 0.05  # of a rank that waits for a word

Tensors = Mapping[str, Tensor]


class RanksError(RuntimeError):
    """The ranks of a run cannot work together, or no longer; the message is one line for a person."""


class Ended(Exception):  # noqa: N818 - not an error of this rank
    """The leader has ended the run, and said why; `code` is the exit code of all."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


class Alone:
    """The only process of a run: all rows are its own, and there is nobody to ask or to tell."""

    rank, size = 0, 1
    local_rank, local_size = 0, 1  # on this machine

    @property
    def leads(self) -> bool:
        """Whether this process has the run's folder, and decides."""
        return self.rank == 0

    def part(self, start: int, count: int) -> tuple[int, int]:
        """Start and count of this rank's part of so many rows, which the ranks can share evenly."""
        share = count // self.size
        return start + self.rank * share, share

    def mine(self, rows: Tensor) -> Tensor:
        """The rank's own part of the rows."""
        start, count = self.part(0, len(rows))
        return rows[start : start + count]

    def mean(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """The mean of each tensor over all ranks."""
        return tensors

    def any(self, *, flag: bool) -> bool:
        """Whether it is so on any rank: all get the same answer."""
        return flag

    def watch(self, stop: Stop) -> None:
        """From now on the wish to stop is all ranks', whichever has it."""

    def recruit(
        self,
        brief: Mapping[str, Any],
        alike: Mapping[str, Any],
        state: tuple[Tensors, Any],
        device: torch.device,
    ) -> None:
        """Tell the followers what is trained, and hand them the state, once all of them are ready.

        Args:
            brief: What they need to know, as JSON.
            alike: What must be the same on all ranks.
            state: Tensors, and a value as JSON.
            device: This rank's.

        Raises:
            RanksError: One of them differs.
        """

    def go_on(self) -> None:
        """Let the followers go on."""

    def end(self, code: int) -> None:
        """The run has ended, with this exit code."""


class Ranks(Alone):
    """One of several ranks. Making it waits until all of them have come.

    What is said to wait or to be a collective raises `RanksError` where another rank has died, and on followers `Ended`
    where the leader ended the run first.
    """

    def __init__(self, place: Sequence[int]) -> None:
        self.rank, self.size, self.local_rank, self.local_size = place
        self._words = 0
        try:
            dist.init_process_group("gloo", timeout=START_TIMEOUT)
            self._group = self._gradient_group = dist.new_group(timeout=FOREVER)
            self._store = _store("words", START_TIMEOUT)
            self._heartbeat = Heartbeat(_store("beats", STORE_TIMEOUT), self.rank, self.size)
        except (RuntimeError, ValueError) as error:
            raise RanksError(f"the {self.size} processes of this run did not find together: {_words(error)}") from None
        self._heartbeat.start()

    # --- What all do ---------------------------------------------------------------------------------------------

    def mean(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """A collective."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self._reaching():
            dist.all_reduce(flat, group=self._gradient_group)
        parts = torch.split(flat / self.size, [tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def any(self, *, flag: bool) -> bool:
        """A collective."""
        found = torch.tensor(int(flag))
        with self._reaching():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        return bool(found)

    def watch(self, stop: Stop) -> None:
        """It reaches the others by the heartbeat, whatever they are at."""
        self._heartbeat.watch(stop)

    # --- What the leader does ------------------------------------------------------------------------------------

    def recruit(
        self,
        brief: Mapping[str, Any],
        alike: Mapping[str, Any],
        state: tuple[Tensors, Any],
        device: torch.device,
    ) -> None:
        """Waits."""
        self._tell(brief)
        others = range(1, self.size)
        self._wait(lambda: self._store.check([_enlisted(other) for other in others]))
        with self._reaching():
            found = {other: json.loads(self._store.get(_enlisted(other))) for other in others}
        for other, has in found.items():
            if has != alike:
                differences = [f"{key} {has[key]} instead of {alike[key]}" for key in alike if has[key] != alike[key]]
                raise RanksError(f"rank {other} is not like rank 0, with {', '.join(differences)}: "
                                 "all processes need the same data, torch version and kind of device")  # fmt: skip
        tensors, metadata = state
        blob = save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        self._tell({"bytes": len(blob), "metadata": metadata})
        self._average_on(device)
        self._broadcast(torch.frombuffer(bytearray(blob), dtype=torch.uint8))

    def go_on(self) -> None:
        """Leaves a word."""
        self._tell({})

    def end(self, code: int) -> None:
        """Leaves the last word. Followers that are in another collective by then find it when that breaks."""
        self._heartbeat.end()
        with suppress(RanksError):  # then there is nobody to hear it
            self._tell({"end": code})
        if code == 0:  # others may be in a collective, and this would wait for them
            dist.destroy_process_group()

    # --- What followers do ---------------------------------------------------------------------------------------

    def hear(self) -> dict[str, Any]:
        """The leader's next word. Waits.

        Raises:
            Ended: It is the last one.
        """
        with self._reaching():
            bell = self._bell()
            self._wait(bell.is_completed)
            bell.wait()
            return self._word()

    def await_first_here(self) -> None:
        """Wait until the first rank on this machine is ready, so that one alone fills the machine's caches."""
        first = self.rank - self.local_rank
        if 0 < first < self.rank:
            self._wait(lambda: self._store.check([_enlisted(first)]))

    def enlist(self, alike: Mapping[str, Any], device: torch.device) -> tuple[dict[str, Tensor], Any]:
        """Say that this rank is ready on its device, and get the leader's state. Waits."""
        self._store.set(_enlisted(self.rank), json.dumps(alike))
        word = self.hear()
        self._average_on(device)
        blob = torch.empty(word["bytes"], dtype=torch.uint8)
        self._broadcast(blob)
        return load_tensors(blob.numpy().tobytes()), word["metadata"]

    # -------------------------------------------------------------------------------------------------------------

    def _average_on(self, device: torch.device) -> None:
        """Average gradients where they are. A collective, so all come here at the same time."""
        if device.type == "cuda":
            torch.cuda.set_device(device)
            with self._reaching():
                self._gradient_group = dist.new_group(backend="nccl", timeout=FOREVER)

    def _broadcast(self, blob: Tensor) -> None:
        with self._reaching():
            dist.broadcast(blob, 0, group=self._group)

    def _wait(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds. The store's own way to wait would hold signals back, and log every time-out."""
        pause_s = FIRST_PAUSE_S
        with self._reaching():
            while not condition():
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _tell(self, word: Mapping[str, Any]) -> None:
        with self._reaching():
            self._store.set(self._next_word(), json.dumps(word))
            self._words += 1
            bell = self._bell()
            until = time.monotonic() + (LAST_BELL_S if "end" in word else math.inf)
            self._wait(lambda: bell.is_completed() or time.monotonic() > until)

    def _bell(self) -> dist.Work:
        bell: dist.Work | None = dist.broadcast(torch.zeros(1), 0, group=self._group, async_op=True)
        assert bell is not None  # noqa: S101 - only what is not asynchronous has none
        return bell

    def _has_word(self) -> bool:
        return self._store.check([self._next_word()])

    def _word(self) -> dict[str, Any]:
        word: dict[str, Any] = json.loads(self._store.get(self._next_word()))
        self._words += 1
        if "end" in word:
            self._heartbeat.end()
            raise Ended(word["end"])
        return word

    def _next_word(self) -> str:
        return f"word/{self._words}"

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._heartbeat.end()
            with suppress(RuntimeError):
                if not self.leads and self._has_word():
                    self._word()
            raise RanksError(f"another process of this run has died, or its machine ({_words(error)}). --resume goes "
                             "on from the last checkpoint") from None  # fmt: skip


def joined() -> Alone:
    """The process as one of those that torchrun has started for the run; alone where it has not.

    Raises:
        RanksError: They did not find together.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return Alone()
    place = _place()
    return Ranks(place) if place[1] > 1 else Alone()


def _place() -> list[int]:
    """Rank and number of ranks, in the run and on this machine, as torchrun says them."""
    said = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    try:
        rank, size, local_rank, local_size = place = [int(value or "") for value in said.values()]
        if 0 <= local_rank < local_size <= size and 0 <= rank < size:
            return place
    except ValueError:
        pass
    words = ", ".join(f"{name} is {'missing' if value is None else value}" for name, value in said.items())
    raise RanksError(f"torchrun's variables contradict one another: {words}")


def _store(prefix: str, timeout: timedelta) -> Store:
    """torchrun's store, by a connection of its own: while one caller waits, others would wait with it."""
    store: Store = next(iter(rendezvous("env://", timeout=timeout)))[0]
    return PrefixStore(prefix, store)


def _enlisted(rank: int) -> str:
    return f"enlisted/{rank}"


def _words(error: Exception) -> str:
    """What gloo says, without the place in its source before it and the greetings behind."""
    return str(error).split("] ", 1)[-1].split(". ")[0].split("\n")[0]
