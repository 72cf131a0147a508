"""`python -m service.codecs.decoder SECONDS BYTES`: decodes one image after the other for a service, until that ends.

Nothing in an image file says how long a codec takes for it, and a thread inside a codec can't be stopped. A process
can: it asks the system to be ended by a signal once one image has had so many seconds of the processor (SIGPROF),
whatever becomes of the service meanwhile, and to be given no more than so many bytes. What it reads and writes is bytes
of fixed form: whoever takes it over through a codec gains nothing by what it says.

A request: `REQUEST`, then the file. A reply: `REPLY`, then the pixels, or for an error its text.
"""

import contextlib
import signal
import struct
import sys
from pathlib import Path
from typing import BinaryIO

# As they are needed; Pillow would import all it has.
from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401

from service.codecs.image_file import ImageFile
from service.codecs.picture import Decoded, Shape, decode_picture
from service.errors import Invalid, ServiceError, TooLarge

REQUEST = struct.Struct("<4sBIIBQIIQ")  # format, orientation, shape, width and height, bytes that follow
REPLY = struct.Struct("<BBQ")  # which of REPLIES, whether it was converted, bytes that follow
REPLIES: tuple[type[Decoded] | type[ServiceError], ...] = (Decoded, Invalid, TooLarge)


def main() -> None:
    """Answer what comes by standard input, on standard output."""
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM):  # whoever started us ends us
        signal.signal(number, signal.SIG_IGN)
    _bound_memory(memory)
    while request := sys.stdin.buffer.read(REQUEST.size):
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer(request, sys.stdin.buffer, sys.stdout.buffer)
        signal.setitimer(signal.ITIMER_PROF, 0)


def answer(request: bytes, source: BinaryIO, sink: BinaryIO) -> None:
    """Decode one image."""
    form, orientation, height, width, channels, max_pixels, own_width, own_height, length = REQUEST.unpack(request)
    converted = False
    try:
        content = source.read(length)
        name = form.rstrip(b"\0").decode()
        file = ImageFile(name, [content], own_width, own_height, orientation, cost=0, is_quick=False)
        pixels, converted = decode_picture(file, Shape(height, width, channels, max_pixels))
        kind, content = 0, pixels.tobytes()
    except (Invalid, TooLarge) as error:
        kind, content = REPLIES.index(type(error)), error.detail.encode()
    sink.write(REPLY.pack(kind, converted, len(content)) + content)
    sink.flush()


def _bound_memory(more: int) -> None:
    """Take no more than this beside what we have."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on every system
        import resource  # noqa: PLC0415 - see above

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + more
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    main()
