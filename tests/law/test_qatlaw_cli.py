"""The planner's commands, through `python -m qatlaw`: what each answers, and what is refused with which fix."""

from __future__ import annotations

import itertools
import json
import re
import shlex

import pytest
from typer.core import TyperGroup
from typer.main import get_command

from qatlaw import InputError, options
from qatlaw.__main__ import main
from qatlaw.amounts import bytes_label, exact_amount, parse_amount, parse_bytes
from qatlaw.bit_widths import BIT_WIDTHS
from qatlaw.cli import planner
from qatlaw.fraction_laws import FRACTION_LAWS
from qatlaw.laws.named import NAMED

RUN = "--params 396M --tokens 100B"
H200 = "--gpu-hours 500 --peak-flops 989T --mfu 0.4"

ASKED = {
    f"{RUN} --bits 4": "run",
    f"{RUN} --bits 4 --batch-tokens 1M --law synthetic": "run",
    RUN: "bit-widths",
    f"{RUN} --batch-tokens 1M --law synthetic": "bit-widths",
    f"bit-widths {RUN}": "bit-widths",
    f"bit-widths {RUN} --tolerance 0.05 --law synthetic": "bit-widths",
    "memory 500MB --tokens 100B": "memory",
    "memory 500MB --tokens 100B --bits 4 --vocab-size 128K --law synthetic": "memory",
    f"compute {H200} --params 396M": "compute",
    f"compute {H200} --bits 4 --qat-overhead 1.2 --law synthetic": "compute",
    "compute --gpu-hours 500 --tokens-per-second 150K --params 396M": "compute",
    "compute --flops 1e21 --params 396M --bits 4": "compute",
    "compute --flops 1e21 --law synthetic": "compute",
    "checkpoint --trained-tokens 60B --params 396M": "checkpoint",
    "checkpoint --trained-tokens 60B --params 396M --bits 4 --law synthetic": "checkpoint",
    f"waste {RUN} --bits 4 --fraction 0.2 --law synthetic": "waste",
    f"fusion {RUN} --bits 4 --fused-loss 2.5 --sequential-loss 2.503 --law synthetic": "fusion",
}

REFUSED = {
    f"{RUN} --bits 4 --law chen-w4a16": ("--law = 'chen-w4a16'", "contains no QAT fraction", "bit-widths"),
    "memory 500MB --tokens 100B --law kumar": ("--law = 'kumar'", "contains no QAT fraction"),
    f"{RUN} --law chen-w4a16": ("--group-size", "is missing"),
    f"{RUN} --law kumar --group-size 32": ("--group-size", "has no effect"),
    f"{RUN} --bits 4 --group-size 48": ("--group-size = 48", "does not divide 128"),
    "memory 500MB --tokens 100B --format gguf": ("--format = 'gguf'", "qatscale plan"),
    "--params 396M --bits 4": ("--tokens", "Add --tokens 100B"),
    "--tokens 100B --bits 4": ("--params", "Add --params 396M"),
    f"{RUN} --recipe 396m": ("--params", "--recipe"),
    "--recipe 396m": ("--recipe = '396m'", "qatscale plan"),
    f"{RUN} bit-widths {RUN}": ("bit-widths", "options after it"),
    "--json memory 500MB --tokens 100B": ("memory", "options after it"),
    "memory 500 --tokens 100B": ("BYTES = '500'", "500MB"),
    "memory 1MB --tokens 100B --bits 4": ("BYTES = '1MB'", "MB to"),
    f"bit-widths {RUN} --tolerance 0.1": ("--tolerance", "takes a loss law"),
    f"{RUN} --bits four": ("--bits = 'four'", "1, 1.58, 2"),
    f"{RUN} --bits 40": ("--bits = '40'", "1, 1.58, 2"),
    f"{RUN} --bits {'9' * 400}": ("--bits = '99999", "1, 1.58, 2"),
    f"--params {'9' * 400} --tokens 100B": ("--params = '99999", "1e18"),
    f"{RUN} --bits nan": ("--bits = 'nan'",),
    f"waste {RUN} --bits 4 --fraction 25 --law synthetic": ("--fraction = '25'", "below 1"),
    f"{RUN} --bits 4 --batch-tokens 1T": ("--batch-tokens", "more than all"),
    "--params 396X --tokens 100B --bits 4": ("--params = '396X'", "K, M, B or T", "2.3B"),
    "--params 396B --tokens 100M --bits 4": ("S > 1", "right units"),
    f"{RUN} --bits 4 --law nowhere.json": ("--law = 'nowhere.json'", "synthetic", "qatscale fit"),
    f"{RUN} --bits 4 --law {'x' * 300}": ("--law = 'xxx", "too long"),
    "compute --params 396M": ("compute", "--flops", "--gpu-hours --gpu --mfu"),
    "compute --gpu-hours 500 --params 396M": ("--gpu-hours", "--gpu-hours --tokens-per-second"),
    f"compute {H200}": ("--params", "--law fit.json to have the best size chosen"),
    f"compute {H200} --flops 1e21 --params 396M": ("--flops --gpu-hours", "is not a budget"),
    "compute --gpu-hours 500 --params 396M --mfu 40 --peak-flops 989T": ("--mfu = '40'", "below 1"),
    "compute --gpu-hours 500 --gpu H200 --mfu 0.4 --params 396M": ("--gpu = 'H200'", "--peak-flops"),
    f"compute {H200} --tokens-per-second 1M --params 396M": ("--tokens-per-second", "is not a budget"),
    "compute --gpu-hours 500 --tokens-per-second 1M --law synthetic": ("--params", "the tokens per second belong to"),
    "checkpoint --trained-tokens 60B": ("--params", "name a RUN"),
    "checkpoint --bits 4": ("--trained-tokens", "name a RUN"),
    "checkpoint nowhere --params 396M": ("--params", "Leave it out"),
    "checkpoint nowhere": ("RUN = 'nowhere'", "The folder does not exist"),
    f"checkpoint {'x' * 300}": ("RUN = 'xxx", "too long"),
}
NOT_PARSED = {
    "memory 500MB": "Missing option '--tokens'",
    "memory --tokens 100B": "Missing argument 'BYTES'",
    "memory 500MB --tokens 100B --params 396M": "No such option: --params",
    f"compute {H200} {RUN}": "No such option: --tokens",
    f"fusion {RUN} --bits 4 --fused-loss 2.5 --law synthetic": "Missing option '--sequential-loss'",
    f"waste {RUN} --bits 4 --fraction 0.1": "Missing option '--law'",
    "memroy 500MB": "No such command 'memroy'",
}


def typed(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit status, stdout, stderr) of `python -m qatlaw WORDS`."""
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(words))
    return int(stop.value.code or 0), *capsys.readouterr()


@pytest.mark.parametrize(("words", "question"), ASKED.items())
def test_a_command_answers_its_question(words: str, question: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = typed(f"{words} --json", capsys)
    assert (code, error) == (0, "")
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found["question"] == question
    synthetic = "synthetic" in words
    assert (found["law"] or {}).get("synthetic", False) is synthetic
    assert any("made-up law" in warning for warning in found["warnings"]) is synthetic
    assert any("need a loss law" in note for note in found["notes"]) is not synthetic
    if "--bits" in words and question not in ("waste", "fusion"):
        assert f"qat.bits={words.split('--bits ')[1].split()[0]}" in found["overrides"]


@pytest.mark.parametrize("columns", [60, 80, 200])
@pytest.mark.parametrize("words", ASKED)
def test_people_read_the_same(
    words: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, text, _ = typed(words, capsys)
    assert code == 0
    flowing = " ".join(text.split())
    assert ("made-up law" in flowing) is ("synthetic" in words)
    assert ("need a loss law" in flowing) is ("synthetic" not in words)
    assert "None" not in text
    assert "nan" not in text
    table, sentences = text.split("\n\n")[1:3]
    assert max(map(len, table.splitlines())) <= columns
    assert max(map(len, sentences.splitlines())) <= columns


def test_without_bits_every_bit_width_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(typed(f"{RUN} --json", capsys)[1])["plan"]["rows"]
    assert [row["bits"] for row in rows] == list(BIT_WIDTHS)
    for row in rows:
        alone = json.loads(typed(f"{RUN} --bits {row['bits']} --json", capsys)[1])["plan"]
        assert row["plan"]["fraction"] == alone["fraction"]


@pytest.mark.parametrize(("words", "told"), REFUSED.items())
def test_what_cannot_be_answered_is_refused(
    words: str, told: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, error = typed(words, capsys)
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert [part for part in told if part not in error] == [], error


@pytest.mark.parametrize(("words", "told"), NOT_PARSED.items())
def test_a_wrong_command_line_names_what_is_wrong(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, error = typed(words, capsys)
    assert (code, out) == (2, "")
    assert told in " ".join(error.replace("│", " ").split())


def test_without_words_the_questions_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = typed("", capsys)
    assert code == 2
    code, shown, _ = typed("--help", capsys)
    assert (code, shown.split()) == (0, out.split())


def test_every_option_is_declared_once() -> None:
    """Commands that share an option share its declaration: its text, its example and what reads it."""
    group = get_command(planner)
    assert isinstance(group, TyperGroup)
    options = sorted(
        (parameter.opts[0], parameter.metavar, parameter.help)
        for command in (group, *group.commands.values())
        for parameter in command.params
        if parameter.param_type_name == "option" and parameter.opts[0] != "--help"
    )
    for flag, declared in itertools.groupby(options, key=lambda option: option[0]):
        assert len(set(declared)) == 1, flag


def test_the_help_names_every_law() -> None:
    words = re.findall(r"[\w-]+", options.LAW.help)
    assert [law for law in (*FRACTION_LAWS, *NAMED) if law not in words] == []


def test_every_number_outside_its_range_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    """With a law both it and the closed form are shown, and each has its own range."""
    for words in ("--params 8B --tokens 400B --bits 4", "compute --flops 2e22 --params 8B --bits 4 --qat-overhead 1.1"):
        text = " ".join(typed(f"{words} --law synthetic", capsys)[1].split())
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


@pytest.mark.parametrize("text", ["100B", "2.3B", "96141861677", "1M", "500"])
def test_amounts_are_written_without_loss(text: str) -> None:
    assert exact_amount(parse_amount("--x", text)) == text


@pytest.mark.parametrize("text", ["500B", "2.33MB", "500GB", "20GB", "3.8TB"])
def test_bytes_are_written_as_they_are_read(text: str) -> None:
    assert bytes_label(parse_bytes("--x", text)) == text


@pytest.mark.parametrize("text", ["", "-1", "1.2.3", "12Q", "0", "nan", "inf", "1e400", "5MB"])
def test_no_amounts(text: str) -> None:
    with pytest.raises(InputError, match="--x"):
        parse_amount("--x", text)


@pytest.mark.parametrize(
    "words",
    [
        "--params 396M --tokens 100B --bits 4 --batch-tokens 1e-300",
        "--params 1e19 --tokens 100B --bits 4",
        "memory 500MB --tokens 1B --vocab-size 1e18",
        "compute --flops 1e30 --params 1 --bits 4 --law synthetic",
        "compute --gpu-hours 1e30 --tokens-per-second 1e30 --params 1M",
        "checkpoint --trained-tokens 1e308 --params 1e-300",
        "waste --params 1e300 --tokens 1 --bits 4 --fraction 1e-300 --law synthetic",
        "fusion --params 396M --tokens 100B --bits 4 --fused-loss 1e30 --sequential-loss 1e-9 --law synthetic",
        "bit-widths --params 396M --tokens 100B --tolerance 1e30 --law synthetic",
    ],
)
def test_an_absurd_number_is_refused_before_anything_overflows(words: str) -> None:
    with pytest.raises(InputError):
        planner(words.split(), standalone_mode=False)


def test_costs_of_gpu_hours_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    """500 h x 3600 s x 989e12 x 0.4 FLOP/s over 6 x 396e6 FLOPs a token; the same speed, measured, gives the same."""
    tokens = 500 * 3600 * 989e12 * 0.4 / (6 * 396e6)
    for words in (
        f"compute {H200} --params 396M --bits 4",
        f"compute --gpu-hours 500 --tokens-per-second {989e12 * 0.4 / (6 * 396e6)!r} --params 396M --bits 4",
        f"compute --flops {500 * 3600 * 989e12 * 0.4!r} --params 396M --bits 4",
    ):
        found = json.loads(typed(f"{words} --json", capsys)[1])
        assert found["plan"]["chosen"]["tokens"] == pytest.approx(tokens, rel=1e-9)
        assert found["plan"]["budget"]["overhead"] == pytest.approx(1)


def test_the_waste_of_a_fraction_is_the_loss_of_fewer_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    """By definition: (1 - wasted) D tokens, split at their optimum, reach the loss of D tokens at the fraction."""
    ask = "--params 396M --bits 4 --law synthetic --json --tokens"
    split = json.loads(typed(f"waste {ask} 100B --fraction 0.1", capsys)[1])["plan"]
    tokens = (1 - split["wasted"]) * 100e9
    assert 0 < split["wasted"] < 1
    assert json.loads(typed(f"{ask} {tokens!r}", capsys)[1])["plan"]["loss"] == pytest.approx(split["loss"], abs=1e-9)
