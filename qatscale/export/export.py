"""A checkpoint to a folder that a client loads: plan, write, verify, describe; whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from qatscale.data.manifest import tokenizer_folder
from qatscale.errors import UserError, did_you_mean
from qatscale.export import compressed_tensors, gguf, hf, mlx
from qatscale.export.card import card
from qatscale.export.clients import CompressedTensors, GgufInTransformers, Kind, LlamaCpp, MlxLm, Transformers
from qatscale.export.encoding import Plan
from qatscale.export.report import FILE, Run, contents
from qatscale.export.source import Source
from qatscale.export.verify import Verification
from qatscale.files import appearing, write_json

FORMATS: dict[str, ModuleType] = {module.NAME: module for module in (hf, compressed_tensors, gguf, mlx)}
CLIENTS: dict[str, Sequence[Kind]] = {
    hf.NAME: (Transformers,),
    compressed_tensors.NAME: (CompressedTensors,),
    gguf.NAME: (GgufInTransformers, LlamaCpp),
    mlx.NAME: (MlxLm,),
}
NO_TOKENIZER = "none"

Verifier = Callable[[Plan, Path, Sequence[Kind]], Verification]


class VerificationError(RuntimeError):
    """A client makes something else of the export than what was trained. Nothing is left of the folder."""

    def __init__(self, verification: Verification) -> None:
        self.verification = verification
        found = [*verification.problems]
        found += [f"{client.client}: {problem}" for client in verification.clients for problem in client.problems]
        super().__init__("; ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else ""))


def check_format(format: str) -> None:
    if format not in FORMATS:
        raise UserError("--format", format, f"one of {', '.join(FORMATS)}.", did_you_mean(format, FORMATS))


def make_plan(source: Source, format: str, fallback: bool, q1_0: bool = False) -> Plan:
    """UserError where the format cannot hold a parameter, and for a quantized format without anything quantized.

    q1_0: see `gguf.plan`.
    """
    check_format(format)
    if q1_0 and format != gguf.NAME:
        raise UserError("--q1-0", None, f"is a type of gguf; {format} stores 1 bit in one way.", "Leave it out.")
    if not source.is_quantized and format != hf.NAME:
        why = "has not switched to QAT" if source.config.qat.scheme != "fp" else "was trained in full precision"
        do = "Quantize it after training, --ptq 4 (1 to 8 bits), or export it as it is, --format hf."
        raise UserError("--format", format, f"stores quantized weights, and the checkpoint {why}.", do)
    if not q1_0:
        return FORMATS[format].plan(source, fallback)
    plan = gguf.plan(source, fallback, q1_0=True)
    if not gguf.has_q1_0(plan):
        raise UserError("--q1-0", None, "has no effect: no matrix of 1 bit fits it.", "Leave it out.")
    return plan


def clients_of(plan: Plan, format: str) -> Sequence[Kind]:
    """The programs that read the export."""
    return (LlamaCpp,) if gguf.has_q1_0(plan) else CLIENTS[format]


def find_tokenizer(source: Source, given: str | None) -> Path | None:
    """The folder with the tokenizer's files; None = none is wanted. UserError where there is none."""
    if given == NO_TOKENIZER:
        return None
    if given is not None:
        if not Path(given).is_dir():
            raise UserError(
                "--tokenizer", given, f"a folder with tokenizer.model or tokenizer.json, or {NO_TOKENIZER}."
            )
        return Path(given)
    data = source.config.data.path
    do = (
        f"Give one, --tokenizer FOLDER, or the prepared data, --data FOLDER, or go without, --tokenizer {NO_TOKENIZER}."
    )
    if data is None or not data.is_dir():
        raise UserError(
            "data.path", str(data) if data else None, "the run's data, which hold the tokenizer, are gone.", do
        )
    folder = tokenizer_folder(data)
    if folder is None or not folder.is_dir():
        raise UserError("tokenizer", None, f"{data} holds none.", do)
    return folder


def export(
    plan: Plan, format: str, out: Path, *, run: Run, tokenizer: Path | None, verifier: Verifier | None
) -> dict[str, Any]:
    """Write the folder `out` and return its export.json. Streams: the largest tensor bounds the memory of all but the
    verification, which loads models. VerificationError, UserError and OSError leave no folder."""
    with appearing(out) as folder, torch.no_grad():
        FORMATS[format].write(plan, folder, tokenizer)
        verification = verifier(plan, folder, clients_of(plan, format)) if verifier else None
        if verification and not verification.passed:
            raise VerificationError(verification)
        described = contents(plan, format, run, folder, verification)
        (folder / "README.md").write_text(card(described, plan, has_tokenizer=tokenizer is not None))
        write_json(folder / FILE, described)
    return described
