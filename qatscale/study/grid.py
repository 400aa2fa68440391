"""From a study file to its runs, and to what the tree of runs needs to know of each.

The tree and its meaning are `qatlaw.study`'s; what a run prescribes at each step is its timeline's. So two runs share a
trunk exactly as long as `schedule.timeline.first_difference` finds none: a warm-up that is a share of the tokens, and
not a number of them, parts runs of different length at the first step.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from qatlaw.study import Piece, Route
from qatscale.config import RunConfig, load_run_config
from qatscale.config.amounts import format_amount, parse_amount
from qatscale.config.sizes import count_parameters, flops_per_token
from qatscale.config.yaml_text import to_yaml
from qatscale.errors import UserError
from qatscale.schedule.build import build_timeline
from qatscale.schedule.timeline import Segment, Timeline
from qatscale.study.file import TWO_PHASES, Axes, Size, Study


@dataclass(frozen=True)
class StudyRun:
    """One run of the grid."""

    config: RunConfig
    timeline: Timeline
    route: Route
    recipe: str
    overrides: tuple[str, ...]
    """They make `config` of the recipe."""
    processes: int


@dataclass(frozen=True)
class Grid:
    runs: tuple[StudyRun, ...]
    left_out: tuple[tuple[str, str], ...]
    """(run, why its schedule does not fit)."""
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Cell:
    """One combination of the axes."""

    size: Size
    tokens: int
    scheme: str
    bits: float | None
    """None for full precision."""
    fraction: float
    seed: int
    varied: tuple[tuple[str, Any], ...]
    ptq_bits: tuple[float, ...]
    """The widths at which a full-precision run is evaluated after training."""

    @property
    def name(self) -> str:
        """Of the run: whatever an axis gives, so that a study that grows keeps its names."""
        parts = [self.size.name, _exact_amount(self.tokens), self.scheme]
        if self.bits is not None:
            parts.append(f"{self.bits:g}bit")
        if self.scheme in TWO_PHASES:
            parts.append(f"f{self.fraction!r}")
        parts += [re.sub(r"[^A-Za-z0-9._=+-]+", "_", f"{key}={_plain(value)}") for key, value in self.varied]
        if self.seed:
            parts.append(f"seed{self.seed}")
        return "-".join(parts)

    @property
    def overrides(self) -> tuple[str, ...]:
        own = [f"name={self.name}", f"tokens={self.tokens}", f"seed={self.seed}", f"data.seed={self.seed}"]
        own.append(f"qat.scheme={self.scheme}")
        if self.bits is None:
            own.append(f"evaluation.ptq_bits=[{', '.join(f'{bits:g}' for bits in self.ptq_bits)}]")
        else:
            own += [f"qat.bits={self.bits:g}", "evaluation.ptq_bits=[]"]
        if self.scheme in TWO_PHASES:
            own.append(f"qat.fraction={self.fraction!r}")
        return (*own, *(f"{key}={_plain(value)}" for key, value in self.varied))


def grid(study: Study) -> Grid:
    """All runs of a study, in the order of its file. UserError where none has a schedule that fits."""
    runs: dict[str, StudyRun] = {}
    left_out: dict[str, str] = {}
    for cell in _cells(study):
        if cell.name in runs or cell.name in left_out:
            continue  # grids may overlap
        overrides = (*study.overrides, *cell.size.overrides, *cell.overrides)
        config = load_run_config(cell.size.recipe, overrides)
        try:
            timeline = build_timeline(config)
        except UserError as problem:
            left_out[cell.name] = str(problem)
            continue
        route = _route(cell.name, config, timeline)
        runs[cell.name] = StudyRun(config, timeline, route, cell.size.recipe, overrides, cell.size.processes)
    if not runs:
        first = next(iter(left_out.values()))
        raise UserError("study", study.name, f"none of its runs has a schedule that fits; the first: {first}")
    return Grid(tuple(runs.values()), tuple(left_out.items()), _warnings(list(runs.values())))


def _cells(study: Study) -> Iterator[_Cell]:
    widths: dict[tuple[Hashable, ...], dict[float, None]] = {}
    for axes in study.grids:  # a full-precision run serves the widths of every grid that it stands in
        for size, tokens, seed in _models(study, axes):
            widths.setdefault((size.name, tokens, seed), {}).update(dict.fromkeys(axes.bits))
    for axes in study.grids:
        for (size, tokens, seed), fraction in itertools.product(_models(study, axes), axes.fractions):
            ptq = tuple(widths[size.name, tokens, seed])
            if fraction == 0:
                for varied in _variations(axes, quantized=False):
                    yield _Cell(size, tokens, "fp", None, 0.0, seed, varied, ptq)
                continue
            schemes = ("scratch",) if fraction == 1 else axes.schemes
            for scheme, bits in itertools.product(schemes, axes.bits):
                for varied in _variations(axes, quantized=True):
                    yield _Cell(size, tokens, scheme, bits, fraction, seed, varied, ptq)


def _models(study: Study, axes: Axes) -> Iterator[tuple[Size, int, int]]:
    for size in axes.sizes:
        params = _parameters(size.recipe, (*study.overrides, *size.overrides))
        budgets = axes.tokens or tuple(round(params * ratio) for ratio in axes.tokens_per_parameter)
        for seed, tokens in itertools.product(axes.seeds, budgets):
            yield size, tokens, seed


@cache
def _parameters(recipe: str, overrides: tuple[str, ...]) -> int:
    return count_parameters(load_run_config(recipe, overrides).model).total


def _variations(axes: Axes, quantized: bool) -> Iterator[tuple[tuple[str, Any], ...]]:
    chosen = [(key, values) for key, values in axes.vary if quantized or not _concerns_qat(key)]
    for values in itertools.product(*(values for _, values in chosen)):
        yield tuple((key, value) for (key, _), value in zip(chosen, values, strict=True))


def _concerns_qat(key: str) -> bool:
    return key.startswith(("qat.", "schedule.phases.qat_"))


def _exact_amount(tokens: int) -> str:
    short = format_amount(tokens)
    return short if parse_amount(short) == tokens else str(tokens)


def _plain(value: Any) -> str:
    """A value as an override writes it."""
    return value if isinstance(value, str) else to_yaml(value).removesuffix("\n...\n").strip()


# --- what the tree knows of a run ---


def _route(name: str, config: RunConfig, timeline: Timeline) -> Route:
    pieces: list[Piece] = []
    for segment in timeline.segments:
        piece = Piece(_rule(segment, config), segment.start, segment.end)
        if pieces and pieces[-1].rule == piece.rule:
            piece = Piece(piece.rule, pieces.pop().start, piece.end)
        pieces.append(piece)
    flops = flops_per_token(config.model, config.data.sequence_length)
    return Route(name, _root(config), tuple(pieces), timeline.tokens_per_step, float(flops))


def _root(config: RunConfig) -> Hashable:
    """Equal for runs in which equal settings of a step give equal training: model, data, batch, seed, precision."""
    optimizer = config.optimizer.model_dump(include={"eps", "gradient_clipping"})
    parts: list[Any] = [config.model.model_dump(mode="json"), config.data.model_dump(mode="json"), optimizer]
    parts += [config.batch.model_dump(), config.seed, config.engine.model_dump(mode="json")]
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
    found = []
    if in_shares and (len(lengths) > 1 or any(run.config.qat.scheme == "sequential" for run in in_shares)):
        sizes = sorted({run.recipe for run in in_shares})
        found.append(
            f"the warm-up of {', '.join(sizes)} is a share of the tokens, so that runs of different length share "
            "nothing; give it in tokens: set schedule.warmup_tokens and schedule.warmup_fraction=null"
        )
    # That a recipe's own settings have no effect under a scheme of the grid is the grid's doing.
    seen = dict.fromkeys(warning for run in runs for warning in run.timeline.warnings if "no effect" not in warning)
    return (*found, *seen)
