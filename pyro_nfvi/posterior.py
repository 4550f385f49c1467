"""What a fit returns: draws, weights, a verdict, a way to ArviZ and to a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from pyro_nfvi import storage
from pyro_nfvi._shapes import check_positive_int
from pyro_nfvi.diagnostics import Summary, plot_elbo, summarize, to_inference_data
from pyro_nfvi.engine import Engine
from pyro_nfvi.guides import AutoFlow
from pyro_nfvi.inference import History, ImportanceSample, LogJoint, importance_sample
from pyro_nfvi.inference.importance import NUM_SAMPLES


class Posterior:
    """A fitted posterior.

    Statistics come from one set of 10,000 draws of the guide, made when first asked for and
    weighted by importance with Pareto smoothing.

    Args:
        guide: The fitted guide.
        log_joint: The model and its data.
        history: What happened during the fit.
        draws: The draws behind every statistic. Default: new ones.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_nfvi import NFVI
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> posterior = NFVI(model, num_steps=50, progress=False).run(torch.zeros(20))
        >>> posterior.sample(3)["mu"].shape
        torch.Size([3])
    """

    def __init__(self, guide: AutoFlow, log_joint: LogJoint, history: History,
                 draws: ImportanceSample | None = None) -> None:
        self.guide = guide
        self.log_joint = log_joint
        self.history = history
        if draws is not None:
            self.draws = draws

    @property
    def _flow(self) -> Any:
        return self.guide._flow()

    @property
    def engine(self) -> Engine | None:
        """How the last stage was computed: tier, why not a faster one, build time, step time."""
        return self.history.engines[-1] if self.history.engines else None

    # ------------------------------------------------------------------ draws

    def sample(self, num_samples: int = 1000) -> dict[str, Tensor]:
        """Fresh draws of the guide, unweighted, ``(num_samples, *site.shape)`` by site."""
        return self.guide.sample_posterior(num_samples)

    @torch.no_grad()
    def resample(self, num_samples: int = 1000) -> dict[str, Tensor]:
        """Draws taken in proportion to their importance weights: closer to the posterior.

        Raises:
            ValueError: If ``num_samples`` is not a positive integer.
        """
        check_positive_int("Posterior.resample", "num_samples", num_samples)
        z = self.draws.z[self.draws.resample(num_samples)]
        return self.log_joint.layout.constrain(z)[0]

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log-density of the guide at constrained values ``(*sample, *site.shape)``."""
        return self.guide.log_prob(dict(values))

    # ------------------------------------------------------------------ weights

    @cached_property
    def draws(self) -> ImportanceSample:
        """The draws behind every statistic, with their weights."""
        return importance_sample(self._flow, self.log_joint, NUM_SAMPLES)

    @property
    def log_weights(self) -> Tensor:
        """Pareto-smoothed, normalized log importance weights of the draws."""
        return self.draws.log_weights

    @property
    def pareto_k(self) -> float:
        """k-hat: below 0.5 the guide is good, above 0.7 not even its weights help."""
        return self.draws.pareto_k

    @property
    def ess(self) -> float:
        """Effective number of the draws after weighting."""
        return self.draws.ess

    @property
    def elbo(self) -> tuple[float, float]:
        """ELBO and its standard error."""
        return self.draws.elbo

    # ------------------------------------------------------------------ reports

    def summary(self) -> Summary:
        """ArviZ's table of the weighted draws, k-hat, and a verdict with advice."""
        return summarize(self.to_arviz(), self.draws, self.history)

    def to_arviz(self, num_samples: int = 4000, *, weighted: bool = True,
                 coords: Mapping[str, Any] | None = None) -> Any:
        """ArviZ InferenceData (0.x) or DataTree (1.x) with one chain of draws.

        Args:
            num_samples: Number of draws.
            weighted: Take draws in proportion to their importance weights; otherwise as they
                come, at most 10,000. The posterior's attribute ``weighting`` says which.
            coords: Values along dimensions, by name of the plate.

        Raises:
            ValueError: If ``num_samples`` or ``coords`` do not fit.
        """
        check_positive_int("Posterior.to_arviz", "num_samples", num_samples)
        limit = min(num_samples, self.draws.num_samples)
        chosen = self.draws.resample(num_samples) if weighted else torch.arange(limit)
        attrs = {"inference_library": "pyro_nfvi", "pareto_k": self.pareto_k, "ess": self.ess,
                 "weighting": "importance-resampled" if weighted else "none: see log_weight"}
        return to_inference_data(self.log_joint, self.draws, chosen, coords=coords, attrs=attrs)

    def plot_elbo(self, ax: Any = None) -> Any:
        """Plot the ELBO over the steps of the fit; returns matplotlib axes."""
        return plot_elbo(self.history, ax)

    # ------------------------------------------------------------------ files

    def save(self, path: str | PathLike) -> None:
        """Write the fit to a file, whole or not at all.

        The file holds tensors, numbers and names, no code: the flow's parameters, the model's
        arguments and its ``pyro.param`` values, and the history.

        Raises:
            ValueError: If an argument of the model is of a kind that a file cannot hold.
        """
        storage.write(path, self.guide, self.log_joint, self.history)

    @classmethod
    def load(cls, path: str | PathLike, model: Callable, guide: AutoFlow | None = None
             ) -> Posterior:
        """Read a fit; nothing in the file is executed.

        Args:
            path: The file.
            model: The Pyro model that was fitted.
            guide: A guide built as the fitted one was; needed only if its recipe is not one of
                :mod:`pyro_nfvi.flows`.

        Raises:
            ValueError: If the file is damaged, foreign or newer, or the guide does not fit it.
        """
        return cls(*storage.read(path, model, guide))

    def __repr__(self) -> str:
        value, error = self.elbo
        return (f"Posterior({type(self.guide).__name__}, {self.log_joint.layout!r}, "
                f"ELBO {value:.3f} +- {error:.3f}, k-hat {self.pareto_k:.2f}, "
                f"ESS {self.ess:,.0f} of {self.draws.num_samples:,})")
