"""The data of a run: its training batches and its held-out batches, from its configuration."""

from __future__ import annotations

import os

from qatscale.config.schema import RunConfig
from qatscale.data.manifest import Split
from qatscale.data.reader import BatchReader, EvaluationReader, TokenStream
from qatscale.errors import UserError


def open_batches(config: RunConfig) -> BatchReader:
    """The training batches. UserError as from `open_stream`, and where the split cannot fill one batch."""
    stream, length = open_stream(config, "train"), config.data.sequence_length
    return BatchReader(stream, length, config.batch.sequences, config.data.seed)


def open_validation(config: RunConfig) -> EvaluationReader:
    """The held-out batches. UserError as from `open_stream`."""
    held_out = open_stream(config, "validation")
    return EvaluationReader(held_out, config.data.sequence_length, config.evaluation.tokens, config.batch.micro_batch)


def open_stream(config: RunConfig, split: Split) -> TokenStream:
    """A split of the run's data, its checksums and its vocabulary checked.

    Rank 0 reads the bytes and all ranks check the sizes: a job of many processes would otherwise spend its first
    minutes on reading the corpus once each. UserError for data that are missing, damaged or of another vocabulary.
    """
    if config.data.path is None:
        fix = "Prepare some, `qatscale prepare SOURCE --out DIR`, and set data.path=DIR."
        raise UserError("data.path", None, "no data is given.", fix)
    is_main = int(os.environ.get("RANK", 0)) == 0  # before there is a process group
    stream = TokenStream.open(config.data.path, split, verify="auto" if is_main else "size")
    stream.manifest.check_vocabulary(config.model.vocab_size)
    return stream
