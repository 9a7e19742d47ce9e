"""Static Model Pruning (SMP): adapt a frozen network to a task by choosing which weights to drop.

Jiang et al., "Pruning Pre-trained Language Models Without Fine-Tuning", ACL 2023 (arXiv
2210.06210). Every weight W of a linear layer gets a score S. The forward pass uses

    scores  --top-k-->  mask in {0,1}  --times weight-->  masked_weight  --matmul-->  output
      S                   M                                W' = W * M

and the backward pass treats the mask as if it were the score itself (straight-through), so

    dL/dS = dL/dM = dL/dW' * W             for the kept weights and for the pruned ones alike:

dL/dW' is the output's gradient times the input; the mask is not in it, so a pruned weight hears it too.

Descent on S thus adds up -dL/dW' * W (Eq. 3; Adam rescales it), the "movement" of a weight that never moves: its score
rises while descent, if it were let, would drive it away from zero, and falls while it would drive it to zero. (|W| can be
where scores start, not the score: it never changes, and neither would the mask.) W, the biases, the LayerNorms, the
embeddings and the head stay as they were pre-trained. Learning the scores is all the learning there is, and a task adds one
bit a weight: 10.6 MB (85 as bools) for the 84,934,656 prunable ones of BERT-base. No step gets faster: a 0 is multiplied too.

Read on in the order in which a step needs it:

    Table 3   the masking functions: four rules for the score that is kept      topk_mask, keep_counts
    Eq. 4     SMP-S, the rule of the paper's own                                keep_counts
    Eq. 5     how the sparsity grows over the steps                             sparsity_at
    Eq. 6, 7  task loss + sparsity regulariser; the distillation loss           objective, regularizer, distillation_loss
    Eq. 3     the layer that puts them to use                                   MaskedLinear, prune, choose_masks

Nothing here knows of BERT: `prune` takes any module with nn.Linears in it.

Letters:  n weights of a matrix   N weights of all matrices   L layers   B batch   C classes
Sparsity is always the fraction REMOVED: 0.9 keeps one weight in ten.
"""

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import nn


# ---- Masks: from scores to zeros and ones (Section 4.1) -------------------------------------

class StraightThrough(torch.autograd.Function):
    """The mask forwards, the identity backwards: whatever gradient reaches the mask is handed to the scores, bit for
    bit. The true derivative of a step function is 0 almost everywhere and would teach nothing; this stand-in asks "what if
    this entry were a little more present?", and asks it of pruned entries too, which is how a pruned weight comes back: a
    gradient times the mask would make pruning final. (Only a weight of exactly 0 never hears from the task.)"""

    @staticmethod
    def forward(ctx, scores, mask):
        return mask.to(scores.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def topk_mask(scores, n_keep):
    """The 0/1 mask of the n_keep largest scores, straight-through.

    scores: any shape, any floating dtype; the mask has both. Exactly n_keep ones whatever the ties: among
    equal scores the first, row by row, wins, on every run and device.
        topk_mask([[.1, .7], [.7, .7]], 2)  ->  [[0, 1], [1, 0]]
    Raises ValueError for an n_keep outside [0, n], FloatingPointError for nan or inf in scores."""
    if not 0 <= n_keep <= scores.numel():
        raise ValueError(f"n_keep is {n_keep}; expected 0 to {scores.numel()}, the number of scores")
    return StraightThrough.apply(scores, _topk(scores.detach().flatten(), n_keep, [], scores.dtype).view(scores.shape))


def threshold_mask(scores, tau):
    """The 0/1 mask of the scores with sigmoid(S) > tau, straight-through (Table 3, row T)."""
    return StraightThrough.apply(scores, torch.sigmoid(scores.detach()) > tau)


def _topk(flat, n_keep, past, dtype=torch.bool):
    """Flat scores (n,) -> mask (n,) of a dtype. Where scores start from zero, ties are the rule: after Adam's first step
    every score is +-lr, and weights without a task gradient stay equal for ever. past is a list of the last two
    thresholds of this matrix, for a good guess at the next, and is kept up to date."""
    if not math.isfinite(flat.sum()) and not flat.isfinite().all():  # a sum can also just be too large
        raise FloatingPointError("nan or inf among the scores: the run has diverged")
    if n_keep in (0, len(flat)):
        return torch.full_like(flat, n_keep > 0, dtype=dtype)
    threshold, at_least = _kth_largest(flat, n_keep, past)
    past[:] = past[-1:] + [float(threshold)]
    mask = torch.ge(flat, threshold, out=torch.empty_like(flat, dtype=dtype))
    if surplus := at_least - n_keep:  # the last ties must go: find the first of them, halving the stretch it is in
        ties, start, end = flat == threshold, 0, len(flat)
        while end - start > 1:
            middle = (start + end) // 2
            behind = int(ties[middle:end].count_nonzero())
            start, end, surplus = (middle, end, surplus) if behind >= surplus else (start, middle, surplus - behind)
        torch.gt(flat[start:], threshold, out=mask[start:])
    return mask


def _kth_largest(flat, k, past):
    """The k-th largest of (n,) values and how many are at least as large, exactly, without sorting.

    Guess a bracket. Counting what lies above and inside proves it, and from the few inside the answer is selected.
    A bracket that missed costs time, never truth: the next one, or kthvalue over all, says the same, only later."""
    n, above = len(flat), 0
    for high, low in _brackets(flat, k, past) if n > 16384 and n % 8 == 0 else ():  # eights, see below
        over, least = flat > high, flat >= low
        n_over, n_least = torch.stack([over.count_nonzero(), least.count_nonzero()]).tolist()
        if n_over < k <= n_least:
            if low == high:
                return low, n_least
            eights = (over ^ least).view(torch.int64)  # few flags are set: eight bools, seen as one number, are mostly 0
            hits = eights.nonzero()[:, 0]
            flat = flat.view(-1, 8).index_select(0, hits).view(-1)[eights.index_select(0, hits).view(torch.bool)]
            above = n_over
            break
    threshold = flat.kthvalue(len(flat) - (k - above) + 1).values
    return threshold, above + int((flat >= threshold).count_nonzero())


def _brackets(flat, k, past):
    """Guesses (high, low) at the k-th largest of (n,) values, the cheaper first. In training thresholds move evenly: 19
    times in 20 the next is the last plus 0 to 2 times its last move. And a sample, every 127th value (a prime: a rounder
    stride would see but a few columns of a matrix), says it within 3 standard errors of a rank to either side."""
    if len(past) == 2:
        there = past[1] + 2 * (past[1] - past[0])
        yield max(past[1], there), min(past[1], there)
    sample = flat[::127].contiguous()
    m, share = len(sample), k / len(flat)
    margin = 1 + 3 * math.sqrt(m * share * (1 - share))
    yield tuple(sample.kthvalue(min(max(m - int(rank), 1), m)).values for rank in (m * share - margin, m * share + margin))


def _topk_bitwise(stack, n_keep):
    """_topk for m matrices of one size, float32 (m, n) and counts (m, 1) -> bool (m, n), with no number read by the host.

    Read as int32, floats keep their order, once all bits but the sign of the negative ones are flipped. So a threshold can be
    built from its highest bit down: a bit is set if at least n_keep scores still reach the threshold with it. 32 passes,
    whatever the scores: on a CPU a bracket is fifteen times as fast, but on a GPU it would make the host wait."""
    keys = (stack + 0.0).view(torch.int32)  # + 0.0 makes 0.0 of a -0.0
    keys ^= (keys >> 31) & 0x7FFFFFFF
    threshold = torch.full_like(n_keep, -2 ** 31, dtype=torch.int32)
    for bit in [-2 ** 31] + [2 ** b for b in range(30, -1, -1)]:
        enough = (keys >= threshold ^ bit).sum(1, keepdim=True) >= n_keep
        threshold = torch.where(enough, threshold ^ bit, threshold)
    above, ties = keys > threshold, keys == threshold
    nth = ties.flatten().cumsum(0, dtype=torch.int32).view(ties.shape)  # one long scan: a GPU is slow at a few short ones
    nth -= nth[:, :1] - ties[:, :1].int()
    return above | ties & (nth <= n_keep - above.sum(1, keepdim=True))


# ---- Rules: how many weights each matrix keeps (Table 3, Eq. 4) -----------------------------

RULES = {
    "smp-s":     "each matrix in proportion to R(S) among those of its type (Table 3, S)",
    "smp-l":     "every matrix the same fraction (Table 3, L)",
    "global":    "one threshold over all matrices (Table 3, G)",
    "threshold": "whatever has sigmoid(S) > tau; the sparsity is what lambda makes it (Table 3, T)",
}


def keep_counts(scores, sparsity, rule, tau=0.1):
    """How many weights each matrix keeps: {name: scores} -> {name: count, a 0-dim tensor where the scores are}.

    All four masking functions of Table 3 ask for the largest scores of a matrix and differ only in how far down they go. So
    here is the whole of a rule: a count for each matrix; choose_masks does the rest. The counts sum to exactly
    round((1 - sparsity) * N), except under "threshold", the mask of soft movement pruning, which in the paper does not
    converge while the weights are frozen.

    The type of a matrix is the last part of its name: `layers.3.Q` is a Q. SMP-S compares the L matrices of one type, and l gets

        k_l = k * L * R(S_l) / sum_j R(S_j),     k = 1 - sparsity,  R(S) = mean of sigmoid(S)    (Eq. 4)

    of its weights (the paper writes v for k here, and in Eq. 5 for the sparsity). That is more than there are where R(S_l) is
    over 1/k times the mean: early on the ramp of every run, k being near 1 there, and never with k <= 1/L. The original code
    cuts off the excess and keeps too little; here such a matrix is kept whole and the others of its type share the rest.
    (Where sizes differ, shares go by n_l R(S_l).) Raises ValueError for an unknown rule or a sparsity outside [0, 1]."""
    if rule not in RULES:
        raise ValueError(f"rule is {rule!r}; expected one of {', '.join(RULES)}")
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity is {sparsity}; expected a fraction from 0 to 1, the part to remove")
    scores = {name: s.detach() for name, s in scores.items()}
    size = {name: s.numel() for name, s in scores.items()}
    total = round((1 - sparsity) * sum(size.values()))  # round, since int((1 - 0.9) * 10) is 0
    if rule == "threshold":
        return {name: threshold_mask(s, tau).count_nonzero() for name, s in scores.items()}
    if rule == "global":
        everything = torch.cat([s.flatten() for s in scores.values()])
        parts = topk_mask(everything, total).split(list(size.values()))
        return {name: part.count_nonzero() for name, part in zip(scores, parts)}

    quota = {}
    for kind in dict.fromkeys(name.rpartition(".")[2] for name in scores):
        peers = [name for name in scores if name.rpartition(".")[2] == kind]
        to_share = (1 - sparsity) * sum(size[name] for name in peers)
        # By full: to copy a list of numbers to a GPU would make the host wait.
        n = torch.stack([torch.full((), size[name], dtype=torch.float64, device=scores[name].device) for name in peers])
        R = torch.ones_like(n)  # SMP-L is SMP-S with all R equal
        if rule == "smp-s":  # no 0, for shares divide by it, and no nan: that is for the mask of its own matrix to find
            R = torch.stack([importance(scores[name]) for name in peers]).double().nan_to_num().clamp(min=1e-45)
        # With the j largest R kept whole and the rest at scale * R, what is kept is sum n min(1, scale * R) or more, and for the
        # right j just that. So of the scales at which it is to_share, one for each j, the largest is the right one.
        ordered, order = R.sort(descending=True, stable=True)
        whole = n[order].cumsum(0) - n[order]
        scale = ((to_share - whole) / (n[order] * ordered).flip(0).cumsum(0).flip(0)).amax()
        quota |= zip(peers, (n * (scale * R).clamp(max=1)).unbind())

    # Whole numbers that sum to the total: round down, then one more for the largest fractions.
    quota = torch.stack([quota[name] for name in scores]).round(decimals=6)  # a 4.9999999999 is a 5
    counts = quota.floor()
    by_fraction = (counts - quota).argsort(stable=True)
    one_more = torch.arange(len(counts), device=counts.device) < total - counts.sum()
    counts.scatter_add_(0, by_fraction, one_more.double())
    return dict(zip(scores, counts.long().unbind()))


def importance(scores):
    """R(S) of one matrix: the mean of sigmoid(S), in (0, 1), a scalar tensor. The paper writes a sum, which would pull n times
    as hard (a score 0 of a Q of BERT-base by 1.4, not 2.4e-6); its lambda = 400 is meant for the mean, which its code takes.
    (Unsaid in the paper, that code also divides S by 4 where 70 or 80 % are kept, and by 3 for MNLI at 50 %. It brings the R of
    the matrices closer together, so that Eq. 4 less often asks for more than all. With capped shares it is not needed.)"""
    return torch.sigmoid(scores).mean(dtype=torch.promote_types(scores.dtype, torch.float32))


# ---- Schedule and objective (Eq. 5, 6, 7) ---------------------------------------------------

def sparsity_at(step, ramp_steps, target):
    """The sparsity v_t at a step, v_f being the target and N, here only, the number of ramp_steps (Eq. 5):

        v_t = v_f - v_f (1 - t/N)^3   for t < N,   then v_f

    Fast at first, while there is plenty to drop, slow near the end. With 0 ramp_steps the target holds from step 0 on. After N
    the number of kept weights is fixed, but not which ones. To keep 50 % or less, N is 3,500 in the paper; in its code it is
    the run's steps minus 30,000, negative on small tasks (MRPC: 6,900 - 30,000), where it crashes. In train.py it is a
    fraction of the run, so that no run ends before its target, too dense. (To keep over 70 %, the paper takes 7
    epochs, its code 3,500 or 5,250 steps.)
        sparsity_at(0, 100, 0.9) -> 0     sparsity_at(50, 100, 0.9) -> 0.7875     sparsity_at(100, 100, 0.9) -> 0.9"""
    if step >= ramp_steps:
        return target
    return target - target * (1 - step / ramp_steps) ** 3


def regularizer(scores):
    """The mean of R(S) over a list of score matrices, a scalar in (0, 1).

    Its gradient, sigmoid'(S) / (n times the number of matrices), pulls every score down. Soon nearly all are below 0, from
    whatever start, and there sigmoid' grows with S: what is kept is pulled harder than what is pruned (twice as hard, in the
    middle of a run to 90 %), so the mask keeps moving, and only a weight that the task keeps asking for stays. In the paper,
    MNLI at 3 % kept falls from 80.6 to 69.2 without it. (A mean of means: a Q is pulled four times as hard as a U.)"""
    return sum(importance(s) for s in scores) / len(scores)


@torch.no_grad()
def add_regularizer_gradient(scores, strength):
    """Adds strength * dR/dS to the gradients of a list of scores, in place: what, but for rounding, autograd would get
    from (strength * regularizer(scores)).backward(), matrix by matrix in a third of the time."""
    for s in scores:
        sigmoid = torch.sigmoid(s)
        s.grad.addcmul_(sigmoid, 1 - sigmoid, value=strength / (len(scores) * s.numel()))


def task_loss(logits, labels):
    """Cross-entropy of logits (B, C) with class numbers (B,), or for float labels (B,), a
    regression, the squared error of the only logit (B, 1). Mean over the batch."""
    if labels.is_floating_point():
        return F.mse_loss(logits[:, 0], labels)
    return F.cross_entropy(logits, labels)


def distillation_loss(student_logits, teacher_logits, temperature=2.0):
    """T^2 KL(teacher || student) of the softened distributions softmax(logits / T), logits (B, C),
    summed over classes, mean over the batch. T^2 keeps the gradient's size the same for every T.

    Eq. 7 is KL(student || teacher), without a T; the authors' code, like movement pruning before it, computes this one (with
    T = 2, a = 1/2), which makes the student cover all that the teacher holds possible. One logit has no distribution: a
    regression takes the squared difference of the outputs."""
    if student_logits.shape[1] == 1:
        return F.mse_loss(student_logits, teacher_logits)
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature ** 2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def objective(logits, labels, teacher_logits=None, temperature=2.0, teacher_weight=0.5):
    """L_task, or with a teacher (1 - a) L_task + a distillation_loss, a scalar; a = teacher_weight. The
    whole objective (Eq. 6; there the ramp is v_t / v_f, in train.py it grows over the whole run) is

        L = this + lambda * ramp * regularizer(scores)

    and train.py adds the second part's gradient after the first's, on which lambda is measured (balanced_lambda)."""
    loss = task_loss(logits, labels)
    if teacher_logits is None:
        return loss
    return (1 - teacher_weight) * loss + teacher_weight * distillation_loss(logits, teacher_logits, temperature)


def balanced_lambda(scores, pull=1.0):
    """A lambda to the measure of the model, a float, read off the task gradients g in scores.grad:

        lambda = pull * 4 N rms(g)

    so that scores at 0, where sigmoid' = 1/4, are on average pulled down `pull` times as hard as the task pushes a typical
    score about. train.py takes it at the first batch (a regression's first gradients only find its mean: there the smallest
    of the first twentieth of the steps), and lets it grow from 0 to full strength.

    Why a pull at all, beside what `regularizer` says: Adam rescales every gradient to about size 1, so that with the task
    alone each score would move at one speed, signal or noise. A common pull as large as the noise dominates Adam's divisor,
    and a score moves in proportion to its task gradient. The paper's 400 was chosen for BERT-base and fits no other size: a
    pull of 1 is a lambda of 1,100 to 1,400 for a BERT of 10.6M weights (SST-2, MRPC, CoLA, STS-B), of 18 for the demo's 1.6M.
    (Taken anew at every step it would grow with the gradients, fivefold as masks get sparse; so it is taken once.)"""
    n = sum(s.numel() for s in scores)
    return 4 * pull * math.sqrt(n) * nn.utils.get_total_norm([s.grad for s in scores]).item()


# ---- The layer (Eq. 3) ----------------------------------------------------------------------

class MaskedLinear(nn.Module):
    """A frozen nn.Linear that learns which of its weights to use.

    weight (out, in) and bias (out,) are those of the linear it replaces, bit for bit; scores (out, in) is the one trainable
    parameter. (The methods SMP is compared with thaw the weight: what it then gets is dL/dW = dL/dW' * M, nothing where it
    is pruned.) mask, bool (out, in), keeps all weights until choose_masks is called, and has to be chosen anew
    whenever scores have moved, or been loaded (it is not in the state_dict)."""

    def __init__(self, linear, init):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.scores = nn.Parameter(initial_scores(linear.weight, init))
        self.register_buffer("mask", torch.ones_like(linear.weight, dtype=torch.bool), persistent=False)
        self.past = []  # its last two thresholds, see _brackets
        self.masked_weight = None  # set by folded(), where the mask does not change between batches

    def forward(self, x):                                       # (..., in) -> (..., out)
        masked_weight = self.masked_weight
        if masked_weight is None:
            masked_weight = self.weight * StraightThrough.apply(self.scores, self.mask)
        return F.linear(x, masked_weight, self.bias)


def initial_scores(weight, init):
    """Scores to start from, float32, shaped like the weight: "zero", the paper's; "magnitude", train.py's
    default, |W| over twice the standard deviation of its matrix; or "random".

    With zeros the first cuts fall by noise, and a network that was cut blindly teaches its scores little. From magnitudes
    the first to go are weights that hardly matter. The head start is small: what a standard deviation gives, 25 steps at a
    learning rate of 2e-2 can take away."""
    weight = weight.detach().float()
    if init == "magnitude":
        return weight.abs() / (2 * weight.std()).clamp_min(1e-12)
    return torch.zeros_like(weight) if init == "zero" else torch.rand_like(weight)


def prune(model, names, init="zero"):
    """Freezes all of a model, then gives each nn.Linear in `names` scores. In place; returns
    {name: MaskedLinear}. Raises TypeError for a name that is no nn.Linear."""
    model.requires_grad_(False)
    layers = {}
    for name in names:
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name} is a {type(linear).__name__}; expected an nn.Linear")
        layers[name] = MaskedLinear(linear, init)
        model.set_submodule(name, layers[name])
    return layers


@torch.no_grad()
def choose_masks(layers, sparsity, rule="smp-s", tau=0.1, wait=None):
    """Gives each of {name: MaskedLinear} the mask that its present scores, the sparsity and the rule call for. The whole method
    is a loop over this, forwards, backwards, a step of the optimiser. Returns whether all scores are finite, a bool tensor.

    Reading a number off a GPU makes the host wait for all that is queued there. So there, unless wait is True, matrices of one
    size are stacked and nothing is read (but under "global"); check what is returned whenever you read the loss. On a CPU
    reading is free, and nan or inf raise FloatingPointError at once."""
    scores = {name: layer.scores for name, layer in layers.items()}
    counts, device = keep_counts(scores, sparsity, rule, tau), next(iter(scores.values())).device
    finite = torch.ones((), dtype=torch.bool, device=device)
    if wait or wait is None and device.type == "cpu":
        for name, layer in layers.items():
            layer.mask = _topk(layer.scores.flatten(), int(counts[name]), layer.past).view(layer.scores.shape)
        return finite
    for n in {s.numel() for s in scores.values()}:
        group = [name for name in scores if scores[name].numel() == n]
        stack = torch.stack([scores[name].flatten() for name in group])
        finite &= torch.stack(stack.aminmax()).isfinite().all()
        for name, mask in zip(group, _topk_bitwise(stack, torch.stack([counts[name] for name in group])[:, None])):
            layers[name].mask = mask.view(scores[name].shape)
    return finite


@contextlib.contextmanager
def folded(layers, masks):
    """Inside, the layers use the given {name: mask}, multiplied into the weights once instead of once a batch: what is
    evaluated is exactly what is saved. The same frozen weights serve any number of tasks; another task is another mask."""
    try:
        for name, layer in layers.items():
            layer.masked_weight = layer.weight * masks[name].to(layer.weight)
        yield
    finally:
        for layer in layers.values():
            layer.masked_weight = None
