"""Worker of ``inner_loop.py`` for NumPyro: the formulas of ``pyro_nfvi.flows``, in JAX.

The guide is an ``AutoContinuous`` whose transform hands its log-determinant on with the draw, so
that nothing is evaluated twice. ``build`` times ``SVI.run``, which compiles anew at each call;
steps are timed in the very scan it makes, compiled once. A second number is the most that can be
had from NumPyro by hand: the same steps in a loop that keeps no losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
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
from jax import Array, lax
from numpyro.distributions import constraints
from numpyro.distributions.transforms import ParameterFreeTransform
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoContinuous

MARGIN = 1e-3  # the constants of pyro_nfvi.flows
SOFTPLUS_ONE = math.log(math.expm1(1.0))
OUTPUT_SCALE = 0.01
MAX_LOG_SCALE = 3.0
MIN_BIN = 1e-3
MIN_SLOPE = 1e-3
SLOPE_ONE = math.log(math.expm1(1 - MIN_SLOPE))
Params = Any  # arrays in dictionaries and lists


# ---------------------------------------------------------------------- the flows


def planar_init(key: Array, dim: int, depth: int) -> Params:
    """Random directions, no move; one matrix for all layers."""
    w = jax.random.normal(key, (depth, dim)) / math.sqrt(dim)
    return jnp.concatenate([w, jnp.zeros((depth, dim + 1))], 1)


def planar(params: Params, u: Array) -> tuple[Array, Array]:
    """Planar layers; a scan over them is what XLA runs and compiles fastest."""
    w, v, b = params[:, :len(u)], params[:, len(u):-1], params[:, -1]
    raw = (w * v).sum(1)
    stretch = (1 - MARGIN) * (jax.nn.softplus(raw + SOFTPLUS_ONE) - 1)
    norm = (w * w).sum(1) + jnp.finfo(w.dtype).tiny
    move = v + ((stretch - raw) / norm)[:, None] * w

    def layer(u: Array, weights: tuple[Array, ...]) -> tuple[Array, Array]:
        w, move, b, stretch = weights
        t = jnp.tanh(u @ w + b)
        return u + t * move, jnp.log1p(stretch * (1 - t * t))
    z, log_dets = lax.scan(layer, u, (w, move, b, stretch))
    return z, log_dets.sum()


def linear_init(key: Array, fan_in: int, fan_out: int) -> Params:
    """Torch's initialisation of a linear layer."""
    bound = 1 / math.sqrt(fan_in)
    weight, bias = jax.random.split(key)
    return {"weight": jax.random.uniform(weight, (fan_out, fan_in), minval=-bound, maxval=bound),
            "bias": jax.random.uniform(bias, (fan_out,), minval=-bound, maxval=bound)}


def network_init(key: Array, fan_in: int, fan_out: int) -> Params:
    """Hidden layers, and an output layer that starts at zero."""
    sizes = [fan_in, *HIDDEN]
    keys = jax.random.split(key, len(HIDDEN))
    hidden = [linear_init(k, a, b) for k, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)]
    return [*hidden, {"weight": jnp.zeros((fan_out, sizes[-1])), "bias": jnp.zeros(fan_out)}]


def network(params: Params, x: Array, masks: list[np.ndarray] | None = None) -> Array:
    """Tanh network whose output is scaled down; weights times masks where there are any."""
    *hidden, output = params
    masks = [1.0] * len(params) if masks is None else masks
    for layer, mask in zip(hidden, masks[:-1], strict=True):
        x = jnp.tanh((mask * layer["weight"]) @ x + layer["bias"])
    return (OUTPUT_SCALE * masks[-1] * output["weight"]) @ x + OUTPUT_SCALE * output["bias"]


def made_masks(dim: int, reverse: bool) -> list[np.ndarray]:
    """Masks of an autoregressive network of two parameters for each coordinate."""
    groups = np.arange(dim)[::-1] if reverse else np.arange(dim)
    before, masks = groups, []
    for size in HIDDEN:
        degrees = ((np.arange(size) + 1) * max(dim - 1, 1) - 1) // size
        masks.append((degrees[:, None] >= before).astype(np.float32))
        before = degrees
    return [*masks, (np.tile(groups, 2)[:, None] > before).astype(np.float32)]


def iaf_init(key: Array, dim: int, depth: int) -> Params:
    """A network for each layer."""
    return [network_init(k, dim, 2 * dim) for k in jax.random.split(key, depth)]


def iaf(params: Params, u: Array) -> tuple[Array, Array]:
    """Inverse autoregressive layers, every other one in reverse order."""
    total = jnp.zeros(())
    for k, weights in enumerate(params):
        shift, raw = network(weights, u, made_masks(len(u), k % 2 == 1)).reshape(2, -1)
        log_scale = MAX_LOG_SCALE * jnp.tanh(raw / MAX_LOG_SCALE)
        u, total = shift + u * jnp.exp(log_scale), total + log_scale.sum()
    return u, total


def halves(dim: int, k: int) -> tuple[slice, slice]:
    """Which coordinates stay and which move in layer ``k``, as ``pyro_nfvi.flows.nsf`` has it."""
    parts = ((slice(0, dim // 2), slice(dim // 2, dim)) if k % 4 < 2 else
             (slice(0, dim, 2), slice(1, dim, 2)))
    return parts if k % 2 == 0 else parts[::-1]


def nsf_init(key: Array, dim: int, depth: int) -> Params:
    """A network for each coupling layer."""
    sizes = [[len(range(dim)[part]) for part in halves(dim, k)] for k in range(depth)]
    return [network_init(k, kept, moved * (3 * BINS + 3)) for k, (kept, moved) in
            zip(jax.random.split(key, depth), sizes, strict=True)]


def nsf(params: Params, u: Array) -> tuple[Array, Array]:
    """Spline coupling layers."""
    total = jnp.zeros(())
    for k, weights in enumerate(params):
        kept, moved = halves(len(u), k)
        raw = network(weights, u[kept]).reshape(3 * BINS + 3, -1)
        value, log_slope = spline(u[moved], raw)
        u, total = join(u[kept], value, k), total + log_slope.sum()
    return u, total


def join(kept: Array, value: Array, k: int) -> Array:
    """Put the two parts of a coupling layer back in their places."""
    if k % 4 < 2:
        return jnp.concatenate([kept, value] if k % 2 == 0 else [value, kept])
    dim = len(kept) + len(value)
    even, odd = (kept, value) if k % 2 == 0 else (value, kept)
    zero = jnp.zeros((), even.dtype)
    return (lax.pad(even, zero, [(0, 1 - dim % 2, 1)]) + lax.pad(odd, zero, [(1, dim % 2, 1)]))


def spline(u: Array, raw: Array) -> tuple[Array, Array]:
    """Rational-quadratic spline with linear tails and a learned output box."""
    inside = jnp.clip(u, -BOUND, BOUND)
    sizes = jax.nn.softmax(raw[:2 * BINS].reshape(2, BINS, -1), 1)
    bins = sizes * (2 * BOUND * (1 - MIN_BIN * BINS)) + 2 * BOUND * MIN_BIN
    x, y, w, h, d0, d1 = pick_bin(inside, bins, raw[2 * BINS:3 * BINS + 1])
    xi = jnp.clip((inside - x) / w, 0, 1)
    s, rest = h / w, 1 - xi
    mixed = xi * rest
    denominator = s + (d1 + d0 - 2 * s) * mixed
    value = y + h * (s * xi * xi + d0 * mixed) / denominator
    slope = (s / denominator) ** 2 * (d1 * xi * xi + 2 * s * mixed + d0 * rest * rest)
    log_scale = MAX_LOG_SCALE * jnp.tanh(raw[-1] / MAX_LOG_SCALE)
    value = raw[-2] + (value + slope * (u - inside)) * jnp.exp(log_scale)
    return value, jnp.log(slope) + log_scale


def pick_bin(inside: Array, bins: Array, slopes: Array) -> tuple[Array, ...]:
    """Left knot, size and end derivatives of the bin that holds each coordinate."""
    knots = jnp.cumsum(bins, 1) - BOUND
    found = (knots[0, :-1] <= inside).sum(0)[None]
    w, h = (jnp.take_along_axis(part, found, 0)[0] for part in bins)
    x, y = (jnp.take_along_axis(part, found, 0)[0] for part in knots)
    d0, d1 = (jax.nn.softplus(jnp.take_along_axis(slopes, found + k, 0)[0] + SLOPE_ONE)
              + MIN_SLOPE for k in (0, 1))
    return x - w, y - h, w, h, d0, d1


FLOWS = {"planar": (planar_init, planar), "iaf": (iaf_init, iaf), "nsf": (nsf_init, nsf)}


def flow_init(key: Array, dim: int, kind: str, depth: int) -> Params:
    """Parameters of all layers and of the affine map after them."""
    init, _ = FLOWS[kind]
    return {"layers": init(key, dim, depth), "shift": jnp.zeros(dim),
            "log_scale": jnp.full(dim, math.log(INIT_SCALE))}


def flow(params: Params, u: Array, kind: str) -> tuple[Array, Array]:
    """Noise to latent, with the log-determinant."""
    _, layers = FLOWS[kind]
    z, log_det = layers(params["layers"], u)
    return (params["shift"] + z * jnp.exp(params["log_scale"]),
            log_det + params["log_scale"].sum())


# ---------------------------------------------------------------------- the guide


class FlowTransform(ParameterFreeTransform):
    """A flow as a NumPyro transform that goes one way."""

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, kind: str, params: Params) -> None:
        self.kind, self.params = kind, params

    def __call__(self, x: Array) -> Array:
        """Latent."""
        return self.call_with_intermediates(x)[0]

    def call_with_intermediates(self, x: Array) -> tuple[Array, Array]:
        """Latent and log-determinant."""
        one = partial(flow, self.params, kind=self.kind)
        return jax.vmap(one)(x) if x.ndim == 2 else one(x)

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Any = None) -> Array:
        """The log-determinant of the draw."""
        return self.call_with_intermediates(x)[1] if intermediates is None else intermediates


class AutoFlow(AutoContinuous):
    """Guide of all latents from one flow."""

    def __init__(self, model: Any, kind: str, depth: int) -> None:
        self.kind, self.depth = kind, depth
        super().__init__(model)

    def _get_posterior(self) -> dist.Distribution:
        params = numpyro.param("flow", partial(
            flow_init, dim=self.latent_dim, kind=self.kind, depth=self.depth))
        base = dist.Normal(jnp.zeros(self.latent_dim), 1.0).to_event(1)
        return dist.TransformedDistribution(base, FlowTransform(self.kind, params))


# ---------------------------------------------------------------------- the worker


class NumPyro(Subject):
    """SVI of NumPyro."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.builds = spec, 0
        self.model = make_model(spec.model, numpyro, dist)
        self.data = [jax.block_until_ready(jnp.asarray(array)) for array in read_data(spec)]

    def versions(self) -> dict[str, str]:
        """Versions of NumPyro and JAX."""
        return {"numpyro": numpyro.__version__, "jax": jax.__version__}

    def build(self) -> dict[str, Any]:
        """A new guide, a new SVI and ``SVI.run`` of one step."""
        self.guide = AutoFlow(self.model, self.spec.flow, self.spec.depth)
        loss = Trace_ELBO(num_particles=self.spec.particles, vectorize_particles=True)
        self.svi = SVI(self.model, self.guide, numpyro.optim.Adam(self.spec.lr), loss)
        key = jax.random.key(self.builds)
        result = self.svi.run(key, 1, *self.data, progress_bar=False)
        self.state = jax.block_until_ready(result.state)
        self.builds += 1
        self.scans: dict[int, Any] = {}
        self.loop = None
        return {}

    def run(self, steps: int) -> dict[str, Any]:
        """Steps of the scan inside ``SVI.run``, and of a leaner loop that keeps no losses."""
        if steps not in self.scans:
            scan = partial(lax.scan, lambda state, _: self._step(state), xs=None, length=steps)
            self.scans[steps] = jax.jit(scan).lower(self.state).compile()
        scanned = self._timed(lambda: self.scans[steps](self.state), steps)
        return {**scanned, "loop_us": self.quick(steps), "compile": self.compile_seconds}

    def quick(self, steps: int) -> float:
        """Microseconds of a step of the leaner loop, compiled once for all lengths."""
        if self.loop is None:
            self.compile_seconds, _, self.loop = timed(
                lambda: jax.jit(self._loop).lower(self.state, steps).compile())
        return self._timed(lambda: self.loop(self.state, steps), steps)["us"]

    def _step(self, state: Any) -> tuple[Any, Array]:
        return self.svi.update(state, *self.data)

    def _loop(self, state: Any, steps: int) -> tuple[Any, Array]:
        return lax.fori_loop(0, steps, lambda _, carry: self._step(carry[0]),
                             (state, jnp.zeros(())))

    def _timed(self, function: Callable[[], Any], steps: int) -> dict[str, float]:
        cpu, wall, (self.state, _) = timed(lambda: jax.block_until_ready(function()))
        return per_step(cpu, wall, steps)

    def elbo(self, draws: int) -> float:
        """ELBO by fresh draws."""
        loss = Trace_ELBO(num_particles=draws)
        params = self.svi.get_params(self.state)
        return -float(loss.loss(jax.random.key(1), params, self.model, self.guide, *self.data))


if __name__ == "__main__":
    serve(NumPyro)
