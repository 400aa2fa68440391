"""Tokenizers: the word cache against the library itself, training, saving, and what is refused."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qatscale.data.segments import _cuts, segment_encoder
from qatscale.data.tokenizer import (
    HUGGING_FACE_FILE,
    SENTENCEPIECE_FILE,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from qatscale.errors import UserError
from tests.data.data_corpora import WORDS, documents

CODE = "def f(x, y):\n    return x  +  y\n\n\n  class A:\n\tpass   \n   \n" * 3


def model(texts: list[str], **changes: object) -> bytes:
    """A SentencePiece model with options of its own."""
    out = io.BytesIO()
    options: dict[str, object] = {
        "model_type": "bpe", "vocab_size": 600, "byte_fallback": True, "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity", "allow_whitespace_only_pieces": True, "minloglevel": 2,
    }  # fmt: skip
    lines = [line for text in texts for line in text.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, **(options | changes))
    return out.getvalue()


TEXTS = [*documents(120, seed=5), CODE * 20]
SAFE = {
    "dummy prefix": model(TEXTS),
    "no dummy prefix": model(TEXTS, add_dummy_prefix=False),
    "no runs of spaces": model(TEXTS, allow_whitespace_only_pieces=False),
    "pieces across scripts and digits": model(TEXTS, split_by_unicode_script=False, split_by_number=False),
}
UNSAFE = {
    "unigram": model(TEXTS, model_type="unigram"),
    "no byte fallback": model(TEXTS, byte_fallback=False),
    "normalised": model(TEXTS, normalization_rule_name="nmt_nfkc"),
    "spaces removed": model(TEXTS, remove_extra_whitespaces=True),
    "user-defined": model(TEXTS, user_defined_symbols=["\n\n"]),
    "pieces across words": model(TEXTS, split_by_whitespace=False),
    "spaces at the end": model(TEXTS, treat_whitespace_as_suffix=True),
}


def library_ids(proto: bytes, text: str) -> list[int]:
    return sentencepiece.SentencePieceProcessor(model_proto=proto).encode(text)


@pytest.mark.parametrize("name", SAFE)
@settings(max_examples=150)
@given(
    st.lists(
        st.one_of(st.sampled_from([*WORDS, " ", "  ", "    ", "\n", "\n\n", "\t", "▁", " \n", "\r", "\x00", "\u3000"]),
                  st.text(st.characters(codec="utf-8"), max_size=4)),
        max_size=25,
    ).map("".join)
)  # fmt: skip
@example(" ")
@example("\n")
@example("  a")
@example("a \n b  \n")
@example("x" * 100)
@example("f(x,  y)[0]...--name='a b',\n    ((日本)Ω42)\n")
@example("a\x00  b\x00 c")
def test_word_cache_gives_the_librarys_ids(name: str, text: str) -> None:
    encoder = CACHED.setdefault(name, segment_encoder(SAFE[name], SentencePieceTokenizer(SAFE[name]).dtype))
    assert encoder is not None
    assert encoder.encode(text).tolist() == library_ids(SAFE[name], text)


CACHED: dict = {}


@pytest.mark.parametrize("name", SAFE)
def test_word_cache_on_whole_documents(name: str) -> None:
    tokenizer = SentencePieceTokenizer(SAFE[name])
    assert tokenizer._fast is not None
    assert [ids.tolist() for ids in tokenizer.encode_batch(TEXTS)] == [library_ids(SAFE[name], text) for text in TEXTS]


def test_words_are_cut_where_no_piece_can_cross() -> None:
    cuts = _cuts(["the", "he", "a", "().", "..", "ть"])
    assert cuts.findall("the(a.)  .the\nтьth") == ["the", "(", "a", ".)", "  .", "the", "\n", "ть", "th"]
    assert _cuts(["the", "e."]).findall("(the.he)") == ["(", "the.he", ")"], "a piece joins letters and points"


@pytest.mark.parametrize("name", UNSAFE)
def test_other_models_go_through_the_library(name: str) -> None:
    tokenizer = SentencePieceTokenizer(UNSAFE[name])
    assert tokenizer._fast is None
    assert tokenizer.encode_batch([CODE])[0].tolist() == library_ids(UNSAFE[name], CODE)


def test_training_is_deterministic_and_lossless(tokenizer: SentencePieceTokenizer) -> None:
    again = train_sentencepiece(documents(200, seed=99), 700)
    assert again.fingerprint == tokenizer.fingerprint
    assert tokenizer.vocab_size == 700
    for text in (CODE, "emoji 🙂 and  spaces", *documents(5, seed=1)):
        assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


def test_digits_stay_single(tokenizer: SentencePieceTokenizer) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.files[SENTENCEPIECE_FILE])
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size()) if not processor.is_byte(i)]
    assert [p for p in pieces if len(p) > 1 and any(c.isdigit() for c in p)] == []


def test_text_never_becomes_a_control_token(tokenizer: SentencePieceTokenizer) -> None:
    ids = tokenizer.encode_batch(["</s> <s> <unk>"])[0].tolist()
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "</s> <s> <unk>"


def test_saved_and_loaded(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "out" / "tokenizer")
    by_file = load_tokenizer(tmp_path / "out" / "tokenizer" / SENTENCEPIECE_FILE)
    by_folder = load_tokenizer(tmp_path / "out" / "tokenizer")
    by_prepared = load_tokenizer(tmp_path / "out")
    expected = hashlib.sha256((tmp_path / "out" / "tokenizer" / SENTENCEPIECE_FILE).read_bytes()).hexdigest()
    assert {by_file.fingerprint, by_folder.fingerprint, by_prepared.fingerprint} == {expected}


def test_altered_tokenizer_is_refused(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "t")
    (tmp_path / "t" / SENTENCEPIECE_FILE).write_bytes(SAFE["dummy prefix"])
    with pytest.raises(UserError, match="altered"):
        load_tokenizer(tmp_path / "t")


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE saved by transformers, with truncation on and an EOS that could stand in a text."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(TEXTS, trainer)
    backend.enable_truncation(5)
    folder = tmp_path_factory.mktemp("hf")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


def test_hugging_face_tokenizer(hugging_face: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(hugging_face)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (0, 500)
    text = CODE + "<|endoftext|>"
    ids = tokenizer.encode_batch([text])[0]
    assert len(ids) > 5, "truncated"
    assert tokenizer.eos_id not in ids.tolist()
    assert tokenizer.decode(ids) == text
    tokenizer.save(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert saved.fingerprint == tokenizer.fingerprint
    assert saved.encode_batch([text])[0].tolist() == ids.tolist()
    assert (tmp_path / "saved" / "tokenizer_config.json").is_file(), "transformers could not load it"


def test_hugging_face_tokenizer_without_eos(hugging_face: Path, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_file=str(hugging_face / HUGGING_FACE_FILE)).save_pretrained(tmp_path)
    named = load_tokenizer(hugging_face)
    for spec in (tmp_path, tmp_path / HUGGING_FACE_FILE):
        with pytest.raises(UserError, match=r"no end-of-sequence token.*<\|endoftext\|>") as caught:
            load_tokenizer(spec)
        assert "--eos" in caught.value.fix
        for eos in ("<|endoftext|>", "0"):
            assert load_tokenizer(spec, eos).fingerprint == named.fingerprint
    with pytest.raises(UserError, match=r"Did you mean '<\|endoftext\|>'") as caught:
        load_tokenizer(tmp_path, "<|endoftxt|>")
    with pytest.raises(UserError, match="500 tokens"):
        load_tokenizer(tmp_path, "500")


def test_a_named_end_of_text_stays_with_the_tokenizer(hugging_face: Path, tmp_path: Path) -> None:
    """Also where it is exported: transformers then stops there."""
    from qatscale.model.hugging_face_tokenizer import export_tokenizer

    for name, spec in (("hf", hugging_face / HUGGING_FACE_FILE), ("sp", tmp_path / "x.model")):
        (tmp_path / "x.model").write_bytes(model(TEXTS, eos_id=-1))
        named = load_tokenizer(spec, "7")
        named.save(tmp_path / name)
        saved = load_tokenizer(tmp_path / name)
        assert (saved.eos_id, saved.fingerprint) == (7, named.fingerprint)
        assert load_tokenizer(tmp_path / name, "8").eos_id == 8
        (tmp_path / f"{name}-out").mkdir()
        assert export_tokenizer(tmp_path / name, tmp_path / f"{name}-out").eos == 7


@pytest.mark.parametrize(
    ("vocab_size", "texts", "key", "said"),
    [
        (5000, ["a b c d"] * 5, "vocab_size", r"at most 2\d\d"),
        (40, ["hello world"], "vocab_size", "must have a piece"),
        (300, [], "sources", "no text"),
        (300, ["\n\n"], "sources", "no text"),
    ],
)
def test_vocabularies_that_cannot_be_trained(vocab_size: int, texts: list[str], key: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        train_sentencepiece(texts, vocab_size)
    assert caught.value.key == key


@pytest.mark.parametrize("error", [UserError("source", "a.jsonl, line 2", "is not UTF-8."), KeyboardInterrupt()])
def test_training_tells_what_stopped_the_reading_of_its_texts(error: BaseException) -> None:
    """SentencePiece makes a RuntimeError of it that names our line of code and not the user's."""

    def texts() -> Iterator[str]:
        yield "some words"
        raise error

    with pytest.raises(type(error)) as caught:
        train_sentencepiece(texts(), 300)
    assert caught.value is error


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"nothing of the kind")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "x.model")
    with pytest.raises(UserError, match="no such file"):
        load_tokenizer(tmp_path / "y.model")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "empty")
    with pytest.raises(UserError, match="no end-of-sequence token"):
        SentencePieceTokenizer(model(TEXTS, eos_id=-1))
    (tmp_path / "x.model").write_text("IQ== 0\nIg== 1\nIw== 2\n")
    with pytest.raises(UserError, match="tiktoken"):
        load_tokenizer(tmp_path / "x.model")
    (tmp_path / "x.model").write_text("{}")
    with pytest.raises(UserError, match="is JSON"):
        load_tokenizer(tmp_path / "x.model")
