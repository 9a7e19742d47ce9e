"""The README's table and figure, from the logs of runs alone:

    python .ci/study.py FOLDER_OF_RUNS          # the figure needs matplotlib

A row is the mean of the last evaluation over the seeds, with the sample standard deviation.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

NAMES = {"sst2": "SST-2", "mrpc": "MRPC", "cola": "CoLA", "stsb": "STS-B"}
LOOKS = {
    "smp-s": ("#7a3fb0", "o"),
    "smp-s, taught by teacher": ("#c58be8", "D"),
    "smp-l": ("#2f7fb8", "s"),
    "movement": ("#d07c1f", "^"),
    "magnitude": ("#5f5f58", "v"),
    "threshold": ("#b03a3a", "x"),
}

def read_runs(folder):
    """{(task, what differs, percent kept): [metrics of each seed]} of all complete runs."""
    found = defaultdict(list)
    for path in sorted(Path(folder).glob("*/metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        settings, final = lines[0], lines[-1]
        if final["event"] == "final" and settings["task"] in NAMES:
            kept = round(100 * (1 - final["last"]["sparsity"]), 1)
            metrics = {k: v for k, v in final["last"]["metrics"].items() if k != "score"}
            found[settings["task"], describe(settings), kept].append(metrics)
    return found

def describe(settings):
    """A method, and what sets a run of it apart."""
    parts = [settings["method"]]
    if settings["teacher"]:
        parts.append(f"taught by {Path(settings['teacher']).parent.name}")
    if settings["init"] == "zero" and settings["scores_from"] == "learned":
        parts.append("zero start")
    if settings.get("int8"):
        parts.append("8 bits")
    return ", ".join(parts)

def spread(values):
    std = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{std}"

def print_table(found):
    print("| task | method | kept | dev | n |\n|---|---|---|---|---|")
    for (task, method, kept), seeds in sorted(found.items()):
        cells = " / ".join(spread([metrics[name] for metrics in seeds]) for name in seeds[0])
        print(f"| {NAMES[task]} | {method} | {kept:g} % | {cells} | {len(seeds)} |")

def draw(found, path):
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    from matplotlib import pyplot as plt

    # Two points make no curve.
    tasks = [task for task in NAMES if len({kept for t, _, kept in found if t == task}) > 2]
    figure, axes = plt.subplots(1, len(tasks), figsize=(6.4 * len(tasks), 4), squeeze=False)
    for task, ax in zip(tasks, axes[0], strict=True):
        for method, (colour, marker) in LOOKS.items():
            points = sorted((kept, [next(iter(metrics.values())) for metrics in seeds])
                            for (t, m, kept), seeds in found.items() if (t, m) == (task, method))
            if points:
                kept, values = zip(*points, strict=True)
                errors = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values]
                ax.errorbar(kept, [np.mean(v) for v in values], errors, color=colour,
                            marker=marker, capsize=3, lw=1.5, label=method)
        for (t, m, _), seeds in found.items():
            if (t, m) == (task, "finetune"):
                dense = np.mean([next(iter(metrics.values())) for metrics in seeds])
                ax.axhline(dense, color="#333", lw=1, ls="--", label="dense fine-tuning")
        ax.set(title=NAMES[task], xlabel="weights kept, %", ylabel="dev", xscale="log")
        ax.set_xticks([3, 10, 20, 50], ["3", "10", "20", "50"])
        ax.minorticks_off()
        ax.grid(alpha=0.25)
        ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)

def main():
    found = read_runs(sys.argv[1])
    print_table(found)
    draw(found, Path(__file__).parents[1] / ".github/study.svg")

if __name__ == "__main__":
    main()
