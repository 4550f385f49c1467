"""What can be read off draws, weights and the history of a fit: one check each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pyro_nfvi.guides import LatentLayout
from pyro_nfvi.inference import History, ImportanceSample

GOOD_K = 0.5  # below: the draws could do without weights
MAX_K = 0.7  # above: not even the weights help
MIN_ESS = 0.1  # fraction of the draws below which the weights rest on too few of them
MIN_ESS_WEIGHTED = 0.3  # the same where k-hat says that the draws need their weights
EQUAL_ESS = 0.999  # weights this equal change nothing, whatever the shape of their tail
EQUAL = "the weights are all but equal, and k-hat is the shape of their rounding"
MIN_FINITE = 0.9  # fraction of the draws that must be where the posterior has density
POINT = 1e-9  # standard deviation, relative to its size, of a latent that does not vary
ADVICE = ("What helps: a reparametrized model (LocScaleReparam for a hierarchy), a flow of more "
          "layers (guide), more steps (num_steps), or exact draws through this guide: "
          "posterior.metropolis(), posterior.neutra().")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What was looked at.
        status: ``"ok"``, ``"warn"``, ``"fail"`` or ``"skipped"``.
        words: What was found.
        action: What to do about it, or an empty string.
        value: The number behind it, if there is one.

    Example:
        >>> print(Check("k-hat", "fail", "k-hat 0.93, should be below 0.70", "more layers"))
        FAIL  k-hat              k-hat 0.93, should be below 0.70 -> more layers
    """

    name: str
    status: str
    words: str
    action: str = ""
    value: float | None = None

    @property
    def failed(self) -> bool:
        """Whether it speaks against the fit."""
        return self.status == "fail"

    def __str__(self) -> str:
        mark = {"ok": "ok  ", "warn": "warn", "fail": "FAIL", "skipped": "--  "}[self.status]
        return f"{mark}  {self.name:<18} {self.words}" + (f" -> {self.action}" * bool(self.action))


def quick_checks(sample: ImportanceSample, history: History, layout: LatentLayout | None = None
                 ) -> list[Check]:
    """The checks that a verdict is made of, in the order in which they count."""
    return [_fit(history), _support(sample), spread(sample, layout), _weights(sample),
            _effective(sample)]


def max_pareto_k(num_samples: int) -> float:
    r"""The bar for k-hat: :math:`\min(1 - 1 / \log_{10} S,\ 0.7)` for :math:`S` draws.

    References:
        Vehtari et al. (2024), Pareto Smoothed Importance Sampling, arXiv:1507.02646, section 3.
    """
    return min(1 - 1 / math.log10(max(num_samples, 11)), MAX_K)


def all_but_equal(sample: ImportanceSample) -> bool:
    """Whether the weights are: k-hat, which has no scale, is then the shape of rounding."""
    return math.isfinite(sample.pareto_k) and sample.ess > EQUAL_ESS * sample.num_samples


def _fit(history: History) -> Check:
    if history.concerns:
        return Check("fit", "fail", "; ".join(history.concerns), ADVICE)
    if history.interrupted:
        return Check("fit", "warn", f"interrupted after {len(history.elbo)} steps",
                     "run it to the end")
    if history.stopped:
        return Check("fit", "warn", f"stopped early: {history.stopped}", "give it more time")
    return Check("fit", "ok", "ran to its end")


def _support(sample: ImportanceSample) -> Check:
    """Whether the draws are where the posterior has density."""
    finite = sample.finite.double().mean().item()
    words = f"{finite:.2%} of the draws have a finite log joint"
    if finite == 1:
        return Check("support", "ok", words, value=finite)
    status = "warn" if finite >= MIN_FINITE else "fail"
    return Check("support", status, words, "give the guide the support of the model's sites, "
                 "as an AutoFlow does, and look for overflow in the model", finite)


def spread(sample: ImportanceSample, layout: LatentLayout | None) -> Check:
    """Whether every latent varies."""
    finite = sample.z.isfinite().all(-1)
    z = sample.z if finite.all() else sample.z[finite]
    still = torch.zeros(0)
    if len(z):
        low, high = (end.double() for end in z.aminmax(dim=0))
        scale = 1 + torch.maximum(low.abs(), high.abs())
        still = (high - low <= POINT * scale).nonzero().flatten()
    if not len(still):
        return Check("spread", "ok", "every latent varies")
    site = f"site {layout.at(int(still[0])).name!r}" if layout else f"latent {int(still[0])}"
    return Check("spread", "fail", f"the guide is a point mass at {site}",
                 "take a guide with a density, such as AutoFlow(model)")


def _weights(sample: ImportanceSample) -> Check:
    k, bar = sample.pareto_k, max_pareto_k(sample.num_samples)
    if all_but_equal(sample) and not k < GOOD_K:
        return Check("k-hat", "ok", EQUAL, value=k)
    words = f"k-hat {k:.2f}, should be below {bar:.2f}"
    if not k < bar:
        return Check("k-hat", "fail", f"{words}: the guide misses part of the posterior", ADVICE, k)
    needs = "" if k < GOOD_K else ": the draws need their weights"
    return Check("k-hat", "ok" if k < GOOD_K else "warn", words + needs,
                 "use weighted draws: resample(), to_arviz()" if needs else "", k)


def _effective(sample: ImportanceSample) -> Check:
    share = MIN_ESS if sample.pareto_k < GOOD_K else MIN_ESS_WEIGHTED
    needed = 0 if all_but_equal(sample) else share * sample.num_samples
    words = f"{sample.ess:,.0f} of {sample.num_samples:,}"
    if sample.ess >= needed:
        return Check("effective draws", "ok", words, value=sample.ess)
    return Check("effective draws", "fail", f"{words}, should be at least {needed:,.0f}", ADVICE,
                 sample.ess)
