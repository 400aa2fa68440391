"""The path of a GPU without one: the job itself, with DeepSpeed, on a CUDA device that keeps no data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CASES = {
    "ZeRO-1": ("zero1_bf16", "BF16_Optimizer"),
    "ZeRO-1, compiled": ("zero1_bf16 engine.compile=on engine.activation_checkpointing=true", "BF16_Optimizer"),
    "ZeRO-2": ("zero2_bf16 data.document_mask=true", "DeepSpeedZeroOptimizer"),
    "ZeRO-2, offloaded": ("zero2_bf16_offload", "DeepSpeedZeroOptimizer"),
    "ZeRO-3, parts compiled": ("zero3_bf16 engine.compile=on", "DeepSpeedZeroOptimizer_Stage3"),
    "ZeRO-3, documents": (
        "zero3_bf16 data.document_mask=true engine.activation_checkpointing=true", "DeepSpeedZeroOptimizer_Stage3",
    ),
    "ZeRO-1, fp32": ("zero1_fp32", "DeepSpeedZeroOptimizer"),
    "tensor parallel": ("zero1_bf16 engine.tensor_parallel=2 engine.sequence_parallel=true", "BF16_Optimizer"),
    "tensor parallel, ZeRO-3": ("zero3_bf16 engine.tensor_parallel=2", "DeepSpeedZeroOptimizer_Stage3"),
    "pipeline": ("zero1_bf16 engine.pipeline_stages=2", "BF16_Optimizer"),
}  # fmt: skip
READERS = {
    "deepspeed/runtime/utils.py", "deepspeed/runtime/zero/stage_1_and_2.py", "deepspeed/runtime/pipe/engine.py",
    "engine/spikes.py",
}  # fmt: skip
"""What reads the gradient norm, at the end of a step."""


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The device as a library to load before torch."""
    compiler, root = shutil.which("g++"), Path(torch.__file__).parent
    if compiler is None or torch.version.cuda:
        pytest.skip("needs g++ and a torch without CUDA")
    library = tmp_path_factory.mktemp("fake") / "fake_cuda.so"
    options = ["-std=c++20", "-shared", "-fPIC", "-O0", f"-I{root}/include", f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run([compiler, str(HERE / "fake_cuda.cpp"), *options, "-o", str(library)], check=True)
    return library


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_job_runs_on_a_cuda_device_that_keeps_no_data(case: str, device: Path) -> None:
    """Every operation gets tensors of one device and of types that it takes; the host reads the norm and no more."""
    overrides, optimizer = CASES[case]
    arguments = [f"engine.ds_config={overrides.split()[0]}", "engine.compile=off", *overrides.split()[1:]]
    environment = os.environ | {"LD_PRELOAD": str(device), "LD_LIBRARY_PATH": f"{Path(torch.__file__).parent}/lib"}
    done = subprocess.run(
        [sys.executable, str(HERE / "fake_cuda.py"), *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    offloaded = "offload" in overrides
    assert found["optimizer"] == optimizer
    assert (found["masters"], found["copies"]) == (["cpu" if offloaded else "cuda:0"], ["cpu"])
    assert found["views"] == ([] if "pipeline" in case else [["cuda:0", "torch.float32"]] * 3)
    for step in found["reads"]:
        assert step.keys() <= READERS, step
        assert offloaded or sum(step.values()) <= (6 if "fp32" in overrides else 4), step
