"""What is known before anything runs: the keys of a recipe, the recipes, a timeline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from qatlaw.bit_widths import BIT_WIDTHS, BIT_WIDTHS_TEXT
from qatscale.cli.terminal import check_figure, console, plain_table
from qatscale.config.schema import RunConfig
from qatscale.errors import UserError, nearest
from qatscale.files import is_file


def check_bits(key: str, bits: float) -> None:
    if bits not in BIT_WIDTHS:
        shown = int(bits) if bits.is_integer() else bits
        raise UserError(key, shown, f"must be one of {BIT_WIDTHS_TEXT}.")


def print_config(what: str, overrides: Sequence[str]) -> None:
    """The keys under a dotted prefix with their meanings, or the values of a recipe as YAML."""
    from qatscale.config import explain, load_run_config, recipe_names, resolved_yaml

    if overrides or what in recipe_names() or is_file(Path(what)):
        print(resolved_yaml(load_run_config(what, overrides)), end="")
        return
    table = plain_table("key", "allowed", "default", "meaning")
    try:
        rows = explain(what)
    except UserError:
        if recipe := nearest(what, recipe_names()):
            problem = "no key, recipe or file of this name."
            raise UserError("recipe", what, problem, f"Did you mean {recipe!r}?") from None
        raise
    for row in rows:
        table.add_row(row.key, row.allowed, row.default, row.meaning)
    console().print(table)


def print_json_schema() -> None:
    print(json.dumps(RunConfig.model_json_schema(), indent=2))


def print_recipes() -> None:
    from qatscale.config import load_run_config, recipe_names
    from qatscale.config.amounts import format_amount
    from qatscale.config.sizes import count_parameters

    numbers = ("parameters", "width", "layers", "sequence", "batch (tokens)", "tokens")
    table = plain_table("recipe", *numbers, "ds_config", right=numbers)
    rows = []
    for name in recipe_names():
        config = load_run_config(name)
        model = config.model
        cells = (
            name,
            format_amount(count_parameters(model).total),
            f"{model.hidden_size}",
            f"{model.layers}",
            f"{config.data.sequence_length}",
            format_amount(config.tokens_per_step),
            format_amount(config.tokens),
            config.engine.ds_config,
        )
        rows.append((count_parameters(model).total, cells))
    for _, cells in sorted(rows):
        table.add_row(*cells)
    console().print(table)


def print_timeline(config: RunConfig, figure: Path | None) -> None:
    from qatscale.config.amounts import format_amount
    from qatscale.config.ds_config import ds_config_warnings
    from qatscale.schedule.build import build_timeline
    from qatscale.schedule.show import COLUMNS, describe

    check_figure(figure)
    timeline = build_timeline(config)
    size = f"{format_amount(timeline.tokens)} tokens in {timeline.steps:,} steps of {timeline.tokens_per_step:,}"
    out, rows = console(), [COLUMNS, *describe(timeline, config)]
    shown = list(COLUMNS)
    for column in ("steps", "tokens", "decay", "betas"):  # the first to go where a terminal is narrow
        widths = [max(len(row[COLUMNS.index(name)]) for row in rows) for name in shown]
        if sum(widths) + 2 * len(widths) + 2 > out.width:
            shown.remove(column)
    table = plain_table(*shown, right=tuple(shown[1:]), title=f"{config.name}: {config.qat.scheme}, {size}")
    for row in rows[1:]:
        table.add_row(*(row[COLUMNS.index(name)] for name in shown))
    out.print(table)
    if timeline.switch_step is not None:
        tokens = format_amount(timeline.switch_step * timeline.tokens_per_step)
        share = f"{timeline.qat_fraction:.2%} of the tokens at {config.qat.bits:g} bits"
        out.print(f"switch to QAT before step {timeline.switch_step:,} ({tokens} tokens): {share}")
        rate = f"{timeline.qat_lr_ratio:.4g} x optimizer.learning_rate={config.optimizer.learning_rate:g}"
        out.print(f"peak rate of the QAT phase: {rate}")
    for warning in (*timeline.warnings, *ds_config_warnings(config)):
        out.print(f"warning: {warning}", style="yellow", soft_wrap=not out.is_terminal)
    if figure is not None:
        from qatscale.schedule.figure import draw

        out.print(f"figure: {draw(timeline, config, figure)}", soft_wrap=True)
