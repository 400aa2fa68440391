"""QAT against post-training quantization on the quickstart's corpus, bit width by bit width. See qat_against_ptq.md.

    python analysis/benchmarks/qat_against_ptq.py [SEED]        about 8 minutes a seed on one core

One full-precision trunk, one full-precision branch with cooldown, which is then quantized to every width without
training, and one fused QAT branch per width; all of the same tokens. Prints the table and draws the figure of one seed
(of the initial weights and of the order of the data) under outputs/qat_against_ptq. Finished runs are reused.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the quickstart: more threads do not help a model this small

from qatscale.cli.quickstart import prepare_corpus
from qatscale.study.trunk import branch_config, branch_step, train_or_reuse, trunk_config
from qatscale.tracking.compare import validation_losses
from qatscale.tracking.run_folder import RunFolder
from qatscale.train.evaluate import evaluate_checkpoint

WIDTHS = (1, 1.58, 2, 3, 4)
MODEL = (
    "model.hidden_size=64", "model.layers=4", "model.heads=2", "model.kv_heads=null", "model.intermediate_size=192",
    "optimizer.learning_rate=6e-3", "qat.embedding_bits=auto",
)  # fmt: skip
"""The quickstart's model when the record was made: 279,104 parameters."""


def main(seed: int) -> None:
    data = prepare_corpus(Path("outputs/qat_against_ptq/data"))
    out = data.parent / f"seed{seed}"
    seeds = (f"seed={seed}", f"data.seed={seed}", *MODEL)
    fp = branch_config("fp", out, data, *seeds)
    names = {bits: (f"name=fused-{bits:g}bit", f"qat.bits={bits:g}") for bits in WIDTHS}
    fused = {bits: branch_config("fused", out, data, *seeds, *own) for bits, own in names.items()}
    trunk = trunk_config([fp, *fused.values()], *seeds)
    train_or_reuse(trunk)
    for config in (fp, *fused.values()):
        train_or_reuse(config, f"{trunk.folder}@{branch_step(config)}")

    _, tokens, losses = evaluate_checkpoint(str(fp.folder), WIDTHS)
    qat = {bits: validation_losses(RunFolder(config.folder))["quantized"] for bits, config in fused.items()}
    print(f"\n{tokens:,} held-out tokens; full precision: {losses['fp']:.4f}\n")
    print("| bits | PTQ | QAT (fused) | QAT below PTQ | QAT above full precision |\n|---|---|---|---|---|")
    for bits in WIDTHS:
        ptq = losses[f"ptq{bits:g}"]
        print(f"| {bits:g} | {ptq:.4f} | {qat[bits]:.4f} | {ptq - qat[bits]:.4f} | {qat[bits] - losses['fp']:.4f} |")
    draw(losses, qat, out / "qat_against_ptq.png")


def draw(losses: dict[str, float], qat: dict[float, float], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    places = range(len(WIDTHS))
    ptq = [losses[f"ptq{bits:g}"] for bits in WIDTHS]
    axes.plot(places, ptq, "s--", color="#D55E00", markerfacecolor="white", label="post-training quantization")
    axes.plot(places, [qat[bits] for bits in WIDTHS], "o-", color="#0072B2", label="QAT, fused with the cooldown")
    axes.axhline(losses["fp"], color="#555555", linestyle=":", label="full precision")
    axes.set_xticks(places, [f"{bits:g}" for bits in WIDTHS])
    axes.set_xlabel("bits per weight (embedding and head: at least 4)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
