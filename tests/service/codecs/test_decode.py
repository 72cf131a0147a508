"""Uploaded images are brought into a bundle's shape or refused with a reason, however hostile they are."""

import base64
import io
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from models.inference.pixels import UInt8
from models.spec import ImageSpec
from service.codecs.decode import UPLOAD_TYPES, Limits, Upload, decode_base64, decode_upload
from service.codecs.picture import Decoded, decode_picture
from service.codecs.time_slices import Steps
from service.errors import DeadlinePassed, Invalid, Malformed, ServiceError, TooLarge

GREY, COLOUR = ImageSpec(channels=1, height=6, width=8), ImageSpec(channels=3, height=6, width=8)
LIMITS = Limits(GREY, 10_000, 16, check_deadline=lambda: None, decode=decode_picture)
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 8), dtype=np.uint8)
RGB_PIXELS = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)


def file(picture: Image.Image, form: str = "png", **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()


def drive(steps: Steps[Upload]) -> tuple[Upload, int, int]:
    """Run all steps here: (result, times that they could be interrupted, calls that were to run off the loop)."""
    pauses = calls = 0
    result = None
    while True:
        try:
            call = steps.send(result)
        except StopIteration as end:
            return end.value, pauses, calls
        pauses += call is None
        calls += call is not None
        result = call and call.work()


def finish(steps: Steps[Upload]) -> Upload:
    return drive(steps)[0]


def one_by_one(upload: Upload) -> list[Decoded | ServiceError]:
    results: list[Decoded | ServiceError] = list(map(Decoded, upload.pixels, upload.converted))
    assert len(results) == len(upload.pixels) == len(upload.converted)
    for place in sorted(upload.errors):
        results.insert(place, upload.errors[place])
    assert len(results) == len(upload)
    return results


def decode(body: bytes, image: ImageSpec = GREY, content_type: str = "image/png") -> list[Decoded | ServiceError]:
    return one_by_one(finish(decode_upload(body, content_type, replace(LIMITS, image=image))))


def decoded(body: bytes, image: ImageSpec = GREY, content_type: str = "image/png") -> Decoded:
    (result,) = decode(body, image, content_type)
    assert isinstance(result, Decoded), result
    assert result.pixels.shape == (image.height, image.width, image.channels)
    assert result.pixels.dtype == np.uint8
    return result


def npy(array: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, np.asanyarray(array), **options)
    return out.getvalue()


def multipart(*parts: tuple[str, str, bytes], boundary: str = "BoUnD") -> tuple[bytes, str]:
    """A form of these (name, filename or None, content): its body and Content-Type."""
    body = b""
    for name, filename, content in parts:
        extra = f'; filename="{filename}"' if filename else ""
        body += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode()
        body += content + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), f'multipart/form-data; boundary="{boundary}"'


@pytest.mark.parametrize(("form", "options"), [("png", {}), ("bmp", {}), ("webp", {"lossless": True})])
def test_an_image_of_the_right_shape_keeps_its_pixels(form: str, options: dict[str, Any]) -> None:
    """Lossless files of the bundle's size and colour mode keep every pixel."""
    result = decoded(file(Image.fromarray(RGB_PIXELS), form, **options), COLOUR)
    np.testing.assert_array_equal(result.pixels, RGB_PIXELS)
    assert not result.converted


def test_a_grey_png_keeps_its_pixels() -> None:
    """The common case of MNIST."""
    result = decoded(file(Image.fromarray(PIXELS)))
    np.testing.assert_array_equal(result.pixels[..., 0], PIXELS)
    assert not result.converted


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
@pytest.mark.parametrize("image", [GREY, COLOUR], ids=["grey", "colour"])
def test_every_colour_mode_of_a_flat_image_comes_out_flat(mode: str, image: ImageSpec) -> None:
    """Palette, transparency, CMYK, 16 bits: white stays white, black stays black, and `converted` is set."""
    for value in (0, 255):
        flat = np.full((12, 16), value, np.uint8)
        if mode == "I;16":
            picture = Image.fromarray(flat.astype(np.uint16) * 257)
        else:
            picture = Image.fromarray(flat).convert("RGB").convert(mode if mode != "PA" else "P")
        assert picture.mode in {mode, "P"}
        form = "jpeg" if mode in {"CMYK", "YCbCr"} else "png"
        result = decoded(file(picture, form), image)
        assert np.abs(result.pixels.astype(int) - value).max() <= 2
        assert result.converted


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    """A 16-bit ramp becomes an 8-bit ramp."""
    ramp = np.linspace(0, 65535, 48).astype(np.uint16).reshape(6, 8)
    result = decoded(file(Image.fromarray(ramp)))
    np.testing.assert_array_equal(result.pixels[..., 0], np.round(ramp / 257).astype(np.uint8))


def test_transparency_shows_black() -> None:
    """Half-transparent white becomes grey, and a fully transparent colour black."""
    picture = np.zeros((6, 8, 4), np.uint8)
    picture[:, :4] = 255, 255, 255, 128
    picture[:, 4:] = 255, 0, 0, 0
    result = decoded(file(Image.fromarray(picture, "RGBA")))
    assert set(result.pixels[:, :4].flat) == {128}
    assert set(result.pixels[:, 4:].flat) == {0}


def test_another_size_is_averaged_down() -> None:
    """A picture of 2 × 2 blocks, shrunk to half its size, has nearly the blocks' values."""
    large = np.kron(np.linspace(40, 200, 48).reshape(6, 8), np.ones((8, 8))).astype(np.uint8)
    result = decoded(file(Image.fromarray(large)))
    assert result.converted
    assert np.abs(result.pixels[1:-1, 1:-1, 0].astype(float) - large[::8, ::8][1:-1, 1:-1]).max() < 8


def test_the_way_a_camera_was_held_is_undone() -> None:
    """EXIF's orientation is applied, as every viewer does."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate a quarter clockwise to view
    upright = np.zeros((6, 8), np.uint8)
    upright[:3] = 255
    sideways = Image.fromarray(np.rot90(upright, 1).copy())
    result = decoded(file(sideways, "jpeg", exif=exif, quality=100))
    assert result.pixels[:2].mean() > 250
    assert result.pixels[4:].mean() < 5


@pytest.mark.parametrize("form", ["png", "webp"])
def test_of_an_animation_the_first_frame_counts(form: str) -> None:
    """The first frame is white and the second black: the result is white."""
    frames = [Image.fromarray(np.full((6, 8, 3), value, np.uint8)) for value in (255, 0, 0)]
    body = file(frames[0], form, save_all=True, append_images=frames[1:], duration=100)
    assert decoded(body).pixels.min() > 250


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"hello", id="text"),
        pytest.param(file(Image.fromarray(PIXELS), "gif"), id="gif"),
        pytest.param(file(Image.fromarray(PIXELS), "tiff"), id="tiff"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n", id="postscript"),
        pytest.param(file(Image.fromarray(PIXELS))[:60], id="cut short"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + bytes(40), id="png signature only"),
        pytest.param(b"BM" + bytes(60), id="bmp signature only"),
        pytest.param(b"RIFF\x10\0\0\0WEBPVP8 " + bytes(20), id="webp signature only"),
        pytest.param(b"\xff\xd8\xff\xe0" + bytes(20), id="jpeg signature only"),
    ],
)
def test_what_is_no_image_is_invalid(body: bytes) -> None:
    """Other formats, broken files and empty ones get an error in place of an image."""
    (result,) = decode(body)
    assert isinstance(result, Invalid)


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header claims this size, without any pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(101, 100), (10_000, 9_500), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_a_large_image_is_refused_by_its_header(size: tuple[int, int]) -> None:
    """A few bytes that claim billions of pixels are refused by that claim."""
    (result,) = decode(png_header(*size))
    assert isinstance(result, TooLarge)


def test_the_largest_image_allowed_is_allowed() -> None:
    """The limit counts an array's pixels as it counts a file's."""
    assert decoded(file(Image.new("L", (100, 100)))).converted


@pytest.mark.parametrize(
    ("array", "image"),
    [
        pytest.param(RNG.integers(0, 256, (3, 6, 8), dtype=np.uint8), GREY, id="grey"),
        pytest.param(RNG.integers(0, 256, (3, 6, 8, 1), dtype=np.uint8), GREY, id="grey with channel"),
        pytest.param(RNG.integers(0, 256, (3, 6, 8, 3), dtype=np.uint8), COLOUR, id="colour"),
        pytest.param(np.asfortranarray(RNG.integers(0, 256, (3, 6, 8), dtype=np.uint8)), GREY, id="fortran order"),
    ],
)
def test_an_array_of_the_right_shape_keeps_its_numbers(array: UInt8, image: ImageSpec) -> None:
    """Each entry of the first axis is an image, in C and in Fortran order."""
    results = decode(npy(array), image, "application/x-npy")
    whole = np.stack([result.pixels for result in results if isinstance(result, Decoded)])
    np.testing.assert_array_equal(whole, array.reshape(whole.shape))
    assert not any(result.converted for result in results if isinstance(result, Decoded))


def test_an_array_of_another_shape_is_converted() -> None:
    """An array of another size or colour mode is converted as a file would be."""
    array = RNG.integers(0, 256, (2, 12, 16, 3), dtype=np.uint8)
    results = decode(npy(array), GREY, "application/x-npy")
    for result, pixels in zip(results, array, strict=True):
        assert isinstance(result, Decoded)
        assert result.converted
        np.testing.assert_array_equal(result.pixels, decoded(file(Image.fromarray(pixels))).pixels)


def test_a_header_that_was_seen_before_says_nothing_of_the_data() -> None:
    """A second array with the same header is read with its own data, not the first one's."""
    first, second = (npy(RNG.integers(0, 256, (2, GREY.height, GREY.width), dtype=np.uint8)) for _ in "ab")
    assert first[:128] == second[:128]
    for body in (first, second):
        [one, _] = decode(body, GREY, "application/x-npy")
        assert isinstance(one, Decoded)
        assert one.pixels.tobytes() == body[128 : 128 + one.pixels.size]
    with pytest.raises(Malformed):
        decode(first[:-1], GREY, "application/x-npy")


def header(text: str) -> bytes:
    """An .npy file with this header and no data."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@pytest.mark.parametrize(
    ("body", "error"),
    [
        pytest.param(b"", Malformed, id="empty"),
        pytest.param(b"PK\x03\x04", Malformed, id="zip"),
        pytest.param(npy(PIXELS[None])[:-1], Malformed, id="cut short"),
        pytest.param(npy(PIXELS[None]) + b"x", Malformed, id="too long"),
        pytest.param(
            header("{'descr': '|u1', 'fortran_order': False, 'shape': (9999999999, 28, 28)}"), Malformed, id="lie"
        ),
        *(
            pytest.param(
                header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}"), Malformed, id="endless number"
            )
            for shape in (f"(0x{'f' * 3900}, 8, 6)", f"(-0x{'f' * 3900}, 8, 6)", f"(1, 8, 6, 0x{'f' * 3900})")
        ),
        pytest.param(header("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 6)}"), Invalid, id="negative"),
        pytest.param(header("{'descr': '|u1', 'fortran_order': False, 'shape': (0, 8, 6)}"), Invalid, id="no images"),
        pytest.param(header("{'descr': '|u1', 'fortran_order': False, 'shape': ()}"), Invalid, id="a number"),
        pytest.param(
            header("{'descr': '|u1', 'fortran_order': False, 'shape': (True, 8, 6)}") + bytes(48), Invalid, id="truth"
        ),
        pytest.param(header("__import__('os').abort()"), Malformed, id="code"),
        pytest.param(header("(" * 3000), Malformed, id="nested"),
        pytest.param(
            header("{'descr': '|u1', 'fortran_order': False, 'shape': (1L, 8L, 6L), }"), Malformed, id="Python 2"
        ),
        pytest.param(npy(PIXELS[None].astype(np.float32)), Invalid, id="floats"),
        pytest.param(npy(PIXELS), Invalid, id="no first axis"),
        pytest.param(npy(np.zeros((1, 6, 8, 4), np.uint8)), Invalid, id="four channels"),
        pytest.param(npy(np.zeros((17, 6, 8), np.uint8)), Invalid, id="too many"),
        pytest.param(npy(np.zeros((1, 101, 100), np.uint8)), TooLarge, id="too large"),
        pytest.param(npy(np.array([{}], object), allow_pickle=True), Invalid, id="pickle"),
    ],
)
def test_a_bad_array_is_refused(body: bytes, error: type[Exception]) -> None:
    """It is refused before memory is allocated for its size, and without running code from it."""
    with pytest.raises(error):
        decode(body, GREY, "application/x-npy")


def test_every_file_part_of_a_form_is_an_image() -> None:
    """They are decoded in order, whatever their names; a broken one gets its own error."""
    good = file(Image.fromarray(PIXELS))
    turned = file(Image.fromarray(PIXELS[::-1]))
    body, content_type = multipart(("images", "a", good), ("other", "b.bin", b"broken"), ("images", "c.png", turned))
    first, second, third = decode(body, GREY, content_type)
    assert isinstance(second, Invalid)
    for result, pixels in ((first, PIXELS), (third, PIXELS[::-1])):
        assert isinstance(result, Decoded)
        np.testing.assert_array_equal(result.pixels[..., 0], pixels)


@pytest.mark.parametrize(
    "head",
    [
        b'Content-Disposition: form-data; name="images"; filename="a.png"',
        b"Content-Disposition: form-data; name=images; filename=a.png",
        b'Content-Disposition: form-data; name="images"; filename=""',
        b"Content-Disposition: form-data; name=\"images\"; filename*=utf-8''%C3%A9.png",
        b"content-disposition: form-data; name=\"images\" ;\tFileName*=utf-8''a.png; size=3",
        b'Content-Disposition: form-data; name="images"; filename*0="a"; filename*1=".png"',
        b'Content-Disposition: form-data; name="images"\r\nContent-Type: image/png',
        b'Content-Type: IMAGE/jpeg; q=1\r\nContent-Disposition: form-data; name="images"',
        b"Content-Type:image/png",
    ],
)
def test_a_part_is_known_as_a_file_by_its_filename_or_its_type(head: bytes) -> None:
    """As clients write it: a plain filename, an extended one alone, or an image's media type and no filename."""
    body = b"--B\r\n" + head + b"\r\n\r\n" + file(Image.fromarray(PIXELS)) + b"\r\n--B--\r\n"
    (result,) = decode(body, GREY, "multipart/form-data; boundary=B")
    assert isinstance(result, Decoded)
    np.testing.assert_array_equal(result.pixels[..., 0], PIXELS)


@pytest.mark.parametrize(
    "head",
    [
        b'Content-Disposition: form-data; name="bundle"',
        b'Content-Disposition: form-data; name="a; filename*=b"',
        b'Content-Disposition: form-data; name="a\\"; filename*=b"',
        b'Content-Disposition: form-data; name="a; filename*=b',
        b'Content-Disposition: form-data; name="a\\"; filename*=b\\',
        b'Content-Disposition: form-data; name="bundle"\r\nContent-Type: text/plain',
        b'Content-Disposition: form-data; name="bundle"\r\nX-Content-Type: image/png',
        b"X-Nothing: 1",
    ],
)
def test_a_field_of_a_form_is_told_how_to_be_a_file(head: bytes) -> None:
    """A part without either is refused, also beside one that is a file."""
    good = b'--B\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\nx\r\n'
    for body in (b"", good):
        form = body + b"--B\r\n" + head + b"\r\n\r\ntiny\r\n--B--\r\n"
        with pytest.raises(Invalid, match="with a filename or an image's Content-Type"):
            decode(form, GREY, "multipart/form-data; boundary=B")


def test_a_file_that_looks_like_a_boundary_survives() -> None:
    """Line ends and dashes inside a file do not end its part."""
    tricky = file(Image.fromarray(PIXELS)) + b"\r\n--BoUn\r\n--\r\n-"
    body, content_type = multipart(("images", "a.png", tricky))
    assert isinstance(decode(body, GREY, content_type)[0], Decoded)


GOOD_FORM, FORM_TYPE = multipart(("images", "a.png", b"x"))


@pytest.mark.parametrize(
    ("body", "content_type", "error"),
    [
        pytest.param(*multipart(("bundle", "", b"tiny")), Invalid, id="a field that is no file"),
        pytest.param(*multipart(*[("images", "a", b"x")] * 17), Invalid, id="too many"),
        pytest.param(GOOD_FORM, "multipart/form-data", Malformed, id="no boundary"),
        pytest.param(GOOD_FORM, "multipart/form-data; boundary=" + "x" * 300, Malformed, id="long boundary"),
        pytest.param(GOOD_FORM, "multipart/form-data; boundary=other", Malformed, id="another boundary"),
        pytest.param(GOOD_FORM[:-6], FORM_TYPE, Malformed, id="cut short"),
        pytest.param(b"", FORM_TYPE, Malformed, id="empty"),
        pytest.param(*multipart(("images", "a" + ";" * 2000, b"x")), Malformed, id="long disposition"),
        pytest.param(b"--BoUnD--\r\n", FORM_TYPE, (Malformed, Invalid), id="no parts"),
        pytest.param(b"--BoUnD\r\nX-A: " + b"y" * 20_000, FORM_TYPE, Malformed, id="endless header"),
    ],
)
def test_a_bad_form_is_refused(body: bytes, content_type: str, error: Any) -> None:
    """The client gets a reason, whatever the parser raises."""
    with pytest.raises(error):
        decode(body, GREY, content_type)


def test_a_content_type_without_end_is_refused() -> None:
    """It is refused, because parsing its parameters takes long."""
    with pytest.raises(Malformed, match="too long"):
        decode(b"x", GREY, "multipart/form-data; boundary=x" + ";" * 60_000)


def test_base64_is_checked_image_by_image() -> None:
    """One text that is not base64 gets its own error, and the others are decoded."""
    good = base64.b64encode(file(Image.fromarray(PIXELS))).decode()
    first, second, third, fourth = one_by_one(finish(decode_base64([good, "not base64!", "", "é"], LIMITS)))
    assert isinstance(first, Decoded)
    for result in (second, third, fourth):
        assert isinstance(result, Invalid)


LARGE = file(Image.fromarray(RNG.integers(0, 256, (100, 99, 3), dtype=np.uint8)))


@pytest.mark.parametrize("content", [LARGE, LARGE + b"0", LARGE + b"00"], ids=["no padding", "two", "one"])
@pytest.mark.parametrize(
    "written",
    [
        lambda text: text,
        lambda text: "data:image/png;base64," + text,
        lambda text: "DATA:image/png;charset=utf-8;BASE64," + text,
        lambda text: base64.encodebytes(base64.b64decode(text)).decode(),
        lambda text: "\r\n".join(text[start : start + 61] for start in range(0, len(text), 61)) + "\r\n",
        lambda text: "data:;base64, \t" + " ".join(text),
        lambda text: "\n data:image/png;base64,\n" + text + "\n",
    ],
    ids=["plain", "data URL", "capitals", "76 columns", "61 columns", "spaced", "lines around a data URL"],
)
def test_base64_is_read_as_clients_write_it(content: bytes, written: Callable[[str], str]) -> None:
    """With line ends anywhere, and as a data URL, it gives the same image."""
    text = written(base64.b64encode(content).decode())
    (plain,), (result,) = (
        one_by_one(finish(steps))
        for steps in (decode_upload(content, "image/png", LIMITS), decode_base64([text], LIMITS))
    )
    assert isinstance(plain, Decoded)
    assert isinstance(result, Decoded)
    np.testing.assert_array_equal(result.pixels, plain.pixels)


@pytest.mark.parametrize(
    "text",
    ["A", "AAA", "A===", "AA==AAAA", "A" * 2**14 + "AA==" + "A" * 2**14, "A" * (2**14 - 4) + "AA==AAAA", "AAA=\nA",
     "AA\u00a0AA", "data:image/png," + "A" * 8, "data:" + "x" * 300 + ";base64,AAAA", "AA-_"],
)  # fmt: skip
def test_what_is_no_base64_is_refused(text: str) -> None:
    """Cut short, continued after its padding, or in another alphabet, also across two steps."""
    (result,) = one_by_one(finish(decode_base64([text], LIMITS)))
    assert isinstance(result, Invalid)
    assert "not base64" in str(result)


def test_too_many_in_json_are_refused() -> None:
    """The limit on images holds as in an array or a form."""
    with pytest.raises(Invalid, match="17 images"):
        finish(decode_base64([""] * 17, LIMITS))


NINE = [file(Image.fromarray(RGB_PIXELS))] * 9


BODIES_OF_NINE = [
    pytest.param(partial(decode_upload, *multipart(*[("images", "a", one) for one in NINE])), id="form"),
    pytest.param(partial(decode_upload, npy(np.zeros((9, 3, 3), np.uint8)), "application/x-npy"), id="array"),
    pytest.param(partial(decode_base64, [base64.b64encode(one).decode() for one in NINE]), id="json"),
]


@pytest.mark.parametrize("decode_nine", BODIES_OF_NINE)
def test_nothing_is_decoded_for_nobody(decode_nine: Callable[[Limits], Any]) -> None:
    """The deadline is checked before each image, so a body full of large images ends in time."""
    asked = []

    def check_deadline() -> None:
        asked.append(1)
        if len(asked) > 3:
            raise DeadlinePassed(1)

    with pytest.raises(DeadlinePassed):
        finish(decode_nine(replace(LIMITS, check_deadline=check_deadline)))
    assert len(asked) == 4


@pytest.mark.parametrize("decode_nine", BODIES_OF_NINE)
def test_work_on_small_images_can_be_interrupted_after_each(decode_nine: Callable[[Limits], Any]) -> None:
    """None of it is handed to a thread."""
    _, pauses, calls = drive(decode_nine(LIMITS))
    assert pauses >= 9
    assert calls == 0


def test_a_large_form_is_split_in_many_steps() -> None:
    """A long body can be interrupted often, however few files it has."""
    _, pauses, _ = drive(decode_upload(*multipart(("images", "a", bytes(10**6))), LIMITS))
    assert pauses > 50


def test_what_takes_long_is_done_apart() -> None:
    """A large file, a small one of a large image, an array of large images, and one in Fortran order.

    And small files of codecs whose time the size of a file does not bound; what is no pixels makes no difference.
    """
    limits = replace(LIMITS, max_pixels=10**7)
    noisy = file(Image.fromarray(RNG.integers(0, 256, (200, 200), dtype=np.uint8)))
    flat = file(Image.new("L", (1000, 1000)))
    for body, calls in (
        (multipart(("images", "a", noisy), ("images", "b", file(Image.fromarray(PIXELS)))), 1),
        ((flat, "image/png"), 1),
        ((npy(np.zeros((2, 300, 300), np.uint8)), "application/x-npy"), 2),
        ((npy(np.zeros((1, 60_000, 1), np.uint8)), "application/x-npy"), 0),
        ((npy(np.asfortranarray(RNG.integers(0, 256, (5, 6, 8), np.uint8))), "application/x-npy"), 1),
        ((npy(np.zeros((5, 6, 8), np.uint8)), "application/x-npy"), 0),
    ):
        assert drive(decode_upload(*body, limits))[2] == calls
    exif = Image.Exif()
    exif[0x0112] = 6
    notes = PngInfo()
    notes.add_text("Raw profile type exif", "x" * 10**6, zip=True)
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for form, options, calls in (
        ("png", {}, 0),
        ("png", {"pnginfo": notes}, 0),
        ("png", {"exif": exif, "icc_profile": icc}, 0),
        ("webp", {}, 0),
        ("webp", {"exif": exif}, 0),
        ("webp", {"lossless": True}, 1),
        ("jpeg", {"exif": exif}, 0),
        ("jpeg", {"progressive": True}, 1),
        ("bmp", {}, 0),
    ):
        small = file(Image.fromarray(PIXELS), form, **options)
        assert drive(decode_upload(small, "image/png", limits))[2] == calls, (form, options)
    text = base64.b64encode(noisy).decode()
    assert drive(decode_base64([text, text[:100]], limits))[2] == 1


def flipped(body: bytes) -> st.SearchStrategy[bytes]:
    """A file with some of its bytes changed and perhaps its end cut off."""

    def damage(changes: list[tuple[int, int]], length: int) -> bytes:
        noisy = bytearray(body)
        for place, value in changes:
            noisy[place % len(noisy)] = value
        return bytes(noisy[: max(1, length)])

    change = st.tuples(st.integers(0, len(body)), st.integers(0, 255))
    return st.builds(damage, st.lists(change, max_size=8), st.integers(len(body) // 2, len(body)))


WHOLE = [
    file(Image.fromarray(RGB_PIXELS)),
    file(Image.fromarray(PIXELS).convert("P")),
    file(Image.fromarray(RGB_PIXELS), "jpeg"),
    file(Image.fromarray(RGB_PIXELS), "webp"),
    file(Image.fromarray(RGB_PIXELS), "bmp"),
    npy(RGB_PIXELS[None]),
    multipart(("images", "a.png", file(Image.fromarray(PIXELS))))[0],
]


@given(st.one_of(st.binary(max_size=100), *map(flipped, WHOLE)), st.sampled_from(["boundary=BoUnD", "", 'boundary="']))
@example(b"\x93NUMPY\x01\x00\xff\xff", "")
def test_damaged_bytes_never_raise_anything_else(body: bytes, parameters: str) -> None:
    """Any bytes of any Content-Type give images or an error for the client."""
    for content_type in UPLOAD_TYPES:
        with suppress(ServiceError):
            for result in decode(body, COLOUR, f"{content_type}; {parameters}"):
                assert isinstance(result, Decoded | Invalid | TooLarge)


def test_conversions_agree_between_files_and_forms() -> None:
    """A file as the whole body and as a part of a form gives the same image."""
    body = file(Image.fromarray(RGB_PIXELS), "jpeg")
    form, content_type = multipart(("images", "a.jpg", body))
    np.testing.assert_array_equal(decoded(body).pixels, decoded(form, GREY, content_type).pixels)
