"""A checkpoint on disk: any division of the parameters reads back, damage is told, nothing half is ever found."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qatscale.engine.checkpoints.files import (
    commit,
    list_checkpoints,
    newest_checkpoint,
    read_manifest,
    rotate,
    slice_name,
    step_folder,
    verify_files,
    write_shard,
    writing_folder,
)
from qatscale.engine.checkpoints.manifest import Manifest, ParameterRecord
from qatscale.engine.checkpoints.reader import CheckpointReader, find_checkpoint
from qatscale.errors import UserError
from tests.permissions import as_ordinary_user

KINDS = ("weight", "exp_avg", "exp_avg_sq")
SHAPES = {"embed.weight": (7, 5), "norm.weight": (5,)}


def value(kind: str, name: str, step: int) -> Tensor:
    """A parameter's content, other for each kind, name and step."""
    numel = torch.Size(SHAPES[name]).numel()
    return (
        torch.arange(numel, dtype=torch.float32) + 100 * step + 1000 * KINDS.index(kind) + 0.5 * (name == "norm.weight")
    )


def shards(step: int, cuts: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Every parameter cut at these elements, one piece per process; a piece may be empty, and is left out then."""
    found: list[dict[str, Tensor]] = [{} for _ in range(len(cuts) + 1)]
    for kind in KINDS:
        for name in SHAPES:
            start = 0
            for rank, piece in enumerate(value(kind, name, step).tensor_split(cuts)):
                if len(piece):
                    found[rank][f"{kind}/{name}/{start}"] = piece
                start += len(piece)
    return found


def write(checkpoints: Path, step: int, kept: bool = False, cuts: tuple[int, ...] = (3,)) -> Path:
    """A complete checkpoint, by the functions that a save uses."""
    writing = writing_folder(checkpoints, step)
    writing.mkdir(parents=True)
    pieces = shards(step, cuts)
    files = [write_shard(writing, rank, len(pieces), piece) for rank, piece in enumerate(pieces)]
    manifest = Manifest(
        step=step, tokens=512 * step, reason="boundary" if kept else "interval", kept=kept,
        recipe_hash="0" * 16, data="",
        plugin={"switched_at": None}, parameters={n: ParameterRecord(list(s), step) for n, s in SHAPES.items()},
        layout={"processes": len(pieces), "zero_stage": 1}, files={file.pop("name"): file for file in files},
    )  # fmt: skip
    return commit(checkpoints, manifest)


@pytest.mark.parametrize("cuts", [(), (3,), (1, 2, 20), (0, 35), (5, 5, 5)])
def test_any_division_reads_back_whole_and_in_parts(cuts: tuple[int, ...], tmp_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path, 4, cuts=cuts))
    for kind in KINDS:
        for name, shape in SHAPES.items():
            whole = value(kind, name, 4)
            assert torch.equal(reader.parameter(name, kind), whole.view(shape))
            for start in range(len(whole)):
                for numel in range(len(whole) - start + 1):
                    assert torch.equal(reader.read(kind, name, start, numel), whole[start : start + numel])
    assert {name: tuple(w.shape) for name, w in reader.weights().items()} == SHAPES


def test_a_checkpoint_holds_numbers_and_json_only(tmp_path: Path) -> None:
    folder = write(tmp_path, 4)
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json", "shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors", "slices.npz",
    ]  # fmt: skip
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


SHARD = "shard-00001-of-00002.safetensors"


def truncate(folder: Path) -> None:
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content[: len(content) // 2])


def alter(folder: Path) -> None:
    content = bytearray((folder / SHARD).read_bytes())
    content[-1] ^= 1
    (folder / SHARD).write_bytes(content)


def alter_header(folder: Path) -> None:
    """A slice's name loses its number of the first element: the safetensors file itself stays readable."""
    content = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(content.replace(b"weight/norm.weight/3", b"weight/norm.weight_3"))


def half_delete(folder: Path) -> None:
    """As an interrupted `rm -r` leaves it."""
    for name in ("manifest.json", SHARD):
        (folder / name).unlink()


def change_manifest(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        change(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


DAMAGES = {
    "truncated shard": (truncate, SHARD),
    "empty shard": (lambda f: (f / SHARD).write_bytes(b""), SHARD),
    "altered byte": (alter, f"{SHARD} was altered"),
    "altered header": (alter_header, f"{SHARD} was altered"),
    "altered table": (lambda f: (f / "slices.npz").write_bytes(b"PK"), "slices.npz cannot be read"),
    "missing table": (lambda f: (f / "slices.npz").unlink(), "slices.npz cannot be read"),
    "half-deleted": (half_delete, "no manifest.json"),
    "missing shard": (lambda f: (f / SHARD).unlink(), SHARD),
    "missing manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json"),
    "half a manifest": (lambda f: (f / "manifest.json").write_text('{"step": 4,'), "manifest.json cannot be read"),
    "a manifest of another kind": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    "a manifest without a key": (change_manifest(lambda m: m.pop("parameters")), "manifest.json cannot be read"),
    "a manifest with a key too many": (change_manifest(lambda m: m.update(x=1)), "manifest.json cannot be read"),
    "a step as text": (change_manifest(lambda m: m.update(step="4")), "(step: Input should be a valid integer)"),
    "no files": (change_manifest(lambda m: m.update(files=None)), "(files: Input should be an object)"),
    "a file elsewhere": (
        change_manifest(lambda m: m["files"].update({"../x": {}})),
        "manifest.json cannot be read (files.",
    ),
    "a negative shape": (
        change_manifest(lambda m: m["parameters"]["norm.weight"].update(shape=[-1, 5])),
        "(parameters.norm.weight.shape.0: Input should be greater than or equal to 0)",
    ),
    "negative steps": (
        change_manifest(lambda m: m["parameters"]["norm.weight"].update(adam_steps=-5)),
        "(parameters.norm.weight.adam_steps: Input should be greater than or equal to 0)",
    ),
    "no plugin": (change_manifest(lambda m: m.update(plugin=None)), "(plugin: Input should be an object)"),
    "another switch": (change_manifest(lambda m: m["plugin"].update(switched_at="3")), "(plugin.switched_at: Input "),
    "deep nesting": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "recursion limit exceeded"),
    "not UTF-8": (lambda f: (f / "manifest.json").write_bytes(b"\xff{}"), "manifest.json cannot be read"),
    "a parameter less": (change_manifest(lambda m: m["parameters"].pop("norm.weight")), "manifest.json was altered"),
    "another step": (change_manifest(lambda m: m.update(step=5)), "manifest.json was altered"),
    "another checkpoint's content": (
        lambda f: shutil.copytree(f.with_name("step-00000006"), f, dirs_exist_ok=True),
        "is of step 6: it is a copy",
    ),
    "a format of the future": (change_manifest(lambda m: m.update(format=5)), "manifest.json is of format 5; this"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_told_with_the_file_and_the_checkpoint_before(damage: str, tmp_path: Path) -> None:
    write(tmp_path, 2)
    folder = write(tmp_path, 4)
    write(tmp_path, 6)
    do, says = DAMAGES[damage]
    do(folder)
    with pytest.raises(UserError) as caught:
        verify_files(folder, CheckpointReader(folder).manifest)
    assert caught.value.key == "checkpoint"
    assert caught.value.value == str(folder)
    assert says in caught.value.problem
    assert caught.value.fix == (
        f"The newest intact one before it is step-00000002 (verified just now): give {tmp_path.parent}@2, or remove "
        "step-00000004 to continue from that one."
    )


def opened(folder: Path) -> CheckpointReader:
    """As a run opens it."""
    reader = CheckpointReader(folder)
    verify_files(folder, reader.manifest)
    return reader


def without_table(folder: Path) -> Path:
    """As version 0.2 wrote it before there was a table."""
    (folder / "slices.npz").unlink()
    manifest = replace(read_manifest(folder), slices=None, format=3)
    content = {key: value for key, value in asdict(manifest).items() if key != "slices"}
    (folder / "manifest.json").write_text(json.dumps(content | {"checksum": manifest.digest()}))
    return folder


def test_checkpoints_without_a_table_are_read_by_their_headers(tmp_path: Path) -> None:
    folder = without_table(write(tmp_path, 4, cuts=(1, 2, 20)))
    reader = opened(folder)
    for kind, name in itertools.product(KINDS, SHAPES):
        assert torch.equal(reader.parameter(name, kind).flatten(), value(kind, name, 4))
    alter_header(without_table(write(tmp_path, 6)))
    with pytest.raises(UserError, match=f"{SHARD} cannot be read"):
        CheckpointReader(step_folder(tmp_path, 6))


def test_a_process_opens_the_table_and_the_files_that_it_reads(tmp_path: Path) -> None:
    """Of 36 files 35 are gone; what the other one holds is read."""
    folder = write(tmp_path, 4, cuts=tuple(range(1, 35)))
    for path in folder.glob("shard-*"):
        if not path.name.startswith("shard-00020"):
            path.unlink()
    reader = CheckpointReader(folder)
    assert reader.read("exp_avg", "embed.weight", 20, 1) == value("exp_avg", "embed.weight", 4)[20]
    with pytest.raises(UserError, match=r"shard-00021-of-00035.safetensors cannot be read"):
        reader.read("exp_avg", "embed.weight", 20, 2)


def test_damage_without_a_checkpoint_before(tmp_path: Path) -> None:
    folder = write(tmp_path, 4)
    write(tmp_path, 6)
    truncate(folder)
    with pytest.raises(UserError, match="There is no earlier checkpoint beside it"):
        opened(folder)


def test_a_checkpoint_that_is_offered_was_itself_verified(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        write(tmp_path, step)
    for step, damage in ((4, alter), (6, half_delete), (8, truncate)):
        damage(step_folder(tmp_path, step))
    offer = (
        f"before it is step-00000002 .*: give {tmp_path.parent}@2, or remove step-00000004, step-00000008 to continue"
    )
    with pytest.raises(UserError, match=offer):
        opened(step_folder(tmp_path, 8))
    alter(step_folder(tmp_path, 2))
    with pytest.raises(UserError, match="None of the 2 earlier checkpoints beside it is intact"):
        opened(step_folder(tmp_path, 8))


def test_values_that_are_not_finite_are_named_and_not_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 2)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "arange", lambda *_, **__: torch.full((7 * 5,), torch.nan))
        poisoned = write(tmp_path, 4)
    with pytest.raises(UserError, match=r"embed.weight is not finite. The newest intact one before it is step-0+2 "):
        CheckpointReader(poisoned).weights()
    with pytest.raises(UserError, match=r"exp_avg of embed.weight is not finite"):
        CheckpointReader(poisoned).parameter("embed.weight", "exp_avg")
    CheckpointReader(step_folder(tmp_path, 2)).weights()
    truncate(write(tmp_path, 6))
    offer = r"before it is step-0+2 \(verified just now\): .* or remove step-0+4, step-0+6"
    with pytest.raises(UserError, match=offer):
        opened(step_folder(tmp_path, 6))
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match=r"The one before it is step-0+4 \(not verified\): give"):
        opened(step_folder(tmp_path, 6))


def test_a_half_deleted_newest_checkpoint_is_not_passed_over(tmp_path: Path) -> None:
    """What can be seen was whole once: going on from an older one would silently cost the steps between."""
    checkpoints = tmp_path / "run" / "checkpoints"
    write(checkpoints, 2)
    half_delete(write(checkpoints, 4))
    for find in (lambda: newest_checkpoint(checkpoints), lambda: find_checkpoint(tmp_path / "run")):
        with pytest.raises(UserError, match=r"half-deleted: it has no manifest.json.*intact one before it is step-0+2"):
            find()
    assert find_checkpoint(f"{tmp_path / 'run'}@2").name == "step-00000002"
    with pytest.raises(UserError, match="no checkpoint at step ²"):
        find_checkpoint(f"{tmp_path / 'run'}@²")
    with pytest.raises(UserError, match="was removed just now"):
        read_manifest(checkpoints / "step-00000003")
    (former := write(checkpoints, 5)).chmod(0)
    with as_ordinary_user(), pytest.raises(PermissionError, match="step-00000005"):
        find_checkpoint(tmp_path / "run")
    write(checkpoints, 6)
    with as_ordinary_user():
        assert find_checkpoint(tmp_path / "run").name == "step-00000006", "who may not read an older one needs none"
    former.chmod(0o755)
    assert newest_checkpoint(checkpoints) == step_folder(checkpoints, 6)
    assert newest_checkpoint(tmp_path / "nothing") is None


def test_processes_share_the_check_of_the_files(tmp_path: Path) -> None:
    folder = write(tmp_path, 4, cuts=(3, 9))
    manifest = read_manifest(folder)
    alter_name = "shard-00001-of-00003.safetensors"
    content = bytearray((folder / alter_name).read_bytes())
    content[-1] ^= 1
    (folder / alter_name).write_bytes(content)
    found = []
    for share in range(2):
        try:
            verify_files(folder, manifest, share, 2)
        except UserError as error:
            found.append((share, error.problem))
    assert found == [(1, f"{alter_name} was altered: checksum differs.")]


def test_elements_that_no_shard_holds_are_an_error(tmp_path: Path) -> None:
    folder = without_table(write(tmp_path, 4))
    change_manifest(lambda manifest: manifest["files"].pop(SHARD))(folder)
    with pytest.raises(UserError, match=r"weight of embed\.weight: only 3 of 35 elements are saved"):
        CheckpointReader(folder).parameter("embed.weight")


def test_rotation_keeps_the_newest_and_what_is_kept(tmp_path: Path) -> None:
    for step in range(1, 9):
        write(tmp_path, step, kept=step in (2, 5))
    removed = rotate(tmp_path, keep=2)
    assert [path.name[-1] for path in removed] == ["1", "3", "4", "6"]
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["2", "5", "7", "8"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-0000000{step}" for step in (2, 5, 7, 8)]
    assert rotate(tmp_path, keep=2) == []


def test_rotation_clears_what_killed_processes_left_and_spares_what_it_cannot_read(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "step-00000001" / "manifest.json").write_text("{")
    for leftover in (".writing-step-00000009", ".old-step-00000000"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / SHARD).write_bytes(b"x")
    assert [path.name for path in rotate(tmp_path, keep=1)] == ["step-00000002"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_a_half_written_checkpoint_is_never_found(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run / "checkpoints", 2)
    half = writing_folder(run / "checkpoints", 4)
    half.mkdir()
    write_shard(half, 0, 2, shards(4, (3,))[0])
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-00000002"]
    assert find_checkpoint(run).name == "step-00000002"
    with pytest.raises(UserError, match="no checkpoint at step 4; there are: 2"):
        find_checkpoint(f"{run}@4")


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 4, cuts=(3, 9))
    folder = write(tmp_path, 4, cuts=(3,))
    assert len(read_manifest(folder).files) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004"]
    assert len(list(folder.glob("shard-*"))) == 2


def test_the_ways_to_name_a_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for step in (2, 10, 9):
        write(run / "checkpoints", step)
    newest = step_folder(run / "checkpoints", 10)
    assert find_checkpoint(run) == newest
    assert find_checkpoint(str(run)) == newest
    assert find_checkpoint(newest) == newest
    assert find_checkpoint(f"{run}@9") == step_folder(run / "checkpoints", 9)
    for wrong, says in {
        f"{run}@3": "no checkpoint at step 3; there are: 2, 9, 10",
        f"{run}@last": "no checkpoint at step last",
        f"{run}/checkpoints/step-00000003": "no complete checkpoint here",
        f"{tmp_path}/nothing": "no run folder with a complete checkpoint",
    }.items():
        with pytest.raises(UserError) as caught:
            find_checkpoint(wrong)
        assert says in str(caught.value)


def test_a_shard_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    """safetensors has an exception of its own for a full disk; a save waits for OSError on every process."""
    with pytest.raises(OSError, match=r"shard-00000-of-00001\.safetensors"):
        write_shard(tmp_path / "no such folder", 0, 1, shards(4, ())[0])


@pytest.mark.parametrize("seed", range(20))
def test_any_piece_of_a_matrix_is_assembled_from_pieces_cut_otherwise(seed: int, tmp_path: Path) -> None:
    """Saved split by rows or by columns, each part cut anywhere; read as either, and whole."""
    draw = random.Random(seed)
    rows, width = draw.randint(1, 9), draw.choice([2, 6, 12])
    whole = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    parts = draw.choice([1, 2])
    slices = {}
    for part in range(parts):
        columns = (part * width // parts, (part + 1) * width // parts) if parts > 1 else None
        flat = (whole if columns is None else whole[:, slice(*columns)]).flatten()
        cuts = sorted({0, len(flat), *(draw.randrange(len(flat) + 1) for _ in range(3))})
        for start, end in itertools.pairwise(cuts):
            slices[slice_name("weight", "w", start, columns)] = flat[start:end]
    writing = writing_folder(tmp_path, 1)
    writing.mkdir()
    file = write_shard(writing, 0, 1, slices)
    manifest = Manifest(
        step=1, tokens=1, reason="end", kept=True, recipe_hash="", data="", plugin={"switched_at": None}, layout={},
        parameters={"w": ParameterRecord([rows, width], 1)}, files={file.pop("name"): file},
    )  # fmt: skip
    reader = CheckpointReader(commit(tmp_path, manifest))
    assert torch.equal(reader.parameter("w"), whole)
    for _ in range(10):
        first, end = sorted(draw.sample(range(width + 1), 2))
        wanted = whole[:, first:end].flatten()
        start = draw.randrange(len(wanted))
        numel = draw.randint(1, len(wanted) - start)
        assert torch.equal(reader.read("weight", "w", start, numel, (first, end)), wanted[start : start + numel])
