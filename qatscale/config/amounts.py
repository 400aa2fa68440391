"""Token amounts as people write them (`2.3B`, `100M`, `2.3e9`) and as they read them."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from qatlaw.amounts import amount
from qatscale.config.section import Allowed
from qatscale.errors import UserError

LARGEST = 10**18
SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_AMOUNT = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+)\s*([KMBGTkmbgt]?)\s*$")


def parse_amount(value: Any) -> int:
    """An amount as a whole number of units.

    Takes 2300000000, 2.3e9, '2.3B', '2_300M'. Raises ValueError for anything else, and for an amount that is negative,
    above `LARGEST` or not whole.
    """
    match = _AMOUNT.match(str(value)) if isinstance(value, int | float | str) else None
    if match is None:
        raise ValueError(f"{value!r} is not an amount; write a number, with K, M, B or T if it is long: 2.3B")
    number = Decimal(match[1].replace("_", ""))
    exact = number * SUFFIXES[match[2].upper()] if number <= LARGEST else number
    if exact > LARGEST:
        raise ValueError(f"{value!r} is more than {LARGEST:.0e}, the largest amount")
    if exact != exact.to_integral_value():
        raise ValueError(f"{value!r} is {exact} units, and an amount is a whole number of them")
    return int(exact)


def positive_amount(key: str, value: Any) -> int:
    """As `parse_amount`, above 0. UserError that names `key`, an option or the key of a file."""
    try:
        units = parse_amount(value)
    except ValueError as error:
        raise UserError(key, value, f"{error}.") from None
    if units < 1:
        raise UserError(key, value, "must be an amount above 0.")
    return units


def format_amount(units: float) -> str:
    """Four significant digits and a suffix: 2300000000 -> '2.3B'."""
    return amount(units, digits=4)


Tokens = Annotated[
    int,
    BeforeValidator(parse_amount, json_schema_input_type=int | float | str),
    Allowed("a whole number of tokens, 0 or more (2.3B, 100M, 50_000)"),
]
"""A number of tokens; `2.3B` stands for 2300000000."""
PositiveTokens = Annotated[Tokens, Field(gt=0), Allowed("a whole number of tokens above 0 (2.3B, 100M, 50_000)")]
