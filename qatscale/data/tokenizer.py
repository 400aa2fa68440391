"""Tokenizers behind one small interface: a SentencePiece model (trained here or given) or a Hugging Face one."""

from __future__ import annotations

import abc
import functools
import hashlib
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from qatscale.data.indexed_writer import token_dtype
from qatscale.data.manifest import Manifest
from qatscale.data.segments import segment_encoder
from qatscale.errors import UserError, did_you_mean, first_line
from qatscale.files import Count, read_checked, write_json
from qatscale.new_folder import appearing
from qatscale.untrusted import check_json_files

CARD = "qatscale_tokenizer.json"
"""Beside a saved tokenizer: its kind, its EOS and its fingerprint."""
SENTENCEPIECE_FILE = "tokenizer.model"
HUGGING_FACE_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer_config.json"
MOST_TOKENS = 1 << 24
"""The largest vocabulary that is read."""


class Tokenizer(abc.ABC):
    """Text to ids and back. The text of a document never becomes a special token, and none is added."""

    kind: str
    vocab_size: int
    """One more than the largest id."""
    eos_id: int
    """Ends every document."""
    fingerprint: str
    """sha256 of everything that decides the ids."""
    files: dict[str, bytes]
    """Name -> content of what `save` writes beside the card."""

    @property
    def dtype(self) -> np.dtype[Any]:
        return token_dtype(self.vocab_size)

    @property
    def card(self) -> dict[str, Any]:
        kind, size = self.kind, self.vocab_size
        return {"kind": kind, "vocab_size": size, "eos_id": self.eos_id, "fingerprint": self.fingerprint}

    @abc.abstractmethod
    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, [tokens] of `dtype`; no EOS."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str: ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer as `folder`, which appears complete or not at all."""
        shutil.rmtree(folder, ignore_errors=True)
        with appearing(folder) as partial:
            for name, content in self.files.items():
                (partial / name).write_bytes(content)
            write_json(partial / CARD, self.card)


class SentencePieceTokenizer(Tokenizer):
    kind = "sentencepiece"

    def __init__(self, model: bytes, name: str = "", eos: str | None = None) -> None:
        """`model`: the serialized model; `name`: what errors call it; `eos`: a piece or id instead of its own."""
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            self.vocab_size = self._processor.get_piece_size()
            pieces = {self._processor.id_to_piece(i): i for i in range(self.vocab_size)}
        except (RuntimeError, UnicodeDecodeError):  # the latter: a damaged piece
            raise UserError("tokenizer", name, *_not_sentencepiece(model)) from None
        self.files = {SENTENCEPIECE_FILE: model}
        special = [piece for piece, i in pieces.items() if self._processor.is_control(i)]
        own = self._processor.eos_id()
        self.eos_id = _end_of_text(eos, own if own >= 0 else None, pieces, special, name)
        changed = b"" if self.eos_id == own else f"\n{self.eos_id}".encode()
        self.fingerprint = hashlib.sha256(model + changed).hexdigest()
        self._fast = segment_encoder(model, self.dtype)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if self._fast is not None:
            return [self._fast.encode(text) for text in texts]
        return [np.array(ids, self.dtype) for ids in self._processor.encode(texts, num_threads=1)]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._processor.decode([int(i) for i in ids]))


class HuggingFaceTokenizer(Tokenizer):
    """A Rust tokenizer (`tokenizer.json`). Reads its files without transformers."""

    kind = "huggingface"

    def __init__(self, files: dict[str, bytes], eos_id: int | None, name: str, eos: str | None = None) -> None:
        """`files`: those of the tokenizer's folder, by name; `name`: what errors call it; `eos`: instead of `eos_id`.

        Where `eos` is given, it is written into tokenizer_config.json, so that an exported model ends with it too.
        """
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_buffer(files.get(HUGGING_FACE_FILE, b""))
        except Exception as error:  # tokenizers raises plain exceptions
            raise UserError("tokenizer", name, f"its {HUGGING_FACE_FILE} cannot be read: {error}.") from None
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "<|endoftext|>" within a document is text
        self._backend, self._name = backend, name
        vocabulary = backend.get_vocab(with_added_tokens=True)
        special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if not 0 < self.vocab_size <= MOST_TOKENS:  # before `to_str`, which counts up to the largest id
            raise UserError("tokenizer", name, f"has ids up to {self.vocab_size - 1:,}: no vocabulary is like that.")
        self.files = files | {HUGGING_FACE_FILE: backend.to_str().encode()}
        self.eos_id = _end_of_text(eos, eos_id, vocabulary, special, name)
        if eos is not None:
            said = json.loads(files.get(CONFIG_FILE, b'{"tokenizer_class": "PreTrainedTokenizerFast"}'))
            said["eos_token"] = backend.id_to_token(self.eos_id)
            self.files[CONFIG_FILE] = json.dumps(said, indent=2).encode()
        self.fingerprint = hashlib.sha256(f"{backend.to_str()}\n{self.eos_id}".encode()).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        try:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # tokenizers raises plain exceptions
            raise UserError("tokenizer", self._name, f"cannot encode this text: {error}.") from None
        return [np.array(encoding.ids, self.dtype) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=False))


def load_tokenizer(spec: str | Path, eos: str | None = None) -> Tokenizer:
    """A SentencePiece `.model`, a `tokenizer.json`, a folder (prepared, or by Hugging Face), or a Hub name.

    eos: the token that ends a document, or its id, instead of the tokenizer's own. Raises UserError for anything else,
    and for a tokenizer without an end-of-sequence token.
    """
    path = Path(spec)
    if path.is_file() and path.suffix == ".json":
        if (path.parent / CONFIG_FILE).is_file() and path.name == HUGGING_FACE_FILE:
            return _load_hugging_face(str(path.parent), eos)  # the file beside it names the special tokens
        return HuggingFaceTokenizer({HUGGING_FACE_FILE: path.read_bytes()}, None, str(spec), eos)
    if path.is_file():
        return SentencePieceTokenizer(path.read_bytes(), str(spec), eos)
    for folder in (path, path / "tokenizer"):
        if (folder / CARD).is_file():
            return _load_saved(folder, eos)
    if path.is_dir() and not (path / HUGGING_FACE_FILE).is_file() and (path / SENTENCEPIECE_FILE).is_file():
        return SentencePieceTokenizer((path / SENTENCEPIECE_FILE).read_bytes(), str(spec), eos)
    if not path.exists() and (path.suffix in (".model", ".json") or path.is_absolute() or str(spec).startswith(".")):
        raise UserError("tokenizer", str(spec), "no such file or folder.")
    return _load_hugging_face(str(spec), eos)


def _end_of_text(
    asked: str | None, own: int | None, vocabulary: Mapping[str, int], special: Sequence[str], name: str
) -> int:
    """The id that ends a document: the one asked for, as an id or a token, or the tokenizer's own."""
    if asked is None:
        if own is None:
            shown = f" Its special tokens: {', '.join(special[:8])}." if special else ""
            problem = f"names no end-of-sequence token, and documents end with one.{shown}"
            raise UserError("tokenizer", name, problem, "Name it: --eos TOKEN_OR_ID.")
        return own
    if asked.isdecimal():
        if int(asked) in vocabulary.values():
            return int(asked)
        raise UserError("eos", asked, f"is not an id of {name}, which has {len(vocabulary):,} tokens.")
    if asked not in vocabulary:
        raise UserError("eos", asked, f"is not a token of {name}.", did_you_mean(asked, special) if special else "")
    return vocabulary[asked]


def _not_sentencepiece(content: bytes) -> tuple[str, str]:
    """What a file is that SentencePiece cannot read, and what to do."""
    first = content.lstrip()[:200].split(b"\n")[0].strip()
    if re.fullmatch(rb"[A-Za-z0-9+/]+={0,2} \d+", first):
        problem = "is a tiktoken vocabulary (lines of BASE64 RANK), which lacks the rule that splits text into words."
        return problem, "Give the tokenizer.json of the same model, or the folder that holds it."
    if content.lstrip()[:1] == b"{":
        return "is JSON, not a SentencePiece model.", f"Name it {HUGGING_FACE_FILE} if it is a Hugging Face tokenizer."
    return "not a SentencePiece model.", "A .model of SentencePiece and a tokenizer.json are read."


class Card(TypedDict):
    """As `Tokenizer.card` gives it."""

    kind: Literal["sentencepiece", "huggingface"]
    eos_id: Count
    fingerprint: str


def read_card(folder: Path) -> Card:
    """The card of a saved tokenizer. UserError where it is damaged."""
    return read_checked(folder / CARD, TypeAdapter(Card), "tokenizer")


def _load_saved(folder: Path, eos: str | None) -> Tokenizer:
    card = read_card(folder)
    check_json_files(folder, "tokenizer", "AutoTokenizer")
    if card["kind"] == SentencePieceTokenizer.kind:
        model = (folder / SENTENCEPIECE_FILE).read_bytes()
        load: Callable[[str], Tokenizer] = functools.partial(SentencePieceTokenizer, model, str(folder))
    else:
        load = functools.partial(HuggingFaceTokenizer, _files_in(folder), None, str(folder))
    tokenizer = load(str(card["eos_id"]))
    if tokenizer.fingerprint != card["fingerprint"]:
        raise UserError("tokenizer", str(folder), "was altered: its fingerprint is not the one in its card.")
    return tokenizer if eos is None else load(eos)


def _files_in(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file() and p.name != CARD}


def _load_hugging_face(spec: str, eos: str | None = None) -> Tokenizer:
    from transformers import AutoTokenizer

    check_json_files(Path(spec), "tokenizer", "AutoTokenizer")
    try:
        loaded = AutoTokenizer.from_pretrained(spec, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise errors of every kind
        if Path(spec).is_dir() and not [*Path(spec).glob("*token*"), *Path(spec).glob("vocab*")]:
            raise UserError("tokenizer", spec, "holds no tokenizer.", "Give the folder or the file of one.") from None
        problem = "neither a SentencePiece .model, a tokenizer's folder, nor a name on the Hugging Face Hub."
        raise UserError("tokenizer", spec, f"{problem} Hugging Face says: {first_line(error)}") from None
    if getattr(loaded, "backend_tokenizer", None) is None:
        raise UserError("tokenizer", spec, "has no fast (tokenizer.json) form, the only one that is supported.")
    with tempfile.TemporaryDirectory() as folder:
        loaded.save_pretrained(folder)
        return HuggingFaceTokenizer(_files_in(Path(folder)), loaded.eos_token_id, spec, eos)


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> SentencePieceTokenizer:
    """A BPE model like Llama 2's: byte fallback, single digits, unnormalised text, runs of spaces kept.

    It learns from single lines, so a line break is its byte-fallback piece. The same texts give the same bytes.
    Raises UserError when the texts are empty or too few for `vocab_size` pieces, and whatever reading `texts` raises.
    """
    import sentencepiece

    failed: list[BaseException] = []

    def lines() -> Iterator[str]:
        try:
            for text in texts:
                yield from filter(None, text.split("\n"))
        except GeneratorExit:
            raise
        except BaseException as error:
            failed.append(error)
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.9995,
            max_sentence_length=1 << 20, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
            num_threads=4,  # written into the model, so it must not depend on the machine
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        if failed:  # SentencePiece reports only the line of our code
            raise failed[0] from None
        if "sentences_.empty()" in str(error):
            fix = "Check the sources and the field."
            raise UserError("sources", None, "hold no text to train a tokenizer on.", fix) from None
        raise UserError("vocab_size", vocab_size, _explain(str(error))) from None
    return SentencePieceTokenizer(model.getvalue())


def _explain(error: str) -> str:
    """What SentencePiece's own assertion means for the choice of the vocabulary size."""
    if limit := re.search(r"set it to a value <= (\d+)", error):
        return f"the text sample holds pieces for at most {limit[1]}. Choose that or fewer, or give more text."
    if limit := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return f"too small for the {limit[1]} single characters and bytes that must have a piece. Choose more."
    return f"SentencePiece could not train: {error.strip().splitlines()[-1]}"


def tokenizer_folder(data: Path | None, expected: str | None = None) -> Path | None:
    """Where the tokenizer of prepared data is; None without data or tokenizer.

    expected: the fingerprint of the model's tokenizer, if known. UserError where the data's is another, and where the
    data are unreadable.
    """
    if data is None:
        return None
    manifest = Manifest.load(data)
    manifest.check_tokenizer(expected)
    return data / manifest.tokenizer.folder if manifest.tokenizer.folder else None
