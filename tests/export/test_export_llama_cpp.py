"""GGUF in llama.cpp. Building llama-cpp-python takes ten minutes, so these run with -m slow where it is installed."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qatscale.model.hugging_face_tokenizer import PROBES
from tests.export.export_runs import WIDTHS
from tests.export.exported import described, plain_model, snippets
from tests.greedy_text import assert_same_text

pytestmark = pytest.mark.slow
llama_cpp = pytest.importorskip("llama_cpp")
BOUND = 0.05
"""Bound on the error of a logit, relative to the largest: activations in 8 bits."""


@pytest.fixture(scope="module")
def exports(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    from qatscale.cli import main

    folder = tmp_path_factory.mktemp("gguf")

    def export(run: str, *more: str) -> Path:
        out = folder / "-".join([run, *more])
        if not out.exists():
            with pytest.raises(SystemExit) as stop:
                main(shlex.split(f"export {runs / run} --format gguf --out {out} --fallback {' '.join(more)}"))
            assert not stop.value.code
        return out

    return export


def logits_of(model: llama_cpp.Llama, tokens: list[int]) -> Tensor:
    model.reset()
    model.eval(tokens)
    return torch.from_numpy(model.scores[: len(tokens)].copy())


@pytest.mark.parametrize("run", [*WIDTHS, "ternary", "three", "narrow"])
def test_llama_cpp_is_near_what_was_trained(run: str, exports, runs: Path) -> None:
    """It rounds activations to 8 bits before each product, by other kernels on every CPU: its logits are near, and
    its likeliest tokens are ours where the lead is larger than that."""
    folder = exports(run)
    asked = {report["client"].split()[0]: report for report in described(folder)["verification"]["clients"]}
    assert asked["llama-cpp-python"]["logit_error"] < BOUND
    assert asked["llama-cpp-python"]["loss"] == pytest.approx(asked["transformers"]["loss"], abs=0.01)
    model = llama_cpp.Llama(str(next(folder.glob("*.gguf"))), n_ctx=64, logits_all=True, verbose=False)
    ours = plain_model(runs / run)
    tokens = torch.randint(514, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        expected = ours(torch.tensor([tokens]))[0]
    found = logits_of(model, tokens)
    largest = expected.abs().max()
    assert float((found - expected).abs().max()) < BOUND * float(largest)
    best = expected.topk(2).values
    is_decided = best[:, 0] - best[:, 1] > 2 * BOUND * largest
    assert torch.equal(found.argmax(-1)[is_decided], expected.argmax(-1)[is_decided])
    assert_same_text(lambda t: logits_of(model, t[0].tolist())[None], ours, [1, 17, 300, 45], 24, BOUND)


def test_one_bit_in_half_the_bytes(exports) -> None:
    """Q1_0 holds what TQ2_0 holds."""
    half, whole = (exports("one", *more) for more in (("--q1-0",), ()))
    sizes = [sum(t["bytes"] for t in described(f)["tensors"] if t["bits"] == 1) for f in (half, whole)]
    assert sizes[0] * 8 / 1_179_648 == 1.125
    assert sizes[1] * 8 / 1_179_648 == 2.0625
    (client,) = described(half)["verification"]["clients"]
    assert client["loss"] == pytest.approx(described(half)["verification"]["stored_loss"], abs=0.01)
    tokens = list(range(40))
    one, other = (
        logits_of(llama_cpp.Llama(str(next(f.glob("*.gguf"))), n_ctx=64, logits_all=True, verbose=False), tokens)
        for f in (half, whole)
    )
    assert float((one - other).abs().max() / other.abs().max()) < BOUND
    card = (half / "README.md").read_text()
    assert "transformers does not read it" in card
    assert len(snippets(half)) == 1


def test_its_tokenizer_gives_the_ids_of_training(exports, prepared: Path) -> None:
    import sentencepiece

    model = llama_cpp.Llama(str(next(exports("two").glob("*.gguf"))), vocab_only=True, verbose=False)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(prepared / "tokenizer" / "tokenizer.model"))
    for text in PROBES:
        if "\x00" in text:  # C ends its text there
            continue
        found = model.tokenize(text.encode(), add_bos=False, special=False)
        assert found == processor.encode(text), repr(text)
    assert (model.token_bos(), model.token_eos()) == (processor.bos_id(), processor.eos_id())


@pytest.mark.parametrize("more", [(), ("--tokenizer", "none")])
def test_the_snippet_of_the_card_runs(more: tuple[str, ...], exports, monkeypatch, capfd) -> None:
    folder = exports("two", *more)
    monkeypatch.chdir(folder)
    code = snippets(folder)[1]
    capfd.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    assert capfd.readouterr().out
