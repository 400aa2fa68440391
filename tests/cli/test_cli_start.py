"""Light commands answer without the heavy libraries; that is what keeps them quick."""

from __future__ import annotations

import os
import subprocess
import sys

COMMANDS = (
    "--help", "config", "recipes", "plan --help",
    "plan compute --gpu-hours 500 --gpu H200 --mfu 0.4 --recipe 396m --bits 4 --law synthetic",
    "plan memory 500MB --tokens 100B --bits 4 --format gguf",
    "study --help", "study plan --help", "fit --help", "report --help", "prepare --help",
    "train --help",
)  # fmt: skip
SCRIPT = """
import contextlib, io, shlex, sys
from qatscale.cli import main
for command in sys.argv[1:]:
    said = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main(shlex.split(command))
        except SystemExit as exited:
            code = exited.code
    assert not code, said.getvalue()
    heavy = {"torch", "deepspeed", "transformers", "datasets", "pandas", "scipy", "matplotlib", "mlflow"}
    print(command, sorted(heavy & set(sys.modules)))
"""


def test_light_commands_import_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *COMMANDS], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{command} []" for command in COMMANDS]


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
