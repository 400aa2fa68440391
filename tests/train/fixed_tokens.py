"""Token shards that are the same on every machine, so that the runs on them are the same but for rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from qatscale.data.adopt import adopt
from qatscale.data.indexed_writer import IndexedWriter

VOCABULARY = 512
FOLLOWERS = 8
"""Tokens that can come after a token: what there is to learn."""


def markov_chain(length: int, seed: int) -> np.ndarray:
    """Tokens [length]; Philox' raw stream is the same in every version of NumPy."""
    successors = (np.random.Philox(key=1).random_raw(VOCABULARY * FOLLOWERS) % VOCABULARY).reshape(VOCABULARY, -1)
    choices = np.random.Philox(key=seed).random_raw(length) % FOLLOWERS
    tokens, token = np.empty(length, np.int64), 0
    for place, choice in enumerate(choices.tolist()):
        token = int(successors[token, choice])
        tokens[place] = token
    return tokens


def write_fixed_tokens(folder: Path) -> Path:
    """A data folder for recipe `debug`: 20,000 tokens to train on, 3,000 held out. The commonest ends documents."""
    folder.mkdir(parents=True)
    end = int(np.bincount(markov_chain(20_000, 2)).argmax())
    for name, length, seed in (("train", 20_000, 2), ("validation", 3_000, 3)):
        writer = IndexedWriter(folder / name, np.dtype(np.uint16))
        writer.add(markov_chain(length, seed), np.array([length]))
        writer.finish()
    adopt(folder, train=["train"], validation=["validation"], vocab_size=VOCABULARY, eos_id=end)
    return folder
