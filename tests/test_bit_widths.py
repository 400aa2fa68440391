"""Everything that knows bit widths knows those of the one list, and no others."""

from __future__ import annotations

import pytest

from qatlaw.amounts import parse_bits
from qatlaw.bit_widths import BIT_WIDTHS, EMBEDDING_BITS
from qatlaw.errors import InputError
from qatlaw.figures.style import width_style
from qatscale.config.recipe import load_run_config
from qatscale.config.settings import settings
from qatscale.errors import UserError
from qatscale.quant.bit_widths import QUANTIZERS, get_quantizer
from tests.wrong_values import NO_SUCH_BITS

CANDIDATES = sorted({*BIT_WIDTHS, *range(33), 0.5, 1.5, 1.58, 1.6, 2.5, 3.99})
assert NO_SUCH_BITS in CANDIDATES


def accepted(key: str) -> list[float]:
    """The candidates that a recipe takes for `key`."""

    def takes(bits: float) -> bool:
        try:
            load_run_config("debug", [f"{key}={bits:g}"])
        except UserError as error:
            return key not in str(error)
        return True

    return [bits for bits in CANDIDATES if takes(bits)]


def test_a_recipe_takes_the_bits_that_have_a_quantizer() -> None:
    assert list(QUANTIZERS) == list(BIT_WIDTHS)
    assert [get_quantizer(bits).bits for bits in BIT_WIDTHS] == list(BIT_WIDTHS)
    assert accepted("qat.bits") == list(BIT_WIDTHS)
    assert settings()["qat.bits"].allowed == "one of " + ", ".join(f"{bits:g}" for bits in BIT_WIDTHS)


def test_an_embedding_takes_the_bits_from_4_on_and_none() -> None:
    assert accepted("qat.embedding_bits") == [bits for bits in BIT_WIDTHS if bits >= 4] + [16]
    named = settings()["qat.embedding_bits"].allowed.replace(" or", ",").split(", ")
    assert named == ["auto", *map(str, EMBEDDING_BITS)]
    assert load_run_config("debug", ["qat.embedding_bits=auto"]).qat.embedding_bits == "auto"


def test_the_planner_takes_the_same_bits_and_each_has_its_look() -> None:
    for bits in CANDIDATES:
        if bits in BIT_WIDTHS:
            assert parse_bits("--bits", f"{bits:g}") == bits
        else:
            with pytest.raises(InputError):
                parse_bits("--bits", f"{bits:g}")
    looks = {width_style(bits) for bits in BIT_WIDTHS}
    assert len(looks) == len(BIT_WIDTHS)
    assert width_style(NO_SUCH_BITS) not in looks
