"""manifest.json: what a prepared folder holds. It is written last, so a folder without it is not a dataset."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter

from qatlaw.text import plural
from qatscale.data.indexed import DTYPE_CODES, PREPARE_AGAIN, WRITE_AGAIN, IndexedReader, Shard
from qatscale.errors import UserError
from qatscale.files import Count, read_checked, sealed, sha256_of, write_json

Split = Literal["train", "validation"]
Verify = Literal["auto", "size", "full", "trust"]
NAME = "manifest.json"
FULL_BELOW = 4 << 30
"""`verify="auto"` reads every byte of a split smaller than this, which takes a few seconds."""
_PREPARE = "Name the folder of prepared data (data.path=, --data), or make one: qatscale prepare SOURCE… --out FOLDER"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class SplitCounts(_Part):
    documents: Count
    tokens: Count
    text_bytes: Count | None
    """UTF-8 bytes of the documents; null for adopted shards."""
    shards: list[Shard]

    @classmethod
    def of(cls, shards: list[Shard], text_bytes: int | None = None) -> SplitCounts:
        documents, tokens = sum(shard.documents for shard in shards), sum(shard.tokens for shard in shards)
        return cls(documents=documents, tokens=tokens, text_bytes=text_bytes, shards=shards)


def _below(path: str) -> str:
    if ".." in Path(path).parts or Path(path).is_absolute():
        raise ValueError("leads out of the folder")
    return path


class TokenizerCard(_Part):
    kind: str
    """sentencepiece, huggingface, or unknown for adopted shards."""
    fingerprint: str | None
    vocab_size: Count
    """One more than the largest id that may occur."""
    eos_id: Count | None
    folder: Annotated[str, AfterValidator(_below)] | None
    """Where its files are, relative to the manifest and below it: an export copies them."""


class Manifest(_Part):
    format: Literal[1] = 1
    qatscale: str
    """The version that wrote it."""
    dtype: str
    tokenizer: TokenizerCard
    sources: list[str]
    """As they were given."""
    identity: dict[str, Any]
    """What decided the content: the sources' fingerprints and the options. Preparing it again does nothing."""
    empty_documents: Count
    splits: dict[Split, SplitCounts]
    checksum: str = ""
    """sha256 of all else, in the file alone; older versions wrote none."""

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokens of all splits, in order. Folders with equal fingerprints hold the same data."""
        return self.fingerprint_of(*self.splits)

    def fingerprint_of(self, *splits: Split) -> str:
        """sha256 of the tokens of these splits, in order."""
        shards = [
            [split, s.tokens, s.bin_sha256, *([s.start] if s.start else [])]
            for split in splits
            for s in self.splits[split].shards
        ]
        return hashlib.sha256(json.dumps([self.dtype, shards]).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        write_json(folder / NAME, sealed(self.model_dump()))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Raises UserError where `folder` is missing or unfinished, or its manifest cannot be read."""
        path = folder / NAME
        if not folder.is_dir():
            raise UserError("data.path", str(folder), "no such folder.", _PREPARE)
        if not path.is_file():
            inside = sorted(manifest.parent.name for manifest in folder.glob(f"*/{NAME}"))
            mix = f"To mix the prepared folders in it: data.mix={{{': …, '.join(inside)}: …}}" if inside else _PREPARE
            raise UserError("data.path", str(folder), f"holds no {NAME}: not prepared, or not to the end.", mix)
        manifest = read_checked(path, TypeAdapter(cls), "data.path", _PREPARE).model_copy(update={"checksum": ""})
        if manifest.dtype not in {dtype.name for dtype in DTYPE_CODES.values() if dtype.kind != "f"}:
            raise UserError("data.path", str(path), f"{manifest.dtype!r} is not a dtype of tokens.")
        card = manifest.tokenizer
        if card.eos_id is not None and card.eos_id >= card.vocab_size:
            problem = f"tokenizer.eos_id is {card.eos_id}, and the vocabulary has {card.vocab_size}."
            raise UserError("data.path", str(path), problem, _PREPARE)
        for split, counts in manifest.splits.items():
            for what in ("tokens", "documents"):
                total, held = getattr(counts, what), sum(getattr(shard, what) for shard in counts.shards)
                if total != held:
                    problem = f"splits.{split}.{what} is {total:,}, and its shards hold {held:,}."
                    raise UserError("data.path", str(path), problem, _PREPARE)
        return manifest

    def holds(self, split: Split) -> bool:
        return split in self.splits and bool(self.splits[split].shards)

    def summary(self) -> str:
        parts = [f"{split} {plural(c.documents, 'document')}, {c.tokens:,} tokens" for split, c in self.splits.items()]
        empty = f"; {self.empty_documents:,} empty documents left out" if self.empty_documents else ""
        none = "" if self.splits["validation"].documents else "; nothing is held out: no validation is possible"
        return "; ".join(parts) + empty + none

    def check_tokenizer(self, expected: str | None) -> None:
        """Raise UserError where the ids are another tokenizer's than the model's. expected: a fingerprint or None."""
        ours = self.tokenizer.fingerprint
        if expected and ours and ours != expected:
            problem = f"tokenized with {ours[:12]}…; the model was trained with the tokenizer {expected[:12]}…."
            fix = "The same ids mean other text. Prepare the text with the model's tokenizer: --tokenizer FOLDER."
            raise UserError("data.path", None, problem, fix)

    def document_end(self, masked: bool) -> int | None:
        """The token that divides documents, where `masked`. UserError where the data do not name one."""
        if masked and self.tokenizer.eos_id is None:
            fix = "Adopt the shards with --eos ID, or set data.document_mask=false."
            raise UserError("data.document_mask", True, "the data do not say which token ends a document.", fix)
        return self.tokenizer.eos_id if masked else None

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise UserError if the data hold ids without an embedding in a model with `vocab_size` rows."""
        if (needed := self.tokenizer.vocab_size) > vocab_size:
            problem = f"smaller than the vocabulary of the data, {needed}; the larger ids would have no embedding."
            fix = f"A new model takes model.vocab_size={needed}, a trained one its tokenizer's data, --tokenizer DIR."
            raise UserError("model.vocab_size", vocab_size, problem, fix)

    def check_shards(self, folder: Path, split: Split, verify: Verify = "auto") -> None:
        """Raise UserError for a missing split and for a missing, truncated or altered shard.

        `size` looks at files and headers, `full` reads every byte, `trust` looks at nothing.
        """
        counts = self.splits.get(split)
        if counts is None or not counts.shards:
            again = "adopt" if "adopted" in self.identity else "prepare"
            fix = f"Run `qatscale {again}` again with a larger --validation-fraction."
            raise UserError("data.path", None, f"the data have no {split} split.", fix)
        if verify == "trust":
            return
        files = {shard.name: shard for shard in counts.shards}
        size = sum(shard.bin_bytes + shard.idx_bytes for shard in files.values())
        full = verify == "full" or (verify == "auto" and size < FULL_BELOW)
        with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
            for _ in pool.map(lambda shard: self._check_shard(folder, shard, full), files.values()):
                pass
        self._check_end(folder, counts.shards[0])

    @functools.cached_property
    def _in_files(self) -> Counter[tuple[str, str]]:
        """(file, "tokens" or "documents") -> how many of it all splits hold."""
        held: Counter[tuple[str, str]] = Counter()
        for shard in (shard for counts in self.splits.values() for shard in counts.shards):
            held[shard.name, "tokens"] += shard.tokens
            held[shard.name, "documents"] += shard.documents
        return held

    def open_shard(self, folder: Path, shard: Shard) -> IndexedReader:
        """The file that holds a shard. UserError where its size or type is not what the manifest says."""
        reader = IndexedReader(folder / shard.name, WRITE_AGAIN if "adopted" in self.identity else PREPARE_AGAIN)
        sizes = (
            (reader.bin_path, reader.bin_bytes, shard.bin_bytes),
            (reader.idx_path, reader.idx_bytes, shard.idx_bytes),
        )
        for path, size, expected in sizes:
            if size != expected:
                raise UserError("shard", str(path), f"has {size} bytes, and the manifest says {expected}.", reader.fix)
        size, held, end = len(reader.tokens), self._in_files[shard.name, "tokens"], shard.start + shard.tokens
        if reader.dtype.name != self.dtype or size not in (shard.tokens, held) or end > size:
            found = f"holds {size} tokens of {reader.dtype.name}"
            problem = f"{found}, and the manifest says {max(held, end)} of {self.dtype}."
            raise UserError("shard", str(reader.idx_path), problem, reader.fix)
        return reader

    def _check_end(self, folder: Path, shard: Shard) -> None:
        """Whether documents end as the manifest says. One shard shows it: a read in each would take long on a disk."""
        reader, eos = self.open_shard(folder, shard), self.tokenizer.eos_id
        if self.tokenizer.fingerprint and (last := int(reader.tokens[-1])) != eos:
            problem = f"its last document ends with token {last}, and the manifest says that {eos} ends each."
            raise UserError("shard", str(reader.bin_path), problem, reader.fix)

    def _check_shard(self, folder: Path, shard: Shard, full: bool) -> None:
        reader = self.open_shard(folder, shard)
        documents, listed = reader.document_count, self._in_files[shard.name, "documents"]
        if documents not in (shard.documents, listed):
            problem = f"holds {plural(documents, 'document')}, and the manifest says {listed:,}."
            raise UserError("shard", str(reader.idx_path), problem, reader.fix)
        if not full:
            return
        for path, checksum in ((reader.bin_path, shard.bin_sha256), (reader.idx_path, shard.idx_sha256)):
            if sha256_of(path) != checksum:
                raise UserError("shard", str(path), "was altered: its checksum is not the manifest's.", reader.fix)
        reader.check_contiguous()
        low, high = int(reader.tokens.min()), int(reader.tokens.max())
        if low < 0 or high >= self.tokenizer.vocab_size:
            problem = f"holds token id {low if low < 0 else high}; the vocabulary has {self.tokenizer.vocab_size}."
            raise UserError("shard", str(reader.bin_path), problem, reader.fix)
