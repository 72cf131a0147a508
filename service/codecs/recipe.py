"""Puts into a picture's file what made it, and that a machine did; and finds a recipe in a file from anywhere.

A recipe is JSON. In PNG it is a text chunk, `gan-service`; in JPEG and WebP an element of XMP. XMP also names IPTC's
digital source type of what a trained model made, which programs that show or keep pictures look for; a picture without
a recipe can carry that alone. All of it is put into the finished file, so the pixels are the same bytes as without.

Files from anywhere are searched for the marks before a recipe: no chunk is parsed and no XML. What is found is no more
than text of bounded length, whose meaning is for the caller to check.
"""

from typing import Literal, Self
from xml.sax.saxutils import escape, unescape

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.inference.png import HEAD_BYTES, chunk
from service.codecs.time_slices import Steps

PictureFormat = Literal["png", "webp", "jpeg"]

MAX_RECIPE_IMAGES = 8192  # in one picture: JPEG has room for 64 KiB of XMP, and each image may have a label of its own
MAX_RECIPE_BYTES = 64_000
_INDEX_LIMIT = 2**53

_TEXT = b"tEXtgan-service\0"
_ELEMENT = b"gan:recipe"
_ENDS = {b">": b"<", b'="': b'"', b"='": b"'"}  # an element, or an attribute as other programs may have rewritten it
_QUOTES = {"&quot;": '"', "&apos;": "'"}
_SEARCHED_BYTES = 2**16  # in one step
_ANIMATED_PNG = b"\0\0\0\x08acTL"  # a chunk's length and name: as eight bytes they are not in pixels by chance

# https://ns.adobe.com/xap and IPTC Photo Metadata, "Digital Source Type".
_XMP = (
    b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    b'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"%b'
    b'</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
_MARK = _XMP % b"/>"
_PNG_MARK = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + _MARK)
_JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"
# Of VP8X, the chunk that a WebP with anything beside its pixels begins with.
_HAS_ANIMATION, _HAS_XMP, _HAS_ALPHA = 0x02, 0x04, 0x10


class Recipe(BaseModel):
    """What makes a picture: the same request gives the same one."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    bundle: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}@[0-9a-f]{12}$", description="name@version.")
    seed: int = Field(ge=0, lt=_INDEX_LIMIT)
    first_index: int = Field(ge=0, lt=_INDEX_LIMIT, description="Index, within the seed, of the first image.")
    count: int = Field(ge=1, le=MAX_RECIPE_IMAGES, description="Images in the picture.")
    labels: list[int] | None = Field(
        min_length=1,
        max_length=MAX_RECIPE_IMAGES,
        description="The class of each image, or one for all; null for a bundle without classes.",
    )
    truncation: float = Field(gt=0, le=1, description="Factor on the latent.")
    select: Literal["none", "discriminator"] = Field("none", description="How images were chosen among candidates.")
    layout: Literal["grid", "strip"] = Field(description="A strip is a grid of one row.")
    columns: int = Field(ge=1, description="Images in each row.")
    scale: int = Field(ge=1, le=16, description="Every pixel is repeated this many times in both directions.")
    format: PictureFormat = Field(description="Of the file.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Refuse what no request could have asked for."""
        if self.first_index + self.count > _INDEX_LIMIT or self.columns > self.count:
            raise ValueError("there are no such images")
        if self.labels is not None and (len(self.labels) not in {1, self.count} or min(self.labels) < 0):
            raise ValueError("one label for all, or one for each image")
        return self


def mark(file: bytes, form: str, recipe: bytes | None) -> bytes:
    """A picture's file that says it was generated, and by which recipe.

    Args:
        file: A PNG (APNG too), JPEG, WebP or GIF as our encoders write them.
        form: Its format: `png`, `apng`, `jpeg`, `webp` or `gif`.
        recipe: A `Recipe` as JSON in ASCII; None for a picture that has none.
    """
    match form:
        case "png" | "apng":
            said = _PNG_MARK if recipe is None else chunk(b"tEXt", b"gan-service\0" + recipe) + _PNG_MARK
            return b"".join([file[:HEAD_BYTES], said, file[HEAD_BYTES:]])
        case "jpeg":
            return _mark_jpeg(file, _JPEG_XMP + _xmp(recipe))
        case "webp":
            return _mark_webp(file, _xmp(recipe))
        case "gif":
            return _mark_gif(file, _xmp(recipe))
    raise ValueError(form)


def _xmp(recipe: bytes | None) -> bytes:
    if recipe is None:
        return _MARK
    quoted = escape(recipe.decode("ascii")).encode("ascii")
    return _XMP % (b' xmlns:gan="urn:gan-service"><gan:recipe>%b</gan:recipe></rdf:Description>' % quoted)


def _mark_jpeg(file: bytes, content: bytes) -> bytes:
    """An APP1 segment after JFIF's, which has to be the first (XMP specification, part 3, 1.1.3)."""
    at = 4 + int.from_bytes(file[4:6], "big")
    return b"".join([file[:at], b"\xff\xe1", (2 + len(content)).to_bytes(2, "big"), content, file[at:]])


def _mark_webp(file: bytes, xmp: bytes) -> bytes:
    """A chunk at the end, and at the beginning one that announces it (RFC 9649, 2.7)."""
    if file[12:16] == b"VP8X":
        head, rest = bytearray(file[12:30]), file[30:]
        head[8] |= _HAS_XMP
    else:  # lossless: VP8L, a byte, and 14 bits each of width − 1 and height − 1, and whether there is transparency
        bits, rest = int.from_bytes(file[21:25], "little"), file[12:]
        flags = _HAS_XMP | (_HAS_ALPHA if bits >> 28 & 1 else 0)
        sides = (side.to_bytes(3, "little") for side in (bits & 0x3FFF, bits >> 14 & 0x3FFF))
        head = bytearray(b"VP8X\n\0\0\0" + bytes([flags, 0, 0, 0]) + b"".join(sides))
    said = b"XMP " + len(xmp).to_bytes(4, "little") + xmp + bytes(len(xmp) % 2)
    size = 4 + len(head) + len(rest) + len(said)
    return b"".join([b"RIFF", size.to_bytes(4, "little"), b"WEBP", head, rest, said])


def _mark_gif(file: bytes, xmp: bytes) -> bytes:
    """An application extension after the colours (XMP specification, part 3, 1.1.2).

    Its text is not cut into blocks. For readers that take each of its bytes for a block's length, a ramp of lengths
    follows, and every way through that ends at its last byte.
    """
    flags = file[10]
    at = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    ramp = b"\x01" + bytes(range(255, -1, -1)) + b"\0"
    return b"".join([file[:at], b"!\xff\x0bXMP DataXMP", xmp, ramp, file[at:]])


def find_recipe(file: bytes | bytearray) -> Steps[bytes | None]:
    """The text of the first recipe in a file; None where there is none, or a longer one than any of ours."""
    overlap = max(len(_TEXT), len(_ELEMENT)) - 1
    for start in range(0, len(file), _SEARCHED_BYTES):
        stop = start + _SEARCHED_BYTES + overlap
        if (at := file.find(_TEXT, start, stop)) >= 0:
            return _text_of_chunk(file, at)
        if (at := file.find(_ELEMENT, start, stop)) >= 0:
            return _text_of_xmp(file, at + len(_ELEMENT))
        yield None
    return None


def _text_of_chunk(file: bytes | bytearray, at: int) -> bytes | None:
    length = int.from_bytes(file[max(0, at - 4) : at], "big") - (len(_TEXT) - 4)
    start = at + len(_TEXT)
    return bytes(file[start : start + length]) if 0 < length <= min(MAX_RECIPE_BYTES, len(file) - start) else None


def _text_of_xmp(file: bytes | bytearray, at: int) -> bytes | None:
    begin = next((begin for begin in _ENDS if file.startswith(begin, at)), None)
    if begin is None:
        return None
    start = at + len(begin)
    stop = file.find(_ENDS[begin], start, start + 2 * MAX_RECIPE_BYTES)  # quotes may be written as entities
    if stop < 0:
        return None
    text = unescape(bytes(file[start:stop]).decode("utf-8", "replace"), _QUOTES).strip().encode()
    return text if len(text) <= MAX_RECIPE_BYTES else None


def is_animation(file: bytes | bytearray) -> Steps[bool]:
    """Whether a PNG or WebP says that it has more than one picture; no recipe of ours makes such."""
    if file[12:16] == b"VP8X":
        return bool(file[20:21]) and bool(file[20] & _HAS_ANIMATION)
    # The pixels may follow any number of other chunks, which may hold anything. So all of the file is searched.
    for start in range(0, len(file) if file.startswith(b"\x89PNG") else 0, _SEARCHED_BYTES):
        if file.find(_ANIMATED_PNG, start, start + _SEARCHED_BYTES + len(_ANIMATED_PNG) - 1) >= 0:
            return True
        yield None
    return False
