"""What is sent again, when, and what never is."""

import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import numpy as np
import pytest

from gan_client import (
    BadReplyError,
    BusyError,
    ConnectionFailedError,
    DeadlineError,
    GanServiceError,
    InvalidRequestError,
)
from gan_client.core.retries import Attempts, parse_retry_after

Connect = Callable[..., Any]
PROBLEM = {"type": "about:blank", "title": "No", "detail": "Not now.", "request_id": "abc"}


def refusal(status: int, code: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """A step of a script: the problem that the service would answer with."""
    body = json.dumps(PROBLEM | {"status": status, "code": code}).encode()
    return status, {"Content-Type": "application/problem+json", **headers}, body


BUSY = refusal(429, "queue_full", **{"Retry-After": "0"})


@pytest.mark.parametrize(
    "step",
    [
        BUSY,
        refusal(429, "rate_limited"),
        refusal(503, "draining", **{"Retry-After": "0"}),
        (503, {"Content-Type": "text/html"}, b"<h1>no upstream</h1>"),
        None,
        (200, {"Content-Type": "application/x-npy", "Content-Length": "100000"}, b"\x93NUMPY"),
    ],
    ids=["queue_full", "rate_limited", "draining", "proxy", "hung up", "cut short"],
)
def test_a_retry_gives_the_same_images(scripted: Any, connect: Connect, step: Any) -> None:
    """The seed is drawn once, by the client, so that every attempt asks for the same."""
    scripted.script.extend([step, step])
    (image,) = connect(scripted.url).sample()
    assert len(scripted.seen) == 3
    assert len({body for _, _, body in scripted.seen}) == 1
    query = f"seed={image.info['seed']}&format=npy"
    expected = np.load(io.BytesIO(httpx.get(f"{scripted.target}/sample?{query}").content))
    np.testing.assert_array_equal(np.asarray(image), expected[0, :, :, 0])


def test_questions_about_images_are_repeated_too(scripted: Any, connect: Connect) -> None:
    """A verdict depends on nothing but the request."""
    scripted.script.extend([BUSY, None])
    (verdict,) = connect(scripted.url).discriminate(np.zeros((8, 8), np.uint8))
    assert verdict.error is None
    assert len({body for _, _, body in scripted.seen}) == 1


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "malformed", GanServiceError),
        (401, "unauthorized", GanServiceError),
        (408, "request_timeout", DeadlineError),
        (413, "too_large", GanServiceError),
        (422, "invalid", GanServiceError),
        (500, "internal", GanServiceError),
        (501, "not_implemented", GanServiceError),
        (502, "bad_gateway", GanServiceError),
        (504, "deadline_exceeded", DeadlineError),
        (302, "moved", BadReplyError),
    ],
)
def test_what_would_fail_again_is_not_sent_again(
    scripted: Any, connect: Connect, status: int, code: str, kind: type[GanServiceError]
) -> None:
    """One request, one error."""
    scripted.script.append(refusal(status, code, **{"Retry-After": "0", "Location": scripted.target}))
    with pytest.raises(kind) as caught:
        connect(scripted.url).sample()
    assert (caught.value.status, caught.value.code, caught.value.detail) == (status, code, "Not now.")
    assert len(scripted.seen) == 1


def test_retries_end(scripted: Any, connect: Connect) -> None:
    """The last refusal is raised, and says what the service said."""
    scripted.script.extend([BUSY] * 9)
    with pytest.raises(BusyError) as caught:
        connect(scripted.url, retries=2).sample()
    assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (429, "queue_full", 0.0)
    assert len(scripted.seen) == 3


def test_nobody_waits_beyond_the_time_that_a_call_has(scripted: Any, connect: Connect) -> None:
    """A service that asks for an hour gets no second request, and the caller hears of it at once."""
    scripted.script.append(refusal(429, "queue_full", **{"Retry-After": "3600"}))
    with pytest.raises(BusyError) as caught:
        connect(scripted.url, timeout_s=30).sample()
    assert caught.value.retry_after_s == 3600
    assert len(scripted.seen) == 1


def test_the_service_is_told_how_long_the_answer_is_of_use(scripted: Any, connect: Connect) -> None:
    """What is left of the call's time, so that nothing is computed for nobody."""
    scripted.script.append(BUSY)
    connect(scripted.url, timeout_s=20).sample()
    first, second = (int(headers["x-timeout-ms"]) for _, headers, _ in scripted.seen)
    assert 0 < second <= first <= 20_000


def test_an_answer_that_never_comes_is_given_up(
    scripted: Any, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing at all, or a body that goes on and on: the time is the whole call's, not that of each byte."""
    monkeypatch.setattr("gan_client.core.retries.GRACE_S", 0.0)
    for step in (scripted.hang, scripted.drip):
        scripted.script.append(step)
        with pytest.raises(DeadlineError):
            connect(scripted.url, timeout_s=0.3).sample()
    assert len(scripted.seen) == 2


def test_nobody_at_the_address_is_said(connect: Connect) -> None:
    """After the retries, with the address."""
    with pytest.raises(ConnectionFailedError, match=r"127\.0\.0\.1:9"):
        connect("http://127.0.0.1:9", retries=2).sample()


def test_what_tls_refuses_is_not_sent_again(live: Any, connect: Connect) -> None:
    """A service without TLS, or one with a certificate that nobody vouches for, is the same a moment later."""
    with pytest.raises(InvalidRequestError, match="No TLS with https"):
        connect(live.url.replace("http:", "https:")).sample()


@pytest.mark.slow
def test_a_busy_service_answers_in_the_end(live_server: Any, tiny_settings: Any, connect: Connect) -> None:
    """The real queue is full until the engine goes on; the client comes again when it was told to."""
    settings = tiny_settings(max_queued_images=4, max_count=4)
    with live_server(settings).running() as server, ThreadPoolExecutor() as executor:
        with server.engine_held():
            running = executor.submit(httpx.get, f"{server.url}/sample")
            work = {"bundle": "tiny", "operation": "sample"}
            server.wait_for(lambda: server.metric("gan_batch_images_count", **work) == 1)
            waiting = executor.submit(httpx.get, f"{server.url}/sample?count=4")
            server.wait_for(lambda: server.metric("gan_queue_images", device="cpu") == 4)
            images = executor.submit(connect(server.url).sample, 4)
            server.wait_for(lambda: server.metric("gan_rejected_total", route="/sample", reason="queue_full") == 1)
        assert len(images.result()) == 4
        assert running.result().status_code == waiting.result().status_code == 200


def test_the_wait_is_the_service_s_and_a_random_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which doubles, so that those who were refused together do not come back together."""
    monkeypatch.setattr("gan_client.core.retries._FIRST_BACKOFF_S", 0.25)
    monkeypatch.setattr("gan_client.core.retries.random.uniform", lambda _, most: most)
    attempts = Attempts(8, 1000.0)
    delays = [attempts.delay_after(BusyError("", retry_after_s=2.0)) for _ in range(8)]
    assert delays == [2.25, 2.5, 3, 4, 6, 10, 10, 10]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("7", 7.0), ("0", 0.0), (None, None), ("", None), ("-1", None), ("1e9", None), ("soon", None), ("9" * 400, None)],
)
def test_retry_after_is_seconds(text: str | None, seconds: float | None) -> None:
    """Anything else counts as not said."""
    assert parse_retry_after(text) == seconds


def test_retry_after_may_be_a_date() -> None:
    """As proxies write it; one that is past means now."""
    soon = parse_retry_after(format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True))
    assert soon is not None
    assert 3500 < soon <= 3600
    assert parse_retry_after("Mon, 01 Jan 2001 00:00:00 GMT") == 0.0
    assert parse_retry_after("Mon, 01 Jan 2001 00:00:00") is None
