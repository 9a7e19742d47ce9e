"""GLUE from its TSV files: what the tasks are, how they are read, batched and scored.

One table, TASKS, holds all that differs between the nine tasks (and the demo, a tenth). A task
becomes text (read_split), text becomes token ids in one call of the tokenizer (encode), ids become
batches of about equal length (batches), and logits become the numbers that GLUE reports
(evaluate_metrics). Where the files are missing, ensure() gets them from their official places. What
a task ships is written here too: submission files for GLUE's site, and the mask (save_masks).

Letters:  N examples   B batch   T tokens, of the longest member of a batch   C classes
"""

import http.client
import json
import math
import os
import random
import tempfile
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm


# ---- The tasks ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Task:
    """One row of the table. `labels` are the strings of the TSV in the order of the classes,
    `words` the label word of each class; a regression has one word and no labels."""
    folder: str                      # below --data
    text: tuple                      # the column, or the two columns, of the sentence(s)
    label: str                       # the column of the label
    labels: tuple                    # () for a regression
    words: tuple
    metrics: tuple
    dev: tuple = ("dev",)            # names of the dev files
    test: tuple = ("test",)
    columns: tuple = ()              # of train and dev where their first line is an example, no header (CoLA; its test has one)
    archive: str = ""                # its zip below GLUE_URL/glue/data/
    skip_short_lines: bool = False   # QQP's official train file has a few
    lengths: tuple = ()              # of train's examples, in tokens: shortest, nine deciles, longest (for benchmarks)

    @property
    def regression(self):
        return not self.labels


# The label words are the paper's. (The original code mixes up those of MNLI: it takes them through
# the order in which its teacher happened to number the labels.)
YES_NO = dict(labels=("entailment", "not_entailment"), words=("Yes", "No"), metrics=("accuracy",))
TASKS = {
    "cola": Task("CoLA", ("sentence",), "label", ("0", "1"), ("incorrect", "correct"), ("matthews",),
                 columns=("source", "label", "star", "sentence"), archive="CoLA",
                 lengths=(4, 7, 8, 9, 10, 10, 11, 12, 14, 17, 47)),
    "sst2": Task("SST-2", ("sentence",), "label", ("0", "1"), ("terrible", "great"), ("accuracy",),
                 archive="SST-2", lengths=(3, 4, 6, 7, 8, 10, 13, 16, 20, 27, 66)),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"), ("No", "Yes"), ("accuracy", "f1"),
                 lengths=(19, 36, 41, 45, 50, 53, 57, 61, 64, 70, 103)),
    "stsb": Task("STS-B", ("sentence1", "sentence2"), "score", (), ("Yes",), ("pearson", "spearman"),
                 archive="STS-B", lengths=(10, 16, 18, 19, 21, 23, 25, 28, 35, 51, 125)),
    "qqp": Task("QQP", ("question1", "question2"), "is_duplicate", ("0", "1"), ("No", "Yes"), ("accuracy", "f1"),
                archive="QQP-clean", skip_short_lines=True),
    # The annotators' own labels, label1 to label5 or only label1, stand before the gold one.
    "mnli": Task("MNLI", ("sentence1", "sentence2"), "gold_label", ("entailment", "neutral", "contradiction"),
                 ("Yes", "Maybe", "No"), ("accuracy",), archive="MNLI",
                 dev=("dev_matched", "dev_mismatched"), test=("test_matched", "test_mismatched")),
    "qnli": Task("QNLI", ("question", "sentence"), "label", archive="QNLIv2", **YES_NO),
    "rte": Task("RTE", ("sentence1", "sentence2"), "label", archive="RTE", **YES_NO),
    "wnli": Task("WNLI", ("sentence1", "sentence2"), "label", ("0", "1"), ("No", "Yes"), ("accuracy",),
                 archive="WNLI"),
    "demo": Task("DEMO", ("sentence",), "label", ("0", "1"), ("terrible", "great"), ("accuracy",)),
}


# ---- TSV files ------------------------------------------------------------------------------

def read_split(task, data_dir, split, limit=None):
    """One file of a task -> (texts, labels): texts a list of N strings, or of N pairs; labels a
    float32 array (N,) for a regression, else int64 class numbers (N,); None for a test split.

    `split` is "train" or a name from task.dev or task.test; `limit` keeps the first so many lines.
    GLUE quotes nothing, so a lone " is text (csv.reader would silently lose 97 lines of MRPC's train),
    and only a tab or a line feed ever separates. Columns are found by name. A last line without a
    line feed (CoLA's dev) is a line. Raises ValueError with file and line for what cannot be read."""
    path = Path(data_dir) / task.folder / f"{split}.tsv"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the GLUE folder {task.folder} there (see --data)")
    try:
        text = path.read_bytes().decode("utf-8-sig")  # MRPC's start with a byte order mark
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    is_test = split in task.test
    columns = task.columns if task.columns and not is_test else lines.pop(0).split("\t")
    first_line = 1 if task.columns and not is_test else 2
    wanted = task.text if is_test else (*task.text, task.label)
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise ValueError(f"{path}, line 1: no column {missing[0]!r} in the header; expected "
                         f"{', '.join(map(repr, wanted))}, found {', '.join(map(repr, columns))[:120]}")
    *text_columns, label_column = [columns.index(column) for column in wanted] + ([None] if is_test else [])

    texts, labels = [], []
    for number, line in enumerate(lines[:limit], start=first_line):
        fields = line.split("\t")
        if len(fields) != len(columns):
            if task.skip_short_lines and len(fields) < len(columns) and split == "train":
                continue
            raise ValueError(f"{path}, line {number}: {len(fields)} columns, expected {len(columns)}; "
                             "mend the line or get the file again")
        if "\0" in line:
            raise ValueError(f"{path}, line {number}: a NUL byte; the file is damaged, get it again")
        texts.append(fields[text_columns[0]] if len(text_columns) == 1 else tuple(fields[c] for c in text_columns))
        if not is_test:
            labels.append(_parse_label(task, fields[label_column], path, number))
    if not texts:
        raise ValueError(f"{path}: no examples in it; expected at least one line of data")
    return texts, None if is_test else np.array(labels, np.float32 if task.regression else np.int64)


def _parse_label(task, string, path, number):
    if not task.regression:
        if string not in task.labels:
            raise ValueError(f"{path}, line {number}: label {string!r} is unknown; expected one of "
                             f"{', '.join(task.labels)}")
        return task.labels.index(string)
    try:
        score = float(string)
    except ValueError:
        score = float("nan")
    if not 0 <= score <= 5:  # also turns nan away
        raise ValueError(f"{path}, line {number}: score {string!r}; expected a number from 0 to 5")
    return score


# ---- Tokens and batches ---------------------------------------------------------------------

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")


def load_tokenizer(folder):
    """The WordPiece tokenizer of a model folder, from tokenizer.json or else from vocab.txt (lower
    case unless tokenizer_config.json says otherwise). Raises FileNotFoundError, ValueError."""
    folder = Path(folder)
    whole, vocab, config = folder / "tokenizer.json", folder / "vocab.txt", folder / "tokenizer_config.json"
    if whole.is_file():
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(whole))
        except Exception as error:  # the Rust side raises a bare Exception
            raise ValueError(f"{whole}: not a tokenizer file ({error})") from None
        tokenizer.no_padding()  # the file may bring its own; ours belongs to the batch
        tokenizer.no_truncation()
        return tokenizer
    if not vocab.is_file():
        raise FileNotFoundError(f"{vocab}: no such file, and no tokenizer.json; a model folder needs one of the two")
    try:
        lower = not config.is_file() or json.loads(config.read_text("utf-8")).get("do_lower_case", True)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{config}: not valid JSON ({error}); expected a tokenizer's settings") from None
    try:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece.from_file(str(vocab), unk_token="[UNK]"))
    except Exception as error:
        raise ValueError(f"{vocab}: not a vocabulary ({error}); expected a token a line, in UTF-8") from None
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = [(token, tokenizer.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
    for token, number in special:
        if number is None:
            raise ValueError(f"{vocab}: no {token} in it; expected a BERT vocabulary, a token a line")
    tokenizer.post_processor = tokenizers.processors.BertProcessing(*special)
    return tokenizer


def label_ids(tokenizer, words):
    """The token id of each label word (C,), lower-cased where the vocabulary is: looked up as they stand,
    Yes, Maybe and No would all be [UNK]. Raises ValueError for one that is not a single token."""
    ids = [tokenizer.encode(word, add_special_tokens=False).ids for word in words]
    for word, found in zip(words, ids):
        if len(found) != 1 or found[0] == tokenizer.token_to_id("[UNK]"):
            raise ValueError(f"label word {word!r} is not one token of this vocabulary")
    return torch.tensor([found[0] for found in ids])


@dataclass
class Encoded:
    """N tokenised examples: `ids` and `segments` are lists of N lists, `labels` (N,) or None."""
    ids: list
    segments: list
    labels: np.ndarray

    def __len__(self):
        return len(self.ids)


def encode(tokenizer, texts, labels, max_length):
    """Texts (N strings or pairs) -> Encoded, in one batch call. A pair that is too long loses
    tokens from the end of whichever sentence is longer at the time ("longest first")."""
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    encodings = tokenizer.encode_batch(texts)
    return Encoded([e.ids for e in encodings], [e.type_ids for e in encodings], labels)


def batches(encoded, batch_size, generator=None):
    """Yields dicts of tensors: index (B,), input_ids and token_type_ids (B, T), attention_mask
    (B, T) or None where nothing is padded, labels (B,) or None.

    Padding is wasted work (the original code pads all to 128), so a batch is formed among neighbours
    in length. With a generator the examples are shuffled first, sorted only inside pools of 50
    batches, and the batches shuffled again: the order is random, the lengths in a batch are not.
    Without one, longest first, so that a batch that does not fit into memory fails at the start."""
    lengths = np.array([len(ids) for ids in encoded.ids])
    if generator is None:
        order = np.argsort(-lengths, kind="stable")
    else:
        order = torch.randperm(len(encoded), generator=generator).numpy()
        pool = 50 * batch_size
        order = np.concatenate([chunk[np.argsort(lengths[chunk], kind="stable")]
                                for chunk in np.split(order, range(pool, len(order), pool))])
    groups = np.split(order, range(batch_size, len(order), batch_size))
    if generator is not None:
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator)]
    for index in groups:
        longest = lengths[index].max()
        input_ids, segments, mask = np.zeros((3, len(index), longest), np.int64)  # [PAD] is 0 in every BERT
        for row, i in enumerate(index):
            input_ids[row, :lengths[i]] = encoded.ids[i]
            segments[row, :lengths[i]] = encoded.segments[i]
            mask[row, :lengths[i]] = 1
        yield {"index": torch.from_numpy(index),
               "input_ids": torch.from_numpy(input_ids),
               "token_type_ids": torch.from_numpy(segments),
               "attention_mask": None if mask.all() else torch.from_numpy(mask),
               "labels": None if encoded.labels is None else torch.from_numpy(encoded.labels[index])}


# ---- Metrics, as GLUE defines them ----------------------------------------------------------

def accuracy(predicted, true):
    return float(np.mean(predicted == true))


def f1(predicted, true):
    """2PR / (P + R) = 2TP / (2TP + FP + FN) of class 1; 0 where there is no positive at all."""
    errors_and_hits = np.sum(predicted == 1) + np.sum(true == 1)
    return float(2 * np.sum((predicted == 1) & (true == 1)) / errors_and_hits) if errors_and_hits else 0.0


def matthews(predicted, true):
    """Correlation of two binary variables, in [-1, 1]; 0 where one of them is constant."""
    return pearson(predicted, true)


def pearson(predicted, true):
    """Linear correlation, in [-1, 1]; 0 where one side is constant."""
    p, t = (np.asarray(x, np.float64) - np.mean(x, dtype=np.float64) for x in (predicted, true))
    norms = np.sqrt(np.sum(p * p)) * np.sqrt(np.sum(t * t))
    return float(np.sum(p * t) / norms) if norms > 0 else 0.0


def spearman(predicted, true):
    """Pearson of the ranks; equal values share the mean of their ranks."""
    def ranks(x):
        _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
        last = np.cumsum(counts)
        return (last - (counts - 1) / 2)[inverse]
    return pearson(ranks(predicted), ranks(true))


METRICS = {"accuracy": accuracy, "f1": f1, "matthews": matthews, "pearson": pearson, "spearman": spearman}


def evaluate_metrics(task, logits, labels):
    """Logits (N, C), labels (N,) -> {metric: value}, all as fractions of 1."""
    predicted = logits[:, 0] if task.regression else logits.argmax(1)
    return {name: METRICS[name](predicted, labels) for name in task.metrics}


def write_predictions(task, split, logits, folder):
    """Logits (N, C) of a test split -> the file that the GLUE site takes, folder/CoLA.tsv and the
    like (MNLI-m and MNLI-mm): index and prediction, labels as in the train file, STS-B a number
    from 0 to 5. Returns its path."""
    name = task.folder + {"test_matched": "-m", "test_mismatched": "-mm"}.get(split, "")
    if task.regression:
        predicted = [f"{score:.3f}" for score in logits[:, 0].clip(0, 5)]
    else:
        predicted = [task.labels[i] for i in logits.argmax(1)]
    path = Path(folder) / f"{name}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["index\tprediction", *(f"{i}\t{p}" for i, p in enumerate(predicted))]) + "\n", "utf-8")
    return path


def zip_predictions(paths):
    """Packs prediction files into submission.zip beside them, flat; returns its path."""
    path = paths[0].with_name("submission.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for file in paths:
            z.write(file, file.name)
    return path


# ---- The mask file: at most about one bit a weight ------------------------------------------

def save_masks(path, masks, metadata):
    """Writes {name: mask} to a safetensors file with `metadata` (anything JSON can hold) in its header. For each kept weight
    a byte says how many pruned ones lie since the last (255: add 255 and read on), so 0 0 1 1 becomes 2 0; zlib Huffman-codes
    the bytes. Where most weights are kept, the gaps are those between the pruned. That comes within 3 % of the entropy, from 3 to
    97 % kept: 0.48 bits a weight where one in ten is kept, and 0.2 where 3 % are. The file appears whole or not at all."""
    packed, inverted = {}, [name for name, mask in masks.items() if 2 * mask.count_nonzero() > mask.numel()]
    for name, mask in masks.items():
        gaps = np.diff(np.flatnonzero(mask.detach().cpu().numpy() != (name in inverted)), prepend=-1) - 1
        ends = np.cumsum(gaps // 255 + 1)
        symbols = np.full(ends[-1] if len(ends) else 0, 255, np.uint8)
        symbols[ends - 1] = gaps % 255
        coder = zlib.compressobj(9, strategy=zlib.Z_HUFFMAN_ONLY)
        packed[name] = np.frombuffer(coder.compress(symbols.tobytes()) + coder.flush(), np.uint8)
    header = {"shapes": {name: list(mask.shape) for name, mask in masks.items()}, "inverted": inverted, "metadata": metadata}
    header = {"format": "smp-mask-2"} | {key: json.dumps(value) for key, value in header.items()}
    save_file(packed, f"{path}.part", metadata=header)
    os.replace(f"{path}.part", path)


def load_masks(path):
    """The reverse of save_masks: a path -> ({name: bool mask}, metadata). Raises ValueError for what is no whole mask file."""
    try:
        with safe_open(path, "np") as file:
            header = file.metadata() or {}
            if header.get("format") != "smp-mask-2":
                raise ValueError(f"format is {header.get('format')!r}; expected a mask file, 'smp-mask-2'")
            shapes, inverted, metadata = (json.loads(header[key]) for key in ("shapes", "inverted", "metadata"))
            masks = {}
            for name, shape in shapes.items():
                symbols = np.frombuffer(zlib.decompress(file.get_tensor(name).tobytes()), np.uint8)
                found = (np.cumsum(symbols + (symbols < 255), dtype=np.int64) - 1)[symbols < 255]
                mask = torch.full((math.prod(shape),), name in inverted)
                mask[torch.from_numpy(found)] = name not in inverted
                masks[name] = mask.view(shape)
    except (SafetensorError, ValueError, LookupError, AttributeError, TypeError, RuntimeError, IsADirectoryError, zlib.error) as error:
        raise ValueError(f"{path}: not a whole mask file ({error})") from None
    return masks, metadata


# ---- The demo: a small language of film reviews, for machines without network, data or patience

NOUNS = "film plot story script acting cast music ending camera dialogue humour hero".split()
GOOD = "brilliant charming clever elegant fresh funny gripping lively moving witty".split()
BAD = "awkward boring clumsy dull flat messy shallow silly tedious weak".split()
PLAIN = ("the {} was {}", "the {} was really {}", "the {} was rather {}", "i found the {} {}",
         "everybody found the {} {}", "the {} felt {}")
NEGATED = ("the {} was not {}", "the {} was not at all {}", "the {} was never {}", "i never found the {} {}",
           "nobody found the {} {}", "the {} was hardly {}")
OPENERS = ("", "", "", "honestly , ", "for me ", "well , ", "i must say ", "as always ")
VERDICTS = ("it was {}", "overall it was {}", "simply {}", "what a {} film")


def write_demo(folder, seed=0, sizes=(("test", 1000), ("dev", 1000), ("train", 8000)), n_corpus=16_000):
    """Writes a made-up task in SST-2's layout, folder/DEMO/{train,dev,test}.tsv, and what a BERT
    learns its language from: corpus.txt, a text a line, and vocab.txt.

    Words alone do not tell: "hardly dull" is praise. The corpus has no labels, but each of its
    reviews ends in a verdict, "... . overall it was great", so that the label words occur where
    they belong. No sentence of dev or test is in train or in the corpus."""
    rng = random.Random(seed)
    held_out = set()

    def review():
        """A sentence that dev and test do not hold, and whether it is praise."""
        while True:
            good, negated = rng.random() < 0.5, rng.random() < 0.2
            text = rng.choice(OPENERS) + rng.choice(NEGATED if negated else PLAIN).format(
                rng.choice(NOUNS), rng.choice(GOOD if good != negated else BAD))
            if text not in held_out:
                return text, good

    folder = Path(folder)
    (folder / "DEMO").mkdir(parents=True, exist_ok=True)
    for split, size in sizes:
        header = "index\tsentence" if split == "test" else "sentence\tlabel"
        rows = []
        for i in range(size):
            text, good = review()
            if split != "train":
                held_out.add(text)
            rows.append(f"{i}\t{text}" if split == "test" else f"{text}\t{int(good)}")
        (folder / f"DEMO/{split}.tsv").write_text("\n".join([header, *rows]) + "\n", "utf-8")
    corpus = []
    for _ in range(n_corpus):
        text, good = review()
        corpus.append(f"{text} . " + rng.choice(VERDICTS).format("great" if good else "terrible"))
    letters = "abcdefghijklmnopqrstuvwxyz"  # any other word can be spelled with them, as in BERT's own vocabulary
    words = sorted({*" ".join(corpus).split(), *letters}) + [f"##{letter}" for letter in letters]
    (folder / "corpus.txt").write_text("\n".join(corpus) + "\n", "utf-8")
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *words]) + "\n", "utf-8")


def write_random(folder, task, n=1000, seed=0):
    """Writes a train.tsv and a dev.tsv of n examples that mean nothing, in the task's layout and the lengths of its real
    ones, and a vocab.txt of BERT's size: enough to measure speed with, where there is no network."""
    if not task.lengths:
        known = ", ".join(name for name in TASKS if TASKS[name].lengths)
        raise ValueError(f"no lengths are known of {task.folder}; expected one of {known}, or --model and --data for the real thing")
    rng = random.Random(seed)
    words = [*SPECIAL, *map(str.lower, task.words)]
    words += [f"w{i}" for i in range(len(words), 30522)]
    columns = task.columns or (*task.text, task.label)
    rows = [] if task.columns else [columns]
    for _ in range(n):
        decile = rng.randrange(10)
        length = rng.randint(*task.lengths[decile:decile + 2]) - 1 - len(task.text)  # [CLS], and a [SEP] behind each text
        parts = [" ".join(rng.choices(words[100:], k=max((length + i) // len(task.text), 1))) for i, _ in enumerate(task.text)]
        label = rng.choice(task.labels or ("0", "2.5", "5"))
        rows.append((dict.fromkeys(columns, "-") | dict(zip(task.text, parts)) | {task.label: label}).values())
    folder = Path(folder)
    (folder / task.folder).mkdir(parents=True, exist_ok=True)
    for split in ("train", *task.dev):
        (folder / task.folder / f"{split}.tsv").write_text("\n".join(map("\t".join, rows)) + "\n", "utf-8")
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", "utf-8")


# ---- Downloads ------------------------------------------------------------------------------

GLUE_URL = "https://dl.fbaipublicfiles.com"  # the environment's GLUE_URL goes before it
MRPC_HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"


def ensure(task, data_dir):
    """Makes sure that data_dir/<task.folder> is there, fetching it if not. Raises OSError,
    ValueError; what does not arrive whole is not left behind."""
    folder = Path(data_dir) / task.folder
    if folder.is_dir():
        return folder
    print(f"{folder} is not there: fetching it from the official place")
    base = os.environ.get("GLUE_URL", GLUE_URL)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as scratch:
        scratch = Path(scratch)
        if task.folder == "MRPC":
            _build_mrpc(base, scratch)
        else:
            archive = _download(f"{base}/glue/data/{task.archive}.zip", scratch / "archive.zip")
            _unpack(archive, scratch)
        if not (scratch / task.folder / "train.tsv").is_file():
            raise ValueError(f"{task.archive}.zip: no {task.folder}/train.tsv in it; expected GLUE's archive of the task")
        os.replace(scratch / task.folder, folder)
    return folder


def _download(url, path):
    try:
        with urllib.request.urlopen(url, timeout=30) as response, open(path, "wb") as file:
            size = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=size or None, unit="B", unit_scale=True, desc=url.rpartition("/")[2]) as bar:
                while chunk := response.read(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))
    except (OSError, http.client.HTTPException) as error:
        raise OSError(f"{url}: cannot be fetched ({error}); without a network, put GLUE's TSV folders into --data") from None
    if size and path.stat().st_size != size:
        raise OSError(f"{url}: broke off after {path.stat().st_size} of {size} bytes; try again")
    return path


def _unpack(archive, folder):
    """Unpacks a zip only if each of its members stays inside the folder."""
    try:
        with zipfile.ZipFile(archive) as z:
            for name in z.namelist():
                if not (folder / name).resolve().is_relative_to(folder.resolve()):
                    raise ValueError(f"{archive.name}: member {name!r} would leave its folder; not unpacked")
            z.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{archive.name}: not a whole zip file ({error}); try again") from None


def _build_mrpc(base, scratch):
    """MRPC has no archive: the rows of Microsoft's train file whose pair of ids stands in GLUE's
    list are dev, the rest train, in the order of the file. The test rows get an index in front."""
    folder = scratch / "MRPC"
    folder.mkdir()

    def get(url, name):
        return _download(f"{base}/{url}", scratch / name).read_text("utf-8-sig").splitlines()
    dev_ids = {tuple(line.split("\t")) for line in get("glue/data/mrpc_dev_ids.tsv", "ids")}
    rows = [line.split("\t") for line in get("senteval/senteval_data/msr_paraphrase_train.txt", "train")[1:]]
    tests = [line.split("\t") for line in get("senteval/senteval_data/msr_paraphrase_test.txt", "test")[1:]]
    test_header = "index\t" + MRPC_HEADER.partition("\t")[2]
    tables = {"train": [MRPC_HEADER], "dev": [MRPC_HEADER], "test": [test_header]}
    for row in rows:
        tables["dev" if tuple(row[1:3]) in dev_ids else "train"].append("\t".join(row))
    tables["test"] += ["\t".join([str(i), *row[1:]]) for i, row in enumerate(tests)]
    for split, lines in tables.items():
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", "utf-8")
