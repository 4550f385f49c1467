"""Pathfinder as a guide: a Gaussian posterior at the first call, without training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro import poutine

from pyro_nfvi._shapes import check_flag
from pyro_nfvi.guides import AutoGaussian
from pyro_nfvi.inference.initialization import gaussian_start, starting_points
from pyro_nfvi.inference.log_joint import LogJoint
from pyro_nfvi.inference.score import Score


class AutoPathfinder(AutoGaussian):
    """Guide that finds its Gaussian by itself, at the first call: multi-start Pathfinder.

    No optimiser and no learning rate: L-BFGS runs from twelve starts, and the Gaussian of
    highest ELBO along the paths is the guide, with a full covariance up to 400 latents and a
    low-rank one beyond. It can be trained on with ``SVI``, as any guide.

    Args:
        model: A Pyro model whose latents are continuous.
        match: Whether to improve the Gaussian by batch and match: the whole Gaussian stage of
            :class:`~pyro_nfvi.NFVI`.
        **kwargs: Options of :class:`~pyro_nfvi.AutoFlow`: ``init_loc_fn`` (the first start),
            ``base``, ``create_plates``.

    Raises:
        ValueError: At the first call, if the log joint is finite at none of the starts, and as
            :class:`~pyro_nfvi.AutoFlow` does.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(100.0, 0.01))
        >>> guide = AutoPathfinder(model)
        >>> bool(abs(guide.median()["x"] - 100.0) < 0.01) if guide.setup() else None
        True

    References:
        Zhang, Carpenter, Gelman & Vehtari (2022), Pathfinder, arXiv:2108.03782; Cai et al.
        (2024), Batch and match, arXiv:2402.14758.
    """

    def __init__(self, model: Callable, *, match: bool = False, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self._model: tuple = (self.model, model)  # as given, without init_loc_fn's draws
        self.match = check_flag("AutoPathfinder", "match", match)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        try:
            with poutine.block(), torch.no_grad():
                self._find(args, kwargs)
        except BaseException:
            self.prototype_trace = None  # the next call starts afresh
            raise

    def _find(self, args: tuple, kwargs: dict) -> None:
        log_joint = LogJoint(self._model[1], args, kwargs, self.layout)
        center = self._init_loc()
        log_joint.try_batched(center + 0.1 * torch.randn(2, len(center)).to(center))
        start = gaussian_start(Score(log_joint), starting_points(log_joint, center),
                               match=self.match)
        if start is None:
            raise ValueError("AutoPathfinder: the log joint is finite at none of the starts; first "
                             f"bad site {log_joint.first_bad_site(center)}. Start elsewhere: "
                             "AutoPathfinder(model, init_loc_fn=...).")
        self.whiten(start.flow.bijection)
