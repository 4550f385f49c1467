"""Processes that share a fit: they hear the same, wait for each other, and notice a death."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist

from pyro_nfvi.inference import distributed
from pyro_nfvi.inference.distributed import LIMIT, DistributedTeam
from pyro_nfvi.inference.signals import deferred_signals
from tests.processes import ROOT, run_ranks

SOON = 2.0  # seconds within which a death is to be noticed, of processes that share two cores


class OwnError(LookupError):
    pass


def team_of(limit: float | None = None) -> DistributedTeam:
    if limit is not None:
        dist.init_process_group("gloo", timeout=timedelta(seconds=limit))
    team = DistributedTeam.of("NFVI", "auto")
    assert team is not None
    return team


def raised(function):
    try:
        return function()
    except BaseException as error:
        return type(error).__name__, str(error)


def refuse(error):
    raise error


NESTED = {"numbers": [1, 2.5, None, True], "text": "yes", "tensors": (
    torch.arange(6.0).reshape(2, 3).t(), torch.tensor(3), torch.zeros(0, 2), torch.ones(2) > 0,
    torch.tensor([1 + 2j]).conj(), torch.full((2,), 0.1, dtype=torch.float64, requires_grad=True))}
ERRORS = [ValueError("no: 'x'"), KeyError("name"), KeyboardInterrupt(), OwnError("gone"),
          torch.linalg.LinAlgError("singular"), UnicodeDecodeError("ascii", b"\xff", 0, 1, "bad"),
          SystemExit(3)]
AS_RAISED = [("ValueError", "no: 'x'"), ("KeyError", "'name'"), ("KeyboardInterrupt", ""),
             ("LookupError", "gone"), ("RuntimeError", "singular"),
             ("RuntimeError", "UnicodeDecodeError: 'ascii' codec can't decode byte 0xff in "
              "position 0: bad"), ("SystemExit", "3")]


def all_methods():
    team = team_of()
    rank = team.rank
    torch.manual_seed(rank)
    found = {"rank": (rank, team.size, team.leads, team.limit)}
    for dtype in (torch.float32, torch.float64):
        for size in (1, 3, 10_007):
            own = torch.randn(size, dtype=dtype)
            found[dtype, size] = own, team.sum_(own.clone())
    found["agree"] = team.agree([rank, -rank, rank == 1, 0.5])
    last = rank == team.size - 1
    found["first"] = [team.first(text) for text in
                      ("", f"at {rank}", "é" * 70_000 if rank else "", "x" if last else "")]
    found["share"] = team.share(NESTED if rank == 0 else None)
    found["lead"] = team.lead(lambda: {"rank": rank, "z": torch.full((3,), rank)})
    found["errors"] = [raised(partial(team.lead, partial(refuse, error))) for error in ERRORS]
    found["unpicklable"] = raised(lambda: team.lead(lambda: lambda: 0))[0]
    found["again"] = DistributedTeam.of("NFVI", "auto").agree([rank])
    return found


@pytest.fixture(scope="module", params=[2, 4])
def found(request):
    return run_ranks(all_methods, request.param)


def test_each_process_knows_its_place(found):
    size = len(found)
    assert [one["rank"] for one in found] == [(r, size, r == 0, LIMIT) for r in range(size)]


def test_sums_are_the_same_bits_everywhere(found):
    for key in [key for key in found[0] if isinstance(key, tuple)]:
        sums = [one[key][1] for one in found]
        assert all(torch.equal(sums[0], other) for other in sums)
        exact = torch.stack([one[key][0].double() for one in found]).sum(0)
        torch.testing.assert_close(sums[0].double(), exact, rtol=0,
                                   atol=10 * torch.finfo(key[0]).eps)


def test_flags_and_texts_are_agreed_upon(found):
    size = len(found)
    for one in found:
        assert one["agree"] == [size - 1, 0, 1, 0.5]
        assert one["first"] == ["", "at 0", "é" * 70_000, "x"]
        assert one["again"] == [size - 1]


def test_what_the_leader_has_arrives_whole(found):
    for one in found:
        shared = one["share"]
        assert {key: shared[key] for key in ("numbers", "text")} == {
            key: NESTED[key] for key in ("numbers", "text")}
        for tensor, other in zip(NESTED["tensors"], shared["tensors"], strict=True):
            assert tensor.dtype == other.dtype
            assert torch.equal(tensor, other)
        assert one["lead"]["rank"] == 0
        assert torch.equal(one["lead"]["z"], torch.zeros(3))


def test_what_the_leader_raises_is_raised_everywhere(found):
    own = AS_RAISED.copy()
    own[3:6] = [(type(error).__name__, str(error)) for error in ERRORS[3:6]]
    assert found[0]["errors"] == own
    assert all(one["errors"] == AS_RAISED for one in found[1:])
    assert {one["unpicklable"] for one in found} == {found[0]["unpicklable"]}
    assert found[0]["unpicklable"] in ("AttributeError", "PicklingError")  # by version of Python


# ---------------------------------------------------------------------- waiting

def waiting():
    """The leader works for longer than the limit; then Ctrl-C comes to one that waits for it."""
    team = team_of(limit=1.0)
    team.agree([0.0])
    begin, used = time.monotonic(), time.process_time()
    slept = team.lead(lambda: time.sleep(2.0) or "slept")
    found = {"slept": slept, "seconds": time.monotonic() - begin,
             "used": time.process_time() - used}

    def call():
        if team.rank == 1:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
        return team.lead(lambda: time.sleep(0.7) or "done")
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    found["interrupted"] = raised(call), team.agree([team.rank])
    with deferred_signals() as signals:
        found["deferred"] = raised(call), team.agree([signals.requested or 0])
    return found


@pytest.fixture(scope="module")
def waited():
    return run_ranks(waiting, 2)


def test_a_leader_may_take_longer_than_the_limit_and_others_wait_without_work(waited):
    for one in waited:
        assert one["slept"] == "slept"
        assert 2.0 < one["seconds"] < 2.0 + SOON
        assert one["used"] < 0.2


def test_ctrl_c_at_one_process_is_raised_at_all(waited):
    assert [one["interrupted"] for one in waited] == [(("KeyboardInterrupt", ""), [1.0])] * 2


def test_ctrl_c_that_is_deferred_already_stays_deferred(waited):
    assert [one["deferred"] for one in waited] == [("done", [signal.SIGINT])] * 2


# ---------------------------------------------------------------------- death

def losing(how, victim, method, limit):
    """One process dies, or stops, when the others count on it."""
    team = team_of(limit=limit)

    def die():
        if team.rank == victim:
            os.kill(os.getpid(), how)
    team.agree([0.0])
    begin = time.monotonic()
    if method == "lead":
        error = raised(lambda: team.lead(die))
    elif method == "wait":
        signal.signal(signal.SIGALRM, lambda *_: die())
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        error = raised(lambda: team.lead(lambda: time.sleep(0.8)))
    else:
        die()
        error = raised(lambda: team.sum_(torch.zeros(1000)))
    seconds = time.monotonic() - begin
    return error, raised(lambda: team.agree([0.0]))[0], seconds


@pytest.mark.parametrize(("how", "victim", "method", "limit"), [
    (signal.SIGKILL, 1, "sum_", 30.0), (signal.SIGKILL, 0, "lead", 30.0),
    (signal.SIGKILL, 1, "wait", 30.0), (signal.SIGSTOP, 1, "sum_", 1.0),
    (signal.SIGSTOP, 0, "lead", 1.0)],
    ids=["killed", "leader-killed", "killed-while-it-waits", "stopped", "leader-stopped"])
def test_a_lost_process_is_noticed(how, victim, method, limit):
    found = run_ranks(partial(losing, how, victim, method, limit), 3, dying=[victim])
    for (kind, text), again, seconds in [one for one in found if one is not None]:
        assert kind == again == "LostProcess"
        assert text.startswith("NFVI: a process of the distributed fit has died or does not ")
        assert text.endswith("start again with the same command.")
        assert seconds < (SOON if how == signal.SIGKILL else limit + SOON)


def test_of_two_the_lost_one_is_named():
    _, ((_, text), _, _) = run_ranks(partial(losing, signal.SIGKILL, 0, "sum_", 30.0), 2,
                                     dying=[0])
    assert "fit (rank 0) has died" in text


# ---------------------------------------------------------------------- who is in it

def test_without_torchrun_a_process_is_alone(monkeypatch):
    for name in distributed.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    assert DistributedTeam.of("NFVI", None) is None
    assert DistributedTeam.of("NFVI", "auto") is None
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert DistributedTeam.of("NFVI", "auto") is None
    assert not dist.is_initialized()


@pytest.mark.parametrize("distributed", [True, "ddp", 4, ["auto"]])
def test_there_are_two_ways(distributed):
    with pytest.raises(ValueError, match="NFVI expected `distributed` to be None or 'auto', got"):
        DistributedTeam.of("NFVI", distributed)


@pytest.mark.parametrize(("environment", "wrong"), [
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "no MASTER_ADDR"),
    ({"WORLD_SIZE": "two", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
     "WORLD_SIZE='two'")])
def test_half_an_environment_is_refused(monkeypatch, environment, wrong):
    for name in distributed.LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"got {wrong}.*torchrun --nproc"):
        DistributedTeam.of("NFVI", "auto")


def test_a_backend_without_cpu_tensors_is_refused(monkeypatch):
    answers = {"is_initialized": True, "get_world_size": 2, "get_backend": "nccl",
               "get_backend_config": "cuda:nccl"}
    for name, answer in answers.items():
        monkeypatch.setattr(dist, name, lambda answer=answer: answer)
    with pytest.raises(ValueError, match="CPU tensors, got 'nccl'. Take both"):
        DistributedTeam.of("NFVI", "auto")


@pytest.mark.parametrize(("gpus", "processes", "backend"), [
    (0, 4, "cpu:gloo"), (4, 4, "cpu:gloo,cuda:nccl"), (2, 4, "cpu:gloo,cuda:gloo")])
def test_cuda_tensors_go_by_nccl_unless_processes_share_a_gpu(monkeypatch, gpus, processes,
                                                              backend):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert distributed._backend() == backend


@pytest.mark.parametrize(("device", "own", "taken"), [
    ("cuda", True, [1]), (torch.device("cuda"), True, [1]), ("cuda", False, []),
    ("cuda:0", True, []), ("cpu", True, []), (None, True, [])])
def test_each_process_takes_a_gpu(monkeypatch, device, own, taken):
    answers = {"is_initialized": True, "get_world_size": 4, "get_rank": 3,
               "get_backend_config": "cpu:gloo,cuda:nccl"}
    for name, answer in answers.items():
        monkeypatch.setattr(dist, name, lambda answer=answer: answer)
    places = []
    monkeypatch.setattr(DistributedTeam, "_group", dist.group.WORLD if own else "another")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", places.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert DistributedTeam.of("NFVI", "auto", device).rank == 3
    assert places == taken


def nobody_comes():
    distributed.LIMIT = 1.0
    return raised(lambda: DistributedTeam.of("NFVI", "auto")) if os.environ["RANK"] == "1" else None


def test_a_process_that_finds_no_others_says_so():
    _, (kind, text) = run_ranks(nobody_comes, 2)
    assert kind == "LostProcess"
    assert text.startswith("NFVI: process 1 of 2 did not find the others (waited ")


SCRIPT = """
from pyro_nfvi.inference.distributed import DistributedTeam
team = DistributedTeam.of("NFVI", "auto")
print(team.agree([team.rank]), flush=True)
"""


@pytest.mark.slow
def test_torchrun_needs_no_more_than_the_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    assert run_ranks(script, 2) == ["[1.0]\n"] * 2
    command = [sys.executable, "-W", "error", "-m", "torch.distributed.run", "--nproc-per-node=2",
               str(script)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
                         env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ran.stdout == "[1.0]\n" * 2
    assert ran.stderr == ""
