"""An answer of the planner: a table of text for people, plain data for programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from operator import attrgetter
from typing import Any

from qatlaw.amounts import amount
from qatlaw.fraction_laws import PAPER, FractionLaw
from qatlaw.laws.named import NamedLaw
from qatlaw.planner_law import SYNTHETIC_WARNING, PlanLaw
from qatlaw.text import terminal_width, wrapped
from qatlaw.text_table import TextTable

TRAIN = ("qatscale", "train", "RECIPE")
NO_LAW = (
    "Losses, and what follows from them, need a loss law fitted on runs: --law fit.json, the file that `qatscale fit` "
    "writes. (--law synthetic shows such an answer, on made-up numbers.)"
)
NO_CHOICE = "With --bits, `qatscale plan` also gives the command that runs one of these."


@dataclass(frozen=True)
class Answer:
    question: str
    title: str
    table: TextTable
    plan: Any
    """The dataclass, or the list of them, that the table shows."""
    law: PlanLaw | NamedLaw
    notes: Sequence[str]
    warnings: Sequence[str]
    overrides: Sequence[str] | None = ()
    """`key=value` settings that run the plan; None where a choice between the rows is still to be made."""
    params: float = 0
    """N of the model to train."""
    command: tuple[str, ...] = TRAIN

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: a number that is not finite becomes null."""
        return {
            "question": self.question,
            "plan": plain(self.plan),
            "law": self._named and {"source": self._named.source, "synthetic": self._named.synthetic},
            "notes": self._notes(),
            "warnings": self._warnings(),
            "overrides": list(self.overrides or ()),
            "command": [*self.command, *self.overrides] if self.overrides else None,
        }

    def text(self) -> str:
        """For a terminal: only sentences are wrapped, so that no number is cut and the command can be copied."""
        width = terminal_width()
        sentences = [*self._notes(), *(f"warning: {warning}" for warning in self._warnings())]
        lines = [self.title, "", self.table.text(width), ""]
        lines += [wrapped(sentence, width) for sentence in sentences]
        lines += ["", f"To run it: {' '.join((*self.command, *self.overrides))}"] if self.overrides else []
        return "\n".join(lines)

    @property
    def _named(self) -> PlanLaw | NamedLaw | None:
        """None: the closed form, which needs no name."""
        return None if self.law is PAPER else self.law

    def _notes(self) -> list[str]:
        law = NO_LAW
        if isinstance(self._named, FractionLaw):
            law = f"Fractions of {self._named.name}: {self._named.about}. {NO_LAW}"
        elif self._named:
            law = f"Loss law: {self._named.source}."
        return [*self.notes, *([NO_CHOICE] if self.overrides is None else []), law]

    def _warnings(self) -> list[str]:
        made_up = [SYNTHETIC_WARNING] if self.law.synthetic else []
        return list(dict.fromkeys([*made_up, *self.warnings]))


_COLUMNS: dict[str, tuple[str, str]] = {
    "bits": ("bits", "g"),
    "effective_bits": ("stored bits", ".3f"),
    "params": ("params", "amount"),
    "hidden_size": ("width", ""),
    "layers": ("depth", ""),
    "megabytes": ("MB", ",.4g"),
    "S": ("tokens per byte", ",.4g"),
    "tokens_per_stored_byte": ("per stored byte", ",.4g"),
    "name": ("split", ""),
    "multiple": ("of the deserved", "g"),
    "fraction": ("QAT fraction", ".1%"),
    "tokens": ("tokens", "amount"),
    "tokens_qat": ("QAT tokens", "amount"),
    "flops": ("training FLOPs", ".3g"),
    "switch_step": ("switch before step", ","),
    "loss": ("predicted loss", ".4f"),
    "wasted": ("tokens wasted", ".2%"),
    "gap": ("over full precision", "+.4f"),
    "slope": ("loss per further 1B", ".3g"),
}
"""By attribute of a plan: its header and the format of its values."""


_DROPPED = ("per stored byte", "depth", "width", "stored bits", "tokens per byte", "training FLOPs", "QAT tokens")


def columns(items: Sequence[Any], attributes: str, best: object = None) -> TextTable:
    """A row for each item. A column with an unknown value (None) is left out; `best` is marked with *."""
    table: dict[str, list[str]] = {}
    for path in attributes.split():
        header, form = _COLUMNS[path.rpartition(".")[2]]
        values = [attrgetter(path)(item) for item in items]
        if None not in values:
            table[header] = [amount(v, 4) if form == "amount" else format(v, form) for v in values]
    first, *_ = table
    table[first] = [text + " *" * (item is best) for item, text in zip(items, table[first], strict=True)]
    return TextTable(list(table), words=[first], drop=_DROPPED, rows=list(zip(*table.values(), strict=True)))


def facts(known: Mapping[str, str | None]) -> TextTable:
    headers = ("quantity", "value")
    return TextTable(headers, words=headers, rows=[(name, text) for name, text in known.items() if text])


def plain(value: Any) -> Any:
    """Dataclasses, with their properties, as objects."""
    if is_dataclass(value) and not isinstance(value, type):
        derived = [name for name, attribute in vars(type(value)).items() if isinstance(attribute, property)]
        return {name: plain(getattr(value, name)) for name in [*(f.name for f in fields(value)), *derived]}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
