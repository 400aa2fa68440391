"""Bad inputs: what a person types, and what the answer must hold. `test_cli_bad_inputs.py` types all of it.

The cases run in the folder that `make_world` fills, one after another, and none may change it.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

from wrong_values import NO_SUCH_BITS

from qatlaw.bit_widths import BIT_WIDTHS_TEXT

TRUNK = "train debug name=trunk tokens=2560 batch.micro_batch=4 evaluation.tokens=256 tracking.uri=none data.path=data"
"""10 steps, switch at 5: checkpoints at 5, 8 (the cooldown) and 10."""

WORLD = {
    ("corpus.jsonl",): "200 documents in the field `text`, each with an `id`",
    ("data",): "these, prepared with a vocabulary of 512",
    ("unfinished", "truncated", "altered"): "`data` without its manifest, two bytes short, with two other bytes",
    ("latin1.jsonl", "latin1.txt", "array.json", "torn.jsonl.gz", "empty.jsonl", "blank.jsonl", "page.html"): (
        "what they say"
    ),
    ("thesis",): "a folder with something else in it",
    ("clash.json",): "a ds_config that sets the batch size",
    ("llama",): "the configuration of a Hugging Face Llama of 2 layers of width 32",
    ("llama-scaled", "llama-pickled"): "it, with scaled rotary positions, with weights in pytorch_model.bin",
    ("runs/trunk",): f"`qatscale {TRUNK}`: 5 steps in full precision, 5 in QAT; checkpoints at 5, 8 and 10",
    ("runs/fresh",): "it, before its first checkpoint",
    ("runs/cut", "runs/bent"): "it, the newest checkpoint eight bytes short, with two other bytes",
}
"""What is in the folder, for the reader of the table."""


@dataclass(frozen=True)
class Case:
    what: str
    """Is wrong."""
    typed: str
    """After `qatscale`."""
    tells: tuple[str, ...]
    """What the message must hold whatever else it says: the key, the value, what is allowed, what to do."""

    @property
    def words(self) -> list[str]:
        return shlex.split(self.typed)


TRAIN = "train debug name=x tracking.uri=none"
DRY = "train debug --dry-run"

CASES: dict[str, list[Case]] = {
    "Recipes and overrides": [
        Case("unknown recipe", "train debgu", ("recipe = 'debgu'", "Did you mean 'debug'?")),
        Case("no such recipe file", "train my.yaml", ("recipe = 'my.yaml'", "no such file", "debug, quickstart")),
        Case("unknown key", f"{DRY} qat.bit=2", ("qat.bit:", "Did you mean 'qat.bits'?")),
        Case(
            "two unknown keys and a bad value",
            f"{DRY} qat.bit=2 modle.layers=2",
            ("2 problems", "'qat.bits'", "'model.layers'"),
        ),
        Case(
            "no such bit width",
            f"{DRY} qat.bits={NO_SUCH_BITS}",
            (f"qat.bits = {NO_SUCH_BITS}", BIT_WIDTHS_TEXT),
        ),
        Case("no amount", f"{DRY} tokens=2.5X", ("tokens = '2.5X'", "2.3B, 100M, 50_000")),
        Case("unknown ds_config", f"{TRAIN} engine.ds_config=zero4", ("'zero4'", "Did you mean 'zero3_fp32'?")),
        Case(
            "a ds_config that sets the batch too",
            f"{TRAIN} engine.ds_config=clash.json",
            ("train_batch_size", "belongs to the recipe", "batch.sequences", "clash.json"),
        ),
    ],
    "The timeline": [
        Case(
            "a fused cooldown longer than QAT",
            f"{DRY} schedule.cooldown_fraction=0.6",
            ("schedule.cooldown_fraction = 0.6", "24 ", "20 steps of the QAT phase", "<= 0.5", "qat.fraction >= 0.6"),
        ),
        Case(
            "the same, in tokens",
            f"{DRY} schedule.cooldown_fraction=null schedule.cooldown_tokens=8K",
            ("schedule.cooldown_tokens = 8000", "<= 5120", "qat.fraction >="),
        ),
        Case(
            "a cooldown that is less than a step",
            f"{DRY} schedule.cooldown_fraction=0.001",
            ("schedule.cooldown_fraction = 0.001", "no optimizer step of 40", "=0 for none", "at least 0.025"),
        ),
        Case(
            "a warm-up longer than the full-precision phase",
            f"{DRY} schedule.warmup_tokens=8K",
            ("schedule.warmup_tokens = 8000", "31 ", "20 steps of the full-precision phase", "<= 5120"),
        ),
        Case(
            "two schedules, the second too long for its phase",
            f"{DRY} qat.scheme=sequential qat.warmup_fraction=0.9",
            ("qat.warmup_fraction = 0.9", "18 ", "20 steps of the QAT phase", "qat.warmup_fraction <= 0.8"),
        ),
        Case(
            "a QAT phase of no step",
            f"{DRY} qat.fraction=0.001",
            ("qat.fraction = 0.001", "leaves no QAT step", "0.025", "0.975"),
        ),
        Case(
            "a checkpoint kept after the end",
            f"{DRY} checkpoint.keep_at=[20K]",
            ("checkpoint.keep_at = 20000", "10240 tokens"),
        ),
    ],
    "Data": [
        Case("no data", TRAIN, ("data.path", "qatscale prepare SOURCE --out DIR", "data.path=DIR")),
        Case("no such folder", f"{TRAIN} data.path=nowhere", ("data.path = 'nowhere'", "no such folder", "prepare")),
        Case(
            "data not prepared, or not to the end",
            f"{TRAIN} data.path=unfinished",
            ("data.path = 'unfinished'", "no manifest.json", "qatscale prepare"),
        ),
        Case("a truncated shard", f"{TRAIN} data.path=truncated", ("truncated/train-00000.bin", "bytes", "--restart")),
        Case("an altered shard", f"{TRAIN} data.path=altered", ("altered/train-00000.bin", "checksum", "--restart")),
        Case(
            "a vocabulary larger than the model's",
            f"{TRAIN} data.path=data model.vocab_size=256",
            ("model.vocab_size = 256", "512", "Set model.vocab_size=512 or more"),
        ),
        Case(
            "data too short for one sequence",
            f"{TRAIN} data.path=data data.sequence_length=1000000 tokens=1B schedule.warmup_tokens=null",
            ("data.sequence_length = 1000000", "1000001", "Choose a shorter one or prepare more text"),
        ),
        Case(
            "data too short for one batch",
            f"{TRAIN} data.path=data batch.sequences=100000 tokens=1B schedule.warmup_tokens=null",
            ("batch.sequences = 100000", "sequences of 64 tokens", "Choose a smaller batch or prepare more text"),
        ),
        Case(
            "a batch that does not divide",
            f"{TRAIN} data.path=data batch.micro_batch=3",
            ("batch.sequences = 4", "3 x 1", "Nearest: batch.sequences=3 or 6", "batch.micro_batch=2"),
        ),
    ],
    "prepare": [
        Case(
            "a missing source",
            "prepare corpus.json --out out",
            ("source = 'corpus.json'", "no such file or folder", "Did you mean 'corpus.jsonl'?"),
        ),
        Case("a pattern without a match", "prepare 'part-*.jsonl' --out out", ("'part-*.jsonl'", "no file matches")),
        Case(
            "an unknown ending",
            "prepare page.html --out out",
            ("page.html", "'.html' are not read", ".jsonl", ".parquet"),
        ),
        Case(
            "an unknown field",
            "prepare corpus.jsonl --field txt --out out",
            ("field = 'txt'", "corpus.jsonl, line 1", "id, text", "Did you mean 'text'?"),
        ),
        Case(
            "a bad encoding in a line",
            "prepare latin1.jsonl --out out",
            ("latin1.jsonl, line 2", "byte 0xdf at position 12", "not UTF-8", "iconv"),
        ),
        Case(
            "the same, with a tokenizer and so in another process",
            "prepare latin1.jsonl --tokenizer data --workers 2 --out out",
            ("latin1.jsonl, line 2", "byte 0xdf at position 12", "not UTF-8", "iconv"),
        ),
        Case(
            "a bad encoding in a file of text",
            "prepare latin1.txt --out out",
            ("latin1.txt", "byte 0xdf at position 6", "not UTF-8"),
        ),
        Case(
            "an array for lines",
            "prepare array.json --tokenizer data --workers 1 --out out",
            ("array.json, line 1", "one JSON array", "jq -c '.[]'"),
        ),
        Case(
            "a cut-off download",
            "prepare torn.jsonl.gz --tokenizer data --workers 1 --out out",
            ("torn.jsonl.gz", "damaged or cut off", "again"),
        ),
        Case(
            "an empty source",
            "prepare empty.jsonl --out out",
            ("sources", "no text", "Check the sources and the field"),
        ),
        Case(
            "only empty documents",
            "prepare blank.jsonl --tokenizer data --workers 1 --out out",
            ("blank.jsonl", "2 empty", "none to train on", "Check the field"),
        ),
        Case(
            "an output folder that holds something else",
            "prepare corpus.jsonl --out thesis",
            ("out = 'thesis'", "thesis.txt", "Choose a new folder"),
        ),
        Case(
            "an output folder that is a file",
            "prepare corpus.jsonl --out page.html",
            ("out = 'page.html'", "is a file"),
        ),
        Case(
            "a folder prepared otherwise",
            "prepare corpus.jsonl --vocab-size 400 --out data",
            ("out = 'data'", "vocab_size 512 there, 400 asked for", "--restart"),
        ),
        Case(
            "too many pieces for the text",
            "prepare corpus.jsonl --out out",
            ("vocab_size = 32000", "at most", "Choose that or fewer, or give more text"),
        ),
        Case(
            "a vocabulary beside a tokenizer",
            "prepare corpus.jsonl --tokenizer data --vocab-size 500 --out out",
            ("vocab_size = 500", "has its own", "Leave out one"),
        ),
        Case(
            "no tokenizer",
            "prepare corpus.jsonl --tokenizer my.model --out out",
            ("tokenizer = 'my.model'", "no such file"),
        ),
        Case(
            "a share in percent", "prepare corpus.jsonl --validation-fraction 5 --out out", ("5.0", "0 to 0.5", "0.01")
        ),
        Case(
            "no amount",
            "prepare corpus.jsonl --max-tokens 10X --out out",
            ("--max-tokens", "'10X'", "K, M, B or T", "2.3B"),
        ),
    ],
    "The run's folder; resume and branch": [
        Case(
            "a folder that holds a run of another configuration",
            f"{TRUNK} qat.bits=2",
            ("name = 'trunk'", "qat.bits was 4 and is now 2", "another name"),
        ),
        Case(
            "a resumed run with another configuration",
            "resume runs/trunk tokens=1M",
            ("tokens was 2560 and is now 1000000", "branch"),
        ),
        Case(
            "runs into a file",
            f"{TRAIN} data.path=data output=page.html",
            ("output = 'page.html'", "is a file", "Choose another folder"),
        ),
        Case("no run to resume", "resume nothing", ("run = 'nothing'", "The folder does not exist")),
        Case("a folder that is no run", "resume data", ("run = 'data'", "holds no run.json")),
        Case(
            "nothing to branch from",
            "branch nothing name=x",
            ("checkpoint = 'nothing'", "no run folder", "The folder does not exist"),
        ),
        Case(
            "a folder of runs for a run",
            "branch runs name=x",
            ("checkpoint = 'runs'", "no run folder", "It holds runs; give one: ", "runs/trunk"),
        ),
        Case(
            "a data set for a run",
            "branch data name=x",
            ("checkpoint = 'data'", "no checkpoint folder", "It holds no run.json"),
        ),
        Case(
            "a step without a checkpoint",
            "branch runs/trunk@7 name=x",
            ("'runs/trunk@7'", "no checkpoint at step 7", "5, 8, 10"),
        ),
        Case("a branch without a name", "branch runs/trunk@5 tokens=5120", ("name:", "Add name=NAME")),
        Case("a branch with its parent's name", "branch runs/trunk@5 name=trunk", ("runs/trunk", "another name")),
        Case(
            "a branch from the end",
            "branch runs/trunk name=x",
            ("'runs/trunk'", "step 10 is not before the end", "10 steps", "Train on more tokens"),
        ),
        Case(
            "full precision after the switch",
            "branch runs/trunk@8 name=x qat.scheme=fp",
            ("'runs/trunk@8'", "switch to QAT at step 5", "never switches", "before the switch"),
        ),
        Case(
            "another switch after the switch",
            "branch runs/trunk@8 name=x qat.fraction=0.3",
            ("'runs/trunk@8'", "switch to QAT at step 5", "switches at step 7", "qat.fraction=0.5"),
        ),
        Case(
            "a switch before the branch",
            "branch runs/trunk@5 name=x qat.fraction=0.6",
            ("step 5 lies after", "switch at step 4", "qat.fraction <= 0.5"),
        ),
        Case(
            "another width after the switch",
            "branch runs/trunk@8 name=x qat.bits=2",
            ("qat.bits = 2", "scales are for 4", "before the switch"),
        ),
        Case("another model", "branch runs/trunk@5 name=x model.layers=3", ("model.layers = 3", "which is 2")),
    ],
    "generate": [
        Case("no such model", "generate nowhere --prompt a", ("'nowhere'", "no run folder", "does not exist")),
        Case("a data set", "generate data --prompt a", ("'data'", "no checkpoint folder")),
        Case("nothing to go on from", "generate runs/trunk --prompt ''", ("--prompt = ''", "it has no tokens")),
        Case("no tokens", "generate runs/trunk --prompt a --tokens 0", ("--tokens = 0", "at least 1")),
        Case(
            "a longer text than those of training",
            "generate runs/trunk --prompt a --tokens 500",
            ("--tokens = 500", "sequences of 64 tokens", "--tokens 62 is the most"),
        ),
        Case("no such view", "generate runs/trunk --prompt a --view 2bit", ("--view = '2bit'", "fp or quantized")),
        Case(
            "the quantized view before the switch",
            "generate runs/trunk@5 --prompt a --view quantized",
            ("view = 'quantized'", "not switched to QAT"),
        ),
        Case("no probability", "generate runs/trunk --prompt a --top-p 0", ("--top-p = 0", "above 0, up to 1")),
        Case(
            "weights that are not there",
            "generate llama --prompt a",
            ("model = 'llama'", "transformers cannot load it", "model.safetensors"),
        ),
    ],
    "evaluate": [
        Case(
            "no such run", "evaluate nothing", ("checkpoint = 'nothing'", "no run folder", "The folder does not exist")
        ),
        Case(
            "a run without a checkpoint", "evaluate runs/fresh", ("checkpoint = 'runs/fresh'", "The run has none yet")
        ),
        Case("a data set", "evaluate data", ("checkpoint = 'data'", "no checkpoint folder", "It holds no run.json")),
        Case(
            "a truncated checkpoint",
            "evaluate runs/cut",
            ("runs/cut/checkpoints/step-00000010", "shard-00000-of-00001.safetensors", "step-00000008"),
        ),
        Case(
            "an altered checkpoint",
            "evaluate runs/bent",
            ("runs/bent/checkpoints/step-00000010", "was altered: checksum differs", "step-00000008"),
        ),
        Case(
            "no such bit width",
            f"evaluate runs/trunk --ptq {NO_SUCH_BITS}",
            (f"--ptq = {NO_SUCH_BITS}", BIT_WIDTHS_TEXT),
        ),
        Case("no such data", "evaluate runs/trunk --data nowhere", ("data.path = 'nowhere'", "no such folder")),
        Case("no tokens", "evaluate runs/trunk --tokens 0", ("--tokens = '0'", "above 0")),
        Case(
            "a setting of the harness without it",
            "evaluate runs/trunk --limit 10",
            ("--limit", "no effect without --harness", "Add it, or leave this out"),
        ),
        Case(
            "held-out data of ours for the harness",
            "evaluate runs/trunk --harness arc_easy --data data",
            ("--data", "no effect with --harness", "tasks bring their data"),
        ),
    ],
    "compare, runs, track-sync": [
        Case("a folder that is no run", "compare runs/trunk data", ("run = 'data'", "holds no run.json")),
        Case("no such folder", "compare nothing", ("run = 'nothing'", "does not exist")),
        Case("a run, not a folder of runs", "runs runs/trunk", ("output = 'runs/trunk'", "no runs", "parent folder")),
        Case("a folder without runs", "runs nothing", ("output = 'nothing'", "no runs")),
        Case("a figure of no known format", "compare runs/trunk --figure x.xyz", ("--figure", "x.xyz", ".png, .svg")),
        Case("no run to upload", "track-sync nothing", ("run = 'nothing'", "does not exist")),
    ],
    "plan": [
        Case(
            "an unknown unit",
            "plan --params 396X --tokens 100B --bits 4",
            ("--params = '396X'", "K, M, B or T", "2.3B"),
        ),
        Case(
            "bytes for a number",
            "plan --params 396MB --tokens 100B --bits 4",
            ("--params = '396MB'", "K, M, B or T", "2.3B"),
        ),
        Case(
            "a minus",
            "plan --params=-396M --tokens 100B --bits 4",
            ("--params = '-396M'", "K, M, B or T", "2.3B"),
        ),
        Case(
            "units exchanged: fewer tokens than parameter bytes",
            "plan --params 396B --tokens 100M --bits 4",
            ("0.000505 tokens per parameter byte", "S > 1", "right units"),
        ),
        Case(
            "no such bit width",
            f"plan --params 396M --tokens 100B --bits {NO_SUCH_BITS}",
            (f"--bits = '{NO_SUCH_BITS}'", BIT_WIDTHS_TEXT),
        ),
        Case("no tokens", "plan --params 396M --tokens 0 --bits 4", ("--tokens = '0'", "above 0")),
        Case("no size", "plan --tokens 100B", ("--params", "Add --params 396M")),
        Case("bytes without their unit", "plan memory 500 --tokens 100B", ("BYTES = '500'", "500MB", "512MiB")),
        Case("too little memory for any model", "plan memory 1MB --tokens 1B --bits 4", ("BYTES", "'1MB'", "MB to")),
        Case("two questions", "plan --params 396M memory 500MB --tokens 100B", ("memory", "Write options after it")),
        Case("two sizes", "plan --params 396M --recipe 396m --tokens 100B", ("--params", "contradicts --recipe")),
        Case(
            "hours without a speed",
            "plan compute --gpu-hours 500 --params 396M",
            ("--gpu-hours", "is not a budget", "--gpu-hours --gpu --mfu"),
        ),
        Case(
            "a budget without a size",
            "plan compute --gpu-hours 500 --gpu H200 --mfu 0.4",
            ("--params", "Add --params 396M", "--law fit.json to have the best size chosen"),
        ),
        Case(
            "a GPU that is not known",
            "plan compute --gpu-hours 500 --gpu H300 --mfu 0.4 --params 396M",
            ("--gpu = 'H300'", "not guessed", "--peak-flops", "H200"),
        ),
        Case(
            "an MFU in percent",
            "plan compute --gpu-hours 500 --gpu H200 --mfu 40 --params 396M",
            ("--mfu = '40'", "below 1"),
        ),
        Case(
            "no such law",
            "plan --params 396M --tokens 100B --bits 4 --law nowhere.json",
            ("--law = 'nowhere.json'", "synthetic", "qatscale fit"),
        ),
        Case("no run to plan from", "plan checkpoint nothing --bits 4", ("'nothing'", "The folder does not exist")),
        Case(
            "a step without a checkpoint",
            "plan checkpoint runs/trunk@7 --bits 4",
            ("'runs/trunk@7'", "no checkpoint at step 7", "5, 8, 10"),
        ),
        Case(
            "a checkpoint of the QAT phase",
            "plan checkpoint runs/trunk@8 --bits 4",
            ("'runs/trunk@8'", "trained in QAT since step 5", "up to 5"),
        ),
    ],
    "export": [
        Case(
            "a folder that is not empty",
            "export runs/trunk --out thesis",
            ("--out = 'thesis'", "not empty", "Choose another folder"),
        ),
        Case("an unknown format", "export runs/trunk --format ggfu --out out", ("--format = 'ggfu'", "'gguf'")),
        Case(
            "a run that is not finished",
            "export runs/trunk@8 --out out",
            ("'runs/trunk@8'", "at step 8 of 10", "qatscale resume", "--unfinished"),
        ),
        Case(
            "full precision in a format of quantized weights",
            "export runs/trunk@5 --unfinished --format gguf --out out",
            ("--format = 'gguf'", "has not switched to QAT", "--ptq 4", "--format hf"),
        ),
        Case(
            "other scales for a model that has its own",
            "export runs/trunk --ptq 4 --out out",
            ("--ptq = 4", "scales that were trained", "Leave it out"),
        ),
        Case(
            "a shape that a format does not hold",
            "export runs/trunk --format compressed-tensors --out out",
            ("embed.weight (4 bits, 512 x 64)", "Linear layers", "--fallback", "MiB more"),
        ),
        Case(
            "no tokenizer",
            "export runs/trunk --data nowhere --out out",
            ("data.path = 'nowhere'", "--tokenizer FOLDER", "--tokenizer none"),
        ),
        Case(
            "no such run",
            "export nothing --out out",
            ("checkpoint = 'nothing'", "no run folder", "The folder does not exist"),
        ),
        Case(
            "a truncated checkpoint",
            "export runs/cut --out out",
            ("runs/cut/checkpoints/step-00000010", "step-00000008"),
        ),
    ],
    "convert": [
        Case(
            "no such run",
            "convert nothing --to hf --out out",
            ("checkpoint = 'nothing'", "no run folder", "The folder does not exist"),
        ),
        Case(
            "a folder that is nothing of the kind",
            "convert thesis --to hf --out out",
            ("source = 'thesis'", "it holds thesis.txt", "RUN@STEP", "Hugging Face folder"),
        ),
        Case("an unknown format", "convert runs/trunk --to hg --out out", ("--to = 'hg'", "checkpoint, universal, hf")),
        Case(
            "the format it has",
            "convert runs/trunk --to checkpoint --out out",
            ("--to = 'checkpoint'", "runs/trunk is a training checkpoint already"),
        ),
        Case(
            "a folder that is not empty",
            "convert runs/trunk --to universal --out thesis",
            ("--out = 'thesis'", "not empty", "Choose another folder"),
        ),
        Case(
            "a truncated checkpoint",
            "convert runs/cut --to universal --out out",
            ("runs/cut/checkpoints/step-00000010", "step-00000008"),
        ),
        Case(
            "a recipe for what has one",
            "convert runs/trunk --to universal --out out --recipe debug",
            ("--recipe = 'debug'", "has its own recipe", "Leave it out"),
        ),
        Case(
            "no recipe for what has none",
            "convert llama --to checkpoint --out out",
            ("--recipe", "is needed", "data, batch, optimizer and schedule", "qatscale recipes"),
        ),
        Case(
            "a recipe of another model",
            "convert llama --to checkpoint --out out --recipe debug",
            ("2 problems", "model.hidden_size = 64", "says 32", "Add model.intermediate_size=88"),
        ),
        Case(
            "a quantized scheme for weights that are not",
            "convert llama --to checkpoint --out out --recipe debug qat.scheme=scratch",
            ("qat.scheme = 'scratch'", "full precision", "for the branches"),
        ),
        Case(
            "a run named otherwise than its folder",
            "convert llama --to checkpoint --out out --recipe debug name=fp",
            ("name = 'fp'", "named by its folder, --out"),
        ),
        Case(
            "more tokens seen than the recipe has",
            "convert llama --to checkpoint --out out --recipe debug --trained-tokens 1B model.hidden_size=32 "
            "model.intermediate_size=88",
            ("tokens = 10240", "has seen 1B already", "Set tokens to what a branch is to reach"),
        ),
        Case(
            "an architecture that ours is not",
            "convert llama-scaled --to checkpoint --out out --recipe debug",
            ("rope_parameters.rope_type = 'linear'", "only 'default'", "llama-scaled/config.json"),
        ),
        Case(
            "weights that can hold code",
            "convert llama-pickled --to checkpoint --out out --recipe debug model.hidden_size=32 "
            "model.intermediate_size=88",
            ("llama-pickled", "can hold code and are not read", "save_pretrained"),
        ),
        Case(
            "a Hugging Face folder to branch from",
            "branch llama name=x",
            ("checkpoint = 'llama'", "Hugging Face", "qatscale convert llama --to checkpoint"),
        ),
    ],
}


# --- the folder that the cases run in ---


def make_world(folder: Path) -> None:
    """Fill `folder` with what `WORLD` says: real data, a real run, and damaged copies of both."""
    with contextlib.chdir(folder):
        _write_sources()
        _succeed("prepare corpus.jsonl --vocab-size 512 --validation-fraction 0.1 --workers 1 --out data")
        shutil.copytree("data", "unfinished")
        Path("unfinished/manifest.json").unlink()
        _shorten(Path(shutil.copytree("data", "truncated"), "train-00000.bin"), 2)
        _bend(Path(shutil.copytree("data", "altered"), "train-00000.bin"))
        _succeed(TRUNK)
        for step in Path(shutil.copytree("runs/trunk", "runs/fresh"), "checkpoints").iterdir():
            shutil.rmtree(step)
        shard = "checkpoints/step-00000010/shard-00000-of-00001.safetensors"
        _shorten(Path(shutil.copytree("runs/trunk", "runs/cut"), shard), 8)
        _bend(Path(shutil.copytree("runs/trunk", "runs/bent"), shard))


def _write_sources() -> None:
    draw = random.Random(0)
    syllables = [c + v + e for c in "bdfgklmnprstvz" for v in "aeiou" for e in ("", "n", "r", "s")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(800)]
    texts = [" ".join(draw.choices(words, k=120)) + "." for _ in range(200)]
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()
    contents = {
        "corpus.jsonl": lines,
        "latin1.jsonl": b'{"text": "fine"}\n{"text": "Ma\xdf"}\n',
        "latin1.txt": "Das Maß der Dinge\n".encode("latin-1"),
        "array.json": b'[{"text": "one"}, {"text": "two"}]\n',
        "torn.jsonl.gz": gzip.compress(lines, mtime=0)[:5000],
        "empty.jsonl": b"",
        "blank.jsonl": b'{"text": ""}\n{"text": " "}\n',
        "page.html": b"<p>Hello</p>\n",
        "thesis/thesis.txt": b"mine\n",
        "clash.json": b'{"zero_optimization": {"stage": 1}, "train_batch_size": 8}\n',
    }
    llama = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2,
        "num_attention_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    contents["llama/config.json"] = contents["llama-pickled/config.json"] = json.dumps(llama).encode()
    contents["llama-pickled/pytorch_model.bin"] = b"PK"
    contents["llama-scaled/config.json"] = json.dumps(
        llama | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    ).encode()
    for name in ("thesis", "llama", "llama-pickled", "llama-scaled"):
        Path(name).mkdir()
    for name, content in contents.items():
        Path(name).write_bytes(content)


def _succeed(typed: str) -> None:
    code, _, error = run_command(shlex.split(typed))
    assert code == 0, error


def _shorten(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def _bend(path: Path) -> None:
    """Change two bytes near the end, where no header is."""
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    content[-10] ^= 1
    path.write_bytes(content)


def run_command(words: list[str]) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `qatscale WORDS`, in this process and through the real entry."""
    from qatscale.cli import main

    out, error, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), error.getvalue()
