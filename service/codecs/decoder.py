"""`python -m service.codecs.decoder SECONDS BYTES`: a process that decodes images for the service, one at a time.

An image file does not say how long a codec will take for it, and a thread inside a codec can't be stopped. A process
can: this one has the system kill it (SIGPROF) when one image has used SECONDS of processor time, even if the service
has ended meanwhile, and limits itself to BYTES more memory than it has at its start.

It reads requests from standard input and writes replies to standard output until standard input ends. A request is
`REQUEST` followed by the file; a reply is `REPLY` followed by the pixels or by an error's text. These are plain bytes
of a fixed layout, so that an attacker who takes over this process through a codec can't attack the service with them.
"""

import contextlib
import signal
import struct
import sys
from pathlib import Path
from typing import BinaryIO, get_args

# The formats that are needed; Pillow by itself would import all that it knows.
from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401

from models.images.image_file import ImageFile
from models.images.preparation import Fit, Preparation, Resampling
from service.codecs.picture import Decoded, Shape, decode_picture
from service.errors import Invalid, ServiceError, TooLarge

# Format, orientation, width, height, length of the file in bytes; Shape, of whose preparation fit and resampling by
# their place in FITS and RESAMPLINGS, and the background.
REQUEST = struct.Struct("<4sBIIQIIBQBB7s")
FITS, RESAMPLINGS = get_args(Fit), get_args(Resampling)
REPLY = struct.Struct("<BBQ")  # index in REPLIES, Decoded.converted, bytes that follow
REPLIES: tuple[type[Decoded] | type[ServiceError], ...] = (Decoded, Invalid, TooLarge)


def main() -> None:
    """Answer requests from standard input until it ends."""
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM):  # the service ends this process
        signal.signal(number, signal.SIG_IGN)
    _bound_memory(memory)
    while request := sys.stdin.buffer.read(REQUEST.size):
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer(request, sys.stdin.buffer, sys.stdout.buffer)
        signal.setitimer(signal.ITIMER_PROF, 0)


def request_of(file: ImageFile, shape: Shape) -> bytes:
    """What a process is sent before the file."""
    how, length = shape.preparation, sum(map(len, file.pieces))
    return REQUEST.pack(
        *(file.format.encode(), file.orientation, file.width, file.height, length),
        *(shape.height, shape.width, shape.channels, shape.max_pixels),
        *(FITS.index(how.fit), RESAMPLINGS.index(how.resampling), how.background.encode()),
    )


def answer(request: bytes, source: BinaryIO, sink: BinaryIO) -> None:
    """Read the file that follows `request`, decode it and write the reply."""
    form, orientation, own_width, own_height, length, *more = REQUEST.unpack(request)
    height, width, channels, max_pixels, fit, resampling, background = more
    converted = False
    try:
        name, content = form.rstrip(b"\0").decode(), source.read(length)
        file = ImageFile(name, [content], own_width, own_height, orientation, cost=0, is_quick=False)
        preparation = Preparation(FITS[fit], background.decode(), RESAMPLINGS[resampling])
        pixels, converted = decode_picture(file, Shape(height, width, channels, max_pixels, preparation))
        kind, content = 0, pixels.tobytes()
    except (Invalid, TooLarge) as error:
        kind, content = REPLIES.index(type(error)), error.detail.encode()
    sink.write(REPLY.pack(kind, converted, len(content)) + content)
    sink.flush()


def _bound_memory(more: int) -> None:
    """Limit the address space to what is in use now and `more` bytes."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # not every system has this
        import resource  # noqa: PLC0415 - not on Windows

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    main()
