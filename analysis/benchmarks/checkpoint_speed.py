"""What a checkpoint costs: how long training stands still, until it is on disk, what steps beside it cost, loading.

    python analysis/benchmarks/checkpoint_speed.py [--recipe R] [--folder DISK] [--threads N] [--out FILE]

One process with a real engine; the peer is DeepSpeed's own save_checkpoint and load_checkpoint on the same engine. Ours
syncs its files to the disk and takes checksums, which loading compares; DeepSpeed's does neither. So its save is shown
as it is where standing still is compared, and with its files synced afterwards where being on disk is.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from measure import Variant, interleaved, use_threads
from result import Result, Table, options_of, report
from torch import Tensor

from qatlaw.files import sync
from qatscale.config.ds_config import merge_ds_config, run_ds_config
from qatscale.config.recipe import load_run_config
from qatscale.data.manifest import Manifest, TokenizerCard
from qatscale.engine.checkpoints.files import list_checkpoints
from qatscale.engine.checkpoints.load import load_checkpoint
from qatscale.engine.checkpoints.save import slices_of
from qatscale.engine.layout import Layout
from qatscale.engine.runtime import start_runtime
from qatscale.engine.step import train_step
from qatscale.supervise.watchdog import Watchdog
from qatscale.train.checkpointing import AsyncCheckpointer, HostCopy
from qatscale.train.setup import assemble

SEQUENCE = 128
"""Tokens of the one sequence that a step trains on: a step only has to happen."""
COPY, BACKGROUND, BLOCKING, DEEPSPEED = (
    "plain copy to host memory", "checkpoint.background", "checkpoint.background=false", "DeepSpeed save_checkpoint",
)  # fmt: skip
WRITE = "plain write of the same bytes"
NO_DATA = Manifest(
    qatscale="", dtype="uint16", sources=[], identity={}, empty_documents=0, splits={},
    tokenizer=TokenizerCard(kind="unknown", fingerprint=None, vocab_size=1, eos_id=None, folder=None),
)  # fmt: skip


class Bench:
    """A trained-in engine and the ways to save it into `folder`."""

    def __init__(self, recipe: str, folder: Path) -> None:
        self.folder, self.runtime = folder, start_runtime()
        shape = [f"data.sequence_length={SEQUENCE}", "batch.sequences=1", "batch.micro_batch=1", "qat.scheme=fp"]
        on_cpu = ["engine.ds_config=zero1_fp32"] if self.runtime.device.type == "cpu" else []  # bf16 is slow there
        config = self.config = load_run_config(recipe, [*shape, *on_cpu, "engine.compile=off", "qat.fraction=auto"])
        ds_config = merge_ds_config(config, run_ds_config(config), 1)
        self.job = assemble(config, Layout(), ds_config, self.runtime, switch_step=None)
        self.topology, self.engine, self.masters = self.job.topology, self.job.engine, self.job.masters
        self.batch = torch.randint(0, config.model.vocab_size, (1, SEQUENCE + 1))
        self.done = 0
        self.train(1)  # Adam's moments come with its first step
        self.slices = slices_of(self.masters)
        self.bytes = sum(values.nbytes for values in self.slices.values())
        states = [(partition, self.masters.adam_state(partition)) for partition in self.masters.by_partition()]
        self.flat: dict[str, Tensor] = {
            f"{kind}/{index}": values
            for index, (partition, state) in enumerate(states)
            for kind, values in {"weight": partition, **state}.items()
            if values.dim()
        }
        self.plain = HostCopy(self.flat)
        self.checkpointers = {name: self._checkpointer(name) for name in (BACKGROUND, BLOCKING)}
        self.saves = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            for _loss in train_step(self.engine, self.batch, 1, self.topology):
                pass
            self.done += 1

    def _checkpointer(self, name: str) -> AsyncCheckpointer:
        checkpoint = self.config.checkpoint.model_copy(update={"background": name == BACKGROUND, "keep": 1})
        return AsyncCheckpointer(
            self.folder / name, self.config.model_copy(update={"checkpoint": checkpoint}), self.job,
            Watchdog(self.runtime, self.folder, None), recipe_hash="", data=NO_DATA, saved=lambda *_: None,
            notice=lambda _: None,
        )  # fmt: skip

    def save(self, name: str) -> None:
        self.saves += 1
        self.checkpointers[name].save(self.saves, "interval")

    def save_deepspeed(self) -> None:
        self.engine.save_checkpoint(str(self.folder / "deepspeed"), tag="bench")

    def sync_deepspeed(self) -> None:
        for path in (self.folder / "deepspeed").rglob("*"):
            sync(path)

    def write_plainly(self) -> None:
        """The host copy into one file, and onto the disk: what any save of these bytes takes at least."""
        (self.folder / "plain").mkdir()
        with (self.folder / "plain" / "file").open("wb") as file:
            for values in self.plain.take(self.flat).values():
                self.plain.wait()
                file.write(values.view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        for checkpointer in self.checkpointers.values():
            checkpointer.__exit__(None, None, None)
        self.plain.close()
        self.engine.destroy()

    def clear(self) -> None:
        """Whatever was saved, so that the next one finds the disk and the page cache as this one did."""
        for folder in self.folder.iterdir():
            shutil.rmtree(folder)

    def load(self) -> None:
        load_checkpoint(list_checkpoints(self.folder / BLOCKING)[-1], self.masters, self.runtime)

    def load_deepspeed(self) -> None:
        path, _ = self.engine.load_checkpoint(str(self.folder / "deepspeed"), tag="bench")
        assert path is not None, "DeepSpeed did not find its checkpoint"

    def written(self) -> int:
        """Bytes."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


def run(
    *, threads: int | None, quick: bool, recipe: str | None = None, folder: Path = Path(), rounds: int = 5
) -> Result:
    """recipe: None = 86m, quick: quickstart. folder: on the disk to be measured; a temporary folder in it is used."""
    used = use_threads(threads)
    rounds, recipe = (2 if quick else rounds), recipe or ("quickstart" if quick else "86m")
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=folder) as temporary:
        bench = Bench(recipe, Path(temporary))
        try:
            tables = [*_saving(bench, rounds), _beside(bench, rounds), _loading(bench, rounds)]
            settings = {
                "recipe": recipe,
                "parameters": sum(shape.numel() for shape in bench.masters.shapes.values()),
                "ds_config": bench.config.engine.ds_config,
                "device": bench.runtime.device_name,
                "threads": used,
                "rounds": rounds,
                "quick": quick,
            }
        finally:
            bench.close()
    return Result("checkpoint", settings, tables)


def _saving(bench: Bench, rounds: int) -> list[Table]:
    """How long the loop stands still; how long until the files are on the disk."""
    durable: dict[str, list[float]] = {}
    written: dict[str, dict[str, float | str]] = {}
    began = 0.0

    def lasting(name: str, work: Callable[[], object]) -> Callable[[], None]:
        def timed() -> None:
            nonlocal began
            began = time.perf_counter()
            work()

        durable[name] = []
        return timed

    def until(name: str, work: Callable[[], object] = lambda: None) -> Callable[[], None]:
        def timed() -> None:
            work()
            durable[name].append(time.perf_counter() - began)
            written[name] = {"MB written": bench.written() / 1e6}
            bench.clear()

        return timed

    variants = [
        Variant(COPY, lambda: bench.plain.take(bench.flat), bench.bytes),
        Variant(BACKGROUND, lasting(BACKGROUND, lambda: bench.save(BACKGROUND)), bench.bytes,
                until(BACKGROUND, bench.checkpointers[BACKGROUND].wait)),
        Variant(BLOCKING, lasting(BLOCKING, lambda: bench.save(BLOCKING)), bench.bytes, until(BLOCKING)),
        Variant(DEEPSPEED, lasting(DEEPSPEED, bench.save_deepspeed), bench.bytes,
                until(DEEPSPEED, bench.sync_deepspeed)),
        Variant(WRITE, lasting(WRITE, bench.write_plainly), bench.bytes, until(WRITE)),
    ]  # fmt: skip
    seconds = interleaved(variants, rounds, warmup=1)
    standing, lasted = [v for v in variants if v.name != WRITE], [v for v in variants if v.name != COPY]
    written[BACKGROUND]["MB of host memory"] = bench.bytes / 1e6
    amount = [f"Bytes a second are of masters and moments, {bench.bytes / 1e6:,.0f} MB."]
    return [
        Table.of("Training stands still", "bytes", standing, seconds, reference=COPY, notes=[
            *amount, "checkpoint.background=false ends with files synced to the disk, DeepSpeed's save does not.",
        ]),
        Table.of("Until the checkpoint is on the disk", "bytes", lasted,
                 {name: times[-rounds:] for name, times in durable.items()}, reference=WRITE, extra=written, notes=[
            *amount, "All with fsync; DeepSpeed's files are synced after its save. Ours includes SHA-256 of all bytes.",
        ]),
    ]  # fmt: skip


def _beside(bench: Bench, rounds: int) -> Table:
    """Steps while a checkpoint is written, the standing still at their begin included."""
    began = time.perf_counter()
    bench.save(BLOCKING)
    write = time.perf_counter() - began
    began = time.perf_counter()
    bench.train(1)
    steps = min(50, max(2, round(write / (time.perf_counter() - began))))

    def saving_and_training() -> None:
        bench.save(BACKGROUND)
        bench.train(steps)

    def blocking_and_training() -> None:
        bench.save(BLOCKING)
        bench.train(steps)

    tokens = float(steps * SEQUENCE)
    variants = [
        Variant("no checkpoint", lambda: bench.train(steps), tokens),
        Variant(BACKGROUND, saving_and_training, tokens, bench.checkpointers[BACKGROUND].wait),
        Variant(BLOCKING, blocking_and_training, tokens),
    ]
    seconds = interleaved(variants, max(2, rounds // 2), warmup=0)
    about = f"{steps} steps of {SEQUENCE} tokens, begun by a checkpoint: about as long as its writing takes"
    return Table.of(about, "tokens", variants, seconds, reference="no checkpoint")


def _loading(bench: Bench, rounds: int) -> Table:
    variants = [
        Variant("ours", bench.load, bench.bytes),
        Variant("DeepSpeed load_checkpoint", bench.load_deepspeed, bench.bytes),
    ]
    bench.save(BLOCKING)
    bench.save_deepspeed()
    seconds = interleaved(variants, max(2, rounds // 2), warmup=1)
    notes = ["From the page cache. Ours compares the checksums of all files first, DeepSpeed has none."]
    return Table.of("Loading", "bytes", variants, seconds, reference="DeepSpeed load_checkpoint", notes=notes)


def main(given: Sequence[str] | None = None) -> None:
    parser = options_of(__doc__)
    parser.add_argument("--recipe", help="the size of the model (default: 86m)")
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to be measured; left as it was")
    parser.add_argument("--threads", type=int, help="CPU threads of torch (default: OMP_NUM_THREADS, or all cores)")
    options = parser.parse_args(given)
    own = {"recipe": options.recipe, "folder": options.folder, "threads": options.threads}
    report(run(quick=options.quick, **own), options)


if __name__ == "__main__":
    main()
