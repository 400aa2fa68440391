"""Each width through each format into the program it is for: weights, logits, greedy text, sizes, model card."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qatscale.errors import UserError
from qatscale.export.formats import FORMATS
from qatscale.export.formats.base import get_format
from qatscale.inference.generate import open_text_generator
from qatscale.inference.sampling import Detokenizer, Sampling
from qatscale.model.hugging_face import from_hugging_face
from qatscale.model.hugging_face_tokenizer import PROBES
from tests.export.expected import BF16_RUNS, EXPECTED, Loaded, fp16_scales, nothing
from tests.export.export_runs import WIDTHS
from tests.export.exported import described, plain_model, snippets, trained_weights
from tests.greedy_text import assert_same_text, decided_text

START, COUNT = [1, 17, 300, 45], 24


@pytest.fixture(scope="module")
def loaded(exports: Callable[[str, str], Path]) -> Callable[[str, str], Loaded]:
    """(run, format) -> the export in its client, loaded once."""
    return functools.cache(lambda run, format: EXPECTED[format].load(exports(run, format)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("run", WIDTHS)
def test_the_client_computes_what_was_trained(run: str, format: str, loaded, runs: Path) -> None:
    client, of_format = loaded(run, format), EXPECTED[format]
    trained, found = trained_weights(runs / run), client.weights
    assert set(trained) <= set(found)
    for name, weight in trained.items():
        bound = 0.0 if weight.ndim == 1 else of_format.weights_off(weight.float(), run in BF16_RUNS)
        assert bool(((found[name].float() - weight.float()).abs() <= bound).all()), name
        if format == "gguf" and run in BF16_RUNS:  # training rounded the same products to bf16
            assert torch.equal(found[name].bfloat16(), weight), name

    ours = plain_model(runs / run)
    tokens = torch.randint(514, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = ours(tokens)
    off = float((client.logits(tokens) - logits).abs().max() / logits.abs().max())
    assert off <= of_format.logits_off.get(run, 1e-5)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("run", WIDTHS)
def test_greedy_text_is_the_same_token_by_token(run: str, format: str, loaded, runs: Path) -> None:
    client, model = loaded(run, format), plain_model(runs / run)
    weights = {name: client.weights[name].float() for name in trained_weights(runs / run)}  # with scales as stored
    model.load_state_dict(from_hugging_face(weights, model.config))
    assert_same_text(client.logits, model, START, COUNT, EXPECTED[format].own_logits_off.get(run, 1e-5))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("run", WIDTHS)
def test_sizes(run: str, format: str, exports) -> None:
    """Against the closed form: bits of the type, scales, and what is not quantized."""
    folder = exports(run, format)
    about = described(folder)
    layers = 2 if run == "one" else 1
    # q, o: 256·256; k, v: 128·256; gate, up, down: 512·256
    wider = 2 if run == "four" else 1  # its heads have 128 channels
    matrices = layers * (wider * (2 * 65536 + 2 * 32768) + 3 * 131072)
    rows = layers * (256 * wider + 256 + 128 * wider * 2 + 512 * 2 + 256)
    tables, norms = 514 * 256 * (2 if run == "four" else 1), 256 * (2 * layers + 1)
    norms += {"one": layers * (256 + 2 * 128), "four": 2 * 128}.get(run, 0)  # Qwen2's biases, Qwen3's norms of heads
    of_format, wide = EXPECTED[format], 2 if run in BF16_RUNS else 4  # bytes of a number in training
    bits = of_format.bits[run] or 8 * wide
    table_bits = of_format.table_bits.get(run, 8 * wide)
    expected = matrices * bits / 8 + tables * table_bits / 8 + norms * (4 if of_format.fp32_norms else wide)
    expected += of_format.beside(rows, 7 * layers, wide)
    stored = sum(tensor["bytes"] for tensor in about["tensors"])
    assert stored == expected
    written = sum(path.stat().st_size for path in folder.glob(f"*{get_format(format).suffix}"))
    assert about["size"]["bytes"] == written
    assert 0 < written - stored < 20_000, "the header, in GGUF with 514 tokens and the padding of tensors to 32 bytes"
    ideal = matrices * WIDTHS[run] / 8 + rows * wide + norms * wide
    ideal += tables * wide if run == "four" else tables * max(4, WIDTHS[run]) / 8 + 514 * wide
    assert about["size"]["ideal_bytes"] == pytest.approx(ideal)
    falls_back = of_format.bits[run] is not None and run not in of_format.table_bits and run != "four"
    cost = tables * (wide - max(4, WIDTHS[run]) / 8) - 514 * wide
    assert about["size"]["fallback_bytes"] == pytest.approx(cost if falls_back else 0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("run", WIDTHS)
def test_the_report_says_what_was_compared(run: str, format: str, exports, runs: Path) -> None:
    from qatscale.train.evaluate import evaluate_checkpoint

    about = described(exports(run, format))
    found = about["verification"]
    assert found["passed"]
    assert found["tokens"] == 512
    client = found["clients"][0]
    assert client["exact"] == client["tensors"] == len(about["tensors"])
    _, _, losses = evaluate_checkpoint(str(runs / run))
    # evaluate computes in training's precision, the report in fp32
    assert found["trained_loss"] == pytest.approx(losses["quantized"], abs=2e-3 if run in BF16_RUNS else 1e-5)
    assert client["loss"] == pytest.approx(found["stored_loss"], abs=1e-5)
    assert found["stored_loss"] == pytest.approx(found["trained_loss"], abs=2e-3)
    if EXPECTED[format].weights_off is nothing:
        assert found["stored_loss"] == found["trained_loss"]
        assert found["rounding"] == 0
    if EXPECTED[format].weights_off is fp16_scales:
        assert (found["rounding"] == 0) == (run in BF16_RUNS), "bf16 scales are fp16 numbers, fp32 ones are not"
    assert about["tokens"] == {"fp": 3072, "qat": 3072, "total": 6144}


@pytest.mark.parametrize("format", FORMATS)
def test_the_model_card_holds_and_its_snippet_runs(format: str, exports, monkeypatch, capsys) -> None:
    folder = exports("two", format)
    card = (folder / "README.md").read_text()
    for text in (
        "# two, 2 bits",
        "| tokens in full precision | 3.072K |",
        "| tokens in QAT | 3.072K |",
        "qat:",
        "id `",
    ):
        assert text in card
    assert "Unfinished" not in card
    assert str(folder.parent.parent) not in card, "where things lay on this machine is nobody's business"
    assert f"{described(folder)['verification']['trained_loss']:.6f}" in card
    monkeypatch.chdir(folder)
    code, *others = snippets(folder)
    exec(compile(code, f"{format}/README.md", "exec"), {})
    assert capsys.readouterr().out
    assert 1 + len(others) == EXPECTED[format].snippets


@pytest.mark.parametrize("format", FORMATS)
def test_the_tokenizer_is_the_one_of_the_data(format: str, exports, prepared: Path) -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    exported = AutoTokenizer.from_pretrained(exports("two", format))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(prepared / "tokenizer" / "tokenizer.model"))
    for text in PROBES:
        assert exported.encode(text) == processor.encode(text)


@pytest.mark.parametrize(
    ("run", "format", "stored_as", "fallbacks"),
    [
        # a head of 5 and of 8 bits is a Linear layer as others are, an embedding is none
        ("ternary", "compressed-tensors", {"int2", "int5", "bfloat16"}, 1),
        ("ternary", "gguf", {"TQ2_0", "Q5_0"}, 0),
        ("ternary", "mlx", {"affine2/128", "affine5/128"}, 0),
        ("three", "compressed-tensors", {"int3", "int8", "float32"}, 1),  # in groups of 64
        ("three", "gguf", {"Q4_0", "Q8_0"}, 7),  # Q3_K has one scale for 256
        ("three", "mlx", {"affine3/64", "affine8/64"}, 0),
        ("narrow", "gguf", {"Q4_0"}, 7),  # rows of 96 and 192
        ("narrow", "mlx", {"affine2/32", "affine2/64", "affine4/32"}, 0),
    ],
)
def test_other_widths_groups_and_shapes(run: str, format: str, stored_as: set[str], fallbacks: int, exports) -> None:
    about = described(exports(run, format))
    quantized = [tensor for tensor in about["tensors"] if tensor["bits"]]
    assert {tensor["stored_as"] for tensor in quantized} == stored_as
    assert sum(tensor["fallback"] is not None for tensor in quantized) == fallbacks
    assert about["verification"]["passed"]
    assert about["verification"]["clients"][0]["exact"] == len(about["tensors"])
    scale = about["verification"]["rounding"]
    assert scale <= (2.0**-8 if run == "ternary" else 2.0**-9), "α · 2/3 has more digits than bf16 and fp16 hold"
    assert (scale > 0) == ((run == "ternary" and format != "mlx") or format == "gguf")


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_of_a_one_bit_matrix_is_a_third_level(format: str, loaded) -> None:
    weight = loaded("one", format).weights["model.layers.1.mlp.up_proj.weight"].float()
    assert max(len(set(row)) for row in weight.tolist()) == 2
    assert not (weight == 0).any()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("run", ["one", "four"])
def test_generate_says_what_the_logits_of_an_export_and_of_the_checkpoint_say(
    run: str, format: str, loaded, runs: Path, exports: Callable[[str, str], Path]
) -> None:
    if not EXPECTED[format].generates:
        with pytest.raises(UserError, match=f"is for {get_format(format).clients[0].name}"):
            open_text_generator(str(exports(run, format)))
        return
    tokenizer = open_text_generator(str(runs / run)).tokenizer  # type: ignore[attr-defined]
    for what, logits in ((exports(run, format), loaded(run, format).logits), (runs / run, plain_model(runs / run))):
        generator, text = open_text_generator(str(what)), []
        assert generator.length is not None
        prompt = generator.encode("def load(path):")
        generator.stream(prompt, Sampling(tokens=12, temperature=0), text.append)
        certain = decided_text(logits, prompt, 12, 1e-5)
        pieces = Detokenizer(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), prompt)
        assert "".join(text).startswith("".join(map(pieces.add, certain)))
