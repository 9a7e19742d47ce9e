"""What a step costs, beside one of dense fine-tuning:

    python .ci/benchmark.py mini --task sst2 [any flag of train.py]
    python .ci/benchmark.py mini --against OTHER_CHECKOUT       # masks, here and there, in turn
    python .ci/benchmark.py mini --inference                    # a pruned model, dense and sparse

Needs no downloads: random weights of a size, and random texts in the lengths of a task. --model and
--data together take real ones. The last line of output is JSON.
"""

import argparse
import concurrent.futures
import contextlib
import importlib.util
import itertools
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import bert  # noqa: E402
import data  # noqa: E402
import smp  # noqa: E402
import train  # noqa: E402

SIZES = {  # layers, hidden size, heads
    "tiny": (2, 256, 4),
    "mini": (6, 384, 12),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}
LENGTHS = {  # of a task's train examples in tokens: shortest, nine deciles, longest
    "cola": (4, 7, 8, 9, 10, 10, 11, 12, 14, 17, 47),
    "sst2": (3, 4, 6, 7, 8, 10, 13, 16, 20, 27, 66),
    "mrpc": (19, 36, 41, 45, 50, 53, 57, 61, 64, 70, 103),
    "stsb": (10, 16, 18, 19, 21, 23, 25, 28, 35, 51, 125),
}

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

def both_flags(size, given, folder):
    """The flags of a run, and those of dense fine-tuning, all else being equal."""
    flags = train.parse_flags(given)
    if flags.method in ("random", "finetune"):
        raise SystemExit(f"error: --method {flags.method} learns no mask to compare")
    flags.task = flags.task or "mrpc"
    flags.batch_size, flags.epochs = flags.batch_size or 32, 1
    flags.seed, flags.out = 0, str(folder)
    if not flags.model:
        if flags.task not in LENGTHS:
            raise SystemExit(f"error: no lengths are known of {flags.task}; expected one of "
                             f"{', '.join(LENGTHS)}, or --model and --data")
        write_random(folder, flags.task)
        layers, hidden, heads = SIZES[size]
        config = bert.Config(num_hidden_layers=layers, hidden_size=hidden,
                             num_attention_heads=heads, intermediate_size=4 * hidden)
        train.save_model(folder, bert.Bert(config), folder)
        flags.model = flags.data = str(folder)
    dense = argparse.Namespace(**vars(flags) | {"method": "finetune"})
    for name in [name for names, _ in train.useless_flags(dense) for name in names]:
        setattr(dense, name, getattr(train.parse_flags([]), name))
    dense.dropout = train.settings_of(flags).dropout
    return flags, dense

def timed_pairs(run, dense):
    """Pairs of steps on the same batch and the parts of a step, a dict of ms a pair. Two pairs to
    warm up, then 20, or as many as 100 s allow, but at least 5."""
    rounds, begun, device = [], time.monotonic(), run.s.device
    for batch in itertools.cycle(data.training_batches(run.train_set, run.s)):
        ms = {"tokens": batch["input_ids"].numel()}
        pair = [("dense_ms", dense), ("smp_ms", run)]
        if device.startswith("cuda"):  # a length it has not seen costs it 50 ms, once
            for _, one in pair:
                settled_step(one, batch)
        for key, one in pair if len(rounds) % 2 else reversed(pair):
            ms[key] = clock(device, settled_step, one, batch)
        for group in run.optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        ms["ratio"] = ms["smp_ms"] / ms["dense_ms"]
        ms["mask_ms"] = clock(device, run.set_masks)
        ms["regularizer_ms"] = clock(device, smp.add_regularizer_gradient, run.scores, 0.0)
        ms["optimizer_ms"] = clock(device, run.optimizer.step)
        run.optimizer.zero_grad()
        rounds.append(ms)
        if len(rounds) >= 22 or len(rounds) >= 7 and time.monotonic() - begun > 100:
            return rounds[2:]

def settled_step(run, batch):
    """A step as they are once the target sparsity is reached."""
    run.state["step"] = run.s.ramp_steps if run.state["lam"] is not None else 0
    run.train_step(batch)

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

def longest_steps(flags):
    """Three steps on the longest batches allowed, and the most memory they took, in MB."""
    run = train.Run(flags)
    ids = torch.zeros(run.s.batch_size, run.s.max_length, dtype=torch.long)
    labels = torch.from_numpy(np.resize(run.train_set.labels, len(ids)))
    batch = {"index": torch.arange(len(ids)), "input_ids": ids, "token_type_ids": ids,
             "attention_mask": None, "labels": labels}
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

def matrix_rate(s):
    """Operations a second of one large product, in the run's precision: what no step exceeds."""
    m = 8192 if s.device.startswith("cuda") else 2048
    dtype = torch.bfloat16 if s.precision == "bf16" else torch.float32
    a = torch.randn(m, m, device=s.device, dtype=dtype)
    fastest = min(clock(s.device, torch.matmul, a, a) for _ in range(8))
    return 2 * m**3 / (fastest / 1e3)

def steps(size, given):
    with tempfile.TemporaryDirectory() as folder:
        both = both_flags(size, given, Path(folder))
        peaks = [in_a_process_of_its_own(longest_steps, flags) for flags in both]
        run, dense = [train.Run(flags) for flags in both]
        rounds = timed_pairs(run, dense)
    s, c = run.s, run.model.config
    weights = sum(scores.numel() for scores in run.scores)
    median = {key: float(np.median([ms[key] for ms in rounds])) for key in rounds[0]}
    tokens = median.pop("tokens")
    # A product takes 2 operations a weight and token forwards and 4 backwards; so do attention's
    # two, each of T by T by hidden a layer.
    attention = 2 * c.num_hidden_layers * c.hidden_size * tokens / s.batch_size
    operations = 6 * tokens * (weights + attention)
    found = {"size": both[0].model if given and "--model" in given else size, "weights": weights,
             "tokens_a_batch": round(tokens)}
    found |= {key: getattr(s, key) for key in ("task", "method", "batch_size", "sparsity",
                                               "dropout", "precision", "device")}
    found |= {"threads": torch.get_num_threads(), "torch": torch.__version__,
              "pairs": len(rounds)} | median
    found |= {"examples_per_s": 1e3 * s.batch_size / median["smp_ms"],
              "matmul_share": 1e3 * operations / median["smp_ms"] / matrix_rate(s),
              "peak_mb": peaks[0], "dense_peak_mb": peaks[1]}
    print_steps(found)
    return found

def print_steps(f):
    chip = f"{f['threads']} threads"
    if f["device"].startswith("cuda"):
        chip = torch.cuda.get_device_name(f["device"])
    print(f"{f['size']}, {f['weights']:,} prunable weights; {f['task']}: {f['batch_size']} "
          f"examples, {f['tokens_a_batch']} tokens a batch with padding;\n{f['method']}, sparsity "
          f"{f['sparsity']:g}, dropout {f['dropout']:g}, {f['precision']} on {f['device']} "
          f"({chip}), torch {f['torch']}\n\n"
          f"  dense fine-tuning    {f['dense_ms']:9.1f} ms a step\n"
          f"  {f['method']:<20} {f['smp_ms']:9.1f} ms a step, {f['ratio']:.2f} of a dense one "
          f"(medians of {f['pairs']} pairs)")
    for part in ("mask", "regularizer", "optimizer"):
        share = f[f"{part}_ms"] / f["smp_ms"]
        print(f"    {part:<18} {f[f'{part}_ms']:9.1f} ms, {share:.0%} of it")
    print(f"  {f['examples_per_s']:.0f} examples/s, {f['matmul_share']:.0%} of the device's matrix "
          f"rate\n  memory with the longest inputs: {f['peak_mb']:,.0f} MB, dense "
          f"{f['dense_peak_mb']:,.0f} MB\n{json.dumps(f)}")

def masks_against(size, other):
    """Masks by this smp.py and by another checkout's, in turn, on scores that move as in training:
    medians of 12 in ns a weight. The masks must be equal."""
    spec = importlib.util.spec_from_file_location("other_smp", Path(other) / "smp.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    layers, hidden, _ = SIZES[size]
    torch.manual_seed(0)
    linears = {}
    for layer in range(layers):
        for name in "QKVO":
            linears[f"layers.{layer}.{name}"] = nn.Linear(hidden, hidden)
        linears[f"layers.{layer}.U"] = nn.Linear(hidden, 4 * hidden)
        linears[f"layers.{layer}.D"] = nn.Linear(4 * hidden, hidden)
    both = [(m, {name: m.MaskedLinear(linear, "magnitude") for name, linear in linears.items()})
            for m in (smp, module)]
    weights = sum(linear.weight.numel() for linear in linears.values())
    times = {smp: [], module: []}
    for step in range(14):
        for name in linears:
            here, there = (masked[name].scores.data for _, masked in both)
            here -= 0.01 * torch.rand_like(here)
            there.copy_(here)
        for m, masked in both if step % 2 else reversed(both):
            ns = clock("cpu", m.choose_masks, masked, 0.9) * 1e6 / weights
            times[m].append(ns)
        for name in linears:
            assert torch.equal(both[0][1][name].mask, both[1][1][name].mask)
    found = {"size": size, "weights": weights, "threads": torch.get_num_threads(),
             "here_ns": float(np.median(times[smp][2:])),
             "there_ns": float(np.median(times[module][2:]))}
    print(f"masks of {weights:,} weights, ns a weight: {found['here_ns']:.2f} here, "
          f"{found['there_ns']:.2f} in {other}\n{json.dumps(found)}")
    return found

def inference(size):
    """A pruned model of random weights, sparse against dense: medians of 20 pairs in turn."""
    layers, hidden, heads = SIZES[size]
    config = bert.Config(num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads,
                         intermediate_size=4 * hidden)
    torch.manual_seed(0)
    model = bert.Bert(config).eval()
    masked = smp.prune(model, train.prunable(model))
    found = {"size": size, "threads": torch.get_num_threads(), "torch": torch.__version__}
    print(f"{size}, {found['threads']} threads, torch {found['torch']}: times as fast as dense\n"
          f"  kept      1 x 16    1 x 64   32 x 32")
    for kept in (0.5, 0.2, 0.1, 0.05, 0.03):
        masks = {name: torch.rand_like(layer.scores) < kept for name, layer in masked.items()}
        with smp.folded(masked, masks, train.SparseProduct), torch.inference_mode():
            products = {layer: layer.product for layer in masked.values()}
            row = [inference_pairs(model, products, shape) for shape in SHAPES]
        found[f"{kept:g}"] = row
        print(f"  {kept:4.0%}  " + "".join(f"{ratio:10.2f}" for ratio, _ in row))
    dense = "".join(f"{ms:10.1f}" for _, ms in row)
    rivals = dense_rivals(model, masked, masks)
    print(f"  dense, ms{dense[2:]}")
    for rival, ratios in rivals.items():
        print(f"  {rival:<6}" + "".join(f"{ratio:10.2f}" for ratio in ratios))
    print(json.dumps(found | rivals))
    return found

SHAPES = ((1, 16), (1, 64), (32, 32))

def inference_pairs(model, products, shape):
    """(median ratio, median ms of dense)."""
    ids, ms = torch.randint(1000, 30000, shape), {True: [], False: []}
    for _ in range(8):  # each product tries both
        model(ids)
    for i in range(23):
        for sparse in (True, False) if i % 2 else (False, True):
            for layer, product in products.items():
                layer.product = product if sparse else nn.functional.linear
            if shape[0] == 1:
                model(ids)  # a model that serves has its weights in the cache, if they fit
            ms[sparse].append(clock("cpu", model, ids))
    ratios = np.divide(ms[False][3:], ms[True][3:])
    return float(np.median(ratios)), float(np.median(ms[False][3:]))

def dense_rivals(model, masked, masks):
    """What dense may gain otherwise, as far as this machine can: {rival: [times as fast]}."""
    made = {"mkldnn": packed}
    with contextlib.suppress(ImportError):
        import onnxruntime  # noqa: F401
        made["onnx"] = exported
    if shutil.which("g++"):
        made["compile"] = torch.compile
    found = {}
    for rival, make in made.items():
        with smp.folded(masked, masks), torch.inference_mode():
            try:
                other = make(model)
                found[rival] = [rival_ratio(model, other, shape) for shape in SHAPES]
            except Exception as error:
                print(f"  {rival}: {data.printable(error, 70)}")
    return found

def packed(model):
    """Linear layers whose weights oneDNN has laid out once."""
    from torch.utils import mkldnn
    copy = bert.Bert(model.config).eval()
    for name in train.prunable(copy):
        layer = model.get_submodule(name)
        linear = nn.Linear(*reversed(layer.weight.shape))
        linear.weight.data, linear.bias.data = layer.weight, layer.bias
        copy.set_submodule(name, mkldnn.MkldnnLinear(linear, torch.float))
    return copy

def exported(model):
    import onnxruntime
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.onnx"
        torch.onnx.export(model, (torch.zeros(2, 8, dtype=torch.long),), path, dynamo=False,
                          input_names=["ids"], dynamic_axes={"ids": {0: "B", 1: "T"}})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options)
    return lambda ids: session.run(None, {"ids": ids.numpy()})

def rival_ratio(model, other, shape):
    ids, ratios = torch.randint(1000, 30000, shape), []
    for _ in range(8):
        ms = []
        for one in (model, other):
            if shape[0] == 1:
                one(ids)
            ms.append(clock("cpu", one, ids))
        ratios.append(ms[0] / ms[1])
    return float(np.median(ratios[3:]))

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("size", nargs="?", choices=SIZES, default="mini")
    p.add_argument("--against", metavar="CHECKOUT")
    p.add_argument("--inference", action="store_true")
    args, given = p.parse_known_args(argv)
    if args.against:
        return masks_against(args.size, args.against)
    if args.inference:
        return inference(args.size)
    return steps(args.size, given)

if __name__ == "__main__":
    main()
