"""What a wrong recipe or override prints. `BAD_OVERRIDES` and `BAD_FILES` are also a table for people to read."""

from pathlib import Path

import pytest
from wrong_values import NO_SUCH_BITS

from qatlaw.bit_widths import BIT_WIDTHS_TEXT
from qatscale.config import load_run_config, resolved_yaml
from qatscale.config.schema import ModelConfig, RunConfig
from qatscale.errors import UserError, UserErrors

# overrides of the recipe `debug` -> the whole message
BAD_OVERRIDES = {
    ("qat.schem=fused",): "qat.schem: is no key of a recipe. Did you mean 'qat.scheme'?",
    ("optimiser.learning_rate=1e-3",): (
        "optimiser.learning_rate: is no key of a recipe. Did you mean 'optimizer.learning_rate'?"
    ),
    ("learning_rate=1e-3",): (
        "learning_rate: is no key of a recipe. Did you mean one of optimizer.learning_rate, qat.learning_rate?"
    ),
    ("bits=2",): "bits: is no key of a recipe. Did you mean 'qat.bits'?",
    ("optimizer.lr=1",): (
        "optimizer.lr: is no key of a recipe. "
        "Known in optimizer: learning_rate, betas, eps, weight_decay, gradient_clipping."
    ),
    ("schedule.phases.coldown.betas=[0.9,0.99]",): (
        "schedule.phases.coldown.betas: is no key of a recipe. Did you mean 'schedule.phases.cooldown.betas'?"
    ),
    ("schedule.phases={coldown: {}}",): (
        "schedule.phases.coldown: is no phase; phases are warmup, stable, cooldown, qat_warmup, qat_stable, "
        "qat_cooldown. Did you mean 'cooldown'?"
    ),
    ("schedule.phases={cooldown: {lr: 1}}",): (
        "schedule.phases.cooldown.lr: is no key of a recipe. Known in schedule.phases.cooldown: betas, weight_decay. "
        "(Given on the command line.)"
    ),
    ("qat=fused",): "qat = 'fused': is a section; set its keys one by one. See `qatscale config qat`.",
    ("tokens",): (
        "tokens: is no override; an override is key=value. "
        "Write tokens=VALUE: a whole number of tokens above 0 (2.3B, 100M, 50_000)."
    ),
    ("--qat.bits=2",): "--qat.bits: is no key of a recipe. Did you mean 'qat.bits'?",
    (f"qat.bits={NO_SUCH_BITS}",): (
        f"qat.bits = {NO_SUCH_BITS}: allowed is one of {BIT_WIDTHS_TEXT}. (Given on the command line.)"
    ),
    ("qat.scheme=fusd",): (
        "qat.scheme = 'fusd': allowed is fp, sequential, fused or scratch. Did you mean 'fused'? "
        "(Given on the command line.)"
    ),
    ("qat.fraction=1.3",): (
        "qat.fraction = 1.3: allowed is a number from 0 to 1 or auto. (Given on the command line.)"
    ),
    ("qat.fraction=auot",): (
        "qat.fraction = 'auot': allowed is a number from 0 to 1 or auto. Did you mean 'auto'? "
        "(Given on the command line.)"
    ),
    ("qat.fraction=0",): (
        "qat.fraction = 0: with scheme 'fused' is qat.scheme=fp; say that instead. (Given on the command line.)"
    ),
    ("qat.scheme=fp", "qat.fraction=0.3"): (
        "qat.fraction = 0.3: has no effect: in scheme 'fp' it is always 0. "
        "Add qat.scheme=fused or qat.scheme=sequential."
    ),
    ("qat.group_size=48",): (
        "qat.group_size = 48: does not divide model.hidden_size = 64. (Given on the command line.)"
    ),
    ("tokens=2.5.3",): (
        "tokens = '2.5.3': allowed is a whole number of tokens above 0 (2.3B, 100M, 50_000). "
        "(Given on the command line.)"
    ),
    ("tokens=255",): (
        "tokens = 255: is less than one optimizer step, 256 (4 sequences of 64 tokens). (Given on the command line.)"
    ),
    ("tokens=",): (
        "tokens: null; allowed is a whole number of tokens above 0 (2.3B, 100M, 50_000). (Given on the command line.)"
    ),
    ("checkpoint.interval=0",): (
        "checkpoint.interval = 0: allowed is a whole number of tokens above 0 (2.3B, 100M, 50_000) or null. "
        "(Given on the command line.)"
    ),
    ("batch.sequences=0",): "batch.sequences = 0: allowed is a whole number above 0. (Given on the command line.)",
    ("batch.sequences=1.5",): "batch.sequences = 1.5: allowed is a whole number above 0. (Given on the command line.)",
    ("model.layers=true",): "model.layers = True: allowed is a whole number above 0. (Given on the command line.)",
    ("optimizer.learning_rate=.inf",): (
        "optimizer.learning_rate = inf: allowed is a number above 0. (Given on the command line.)"
    ),
    ("optimizer.betas=[0.9]",): (
        "optimizer.betas = [0.9]: allowed is a list of 2, each a number of at least 0 and below 1. "
        "(Given on the command line.)"
    ),
    ("optimizer.betas=0.9,0.99",): (
        "optimizer.betas = '0.9,0.99': allowed is a list of 2, each a number of at least 0 and below 1. "
        "(Given on the command line.)"
    ),
    ("model.heads=3",): "model.heads = 3: hidden_size 64 does not divide into 3 heads. (Given on the command line.)",
    ("model.heads=64",): (
        "model.heads = 64: hidden_size 64 gives heads of 1 channels; RoPE rotates pairs. (Given on the command line.)"
    ),
    ("model.kv_heads=3",): (
        "model.kv_heads = 3: does not divide heads = 2; each serves the same number of query heads. "
        "(Given on the command line.)"
    ),
    ("schedule.cooldown_tokens=1B",): (
        "schedule.cooldown_tokens = '1B': says the same thing as schedule.cooldown_fraction = 0.2; keep one and set "
        "the other to null: schedule.cooldown_fraction=null or schedule.cooldown_tokens=null. "
        "(Given on the command line.)"
    ),
    ("qat.learning_rate=1e-3", "qat.lr_ratio=0.5"): (
        "qat.lr_ratio = 0.5: says the same thing as qat.learning_rate = 0.001; keep one: qat.lr_ratio=auto or "
        "qat.learning_rate=null. (Given on the command line.)"
    ),
    (
        "schedule.shape=exponential",
    ): "schedule.min_lr_ratio: shape 'exponential' never reaches 0; set it above 0, e.g. 0.01.",
    ("schedule.knots=[1,0]",): (
        "schedule.knots = [1, 0]: belong to shape 'piecewise', and 'piecewise' needs them, e.g. knots=[1,0.5,0]. "
        "(Given on the command line.)"
    ),
    ("name=a/b",): (
        "name = 'a/b': allowed is a name of letters, digits and . _ = + -, beginning with a letter or digit. "
        "(Given on the command line.)"
    ),
    ("qat.fraction=[1",): (
        "qat.fraction=[1, line 1, column 3: while parsing a flow sequence expected ',' or ']', but got '<stream end>'."
    ),
}

# a recipe file -> the message behind its path
BAD_FILES = {
    "": "is empty.",
    "# nothing but a comment\n": "is empty.",
    "- a\n- b\n": "holds a list, not `key: value` lines.",
    "just words\n": "holds a str, not `key: value` lines.",
    "name: x\nmodel:\n  layers: 2\n  layers: 4\n": "line 4, column 3: the key 'layers' is here and on line 3",
    "name: x\n tokens: 1\n": "line 2, column 8",
}


@pytest.mark.parametrize("overrides", BAD_OVERRIDES, ids=" ".join)
def test_a_bad_override_prints(overrides: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        load_run_config("debug", overrides)
    assert str(caught.value) == BAD_OVERRIDES[overrides]


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_file_prints(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_run_config(path)
    assert str(path) in str(caught.value)
    assert BAD_FILES[text] in str(caught.value)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = resolved_yaml(load_run_config("debug"))
    text = text.replace("  layers: 2\n", "").replace("heads: 2", "heds: 2", 1)
    text = text.replace("bits: 4", f"bits: {NO_SUCH_BITS}")
    path.write_text(text)
    with pytest.raises(UserErrors) as caught:
        load_run_config(path, ["tokens=x"])
    assert str(caught.value).splitlines() == [
        "5 problems:",
        "  tokens = 'x': allowed is a whole number of tokens above 0 (2.3B, 100M, 50_000). "
        "(Given on the command line.)",
        "  model.layers: is missing; it takes a whole number above 0.",
        "  model.heads: is missing; it takes a whole number above 0.",
        f"  model.heds: is no key of a recipe. Did you mean 'model.heads'? (Given in {path}.)",
        f"  qat.bits = {NO_SUCH_BITS}: allowed is one of {BIT_WIDTHS_TEXT}. (Given in {path}.)",
    ]


def test_every_unknown_override_is_told_at_once() -> None:
    with pytest.raises(UserErrors) as caught:
        load_run_config("debug", ["qat.bit=2", "seed=1", "modle.layers=2"])
    assert [problem.key for problem in caught.value.problems] == ["qat.bit", "modle.layers"]


def test_a_missing_section_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: x\ntokens: 1M\n")
    with pytest.raises(UserErrors) as caught:
        load_run_config(path)
    lines = [str(problem) for problem in caught.value.problems]
    assert lines == [
        f"{section}: is missing; it is a section. See `qatscale config {section}`."
        for section in ("model", "data", "batch", "optimizer")
    ]


def test_a_section_with_a_value_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(resolved_yaml(load_run_config("debug")).split("tracking:")[0] + "tracking: none\n")
    with pytest.raises(UserError, match=r"tracking = 'none': is a section, which holds `key: value` lines\."):
        load_run_config(path)
    with pytest.raises(UserError, match="tracking = 'none': is a section in which keys have values"):
        load_run_config(path, ["tracking.uri=none"])


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("debg", "recipe = 'debg': no recipe or file of this name. Did you mean 'debug'?"),
        ("13b", "no recipe or file of this name."),
        ("no/such.yaml", "recipe = 'no/such.yaml': no such file."),
    ],
)
def test_an_unknown_recipe(recipe: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_run_config(recipe)
    assert message in str(caught.value)


def test_a_folder_and_a_binary_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        load_run_config(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        load_run_config(tmp_path / "x.yaml")
    with pytest.raises(UserError, match=r"Did you mean '.*x\.yaml'\?"):
        load_run_config(tmp_path / "y.yaml")


def test_true_is_no_number_in_python_either() -> None:
    with pytest.raises(ValueError, match="neither a number nor a text"):
        ModelConfig(vocab_size=True, hidden_size=8, layers=1, heads=1, intermediate_size=8)


def test_a_validated_config_does_not_change() -> None:
    config = load_run_config("debug")
    assert isinstance(config, RunConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
