"""An uploaded file is reduced to what its pixels need, in short steps, before a decoder sees it."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

from models.images import image_file as imagefile
from models.images.decoding import decode
from models.images.image_file import MAX_SEGMENTS, QUICK_BYTES, ImageFile, ImageFileError, parse_image_file, run_through
from models.images.preparation import UNDECLARED, prepare

RNG = np.random.default_rng(0)
RGB = Image.fromarray(RNG.integers(0, 256, (24, 16, 3), dtype=np.uint8))
PICTURES = {
    "grey": RGB.convert("L"),
    "rgb": RGB,
    "cmyk": RGB.convert("CMYK"),
    "palette": RGB.quantize(16),
    "alpha": Image.merge("RGBA", (*RGB.split(), RGB.convert("L"))),
}


def file(picture: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()


def pixels(found: ImageFile) -> np.ndarray:
    return np.asarray(prepare(decode(found), found.orientation, UNDECLARED, (16, 24), 3))


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def segment(code: int, data: bytes = b"") -> bytes:
    return struct.pack(">BBH", 0xFF, code, len(data) + 2) + data


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[0x010E] = "a description " * 100
    made[0x0112] = orientation
    return made


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("form", "options"),
    [("png", {}), ("jpeg", {}), ("jpeg", {"progressive": True}), ("webp", {}), ("webp", {"lossless": True})],
    ids=["png", "jpeg", "progressive", "webp", "lossless webp"],
)
def test_the_orientation_is_read_and_all_else_of_exif_is_cut_out(
    form: str, options: dict[str, object], orientation: int
) -> None:
    """Pixels are as Pillow rotates them, and EXIF, profile and XMP are removed."""
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    whole = file(RGB, form, **options, exif=exif(orientation), icc_profile=icc)
    found = run_through(parse_image_file(whole))
    assert found.orientation == orientation
    for word in (b"description", b"Exif", b"eXIf", b"EXIF", b"ICC", b"iCCP"):
        assert word not in found.data
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(whole))).resize((16, 24), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(pixels(found), np.asarray(expected))


@pytest.mark.parametrize(("kind", "form"), [(4, "jpeg"), (3, "png"), (1, "png")])
def test_an_orientation_of_another_type_is_read_or_left_out(kind: int, form: str) -> None:
    """A LONG is read like a SHORT, and a value out of range means upright."""
    for order, mark in (("<", b"II*\0"), (">", b"MM\0*")):
        for value in (6, 0, 9):
            number = struct.pack(order + "I", value) if kind == 4 else struct.pack(order + "HH", value, 0)
            tiff = mark + struct.pack(order + "IHHHI", 8, 1, 0x112, kind, 1) + number + bytes(4)
            whole = file(RGB, form)
            extra = segment(0xE1, b"Exif\0\0" + tiff) if form == "jpeg" else chunk(b"eXIf", tiff)
            at = 2 if form == "jpeg" else 33
            found = run_through(parse_image_file(whole[:at] + extra + whole[at:]))
            assert found.orientation == (6 if value == 6 else 1)


@pytest.mark.parametrize("name", PICTURES)
def test_colours_stay_as_they_are(name: str) -> None:
    """What defines the colours is kept: palette, transparency, Adobe's marker."""
    for form in ("png", "jpeg", "webp", "bmp"):
        if (name, form) in {("cmyk", "png"), ("cmyk", "webp"), ("cmyk", "bmp"), ("palette", "jpeg"), ("alpha", "jpeg")}:
            continue
        whole = file(PICTURES[name], form)
        untouched = ImageFile(form.upper(), [whole], 16, 24, 1, 0, is_quick=False)
        kept = pixels(run_through(parse_image_file(whole)))
        np.testing.assert_array_equal(kept, pixels(untouched))


@pytest.mark.parametrize("form", ["png", "webp"])
def test_of_an_animation_the_first_frame_is_left(form: str) -> None:
    """The frames after the first are removed."""
    frames = [Image.fromarray(np.full((24, 16, 3), value, np.uint8)) for value in (255, 0, 0, 0)]
    whole = file(frames[0], form, save_all=True, append_images=frames[1:], duration=100, lossless=True)
    found = run_through(parse_image_file(whole))
    assert len(found.data) < len(whole)
    with Image.open(io.BytesIO(found.data)) as one:
        assert getattr(one, "n_frames", 1) == 1
    assert pixels(found).min() > 250


PNG, JPEG = file(PICTURES["grey"], "png"), file(PICTURES["grey"], "jpeg")
WEBP = file(RGB, "webp")
NOTES = PngInfo()
NOTES.add_text("a", "b" * 10**6, zip=True)

# Each adds something useless, n times, to a valid file.
FLOODS: dict[str, Callable[[int], bytes]] = {
    "jpeg of exif": lambda n: JPEG[:2] + segment(0xE1, b"Exif\0\0ab") * n + JPEG[2:],
    "jpeg of empty segments": lambda n: JPEG[:2] + segment(0xFE) * n + JPEG[2:],
    "jpeg of starts": lambda n: JPEG[:2] + b"\xff\xd8" * n + JPEG[2:],
    "png of text": lambda n: PNG[:33] + chunk(b"tEXt", b"a\0b") * n + PNG[33:],
    "png of frames": lambda n: PNG[:33] + chunk(b"fdAT", bytes(8)) * n + PNG[33:],
    "webp of exif": lambda n: WEBP + b"EXIF\2\0\0\0ab" * n,
    "webp of nothing": lambda n: WEBP + b"junk\0\0\0\0" * n,
}


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_of_segments_is_cut_out_or_refused(flood: str) -> None:
    """Up to ten thousand change nothing in what a decoder gets; a file with more is refused."""
    good = {"jpeg": JPEG, "png": PNG, "webp": WEBP}[flood.split(maxsplit=1)[0]]
    few, many = (run_through(parse_image_file(FLOODS[flood](n))) for n in (0, MAX_SEGMENTS - 20))
    assert few.data == many.data
    assert len(few.data) <= len(good)
    np.testing.assert_array_equal(pixels(many), pixels(few))
    with pytest.raises(ImageFileError, match=f"more than {MAX_SEGMENTS} segments"):
        run_through(parse_image_file(FLOODS[flood](MAX_SEGMENTS)))
    assert len(list(parse_image_file(FLOODS[flood](MAX_SEGMENTS - 20)))) > 100, "others get their turns"


@pytest.mark.parametrize("between", [b"\xff", b"\xff\xd0", b"\xff\x00"], ids=["fill", "restarts", "stuffed bytes"])
@pytest.mark.parametrize("place", ["before a segment", "in the scan"])
def test_fill_is_passed_over_in_steps(between: bytes, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill bytes are removed, however many there are and wherever a step ends among them."""
    at = 2 if place == "before a segment" else len(JPEG) - 2
    plain = run_through(parse_image_file(JPEG))
    for step in (1, 2, 7, 1000):
        monkeypatch.setattr(imagefile, "_PAUSE_BYTES", step)
        steps = 0
        pieces = parse_image_file(JPEG[:at] + between * 3000 + JPEG[at:])
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                found = end.value
                break
            steps += 1
        assert steps >= 3000 // max(step, 64)
        assert (found.width, found.height) == (plain.width, plain.height)
        if place == "before a segment":
            assert found.data == plain.data


def test_parts_that_may_come_once_are_kept_once() -> None:
    """A second header, palette or frame is removed."""
    palette = file(PICTURES["palette"], "png")
    twice = palette[:33] + chunk(b"IHDR", bytes(13)) + palette[33:-12] + chunk(b"PLTE", bytes(768)) * 99 + palette[-12:]
    assert run_through(parse_image_file(twice)).data == run_through(parse_image_file(palette)).data


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not PNG"),
        (b"GIF89a" + bytes(20), "not PNG"),
        (b"RIFF\0\0\0\0WAVE", "not PNG"),
        (b"\xff\xd8\xff\xe0\0\1" + bytes(20), "broken"),
        (b"\xff\xd8\xff\xe0\0\0" + bytes(20), "broken"),
    ],
)
def test_what_is_no_such_file_is_refused(body: bytes, says: str) -> None:
    """It is refused for its first bytes, or for a segment without a valid length."""
    with pytest.raises(ImageFileError, match=says):
        run_through(parse_image_file(body))


@pytest.mark.parametrize(
    ("whole", "cost"),
    [
        (file(RGB, "jpeg"), 1),
        (file(RGB, "jpeg", progressive=True), 6),
        (file(RGB, "webp", lossless=True), 4),
        (b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 100, -100, 1, 8, 1) + bytes(20), 50),
    ],
    ids=["jpeg", "progressive jpeg", "lossless webp", "bmp in runs"],
)
def test_slow_codecs_cost_more_and_are_not_quick(whole: bytes, cost: int) -> None:
    """The cost grows with the number of passes over the pixels."""
    found = run_through(parse_image_file(whole))
    assert found.cost - len(found.data) >= cost * found.width * found.height
    assert found.is_quick == (cost == 1)


PART = st.one_of(
    st.builds(segment, st.integers(0xC0, 0xFF), st.binary(max_size=40)),
    st.builds(chunk, st.sampled_from([b"IHDR", b"IDAT", b"PLTE", b"tRNS", b"eXIf", b"IEND", b"tEXt"]), st.binary()),
    st.builds(
        lambda kind, data: kind + len(data).to_bytes(4, "little") + data,
        st.sampled_from([b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF", b"EXIF"]),
        st.binary(max_size=40),
    ),
    st.binary(max_size=20),
    st.just(b"\xff" * 99),
)
HEAD = st.sampled_from([b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WEBP", b"BM", JPEG[:-40], PNG[:-20], WEBP])


@given(HEAD, st.lists(PART, max_size=30), st.booleans())
def test_any_bytes_are_parsed_or_refused(head: bytes, parts: list[bytes], as_form: bool) -> None:  # noqa: FBT001
    """The result is no longer than the file, a quick one is small, and only ImageFileError is raised."""
    body = head + b"".join(parts)
    try:
        found = run_through(parse_image_file(bytearray(body) if as_form else body))
    except ImageFileError:
        return
    assert len(found.data) <= len(body) + 2
    assert 1 <= found.orientation <= 8
    assert not (found.is_quick and len(found.data) > QUICK_BYTES)


def test_a_file_of_two_sizes_is_broken() -> None:
    """A decoder that finds another size than our parser would take a time that we did not estimate."""
    large = file(Image.new("RGB", (600, 900)), "webp")
    small = b"VP8X" + (10).to_bytes(4, "little") + bytes(4) + (600).to_bytes(3, "little") + bytes(3)
    for body in (large[:12] + small + large[12:], large + small):
        found = run_through(parse_image_file(body))
        assert found.width * found.height >= 600 * 900
        with pytest.raises((ImageFileError, OSError)):
            decode(found)


def test_a_jpeg_that_is_cut_short_stays_so() -> None:
    """A JPEG that is cut short is refused, not completed."""
    for length in (len(JPEG) // 2, len(JPEG) - 40):
        with pytest.raises(OSError, match=r"Truncated|truncated|identify"):
            decode(run_through(parse_image_file(JPEG[:length])))
