"""Cuts a long call into requests, each of which the service takes and both sides have the memory for.

The first request is small. What its answer says decides the others: they are worth 8 MiB or two seconds of computing
at most, and pinned to its bundle's version, so that images of two versions are never mixed. A request that is refused
as too large is asked again as two halves, and later ones are no larger: so nobody has to know GAN_MAX_COUNT.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from gan_client.core.replies import Call
from gan_client.errors import GanServiceError, ReplyTooLargeError

T = TypeVar("T")
Span = tuple[int, int]  # first item, number of items

FIRST_ITEMS, MAX_ITEMS = 64, 1024
PART_BYTES, PART_S = 2**23, 2.0


@dataclass(frozen=True, slots=True)
class Part(Generic[T]):
    """What one request of a long call gives.

    Attributes:
        bundle: name@version, where the reply says it.
        item_bytes: How much of the reply is one item; 0 where it does not matter.
        item_s: Seconds of computing for one item; 0 where nobody says.
    """

    span: Span
    value: T
    bundle: str | None
    item_bytes: int = 0
    item_s: float = 0.0


class Pages(Generic[T]):
    """The requests of one long call.

    Args:
        spans: The items that are wanted, in order. There may be endlessly many.
        bundle: As it was asked for.
        call: Makes the request for a span of items, from a bundle.
    """

    def __init__(
        self, spans: Iterable[Span], bundle: str | None, call: Callable[[Span, str | None], Call[Part[T]]]
    ) -> None:
        self._spans = spans
        self._bundle = bundle
        self._call = call
        self._most = FIRST_ITEMS
        self._is_first = True

    def cut(self) -> Iterator[Span]:
        """The span of each request. The second is asked for once the first has been answered."""
        for start, count in self._spans:
            done = 0
            while done < count:
                some = min(self._most, count - done)
                yield start + done, some
                done += some

    def call(self, span: Span) -> Call[Part[T]]:
        """The request for a span. Reads files, where they are what is sent."""
        return self._call(span, self._bundle)

    def learn(self, part: Part[T]) -> None:
        """Take over what the first answer says."""
        if self._is_first:
            self._is_first = False
            self._bundle = part.bundle or self._bundle
            if self._most == FIRST_ITEMS:  # else it was too large already
                affordable = PART_BYTES / (part.item_bytes or 1), PART_S / (part.item_s or 1e-9)
                self._most = max(1, int(min(MAX_ITEMS, *affordable)))

    def halve(self, span: Span, error: GanServiceError) -> tuple[Span, Span]:
        """Two spans that are asked for in place of one.

        Raises:
            GanServiceError: The error itself, where another size would not help.
        """
        start, count = span
        if count == 1 or not _is_about_size(error):
            raise error
        half = count // 2
        self._most = min(self._most, count - half)
        return (start, half), (start + half, count - half)


def _is_about_size(error: GanServiceError) -> bool:
    """Whether fewer images in a request might succeed, by the words that the service's detail begins with."""
    is_over_a_limit = error.status == 422 and re.match("count|images:|latents: [0-9]+ rows", error.detail) is not None
    return is_over_a_limit or error.status == 413 or isinstance(error, ReplyTooLargeError)
