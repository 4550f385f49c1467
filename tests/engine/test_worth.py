"""What a compilation is worth: none takes longer than the steps, none makes them slower."""

from __future__ import annotations

import pytest
import torch

from pyro_nfvi.engine import Compiled, compiled
from pyro_nfvi.engine.c import program
from pyro_nfvi.engine.c.ir import Unsupported
from pyro_nfvi.engine.c.program import CProgram
from pyro_nfvi.engine.programs import GraphProgram
from pyro_nfvi.engine.record import record

X = torch.linspace(-1, 1, 5)


def value():
    return [X.sin().sum(), X.cos()]


def refuse(*args, **kwargs):
    raise Unsupported("no compiler today")


def timed(of_graph, of_python):
    return lambda program, inputs, draws: of_graph if isinstance(program, GraphProgram) \
        else of_python


@pytest.mark.parametrize(("of_graph", "tier"), [(1.0, "fx"), (3.0, "eager")])
def test_a_graph_slower_than_python_gives_way_to_it(of_graph, tier, monkeypatch):
    monkeypatch.setattr(compiled, "CProgram", refuse)
    monkeypatch.setattr(compiled, "_seconds", timed(of_graph, 2.0))
    monkeypatch.setattr(Compiled, "_is_long", lambda self: False)
    made = Compiled(value, [X], num_calls=10)
    assert made.tier == tier
    assert ("slower than the model itself" in made.reason) == (tier == "eager")
    assert "no compiler today" in made.reason


def test_who_asks_for_the_graph_gets_it(monkeypatch):
    monkeypatch.setattr(compiled, "_seconds", timed(3.0, 2.0))
    assert Compiled(value, [X], "fx").tier == "fx"


def test_long_code_is_compiled_only_if_the_steps_take_longer(monkeypatch):
    monkeypatch.setattr(program, "SHORT", 10)
    recording = record(value, [X])
    with pytest.raises(Unsupported, match="MB of code, which would take too long to compile"):
        CProgram(recording, [X], [], worth=0.001)
    assert torch.allclose(CProgram(recording, [X], [], worth=60.0)([X], [])[0], X.sin().sum())


@pytest.mark.parametrize(("num_calls", "tier"), [(1, "fx"), (100_000, "c")])
def test_few_steps_are_not_worth_a_compiler_and_many_are(num_calls, tier, monkeypatch):
    monkeypatch.setattr(program, "SHORT", 10)
    monkeypatch.setattr(compiled, "_seconds", timed(0.0005, 0.001))
    monkeypatch.setattr(Compiled, "_is_long", lambda self: False)
    assert Compiled(value, [X], num_calls=num_calls).tier == tier
