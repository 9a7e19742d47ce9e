"""The README's tables and figure, from the logs of runs alone:

    python .ci/study.py [FOLDER_OF_RUNS]          # the figure needs matplotlib

What counts of a complete run is a line of .ci/study.jsonl; those of the folder are added to it. A
number is the mean over seeds of the last evaluation on dev, with the sample standard deviation.
A difference is paired by seed: its mean, with the 95 % interval of Student's t.
"""

import itertools
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

RECORDS = Path(__file__).with_name("study.jsonl")
NAMES = {"sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA", "stsb": "STS-B"}
LOOKS = {
    "finetune": ("#333333", "*"),
    "smp-s": ("#7a3fb0", "o"),
    "smp-l": ("#2f7fb8", "s"),
    "movement": ("#d07c1f", "^"),
    "magnitude": ("#5f5f58", "v"),
}
USUAL = {"lr": 2e-2, "pull": 1.0, "ramp": 0.5, "holdout": None}
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}

class Row(NamedTuple):
    """What a row's runs have in common; they differ in their seeds."""
    task: str
    limit: int  # 0: all examples
    epochs: int
    steps: int
    method: str  # with what sets it apart
    removed: float  # in percent

    @property
    def length(self):
        examples = f"{self.limit:,} × " if self.limit else ""
        return f"{examples}{self.epochs} epochs, {self.steps:,} steps"

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
            row = Row(settings["task"], settings["limit"] or 0, settings["epochs"],
                      settings["steps"], describe(settings),
                      round(100 * final["last"]["sparsity"], 1))
            how = {name: settings[name] for name in ("seed", "torch", "device")}
            if (row, how["seed"]) in added:
                raise SystemExit(f"error: {path}: a second run of seed {how['seed']} of {row}")
            added[row, how["seed"]] = row._asdict() | how | {"metrics": metrics_of(final)}
    records = read_records() | added
    lines = [json.dumps(records[key]) + "\n" for key in sorted(records)]
    RECORDS.write_text("".join(lines), "utf-8")

def read_runs():
    """{Row: {seed: metrics}} of all runs in RECORDS."""
    found = defaultdict(dict)
    for (row, seed), record in read_records().items():
        found[row][seed] = record["metrics"]
    return dict(sorted(found.items()))

def metrics_of(final):
    return {name: value for name, value in final["last"]["metrics"].items() if name != "score"}

def first(metrics):
    """The metric that is compared and drawn."""
    return next(iter(metrics.values()))

def describe(settings):
    """A method, and what sets a run of it apart."""
    parts = [settings["method"]]
    if settings["teacher"]:
        parts.append(f"taught by {Path(settings['teacher']).parent.name}")
    if settings["init"] == "zero" and settings["scores_from"] == "learned":
        parts.append("zero start")
    if settings.get("int8"):
        parts.append("8 bits")
    dropout = 0.1 if settings["trains_weights"] else 0.2 if settings["sparsity"] <= 0.5 else 0.0
    for name, usual in (USUAL | {"dropout": dropout}).items():
        if settings.get(name) and settings[name] != usual:
            parts.append(f"{name} {settings[name]:g}")
    return ", ".join(parts)

def spread(values):
    std = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{std}"

def cell(seeds):
    """Each metric of a row, and how many seeds it is from."""
    names = next(iter(seeds.values()))
    values = " / ".join(spread([metrics[name] for metrics in seeds.values()]) for name in names)
    return f"{values} ({len(seeds)})"

def usual_runs(found):
    """{task: {(method, removed): seeds}} of each task's length that has the most runs."""
    runs, usual = defaultdict(Counter), {}
    for row, seeds in found.items():
        runs[row.task][row.length] += len(seeds)
    for task in sorted(runs, key=list(NAMES).index):
        length = runs[task].most_common(1)[0][0]
        usual[task] = {(row.method, row.removed): seeds for row, seeds in found.items()
                       if (row.task, row.length) == (task, length)}
        print(f"{NAMES[task]}: {length}")
    return usual

def print_table(usual):
    """Methods down, tasks across."""
    print("\n| method | removed |" + "".join(f" {NAMES[task]} |" for task in usual))
    print("|---|---|" + "---|" * len(usual))
    for method, removed in sorted({which for rows in usual.values() for which in rows}):
        cells = [cell(rows[method, removed]) if (method, removed) in rows else ""
                 for rows in usual.values()]
        print(f"| {method} | {removed:g} % | " + " | ".join(cells) + " |")

def print_other_lengths(found, usual):
    print("\n| task | length | method | removed | dev |\n|---|---|---|---|---|")
    for row, seeds in found.items():
        if usual[row.task].get((row.method, row.removed)) is not seeds:
            print(f"| {NAMES[row.task]} | {row.length} | {row.method} | {row.removed:g} % "
                  f"| {cell(seeds)} |")

def print_differences(found):
    """Of any two rows of a length that remove as much, and of each one and dense fine-tuning."""
    print("\n| task | length | difference | removed | mean | 95 % | n |\n" + "|---" * 7 + "|")
    for (one, ours), (other, theirs) in itertools.permutations(found.items(), 2):
        seeds = sorted(ours.keys() & theirs.keys())
        comparable = other.method == "finetune" or (one.removed == other.removed and one < other)
        if one[:4] != other[:4] or not comparable or len(seeds) not in T95:
            continue
        differences = [first(ours[seed]) - first(theirs[seed]) for seed in seeds]
        half = T95[len(seeds)] * np.std(differences, ddof=1) / np.sqrt(len(seeds))
        print(f"| {NAMES[one.task]} | {one.length} | {one.method} - {other.method} "
              f"| {one.removed:g} % | {np.mean(differences):+.4f} | ± {half:.4f} | {len(seeds)} |")

def plot(ax, points, method):
    """points: (x, seeds). Means, with bars of a standard deviation."""
    xs, all_seeds = zip(*sorted(points, key=lambda point: point[0]), strict=True)
    values = [[first(metrics) for metrics in seeds.values()] for seeds in all_seeds]
    errors = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values]
    colour, marker = LOOKS[method]
    ax.errorbar(xs, [np.mean(v) for v in values], errors, color=colour, marker=marker, capsize=3,
                lw=1.5, label=method)

def draw(found, usual, path):
    """Of the first task: what is left at each sparsity and, if there are runs, what more epochs
    bring."""
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    matplotlib.rcParams["svg.hashsalt"] = "study"  # equal logs make an equal file
    from matplotlib import pyplot as plt

    task = next(iter(usual))
    kept, epochs = defaultdict(list), defaultdict(list)
    for (method, removed), seeds in usual[task].items():
        kept[method].append((100 - removed, seeds))
    limit = Counter(row.limit for row in found if row.task == task).most_common(1)[0][0]
    for row, seeds in found.items():
        if (row.task, row.limit) == (task, limit) and row.removed in (0, 90):
            epochs[row.method].append((row.epochs, seeds))
    epochs = {method: points for method, points in epochs.items() if len(points) > 2}
    panels = [("weights kept, %", kept, (3, 10, 20, 50, 100)),
              ("epochs, all weights or 10 %", epochs, (3, 6, 12, 24))]
    panels = [panel for panel in panels if panel[1]]
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4), squeeze=False)
    for (label, curves, ticks), ax in zip(panels, axes[0], strict=True):
        for method in LOOKS:
            if method in curves:
                plot(ax, curves[method], method)
        ax.set(title=NAMES[task], xlabel=label, ylabel="dev", xscale="log")
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.25)
        ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})

def main():
    if len(sys.argv) > 1:
        add_runs(sys.argv[1])
    found = read_runs()
    usual = usual_runs(found)
    print_table(usual)
    print_other_lengths(found, usual)
    print_differences(found)
    draw(found, usual, Path(__file__).parents[1] / ".github/study.svg")

if __name__ == "__main__":
    main()
