"""Whether a fit can be trusted: many posteriors with references, many seeds, one fit each.

Every fit runs in a process of its own, with cold caches, on one thread and in float64, and is
scored on 10,000 weighted draws against the reference. Rows go to a JSON-lines file as they come;
rows that are there are not run again. The posteriors come from a folder with ``models.py`` and
``score.py``, which this project does not hold, and from :mod:`pathologies`.

    python benchmarks/posteriors.py --posteriors FOLDER [--set gold] [--seeds 0 1 2]
    python benchmarks/posteriors.py --posteriors FOLDER --methods baselines --seeds 0 \
        --out benchmarks/results/posteriors_baselines.jsonl
    python benchmarks/posteriors.py --report    # tables from the rows: results/posteriors.md
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path
from typing import Any

from tables import number, table

RESULTS = Path(__file__).with_name("results")
OURS = ["nfvi", "AutoPlanar", "AutoRadial", "AutoIAF", "AutoSpline"]
GUIDES = ["Pyro AutoNormal", "Pyro AutoMultivariateNormal", "Pyro AutoIAFNormal",
          "Pyro AutoLaplaceApproximation"]
NUTS = "Pyro NUTS"
GROUPS = {"ours": OURS, "guides": GUIDES, "baselines": [*GUIDES, NUTS]}
SETS = {"gold": "posteriordb's references", "extra": "hierarchical and other, long NUTS runs",
        "pathologies": "synthetic"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
OK_K, GOOD_K, BIG_ERROR, SMALL_ERROR, GOOD_ESS = 0.7, 0.5, 0.1, 0.05, 0.5
NUM_DRAWS = 10_000
SLACK = 120  # seconds beyond a cap for starting and scoring
Row = dict[str, Any]
Key = tuple[str, str, int]  # name, method, seed


# ---------------------------------------------------------------------- one fit, in its process


def problem(name: str, folder: Path) -> Any:
    """The posterior of that name."""
    import numpy as np
    import pathologies
    from posteriors_baselines import Problem

    sys.path.insert(0, str(folder))
    import models
    import score
    if name in pathologies.names():
        model, args, kwargs, reference = pathologies.load(name)
        rng = np.random.default_rng(0)
        floor = halves(score, reference, rng)
        return Problem(name, name, model, args, kwargs, models.Density(model, args, kwargs),
                       reference, lambda: reference, floor)
    model, args, kwargs, reference = models.load(name)
    return Problem(name, model.__name__, model, args, kwargs, models.Density(model, args, kwargs),
                   reference, lambda: models.latent_reference(name),
                   score.floors().get(name, {}).get("half", {}))


def halves(score: Any, reference: dict[str, Any], rng: Any, splits: int = 10) -> dict[str, float]:
    """Errors of one half of the reference against the other, mean over random splits."""
    _, draws = score.flatten(reference)
    errors = []
    for _ in range(splits):
        one, other = (draws[part] for part in rng.permutation(len(draws)).reshape(2, -1))
        log_sd = abs(_log(one.std(0)) - _log(other.std(0))).max()
        errors.append((abs((one.mean(0) - other.mean(0)) / other.std(0)).max(), log_sd))
    means, sds = zip(*errors, strict=True)
    return {"max_mean_err": float(statistics.fmean(means)),
            "max_log_sd": float(statistics.fmean(sds))}


def _log(x: Any) -> Any:
    import numpy as np
    return np.log(x)


def fit(name: str, method: str, seed: int, folder: Path, cap: float) -> Row:
    """One row."""
    import pyro
    import torch
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    import posteriors_baselines as baselines

    case = problem(name, folder)
    row: Row = {"family": case.family, "dim": case.density.dim, "floor": case.floor.get(
        "max_mean_err"), "floor_log_sd": case.floor.get("max_log_sd")}
    clock = baselines.Clock()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            pyro.set_rng_seed(seed)
            run = ours if method in OURS else others
            row |= run(case, method, seed, cap)
        except Exception as error:  # a failed fit is a result
            words = str(error).strip().split("\n")[0]
            row |= {**clock(), "failed": f"{type(error).__name__}: {words}"[:200]}
    said = Counter(str(warning.message).split("\n")[0][:200] for warning in caught
                   if "NFVI" in str(warning.message))
    return row | ({"warnings": list(said)} if said else {})


def ours(case: Any, method: str, seed: int, cap: float) -> Row:
    """Fit by NFVI, with its own recipe or with a guide."""
    import torch
    from posteriors_baselines import CHUNK, Clock

    import pyro_nfvi
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    clock = Clock()
    guide = None if method == "nfvi" else getattr(pyro_nfvi, method)(case.model)
    posterior = pyro_nfvi.NFVI(case.model, guide, seed=seed, progress=False).run(
        *case.args, **case.kwargs)
    times = clock()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # the compiler
    times["cpu"] += after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime
    log_joint, history = posterior.log_joint, posterior.history
    log_weights = posterior.log_weights.double()
    alive = log_weights > -math.inf
    z, log_weights = posterior.draws.z[alive], log_weights[alive]
    with torch.no_grad():
        parts = [log_joint.layout.constrain(part)[0] for part in z.split(CHUNK)]
        if any(name not in parts[0] for name in case.reference):
            parts = [part | log_joint.deterministic(flat) for part, flat in
                     zip(parts, z.split(CHUNK), strict=True)]
    draws = {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}
    engine = posterior.engine
    summary = posterior.summary()
    return {**times, "dim": posterior.guide.latent_dim, "k": float(posterior.pareto_k),
            "ess": float(posterior.ess) / NUM_DRAWS, "trusted": bool(summary.trusted),
            "verdict": summary.verdict, "elbo": float(posterior.elbo[0]),
            "gradients": getattr(history, "gradients", None),
            "stages": [list(astuple(stage)) for stage in history.stages],
            "tier": getattr(engine, "tier", None), **errors(case, draws, log_weights.numpy())}


def others(case: Any, method: str, seed: int, cap: float) -> Row:
    """Fit by Pyro."""
    import numpy as np
    import posteriors_baselines as baselines
    import score
    result = baselines.fit(case, method, seed, cap)
    if result.log_ratios is None:
        return result.row | (errors(case, result.draws, None) if result.draws else {})
    finite = np.isfinite(result.log_ratios)
    if finite.sum() < 100:
        return result.row | {"failed": "the log joint of the guide's draws is not finite"}
    log_weights, k = score.psis(result.log_ratios[finite])
    draws = {name: value[finite] for name, value in result.draws.items()}
    weights = np.exp(log_weights - np.logaddexp.reduce(log_weights))
    return {**result.row, "k": k, "ess": float(1 / (weights @ weights)) / NUM_DRAWS,
            "elbo": float(result.log_ratios[finite].mean()), **errors(case, draws, log_weights)}


def errors(case: Any, draws: dict[str, Any], log_weights: Any) -> Row:
    """Largest errors over all numbers, in standard deviations of the reference."""
    import score
    reference = case.reference
    if any(name not in draws for name in reference):
        reference = case.latents()
    found = score.score(draws, reference, log_weights)
    plain = found if log_weights is None else score.score(draws, reference)
    scalars = found["scalars"]
    worst = max(scalars, key=lambda name: scalars[name]["mean_err"]) if scalars else ""
    return {"mean_err": found["max_mean_err"], "log_sd": found["max_log_sd"], "w1": found["max_w1"],
            "sw1": found["sw1"], "worst": worst, "mean_err_plain": plain["max_mean_err"]}


# ---------------------------------------------------------------------- all fits


def kinds(folder: Path) -> dict[str, str]:
    """The set of each posterior, by name, in order."""
    sys.path.insert(0, str(folder))
    import models
    import pathologies
    found = {name: "gold" for name in models.names()}
    found |= {name: "extra" for name in models.names("extra")}
    return found | {name: "pathologies" for name in pathologies.names()}


def read(path: Path) -> dict[Key, Row]:
    """Rows of a file; of several with one key, the last."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {(row["name"], row["method"], row["seed"]): row for row in rows}


def run(key: Key, kind: str, options: argparse.Namespace) -> Row:
    """One fit in a process of its own, limited in processor time."""
    name, method, seed = key
    cap = options.nuts_cap if method == NUTS else options.cap
    with tempfile.TemporaryDirectory() as cache:
        caches = {"PYRO_NFVI_CACHE": cache, "TORCHINDUCTOR_CACHE_DIR": f"{cache}/inductor"}
        done = subprocess.run(
            [sys.executable, __file__, "--posteriors", str(options.posteriors), "--fit", name,
             method, str(seed), str(cap)], text=True, capture_output=True,
            env={**os.environ, **ONE_THREAD, **caches})
    head = {"name": name, "method": method, "seed": seed, "set": kind}
    try:
        return head | json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        words = (done.stderr.strip().splitlines() or [""])[-1][:200]
        late = done.returncode in (-9, -24)  # killed, out of time
        return head | {"failed": f"more than {cap:g} s of processor time, or killed" if late
                       else f"died, exit status {done.returncode}: {words}"}


def fit_all(options: argparse.Namespace) -> None:
    """Run what is missing, and append it."""
    sets = kinds(options.posteriors)
    wanted = options.names or [name for name, kind in sets.items()
                               if kind in options.set or "all" in options.set
                               or "public" in options.set and kind != "pathologies"]
    unknown = [name for name in wanted if name not in sets]
    if unknown:
        raise SystemExit(f"no posterior {', '.join(unknown)}; there are: {', '.join(sets)}")
    done = {} if options.again else read(options.out)
    methods = [each for method in options.methods for each in GROUPS.get(method, [method])]
    keys = [(name, method, seed) for seed in options.seeds for name in wanted
            for method in methods]
    todo = [key for key in keys if key not in done]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lock, finished = threading.Lock(), 0

    def one(key: Key) -> None:
        nonlocal finished
        row = run(key, sets[key[0]], options)
        with lock, options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
            finished += 1
            say(f"{finished} of {len(todo)}: {line(row)}")
    with ThreadPoolExecutor(options.workers) as pool:
        list(pool.map(one, todo))


def line(row: Row) -> str:
    """A row in a line."""
    words = [f"{row['name']}, {row['method']}, seed {row['seed']}: {row.get('failed', '')}"]
    words += [f"{title} {number(row[column])}" for title, column in
              (("k", "k"), ("ESS", "ess"), ("bulk ESS", "ess_bulk"), ("error", "mean_err"),
               ("s", "cpu")) if row.get(column) is not None]
    return "  ".join(words) + ("  SILENT" if silent(row) else "")


def say(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------- judgement


def value(row: Row, column: str, otherwise: float = math.inf) -> float:
    """A number of a row; if there is none, the worst."""
    found = row.get(column)
    return otherwise if found is None or math.isnan(found) else found


def passes(row: Row, bar: float = OK_K) -> bool:
    """Whether k-hat allows to use the draws."""
    return value(row, "k") < bar


def silent(row: Row) -> bool:
    """Whether k-hat is good and the mean is far off."""
    return passes(row) and value(row, "mean_err") > BIG_ERROR


def silent_trusted(row: Row) -> bool:
    """Whether the verdict is good and the mean is far off."""
    return bool(row.get("trusted")) and value(row, "mean_err") > BIG_ERROR


def accurate(row: Row) -> bool:
    """Whether all means are within a twentieth of a standard deviation."""
    return value(row, "mean_err") <= SMALL_ERROR


def share(rows: list[Row], holds: Callable[[Row], bool]) -> str:
    """Percentage of rows."""
    return f"{100 * sum(map(holds, rows)) / len(rows):.0f}%" if rows else "-"


def family_share(rows: list[Row], holds: Callable[[Row], bool]) -> str:
    """Percentage, every family counting the same."""
    groups: dict[str, list[bool]] = {}
    for row in rows:
        groups.setdefault(row.get("family", row["name"]), []).append(holds(row))
    shares = [sum(group) / len(group) for group in groups.values()]
    return f"{100 * statistics.fmean(shares):.0f}%" if shares else "-"


def median(rows: list[Row], column: str) -> float:
    """Of the rows that have it."""
    found = [row[column] for row in rows if row.get(column) is not None]
    return statistics.median(found) if found else math.nan


# ---------------------------------------------------------------------- tables


def by_name(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of each posterior."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["name"], []).append(row)
    order = list(SETS)
    return dict(sorted(groups.items(), key=lambda item: order.index(item[1][0]["set"])))


def stage(row: Row) -> str:
    """Where a fit stopped."""
    return row["stages"][-1][0].removeprefix("NFVI ") if row.get("stages") else "failed"


def short(name: str) -> str:
    """A name without saying everything twice."""
    data, _, model = name.partition("-")
    return model if model.startswith(data) else name


def posterior_table(rows: list[Row]) -> str:
    """One line for each posterior, the worst over its fits."""
    head = ["posterior", "D", "fits", "k-hat", "ESS", "mean error", "floor", "log sd ratio",
            "trusted", "silent", "silent, trusted", "stopped at", "gradients", "CPU s", "wall s"]

    def cells(name: str, fits: list[Row]) -> list[Any]:
        stops = Counter(map(stage, fits)).most_common()
        where = ", ".join(f"{words} x{count}" if len(stops) > 1 else words
                          for words, count in stops)
        return [short(name), fits[0].get("dim", "-"), len(fits),
                max(value(row, "k") for row in fits), min(value(row, "ess", 0.0) for row in fits),
                max(value(row, "mean_err") for row in fits), median(fits, "floor"),
                max(value(row, "log_sd") for row in fits),
                f"{sum(bool(row.get('trusted')) for row in fits)} of {len(fits)}",
                sum(map(silent, fits)), sum(map(silent_trusted, fits)), where,
                median(fits, "gradients"), median(fits, "cpu"), median(fits, "wall")]
    return table(head, (cells(name, fits) for name, fits in by_name(rows).items()))


def summary_table(rows: list[Row]) -> str:
    """Shares of all fits of a method, set by set."""
    head = ["method", "set", "posteriors", "fits", "failed", "k-hat < 0.7", "by family",
            "k-hat < 0.5", "mean error <= 0.05", "ESS >= 0.5", "trusted", "silent failures",
            "silent, trusted", "right, not trusted", "median CPU s", "longest"]
    found = []
    for method in [*OURS, *GUIDES]:
        of_method = [row for row in rows if row["method"] == method]
        sets = [[kind] for kind in SETS] + [list(SETS)]
        for chosen in sets:
            fits = [row for row in of_method if row["set"] in chosen]
            if fits and (len(chosen) == 1 or len({row["set"] for row in of_method}) > 1):
                found.append(summary_cells(method, chosen, fits))
    return table(head, found)


def summary_cells(method: str, chosen: list[str], fits: list[Row]) -> list[Any]:
    """One line of the summary."""
    judged = any("trusted" in row for row in fits)
    return [method, chosen[0] if len(chosen) == 1 else "all", len({row["name"] for row in fits}),
            len(fits), sum("failed" in row for row in fits), share(fits, passes),
            family_share(fits, passes), share(fits, lambda row: passes(row, GOOD_K)),
            share(fits, accurate), share(fits, lambda row: value(row, "ess", 0.0) >= GOOD_ESS),
            share(fits, lambda row: bool(row.get("trusted"))) if judged else "-",
            sum(map(silent, fits)), sum(map(silent_trusted, fits)) if judged else "-",
            sum(accurate(row) and not row["trusted"] for row in fits if "trusted" in row)
            if judged else "-", median(fits, "cpu"), max(value(row, "cpu", 0.0) for row in fits)]


def comparison_table(rows: list[Row]) -> str:
    """k-hat, error and seconds of all methods, posterior by posterior."""
    present = {row["method"] for row in rows}
    methods = [method for method in [*OURS, *GUIDES, NUTS] if method in present]
    return table(["posterior", *(method.removeprefix("Pyro ") for method in methods)], (
        [short(name), *(cell([row for row in fits if row["method"] == method])
                        for method in methods)] for name, fits in by_name(rows).items()))


def cell(fits: list[Row]) -> str:
    """The worst fit: k-hat or bulk ESS, then error, then median seconds."""
    if not fits:
        return "-"
    seconds = f"{number(median(fits, 'cpu'))} s"
    failed = [row["failed"] for row in fits if "failed" in row]
    if failed:
        return f"failed, {seconds}" if len(fits) == 1 else f"failed {len(failed)}/{len(fits)}"
    error = number(max(value(row, "mean_err") for row in fits))
    if fits[0]["method"] != NUTS:
        worst = number(max(value(row, "k") for row in fits))
        mark = "**" if any(map(silent, fits)) else ""
        return f"{mark}{worst}, {error}{mark}, {seconds}"
    size = number(min(value(row, "ess_bulk", 0.0) for row in fits))
    capped = [row for row in fits if row.get("capped")]
    if not capped:
        return f"ESS {size}, {error}, {seconds}"
    done = capped[0]["warm_up"] + capped[0]["samples"]
    return f"capped after {done:,} of 2,000" + (f": {error}" if math.isfinite(
        max(value(row, "mean_err") for row in capped)) else "")


def speed_table(rows: list[Row]) -> str:
    """Effective draws a second: ours after weighting, NUTS in bulk."""
    found = []
    for name, fits in by_name(rows).items():
        mine = [row for row in fits if row["method"] == "nfvi" and row.get("ess")]
        chain = [row for row in fits if row["method"] == NUTS and row.get("ess_bulk")]
        if not mine or not chain:
            continue
        rates = [statistics.median(NUM_DRAWS * row["ess"] / row["cpu"] for row in mine),
                 statistics.median(row["ess_bulk"] / row["cpu"] for row in chain)]
        found.append([short(name), *rates, rates[0] / rates[1], median(mine, "cpu"),
                      median(chain, "cpu"), "yes" if chain[0].get("capped") else ""])
    return table(["posterior", "nfvi", "NUTS", "nfvi / NUTS", "nfvi CPU s", "NUTS CPU s",
                  "NUTS capped"], found) if found else ""


def failures(rows: list[Row]) -> str:
    """What went wrong, and what passed while it was wrong."""
    loud: dict[str, list[str]] = {}
    for row in rows:
        if "failed" in row:
            what = f"{row['method']}: {row['failed'].split(': ')[0]}"
            loud.setdefault(what, []).append(f"{short(row['name'])} (seed {row['seed']})")
    lines = [f"- {what}: {', '.join(names)}" for what, names in loud.items()]
    lines += [f"- {row['name']}, {row['method']}, seed {row['seed']}: k-hat {number(row['k'])}, "
              f"{row.get('worst')} off by {number(row['mean_err'])}"
              + (", trusted" if row.get("trusted") else "")
              for row in rows if silent(row) or silent_trusted(row)]
    return "\n".join(lines) or "None."


def report(rows: list[Row]) -> str:
    """The whole document."""
    mine = [row for row in rows if row["method"] == "nfvi"]
    sets = "; ".join(f"{kind}: {words}" for kind, words in SETS.items())
    parts = [
        "# Posteriors with references",
        f"One fit of {len(by_name(rows))} posteriors for each seed, in float64, on one thread, "
        "each in a fresh process with cold caches; CPU seconds are from model and data to the "
        f"weighted draws, the compiler included. Sets: {sets}. Errors are the largest over all "
        "numbers, after weighting, in standard deviations of the reference; the floor is that of "
        "5,000 independent draws against 5,000. Silent: k-hat below 0.7 and a mean off by more "
        "than 0.1; silent, trusted: the verdict is good and a mean off by more than 0.1.",
        "## Summary", summary_table(rows)]
    if mine:
        parts += ["## NFVI(model).run(data), the worst over seeds", posterior_table(mine)]
    for method in OURS[1:]:
        if fits := [row for row in rows if row["method"] == method]:
            parts += [f"## NFVI(model, {method}(model)).run(data)", posterior_table(fits)]
    parts += ["## Comparison",
              "k-hat, mean error, CPU seconds; bold: silent. Pyro's guides: 2,000 steps of Adam "
              "at 1e-2, one particle. NUTS: 1,000 + 1,000 steps of one chain, compiled, stopped "
              "by processor time; bulk ESS, mean error, CPU seconds.", comparison_table(rows)]
    if speed := speed_table(rows):
        parts += ["## Effective draws per CPU second", speed]
    return "\n\n".join([*parts, "## Failures, loud and silent", failures(rows)]) + "\n"


# ---------------------------------------------------------------------- main


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several: dict[str, Any] = {"nargs": "+"}
    parser.add_argument("--posteriors", type=Path, metavar="FOLDER",
                        help="with models.py and score.py")
    parser.add_argument("--set", **several, default=["all"], choices=[*SETS, "public", "all"],
                        help="public: gold and extra")
    parser.add_argument("--names", **several, help="only these, in this order")
    parser.add_argument("--methods", **several, default=["nfvi"],
                        choices=[*OURS, *GUIDES, NUTS, *GROUPS])
    parser.add_argument("--seeds", **several, type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1, help="fits at a time")
    parser.add_argument("--cap", type=float, default=1800, help="processor seconds of a fit")
    parser.add_argument("--nuts-cap", type=float, default=300, help="and of a run of NUTS")
    parser.add_argument("--again", action="store_true", help="also what is there; new rows count")
    parser.add_argument("--out", type=Path, default=RESULTS / "posteriors.jsonl")
    parser.add_argument("--baselines", type=Path, metavar="FILE",
                        default=RESULTS / "posteriors_baselines.jsonl")
    parser.add_argument("--report", nargs="?", type=Path, metavar="FILE.md",
                        const=RESULTS / "posteriors.md", help="write the tables")
    parser.add_argument("--fit", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.posteriors is None and options.report is None:
        parser.error("--posteriors or --report is needed")
    return options


def main() -> None:
    """Fit one, fit all, or report."""
    options = arguments()
    if options.fit:
        name, method, seed, cap = options.fit
        limit = math.ceil(float(cap)) + SLACK
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        print(json.dumps(fit(name, method, int(seed), options.posteriors, float(cap))))
        return
    if options.posteriors is not None:
        fit_all(options)
    if options.report is not None:
        rows = read(options.baselines) | read(options.out)
        text = report(list(rows.values()))
        options.report.write_text(text)
        print(text)


if __name__ == "__main__":
    main()
