"""Both clients give what the service gives, whatever callers have their images as."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from gan_client import (
    InvalidRequestError,
    NotFoundError,
    UnauthorizedError,
    UnknownBundleError,
    Verdict,
)

Connect = Callable[..., Any]


def drawn(live: Any, query: str) -> Any:
    """An array as the service gives it."""
    return np.load(io.BytesIO(httpx.get(f"{live.url}/sample?format=npy&{query}").content))


def test_images_are_those_of_their_seed(live: Any, connect: Connect) -> None:
    """As PIL images that say how to draw them again, and as an array."""
    client = connect(live.url)
    images = client.sample(5, 7, bundle="rgb", truncation=0.5, first_index=3, scale=2)
    expected = drawn(live, "count=5&seed=7&bundle=rgb&truncation=0.5&first_index=3&scale=2")
    assert [image.mode for image in images] == ["RGB"] * 5
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in images]), expected)
    assert images[2].info["index"] == 5
    again = client.sample_array(
        1, images[2].info["seed"], None, images[2].info["bundle"], first_index=5, truncation=0.5, scale=2
    )
    np.testing.assert_array_equal(again, expected[2:3])


def test_without_a_seed_images_differ_and_can_be_drawn_again(live: Any, connect: Connect) -> None:
    """The client draws the seed, and the images have it."""
    client = connect(live.url)
    first, second = client.sample()[0], client.sample()[0]
    assert first.info["seed"] != second.info["seed"]
    (again,) = client.sample(seed=first.info["seed"], bundle=first.info["bundle"])
    assert again.mode == "L"
    np.testing.assert_array_equal(np.asarray(again), np.asarray(first))


@pytest.mark.parametrize("labels", [1, "dog", ["cat", 1, "owl"], np.array([0, 1, 2])], ids=str)
def test_labels_are_indices_or_names_for_all_or_each(live: Any, connect: Connect, labels: Any) -> None:
    """NumPy's integers are as good as Python's; the count is that of the labels."""
    drawn_by_client = connect(live.url).sample_array(labels=labels, seed=3, bundle="cond")
    plain = labels if isinstance(labels, int | str | list) else labels.tolist()
    body = {"labels": plain, "seed": 3, "bundle": "cond", "format": "npy"}
    np.testing.assert_array_equal(
        drawn_by_client, np.load(io.BytesIO(httpx.post(f"{live.url}/sample", json=body).content))
    )


def test_a_file_has_the_bytes_of_the_service(live: Any, connect: Connect) -> None:
    """Any format, arranged as asked."""
    client = connect(live.url)
    assert (
        client.sample_file(6, 7, layout="strip") == httpx.get(f"{live.url}/sample?count=6&seed=7&layout=strip").content
    )
    assert client.sample_file(2, 7, format="zip").startswith(b"PK")


def test_verdicts_come_in_order_whatever_images_are(live: Any, connect: Connect, tmp_path: Path) -> None:
    """Paths, contents, PIL images and arrays in one call get the verdicts that an array of them gets."""
    client = connect(live.url)
    array = client.sample_array(5, 7, bundle="cond")
    images = [Image.fromarray(row[:, :, 0]) for row in array]
    images[0].save(tmp_path / "0.png")
    file = io.BytesIO()
    images[2].save(file, "PNG")
    mixed = [tmp_path / "0.png", str(tmp_path / "0.png"), file.getvalue(), images[3], array[4], array[4, :, :, 0]]
    verdicts = client.discriminate(mixed, bundle="cond")
    stack = client.discriminate(array, bundle="cond")
    assert verdicts == [stack[index] for index in (0, 0, 2, 3, 4, 4)]
    assert all(isinstance(verdict, Verdict) for verdict in verdicts)
    assert stack[0].label in {"cat", "dog", "owl"}
    assert stack[0].is_calibrated
    assert not stack[0].is_converted
    assert 0 < stack[0].probability_real < 1
    assert client.discriminate(array[..., 0], bundle="cond") == stack
    assert client.discriminate(images[0], bundle="cond") == stack[:1]
    given = client.discriminate(array, ["cat"] * 5, "cond")
    assert [verdict.label for verdict in given] == [None] * 5


def test_images_of_every_mode_are_sent(live: Any, connect: Connect) -> None:
    """PNG holds most, the others become RGB."""
    colour = Image.new("RGB", (8, 8), (9, 99, 199))
    images = [colour.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV")]
    images += [colour.convert("L").convert(mode) for mode in ("I", "F")] + [Image.new("I;16", (8, 8))]
    assert [verdict.error for verdict in connect(live.url).discriminate(images)] == [None] * 12


def test_an_image_that_cant_be_read_has_its_error_alone_or_among_others(live: Any, connect: Connect) -> None:
    """The service answers a single one with its error; to callers both are one."""
    client = connect(live.url)
    good = client.sample(1, 7)[0]
    for images in ([b"junk"], [b"junk", good], [good, b"junk"]):
        bad = client.discriminate(images)[images.index(b"junk")]
        assert (bad.probability_real, bad.error.status, bad.error.code) == (None, 422, "invalid")
    wide = Image.new("L", (5000, 5000))  # over GAN_MAX_IMAGE_PIXELS
    assert client.discriminate(wide)[0].error.code == "too_large"


def test_mistakes_are_raised_and_not_taken_for_an_image_s(live: Any, connect: Connect) -> None:
    """With one image as with several."""
    client = connect(live.url)
    image = client.sample(1, 7, bundle="tiny")[0]
    for images in ([image], [image, image]):
        with pytest.raises(InvalidRequestError, match="labels"):
            client.discriminate(images, "dog", "tiny")
        with pytest.raises(UnknownBundleError):
            client.discriminate(images, bundle="none")


def test_errors_say_what_the_service_says(live: Any, connect: Connect) -> None:
    """Status, code, detail and the request's id, and a class for what callers would tell apart."""
    client = connect(live.url)
    with pytest.raises(InvalidRequestError, match="truncation") as caught:
        client.sample(truncation=2)
    assert (caught.value.status, caught.value.code) == (422, "invalid")
    assert caught.value.request_id
    assert caught.value.request_id in str(caught.value)
    with pytest.raises(UnknownBundleError, match="none"):
        client.sample(bundle="none")


def test_a_route_that_is_not_there_is_named(live: Any, connect: Connect) -> None:
    """As at the wrong prefix, or with a service older than the client."""
    with pytest.raises(NotFoundError, match="There is no /sample at this address"):
        connect(f"{live.url}/gan/").sample()


def test_keys_are_sent(live_server: Any, tiny_settings: Any, connect: Connect) -> None:
    """A service with keys answers those who have one."""
    with live_server(tiny_settings(api_keys="secret")).running() as server:
        assert len(connect(server.url, "secret").sample(2)) == 2
        for key in (None, "wrong"):
            with pytest.raises(UnauthorizedError):
                connect(server.url, key).sample()


def test_bundles_are_described(live: Any, connect: Connect) -> None:
    """What a caller needs to choose one, and all else that the service says."""
    bundles = {bundle.name: bundle for bundle in connect(live.url).bundles()}
    assert set(bundles) == {"tiny", "rgb", "cond"}
    assert (bundles["rgb"].width, bundles["rgb"].height, bundles["rgb"].channels) == (10, 6, 3)
    assert bundles["cond"].labels == ("cat", "dog", "owl")
    assert [bundle.name for bundle in bundles.values() if bundle.is_default] == ["tiny"]
    assert bundles["tiny"].metadata["latent"]["dim"] == 12
    assert connect(live.url).sample(bundle=bundles["rgb"].pinned)[0].size == (10, 6)


@pytest.mark.parametrize(
    "arguments",
    [
        {"count": 0},
        {"count": 2, "labels": [1]},
        {"labels": []},
        {"latents": np.zeros((2, 12)), "seed": 1},
        {"latents": np.zeros((2, 12)), "count": 3},
    ],
    ids=str,
)
def test_contradictions_are_refused_before_anything_is_sent(connect: Connect, arguments: dict[str, Any]) -> None:
    """Nobody listens at this address."""
    with pytest.raises(ValueError, match=r"count|labels|latents"):
        connect("http://127.0.0.1:9", retries=0).sample(**arguments)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((8, 8)),
        np.zeros((1, 2, 3, 4, 5), np.uint8),
        np.zeros((0, 8, 8), np.uint8),
        [np.zeros((2, 2, 2, 2), np.uint8)],
    ],
    ids=lambda images: str(np.shape(images)),
)
def test_arrays_that_are_no_images_are_refused(connect: Connect, images: Any) -> None:
    """Floats, say, whose range nobody knows."""
    with pytest.raises(ValueError, match="uint8"):
        connect("http://127.0.0.1:9", retries=0).discriminate(images)


@pytest.mark.parametrize("url", ["localhost:8000", "", "ftp://host", "http://"])
def test_an_address_that_is_none_is_refused_at_once(connect: Connect, url: str) -> None:
    """Before the first request, with an example of a right one."""
    with pytest.raises(ValueError, match="http://localhost:8000"):
        connect(url)


@pytest.mark.parametrize("key", ["", "two\nlines", "schlüssel"])
def test_a_key_that_cant_be_sent_is_refused_without_being_shown(connect: Connect, key: str) -> None:
    """Messages end up in logs."""
    with pytest.raises(ValueError, match="key") as caught:
        connect("http://localhost:8000", key)
    assert not key or key not in str(caught.value)
