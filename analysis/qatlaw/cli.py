"""The planner's command line, one command for each question. `qatscale plan` and `python -m qatlaw` mount it.

Options are those of `qatlaw.options`. Under `qatscale plan` the context holds the recipes
and GPUs of qatscale (`qatscale.cli.plan.RecipesAndGpus`); elsewhere it holds None.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qatlaw import options
from qatlaw.amounts import amount, bytes_label, parse_bytes
from qatlaw.bit_widths import TOLERANCE, bits_label
from qatlaw.errors import InputError
from qatlaw.options import Json

if TYPE_CHECKING:  # a --help waits for no NumPy
    from qatlaw.plan.answer import Answer
    from qatlaw.plan.run import Interval, Recipe, Split

_EFFECTIVE = "plan.effective_bits plan.S plan.tokens_per_stored_byte"
LOWEST = "* the lowest predicted loss."
BUDGETS = (
    ("--flops",),
    ("--gpu-hours", "--gpu", "--mfu"),
    ("--gpu-hours", "--peak-flops", "--mfu"),
    ("--gpu-hours", "--tokens-per-second"),
)

planner = typer.Typer(
    invoke_without_command=True, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


@planner.callback(epilog="Example: qatscale plan --params 396M --tokens 100B --bits 4")
def run(
    ctx: typer.Context,
    params: Annotated[float | None, options.PARAMS] = None,
    recipe: Annotated[str | None, options.RECIPE] = None,
    tokens: Annotated[float | None, options.TOKENS] = None,
    bits: Annotated[float | None, options.BITS] = None,
    batch_tokens: Annotated[float | None, options.BATCH_TOKENS] = None,
    group_size: Annotated[int | None, options.GROUP_SIZE] = None,
    law: Annotated[str | None, options.LAW] = None,
    as_json: Json = False,
) -> None:
    """When should a run switch from full precision to QAT? The commands below answer other questions.

    Without --bits, every bit width is planned. Without a loss law, the answer has fractions and tokens but no losses.
    """
    if ctx.invoked_subcommand is not None:
        if any(ctx.params.values()):
            raise InputError(ctx.invoked_subcommand, None, "has options of its own.", "Write options after it.")
        return
    from qatlaw.fraction_laws import FRACTION_LAWS, LADDER_FOUND, PAPER
    from qatlaw.plan.answer import Answer, facts
    from qatlaw.plan.run import plan_run, warnings_of
    from qatlaw.plan.waste import WASTED
    from qatlaw.planner_law import plan_law

    known = _known(ctx, recipe, params, tokens, batch_tokens, group_size)
    width = bits or known.bits
    if width is None:
        bit_widths(ctx, params, recipe, tokens, batch_tokens, law=law, group_size=group_size, as_json=as_json)
        return
    (N, D), basis = known.size, plan_law(law, known.effective)
    plan = plan_run(known, width, basis)
    table = {
        "bits per parameter": f"{width:g}",
        "  effective, as they are stored": None if plan.effective_bits is None else f"{plan.effective_bits:.3f}",
        "tokens per parameter byte": f"{plan.S:,.4g}",
        "  per stored byte": None if plan.tokens_per_stored_byte is None else f"{plan.tokens_per_stored_byte:,.4g}",
        "optimal QAT fraction (closed form)": None if plan.closed_form is None else f"{plan.closed_form:.1%}",
        "optimal QAT fraction (loss law)": None,
        "optimal QAT fraction (ladder)": f"{plan.optimum:.1%}" if law in FRACTION_LAWS else None,
        "planned QAT fraction": None if plan.fraction == plan.optimum else f"{plan.fraction:.1%}",
        "tokens in full precision": amount(plan.tokens_fp, 4),
        "tokens in QAT": amount(plan.tokens_qat, 4),
        "switch to QAT before step": None if plan.steps is None else f"{plan.switch_step:,} of {plan.steps:,}",
    }
    if p := plan.prediction:
        table |= {
            "optimal QAT fraction (loss law)": f"{plan.optimum:.1%}{_interval(p.fraction_interval, '.1%', p.level)}",
            "predicted loss": f"{p.loss:.4f}{_interval(p.loss_interval, '.4f', p.level)}",
            "predicted loss in full precision": f"{p.full_precision_loss:.4f}",
            "  the closed form's fraction": _judged(p.closed_form),
            "  QAT on 10 % of the tokens": _judged(p.rule),
        }
    notes, warnings = _counted_on(known), list(plan.warnings)
    if p:
        notes.append(f"Losses in nats per token; {WASTED}.")
    elif basis is PAPER:
        notes.append(LADDER_FOUND)
    if law not in FRACTION_LAWS:
        warnings += warnings_of(N, D, width, PAPER)
    answer = Answer("run", _run(N, D, width), facts(table), plan, basis, notes, warnings, plan.overrides, N)
    _show(ctx, as_json, answer, recipe)


@planner.command("bit-widths", epilog="Example: qatscale plan bit-widths --params 396M --tokens 100B")
def bit_widths(
    ctx: typer.Context,
    params: Annotated[float | None, options.PARAMS] = None,
    recipe: Annotated[str | None, options.RECIPE] = None,
    tokens: Annotated[float | None, options.TOKENS] = None,
    batch_tokens: Annotated[float | None, options.BATCH_TOKENS] = None,
    group_size: Annotated[int | None, options.GROUP_SIZE] = None,
    tolerance: Annotated[float | None, options.NATS] = None,
    law: Annotated[str | None, options.LAW] = None,
    as_json: Json = False,
) -> None:
    """What does QAT at each bit width need, and lose against full precision?"""
    from qatlaw.laws.named import NAMED
    from qatlaw.plan.answer import Answer, columns
    from qatlaw.plan.published import published_answer
    from qatlaw.plan.run import compare_widths
    from qatlaw.planner_law import plan_law

    known = _known(ctx, recipe, params, tokens, batch_tokens, group_size)
    N, D = known.size
    if law in NAMED:
        if group_size and not NAMED[law].needs_group:
            raise InputError("--group-size", group_size, f"has no effect: {law} does not know it.", "Leave it out.")
        _show(ctx, as_json, published_answer(NAMED[law], known, _run(N, D), tolerance or TOLERANCE))
        return
    basis = plan_law(law, known.effective)
    if tolerance and basis.law is None:
        raise InputError("--tolerance", tolerance, "takes a loss law.", "Add --law fit.json, or leave it out.")
    nats = tolerance or TOLERANCE
    plan = compare_widths(known, basis.widths, basis, nats)
    best = None if plan.smallest is None else plan.rows[plan.smallest]
    table = columns(plan.rows, f"bits {_EFFECTIVE} plan.fraction plan.tokens_qat plan.switch_step plan.loss gap", best)
    notes = _counted_on(known)
    if basis.law:
        within = f"within {nats:g} nats ({math.expm1(nats):.2%} of the perplexity) of full precision"
        start = f"* the smallest bit width {within}" if best else f"No bit width is {within}"
        notes += [f"{start}, whose predicted loss is {plan.full_precision_loss:.4f}."]
    title = f"{_run(N, D)}: QAT at each bit width"
    overrides = best.plan.overrides if best else None
    _show(ctx, as_json, Answer("bit-widths", title, table, plan, basis, notes, plan.warnings, overrides, N), recipe)


@planner.command(epilog="Example: qatscale plan memory 500MB --tokens 100B --bits 4")
def memory(
    ctx: typer.Context,
    budget: Annotated[str, typer.Argument(metavar="BYTES", help="For the weights: 500MB, 1.5GB or 512MiB.")],
    tokens: Annotated[float, options.TOKENS],
    bits: Annotated[float | None, options.BITS] = None,
    vocab_size: Annotated[float, options.VOCABULARY] = 32_000,
    group_size: Annotated[int | None, options.GROUP_SIZE] = None,
    format: Annotated[str | None, options.FORMAT] = None,
    law: Annotated[str | None, options.LAW] = None,
    as_json: Json = False,
) -> None:
    """Which model fits into a memory budget, and at which bit width is it best?"""
    from qatlaw.plan.answer import Answer, columns
    from qatlaw.plan.memory import RULE, SHAPES, plan_memory
    from qatlaw.plan.shapes import check_group_size, usual_effective_bits
    from qatlaw.planner_law import plan_law

    check_group_size(group_size)
    basis = plan_law(law, usual_effective_bits(round(vocab_size), group_size), losses=True)
    size = parse_bytes("BYTES", budget)
    file_size = _stack(ctx, "--format", format).file_size(format, group_size) if format else None
    plan = plan_memory(
        size, tokens, [bits] if bits else basis.widths, law=basis, vocabulary=round(vocab_size), group_size=group_size,
        file_size=file_size,
    )  # fmt: skip
    best = None if plan.best is None else plan.rows[plan.best]
    sizes = "plan.params shape.hidden_size shape.layers megabytes plan.effective_bits"
    wanted = f"bits {sizes} plan.S plan.fraction flops plan.loss"
    table = columns(plan.rows, wanted, best if law else None)
    rule = f"{SHAPES} as {format} stores them." if format else RULE
    notes = [f"The best that fit. {rule}", LOWEST] if law else [f"The largest that fit. {rule}"]
    if small := [bits_label(row.bits) for row in plan.rows if row.shape != row.largest]:
        notes.append(f"At {', '.join(small)} a larger model fits, but has too few tokens per byte to be better.")
    title = f"{bytes_label(size)} of weights, {amount(tokens, 4)} tokens"
    overrides, N = ((*best.plan.overrides, *best.shape.overrides), best.plan.params) if best else (None, 0)
    _show(ctx, as_json, Answer("memory", title, table, plan, basis, notes, plan.warnings, overrides, N))


@planner.command(epilog="Example: qatscale plan compute --gpu-hours 500 --gpu H200 --mfu 0.4 --recipe 396m --bits 4")
def compute(
    ctx: typer.Context,
    flops: Annotated[float | None, options.FLOPS] = None,
    gpu_hours: Annotated[float | None, options.GPU_HOURS] = None,
    gpu: Annotated[str | None, options.GPU] = None,
    peak_flops: Annotated[float | None, options.PEAK_FLOPS] = None,
    mfu: Annotated[float | None, options.MFU] = None,
    tokens_per_second: Annotated[float | None, options.TOKENS_PER_SECOND] = None,
    qat_overhead: Annotated[float | None, options.QAT_OVERHEAD] = None,
    params: Annotated[float | None, options.PARAMS] = None,
    recipe: Annotated[str | None, options.RECIPE] = None,
    bits: Annotated[float | None, options.BITS] = None,
    law: Annotated[str | None, options.LAW] = None,
    as_json: Json = False,
) -> None:
    """How many tokens does a compute budget buy, and how should they be split?

    With a law and without --params, also: for which size of model?
    """
    from qatlaw.fraction_laws import PAPER
    from qatlaw.plan.answer import Answer, columns
    from qatlaw.plan.budget import FLOPS_PER_PARAMETER, Budget, plan_budget
    from qatlaw.plan.run import warnings_of
    from qatlaw.planner_law import plan_law

    parts = {"--flops": flops, "--gpu-hours": gpu_hours, "--gpu": gpu, "--peak-flops": peak_flops, "--mfu": mfu}
    parts |= {"--tokens-per-second": tokens_per_second}
    given = tuple(flag for flag, value in parts.items() if value is not None)
    if given not in BUDGETS:
        ways = "; or ".join(" ".join(flags) for flags in BUDGETS)
        raise InputError(" ".join(given) or "compute", None, "is not a budget.", f"Give {ways}.")
    known = _known(ctx, recipe, params)
    basis = plan_law(law, known.effective, losses=True)
    if tokens_per_second and known.params is None:
        raise InputError("--params", None, "is missing.", "Add the size that the tokens per second belong to.")
    peak = _stack(ctx, "--gpu", gpu).peak_flops(gpu) if gpu else peak_flops
    flops_per_unit = peak * mfu * 3600 if peak and mfu else 1.0
    if tokens_per_second:
        cost, source = 1 / tokens_per_second / 3600, "the measured time"
    elif known.flops_per_token:
        cost, source = known.flops_per_token / flops_per_unit, "the recipe's FLOPs, attention included"
    else:  # for each parameter, where the size is to be chosen
        cost = FLOPS_PER_PARAMETER * (known.params or 1.0) / flops_per_unit
        source = "6 FLOPs per parameter, attention scores left out"
    ratio = qat_overhead or 1.0
    budget = Budget(flops or gpu_hours or 0.0, "FLOPs" if flops else "GPU-hours", cost, cost * ratio)
    widths = [bits] if bits else basis.widths
    plans = [plan_budget(known.params, width, budget, law=basis, scheme=known.scheme) for width in widths]
    one = plans[0] if len(plans) == 1 else None
    best = one or (min(plans, key=lambda plan: plan.chosen.loss or 0.0) if law else None)
    if one:
        table = columns(one.splits, "name fraction tokens tokens_qat loss")
    else:
        table = columns(plans, "bits params chosen.fraction chosen.tokens chosen.tokens_qat chosen.loss", best)
    times = "" if ratio == 1 else f"{ratio:.4g} times "
    notes = [f"A full-precision token costs {source}; a QAT token {times}as much."]
    notes += [LOWEST] if law and not one else []
    warnings = [warning for plan in plans for warning in plan.warnings]
    if one and one.closed_form:
        warnings += warnings_of(one.params, one.closed_form.tokens, one.bits, PAPER)
    if qat_overhead is None:
        warnings.append(
            "a QAT token is assumed to cost as much as a full-precision one: divide tokens_per_second_fp of a finished "
            "run by its tokens_per_second_qat, and give that as --qat-overhead"
        )
    title = f"{budget.amount:g} {budget.unit}"
    title += f", {amount(one.params, 4)} parameters, {bits_label(one.bits)}" if one else ""
    overrides, N = (best.overrides, best.params) if best else (None, 0)
    _show(ctx, as_json, Answer("compute", title, table, one or plans, basis, notes, warnings, overrides, N), recipe)


@planner.command(epilog="Example: qatscale plan checkpoint --trained-tokens 60B --params 396M --bits 2")
def checkpoint(
    ctx: typer.Context,
    run: Annotated[str | None, typer.Argument(metavar="RUN", help="Folder of a run, RUN@STEP or a checkpoint.")] = None,
    trained_tokens: Annotated[float | None, options.TRAINED_TOKENS] = None,
    params: Annotated[float | None, options.PARAMS] = None,
    bits: Annotated[float | None, options.BITS] = None,
    law: Annotated[str | None, options.LAW] = None,
    as_json: Json = False,
) -> None:
    """How many QAT tokens does a full-precision checkpoint deserve, and what do they buy?"""
    from qatlaw.plan.answer import Answer, columns
    from qatlaw.plan.checkpoint import plan_checkpoint
    from qatlaw.plan.run_folder import read_trained
    from qatlaw.plan.shapes import usual_effective_bits
    from qatlaw.planner_law import plan_law

    for flag, value in (("--trained-tokens", trained_tokens), ("--params", params)):
        if run is None and value is None:
            raise InputError(flag, None, "is missing.", "Add it, or name a RUN.")
        if run is not None and value is not None:
            raise InputError(flag, value, "is read from RUN.", "Leave it out.")
    trained, basis = read_trained(run) if run else None, plan_law(law, usual_effective_bits())
    N, D = (trained.params, trained.tokens) if trained else (params or 0.0, trained_tokens or 0.0)
    plans = [plan_checkpoint(N, width, D, law=basis) for width in ([bits] if bits else basis.widths)]
    plans = [plan.whole_steps(trained.tokens_per_step) for plan in plans] if trained else plans
    one = plans[0] if len(plans) == 1 else None
    table = columns(plans, "bits tokens_qat fraction loss")
    notes = ["With the deserved QAT tokens, the tokens so far are the optimal full-precision share of all tokens."]
    if one:
        table = columns(one.purchases, "multiple tokens_qat fraction loss slope")
        notes.insert(0, f"It deserves {amount(one.tokens_qat, 4)} QAT tokens, {one.fraction:.1%} of the run.")
    warnings = list(trained.warnings) if trained else []
    warnings += [f"{bits_label(plan.bits)}: {warning}" for plan in plans for warning in plan.warnings]
    title = f"{_run(N, D)} in full precision"
    overrides: tuple[str, ...] | None = None
    if one and trained:
        overrides = (*one.overrides(trained.tokens_per_step), *trained.overrides(one.tokens, one.tokens_qat))
    elif one:
        overrides = (*one.overrides(), "qat.scheme=sequential")
    command = ("qatscale", "branch", trained.checkpoint if trained else "RUN", "name=NAME")
    answer = Answer("checkpoint", title, table, one or plans, basis, notes, warnings, overrides, N, command)
    _show(ctx, as_json, answer)


@planner.command(
    epilog="Example: qatscale plan waste --params 396M --tokens 100B --bits 4 --fraction 0.1 --law synthetic"
)
def waste(
    ctx: typer.Context,
    params: Annotated[float, options.PARAMS],
    tokens: Annotated[float, options.TOKENS],
    bits: Annotated[float, options.BITS],
    fraction: Annotated[float, options.FRACTION],
    law: Annotated[str, options.LAW],
    as_json: Json = False,
) -> None:
    """What share of the tokens does a QAT fraction waste, against the optimal one?"""
    from qatlaw.plan.answer import Answer, columns
    from qatlaw.plan.run import Recipe, judge_split, plan_run
    from qatlaw.plan.shapes import usual_effective_bits
    from qatlaw.plan.waste import WASTED
    from qatlaw.planner_law import load_law

    loss_law = load_law(law, effective=usual_effective_bits())
    best = plan_run(Recipe(params, tokens), bits, loss_law)
    splits = [judge_split(loss_law, params, tokens, bits, each) for each in (fraction, best.optimum)]
    table = columns(splits, "fraction loss wasted", best=splits[1])
    notes = ["* the optimal QAT fraction.", f"Losses in nats per token; {WASTED}."]
    answer = Answer("waste", _run(params, tokens, bits), table, splits[0], loss_law, notes, best.warnings)
    _show(ctx, as_json, answer)


@planner.command(
    epilog="Example: qatscale plan fusion --params 396M --tokens 100B --bits 4 --fused-loss 2.31 "
    "--sequential-loss 2.32 --law synthetic"
)
def fusion(
    ctx: typer.Context,
    params: Annotated[float, options.PARAMS],
    tokens: Annotated[float, options.TOKENS],
    bits: Annotated[float, options.BITS],
    fused_loss: Annotated[float, options.FUSED_LOSS],
    sequential_loss: Annotated[float, options.SEQUENTIAL_LOSS],
    law: Annotated[str, options.LAW],
    as_json: Json = False,
) -> None:
    """What share of the tokens did fusing QAT with the cooldown save, by two measured losses?"""
    from qatlaw.plan.answer import Answer, facts
    from qatlaw.plan.run import warnings_of
    from qatlaw.plan.shapes import usual_effective_bits
    from qatlaw.plan.waste import SAVED, fusion_saving
    from qatlaw.planner_law import load_law

    loss_law = load_law(law, effective=usual_effective_bits())
    loss_law.check_bits(bits)
    saving = fusion_saving(loss_law.law, params, tokens, bits, fused_loss, sequential_loss)
    table = {
        "fused loss less sequential loss": f"{fused_loss - sequential_loss:+.4f}",
        "tokens the sequential scheme would need": amount(saving.sequential_tokens, 4),
        "saved by fusion": f"{saving.saved:+.1%}",
    }
    notes, warnings = [f"In this table, {SAVED}."], warnings_of(params, tokens, bits, loss_law)
    answer = Answer("fusion", _run(params, tokens, bits), facts(table), saving, loss_law, notes, warnings)
    _show(ctx, as_json, answer)


def _known(
    ctx: typer.Context, recipe: str | None, params: float | None, tokens: float | None = None,
    batch_tokens: float | None = None, group_size: int | None = None,
) -> Recipe:  # fmt: skip
    from qatlaw.plan.run import Recipe
    from qatlaw.plan.shapes import check_group_size, nearest_shape

    if batch_tokens and tokens and batch_tokens > tokens:
        raise InputError("--batch-tokens", batch_tokens, f"is more than all {amount(tokens)} tokens.")
    if recipe is None:
        shape = nearest_shape(params) if params else None
        per_step = None if batch_tokens is None else round(batch_tokens)
        known = Recipe(params, tokens, group=group_size, group_size=group_size, tokens_per_step=per_step)
        if params is None or shape is None:
            return known
        check_group_size(group_size)

        def stored_bytes(bits: float) -> float:
            return float(shape.weights(bits, group_size).effective_bits) * params / 8

        return replace(known, stored_bytes=stored_bytes, model=f"a usual shape of that size ({shape})")
    for flag, value in (("--params", params), ("--batch-tokens", batch_tokens)):
        if value is not None:
            raise InputError(flag, value, "contradicts --recipe, which has its own.", "Leave one of them out.")
    known = _stack(ctx, "--recipe", recipe).recipe(recipe, group_size)
    return replace(known, tokens=tokens or known.tokens, group_size=group_size)


def _counted_on(known: Recipe) -> list[str]:
    if known.stored_bytes is None:
        return []
    return [f"Effective bits are those stored. They count scales, embedding and norms: of {known.model}."]


def _stack(ctx: typer.Context, flag: str, value: str) -> Any:
    if ctx.obj is None:
        raise InputError(flag, value, "needs `qatscale plan`.", "Or give --params, and --peak-flops.")
    return ctx.obj


def _show(ctx: typer.Context, as_json: bool, answer: Answer, recipe: str | None = None) -> None:
    if ctx.obj is not None:
        answer = ctx.obj.runnable(answer, recipe)
    print(json.dumps(answer.to_dict(), indent=2, allow_nan=False) if as_json else answer.text())


def _judged(split: Split | None) -> str | None:
    return None if split is None else f"{split.loss:.4f}, {split.wasted:.2%} of the tokens wasted"


def _interval(interval: Interval | None, form: str, level: float | None) -> str:
    if interval is None:
        return ""
    return f" ({interval[0]:{form}} to {interval[1]:{form}} in {level:.0%} of resampled fits)"


def _run(params: float, tokens: float, bits: float | None = None) -> str:
    width = "" if bits is None else f", {bits_label(bits)}"
    return f"{amount(params, 4)} parameters, {amount(tokens, 4)} tokens{width}"
