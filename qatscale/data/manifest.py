"""manifest.json: what a prepared folder holds. It is written last, so a folder without it is no data set."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qatscale.data.indexed import DTYPE_CODES, PREPARE_AGAIN, WRITE_AGAIN, IndexedReader, ShardFiles
from qatscale.errors import UserError
from qatscale.files import sha256_of, write_json

Split = Literal["train", "validation"]
Verify = Literal["auto", "size", "full"]
FORMAT: Literal[1] = 1
NAME = "manifest.json"
FULL_BELOW = 4 << 30
"""`verify="auto"` reads every byte of a split that is smaller than this: a few seconds."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Shard(_Part):
    """One `.bin`/`.idx` pair. `name` is the path without ending, relative to the manifest's folder."""

    name: str
    documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str

    @classmethod
    def of(cls, name: str, files: ShardFiles) -> Shard:
        return cls(name=name, **vars(files))


class SplitCounts(_Part):
    documents: int
    tokens: int
    text_bytes: int | None
    """Of the documents in UTF-8; null where only their tokens are known."""
    shards: list[Shard]


class TokenizerCard(_Part):
    kind: str
    """sentencepiece, huggingface, or unknown for adopted shards."""
    fingerprint: str | None
    vocab_size: int
    """One more than the largest id that may occur."""
    eos_id: int | None
    folder: str | None
    """Where its files are, relative to the manifest."""


class Manifest(_Part):
    format: Literal[1] = FORMAT
    qatscale: str
    """The version that wrote it."""
    dtype: str
    tokenizer: TokenizerCard
    sources: list[str]
    """As they were named."""
    identity: dict[str, Any]
    """What decided the content: the sources' fingerprints and the options. Prepared again alike, nothing is done."""
    empty_documents: int
    splits: dict[Split, SplitCounts]

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokens of all splits, in order: two folders with the same one hold the same data."""
        return self.fingerprint_of(*self.splits)

    def fingerprint_of(self, *splits: Split) -> str:
        """sha256 of the tokens of these splits, in order."""
        shards = [[split, s.tokens, s.bin_sha256] for split in splits for s in self.splits[split].shards]
        return hashlib.sha256(json.dumps([self.dtype, shards]).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        write_json(folder / NAME, self.model_dump())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Raises UserError where `folder` is missing, unfinished, or holds a manifest that cannot be read."""
        path = folder / NAME
        if not folder.is_dir():
            raise UserError("data.path", str(folder), "there is no such folder.", _PREPARE)
        if not path.is_file():
            raise UserError("data.path", str(folder), f"holds no {NAME}: not prepared, or not to the end.", _PREPARE)
        try:
            manifest = cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "its text"
            what = f"no manifest of format {FORMAT}: {place}: {first['msg']}."
            raise UserError("data.path", str(path), what) from None
        if manifest.dtype not in {dtype.name for dtype in DTYPE_CODES.values() if dtype.kind != "f"}:
            raise UserError("data.path", str(path), f"dtype {manifest.dtype!r} holds no tokens.")
        return manifest

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise UserError where the data hold ids that a model with `vocab_size` rows has no embedding for."""
        if self.tokenizer.vocab_size > vocab_size:
            needed = self.tokenizer.vocab_size
            allowed = f"smaller than the vocabulary of the data, {needed}; their larger ids would have no embedding."
            raise UserError("model.vocab_size", vocab_size, allowed, f"Set model.vocab_size={needed} or more.")

    def split(self, split: Split) -> SplitCounts:
        """Raises UserError where the folder has no such split."""
        counts = self.splits.get(split)
        if counts is None or not counts.shards:
            do = "Prepare it again with a larger validation_fraction." if split == "validation" else _PREPARE
            raise UserError("data.path", None, f"the data have no {split} split.", do)
        return counts

    def open_shards(self, folder: Path, split: Split, verify: Verify = "auto") -> list[IndexedReader]:
        """The shards of a split, checked: `size` looks at files and headers, `full` reads every byte.

        Raises UserError for a missing, truncated or altered shard.
        """
        counts = self.split(split)
        size = sum(shard.bin_bytes + shard.idx_bytes for shard in counts.shards)
        full = verify == "full" or (verify == "auto" and size < FULL_BELOW)
        with ThreadPoolExecutor() as pool:  # checksums of several shards at once: hashing lets go of the interpreter
            return list(pool.map(lambda shard: self._open_shard(folder, shard, full), counts.shards))

    def _open_shard(self, folder: Path, shard: Shard, full: bool) -> IndexedReader:
        cure = WRITE_AGAIN if "adopted" in self.identity else PREPARE_AGAIN
        reader = IndexedReader(folder / shard.name, cure)
        for path, size in ((reader.bin_path, shard.bin_bytes), (reader.idx_path, shard.idx_bytes)):
            if path.stat().st_size != size:
                raise UserError("shard", str(path), f"{path.stat().st_size} bytes, and the manifest says {size}.", cure)
        if reader.dtype.name != self.dtype or len(reader.tokens) != shard.tokens:
            found = f"{len(reader.tokens)} tokens of {reader.dtype.name}"
            problem = f"{found}, and the manifest says {shard.tokens} of {self.dtype}."
            raise UserError("shard", str(reader.idx_path), problem, cure)
        if full:
            for path, checksum in ((reader.bin_path, shard.bin_sha256), (reader.idx_path, shard.idx_sha256)):
                if sha256_of(path) != checksum:
                    problem = "its checksum is not the one in the manifest: the file was altered."
                    raise UserError("shard", str(path), problem, cure)
            reader.check_contiguous()
        return reader


_PREPARE = "Make it: qatscale prepare SOURCE… --out FOLDER"


def tokenizer_folder(data: Path | None) -> Path | None:
    """Of prepared data; None where there is none with it. UserError for a folder that holds no prepared data."""
    name = Manifest.load(data).tokenizer.folder if data else None
    return data / name if data and name else None
