"""Folders from elsewhere hold data: nothing in them is executed, and a damaged file is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qatscale.errors import UserError


def read_json(path: Path, key: str) -> Any:
    """UserError, about `key`, for a file that is missing, unreadable or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(key, str(path), f"cannot be read: {error}.") from None
