"""How much memory an export takes beside the size of its model, largest tensor and clients left out. See exports.md.

    python analysis/benchmarks/exports_memory.py [LAYERS]       default 24 blocks of width 1024; about two minutes

The model is drawn, not trained, and quantized on the way (--ptq 4), which is the export that computes most. Prints the
peak of anonymous memory (what is mapped from files is the system's to drop) above that of the imports.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from qatscale.config.schema import ModelConfig
from qatscale.config.sizes import count_parameters
from qatscale.export.formats import FORMATS
from qatscale.model.hugging_face import export_hugging_face
from qatscale.model.initial_weights import initialise
from qatscale.model.llama import Llama

MODEL = {"vocab_size": 32_000, "hidden_size": 1024, "heads": 16, "intermediate_size": 2816}
QATSCALE = [sys.executable, "-c", "from qatscale.cli import main; main()"]


def peak_of(command: list[str], folder: Path) -> int:
    """Bytes of anonymous memory at its most, looked at every 10 ms."""
    process = subprocess.Popen(command, cwd=folder)
    status, most = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
        most = max(most, int(lines[0].split()[1]) * 1024 if lines else 0)
        time.sleep(0.01)
    assert process.returncode == 0, command
    return most


def main(layers: int) -> None:
    config = ModelConfig(**MODEL, layers=layers)
    largest = max(MODEL["vocab_size"], MODEL["intermediate_size"]) * MODEL["hidden_size"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = Llama(config)
        initialise(model, 0)
        export_hugging_face(model, config, folder / "hf", sequence_length=128)
        del model
        shape = [f"model.{key}={value}" for key, value in {**MODEL, "layers": layers}.items()]
        own = ["qat.scheme=fp", "qat.fraction=auto", f"data.path={folder}", *shape]
        convert = ["convert", "hf", "--to", "checkpoint", "--out", "runs/drawn", "--recipe", "debug", *own]
        subprocess.run([*QATSCALE, *convert], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        base = peak_of([sys.executable, "-c", "import qatscale.export.export, transformers.models.llama"], folder)
        for format in FORMATS:
            out = f"out-{format}"
            line = ["export", "runs/drawn", "--format", format, "--out", out, "--tokenizer", "none", "--no-verify"]
            line += ["--fallback"] + (["--ptq", "4"] if format != "hf" else [])
            began = time.perf_counter()
            above = peak_of([*QATSCALE, *line], folder) - base
            seconds, total = time.perf_counter() - began, count_parameters(config)
            print(
                f"| {layers} | {format} | {4 * total / 2**20:.0f} | {4 * largest / 2**20:.0f} | {above / 2**20:.0f} | "
                f"{seconds:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 24)
