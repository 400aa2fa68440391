"""From a request to its answer: which plan answers it, and how that reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from qatlaw.default import SYNTHETIC_WARNING
from qatlaw.errors import LawError
from qatlaw.fraction import amount
from qatlaw.plan.answer import Answer, Table
from qatlaw.plan.budget import Budget, BudgetPlan, BudgetSplit, best_size, plan_budget
from qatlaw.plan.checkpoint import CheckpointPlan, plan_checkpoint
from qatlaw.plan.memory import plan_memory
from qatlaw.plan.request import Question, Request, budget_of, cost_rule, overhead_known, question_of
from qatlaw.plan.run import SEQUENTIAL, RunPlan, Split, plan_run, warnings_of
from qatlaw.plan.run_folder import Trained
from qatlaw.plan.shapes import DEEP, EMBEDDING_LEAST_BITS, SHALLOW, UNQUANTIZED_BITS, VOCABULARY
from qatlaw.plan.waste import SAVED, WASTED, fusion_saving
from qatlaw.plan.widths import TOLERANCE, compare_widths

GET_A_LAW = (
    "{what} need a loss law fitted on runs, and none was given. Fit one with `qatscale fit`, then give its file: "
    "--law fit.json. (--law synthetic shows what the answer looks like, on made-up numbers.)"
)
NONE = "–"
FUSED_COOLDOWN = 0.2
"""Of all tokens, as is the default of a recipe; less where the QAT phase is shorter."""


def answer(request: Request) -> Answer:
    """LawError where the options ask nothing that can be answered."""
    found = _ANSWERS[question_of(request)](request)
    if not found.overrides and len(request.widths) > 1:
        found = replace(found, notes=(*found.notes, "Give --bits for the overrides that run one of these."))
    if request.law is not None and request.law.synthetic:
        return replace(found, warnings=(SYNTHETIC_WARNING, *found.warnings))
    return found


def _run(request: Request) -> Answer:
    params, tokens, bits = _given(request.params), _given(request.tokens), _given(request.bits)
    plan = plan_run(
        params,
        tokens,
        bits,
        law=request.law,
        tokens_per_step=_whole(request.batch_tokens),
        fraction=request.fraction,
        scheme=request.scheme or SEQUENTIAL,
    )
    rows = [("tokens per parameter byte", f"{plan.S:,.4g}")]
    if plan.closed_form is not None:
        rows.append(("optimal QAT fraction (closed form)", f"{plan.closed_form:.1%}"))
    if request.law:
        rows.append(("optimal QAT fraction (loss law)", f"{plan.optimum:.1%}" + _interval(plan, "fraction", "{:.1%}")))
    if plan.fraction != plan.optimum:
        rows.append(("planned QAT fraction", f"{plan.fraction:.1%}"))
    rows += [("tokens in full precision", _tokens(plan.tokens_fp)), ("tokens in QAT", _tokens(plan.tokens_qat))]
    if plan.switch_step is not None:
        rows.append(("switch to QAT before step", f"{plan.switch_step:,} of {plan.steps:,}"))
    notes: tuple[str, ...] = ()
    if found := plan.prediction:
        rows += [
            ("predicted loss", _loss(found.loss) + _interval(plan, "loss", "{:.4f}")),
            ("predicted loss in full precision", _loss(found.full_precision_loss)),
            *_split_rows("the closed form's fraction", found.closed_form),
            *_split_rows("QAT on 10 % of the tokens", found.rule),
            *_split_rows(f"QAT on {found.asked.fraction:.4g} of them" if found.asked else "", found.asked),
        ]
        notes = (f"Losses in nats per token. {_sentence(WASTED)}",)
    return Answer(
        question="run",
        title=f"{_tokens(params)} parameters, {_tokens(tokens)} tokens, {bits:g} bits",
        table=Table(("quantity", "value"), tuple(rows)),
        plan=plan,
        law=request.law,
        params=plan.params,
        notes=notes,
        missing=_missing(request, "The predicted loss and the tokens that the 10 % rule wastes"),
        warnings=tuple(dict.fromkeys((*plan.warnings, *warnings_of(params, tokens, bits, None)))),
        overrides=plan.overrides,
    )


def _memory(request: Request) -> Answer:
    memory, tokens = _given(request.memory), _given(request.tokens)
    vocabulary = _whole(request.vocab_size) or VOCABULARY
    plan = plan_memory(memory, tokens, request.widths, law=request.law, vocabulary=vocabulary)
    rows = tuple(
        (
            f"{row.bits:g}" + (" *" if index == plan.best else ""),
            _tokens(row.plan.params),
            f"{row.shape.width} x {row.shape.layers}",
            f"{row.bytes / 1e6:,.4g}",
            f"{row.plan.S:,.4g}",
            f"{row.plan.fraction:.1%}",
            f"{row.flops:.3g}",
            *_predicted(row.plan),
        )
        for index, row in enumerate(plan.rows)
    )
    headers = ("bits", "parameters", "width x layers", "MB", "tokens/byte", "QAT fraction", "training FLOPs")
    best = None if plan.best is None else plan.rows[plan.best]
    notes = [
        f"The {'best' if request.law else 'largest'} Llama-style shapes (tied embedding of {vocabulary:,} pieces, "
        f"width {DEEP} to {SHALLOW} times the depth) whose weights fit: blocks at B bits, embedding at "
        f"max({EMBEDDING_LEAST_BITS}, B), norms and one scale a row at {UNQUANTIZED_BITS}. No activations, no "
        "key-value cache."
    ]
    small = [f"{row.bits:g}" for row in plan.rows if row.shape != row.largest]
    if small:
        notes.append(
            f"At {', '.join(small)} bits a larger model fits and would be worse: it has too few tokens per byte."
        )
    if best and request.law:
        notes.append(f"* the lowest predicted loss: {_tokens(best.plan.params)} parameters at {best.bits:g} bits.")
    return Answer(
        question="memory",
        title=f"{memory / 1e6:,.4g} MB of weights, {_tokens(tokens)} tokens",
        table=Table((*headers, *_loss_header(request)), rows),
        plan=plan,
        law=request.law,
        params=best.plan.params if best else 0.0,
        notes=tuple(notes),
        missing=_missing(request, "The predicted losses, and so the best of these,"),
        warnings=plan.warnings,
        overrides=(*best.plan.overrides, *best.shape.overrides) if best else (),
    )


def _compare(request: Request) -> Answer:
    params, tokens, tolerance = _given(request.params), _given(request.tokens), request.tolerance or TOLERANCE
    plan = compare_widths(
        params,
        tokens,
        request.widths,
        law=request.law,
        tolerance=tolerance,
        tokens_per_step=_whole(request.batch_tokens),
        scheme=request.scheme or SEQUENTIAL,
    )
    predicted = request.law is not None
    rows = [
        (
            f"{row.bits:g}" + (" *" if index == plan.smallest else ""),
            f"{row.S:,.4g}",
            f"{row.plan.fraction:.1%}",
            _tokens(row.plan.tokens_qat),
            *_predicted(row.plan),
            *([] if row.gap is None else [f"{row.gap:+.4f}"]),
        )
        for index, row in enumerate(plan.rows)
    ]
    if plan.full_precision_loss is not None:
        rows.append(("fp", NONE, "0.0%", "0", _loss(plan.full_precision_loss), f"{0:+.4f}"))
    headers = ("bits", "tokens/byte", "QAT fraction", "QAT tokens", *_loss_header(request))
    notes: tuple[str, ...] = ()
    chosen = None if plan.smallest is None else plan.rows[plan.smallest]
    if predicted:
        share = math.expm1(tolerance)
        told = f"within {tolerance:g} nats ({share:.2%} of the perplexity) of full precision"
        notes = (f"* the smallest width {told}." if chosen else f"No width of these is {told}.",)
    elif len(plan.rows) == 1:
        chosen = plan.rows[0]
    return Answer(
        question="compare",
        title=f"{_tokens(params)} parameters, {_tokens(tokens)} tokens: QAT against full precision",
        table=Table((*headers, "over full precision") if predicted else headers, tuple(rows)),
        plan=plan,
        law=request.law,
        params=plan.params,
        notes=notes,
        missing=_missing(request, "The losses, their distance from full precision and the smallest width good enough"),
        warnings=plan.warnings,
        overrides=chosen.plan.overrides if chosen else (),
    )


def _budget(request: Request) -> Answer:
    plans = [_budget_plan(request, bits) for bits in request.widths]
    scored = [(plan.chosen.loss, plan) for plan in plans if plan.chosen.loss is not None]
    best = min(scored, key=lambda pair: pair[0])[1] if scored else plans[0] if len(plans) == 1 else None
    rows: list[tuple[str, ...]] = []
    ways: list[tuple[str, Callable[[BudgetPlan], BudgetSplit | None]]] = [
        ("compute-optimal", lambda plan: plan.compute_optimal),
        ("token-optimal", lambda plan: plan.token_optimal),
        ("closed form", lambda plan: plan.closed_form),
        ("planned", lambda plan: None if plan.chosen in (plan.compute_optimal, plan.closed_form) else plan.chosen),
    ]
    for plan in plans:
        size = (_tokens(plan.params),) if plan.best_size else ()
        for name, way in ways:
            split = way(plan)
            if split and (len(plans) == 1 or split is plan.chosen):
                loss = () if split.loss is None else (_loss(split.loss),)
                mark = " *" if len(plans) > 1 and plan is best else ""
                cells = f"{split.fraction:.1%}", _tokens(split.tokens), _tokens(split.tokens_qat), *loss
                rows.append((f"{plan.bits:g}{mark}", *size, name, *cells))
    budget = plans[0].budget
    size = ("parameters",) if plans[0].best_size else ()
    headers = ("bits", *size, "split", "QAT fraction", "tokens", "QAT tokens", *_loss_header(request))
    notes = [f"A QAT token costs {budget.overhead:.4g} times what a full-precision token costs."]
    if request.flops_per_token is None and request.tokens_per_second_fp is None:
        notes.append("A full-precision token is counted as 6 FLOPs per parameter, without the attention scores.")
    if request.law and len(plans) > 1:
        notes.append("* the lowest predicted loss.")
    warnings = [warning for plan in plans for warning in plan.warnings]
    if len(plans) == 1 and plans[0].closed_form:
        warnings += warnings_of(plans[0].params, plans[0].closed_form.tokens, plans[0].bits, None)
    if not overhead_known(request):
        warnings.append(
            "a QAT token was taken to cost as much as a full-precision one: measure both phases "
            "(tokens_per_second_fp and _qat of a run) and give --qat-overhead"
        )
    who = "the best size" if plans[0].best_size else f"{_tokens(plans[0].params)} parameters"
    return Answer(
        question="budget",
        title=f"{budget.amount:g} {budget.unit}, {who}",
        table=Table(headers, tuple(rows)),
        plan=plans[0] if len(plans) == 1 else plans,
        law=request.law,
        params=(best or plans[0]).params,
        notes=tuple(notes),
        missing=_missing(request, "The compute-optimal fraction and the losses"),
        warnings=tuple(dict.fromkeys(warnings)),
        overrides=best.overrides if best else (),
    )


def _budget_plan(request: Request, bits: float) -> BudgetPlan:
    if request.params is not None:
        scheme = request.scheme or SEQUENTIAL
        return plan_budget(request.params, bits, budget_of(request, request.params), law=request.law, scheme=scheme)
    amount_, unit, fp, qat, scales = cost_rule(request)
    if request.law is None or not scales:
        why = "measured tokens per second belong to one size." if not scales else "is needed."
        do = "Add --params 396M" + (", or --law fit.json to have the best size chosen." if scales else ".")
        raise LawError("--params", None, why, do)
    request.law.check_bits(bits)
    N = round(best_size(request.law.law, bits, amount_, fp, qat))
    return plan_budget(N, bits, Budget(amount_, unit, fp * N, qat * N), law=request.law, best_size=True)


def _checkpoint(request: Request) -> Answer:
    params, trained = _given(request.params), request.from_checkpoint
    tokens = float(trained.tokens) if trained else _given(request.trained_tokens)
    step = trained.tokens_per_step if trained else _whole(request.batch_tokens)
    plans = [plan_checkpoint(params, bits, tokens, law=request.law) for bits in request.widths]
    if step is not None:
        plans = [plan.whole_steps(step) for plan in plans]
    one = plans[0] if len(plans) == 1 else None
    notes = ["Deserved: with them, the tokens trained so far are the optimal full-precision share of the whole."]
    if one:
        full = "" if one.full_precision_loss is None else f" (in full precision: {_loss(one.full_precision_loss)} nats)"
        notes.insert(0, f"It deserves {_tokens(one.tokens_qat)} QAT tokens, {one.fraction:.1%} of the run{full}.")
    where = trained.checkpoint if trained else "a checkpoint"
    return Answer(
        question="checkpoint",
        title=f"{where}: {_tokens(params)} parameters, {_tokens(tokens)} tokens in full precision",
        table=_purchases(one, request) if one else _deserved(plans, request),
        plan=one or plans,
        law=request.law,
        params=params,
        notes=tuple(notes),
        missing=_missing(request, "The losses, and what each further token buys,"),
        warnings=(*_cooling(trained), *(f"{plan.bits:g} bits: {text}" for plan in plans for text in plan.warnings)),
        command=("qatscale", "branch", trained.checkpoint if trained else "RUN", "name=NAME"),
        overrides=(*one.overrides(step), *_scheme(trained, one)) if one else (),
    )


def _purchases(plan: CheckpointPlan, request: Request) -> Table:
    """What more and more QAT tokens buy, at one width."""
    rows = []
    for p in plan.purchases:
        predicted = () if p.loss is None or p.slope is None else (_loss(p.loss), f"{p.slope:.3g}")
        rows.append((_tokens(p.tokens_qat), f"{p.multiple:g}", f"{p.fraction:.1%}", *predicted))
    slope = ("per further 1B",) if request.law else ()
    return Table(("QAT tokens", "of the deserved", "QAT fraction", *_loss_header(request), *slope), tuple(rows))


def _deserved(plans: Sequence[CheckpointPlan], request: Request) -> Table:
    """What each width deserves."""
    rows = []
    for plan in plans:
        predicted = () if plan.loss is None else (_loss(plan.loss),)
        rows.append((f"{plan.bits:g}", _tokens(plan.tokens_qat), f"{plan.fraction:.1%}", *predicted))
    return Table(("bits", "deserved QAT tokens", "QAT fraction", *_loss_header(request)), tuple(rows))


def _scheme(trained: Trained | None, plan: CheckpointPlan) -> tuple[str, ...]:
    """The scheme that fits the point of the schedule a checkpoint lies at, with the lengths that belong to it."""
    if trained is None or trained.cooled:
        return ("qat.scheme=sequential",)
    # At the stable rate: QAT takes over and holds the one cooldown. The warm-up stays what it was, in tokens.
    step = trained.tokens_per_step
    cooldown = min(round(FUSED_COOLDOWN * plan.tokens / step), plan.tokens_qat // step)
    return (
        "qat.scheme=fused",
        "schedule.warmup_fraction=null",
        f"schedule.warmup_tokens={trained.warmup_steps * step}",
        "schedule.cooldown_fraction=null",
        f"schedule.cooldown_tokens={cooldown * step}",
    )


def _cooling(trained: Trained | None) -> tuple[str, ...]:
    if trained is None or not trained.cooling:
        return ()
    return ("the checkpoint lies inside of its run's cooldown: branch from the stable phase before it, or its end",)


def _fusion(request: Request) -> Answer:
    params, tokens, bits = _given(request.params), _given(request.tokens), _given(request.bits)
    fused, sequential = _given(request.fused_loss), _given(request.sequential_loss)
    assert request.law is not None
    request.law.check_bits(bits)
    saving = fusion_saving(request.law.law, params, tokens, bits, fused, sequential)
    rows = (
        ("fused loss less sequential loss", f"{fused - sequential:+.4f}"),
        ("tokens the sequential scheme would need", _tokens(saving.sequential_tokens)),
        ("saved by fusion", f"{saving.saved:+.1%}"),
    )
    warning = request.law.warning(params, tokens, bits)
    return Answer(
        question="fusion",
        title=f"{_tokens(params)} parameters, {_tokens(tokens)} tokens, {bits:g} bits: fusion",
        table=Table(("quantity", "value"), rows),
        plan=saving,
        law=request.law,
        params=params,
        notes=(_sentence(SAVED),),
        warnings=(warning,) if warning else (),
    )


_ANSWERS: dict[Question, Callable[[Request], Answer]] = {
    "run": _run,
    "memory": _memory,
    "compare": _compare,
    "budget": _budget,
    "checkpoint": _checkpoint,
    "fusion": _fusion,
}


def _given(value: float | None) -> float:
    """What `question_of` has seen to."""
    assert value is not None
    return value


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _missing(request: Request, what: str) -> str | None:
    return None if request.law else GET_A_LAW.format(what=what)


def _loss_header(request: Request) -> tuple[str, ...]:
    return ("predicted loss",) if request.law else ()


def _predicted(plan: RunPlan) -> tuple[str, ...]:
    return (_loss(plan.prediction.loss),) if plan.prediction else ()


def _split_rows(name: str, split: Split | None) -> list[tuple[str, str]]:
    if split is None:
        return []
    return [(f"  {name}", f"{_loss(split.loss)}, {split.wasted:.2%} of the tokens wasted")]


def _interval(plan: RunPlan, of: str, form: str) -> str:
    found = plan.prediction
    interval = getattr(found, f"{of}_interval", None)
    if found is None or interval is None or found.level is None:
        return ""
    return f" ({form.format(interval[0])} to {form.format(interval[1])} in {found.level:.0%} of resampled fits)"


def _tokens(value: float) -> str:
    return amount(value, 4)


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
