"""Training a VAE: minibatches, epochs, validation, and what to say at the end."""

from __future__ import annotations

import math
import statistics
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyro
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from pyro_nfvi._random import forked_rng
from pyro_nfvi._shapes import check_flag, check_positive_float, check_positive_int, check_seed
from pyro_nfvi.engine import Stepper, check_tier
from pyro_nfvi.inference import ArrayLoader, Checkpoint, History
from pyro_nfvi.inference.identity import described, sampled
from pyro_nfvi.inference.kept import keeping, way_on
from pyro_nfvi.inference.loop import MAX_ROLLBACKS
from pyro_nfvi.inference.module_loop import ModuleLoop
from pyro_nfvi.inference.stopping import OneCycle
from pyro_nfvi.vae.data import Data, LoadedMinibatches, Minibatches
from pyro_nfvi.vae.evaluate import active_units, evaluating
from pyro_nfvi.vae.objective import elbo_terms, penalty

if TYPE_CHECKING:
    from pyro_nfvi.vae.vae import VAE

MOST_SPREAD = 100  # between the scales of two columns that one learning rate can serve
MANY_ROLLBACKS, FEW_EPOCHS = 3, 5  # from which a training may be judged
NUM_COMPARED = 20  # data of a loader, to tell it from others
NUM_LOOKED_AT = 2000  # data, to see which latents are in use


@dataclass(repr=False)
class TrainingHistory(History):
    """What happened during the training of a VAE.

    Attributes:
        elbo: Objective of each step, in nats a datum.
        epochs: Mean of the objective over each epoch.
        validation: ELBO of the validation data after each epoch, in nats a datum.
        best_epoch: The epoch whose parameters were kept, from 1; 0 without validation data.
        active_units: Which latents depend on the data.

    Example:
        >>> history = TrainingHistory(epochs=[-120.0, -100.0], validation=[-115.0, -104.0],
        ...                           best_epoch=2)
        >>> history.validation[history.best_epoch - 1]
        -104.0
    """

    epochs: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best_epoch: int = 0
    active_units: list[bool] = field(default_factory=list)

    def __repr__(self) -> str:
        parts = [f"{len(self.elbo)} steps", f"{len(self.epochs)} epochs"]
        parts += [f"objective {self.epochs[-1]:.3f}"] if self.epochs else []
        parts += [f"validation ELBO {max(self.validation):.3f} in epoch {self.best_epoch}"] \
            if self.validation else []
        parts += [f"{sum(self.active_units)} of {len(self.active_units)} latents active"] \
            if self.active_units else []
        return f"TrainingHistory({', '.join([*parts, *self.concerns])})"


def train(vae: VAE, data: Data | ArrayLoader, *, num_epochs: int, batch_size: int, lr: float,
          num_particles: int, beta: float, warm_up: int, free_bits: float, validation: Any,
          patience: int | None, seed: int | None, compile: str, progress: bool, checkpoint: Any
          ) -> TrainingHistory:
    """Train a VAE by compiled steps of Adam: :meth:`~pyro_nfvi.vae.VAE.fit` says how."""
    for name, count in (("num_epochs", num_epochs), ("batch_size", batch_size),
                        ("num_particles", num_particles)):
        check_positive_int("VAE.fit", name, count)
    check_positive_float("VAE.fit", "lr", lr)
    check_positive_int("VAE.fit", "warm_up", warm_up, minimum=0)
    _check_weight("beta", beta)
    _check_weight("free_bits", free_bits)
    check_seed("VAE.fit", seed)
    check_flag("VAE.fit", "progress", progress)
    if not any(p.requires_grad for p in vae.parameters()):
        raise ValueError("VAE.fit expected parameters to train, got only frozen ones. Thaw some: "
                         "vae.requires_grad_().")
    if torch.is_inference_mode_enabled():
        raise ValueError("VAE.fit needs gradients, which torch.inference_mode() forbids. Call it "
                         "outside.")
    held_out = _checked_validation(vae, validation, patience)
    check_tier("VAE.fit", compile)
    checkpoint = Checkpoint.of("VAE.fit", checkpoint)
    if isinstance(data, ArrayLoader):
        num_data, batch_size = data.num_rows, data.batch_size
    else:
        num_data = len(data[0])
    num_batches = math.ceil(num_data / batch_size)

    def weight(step: int) -> float:
        return beta * min(1.0, (step + 1) / (warm_up * num_batches)) if warm_up else beta

    def identity() -> dict[str, Any]:
        return {**_identity(vae, data, num_data, held_out), "`num_epochs`": num_epochs,
                "`batch_size`": batch_size, "`lr`": lr, "`num_particles`": num_particles,
                "`beta`": beta, "`warm_up`": warm_up, "`free_bits`": free_bits,
                "`patience`": patience, "`seed`": seed}
    with forked_rng(seed) if seed is not None else nullcontext(), \
            keeping(checkpoint, "VAE.fit", identity) as kept:
        with evaluating(vae), torch.enable_grad():  # modes are put back at the end
            vae.train()
            feed = LoadedMinibatches(data, vae._shaped, weight) if isinstance(data, ArrayLoader) \
                else Minibatches(data, batch_size, weight)
            epochs = _Epochs(vae, feed, num_particles, free_bits, held_out, patience,
                             num_epochs=num_epochs, lr=lr, compile=compile, progress=progress,
                             **kept)
            history = epochs.run()
        if not epochs.complete:
            _look_at_latents(vae, feed.some(NUM_LOOKED_AT), history)
            epochs.finish()
    _warn(history, checkpoint)
    return history


def _identity(vae: VAE, data: Data | ArrayLoader, num_data: int, held_out: Data | None
              ) -> dict[str, Any]:
    """What must be the same for a training to go on, beside its options."""
    if isinstance(data, ArrayLoader):
        places = torch.linspace(0, num_data - 1, NUM_COMPARED, dtype=torch.float64).long()
        data = vae._shaped(*(*data.gather(places), None)[:2])
    x, mask = data
    held_out = (None, None) if held_out is None else held_out
    return {"`latent_dim`": vae.latent_dim,
            **{f"the {name}s": described(part) for name, part in vae.named_children()},
            "the floating-point types": str(x.dtype), "`x.shape`": [num_data, *x.shape[1:]],
            "the data": sampled(x), "the masks": sampled(mask),
            "the validation data": sampled(held_out[0]),
            "the masks of the validation data": sampled(held_out[1])}


class _Epochs(ModuleLoop):
    """The training loop, with a look at the validation data after each epoch."""

    def __init__(self, vae: VAE, feed: Minibatches | LoadedMinibatches, num_particles: int,
                 free_bits: float, held_out: Data | None, patience: int | None, *,
                 num_epochs: int, **options: Any) -> None:
        self.history: TrainingHistory
        super().__init__(vae, self._estimates, self._blame, OneCycle(num_epochs * feed.num_batches),
                         TrainingHistory(), name="VAE", feed=feed, **options)
        self.vae, self.minibatches, self.num_particles = vae, feed, num_particles
        self.free_bits, self.held_out, self.patience = free_bits, held_out, patience

    def run(self) -> TrainingHistory:
        """Make the steps, and go back to the best epoch."""
        with pyro.validation_enabled(False):
            super().run()
        return self.history

    def _estimates(self) -> tuple[Tensor, Tensor]:
        """Objective of each datum of the live minibatch, and it; nan where it does not count."""
        *data, counts, weight = self.minibatches.live
        x, mask = data[0], data[1] if len(data) > 1 else None
        fit, divergence = elbo_terms(self.vae, x, mask, self.num_particles)
        objective = fit - weight * penalty(divergence, counts,
                                           self.free_bits * self.vae.latent_dim)
        nothing = objective.new_tensor(torch.nan)
        counts_of_x = counts.reshape(-1, *[1] * (x.dim() - 1))
        return objective.where(counts, nothing), x.where(counts_of_x, nothing)

    def _blame(self, x: Tensor) -> str:
        if x.isnan().any():  # of those that do not count
            return "the gradient"
        return f"'x' (log-likelihood of a datum with values up to {x.abs().max().item():.4g})"

    def _chunk(self, stepper: Stepper) -> int:
        """No further than the end of the epoch, if something is to happen there."""
        count = super()._chunk(stepper)
        if self.held_out is None:
            return count
        left = -len(self.history.elbo) % self.minibatches.num_batches
        return min(count, left or self.minibatches.num_batches)

    def _look(self, stepper: Stepper) -> None:
        super()._look(stepper)
        size = self.minibatches.num_batches
        while (len(self.history.epochs) + 1) * size <= len(self.history.elbo):
            first = len(self.history.epochs) * size
            self.history.epochs.append(statistics.fmean(self.history.elbo[first:first + size]))
            if self.held_out is not None:
                stepper.state.write_back()
                self._validate(*self.held_out)

    def _validate(self, x: Tensor, mask: Tensor | None) -> None:
        history = self.history
        with forked_rng(seed=0):  # the same noise after every epoch
            value = self.vae.elbo(x, mask).mean().item()
        history.validation.append(value if math.isfinite(value) else -math.inf)
        if history.validation[-1] >= max(history.validation):
            history.best_epoch = len(history.validation)
            self._note_best()
        if self.patience and len(history.validation) - history.best_epoch >= self.patience:
            history.stopped = f"the validation ELBO has not risen for {self.patience} epochs"

    def _show(self, bar: Any) -> None:
        super()._show(bar)
        if self.history.validation:
            bar.set_postfix_str(f"{bar.postfix}, validation {self.history.validation[-1]:.3f}",
                                refresh=False)


def _look_at_latents(vae: VAE, data: Data, history: TrainingHistory) -> None:
    """Say so if the training broke down, or latents are not used."""
    if len(data[0]) < 2:
        return
    history.active_units = active_units(vae, data).tolist()
    if history.interrupted or _failed(history):
        return
    history.concerns += _breakdown(vae, *data, history)
    if history.concerns:
        return
    count, total = sum(history.active_units), vae.latent_dim
    if count == 0:
        history.concerns.append(
            "posterior collapse: no latent depends on the data, which the decoder models without "
            "them. Train longer, with warm_up=10 or free_bits=0.1, with a smaller lr, or with a "
            "weaker decoder")
    elif count < total / 4:
        history.concerns.append(
            f"only {count} of {total} latents depend on the data. A smaller latent_dim would do; "
            "to have more in use train with warm_up=10 or free_bits=0.1")


def _breakdown(vae: VAE, x: Tensor, mask: Tensor | None, history: TrainingHistory) -> list[str]:
    """What speaks for a training that did not work."""
    found, epochs = [], history.epochs
    if len(epochs) >= FEW_EPOCHS and epochs[-1] < epochs[0] - 1 - 0.1 * abs(epochs[0]):
        found.append(f"the objective ended lower ({epochs[-1]:.4g} nats a datum) than in the first "
                     f"epoch ({epochs[0]:.4g}). Take a smaller lr")
    elif len(history.rollbacks) >= MANY_ROLLBACKS:
        found.append(f"{len(history.rollbacks)} steps were not finite and were taken back. Take a "
                     "smaller lr")
    if vae.likelihood.unbounded and mask is None and x.dim() == 2:
        spread = x.std(0)
        low, high = spread[spread > 0].min().item(), spread.max().item()
        if high > MOST_SPREAD * low:
            found.append(f"standard deviations of the columns are {low:.2g} to {high:.2g}. "
                         "Standardize them: x = (x - x.mean(0)) / x.std(0)")
    return found


def _failed(history: TrainingHistory) -> bool:
    return len(history.rollbacks) >= MAX_ROLLBACKS


def _warn(history: TrainingHistory, checkpoint: Checkpoint | None) -> None:
    if history.interrupted:
        warnings.warn(f"VAE.fit was interrupted after {len(history.elbo)} steps; the parameters "
                      f"are those so far.{way_on(checkpoint)}", stacklevel=4)
    problems = [history.stopped] if _failed(history) else []
    for problem in [*problems, *history.concerns]:
        warnings.warn(f"VAE.fit: {problem}.", stacklevel=4)


def _check_weight(name: str, value: Any) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
    if not ok:
        raise ValueError(f"VAE.fit expected `{name}` to be a number >= 0, got {value!r}.")


def _checked_validation(vae: VAE, validation: Any, patience: Any) -> Data | None:
    if patience is not None:
        check_positive_int("VAE.fit", "patience", patience)
        if validation is None:
            raise ValueError("VAE.fit expected `validation` data to go with `patience`, got None.")
    if validation is None:
        return None
    is_pair = isinstance(validation, tuple) and not isinstance(validation, PackedSequence)
    if is_pair and len(validation) != 2:
        raise ValueError("VAE.fit expected `validation` to be data, or data and mask, got a tuple "
                         f"of {len(validation)}.")
    try:
        return vae._checked(*(validation if is_pair else (validation, None)))
    except ValueError as error:
        raise ValueError(f"VAE.fit, `validation`: {error}") from None
