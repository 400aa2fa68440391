"""Models that transformers runs: exports that it loads, and checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qatscale.data.manifest import tokenizer_folder
from qatscale.engine.checkpoints.files import open_checkpoint
from qatscale.engine.checkpoints.training_state import load_checkpointed_model
from qatscale.engine.runtime import uses_gpu
from qatscale.errors import UserError
from qatscale.export.clients import Transformers
from qatscale.export.formats.base import Exported
from qatscale.inference.sampling import Detokenizer, Sampling
from qatscale.model.hugging_face import hugging_face_config, to_hugging_face
from qatscale.model.hugging_face_tokenizer import export_tokenizer
from qatscale.quant.views import computed_weights
from qatscale.train.validation import open_view


class TransformersModel:
    def __init__(self, model: Any, tokenizer: Any, about: str) -> None:
        self.model = model.to("cuda" if uses_gpu() else "cpu").eval()
        self.tokenizer = tokenizer
        self.about = about
        self.length: int | None = model.config.max_position_embeddings

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
            # for top_k transformers takes 0 as no token at all, None as no filter
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p,
                     "top_k": sampling.top_k or None}  # fmt: skip
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.tokens,
            pad_token_id=self.tokenizer.eos_token_id or 0,  # one sequence is never padded; unset, transformers warns
            streamer=Streamer(),
            **drawn,
        )


def from_export(export: Exported) -> TransformersModel:
    client = export.format.clients[0]
    assert issubclass(client, Transformers)
    about = f"{export.path}: {export.format.name}, with transformers"
    return TransformersModel(client.load(export.path, "auto"), client.load_tokenizer(export.path), about)


@torch.no_grad()
def from_checkpoint(what: str, view: str | None = None) -> TransformersModel:
    """The weights of a checkpoint, as `view` has them, in transformers' Llama."""
    import transformers

    config, reader = open_checkpoint(what)
    model, plugin = load_checkpointed_model(reader, config, torch.device("cpu"))
    if view is None:
        view = "fp" if plugin.switched_at is None else "quantized"
    with open_view(model, view):
        state = computed_weights(model)
    tokens = tokenizer_folder(config.data.path)
    if tokens is None:
        fix = "Export it with --tokenizer FOLDER, and generate from the export."
        raise UserError("model", what, "the data of its run hold no tokenizer.", fix)
    with tempfile.TemporaryDirectory() as folder:
        special = export_tokenizer(tokens, Path(folder))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    dtype = state["embed.weight"].dtype
    theirs = transformers.LlamaForCausalLM(
        hugging_face_config(config.model, config.data.sequence_length, special, dtype)
    )
    theirs.to(dtype).load_state_dict(to_hugging_face(state, config.model), strict=False)  # a tied head is stored once
    theirs.tie_weights()
    return TransformersModel(theirs, tokenizer, f"{reader.folder}: {view} view")
