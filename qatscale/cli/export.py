"""Export from the command line: what is exported, in which format, and what its clients make of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatscale.errors import EXIT_FAILED, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qatscale.export.export import Verifier
    from qatscale.export.report import Run
    from qatscale.export.source import Source

DEFAULT_TOKENS = 65_536
"""Held-out tokens that a verification uses at most, unless told otherwise."""


def export(
    checkpoint: Annotated[str, typer.Argument(help="RUN, RUN@STEP or a checkpoint folder.")],
    out: Annotated[Path, typer.Option(help="The new folder.")],
    format: Annotated[str, typer.Option(help="hf, compressed-tensors, gguf or mlx.")] = "hf",
    ptq: Annotated[
        float | None,
        typer.Option(help="Quantize now, after training, to so many bits; for full-precision checkpoints."),
    ] = None,
    fallback: Annotated[
        bool, typer.Option(help="Store a tensor that the format's type cannot hold in the next that can.")
    ] = False,
    q1_0: Annotated[
        bool,
        typer.Option("--q1-0", help="With gguf: 1 bit as Q1_0, half the size; read by llama.cpp, not by transformers."),
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="Its folder, or none. [default: that of the run's prepared data]")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Prepared data instead of the run's own.")] = None,
    unfinished: Annotated[bool, typer.Option(help="Also a checkpoint from before the run's end.")] = False,
    tokens: Annotated[
        str | None, typer.Option(help="Held-out tokens to verify on: 1M. [default: the recipe's, at most 64K]")
    ] = None,
    verify: Annotated[
        bool, typer.Option(help="Load the export in its clients and compare with the trained model.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print export.json.")] = False,
) -> None:
    """A model as its users load it: weights and scales as the trained forward pass saw them.

    hf: values on the quantizer's grid, for transformers. compressed-tensors: packed codes and scales, for transformers
    and vLLM. gguf: one file, for llama.cpp and transformers. mlx: a folder, for mlx-lm. What is written is then loaded
    in the clients that are installed: weights, logits and validation loss are compared with the trained model's.
    """
    from qatscale.cli.show import check_bits
    from qatscale.export.export import VerificationError, check_format, find_tokenizer, make_plan
    from qatscale.export.export import export as export_to
    from qatscale.export.source import open_source
    from qatscale.files import check_new

    check_format(format)
    if ptq is not None:
        check_bits("--ptq", ptq)
    if not verify and tokens is not None:
        raise UserError("--tokens", tokens, "has no effect with --no-verify.", "Leave one of them out.")
    check_new(out)
    source = open_source(checkpoint, ptq_bits=ptq, unfinished=unfinished, data=data)
    plan = make_plan(source, format, fallback, q1_0)
    files = find_tokenizer(source, tokenizer)
    verifier = _verifier(source, tokens) if verify else None
    try:
        described = export_to(plan, format, out, run=_run_of(source), tokenizer=files, verifier=verifier)
    except VerificationError as error:
        print(f"error: the export is not what was trained, and was removed: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    except OSError as error:
        print(f"error: nothing was exported to {out}: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)
    if as_json:
        print(json.dumps(described, indent=1))
    else:
        _print(described, out)


def _run_of(source: Source) -> Run:
    """What the run's folder knows, where the checkpoint lies in one."""
    from qatscale.export.report import Run
    from qatscale.tracking.compare import validation_losses
    from qatscale.tracking.records import read_json
    from qatscale.tracking.run_folder import RunFolder

    folder = RunFolder(source.folder.resolve().parent.parent)
    if not folder.run_file.is_file():
        return Run(folder.name)
    run = folder.run
    mlflow = read_json(folder.tracking_file).get("run_id") if folder.tracking_file.is_file() else None
    losses = validation_losses(folder) if folder.is_done and source.manifest.step == source.steps else None
    return Run(folder.name, run.get("id"), mlflow, run.get("git_commit"), losses)


def _verifier(source: Source, tokens: str | None) -> Verifier:
    """Opens the held-out data now, so that what is missing is told before anything is written."""
    import torch

    from qatscale.config.amounts import positive_amount
    from qatscale.export.verify import materialised, verify
    from qatscale.train.evaluate import load_checkpointed_model, open_view

    limit = (
        min(source.config.evaluation.tokens, DEFAULT_TOKENS) if tokens is None else positive_amount("--tokens", tokens)
    )
    held_out = _held_out(source, limit)

    def check(plan: Any, folder: Path, kinds: Any) -> Any:
        model, _ = load_checkpointed_model(source.folder, source.config, torch.device("cpu"))
        with open_view(model, source.view):
            trained = materialised(model)
        del model
        return verify(plan, folder, kinds, trained, held_out)

    return check


def _held_out(source: Source, tokens: int) -> Sequence[Tensor]:
    """Sequences of token ids, [sequence_length + 1] each."""
    import torch

    from qatscale.train.evaluate import open_validation

    evaluation = source.config.evaluation.model_copy(update={"tokens": tokens})
    try:
        reader = open_validation(source.config.model_copy(update={"evaluation": evaluation}))
    except UserError as error:
        do = f"{error.fix} Or name the data, --data FOLDER, or do without, --no-verify.".strip()
        raise UserError(error.key, error.value, error.problem, do) from None
    return [torch.from_numpy(row) for batch in reader.batches() for row in batch.tokens]


def _print(described: dict[str, Any], out: Path) -> None:
    from qatscale.cli.terminal import console, plain_table
    from qatscale.config.amounts import format_amount

    size, checkpoint, tokens = described["size"], described["checkpoint"], described["tokens"]
    if not checkpoint["finished"]:
        print(f"unfinished: step {checkpoint['step']:,} of {checkpoint['steps']:,}; the model card says so too")
    phases = f"{format_amount(tokens['fp'])} tokens in full precision, {format_amount(tokens['qat'])} in QAT"
    print(f"{out}: {described['exported_as']} of {described['run']['name']} ({described['view']}), {phases}")
    stored = plain_table(
        "stored as", "tensors", "weights", "bytes", "ideal", right=("tensors", "weights", "bytes", "ideal")
    )
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for tensor in described["tensors"]:
        width = f"{tensor['bits']:g} bits" if tensor["bits"] else "not quantized"
        kinds.setdefault((f"{width} as {tensor['stored_as']}", tensor["fallback"] or ""), []).append(tensor)
    for (kind, fallback), found in kinds.items():
        weights = sum(_numel(tensor["shape"]) for tensor in found)
        written, ideal = (sum(tensor[key] for tensor in found) for key in ("bytes", "ideal_bytes"))
        stored.add_row(
            kind + (" (fallback)" if fallback else ""), f"{len(found)}", f"{weights:,}", f"{written:,}", f"{ideal:,.0f}"
        )
    console().print(stored)
    for fallback in dict.fromkeys(fallback for _, fallback in kinds if fallback):
        print(f"fallback: {fallback}")
    if size["fallback_bytes"]:
        print(f"fallbacks cost {size['fallback_bytes'] / 2**20:.2f} MiB beyond the ideal")
    per_weight = size["bits_per_quantized_weight"]
    shown = f"{per_weight:.3f} bits per quantized weight with scales, " if per_weight else ""
    print(f"{size['bytes']:,} bytes in all: {shown}{size['bits_per_weight']:.3f} bits per parameter\n")
    _print_verification(described["verification"])


def _numel(shape: Sequence[int]) -> int:
    import math

    return math.prod(shape)


def _print_verification(found: dict[str, Any] | None) -> None:
    from qatscale.cli.terminal import console, plain_table

    if found is None:
        print("not verified (--no-verify)")
        return
    right = ("validation loss", "weights off", "logits off")
    table = plain_table("verified", *right, right=right, title=f"{found['tokens']:,} held-out tokens, fp32 arithmetic")
    table.add_row("trained model", f"{found['trained_loss']:.6f}", "", "")
    table.add_row("the same, as stored", f"{found['stored_loss']:.6f}", f"{found['weight_change']:.2g}", "")
    for client in found["clients"]:
        weights = f"{client['weight_error']:.2g}" if client["tensors"] else "not shown"
        table.add_row(client["client"], f"{client['loss']:.6f}", weights, f"{client['logit_error']:.2g}")
    console().print(table)
    if found["rounding"]:
        print(f"storing the scales changed them by at most {found['rounding']:.2g} of their size")
    for client, pip in found["not_installed"].items():
        print(f"{client} is not installed and was not asked: {pip}")
