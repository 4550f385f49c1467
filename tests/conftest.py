"""One seed for every test, an empty param store, and the device to test on."""

from __future__ import annotations

import os

import pyro
import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="device the tests put flows on, e.g. cuda")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where flows and data of the test live."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True, scope="session")
def _compiled_code(pytestconfig: pytest.Config) -> None:
    """Keep compiled code between runs of the tests, beside pytest's own cache."""
    folder = pytestconfig.rootpath / ".pytest_cache" / "compiled"
    os.environ.setdefault("PYRO_NFVI_CACHE", str(folder))


@pytest.fixture(autouse=True)
def _fresh_state() -> None:
    """Seed torch, numpy and random, clear Pyro's param store, and validate (Zuko would not)."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    pyro.enable_validation(True)
