"""Mixtures: exact shares after any number of sequences, the same batches for any number of ranks, sources on disk."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qatscale.config.recipe import load_run_config
from qatscale.config.schema import RunConfig
from qatscale.data.manifest import Manifest
from qatscale.data.mixture import Mixture, deal
from qatscale.data.open import joined, mixture_of, open_batches, open_stream, open_validation
from qatscale.data.prepare import prepare
from qatscale.data.reader import BatchReader, TokenStream
from qatscale.errors import UserError
from qatscale.schedule.build import build_timeline
from tests.data.data_corpora import documents, stream, write_jsonl

MIX, LATER, CHANGE, LENGTH = {"web": 0.7, "code": 0.2, "math": 0.1}, {"web": 0.25, "code": 0.75}, 52, 10


@settings(max_examples=200)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any))
def test_after_any_number_of_sequences_a_source_has_its_share_to_within_one(units: list[int]) -> None:
    sources, total = deal(units), sum(units)
    taken = [0] * len(units)
    for n, source in enumerate(sources.tolist(), start=1):
        taken[source] += 1
        assert all(abs(count * total - n * unit) < total for count, unit in zip(taken, units, strict=True))
    assert taken == units


@given(st.integers(0, 300), st.integers(0, 100))
def test_counts_are_known_without_counting(first: int, count: int) -> None:
    mixture = Mixture(MIX, LATER, CHANGE)
    assert mixture.names == ("code", "math", "web")
    dealt = mixture.sources(0, first + count)
    assert (mixture.sources(first, count) == dealt[first:]).all(), "found on their own"
    assert mixture.count(first).tolist() == [int((dealt[:first] == source).sum()) for source in range(3)]
    for n, shares, base in ((first, MIX, 0), (first, LATER, CHANGE)):
        part = dealt[base : min(n, CHANGE) if base == 0 else n]
        for source, name in enumerate(mixture.names):
            assert abs((part == source).sum() - len(part) * shares.get(name, 0)) < 1


def mixed(seed: int = 3, tail: tuple[int, int] | None = None) -> BatchReader:
    """Tokens tell their source and place: 10,000 x source + position."""
    tokens = {"code": 201, "math": 101, "web": 5001}
    streams = {
        name: stream(np.arange(i * 10_000, i * 10_000 + size, dtype=np.int32))
        for i, (name, size) in enumerate(tokens.items())
    }
    manifest = joined({name: stream.manifest for name, stream in streams.items()})
    return BatchReader(streams, LENGTH, 4, seed, tail, Mixture(MIX, LATER, CHANGE), manifest)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_only_split_the_batch(ranks: int) -> None:
    one = mixed()
    for step in (0, 12, 13, 14, 1000):  # the mixture changes before step 13
        assert (np.concatenate([mixed().batch(step, rank, ranks) for rank in range(ranks)]) == one.batch(step)).all()


def test_a_source_continues_its_own_order_through_the_change() -> None:
    reader = mixed()
    rows = np.concatenate([reader.batch(step) for step in range(25)])  # code: 10.4 + 36 of 48 sequences
    assert (rows - rows[:, :1] == np.arange(LENGTH + 1)).all()
    sources, places = np.divmod(rows[:, 0], 10_000)
    assert Counter(sources.tolist()) == dict(enumerate(reader.mixture.count(100).tolist()))
    for source, held in enumerate((20, 10, 500)):
        own = places[sources == source] // LENGTH
        for epoch in range(0, len(own), held):  # nothing twice within an epoch
            assert len(set(own[epoch : epoch + held].tolist())) == len(own[epoch : epoch + held])
    others = [mixed(seed).batch(0) for seed in (3, 4)]
    assert (others[0] != others[1]).any()


def test_another_order_of_the_cooldown_is_one_of_what_the_epochs_have_left() -> None:
    one, other = mixed(), mixed(tail=(15, 1))
    assert all((one.batch(step) == other.batch(step)).all() for step in range(15))
    assert any((one.batch(step) != other.batch(step)).any() for step in range(15, 20))
    rows = np.concatenate([other.batch(step)[:, 0] for step in range(25)])
    for source, held in enumerate((20, 10, 500)):
        epoch = rows[rows // 10_000 == source][:held]
        assert len(set(epoch.tolist())) == len(epoch), "nothing twice within an epoch"


def test_tokens_are_those_of_the_batches_that_were_read() -> None:
    reader = mixed()
    for first, end, left_out in ((0, 20, ()), (11, 20, (4, 13, 20)), (13, 14, (13,))):
        rows = [reader.batch(step) for step in range(first, end) if step not in left_out]
        found = Counter(itertools.chain(*((batch[:, 0] // 10_000).tolist() for batch in rows)))
        assert reader.tokens(first, end, left_out) == {
            name: LENGTH * found[source] for source, name in enumerate(reader.mixture.names)
        }


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    for seed, (name, count) in enumerate({"web": 60, "code": 20, "bare": 20}.items()):
        source = write_jsonl(folder / f"{name}.jsonl", documents(count, seed))
        held_out = 0 if name == "bare" else 0.2
        prepare([str(source)], folder / name, tokenizer=str(tokenizer_folder), validation_fraction=held_out, workers=1)
    return folder


def config(folder: Path, *overrides: str) -> RunConfig:
    return load_run_config("debug", [f"data.path={folder}", "model.vocab_size=4000", *overrides])


def test_a_mixture_of_prepared_folders(corpora: Path) -> None:
    run = config(corpora, "data.mix={web: 0.5, code: 0.5}", "data.cooldown_mix={bare: 1}")
    timeline = build_timeline(run)
    reader = open_batches(run, timeline)
    assert timeline.boundaries[0] == timeline.switch_step == 20
    assert reader.tokens(0, 20) == {"bare": 0, "code": 2560, "web": 2560}
    assert reader.tokens(20, 40) == {"bare": 5120, "code": 0, "web": 0}
    held_out = open_validation(run).stream
    parts = [Manifest.load(corpora / name).splits["validation"] for name in ("code", "web")]
    assert len(held_out) == sum(part.tokens for part in parts)
    codes = TokenStream.open(corpora / "code", "validation")
    assert (held_out.gather(np.array([0]), 64) == codes.gather(np.array([0]), 64)).all()
    reordered = config(corpora, "data.mix={code: 0.5, web: 0.5}", "data.cooldown_mix={bare: 1}")
    again = open_batches(reordered, timeline)
    assert (again.batch(3) == reader.batch(3)).all(), "the order of names in a recipe changes nothing"


def test_a_change_without_a_cooldown_never_comes(corpora: Path) -> None:
    run = config(
        corpora, "data.mix={web: 1}", "data.cooldown_mix={code: 1}", "qat.scheme=fp", "qat.fraction=auto",
        "schedule.cooldown_fraction=0",
    )  # fmt: skip
    mixture = mixture_of(run, build_timeline(run))
    assert mixture is not None
    assert dict(zip(mixture.names, mixture.count(160).tolist(), strict=True)) == {"web": 160}


def test_what_cannot_be_mixed(corpora: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="To mix the prepared folders in it") as caught:
        open_stream(config(corpora), "train")
    assert caught.value.key == "data.path"
    with pytest.raises(UserError, match="no such folder"):
        open_stream(config(corpora, "data.mix={web: 0.5, kode: 0.5}"), "train")
    (tmp_path / "web").symlink_to(corpora / "web")
    prepare([str(corpora / "code.jsonl")], tmp_path / "other", vocab_size=340, workers=1)
    with pytest.raises(UserError, match="the sources have two tokenizers: other with"):
        open_stream(config(tmp_path, "data.mix={web: 0.5, other: 0.5}"), "train")


@pytest.mark.parametrize(
    ("override", "key", "problem"),
    [
        ("data.mix={web: 0.7, code: 0.2}", "data.mix", "web: 0.7778, code: 0.2222"),
        ("data.mix={web: 0.33333, code: 0.66667}", "data.mix.web", "four decimals"),
        ("data.mix={}", "data.mix", "must be shares"),
        ("data.mix={web: true, code: 0}", "data.mix.web", "must be a number from 0 to 1"),
        ("data.mix={../web: 1}", "data.mix", "'../web' is not the name of a folder"),
        ("data.mix={web:0.7,code:0.3}", "data.mix", "a blank after each colon"),
        ("data.cooldown_mix={web: 1}", "data.cooldown_mix", "needs data.mix"),
    ],
)
def test_shares_are_exact(override: str, key: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        config(tmp_path, override)
    assert caught.value.key == key
