"""Draws the README's plot and prints the numbers in it: python .github/study.py FOLDER_OF_RUNS (needs matplotlib)."""

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
from matplotlib import pyplot as plt  # noqa: E402

NAMES = {"sst2": ("SST-2, 8,000 sentences", "accuracy"), "mrpc": ("MRPC", "accuracy")}
LIMIT = {"sst2": 8000}
LOOK = {"smp-s": ("#7a3fb0", "o"), "smp-s, taught by teacher": ("#c58be8", "D"), "smp-l": ("#2f7fb8", "s"), "movement": ("#d07c1f", "^"),
        "magnitude": ("#5f5f58", "v"), "threshold": ("#b03a3a", "x")}

values = defaultdict(list)  # (task, method, percent kept) -> the metric of each seed
for path in sorted(Path(sys.argv[1]).glob("*/metrics.jsonl")):
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    first, last = lines[0], lines[-1]
    if last["event"] == "final" and first["task"] in NAMES and first["limit"] == LIMIT.get(first["task"]):
        taught = f", taught by {Path(first['teacher']).parent.name}" if first["teacher"] else ""
        method = first["method"] + (taught or (", zero start" if first["init"] == "zero" else ""))
        kept = 100 * (1 - last["last"]["sparsity"])
        values[first["task"], method, round(kept, 1)].append(last["last"]["metrics"][NAMES[first["task"]][1]])

tasks = [task for task in NAMES if len({kept for t, _, kept in values if t == task}) > 2]  # two points make no curve
figure, axes = plt.subplots(1, len(tasks), figsize=(6.4 * len(tasks), 4), squeeze=False)
for task, ax in zip(tasks, axes[0]):
    for method, (colour, marker) in LOOK.items():
        points = sorted((kept, v) for (t, m, kept), v in values.items() if (t, m) == (task, method))
        if points:
            spread = [np.std(v, ddof=1) if len(v) > 1 else 0 for _, v in points]
            ax.errorbar([kept for kept, _ in points], [np.mean(v) for _, v in points], spread, color=colour, marker=marker, capsize=3, lw=1.5, label=method)
    for v in [v for (t, m, _), v in values.items() if (t, m) == (task, "finetune")]:
        ax.axhline(np.mean(v), color="#333", lw=1, ls="--", label="dense fine-tuning")
    ax.set(title=NAMES[task][0], xlabel="weights kept, %", ylabel=f"{NAMES[task][1]} on dev", xscale="log")
    ax.set_xticks([3, 10, 20, 50], ["3", "10", "20", "50"])
    ax.minorticks_off()
    ax.grid(alpha=.25)
    ax.legend(fontsize=8)
figure.tight_layout()
figure.savefig(Path(__file__).with_name("study.svg"))

for (task, method, kept), v in sorted(values.items()):
    print(f"| {task} | {method} | {kept:g} % | {np.mean(v):.4f}" + (f" ± {np.std(v, ddof=1):.4f}" if len(v) > 1 else "") + f" | {len(v)} |")
