"""verify_draft: how many drafted tokens stand, and the token after them: speculative decoding of the mixture."""

from __future__ import annotations

import torch
from torch import Tensor

from memdec import _C
from memdec.ops import checks, launch, reference
from memdec.ops.mixture import alpha_rows, described_pair
from memdec.ops.reference import VerifiedDraft
from memdec.ops.registration import is_traced, register
from memdec.ops.rows import address, key_rows


def verify_draft(
    base_logits: Tensor,  # (B, γ+1, V) any float dtype
    memory_logits: Tensor,  # (B, γ+1, V) any float dtype
    draft_ids: Tensor,  # (B, γ) int64, drawn from the memory
    alpha: float | Tensor,  # broadcasts to (B, γ+1)
    *,
    draft_lengths: Tensor | None = None,  # (B,) int64
    greedy: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Tensor,  # or int64 (B,)
    offset: int | Tensor = 0,  # or int64 (B,)
) -> VerifiedDraft:
    """Verify what the memory drafted against the mixture p = α·softmax(memory) + (1−α)·softmax(base).

    Speculative sampling (Leviathan et al., ICML 2023) with the memory as drafter. In order, draft x stands with
    probability min(1, p(x) / q(x)); the first that does not is replaced by a draw from (p − q)₊, normalised; where all
    stand, one more token is drawn from p, the *mixture*. Whatever the drafts, accepted tokens and next token together
    have exactly the law of p, if draft i was drawn from q, which is

    - without warpers, softmax(memory): then p/q = α + (1−α)·p_base/p_mem, and (p − q)₊ ∝ (p_base − p_mem)₊;
    - with warpers, the memory's own distribution under the same warpers, while p is the mixture's under them, as
      transformers would warp its log-probs.

    Draft i of every text is thus drawn by (memory_logits (B, V) of that position)::

        interpolate_sample(memory_logits, memory_logits, 1.0, seed=seed, offset=offset + i, <the same warpers>)

    Acceptance and replacement use other Philox streams than drafts do, so all share seed and offset. A round that ends
    with n accepted has used what lies at offset … offset + n: the next one starts at offset + n + 1, and the noise
    of the drafts that fell is free to be used again. The token after the last draft is drafted here, with the noise
    that a draft of its position has, and verified like one: a text so depends on its seed and on offsets, not on
    how many tokens are drafted at a time (but for rounding).

    Args:
        base_logits: (B, γ+1, V): at position i of text b, the logits of the token that draft i proposes; position γ
            is the one after the last draft. −inf is a masked token.
        memory_logits: the same shape.
        draft_ids: (B, γ); what lies behind a text's length is not looked at.
        alpha: weight of the memory, in [0, 1]: a number, or a float tensor that broadcasts to (B, γ+1).
        draft_lengths: (B,) how many drafts a text has, from 0 to γ; None is γ for all.
        greedy: a draft stands while it is the mixture's likeliest token, which comes next; warpers, seed and
            offset are not used.
        temperature: as for :func:`interpolate_sample`, and so are the next three.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together reach this probability; 1 keeps all.
        min_p: keep tokens with at least this share of the likeliest token's probability; 0 keeps all.
        seed: 64 bits: one number, moved by the text's index, or one a text.
        offset: 64 bits: one number, or one a text.

    Returns:
        ``VerifiedDraft(num_accepted, next_token)``, both (B,) int64. next_token is −1 where there is nothing to draw:
        the round ends at a position of which a row in use holds a NaN, a +inf or nothing but −inf. (Without warpers
        only rows that were looked at count: a coin of probability α accepts a draft before.) On CUDA it ends with −1,
        too, at a draft or an α of a tensor that is out of range, and at once in a text whose length is. A seed gives
        the same text on the CPU and on CUDA, but for scores within rounding of each other.

    Raises:
        TypeError: an argument of another type or dtype than above.
        ValueError: shapes or devices that do not match, numbers out of range; on the CPU, or with ``MEMDEC_DEBUG=1``,
            also draft ids, lengths and a tensor's α.

    Example:
        >>> import torch
        >>> from memdec import ops
        >>> logits = torch.tensor([[[0.0, 9.0, 0.0], [5.0, 0.0, 0.0]]])
        >>> ops.verify_draft(logits, logits, torch.tensor([[1]]), 0.5, greedy=True, seed=0)
        VerifiedDraft(num_accepted=tensor([1]), next_token=tensor([0]))
    """
    alpha, alphas = reference.check_draft(base_logits, memory_logits, draft_ids, alpha, draft_lengths)
    checks.kernels(base_logits=base_logits, memory_logits=memory_logits)
    temperature = checks.positive("temperature", temperature)
    top_k = min(checks.count("top_k", top_k), checks.MAX_VOCABULARY)
    top_p, min_p = checks.fraction("top_p", top_p), checks.fraction("min_p", min_p)
    texts = base_logits[:, 0]
    seed, seeds = checks.per_row("seed", seed, texts)
    offset, offsets = checks.per_row("offset", offset, texts)
    arguments = (
        alpha,
        alphas,
        draft_lengths,
        bool(greedy),
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        seeds,
        offset,
        offsets,
    )
    if is_traced(base_logits, memory_logits, draft_ids, alphas, draft_lengths, seeds, offsets):
        return VerifiedDraft(*torch.ops.memdec.verify_draft(base_logits, memory_logits, draft_ids, *arguments))
    return VerifiedDraft(*_kernel(base_logits, memory_logits, draft_ids, *arguments))


def _kernel(
    base_logits: Tensor,
    memory_logits: Tensor,
    draft_ids: Tensor,
    alpha: float,
    alphas: Tensor | None,
    draft_lengths: Tensor | None,
    greedy: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    seeds: Tensor | None,
    offset: int,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    base_logits, memory_logits, base, memory = described_pair(base_logits, memory_logits)
    device = base_logits.device
    alphas, alpha_address = alpha_rows(alphas, base_logits.shape[:-1], device)
    texts, drafted = draft_ids.shape
    draft_ids = draft_ids.long().contiguous()
    if draft_lengths is not None:
        draft_lengths = draft_lengths.long().contiguous()
    if checks.DEBUG and device.type == "cuda":
        _check_values(draft_ids, draft_lengths, base_logits.shape[-1])
    accepted = torch.empty(texts, dtype=torch.int64, device=device)
    next_token = torch.empty(texts, dtype=torch.int64, device=device)
    seeds, *seed_rows = key_rows("seed", seeds)
    offsets, *offset_rows = key_rows("offset", offsets)
    launch.run(
        _C.verify_draft,
        device,
        base,
        memory,
        alpha,
        alpha_address,
        texts,
        drafted,
        address("draft_ids", draft_ids),
        0 if draft_lengths is None else address("draft_lengths", draft_lengths),
        greedy,
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        *seed_rows,
        offset,
        *offset_rows,
        accepted.data_ptr(),
        next_token.data_ptr(),
    )
    return accepted, next_token


def _check_values(draft_ids: Tensor, draft_lengths: Tensor | None, vocab_size: int) -> None:
    """What the CPU kernel checks, with its words. Waits for the device."""
    if draft_lengths is not None:
        checks.in_range("draft_lengths", draft_lengths, draft_ids.shape[1] + 1, None)
        place = torch.arange(draft_ids.shape[1], device=draft_ids.device)
        draft_ids = draft_ids.masked_fill(place >= draft_lengths[:, None], 0)  # is not looked at
    checks.in_range("draft_ids", draft_ids, vocab_size, None)


def _fake(base_logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    texts = base_logits.shape[0]
    return (
        base_logits.new_empty((texts,), dtype=torch.int64),
        base_logits.new_empty((texts,), dtype=torch.int64),
    )


register(
    "verify_draft(Tensor base_logits, Tensor memory_logits, Tensor draft_ids, float alpha, Tensor? alphas, "
    "Tensor? draft_lengths, bool greedy, float temperature, int top_k, float top_p, float min_p, int seed, "
    "Tensor? seeds, int offset, Tensor? offsets) -> (Tensor, Tensor)",
    _kernel,
    _fake,
)
