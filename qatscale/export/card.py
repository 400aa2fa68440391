"""The model card: README.md of an export, from its export.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from qatscale.config import resolved_yaml
from qatscale.config.amounts import format_amount
from qatscale.config.schema import RunConfig
from qatscale.export.clients import install_line
from qatscale.export.formats.base import Format

TEMPLATE = "card.md.jinja"


def card(described: dict[str, Any], format: Format, config: RunConfig, has_tokenizer: bool) -> str:
    """described: the content of export.json."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"amount": format_amount, "install": install_line, "count": "{:,.0f}".format}
    return environment.get_template(TEMPLATE).render(
        described,
        title=_title(described),
        library=format.library,
        usages=format.usages(has_tokenizer),
        has_tokenizer=has_tokenizer,
        recipe=_recipe(config),
    )


def _title(described: dict[str, Any]) -> str:
    if described["view"] == "fp":
        return "full precision"
    trained = "quantized after training" if described["view"].startswith("ptq") else "quantization-aware trained"
    bits = described["bits"]
    return f"{bits:g} {'bit' if bits == 1 else 'bits'}, {trained}"


def _recipe(config: RunConfig) -> str:
    """The resolved recipe without paths of the machine that trained it."""
    content = yaml.safe_load(resolved_yaml(config))
    del content["output"], content["data"]["path"], content["tracking"]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
