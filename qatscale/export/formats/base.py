"""The interface of a format: how it stores parameters, and writes, recognises and loads files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch

from qatscale.config.schema import ModelConfig
from qatscale.errors import UserError
from qatscale.export.clients import Client, install_line
from qatscale.export.encoding import Encoding, ExportLayout, StoredParameter
from qatscale.export.formats import FORMATS, check_format
from qatscale.export.source import ExportSource, SourceParameter


class Usage(NamedTuple):
    """How to load an export, for its model card. Texts are Markdown."""

    intro: str = ""
    install: str = ""
    code: str = ""
    """Python that runs in the folder of the export."""
    note: str = ""


class Format(ABC):
    name: ClassVar[str]
    library: ClassVar[str] = "transformers"
    """`library_name` of the model card."""
    suffix: ClassVar[str] = ".safetensors"
    """Ending of the files of weights."""
    holds_full_precision: ClassVar[bool] = False
    """Whether it also takes a model without any quantized parameter."""

    @property
    @abstractmethod
    def clients(self) -> Sequence[type[Client]]:
        """The programs that read it; `generate` and the card's first snippet use the first."""

    @abstractmethod
    def encodings(self, parameter: SourceParameter, dtype: torch.dtype) -> Sequence[Encoding]:
        """Ways to store a parameter, best first. The last one holds any; `Encoding.refusal` says why another does not.

        dtype: training's type, for unquantized parameters.
        """

    @abstractmethod
    def write(self, layout: ExportLayout, folder: Path, tokenizer: Path | None) -> None:
        """Write all files that the clients need into the existing folder. tokenizer: its folder; None: none."""

    def path(self, folder: Path) -> Path:
        """What its clients load of a folder that `write` filled: the folder, or its one file of weights."""
        return folder

    @abstractmethod
    def find(self, path: Path) -> Path | None:
        """As `path`, for an export of this format at `path`, a folder or a file; None where it is not one."""

    @abstractmethod
    def usages(self, has_tokenizer: bool, file: str) -> list[Usage]:
        """file: the name of the (first) file of weights."""

    def fitting(self, model: ModelConfig) -> Format:  # noqa: ARG002 - formats that all clients read for any model
        """This format with the clients that read such a model from it."""
        return self

    def with_q1_0(self) -> Format:
        """This format with 1 bit stored as llama.cpp's Q1_0. UserError where it has no such type."""
        raise UserError("--q1-0", None, f"is a type of gguf; {self.name} stores 1 bit in one way.", "Leave it out.")

    def layout(self, source: ExportSource, fallback: bool) -> ExportLayout:
        """Every parameter in the first of its encodings that holds it.

        UserError for a parameter whose first encoding cannot hold it, unless `fallback` allows the next. Also for a
        model without quantized parameters in a format of quantized weights.
        """
        is_quantized = any(parameter.quantizer for parameter in source.parameters)
        if not is_quantized and not self.holds_full_precision:
            why = "has not switched to QAT" if source.config.qat.scheme != "fp" else "was trained in full precision"
            fix = "Quantize it after training, --ptq 4 (1 to 8 bits), or export it as it is, --format hf."
            raise UserError("--format", self.name, f"stores quantized weights, and the checkpoint {why}.", fix)
        entries = [self.stored(parameter, source.dtype) for parameter in source.parameters]
        layout = ExportLayout(source, entries)
        refused = [entry for entry in entries if entry.fallback]
        if refused and not fallback:
            more = f" And {len(refused) - 1} more like it." if len(refused) > 1 else ""
            cost = sum(map(layout.fallback_cost, refused)) / 2**20
            fix = f"Add --fallback to store such tensors in the next type that holds them exactly, {cost:.2f} MiB more"
            problem = f"cannot hold {refused[0].parameter}: {refused[0].fallback}{more}"
            raise UserError("--format", self.name, problem, f"{fix}; or choose hf.")
        return layout

    def stored(self, parameter: SourceParameter, dtype: torch.dtype) -> StoredParameter:
        """The parameter in the first of its encodings that holds it."""
        first, *others = self.encodings(parameter, dtype)
        reason = first.refusal(parameter)
        encoding = first if reason is None else next(e for e in others if e.refusal(parameter) is None)
        return StoredParameter(parameter, encoding, reason)


_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

model = AutoModelForCausalLM.from_pretrained("."{options})
tokenizer = PreTrainedTokenizerFast.from_pretrained(".")
ids = tokenizer("The", add_special_tokens=False, return_tensors="pt").input_ids
continued = model.generate(ids, max_new_tokens=20, do_sample=False)
print(tokenizer.decode(continued[0]))
"""
_TRANSFORMERS_IDS = """\
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("."{options})
continued = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=20, do_sample=False)
print(continued[0].tolist())
"""


def transformers_usage(client: type[Client], has_tokenizer: bool, options: str = "", note: str = "") -> Usage:
    """options: further arguments of `from_pretrained`, after a comma."""
    code = (_TRANSFORMERS if has_tokenizer else _TRANSFORMERS_IDS).format(options=options)
    return Usage(install=install_line(client.packages), code=code, note=note)


class Exported(NamedTuple):
    format: Format
    path: Path
    """What its clients load: the folder, or its one file of weights."""

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


def get_format(name: str) -> Format:
    """UserError for a name that no format has."""
    check_format(name)
    try:
        return import_module(f"qatscale.export.formats.{name.replace('-', '_')}").FORMAT
    except ModuleNotFoundError as error:
        missing = f"needs the package {error.name}, which is not installed."
        raise UserError("--format", name, missing, "pip install 'qatscale[clients]'") from None


def find_export(path: Path) -> Exported | None:
    """The export at a path, recognised by what its clients look for; None for anything else."""
    for name in reversed(FORMATS):
        format = get_format(name)
        if (found := format.find(path)) is not None:
            return Exported(format, found)
    return None
