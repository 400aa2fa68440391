"""A tokenizer as metadata of a GGUF file, from which llama.cpp builds one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import TokenType

from qatscale.data.segments import model_proto
from qatscale.data.tokenizer import HUGGING_FACE_FILE, SENTENCEPIECE_FILE
from qatscale.errors import UserError
from qatscale.model.hugging_face_tokenizer import load_fast_tokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = "|".join(
    (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*",
     r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")
)  # fmt: skip
_SPLITS = {_GPT2: "gpt-2", _LLAMA3: "llama-bpe"}
"""Pattern that splits text before pieces are merged -> llama.cpp's name of it."""


def vocabulary(folder: Path | None, rows: int) -> dict[str, Any]:
    """Keys of a GGUF file for the tokenizer in `folder`, with as many tokens as the model has `rows`.

    None: no tokenizer, ids only. UserError for a kind of tokenizer that llama.cpp does not have.
    """
    if folder is None:
        return {"tokenizer.ggml.model": "no_vocab"}
    if (folder / SENTENCEPIECE_FILE).is_file():
        return _sentencepiece((folder / SENTENCEPIECE_FILE).read_bytes(), rows)
    return _byte_level(folder, rows)


def _sentencepiece(model: bytes, rows: int) -> dict[str, Any]:
    proto = model_proto(model)
    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    if trainer.model_type != trainer.BPE:
        raise _no_such(f"a SentencePiece {trainer.ModelType.Name(trainer.model_type).lower()} model")
    if spec.remove_extra_whitespaces or spec.precompiled_charsmap:
        raise _no_such("a tokenizer that normalises text")
    pieces = [(piece.piece, piece.score, piece.type) for piece in proto.pieces]
    special = {"bos": trainer.bos_id, "eos": trainer.eos_id, "unknown": trainer.unk_id, "padding": trainer.pad_id}
    tokens, scores, kinds = zip(*pieces, *_padding(len(pieces), rows), strict=True)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.scores": list(scores),
        "tokenizer.ggml.token_type": list(kinds),
        **{f"tokenizer.ggml.{name}_token_id": number for name, number in special.items() if number >= 0},
        **_NOTHING_ADDED,
        "tokenizer.ggml.add_space_prefix": bool(spec.add_dummy_prefix),
    }


_NOTHING_ADDED = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": False}
"""Documents were encoded without a token before them."""


def _padding(count: int, rows: int) -> list[tuple[str, float, int]]:
    return [(f"[PAD{index}]", -1000.0, TokenType.UNUSED) for index in range(count, rows)]


def _byte_level(folder: Path, rows: int) -> dict[str, Any]:
    content = json.loads((folder / HUGGING_FACE_FILE).read_bytes())
    split = _split_of(content)
    if content["model"]["type"] != "BPE" or split not in _SPLITS or content.get("normalizer") is not None:
        raise _no_such(f"a {content['model']['type']} tokenizer that splits and normalises text as this one does")
    added = {token["id"]: token for token in content.get("added_tokens", [])}
    names = {number: piece for piece, number in content["model"]["vocab"].items()}
    names |= {number: token["content"] for number, token in added.items()}
    kinds = dict.fromkeys(names, TokenType.NORMAL)
    kinds |= {n: TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED for n, token in added.items()}
    tokens = [names.get(number, f"[PAD{number}]") for number in range(rows)]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _SPLITS[split],
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            kinds.get(n, TokenType.NORMAL) if n in names else TokenType.UNUSED for n in range(rows)
        ],
        "tokenizer.ggml.merges": merges,
        **_special_ids(folder),
        **_NOTHING_ADDED,
    }


def _split_of(content: dict[str, Any]) -> str | None:
    """The pattern by which a byte-level tokenizer splits text; None for another kind."""
    steps = content.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or len(steps) != len(patterns) + 1:
        return None
    if not patterns:
        return _GPT2 if last.get("use_regex", True) else None
    return patterns[0] if len(patterns) == 1 and not last.get("use_regex", True) else None


def _special_ids(folder: Path) -> dict[str, int]:
    loaded = load_fast_tokenizer(folder, folder)
    ids = {"bos": loaded.bos_token_id, "eos": loaded.eos_token_id, "unknown": loaded.unk_token_id}
    return {f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items() if number is not None}


def _no_such(what: str) -> UserError:
    fix = "Add --tokenizer none for a file of ids only, with the tokenizer's files beside it; or choose another format."
    return UserError("--format", "gguf", f"llama.cpp has no tokenizer like {what}.", fix)
