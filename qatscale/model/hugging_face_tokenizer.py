"""The tokenizer of an exported model, in the format that transformers loads."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from qatscale.data.segments import SPACE, model_proto
from qatscale.data.tokenizer import CARD, HUGGING_FACE_FILE, SENTENCEPIECE_FILE, read_card
from qatscale.errors import UserError, first_line

_FURTHER_FILES = (
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "chat_template.jinja", SENTENCEPIECE_FILE,
)  # fmt: skip
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    " one space before, two  between, three   again, one behind ",
    "    def f(x):\n\treturn x ** 2  # tabs\tand\n\n\n  blank lines\r\n",
    "digits 0 12 345 6789 3.14159e-26 1,000,000 0x7fFf 2026-11-22T05:13:48Z",
    "----- ====== ........ ______ ******** \\\\\\ //// aaaaaaaaaaaaa hahahahahaha\n" + " " * 37 + "deep",
    "accents é à ñ ü ß, combined e\u0301 a\u0308, ligature ﬁ, full width ＡＢＣ, ½ ² ™ …",
    "Ελληνικά русский עברית العربية हिन्दी 中文字符 日本語 한국어 ไทย",
    "emoji 🙂👩‍👩‍👧‍👦🏳️‍🌈🇪🇺 and 𝔘𝔫𝔦𝔠𝔬𝔡𝔢, zero\u200bwidth, no\u00a0break, soft\u00adhyphen, \ufeffmark, \u3000wide",
    "<s>literal</s> <unk> <0x41> <pad> [INST] <|endoftext|> ▁ ▁▁ low_line",
    "\x00\x01\x7f control",
    "",
    " ",
)
"""Texts for which an exported tokenizer must give the same ids as SentencePiece."""


class SpecialIds(NamedTuple):
    """Ids of the pieces for the beginning and the end of a sequence; None where a tokenizer has none."""

    bos: int | None
    eos: int | None


def export_tokenizer(tokenizer_folder: Path, out: Path) -> SpecialIds:
    """Write the tokenizer of `tokenizer_folder` into the existing folder `out`, for transformers' AutoTokenizer.

    A Hugging Face tokenizer (`tokenizer.json`) is copied. A SentencePiece model (`tokenizer.model`) is converted, and
    copied too. The converted tokenizer gives the same ids as plain `encode`: it adds nothing before or after a text,
    and "</s>" within a text is text. Raises UserError where the folder holds neither, or no exact conversion exists.
    """
    tokenizer_folder = Path(tokenizer_folder)
    if (tokenizer_folder / HUGGING_FACE_FILE).is_file():
        return _copy_hugging_face(tokenizer_folder, out)
    if (tokenizer_folder / SENTENCEPIECE_FILE).is_file():
        return _convert_sentencepiece(tokenizer_folder / SENTENCEPIECE_FILE, out)
    problem = f"holds neither {HUGGING_FACE_FILE} nor {SENTENCEPIECE_FILE}."
    raise UserError("tokenizer", str(tokenizer_folder), problem, "Give the folder that `qatscale prepare` wrote.")


def _copy_hugging_face(folder: Path, out: Path) -> SpecialIds:
    for name in (HUGGING_FACE_FILE, *_FURTHER_FILES):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    if not (out / "tokenizer_config.json").is_file():
        (out / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    loaded = load_fast_tokenizer(out, folder)
    if loaded.encode("a") != loaded.encode("a", add_special_tokens=False):
        problem = "The exported tokenizer adds special tokens around a text, and prepared documents begin with none."
        warnings.warn(f"{problem} Encode with add_special_tokens=False.", stacklevel=2)
    return SpecialIds(loaded.bos_token_id, loaded.eos_token_id)


def load_fast_tokenizer(folder: Path, origin: Path) -> Any:
    """`transformers.PreTrainedTokenizerFast`. UserError, about the folder `origin` of its files, for damaged ones."""
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # transformers and tokenizers raise errors of every kind
        raise UserError("tokenizer", str(origin), f"cannot be read: {first_line(error)}") from None


def _convert_sentencepiece(path: Path, out: Path) -> SpecialIds:
    import sentencepiece
    from transformers import PreTrainedTokenizerFast

    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError as error:
        raise UserError("tokenizer", str(path), f"is not a SentencePiece model ({error}).") from None

    def piece(index: int) -> str | None:
        return processor.id_to_piece(index) if index >= 0 else None

    eos = read_card(path.parent)["eos_id"] if (path.parent / CARD).is_file() else processor.eos_id()
    if eos >= processor.get_piece_size():
        raise UserError(
            "tokenizer", str(path.parent / CARD), f"is damaged: eos_id {eos} is not an id of the tokenizer."
        )

    PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(path.read_bytes()), bos_token=piece(processor.bos_id()), eos_token=piece(eos),
        unk_token=piece(processor.unk_id()), pad_token=piece(processor.pad_id()), split_special_tokens=True,
        clean_up_tokenization_spaces=False, padding_side="left",
    ).save_pretrained(out)  # fmt: skip
    # the name that releases of transformers before 5 know as well
    config = json.loads((out / "tokenizer_config.json").read_bytes())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    shutil.copyfile(path, out / SENTENCEPIECE_FILE)

    exported = PreTrainedTokenizerFast.from_pretrained(out)
    proto = model_proto(path.read_bytes())
    unusual = [p.piece for p in proto.pieces if p.type in (p.CONTROL, p.USER_DEFINED, p.UNUSED)]
    for text in (*PROBES, *(f"a{name} b" for name in unusual)):
        if exported.encode(text) != processor.encode(text):
            problem = f"cannot be converted for transformers: the text {text!r} would get other ids."
            raise UserError("tokenizer", str(path), problem, "Export without a tokenizer and ship the .model file.")
    return SpecialIds(*(index if index >= 0 else None for index in (processor.bos_id(), eos)))


def fast_tokenizer(model: bytes) -> Any:
    """The `tokenizers.Tokenizer` that encodes as a SentencePiece model does. model: the bytes of its file.

    transformers' own conversion of Llama tokenizers is not used: it drops the normalisation rule, and adds no space
    before a text that starts with one. Raises UserError for models that are not BPE.
    """
    proto = model_proto(model)
    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    if trainer.model_type != trainer.BPE:
        kind = trainer.ModelType.Name(trainer.model_type).lower()
        fix = "Export without a tokenizer and ship the .model file."
        raise UserError("tokenizer", kind, "only BPE models of SentencePiece convert with the same ids.", fix)
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    bpe = models.BPE(
        vocab, _merges(proto), unk_token=trainer.unk_piece, fuse_unk=True, byte_fallback=trainer.byte_fallback
    )
    tokenizer = Tokenizer(bpe)

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        problem = f"transformers applies the normalisation {spec.name!r} to clusters of combining characters."
        warnings.warn(f"{problem} Rare sequences of these get other ids than in training.", stacklevel=2)
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(f"^[ {SPACE}]+|[ {SPACE}]+$"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    undo: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        undo.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(undo)
    tokenizer.add_special_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type == p.CONTROL])
    return tokenizer


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, best first.

    SentencePiece has no list of merges. Of the neighbours that together are a piece, it joins those whose piece scores
    highest, the leftmost of equals. Equals are overlapping ways to split one piece, as "-" "--" "-" in a run. Merging
    from the left puts the longer part on the left, so that split comes first here.
    """
    normal = {piece.piece: piece.score for piece in proto.pieces if piece.type == piece.NORMAL}
    ranked = [
        (-score, -cut, whole[:cut], whole[cut:])
        for whole, score in normal.items()
        for cut in range(1, len(whole))
        if whole[:cut] in normal and whole[cut:] in normal
    ]
    return [(left, right) for _, _, left, right in sorted(ranked)]
