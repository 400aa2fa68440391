"""Tokenizers behind one small interface: a SentencePiece model (trained here or given) or a Hugging Face one."""

from __future__ import annotations

import abc
import hashlib
import io
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qatscale.data.indexed import token_dtype
from qatscale.data.segments import segment_encoder
from qatscale.errors import UserError
from qatscale.files import PARTIAL, rename_synced, write_atomic, write_json
from qatscale.untrusted import check_json_files, first_line, read_json

CARD = "qatscale_tokenizer.json"
"""Beside a saved tokenizer: which kind it is, its EOS and its fingerprint."""
SENTENCEPIECE_FILE = "tokenizer.model"
HUGGING_FACE_FILE = "tokenizer.json"


class Tokenizer(abc.ABC):
    """Text to ids and back. No special token is ever read out of the text of a document, and none is added."""

    kind: str
    vocab_size: int
    """One more than the largest id."""
    eos_id: int
    """Ends every document."""
    fingerprint: str
    """sha256 of everything that decides the ids."""

    @property
    def dtype(self) -> np.dtype[Any]:
        return token_dtype(self.vocab_size)

    @abc.abstractmethod
    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, [tokens] of `dtype`; no EOS."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str: ...

    @abc.abstractmethod
    def _save_files(self, folder: Path) -> None: ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer as `folder`, which appears whole or not at all."""
        partial = folder.with_name(folder.name + PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        self._save_files(partial)
        card = {"kind": self.kind, "vocab_size": self.vocab_size, "eos_id": self.eos_id}
        write_json(partial / CARD, card | {"fingerprint": self.fingerprint})
        shutil.rmtree(folder, ignore_errors=True)
        rename_synced(partial, folder)


class SentencePieceTokenizer(Tokenizer):
    kind = "sentencepiece"

    def __init__(self, model: bytes, name: str = "") -> None:
        """`model`: the serialized model; `name`: what to call it in an error."""
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError("tokenizer", name, f"no SentencePiece model ({error}).") from None
        self._model = model
        self.vocab_size = self._processor.get_piece_size()
        self.eos_id = self._processor.eos_id()
        if self.eos_id < 0:
            raise UserError("tokenizer", name, "has no end-of-sequence piece, and documents end with one.")
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._fast = segment_encoder(model, self.dtype)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if self._fast is not None:
            return [self._fast.encode(text) for text in texts]
        return [np.array(ids, self.dtype) for ids in self._processor.encode(texts, num_threads=1)]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._processor.decode([int(i) for i in ids]))

    def _save_files(self, folder: Path) -> None:
        write_atomic(folder / SENTENCEPIECE_FILE, self._model)


class HuggingFaceTokenizer(Tokenizer):
    """A Rust tokenizer (`tokenizer.json`); loads without transformers once it is saved."""

    kind = "huggingface"

    def __init__(self, backend: Any, eos_id: int, files: dict[str, bytes]) -> None:
        """`backend`: a tokenizers.Tokenizer; `files`: further files of the tokenizer's folder, name -> content."""
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "<|endoftext|>" within a document is text
        self._backend, self._files = backend, files
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id = eos_id
        self.fingerprint = hashlib.sha256(f"{backend.to_str()}\n{eos_id}".encode()).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=False))

    def _save_files(self, folder: Path) -> None:
        for name, content in self._files.items():
            write_atomic(folder / name, content)
        write_atomic(folder / HUGGING_FACE_FILE, self._backend.to_str().encode())


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """A SentencePiece `.model` file, a folder (saved here, prepared here, or by Hugging Face), or a Hub name.

    Raises UserError when it is none of them, or has no end-of-sequence token.
    """
    path = Path(spec)
    if path.is_file():
        return SentencePieceTokenizer(path.read_bytes(), str(spec))
    for folder in (path, path / "tokenizer"):
        if (folder / CARD).is_file():
            return _load_saved(folder)
    if path.is_dir() and not (path / HUGGING_FACE_FILE).is_file() and (path / SENTENCEPIECE_FILE).is_file():
        return SentencePieceTokenizer((path / SENTENCEPIECE_FILE).read_bytes(), str(spec))
    if not path.exists() and (path.suffix == ".model" or path.is_absolute() or str(spec).startswith(".")):
        raise UserError("tokenizer", str(spec), "there is no such file or folder.")
    return _load_hugging_face(str(spec))


def _load_saved(folder: Path) -> Tokenizer:
    card = read_json(folder / CARD, "tokenizer")
    try:
        kind, eos_id, fingerprint = card["kind"], card["eos_id"], card["fingerprint"]
    except (TypeError, KeyError) as error:
        raise UserError("tokenizer", str(folder / CARD), f"is damaged: {error}.") from None
    tokenizer: Tokenizer
    if kind == SentencePieceTokenizer.kind:
        tokenizer = SentencePieceTokenizer(_read(folder / SENTENCEPIECE_FILE), str(folder))
    else:
        import tokenizers

        text = _read(folder / HUGGING_FACE_FILE)
        try:
            backend = tokenizers.Tokenizer.from_buffer(text)
        except Exception as error:  # tokenizers raises plain exceptions
            raise UserError("tokenizer", str(folder / HUGGING_FACE_FILE), f"cannot be read: {error}.") from None
        extra = sorted(p for p in folder.iterdir() if p.name not in (CARD, HUGGING_FACE_FILE) and p.is_file())
        tokenizer = HuggingFaceTokenizer(backend, eos_id, {p.name: p.read_bytes() for p in extra})
    if tokenizer.fingerprint != fingerprint:
        raise UserError("tokenizer", str(folder), "was altered: its fingerprint is not the one in its card.")
    return tokenizer


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError("tokenizer", str(path), f"cannot be read: {error.strerror}.") from None


def _load_hugging_face(spec: str) -> Tokenizer:
    import tempfile

    from transformers import AutoTokenizer

    check_json_files(Path(spec), "tokenizer", "AutoTokenizer")
    try:
        loaded = AutoTokenizer.from_pretrained(spec, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise errors of every kind
        allowed = "a SentencePiece .model, a tokenizer's folder, or a name on the Hugging Face Hub."
        raise UserError("tokenizer", spec, f"{allowed} Hugging Face says: {first_line(error)}") from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise UserError("tokenizer", spec, "has no fast (tokenizer.json) form, and only that one is used here.")
    if loaded.eos_token_id is None:
        raise UserError("tokenizer", spec, "has no end-of-sequence token, and documents end with one.")
    with tempfile.TemporaryDirectory() as folder:
        loaded.save_pretrained(folder)
        saved = sorted(p for p in Path(folder).iterdir() if p.name != HUGGING_FACE_FILE and p.is_file())
        files = {p.name: p.read_bytes() for p in saved}
    return HuggingFaceTokenizer(backend, int(loaded.eos_token_id), files)


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """A BPE model in the manner of Llama 2's: byte fallback, digits split, text left as it is, spaces kept.

    Learns from single lines, so a line break is its byte-fallback piece. The same texts give the same bytes.
    Raises UserError when the texts do not hold enough for `vocab_size` pieces, or hold nothing, and whatever reading
    `texts` raises.
    """
    import sentencepiece

    failed: list[BaseException] = []

    def lines() -> Iterator[str]:
        try:
            for text in texts:
                for line in text.split("\n"):
                    if line:
                        yield line
        except GeneratorExit:
            raise
        except BaseException as error:
            failed.append(error)
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=0.9995,
            max_sentence_length=1 << 20,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=4,  # written into the model, so that it must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        if failed:  # SentencePiece would tell no more of it than the line of our code
            raise failed[0] from None
        if "sentences_.empty()" in str(error):
            do = "Check the sources and the field."
            raise UserError("sources", None, "there is no text to learn pieces from.", do) from None
        raise UserError("vocab_size", vocab_size, _explain(str(error))) from None
    return SentencePieceTokenizer(model.getvalue())


def _explain(error: str) -> str:
    """What SentencePiece's own assertion means for the person who chose the vocabulary size."""
    if limit := re.search(r"set it to a value <= (\d+)", error):
        return f"the text sample holds pieces for at most {limit[1]}. Choose that or fewer, or give more text."
    if limit := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return f"fewer than the {limit[1]} single characters and bytes that must have a piece. Choose more."
    return f"SentencePiece could not train: {error.strip().splitlines()[-1]}"
