"""A run's data, opened as its configuration says: batches, held-out batches, and the streams beneath them."""

from __future__ import annotations

import os

from qatscale.config.schema import RunConfig
from qatscale.data.manifest import Split, Verify
from qatscale.data.reader import BatchReader, EvaluationReader, TokenStream
from qatscale.errors import UserError


def open_batches(config: RunConfig, last_cooldown: int | None = None) -> BatchReader:
    """The training batches of a run. `last_cooldown`: its first step, for `data.cooldown_seed`. UserError as from
    `open_stream`, and where the split cannot fill one batch."""
    stream, data = open_stream(config, "train"), config.data
    tail = (last_cooldown, data.cooldown_seed) if data.cooldown_seed and last_cooldown is not None else None
    return BatchReader(stream, data.sequence_length, config.batch.sequences, data.seed, tail)


def open_validation(config: RunConfig) -> EvaluationReader:
    """The held-out batches of a run. UserError as from `open_stream`."""
    held_out = open_stream(config, "validation")
    return EvaluationReader(held_out, config.data.sequence_length, config.evaluation.tokens, config.batch.micro_batch)


def open_stream(config: RunConfig, split: Split) -> TokenStream:
    """A split of the run's data, after checks of its checksums and vocabulary.

    Rank 0 reads the bytes, and the first rank of every other host checks sizes. The others trust them, so that a large
    job neither reads the corpus nor asks for every file once per process. UserError for data that are missing, damaged
    or of another vocabulary.
    """
    if config.data.path is None:
        fix = "Prepare some, `qatscale prepare SOURCE --out DIR`, and set data.path=DIR."
        raise UserError("data.path", None, "is not set.", fix)
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))  # before they have met
    verify: Verify = "auto" if rank == "0" else "size" if local_rank == "0" else "trust"
    stream = TokenStream.open(config.data.path, split, verify)
    stream.manifest.check_vocabulary(config.model.vocab_size)
    return stream
