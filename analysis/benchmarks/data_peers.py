"""What others do to turn text into tokens on the disk; each is a process of its own, timed from start to end.

    python analysis/benchmarks/data_peers.py datasets|megatron TEXT.jsonl FOLDER SENTENCEPIECE.model WORKERS

`datasets`: `load_dataset` of the JSON lines, then a batched `map` with a fast tokenizer, which writes Arrow files.
The tokenizer is the SentencePiece model converted, so that the ids are the same. `megatron`: the scheme of
Megatron-LM's preprocessing, a pool of processes that encode single documents with SentencePiece while the parent
appends them to a `.bin`, and its index at the end. Both end each document with EOS, as `qatscale prepare` does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

CHUNK = 25
"""Documents that go to a process at once."""


def with_datasets(text: Path, folder: Path, model: Path, workers: int) -> None:
    os.environ["HF_HOME"] = str(folder / "home")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many processes as cores already
    import datasets
    import sentencepiece

    from qatscale.model.hugging_face_tokenizer import fast_tokenizer

    tokenizer = fast_tokenizer(model.read_bytes())
    tokenizer.encode_special_tokens = True
    eos = sentencepiece.SentencePieceProcessor(model_file=str(model)).eos_id()

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found = tokenizer.encode_batch_fast(rows["text"], add_special_tokens=False)
        return {"input_ids": [[*encoding.ids, eos] for encoding in found]}

    loaded = datasets.load_dataset("json", data_files=str(text), split="train")
    kind = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    loaded.map(encode, batched=True, num_proc=workers, remove_columns=loaded.column_names, features=kind)


_processor: Any


def _load(model: str) -> None:
    global _processor
    import sentencepiece

    _processor = sentencepiece.SentencePieceProcessor(model_file=model)


def _encode(line: str) -> list[int]:
    return [*_processor.encode(json.loads(line)["text"]), _processor.eos_id()]


def megatron_style(text: Path, folder: Path, model: Path, workers: int) -> None:
    import sentencepiece

    from qatscale.data.indexed_writer import encode_index, token_dtype

    dtype = token_dtype(sentencepiece.SentencePieceProcessor(model_file=str(model)).get_piece_size())
    lengths = []
    with (
        text.open(encoding="utf-8") as lines,
        (folder / "tokens.bin").open("wb") as out,
        multiprocessing.get_context("fork").Pool(workers, _load, (str(model),)) as pool,
    ):
        for ids in pool.imap(_encode, lines, CHUNK):
            out.write(np.array(ids, dtype).tobytes())
            lengths.append(len(ids))
    (folder / "tokens.idx").write_bytes(encode_index(np.array(lengths), dtype))


if __name__ == "__main__":
    name, text, folder, model, workers = sys.argv[1:]
    job = {"datasets": with_datasets, "megatron": megatron_style}[name]
    job(Path(text), Path(folder), Path(model), int(workers))
