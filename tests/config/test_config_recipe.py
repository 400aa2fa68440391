"""Loading a recipe, overriding it, and writing it down again."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qatlaw.bit_widths import BIT_WIDTHS
from qatscale.config.amounts import format_amount, parse_amount
from qatscale.config.recipe import (
    config_differences,
    flatten,
    is_unaltered,
    load_run_config,
    recipe_hash,
    recipe_names,
    resolved_yaml,
)
from qatscale.config.schedule_section import PhaseOverride
from qatscale.config.schema import RunConfig
from qatscale.errors import UserError


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("tokens=2.3B", lambda c: c.tokens, 2_300_000_000),
        ("tokens=2.3e9", lambda c: c.tokens, 2_300_000_000),
        ("qat.fraction=0.3", lambda c: c.qat.fraction, 0.3),
        ("qat.fraction=auto", lambda c: c.qat.fraction, "auto"),
        ("optimizer.learning_rate=1e-3", lambda c: c.optimizer.learning_rate, 0.001),
        ("optimizer.betas=[0.9, 0.99]", lambda c: c.optimizer.betas, (0.9, 0.99)),
        ("data.path=corpora/web", lambda c: c.data.path, Path("corpora/web")),
        ("data.path=/a=b", lambda c: c.data.path, Path("/a=b")),
        ("data.path=null", lambda c: c.data.path, None),
        ("data.path=~/web", lambda c: c.data.path, Path.home() / "web"),
        ("name=2024", lambda c: c.name, "2024"),
        ("name=1e3", lambda c: c.name, "1e3"),
        ("output=/data/x #1", lambda c: c.output, Path("/data/x #1")),
        ("output=[a]", lambda c: c.output, Path("[a]")),
        ("tracking.experiment='q'", lambda c: c.tracking.experiment, "'q'"),
        ("tracking.uri=none", lambda c: c.tracking.uri, "none"),
        ("model.tied_embedding=false", lambda c: c.model.tied_embedding, False),
        ("checkpoint.keep_at=[1K, 2K]", lambda c: c.checkpoint.keep_at, [1000, 2000]),
        ("schedule.phases.cooldown.betas=[0.9,0.99]", lambda c: c.schedule.phases["cooldown"].betas, (0.9, 0.99)),
        ("schedule.phases.qat_stable.weight_decay=0", lambda c: c.schedule.phases["qat_stable"].weight_decay, 0),
        (
            "schedule.phases={cooldown: {betas: [0.9, 0.99]}}",
            lambda c: c.schedule.phases,
            {"cooldown": PhaseOverride(betas=(0.9, 0.99))},
        ),
    ],
)
def test_an_override_sets_its_key_and_no_other(override: str, read: object, value: object) -> None:
    before, after = load_run_config("debug"), load_run_config("debug", [override])
    assert read(after) == value  # type: ignore[operator]
    key = override.split("=")[0]
    assert all(difference.key.startswith(key) for difference in config_differences(before, after))


def test_of_two_overrides_the_later_holds() -> None:
    assert load_run_config("debug", ["seed=1", "seed=2"]).seed == 2


def test_a_length_moves_from_fraction_to_tokens() -> None:
    config = load_run_config("debug", ["schedule.cooldown_tokens=1K"])
    assert (config.schedule.cooldown_tokens, config.schedule.cooldown_fraction) == (1000, None)


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_every_bit_width_is_kept_as_it_is(bits: float) -> None:
    for written in (f"{bits}", f"{bits:.2f}"):  # 4 and 4.00 are one width, one hash, one name
        config = load_run_config("debug", [f"qat.bits={written}"])
        assert (config.qat.bits, type(config.qat.bits)) == (bits, type(bits))


def test_a_recipe_file_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(resolved_yaml(load_run_config("debug", ["seed=3"])))
    assert load_run_config(path).seed == load_run_config(str(path)).seed == 3


OVERRIDES = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._=+-]{0,8}", fullmatch=True),
        "data.path": st.none() | st.text("abc1. /~é'\"#:-", min_size=1),
        "tokens": st.integers(10_000, 10**14),
        "optimizer.learning_rate": st.floats(1e-12, 1e3),
        "optimizer.betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
        "qat.bits": st.sampled_from(BIT_WIDTHS),
        "tracking.uri": st.none() | st.text("abc:/1e3.", min_size=1),
        "schedule.phases": st.dictionaries(
            st.sampled_from(["cooldown", "warmup"]), st.fixed_dictionaries({"weight_decay": st.floats(0, 1)})
        ),
    }
)


@given(OVERRIDES)
def test_what_is_resolved_loads_back_equal(tmp_path_factory: pytest.TempPathFactory, changes: dict) -> None:
    raw = load_run_config("debug").model_dump(mode="json")
    for key, value in changes.items():
        *sections, name = key.split(".")
        at = raw
        for section in sections:
            at = at[section]
        at[name] = value
    config = RunConfig.model_validate(raw)
    path = tmp_path_factory.mktemp("resolved") / "recipe.yaml"
    path.write_text(resolved_yaml(config), encoding="utf-8")
    again = load_run_config(path)
    assert again == config
    assert resolved_yaml(again) == resolved_yaml(config)
    assert config_differences(again, config) == []


def test_configurations_are_equal_by_their_values() -> None:
    debug = load_run_config("debug")
    assert load_run_config("debug", [f"seed={debug.seed}"]) == debug
    assert load_run_config("debug", ["seed=7"]) != debug
    assert hash(load_run_config("debug", [f"seed={debug.seed}"]).batch) == hash(debug.batch)


def test_what_is_resolved_reads_well() -> None:
    lines = resolved_yaml(load_run_config("86m")).splitlines()
    assert {"name: 86m", "tokens: 8600000000", "  path: null", "  betas: [0.9, 0.95]", "  bits: 4"} <= set(lines)


def test_hash_depends_on_meaning_not_on_spelling(tmp_path: Path) -> None:
    def hash_of(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return recipe_hash(path)

    text = resolved_yaml(load_run_config("debug"))
    spelled = "# a comment\n" + text.replace("tokens: 10240", "tokens:   10_240").replace(
        "fraction: 0.5", "fraction: .5"
    )
    assert spelled.count("10_240") == 1
    assert hash_of(spelled) == hash_of(text)
    assert hash_of("b: {c: 2}\na: 1") == hash_of("a: 1\nb: {c: 2}")
    overrides = ("seed=1", "tokens=20K", "qat.bits=2", "name=other")
    others = {hash_of(resolved_yaml(load_run_config("debug", [override]))) for override in overrides}
    assert len(others | {hash_of(text)}) == 5


def test_a_recorded_recipe_is_altered_by_any_key_of_this_version(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(resolved_yaml(load_run_config("debug")))
    recorded, text = recipe_hash(path), path.read_text()
    assert is_unaltered(path, recorded)
    path.write_text(text.replace("data:\n", "data:\n  shuffle_block: 65536\n"))
    assert is_unaltered(path, recorded), "a key that recipes of former versions have"
    path.write_text(text.replace("rope_theta: 10000.0", "rope_theta: 90000.0"))
    assert not is_unaltered(path, recorded)
    assert is_unaltered(path, recorded[:16]), "nothing is known of a record of version 0.1"


def test_differences_name_dotted_keys_with_both_values() -> None:
    old = load_run_config("debug")
    new = load_run_config("debug", ["seed=1", "schedule.phases.cooldown.betas=[0.9,0.99]"])
    assert [(d.key, d.old, d.new) for d in config_differences(old, new)] == [
        ("seed", 0, 1),
        ("schedule.phases.cooldown.betas", None, [0.9, 0.99]),
    ]


def test_flatten_holds_every_value_once() -> None:
    flat = flatten(load_run_config("86m"))
    assert (flat["tokens"], flat["model.layers"], flat["qat.scheme"]) == (8_600_000_000, 8, "fused")
    assert not any(isinstance(value, dict) for value in flat.values())


def test_recipes_are_there() -> None:
    sizes = ["86m", "194m", "396m", "759m", "2p2b", "8b", "86k", "194k", "396k", "759k", "2p2m"]
    assert recipe_names() == sorted(["debug", "quickstart", *sizes])


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("2.3B", 2_300_000_000),
        ("100M", 10**8),
        ("1T", 10**12),
        ("1.5k", 1500),
        ("50_000", 50_000),
        (7, 7),
        (2.3e9, 2_300_000_000),
    ],
)
def test_amounts_read_exactly(text: object, units: int) -> None:
    assert parse_amount(text) == units


@pytest.mark.parametrize(
    "wrong", ["", "B", "2.3 billion", "-1", "1.5", "1.0001K", "nan", "inf", True, None, [1], "2e18", "1e9999999K"]
)
def test_what_is_not_an_amount(wrong: object) -> None:
    with pytest.raises(ValueError, match="amount"):
        parse_amount(wrong)


@pytest.mark.parametrize(
    ("units", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1K"),
        (999_999, "1M"),
        (2_300_000_000, "2.3B"),
        (1_234_567, "1.235M"),
        (1.4e12, "1.4T"),
    ],
)
def test_amounts_write_short(units: float, text: str) -> None:
    assert format_amount(units) == text


@given(st.integers(0, 10**15))
def test_a_written_amount_is_right_to_four_digits(units: int) -> None:
    assert parse_amount(format_amount(units)) == pytest.approx(units, rel=5e-4)


@pytest.mark.parametrize(("key", "value"), [("data.shuffle_block", 65536), ("engine.quantized_weight_cache", "auto")])
def test_a_key_of_a_former_version_is_dropped_from_what_a_run_recorded(key: str, value: object, tmp_path: Path) -> None:
    config = load_run_config("debug", ["seed=3"])
    recipe = tmp_path / "recipe.yaml"
    section, name = key.split(".")
    recipe.write_text(resolved_yaml(config).replace(f"{section}:\n", f"{section}:\n  {name}: {value}\n"))
    with pytest.raises(UserError, match=key):
        load_run_config(recipe)
    for record in ("run.json", "qatscale.json"):
        (tmp_path / record).write_text("{}")
        assert load_run_config(recipe).model_dump() == config.model_dump()
        with pytest.raises(UserError, match=key):
            load_run_config(recipe, [f"{key}=4"])
        (tmp_path / record).unlink()
