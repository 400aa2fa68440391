"""The model card: README.md of an export, from its export.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from qatscale.config import resolved_yaml
from qatscale.config.amounts import format_amount
from qatscale.config.schema import RunConfig
from qatscale.export.encoding import Plan
from qatscale.export.report import rows

_TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("."{options})
{prompt}
continued = model.generate(ids, max_new_tokens=20, do_sample=False)
print({shown})
"""
_LLAMA_CPP = """\
from llama_cpp import Llama

model = Llama("model.gguf", n_ctx=0, verbose=False)
print(model.create_completion("The", max_tokens=20, temperature=0)["choices"][0]["text"])
"""
_LLAMA_CPP_IDS = """\
from llama_cpp import Llama

model = Llama("model.gguf", n_ctx=0, logits_all=True, verbose=False)
model.eval([1, 2, 3])
print(model.scores[2].argmax())
"""
_MLX = """\
from mlx_lm import generate, load

model, tokenizer = load(".")
ids = tokenizer.encode("The", add_special_tokens=False)
print(generate(model, tokenizer, prompt=ids, max_tokens=20))
"""
_MLX_IDS = """\
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model

model, _ = load_model(Path("."))
print(model(mx.array([[1, 2, 3]]))[0, -1].argmax())
"""
_PROMPT = """\
tokenizer = AutoTokenizer.from_pretrained(".")
ids = tokenizer("The", add_special_tokens=False, return_tensors="pt").input_ids"""


def card(described: dict[str, Any], plan: Plan, has_tokenizer: bool) -> str:
    """described: the content of export.json."""
    parts = [
        _front(described),
        f"# {described['run']['name']}, {_width(described)}\n",
        _about(described),
        _load(described, has_tokenizer),
        _losses(described),
        _verification(described["verification"]),
        _size(described, plan),
        "## Recipe\n\n" + _code("yaml", _recipe(plan.source.config)),
    ]
    return "\n".join(part for part in parts if part)


def _recipe(config: RunConfig) -> str:
    """The resolved recipe without what says where things lay on the machine that trained it."""
    content = yaml.safe_load(resolved_yaml(config))
    del content["output"], content["data"]["path"], content["tracking"]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _front(described: dict[str, Any]) -> str:
    library = {"mlx": "mlx", "gguf": "gguf"}.get(described["exported_as"], "transformers")
    lines = (
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags: [qatscale, quantization-aware-training]",
    )
    return "\n".join(("---", *lines, "---\n"))


def _width(described: dict[str, Any]) -> str:
    if described["view"] == "fp":
        return "full precision"
    trained = "quantized after training" if described["view"].startswith("ptq") else "quantization-aware trained"
    bits = described["bits"]
    return f"{bits:g} {'bit' if bits == 1 else 'bits'}, {trained}"


def _about(described: dict[str, Any]) -> str:
    run, checkpoint, tokens = described["run"], described["checkpoint"], described["tokens"]
    lines = []
    if not checkpoint["finished"]:
        lines.append(
            f"> **Unfinished**: step {checkpoint['step']:,} of {checkpoint['steps']:,}. Its learning rate has not come "
            "down; its losses say little about the run's end.\n"
        )
    lines.append(f"A Llama model exported by qatscale {described['qatscale']} as `{described['exported_as']}`.\n")
    facts = [
        ("run", f"{run['name']}" + (f", id `{run['id']}`" if run["id"] else "")),
        ("MLflow run", run["mlflow_id"] and f"`{run['mlflow_id']}`"),
        ("git commit", run["git_commit"] and f"`{run['git_commit']}`"),
        ("scheme", described["scheme"]),
        ("step", f"{checkpoint['step']:,} of {checkpoint['steps']:,}"),
        ("tokens in full precision", format_amount(tokens["fp"])),
        ("tokens in QAT", format_amount(tokens["qat"])),
        ("data", checkpoint["data"] and f"`{checkpoint['data'][:16]}` (fingerprint of the tokens)"),
    ]
    if checkpoint["imported"]:
        facts.append(("weights", "imported, not trained by this run"))
    return "\n".join(lines) + "\n" + _table(("", ""), [fact for fact in facts if fact[1]])


def _load(described: dict[str, Any], has_tokenizer: bool) -> str:
    format = described["exported_as"]
    only_llama_cpp = any(tensor["stored_as"] == "Q1_0" for tensor in described["tensors"])
    install = {
        "hf": "pip install transformers",
        "compressed-tensors": "pip install transformers compressed-tensors",
        "gguf": "pip install transformers gguf accelerate",
        "mlx": "pip install mlx-lm        # on Linux without a GPU also: pip install 'mlx[cpu]'",
    }[format]
    parts = ["## Loading\n\nIn this folder:\n"]
    if not only_llama_cpp:
        parts.append(_code("sh", install))
    if only_llama_cpp:
        parts.append("The type Q1_0 is llama.cpp's, of 2026; transformers does not read it.\n")
    elif format == "mlx":
        parts.append(_code("python", _MLX if has_tokenizer else _MLX_IDS))
    else:
        options = ', gguf_file="model.gguf"' if format == "gguf" else ""
        snippet = _TRANSFORMERS.format(
            options=options,
            prompt=_PROMPT if has_tokenizer else "ids = torch.tensor([[1, 2, 3]])",
            shown="tokenizer.decode(continued[0])" if has_tokenizer else "continued[0].tolist()",
        )
        if not has_tokenizer:
            snippet = "import torch\n" + snippet.replace(
                "import AutoModelForCausalLM, AutoTokenizer", "import AutoModelForCausalLM"
            )
        parts.append(_code("python", snippet))
    if format == "gguf":
        parts.append("With llama.cpp (`pip install llama-cpp-python`, or its own programs):\n")
        parts.append(_code("python", _LLAMA_CPP if has_tokenizer else _LLAMA_CPP_IDS))
        parts.append(
            "llama.cpp multiplies with activations rounded to 8 bits: its logits are near those of training, not equal."
            " The files of the tokenizer beside `model.gguf` are for transformers.\n"
        )
    if format == "compressed-tensors":
        parts.append(
            "vLLM reads the same layout (`vllm serve .`, on a GPU; weights of 2 to 8 bits in its releases of 2026, 4 "
            "and 8 before). It was not run here.\n"
        )
    if has_tokenizer:
        parts.append("Documents were encoded without a token before them: prompt with `add_special_tokens=False`.\n")
    return "\n".join(parts)


def _losses(described: dict[str, Any]) -> str:
    found = described["run_losses"]
    if not found:
        return ""
    body = [(view, f"{loss:.4f}") for view, loss in found.items()]
    return "## Validation losses of the run\n\nAs training reported them at its end, in nats per token.\n\n" + _table(
        ("view", "loss"), body
    )


def _verification(found: dict[str, Any] | None) -> str:
    if found is None:
        return "## Verification\n\nNot run (`--no-verify`).\n"
    body = [
        ("trained, as it is exported", f"{found['trained_loss']:.6f}", "", ""),
        ("the same, as stored", f"{found['stored_loss']:.6f}", f"{found['weight_change']:.2g}", ""),
    ]
    for client in found["clients"]:
        weights = f"{client['exact']} of {client['tensors']} to the bit" if client["tensors"] else "not shown"
        if client["weight_error"]:
            weights += f", others within {client['weight_error']:.2g}"
        body.append((client["client"], f"{client['loss']:.6f}", weights, f"{client['logit_error']:.2g}"))
    text = (
        f"## Verification\n\nOn {found['tokens']:,} held-out tokens, in fp32 arithmetic. Weights: largest difference "
        "from training's (second row) and from what is stored (clients), relative to a tensor's largest. Logits: "
        "largest difference from ours on the stored weights, relative to the largest.\n\n"
    )
    text += _table(("", "loss", "weights", "logits"), body)
    if found["rounding"]:
        text += f"\nStoring the scales changed them by at most {found['rounding']:.2g} of their size.\n"
    for client, pip in found["not_installed"].items():
        text += f"\n{client} was not installed, and not asked: `{pip}`.\n"
    return text


def _size(described: dict[str, Any], plan: Plan) -> str:
    size = described["size"]
    body = [
        (", ".join(row.names), row.bits, row.stored_as, f"{row.weights:,}", f"{row.bytes:,}", f"{row.ideal_bytes:,.0f}")
        for row in rows(plan)
    ]
    body.append(
        ("all, in the file", "", "", f"{size['parameters']:,}", f"{size['bytes']:,}", f"{size['ideal_bytes']:,.0f}")
    )
    text = "## Size\n\nIdeal: weights · bits / 8, with the scales and what is not quantized in training's type.\n\n"
    text += _table(("weights of", "bits", "stored as", "weights", "bytes", "ideal"), body)
    if size["bits_per_quantized_weight"]:
        text += f"\n{size['bits_per_quantized_weight']:.3f} bits per quantized weight with scales"
        text += f", {size['bits_per_weight']:.3f} over the whole file.\n"
    fallbacks = {row.fallback: row for row in rows(plan) if row.fallback}
    for reason, row in fallbacks.items():
        cost = row.bytes - row.ideal_bytes
        text += f"\n{', '.join(row.names)} fell back to {row.stored_as}, {cost:,.0f} bytes beyond the ideal: {reason}\n"
    return text


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```\n"
