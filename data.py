"""Data: GLUE from its TSV files, batches, metrics, and the files that a run leaves.

TASKS holds all that differs between the tasks; a task.json adds one of your own (find_task). A
task becomes texts (read_split), texts become token ids (encode), ids become batches of about equal
length (batches), and logits become the numbers that GLUE reports (evaluate_metrics). Then come the
container of masks, small models and checkpoints, the downloads, what makes files and the terminal
safe, and the demo's language. `reading(path)` makes an error name the file; `whole(path)` writes a
file whole or not at all.

Letters: N examples, B batch, T tokens of the longest member of a batch, C classes.
"""

import contextlib
import csv
import difflib
import hashlib
import http.client
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

# ---- The tasks ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """One row of TASKS, or a task.json. A regression has one label word and no labels; masked
    language modelling (MLM) asks for any word, and its texts are a file of their own."""
    folder: str                     # below --data
    text: tuple                     # the column or the two columns of the text
    label: str                      # the column of the label
    labels: tuple                   # as they stand in the file, in the order of the classes
    words: tuple                    # the label word of each class
    metrics: tuple
    range: tuple = (0, 5)           # of the numbers of a regression
    dev: tuple = ("dev",)           # names of the dev files
    test: tuple = ("test",)
    columns: tuple = ()             # of train and dev where they have no header
    archive: str = ""               # GLUE's zip of it, where that is not named as the folder
    skip_short_lines: bool = False  # QQP's train file has a few
    home: str = "glue"              # the default of --data

    @property
    def regression(self):
        return bool(self.words) and not self.labels

    @property
    def mlm(self):
        return not self.words

YES_NO = {"labels": ("entailment", "not_entailment"), "words": ("Yes", "No")}
TASKS = {
    "cola": Task("CoLA", ("sentence",), "label", ("0", "1"), ("incorrect", "correct"),
                 ("matthews",), columns=("source", "label", "star", "sentence")),
    "sst2": Task("SST-2", ("sentence",), "label", ("0", "1"), ("terrible", "great"),
                 ("accuracy",)),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"), ("No", "Yes"),
                 ("accuracy", "f1")),  # see _fetch_mrpc
    "stsb": Task("STS-B", ("sentence1", "sentence2"), "score", (), ("Yes",),
                 ("pearson", "spearman")),
    "qqp": Task("QQP", ("question1", "question2"), "is_duplicate", ("0", "1"), ("No", "Yes"),
                ("accuracy", "f1"), archive="QQP-clean", skip_short_lines=True),
    "mnli": Task("MNLI", ("sentence1", "sentence2"), "gold_label",
                 ("entailment", "neutral", "contradiction"), ("Yes", "Maybe", "No"),
                 ("accuracy",), dev=("dev_matched", "dev_mismatched"),
                 test=("test_matched", "test_mismatched")),
    "qnli": Task("QNLI", ("question", "sentence"), "label", metrics=("accuracy",),
                 archive="QNLIv2", **YES_NO),
    "rte": Task("RTE", ("sentence1", "sentence2"), "label", metrics=("accuracy",), **YES_NO),
    "wnli": Task("WNLI", ("sentence1", "sentence2"), "label", ("0", "1"), ("No", "Yes"),
                 ("accuracy",)),
    "demo": Task("DEMO", ("sentence",), "label", ("0", "1"), ("terrible", "great"),
                 ("accuracy",), home="demo"),
    "mlm": Task("", (), "", (), (), (), test=(), home=""),
}

BUILT_IN = tuple(TASKS)

def find_task(name):
    """A name in TASKS, or the path of a task.json, which becomes a row there -> its name, for
    a task.json its folder's. Raises FileNotFoundError, and ValueError naming the field."""
    path = Path(name)
    if name in TASKS:
        return name
    expect(path.suffix == ".json" and path.is_file(), f"{name}: no such task; expected a task.json,"
           f" or one of {', '.join(BUILT_IN)}", FileNotFoundError)
    fields, folder = read_json(path), path.resolve().parent
    with reading(path, "a task"):
        return add_task(fields | {"folder": folder.name, "home": str(folder.parent)})

def add_task(fields):
    """The fields of a task.json, which a mask has too, become a row of TASKS -> its name. Raises
    ValueError, TypeError."""
    task = Task(**{"labels": ()} | {name: tuple(x) if isinstance(x, list) else x
                                    for name, x in fields.items()})
    for name in ("text", "labels", "words", "metrics", "dev", "test", "columns"):
        x = getattr(task, name)
        expect(isinstance(x, tuple) and {*map(type, x)} <= {str},
               f"{name}: expected a list of strings")
    n, name = len(task.words), task.folder
    metrics = ["pearson", "spearman"] if task.regression else ["accuracy", "f1", "matthews"]
    metrics = metrics[:1] if n > 2 else metrics
    for field, fine, expected in [
            ("folder", re.fullmatch(r"\w[\w.-]*", name) and name not in BUILT_IN,
             "its name to be of letters, digits and _.-, and of no built-in task"),
            ("dev", len(task.dev) == 1, "the name of a file"),
            ("test", len(task.test) <= 1, "the name of a file, or none"),
            ("text", 1 <= len(task.text) <= 2, "one column, or two"),
            ("label", isinstance(task.label, str), "a column"),
            ("labels", len(task.labels) == len(set(task.labels)) and len(task.labels) != 1,
             "two or more, or none"),
            ("words", len(set(task.words)) == n == max(len(task.labels), 1), "one of its own for "
             "each label, one for a regression"),
            ("metrics", task.metrics and {*task.metrics} <= {*metrics}, ", ".join(metrics)),
            ("range", {*map(type, task.range)} <= {int, float} and len(task.range) == 2
             and -1e6 < task.range[0] < task.range[1] < 1e6, "the least number, the largest")]:
        expect(fine, f"{field}: expected {expected}")
    TASKS[name] = task
    return name

# ---- TSV files ------------------------------------------------------------------------------

LONGEST_FIELD = 100_000  # characters; GLUE's longest has about 2,000

def read_split(task, data_dir, split, limit=None):
    """One file of a task, .tsv or else .csv -> (texts, labels): N strings or pairs; class numbers
    int64 (N,), for a regression float32 (N,), for a test file None.

    `split` is "train" or a name from task.dev or task.test; `limit` keeps the first so many rows.
    Raises ValueError with file and line for what cannot be read."""
    path = Path(data_dir) / task.folder / f"{split}.tsv"
    if not path.is_file() and path.with_suffix(".csv").is_file():
        path = path.with_suffix(".csv")
    expect(path.is_file(), f"{path}: no such file; expected the folder {task.folder} of the task "
           "there (see --data)", FileNotFoundError)
    rows, is_test, columns = read_rows(path), split in task.test, task.columns
    if is_test or not columns:
        _, columns = next(rows, (1, []))
    wanted = task.text if is_test else (*task.text, task.label)
    for column in wanted:
        expect(column in columns, f"{path}, line 1: no column {column!r} in the header; expected "
               f"{', '.join(wanted)}, found {printable(', '.join(columns), 120)}")
    of_text = [columns.index(column) for column in task.text]
    texts, labels = [], []
    if task.skip_short_lines and split == "train":
        rows = ((number, fields) for number, fields in rows if len(fields) >= len(columns))
    for number, fields in itertools.islice(rows, limit):
        place = f"{path}, line {number}"
        _check_fields(place, fields, len(columns))
        text = tuple(fields[i] for i in of_text)
        texts.append(text if len(text) > 1 else text[0])
        if not is_test:
            labels.append(_parse_label(task, fields[columns.index(task.label)], place))
    expect(texts, f"{path}: no examples in it; expected at least one line of data")
    if all(part[:1] == part[-1:] == '"' for text in texts for part in np.atleast_1d(text)):
        print(f"note        {path}: all texts are in quotes, as a spreadsheet writes them; they "
              "are read as they stand, since GLUE quotes nothing")
    expect(split != "train" or min(labels) < max(labels),
           f"{path}: every label is the same; expected two (see --limit)")
    return texts, None if is_test else np.array(labels, np.float32 if task.regression else np.int64)

def split_off(texts, labels, share):
    """A share of the examples, the same in every run -> (texts, labels) of the rest and of the
    share. Raises ValueError where one of the two would be empty."""
    chosen = np.random.default_rng(0).random(len(texts)) < share
    expect(chosen.any() and not chosen.all(),
           f"--holdout {share:g}: too few examples ({len(texts)}) to split")
    return [(list(itertools.compress(texts, part)), labels[part]) for part in (~chosen, chosen)]

def read_corpus(path):
    """The texts of a corpus, a line each, blank ones left out -> {"train": texts, "dev": the last
    5 %}. Raises FileNotFoundError, and ValueError with file and line."""
    expect(path.is_file(), f"{path}: no such file; --corpus is a text file, a text a line",
           FileNotFoundError)
    texts = []
    for number, line in enumerate(read_lines(path), start=1):
        _check_fields(f"{path}, line {number}", [line], 1)
        texts += [line] if line.strip() else []
    expect(len(texts) >= 20, f"{path}: {len(texts)} lines of text; expected 20 at least, so that "
           "some can be held out")
    held_out = math.ceil(len(texts) / 20)
    return {"train": texts[:-held_out], "dev": texts[-held_out:]}

def read_rows(path):
    """Yields (line number, fields) of each line of a .tsv, each record of a .csv."""
    lines = read_lines(path)
    if path.suffix == ".tsv":  # GLUE quotes nothing: at a lone " a csv.reader would merge rows
        yield from ((number, line.split("\t")) for number, line in enumerate(lines, start=1))
        return
    reader = csv.reader((f"{line}\n" for line in lines), strict=True)
    try:
        yield from ((reader.line_num, fields or [""]) for fields in reader)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; mend its quotes") from None

def read_lines(path):
    """The lines of a UTF-8 file. Only a line feed ends one, unlike in str.splitlines."""
    try:
        text = path.read_bytes().decode("utf-8-sig")  # MRPC's begin with a byte order mark
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}); save it as UTF-8") \
            from None
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]

def _check_fields(place, fields, expected):
    expect(len(fields) == expected,
           f"{place}: {len(fields)} columns, expected {expected}; mend it or get the file again")
    expect(not any("\0" in text or len(text) > LONGEST_FIELD for text in fields), f"{place}: a NUL "
           f"byte, or over {LONGEST_FIELD:,} characters in one text; get the file again")

def _parse_label(task, string, place):
    if not task.regression:
        expect(string in task.labels, f"{place}: label {string[:50]!r} is unknown; expected one of "
               f"{', '.join(task.labels)}")
        return task.labels.index(string)
    smallest, largest = task.range
    with contextlib.suppress(ValueError):
        if smallest <= float(string) <= largest:  # not so for nan
            return float(string)
    raise ValueError(f"{place}: score {printable(string, 50)!r}; expected a number from {smallest} "
                     f"to {largest}")

# ---- Tokens and batches ---------------------------------------------------------------------

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")

# What a model's files may say of its tokenizer: SAID has the values that each key may have,
# NORMALIZER the tokenizers library's names of some keys.
NORMALIZER = {"do_lower_case": "lowercase", "strip_accents": "strip_accents",
              "tokenize_chinese_chars": "handle_chinese_chars"}
SAID = dict.fromkeys(NORMALIZER, (True, False)) | {
    "unk_token": ("[UNK]",), "cls_token": ("[CLS]",), "sep_token": ("[SEP]",),
    "pad_token": ("[PAD]",), "mask_token": ("[MASK]",),
    "tokenizer_class": ("BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer",
                        "DistilBertTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"),
}

def load_tokenizer(folder):
    """The WordPiece tokenizer of a model folder, from tokenizer.json or else vocab.txt. Raises
    FileNotFoundError, and ValueError for one that is not BERT's, or whose files ask for what is
    not supported, or contradict each other."""
    path, said = Path(folder) / "tokenizer.json", {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        found = read_json(path.with_name(name)) if path.with_name(name).is_file() else {}
        for key in SAID.keys() & found.keys():
            value = found[key].get("content") if isinstance(found[key], dict) else found[key]
            expect(value is None or value in SAID[key], f"{path.with_name(name)}: {key} is "
                   f"{value!r}; expected {' or '.join(map(str, SAID[key]))}")
            said[key] = value
    asked = {name: said[key] for key, name in NORMALIZER.items() if said.get(key) is not None}
    if not path.is_file():
        path = path.with_name("vocab.txt")
        expect(path.is_file(), f"{path}: no such file, and no tokenizer.json; a model folder needs "
               "one of the two", FileNotFoundError)
    with reading(path, "a tokenizer for BERT"):
        if path.suffix == ".json":
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
            tokenizer.no_padding()  # the file may bring its own; ours belongs to the batch
        else:
            vocab = {token: i for i, token in enumerate(read_lines(path))}
            missing = [token for token in SPECIAL[1:4] if token not in vocab]
            expect(not missing, f"no {missing} in it")
            tokenizer = tokenizers.BertWordPieceTokenizer(vocab, **asked)
        own = json.loads(tokenizer.to_str())["normalizer"] or {}
        for name, value in asked.items():
            expect(own.get(name, value) == value, f"{name} is {own.get(name)}, "
                   f"tokenizer_config.json says {value}; make them agree")
        ends = [tokenizer.encode("a").tokens[place] for place in (0, -1)]
        segments = {*tokenizer.encode("a", "b").type_ids}
        expect(ends == ["[CLS]", "[SEP]"] and segments <= {0, 1},
               "a text must become [CLS] ... [SEP], in segments 0 and 1")
    added = path.with_name("added_tokens.json")
    for token, number in (read_json(added) if added.is_file() else {}).items():
        expect(tokenizer.token_to_id(token) == number, f"{added}: {token!r} is not token {number} "
               f"of {path.name}; make a tokenizer.json of both with transformers")
    return tokenizer

def label_ids(tokenizer, words, source="task"):
    """The token id of each label word (C,), lower-cased where the vocabulary is. Raises ValueError
    for one that is not a single token."""
    ids, unknown = [], tokenizer.token_to_id("[UNK]")
    for word in words:
        found = tokenizer.encode(word, add_special_tokens=False).ids
        if len(found) != 1 or found[0] == unknown:
            near = difflib.get_close_matches(word.lower(), tokenizer.get_vocab())
            raise ValueError(f"{source}: words: {word!r} is not one token of the model's "
                             f"vocabulary; near it are {', '.join(near) or 'none'}")
        ids += found
    expect(len(set(ids)) == len(ids), f"{source}: words: two of them are one token of the model's "
           "vocabulary")
    return torch.tensor(ids)

def class_order(folder, task, n):
    """Where the task's classes stand among the n of an ordinary classifier (C,): by the names that
    id2label in its config.json has for them, or by their numbers in LABEL_0 and the like."""
    path = Path(folder) / "config.json"
    numbered = [f"LABEL_{i}" for i in range(max(n, len(task.words)))]
    with reading(path, "a classifier for this task"):
        found = read_json(path).get("id2label") or {}
        names = [str(found.get(str(i), numbered[i])).lower() for i in range(n)]
        for labels in (task.labels, numbered):
            wanted = [label.lower() for label in labels]
            if sorted(wanted) == sorted(names) and n == len(task.words) == len(set(wanted)):
                return torch.tensor([names.index(label) for label in wanted])
        fine = [", ".join(x) for x in (task.labels, numbered[:len(task.words)]) if x]
        raise ValueError(f"id2label has the classes {', '.join(names)}; expected "
                         f"{'; or '.join(fine)}; mend it")

@dataclass
class Encoded:
    """N tokenised examples: `ids` and `segments` are lists of N lists, `labels` (N,) or None; `pad`
    is the id of padding; `cut` of the texts were too long."""
    ids: list
    segments: list
    labels: np.ndarray
    pad: int = 0
    cut: int = 0

    def __len__(self):
        return len(self.ids)

    def checksum(self):
        labels = None if self.labels is None else self.labels.tolist()
        return checksum(json.dumps([self.ids, self.segments, labels]))

def encode(tokenizer, texts, labels, max_length):
    """Texts (N strings or pairs) -> Encoded. A pair that is too long loses tokens from the end of
    whichever text is longer at the time."""
    expect(max_length >= 5 or isinstance(texts[0], str),
           f"--max-length {max_length}: a pair needs 5 tokens at least")
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    found = tokenizer.encode_batch(texts)
    pad = tokenizer.token_to_id("[PAD]") or 0
    return Encoded([e.ids for e in found], [e.type_ids for e in found], labels, pad,
                   sum(bool(e.overflowing) for e in found))

def encode_corpus(tokenizer, texts, max_length):
    """Texts -> Encoded, a long text in several pieces, without pieces in which no word is known.
    Raises ValueError if none is."""
    tokenizer.enable_truncation(max_length)
    found = [piece for e in tokenizer.encode_batch(texts) for piece in (e, *e.overflowing)]
    special = set(special_ids(tokenizer))
    known = [piece for piece in found if not set(piece.ids) <= special]
    expect(known, f"{printable(texts[0], 80)!r}, and {len(texts) - 1} more lines of the corpus: no "
           "word is in the model's vocabulary")
    return Encoded([e.ids for e in known], [e.type_ids for e in known], None,
                   tokenizer.token_to_id("[PAD]") or 0)

def batches(encoded, batch_size, generator=None):
    """Yields dicts of tensors: index (B,), input_ids and token_type_ids (B, T), attention_mask
    (B, T) or None where nothing is padded, labels (B,) or None, and places (B,): at which of the
    B * T tokens an answer is asked for, here each [CLS].

    With a generator in random order, neighbours in length together. Without one the longest first.
    """
    # Alike in length: padding is wasted work. Longest first: too little memory shows at once.
    lengths = np.array([len(ids) for ids in encoded.ids])
    if generator is None:
        order = np.argsort(-lengths, kind="stable")
    else:
        order = torch.randperm(len(encoded), generator=generator).numpy()
        # 50 batches: enough for batches of one length, few enough to stay random.
        pool = np.arange(len(order)) // (50 * batch_size)
        order = order[np.lexsort([lengths[order], pool])]  # by pool, then by length
    groups = np.split(order, range(batch_size, len(order), batch_size))
    if generator is not None:
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator)]
    for index in groups:
        yield _batch(encoded, index, lengths[index])

def _batch(encoded, index, lengths):
    mask = np.arange(lengths.max()) < lengths[:, None]  # (B, T)
    input_ids, segments = np.full(mask.shape, encoded.pad), np.zeros(mask.shape, np.int64)
    input_ids[mask] = np.concatenate([encoded.ids[i] for i in index])
    segments[mask] = np.concatenate([encoded.segments[i] for i in index])
    return {"index": torch.from_numpy(index),
            "input_ids": torch.from_numpy(input_ids),
            "token_type_ids": torch.from_numpy(segments),
            "attention_mask": None if mask.all() else torch.from_numpy(mask).long(),
            "places": torch.arange(len(index)) * mask.shape[1],
            "labels": None if encoded.labels is None else torch.from_numpy(encoded.labels[index])}

def training_batches(encoded, s, step, ask):
    """The batches of all epochs, from a step on; s has epochs, batch_size and seed. Each epoch has
    its own generator, so a resumed run finds its order again; `ask(batch, generator)`, which says
    what is asked of a batch, draws from it too."""
    if not s.epochs:
        return
    epoch, done = divmod(step, math.ceil(len(encoded) / s.batch_size))
    for number in range(epoch, s.epochs):
        generator = torch.Generator().manual_seed(seed_of(s.seed, number))
        found = (ask(batch, generator) for batch in batches(encoded, s.batch_size, generator))
        yield from itertools.islice(found, done, None)  # those skipped draw their numbers too
        done = 0

def seed_of(*numbers):
    """One seed, of 32 bits, of several numbers; a last one of 0 counts as none. Not their sum:
    seed 1 would begin where seed 0 goes on."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])

def hide_words(batch, tokenizer, generator, rate=0.15, cls_word=False, everywhere=False):
    """Asks for a share of a batch's tokens: 80 % of them become [MASK], 10 % a random token, 10 %
    stay. `places` become the indices of K tokens among the B * T, `labels` (K,) what stood there.
    `everywhere` adds the other tokens, with label -100, for a teacher to be heard there."""
    ids = batch["input_ids"]
    special = torch.tensor(special_ids(tokenizer))
    draw = torch.rand(ids.shape, generator=generator)
    mask = batch["attention_mask"]
    mask = torch.ones_like(ids) if mask is None else mask
    draw[torch.isin(ids, special) | (mask == 0)] = 2  # above any rate
    asked = draw <= max(rate, draw.min())  # one at least; encode_corpus leaves a word in each
    fate = torch.rand(ids.shape, generator=generator)
    random_ids = torch.randint(tokenizer.get_vocab_size(), ids.shape, generator=generator)
    hidden = ids.masked_fill(asked & (fate < 0.8), tokenizer.token_to_id("[MASK]"))
    hidden = torch.where(asked & (fate >= 0.9), random_ids, hidden)
    labels = ids.where(asked, -100)
    if cls_word:  # a word at [CLS] too: the head reads it, and nothing else trains it
        drawn = torch.rand(ids.shape, generator=generator) * (draw < 2)
        labels[:, 0] = ids.gather(1, drawn.argmax(1, keepdim=True))[:, 0]
    places = (mask if everywhere else labels >= 0).flatten().nonzero()[:, 0]
    return batch | {"input_ids": hidden, "places": places, "labels": labels.flatten()[places]}

def special_ids(tokenizer):
    ids = [tokenizer.token_to_id(token) for token in SPECIAL]
    return [i for i in ids if i is not None]

def copy_tokenizer(source, folder):
    """Puts the tokenizer files of a model folder in place of another folder's."""
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            with whole(Path(folder) / name) as part:
                shutil.copyfile(Path(source) / name, part)
        else:
            (Path(folder) / name).unlink(missing_ok=True)

# ---- Metrics and predictions, as GLUE defines them ------------------------------------------

def accuracy(predicted, true):
    return float(np.mean(predicted == true))

def f1(predicted, true):
    """2PR / (P + R) = 2TP / (2TP + FP + FN) of class 1; 0 where there is no positive at all."""
    hits = np.sum((predicted == 1) & (true == 1))
    positives = np.sum(predicted == 1) + np.sum(true == 1)
    return float(2 * hits / positives) if positives else 0.0

def pearson(predicted, true):
    """The linear correlation, in [-1, 1]; 0 where one side is constant."""
    constant = np.ptp(predicted) == 0 or np.ptp(true) == 0
    return 0.0 if constant else float(np.corrcoef(predicted, true)[0, 1])

def spearman(predicted, true):
    """Pearson's of the ranks; equal values share the mean of their ranks."""
    def ranks(x):  # the mean of how many are smaller, and how many are not larger
        in_order = np.sort(x)
        return (np.searchsorted(in_order, x) + np.searchsorted(in_order, x, "right")) / 2

    return pearson(ranks(predicted), ranks(true))

METRICS = {"accuracy": accuracy, "f1": f1, "pearson": pearson, "spearman": spearman,
           "matthews": pearson}  # the same for 0 and 1

def evaluate_metrics(task, logits, labels):
    """Logits (N, C), labels (N,) -> {metric: value}, all as fractions of 1."""
    predicted = logits[:, 0] if task.regression else logits.argmax(1)
    return {name: METRICS[name](predicted, labels) for name in task.metrics}

def prediction_name(task, split):
    """The name of a submission file: CoLA.tsv and the like, MNLI-m.tsv and MNLI-mm.tsv."""
    return task.folder + {"test_matched": "-m", "test_mismatched": "-mm"}.get(split, "") + ".tsv"

def write_predictions(path, task, logits):
    """Logits (N, C) of a test file -> the file that the GLUE site takes: index and prediction,
    labels as in the train file, of a regression a number in its range."""
    if task.regression:
        predicted = [f"{score:.3f}" for score in logits[:, 0].clip(*task.range)]
    else:
        predicted = [task.labels[i] for i in logits.argmax(1)]
    lines = ["index\tprediction", *(f"{i}\t{p}" for i, p in enumerate(predicted))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as part:
        part.write_text("\n".join(lines) + "\n", "utf-8")

def zip_predictions(paths):
    """Packs prediction files into submission.zip beside them, flat; returns its path."""
    path = paths[0].with_name("submission.zip")
    with whole(path) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as z:
        for file in paths:
            z.write(file, file.name)
    return path

# ---- One container: masks, small models, checkpoints ----------------------------------------

# What a file may unpack to, in all and in one tensor. BERT-large has 302 million, 4 in one.
MOST_WEIGHTS, LARGEST_MATRIX = 320_000_000, 20_000_000

def save_packed(path, kind, tensors, header, pack=True):
    """Writes {name: tensor} and a header (a dict that JSON can hold) to a safetensors file, with a
    checksum over both. A bool tensor takes about its entropy. Of another tensor, if it is mostly
    zeros, only the rest and its places are written, unless `pack` is False."""
    stored, shapes = {}, {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        is_mask, n = tensor.dtype == torch.bool, tensor.numel()
        if is_mask or (pack and n <= LARGEST_MATRIX):
            flags = tensor != 0
            few_set = 2 * flags.count_nonzero().item() <= n  # the rarer kind is stored
            if is_mask or few_set:
                key = f"{name}:places" if few_set else f"{name}:holes"
                stored[key] = torch.tensor(encode_gaps((flags == few_set).numpy()))
                shapes[name], tensor = list(tensor.shape), tensor[flags]
        if not is_mask:
            stored[name] = tensor
    check_sizes(shapes)
    header = json.dumps(header | {"shapes": shapes})
    metadata = {"format": f"smp-3-{kind}", "header": header, "sha256": checksum(header, stored)}
    with whole(path) as part:
        safetensors.torch.save_file(stored, part, metadata=metadata)

def check_sizes(shapes):
    sizes = [size for shape in shapes.values() for size in shape]
    expect(all(type(size) is int and size >= 0 for size in sizes), "its shapes are no sizes")
    weights = [0, *map(math.prod, shapes.values())]
    expect(sum(weights) <= MOST_WEIGHTS and max(weights) <= LARGEST_MATRIX,
           f"over {MOST_WEIGHTS:,} weights in all, or {LARGEST_MATRIX:,} in one")

def load_packed(path, kind):
    """Reverses save_packed: ({name: tensor}, header). Raises ValueError, FileNotFoundError."""
    with reading(path, f"a {kind} file"), safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        expect(metadata.get("format") == f"smp-3-{kind}", f"format is {metadata.get('format')!r}; "
               f"expected 'smp-3-{kind}'; one of an earlier version must be made again")
        stored = {name: file.get_tensor(name) for name in file.keys()}
        expect(checksum(metadata["header"], stored) == metadata["sha256"],
               "damaged: the checksum is not that of the content")
        header = json.loads(metadata["header"])
        shapes = header.pop("shapes")
        check_sizes(shapes)
        tensors = {name: tensor for name, tensor in stored.items() if ":" not in name}
        for name, shape in shapes.items():
            few_set = f"{name}:holes" not in stored
            packed = stored[f"{name}:places" if few_set else f"{name}:holes"]
            flags = decode_gaps(packed.numpy(), math.prod(shape)) == few_set
            tensors[name] = torch.from_numpy(flags).view(shape)
            if name in stored:  # the values at those places; a mask has none
                expect(len(stored[name]) == flags.sum(), f"{name} has other values than places")
                zeros = stored[name].new_zeros(shape)
                tensors[name] = zeros.masked_scatter(tensors[name], stored[name])
    return tensors, header

def encode_gaps(flags):
    """Flags of any shape -> bytes: how many unset ones precede each set one, Huffman-coded by zlib.
    0 0 1 1 gives 2 0. A number above 254 is 255 and what is left: 255 gives 255 0."""
    gaps = np.diff(np.flatnonzero(flags), prepend=-1) - 1
    ends = np.cumsum(gaps // 255 + 1)
    symbols = np.full(ends[-1] if len(ends) else 0, 255, np.uint8)
    symbols[ends - 1] = gaps % 255
    coder = zlib.compressobj(9, strategy=zlib.Z_HUFFMAN_ONLY)
    return np.frombuffer(coder.compress(symbols.tobytes()) + coder.flush(), np.uint8)

def decode_gaps(packed, size):
    """The reverse of encode_gaps: bytes -> bool (size,). Raises ValueError for what is damaged."""
    coder = zlib.decompressobj()
    symbols = np.frombuffer(coder.decompress(packed.tobytes(), size + 1), np.uint8)  # 0: no limit
    is_end = symbols < 255
    places = np.cumsum(symbols + is_end, dtype=np.int64)[is_end] - 1  # 2 0 -> 3 1 -> 3 4 -> 2 3
    expect(coder.eof and (not len(places) or places[-1] < size),
           f"its content does not fit {size:,} weights")
    flags = np.zeros(size, bool)
    flags[places] = True
    return flags

def kept_and_total(masks):
    """(weights kept, weights in all), counted from the masks themselves."""
    kept = sum(mask.count_nonzero() for mask in masks.values())
    return int(kept), sum(mask.numel() for mask in masks.values())

def sparsity_of(masks):
    kept, total = kept_and_total(masks)
    return 1 - kept / total if masks else 0.0

def density_table(masks):
    """The percentage that each matrix keeps, layers down, types across, the fuller the darker."""
    kept = {name: 100 * mask.float().mean().item() for name, mask in masks.items()}
    fullest = max(kept.values()) or 1
    rows, same_type = {}, {}
    for name, mask in masks.items():
        _, layer, kind = name.split(".")
        shade = " ░▒▓█"[math.ceil(4 * kept[name] / fullest)]
        rows[layer] = rows.get(layer, f"layer {layer:>2} ") + f" {2 * shade}{kept[name]:>6.1f}"
        same_type.setdefault(kind, {})[name] = mask
    head = "kept, %  " + "".join(f"{kind:>9}" for kind in same_type)
    shares = [100 * (1 - sparsity_of(same)) for same in same_type.values()]
    foot = "all      " + "".join(f"{share:>9.1f}" for share in shares)
    return "\n".join([head, *rows.values(), foot])

# ---- Downloads ------------------------------------------------------------------------------

GLUE_URL = "https://dl.fbaipublicfiles.com"  # or what the environment's GLUE_URL says
LARGEST = 500_000_000  # bytes of a download or a file; GLUE's largest, MNLI's zip, has 313 million
MRPC_HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"

def ensure_downloaded(task, data_dir):
    """Makes sure that a GLUE task's data_dir/<task.folder> is there: fetches it if not. Raises
    OSError or ValueError; what does not arrive whole is not left behind."""
    folder = Path(data_dir) / task.folder
    if folder.is_dir() or task.home != "glue":
        return
    print(f"{folder} is not there: fetching it from the official place")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as scratch:
        fetch = _fetch_mrpc if task.folder == "MRPC" else _fetch_archive
        fetch(task, Path(scratch))
        os.replace(Path(scratch) / task.folder, folder)

def _download(path, scratch):
    """A file below GLUE_URL -> where it lies now."""
    url, file = f"{os.environ.get('GLUE_URL', GLUE_URL)}/{path}", scratch / Path(path).name
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(file, "wb") as target:
            size = int(response.headers.get("Content-Length") or 0)
            with progress_bar(file.name, size or None, unit="B", unit_scale=True) as bar:
                while chunk := response.read(1 << 16):
                    target.write(chunk)
                    bar.update(len(chunk))
                    expect(target.tell() <= LARGEST, "larger than anything in GLUE")
            expect(size in (0, target.tell()),
                   f"broke off after {target.tell()} of {size} bytes; try again")
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise OSError(f"{url}: cannot be fetched ({error}); without a network, put GLUE's TSV "
                      "folders into --data") from None
    return file

def _fetch_archive(task, scratch):
    """Takes the files of a task, and no others, out of its zip."""
    archive = _download(f"glue/data/{task.archive or task.folder}.zip", scratch)
    with reading(archive.name, "GLUE's archive of the task; try again"):
        with zipfile.ZipFile(archive) as z:
            for split in ("train", *task.dev, *task.test):
                name = f"{task.folder}/{split}.tsv"
                expect(z.getinfo(name).file_size <= LARGEST, f"{name} is larger than any in GLUE")
                z.extract(name, scratch)

def _fetch_mrpc(task, scratch):
    """MRPC has no archive: the rows of Microsoft's train file whose pair of ids stands in GLUE's
    list are dev, the rest train, in the order of the file. Test rows get an index for a label."""
    dev_ids, labelled, unlabelled = [
        [line.split("\t") for line in read_lines(_download(path, scratch))] for path in (
            "glue/data/mrpc_dev_ids.tsv", "senteval/senteval_data/msr_paraphrase_train.txt",
            "senteval/senteval_data/msr_paraphrase_test.txt")]
    tables = {"train": [MRPC_HEADER], "dev": [MRPC_HEADER],
              "test": ["index" + MRPC_HEADER.removeprefix("Quality")]}
    for fields in labelled[1:]:
        tables["dev" if fields[1:3] in dev_ids else "train"].append("\t".join(fields))
    for i, fields in enumerate(unlabelled[1:]):
        tables["test"].append("\t".join([str(i), *fields[1:]]))
    (scratch / task.folder).mkdir()
    for split, lines in tables.items():
        path = scratch / task.folder / f"{split}.tsv"
        path.write_text("\n".join(lines) + "\n", "utf-8", newline="\n")

# ---- Files that are whole, whatever happens -------------------------------------------------

def expect(fine, message, error=ValueError):
    if not fine:
        raise error(message)

@contextlib.contextmanager
def reading(path, what):
    """Inside, what a parser raises, but for a missing file, becomes a ValueError that names it."""
    expect(not Path(path).is_dir(), f"{path}: a folder; expected {what}")
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit, SystemExit, FileNotFoundError):
        raise
    except BaseException as error:  # parsers written in Rust may panic, which is no Exception
        raise ValueError(f"{path}: not {what} ({printable(error, 200)})") from None

def read_json(path):
    """A file with a JSON object -> dict. Raises ValueError that names the file."""
    with reading(path, "a JSON file"):
        found = json.loads(path.read_text("utf-8"))
        expect(isinstance(found, dict), "expected an object in braces")
    return found

@contextlib.contextmanager
def whole(path):
    """Gives a temporary name beside `path` to write to. Afterwards the file is there, whole and on
    disk, or what was there before is untouched. Raises OSError that names the file."""
    part = Path(f"{path}.part")
    try:
        part.unlink(missing_ok=True)  # never write through a link
        part.touch()
        mode = part.stat().st_mode  # an ordinary one: safetensors makes files private
        yield part
        part.chmod(mode)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: cannot be written ({error}); what was there before is "
                      "untouched") from None
    finally:
        part.unlink(missing_ok=True)

def claim(folder, names, overwrite, mend="give --overwrite, or another folder"):
    """Raises FileExistsError if the folder holds one of these files, unless they may be replaced.
    To be called before the first of them is written."""
    held = [name for name in names if os.path.lexists(Path(folder) / name)]
    expect(overwrite or not held, f"{folder}: holds {held and held[0]} already; {mend}",
           FileExistsError)

def remove(paths):
    for path in paths:
        path.unlink(missing_ok=True)

def write_log(path, entries):
    """metrics.jsonl: a JSON object a line."""
    with whole(path) as part:
        part.write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")

def read_log(path):
    """The entries of a log, without what is damaged; none if the first is no run's settings."""
    entries = []
    if path.is_file():
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError, RecursionError):
                entries.append(json.loads(line))
    entries = [entry for entry in entries if isinstance(entry, dict) and "event" in entry]
    return entries if entries and entries[0]["event"] == "settings" else []

def compare_settings(path, written, settings):
    """Raises ValueError if a log or a checkpoint was written with other settings than these."""
    for key, value in json.loads(json.dumps(settings)).items():
        expect(written.get(key, value) == value or key in ("out", "device"),  # these may move
               f"{path}: written with {key} {written.get(key)}, this run has {value}; resume with "
               "the flags of that run, or give another --out")

def checksum(text, tensors=()):
    """SHA-256, in hex, of a string and of {name: tensor}, in the order of the names."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

@contextlib.contextmanager
def only_run_in(folder, rank=0):
    """Inside, a second run in the folder is refused. The system drops the lock with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".lock{rank or ''}", "a") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # Windows
            pass
        except BlockingIOError:
            raise FileExistsError(f"{folder}: another run is at work in it; wait for it, or give "
                                  "another --out") from None
        yield

@contextlib.contextmanager
def interruptible(patient=False):
    """Inside, a first ctrl-C or SIGTERM is only noted, in the list that it gives, so that no step
    is torn in two. A second one breaks off at once, unless `patient` (torchrun repeats them)."""
    noted = []

    def note(*_):
        if noted and not patient:
            raise KeyboardInterrupt
        noted.append(True)

    with contextlib.ExitStack() as afterwards:
        for number in (signal.SIGINT, signal.SIGTERM):
            afterwards.callback(signal.signal, number, signal.signal(number, note))
        yield noted
        if noted and not patient:  # it came after the last step: the next seed must not start
            raise KeyboardInterrupt

# ---- The terminal and the machine -------------------------------------------------------------

def printable(text, most=500):
    """Any text as one line for a terminal: white space joined, control characters escaped, cut."""
    line = " ".join(str(text)[:10 * most].split())
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return line if len(line) <= most else line[:most - 4] + " ..."

def progress_bar(name, total, done=0, **kwargs):
    """On a terminal a bar, in a log file a line every half minute."""
    terminal = sys.stderr.isatty()
    pause = 0.1 if terminal else 30
    line = "{desc:<12}{n_fmt:>6}/{total_fmt} |{bar}|{postfix} {remaining} left"
    line += "" if terminal else "\n"
    return tqdm(total=total, initial=done, desc=name, dynamic_ncols=True, bar_format=line,
                mininterval=pause, maxinterval=max(pause, 10), **kwargs)

class Unbreakable:
    """A terminal that may vanish, or lack a character: neither stops a run."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text.encode(encoding, "replace").decode(encoding))

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

def peak_mb(device):
    """The most memory this process has held, in MB: on the GPU if it ran there, else in all."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return 0
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6

# ---- The demo's language: film reviews ------------------------------------------------------

NOUNS = "film plot story script acting cast music ending camera dialogue humour hero".split()
GOOD = "brilliant charming clever elegant fresh funny gripping lively moving witty".split()
BAD = "awkward boring clumsy dull flat messy shallow silly tedious weak".split()
PLAIN = ("the {} was {}", "the {} was really {}", "the {} was rather {}", "i found the {} {}",
         "everybody found the {} {}", "the {} felt {}")
NEGATED = ("the {} was not {}", "the {} was not at all {}", "the {} was never {}",
           "i never found the {} {}", "nobody found the {} {}", "the {} was hardly {}")
OPENERS = ("", "", "", "honestly , ", "for me ", "well , ", "i must say ", "as always ")
VERDICTS = ("it was {}", "overall it was {}", "simply {}", "what a {} film")

def write_demo(folder):
    """Writes a made-up task in SST-2's layout, DEMO/{train,dev,test}.tsv, and what a BERT learns
    its language from: corpus.txt and vocab.txt. Raises FileExistsError rather than replace a file
    that is not the demo's."""
    # No word is sure alone: "hardly dull" is praise. The corpus has no labels, but a text ends in a
    # verdict, "... . overall it was great". No sentence of dev or test is in train or the corpus.
    rng, held_out, files = random.Random(0), set(), {}
    for split, size in {"test": 1000, "dev": 1000, "train": 8000}.items():
        reviews = []
        for _ in range(size):
            reviews.append(_review(rng, held_out))
            if split != "train":
                held_out.add(reviews[-1][0])
        lines = ["sentence\tlabel", *(f"{text}\t{int(good)}" for text, good in reviews)]
        if split == "test":
            lines = ["index\tsentence", *(f"{i}\t{text}" for i, (text, _) in enumerate(reviews))]
        files[f"DEMO/{split}.tsv"] = lines
    corpus = []
    for _ in range(16_000):
        text, good = _review(rng, held_out)
        verdict = rng.choice(VERDICTS).format("great" if good else "terrible")
        corpus.append(f"{text} . {verdict}")
    letters = "abcdefghijklmnopqrstuvwxyz"  # any other word can be spelled with them
    words = sorted({*" ".join(corpus).split(), *letters}) + [f"##{letter}" for letter in letters]
    files |= {"corpus.txt": corpus, "vocab.txt": [*SPECIAL, *words]}
    contents = {Path(folder, name): "\n".join(lines) + "\n" for name, lines in files.items()}
    for path, text in contents.items():
        expect(not path.exists() or path.read_bytes() == text.encode(),
               f"{path}: not the demo's; give another folder as --data", FileExistsError)
    for path, text in contents.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as part:
            part.write_bytes(text.encode())

def _review(rng, held_out):
    """A sentence that is not held out, and whether it is praise."""
    while True:
        good, negated = rng.random() < 0.5, rng.random() < 0.2
        opener, frame = rng.choice(OPENERS), rng.choice(NEGATED if negated else PLAIN)
        words = rng.choice(NOUNS), rng.choice(GOOD if good != negated else BAD)
        text = opener + frame.format(*words)
        if text not in held_out:
            return text, good
