"""Writes the tables of .github/results.md and .github/study.svg, from the logs of runs alone:

    python .ci/study.py [FOLDER_OF_RUNS]          # the figure needs matplotlib

What counts of a complete run is a line of .ci/study.jsonl; those of the folder are added to it. A
number is the mean over seeds of the last evaluation on dev, with the sample standard deviation.
A difference is paired by seed: its mean, with the 95 % interval of Student's t. A table replaces
what stands between its markers, <!-- study: NAME --> and <!-- /study -->.
"""

import itertools
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

RECORDS = Path(__file__).with_name("study.jsonl")
RESULTS = Path(__file__).parents[1] / ".github/results.md"
NAMES = {"sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA", "stsb": "STS-B"}
TRAINED = {  # which weights a method trains; tables have its methods in this order
    "finetune": "all", "smp-s": "none", "2:4": "none", "smp-l": "none", "global": "none",
    "threshold": "none", "random": "none", "movement": "encoder", "soft-movement": "encoder",
    "lock": "encoder", "magnitude": "encoder"}
TAUGHT, TAUGHT_BY_ALL = ", teacher of the same examples", ", teacher of the whole train set"
ASKED = [("smp-s", 50, "finetune"), ("smp-s", 90, "finetune"), ("smp-s", 90, "movement"),
         ("movement", 90, "magnitude"), ("movement", 90, "lock"), ("smp-s", 90, "smp-l"),
         ("smp-s", 97, "movement")]  # the differences in short
ASKED_OF_TEACHERS = [
    *((f"smp-s{TAUGHT}", removed, other) for other in ("smp-s", "finetune", f"finetune{TAUGHT}")
      for removed in (50, 70, 90, 97)),
    (f"finetune{TAUGHT}", 0, "finetune"),
    *((f"smp-s{TAUGHT_BY_ALL}", 90, other) for other in (
        "smp-s", f"smp-s{TAUGHT}", "finetune", f"finetune{TAUGHT_BY_ALL}")),
    (f"finetune{TAUGHT_BY_ALL}", 0, "finetune"),
    ("2:4", 50, "smp-s"), ("2:4", 50, "finetune")]
PURPLE, BLUE, GREY = "#7a3fb0", "#2f7fb8", "#333333"
ALL = 67_349  # sentences of SST-2
USUAL = {"lr": 2e-2, "pull": 1.0, "lam": None, "ramp": 0.5, "holdout": None}
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}

# ---- Runs -----------------------------------------------------------------------------------

class Row(NamedTuple):
    """What a row's runs have in common; they differ in their seeds."""
    task: str
    limit: int  # 0: all examples
    epochs: int
    steps: int
    method: str  # with what sets it apart
    removed: float  # in percent

def read_records():
    """{(Row, seed): record} of all runs in RECORDS."""
    lines = RECORDS.read_text("utf-8").splitlines() if RECORDS.exists() else []
    records = [json.loads(line) for line in lines]
    return {(Row(*[record[name] for name in Row._fields]), record["seed"]): record
            for record in records}

def add_runs(folder):
    """Adds the complete runs in a folder to RECORDS, in place of equal ones that are there."""
    added = {}
    for path in Path(folder).glob("*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        settings, final = lines[0], lines[-1]
        if final["event"] == "final" and settings["task"] in NAMES:
            how = {name: settings[name] for name in ("seed", "torch", "device")}
            last = final["last"]
            row = Row(settings["task"], settings["limit"] or 0, settings["epochs"] or 0,
                      settings["steps"], describe(settings), round(100 * last["sparsity"], 1))
            if (row, how["seed"]) in added:
                raise SystemExit(f"error: {path}: a second run of seed {how['seed']} of {row}")
            metrics = {name: x for name, x in last["metrics"].items() if name != "score"}
            added[row, how["seed"]] = row._asdict() | how | {"metrics": metrics}
    records = read_records() | added
    lines = [json.dumps(records[key]) + "\n" for key in sorted(records)]
    RECORDS.write_text("".join(lines), "utf-8")

def describe(settings):
    """A method, and what sets a run of it apart. A setting that has no effect is null."""
    parts, sparsity = [settings["method"]], settings["sparsity"]
    if settings["teacher"]:
        parts.append(f"teacher of the {Path(settings['teacher']).parent.name.replace('-', ' ')}")
    if settings["init"] == "zero" and settings["scores_from"] == "learned":
        parts.append("zero start")
    if settings["int8"]:
        parts.append("8 bits")
    keeps_most = settings["method"] == "2:4" or sparsity is not None and sparsity <= 0.5
    dropout = 0.1 if settings["trains_weights"] else 0.2 if keeps_most else 0.0
    for name, usual in (USUAL | {"dropout": dropout}).items():
        if settings.get(name) not in (None, usual):
            parts.append(f"{name} {settings[name]:g}")
    return ", ".join(parts)

# ---- Tables ---------------------------------------------------------------------------------

def table(heads, rows):
    """In Markdown, without columns that are empty."""
    full = [any(column) for column in zip(*rows, strict=True)]
    lines = [list(itertools.compress(line, full)) for line in [heads, *rows]]
    lines.insert(1, ["---"] * sum(full))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

def mean(seeds):
    """{seed: metrics} -> each metric's mean and spread, and from how many seeds."""
    texts = []
    for values in zip(*[metrics.values() for metrics in seeds.values()], strict=True):
        std = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
        texts.append(f"{np.mean(values):.3f}{std}")
    return f"{' / '.join(texts)} ({len(seeds)})" if seeds else ""

def difference(ours, theirs):
    """Two {seed: metrics} -> the difference of their first metrics, and from how many seeds."""
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) not in T95:
        return ""
    pairs = [[next(iter(one[seed].values())) for one in (ours, theirs)] for seed in seeds]
    found = -np.diff(pairs)
    half = T95[len(seeds)] * np.std(found, ddof=1) / np.sqrt(len(seeds))
    return f"{np.mean(found):+.3f} ± {half:.3f} ({len(seeds)})".replace("-", "−")

def means_table(found, whats, lengths):
    """whats: (method, removed) each."""
    rows = [[method, f"{removed:g} %", TRAINED[method.split(",")[0]],
             *[mean(found.get((*length, method, removed), {})) for length in lengths]]
            for method, removed in whats]
    rows = [row for row in rows if any(row[3:])]
    return table(["method", "removed", "weights trained", *map(heading, lengths)], rows)

def lengths_table(found, whats, lengths):
    """The same, lengths down and methods across."""
    rows = [[f"{limit:,}" if limit else "all", f"{epochs}", f"{steps:,}",
             *[mean(found.get((task, limit, epochs, steps, *what), {})) for what in whats]]
            for task, limit, epochs, steps in lengths]
    heads = [f"{method}, {removed:g} %" for method, removed in whats]
    return table(["sentences", "epochs", "steps", *heads], rows)

def differences_table(found, pairs, lengths):
    """pairs: ((method, removed), (method, removed)) each."""
    rows = [[f"{ours[0]} − {theirs[0]}", f"{ours[1]:g} %",
             *[difference(found.get((*length, *ours), {}), found.get((*length, *theirs), {}))
               for length in lengths]] for ours, theirs in pairs]
    rows = [row for row in rows if any(row[2:])]
    return table(["difference", "removed", *map(heading, lengths)], rows)

def heading(length):
    task, limit, epochs, _ = length
    return f"{NAMES[task]}, " + (f"{limit:,} × " if limit else "") + f"{epochs} epochs"

def all_tables(found, usual):
    """{name: table}. `usual`: the length of each task that has the most runs."""
    whats = sorted({row[4:] for row in found}, key=order)
    lengths = sorted({row[:4] for row in found},
                     key=lambda length: (list(NAMES).index(length[0]), length[1] or np.inf, length))
    first = [length for length in lengths if length[0] == usual[0][0]]
    five = [what for what in whats
            if all(len(found.get((*length, *what), {})) == 5 for length in usual[:2])]
    others = [row[4:] for row in found if row[:4] in first and row[:4] != usual[0]]
    pairs = [(one, other) for one in whats for other in whats if one[0] != "finetune" and
             (other[0] == "finetune" or one[1] == other[1] and order(one) < order(other))]
    asked, of_teachers = [
        [((ours, removed), (theirs, removed * ("finetune" not in theirs)))
         for ours, removed, theirs in some] for some in (ASKED, ASKED_OF_TEACHERS)]
    sides = sorted({what for pair in of_teachers for what in pair}, key=order)
    return {"short": means_table(found, five, usual[:2]),
            "differences": differences_table(found, asked, usual[:2]),
            "teachers": means_table(found, sides, usual[:2]),
            "differences with teachers": differences_table(found, of_teachers, usual[:2]),
            "lengths": lengths_table(found, sorted(set(others), key=order), first),
            "rows": means_table(found, whats, usual),
            "all differences": differences_table(found, pairs, lengths)}

def order(what):
    method, removed = what
    return list(TRAINED).index(method.split(",")[0]), removed, method

# ---- The figure -----------------------------------------------------------------------------

def plot(ax, points, colour, label):
    """points: (x, seeds). Means, with bars of a standard deviation."""
    xs, values, errors = zip(*[(x, *mean_and_std(seeds)) for x, seeds in sorted(
        points, key=lambda point: point[0])], strict=True)
    ax.errorbar(xs, values, errors, color=colour, marker="o", capsize=3, lw=1.5, label=label)

def mean_and_std(seeds):
    values = [next(iter(metrics.values())) for metrics in seeds.values()]
    return np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0

def draw(found, usual, path):
    """What the usual length of SST-2 leaves at each sparsity, and what more sentences bring."""
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    matplotlib.rcParams["svg.hashsalt"] = "study"  # equal logs make an equal file
    matplotlib.rcParams["font.size"] = 13
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), sharey=True)
    for method, colour, label in [("smp-s", PURPLE, "SMP (smp-s)"),
                                  (f"smp-s{TAUGHT}", BLUE, "SMP with a teacher")]:
        points = [(100 - row.removed, seeds) for row, seeds in found.items()
                  if row[:4] == usual and row.method == method]
        if points:
            plot(left, points, colour, label)
    dense, spread = mean_and_std(found[*usual, "finetune", 0.0])
    left.axhline(dense, color=GREY, lw=1.5, label="dense fine-tuning")
    left.axhspan(dense - spread, dense + spread, color=GREY, alpha=0.15, lw=0)
    left.set(title="Half of the weights are enough; a tenth is not (8,000 sentences)",
             xlabel="weights kept, %", ylabel="accuracy on SST-2's dev set", xscale="log")
    left.set_xticks(ticks := (3, 10, 20, 50), [str(tick) for tick in ticks])

    for method, removed, colour, label in [("smp-s", 90.0, PURPLE, "SMP, a tenth of the weights"),
                                           ("finetune", 0.0, GREY, "dense fine-tuning")]:
        lengths = {}  # of the runs over equally many sentences the row with most seeds, or epochs
        for row, seeds in found.items():
            if (row.task, row.method, row.removed) == (usual[0], method, removed):
                best = lengths.setdefault(row.limit or ALL, (row, seeds))
                if (len(seeds), row.epochs) > (len(best[1]), best[0].epochs):
                    lengths[row.limit or ALL] = row, seeds
        plot(right, [(n, seeds) for n, (_, seeds) in lengths.items()], colour, label)
    right.set(title="More sentences close the gap", xlabel="sentences to learn from", xscale="log")
    right.set_xticks(ticks := (8000, 24_000, ALL), [f"{tick:,}" for tick in ticks])
    for ax in (left, right):
        ax.title.set_fontsize(13)
        ax.minorticks_off()
        ax.grid(alpha=0.25)
        ax.legend(loc="lower right", fontsize=12)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})

def main():
    if len(sys.argv) > 1:
        add_runs(sys.argv[1])
    found, runs = defaultdict(dict), Counter()
    for (row, seed), record in sorted(read_records().items()):
        found[row][seed] = record["metrics"]
        runs[row[:4]] += 1
    most = {length[0]: length for length, _ in reversed(runs.most_common())}
    usual, text = [most[task] for task in NAMES if task in most], RESULTS.read_text("utf-8")
    for name, made in all_tables(found, usual).items():
        parts = re.split(f"(<!-- study: {name} -->\n).*?(<!-- /study -->)", text, flags=re.DOTALL)
        if len(parts) != 4:
            raise SystemExit(f"error: {RESULTS}: expected one <!-- study: {name} -->")
        text = f"{parts[0]}{parts[1]}{made}\n{parts[2]}{parts[3]}"
    RESULTS.write_text(text, "utf-8")
    try:
        draw(found, usual[0], RESULTS.with_name("study.svg"))
    except ImportError:
        print("there is no matplotlib: .github/study.svg is left as it was")

if __name__ == "__main__":
    main()
