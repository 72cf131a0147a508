"""The client for programs without an event loop."""

import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar, Unpack

import httpx
import numpy as np
from PIL import Image

from gan_client.core import calls
from gan_client.core.batches import Rebatcher
from gan_client.core.calls import Drawing, FileFormat, FileOptions, Labels, PathFormat, PathOptions, SampleOptions
from gan_client.core.connection import Connection, errors_of_httpx
from gan_client.core.images import Images
from gan_client.core.paging import Pages, Part, Span
from gan_client.core.replies import Call, ReplyReader
from gan_client.core.retries import Attempts
from gan_client.errors import ConnectionFailedError, GanServiceError
from gan_client.results import Bundle, Encoding, UInt8, Verdict, Verification

T = TypeVar("T")


class Client:
    """A gan-service, for any number of threads.

    Args:
        url: Where the service is, with the prefix of a proxy if there is one.
        key: For services that need one.
        timeout_s: How long one request may take, its retries included. Long calls are several requests.
        retries: How often a request is sent again that was refused for now (429, 503) or got no whole answer.
        in_flight: Requests of long calls that are under way at once.
        http: An httpx client of your own, for other certificates, proxies or transports. It stays open.

    Raises (from every call):
        GanServiceError: See errors.py for its kinds.
        ValueError: The arguments contradict each other. Nothing was sent.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout_s: float = 60.0,
        retries: int = 5,
        in_flight: int = 4,
        http: httpx.Client | None = None,
    ) -> None:
        self._connection = Connection(url, key, timeout_s, retries, in_flight)
        self._http = http or httpx.Client()
        self._is_own = http is None
        self._executor = ThreadPoolExecutor(in_flight, "gan-client")  # its threads begin with the first long call

    def sample(
        self,
        count: int | None = None,
        seed: int | None = None,
        labels: Labels | None = None,
        bundle: str | None = None,
        **options: Unpack[SampleOptions],
    ) -> list[Image.Image]:
        """Draw images. Each has its `bundle`, `seed` and `index` in its `info`, with which it can be drawn again.

        Args:
            count: Any number of them. Default: as many as labels, else one.
            seed: Fixes the images. Default: a new one.
            labels: Classes by index or name, one for all or one for each. Default: drawn from the seed.
            bundle: name, or name@version. Default: the service's.
            options: See `SampleOptions`.
        """
        drawing = Drawing(count, seed, labels, options)
        return [image for part in self.parts(drawing.pages(bundle)) for image in drawing.images(part)]

    def sample_array(
        self,
        count: int | None = None,
        seed: int | None = None,
        labels: Labels | None = None,
        bundle: str | None = None,
        **options: Unpack[SampleOptions],
    ) -> UInt8:
        """Draw images as one array, uint8 (n, h, w, c). Arguments as for `sample`."""
        pages = Drawing(count, seed, labels, options).pages(bundle)
        return np.concatenate([part.value for part in self.parts(pages)])

    def sample_file(
        self,
        count: int | None = None,
        seed: int | None = None,
        labels: Labels | None = None,
        bundle: str | None = None,
        format: FileFormat = "png",  # noqa: A002 - the service's word
        **options: Unpack[FileOptions],
    ) -> bytes:
        """Draw images as one file: a picture of them all, or a zip, JSON or npy file. It is one request."""
        return self._run(Drawing(count, seed, labels, options).file(bundle, format))

    def iter_arrays(
        self,
        count: int | None = None,
        seed: int | None = None,
        labels: Labels | None = None,
        bundle: str | None = None,
        *,
        batch_size: int = 256,
        **options: Unpack[SampleOptions],
    ) -> Generator[UInt8]:
        """Draw images batch by batch: uint8 (batch_size, h, w, c), the last of `count` perhaps with fewer.

        The next batches are under way while one is used, and no more of them are in memory. Without `count` there is no
        last one, and several labels take turns.
        """
        pages = Drawing(count, seed, labels, options, endless=count is None).pages(bundle)
        return self._batches(pages, Rebatcher(batch_size))

    def discriminate(self, images: Images, labels: Labels | None = None, bundle: str | None = None) -> list[Verdict]:
        """Ask how real images look. An image that can't be read has its `error` as its verdict.

        Args:
            images: A path, a file's bytes, a PIL image or an array (h, w) or (h, w, c), or several of them; or an array
                (n, h, w) or (n, h, w, c).
            labels: Their classes, one for all or one for each. Default: the bundle names them.
            bundle: Whose discriminator judges.
        """
        return self._joined(calls.discriminate(images, labels, bundle))

    def encode(self, images: Images, bundle: str | None = None) -> list[Encoding]:
        """Ask where images lie in the generator's latent space. Images as for `discriminate`."""
        return self._joined(calls.encode(images, bundle))

    def verify(self, pictures: Images) -> list[Verification]:
        """Ask whether pictures are what their recipes give. Give files: PIL images have lost their recipe."""
        return self._joined(calls.verify(pictures))

    def interpolate(
        self, seed_from: int, seed_to: int, steps: int = 8, **options: Unpack[PathOptions]
    ) -> list[Image.Image]:
        """Draw the way from one seed's image to another's, in so many steps, both ends included."""
        strip = calls.interpolation(seed_from, seed_to, steps, "png", None, options)
        return calls.cut_strip(self._run(strip), steps)

    def interpolate_file(
        self,
        seed_from: int,
        seed_to: int,
        steps: int = 8,
        format: PathFormat = "gif",  # noqa: A002 - the service's word
        duration_ms: int | None = None,
        **options: Unpack[PathOptions],
    ) -> bytes:
        """The same as one file: an animation that takes `duration_ms`, or a strip (png)."""
        return self._run(calls.interpolation(seed_from, seed_to, steps, format, duration_ms, options))

    def bundles(self) -> list[Bundle]:
        """What the service has loaded."""
        return self._run(calls.bundle_list())

    def close(self) -> None:
        """Close the connections, once the requests that are under way have been answered: others are not sent."""
        self._executor.shutdown(cancel_futures=True)
        if self._is_own:
            self._http.close()

    def __enter__(self) -> Self:
        """Nothing is opened before the first call."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        self.close()

    def _batches(self, pages: Pages[UInt8], batches: Rebatcher) -> Generator[UInt8]:
        for part in self.parts(pages):
            yield from batches.add(part.value)
        yield from batches.rest()

    def _joined(self, pages: Pages[list[T]]) -> list[T]:
        return [result for part in self.parts(pages) for result in part.value]

    def parts(self, pages: Pages[T]) -> Iterator[Part[T]]:
        """The answers of a long call, in order: what the calls above are made of."""
        cut, given_up = pages.cut(), threading.Event()
        for span in cut:  # the first alone, for the others depend on what it says
            yield from self._part(pages, span, given_up)
            break
        waiting: deque[Future[list[Part[T]]]] = deque()
        try:
            while True:
                while len(waiting) < self._connection.in_flight and (more := next(cut, None)):
                    waiting.append(self._executor.submit(self._part, pages, more, given_up))
                if not waiting:
                    return
                yield from waiting.popleft().result()
        finally:  # an error, or the caller has enough
            given_up.set()
            for future in waiting:
                future.cancel()

    def _part(self, pages: Pages[T], span: Span, given_up: threading.Event) -> list[Part[T]]:
        """A span's answer, or several where one request can't have it all."""
        try:
            part = self._run(pages.call(span), given_up)
        except GanServiceError as error:
            halves = pages.halve(span, error)
        else:
            pages.learn(part)
            return [part]
        return [part for half in halves for part in self._part(pages, half, given_up)]

    def _run(self, call: Call[T], given_up: threading.Event | None = None) -> T:
        """The result of a call, after as many attempts as it takes."""
        attempts, given_up = self._connection.attempts(), given_up or threading.Event()
        while True:
            try:
                return self._attempt(call, attempts)
            except GanServiceError as error:
                delay_s = attempts.delay_after(error)
            if given_up.wait(delay_s):
                raise ConnectionFailedError("Nobody waits for the answer any more.")

    def _attempt(self, call: Call[T], attempts: Attempts) -> T:
        request = self._connection.request(call, attempts)
        with errors_of_httpx(self._connection), self._http.stream(**request) as response:
            reader = ReplyReader(call, attempts, response.status_code, response.headers)
            for chunk in response.iter_raw():
                reader.add(chunk)
        return reader.finish()
