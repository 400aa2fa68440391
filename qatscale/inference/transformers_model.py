"""Models that transformers runs: exports as `hf`, `compressed-tensors` and `gguf`, and checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qatscale.engine.runtime import uses_gpu
from qatscale.errors import UserError
from qatscale.inference.exported import Exported, find_export
from qatscale.inference.sampling import Detokenizer, Sampling

EXTRA = {"compressed-tensors": ("compressed_tensors",), "gguf": ("gguf", "accelerate")}
"""What transformers needs besides itself for a format."""


class TransformersModel:
    def __init__(self, model: Any, tokenizer: Any, about: str) -> None:
        self.model = model.to("cuda" if uses_gpu() else "cpu").eval()
        self.tokenizer = tokenizer
        self.about = about
        self.length: int | None = model.config.max_position_embeddings

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)  # training put nothing before a text

    @torch.no_grad()
    def stream(self, prompt: list[int], sampling: Sampling, write: Callable[[str], Any]) -> None:
        from transformers.generation.streamers import BaseStreamer

        pieces = Detokenizer(lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True), prompt)

        class Streamer(BaseStreamer):
            prompt_seen = False

            def put(self, value: torch.Tensor) -> None:
                if self.prompt_seen:  # transformers gives the prompt first
                    for token in value.flatten().tolist():
                        write(pieces.add(token))
                self.prompt_seen = True

            def end(self) -> None:
                write(pieces.rest())

        torch.manual_seed(sampling.seed)
        ids = torch.tensor([prompt], device=self.model.device)
        drawn: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        if sampling.temperature > 0:
            # transformers takes 0 for no token at all, and leaves out the filter for None
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p,
                     "top_k": sampling.top_k or None}  # fmt: skip
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.tokens,
            pad_token_id=self.tokenizer.eos_token_id or 0,  # of one sequence nothing is padded; unset, it warns
            streamer=Streamer(),
            **drawn,
        )


def open_transformers(what: str, view: str | None = None) -> TransformersModel:
    """The model of an exported folder that transformers loads, or of a run, RUN@STEP or a checkpoint folder, on the GPU
    where there is one.

    view: of a checkpoint's weights, `fp` or `quantized`; None: quantized once it has switched.
    """
    export = find_export(Path(what))
    if export is None:
        return from_checkpoint(what, view)
    if view is not None:
        raise UserError("--view", view, f"{what} is an export, which has one view of its weights.", "Leave it out.")
    if export.format == "mlx":
        raise UserError("model", what, "is for mlx-lm, which transformers cannot load.", "Give another export.")
    return from_export(export)


def from_export(export: Exported) -> TransformersModel:
    """UserError for a damaged folder, and for a client package that is missing."""
    _check_packages(export)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where: dict[str, Any] = {"gguf_file": export.gguf} if export.gguf else {}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(export.folder, dtype="auto", **where)
        tokenizer = transformers.AutoTokenizer.from_pretrained(export.folder, **where)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        told = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError("model", str(export.folder), f"transformers cannot load it: {told}") from None
    with torch.no_grad():  # packed codes are unpacked at the first call: now, not amid a text
        model(torch.zeros((1, 1), dtype=torch.long))
    return TransformersModel(model, tokenizer, f"{export.folder}: {export.format}, with transformers")


def _check_packages(export: Exported) -> None:
    import importlib.util

    missing = [name for name in EXTRA.get(export.format, ()) if importlib.util.find_spec(name) is None]
    if missing:
        told = f"transformers needs {' and '.join(missing)} for {export.format}, which is not installed."
        raise UserError("model", str(export.folder), told, "pip install 'qatscale[clients]'")


@torch.no_grad()
def from_checkpoint(what: str, view: str | None = None) -> TransformersModel:
    """The weights of a checkpoint, as `view` has them, in transformers' Llama."""
    import transformers

    from qatscale.config import load_run_config
    from qatscale.data.manifest import tokenizer_folder
    from qatscale.engine.checkpoints.files import find_checkpoint, recipe_beside
    from qatscale.model.hugging_face import hugging_face_config, to_hugging_face
    from qatscale.model.hugging_face_tokenizer import export_tokenizer
    from qatscale.quant.views import computed_weights
    from qatscale.train.evaluate import load_checkpointed_model, open_view

    checkpoint = find_checkpoint(what)
    config = load_run_config(recipe_beside(checkpoint, what))
    model, plugin = load_checkpointed_model(checkpoint, config, torch.device("cpu"))
    if view is None:
        view = "fp" if plugin.switched_at is None else "quantized"
    with open_view(model, view):
        state = computed_weights(model)
    tokens = tokenizer_folder(config.data.path)
    if tokens is None:
        do = "Export it and lay a tokenizer into the folder, or name the data in the run's recipe."
        raise UserError("model", what, "there is no tokenizer with the data of its run.", do)
    with tempfile.TemporaryDirectory() as folder:
        special = export_tokenizer(tokens, Path(folder))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    dtype = state["embed.weight"].dtype
    theirs = transformers.LlamaForCausalLM(
        hugging_face_config(config.model, config.data.sequence_length, special, dtype)
    )
    theirs.to(dtype).load_state_dict(to_hugging_face(state, config.model), strict=False)  # a tied head is there once
    theirs.tie_weights()
    return TransformersModel(theirs, tokenizer, f"{checkpoint}: {view} view")
