"""What is generated is what the model computes: greedy text against our own forward pass, without a cache."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qatscale.cli.app import app
from qatscale.config.recipe import load_run_config
from qatscale.data.manifest import Manifest
from qatscale.data.tokenizer import load_tokenizer
from qatscale.engine.checkpoints.reader import CheckpointReader, find_checkpoint
from qatscale.engine.checkpoints.training_state import load_checkpointed_model
from qatscale.errors import UserError
from qatscale.export.formats.base import find_export
from qatscale.inference.generate import open_text_generator
from qatscale.inference.sampling import Detokenizer, Sampling, prompt_ids
from qatscale.train.validation import open_view
from tests.greedy_text import assert_same_text, decided_text

PROMPT = "def load(path):\n    return"
ROUNDING = 1e-5
"""Bound on the error of a logit, relative to the largest: sums in another order."""


def generated(what: str, *options: str) -> str:
    done = CliRunner().invoke(app, ["generate", what, "--prompt", PROMPT, *options], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stdout.startswith(PROMPT)
    return done.stdout


@pytest.mark.parametrize("view", ["quantized", "fp"])
def test_greedy_text_is_that_of_our_own_forward(run: Path, view: str) -> None:
    config = load_run_config(run / "recipe.yaml")
    model, _ = load_checkpointed_model(CheckpointReader(find_checkpoint(str(run))), config, torch.device("cpu"))
    generator = open_text_generator(str(run), view)
    ids = prompt_ids(generator, PROMPT, Sampling(tokens=20))
    with open_view(model, view):
        certain = decided_text(model, ids, 20, ROUNDING)
    text: list[str] = []
    generator.stream(ids, Sampling(tokens=20, temperature=0), text.append)
    decode = _decoder(config.data.path)
    assert "".join(text).startswith("".join(map(Detokenizer(decode, ids).add, certain)))
    assert generated(str(run), "--tokens", "20", "--temperature", "0", "--view", view) == PROMPT + "".join(text) + "\n"


def _decoder(data: Path | None):  # type: ignore[no-untyped-def]
    assert data is not None
    folder = Manifest.load(data).tokenizer.folder
    assert folder is not None
    return load_tokenizer(data / folder).decode


def test_the_two_views_differ(run: Path) -> None:
    fp, quantized = (open_text_generator(str(run), view).model for view in ("fp", "quantized"))  # type: ignore[attr-defined]
    ids = torch.arange(8).unsqueeze(0)
    assert not torch.equal(fp(ids).logits, quantized(ids).logits)


def test_a_checkpoint_before_the_switch_speaks_in_full_precision(run: Path) -> None:
    steps = sorted(run.glob("checkpoints/step-*"))
    assert "fp view" in open_text_generator(str(steps[0])).about
    assert "quantized view" in open_text_generator(str(run)).about
    with pytest.raises(UserError, match="not switched"):
        open_text_generator(str(steps[0]), "quantized")


def test_the_seed_decides_the_text(run: Path) -> None:
    one, same, other = (generated(str(run), "--tokens", "30", "--seed", seed) for seed in ("1", "1", "2"))
    assert one == same != other


def test_an_exported_folder_says_what_the_checkpoint_says(run: Path, tmp_path: Path) -> None:
    from qatscale.engine.checkpoints.training_state import read_checkpoint
    from qatscale.tracking.convert import write_hugging_face

    write_hugging_face(read_checkpoint(str(run)), tmp_path / "hf")
    exported, checkpoint = open_text_generator(str(tmp_path / "hf")), open_text_generator(str(run), "fp")
    ids = exported.encode(PROMPT)
    assert ids == checkpoint.encode(PROMPT)
    theirs, ours = (lambda tokens, model=one.model: model(tokens).logits for one in (exported, checkpoint))  # type: ignore[attr-defined]
    assert_same_text(theirs, ours, ids, 20, ROUNDING)
    with pytest.raises(UserError, match="--view"):
        open_text_generator(str(tmp_path / "hf"), "fp")


def test_a_text_longer_than_those_of_training_is_refused(run: Path) -> None:
    generator = open_text_generator(str(run))
    count = len(generator.encode(PROMPT))
    assert generator.length is not None
    fits = generator.length - count
    prompt_ids(generator, PROMPT, Sampling(tokens=fits))
    with pytest.raises(UserError, match=f"--tokens {fits} is the most"):
        prompt_ids(generator, PROMPT, Sampling(tokens=fits + 1))
    with pytest.raises(UserError, match="--prompt"):
        prompt_ids(generator, "", Sampling())


def test_the_tokenizer_of_data_in_another_place(run: Path, prepared: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(prepared, moved)
    greedy = ("--tokens", "8", "--temperature", "0")
    assert generated(str(run), *greedy, "--data", str(moved)) == generated(str(run), *greedy)
    with pytest.raises(UserError, match="--data FOLDER") as caught:
        open_text_generator(str(run), data=tmp_path / "nothing")
    assert caught.value.key == "--data"


@pytest.mark.parametrize(
    "text", ["The function returns a value.", "naïve café 🙂👩‍👩‍👧 中文字符", "a  b\n\n   c\t d", "x" * 40, " leading"]
)
def test_pieces_join_to_the_whole_text(prepared: Path, text: str) -> None:
    tokenizer = load_tokenizer(prepared / str(Manifest.load(prepared).tokenizer.folder))
    ids = tokenizer.encode_batch([text])[0].tolist()
    for cut in range(1, len(ids)):
        pieces = Detokenizer(tokenizer.decode, ids[:cut])
        text_of_pieces = "".join([*map(pieces.add, ids[cut:]), pieces.rest()])
        # a prompt may end within a character: what it shows of it then is no part of the text
        assert tokenizer.decode(ids[:cut]).rstrip("�") + text_of_pieces == text or "�" in tokenizer.decode(ids[:cut])


def test_damaged_exports_are_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        find_export(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="transformers cannot load it"):
        open_text_generator(str(tmp_path))


BAD: Sequence[tuple[str, dict[str, float]]] = [
    ("--tokens", {"tokens": 0}), ("--temperature", {"temperature": -1}), ("--top-k", {"top_k": -1}),
    ("--top-p", {"top_p": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("option", "setting"), BAD)
def test_settings_out_of_range(option: str, setting: dict[str, float]) -> None:
    with pytest.raises(UserError, match=option):
        Sampling(**setting)  # type: ignore[arg-type]
