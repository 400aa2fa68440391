"""Folders from elsewhere hold data: nothing in them is executed, and a damaged file is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qatlaw.files import read_small
from qatscale.errors import UserError

MOST_VALUES = 8_000_000
"""Values of a file: a tokenizer of 256,000 pieces has two million."""
_Pairs = list[tuple[str, Any]]


def read_json(path: Path, key: str, from_pairs: Callable[[_Pairs], dict[str, Any]] | None = None) -> Any:
    """UserError, about `key`, for a file that is missing, unreadable or not JSON.

    from_pairs: makes an object's content of its pairs, and raises ValueError for what it refuses.
    """
    try:
        return json.loads(read_small(path, MOST_VALUES), object_pairs_hook=from_pairs)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(key, str(path), f"cannot be read: {reason}.") from None


def read_object(path: Path, key: str, from_pairs: Callable[[_Pairs], dict[str, Any]] | None = None) -> dict[str, Any]:
    """As `read_json`, for a file that has to hold a JSON object."""
    content = read_json(path, key, from_pairs)
    if not isinstance(content, dict):
        raise UserError(key, str(path), f"holds a {type(content).__name__} where a JSON object is expected.")
    return content


def check_json_files(folder: Path, key: str, auto_class: str = "Auto") -> None:
    """UserError, about `key`, for a Hugging Face folder with a damaged JSON file or one that names code.

    auto_class: the class of transformers whose code would run, or the beginning of its name. Loading with
    `trust_remote_code=False` may ignore such code, and would then compute something else than its author meant.
    """
    for path in sorted(folder.glob("*.json")):
        content = read_json(path, key)
        code = content.get("auto_map") if isinstance(content, dict) else None
        if code and (isinstance(code, list) or any(str(name).startswith(auto_class) for name in code)):
            problem = "names Python code to load it with (auto_map), which qatscale never executes."
            raise UserError(key, str(path), problem, "Give a folder that transformers loads with a class it ships.")
        if kernels := _hub_kernels(content):
            raise UserError(key, str(path), f"{kernels} names code on the Hub, which qatscale never executes.")


def _hub_kernels(content: Any) -> str:
    """The key of a configuration that makes transformers download an attention and run it: "owner/name"."""
    parts = content.items() if isinstance(content, dict) else ()
    inner = (_hub_kernels(value) for _, value in parts)
    own = (name for name, value in parts if name.endswith("_implementation") and "/" in str(value))
    return next(own, "") or next(filter(None, inner), "")


def check_safetensors(folder: Path, key: str) -> None:
    """UserError, about `key`, for a file of tensors that cannot be opened, and for more layers than tensors."""
    from safetensors import SafetensorError, safe_open

    tensors, config = 0, folder / "config.json"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="np") as file:
                tensors += len(file.keys())
        except (SafetensorError, OSError) as error:
            raise UserError(key, str(path), f"cannot be read: {error}.") from None
    layers = read_object(config, key).get("num_hidden_layers") if config.is_file() else None
    if tensors and isinstance(layers, int) and layers > tensors:  # before anything loops over them
        problem = f"num_hidden_layers is {layers}, and the folder holds {tensors} tensors."
        raise UserError(key, str(config), problem)
