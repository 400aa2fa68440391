"""`qatscale config` and `recipes`: the keys of a recipe, and the recipes."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Annotated

import typer

from qatlaw.files import write_atomic
from qatlaw.text_table import TextTable
from qatscale.cli import completion
from qatscale.cli.terminal import Overrides, console
from qatscale.errors import UserError, nearest

if TYPE_CHECKING:
    from qatscale.config.schema import RunConfig


def config(
    what: Annotated[
        str,
        typer.Argument(
            metavar="KEY|RECIPE",
            help="A section or key (qat, qat.bits), or a recipe: name or file.",
            autocompletion=completion.recipe_or_key,
        ),
    ] = "",
    overrides: Overrides = None,
    json_schema: Annotated[bool, typer.Option("--json-schema", help="Print the JSON schema of a recipe.")] = False,
    ds_config: Annotated[
        Path | None,
        typer.Option(help="Write the recipe's ds_config into this file, corrected as DeepSpeed receives it."),
    ] = None,
) -> None:
    """Print every key of a recipe with its type, default and meaning; for a recipe its keys and values, as YAML.

    `qatscale config quickstart > mine.yaml` writes a recipe to edit. With --ds-config it lists the keys that are
    dropped from a ds_config written for another program.
    """
    from qatscale.config.recipe import load_run_config, recipe_names, resolved_yaml
    from qatscale.config.schema import RunConfig
    from qatscale.config.settings import explain
    from qatscale.files import is_file

    if json_schema:
        print(json.dumps(RunConfig.model_json_schema(), indent=2))
        return
    if ds_config is not None:
        _write_corrected(load_run_config(what, overrides or ()), ds_config)
        return
    if overrides or what in recipe_names() or is_file(Path(what)):
        print(resolved_yaml(load_run_config(what, overrides or ())), end="")
        return
    try:
        rows = explain(what)
    except UserError:
        if recipe := nearest(what, recipe_names()):
            problem = "no key, recipe or file of this name."
            raise UserError("recipe", what, problem, f"Did you mean {recipe!r}?") from None
        raise
    width, indent = console().width, " " * 4
    for row in rows:
        default = "required" if row.default == "required" else f"default: {row.default}"
        print(fill(f"{row.key}: {row.allowed} [{default}]", width, subsequent_indent=indent, break_on_hyphens=False))
        print(fill(row.meaning, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False))


def _write_corrected(recipe: RunConfig, file: Path) -> None:
    from qatscale.config.ds_config import corrected_ds_config

    if file.exists():
        raise UserError("--ds-config", str(file), "exists already.", "Name a new file.")
    corrected, lost = corrected_ds_config(recipe)
    write_atomic(file, f"{json.dumps(corrected, indent=2)}\n".encode())
    lost.insert(0, f"{file}: {recipe.engine.ds_config} {'without' if lost else 'complete'}")
    print("\n  ".join(lost))


def recipes() -> None:
    """List the recipes that come with qatscale."""
    from qatscale.config.amounts import format_amount
    from qatscale.config.recipe import load_run_config, recipe_names
    from qatscale.config.sizes import count_parameters

    headers = ("recipe", "parameters", "width", "layers", "sequence", "batch (tokens)", "tokens", "ds_config")
    table = TextTable(headers, words=("recipe", "ds_config"), drop=("layers", "width", "ds_config", "sequence"))
    configs = {name: load_run_config(name) for name in recipe_names()}
    sizes = {name: count_parameters(config.model) for name, config in configs.items()}
    for name in sorted(configs, key=lambda name: sizes[name]):
        config, model = configs[name], configs[name].model
        table.add_row(
            name, format_amount(sizes[name]), f"{model.hidden_size}", f"{model.layers}",
            f"{config.data.sequence_length}", format_amount(config.tokens_per_step), format_amount(config.tokens),
            config.engine.ds_config,
        )  # fmt: skip
    console().print(table)
