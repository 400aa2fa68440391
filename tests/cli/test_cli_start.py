"""Light commands answer without the heavy libraries; that is what keeps them quick."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from qatlaw.results import write_results
from qatlaw.run_folders import RunRecord
from qatscale.cli.app import COMMANDS as COMMANDS_BY_NAME
from qatscale.cli.app import app
from qatscale.files import write_json
from qatscale.study.folder import StudyJob

COMMANDS = (
    "recipes",
    "plan compute --gpu-hours 500 --gpu H200 --mfu 0.4 --recipe 396m --bits 4 --law synthetic",
    "plan memory 500MB --tokens 100B --bits 4 --format gguf",
)  # fmt: skip
HELP = (f"{name} --help" for name in (*COMMANDS_BY_NAME, "plan memory", "plan fusion", "study plan", "study status"))
LISTS = ("--help", "--version", "runs .", "config", *HELP)
"""Commands that compute nothing, and so wait for no NumPy."""
SCRIPT = """
import contextlib, io, shlex, sys
from qatscale.cli import main
for command in sys.argv[2:]:
    said = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main(shlex.split(command))
        except SystemExit as exited:
            code = exited.code
    assert not code or command == "runs .", said.getvalue()  # no run lies here
    print(command, sorted(set(sys.argv[1].split()) & set(sys.modules)))
"""
HEAVY = "torch deepspeed transformers datasets pandas scipy matplotlib mlflow"


@pytest.mark.parametrize(
    ("commands", "heavy"),
    [
        (COMMANDS, HEAVY),
        (LISTS, f"{HEAVY} numpy"),
        (("--help",), f"{HEAVY} numpy yaml pydantic qatscale.cli.train qatscale.config"),
    ],
)
def test_light_commands_import_nothing_heavy(commands: tuple[str, ...], heavy: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, heavy, *commands], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{command} []" for command in commands]


def test_the_status_of_a_study_waits_for_no_library(tmp_path: Path) -> None:
    job = StudyJob("a", None, 0, 10, (), 256, 1e6, 100, 1)
    write_json(tmp_path / "tree.json", [asdict(job), asdict(replace(job, name="b", parent="a", start=5))])
    write_results(tmp_path / "results.csv", [RunRecord("a", "a", "FINISHED", {"val_loss": 3.0}, {})])
    command = [sys.executable, "-c", SCRIPT, f"{HEAVY} numpy", f"study status {tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"study status {tmp_path} []"]


def test_the_help_of_the_program_says_of_each_command_what_its_own_help_does() -> None:
    program: Any = typer.main.get_command(app)
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "300"}).output
    for name in COMMANDS_BY_NAME:
        assert program.commands[name].help.partition("\n\n")[0].replace("\n", " ") in shown, name


def test_ctrl_c_while_the_program_starts_is_no_traceback() -> None:
    press = "from importlib import import_module\nimport signal, sys\nfrom qatscale.cli import main\n"
    press += "signal.signal(2, signal.default_int_handler)\n"  # not where whoever started this ignores it
    press += "sys.argv, sys.meta_path[:0] = ['qatscale', 'recipes'], [sys]\n"
    press += "sys.find_spec = lambda name, *_: signal.raise_signal(2) if name == 'typer' else None\nmain()"
    ended = subprocess.run([sys.executable, "-c", press], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


@pytest.mark.parametrize(("command", "code"), [("recipes", 0), ("train nosuch", 2)])
def test_a_signal_while_libraries_clean_up_changes_nothing(command: str, code: int) -> None:
    script = "import atexit, signal, sys\nfrom qatscale.__main__ import start\n"
    script += "signal.signal(2, signal.default_int_handler)\nnumber = int(sys.argv.pop(1))\n"
    script += "atexit.register(signal.raise_signal, number)\natexit.register(print, 'cleaning', flush=True)\n"
    script += "start(sys.argv[1:])"
    said = set()
    for number in (0, 2, 15):
        words = [sys.executable, "-c", script, str(number), *command.split()]
        ended = subprocess.run(words, capture_output=True, text=True, check=False)
        said.add((ended.returncode, ended.stdout, ended.stderr))
    assert len(said) == 1
    assert said.pop()[0] == code


def test_a_reader_that_leaves_ends_no_command() -> None:
    """`qatscale config --json-schema | head -1`"""
    command = [sys.executable, "-m", "qatscale", "config", "--json-schema"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_a_console_without_unicode_ends_no_command() -> None:
    script = (
        "from qatscale.__main__ import start\ntry: start(sys.argv[1:])\nexcept SystemExit: pass\nprint('3 \\u2013 4')"
    )
    for command in ("recipes", "train debug --help"):
        said = subprocess.run(
            [sys.executable, "-c", f"import sys\n{script}", *command.split()],
            env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert said.stdout.endswith("3 ? 4\n")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_console_ends_no_command(closed: str) -> None:
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "qatscale", "recipes"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("word", "said"), [("é".encode(), "no recipe or file"), (b"\xff", "is not UTF-8")])
def test_a_word_is_utf_8_in_any_locale(word: bytes, said: str) -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command: list[str | bytes] = [sys.executable, "-m", "qatscale", "train", word]
    done = subprocess.run(command, env=os.environ | locale, capture_output=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr.decode()
