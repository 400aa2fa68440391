"""From a study file to its runs, and to what the tree of runs needs to know of each.

The tree and its meaning are `qatlaw.study`'s; what a run prescribes at each step is its timeline's. So two runs share a
trunk exactly as long as `schedule.difference.first_difference` finds none: a warm-up that is a share of the tokens, and
not a number of them, parts runs of different length at the first step.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from qatlaw.study import Piece, Route, trained_by
from qatscale.config.amounts import format_amount, parse_amount
from qatscale.config.recipe import load_run_config
from qatscale.config.schema import RunConfig
from qatscale.config.sizes import count_parameters, flops_per_token
from qatscale.config.yaml_text import value_text
from qatscale.errors import UserError
from qatscale.schedule.build import build_timeline
from qatscale.schedule.timeline import Segment, Timeline
from qatscale.study.file import PLAIN_AXES, Axes, Sets, Size, Study


@dataclass(frozen=True)
class StudyRun:
    config: RunConfig
    timeline: Timeline
    route: Route
    recipe: str
    overrides: tuple[str, ...]
    """They make `config` of the recipe."""
    processes: int
    keep_at: tuple[int, ...]
    """Steps whose checkpoints stay when the study is done."""

    @property
    def params(self) -> int:
        return count_parameters(self.config.model)


@dataclass(frozen=True)
class Grid:
    name: str
    """The study's."""
    runs: tuple[StudyRun, ...]
    left_out: tuple[tuple[str, str], ...]
    """(run, why its schedule does not fit)."""
    repeated: tuple[tuple[str, str], ...]
    """(cell of the grid, the run that is the same training under another name)."""
    warnings: tuple[str, ...]

    def kept(self, begins: Mapping[str, tuple[str | None, int]]) -> dict[str, set[int]]:
        """By run the steps of `keep_at` that it trains itself. begins: see `qatlaw.study.trained_by`."""
        steps: dict[str, set[int]] = {name: set() for name in begins}
        for run in self.runs:
            for step in run.keep_at:
                steps[trained_by(begins, run.route.name, step)].add(step)
        return steps


@dataclass(frozen=True)
class Choice:
    """One value of an axis."""

    label: str
    """In the run's name; "" for a default, so that a study that gets another axis keeps its names."""
    settings: tuple[tuple[str, Any], ...]
    """Recipe keys and their values."""


@dataclass(frozen=True)
class Cell:
    """One combination of the axes."""

    size: Size
    choices: tuple[Choice, ...]
    keep_at: tuple[int, ...]
    """In tokens."""

    @property
    def name(self) -> str:
        return "-".join([self.size.name, *filter(None, (choice.label for choice in self.choices))])

    @property
    def overrides(self) -> tuple[str, ...]:
        settings = [("name", self.name), *(setting for choice in self.choices for setting in choice.settings)]
        return tuple(f"{key}={value_text(value)}" for key, value in settings)


def grid(study: Study) -> Grid:
    """All runs of a study, in the order of its file. UserError where none has a schedule that fits."""
    runs: dict[str, StudyRun] = {}
    left_out: dict[str, str] = {}
    repeated: dict[str, str] = {}
    trained: dict[Hashable, str] = {}
    for cell in _cells(study):
        if cell.name in left_out:
            continue
        if cell.name in runs:  # grids may overlap
            runs[cell.name] = _keeping(runs[cell.name], cell.keep_at)
            continue
        overrides = (*study.set, *cell.size.set, *cell.overrides)
        config = load_run_config(cell.size.recipe, overrides)
        try:
            timeline = build_timeline(config)
        except UserError as problem:
            left_out[cell.name] = str(problem)
            continue
        route = _route(cell.name, config, timeline)
        if (same := trained.setdefault(_training(config, route), cell.name)) != cell.name:
            repeated[cell.name] = same
            runs[same] = _keeping(runs[same], cell.keep_at)
            continue
        run = StudyRun(config, timeline, route, cell.size.recipe, overrides, cell.size.processes, ())
        runs[cell.name] = _keeping(run, cell.keep_at)
    if not runs:
        first = next(iter(left_out.values()))
        raise UserError("study", study.name, f"none of its runs has a schedule that fits; the first: {first}")
    warnings = _warnings(list(runs.values()))
    return Grid(study.name, tuple(runs.values()), tuple(left_out.items()), tuple(repeated.items()), warnings)


def _keeping(run: StudyRun, keep_at: Iterable[int]) -> StudyRun:
    """The run with more checkpoints that stay, as far as it reaches. keep_at: in tokens."""
    steps = {max(1, round(tokens / run.timeline.tokens_per_step)) for tokens in keep_at}
    kept = {step for step in steps if step < run.timeline.steps}  # the final checkpoint stays in any case
    return replace(run, keep_at=tuple(sorted(kept | {*run.keep_at})))


def _cells(study: Study) -> Iterator[Cell]:
    bits: dict[Hashable, dict[float, None]] = {}
    for axes in study.parts:  # a full-precision run serves the bit widths of every grid that it stands in
        for size, *shared in _models(study, axes):
            bits.setdefault((size.name, *shared), {}).update(dict.fromkeys(axes.bits))
    for axes in study.parts:
        for size, tokens, *plain in _models(study, axes):
            for qat in _quantizations(axes, list(bits[size.name, tokens, *plain])):
                for varied in _variations(axes, scheme=qat.label.partition("-")[0]):
                    yield Cell(size, (tokens, qat, *varied, *plain), axes.keep_at)


def _models(study: Study, axes: Axes) -> Iterator[tuple[Any, ...]]:
    """(size, choice of tokens, a choice of each plain axis)"""
    plain = [_choices(axes, name, sets) for name, sets in PLAIN_AXES.items()]
    for size in axes.sizes:
        params = _parameters(size.recipe, (*study.set, *size.set))
        budgets = axes.tokens or tuple(round(params * ratio) for ratio in axes.tokens_per_parameter)
        amounts = [Choice(_exact_amount(tokens), (("tokens", tokens),)) for tokens in budgets]
        for *choices, tokens in itertools.product(*plain, amounts):
            yield size, tokens, *choices


def _choices(axes: Axes, name: str, sets: Sets) -> list[Choice]:
    default = Axes.model_fields[name].default
    choices = [
        Choice("" if value in default else f"{sets.label}{value_text(value)}", tuple((key, value) for key in sets.keys))
        for value in getattr(axes, name)
    ]
    return choices or [Choice("", ())]  # the recipe's own value


@cache
def _parameters(recipe: str, overrides: tuple[str, ...]) -> int:
    return count_parameters(load_run_config(recipe, overrides).model)


def _quantizations(axes: Axes, ptq_bits: list[float]) -> Iterator[Choice]:
    """Full precision, evaluated at `ptq_bits` after training, QAT from scratch, and each scheme of two phases."""
    for fraction in axes.fractions:
        if fraction == 0:
            yield Choice("fp", (("qat.scheme", "fp"), ("evaluation.ptq_bits", ptq_bits)))
            continue
        for scheme, bits in itertools.product(("scratch",) if fraction == 1 else axes.schemes, axes.bits):
            label = f"{scheme}-{bits:g}bit"
            settings: list[tuple[str, Any]] = [("qat.scheme", scheme), ("qat.bits", bits), ("evaluation.ptq_bits", [])]
            if scheme != "scratch":
                label += f"-f{fraction!r}"
                settings.append(("qat.fraction", fraction))
            yield Choice(label, tuple(settings))


_UNUSED = {
    "fp": ("qat.", "schedule.phases.qat_"),
    "fused": ("schedule.phases.cooldown.",),
    "scratch": tuple(f"schedule.phases.{phase}." for phase in ("warmup", "stable", "cooldown")),
}
"""Prefixes of the keys without effect under a scheme."""


def _variations(axes: Axes, scheme: str) -> Iterator[tuple[Choice, ...]]:
    """All combinations of `vary`, without the keys that the scheme does not use."""
    varied = [
        [Choice(re.sub(r"[^A-Za-z0-9._=+-]+", "_", f"{key}={value_text(value)}"), ((key, value),)) for value in values]
        for key, values in axes.vary.items()
        if not key.startswith(_UNUSED.get(scheme, ()))
    ]
    return itertools.product(*varied)


def _exact_amount(tokens: int) -> str:
    short = format_amount(tokens)
    return short if parse_amount(short) == tokens else str(tokens)


# --- what the tree knows of a run ---


def _route(name: str, config: RunConfig, timeline: Timeline) -> Route:
    pieces: list[Piece] = []
    for segment in timeline.segments:
        cooldown_seed = config.data.cooldown_seed if segment.start == timeline.last_cooldown else 0
        piece = Piece((_rule(segment, config), cooldown_seed), segment.start, segment.end)
        if pieces and pieces[-1].rule == piece.rule:
            piece = Piece(piece.rule, pieces.pop().start, piece.end)
        pieces.append(piece)
    flops = flops_per_token(config.model, config.data.sequence_length)
    return Route(name, _root(config), tuple(pieces), timeline.tokens_per_step, float(flops))


def _training(config: RunConfig, route: Route) -> Hashable:
    """Equal for runs that are one training, whatever the keys by which their schedules came to be."""
    return route.pieces, config.model_dump_json(exclude={"name": True, "schedule": True, "optimizer": _IN_ALL_STEPS})


_IN_ALL_STEPS = {"learning_rate", "betas", "weight_decay"}
"""Keys of `optimizer.` whose effect is in the segments."""


def _root(config: RunConfig) -> Hashable:
    """Equal for runs in which equal settings of a step give equal training: model, data, batch, seed, precision."""
    optimizer = config.optimizer.model_dump(include={"eps", "gradient_clipping"})
    data = config.data.model_dump(mode="json", exclude={"cooldown_seed"})
    parts: list[Any] = [config.model.model_dump(mode="json"), data, optimizer]
    parts += [config.batch.model_dump(), config.seed, config.init, config.engine.model_dump(mode="json")]
    return json.dumps(parts, sort_keys=True)


_IN_THE_TIMELINE = {
    "scheme", "fraction", "learning_rate", "lr_ratio", "warmup_fraction", "warmup_tokens", "cooldown_fraction",
}  # fmt: skip
"""Keys of `qat.` whose effect is in the segments themselves."""


def _rule(segment: Segment, config: RunConfig) -> Hashable:
    """Equal for segments that prescribe the same at the same step: a stable rate wherever it starts and ends, a warm-up
    or cooldown only from and to the same step. Before the switch no setting of QAT matters."""
    quantized = None
    if segment.quantized:
        quantized = json.dumps(config.qat.model_dump(exclude=_IN_THE_TIMELINE), sort_keys=True)
    settings = (segment.peak, segment.betas, segment.weight_decay, quantized)
    if segment.kind == "stable":
        return ("stable", *settings)
    shape = segment.cooldown if segment.kind == "cooldown" else None
    return (segment.kind, segment.start, segment.end, shape, *settings)


def _warnings(runs: Sequence[StudyRun]) -> tuple[str, ...]:
    lengths = {run.config.tokens for run in runs}
    in_shares = [run for run in runs if run.config.schedule.warmup_tokens is None]
    warnings = []
    if in_shares and (len(lengths) > 1 or any(run.config.qat.scheme == "sequential" for run in in_shares)):
        sizes = sorted({run.recipe for run in in_shares})
        warnings.append(
            f"the warm-up of {', '.join(sizes)} is a share of the tokens, so that runs of different length share "
            "nothing; give it in tokens: set schedule.warmup_tokens and schedule.warmup_fraction=null"
        )
    # A setting of the recipe without effect under one scheme has an effect under another.
    seen = dict.fromkeys(warning for run in runs for warning in run.timeline.warnings if "no effect" not in warning)
    return (*warnings, *seen)
