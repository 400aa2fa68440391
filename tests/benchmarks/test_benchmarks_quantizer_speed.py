"""quantizer_speed.py: that it runs to its tables; that every layer in them computes what it is said to."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import quantizer_speed as bench
import torch
from torch import nn

from qatscale.quant.bit_widths import get_quantizer
from qatscale.quant.fake_quantize import fake_quantize
from qatscale.quant.scales import initial_scale


def test_quick_run_gives_every_table(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    bench.main(["--quick", "--peers", "--threads", "1", "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["settings"]["quick"] is True
    assert result["settings"]["threads"] == 1
    assert [table["title"].split(", ")[1] for table in result["tables"]] == ["fp32", "bf16"]
    for table in result["tables"]:
        rows = {row["name"]: row for row in table["rows"]}
        assert rows[bench.PLAIN]["ratio"] == 1.0
        assert {f"qatscale, {bits:g} bits" for bits in bench.WIDTHS} <= set(rows)
        told = set(rows) | {skipped["name"] for skipped in table["skipped"]}
        assert set(bench.PEERS) <= told, "a peer is measured, or the reason is told"
        assert all(row["seconds"] > 0 for row in rows.values())


@pytest.mark.parametrize("make", [partial(bench._ours, bits=4), bench._reference], ids=["ours", "reference"])
def test_every_way_of_ours_is_the_same_layer(make: object) -> None:
    torch.manual_seed(1)
    linear, x = nn.Linear(24, 16, bias=False), torch.randn(5, 24)
    weight = linear.weight.detach().clone()
    expected = x @ fake_quantize(get_quantizer(4), weight, initial_scale(get_quantizer(4), weight)).T
    torch.testing.assert_close(make(linear)(x), expected)  # type: ignore[operator]
