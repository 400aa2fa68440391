"""The recipes that come along: their sizes, and that their comments tell the truth."""

import re

import pytest

from qatscale.config.ds_config import load_ds_config, precision_of
from qatscale.config.recipe import RECIPES, flatten, load_run_config, recipe_names
from qatscale.config.schema import QatConfig
from qatscale.config.sizes import count_parameters, stored_weights

SIZES = {"86m": 86e6, "194m": 194e6, "396m": 396e6, "759m": 759e6, "2p2b": 2.2e9, "8b": 8.03e9}
LADDER = {"86k": 86e3, "194k": 194e3, "396k": 396e3, "759k": 759e3, "2p2m": 2.2e6}
"""Recipes of the study's sizes divided by 1000."""


@pytest.mark.parametrize("name", SIZES)
def test_a_recipe_has_the_size_of_its_name(name: str) -> None:
    model = load_run_config(name).model
    assert count_parameters(model) == pytest.approx(SIZES[name], rel=0.01)
    assert (model.tied_embedding, model.vocab_size) == ((False, 128_256) if name == "8b" else (True, 32_000))


@pytest.mark.parametrize("name", SIZES)
def test_shapes_fill_tensor_cores_and_shard(name: str) -> None:
    model = load_run_config(name).model
    assert model.hidden_size % 128 == 0
    assert model.intermediate_size % 128 == 0
    assert model.hidden_size // model.heads in (64, 128)
    assert 2.5 <= model.intermediate_size / model.hidden_size <= 3.5
    assert model.heads % 2 == model.layers % 2 == 0


@pytest.mark.parametrize("name", SIZES)
def test_batches_and_budgets_are_realistic(name: str) -> None:
    config = load_run_config(name)
    assert 0.5e6 <= config.tokens_per_step <= 4.2e6
    assert 19.9 <= config.tokens / count_parameters(config.model) <= 101
    assert config.steps > 10_000
    assert precision_of(load_ds_config(config.engine.ds_config)) == "bf16"


def test_the_learning_rate_falls_with_the_size() -> None:
    rates = [load_run_config(name).optimizer.learning_rate for name in SIZES]
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == len(rates)


@pytest.mark.parametrize("name", LADDER)
def test_the_ladder_is_the_study_divided_by_1000(name: str) -> None:
    config, model = load_run_config(name), load_run_config(name).model
    large = load_run_config({"2p2m": "2p2b"}.get(name, name.replace("k", "m")))
    assert count_parameters(model) == pytest.approx(LADDER[name], rel=0.03)
    assert config.tokens == large.tokens / 1000
    assert (model.vocab_size, model.tied_embedding, model.hidden_size // model.heads) in (
        (1024, True, 16), (1024, True, 32)
    )  # fmt: skip
    assert (config.tokens_per_step, config.batch.sequences) == (2048, config.batch.micro_batch)


def test_runs_of_the_ladder_differ_in_size_tokens_and_rate_alone() -> None:
    """Else a law fitted over sizes would measure the difference."""
    free = {"name", "tokens", "optimizer.learning_rate"}
    first, *others = (flatten(load_run_config(name)) for name in LADDER)
    for other in others:
        differ = {key for key in first if first[key] != other[key] and not key.startswith("model.")}
        assert differ <= free


@pytest.mark.parametrize("name", ["debug", "quickstart", *LADDER])
def test_small_recipes_run_anywhere(name: str) -> None:
    config = load_run_config(name)
    assert precision_of(load_ds_config(config.engine.ds_config)) == "fp32"
    assert count_parameters(config.model) < 3e6


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_named_like_its_file_and_brings_no_data(name: str) -> None:
    config = load_run_config(name)
    assert config.name == name
    assert config.data.path is None


@pytest.mark.parametrize("name", recipe_names())
def test_comments_tell_the_truth(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    config = load_run_config(name)
    weights = stored_weights(config.model, QatConfig())

    def numbers(pattern: str) -> list[int]:
        return [int(found.replace(",", "")) for found in re.findall(pattern, text)]

    assert numbers(r"# ([\d,]+) parameters") == [weights.params]
    assert numbers(r"# (?:.*, )?([\d,]+) steps") == [config.steps]
    assert numbers(r"([\d,]+) of them outside") in ([], [weights.params - weights.embedding.weights])
    assert numbers(r"(\d+) tokens per parameter") in ([], [round(config.tokens / weights.params)])
    assert numbers(r"# (\d+) channels each") in ([], [config.model.hidden_size // config.model.heads])
    for written in re.findall(r"width / layers = (\d+)", text):
        assert int(written) == round(config.model.hidden_size / config.model.layers)
    for written in re.findall(r"([\d.]+) x width", text):
        ratio = config.model.intermediate_size / config.model.hidden_size
        assert float(written) == pytest.approx(ratio, abs=0.5 * 10 ** -len(written.partition(".")[2]))
    for written in re.findall(r"([\d.]+)M tokens a step", text):
        assert float(written) == pytest.approx(config.tokens_per_step / 1e6, rel=0.02)
    for written in re.findall(r"make ([\d.]+) GB", text):
        assert float(written) == pytest.approx(18 * weights.params / 1e9, rel=0.04)
