"""When to send a request again, and when to give up.

Every call of this client is a question whose answer its request alone decides, so all may be repeated. Those are that
could succeed the second time: what was refused for now (429, 503), and what got no whole answer.
"""

import math
import random
import re
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from gan_client.errors import GanServiceError

GRACE_S = 1.0  # the service says itself that the time is up, and that takes a moment to arrive
CONNECT_S = 10.0
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.25, 8.0


class Attempts:
    """The attempts of one call, which together may take `timeout_s`."""

    def __init__(self, retries: int, timeout_s: float) -> None:
        self._retries_left = retries
        self._backoff_s = _FIRST_BACKOFF_S
        self._deadline = time.monotonic() + timeout_s

    @property
    def left_s(self) -> float:
        """Seconds until the call has to be answered; never none at all, because no request can be sent with that."""
        return max(self._deadline - time.monotonic(), 0.001)

    @property
    def is_over(self) -> bool:
        """Whether it is too late for any answer."""
        return time.monotonic() > self._deadline + GRACE_S

    @property
    def headers(self) -> dict[str, str]:
        """What tells the service how long the answer is of use."""
        return {"X-Timeout-Ms": str(math.ceil(1000 * self.left_s))}

    @property
    def timeouts(self) -> dict[str, float]:
        """httpx's timeouts of one attempt."""
        left_s = self.left_s
        return {
            "connect": min(left_s, CONNECT_S),
            "read": left_s + GRACE_S,
            "write": left_s + GRACE_S,
            "pool": left_s,
        }

    def delay_after(self, error: GanServiceError) -> float:
        """Seconds to wait before the next attempt: what the service asks for and a random bit more.

        Without the random bit all those who were refused together would come back together.

        Raises:
            GanServiceError: The error itself, where another attempt is of no use or would come too late.
        """
        delay_s = (error.retry_after_s or 0.0) + random.uniform(0, self._backoff_s)  # noqa: S311 - no secret
        if not error.may_be_retried or not self._retries_left or delay_s >= self._deadline - time.monotonic():
            raise error
        self._retries_left -= 1
        self._backoff_s = min(2 * self._backoff_s, _MAX_BACKOFF_S)
        return delay_s


def parse_retry_after(value: str | None) -> float | None:
    """Seconds, from the field's two forms; None where it is missing or can't be read."""
    if value is None:
        return None
    if re.fullmatch("[0-9]{1,9}", value):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
        return max((date - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError, OverflowError):  # TypeError: a date without a zone
        return None
