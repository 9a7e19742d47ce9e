"""Prune a pre-trained BERT for a GLUE task, weights frozen: the program.

    python train.py --task mrpc --sparsity 0.9

reads top to bottom as one run does: the flags, the data, the model, the loop over steps, the
evaluation, the report. The method itself is in smp.py, the network in bert.py, GLUE in data.py.
"""

import argparse
import contextlib
import json
import math
import shutil
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import bert
import data
import smp

TYPES = "QKVOUD"
BAR = "{desc:<12}{n:>6}/{total} |{bar}| {postfix} {remaining} left"
SHADES = " ░▒▓█"


# ---------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the page of usage
        self.exit(2, f"error: {message}; see python train.py --help\n")


def number(low, high, kind=float, closed=True):
    """An argparse type: a finite number from low to high."""
    def parse(string):
        try:
            value = kind(string)
        except ValueError:
            value = math.nan
        if not (low <= value <= high if closed else low <= value < high):  # nan is in no range
            word = "whole number" if kind is int else "number"
            bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}" if closed else \
                f"from {low} up to but without {high}"
            raise argparse.ArgumentTypeError(f"{string!r} is not a {word} {bounds}")
        return value
    return parse


def device(string):
    """An argparse type: the name of a device that works on this machine."""
    try:
        torch.empty(1, device=string)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device it was not built for
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"no device {string!r} here ({reason})") from None
    return string


def parse_args(argv):
    p = Parser(prog="train.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    positive, whole = number(0, math.inf), number(1, math.inf, int)
    g = p.add_argument_group("what")
    g.add_argument("--task", choices=data.TASKS, default="demo", help="a GLUE task, or demo, which needs no data (default: demo)")
    g.add_argument("--sparsity", type=number(0, 1, closed=False), default=0.9, metavar="V",
                   help="fraction of the prunable weights to REMOVE (default: 0.9, which keeps one in ten)")
    g.add_argument("--method", choices=[*smp.RULES, "finetune"], default="smp-s",
                   help="a masking function of Table 3, or dense fine-tuning, which writes a model folder (default: smp-s)")
    g.add_argument("--model", metavar="M", help="a folder with config.json, model.safetensors, and vocab.txt or tokenizer.json, "
                   "or a name on the hub (default: bert-base-uncased; for the demo one that it makes)")
    g.add_argument("--teacher", metavar="DIR", help="model folder of a fine-tuned teacher to distil from (default: none)")
    g = p.add_argument_group("where")
    g.add_argument("--data", metavar="DIR", help="folder of GLUE's task folders; a task that is not in it is fetched (default: "
                   "glue; for the demo: demo)")
    g.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/TASK-METHOD-SPARSITY-sSEED)")
    g.add_argument("--overwrite", action="store_true", help="start over in a folder that already holds a run")
    g = p.add_argument_group("how long (the paper's: they depend on the number of training examples)")
    g.add_argument("--epochs", type=whole, metavar="E", help="default: 12 above 10,000 examples, 100 below 3,000, else 60")
    g.add_argument("--batch-size", type=whole, metavar="B", help="default: 64 above 10,000 examples, else 32")
    g.add_argument("--limit", type=whole, metavar="N", help="use only the first N training examples (default: all)")
    g.add_argument("--eval-every", type=whole, metavar="STEPS", help="steps between evaluations (default: one epoch)")
    g = p.add_argument_group("the method")
    g.add_argument("--lr", type=positive, metavar="LR", help="learning rate at the start; it falls linearly to 0 (default: 2e-2 "
                   "for scores, 3e-5 for fine-tuning)")
    strength = g.add_mutually_exclusive_group()
    strength.add_argument("--pull", type=positive, metavar="P", help="strength of the sparsity regulariser in units of the task's "
                          "gradient; sets lambda anew at each step (default: 1)")
    strength.add_argument("--lambda", type=positive, dest="lam", metavar="L", help="a constant lambda instead; the paper's is 400")
    g.add_argument("--ramp", type=number(0, 1), metavar="F",
                   help="fraction of the steps in which the sparsity grows to its target (default: 0.5)")
    g.add_argument("--init", choices=["zero", "magnitude"], help="scores to start from: 0, or |W| over twice the standard "
                   "deviation of its matrix (default: magnitude)")
    g.add_argument("--dropout", type=number(0, 1, closed=False), metavar="P", help="dropout while training (default: 0.1 where at least half of "
                   "the weights are kept, else 0)")
    g.add_argument("--tau", type=number(0, 1), default=0.1, metavar="T",
                   help="for --method threshold: keep where sigmoid(S) > T (default: 0.1)")
    g.add_argument("--temperature", type=number(1e-3, math.inf), default=2.0, metavar="T", help="of the distillation (default: 2)")
    g.add_argument("--teacher-weight", type=number(0, 1), default=0.5, metavar="A",
                   help="weight of the distillation term; the task loss gets 1 - A (default: 0.5)")
    g.add_argument("--max-length", type=number(4, math.inf, int), default=128, metavar="T", help="longest input, in tokens (default: 128)")
    g = p.add_argument_group("the machine")
    g.add_argument("--seed", type=number(0, 2**63 - 1, int), default=0, help="of dropout and the order of the examples (default: 0)")
    g.add_argument("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu or cuda (default: cuda where there is one)")
    g.add_argument("--precision", choices=["fp32", "bf16"], help="of the matrix products; scores are always float32 (default: "
                   "bf16 on cuda, else fp32)")
    g.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = p.parse_args(argv)

    def default(**values):
        for name, value in values.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
    if args.method == "finetune":  # nothing is removed, from the first step on
        args.sparsity = args.ramp = 0.0
        default(lr=3e-5)
    if args.task == "demo":  # small magnitudes mean little in weights that are a minute old; and see smp.balanced_lambda
        args.overwrite |= args.out is None  # a demo is there to be run again
        default(data="demo", epochs=3, init="zero", lam=None if args.pull is not None else 1.0)
        default(model=f"{args.data}/model")
    default(data="glue", model="bert-base-uncased", lr=2e-2, ramp=0.5, init="magnitude", dropout=0.1 if args.sparsity <= 0.5 else 0.0,
            pull=1.0 if args.lam is None else None, precision="bf16" if args.device.startswith("cuda") else "fp32",
            out=f"runs/{args.task}-{args.method}-{args.sparsity:g}-s{args.seed}")
    return args


# ---------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------

def prunable(model):
    """The names of the six matrices of each layer: not the embeddings, not the head."""
    return [name for name, m in model.named_modules() if name.startswith("layers.") and isinstance(m, nn.Linear)]


def set_keep(layers, sparsity, args):
    """Decides how many weights each matrix keeps from here on, by the rule of the method."""
    if not layers:  # dense training
        return
    scores = {name: layer.scores for name, layer in layers.items()}
    for name, n_keep in smp.keep_counts(scores, sparsity, args.method, args.tau).items():
        layers[name].n_keep = n_keep


def forward(model, batch, label_ids, args):
    """One batch -> label-word logits (B, C), float32."""
    inputs = {key: batch[key].to(args.device, non_blocking=True) if batch[key] is not None else None
              for key in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16"):
        return model.label_logits(model(**inputs), label_ids).float()


@torch.inference_mode()
def predict(model, examples, label_ids, args):
    """All examples -> logits (N, C), in their order."""
    was_training = model.training
    model.eval()
    logits = np.empty((len(examples), len(label_ids)), np.float32)
    for batch in data.batches(examples, 128):
        logits[batch["index"].numpy()] = forward(model, batch, label_ids, args).cpu().numpy()
    model.train(was_training)
    return logits


def evaluate(model, dev_sets, task, label_ids, args):
    """{metric: value} on the dev split; MNLI's second one gets its file's name in front. "score" is
    the mean of them all, the one number by which the best evaluation is chosen."""
    metrics = {}
    for split, examples in dev_sets.items():
        prefix = "mismatched_" if split == "dev_mismatched" else ""
        found = data.evaluate_metrics(task, predict(model, examples, label_ids, args), examples.labels)
        metrics |= {prefix + name: value for name, value in found.items()}
    return metrics | {"score": sum(metrics.values()) / len(metrics)}


def load(folder, task, args):
    """A model folder -> (model on its device, tokenizer, label word ids (C,))."""
    model = bert.load_pretrained(folder).to(args.device)
    tokenizer = data.load_tokenizer(folder)
    if tokenizer.get_vocab_size() > model.config.vocab_size:
        raise ValueError(f"{folder}: the vocabulary has {tokenizer.get_vocab_size()} tokens, the embedding "
                         f"only {model.config.vocab_size} rows")
    if args.max_length > model.config.max_position_embeddings:
        raise ValueError(f"--max-length {args.max_length}: this model has {model.config.max_position_embeddings} positions")
    try:
        return model, tokenizer, data.label_ids(tokenizer, task.words).to(args.device)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def resolve_sizes(args, n):
    """Fills in what depends on the number of training examples: the paper's epochs and batch for
    its large and small tasks, its longer run for RTE."""
    large = n > 10_000
    args.epochs = args.epochs or (12 if large else 60 if n >= 3_000 else 100)
    args.batch_size = args.batch_size or (64 if large else 32)
    args.epoch_steps = math.ceil(n / args.batch_size)
    args.steps = args.epochs * args.epoch_steps
    args.ramp_steps = round(args.ramp * args.steps)
    args.eval_every = args.eval_every or args.epoch_steps


def repeat_epochs(epochs, examples, batch_size, generator):
    for _ in range(epochs):
        yield from data.batches(examples, batch_size, generator)


def masks_of(layers):
    return {name: layer.mask for name, layer in layers.items()}


def sparsity_of(masks):
    """The fraction removed, counted from the masks themselves."""
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.count_nonzero()) for mask in masks.values()) / total if masks else 0.0


class Log:
    """metrics.jsonl: one JSON object a line, on disk as soon as it is known."""

    def __init__(self, path):
        self.file = open(path, "w", encoding="utf-8")

    def __call__(self, event, **entry):
        print(json.dumps({"event": event} | entry), file=self.file, flush=True)


def train_step(model, layers, optimizer, batch, teacher_logits, label_ids, step, args):
    """One step, number `step` counted from 0: returns the loss before it, a scalar tensor."""
    scores = {name: layer.scores for name, layer in layers.items()}
    set_keep(layers, smp.sparsity_at(step, args.ramp_steps, args.sparsity), args)
    logits = forward(model, batch, label_ids, args)             # each layer makes its mask and uses W' = W * M
    loss = smp.objective(logits, batch["labels"].to(args.device), teacher_logits, args.temperature, args.teacher_weight)
    loss.backward()                                             # now scores.grad is dL/dW' * W
    if layers:
        lam = smp.balanced_lambda(scores, args.pull) if args.lam is None else args.lam
        # The paper ramps lambda with the sparsity, v_t / v_f; its code over the whole run, as here.
        ramp = smp.sparsity_at(step, args.steps, 1.0)
        (lam * ramp * smp.regularizer(scores)).backward()       # adds lambda dR/dS
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def train(args):
    """Runs one method on one task; returns the final metrics. Everything is written to args.out."""
    started = time.monotonic()
    out = Path(args.out)
    if (out / "metrics.jsonl").exists() and not args.overwrite:
        raise FileExistsError(f"{out}: holds a run already; give --overwrite to start over, or another --out")

    # The data and the model
    task = data.TASKS[args.task]
    base = bert.find_pretrained(args.model)
    data.ensure(task, args.data)
    texts, labels = data.read_split(task, args.data, "train", args.limit)
    resolve_sizes(args, len(texts))
    model, tokenizer, label_ids = load(base, task, args)
    train_set = data.encode(tokenizer, texts, labels, args.max_length)
    dev_sets = {split: data.encode(tokenizer, *data.read_split(task, args.data, split), args.max_length)
                for split in task.dev}
    teacher_logits = None
    if args.teacher:  # without dropout it always says the same of a sentence: ask it once, before the first step
        teacher, _, teacher_ids = load(bert.find_pretrained(args.teacher), task, args)
        teacher_logits = torch.from_numpy(predict(teacher, train_set, teacher_ids, args))
        del teacher

    # What is learned: the scores, or for fine-tuning everything
    torch.manual_seed(args.seed)
    order = torch.Generator().manual_seed(args.seed)
    model.set_dropout(args.dropout)
    dense = args.method == "finetune"
    layers = {} if dense else smp.prune(model, prunable(model), args.init)
    # The paper says Adam; its code is AdamW without decay on the scores, the rate falling linearly to 0.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr,
                                  weight_decay=0.01 if dense else 0, fused=True)
    warmup = args.steps // 10 if dense else 0  # early large steps could wreck weights; scores come to no harm
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / (warmup + 1), 1) * (1 - t / args.steps))

    out.mkdir(parents=True, exist_ok=True)
    (out / "mask.safetensors").unlink(missing_ok=True)  # of the run that is being overwritten
    log = Log(out / "metrics.jsonl")
    log("settings", **vars(args), torch=torch.__version__)
    introduce(args, task, model, layers, tokenizer, train_set)

    best = last = None
    model.train()
    training = time.monotonic()
    with tqdm(total=args.steps, desc=args.method, dynamic_ncols=True, bar_format=BAR) as bar:
        for step, batch in enumerate(repeat_epochs(args.epochs, train_set, args.batch_size, order), start=1):
            look = step % 20 == 0 or step == args.steps  # not always, since reading the loss waits for the device
            asked = None if teacher_logits is None else teacher_logits[batch["index"]].to(args.device)
            try:
                loss = train_step(model, layers, optimizer, batch, asked, label_ids, step - 1, args)
                if look and not math.isfinite(loss.item()):
                    raise FloatingPointError(f"the loss is {loss.item()}, the run has diverged")
            except FloatingPointError as error:
                raise FloatingPointError(f"step {step}: {error}; what was saved in {out} before is good; "
                                         "try a smaller --lr") from None
            decay.step()
            if look:
                bar.set_postfix_str(f"loss {loss.item():.3f}  sparsity {sparsity_of(masks_of(layers)):.3f}  lr {decay.get_last_lr()[0]:.1e}  "
                                    f"{step * args.batch_size / (time.monotonic() - training):.0f} ex/s", refresh=False)
                bar.update(step - bar.n)
            if step % args.eval_every == 0 or step == args.steps:
                set_keep(layers, smp.sparsity_at(step, args.ramp_steps, args.sparsity), args)
                masks = masks_of(layers)
                with smp.folded(layers, masks):
                    metrics = evaluate(model, dev_sets, task, label_ids, args)
                last = {"step": step, "epoch": step / args.epoch_steps, "sparsity": sparsity_of(masks), "metrics": metrics}
                log("eval", **last, loss=loss.item())
                bar.write(f"epoch {last['epoch']:<5.4g} sparsity {last['sparsity']:.4f}  {show(metrics)}")
                # Before the target sparsity is reached, a mask is not yet what was asked for.
                if step >= args.ramp_steps and (best is None or metrics["score"] > best["metrics"]["score"]):
                    best = last
                    save(out, base, task, model, masks, args, best)

    # What came out
    changed = changed_tensors(model, base)
    seconds = time.monotonic() - started
    final = {"metrics": best["metrics"], "best": best, "last": last, "seconds": round(seconds, 1), "peak_mb": round(peak_mb(args)),
             "frozen_unchanged": not changed}
    if layers:
        masks = smp.load_masks(out / "mask.safetensors")[0]  # what is counted is what is on disk
        final |= {"kept": sum(int(mask.count_nonzero()) for mask in masks.values()), "total": sum(mask.numel() for mask in masks.values())}
    log("final", **final)
    report(out, masks if layers else {}, final, changed, dense)
    return final


def peak_mb(args):
    """The most memory the run has held, in MB: on the GPU if it ran there, else of the process."""
    if args.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(args.device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def changed_tensors(model, base):
    """The tensors of a trained model that are no longer those of the checkpoint, bit for bit."""
    now = model.state_dict()
    return [name for name, tensor in bert.load_pretrained(base).state_dict().items()
            if not torch.equal(tensor, now[name].cpu())]


def save(out, base, task, model, masks, args, evaluation):
    """Writes what the task needs beside the base model: the mask, or after fine-tuning a model."""
    if masks:
        smp.save_masks(out / "mask.safetensors", masks, {
            "task": args.task, "method": args.method, "base": str(args.model), "label_words": task.words,
            "settings": vars(args), **evaluation})
        return
    save_model(out / "model", model, base)


def save_model(folder, model, tokenizer_from):
    """A model folder that --model, --teacher and transformers read, with the vocabulary of another."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in data.TOKENIZER_FILES:
        if (Path(tokenizer_from) / name).is_file():
            shutil.copy(Path(tokenizer_from) / name, folder / name)
    bert.save_pretrained(model, folder)


# ---------------------------------------------------------------------------------------------
# What a person sees
# ---------------------------------------------------------------------------------------------

def show(metrics):
    """Metrics in words; "score", the mean of the others, only where there are several."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "score" or len(metrics) > 2)


def introduce(args, task, model, layers, tokenizer, train_set):
    """What this run is, before its first step."""
    text, label = tokenizer.decode(train_set.ids[0], skip_special_tokens=False), train_set.labels[0]
    learned = sum(layer.scores.numel() for layer in layers.values())
    rest = sum(p.numel() for p in model.parameters()) - learned
    settings = " ".join(f"{key}={value}" for key, value in vars(args).items() if value is not None and value is not False)
    print(textwrap.fill(f"settings    {settings}", 100, subsequent_indent=" " * 12, break_long_words=False, break_on_hyphens=False))
    print(f"example     {text} -> " + (f"{label:g}" if task.regression else f"{task.words[label]!r}"))
    print("head        frozen: " + ("the MLM transform and the label words' rows of the decoder" if model.mlm else
                                    "dot product of [CLS] and the label words' embeddings (the model has no MLM head)"))
    print(f"parameters  {rest:,} frozen, {learned:,} scores, one for each prunable weight" if layers else
          f"parameters  {rest:,} trained, 0 frozen")
    if args.method == "threshold":
        print(f"note        threshold does not enforce --sparsity: sigmoid(S) > {args.tau:g} decides, --lambda steers it")


def density_table(masks):
    """Percent kept of each matrix, layers down and types across, the fuller the darker."""
    kept = {name: mask.float().mean().item() for name, mask in masks.items()}
    top = max(kept.values()) or 1
    lines = ["kept, %  " + "".join(f"{t:>9}" for t in TYPES)]
    for layer in sorted({name.split(".")[1] for name in masks}, key=int):
        cells = [kept[f"layers.{layer}.{t}"] for t in TYPES]
        lines.append(f"layer {layer:>2} " + "".join(f" {SHADES[math.ceil(c / top * (len(SHADES) - 1))] * 2}{100 * c:>6.1f}" for c in cells))
    of_type = [[mask for name, mask in masks.items() if name.endswith("." + t)] for t in TYPES]
    lines.append("all      " + "".join(f"{100 * sum(int(m.count_nonzero()) for m in group) / sum(m.numel() for m in group):>9.1f}" for group in of_type))
    return "\n".join(lines)


def report(out, masks, final, changed, dense):
    best, last = final["best"], final["last"]
    print()
    if masks:
        print(density_table(masks))
        print(f"\nkept {final['kept']:,} of {final['total']:,} weights: sparsity {1 - final['kept'] / final['total']:.6f}")
    print(f"last   epoch {last['epoch']:<5.4g} {show(last['metrics'])}")
    print(f"best   epoch {best['epoch']:<5.4g} {show(best['metrics'])}   <- saved; chosen on dev itself, so a little flattering")
    if not dense:
        print("frozen tensors: every one bit-identical to the checkpoint" if not changed else
              f"FROZEN TENSORS CHANGED: {', '.join(changed[:3])} ...")
    print(f"{final['seconds']:.0f} s, {final['peak_mb']:,} MB at most; {out}/metrics.jsonl and {out}/" + ("model/" if dense else
          f"mask.safetensors ({(out / 'mask.safetensors').stat().st_size:,} bytes)"))


# ---------------------------------------------------------------------------------------------
# The demo: a BERT of our own, and the lesson in one table
# ---------------------------------------------------------------------------------------------

def prepare_demo(folder):
    """Writes the made-up task and pre-trains a tiny BERT on its language, unless both are there."""
    folder = Path(folder)
    if not (folder / "model/model.safetensors").is_file():
        print(f"demo        first run: writing a small language to {folder}/ and pre-training a BERT on it")
        data.write_demo(folder)
        pretrain(folder)


def pretrain(folder, epochs=2, batch_size=64, lr=4e-4, seed=0):
    """Masked-language modelling from scratch on folder/corpus.txt -> folder/model.

    30 % of the words are hidden and the MLM head must name them. In BERT, [CLS] learned to speak
    for its sentence by next-sentence prediction; here it must name a word of its sentence, drawn at
    random. Without that it would learn nothing, and a head on top of it would have nothing to read."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    tokenizer = data.load_tokenizer(folder)
    corpus = data.encode(tokenizer, (folder / "corpus.txt").read_text("utf-8").splitlines(), None, 64)
    model = bert.Bert(bert.Config(vocab_size=tokenizer.get_vocab_size(), hidden_size=256, num_hidden_layers=2,
                                  num_attention_heads=4, intermediate_size=1024, max_position_embeddings=128))
    model.set_dropout(0)
    mask_id = tokenizer.token_to_id("[MASK]")
    steps = epochs * math.ceil(len(corpus) / batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / (steps / 10), 1 - t / steps))
    with tqdm(total=steps, desc="pre-training", dynamic_ncols=True, bar_format=BAR) as bar:
        for step, batch in enumerate(repeat_epochs(epochs, corpus, batch_size, rng), start=1):
            ids = batch["input_ids"]                                            # (B, T)
            is_word = ids > mask_id                                             # the special tokens come first
            hidden = is_word & (torch.rand(ids.shape, generator=rng) < 0.3)
            target, asked = ids.clone(), hidden.clone()
            chosen = (torch.rand(ids.shape, generator=rng) * is_word).argmax(1, keepdim=True)
            target[:, 0], asked[:, 0] = ids.gather(1, chosen)[:, 0], True
            states = model(ids.masked_fill(hidden, mask_id), batch["attention_mask"])
            loss = nn.functional.cross_entropy(model.mlm_logits(states[asked]), target[asked])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            decay.step()
            if step % 20 == 0:
                bar.set_postfix_str(f"loss {loss.item():.3f} ", refresh=False)
                bar.update(step - bar.n)
    save_model(folder / "model", model, folder)


def compare(args, learned):
    """Prints what the learned mask is worth, beside other things one can do with the same weights."""
    task = data.TASKS[args.task]
    model, tokenizer, label_ids = load(args.model, task, args)
    dev = {"dev": data.encode(tokenizer, *data.read_split(task, args.data, "dev"), args.max_length)}

    def accuracy():
        return evaluate(model, dev, task, label_ids, args)["accuracy"]
    rows = [("chance: always the commoner label", max(np.bincount(dev["dev"].labels)) / len(dev["dev"])),
            ("the frozen model, nothing pruned", accuracy())]
    torch.manual_seed(args.seed)
    layers = smp.prune(model, prunable(model))
    for kind, score in (("a random mask", torch.rand_like), ("a magnitude mask: the largest weights", torch.abs)):
        scores = {name: score(layer.weight) for name, layer in layers.items()}
        counts = smp.keep_counts(scores, args.sparsity, "smp-l")
        with smp.folded(layers, {name: smp.topk_mask(s, counts[name]) for name, s in scores.items()}):
            rows.append((kind, accuracy()))
    rows.append(("the learned mask", learned["metrics"]["accuracy"]))
    ceiling = Path(args.data) / "dense"  # the same for every mask: trained once and kept
    if not (ceiling / "done.json").is_file():
        with contextlib.redirect_stdout(None):
            dense = train(parse_args(["--task", "demo", "--method", "finetune", "--epochs", "2", "--lr", "5e-4", "--dropout", "0",
                                      "--data", args.data, "--model", args.model, "--out", str(ceiling), "--overwrite"]))
        (ceiling / "done.json").write_text(json.dumps(dense["metrics"]))
    rows.append(("dense fine-tuning, every weight trained", json.loads((ceiling / "done.json").read_text())["accuracy"]))
    print(f"\naccuracy on dev; the three masks remove {args.sparsity:.0%} of the weights and change none")
    for what, value in rows:
        print(f"  {what:<40} {value:.3f}  {'█' * round(30 * value)}")
    print("\nThe frozen weights already hold a classifier; it is hidden among the others. Neither chance nor\n"
          "size finds it. Asking the task of each weight \"stay or go?\", and nothing else, does.")


# ---------------------------------------------------------------------------------------------

def main(argv=None):
    """Runs the command line; returns the final metrics. Bad input, from flag to file, ends in one
    line on stderr and exit code 2; ctrl-C in exit code 130."""
    args, started = parse_args(argv), time.monotonic()
    try:
        if args.task == "demo":
            prepare_demo(args.data)
        final = train(args)
        if args.task == "demo" and args.method in smp.RULES:
            compare(args, final)
            print(f"\n{time.monotonic() - started:.0f} s in all, {peak_mb(args):,.0f} MB of memory at most")
        return final
    except KeyboardInterrupt:
        print("\ninterrupted; what had been saved is still there", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, FloatingPointError) as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
