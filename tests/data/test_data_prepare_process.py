"""`prepare` as a process of its own: killed half-way, and how much memory it takes."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from qatscale.data.encode import encode_all
from qatscale.data.prepare import prepare
from qatscale.data.reader import TokenStream
from qatscale.data.sources import Batch
from qatscale.errors import FailedError, UserError
from tests.data.data_corpora import documents, folder_bytes, write_jsonl

SCRIPT = """
import re, sys
from qatscale.data.prepare import prepare
if __name__ == "__main__":
    source, out, tokenizer, shard_tokens, workers = sys.argv[1:]
    prepare([source], out, tokenizer=tokenizer, shard_tokens=int(shard_tokens), workers=int(workers))
    print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


def command(tmp_path: Path, *arguments: object) -> list[str]:
    script = tmp_path / "run_prepare.py"
    script.write_text(SCRIPT)
    return [sys.executable, str(script), *map(str, arguments)]


def corpus(path: Path, megabytes: int) -> Path:
    """Documents of known size; the same text over and over, behind a number of its own."""
    texts = documents(400, words=240)
    total, chosen, i = 0, [], 0
    while total < megabytes * 10**6:
        chosen.append(f"{i} {texts[i % len(texts)]}")
        total += len(chosen[-1])
        i += 1
    return write_jsonl(path, chosen)


@pytest.mark.dist
def test_sigkill_half_way(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = corpus(tmp_path / "a.jsonl.gz", 8)
    out = tmp_path / "out"
    process = subprocess.Popen(command(tmp_path, source, out, tokenizer_folder, 100_000, 2), stdout=subprocess.DEVNULL)
    progress = out / "progress.json"
    while process.poll() is None and not (progress.is_file() and json.loads(progress.read_text())["part"] >= 3):
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was through before it could be killed"
    assert len(workers) >= 2
    assert psutil.wait_procs(workers, timeout=10)[1] == [], "workers outlived their parent"
    with pytest.raises(UserError, match="not to the end"):
        TokenStream.open(out, "train")
    subprocess.run(command(tmp_path, source, out, tokenizer_folder, 100_000, 2), check=True, stdout=subprocess.DEVNULL)
    prepare([str(source)], tmp_path / "whole", tokenizer=str(tokenizer_folder), shard_tokens=100_000, workers=1)
    assert folder_bytes(out) == folder_bytes(tmp_path / "whole")


@pytest.mark.dist
def test_ctrl_c_again_and_again_while_workers_start(tmp_path: Path, tokenizer_folder: Path) -> None:
    source = corpus(tmp_path / "a.jsonl", 9)
    words = ["prepare", source, "--out", tmp_path / "out", "--tokenizer", tokenizer_folder, "--workers", "2"]
    command = [sys.executable, "-c", "import signal\nsignal.signal(2, signal.default_int_handler)\n"]
    command[-1] += "from qatscale.cli import main\nmain()"
    process = subprocess.Popen(
        [*command, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    )
    while process.poll() is None and not (workers := psutil.Process(process.pid).children()):
        time.sleep(0.002)
    while process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        time.sleep(0.05)
    said, _ = process.communicate()
    assert (process.returncode, "Traceback" in said) == (130, False), said
    assert psutil.wait_procs(workers, timeout=10)[1] == []


def test_processes_that_cannot_share_memory_are_a_sentence(tokenizer_folder: Path) -> None:
    """A limit on the size of files stops their semaphores, as a full or read-only /dev/shm does."""
    encoded = encode_all([Batch([], None)] * 10, tokenizer_folder, 0.01, workers=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(FailedError, match=r"^/dev/shm: File too large\. --workers 1"):
            next(encoded)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, tokenizer_folder: Path) -> None:
    peaks = []
    for megabytes in (8, 40):
        source = corpus(tmp_path / f"{megabytes}.jsonl.gz", megabytes)
        arguments = command(tmp_path, source, tmp_path / f"out{megabytes}", tokenizer_folder, 10**6, 1)
        peaks.append(int(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout) / 1000)
    # 32 MB more text; what is kept of it are 4 bytes a document until a shard ends, and the word cache.
    assert peaks[1] - peaks[0] < 10, peaks
