"""GPTQ: INT4 codes whose errors make up for each other on what the draft's linears read.

Frantar et al. 2023, arXiv 2210.17323, layer by layer: each layer's codes are chosen on what it reads behind the layers
whose codes are chosen already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from quantspec.kernels.int4_linear import pack_int4
from quantspec.passes import INT4
from quantspec.passes.weight_formats import PACKED_LINEARS

# Columns whose errors are kept before all columns behind them make up for those.
_BLOCK = 32
# What is added to the diagonal of X^T X, as a share of its mean; the next one where that has no Cholesky factor.
_DAMPINGS = (0.01, 0.1, 1.0)


@dataclass
class _Linears:
    """Linears that read one input.

    Attributes:
        products: sum of ``X^T X (K, K)`` float32 of what they read.
        parts: codes and scales of each, by its name.
    """

    products: Tensor
    parts: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class InputProducts(fx.Interpreter):
    """Runs a graph and gathers what its INT4 linears read, over all runs.

    Attributes:
        linears: by the node of their input.
    """

    def __init__(self, graph_module: fx.GraphModule, weights: Mapping[str, Tensor]) -> None:
        """``weights``: the dense ones ``(N, K)`` of linears that shall have codes, by name."""
        super().__init__(graph_module)
        self._weights = weights
        self.linears: dict[fx.Node, _Linears] = {}
        self._summed: set[fx.Node] = set()

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self._summed.clear()
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        rows_of = n.meta[PACKED_LINEARS].rows if n.target is INT4.linear else ()
        for name in (name for name, _ in rows_of if name in self._weights):
            (x, qdata, scale_and_zero, *_), _ = self.fetch_args_kwargs_from_env(n)
            source = n.args[0]
            assert isinstance(source, fx.Node)
            if source not in self.linears:
                self.linears[source] = _Linears(x.new_zeros(x.shape[-1], x.shape[-1], dtype=torch.float32))
            if source not in self._summed:
                rows = x.flatten(0, -2).float()
                self.linears[source].products.addmm_(rows.t(), rows)
                self._summed.add(source)
            self.linears[source].parts[name] = qdata, scale_and_zero
        return super().run_node(n)

    def choose_codes(self) -> None:
        """Write new codes over those of all linears that were seen.

        Codes stay where what a linear read says nothing, such as numbers that are not finite.
        """
        for linears in self.linears.values():
            # Rows are independent: what reads one input is one weight.
            qdata, scales = zip(*linears.parts.values(), strict=True)
            weight = torch.cat([self._weights[name].detach().float() for name in linears.parts])
            codes = gptq_codes(weight, linears.products, torch.cat(scales, 1))
            if codes is not None:
                for place, chosen in zip(qdata, codes.split([len(part) for part in qdata]), strict=True):
                    place.copy_(pack_int4(chosen))


@torch.no_grad()
def gptq_codes(weight: Tensor, products: Tensor, scale_and_zero: Tensor) -> Tensor | None:
    """Codes of a weight whose scales and zeros stand: each column makes up for the errors of those before it.

    Args:
        weight: ``(N, K)`` float.
        products: ``X^T X (K, K)`` of what the linear reads, in the weight's dtype.
        scale_and_zero: ``(K/g, N, 2)``, as in :mod:`quantspec.kernels.int4_linear`.

    Returns:
        0..15 ``(N, K)`` uint8; None where ``products`` have no Cholesky factor.
    """
    upper = _inverse_factor(products)
    if upper is None:
        return None
    left = weight.clone()
    size = left.shape[1]
    group = size // scale_and_zero.shape[0]
    scale, zero = scale_and_zero.to(left.dtype).unbind(-1)
    codes = torch.empty_like(left, dtype=torch.uint8)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        errors = torch.empty_like(left[:, start:stop])
        for column in range(start, stop):
            s, z = scale[column // group], zero[column // group]
            code = ((left[:, column] - z) / s).round_().add_(8).clamp_(0, 15)
            codes[:, column] = code
            error = (left[:, column] - ((code - 8) * s + z)) / upper[column, column]
            errors[:, column - start] = error
            left[:, column + 1 : stop].addr_(error, upper[column, column + 1 : stop], alpha=-1)
        left[:, stop:].addmm_(errors, upper[start:stop, stop:], alpha=-1)
    return codes


def _inverse_factor(products: Tensor) -> Tensor | None:
    """Upper Cholesky factor of the inverse of ``products``, damped as much as it takes; None where nothing helps."""
    mean = products.diagonal().mean()
    for damping in _DAMPINGS:
        damped = products.clone()
        damped.diagonal().add_(damping * mean)
        lower, wrong = torch.linalg.cholesky_ex(damped)
        if wrong or not lower.isfinite().all():
            continue
        upper, wrong = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not wrong and upper.isfinite().all():
            return upper
    return None
