"""What a short run and a validation see is a sample of the corpus, however its sources and documents are ordered."""

from __future__ import annotations

from pathlib import Path
from string import ascii_uppercase

import numpy as np
import pytest
from scipy.stats import chi2, hypergeom

from qatscale.data.adopt import adopt
from qatscale.data.prepare import prepare
from qatscale.data.reader import BatchReader, EvaluationReader, TokenStream
from qatscale.data.tokenizer import SentencePieceTokenizer
from tests.data.data_corpora import documents, first_tokens, stream, write_jsonl
from tests.data.test_data_indexed import megatron_pair

UNLIKELY = 1e-4
"""Two-sided. Seeds are fixed, so a test always passes or always fails."""
SEEDS = range(20)
LENGTH = 4


def short_run(tokens: TokenStream, share: float, seed: int) -> np.ndarray:
    """All batches of a run that reads this share of an epoch: [sequences, LENGTH + 1]."""
    reader = BatchReader({"": tokens}, LENGTH, 64, seed)
    return np.concatenate([reader.batch(step) for step in range(int(tokens.sequences(LENGTH) * share / 64))])


def assert_sampled(drawn: int, hits: int, total: int, having: int) -> None:
    """`hits` of `drawn` sequences is what a random draw without replacement finds, where `having` of `total` would hit.

    This distribution is narrower than the binomial one.
    """
    low, high = hypergeom.ppf([UNLIKELY / 2, 1 - UNLIKELY / 2], total, having, drawn)
    assert low <= hits <= high, (hits, drawn, having / total)


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A prepared file in small letters, then one in capitals, of which the tokenizer has no pieces but their bytes."""
    folder = tmp_path_factory.mktemp("two-sources")
    small = write_jsonl(folder / "small.jsonl", [text.lower() for text in documents(900, 1)])
    large = write_jsonl(folder / "large.jsonl", [text.upper() for text in documents(500, 2)])
    prepare(
        [str(small), str(large)], folder / "data", tokenizer=str(tokenizer_folder), validation_fraction=0.1, workers=1
    )
    return folder / "data"


@pytest.fixture(scope="module")
def capitals(tokenizer: SentencePieceTokenizer) -> np.ndarray:
    return np.array([tokenizer.encode_batch([f"a{letter}"])[0][1] for letter in ascii_uppercase])


def test_a_short_run_reads_each_source_by_its_share(two_sources: Path, capitals: np.ndarray) -> None:
    tokens = TokenStream.open(two_sources, "train")
    total = tokens.sequences(LENGTH)
    assert total > 65_536, "a former version shuffled no more than these together"
    everything = np.isin(tokens.gather(np.arange(total), LENGTH), capitals).any(axis=1)
    assert not everything[: total // 3].any(), "the sources lie one after another"
    assert everything[-total // 3 :].mean() > 0.9
    for seed in SEEDS:
        for share in (0.002, 0.05):
            run = np.isin(short_run(tokens, share, seed), capitals).any(axis=1)
            assert_sampled(len(run), int(run.sum()), total, int(everything.sum()))


@pytest.mark.parametrize("share", [0.005, 0.15, 0.5])
def test_a_short_run_reads_all_parts_of_a_source_alike(share: float) -> None:
    """Documents in order: hits in 10 equal parts of the corpus, as even as random draws are and no more."""
    total = 100_000
    tokens = stream(np.arange(total * LENGTH + 1))
    statistics = []
    for seed in SEEDS:
        places = short_run(tokens, share, seed)[:, 0] // LENGTH
        hits = np.bincount(places * 10 // total, minlength=10)
        expected = len(places) / 10
        finite = (total - 1) / (total - len(places))  # without replacement
        statistics.append(((hits - expected) ** 2).sum() / expected * finite)
    low, high = chi2.ppf([UNLIKELY / 2, 1 - UNLIKELY / 2], 9 * len(SEEDS))
    assert low < sum(statistics) < high
    assert max(statistics) < chi2.ppf(1 - UNLIKELY / len(SEEDS), 9)


def test_adopted_shards_are_sampled_alike(tmp_path: Path) -> None:
    """One Megatron shard of small ids and one of large ids, in sequences of several lengths."""
    sizes = {"low": 150_000, "high": 300_000}
    for number, (name, size) in enumerate(sizes.items()):
        ids = (np.arange(size) % 100 + 100 * number).tolist()
        for use in ("train", "held"):
            megatron_pair(tmp_path / f"{use}-{name}", 8, "H", ids, [size // 3] + [size // 300] * 200)
    adopt(tmp_path, train=[f"train-{name}" for name in sizes], validation=[f"held-{name}" for name in sizes])
    tokens = TokenStream.open(tmp_path, "train")
    total = tokens.sequences(LENGTH)
    for seed in SEEDS:
        run = short_run(tokens, 0.01, seed)[:, 0] >= 100
        assert_sampled(len(run), int(run.sum()), total, total * 2 // 3)
    held_out = EvaluationReader(TokenStream.open(tmp_path, "validation"), LENGTH, 1200, 300)
    assert int((held_out.batch(0).tokens[:, 0] >= 100).sum()) == 200


@pytest.mark.parametrize("evaluated", [1, 3, 10, 100, 1000, 5000, 9_999])
def test_validation_takes_each_source_by_its_share(evaluated: int) -> None:
    """Sources one after another: to a sequence, for every number of tokens to evaluate."""
    total, first = 10_000, 3_100
    tokens = stream(np.arange(first * LENGTH), np.arange(first * LENGTH, total * LENGTH + 1))
    batch = EvaluationReader(tokens, LENGTH, evaluated * LENGTH, evaluated).batch(0)
    assert batch.weight == evaluated
    places = batch.tokens[:, 0] // LENGTH
    assert len(set(places.tolist())) == evaluated
    assert abs((places < first).sum() - evaluated * first / total) < 1
    again = EvaluationReader(tokens, LENGTH, evaluated * LENGTH, 7).batches(0, 1)
    assert (np.concatenate([b.tokens for b in again])[:, 0] // LENGTH == places).all(), "whatever the micro-batch"


@pytest.mark.parametrize("period", [2, 3, 4, 10])
def test_validation_does_not_beat_with_the_documents(period: int) -> None:
    """Every period-th sequence is of one kind, as in documents of equal length.

    Windows at equal distances, multiples of the period, would be all of this kind or none.
    """
    total = 12_000
    tokens = stream(np.arange(total * LENGTH + 1))
    for distance in (period, 2 * period):
        evaluated = total // distance
        places = EvaluationReader(tokens, LENGTH, evaluated * LENGTH, evaluated).batch(0).tokens[:, 0] // LENGTH
        assert_sampled(evaluated, int((places % period == 0).sum()), total, total // period)


def test_validation_of_everything_is_everything(two_sources: Path) -> None:
    tokens = TokenStream.open(two_sources, "validation")
    total = tokens.sequences(LENGTH)
    for asked in (total * LENGTH, total * LENGTH + 3, 10**9):
        seen = EvaluationReader(tokens, LENGTH, asked, total).batch(0).tokens
        assert (seen[:, :-1].ravel() == first_tokens(tokens, total * LENGTH)).all()
