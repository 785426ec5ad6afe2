"""The ops in plain PyTorch: what each of them means, and the oracle that the kernels are tested against.

Same names, arguments and edge cases as :mod:`memdec.ops`; nothing here is fast or frugal. Half precision is computed in
float32; float64 in, float64 out, on every device, so ``op(x.double())`` is the truth for ``op(x)``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from memdec.distributions import SparseDistributions
from memdec.ops import checks

# An uncovered mass below this is rounding: the row counts as whole (interpolate_sparse).
WHOLE_MASS = 1e-6


class AlignmentLoss(NamedTuple):
    """The loss β·KL + (1−β)·CE and its two parts, reduced alike. Only ``total`` carries a gradient."""

    total: Tensor
    kl: Tensor
    ce: Tensor


class VerifiedDraft(NamedTuple):
    """How many drafted tokens of each text stand, and the token that comes after them; both (B,) int64."""

    num_accepted: Tensor
    next_token: Tensor


# ---------------------------------------------------------------------------------------------------------- likelihoods


def token_log_prob(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target] for each row; see :func:`memdec.ops.token_log_prob`."""
    checks.logits("logits", logits)
    checks.tokens("targets", targets, logits.shape[:-1], logits)
    _check_range("targets", targets, logits.shape[-1])
    return _log_softmax(logits).gather(-1, targets.long()[..., None])[..., 0]


def alignment_loss(
    logits: Tensor,
    labels: Tensor,
    teacher: SparseDistributions,
    *,
    beta: float = 0.5,
    ignore_index: int = -100,
    reduction: str = "mean",
    grad_in_place: bool = False,
) -> AlignmentLoss:
    """β·KL(q‖p) + (1−β)·CE, the teacher dense, for autograd to differentiate; see :func:`memdec.ops.alignment_loss`."""
    checks.logits("logits", logits)
    checks.tokens("labels", labels, logits.shape[:-1], logits)
    checks.teacher(teacher, labels.numel(), logits.shape[-1], logits.device)
    checks.fraction("beta", beta)
    checks.reduction(reduction)
    labels = labels.long()
    kept = labels != ignore_index
    _check_range("labels", labels[kept], logits.shape[-1])
    # A row that is ignored is taken out before anything is computed: its NaN must not reach the gradient.
    log_p = _log_softmax(logits.masked_fill(~kept[..., None], 0))
    q = teacher.to_dense(log_p.dtype).reshape(log_p.shape)
    # 0·log 0 = 0, also where the student gives a token no mass: only stored pairs count.
    stored = q > 0
    log_ratio = q.masked_fill(~stored, 1).log() - log_p.masked_fill(~stored, 0)
    kl = (q * log_ratio).sum(-1)
    ce = -log_p.gather(-1, labels.masked_fill(~kept, 0)[..., None])[..., 0]
    # At β of 0 or 1 the part without weight must not bring in its infinities.
    total = kl if beta == 1 else ce * (1 - beta) if beta == 0 else beta * kl + (1 - beta) * ce
    total, kl, ce = (part.masked_fill(~kept, 0) for part in (total, kl, ce))
    if reduction != "none":
        rows = kept.sum().clamp(min=1) if reduction == "mean" else 1
        total, kl, ce = total.sum() / rows, kl.sum() / rows, ce.sum() / rows
    return AlignmentLoss(total, kl.detach(), ce.detach())


def linear_alignment_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: SparseDistributions,
    *,
    bias: Tensor | None = None,
    beta: float = 0.5,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> AlignmentLoss:
    """:func:`alignment_loss` of ``hidden @ weight.T + bias``; see :func:`memdec.ops.linear_alignment_loss`."""
    wide = _wide(hidden)
    logits = hidden.to(wide) @ weight.to(wide).T
    if bias is not None:
        logits = logits + bias.to(wide)
    return alignment_loss(logits, labels, teacher, beta=beta, ignore_index=ignore_index, reduction=reduction)


# ----------------------------------------------------------------------------------------------------------- neighbours


def aggregate_neighbors(
    distances: Tensor,
    token_ids: Tensor,
    *,
    temperature: float,
    vocab_size: int,
    min_prob: float = 0.0,
    max_tokens: int | None = None,
) -> SparseDistributions:
    """q(v) ∝ Σ 1[token = v]·exp(−d/T) by a dense scatter; see :func:`memdec.ops.aggregate_neighbors`.

    A row without neighbours is empty, with residual 0. Ties at the ``max_tokens`` cut go to the lower token id. A token
    whose probability is zero in float32 is not stored.
    """
    checks.floats("distances", distances)
    checks.tensor("token_ids", token_ids)
    checks.positive("temperature", temperature)
    checks.count("vocab_size", vocab_size, 1)
    checks.fraction("min_prob", min_prob)
    if distances.dim() != 2 or token_ids.shape != distances.shape:
        raise ValueError(
            f"token_ids: got shape {tuple(token_ids.shape)} beside distances of {tuple(distances.shape)}, "
            f"wanted two matrices (N, k)"
        )
    if bool(torch.isnan(distances).any()) or bool((distances == -math.inf).any()):
        raise ValueError("distances: got NaN or -inf, wanted numbers (inf marks an absent neighbour)")
    present = (token_ids >= 0) & (distances < math.inf)
    _check_range("token_ids", token_ids[token_ids != -1], vocab_size)
    d = distances.double().masked_fill(~present, math.inf)
    nearest = d.amin(1, keepdim=True) if d.shape[1] else d.new_zeros(d.shape[0], 1)
    weight = torch.where(present, torch.exp((nearest - d) / temperature), torch.zeros_like(d))
    dense = torch.zeros(d.shape[0], vocab_size, dtype=torch.float64, device=d.device)
    dense.scatter_add_(1, token_ids.long().clamp(min=0), weight)
    probs = dense / dense.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    kept = (probs.float() > 0) & (probs >= min_prob)
    if max_tokens is not None:
        checks.count("max_tokens", max_tokens, 1)
        # A stable descending sort leaves equal probabilities in the order of their ids.
        order = torch.sort(probs, dim=1, descending=True, stable=True).indices[:, :max_tokens]
        kept &= torch.zeros_like(kept).scatter_(1, order, True)
    indptr = torch.zeros(d.shape[0] + 1, dtype=torch.int64, device=d.device)
    torch.cumsum(kept.sum(1), 0, out=indptr[1:])
    residual = probs.masked_fill(kept, 0).sum(1).float()
    return SparseDistributions(indptr, kept.nonzero()[:, 1].to(torch.int32), probs[kept].float(), vocab_size, residual)


# ---------------------------------------------------------------------------------------------------------- the mixture


def interpolate(base_logits: Tensor, memory_logits: Tensor, alpha: float | Tensor) -> Tensor:
    """log(α·softmax(memory) + (1−α)·softmax(base)); see :func:`memdec.ops.interpolate`."""
    checks.logits_pair(base_logits, memory_logits)
    wide = torch.promote_types(_wide(base_logits), _wide(memory_logits))
    log_base, log_memory = _log_softmax(base_logits.to(wide)), _log_softmax(memory_logits.to(wide))
    a = _alpha(alpha, base_logits, wide)
    # Where α is 0 or 1 the other term is not multiplied away but never used: it may be NaN.
    mixed = torch.logaddexp(a.log() + log_memory, torch.log1p(-a) + log_base)
    return torch.where(a == 0, log_base, torch.where(a == 1, log_memory, mixed))


def interpolate_log_prob(base_logits: Tensor, memory_logits: Tensor, targets: Tensor, alpha: float | Tensor) -> Tensor:
    """The mixture's log-probability of each target; see :func:`memdec.ops.interpolate_log_prob`."""
    checks.logits_pair(base_logits, memory_logits)
    checks.tokens("targets", targets, base_logits.shape[:-1], base_logits)
    _check_range("targets", targets, base_logits.shape[-1])
    return interpolate(base_logits, memory_logits, alpha).gather(-1, targets.long()[..., None])[..., 0]


def interpolate_argmax(base_logits: Tensor, memory_logits: Tensor, alpha: float | Tensor) -> Tensor:
    """The mixture's likeliest token, the lowest id of equals, −1 for NaN; see :func:`memdec.ops.interpolate_argmax`."""
    log_p = interpolate(base_logits, memory_logits, alpha)
    return torch.where(log_p.isnan().any(-1), -1, log_p.argmax(-1))


def interpolate_sparse(base_logits: Tensor, teacher: SparseDistributions, alpha: float | Tensor) -> Tensor:
    """log(α(q + (1−m)p) + (1−α)p), p = softmax(base), m = Σq; see :func:`memdec.ops.interpolate_sparse`."""
    checks.logits("base_logits", base_logits)
    vocab_size = base_logits.shape[-1]
    checks.teacher(teacher, base_logits.numel() // vocab_size, vocab_size, base_logits.device)
    log_base = _log_softmax(base_logits)
    a = _alpha(alpha, base_logits, torch.float64)
    q = teacher.to_dense(torch.float64).reshape(base_logits.shape)
    mass = q.sum(-1, keepdim=True)
    mass = torch.where(mass >= 1 - WHOLE_MASS, torch.ones_like(mass), mass)
    keep = 1 - a * mass  # the base's share of the mixture
    mixed = torch.logaddexp((a * q).log(), keep.log() + log_base)
    # Where the row is whole and α is 1 the base has no part, NaN or not; where α is 0 the teacher has none.
    return torch.where(a == 0, log_base, torch.where(keep > 0, mixed, q.log())).to(log_base.dtype)


# ------------------------------------------------------------------------------------------------------------- sampling

# interpolate_sample, and so the drafts, use the first two and the last; verify_draft the others.
NOISE_STREAM, COIN_STREAM, ACCEPTANCE_STREAM, RESIDUAL_STREAM, BLOCK_STREAM = 0, 1, 2, 3, 4
DRAW_COLUMNS = 4096  # tokens of a block, of which a draw without cuts first draws one
_GOLDEN = 0x9E3779B97F4A7C15  # 2⁶⁴ / φ: moves the key of one row far from the next one's
_MASK32 = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit draws for each counter and key, in int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply32(0xD2511F53, c0)
        high1, low1 = _multiply32(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def row_keys(value: int | Tensor, num_rows: int, device: torch.device, *, mix_row: bool) -> Tensor:
    """A seed or an offset as int64 (N,). A single seed is moved by its row's index; row 0 keeps it as it is."""
    if isinstance(value, Tensor) and value.dim() > 0:
        return value.reshape(-1)
    if not isinstance(value, Tensor):
        value = torch.tensor(value - 2**64 if value >= 2**63 else value, dtype=torch.int64, device=device)
    rows = torch.arange(num_rows, dtype=torch.int64, device=device)
    return value + rows * (_GOLDEN - 2**64) if mix_row else value.expand(num_rows)


def draws(seed: Tensor, offset: Tensor, stream: int, count: int) -> Tensor:
    """The 32-bit draws 0 … count−1 of each row's stream: int64 (N, count).

    Draw v is word v mod 4 of Philox at counter (v div 4, stream, offset's low half, offset's high half), with the row's
    seed (low half, high half) as key.
    """
    block = torch.arange((count + 3) // 4, dtype=torch.int64, device=seed.device)[None]
    zero = torch.zeros_like(block + seed[:, None])
    low, high = (offset & _MASK32)[:, None] + zero, ((offset >> 32) & _MASK32)[:, None] + zero
    key = ((seed & _MASK32)[:, None] + zero, ((seed >> 32) & _MASK32)[:, None] + zero)
    words = philox((block + zero, zero + stream, low, high), key)
    return torch.stack(words, -1).flatten(1)[:, :count]


def gumbel(draw: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gumbel noise −log(−log1p(−u)) of u = (k + ½)·2⁻³², k a 32-bit draw.

    Above u = ½ the exponential −log1p(−u) is taken as −log(1 − u) from the draw's complement, because u rounds to 1.
    """
    u = ((draw.double() + 0.5) * 2.0**-32).to(dtype)
    rest = (((_MASK32 - draw).double() + 0.5) * 2.0**-32).to(dtype)
    exponential = torch.where(draw < 2**31, -torch.log1p(-u), -rest.log())
    return -exponential.log()


def warp(scores: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Log-probabilities (N, V) with the tokens that may not be drawn at −inf, as transformers' logits warpers do it.

    In their order: divide by the temperature; keep what reaches the k-th largest score (all ties); from the least
    likely up, drop tokens while their running probability is at most 1 − top_p, never the last; drop what has less than
    min_p of the likeliest token's probability.
    """
    scores = scores / temperature
    if top_k > 0:
        scores = scores.masked_fill(scores < scores.topk(min(top_k, scores.shape[-1])).values[..., -1:], -math.inf)
    if top_p < 1:
        ordered, order = torch.sort(scores, dim=-1, stable=True)
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[..., -1] = False
        scores = scores.masked_fill(torch.zeros_like(drop).scatter_(-1, order, drop), -math.inf)
    if min_p > 0:
        probs = scores.softmax(-1)
        scores = scores.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), -math.inf)
    return scores


def interpolate_sample(
    base_logits: Tensor,
    memory_logits: Tensor,
    alpha: float | Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor,
    offset: int | Tensor = 0,
) -> Tensor:
    """A token drawn from the warped mixture; see :func:`memdec.ops.interpolate_sample`.

    Without warpers: a coin of probability α picks one of the two models, and the draw is from that one alone. Without
    cuts the draw is in two steps, a block of the vocabulary and a token of it: see :func:`drawn_in_two`.
    """
    checks.logits_pair(base_logits, memory_logits)
    checks.positive("temperature", temperature)
    checks.count("top_k", top_k)
    checks.fraction("top_p", top_p)
    checks.fraction("min_p", min_p)
    checks.per_row("seed", seed, base_logits)
    checks.per_row("offset", offset, base_logits)
    shape, vocab_size = base_logits.shape[:-1], base_logits.shape[-1]
    num_rows = math.prod(shape)
    seeds = row_keys(seed, num_rows, base_logits.device, mix_row=True)
    offsets = row_keys(offset, num_rows, base_logits.device, mix_row=False)
    if temperature == 1 and top_k == 0 and top_p == 1 and min_p == 0:
        wide = torch.promote_types(_wide(base_logits), _wide(memory_logits))
        a = _alpha(alpha, base_logits, torch.float64).expand(*shape, 1).reshape(num_rows, 1)
        heads = (draws(seeds, offsets, COIN_STREAM, 1).double() + 0.5) * 2.0**-32 < a
        base_rows, memory_rows = (t.to(wide).reshape(num_rows, vocab_size) for t in (base_logits, memory_logits))
        scores = torch.where(heads, memory_rows, base_rows)
        scores = scores - scores.amax(-1, keepdim=True)  # or a common offset would eat the noise's digits
    else:
        log_p = interpolate(base_logits, memory_logits, alpha).reshape(num_rows, vocab_size)
        scores = warp(log_p, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if top_k == 0 and top_p == 1 and min_p == 0:
        return drawn_in_two(scores, seeds, offsets).reshape(shape)
    noise = gumbel(draws(seeds, offsets, NOISE_STREAM, vocab_size), scores.dtype)
    return torch.where(scores.isnan().any(-1), -1, (scores + noise).argmax(-1)).reshape(shape)


def drawn_in_two(scores: Tensor, seeds: Tensor, offsets: Tensor) -> Tensor:
    """Tokens (N,) drawn from softmax(scores), scores (N, V), in two steps; −1 where a score is NaN.

    First a block of DRAW_COLUMNS tokens: the s of largest log Σ exp(scores of block s) + g(s), in float64. Then, of its
    tokens, the v of largest score(v) + g(v). By Gumbel-max the steps have the probabilities P(s) and P(v | s), whose
    product is P(v), as the two g are of different streams.
    """
    rows, vocab_size = scores.shape
    # NaN also where all are −inf (nothing can be drawn) or one is +inf (its softmax is NaN).
    broken = scores.isnan().any(-1)
    blocks = (vocab_size + DRAW_COLUMNS - 1) // DRAW_COLUMNS
    padding = (0, blocks * DRAW_COLUMNS - vocab_size)
    padded = torch.nn.functional.pad(scores.double(), padding, value=-math.inf)
    masses = padded.reshape(rows, blocks, DRAW_COLUMNS).logsumexp(-1)
    block = (masses + gumbel(draws(seeds, offsets, BLOCK_STREAM, blocks), torch.float64)).argmax(-1)
    others = torch.arange(vocab_size, device=scores.device) // DRAW_COLUMNS != block[:, None]
    noise = gumbel(draws(seeds, offsets, NOISE_STREAM, vocab_size), scores.dtype)
    return torch.where(broken, -1, (scores + noise).masked_fill(others, -math.inf).argmax(-1))


# ---------------------------------------------------------------------------------------------------------- speculation


class DraftLaw(NamedTuple):
    """What verify_draft does at each position, as probabilities (B, γ+1, V): NaN where a row in use is broken."""

    draft: Tensor  # q: what the draft must have been drawn from
    accept: Tensor  # the chance that a draft of this token stands
    rest: Tensor  # what is drawn from on rejection
    target: Tensor  # p


def draft_law(
    base_logits: Tensor,
    memory_logits: Tensor,
    alpha: float | Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> DraftLaw:
    """The probabilities by which drafts are accepted, rejected and replaced; see :func:`memdec.ops.verify_draft`.

    Without warpers they are written with what the mixture's structure gives, as the kernels have them: with p and q of
    the general form they must (and, by the tests, do) agree.
    """
    shape = base_logits.shape
    log_base, log_memory = _log_softmax(base_logits), _log_softmax(memory_logits)
    log_mix = interpolate(base_logits, memory_logits, alpha)
    a = _alpha(alpha, base_logits, log_mix.dtype)
    if temperature == 1 and top_k == 0 and top_p == 1 and min_p == 0:
        p, q = log_mix.exp(), log_memory.exp()
        ratio = (log_base - log_memory).exp()  # NaN where neither model can give the token
        accept = torch.where(a == 1, 1.0, a + (1 - a) * torch.where(ratio.isnan(), 0.0, ratio)).clamp(max=1)
        rest = (log_base.exp() - q).clamp(min=0)
    else:
        warped = [
            warp(x.flatten(0, -2), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
            for x in (log_mix, log_memory)
        ]
        p, q = (x.softmax(-1).reshape(shape) for x in warped)
        accept = torch.where(p > 0, p / q, torch.zeros_like(p)).clamp(max=1)  # p > 0 = q: whoever drew it, it stands
        rest = (p - q).clamp(min=0)
    mass = rest.sum(-1, keepdim=True)
    none = 1e-13 if rest.dtype == torch.float64 else 1e-6
    # A memory that cannot be drawn from (NaN) has drafted nothing: whatever stands in its place falls.
    undrawn = q.isnan().any(-1, keepdim=True)
    rest = torch.where(undrawn | (mass <= none) | mass.isnan(), p, rest / mass)
    return DraftLaw(q, torch.where(undrawn & (a < 1), torch.zeros_like(accept), accept), rest, p)


def verify_draft(
    base_logits: Tensor,
    memory_logits: Tensor,
    draft_ids: Tensor,
    alpha: float | Tensor,
    *,
    draft_lengths: Tensor | None = None,
    greedy: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor,
    offset: int | Tensor = 0,
) -> VerifiedDraft:
    """Verification of drafts, a position of a text at a time; see :func:`memdec.ops.verify_draft`."""
    check_draft(base_logits, memory_logits, draft_ids, alpha, draft_lengths)
    checks.positive("temperature", temperature)
    checks.count("top_k", top_k)
    checks.fraction("top_p", top_p)
    checks.fraction("min_p", min_p)
    texts, drafted = draft_ids.shape
    device, vocab_size = base_logits.device, base_logits.shape[-1]
    checks.per_row("seed", seed, base_logits[:, 0])
    checks.per_row("offset", offset, base_logits[:, 0])
    seeds = row_keys(seed, texts, device, mix_row=True)
    offsets = row_keys(offset, texts, device, mix_row=False)
    lengths = torch.full((texts,), drafted) if draft_lengths is None else draft_lengths
    if texts and (int(lengths.min()) < 0 or int(lengths.max()) > drafted):
        raise ValueError(f"draft_lengths: got {int(lengths.min())} to {int(lengths.max())}, wanted 0 to {drafted}")
    a = _alpha(alpha, base_logits, torch.float64).expand(*base_logits.shape[:-1], 1)[..., 0]
    cut = top_k > 0 or top_p < 1 or min_p > 0
    plain = temperature == 1 and not cut
    law = draft_law(base_logits, memory_logits, alpha, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    coins = acceptance_coins(seeds, offsets, drafted + 1)
    accepted, following = [0] * texts, [-1] * texts
    for b in range(texts):
        length = int(lengths[b])
        _check_range("draft_ids", draft_ids[b, :length], vocab_size)
        for i in range(length + 1):
            accepted[b] = i
            key, counter, u = seeds[b : b + 1], offsets[b : b + 1] + i, float(coins[b, i])
            if greedy:
                following[b] = int(interpolate_argmax(base_logits[b, i], memory_logits[b, i], float(a[b, i])))
                stands = i < length and following[b] == int(draft_ids[b, i])
            else:
                # The token after the drafts is drafted and verified as they are.
                x = int(draft_ids[b, i]) if i < length else _drafted(law.draft[b, i], key, counter, cut=cut)
                if plain and u < float(a[b, i]):
                    stands = True
                else:
                    broken = bool(law.target[b, i].isnan().any())
                    stands = x >= 0 and not broken and u < float(law.accept[b, i, x])
                following[b] = x if stands else _drawn(law.rest[b, i], key, counter, RESIDUAL_STREAM)
            if i == length or not stands:
                break
    return VerifiedDraft(torch.tensor(accepted, device=device), torch.tensor(following, device=device))


def acceptance_coins(seeds: Tensor, offsets: Tensor, count: int) -> Tensor:
    """The u of verify_draft for texts (B,) at their offsets and the next ones: float64 (B, count).

    A draft stands where u < p(x) / q(x), so that much is known of it before it is drawn.
    """
    places = offsets[:, None] + torch.arange(count, device=offsets.device)
    found = draws(seeds[:, None].expand_as(places).reshape(-1), places.reshape(-1), ACCEPTANCE_STREAM, 1)
    return ((found.double() + 0.5) * 2.0**-32).reshape(places.shape)


def _drafted(probs: Tensor, seed: Tensor, offset: Tensor, *, cut: bool) -> int:
    """As interpolate_sample draws; −1 for NaN."""
    if cut:
        return _drawn(probs, seed, offset, NOISE_STREAM)
    return int(drawn_in_two(probs.log()[None], seed, offset))


def _drawn(probs: Tensor, seed: Tensor, offset: Tensor, stream: int) -> int:
    """Gumbel-max; −1 for NaN."""
    if bool(probs.isnan().any()):
        return -1
    noise = gumbel(draws(seed, offset, stream, probs.numel())[0], probs.dtype)
    return int((probs.log() + noise).argmax())


def check_draft(
    base_logits: Tensor, memory_logits: Tensor, draft_ids: Tensor, alpha: float | Tensor, lengths: Tensor | None
) -> tuple[float, Tensor | None]:
    """Check the tensors of a verification; α comes back as (number, None) or (0.0, tensor)."""
    checks.logits_pair(base_logits, memory_logits)
    shape = tuple(base_logits.shape)
    if len(shape) != 3 or shape[1] == 0:
        raise ValueError(f"base_logits: got shape {shape}, wanted (B, γ+1, V): γ drafts and the position after them")
    checks.tokens("draft_ids", draft_ids, (shape[0], shape[1] - 1), base_logits)
    if lengths is not None:
        checks.tokens("draft_lengths", lengths, shape[:1], base_logits)
    return checks.alpha(alpha, base_logits)


# -------------------------------------------------------------------------------------------------------------- details


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.to(_wide(logits)), -1)


def _alpha(alpha: float | Tensor, logits: Tensor, dtype: torch.dtype) -> Tensor:
    """α as a tensor that broadcasts to the logits, with a last dimension of 1."""
    value, rows = checks.alpha(alpha, logits)
    if rows is None:
        return torch.full((1,), value, dtype=dtype, device=logits.device)
    if bool(((rows < 0) | (rows > 1) | rows.isnan()).any()):
        raise ValueError(f"alpha: got values from {rows.min().item()} to {rows.max().item()}, wanted 0 to 1")
    return rows.to(device=logits.device, dtype=dtype)[..., None]


def _check_range(name: str, ids: Tensor, vocab_size: int) -> None:
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise ValueError(f"{name}: got ids from {int(ids.min())} to {int(ids.max())}, wanted 0 to {vocab_size - 1}")


def _multiply32(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a·b, both of 32 bits, in int64 without overflow: b is taken in two halves."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
