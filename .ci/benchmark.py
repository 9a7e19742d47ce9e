"""What a step costs, beside one of dense fine-tuning, and what a pruned model saves:

    python .ci/benchmark.py mini --task sst2 [any flag of train.py]
    python .ci/benchmark.py mini --task sst2 --against OTHER_CHECKOUT [any flag]  # here and there
    python .ci/benchmark.py mini --inference          # random masks, sparse and dense
    python .ci/benchmark.py --inference MASK [--model X --data X]    # a run's mask, text to logits

Two things are measured in turn; a ratio is the median of the ratios pair by pair. Needs no
downloads: random weights of a size (tiny, mini, base, large), and random texts in the lengths of a
task. --model and --data together take real ones. The last line of output is JSON.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

# --against starts this file once more, with the modules of the other checkout.
CHECKOUT = os.environ.get("BENCHMARK_CHECKOUT") or str(Path(__file__).parents[1])
sys.path.insert(0, CHECKOUT)

import bert  # noqa: E402
import data  # noqa: E402
import smp  # noqa: E402
import train  # noqa: E402

SIZES = {  # layers, hidden size, heads
    "tiny": (2, 256, 4), "mini": (6, 384, 12), "base": (12, 768, 12), "large": (24, 1024, 16)}
LENGTHS = {  # of a task's train examples in tokens: shortest, nine deciles, longest
    "cola": (4, 7, 8, 9, 10, 10, 11, 12, 14, 17, 47),
    "sst2": (3, 4, 6, 7, 8, 10, 13, 16, 20, 27, 66),
    "mrpc": (19, 36, 41, 45, 50, 53, 57, 61, 64, 70, 103),
    "stsb": (10, 16, 18, 19, 21, 23, 25, 28, 35, 51, 125),
}

# ---- What is measured, and how --------------------------------------------------------------

def write_random(folder, name, n=1000, seed=0):
    """Writes train and dev files of n examples that mean nothing, in the task's layout and lengths,
    and a vocab.txt of BERT's size."""
    task, lengths, rng = data.TASKS[name], LENGTHS[name], random.Random(seed)
    words = [*data.SPECIAL, *map(str.lower, task.words)]
    words += [f"w{i}" for i in range(len(words), 30522)]
    columns = task.columns or (*task.text, task.label)
    lines = [] if task.columns else ["\t".join(columns)]
    for _ in range(n):
        decile = rng.randrange(10)
        length = rng.randint(*lengths[decile:decile + 2]) - 1 - len(task.text)  # [CLS] and [SEP]s
        row = dict.fromkeys(columns, "-")
        for i, column in enumerate(task.text):
            share = max((length + i) // len(task.text), 1)
            row[column] = " ".join(rng.choices(words[100:], k=share))
        row[task.label] = rng.choice(task.labels or ("0", "2.5", "5"))
        lines.append("\t".join(row.values()))
    folder = Path(folder)
    (folder / task.folder).mkdir(parents=True, exist_ok=True)
    for split in ("train", *task.dev):
        (folder / task.folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")

def random_bert(size):
    layers, hidden, heads = SIZES[size]
    torch.manual_seed(0)
    return bert.Bert(bert.Config(num_hidden_layers=layers, hidden_size=hidden,
                                 num_attention_heads=heads, intermediate_size=4 * hidden)).eval()

def run_flags(size, argv, folder):
    """The flags of a run of train.py, a dict, random data and a random model if none are given."""
    s = train.parse_flags(argv)
    if s.scores_from != "learned":
        raise SystemExit(f"error: --method {s.method} learns no mask to compare")
    flags = {"task": "mrpc", "batch_size": 32} | s.given
    flags |= {"epochs": 1, "seed": 0, "out": str(folder)}
    if "model" not in flags:
        if flags["task"] not in LENGTHS:
            raise SystemExit(f"error: no lengths are known of {flags['task']}; expected one of "
                             f"{', '.join(LENGTHS)}, or --model and --data")
        write_random(folder, flags["task"])
        train.save_model(folder, random_bert(size), folder)
        flags |= {"model": str(folder), "data": str(folder)}
    return flags

def dense_flags(flags):
    """The flags of dense fine-tuning: those that have an effect there, and the same dropout."""
    kept = {name: flags[name] for name in ("task", "teacher") if name in flags}
    kept |= {"method": "finetune", "dropout": train.settings_of(flags).dropout}
    for name in flags.keys() - kept.keys():
        with contextlib.suppress(ValueError):
            train.settings_of(kept | {name: flags[name]})
            kept[name] = flags[name]
    return kept

def clock(device, work, *inputs):
    """How long it takes, in ms."""
    def wait():
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    work(*inputs)
    wait()
    return 1e3 * (time.perf_counter() - start)

def in_turn(one, other, i):
    """(one(), other()); every second time the other goes first."""
    if i % 2:
        return one(), other()
    second = other()
    return one(), second

def rounds():
    """0, 1, 2, ...: two to warm up, then 20, or as many as 100 s allow, but at least 5."""
    begun = time.monotonic()
    for i in range(22):
        if i >= 7 and time.monotonic() - begun > 100:
            return
        yield i

def medians(pairs):
    """Pairs of numbers -> the medians of the first, of the second, and of first / second."""
    one, other = np.array(pairs).T
    return [float(np.median(values)) for values in (one, other, one / other)]

def machine():
    return {"threads": torch.get_num_threads(), "torch": torch.__version__}

def settled_step(run, batch):
    """A step as they are once the target sparsity is reached. (The first one measures lambda.)"""
    run.step = run.s.ramp_steps if run.step else 0
    train.train_step(run, batch)

def longest_steps(flags):
    """Three steps on the longest inputs allowed, and the most memory they took, in MB."""
    run = new_run(flags)
    ids = [[0] * run.s.max_length] * len(run.train_set)
    longest = dataclasses.replace(run.train_set, ids=ids, segments=ids)
    batch = next(data.batches(longest, run.s.batch_size))
    for _ in range(3):
        settled_step(run, batch)
    return data.peak_mb(run.s.device)

def in_a_process_of_its_own(work, flags):
    """For a process's peak of memory never falls."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(work, flags).result()
        except concurrent.futures.process.BrokenProcessPool:
            raise SystemExit("error: the process that measures the memory was killed; give a "
                             "smaller size or --batch-size") from None

# ---- A step, beside a dense one -------------------------------------------------------------

def timed_pairs(run, dense):
    """Pairs of steps on the same batch and the parts of a step, a dict of ms a pair."""
    found, device, batches = [], run.s.device, itertools.cycle(run.batches())
    for i in rounds():
        batch = next(batches)
        if device.startswith("cuda"):  # a length it has not seen costs it 50 ms, once
            for one in (run, dense):
                settled_step(one, batch)
        ms = in_turn(*[partial(clock, device, settled_step, one, batch) for one in (run, dense)], i)
        ms = {"tokens": batch["input_ids"].numel(), "smp_ms": ms[0], "dense_ms": ms[1],
              "ratio": ms[0] / ms[1]}
        for p in run.learned:
            p.grad = torch.zeros_like(p)
        ms["mask_ms"] = clock(device, run.choose_masks)
        ms["regularizer_ms"] = clock(device, smp.add_regularizer_gradient, run.scores, 0.0)
        ms["optimizer_ms"] = clock(device, run.optimizer.step)
        run.optimizer.zero_grad()
        found.append(ms)
    return found[2:]

def steps(size, argv):
    with tempfile.TemporaryDirectory() as folder:
        flags = run_flags(size, argv, folder)
        both = [flags, dense_flags(flags)]
        peaks = [in_a_process_of_its_own(longest_steps, one) for one in both]
        run, dense = [new_run(one) for one in both]
        pairs = timed_pairs(run, dense)
    s, median = run.s, {key: float(np.median([ms[key] for ms in pairs])) for key in pairs[0]}
    found = {"size": size if "--model" not in argv else s.model,
             "weights": sum(scores.numel() for scores in run.scores)}
    found |= {key: getattr(s, key) for key in ("task", "method", "batch_size", "sparsity",
                                               "dropout", "precision", "device")}
    found |= machine() | {"pairs": len(pairs)} | median
    found |= {"examples_per_s": 1e3 * s.batch_size / median["smp_ms"],
              "peak_mb": peaks[0], "dense_peak_mb": peaks[1]}
    print_steps(found)
    return found

def print_steps(f):
    print(f"{f['size']}, {f['weights']:,} prunable weights; {f['task']}: {f['batch_size']} "
          f"examples, {f['tokens']:.0f} tokens a batch with padding;\n{f['method']}, sparsity "
          f"{f['sparsity']}, dropout {f['dropout']:g}, {f['precision']} on {f['device']} "
          f"({f['threads']} threads), torch {f['torch']}\n\n"
          f"  dense fine-tuning    {f['dense_ms']:9.1f} ms a step\n"
          f"  {f['method']:<20} {f['smp_ms']:9.1f} ms a step, {f['ratio']:.2f} of a dense one "
          f"(medians of {f['pairs']} pairs)")
    for part in ("mask", "regularizer", "optimizer"):
        ms = f[f"{part}_ms"]
        print(f"    {part:<18} {ms:9.1f} ms, {ms / f['smp_ms']:.0%} of it")
    print(f"  {f['examples_per_s']:.0f} examples/s\n  memory with the longest inputs: "
          f"{f['peak_mb']:,.0f} MB, dense {f['dense_peak_mb']:,.0f} MB\n{json.dumps(f)}")

# ---- A pruned model, sparse and dense -------------------------------------------------------

def sparse_and_dense(layers, answer, alone):
    """Medians of answer(skips zeros or not), inside smp.folded: ms dense, ms sparse, their ratio.
    `alone`: of one text, as in a model that serves: its weights are in the cache, if they fit."""
    folded = {layer: layer.fixed for layer in layers.values()}

    def timed(skips):
        for layer, (W, product) in folded.items():
            layer.fixed = W, product if skips else nn.functional.linear
        if alone:
            answer(skips)
        return clock("cpu", answer, skips)

    return medians([in_turn(partial(timed, False), partial(timed, True), i) for i in rounds()][2:])

def inference(size):
    """A model of random weights with random masks, at some shapes of its input."""
    model, shapes = random_bert(size), ((1, 16), (1, 64), (32, 32))
    layers = smp.prune(model, train.prunable(model))
    found = {"size": size} | machine()
    print(f"{size}, {found['threads']} threads, torch {found['torch']}: times as fast as dense\n"
          f"  kept      1 x 16    1 x 64   32 x 32")
    for kept in (0.5, 0.2, 0.1, 0.05, 0.03):
        with smp.folded(layers, random_masks(layers, kept), train.SparseProduct), \
                torch.inference_mode():
            rows = []
            for shape in shapes:
                ids = torch.randint(1000, 30000, shape)
                rows.append(sparse_and_dense(layers, lambda _, ids=ids: model(ids), shape[0] == 1))
        found[f"{kept:g}"] = [ratio for *_, ratio in rows]
        print(f"  {kept:4.0%}  " + "".join(f"{ratio:10.2f}" for *_, ratio in rows))
    found["dense_ms"] = [dense for dense, *_ in rows]
    print("  dense " + "".join(f"{dense:10.1f}" for dense, *_ in rows) + " ms")
    print(json.dumps(found))
    return found

def random_masks(layers, kept):
    return {name: torch.rand_like(layer.scores) < kept for name, layer in layers.items()}

def mask_inference(path, argv):
    """A mask file on its dev set: texts a second, from string to logits, and how far the logits
    of the two ways are apart."""
    s = train.parse_flags(["--eval", path, "--sparse", "--device", "cpu", *argv])
    mask, found = train.MaskFile(path, s), {"mask": path} | machine()
    if mask.task.mlm:
        raise SystemExit(f"error: {path}: a mask for mlm, which answers no texts")
    texts, _ = mask.asks.read(mask.task.dev[0])
    for size in (1, 32):
        groups = [texts[i:i + size] for i in range(0, len(texts), size)][:22]
        logits = {True: [], False: []}  # with and without skipping zeros

        def answer(skips, groups=groups, logits=logits):
            group = groups[len(logits[skips]) // 2 % len(groups)]  # each twice
            logits[skips].append(mask.asks.predict(mask.asks.encode(group, None)))

        with mask.folded():
            dense, sparse, ratio = sparse_and_dense(mask.layers, answer, alone=True)
        apart = max(np.abs(a - b).max().item() for a, b in zip(*logits.values(), strict=True))
        rates = {"dense_per_s": 1e3 * size / dense, "sparse_per_s": 1e3 * size / sparse}
        found[f"{size}"] = rates | {"ratio": ratio, "logits_apart": apart}
        print("{:>2} at a time: {:.1f} texts a second dense, {:.1f} sparse, {:.2f} times; logits "
              "differ by at most {:.0e}".format(size, *found[f"{size}"].values()))
    print(json.dumps(found))
    return found

# ---- Here and there -------------------------------------------------------------------------

OLDER = not hasattr(train, "train_step")  # the generation before, with a method and a state
if OLDER:
    train.train_step, train.Run.choose_masks = train.Run.train_step, train.Run.set_masks
    train.Run.step = property(lambda run: run.state["step"],
                              lambda run, step: run.state.update(step=step))

def new_run(flags):
    if OLDER:
        return train.Run(argparse.Namespace(**vars(train.parse_flags([])) | flags))
    return train.Run(train.settings_of(flags))

def serve(flags):
    """One end of --against. For each line of stdin, the name of a measurement, it answers a line of
    JSON: what was measured, and what must be equal at both ends."""
    answers, sys.stdout = sys.stdout, sys.stderr
    peak, run = longest_steps(flags), new_run(flags)
    batches, layers, device = itertools.cycle(run.batches()), run.layers, run.s.device
    weights = sum(scores.numel() for scores in run.scores)
    generator = torch.Generator(device).manual_seed(0)

    def masks():  # of scores that move as in training
        for scores in run.scores:
            scores.data -= 0.01 * torch.rand(scores.shape, generator=generator, device=device)
        ms = clock(device, smp.choose_masks, layers, 0.9)
        chosen = b"".join(layer.mask.bool().cpu().numpy().tobytes() for layer in layers.values())
        return 1e6 * ms / weights, hashlib.sha256(chosen).hexdigest()

    def topk():
        ms = sum(clock(device, smp.topk_mask, x, x.numel() // 10) for x in run.scores)
        return 1e6 * ms / weights, weights

    def step():
        batch = next(batches)
        return clock(device, settled_step, run, batch), batch["input_ids"].tolist()

    @torch.inference_mode()
    def sparse():
        ids, model = torch.zeros(1, 16, dtype=torch.long, device=device), run.model.eval()
        with smp.folded(layers, random_masks(layers, 0.1), train.SparseProduct):
            for _ in range(8):  # the generation before tries both products first
                model(ids)
            return clock(device, model, ids), 0

    measured = {"memory": lambda: (peak, 0), "masks": masks, "topk": topk, "step": step,
                "sparse": sparse}
    for line in sys.stdin:
        print(json.dumps(measured[line.strip()]()), file=answers, flush=True)

UNITS = {"memory": "MB, steps with the longest inputs", "masks": "ns a weight",
         "topk": "ns a weight", "step": "ms", "sparse": "ms, 1 x 16 tokens, 10 % kept"}

def against(size, argv, other):
    """Here and in another checkout, each in a process of its own, in turn."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        flags = run_flags(size, argv, folder)
        ends = [stack.enter_context(subprocess.Popen(
            [sys.executable, __file__, "--serve", json.dumps(flags)], text=True,
            env=os.environ | {"BENCHMARK_CHECKOUT": str(Path(checkout).resolve())},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)) for checkout in (CHECKOUT, other)]

        def ask(end, what):
            print(what, file=end.stdin, flush=True)
            line = end.stdout.readline()
            return json.loads(line) if line else sys.exit("error: a process ended, see above")

        found = {"size": flags["model"] if "--model" in argv else size} | machine()
        print(f"{found['size']}, {flags['task']}; here, in {other}, and the ratio, medians:")
        for what, unit in UNITS.items():
            pairs = [in_turn(*[partial(ask, end, what) for end in ends], i)
                     for i in ([0] if what == "memory" else rounds())]
            if any(here[1] != there[1] for here, there in pairs):
                raise SystemExit(f"error: {what}: not of the same batches or masks")
            pairs = [(here[0], there[0]) for here, there in pairs]
            found[what] = medians(pairs[2:] or pairs)
            print("  {:<8} {:9.2f} {:9.2f} {:7.3f}  {}".format(what, *found[what], unit))
        print(json.dumps(found))
    return found

def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    size = argv.pop(0) if argv and argv[0] in SIZES else "mini"
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--against", metavar="CHECKOUT")
    p.add_argument("--inference", metavar="MASK", nargs="?", const="")
    p.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    args, argv = p.parse_known_args(argv)
    if args.serve:
        return serve(args.serve)
    if args.against:
        return against(size, argv, args.against)
    if args.inference is not None:
        return mask_inference(args.inference, argv) if args.inference else inference(size)
    return steps(size, argv)

if __name__ == "__main__":
    main()
