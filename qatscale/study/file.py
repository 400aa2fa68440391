"""The study file: a grid of runs in YAML. Its format is in analysis/guides/recipe-reference.md."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError

from qatlaw.errors import cut
from qatscale.config.amounts import PositiveTokens
from qatscale.config.problems import together, user_errors
from qatscale.config.recipe import recipe_names
from qatscale.config.schema import Bits
from qatscale.config.section import Allowed, ClashError, KeyPath, NotBool, Positive, Section
from qatscale.config.settings import settings, suggest
from qatscale.config.yaml_text import read_document
from qatscale.errors import UserError, did_you_mean
from qatscale.files import is_file

MOST_RUNS = 10_000
"""The most runs of a study that is laid out."""
TWO_PHASES = ("sequential", "fused")


@dataclass(frozen=True)
class Sets:
    """Marks an axis whose values go into keys of the recipe as they are."""

    keys: tuple[str, ...]
    label: str
    """Before the value in a run's name, which leaves out the axis' default."""


def _recipe(value: str) -> str:
    if value not in recipe_names() and not is_file(Path(value)):
        raise ClashError("", "no such recipe or file", did_you_mean(value, recipe_names()))
    return value


def _override(value: str) -> str:
    key, equals, _ = value.partition("=")
    if not equals:
        raise ClashError("", "must be an override, KEY=VALUE", "`qatscale config` lists the keys.")
    return _free_key(key.strip()) + equals + value[len(key) + 1 :]


def _free_key(key: str) -> str:
    if key in _OF_AN_AXIS:
        raise ClashError("", f"{key} is set by the study", f"Use the study's {_OF_AN_AXIS[key]}.")
    return key


def _varied_key(key: str) -> str:
    if key not in settings():
        raise ClashError("", "unknown key of a recipe", suggest(key))
    if key.startswith("tracking."):  # nor may a run's name hold an address with a password
        raise ClashError("", "does not change what is trained", "Use `set`.")
    return _free_key(key)


def _share(value: float) -> float:
    if not 0 <= value <= 1:
        fix = f"Did you mean {value / 100:g}?" if 1 < value <= 100 else ""
        raise ClashError("", "must be a share of the tokens, 0 (full precision) to 1 (QAT from scratch)", fix)
    return value


def _with_two_phases(value: Any) -> Any:
    if value in ("fp", "scratch"):
        raise ClashError("", "has one phase", f"Put {'0' if value == 'fp' else '1'} into fractions instead.")
    return value


def _as_list(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _all_different(values: tuple[Any, ...]) -> tuple[Any, ...]:
    for text, count in Counter(map(repr, values)).items():
        if count > 1:
            raise ClashError("", f"holds {cut(text)} twice", "Use `seeds` for repeats.")
    return values


Item = TypeVar("Item")
Values = Annotated[tuple[Item, ...], BeforeValidator(_as_list), AfterValidator(_all_different)]
"""A list, or one value for a list of one."""
Override = Annotated[str, AfterValidator(_override)]


class Size(Section):
    """A model of the grid."""

    name: str
    recipe: Annotated[str, AfterValidator(_recipe)]
    set: Values[Override] = ()
    processes: Positive = 1
    """Processes that train one run: above 1 through the DeepSpeed launcher."""


def _as_size(value: Any) -> Any:
    return {"name": Path(value).stem, "recipe": value} if isinstance(value, str) else value


class Axes(Section):
    """A grid: every combination of these values is a run. Empty: not given."""

    sizes: Values[Annotated[Size, BeforeValidator(_as_size)]] = ()
    tokens: Values[PositiveTokens] = ()
    """The same for all sizes."""
    tokens_per_parameter: Values[Annotated[float, NotBool, Field(gt=0)]] = ()
    bits: Values[Bits] = ()
    fractions: Values[Annotated[float, NotBool, AfterValidator(_share)]] = ()
    schemes: Values[Annotated[Literal["sequential", "fused"], BeforeValidator(_with_two_phases)]] = ("sequential",)
    vary: Annotated[
        dict[Annotated[str, AfterValidator(_varied_key)], Values[Any]], Allowed("`key: [values]` lines")
    ] = Field({})
    """Dotted key of a recipe and its values."""
    seeds: Annotated[Values[Annotated[int, NotBool]], Sets(("seed", "data.seed"), "seed")] = (0,)
    cooldown_data_seeds: Annotated[
        Values[Annotated[int, NotBool, Field(ge=0)]], Sets(("data.cooldown_seed",), "order")
    ] = (0,)
    """Orders of the data in the cooldown: runs that differ in it alone branch where the cooldown starts."""
    keep_at: Values[PositiveTokens] = ()
    """Not an axis: checkpoints that stay when the study is done, in tokens from the start."""


class Study(Axes):
    name: Annotated[str, Field(pattern=r"^([^./][^/]*)?$"), Allowed("a name without /, not beginning with a dot")] = ""
    set: Values[Override] = ()
    """Overrides of every run."""
    grids: Annotated[
        Annotated[tuple[Axes, ...], Field(min_length=1)] | None,
        Allowed("a list of mappings: [{bits: [2]}, {bits: [4]}]"),
    ] = None

    @property
    def addresses(self) -> list[str]:
        """The values of tracking.uri, which may hold passwords."""
        overrides = [*self.set, *(text for part in self.parts for size in part.sizes for text in size.set)]
        return [text.partition("=")[2] for text in overrides if text.startswith("tracking.uri=")]

    @property
    def parts(self) -> tuple[Axes, ...]:
        """The grids, each with the study's values of the axes that it does not give itself."""
        return (self,) if self.grids is None else tuple(self._with(own) for own in self.grids)

    def _with(self, own: Axes) -> Axes:
        given = {name: getattr(own, name) for name in own.model_fields_set}
        if given.keys() & _BUDGETS.keys():
            given = _BUDGETS | given
        return self.model_copy(update=given)


_BUDGETS: dict[str, Any] = {"tokens": (), "tokens_per_parameter": ()}
"""The two ways to give the tokens; a grid's own replaces the study's."""
PLAIN_AXES = {
    name: mark for name, field in Axes.model_fields.items() for mark in field.metadata if isinstance(mark, Sets)
}
"""The axes that only set keys of the recipe. CONTRIBUTING.md lists what a new one takes."""
_OF_AN_AXIS = {
    "name": "name", "tokens": "tokens", "qat.scheme": "schemes", "qat.bits": "bits", "qat.fraction": "fractions",
    "evaluation.ptq_bits": "bits", "checkpoint.keep_at": "keep_at", "output": "folder",
    **{key: name for name, sets in PLAIN_AXES.items() for key in sets.keys},
}  # fmt: skip
"""What no override may set, and what sets it."""


def read_study(path: Path) -> Study:
    """Raises UserError for everything that is wrong with the file, all of it at once."""
    if not is_file(path):
        raise UserError("study", str(path), "no such file.")
    document = read_document(path, "study")
    if not document.value:
        raise UserError("study", str(path), "holds no `key: value` lines.")

    def origin(at: KeyPath) -> str:
        lines = [document.lines[at[:n]] for n in range(1, len(at) + 1) if at[:n] in document.lines]
        return f"(In {path}, line {lines[-1]}.)" if lines else ""

    try:
        study = Study.model_validate({"name": path.stem, **document.value})
    except ValidationError as error:
        raise user_errors(error, Study, document.value, origin) from None
    if problems := list({str(problem): problem for problem in _incomplete(study)}.values()):
        raise together(problems)
    return study


def _incomplete(study: Study) -> Iterator[UserError]:
    for part in study.parts:
        for name in ("sizes", "bits", "fractions", "schemes", "seeds"):
            if not getattr(part, name):
                yield UserError(name, None, "needs a value.", f"Write {name}: {_EXAMPLES[name]}.")
        if not part.tokens and not part.tokens_per_parameter:
            fix = "Write tokens: [2.3B, 10B], or tokens_per_parameter: [20, 80]."
            yield UserError("tokens", None, "needs a value.", fix)
        axes = (part.sizes, part.tokens or part.tokens_per_parameter, part.bits, part.fractions, part.schemes)
        plain = (getattr(part, name) or (None,) for name in PLAIN_AXES)
        runs = math.prod(map(len, (*axes, *plain, *part.vary.values())))
        if runs > MOST_RUNS:
            yield UserError(
                "study", None, f"a grid of up to {runs:,} runs; at most {MOST_RUNS:,} are laid out.", "Split it."
            )
        if part.tokens and part.tokens_per_parameter:
            yield UserError("tokens", None, "says the same as tokens_per_parameter.", "Keep one of them.")
    by_name: dict[str, Size] = {}
    for size in (size for part in study.parts for size in part.sizes):
        if by_name.setdefault(size.name, size) != size:
            yield UserError("sizes", size.name, "two sizes have this name.", "Give each a name of its own.")


_EXAMPLES = {
    "sizes": "[86m, 194m]", "bits": "[2, 4]", "fractions": "[0, 0.1, 0.3, 1]", "schemes": "[fused]", "seeds": "[0]",
}  # fmt: skip
