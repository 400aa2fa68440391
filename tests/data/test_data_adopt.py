"""Shards from elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qatscale.data.adopt import adopt
from qatscale.data.indexed import HEADER, MAGIC, VERSION
from qatscale.data.reader import TokenStream
from qatscale.errors import UserError
from tests.data.data_corpora import first_tokens
from tests.data.test_data_indexed import LENGTHS, TOKENS, megatron_pair


def test_megatron_shards_work_as_they_are(tmp_path: Path) -> None:
    megatron_pair(tmp_path / "my_text_document", 8, "H", TOKENS, LENGTHS)
    megatron_pair(tmp_path / "held_out", 8, "H", TOKENS[:3], LENGTHS[:1])
    manifest = adopt(tmp_path, train=["my_text_document.bin"], validation=["held_out.idx"])
    assert manifest.tokenizer.vocab_size == 10
    assert first_tokens(TokenStream.open(tmp_path, "train", verify="full"), 8).tolist() == TOKENS
    assert first_tokens(TokenStream.open(tmp_path, "validation"), 3).tolist() == TOKENS[:3]
    assert manifest.document_end(masked=False) is None
    with pytest.raises(UserError, match="do not say which token ends a document"):
        manifest.document_end(masked=True)
    with pytest.raises(UserError, match=r"has a manifest.json already"):
        adopt(tmp_path, train=["my_text_document"])
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="is not a token: the vocabulary has 10"):
        adopt(tmp_path, train=["my_text_document"], eos_id=10)
    assert adopt(tmp_path, train=["my_text_document"], eos_id=9).document_end(masked=True) == 9


def test_what_cannot_be_adopted(tmp_path: Path) -> None:
    megatron_pair(tmp_path / "a", 8, "H", TOKENS, LENGTHS)
    megatron_pair(tmp_path / "b", 4, "i", TOKENS, LENGTHS)
    megatron_pair(tmp_path / "c", 4, "i", [1, -2, 3], [3])
    with pytest.raises(UserError, match="hold id 9"):
        adopt(tmp_path, train=["a"], vocab_size=9)
    with pytest.raises(UserError, match="int32, and those of a are uint16"):
        adopt(tmp_path, train=["a", "b"])
    with pytest.raises(UserError, match="negative id -2"):
        adopt(tmp_path, train=["c"])
    with pytest.raises(UserError, match="missing") as caught:
        adopt(tmp_path, train=["d"])
    assert "prepare" not in caught.value.fix, "which makes no shards of others"
    with pytest.raises(UserError, match="at least one shard"):
        adopt(tmp_path, train=[])
    assert not (tmp_path / "manifest.json").exists()


def test_index_and_data_that_disagree_are_told_apart(tmp_path: Path) -> None:
    """As Megatron-LM's preprocess_data.py once wrote them: the index counts no end-of-document token."""
    megatron_pair(tmp_path / "a", 8, "H", [*TOKENS, 1, 1, 1], LENGTHS)
    with pytest.raises(
        UserError, match=r"disagree by 3 tokens: .*22 bytes.* 16\. It is one token a document"
    ) as caught:
        adopt(tmp_path, train=["a"], validation=["a"])  # what a shard holds is read before what it is for
    assert "later version" in caught.value.fix
    megatron_pair(tmp_path / "b", 8, "H", TOKENS[:-2], LENGTHS)
    with pytest.raises(UserError, match=r"disagree by 2 tokens: .*12 bytes.* 16\.") as caught:
        adopt(tmp_path, train=["b"])
    assert "document" not in str(caught.value)
    assert "prepare" not in caught.value.fix


def test_adopted_shards_that_were_damaged_later_are_not_to_be_prepared(tmp_path: Path) -> None:
    megatron_pair(tmp_path / "a", 8, "H", TOKENS, LENGTHS)
    adopt(tmp_path, train=["a"])
    megatron_pair(tmp_path / "a", 8, "H", TOKENS[::-1], LENGTHS)
    with pytest.raises(UserError, match="checksum") as caught:
        TokenStream.open(tmp_path, "train")
    assert "prepare" not in caught.value.fix


@pytest.mark.parametrize("fraction", [None, 0.1, 0.5])
def test_documents_are_held_out_once_each_spread_over_the_shards(fraction: float | None, tmp_path: Path) -> None:
    """Every token of document i is i: what a split holds can be read off its tokens."""
    lengths, shards = [3, 1, 4, 2, 5] * 60, ["a", "b"]
    for index, name in enumerate(shards):
        ids = np.repeat(np.arange(300) + 300 * index, lengths)
        megatron_pair(tmp_path / name, 8, "H", ids.tolist(), lengths)
    manifest = adopt(tmp_path, train=shards, validation_fraction=fraction)
    found = {}
    for split in ("train", "validation"):
        stream = TokenStream.open(tmp_path, split, verify="full")  # type: ignore[arg-type]
        ids = first_tokens(stream, len(stream))
        kept = np.unique(ids)
        assert ids.tolist() == np.repeat(kept, np.tile(lengths, 2)[kept]).tolist(), "whole documents, in order"
        assert len(kept) == manifest.splits[split].documents  # type: ignore[index]
        order = np.random.default_rng(0).permutation(len(stream) - 2)
        assert stream.gather(order, 1).tolist() == [ids[i : i + 2].tolist() for i in order]
        found[split] = set(kept.tolist())
    assert found["train"] | found["validation"] == set(range(600))
    assert not found["train"] & found["validation"]
    assert len(found["validation"]) == round(600 * (fraction or 0.01))
    assert {document // 300 for document in found["validation"]} == {0, 1}


def test_what_is_held_out_can_be_nothing_and_is_never_trained_on(tmp_path: Path) -> None:
    megatron_pair(tmp_path / "a", 8, "H", TOKENS, LENGTHS)
    for wrong in (-0.1, 0.9, float("nan")):
        with pytest.raises(UserError, match=r"0 to 0\.5"):
            adopt(tmp_path, train=["a"], validation_fraction=wrong)
    with pytest.raises(UserError, match="for training and as held out"):
        adopt(tmp_path, train=["a"], validation=["a"])
    assert adopt(tmp_path, train=["a"], validation_fraction=0).splits["validation"].documents == 0


@pytest.mark.parametrize("documents", [[0, 1, 2, 99], [0, -5, 2, 3], [3, 2, 1, 0], [2**62, 2**63 - 1], []])
def test_documents_that_are_no_groups_of_sequences_are_refused(documents: list[int], tmp_path: Path) -> None:
    megatron_pair(tmp_path / "a", 8, "H", TOKENS, LENGTHS)
    path = tmp_path / "a.idx"
    content = path.read_bytes()[: HEADER.size + 12 * len(LENGTHS)]
    header = HEADER.pack(MAGIC, VERSION, 8, len(LENGTHS), len(documents))
    path.write_bytes(header + content[HEADER.size :] + np.array(documents, "<i8").tobytes())
    with pytest.raises(UserError, match="its documents are not groups of its sequences"):
        adopt(tmp_path, train=["a"])
