"""Which options make which question, and what is refused with what to do: through `python -m qatlaw`."""

from __future__ import annotations

import json
import shlex

import pytest

from qatlaw import LawError
from qatlaw.__main__ import main
from qatlaw.plan.amounts import parse_amount, parse_bytes

RUN = "--params 396M --tokens 100B"
H200 = "--peak-flops 989T --mfu 0.4"

ASKED = {
    f"{RUN} --bits 4": "run",
    f"{RUN} --bits 4 --fraction 0.2 --batch-tokens 1M --law synthetic": "run",
    "--memory 500MB --tokens 100B": "memory",
    "--memory 500MB --tokens 100B --bits 4 --vocab-size 128K --law synthetic": "memory",
    f"{RUN} --compare fp": "compare",
    f"{RUN} --compare fp --tolerance 0.05 --law synthetic": "compare",
    f"--gpu-hours 500 {H200} --params 396M": "budget",
    f"--gpu-hours 500 {H200} --bits 4 --qat-overhead 1.2 --law synthetic": "budget",
    f"--gpu-hours 500 {H200} --qat-mfu 0.35 --params 396M --bits 4 --law synthetic": "budget",
    "--gpu-hours 500 --tokens-per-second-fp 1M --tokens-per-second-qat 0.9M --gpus 8 --params 396M": "budget",
    "--flops 1e21 --params 396M --bits 4": "budget",
    "--flops 1e21 --bits 4 --law synthetic": "budget",
    "--trained-tokens 60B --params 396M": "checkpoint",
    "--trained-tokens 60B --params 396M --bits 4 --batch-tokens 1M --law synthetic": "checkpoint",
    f"{RUN} --bits 4 --fused-loss 2.5 --sequential-loss 2.503 --law synthetic": "fusion",
}

REFUSED = {
    "": ("nothing was asked", "--params 396M --tokens 100B --bits 4"),
    RUN: ("--bits", "Add --bits 4, or --compare fp"),
    "--params 396M --bits 4": ("--tokens", "Add --tokens 100B"),
    "--tokens 100B --bits 4": ("--params", "Add --params 396M"),
    "--memory 500MB": ("--tokens", "Add --tokens 100B"),
    "--memory 500 --tokens 100B": ("--memory = '500'", "500MB"),
    "--memory 500MB --tokens 100B --params 396M": ("--params", "asks for the size", "Leave it out"),
    f"--memory 500MB {RUN} --compare fp": ("--compare and --memory", "different questions"),
    "--memory 1MB --tokens 100B --bits 4": ("--memory = '1MB'", "MB to"),
    f"{RUN} --compare ptq": ("--compare = 'ptq'", "fp"),
    f"{RUN} --bits 4 --tolerance 0.1": ("--tolerance", "--compare fp"),
    f"{RUN} --bits 4 --vocab-size 100": ("--vocab-size", "--memory"),
    f"{RUN} --bits 4 --fraction 0.2": ("--fraction", "takes a loss law", "--law fit.json"),
    f"{RUN} --compare fp --tolerance 0.1": ("--tolerance", "takes a loss law"),
    "--flops 1e21 --params 396M --batch-tokens 1M": ("--batch-tokens", "has no effect with --flops"),
    f"{RUN} --bits 4 --mfu 0.4": ("--mfu", "--gpu-hours or --flops"),
    f"{RUN} --bits four": ("--bits = 'four'", "a number"),
    f"{RUN} --bits 40": ("--bits = 40.0", "1 or more"),
    f"{RUN} --bits 4 --fraction 25 --law synthetic": ("--fraction = 25.0", "between 0 and 1"),
    f"{RUN} --bits 4 --batch-tokens 1T": ("--batch-tokens", "more than all"),
    "--params 396X --tokens 100B --bits 4": ("--params = '396X'", "K, M, B or T", "2.3B"),
    "--params 396B --tokens 100M --bits 4": ("S > 1", "right units"),
    f"{RUN} --bits 4 --law nowhere.json": ("--law = 'nowhere.json'", "qatscale fit"),
    "--gpu-hours 500 --params 396M": ("--gpu-hours = 500.0", "Add --gpu H200 --mfu 0.4", "--tokens-per-second-fp"),
    f"--gpu-hours 500 {H200}": ("--params", "--law fit.json to have the best size chosen"),
    f"--gpu-hours 500 {H200} --flops 1e21 --params 396M": ("--flops and --gpu-hours", "two budgets"),
    f"--gpu-hours 500 {H200} {RUN}": ("--tokens", "the budget says how many"),
    "--gpu-hours 500 --params 396M --mfu 40 --peak-flops 989T": ("--mfu = 40.0", "at most 1"),
    "--gpu-hours 500 --params 396M --tokens-per-second-fp 1M": ("--tokens-per-second-qat", "both phases"),
    f"--gpu-hours 500 --params 396M --tokens-per-second-fp 1M --tokens-per-second-qat 1M {H200}": (
        "--peak-flops", "told by the measured",
    ),
    "--gpu-hours 500 --tokens-per-second-fp 1M --tokens-per-second-qat 1M --law synthetic": (
        "--params", "belong to one size",
    ),
    f"--gpu-hours 500 {H200} --qat-mfu 0.3 --qat-overhead 1.2 --params 396M": ("--qat-mfu and --qat-overhead",),
    f"--gpu-hours 500 {H200} --gpus 8 --params 396M": ("--gpus", "all GPUs together"),
    "--flops 1e21 --mfu 0.4 --params 396M": ("--mfu", "has no effect with --flops"),
    "--trained-tokens 60B": ("--params", "Add --params 396M"),
    "--trained-tokens 60B --params 396M --tokens 100B": ("--tokens", "the checkpoint's tokens"),
    "--from-checkpoint nowhere": ("--from-checkpoint = 'nowhere'", "The folder does not exist"),
    f"{RUN} --bits 4 --fused-loss 2.5 --sequential-loss 2.51": ("--law", "for a law to say"),
    f"{RUN} --bits 4 --fused-loss 2.5 --law synthetic": ("--sequential-loss", "Add --sequential-loss"),
}  # fmt: skip


@pytest.mark.parametrize(("typed", "question"), ASKED.items())
def test_options_ask_their_question(typed: str, question: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*shlex.split(typed), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["question"] == question
    synthetic = "synthetic" in typed
    assert (found["law"] or {}).get("synthetic", False) is synthetic
    assert any("made-up law" in warning for warning in found["warnings"]) is synthetic
    assert (found["missing"] is None) is synthetic
    if "--bits" in typed and question != "fusion":
        assert f"qat.bits={typed.split('--bits ')[1].split()[0]}" in found["overrides"]


@pytest.mark.parametrize("typed", ASKED)
def test_people_read_the_same(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(typed)) == 0
    text = capsys.readouterr().out
    assert ("made-up law" in text) is ("synthetic" in typed)
    assert ("need a loss law" in text) is ("synthetic" not in typed)
    assert "None" not in text
    assert "nan" not in text


@pytest.mark.parametrize(("typed", "told"), REFUSED.items())
def test_what_asks_nothing_is_refused(typed: str, told: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(shlex.split(typed)) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert [part for part in told if part not in error] == [], error


def test_every_number_outside_its_range_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    """With a law both it and the closed form are shown, and each has its own range."""
    for typed in ("--params 8B --tokens 400B --bits 4", "--flops 2e22 --params 8B --bits 4 --qat-overhead 1.1"):
        assert main([*shlex.split(typed), "--law", "synthetic"]) == 0
        text = capsys.readouterr().out
        assert "the loss law is extrapolated: N = 8B (its runs: 86M to 2.2B)" in text
        assert "extrapolation of its closed form: N = 8B (measured 86M to 2.2B)" in text


@pytest.mark.parametrize(
    ("text", "value"), [("396M", 396e6), ("1e21", 1e21), (".5B", 5e8), ("2_300m", 2.3e9), ("2.3e9", 2.3e9), ("8", 8)]
)
def test_amounts(text: str, value: float) -> None:
    assert parse_amount("--x", text) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(("text", "value"), [("500MB", 5e8), ("1.5gb", 1.5e9), ("512MiB", 2**29), ("1 TB", 1e12)])
def test_bytes(text: str, value: float) -> None:
    assert parse_bytes("--x", text) == value


@pytest.mark.parametrize("text", ["", "-1", "1.2.3", "12Q", "0", "nan", "inf", "1e400", "5MB"])
def test_no_amounts(text: str) -> None:
    with pytest.raises(LawError, match="--x"):
        parse_amount("--x", text)


def test_costs_of_gpu_hours_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """500 h x 3600 s x 989e12 x 0.4 FLOP/s over 6 x 396e6 FLOPs a token; measured speeds give the same."""
    tokens = 500 * 3600 * 989e12 * 0.4 / (6 * 396e6)
    speed = 989e12 * 0.4 / (6 * 396e6) * 8
    for typed in (
        f"--gpu-hours 500 {H200} --params 396M --bits 4",
        f"--gpu-hours 500 --tokens-per-second-fp {speed!r} --tokens-per-second-qat {speed!r} --gpus 8 --params 396M "
        "--bits 4",
        f"--flops {500 * 3600 * 989e12 * 0.4!r} --params 396M --bits 4",
    ):
        assert main([*shlex.split(typed), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["plan"]["chosen"]["tokens"] == pytest.approx(tokens, rel=1e-9)
        assert found["plan"]["budget"]["overhead"] == pytest.approx(1)
