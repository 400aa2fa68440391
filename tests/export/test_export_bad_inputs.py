"""What cannot be exported, what stops half-way, and what a verification has to see."""

from __future__ import annotations

import json
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qatscale.errors import EXIT_BAD_INPUT, EXIT_FAILED
from qatscale.export import clients, source
from qatscale.export.formats import FORMATS, gguf
from qatscale.export.formats.base import get_format
from tests.export.exported import described, need, snippets
from tests.wrong_values import NO_SUCH_BITS


def refused(qatscale, line: str, *parts: str) -> None:
    code, _, error = qatscale(line)
    assert code == EXIT_BAD_INPUT
    assert [part for part in parts if part not in error] == [], error


def test_an_unfinished_run_is_exported_when_asked_and_says_so(qatscale, runs: Path, tmp_path: Path) -> None:
    line = f"export {runs}/unfinished --out {tmp_path}/out"
    refused(qatscale, line, "is at step 9 of 12", "learning rate has not decayed", "--unfinished", "resume")
    refused(
        qatscale,
        f"export {runs}/full@4 --out {tmp_path}/out",
        "is at step 4 of 12",
        f"Give {runs}/full for the run's end",
    )
    assert not any(tmp_path.iterdir())
    code, out, _ = qatscale(f"{line} --unfinished")
    assert code == 0
    assert "unfinished: step 9 of 12" in out
    assert not described(tmp_path / "out")["checkpoint"]["finished"]
    assert "**Unfinished**: step 9 of 12" in (tmp_path / "out/README.md").read_text()
    switch = f"export {runs}/unfinished@6 --out {tmp_path}/before"
    refused(qatscale, switch, "is at step 6 of 12", "has not switched to QAT")
    refused(qatscale, f"{switch} --unfinished --format gguf", "has not switched to QAT", "--ptq 4")


@pytest.mark.parametrize("format", [name for name in FORMATS if not get_format(name).holds_full_precision])
def test_full_precision_is_offered_quantization_after_training(
    format: str, qatscale, runs: Path, tmp_path: Path
) -> None:
    line = f"export {runs}/full --format {format} --out {tmp_path}/out"
    refused(qatscale, line, f"--format = '{format}'", "was trained in full precision", "--ptq 4", "--format hf")
    need(format)
    code, _, error = qatscale(f"{line} --ptq 3 --fallback")
    assert code == 0, error
    about = described(tmp_path / "out")
    from qatscale.train.evaluate import evaluate_checkpoint

    _, _, losses = evaluate_checkpoint(str(runs / "full"), [3])
    assert about["view"] == "ptq3"
    assert about["verification"]["trained_loss"] == pytest.approx(losses["ptq3"], rel=1e-5)
    assert about["verification"]["clients"][0]["loss"] == pytest.approx(losses["ptq3"], abs=1e-3)
    assert {tensor["bits"] for tensor in about["tensors"]} == {None, 3, 4}, "the embedding stays at 4"
    assert "3 bits, quantized after training" in (tmp_path / "out/README.md").read_text()


def test_full_precision_as_it_is(qatscale, runs: Path, tmp_path: Path) -> None:
    from qatscale.engine.checkpoints.reader import CheckpointReader, find_checkpoint

    code, out, _ = qatscale(f"export {runs}/full --out {tmp_path}/out")
    assert code == 0
    assert "(fp)" in out
    found = load_file(tmp_path / "out/model.safetensors")
    reader = CheckpointReader(find_checkpoint(runs / "full"))
    assert torch.equal(found["model.layers.0.mlp.up_proj.weight"], reader.parameter("blocks.0.mlp.up.weight"))
    assert "full, full precision" in (tmp_path / "out/README.md").read_text()


def test_other_bad_inputs(qatscale, runs: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "thesis.txt").write_text("mine")
    two = f"export {runs}/two --out {tmp_path}/out"
    refused(qatscale, f"export {runs}/two --out {there}", "not empty", "Choose another folder")
    refused(qatscale, f"{two} --format gufg", "--format = 'gufg'", "Did you mean 'gguf'?")
    refused(qatscale, f"{two} --ptq 4", "--ptq = 4", "trained scales", "Leave it out")
    refused(qatscale, f"export {runs}/full --out {tmp_path}/out --ptq {NO_SUCH_BITS}", f"--ptq = {NO_SUCH_BITS}")
    refused(qatscale, f"{two} --tokens 1M --no-verify", "--tokens", "no effect")
    refused(qatscale, f"{two} --q1-0", "--q1-0", "is a type of gguf", "Leave it out")
    refused(qatscale, f"{two} --q1-0 --format gguf", "--q1-0", "no matrix of 1 bit")
    ct = f"{two} --format compressed-tensors"
    refused(qatscale, ct, "cannot hold embed.weight (4 bits, 514 x 256)", "Linear layers", "--fallback", "MiB more")
    narrow = f"export {runs}/narrow --out {tmp_path}/out --format gguf"
    refused(qatscale, narrow, "cannot hold blocks.0.attention.q.weight (2 bits, 96 x 96)", "blocks of 256", "6 more")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert [path.name for path in there.iterdir()] == ["thesis.txt"]


def test_without_a_tokenizer(qatscale, runs: Path, prepared: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(prepared, bare, ignore=shutil.ignore_patterns("tokenizer"))
    manifest = json.loads((bare / "manifest.json").read_text())
    manifest["tokenizer"]["folder"] = None  # as of adopted shards
    (bare / "manifest.json").write_text(json.dumps(manifest | {"checksum": ""}))
    line = f"export {runs}/two --out {tmp_path}/out --data {bare}"
    refused(qatscale, line, "tokenizer", "holds none", "--tokenizer FOLDER", "--tokenizer none")
    refused(qatscale, f"export {runs}/two --out {tmp_path}/out --data {tmp_path}/gone", "gone", "--tokenizer", "--data")
    refused(qatscale, f"{line} --tokenizer {tmp_path}/gone", "--tokenizer = ", "tokenizer.model or tokenizer.json")
    refused(
        qatscale,
        f"export {runs}/two --out {tmp_path}/out --tokenizer none --data {tmp_path}/gone",
        "--no-verify",
        "--data",
    )
    need("gguf")
    for format in ("hf", "gguf"):
        code, _, error = qatscale(
            f"export {runs}/two --out {tmp_path}/{format} --data {bare} --tokenizer none --format {format}"
        )
        assert code == 0, error
        monkeypatch.chdir(tmp_path / format)
        exec(compile(snippets(tmp_path / format)[0], "README.md", "exec"), {})
        assert capfd.readouterr().out.startswith("[1, 2, 3, ")
        assert not (tmp_path / format / "tokenizer.json").exists()
    code, _, error = qatscale(f"{line} --tokenizer {prepared}/tokenizer --no-verify")
    assert code == 0, error
    assert (tmp_path / "out/tokenizer.json").is_file()
    assert "Not run (`--no-verify`)" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("format", ["hf", "gguf"])
def test_a_full_disk_leaves_nothing(format: str, qatscale, runs: Path, tmp_path: Path) -> None:
    """A limit on the size of files stops a write in the middle, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        code, _, error = qatscale(f"export {runs}/two --out {tmp_path}/out --format {format} --no-verify")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == EXIT_FAILED
    assert f"{tmp_path}/out" in error
    assert os.strerror(27) in error, "EFBIG"
    assert not any(tmp_path.iterdir())


def test_what_is_not_installed_is_named_with_its_command(qatscale, runs: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(clients, "find_spec", lambda _: None)
    for format, parts in (
        ("gguf", ["transformers was not asked", "pip install transformers gguf accelerate",
                  "llama.cpp was not asked", "pip install llama-cpp-python"]),
        ("mlx", ["mlx-lm was not asked", "pip install 'mlx[cpu]' mlx-lm"]),
    ):  # fmt: skip
        code, out, _ = qatscale(f"export {runs}/two --out {tmp_path}/{format} --format {format}")
        assert code == 0
        assert [part for part in parts if part not in out] == []
        assert "pip install" in (tmp_path / format / "README.md").read_text().split("## Verification")[1]
        assert "trained model" in out, "the stored weights are compared all the same"


def test_rows_in_the_wrong_order_do_not_pass(qatscale, runs: Path, tmp_path: Path, monkeypatch) -> None:
    need("gguf")
    monkeypatch.setattr(gguf, "permutation", lambda *_: None)
    code, _, error = qatscale(f"export {runs}/two --out {tmp_path}/out --format gguf")
    assert code == EXIT_FAILED
    assert "the export differs from the trained model and was removed" in error
    assert "q_proj.weight is" in error
    assert not any(tmp_path.iterdir())


def test_scales_that_training_did_not_see_do_not_pass(qatscale, runs: Path, tmp_path: Path, monkeypatch) -> None:
    """The fp32 master of a scale, in a run whose forward pass saw it in bf16."""
    real = source.ExportSource._alpha

    def master(self, parameter, weight):
        real(self, parameter, weight)
        return self.reader.parameter(f"{parameter.name}_scale")

    monkeypatch.setattr(source.ExportSource, "_alpha", master)
    code, _, error = qatscale(f"export {runs}/two --out {tmp_path}/out")
    assert code == EXIT_FAILED
    assert "off training's weights" in error


def test_one_tensor_at_a_time(qatscale, runs: Path, tmp_path: Path, monkeypatch) -> None:
    """No more than one parameter of the checkpoint is alive while the files are written."""
    import weakref

    alive: list[weakref.ref] = []
    most = 0
    real = source.CheckpointReader.parameter

    def counted(self, name, kind="weight"):
        nonlocal most
        value = real(self, name, kind)
        if value.dim() == 2:
            alive.append(weakref.ref(value))
        most = max(most, sum(ref() is not None for ref in alive))
        return value

    monkeypatch.setattr(source.CheckpointReader, "parameter", counted)
    for format in FORMATS:
        code, _, error = qatscale(f"export {runs}/four --out {tmp_path}/{format} --format {format} --no-verify")
        assert code == 0, error
    assert len(alive) > 20
    assert most == 1


def test_checkpoints_of_any_layout(qatscale, runs: Path, tmp_path: Path) -> None:
    """Slices of rows and of columns on several ranks, as ZeRO and tensor parallelism save them."""
    from qatscale.engine.checkpoints.files import commit, slice_name, write_shard, writing_folder
    from qatscale.engine.checkpoints.reader import CheckpointReader, find_checkpoint

    reader = CheckpointReader(find_checkpoint(runs / "two"))
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    for name in reader.manifest.parameters:
        whole = reader.parameter(name)
        if name.endswith(("attention.o.weight", "mlp.down.weight")):
            middle = whole.shape[1] // 2
            for rank, (low, high) in enumerate(((0, middle), (middle, whole.shape[1]))):
                shards[rank][slice_name("weight", name, 0, (low, high))] = whole[:, low:high].flatten()
        else:
            cut = whole.numel() // 3 + 1  # in the middle of a row, as ZeRO cuts
            shards[0][slice_name("weight", name, 0, None)] = whole.flatten()[:cut]
            shards[1][slice_name("weight", name, cut, None)] = whole.flatten()[cut:]
    run = tmp_path / "cut"
    writing_folder(run / "checkpoints", 12).mkdir(parents=True)
    shutil.copy(runs / "two/recipe.yaml", run)
    written = [
        write_shard(writing_folder(run / "checkpoints", 12), rank, 2, shard) for rank, shard in enumerate(shards)
    ]
    files = {file.pop("name"): file for file in written}
    parameters = {name: replace(record, adam_steps=0) for name, record in reader.manifest.parameters.items()}
    commit(run / "checkpoints", replace(reader.manifest, files=files, parameters=parameters))
    for folder in (run, runs / "two"):
        code, _, error = qatscale(f"export {folder} --out {tmp_path}/{folder.name}-hf --tokenizer none --no-verify")
        assert code == 0, error
    one, other = (tmp_path / f"{name}-hf" / "model.safetensors" for name in ("cut", "two"))
    assert one.read_bytes() == other.read_bytes()


def test_a_checkpoint_that_is_no_number_is_not_exported(qatscale, runs: Path, tmp_path: Path, monkeypatch) -> None:
    real = source.CheckpointReader.parameter

    def broken(self, name, kind="weight"):
        value = real(self, name, kind)
        return value.fill_(torch.nan) if name == "blocks.0.mlp.up.weight" else value

    monkeypatch.setattr(source.CheckpointReader, "parameter", broken)
    refused(qatscale, f"export {runs}/four --out {tmp_path}/out --no-verify", "blocks.0.mlp.up.weight holds NaN")
    assert not any(tmp_path.iterdir())


def test_a_scale_that_fp16_does_not_have_is_told(runs: Path) -> None:
    opened = source.open_source(str(runs / "four"))
    layout = gguf.FORMAT.layout(opened, fallback=False)
    entry = next(entry for entry in layout.entries if entry.parameter.quantizer)
    matrix = opened.matrix(entry.parameter)
    opened._last = entry.parameter.name, replace(matrix, scale=matrix.scale * 1e8)
    with pytest.raises(ValueError, match=r"Q4_0 has no scale of .*blocks.0.attention.q.weight"):
        layout.matrix(entry)
