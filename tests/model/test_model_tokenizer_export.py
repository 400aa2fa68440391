"""An exported tokenizer gives the ids that the documents were encoded with."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import random
import string
import textwrap
import unicodedata

import pytest
import sentencepiece
from transformers import AutoTokenizer

from qatscale.errors import UserError
from qatscale.model import hugging_face_tokenizer
from qatscale.model.hugging_face import export_hugging_face
from qatscale.model.hugging_face_tokenizer import PROBES, SpecialIds, export_tokenizer

PYTHON = [inspect.getsource(module) for module in (random, string, textwrap, inspect, io, json)]
FOREIGN = [
    "Η τεχνητή νοημοσύνη μαθαίνει από κείμενα.", "Искусственный интеллект учится на текстах.", "机器从文本中学习语言。",
    "les élèves ont été très étonnés", "größere Häuser, süße Äpfel", "🙂 ok 👍🏽 fine", "½ kg ﬁne ＡＢ１２",
]  # fmt: skip
LLAMA_2 = {
    "model_type": "bpe", "byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True,
}  # fmt: skip
MODELS = {
    "llama-2": LLAMA_2,
    "no-prefix": LLAMA_2 | {"add_dummy_prefix": False},
    "trimmed-nfkc": LLAMA_2 | {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "unk-pad": LLAMA_2 | {"byte_fallback": False, "pad_id": 3},
}


def train(folder, options):
    model = io.BytesIO()
    lines = [line for text in PYTHON for line in text.split("\n") if line] + FOREIGN * 3
    options = {"vocab_size": 1500, "character_coverage": 0.9995, "minloglevel": 2, "num_threads": 1} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def pair(request, tmp_path_factory):
    """(SentencePiece, what AutoTokenizer makes of its export)."""
    folder = tmp_path_factory.mktemp("tokenizer")
    processor = train(folder / "sentencepiece", request.param)
    (folder / "out").mkdir()
    if request.param["normalization_rule_name"] == "identity":
        told = contextlib.nullcontext()
    else:
        told = pytest.warns(UserWarning, match="nmt_nfkc.*combining characters")
    with told:
        assert export_tokenizer(folder / "sentencepiece", folder / "out") == SpecialIds(1, 2)
    return processor, AutoTokenizer.from_pretrained(folder / "out")


def same(pair, text):
    processor, exported = pair
    ids = processor.encode(text)
    assert exported.encode(text) == ids, repr(text)
    if processor.unk_id() not in ids:  # which SentencePiece shows as ⁇ and transformers as <unk>
        assert exported.decode(ids) == processor.decode(ids), repr(text)


def test_real_text_gets_the_same_ids_and_reads_back(pair):
    for text in (*PYTHON, *FOREIGN, *PROBES):
        same(pair, text)


def test_runs_of_few_characters_get_the_same_ids(pair):
    """Ties between merges: runs of spaces, dashes, line breaks, repeated words."""
    draw = random.Random(0)
    for _ in range(1500):
        alphabet = draw.choice(["- ", "=", "ab", " \n", "._-", "e t", "01 ", "aé▁ ", " ", "\"'#", "(self)", "\t x"])
        same(pair, "".join(draw.choice(alphabet) * draw.randint(1, 6) for _ in range(draw.randint(1, 30))))


def test_random_unicode_gets_the_same_ids(pair):
    """Without combining characters where the model normalises: the export warns of those."""
    draw = random.Random(1)
    normalises = pair[1].backend_tokenizer.to_str().count('"Precompiled"')
    for _ in range(400):
        points = [draw.choice((draw.randrange(0x20, 0x250), draw.randrange(0x250, 0xD800))) for _ in range(12)]
        if normalises:
            points = [p for p in points if unicodedata.category(chr(p))[0] != "M"]
        points.append(draw.randrange(0x10000, 0x20000))
        text = "".join(map(chr, points))
        assert pair[1].encode(text) == pair[0].encode(text), repr(text)


def test_special_pieces_in_a_text_are_text(pair):
    processor, exported = pair
    for text in ("<s>", "a </s> b", "<unk>", "x<pad>"):
        assert exported.encode(text) == processor.encode(text)
    assert 2 not in exported.encode("</s>")
    assert (exported.bos_token_id, exported.eos_token_id, exported.unk_token_id) == (1, 2, 0)
    assert exported.decode([2], skip_special_tokens=True) == ""
    assert len(exported) == processor.get_piece_size()


def test_a_symbol_that_cannot_be_converted_exactly_is_refused(tmp_path):
    """SentencePiece cuts a user-defined symbol out before it merges; a list of merges cannot say that."""
    train(tmp_path / "in", LLAMA_2 | {"user_defined_symbols": ["<sep>"]})
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="the text 'a<sep> b' would get other ids"):
        export_tokenizer(tmp_path / "in", tmp_path / "out")


def test_other_kinds_and_missing_files_are_refused(tmp_path):
    train(tmp_path / "unigram", {"model_type": "unigram", "byte_fallback": True})
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="'unigram': only BPE models"):
        export_tokenizer(tmp_path / "unigram", tmp_path / "out")
    with pytest.raises(UserError, match=r"holds neither tokenizer\.json nor tokenizer\.model"):
        export_tokenizer(tmp_path / "nothing", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        export_tokenizer(tmp_path, tmp_path / "out")


def byte_level(special=("<|end|>",)):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(PYTHON, trainer)
    return tokenizer


def test_a_hugging_face_tokenizer_is_copied(tmp_path):
    from transformers import PreTrainedTokenizerFast

    given = PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<|end|>")
    given.save_pretrained(tmp_path / "in")
    (tmp_path / "in/pytorch_model.bin").write_bytes(b"weights are no part of a tokenizer")
    (tmp_path / "out").mkdir()
    assert export_tokenizer(tmp_path / "in", tmp_path / "out") == SpecialIds(None, 0)
    assert not (tmp_path / "out/pytorch_model.bin").exists()
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert all(exported.encode(text) == given.encode(text) for text in (*PYTHON, *PROBES))


def test_a_bare_tokenizer_json_is_enough(tmp_path):
    (tmp_path / "in").mkdir()
    tokenizer = byte_level()
    tokenizer.save(str(tmp_path / "in/tokenizer.json"))
    (tmp_path / "out").mkdir()
    assert export_tokenizer(tmp_path / "in", tmp_path / "out") == SpecialIds(None, None)
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert exported.encode(PYTHON[0]) == tokenizer.encode(PYTHON[0]).ids


def test_a_tokenizer_that_adds_what_the_model_never_saw_is_told(tmp_path):
    from tokenizers import processors

    tokenizer = byte_level(("<|begin|>", "<|end|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A $B", special_tokens=[("<|begin|>", 0)]
    )
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    tokenizer.save(str(tmp_path / "in/tokenizer.json"))
    with pytest.warns(UserWarning, match="add_special_tokens=False"):
        export_tokenizer(tmp_path / "in", tmp_path / "out")


def test_an_exported_model_brings_its_tokenizer(build, tmp_path):
    """AutoTokenizer also reads config.json, whose 'llama' must not bring in transformers' own conversion."""
    from qatscale.config.schema import ModelConfig

    config = ModelConfig(vocab_size=1500, hidden_size=16, layers=1, heads=2, intermediate_size=24)
    processor = train(tmp_path / "in", LLAMA_2)
    export_hugging_face(build(config), config, tmp_path / "m", sequence_length=8, tokenizer_folder=tmp_path / "in")
    exported = AutoTokenizer.from_pretrained(tmp_path / "m")
    for text in (PYTHON[0], *PROBES):
        assert exported.encode(text) == processor.encode(text), repr(text)
    stated = json.loads((tmp_path / "m/config.json").read_text())
    assert (stated["bos_token_id"], stated["eos_token_id"]) == (1, 2)
    assert hugging_face_tokenizer.SENTENCEPIECE_FILE in {p.name for p in (tmp_path / "m").iterdir()}
