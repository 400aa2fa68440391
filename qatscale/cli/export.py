"""`qatscale export`: write a model for other programs, verify it in them, and print sizes and differences."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qatlaw.bit_widths import bits_label
from qatlaw.text_table import TextTable
from qatscale.cli.terminal import check_bits, console, run_argument, working
from qatscale.errors import UserError
from qatscale.export.formats import FORMATS

_FORMAT_HELP = " ".join(f"{name}: {what}." for name, what in FORMATS.items())


def export(
    checkpoint: Annotated[str, run_argument("RUN, RUN@STEP, a checkpoint folder, or a folder of QatPlugin.export.")],
    out: Annotated[Path, typer.Option(help="The new folder.")],
    format: Annotated[str, typer.Option(help=_FORMAT_HELP)] = "hf",
    ptq: Annotated[
        float | None, typer.Option(help="Quantize a full-precision checkpoint to this many bits now, after training.")
    ] = None,
    fallback: Annotated[
        bool,
        typer.Option("--fallback", help="Store a tensor that the format's type cannot hold in the next type that can."),
    ] = False,
    q1_0: Annotated[
        bool,
        typer.Option("--q1-0", help="With gguf: 1 bit as Q1_0, half the size; read by llama.cpp, not by transformers."),
    ] = False,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder of the tokenizer, or none. [default: from the run's prepared data]")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Prepared data instead of the run's own.")] = None,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Accept a checkpoint from before the run's end.")
    ] = False,
    tokens: Annotated[
        str | None, typer.Option(help="Held-out tokens to verify on: 1M. [default: the recipe's, at most 64K]")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="License of the weights for the model card, by its name on the Hub: apache-2.0.")
    ] = None,
    no_verify: Annotated[
        bool,
        typer.Option(
            "--no-verify", help="Skip the comparison of the export, loaded in its clients, with the trained model."
        ),
    ] = False,
) -> None:
    """Write a model for the programs that run it, with the weights of the trained forward pass.

    The installed clients then load it. Their weights, logits and validation loss are compared with the trained model's.
    A difference beyond a stated bound removes the export.
    """
    from qatscale.config.amounts import positive_amount
    from qatscale.export.export import export as export_to

    if ptq is not None:
        check_bits("--ptq", ptq)
    if no_verify and tokens is not None:
        raise UserError("--tokens", tokens, "has no effect with --no-verify.", "Leave one of them out.")
    held_out = None if tokens is None else positive_amount("--tokens", tokens)
    with working("reading the checkpoint") as progress:
        described = export_to(
            checkpoint, out, format=format, ptq_bits=ptq, fallback=fallback, q1_0=q1_0, tokenizer=tokenizer,
            data=data, unfinished=unfinished, tokens=held_out, verify=not no_verify, license=license,
            progress=progress,
        )  # fmt: skip
    _print(described, out)


def _print(described: dict[str, Any], out: Path) -> None:
    from qatscale.config.amounts import format_amount

    size, checkpoint, tokens = described["size"], described["checkpoint"], described["tokens"]
    if not checkpoint["finished"]:
        print(f"unfinished: step {checkpoint['step']:,} of {checkpoint['steps']:,}; the model card says so too")
    phases = f"{format_amount(tokens['fp'])} tokens in full precision, {format_amount(tokens['qat'])} in QAT"
    phases = "trained with the plugin" if checkpoint["trained_elsewhere"] else phases
    print(f"{out}: {described['exported_as']} of {described['run']['name']} ({described['view']}), {phases}")
    table = TextTable(("stored as", "tensors", "weights", "bytes", "ideal"), words=["stored as"], drop=("ideal",))
    for row in described["storage"]:
        bits = bits_label(row["bits"]) if row["bits"] else "not quantized"
        stored_as = f"{bits} as {row['stored_as']}" + (" (fallback)" if row["fallback"] else "")
        cells = (row["tensors"], row["weights"], row["bytes"], row["ideal_bytes"])
        table.add_row(stored_as, *(f"{cell:,.0f}" for cell in cells))
    console().print(table)
    for fallback in dict.fromkeys(row["fallback"] for row in described["storage"] if row["fallback"]):
        print(f"fallback: {fallback}")
    if size["fallback_bytes"]:
        print(f"fallbacks cost {size['fallback_bytes'] / 2**20:.2f} MiB beyond the ideal")
    per_weight = size["bits_per_quantized_weight"]
    shown = f"{per_weight:.3f} per quantized weight with scales, " if per_weight else ""
    shares = ", ".join(f"{share:.1%} at {bits_label(float(bits))}" for bits, share in size["shares"].items())
    bits = f"{described['bits']:g} nominal, {shown}{size['bits_per_weight']:.3f} per parameter"
    print(f"{size['bytes']:,} bytes in all. Bits: {bits}")
    print(f"quantized parameters: {shares or 'none'}\n")
    _print_verification(described["verification"])


def _print_verification(verification: dict[str, Any] | None) -> None:
    from qatscale.export.clients import install_line

    if verification is None:
        print("not verified (--no-verify)")
        return
    title = f"{verification['tokens']:,} held-out tokens, fp32 arithmetic"
    headers = ("verified", "validation loss", "weights off", "logits off")
    table = TextTable(headers, words=["verified"], title=title)
    table.add_row("trained model", f"{verification['trained_loss']:.6f}", "", "")
    stored = (f"{verification['stored_loss']:.6f}", f"{verification['weight_change']:.2g}")
    table.add_row("the same, as stored", *stored, "")
    for client in verification["clients"]:
        weights = f"{client['weight_error']:.2g}" if client["tensors"] else "not shown"
        table.add_row(client["client"], f"{client['loss']:.6f}", weights, f"{client['logit_error']:.2g}")
    console().print(table)
    if verification["rounding"]:
        print(f"storing the scales changed them by at most {verification['rounding']:.2g} of their size")
    for client, missing in verification["not_installed"].items():
        names = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
        print(f"{client} was not asked, because {names}: {install_line(missing)}")
