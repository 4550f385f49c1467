"""Memory: what is free, what a step takes, and a refusal that names the way out."""

from __future__ import annotations

import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_nfvi import AutoFlow, _memory
from pyro_nfvi._memory import (
    UNKNOWN,
    _linux,
    _macos_pages,
    available_memory,
    check_memory,
    computed_bytes,
    step_bytes,
)
from pyro_nfvi.flows import realnvp
from pyro_nfvi.inference import ELBO, LogJoint
from pyro_nfvi.inference.log_joint import default_dtype
from pyro_nfvi.inference.memory import (
    check_start_memory,
    check_step_memory,
    sample_bytes,
    start_bytes,
)

DOUBLE = torch.float64
MEMINFO = "MemTotal: 16000000 kB\nMemFree: 1000 kB\nMemAvailable:    8000000 kB\n"


def system(root, **files):
    """A machine of text files; in their names two underscores stand for a slash."""
    for name, text in {"proc__meminfo": MEMINFO, **files}.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return _linux(root)


def test_free_memory_is_between_a_megabyte_and_more_than_any_machine_has():
    assert 2 ** 20 < available_memory() <= UNKNOWN
    assert available_memory(torch.device("cpu")) <= UNKNOWN


def test_without_groups_linux_says_what_is_available(tmp_path):
    assert system(tmp_path) == 8_000_000 * 1024


def test_a_group_of_version_2_limits_and_what_it_can_reclaim_is_free(tmp_path):
    files = {"proc__self__cgroup": "0::/a/b\n",
             "sys__fs__cgroup__a__b__memory.max": "3000000\n",
             "sys__fs__cgroup__a__b__memory.current": "2500000\n",
             "sys__fs__cgroup__a__b__memory.stat": "anon 7\ninactive_file 100000\n"}
    assert system(tmp_path, **files) == 600_000


def test_the_tightest_of_the_groups_around_counts(tmp_path):
    files = {"proc__self__cgroup": "0::/a/b\n",
             "sys__fs__cgroup__a__b__memory.max": "max\n",
             "sys__fs__cgroup__a__b__memory.current": "1\n",
             "sys__fs__cgroup__a__memory.max": "1000\n",
             "sys__fs__cgroup__a__memory.current": "400\n",
             "sys__fs__cgroup__memory.max": "900\n",
             "sys__fs__cgroup__memory.current": "500\n"}
    assert system(tmp_path, **files) == 400


def test_a_group_of_version_1_limits_and_its_largest_number_means_no_limit(tmp_path):
    group = "sys__fs__cgroup__memory__job__memory"
    files = {"proc__self__cgroup": "5:cpu:/\n4:memory:/job\n",
             f"{group}.limit_in_bytes": "5000\n", f"{group}.usage_in_bytes": "2000\n",
             f"{group}.stat": "total_inactive_file 500\n",
             "sys__fs__cgroup__memory__memory.limit_in_bytes": f"{2 ** 63 - 4096}\n",
             "sys__fs__cgroup__memory__memory.usage_in_bytes": "1\n"}
    assert system(tmp_path, **files) == 3500


def test_the_group_of_a_container_is_found_at_the_root(tmp_path):
    files = {"proc__self__cgroup": "0::/../../outside\n", "sys__fs__cgroup__memory.max": "1000\n",
             "sys__fs__cgroup__memory.current": "300\n"}
    assert system(tmp_path, **files) == 700


def test_a_group_that_uses_more_than_it_may_leaves_nothing(tmp_path):
    files = {"proc__self__cgroup": "0::/\n", "sys__fs__cgroup__memory.max": "1000\n",
             "sys__fs__cgroup__memory.current": "1300\n"}
    assert system(tmp_path, **files) == 0


def test_macos_counts_pages_that_it_gives_up():
    text = ("Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
            "Pages free:                 10.\nPages active:              1000.\n"
            "Pages inactive:             20.\nPages speculative:            3.\n"
            "Pages purgeable:             4.\n")
    assert _macos_pages(text) == 37 * 16384
    assert _macos_pages("nothing of the kind") == UNKNOWN


@pytest.mark.parametrize("name", ["_linux", "_macos"])
def test_a_system_that_does_not_answer_refuses_nothing(monkeypatch, name):
    def fails():
        raise OSError if name == "_linux" else subprocess.TimeoutExpired("vm_stat", 5)
    monkeypatch.setattr(_memory, name, fails)
    monkeypatch.setattr(sys, "platform", {"_linux": "linux", "_macos": "darwin"}[name])
    assert available_memory() == UNKNOWN
    monkeypatch.setattr(sys, "platform", "plan9")
    assert available_memory() == UNKNOWN


def test_what_does_not_fit_is_refused_in_words(monkeypatch):
    monkeypatch.setattr(_memory, "available_memory", lambda device: 2_500_000_000)
    check_memory("NFVI", 2.4e9, "a flow", "Take fewer")
    with pytest.raises(ValueError, match=r"^NFVI would need about 41 GB for a flow, but 2\.5 GB "
                                         r"are free\. Take fewer particles\.$"):
        check_memory("NFVI", 41.2e9, "a flow", "Take fewer particles")


def test_computed_bytes_count_new_tensors_once_and_views_not_at_all():
    x = torch.zeros(100, dtype=DOUBLE)

    def function():
        y = x + 1  # 800
        y.view(10, 10).t().expand(3, 10, 10)
        y.mul_(2)
        return y.float()  # 400
    assert computed_bytes(function) == 1200


def test_counting_leaves_the_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    computed_bytes(lambda: torch.rand(10))
    assert torch.equal(torch.rand(3), expected)


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    pyro.sample("y", dist.StudentT(4.0, x @ w, 1.0).to_event(1), obs=y)


def problem(dim=10, rows=200, dtype=DOUBLE):
    args = torch.ones(rows, dim, dtype=dtype), torch.ones(rows, dtype=dtype)
    with default_dtype(dtype):
        guide = AutoFlow(regression, realnvp, num_layers=2).setup(*args).to(dtype=dtype)
    return guide._flow(), LogJoint(regression, args, {}, guide.layout, dtype)


def step_of(flow, log_joint):
    parameters = list(flow.parameters())

    def step(count):
        elbo, _ = ELBO()(flow, log_joint, count)
        torch.autograd.grad(-elbo.mean(), parameters, materialize_grads=True)
    return step, parameters


def test_a_step_of_many_particles_is_foreseen_from_steps_of_few():
    flow, log_joint = problem()
    step, parameters = step_of(flow, log_joint)
    own = _memory.COPIES * 8 * sum(p.numel() for p in parameters) + _memory.FIXED
    for count in (1, 50, 700):
        foreseen = step_bytes(step, count, parameters) - own
        assert foreseen == pytest.approx(computed_bytes(lambda n=count: step(n)), rel=0.02)
    assert step_bytes(step, 1000, recorded=False) < step_bytes(step, 1000)


def test_half_the_precision_takes_half_the_memory_of_a_step():
    pairs = [step_of(*problem(rows=2000, dtype=dtype)) for dtype in (torch.float32, DOUBLE)]
    single, double = (step_bytes(step, 512) - _memory.FIXED for step, _ in pairs)
    assert single == pytest.approx(double / 2, rel=0.1)


def test_the_gaussian_stage_is_foreseen_from_latents_and_data():
    few, many = (start_bytes(problem(dim)[1], torch.zeros(dim, dtype=DOUBLE)) for dim in (5, 5000))
    assert few < 2e9
    assert many > few
    assert sample_bytes(torch.zeros(10_000, dtype=DOUBLE)) > 10_000 * 10_000 * 8


def test_stages_that_do_not_fit_are_refused_before_they_start(monkeypatch):
    flow, log_joint = problem()
    _, parameters = step_of(flow, log_joint)
    check_start_memory(flow, log_joint)
    check_step_memory(flow, log_joint, ELBO(), 16, parameters)
    monkeypatch.setattr(_memory, "available_memory", lambda device: 10_000_000)
    with pytest.raises(ValueError, match=r"Gaussian stage \(12 starts and 10,000 draws of 10 lat.*"
                                         r"0\.01 GB are free.*dtype=torch\.float32"):
        check_start_memory(flow, log_joint)
    with pytest.raises(ValueError, match=r"the flow \(16 particles x 10 latents, [\d,]+ parameters"
                                         r".*fewer particles \(num_particles\)"):
        check_step_memory(flow, log_joint, ELBO(), 16, parameters)


def test_an_objective_that_fails_for_few_particles_is_judged_by_its_draws():
    flow, log_joint = problem()

    def objective(flow, log_joint, num_particles):
        if num_particles < 10:
            raise ValueError("too few")
        return ELBO()(flow, log_joint, num_particles)
    check_step_memory(flow, log_joint, objective, 16, list(flow.parameters()))


def test_single_precision_is_no_way_out_of_single_precision(monkeypatch):
    flow, log_joint = problem(dtype=torch.float32)
    monkeypatch.setattr(_memory, "available_memory", lambda device: 0)
    with pytest.raises(ValueError, match="more memory\\.$"):
        check_start_memory(flow, log_joint)
