"""Local latents amortized over a plate, global ones beside them, as a drop-in Pyro guide."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.poutine import Trace
from torch import Tensor, nn

from pyro_nfvi._random import forked_rng
from pyro_nfvi._shapes import check_positive_float, check_positive_int, type_name
from pyro_nfvi.flows import Amortized, Compose, Diagonal, Flow, iaf
from pyro_nfvi.guides.auto_flow import (
    AutoFlow,
    as_bijection,
    check_built,
    check_callables,
    check_levels,
    checked_plates,
    first_value,
    quantiles_of,
    set_affine,
    with_options,
)
from pyro_nfvi.guides.encoder_rows import EncoderRows, attempt
from pyro_nfvi.guides.local_layout import LocalLayout, choose_plate, nodes_inside
from pyro_nfvi.guides.param_store import forget_store, registered
from pyro_nfvi.guides.plate_sizes import PlateSizes, Sizes, rows_of_plate
from pyro_nfvi.guides.prototype import check_prototype, is_subsampled, kind_of, quiet_trace
from pyro_nfvi.guides.pyro_dist import conditional, sample_value

NUM_QUANTILE_DRAWS = 2000
MAX_DRAWS_AT_ONCE = 200_000  # of one element each, to bound the memory of quantiles


class AutoAmortizedFlow(AutoGuide):
    r"""Guide of a hierarchical model: one flow for its globals, an amortized one for its locals.

    .. math:: q(\theta, z \mid x) = q(\theta) \prod_i q(z_i \mid e(x_i), g(\theta)), \qquad
              z_i = t + s \odot f(u_i;\, e(x_i), g)

    The latents of one plate, possibly subsampled, are local. Each element's are drawn from one
    conditional flow, given what the encoder :math:`e` says of the element's data and the global
    latents :math:`g` (in the coordinates in front of the affine map of their flow, where they
    are of unit scale). So the number of parameters does not grow with the data, a step costs
    a minibatch, and data the guide has not seen, of any length, need no new fit.

    Plates follow the model as it is called: the last, smaller minibatch and new data at
    prediction time are fine. If the encoder reads the outcome too, predict from
    :meth:`sample_posterior`: ``Predictive(model, guide.sample_posterior(100, x, y))(x)``.
    Dimensions of full plates nested with the local one belong to the element's vector.

    Args:
        model: A Pyro model whose latents are continuous.
        encoder: Module from rows ``(num_rows, ...)`` to features ``(num_rows, num_features)``.
            It reads rows in its own dtype; train or eval mode is the user's.
        recipe: Function from number of latents of one element, and number of context
            coordinates, to a bijection. Default: inverse autoregressive flow. From one that takes
            the former only comes a flow whose location and scale alone depend on the element.
        inputs: Function of the model's arguments that returns the encoder's rows, a tensor or a
            tuple of tensors whose first dimension runs over the plate: all of it, or the
            minibatch. Default: the one argument that does.
        plate: Name of the local plate. Default: the one subsampled plate that holds latents,
            else the one plate that does.
        global_guide: Function from a model of the global latents to an :class:`AutoFlow`, such
            as ``partial(AutoFlow, recipe=nsf)``.
        context_dim: Number of context coordinates of the recipe's flow.
        init_loc_fn: Per-site initialisation function of Pyro, for all latents. The local flow
            starts at the mean over the plate.
        init_scale: Standard deviation of the unconstrained local latents at the start.
        create_plates: Function of the model's arguments that returns its plates.
        **options: Options of the recipe, such as ``num_layers``.

    Raises:
        ValueError: If an argument is of another kind; at the first call, if the model has no
            local latent, a discrete one, or one in another subsampled plate, or if it cannot
            tell which plate is local or which argument the encoder reads.
        NotImplementedError: At the first call, if a latent is in a sequential plate.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("groups", len(x), subsample_size=min(len(x), 4)) as idx:
        ...         z = pyro.sample("z", dist.Normal(mu, 1.0))
        ...         x_i = dist.Normal(z.unsqueeze(-1), torch.ones(3)).to_event(1)
        ...         pyro.sample("x", x_i, obs=x[idx])
        >>> guide = AutoAmortizedFlow(model, nn.Linear(3, 8), num_layers=2)
        >>> guide(torch.randn(10, 3))["z"].shape
        torch.Size([4])
        >>> guide.sample_posterior(5, torch.randn(7, 3))["z"].shape
        torch.Size([5, 7])

    References:
        Agrawal & Domke (2021), Amortized Variational Inference for Simple Hierarchical Models,
        arXiv:2111.03144; Kingma & Welling (2014), Auto-Encoding Variational Bayes,
        arXiv:1312.6114; Rezende & Mohamed (2015), arXiv:1505.05770, section 4.2.
    """

    given_features: Tensor | None = None  # in place of the encoder's, while they are optimised
    local: LocalLayout  # set by the first call, as what follows
    plate: str
    prototype_trace: Any

    def __init__(self, model: Callable, encoder: nn.Module, recipe: Callable[..., Any] = iaf, *,
                 inputs: Callable | None = None, plate: str | None = None,
                 global_guide: Callable[[Callable], AutoFlow] = AutoFlow, context_dim: int = 16,
                 init_loc_fn: Callable = init_to_median, init_scale: float = 0.1,
                 create_plates: Callable | None = None, **options: Any) -> None:
        owner = type(self).__name__
        check_callables(owner, model=model, recipe=recipe, init_loc_fn=init_loc_fn,
                        global_guide=global_guide,
                        **({} if inputs is None else {"inputs": inputs}))
        if not isinstance(encoder, nn.Module):
            raise ValueError(f"{owner} expected `encoder` to be a torch.nn.Module, got "
                             f"{type_name(encoder)}.")
        if not isinstance(plate, (str, type(None))):
            raise ValueError(f"{owner} expected `plate` to be the name of a plate, got {plate!r}.")
        self.context_dim = check_positive_int(owner, "context_dim", context_dim)
        self.init_scale = check_positive_float(owner, "init_scale", init_scale)
        self.recipe = _conditional(owner, recipe, options)
        self._inputs, self._plate, self._global_recipe = inputs, plate, global_guide
        super().__init__(InitMessenger(partial(first_value, owner, init_loc_fn))(model),
                         create_plates=checked_plates(owner, create_plates))
        self.encoder = encoder

    # ------------------------------------------------------------------ building

    def setup(self, *args: Any, **kwargs: Any) -> AutoAmortizedFlow:
        """Build the flows' parameters for these model arguments, if not yet built.

        Returns:
            The guide itself.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self

    @torch.no_grad()
    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        owner, latents = type(self).__name__, self._trace_latents(args, kwargs)
        self.plate = choose_plate(owner, latents, self._plate) if latents.nodes else ""
        check_prototype(owner, latents, local=self.plate)
        if self.master is not None:
            self.master()._check_prototype(latents)
        self.local = LocalLayout.from_trace(owner, latents, self.plate)
        self._build_global(latents, args, kwargs)
        self.sizes = PlateSizes(owner, getattr(self.global_guide, "layout", None), self.local)
        frame = self.sizes(self.model, args, kwargs).frames[self.plate]
        self.rows = EncoderRows(owner, self._inputs, self.model, frame, args, kwargs)
        self._build_local(latents, frame.size, args, kwargs)
        self.prototype_trace = latents  # last: if something failed, the next call starts afresh

    def _trace_latents(self, args: tuple, kwargs: dict) -> Trace:
        trace = quiet_trace(self.model, args, kwargs)
        latents = trace.copy()
        for name, node in trace.nodes.items():
            if self._prototype_hide_fn(node):
                latents.remove_node(name)
        return latents

    def _check_prototype(self, part: Trace) -> None:
        """Pyro's hook for the parts of a list: the global guide saw this guide's own model."""

    def _build_global(self, latents: Trace, args: tuple, kwargs: dict) -> None:
        hidden = {node["name"] for node in nodes_inside(latents, self.plate)}
        self.global_guide: AutoFlow | None = None
        if hidden == set(latents.nodes):
            return
        guide = self._global_recipe(poutine.block(self.model, hide=sorted(hidden)))
        if not isinstance(guide, AutoFlow):
            raise ValueError(f"{type(self).__name__} expected `global_guide` to return an "
                             f"AutoFlow, got {type_name(guide)}.")
        self.global_guide = guide
        guide.setup(*args, **kwargs)

    def _build_local(self, latents: Trace, num_rows: int, args: tuple, kwargs: dict) -> None:
        owner, size = type(self).__name__, self.local.size
        values = {site.name: latents.nodes[site.name]["value"] for site in self.local}
        z = self.local.pack(owner, values, num_rows)
        made = as_bijection(owner, self.recipe(size, self.context_dim), size, self.context_dim)
        self.num_features = self._count_features(args, kwargs)
        num_globals = 0 if self.global_guide is None else self.global_guide.latent_dim
        layers = [Amortized(made, self.num_features + num_globals), Diagonal(size)]
        self.flow = Flow(Compose(layers)).to(dtype=z.dtype, device=z.device)
        set_affine(layers[-1], z.mean(0), self.init_scale)

    def _count_features(self, args: tuple, kwargs: dict) -> int:
        """Run the encoder once, in eval mode so that it learns nothing from that."""
        encoder = cast(nn.Module, self._modules["encoder"])
        modes = {module: module.training for module in encoder.modules()}
        encoder.eval()
        try:
            with forked_rng(), poutine.block():
                return self._features(encoder, self.rows(args, kwargs)).shape[-1]
        finally:
            for module, mode in modes.items():
                module.training = mode

    # ------------------------------------------------------------------ Pyro's contract

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site of the model.

        Returns:
            Constrained values by site name: of the plate's elements of the moment.

        Raises:
            ValueError: If the model's latent sites are no longer those the guide was built for,
                or the encoder cannot read its rows.
        """
        self.setup(*args, **kwargs)
        self._sizes = self._look_up(args, kwargs)
        plates = self._create_plates(*args, **kwargs)
        values, shared = self._sample_globals(args, kwargs)
        return {**values, **self._sample_locals(shared, plates, args, kwargs)}

    def _look_up(self, args: tuple, kwargs: dict) -> Sizes:
        """Sizes of the plates; without the model, as a pickle is, by the number of rows."""
        if self._model is not None:
            return self.sizes(self.model, args, kwargs)
        known = self.sizes.seen.get(kind_of((args, kwargs)))
        last = known or next(reversed(self.sizes.seen.values()))
        if known is None and is_subsampled(last.frames[self.plate]):
            name = type(self).__name__
            raise ValueError(
                f"{name} was loaded without its model, and cannot tell how arguments of a new kind "
                f"subsample plate {self.plate!r}. Build it anew, {name}(model, encoder).setup("
                "*args), and load the state_dict.")
        return known or last.resized(self.plate, self.rows(args, kwargs)[0].shape[0])

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, pyro.plate]:
        sizes = self._sizes
        self._prototype_frames = {name: frame for name, frame in sizes.frames.items()
                                  if name not in sizes.drawn_by_user}
        plates: dict[str, pyro.plate] = super()._create_plates(*args, **kwargs)
        if self.master is None:
            sizes.add_plates(plates, args, kwargs)
        blind = self.master is not None and self.master().create_plates is None
        for name in sizes.frames:
            if name not in plates or (blind and name in sizes.drawn_by_user):
                raise ValueError(
                    f"{type(self).__name__} cannot know the indices that the model gives plate "
                    f"{name!r}. Pass create_plates, a function of the model's arguments that "
                    "returns the plate (to the list, if the guide is part of one).")
        return plates

    def _sample_globals(self, args: tuple, kwargs: dict) -> tuple[dict[str, Tensor], Tensor | None]:
        guide = self.global_guide
        if guide is None:
            return {}, None
        with poutine.trace() as seen:
            values = guide(*args, **kwargs)
        latent = seen.trace.nodes[f"_{guide._pyro_name}_latent"]["value"]
        return values, self._unit_scale(latent)

    def _unit_scale(self, latent: Tensor) -> Tensor:
        """Global latents in front of the affine map (and frame) of their flow."""
        layers = cast(AutoFlow, self.global_guide)._modules["flow"].bijection.layers
        for layer in reversed(layers[1:]):
            latent, _ = layer.inverse(latent)
        return latent

    def _sample_locals(self, shared: Tensor | None, plates: dict[str, pyro.plate], args: tuple,
                       kwargs: dict) -> dict[str, Tensor]:
        rows = rows_of_plate(type(self).__name__, self.rows(args, kwargs), plates[self.plate])
        with plates[self.plate]:
            latent = self._sample_latent(shared, rows)
        values = {}
        for site in self.local:
            value, log_det = site.constrain(self.local.aligned(site, latent))
            values[site.name] = sample_value(site.name, value, log_det, site.element.event_dim,
                                             [plates[name] for name in site.frames])
        return values

    def _sample_latent(self, shared: Tensor | None, rows: tuple[Tensor, ...]) -> Tensor:
        flow = self._local_flow()
        features = self._features(registered(self, "encoder"), rows) \
            if self.given_features is None else self.given_features
        features = features.to(flow.base.zeros)
        right = (1,) * (-1 - self.local.dim)  # plates right of the local one
        features = features.reshape(features.shape[0], *right, features.shape[1])
        return pyro.sample(f"_{self._pyro_name}_latent",
                           conditional(flow, _joined(features, shared)),
                           infer={"is_auxiliary": True})

    def _features(self, encoder: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
        """What the encoder says of rows, which it reads in its own dtype."""
        like = next((p for p in encoder.parameters() if p.is_floating_point()), None)
        rows = tuple(row.to(like.dtype) if like is not None and row.is_floating_point() else row
                     for row in rows)
        shapes = ", ".join(str(tuple(row.shape)) for row in rows)
        return self._checked_features(rows[0].shape[0], attempt(
            f"{type(self).__name__}: `encoder` failed on rows of shape {shapes}",
            "It gets what `inputs` returns, the elements of the plate first.", encoder, *rows))

    def _checked_features(self, num_rows: int, features: Any) -> Tensor:
        known = self.__dict__.get("num_features")  # None while it is built
        if isinstance(features, Tensor) and features.dim() == 2 and features.shape[1] and \
                features.shape == (num_rows, known or features.shape[1]):
            return features
        got = tuple(features.shape) if isinstance(features, Tensor) else type_name(features)
        raise ValueError(f"{type(self).__name__} expected `encoder` to return features of shape "
                         f"({num_rows}, {known or 'num_features'}), got {got}. Flatten what it "
                         "returns: one vector for each element of the plate.")

    # ------------------------------------------------------------------ reading the posterior

    @torch.no_grad()
    def sample_posterior(self, num_samples: int, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw constrained values ``(num_samples, *site.shape)`` of every site.

        Args:
            num_samples: Number of draws.
            *args: Model arguments: local sites get a value for each row that they hold, whether
                or not the model draws minibatches.
            **kwargs: Likewise.

        Raises:
            ValueError: If ``num_samples`` is not a positive integer.
        """
        check_positive_int(type(self).__name__, "num_samples", num_samples)
        features = self._all_features(args, kwargs).expand(num_samples, -1, -1)
        values, shared = self._draw_globals(num_samples)
        z, _ = self._local_flow().rsample_and_log_prob((), _joined(features, _row(shared)))
        return {**values, **self.local.constrain(z)[0]}

    @torch.no_grad()
    def features(self, *args: Any, **kwargs: Any) -> Tensor:
        """Features ``(num_rows, num_features)`` of every row of these model arguments."""
        return self._all_features(args, kwargs)

    def log_prob(self, values: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Log-density of any constrained values ``(*sample, *site.shape)``.

        Args:
            values: Values by site; of local sites one for each row of the arguments.
            *args: Model arguments.
            **kwargs: Likewise.

        Returns:
            Log-densities of shape ``(*sample,)``.

        Raises:
            ValueError: If a site is missing, of another shape, or outside its support.
        """
        features, guide = self._all_features(args, kwargs), self.global_guide
        z = self.local.pack(type(self).__name__, values, features.shape[0])
        shared = None if guide is None else _row(self._unit_scale(guide.layout.pack(values)))
        log_prob = self._local_flow().log_prob(z, _joined(features, shared)).sum(-1)
        log_prob = log_prob - self.local.constrain(z)[1]
        return log_prob if guide is None else log_prob + guide.log_prob(values)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal medians (on the unconstrained scale, mapped to the support)."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Iterable[float] | Tensor, *args: Any, **kwargs: Any
                  ) -> dict[str, Tensor]:
        """Marginal quantiles ``(len(quantiles), *site.shape)`` of every site.

        They are taken of seeded draws, on the unconstrained scale, and mapped to the support;
        the global random state stays as it was.

        Raises:
            ValueError: If a quantile is not between 0 and 1.
        """
        features = self._all_features(args, kwargs)
        levels = check_levels(type(self).__name__, quantiles, features)
        with forked_rng(seed=0):
            _, shared = self._draw_globals(NUM_QUANTILE_DRAWS)
            parts = [self._local_quantiles(part, shared, levels) for part
                     in features.split(MAX_DRAWS_AT_ONCE // NUM_QUANTILE_DRAWS)]
        values, _ = self.local.constrain(torch.cat(parts, -2))
        return values if self.global_guide is None else {
            **self.global_guide.quantiles(levels), **values}

    def _local_quantiles(self, features: Tensor, shared: Tensor | None, levels: Tensor) -> Tensor:
        context = _joined(features.expand(NUM_QUANTILE_DRAWS, -1, -1), _row(shared))
        z, _ = self._local_flow().rsample_and_log_prob((), context)
        return quantiles_of(z.flatten(1), levels).reshape(len(levels), *z.shape[1:])

    def _draw_globals(self, num_samples: int) -> tuple[dict[str, Tensor], Tensor | None]:
        if self.global_guide is None:
            return {}, None
        z, _ = self.global_guide._flow().rsample_and_log_prob((num_samples,))
        return self.global_guide.layout.constrain(z)[0], self._unit_scale(z)

    def _all_features(self, args: tuple, kwargs: dict) -> Tensor:
        """Features of every row of these arguments."""
        check_built(self)
        features = self._features(registered(self, "encoder"), self.rows(args, kwargs))
        return features.to(self._local_flow().base.zeros)

    def _local_flow(self) -> Flow:
        return cast(Flow, registered(self, "flow"))

    # ------------------------------------------------------------------ copies

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load parameters into a guide that is already built.

        Raises:
            RuntimeError: If the guide is not built yet.
        """
        check_built(self)
        return super().load_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        forget_store(self)
        return {**self.__dict__, "_model": None, "master": None}  # a copy: self stays whole

    def __deepcopy__(self, memo: dict) -> AutoAmortizedFlow:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        shared = ("_model", "prototype_trace", "local", "recipe", "create_plates", "_inputs",
                  "_global_recipe", "plates", "_sizes")
        for name, value in self.__dict__.items():
            new.__dict__[name] = value if name in shared else copy.deepcopy(value, memo)
        if new.global_guide is not None and new.master is None:
            new.global_guide._update_master(weakref.ref(new))
        return new


def _conditional(owner: str, recipe: Callable[..., Any], options: dict[str, Any]
                 ) -> Callable[..., Any]:
    """The recipe, with its options, as a function of both dimensions."""
    try:
        inspect.signature(recipe).bind_partial(1, 1)
    except TypeError:
        return partial(_without_context, with_options(owner, recipe, options))
    except ValueError:  # a builtin without a signature
        pass
    return with_options(owner, recipe, options, 1, 1)


def _without_context(recipe: Callable[[int], Any], input_dim: int, context_dim: int) -> Any:
    return recipe(input_dim)


def _joined(features: Tensor, shared: Tensor | None) -> Tensor:
    """Context: features of the data, and global latents, side by side."""
    if shared is None:
        return features
    batch = torch.broadcast_shapes(features.shape[:-1], shared.shape[:-1])
    return torch.cat([features.expand(*batch, -1), shared.expand(*batch, -1)], -1)


def _row(shared: Tensor | None) -> Tensor | None:
    """Global latents with a dimension for the rows."""
    return None if shared is None else shared.unsqueeze(-2)
