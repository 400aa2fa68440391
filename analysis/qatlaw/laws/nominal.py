"""A law that was fitted on effective bits, asked about nominal ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from numpy.typing import ArrayLike

from qatlaw.laws.base import Floats, LawForm

EffectiveBits = Callable[[ArrayLike, ArrayLike], Floats]
"""(N, nominal bits) -> stored bits per parameter; broadcasts."""


@dataclass(frozen=True, kw_only=True)
class NominalForm(LawForm):
    """A form whose B is effective, as a function of the nominal B."""

    inner: LawForm
    effective: EffectiveBits

    @classmethod
    def of(cls, inner: LawForm, effective: EffectiveBits) -> NominalForm:
        same = {field.name: getattr(inner, field.name) for field in fields(LawForm)}
        return cls(**same, inner=inner, effective=effective)

    def loss(self, theta: ArrayLike, N: ArrayLike, D_fp: ArrayLike, D_qat: ArrayLike, B: ArrayLike) -> Floats:
        return self.inner.loss(theta, N, D_fp, D_qat, self.effective(N, B))

    def optimal_fraction(self, theta: ArrayLike, N: ArrayLike, D_total: ArrayLike, B: ArrayLike) -> Floats:
        return self.inner.optimal_fraction(theta, N, D_total, self.effective(N, B))
