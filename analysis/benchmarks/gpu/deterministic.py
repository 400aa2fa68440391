"""launch/train.py with deterministic algorithms only, so that a resumed run can be compared bit for bit on a GPU.

Attention's backward pass sums in the order in which its blocks happen to finish, unless it is told not to.
"""

import os
import runpy
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it; read when CUDA starts

import torch

torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = False  # for finding bugs; costs a pass over every buffer

TRAIN = Path(__file__).resolve().parents[3] / "launch" / "train.py"
sys.argv[0] = str(TRAIN)
runpy.run_path(str(TRAIN), run_name="__main__")
