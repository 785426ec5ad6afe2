"""The decoding loop: in a round the memory drafts γ tokens, the base reads them at once, verify_draft decides.

With t the last token of a text, which neither model has read:

    memory   reads t, d₁ … d_γ, one by one     draft d_i+1 comes from what it says after d_i
    base     reads t, d₁ … d_γ, at once
    verify   n of the drafts stand, and x comes after them: n + 1 new tokens; x is the next t

Some drafts stand whatever the base will say: drawn ones without warpers whose coin is below α, and likeliest tokens
that are far ahead (:func:`surely_likeliest`). A streamer is given a leading run of these at once, and where one of
them ends the text, the base does not run.

So both caches grow by the same γ + 1 tokens, of which the first n + 1 stay. With γ = 0 a round is one step of both
models ("parallel"). Rows of a batch keep different numbers of tokens: what a row must forget is masked, and the caches
are cut to the longest. Token number i of a row is a function of the text before it, the row's seed and i alone,
whatever γ is and whatever other rows there are (up to the rounding of the models' forwards).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from memdec.decoding.cache import can_roll_back, rollback_cache
from memdec.decoding.plan import LONGEST_RUN, Estimates
from memdec.decoding.stepping import MOST_ROWS, quick_steps, step_of
from memdec.decoding.support import Warpers
from memdec.errors import MemdecError
from memdec.modeling.cache import cache_name
from memdec.modeling.decode import Decode
from memdec.modeling.structure import bare, input_device, takes, text_config
from memdec.ops import interpolate_argmax, interpolate_sample, verify_draft
from memdec.ops.reference import acceptance_coins

ROOM = 256  # tokens of room in a cache beyond the prompt, before it grows
COINS = 32  # places whose coins are tossed at a time
MARGIN = 1e-3  # of a probability; what kernels and softmax round differently is a hundredth of it


class Reader:
    """One of the two models with its cache: it reads tokens and gives logits."""

    def __init__(self, model: Any, room: int, vocab_size: int, cache: Any = None) -> None:
        self.model = model
        self.forward: Callable[..., Any] = model
        self.cache = rollback_cache(model, room) if cache is None else cache
        self.cache_name = cache_name(bare(model).forward)
        self.vocab_size = vocab_size
        self.device = input_device(model)
        self.takes_positions = takes(model, "position_ids")
        self.keeps = takes(model, "logits_to_keep")
        self.step = step_of(model) if cache is None else None

    def room_for(self, rows: int, count: int) -> Tensor | None:
        """Room (B, n, V) for the logits of n reads of a token, which a quick step writes side by side; else None.

        To put them there afterwards would take PyTorch's threads, which then stay awake for as long as a forward takes
        and share the cores with those of the step.
        """
        if self.step is None or rows > MOST_ROWS:
            return None
        return torch.empty(rows, count, min(self.vocab_size, self.step.most_tokens), dtype=self.step.dtype)

    def read(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        positions: Tensor,
        *,
        last_only: bool = False,
        out: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, n, V) after each of the tokens (B, n); `mask` covers all that the cache then holds.

        They are written to `out`, some columns of :meth:`room_for` them.
        """
        tokens, positions = tokens.to(self.device), positions.to(self.device)
        mask = None if mask is None else mask.to(self.device)
        if self.step is not None and tokens.numel() <= MOST_ROWS:
            return self.step(tokens, positions, mask, self.cache, self.vocab_size, out)
        given: dict[str, Any] = {"input_ids": tokens, self.cache_name: self.cache, "use_cache": True}
        if mask is not None:
            given["attention_mask"] = mask
        if self.takes_positions:
            given["position_ids"] = positions
        if self.keeps and last_only:
            given["logits_to_keep"] = 1
        logits: Tensor = self.forward(**given, return_dict=True).logits
        return logits[..., : self.vocab_size]


def reader_alone(model: Any, room: int, vocab_size: int) -> Reader:
    """A reader with room for so many tokens before its cache has to grow, of which nothing is taken back."""
    reader = Reader(model, room, vocab_size)
    if not can_roll_back(model):  # so the model's own kind of cache will do
        reader.cache = DynamicCache(config=text_config(model))
    return reader


def continue_alone(
    reader: Reader,
    unread: Tensor,  # (1, n) ids that follow what the reader has read
    new_tokens: int,
    choose: Callable[[Tensor], Tensor],  # logits (1, V) to ids (1,)
) -> Tensor:  # (1, new_tokens)
    """The next tokens of one model, one by one; the reader has then read all but the last of them."""
    made: list[Tensor] = []
    for _ in range(new_tokens):
        start = reader.cache.get_seq_length()
        positions = torch.arange(start, start + unread.shape[1], device=unread.device)[None]
        logits = reader.read(unread, None, positions, last_only=True)[:, -1]
        unread = choose(logits).to(unread.device)[:, None]
        made.append(unread)
    return torch.cat(made, 1)


def likeliest(logits: Tensor) -> Tensor:
    """The likeliest tokens, (B,), of logits (B, V)."""
    return logits.argmax(-1)


@torch.no_grad()
def generate_alone(model: Any, prompt: Tensor, new_tokens: int, vocab_size: int) -> Tensor:
    """The likeliest continuation (1, new_tokens) of a prompt (1, L) by one model, in our own steps."""
    with quick_steps(model):
        reader = reader_alone(model, prompt.shape[1] + new_tokens, vocab_size)
        return continue_alone(reader, prompt, new_tokens, likeliest)


def row_seeds(rows: int, device: torch.device) -> Tensor:
    """A seed a row, (rows,) int64, from torch's global generator of the device."""
    return torch.randint(-(2**63), 2**63 - 1, (rows,), device=device)


class Coins:
    """The coins by which verify_draft accepts what is drafted, by row and place: known before there is a draft.

    Args:
        seeds: (B,) int64.
        alpha: weight of the memory.
    """

    def __init__(self, seeds: Tensor, alpha: float) -> None:
        self.seeds = seeds.cpu()
        self.alpha = alpha
        self.tossed: list[list[int]] = [[] for _ in seeds]

    def ahead(self, row: int, place: int, count: int) -> list[int]:
        """Kinds of the coins of `count` new tokens of a row, from its number `place`: 0 below α, 1 and 2 above."""
        while len(self.tossed[row]) < place + count:
            u = acceptance_coins(self.seeds, torch.full_like(self.seeds, len(self.tossed[row])), COINS)
            kinds = (u >= self.alpha).long() + (u >= (1 + self.alpha) / 2).long()
            for known, more in zip(self.tossed, kinds.tolist(), strict=True):
                known.extend(more)
        return self.tossed[row][place : place + count]


def surely_likeliest(logits: Tensor, alpha: float) -> bool:
    """Whether the memory's likeliest token, by its logits (V,), is the mixture's whatever the base says.

    It is if α·q₁ is above α·q₂ + (1 − α), the most that another token can have; q₁ ≥ q₂ are the memory's two largest
    probabilities.
    """
    if alpha <= 0.5:
        return False
    top = logits.float().softmax(-1).topk(min(2, logits.shape[-1])).values.tolist()
    return bool(alpha * (top[0] - sum(top[1:])) > 1 - alpha + MARGIN)


class Continuations:
    """What the rows have become: their new tokens, which of them go on, and what ``Decode`` counts.

    Args:
        prompts: (B, L).
        criteria: transformers' stopping criteria.
        max_length: of prompt and continuation.
        streamer: transformers' streamer, for one row.
    """

    def __init__(self, prompts: Tensor, criteria: Any, max_length: int, streamer: Any) -> None:
        self.prompts = prompts
        self.made: list[list[int]] = [[] for _ in prompts]
        self.active = list(range(len(prompts)))
        self.room = max_length - prompts.shape[1]
        self.ends = {int(t) for c in criteria if isinstance(c, EosTokenCriteria) for t in c.eos_token_id.flatten()}
        self.others = [c for c in criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))]
        self.streamer = streamer
        self.early = 0  # tokens that the round under way has brought already
        self.rounds = self.row_rounds = self.drafted = self.accepted = self.trials = 0

    def left(self) -> list[int]:
        """Tokens that each active row may make from the round under way on."""
        return [self.room - len(self.made[row]) + self.early for row in self.active]

    def take_early(self, draft: int, learning: Estimates) -> None:
        """Appends a draft of the only row that is certain to stand; the row may end with it, and the round."""
        self.early += 1
        if self._append(0, [draft]):
            self.active = []
            self.drafted += self.early
            self.accepted += self.early
            self.trials += self.early
            learning.add_trials(self.early, self.early)

    def take(
        self,
        gamma: int,
        stood: list[int],
        following: list[int],
        drafts: list[list[int]],
        learning: Estimates,
        coins: list[list[int]] | None = None,
    ) -> list[int]:
        """Appends what a round of γ drafts brought the active rows; the places in `active` of those that go on.

        `coins` are the kinds of theirs, of which the estimates learn what they are worth.

        Raises:
            MemdecError: there was no token to choose.
        """
        if min(following) < 0:
            raise MemdecError(
                "there is no token to choose: the logits of the base or of the memory hold NaN or infinities. Load the "
                "models in float32 or bfloat16 and see whether each generates alone."
            )
        lengths = [min(gamma, rest - 1) for rest in self.left()]
        looked_at = sum(min(n + 1, length) for n, length in zip(stood, lengths, strict=True))
        self.rounds += 1
        self.row_rounds += len(self.active)
        self.drafted += sum(lengths)
        self.accepted += sum(stood)
        self.trials += looked_at
        learning.add_trials(sum(stood), looked_at)
        for n, length, tossed in zip(stood, lengths, coins or (), strict=coins is not None):
            for i, kind in enumerate(tossed[: min(n + 1, length)]):
                learning.add_coin(kind, i < n)
        early, self.early = self.early, 0
        staying = [
            i
            for i, row in enumerate(self.active)
            if not self._append(row, [*drafts[i][: stood[i]], following[i]][early:])
        ]
        self.active = [self.active[i] for i in staying]
        return staying

    def _append(self, row: int, new: list[int]) -> bool:
        """Appends the new tokens until one of them ends the row; whether one did."""
        text = self.made[row]
        for token in new:
            text.append(token)
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token]))
            if token in self.ends or len(text) >= self.room:
                return True
            if self.others:
                prompt = self.prompts[row]
                so_far = torch.cat([prompt, torch.tensor(text, device=prompt.device)])[None]
                if any(bool(torch.as_tensor(criterion(so_far, None)).all()) for criterion in self.others):
                    return True
        return False

    def sequences(self, pad_token: int | None) -> Tensor:
        """Prompts and continuations (B, L + longest); `pad_token` stands behind a row that ended before others."""
        longest = max(map(len, self.made))
        filler = 0 if pad_token is None else pad_token  # None: then all rows are of one length
        grown = torch.tensor(
            [text + [filler] * (longest - len(text)) for text in self.made], device=self.prompts.device
        )
        return torch.cat([self.prompts, grown.to(self.prompts.dtype)], 1)

    def summary(self, fixed_drafts: int, seconds: dict[str, float], cost_ratio: float | None) -> Decode:
        """What was done; `fixed_drafts` is the γ that was asked for, 0 where it was chosen anew in each round."""
        return Decode(
            mode="speculative" if self.drafted or fixed_drafts else "parallel",
            tokens=sum(map(len, self.made)),
            seconds=seconds,
            rounds=self.rounds,
            row_rounds=self.row_rounds,
            drafted=self.drafted,
            accepted=self.accepted,
            acceptance=self.accepted / self.trials if self.trials else None,
            cost_ratio=cost_ratio,
        )


@torch.no_grad()
def decode(
    model: Any,
    input_ids: Tensor,  # (B, L), padded on the left
    attention_mask: Tensor | None,  # (B, L)
    *,
    criteria: Any,
    max_length: int,
    pad_token: int | None,
    warpers: Warpers | None,
    draft_tokens: int | Estimates,
    estimates: Estimates | None = None,
    streamer: Any = None,
    seeds: Tensor | None = None,
) -> tuple[Tensor, Decode]:
    """Continue each row of a batch until it stops.

    Args:
        model: a MemoryModel.
        input_ids: prompts.
        attention_mask: 1 for tokens, 0 for padding; None where there is none.
        criteria: transformers' stopping criteria.
        max_length: of prompt (padding included) and continuation.
        pad_token: what stands behind a row that has ended before others.
        warpers: of the draws; None takes the likeliest token.
        draft_tokens: γ, or estimates that choose it anew in each round.
        estimates: that are to learn from this, where γ is a number.
        streamer: transformers' streamer, for one row.
        seeds: (B,) int64; None draws them from torch's global generator.

    Returns:
        Prompts and continuations, (B, L + longest), and what was done.

    Raises:
        MemdecError: the models' logits are NaN.
    """
    start_time = time.perf_counter()
    rows, prompt = input_ids.shape
    vocab_size, alpha = model.config.vocab_size, model.alpha
    learning = draft_tokens if isinstance(draft_tokens, Estimates) else (estimates or Estimates())
    room = prompt + min(max_length - prompt, ROOM) + 16
    base, memory = (Reader(one, room, vocab_size) for one in (model.base, model.memory))
    texts = Continuations(input_ids, criteria, max_length, streamer)
    greedy = warpers is None
    drawing = {} if warpers is None else warpers.arguments()
    device = input_ids.device
    if seeds is None and not greedy:
        seeds = row_seeds(rows, device)
    seed = torch.zeros(rows, dtype=torch.int64) if seeds is None else seeds
    seed = seed.to(device)
    offset = torch.zeros(rows, dtype=torch.int64, device=device)
    tosses = None if greedy else Coins(seed, alpha)
    may_be_certain = streamer is not None and (warpers is None or warpers.none)

    # The prompts but for their last tokens, which the first round reads.
    mask: Tensor | None = None
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
        padded = False
    else:
        padded = bool((attention_mask == 0).any())
    if rows > 1 or padded:
        mask = torch.ones(rows, 2 * room, dtype=torch.int64, device=device)
        mask[:, :prompt] = attention_mask
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    if prompt > 1:
        for reader in (base, memory):
            reader.read(
                input_ids[:, :-1],
                None if mask is None else mask[:, : prompt - 1],
                positions[:, :-1],
                last_only=True,
            )
    seconds = {"prefill": time.perf_counter() - start_time, "draft": 0.0, "verify": 0.0, "choose": 0.0}

    last = input_ids[:, -1:]
    position = positions[:, -1:]
    filled = prompt - 1  # tokens in the caches, the same for all rows
    steps = 0
    while texts.active:
        began = time.perf_counter()
        left = texts.left()
        coins: list[list[int]] | None = None
        if tosses is not None:
            count = LONGEST_RUN if isinstance(draft_tokens, Estimates) else draft_tokens
            coins = [tosses.ahead(row, len(texts.made[row]), count) for row in texts.active]
        gamma = draft_tokens.draft_tokens(coins or (), alpha) if isinstance(draft_tokens, Estimates) else draft_tokens
        gamma = min(gamma, max(left) - 1)
        width = gamma + 1
        if mask is not None and filled + width > mask.shape[1]:
            mask = torch.cat([mask, torch.ones_like(mask)], 1)
        # A row that ends before the longest draft does drafts on, to no purpose, at its last position.
        final = position + torch.tensor(left, device=device)[:, None] - 1
        places = torch.minimum(position + torch.arange(width, device=device), final)

        block, from_memory = last, []
        beside = memory.room_for(len(left), width) if gamma > 0 else None
        certain = may_be_certain
        for i in range(width):
            seen = None if mask is None else mask[:, : filled + i + 1]
            out = None if beside is None else beside[:, i : i + 1]
            logits = memory.read(block[:, -1:], seen, places[:, i : i + 1], out=out).to(device)
            from_memory.append(logits)
            if i == gamma:
                break
            row_logits = logits[:, 0]
            if greedy:
                draft = interpolate_argmax(row_logits, row_logits, 1.0)
            else:
                draft = interpolate_sample(row_logits, row_logits, 1.0, seed=seed, offset=offset + i, **drawing)
            block = torch.cat([block, draft.clamp(min=0)[:, None]], 1)  # −1, of a row with a NaN, has no embedding
            if certain:
                sure = coins[0][i] == 0 if coins else surely_likeliest(row_logits[0], alpha)
                certain = sure and int(draft) >= 0  # −1: there was nothing to draw
            if certain:
                texts.take_early(int(draft), learning)
                if not texts.active:
                    break
        steps += len(from_memory)
        if not texts.active:
            seconds["draft"] += time.perf_counter() - began
            break
        if beside is not None:
            memory_logits = beside.to(device)
        else:
            memory_logits = from_memory[0] if gamma == 0 else torch.cat(from_memory, 1)
        drafted_at = time.perf_counter()

        seen = None if mask is None else mask[:, : filled + width]
        base_logits = base.read(block, seen, places).to(device)
        read_at = time.perf_counter()

        lengths = [min(gamma, rest - 1) for rest in left]
        whole = len(left) == 1 or min(lengths) == gamma
        verified = verify_draft(
            base_logits,
            memory_logits,
            block[:, 1:],
            alpha,
            draft_lengths=None if whole else torch.tensor(lengths, device=device),
            greedy=greedy,
            seed=seed,
            offset=offset,
            **drawing,
        )
        stood, following = verified.num_accepted.tolist(), verified.next_token.tolist()
        staying = texts.take(gamma, stood, following, block[:, 1:].tolist(), learning, coins)
        learning.add_times(width, drafted_at - began, read_at - drafted_at)

        if staying:
            kept = [stood[i] + 1 for i in staying]
            longest = max(kept)
            if len(staying) < len(left):
                chosen = torch.tensor(staying, device=device)
                for reader in (base, memory):
                    reader.cache.batch_select_indices(chosen.to(reader.device))
                seed, offset, position = seed[chosen], offset[chosen], position[chosen]
                mask = None if mask is None else mask[chosen]
            for reader in (base, memory):
                reader.cache.crop(longest - width)
            if mask is not None:
                for i, keep in enumerate(kept):
                    if keep < longest:
                        mask[i, filled + keep : filled + longest] = 0
            forward = torch.tensor(kept, device=device)
            offset = offset + forward
            position = position + forward[:, None]
            last = torch.tensor([[following[i]] for i in staying], device=device)
            filled += longest
        now = time.perf_counter()
        seconds["draft"] += drafted_at - began
        seconds["verify"] += read_at - drafted_at
        seconds["choose"] += now - read_at
    if streamer is not None:
        streamer.end()

    sequences = texts.sequences(pad_token)
    seconds["total"] = time.perf_counter() - start_time
    fixed = 0 if isinstance(draft_tokens, Estimates) else draft_tokens
    ratio = seconds["draft"] / steps / learning.base_cost(1) if learning.base_seconds else None
    return sequences, texts.summary(fixed, seconds, ratio)
