"""A model, its data and a guide, set up for a fit: in one type, on one device, and checked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_nfvi._random import forked_rng
from pyro_nfvi.guides import AutoFlow
from pyro_nfvi.inference.all_data import AllData
from pyro_nfvi.inference.checks import check_arguments, check_data, check_sites
from pyro_nfvi.inference.loader import LoaderFeed
from pyro_nfvi.inference.log_joint import LogJoint, converted, default_dtype, first_bad
from pyro_nfvi.inference.team import Team

START_ROWS = 20_000  # of a loader, that the Gaussians are fitted to, at most
START_BYTES = 2 ** 26  # of them, if that is a batch or more
ABOUT_PLATES = "Shape mismatch inside plate", "subsample_size does not match", "index "


@dataclass(frozen=True)
class Problem:
    """What a fit is about.

    Attributes:
        guide: The guide, which is set up.
        fresh: Whether nothing has trained it before.
        log_joint: The log joint of all data, or of a minibatch.
        feed: The minibatches, if there are any.
        all_data: The log joint of all of their rows.
        start: The log joint of some of them.
    """

    guide: AutoFlow
    fresh: bool
    log_joint: LogJoint
    feed: LoaderFeed | None = None
    all_data: AllData | None = None
    start: LogJoint | None = None

    @property
    def whole(self) -> LogJoint:
        """The log joint of all data."""
        return self.log_joint if self.all_data is None else self.all_data


@dataclass(frozen=True)
class Setup:
    """How to set a problem up.

    Args:
        model: The Pyro model.
        guide: The guide to fit.
        dtype: Floating-point type of the fit. Default: double precision on a CPU, unless the model
            holds on to another; elsewhere the model's own.
        device: Where to run. Default: where the arguments are.
        num_particles: Draws of each step.
        progress: Whether passes over all data show progress bars.
        team: The processes that share the fit.
    """

    model: Callable
    guide: AutoFlow
    dtype: torch.dtype | None
    device: torch.device | None
    num_particles: int
    progress: bool
    team: Team

    def __call__(self, args: tuple, kwargs: dict, loader: Iterable | None) -> Problem:
        """Set the problem up for these arguments of the model.

        Raises:
            ValueError: If the guide cannot handle the model, the model does not take the
                arguments, or its data are no numbers.
        """
        if loader is None:
            check_arguments("NFVI", self.model, args, kwargs)
        guide, fresh = self.guide, self.guide.untouched
        if self.dtype is not None or not self._on_cpu(args, kwargs):
            return self._in_type(fresh, args, kwargs, loader, self.dtype)
        dtype = torch.float64 if fresh else guide._flow().base.zeros.dtype
        store, built = pyro.get_param_store(), guide.prototype_trace is not None
        known = set(store)
        try:
            return self._in_type(fresh, args, kwargs, loader, dtype)
        except RuntimeError:  # single precision inside the model, or an error it has anyway
            if not built:
                guide.prototype_trace = None
            for name in set(store) - known:  # made in the wrong type
                del store[name]
        return self._in_type(fresh, args, kwargs, loader, None)

    def _on_cpu(self, args: tuple, kwargs: dict) -> bool:
        """Whether the fit runs on a CPU."""
        if self.device is not None:
            return self.device.type == "cpu"
        return all(leaf.device.type == "cpu" for leaf in tree_leaves((args, kwargs))
                   if isinstance(leaf, Tensor))

    def _in_type(self, fresh: bool, args: tuple, kwargs: dict, loader: Iterable | None,
                 dtype: torch.dtype | None) -> Problem:
        args, kwargs = converted((args, kwargs), dtype, self.device)
        with default_dtype(dtype):
            if loader is not None:
                feed = LoaderFeed(loader, dtype=dtype, device=self.device, rank=self.team.rank,
                                  size=self.team.size)
                return self._of_minibatches(fresh, args, kwargs, feed, dtype)
            self._set_up_guide(args, kwargs, dtype)
            return Problem(self.guide, fresh, self._checked(self.model, args, kwargs, dtype))

    def _of_minibatches(self, fresh: bool, args: tuple, kwargs: dict, feed: LoaderFeed,
                        dtype: torch.dtype | None) -> Problem:
        batch = feed.arguments(args, kwargs)
        self._check_arguments(args, kwargs, feed)
        with _blaming_plates(feed.num_own):
            self._set_up_guide(*batch, dtype)
        layout = self.guide.layout
        all_data = AllData(self.model, args, kwargs, layout, feed, dtype, self.progress)
        log_joint = self._checked(all_data.model, *batch, dtype)
        num_rows = min(START_ROWS, max(feed.batch_size, START_BYTES // feed.row_bytes))
        some = feed.arguments(args, kwargs, feed.first(num_rows, all_data.num_rows))
        start = LogJoint(all_data.model, *some, layout, dtype)
        check_data("NFVI", start, self.guide._init_loc())
        for same in (all_data, start):
            same.batched, same.reason = log_joint.batched, log_joint.reason
        return Problem(self.guide, fresh, log_joint, feed, all_data, start)

    def _check_arguments(self, args: tuple, kwargs: dict, feed: LoaderFeed) -> None:
        """Refuse a batch and arguments beside it that the model does not take."""
        together = feed.arguments(args, kwargs)
        try:
            check_arguments("NFVI", self.model, *together)
        except ValueError as error:
            gives = ", ".join(map(repr, feed.names or ())) or f"{len(feed.live)} of them"
            hint = f"A batch of `loader` gives {gives}"
            if args or kwargs:
                hint += f", the call {len(args) + len(kwargs)} more"
            elif _takes_one(self.model):
                stars = "*" if feed.names is None else "**"
                hint += f"; take it whole: NFVI(lambda {stars}batch: model(batch))"
            raise ValueError(f"{error} {hint}.") from None

    def _set_up_guide(self, args: tuple, kwargs: dict, dtype: torch.dtype | None) -> None:
        try:
            self.guide.setup(*args, **kwargs).to(dtype=dtype, device=self.device)
        except ValueError as error:
            _blame(self.guide, args, kwargs, error)

    def _checked(self, model: Callable, args: tuple, kwargs: dict, dtype: torch.dtype | None
                 ) -> LogJoint:
        log_joint = LogJoint(model, args, kwargs, self.guide.layout, dtype)
        z = self.guide._flow().rsample_and_log_prob((2,))[0].detach()
        check_sites("NFVI", log_joint)
        check_data("NFVI", log_joint, z[0])
        log_joint.try_batched(z)
        if not log_joint.batched and self.team.leads:
            warnings.warn(f"NFVI runs the model once for each of {self.num_particles} particles, "
                          f"which is slow: {log_joint.reason}", stacklevel=6)
        return log_joint


def _takes_one(model: Callable) -> bool:
    """Whether a model can be called with a single argument."""
    try:
        check_arguments("NFVI", model, (None,), {})
    except ValueError:
        return False
    return True


@contextmanager
def _blaming_plates(num_rows: int) -> Iterator[None]:
    """Say how a plate of minibatches is written, if that of a model does not fit the batch."""
    try:
        yield
    except (ValueError, IndexError) as error:
        if not str(error).startswith(ABOUT_PLATES):
            raise
        message = str(error).splitlines()[0].rstrip(".?")
        raise ValueError(f"NFVI expected the model to take a batch of {num_rows} rows, got an "
                         f"error: {message}. Write: with pyro.plate('data', num_rows, "
                         "subsample_size=len(x)):, and take the batch as it is.") from error


def _blame(guide: AutoFlow, args: tuple, kwargs: dict, error: ValueError) -> None:
    """Name the site that is not finite where the guide would start, if that is the error."""
    with suppress(Exception), pyro.validation_enabled(False), forked_rng():
        trace = poutine.trace(guide.model).get_trace(*args, **kwargs)
        trace.compute_log_prob()
        if (name := first_bad(trace)) is not None:
            error = ValueError(f"NFVI: the log joint is not finite at the start; first bad site "
                               f"{name!r}. Start elsewhere: AutoFlow(model, init_loc_fn=..., "
                               "init_scale=...).")
    raise error
