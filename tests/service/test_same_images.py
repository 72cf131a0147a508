"""A training image that is uploaded is judged as the very pixels that D saw; whatever lies beside its pixels."""

import io
import itertools
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.bundle import Bundle
from models.data.dataset import Dataset, division
from models.data.load import load_dataset
from models.images.preparation import UNDECLARED, Fit, Preparation
from models.inference.pixels import UInt8
from models.spec import ImageSpec
from service.app import create_app
from service.codecs.decode import Limits, decode_upload
from service.codecs.picture import decode_picture
from service.codecs.time_slices import run_steps
from service.settings import Settings

pytestmark = pytest.mark.anyio

RNG = np.random.default_rng(0)


def noise(width: int, height: int, mode: str) -> Image.Image:
    """A picture with something of everything; grey in grey modes, and where the mode ends in "grey"."""
    picture = Image.fromarray(RNG.integers(0, 256, (height, width, 4), dtype=np.uint8))
    if mode.endswith("grey"):
        picture = picture.convert("LA").convert("RGBA")
    if mode == "I;16":
        return Image.fromarray(RNG.integers(0, 65536, (height, width)).astype(np.uint16))
    mode = mode.removesuffix(" grey")
    return picture.convert(mode) if mode.endswith("A") else picture.convert("RGB").convert(mode)


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def sixteen_bits_with_alpha() -> bytes:
    """A PNG of a kind that Pillow reads as colours."""
    values = RNG.integers(0, 65536, (9, 7, 2)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    head = struct.pack(">IIBBBBB", 7, 9, 16, 4, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND")


def saved(picture: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()


def held(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


GREY: dict[str, bytes] = {
    "grey.png": saved(noise(9, 7, "L"), "png"),
    "alpha.png": saved(noise(20, 7, "LA"), "png"),
    "key.png": saved(noise(16, 16, "L"), "png", transparency=7),
    "bits.png": saved(noise(9, 30, "1"), "png"),
    "sixteen.png": saved(noise(12, 9, "I;16"), "png"),
    "sixteen-alpha.png": sixteen_bits_with_alpha(),
    "palette.png": saved(noise(5, 5, "RGB grey").quantize(16), "png"),
    "rgb.png": saved(noise(31, 20, "RGB grey"), "png"),
    "rgba.png": saved(noise(8, 8, "RGBA grey"), "png"),
    "rgb.bmp": saved(noise(10, 8, "RGB grey"), "bmp"),
    "photo.jpg": saved(noise(64, 48, "L"), "jpeg"),
    "lossless.webp": saved(noise(40, 30, "RGB grey"), "webp", lossless=True),
    "pixel.png": saved(noise(1, 1, "L"), "png"),
    "tall.png": saved(noise(2, 90, "LA"), "png"),
}
COLOUR: dict[str, bytes] = {
    **GREY,
    "rgba.png": saved(noise(20, 30, "RGBA"), "png"),
    "small.png": saved(noise(8, 8, "RGBA"), "png"),
    "rgb-key.png": saved(noise(8, 8, "RGB"), "png", transparency=(1, 2, 3)),
    "palette.png": saved(noise(16, 5, "RGB").quantize(16), "png", transparency=bytes(range(0, 256, 16))),
    "cmyk.jpg": saved(noise(32, 20, "CMYK"), "jpeg"),
    "progressive.jpg": saved(noise(32, 20, "RGB"), "jpeg", progressive=True),
    **{f"held-{n}.jpg": saved(noise(24, 16, "RGB"), "jpeg", exif=held(n)) for n in range(1, 9)},
    **{f"held-{n}.png": saved(noise(9, 16, "RGBA"), "png", exif=held(n)) for n in range(1, 9)},
    "held.webp": saved(noise(9, 16, "RGBA"), "webp", exif=held(6)),
    "moving.webp": saved(noise(9, 16, "RGBA"), "webp", save_all=True, append_images=[noise(9, 16, "RGBA")]),
    "moving.png": saved(noise(9, 16, "RGBA"), "png", save_all=True, append_images=[noise(9, 16, "RGBA")]),
    "wide.jpg": saved(noise(300, 3, "RGB"), "jpeg"),
    "pixel-rgb.png": saved(noise(1, 1, "RGBA"), "png"),
    "large.png": saved(noise(700, 500, "RGB"), "png"),
}


def in_order_of_names(dataset: Dataset) -> UInt8:
    """All images as the folder has them, before it was divided."""
    rows = np.concatenate([dataset.train.images, dataset.validation.images, dataset.test.images])
    train, validation, test = division("all", len(rows), 0)
    back = np.empty_like(rows)
    back[np.concatenate([train, validation, test])] = rows
    return back


def judged(content: bytes, image: ImageSpec, preparation: Preparation) -> UInt8:
    """The pixels that D gets of an upload."""
    limits = Limits(image, 10**6, 1, lambda: None, decode_picture, preparation)
    upload = run_steps(decode_upload(content, "image/png", limits))
    assert not upload.errors, upload.errors
    pixels: UInt8 = upload.pixels[0]
    return pixels


@pytest.mark.parametrize("background", ["#ffffff", "#000000", "#2050a0"])
@pytest.mark.parametrize("fit", ["crop", "pad", "squeeze"])
@pytest.mark.parametrize("files", [GREY, COLOUR], ids=["grey", "colour"])
def test_a_training_image_is_judged_as_it_was_trained_on(
    files: dict[str, bytes], fit: Fit, background: str, tmp_path: Path
) -> None:
    """Of whatever format, size, mode and orientation: the same bytes."""
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    dataset = load_dataset(str(tmp_path), None, seed=0, image_size=8, fit=fit, background=background)
    assert dataset.preparation is not None
    channels = dataset.train.images.shape[-1]
    is_grey = files is GREY and background != "#2050a0"  # through which a grey image shows coloured
    assert (channels, dataset.preparation.colour) == ((1, "grey") if is_grey else (3, "rgb"))
    image = ImageSpec(channels=channels, height=8, width=8)
    for name, row in zip(sorted(files), in_order_of_names(dataset), strict=True):
        np.testing.assert_array_equal(judged(files[name], image, dataset.preparation), row, err_msg=name)


def test_formats_that_are_not_uploaded_train_as_those_that_are(tmp_path: Path) -> None:
    """A GIF's first frame and a TIFF become what a PNG of the same picture becomes."""
    for number in range(5):
        picture = noise(20, 15, "RGB").quantize(64)
        picture.save(tmp_path / f"{number}.gif", save_all=True, append_images=[noise(20, 15, "RGB").quantize(64)])
        with Image.open(tmp_path / f"{number}.gif") as first:
            first.convert("RGB").save(tmp_path / f"{number}.png")
            first.convert("RGB").save(tmp_path / f"{number}.tif", compression="tiff_lzw")
    rows = in_order_of_names(load_dataset(str(tmp_path), None, seed=0, image_size=8))
    for of_one in rows.reshape(5, 3, -1):
        assert (of_one == of_one[0]).all()


@pytest.mark.parametrize("background", ["#ffffff", "#000000"])
def test_arrays_are_judged_as_they_were_resized(background: str, tmp_path: Path) -> None:
    """An image of a set that is no folder, uploaded as it is in the file, becomes the row that D saw."""
    images = RNG.integers(0, 256, (12, 20, 30), dtype=np.uint8)
    np.savez(tmp_path / "set.npz", images=images)
    dataset = load_dataset(str(tmp_path / "set.npz"), None, seed=0, image_size=8, fit="pad", background=background)
    assert dataset.preparation == Preparation("pad", background, colour="grey")
    rows = in_order_of_names(dataset)
    for image, row in zip(images, rows, strict=True):
        content = saved(Image.fromarray(image), "png")
        found = judged(content, ImageSpec(channels=1, height=8, width=8), dataset.preparation)
        np.testing.assert_array_equal(found, row)


def exif_of(*entries: bytes) -> bytes:
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4)


JPEG, PNG = saved(noise(8, 8, "RGB"), "jpeg"), saved(noise(8, 8, "RGB"), "png")
CARRIERS: dict[str, Callable[[bytes], bytes]] = {
    "png": lambda data: PNG[:33] + chunk(b"eXIf", data) + PNG[33:],
    "jpeg": lambda data: JPEG[:2] + struct.pack(">BBH", 255, 0xE1, len(data) + 8) + b"Exif\0\0" + data + JPEG[2:],
}


@pytest.mark.parametrize("form", CARRIERS)
def test_no_tag_keeps_an_upload_from_being_judged(form: str) -> None:
    """Of any tag, type and count beside the orientation, only the orientation is read."""
    image, turned = ImageSpec(channels=3, height=8, width=8), struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)
    expected = np.rot90(judged({"png": PNG, "jpeg": JPEG}[form], image, UNDECLARED), -1)
    for tag, kind, count in itertools.product((0, 0x11A, 0x8769, 0xA005), range(15), (0, 1, 3, 2**31)):
        odd = struct.pack("<HHI", tag, kind, count) + b"72\0\xff"
        found = judged(CARRIERS[form](exif_of(odd, turned)), image, UNDECLARED)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2_000_000))),
        chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2_000_000))),
        chunk(b"tEXt", b"a\0b")[:-1] + b"!",
        chunk(b"eXIf", b"junk"),
    ],
    ids=["much text", "large profile", "wrong checksum", "no EXIF"],
)
def test_odd_parts_of_an_upload_are_not_looked_at(extra: bytes) -> None:
    """Its pixels are judged, as if there were nothing beside them."""
    image = ImageSpec(channels=3, height=8, width=8)
    expected = judged(PNG, image, UNDECLARED)
    np.testing.assert_array_equal(judged(PNG[:33] + extra + PNG[33:], image, UNDECLARED), expected)


async def test_a_bundle_says_how_uploads_are_prepared(
    tiny_bundles: dict[str, Bundle], tmp_path: Path, start: Any
) -> None:
    """A picture is laid on white and cut for a bundle that declares so, and squeezed on black for an older one."""
    how = {"fit": "crop", "background": "#ffffff", "resampling": "lanczos", "orientation": "exif", "colour": "rgb"}
    for name in ("older", "newer"):
        shutil.copytree(tiny_bundles["rgb"].folder, tmp_path / name)
        manifest = tmp_path / name / "manifest.json"
        more = {"preparation": how} if name == "newer" else {}
        manifest.write_text(json.dumps(json.loads(manifest.read_bytes()) | {"name": name} | more))
    settings = Settings.model_validate({"bundles": tmp_path, "default_bundle": "newer", "device": "cpu"})
    star = Image.new("RGBA", (40, 40))
    star.paste((200, 30, 60, 255), (12, 12, 28, 28))
    image = tiny_bundles["rgb"].manifest.image
    async with start(create_app(settings)) as client:
        shown = {bundle["name"]: bundle["preparation"] for bundle in (await client.get("/bundles")).json()["bundles"]}
        assert shown == {"newer": how, "older": asdict(UNDECLARED)}
        for name in ("older", "newer"):
            pixels = judged(saved(star, "png"), image, Preparation(**shown[name]))
            assert set(pixels[0, 0]) == {255 if name == "newer" else 0}
            array = io.BytesIO()
            np.save(array, pixels[np.newaxis])
            logits = [
                (
                    await client.post(
                        "/discriminate", params={"bundle": name}, content=body, headers={"Content-Type": kind}
                    )
                ).json()["results"][0]["logit"]
                for body, kind in ((saved(star, "png"), "image/png"), (array.getvalue(), "application/x-npy"))
            ]
            assert logits[0] == logits[1]
