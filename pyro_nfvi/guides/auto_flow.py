"""One flow over all latents of a model, as a drop-in Pyro guide."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoContinuous, AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from torch import Tensor
from torch.distributions import Transform
from torch.func import functional_call

from pyro_nfvi._random import forked_rng
from pyro_nfvi._shapes import check_callables, check_positive_float, check_positive_int, type_name
from pyro_nfvi.flows import (
    Base,
    Bijection,
    BijectionTransform,
    Compose,
    Diagonal,
    Flow,
    FromTransform,
    Gaussian,
    Identity,
    Triangular,
    iaf,
    nsf,
    planar,
    radial,
    realnvp,
)
from pyro_nfvi.flows.fixed import FixedMap
from pyro_nfvi.guides.layout import LatentLayout, LatentSite
from pyro_nfvi.guides.param_store import forget_store, registered
from pyro_nfvi.guides.prototype import PrototypeCheck, check_prototype, has_map
from pyro_nfvi.guides.pyro_dist import LatentDistribution, NoiseDistribution, sample_value

Recipe = Callable[[int], Any]  # number of latents -> Bijection, or any torch transform
NUM_QUANTILE_DRAWS = 4000


class AutoFlow(AutoContinuous):
    r"""Guide that draws all latents of a model from one normalizing flow.

    .. math:: u \sim p, \qquad z = t + A f(u), \qquad
              \text{value}_s = \mathrm{biject\_to}(\text{support}_s)(z_s)

    :math:`f` is the flow of ``recipe``, which starts as the identity; the affine map after it
    starts at the location of ``init_loc_fn`` with scale ``init_scale``. The guide follows the
    dtype and device of the model, and works wherever Pyro takes an ``AutoContinuous`` guide:
    ``SVI`` with every ``Trace*_ELBO``, ``Predictive``, ``NeuTraReparam``, ``AutoGuideList``.

    As every Pyro guide it is built at its first call; :meth:`setup` builds it before, for an
    optimiser that asks for ``guide.parameters()``.

    Args:
        model: A Pyro model whose latents are continuous.
        recipe: Function from the number of latents to a bijection (or to any torch, Pyro or
            Zuko transform), such as :func:`~pyro_nfvi.flows.nsf`. Default: Real NVP.
        init_loc_fn: Per-site initialisation function of Pyro.
        init_scale: Standard deviation of the unconstrained latents at the start.
        base: Function from the number of latents to the noise. Default: Gaussian.
        affine: Function from the number of latents to the affine map:
            :class:`~pyro_nfvi.flows.Diagonal` (the default), say, or
            :class:`~pyro_nfvi.flows.Triangular`.
        create_plates: Function of the model's arguments that returns its plates, for data
            subsampling.
        **options: Options of the recipe, such as ``num_layers``.

    Raises:
        ValueError: If an argument is of another kind, or the recipe takes no such option; at
            the first call, if the model has no latent, a discrete one, or one that is local to
            a subsampled plate.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        >>> guide = AutoFlow(model, planar, num_layers=2)
        >>> guide()["x"].shape, guide.sample_posterior(5)["x"].shape
        (torch.Size([3]), torch.Size([5, 3]))

    References:
        Rezende & Mohamed (2015), Variational Inference with Normalizing Flows,
        arXiv:1505.05770; Kucukelbir et al. (2017), Automatic Differentiation Variational
        Inference, arXiv:1603.00788 (the map to the reals).
    """

    default_recipe: Recipe = staticmethod(realnvp)
    default_affine: Callable[[int], Bijection] = Diagonal
    layout: LatentLayout  # set by the first call, as what follows
    prototype_trace: Any

    def __init__(self, model: Callable, recipe: Recipe | None = None, *,
                 init_loc_fn: Callable = init_to_median, init_scale: float = 0.1,
                 base: Callable[[int], Base] = Gaussian,
                 affine: Callable[[int], Bijection] | None = None,
                 create_plates: Callable | None = None, **options: Any) -> None:
        owner = type(self).__name__
        recipe = type(self).default_recipe if recipe is None else recipe
        affine = type(self).default_affine if affine is None else affine
        check_callables(owner, model=model, recipe=recipe, init_loc_fn=init_loc_fn, base=base,
                        affine=affine)
        self.init_scale = check_positive_float(owner, "init_scale", init_scale)
        self.recipe = with_options(owner, recipe, options)
        self._base_recipe, self._affine_recipe = base, affine
        start = partial(first_value, owner, init_loc_fn)
        AutoGuide.__init__(self, InitMessenger(start)(model),
                           create_plates=checked_plates(owner, create_plates))

    # ------------------------------------------------------------------ building

    def setup(self, *args: Any, **kwargs: Any) -> AutoFlow:
        """Build the flow's parameters for these model arguments, if not yet built.

        Returns:
            The guide itself.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
            if self.master is None:  # NeuTraReparam reads the plates
                with poutine.block():
                    self._create_plates(*args, **kwargs)
        return self

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            try:
                self._trace_prototype(args, kwargs)
                self._build()
            except Exception:
                self.prototype_trace = None  # the next call starts afresh
                raise
        self._check = PrototypeCheck(type(self).__name__, self.layout, args, kwargs)

    def _trace_prototype(self, args: tuple, kwargs: dict) -> None:
        try:
            AutoGuide._setup_prototype(self, *args, **kwargs)
        except NotImplementedError:  # as a latent is in a sequential plate: not in our words
            if self.prototype_trace is not None:
                check_prototype(type(self).__name__, self.prototype_trace)
            raise

    def _build(self) -> None:
        check_prototype(type(self).__name__, self.prototype_trace)
        self.layout = LatentLayout.from_trace(self.prototype_trace)
        # What AutoContinuous and NeuTraReparam read:
        self.latent_dim = self.layout.size
        self._unconstrained_shapes = {s.name: s.unconstrained_shape for s in self.layout}
        self._cond_indep_stacks = {name: node["cond_indep_stack"] for name, node
                                   in self.prototype_trace.iter_stochastic_nodes()}
        loc = self._init_loc()
        flow = Flow(Compose([self._bijection(), self._affine_recipe(self.latent_dim)]),
                    self._base_recipe(self.latent_dim))
        self.flow = flow.to(dtype=loc.dtype, device=loc.device)
        set_affine(flow.bijection.layers[-1], loc, self.init_scale)

    @property
    def untouched(self) -> bool:
        """Whether nothing has moved its parameters since it was built."""
        if self.prototype_trace is None:
            return True
        _, affine, *frame = self._modules["flow"].bijection.layers
        return not frame and bool(
            torch.equal(affine.shift.value, self._init_loc().to(affine.shift.value))
            and (affine.log_scale.value == affine.log_scale.value.new_tensor(
                math.log(self.init_scale))).all())

    def whiten(self, frame: FixedMap, base: Base | None = None,
               affine: Bijection | None = None) -> AutoFlow:
        """Start over inside fixed coordinates, those of a Gaussian fitted before, say.

        The flow and its affine map, the identity again, then work between ``base`` and
        ``frame``: wherever the posterior is and however it is scaled, steps of one size suit it.

        Args:
            frame: A :class:`~pyro_nfvi.flows.FixedLinear` or
                :class:`~pyro_nfvi.flows.FixedLowRank` of as many coordinates.
            base: Noise. Default: the guide's own.
            affine: Affine map between the flow and the frame. Default: the guide's own, anew.

        Returns:
            The guide itself.

        Raises:
            ValueError: If the noise is that of angles, which such coordinates do not fit.
        """
        if self._modules["flow"].base.periodic:
            raise ValueError(f"{type(self).__name__}.whiten expected noise over the reals, got "
                             f"{self._modules['flow'].base!r}. Train the guide without a frame.")
        flow, like = self._modules["flow"], frame.shift  # _flow() would leave it in Pyro's store
        affine = self._affine_recipe(self.latent_dim) if affine is None else affine
        layers = [self._bijection(), affine, frame]
        self.flow = Flow(Compose(layers), flow.base if base is None else base).to(like)
        return self

    def _bijection(self) -> Bijection:
        return as_bijection(type(self).__name__, self.recipe(self.latent_dim), self.latent_dim)

    def _flow(self) -> Flow:
        """The flow, its parameters registered with Pyro if this is a step of Pyro's."""
        check_built(self)
        return cast(Flow, registered(self, "flow"))

    # ------------------------------------------------------------------ Pyro's contract

    def get_base_dist(self) -> NoiseDistribution:
        """Distribution of the noise."""
        flow = self._flow()
        return NoiseDistribution(flow.base, surplus=self._surplus_in_neutra(),
                                 log_det=lambda u: flow.bijection(u)[1])

    def get_transform(self, *args: Any, **kwargs: Any) -> BijectionTransform:
        """Transform from the noise to the flat unconstrained latent."""
        return BijectionTransform(self._flow().bijection)

    def get_posterior(self, *args: Any, **kwargs: Any) -> LatentDistribution:
        """Distribution of the flat unconstrained latent."""
        return LatentDistribution(self.get_base_dist(), self.get_transform(), self._loc_scale)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site of the model.

        Returns:
            Constrained values by site name.

        Raises:
            ValueError: If the model's latent sites are no longer those the guide was built for.
        """
        self.setup(*args, **kwargs)
        if self._model is not None:
            self._check(self.model, args, kwargs)
        latent = self.sample_latent(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        return {site.name: self._sample_site(site, unconstrained, plates)
                for site, unconstrained in self._aligned(latent)}

    def _sample_site(self, site: LatentSite, unconstrained: Tensor, plates: dict) -> Tensor:
        value, log_det = site.constrain(unconstrained)
        frames = self._cond_indep_stacks[site.name]
        return sample_value(site.name, value, log_det, site.event_dim,
                            [plates[frame.name] for frame in frames])

    def _aligned(self, latent: Tensor) -> Iterator[tuple[LatentSite, Tensor]]:
        """Slices whose batch dimensions (of particles) are aligned with the site's plates."""
        for site in self.layout:
            part = latent[..., site.start:site.start + site.size]
            batch = torch.broadcast_shapes(latent.shape[:-1], site.batch_shape)
            event = site.unconstrained_shape[len(site.batch_shape):]
            yield site, part.reshape(batch + event)

    def _unpack_latent(self, latent: Tensor) -> Iterator[tuple[dict, Tensor]]:
        for site, unconstrained in self._aligned(latent):
            yield self.prototype_trace.nodes[site.name], unconstrained

    def _surplus_in_neutra(self) -> float:
        """How often NeuTraReparam counts beyond once what it adds to the first site's density.

        In units of what it counts of the noise, which is in the site's mask and scale but not in
        its plates.
        """
        node = next(iter(self.prototype_trace.iter_stochastic_nodes()))[1]
        weight = torch.as_tensor(node["scale"]) * (1 if node["mask"] is None else node["mask"])
        of_site = weight.expand(torch.broadcast_shapes(weight.shape, node["fn"].batch_shape)).sum()
        of_noise = weight.sum()
        return float((of_site - 1) / of_noise) if of_noise else 0.0

    # ------------------------------------------------------------------ reading the posterior

    @torch.no_grad()
    def sample_posterior(self, num_samples: int) -> dict[str, Tensor]:
        """Draw constrained values ``(num_samples, *site.shape)`` of every site.

        Raises:
            ValueError: If ``num_samples`` is not a positive integer.
        """
        check_positive_int(type(self).__name__, "num_samples", num_samples)
        z, _ = self._flow().rsample_and_log_prob((num_samples,))
        return self.layout.constrain(z)[0]

    def log_prob(self, values: dict[str, Tensor]) -> Tensor:
        """Log-density of any constrained values ``(*sample, *site.shape)``.

        Returns:
            Log-densities of shape ``(*sample,)``.

        Raises:
            ValueError: If a site is missing, of another shape, or outside its support.
        """
        flow = self._flow()
        z = self.layout.pack(values)
        return flow.log_prob(z) - self.layout.constrain(z)[1]

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal medians (on the unconstrained scale, mapped to the support)."""
        return {name: value[0] for name, value in self.quantiles([0.5]).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Iterable[float] | Tensor, *args: Any, **kwargs: Any
                  ) -> dict[str, Tensor]:
        """Marginal quantiles ``(len(quantiles), *site.shape)`` of every site.

        They are taken of seeded draws, on the unconstrained scale, and mapped to the support;
        the global random state stays as it was.

        Raises:
            ValueError: If a quantile is not between 0 and 1.
        """
        shift, centred = self._centred_draws()
        levels = check_levels(type(self).__name__, quantiles, shift)
        return self.layout.constrain(shift + quantiles_of(centred, levels))[0]

    @torch.no_grad()
    def _loc_scale(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        shift, centred = self._centred_draws()
        return shift + centred.mean(0), centred.std(0)

    def _centred_draws(self) -> tuple[Tensor, Tensor]:
        """Location of the affine map, and draws relative to it.

        Kept apart, so that a scale far below the location survives float32. Draws come with
        their mirror images where the noise is symmetric: at the start the median is then the
        location, exactly.
        """
        flow = self._flow()
        with forked_rng(seed=0):
            u = flow.base.rsample((NUM_QUANTILE_DRAWS // 2,))
        u = torch.cat([u, -u, torch.zeros_like(u[:1])]) if flow.base.symmetric else u
        inner, affine, *frame = flow.bijection.layers
        shift = affine.shift()
        zero = {"shift.value": torch.zeros_like(shift)}
        centred = functional_call(affine, zero, (inner(u)[0],))[0]
        for layer in frame:
            shift, _ = layer(shift)
            centred = functional_call(layer, {"shift": torch.zeros_like(shift)}, (centred,))[0]
        return shift, centred

    # ------------------------------------------------------------------ copies

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load parameters into a guide that is already built.

        Raises:
            RuntimeError: If the guide is not built yet.
        """
        self._flow()
        return super().load_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        forget_store(self)
        return {**self.__dict__, "_model": None, "master": None}  # a copy: self stays whole

    def __deepcopy__(self, memo: dict) -> AutoFlow:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        shared = ("_model", "prototype_trace", "layout", "recipe", "create_plates", "_check",
                  "_cond_indep_stacks", "plates")
        for name, value in self.__dict__.items():
            new.__dict__[name] = value if name in shared else copy.deepcopy(value, memo)
        return new


class AutoGaussian(AutoFlow):
    """:class:`AutoFlow` without a flow: a Gaussian, or another base under an affine map.

    Its ``affine`` map decides which Gaussian: :class:`~pyro_nfvi.flows.Triangular` (full
    covariance, the default), :class:`~pyro_nfvi.flows.LowRank` or
    :class:`~pyro_nfvi.flows.Diagonal`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        >>> AutoGaussian(model).setup().log_prob({"x": torch.zeros(5, 3)}).shape
        torch.Size([5])
    """

    default_recipe = Identity
    default_affine = Triangular


class AutoPlanar(AutoFlow):
    """:class:`AutoFlow` with a planar flow (Rezende & Mohamed 2015).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        >>> AutoPlanar(model, num_layers=4).setup().sample_posterior(5)["x"].shape
        torch.Size([5, 3])
    """

    default_recipe = staticmethod(planar)


class AutoRadial(AutoFlow):
    """:class:`AutoFlow` with a radial flow (Rezende & Mohamed 2015).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        >>> AutoRadial(model, num_layers=4).setup().sample_posterior(5)["x"].shape
        torch.Size([5, 3])
    """

    default_recipe = staticmethod(radial)


class AutoIAF(AutoFlow):
    """:class:`AutoFlow` with an inverse autoregressive flow (Kingma et al. 2016).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        >>> AutoIAF(model, num_layers=2).setup().sample_posterior(5)["x"].shape
        torch.Size([5, 3])
    """

    default_recipe = staticmethod(iaf)


class AutoSpline(AutoFlow):
    """:class:`AutoFlow` with a neural spline flow (Durkan et al. 2019).

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        >>> AutoSpline(model, num_bins=6).setup().sample_posterior(5)["x"].shape
        torch.Size([5, 3])
    """

    default_recipe = staticmethod(nsf)


def first_value(owner: str, init_loc_fn: Callable, site: dict[str, Any]) -> Tensor:
    """What a site's initialisation function gives, which is a tensor.

    A site that no guide over the reals has gets a draw: :func:`check_prototype` names it later.

    Raises:
        ValueError: If it is anything else.
    """
    if site["is_observed"] or has_map(site["fn"]):
        try:
            value = init_loc_fn(site)
        except TypeError as error:
            raise ValueError(f"{owner} expected `init_loc_fn` to be a function of a site, a dict "
                             f"as in a trace, got TypeError: {error}.") from error
    else:
        value = site["fn"].sample()
    if not isinstance(value, Tensor):
        raise ValueError(f"{owner} expected `init_loc_fn` to return a tensor for each site, got "
                         f"{type_name(value)} for {site['name']!r}. Take one of Pyro's: "
                         "pyro.infer.autoguide.init_to_median.")
    if bad := int((~value.isfinite()).sum()):
        raise ValueError(f"{owner} expected `init_loc_fn` to return finite values for each site, "
                         f"got {bad} of {site['name']!r} that are not. Start elsewhere: "
                         "init_loc_fn=pyro.infer.autoguide.init_to_feasible.")
    return value


def checked_plates(owner: str, create_plates: Any) -> Callable | None:
    """The function that makes plates, whose results are checked.

    Raises:
        ValueError: If it is no function.
    """
    if create_plates is None:
        return None
    check_callables(owner, create_plates=create_plates)
    return partial(_plates, owner, create_plates)


def _plates(owner: str, create_plates: Callable, *args: Any, **kwargs: Any) -> list[pyro.plate]:
    made = create_plates(*args, **kwargs)
    plates = [made] if isinstance(made, pyro.plate) else \
        list(made) if isinstance(made, Iterable) else [made]
    for plate in plates:
        if not isinstance(plate, pyro.plate):
            raise ValueError(f"{owner} expected `create_plates` to return a pyro.plate or several, "
                             f"got {type_name(plate)}.")
    return plates


def check_built(guide: AutoGuide) -> None:
    """Check that a guide has been called, or set up.

    Raises:
        RuntimeError: If it has not.
    """
    if guide.prototype_trace is None:
        name = type(guide).__name__
        raise RuntimeError(f"{name} is built at its first call. Call it with the model's "
                           f"arguments, or {name}.setup(*args), first.")


def check_levels(owner: str, quantiles: Iterable[float] | Tensor, like: Tensor) -> Tensor:
    """Quantile levels as a tensor like ``like``.

    Raises:
        ValueError: If one is not between 0 and 1.
    """
    try:
        levels = torch.as_tensor(quantiles, dtype=like.dtype, device=like.device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{owner} expected `quantiles` to be numbers such as [0.1, 0.9], got "
                         f"{quantiles!r}.") from None
    levels = levels.reshape(1) if levels.dim() == 0 else levels
    if levels.dim() != 1 or not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(f"{owner} expected `quantiles` between 0 and 1, got {levels.tolist()}.")
    return levels


def with_options(owner: str, recipe: Recipe, options: dict[str, Any], *dims: int) -> Recipe:
    """The recipe with its options, which are checked at once.

    Args:
        owner: Name of the guide, for messages.
        recipe: The recipe.
        options: Its options.
        *dims: Dimensions it will be called with. Default: one.

    Raises:
        ValueError: If it takes no such option.
    """
    dims = dims or (1,)
    try:
        signature = inspect.signature(recipe)
        signature.bind(*dims, **options)
    except ValueError:  # a builtin without a signature
        return partial(recipe, **options) if options else recipe
    except TypeError as error:
        known = [name for name in list(signature.parameters)[1:] if name != "context_dim"]
        raise ValueError(f"{owner}: {error}. {_name(recipe)} takes {', '.join(known)}.") from None
    return partial(recipe, **options) if options else recipe


def as_bijection(owner: str, made: Any, input_dim: int, context_dim: int = 0) -> Bijection:
    """What a recipe returned, as a bijection.

    Raises:
        ValueError: If it is neither a bijection nor a transform.
    """
    if isinstance(made, Bijection):
        return made
    if isinstance(made, Transform):
        return FromTransform(made, input_dim)
    if isinstance(made, torch.nn.Module) and callable(made):  # a lazy transform of Zuko's
        return FromTransform(made, input_dim, context_dim)
    raise ValueError(f"{owner} expected `recipe` to return a Bijection or a transform, got "
                     f"{type_name(made)}.")


def _name(recipe: Recipe) -> str:
    return getattr(recipe, "__name__", type_name(recipe))


@torch.no_grad()
def set_affine(affine: Any, loc: Tensor, scale: float) -> None:
    """Let an affine map start at this location and scale."""
    affine.shift.value.copy_(loc)
    affine.log_scale.value.fill_(math.log(scale))


def quantiles_of(draws: Tensor, levels: Tensor) -> Tensor:
    """Quantiles over the first dimension, interpolated linearly."""
    ordered = draws.sort(0).values
    place = levels * (len(draws) - 1)
    low = place.floor().long()
    high = place.ceil().long()
    return torch.lerp(ordered[low], ordered[high], (place - low).unsqueeze(-1))
