"""`prepare`: what it writes, that it writes the same again, and what it refuses."""

from __future__ import annotations

import io
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from qatscale.data import sources
from qatscale.data.indexed import IndexedReader
from qatscale.data.manifest import Manifest
from qatscale.data.prepare import prepare
from qatscale.data.reader import TokenStream
from qatscale.data.state import State
from qatscale.data.tokenizer import load_tokenizer
from qatscale.errors import UserError
from qatscale.files import only_process, sha256_of
from tests.data.data_corpora import documents, documents_of, first_tokens, folder_bytes, write_jsonl, write_parquet

TEXTS = documents(150)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sources of three kinds, read in many batches."""
    monkeypatch.setattr(sources, "BATCH_BYTES", 3000)
    (tmp_path / "text").mkdir()
    for i, text in enumerate(TEXTS[120:]):
        (tmp_path / "text" / f"{i:03}.txt").write_text(text, newline="")
    files = [
        write_jsonl(tmp_path / "a.jsonl.gz", TEXTS[:60]),
        write_parquet(tmp_path / "b.parquet", list(TEXTS[60:120])),
    ]
    return [str(path) for path in (*files, tmp_path / "text")]


@pytest.fixture
def options(tokenizer_folder: Path) -> dict[str, Any]:
    return {"tokenizer": str(tokenizer_folder), "validation_fraction": 0.1, "shard_tokens": 2000, "workers": 1}


def texts_of(folder: Path, manifest: Manifest, split: str) -> list[str]:
    """The documents that the shards hold, decoded; each ends with EOS and holds no other."""
    tokenizer = load_tokenizer(folder)
    found = []
    for shard in manifest.splits[split].shards:  # type: ignore[index]
        for ids in documents_of(IndexedReader(folder / shard.name)):
            assert np.flatnonzero(ids == tokenizer.eos_id).tolist() == [len(ids) - 1]
            found.append(tokenizer.decode(ids[:-1]))
    return found


def test_everything_arrives_in_order(corpus: list[str], options: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare(corpus, out, **options)
    train, validation = texts_of(out, manifest, "train"), texts_of(out, manifest, "validation")
    held_out = set(validation)
    assert train == [text for text in TEXTS if text not in held_out]
    assert validation == [text for text in TEXTS if text in held_out]
    assert 5 <= len(validation) <= 30
    assert len(manifest.splits["train"].shards) > 5
    assert manifest == Manifest.load(out)
    for split, texts in (("train", train), ("validation", validation)):
        counts = manifest.splits[split]  # type: ignore[index]
        assert counts.documents == len(texts) == sum(shard.documents for shard in counts.shards)
        assert counts.tokens == sum(shard.tokens for shard in counts.shards) == len(TokenStream.open(out, split))  # type: ignore[arg-type]
        assert counts.text_bytes == sum(len(text.encode()) for text in texts)
        for shard in counts.shards:
            assert shard.bin_sha256 == sha256_of(out / f"{shard.name}.bin")
            assert shard.idx_sha256 == sha256_of(out / f"{shard.name}.idx")
    assert manifest.tokenizer.fingerprint == load_tokenizer(options["tokenizer"]).fingerprint
    assert not list(out.glob("*.partial"))
    assert not (out / "progress.json").exists()


def test_workers_do_not_matter(corpus: list[str], options: dict[str, Any], tmp_path: Path) -> None:
    for workers in (1, 3):
        prepare(corpus, tmp_path / str(workers), **(options | {"workers": workers}))
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "3")


def test_validation_is_chosen_by_content(options: dict[str, Any], tmp_path: Path) -> None:
    shuffled = [*TEXTS, *TEXTS[:50]]
    random.Random(0).shuffle(shuffled)
    held_out = []
    for name, texts in (("a", TEXTS), ("b", shuffled)):
        source = write_jsonl(tmp_path / f"{name}.jsonl", texts)
        manifest = prepare([str(source)], tmp_path / name, **options)
        train, validation = (texts_of(tmp_path / name, manifest, split) for split in ("train", "validation"))
        assert not set(train) & set(validation)
        assert Counter(train + validation) == Counter(texts)
        held_out.append(set(validation))
    assert held_out[0] == held_out[1]
    more = prepare([str(tmp_path / "a.jsonl")], tmp_path / "more", **(options | {"validation_fraction": 0.3}))
    assert held_out[0] < set(texts_of(tmp_path / "more", more, "validation"))


def test_validation_fraction_is_kept(options: dict[str, Any], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [f"short text {i}" for i in range(20_000)])
    manifest = prepare([str(source)], tmp_path / "out", **(options | {"shard_tokens": 10**6}))
    # Binomial: 2000 +- 42.
    assert abs(manifest.splits["validation"].documents - 2000) < 5 * 42


def test_without_validation(options: dict[str, Any], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    said = io.StringIO()
    prepare([str(source)], tmp_path / "out", **(options | {"validation_fraction": 0, "console": Console(file=said)}))
    assert "no validation is possible" in said.getvalue()
    with pytest.raises(UserError, match=r"no validation split.*larger --validation-fraction"):
        TokenStream.open(tmp_path / "out", "validation")


@pytest.mark.parametrize("documents", [2, 40])
def test_few_documents_hold_out_one_at_least(documents: int, options: dict[str, Any], tmp_path: Path) -> None:
    texts = [f"document {i} of a few" for i in range(documents)]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = prepare([str(source)], tmp_path / "out", **(options | {"validation_fraction": 1e-9}))
    counts = manifest.splits["train"], manifest.splits["validation"]
    assert [split.documents for split in counts] == [documents - 1, 1]
    held, kept = (TokenStream.open(tmp_path / "out", split) for split in ("validation", "train"))
    assert len(held) + len(kept) == sum(split.tokens for split in counts)
    assert load_tokenizer(tmp_path / "out").decode(first_tokens(held, len(held))[:-1]) in texts
    assert prepare([str(source)], tmp_path / "out", **(options | {"validation_fraction": 1e-9})) == manifest


def test_a_file_named_more_than_once_is_read_once(options: dict[str, Any], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    write_jsonl(tmp_path / "b.jsonl", TEXTS[:3])
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    said = io.StringIO()
    repeated = [str(tmp_path / name) for name in ("a.jsonl", "a.jsonl", "link.jsonl", "*.jsonl")]
    console = Console(file=said, width=10_000)
    manifest = prepare(repeated, tmp_path / "out", **(options | {"console": console}))
    once = prepare([str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")], tmp_path / "once", **options)
    assert manifest.splits == once.splits
    assert f"read once: {tmp_path / 'a.jsonl'}, {tmp_path / 'link.jsonl'}" in said.getvalue()


def test_empty_documents_are_counted_and_left_out(options: dict[str, Any], tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["", "one", " \n\t", "two", "\n"])
    manifest = prepare([str(source)], tmp_path / "out", **(options | {"validation_fraction": 0}))
    assert texts_of(tmp_path / "out", manifest, "train") == ["one", "two"]
    assert manifest.empty_documents == 3


def test_max_tokens_stops_soon_after(corpus: list[str], options: dict[str, Any], tmp_path: Path) -> None:
    options["validation_fraction"] = 0
    whole = prepare(corpus, tmp_path / "whole", **options)
    part = prepare(corpus, tmp_path / "part", **(options | {"max_tokens": 5000}))
    assert 5000 <= part.splits["train"].tokens < 9000 < whole.splits["train"].tokens
    held = [first_tokens(TokenStream.open(tmp_path / name, "train"), 5000) for name in ("whole", "part")]
    assert (held[0] == held[1]).all()


def test_trains_its_own_tokenizer_not_on_held_out_text(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    options: dict[str, Any] = {"vocab_size": 600, "validation_fraction": 0.3, "workers": 1}
    one = prepare([str(source)], tmp_path / "one", **options)
    kept = texts_of(tmp_path / "one", one, "train")
    two = prepare([str(write_jsonl(tmp_path / "b.jsonl", kept))], tmp_path / "two", **options)
    assert one.tokenizer.vocab_size == 600
    assert one.tokenizer.fingerprint == two.tokenizer.fingerprint


def test_embedded_corpus(tmp_path: Path) -> None:
    options: dict[str, Any] = {"vocab_size": 1000, "validation_fraction": 0.05, "workers": 1}
    manifest = prepare(["self:300K"], tmp_path / "out", **options)
    assert sum(counts.text_bytes or 0 for counts in manifest.splits.values()) >= 300_000
    assert manifest.dtype == "uint16"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("workers", [1, 2])
def test_goes_on_after_an_interruption_at_every_part(
    corpus: list[str], options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    options["workers"] = workers
    prepare(corpus, tmp_path / "whole", **options)
    save = State.save
    for after in (0, 1, 2, 5) if workers == 1 else (3,):
        out = tmp_path / f"out{after}"

        def save_then_die(state: State, folder: Path, after: int = after) -> None:
            save(state, folder)
            if state.part == after:
                raise Killed

        monkeypatch.setattr(State, "save", save_then_die)
        with pytest.raises(Killed):
            prepare(corpus, out, **options)
        monkeypatch.setattr(State, "save", save)
        with pytest.raises(UserError, match=r"holds no manifest\.json"):
            TokenStream.open(out, "train")
        (out / "train-00077.bin.partial").write_bytes(b"of a killed process")
        (out / "train-00077.bin").write_bytes(b"renamed, and killed before it was counted")
        said = io.StringIO()
        prepare(corpus, out, **options, console=Console(file=said, width=200))
        assert (f"continuing after shard {after - 1}" in said.getvalue()) == (after > 0)
        assert folder_bytes(out) == folder_bytes(tmp_path / "whole")


def test_finished_folder_is_left_alone(corpus: list[str], options: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    manifest = prepare(corpus, out, **options)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    said = io.StringIO()
    (out / "progress.json").write_text("{}")  # left by a process that ended right after the manifest
    assert prepare(corpus, out, **(options | {"workers": 2}), console=Console(file=said, width=200)) == manifest
    assert "is prepared already" in said.getvalue()
    assert {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"} == before


def test_other_options_or_sources_are_refused(corpus: list[str], options: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(corpus, out, **options)
    with pytest.raises(UserError, match=r"shard_tokens is 2000, not 9.*--restart"):
        prepare(corpus, out, **(options | {"shard_tokens": 9}))
    with pytest.raises(UserError, match=r"made otherwise: sources is .*--restart"):
        prepare(corpus[:2], out, **options)
    manifest = prepare(corpus[:2], out, **options, restart=True)
    prepare(corpus[:2], tmp_path / "fresh", **options)
    assert folder_bytes(out) == folder_bytes(tmp_path / "fresh")
    assert manifest.splits["train"].documents < 120


def test_half_prepared_with_other_options_is_refused(
    corpus: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    broken = write_jsonl(tmp_path / "z.jsonl", ["fine"])
    broken.write_text(broken.read_text() + "not json\n")
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"z\.jsonl, line 2"):
        prepare([*corpus, str(broken)], out, **options)
    with pytest.raises(UserError, match=r"half-prepared.*validation_fraction is 0.1, not 0.2"):
        prepare([*corpus, str(broken)], out, **(options | {"validation_fraction": 0.2}))
    # Nothing finished yet: nothing is lost by starting anew with other options.
    with pytest.raises(UserError, match="line 2"):
        prepare([str(broken)], tmp_path / "early", **options)
    prepare(corpus, tmp_path / "early", **options)


def test_missing_shard_of_a_finished_folder_is_seen(corpus: list[str], options: dict[str, Any], tmp_path: Path) -> None:
    prepare(corpus, tmp_path / "out", **options)
    (tmp_path / "out" / "train-00001.bin").unlink()
    with pytest.raises(UserError, match=r"train-00001.bin.*missing.*--restart"):
        prepare(corpus, tmp_path / "out", **options)
    prepare(corpus, tmp_path / "out", **options, restart=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_of_workers_reach_the_user(
    corpus: list[str], options: dict[str, Any], tmp_path: Path, workers: int
) -> None:
    with pytest.raises(UserError, match=r"field = 'body'.*a.jsonl.gz, line 1 has the fields id, text") as caught:
        prepare(corpus, tmp_path / "out", **(options | {"workers": workers, "field": "body"}))
    assert caught.value.key == "field"


def test_folder_in_use_or_of_others_is_refused(corpus: list[str], options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with only_process(tmp_path / "out", "out"), pytest.raises(UserError, match="another process is writing"):
        prepare(corpus, tmp_path / "out", **options)
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(UserError, match=r"other files \(thesis.txt\)"):
            prepare(corpus, tmp_path / "out", **options, restart=restart)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"
    with pytest.raises(UserError, match=r"thesis\.txt': is a file"):
        prepare(corpus, tmp_path / "out" / "thesis.txt", **options)
    with pytest.raises(UserError, match="cannot be made"):
        prepare(corpus, tmp_path / "out" / "thesis.txt" / "below", **options)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"text_unit": "lines"}, "text_unit"),
        ({"vocab_size": 100}, "vocab_size"),
        ({"tokenizer": None, "vocab_size": 0}, "vocab_size"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"shard_tokens": 0}, "shard_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"workers": 0}, "workers"),
        ({"tokenizer": "./nowhere.model"}, "tokenizer"),
    ],
)
def test_impossible_options(
    corpus: list[str], options: dict[str, Any], tmp_path: Path, changes: dict[str, Any], key: str
) -> None:
    with pytest.raises(UserError) as caught:
        prepare(corpus, tmp_path / "out", **(options | changes))
    assert caught.value.key == key
    assert not (tmp_path / "out").exists()


def test_nothing_to_train_on(options: dict[str, Any], tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    blank = write_jsonl(tmp_path / "blank.jsonl", ["", " "])
    for source, said in ((empty, "0 empty"), (blank, "2 empty")):
        with pytest.raises(UserError, match=f"{said} and 0 held-out documents"):
            prepare([str(source)], tmp_path / source.stem, **options)
        assert not (tmp_path / source.stem / "manifest.json").exists()
        with pytest.raises(UserError, match="no text to train a tokenizer on"):
            prepare([str(source)], tmp_path / f"{source.stem}-trained", workers=1)
    with pytest.raises(UserError, match="name at least one"):
        prepare([], tmp_path / "none", **options)


def test_manifest_holds_no_machine_paths_in_its_identity(
    corpus: list[str], options: dict[str, Any], tmp_path: Path
) -> None:
    prepare(corpus, tmp_path / "out", **options)
    identity = json.loads((tmp_path / "out" / "manifest.json").read_text())["identity"]
    assert str(tmp_path) not in json.dumps(identity)
