"""Who of a batch is answered: those who ask for little always, those who ask for much as far as there is time.

TorchServe sends the replies of a batch together, so that a costly request delays its neighbours by all that it takes. A request
is costly where its estimate is over ORDINARY_SECONDS. The costly ones of a batch share MAX_COSTLY_SECONDS, the cheapest first;
the others are told to come again. Knows nothing of requests but their sizes and estimates.
"""

from collections.abc import Mapping, Sequence

from handler.errors import OVERLOADED, Overloaded
from handler.limits import MAX_COSTLY_SECONDS, ORDINARY_SECONDS

LARGE_BODY_BYTES = 1_000_000  # over which to read a request may be costly by itself


class FairShare:
    """The time that the costly requests of one batch share."""

    def __init__(self) -> None:
        self._seconds_left = MAX_COSTLY_SECONDS
        self._is_untouched = True

    def admit(self, seconds: float) -> None:
        """Let a request begin that will take about so long. The first costly one may, whatever it takes.

        Raises:
            Overloaded: it is costly, and there is no time left for it beside those before.
        """
        if seconds <= ORDINARY_SECONDS:
            return
        if seconds > self._seconds_left and not self._is_untouched:
            raise Overloaded(OVERLOADED)
        self.count(seconds)

    def count(self, seconds: float) -> None:
        """Count time that a request has taken, where it was not estimated before."""
        if seconds > ORDINARY_SECONDS:
            self._seconds_left -= seconds
            self._is_untouched = False

    @property
    def is_spent(self) -> bool:
        """Whether nothing is left."""
        return self._seconds_left <= 0


def by_size(rows: Sequence[object]) -> list[int]:
    """Order the requests of a batch by the bytes of their bodies: their indices, the smallest first."""
    return sorted(range(len(rows)), key=lambda index: _size_of(rows[index]))


def may_be_costly(row: object, headers: Mapping[str, object]) -> bool:
    """Whether it may take long to read a request: it is large, or compressed."""
    return _size_of(row) > LARGE_BODY_BYTES or any(name.lower() == "content-encoding" for name in headers)


def _size_of(row: object) -> int:
    values = row.values() if isinstance(row, dict) else [row]
    return sum(len(value) for value in values if isinstance(value, str | bytes | bytearray))
