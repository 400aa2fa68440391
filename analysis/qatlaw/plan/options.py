"""The planner's options: their names, what they take, and how their text becomes a `Request`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qatlaw.default import default_law, load_law
from qatlaw.errors import LawError
from qatlaw.plan.amounts import parse_amount, parse_bytes
from qatlaw.plan.request import Request
from qatlaw.plan.run_folder import read_trained


@dataclass(frozen=True)
class Option:
    flag: str
    metavar: str
    help: str
    read: Callable[[str, str], Any]
    """From the option's name and text; LawError for what is no such thing."""

    @property
    def name(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise LawError(option, text, "a number.") from None


def _text(_: str, text: str) -> str:
    return text


GROUPS: dict[str, tuple[Option, ...]] = {
    "One run: when to switch, what it is worth": (
        Option("--params", "396M", "Parameters of the model, a tied embedding counted once.", parse_amount),
        Option("--tokens", "100B", "All training tokens.", parse_amount),
        Option("--bits", "4", "Bits per quantized weight; left out: all widths, for the questions below.", _number),
        Option("--fraction", "0.25", "A QAT fraction to judge by the law, beside the optimal one.", _number),
        Option("--batch-tokens", "1M", "Tokens of an optimizer step, for the switch step.", parse_amount),
    ),
    "A memory budget (with --tokens): the best size and width": (
        Option("--memory", "500MB", "Bytes for the weights.", parse_bytes),
        Option("--vocab-size", "32000", "Pieces of the tokenizer; default 32,000.", parse_amount),
    ),
    "Against full precision (with --params and --tokens)": (
        Option("--compare", "fp", "QAT at each width against a full-precision run.", _text),
        Option("--tolerance", "0.01", "Nats per token that a width may lose; default 0.01.", _number),
    ),
    "A budget of compute (with --params; without, a law chooses the size)": (
        Option("--flops", "1e21", "Floating-point operations of the whole training.", parse_amount),
        Option("--gpu-hours", "500", "Hours, all GPUs together.", parse_amount),
        Option("--peak-flops", "989T", "Of one GPU, in FLOP/s.", parse_amount),
        Option("--mfu", "0.4", "Share of the peak that full-precision training reaches.", _number),
        Option("--qat-mfu", "0.35", "Share of the peak that QAT reaches.", _number),
        Option("--qat-overhead", "1.2", "Instead: time of a QAT step over that of a full-precision step.", _number),
        Option("--tokens-per-second-fp", "1.2M", "Instead of peak and MFU: as measured.", parse_amount),
        Option("--tokens-per-second-qat", "1.0M", "The same in QAT.", parse_amount),
        Option("--gpus", "8", "On which they were measured; default 1.", parse_amount),
    ),
    "A full-precision checkpoint: the QAT tokens that it deserves": (
        Option("--from-checkpoint", "RUN", "A run's folder, RUN@STEP or a checkpoint's folder.",
               lambda _, text: read_trained(text)),
        Option("--trained-tokens", "60B", "Instead: tokens that were trained in full precision.", parse_amount),
    ),
    "What fusing QAT with the cooldown saves (with --params, --tokens, --bits)": (
        Option("--fused-loss", "2.31", "Final loss of a fused run, in nats per token.", _number),
        Option("--sequential-loss", "2.32", "That of the sequential run of the same tokens.", _number),
    ),
    "The loss law": (
        Option("--law", "fit.json", "Of `qatscale fit`; or `synthetic`, a demonstration.",
               lambda _, text: load_law(text)),
    ),
}  # fmt: skip
OPTIONS = {option.name: option for options in GROUPS.values() for option in options}


def read_request(given: Mapping[str, str | None], **known: Any) -> Request:
    """From the options' texts, by `Option.name`; None is not given. `known`: further fields of the request.

    LawError for a text that cannot be read.
    """
    values = {name: OPTIONS[name].read(OPTIONS[name].flag, text) for name, text in given.items() if text is not None}
    trained = values.get("from_checkpoint")
    if trained is not None:
        for name in ("params", "batch_tokens"):
            if name in values or name in known:
                raise LawError(OPTIONS[name].flag, None, "is told by the checkpoint.", "Leave it out.")
        values["params"] = float(trained.params)
    return Request(**{"law": default_law(), **known, **values})
