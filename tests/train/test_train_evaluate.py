"""`evaluate` on a checkpoint says what the run said of itself, whatever layout saved it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from qatscale.data.manifest import Manifest
from qatscale.errors import UserError
from qatscale.tracking.compare import list_runs
from qatscale.tracking.run_folder import RunFolder
from qatscale.train.evaluate import evaluate_checkpoint
from tests.train.driving import SWITCH
from tests.train.trained_runs import REFERENCE, Trained
from tests.wrong_values import NO_SUCH_BITS


@pytest.mark.dist
@pytest.mark.parametrize(
    "name", [REFERENCE, "fused4-p1-z3sharded-m8", "seq1-p2-z3-m2", "fused2-p2-z3sharded-m2", "zero3_bf16"]
)
def test_a_checkpoint_evaluates_to_what_its_run_reported(name: str, trained: Trained) -> None:
    final = RunFolder(trained.runs / name).final
    assert final is not None
    folder, tokens, losses = evaluate_checkpoint(str(trained.runs / name), [4])
    assert folder.name == "step-00000012"
    assert tokens == 1024
    assert losses == pytest.approx(
        {
            "fp": final["final/val_loss_fp_view"],
            "quantized": final["final/val_loss"],
            "ptq4": final["final/val_loss_ptq4"],
        },
        rel=1e-6,
    )
    assert len({round(loss, 6) for loss in losses.values()}) == 3, "three views, three losses"


@pytest.mark.dist
def test_a_finished_run_says_which_text_its_losses_are_of(trained: Trained) -> None:
    """The reference for the fingerprint is a hash of the split's own bytes, in the order of its shards."""
    final = RunFolder(trained.runs / REFERENCE).final
    assert final is not None
    assert final["validation_tokens"] == 1024
    manifest = Manifest.load(trained.data)
    assert final["data_fingerprint"] == manifest.fingerprint
    hashes = [hashlib.sha256((trained.data / f"{shard.name}.bin").read_bytes()).hexdigest()
              for shard in manifest.splits["validation"].shards]  # fmt: skip
    counts = [shard.tokens for shard in manifest.splits["validation"].shards]
    shards = [["validation", count, digest] for count, digest in zip(counts, hashes, strict=True)]
    expected = hashlib.sha256(json.dumps([manifest.dtype, shards]).encode()).hexdigest()
    assert final["validation_fingerprint"] == expected


@pytest.mark.dist
def test_a_run_whose_data_hold_nothing_out_ends_without_a_validation_loss(trained: Trained) -> None:
    folder = RunFolder(trained.runs / "unvalidated")
    assert folder.is_done
    assert folder.records("validation") == []
    assert not {"final/val_loss", "validation_tokens"} & set(folder.final or {})
    assert "note: the data hold nothing out: this run gets no validation loss" in trained.output[1]
    (row,) = list_runs([folder])[0].values()
    assert row.val_loss is None


@pytest.mark.dist
def test_a_full_precision_run_has_no_quantized_view(trained: Trained) -> None:
    final = RunFolder(trained.runs / "trunk").final
    assert final is not None
    _, _, losses = evaluate_checkpoint(str(trained.runs / "trunk"), [1, 1.58])
    assert list(losses) == ["fp", "ptq1", "ptq1.58"]
    assert losses["fp"] == pytest.approx(final["final/val_loss"], rel=1e-6)
    assert losses["fp"] < losses["ptq1.58"]
    assert losses["fp"] < losses["ptq1"]


@pytest.mark.dist
def test_an_unfinished_run_is_evaluated_too(trained: Trained) -> None:
    folder, _, losses = evaluate_checkpoint(str(trained.runs / "unfinished"))
    assert folder.name == f"step-{SWITCH + 1:08d}"
    assert list(losses) == ["fp", "quantized"]
    _, _, at_switch = evaluate_checkpoint(f"{trained.runs}/unfinished@{SWITCH}")
    assert list(at_switch) == ["fp"], "the checkpoint at the switch is from before it"
    assert evaluate_checkpoint(f"{trained.runs}/trunk@{SWITCH}")[2] == at_switch, "the same weights"


@pytest.mark.dist
def test_fewer_tokens(trained: Trained) -> None:
    _, tokens, losses = evaluate_checkpoint(str(trained.runs / REFERENCE), tokens=200)
    assert tokens == 192, "three whole sequences of 64"
    final = RunFolder(trained.runs / REFERENCE).final
    assert final is not None
    assert losses["quantized"] != final["final/val_loss"]


@pytest.mark.dist
def test_errors(tmp_path: Path, trained: Trained) -> None:
    with pytest.raises(UserError, match="no run folder with a complete checkpoint"):
        evaluate_checkpoint(str(tmp_path))
    with pytest.raises(UserError, match="there are: 7, 9, 12"):
        evaluate_checkpoint(f"{trained.runs / REFERENCE}@3")
    with pytest.raises(UserError, match=f"bits = {NO_SUCH_BITS}"):
        evaluate_checkpoint(str(trained.runs / REFERENCE), [NO_SUCH_BITS])
    with pytest.raises(UserError, match=r"data\.path"):
        evaluate_checkpoint(str(trained.runs / REFERENCE), data=tmp_path / "nothing")
    alone = tmp_path / "run" / "checkpoints" / "step-00000012"
    shutil.copytree(trained.runs / REFERENCE / "checkpoints" / "step-00000012", alone)
    with pytest.raises(UserError, match=r"its run's recipe is not beside it .*run/recipe\.yaml"):
        evaluate_checkpoint(str(alone))


@pytest.mark.dist
def test_checkpoints_hold_numbers_and_json_and_nothing_that_could_run(trained: Trained) -> None:
    files = [path for path in trained.runs.glob("*/checkpoints/**/*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".npz"}
    for path in files:
        if path.suffix == ".safetensors":  # 8 bytes: the length of the JSON header that follows
            assert path.read_bytes()[8:9] == b"{"
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as table:
                assert all(table[name].dtype != object for name in table)


@pytest.mark.dist
def test_a_damaged_checkpoint_is_not_evaluated(tmp_path: Path, trained: Trained) -> None:
    shutil.copytree(trained.runs / REFERENCE, tmp_path / "run")
    shard = tmp_path / "run" / "checkpoints" / "step-00000012" / "shard-00000-of-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00000-of-00001\.safetensors was altered.*step-00000009"):
        evaluate_checkpoint(str(tmp_path / "run"))
