"""Damaged files of a run: the file and the key are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qatlaw.errors import InputError
from qatlaw.run_files import read_run_file

WHOLE: dict[str, dict[str, Any]] = {
    "run.json": {"name": "a", "id": "1", "created": 2.0, "parent": None, "n_params": 3, "of a later version": []},
    "timeline.json": {
        "steps": 4, "tokens_per_step": 8, "switch_step": None,
        "segments": [{"phase": "stable", "start": 0, "end": 4, "quantized": False}],
    },
    "done.json": {"step": 4, "finished": 5.0, "metrics": {"final/val_loss": 3.0, "scheme": "fp", "switch_step": None}},
}  # fmt: skip
DAMAGES = [
    ("run.json", {"name": 3}, "name: Input should be a valid string"),
    ("run.json", {"id": None}, "id: Input should be a valid string"),
    ("run.json", {"created": "NaN"}, "created: Input should be a finite number"),
    ("run.json", {"parent": {"name": "x"}}, "parent.folder: Field required"),
    ("run.json", {"n_params": -1}, "n_params: Input should be greater than or equal to 0"),
    ("run.json", {"n_params": 2**70}, "n_params: Input should be less than"),
    ("timeline.json", {"steps": "4"}, "steps: Input should be a valid integer"),
    ("timeline.json", {"segments": [{}]}, "segments.0.phase: Field required"),
    ("done.json", {"metrics": 3}, "metrics: Input should be a valid dictionary"),
]


@pytest.mark.parametrize(("name", "change", "said"), DAMAGES)
def test_a_wrong_type_is_named(name: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(WHOLE[name]))
    assert read_run_file(path) == WHOLE[name]
    path.write_text(json.dumps(WHOLE[name] | change))
    with pytest.raises(InputError) as caught:
        read_run_file(path)
    assert caught.value.value == str(path)
    assert said in caught.value.problem


@pytest.mark.parametrize("name", [*WHOLE, "recipe.yaml"])
@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff\xfe", b"3", b"[]", b"{"])
def test_what_is_no_such_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}.*(is empty|cannot be read|is damaged)"):
        read_run_file(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read: "):
        read_run_file(tmp_path / "nowhere" / name)
