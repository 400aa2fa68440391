"""The runs that the tests of this package look at. Starting a process costs more than training any of them, so all are
trained in two launches, one of 1 process and one of 2, by the fixture `trained`.

A name says what was trained, at how many bits, and under which layout: `fused2-p2-z3-m4` is a fused run at 2 bits on 2
processes under ZeRO-3 with micro-batches of 4 sequences out of 8.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qatscale.data.adopt import adopt
from tests.train.driving import STEPS, SWITCH, drive, spec
from tests.train.fixed_tokens import VOCABULARY

TOKENS_PER_STEP = 512
LEARNING_RATE = "optimizer.learning_rate=3e-4"
"""Layouts sum in different orders, so weights differ in their last bits, by amounts that grow with the rate. Where one
weight of a hundred thousand lies that close to a quantizer's threshold, two layouts round it to different levels, and
in so small a model a single level shows in the fifth digit of the loss. At this rate, and on tokens that are the same
everywhere, no weight of these runs lies so close; at recipe `debug`'s 3e-3 about one run in ten has one."""
KINDS = {
    "fused2": [],
    "seq1": ["qat.scheme=sequential", "qat.bits=1", "qat.optimizer_state=reset"],
    "scratch4": ["qat.scheme=scratch", "qat.fraction=auto", "qat.bits=4"],
    "fused4": [
        "qat.bits=4",
        "qat.optimizer_state=reset",
        "data.cooldown_seed=1",
        "schedule.phases.qat_cooldown.betas=[0.8,0.99]",
        "schedule.phases.qat_cooldown.weight_decay=0.3",
    ],
    "fused2e16": ["qat.embedding_bits=16"],
}
# Two launches, all schemes, 1, 2 and 4 bits, both treatments of Adam's state, every stage on 1 and on 2 processes,
# ZeRO-3 with and without resident parameters, 1 to 8 micro-batches a step.
ON_ONE = ["fused2-p1-z1-m8", "fused2-p1-z3-m2", "seq1-p1-z2-m8", "scratch4-p1-z1-m2", "fused4-p1-z3sharded-m8"]
ON_TWO = [
    "fused2-p2-z1-m1", "fused2-p2-z2-m4", "fused2-p2-z3sharded-m2", "seq1-p2-z3-m2", "seq1-p2-z1-m4",
    "scratch4-p2-z3-m4", "fused4-p2-z2-m1", "fused2e16-p2-z2-m4",
]  # fmt: skip
FLOORED = [
    "qat.bits=1", "qat.scale_lr_ratio=100",
    "checkpoint.interval=512", "checkpoint.keep=12", "checkpoint.background=false",
]  # fmt: skip
"""Scales that AdamW moves by 0.03 a step, more than they are; and a checkpoint after every step."""
REFERENCE = "fused2-p1-z1-m8"
BF16 = ["zero1_bf16", "zero2_bf16", "zero3_bf16", "zero2_bf16_offload"]
STOPPED_BF16 = {"zero1_bf16": SWITCH - 2, "zero3_bf16": SWITCH + 1, "zero2_bf16_offload": SWITCH - 4}
"""ds_config → the step at which rank 1 of 2 is signalled; both stop when two more are done."""


class Trained:
    """The folder of the runs, and what each launch printed."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.runs = folder / "runs"
        self.long = ["tokens=12288", *self.layout("z1", "m1")]
        self.output: dict[int, str] = {}
        self.unvalidated = folder / "unvalidated"

    def launch(self, ranks: int, runs: list[dict[str, Any]]) -> None:
        """Train `runs` on so many processes."""
        finished = drive(runs, self.folder, ranks)
        assert finished.codes == [0] * ranks, finished.output
        self.output[ranks] = finished.output

    def spec(self, name: str, *overrides: str, **more: Any) -> dict[str, Any]:
        return spec(name, self.runs, self.data, LEARNING_RATE, *overrides, **more)

    def laid_out(self, name: str) -> dict[str, Any]:
        """The run of a name such as fused2-p2-z3-m4."""
        kind, _, stage, micro_batch = name.split("-")
        return self.spec(name, *KINDS[kind], *self.layout(stage, micro_batch))

    def layout(self, stage: str, micro_batch: str) -> list[str]:
        ds_config = str(self.folder / "sharded.json") if stage == "z3sharded" else f"zero{stage[1:]}_fp32"
        return [f"engine.ds_config={ds_config}", f"batch.micro_batch={micro_batch[1:]}"]

    def train(self) -> None:
        sharded: Mapping[str, Any] = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
        (self.folder / "sharded.json").write_text(json.dumps(sharded))
        self.unvalidated.mkdir()
        for ending in ("bin", "idx"):
            shutil.copy(self.data / f"train.{ending}", self.unvalidated)
        adopt(self.unvalidated, train=["train"], validation_fraction=0, vocab_size=VOCABULARY)
        self.launch(1, self._on_one())
        self.launch(2, self._on_two())

    def _on_one(self) -> list[dict[str, Any]]:
        reference = self.layout("z1", "m8")
        fork = f"{self.runs}/trunk@{SWITCH}"
        trunk = [
            "qat.scheme=fp", "qat.fraction=auto", "qat.bits=8", "schedule.cooldown_fraction=0", "tokens=8192",
            f"checkpoint.keep_at=[{SWITCH * TOKENS_PER_STEP}]",
        ]  # fmt: skip
        return [
            *map(self.laid_out, ON_ONE),
            self.spec("long", *self.long),
            self.spec(
                "unvalidated",
                f"data.path={self.unvalidated}",
                "tokens=2048",
                "evaluation.interval=512",
                "qat.scheme=fp",
                "qat.fraction=auto",
                "evaluation.ptq_bits=[2]",
            ),
            self.spec("trunk", *reference, *trunk),
            self.spec("floored", *reference, *FLOORED),
            self.spec("branch", *reference, branch_from=fork),
            self.spec("branch-e16", *KINDS["fused2e16"], *reference, branch_from=fork),
            self.spec("branch-seed", *reference, "data.seed=1", branch_from=fork),
            self.spec("tail", *reference, "schedule.shape=linear", branch_from=f"{self.runs}/{REFERENCE}@{STEPS - 3}"),
            self.spec("moved", *reference, stop_at={"step": SWITCH, "rank": 0, "signal": "SIGTERM"}),
            self.spec("unfinished", *reference, stop_at={"step": SWITCH, "rank": 0, "signal": "SIGUSR1"}),
        ]

    def _on_two(self) -> list[dict[str, Any]]:
        runs = [
            *map(self.laid_out, ON_TWO),
            self.spec("floored-p2", *self.layout("z3", "m2"), *FLOORED),
            self.spec("branch-p2", *self.layout("z3", "m2"), branch_from=f"{self.runs}/trunk@{SWITCH}"),
            self.spec("moved", *self.layout("z3", "m2")),
        ]
        for ds_config in BF16:
            runs.append(self.spec(ds_config, f"engine.ds_config={ds_config}"))
        for ds_config, step in STOPPED_BF16.items():
            stopped = self.spec(f"{ds_config}-stopped", f"engine.ds_config={ds_config}")
            runs.append({**stopped, "stop_at": {"step": step, "rank": 1, "signal": "SIGUSR1"}})
            runs.append(stopped)
        return runs
