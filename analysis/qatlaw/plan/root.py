"""Roots by bisection, in NumPy alone: a plan does not wait for SciPy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from qatlaw.laws.base import Floats

HALVINGS = 60


def falling_root(f: Callable[[Floats], ArrayLike], low: ArrayLike, high: ArrayLike) -> Floats:
    """x in [low, high] where f falls through 0; the nearer end where it does not. Broadcasts."""
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    for _ in range(HALVINGS):
        x = (low + high) / 2
        above = np.asarray(f(x)) > 0
        low, high = np.where(above, x, low), np.where(above, high, x)
    return (low + high) / 2
