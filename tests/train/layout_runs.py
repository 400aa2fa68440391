"""Runs that differ in their layout alone, and how far their losses part.

A run's name is `kind-layout`: `tied2-d2t2z1` is kind `tied2` on 2 data x 2 tensor processes under ZeRO-1. The fixture
`laid_out` trains those that the selected tests ask for, in one launch per number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qatscale.tracking.run_folder import RunFolder
from tests import processes
from tests.train.driving import DRIVER, losses, records, spec

COMMON = ["optimizer.learning_rate=3e-4", "model.heads=4", "model.layers=4"]
KINDS = {
    "tied2": ["qat.bits=2"],
    "tied6": ["qat.bits=6", "model.vocab_size=514", "qat.optimizer_state=reset", "data.document_mask=true"],
    # 514: padded on 4 processes
    "untied1": ["qat.bits=1", "qat.scheme=sequential", "model.tied_embedding=false", "model.vocab_size=515"],
    "untied4": [
        "qat.bits=4",
        "model.tied_embedding=false",
        "qat.embedding_bits=8",
        "qat.group_size=16",
        "data.document_mask=true",
    ],
}


def layout(
    tensor: int = 1, pipeline: int = 1, zero: str = "1", micro_batch: int = 2, precision: str = "fp32", *more: str
) -> list[str]:
    return [
        f"engine.tensor_parallel={tensor}", f"engine.pipeline_stages={pipeline}",
        f"engine.ds_config=zero{zero}_{precision}", f"batch.micro_batch={micro_batch}", *more,
    ]  # fmt: skip


SEQUENCE, RECOMPUTE = "engine.sequence_parallel=true", "engine.activation_checkpointing=true"
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one": (1, layout(micro_batch=8)),
    "d2z2": (2, layout(zero="2")),
    "t2z1": (2, layout(2, zero="1", micro_batch=8)),
    "t2z2": (2, layout(2, zero="2", micro_batch=1)),
    "t2z3": (2, layout(2, zero="3")),
    "t2sz1": (2, layout(2, 1, "1", 2, "fp32", SEQUENCE)),
    "t2sz3": (2, layout(2, 1, "3", 4, "fp32", SEQUENCE, RECOMPUTE)),
    "p2": (2, layout(1, 2)),
    "p2c": (2, layout(1, 2, "1", 1, "fp32", RECOMPUTE)),
    "d4z3": (4, layout(zero="3")),
    "d2t2z1": (4, layout(2)),
    "d2t2z2": (4, layout(2, zero="2", micro_batch=4)),
    "d2t2sz3": (4, layout(2, 1, "3", 1, "fp32", SEQUENCE)),
    "d2p2": (4, layout(1, 2)),
    "t2p2": (4, layout(2, 2, micro_batch=1)),
    "t2sp2": (4, layout(2, 2, "1", 2, "fp32", SEQUENCE, RECOMPUTE)),
    "t4z1": (4, layout(4, micro_batch=8)),
    "t4sz3": (4, layout(4, 1, "3", 4, "fp32", SEQUENCE)),
    "p4": (4, layout(1, 4, micro_batch=1)),
    "bf16-one": (1, layout(precision="bf16")),
    "bf16-t2z1": (2, layout(2, precision="bf16")),
    "bf16-t2sz3": (2, layout(2, 1, "3", 2, "bf16", SEQUENCE)),
    "bf16-t2z2offload": (2, layout(2, zero="2", precision="bf16_offload")),
    "bf16-p2": (2, layout(1, 2, precision="bf16")),
    "bf16-t2p2": (4, layout(2, 2, precision="bf16")),
}
"""Name → (processes, overrides): d = data, t = tensor (s: with the sequence split), p = pipeline, z = ZeRO stage."""

SAVED = ["one", "d4z3", "d2t2z2", "d2p2", "t2sp2", "t4sz3", "p4", "p2", "t2z1"]
"""Layouts that a checkpoint is saved under and resumed under."""
SAVED_AT, AFTER = {"before": 4, "after": 12}, 20
"""Steps at which it is saved, before and after the switch at 10; steps compared."""
LONG = ["tokens=16384", "qat.fraction=0.6875", "checkpoint.keep_at=[2048, 6144]"]  # 32 steps of 512 tokens


def resumed_name(source: str, target: str, when: str) -> str:
    return f"tied2-{target}-from-{source}-{when}"


class LaidOut:
    """A folder of such runs."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data, self.runs = folder, data, folder / "runs"

    def train(self, names: Iterable[str]) -> None:
        """Sources of resumes first: they are whole runs of their own."""
        wanted = sorted(set(names))
        resumes = [name for name in wanted if "-from-" in name]
        wanted += [f"long-{name.split('-')[3]}" for name in resumes]
        if resumes:
            wanted.append("long-one")
        self._launch(sorted(name for name in set(wanted) if "-from-" not in name))
        self._launch(resumes)

    def _launch(self, names: list[str]) -> None:
        for ranks in sorted({LAYOUTS[self.layout_of(name)][0] for name in names}):
            runs = [self._spec(name) for name in names if LAYOUTS[self.layout_of(name)][0] == ranks]
            listed = self.folder / "runs.json"
            listed.write_text(json.dumps(runs))
            finished = processes.finish(processes.start([DRIVER, listed], ranks, self.folder), timeout=3600)
            assert finished.codes == [0] * ranks, finished.output

    @staticmethod
    def layout_of(name: str) -> str:
        return name.split("-from-")[0].split("-", 1)[1]

    def _spec(self, name: str) -> dict[str, Any]:
        kind, laid_out = name.split("-", 1)[0], LAYOUTS[self.layout_of(name)][1]
        if kind == "long":
            return spec(name, self.runs, self.data, *COMMON, *KINDS["tied2"], *LONG, *laid_out)
        if "-from-" not in name:
            return spec(name, self.runs, self.data, *COMMON, *KINDS[kind], *laid_out)
        source, when = name.split("-from-")[1].split("-")
        overrides = [*COMMON, *KINDS["tied2"], *LONG, *laid_out]
        if when == "before":  # as many steps as are compared; the schedule is that of the whole run
            overrides.append("evaluation.tokens=1024")
        return spec(name, self.runs, self.data, *overrides, branch_from=f"{self.runs}/long-{source}@{SAVED_AT[when]}")

    def difference(self, name: str, reference: str) -> float:
        """The largest relative difference of losses, training and final, that the two runs have."""
        found, expected = losses(self.runs / name), losses(self.runs / reference)
        assert found
        assert found.keys() <= expected.keys()
        parts = [abs(found[step] / expected[step] - 1) for step in found]
        own, other = RunFolder(self.runs / name).final, RunFolder(self.runs / reference).final
        assert own is not None
        assert other is not None
        parts += [abs(own[key] / other[key] - 1) for key in own if key.startswith("final/val_loss")]
        return max(parts)

    def gradient_norm_difference(self, name: str, reference: str) -> float:
        found, expected = records(self.runs / name), records(self.runs / reference)
        pairs = zip(found, expected, strict=True)
        return max(abs(own["grad_norm"] / other["grad_norm"] - 1) for own, other in pairs)
