"""data_speed.py: that it runs to its tables, and that the other ways do the same work."""

from __future__ import annotations

import json
from pathlib import Path

import data_speed
import numpy as np
import pytest
from data_peers import megatron_style

from qatscale.data.indexed import IndexedReader
from qatscale.data.prepare import prepare
from qatscale.data.reader import TokenStream
from qatscale.data.tokenizer import train_sentencepiece
from tests.data.data_corpora import first_tokens

WORDS = ["the", "quick", "(brown)", "fox,", "42", "jumps", "", "over\n\n", "", "", "", "a", "lazy.dog"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    lines = [json.dumps({"text": f"{i} " + " ".join(draw.choice(WORDS, 200))}) for i in range(400)]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_quick_run_gives_every_table(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    data_speed.main(["--quick", "--text", str(text), "--out", str(out)])
    result = json.loads(out.read_text())
    tables = {table["title"]: {row["name"]: row for row in table["rows"]} for table in result["tables"]}
    reading = [f"Tokens to batches, {how}" for how in ("in order", "at random", "at random, from the disk")]
    assert list(tables) == ["Text to tokens", *reading, "Opening"]
    prepared = tables["Text to tokens"]["qatscale prepare"]
    assert prepared["extra"]["peak MiB"] > 20
    assert prepared["per_second"] > 0
    assert result["settings"]["quick"] is True
    assert result["tables"][0]["skipped"] == [{"name": "other ways", "why": "run with --peers"}]


def test_the_megatron_scheme_writes_the_same_tokens(text: Path, tmp_path: Path) -> None:
    tokenizer = train_sentencepiece((json.loads(line)["text"] for line in text.read_text().splitlines()), 300)
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "theirs").mkdir()
    megatron_style(text, tmp_path / "theirs", tmp_path / "saved" / "tokenizer.model", 1)
    ours = tmp_path / "ours"
    prepare([str(text)], ours, tokenizer=str(tmp_path / "saved"), validation_fraction=0, workers=1)
    theirs = IndexedReader(tmp_path / "theirs" / "tokens")
    assert len(theirs.lengths) == 400
    assert (theirs.tokens == first_tokens(TokenStream.open(ours, "train"), len(theirs.tokens))).all()
