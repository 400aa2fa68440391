"""Study files: what is wrong with one is told by key, value, what is allowed and the nearest name."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from qatlaw import synthetic
from qatlaw.bit_widths import BIT_WIDTHS_TEXT
from qatlaw.fit_file import fit_file, write_fit
from qatlaw.fitting import fit
from qatlaw.laws import QAT_PER_BITS
from qatlaw.results import write_results
from qatscale.cli import main
from qatscale.cli.study_run import _conclude
from qatscale.config.recipe import load_run_config
from qatscale.errors import UserError
from qatscale.study.file import read_study
from qatscale.study.folder import StudyFolder
from qatscale.study.grid import grid
from qatscale.study.lay_out import lay_out
from qatscale.study.plan import plan_study
from qatscale.study.state import StudyState
from qatscale.tracking.store import Cursor
from tests.wrong_values import NO_SUCH_BITS

SMALL = Path(__file__).parents[2] / "analysis" / "studies" / "small.yaml"
GOOD = {
    "sizes": "[debug]", "tokens": "[100K]", "bits": "[2, 4]", "fractions": "[0, 0.3, 1]", "schemes": "[sequential]",
}  # fmt: skip


def written(folder: Path, **changes: str | None) -> Path:
    """The good study with other values; None takes a key out."""
    lines = {**GOOD, **changes}
    file = folder / "study.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in lines.items() if value is not None))
    return file


# what is wrong -> changes of the good study, the key that is named, and what the message must hold besides
WRONG: dict[str, tuple[dict[str, str | None], tuple[str, ...]]] = {
    "an unknown key": ({"fraction": "[0.1]"}, ("fraction", "'fractions'", "line 6")),
    "a missing key": ({"bits": None}, ("bits", "[2, 4]")),
    "nothing": ({"bits": "[]"}, ("bits", "[2, 4]")),
    "no tokens": ({"tokens": None}, ("tokens", "tokens_per_parameter: [20, 80]")),
    "tokens twice": ({"tokens_per_parameter": "[20]"}, ("tokens", "tokens_per_parameter")),
    "not an amount": ({"tokens": "[2X]"}, ("tokens[0]", "'2X'", "2.3B", "line 2")),
    "no such bit width": (
        {"bits": f"[2, {NO_SUCH_BITS}]"}, ("bits[1]", f" {NO_SUCH_BITS}:", BIT_WIDTHS_TEXT, "line 3"),
    ),
    "per cent": ({"fractions": "[0, 30]"}, ("fractions[1]", "30", "0 (full precision) to 1", "0.3")),
    "a scheme's name": ({"schemes": "[sequentiel]"}, ("schemes[0]", "'sequentiel'", "'sequential'")),
    "a scheme of one phase": ({"schemes": "[scratch]"}, ("schemes[0]", "'scratch'", "1 into fractions")),
    "twice the same": ({"fractions": "[0.3, 0.30]"}, ("fractions", "0.3 twice", "`seeds`")),
    "a truth value": ({"seeds": "[true]"}, ("seeds[0]", "True", "whole number")),
    "a recipe's name": ({"sizes": "[debgu]"}, ("sizes[0].recipe", "'debgu'", "'debug'", "line 1")),
    "a size that is a number": ({"sizes": "[86]"}, ("sizes[0]", "86", "name, recipe, set, processes")),
    "a size's key": ({"sizes": "[{name: a, recipe: debug, sets: []}]"}, ("sizes[0].sets", "'set'")),
    "a size without a name": ({"sizes": "[{recipe: debug}]"}, ("sizes[0].name",)),
    "two sizes of one name": ({"sizes": "[debug, {name: debug, recipe: quickstart}]"}, ("sizes", "'debug'")),
    "an override of an axis": ({"set": "[qat.bits=4]"}, ("set[0]", "'qat.bits=4'", "the study's bits")),
    "an override of the seed": ({"set": "[data.seed=4]"}, ("set[0]", "the study's seeds")),
    "a key that no recipe has": ({"vary": "{qat.lr: [1]}"}, ("vary.qat.lr", "Known in qat", "line 6")),
    "a key that is an axis": ({"vary": "{qat.bits: [2]}"}, ("vary.qat.bits", "the study's bits")),
    "values that are not a mapping": ({"vary": "[1]"}, ("vary", "[1]", "key: [values]")),
    "a grid's key": ({"grids": "[{bit: [2]}]"}, ("grids[0].bit", "'bits'")),
    "a grid's value": ({"grids": "[{bits: [2]}, {bits: [9]}]"}, ("grids[1].bits[0]", " 9:", "line 6")),
    "no grids": ({"grids": "[]"}, ("grids", "[]", "a list of mappings")),
    "no processes": ({"sizes": "[{name: a, recipe: debug, processes: 0}]"}, ("sizes[0].processes", " 0:", "above 0")),
    "not an override": ({"set": "[qat]"}, ("set[0]", "'qat'", "KEY=VALUE", "qatscale config")),
    "several": (
        {"bits": "[9]", "fractions": "[2]", "seed": "1"}, ("bits[0]", "3 problems", "fractions[0] = 2", "'seeds'"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_study_is_refused(what: str, tmp_path: Path) -> None:
    changes, (key, *facts) = WRONG[what]
    with pytest.raises(UserError) as caught:
        read_study(written(tmp_path, **changes))
    assert caught.value.key == key
    assert [fact for fact in facts if fact not in str(caught.value)] == []


def names(file: Path) -> list[str]:
    return [run.route.name for run in grid(read_study(file)).runs]


def test_one_value_stands_for_a_list_of_one(tmp_path: Path) -> None:
    lists = names(written(tmp_path, bits="[2]", fractions="[0.5]", seeds="[1]"))
    assert lists == names(written(tmp_path, sizes="debug", tokens="100K", bits="2", fractions="0.5", seeds="1"))
    assert lists == ["debug-100K-sequential-2bit-f0.5-seed1"]


def test_any_key_can_be_varied(tmp_path: Path) -> None:
    """All combinations; a key of QAT makes no second full-precision run, any other key does."""
    file = written(tmp_path, bits="[2]", fractions="[0, 0.5]", vary="{qat.learning_rate: [1e-3, 2e-3]}")
    runs = {run.route.name: run.config for run in grid(read_study(file)).runs}
    assert sorted(config.qat.scheme for config in runs.values()) == ["fp", "sequential", "sequential"]
    assert {config.qat.learning_rate for config in runs.values() if config.qat.scheme != "fp"} == {1e-3, 2e-3}
    file = written(
        tmp_path, fractions="[0]", vary="{optimizer.betas: [[0.9, 0.95], [0.9, 0.99]], batch.micro_batch: [1, 2]}"
    )
    runs = {run.route.name: run.config for run in grid(read_study(file)).runs}
    found = {(config.optimizer.betas, config.batch.micro_batch) for config in runs.values()}
    assert found == {((0.9, beta), micro) for beta in (0.95, 0.99) for micro in (1, 2)}
    assert len(runs) == 4, "each has a name of its own"


def test_orders_of_the_cooldowns_data_branch_where_it_starts(tmp_path: Path) -> None:
    """Full precision and fused QAT, three orders each: one trunk, five branches, and the first order is the trunk's."""
    file = written(tmp_path, bits="[2]", fractions="[0, 0.2]", schemes="[fused]", cooldown_data_seeds="[0, 1, 2]")
    planned = plan_study(file)
    trunk, *branches = planned.tree.jobs
    runs = {run.route.name: run for run in planned.grid.runs}
    assert trunk.parent is None
    assert [job.parent for job in branches] == [trunk.route.name] * 5
    assert {job.start for job in branches} == {runs[trunk.route.name].timeline.last_cooldown}
    assert sorted(run.config.data.cooldown_seed for run in runs.values()) == [0, 0, 1, 1, 2, 2]
    assert {run.config.data.seed for run in runs.values()} == {0}


def test_adamw_in_the_cooldown_is_varied_in_the_phases_of_each_scheme(tmp_path: Path) -> None:
    """The cooldown of a fused run is its qat_cooldown; branches part there, and the recipe's own value is no branch."""
    betas = "[[0.9, 0.95], [0.9, 0.99]]"
    vary = f"{{schedule.phases.cooldown.betas: {betas}, schedule.phases.qat_cooldown.betas: {betas}}}"
    file = written(tmp_path, bits="[2]", fractions="[0, 0.2]", schemes="[fused]", vary=vary, grids="[{vary: {}}, {}]")
    planned = plan_study(file)
    last = sorted((run.config.qat.scheme, run.timeline.segments[-1].betas) for run in planned.grid.runs)
    assert last == [("fp", (0.9, 0.95)), ("fp", (0.9, 0.99)), ("fused", (0.9, 0.95)), ("fused", (0.9, 0.99))]
    assert {run.timeline.segments[1].betas for run in planned.grid.runs} == {(0.9, 0.95)}
    assert len({job.start for job in planned.tree.jobs if job.parent}) == 1
    assert [same for _, same in planned.grid.repeated] == ["debug-100K-fp", "debug-100K-fused-2bit-f0.2"]


def test_cells_that_are_one_training_are_one_run(tmp_path: Path) -> None:
    """A key's default, an alias of a shape, a setting of another shape. What is evaluated still counts."""
    for vary, runs in (
        ("{schedule.shape: [1-sqrt, sqrt]}", 1),
        ("{schedule.shape: [linear], schedule.exponent: [0.5, 0.7]}", 1),
        ("{schedule.shape: [1-sqrt], schedule.exponent: [0.5, 0.7]}", 2),
        ("{evaluation.tokens: [10K, 20K]}", 2),
        ("{optimizer.spike_factor: [null, 10]}", 2),
    ):
        assert len(names(written(tmp_path, fractions="[0]", vary=vary))) == runs, vary


def test_what_differs_from_the_first_step_shares_no_trunk(tmp_path: Path) -> None:
    """Two batches, or two values of Adam's eps, are two trainings although their rates agree."""
    for vary, roots in (("{optimizer.eps: [1e-8, 1e-6]}", 2), ("{qat.optimizer_state: [keep, reset]}", 1)):
        file = written(tmp_path, bits="[2]", fractions="[0, 0.5]", vary=vary)
        assert len({run.route.root for run in grid(read_study(file)).runs}) == roots


def test_a_study_is_the_union_of_its_grids(tmp_path: Path) -> None:
    """Each grid has its own values of some axes and the study's of the others; a run in two of them is one run, and a
    full-precision run is evaluated at the widths of all."""
    file = written(tmp_path, grids="[{fractions: [0, 0.3], bits: [2]}, {bits: [4], seeds: [0, 1]}]")
    found = names(file)
    assert len(found) == len(set(found))
    two, four = ({name for name in found if f"{bits}bit" in name} for bits in (2, 4))
    assert {name.rpartition("2bit")[2] for name in two} == {"-f0.3"}
    assert {name.rpartition("4bit")[2] for name in four} == {"-f0.3", "", "-f0.3-seed1", "-seed1"}
    full = {run.config.seed: run.config for run in grid(read_study(file)).runs if run.config.qat.scheme == "fp"}
    assert full[0].evaluation.ptq_bits == [2, 4]
    assert full[1].evaluation.ptq_bits == [4]


def test_a_study_that_grows_keeps_the_names_of_its_runs(tmp_path: Path) -> None:
    before = set(names(written(tmp_path)))
    after = set(names(written(tmp_path, seeds="[0, 3]", fractions="[0, 0.15, 0.3, 1]", tokens="[100K, 123_457]")))
    assert before < after


def test_fractions_that_nearly_agree_are_two_runs(tmp_path: Path) -> None:
    file = written(tmp_path, bits="[2]", fractions="[0.3048531, 0.3048532]")
    assert {run.config.qat.fraction for run in grid(read_study(file)).runs} == {0.3048531, 0.3048532}


@pytest.mark.parametrize(
    ("what", "told"),
    [("no.yaml", "no such file"), ("bent.yaml", "bent.yaml"), ("empty.yaml", "holds no"), ("x" * 300, "no such file")],
)
def test_a_file_that_is_no_study_is_refused(what: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "bent.yaml").write_text("bits: [2")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(UserError, match=told):
        read_study(tmp_path / what)


def test_a_grid_has_a_largest_size(tmp_path: Path) -> None:
    """Counted before a run of it is made."""
    many = list(range(2000))
    with pytest.raises(UserError, match=r"a grid of up to 36,000,000 runs; at most 10,000"):
        read_study(written(tmp_path, seeds=str(many), tokens=str([10_000 + i for i in range(3000)])))
    with pytest.raises(UserError, match=r"seeds.*holds 7 twice"):
        read_study(written(tmp_path, seeds=str([*range(50_000), 7])))


def test_errors_of_a_recipes_own_keys_come_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, set="[model.widht=3]")
    assert run("study", "plan", str(file)) == 2
    assert "model.widht" in capsys.readouterr().err


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


def test_the_plan_for_programs_holds_runs_that_can_be_started(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("study", "plan", str(SMALL), "--json", "--law", "synthetic") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["tokens"] == sum(job["new_tokens"] for job in plan["runs"])
    assert plan["tokens"] < 0.5 * plan["tokens_alone"]
    folders = set()
    for job in plan["runs"]:
        config = load_run_config(job["recipe"], job["overrides"])
        if job["branch_from"]:
            folder, _, step = job["branch_from"].rpartition("@")
            assert folder in folders, "its parent comes before it"
            assert int(step) == job["start"]
        assert job["new_tokens"] == (config.steps - job["start"]) * config.tokens_per_step
        folders.add(str(config.folder))
    information = plan["information"]
    assert information["synthetic"]
    assert set(information["schemes"]) == {"sequential", "fused"}
    for certainty in information["schemes"].values():
        assert certainty["before"] is None
        assert 0 < certainty["after"]["parameters"]["gamma"] < 0.1


def test_the_plan_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, tokens="[100K, 200K]")
    assert run("study", "plan", str(file), "--law", "synthetic") == 0
    said = capsys.readouterr().out
    assert "debug-200K-fp" in said
    assert "debug-200K-fp @313" in said, "it goes on from the shorter run before its cooldown"
    assert "made up" in said or "synthetic" in said
    assert "not determined" in said, "one size tells nothing of the size's exponent"
    name = "a-name-of-one-hundred-and-more-letters" * 3
    assert run("study", "plan", str(written(tmp_path, sizes=f"[{{name: {name}, recipe: debug}}]"))) == 0
    assert re.search(rf"{name}-100K-sequential-4bit-f0.3 @\d+  [\d.]+K\n", capsys.readouterr().out), "no number is cut"


def test_runs_there_are_already_count_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The study of one tiny size adds to the synthetic grid's certainty, and alone has none of its size's exponent."""
    synthetic.table(0).frame.to_csv(tmp_path / "known.csv", index=False)
    file = written(tmp_path)
    assert run("study", "plan", str(file), "--law", "synthetic", "--table", str(tmp_path / "known.csv"), "--json") == 0
    found = json.loads(capsys.readouterr().out)["information"]["schemes"]["sequential"]
    before, after = (found[key]["parameters"] for key in ("before", "after"))
    assert all(after[name] <= before[name] * (1 + 1e-9) for name in before), "more runs never know less"
    assert after["gamma"] < 0.99 * before["gamma"], "short runs lie far from the others"
    assert run("study", "plan", str(file), "--law", "synthetic", "--json") == 0
    alone = json.loads(capsys.readouterr().out)["information"]["schemes"]["sequential"]["after"]["parameters"]
    assert alone["eta"] is None


def test_schemes_are_certain_each_for_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A study of both says of each what a study of it alone says."""

    def certainty(schemes: str) -> dict[str, object]:
        file = written(
            tmp_path, sizes="[86m, 194m, 396m]", tokens="[4B, 16B, 64B]", fractions="[0, 0.25, 0.5, 0.75]",
            bits="[1, 2, 4]", schemes=schemes,
        )  # fmt: skip
        assert run("study", "plan", str(file), "--law", "synthetic", "--json") == 0
        return json.loads(capsys.readouterr().out)["information"]["schemes"]

    both = certainty("[sequential, fused]")
    assert both == {**certainty("[sequential]"), **certainty("[fused]")}


def test_what_the_runs_hardly_tell_is_not_determined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tenfold noise takes the coefficients beyond 30 %, and nothing is printed as 50 or 1000 %."""
    file = written(
        tmp_path, sizes="[86m, 194m, 396m]", tokens="[4B, 16B, 64B]", fractions="[0, 0.25, 0.75]", bits="[1, 2, 4]"
    )
    assert run("study", "plan", str(file), "--law", "synthetic", "--noise", "0.02") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    told = {line[0]: " ".join(line[1:]) for line in lines if line[0] in synthetic.COEFFICIENTS}
    assert told["phi"] == told["lambda"] == told["theta"] == "not determined"
    shares = [float(error[:-1]) for error in told.values() if error.endswith("%")]
    assert shares
    assert max(shares) <= 30


def test_a_law_for_one_width_is_certain_of_that_width(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says nothing of the optimal fraction at another."""
    table = synthetic.table(0, noise=5e-4)
    result = fit(QAT_PER_BITS, table.where(table.column("n_params") < 5e8).of_width(2))
    write_fit(tmp_path / "two.json", fit_file(result))
    file = written(tmp_path, sizes="[86m, 194m, 396m]", tokens="[4B, 16B, 64B]", fractions="[0, 0.25, 0.5, 0.75]")
    assert run("study", "plan", str(file), "--law", str(tmp_path / "two.json"), "--json") == 0
    found = json.loads(capsys.readouterr().out)["information"]["schemes"]["sequential"]["after"]
    assert list(found["fraction"]) == ["2"]
    assert len(found["fraction"]["2"]) == 9


def test_options_that_do_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(written(tmp_path))
    assert run("study", "plan", file, "--runs", "runs") == 2
    assert "--law" in capsys.readouterr().err
    assert run("study", "plan", file, "--law", "nothing.json") == 2
    assert "--law = 'nothing.json'" in capsys.readouterr().err
    assert run("study", "plan", file, "--law", "synthetic", "--noise", "0") == 2
    assert "--noise = 0.0" in capsys.readouterr().err


def test_a_study_that_moves_with_its_data_finds_them(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    for path in (before / "data", before / "studies"):
        path.mkdir(parents=True)
    (before / "ds.json").write_text("{}")
    file = written(before, set=f"[data.path={before / 'data'}, engine.ds_config={before / 'ds.json'}]")
    lay_out(file, StudyFolder(before / "studies" / "one"))
    before.rename(after)
    moved = StudyFolder(after / "studies" / "one")
    config = moved.config(next(iter(moved.jobs)))
    assert (config.data.path, config.engine.ds_config) == (after / "data", str(after / "ds.json"))
    assert config.output == moved.runs


def test_a_run_that_never_began_is_tried_again_once_its_study_is_mended(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "one")
    lay_out(written(tmp_path), folder)
    first, *_ = folder.jobs
    claim = folder.claims.take(first, 0, "worker")
    assert claim is not None
    claim.close("failed", "data.path = '/nowhere': no such folder.")
    state = StudyState(folder)
    lay_out(written(tmp_path), folder)
    assert state.refresh()[first].state == "failed", "the same study: its failures stay until --retry"
    lay_out(written(tmp_path, set=f"[data.path={tmp_path}]"), folder)
    assert state.refresh()[first].state == "ready"


def test_what_mlflow_refused_is_known_by_reason(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "one")
    lay_out(written(tmp_path), folder)
    refused, other, *_ = folder.jobs
    for name, is_refused in ((refused, True), (other, False)):
        folder.run(name).path.mkdir(parents=True)
        Cursor(uri="file:mlruns", experiment="x", error="maintenance mode", refused=is_refused).save(folder.run(name))
    state = StudyState(folder)
    state.refresh()
    assert state.refusals() == {"maintenance mode": [refused]}


@pytest.mark.parametrize(
    "text", ["", "[" * 5000, '{"name": 1}', '[{"name": "a"}]', '[{"name": "a", "parent": null, "start": "x"}]']
)
def test_a_damaged_tree_is_named(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tree.json").write_text(text)
    assert run("study", "status", str(tmp_path)) == 2
    assert str(tmp_path / "tree.json") in capsys.readouterr().err


def test_a_study_without_a_finished_run_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = StudyFolder(tmp_path)
    for _ in range(2):  # without and with a table
        _conclude(folder)
        assert capsys.readouterr().out == "no law and no report: no run is done\n"
        write_results(folder.results, [])
