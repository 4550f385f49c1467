"""Variational autoencoder: a model and a guide for one latent a datum, in Pyro's words."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from os import PathLike
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_nfvi._shapes import check_positive_int, check_tensor, type_name
from pyro_nfvi.guides.encoder_rows import attempt
from pyro_nfvi.guides.param_store import forget_store, free_name, register_parameters
from pyro_nfvi.inference import ArrayLoader, Checkpoint
from pyro_nfvi.inference.amortization import AmortizationGap
from pyro_nfvi.vae import evaluate
from pyro_nfvi.vae.data import Data, checked_data, checked_loader, shaped_data
from pyro_nfvi.vae.decoders import MLPDecoder
from pyro_nfvi.vae.encoders import MLPEncoder, features_of, takes_mask
from pyro_nfvi.vae.evaluate import LogLikelihood, evaluating
from pyro_nfvi.vae.files import read_state, write_state
from pyro_nfvi.vae.likelihoods import Likelihood
from pyro_nfvi.vae.objective import elbo_terms
from pyro_nfvi.vae.posteriors import AmortizedPosterior, DiagonalGaussian
from pyro_nfvi.vae.priors import Prior, StandardGaussian, VampPrior
from pyro_nfvi.vae.training import TrainingHistory, train

MEAN_DRAWS = 64  # of a posterior whose mean has no formula


class VAE(nn.Module):
    r"""Variational autoencoder.

    .. math:: z_n \sim p(z), \quad x_n \sim p(x \mid \mathrm{decoder}(z_n)), \qquad
              q(z_n \mid x_n) = q(z \mid \mathrm{encoder}(x_n))

    :meth:`fit` trains it in one call; :attr:`model` and :attr:`guide` go into Pyro's ``SVI`` with
    any ELBO. What looks at a fit (:meth:`elbo`, :meth:`reconstruct` and the like) does so in
    evaluation mode, without dropout.

    Args:
        likelihood: Distribution of the data, which knows the shape of one datum.
        latent_dim: Number of latent coordinates.
        encoder: Any module that maps data ``(batch, *event_shape)`` to features
            ``(batch, output_dim)``. Default: :class:`~pyro_nfvi.vae.MLPEncoder`.
        decoder: Any module that maps ``(batch, latent_dim)`` to the likelihood's parameters
            ``(batch, num_params, *event_shape)``. Default: :class:`~pyro_nfvi.vae.MLPDecoder`.
        posterior: Function of ``(feature_dim, latent_dim)`` that builds the posterior:
            :class:`~pyro_nfvi.vae.DiagonalGaussian` (the default),
            :class:`~pyro_nfvi.vae.FullGaussian`, or
            ``partial(FlowPosterior, recipe=iaf)``.
        prior: Distribution of the latent. Default: :class:`~pyro_nfvi.vae.StandardGaussian`.
        name: Name of its parameters in Pyro's param store. A second one of this name in a process
            gets a number.

    Shape:
        x, mask: ``(num_data, *event_shape)``; the mask is true where an entry was seen. Sequences
        of different lengths may come as a ``PackedSequence``.

    Raises:
        ValueError: If an argument is of another kind, or data have another shape.

    Example:
        >>> from pyro_nfvi.vae import VAE, Bernoulli
        >>> vae = VAE(Bernoulli((8, 8)), latent_dim=2)
        >>> x = torch.rand(100, 8, 8).round()
        >>> history = vae.fit(x, num_epochs=2, seed=0, progress=False)
        >>> vae.latents(x, num_samples=5).shape, vae.generate(3).shape
        (torch.Size([5, 100, 2]), torch.Size([3, 8, 8]))

    References:
        Kingma & Welling (2014), Auto-Encoding Variational Bayes, arXiv:1312.6114; Rezende,
        Mohamed & Wierstra (2014), arXiv:1401.4082.
    """

    def __init__(self, likelihood: Likelihood, latent_dim: int, *,
                 encoder: nn.Module | None = None, decoder: nn.Module | None = None,
                 posterior: Callable[[int, int], AmortizedPosterior] = DiagonalGaussian,
                 prior: Prior | None = None, name: str = "vae") -> None:
        super().__init__()
        self.likelihood = _checked_part("likelihood", likelihood, Likelihood)
        self.latent_dim = check_positive_int("VAE", "latent_dim", latent_dim)
        shape = likelihood.event_shape
        self.encoder = MLPEncoder(likelihood.input_shape(shape)) if encoder is None else \
            _checked_part("encoder", encoder, nn.Module)
        self.decoder = MLPDecoder(latent_dim, shape, likelihood.num_params) if decoder is None \
            else _checked_part("decoder", decoder, nn.Module)
        self.posterior = _built_posterior(posterior, features_of(self.encoder), latent_dim)
        self.prior = _checked_prior(prior, latent_dim, shape)
        self.name = name
        _warn_of_squashing(likelihood, self.decoder)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one datum."""
        return self.likelihood.event_shape

    # ------------------------------------------------------------------ Pyro

    def model(self, x: Any, mask: Tensor | None = None, beta: float | Tensor = 1.0) -> Tensor:
        """Pyro model of the data.

        For replicates of the data: ``Predictive(poutine.uncondition(vae.model), guide=vae.guide,
        num_samples=100)(x)["x"]``.

        Args:
            x: Data.
            mask: What of them was seen. Default: all.
            beta: Weight of the latents' terms in the ELBO, above zero; one that changes from step
                to step should be a tensor, which a compiled ELBO takes as data.
        """
        x, mask = self._registered(x, mask)
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=beta):
                z = pyro.sample("z", self.prior(self.posterior_of))
            pyro.sample("x", self.likelihood_at(z, mask), obs=x)
        return z

    def guide(self, x: Any, mask: Tensor | None = None, beta: float | Tensor = 1.0) -> Tensor:
        """Pyro guide: the encoder's posterior. Arguments are those of :meth:`model`."""
        x, mask = self._registered(x, mask)
        with pyro.plate("data", len(x)), poutine.scale(scale=beta):
            z: Tensor = pyro.sample("z", self.posterior_of(x, mask))
        return z

    def _registered(self, x: Any, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        register_parameters(free_name(self.name, self), self)
        return self._shaped(x, mask)

    # ------------------------------------------------------------------ parts

    def posterior_of(self, x: Tensor, mask: Tensor | None = None) -> TorchDistributionMixin:
        """Posterior of the latents of data whose shape is known to be right."""
        return self.posterior(self.features(x, mask))

    def features(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The encoder's features of data, without what was not seen."""
        inputs = self.likelihood.as_input(x)
        if mask is not None and inputs.shape != x.shape:  # classes, say, in front
            mask = mask.unsqueeze(-1 - len(self.event_shape)).expand(inputs.shape)
        if mask is not None:
            inputs = inputs.where(mask, inputs.new_zeros(()))
        seen = {"mask": mask} if takes_mask(self.encoder) else {}
        features: Tensor = attempt(
            f"VAE: its encoder failed on data of shape {tuple(inputs.shape)}",
            "It gets (batch, *event_shape): start one of nn.Linear with nn.Flatten()",
            self.encoder, inputs, **seen)
        expected = (len(x), self.posterior.feature_dim)
        if not isinstance(features, Tensor) or features.shape != expected:
            way_out = "If their number is another, set it before: encoder.output_dim = 64." \
                if isinstance(features, Tensor) else \
                "Location and scale are the posterior's to make: return what they are made of."
            raise ValueError(f"VAE expected its encoder to return features of shape {expected}, "
                             f"one row a datum, got {_described(features)}. {way_out}")
        return features

    def params_at(self, z: Tensor) -> Tensor:
        """The decoder's output at latents ``(*batch, latent_dim)``, which it sees as rows."""
        rows = z.reshape(-1, self.latent_dim)
        params = attempt(f"VAE: its decoder failed on latents of shape {tuple(rows.shape)}",
                         "It gets (batch, latent_dim)", self.decoder, rows)
        expected = (len(rows), self.likelihood.num_params, *self.event_shape)
        shape = tuple(params.shape) if isinstance(params, Tensor) else ()
        if self.likelihood.num_params == 1 and shape == (len(rows), *self.event_shape):
            shape = expected  # the dimension of size 1 may be left away
        if shape != expected:
            raise ValueError(f"VAE expected its decoder to return parameters of shape (batch, "
                             f"num_params, *event_shape), here {expected}, got "
                             f"{_described(params)}. A last layer nn.Unflatten(1, "
                             f"{expected[1:]}) gives rows their shape.")
        return params.reshape(*z.shape[:-1], *expected[1:])

    def likelihood_at(self, z: Tensor, mask: Tensor | None = None) -> TorchDistributionMixin:
        """Distribution of data given latents ``(*batch, latent_dim)``, of what was seen."""
        return self.seen_part(self.params_at(z), mask)

    def seen_part(self, params: Tensor, mask: Tensor | None = None) -> TorchDistributionMixin:
        """Distribution of data given the decoder's output, of what was seen."""
        distribution = self.likelihood(params)
        if mask is not None:
            distribution = distribution.mask(mask)
        return distribution.to_event(len(self.event_shape))

    def _shaped(self, x: Any, mask: Tensor | None) -> Data:
        return shaped_data(x, mask, self.likelihood, self._like())

    def _checked(self, x: Any, mask: Tensor | None) -> Data:
        return checked_data(x, mask, self.likelihood, self._like())

    def _like(self) -> Tensor:
        """A tensor of the module's type, where it is."""
        return next(self.parameters())

    # ------------------------------------------------------------------ use

    def fit(self, x: Any, mask: Tensor | None = None, *, num_epochs: int = 100,
            batch_size: int = 128, lr: float = 2e-3, num_particles: int = 1, beta: float = 1.0,
            warm_up: int = 0, free_bits: float = 0.0, validation: Any = None,
            patience: int | None = None, seed: int | None = None, compile: str = "auto",
            progress: bool = True, checkpoint: Checkpoint | str | PathLike | None = None
            ) -> TrainingHistory:
        r"""Train on data, by compiled steps of Adam on minibatches.

        .. math:: \max\ \frac1N \sum_n \mathbb E_{q(z \mid x_n)}[\log p(x_n \mid z)]
                  - \beta\, \mathrm{KL}(q(z \mid x_n) \,\|\, p(z))

        Ctrl-C ends the training with what was learned so far.

        Args:
            x: Data ``(num_data, *event_shape)``; or, for those larger than the memory, an
                :class:`~pyro_nfvi.ArrayLoader` of data, or of data and mask.
            mask: What of them was seen. Default: all.
            num_epochs: Number of passes over the data.
            batch_size: Data of each step; the last batch of an epoch may be smaller. A loader
                has its own, and a batch that goes on from one epoch into the next.
            lr: Largest learning rate; it rises for a tenth of the steps, then falls to zero.
            num_particles: Latents drawn for each datum at each step.
            beta: Weight of the KL divergence.
            warm_up: Epochs over which that weight rises from zero.
            free_bits: Nats of KL divergence for each latent that cost nothing.
            validation: Data, or data and mask, to look at after each epoch: the parameters of the
                best epoch are kept.
            patience: Epochs without a better one until the training ends. Needs ``validation``.
            seed: Makes the run reproducible (for one ``compile``, as tiers order their noise
                differently), and leaves the global random state as it was. Default: the global
                random state.
            compile: How the steps are computed: ``"auto"`` or one of
                :data:`pyro_nfvi.engine.TIERS`.
            progress: Whether to show a progress bar.
            checkpoint: Folder in which to keep the state of the training, every minute and when a
                signal ends it; :class:`~pyro_nfvi.Checkpoint` sets how often. The same call, run
                again, goes on from there, bit for bit on the same machine; once the training is
                complete it returns at once what was found. Default: nothing is kept.

        Returns:
            What happened; its ``concerns`` say what to worry about.

        Raises:
            ValueError: If data are bad, an option is of another kind, or the checkpoints are of
                another training.

        References:
            Higgins et al. (2017), beta-VAE, ICLR; Sønderby et al. (2016), Ladder Variational
            Autoencoders, arXiv:1602.02282 (warm-up); Kingma et al. (2016), arXiv:1606.04934 (free
            bits).
        """
        data = checked_loader(x, mask, self._checked) if isinstance(x, ArrayLoader) else \
            self._checked(x, mask)
        return train(self, data, num_epochs=num_epochs, batch_size=batch_size,
                     lr=lr, num_particles=num_particles, beta=beta, warm_up=warm_up,
                     free_bits=free_bits, validation=validation, patience=patience, seed=seed,
                     compile=compile, progress=progress, checkpoint=checkpoint)

    def encode(self, x: Any, mask: Tensor | None = None) -> TorchDistributionMixin:
        """Posterior of the latents: a Pyro distribution of batch shape ``(num_data,)``."""
        with evaluating(self):
            return self.posterior_of(*self._checked(x, mask))

    def decode(self, z: Tensor) -> TorchDistributionMixin:
        """Distribution of data given latents ``(*batch, latent_dim)``."""
        with evaluating(self):
            return self.likelihood_at(check_tensor("VAE", "z", z, self.latent_dim))

    @torch.no_grad()
    def reconstruct(self, x: Any, mask: Tensor | None = None) -> Tensor:
        """Mean of data (for classes: the most probable) at the posterior mean of the latents."""
        with evaluating(self):
            return evaluate.by_batches(lambda x, mask: self.likelihood.mean(self.params_at(
                posterior_mean(self.posterior_of(x, mask)))), self._checked(x, mask))

    @torch.no_grad()
    def generate(self, num_samples: int, *, mean: bool = False) -> Tensor:
        """New data ``(num_samples, *event_shape)``, or with ``mean`` their means."""
        check_positive_int("VAE.generate", "num_samples", num_samples)
        with evaluating(self):
            z = self.prior(self.posterior_of).sample((num_samples,))
            return self.likelihood.mean(self.params_at(z)) if mean else self.decode(z).sample()

    @torch.no_grad()
    def latents(self, x: Any, mask: Tensor | None = None, *, num_samples: int = 100) -> Tensor:
        """Posterior draws ``(num_samples, num_data, latent_dim)``."""
        check_positive_int("VAE.latents", "num_samples", num_samples)
        with evaluating(self):
            return evaluate.by_batches(
                lambda x, mask: self.posterior_of(x, mask).sample((num_samples,)),
                self._checked(x, mask), dim=1)

    @torch.no_grad()
    def elbo(self, x: Any, mask: Tensor | None = None, *, num_particles: int = 1) -> Tensor:
        """Estimate of the ELBO of each datum, in nats: ``(num_data,)``."""
        check_positive_int("VAE.elbo", "num_particles", num_particles)

        def of_batch(x: Tensor, mask: Tensor | None) -> Tensor:
            fit, divergence = elbo_terms(self, x, mask, num_particles)
            return fit - divergence.sum(-1)
        with pyro.validation_enabled(False), evaluating(self):
            return evaluate.by_batches(of_batch, self._checked(x, mask))

    def log_likelihood(self, x: Any, mask: Tensor | None = None, *, num_samples: int = 1000
                       ) -> LogLikelihood:
        r"""Importance-weighted estimate of :math:`\log p(x)`, a lower bound on average.

        .. math:: \log \frac1S \sum_{s=1}^S \frac{p(x \mid z_s)\, p(z_s)}{q(z_s \mid x)},
                  \qquad z_s \sim q(z \mid x)

        Args:
            x: Data.
            mask: What of them was seen. Default: all.
            num_samples: Draws :math:`S` for each datum.

        References:
            Burda, Grosse & Salakhutdinov (2016), Importance Weighted Autoencoders,
            arXiv:1509.00519, eq. 8; Rezende, Mohamed & Wierstra (2014), arXiv:1401.4082,
            appendix E.
        """
        return evaluate.log_likelihood(self, self._checked(x, mask), num_samples)

    def active_units(self, x: Any, mask: Tensor | None = None) -> Tensor:
        r"""Which latents depend on the data: :math:`\mathrm{Var}_x(\mathbb E_q[z_j]) > 0.01`.

        Args:
            x: Data; at least two of them.
            mask: What of them was seen. Default: all.

        Returns:
            Booleans ``(latent_dim,)``.

        References:
            Burda, Grosse & Salakhutdinov (2016), arXiv:1509.00519, section 5.2.
        """
        return evaluate.active_units(self, self._checked(x, mask))

    def amortization_gap(self, x: Any, mask: Tensor | None = None, *, num_steps: int = 200,
                         lr: float = 0.02, num_particles: int = 16, seed: int | None = None
                         ) -> AmortizationGap:
        """How much of the ELBO is lost because one encoder serves all data.

        The features of every datum are optimised for that datum alone, from the encoder's on.

        Args:
            x: Data.
            mask: What of them was seen. Default: all.
            num_steps: Steps of the optimisation.
            lr: Its learning rate.
            num_particles: Draws of each step.
            seed: Makes it reproducible, and leaves the global random state as it was.

        References:
            Cremer, Li & Duvenaud (2018), Inference Suboptimality in Variational Autoencoders,
            arXiv:1801.03558, section 3.
        """
        return evaluate.amortization_gap(self, self._checked(x, mask), num_steps=num_steps, lr=lr,
                                         num_particles=num_particles, seed=seed)

    def to_arviz(self, x: Any, mask: Tensor | None = None, *, num_samples: int = 100,
                 coords: Mapping[str, Any] | None = None) -> Any:
        """Latents, reconstructions and data as InferenceData (ArviZ 0.x) or DataTree (1.x).

        Groups: ``posterior`` (``z``), ``posterior_predictive`` (``x``), ``log_likelihood``
        (``x``, of a datum given each draw), ``observed_data`` (``x``). Dimensions: ``data``,
        ``latent``, ``x_dim_0``, ...

        Args:
            x: Data.
            mask: What of them was seen. Default: all.
            num_samples: Draws.
            coords: Values along dimensions, by name.
        """
        return evaluate.to_arviz(self, self._checked(x, mask), num_samples=num_samples,
                                 coords=coords)

    # ------------------------------------------------------------------ files and copies

    def save(self, path: str | PathLike) -> None:
        """Write the parameters to a file."""
        write_state(path, self)

    def load(self, path: str | PathLike) -> VAE:
        """Read parameters that a VAE of the same parts wrote.

        Returns:
            The VAE itself.

        Raises:
            ValueError: If there is no such file, or it is of other parts.
        """
        read_state(path, self)
        return self

    def __getstate__(self) -> dict[str, Any]:
        forget_store(self)
        return self.__dict__.copy()


def posterior_mean(posterior: TorchDistributionMixin) -> Tensor:
    """Mean of a posterior, by draws if it has no formula."""
    try:
        mean: Tensor = posterior.mean
        return mean
    except NotImplementedError:
        return posterior.sample((MEAN_DRAWS,)).mean(0)


def _checked_part(name: str, part: Any, kind: type, latent_dim: int = 0) -> Any:
    if not isinstance(part, kind):
        way_out = {"likelihood": " Say: Bernoulli((28, 28)).",
                   "prior": f" Say: StandardGaussian({latent_dim})."}.get(name, "")
        got = f"the class {part.__name__}, not built" if isinstance(part, type) \
            else type_name(part)
        raise ValueError(f"VAE expected `{name}` to be a {kind.__name__}, got {got}.{way_out}")
    return part


def _built_posterior(build: Any, feature_dim: int, latent_dim: int) -> AmortizedPosterior:
    way_out = "Say: posterior=DiagonalGaussian, or partial(FlowPosterior, recipe=iaf)."
    if not callable(build) or isinstance(build, nn.Module):
        raise ValueError(f"VAE expected `posterior` to be a function of (feature_dim, latent_dim) "
                         f"that builds one, got {type_name(build)}. {way_out}")
    posterior = build(feature_dim, latent_dim)
    if not isinstance(posterior, AmortizedPosterior):
        raise ValueError(f"VAE expected `posterior` to build an AmortizedPosterior, got "
                         f"{type_name(posterior)}. {way_out}")
    dims = (posterior.feature_dim, posterior.latent_dim)
    if dims != (feature_dim, latent_dim):
        raise ValueError(f"VAE expected `posterior` to build one of feature_dim={feature_dim} and "
                         f"latent_dim={latent_dim}, got {dims[0]} and {dims[1]}. {way_out}")
    return posterior


def _warn_of_squashing(likelihood: Likelihood, decoder: nn.Module) -> None:
    """Say so if a decoder squashes what the likelihood squashes again."""
    last = [module for module in decoder.modules() if not list(module.children())][-1:]
    if last and isinstance(last[0], (nn.Sigmoid, nn.Softmax, nn.LogSoftmax, nn.Softplus)):
        warnings.warn(f"VAE: its decoder ends in {type_name(last[0])}, but {type_name(likelihood)} "
                      "takes any real number and squashes itself. Leave the last layer out.",
                      stacklevel=3)


def _checked_prior(prior: Any, latent_dim: int, event_shape: torch.Size) -> Prior:
    if prior is None:
        return StandardGaussian(latent_dim)
    prior = _checked_part("prior", prior, Prior, latent_dim)
    if prior.latent_dim != latent_dim:
        raise ValueError(f"VAE expected `prior` to be of {latent_dim} coordinates, got "
                         f"{prior.latent_dim}. Say: {type_name(prior)}({latent_dim}, ...).")
    if isinstance(prior, VampPrior) and prior.pseudo_inputs.shape[1:] != event_shape:
        raise ValueError(f"VAE expected `pseudo_inputs` of its prior to be of shape "
                         f"({', '.join(map(str, ('K', *event_shape)))}), got "
                         f"{tuple(prior.pseudo_inputs.shape)}. Take some of the data: x[:100].")
    return prior


def _described(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type_name(value)
