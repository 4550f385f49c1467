"""What an encoder reads: the rows of a plate, found in the model's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_nfvi._shapes import type_name
from pyro_nfvi.engine import NotRecordable
from pyro_nfvi.guides.plate_sizes import full_size


class EncoderRows:
    """Reads rows, one for each element of a plate, off the model's arguments.

    Args:
        owner: Name of the guide, for messages.
        inputs: Function of the model's arguments that returns a tensor, or a tuple of them,
            whose first dimension runs over the plate. Default: the one argument that does.
        model: The model.
        frame: The plate, as a node's ``cond_indep_stack`` has it.
        args: Model arguments to find that argument in.
        kwargs: Likewise.

    Raises:
        ValueError: If it takes ``inputs`` to tell which argument is read.
    """

    def __init__(self, owner: str, inputs: Callable | None, model: Callable, frame: Any,
                 args: tuple, kwargs: dict) -> None:
        self.owner, self.inputs, self.plate = owner, inputs, frame.name
        self.place: int | None = None
        self.name, self.source = "", "`inputs`"
        if inputs is None:
            self.place, self.name = _find(owner, model, frame, args, kwargs)
            self.source = f"argument {self.name!r}"

    def __call__(self, args: tuple, kwargs: dict) -> tuple[Tensor, ...]:
        """All the rows these arguments hold.

        Raises:
            ValueError: If ``inputs`` fails, or returns something else.
        """
        found = self._argument(args, kwargs) if self.inputs is None else attempt(
            f"{self.owner}: `inputs` failed on the model's arguments",
            "It is called with whatever the model is, also when predicting (y=None): let it read "
            "only what is always there.", self.inputs, *args, **kwargs)
        rows = found if isinstance(found, (tuple, list)) else (found,)
        if self.inputs is None:  # one number an element is a row of one
            rows = [row.unsqueeze(-1) if isinstance(row, Tensor) and row.dim() == 1
                    and row.is_floating_point() else row for row in rows]
        if not rows or not all(isinstance(row, Tensor) and row.dim() for row in rows) or \
                len({row.shape[0] for row in rows}) > 1:
            raise ValueError(f"{self.owner} expected {self.source} to be a tensor, or a tuple of "
                             f"tensors, whose first dimension runs over plate {self.plate!r}, got "
                             f"{_described(found)}. The encoder reads it also when predicting.")
        return tuple(rows)

    def _argument(self, args: tuple, kwargs: dict) -> Any:
        if self.name in kwargs:
            return kwargs[self.name]
        return args[self.place] if self.place is not None and self.place < len(args) else None


def attempt(what: str, way_out: str, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a function of the user's; if it fails say which, and how to help it.

    Raises:
        ValueError: If it fails.
    """
    try:
        return function(*args, **kwargs)
    except (torch.cuda.OutOfMemoryError, torch.linalg.LinAlgError, NotRecordable):
        raise
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
        raise ValueError(f"{what}: {type_name(error)}: {reason}. {way_out.rstrip('.')}.") from error


def _find(owner: str, model: Callable, frame: Any, args: tuple, kwargs: dict
          ) -> tuple[int | None, str]:
    """Position and name of the one argument that runs over the plate."""
    parameters = _parameters(model)
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names += [f"args[{i}]" for i in range(len(names), len(args))]
    given = [*((i, names[i], value) for i, value in enumerate(args)),
             *((names.index(name) if name in names else None, name, value)
               for name, value in kwargs.items())]
    found = [(place, name, value.shape) for place, name, value in given
             if isinstance(value, Tensor) and value.dim()
             and value.shape[0] in (full_size(frame), frame.size)]
    if len(found) == 1:
        return found[0][:2]
    shapes = " and ".join(f"{name!r} of shape {tuple(shape)}" for _, name, shape in found)
    why = f"{shapes} run over it" if found else "no tensor's first dimension runs over it"
    raise ValueError(f"{owner} cannot tell which argument the encoder of plate {frame.name!r} "
                     f"({full_size(frame)} elements) reads: {why}. Pass "
                     f"inputs=lambda{_written(parameters)}: ...")


def _parameters(model: Callable) -> list[inspect.Parameter]:
    """Parameters of the model, of whatever handlers it is wrapped in."""
    inner = getattr(model, "func", None)
    while isinstance(inner, partial) and isinstance(inner.args[0], Messenger):
        model = inner.args[1]
        inner = getattr(model, "func", None)
    try:
        return list(inspect.signature(getattr(model, "forward", model)).parameters.values())
    except (TypeError, ValueError):  # a builtin
        return []


def _written(parameters: list[inspect.Parameter]) -> str:
    """Parameters as a lambda has them, after a blank; nothing if there is none."""
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*",
                             inspect.Parameter.VAR_KEYWORD: "**"}
    return ",".join(
        f" {stars.get(p.kind, '')}{p.name}" + ("" if p.default is p.empty else f"={p.default!r}")
        for p in parameters)


def _described(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(_described, value))})"
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type_name(value)
