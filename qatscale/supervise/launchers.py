"""Which process of which job is this? What launchers say about it, in the words that torch.distributed reads.

torchrun and DeepSpeed's launcher set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. `srun` and `mpirun`
have words of their own. Pure functions of the environment; no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from qatscale.errors import UserError

TORCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
DEFAULT_PORT = 29500


class Words(NamedTuple):
    """What one launcher calls the things; of several names the first that is set counts."""

    launcher: str
    rank: tuple[str, ...]
    size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]


MPI = (
    Words(
        "OpenMPI", ("OMPI_COMM_WORLD_RANK",), ("OMPI_COMM_WORLD_SIZE",), ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    Words(
        "MVAPICH", ("MV2_COMM_WORLD_RANK",), ("MV2_COMM_WORLD_SIZE",), ("MV2_COMM_WORLD_LOCAL_RANK",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    Words(
        "MPICH", ("PMI_RANK", "PMIX_RANK"), ("PMI_SIZE",), ("MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "PMI_LOCAL_RANK"),
        ("MPI_LOCALNRANKS", "PALS_LOCAL_SIZE", "PMI_LOCAL_SIZE"),
    ),
)  # fmt: skip
SLURM = Words("Slurm", ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS",), ("SLURM_LOCALID",), ())


def adopt(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables to add so that `environ` says what torch.distributed asks for; none where a launcher of torch or
    DeepSpeed has said it, and none for a process that nobody launched.

    MPI goes before Slurm: under `mpirun` inside a Slurm job Slurm's variables describe MPI's daemons. Raises UserError
    that names the variable where something is missing or contradicts another.
    """
    if "RANK" in environ:
        for name in TORCH:
            if name not in environ:
                raise UserError(
                    name, None, "is not set, though RANK is.", f"A launcher sets all of {', '.join(TORCH)}."
                )
        _check(environ, "RANK", "WORLD_SIZE", "LOCAL_RANK")
        return {}
    found = [words for words in MPI if _first(environ, words.rank)]
    if not found and "SLURM_PROCID" in environ and _is_srun_task(environ):
        found = [SLURM]
    if not found:
        return {}
    words = found[0]
    rank, size = _of(environ, words, words.rank), _of(environ, words, words.size)
    local_rank = _of(environ, words, words.local_rank)
    for other in found[1:]:  # OpenMPI brings PMIX_RANK along; whatever is there has to agree
        _agree(environ, rank, _first(environ, other.rank))
        _agree(environ, size, _first(environ, other.size))
    _agree(environ, size, "WORLD_SIZE" if "WORLD_SIZE" in environ else None)
    _check(environ, rank, size, local_rank)
    adopted = {
        "RANK": environ[rank],
        "WORLD_SIZE": environ[size],
        "LOCAL_RANK": environ[local_rank],
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _first_host(environ, words, size),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(_port(environ)),
    }
    return {name: value for name, value in adopted.items() if environ.get(name) != value}


def expand_hosts(text: str) -> list[str]:
    """Slurm's short form of a list of hosts: `node[01-03,7],login` → node01 node02 node03 node7 login."""
    hosts: list[str] = []
    for word in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        names = [""]
        for literal, listed in re.findall(r"([^\[]+)|\[([^\]]*)\]", word):
            names = [
                name + part for name in names for part in ([literal] if literal else _expand_numbers(listed, text))
            ]
        hosts += names
    return hosts


def _expand_numbers(listed: str, text: str) -> list[str]:
    """`01-03,7` → 01 02 03 7; leading zeros stay."""
    numbers: list[str] = []
    for part in listed.split(","):
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if span is None:
            raise UserError("SLURM_STEP_NODELIST", text, "is no list of hosts as Slurm writes it.", "Set MASTER_ADDR.")
        first, last = span[1], span[2] or span[1]
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return numbers


def _first(environ: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if environ.get(name)), None)


def _of(environ: Mapping[str, str], words: Words, names: tuple[str, ...]) -> str:
    """The variable that says it; UserError where none does."""
    name = _first(environ, names)
    if name is None:
        set_one = "Start it through the launcher, or set RANK, LOCAL_RANK, WORLD_SIZE and MASTER_ADDR yourself."
        raise UserError(
            names[0], None, f"is not set, though {words.launcher}'s {_first(environ, words.rank)} is.", set_one
        )
    return name


def _number(environ: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d+", environ[name]):
        raise UserError(name, environ[name], "is no number of a process.", "A launcher sets it.")
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
        raise UserError(
            "SLURM_NTASKS",
            tasks,
            f"this is the batch script itself, not one of its {tasks} tasks.",
            "Start it with srun.",
        )
    return False


def _first_host(environ: Mapping[str, str], words: Words, size: str) -> str:
    """Where rank 0 runs."""
    local_size = _first(environ, words.local_size)
    if environ[size] == "1" or (local_size and environ[local_size] == environ[size]):
        return "127.0.0.1"
    listed = _first(environ, ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"))
    if listed is not None:
        return expand_hosts(environ[listed])[0]
    forward = {"OpenMPI": "mpirun -x MASTER_ADDR=…", "MPICH": "mpirun -genv MASTER_ADDR …"}.get(words.launcher, "")
    raise UserError(
        "MASTER_ADDR", None, f"is not set, and {words.launcher} does not tell the host of rank 0.",
        "Set it to that host's address" + (f": {forward}" if forward else "."),
    )  # fmt: skip


def _port(environ: Mapping[str, str]) -> int:
    """One that two jobs on a Slurm node do not share."""
    job, step = environ.get("SLURM_JOB_ID", ""), environ.get("SLURM_STEP_ID", "0")
    if job.isdigit() and step.isdigit():
        return 20_000 + (int(job) * 10 + int(step)) % 10_000
    return DEFAULT_PORT
