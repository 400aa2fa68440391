"""Rows, figure and JSON of a timeline, and the comparison of two."""

import json
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from qatscale.cli.dry_run import COLUMNS, describe
from qatscale.schedule.build import build_timeline
from qatscale.schedule.difference import first_difference
from qatscale.schedule.figure import draw, rate_curve
from tests.schedule.schedule_configs import TOKENS_PER_STEP, make_config

SEQUENTIAL = {"scheme": "sequential", "fraction": 0.4, "bits": 2, "learning_rate": 5e-4}
TRUNK = {"warmup_tokens": 5 * TOKENS_PER_STEP, "cooldown_fraction": 0}


def test_rows_say_what_the_segments_do():
    config = make_config(schedule={"shape": "linear", "warmup_fraction": 0.1}, qat=SEQUENTIAL)
    timeline = build_timeline(config)
    rows = describe(timeline, config)
    assert [(row[0], row[1], row[2], row[9]) for row in rows] == [
        ("warmup", "0", "6", "full"),
        ("stable", "6", "48", "full"),
        ("cooldown", "48", "60", "full"),
        ("qat_warmup", "60", "61", "2 bits"),
        ("qat_stable", "61", "92", "2 bits"),
        ("qat_cooldown", "92", "100", "2 bits"),
    ]
    assert rows[2] == (
        "cooldown", "48", "60", "12", "12K", "60K", "0.001 → 8.33e-05", "0.9, 0.95", "0.1", "full",
    )  # fmt: skip
    assert rows[4][6:] == ("0.0005", "0.9, 0.95", "0.1", "2 bits")
    assert all(len(row) == len(COLUMNS) for row in rows)


def test_to_dict_survives_json_and_holds_the_rates():
    timeline = build_timeline(make_config(schedule={"shape": "linear"}, qat=SEQUENTIAL))
    told = json.loads(json.dumps(timeline.to_dict()))
    assert (told["steps"], told["tokens"], told["switch_step"], told["qat_fraction"]) == (100, 100_000, 60, 0.4)
    assert told["boundaries"] == [48, 60, 92]
    assert [segment["end"] for segment in told["segments"]][-1] == 100
    for segment in told["segments"]:
        first, last = timeline.at(segment["start"]), timeline.at(segment["end"] - 1)
        assert segment["learning_rate"] == [first.learning_rate, last.learning_rate]
        assert segment["betas"] == list(first.betas)


@pytest.mark.parametrize(
    "qat",
    [{}, {"scheme": "scratch"}, SEQUENTIAL, {"scheme": "fused", "fraction": 0.3}, {"scheme": "fused", "fraction": 0.2}],
)
def test_the_figure_is_drawn_without_pyplot(tmp_path, qat):
    config = make_config(qat=qat)
    path = draw(build_timeline(config), config, tmp_path / "figures" / "timeline.png")
    image = imread(path)
    assert image.shape[0] > 400
    assert image.shape[1] > 900
    blue = np.abs(image[..., :3] - np.array([0x00, 0x72, 0xB2]) / 255).max(axis=-1) < 0.02
    assert blue.any(axis=0).mean() > 0.8, "the curve runs over the figure's width"
    shaded = np.abs(image[..., :3] - (1 - 0.18 * (1 - np.array([0xE6, 0x9F, 0x00]) / 255))).max(axis=-1) < 0.02
    columns = shaded.any(axis=0).mean()
    fraction = build_timeline(config).qat_fraction
    # The legend's patch has the colour too; the axes cover about nine tenths of the width.
    assert columns == pytest.approx(0.9 * fraction, abs=0.12)


def test_drawing_leaves_no_global_state(tmp_path):
    code = f"""
import sys
from pathlib import Path
from tests.schedule.schedule_configs import make_config
from qatscale.schedule.build import build_timeline
from qatscale.schedule.figure import draw
config = make_config()
draw(build_timeline(config), config, Path({str(tmp_path)!r}) / "timeline.svg")
print("matplotlib.pyplot" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
    assert (tmp_path / "timeline.svg").read_text().startswith("<?xml")


def test_the_drawn_curve_is_the_applied_rate():
    timeline = build_timeline(make_config(5000, qat=SEQUENTIAL))
    tokens, rates = rate_curve(timeline)
    assert tokens == sorted(set(tokens))
    assert (tokens[0], tokens[-1]) == (0, 4999 * TOKENS_PER_STEP)
    assert rates == [timeline.at(at // TOKENS_PER_STEP).learning_rate for at in tokens]


def test_a_branch_with_another_tail_equals_its_trunk_up_to_the_tail():
    trunk = build_timeline(make_config(schedule=TRUNK))
    fp = build_timeline(make_config(schedule=TRUNK | {"cooldown_fraction": 0.2}))
    fused = build_timeline(make_config(schedule=TRUNK, qat={"scheme": "fused", "fraction": 0.3}))
    longer = build_timeline(make_config(steps=300, schedule=TRUNK | {"cooldown_fraction": 0.1}))
    # The cooldown's first step has the full rate: it is the second one that differs.
    assert first_difference(trunk, fp, 100).startswith("learning_rate at step 81: ")
    assert first_difference(trunk, fp, 81) is None
    assert first_difference(trunk, fused, 100) == "quantized at step 70: False against True"
    assert first_difference(trunk, longer, 100) is None


def test_a_warmup_as_a_share_differs_with_the_length_of_the_schedule():
    trunk = build_timeline(make_config(200, schedule={"warmup_fraction": 0.1, "cooldown_fraction": 0}))
    sequential = build_timeline(make_config(200, schedule={"warmup_fraction": 0.1}, qat=SEQUENTIAL))
    *setting, first, _, second = first_difference(trunk, sequential, 90).split()
    assert " ".join(setting) == "learning_rate at step 0:"
    assert (float(first), float(second)) == (pytest.approx(1e-3 / 20), pytest.approx(1e-3 / 12))


def test_adamw_settings_are_compared_too():
    plain = build_timeline(make_config())
    other = build_timeline(make_config(schedule={"phases": {"cooldown": {"weight_decay": 0.0}}}))
    assert first_difference(plain, other, 100) == "weight_decay at step 80: 0.1 against 0.0"


def test_beyond_the_shorter_run_nothing_is_the_same():
    short, long = build_timeline(make_config(50, schedule=TRUNK)), build_timeline(make_config(80, schedule=TRUNK))
    assert first_difference(short, long, 50) is None
    assert first_difference(short, long, 60) == "steps at step 50: 50 against 80"
    assert first_difference(short, short, 60) is None


def test_comparing_million_step_runs_does_not_walk_their_stable_phases():
    a = build_timeline(make_config(1_000_000, schedule=TRUNK))
    b = build_timeline(make_config(1_000_000, schedule=TRUNK | {"cooldown_fraction": 0.0001}))
    assert first_difference(a, b, 1_000_000).startswith("learning_rate at step 999901: ")
