"""`qatscale convert`: between checkpoints, DeepSpeed's universal layout and Hugging Face."""

from __future__ import annotations

import math
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from qatlaw.text import plural
from qatscale.cli.terminal import Overrides, working


def average(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoints: RUN (its newest), RUN@STEP, a folder, or RUN@FIRST-LAST for a range of steps."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The new folder.")],
) -> None:
    """Average the weights of checkpoints, of several runs or of a window of one, into a run's folder.

    Weights are averaged as they are. Learned scales are averaged in log space, once all checkpoints have switched to
    QAT. `qatscale evaluate OUT --ptq BITS` also gives the loss with scales calibrated anew.
    """
    from qatscale.study.average import average as average_checkpoints

    with working(f"averaging {plural(len(sources), 'source')}"):
        state = average_checkpoints(sources, out)
    quantized = state.plugin["switched_at"] is not None
    print(f"{out}: {state.source}")
    print(f"weights by their mean{', scales by their geometric mean' if quantized else ''}; compare its losses with")
    print(f"qatscale evaluate {quote(str(out))}{f' --ptq {state.config.qat.bits:g}' if quantized else ''}")


def convert(
    source: Annotated[
        str, typer.Argument(help="RUN, RUN@STEP or a checkpoint folder; a universal checkpoint; a Hugging Face folder.")
    ],
    overrides: Overrides = None,
    *,
    to: Annotated[str, typer.Option(help="checkpoint (a run's folder to branch from), universal or hf.")],
    out: Annotated[Path, typer.Option(help="The new folder.")],
    recipe: Annotated[
        str | None,
        typer.Option(
            help="From elsewhere to a checkpoint: the recipe of the new run's folder. A Hugging Face folder "
            "keeps its own shape."
        ),
    ] = None,
    trained_tokens: Annotated[
        str | None, typer.Option(help="From Hugging Face: tokens that the model has seen: 90B. [default: count from 0]")
    ] = None,
) -> None:
    """Convert a training checkpoint, DeepSpeed's universal layout or a Hugging Face folder to another of the three.

    DeepSpeed reads the universal layout under ZeRO-1 and 2, with `"checkpoint": {"load_universal": true}`. Under ZeRO-3
    it would silently give every parameter group the settings of the first. The folder lacks what ZeRO-3 needs, so that
    DeepSpeed stops instead. Checkpoints of qatscale resume under any layout without conversion.
    """
    from qatscale.config.amounts import format_amount, positive_amount
    from qatscale.tracking.convert import convert as convert_to

    seen = None if trained_tokens is None else positive_amount("--trained-tokens", trained_tokens)
    with working(f"converting {source}"):
        state = convert_to(source, to, out, recipe, overrides or [], seen)
    tokens = format_amount(state.step * state.config.tokens_per_step)
    print(f"{out}: {state.source}, {sum(map(math.prod, state.shapes.values())):,} parameters with their scales")
    match to:
        case "checkpoint":
            more = f"tokens=MORE_THAN_{tokens} " if state.step >= state.config.steps else ""
            print(f"at step {state.step:,}, {tokens} tokens; continue with:")
            print(f"qatscale branch {quote(str(out))} name=NAME {more}KEY=VALUE…")
        case "universal":
            print('DeepSpeed reads it under ZeRO-1 and 2: "checkpoint": {"load_universal": true} in the ds_config and')
            print(f"engine.load_checkpoint({str(out)!r}); under ZeRO-3 it stops, see convert --help")
        case "hf":
            print("the weights in full precision; load them with transformers' AutoModelForCausalLM.from_pretrained")
    for note in state.notes:
        print(f"note: {note}")
