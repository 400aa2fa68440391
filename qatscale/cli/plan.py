"""`qatscale plan`: the planner's six questions, with what qatscale knows of recipes and GPUs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatscale.errors import UserError

if TYPE_CHECKING:
    from qatlaw.plan.answer import Answer
    from qatlaw.plan.run import Scheme
    from qatscale.config import RunConfig

NEAR = 0.05
"""A recipe of another size than the planned one is named only if it is no further off than this."""

_RUN = "One run: when to switch, what it is worth"
_MEMORY = "A memory budget (with --tokens): the best size and width"
_COMPARE = "Against full precision (with --params and --tokens)"
_BUDGET = "A budget of compute (with --params; without, a law chooses the size)"
_CHECKPOINT = "A full-precision checkpoint: the QAT tokens that it deserves"
_FUSION = "What fusing QAT with the cooldown saves (with --params, --tokens, --bits)"


def _option(panel: str, metavar: str, help_: str) -> Any:
    return typer.Option(rich_help_panel=panel, metavar=metavar, help=help_)


def plan(
    params: Annotated[str | None, _option(_RUN, "396M", "Parameters, a tied embedding counted once.")] = None,
    recipe: Annotated[
        str | None,
        _option(_RUN, "396m", "Instead: a recipe, with its batch and, by default, its tokens and bits."),
    ] = None,
    tokens: Annotated[str | None, _option(_RUN, "100B", "All training tokens.")] = None,
    bits: Annotated[float | None, _option(_RUN, "4", "Per quantized weight; all widths below, if left out.")] = None,
    fraction: Annotated[float | None, _option(_RUN, "0.25", "A QAT fraction for the law to judge.")] = None,
    batch_tokens: Annotated[str | None, _option(_RUN, "1M", "Tokens of a step, for the switch step.")] = None,
    memory: Annotated[str | None, _option(_MEMORY, "500MB", "Bytes for the weights.")] = None,
    vocab_size: Annotated[str | None, _option(_MEMORY, "32000", "Pieces of the tokenizer. (Default: 32,000.)")] = None,
    compare: Annotated[str | None, _option(_COMPARE, "fp", "QAT at each width against full precision.")] = None,
    tolerance: Annotated[
        float | None, _option(_COMPARE, "0.01", "Nats per token that a width may lose. (Default: 0.01.)")
    ] = None,
    flops: Annotated[str | None, _option(_BUDGET, "1e21", "Operations of the whole training.")] = None,
    gpu_hours: Annotated[str | None, _option(_BUDGET, "500", "Hours, all GPUs together.")] = None,
    gpu: Annotated[str | None, _option(_BUDGET, "H200", "Whose peak is known: H200, 'H100 80GB HBM3'.")] = None,
    peak_flops: Annotated[str | None, _option(_BUDGET, "989T", "Instead: the peak of any other, in FLOP/s.")] = None,
    mfu: Annotated[float | None, _option(_BUDGET, "0.4", "Share of it that full-precision training reaches.")] = None,
    qat_mfu: Annotated[float | None, _option(_BUDGET, "0.35", "Share of it that QAT reaches.")] = None,
    qat_overhead: Annotated[
        float | None, _option(_BUDGET, "1.2", "Instead: time of a QAT step over that of a full-precision step.")
    ] = None,
    tokens_per_second_fp: Annotated[
        str | None, _option(_BUDGET, "1.2M", "Instead of --gpu and --mfu: as measured.")
    ] = None,
    tokens_per_second_qat: Annotated[str | None, _option(_BUDGET, "1M", "The same in QAT.")] = None,
    gpus: Annotated[str | None, _option(_BUDGET, "8", "On which they were measured. (Default: 1.)")] = None,
    from_checkpoint: Annotated[str | None, _option(_CHECKPOINT, "RUN", "RUN, RUN@STEP or a checkpoint folder.")] = None,
    trained_tokens: Annotated[str | None, _option(_CHECKPOINT, "60B", "Instead: full-precision tokens so far.")] = None,
    fused_loss: Annotated[float | None, _option(_FUSION, "2.31", "Final loss of a fused run, nats per token.")] = None,
    sequential_loss: Annotated[float | None, _option(_FUSION, "2.32", "Of the sequential run of equal tokens.")] = None,
    law: Annotated[
        str | None,
        typer.Option(metavar="fit.json", help="Law of `qatscale fit`; or `synthetic`, a demonstration."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Plan QAT: when to switch, which size and width for a memory or compute budget, what a checkpoint deserves.

    Without a fitted loss law the closed form of the optimal fraction answers what it can, and the rest is named.
    """
    options = {name: value for name, value in locals().items() if name not in ("recipe", "gpu", "as_json")}
    found = _answer(options, recipe, gpu)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2, allow_nan=False))
    else:
        _print(found)


def _answer(options: dict[str, Any], recipe: str | None, gpu: str | None) -> Answer:
    from qatlaw.errors import LawError
    from qatlaw.plan.options import read_request
    from qatlaw.plan.questions import answer
    from qatscale.cli.show import check_bits

    if options["bits"] is not None:
        check_bits("--bits", options["bits"])
    known = {**_of_recipe(recipe, options), **_of_gpu(gpu, options)}
    try:
        texts = {name: None if value is None else str(value) for name, value in options.items()}
        found = answer(read_request(texts, **known))
    except LawError as error:
        raise UserError(error.key, error.value, error.allowed, error.do) from error
    if "RECIPE" in found.command and found.overrides:
        name = recipe or _nearest_recipe(found)
        if recipe:
            _check_runs(recipe, found)
        return replace(found, command=tuple(name if word == "RECIPE" else word for word in found.command))
    return found


def _check_runs(recipe: str, found: Answer) -> None:
    """UserError where settings of the recipe's own clash with the plan."""
    from qatscale.config import load_run_config
    from qatscale.schedule.build import build_timeline

    build_timeline(load_run_config(recipe, found.overrides))


def _of_recipe(recipe: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """What a recipe says of a request, as its fields."""
    if recipe is None:
        return {}
    from qatscale.config import load_run_config
    from qatscale.config.sizes import count_parameters, flops_per_token

    for name, why in (
        ("params", "says the same thing as --recipe."),
        ("batch_tokens", "is told by the recipe."),
        ("from_checkpoint", "has a recipe of its own."),
        ("memory", "asks for the size, and a recipe has one."),
    ):
        if options[name] is not None:
            raise UserError(f"--{name.replace('_', '-')}", options[name], why, "Leave one of them out.")
    config = load_run_config(recipe)
    known: dict[str, Any] = {
        "recipe": recipe,
        "params": float(count_parameters(config.model).total),
        "flops_per_token": float(flops_per_token(config.model, config.data.sequence_length)),
        "batch_tokens": float(config.tokens_per_step),
        "scheme": _scheme_of(config),
    }
    budget = any(options[name] is not None for name in ("flops", "gpu_hours", "trained_tokens"))
    if not budget and options["tokens"] is None:
        known["tokens"] = float(config.tokens)
    if not budget and options["compare"] is None and options["bits"] is None:
        known["bits"] = float(config.qat.bits)
    return known


def _scheme_of(config: RunConfig) -> Scheme:
    """The recipe's scheme; the classic one of a recipe without two phases."""
    from qatlaw.plan.run import SEQUENTIAL, Scheme
    from qatscale.schedule.fraction import nearest_fraction

    if config.qat.scheme not in ("sequential", "fused"):
        config = config.model_copy(update={"qat": config.qat.model_copy(update={"scheme": SEQUENTIAL.name})})

    def nearest(fraction: float, tokens: float) -> float:
        return nearest_fraction(config.model_copy(update={"tokens": round(tokens)}), fraction)

    return Scheme(config.qat.scheme, nearest)


def _of_gpu(gpu: str | None, options: dict[str, Any]) -> dict[str, float]:
    if gpu is None:
        return {}
    from qatscale.config.sizes import device_names, peak_flops

    if options["peak_flops"] is not None:
        raise UserError("--peak-flops", options["peak_flops"], "is told by --gpu.", "Leave one of them out.")
    peak = peak_flops(gpu)
    if peak is None:
        do = f"Give its --peak-flops. Known: {', '.join(device_names())}."
        raise UserError("--gpu", gpu, "its peak is not known here, and is not guessed.", do)
    return {"peak_flops": peak}


def _nearest_recipe(found: Answer) -> str:
    """The recipe to put the overrides into: that of the planned size, or for a planned shape the nearest one.

    `RECIPE` where none is near, or where settings of the nearest clash with the plan.
    """
    from qatscale.config import load_run_config, recipe_names
    from qatscale.config.sizes import count_parameters

    sizes = {name: count_parameters(load_run_config(name).model).total for name in recipe_names()}
    off = {name: abs(math.log(size / found.params)) for name, size in sizes.items()}
    name = min(off, key=lambda name: off[name])
    has_shape = any(override.startswith("model.") for override in found.overrides)
    if not has_shape and off[name] > NEAR:
        return "RECIPE"
    try:
        _check_runs(name, found)
    except UserError:
        return "RECIPE"
    return name


def _print(found: Answer) -> None:
    from qatscale.cli.terminal import console, plain_table

    out = console()
    headers = found.table.headers
    table = plain_table(*headers, right=headers[1:], title=found.title)
    for row in found.table.rows:
        table.add_row(*row)
    out.print(table)
    if found.law is not None:
        out.print(f"loss law: {found.law.source}", soft_wrap=True, markup=False)
    for line in (*found.notes, *([found.missing] if found.missing else [])):
        out.print(line, markup=False)
    for warning in found.warnings:
        out.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False)
    if found.overrides:
        out.print("\nTo run it:", " ".join((*found.command, *found.overrides)), soft_wrap=True, markup=False)
