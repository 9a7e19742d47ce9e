"""Prune a pre-trained BERT for a GLUE task while its weights stay frozen: the program.

    python train.py --task mrpc --sparsity 0.9

Read from the top: the methods; several processes (to be skipped at first); one run; what it leaves
on disk; masks at work; the report; the demo; and last defaults, flags and main. The method is in
smp.py, the network in bert.py, the data in data.py. `s` is always the settings of a run, from
settings_of.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import sys
import textwrap
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn

import bert
import data
import smp

# A method is three choices: where the scores come from (or the mask), the rule that says how many
# weights of a matrix stay (smp.RULES), and whether the weights train too.
METHODS = {
    "smp-s":         ("learned",   "smp-s",     "frozen"),
    "smp-l":         ("learned",   "smp-l",     "frozen"),
    "global":        ("learned",   "global",    "frozen"),
    "threshold":     ("learned",   "threshold", "frozen"),
    "random":        ("random",    "smp-l",     "frozen"),
    "magnitude":     ("magnitude", "smp-l",     "trained"),
    "movement":      ("learned",   "smp-l",     "trained"),
    "soft-movement": ("learned",   "threshold", "trained"),
    "lock":          ("zeros",     None,        "trained"),  # the mask is the model's own zeros
    "finetune":      (None,        None,        "trained"),  # dense
}

# ---- Several processes ----------------------------------------------------------------------
# `torchrun --nproc-per-node 2 train.py ...` starts this program twice. Each process takes its part
# of every batch, and the gradients are added up. So all have equal scores, and choose equal masks.
# The first one writes and prints.

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

@contextlib.contextmanager
def joined(device):
    """Inside, the processes hear each other, on GPUs through NCCL, else through gloo."""
    if PROCESSES == 1:
        yield
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    # An optimizer imports this. If it did so later, threads would outlive the group and crash.
    from torch import _dynamo  # noqa: F401
    dist.init_process_group()
    with contextlib.ExitStack() as stack:
        if RANK:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield
    dist.destroy_process_group()

def from_first(x):
    """What x is in the first process. All wait for it."""
    if PROCESSES > 1:
        box = [x]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]
    return x

@contextlib.contextmanager
def first_alone():
    """The first process does what is inside; then the others do, and find it done."""
    if RANK:
        from_first(None)
    yield
    if not RANK:
        from_first(None)

def add_up(tensors):
    """Makes each tensor the sum of those of all processes, in place."""
    if PROCESSES > 1:
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()

def part_of(batch):
    """This process's part of a batch, and its share of what the batch asks: a mean over the batch
    is the sum over the parts of share * mean."""
    size, length = batch["input_ids"].shape
    first, end = size * RANK // PROCESSES, size * (RANK + 1) // PROCESSES
    part = {key: x if x is None else x[first:end] for key, x in batch.items()}
    if "places" in batch:  # of mlm: K places, indices of tokens, and a label for each
        mine = (batch["places"] >= first * length) & (batch["places"] < end * length)
        part["places"] = batch["places"][mine] - first * length
        part["labels"] = batch["labels"][mine]
    asked, of_all = [(x["labels"] != -100).sum().item() for x in (part, batch)]
    return (part, asked / of_all) if asked else (batch, 0.0)  # a mean over nothing is nan

# ---- One run --------------------------------------------------------------------------------

@contextlib.contextmanager
def without_dropout(model):
    was_training = model.training
    model.eval()
    yield
    model.train(was_training)

class TaskModel:
    """A BERT with the label words of a task, from a model folder. Task mlm asks for any word."""

    def __init__(self, folder, task, s):
        self.base, self.task, self.s = folder, task, s
        self.model, self.tokenizer = bert.load_pretrained(folder), data.load_tokenizer(folder)
        tokens = max(self.tokenizer.get_vocab().values()) + 1
        rows = self.model.config.vocab_size
        if not rows - 128 < tokens <= rows:  # some models pad their embeddings to a round number
            raise ValueError(f"{folder}: tokenizer.json or vocab.txt has {tokens} tokens, the "
                             f"embedding {rows} rows; they are not of one model")
        positions = self.model.config.max_position_embeddings
        if s.max_length > positions:
            raise ValueError(f"{folder}: it has {positions} positions, not {s.max_length}")
        self.fingerprint = fingerprint(self.model, self.tokenizer)
        self.model.to(s.device)
        self.label_ids = data.label_ids(self.tokenizer, task.words).to(s.device)

    def encode(self, texts, labels):
        if self.task.mlm:
            return data.encode_corpus(self.tokenizer, texts, self.s.max_length)
        return data.encode(self.tokenizer, texts, labels, self.s.max_length)

    def encode_splits(self, names):
        """{split: examples} of files of the task."""
        splits = {}
        for name in names:
            texts, labels = data.read_split(self.task, self.s.data, name)
            splits[name] = self.encode(texts, labels)
        return splits

    def logits(self, batch):
        """A batch -> the logits of the label words (B, C), of mlm those of all words at the K
        places of the batch (K, vocabulary); float32."""
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = [self.on_device(batch[name]) for name in names]
        device_type = torch.device(self.s.device).type
        with torch.autocast(device_type, torch.bfloat16, enabled=self.s.precision == "bf16"):
            hidden = self.model(*inputs)
            if self.task.mlm:
                hidden = hidden.flatten(0, 1)[self.on_device(batch["places"])]
                return self.model.mlm_logits(hidden).float()
        # float32: bf16 rounds the logits of two words too coarsely.
        return self.model.label_logits(hidden.float(), self.label_ids)

    def on_device(self, tensor):
        """A copy where the model is, from pinned memory, so that the host need not wait for it."""
        if tensor is None or not self.s.device.startswith("cuda"):
            return tensor if tensor is None else tensor.to(self.s.device)
        return tensor.pin_memory().to(self.s.device, non_blocking=True)

    @torch.inference_mode()
    def predict(self, examples):
        """N examples -> logits (N, C), in their order."""
        logits = torch.zeros(len(examples), len(self.label_ids))
        with without_dropout(self.model):
            for batch in itertools.islice(data.batches(examples, 128), RANK, None, PROCESSES):
                logits[batch["index"]] = self.logits(batch).cpu()
        add_up([logits])
        if not logits.isfinite().all():
            raise FloatingPointError("nan or inf among the logits: the run has diverged")
        return logits.numpy()

    def evaluate(self, dev_sets):
        """{metric: value}; those of MNLI's second dev set begin with "mismatched_", those of
        --holdout with "holdout_". "score" is the mean of the "holdout_" ones, without them of
        all: the best evaluation has the highest."""
        if self.task.mlm:
            return self.evaluate_words(dev_sets["dev"])
        metrics, prefixes = {}, {"dev_mismatched": "mismatched_", "holdout": "holdout_"}
        for split, examples in dev_sets.items():
            prefix = prefixes.get(split, "")
            found = data.evaluate_metrics(self.task, self.predict(examples), examples.labels)
            metrics |= {prefix + name: value for name, value in found.items()}
        held_out = [value for name, value in metrics.items() if name.startswith("holdout_")]
        return metrics | {"score": np.mean(held_out or list(metrics.values())).item()}

    @torch.inference_mode()
    def evaluate_words(self, examples):
        """The metrics of mlm, always at the same 15 % of the words. "score" is 1 / perplexity."""
        generator = torch.Generator().manual_seed(0)
        sums = torch.zeros(3, dtype=torch.float64)  # words found, loss, words
        batches = (data.hide_words(batch, self.tokenizer, generator)
                   for batch in data.batches(examples, 32))
        with without_dropout(self.model):
            for batch in itertools.islice(batches, RANK, None, PROCESSES):
                logits, labels = self.logits(batch), self.on_device(batch["labels"])
                sums[0] += (logits.argmax(1) == labels).sum().item()
                sums[1] += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
                sums[2] += len(labels)
        add_up([sums])
        hits, loss, n = sums.tolist()
        if not math.isfinite(loss):
            raise FloatingPointError("nan or inf among the logits: the run has diverged")
        return {"accuracy": hits / n, "perplexity": math.exp(min(loss / n, 700)),
                "score": math.exp(-loss / n)}

class Run(TaskModel):
    """One run: what is learned, from what data, and in `state` how far it has come."""

    def __init__(self, flags):
        s, self.out = settings_of(flags), Path(flags.out)  # without what depends on the data
        task = data.TASKS[s.task]
        with first_alone():  # it may fetch them
            folder = bert.find_pretrained(s.model)
            if not task.mlm:
                data.ensure(task, s.data)
        texts, labels = data.read_split(task, s.data, "train", s.limit)
        if s.holdout:
            (texts, labels), held_out = data.split_off(texts, labels, s.holdout)
        positions = bert.read_config(folder / "config.json").max_position_embeddings
        super().__init__(folder, task, settings_of(flags, len(texts), positions))
        self.train_set = self.encode(texts, labels)
        self.dev_sets = self.encode_splits(task.dev)
        if s.holdout:
            self.dev_sets["holdout"] = self.encode(*held_out)
        self.teacher = self.load_teacher() if s.teacher else lambda batch: None
        torch.manual_seed(s.seed)
        self.make_learnable()
        # "logged": length and hash of the log at the last checkpoint.
        self.state = {"step": 0, "lam": self.s.lam, "best": None, "last": None, "logged": None}

    def load_teacher(self):
        """Returns a function: a batch -> the teacher's logits."""
        teacher = TaskModel(bert.find_pretrained(self.s.teacher), self.task, self.s)
        if teacher.tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise ValueError(f"--teacher {teacher.base}: its vocabulary is not that of {self.base};"
                             " expected a teacher fine-tuned from that model")
        if self.task.mlm and (teacher.model.mlm is None) != (self.model.mlm is None):
            has = ["no MLM head, and {} has one", "an MLM head, and {} has none"]
            raise ValueError(f"--teacher {teacher.base}: it has "
                             + has[self.model.mlm is None].format(self.base))
        if self.task.mlm:  # each time other words are hidden
            return torch.no_grad()(teacher.logits)
        # Without dropout its logits never change.
        known = torch.from_numpy(teacher.predict(self.train_set)).to(self.s.device)
        return lambda batch: known[self.on_device(batch["index"])]

    def batches(self):
        """The batches of all steps that are still to do."""
        s = self.s
        return data.training_batches(self.train_set, s, self.state["step"],
                                     self.ask_for_words if self.task.mlm else None)

    def ask_for_words(self, batch, generator):
        s = self.s
        return data.hide_words(batch, self.tokenizer, generator, s.mlm_rate, s.mlm_cls,
                               everywhere=bool(s.teacher))

    def make_learnable(self):
        """Sets up what is learned: the scores, the weights, both, or (a random mask) nothing."""
        s, model = self.s, self.model
        model.set_dropout(s.dropout)
        masked = s.scores_from or s.int8  # a dense model in 8 bits has masks of ones
        self.layers = smp.prune(model, prunable(model), s.init) if masked else {}
        for layer in self.layers.values():
            layer.int8 = s.int8
        if s.scores_from == "zeros":
            self.lock_zeros()
        self.scores = [layer.scores for layer in self.layers.values()]
        for scores in self.scores:
            scores.requires_grad_(s.scores_from == "learned")
        weights = [p for name, p in model.named_parameters() if is_trained(name, s)]
        self.n_trained = sum(p.numel() for p in weights)
        for p in weights:
            p.requires_grad_(True)
        # Decay would pull negative scores up. Weights need a warm-up: large first steps wreck them.
        groups = [{"params": self.scores if s.scores_from == "learned" else [],
                   "peak": s.lr, "warmup": 0, "weight_decay": 0.0},
                  {"params": weights,
                   "peak": s.weight_lr, "warmup": s.steps // 10, "weight_decay": 0.01}]
        groups = [group for group in groups if group["params"]]
        self.learned = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(groups, fused=True) if groups else None
        model.train()

    def lock_zeros(self):
        smp.lock(self.layers)
        sparsity = data.sparsity_of(self.masks())
        if sparsity < 0.01:
            raise ValueError(f"{self.base}: {sparsity:.2%} of its weights are 0, nothing to lock; "
                             "expected a sparse model (--task mlm --method magnitude makes one)")

    def masks(self):
        return {name: layer.mask for name, layer in self.layers.items()}

    def set_masks(self):
        """Chooses the masks of this step, by the rule of the method."""
        s = self.s
        if s.scores_from == "magnitude":
            for layer in self.layers.values():  # the scores follow the weights that train
                layer.scores.data.copy_(layer.dense_weight.detach().abs())
        if s.rule:
            sparsity = smp.sparsity_at(self.state["step"], s.ramp_steps, s.sparsity)
            smp.choose_masks(self.layers, sparsity, s.rule, s.tau)

    def train_step(self, batch):
        """One step of the method. Returns the loss before it, a scalar tensor."""
        s, step = self.s, self.state["step"]
        self.set_masks()
        batch, share = part_of(batch)  # in one process all of it
        torch.manual_seed(data.seed_of(s.seed, step, RANK))  # dropout's, so a resumed run has it

        logits = self.logits(batch)  # each layer uses W' = W * M
        labels, taught = self.on_device(batch["labels"]), self.teacher(batch)
        loss = share * smp.objective(logits, labels, taught, s.temperature, s.teacher_weight)
        loss.backward()  # now scores.grad is dL/dW' * W
        loss = loss.detach()
        add_up([loss, *(p.grad for p in self.learned if p.grad is not None)])

        if s.scores_from == "learned":
            self.state["lam"] = self.find_lambda()
            lam_ramp = smp.sparsity_at(step, s.steps, 1.0)  # it grows on while the mask settles
            smp.add_regularizer_gradient(self.scores, self.state["lam"] * lam_ramp)

        for group in self.optimizer.param_groups:
            peak, warmup = group["peak"], group["warmup"]
            group["lr"] = learning_rate(step, s.steps, peak, warmup, s.hold_steps)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state["step"] += 1
        return loss

    def find_lambda(self):
        """lambda, measured on the task's gradient at the first batch. The first gradients of a
        regression only find its mean: there the smallest of the first twentieth counts."""
        s, lam = self.s, self.state["lam"]
        last_measured = s.steps // 20 if self.task.regression else 0
        if s.lam is not None or self.state["step"] > last_measured:  # s.lam: --lambda was given
            return lam
        return min(lam or math.inf, smp.balanced_lambda(self.scores, s.pull))

    def check_finite(self, loss):
        """Raises FloatingPointError for a loss or scores that are not finite. Waits for a GPU."""
        norm = nn.utils.get_total_norm(self.scores)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError("nan or inf in the loss or the scores: the run has diverged")

    def evaluate_and_keep_best(self):
        """Evaluates what has been learned so far and saves it if it is the best. Returns the
        record. Before the target sparsity a mask is denser, so better, and does not count."""
        s = self.s
        state = self.state
        self.set_masks()
        masks = self.masks()
        with smp.folded(self.layers, masks):
            metrics = self.evaluate(self.dev_sets)
        state["last"] = {"step": state["step"], "epoch": state["step"] / s.epoch_steps,
                         "sparsity": data.sparsity_of(masks), "metrics": metrics}
        best = state["best"]["metrics"]["score"] if state["best"] else -math.inf
        if state["step"] >= s.ramp_steps and metrics["score"] > best:
            state["best"] = state["last"]
            if not RANK:
                save_result(self, masks)
        return state["last"]

def train(flags):
    """Runs one method on one task, in the folder flags.out. Returns the final record.

    Ctrl-C lets the step end and writes a checkpoint. --resume goes on from the last one and ends
    bit for bit as if nothing had happened (on a GPU as far as its kernels repeat themselves)."""
    started = time.monotonic()
    run = Run(flags)
    alone = contextlib.nullcontext() if RANK else data.only_run_in(run.out)
    # torchrun passes on a ctrl-C that all have heard already.
    with alone, data.interruptible(patient=PROCESSES > 1) as interrupts:
        if final := finished_run(flags):  # it ended while this one was loading
            return final
        log = begin(run)
        introduce(run)
        try:
            train_loop(run, log, interrupts)
        except FloatingPointError as error:
            raise FloatingPointError(f"step {run.state['step']}: {error}; try a smaller learning "
                                     f"rate, or get {run.base}/model.safetensors again") from None
        final, masks = ({}, {}) if RANK else finish(run, log)
    final = from_first(final)
    final["seconds"] = round(time.monotonic() - started, 1)
    final["peak_mb"] = round(data.peak_mb(run.s.device))
    if not RANK:
        report(run, final, masks)
    return final

def train_loop(run, log, interrupts):
    """All steps of a run that are still to do."""
    s = run.s
    state = run.state
    next_checkpoint = time.monotonic() + s.checkpoint_every
    with data.progress_bar(s.method, s.steps, state["step"]) as bar:
        for batch in run.batches():
            loss = run.train_step(batch)
            last = state["step"] == s.steps
            evaluates = last or state["step"] % s.eval_every == 0
            if evaluates or state["step"] % 20 == 0:  # seldom, since to read a loss waits for a GPU
                run.check_finite(loss)
                show_progress(bar, run, loss)
            if evaluates:
                record = run.evaluate_and_keep_best()
                log("eval", **record, loss=loss.item(), lam=state["lam"])
                bar.write(f"epoch {record['epoch']:<5.4g} sparsity {record['sparsity']:.4f}  "
                          f"{format_metrics(record['metrics'])}")
            stops = bool(interrupts)
            stops, saves = from_first((stops, stops or time.monotonic() > next_checkpoint))
            if saves and not RANK:
                next_checkpoint = save_checkpoint(run, log)
            if stops:
                raise KeyboardInterrupt
    if state["last"] is None:  # a random mask: there was nothing to learn
        log("eval", **run.evaluate_and_keep_best())

def learning_rate(step, steps, peak, warmup_steps, hold_steps=0):
    """It rises to the peak in warmup_steps, stays there until hold_steps have passed, if any, and
    falls linearly to 0 at the end of all steps. The hold is the learning-rate rewinding of Prune
    Once For All, which sets the rate back again and again while the sparsity grows."""
    rise = min((step + 1) / (warmup_steps + 1), 1)
    return peak * rise * (1 - max(step - hold_steps, 0) / max(steps - hold_steps, 1))

def prunable(model):
    """The names of the six matrices of each layer: not the embeddings, not the head."""
    return [name for name, module in model.named_modules()
            if name.startswith("layers.") and isinstance(module, nn.Linear)]

def is_trained(name, s):
    """Whether a weight trains: any of a dense model, of a sparse one those of its layers."""
    if not s.trains_weights or name.endswith(".scores"):
        return False
    return s.scores_from is None or name.startswith("layers.")

# ---- What a run leaves on disk --------------------------------------------------------------

RESULTS = ("mask.safetensors", "int8.safetensors", "model/model.safetensors")

def finished_run(flags):
    """The final record of a complete run in flags.out, for --resume; None if there is work to do.
    Raises FileExistsError rather than replace what is there."""
    s, out = settings_of(flags), Path(flags.out)
    log, checkpoint = data.read_log(out / "metrics.jsonl"), out / "checkpoint.safetensors"
    own = (out / "model").resolve()
    if own in (Path(s.model).resolve(), Path(s.teacher or "-").resolve()):
        raise ValueError(f"--out {out}: this run reads the model in it; give another")
    results = ("metrics.jsonl", *RESULTS)
    held = [name for name in results if (out / name).exists()]
    resumable = log or checkpoint.exists()
    if held and not s.overwrite and not (s.resume and resumable):
        resume = "--resume to go on with it, " if resumable else ""
        raise FileExistsError(f"{out}: holds {held[0]} already; give {resume}--overwrite to "
                              "replace it, or another --out")
    if not s.resume or not log:
        return None
    data.compare_settings(out / "metrics.jsonl", log[0], recorded(s))
    if log[-1]["event"] != "final":
        return None
    checkpoint.unlink(missing_ok=True)  # if the run was killed right after its final record
    print(f"{out}: this run is complete, nothing to resume")
    return log[-1]

def begin(run):
    """Goes on from the checkpoint in the run's folder, or else clears what an earlier run left
    there. Returns the log, which in all processes but the first takes no notice."""
    path, checkpoint = run.out / "metrics.jsonl", run.out / "checkpoint.safetensors"
    earlier = data.read_log(path) if run.s.resume else []
    if earlier:
        data.compare_settings(path, earlier[0], recorded(run.s))
    resumes = run.s.resume and checkpoint.exists()
    if resumes:
        load_checkpoint(run, checkpoint)
        print(f"resuming    after step {run.state['step']} of {run.s.steps}")
    elif earlier:
        print("resuming    there is no checkpoint yet: starting over")
    from_first(None)  # all have read what is there
    if RANK:
        return lambda *event, **entry: None
    if not resumes:
        for name in ("checkpoint.safetensors", *RESULTS):
            (run.out / name).unlink(missing_ok=True)
    log = data.Log(path, run.state["logged"])
    if not run.state["logged"]:
        log("settings", **recorded(run.s), torch=torch.__version__)
    return log

def finish(run, log):
    """The last checks. Returns the final record and the masks, as they are on disk."""
    check_frozen(run)
    masks = {}
    if run.layers:
        masks = data.load_masks(run.out / "mask.safetensors")[0]
    kept, total = data.kept_and_total(masks)
    new_bits = total if run.s.rule else 0  # a bit for each prunable weight
    if run.s.trains_weights:
        others = run.n_trained - total  # biases, LayerNorms; of a dense model all the rest
        new_bits += 32 * others + (8 if run.s.int8 else 32) * kept
        if run.s.int8:  # a scale a row
            new_bits += 32 * sum(len(mask) for mask in masks.values())
    best, last = run.state["best"], run.state["last"]
    final = {"metrics": best["metrics"], "best": best, "last": last, "frozen_unchanged": True,
             "kept": kept, "total": total, "new_bits": new_bits}
    log("final", **final)
    log.mark()  # all on disk before the checkpoint goes
    for leftover in run.out.glob("checkpoint.safetensors*"):
        leftover.unlink()
    return final, masks

def check_frozen(run):
    """Raises RuntimeError if a tensor that the method freezes is not the checkpoint's, bit for bit,
    whatever its requires_grad says; or if a zero that was locked is none any more."""
    before = bert.load_pretrained(run.base).state_dict()
    locked = [f"{name}.weight" for name in run.layers if run.s.scores_from == "zeros"]
    for name, tensor in plain_state(run.model).items():
        now, then = tensor.cpu(), before[name]
        moved = not torch.equal(now, then) and not is_trained(name, run.s)
        if moved or (name in locked and now[then == 0].any()):
            raise RuntimeError(f"{run.out}: {name} was to stay {'zero' if not moved else 'frozen'} "
                               "and has changed; do not use what is in this folder")

def plain_state(model):
    """The state dict of a model as if it had no masks."""
    return {name.replace(".dense_weight", ".weight"): tensor
            for name, tensor in model.state_dict().items() if not name.endswith(".scores")}

def fingerprint(model, tokenizer):
    """SHA-256, in hex, of all that a mask belongs to: weights, sizes, vocabulary and its use."""
    tokenizer.no_truncation()  # encode sets it again
    config = {key: value for key, value in vars(model.config).items() if "dropout" not in key}
    words = [sorted(tokenizer.get_vocab().items()), tokenizer.encode("[MASK]").ids]
    if tokenizer.normalizer:  # it lowers case, strips accents, parts Chinese characters, or not
        words.append(tokenizer.normalizer.normalize_str("Café 漢字"))
    weights = {name: tensor.float().cpu() for name, tensor in plain_state(model).items()}
    return data.checksum(json.dumps([config, words]), weights)

def save_result(run, masks):
    """Writes what the task needs beside the base model: the mask, or where weights train, a model
    and the mask in it."""
    s, belongs_to = run.s, run.fingerprint
    name = str(s.model)
    if Path(name).is_dir():
        name = Path(name).resolve().name  # where it lies is of no use to others
    if s.trains_weights:
        weights = {name: layer.dense_weight * layer.mask for name, layer in run.layers.items()}
        name, baked = "model", bake(run.model, weights, run.base)  # the model beside the mask
        save_model(run.out / "model", baked, run.base)
        if s.int8:
            data.save_int8(run.out / "int8.safetensors",
                           {name: smp.to_int8(weight) for name, weight in weights.items()})
        belongs_to = fingerprint(baked, run.tokenizer)  # the model that is shipped with the mask
    if masks:
        local = ("model", "data", "corpus", "out", "teacher", "device")
        settings = {key: value for key, value in recorded(s).items() if key not in local}
        data.save_masks(run.out / "mask.safetensors", masks, {
            "task": s.task, "method": s.method, "base": name, "fingerprint": belongs_to,
            "label_words": run.task.words, "settings": settings, **run.state["best"],
            "kept": {name: int(mask.count_nonzero()) for name, mask in masks.items()}})

def bake(model, weights, base):
    """A Bert with ordinary linears: `model` with the given {name: weight} in its layers."""
    baked = bert.load_pretrained(base)
    baked.load_state_dict(plain_state(model))
    for name, weight in weights.items():
        baked.get_submodule(name).weight.data.copy_(weight)
    return baked

def save_model(folder, model, tokenizer_from):
    """A model folder that --model, --teacher and transformers read, with another's vocabulary."""
    names = (*data.TOKENIZER_FILES, "config.json", "model.safetensors")
    with data.staging(Path(folder), names) as scratch:
        bert.save_pretrained(model, scratch)
        data.copy_tokenizer(tokenizer_from, scratch)

def recorded(s):
    """The settings that decide how a run ends."""
    others = ("overwrite", "resume", "debug", "checkpoint_every", "eval", "predict", "export",
              "sparse")
    return {key: value for key, value in vars(s).items() if key not in others}

def save_checkpoint(run, log):
    """Writes all that the next step depends on: what trains, Adam's moments, lambda. (Masks follow
    from the scores, an epoch's order and a step's dropout from the seed.) Returns the time of the
    next one, such that they take at most 2 % of the time of the run."""
    begun = time.monotonic()
    run.state["logged"] = log.mark()
    tensors = {f"model.{name}": p.detach() for name, p in run.model.named_parameters()
               if p.requires_grad}
    for i, moments in run.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{key}": value for key, value in moments.items()}
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise FloatingPointError("nan or inf in what is being learned: the run has diverged")
    header = {"state": run.state, "settings": recorded(run.s)} | origin(run)
    data.save_checked(run.out / "checkpoint.safetensors", tensors, header)
    now = time.monotonic()
    return now + max(run.s.checkpoint_every, 50 * (now - begun))

def load_checkpoint(run, path):
    """Goes back to where a checkpoint was written. Raises ValueError for one that is damaged, or
    was written with other settings, weights or data."""
    tensors, header = data.load_checked(path)
    data.compare_settings(path, header["settings"], recorded(run.s))
    for what, here in origin(run).items():
        if header.get(what) != here and what in ("weights", "data"):
            place = run.base if what == "weights" else run.s.data
            raise ValueError(f"{path}: written over other {what} than those now in {place}; "
                             "start over with --overwrite")
        if header.get(what) != here:
            print(f"note        {what} {here}, before {header.get(what)}: last digits may differ")
    run.state.update(header["state"])
    parameters, moments = dict(run.model.named_parameters()), {}
    for name, tensor in tensors.items():
        kind, _, name = name.partition(".")
        if kind == "model":
            parameters[name].data.copy_(tensor)
        elif kind == "optimizer":
            i, _, key = name.partition(".")
            moments.setdefault(int(i), {})[key] = tensor
    groups = run.optimizer.state_dict()["param_groups"]
    run.optimizer.load_state_dict({"state": moments, "param_groups": groups})

def origin(run):
    """What a resumed run must find again (weights, data), and what it had better find."""
    digests = [examples.checksum() for examples in (run.train_set, *run.dev_sets.values())]
    return {"weights": run.fingerprint, "data": " ".join(digests),
            "processes": PROCESSES, "threads": torch.get_num_threads(), "torch": torch.__version__,
            "device": torch.device(run.s.device).type}

# ---- Masks at work --------------------------------------------------------------------------

class SparseProduct:
    """A product that skips the zeros of W, for smp.folded. W is held in CSR form (the kept weights
    and their columns, row by row). Where F.linear is faster it is used: for each size of x (power
    of 2) the first eight calls try both in turn."""

    def __init__(self, W):
        with warnings.catch_warnings(action="ignore"):  # "CSR is in beta"
            csr = W.to_sparse_csr()
            indices = csr.crow_indices().int(), csr.col_indices().int()  # half the bytes to read
            self.W = torch.sparse_csr_tensor(*indices, csr.values(), W.shape)
        self.trials = {}  # size of x: [(seconds by size, 0 for sparse or 1 for dense)]

    def __call__(self, x, W, bias):
        trials = self.trials.setdefault(x.numel().bit_length(), [])
        which = len(trials) % 2 if len(trials) < 8 else min(trials)[1]
        start = time.perf_counter()
        y = (self.sparse, nn.functional.linear)[which](x, W, bias)
        if len(trials) < 8:
            trials.append(((time.perf_counter() - start) / x.numel(), which))
        return y

    def sparse(self, x, W, bias):
        columns = x.reshape(-1, W.shape[1]).T.contiguous()  # (in, tokens), to be read row by row
        start = W.new_zeros(len(W), 1) if bias is None else bias[:, None]
        y = torch.addmm(start.expand(-1, columns.shape[1]), self.W, columns).T
        if len(W) <= W.shape[1]:  # else the next product may want `columns` of it, as it lies
            y = y.contiguous()
        return y.reshape(*x.shape[:-1], len(W))

class MaskFile(TaskModel):
    """A mask file, checked, on its task and its base model."""

    def __init__(self, path, flags):
        self.path, self.metadata = path, data.read_metadata(path)
        name = self.metadata["task"]
        settings = self.metadata["settings"]
        if flags.task not in (None, name):
            raise ValueError(f"{path}: a mask for {name}; --task asks for {flags.task}")
        log = data.read_log(Path(path).parent / "metrics.jsonl")  # of its run, if that is here
        folder = self.find_base(flags.model, log)
        given = flags.corpus if name == "mlm" else flags.data
        usual = log[0]["data"] if log else "demo" if name == "demo" else "glue"
        place = given or usual
        length = settings.get("max_length")
        precision = settings.get("precision")
        if precision not in PRECISIONS or type(length) is not int or length < 4:
            raise ValueError(f"{path}: max_length {length!r}, precision {precision!r}; expected 4 "
                             "or more, and fp32 or bf16")
        if flags.sparse:  # there is no sparse product in bf16
            precision = "fp32"
        s = argparse.Namespace(device=flags.device, data=place, max_length=length,
                               precision=precision)
        super().__init__(folder, data.TASKS[name], s)
        self.layers = smp.prune(self.model, prunable(self.model))
        for layer in self.layers.values():
            layer.int8 = settings.get("int8") is True
        shapes = {name: tuple(layer.scores.shape) for name, layer in self.layers.items()}
        self.masks = data.load_masks(path, shapes)[0]
        if self.metadata["fingerprint"] != self.fingerprint:
            raise ValueError(f"{path}: made for another model than {folder}, or for this one "
                             f"before it changed; give {self.metadata['base']} as --model")

    def find_base(self, given, log):
        """--model; or the model that was shipped with the mask; or the one that its run used."""
        base = self.metadata["base"]
        shipped = Path(self.path).parent / "model"
        if base == "model" and shipped.is_dir() and not given:
            return shipped
        if not given and not log:
            raise ValueError(f"{self.path}: made for {base}; say with --model where that is")
        return bert.find_pretrained(given or log[0]["model"])

    def folded(self, sparse=False):
        skips = sparse and torch.device(self.s.device).type == "cpu"
        return smp.folded(self.layers, self.masks, SparseProduct if skips else None)

    def compare_speed(self, split):
        """Prints how many texts a second it answers, dense and sparse in turn, from string to
        logits, and the largest difference of a logit."""
        texts, linear = data.read_split(self.task, self.s.data, split)[0], nn.functional.linear
        for size in (1, 32):
            groups = [texts[i:i + size] for i in range(0, min(len(texts), 23 * size), size)]
            seconds, largest = {True: [], False: []}, 0.0
            with self.folded(sparse=True):
                products = {layer: layer.product for layer in self.layers.values()}
                for group in 8 * groups[:3] + groups:  # 8 calls of the usual sizes: all have chosen
                    self.answer(group)
                for i, group in enumerate(groups):
                    logits = {}
                    for sparse in (True, False) if i % 2 else (False, True):
                        logits[sparse], took = self.timed_answer(group, products if sparse else {})
                        seconds[sparse].append(took)
                    largest = max(largest, np.abs(logits[True] - logits[False]).max())
            trials = [trials for product in products.values() if product is not linear
                      for trials in product.trials.values()]
            skipped = np.mean([min(one)[1] == 0 for one in trials]) if trials else 0.0
            ratio = np.median(np.divide(seconds[False], seconds[True]))
            rates = [size / np.median(seconds[way]) for way in (False, True)]
            print(f"speed       {size:>2} at a time: {rates[0]:.1f} a second dense, {rates[1]:.1f} "
                  f"sparse, {ratio:.2f} times\n            {skipped:.0%} of products skip zeros, "
                  f"logits differ by {largest:.0e}")

    def timed_answer(self, texts, products):
        """(logits, seconds) with the given {layer: product}, other layers being dense."""
        for layer in self.layers.values():
            layer.product = products.get(layer, nn.functional.linear)
        self.answer(texts)  # now what fits into the cache is there
        started = time.perf_counter()
        return self.answer(texts), time.perf_counter() - started

    def answer(self, texts):
        return self.predict(self.encode(texts, None))

def evaluate_masks(flags):
    """--eval: the metrics on dev, {path: metrics}. --export: also the pruned model, as an ordinary
    model folder."""
    results, folder = {}, Path(flags.export or "")
    for path in flags.eval:
        mask = MaskFile(path, flags)
        if flags.export and folder.resolve() == mask.base.resolve():
            raise ValueError(f"--export {folder}: the base of the mask; give another folder")
        file = folder / ("sparse.safetensors" if flags.sparse else "model.safetensors")
        if flags.export and file.exists() and not flags.overwrite:
            raise FileExistsError(f"{folder}: holds a model; give --overwrite, or another one")
        with mask.folded(flags.sparse):
            metrics = results[path] = mask.evaluate(mask.encode_splits(mask.task.dev))
        name, sparsity = mask.metadata["task"], data.sparsity_of(mask.masks)
        print(f"{path}: {name}, sparsity {sparsity:.4f}, {format_metrics(metrics)}")
        before = mask.metadata.get("metrics")
        if flags.sparse and not mask.task.mlm:
            mask.compare_speed(mask.task.dev[0])
        elif not isinstance(before, dict) or any(
                before.get(key) != value for key, value in metrics.items() if key != "score"):
            print("note: its run recorded other numbers; is it other data, device or threads?")
        if flags.export and flags.sparse:
            save_small(folder, mask)
        elif flags.export:
            with mask.folded():
                weights = {name: layer.weight for name, layer in mask.layers.items()}
                save_model(folder, bake(mask.model, weights, mask.base), mask.base)
            print(f"{path} -> {folder}/: {mask.base} with zeros where the mask has them")
            if mask.metadata["settings"].get("int8"):
                print("note        its weights are the rounded ones; their inputs are rounded "
                      "here, not there")
    return results

def save_small(folder, mask):
    """Writes a pruned model as small as it is: sparse.safetensors, config.json, vocabulary."""
    state, scales = plain_state(mask.model), {}
    with mask.folded():
        for name, layer in mask.layers.items():
            state[f"{name}.weight"] = layer.weight
            if layer.int8:
                scales[f"{name}.weight"] = smp.to_int8(layer.dense_weight)[1]
    names = (*data.TOKENIZER_FILES, "config.json", "sparse.safetensors")
    metadata = {"task": mask.metadata["task"], "int8": json.dumps(bool(scales)),
                "label_words": json.dumps(mask.metadata["label_words"])}
    with data.staging(folder, names) as scratch:
        bert.save_config(mask.model, scratch)
        data.copy_tokenizer(mask.base, scratch)
        data.save_sparse(scratch / "sparse.safetensors", state, scales, metadata)
    sizes = [sum(4 * tensor.numel() for tensor in state.values()),
             (folder / "sparse.safetensors").stat().st_size]
    print(f"{mask.path} -> {folder}/: {sizes[1] / 1e6:.1f} MB, dense in float32 "
          f"{sizes[0] / 1e6:.1f} MB; train.load_small reads it")

def load_small(folder):
    """What --export --sparse wrote -> (model, tokenizer, label words), the zeros of the model
    skipped where that is faster. Raises FileNotFoundError, and ValueError for what is damaged."""
    path = Path(folder) / "sparse.safetensors"
    config = bert.read_config(path.with_name("config.json"))
    state, metadata = data.load_sparse(path)
    with data.reading(path, "a small model that fits its config.json"):
        with torch.device("meta"):
            model = bert.Bert(config, mlm_head=any(name.startswith("mlm.") for name in state))
        model.load_state_dict(state, assign=True)
        words, int8 = json.loads(metadata["label_words"]), json.loads(metadata["int8"])
    for layer in smp.prune(model.eval(), prunable(model)).values():
        layer.folded_weight, layer.int8 = layer.dense_weight.detach(), int8 is True
        layer.product = SparseProduct(layer.folded_weight)
    return model, data.load_tokenizer(folder), words

def predict_masks(flags):
    """--predict: GLUE's submission files, and of several masks the zip. All is computed before the
    first file is written."""
    out, found = Path(flags.out or "predictions"), {}
    for path in flags.predict:
        mask = MaskFile(path, flags)
        if mask.task.mlm:
            raise ValueError(f"{path}: a mask for mlm; a language model has no labels to predict")
        for split, examples in mask.encode_splits(mask.task.test).items():
            file = out / data.prediction_name(mask.task, split)
            if file in found:
                raise ValueError(f"{path}: a second mask for {mask.metadata['task']}; GLUE takes "
                                 "one file a task")
            if file.exists() and not flags.overwrite:
                raise FileExistsError(f"{file}: exists; give --overwrite, or another --out")
            with mask.folded(flags.sparse):
                found[file] = path, mask.task, mask.predict(examples)
            if flags.sparse:
                mask.compare_speed(split)
    for file, (path, task, logits) in found.items():
        data.write_predictions(file, task, logits)
        print(f"{path} -> {file} ({len(logits):,} lines)")
    if len(flags.predict) > 1:
        print(f"all of them -> {data.zip_predictions(list(found))}, as the GLUE site takes it")

# ---- What a person sees ---------------------------------------------------------------------

def format_metrics(metrics):
    """Metrics in words; "score" only where it is none of the others."""
    others = [value for name, value in metrics.items() if name != "score"]
    says_more = metrics["score"] not in others and "perplexity" not in metrics
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()
                     if name != "score" or says_more)

def show_progress(bar, run, loss):
    sparsity = data.sparsity_of(run.masks())
    bar.set_postfix_str(f"loss {loss:.3f}  sparsity {sparsity:.3f}", refresh=False)
    bar.update(run.state["step"] - bar.n)

def introduce(run):
    """What this run is, before its first step."""
    given = {key: x for key, x in recorded(run.s).items() if x is not None and x is not False}
    settings = " ".join(f"{key}={value}" for key, value in given.items())
    print(textwrap.fill(f"settings    {settings}", 100, subsequent_indent=" " * 12,
                        break_long_words=False, break_on_hyphens=False))
    text = run.tokenizer.decode(run.train_set.ids[0], skip_special_tokens=False)
    asked, at = ("all words", "the token") if run.task.mlm else ("label words", "[CLS]")
    answer = "the words that are hidden" if run.task.mlm else run.train_set.labels[0]
    if run.task.labels:
        answer = run.task.words[answer]
    print(f"example     {data.printable(text)} -> {answer}")
    head = f"dot product of {at} and their embeddings (the model has no MLM head)"
    if run.model.mlm:
        head = "the MLM transform and their rows of the decoder"
    print(f"head        {asked}: {head}")
    scores = sum(x.numel() for x in run.scores)
    weights = sum(p.numel() for p in run.model.parameters()) - scores
    frozen = weights - run.n_trained
    has_scores = f", {scores:,} scores, one for each prunable weight" if run.s.rule else ""
    print(f"parameters  {frozen:,} frozen, {run.n_trained:,} trained{has_scores}")
    if run.s.rule == "threshold":
        print(f"note        the rule sets no sparsity: sigmoid(S) > {run.s.tau:g} decides")

def report(run, final, masks):
    best, last = final["best"], final["last"]
    mask = run.out / "mask.safetensors"
    files, cost = [f"{run.out}/metrics.jsonl"], []
    print()
    if masks:
        print(data.density_table(masks))
        sparsity = 1 - final["kept"] / final["total"]
        print(f"\nkept {final['kept']:,} of {final['total']:,} weights: sparsity {sparsity:.6f}")
        files.append(f"{mask} ({mask.stat().st_size:,} bytes)")
    if run.s.rule:
        cost.append("one bit for each prunable weight")
    if run.s.trains_weights and run.s.int8:
        cost.append("8 for each weight that is kept, 32 for each row's scale, bias and LayerNorm")
    elif run.s.trains_weights:
        cost.append("32 for each weight that is kept, each bias and LayerNorm")
    if run.s.trains_weights:
        files.append(f"{run.out}/model/")
    print(f"last   epoch {last['epoch']:<5.4g} {format_metrics(last['metrics'])}")
    by = "chosen on dev itself, so a little flattering"
    if run.s.holdout:
        by = f"chosen on {run.s.holdout:.0%} of train, held out"
    print(f"best   epoch {best['epoch']:<5.4g} {format_metrics(best['metrics'])}   <- saved; {by}")
    print("frozen tensors: every one bit-identical to the checkpoint")
    if run.s.scores_from == "zeros":
        print("locked zeros: every one still zero")
    print(f"new parameters for this task: {final['new_bits']:,} bits, "
          f"{final['new_bits'] / 8e6:.2f} MB ({', '.join(cost)})")
    print(f"{final['seconds']:.0f} s, {final['peak_mb']:,} MB at most;", ", ".join(files))

# ---- The demo: a BERT of our own, and the lesson in one table -------------------------------

def prepare_demo(folder):
    """Writes the made-up task and pre-trains a tiny BERT on its language, unless both are there."""
    files = ("model/model.safetensors", "DEMO/train.tsv", "DEMO/dev.tsv")
    if from_first(not all((folder / name).is_file() for name in files)):
        print(f"demo        first run: making up a language in {folder}/, pre-training on it")
        if not RANK:
            data.write_demo(folder)
            write_random_model(folder)
        pretrain(folder)

def write_random_model(folder):
    tokenizer = data.load_tokenizer(folder)
    torch.manual_seed(0)
    model = bert.Bert(bert.Config(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=256, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=1024, max_position_embeddings=128))
    save_model(folder / "random", model, folder)

def pretrain(folder):
    """folder/random -> folder/model, by the task mlm on folder/corpus.txt."""
    from_first(None)  # it has written them
    flags = ["--task=mlm", "--mlm-rate=0.3", "--mlm-cls", f"--corpus={folder}/corpus.txt",
             "--method=finetune", f"--model={folder}/random", f"--out={folder}", "--resume",
             "--epochs=2", "--batch-size=64", "--weight-lr=4e-4", "--dropout=0"]
    train_silently(parse_flags(flags))

def train_silently(flags):
    flags.seed = 0
    with contextlib.redirect_stdout(io.StringIO()):
        return finished_run(flags) or train(flags)

def compare(flags, learned):
    """Prints what the learned mask is worth, beside other things to do with the same weights."""
    s = settings_of(flags)
    frozen = TaskModel(bert.find_pretrained(s.model), data.TASKS[s.task], s)
    dev = frozen.encode_splits(frozen.task.dev)

    def accuracy():
        return frozen.evaluate(dev)["accuracy"]

    labels = dev["dev"].labels
    rows = {"chance: always the commoner label": max(np.bincount(labels)) / len(labels),
            "the frozen model, nothing pruned": accuracy()}
    torch.manual_seed(s.seed[0])
    layers = smp.prune(frozen.model, prunable(frozen.model))
    sparsity = 1 - learned["kept"] / learned["total"]
    for name, scores_of in {"random": torch.rand_like, "magnitude": torch.abs}.items():
        for layer in layers.values():
            layer.scores.data = scores_of(layer.dense_weight)
        smp.choose_masks(layers, sparsity, "smp-l")
        rows[f"a {name} mask, untrained"] = accuracy()
    rows["the learned mask"] = learned["last"]["metrics"]["accuracy"]
    # The same for every mask: trained once and kept.
    out = f"{s.data}/dense-{s.precision}-{s.max_length}-{frozen.fingerprint[:8]}"
    flags = parse_flags(["--method=finetune", "--epochs=2", "--weight-lr=5e-4"])
    for name in ("data", "model", "device", "precision", "max_length"):
        setattr(flags, name, getattr(s, name))
    flags.resume, flags.out = True, out
    dense = train_silently(flags)
    rows["dense fine-tuning, every weight trained"] = dense["last"]["metrics"]["accuracy"]
    print(f"\naccuracy on dev; the three masks remove {sparsity:.0%} of the weights, change none")
    for what, value in rows.items():
        bar = "█" * round(30 * value)
        print(f"  {what:<40} {value:.3f}  {bar}")
    if rows["the learned mask"] > rows["a magnitude mask, untrained"]:
        print("\nThe frozen weights already hold a classifier; it is hidden among the others. "
              "Neither chance nor\nsize finds it. Asking the task of each weight \"stay or go?\", "
              "and nothing else, does.")

# ---- Defaults, flags, main ------------------------------------------------------------------

PRECISIONS = ("fp32", "bf16")

def settings_of(flags, n=None, positions=512):
    """All settings of a run: the flags that were given, and a default for every other one. What
    depends on n, the number of training examples, is left out while n is not known. The epochs and
    batch sizes are the published ones; `positions` is the longest input of the model."""
    s = argparse.Namespace(**vars(flags))

    def default(**values):
        for name, value in values.items():
            if getattr(s, name, None) is None:
                setattr(s, name, value)

    default(task="demo", method="smp-s", seed=[0], checkpoint_every=60.0)
    demo = s.task == "demo"
    if demo and not (s.out or s.resume):
        s.overwrite = True  # a demo is there to be run again
    mlm = s.task == "mlm"
    default(data="demo" if demo else s.corpus or "glue", max_length=min(128, positions),
            precision="bf16" if s.device.startswith("cuda") else "fp32")
    default(model=f"{s.data}/model" if demo else "bert-base-uncased")

    s.scores_from, s.rule, weights = METHODS[s.method]
    s.trains_weights = weights == "trained"
    default(sparsity=0.0 if s.rule in (None, "threshold") else 0.9, ramp=0.5 if s.rule else 0.0)
    keeps_most = s.sparsity <= 0.5 and s.rule != "threshold"
    # A network that keeps half of its weights can overfit by its choice; one with a tenth cannot.
    if demo and s.trains_weights:  # what is trained on a made-up language need not generalise far
        default(dropout=0.0)
    default(dropout=0.1 if s.trains_weights or s.paper else 0.2 if keeps_most else 0.0)
    if s.scores_from == "learned":
        default(lr=2e-2, init="zero" if demo or s.paper else "magnitude")
        if s.lam is None and s.pull is None:
            if s.paper:
                default(lam=400.0)
            else:
                default(pull=0.2 if demo else 1.0)
    else:
        default(init=s.scores_from if s.rule else "zero", lam=0.0)
    if s.trains_weights:
        default(weight_lr=1e-3 if demo else 1e-4 if s.method == "lock" else 5e-5 if mlm else 3e-5)
    if mlm:
        default(mlm_rate=0.15)
    if s.teacher:
        default(temperature=2.0, teacher_weight=0.5)
    if s.rule == "threshold":
        default(tau=0.1)
    if n is None:
        return s

    large = n > 10_000
    default(epochs=3 if demo or mlm else 12 if large else 60 if n >= 3_000 else 100)
    s.epochs = 0 if s.scores_from == "random" else s.epochs
    if s.batch_size is None:
        s.batch_size = 64 if large else 32
        # A step moves a score by about lr, whatever the batch: 1,500 steps at least, if possible.
        if not (demo or mlm or s.paper or keeps_most):
            while s.batch_size > 16 and s.epochs * n < 1500 * s.batch_size:
                s.batch_size //= 2
    s.epoch_steps = math.ceil(n / s.batch_size)
    s.steps = s.epochs * s.epoch_steps
    s.ramp_steps = round(s.ramp * s.steps)
    s.hold_steps = s.ramp_steps if mlm and s.method == "magnitude" else 0
    default(eval_every=s.epoch_steps)
    return s

def useless_flags(flags):
    """Yields (flags, why) for those that would have no effect in this mode or with this method."""
    if flags.eval or flags.predict:
        useful = "task model data corpus device debug overwrite sparse "
        useful += "eval export" if flags.eval else "predict out"
        yield set(vars(flags)).difference(useful.split()), "a mask brings its settings"
    if len(flags.eval or ()) != 1:
        yield ["export"], "it needs --eval with one mask"
    if flags.resume:
        yield ["overwrite"], "--resume goes on with what is there"
    if flags.lam is not None:
        yield ["pull"], "--lambda sets the strength"
    if flags.eval or flags.predict:
        return
    s = settings_of(flags)
    yield ["sparse"], "it is for --eval and --predict"
    if s.task != "mlm":
        yield ["corpus", "mlm_rate", "mlm_cls"], "they are for --task mlm"
    else:
        yield ["data", "holdout"], "the texts are in --corpus, and its last 5 % are held out"
    if s.scores_from != "learned":
        learning = "lr init lam pull paper"
        yield learning.split(), f"--method {s.method} learns no scores"
    if s.scores_from is None:
        yield ["sparsity", "ramp"], f"--method {s.method} removes nothing"
    if s.scores_from == "zeros":
        yield ["sparsity", "ramp"], f"--method {s.method} keeps the zeros of the model"
    if s.scores_from == "random":
        learning = "epochs batch_size eval_every ramp dropout teacher checkpoint_every holdout"
        yield learning.split(), f"--method {s.method} learns nothing"
    if s.rule == "threshold":
        yield ["sparsity"], f"--method {s.method} keeps what is above tau, lambda steers it"
    else:
        yield ["tau"], f"--method {s.method} has no threshold"
    if not s.trains_weights:
        yield ["weight_lr"], f"--method {s.method} keeps the weights frozen"
    if not s.teacher:
        yield ["temperature", "teacher_weight"], "there is no --teacher"
    elif data.TASKS[s.task].regression:
        yield ["temperature"], f"{s.task} is a regression"

class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the page of usage
        line = f"error: {data.printable(message)}; see python train.py --help\n"
        self.exit(2, "" if RANK else line)

def number(low, high=math.inf, kind=float):
    """The argparse settings of a finite number from low to high."""
    def parse(string):
        with contextlib.suppress(ValueError):
            value = kind(string)
            if low <= value <= high and math.isfinite(value):
                return value
        bounds = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        word = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{string!r} is not a {word} {bounds}")

    return {"type": parse, "metavar": "N"}

def device(string):
    """An argparse type: the name of a device that works on this machine."""
    try:
        torch.zeros(1, dtype=torch.float64, device=string).item()  # smp counts shares in float64
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"no device {string!r} here ({reason})") from None
    return string

YES, TEXT, TEXTS = {"action": "store_true"}, {"metavar": "X"}, {"metavar": "X", "nargs": "+"}
WHOLE, POSITIVE, SHARE = number(1, kind=int), number(0), number(0, 1)
SEEDS = number(0, 2**32 - 1, int) | {"nargs": "+"}
FLAGS = {  # group: flag, kind, what it does. The defaults are decided in settings_of.
    "what": [
        ("--task", {"choices": data.TASKS}, "a GLUE task, or demo, which needs no data (default)"),
        ("--method", {"choices": METHODS}, "see the README's table (default: smp-s)"),
        ("--sparsity", number(0, 0.9999), "fraction of the weights to REMOVE (default: 0.9)"),
        ("--model", TEXT, "model folder, or name on the hub (default: bert-base-uncased)"),
        ("--teacher", TEXT, "a fine-tuned model to distil from"),
        ("--corpus", TEXT, "for --task mlm: a text file, a text a line; 5 %% are held out"),
    ],
    "where": [
        ("--data", TEXT, "folder of GLUE's task folders, fetched if missing (default: glue)"),
        ("--out", TEXT, "folder of the run (default: runs/TASK-METHOD-SPARSITY-sSEED)"),
        ("--overwrite", YES, "replace what is there"),
        ("--resume", YES, "go on with an interrupted run"),
        ("--checkpoint-every", POSITIVE, "seconds; more if it took over 2 %% (default: 60)"),
    ],
    "masks at work, in place of training": [
        ("--eval", TEXTS, "evaluate these mask files on dev"),
        ("--predict", TEXTS, "write GLUE's submission files to --out (default: predictions)"),
        ("--export", TEXT, "with --eval MASK: write the pruned model to this folder"),
        ("--sparse", YES, "skip the zeros, on a CPU; what is exported is small"),
    ],
    "how long": [
        ("--epochs", WHOLE, "default: 12; to 10,000 examples 60, below 3,000 100; demo, mlm 3"),
        ("--batch-size", WHOLE, "default: 64 above 10,000 examples, else 32; less in short runs"),
        ("--limit", WHOLE, "use only the first N training examples"),
        ("--holdout", number(0, 0.9), "share of train to choose the best by, in place of dev"),
        ("--eval-every", WHOLE, "steps between evaluations (default: an epoch)"),
    ],
    "the method": [
        ("--lr", POSITIVE, "learning rate of the scores, falling to 0 (default: 2e-2)"),
        ("--weight-lr", POSITIVE, "of the weights (default: 3e-5; lock 1e-4, mlm 5e-5, demo 1e-3)"),
        ("--pull", POSITIVE, "of the regulariser, in task gradients (default: 1; demo: 0.2)"),
        ("--lambda", POSITIVE, "of the regulariser, instead of --pull; the paper's is 400"),
        ("--ramp", SHARE, "share of the steps in which the sparsity grows (default: 0.5)"),
        ("--init", {"choices": ["zero", "magnitude"]}, "of scores (default: magnitude; demo zero)"),
        ("--dropout", SHARE, "default: 0.1 if weights train (demo 0), 0.2 if half stay, else 0"),
        ("--paper", YES, "published --init zero --lambda 400 --dropout 0.1, and batch sizes"),
        ("--tau", SHARE, "the threshold rule keeps where sigmoid(S) > tau (default: 0.1)"),
        ("--temperature", number(1e-3), "of the distillation (default: 2)"),
        ("--teacher-weight", SHARE, "of the distillation, against the task's (default: 0.5)"),
        ("--int8", YES, "linear layers of the encoder in 8 bits (simulated)"),
        ("--mlm-rate", SHARE, "share of the words that mlm asks for (default: 0.15)"),
        ("--mlm-cls", YES, "mlm also asks [CLS] for a word of its text"),
        ("--max-length", number(4, kind=int), "longest input, in tokens (default: 128)"),
    ],
    "the machine": [
        ("--seed", SEEDS, "several make as many runs, and their mean (default: 0)"),
        ("--device", {"type": device}, "default: cuda where there is one, else cpu"),
        ("--precision", {"choices": PRECISIONS}, "of products (default: bf16 on cuda, else fp32)"),
        ("--debug", YES, "show the traceback of an error"),
    ],
}

def parse_flags(argv):
    """The command line -> flags, None where not given. Refuses what contradicts itself, and what
    would have no effect."""
    p = Parser(prog="train.py", description=__doc__.partition("\n")[0], allow_abbrev=False)
    for title, flags in FLAGS.items():
        group = p.add_argument_group(title)
        for flag, kind, does in flags:
            group.add_argument(flag, help=does, **kind)
    flags = p.parse_args(argv)
    flags.lam = vars(flags).pop("lambda")  # no name in Python
    given = {name for name, x in vars(flags).items() if x is not None and x is not False}
    flags.device = flags.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if flags.device == "cuda" and PROCESSES > 1:
        flags.device = f"cuda:{os.environ['LOCAL_RANK']}"
    for names, why in useless_flags(flags):
        for name in given.intersection(names):
            p.error(f"{flag_of(name)} has no effect here: {why}")
    if PROCESSES > 1 and (flags.eval or flags.predict):
        p.error("--eval and --predict run in one process, without torchrun")
    if flags.task == "mlm" and not (flags.corpus or flags.eval or flags.predict):
        p.error("--task mlm needs --corpus FILE")
    if len(set(flags.seed or ())) < len(flags.seed or ()):
        p.error("--seed: the same seed twice")
    return flags

def flag_of(name):
    return "--lambda" if name == "lam" else "--" + name.replace("_", "-")

def run_seeds(flags):
    """A run for each seed. Returns the final record, or of several the mean and spread of their
    metrics. What to report is the mean of `last`: `best` was chosen on dev itself."""
    s = settings_of(flags)
    parts = [s.task, s.method, f"{s.sparsity:g}" if s.sparsity else "", "int8" if s.int8 else ""]
    out = s.out or "runs/" + "-".join(filter(None, parts))
    each, alone = [], s.out and len(s.seed) == 1
    for seed in s.seed:
        own = {"seed": seed, "out": out if alone else f"{out}-s{seed}", "overwrite": s.overwrite}
        each.append(argparse.Namespace(**vars(flags) | own))
    finals = [finished_run(one) for one in each]  # refuses a folder before the first run
    finals = [final or train(one) for final, one in zip(finals, each, strict=True)]
    if len(finals) == 1:
        return finals[0]
    together = {"seeds": s.seed, "n": len(finals)}
    print(f"\n{len(finals)} seeds, mean ± sample standard deviation")
    for which, name in itertools.product(("best", "last"), finals[0]["metrics"]):
        if name == "score":
            continue
        values = [final[which]["metrics"][name] for final in finals]
        mean = np.mean(values).item()
        std = np.std(values, ddof=1).item()
        key = f"{which}_{name}"
        together |= {key: values, f"{key}_mean": mean, f"{key}_std": std}
        print(f"  {which} {name:<11} {mean:.4f} ± {std:.4f}")
    print(json.dumps(together))
    return together

def run_command(flags):
    started, s = time.monotonic(), settings_of(flags)
    if flags.eval:
        return evaluate_masks(flags)
    if flags.predict:
        return predict_masks(flags)
    if s.task == "demo":
        prepare_demo(Path(s.data))
    final = run_seeds(flags)
    shows_lesson = s.task == "demo" and s.rule and not s.trains_weights
    if shows_lesson and len(s.seed) == 1:
        compare(flags, final)
        seconds, memory = time.monotonic() - started, data.peak_mb(s.device)
        print(f"\n{seconds:.0f} s in all, {memory:,.0f} MB of memory at most")
    return final

def main(argv=None):
    """Runs the command line; returns the final record. Bad input, from flag to file, ends in one
    line on stderr and exit code 2; ctrl-C in exit code 130."""
    with contextlib.redirect_stdout(data.Unbreakable(sys.stdout)), \
            contextlib.redirect_stderr(data.Unbreakable(sys.stderr)):
        flags = parse_flags(argv)
        try:
            with joined(flags.device):
                return run_command(flags)
        except KeyboardInterrupt:
            if not RANK:
                print("\ninterrupted; with --resume the same command goes on from a checkpoint, if "
                      "any", file=sys.stderr)
            raise SystemExit(130) from None
        except (ValueError, OSError, ArithmeticError, RuntimeError, MemoryError,
                SafetensorError) as error:
            if flags.debug:
                raise
            # A disk that is full says so without saying where.
            nameless = isinstance(error, SafetensorError) or getattr(error, "errno", 0) == 28
            where = f"{flags.out or 'runs'}: " if nameless else ""
            if RANK:  # if the first one fails too it says why, and torchrun ends the others
                time.sleep(2)
            who = f"process {RANK} of {PROCESSES}: " if PROCESSES > 1 else ""
            print(f"error: {who}{where}{data.printable(error)}", file=sys.stderr)
            raise SystemExit(2) from None

if __name__ == "__main__":
    main()
