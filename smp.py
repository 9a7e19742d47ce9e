"""Static Model Pruning (SMP): adapt a frozen network to a task by choosing which weights to drop.

Jiang et al., ACL 2023 (arXiv 2210.06210). Each weight W of a linear layer gets a score S:

    scores S  -- top-k -->  mask M of 0 and 1  -- times W -->  masked weight W'  -->  output

Backward, the mask is treated as the scores themselves ("straight-through"):

    dL/dS = dL/dM = dL/dW' * W       for kept and for pruned weights alike    (Eq. 3)

The weights never change: which of them stay is all that is learned. The loss is the task's, plus
a strength that grows from 0 to lam, times the mean over the matrices of the mean of sigmoid(S):

    layers = prune(model, names)
    scores = [layer.scores for layer in layers.values()]
    optimizer = torch.optim.AdamW(scores, lr=2e-2, weight_decay=0.0)
    for step, (x, labels) in enumerate(batches):
        choose_masks(layers, sparsity_at(step, steps // 2, 0.9))
        objective(model(x), labels).backward()
        lam = balanced_lambda(scores) if step == 0 else lam
        add_regularizer_gradient(scores, lam * sparsity_at(step, steps, 1.0))
        optimizer.step()
        optimizer.zero_grad()
    choose_masks(layers, 0.9)  # the last step moved the scores

Sparsity is the fraction REMOVED. Letters: n weights of a matrix, m matrices, L of them of one type,
B batch, C classes.
"""

import contextlib
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable


# ---- The layer (Eq. 3) ----------------------------------------------------------------------
class MaskedWeight(torch.autograd.Function):
    """W, M (bool), S, all (out, in) -> W' = W * M. Backward, M is treated as S (Eq. 3).
    The same as StraightThrough.apply(S, M) * W, see below, but it saves no float mask."""
    @staticmethod
    def forward(ctx, W, M, S):
        ctx.save_for_backward(W, M)
        return times(W, M)
    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # dL/dW'
        W, M = ctx.saved_tensors
        need_W, _, need_S = ctx.needs_input_grad
        return (times(grad, M) if need_W else None), None, (grad * W if need_S else None)

def times(W, M):
    """W * M. Bytes become floats six times as fast as bools do."""
    return M.view(torch.uint8).to(W.dtype).mul_(W)

class StraightThrough(torch.autograd.Function):
    """Forward: `rounded`, made from x like a mask from scores. Backward: the identity, for kept and
    pruned entries alike. Used by topk_mask, threshold_mask and fake_int8."""
    @staticmethod
    def forward(ctx, x, rounded):
        return rounded.to(x.dtype)
    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, None

class MaskedLinear(nn.Module):
    """A linear layer with the weight W' = W * M. It takes dense_weight W (out, in) and bias (out,)
    from the linear that it replaces. Its scores S can be learned. choose_masks sets its mask M."""
    def __init__(self, linear, init="magnitude"):
        super().__init__()
        self.dense_weight = linear.weight
        self.bias = linear.bias
        self.scores = nn.Parameter(initial_scores(linear.weight, init))
        self.register_buffer("mask", torch.ones_like(linear.weight, dtype=torch.bool))
        self.int8 = False  # see fake_int8
        self.fixed = None  # inside folded: W', and what replaces F.linear

    @property
    def weight(self):  # nn.MultiheadAttention reads this and never calls forward
        return self.fixed[0] if self.fixed else self.masked_weight(self.mask)

    def masked_weight(self, mask):
        W, S = self.dense_weight, self.scores
        if not self.int8:
            return MaskedWeight.apply(W, mask, S)
        if W.requires_grad:
            return fake_int8(MaskedWeight.apply(W, mask, S))
        return MaskedWeight.apply(fake_int8(W), mask, S)  # so tasks share W's bytes

    def forward(self, x):  # (..., in) -> (..., out)
        product = self.fixed[1] if self.fixed else F.linear
        return product(fake_int8(x) if self.int8 else x, self.weight, self.bias)

def initial_scores(weight, init):
    """Scores to start from, float32, shaped like the weight. Raises ValueError for another init."""
    weight = weight.detach().float()
    if init == "zero":  # the paper's
        return torch.zeros_like(weight)
    if init == "magnitude":  # so the first weights to go hardly matter
        # Their rms is 0.5: 25 steps of Adam at the rate 2e-2.
        return weight.abs() / (2 * weight.square().mean().sqrt()).clamp_min(1e-12)
    if init == "random":
        return torch.rand_like(weight)
    raise ValueError(f"init is {init!r}; expected zero, magnitude or random")

def prune(model, names, init="magnitude"):
    """Freezes a model and replaces each nn.Linear in `names` by a MaskedLinear, in place.
    Returns {name: MaskedLinear}. Raises KeyError for an unknown name, TypeError for what is no
    plain nn.Linear, ValueError for BatchNorm statistics that would move. nn.MultiheadAttention's
    in_proj_weight stays dense."""
    modules, names = dict(model.named_modules(remove_duplicate=False)), list(names)
    for name, module in modules.items():
        if module.training and getattr(module, "track_running_stats", False):
            raise ValueError(f"{name}: its running statistics move in training; call eval() on it")
    for name in names:
        linear, kind = modules[name], type(modules[name])
        hooks = [hook for key, value in vars(linear).items() if "_hooks" in key for hook in value]
        shared = sum(module is linear for module in modules.values()) > 1
        if getattr(kind, "forward", None) is not nn.Linear.forward or "weight" not in vars(
                linear)["_parameters"] or hooks or shared:  # own code, hooks, a second name
            raise TypeError(f"{name} is a {kind.__name__}; expected an nn.Linear with its own "
                            "forward and weight, without hooks, under one name")
    model.requires_grad_(False)
    layers = {name: MaskedLinear(modules[name], init) for name in names}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers

# ---- Which weights stay (Section 4.1, Table 3, Eq. 4) ---------------------------------------
def topk_mask(scores, n_keep):
    """The 0/1 mask of the n_keep largest scores, straight-through, shaped like the scores; for any
    network (a MaskedLinear gets its mask from choose_masks). Among equals the lowest index wins:
        topk_mask([[.1, .7], [.7, .7]], 2)  ->  [[0, 1], [1, 0]]
    Raises ValueError for an impossible n_keep, FloatingPointError for nan or inf."""
    if not 0 <= n_keep <= scores.numel():
        raise ValueError(f"n_keep is {n_keep}; expected 0 to {scores.numel()}")
    if not scores.sum().isfinite() and not scores.isfinite().all():  # finite ones may sum to inf
        raise FloatingPointError("nan or inf among the scores")
    k = torch.full((1,), n_keep, device=scores.device)
    return StraightThrough.apply(scores, largest(scores.detach().reshape(1, -1), k).view_as(scores))

def threshold_mask(scores, tau):
    """The 0/1 mask of the scores with sigmoid(S) > tau, straight-through."""
    return StraightThrough.apply(scores, torch.sigmoid(scores.detach()) > tau)

def largest(stack, k):
    """Scores (m, n) and counts k (m,) -> bool masks (m, n) of the k largest of each row: all above
    the row's k-th score, then the first that equal it, until k are kept."""
    on_cpu, k = stack.is_cpu, k.int()
    if on_cpu:  # NumPy finds the k-th without sorting, and compares five times as fast
        wide = torch.promote_types(stack.dtype, torch.float32)  # it has no bfloat16
        stack, k = stack.detach().to(wide).numpy(), k.numpy()
        rows = zip(stack, k.clip(1), strict=True)  # k = 0 is as k = 1; `surplus` drops that one
        threshold = np.stack([np.partition(row, -n)[[-n]] for row, n in rows])
    else:  # a GPU sorts fast
        threshold = stack.sort(1, descending=True).values.gather(1, k.clip(1)[:, None] - 1)
    mask = stack >= threshold
    surplus = mask.sum(1, dtype=k.dtype) - k  # more than one score may equal the threshold
    if not on_cpu or surplus.any():  # a GPU does not look: the host would wait
        equal = stack == threshold
        allowed = equal.sum(1, dtype=k.dtype) - surplus
        mask &= ~equal | (equal.cumsum(1, dtype=k.dtype) <= allowed[:, None])
    return torch.as_tensor(mask)

def two_of_four(scores, n_keep):
    """The bool mask of the two largest of each four neighbours in a row, of equals the first: the
    pattern that NVIDIA's sparse cores take. Scores (out, in), where `in` is a multiple of 4. To
    keep n_keep, some fours stay whole: those that would lose most."""
    fours, kept = scores.detach().unflatten(-1, (-1, 4)), []
    columns = fours.unbind(-1)
    for i, x in enumerate(columns):  # of equals the first counts as larger
        less = [y < x if j < i else y <= x for j, y in enumerate(columns) if j != i]
        # Kept if at least two of the other three are less. A nan never is less, nor more.
        kept.append(sum(smaller.view(torch.uint8) for smaller in less) > 1)
    kept = torch.stack(kept, -1)
    if n_whole := int(n_keep - scores.numel() // 2) // 2:
        lost = fours.masked_fill(kept, 0).sum(-1)
        k = torch.full((1,), n_whole, device=scores.device)
        kept |= largest(lost.reshape(1, -1), k).view_as(lost)[..., None]
    return kept.flatten(-2)

RULES = {  # Table 3's S (the paper's own), L, G and T (which soft movement pruning has too)
    "smp-s": "the matrices of a type in proportion to R(S), the mean of sigmoid(S)",
    "smp-l": "each matrix the same fraction",
    "global": "one threshold over all matrices",
    "threshold": "whatever has sigmoid(S) > tau; the regulariser sets the sparsity",
    "2:4": "two of each four neighbours, so never above a sparsity of 0.5 (not in the paper)",
}

@torch.no_grad()
def keep_counts(scores, sparsity, rule="smp-s", tau=0.1):
    """How many weights each matrix keeps: {name: scores} -> {name: count, a 0-dim tensor}.
    They sum to round((1 - sparsity) * all weights), but for "threshold" and "2:4". Raises
    ValueError for an unknown rule, or a sparsity not in [0, 1]."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is {sparsity}; expected 0 to 1, the fraction to remove")
    keep, matrices = 1 - sparsity, list(scores.values())
    total = round(keep * sum(s.numel() for s in matrices))
    if rule == "threshold":
        counts = [threshold_mask(s, tau).count_nonzero() for s in matrices]
    elif rule == "2:4":
        counts = torch.tensor([s.numel() // 2 + 2 * round(max(0.5 - sparsity, 0) * s.numel() / 2)
                               for s in matrices])
    elif rule == "global":
        everything = torch.cat([s.flatten() for s in matrices])[None]
        mask = largest(everything, torch.full((1,), total, device=everything.device))[0]
        counts = [part.sum() for part in mask.split([s.numel() for s in matrices])]
    elif rule == "smp-l":
        counts = whole_numbers(keep * sizes_of(matrices), total)
    elif rule == "smp-s":
        counts = whole_numbers(smp_s_shares(scores, keep), total)
    else:
        raise ValueError(f"rule is {rule!r}; expected one of {', '.join(RULES)}")
    return dict(zip(scores, counts, strict=True))

def smp_s_shares(scores, keep):
    """{name: scores} -> how many weights each gets (m,), not yet integers. Each type (the last part
    of a name: layers.3.Q is a Q) has L matrices; if they are of one size, matrix l wants the
    fraction k_l = keep * L * R(S_l) / sum of R (Eq. 4)."""
    types, shares = {}, {}
    for name, s in scores.items():
        types.setdefault(name.rpartition(".")[2], {})[name] = s
    for same in types.values():
        R = torch.stack([importance(s) for s in same.values()]).double()
        R = R.nan_to_num().clamp_min(1e-45)  # a 0 or a nan would spoil the others' shares
        wanted = capped_shares(sizes_of(same.values()), R, keep)
        shares.update(zip(same, wanted, strict=True))
    return torch.stack([shares[name] for name in scores])

def importance(scores):
    """R(S) of one matrix: the mean of sigmoid(S), a scalar in (0, 1) (README, Details 3)."""
    return torch.sigmoid(scores).mean()

def capped_shares(sizes, R, keep):
    """size * min(1, c R), (L,), with the c at which it sums to keep * sum(sizes) (Details 2).
        capped_shares([10, 10, 10], [6, 2, 1], 0.6)  ->  [10, 5.3, 2.7]"""
    sorted_R, order = R.sort(descending=True, stable=True)
    n = sizes[order]
    # With the j of largest R kept whole, the others share the rest: a c for each j. The sum at any
    # c is the least over j of whole_j + c * others_j, as each takes the less of 1 and c R. It is
    # the total where none of these is below the total: at the largest c.
    # (In the example they are .2, .27 and -.2 for j = 0, 1, 2: with c = .27 one is kept whole.)
    whole = n.cumsum(0) - n
    others = (n * sorted_R).flip(0).cumsum(0).flip(0)
    c = ((keep * n.sum() - whole) / others).amax()
    return sizes * (c * R).clamp(max=1)

def whole_numbers(shares, total):
    """Shares (m,), float64 -> integers that sum to total: rounded down, and 1 more for those with
    the largest remainders.
        whole_numbers([1.5, 2.7, 2.8], 7)  ->  [1, 3, 3]"""
    shares = shares.round(decimals=6)  # so that no device's noise decides a tie
    counts = shares.floor()
    by_remainder = (counts - shares).argsort(stable=True)
    one_more = torch.arange(len(counts), device=counts.device) < total - counts.sum()
    return counts.scatter_add(0, by_remainder, one_more.double()).long()

def sizes_of(scores):
    scores = list(scores)
    sizes = torch.tensor([s.numel() for s in scores], dtype=torch.float64)
    return sizes.to(scores[0].device, non_blocking=True)  # the host need not wait for a GPU

@torch.no_grad()
def choose_masks(layers, sparsity, rule="smp-s", tau=0.1):
    """Sets the mask of each of {name: MaskedLinear}: the largest of its scores, as many as
    keep_counts says. A nan is no error here, since to look for one would make the host wait: it is
    not kept, fewer stay, and in smp-s its matrix may lose all to the others of its type."""
    scores = {name: layer.scores.detach() for name, layer in layers.items()}
    counts, groups = keep_counts(scores, sparsity, rule, tau), {}
    if rule == "2:4":
        for name, s in scores.items():
            layers[name].mask = two_of_four(s, counts[name])
        return
    for name, s in scores.items():  # a GPU takes all of one shape at once, a CPU one by one
        groups.setdefault(name if s.is_cpu else s.shape, []).append(name)

    def choose(names):
        rows = [scores[name].reshape(1, -1) for name in names]
        stack = torch.cat(rows) if len(rows) > 1 else rows[0]
        masks = largest(stack, torch.stack([counts[name] for name in names]))
        for name, mask in zip(names, masks, strict=True):
            layers[name].mask = mask.view_as(scores[name])

    # NumPy's search takes one thread, so a CPU searches several matrices at a time.
    threads = torch.get_num_threads() if all(s.is_cpu for s in scores.values()) else 1
    with ThreadPoolExecutor(threads) as pool:
        list((pool.map if threads > 1 else map)(choose, groups.values()))

# ---- Schedule and loss (Eq. 5, 6, 7) --------------------------------------------------------
def sparsity_at(step, ramp_steps, target):
    """The sparsity v_t at step t, with N ramp_steps and the target v_f (Eq. 5):
        v_t = v_f - v_f (1 - t/N)^3   for t < N,   then v_f"""
    if step >= ramp_steps:
        return target
    return target - target * (1 - step / ramp_steps) ** 3

def regularizer(scores):
    """The mean of R(S) over a list of score matrices, a scalar in (0, 1) (Eq. 6).
    It pulls all scores down, in time below 0. There the slope of sigmoid grows with S, so it pulls
    kept ones harder: a weight stays only if the task keeps asking for it."""
    return sum(importance(s) for s in scores) / len(scores)

@torch.no_grad()
def add_regularizer_gradient(scores, strength):
    """What (strength * regularizer(scores)).backward() does, in a fifth of the time."""
    for s in scores:
        slope = torch.sigmoid(s)
        slope.addcmul_(slope, slope, value=-1)  # sigmoid - sigmoid^2; in place, as memory is slow
        s.grad = torch.zeros_like(s) if s.grad is None else s.grad
        s.grad.add_(slope, alpha=strength / (len(scores) * s.numel()))

def distillation_loss(student_logits, teacher_logits, temperature=2.0):
    """T^2 KL(teacher || student) of softmax(logits / T), logits (B, C), a mean over the batch; for
    a regression, logits (B, 1), the squared difference (Eq. 7, Details 8)."""
    if student_logits.shape[1] == 1:
        return F.mse_loss(student_logits, teacher_logits)
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    # T^2 keeps the size of the gradient the same for every T.
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)

def objective(logits, labels, teacher_logits=None, temperature=2.0, teacher_weight=0.5):
    """The loss, a mean over the batch: cross-entropy of logits (B, C) and class numbers (B,), -100
    skipped; for a regression the squared error of logits (B, 1) and float labels (B,). With a
    teacher, the weighted mean of that and distillation_loss. Eq. 6: this + lambda * regularizer."""
    if labels.is_floating_point():
        loss = F.mse_loss(logits[:, 0], labels)
    else:
        loss = F.cross_entropy(logits, labels)
    if teacher_logits is not None:
        distilled = distillation_loss(logits, teacher_logits, temperature)
        loss = (1 - teacher_weight) * loss + teacher_weight * distilled
    return loss

def balanced_lambda(scores, pull=1.0):
    """The lambda at which the regulariser pulls a score at 0, on average, `pull` times as hard as
    the typical task gradient, which is read off scores.grad. (At 0 the gradient of a
    regulariser of strength 1 is, in the mean, 1 / (4 * total).)"""
    total = sum(s.numel() for s in scores)
    grads = [s.grad for s in scores if s.grad is not None]
    norm = nn.utils.get_total_norm(grads)  # rms * sqrt(total)
    return 4 * pull * math.sqrt(total) * norm.item()

# ---- A mask at work -------------------------------------------------------------------------
@contextlib.contextmanager
def folded(layers, masks, make_product=None):
    """Inside, the layers use the given {name: mask}, multiplied into their weights only once: one
    frozen model serves any number of tasks. make_product(W') returns what replaces F.linear."""
    with contextlib.ExitStack() as afterwards:
        for name, layer in layers.items():
            W = layer.masked_weight(masks[name].to(layer.mask.device)).detach()
            afterwards.callback(setattr, layer, "fixed", layer.fixed)
            layer.fixed = W, make_product(W) if make_product else F.linear
        yield

# ---- Prune Once For All and 8 bits, made of the same parts. One may stop here ---------------
def lock(layers):
    """Prune Once For All (arXiv 2111.05754): the mask of a model that is sparse already is W != 0,
    taken once. Its weights may train then: a zero gets the gradient dL/dW' * 0 = 0, so Adam moves
    it by 0, and weight decay scales a 0. It stays a zero, for every task."""
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
