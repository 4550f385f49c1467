"""Worker of ``inner_loop.py`` for Pyro: ``SVI`` with its own transforms, traced or jitted.

The flows have the sizes of ours: planar, affine autoregressive in the direction of the inverse
autoregressive flow, and quadratic spline couplings with the coordinates permuted between them,
each under a learned shift and scale. Pyro wants the hidden layers of an autoregressive network at
least as wide as its input. Its argument checks are off, as they are in our loop.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from inner_loop_worker_common import (
    BINS,
    BOUND,
    HIDDEN,
    INIT_SCALE,
    Spec,
    Subject,
    make_model,
    per_step,
    read_data,
    serve,
    timed,
)
from pyro.distributions import constraints
from pyro.distributions.torch_transform import ComposeTransformModule, TransformModule
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormalizingFlow
from pyro.nn import AutoRegressiveNN, DenseNN
from torch import Tensor, nn


class TorchSubject(Subject):
    """A model and its data in Pyro."""

    def __init__(self, spec: Spec) -> None:
        torch.set_num_threads(1)
        warnings.simplefilter("ignore")
        pyro.enable_validation(False)
        pyro.set_rng_seed(0)
        self.spec = spec
        self.model = make_model(spec.model, pyro, dist)
        self.data = [torch.as_tensor(array) for array in read_data(spec)]

    def versions(self) -> dict[str, str]:
        """Versions of torch and Pyro."""
        return {"torch": torch.__version__, "pyro": pyro.__version__}


class ShiftAndScale(TransformModule):
    """The affine map after the flow."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, dim: int) -> None:
        super().__init__(cache_size=1)
        self.shift = nn.Parameter(torch.zeros(dim))
        self.log_scale = nn.Parameter(torch.full((dim,), math.log(INIT_SCALE)))

    def _call(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.log_scale.exp())

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Sum of the log-scales."""
        return self.log_scale.sum().expand(x.shape[:-1])


def planar(dim: int, depth: int) -> list:
    """Planar layers."""
    return [T.planar(dim) for _ in range(depth)]


def iaf(dim: int, depth: int) -> list:
    """Inverse autoregressive layers, every other one in reverse order."""
    hidden = [max(size, dim) for size in HIDDEN]
    orders = [torch.arange(dim) if k % 2 == 0 else torch.arange(dim).flip(0)
              for k in range(depth)]
    return [T.AffineAutoregressive(AutoRegressiveNN(dim, hidden, permutation=order,
                                                    nonlinearity=nn.Tanh())) for order in orders]


def nsf(dim: int, depth: int) -> list:
    """Spline couplings: second half, first half, odd, even, as ``pyro_nfvi.flows.nsf``."""
    layers, before = [], torch.arange(dim)
    for k in range(depth):
        moved = before >= dim // 2 if k % 4 < 2 else before % 2 == 1
        moved = moved if k % 2 == 0 else ~moved
        order = torch.cat([(~moved).nonzero(), moved.nonzero()]).squeeze(-1)
        if k:
            layers.append(T.Permute(order))
        before = before[order]
        layers.append(spline_coupling(dim, split=dim - int(moved.sum())))
    return [*layers, T.Permute(before.argsort())]


def spline_coupling(dim: int, split: int) -> TransformModule:
    """One coupling whose first part stays."""
    sizes = [(dim - split) * count for count in (BINS, BINS, BINS - 1)]
    network = DenseNN(split, list(HIDDEN), sizes, nonlinearity=nn.Tanh())
    return T.SplineCoupling(dim, split, network, BINS, BOUND, order="quadratic", identity=True)


class FlowGuide(AutoNormalizingFlow):
    """Pyro's guide, less its second name for one parameter, over which Pyro's JIT stumbles."""

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.TransformedDistribution:
        """Posterior, its transform made first."""
        if self.transform is None:
            self.transform = self._init_transform_fn(self.latent_dim)
        return super().get_posterior(*args, **kwargs)


FLOWS: dict[str, Callable[[int, int], list]] = {"planar": planar, "iaf": iaf, "nsf": nsf}


class Pyro(TorchSubject):
    """SVI of Pyro."""

    def build(self) -> dict[str, Any]:
        """A new guide, a new SVI and one step."""
        pyro.clear_param_store()
        layers = FLOWS[self.spec.flow]
        guide = FlowGuide(self.model, lambda dim: ComposeTransformModule(
            [*layers(dim, self.spec.depth), ShiftAndScale(dim)]))
        options = {"num_particles": self.spec.particles, "vectorize_particles": True}
        loss = (JitTrace_ELBO(**options, ignore_jit_warnings=True)
                if self.spec.library == "pyro jit" else Trace_ELBO(**options))
        self.guide = guide
        self.svi = SVI(self.model, guide, pyro.optim.Adam({"lr": self.spec.lr}), loss)
        self.svi.step(*self.data)
        return {}

    def run(self, steps: int) -> dict[str, Any]:
        """That many steps."""
        cpu, wall, _ = timed(lambda: [self.svi.step(*self.data) for _ in range(steps)])
        return per_step(cpu, wall, steps)

    @torch.no_grad()
    def elbo(self, draws: int) -> float:
        """ELBO by fresh draws."""
        loss = Trace_ELBO(num_particles=draws, vectorize_particles=True)
        return -loss.loss(self.model, self.guide, *self.data)


if __name__ == "__main__":
    serve(Pyro)
