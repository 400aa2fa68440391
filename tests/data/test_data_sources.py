"""Sources: every format gives the same documents, from any position on, and wrong input is told."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from qatscale.data import sources
from qatscale.data.sources import HubSource, Source, SourceOptions, open_source
from qatscale.errors import UserError
from tests.data.data_corpora import documents, write_jsonl, write_parquet

TEXTS = documents(40)


def read(source: Source, position: object = None) -> list[str]:
    return [text for batch in source.batches(position) for text in batch.texts()]


def opened(path: Path | str, **options: str) -> Source:
    return open_source(str(path), SourceOptions(**options))  # type: ignore[arg-type]


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BATCH_BYTES", 1500)
    monkeypatch.setattr(HubSource, "_ROWS", 3)


def hub_folder(tmp_path: Path) -> Path:
    """A data set in the layout of the Hub: `datasets` loads it by the same call as one from there."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    write_parquet(folder / "train-00000-of-00002.parquet", list(TEXTS[:25]))
    write_parquet(folder / "train-00001-of-00002.parquet", list(TEXTS[25:]))
    write_parquet(folder / "test-00000-of-00001.parquet", list(documents(3, seed=8)))
    return folder


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.json.xz", "a.jsonl.zst"])
@pytest.mark.usefixtures("small_batches")
def test_json_lines_in_every_compression(tmp_path: Path, name: str) -> None:
    assert read(opened(write_jsonl(tmp_path / name, TEXTS))) == TEXTS


@pytest.mark.usefixtures("small_batches")
def test_parquet(tmp_path: Path) -> None:
    assert read(opened(write_parquet(tmp_path / "a.parquet", [*TEXTS, None]))) == [*TEXTS, ""]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("file", ["One.\nStill one.\n\n \nTwo.\r\n"]),
        ("paragraph", ["One.\nStill one.\n", "Two.\r\n"]),
        ("line", ["One.\n", "Still one.\n", "\n", " \n", "Two.\r\n"]),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_files(tmp_path: Path, name: str, unit: str, expected: list[str]) -> None:
    raw = b"\xef\xbb\xbfOne.\nStill one.\n\n \nTwo.\r\n"
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    assert read(opened(tmp_path / name, text_unit=unit)) == expected


def test_folder_and_glob_go_by_name_and_skip_what_is_hidden(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".cache").mkdir()
    write_jsonl(tmp_path / "b" / "0.jsonl", TEXTS[10:20])
    write_jsonl(tmp_path / "a.jsonl.gz", TEXTS[:10])
    write_parquet(tmp_path / "c.parquet", list(TEXTS[20:]))
    write_jsonl(tmp_path / ".cache" / "x.jsonl", ["hidden"])
    (tmp_path / "README.md").write_text("About the data.")
    assert read(opened(tmp_path)) == TEXTS
    assert read(opened(f"{tmp_path}/**/*.jsonl*")) == TEXTS[:20]


@pytest.mark.usefixtures("small_batches")
def test_goes_on_from_every_position(tmp_path: Path) -> None:
    folder = tmp_path / "local"
    folder.mkdir()
    write_jsonl(folder / "0.jsonl", TEXTS[:11])
    write_jsonl(folder / "1.jsonl.xz", TEXTS[11:20])
    write_parquet(folder / "2.parquet", list(TEXTS[20:38]))
    (folder / "3.txt").write_text(TEXTS[38])
    (folder / "4.txt").write_text(TEXTS[39])
    for source in (opened(folder), HubSource(str(hub_folder(tmp_path)), SourceOptions())):
        whole = [(list(batch.texts()), batch.position) for batch in source.batches()]
        assert [text for texts, _ in whole for text in texts] == TEXTS
        assert len(whole) > 5
        for i, (_, position) in enumerate(whole):
            position = json.loads(json.dumps(position))  # as the progress file keeps it
            rest = [list(batch.texts()) for batch in source.batches(position)]
            assert rest == [texts for texts, _ in whole[i + 1 :]]


def test_data_sets_by_split(tmp_path: Path) -> None:
    folder = str(hub_folder(tmp_path))
    assert read(HubSource(folder, SourceOptions(split="test"))) == documents(3, seed=8)
    with pytest.raises(UserError, match=r"Did you mean 'text'\?"):
        read(HubSource(folder, SourceOptions(field="txt")))
    with pytest.raises(UserError, match=r"Bad split: nope"):
        read(HubSource(folder, SourceOptions(split="nope")))
    with pytest.raises(UserError, match="neither a local file or folder nor a dataset"):
        read(HubSource(str(tmp_path / "nowhere"), SourceOptions()))


def test_names_that_are_no_paths_are_data_sets() -> None:
    source = opened("owner/name:config", split="test")
    assert isinstance(source, HubSource)
    assert source.identity() == {"kind": "datasets", "name": "owner/name", "config": "config", "split": "test"}


def test_sample_comes_from_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_SAMPLE_SHARE", 300)
    for i in range(10):
        write_jsonl(tmp_path / f"{i}.jsonl", documents(20, seed=i))
    taken = list(opened(tmp_path).sample(3000))
    assert {text.split()[1] for text in taken} == {str(i) for i in range(10)}
    assert taken == list(opened(tmp_path).sample(3000))
    assert 3000 <= sum(map(len, taken)) < 3000 + 10 * 900
    assert len({text.split()[1] for text in opened(tmp_path).sample(900)}) == 3


def test_identity_is_of_content_not_of_place(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        write_jsonl(tmp_path / name / "a.jsonl", TEXTS)
    assert opened(tmp_path / "x").identity() == opened(tmp_path / "y").identity()
    raw = (tmp_path / "y" / "a.jsonl").read_bytes()
    (tmp_path / "y" / "a.jsonl").write_bytes(raw.replace(b"document 0 39", b"document 0 93"))
    assert opened(tmp_path / "x").identity() != opened(tmp_path / "y").identity()


def line_of(text: object) -> bytes:
    return json.dumps({"text": text, "id": 1}).encode() + b"\n"


GOOD = line_of("good") * 4


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("a.jsonl", GOOD + b'{"text": "caf\xe9"}\n', r"a.jsonl, line 5'.*byte 0xe9 at position 13"),
        ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', r"line 5'.*surrogate"),
        ("a.jsonl", GOOD + b'{"text": "cut off', r"line 5'.*not JSON"),
        ("a.jsonl", GOOD + b'{"body": "x", "id": 1}\n', r"field = 'text'.*line 5 has the fields body, id"),
        ("a.jsonl", GOOD + line_of(["a"]), r"line 5'.*holds a list, not text"),
        ("a.jsonl", b"[1, 2]\n", r"one JSON array.*jq"),
        ("a.jsonl", GOOD + b"17\n", r"line 5'.*a JSON int"),
        ("a.jsonl.gz", gzip.compress(GOOD * 50, mtime=0)[:-20], "damaged or cut off"),
        ("a.jsonl.gz", b"plain text", "damaged or cut off"),
        ("a.jsonl.xz", lzma.compress(GOOD * 50)[:-20], "damaged or cut off"),
        ("a.jsonl.zst", zstandard.compress(GOOD * 50)[:-5], "damaged or cut off"),
        ("a.jsonl.zst", b"plain text", "damaged or cut off"),
        ("a.txt", b"ok\n" * 3 + b"na\xefve", r"a.txt'.*byte 0xef at position 11 of this file"),
        ("a.txt", "naïve".encode("utf-16"), "not UTF-8.*iconv"),
        ("a.parquet", b"no such thing", "not a readable Parquet file"),
    ],
)
def test_bad_content_is_told_with_its_place(tmp_path: Path, name: str, raw: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=said):
        read(opened(tmp_path / name))


def test_zst_cut_between_lines_is_seen(tmp_path: Path) -> None:
    """What the libraries take for the end of the file: whole lines so far, and no end of the frame."""
    compressor = zstandard.ZstdCompressor().compressobj()
    raw = compressor.compress(GOOD) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    (tmp_path / "a.jsonl.zst").write_bytes(raw)
    with pytest.raises(UserError, match="Truncated"):
        read(opened(tmp_path / "a.jsonl.zst"))


def test_other_columns_may_change_their_type(tmp_path: Path) -> None:
    rows = [{"text": "2024-01-01", "n": 1}, {"text": "2024-01-02", "n": "one"}, {"text": "", "n": None}, {"text": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    assert read(opened(tmp_path / "a.jsonl")) == ["2024-01-01", "2024-01-02", "", "", ""]


def test_parquet_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"texte": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"has the fields texte, id\. Did you mean 'texte'\?"):
        read(opened(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"row 1'.*holds a int, not text"):
        read(opened(tmp_path / "a.parquet", field="id"))
    broken = pa.array([b"fine", b"caf\xe9"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": broken}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"row 2'.*0xe9 is not UTF-8"):
        read(opened(tmp_path / "b.parquet"))


def test_what_is_not_found_or_of_no_known_kind(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "a.csv.gz").write_bytes(b"")
    (tmp_path / "a.parquet.gz").write_bytes(b"")
    (tmp_path / "noending").write_text("x")
    (tmp_path / "empty").mkdir()
    for name in ("a.csv", "a.csv.gz", "a.parquet.gz", "noending"):
        with pytest.raises(UserError, match=r"are not read.*Kinds that are read: .jsonl"):
            opened(tmp_path / name)
    with pytest.raises(UserError, match=r"found .csv, .gz, noending"):
        opened(tmp_path)
    with pytest.raises(UserError, match="found nothing"):
        opened(tmp_path / "empty")
    with pytest.raises(UserError, match="no file matches"):
        opened(tmp_path / "*.jsonl")
    for name in (tmp_path / "b.jsonl", "./b", "corpus.jsonl.zst", "corpus.csv.gz", "corpus/", "my/own/corpus"):
        with pytest.raises(UserError, match="no such file or folder"):
            opened(name)
    with pytest.raises(UserError, match="self:30M"):
        opened("self:lots")


def test_large_text_file_is_no_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qatscale.data.records.LARGEST_DOCUMENT", 1 << 20)
    (tmp_path / "a.txt").write_text("word\n" * 300_000)
    with pytest.raises(UserError, match="text_unit=paragraph"):
        read(opened(tmp_path / "a.txt"))
    assert len(read(opened(tmp_path / "a.txt", text_unit="line"))) == 300_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.txt", "a.parquet"])
def test_a_document_without_an_end_is_refused_by_its_place(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few kilobytes that decompress to one line of any size."""
    monkeypatch.setattr("qatscale.data.records.LARGEST_DOCUMENT", 1 << 20)
    raw = b'{"text": "fine"}\n{"text": "' + b"x" * (3 << 20) + b'"}\n'
    if name.endswith(".parquet"):
        pq.write_table(pa.table({"text": ["fine", "x" * (3 << 20)]}), tmp_path / name)
    else:
        pack = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}.get(Path(name).suffix, bytes)
        (tmp_path / name).write_bytes(pack(raw.replace(b"\n", b"\n\n")))
    place = "row 2" if name.endswith(".parquet") else "paragraph 2" if name == "a.txt" else "line 3"
    with pytest.raises(UserError, match=rf"{name}, {place}': more than 1 MB, too much for one document"):
        read(opened(tmp_path / name, text_unit="paragraph"))


def test_a_text_that_every_row_holds_is_in_memory_once(tmp_path: Path) -> None:
    """A dictionary of 3 MB stands for 3 GB."""
    text = "x" * (3 << 20)
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), [text])
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
    before = pa.total_allocated_bytes()
    first = next(opened(tmp_path / "a.parquet").batches()).records[0]
    assert first.text() == text
    assert pa.total_allocated_bytes() - before < 100 << 20
