"""Which source each training sequence comes from: exact shares, as a pure function of the sequence's position."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from qatscale.config.schema import SHARE_UNITS


def deal(units: Sequence[int]) -> np.ndarray:
    """The source of each sequence of a period, [sum(units)], of which source j gets units[j].

    After any number n of sequences a source has had its share of n to within one. The i-th sequence of a source with
    share s has the window [floor(i/s), ceil((i+1)/s)), and the one whose window ends first is next. Earliest deadline
    first keeps all windows wherever that is possible, and here it is (Baruah, Cohen, Plaxton and Varvel 1996).
    """
    period, taken = sum(units), [0] * len(units)
    sources = np.empty(period, np.intp)
    for place in range(period):
        open_now = (j for j, unit in enumerate(units) if taken[j] * period < (place + 1) * unit)
        source = min(open_now, key=lambda j: -(-(taken[j] + 1) * period // units[j]))
        sources[place], taken[source] = source, taken[source] + 1
    return sources


class _Shares:
    """One mixture, from position 0 on."""

    def __init__(self, units: Sequence[int]) -> None:
        divisor = math.gcd(*units)
        units = [unit // divisor for unit in units]
        self._period = deal(units)
        self._before = np.zeros((len(self._period) + 1, len(units)), np.int64)
        np.cumsum(self._period[:, None] == np.arange(len(units)), axis=0, out=self._before[1:])

    def count(self, n: int) -> np.ndarray:
        """Sequences of each source among the first n."""
        periods, rest = divmod(n, len(self._period))
        return periods * self._before[-1] + self._before[rest]

    def sources(self, positions: np.ndarray) -> np.ndarray:
        return self._period[positions % len(self._period)]


class Mixture:
    """The sources of a run's sequences, by their position in the order of training.

    One mixture holds up to the position `change`, another from there on. A source continues where it was.
    """

    def __init__(
        self, mix: Mapping[str, float], later: Mapping[str, float] | None = None, change: int | None = None
    ) -> None:
        """Shares by name, multiples of 1/SHARE_UNITS. later, change: None = one mixture for all."""
        self.names = tuple(sorted({*mix, *(later or {})}))
        """The order of everything that is by source; the order in a recipe changes nothing."""
        first, second = (
            _Shares([round(shares.get(name, 0) * SHARE_UNITS) for name in self.names]) for shares in (mix, later or mix)
        )
        self._first, self._second = first, second
        self.change = change if later else None

    def count(self, n: int) -> np.ndarray:
        """Sequences of each source among the first n, int64 [sources]."""
        before = n if self.change is None else min(n, self.change)
        return self._first.count(before) + self._second.count(n - before)

    def sources(self, first: int, count: int) -> np.ndarray:
        """The source of each of the positions [first, first + count)."""
        positions = np.arange(first, first + count)
        if self.change is None:
            return self._first.sources(positions)
        later = self._second.sources(positions - self.change)
        return np.where(positions < self.change, self._first.sources(positions), later)


ONE_SOURCE = Mixture({"": 1})
"""Without `data.mix`: the prepared folder itself, called ""."""
