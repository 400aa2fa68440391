"""Every width through every export format: sizes, and how far each client is from what was trained. See exports.md.

    python analysis/benchmarks/exports.py       about 10 minutes on one core; finished runs and exports are reused

One full-precision trunk on the text of this machine's Python packages, and from it a QAT branch per width and
precision. Needs the extra `clients`; llama.cpp is asked where llama-cpp-python is installed. Prints Markdown tables.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from qatlaw.bit_widths import BIT_WIDTHS
from qatscale.cli import main as qatscale
from qatscale.config.recipe import load_run_config
from qatscale.config.schema import RunConfig
from qatscale.data.prepare import prepare
from qatscale.export.formats import FORMATS
from qatscale.study.trunk import train_or_reuse

OUT = Path("outputs/exports")
STEPS, SWITCH, TOKENS = 90, 60, 1024
WIDTHS = {"fp32": BIT_WIDTHS, "bf16": (1, 2, 4, 6)}
MORE = ("--fallback", "--tokens", "4K")
MODEL = [
    "model.vocab_size=2048", "model.hidden_size=256", "model.intermediate_size=768", "model.layers=2", "model.heads=4",
    "model.kv_heads=2", "data.sequence_length=128", "batch.sequences=8", "batch.micro_batch=8",
    "schedule.warmup_tokens=10K", f"tokens={STEPS * TOKENS}", "evaluation.tokens=16K", "evaluation.ptq_bits=[]",
    "tracking.uri=none", "optimizer.learning_rate=2e-3",
]  # fmt: skip


def run_config(name: str, data: Path, *own: str) -> RunConfig:
    where = [f"name={name}", f"output={OUT / 'runs'}", f"data.path={data}"]
    return load_run_config("debug", [*MODEL, *where, *own])


def train(data: Path) -> list[RunConfig]:
    """The branches, trained."""
    trunk = run_config(
        "trunk", data, "qat.scheme=fp", "qat.fraction=auto", "schedule.cooldown_fraction=0",
        f"tokens={SWITCH * TOKENS}",
    )  # fmt: skip
    train_or_reuse(trunk)
    branches = [
        run_config(
            f"{bits:g}bit-{precision}", data, "qat.scheme=fused", f"qat.bits={bits:g}",
            f"qat.fraction={(STEPS - SWITCH) / STEPS}", "schedule.cooldown_fraction=0.3333",
            f"engine.ds_config=zero1_{precision}",
        )
        for precision, widths in WIDTHS.items()
        for bits in widths
    ]  # fmt: skip
    for branch in branches:
        train_or_reuse(branch, f"{trunk.output / trunk.name}@{SWITCH}")
    return branches


def export(config: RunConfig, format: str) -> dict:
    out = OUT / f"{config.name}-{format}"
    if not out.exists():
        try:
            qatscale(["export", str(config.output / config.name), "--format", format, "--out", str(out), *MORE])
        except SystemExit as stop:
            if stop.code:
                raise
    return json.loads((out / "export.json").read_text())


def row(name: str, format: str, about: dict) -> str:
    size, found = about["size"], about["verification"]
    kinds = dict.fromkeys(tensor["stored_as"] for tensor in about["tensors"] if tensor["bits"])
    client, *others = found["clients"]
    cells = [
        name, format, ", ".join(kinds), f"{size['bytes']:,}", f"{size['ideal_bytes']:,.0f}",
        f"{size['bits_per_quantized_weight']:.2f}", f"{found['trained_loss']:.5f}",
        f"{found['stored_loss'] - found['trained_loss']:+.1e}", f"{found['rounding']:.1e}",
        f"{found['weight_change']:.1e}", f"{client['exact']}/{client['tensors']}", f"{client['logit_error']:.1e}",
        f"{client['loss'] - found['stored_loss']:+.1e}",
        *(f"{other['logit_error']:.1e} ({other['loss'] - found['stored_loss']:+.1e})" for other in others),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    data = OUT / "data"
    if not (data / "manifest.json").exists():
        prepare(["self:4M"], data, vocab_size=2048, validation_fraction=0.02, workers=1)
    rows = [row(config.name, format, export(config, format)) for config in train(data) for format in FORMATS]
    print("\n".join(rows))
