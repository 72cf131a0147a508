"""Pixels decide whether a file can be read, and nothing that lies beside them; hostile files cost little."""

import io
import itertools
import struct
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError, features

from models.images.decoding import decode_any
from models.images.gif_tiff import parse_gif, parse_tiff
from models.images.image_file import ImageFileError, run_through
from models.images.preparation import Preparation, prepare

RNG = np.random.default_rng(0)
RGB = Image.fromarray(RNG.integers(0, 256, (12, 8, 3), dtype=np.uint8))


def file(picture: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, form, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def segment(code: int, data: bytes = b"") -> bytes:
    return struct.pack(">BBH", 0xFF, code, len(data) + 2) + data


def riff(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def entry(tag: int, kind: int, count: int, value: bytes, order: str = "<") -> bytes:
    return struct.pack(order + "HHI", tag, kind, count) + value


def exif(*entries: bytes, order: str = "<") -> bytes:
    """EXIF with these entries in its first directory."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(order + "IH", 8, len(entries)) + b"".join(entries) + bytes(4)


PNG, JPEG, WEBP = file(RGB, "png"), file(RGB, "jpeg", quality=95), file(RGB, "webp", lossless=True)
ROWS = RGB.tobytes()


def tiff(*more: bytes, order: str = "<") -> bytes:
    """An uncompressed TIFF of the picture with more entries beside those that it needs."""

    def short(tag: int, value: int) -> bytes:
        return entry(tag, 3, 1, struct.pack(order + "HH", value, 0), order)

    def long(tag: int, value: int) -> bytes:
        return entry(tag, 4, 1, struct.pack(order + "I", value), order)

    count = 9 + len(more)
    start = 8 + 2 + 12 * count + 4
    needed = [
        *(short(256, 8), short(257, 12), entry(258, 3, 3, struct.pack(order + "I", start), order), short(259, 1)),
        *(short(262, 2), long(273, start + 6), short(277, 3), short(278, 12), long(279, len(ROWS))),
    ]
    entries = sorted([*needed, *more], key=lambda one: struct.unpack(order + "H", one[:2]))
    return exif(*entries, order=order) + struct.pack(order + "HHH", 8, 8, 8) + ROWS


# What each format makes of a picture and of EXIF.
CARRIERS: dict[str, Callable[[bytes], bytes]] = {
    "png": lambda data: PNG[:33] + chunk(b"eXIf", data) + PNG[33:],
    "jpeg": lambda data: JPEG[:2] + segment(0xE1, b"Exif\0\0" + data) + JPEG[2:],
    "webp": lambda data: with_riff(riff(b"EXIF", data)),
}


def with_riff(extra: bytes) -> bytes:
    body = riff(b"VP8X", bytes([8, 0, 0, 0]) + struct.pack("<HBHB", 7, 0, 11, 0)) + WEBP[12:] + extra
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def upright(content: bytes) -> np.ndarray:
    picture, orientation = decode_any(content)
    return np.asarray(prepare(picture, orientation, Preparation(), None, None))


TAGS = (0x0000, 0x010E, 0x0110, 0x011A, 0x011B, 0x0128, 0x0132, 0x0202, 0x8769, 0x8773, 0x8825, 0x9C9B, 0xA005, 0xFFFF)
TYPES, COUNTS = (*range(15), 129, 0xFFFF), (0, 1, 3, 5, 2**31)


def odd_entries(order: str) -> Iterator[bytes]:
    for tag, kind, count in itertools.product(TAGS, TYPES, COUNTS):
        yield entry(tag, kind, count, b"72\0\xff", order)


@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
@pytest.mark.parametrize("form", [*CARRIERS, "tiff"])
def test_no_tag_keeps_a_photograph_from_being_read(form: str, order: str) -> None:
    """Of any tag, type and count beside the orientation, only the orientation is read."""
    turned = entry(0x112, 3, 1, struct.pack(order + "HH", 6, 0), order)
    plain = {"png": PNG, "jpeg": JPEG, "webp": WEBP, "tiff": tiff(order=order)}[form]
    expected = np.rot90(upright(plain), -1)
    for odd in odd_entries(order):
        entries = sorted([odd, turned], key=lambda one: struct.unpack(order + "H", one[:2]))
        content = tiff(*entries, order=order) if form == "tiff" else CARRIERS[form](exif(*entries, order=order))
        np.testing.assert_array_equal(upright(content), expected)


@pytest.mark.parametrize("form", [*CARRIERS, "tiff"])
def test_every_orientation_is_followed_once(form: str) -> None:
    """In TIFF, too, where Pillow would turn the picture by itself."""
    plain = {"png": PNG, "jpeg": JPEG, "webp": WEBP, "tiff": tiff()}[form]
    picture = decode_any(plain)[0]
    for value in range(1, 9):
        turned = entry(0x112, 3, 1, struct.pack("<HH", value, 0))
        content = tiff(turned) if form == "tiff" else CARRIERS[form](exif(turned))
        expected = np.asarray(prepare(picture, value, Preparation(), None, None))
        np.testing.assert_array_equal(upright(content), expected)


@pytest.mark.parametrize("kind", [*range(15), 0xFFFF])
@pytest.mark.parametrize("count", [0, 1, 2, 2**31])
def test_an_odd_orientation_means_the_same_in_every_format(kind: int, count: int) -> None:
    """Whatever type and count it has: read by its value, or upright."""
    for value in (b"\6\0\0\0", b"\0\6\0\0", b"6\0\0\0", b"\xff\xff\xff\xff", bytes(4)):
        turned = entry(0x112, kind, count, value)
        found = [decode_any(carry(exif(turned)))[1] for carry in CARRIERS.values()] + [decode_any(tiff(turned))[1]]
        assert len(set(found)) == 1


BROKEN_EXIF = (
    b"",
    b"I",
    b"II*\0",
    b"II*\0\xff\xff\xff\xff",
    b"\0" * 40,
    exif()[:9],
    b"MM\0*\0\0\0\x08\xff\xff",
    b"junk" * 99,
)
ODD: dict[str, bytes] = {
    **{f"{form} exif {n}": carry(data) for form, carry in CARRIERS.items() for n, data in enumerate(BROKEN_EXIF)},
    **{
        f"png {name}": PNG[:33] + extra + PNG[33:]
        for name, extra in {
            "2 MB of packed text": chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2_000_000))),
            "2 MB of packed profile": chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(2_000_000))),
            "text that is not packed": chunk(b"zTXt", b"a\0\0junk"),
            "another packing": chunk(b"iCCP", b"p\0\7junk"),
            "text with a wrong checksum": chunk(b"tEXt", b"a\0b")[:-1] + b"!",
            "profile with a wrong checksum": chunk(b"iCCP", b"a\0\0b")[:-1] + b"!",
            "exif with a wrong checksum": chunk(b"eXIf", exif())[:-1] + b"!",
            "short resolution": chunk(b"pHYs", b"\1"),
            "short gamma": chunk(b"gAMA", b""),
            "short chromaticities": chunk(b"cHRM", b"\0"),
            "short animation": chunk(b"acTL", b"\0"),
            "international text": chunk(b"iTXt", b"a\0\1\0\0\0junk"),
            "a chunk nobody knows": chunk(b"juNk", b"x" * 99),
        }.items()
    },
    **{
        f"jpeg {name}": JPEG[:2] + extra + JPEG[2:]
        for name, extra in {
            "short JFIF": segment(0xE0, b"JFIF\0\1"),
            "JFIF of nothing": segment(0xE0, b"JFIF\0"),
            "short Adobe": segment(0xEE, b"Adobe\0"),
            "profile in the wrong order": segment(0xE2, b"ICC_PROFILE\0\2\1junk"),
            "short profile": segment(0xE2, b"ICC_PROFILE\0"),
            "Photoshop's own": segment(0xED, b"Photoshop 3.0\0" + b"8BIM\4\4\0\xffjunk"),
            "several pictures": segment(0xE2, b"MPF\0" + exif(entry(0xB001, 4, 1, b"\2\0\0\0"))),
            "XMP": segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"'),
            "a comment": segment(0xFE, b"\xff\xd8\xff"),
        }.items()
    },
    **{
        f"webp {name}": with_riff(extra)
        for name, extra in {
            "profile": riff(b"ICCP", b"junk"),
            "XMP": riff(b"XMP ", b'<x tiff:Orientation="6"'),
            "anything": riff(b"junk", b"x"),
        }.items()
    },
    **{
        f"tiff {name}": tiff(extra)
        for name, extra in {
            "text as resolution": entry(0x11A, 2, 3, b"72\0\0"),
            "profile elsewhere": entry(0x8773, 7, 2**31, b"\xff\xff\xff\x7f"),
            "directory elsewhere": entry(0x8769, 4, 1, b"\xff\xff\xff\x7f"),
            "XMP": entry(0x2BC, 1, 2**20, b"\0\0\0\0"),
        }.items()
    },
}


@pytest.mark.parametrize("name", ODD)
def test_odd_parts_do_not_break_a_picture(name: str) -> None:
    """What is odd or broken beside the pixels is not looked at."""
    plain = {"png": PNG, "jpeg": JPEG, "webp": WEBP, "tiff": tiff()}[name.split(maxsplit=1)[0]]
    np.testing.assert_array_equal(upright(ODD[name]), upright(plain))


@pytest.mark.skipif("avif" not in features.get_supported(), reason="this Pillow has no AVIF")
@pytest.mark.parametrize("damage", [b"", b"II*", b"junkjunk"], ids=["sound", "cut", "junk"])
def test_an_avif_is_turned_by_itself_whatever_its_exif(damage: bytes) -> None:
    """Its rotation is a property of its own; EXIF may be anything."""
    turned = Image.Exif()
    turned[0x112], turned[0x10E] = 6, "a description"
    whole = file(RGB.resize((32, 16)), "avif", exif=turned)
    at = whole.index(b"MM\0*")
    picture, orientation = decode_any(whole[:at] + damage + whole[at + len(damage) :])
    assert (picture.size, orientation) == ((32, 16), 6)


FORMS = ["png", "jpeg", "webp", "bmp", "gif", "tiff", "tga", "ppm", "ico"]


@pytest.mark.parametrize("form", FORMS)
def test_pixels_that_are_cut_short_are_broken(form: str) -> None:
    """Half of a picture is none, however it is called."""
    noise = Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = file(noise, form, **({"compression": "tiff_lzw"} if form == "tiff" else {}))
    decode_any(whole)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises((ImageFileError, OSError, ValueError, SyntaxError)):
            decode_any(whole[: int(len(whole) * share)])


SAVED: dict[str, tuple[str, str, dict[str, object]]] = {
    **{f"gif {mode}": ("gif", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")},
    "gif with a comment": ("gif", "P", {"comment": b"x" * 3000}),
    "interlaced gif": ("gif", "RGB", {"interlace": 1}),
    "animated gif": ("gif", "RGB", {"save_all": True, "append_images": [RGB.convert("L").convert("RGB")]}),
    **{f"tiff {mode}": ("tiff", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")},
    **{
        f"tiff {kind}": ("tiff", "RGB", {"compression": kind})
        for kind in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg")
    },
    "big tiff": ("tiff", "RGB", {"big_tiff": True}),
    "tiff of a fax": ("tiff", "1", {"compression": "group4"}),
    "tiff of many pages": ("tiff", "RGB", {"save_all": True, "append_images": [RGB.convert("L")]}),
}


@pytest.mark.parametrize("name", SAVED)
def test_gif_and_tiff_keep_their_pixels(name: str) -> None:
    """What is left of a file is the picture that Pillow reads from the whole."""
    form, mode, options = SAVED[name]
    picture = RGB.convert("L").convert("I;16") if mode == "I;16" else RGB.convert(mode)
    content = file(picture, form, **options)
    with Image.open(io.BytesIO(content)) as whole:
        whole.load()
        found, _ = decode_any(content)
        assert (found.mode, found.size, found.info.get("transparency")) == (
            whole.mode,
            whole.size,
            whole.info.get("transparency"),
        )
        np.testing.assert_array_equal(np.asarray(found), np.asarray(whole))


def test_a_gif_of_comments_keeps_none_of_them() -> None:
    """Pillow joins them one by one, which takes hours for some megabytes."""
    plain = file(RGB.convert("P"), "gif")
    at = 13 + (3 << 1 + (plain[10] & 7))  # after the palette
    comments = b"\x21\xfe\1x\0"
    found = run_through(parse_gif(plain[:at] + comments * 5000 + plain[at:]))
    assert len(found.data) <= len(plain)
    with pytest.raises(ImageFileError, match="more than"):
        run_through(parse_gif(plain[:at] + comments * 100_000 + plain[at:]))


def test_a_tiff_of_tags_keeps_those_that_pixels_need() -> None:
    """Each of thousands of tags could be as large as the whole file."""
    many = [entry(0x8000 + n, 7, 2**20, b"\0\0\0\0") for n in range(3000)]
    found = run_through(parse_tiff(tiff(*many)))
    assert int.from_bytes(found.data[8:10], "little") == 9
    for more in ([many[0]] * 5000, [entry(0x111, 4, 2**30, bytes(4))]):
        with pytest.raises(ImageFileError):
            run_through(parse_tiff(tiff(*more) if len(more) > 1 else exif(*more)))


def test_a_picture_that_would_take_minutes_is_refused() -> None:
    """A small JPEG may visit each of its pixels two thousand times."""
    whole = file(Image.new("L", (4000, 4000)), "jpeg", progressive=True)
    at = whole.rindex(b"\xff\xda")
    with pytest.raises(ImageFileError, match="too long"):
        decode_any(whole[:at] + whole[at:-2] * 2000 + whole[-2:])


@pytest.mark.parametrize(
    "head",
    [
        b"P6 7000 7000 1000\n",
        b"P3 7000 7000 255\n",
        b"DDS " + struct.pack("<7I44x", 124, 0x1007, 7700, 7700, 0, 0, 0)
        + struct.pack("<8I5I", 32, 0x41, 0, 32, 0xF, 0xF0, 0xF00, 0xF000, 0x1000, 0, 0, 0, 0),
    ],
    ids=["PPM of other depth", "PPM in digits", "DDS of odd masks"],
)  # fmt: skip
def test_what_python_would_decode_for_minutes_is_refused(head: bytes) -> None:
    """Pillow decodes some kinds of files in Python, up to a hundred times slower than others."""
    with pytest.raises(ImageFileError, match="too long"):
        decode_any(head)


def test_a_large_picture_of_a_fast_format_is_decoded() -> None:
    """A plain PPM is copied, whatever its size."""
    picture, _ = decode_any(b"P5 7000 7000 255\n" + bytes(7000 * 7000))
    assert picture.size == (7000, 7000)


@pytest.mark.parametrize("content", [b"", b"<html>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n", b"\0" * 99])
def test_what_is_no_raster_is_not_identified(content: bytes) -> None:
    """Postscript neither: Pillow would have another program run it."""
    with pytest.raises(UnidentifiedImageError):
        decode_any(content)


@given(
    st.sampled_from([file(RGB, "gif"), tiff(), tiff(order=">"), file(RGB, "tiff", big_tiff=True)]),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255))),
    st.integers(0, 3000),
)
def test_any_bytes_of_a_gif_or_tiff_are_parsed_or_refused(
    whole: bytes, changes: list[tuple[int, int]], length: int
) -> None:
    """What is left is no longer than the file, and only ImageFileError is raised."""
    body = bytearray(whole)
    for at, value in changes:
        body[at % len(body)] = value
    body = body[: max(8, length)]
    parse = parse_gif if whole[:3] == b"GIF" else parse_tiff
    try:
        found = run_through(parse(bytes(body)))
    except ImageFileError:
        return
    assert len(found.data) <= len(body) + 2
    assert 1 <= found.orientation <= 8
