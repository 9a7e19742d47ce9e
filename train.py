"""Prune a pre-trained BERT for a GLUE task while its weights stay frozen: the program.

    python train.py --task mrpc --sparsity 0.9

The methods and the loop stand first. What they call follows: a model and what a task asks of it, a
run, what it leaves on disk, masks at work, the report, the demo, flags and main; several processes
(RANK, by_first, add_up) come last. The equations are in smp.py, the network in bert.py, the data in
data.py. `s` is always settings: a run's, from settings_of, or those a mask was made with.
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
from torch import nn

import bert
import data
import smp
from data import expect

# A method is three choices: where the scores come from (or the mask), the rule that says how many
# weights of a matrix stay (smp.RULES), and whether the weights train too.
METHODS = {
    "smp-s":         ("learned",   "smp-s",     "frozen"),
    "smp-l":         ("learned",   "smp-l",     "frozen"),
    "global":        ("learned",   "global",    "frozen"),
    "threshold":     ("learned",   "threshold", "frozen"),
    "2:4":           ("learned",   "2:4",       "frozen"),
    "random":        ("random",    "smp-l",     "frozen"),
    "magnitude":     ("magnitude", "smp-l",     "trained"),
    "movement":      ("learned",   "smp-l",     "trained"),
    "soft-movement": ("learned",   "threshold", "trained"),
    "lock":          ("zeros",     None,        "trained"),  # the mask is the model's own zeros
    "finetune":      (None,        None,        "trained"),  # dense
}

DIVERGED = "nan or inf in what is being learned: the run has diverged"
THREADS = torch.get_num_threads()  # before a TaskModel sets it

# ---- The method: one step, and the loop around it -------------------------------------------

def train_step(run, batch):
    """One step of the method. Returns the loss before it, a scalar tensor."""
    s = run.s
    run.choose_masks()  # by the rule of the method, at this step's sparsity
    batch, share = part_of(batch)  # with one process all of it, and 1
    batch = run.on_device(batch)
    run.model.train()
    torch.manual_seed(data.seed_of(s.seed, run.step, RANK + 1))  # a resumed run draws the same

    logits = run.logits(batch)  # each layer uses W' = W * M
    taught = run.teacher_logits(batch)
    loss = share * smp.objective(logits, batch["labels"], taught, s.temperature, s.teacher_weight)
    loss.backward()  # now scores.grad is dL/dW' * W
    loss = loss.detach()
    add_up([loss, *(p.grad for p in run.learned if p.grad is not None)])  # over processes

    if s.scores_from == "learned":
        run.measure_lambda()
        growth = smp.sparsity_at(run.step, s.steps, 1.0)  # from 0 to 1, over all steps
        smp.add_regularizer_gradient(run.scores, run.lam * growth)

    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.step, s.steps, group["peak"], group["warmup"], s.hold_steps)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.step += 1
    return loss

def train(run):
    """All steps that are still to do. Ctrl-C lets a step end and writes a checkpoint."""
    s = run.s
    with data.progress_bar(s.method, s.steps, run.step) as bar:
        for batch in run.batches():
            loss = train_step(run, batch)
            evaluates = run.step % s.eval_every == 0 or run.step == s.steps
            if evaluates or run.step % 20 == 0:  # seldom: reading a loss waits for a GPU
                run.watch(loss, bar)
            if evaluates:
                run.evaluate_and_keep_best(loss.item(), bar)
            run.save_checkpoint_if_due()
        if not s.steps:  # a random mask: there was nothing to learn
            run.evaluate_and_keep_best(None, bar)

def learning_rate(step, steps, peak, warmup_steps, hold_steps=0):
    """The peak, times a rise over warmup_steps, times a linear fall from hold_steps on, to 0 at the
    end. The hold stands for the learning-rate rewinding of Prune Once For All, which sets the rate
    back again and again while the sparsity grows."""
    rise = min((step + 1) / (warmup_steps + 1), 1)
    return peak * rise * (1 - max(step - hold_steps, 0) / max(steps - hold_steps, 1))

# ---- A model, and what a task asks of it ----------------------------------------------------

class TaskModel:
    """A BERT from a folder or the hub, for the task of s. It asks for a word at a batch's
    `places`: at each [CLS], or in mlm where words are hidden."""

    def __init__(self, name, s, is_teacher=False):
        self.base = folder = bert.find_pretrained(name)
        self.s, self.task = s, data.TASKS[s.task]
        self.model = bert.load_pretrained(folder, classifier=is_teacher and not self.task.mlm)
        self.tokenizer = data.load_tokenizer(folder)
        tokens = max(self.tokenizer.get_vocab().values()) + 1
        rows = self.model.config.vocab_size
        expect(tokens <= rows, f"{folder}: tokenizer.json or vocab.txt has {tokens} tokens, the "
               f"embedding {rows} rows; they are not of one model")
        expect(len(self.task.text) < 2 or self.model.config.type_vocab_size != 1,
               f"{folder}/config.json: type_vocab_size is 1; the pairs of {s.task} need 2 segments")
        self.positions = self.model.config.max_position_embeddings
        if s.max_length is LATER:  # LATER: it waits for the model
            self.s = s = settings_of(s.given, self.positions)
        expect(4 <= s.max_length <= self.positions,
               f"{folder}: it has {self.positions} positions, not {s.max_length}")
        # In a small model's many small products threads mostly wait for each other.
        if s.device == "cpu" and "OMP_NUM_THREADS" not in os.environ and not is_teacher:
            is_small = sum(p.numel() for p in self.model.parameters()) < 5e6
            torch.set_num_threads(1 if is_small else THREADS)
        self.fingerprint = fingerprint(self.model, self.tokenizer)
        self.model.to(s.device)
        self.asks = (Words if self.task.mlm else Labels)(self)  # what differs by kind of task

    def examples(self, *splits):
        """{split: examples} of files of the task."""
        return {split: self.asks.encode(*self.asks.read(split)) for split in splits}

    def on_device(self, batch):
        """A copy where the model is, from pinned memory, so that the host need not wait for it."""
        device = self.s.device
        if device.startswith("cuda"):
            batch = {key: x if x is None else x.pin_memory() for key, x in batch.items()}
        return {key: x if x is None else x.to(device, non_blocking=True)
                for key, x in batch.items()}

    def logits(self, batch):
        """A batch on the device -> logits (K, words) at its K places, float32."""
        names = ("input_ids", "attention_mask", "token_type_ids")
        device_type, bf16 = torch.device(self.s.device).type, self.s.precision == "bf16"
        # To train in bf16 on a CPU, attention in one kernel takes 4 times as long as in several.
        in_several = bf16 and device_type == "cpu" and self.model.training
        torch.backends.cuda.enable_flash_sdp(not in_several)  # rules the CPU's too
        with torch.autocast(device_type, torch.bfloat16, enabled=bf16):
            hidden = self.model(*[batch[name] for name in names])
            hidden = hidden.flatten(0, 1)[batch["places"]]
        # bf16 rounds logits too coarsely; but float32 takes too long for those of a vocabulary.
        with torch.autocast(device_type, torch.bfloat16, enabled=bf16 and self.task.mlm):
            head = self.model.classifier or self.model.mlm_logits
            return head(hidden.float(), self.asks.words).float()  # of a classifier: its classes

    @torch.inference_mode()
    def answers(self, batches):
        """Yields (batch, logits), without dropout. Several processes share the batches out."""
        self.model.eval()
        for batch in itertools.islice(batches, RANK, None, PROCESSES):
            batch = self.on_device(batch)
            yield batch, self.logits(batch)

class Labels:
    """What a task with labels asks: at each [CLS] for a label word (of a classifier, a class)."""

    def __init__(self, owner):
        self.owner, self.task, self.tokenizer, self.s = owner, owner.task, owner.tokenizer, owner.s
        if owner.model.classifier:
            n = owner.model.classifier.classes.out_features
            words = data.class_order(owner.base, self.task, n)
        else:
            source = self.s.task + "/task.json" * (self.s.task not in data.BUILT_IN)  # for errors
            words = data.label_ids(self.tokenizer, self.task.words, source)
        self.words = words.to(self.s.device)

    def read(self, split, limit=None):
        return data.read_split(self.task, self.s.data, split, limit)

    def encode(self, texts, labels):
        return data.encode(self.tokenizer, texts, labels, self.s.max_length)

    def ask(self, batch, generator):  # a training batch -> one with places and labels; it has them
        return batch

    def predict(self, examples):
        """N examples -> logits (N, C), in their order."""
        found = torch.zeros(len(examples), len(self.words))
        for batch, logits in self.owner.answers(data.batches(examples, 128)):
            found[batch["index"].cpu()] = logits.cpu()
        add_up([found])
        expect(found.isfinite().all(), DIVERGED, FloatingPointError)
        return found.numpy()

    def evaluate(self, dev_sets):
        """{metric: value}; those of MNLI's second dev set begin with "mismatched_", those of
        --holdout with "holdout_". "score", by which the best evaluation is chosen, is the mean
        of the "holdout_" ones, if there are any, else of all."""
        metrics, prefixes = {}, {"dev_mismatched": "mismatched_", "holdout": "holdout_"}
        for split, examples in dev_sets.items():
            logits = self.predict(examples)
            for name, value in data.evaluate_metrics(self.task, logits, examples.labels).items():
                metrics[prefixes.get(split, "") + name] = value
        held_out = [value for name, value in metrics.items() if name.startswith("holdout_")]
        return metrics | {"score": np.mean(held_out or list(metrics.values())).item()}

    def listen(self, teacher, texts):
        """A function: a batch -> the teacher's logits. Without dropout they never change, so the
        teacher reads the texts once, in its own vocabulary."""
        known = teacher.asks.predict(teacher.asks.encode(texts, None))
        known = torch.from_numpy(known).to(self.s.device)
        return lambda batch: known[batch["index"]]

class Words:
    """What masked language modelling asks: any word, where words are hidden. Used as Labels is, but
    not to predict."""

    def __init__(self, owner):
        self.owner, self.tokenizer, self.s = owner, owner.tokenizer, owner.s
        self.words, self.corpus = slice(None), None
        expect(self.tokenizer.token_to_id("[MASK]") is not None,
               "the model's vocabulary has no [MASK]; --task mlm needs one")

    def read(self, split, limit=None):
        expect(self.s.corpus, "--task mlm needs --corpus FILE")
        self.corpus = self.corpus or data.read_corpus(Path(self.s.corpus))
        return self.corpus[split][:limit], None

    def encode(self, texts, _):
        return data.encode_corpus(self.tokenizer, texts, self.s.max_length)

    def ask(self, batch, generator):
        s = self.s
        return data.hide_words(batch, self.tokenizer, generator, s.mlm_rate, s.mlm_cls,
                               everywhere=bool(s.teacher))  # a teacher is heard there

    def evaluate(self, dev_sets):
        """Metrics, always of the same 15 % of the words. "score" is 1 / perplexity."""
        generator = torch.Generator().manual_seed(0)
        batches = (data.hide_words(batch, self.tokenizer, generator)
                   for batch in data.batches(dev_sets["dev"], 32))
        sums = torch.zeros(3, dtype=torch.float64)
        for batch, logits in self.owner.answers(batches):
            labels = batch["labels"]
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            hits = (logits.argmax(1) == labels).sum()
            sums += torch.tensor([hits.item(), loss.item(), len(labels)])
        add_up([sums])
        hits, loss, n = sums.tolist()
        expect(math.isfinite(loss), DIVERGED, FloatingPointError)
        return {"accuracy": hits / n, "perplexity": math.exp(min(loss / n, 700)),
                "score": math.exp(-loss / n)}

    def listen(self, teacher, texts):
        same_words = teacher.tokenizer.get_vocab() == self.tokenizer.get_vocab()
        same_head = bool(teacher.model.mlm) == bool(self.owner.model.mlm)
        expect(same_words and same_head, f"--teacher {teacher.base}: its vocabulary, or its MLM "
               f"head, is not as in {self.owner.base}; expected one trained from that")
        return torch.no_grad()(teacher.logits)  # not once for all: other words are hidden each time

# ---- One run --------------------------------------------------------------------------------

class Run(TaskModel):
    """One run: what is learned and from what data; and how far it has come: step, lam and log."""

    def __init__(self, s):
        self.out, task = Path(s.out), data.TASKS[s.task]
        by_first(data.ensure_downloaded, task, s.data or "")
        super().__init__(by_first(bert.find_pretrained, s.model), s)
        texts, labels = self.asks.read("train", s.limit)
        self.dev_sets = self.examples(*task.dev)
        if s.holdout:
            (texts, labels), held_out = data.split_off(texts, labels, s.holdout)
            self.dev_sets["holdout"] = self.asks.encode(*held_out)
        self.train_set = self.asks.encode(texts, labels)
        self.s = s = settings_of(s.given, self.positions, len(self.train_set))  # n is known
        self.teacher_logits = lambda batch: None
        if s.teacher:
            teacher = TaskModel(s.teacher, s, is_teacher=True)
            self.teacher_logits = self.asks.listen(teacher, texts)
        torch.manual_seed(s.seed)
        self.make_learnable()
        self.step, self.lam = 0, s.lam
        self.log = [{"event": "settings"} | recorded(s) | {"torch": torch.__version__}]
        self.interrupts, self.next_checkpoint = [], time.monotonic() + (s.checkpoint_every or 0.0)
        # What a resumed run must find again (weights, data), and what it had better find.
        digests = [examples.checksum() for examples in (self.train_set, *self.dev_sets.values())]
        self.origin = {"weights": self.fingerprint, "data": " ".join([*digests, *self.task.words]),
                       "processes": PROCESSES, "threads": torch.get_num_threads(),
                       "torch": torch.__version__, "device": torch.device(s.device).type}

    def make_learnable(self):
        """Sets up what is learned: the scores, the weights, both, or (a random mask) nothing."""
        s, model = self.s, self.model
        model.set_dropout(s.dropout or 0.0)
        masked = s.scores_from or s.int8  # a dense model in 8 bits has masks of ones
        init = s.init or (s.scores_from if s.rule else "zero")  # if not learned, an init
        self.layers = smp.prune(model, prunable(model), init) if masked else {}
        for layer in self.layers.values():
            layer.int8 = s.int8
            layer.scores.requires_grad_(s.scores_from == "learned")
        if s.scores_from == "zeros":
            smp.lock(self.layers)
            sparsity = data.sparsity_of(self.masks())
            expect(sparsity >= 0.01, f"{self.base}: {sparsity:.2%} of its weights are 0, nothing "
                   "to lock; --task mlm --method magnitude makes a sparse model")
        self.scores = [layer.scores for layer in self.layers.values()]
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

    def batches(self):
        """The batches of all steps that are still to do."""
        return data.training_batches(self.train_set, self.s, self.step, self.asks.ask)

    def masks(self):
        return {name: layer.mask for name, layer in self.layers.items()}

    def choose_masks(self):
        s = self.s
        if s.scores_from == "magnitude":
            for layer in self.layers.values():  # the scores follow the weights that train
                layer.scores.data.copy_(layer.dense_weight.detach().abs())
        if s.rule:
            target = 0.5 if s.rule == "2:4" else s.sparsity or 0.0
            sparsity = smp.sparsity_at(self.step, s.ramp_steps, target)
            smp.choose_masks(self.layers, sparsity, s.rule, s.tau)

    def measure_lambda(self):
        """Sets lam at the first batch, by the task's gradient, unless it was given. At first a
        regression only learns the mean label, with large gradients: so its lam is the least
        that is found in the first twentieth of the steps."""
        last = self.s.steps // 20 if self.task.regression else 0
        if self.s.lam is None and self.step <= last:
            found = smp.balanced_lambda(self.scores, self.s.pull)
            self.lam = min(found, self.lam or found)

    def watch(self, loss, bar):
        """Shows the progress. Raises FloatingPointError if the loss or a score is not finite."""
        norm = nn.utils.get_total_norm(self.scores)
        finite = math.isfinite(loss) and math.isfinite(norm)
        expect(finite, DIVERGED, FloatingPointError)
        sparsity = data.sparsity_of(self.masks())
        bar.set_postfix_str(f"loss {loss:.3f}  sparsity {sparsity:.3f}", refresh=False)
        bar.update(self.step - bar.n)

    def evaluate_and_keep_best(self, loss, bar):
        self.choose_masks()  # the next step's; one of the final sparsity would be another model
        masks = self.masks()
        with smp.folded(self.layers, masks):
            metrics = self.asks.evaluate(self.dev_sets)
        epoch, sparsity = self.step / self.s.epoch_steps, data.sparsity_of(masks)
        self.log.append({"event": "eval", "step": self.step, "epoch": epoch, "sparsity": sparsity,
                         "metrics": metrics, "loss": loss, "lam": self.lam})
        if self.best is self.log[-1]:
            by_first(save_result, self, masks)
        by_first(data.write_log, self.out / "metrics.jsonl", self.log)
        bar.write(f"epoch {epoch:<5.4g} sparsity {sparsity:.4f}  {format_metrics(metrics)}")

    @property
    def best(self):
        """The best evaluation. Before the ramp ends a mask is too dense, and does not count."""
        done = [entry for entry in self.log[1:] if entry["step"] >= self.s.ramp_steps]
        return max(done, key=lambda entry: entry["metrics"]["score"], default=None)

    def save_checkpoint_if_due(self):
        """Saves every s.checkpoint_every seconds, or more seldom to take at most 2 % of the time;
        and at ctrl-C, which then ends the run."""
        begun = time.monotonic()
        stops, is_due = from_first((bool(self.interrupts), begun > self.next_checkpoint))
        if stops or is_due:
            by_first(save_checkpoint, self)
            now = time.monotonic()
            self.next_checkpoint = now + max(self.s.checkpoint_every, 50 * (now - begun))
        if stops:
            raise KeyboardInterrupt

def prunable(model):
    """The names of the six matrices of each layer: not the embeddings, not the head."""
    return [name for name, module in model.named_modules()
            if name.startswith("layers.") and isinstance(module, nn.Linear)]

def is_trained(name, s):
    """Whether a weight trains: in finetune all do, in other methods the layers' or none."""
    is_weight = not name.endswith(".scores")
    return s.trains_weights and is_weight and (not s.scores_from or name.startswith("layers."))

def run_once(s):
    """Runs one method on one task, in the folder s.out. Returns the final record.

    --resume goes on from the last checkpoint and ends bit for bit as if nothing had happened (on a
    GPU as far as its kernels repeat themselves)."""
    started, run = time.monotonic(), Run(s)
    # Several processes ignore a second ctrl-C: each hears the first one twice, from torchrun too.
    with data.only_run_in(run.out, RANK), data.interruptible(PROCESSES > 1) as run.interrupts:
        if final := complete_record(run.s):  # another command ended it just now
            return final
        resume_or_clear(run)
        introduce(run)
        try:
            train(run)
        except FloatingPointError as error:
            raise FloatingPointError(f"step {run.step}: {error}; try a smaller learning rate, or "
                                     f"get {run.base}/model.safetensors again") from None
        return by_first(finish, run, started)

# ---- What a run leaves on disk --------------------------------------------------------------

RESULTS = ("metrics.jsonl", "mask.safetensors", "model/model.safetensors")

def complete_record(s):
    """The final record of a complete run in s.out, for --resume; None if there is work to do.
    Raises FileExistsError rather than replace what is there."""
    out = Path(s.out)
    log, checkpoint = data.read_log(out / "metrics.jsonl"), out / "checkpoint.safetensors"
    read = [Path(folder).resolve() for folder in (s.model, s.teacher) if folder]
    expect((out / "model").resolve() not in read,
           f"--out {out}: this run reads the model in it; give another")
    resumable = log or checkpoint.exists()
    data.claim(out, RESULTS, s.overwrite or (s.resume and resumable), "give "
               + "--resume to go on with it, " * bool(resumable) + "--overwrite, or another --out")
    if not s.resume or not log:
        return None
    data.compare_settings(out / "metrics.jsonl", log[0], recorded(s))
    results = ["mask.safetensors"] * bool(s.scores_from or s.int8)
    results += ["model/model.safetensors"] * s.trains_weights
    if log[-1]["event"] != "final" or not all((out / name).is_file() for name in results):
        return None
    whole = {"metrics", "best", "last", "kept", "total"} <= log[-1].keys()
    expect(whole, f"{out}/metrics.jsonl: its final record is damaged; start over with --overwrite")
    checkpoint.unlink(missing_ok=True)  # if the run was killed right after its final record
    print(f"{out}: this run is complete, nothing to resume")
    return log[-1]

def resume_or_clear(run):
    """Goes on from the checkpoint in the run's folder, or else clears what an earlier run left."""
    checkpoint = run.out / "checkpoint.safetensors"
    for what, there in from_first(run.origin).items():
        expect(there == run.origin[what] or what not in ("weights", "data"),
               f"process {RANK} reads other {what} than the first; give all the same files")
    if from_first(run.s.resume and checkpoint.exists()):
        load_checkpoint(run, checkpoint)
        print(f"resuming    after step {run.step} of {run.s.steps}")
    else:
        if run.s.resume:
            print("resuming    there is no checkpoint yet: starting over")
        by_first(data.remove, [checkpoint, *(run.out / name for name in RESULTS)])
    by_first(data.write_log, run.out / "metrics.jsonl", run.log)

def finish(run, started):
    """The last checks, the final record, which it returns, and the report."""
    check_frozen(run)
    masks = {}
    if run.layers:  # the best, as it is on disk
        masks, header = data.load_packed(run.out / "mask.safetensors", "mask")
        expect(header["step"] == run.best["step"], f"{run.out}/mask.safetensors: of another step "
               "than the best; start over with --overwrite", RuntimeError)
    kept, total = data.kept_and_total(masks)
    bits, which = shipped(run, masks)
    final = {"event": "final", "metrics": run.best["metrics"], "best": run.best,
             "last": run.log[-1], "frozen_unchanged": True, "kept": kept, "total": total,
             "new_bits": bits}
    data.write_log(run.out / "metrics.jsonl", [*run.log, final])
    data.remove(run.out.glob("checkpoint.safetensors*"))
    report(run, final, masks, which, time.monotonic() - started)
    return final

def shipped(run, masks):
    """What the task needs beside the base model: how many bits, and which."""
    s, (kept, total) = run.s, data.kept_and_total(masks)
    bits, which = 0, []
    if s.rule:
        bits += total
        which.append("one bit for each prunable weight")
    if s.trains_weights:
        others = run.n_trained - total  # biases, LayerNorms; of a dense model all the rest
        scales = sum(len(mask) for mask in masks.values()) if s.int8 else 0  # one a row
        bits += (8 if s.int8 else 32) * kept + 32 * (others + scales)
        which.append("8 for each weight that is kept, 32 for each row's scale and what else trains"
                     if s.int8 else "32 for each weight that is kept, each bias and LayerNorm")
    return bits, ", ".join(which)

def check_frozen(run):
    """Raises RuntimeError if a tensor that the method freezes is not the checkpoint's, bit for bit,
    whatever its requires_grad says; or if a zero that was locked is none any more."""
    before = bert.load_pretrained(run.base).state_dict()
    locked = [f"{name}.weight" for name in run.layers if run.s.scores_from == "zeros"]
    for name, tensor in plain_state(run.model).items():
        now, then = tensor.cpu(), before[name]
        moved = not torch.equal(now, then) and not is_trained(name, run.s)
        lost = name in locked and bool(now[then == 0].any())
        expect(not (moved or lost), f"{run.out}: {name} was to stay {'zero' if lost else 'frozen'} "
               "and has changed; do not use what is in this folder", RuntimeError)

def plain_state(model):
    """The state dict of a model as if it had no masks."""
    return {name.replace(".dense_weight", ".weight"): tensor
            for name, tensor in model.state_dict().items()
            if not name.endswith((".scores", ".mask"))}

def fingerprint(model, tokenizer):
    """SHA-256, in hex, of all that a mask belongs to: weights, sizes, vocabulary and its use."""
    tokenizer.no_truncation()  # encode sets it again
    config = {key: value for key, value in vars(model.config).items() if "dropout" not in key}
    words = [sorted(tokenizer.get_vocab().items()), tokenizer.encode("[MASK]").ids]  # one token?
    if tokenizer.normalizer:  # it lowers case, strips accents, parts Chinese characters, or not
        words.append(tokenizer.normalizer.normalize_str("Café 漢字"))
    # + 0.0 drops the sign of a zero, which a small model does not keep.
    weights = {name: tensor.float().cpu() + 0.0 for name, tensor in plain_state(model).items()}
    return data.checksum(json.dumps([config, words]), weights)

def save_result(run, masks):
    """Writes what the task needs beside the base model, of the best evaluation: the mask, and where
    weights train, the masked model."""
    s, belongs_to, name = run.s, run.fingerprint, str(run.s.model)
    if Path(name).is_dir():
        name = Path(name).resolve().name  # where it lies is of no use to others
    if s.trains_weights:
        name, baked = "the model/ that was saved with it", bake(run, masks)
        save_model(run.out / "model", baked, run.base)
        belongs_to = fingerprint(baked, run.tokenizer)  # the model that is shipped with the mask
    if masks:
        local = ("model", "data", "corpus", "out", "teacher", "device")
        settings = {key: value for key, value in recorded(s).items() if key not in local}
        data.save_packed(run.out / "mask.safetensors", "mask", masks, {
            "task": s.task, "method": s.method, "base": name, "fingerprint": belongs_to,
            "own_task": s.task not in data.BUILT_IN and vars(run.task) | {"home": ""},
            "label_words": run.task.words, "settings": settings, **run.best})

def bake(owner, masks):
    """A Bert with ordinary linears, whose zeros are in its weights."""
    state = plain_state(owner.model)
    with smp.folded(owner.layers, masks):
        state |= {f"{name}.weight": layer.weight for name, layer in owner.layers.items()}
    state = {name: tensor.detach().cpu() for name, tensor in state.items()}
    return bert.build(owner.model.config, state, owner.base)

def save_model(folder, model, tokenizer_from):
    """A model folder that --model, --teacher and transformers read, with another's vocabulary."""
    bert.save_pretrained(model, folder, data.whole)
    data.copy_tokenizer(tokenizer_from, folder)

def recorded(s):
    """The settings that decide how a run ends, as far as they are known."""
    others = ("given", "positions", "n", "overwrite", "resume", "debug", "checkpoint_every", "eval",
              "predict", "export", "sparse")
    return {key: value for key, value in vars(s).items() if key not in others and value != LATER}

def save_checkpoint(run):
    """Writes all that the next step depends on: what trains, Adam's moments, lambda. (Masks follow
    from the scores, an epoch's order and a step's dropout from the seed.)"""
    tensors = {}
    for i, p in enumerate(run.learned):
        tensors[f"{i}.value"] = p
        tensors |= {f"{i}.{key}": moment for key, moment in run.optimizer.state[p].items()}
    finite = all(tensor.isfinite().all() for tensor in tensors.values())
    expect(finite, DIVERGED, FloatingPointError)
    state = {"step": run.step, "lam": run.lam, "log": run.log, "origin": run.origin}
    data.save_packed(run.out / "checkpoint.safetensors", "checkpoint", tensors, state, pack=False)

def load_checkpoint(run, path):
    """Goes back to where a checkpoint was written. Raises ValueError for one that is damaged, or
    was written with other settings, weights or data."""
    tensors, state = data.load_packed(path, "checkpoint")
    data.compare_settings(path, state["log"][0], recorded(run.s))
    places = {"weights": run.base, "data": run.s.data or run.s.corpus}
    for what, here in run.origin.items():
        there = state["origin"].get(what)
        expect(there == here or what not in places, f"{path}: written over other {what} than those "
               f"now in {places.get(what)}; start over with --overwrite")
        if there != here:
            print(f"note        {what} {here}, before {there}: last digits may differ")
    run.step, run.lam, run.log = state["step"], state["lam"], state["log"]
    for name, tensor in tensors.items():
        i, key = name.split(".")
        p = run.learned[int(i)]
        if key == "value":
            p.data.copy_(tensor)
        else:
            run.optimizer.state[p][key] = tensor.to(p.device)

# ---- Masks at work --------------------------------------------------------------------------

class MaskFile(TaskModel):
    """A mask file, checked, on its task and its base model."""

    def __init__(self, path, s):
        self.path, (self.masks, self.header) = path, data.load_packed(path, "mask")
        beside = Path(path).parent
        log = data.read_log(beside / "metrics.jsonl")
        where = log[0] if log else {}  # model, data and corpus of its run, if that is here
        with data.reading(path, "a mask that train.py wrote"):
            task, base, of = [self.header[name] for name in ("task", "base", "fingerprint")]
            settings = self.header["settings"]
            if own_task := self.header.get("own_task"):
                home = data.TASKS[task].home if task in data.TASKS else ""  # if --task gave it
                data.add_task(own_task | {"home": home})
                where["data"] = home or where.get("data")
            if settings["trains_weights"] and (beside / "model/model.safetensors").is_file():
                where["model"] = beside / "model"  # was shipped with the mask
            where |= s.given
            self.int8, precision = bool(settings["int8"]), settings["precision"]
            expect(task in data.TASKS and precision in PRECISIONS, "of another task or precision")
            s = argparse.Namespace(
                task=task, device=s.device, sparse=s.sparse, max_length=int(settings["max_length"]),
                precision="fp32" if s.sparse else precision,  # no sparse product is in bf16
                data=where.get("data") or data.TASKS[task].home, corpus=where.get("corpus"),
                given=s.given)
        asked = s.given.get("task", task)
        expect(asked == task, f"{path}: a mask for {task}; --task asks for {asked}")
        expect(where.get("model"), f"{path}: made for {base}; say with --model where that is")
        super().__init__(where["model"], s)
        self.layers = smp.prune(self.model, prunable(self.model))
        for layer in self.layers.values():
            layer.int8 = self.int8
        expect(of == self.fingerprint and self.masks.keys() == self.layers.keys(),
               f"{path}: made for another model than {self.base}, or for this one before it "
               f"changed; give {base} as --model")

    def folded(self):
        return smp.folded(self.layers, self.masks, SparseProduct if self.s.sparse else None)

class SparseProduct:
    """F.linear(x, W, b) that skips the zeros of W, which it holds row by row (CSR), where that is
    faster: where W keeps at most 12 %, or 25 % and x has at most 128 tokens. (F.linear takes such
    a W too, but four times as long.)"""

    def __init__(self, W):
        kept = W.count_nonzero().item() / W.numel()
        can_skip = W.is_cpu and torch.backends.mkl.is_available() and kept <= 0.25
        self.most_tokens = -1 if not can_skip else 128 if kept > 0.12 else math.inf
        if can_skip:
            with warnings.catch_warnings(action="ignore"):  # "CSR is in beta"
                csr = W.to_sparse_csr()
                indices = csr.crow_indices().int(), csr.col_indices().int()  # half the bytes
                self.W = torch.sparse_csr_tensor(*indices, csr.values(), W.shape)

    def __call__(self, x, W, bias):
        if x.numel() > self.most_tokens * W.shape[1]:
            return nn.functional.linear(x, W, bias)
        columns = x.reshape(-1, W.shape[1]).T.contiguous()  # (in, tokens), to be read row by row
        start = W.new_zeros(len(W), 1) if bias is None else bias[:, None]
        y = torch.addmm(start.expand(-1, columns.shape[1]), self.W, columns).T
        if len(W) <= W.shape[1]:  # U's stays as it lies: D reads its columns
            y = y.contiguous()
        return y.reshape(*x.shape[:-1], len(W))

def evaluate_masks(s):
    """--eval: the metrics on dev, {path: metrics}. --export: also the pruned model."""
    results, folder = {}, Path(s.export or "")
    weights = "sparse.safetensors" if s.sparse else "model.safetensors"
    if s.export:
        data.claim(folder, (*data.TOKENIZER_FILES, "config.json", weights), s.overwrite)
    for path in s.eval:
        mask = MaskFile(path, s)
        expect(not s.export or folder.resolve() != mask.base.resolve(),
               f"--export {folder}: the base of the mask; give another folder")
        with mask.folded():
            metrics = results[path] = mask.asks.evaluate(mask.examples(*mask.task.dev))
        sparsity, before = data.sparsity_of(mask.masks), mask.header.get("metrics")
        print(f"{path}: {mask.s.task}, sparsity {sparsity:.4f}, {format_metrics(metrics)}")
        same = isinstance(before, dict) and all(
            before.get(name) == value for name, value in metrics.items() if name != "score")
        if not same and not s.sparse:
            print("note: its run recorded other numbers; is it other data, device or threads?")
        if s.export and s.sparse:
            save_small(folder, mask)
        elif s.export:
            save_model(folder, bake(mask, mask.masks), mask.base)
            print(f"{path} -> {folder}/: {mask.base} with zeros where the mask has them")
            if mask.int8:
                print("note        its weights are the rounded ones; their inputs are rounded "
                      "by --eval, but not by that model")
    return results

def save_small(folder, mask):
    """Writes a pruned model without its zeros: sparse.safetensors, config.json, vocabulary."""
    model = bake(mask, mask.masks)
    state = model.state_dict()
    dense = sum(4 * tensor.numel() for tensor in state.values())
    for name, layer in mask.layers.items():
        if mask.int8:
            q, state[f"{name}.scale"] = smp.to_int8(layer.dense_weight)
            state[f"{name}.weight"] = q * mask.masks[name].to(q.device)
    bert.save_config(model, folder, data.whole)
    data.copy_tokenizer(mask.base, folder)
    data.save_packed(folder / "sparse.safetensors", "model", state, {
        "task": mask.s.task, "label_words": mask.task.words, "int8": mask.int8,
        "fingerprint": fingerprint(model, mask.tokenizer)})
    size = (folder / "sparse.safetensors").stat().st_size
    print(f"{mask.path} -> {folder}/: {size / 1e6:.1f} MB, dense in float32 {dense / 1e6:.1f} MB; "
          "train.load_small reads it")

def load_small(folder):
    """What --export --sparse wrote -> (model, tokenizer, label words), the zeros of the model
    skipped where that is faster. Raises FileNotFoundError, and ValueError for what is damaged."""
    path = Path(folder) / "sparse.safetensors"
    expect(path.is_file(), f"{path}: no such file; --eval MASK --export DIR --sparse makes it",
           FileNotFoundError)
    config, tokenizer = bert.read_config(path.with_name("config.json")), data.load_tokenizer(folder)
    state, header = data.load_packed(path, "model")
    for name in [name for name in state if name.endswith(".scale")]:
        weight = name.replace(".scale", ".weight")
        state[weight] = state[weight] * state.pop(name)
    model = bert.build(config, state, path)
    expect(fingerprint(model, tokenizer) == header["fingerprint"], f"{path}: not of the "
           "config.json and the vocabulary beside it; export it again")
    for layer in smp.prune(model, prunable(model)).values():
        W = layer.dense_weight.detach()
        layer.int8, layer.fixed = header["int8"], (W, SparseProduct(W))
    return model, tokenizer, header["label_words"]

def predict_masks(s):
    """--predict: GLUE's submission files, and of several masks the zip. All is computed before the
    first file is written."""
    out, found = Path(s.out or "predictions"), {}
    for path in s.predict:
        mask = MaskFile(path, s)
        expect(mask.task.test, f"{path}: a mask for {mask.s.task}; it has no test file")
        for split, examples in mask.examples(*mask.task.test).items():
            file = out / data.prediction_name(mask.task, split)
            expect(file not in found, f"{path}: a second mask for {mask.s.task}; GLUE takes one "
                   "file a task")
            names = [file.name] + ["submission.zip"] * (len(s.predict) > 1)
            data.claim(out, names, s.overwrite, "give --overwrite, or another --out")
            with mask.folded():
                found[file] = path, mask.task, mask.asks.predict(examples)
    for file, (path, task, logits) in found.items():
        data.write_predictions(file, task, logits)
        print(f"{path} -> {file} ({len(logits):,} lines)")
    if len(s.predict) > 1:
        print(f"all of them -> {data.zip_predictions(list(found))}, as the GLUE site takes it")

# ---- What a person sees ---------------------------------------------------------------------

def format_metrics(metrics):
    """Metrics in words, without "score", which follows from the others."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "score")

def introduce(run):
    """What this run is, before its first step."""
    s = run.s
    given = {key: x for key, x in recorded(s).items() if x is not None and x is not False}
    settings = " ".join(f"{key}={value}" for key, value in given.items())
    print(textwrap.fill(f"settings    {settings}", 100, subsequent_indent=" " * 12,
                        break_long_words=False, break_on_hyphens=False))
    text = run.tokenizer.decode(run.train_set.ids[0], skip_special_tokens=False)
    answer = "the words that are hidden" if run.task.mlm else run.train_set.labels[0]
    answer = run.task.words[answer] if run.task.labels else answer
    print(f"example     {data.printable(text)} -> {answer}")
    head = "the MLM head" if run.model.mlm else "the words' embeddings (the model has no MLM head)"
    print(f"head        {head}")
    scores = sum(x.numel() for x in run.scores)
    frozen = sum(p.numel() for p in run.model.parameters()) - scores - run.n_trained
    has_scores = f", {scores:,} scores, one for each prunable weight" if s.rule else ""
    print(f"parameters  {frozen:,} frozen, {run.n_trained:,} trained{has_scores}")
    if run.train_set.cut:
        share = run.train_set.cut / len(run.train_set)
        print(f"note        {share:.1%} of the texts have over {s.max_length} tokens and are cut")
    if s.rule == "threshold":
        print(f"note        the rule sets no sparsity: sigmoid(S) > {s.tau:g} decides")

def report(run, final, masks, which, seconds):
    s, best, last = run.s, final["best"], final["last"]
    print()
    if masks:
        print(data.density_table(masks))
        print(f"\nkept {final['kept']:,} of {final['total']:,} weights: "
              f"sparsity {best['sparsity']:.6f}")
    by = f"chosen on {s.holdout:.0%} of train, held out" if s.holdout else (
        "chosen on dev itself, so a little flattering")
    print(f"last   epoch {last['epoch']:<5.4g} {format_metrics(last['metrics'])}")
    print(f"best   epoch {best['epoch']:<5.4g} {format_metrics(best['metrics'])}   <- saved; {by}")
    if s.scores_from:
        print("frozen tensors: every one bit-identical to the checkpoint")
    if s.scores_from == "zeros":
        print("locked zeros: every one still zero")
    bits = final["new_bits"]
    print(f"new parameters for this task: {bits:,} bits, {bits / 8e6:.2f} MB ({which})")
    files = [path for path in (run.out / name for name in RESULTS) if path.exists()]
    files = ", ".join(f"{path} ({path.stat().st_size:,} bytes)" for path in files)
    print(f"{seconds:.0f} s, {data.peak_mb(s.device):,.0f} MB at most; {files}")

# ---- The demo: a BERT of our own, and the lesson in one table -------------------------------

def prepare_demo(folder, device):
    """Writes the made-up task and pre-trains a tiny BERT on its language, unless both are there."""
    files = ("model/model.safetensors", "DEMO/train.tsv", "DEMO/dev.tsv")
    if from_first(not all((folder / name).is_file() for name in files)):
        print(f"demo        first run: making up a language in {folder}/, pre-training on it")
        by_first(write_random_model, folder)
        run_silently(task="mlm", corpus=f"{folder}/corpus.txt", mlm_rate=0.3, mlm_cls=True,
                     method="finetune", model=f"{folder}/DEMO/random", out=str(folder), resume=True,
                     epochs=1, batch_size=32, weight_lr=4e-4, dropout=0.0, device=device)

def write_random_model(folder):
    data.write_demo(folder)
    tokenizer = data.load_tokenizer(folder)
    torch.manual_seed(0)
    model = bert.Bert(bert.Config(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=256, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=1024, max_position_embeddings=128))
    save_model(folder / "DEMO/random", model, folder)

def run_silently(**given):
    """A run that shows no report."""
    s = settings_of(given | {"seed": 0})
    with contextlib.redirect_stdout(io.StringIO()):
        return complete_record(s) or run_once(s)

def print_comparison(s, learned):
    """Prints what the learned mask is worth, beside other things to do with the same weights."""
    frozen = TaskModel(s.model, s)
    dev = frozen.examples("dev")
    labels = dev["dev"].labels
    rows = {"chance: always the commoner label": max(np.bincount(labels)) / len(labels)}
    torch.manual_seed(s.seed[0])
    layers = smp.prune(frozen.model, prunable(frozen.model))
    sparsity = 1 - learned["kept"] / learned["total"]
    for what, init, removed in [("the frozen model, nothing pruned", "zero", 0.0),
                                ("a random mask, untrained", "random", sparsity),
                                ("a magnitude mask, untrained", "magnitude", sparsity)]:
        for layer in layers.values():
            layer.scores.data = smp.initial_scores(layer.dense_weight, init)
        smp.choose_masks(layers, removed, "smp-l")
        rows[what] = frozen.asks.evaluate(dev)["accuracy"]
    rows["the learned mask"] = learned["last"]["metrics"]["accuracy"]
    # Dense fine-tuning is the same whatever the mask: it is trained once and kept.
    names = ("data", "model", "device", "precision", "max_length", "limit")
    dense = run_silently(
        method="finetune", epochs=2, weight_lr=5e-4, resume=True, out=f"{s.data}/dense-"
        f"{s.precision}-{frozen.s.max_length}-{s.limit or 'all'}-{frozen.fingerprint[:8]}",
        **{name: getattr(frozen.s, name) for name in names})
    rows["dense fine-tuning, every weight trained"] = dense["last"]["metrics"]["accuracy"]
    print(f"\naccuracy on dev; the three masks remove {sparsity:.0%} of the weights, change none")
    for what, value in rows.items():
        bar = "█" * round(30 * value)
        print(f"  {what:<40} {value:.3f}  {bar}")
    if rows["the learned mask"] > rows["a magnitude mask, untrained"]:
        print("\nThe frozen weights already hold a classifier; it is hidden among the others. "
              "Neither chance nor\nsize finds it. Asking the task of each weight \"stay or go?\", "
              "and nothing else, does.")

# ---- The flags ------------------------------------------------------------------------------

LATER = object()  # a setting that depends on the model or the data, while they are not known
PRECISIONS = ("fp32", "bf16")

def number(low, high=math.inf, kind=float):
    """The argparse settings of a finite number from low to high."""
    def parse(string):
        with contextlib.suppress(ValueError):
            value = kind(string)
            if low <= value <= high:  # not so for nan
                return value
        word = "whole number" if kind is int else "number"
        raise argparse.ArgumentTypeError(f"{string!r} is not a {word} from {low} to {high}")

    return {"type": parse, "metavar": "N"}

def device(string):
    """An argparse type: the name of a device that works on this machine."""
    try:
        torch.zeros(1, dtype=torch.float64, device=string).item()  # smp counts shares in float64
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"no device {string!r} here ({reason})") from None
    return string

def usual_device(s):
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ['LOCAL_RANK']}" if PROCESSES > 1 else "cuda"

def usual_epochs(s):
    return LATER if s.n is None else 12 if s.n > 10_000 else 60 if s.n >= 3_000 else 100

def usual_batch_size(s):
    """A step moves a score by about lr, whatever the batch. So a sparse mask, which has far to
    move, gets 1,500 steps at least, if possible. (Not in the demo, which is to be quick, nor in
    mlm, which has steps enough.)"""
    if s.n is None:
        return LATER
    size = 64 if s.n > 10_000 else 32
    sparse = s.rule == "threshold" or (s.sparsity or 0.0) > 0.5
    if sparse and s.task not in ("demo", "mlm") and not s.paper:
        while size > 16 and s.epochs * s.n < 1500 * size:
            size //= 2
    return size

def usual_dropout(s):
    """A network that keeps half of its weights can overfit by their choice, not with a tenth."""
    if s.trains_weights:
        return 0.0 if s.task == "demo" else 0.1
    return 0.2 if s.rule != "threshold" and (s.sparsity or 0.5) <= 0.5 else 0.0

# What is usual for a task, a method or --paper, where it differs from the table of flags.
USUAL = {
    "--task demo": {"epochs": 3, "pull": 0.2, "init": "zero", "weight_lr": 1e-3},
    "--task mlm": {"epochs": 3, "weight_lr": 5e-5},
    "--method lock": {"weight_lr": 1e-4},
    "--paper True": {"init": "zero", "lam": 400.0, "dropout": 0.1},
}
YES, TEXT, TEXTS = {"action": "store_true"}, {"metavar": "X"}, {"metavar": "X", "nargs": "+"}
WHOLE, AMOUNT, SHARE = number(1, kind=int), number(0, 1e6), number(0, 1)
SEEDS = number(0, 2**32 - 1, int) | {"nargs": "+"}
# All that is known of a flag. A group has a purpose, and a test of the settings so far: where that
# fails its flags are refused, and their settings None. A row is a flag, its kind, its help, and its
# default, a value or a function of the settings so far.
FLAGS = {
    "any command": (lambda s: True, [
        ("--task", TEXT, "of GLUE, or a task.json, mlm, or demo, which needs no data", "demo"),
        ("--device", {"type": device}, "default: cuda where there is one, or cpu", usual_device),
        ("--debug", YES, "show the traceback of an error", False)]),
    "masks at work, in place of training": (lambda s: s.eval or s.predict, [
        ("--eval", TEXTS, "evaluate these mask files on dev", None),
        ("--predict", TEXTS, "write GLUE's submission files to --out (or predictions)", None)]),
    "--eval of one mask": (lambda s: len(s.eval or ()) == 1, [
        ("--export", TEXT, "write the pruned model to this folder", None)]),
    "masks on a CPU, or --export": (
        lambda s: s.export or (s.eval or s.predict) and s.device == "cpu", [
            ("--sparse", YES, "skip the zeros; what is exported is small", False)]),
    "training": (lambda s: not (s.eval or s.predict), [
        ("--method", {"choices": METHODS}, "see the README's table", "smp-s"),
        ("--resume", YES, "go on with an interrupted run", False),
        ("--limit", WHOLE, "use only the first N training examples", None),
        ("--seed", SEEDS, "several make as many runs, and their mean (default: 0)", [0]),
        ("--precision", {"choices": PRECISIONS}, "of products (default: bf16 on cuda, or fp32)",
         lambda s: "bf16" if s.device.startswith("cuda") else "fp32"),
        ("--int8", YES, "linear layers of the encoder in 8 bits (simulated)", False),
        ("--max-length", number(4, kind=int), "longest input, in tokens (default: 128)",
         lambda s: LATER if s.positions is None else min(128, s.positions))]),
    "training and --predict": (lambda s: not s.eval, [
        ("--out", TEXT, "its folder (default: runs/TASK-METHOD-SPARSITY-sSEED)", None)]),
    "what writes, without --resume": (lambda s: not s.resume and (not s.eval or s.export), [
        ("--overwrite", YES, "replace what is there (default for the demo, without --out)",
         lambda s: bool(s.method) and s.task == "demo" and not s.out)]),
    "training on tasks with labels": (lambda s: s.method and s.task != "mlm", [
        ("--holdout", number(0, 0.9), "share of train to choose the best by, not dev", None)]),
    "tasks with labels": (lambda s: s.task != "mlm", [
        ("--data", TEXT, "folder of task folders (default: glue, where training fetches them)",
         lambda s: data.TASKS[s.task].home)]),
    "--task mlm": (lambda s: s.task == "mlm" or not s.method, [
        ("--corpus", TEXT, "a text file, a text a line; 5 %% are held out", None)]),
    "training on --task mlm": (lambda s: s.method and s.task == "mlm", [
        ("--mlm-rate", SHARE, "share of the words that it asks for", 0.15),
        ("--mlm-cls", YES, "it also asks [CLS] for a word of its text", False)]),
    "a base model": (lambda s: True, [
        ("--model", TEXT, "folder, or name on the hub (default: bert-base-uncased)",
         lambda s: f"{s.data}/model" if s.task == "demo" else "bert-base-uncased")]),
    "methods that set the sparsity": (lambda s: s.rule in ("smp-s", "smp-l", "global"), [
        ("--sparsity", number(0, 0.9999), "fraction of the weights to REMOVE", 0.9)]),
    "methods with a threshold": (lambda s: s.rule == "threshold", [
        ("--tau", SHARE, "keeps where sigmoid(S) > tau; lambda steers how many", 0.1)]),
    "methods that learn scores": (lambda s: s.scores_from == "learned", [
        ("--paper", YES, "published --init zero --lambda 400 --dropout 0.1, and batches", False),
        ("--lr", AMOUNT, "learning rate of the scores, falling to 0", 2e-2),
        ("--init", {"choices": ["zero", "magnitude"]}, "of scores; of the demo zero", "magnitude"),
        ("--lambda", AMOUNT | {"dest": "lam"}, "of the regulariser, not --pull", None)]),
    "a regulariser without --lambda": (lambda s: s.scores_from == "learned" and s.lam is None, [
        ("--pull", AMOUNT, "of the regulariser, in task gradients; of the demo 0.2", 1.0)]),
    "methods that train weights": (lambda s: s.trains_weights, [
        ("--weight-lr", AMOUNT, "learning rate; of lock 1e-4, mlm 5e-5, the demo 1e-3", 3e-5)]),
    "methods that learn": (lambda s: s.method not in (None, "random"), [
        ("--epochs", WHOLE, "default: 12; to 10,000 examples 60, below 3,000 100; demo, mlm 3",
         usual_epochs),
        ("--batch-size", WHOLE, "default: 64 above 10,000 examples, or 32; short sparse runs less",
         usual_batch_size),
        ("--eval-every", WHOLE, "steps between evaluations (default: an epoch)",
         lambda s: LATER if s.n is None else math.ceil(s.n / s.batch_size)),
        ("--dropout", SHARE, "default: 0.1 if weights train (demo 0), 0.2 if half stay, or 0",
         usual_dropout),
        ("--checkpoint-every", AMOUNT, "seconds; more if it took over 2 %%", 60.0),
        ("--teacher", TEXT, "a fine-tuned model to distil from", None)]),
    "methods with a ramp": (lambda s: s.rule not in (None, "threshold") and s.method != "random", [
        ("--ramp", SHARE, "share of the steps in which the sparsity grows", 0.5)]),
    "a --teacher": (lambda s: s.teacher, [
        ("--teacher-weight", SHARE, "of the distillation, against the task's", 0.5)]),
    "a --teacher of classes": (lambda s: s.teacher and not data.TASKS[s.task].regression, [
        ("--temperature", number(1e-3, 1e3), "of the distillation", 2.0)]),
}

def settings_of(given, positions=None, n=None):
    """All settings of a run: what was given, and a default for the rest. `positions` of the model
    and n training examples may be unknown. Raises ValueError for what has no effect."""
    s = argparse.Namespace(given=given, positions=positions, n=n, eval=given.get("eval"),
                           predict=given.get("predict"), task=None, method=None, paper=False)
    for purpose, (applies, rows) in FLAGS.items():
        for flag, kind, _, default in rows:
            name = kind.get("dest", flag[2:].replace("-", "_"))
            value = given.get(name)
            expect(value is None or value is False or applies(s),
                   f"{flag} has no effect here: it is for {purpose}")
            if value is None and applies(s):
                for what in (f"--method {s.method}", f"--task {s.task}", f"--paper {s.paper}"):
                    default = USUAL.get(what, {}).get(name, default)
                value = default(s) if callable(default) else default
            setattr(s, name, value)
            if name == "method":
                s.scores_from, s.rule, weights = METHODS.get(s.method, (None, None, None))
                s.trains_weights = weights == "trained"
    s.epoch_steps = s.steps = s.ramp_steps = s.hold_steps = LATER
    if n is not None:
        s.epoch_steps = math.ceil(n / (s.batch_size or n))
        s.steps = (s.epochs or 0) * s.epoch_steps
        # A threshold has no target: only its last mask counts.
        s.ramp_steps = s.steps if s.rule == "threshold" else round((s.ramp or 0.0) * s.steps)
        s.hold_steps = s.ramp_steps if s.task == "mlm" and s.method == "magnitude" else 0
    return s

class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the page of usage
        self.exit(2, f"error: {data.printable(message)}; see python train.py --help\n")

def parse_flags(argv=None):
    """The command line -> settings. Refuses what contradicts itself, and what has no effect."""
    p = Parser(prog="train.py", description=__doc__.partition("\n")[0], allow_abbrev=False,
               argument_default=argparse.SUPPRESS)
    for purpose, (_, rows) in FLAGS.items():
        group = p.add_argument_group(f"for {purpose}")
        for flag, kind, does, default in rows:
            plain = type(default) in (str, float)  # other defaults the help says in words
            group.add_argument(flag, help=f"{does} (default: {default})" if plain else does, **kind)
    try:
        given = vars(p.parse_args(argv))
        if "task" in given:
            given["task"] = data.find_task(given["task"])
        s = settings_of(given)
        expect(s.method or PROCESSES == 1,
               "--eval and --predict run in one process, without torchrun")
        expect(not (s.eval and s.predict), "--eval or --predict, not both")
        expect(s.corpus or s.task != "mlm" or not s.method, "--task mlm needs --corpus FILE")
        expect(not s.seed or len(set(s.seed)) == len(s.seed), "--seed: the same seed twice")
        return s
    except (ValueError, OSError) as error:
        p.error(str(error))

# ---- main -----------------------------------------------------------------------------------

def run_seeds(s):
    """A run for each seed. Returns the final record, or of several the mean and spread of their
    metrics. What to report is the mean of `last`: without --holdout `best` was chosen on dev."""
    parts = [s.task, s.method.replace(":", "of"), f"{s.sparsity:g}" if s.sparsity else "",
             "int8" if s.int8 else ""]
    out = s.out or "runs/" + "-".join(filter(None, parts))
    each, alone = [], s.out and len(s.seed) == 1
    for seed in s.seed:
        own = {"seed": seed, "out": out if alone else f"{out}-s{seed}"}
        each.append(settings_of(s.given | own | {"overwrite": s.overwrite}))
    finals = [complete_record(one) for one in each]  # refuses a folder before the first run
    finals = [final or run_once(one) for final, one in zip(finals, each, strict=True)]
    if len(finals) == 1:
        return finals[0]
    together = {"seeds": s.seed, "n": len(finals)}
    print(f"\n{len(finals)} seeds, mean ± sample standard deviation")
    names = [name for name in finals[0]["metrics"] if name != "score"]
    for which, name in itertools.product(("best", "last"), names):
        values = [final[which]["metrics"][name] for final in finals]
        mean, std, key = np.mean(values).item(), np.std(values, ddof=1).item(), f"{which}_{name}"
        together |= {key: values, f"{key}_mean": mean, f"{key}_std": std}
        print(f"  {which} {name:<11} {mean:.4f} ± {std:.4f}")
    print(json.dumps(together))
    return together

def run_command(s):
    if s.eval or s.predict:
        return evaluate_masks(s) if s.eval else predict_masks(s)
    started = time.monotonic()
    if s.task == "demo":
        prepare_demo(Path(s.data), s.device)
    final = run_seeds(s)
    learns_masks = s.scores_from == "learned" and not s.trains_weights
    if s.task == "demo" and learns_masks and len(s.seed) == 1:
        print_comparison(s, final)
        seconds, memory = time.monotonic() - started, data.peak_mb(s.device)
        print(f"\n{seconds:.0f} s in all, {memory:,.0f} MB of memory at most")
    return final

def main(argv=None):
    """Runs the command line; returns what the command does. Bad input, from flag to file, ends in
    one line on stderr and exit code 2; ctrl-C in exit code 130."""
    terminal = data.Unbreakable(sys.stderr)
    nowhere = open(os.devnull, "w") if RANK else None  # the first process prints
    with contextlib.redirect_stdout(nowhere or data.Unbreakable(sys.stdout)), \
            contextlib.redirect_stderr(nowhere or terminal):
        s = parse_flags(argv)
        try:
            with joined(s.device):
                return run_command(s)
        except KeyboardInterrupt:
            goes_on = "; with --resume the same command goes on from a checkpoint, if any"
            print("\ninterrupted" + goes_on * bool(s.method), file=sys.stderr)
            raise SystemExit(130) from None
        except (ValueError, OSError, ArithmeticError, RuntimeError, MemoryError) as error:
            if s.debug:
                raise
            if RANK:  # if the first one fails too it says why, and torchrun ends the others
                time.sleep(2)
            who = f"process {RANK} of {PROCESSES}: " if PROCESSES > 1 else ""
            print(f"error: {who}{data.printable(error)}", file=terminal)
            raise SystemExit(2) from None

# ---- Several processes; one may stop here ---------------------------------------------------
# `torchrun --nproc-per-node 2 train.py ...` starts this program twice. Each process takes its part
# of every batch, and the gradients are added up. So all have equal scores, and choose equal masks.
# The first one writes and prints.

RANK, PROCESSES = 0, 1
if all(os.environ.get(name, "").isdigit() for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")):
    RANK, PROCESSES = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])

@contextlib.contextmanager
def joined(device):
    """Inside, the processes hear each other, on GPUs through NCCL, else through gloo."""
    if PROCESSES == 1:
        yield
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    # An optimizer imports this, and starts threads. If it did so later, they would outlive the
    # group, and crash.
    from torch import _dynamo  # noqa: F401
    dist.init_process_group()
    yield
    dist.destroy_process_group()  # not after an error: it could wait for those that go on

def from_first(x):
    """What x is in the first process. All wait for it."""
    if PROCESSES > 1:
        box = [x]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        return box[0]
    return x

def by_first(work, *inputs):
    """What work(*inputs) returns in the first process, which alone does it."""
    return from_first(None if RANK else work(*inputs))

def add_up(tensors):
    """Makes each tensor the sum of those of all processes, in place."""
    if PROCESSES > 1:
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            work.wait()

def part_of(batch):
    """This process's part of a batch, and its share of what the batch asks: a mean over the batch
    is the sum over the parts of share * mean (not so what a teacher adds in mlm)."""
    size, length = batch["input_ids"].shape
    first, end = size * RANK // PROCESSES, size * (RANK + 1) // PROCESSES
    part = {key: x if x is None else x[first:end] for key, x in batch.items()}
    mine = (batch["places"] >= first * length) & (batch["places"] < end * length)
    part |= {"places": batch["places"][mine] - first * length, "labels": batch["labels"][mine]}
    # -100 asks for nothing, but in a regression it is a number.
    asked, of_all = [((x["labels"] != -100) | x["labels"].is_floating_point()).sum().item()
                     for x in (part, batch)]
    return (part, asked / of_all) if asked else (batch, 0.0)  # a mean over nothing is nan

if __name__ == "__main__":
    main()
