"""Numbers as people type them: 396M parameters, 100B tokens, 500MB, 1e21 FLOPs, 4 bits, 0.25 of the tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from qatlaw.bit_widths import BIT_WIDTHS, BIT_WIDTHS_TEXT
from qatlaw.errors import InputError

_PLAIN = {"": 1.0}
_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
_BYTES = {
    "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12,
    "KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30, "TIB": 2.0**40,
}  # fmt: skip
_NUMBER = r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+)\s*([A-Za-z]*)\s*$"

Reader = Callable[[str, str], float]
"""From an option's name and text to a finite number above 0; InputError for any other text."""


def _reader(allowed: str, units: Mapping[str, float], holds: Callable[[float], bool] = lambda _: True) -> Reader:
    def read(option: str, text: str) -> float:
        match = re.match(_NUMBER, text)
        unit = units.get(match[2].upper()) if match else None
        value = float(match[1].replace("_", "")) * unit if match and unit else 0.0
        if not (0 < value < float("inf") and holds(value)):
            raise InputError(option, text, f"must be {allowed}.")
        return value

    return read


_LONG = "with K, M, B or T if it is long: 2.3B"
parse_amount = _reader(f"a number from 1e-9 to 1e30, {_LONG}", _UNITS, lambda value: 1e-9 <= value <= 1e30)
parse_count = _reader(f"a number from 1 to 1e18, {_LONG}", _UNITS, lambda count: 1 <= count <= 1e18)
"""Reads parameters or tokens. Products of a few at the upper end stay finite, and torch counts to 9.2e18."""
parse_vocabulary = _reader("a number of tokens from 1 to 1B", _UNITS, lambda size: 1 <= size <= 1e9)
parse_nats = _reader("nats per token, above 0 and at most 100", _PLAIN, lambda nats: nats <= 100)
parse_bytes = _reader("bytes above 0 with their unit: 500MB, 1.5GB, 512MiB", _BYTES)
parse_share = _reader("above 0 and below 1: 0.25", _PLAIN, lambda share: share < 1)
parse_bits = _reader(f"one of {BIT_WIDTHS_TEXT}", _PLAIN, BIT_WIDTHS.__contains__)


def amount(value: float, digits: int = 3) -> str:
    """Some digits and a suffix: 2300000000.0 -> 2.3B."""
    for suffix, unit in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= unit * (1 - 0.5 * 10.0**-digits):  # 999,999 is 1M
            return f"{value / unit:.{digits}g}{suffix}"
    return f"{value:.{digits}g}"


def exact_amount(units: float) -> str:
    """A whole number as `amount` writes it where that loses no digit: 100B, but 96141861677."""
    short = amount(round(units), 6)
    return short if round(parse_amount("tokens", short)) == round(units) else str(round(units))


def bytes_label(size: float) -> str:
    """500MB, 1.5GB."""
    return f"{amount(size, 4)}B".replace("BB", "GB")
