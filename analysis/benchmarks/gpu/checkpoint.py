"""What a checkpoint costs on a GPU: how long training stands still against the copy of the same bytes to the host.

    python analysis/benchmarks/gpu/checkpoint.py --device cuda --out DIR [--folder DISK]   recipe 396m
    python analysis/benchmarks/gpu/checkpoint.py --device cpu --out DIR                    a test of this script

The tables of `checkpoint_speed.py`, with DeepSpeed's save and load on the same engine, in under 3 minutes. Writes
DIR/checkpoint.json and DIR/checkpoint.md; exit code 0: a save in the background took less than twice the copy, and what
it wrote is, bit for bit, what the GPU held at that step although steps were taken meanwhile.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from record import Record, about_here, require

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "analysis"), str(ROOT / "analysis" / "benchmarks")]

MOST = {"cuda": 2.0, "cpu": float("inf")}
"""Times the plain copy: how long a save may stand still. Nothing can be said of a model of 4 MB."""
ROUNDS = 3


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=MOST, required=True)
    parser.add_argument("--out", type=Path, required=True, help="for the record alone")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    parser.add_argument("--recipe", help="default: 396m, on a CPU quickstart")
    parser.add_argument("--seconds", type=float, default=170, help="begin no check after so many")
    parser.add_argument("--commit", help="where the code lies in no repository")
    return parser.parse_args(given)


def tables(options: argparse.Namespace, recipe: str) -> Mapping[str, Any]:
    """Ratios and seconds of every row, by table and row."""
    from checkpoint_speed import BACKGROUND, run

    rounds = 2 if options.device == "cpu" else ROUNDS
    result = run(threads=None, quick=False, recipe=recipe, folder=options.folder, rounds=rounds)
    result.write(options.out / "checkpoint_tables.json")
    numbers: dict[str, Any] = {}
    for table in result.tables:
        for row in table.rows:
            numbers[f"{table.title}: {row.name}, s"] = row.seconds
            numbers[f"{table.title}: {row.name}, GB/s"] = row.per_second / 1e9
    ratio = result.tables[0].row(BACKGROUND).ratio
    numbers = {"stands still, times the copy": ratio, "parameters": result.settings["parameters"], **numbers}
    return require(ratio < MOST[options.device], f"{ratio:.2f} times the copy", numbers)


def right(options: argparse.Namespace, recipe: str) -> Mapping[str, Any]:
    """Save, train on at once, and compare what was written with what the engine held."""
    import torch
    from checkpoint_speed import BACKGROUND, Bench

    from qatscale.engine.checkpoints.files import list_checkpoints
    from qatscale.engine.checkpoints.load import load_checkpoint

    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        bench = Bench(recipe, Path(temporary))
        expected = {name: values.clone() for name, values in bench.slices.items()}
        bench.save(BACKGROUND)
        bench.train(3)
        bench.checkpointers[BACKGROUND].wait()
        moved = sum(not torch.equal(bench.slices[name], value) for name, value in expected.items())
        (written,) = list_checkpoints(Path(temporary) / BACKGROUND)
        load_checkpoint(written, bench.masters, bench.runtime)
        differing = [name for name, value in expected.items() if not torch.equal(bench.slices[name], value)]
        bench.close()
    numbers = {"slices": len(expected), "moved by the steps": moved, "differing": len(differing)}
    return require(moved > 0 and not differing, f"differing: {differing[:3]}", numbers)


def main() -> int:
    options = arguments()
    if options.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    recipe = options.recipe or {"cuda": "396m", "cpu": "quickstart"}[options.device]
    about = {**about_here(options.device, options.commit), "recipe": recipe}
    record = Record(options.out, "checkpoint", f"A checkpoint on {options.device}", about, options.seconds)
    record.check("the state of its step, bit for bit, while training goes on", lambda: right(options, recipe))
    record.check("how long training stands still", lambda: tables(options, recipe))
    print(f"{len(record.failed)} of {len(record.checks)} checks failed")
    return 1 if record.failed else 0


if __name__ == "__main__":
    sys.exit(main())
