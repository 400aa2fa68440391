"""The process: its rank, its device, its process group. The first thing a training process sets up."""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch

from qatscale.engine.layout import job_size


@dataclass(frozen=True)
class Runtime:
    rank: int
    ranks: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def memory_gib(self) -> float:
        """Peak of this process's device memory since the last call, so that the phases of a run can be told apart; on
        CPU, its resident memory. GiB."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
            torch.cuda.reset_peak_memory_stats(self.device)
            return peak
        import psutil

        return psutil.Process().memory_info().rss / 2**30


def uses_gpu() -> bool:
    """Whether there is a GPU and DS_ACCELERATOR does not say to leave it alone."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def free_port() -> int:
    """A TCP port of this host that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_runtime(timeout: float | None = None) -> Runtime:
    """Join the process group described by RANK, LOCAL_RANK, WORLD_SIZE and MASTER_ADDR, or make one of one process.

    `timeout`: seconds that a collective may take; None = DeepSpeed's 10 minutes (DEEPSPEED_TIMEOUT). Calling it again
    in the same process gives the same group.
    """
    on_gpu = uses_gpu()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # auto-detection warns at every start
    rank, ranks = int(os.environ.get("RANK", 0)), job_size()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(local_rank))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        os.environ["MASTER_PORT"] = str(free_port())
    if os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost"):
        # gloo looks up the host name otherwise, which a laptop or a container may not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    _import_deepspeed_quietly()
    import deepspeed

    if not torch.distributed.is_initialized():
        if on_gpu:
            torch.cuda.set_device(_device_index(local_rank))
        limit = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
        deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False, **limit)
        atexit.register(_leave)
    device = torch.device("cuda", _device_index(local_rank)) if on_gpu else torch.device("cpu")
    return Runtime(rank, ranks, local_rank, device)


def _device_index(local_rank: int) -> int:
    """Slurm's --gpus-per-task shows each process one GPU only, which it then calls 0."""
    return local_rank if torch.cuda.device_count() > 1 else 0


def _leave() -> None:
    """Join gloo's threads. Left to the interpreter's teardown they sometimes abort a process that is done (SIGABRT).

    NCCL waits for the other processes here, which after an error of this one are somewhere else: only where there are
    none is its group left in order.
    """
    if not torch.distributed.is_initialized():
        return
    if torch.distributed.get_backend() == "gloo" or torch.distributed.get_world_size() == 1:
        torch.distributed.destroy_process_group()


def _import_deepspeed_quietly() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # torch renames two collectives and tells every process so; nothing a user of ours can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with _hidden("mlflow"):  # where it is installed DeepSpeed's autotuner imports it in every process
        import deepspeed.ops
        import deepspeed.runtime.bf16_optimizer as bf16_optimizer
        import deepspeed.runtime.compiler as compiler

    # ZeRO imports Muon to ask whether our optimizer is one, and Muon's decorators would load torch's compiler.
    compile_, compiler.compile = compiler.compile, lambda: lambda function: function
    import deepspeed.runtime.zero.muon.original_muon

    compiler.compile = compile_
    # DeepSpeed would compile a shared-memory all-reduce on CPU (45 s, needs a compiler) that only its inference uses,
    # and that leaves 66 MiB a rank in /dev/shm at every launch.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It prints the memory at every start, asked or not, and resets the peak that we report.
    bf16_optimizer.see_memory_usage = lambda *_, **__: None


@contextmanager
def _hidden(module: str) -> Iterator[None]:
    """A context in which importing `module` raises ImportError; one that is imported already stays what it is."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
