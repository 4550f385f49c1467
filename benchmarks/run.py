"""Every table of the README and the documentation, by one command.

    python benchmarks/run.py                  # all that this machine has the data for; hours
    python benchmarks/run.py flows guides     # some
    python benchmarks/run.py --quick          # all, smaller, kept nowhere; minutes
    python benchmarks/run.py --list           # what there is, what it needs, how long it takes
    python benchmarks/run.py --readme         # write the tables into README.md, measure nothing
    python benchmarks/run.py --check          # is the README as the results say?

Each table is a script of its own, with more options than are used here. A full run keeps what it
prints in results/NAME.md, with versions and machine in the head; packages that are not installed
are named there. Some tables need data that do not come with the project: posteriors with reference
draws (``--posteriors FOLDER`` or $PYRO_NFVI_POSTERIORS), images (``--mnist``, ``--frey``).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import guides
from tables import installed, machine, parse, table

HERE = Path(__file__).parent
RESULTS, README = HERE / "results", HERE.parent / "README.md"
ALWAYS = ["pyro-nfvi", "torch", "pyro-ppl", "arviz"]


@dataclass(frozen=True)
class Table:
    """One script.

    Attributes:
        words: What it shows.
        takes: About how long a full run takes on one core.
        full: Its arguments; ``{name}`` stands for the path that the option ``name`` gives, and a
            semicolon for another run of the script.
        quick: Its arguments if there is little time; none if it cannot be short.
        peers: Packages it compares with, or reads data from.
        needs: Options without which there is nothing to do.
        extra: Further arguments, by the option that they need.
        prints: Whether what it prints is what is kept; others write their files themselves.
        title: First line of what is kept.
    """

    words: str
    takes: str
    full: str = ""
    quick: str | None = None
    peers: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    extra: tuple[tuple[str, str], ...] = ()
    prints: bool = False
    title: str = ""


TABLES = {
    "guides": Table("accuracy and time of guides on eight posteriors", "an hour",
                    quick="--quick", peers=("numpyro", "jax", "pymc", "pymc-extras")),
    "picture": Table("the picture of the README", "a minute", peers=("numpyro",)),
    "flows": Table("sampling, scoring and gradients of flows", "10 min",
                   quick="--rounds 3 --only 'planar x8'", peers=("zuko", "normflows"), prints=True,
                   title="Flows: sampling, scoring and their gradient"),
    "inner_loop": Table("a step of SVI", "2 hours", "--output {results}/inner_loop.md",
                        "--models schools --particles 16 --rounds 2 --flows planar",
                        peers=("numpyro", "jax")),
    "flow_costs": Table("what every recipe costs", "10 min", quick="--dims 2 --rounds 2",
                        prints=True, title="What the recipes cost"),
    "jacobian": Table("log-determinants by structure", "10 min",
                      quick="--quick --output {scratch}/jacobian.md"),
    "densities": Table("flows fitted to data and to energies", "30 min",
                       "--seeds 0 1 2 --figure {results}/energies.png", "--only circles",
                       peers=("scikit-learn",), prints=True,
                       title="Flows fitted to data and to densities"),
    "images": Table("flows of handwritten digits", "2 hours", "; --picture; --report",
                    peers=("scikit-learn",)),
    "vae": Table("autoencoders", "1 hour, with images many", "--digits --step",
                 peers=("scikit-learn",),
                 extra=(("mnist", "--tutorial {mnist} --mnist {mnist}"), ("frey", "--frey {frey}"),
                        ("", "--report"))),
    "verdicts": Table("how often a diagnosis is right", "10 min", quick="--seeds 1",
                      peers=("scikit-learn",), prints=True, title="Verdicts"),
    "calibration": Table("simulation-based calibration", "20 min",
                         "; --refit nfvi mean-field --simulations 60"),
    "loo": Table("leave-one-out from variational draws", "5 min",
                 extra=(("posteriors", "--posteriors {posteriors}"),), peers=("numpyro",),
                 prints=True, title="Leave-one-out"),
    "posteriors": Table("posteriors with gold-standard draws", "2 hours",
                        "--posteriors {posteriors} --report",
                        "--posteriors {posteriors} --names dugongs_data-dugongs_model --seeds 0 "
                        "--out {scratch}/posteriors.jsonl", needs=("posteriors",)),
    "scale": Table("many latents, many rows", "see its --help", prints=True, title="Scale"),
    "distributed": Table("several processes", "see its --help", prints=True, title="Processes"),
    "kills": Table("fits that are killed and go on", "see its --help", prints=True, title="Kills"),
    "fuzz": Table("models, guides and data made at random", "an hour", peers=("hypothesis",)),
}


# ---------------------------------------------------------------------- running

def why_not(name: str, options: argparse.Namespace) -> str:
    """Why a table cannot be made here and now, or an empty string."""
    entry = TABLES[name]
    if not (HERE / f"{name}.py").exists():
        return "its script is not part of this version"
    for option in entry.needs:
        if getattr(options, option) is None:
            return (f"it needs --{option} PATH or ${variable(option)}: these data do not come with "
                    "the project")
    if options.quick and entry.quick is None:
        return "it has no quick form"
    return ""


def variable(option: str) -> str:
    """The environment variable behind an option."""
    return f"PYRO_NFVI_{option.upper()}"


def commands(name: str, options: argparse.Namespace) -> list[list[str]]:
    """The arguments of a table's script, of each of its runs."""
    entry = TABLES[name]
    words = entry.quick or "" if options.quick else entry.full
    if not options.quick:
        words += "".join(f" {more}" for option, more in entry.extra
                         if not option or getattr(options, option) is not None)
    paths = {"results": RESULTS, "scratch": options.scratch, "posteriors": options.posteriors,
             "mnist": options.mnist, "frey": options.frey}
    return [[part.format(**paths) for part in shlex.split(line)] for line in words.split(";")]


def run(name: str, options: argparse.Namespace) -> bool:
    """Make one table; whether it worked."""
    entry, runs = TABLES[name], commands(name, options)
    script = HERE / f"{name}.py"
    shown = [shlex.join(["python", f"benchmarks/{name}.py", *words]) for words in runs]
    head = [machine([*ALWAYS, *entry.peers])]
    if absent := [package for package in entry.peers if installed(package) is None]:
        head.append(f"Not installed, so not in the table: {', '.join(absent)}.")
    print(f"\n## {name}: {entry.words}\n\n", *(f"    {line}\n" for line in shown), "\n",
          "\n\n".join(head), "\n", sep="", flush=True)
    lines: list[str] = []
    for words in runs:
        with subprocess.Popen([sys.executable, str(script), *words], text=True,
                              stdout=subprocess.PIPE) as process:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                lines.append(line)
        if process.returncode:
            print(f"{name} failed with exit status {process.returncode}", file=sys.stderr)
            return False
    if entry.prints and not options.quick:
        made = "; ".join(f"`{line}`" for line in shown).replace(str(RESULTS), "results")
        text = "\n\n".join([f"# {entry.title}", f"By {made}.", *head, "".join(lines).strip()])
        (RESULTS / f"{name}.md").write_text(f"{text}\n")
    return True


# ---------------------------------------------------------------------- the README

def flows_block() -> str:
    """How many times longer the fastest other library takes for a flow."""
    rows = parse((RESULTS / "flows.md").read_text())[0]
    columns = list(dict.fromkeys((row["D"], row["batch"]) for row in rows))
    cells = {(row["flow"], row["D"], row["batch"]): row["fastest peer / ours"] for row in rows}
    return table(["flow", *(f"D={dim}, batch {batch}" for dim, batch in columns)], (
        [flow, *(cells[(flow, *column)] for column in columns)]
        for flow in dict.fromkeys(row["flow"] for row in rows)))


def inner_loop_block() -> str:
    """How many of our steps, and of our fits, another library's takes."""
    steps, fits = parse((RESULTS / "inner_loop.md").read_text())[:2]
    models = list(dict.fromkeys(row["model"] for row in steps))
    cells = {(row["flow"], row["particles"], row["model"]):
             f"{row['pyro / ours']}, {row['numpyro / ours']}" for row in steps}
    rows = dict.fromkeys((row["flow"], row["particles"]) for row in steps)
    shown = table(["flow", "particles", *models],
                  ([*row, *(cells.get((*row, model), "-") for model in models)] for row in rows))

    def span(column: str) -> str:
        values = [float(row[column].replace(",", "")) for row in fits if row[column] != "-"]
        return f"{min(values):.2g} to {max(values):.2g}"
    return (f"{shown}\n\nBuilding takes {span('build ours')} s, NumPyro's {span('build numpyro')} "
            f"s; a fit of 2,000 steps takes NumPyro {span('2,000 numpyro / ours')} times as long.")


def picture_block() -> str:
    """The picture, and what it shows."""
    said = json.loads((RESULTS / "picture.json").read_text())
    return ("![The posterior of eight schools: draws of NUTS, of a mean-field guide and of a flow]"
            "(docs/images/eight_schools.png)\n\n*Eight schools: draws of NUTS, of Pyro's "
            f"`AutoNormal`, tuned (k-hat {said['AutoNormal']['k']:.2f}) and of `NFVI` (k-hat "
            f"{said['NFVI']['k']:.2f}; below 0.7 the weighted draws are good, below 0.5 the guide "
            "itself).*")


def verdict_block() -> str:
    """The last lines of the summary of that fit."""
    said = json.loads((RESULTS / "picture.json").read_text())
    return "\n".join(f"    {line}" for line in said["NFVI"]["summary"])


BLOCKS: dict[str, Callable[[], str]] = {"picture": picture_block, "verdict": verdict_block,
                                        "guides": guides.block,
                                        "inner_loop": inner_loop_block, "flows": flows_block}


def written(text: str) -> str:
    """The text with every block as the results say."""
    def renewed(match: re.Match[str]) -> str:
        return f"{match[1]}\n{BLOCKS[match[2]]()}\n{match[3]}"
    return re.sub(r"(<!-- table: (\w+) -->)\n.*?(<!-- end -->)", renewed, text, flags=re.DOTALL)


def stale(text: str) -> list[str]:
    """Names of blocks that are not as the results say."""
    blocks = re.findall(r"<!-- table: (\w+) -->\n(.*?)\n<!-- end -->", text, flags=re.DOTALL)
    return [name for name, body in blocks if name not in BLOCKS or body != BLOCKS[name]()]


# ---------------------------------------------------------------------- main

def show(options: argparse.Namespace) -> None:
    """List all tables."""
    rows = [[name, entry.words, entry.takes, ", ".join(entry.peers) or "-",
             why_not(name, options) or "ready"] for name, entry in TABLES.items()]
    print(machine([*ALWAYS, *dict.fromkeys(p for t in TABLES.values() for p in t.peers)]) + "\n")
    print(table(["table", "shows", "takes about", "beside", "here"], rows))


def path(option: str) -> Path | None:
    """What the environment says of an option."""
    found = os.environ.get(variable(option))
    return Path(found) if found else None


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--readme", action="store_true")
    parser.add_argument("--check", action="store_true")
    for option in ("posteriors", "mnist", "frey"):
        parser.add_argument(f"--{option}", type=Path, metavar="PATH", default=path(option))
    options = parser.parse_args()
    if unknown := [name for name in options.tables if name not in TABLES]:
        parser.error(f"no table {', '.join(unknown)}; there are: {', '.join(TABLES)}")
    return options


def main() -> None:
    """Measure, list, write or check."""
    options = arguments()
    if options.list:
        show(options)
    elif options.check:
        if found := stale(README.read_text()):
            sys.exit(f"README.md: not as the results say: {', '.join(found)}. Run "
                     "python benchmarks/run.py --readme")
    elif options.readme:
        README.write_text(written(README.read_text()))
    else:
        sys.exit(measure(options))


def measure(options: argparse.Namespace) -> int:
    """Make the tables; how many failed."""
    import tempfile
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = Path(scratch)
        for name in options.tables or TABLES:
            if reason := why_not(name, options):
                print(f"\n## {name}: {TABLES[name].words}\n\nLeft out: {reason}.", flush=True)
            elif not run(name, options):
                failed.append(name)
    if failed:
        print(f"\nFailed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    main()
