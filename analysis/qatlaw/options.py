"""The options of the planner's commands, each declared once, with the function that reads its text."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from qatlaw.amounts import Reader, parse_amount, parse_bits, parse_count, parse_nats, parse_share, parse_vocabulary
from qatlaw.bit_widths import BIT_WIDTHS_TEXT, TOLERANCE


def _option(metavar: str, text: str, read: Reader = parse_amount) -> Any:
    def convert(parameter: typer.CallbackParam, value: str | None) -> float | None:
        return None if value is None else read(parameter.opts[0], value)

    return typer.Option(metavar=metavar, help=text, parser=str, callback=convert)


PARAMS = _option("396M", "Parameters of the model; a tied embedding counts once.", parse_count)
RECIPE = typer.Option(metavar="396m", help="Instead of --params: a recipe with its tokens, bits, batch and schedule.")
TOKENS = _option("100B", "Training tokens of both phases.", parse_count)
BITS = _option("4", f"Bits per quantized weight: {BIT_WIDTHS_TEXT}.", parse_bits)
GROUP_SIZE = typer.Option(
    metavar="32",
    min=2,
    help="Input channels that share a scale, for effective bits and for laws that know it; a row does if left out.",
)
FORMAT = typer.Option(metavar="gguf", help="Count the file of this format of `qatscale export`.")
BATCH_TOKENS = _option("1M", "Tokens of an optimizer step; the answer then names the step of the switch.", parse_count)
NATS = _option("0.01", f"Nats per token that a bit width may lose, with a law. (Default: {TOLERANCE}.)", parse_nats)
VOCABULARY = _option("32000", "Size of the tokenizer's vocabulary.", parse_vocabulary)
FLOPS = _option("1e21", "The budget: floating-point operations.")
GPU_HOURS = _option("500", "The budget: GPU-hours, all GPUs together.")
GPU = typer.Option(metavar="H200", help="A GPU by name, for its peak.")
PEAK_FLOPS = _option("989T", "Instead of --gpu: its peak in FLOP/s.")
MFU = _option("0.4", "Share of the peak that full-precision training reaches.", parse_share)
TOKENS_PER_SECOND = _option("150K", "Instead of a peak and --mfu: measured speed of one GPU in full precision.")
QAT_OVERHEAD = _option("1.2", "Time of a QAT step over that of a full-precision step.")
TRAINED_TOKENS = _option("60B", "Instead of RUN: full-precision tokens so far. Needs --params.", parse_count)
FRACTION = _option("0.1", "QAT tokens over all tokens.", parse_share)
FUSED_LOSS = _option("2.31", "Final loss of the fused run, in nats per token.", parse_nats)
SEQUENTIAL_LOSS = _option("2.32", "Final loss of the sequential run of as many tokens.", parse_nats)
LAW = typer.Option(
    metavar="LAW",
    help="Loss law: path of a fit.json, or synthetic, which is made up, to try the planner. "
    "For fractions alone also ladder-1to1000. "
    "For losses at each bit width also a published law, of QAT from scratch: chen-w4a16, chen-w4a4, chen-w16a4, "
    "chen-w4a4-fc2, chen-w16a4-fc2, kumar, quest, spectra.",
)
"""Its help names the laws in words, since the modules that hold them import NumPy."""
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
