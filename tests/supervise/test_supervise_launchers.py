"""The environment of each launcher, as it was seen there, and what is made of it; broken ones are refused by name."""

from __future__ import annotations

import pytest

from qatscale.cli import main
from qatscale.engine.layout import job_size
from qatscale.engine.runtime import start_runtime
from qatscale.errors import UserError
from qatscale.supervise.launchers import TORCH, first_of_hosts, launcher_environment

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[08-09]", "SLURM_JOB_NODELIST": "gpu[07-09]",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_RANK": "3", "MASTER_ADDR": "10.0.0.1",
}  # fmt: skip
MPICH = {
    "PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2", "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29501",
}  # fmt: skip
# mpirun inside a Slurm job: its daemons were started by srun, one a node
MPI_IN_SLURM = {name: value for name, value in OPENMPI.items() if name != "MASTER_ADDR"} | {
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "a,b",
}  # fmt: skip

ADOPTED = {
    "nobody": ({"HOME": "/root"}, {}),
    "torchrun": (TORCHRUN, {}),
    "torchrun in srun": (TORCHRUN | SRUN, {}),
    "srun": (
        SRUN,
        {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "gpu08", "MASTER_PORT": str(20_000 + 7112)},
    ),
    "srun, address given": (
        SRUN | {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "1234"},
        {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"},
    ),
    "OpenMPI": (OPENMPI, {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_PORT": "29500"}),
    "OpenMPI on one host": (
        {name: value for name, value in OPENMPI.items() if name != "MASTER_ADDR"} | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
        {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
    ),
    "OpenMPI in Slurm": (
        MPI_IN_SLURM,
        {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "29500"},
    ),
    "MPICH": (MPICH, {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}),
    "MPICH through DeepSpeed": (MPICH | {"WORLD_SIZE": "4"}, {"RANK": "3", "LOCAL_RANK": "1"}),
    "a batch script of one task": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, {}),
}


@pytest.mark.parametrize("case", ADOPTED)
def test_the_place_in_the_job_is_taken_from_the_launcher(case: str) -> None:
    environ, expected = ADOPTED[case]
    assert launcher_environment(environ) == expected
    assert launcher_environment(environ | launcher_environment(environ)) == {}, "what was adopted is complete"


REFUSED = {
    "incomplete torchrun": ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK: is not set, though RANK is."),
    "rank past the end": (TORCHRUN | {"RANK": "4"}, "RANK = '4': contradicts WORLD_SIZE = 4: ranks count from 0."),
    "no number": (TORCHRUN | {"WORLD_SIZE": "four"}, "WORLD_SIZE = 'four': is not the number of a process."),
    "local above global": (MPICH | {"MPI_LOCALRANKID": "9"}, "MPI_LOCALRANKID = '9': contradicts PMI_RANK = 3"),
    "a WORLD_SIZE from another day": (SRUN | {"WORLD_SIZE": "2"}, "WORLD_SIZE = '2': contradicts SLURM_STEP_NUM_TASKS"),
    "no port": (
        TORCHRUN | {"MASTER_PORT": "99999"},
        "MASTER_PORT = '99999': is not a port, a number from 1 to 65,535.",
    ),
    "a port in words": ({"MASTER_PORT": "http"}, "MASTER_PORT = 'http': is not a port"),
    "two kinds of MPI": (OPENMPI | {"PMI_RANK": "0"}, "PMI_RANK = '0': contradicts OMPI_COMM_WORLD_RANK = 3."),
    "no address": (
        {name: value for name, value in OPENMPI.items() if name != "MASTER_ADDR"},
        "MASTER_ADDR: is not set, and OpenMPI does not say which host rank 0 is on. Set it to that host's address",
    ),
    "PMIx without a size": ({"PMIX_RANK": "0"}, "PMI_SIZE: is not set, though MPICH's PMIX_RANK is."),
    "the batch script itself": (
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"},
        "SLURM_NTASKS = '8': this is the batch script itself, not one of its 8 tasks. Start it with srun.",
    ),
    "a list nobody can read": (
        SRUN | {"SLURM_STEP_NODELIST": "gpu[a-b]"},
        "SLURM_STEP_NODELIST = 'gpu[a-b]': is not a list of hosts in Slurm's form. Set MASTER_ADDR.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_broken_environment_is_refused_by_the_variables_name(case: str) -> None:
    environ, told = REFUSED[case]
    with pytest.raises(UserError) as error:
        launcher_environment(environ)
    assert str(error.value).startswith(told)


def test_the_command_asks_the_launcher_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`srun qatscale train …` would train on one GPU, and its other tasks would exit for the first one's claim."""
    for name in TORCH:  # set by whatever trained in this process before
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main(["train", "debug"])
    assert ended.value.code == 2
    assert "Start it with srun" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "-1", "four"])
def test_a_number_of_processes_that_is_none_is_refused(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match="WORLD_SIZE"):
        job_size()


def test_a_process_without_a_rank_does_not_wait_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match="RANK is not"):
        start_runtime()


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("node7", "node7"),
        ("a,b", "a"),
        ("node[01-03,7]", "node01"),
        ("node[098-101],login", "node098"),
        ("rack[1-2]node[3,5]-ib", "rack1node3-ib"),
    ],
)
def test_slurms_lists_of_hosts(text: str, host: str) -> None:
    assert first_of_hosts(text) == host
