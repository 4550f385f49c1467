"""Simulation-based calibration: are posteriors right on average over data from the prior?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from pyro_nfvi._shapes import check_callables, check_flag, check_names, check_positive_int
from pyro_nfvi.calibration import plots
from pyro_nfvi.calibration.ecdf import symmetry_p_values, uniformity_test
from pyro_nfvi.calibration.ranks import central_ranks_of
from pyro_nfvi.calibration.refits import Amortized, Refit, as_refit
from pyro_nfvi.calibration.runs import (
    Arrays,
    Incident,
    Outcome,
    Simulation,
    check_reads,
    collected,
)
from pyro_nfvi.calibration.simulation import OWNER, Simulator, Values
from pyro_nfvi.inference.parallel import Surroundings, check_jobs

ALPHA = 0.01  # p-values below it, corrected for their number, speak against the fit
MAX_FAILED = 0.05  # fraction of failed fits above which the others are no fair sample
FEW = 50  # simulations that find gross errors only
LEVELS = (0.5, 0.8, 0.9, 0.95)
KINDS = ("central", "hdi")


def calibrate(model: Callable, fit: Any, *args: Any, num_simulations: int = 200,
              num_draws: int = 999, n_jobs: int | None = None, seed: int | None = None,
              amortized: bool | None = None, weighted: bool = False,
              sites: Sequence[str] | None = None, args_fn: Callable[[Values], tuple] | None = None,
              quantities_fn: Callable[[Values, Values], Values] | None = None,
              progress: bool = True, **kwargs: Any) -> Calibration:
    r"""Simulation-based calibration: fit data simulated from the prior, and rank the truth.

    .. math:: \theta \sim p(\theta), \quad y \sim p(y \mid \theta), \quad
              \theta_1, \dots, \theta_L \sim q(\theta \mid y) \quad\Longrightarrow\quad
              \#\{l : \theta_l < \theta\} \sim \mathrm{Uniform}\{0, \dots, L\}
              \ \text{ if } q \text{ is the posterior}

    Each simulation is a prior draw, data of the model given it, a fit of those data, and the rank
    of every number of the prior draw among draws of the fit. Data go where the model observes
    them, and into the arguments that hold them now. An amortized guide draws in one pass; other
    fits are made anew, in parallel through joblib: processes by ``n_jobs``, or a cluster by
    ``with joblib.parallel_config(backend="dask")`` (or ``"ray"``) around the call. Each runs on
    one thread. Ctrl-C keeps what is done.

    The prior itself passes as a posterior; ``quantities_fn`` can return what would tell, such as
    the log-likelihood. What :func:`pyro.do` sets stays set; leave such sites out by ``sites``.

    Args:
        model: A Pyro model with proper priors and all of its data, no minibatches.
        fit: :class:`~pyro_nfvi.NFVI`, or what else has a ``model`` and a ``run``, which is copied
            for each refit; or a function of a model and its arguments that fits it and returns a
            Posterior, a Pyro guide, or draws ``(at least num_draws, *shape)`` by site; or a
            trained amortized guide.
        *args: The model's arguments. Those that are data give their shape only.
        num_simulations: Number of simulations.
        num_draws: Number of independent draws of each fit. With 999 all levels in percent are
            exact.
        n_jobs: Number of processes for refits, -1 for one for each core. Default: what
            ``joblib.parallel_config`` says, else no other process.
        seed: Makes it reproducible, whatever ``n_jobs``. The global random state stays as it was.
            Default: from the global random state.
        amortized: Whether ``fit`` is an amortized guide. Default: if it is a module.
        weighted: Whether to rank among importance-weighted draws of a Posterior.
        sites: Latent sites to rank. Default: all.
        args_fn: Function from simulated data by site to the model's positional arguments, for
            data that the model transforms before it observes them.
        quantities_fn: Function from latents ``(num_draws, *shape)`` and data, both by site, to
            further quantities ``(num_draws, *shape)`` by name, to rank as latents are.
        progress: Whether to show a progress bar.
        **kwargs: The model's keyword arguments; one of a name above goes by position.

    Raises:
        ValueError: If an argument is of another kind, the model cannot be simulated, the guide
            does not read the data, or all of the first fits fail.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> def exact(y):
        ...     precision = 1.0 + len(y)
        ...     pyro.sample("mu", dist.Normal(y.sum() / precision, precision ** -0.5))
        >>> calibration = calibrate(model, exact, torch.zeros(5), amortized=True, seed=0,
        ...                         num_simulations=50, progress=False)
        >>> calibration.calibrated, calibration.ranks["mu"].shape
        (True, (50,))

    References:
        Talts, Betancourt, Simpson, Vehtari & Gelman (2018), Validating Bayesian Inference
        Algorithms with Simulation-Based Calibration, arXiv:1804.06788; Yao, Vehtari, Simpson &
        Gelman (2018), Yes, but Did It Work?, arXiv:1802.02538; Modrák et al. (2022),
        Simulation-Based Calibration Checking for Bayesian Computation: The Choice of Test
        Quantities Shapes Sensitivity, arXiv:2211.02383 (quantities).
    """
    check_positive_int(OWNER, "num_simulations", num_simulations)
    check_positive_int(OWNER, "num_draws", num_draws, 2)
    _check_options(n_jobs, seed, args_fn, quantities_fn)
    check_flag(OWNER, "progress", progress)
    check_flag(OWNER, "weighted", weighted)
    simulator = Simulator(model, args, kwargs, args_fn)
    refit = as_refit(fit, model, amortized)
    _check_match(simulator, refit, weighted)
    names = _checked_sites(sites, simulator)
    simulation = Simulation(simulator, refit, names, num_draws, weighted, quantities_fn,
                            Surroundings.here())
    seeds = _seeds(num_simulations, seed)
    if isinstance(refit, Amortized):
        check_reads(simulation, seeds)
    outcomes = collected(simulation, seeds, n_jobs, progress)
    return _calibration(outcomes, simulation, num_simulations)


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """Result of :func:`calibrate`. Its ``repr`` is the table with a verdict.

    Attributes:
        ranks: Ranks of the truth among the draws, of ``0..num_draws``, by site:
            ``(num_simulations, *shape)``.
        hdi_ranks: Number of draws that enter highest-density intervals before the truth.
        unweighted_ranks: Ranks among draws without their importance weights.
        prior_draws: The truths.
        num_draws: Number of draws of each fit.
        num_planned: Number of simulations asked for.
        failures: Simulations that gave no draws, and why.
        notes: Simulations that gave a warning, and which.
        plates: Plate of each dimension of a site, None where there is none.
        weighted: Whether the draws were weighted by importance.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     pyro.sample("y", dist.Normal(pyro.sample("mu", dist.Normal(0.0, 1.0)), 1.0), obs=y)
        >>> def narrow(y):
        ...     pyro.sample("mu", dist.Normal(y / 2, 0.2))
        >>> found = calibrate(model, narrow, torch.tensor(0.0), amortized=True, num_simulations=50,
        ...                   seed=0, progress=False)
        >>> found.calibrated, found.ranks["mu"].shape
        (False, (50,))
    """

    ranks: Arrays
    hdi_ranks: Arrays
    unweighted_ranks: Arrays
    prior_draws: Arrays
    num_draws: int
    num_planned: int
    failures: tuple[Incident, ...] = ()
    notes: tuple[Incident, ...] = ()
    plates: Mapping[str, tuple[str | None, ...]] | None = None
    weighted: bool = False

    @property
    def num_simulations(self) -> int:
        """Number of simulations behind the ranks."""
        return len(next(iter(self.ranks.values())))

    # ------------------------------------------------------------------ tests

    @cached_property
    def p_values(self) -> Arrays:
        """p-value of each number's ranks being uniform, by site; nan for what never varies.

        The tests are those of the bands of :meth:`plot_ecdf`; see
        :class:`~pyro_nfvi.calibration.ecdf.UniformityTest`.
        """
        test = uniformity_test(self.num_simulations, self.num_draws)
        return self._varying({name: test.p_values(r) for name, r in self.ranks.items()})

    @cached_property
    def vsbc_p_values(self) -> Arrays:
        """p-value of the symmetry of each number's ranks, by site: a small one means bias.

        That is the VSBC diagnostic of Yao et al. (2018, arXiv:1802.02538): the fractions of
        (unweighted) draws below the truth are symmetric about a half unless the fit is off to one
        side. A fit that is too narrow or too wide, but centred, passes.
        """
        return self._varying({name: symmetry_p_values(r, self.num_draws)
                              for name, r in self.unweighted_ranks.items()})

    @property
    def p_value(self) -> float:
        """Smallest p-value of uniform ranks, times their number (Bonferroni)."""
        return _smallest(self.p_values)

    @property
    def vsbc_p_value(self) -> float:
        """Smallest p-value of symmetry, times their number (Bonferroni)."""
        return _smallest(self.vsbc_p_values)

    @property
    def calibrated(self) -> bool:
        """Whether the tests at level 0.01 find nothing, and few fits failed."""
        return (not self._rejected and self._fraction_failed <= MAX_FAILED
                and not math.isnan(self.p_value))

    @property
    def _rejected(self) -> bool:
        biased = not self.weighted and self.vsbc_p_value < ALPHA
        return self.p_value < ALPHA or biased

    @property
    def _fraction_failed(self) -> float:
        return len(self.failures) / (len(self.failures) + self.num_simulations)

    def _varying(self, values: Arrays) -> Arrays:
        """Values, or nan where the truth was always the same, as on the diagonal of a matrix."""
        return {name: np.where(self._is_fixed(name), np.nan, value)
                for name, value in values.items()}

    def _is_fixed(self, name: str) -> np.ndarray:
        truths = self.prior_draws[name]
        return (truths == truths[0]).all(0) & (len(truths) > 1)

    # ------------------------------------------------------------------ coverage

    def coverage(self, levels: Sequence[float] = LEVELS, kind: str = "central") -> Any:
        """How often intervals of the fit hold the truth.

        Args:
            levels: Probabilities that the intervals ought to have. They are rounded to a whole
                number of draws: column ``level`` says which was taken.
            kind: ``"central"``, with as many draws below as above, or ``"hdi"``, the narrowest.

        Returns:
            A pandas DataFrame with a row for each number and level: the ``level``, the
            ``coverage``, and the ``standard_error`` that it has if the fit is calibrated.

        Raises:
            ValueError: If a level is not between 0 and 1, or the kind is another.
        """
        import pandas as pd

        sizes = np.array([round(_checked_level("coverage", level) * (self.num_draws + 1))
                          for level in _checked_levels(levels)])
        entered = self._entered(kind)
        exact = sizes / (self.num_draws + 1)
        error = np.sqrt(exact * (1 - exact) / self.num_simulations)
        rows = [(label, level, (ranks < size).mean(), se)
                for label, ranks in self._columns(entered)
                for level, size, se in zip(exact, sizes, error, strict=True)]
        return pd.DataFrame(rows, columns=["variable", "level", "coverage", "standard_error"])

    def _entered(self, kind: str) -> Arrays:
        """Number of draws that enter intervals of a kind before the truth does."""
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(f"Calibration expected `kind` to be 'central' or 'hdi', got {kind!r}.")
        if kind == "hdi":
            return self.hdi_ranks
        return {name: central_ranks_of(r, self.num_draws) for name, r in self.ranks.items()}

    def _columns(self, values: Arrays) -> Iterator[tuple[str, np.ndarray]]:
        """Label and column ``(num_simulations,)`` of each number that varies."""
        for name, value in values.items():
            for place in np.argwhere(~self._is_fixed(name)):
                index = (..., *place.tolist())  # the simulations stay
                yield label_of(name, index[1:]), value[index]

    # ------------------------------------------------------------------ reports

    def summary(self) -> Any:
        """Table of all numbers, a pandas DataFrame.

        Columns: p-values of uniform ranks and of their symmetry (VSBC), the mean rank as a
        fraction (0.5), coverage of central and highest-density intervals at 50% and 90%, and what
        the ranks say of the draws where their p-value, corrected for its number, is below 0.05.
        """
        import pandas as pd

        columns = dict(self._columns(self.ranks))
        p, symmetry = (dict(self._columns(v)) for v in (self.p_values, self.vsbc_p_values))
        table = pd.DataFrame({
            "p_value": {label: float(value) for label, value in p.items()},
            "vsbc_p_value": {label: float(value) for label, value in symmetry.items()},
            "mean_rank": {label: ranks.mean() / self.num_draws
                          for label, ranks in columns.items()}})
        for kind in KINDS:
            wide = self.coverage((0.5, 0.9), kind).pivot(
                index="variable", columns="level", values="coverage")
            for column, level in zip(wide, (50, 90), strict=False):
                table[f"{kind}_{level}"] = wide[column]
        found = {label: self._words(ranks) if p[label] * self._num_tested < 0.05 else ""
                 for label, ranks in columns.items()}
        table["draws"] = pd.Series(found, dtype=object)
        return table

    def _words(self, ranks: np.ndarray) -> str:
        """What ranks say of the draws, if they are not uniform."""
        fraction = (ranks + 0.5) / (self.num_draws + 1) - 0.5
        count = len(fraction)
        shift = fraction.mean() * math.sqrt(12 * count)  # standard normal if uniform
        spread = (np.mean(fraction ** 2) - 1 / 12) * math.sqrt(180 * count)
        words = [(abs(spread), "too narrow" if spread > 0 else "too wide"),
                 (abs(shift), "too low" if shift > 0 else "too high")]
        bar = max(3.0, max(abs(shift), abs(spread)) / 2)  # a shift alone spreads ranks a bit
        return " and ".join(text for size, text in sorted(words, reverse=True) if size > bar) or \
            "of another shape"

    @property
    def verdict(self) -> str:
        """One line: whether the fit is calibrated, and if not, what is wrong where."""
        count = self._num_tested
        tests = (f"p {self.p_value:.2g}, VSBC p {self.vsbc_p_value:.2g}, each corrected for "
                 f"{count} {'number' if count == 1 else 'numbers'}")
        if not count:
            text = "Verdict: nothing to test, the truth never varied."
        elif self._rejected:
            text = f"Verdict: not calibrated ({tests}). {self._worst()}"
        elif self._fraction_failed > MAX_FAILED:
            text = f"Verdict: too many fits failed to tell ({tests})."
        elif self.num_simulations < FEW:
            text = (f"Verdict: nothing found, but {self.num_simulations} simulations are too few "
                    f"to tell ({tests}).")
        else:
            text = (f"Verdict: calibrated, as far as {self.num_simulations} simulations tell "
                    f"({tests}).")
        return " ".join([text, *self._counted()])

    @property
    def _num_tested(self) -> int:
        return int(sum(np.isfinite(p).sum() for p in self.p_values.values()))

    def _worst(self) -> str:
        test = self.p_values if self.p_value <= self.vsbc_p_value or self.weighted \
            else self.vsbc_p_values
        label = min(self._columns(test), key=lambda item: item[1])[0]
        ranks = dict(self._columns(self.ranks))[label]
        return f"Worst: {label!r}, whose draws are {self._words(ranks)}."

    def _counted(self) -> Iterator[str]:
        done = self.num_simulations + len(self.failures)
        if self.failures:
            first = self.failures[0]
            yield (f"{len(self.failures)} of {done} simulations failed, and are left out; "
                   f"number {first.simulation}: {first.text}.")
        if self.notes:
            count = len({note.simulation for note in self.notes})
            yield f"{count} of {done} fits warned; the first: {self.notes[0].text}"
        if done < self.num_planned:
            yield f"Interrupted after {done} of {self.num_planned} simulations."

    def __repr__(self) -> str:
        table = self.summary().sort_values("p_value", kind="stable")
        more = f"\n... and {len(table) - 10} more, less extreme" if len(table) > 10 else ""
        return f"{table.head(10).to_string(float_format='{:.3g}'.format)}{more}\n\n{self.verdict}"

    def to_xarray(self) -> Any:
        """Fractions of draws below the truth as an xarray Dataset, with plates as dimensions.

        Dimensions are ``(chain, draw, *shape)``, a draw being a simulation: as group ``prior_sbc``
        of an ArviZ DataTree, that is what ArviZ's own plots of calibration read.
        """
        import xarray as xr

        return xr.Dataset({
            name: (("chain", "draw", *self._dims(name, ranks)), ranks[None] / self.num_draws)
            for name, ranks in self.ranks.items()})

    def _dims(self, name: str, ranks: np.ndarray) -> list[str]:
        plates = list((self.plates or {}).get(name, ()))
        plates += [None] * (ranks.ndim - 1 - len(plates))
        return [plate or f"{name}_dim_{dim}" for dim, plate in enumerate(plates)]

    # ------------------------------------------------------------------ pictures

    def plot_ecdf(self, var_names: Sequence[str] | None = None, *, level: float = 0.95,
                  axes: Any = None) -> Any:
        """Plot how far the distribution of ranks is from uniform, with a simultaneous band.

        A panel for each site, with a line for each of its numbers. If the fit is calibrated,
        all lines of a panel stay within its band with probability ``level``.

        Args:
            var_names: Sites to show. Default: all.
            level: Probability of the band.
            axes: Matplotlib axes, one for each site. Default: new ones.

        Returns:
            An array of matplotlib axes.

        Raises:
            ValueError: If a site is unknown, or the level or the number of axes does not fit.

        References:
            Säilynoja, Bürkner & Vehtari (2022), arXiv:2103.10522.
        """
        return self._plot("plot_ecdf", self.ranks, var_names, level, axes,
                          difference=True, xlabel="rank / number of draws",
                          ylabel="ECDF - uniform")

    def plot_coverage(self, var_names: Sequence[str] | None = None, *, kind: str = "central",
                      level: float = 0.95, axes: Any = None) -> Any:
        """Plot how often intervals hold the truth against how often they ought to, with a band.

        Args:
            var_names: Sites to show. Default: all.
            kind: ``"central"`` or ``"hdi"``.
            level: Probability that all lines of a panel stay within its band.
            axes: Matplotlib axes, one for each site. Default: new ones.

        Returns:
            An array of matplotlib axes.

        Raises:
            ValueError: If a site is unknown, or another argument does not fit.
        """
        return self._plot("plot_coverage", self._entered(kind), var_names, level, axes,
                          difference=False, xlabel=f"level of the {kind} interval",
                          ylabel="coverage")

    def _plot(self, owner: str, values: Arrays, var_names: Sequence[str] | None,
              level: float, axes: Any, **options: Any) -> Any:
        _checked_level(owner, level)
        shown = _checked_names(owner, "var_names", var_names, list(self.ranks))
        panels = {name: dict(self._columns({name: values[name]})) for name in shown}
        return plots.plot_panels(
            owner, panels, uniformity_test(self.num_simulations, self.num_draws), level, axes,
            **options)


def _calibration(outcomes: list[Outcome], simulation: Simulation, num_planned: int
                 ) -> Calibration:
    parts = [outcome.arrays for outcome in outcomes if outcome.arrays is not None]
    stacked = {kind: {name: np.stack([part[kind][name] for part in parts]) for name in named}
               for kind, named in parts[0].items()}
    plates = {name: simulation.simulator.latents.get(name, ()) for name in stacked["ranks"]}
    return Calibration(
        **stacked, num_draws=simulation.num_draws, num_planned=num_planned,
        failures=tuple(outcome.failure for outcome in outcomes if outcome.failure is not None),
        notes=tuple(note for outcome in outcomes for note in outcome.notes), plates=plates,
        weighted=simulation.weighted)


def _seeds(count: int, seed: int | None) -> list[int]:
    if seed is None:
        seed = int(torch.randint(2 ** 31, ()))
    return [int(one) for one in np.random.SeedSequence(seed).generate_state(count)]


# ------------------------------------------------------------------ checks

def _check_options(n_jobs: Any, seed: Any, args_fn: Any, quantities_fn: Any) -> None:
    check_jobs(OWNER, n_jobs)
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
        raise ValueError(f"{OWNER} expected `seed` to be an integer >= 0 or None, got {seed!r}.")
    given = {"args_fn": args_fn, "quantities_fn": quantities_fn}
    check_callables(OWNER, **{name: value for name, value in given.items() if value is not None})


def _check_match(simulator: Simulator, refit: Amortized | Refit, weighted: bool) -> None:
    if isinstance(refit, Refit):
        if simulator.has_params:
            raise ValueError(f"{OWNER} refits models whose unknowns all have priors; this one has "
                             "pyro.param statements. Give them priors, or fix them.")
        return
    if weighted:
        raise ValueError(f"{OWNER} expected `fit` to give a Posterior if `weighted`, got an "
                         "amortized guide, whose draws have no weights.")
    if not simulator.in_place:
        raise ValueError(f"{OWNER} cannot tell which argument holds the data of "
                         f"{', '.join(map(repr, simulator.observed))}, which the guide reads. Pass "
                         "args_fn, a function from data by site to the positional arguments.")


def _checked_sites(sites: Any, simulator: Simulator) -> tuple[str, ...]:
    return tuple(_checked_names(OWNER, "sites", sites, list(simulator.latents)))


def _checked_names(owner: str, argument: str, names: Any, known: list[str]) -> list[str]:
    if names is None:
        return known
    names = check_names(owner, argument, names)
    for name in names or [None]:
        if name not in known:
            raise ValueError(f"{owner} expected `{argument}` among {', '.join(known)}, got "
                             f"{'none' if name is None else repr(name)}.")
    return names


def _checked_level(owner: str, level: Any) -> float:
    if not isinstance(level, (int, float)) or isinstance(level, bool) or not 0 < level < 1:
        raise ValueError(f"{owner} expected levels between 0 and 1, got {level!r}.")
    return float(level)


def _checked_levels(levels: Any) -> list[Any]:
    try:
        return list(levels)
    except TypeError:
        raise ValueError(f"coverage expected `levels` to be a list of levels such as [0.5, 0.9], "
                         f"got {levels!r}.") from None


def _smallest(p_values: Arrays) -> float:
    p = np.concatenate([value.ravel() for value in p_values.values()])
    p = p[np.isfinite(p)]
    return float(min(1.0, p.min() * len(p))) if len(p) else math.nan


def label_of(name: str, index: tuple[int, ...]) -> str:
    """Name of one number of a site, as ArviZ writes it."""
    return f"{name}[{', '.join(map(str, index))}]" if index else name
