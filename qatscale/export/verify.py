"""Check that a client computes from an export what the trained model computes.

It compares three models in fp32 arithmetic: training's in the view that is exported, this project's with the weights as
the file stores them, whose scales may be rounded, and the client's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qatscale.errors import UserError, first_line
from qatscale.export.clients import Client
from qatscale.export.encoding import ExportLayout
from qatscale.model.hugging_face import hugging_face_names
from qatscale.model.llama import Llama
from qatscale.quant.views import computed_weights


@dataclass
class ClientReport:
    client: str
    """Name, with versions."""
    exact: int = 0
    """Tensors that equal the stored ones to the bit."""
    tensors: int = 0
    """Tensors whose weights it shows."""
    weight_error: float = 0.0
    """Largest distance from the stored weights, relative to the tensor's largest."""
    logit_error: float = 0.0
    """Largest distance from our logits on the stored weights, relative to the largest logit."""
    loss: float = 0.0
    problems: list[str] = field(default_factory=list)


class Verification:
    """The comparison. UserError where a client raises an exception."""

    def __init__(
        self,
        layout: ExportLayout,
        path: Path,
        clients: Sequence[type[Client]],
        trained: Llama,
        held_out: Sequence[Tensor],
    ) -> None:
        """path: what the clients load; trained: see `materialised`; held_out: sequences of token ids, [t + 1]."""
        stored = stored_model(layout)
        self.tokens = _predicted(held_out)
        """Predicted tokens of the held-out split."""
        self.trained_loss = _mean_loss(trained, held_out)
        """Loss of training's model in the exported view."""
        self.stored_loss = _mean_loss(stored, held_out)
        """Loss of our model with the weights as they are stored."""
        self.rounding = max(layout.rounding.values(), default=0.0)
        """Largest relative rounding of a stored scale."""
        self.weight_change = 0.0
        """Largest distance of a stored weight from training's, relative to the tensor's largest."""
        self.clients: list[ClientReport] = []
        self.not_installed: dict[str, list[str]] = {}
        """Client -> its packages that are missing."""
        self.problems: list[str] = []
        """Problems of the stored weights themselves."""
        self._compare_stored(layout, trained, stored)
        for client in clients:
            if missing := client.missing():
                self.not_installed[client.name] = missing
            else:
                self.clients.append(_ask(client, layout, path, stored, held_out))

    @property
    def passed(self) -> bool:
        return not self.problems and not any(client.problems for client in self.clients)

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"clients": [vars(client) for client in self.clients], "passed": self.passed}

    def _compare_stored(self, layout: ExportLayout, trained: Llama, stored: Llama) -> None:
        """Stored weights may differ from training's by at most the rounding of scales and of training's type."""
        named = dict(stored.named_parameters())
        precision = 2.0**-8 if layout.source.dtype == torch.bfloat16 else 2.0**-22
        for name, weight in trained.named_parameters():
            other, largest = named[name], float(weight.abs().max())
            if torch.equal(weight, other):
                continue
            off = float((weight - other).abs().max()) / largest
            self.weight_change = max(self.weight_change, off)
            allowed = layout.rounding.get(name, 0.0) + precision
            if name not in layout.rounding or off > allowed:
                self.problems.append(
                    f"{name} is stored {off:.2g} off training's weights, where {allowed:.2g} is the bound"
                )


@torch.no_grad()
def materialised(model: Llama) -> Llama:
    """A plain fp32 model with the weights that `model` computes with in its present view."""
    plain = Llama(model.config)
    plain.load_state_dict(computed_weights(model))
    return plain.eval()


@torch.no_grad()
def stored_model(layout: ExportLayout) -> Llama:
    model = Llama(layout.source.config.model)
    named = dict(model.named_parameters())
    for entry in layout.entries:
        named[entry.parameter.name].copy_(layout.stored(entry))
    return model.eval()


def _ask(
    kind: type[Client], layout: ExportLayout, path: Path, stored: Llama, held_out: Sequence[Tensor]
) -> ClientReport:
    report = ClientReport(kind.version())
    try:
        client = kind(path)
        _compare_weights(report, layout, client)
        _compare_logits(report, client, stored, held_out)
    except UserError:
        raise
    except Exception as error:  # each library raises other errors
        problem = f"failed on the export, which was removed: {type(error).__name__}: {first_line(error)}."
        raise UserError(report.client, None, problem, "Repair the package, or export with --no-verify.") from error
    return report


@torch.no_grad()
def _compare_logits(report: ClientReport, client: Client, stored: Llama, held_out: Sequence[Tensor]) -> None:
    largest, losses, ours = 0.0, 0.0, 0.0
    for sequence in held_out:
        logits, expected = client.logits(sequence[:-1]), stored(sequence[None, :-1])[0]
        report.logit_error = max(report.logit_error, float((logits - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
        losses += _summed_loss(logits, sequence)
        ours += _summed_loss(expected, sequence)
    tokens = _predicted(held_out)
    report.logit_error /= largest or 1  # a model whose logits are all 0
    report.loss = losses / tokens
    if not report.logit_error <= client.logit_bound:  # also where it is NaN
        bound = f"{client.logit_bound:g} of the largest"
        report.problems.append(f"logits are {report.logit_error:.2g} off, more than {bound}")
    if not abs(losses - ours) / tokens <= client.loss_bound:
        report.problems.append(f"the loss is {abs(losses - ours) / tokens:.2g} off, more than {client.loss_bound:g}")


def _compare_weights(report: ClientReport, layout: ExportLayout, client: Client) -> None:
    config = layout.source.config.model
    names = hugging_face_names(config)
    entries = {names[entry.parameter.name]: entry for entry in layout.entries}
    for name, weight in client.weights():
        if name not in entries:
            if not (name == "lm_head.weight" and config.tied_embedding):
                report.problems.append(f"it has {name}, which was not written")
            continue
        entry = entries.pop(name)
        expected = layout.stored(entry).float()
        report.tensors += 1
        if torch.equal(weight.float(), expected):
            report.exact += 1
            continue
        off = float((weight.float() - expected).abs().max() / expected.abs().max())
        report.weight_error = max(report.weight_error, off)
        if not off <= entry.encoding.tolerance:
            report.problems.append(f"{name} is {off:.2g} off what is stored, more than {entry.encoding.tolerance:.2g}")
    if entries and report.tensors:
        report.problems.append(f"it has no {', '.join(entries)}")


def _predicted(held_out: Sequence[Tensor]) -> int:
    return sum(len(sequence) - 1 for sequence in held_out)


def _summed_loss(logits: Tensor, sequence: Tensor) -> float:
    return float(F.cross_entropy(logits, sequence[1:], reduction="sum"))


@torch.no_grad()
def _mean_loss(model: Llama, held_out: Sequence[Tensor]) -> float:
    losses = (_summed_loss(model(sequence[None, :-1])[0], sequence) for sequence in held_out)
    return sum(losses) / _predicted(held_out)
