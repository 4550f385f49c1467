"""NeuTra: NUTS in the coordinates of a fitted guide's noise."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions.util import sum_rightmost
from pyro.infer import NUTS
from pyro.infer.autoguide.guides import AutoContinuous
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample, init_to_value
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor
from tqdm.auto import tqdm

from pyro_nfvi._random import forked_rng
from pyro_nfvi._shapes import check_flag, check_positive_float, check_positive_int, type_name
from pyro_nfvi.engine import Compiled
from pyro_nfvi.guides import LatentLayout
from pyro_nfvi.inference.chains import Chains, check_not_noisy, check_options
from pyro_nfvi.inference.factors import FactorsOrNan
from pyro_nfvi.inference.log_joint import default_dtype

Potential = Callable[[Tensor], Tensor]  # noise (D,) -> minus the log density, up to a constant
NOISE = "noise"
WAY_OUT = "Pass the model and the data that the guide was fitted to."
NUM_COMPARED = 2  # places at which Pyro's density is compared with what it should be
MAX_TRIES = 100  # draws of the guide, to find one of finite density
FEWEST_FOR_SCALES = 150  # Pyro's windows of warm-up; in shorter ones the step size has no time
KINDS = {"diverging": torch.bool, "n_steps": torch.int64, "tree_depth": torch.int64}
LEAPFROGS = 8  # of a transition, about: how much compilation pays


def neutra(model: Callable, guide: AutoContinuous, *args: Any, num_chains: int = 4,
           num_draws: int = 1000, warmup: int = 500, target_accept_prob: float = 0.8,
           max_tree_depth: int = 10, seed: int | None = None, progress: bool = True,
           **kwargs: Any) -> Chains:
    r"""Exact draws through a fitted guide: Pyro's NUTS on Pyro's ``NeuTraReparam``.

    .. math:: U(u) = -\log p(x, f(u)) - \log|\det df/du|, \qquad z = f(u)

    The guide stays as it is, and only bends the space: where it fits, :math:`u` is close to its
    noise, which has neither scales nor funnels, and where it does not, NUTS still has the
    posterior as its limit. The density of the reparametrized model is recorded once and
    compiled; chains run one after the other, each from a draw of the guide. Discrete latents
    that the guide leaves out are summed over, as Pyro's NUTS does. Where the noise itself has
    separate modes, a chain stays in one, and R-hat says so: :func:`metropolis` crosses between
    them.

    Pyro's ``NeuTraReparam`` counts a Jacobian more than once where a constrained site is scaled
    or masked, and with Pyro's own guides where the first site is in a plate; if its density is
    not the model's at the draw, times the guide's Jacobian, then that is what is sampled.

    Ctrl-C returns the chains that are done, with a warning.

    Args:
        model: The Pyro model.
        guide: A fitted :class:`~pyro_nfvi.AutoFlow`, or a guide of Pyro's that maps noise to
            latents: ``AutoMultivariateNormal``, ``AutoIAFNormal`` or another
            ``AutoNormalizingFlow``, ``AutoDiagonalNormal``.
        *args: Arguments of the model.
        num_chains: Number of chains.
        num_draws: Draws of each.
        warmup: Draws of each before, which are dropped. They adapt the step size, and from 150 on
            the scales, which the guide has already made about one.
        target_accept_prob: Acceptance rate that the step size is adapted to.
        max_tree_depth: Largest number of doublings of a trajectory.
        seed: Makes the chains reproducible, and leaves the global random state as it was.
            Default: from the global random state.
        progress: Whether to show a progress bar.
        **kwargs: Keyword arguments of the model; one that is called as an option above goes in
            by ``functools.partial(model, seed=...)``.

    Returns:
        The chains, with statistics ``lp``, ``energy``, ``acceptance_rate``, ``diverging``,
        ``step_size``, ``n_steps`` and ``tree_depth``.

    Raises:
        ValueError: If the guide is of another kind, not built or not one for the model, the
            density is finite nowhere or differs from call to call, or an option is of another
            kind.

    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_nfvi import AutoPathfinder
        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        >>> guide = AutoPathfinder(model).setup()
        >>> neutra(model, guide, num_chains=2, num_draws=100, warmup=50, seed=0,
        ...        progress=False).z.shape
        torch.Size([2, 100, 2])

    References:
        Hoffman et al. (2019), NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural
        Transport, arXiv:1903.03704; Hoffman & Gelman (2014), The No-U-Turn Sampler,
        arXiv:1111.4246.
    """
    check_options("neutra", seed, num_chains=num_chains, num_draws=num_draws, warmup=warmup)
    check_flag("neutra", "progress", progress)
    options = {**_checked_options(target_accept_prob, max_tree_depth),
               "adapt_mass_matrix": warmup >= FEWEST_FOR_SCALES}
    _check_guide(guide)
    seeds = _seeds(seed, num_chains)
    with _surroundings(guide):
        with forked_rng(seeds[0]):
            target = _Target(_potential(model, guide, args, kwargs), _noise(guide),
                             LEAPFROGS * num_chains * (warmup + num_draws))
        runs = list(_runs(guide, target, seeds, warmup, num_draws, options, progress))
        chains = _as_chains(guide, runs)
        problem = target.changed()
    _warn(chains, num_chains, problem)
    return chains


# ---------------------------------------------------------------------- the density

def _potential(model: Callable, guide: AutoContinuous, args: tuple, kwargs: dict) -> Potential:
    """That of Pyro's reparametrized model, if it is what it should be; else what it should be."""
    layout = LatentLayout.from_trace(guide.prototype_trace)
    defined = _defined(model, guide, args, kwargs, layout)
    points = [_start(guide, defined) for _ in range(NUM_COMPARED)]
    check_not_noisy("neutra", defined, points[0])
    reparametrized = _reparametrized(model, guide, args, kwargs, layout)
    same = all(_same(reparametrized(u), defined(u)) for u in points)
    return reparametrized if same else defined


def _reparametrized(model: Callable, guide: AutoContinuous, args: tuple, kwargs: dict,
                    layout: LatentLayout) -> Potential:
    """The potential of the model that Pyro has reparametrized."""
    site = f"{next(iter(layout)).name}_shared_latent"
    bent = NeuTraReparam(guide).reparam(model)
    _, potential, _, _ = initialize_model(bent, args, kwargs, init_strategy=_values(guide, layout),
                                          initial_params={site: None})
    return _with_nan_for_factors(lambda u: potential({site: u}))


def _defined(model: Callable, guide: AutoContinuous, args: tuple, kwargs: dict,
             layout: LatentLayout) -> Potential:
    """The model's potential at the guide's draw, less the log-determinant of the guide."""
    begun = InitMessenger(_values(guide, layout))(model)
    try:
        _, potential, transforms, trace = initialize_model(
            begun, args, kwargs, initial_params={NOISE: None})
    except NotImplementedError as error:
        if "subsample" not in str(error):
            raise
        raise ValueError(f"neutra: {str(error).rstrip('.')}. Give the model all data: no "
                         "subsample_size.") from None
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"neutra: the model does not run at a draw of the guide "
                         f"({str(error).splitlines()[0]}). {WAY_OUT}") from error
    _check_sites(layout, transforms, trace.nodes)

    def defined(u: Tensor) -> Tensor:
        z, log_det = _latents(guide, u)
        return potential(layout.split(z)) - log_det
    return _with_nan_for_factors(defined)


def _values(guide: AutoContinuous, layout: LatentLayout) -> Callable:
    """What Pyro is to start its first look at a model from: a draw of the guide."""
    values, _ = layout.constrain(_latents(guide, _noise(guide))[0].detach())
    for value in values.values():
        value._pyro_custom_init = False  # no loss, tells Pyro, if NeuTraReparam has another
    chosen: Callable = init_to_value(values=values, fallback=init_to_sample)
    return chosen


def _latents(guide: AutoContinuous, u: Tensor) -> tuple[Tensor, Tensor]:
    """Flat latents of noise ``(*batch, D)``, and the log-determinants ``(*batch,)``."""
    transform = guide.get_transform()
    z = transform(u)
    log_det = transform.log_abs_det_jacobian(u, z)
    return z, sum_rightmost(log_det, log_det.dim() - u.dim() + 1)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two ways to one density agree, up to rounding."""
    eps = torch.finfo(a.dtype).eps
    return torch.allclose(a, b, rtol=64 * eps, atol=eps ** 0.5, equal_nan=True)


def _with_nan_for_factors(potential: Potential) -> Potential:
    """The potential, nan where a matrix has no factor or no inverse."""
    def careful(u: Tensor) -> Tensor:
        try:
            with FactorsOrNan():
                return potential(u)
        except torch.linalg.LinAlgError:
            return u.sum() * torch.nan
    return careful


class _Target:
    """A potential and its gradient, compiled and counted, as Pyro's NUTS calls it.

    Args:
        potential: The potential.
        u: Noise ``(D,)`` to record it at.
        num_calls: Number of calls planned.

    Attributes:
        calls: Number of calls so far.
    """

    def __init__(self, potential: Potential, u: Tensor, num_calls: int) -> None:
        self.potential, self.live, self.calls = potential, u.clone(), 0
        self.compiled = Compiled(self._in_python, [self.live], num_calls=num_calls)
        self.draws = [draw[0] for draw in self.compiled.draws(1)] \
            if self.compiled.recording is not None else None

    def __call__(self, params: Mapping[str, Tensor]) -> Tensor:
        """The potential at ``{NOISE: u}``, nan where it is not finite."""
        self.calls += 1
        value: Tensor = _Known.apply(params[NOISE], self)
        return value

    def value_and_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Potential and gradient at ``u``."""
        try:
            value, gradient = self.compiled.program([u], self.draws)  # type: ignore[arg-type]
        except torch.linalg.LinAlgError:
            value, gradient = u.new_tensor(torch.nan), torch.zeros_like(u)
        return value if value.isfinite() else u.new_tensor(torch.nan), gradient

    def both(self, u: Tensor) -> Tensor:
        """Potential and gradient at ``u`` in one tensor ``(1 + D,)``."""
        value, gradient = self.value_and_gradient(u)
        return torch.cat([value.reshape(1), gradient])

    def changed(self) -> str:
        """How the model differs by now from what was recorded; an empty string if it does not."""
        return self.compiled.agrees()

    def _in_python(self) -> list[Tensor]:
        with torch.enable_grad():
            u = self.live.detach().requires_grad_()
            value = self.potential(u)
            gradient, = torch.autograd.grad(value, u)
        return [value.detach(), gradient]


class _Known(torch.autograd.Function):
    """A value whose gradient is computed along with it."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, target: _Target) -> Tensor:
        value, ctx.gradient = target.value_and_gradient(u.detach())
        return value

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        return outer * ctx.gradient, None


# ---------------------------------------------------------------------- the chains

class _Kernel(NUTS):
    """Pyro's NUTS, which says what it did; Pyro keeps that in attributes of its own."""

    def __init__(self, target: _Target, **options: Any) -> None:
        super().__init__(potential_fn=target, **options)
        self._energy: float | None = 0.0
        self.n_steps = 0

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """One transition."""
        calls, self._energy = self.potential_fn.calls, None
        params = super().sample(params)
        self.n_steps = self.potential_fn.calls - calls
        return params

    def _kinetic_energy(self, r_unscaled: dict[Any, Tensor]) -> Tensor:
        kinetic: Tensor = super()._kinetic_energy(r_unscaled)
        if self._energy is None:  # where the trajectory starts
            self._energy = (kinetic + self._potential_energy_last).item()
        return kinetic

    def stats(self, mean_before: float) -> dict[str, float]:
        """Statistics of the last transition; its acceptance rate from the running mean."""
        count = self._t - self._warmup_steps
        rate = mean_before + count * (self._mean_accept_prob - mean_before)
        return {"potential": self._potential_energy_last.item(), "energy": self._energy,
                "acceptance_rate": min(max(rate, 0.0), 1.0), "step_size": self.step_size,
                "diverging": self._divergences[-1:] == [count - 1],
                "n_steps": self.n_steps, "tree_depth": self.n_steps.bit_length()}


@dataclass(frozen=True)
class _Run:
    """One chain: noise ``(num_draws, D)``, and statistics ``(num_draws,)``."""

    u: Tensor
    stats: dict[str, Tensor]


def _runs(guide: AutoContinuous, target: _Target, seeds: Sequence[int], warmup: int,
          num_draws: int, options: dict[str, Any], progress: bool) -> Iterator[_Run]:
    """Chain after chain; Ctrl-C ends them, if one is done."""
    total = len(seeds) * (warmup + num_draws)
    with tqdm(total=total, desc="neutra", disable=not progress) as bar:
        for done, seed in enumerate(seeds):
            try:
                with forked_rng(seed):
                    kernel = _Kernel(target, **options)
                    kernel.initial_params = {NOISE: _start(guide, target.both)}
                    bar.set_postfix_str(f"chain {done + 1} of {len(seeds)}")
                    run = _run(kernel, warmup, num_draws, bar)
            except KeyboardInterrupt:
                if not done:
                    raise
                return
            yield run


def _run(kernel: _Kernel, warmup: int, num_draws: int, bar: tqdm) -> _Run:
    kernel.setup(warmup)
    params, draws, stats = kernel.initial_params, [], []
    for step in range(warmup + num_draws):
        before = kernel._mean_accept_prob if step != warmup else 0.0
        params = kernel.sample(params)
        if step >= warmup:
            draws.append(params[NOISE].detach())
            stats.append(kernel.stats(before))
        bar.update()
    return _Run(torch.stack(draws), {name: torch.tensor([row[name] for row in stats],
                                                        dtype=KINDS.get(name, torch.float64))
                                     for name in stats[0]})


@torch.no_grad()
def _as_chains(guide: AutoContinuous, runs: Sequence[_Run]) -> Chains:
    """Noise as latents; potentials as log joints."""
    z, log_det = _latents(guide, torch.stack([run.u for run in runs]))
    stats = {name: torch.stack([run.stats[name] for run in runs]) for name in runs[0].stats}
    return Chains(z.cpu(), {"lp": -stats.pop("potential") - log_det.double().cpu(), **stats})


def _noise(guide: AutoContinuous) -> Tensor:
    """One draw ``(D,)`` of the guide's noise."""
    u: Tensor = guide.get_base_dist().sample()
    return u.detach()


def _start(guide: AutoContinuous, density: Callable[[Tensor], Tensor]) -> Tensor:
    """Noise at which a density is finite."""
    for _ in range(MAX_TRIES):
        u = _noise(guide)
        if density(u).isfinite().all():
            return u
    raise ValueError(f"neutra expected the density to be finite at some draws of the guide, got "
                     f"none at {MAX_TRIES}. Fit the guide first, and look for NaN in the data.")


@contextmanager
def _surroundings(guide: AutoContinuous) -> Iterator[None]:
    """The guide's dtype, and no checks of arguments, which read values."""
    with default_dtype(_dtype(guide)), pyro.validation_enabled(False):
        yield


def _dtype(guide: AutoContinuous) -> torch.dtype:
    with forked_rng():
        return _noise(guide).dtype


def _seeds(seed: int | None, num_chains: int) -> list[int]:
    """One seed a chain, the same for the first chains however many there are."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    seeds: list[int] = torch.randint(2 ** 62, (num_chains,), generator=generator).tolist()
    return seeds


def _warn(chains: Chains, num_chains: int, problem: str) -> None:
    if chains.num_chains < num_chains:
        warnings.warn(f"neutra was interrupted in chain {chains.num_chains + 1} of {num_chains}; "
                      "these are the chains before.", stacklevel=3)
    if chains.num_divergences:
        warnings.warn(f"neutra: {chains.num_divergences} of {chains.z[..., 0].numel():,} "
                      "transitions diverged: the chains may miss part of the posterior. Take "
                      "target_accept_prob=0.95, or a guide that fits better.", stacklevel=3)
    if problem:
        warnings.warn(f"neutra: the model changed while the chains ran ({problem}); they are not "
                      "to be trusted.", stacklevel=3)


# ---------------------------------------------------------------------- checks

def _checked_options(target_accept_prob: Any, max_tree_depth: Any) -> dict[str, Any]:
    check_positive_int("neutra", "max_tree_depth", max_tree_depth)
    if not check_positive_float("neutra", "target_accept_prob", target_accept_prob) < 1:
        raise ValueError("neutra expected `target_accept_prob` to be less than 1, got "
                         f"{target_accept_prob!r}.")
    return {"target_accept_prob": target_accept_prob, "max_tree_depth": max_tree_depth}


def _check_guide(guide: Any) -> None:
    """Refuse a guide that does not map noise to latents, or not yet."""
    name = type_name(guide)
    if isinstance(guide, AutoContinuous) and guide.prototype_trace is None:
        raise ValueError(f"neutra expected a fitted guide, got one of {name} that is not built. "
                         "Fit it first.")
    try:
        transform = guide.get_transform() if isinstance(guide, AutoContinuous) else None
    except (NotImplementedError, TypeError):  # it has none, or one for every datum
        transform = None
    if transform is None:
        raise ValueError("neutra expected `guide` to map noise to all latents, as an AutoFlow, "
                         f"AutoMultivariateNormal or AutoIAFNormal does, got {name}. Fit one of "
                         "those.")


def _check_sites(layout: LatentLayout, found: Iterable[str], nodes: Mapping[str, Any]) -> None:
    """Refuse a guide of other sites than the model's."""
    if new := sorted(set(found) - {site.name for site in layout}):
        raise ValueError(f"neutra expected `guide` to draw all latents of the model, {new[0]!r} is "
                         f"not among them ({', '.join(site.name for site in layout)}). {WAY_OUT}")
    for site in layout:
        fn = nodes[site.name]["fn"] if site.name in nodes else None
        shape = None if fn is None else tuple(fn.batch_shape + fn.event_shape)
        if shape != tuple(site.shape):
            raise ValueError(f"neutra expected the model's latents to be the guide's, "
                             f"{site.name!r} is of shape {tuple(site.shape)} in the guide and "
                             f"{'missing' if shape is None else shape} in the model. {WAY_OUT}")
