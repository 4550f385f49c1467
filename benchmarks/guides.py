"""Accuracy and time of guides that people use today, on eight posteriors that need no download.

    python benchmarks/guides.py                      # what is not there yet; about an hour in all
    python benchmarks/guides.py --posteriors pumps --methods NFVI "Pyro AutoNormal" --again
    python benchmarks/guides.py --quick              # two posteriors, minutes; nothing is kept
    python benchmarks/guides.py --references         # first NUTS again, for the references
    python benchmarks/guides.py --report             # results/guides.md from the rows

Each method runs in a process of its own, on one thread, in double precision, with cold caches for
the code that we compile and warm ones for PyMC's. Times are of the processor, compilers included,
from model and data in hand to the draws. Methods: ours with nothing chosen; each guide of Pyro as
tutorials train it (2,000 steps of Adam at 0.01, one particle) and tuned (3,000 steps of 16
vectorized particles, the rate falling from 0.03 to a hundredth of that); NumPyro's flows tuned
likewise, from 0.005; PyMC's ADVI as it comes, its full-rank ADVI by 20,000 steps of Adam at 0.01,
and Pathfinder as it comes but for the number of draws. Errors are the largest over all numbers of
10,000 unweighted draws (weighted ones where it says so), in standard deviations of the reference:
four long chains of NumPyro's NUTS, kept in results/guides_references.json with R-hat and Monte
Carlo errors.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from guides_fits import CHAINS, METHODS, numpyro_chains
from guides_models import CASES, TWINS, Arrays
from tables import installed, machine, number, table

RESULTS = Path(__file__).with_name("results")
ROWS, REFERENCES = RESULTS / "guides.jsonl", RESULTS / "guides_references.json"
REPORT = RESULTS / "guides.md"
PACKAGES = ["torch", "pyro-ppl", "numpyro", "jax", "pymc", "pymc-extras"]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
              "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false "
              "intra_op_parallelism_threads=1"}
DEFAULT = [name for name in METHODS if name not in (
    "Pyro NUTS", "NumPyro AutoBNAFNormal, tuned")]  # these take long
QUICK = ["pumps", "dugongs"], ["NFVI", "Pyro AutoNormal", "Pyro AutoMultivariateNormal",
                               "Pyro AutoIAFNormal", "PyMC Pathfinder", "NumPyro NUTS"]
LONG = {"warm_up": 1000, "samples": 2500, "target_accept_prob": 0.9}
MARK = "answer: "
MAX_RHAT, CLOSE, SIMILAR, USABLE = 1.01, 0.1, 1.1, 0.7
Row = dict[str, Any]
Key = tuple[str, str, int]  # posterior, method, seed


# ---------------------------------------------------------------------- references

def reference(name: str) -> Row:
    """Means and deviations of long chains, checked."""
    import arviz

    case = TWINS[name]
    chains = numpyro_chains(case, 0, **LONG)
    flat = case.numbers({site: x.reshape(-1, *x.shape[2:]) for site, x in chains.items()})
    kept = {site: x.reshape(CHAINS, -1, x.shape[-1]) for site, x in flat.items()}
    data = arviz.convert_to_dataset(kept)
    rhat = max(float(x.max()) for x in arviz.rhat(data).values())
    if not rhat < MAX_RHAT:
        return {"failed": f"R-hat is {rhat:.3f}"}
    sizes = arviz.ess(data, method="mean")
    squares = {site: (x - x.mean((0, 1))) ** 2 for site, x in kept.items()}
    square_sizes = arviz.ess(arviz.convert_to_dataset(squares), method="mean")
    return {"rhat": rhat, "ess": min(float(x.min()) for x in sizes.values()),
            "draws": CHAINS * LONG["samples"], "numpyro": installed("numpyro"),
            "numbers": {site: {
                "mean": x.mean(0).tolist(), "sd": x.std(0).tolist(),
                "mcse_mean": (x.std(0) * sizes[site].values ** -0.5).tolist(),
                "mcse_sd": (squares[site].std((0, 1)) * square_sizes[site].values ** -0.5
                            / (2 * x.std(0))).tolist()} for site, x in flat.items()}}


def references() -> dict[str, Row]:
    """What is kept of the references, by posterior."""
    return json.loads(REFERENCES.read_text()) if REFERENCES.exists() else {}


def keep_reference(name: str, entry: Row) -> None:
    """Write one more, or again."""
    found = references() | {name: entry}
    ordered = {name: found[name] for name in TWINS if name in found}
    REFERENCES.write_text(json.dumps(rounded(ordered), indent=None) + "\n")


def rounded(x: Any) -> Any:
    """Numbers to five digits."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return float(f"{x:.5g}") if isinstance(x, float) else x


# ---------------------------------------------------------------------- one fit, in its process

def fit(name: str, method: str, seed: int) -> Row:
    """One row."""
    case = CASES[name]
    draws, row = METHODS[method][1](case, seed)
    again = row.pop("resampled", None)
    found = errors(case.numbers(draws), name)
    if again is not None:
        found["weighted_mean_err"], found["weighted_sd_ratio"] = errors(
            case.numbers(again), name).values()
    size = sum(int(np.prod(np.shape(x)[1:])) for x in draws.values())
    return {**row, **found, "dim": size}


def errors(numbers: Arrays, name: str) -> dict[str, float]:
    """Largest error of a mean in deviations of the reference, and largest ratio of deviations."""
    known = references()[CASES[name].twin or name]["numbers"]
    mean_err, log_ratio = [], []
    for site, x in numbers.items():
        mean, sd = (np.array(known[site][part]) for part in ("mean", "sd"))
        mean_err.append(abs(x.mean(0) - mean) / sd)
        with np.errstate(divide="ignore"):
            log_ratio.append(abs(np.log(x.std(0) / sd)))
    found = [np.concatenate(parts).max() for parts in (mean_err, log_ratio)]
    return {"mean_err": float(found[0]), "sd_ratio": float(np.exp(found[1]))}


# ---------------------------------------------------------------------- all fits

def apart(arguments: list[str]) -> Iterator[Row]:
    """Run this script in a process of its own; every line of its answer."""
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as words:
        run = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, *arguments], text=True, stderr=words,
            stdout=subprocess.PIPE, env={**os.environ, **ONE_THREAD, "PYRO_NFVI_CACHE": cache})
        for answer in run.stdout or ():
            if answer.startswith(MARK):
                yield json.loads(answer.removeprefix(MARK))
        if run.wait():
            words.seek(0)
            raise SystemExit(f"{' '.join(arguments)}: {words.read()[-2000:]}")


def answer(row: Row) -> None:
    """Say a row to the parent."""
    print(f"\n{MARK}{json.dumps(row)}", flush=True)


def attempt(name: str, method: str, seed: int, cap: float) -> Row:
    """One row, or why there is none."""
    def late(*_: Any) -> None:
        raise TimeoutError(f"over {cap:.0f} s")
    signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, cap)
    try:
        return fit(name, method, seed)
    except Exception as error:  # a failed fit is a result
        return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"[:200]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def read() -> dict[Key, Row]:
    """All rows; of several with one key, the last."""
    lines = ROWS.read_text().splitlines() if ROWS.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["posterior"], row["method"], row["seed"]): row for row in rows}


def prepare(options: argparse.Namespace) -> None:
    """Compute the references that are not there; leave out posteriors that have none."""
    for name in dict.fromkeys(CASES[name].twin or name for name in options.posteriors):
        if not options.references and name in references():
            continue
        found = {"failed": "NumPyro, which computes it, is not installed"}
        if installed("numpyro"):
            (found,) = apart(["--reference", name])
        if "failed" in found:
            say(f"{name} is left out, as it has no reference: {found['failed']}")
            options.posteriors = [each for each in options.posteriors
                                  if name not in (each, CASES[each].twin)]
            continue
        keep_reference(name, found)
        say(f"reference of {name}: R-hat {found['rhat']:.4f}, least ESS {found['ess']:,.0f}")


def fit_all(options: argparse.Namespace) -> list[Row]:
    """Every fit that is asked for and not there; all rows asked for."""
    kept = {} if options.quick else read()
    for seed, method in itertools.product(options.seeds, options.methods):
        names = [name for name in options.posteriors
                 if options.again or (name, method, seed) not in kept]
        if not names or installed(METHODS[method][0]) is None:
            continue
        fits = apart(["--fit", method, str(seed), str(options.cap), *names])
        for name, found in zip(names, fits, strict=True):
            row = {"posterior": name, "method": method, "seed": seed, **rounded(found)}
            kept[name, method, seed] = row
            say(line(row))
            if not options.quick:
                with ROWS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    return [row for row in kept.values()
            if row["posterior"] in options.posteriors and row["method"] in options.methods]


def line(row: Row) -> str:
    """A row in a line."""
    words = [f"{title} {number(row[column])}" for title, column in
             (("error", "mean_err"), ("sd ratio", "sd_ratio"), ("k", "k"), ("s", "cpu"))
             if column in row]
    return "  ".join([f"{row['posterior']}, {row['method']}: {row.get('failed', '')}", *words])


def say(text: str) -> None:
    """Show progress."""
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------- tables

def of(rows: Iterable[Row], **wanted: str) -> list[Row]:
    """Rows of one method or posterior."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def worst(rows: list[Row], column: str) -> float:
    """Largest value of a column; what failed, or is not a number, is the worst."""
    values = [row.get(column, math.inf if "failed" in row else None) for row in rows]
    known = [math.inf if math.isnan(value) else value for value in values if value is not None]
    return max(known, default=math.nan)


def count(rows: list[Row], column: str, below: float) -> str:
    """How many of the rows that have a column are below a limit."""
    values = [row.get(column, math.inf if "failed" in row else None) for row in rows]
    known = [value for value in values if value is not None]
    if not known or all(value == math.inf for value in known) and column == "k":
        return "-"
    return f"{sum(value <= below for value in known)} of {len(rows)}"


def present(rows: list[Row]) -> list[str]:
    """Methods of which there are rows, in order."""
    return [name for name in METHODS if of(rows, method=name)]


def summary_table(rows: list[Row]) -> str:
    """One line for each method."""
    head = ["method", "means within 0.1 sd", "worst mean, in sds", "sds within 10%",
            "worst ratio of sds", "k-hat < 0.7", "seconds, median", "longest"]
    lines = []
    for method in present(rows):
        mine = of(rows, method=method)
        seconds = [row["cpu"] for row in mine if "cpu" in row]
        lines.append([method, count(mine, "mean_err", CLOSE), worst(mine, "mean_err"),
                      count(mine, "sd_ratio", SIMILAR), worst(mine, "sd_ratio"),
                      count(mine, "k", USABLE), statistics.median(seconds or [math.nan]),
                      max(seconds, default=math.nan)])
    return table(head, lines)


def error_table(rows: list[Row]) -> str:
    """Error of the means and seconds, posterior by posterior."""
    methods = present(rows)
    names = [name for name in CASES if of(rows, posterior=name)]
    return table(["posterior", "D", *methods], (
        [CASES[name].title, max(row.get("dim", 0) for row in of(rows, posterior=name)),
         *(cell(of(rows, posterior=name, method=method)) for method in methods)]
        for name in names))


def cell(rows: list[Row]) -> str:
    """Error of the means and seconds of one method on one posterior."""
    if not rows:
        return "-"
    if any("failed" in row for row in rows):
        return "failed"
    seconds = statistics.median(row["cpu"] for row in rows)
    return f"{number(worst(rows, 'mean_err'))}, {number(seconds)} s"


def full_table(rows: list[Row]) -> str:
    """Every number of every fit."""
    head = ["posterior", "method", "seed", "worst mean", "worst ratio of sds", "k-hat", "ESS",
            "weighted: worst mean", "weighted: ratio of sds", "CPU s", "wall s", ""]
    order = list(METHODS)
    ranked = sorted(rows, key=lambda row: (list(CASES).index(row["posterior"]),
                                           order.index(row["method"]), row["seed"]))
    columns = ["mean_err", "sd_ratio", "k", "ess", "weighted_mean_err", "weighted_sd_ratio", "cpu",
               "wall"]
    return table(head, ([row["posterior"], row["method"], row["seed"],
                         *(row.get(column) for column in columns),
                         row.get("failed") or row.get("verdict", "").removeprefix("Verdict: ")]
                        for row in ranked))


def reference_table() -> str:
    """How good the references are."""
    def error(entry: Row, part: str) -> float:
        return max(max(np.divide(x[part], x["sd"])) for x in entry["numbers"].values())
    return table(["posterior", "draws", "R-hat", "least ESS", "MC error of means, in sds",
                  "of sds"],
                 ([name, f"{entry['draws']:,}", f"{entry['rhat']:.4f}", entry["ess"],
                   f"{error(entry, 'mcse_mean'):.3f}", f"{error(entry, 'mcse_sd'):.3f}"]
                  for name, entry in references().items()))


def block(rows: list[Row] | None = None) -> str:
    """What the README shows."""
    rows = list(read().values()) if rows is None else rows
    missing = [method for method in DEFAULT if not of(rows, method=method)]
    said = f" Not measured: {'; '.join(missing)}." if missing else ""
    return (f"{summary_table(rows)}\n\nUnweighted draws on {len({r['posterior'] for r in rows})} "
            "posteriors, positive sites by their logarithm; seconds of one core, compilation "
            "included; tuned: more particles and a falling rate; NUTS: 4 chains of 1,000 + "
            f"1,000.{missed(rows)}{said}")


def missed(rows: list[Row]) -> str:
    """Where our own fit is off by more than it should."""
    words = [f"{CASES[row['posterior']].title} (a mean by {number(row['mean_err'])} sds, an sd by "
             f"a factor of {number(row['sd_ratio'])}, k-hat {number(row['k'])})"
             for row in of(rows, method="NFVI")
             if row["mean_err"] > CLOSE or row["sd_ratio"] > SIMILAR]
    return f" Where `NFVI` is off: {'; '.join(words)}." if words else ""


def report(rows: list[Row], head: str) -> str:
    """The whole document."""
    words = (__doc__ or "").split("\n\n")[2].replace("\n", " ").strip()
    return "\n\n".join([
        "# Guides", head, words, "## In short", block(rows),
        "## Posterior by posterior", "Largest error of a mean, and seconds.", error_table(rows),
        "## Every fit", full_table(rows), "## References", reference_table()]) + "\n"


# ---------------------------------------------------------------------- main

def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several: dict[str, Any] = {"nargs": "+"}
    parser.add_argument("--posteriors", **several, default=list(CASES), choices=list(CASES))
    parser.add_argument("--methods", **several, default=DEFAULT, choices=list(METHODS))
    parser.add_argument("--seeds", **several, type=int, default=[0])
    parser.add_argument("--cap", type=float, default=300, help="processor seconds of a fit")
    parser.add_argument("--again", action="store_true", help="also what is there; new rows count")
    parser.add_argument("--references", action="store_true", help="compute them again")
    parser.add_argument("--quick", action="store_true", help="two posteriors, nothing kept")
    parser.add_argument("--report", action="store_true", help="only write the tables")
    parser.add_argument("--fit", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--reference", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.posteriors, options.methods = QUICK
    return options


def main() -> None:
    """Fit one, fit all, or report."""
    options = arguments()
    if options.fit:
        method, seed, cap, *names = options.fit
        for name in names:
            answer(attempt(name, method, int(seed), float(cap)))
        return
    if options.reference:
        answer(reference(options.reference))
        return
    head = RESULTS / "guides_machine.txt"
    if not options.report:
        prepare(options)
        rows = fit_all(options)
    if options.quick:
        print(machine(PACKAGES) + "\n\n" + summary_table(rows) + "\n\n" + error_table(rows))
        return
    if not options.report:
        head.write_text(machine(PACKAGES) + "\n")
    text = report(list(read().values()), head.read_text().strip() if head.exists() else "")
    REPORT.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
