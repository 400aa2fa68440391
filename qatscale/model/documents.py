"""Documents within sequences: where each begins, and causal attention that does not cross their borders.

The token that ends a document opens the next one: a document is that token and what follows, up to the token before the
next such token. So every token has a label, and the first word of a document is predicted from the mark alone, as in
generation from it. At the start of a sequence stands the rest of a document, which counts as one.

Sizes in comments: b = sequences, t = tokens of a sequence, h = heads, d = channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass  # torch.compile looks into tuples and frozen classes, and would compile anew for each number of documents
class Documents:
    positions: Tensor
    """[b, t]: of each token in its document."""
    mask: Tensor | None
    """[b, 1, t, t]: whether a query (third) sees a key (last); None for variable-length kernels."""
    bounds: Tensor | None
    """[documents + 1], int32: where they begin in all b·t tokens, and the end; for variable-length kernels."""


def has_kernel(x: Tensor, channels: int) -> bool:
    """Whether torch's variable-length flash attention takes what a block makes of x."""
    return (
        x.device.type != "cpu" and x.dtype in (torch.bfloat16, torch.float16) and channels % 8 == 0 and channels <= 256
    )


def find_documents(tokens: Tensor, end: int, kernel: bool) -> Documents:
    """The documents of tokens [b, t], which the token `end` divides. kernel: for variable-length kernels.

    Those take the number of documents as a size, for which the host waits once a micro-batch.
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)
    begins = (tokens == end) | (place == 0)
    begin = torch.where(begins, place, 0).cummax(dim=1).values
    if kernel:
        bounds = F.pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=tokens.numel())
        return Documents(place - begin, None, bounds.int())
    same = begin.unsqueeze(2) == begin.unsqueeze(1)
    return Documents(place - begin, same.tril().unsqueeze(1), None)


def attend(q: Tensor, k: Tensor, v: Tensor, grouped: bool, documents: Documents | None) -> Tensor:
    """Causal attention of q, k, v: [b, h, t, d] → [b, h, t, d], within documents where these are given.

    grouped: k and v have fewer heads.
    """
    if documents is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    if documents.mask is not None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=documents.mask, enable_gqa=grouped)
    return _attend_in_kernel(q, k, v, grouped, documents)


def _attend_in_kernel(q: Tensor, k: Tensor, v: Tensor, grouped: bool, documents: Documents) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # loads torch's compiler

    length, bounds = q.shape[2], documents.bounds
    assert bounds is not None
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [b·t, h, d]
    mixed = varlen_attn(q, k, v, bounds, bounds, length, length, window_size=(-1, 0), enable_gqa=grouped)
    assert isinstance(mixed, Tensor)
    return mixed.unflatten(0, (-1, length)).transpose(1, 2)


def keep_out_of_graphs() -> None:
    """From now on torch.compile ends a graph before the kernel, whose bounds have another size every time."""
    global _attend_in_kernel
    _attend_in_kernel = torch.compiler.disable(_attend_in_kernel)
