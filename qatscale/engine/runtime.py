"""The process: its rank, its device, its process group. The first thing a training process sets up."""

from __future__ import annotations

import atexit
import logging
import os
import resource
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from qatscale.engine.layout import job_size
from qatscale.errors import UserError

DESCRIPTORS = 1 << 16
"""Open files that a training process may have, where the hard limit allows it."""


@dataclass(frozen=True)
class Runtime:
    rank: int
    ranks: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def memory_gib(self) -> float:
        """Peak device memory since the last call, so that the phases of a run are distinct; on CPU, resident memory.
        GiB."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
            torch.cuda.reset_peak_memory_stats(self.device)
            return peak
        import psutil

        return psutil.Process().memory_info().rss / 2**30


def uses_gpu() -> bool:
    """Whether a GPU exists and DS_ACCELERATOR does not exclude it."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def free_port() -> int:
    """A TCP port of this host that is free at the moment."""
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
    ranks = job_size()
    if "RANK" not in os.environ:
        if ranks > 1:
            raise UserError("WORLD_SIZE", ranks, "is set, and RANK is not.", "A launcher sets both; unset it.")
        # not what a former job left, nor the one port of a batch script that starts several workers
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    os.environ.update(WORLD_SIZE=str(ranks), LOCAL_RANK=str(local_rank))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(free_port()))
    if os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost"):
        # gloo looks up the host name otherwise, which a laptop or a container may not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    _import_deepspeed_quietly()
    import deepspeed

    device = torch.device("cpu")
    if on_gpu:  # Slurm's --gpus-per-task shows each process one GPU only, which it then calls 0, and so must DeepSpeed
        gpus = torch.cuda.device_count()
        if local_rank >= gpus > 1:
            raise UserError("LOCAL_RANK", local_rank, f"this host shows {gpus} GPUs.", "Start one process for each.")
        device = torch.device("cuda", local_rank if gpus > 1 else 0)
        os.environ["LOCAL_RANK"] = str(device.index)
    if not torch.distributed.is_initialized():
        _allow_many_descriptors()
        if on_gpu:
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("highest")  # fp32 is IEEE's: TF32 rounds factors to 10 bits
        limit = {} if timeout is None else {"timeout": timedelta(seconds=timeout)}
        try:
            deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False, **limit)
        except torch.distributed.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            fix = "Start this one with --master_port 29501 (deepspeed, torchrun), or set MASTER_PORT."
            problem = "another job on this host uses this port."
            raise UserError("MASTER_PORT", os.environ["MASTER_PORT"], problem, fix) from None
        atexit.register(_leave)
    return Runtime(rank, ranks, device)


def _allow_many_descriptors() -> None:
    """Raise the soft limit of open files: collectives of gloo take one for each other process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def together(work: Callable[[], Any] | None, runtime: Runtime) -> list[Any]:
    """The results of `work` on all processes. An OSError, UserError or FloatingPointError of one is raised on all.

    Collective.
    """
    own = outcome_of(work, runtime)
    outcomes = [own]
    if runtime.ranks > 1:
        outcomes *= runtime.ranks
        torch.distributed.all_gather_object(outcomes, own)
    return results_of(outcomes)


Outcome = tuple[Any, Exception | None]


def outcome_of(work: Callable[[], Any] | None, runtime: Runtime) -> Outcome:
    """What `work` gives, or its error: not raised yet, since the other processes wait to hear of it."""
    try:
        return (work() if work else None, None)
    except (UserError, FloatingPointError) as error:
        return (None, error)
    except OSError as error:
        return (None, OSError(f"process {runtime.rank}: {error}"))


def results_of(outcomes: Sequence[Outcome]) -> list[Any]:
    errors = [error for _, error in outcomes if error]
    if errors and isinstance(errors[0], OSError):
        raise OSError("; ".join(map(str, errors)))
    if errors:
        raise errors[0]
    return [given for given, _ in outcomes]


def _leave() -> None:
    """Join gloo's threads. At the interpreter's teardown they sometimes abort a process that is done (SIGABRT).

    With NCCL this call waits for the other processes, which never come after an error of this one. So NCCL's group is
    destroyed only in a job of one process.
    """
    if not torch.distributed.is_initialized():
        return
    if torch.distributed.get_backend() == "gloo" or torch.distributed.get_world_size() == 1:
        torch.distributed.destroy_process_group()


def _import_deepspeed_quietly() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # torch warns in every process that two collectives were renamed; a user cannot act on it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    hides = "mlflow" not in sys.modules  # DeepSpeed's autotuner imports it in every process, where it is installed
    if hides:
        sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed.ops
        import deepspeed.runtime.bf16_optimizer as bf16_optimizer
        import deepspeed.runtime.compiler as compiler
    finally:
        if hides:
            del sys.modules["mlflow"]

    # ZeRO imports Muon to ask whether our optimizer is one, and Muon's decorators would load torch's compiler.
    compile_, compiler.compile = compiler.compile, lambda: lambda function: function
    import deepspeed.runtime.zero.muon.original_muon

    compiler.compile = compile_
    # DeepSpeed would try to compile each of its operators and, where a GPU has no CUDA toolkit, print a warning a
    # process for seven of them. We use none. On CPU it would compile a shared-memory all-reduce (45 s, needs a
    # compiler) that only its inference uses, and that leaves 66 MiB a rank in /dev/shm at every launch.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    # It prints the memory at every start, asked or not, and resets the peak that we report.
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
