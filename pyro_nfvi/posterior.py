"""What a fit returns: draws, weights, a verdict, a way to ArviZ and to a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from os import PathLike
from typing import Any

import torch
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyro_nfvi import storage
from pyro_nfvi._files import check_path
from pyro_nfvi._shapes import check_file_name, check_flag, check_positive_int, type_name
from pyro_nfvi.diagnostics import (
    Report,
    Summary,
    diagnose,
    summarize,
    to_inference_data,
)
from pyro_nfvi.diagnostics.checks import max_pareto_k, spread
from pyro_nfvi.diagnostics.diagnose import Fit
from pyro_nfvi.diagnostics.inference_data import GROUPS
from pyro_nfvi.diagnostics.site_weights import site_weights
from pyro_nfvi.engine import Engine
from pyro_nfvi.flows import Flow
from pyro_nfvi.guides import AutoFlow, GuideDraws, LatentLayout
from pyro_nfvi.guides.guide_draws import guide_name
from pyro_nfvi.guides.prototype import check_prototype, compare_site, quiet_trace
from pyro_nfvi.inference import History, ImportanceSample, LogJoint, importance_sample
from pyro_nfvi.inference.chains import Chains
from pyro_nfvi.inference.checks import check_arguments, check_data, check_sites
from pyro_nfvi.inference.importance import NUM_SAMPLES
from pyro_nfvi.inference.log_joint import converted, default_dtype
from pyro_nfvi.inference.metropolis import metropolis
from pyro_nfvi.inference.neutra import neutra
from pyro_nfvi.inference.parallel import check_jobs
from pyro_nfvi.inference.predictive import predictions
from pyro_nfvi.plots import (
    fit_pictures,
    plot_elbo,
    plot_marginals,
    plot_pairs,
    plot_pareto_k,
    plot_predictive,
    plot_weights,
    versions,
    write_page,
)

NEW_GROUPS = "Only data may be of other sizes; latents of new groups are for AutoAmortizedFlow."


class Posterior:
    """A fitted posterior.

    Statistics come from one set of 10,000 draws of the guide, made when first asked for and
    weighted by importance with Pareto smoothing.

    Args:
        guide: The fitted guide.
        log_joint: The model and its data.
        history: What happened during the fit.
        draws: The draws behind every statistic. Default: new ones.
        refit: Fits again from a seed. Default: nobody knows how.

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

    def __init__(self, guide: AutoFlow | Callable, log_joint: LogJoint, history: History,
                 draws: ImportanceSample | None = None,
                 refit: Callable[[int], Posterior] | None = None) -> None:
        self.guide, self.refit = guide, refit
        self.log_joint = log_joint
        self.history = history
        if draws is not None:
            self.draws = draws

    @classmethod
    def of(cls, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Posterior:
        """The posterior of any guide that is already fitted, by Pyro's ``SVI`` say.

        Args:
            model: The Pyro model.
            guide: The guide: one of this library, one of Pyro's own, or any function that Pyro
                takes as one.
            *args: Arguments of both, those of the fit. Tensors take on the floating-point type of
                a flow guide, which after :class:`~pyro_nfvi.NFVI` may be double precision.
            **kwargs: Likewise.

        Raises:
            ValueError: If the guide is not one for this model and these data, or an observed
                value is NaN.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> def model():
            ...     pyro.sample("x", dist.Normal(0.0, 1.0))
            >>> def guide():
            ...     pyro.sample("x", dist.Normal(0.1, 1.1))
            >>> Posterior.of(model, guide).ess > 9000
            True
        """
        _check_functions(model, guide)
        check_arguments("Posterior.of", model, args, kwargs)
        dtype = _own_dtype(guide)
        args, kwargs = converted((args, kwargs), dtype, None)
        with default_dtype(dtype):
            layout = _layout(model, guide, args, kwargs)
        log_joint = LogJoint(model, args, kwargs, layout, dtype)
        posterior = cls(guide, log_joint, History())
        with torch.no_grad():
            z, _ = posterior.density.rsample_and_log_prob((2,))
        check_sites("Posterior.of", log_joint)
        check_data("Posterior.of", log_joint, z[0])
        log_joint.try_batched(z)
        return posterior

    @property
    def density(self) -> Flow | GuideDraws:
        """What draws the flat unconstrained latent, and knows the density of its draws."""
        return self.guide._flow() if isinstance(self.guide, AutoFlow) else self._guide_draws

    @cached_property
    def _guide_draws(self) -> GuideDraws:
        log_joint = self.log_joint
        return GuideDraws(self.guide, log_joint.layout, log_joint.args, log_joint.kwargs)

    @property
    def engine(self) -> Engine | None:
        """How the last stage was computed: tier, why not a faster one, build time, step time."""
        return self.history.engines[-1] if self.history.engines else None

    # ------------------------------------------------------------------ draws

    @torch.no_grad()
    def sample(self, num_samples: int = 1000) -> dict[str, Tensor]:
        """Fresh draws of the guide, unweighted, ``(num_samples, *site.shape)`` by site."""
        check_positive_int("Posterior.sample", "num_samples", num_samples)
        z, _ = self.density.rsample_and_log_prob((num_samples,))
        return self.log_joint.layout.constrain(z)[0]

    @torch.no_grad()
    def resample(self, num_samples: int = 1000) -> dict[str, Tensor]:
        """Draws taken in proportion to their importance weights: closer to the posterior.

        Raises:
            ValueError: If ``num_samples`` is not a positive integer.
        """
        check_positive_int("Posterior.resample", "num_samples", num_samples)
        z = self.draws.z[self.draws.resample(num_samples)]
        return self.log_joint.layout.constrain(z)[0]

    def predict(self, *args: Any, num_samples: int = 1000, **kwargs: Any) -> dict[str, Tensor]:
        r"""Draws of what the model says of other arguments, new inputs say.

        .. math:: \tilde x \sim \int p(\tilde x \mid z)\, p(z \mid x)\, dz

        Latents are taken in proportion to their importance weights, and data drawn at each,
        whether they are given or not.

        Args:
            *args: Arguments of the model. Tensors take on the floating-point type of the fit.
            num_samples: Number of draws.
            **kwargs: Keyword arguments of the model.

        Returns:
            Values ``(num_samples, *shape)`` of each site of data and each deterministic site.

        Raises:
            ValueError: If ``num_samples`` is not a positive integer, or the latent sites are not
                those that were fitted, as one in a plate of another size.

        Example:
            >>> import pyro, pyro.distributions as dist
            >>> from pyro_nfvi import NFVI
            >>> def line(x, y=None):
            ...     slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
            ...     with pyro.plate("rows", len(x)):
            ...         pyro.sample("y", dist.Normal(slope * x, 0.1), obs=y)
            >>> x = torch.linspace(-1.0, 1.0, 20)
            >>> posterior = NFVI(line, seed=0, progress=False).run(x, 2 * x)
            >>> predicted = posterior.predict(torch.tensor([3.0, 4.0]))["y"]
            >>> predicted.shape, predicted.mean(0).round()
            (torch.Size([1000, 2]), tensor([6., 8.], dtype=torch.float64))
        """
        check_positive_int("Posterior.predict", "num_samples", num_samples)
        z = self.draws.z[self.draws.resample(num_samples)]
        return predictions(self._at(args, kwargs), z)

    def _at(self, args: tuple, kwargs: dict) -> LogJoint:
        """The log joint with other arguments."""
        fitted, device = self.log_joint, self.draws.z.device
        model, layout, dtype = fitted.given[0], fitted.layout, fitted.dtype
        check_arguments("Posterior.predict", model, args, kwargs)
        args, kwargs = converted((args, kwargs), dtype, device)
        with default_dtype(dtype):
            trace = quiet_trace(model, args, kwargs)
        for site in layout:
            compare_site("Posterior.predict", site.name, site.shape, trace, NEW_GROUPS)
        log_joint = LogJoint(model, args, kwargs, layout, dtype)
        log_joint.batched, log_joint.reason = fitted.batched, fitted.reason
        return log_joint

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log-density of the guide at constrained values ``(*sample, *site.shape)``.

        Raises:
            ValueError: If a site is missing, of another shape, or outside its support.
            NotImplementedError: If the guide is another's, and only gives densities of its draws.
        """
        layout = self.log_joint.layout
        z = layout.pack(values)
        return self.density.log_prob(z) - layout.constrain(z)[1]

    # ------------------------------------------------------------------ weights

    @cached_property
    def draws(self) -> ImportanceSample:
        """The draws behind every statistic, with their weights."""
        return importance_sample(self.density, self.log_joint, NUM_SAMPLES)

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
        data = self.to_arviz(groups=("posterior",))
        return summarize(data, self.draws, self.history, self.log_joint.layout)

    def to_arviz(self, num_samples: int = 4000, *, weighted: bool = True,
                 groups: Sequence[str] = GROUPS, coords: Mapping[str, Any] | None = None,
                 dims: Mapping[str, Sequence[str]] | None = None) -> Any:
        """ArviZ InferenceData (0.x) or DataTree (1.x) with one chain of draws.

        Groups: ``posterior`` (latent and deterministic sites), ``posterior_predictive``,
        ``log_likelihood`` (of each observation, so that ``az.loo`` and ``az.compare`` work),
        ``sample_stats`` (``lp``: log joint, ``log_q``: log guide density, ``log_weight``:
        smoothed and normalized; k-hat as an attribute), ``prior``, ``prior_predictive``,
        ``observed_data`` and ``constant_data`` (the model's other arguments). What cannot be
        had, such as draws of an improper prior, is left out; the attribute ``left_out`` of the
        posterior says why.

        Args:
            num_samples: Number of draws.
            weighted: Take draws in proportion to their importance weights; otherwise as they
                come, at most 10,000. The posterior's attribute ``weighting`` says which.
            groups: Names of the groups to make, the posterior among them.
            coords: Values along dimensions, by name of the plate.
            dims: Names of the rightmost dimensions of a site or of an argument of the model.

        Raises:
            ValueError: If ``num_samples``, ``groups``, ``coords`` or ``dims`` do not fit.
        """
        check_positive_int("Posterior.to_arviz", "num_samples", num_samples)
        check_flag("Posterior.to_arviz", "weighted", weighted)
        draws, limit = self.draws, min(num_samples, self.draws.num_samples)
        chosen = draws.resample(num_samples) if weighted else torch.arange(limit)
        stats = {"lp": draws.log_p, "log_q": draws.log_q, "log_weight": draws.log_weights}
        attrs = {"weighting": "importance-resampled" if weighted else "none: see log_weight"}
        return to_inference_data(
            self.log_joint, draws.z[None, chosen],
            {name: stat[None, chosen] for name, stat in stats.items()},
            groups=groups, coords=coords, dims=dims, attrs={**self._attrs(), **attrs})

    def _attrs(self) -> dict[str, Any]:
        value, error = self.elbo
        return {"inference_library": "pyro_nfvi", "guide": guide_name(self.guide),
                "pareto_k": self.pareto_k, "ess": self.ess, "elbo": value, "elbo_se": error}

    def diagnose(self, *, restarts: int = 0, n_jobs: int | None = None,
                 losses: Sequence[float] | None = None, progress: bool = True) -> Report:
        """A thorough look: everything that could be wrong, each with what to do about it.

        Beyond the weights that :meth:`summary` reads: k-hat of each latent site, the tails,
        short Hamiltonian chains that must stay where the draws are, a search for mass where the
        guide hardly draws, the slope of the ELBO and the noise of its gradient at the end, and
        fits from other seeds. It takes about as long as the fit.

        Args:
            restarts: How many fits from other seeds to compare this one with. They can run in
                parallel, on one thread each, through joblib: in processes by ``n_jobs``, or on a
                cluster by ``with joblib.parallel_config(backend="dask")`` (or ``"ray"``) around
                the call.
            n_jobs: Number of processes for them, -1 for one for each core. Default: what
                ``joblib.parallel_config`` says, else one after the other, here.
            losses: What ``svi.step`` returned, step by step, of a guide fitted by Pyro's SVI.
            progress: Whether to show a progress bar.

        Raises:
            ValueError: If ``restarts`` is not an integer of at least zero, or ``n_jobs`` is zero
                or no integer.
        """
        check_positive_int("Posterior.diagnose", "restarts", restarts, minimum=0)
        check_flag("Posterior.diagnose", "progress", progress)
        check_jobs("Posterior.diagnose", n_jobs)
        history = self.history if losses is None else History(_elbo_of(losses))
        fit = Fit(self.density, self.log_joint, self.draws, history, self.refit)
        return diagnose(fit, restarts, progress, n_jobs)

    # ------------------------------------------------------------------ rescue

    def metropolis(self, *, num_chains: int = 4, num_draws: int = 1000, warmup: int = 200,
                   seed: int | None = None, groups: Sequence[str] = GROUPS,
                   coords: Mapping[str, Any] | None = None,
                   dims: Mapping[str, Sequence[str]] | None = None) -> Any:
        """Exact draws, by chains that take draws of the guide or stay where they are.

        See :func:`pyro_nfvi.inference.metropolis`, and :meth:`to_arviz` for the last three
        options.

        Returns:
            InferenceData (ArviZ 0.x) or DataTree (1.x) of all chains.

        Raises:
            ValueError: If the guide is a point mass, which proposes nothing else.
        """
        if (found := spread(self.draws, self.log_joint.layout)).failed:
            raise ValueError("Posterior.metropolis expected a guide that draws every latent, but "
                             f"{found.words}: {found.action}.")
        chains = metropolis(self.density, self.log_joint, num_chains=num_chains,
                            num_draws=num_draws, warmup=warmup, seed=seed)
        return self._of_chains(chains, "Metropolis-Hastings", groups, coords, dims)

    def neutra(self, *, num_chains: int = 4, num_draws: int = 1000, warmup: int = 500,
               target_accept_prob: float = 0.8, seed: int | None = None, progress: bool = True,
               groups: Sequence[str] = GROUPS, coords: Mapping[str, Any] | None = None,
               dims: Mapping[str, Sequence[str]] | None = None) -> Any:
        """Exact draws, by Pyro's NUTS in the space that the guide has straightened.

        See :func:`pyro_nfvi.inference.neutra`, and :meth:`to_arviz` for the last three options.

        Returns:
            InferenceData (ArviZ 0.x) or DataTree (1.x) of all chains.
        """
        log_joint = self.log_joint
        model = partial(log_joint.model, *log_joint.args, **log_joint.kwargs)
        with default_dtype(log_joint.dtype):
            chains = neutra(model, self.guide, num_chains=num_chains, num_draws=num_draws,
                            warmup=warmup, target_accept_prob=target_accept_prob, seed=seed,
                            progress=progress)
        return self._of_chains(chains, "NeuTra NUTS", groups, coords, dims)

    def _of_chains(self, chains: Chains, method: str, groups: Sequence[str],
                   coords: Mapping[str, Any] | None, dims: Mapping[str, Sequence[str]] | None
                   ) -> Any:
        attrs = {**self._attrs(), "weighting": f"none needed: {method}"}
        return to_inference_data(self.log_joint, chains.z, chains.stats, groups=groups,
                                 coords=coords, dims=dims, attrs=attrs)

    # ------------------------------------------------------------------ pictures

    def plot_elbo(self, ax: Any = None) -> Any:
        """Plot the ELBO over the steps of the fit; returns matplotlib axes."""
        return plot_elbo(self.history, ax)

    def plot_weights(self, ax: Any = None) -> Any:
        """Plot the tail of the importance weights with its Pareto law; returns matplotlib axes."""
        return plot_weights(self.draws.log_p - self.draws.log_q, ax, threshold=self._max_pareto_k)

    def plot_pareto_k(self, ax: Any = None) -> Any:
        """Plot k-hat of each latent site; returns matplotlib axes."""
        return plot_pareto_k(self._site_pareto_k, self._max_pareto_k, ax)

    def plot_marginals(self, reference: Any = None, var_names: Sequence[str] | None = None) -> Any:
        """Plot the density of each number, beside a reference; returns a matplotlib figure.

        Args:
            reference: Draws to compare with: ArviZ data, or arrays ``(num_draws, *shape)`` by
                name.
            var_names: Names of the sites. Default: all, those with the worst k-hat first.

        Raises:
            ValueError: If the reference or a name does not fit.
        """
        data = self.to_arviz(groups=("posterior",))
        return plot_marginals(data, reference, var_names, pareto_k=self._site_pareto_k)

    def plot_pairs(self, reference: Any = None, var_names: Sequence[str] | None = None) -> Any:
        """Plot numbers against each other, as :meth:`plot_marginals` does one by one."""
        data = self.to_arviz(groups=("posterior",))
        return plot_pairs(data, reference, var_names, pareto_k=self._site_pareto_k)

    def plot_predictive(self, var_names: Sequence[str] | None = None) -> Any:
        """Plot the observed data among data simulated from the fit; returns a figure.

        Args:
            var_names: Names of the observed sites. Default: all.

        Raises:
            ValueError: If the data were those of a loader, which no fit holds.
        """
        if self.log_joint.num_rows is not None:
            raise ValueError("Posterior.plot_predictive compares with all data at once, which a "
                             "fit by a loader does not hold. For rows of your choice: "
                             "posterior.predict(x).")
        groups = ("posterior", "posterior_predictive", "observed_data")
        return plot_predictive(self.to_arviz(1000, groups=groups), var_names)

    @property
    def _max_pareto_k(self) -> float:
        return max_pareto_k(self.draws.num_samples)

    @property
    def _site_pareto_k(self) -> dict[str, float]:
        found = site_weights(self.draws, self.log_joint.layout)
        return {} if found is None else found.pareto_k

    def report(self, path: str | PathLike, *, title: str = "", reference: Any = None,
               restarts: int = 0, progress: bool = True) -> None:
        """Write one self-contained HTML page: verdict, diagnosis, table, pictures, how it was made.

        Args:
            path: The file; its folder has to exist.
            title: What the page is about. Default: the name of the model.
            reference: Draws to show beside these, as in :meth:`plot_marginals`.
            restarts: How many fits from other seeds to compare this one with.
            progress: Whether to show a progress bar.

        Raises:
            ValueError: If the folder does not exist, or the reference does not fit.
        """
        check_path("Posterior.report", path)
        found = self.diagnose(restarts=restarts, progress=progress)
        data = self.to_arviz(1000)
        model = getattr(self.log_joint.model, "__name__", "model")
        write_page(path, title=title or f"Posterior of {model}", report=found,
                   table=self.summary().table, numbers=self._numbers(), facts=self._facts(),
                   pictures=lambda: fit_pictures(
                       history=self.history, log_ratios=self.draws.log_p - self.draws.log_q,
                       site_pareto_k=found.site_pareto_k, data=data, reference=reference,
                       threshold=found.max_pareto_k))

    def _numbers(self) -> dict[str, Any]:
        value, error = self.elbo
        return {"ELBO": f"{value:.3f} \u00b1 {error:.3f}", "Pareto k-hat": f"{self.pareto_k:.2f}",
                "Effective draws": f"{self.ess:,.0f} of {self.draws.num_samples:,}"}

    def _facts(self) -> dict[str, Any]:
        history, z = self.history, self.draws.z
        stages = ", ".join(stage.name for stage in history.stages)
        facts = {"Guide": guide_name(self.guide), "Latents": z.shape[-1], "Precision": z.dtype,
                 "Stages": stages, "Steps": len(history.elbo),
                 "Seconds": f"{history.seconds:.1f}" if history.seconds else ""}
        return {**{name: fact for name, fact in facts.items() if fact != ""}, **versions()}

    # ------------------------------------------------------------------ files

    def save(self, path: str | PathLike) -> None:
        """Write the fit to a file, whole or not at all.

        The file holds tensors, numbers and names, no code: the flow's parameters, the model's
        arguments and its ``pyro.param`` values, and the history.

        Raises:
            ValueError: If the guide is not an AutoFlow, or an argument of the model is of a kind
                that a file cannot hold.
        """
        if not isinstance(self.guide, AutoFlow):
            raise ValueError(f"Posterior.save expected an AutoFlow guide, got "
                             f"{type_name(self.guide)}. Keep its draws: posterior.to_arviz()"
                             ".to_netcdf(path).")
        check_path("Posterior.save", path)
        storage.write(path, self.guide, self.log_joint, self.history)

    @classmethod
    def load(cls, path: str | PathLike, model: Callable, guide: AutoFlow | None = None,
             loader: Iterable | None = None) -> Posterior:
        """Read a fit; nothing in the file is executed.

        Args:
            path: The file.
            model: The Pyro model that was fitted.
            guide: A guide built as the fitted one was; needed only if its recipe is not one of
                :mod:`pyro_nfvi.flows`.
            loader: The minibatches that were fitted, if they were: files do not hold data of that
                size.

        Raises:
            ValueError: If the file is damaged, foreign or newer, or the guide or the loader does
                not fit it.
        """
        check_file_name("Posterior.load", path)
        if not callable(model):
            raise ValueError("Posterior.load expected `model` to be the Pyro model that was "
                             f"fitted, a function, got {type_name(model)}.")
        if guide is not None and not isinstance(guide, AutoFlow):
            raise ValueError("Posterior.load expected `guide` to be an AutoFlow or None, got "
                             f"{type_name(guide)}.")
        return cls(*storage.read(path, model, guide, loader))

    def __repr__(self) -> str:
        value, error = self.elbo
        return (f"Posterior({guide_name(self.guide)}, {self.log_joint.layout!r}, "
                f"ELBO {value:.3f} +- {error:.3f}, k-hat {self.pareto_k:.2f}, "
                f"ESS {self.ess:,.0f} of {self.draws.num_samples:,})")


def to_arviz(model: Callable, guide: Posterior | Callable, *args: Any, num_samples: int = 4000,
             weighted: bool = True, coords: Mapping[str, Any] | None = None,
             dims: Mapping[str, Sequence[str]] | None = None, **kwargs: Any) -> Any:
    """ArviZ data of a fitted guide, ours or any other of Pyro's.

    Args:
        model: The Pyro model.
        guide: The fitted guide, or a :class:`Posterior`.
        *args: Arguments of the model, those of the fit; a posterior knows them.
        num_samples: As the next three, see :meth:`Posterior.to_arviz`.
        weighted: Likewise.
        coords: Likewise.
        dims: Likewise.
        **kwargs: Keyword arguments of the model.

    Returns:
        InferenceData (ArviZ 0.x) or DataTree (1.x).

    Raises:
        ValueError: If the guide is not one for this model and these data, or an option does not
            fit.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> data = to_arviz(model, AutoNormal(model), torch.tensor(0.3), num_samples=100)
        >>> data.log_likelihood.y.shape
        (1, 100)
    """
    if isinstance(guide, Posterior) and not args and not kwargs:
        posterior = _same_model(guide, model)
    else:
        known = guide.guide if isinstance(guide, Posterior) else guide
        posterior = Posterior.of(model, known, *args, **kwargs)
    return posterior.to_arviz(num_samples, weighted=weighted, coords=coords, dims=dims)


def _same_model(posterior: Posterior, model: Any) -> Posterior:
    if model is not posterior.log_joint.model:
        raise ValueError("to_arviz expected the model that the posterior was fitted to, got "
                         "another. For the same guide with another model or other data, pass "
                         "the arguments too: to_arviz(model, posterior, *args).")
    return posterior


def _check_functions(model: Any, guide: Any) -> None:
    for name, value in (("model", model), ("guide", guide)):
        if not callable(value):
            raise ValueError(f"Posterior.of expected `{name}` to be a Pyro {name}, a function, got "
                             f"{type_name(value)}.")


def _elbo_of(losses: Any) -> list[float]:
    """Minus the losses."""
    try:
        return [-float(loss) for loss in losses]
    except (TypeError, ValueError, RuntimeError):
        raise ValueError("Posterior.diagnose expected `losses` to be numbers, what svi.step "
                         f"returned, got {losses!r}.") from None


def _own_dtype(guide: Callable) -> torch.dtype | None:
    """The floating-point type of a flow guide that is built, if it is not the default one."""
    if not isinstance(guide, AutoFlow) or guide.prototype_trace is None:
        return None
    dtype = guide._flow().base.zeros.dtype
    return None if dtype == torch.get_default_dtype() else dtype


def _layout(model: Callable, guide: Callable, args: tuple, kwargs: dict) -> LatentLayout:
    """Latent sites of the model, in the guide's order if it has one."""
    trace = prune_subsample_sites(quiet_trace(model, args, kwargs))
    check_prototype(type_name(guide), trace)
    layout = LatentLayout.from_trace(trace)
    if isinstance(guide, AutoFlow):
        guide.setup(*args, **kwargs)
        for site in guide.layout:
            compare_site(type_name(guide), site.name, site.shape, trace)
        layout = guide.layout
    return layout
