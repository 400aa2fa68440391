"""The data that a recipe names: its batches and its held-out sequences."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, get_args

from qatscale.config.schema import RunConfig
from qatscale.data.manifest import Manifest, Split, SplitCounts, Verify
from qatscale.data.mixture import ONE_SOURCE, Mixture
from qatscale.data.reader import BatchReader, EvaluationReader, TokenStream, complete_sequences
from qatscale.errors import UserError
from qatscale.schedule.timeline import Timeline


def open_batches(config: RunConfig, timeline: Timeline) -> BatchReader:
    """The training batches of a run. UserError as from `open_stream`, and where the data cannot fill one batch."""
    data, last, streams = config.data, timeline.last_cooldown, _open_sources(config, "train")
    tail = (last, data.cooldown_seed) if data.cooldown_seed and last is not None else None
    mixture, manifest = mixture_of(config, timeline), joined({name: s.manifest for name, s in streams.items()})
    return BatchReader(streams, data.sequence_length, config.batch.sequences, data.seed, tail, mixture, manifest)


def open_validation(config: RunConfig, tokenizer: str | None = None) -> EvaluationReader:
    """The held-out batches of a run. UserError as from `open_stream`, and for ids of another tokenizer.

    tokenizer: the fingerprint of the model's, if known.
    """
    held_out = open_stream(config, "validation")
    held_out.manifest.check_tokenizer(tokenizer)
    return EvaluationReader(held_out, config.data.sequence_length, config.evaluation.tokens, config.batch.micro_batch)


def open_stream(config: RunConfig, split: Split) -> TokenStream:
    """A split of the run's data, after checks of its checksums and vocabulary. Sources follow one another.

    UserError for data that are missing, damaged or of another vocabulary.
    """
    streams = _open_sources(config, split)
    if len(streams) == 1:
        return next(iter(streams.values()))
    assert config.data.path is not None
    manifest = joined({name: stream.manifest for name, stream in streams.items()})
    open_shard = functools.partial(manifest.open_shard, config.data.path)
    return TokenStream(manifest, manifest.splits[split].shards, open_shard, f"{config.data.path} ({split})")


def _open_sources(config: RunConfig, split: Split) -> dict[str, TokenStream]:
    """By name the sources of the run's data that have this split; all of them, if it is the training split.

    Rank 0 reads the bytes, and the first rank of every other host checks sizes. The others trust them, so that a large
    job neither reads the corpus nor asks for every file once per process.
    """
    if config.data.path is None:
        fix = "Prepare some, `qatscale prepare SOURCE --out DIR`, and set data.path=DIR."
        raise UserError("data.path", None, "is not set.", fix)
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))  # before they have met
    verify: Verify = "auto" if rank == "0" else "size" if local_rank == "0" else "trust"
    manifests = {name: Manifest.load(folder) for name, folder in config.data.sources.items()}
    joined(manifests).check_vocabulary(config.model.vocab_size)
    held = [name for name, manifest in manifests.items() if split == "train" or manifest.holds(split)]
    sources = config.data.sources
    return {name: TokenStream.open(sources[name], split, verify, manifests[name]) for name in held or manifests}


def mixture_of(config: RunConfig, timeline: Timeline) -> Mixture:
    """The mixture of a run.

    `data.cooldown_mix` holds from the first cooldown or the switch to QAT, whichever is first, to the end.
    """
    data = config.data
    if data.mix is None:
        return ONE_SOURCE
    change = timeline.boundaries[0] * config.batch.sequences if timeline.boundaries else None
    return Mixture(data.mix, data.cooldown_mix if timeline.boundaries else None, change)


def data_here(config: RunConfig) -> tuple[dict[str, int], Manifest | None]:
    """Training tokens of the sources that are on this machine, and their manifest if all are.

    UserError where a file is not what its manifest says, and where the model's vocabulary is too small for it.
    """
    folders = config.data.sources
    here = {name: Manifest.load(path) for name, path in folders.items() if path.exists()}
    for name, manifest in here.items():
        for split in filter(manifest.holds, get_args(Split)):
            manifest.check_shards(folders[name], split, "size")
    held = {name: manifest.splits["train"].tokens for name, manifest in here.items()}
    if not here or len(here) < len(folders):
        return held, None
    manifest = joined(here)
    manifest.check_vocabulary(config.model.vocab_size)
    return held, manifest


def plan_sources(
    config: RunConfig, timeline: Timeline, held: Mapping[str, int]
) -> tuple[list[dict[str, Any]], list[str]]:
    """What a run reads of each source, and a warning for each that it reads again. Without `data.mix` the source is "".

    held: training tokens by source. `epochs` is None where the data are not here yet. UserError where a source holds
    less than a sequence.
    """
    folders = config.data.sources
    mixture, length = mixture_of(config, timeline), config.data.sequence_length
    sequences = timeline.steps * config.batch.sequences
    total, first = (mixture.count(n) * length for n in (sequences, min(sequences, mixture.change or sequences)))
    rows, warnings = [], []
    for name, tokens, before in zip(mixture.names, total.tolist(), first.tolist(), strict=True):
        epochs = None
        if name in held:
            unique = complete_sequences(f"{folders[name]} (train)", held[name], length) * length
            epochs = tokens / unique
            warnings.append(repetition(name, epochs, unique))
        elif name in folders:
            warnings.append(f"{folders[name]} does not exist yet")
        rows.append(
            {"source": name, "mix": before, "cooldown_mix": tokens - before, "tokens": tokens, "epochs": epochs}
        )
    return rows, [*filter(None, warnings)]


def repetition(source: str, epochs: float, unique: int) -> str | None:
    """A warning for a source of `unique` tokens, or None if no sequence occurs twice."""
    if epochs <= 1:
        return None
    beyond = "; beyond about 4 epochs repeated tokens are worth little (arXiv:2305.16264)" if epochs > 4 else ""
    what = f"{source} repeats" if source else "the data repeat"
    return f"{what}: {epochs:.2f} epochs of {unique:,} tokens{beyond}"


def joined(manifests: Mapping[str, Manifest]) -> Manifest:
    """The manifest of several prepared folders, by their names in one folder. A single one stays as it is.

    UserError where the ids of one are another tokenizer's.
    """
    known = {name: manifest for name, manifest in manifests.items() if manifest.tokenizer.fingerprint} or manifests
    first, chosen = next(iter(known.items()))
    if len(manifests) == 1:
        return chosen
    for name, manifest in manifests.items():
        if manifest.dtype != chosen.dtype:
            problem = f"the sources store tokens in two types: {first} in {chosen.dtype}, {name} in {manifest.dtype}."
            raise UserError("data.mix", None, problem, "Write one of them again with the other's.")
    for name, manifest in known.items():
        if manifest.tokenizer.fingerprint != chosen.tokenizer.fingerprint:
            found = [f"{one} with {known[one].tokenizer.fingerprint:.12}…" for one in (first, name)]
            fix = "The same ids mean other text. Prepare one of them again with the other's: --tokenizer FOLDER."
            raise UserError("data.mix", None, f"the sources have two tokenizers: {', '.join(found)}.", fix)
    splits: dict[Split, SplitCounts] = {}
    for split in get_args(Split):
        parts = {name: manifest.splits[split] for name, manifest in manifests.items() if split in manifest.splits}
        shards = [
            shard.model_copy(update={"name": f"{name}/{shard.name}"})
            for name, part in parts.items()
            for shard in part.shards
        ]
        splits[split] = SplitCounts.of(shards, sum(part.text_bytes or 0 for part in parts.values()) or None)
    card = chosen.tokenizer
    size = max(manifest.tokenizer.vocab_size for manifest in manifests.values())
    folder = card.folder and f"{first}/{card.folder}"
    card = card.model_copy(update={"vocab_size": size, "folder": folder})
    return Manifest.model_validate({**dict(chosen), "tokenizer": card, "splits": splits})
