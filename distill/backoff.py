"""How long to wait before a request is sent again: pure functions of what was answered."""

import dataclasses
import email.utils
import math
import random
from collections.abc import Mapping
from datetime import UTC, datetime

from moe.validation import require


@dataclasses.dataclass(frozen=True)
class Backoff:
    """Waits that double, each drawn anew, so that many who failed together do not return together.

    Attributes:
        attempts: requests in all, the first included.
        first: seconds that the first wait is below.
        longest: seconds that every wait is below, but one that the server names.

    Source: 'full jitter', AWS Architecture Blog, Exponential Backoff And Jitter (2015).
    """

    attempts: int = 6
    first: float = 1.0
    longest: float = 60.0

    def __post_init__(self) -> None:
        require(self.attempts >= 1, 'attempts', 'at least 1', self.attempts)
        require(self.first > 0, 'first_wait', 'positive seconds', self.first)
        valid = self.longest >= self.first
        require(valid, 'longest_wait', f'at least first_wait={self.first} seconds', self.longest)

    def seconds(self, failures: int, asked: float | None, draw: random.Random) -> float:
        """Draws the wait after a number of failures in a row.

        Args:
            failures: at least 1.
            asked: seconds that the server asked for; none of them is cut short.
            draw: of the jitter.

        Returns:
            Uniform over [0, min(longest, first * 2^(failures - 1))); where the server named a time,
            as much after that.
        """
        reach = min(self.longest, self.first * 2.0 ** min(failures - 1, 64))
        return (asked or 0.0) + draw.uniform(0, reach)


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Reads how long a server asks to be left alone.

    Args:
        headers: of its answer, by names in lower case; `retry-after-ms` counts before
            `retry-after`, which is a number of seconds or a date.
        now: of the clock that a date is compared with; by default this machine's.

    Returns:
        Seconds, at least 0; None where it does not say, or nothing that can be read.
    """
    for name, unit in (('retry-after-ms', 1e-3), ('retry-after', 1.0)):
        try:
            seconds = float(headers[name]) * unit
        except (KeyError, ValueError):
            continue
        if math.isfinite(seconds):
            return max(0.0, seconds)
    try:
        date = email.utils.parsedate_to_datetime(headers['retry-after'])
    except (KeyError, ValueError):
        return None
    aware = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (aware - (now or datetime.now(UTC))).total_seconds())
