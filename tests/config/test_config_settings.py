"""The table behind `qatscale config` and behind every 'allowed is ...'."""

import subprocess
import sys

import pytest

from qatlaw.bit_widths import BIT_WIDTHS_TEXT, EMBEDDING_BITS
from qatscale.config.recipe import flatten, load_run_config
from qatscale.config.settings import explain, sections, settings
from qatscale.errors import UserError


def test_every_key_has_a_meaning_and_words_for_what_it_takes() -> None:
    for row in explain():
        assert row.meaning, f"{row.key} has no docstring in schema.py"
        assert row.allowed
        assert "\n" not in row.meaning


def test_every_value_of_a_config_is_explained_and_the_other_way_round() -> None:
    phases = [f"schedule.phases={{{', '.join(f'{phase}: {{}}' for phase in PHASES)}}}"]
    valued = set(flatten(load_run_config("86m", phases)))
    assert valued | {"schedule.phases"} == set(settings())


PHASES = ("warmup", "stable", "cooldown", "qat_warmup", "qat_stable", "qat_cooldown")


@pytest.mark.parametrize(
    ("key", "allowed", "default"),
    [
        ("tokens", "a whole number of tokens above 0 (2.3B, 100M, 50_000)", "required"),
        ("model.layers", "a whole number above 0", "required"),
        ("model.kv_heads", "a whole number above 0 or null", "null"),
        ("model.tied_embedding", "true or false", "true"),
        ("data.path", "a path or null", "null"),
        ("optimizer.betas", "a list of 2, each a number of at least 0 and below 1", "[0.9, 0.95]"),
        ("optimizer.eps", "a number above 0", "1e-08"),
        ("schedule.lowered_to", "a number above 0 and at most 1", "0.7"),
        ("schedule.min_lr_ratio", "a number from 0 to 1", "0.0"),
        ("qat.scheme", "fp, sequential, fused or scratch", "fp"),
        ("qat.bits", f"one of {BIT_WIDTHS_TEXT}", "4"),
        ("qat.fraction", "a number from 0 to 1 or auto", "auto"),
        ("qat.lr_ratio", "a number above 0 or auto", "auto"),
        ("qat.embedding_bits", f"auto, {', '.join(map(str, EMBEDDING_BITS[:-1]))} or 16", "auto"),
        ("evaluation.tokens", "a whole number of tokens above 0 (2.3B, 100M, 50_000)", "1_000_000"),
        ("evaluation.ptq_bits", f"a list without repeats, each one of {BIT_WIDTHS_TEXT}", "[]"),
    ],
)
def test_a_row(key: str, allowed: str, default: str) -> None:
    (row,) = explain(key)
    assert (row.key, row.allowed, row.default) == (key, allowed, default)


def test_a_section_is_explained_as_a_whole() -> None:
    assert [row.key for row in explain("batch")] == ["batch.sequences", "batch.micro_batch"]
    assert {"schedule", "schedule.phases", "schedule.phases.cooldown"} <= sections()


def test_an_unknown_prefix_names_the_nearest() -> None:
    with pytest.raises(UserError, match="'batch'"):
        explain("bach")


def test_config_is_light() -> None:
    code = "import sys, qatscale.config; sys.exit(bool({'torch', 'scipy', 'pandas', 'deepspeed'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
