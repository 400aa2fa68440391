"""Documents in one row against a forward pass of each, on the CPU's path and on that of the variable-length kernel."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from qatscale.config.schema import ModelConfig
from qatscale.engine.compilation import Compilation
from qatscale.model import documents
from qatscale.model.documents import attend, find_documents
from qatscale.model.llama import Llama

END = 5
Build = Callable[..., Llama]


def rows(config: ModelConfig) -> Tensor:
    """[2, 24]; the first begins within a document and has one of a single token, the second begins with the mark."""
    tokens = torch.randint(config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    tokens[tokens == END] = END + 1
    tokens[0, [7, 15, 16]] = END
    tokens[1, [0, 10]] = END
    return tokens


def pieces(tokens: Tensor) -> list[list[Tensor]]:
    """The documents of each row."""
    return [list(torch.tensor_split(row, (row == END).nonzero().flatten().tolist())) for row in tokens]


def test_logits_and_loss_are_those_of_each_document_alone(config: ModelConfig, build: Build) -> None:
    model = build(config)
    tokens = rows(config)
    labels = torch.randint(config.vocab_size, tokens.shape, generator=torch.Generator().manual_seed(2))
    expected = torch.stack([torch.cat([model(one[None])[0] for one in row if len(one)]) for row in pieces(tokens)])
    assert (model(tokens) - expected).abs().max() > 1e-2, "without the mask they are not"
    model.document_end = END
    torch.testing.assert_close(model(tokens), expected, rtol=1e-5, atol=1e-5)
    alone = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(model(tokens, labels), alone, rtol=1e-5, atol=1e-6)


def test_a_row_without_the_mark_is_one_document(config: ModelConfig, build: Build) -> None:
    model, masked = build(config), build(config)
    masked.document_end = config.vocab_size  # no token
    tokens = rows(config)
    torch.testing.assert_close(masked(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def by_document(
    q: Tensor, k: Tensor, v: Tensor, begins: Tensor, begins_k: Tensor, longest: int, longest_k: int, **options: object
) -> Tensor:
    """What `varlen_attn` is documented to compute, for q, k, v: [tokens, heads, channels]."""
    assert options == {"window_size": (-1, 0), "enable_gqa": q.shape[1] > k.shape[1]}
    assert begins.dtype == torch.int32
    assert longest >= int(begins.diff().max())
    bounds = begins.tolist()
    assert bounds == begins_k.tolist()
    assert longest == longest_k
    assert (bounds[0], bounds[-1]) == (0, len(q))
    parts = []
    for first, end in pairwise(bounds):
        one = (x[first:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(
            *one, is_causal=True, enable_gqa=q.shape[1] > k.shape[1]
        )
        parts.append(mixed[0].transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_kernel_gets_the_same_documents(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place is taken by its definition, since it needs a GPU."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_document)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 2 if grouped and i else 4, 24, 8, generator=generator) for i in range(3))
    tokens = rows(ModelConfig(vocab_size=96, hidden_size=32, layers=2, heads=4, intermediate_size=88))
    masked, kernel = (find_documents(tokens, END, kernel) for kernel in (False, True))
    assert torch.equal(masked.positions, kernel.positions)
    torch.testing.assert_close(attend(q, k, v, grouped, kernel), attend(q, k, v, grouped, masked))


def test_the_kernel_takes_our_arguments_forward_and_backward() -> None:
    """On tensors without data: shapes, types and arguments, by torch's own definition of the operation."""
    bounds = torch.empty(6, dtype=torch.int32, device="meta")
    q, k, v = (
        torch.empty(2, heads, 24, 16, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (4, 2, 2)
    )
    assert documents.has_kernel(q, 16)
    mixed = attend(q, k, v, True, documents.Documents(torch.empty(0), None, bounds))
    assert (mixed.shape, mixed.dtype) == (q.shape, q.dtype)
    mixed.sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in (q, k, v))


def test_blocks_compile_once_however_many_documents_there_are(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter
    from torch._dynamo.utils import counters

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", by_document)
    monkeypatch.setattr("qatscale.model.llama.has_kernel", lambda *_: True)
    monkeypatch.setattr(documents, "_attend_in_kernel", documents._attend_in_kernel)  # restored afterwards
    torch._dynamo.reset()
    config = ModelConfig(vocab_size=96, hidden_size=32, layers=2, heads=4, intermediate_size=88)
    model = build(config)
    model.document_end = END
    Compilation(model, "on", CompileCounter())
    plain = build(config)
    plain.document_end = END
    graphs = []
    for marks in ([], [3], [3, 9, 11]):
        tokens = rows(config)
        tokens[0, marks] = END
        torch.testing.assert_close(model(tokens, tokens), plain(tokens, tokens))
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2] > 0
