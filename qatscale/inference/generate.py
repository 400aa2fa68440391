"""Models that generate text: exports, runs and checkpoints, with transformers or mlx-lm."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from qatscale.data.tokenizer import tokenizer_folder
from qatscale.engine.checkpoints.reader import open_checkpoint
from qatscale.engine.checkpoints.training_state import load_checkpointed_model
from qatscale.engine.runtime import uses_gpu
from qatscale.errors import UserError, first_line
from qatscale.export.clients import Client, Transformers, install_line
from qatscale.export.formats.base import Exported, find_export
from qatscale.export.formats.mlx import MlxLm
from qatscale.export.report import check_files
from qatscale.inference.sampling import Detokenizer, Sampling, TextGenerator
from qatscale.model.hugging_face import hugging_face_config, to_hugging_face
from qatscale.model.hugging_face_tokenizer import export_tokenizer
from qatscale.quant.views import computed_weights
from qatscale.tensor_files import not_finite
from qatscale.train.validation import open_view
from qatscale.untrusted import check_json_files, check_safetensors


class TransformersModel:
    def __init__(self, model: Any, tokenizer: Any, about: str) -> None:
        self.model = model.to("cuda" if uses_gpu() else "cpu").eval()
        self.tokenizer = tokenizer
        self.about = about
        if wrong := not_finite((name, p) for name, p in model.named_parameters() if p.dtype.itemsize > 1):
            raise FloatingPointError(f"{wrong} is not finite.")
        self.length: int | None = model.config.max_position_embeddings
        model.generation_config = _only_ends(model)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)  # as in training

    @torch.no_grad()
    def stream(self, prompt: list[int], sampling: Sampling, write: Callable[[str], Any]) -> None:
        from transformers.generation.streamers import BaseStreamer

        pieces = Detokenizer(lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True), prompt)

        class Streamer(BaseStreamer):
            prompt_seen = False

            def put(self, value: torch.Tensor) -> None:
                if self.prompt_seen:  # transformers passes the prompt first
                    for token in value.flatten().tolist():
                        write(pieces.add(token))
                self.prompt_seen = True

            def end(self) -> None:
                write(pieces.rest())

        torch.manual_seed(sampling.seed)
        ids = torch.tensor([prompt], device=self.model.device)
        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        if sampling.temperature > 0:
            # transformers needs top_k=None for no filter
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p,
                     "top_k": sampling.top_k or None}  # fmt: skip
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.tokens,
            pad_token_id=self.tokenizer.eos_token_id or 0,  # unused, since one sequence needs no padding
            streamer=Streamer(),
            **drawn,
        )


def _only_ends(model: Any) -> Any:
    """transformers' settings without those of the folder, which may ask for beams, penalties or other models.

    The ids that end a text stay: a chat model has several.
    """
    from transformers import GenerationConfig

    said = model.generation_config.eos_token_id
    ends = [i for i in (said if isinstance(said, list) else [said]) if isinstance(i, int)]
    return GenerationConfig(eos_token_id=[i for i in ends if 0 <= i < model.config.vocab_size] or None)


class MlxModel:
    def __init__(self, export: Exported) -> None:
        from mlx_lm.tokenizer_utils import TokenizerWrapper
        from mlx_lm.utils import load_model

        self._model, config = load_model(export.path)
        self._tokenizer = TokenizerWrapper(Transformers.load_tokenizer(export.path))
        self.about = f"{export.path}: {export.format.name}, with mlx-lm"
        self.length: int | None = config.get("max_position_embeddings")

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def stream(self, prompt: list[int], sampling: Sampling, write: Callable[[str], Any]) -> None:
        import mlx.core as mx
        from mlx_lm import stream_generate
        from mlx_lm.sample_utils import make_sampler

        mx.random.seed(sampling.seed)
        sampler = make_sampler(temp=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
        pieces = Detokenizer(lambda ids: self._tokenizer.decode(ids, skip_special_tokens=True), prompt)
        for step in stream_generate(self._model, self._tokenizer, prompt, max_tokens=sampling.tokens, sampler=sampler):
            if step.token in self._tokenizer.eos_token_ids:
                break
            write(pieces.add(step.token))
        write(pieces.rest())


def open_text_generator(what: str, view: str | None = None, data: Path | None = None) -> TextGenerator:
    """The model of an export, a run, RUN@STEP or a checkpoint folder, on the GPU if one exists.

    view: that of a checkpoint's weights, `fp` or `quantized`; None = quantized after the switch. data: prepared data
    with a checkpoint's tokenizer; None = those of its run. UserError where nothing is found, the export is damaged, or
    its client is not installed or refuses it.
    """
    return _open(what, view, data, {Transformers: from_export, MlxLm: MlxModel})


def open_transformers(what: str) -> TransformersModel:
    """As `open_text_generator`, for models that transformers can load."""
    return _open(what, None, None, {Transformers: from_export})


def _open(what: str, view: str | None, data: Path | None, openers: Mapping[type[Client], Callable[..., Any]]) -> Any:
    export = find_export(Path(what))
    if export is None:
        check_files(Path(what))  # of an export that has lost its file of weights
        return from_checkpoint(what, view, data)
    if data is not None:
        raise UserError("--data", str(data), f"{what} is an export, which holds its tokenizer.", "Leave it out.")
    if view is not None:
        raise UserError("--view", view, f"{what} is an export, which has one view of its weights.", "Leave it out.")
    client = export.format.clients[0]
    opener = next((opener for kind, opener in openers.items() if issubclass(client, kind)), None)
    if opener is None:
        names = " or ".join(kind.name for kind in openers)
        raise UserError("model", what, f"is for {client.name}, and {names} cannot load it.", "Give another export.")
    if missing := client.missing():
        problem = f"{client.name} needs {' and '.join(missing)}, not installed here, to load it."
        raise UserError("model", what, problem, install_line(missing))
    check_files(export.folder)
    if export.path.is_dir():
        check_json_files(export.path, "model")
        check_safetensors(export.path, "model")
    try:
        return opener(export)
    except Exception as error:  # libraries raise errors of every kind for a folder that they cannot load
        problem = "it holds no tokenizer." if "backend tokenizer" in str(error) else first_line(error)
        raise UserError("model", what, f"{client.name} cannot load it: {problem}") from None


def from_export(export: Exported) -> TransformersModel:
    client = export.format.clients[0]
    assert issubclass(client, Transformers)
    about = f"{export.path}: {export.format.name}, with transformers"
    return TransformersModel(client.load(export.path, "auto"), client.load_tokenizer(export.path), about)


@torch.no_grad()
def from_checkpoint(what: str, view: str | None = None, data: Path | None = None) -> TransformersModel:
    """The weights of a checkpoint in the given view, in transformers' model."""
    import transformers

    config, reader = open_checkpoint(what, [f"data.path={data}"] if data else [])
    model, plugin = load_checkpointed_model(reader, config, torch.device("cpu"))
    if view is None:
        view = "fp" if plugin.switched_at is None else "quantized"
    with open_view(model, view):
        state = computed_weights(model)
    fix = "Export it with --tokenizer FOLDER, and generate from the export."
    prepared = config.data.folder
    if prepared is not None and not prepared.is_dir():
        problem = f"the data, which hold its tokenizer, are not in {prepared}."
        raise UserError("--data" if data else "model", what, problem, f"Name their folder, --data FOLDER. {fix}")
    tokens = tokenizer_folder(prepared, reader.manifest.tokenizer)
    if tokens is None:
        raise UserError("model", what, "the data of its run have no tokenizer.", fix)
    with tempfile.TemporaryDirectory() as folder:
        special = export_tokenizer(tokens, Path(folder))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    dtype = state["embed.weight"].dtype
    described = hugging_face_config(config.model, config.data.sequence_length, special, dtype)
    theirs = transformers.AutoModelForCausalLM.from_config(described, trust_remote_code=False)
    theirs.to(dtype).load_state_dict(to_hugging_face(state, config.model), strict=False)  # a tied head is stored once
    theirs.tie_weights()
    return TransformersModel(theirs, tokenizer, f"{reader.folder}: {view} view")
