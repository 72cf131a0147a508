"""Interpolation, latents, encoding and verification: what the client sends, and what it makes of the answers."""

import io
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from gan_client import BadReplyError, InvalidRequestError, NotFoundError

Connect = Callable[..., Any]
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("labels", [{}, {"label": 1, "label_to": "owl"}, {"label": "dog"}], ids=str)
def test_a_way_is_its_images(live: Any, connect: Connect, labels: dict[str, Any]) -> None:
    """Both ends are the images of their seeds."""
    client = connect(live.url)
    way = client.interpolate(3, 4, 5, bundle="cond", index_to=2, scale=2, method="spherical", **labels)
    assert [image.size for image in way] == [(16, 16)] * 5
    first, last = labels.get("label"), labels.get("label_to", labels.get("label"))
    if first is not None:
        assert np.array_equal(way[0], client.sample(1, 3, first, "cond", scale=2)[0])
        assert np.array_equal(way[-1], client.sample(1, 4, last, "cond", scale=2, first_index=2)[0])


def test_a_way_may_be_an_animation(live: Any, connect: Connect) -> None:
    """The file is the service's."""
    file = connect(live.url).interpolate_file(3, 4, 6, duration_ms=1200)
    assert (
        file == httpx.get(f"{live.url}/interpolate?seed_from=3&seed_to=4&steps=6&duration_ms=1200&format=gif").content
    )
    animation = Image.open(io.BytesIO(file))
    assert (animation.format, animation.n_frames) == ("GIF", 6)  # type: ignore[attr-defined]


def test_a_strip_that_can_t_be_cut_is_refused(scripted: Any, connect: Connect) -> None:
    """A picture of another width is of other images."""
    file = io.BytesIO()
    Image.new("L", (41, 8)).save(file, "PNG")
    for content in (file.getvalue(), b"no picture"):
        scripted.script.append((200, {"Content-Type": "image/png"}, content))
        with pytest.raises(BadReplyError):
            connect(scripted.url).interpolate(3, 4, 5)


def test_verifications_are_read(scripted: Any, connect: Connect) -> None:
    """One for each picture; a service without the route says so."""
    results = [
        {"verdict": "identical", "recipe": {"bundle": "tiny@0123456789ab", "seed": 7}},
        {"verdict": "no_recipe"},
        {"error": {"status": 422, "code": "invalid", "detail": "The image is broken."}},
    ]
    scripted.script.append((200, JSON, json.dumps({"results": results}).encode()))
    client = connect(scripted.url)
    same, none, broken = client.verify([b"a", b"b", b"c"])
    assert (same.verdict, same.recipe["seed"]) == ("identical", 7)
    assert (none.verdict, none.recipe, none.error) == ("no_recipe", None, None)
    assert (broken.verdict, broken.error.detail) == (None, "The image is broken.")
    for recipe in (b"5", b'["a"]'):
        scripted.script.append((200, JSON, b'{"results":[{"verdict":"identical","recipe":%b}]}' % recipe))
        with pytest.raises(BadReplyError):
            client.verify(b"a")


@pytest.mark.parametrize("route", ["encode", "verify"])
def test_a_service_without_the_route_is_told_from_one_that_refuses(scripted: Any, connect: Connect, route: str) -> None:
    """An older service answers 404; one with the route, of a bundle without an encoder, 422."""
    body = {"status": 404, "code": "not_found", "detail": "No such route."}
    scripted.script.append((404, JSON, json.dumps(body).encode()))
    with pytest.raises(NotFoundError, match=f"no /{route} at this address"):
        getattr(connect(scripted.url), route)(b"image")
    refused = {"status": 422, "code": "no_encoder", "detail": "The bundle has no encoder."}
    scripted.script.append((422, JSON, json.dumps(refused).encode()))
    with pytest.raises(InvalidRequestError, match="no encoder"):
        getattr(connect(scripted.url), route)(b"image")


def test_the_latents_of_a_seed_give_its_images(live: Any, connect: Connect) -> None:
    """Any number of them, with a label for each."""
    client = connect(live.url)
    asked = {"count": 70, "seed": 3, "bundle": "cond", "format": "json", "latents": True}
    drawn = httpx.post(f"{live.url}/sample", json=asked).json()
    images = client.sample_array(latents=np.array(drawn["latents"]), labels=drawn["labels"], bundle="cond")
    np.testing.assert_array_equal(images, client.sample_array(70, 3, bundle="cond"))


def test_latents_are_sent_in_parts_with_their_labels(scripted: Any, connect: Connect) -> None:
    """As arrays of float32, everything else in the query; there is no seed."""
    latents = np.arange(70 * 12, dtype=np.float64).reshape(70, 12)
    for count in (64, 6):
        file = io.BytesIO()
        np.save(file, np.zeros((count, 8, 8, 1), np.uint8))
        head = {"Content-Type": "application/x-npy", "X-Bundle": "cond@0123456789ab"}
        scripted.script.append((200, head, file.getvalue()))
    images = connect(scripted.url).sample(latents=latents, labels=[0, "owl"] * 35, truncation=0.5)
    assert len(images) == 70
    assert images[0].info == {"bundle": "cond@0123456789ab"}
    queries = [dict(httpx.URL(target).params) for target, _, _ in scripted.seen]
    assert set(queries[0]) == {"count", "labels", "truncation", "format"}
    assert queries[1] == {
        "count": "6",
        "labels": '[0, "owl", 0, "owl", 0, "owl"]',
        "truncation": "0.5",
        "format": "npy",
        "bundle": "cond@0123456789ab",
    }
    bodies = [np.load(io.BytesIO(body)) for _, _, body in scripted.seen]
    assert bodies[0].dtype == np.float32
    np.testing.assert_array_equal(np.concatenate(bodies), latents)
