"""64 processes of a job as threads over a real store: what they agree on, and what they leave behind."""

from __future__ import annotations

import threading

import pytest
import torch
from thousand import Job

from qatscale.engine.agreement import Agreement
from qatscale.engine.runtime import Runtime

RANKS = 64


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Job:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # restored at the end
    return Job(RANKS)


def test_results_come_to_rank_0_in_order_and_nothing_stays(job: Job) -> None:
    agreements = job.agreements()
    for turn in range(3):
        gathered = job.each(lambda rank, agreement: agreement.gather(lambda: (rank, turn)), agreements)  # noqa: B023
        assert gathered == [[(rank, turn) for rank in range(RANKS)]] + [[]] * (RANKS - 1)
    assert job.store.num_keys() < 10


@pytest.mark.parametrize("failing", [{5}, {0}, {0, 5, 63}])
def test_an_error_of_one_is_raised_on_all(job: Job, failing: set[int]) -> None:
    def act(rank: int, agreement: Agreement) -> str:
        def work() -> None:
            if rank in failing:
                raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match="No space left") as caught:
            agreement.gather(work)
        return str(caught.value)

    agreements = job.agreements()
    (text,) = set(job.each(act, agreements))
    assert all(f"process {rank}: " in text for rank in failing)
    assert job.each(lambda rank, agreement: agreement.gather(lambda: rank), agreements)[0] == list(range(RANKS))


def test_all_hear_of_a_number_after_the_same_vote(job: Job) -> None:
    """Ranks vote at their own pace; one of them is signalled before its fifth vote."""
    fast = threading.Event()

    def act(rank: int, agreement: Agreement) -> list[int]:
        heard = []
        for turn in range(8):
            heard.append(agreement.voted())
            if rank == 63 and turn == 3:
                fast.wait(0.05)
            agreement.vote(15 if rank == 17 and turn >= 4 else 0)
        return [*heard, agreement.voted()]

    assert job.each(act, job.agreements()) == [[0, 0, 0, 0, 0, 15, 15, 15, 15]] * RANKS
    assert job.store.num_keys() < 10


def test_one_process_needs_no_store() -> None:
    alone = Agreement(Runtime(0, 1, torch.device("cpu")))
    assert alone.gather(lambda: 7) == [7]
    alone.vote(15)
    assert alone.voted() == 15
