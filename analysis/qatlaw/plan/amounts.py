"""Amounts as people type them: 396M parameters, 100B tokens, 500MB, 1e21 FLOPs."""

from __future__ import annotations

import re

from qatlaw.errors import LawError

UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
BYTES = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12} | {
    "KIB": 2.0**10, "MIB": 2.0**20, "GIB": 2.0**30, "TIB": 2.0**40,
}  # fmt: skip
_NUMBER = r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+)\s*([A-Za-z]*)\s*$"


def parse_amount(option: str, text: str) -> float:
    """`2.3B` as a number above 0. LawError that names the option."""
    return _parse(option, text, UNITS, "a number above 0, with K, M, B or T if it is long: 2.3B.")


def parse_bytes(option: str, text: str) -> float:
    """`500MB` (10^6) or `500MiB` (2^20) in bytes. LawError that names the option."""
    return _parse(option, text, BYTES, "bytes above 0 with their unit: 500MB, 1.5GB, 512MiB.")


def _parse(option: str, text: str, units: dict[str, float], allowed: str) -> float:
    match = re.match(_NUMBER, text)
    if match is None or match[2].upper() not in units:
        raise LawError(option, text, allowed)
    value = float(match[1].replace("_", "")) * units[match[2].upper()]
    if not 0 < value < float("inf"):
        raise LawError(option, text, allowed)
    return value
