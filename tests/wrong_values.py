"""Values that no feature will ever accept, for tests of refusals."""

from __future__ import annotations

NO_SUCH_BITS = 9
"""Codes of 9 bits do not fit their int8."""
