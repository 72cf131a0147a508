"""Whatever answers, a client stays within its bounds and says that this is no service."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gan_client import BadReplyError, Client, GanServiceError, ReplyTooLargeError

Connect = Callable[..., Any]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes a client without retries. Both kinds read replies by the same code, so one of them is enough here."""
    with ExitStack() as stack:
        yield lambda url: stack.enter_context(Client(url, retries=0))


NPY = {"Content-Type": "application/x-npy", "X-Bundle": "tiny@0123456789ab", "X-Seed": "7", "X-First-Index": "0"}
JSON = {"Content-Type": "application/json"}


def npy(array: Any, **options: Any) -> bytes:
    """An array's file."""
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def claiming(shape: str, data: bytes = b"") -> bytes:
    """A file whose header claims a shape."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


ONE = np.zeros((1, 8, 8, 1), np.uint8)
ARRAYS = {
    "empty": b"",
    "text": b"<h1>hello</h1>",
    "magic alone": b"\x93NUMPY",
    "pickle": npy(np.array([{}]), allow_pickle=True),
    "floats": npy(ONE.astype(np.float32)),
    "fortran": npy(np.asfortranarray(np.zeros((1, 8, 8, 3), np.uint8))),
    "two": npy(np.zeros((2, 8, 8, 1), np.uint8)),
    "no images": npy(np.zeros((1, 0, 8, 1), np.uint8)),
    "five channels": npy(np.zeros((1, 8, 8, 5), np.uint8)),
    "three axes": npy(ONE[0]),
    "huge claim": claiming("(1, 999999999, 999999999, 1)"),
    "huger claim": claiming("(1, 9999999999999999999999, 1, 1)"),
    "code": claiming("__import__('os').abort()"),
    "nested": claiming("(" * 90),
    "too little": npy(ONE)[:-1],
    "too much": npy(ONE) + b"\0",
    "long header": b"\x93NUMPY\x01\x00\xff\xff" + b" " * 100,
}


@pytest.mark.parametrize("body", ARRAYS.values(), ids=ARRAYS)
def test_arrays_that_are_none_are_refused(scripted: Any, connect: Connect, body: bytes) -> None:
    """Nothing is evaluated, unpickled, or made room for."""
    scripted.script.append((200, NPY, body))
    with pytest.raises(BadReplyError, match="no answer of a gan-service to POST /sample"):
        connect(scripted.url).sample(1, 7)


@pytest.mark.parametrize(
    "changed",
    [
        {"X-Seed": "8"},
        {"X-First-Index": "1"},
        {"X-Bundle": "tiny"},
        {"X-Bundle": "a" * 999 + "@0123456789ab"},
        {"Content-Type": "text/html"},
        {"Content-Encoding": "gzip", "Content-Type": "application/gzip"},
    ],
    ids=str,
)
def test_other_images_than_those_asked_for_are_refused(
    scripted: Any, connect: Connect, changed: dict[str, str]
) -> None:
    """As a cache gives them that mixes requests up."""
    scripted.script.append((200, NPY | changed, npy(ONE)))
    with pytest.raises(BadReplyError):
        connect(scripted.url).sample(1, 7)


def test_another_version_than_the_pinned_one_is_refused(scripted: Any, connect: Connect) -> None:
    """A pinned name is a promise."""
    scripted.script.append((200, NPY, npy(ONE)))
    with pytest.raises(BadReplyError, match="asked for tiny@ba9876543210"):
        connect(scripted.url).sample(1, 7, bundle="tiny@ba9876543210")


def test_a_compressed_answer_is_not_unpacked(scripted: Any, connect: Connect) -> None:
    """A few bytes could become as many as they like; nobody asked for it."""
    scripted.script.append((200, NPY | {"Content-Encoding": "gzip"}, npy(ONE)))
    assert connect(scripted.url).sample_array(1, 7).shape == ONE.shape  # the bytes as they are
    assert scripted.seen[0][1]["accept-encoding"] == "identity"


def test_an_answer_is_cut_off_where_it_is_too_large(
    scripted: Any, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its length where it says one, else as it arrives; a single image has no halves to be asked for."""
    monkeypatch.setattr("gan_client.core.calls.MAX_REPLY_BYTES", 1000)
    scripted.script.append((200, NPY | {"Content-Length": "1001"}, b""))
    with pytest.raises(ReplyTooLargeError):
        connect(scripted.url).sample(1, 7)
    many = b"%x\r\n%b\r\n0\r\n\r\n" % (5000, bytes(5000))
    scripted.script.append((200, NPY | {"Transfer-Encoding": "chunked"}, many))
    with pytest.raises(ReplyTooLargeError):
        connect(scripted.url).sample(1, 7)


VERDICTS = {
    "none": b"",
    "null": b"null",
    "list": b"[]",
    "deep": b"[" * 100_000,
    "no results": b"{}",
    "too few": b'{"results":[]}',
    "too many": b'{"results":[{},{}]}',
    "numbers": b'{"results":[5]}',
    "no numbers": b'{"results":[{}]}',
    "text": b'{"results":[{"probability_real":"much","logit":0}]}',
    "huge": b'{"results":[{"probability_real":1' + b"0" * 400 + b',"logit":0}]}',
    "digits": b'{"results":[{"probability_real":' + b"1" * 5000 + b',"logit":0}]}',
    "bad error": b'{"results":[{"error":{}}]}',
    "no version": b'{"bundle":"tiny","results":[{"probability_real":0.5,"logit":0}]}',
    "not UTF-8": b'{"results":["\xff"]}',
}


@pytest.mark.parametrize("body", VERDICTS.values(), ids=VERDICTS)
def test_verdicts_that_are_none_are_refused(scripted: Any, connect: Connect, body: bytes) -> None:
    """Every shape of JSON, and none."""
    scripted.script.append((200, JSON, body))
    with pytest.raises(BadReplyError):
        connect(scripted.url).discriminate(b"image")


def encoded(image: Image.Image) -> str:
    """An image as it stands in JSON."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize(
    "change",
    [
        {"image": "%"},
        {"image": base64.b64encode(b"GIF89a").decode()},
        {"image": encoded(Image.new("1", (20_000, 20_000)))},
        {"image": 5},
        {"latent": []},
        {"latent": [[1]]},
        {"latent": ["x"]},
        {"latent": [1e300]},
        {"latent": None},
        {"error": "much"},
    ],
    ids=lambda change: str(change)[:40],
)
def test_encodings_that_are_none_are_refused(scripted: Any, connect: Connect, change: dict[str, Any]) -> None:
    """A picture's size is looked at before it is decoded."""
    right = {"latent": [0.5, -1], "error": 0.25, "label": "7", "image": encoded(Image.new("L", (8, 8)))}
    for result in (right, right | change):
        body = json.dumps({"bundle": "tiny", "version": "0123456789ab", "results": [result]}).encode()
        scripted.script.append((200, JSON, body))
    client = connect(scripted.url)
    (encoding,) = client.encode(b"image")
    assert (encoding.latent.tolist(), encoding.mse, encoding.image.size) == ([0.5, -1], 0.25, (8, 8))
    assert encoding.label == "7"
    with pytest.raises(BadReplyError):
        client.encode(b"image")


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"default":"a","bundles":5}',
        b'{"default":"a","bundles":[[]]}',
        b'{"default":"a","bundles":[{"name":"a","version":"b","image":"c"}]}',
    ],
)
def test_bundles_that_are_none_are_refused(scripted: Any, connect: Connect, body: bytes) -> None:
    """Lists of something else."""
    scripted.script.append((200, JSON, body))
    with pytest.raises(BadReplyError):
        connect(scripted.url).bundles()


def test_an_error_s_words_can_do_nothing_to_a_terminal(scripted: Any) -> None:
    """Its escape sequences are not passed on, nor is a novel."""
    body = json.dumps({"code": "in\x1bvalid", "detail": "\x1b]0;owned\x07" + "a" * 10_000}).encode()
    scripted.script.append((422, {"X-Request-ID": "abc"}, body))
    with Client(scripted.url) as client, pytest.raises(GanServiceError) as caught:
        client.sample()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1100


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"5", b'{"code":5,"detail":[]}', b"[" * 60_000, bytes(10**6)])
def test_an_error_that_is_no_problem_is_one_all_the_same(scripted: Any, connect: Connect, body: bytes) -> None:
    """A proxy's page, say."""
    scripted.script.append((500, {}, body))
    with pytest.raises(GanServiceError, match="status 500") as caught:
        connect(scripted.url).sample()
    assert caught.value.code is None
