"""The runs whose checkpoints are exported, trained for real in one launch: every width, both precisions, tied and not.

Rows of 256 channels and more, because GGUF's K-quants need blocks of 256; two more rows in the vocabulary than the
tokenizer has pieces; fewer key than query heads, for the permutation of their rows differs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qatlaw.plan.shapes import Shape
from tests.processes import run

DRIVER = Path(__file__).parents[1] / "train" / "runs_driver.py"
STEPS = 12
BASE = [
    "tokens=6144",  # 12 steps of 8 sequences of 64
    "data.sequence_length=64",
    "batch.sequences=8",
    "batch.micro_batch=8",
    "qat.scheme=fused",
    "qat.fraction=0.5",
    "schedule.warmup_tokens=1024",
    "schedule.cooldown_fraction=0.25",
    "evaluation.tokens=512",
    "evaluation.ptq_bits=[]",
    "tracking.uri=none",
    "model.vocab_size=514",
    "model.hidden_size=256",
    "model.intermediate_size=512",
    "model.layers=1",
    "model.heads=4",
    "model.kv_heads=2",
]
BF16 = "engine.ds_config=zero1_bf16"
UNTIED = "model.tied_embedding=false"
NARROW = ["model.hidden_size=96", "model.intermediate_size=192", "model.kv_heads=4"]
PLANNED = Shape(256, 4, 514)
RUNS: dict[str, list[str]] = {
    "one": ["qat.bits=1", "model.layers=2", "model.attention_bias=true"],  # Qwen2; the embedding, a head too, in 4
    "two": ["qat.bits=2", BF16],
    "four": ["qat.bits=4", UNTIED, "model.qk_norm=true", "model.head_dim=128"],  # Qwen3
    "six": ["qat.bits=6", BF16],
    "ternary": ["qat.bits=1.58", BF16, UNTIED, "qat.embedding_bits=5"],
    "three": ["qat.bits=3", "qat.group_size=64", UNTIED, "qat.embedding_bits=8"],
    "narrow": ["qat.bits=2", *NARROW],  # rows of 96: no K-quant, and in MLX groups of 32
    "full": ["qat.scheme=fp", "qat.fraction=auto", "qat.bits=4", "checkpoint.keep_at=[2048]"],
    "unfinished": ["qat.bits=2"],
    # a usual shape of the planner, with rows of 640 that K-quants of 256 do not fit
    "planned": ["qat.scheme=fp", "qat.fraction=auto", BF16, *PLANNED.overrides],
    "planned-groups": ["qat.scheme=fp", "qat.fraction=auto", BF16, *PLANNED.overrides, "qat.group_size=64"],
}
WIDTHS = {"one": 1, "two": 2, "four": 4, "six": 6}


def train_runs(folder: Path, data: Path) -> Path:
    """Train all of `RUNS` in one process; their folder."""
    specs: list[dict[str, Any]] = []
    for name, overrides in RUNS.items():
        where = [f"name={name}", f"output={folder / 'runs'}", f"data.path={data}"]
        spec: dict[str, Any] = {"overrides": [*BASE, *where, *overrides]}
        if name == "unfinished":
            spec["stop_at"] = {"step": 8, "rank": 0, "signal": "SIGUSR1"}
        specs.append(spec)
    listed = folder / "runs.json"
    listed.write_text(json.dumps(specs))
    finished = run([DRIVER, listed], cwd=folder, timeout=600)
    assert finished.codes == [0], finished.output
    return folder / "runs"
