"""What is known before anything runs: the plan, the keys of a recipe, the recipes, a timeline."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qatscale.config.schema import RunConfig
from qatscale.errors import UserError


def print_plan(params: str, tokens: str, bits: float, as_json: bool) -> None:
    import qatlaw
    from qatscale.config.amounts import format_amount, parse_amount

    amounts = {}
    for key, text in (("params", params), ("tokens", tokens)):
        try:
            amounts[key] = parse_amount(text)
        except ValueError as error:
            raise UserError(f"--{key}", text, f"{error}.") from None
    try:
        found = qatlaw.plan_fraction(amounts["params"], amounts["tokens"], bits)
    except ValueError as error:
        raise UserError("plan", None, f"{error}.") from None
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    table = Table(title=f"{params} parameters, {tokens} tokens, {bits:g} bits", title_justify="left")
    table.add_column("quantity")
    table.add_column("value", justify="right")
    table.add_row("tokens per parameter byte", f"{found.S:,.4g}")
    table.add_row("optimal QAT fraction (closed form)", f"{found.fraction:.1%}")
    table.add_row("tokens in full precision", format_amount(found.tokens_fp))
    table.add_row("tokens in QAT", format_amount(found.tokens_qat))
    console = Console()
    console.print(table)
    for warning in found.warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False)
    console.print(f"As overrides of a recipe: {' '.join(found.overrides)}", highlight=False, soft_wrap=True)


def print_keys(prefix: str) -> None:
    from qatscale.config import explain

    table = Table("key", "allowed", "default", "meaning")
    for row in explain(prefix):
        table.add_row(row.key, row.allowed, row.default, row.meaning)
    Console().print(table)


def print_recipes() -> None:
    from qatscale.config import load_run_config, recipe_names
    from qatscale.config.amounts import format_amount
    from qatscale.model.sizes import count_parameters

    table = Table("recipe", "parameters", "width", "layers", "sequence", "batch (tokens)", "tokens", "ds_config")
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
    Console().print(table)


def print_timeline(config: RunConfig, figure: Path | None) -> None:
    from qatscale.config.amounts import format_amount
    from qatscale.timeline import COLUMNS, build_timeline, describe, draw

    timeline = build_timeline(config)
    table = Table(
        *COLUMNS,
        title=f"{config.name}: {config.qat.scheme}, {format_amount(timeline.tokens)} tokens in {timeline.steps:,} steps "
        f"of {format_amount(timeline.tokens_per_step)}",
        title_justify="left",
    )
    for row in describe(timeline, config):
        table.add_row(*row.cells())
    console = Console()
    console.print(table)
    if timeline.switch_step is not None:
        tokens = format_amount(timeline.switch_step * timeline.tokens_per_step)
        share = f"{timeline.qat_fraction:.2%} of the tokens at {config.qat.bits:g} bits"
        console.print(f"switch to QAT before step {timeline.switch_step:,} ({tokens} tokens): {share}", highlight=False)
    for warning in timeline.warnings:
        console.print(f"warning: {warning}", style="yellow", highlight=False)
    if figure is not None:
        console.print(f"figure: {draw(timeline, config, figure)}", highlight=False)
