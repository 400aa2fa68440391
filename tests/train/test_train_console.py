"""What a person reads while a run goes on."""

from __future__ import annotations

import io
import math
import os
import pty
import subprocess
import sys
from typing import Any

import pytest

from qatscale.train.console import RunConsole, eta_seconds, format_duration, format_metrics

RECORD: dict[str, Any] = {
    "event": "metrics",
    "step": 250,
    "steps": 10,
    "tokens": 128_000,
    "phase": "qat_stable",
    "loss": 3.14159,
    "learning_rate": 0.0012345,
    "grad_norm": 0.98765,
    "tokens_per_second": 6400.0,
    "tflops": 0.03125,
    "mfu": None,
    "memory_gib": 1.256,
    "data_seconds": 0.0021,
}


def test_a_metrics_line_has_every_value_with_its_name() -> None:
    assert format_metrics(RECORD, 1000, 80) == (
        "step  250/1000    128K tokens  qat_stable    loss 3.1416  lr 1.23e-03\n"
        "  grad 0.988  6.4K tok/s  0.0312 TFLOP/s  1.26 GiB  ETA 1m00s"
    )


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("steps", [1000, 10_000_000])
def test_a_metrics_line_fits_with_the_loss_first_of_all(width: int, steps: int) -> None:
    """With all that a line can hold: MFU, scales at their floor, waiting for data, an ETA of days."""
    record = RECORD | {"mfu": 0.4149, "scales_floored": 0.0712, "data_seconds": 0.6, "tokens_per_second": 1234.0}
    lines = format_metrics(record, steps, width).split("\n")
    assert len(lines) == (1 if width >= 120 else 2)
    assert max(map(len, lines)) <= min(width, 120)
    shown = "  ".join(lines)
    for part in (f"250/{steps}", "qat_stable", "loss 3.1416", "grad 0.988", "floored 7.1%", "tok/s", "ETA "):
        assert part in shown, part


def test_the_mfu_stands_for_the_flops_where_the_peak_is_known() -> None:
    assert "MFU" not in format_metrics(RECORD, 1000, 80)
    assert "  MFU 41.5%  " in format_metrics(RECORD | {"mfu": 0.4149}, 1000, 80)


def test_waiting_for_data_is_shown_where_it_is_long() -> None:
    """10 steps of 512 tokens at 6,400 tokens/s take 0.8 s."""
    assert "data 50%" in format_metrics(RECORD | {"data_seconds": 0.4}, 1000)
    assert "data" not in format_metrics(RECORD | {"data_seconds": 0.039}, 1000)


def test_scales_at_their_floor_are_shown_where_there_are_some() -> None:
    assert "floored" not in format_metrics(RECORD | {"scales_floored": 0.0, "code_flips": 0.01}, 1000)
    assert "  floored 7.1%  " in format_metrics(RECORD | {"scales_floored": 0.0712}, 1000)


def test_the_eta_is_tokens_left_over_tokens_per_second() -> None:
    # 750 steps of 512 tokens at 6,400 tokens/s
    assert eta_seconds(RECORD, 1000) == 750 * 512 / 6400 == 60.0
    assert eta_seconds(RECORD | {"step": 1000, "tokens": 512_000}, 1000) == 0.0


@pytest.mark.parametrize(
    "change", [{"tokens_per_second": 0.0}, {"tokens_per_second": math.nan}, {"step": 0, "tokens": 0}]
)
def test_without_a_speed_there_is_no_eta(change: dict[str, float]) -> None:
    assert eta_seconds(RECORD | change, 1000) is None
    assert "ETA" not in format_metrics(RECORD | change, 1000)


def test_a_loss_that_is_not_finite_is_shown_as_what_it_is() -> None:
    assert "loss nan" in format_metrics(RECORD | {"loss": math.nan}, 1000)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0 s"), (0.0123, "1 s"), (0.972, "1 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1m00s"), (75, "1m15s"),
        (3599.6, "1h00m"), (5400, "1h30m"), (86400, "1d00h"), (93784, "1d02h"), (864000, "10d00h"), (math.inf, "?"),
    ],
)  # fmt: skip
def test_durations(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown


def test_into_a_file_go_plain_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    out = io.StringIO()
    with RunConsole(0, 1000, stream=out) as console:
        console.metrics(RECORD)
        console.advance(260)
        console.validation({"step": 250, "view": "quantized", "loss": 2.5, "perplexity": math.exp(2.5)})
        console.notice("[bold] is no markup " + "x" * 300)
    assert out.getvalue().splitlines() == [
        format_metrics(RECORD, 1000),
        "step 250: validation loss 2.5000, perplexity 12.182 (quantized view)",
        "[bold] is no markup " + "x" * 300,
    ]


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with RunConsole(1, 1000) as console:
        console.metrics(RECORD)
        console.validation({"step": 250, "view": "fp", "loss": 2.5, "perplexity": 12.0})
        console.notice("x")
        console.show("x")
        console.advance(3)
    assert capsys.readouterr() == ("", "")


def test_a_switch_is_shown_as_its_report() -> None:
    from qatscale.quant.report import ModuleReport, SwitchReport

    module = ModuleReport(("blocks.0.mlp.up",), 2, (64, 32), 64, 32, 0.5, 2.0)
    out = io.StringIO()
    with RunConsole(0, 1000, stream=out) as console:
        console.show(SwitchReport(500, (module,), {"norm": "a norm"}, 4096).table())
    assert "QAT from step 500" in out.getvalue()
    assert "64 x 32" in out.getvalue()


SCRIPT = f"""
from qatscale.train.console import RunConsole
with RunConsole(0, 1000) as console:
    console.metrics({RECORD!r})
    raise SystemExit("an error of the loop")
"""


def test_a_terminal_gets_a_progress_bar_that_ends_with_the_run() -> None:
    reader, writer = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "240"}
    child = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=writer, stderr=writer, env=environment)
    os.close(writer)
    seen = b""
    while True:
        try:
            part = os.read(reader, 4096)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(reader)
    assert child.wait() == 1
    shown = seen.decode()
    assert format_metrics(RECORD, 1000) in shown
    assert "250/1000 steps" in shown
    assert "ETA 1m00s" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("250/1000 steps"), "the cursor is shown again"
    assert "an error of the loop" in shown
