"""What a wrong recipe or override is answered. `BAD_OVERRIDES` and `BAD_FILES` are also shown to people."""

import json
import time
from pathlib import Path

import pytest

from qatlaw.bit_widths import BIT_WIDTHS_TEXT
from qatscale.config.ds_config import load_ds_config
from qatscale.config.recipe import load_run_config, resolved_yaml
from qatscale.config.schema import ModelConfig, RunConfig
from qatscale.errors import UserError, UserErrors
from tests.wrong_values import NO_SUCH_BITS

# overrides of the recipe `debug` -> the key that is named, and what the message must hold besides
BAD_OVERRIDES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("qat.schem=fused",): ("qat.schem", "'qat.scheme'"),
    ("optimiser.learning_rate=1e-3",): ("optimiser.learning_rate", "'optimizer.learning_rate'"),
    ("learning_rate=1e-3",): ("learning_rate", "optimizer.learning_rate, qat.learning_rate"),
    ("bits=2",): ("bits", "'qat.bits'"),
    ("optimizer.lr=1",): ("optimizer.lr", "learning_rate, betas, eps, weight_decay, gradient_clipping"),
    ("schedule.phases.coldown.betas=[0.9,1]",): ("schedule.phases.coldown.betas", "'schedule.phases.cooldown.betas'"),
    ("schedule.phases={coldown: {}}",): ("schedule.phases.coldown", "'schedule.phases.cooldown'"),
    ("schedule.phases={cooldown: {lr: 1}}",): ("schedule.phases.cooldown.lr", "betas, weight_decay"),
    ("qat=fused",): ("qat", "qatscale config qat"),
    ("tokens",): ("tokens", "tokens=VALUE", "2.3B"),
    ("--qat.bits=2",): ("--qat.bits", "'qat.bits'"),
    (f"qat.bits={NO_SUCH_BITS}",): ("qat.bits", f" {NO_SUCH_BITS}:", BIT_WIDTHS_TEXT),
    (f"qat.bits={10**400}",): ("qat.bits", BIT_WIDTHS_TEXT),
    ("evaluation.ptq_bits=[4,2,4.0]",): ("evaluation.ptq_bits", "without repeats"),
    ("qat.scheme=fusd",): ("qat.scheme", "'fusd'", "fp, sequential, fused or scratch", "'fused'"),
    ("qat.fraction=1.3",): ("qat.fraction", "1.3", "from 0 to 1 or auto"),
    ("qat.fraction=auot",): ("qat.fraction", "'auot'", "'auto'"),
    ("qat.fraction=0",): ("qat.fraction", "'fused'", "qat.scheme=fp"),
    ("qat.scheme=fp", "qat.fraction=0.3"): ("qat.fraction", "always 0", "qat.scheme=fused or qat.scheme=sequential"),
    ("qat.fraction=[1",): ("qat.fraction, line 1, column 3",),
    ("qat.group_size=48",): ("qat.group_size", "model.hidden_size = 64"),
    ("tokens=2.5.3",): ("tokens", "'2.5.3'", "2.3B, 100M, 50_000"),
    ("tokens=",): ("tokens", "null", "2.3B"),
    ("tokens=1e9999999K",): ("tokens", "'1e9999999K'"),
    ("tokens=!!timestamp 2020-99-9*",): ("tokens, line 1, column 1", "!!timestamp"),
    (f"tokens={'[' * 2000}",): ("tokens, line 1, column 52", "50 levels"),
    ("seed=" + "9" * 5000,): ("seed, line 1, column 1",),
    ("checkpoint.interval=0",): ("checkpoint.interval", "above 0", "null"),
    ("checkpoint.keep_at=[1K, x]",): ("checkpoint.keep_at[1]", "'x'"),
    ("batch.sequences=0",): ("batch.sequences", "above 0"),
    ("batch.sequences=1.5",): ("batch.sequences", "1.5"),
    ("model.layers=true",): ("model.layers", "True", "above 0"),
    (f"model.layers={2**64}",): ("model.layers", f"{2**63 - 1:,}"),
    (f"model.vocab_size={2**64}",): ("model.vocab_size", f"{2**63 - 1:,}"),
    ("optimizer.learning_rate=.inf",): ("optimizer.learning_rate", "inf"),
    (f"optimizer.learning_rate={10**400}",): ("optimizer.learning_rate", "above 0"),
    ("optimizer.betas=[0.9]",): ("optimizer.betas", "[0.9]", "a list of 2"),
    ("optimizer.betas=0.9,0.99",): ("optimizer.betas", "'0.9,0.99'", "a list of 2"),
    ("optimizer.betas=[0.9, 2]",): ("optimizer.betas[1]", "below 1"),
    ("model.heads=3",): ("model.heads", "model.hidden_size = 64"),
    ("model.heads=64",): ("model.heads", "1 channels"),
    ("model.kv_heads=3",): ("model.kv_heads", "model.heads = 2"),
    ("schedule.cooldown_tokens=1B", "schedule.cooldown_fraction=0.1"): (
        "schedule.cooldown_tokens", "schedule.cooldown_fraction = 0.1", "schedule.cooldown_fraction=null",
        "schedule.cooldown_tokens=null",
    ),
    ("qat.learning_rate=1e-3", "qat.lr_ratio=0.5"): (
        "qat.lr_ratio", "qat.learning_rate = 0.001", "qat.lr_ratio=auto", "qat.learning_rate=null",
    ),
    ("schedule.shape=exponential",): ("schedule.min_lr_ratio", "'exponential'", "0.01"),
    ("schedule.shape=piecewise",): ("schedule.knots", "schedule.knots=[1,0.5,0]"),
    ("schedule.knots=[1,0]",): ("schedule.knots", "'1-sqrt'", "schedule.shape=piecewise"),
    ("name=a/b",): ("name", "'a/b'", "letters"),
    (f"name={'x' * 300}",): ("name", "200"),
    ("name=null",): ("name", "null", "letters"),
}  # fmt: skip

# a recipe file -> what the message must hold
BAD_FILES = {
    "": ("is empty", "quickstart"),
    "# nothing but a comment\n": ("is empty", "quickstart"),
    "- a\n- b\n": ("holds a list",),
    "just words\n": ("holds a str",),
    "name: x\nmodel:\n  layers: 2\n  layers: 4\n": ("line 4, column 3", "'layers'", "line 3"),
    "name: x\n tokens: 1\n": ("line 2, column 8",),
}


@pytest.mark.parametrize("overrides", BAD_OVERRIDES, ids=lambda overrides: " ".join(overrides)[:60])
def test_a_bad_override_is_named_with_its_cure(overrides: tuple[str, ...]) -> None:
    key, *facts = BAD_OVERRIDES[overrides]
    with pytest.raises(UserError) as caught:
        load_run_config("debug", overrides)
    assert caught.value.key == key
    assert [fact for fact in facts if fact not in str(caught.value)] == []


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_is_named_with_its_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_run_config(path)
    assert [fact for fact in (str(path), *BAD_FILES[text]) if fact not in str(caught.value)] == []


def test_every_problem_is_reported_at_once_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = resolved_yaml(load_run_config("debug"))
    text = (
        text.replace("  layers: 2\n", "").replace("bits: 4", f"bits: {NO_SUCH_BITS}").replace("heads: 2", "heds: 2", 1)
    )
    path.write_text(text)
    lines = {line.strip(): number for number, line in enumerate(text.splitlines(), start=1)}
    with pytest.raises(UserErrors) as caught:
        load_run_config(path, ["tokens=x"])
    places = {
        "tokens": "on the command line", "model.layers": "", "model.heads": "",
        "model.heds": f"{path}, line {lines['heds: 2']}", "qat.bits": f"{path}, line {lines[f'bits: {NO_SUCH_BITS}']}",
    }  # fmt: skip
    assert [problem.key for problem in caught.value.problems] == list(places)
    for problem, place in zip(caught.value.problems, places.values(), strict=True):
        assert place in str(problem)


def test_every_unknown_override_is_reported_at_once() -> None:
    with pytest.raises(UserErrors) as caught:
        load_run_config("debug", ["qat.bit=2", "seed=1", "modle.layers=2"])
    assert [problem.key for problem in caught.value.problems] == ["qat.bit", "modle.layers"]


def test_of_countless_problems_the_first_are_explained(tmp_path: Path) -> None:
    """A suggestion takes milliseconds, so that it is made for the problems that are shown."""
    began, recipe, ds = time.process_time(), tmp_path / "many.yaml", tmp_path / "many.json"
    recipe.write_text("name: many\n" + "".join(f"seeed{number}: 1\n" for number in range(20_000)))
    ds.write_text(json.dumps({"zero_optimization": {f"stag{number}": 1 for number in range(20_000)}}))
    for read, name in ((load_run_config, recipe), (load_ds_config, ds)):
        with pytest.raises(UserErrors) as caught:
            read(str(name))
        lines = str(caught.value).splitlines()
        assert (len(lines), lines[0]) == (32, f"{len(caught.value.problems)} problems:")
        assert sum("Did you mean" in line for line in lines) >= 25
    assert time.process_time() - began < 15


def test_missing_sections_are_named_with_their_keys(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: x\ntokens: 1M\n")
    with pytest.raises(UserErrors) as caught:
        load_run_config(path)
    assert [problem.key for problem in caught.value.problems] == ["model", "data", "batch", "optimizer"]
    assert "sequences, micro_batch" in str(caught.value.problems[2])


def test_a_section_with_a_single_value(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(resolved_yaml(load_run_config("debug")).split("tracking:")[0] + "tracking: none\n")
    for overrides in ([], ["tracking.uri=none"]):
        with pytest.raises(UserError, match=r"tracking = 'none'.* section"):
            load_run_config(path, overrides)


@pytest.mark.parametrize(
    ("recipe", "fact"),
    [("debg", "'debug'"), ("13b", "Known: "), ("no/such.yaml", "no such file"), ("x" * 300, "Known: ")],
)
def test_an_unknown_recipe(recipe: str, fact: str) -> None:
    with pytest.raises(UserError) as caught:
        load_run_config(recipe)
    assert (caught.value.key, caught.value.value) == ("recipe", recipe)
    assert fact in str(caught.value)


def test_a_folder_and_a_binary_are_not_recipes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        load_run_config(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load_run_config(tmp_path / "x.yaml")
    with pytest.raises(UserError, match=r"Did you mean '.*x\.yaml'\?"):
        load_run_config(tmp_path / "y.yaml")


def test_an_alias_bomb_ends_at_once(tmp_path: Path) -> None:
    """Twelve lines that stand for 9^11 values."""
    bomb = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(bomb))
    with pytest.raises(UserError, match="100,000 values"):
        load_run_config(path)


def test_an_override_changes_one_of_two_aliases(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = resolved_yaml(load_run_config("debug"))
    phases = "phases:\n    warmup: &same {weight_decay: 0.2}\n    cooldown: *same\n"
    path.write_text(text.replace("phases: {}\n", phases))
    config = load_run_config(path, ["schedule.phases.cooldown.weight_decay=0"])
    assert {name: phase.weight_decay for name, phase in config.schedule.phases.items()} == {
        "warmup": 0.2,
        "cooldown": 0,
    }


def test_true_is_not_a_number_in_python_either() -> None:
    with pytest.raises(ValueError, match="neither a number nor a text"):
        ModelConfig(vocab_size=True, hidden_size=8, layers=1, heads=1, intermediate_size=8)


def test_a_validated_config_does_not_change() -> None:
    config = load_run_config("debug")
    assert isinstance(config, RunConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
