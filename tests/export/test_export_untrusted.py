"""Exports, runs and tokenizers that were damaged, altered, locked away, or that hold code: one sentence, exit 2."""

from __future__ import annotations

import ast
import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from qatscale.errors import EXIT_BAD_INPUT, UserError
from qatscale.export import clients
from qatscale.export.formats import FORMATS
from qatscale.export.formats.base import get_format
from qatscale.export.formats.mlx import MlxLm
from tests.export.exported import described, need
from tests.permissions import as_ordinary_user

PRODUCT = Path(clients.__file__).parents[1]
DEEP = "[" * 100_000


def refused(qatscale, line: str, *parts: str) -> None:
    code, out, error = qatscale(line)
    assert code == EXIT_BAD_INPUT, error
    assert "Traceback" not in out + error
    assert [part for part in parts if part not in error] == [], error


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("format", FORMATS)
def test_one_flipped_bit_in_any_file_is_noticed(format: str, exports, qatscale, tmp_path: Path) -> None:
    original = exports("two", format)
    names = described(original)["files"]
    assert {path.name for path in original.iterdir()} == {*names, "README.md", "export.json"}
    for name in (*names, "export.json"):
        folder = shutil.copytree(original, tmp_path / name)
        flip_a_bit(folder / name)
        refused(qatscale, f"generate {folder} --prompt def", name)
    folder = shutil.copytree(original, tmp_path / "missing")
    (folder / names.popitem()[0]).unlink()
    refused(qatscale, f"generate {folder} --prompt def", "model")


def test_a_benchmark_notices_it_too(exports, qatscale, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = shutil.copytree(exports("two", "hf"), tmp_path / "flipped")
    flip_a_bit(folder / "model.safetensors")
    refused(qatscale, f"evaluate {folder} --harness arc_easy", "model.safetensors", "altered")


@pytest.mark.parametrize("content", ["[]", "{}", '{"files": {"model.safetensors": 1}}', DEEP, "{"])
def test_damaged_checksums(content: str, exports, qatscale, tmp_path: Path) -> None:
    folder = shutil.copytree(exports("two", "hf"), tmp_path / "damaged")
    (folder / "export.json").write_text(content)
    refused(qatscale, f"generate {folder} --prompt def", "export.json")


# --- folders from elsewhere, which have no checksums ---


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def drop_a_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, {"format": "pt"})


def spoil_a_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors["model.norm.weight"][3] = torch.inf
    save_file(tensors, path, {"format": "pt"})


def set_key(path: Path, key: str, value: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


DAMAGES = {
    "truncated weights": ("hf", "model.safetensors", truncate),
    "no tensor in weights": ("hf", "model.safetensors", lambda path: path.write_bytes(b"\xff" * 100)),
    "a missing tensor": ("hf", "model.safetensors", drop_a_tensor),
    "a weight that is not finite": ("hf", "model.safetensors", spoil_a_tensor),
    "truncated packed weights": ("compressed-tensors", "model.safetensors", truncate),
    "a truncated GGUF file": ("gguf", "two-Q2_K.gguf", lambda path: path.write_bytes(path.read_bytes()[:3000])),
    "an empty GGUF file": ("gguf", "two-Q2_K.gguf", lambda path: path.write_bytes(b"")),
    "truncated MLX weights": ("mlx", "model.safetensors", truncate),
    "nested configuration": ("hf", "config.json", lambda path: path.write_text(DEEP)),
    "countless layers": ("hf", "config.json", lambda path: set_key(path, "num_hidden_layers", 2**40)),
    "a list as configuration": ("hf", "config.json", lambda path: path.write_text("[1]")),
    "wrong types in the configuration": ("hf", "config.json", lambda path: path.write_text('{"model_type": 7}')),
    "kernels of the Hub": ("hf", "config.json", lambda path: set_key(path, "attn_implementation", "a/kernel")),
    "kernels in a part": (
        "hf",
        "config.json",
        lambda path: set_key(path, "text", {"_attn_implementation": "a/kernel"}),
    ),
    "an epsilon that is not finite": ("hf", "config.json", lambda path: set_key(path, "rms_norm_eps", float("nan"))),
    "a length in letters": ("hf", "tokenizer_config.json", lambda path: set_key(path, "model_max_length", "x")),
    "nested tokenizer": ("hf", "tokenizer.json", lambda path: path.write_text(DEEP)),
    "an empty tokenizer": ("hf", "tokenizer.json", lambda path: path.write_text("{}")),
    "a nested card": ("hf", "tokenizer_config.json", lambda path: path.write_text('{"a": ' * 100_000)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_from_elsewhere_is_named(damage: str, exports, qatscale, tmp_path: Path) -> None:
    format, name, change = DAMAGES[damage]
    folder = shutil.copytree(exports("two", format), tmp_path / "model")
    (folder / "export.json").unlink()
    change(folder / name)
    refused(qatscale, f"generate {folder} --prompt def --tokens 8", str(folder))


def test_settings_in_a_folder_do_not_change_how_text_is_drawn(exports, qatscale, tmp_path: Path) -> None:
    folder = shutil.copytree(exports("two", "hf"), tmp_path / "model")
    (folder / "export.json").unlink()
    typed = f"generate {folder} --prompt def --tokens 8 --temperature 0"
    code, plain, error = qatscale(typed)
    assert code == 0, error
    for settings in (
        {"num_beams": 10**9},
        {"repetition_penalty": 9.0, "min_new_tokens": 10**9},
        {"eos_token_id": 10**30},
    ):
        (folder / "generation_config.json").write_text(json.dumps(settings))
        assert qatscale(typed)[:2] == (0, plain), settings


def test_a_pickle_is_not_read(exports, qatscale, tmp_path: Path) -> None:
    folder = shutil.copytree(exports("two", "hf"), tmp_path / "model")
    for name in ("export.json", "model.safetensors"):
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    refused(qatscale, f"generate {folder} --prompt def", str(folder), "safetensors")
    assert not (tmp_path / "ran").exists()


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


# --- code ---


@pytest.fixture
def with_code(exports, tmp_path: Path):
    """(file, auto_map) -> a copy of an export whose file names a Python module beside it, which makes a file."""

    def copy(name: str, auto_map: object, **more: object) -> Path:
        folder = shutil.copytree(exports("two", "hf"), tmp_path / "model")
        (folder / "export.json").unlink()
        (folder / "mine.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
        content = json.loads((folder / name).read_text()) | {"auto_map": auto_map, **more}
        (folder / name).write_text(json.dumps(content))
        return folder

    return copy


CODE = {
    "config.json": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    "tokenizer_config.json": {"AutoTokenizer": ["mine.Tokenizer", None]},
}


@pytest.mark.parametrize("name", CODE)
@pytest.mark.parametrize("known", [True, False])
def test_code_in_a_model_is_not_executed(name: str, known: bool, with_code, qatscale, tmp_path: Path) -> None:
    more = {} if known else {"model_type": "mine", "tokenizer_class": "Mine"}
    folder = with_code(name, CODE[name], **more)
    refused(qatscale, f"generate {folder} --prompt def", name, "never executes")
    assert not (tmp_path / "ran").exists()


def test_code_in_a_tokenizer_is_not_executed(with_code, qatscale, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "text.txt").write_text("a text")
    answers = tmp_path / "yes"
    answers.write_text("y\n" * 100)
    folder = with_code("tokenizer_config.json", CODE["tokenizer_config.json"], tokenizer_class="Mine")
    with answers.open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        line = f"prepare {tmp_path}/text.txt --out {tmp_path}/data --tokenizer {folder}"
        refused(qatscale, line, "tokenizer_config.json", "never executes")
    assert not (tmp_path / "ran").exists()


def test_code_of_the_model_does_not_concern_its_tokenizer(with_code, qatscale, tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "document {n}"}}\n' for n in range(50)))
    folder = with_code("config.json", CODE["config.json"])
    line = f"prepare {tmp_path}/text.jsonl --out {tmp_path}/data --tokenizer {folder} --validation-fraction 0.2"
    code, _, error = qatscale(f"{line} --workers 1")
    assert code == 0, error
    assert not (tmp_path / "ran").exists()


SAFE = {
    "from_pretrained": "trust_remote_code=False", "from_config": "trust_remote_code=False",
    "torch.load": "weights_only=True", "yaml.load": "_Plain",
}  # fmt: skip
"""What a call has to say that could execute what it reads."""
UNSAFE = re.compile(
    r"(eval|exec|compile|__import__|pickle\.loads?|marshal\.loads?|shelve\.open|dill\.loads?|joblib\.load|torch\.hub\.\w+"
    r"|(yaml\.)?(full|unsafe)_load(_all)?|yaml\.load_all|(pd|pandas)\.read_pickle|os\.system|os\.popen)$"
)


IN_A_JOB = "agreement.py"
"""Its pickles travel between the processes of one job, as those of torch's `gather_object` do."""


def test_nothing_that_is_read_can_be_executed() -> None:
    """Every call of the sources that could, read one by one. Classes other than transformers' Auto… hold their code."""
    found = set()
    for folder in (PRODUCT, PRODUCT.parent / "analysis", PRODUCT.parent / "launch"):
        for path in folder.rglob("*.py"):
            for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
                name, text = ast.unparse(call.func), f"{path.name}:{call.lineno}: {ast.unparse(call)}"
                assert not UNSAFE.match(name) or (path.name == IN_A_JOB and name == "pickle.loads"), text
                assert "shell=True" not in text, text
                assert "allow_pickle=True" not in text, text
                owner, _, last = name.rpartition(".")
                safe = SAFE.get(last if owner.rpartition(".")[2].startswith("Auto") else name)
                assert safe is None or safe in text, text
                found.add(safe)
    assert found >= {"trust_remote_code=False", "weights_only=True", "_Plain"}


# --- runs and prepared data ---


@pytest.mark.parametrize("command", ["export {} --out {}/out", "generate {} --prompt def --tokens 4", "evaluate {}"])
def test_an_altered_recipe_is_noticed(command: str, runs: Path, qatscale, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "two", tmp_path / "two")
    recipe = run / "recipe.yaml"
    text = recipe.read_text()
    assert "rope_theta: 10000.0" in text
    recipe.write_text(text.replace("rope_theta: 10000.0", "rope_theta: 90000.0"))
    refused(qatscale, command.format(run, tmp_path), "recipe.yaml was altered")
    recipe.write_text("# restored\n" + text)
    code, _, error = qatscale(command.format(run, tmp_path))
    assert code == 0, error


@pytest.mark.parametrize("content", ["{}", "[]", DEEP, '{"kind": "sentencepiece", "eos_id": 2, "fingerprint": 3}'])
def test_a_damaged_tokenizer_card(content: str, prepared: Path, qatscale, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a text")
    folder = shutil.copytree(prepared / "tokenizer", tmp_path / "tokenizer")
    (folder / "qatscale_tokenizer.json").write_text(content)
    refused(qatscale, f"prepare {tmp_path}/text.txt --out {tmp_path}/data --tokenizer {folder}", str(folder))


@pytest.mark.parametrize("name", ["run.json", "tracking.json", "done.json", "metrics.jsonl"])
def test_damaged_records_of_a_run(name: str, runs: Path, qatscale, tmp_path: Path) -> None:
    run = shutil.copytree(runs / "two", tmp_path / "two")
    (run / name).write_text("[1]\n" * 2)
    code, out, error = qatscale(f"export {run} --out {tmp_path}/out --no-verify")
    assert "Traceback" not in out + error
    assert code in (0, EXIT_BAD_INPUT)
    assert code == 0 or str(run) in error


LOCKED = {
    "a shard": "two/checkpoints/step-00000012/shard-00000-of-00001.safetensors",
    "a manifest": "two/checkpoints/step-00000012/manifest.json",
    "a recipe": "two/recipe.yaml",
    "a run's record": "two/run.json",
    "checkpoints": "two/checkpoints",
    "a data manifest": "data/manifest.json",
    "a shard of data": "data/validation-00000.bin",
    "a tokenizer": "data/tokenizer",
}


@pytest.mark.parametrize("what", LOCKED)
def test_what_may_not_be_read_is_named(what: str, runs: Path, prepared: Path, qatscale, tmp_path: Path) -> None:
    shutil.copytree(runs / "two", tmp_path / "two")
    shutil.copytree(prepared, tmp_path / "data")
    (locked,) = tmp_path.glob(LOCKED[what].replace("00000.bin", "*.bin"))
    mode = locked.stat().st_mode
    locked.chmod(0)
    line = f"export {tmp_path}/two --data {tmp_path}/data --out {tmp_path}/out"
    try:
        with as_ordinary_user():
            code, out, error = qatscale(line)
    finally:
        locked.chmod(mode)
    assert code == EXIT_BAD_INPUT, error
    assert "Traceback" not in out + error
    assert not (tmp_path / "out").exists()


def test_where_nothing_may_be_written(runs: Path, qatscale, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    for mode in (0o500, 0o000):
        folder.chmod(mode)
        with as_ordinary_user():
            refused(qatscale, f"export {runs}/two --out {folder}/out --no-verify", str(folder))
    folder.chmod(0o700)


# --- clients ---


def test_a_missing_package_of_a_client_is_named(runs: Path, qatscale, tmp_path: Path, monkeypatch) -> None:
    real = clients.find_spec
    monkeypatch.setattr(clients, "find_spec", lambda name: None if name in ("gguf", "accelerate") else real(name))
    code, out, _ = qatscale(f"export {runs}/two --out {tmp_path}/out --format gguf")
    assert code == 0
    text = " ".join(out.split())
    assert "transformers was not asked, because gguf and accelerate are not installed" in text
    assert "pip install gguf accelerate" in text
    refused(qatscale, f"generate {tmp_path}/out --prompt def", "gguf and accelerate", "pip install gguf accelerate")


def test_a_missing_package_of_a_format_is_named(monkeypatch) -> None:
    for name in [name for name in sys.modules if name.startswith("qatscale.export.formats.gguf")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"package gguf, .*pip install"):
        get_format("gguf")


def test_a_client_that_fails_is_a_sentence(runs: Path, qatscale, tmp_path: Path, monkeypatch) -> None:
    need("mlx")

    def broken(*_: object) -> None:
        raise RuntimeError("libmlx.so: cannot open shared object file\nmore of it")

    monkeypatch.setattr(MlxLm, "__init__", broken)
    reason = "RuntimeError: libmlx.so: cannot open shared object file"
    refused(qatscale, f"export {runs}/two --out {tmp_path}/out --format mlx", "mlx-lm", reason, "--no-verify")
    assert not any(tmp_path.iterdir())
