"""What a training process loads."""

from __future__ import annotations

import subprocess
import sys

from tests.processes import unlaunched

STARTED = """
import os, resource, socket, sys, torch
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
started = []
sys.addaudithook(lambda event, given: started.append(given[0]) if event == "subprocess.Popen" else None)
from qatscale.engine.runtime import start_runtime
from qatscale.errors import UserError
taken = socket.create_server(("", 0))
os.environ |= {"RANK": "0", "MASTER_PORT": str(taken.getsockname()[1])}
try:
    start_runtime()
except UserError as error:
    assert error.key == "MASTER_PORT" and str(taken.getsockname()[1]) in str(error) and "--master_port" in str(error)
del os.environ["RANK"]  # without it the others are of another day, or of a script that starts several workers
os.environ |= {"MASTER_ADDR": "nosuch.invalid", "LOCAL_RANK": "x"}
start_runtime()
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(hard, 1 << 16) if hard > 0 else 1 << 16, hard)
assert not started, f"a compiler was asked for operators that nobody uses: {started}"
import deepspeed
from deepspeed.runtime.zero.utils import is_zero_supported_optimizer
assert is_zero_supported_optimizer(torch.optim.AdamW([torch.zeros(1, requires_grad=True)]))
import qatscale.tracking.curves  # drawn at the end of every run
heavy = ("mlflow", "pandas", "scipy.stats", "torch._inductor.compile_fx")
print(*(name for name in heavy if name in sys.modules))
import mlflow  # hidden from DeepSpeed alone
torch.compile(lambda x: x + 1, backend="inductor")
"""


def test_a_port_in_use_is_named_and_a_trainer_loads_neither_mlflow_nor_the_compiler_for_deepspeeds_sake() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTED], env=unlaunched(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ""
