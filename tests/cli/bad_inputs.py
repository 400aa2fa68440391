"""Bad inputs and the folder that they are typed in. As a script: a Markdown page of all of them with the answers.

python -m tests.cli.bad_inputs > bad_inputs.md
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import re
import shlex
import shutil
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    title: str
    typed: str
    """After `qatscale`."""
    wrong: str
    """What is wrong with it, for people."""
    key: str
    """That the message must name."""
    facts: tuple[str, ...]
    """Names, numbers and commands that the message must hold."""


def cases() -> list[Case]:
    sections = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    return [
        Case(title, typed, wrong, key, tuple(facts))
        for title, rows in sections.items()
        for typed, (wrong, key, *facts) in rows.items()
    ]


def run_command(words: list[str]) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `qatscale WORDS`, in this process and through the real entry point."""
    from qatscale.cli import main

    out, error, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            main(words)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, out.getvalue(), error.getvalue()


def copy_world(world: Path, folder: Path) -> None:
    """A folder of its own for a case; files are shared, since no case may change one."""
    shutil.copytree(world, folder, copy_function=os.link)


def make_world(folder: Path) -> None:
    """Text, prepared data, a run of ten steps with a switch at 5 and checkpoints at 5, 8 and 10, and damaged copies."""
    with contextlib.chdir(folder):
        _write_sources()
        _succeed("prepare corpus.jsonl --vocab-size 512 --validation-fraction 0.1 --workers 1 --out data")
        shutil.copytree("data", "unfinished")
        Path("unfinished/manifest.json").unlink()
        _shorten(Path(shutil.copytree("data", "truncated"), "train-00000.bin"), 2)
        _bend(Path(shutil.copytree("data", "altered"), "train-00000.bin"))
        run = "name=trunk tokens=2560 batch.micro_batch=4 evaluation.tokens=256 tracking.uri=none data.path=data"
        _succeed(f"train debug {run}")
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
    bomb = ["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))]
    llama = {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2,
        "num_attention_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    scaled = llama | {"rope_scaling": {"type": "linear", "factor": 2.0}}
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
        "bomb.yaml": "\n".join(bomb).encode(),
        "deep.yaml": b"a: " + b"[" * 2000,
        "clash.json": b'{"zero_optimization": {"stage": 1}, "train_batch_size": 8}\n',
        "deep.json": b'{"bf16": ' + b"[" * 100_000,
        "digits.json": b'{"zero_optimization": {"stage": 1, "reduce_bucket_size": -1' + b"0" * 400 + b"}}",
        "llama/config.json": json.dumps(llama).encode(),
        "llama-pickled/config.json": json.dumps(llama).encode(),
        "llama-pickled/pytorch_model.bin": b"PK",
        "llama-scaled/config.json": json.dumps(scaled).encode(),
    }
    for name, content in contents.items():
        Path(name).parent.mkdir(exist_ok=True)
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


def page() -> str:
    """Every case with the answer that it gets now."""
    parts = ["# Bad inputs, and what each prints\n\nEach exits with status 2 before anything is trained."]
    title = ""
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder).resolve() / "world"
        world.mkdir()
        make_world(world)
        for i, case in enumerate(cases()):
            if case.title != title:
                title = case.title
                parts.append(f"\n## {title}\n\n| what is wrong | typed | printed |\n| --- | --- | --- |")
            place = world.with_name(str(i))
            copy_world(world, place)
            with contextlib.chdir(place):
                error = run_command(shlex.split(case.typed))[2].replace(f"{place}/", "")
            shown = re.sub(r"([|*]|<(?=\w))", r"\\\1", error.strip()).replace("\n", "<br>")
            parts.append(f"| {case.wrong} | `qatscale {case.typed}` | {shown} |")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page())
