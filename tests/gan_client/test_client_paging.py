"""Any number of images is drawn in parts, and is what one request would have given."""

import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gan_client import Client, InvalidRequestError
from gan_client.core.paging import FIRST_ITEMS, PART_BYTES, Pages, Part

Connect = Callable[..., Any]


def one_request(live: Any, **options: Any) -> Any:
    """The images of a single request, by way of a file."""
    with Client(live.url) as client:
        return np.frombuffer(client.sample_file(format="npy", **options), np.uint8, offset=128)


@pytest.mark.parametrize("labels", [None, "dog", ["cat", "dog", "owl", 0, 1] * 400], ids=["drawn", "one", "each"])
def test_parts_are_what_one_request_gives(live: Any, connect: Connect, labels: Any) -> None:
    """Default labels are drawn from seed and index, so they do not depend on the parts either."""
    options = {"count": 2000, "seed": 5, "labels": labels, "bundle": "cond", "first_index": 11}
    images = connect(live.url).sample_array(**options)
    assert images.shape == (2000, 8, 8, 1)
    np.testing.assert_array_equal(images.ravel(), one_request(live, **options))


def test_a_service_that_takes_less_gets_smaller_requests(
    live: Any, live_server: Any, tiny_settings: Any, connect: Connect
) -> None:
    """Nobody has to know GAN_MAX_COUNT: what is refused comes in halves, to draw and to judge alike."""
    with live_server(tiny_settings(max_count=10)).running() as server:
        client = connect(server.url)
        images = client.sample_array(150, 5)
        np.testing.assert_array_equal(images.ravel(), one_request(live, count=150, seed=5))
        refused = server.metric("gan_rejected_total", route="/sample", reason="invalid")
        assert 3 <= refused < 3 + 4 * 3  # 64, 32, 16, and what was under way
        assert client.discriminate(images) == connect(live.url).discriminate(images)
        latents = np.random.default_rng(0).normal(size=(50, 12))
        assert np.array_equal(client.sample_array(latents=latents), connect(live.url).sample_array(latents=latents))


def test_one_image_that_is_too_much_is_refused(live_server: Any, tiny_settings: Any, connect: Connect) -> None:
    """There are no halves of it."""
    with live_server(tiny_settings(max_output_pixels=100)).running() as server:
        client = connect(server.url)
        with pytest.raises(InvalidRequestError, match="pixels"):
            client.sample(100, scale=2)
        assert len(client.sample(100)) == 100


def test_parts_stay_with_the_first_part_s_version(scripted: Any, connect: Connect) -> None:
    """Only the first request leaves the version open: a bundle that is swapped in between does not mix."""
    connect(scripted.url).sample(300, 5)
    bodies = [body for _, _, body in scripted.seen]
    assert b"bundle" not in bodies[0]
    assert all(b'"bundle": "tiny@' in body for body in bodies[1:])
    assert len(bodies) == 2


def test_batches_have_one_size_and_the_last_the_rest(live: Any, connect: Connect) -> None:
    """Whatever the parts are."""
    batches = list(connect(live.url).iter_arrays(200, 5, batch_size=48))
    assert [len(batch) for batch in batches] == [48, 48, 48, 48, 8]
    np.testing.assert_array_equal(np.concatenate(batches).ravel(), one_request(live, count=200, seed=5))


def test_without_a_count_batches_never_end(live: Any, connect: Connect) -> None:
    """Labels then take turns; the loop may be left at any time."""
    batches = connect(live.url).iter_arrays(seed=5, bundle="cond", labels=["cat", "owl"], batch_size=100)
    some = np.concatenate(list(itertools.islice(batches, 15)))
    batches.close()
    np.testing.assert_array_equal(
        some.ravel(), one_request(live, count=1500, seed=5, bundle="cond", labels=["cat", "owl"] * 750)
    )


def test_no_more_is_asked_for_than_is_in_flight(scripted: Any, connect: Connect) -> None:
    """While a caller uses its first images, a few more requests are under way and no others."""
    batches = connect(scripted.url, in_flight=2).iter_arrays(seed=5, batch_size=64)
    next(batches)
    assert len(scripted.seen) == 1
    next(batches)
    assert len(scripted.seen) <= 3
    batches.close()


def test_a_closed_client_has_no_threads(live: Any) -> None:
    """A loop that was left has requests under way; they end before the connections are closed."""

    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("gan-client")]

    with Client(live.url) as client:
        batches = client.iter_arrays(seed=5)
        next(batches)
        next(batches)
        assert threads()
    assert not threads()


def test_batches_of_nothing_are_refused_at_once(connect: Connect) -> None:
    """When they are asked for, not when the first is used."""
    with pytest.raises(ValueError, match="batch_size"):
        connect("http://127.0.0.1:9").iter_arrays(batch_size=0)


@pytest.mark.parametrize(
    ("item_bytes", "item_s", "expected"),
    [(784, 0.0, 1024), (3 * 2**20, 0.0, 2), (PART_BYTES + 1, 0.0, 1), (784, 0.01, 200), (784, 100.0, 1)],
)
def test_the_first_answer_decides_the_size_of_requests(item_bytes: int, item_s: float, expected: int) -> None:
    """8 MiB or two seconds of computing, at most 1,024 images, at least one."""
    pages: Pages[None] = Pages([(0, 5000)], None, NotImplemented)
    cut = pages.cut()
    assert next(cut) == (0, FIRST_ITEMS)
    pages.learn(Part((0, FIRST_ITEMS), None, "tiny@0123456789ab", item_bytes, item_s))
    assert next(cut) == (FIRST_ITEMS, expected)
