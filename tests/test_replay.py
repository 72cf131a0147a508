"""Tapes of a net: what they give is the net's, whatever was played before, beside, and on buffers that stay."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.bundle import Bundle
from models.sampler import Tiles
from service.batcher import Part
from service.engine import MAX_BATCH_ROWS, DiscriminatePayload, Engine, Precision, SamplePayload
from service.replay import Play, Replayed, Work, replayed

SIZES = (4, 8, 32)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def record(work: Work) -> tuple[Tensor, Play]:
    """What a CUDA graph does, done by a CPU: the same work again, on the same memory."""
    out = work()
    return out, lambda: out.copy_(work())


def net(rows: Tensor, labels: Tensor | None) -> Tensor:
    return 2 * rows if labels is None else 2 * rows + labels[:, None]


@given(counts=st.lists(st.integers(1, 100), min_size=1, max_size=6), has_labels=st.booleans())
def test_tapes_give_what_the_net_gives(counts: list[int], *, has_labels: bool) -> None:
    """Batches of many sizes, tile after tile of one tape: no answer is overwritten by a later one."""
    tiles = Tiles(Replayed(net, record), SIZES)
    asked = [(torch.randn(n, 3), torch.arange(n) if has_labels else None) for n in counts]
    answers = [tiles(*rows) for rows in asked]
    for rows, answer in zip(asked, answers, strict=True):
        assert torch.equal(answer, net(*rows))


def test_a_size_is_recorded_once() -> None:
    """In warm-up; whatever comes after is played."""
    recorded: list[int] = []

    def count(work: Work) -> tuple[Tensor, Play]:
        out, play = record(work)
        recorded.append(len(out))
        return out, play

    tapes = Replayed(net, count)
    for rows in (4, 8, 4, 8, 8):
        tapes(torch.zeros(rows, 2))
    assert recorded == [4, 8]


def test_threads_that_share_tapes_get_their_own_rows() -> None:
    """The input of one is never computed with the output of another."""
    tapes = Replayed(net, record)
    wrong: list[int] = []
    together = threading.Barrier(4)

    def ask(thread: int) -> None:
        rows = torch.full((4, 1000), float(thread))
        together.wait()
        wrong.extend(thread for _ in range(200) if not torch.equal(tapes(rows), 2 * rows))

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_where_no_tape_can_be_made_the_net_is_used(caplog: pytest.LogCaptureFixture) -> None:
    """A driver that can't record costs speed, not the service; the log says why."""
    rows = torch.randn(8, 3)
    assert replayed(net, rows, None, net(rows, None)) is net
    assert "function is launched kernel by kernel: " in caplog.text


@pytest.mark.parametrize("first_wrong", [1, 2])
def test_tapes_with_other_bits_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, first_wrong: int
) -> None:
    """What a tape gives is compared with the net before it serves anybody, and again when it is played again."""
    plays: list[int] = []

    def wrong(work: Work) -> tuple[Tensor, Play]:
        out, play = record(work)

        def play_wrong() -> None:
            play()
            plays.append(1)
            if len(plays) >= first_wrong:
                out.add_(1)

        return out, play_wrong

    monkeypatch.setattr("service.replay._graph_recorder", lambda _: wrong)
    rows = torch.ones(8, 3)
    assert replayed(net, rows, None, net(rows, None)) is net
    assert "its bits differ" in caplog.text


def test_tapes_with_the_right_bits_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the rows that they were tried with, and for others."""
    monkeypatch.setattr("service.replay._graph_recorder", lambda _: record)
    rows = torch.randn(8, 3)
    tapes = replayed(net, rows, None, net(rows, None))
    assert isinstance(tapes, Replayed)
    assert torch.equal(tapes(rows[:4] + 1, None), net(rows[:4] + 1, None))


@needs_gpu
@pytest.mark.parametrize("kind", ["tiny", "rgb", "cond"])
def test_a_gpu_gives_rows_the_same_bits_in_any_batch_and_its_memory_stays(
    tiny_bundles: dict[str, Bundle], kind: str
) -> None:
    """Alone and in the largest batch; a thousand batches later as much memory is reserved as before."""
    engine = Engine("cuda", exact=True)
    one = engine.load(tiny_bundles[kind].folder, {})
    assert isinstance(one.sample.tiles.run, Replayed)
    assert isinstance(one.discriminate.tiles.run, Replayed)
    labels = None if one.manifest.labels is None else np.arange(MAX_BATCH_ROWS) % len(one.manifest.labels)
    images = SamplePayload(1, 0, labels, 1.0)
    whole = one.sample.run([Part(images, 0, MAX_BATCH_ROWS)])
    judged = one.discriminate.run([Part(DiscriminatePayload(whole, labels), 0, MAX_BATCH_ROWS)])
    before = engine.memory()["reserved"]
    for n in range(1000):
        row = n % MAX_BATCH_ROWS
        np.testing.assert_array_equal(one.sample.run([Part(images, row, row + 1)])[0], whole[row])
        alone = one.discriminate.run([Part(DiscriminatePayload(whole, labels), row, row + 1)])
        np.testing.assert_array_equal(alone[0], judged[row])
    assert engine.memory()["reserved"] == before


@needs_gpu
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_other_precisions_of_a_gpu_say_how_far_they_are_off(
    tiny_bundles: dict[str, Bundle], caplog: pytest.LogCaptureFixture, precision: Precision
) -> None:
    """As on a CPU."""
    caplog.set_level("INFO")
    Engine("cuda", exact=True, precision=precision).load(tiny_bundles["cond"].folder, {})
    assert f"cond in {precision}: grey levels differ from float32's by" in caplog.text
