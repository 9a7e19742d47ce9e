"""The README's table and figure, from the logs of runs alone:

    python .ci/study.py FOLDER_OF_RUNS          # the figure needs matplotlib

A row is the mean of the last evaluation over the seeds, with the sample standard deviation. Then
come differences between rows, paired by seed, with their 95 % interval by Student's t.
"""

import itertools
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
    """{(task, its length, what differs, percent kept): {seed: metrics}} of all complete runs."""
    found = defaultdict(dict)
    for path in sorted(Path(folder).glob("*/metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        settings, final = lines[0], lines[-1]
        if final["event"] == "final" and settings["task"] in NAMES:
            kept = round(100 * (1 - final["last"]["sparsity"]), 1)
            metrics = {k: v for k, v in final["last"]["metrics"].items() if k != "score"}
            key = settings["task"], length(settings), describe(settings), kept
            seed = settings["seed"]
            if seed in found[key]:
                raise SystemExit(f"error: {path}: a second run of seed {seed} of {key}")
            found[key][seed] = metrics
    return found

def length(settings):
    examples = f"{settings['limit']:,} × " if settings["limit"] else ""
    return f"{examples}{settings['epochs']} epochs, {settings['steps']:,} steps"

def describe(settings):
    """A method, and what sets a run of it apart."""
    parts = [settings["method"]]
    if (Path(settings["model"]).parent / "metrics.jsonl").is_file():
        parts.append(f"from {Path(settings['model']).parent.name}")
    if settings["teacher"]:
        parts.append(f"taught by {Path(settings['teacher']).parent.name}")
    if settings["init"] == "zero" and settings["scores_from"] == "learned":
        parts.append("zero start")
    if settings.get("int8"):
        parts.append("8 bits")
    if settings.get("average"):
        parts.append(f"average {settings['average']}")
    return ", ".join(parts)

def spread(values):
    std = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{std}"

def print_table(found):
    print("| task | length | method | kept | dev | n |\n|---|---|---|---|---|---|")
    for (task, size, method, kept), seeds in sorted(found.items()):
        names = next(iter(seeds.values()))
        cells = " / ".join(spread([metrics[name] for metrics in seeds.values()]) for name in names)
        print(f"| {NAMES[task]} | {size} | {method} | {kept:g} % | {cells} | {len(seeds)} |")

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}

def print_differences(found):
    """Of any two methods on the same task, length and share kept: first metric, paired by seed."""
    print("\n| task | length | kept | difference | mean | 95 % | n |\n|" + 7 * "---|")
    for (one, ours), (other, theirs) in itertools.combinations(sorted(found.items()), 2):
        seeds = sorted(ours.keys() & theirs.keys())
        if (one[:2], one[3]) != (other[:2], other[3]) or len(seeds) not in T95:
            continue
        name = next(iter(ours[seeds[0]]))
        differences = [ours[seed][name] - theirs[seed][name] for seed in seeds]
        half = T95[len(seeds)] * np.std(differences, ddof=1) / np.sqrt(len(seeds))
        print(f"| {NAMES[one[0]]} | {one[1]} | {one[3]:g} % | {one[2]} - {other[2]} "
              f"| {np.mean(differences):+.4f} | ± {half:.4f} | {len(seeds)} |")

def draw(found, path):
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
    from matplotlib import pyplot as plt

    # Two points make no curve.
    tasks = [task for task in NAMES if len({kept for t, _, _, kept in found if t == task}) > 2]
    figure, axes = plt.subplots(1, len(tasks), figsize=(6.4 * len(tasks), 4), squeeze=False)
    for task, ax in zip(tasks, axes[0], strict=True):
        for method, (colour, marker) in LOOKS.items():
            points = sorted((kept, [next(iter(metrics.values())) for metrics in seeds.values()])
                            for (t, _, m, kept), seeds in found.items() if (t, m) == (task, method))
            if points:
                kept, values = zip(*points, strict=True)
                errors = [np.std(v, ddof=1) if len(v) > 1 else 0 for v in values]
                ax.errorbar(kept, [np.mean(v) for v in values], errors, color=colour,
                            marker=marker, capsize=3, lw=1.5, label=method)
        for (t, _, m, _), seeds in found.items():
            if (t, m) == (task, "finetune"):
                dense = np.mean([next(iter(metrics.values())) for metrics in seeds.values()])
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
    print_differences(found)
    draw(found, Path(__file__).parents[1] / ".github/study.svg")

if __name__ == "__main__":
    main()
