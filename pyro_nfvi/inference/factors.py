"""Cholesky factors that do not raise where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CHOLESKY = (torch.linalg.cholesky, torch.cholesky, Tensor.cholesky)


def factor_or_scales(covariance: Tensor) -> Tensor:
    """Cholesky factor ``(D, D)`` of a covariance; if it has none, that of its diagonal."""
    factor, info = torch.linalg.cholesky_ex(covariance)
    return covariance.diagonal().clamp(min=1e-300).sqrt().diag() if info else factor


class FactorsOrNan(TorchFunctionMode):
    """Inside, a matrix without a Cholesky factor has one of nan, instead of raising.

    A model that catches the error, to add jitter say, sees nan instead.
    A log joint over a batch then is nan at the points to blame, and right at the others.

    Example:
        >>> with FactorsOrNan():
        ...     torch.linalg.cholesky(torch.tensor([[[4.0]], [[-1.0]]])).flatten()
        tensor([2., nan])
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        """Run a function of torch's; Cholesky's in its way that does not raise."""
        kwargs = kwargs or {}
        if func not in CHOLESKY or "out" in kwargs:
            return func(*args, **kwargs)
        if len(args) > 1:  # torch.cholesky(A, True)
            args, kwargs = args[:1], {**kwargs, "upper": args[1]}
        factor, info = torch.linalg.cholesky_ex(*args, **kwargs)
        failed = info.ge(1).unsqueeze(-1).unsqueeze(-1)  # the form generated code knows
        return torch.where(failed, factor.new_full((), torch.nan), factor)
