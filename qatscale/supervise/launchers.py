"""The launcher of this process: its environment variables as torch.distributed reads them.

torchrun and DeepSpeed's launcher set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. `srun` and `mpirun` set
variables of their own. No torch here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from qatscale.errors import UserError

TORCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DEFAULT_PORT = 29500


class Variables(NamedTuple):
    """The environment variables of one launcher; of several names the first that is set counts."""

    launcher: str
    rank: tuple[str, ...]
    size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]


MPI = (
    Variables(
        "OpenMPI", ("OMPI_COMM_WORLD_RANK",), ("OMPI_COMM_WORLD_SIZE",), ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    Variables(
        "MVAPICH", ("MV2_COMM_WORLD_RANK",), ("MV2_COMM_WORLD_SIZE",), ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    Variables(
        "MPICH", ("PMI_RANK", "PMIX_RANK"), ("PMI_SIZE",), ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "PMI_LOCAL_RANK"),
        ("MPI_LOCALNRANKS", "PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
    ),
)  # fmt: skip
SLURM = Variables("Slurm", ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS",), ("SLURM_LOCALID",), ())


def launcher_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables to add to `environ` so that it has what torch.distributed reads; none without a launcher.

    MPI precedes Slurm: under `mpirun` inside a Slurm job, Slurm's variables describe MPI's daemons. UserError with the
    variable's name where one is missing or contradicts another.
    """
    port = environ.get("MASTER_PORT", "1")
    if not re.fullmatch(r"\d{1,5}", port) or not 0 < int(port) < 1 << 16:
        raise UserError("MASTER_PORT", port, "is not a port, a number from 1 to 65,535.")
    if "RANK" in environ:
        missing = [name for name in TORCH if name not in environ]
        if missing:
            fix = f"A launcher sets all of {', '.join(TORCH)}."
            raise UserError(missing[0], None, "is not set, though RANK is.", fix)
        _check(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK")
        return {}
    launchers = [variables for variables in MPI if _first(environ, variables.rank)]
    if not launchers and "SLURM_PROCID" in environ and _is_srun_task(environ):
        launchers = [SLURM]
    if not launchers:
        return {}
    first = launchers[0]
    rank, size, local_rank = (_name(environ, first, names) for names in (first.rank, first.size, first.local_rank))
    for other in launchers[1:]:  # OpenMPI also sets PMIX_RANK; all that are set have to agree
        _agree(environ, rank, _first(environ, other.rank))
        _agree(environ, size, _first(environ, other.size))
    _agree(environ, size, "WORLD_SIZE" if "WORLD_SIZE" in environ else None)
    _check(environ, rank, size, local_rank)
    wanted = {
        "RANK": environ[rank],
        "WORLD_SIZE": environ[size],
        "LOCAL_RANK": environ[local_rank],
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _first_host(environ, first, size),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(_port(environ)),
    }
    return {name: value for name, value in wanted.items() if environ.get(name) != value}


def first_of_hosts(text: str) -> str:
    """The first of Slurm's short list of hosts: `node[01-03,7],login` → node01."""
    first = re.match(r"(?:[^,\[]|\[\d+[^\]]*\])+(?=,|$)", text)
    if first is None:
        raise UserError("SLURM_STEP_NODELIST", text, "is not a list of hosts in Slurm's form.", "Set MASTER_ADDR.")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])


def _first(environ: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if environ.get(name)), None)


def _name(environ: Mapping[str, str], variables: Variables, names: tuple[str, ...]) -> str:
    """The name of the first variable that is set; UserError where none is."""
    name = _first(environ, names)
    if name is None:
        problem = f"is not set, though {variables.launcher}'s {_first(environ, variables.rank)} is."
        fix = "Start it through the launcher, or set RANK, LOCAL_RANK, WORLD_SIZE and MASTER_ADDR yourself."
        raise UserError(names[0], None, problem, fix)
    return name


def _number(environ: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d+", environ[name]):
        raise UserError(name, environ[name], "is not the number of a process.", "A launcher sets it.")
    return int(environ[name])


def _agree(environ: Mapping[str, str], name: str, other: str | None) -> None:
    if other is not None and _number(environ, other) != _number(environ, name):
        raise UserError(other, environ[other], f"contradicts {name} = {environ[name]}.", f"Unset {other}.")


def _check(environ: Mapping[str, str], rank: str, size: str, local_rank: str) -> None:
    if _number(environ, rank) >= _number(environ, size):
        raise UserError(rank, environ[rank], f"contradicts {size} = {environ[size]}: ranks count from 0.")
    if _number(environ, local_rank) > _number(environ, rank):
        raise UserError(local_rank, environ[local_rank], f"contradicts {rank} = {environ[rank]}, which is less.")


def _is_srun_task(environ: Mapping[str, str]) -> bool:
    """Whether `srun` started this; a batch script's own process has a SLURM_PROCID too."""
    if environ.get("SLURM_STEP_NUM_TASKS"):
        return True
    if int(environ.get("SLURM_NTASKS") or 1) > 1:
        tasks = environ["SLURM_NTASKS"]
        problem = f"this is the batch script itself, not one of its {tasks} tasks."
        raise UserError("SLURM_NTASKS", tasks, problem, "Start it with srun.")
    return False


def _first_host(environ: Mapping[str, str], variables: Variables, size: str) -> str:
    """Where rank 0 runs."""
    local_size = _first(environ, variables.local_size)
    if environ[size] == "1" or (local_size and environ[local_size] == environ[size]):
        return "127.0.0.1"
    listed = _first(environ, ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"))
    if listed is not None:
        return first_of_hosts(environ[listed])
    forward = {"OpenMPI": "mpirun -x MASTER_ADDR=…", "MPICH": "mpirun -genv MASTER_ADDR …"}.get(variables.launcher, "")
    raise UserError(
        "MASTER_ADDR", None, f"is not set, and {variables.launcher} does not say which host rank 0 is on.",
        "Set it to that host's address" + (f": {forward}" if forward else "."),
    )  # fmt: skip


def _port(environ: Mapping[str, str]) -> int:
    """A port that two jobs on a Slurm node do not share."""
    job, step = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_STEP_ID", "0")
    if job.isdecimal() and step.isdecimal():
        return 20_000 + (int(job) * 10 + int(step)) % 10_000
    return DEFAULT_PORT
