"""Static Model Pruning (SMP): adapt a frozen network to a task by choosing which weights to drop.

Jiang et al., ACL 2023 (arXiv 2210.06210). Each weight W of a linear layer gets a score S:

    scores S  -- top-k -->  mask M of 0 and 1  -- times W -->  masked weight W'  -->  output

Backward, the mask counts as the scores themselves ("straight-through"):

    dL/dS = dL/dM = dL/dW' * W       for kept and for pruned weights alike    (Eq. 3)

The weights never change. The loss is the task's + lam * the mean of sigmoid(S), and lam grows:

    layers = prune(model, names, "magnitude")
    scores = [layer.scores for layer in layers.values()]
    optimizer = torch.optim.AdamW(scores, lr=2e-2, weight_decay=0.0)
    for step, (x, labels) in enumerate(batches):
        choose_masks(layers, sparsity_at(step, steps // 2, 0.9))
        objective(model(x), labels).backward()
        lam = balanced_lambda(scores) if step == 0 else lam
        add_regularizer_gradient(scores, lam * sparsity_at(step, steps, 1.0))
        optimizer.step()
        optimizer.zero_grad()

Sparsity is the fraction REMOVED. Letters: n weights of a matrix, m matrices, B batch, C classes.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn


# ---- The layer (Eq. 3) ----------------------------------------------------------------------
class StraightThrough(torch.autograd.Function):
    """Forward: x rounded, or scores made a mask. Backward: the identity, so a pruned weight can
    return to the mask."""
    @staticmethod
    def forward(ctx, x, rounded):
        return rounded.to(x.dtype)
    @staticmethod
    def backward(ctx, grad):
        return grad, None

class MaskedProduct(torch.autograd.Function):
    """F.linear(x, W * M, b). Backward, M counts as S: dL/dS = dL/dW' * W (Eq. 3).
    W' is made again there, so between the two it takes no memory. S is here for its gradient."""
    @staticmethod
    def forward(ctx, x, W, M, S, b):
        ctx.save_for_backward(x, W, M)
        return F.linear(x, torch.where(M, W, 0.0), b)  # W * M would copy M as floats
    @staticmethod
    def backward(ctx, grad):  # dL/dy (..., out)
        x, W, M = ctx.saved_tensors
        # Under autocast grad is bfloat16.
        x, rows = x.flatten(0, -2).to(grad.dtype), grad.flatten(0, -2)
        need_x, need_W, _, need_S, need_b = ctx.needs_input_grad
        dx = grad @ torch.where(M, W, 0.0).to(grad.dtype) if need_x else None
        db = rows.sum(0) if need_b else None
        dW = (rows.T @ x).to(W.dtype) if need_W or need_S else None  # dL/dW'
        grad_W = dW * M if need_W else None  # before dW is overwritten
        return dx, grad_W, None, dW.mul_(W) if need_S else None, db

class MaskedLinear(nn.Module):
    """A linear layer with the weight W' = W * M. It takes dense_weight W (out, in) and bias (out,)
    from the linear that it replaces. Its scores S are learned. choose_masks sets its mask M."""
    def __init__(self, linear, init="zero"):
        super().__init__()
        self.dense_weight = linear.weight
        self.bias = linear.bias
        self.scores = nn.Parameter(initial_scores(linear.weight, init))
        self.register_buffer("mask", torch.ones_like(linear.weight).bool(), persistent=False)
        self.folded_weight = None  # a W' that does not change, see folded
        self.last_thresholds = []  # of the last two masks, see _brackets
        self.int8 = False  # see fake_int8
        self.product = F.linear  # another one in folded

    @property
    def weight(self):  # nn.MultiheadAttention reads this and never calls forward
        if self.folded_weight is not None:
            return self.folded_weight
        return self.masked_weight(self.mask)

    def masked_weight(self, mask):  # the definition; MaskedProduct is equal, and takes less memory
        W, M = self.dense_weight, StraightThrough.apply(self.scores, mask)
        if not self.int8:
            return W * M
        # A frozen W is rounded before the mask: all tasks share its bytes.
        return fake_int8(W * M) if W.requires_grad else fake_int8(W) * M

    def forward(self, x):  # (..., in) -> (..., out)
        if self.int8 or self.folded_weight is not None:
            return self.product(fake_int8(x) if self.int8 else x, self.weight, self.bias)
        return MaskedProduct.apply(x, self.dense_weight, self.mask, self.scores, self.bias)

def initial_scores(weight, init):
    """Scores to start from, float32, shaped like the weight. Raises ValueError for another init."""
    weight = weight.detach().float()
    if init == "zero":  # the paper's
        return torch.zeros_like(weight)
    if init == "magnitude":  # so the first weights to go hardly matter
        return weight.abs() / (2 * weight.std()).clamp_min(1e-12)
    if init == "random":
        return torch.rand_like(weight)
    raise ValueError(f"init is {init!r}; expected zero, magnitude or random")

def prune(model, names, init="zero"):
    """Freezes a model and replaces each nn.Linear in `names` by a MaskedLinear, in place.
    Returns {name: MaskedLinear}. Raises TypeError for a name that is no nn.Linear, ValueError for
    BatchNorm statistics that would move. nn.MultiheadAttention's in_proj_weight stays dense."""
    for name, module in model.named_modules():
        if module.training and getattr(module, "track_running_stats", False):
            raise ValueError(f"{name}: its running statistics move in training; call eval() on it")
    model.requires_grad_(False)
    layers = {}
    for name in names:
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name} is a {type(linear).__name__}; expected an nn.Linear")
        layers[name] = MaskedLinear(linear, init)
        model.set_submodule(name, layers[name])
    return layers

# ---- Which weights stay (Section 4.1, Table 3, Eq. 4) ---------------------------------------
def topk_mask(scores, n_keep):
    """The 0/1 mask of the n_keep largest scores, straight-through, shaped like the scores.
    Defined by sorting, the lowest index first among equals (a CPU finds it without, see _search):
        topk_mask([[.1, .7], [.7, .7]], 2)  ->  [[0, 1], [1, 0]]
    Raises ValueError for an impossible n_keep, FloatingPointError for nan or inf."""
    if not 0 <= n_keep <= scores.numel():
        raise ValueError(f"n_keep is {n_keep}; expected 0 to {scores.numel()}")
    if not scores.isfinite().all():
        raise FloatingPointError("nan or inf among the scores")
    return StraightThrough.apply(scores, _search(scores.detach(), int(n_keep), []))

def threshold_mask(scores, tau):
    """The 0/1 mask of the scores with sigmoid(S) > tau, straight-through."""
    return StraightThrough.apply(scores, torch.sigmoid(scores.detach()) > tau)

RULES = {  # Table 3: S, L, G, T
    "smp-s": "the matrices of a type in proportion to R(S)",
    "smp-l": "each matrix the same fraction",
    "global": "one threshold over all matrices",
    "threshold": "whatever has sigmoid(S) > tau; the regulariser sets the sparsity",
}

@torch.no_grad()
def keep_counts(scores, sparsity, rule="smp-s", tau=0.1):
    """How many weights each matrix keeps: {name: scores} -> {name: count, a 0-dim tensor}.
    They sum to round((1 - sparsity) * all weights), but for "threshold". Raises ValueError."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is {sparsity}; expected 0 to 1, the fraction to remove")
    keep, matrices = 1 - sparsity, list(scores.values())
    total = round(keep * sum(s.numel() for s in matrices))
    if rule == "threshold":
        counts = [threshold_mask(s, tau).count_nonzero() for s in matrices]
    elif rule == "global":
        mask = topk_mask(torch.cat([s.flatten() for s in matrices]), total)  # for its counts
        parts = mask.split([s.numel() for s in matrices])
        counts = [part.count_nonzero() for part in parts]
    elif rule == "smp-l":
        counts = whole_numbers(keep * _sizes(matrices), total)
    elif rule == "smp-s":
        counts = whole_numbers(smp_s_shares(scores, keep), total)
    else:
        raise ValueError(f"rule is {rule!r}; expected one of {', '.join(RULES)}")
    return dict(zip(scores, counts, strict=True))

def smp_s_shares(scores, keep):
    """{name: scores} -> how many weights each wants (m,), not yet whole. Of L matrices of a type
    (layers.3.Q is a Q), l keeps the fraction k_l = keep * L * R(S_l) / sum of R (Eq. 4)."""
    types, shares = {}, {}
    for name, s in scores.items():
        types.setdefault(name.rpartition(".")[2], {})[name] = s
    for same in types.values():
        R = torch.stack([importance(s) for s in same.values()]).double()
        R = R.nan_to_num().clamp_min(1e-45)  # a 0 or a nan would spoil the others' shares
        wanted = capped_shares(_sizes(same.values()), R, keep)
        shares.update(zip(same, wanted, strict=True))
    return torch.stack([shares[name] for name in scores])

def importance(scores):
    """R(S) of one matrix: the mean of sigmoid(S), a scalar in (0, 1) (see Details 3)."""
    return torch.sigmoid(scores).mean()

def capped_shares(sizes, R, keep):
    """size * min(1, c R), (m,), with the c at which it sums to keep * sum(sizes) (see Details 2).
        capped_shares([10, 10, 10], [6, 2, 1], 0.6)  ->  [10, 5.3, 2.7]"""
    largest, order = R.sort(descending=True, stable=True)
    n = sizes[order]
    # With the j largest kept whole the others share the rest: a c for each j. At any c the true sum
    # is the least over j of whole + c * others, so the largest of these c is wanted. (In the
    # example they are .2, .27 and -.2 for j = 0, 1, 2: with c = .27 one matrix is kept whole.)
    whole = n.cumsum(0) - n
    others = (n * largest).flip(0).cumsum(0).flip(0)
    c = ((keep * n.sum() - whole) / others).amax()
    return sizes * (c * R).clamp(max=1)

def whole_numbers(shares, total):
    """Shares (m,) -> integers that sum to total: round down, add 1 to the largest remainders.
        whole_numbers([1.5, 2.7, 2.8], 7)  ->  [1, 3, 3]"""
    shares = shares.round(decimals=6)  # so that no device's noise decides a tie
    counts = shares.floor()
    by_remainder = (counts - shares).argsort(stable=True)
    one_more = torch.arange(len(counts), device=counts.device) < total - counts.sum()
    return counts.scatter_add(0, by_remainder, one_more.double()).long()

def _sizes(scores):
    scores = list(scores)
    sizes = torch.tensor([s.numel() for s in scores], dtype=torch.float64)
    return sizes.to(scores[0].device, non_blocking=True)  # the host need not wait for a GPU

@torch.no_grad()
def choose_masks(layers, sparsity, rule="smp-s", tau=0.1):
    """Sets the mask of each of {name: MaskedLinear}: topk_mask of its scores and its count.
    It may miss a nan: to look for one, at every step, would make the host wait for a GPU."""
    scores = {name: layer.scores for name, layer in layers.items()}
    counts = keep_counts(scores, sparsity, rule, tau)
    if all(s.device.type == "cpu" for s in scores.values()):
        for name, layer in layers.items():
            layer.mask = _search(layer.scores, int(counts[name]), layer.last_thresholds)
    else:
        for name, mask in _search_stacked(scores, counts).items():
            layers[name].mask = mask

# ---- Schedule and loss (Eq. 5, 6, 7) --------------------------------------------------------
def sparsity_at(step, ramp_steps, target):
    """The sparsity v_t at step t, with N ramp_steps and the target v_f (Eq. 5):
        v_t = v_f - v_f (1 - t/N)^3   for t < N,   then v_f"""
    if step >= ramp_steps:
        return target
    return target - target * (1 - step / ramp_steps) ** 3

def regularizer(scores):
    """The mean of R(S) over a list of score matrices, a scalar in (0, 1) (Eq. 6).
    It pulls all scores down, soon below 0. There the slope of sigmoid grows with S, so it pulls
    kept ones harder: the mask stays in motion, and a weight stays only if the task keeps asking
    for it."""
    return sum(importance(s) for s in scores) / len(scores)

@torch.no_grad()
def add_regularizer_gradient(scores, strength):
    """What (strength * regularizer(scores)).backward() does, in a third of the time."""
    for s in scores:
        sigmoid = torch.sigmoid(s)
        each = strength / (len(scores) * s.numel())
        s.grad.addcmul_(sigmoid, 1 - sigmoid, value=each)

def task_loss(logits, labels):
    """Logits (B, C), class numbers (B,) -> cross-entropy; -100 asks for nothing. For a regression,
    logits (B, 1) and float labels (B,) -> squared error. A mean over the batch."""
    if labels.is_floating_point():
        return F.mse_loss(logits[:, 0], labels)
    return F.cross_entropy(logits, labels)

def distillation_loss(student_logits, teacher_logits, temperature=2.0):
    """T^2 KL(teacher || student) of softmax(logits / T), logits (B, C), a mean over the batch; for
    a regression, logits (B, 1), the squared difference (Eq. 7, see Details 8)."""
    if student_logits.shape[1] == 1:
        return F.mse_loss(student_logits, teacher_logits)
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    # T^2 keeps the size of the gradient the same for every T.
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)

def objective(logits, labels, teacher_logits=None, temperature=2.0, teacher_weight=0.5):
    """task_loss, or with a teacher the weighted mean of task_loss and distillation_loss, a scalar.
    Eq. 6 is objective + lambda * regularizer."""
    loss = task_loss(logits, labels)
    if teacher_logits is not None:
        distilled = distillation_loss(logits, teacher_logits, temperature)
        loss = (1 - teacher_weight) * loss + teacher_weight * distilled
    return loss

def balanced_lambda(scores, pull=1.0):
    """The lambda at which the regulariser pulls a score at 0, on average, `pull` times as hard as
    the typical task gradient. The regulariser's mean gradient at 0 is 1 / (4 * total)."""
    total = sum(s.numel() for s in scores)
    norm = nn.utils.get_total_norm([s.grad for s in scores])  # rms * sqrt(total)
    return 4 * pull * math.sqrt(total) * norm.item()

# ---- A mask at work -------------------------------------------------------------------------
@contextlib.contextmanager
def folded(layers, masks, product=None):
    """Inside, the layers use the given {name: mask}, multiplied into their weights only once: one
    frozen model serves any number of tasks. product(W') returns what to use instead of F.linear."""
    try:
        for name, layer in layers.items():
            W = layer.masked_weight(masks[name].to(layer.mask.device)).detach()
            layer.folded_weight, layer.product = W, product(W) if product else F.linear
        yield
    finally:
        for layer in layers.values():
            layer.folded_weight, layer.product = None, F.linear

# ---- Prune Once For All and 8 bits, made of the same parts ----------------------------------
def lock(layers):
    """Prune Once For All (arXiv 2111.05754): the mask of a model that is sparse already is W != 0,
    taken once. Its weights may train then: a zero gets the gradient dL/dW' * 0 = 0, so Adam moves
    it by 0, and weight decay is a share of it. It stays a zero, for every task."""
    for layer in layers.values():
        layer.mask = layer.dense_weight.detach() != 0

def to_int8(x):
    """x (..., n) -> q int8 (..., n) from -127 to 127, and a scale a row (..., 1): x ~ q * scale."""
    scale = (x.abs().amax(-1, keepdim=True).float() / 127).clamp_min(1e-12)
    return (x / scale).round().to(torch.int8), scale

def fake_int8(x):
    """What 8 bits leave of x (..., n), straight-through like a mask. A row of W is an output and a
    row of x a token: each has its own scale, taken on the spot, so there is none to learn."""
    q, scale = to_int8(x.detach())
    return StraightThrough.apply(x, q * scale)

# ---- The fast search: what topk_mask defines; a CPU need not sort. One may stop here --------
def _search(scores, k, last_thresholds):
    """Scores -> bool mask of the k largest, the first of equals first. Guess low and high around
    the k-th: what is above high stays, the few between are ranked. A wrong guess costs time."""
    flat = scores.flatten()
    if k in (0, len(flat)):
        return torch.full_like(scores, k > 0, dtype=torch.bool)
    if flat.device.type != "cpu":
        return _search_sorted(flat[None], torch.tensor([k]).to(flat.device)).view(scores.shape)
    for low, high in _brackets(flat, k, last_thresholds):
        mask = flat > high
        between = _positions(mask ^ (flat >= low))
        missing = k - int(mask.count_nonzero())
        if 0 < missing <= len(between):
            break
    else:
        raise FloatingPointError("nan among the scores")  # fewer than k are numbers
    values = flat[between]
    threshold = values.kthvalue(len(values) - missing + 1).values
    above = between[values > threshold]
    equal = between[values == threshold]
    mask[above] = True
    mask[equal[: missing - len(above)]] = True
    last_thresholds[:] = [*last_thresholds[-1:], threshold.item()]  # the last two
    return mask.view(scores.shape)

def _brackets(flat, k, last_thresholds):
    """Guesses (low, high) at the k-th largest of scores (n,), the cheapest first."""
    if len(last_thresholds) == 2:  # it mostly moves on by 0 to 2 times its last move
        before, last = last_thresholds
        ahead = last + 2 * (last - before)
        yield min(last, ahead), max(last, ahead)
    if len(flat) > 16384:  # a sample knows the rank to 3 standard errors
        sample = flat[::127].contiguous()  # a prime: it meets every column
        size, share = len(sample), 1 - k / len(flat)
        error = 3 * math.sqrt(size * share * (1 - share)) + 1
        low = max(int(size * share - error), 1)
        high = min(int(size * share + error) + 1, size)
        yield sample.kthvalue(low).values, sample.kthvalue(high).values
    yield -math.inf, math.inf

def _positions(flags):
    """The indices of the set flags of (n,). Few are set: look at eight at a time, as an int64."""
    if len(flags) % 8:
        return flags.nonzero()[:, 0]
    eights = flags.view(torch.int64).nonzero()[:, 0]
    indices = 8 * eights[:, None] + torch.arange(8)
    return indices[flags[indices]]

def _search_stacked(scores, counts):
    """{name: scores}, {name: count} -> {name: mask}, all matrices of one shape at once."""
    masks = {}
    for shape in {s.shape for s in scores.values()}:
        same = [name for name in scores if scores[name].shape == shape]
        stack = torch.stack([scores[name].flatten() for name in same])
        k = torch.stack([counts[name] for name in same])
        found = _search_sorted(stack, k).view(-1, *shape)
        masks.update(zip(same, found, strict=True))
    return masks

def _search_sorted(stack, k):
    """Scores (m, n) and counts k (m,) -> bool masks (m, n), for a GPU: it sorts fast, and the
    host reads no number."""
    k = k[:, None]
    ranked = stack.sort(1, descending=True).values
    threshold = ranked.gather(1, (k - 1).clamp_min(0))
    above, equal = stack > threshold, stack == threshold
    missing = k - above.sum(1, keepdim=True)
    return above | (equal & (equal.cumsum(1, dtype=torch.int32) <= missing))
