"""A thorough look at a fit: everything that could be wrong, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from tqdm.auto import tqdm

from pyro_nfvi._random import forked_rng
from pyro_nfvi.diagnostics.checks import Check, all_but_equal, max_pareto_k, quick_checks
from pyro_nfvi.diagnostics.report import Report, verdict
from pyro_nfvi.diagnostics.site_weights import SiteWeights, site_weights
from pyro_nfvi.flows import Flow
from pyro_nfvi.guides import GuideDraws
from pyro_nfvi.inference import History, ImportanceSample, LogJoint
from pyro_nfvi.inference.drift import drift
from pyro_nfvi.inference.initialization import gaussian_start, starting_points
from pyro_nfvi.inference.parallel import (
    ONE_AT_A_TIME,
    Surroundings,
    fresh_process,
    in_parallel,
    is_parallel,
)
from pyro_nfvi.inference.score import Score

Density = Flow | GuideDraws

BUDGET = 1e9  # numbers that short chains may compute
NUM_PLACE_DRAWS = 2000  # of each place where the posterior may have mass
SHARE = 20.0  # by how much the posterior must exceed the guide for a point to count as missed
FEW = 5.0  # effective draws that it takes to tell
MISSED = 0.02  # mass of missed points that fails a fit
SLOPE_WINDOW = 0.2  # of the last stage's steps, over which its ELBO must be flat
SLOPE_ERRORS = 3.0  # standard errors that a rise must exceed
SLOPE_NATS = 0.5  # and nats
NUM_BATCHES, BATCH = 16, 64  # of draws, for the noise of the gradient
SIGNAL = 1.0  # ratio of the gradient's square to its noise's, of one batch, above which it leads
APART_ERRORS, APART_NATS, APART_SD = 4.0, 0.3, 0.25  # what tells two restarts apart
ROWS = "chains would read all rows of the loader again and again"
MINIBATCHES = "the model draws minibatches; give it all data"
HEAVY = math.log(3)  # excess of the log weight in both tails that is worth a hint


@dataclass(frozen=True)
class Fit:
    """What is looked at.

    Attributes:
        density: What draws the flat latent.
        log_joint: The model and its data.
        sample: Draws with their weights.
        history: What happened during the fit.
        refit: Fits again from a seed, or None.
    """

    density: Density
    log_joint: LogJoint
    sample: ImportanceSample
    history: History
    refit: Callable[[int], Any] | None = None

    @cached_property
    def score(self) -> Score:
        """The log joint and its gradient."""
        return Score(self.log_joint)

    @cached_property
    def not_one_function(self) -> str:
        """Why the posterior cannot be looked at elsewhere, or an empty string."""
        z = self.sample.z
        usable = self.sample.finite & z.isfinite().all(-1)
        if usable.sum() < 2 * z.shape[-1] + 2:
            return "too few draws have a finite log joint"
        if self.log_joint.num_rows is not None:
            return ROWS
        if self.log_joint.subsamples(z[usable][0]):
            return MINIBATCHES
        return ""


@dataclass(frozen=True, eq=False)
class Restart:
    """All that a process needs to fit again."""

    refit: Callable[[int], Any]
    caller: Surroundings
    num_threads: int | None

    def __call__(self, seed: int) -> ImportanceSample:
        """The draws of a fit from a seed."""
        with ONE_AT_A_TIME, fresh_process(self.num_threads), self.caller.seeded(seed):
            posterior = self.refit(seed)
            if posterior.history.interrupted:
                raise KeyboardInterrupt  # a fit that ended early is not what is asked about
            draws: ImportanceSample = posterior.draws
            return draws


def diagnose(fit: Fit, restarts: int = 0, progress: bool = True, n_jobs: int | None = None
             ) -> Report:
    """Look for everything that could be wrong with a fit.

    Args:
        fit: What to look at; nothing of it is changed.
        restarts: How many fits from other seeds to compare it with.
        progress: Whether to show a progress bar.
        n_jobs: Number of processes for these fits, as joblib takes it.

    Example:
        >>> from pyro_nfvi import Posterior
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> found = Posterior.of(model, model)  # the prior is its own posterior
        >>> fit = Fit(found.density, found.log_joint, found.draws, found.history)
        >>> diagnose(fit, progress=False).trusted
        True
    """
    sites = site_weights(fit.sample, fit.log_joint.layout)
    looks: list[Callable[[], Check]] = [
        lambda: _sites(sites, fit.sample), lambda: _tails(sites, fit.sample),
        lambda: _drift(fit), lambda: _missed(fit), lambda: _slope(fit.history),
        lambda: _noise(fit)]
    checks = quick_checks(fit.sample, fit.history, fit.log_joint.layout)
    with forked_rng(), tqdm(total=len(looks) + restarts, desc="diagnose",
                            disable=not progress) as bar:
        for look in looks:
            checks.append(look())
            bar.update()
        checks.append(_restarts(fit, restarts, bar, n_jobs))
    checks = _with_causes(checks, fit)
    trusted, words = verdict(fit.sample, fit.history, fit.log_joint.layout, checks)
    return Report(tuple(checks), words, trusted, fit.sample.elbo,
                  sites.pareto_k if sites else {}, max_pareto_k(fit.sample.num_samples))


# ---------------------------------------------------------------------- sites and tails

def _sites(sites: SiteWeights | None, sample: ImportanceSample) -> Check:
    """k-hat of each latent site."""
    if sites is None:
        return Check("sites", "skipped", "too few draws have weights")
    worst, bar = sites.worst, max_pareto_k(sample.num_samples)
    k = sites.pareto_k[worst]
    shown = f"{k:.2f}" if k < 10 else "above 10"
    words = f"worst is {worst!r}, k-hat {shown} of its weights alone"
    if k < bar or all_but_equal(sample):
        return Check("sites", "ok", words, value=k)
    return Check("sites", "warn", words, _reparametrise(worst), k)


def _reparametrise(site: str) -> str:
    return (f"reparametrise site {site!r} or, in a hierarchy, the sites that it scales: "
            "poutine.reparam(model, {name: LocScaleReparam()})")


def _tails(sites: SiteWeights | None, sample: ImportanceSample) -> Check:
    """Whether weights grow into both tails of a site."""
    if sites is None or all_but_equal(sample):
        return Check("tails", "ok" if sites else "skipped", "no lighter than the posterior's"
                     if sites else "too few draws have weights")
    name = max(sites.tails, key=lambda site: sites.tails[site])
    excess = sites.tails[name]
    if excess < HEAVY:
        return Check("tails", "ok", "no lighter than the posterior's", value=excess)
    return Check("tails", "warn", f"the guide's tails are too light at site {name!r}",
                 "take noise with heavier tails: AutoFlow(model, base=StudentT)", excess)


# ---------------------------------------------------------------------- what no draw shows

def _drift(fit: Fit) -> Check:
    """Whether short exact chains stay where the fit says the posterior is."""
    if reason := fit.not_one_function:
        return Check("drift", "skipped", reason)
    try:
        found = drift(fit.score, fit.density, fit.sample, fit.log_joint.layout, BUDGET)
    except NotImplementedError as error:
        return Check("drift", "skipped", str(error))
    except torch.linalg.LinAlgError:
        return Check("drift", "skipped", "the draws have no covariance")
    if not found.found:
        return Check("drift", "ok", "short Hamiltonian chains stay where the draws are",
                     value=found.z_score)
    return Check("drift", "fail", str(found), f"{_reparametrise(found.site)}, take a richer flow "
                 f"or more steps, or draw by {_sampler(fit)}", found.z_score)


@torch.no_grad()
def _missed(fit: Fit) -> Check:
    """Whether there is mass where the guide hardly draws."""
    if reason := fit.not_one_function:
        return Check("missed mass", "skipped", reason)
    score, z = fit.score, fit.sample.z
    center = z[z.isfinite().all(-1)].mean(0)
    start = gaussian_start(score, starting_points(fit.log_joint, center))
    if start is None:
        return Check("missed mass", "skipped", "the log joint is finite at no other start")
    try:
        missed = [_missed_mass(fit, score, place) for place in start.places]
    except NotImplementedError as error:
        return Check("missed mass", "skipped", str(error))
    return _coverage(max(missed), len(start.places))


def _coverage(missed: float, num_places: int) -> Check:
    places = "1 place" if num_places == 1 else f"{num_places} places"
    if missed < MISSED:
        words = f"the guide covers the {places} found from new starts"
        return Check("missed mass", "ok", words, value=missed)
    words = (f"about {missed / (1 + missed):.0%} of the mass is where the guide hardly draws, "
             f"seen from {places} found from new starts")
    action = ("start from several places: NFVI(model).run() looks for modes and covers them; or "
              "break the symmetry in the model") if num_places > 1 else \
        "take a richer guide, a flow: NFVI(model).run()"
    return Check("missed mass", "fail", words, action, missed)


def _missed_mass(fit: Fit, score: Score, place: Flow) -> float:
    r"""Mass, relative to what the guide sees, where it draws too little.

    .. math:: \frac 1{\hat Z} \mathbb E_{r}\left[\frac{p(x, z)}{r(z)}
              \mathbb 1\left[p(x, z) > 20\,\hat Z q(z)\right]\right]
    """
    z, log_r = place.rsample_and_log_prob((NUM_PLACE_DRAWS,))
    log_p = score.value(z)
    log_q = fit.density.log_prob(z.to(fit.sample.z.dtype)).to(log_p)
    log_z = _log_evidence(fit.sample)
    weights = (log_p - log_z - log_r).clamp(max=50.0).exp()
    missed = log_p - log_z - log_q.nan_to_num(-torch.inf) > math.log(SHARE)
    weights = weights[missed & weights.isfinite()].double()
    few = weights.sum().square() < FEW * weights.square().sum()  # a draw or two: noise
    return 0.0 if few else weights.sum().item() / NUM_PLACE_DRAWS


def _log_evidence(sample: ImportanceSample) -> float:
    terms = (sample.log_p - sample.log_q)[sample.finite]
    if not len(terms):
        return -math.inf
    return torch.logsumexp(terms, 0).item() - math.log(sample.num_samples)


# ---------------------------------------------------------------------- the end of the fit

def _slope(history: History) -> Check:
    """Whether the ELBO still rose when the fit ended."""
    elbo = np.asarray(history.elbo[-_last_steps(history):]) if history.elbo else np.zeros(0)
    elbo = elbo[int((1 - SLOPE_WINDOW) * len(elbo)):]
    elbo = elbo[np.isfinite(elbo)]
    if len(elbo) < 20:
        words = "no gradient step was needed" if history.stages else "the history is not known"
        return Check("slope", "skipped", words)
    step = np.linspace(-0.5, 0.5, len(elbo))
    rise = step @ elbo / (step @ step)
    error = np.std(elbo - elbo.mean() - rise * step) / math.sqrt(step @ step)
    words = f"the ELBO rose by {rise:.2f} +- {error:.2f} nats over the last {len(elbo)} steps"
    if rise < max(SLOPE_ERRORS * error, SLOPE_NATS):
        return Check("slope", "ok", words, value=rise)
    return Check("slope", "warn", words, "more steps (num_steps)", rise)


def _last_steps(history: History) -> int:
    return history.stages[-1].num_steps if history.stages else len(history.elbo)


def _noise(fit: Fit) -> Check:
    """How much of the gradient, at the end, is signal."""
    flow = fit.density
    parameters = [p for p in flow.parameters() if p.requires_grad] if isinstance(flow, Flow) else []
    if not parameters or fit.not_one_function:
        return Check("gradient", "skipped", "known for flow guides of all data only")
    gradients = torch.stack([_gradient(flow, fit.log_joint, parameters)
                             for _ in range(NUM_BATCHES)])
    noise = gradients.var(0).sum().item()
    signal = max(gradients.mean(0).square().sum().item() - noise / NUM_BATCHES, 0.0)
    if not math.isfinite(noise) or noise == 0:
        return Check("gradient", "skipped", "it is not finite" if noise else "it has no noise")
    ratio = signal / noise
    words = f"signal to noise {ratio:.2f}, of {BATCH} particles"
    return Check("gradient", "ok", words, value=ratio)


def _gradient(flow: Any, log_joint: LogJoint, parameters: Sequence[Tensor]) -> Tensor:
    with torch.enable_grad():
        z, log_q = flow.rsample_and_log_prob((BATCH,))
        terms = log_joint(z) - log_q
        elbo = terms.where(terms.isfinite(), terms.new_zeros(())).mean()
        parts = torch.autograd.grad(elbo, parameters, allow_unused=True)
    return torch.cat([part.flatten() for part in parts if part is not None])


# ---------------------------------------------------------------------- restarts

def _restarts(fit: Fit, count: int, bar: tqdm, n_jobs: int | None) -> Check:
    """Whether fits from other seeds end at the same place; the first that does not is enough."""
    if fit.refit is None:
        return Check("restarts", "skipped", "only NFVI knows how to fit again")
    if not count:
        return Check("restarts", "skipped", "not asked for", "diagnose(restarts=2)")
    parallel, seeds = is_parallel(n_jobs), [(seed,) for seed in range(1, count + 1)]
    restart = Restart(fit.refit, Surroundings.here(), 1 if parallel else None)
    worst = ""
    for draws in in_parallel(restart, seeds, n_jobs):
        bar.update()
        worst = worst or _difference(fit.sample, draws, fit.log_joint)
        if worst and not parallel:  # where others are under way, they may end
            break
    bar.update(bar.total - bar.n)
    if not worst:
        return Check("restarts", "ok", f"{count} fit(s) from other seeds agree")
    return Check("restarts", "fail", worst, "fit from several seeds and keep the best ELBO, with "
                 "more particles or another flow")


def _difference(one: ImportanceSample, other: ImportanceSample, log_joint: LogJoint) -> str:
    """What tells two fits apart, or an empty string."""
    gap = other.elbo[0] - one.elbo[0]
    if abs(gap) > APART_NATS + APART_ERRORS * math.hypot(one.elbo[1], other.elbo[1]):
        return f"a fit from another seed has an ELBO {abs(gap):.2f} nats " + (
            "higher" if gap > 0 else "lower")
    (mean, sd), (mean_other, _) = _moments(one), _moments(other)
    error = sd * math.sqrt(1 / one.ess + 1 / other.ess)
    apart = ((mean - mean_other).abs() - APART_ERRORS * error) / sd.clamp(min=1e-300)
    place = int(apart.argmax())
    if apart[place] < APART_SD:
        return ""
    return (f"a fit from another seed puts the mean of site {log_joint.layout.at(place).name!r} "
            f"{(mean - mean_other)[place].abs() / sd[place]:.1f} sd away")


def _moments(sample: ImportanceSample) -> tuple[Tensor, Tensor]:
    weights = sample.log_weights.exp().double()
    z = sample.z.double().nan_to_num(0.0, 0.0, 0.0)
    mean = weights @ z
    return mean, (weights @ (z - mean).square()).sqrt()


# ---------------------------------------------------------------------- causes

def _sampler(fit: Fit) -> str:
    """What draws exactly through the guide: NeuTra, if it maps noise to all latents."""
    density = fit.density
    mapped = isinstance(density, Flow) or isinstance(density.guide, AutoContinuous)
    return "posterior.neutra()" if mapped else "posterior.metropolis()"


def _with_causes(checks: Sequence[Check], fit: Fit) -> list[Check]:
    """The same checks, where the action of a bad k-hat follows from what else was found."""
    found = {check.name: check for check in checks}
    advice = []
    if found["slope"].status == "warn" or (found["gradient"].value or 0.0) > SIGNAL:
        advice.append("more steps (num_steps): the fit is not at its end")
    for name in ("missed mass", "tails", "sites"):
        if found[name].status in ("warn", "fail"):
            advice.append(found[name].action)
    if not advice and isinstance(fit.density, GuideDraws):
        advice.append("take a richer guide, a flow: NFVI(model).run()")
    words = f"{'; '.join(advice)}; or exact draws through this guide: {_sampler(fit)}"
    if found["drift"].words == MINIBATCHES:  # each draw has a log joint of its own
        advice, words = [MINIBATCHES], MINIBATCHES
    if advice and found["k-hat"].failed:
        found["k-hat"] = replace(found["k-hat"], action=words)
    elif advice and found["effective draws"].failed:
        found["effective draws"] = replace(found["effective draws"], action=words)
    if found["k-hat"].failed and found["effective draws"].failed:
        found["effective draws"] = replace(found["effective draws"], action="as for k-hat")
    return list(found.values())
