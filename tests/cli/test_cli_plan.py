"""`qatscale plan`: what it prints runs. Its overrides make a recipe that switches where the plan says."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.core import TyperGroup

from qatlaw.cli import planner
from qatscale.config.amounts import parse_amount
from qatscale.config.recipe import RECIPES, load_run_config, recipe_names
from qatscale.config.schema import QatConfig
from qatscale.config.sizes import count_parameters, flops_per_token, stored_weights
from qatscale.schedule.build import build_timeline
from qatscale.schedule.difference import first_difference
from qatscale.schedule.timeline import Timeline
from tests.cli.bad_inputs import run_command


def planned(typed: str) -> dict[str, Any]:
    code, out, error = run_command(["plan", *shlex.split(typed), "--json"])
    assert code == 0, error
    return json.loads(out)


@pytest.mark.parametrize(
    "typed",
    [
        "--params 396M --tokens 100B --bits 4",
        "--recipe 396m",
        "--recipe 2p2b --tokens 220B --bits 2 --law synthetic",
        "--params 86M --tokens 2.3B --bits 6",
        "memory 500MB --tokens 100B --law synthetic",
        "memory 60MB --tokens 20B --bits 2",
        "bit-widths --tokens 100B --params 759M --law synthetic",
        "compute --gpu-hours 500 --gpu H200 --mfu 0.4 --bits 4 --params 396M",
        "compute --gpu-hours 500 --gpu H200 --mfu 0.4 --qat-overhead 1.15 --recipe 396m --bits 4 --law synthetic",
    ],
)
def test_the_overrides_run_the_plan(typed: str) -> None:
    found = planned(typed)
    program, verb, recipe, *overrides = found["command"]
    assert (program, verb) == ("qatscale", "train")
    assert overrides == found["overrides"]
    code, out, error = run_command(["train", recipe, *overrides, "--dry-run"])
    assert code == 0, error
    config = load_run_config(recipe, overrides)
    fraction = float(next(o for o in overrides if o.startswith("qat.fraction=")).removeprefix("qat.fraction="))
    steps = round(config.tokens / config.tokens_per_step)
    assert f"switch to QAT before step {round((1 - fraction) * steps):,} " in out
    told = next(o for o in overrides if o.startswith("tokens=")).removeprefix("tokens=")
    assert config.tokens == parse_amount(told)
    if "memory" in typed:
        row = found["plan"]["rows"][found["plan"]["best"]]
        assert count_parameters(config.model) == row["plan"]["params"] == row["shape"]["params"]
    if "params 396M" in typed:
        assert recipe == "396m", "397.9M parameters are 396M"


def test_a_published_law_takes_size_and_group_from_a_recipe() -> None:
    """N without the embedding, and with a scale a row the width as group, as the laws count."""
    model = load_run_config("396m").model
    (row,) = planned("bit-widths --recipe 396m --tokens 100B --law chen-w4a16")["plan"]["rows"]
    weights = stored_weights(model, QatConfig())
    N = weights.params - weights.embedding.weights
    gap = 0.2522 * 1e11**0.1610 * math.log2(model.hidden_size) ** 0.3533 / N**0.3589
    assert row["gap"] == pytest.approx(gap)


@pytest.mark.parametrize("law", ["", " --law synthetic"])
@pytest.mark.parametrize("name", recipe_names())
def test_the_plan_of_a_recipe_is_its_scheme_s(name: str, law: str) -> None:
    """On Chinchilla's budget, where the cooldown is longer than the optimum, and on five times as many tokens."""
    recipe = load_run_config(name)
    params = count_parameters(recipe.model)
    asked = [f"--recipe {name} --tokens {ratio * params} --bits {bits:g}" for ratio in (20, 100) for bits in (2, 4)]
    asked += [f"bit-widths --recipe {name} --tokens {20 * params}"]
    asked += [f"compute --recipe {name} --flops {6 * params * 25 * params} --bits 4"]
    for typed in asked:
        found = planned(f"{typed}{law}")
        assert "qat.scheme=fused" in found["overrides"] or not found["overrides"]
        if not found["overrides"]:
            continue
        assert found["command"][:3] == ["qatscale", "train", name]
        timeline = build_timeline(load_run_config(name, found["overrides"]))
        if found["question"] == "run":
            plan = found["plan"]
            assert (timeline.switch_step, timeline.steps) == (plan["switch_step"], plan["steps"])
            held = round(recipe.schedule.cooldown_fraction * timeline.steps)
            optimum = timeline.steps - round((1 - plan["optimum"]) * timeline.steps)
            assert timeline.qat_steps == max(held, optimum)
            assert any(warning.startswith("the planned QAT fraction is") for warning in plan["warnings"]) == (
                held > optimum
            )
            assert plan["tokens_qat"] == round(plan["fraction"] * plan["tokens"])
            if not law:
                auto = [f"tokens={plan['tokens']}", f"qat.bits={plan['bits']:g}", "qat.fraction=auto"]
                assert build_timeline(load_run_config(name, auto)).planned_fraction == plan["fraction"]


def test_a_budget_is_spent_at_the_fraction_that_the_scheme_holds() -> None:
    plan = planned("compute --recipe 86m --flops 1e18 --qat-overhead 1.5 --bits 4 --law synthetic")["plan"]
    budget, chosen, optimum = plan["budget"], plan["chosen"], plan["compute_optimal"]
    assert optimum["fraction"] < 0.19 < chosen["fraction"] == pytest.approx(0.2, abs=1e-3)
    cost = budget["fp_cost"] * (1 - chosen["fraction"]) + budget["qat_cost"] * chosen["fraction"]
    assert chosen["tokens"] * cost == pytest.approx(1e18, rel=1e-3)
    assert chosen["loss"] > optimum["loss"]


def test_a_recipe_that_clashes_with_the_plan_is_told(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text((RECIPES / "86m.yaml").read_text())
    code, out, error = run_command(shlex.split(f"plan --recipe {own} --tokens 95M --bits 1"))
    assert (code, out) == (2, "")
    assert "schedule.warmup_tokens = 86000000" in error


@pytest.mark.parametrize(("tokens", "bits"), [("39.6B", 4), ("100B", 2), ("1T", 1.58)])
def test_auto_in_a_recipe_is_the_plan_of_the_recipe(tokens: str, bits: float) -> None:
    found = planned(f"--recipe 396m --tokens {tokens} --bits {bits}")["plan"]
    overrides = [f"tokens={tokens}", f"qat.bits={bits}", "qat.scheme=sequential", "qat.fraction=auto"]
    timeline = build_timeline(load_run_config("396m", overrides))
    assert timeline.planned_fraction == found["fraction"]
    assert (timeline.switch_step, timeline.steps) == (found["switch_step"], found["steps"])


def test_a_recipe_brings_its_tokens_and_bits_where_they_are_not_given() -> None:
    config = load_run_config("759m")
    plan = planned("--recipe 759m")["plan"]
    assert (plan["tokens"], plan["bits"]) == (config.tokens, config.qat.bits)
    assert plan["params"] == count_parameters(config.model)
    assert len(planned("bit-widths --recipe 759m")["plan"]["rows"]) > 1
    budget = planned("compute --recipe 759m --bits 4 --flops 1e21")["plan"]
    cost = flops_per_token(config.model, config.data.sequence_length)
    assert budget["chosen"]["tokens"] == pytest.approx(1e21 / cost, rel=1e-9)


def test_a_gpu_is_its_peak() -> None:
    by_name = planned("compute --gpu-hours 500 --gpu H200 --mfu 0.4 --params 396M --bits 4")
    by_peak = planned("compute --gpu-hours 500 --peak-flops 989T --mfu 0.4 --params 396M --bits 4")
    assert by_name == by_peak


def test_no_recipe_of_another_size_is_named() -> None:
    code, out, _ = run_command(shlex.split("plan --params 500M --tokens 100B --bits 4"))
    assert code == 0
    assert "qatscale train RECIPE tokens=100B qat.bits=4" in out


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("--params 396M --tokens 100B --bits 4", ("33.9%", "66.08B", "33.92B", "need a loss law", "qatscale fit")),
        ("--params 8B --tokens 100B --bits 4", ("warning: the optimal QAT fraction is an extrapolation", "N = 8B")),
        ("--recipe 396m --law synthetic", ("predicted loss", "made-up law", "fitted on no runs", "1 - D'/D")),
        ("memory 500MB --tokens 100B", ("1792 24", "With --bits", "Memory counts weights alone")),
    ],
)
def test_what_people_read(typed: str, told: tuple[str, ...]) -> None:
    code, out, error = run_command(["plan", *shlex.split(typed)])
    assert code == 0, error
    text = " ".join(out.split())
    assert [part for part in told if part not in text] == [], out


def examples() -> list[str]:
    """What the help of each command shows."""
    group = typer.main.get_command(planner)
    assert isinstance(group, TyperGroup)
    assert len(group.commands) >= 5
    return [str(command.epilog).removeprefix("Example: qatscale ") for command in (group, *group.commands.values())]


@pytest.mark.parametrize("example", examples())
def test_the_example_in_the_help_of_a_command_runs(example: str) -> None:
    code, out, error = run_command(shlex.split(example))
    assert (code, error) == (0, "")
    assert len(out.splitlines()) > 4


def test_an_answer_needs_neither_torch_nor_pandas() -> None:
    """That is what keeps it under a second."""
    code = (
        "import sys; from qatscale.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'deepspeed', 'pandas', 'scipy', 'matplotlib'} & set(sys.modules)))"
    )
    typed = "plan compute --gpu-hours 500 --gpu H200 --mfu 0.4 --recipe 396m --bits 4 --law synthetic"
    done = subprocess.run([sys.executable, "-c", code, *typed.split()], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# --- from a checkpoint ---


def pretend_run(folder: Path, timeline: Timeline, step: int, params: int) -> str:
    """What a plan reads of a run's folder, as a run writes it."""
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    run = {"name": folder.name, "id": folder.name, "created": 0.0, "parent": None, "n_params": params}
    files = {"run.json": run, "timeline.json": timeline.to_dict(), checkpoint / "manifest.json": {}}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize(("cooldown", "scheme"), [("0", "fused"), ("0.2", "sequential")])
@pytest.mark.parametrize("law", ["", "--law synthetic"])
def test_a_branch_goes_on_from_where_the_trunk_is(tmp_path: Path, cooldown: str, scheme: str, law: str) -> None:
    trunk = ["qat.scheme=fp", "tokens=20B", f"schedule.cooldown_fraction={cooldown}"]
    parent = load_run_config("194m", trunk)
    before = build_timeline(parent)
    params = count_parameters(parent.model)
    run = pretend_run(tmp_path / "trunk", before, before.steps, params)
    found = planned(f"checkpoint {run} --bits 2 {law}")
    assert found["plan"]["params"] == params
    assert found["plan"]["tokens_fp"] == before.tokens
    assert found["command"][:4] == ["qatscale", "branch", f"{run}@{before.steps}", "name=NAME"]
    assert f"qat.scheme={scheme}" in found["overrides"]
    after = build_timeline(load_run_config("194m", [*trunk, *found["overrides"]]))
    assert after.switch_step == before.steps
    assert after.tokens == found["plan"]["tokens"]
    assert first_difference(before, after, before.steps) is None


def test_a_real_trunk_is_branched_by_its_plan(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qatscale.cli.train import branch_config
    from qatscale.train.resume import plan_resume

    monkeypatch.chdir(world)
    found = planned("checkpoint runs/trunk@5 --bits 2 --law synthetic")
    checkpoint, *overrides = found["command"][2:]
    assert checkpoint == "runs/trunk@5"
    config = branch_config(checkpoint, ["name=planned" if o == "name=NAME" else o for o in overrides])
    timeline = build_timeline(config)
    start = plan_resume(config, timeline, checkpoint)
    assert start is not None
    assert (start.step, timeline.switch_step) == (5, 5)
    assert start.notices == ()
    assert config.qat.bits == 2


def test_a_checkpoint_in_the_cooldown_is_warned_of(tmp_path: Path) -> None:
    timeline = build_timeline(load_run_config("86m", ["qat.scheme=fp", "tokens=20B", "schedule.cooldown_fraction=0.2"]))
    run = pretend_run(tmp_path / "run", timeline, round(timeline.steps * 0.9), 86_000_000)
    assert any("inside its run's cooldown" in warning for warning in planned(f"checkpoint {run}")["warnings"])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere", "The folder does not exist"),
        ("empty", "It holds no run.json"),
        ("run@7", "no checkpoint at step 7. Take one of 100"),
        ("new", "has no checkpoint yet"),
        ("imported", "counts no trained tokens. Plan by numbers"),
        ("torn", "cannot be read"),
        ("lacking", "name: Field required"),
        ("switched", "trained in QAT since step "),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, name: str, told: str) -> None:
    timeline = build_timeline(load_run_config("86m", ["qat.scheme=fp", "tokens=1B"]))
    quantized = build_timeline(load_run_config("86m", ["tokens=1B", "qat.scheme=sequential", "qat.fraction=0.5"]))
    (tmp_path / "empty").mkdir()
    for run in ("run", "torn", "lacking"):
        pretend_run(tmp_path / run, timeline, 100, 86_000_000)
    pretend_run(tmp_path / "imported", timeline, 0, 86_000_000)
    pretend_run(tmp_path / "switched", quantized, quantized.steps, 86_000_000)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.json").write_text("{}")
    (tmp_path / "torn" / "timeline.json").write_text("{")
    (tmp_path / "lacking" / "run.json").write_text("{}")
    code, out, error = run_command(["plan", "checkpoint", str(tmp_path / name)])
    assert (code, out) == (2, "")
    assert re.match(r"error: (RUN|run) = ", error)
    assert told in error
