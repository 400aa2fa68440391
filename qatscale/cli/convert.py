"""Convert from the command line and say what to do with the result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from qatscale.config.amounts import format_amount


def run_convert(
    source: str, to: str, out: Path, recipe: str | None, overrides: Sequence[str], trained_tokens: str | None
) -> None:
    from qatscale.config.amounts import positive_amount
    from qatscale.tracking.convert import convert

    seen = None if trained_tokens is None else positive_amount("--trained-tokens", trained_tokens)
    state = convert(source, to, out, recipe, overrides, seen)
    tokens = format_amount(state.step * state.config.tokens_per_step)
    print(f"{out}: {state.source}, {sum(map(math.prod, state.shapes.values())):,} parameters with their scales")
    match to:
        case "checkpoint":
            print(f"at step {state.step:,}, {tokens} tokens; go on with: qatscale branch {out} name=NAME KEY=VALUE…")
        case "universal":
            print('DeepSpeed reads it under ZeRO-1 and 2: "checkpoint": {"load_universal": true} in the ds_config and')
            print(f"engine.load_checkpoint({str(out)!r}); under ZeRO-3 it stops, see convert --help")
        case "hf":
            print("the weights in full precision; load them with transformers' AutoModelForCausalLM.from_pretrained")
    for note in state.notes:
        print(f"note: {note}")
