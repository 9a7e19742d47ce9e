"""Prune a pre-trained BERT for a GLUE task, weights frozen: the program.

    python train.py --task mrpc --sparsity 0.9

reads top to bottom: the flags, the parts of a run, one run with its loop over steps, masks at work,
the report, the demo, the benchmark. The method itself is in smp.py, the network in bert.py, GLUE in data.py.

Where all this departs from the paper, and where the reason stands:

    exactly as many kept as asked for, also among ties and where Eq. 4 overflows     smp.topk_mask, smp.keep_counts
    R(S) a mean, not a sum; N a fraction of the run                                  smp.importance, smp.sparsity_at
    lambda measured on the task's gradients, and ramped over the whole run           smp.balanced_lambda, Run.train_step
    scores start from |W|, not from zero                                             smp.initial_scores
    the divergence of distillation the other way round, with T^2                     smp.distillation_loss
    the MLM head's transform; batches padded to their longest, not to 128            bert.py, data.batches
    AdamW without decay; dropout and batch by sparsity                               Run, parse_args, resolve_sizes

--paper takes back the start, lambda, dropout and batch.
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

import bert
import data
import smp

# A method is three choices. smp.py has the first four; the others are what they are compared with.
METHODS = {        # where the scores come from, the rule that counts them (smp.RULES), what becomes of the weights
    "smp-s":         ("learned",   "smp-s",     "frozen"),
    "smp-l":         ("learned",   "smp-l",     "frozen"),
    "global":        ("learned",   "global",    "frozen"),
    "threshold":     ("learned",   "threshold", "frozen"),
    "random":        ("random",    "smp-l",     "frozen"),
    "magnitude":     ("magnitude", "smp-l",     "trained"),   # gradual magnitude pruning
    "movement":      ("learned",   "smp-l",     "trained"),   # movement pruning; as published with --init zero --lambda 0
    "soft-movement": ("learned",   "threshold", "trained"),
    "finetune":      (None,        None,        "trained"),   # dense: nothing is removed
}
SIZES = {"tiny": (2, 256, 4), "mini": (6, 384, 12), "base": (12, 768, 12), "large": (24, 1024, 16)}  # layers, hidden size, heads
TYPES = "QKVOUD"
BAR = "{desc:<12}{n:>6}/{total} |{bar}|{postfix} {remaining} left"
SHADES = " ░▒▓█"


# ---- Flags ----------------------------------------------------------------------------------

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
        torch.zeros(1, dtype=torch.float64, device=string).item()  # in which shares are counted
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:  # torch raises any of them, by the device
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"no device {string!r} here ({reason})") from None
    return string


def parse_args(argv):
    p = Parser(prog="train.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    nonnegative, whole = number(0, math.inf), number(1, math.inf, int)
    g = p.add_argument_group("what")
    g.add_argument("--task", choices=data.TASKS, help="a GLUE task, or demo, which needs no data (default: demo)")
    g.add_argument("--sparsity", type=number(0, 1, closed=False), default=0.9, metavar="V",
                   help="fraction of the prunable weights to REMOVE (default: 0.9, which keeps one in ten)")
    g.add_argument("--method", choices=METHODS, default="smp-s", help="smp-s, smp-l, global, threshold: the masking functions of "
                   "Table 3; random: a mask by lot; magnitude, movement, soft-movement: the encoder's weights are trained too; "
                   "finetune: dense, every weight trained (default: smp-s)")
    g.add_argument("--model", metavar="M", help="a folder with config.json, model.safetensors, and vocab.txt or tokenizer.json, "
                   "or a name on the hub (default: bert-base-uncased; for the demo one that it makes)")
    g.add_argument("--teacher", metavar="DIR", help="model folder of a fine-tuned teacher to distil from (default: none)")
    g = p.add_argument_group("where")
    g.add_argument("--data", metavar="DIR", help="folder of GLUE's task folders; a task that is not in it is fetched (default: "
                   "glue; for the demo: demo)")
    g.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/TASK-METHOD-SPARSITY-sSEED)")
    g.add_argument("--overwrite", action="store_true", help="start over in a folder that already holds a run")
    g.add_argument("--resume", action="store_true", help="go on where a run in this folder was interrupted")
    g.add_argument("--checkpoint-every", type=nonnegative, default=60, metavar="SECONDS",
                   help="time between checkpoints, or more, so that they take at most 2 %% of it (default: 60)")
    g = p.add_argument_group("instead of training: use masks (task, base model and settings come with them)")
    use = g.add_mutually_exclusive_group()
    use.add_argument("--eval", nargs="+", metavar="MASK", help="evaluate mask files on dev")
    use.add_argument("--predict", nargs="+", metavar="MASK", help="write GLUE's submission files for the test splits into "
                     "--out (default: predictions); of several masks also the zip")
    use.add_argument("--benchmark", nargs="?", const="mini", choices=SIZES, help="time a step against one of dense "
                     "fine-tuning, on random weights of this size (default: mini, MiniLM's) in the lengths of --task "
                     "(default: mrpc), or on --model and --data")
    g.add_argument("--export", metavar="DIR", help="with --eval MASK: write the pruned model as a Hugging Face-layout folder")
    g = p.add_argument_group("how long (the paper's: they depend on the number of training examples)")
    g.add_argument("--epochs", type=whole, metavar="E", help="default: 12 above 10,000 examples, 100 below 3,000, else 60")
    g.add_argument("--batch-size", type=whole, metavar="B", help="default: 64 above 10,000 examples, else 32, and as little as "
                   "16 to come to 1,500 steps where more than half is removed")
    g.add_argument("--limit", type=whole, metavar="N", help="use only the first N training examples (default: all)")
    g.add_argument("--eval-every", type=whole, metavar="STEPS", help="steps between evaluations (default: one epoch)")
    g = p.add_argument_group("the method")
    g.add_argument("--lr", type=nonnegative, default=2e-2, metavar="LR",
                   help="learning rate of the scores; it falls linearly to 0 (default: 2e-2, the paper's)")
    g.add_argument("--weight-lr", type=nonnegative, default=3e-5, metavar="LR",
                   help="learning rate of the weights, where the method trains them: a tenth of the steps to warm up, then "
                   "linearly to 0 (default: 3e-5)")
    strength = g.add_mutually_exclusive_group()
    strength.add_argument("--pull", type=nonnegative, metavar="P", help="strength of the sparsity regulariser in "
                          "units of the task's gradient at the first batch (a regression: the smallest of the first twentieth "
                          "of the steps); lambda grows to it over the run (default: 1; 0.2 for the demo)")
    strength.add_argument("--lambda", type=nonnegative, dest="lam", metavar="L", help="lambda itself; the paper's is 400")
    g.add_argument("--ramp", type=number(0, 1), metavar="F",
                   help="fraction of the steps in which the sparsity grows to its target (default: 0.5)")
    g.add_argument("--init", choices=["zero", "magnitude"], help="scores to start from: 0, or |W| over twice the standard "
                   "deviation of its matrix (default: magnitude; zero for the demo)")
    g.add_argument("--dropout", type=number(0, 1, closed=False), metavar="P", help="dropout while training "
                   "(default: 0.1 where weights are trained, else 0.2 where at least half of them are kept, else 0)")
    g.add_argument("--paper", action="store_true", help="the published start, regulariser, dropout and batches: --init zero "
                   "--lambda 400 --dropout 0.1, batches never below 32")
    g.add_argument("--tau", type=number(0, 1), default=0.1, metavar="T",
                   help="for --method threshold and soft-movement: keep where sigmoid(S) > T (default: 0.1)")
    g.add_argument("--temperature", type=number(1e-3, math.inf), default=2.0, metavar="T",
                   help="of the distillation (default: 2)")
    g.add_argument("--teacher-weight", type=number(0, 1), default=0.5, metavar="A",
                   help="weight of the distillation term; the task loss gets 1 - A (default: 0.5)")
    g.add_argument("--max-length", type=number(4, math.inf, int), default=128, metavar="T",
                   help="longest input, in tokens (default: 128)")
    g = p.add_argument_group("the machine")
    g.add_argument("--seed", type=number(0, 2**32 - 1, int), nargs="+", default=[0], metavar="S", help="of dropout, the order of "
                   "the examples and the mask of --method random; several make as many runs, and their mean (default: 0)")
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
    if len(set(args.seed)) < len(args.seed):
        p.error("--seed: the same seed twice")
    if args.resume and args.overwrite:
        p.error("--resume goes on with a run, --overwrite starts it over: give one of them")
    if args.export and len(args.eval or ()) != 1:
        p.error("--export needs --eval with one mask, the one to export")
    if args.eval or args.predict:
        return args
    if args.benchmark:
        if bool(args.model) != bool(args.data):
            p.error("--benchmark takes both --model and --data, for their real lengths, or neither")
        default(task="mrpc", batch_size=32, epochs=1, model="", data="")
    args.scores_from, args.rule, weights = METHODS[args.method]
    args.trains_weights = weights == "trained"
    if not args.scores_from:  # nothing is removed, from the first step on
        args.sparsity = args.ramp = 0.0
    if args.scores_from != "learned":
        args.init, args.lam, args.pull = args.scores_from or "none", 0.0, None
    if args.paper:
        default(init="zero", lam=400.0 if args.pull is None else None, dropout=0.1)
    default(task="demo")
    if args.task == "demo":
        args.overwrite |= args.out is None and not args.resume  # a demo is there to be run again
        # In weights a minute old size means little, and few of them need little pull.
        default(data="demo", epochs=3, batch_size=32, init="zero", pull=0.2 if args.lam is None else None)
        default(model=f"{args.data}/model")
    # A network that keeps half of its weights can overfit by choosing among them; one that keeps a
    # tenth cannot, and what it lacks in a short run is steps (see resolve_sizes).
    default(data="glue", model="bert-base-uncased", ramp=0.5, init="magnitude",
            dropout=0.1 if args.trains_weights else 0.2 if args.sparsity <= 0.5 else 0.0,
            pull=1.0 if args.lam is None else None, precision="bf16" if args.device.startswith("cuda") else "fp32")
    return args


# ---- Parts of a run -------------------------------------------------------------------------

def prunable(model):
    """The names of the six matrices of each layer: not the embeddings, not the head."""
    return [name for name, m in model.named_modules() if name.startswith("layers.") and isinstance(m, nn.Linear)]


def on_device(tensor, args):
    """A copy where the model is. A GPU fetches it from pinned memory by itself; from any other the host would have to wait."""
    return tensor.pin_memory().to(args.device, non_blocking=True) if args.device.startswith("cuda") else tensor.to(args.device)


def forward(model, batch, label_ids, args):
    """One batch -> label-word logits (B, C), float32."""
    inputs = {key: None if batch[key] is None else on_device(batch[key], args)
              for key in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.precision == "bf16"):
        hidden = model(**inputs)
    return model.label_logits(hidden.float(), label_ids)  # not in bf16, which knows but 65 numbers between 2 and 4


@torch.inference_mode()
def predict(model, examples, label_ids, args):
    """All examples -> logits (N, C), in their order."""
    was_training = model.training
    model.eval()
    logits = np.empty((len(examples), len(label_ids)), np.float32)
    for batch in data.batches(examples, 128):
        logits[batch["index"].numpy()] = forward(model, batch, label_ids, args).cpu().numpy()
    model.train(was_training)
    if not np.isfinite(logits).all():
        raise FloatingPointError("nan or inf among the logits: the run has diverged")
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


def load(folder, args):
    """A model folder -> (model on its device, tokenizer)."""
    model = bert.load_pretrained(folder).to(args.device)
    tokenizer = data.load_tokenizer(folder)
    tokens, rows = tokenizer.get_vocab_size(), model.config.vocab_size
    if not rows - 128 < tokens <= rows:  # some models pad their embeddings to a round number
        raise ValueError(f"{folder}: tokenizer.json or vocab.txt has {tokens} tokens, the embedding {rows} rows; "
                         "they are not of one model")
    if args.max_length > model.config.max_position_embeddings:
        raise ValueError(f"--max-length {args.max_length}: this model has {model.config.max_position_embeddings} positions")
    return model, tokenizer


def label_words(tokenizer, task, folder, args):
    """The token ids (C,) of the task's label words."""
    try:
        return data.label_ids(tokenizer, task.words).to(args.device)
    except ValueError as error:
        raise ValueError(f"{folder}, tokenizer.json or vocab.txt: {error}") from None


def encoded_splits(task, tokenizer, args, splits):
    return {split: data.encode(tokenizer, *data.read_split(task, args.data, split), args.max_length) for split in splits}


def resolve_sizes(args, n):
    """Fills in what depends on the number of training examples: the published epochs and batches of
    large and small tasks (batch 32 and 100 epochs for RTE are the authors' code's). A step moves a score
    by about lr, however large the batch: a short run to high sparsity does better to take more of them."""
    large = n > 10_000
    args.epochs = args.epochs or (12 if large else 60 if n >= 3_000 else 100)
    if args.batch_size is None:
        args.batch_size = 64 if large else 32
        while not args.paper and args.sparsity > 0.5 and args.batch_size > 16 and args.epochs * n / args.batch_size < 1500:
            args.batch_size //= 2
    args.epoch_steps = math.ceil(n / args.batch_size)
    args.steps = args.epochs * args.epoch_steps
    args.ramp_steps = round(args.ramp * args.steps)
    args.eval_every = args.eval_every or args.epoch_steps


def batches_from(step, examples, args):
    """The training batches from a step on. Each epoch has a seed of its own, so that a resumed run
    finds its order again without replaying the epochs before."""
    epoch, skip = divmod(step, args.epoch_steps)
    for epoch in range(epoch, args.epochs):
        order = torch.Generator().manual_seed(args.seed + (epoch << 32))
        yield from itertools.islice(data.batches(examples, args.batch_size, order), skip, None)
        skip = 0


def masks_of(layers):
    return {name: layer.mask for name, layer in layers.items()}


def count(masks):
    """(weights kept, weights in all), counted from the masks themselves."""
    return int(sum(mask.count_nonzero() for mask in masks.values())), sum(mask.numel() for mask in masks.values())


def sparsity_of(masks):
    kept, total = count(masks)
    return 1 - kept / total if masks else 0.0


# ---- One run --------------------------------------------------------------------------------

class Run:
    """What a run holds: data, model, what is learned in it, and in `state` how far it has come."""

    def __init__(self, args):
        self.args, self.task = args, data.TASKS[args.task]
        # The data and the model
        self.base = bert.find_pretrained(args.model)
        data.ensure(self.task, args.data)
        texts, labels = data.read_split(self.task, args.data, "train", args.limit)
        if not self.task.regression and min(labels) == max(labels):
            raise ValueError(f"{args.data}/{self.task.folder}/train.tsv: every label is {self.task.labels[labels[0]]!r}; "
                             "expected examples of two classes at the least (see --limit)")
        resolve_sizes(args, len(texts))
        self.model, self.tokenizer = load(self.base, args)
        self.fingerprint = fingerprint(self.model)
        self.label_ids = label_words(self.tokenizer, self.task, self.base, args)
        self.train_set = data.encode(self.tokenizer, texts, labels, args.max_length)
        self.dev_sets = encoded_splits(self.task, self.tokenizer, args, self.task.dev)
        self.teacher_logits = None
        if args.teacher:  # without dropout it always says the same of a sentence: ask it once, before the first step
            folder = bert.find_pretrained(args.teacher)
            teacher, tokenizer = load(folder, args)
            if tokenizer.get_vocab() != self.tokenizer.get_vocab():
                raise ValueError(f"--teacher {folder}: its vocabulary is not that of {self.base}; "
                                 "expected a teacher fine-tuned from that model")
            self.teacher_logits = torch.from_numpy(predict(teacher, self.train_set, self.label_ids, args)).to(args.device)

        # What is learned: the scores, the weights, both, or (a random mask) nothing
        torch.manual_seed(args.seed)
        self.model.set_dropout(args.dropout)
        self.layers = smp.prune(self.model, prunable(self.model), args.init) if args.scores_from else {}
        scores = [layer.scores.requires_grad_(args.scores_from == "learned") for layer in self.layers.values()]
        weights = []
        if args.trains_weights:  # all of a dense model; of a pruned one its layers, not the embeddings or the head
            trained = self.model.layers if self.layers else self.model
            weights = [p.requires_grad_(True) for name, p in trained.named_parameters() if not name.endswith(".scores")]
        # The paper says Adam; its code is AdamW without decay on the scores: decay would pull negative
        # ones up. Large first steps can wreck weights, hence their warm-up; scores come to no harm.
        groups = [{"params": [s for s in scores if s.requires_grad], "peak": args.lr, "warmup": 0, "weight_decay": 0.0},
                  {"params": weights, "peak": args.weight_lr, "warmup": args.steps // 10, "weight_decay": 0.01}]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, fused=True) if groups else None
        if not groups:
            args.epochs = args.steps = args.ramp_steps = 0
        self.model.train()
        self.finite = torch.tensor(True, device=args.device)  # all scores, at every step so far
        # "logged" is how many bytes of metrics.jsonl belong to the steps done.
        self.state = {"step": 0, "lam": args.lam, "best": None, "last": None, "logged": 0}

    def set_masks(self):
        """Chooses the masks of this step, by the rule of the method."""
        if not self.layers:  # dense
            return
        if self.args.scores_from == "magnitude":  # the scores follow the weights, which are being trained
            for layer in self.layers.values():
                layer.scores.data.copy_(layer.weight.detach().abs())
        sparsity = smp.sparsity_at(self.state["step"], self.args.ramp_steps, self.args.sparsity)
        self.finite = self.finite & smp.choose_masks(self.layers, sparsity, self.args.rule, self.args.tau)

    def check_scores(self):
        """Raises FloatingPointError if masks have been chosen by scores that are not finite. Waits for the device."""
        if not self.finite:
            raise FloatingPointError("nan or inf among the scores: the run has diverged")

    def task_gradient(self, batch):
        """One batch forwards and backwards, what the task asks for: returns the loss, a scalar tensor."""
        args, teacher_logits = self.args, None
        if self.teacher_logits is not None:
            teacher_logits = self.teacher_logits[on_device(batch["index"], args)]
        logits = forward(self.model, batch, self.label_ids, args)       # each layer uses W' = W * M
        labels = on_device(batch["labels"], args)
        loss = smp.objective(logits, labels, teacher_logits, args.temperature, args.teacher_weight)
        loss.backward()                                                 # now scores.grad is dL/dW' * W
        return loss.detach()

    def train_step(self, batch):
        """One step of the method: returns the loss before it, a scalar tensor."""
        step, args = self.state["step"], self.args
        self.set_masks()
        loss = self.task_gradient(batch)
        if args.scores_from == "learned":
            scores = [layer.scores for layer in self.layers.values()]
            # Set at the first batch. A regression's first gradients only find its mean: there the smallest so far counts.
            if args.lam is None and step <= (args.steps // 20 if self.task.regression else 0):
                self.state["lam"] = min(self.state["lam"] or math.inf, smp.balanced_lambda(scores, args.pull))
            # The paper ramps lambda with the sparsity, v_t / v_f, full at N; its code, and this, by the same cubic over
            # the whole run, 1 - (1 - t/T)^3, so that the pull still grows while the mask settles.
            ramp = smp.sparsity_at(step, args.steps, 1.0)
            smp.add_regularizer_gradient(scores, self.state["lam"] * ramp)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * min((step + 1) / (group["warmup"] + 1), 1) * (1 - step / args.steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state["step"] += 1
        return loss

    def look(self):
        """Evaluates what has been learned so far; saves it if it is the best. Returns the record."""
        args, state = self.args, self.state
        self.set_masks()
        self.check_scores()
        masks = masks_of(self.layers)
        with smp.folded(self.layers, masks):
            metrics = evaluate(self.model, self.dev_sets, self.task, self.label_ids, args)
        state["last"] = {"step": state["step"], "epoch": state["step"] / args.epoch_steps,
                         "sparsity": sparsity_of(masks), "metrics": metrics}
        # Before the target sparsity is reached, a mask is denser than was asked for, and better for it: it does not count.
        # (The threshold rule has no target: for it this is only a date, and the best may be the densest.)
        if state["step"] >= args.ramp_steps and (not state["best"] or metrics["score"] > state["best"]["metrics"]["score"]):
            state["best"] = state["last"]
            self.save(masks)
        return state["last"]

    def save(self, masks):
        """Writes what the task needs beside the base model: the mask, or where weights were trained, a model."""
        out, base, belongs_to = Path(self.args.out), str(self.args.model), self.fingerprint
        if self.args.trains_weights:  # then the base that the mask belongs to is the model that is shipped with it
            base, shipped = str(out / "model"), plain(self.model, masks, self.base)
            save_model(base, shipped, self.base)
            belongs_to = fingerprint(shipped)
        if masks:
            data.save_masks(out / "mask.safetensors", masks, {
                "task": self.args.task, "method": self.args.method, "base": base, "fingerprint": belongs_to,
                "label_words": self.task.words, "kept": {name: int(mask.count_nonzero()) for name, mask in masks.items()},
                "settings": self.settings(), **self.state["best"]})

    def settings(self):
        return {key: value for key, value in vars(self.args).items()
                if key not in ("overwrite", "resume", "debug", "checkpoint_every")}

    # A checkpoint holds all that the next step depends on, so that a run that was killed and
    # resumed ends as if nothing had happened, bit for bit.

    def tensors(self):
        """{name: tensor} of all that changes from step to step."""
        tensors = {f"model.{name}": p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{key}": value for key, value in moments.items()}
        tensors["rng.cpu"] = torch.get_rng_state()  # dropout's
        if self.args.device.startswith("cuda"):
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self.args.device)
        return tensors

    def checkpoint(self, path):
        """Writes it under another name, then renames it: the last good one is there until then."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors().items()}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise FloatingPointError("nan or inf in what is being learned: the run has diverged")
        header = json.dumps({"state": self.state, "settings": self.settings(), "base": self.fingerprint})
        part = Path(f"{path}.part")
        try:
            save_file(tensors, part, metadata={"header": header, "sha256": checksum(header, tensors)})
            with open(part, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise OSError(f"{path}: cannot be written ({error}); the one before it, if any, is untouched: "
                          "--resume goes on from there") from None

    def resume(self, path):
        """Goes back to where a checkpoint was written. Raises ValueError for one that is damaged or
        was written under other settings."""
        try:
            with safe_open(path, "pt") as file:
                header, sha256 = file.metadata()["header"], file.metadata()["sha256"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            if checksum(header, tensors) != sha256:
                raise ValueError("its checksum is not that of its content")
            header = json.loads(header)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: damaged ({error}); start over with --overwrite") from None
        for key, value in json.loads(json.dumps(self.settings())).items():
            if key != "out" and header["settings"].get(key) != value:
                raise ValueError(f"{path}: written with {key} {header['settings'].get(key)}, this run has {value}; "
                                 "resume with the flags of the interrupted run")
        if header.get("base") != self.fingerprint:
            raise ValueError(f"{path}: written over other weights than those now in {self.base}; start over with --overwrite")
        self.state = header["state"]
        mask_path = Path(self.args.out) / "mask.safetensors"
        if mask_path.exists():  # it may have been saved after the checkpoint: then the best is what is on disk
            about = data.load_masks(mask_path)[1]
            if about["step"] > self.state["step"]:
                self.state["best"] = {key: about[key] for key in ("step", "epoch", "sparsity", "metrics")}
        torch.set_rng_state(tensors.pop("rng.cpu"))
        if "rng.cuda" in tensors:
            torch.cuda.set_rng_state(tensors.pop("rng.cuda"), self.args.device)
        parameters, moments = dict(self.model.named_parameters()), {}
        for name, tensor in tensors.items():
            kind, _, name = name.partition(".")
            if kind == "model":
                parameters[name].data.copy_(tensor)
            else:
                i, _, key = name.partition(".")
                moments.setdefault(int(i), {})[key] = tensor
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})


def checksum(header, tensors):
    """SHA-256, in hex, of a string and of {name: tensor}, in the order of the names."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    return digest.hexdigest()


def train(args):
    """Runs one method on one task; returns the final metrics. Everything is written to args.out.

    Ctrl-C lets the step end and writes a checkpoint; kill -9 loses what came after the last one. Either
    way --resume goes on from there, bit for bit (a GPU: as far as its kernels repeat themselves): scores,
    Adam's moments, dropout's generator and lambda are in it, masks follow from the scores, an epoch's
    order from its seed, and the log is cut back."""
    started, out = time.monotonic(), Path(args.out)
    log_path, checkpoint_path = out / "metrics.jsonl", out / "checkpoint.safetensors"
    if final := earlier_run(args):
        print(f"{out}: this run is complete, nothing to resume")
        return final
    run = Run(args)
    state = run.state
    with only_run_in(out), interruptible() as interrupts:
        if final := earlier_run(args):  # it ended while this one was loading
            return final
        if args.resume and checkpoint_path.exists():
            run.resume(checkpoint_path)
            state = run.state
            print(f"resuming    after step {state['step']} of {args.steps}")
        else:
            for leftover in (checkpoint_path, out / "mask.safetensors", out / "model/model.safetensors"):  # of a run done over
                leftover.unlink(missing_ok=True)
        log = Log(log_path, state["logged"])
        if not state["logged"]:
            log("settings", **run.settings(), torch=torch.__version__)
        introduce(run)

        saved, cost = time.monotonic(), 0.0
        first, begun = state["step"], time.monotonic()
        with tqdm(total=args.steps, initial=first, desc=args.method, dynamic_ncols=True, bar_format=BAR) as bar:
            for batch in batches_from(first, run.train_set, args):
                try:
                    loss = run.train_step(batch)
                    step = state["step"]
                    if step % 20 == 0 or step == args.steps:  # not always, since reading the loss waits for the device
                        run.check_scores()
                        if not math.isfinite(loss.item()):
                            raise FloatingPointError(f"the loss is {loss.item()}, the run has diverged")
                        speed = (step - first) * args.batch_size / (time.monotonic() - begun)
                        bar.set_postfix_str(f"loss {loss.item():.3f}  sparsity {sparsity_of(masks_of(run.layers)):.3f}  "
                                            f"lr {run.optimizer.param_groups[0]['lr']:.1e}  {speed:.0f} ex/s", refresh=False)
                        bar.update(step - bar.n)
                    if step % args.eval_every == 0 or step == args.steps:
                        found = run.look()
                        log("eval", **found, loss=loss.item(), lam=state["lam"])
                        bar.write(f"epoch {found['epoch']:<5.4g} sparsity {found['sparsity']:.4f}  {show(found['metrics'])}")
                    now = time.monotonic()
                    if interrupts or now - saved > max(args.checkpoint_every, 50 * cost):
                        state["logged"] = log.size()
                        run.checkpoint(checkpoint_path)
                        saved, cost = time.monotonic(), time.monotonic() - now
                except FloatingPointError as error:
                    advice = f"what was saved in {out} before is good; try a smaller learning rate" if state["step"] > 1 else \
                        f"as nothing had been learned yet, {run.base}/model.safetensors may be damaged"
                    raise FloatingPointError(f"step {state['step']}: {error}; {advice}") from None
                if interrupts:
                    raise KeyboardInterrupt
        if state["last"] is None:  # a random mask: there was nothing to learn
            log("eval", **run.look())

        # What came out
        best, last = state["best"], state["last"]
        changed = changed_tensors(run.model, run.base)
        final = {"metrics": best["metrics"], "best": best, "last": last, "frozen_unchanged": not changed}
        masks = data.load_masks(out / "mask.safetensors")[0] if run.layers else {}  # what is counted is what is on disk
        if masks:
            final["kept"], final["total"] = count(masks)
        final["new_bits"] = new_bits(run.model, masks)
        log("final", **final)
        for leftover in (checkpoint_path, Path(f"{checkpoint_path}.part")):
            leftover.unlink(missing_ok=True)
        if interrupts:
            raise KeyboardInterrupt
    final |= {"seconds": round(time.monotonic() - started, 1), "peak_mb": round(peak_mb(args))}
    report(out, masks, final, changed, args)
    return final


def earlier_run(args):
    """Looks at what is in args.out already. Returns the final record of a run that is complete, for
    --resume; None if there is work to do. Raises FileExistsError rather than have a run overwritten."""
    out, log_path = Path(args.out), Path(args.out) / "metrics.jsonl"
    if (out / "model").resolve() in (Path(args.model).resolve(), Path(args.teacher or "-").resolve()):
        raise ValueError(f"--out {out}: its model/ is this run's own --model or --teacher; give another --out")
    held = [name for name in ("metrics.jsonl", "mask.safetensors", "model/model.safetensors") if (out / name).exists()]
    if held and not (args.overwrite or args.resume):
        raise FileExistsError(f"{out}: holds a run already ({held[0]}); give --resume to go on with it, "
                              "--overwrite to start over, or another --out")
    lines = []
    if args.resume and log_path.exists():
        for line in log_path.read_text("utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # the last one, cut off
                break
    if not lines or lines[-1].get("event") != "final":
        return None
    for key, value in json.loads(json.dumps(vars(args))).items():
        open_yet = value is None and key in ("epochs", "batch_size", "eval_every")  # what only the size of the data decides
        if lines[0].get(key, value) != value and not open_yet and key not in ("out", "device"):
            raise ValueError(f"{log_path}: complete, but with {key} {lines[0][key]}, this run has {value}; give another --out")
    return lines[-1]


@contextlib.contextmanager
def only_run_in(folder):
    """Inside, a second run in the same folder is refused. The lock is the system's: it goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except BlockingIOError:
            raise FileExistsError(f"{folder}: another run is at work in it; wait for it, or give another --out") from None
        yield


@contextlib.contextmanager
def interruptible():
    """Inside, a first ctrl-C is only noted, in the list that is given, so that a step is never torn
    in two; a second one breaks off at once."""
    noted = []

    def note(*_):
        if noted:
            raise KeyboardInterrupt
        noted.append(True)
    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


class Log:
    """metrics.jsonl: one JSON object a line, on disk as soon as it is known. What stands behind the
    first `keep` bytes is cut off: a resumed run writes it again."""

    def __init__(self, path, keep=0):
        self.file = open(path, "ab")
        if self.file.tell() < keep:
            raise ValueError(f"{path}: shorter than its checkpoint says; start over with --overwrite")
        self.file.truncate(keep)
        self.file.seek(keep)

    def __call__(self, event, **entry):
        self.file.write(json.dumps({"event": event} | entry).encode() + b"\n")
        self.file.flush()

    def size(self):
        os.fsync(self.file.fileno())
        return self.file.tell()


def peak_mb(args):
    """The most memory this process has held, in MB: on the GPU if it ran there, else in all."""
    if args.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(args.device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # what getrusage counts in
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def changed_tensors(model, base):
    """The tensors that were to stay frozen and are no longer those of the checkpoint, bit for bit."""
    checkpoint = bert.load_pretrained(base).state_dict()
    return [name for name, p in model.named_parameters()
            if not p.requires_grad and name in checkpoint and not torch.equal(p.cpu(), checkpoint[name])]


def trained_weights(model):
    """How many of the weights, not the scores, are being trained."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and not name.endswith(".scores"))


def new_bits(model, masks):
    """What the task adds to the base model: a bit for each prunable weight, and where weights were
    trained, 32 for each that is kept and for each bias and LayerNorm."""
    kept, total = count(masks)
    trained = trained_weights(model)
    return total + 32 * (trained - (total - kept) if trained else 0)


def fingerprint(model):
    """SHA-256, in hex, of all the model's weights: it tells whether a mask was made for this model."""
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".scores")}
    return checksum("", {name: tensor.float().cpu() for name, tensor in weights.items()})


def plain(model, masks, base):
    """A Bert with ordinary linears: the weights of `model`, pruned by the masks for good."""
    result = bert.load_pretrained(base)
    result.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if not name.endswith(".scores")})
    for name in masks:
        result.get_submodule(name).weight.data.mul_(masks[name].cpu())
    return result


def save_model(folder, model, tokenizer_from):
    """A model folder that --model, --teacher and transformers read, with the vocabulary of another."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in data.TOKENIZER_FILES:
        source = Path(tokenizer_from) / name
        if not source.is_file():
            (folder / name).unlink(missing_ok=True)  # of another vocabulary
        elif source.resolve() != (folder / name).resolve():
            shutil.copy(source, folder / name)
    bert.save_pretrained(model, folder)


# ---- Masks at work --------------------------------------------------------------------------

def use_masks(given):
    """--eval, --predict, --export: loads the base once, then each mask in turn is folded into it.
    The task and its settings come with the mask. Returns {mask file: metrics}."""
    tasks, results, written, loaded = set(), {}, [], {}
    if given.export and (Path(given.export) / "model.safetensors").exists() and not given.overwrite:
        raise FileExistsError(f"{given.export}: holds a model already; give --overwrite, or another folder")
    for path in given.eval or given.predict:
        masks, about = data.load_masks(path)
        known = isinstance(about, dict) and all(isinstance(about.get(key), str) for key in ("task", "base", "fingerprint"))
        how = {"max_length", "precision", "data"}
        if not known or about["task"] not in data.TASKS or not how <= set(about.get("settings") or ()):
            raise ValueError(f"{path}: its metadata do not say for which task and weights it is; "
                             "expected a mask that train.py wrote")
        if given.task not in (None, about["task"]):
            raise ValueError(f"{path}: a mask for {about['task']}; --task asks for {given.task}")
        if given.predict and about["task"] in tasks:
            raise ValueError(f"{path}: a second mask for {about['task']}; GLUE takes one file a task")
        tasks.add(about["task"])
        task, base, settings = data.TASKS[about["task"]], bert.find_pretrained(given.model or about["base"]), about["settings"]
        args = argparse.Namespace(**vars(given) | {"max_length": settings["max_length"], "precision": settings["precision"],
                                                   "data": given.data or settings["data"]})
        if base not in loaded:
            model, tokenizer = load(base, args)
            layers = smp.prune(model, prunable(model))
            loaded[base] = model, tokenizer, layers, fingerprint(model)
        model, tokenizer, layers, here = loaded[base]
        shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
        for name in {**shapes, **masks}:
            if name not in masks or shapes.get(name) != tuple(masks[name].shape):
                found = tuple(masks[name].shape) if name in masks else "not in it"
                raise ValueError(f"{path}: {name} is {found}, in {base} it is {shapes.get(name, 'unknown')}; "
                                 f"give the model it was made for, {about['base']}, as --model")
        if here != about["fingerprint"]:
            raise ValueError(f"{path}: made for other weights than those of {base} (SHA-256 {about['fingerprint'][:12]}..., "
                             f"here {here[:12]}...); give the model it was made for, {about['base']}, as --model")
        words = label_words(tokenizer, task, base, args)
        with smp.folded(layers, masks):
            if args.predict:
                for split, examples in encoded_splits(task, tokenizer, args, task.test).items():
                    logits = predict(model, examples, words, args)
                    written.append(data.write_predictions(task, split, logits, args.out or "predictions"))
                    print(f"{path} -> {written[-1]} ({len(examples):,} lines)")
            else:
                results[path] = evaluate(model, encoded_splits(task, tokenizer, args, task.dev), task, words, args)
                print(f"{path}: {about['task']}, sparsity {sparsity_of(masks):.4f}, {show(results[path])}")
        if args.export:
            save_model(args.export, plain(model, masks, base), base)
            print(f"{path} -> {args.export}/: the pruned model, {base} with zeros where the mask has them")
    if len(given.predict or ()) > 1:
        print(f"all of them -> {data.zip_predictions(written)}, as the GLUE site takes it")
    return results


# ---- What a person sees ---------------------------------------------------------------------

def show(metrics):
    """Metrics in words; "score", the mean of the others, only where there are several."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "score" or len(metrics) > 2)


def introduce(run):
    """What this run is, before its first step."""
    args, words = run.args, run.task.words
    text, label = run.tokenizer.decode(run.train_set.ids[0], skip_special_tokens=False), run.train_set.labels[0]
    scores = sum(layer.scores.numel() for layer in run.layers.values())
    weights = sum(p.numel() for p in run.model.parameters()) - scores
    trained = trained_weights(run.model)
    settings = " ".join(f"{key}={value}" for key, value in run.settings().items() if value is not None and value is not False)
    print(textwrap.fill(f"settings    {settings}", 100, subsequent_indent=" " * 12,
                        break_long_words=False, break_on_hyphens=False))
    print(f"example     {text} -> " + (f"{label:g}" if run.task.regression else f"{words[label]!r}"))
    print("head        label words: " + ("the MLM transform and their rows of the decoder" if run.model.mlm else
                                         "dot product of [CLS] and their embeddings (the model has no MLM head)"))
    print(f"parameters  {weights - trained:,} frozen, {trained:,} trained" + (
        f", {scores:,} scores, one for each prunable weight, {args.scores_from}" if scores else ""))
    if args.rule == "threshold":
        print(f"note        {args.method} does not enforce --sparsity: sigmoid(S) > {args.tau:g} decides, --lambda steers it")


def density_table(masks):
    """Percent kept of each matrix, layers down and types across, the fuller the darker."""
    kept = {name: mask.float().mean().item() for name, mask in masks.items()}
    top = max(kept.values()) or 1
    lines = ["kept, %  " + "".join(f"{t:>9}" for t in TYPES)]
    for layer in sorted({name.split(".")[1] for name in masks}, key=int):
        cells = [kept[f"layers.{layer}.{t}"] for t in TYPES]
        shades = [SHADES[math.ceil(cell / top * (len(SHADES) - 1))] for cell in cells]
        lines.append(f"layer {layer:>2} " + "".join(f" {shade * 2}{100 * cell:>6.1f}" for shade, cell in zip(shades, cells)))
    of_type = [{name: mask for name, mask in masks.items() if name.endswith("." + t)} for t in TYPES]
    lines.append("all      " + "".join(f"{100 * (1 - sparsity_of(group)):>9.1f}" for group in of_type))
    return "\n".join(lines)


def report(out, masks, final, changed, args):
    best, last = final["best"], final["last"]
    print()
    if masks:
        print(density_table(masks))
        print(f"\nkept {final['kept']:,} of {final['total']:,} weights: sparsity {1 - final['kept'] / final['total']:.6f}")
    print(f"last   epoch {last['epoch']:<5.4g} {show(last['metrics'])}")
    print(f"best   epoch {best['epoch']:<5.4g} {show(best['metrics'])}   <- saved; chosen on dev itself, so a little flattering")
    if masks or changed:
        print("frozen tensors: every one bit-identical to the checkpoint" if not changed else
              f"FROZEN TENSORS CHANGED: {', '.join(changed[:3])} ...")
    what = ["one bit for each prunable weight"] * bool(masks) + ["32 for each that is kept, each bias and LayerNorm" if masks else
                                                               "32 for each weight"] * args.trains_weights
    print(f"new parameters for this task: {final['new_bits']:,} bits, {final['new_bits'] / 8e6:.2f} MB ({', '.join(what)})")
    files = [f"{out}/metrics.jsonl"] + [f"{out}/model/"] * args.trains_weights + (
        [f"{out}/mask.safetensors ({(out / 'mask.safetensors').stat().st_size:,} bytes)"] if masks else [])
    print(f"{final['seconds']:.0f} s, {final['peak_mb']:,} MB at most; {', '.join(files)}")


# ---- The demo: a BERT of our own, and the lesson in one table -------------------------------

def prepare_demo(folder):
    """Writes the made-up task and pre-trains a tiny BERT on its language, unless both are there."""
    folder = Path(folder)
    if not all((folder / name).is_file() for name in ("model/model.safetensors", "DEMO/train.tsv", "DEMO/dev.tsv")):
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
        for step, batch in enumerate((b for _ in range(epochs) for b in data.batches(corpus, batch_size, rng)), start=1):
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
    base = bert.find_pretrained(args.model)
    model, tokenizer = load(base, args)
    label_ids = label_words(tokenizer, task, base, args)
    # The same for every mask: trained once and kept.
    ceiling = Path(args.data) / f"dense-{args.precision}-{fingerprint(model)[:8]}"
    dev = encoded_splits(task, tokenizer, args, task.dev)

    def accuracy():
        return evaluate(model, dev, task, label_ids, args)["accuracy"]
    rows = [("chance: always the commoner label", max(np.bincount(dev["dev"].labels)) / len(dev["dev"])),
            ("the frozen model, nothing pruned", accuracy())]
    torch.manual_seed(args.seed[0])
    layers, sparsity = smp.prune(model, prunable(model)), 1 - learned["kept"] / learned["total"]
    for kind, score in (("a random mask", torch.rand_like), ("a magnitude mask: the largest weights", torch.abs)):
        scores = {name: score(layer.weight) for name, layer in layers.items()}
        counts = smp.keep_counts(scores, sparsity, "smp-l")
        with smp.folded(layers, {name: smp.topk_mask(s, counts[name]) for name, s in scores.items()}):
            rows.append((kind, accuracy()))
    rows.append(("the learned mask", learned["metrics"]["accuracy"]))
    with contextlib.redirect_stdout(io.StringIO()):
        dense = main(["--method", "finetune", "--epochs", "2", "--weight-lr", "5e-4", "--dropout", "0", "--resume",
                      "--device", args.device, "--precision", args.precision, "--max-length", str(args.max_length),
                      "--data", args.data, "--model", str(base), "--out", str(ceiling)])
    rows.append(("dense fine-tuning, every weight trained", dense["metrics"]["accuracy"]))
    print(f"\naccuracy on dev; the three masks remove {sparsity:.0%} of the weights and change none")
    for what, value in rows:
        print(f"  {what:<40} {value:.3f}  {'█' * round(30 * value)}")
    value = dict(rows)
    if value["the learned mask"] > max(value["a random mask"], value["a magnitude mask: the largest weights"]):
        print("\nThe frozen weights already hold a classifier; it is hidden among the others. Neither chance nor\n"
              "size finds it. Asking the task of each weight \"stay or go?\", and nothing else, does.")


# ---- The benchmark --------------------------------------------------------------------------

def benchmark(args, argv):
    """Times steps of this method and of dense fine-tuning, in turn in one process; prints a report and a JSON line."""
    if args.scores_from in ("random", None):
        raise ValueError(f"--method {args.method} learns no mask; --benchmark compares one that does with dense fine-tuning")
    with tempfile.TemporaryDirectory() as folder:
        if not args.model:
            data.write_random(folder, data.TASKS[args.task])
            layers, hidden, heads = SIZES[args.benchmark]
            config = bert.Config(num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads,
                                 intermediate_size=4 * hidden)
            save_model(folder, bert.Bert(config), folder)
        dense = parse_args([*argv, "--method", "finetune", "--dropout", str(args.dropout)])  # all else is equal
        where = {"model": args.model or folder, "data": args.data or folder, "seed": args.seed[0]}
        both = [argparse.Namespace(**vars(a) | where) for a in (args, dense)]
        peaks = [in_a_process_of_its_own(longest_steps, one) for one in both]  # for a process's peak never falls
        run, dense = [Run(one) for one in both]
    weights, rounds = sum(layer.weight.numel() for layer in run.layers.values()), timed_rounds(run, dense)
    median = {key: float(np.median([r[key] for r in rounds])) for key in rounds[0]}
    # A product of matrices takes 2 operations a weight and token forwards and 4 backwards; so do
    # attention's two, each of T by T by D a layer.
    tokens, c = median.pop("tokens"), run.model.config
    operations = 6 * tokens * (weights + 2 * c.num_hidden_layers * c.hidden_size * tokens / args.batch_size)
    found = {"size": args.model or args.benchmark, "weights": weights, "tokens_a_batch": round(tokens)} | {
        key: vars(args)[key] for key in ("task", "method", "batch_size", "sparsity", "dropout", "precision", "device")} | {
        "threads": torch.get_num_threads(), "torch": torch.__version__, "pairs": len(rounds)} | median | {
        "examples_per_s": 1e3 * args.batch_size / median["smp_ms"],
        "matmul_share": 1e3 * operations / median["smp_ms"] / matrix_rate(args),
        "peak_mb": peaks[0], "dense_peak_mb": peaks[1]}
    chip = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else f"{found['threads']} threads"
    print(f"{found['size']}, {weights:,} prunable weights; {args.task}: {args.batch_size} examples, {tokens:.0f} tokens a batch "
          f"with padding;\n{args.method}, sparsity {args.sparsity:g}, dropout {args.dropout:g}, {args.precision} on {args.device} "
          f"({chip}), torch {torch.__version__}\n\n"
          f"  dense fine-tuning    {found['dense_ms']:9.1f} ms a step\n"
          f"  {args.method:<20} {found['smp_ms']:9.1f} ms a step, {found['ratio']:.2f} of a dense one "
          f"(medians of {len(rounds)} pairs)")
    for part in ("mask", "regularizer", "optimizer"):
        print(f"    {part:<18} {found[part + '_ms']:9.1f} ms, {found[part + '_ms'] / found['smp_ms']:.0%} of it")
    print(f"  {found['examples_per_s']:.0f} examples/s, {found['matmul_share']:.0%} of the device's matrix rate\n"
          f"  memory with the longest inputs: {peaks[0]:,.0f} MB, dense {peaks[1]:,.0f} MB\n{json.dumps(found)}")
    return found


def timed_rounds(run, dense):
    """Pairs of steps on the same batch and the parts of a step, a dict of ms a pair. Two pairs to warm
    up, then 20, or as many as 100 s allow, but at least 5."""
    args, rounds, begun = run.args, [], time.monotonic()
    scores = [layer.scores for layer in run.layers.values() if layer.scores.requires_grad]
    for batch in itertools.cycle(batches_from(0, run.train_set, args)):
        ms = {"tokens": batch["input_ids"].numel()}
        pair = [("dense_ms", dense), ("smp_ms", run)]
        for key, one in pair if len(rounds) % 2 else reversed(pair):
            ms[key] = clock(lambda: settled_step(one, batch), args)
        for group in run.optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        ms |= {"ratio": ms["smp_ms"] / ms["dense_ms"],
               "mask_ms": clock(run.set_masks, args),
               "regularizer_ms": clock(lambda: smp.add_regularizer_gradient(scores, 0.0), args),
               "optimizer_ms": clock(run.optimizer.step, args)}
        run.optimizer.zero_grad()
        rounds.append(ms)
        if len(rounds) >= 22 or len(rounds) >= 7 and time.monotonic() - begun > 100:
            return rounds[2:]


def in_a_process_of_its_own(function, argument):
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, argument).result()
        except concurrent.futures.process.BrokenProcessPool:
            raise OSError("the process that measures the memory was killed: too little of it? Give a smaller "
                          "size or --batch-size") from None


def settled_step(run, batch):
    """A step as they are once the sparsity is what was asked for."""
    run.state["step"] = run.args.ramp_steps if run.state["lam"] is not None else 0
    run.train_step(batch)


def longest_steps(args):
    """Three steps on batches as long as --max-length allows, and the most memory they took, in MB."""
    run = Run(args)
    ids = torch.zeros(args.batch_size, args.max_length, dtype=torch.long)
    batch = {"index": torch.arange(len(ids)), "input_ids": ids, "token_type_ids": ids, "attention_mask": None,
             "labels": torch.from_numpy(np.resize(run.train_set.labels, len(ids)))}
    for _ in range(3):
        settled_step(run, batch)
    return peak_mb(args)


def clock(work, args):
    """How long it takes, in ms."""
    def wait():
        if args.device.startswith("cuda"):
            torch.cuda.synchronize(args.device)
    wait()
    start = time.perf_counter()
    work()
    wait()
    return 1e3 * (time.perf_counter() - start)


def matrix_rate(args):
    """Operations a second of one large product, in the run's precision: what no step can exceed."""
    m = 8192 if args.device.startswith("cuda") else 2048
    a = torch.randn(m, m, device=args.device, dtype=torch.bfloat16 if args.precision == "bf16" else torch.float32)
    return 2 * m ** 3 / (min(clock(lambda: a @ a, args) for _ in range(8)) / 1e3)


# ---- The command line -----------------------------------------------------------------------

def run_seeds(args):
    """One run for each seed; returns the metrics of the one, or of several their mean and spread. One says
    little of a small task: on MRPC the paper's own seeds have a standard deviation of 1.2 points (mean 87.0, 80 % kept). What to
    report is the mean of `last`: `best` was chosen on the very examples it is measured on."""
    out = args.out or f"runs/{args.task}-{args.method}-{args.sparsity:g}"
    alone = args.out and len(args.seed) == 1
    each = [argparse.Namespace(**vars(args) | {"seed": seed, "out": out if alone else f"{out}-s{seed}"}) for seed in args.seed]
    for one in each:
        earlier_run(one)  # what is wrong with the last should not come to light after the first has run for hours
    runs = [train(one) for one in each]
    if len(runs) == 1:
        return runs[0]
    together = {"seeds": args.seed, "n": len(runs)}
    for which in ("best", "last"):
        for name in [name for name in runs[0][which]["metrics"] if name != "score"]:
            values = [run[which]["metrics"][name] for run in runs]
            together |= {f"{which}_{name}": values, f"{which}_{name}_mean": float(np.mean(values)),
                         f"{which}_{name}_std": float(np.std(values, ddof=1))}
    print(f"\n{len(runs)} seeds, mean ± sample standard deviation")
    for key in [key.removesuffix("_mean") for key in together if key.endswith("_mean")]:
        print(f"  {key.replace('_', ' '):<16} {together[f'{key}_mean']:.4f} ± {together[f'{key}_std']:.4f}")
    print(json.dumps(together))
    return together


def main(argv=None):
    """Runs the command line; returns the final metrics. Bad input, from flag to file, ends in one
    line on stderr and exit code 2; ctrl-C in exit code 130."""
    args, started = parse_args(argv), time.monotonic()
    try:
        if args.eval or args.predict:
            return use_masks(args)
        if args.benchmark:
            return benchmark(args, sys.argv[1:] if argv is None else argv)
        if args.task == "demo":
            prepare_demo(args.data)
        final = run_seeds(args)
        if args.task == "demo" and args.method in smp.RULES and len(args.seed) == 1:
            compare(args, final)
            print(f"\n{time.monotonic() - started:.0f} s in all, {peak_mb(args):,.0f} MB of memory at most")
        return final
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --resume goes on from here, if a run had begun", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, OSError, FloatingPointError, SafetensorError, torch.OutOfMemoryError) as error:
        if args.debug:
            raise
        # A disk that is full says so without saying where.
        nameless = isinstance(error, SafetensorError) or isinstance(error, OSError) and error.errno and not error.filename
        print(f"error: {args.out or 'runs'}: {error}" if nameless else f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
