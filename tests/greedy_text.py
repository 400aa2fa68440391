"""Greedy text where it is decided. Another program, kernel or CPU computes logits with an error of its own, and the
text of a barely trained model hangs on nearly equal ones: only a lead beyond twice the stated error holds anywhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Logits = Callable[[Tensor], Tensor]
"""token ids [1, seq] → logits [1, seq, vocabulary]"""


def _best(scores: Tensor, reach: float) -> tuple[int, bool]:
    """The likeliest token of logits [vocabulary], and whether errors of `reach` in each leave it the likeliest."""
    best = scores.topk(2)
    return int(best.indices[0]), float(best.values[0] - best.values[1]) > 2 * reach


@torch.no_grad()
def decided_text(logits: Logits, start: list[int], count: int, bound: float) -> list[int]:
    """The greedy text that follows `start`: `count` tokens, or those before the first that is not decided.

    bound: of the errors, in units of the largest logit.
    """
    tokens = list(start)
    for _ in range(count):
        scores = logits(torch.tensor([tokens]))[0, -1]
        token, is_decided = _best(scores, bound * float(scores.abs().max()))
        if not is_decided:
            break
        tokens.append(token)
    return tokens[len(start) :]


@torch.no_grad()
def assert_same_text(theirs: Logits, ours: Logits, start: list[int], count: int, bound: float) -> None:
    """Along our greedy text their logits lie within `bound` of ours, and their likeliest token is ours where decided.

    A token that is there already is passed over: models of so few steps would say one word for ever.
    """
    tokens = list(start)
    for _ in range(count):
        expected, found = (logits(torch.tensor([tokens]))[0, -1].clone() for logits in (ours, theirs))
        reach = bound * float(expected.abs().max())
        assert float((found - expected).abs().max()) <= reach
        expected[tokens] = found[tokens] = -torch.inf
        token, is_decided = _best(expected, reach)
        assert int(found.argmax()) == token or not is_decided, tokens
        tokens.append(token)
