"""A module's parameters in Pyro's parameter store, without Pyro's traps."""

from __future__ import annotations

import pyro
import torch
from pyro.nn import PyroModule
from pyro.params.param_store import ParamStoreDict, param_with_module_name
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_OURS: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameters some guide of this process put in


def register_parameters(prefix: str, module: nn.Module) -> None:
    """Declare every trainable parameter with ``pyro.param``, and use what the store returns.

    ``pyro.module`` registers too, but by default keeps computing with the module's own tensors:
    a second guide of the same name, or one whose parameters were loaded into the store, then
    trains nothing. Here the store's tensors become the module's. Values of another shape that a
    guide of this process left behind give way; values of another shape from elsewhere (a loaded
    file) are an error. Frozen parameters stay out, without a warning.

    Args:
        prefix: Pyro name of the module.
        module: The module.

    Raises:
        ValueError: If the store holds a value of another shape that no guide here put there.
    """
    store = pyro.get_param_store()
    names = {name: param_with_module_name(prefix, name) for name, _ in module.named_parameters()}
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if any(_misfits(store, names[name], p) for name, p in parameters.items()):
        _evict(store, prefix, {names[name]: p for name, p in parameters.items()})
    for name, parameter in parameters.items():
        stored = pyro.param(names[name], parameter)
        _OURS[parameter] = None
        if stored is not parameter:
            _replace(module, name, stored)


def registered(owner: PyroModule, name: str) -> nn.Module:
    """A submodule, its parameters registered if the owner runs as a step of Pyro's.

    Args:
        owner: The guide that holds it.
        name: Its name there.
    """
    module: nn.Module = owner._modules[name]  # the attribute would call pyro.module
    if not owner._pyro_context.active:
        return module
    if pyro.settings.get("module_local_params") or isinstance(module, PyroModule):
        return getattr(owner, name)
    register_parameters(owner._pyro_get_fullname(name), module)
    return module


def free_name(name: str, module: nn.Module) -> str:
    """The name, or the name and a number, if another module of this process has it.

    Values under the name that no module here put into the store, those of a loaded file, are the
    module's to take.
    """
    store, own = pyro.get_param_store(), {id(p) for p in module.parameters()}
    candidate, number = name, 1
    while any(key.startswith(param_with_module_name(candidate, "")) and value in _OURS
              and id(value) not in own for key, value in store._params.items()):
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def forget_store(module: nn.Module) -> None:
    """Drop Pyro's weak references from the parameters, which cannot be pickled."""
    for parameter in module.parameters():
        parameter.__dict__.pop("unconstrained", None)


def _misfits(store: ParamStoreDict, key: str, parameter: Tensor) -> bool:
    return key in store and store[key].shape != parameter.shape


def _evict(store: ParamStoreDict, prefix: str, parameters: dict[str, Tensor]) -> None:
    for key, parameter in parameters.items():
        if _misfits(store, key, parameter) and store[key] not in _OURS:
            raise ValueError(
                f"{prefix} expected parameter {key!r} of shape {tuple(parameter.shape)}, the param "
                f"store holds one of shape {tuple(store[key].shape)} from another model or file. "
                "Clear it: pyro.clear_param_store().")
    for key in [key for key in store if key.startswith(param_with_module_name(prefix, ""))]:
        del store[key]


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Make ``value`` the module's parameter ``name``."""
    *path, leaf = name.split(".")
    owner = module.get_submodule(".".join(path))
    owner._parameters[leaf] = value  # no new Parameter: the store and optimisers know this one
    if isinstance(value, torch.nn.Parameter):
        _OURS[value] = None
