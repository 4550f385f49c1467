"""Eight posteriors that need no download: data typed in, or of scikit-learn.

Each model is written once for Pyro and NumPyro (``ppl`` is the module, ``dist`` its distributions),
and once for PyMC. Continuous data are standardized, so that steps of one size suit all. Errors are
those of numbers on the real line: positive sites count by their logarithm, and quantities that
matter more than their noise, such as the levels of the Nile behind its steps, count as well.

References:
    Rubin (1981), eight schools; Crowder (1978), seeds; Gelfand et al. (1990), rats; George et al.
    (1993), pumps; Carlin & Gelfand (1991), dugongs; Cobb (1978), the Nile; Street et al. (1993),
    breast cancer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
Model = Callable[..., None]

RATS = [
    [151, 199, 246, 283, 320], [145, 199, 249, 293, 354], [147, 214, 263, 312, 328],
    [155, 200, 237, 272, 297], [135, 188, 230, 280, 323], [159, 210, 252, 298, 331],
    [141, 189, 231, 275, 305], [159, 201, 248, 297, 338], [177, 236, 285, 350, 376],
    [134, 182, 220, 260, 296], [160, 208, 261, 313, 352], [143, 188, 220, 273, 314],
    [154, 200, 244, 289, 325], [171, 221, 270, 326, 358], [163, 216, 242, 281, 312],
    [160, 207, 248, 288, 324], [142, 187, 234, 280, 316], [156, 203, 243, 283, 317],
    [157, 212, 259, 307, 336], [152, 203, 246, 286, 321], [154, 205, 253, 298, 334],
    [139, 190, 225, 267, 302], [146, 191, 229, 272, 302], [157, 211, 250, 285, 323],
    [132, 185, 237, 286, 331], [160, 207, 257, 303, 345], [169, 216, 261, 295, 333],
    [157, 205, 248, 289, 316], [137, 180, 219, 258, 291], [153, 200, 244, 286, 324]]
NILE = [
    1120, 1160, 963, 1210, 1160, 1160, 813, 1230, 1370, 1140, 995, 935, 1110, 994, 1020, 960, 1180,
    799, 958, 1140, 1100, 1210, 1150, 1250, 1260, 1220, 1030, 1100, 774, 840, 874, 694, 940, 833,
    701, 916, 692, 1020, 1050, 969, 831, 726, 456, 824, 702, 1120, 1100, 832, 764, 821, 768, 845,
    864, 862, 698, 845, 744, 796, 1040, 759, 781, 865, 845, 944, 984, 897, 822, 1010, 771, 676,
    649, 846, 812, 742, 801, 1040, 860, 874, 848, 890, 744, 749, 838, 1050, 918, 986, 797, 923,
    975, 815, 1020, 906, 901, 1170, 912, 746, 919, 718, 714, 740]
SEEDS = {
    "r": [10, 23, 23, 26, 17, 5, 53, 55, 32, 46, 10, 8, 10, 8, 23, 0, 3, 22, 15, 32, 3],
    "n": [39, 62, 81, 51, 39, 6, 74, 72, 51, 79, 13, 16, 30, 28, 45, 4, 12, 41, 30, 51, 7]}
DUGONGS = {
    "age": [1, 1.5, 1.5, 1.5, 2.5, 4, 5, 5, 7, 8, 8.5, 9, 9.5, 9.5, 10, 12, 12, 13, 13, 14.5, 15.5,
            15.5, 16.5, 17, 22.5, 29, 31.5],
    "length": [1.8, 1.85, 1.87, 1.77, 2.02, 2.27, 2.15, 2.26, 2.47, 2.19, 2.26, 2.4, 2.39, 2.41,
               2.5, 2.32, 2.32, 2.43, 2.47, 2.56, 2.65, 2.47, 2.64, 2.56, 2.7, 2.72, 2.57]}


@dataclass(frozen=True)
class Case:
    """A posterior.

    Attributes:
        title: What it is.
        data: Makes the arguments of the model, by name and in order.
        model: Makes the model for Pyro or NumPyro.
        pymc: Makes the priors and the likelihood inside a ``pm.Model``.
        positive: Sites that count by their logarithm.
        derived: Further numbers of draws.
        twin: Name of a case with the same posterior on which NUTS mixes better.
    """

    title: str
    data: Callable[[], Arrays]
    model: Callable[[Any, Any], Model]
    pymc: Callable[[Any, Arrays], None]
    positive: tuple[str, ...] = ()
    derived: Callable[[Arrays], Arrays] | None = None
    twin: str = ""

    def numbers(self, draws: Arrays) -> Arrays:
        """Real numbers of draws, ``(num_draws, size)`` by name."""
        found = {name: np.log(x) if name in self.positive else x for name, x in draws.items()}
        if self.derived is not None:
            found |= self.derived(draws)
        return {name: np.asarray(x, np.float64).reshape(len(x), -1) for name, x in found.items()}


def standardized(x: Any) -> np.ndarray:
    """Columns of mean zero and variance one."""
    x = np.asarray(x, np.float64)
    return (x - x.mean(0)) / x.std(0)


# ---------------------------------------------------------------------- eight schools

def schools_data() -> Arrays:
    return {"sigma": np.array([15.0, 10, 16, 11, 9, 11, 10, 18]),
            "y": np.array([28.0, 8, -3, 7, -1, 1, 18, 12])}


def schools_centered(ppl: Any, dist: Any) -> Model:
    def model(sigma: Any, y: Any) -> None:
        mu = ppl.sample("mu", dist.Normal(0.0, 5.0))
        tau = ppl.sample("tau", dist.HalfCauchy(5.0))
        with ppl.plate("school", len(y)):
            theta = ppl.sample("theta", dist.Normal(mu, tau))
            ppl.sample("obs", dist.Normal(theta, sigma), obs=y)
    return model


def schools_centered_pymc(pm: Any, data: Arrays) -> None:
    mu, tau = pm.Normal("mu", 0, 5), pm.HalfCauchy("tau", 5)
    theta = pm.Normal("theta", mu, tau, shape=8)
    pm.Normal("obs", theta, data["sigma"], observed=data["y"])


def schools_noncentered(ppl: Any, dist: Any) -> Model:
    def model(sigma: Any, y: Any) -> None:
        mu = ppl.sample("mu", dist.Normal(0.0, 5.0))
        tau = ppl.sample("tau", dist.HalfCauchy(5.0))
        with ppl.plate("school", len(y)):
            shift = ppl.sample("shift", dist.Normal(0.0, 1.0))
            ppl.sample("obs", dist.Normal(mu + tau * shift, sigma), obs=y)
    return model


def schools_noncentered_pymc(pm: Any, data: Arrays) -> None:
    mu, tau = pm.Normal("mu", 0, 5), pm.HalfCauchy("tau", 5)
    shift = pm.Normal("shift", 0, 1, shape=8)
    pm.Normal("obs", mu + tau * shift, data["sigma"], observed=data["y"])


def schools_effects(draws: Arrays) -> Arrays:
    return {"theta": draws["mu"][:, None] + draws["tau"][:, None] * draws["shift"]}


# ---------------------------------------------------------------------- regressions

def cancer_data() -> Arrays:
    from sklearn.datasets import load_breast_cancer
    found = load_breast_cancer()
    return {"x": standardized(found.data), "y": 1.0 - found.target}


def cancer(ppl: Any, dist: Any) -> Model:
    def model(x: Any, y: Any) -> None:
        intercept = ppl.sample("intercept", dist.Normal(0.0, 5.0))
        with ppl.plate("feature", x.shape[-1]):
            effect = ppl.sample("effect", dist.Normal(0.0, 1.0))
        with ppl.plate("row", len(y)):
            ppl.sample("obs", dist.Bernoulli(logits=intercept + effect @ x.T), obs=y)
    return model


def cancer_pymc(pm: Any, data: Arrays) -> None:
    intercept = pm.Normal("intercept", 0, 5)
    effect = pm.Normal("effect", 0, 1, shape=data["x"].shape[1])
    pm.Bernoulli("obs", logit_p=intercept + data["x"] @ effect, observed=data["y"])


# ---------------------------------------------------------------------- groups and counts

def seeds_data() -> Arrays:
    one, two = np.arange(21) >= 11, np.isin(np.arange(21), [*range(5, 11), *range(16, 21)])
    x = np.stack([np.ones(21), one, two, one & two], 1).astype(np.float64)
    return {"x": x, "n": np.array(SEEDS["n"], np.float64), "r": np.array(SEEDS["r"], np.float64)}


def seeds(ppl: Any, dist: Any) -> Model:
    def model(x: Any, n: Any, r: Any) -> None:
        with ppl.plate("factor", x.shape[-1]):
            effect = ppl.sample("effect", dist.Normal(0.0, 1.0))
        scale = ppl.sample("scale", dist.HalfCauchy(1.0))
        with ppl.plate("dish", len(r)):
            b = ppl.sample("b", dist.Normal(0.0, scale))
            ppl.sample("obs", dist.Binomial(n, logits=effect @ x.T + b), obs=r)
    return model


def seeds_noncentered(ppl: Any, dist: Any) -> Model:
    def model(x: Any, n: Any, r: Any) -> None:
        with ppl.plate("factor", x.shape[-1]):
            effect = ppl.sample("effect", dist.Normal(0.0, 1.0))
        scale = ppl.sample("scale", dist.HalfCauchy(1.0))
        with ppl.plate("dish", len(r)):
            raw = ppl.sample("raw", dist.Normal(0.0, 1.0))
            ppl.sample("obs", dist.Binomial(n, logits=effect @ x.T + scale * raw), obs=r)
    return model


def seeds_effects(draws: Arrays) -> Arrays:
    return {"b": draws["scale"][:, None] * draws["raw"]}


def seeds_pymc(pm: Any, data: Arrays) -> None:
    effect, scale = pm.Normal("effect", 0, 1, shape=4), pm.HalfCauchy("scale", 1)
    b = pm.Normal("b", 0, scale, shape=21)
    pm.Binomial("obs", data["n"].astype(int), logit_p=data["x"] @ effect + b,
                observed=data["r"].astype(int))


def rats_data() -> Arrays:
    y = np.array(RATS, np.float64)
    return {"week": np.arange(-2.0, 3.0), "y": ((y - y.mean()) / y.std()).T}


def rats(ppl: Any, dist: Any) -> Model:
    def model(week: Any, y: Any) -> None:
        mean_a = ppl.sample("mean_a", dist.Normal(0.0, 1.0))
        mean_b = ppl.sample("mean_b", dist.Normal(0.0, 1.0))
        scale_a = ppl.sample("scale_a", dist.HalfNormal(1.0))
        scale_b = ppl.sample("scale_b", dist.HalfNormal(1.0))
        noise = ppl.sample("noise", dist.HalfNormal(1.0))
        with ppl.plate("rat", y.shape[-1], dim=-1):
            a = ppl.sample("a", dist.Normal(mean_a, scale_a))
            b = ppl.sample("b", dist.Normal(mean_b, scale_b))
            with ppl.plate("week", len(week), dim=-2):
                ppl.sample("obs", dist.Normal(a + b * week[:, None], noise), obs=y)
    return model


def rats_pymc(pm: Any, data: Arrays) -> None:
    mean_a, mean_b = pm.Normal("mean_a", 0, 1), pm.Normal("mean_b", 0, 1)
    scale_a, scale_b = pm.HalfNormal("scale_a", 1), pm.HalfNormal("scale_b", 1)
    noise = pm.HalfNormal("noise", 1)
    a = pm.Normal("a", mean_a, scale_a, shape=30)
    b = pm.Normal("b", mean_b, scale_b, shape=30)
    pm.Normal("obs", a + b * data["week"][:, None], noise, observed=data["y"])


def pumps_data() -> Arrays:
    return {"time": np.array([94.3, 15.7, 62.9, 126, 5.24, 31.4, 1.05, 1.05, 2.1, 10.5]),
            "failures": np.array([5.0, 1, 5, 14, 3, 19, 1, 1, 4, 22])}


def pumps(ppl: Any, dist: Any) -> Model:
    def model(time: Any, failures: Any) -> None:
        alpha = ppl.sample("alpha", dist.Exponential(1.0))
        beta = ppl.sample("beta", dist.Gamma(0.1, 1.0))
        with ppl.plate("pump", len(failures)):
            rate = ppl.sample("rate", dist.Gamma(alpha, beta))
            ppl.sample("obs", dist.Poisson(rate * time), obs=failures)
    return model


def pumps_pymc(pm: Any, data: Arrays) -> None:
    alpha, beta = pm.Exponential("alpha", 1), pm.Gamma("beta", 0.1, 1)
    rate = pm.Gamma("rate", alpha, beta, shape=10)
    pm.Poisson("obs", rate * data["time"], observed=data["failures"].astype(int))


# ---------------------------------------------------------------------- curves

def dugongs_data() -> Arrays:
    return {name: np.array(values, np.float64) for name, values in DUGONGS.items()}


def dugongs(ppl: Any, dist: Any) -> Model:
    def model(age: Any, length: Any) -> None:
        alpha = ppl.sample("alpha", dist.Normal(2.0, 5.0))
        beta = ppl.sample("beta", dist.Normal(1.0, 5.0))
        gamma = ppl.sample("gamma", dist.Uniform(0.5, 1.0))
        noise = ppl.sample("noise", dist.HalfNormal(1.0))
        with ppl.plate("dugong", len(length)):
            ppl.sample("obs", dist.Normal(alpha - beta * gamma ** age, noise), obs=length)
    return model


def dugongs_pymc(pm: Any, data: Arrays) -> None:
    alpha, beta = pm.Normal("alpha", 2, 5), pm.Normal("beta", 1, 5)
    gamma, noise = pm.Uniform("gamma", 0.5, 1.0), pm.HalfNormal("noise", 1)
    pm.Normal("obs", alpha - beta * gamma ** data["age"], noise, observed=data["length"])


def nile_data() -> Arrays:
    return {"y": standardized(NILE)}


def nile(ppl: Any, dist: Any) -> Model:
    def model(y: Any) -> None:
        start = ppl.sample("start", dist.Normal(0.0, 2.0))
        drift = ppl.sample("drift", dist.HalfNormal(1.0))
        noise = ppl.sample("noise", dist.HalfNormal(1.0))
        with ppl.plate("year", len(y)):
            step = ppl.sample("step", dist.Normal(0.0, 1.0))
            level = start + drift * step.cumsum(-1)
            ppl.sample("obs", dist.Normal(level, noise), obs=y)
    return model


def nile_pymc(pm: Any, data: Arrays) -> None:
    start, drift = pm.Normal("start", 0, 2), pm.HalfNormal("drift", 1)
    noise, step = pm.HalfNormal("noise", 1), pm.Normal("step", 0, 1, shape=len(data["y"]))
    pm.Normal("obs", start + drift * step.cumsum(), noise, observed=data["y"])


def nile_levels(draws: Arrays) -> Arrays:
    return {"level": draws["start"][:, None] + draws["drift"][:, None] * draws["step"].cumsum(-1)}


CASES = {
    "schools, centered": Case(
        "eight schools, centered", schools_data, schools_centered, schools_centered_pymc,
        positive=("tau",), twin="schools, noncentered"),
    "schools, noncentered": Case(
        "eight schools, noncentered", schools_data, schools_noncentered, schools_noncentered_pymc,
        positive=("tau",), derived=schools_effects),
    "cancer": Case("logistic regression, breast cancer", cancer_data, cancer, cancer_pymc),
    "seeds": Case("seeds, a random effect for each dish", seeds_data, seeds, seeds_pymc,
                  positive=("scale",), twin="seeds, noncentered"),
    "rats": Case("rats, a line for each", rats_data, rats, rats_pymc,
                 positive=("scale_a", "scale_b", "noise")),
    "pumps": Case("pumps, a Poisson rate for each", pumps_data, pumps, pumps_pymc,
                  positive=("alpha", "beta", "rate")),
    "dugongs": Case("dugongs, a growth curve", dugongs_data, dugongs, dugongs_pymc,
                    positive=("noise",)),
    "nile": Case("the Nile, a local level", nile_data, nile, nile_pymc,
                 positive=("drift", "noise"), derived=nile_levels),
}
TWINS = {
    **CASES,
    "seeds, noncentered": Case(
        "seeds, noncentered", seeds_data, seeds_noncentered, seeds_pymc, positive=("scale",),
        derived=seeds_effects),
}
