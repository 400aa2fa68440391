"""Tokenizers as a GGUF file tells them to llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, TokenType
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qatscale.errors import UserError
from qatscale.export.formats.gguf import TensorInfo, write_gguf
from qatscale.export.formats.gguf_vocabulary import _LLAMA3, vocabulary
from qatscale.model.hugging_face_tokenizer import PROBES

TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "def f(x):\n    return x ** 2",
    "it's 12345 o'clock, isn't it?",
] * 20
CUTS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "llama-bpe": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    ),
}


def byte_level(folder: Path, cut: pre_tokenizers.PreTokenizer) -> Path:
    """A small byte-level BPE as Hugging Face saves it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def test_a_sentencepiece_model(prepared: Path) -> None:
    import sentencepiece

    folder = prepared / "tokenizer"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    keys = vocabulary(folder, 515)
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert tokens[:512] == [processor.id_to_piece(i) for i in range(512)]
    assert tokens[512:] == ["[PAD512]", "[PAD513]", "[PAD514]"]
    assert kinds[512:] == [TokenType.UNUSED] * 3
    assert kinds[processor.unk_id()] == TokenType.UNKNOWN
    assert kinds[processor.eos_id()] == TokenType.CONTROL
    assert kinds[processor.piece_to_id("<0x41>")] == TokenType.BYTE
    assert kinds[processor.piece_to_id("▁the")] == TokenType.NORMAL
    assert keys["tokenizer.ggml.scores"][:512] == pytest.approx([processor.get_score(i) for i in range(512)])
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert vocabulary(None, 515) == {"tokenizer.ggml.model": "no_vocab"}


@pytest.mark.parametrize("name", CUTS)
def test_a_byte_level_model(name: str, tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "in", CUTS[name])
    keys = vocabulary(folder, 302)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert keys["tokenizer.ggml.pre"] == name
    assert keys["tokenizer.ggml.tokens"][:300] == [tokenizer.id_to_token(i) for i in range(300)]
    assert keys["tokenizer.ggml.token_type"][0] == TokenType.CONTROL
    assert keys["tokenizer.ggml.token_type"][300:] == [TokenType.UNUSED, TokenType.UNUSED]
    assert keys["tokenizer.ggml.eos_token_id"] == 0
    assert len(keys["tokenizer.ggml.merges"]) == 300 - 256 - 1
    assert all(merge.count(" ") == 1 for merge in keys["tokenizer.ggml.merges"])


def test_what_llama_cpp_does_not_have_is_refused(tmp_path: Path) -> None:
    folder = byte_level(tmp_path / "in", CUTS["gpt-2"])
    content = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}
    for change in (
        {"pre_tokenizer": {"type": "Whitespace"}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [split, content["pre_tokenizer"] | {"use_regex": False}],
            }
        },
        {"pre_tokenizer": content["pre_tokenizer"] | {"add_prefix_space": True}},
        {"normalizer": json.loads(normalizers.NFC().__getstate__())},
    ):
        (folder / "tokenizer.json").write_text(json.dumps(content | change))
        with pytest.raises(UserError, match=r"llama.cpp has no tokenizer like .* --tokenizer none"):
            vocabulary(folder, 300)


def test_metadata_and_tensors_are_read_back_by_gguf(tmp_path: Path) -> None:
    metadata = {
        "a.text": "naïve", "a.yes": True, "a.count": 7, "a.rate": 0.5,
        "a.words": ["x", "yz"], "a.kinds": [-1, 6],
    }  # fmt: skip
    arrays = {"one": np.arange(6, dtype=np.float32).reshape(2, 3), "two": np.arange(5, dtype=np.float32)}
    tensors = [TensorInfo(n, a.shape, GGMLQuantizationType.F32, a.nbytes, lambda a=a: a) for n, a in arrays.items()]
    write_gguf(tmp_path / "x.gguf", "llama", metadata, tensors)
    found = GGUFReader(tmp_path / "x.gguf")
    assert found.fields["general.architecture"].contents() == "llama"
    assert {key: found.fields[key].contents() for key in metadata} == metadata
    for tensor in found.tensors:
        assert np.array_equal(tensor.data, arrays[tensor.name])


@pytest.mark.slow
@pytest.mark.parametrize("name", CUTS)
def test_llama_cpp_gives_the_ids_of_a_byte_level_model(name: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = byte_level(tmp_path / "in", CUTS[name])
    shape = {
        "llama.context_length": 64, "llama.embedding_length": 64,
        "llama.block_count": 1, "llama.feed_forward_length": 64, "llama.attention.head_count": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }  # fmt: skip
    write_gguf(tmp_path / "x.gguf", "llama", shape | vocabulary(folder, 300), [])
    model = llama_cpp.Llama(str(tmp_path / "x.gguf"), vocab_only=True, verbose=False)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (*PROBES, *TEXT[:3]):
        if "\x00" not in text:
            assert model.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text).ids, repr(text)
