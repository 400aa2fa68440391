"""`gguf`: one file with model and tokenizer, for llama.cpp and transformers.

Names and metadata are those of llama.cpp's architectures `llama`, `qwen2` and `qwen3`. The first rotates neighbouring
pairs of channels, where Hugging Face and this project rotate channel i with i + d/2. So the rows of q and k, and their
scales, are permuted within each head. Llama 3.1's rotary scaling is a tensor of divisors. transformers reads neither
that nor explicit head sizes of Qwen. Norms and biases are fp32. Other unquantized tensors have training's type.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFValueType, GGUFWriter, TensorNameMap, get_tensor_name_map
from torch import Tensor

from qatscale.config.schema import ModelConfig
from qatscale.errors import UserError
from qatscale.export.clients import Client, Transformers, Weights, install_line
from qatscale.export.encoding import Encoding, ExportLayout, PlainEncoding, StoredParameter
from qatscale.export.folder import hf_name
from qatscale.export.formats import gguf_blocks as blocks
from qatscale.export.formats.base import Format, Usage, transformers_usage
from qatscale.export.formats.gguf_blocks import BlockType, block_types, to_blocks
from qatscale.export.formats.gguf_vocabulary import vocabulary
from qatscale.export.source import ExportSource, SourceParameter
from qatscale.model.hugging_face import model_type
from qatscale.model.hugging_face_tokenizer import export_tokenizer
from qatscale.model.llama import scaled_frequencies

_PLAIN_TYPES = {torch.float32: GGMLQuantizationType.F32, torch.bfloat16: GGMLQuantizationType.BF16}

_LLAMA_CPP = """\
from llama_cpp import Llama

model = Llama("{file}", n_ctx=0, verbose=False)
print(model.create_completion("The", max_tokens=20, temperature=0)["choices"][0]["text"])
"""
_LLAMA_CPP_IDS = """\
from llama_cpp import Llama

model = Llama("{file}", n_ctx=0, logits_all=True, verbose=False)
model.eval([1, 2, 3])
print(model.scores[2].argmax())
"""
_LLAMA_CPP_NOTE = (
    "llama.cpp multiplies with activations rounded to 8 bits: its logits are near those of training, not equal. The "
    "files of the tokenizer beside it are for transformers."
)


class GgufInTransformers(Transformers):
    packages = Transformers.packages | {"gguf": "gguf", "accelerate": "accelerate"}
    dtype = torch.float32

    @classmethod
    def location(cls, path: Path) -> dict[str, Any]:
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}


class LlamaCpp(Client):
    """llama.cpp. It multiplies with activations rounded to 8 bits, so its logits are close to ours, not equal."""

    name = "llama.cpp"
    packages = {"llama-cpp-python": "llama_cpp"}  # noqa: RUF012
    logit_bound, loss_bound = 0.05, 0.01

    def __init__(self, path: Path) -> None:
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self._model = Llama(
            str(path), n_ctx=0, logits_all=True, verbose=False, n_threads=threads, n_threads_batch=threads
        )

    def weights(self) -> Weights:
        yield from ()

    def logits(self, tokens: Tensor) -> Tensor:
        self._model.reset()
        self._model.eval(tokens.tolist())
        return torch.from_numpy(self._model.scores[: len(tokens)].copy())


@dataclass(frozen=True)
class BlockEncoding(Encoding):
    type: BlockType

    @property
    def name(self) -> str:
        return self.type.name

    def refusal(self, parameter: SourceParameter) -> str | None:
        for what, columns in (("rows", parameter.shape[1]), ("groups of scales", parameter.group_size)):
            if columns % self.type.weights:
                return f"{self.name} has blocks of {self.type.weights} weights, and {what} are {columns} wide."
        return None

    def size(self, parameter: SourceParameter) -> int:
        return -(-parameter.numel // self.type.weights) * self.type.bytes

    def stored_scale(self, scale: Tensor) -> Tensor:
        return scale.half().float()


@dataclass(frozen=True)
class Gguf(Format):
    transformers_reads: bool = True
    q1_0: bool = False
    """Store matrices of 1 bit as Q1_0, half the size of TQ2_0, which llama.cpp reads and transformers does not."""

    name = library = "gguf"
    suffix = ".gguf"

    @property
    def clients(self) -> Sequence[type[Client]]:
        return (LlamaCpp,) if self.q1_0 or not self.transformers_reads else (GgufInTransformers, LlamaCpp)

    def with_q1_0(self) -> Gguf:
        return replace(self, q1_0=True)

    def fitting(self, model: ModelConfig) -> Gguf:
        assumed = {"llama": model.channels, "qwen2": model.hidden_size // model.heads, "qwen3": 128}
        reads = not model.rope_scaling and model.channels == assumed[model_type(model)]
        return replace(self, transformers_reads=reads)

    def encodings(self, parameter: SourceParameter, dtype: torch.dtype) -> list[Encoding]:
        plain = PlainEncoding(dtype)
        if parameter.quantizer is None:
            return [PlainEncoding(torch.float32) if parameter.is_vector else plain]
        types = block_types(parameter.quantizer)
        if self.q1_0 and parameter.quantizer.bits == 1:
            types = [blocks.Q1_0, *types]
        return [*map(BlockEncoding, types), plain]

    def layout(self, source: ExportSource, fallback: bool) -> ExportLayout:
        layout = super().layout(source, fallback)
        if self.q1_0 and not any(entry.encoding == BlockEncoding(blocks.Q1_0) for entry in layout.entries):
            raise UserError("--q1-0", None, "has no effect: no matrix of 1 bit fits it.", "Leave it out.")
        return layout

    def write(self, layout: ExportLayout, folder: Path, tokenizer: Path | None) -> None:
        model = layout.source.config.model
        if tokenizer:
            export_tokenizer(tokenizer, folder)
        metadata = _metadata(layout) | vocabulary(folder if tokenizer else None, model.vocab_size)
        arch = model_type(model)
        names = get_tensor_name_map(MODEL_ARCH[arch.upper()], model.layers)
        tensors = [_tensor(layout, entry, names) for entry in layout.entries]
        if model.rope_scaling:
            tensors.append(_divisors(model))
        write_gguf(folder / _file_name(layout), arch, metadata, tensors)

    def path(self, folder: Path) -> Path:
        (file,) = folder.glob("*.gguf")
        return file

    def find(self, path: Path) -> Path | None:
        if path.suffix == self.suffix and path.is_file():
            return path
        files = sorted(path.glob("*.gguf")) if path.is_dir() else []
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise UserError("model", str(path), f"holds {len(files)} GGUF files: {names}.", "Name one of them.")
        return files[0] if files else None

    def usages(self, has_tokenizer: bool, file: str) -> list[Usage]:
        if self.q1_0:
            first = Usage(intro="The type Q1_0 is llama.cpp's, of 2026; transformers does not read it.")
        elif not self.transformers_reads:
            first = Usage(intro="transformers does not read this model from GGUF: it ignores its positions or heads.")
        else:
            first = transformers_usage(GgufInTransformers, has_tokenizer, f', gguf_file="{file}"')
        intro = f"With llama.cpp (`{install_line(LlamaCpp.packages)}`, or its own programs):"
        code = (_LLAMA_CPP if has_tokenizer else _LLAMA_CPP_IDS).format(file=file)
        return [first, Usage(intro=intro, code=code, note=_LLAMA_CPP_NOTE)]


def _file_name(layout: ExportLayout) -> str:
    """RUN-TYPE.gguf, with the type of most weights, by which the Hub and llama.cpp's programs tell files apart."""
    weights: Counter[str] = Counter()
    for entry in layout.entries:
        if entry.parameter.quantizer:
            weights[entry.encoding.name] += entry.parameter.numel
    kind = weights.most_common(1)[0][0]
    return f"{layout.source.config.name}-{'BF16' if kind == 'bfloat16' else 'F32' if kind == 'float32' else kind}.gguf"


def _divisors(model: ModelConfig) -> TensorInfo:
    """What llama.cpp divides the rotary frequencies by."""
    assert model.rope_scaling is not None
    frequency = 1.0 / model.rope_theta ** (torch.arange(0, model.channels, 2, dtype=torch.float32) / model.channels)
    divisors = frequency / scaled_frequencies(frequency, *model.rope_scaling)
    kind = GGMLQuantizationType.F32
    return TensorInfo("rope_freqs.weight", tuple(divisors.shape), kind, 4 * len(divisors), lambda: divisors.numpy())


def _metadata(layout: ExportLayout) -> dict[str, Any]:
    config, model = layout.source.config, layout.source.config.model
    of_architecture = {
        "vocab_size": model.vocab_size,
        "context_length": config.data.sequence_length,
        "embedding_length": model.hidden_size,
        "block_count": model.layers,
        "feed_forward_length": model.intermediate_size,
        "attention.head_count": model.heads,
        "attention.head_count_kv": model.kv_heads or model.heads,
        "attention.layer_norm_rms_epsilon": float(model.norm_eps),
        "attention.key_length": model.channels,
        "attention.value_length": model.channels,
        "rope.dimension_count": model.channels,
        "rope.freq_base": float(model.rope_theta),
    }
    named = {f"{model_type(model)}.{key}": value for key, value in of_architecture.items()}
    return {"general.name": config.name, "general.quantization_version": 2, **named}


def _tensor(layout: ExportLayout, entry: StoredParameter, names: TensorNameMap) -> TensorInfo:
    parameter, encoding = entry.parameter, entry.encoding
    rows = permutation(parameter, layout.source.config.model)

    def coded() -> np.ndarray:
        assert isinstance(encoding, BlockEncoding)
        matrix = layout.matrix(entry)
        matrix = matrix if rows is None else matrix.permuted(rows)
        return to_blocks(encoding.type, matrix.integers.numpy(), matrix.scale.half().numpy())

    def values() -> np.ndarray:
        value = layout.stored(entry)
        value = value if rows is None else value[rows]
        return value.contiguous().view(torch.uint8).numpy()

    if isinstance(encoding, BlockEncoding):
        kind, make = encoding.type.ggml_type, coded
    else:
        assert isinstance(encoding, PlainEncoding)
        kind, make = _PLAIN_TYPES[encoding.dtype], values
    name = names.get_name(hf_name(layout, entry), try_suffixes=(".weight", ".bias"))
    assert name is not None
    return TensorInfo(name, parameter.shape, kind, entry.size, make)


def permutation(parameter: SourceParameter, config: ModelConfig) -> Tensor | None:
    """For the rows of q and k: the index in our order of each row in llama.cpp's; None for everything else.

    Within a head of d channels: 0, d/2, 1, d/2 + 1, ..., so that channels that rotate together are neighbours.
    """
    if model_type(config) != "llama" or not parameter.name.endswith(("attention.q.weight", "attention.k.weight")):
        return None
    rows = torch.arange(parameter.shape[0])
    return rows.view(-1, 2, config.channels // 2).transpose(1, 2).flatten()


class TensorInfo(NamedTuple):
    """A tensor of the file. `shape` is PyTorch's; the file has the reverse."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    size: int
    """Bytes."""
    make: Callable[[], np.ndarray]


def write_gguf(path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> None:
    """Metadata: text, bool, int (unsigned), float, or lists of one of them (integers in lists are signed).

    Raises OSError, e.g. for a full disk; the file is then incomplete.
    """
    writer = GGUFWriter(path, architecture)
    try:
        for key, value in metadata.items():
            kind = GGUFValueType.UINT32 if type(value) is int else GGUFValueType.get_type(value)
            writer.add_key_value(key, value, kind)
        for tensor in tensors:
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.size, tensor.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        (file,) = writer.fout
        writer.write_padding(file, file.tell())
        for tensor in tensors:
            content = np.ascontiguousarray(tensor.make()).view(np.uint8).reshape(-1)
            assert content.size == tensor.size, f"{tensor.name}: {content.size} bytes, not {tensor.size}"
            file.write(content.data)  # write_tensor_data uses ndarray.tofile, whose OSError does not say why
            writer.write_padding(file, tensor.size)
    finally:
        writer.close()


FORMAT = Gguf()
