"""MemoryModel: a frozen base and a memory as one transformers model, whose logits are the mixture's log-probs.

    log p_mix(v) = log(α·p_mem(v) + (1−α)·p_base(v)),    v in the tokenizer's vocabulary

Each model reads the same tokens, keeps its own cache and makes its own attention masks; only their logits meet, in one
fused pass (``memdec.ops.interpolate``). What comes out is normalised log-probs in float32, which every consumer of
logits takes: softmax of them is p_mix.

    >>> from memdec import MemoryModel                                          # doctest: +SKIP
    >>> m = MemoryModel.from_pretrained("path/to/base", "path/to/memory")       # doctest: +SKIP
    >>> inputs = m.tokenizer("Section 12 says", return_tensors="pt")            # doctest: +SKIP
    >>> m.tokenizer.decode(m.generate(**inputs, max_new_tokens=20)[0])          # doctest: +SKIP
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import cached_file

from memdec.decoding import dispatch
from memdec.errors import MemdecError
from memdec.modeling.cache import CACHE_NAMES, GENERATION_CACHE, TwinCache, cache_name, cache_of
from memdec.modeling.configuration import MemoryModelConfig
from memdec.modeling.decode import Decode
from memdec.modeling.scoring import chunked_log_prob, load_causal_lm, mixture_log_prob, vocabulary_width
from memdec.modeling.sources import locate
from memdec.modeling.structure import bare, input_device, takes
from memdec.modeling.tokenizers import compare, fingerprint, load_tokenizer, width
from memdec.ops import interpolate
from memdec.stores.memory import CARD_NAME, MemoryCard, read_memory_card, write_memory_card, write_model_card

LOGGER = logging.getLogger(__name__)

DECODINGS = ("auto", "composite", "parallel", "speculative")
IGNORED_LABEL = -100


class MemoryModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # transformers is untyped here
    """A base with a memory attached; use :meth:`from_pretrained`.

    Args:
        base: a loaded causal LM; neither its weights nor its configuration are changed. It may be spread over devices,
            quantised, or on another device than the memory.
        memory: a loaded causal LM of the same vocabulary.
        alpha: weight of the memory, from 0 (base alone) to 1 (memory alone).
        tokenizer: the tokenizer that both use; None if it is not known.
        card: what the memory tells about itself; None if it tells nothing.

    Raises:
        MemdecError: the vocabularies differ, or no model has rows for all of the tokenizer's ids.
        ValueError: α is outside [0, 1].
    """

    config_class = MemoryModelConfig
    base_model_prefix = "base"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(
        self, base: Any, memory: Any, alpha: float, *, tokenizer: Any = None, card: MemoryCard | None = None
    ) -> None:
        vocab_size = shared_vocabulary(base, memory, tokenizer)
        super().__init__(MemoryModelConfig.of(base, memory, alpha=checked_alpha(alpha), vocab_size=vocab_size))
        self.base = base
        self.memory = memory
        self.tokenizer = tokenizer
        self.card = card
        self.last_decode: Decode | None = None
        self._memory_enabled = True
        self._request: Any = None  # while generate runs: what it asks of memdec.decoding
        self._engine_decode: Any = None  # what that did: a Decode, or the reason why not
        self._estimates: dict[Any, Any] = {}  # what it learnt of this pair's speed
        # post_init gathers what transformers asks of a model (tied weights, modules not to be split); both models
        # come with their weights, and init_weights below leaves them alone.
        self.post_init()
        self.generation_config = copy.deepcopy(base.generation_config)
        self._is_stateful = bool(base._is_stateful or memory._is_stateful)
        self.eval()

    @classmethod
    def from_pretrained(
        cls,
        base: str | PathLike[str] | nn.Module,
        memory: str | PathLike[str] | nn.Module,
        alpha: float | None = None,
        *,
        tokenizer: Any = None,
        dtype: str | torch.dtype = "auto",
        device: torch.device | str | None = None,
    ) -> MemoryModel:
        """Attaches a memory to a base.

        Args:
            base: path, hub id or loaded model (spread by ``device_map`` or quantised as you like).
            memory: path, hub id or loaded model.
            alpha: weight of the memory; None takes the value that the memory recommends.
            tokenizer: the tokenizer of a base that is given loaded; paths and ids bring their own.
            dtype: of what is loaded here: "auto" (bfloat16 where the device computes in it, else float32) or a name.
            device: where what is loaded here goes; None is the CPU for the base, and the base's device for the memory.

        Raises:
            MemdecError: something is not there; the tokenizers differ (the message says how); there is no recommended α
                and none was given.

        Example:
            >>> m = MemoryModel.from_pretrained(base_model, memory_model, alpha=0.4)   # doctest: +SKIP
        """
        names = tuple(type(model).__name__ if isinstance(model, nn.Module) else str(model) for model in (base, memory))
        folder = None if isinstance(memory, nn.Module) else memory_folder(memory)
        card = read_memory_card(folder) if folder is not None and (folder / CARD_NAME).is_file() else None
        # Tokenizers first: they take a moment, and weights take minutes.
        if tokenizer is None and not isinstance(base, nn.Module):
            tokenizer = load_tokenizer(base)
        checked = tokenizer is not None
        tokenizer = agreed_tokenizer(tokenizer, memory, folder, card, names)
        if alpha is None:
            if card is None:
                raise MemdecError(
                    f"{names[1]} recommends no alpha (it has no {CARD_NAME}); "
                    "give one: MemoryModel.from_pretrained(base, memory, alpha=0.4)."
                )
            alpha = card.alpha
        base_model = load_causal_lm(base, dtype=dtype, device=device)
        where = device if device is not None else input_device(base_model)
        memory_model = memory if isinstance(memory, nn.Module) else load_causal_lm(memory, dtype=dtype, device=where)
        if not checked:
            shared_vocabulary(base_model, memory_model, None)
        return cls(base_model, memory_model, alpha, tokenizer=tokenizer, card=card)

    # -- the mixture -------------------------------------------------------------------------------------------------

    @property
    def alpha(self) -> float:
        """Weight of the memory in the mixture, from 0 (base alone) to 1 (memory alone)."""
        return float(self.config.alpha)

    @alpha.setter
    def alpha(self, value: float) -> None:
        self.config.alpha = checked_alpha(value)

    @contextmanager
    def disable_memory(self) -> Iterator[MemoryModel]:
        """Within it the model is its base: the base's distribution, and the memory is not run."""
        before = self._memory_enabled
        self._memory_enabled = False
        try:
            yield self
        finally:
            self._memory_enabled = before

    @property
    def memory_enabled(self) -> bool:
        """False inside :meth:`disable_memory`."""
        return self._memory_enabled

    def forward(
        self,
        input_ids: Tensor | None = None,  # (B, L) int64
        attention_mask: Tensor | None = None,  # (B, past + L), 1 where a token counts
        position_ids: Tensor | None = None,  # (B, L)
        past_key_values: TwinCache | None = None,
        labels: Tensor | None = None,  # (B, L) int64, −100 where nothing is asked
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        base_inputs: dict[str, Any] | None = None,
        memory_inputs: dict[str, Any] | None = None,
        return_dict: bool | None = None,
        cache: TwinCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """The mixture's log-probs of the token after each position.

        Args:
            input_ids: token ids; padding may stand on either side.
            attention_mask: 1 for tokens, 0 for padding, over the cached text and the new; each model masks itself.
            position_ids: None counts the tokens of the mask, so that padding on the left shifts nothing.
            past_key_values: what an earlier forward returned, or :meth:`new_cache` made.
            labels: the ids themselves; position i is asked for label i+1. Gives the mean loss in nats.
            use_cache: whether to return a cache; None does.
            logits_to_keep: the last so many positions, or the indices of positions; 0 is all of them.
            base_inputs: the base's own arguments, as :meth:`prepare_inputs_for_generation` makes them.
            memory_inputs: the memory's.
            return_dict: False returns a tuple.
            cache: what transformers calls `past_key_values` from 5.24 on; either may be given.
            **kwargs: passed to both models; ``output_hidden_states`` and ``output_attentions`` return the base's.

        Returns:
            ``CausalLMOutputWithPast``: logits are log-probs (B, kept, vocab_size) in float32 (float64 for models in
            float64), on the device of the base's logits; past_key_values is a TwinCache.

        Raises:
            MemdecError: the cache is no TwinCache, or was filled with the memory disabled.
            ValueError: input_ids are missing, or embeddings were given (each model embeds for itself).
        """
        if input_ids is None or kwargs.get("inputs_embeds") is not None:
            raise ValueError("input_ids: wanted token ids (B, L); the two models embed them each for itself")
        twin = cache if past_key_values is None else past_key_values
        caches = self.caches(twin)
        plain = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": positions(attention_mask, position_ids, input_ids.shape[1]),
            "use_cache": use_cache,
            **kwargs,
        }
        base_inputs = arguments_of(self.base, plain, caches[0]) if base_inputs is None else base_inputs
        base = self.base(**base_inputs, **keeping(self.base, logits_to_keep), return_dict=True)
        base_logits = self.kept(base.logits, logits_to_keep, input_ids.shape[1])
        if self._memory_enabled:
            memory_inputs = arguments_of(self.memory, plain, caches[1]) if memory_inputs is None else memory_inputs
            memory = self.memory(**memory_inputs, **keeping(self.memory, logits_to_keep), return_dict=True)
            memory_logits = self.kept(memory.logits, logits_to_keep, input_ids.shape[1]).to(base_logits.device)
            log_probs = interpolate(base_logits, memory_logits, self.alpha)
            memory_cache = cache_of(memory)
        else:
            wide = torch.promote_types(base_logits.dtype, torch.float32)
            log_probs = torch.log_softmax(base_logits, dim=-1, dtype=wide)
            memory_cache = None
        if twin is None and cache_of(base) is not None:
            twin = TwinCache(cache_of(base), memory_cache)
        output = CausalLMOutputWithPast(
            loss=None if labels is None else self.next_token_loss(log_probs, labels, logits_to_keep, **kwargs),
            logits=log_probs,
            **{GENERATION_CACHE: twin},
            hidden_states=base.get("hidden_states"),
            attentions=base.get("attentions"),
        )
        return cast("tuple[Any, ...]", output.to_tuple()) if return_dict is False else output

    def kept(self, logits: Tensor, logits_to_keep: int | Tensor, length: int) -> Tensor:
        """The columns that are tokens, of the positions that were asked for (a model may not know how to keep few)."""
        if logits.shape[1] == length and not (isinstance(logits_to_keep, int) and logits_to_keep in (0, length)):
            logits = logits[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        return logits[..., : self.config.vocab_size]

    def next_token_loss(
        self,
        log_probs: Tensor,  # (B, L, V)
        labels: Tensor,  # (B, L)
        logits_to_keep: int | Tensor,
        num_items_in_batch: int | Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Mean −log p_mix of the labels, each asked of the position before it; −100 asks nothing.

        Raises:
            ValueError: log-probs of some positions were not kept.
        """
        if log_probs.shape[:2] != labels.shape:
            raise ValueError(
                f"labels: got shape {tuple(labels.shape)} for log-probs of shape {tuple(log_probs.shape[:2])}; a loss "
                f"needs all positions, so leave logits_to_keep at 0 (it is {logits_to_keep})"
            )
        targets = labels[:, 1:].to(log_probs.device)
        asked = targets != IGNORED_LABEL
        picked = log_probs[:, :-1].gather(-1, targets.masked_fill(~asked, 0)[..., None])[..., 0]
        total = -picked.masked_fill(~asked, 0.0).sum()
        count = asked.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return total / count

    def chunked_log_prob(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """What :func:`memdec.modeling.scoring.score_tokens` scores with, a chunk of logits at a time."""
        base = chunked_log_prob(self.base, self.config.vocab_size)
        if not self._memory_enabled:
            return base
        memory = chunked_log_prob(self.memory, self.config.vocab_size)
        where = input_device(self.memory)

        def log_probs(inputs: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
            from_base = base(inputs, labels, mask)
            from_memory = memory(inputs.to(where), labels.to(where), mask.to(where))
            return mixture_log_prob(from_base, from_memory.to(from_base.device), self.alpha).float()

        return log_probs

    # -- caches ------------------------------------------------------------------------------------------------------

    def new_cache(self, max_length: int | None = None) -> TwinCache:
        """An empty cache for forward or generate: growing, or static with room for `max_length` tokens."""

        def one(model: Any) -> Cache:
            config = model.config.get_text_config(decoder=True)
            return DynamicCache(config=config) if max_length is None else StaticCache(config, max_cache_len=max_length)

        return TwinCache(one(self.base), one(self.memory) if self._memory_enabled else None)

    def caches(self, past_key_values: TwinCache | None) -> tuple[Cache | None, Cache | None]:
        """The two halves of a cache, checked; (None, None) of none.

        Raises:
            MemdecError: it is no TwinCache, or the memory has not read what is in it.
        """
        if past_key_values is None:
            return None, None
        if not isinstance(past_key_values, TwinCache):
            raise MemdecError(
                f"past_key_values: got a {type(past_key_values).__name__}, but a MemoryModel keeps the caches of two "
                "models; make one with model.new_cache(), or with cache_implementation= in generate()."
            )
        if not self._memory_enabled:
            # From here on the memory has not read the text, and its half must not be used again.
            past_key_values.memory = None
        elif past_key_values.memory is None:
            raise MemdecError(
                "past_key_values: this cache was filled with the memory disabled, so the memory has not read its text; "
                "start from a new cache."
            )
        return past_key_values.base, past_key_values.memory

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *arguments: Any, **named: Any
    ) -> None:
        given = model_kwargs.get(GENERATION_CACHE)
        if given is not None:
            self.caches(given)
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *arguments, **named)
            return
        made: list[Cache | None] = []
        for model in (self.base, self.memory) if self._memory_enabled else (self.base,):
            # Each model makes its own kind of cache, from its own layers.
            own: dict[str, Any] = {}
            model._prepare_cache_for_generation(generation_config, own, *arguments, **named)
            made.append(own.get(GENERATION_CACHE))
        if made[0] is not None:
            model_kwargs[GENERATION_CACHE] = TwinCache(made[0], made[1] if len(made) > 1 else None)

    # -- generation --------------------------------------------------------------------------------------------------

    def generate(  # type: ignore[no-untyped-def]
        self,
        inputs: Tensor | None = None,
        *arguments: Any,
        decoding: str = "auto",
        draft_tokens: int | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ):
        """Everything that transformers' ``generate`` does, from the mixture: see ``GenerationMixin.generate``.

        Args:
            inputs: prompt ids (B, L), also as ``input_ids=``; with an ``attention_mask`` when rows are padded (left).
            *arguments: as ``GenerationMixin.generate``.
            decoding: "composite" is transformers' own loop, one forward of each model a token; "parallel" the same
                work in a loop of ours; "speculative" lets the memory draft and the base verify; "auto" chooses between
                the last two, round by round. All have the mixture's law. What the engine does not do (beams,
                penalties, …; see docs/decoding.md) falls back to "composite", and ``last_decode.reason`` says why. For
                the same state of torch's generator "composite" gives other samples than the rest, which agree.
            draft_tokens: how many tokens the memory drafts at a time ("speculative" only); None is 4.
            generator: random draws come from it; None uses torch's global generator.
            **kwargs: as ``GenerationMixin.generate``: max_new_tokens, do_sample, num_beams, cache_implementation, …

        Returns:
            What ``GenerationMixin.generate`` returns. ``last_decode`` then tells mode, tokens and seconds.

        Raises:
            MemdecError: `decoding` is not available; the memory reads less text than is asked for.
            ValueError: `draft_tokens` is not a number from 1, or goes with another decoding.
        """
        if decoding not in DECODINGS:
            raise MemdecError(f"decoding={decoding!r} is not available; this version of memdec has {DECODINGS}.")
        if draft_tokens is not None and (
            decoding != "speculative" or isinstance(draft_tokens, bool) or not isinstance(draft_tokens, int)
        ):
            raise ValueError(
                f"draft_tokens: got {draft_tokens!r} with decoding={decoding!r}, wanted an int with "
                "decoding='speculative'"
            )
        if draft_tokens is not None and draft_tokens < 1:
            raise ValueError(f"draft_tokens: got {draft_tokens}, wanted at least 1; decoding='parallel' drafts none")
        for name in CACHE_NAMES:
            if name in kwargs:
                kwargs[GENERATION_CACHE] = kwargs.pop(name)
        start = time.perf_counter()
        self._engine_decode = None
        if decoding != "composite":
            given = frozenset(name for name, value in kwargs.items() if value is not None)
            self._request = dispatch.Request(decoding, draft_tokens, given)
        try:
            with drawing_from(generator, input_device(self.base)):
                result = super().generate(inputs, *arguments, **kwargs)
        finally:
            self._request = None
        if isinstance(self._engine_decode, Decode):
            self.last_decode = self._engine_decode
            return result
        sequences: Tensor = result if isinstance(result, Tensor) else result.sequences
        prompt = inputs if inputs is not None else kwargs.get("input_ids")
        configured = kwargs.get("generation_config") or self.generation_config
        eos = kwargs.get("eos_token_id", configured.eos_token_id)
        tokens = count_tokens(sequences[:, 0 if prompt is None else prompt.shape[1] :], eos)
        reason = self._engine_decode
        if decoding != "composite" and reason is None:
            reason = "beams, or another search of transformers' own"
        self.last_decode = Decode("composite", tokens, {"total": time.perf_counter() - start}, reason=reason)
        return result

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """transformers' loop for greedy and sampled decoding, where everything has been prepared: ours, if it can.

        (The ``custom_generate`` hook would come to the same place, but withholds the streamer and the tokenizer of
        stop strings from it.)
        """
        if self._request is not None:
            done: Any = "the ranks of a distributed run go in step"
            if not synced_gpus:
                done = dispatch.run(
                    self,
                    self._request,
                    input_ids,
                    logits_processor,
                    stopping_criteria,
                    generation_config,
                    streamer,
                    model_kwargs,
                    self._estimates,
                )
            if not isinstance(done, str):
                sequences, self._engine_decode = done
                return sequences
            self._engine_decode = done
        return super()._sample(
            input_ids,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            generation_config=generation_config,
            synced_gpus=synced_gpus,
            streamer=streamer,
            **model_kwargs,
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: TwinCache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor | None = None,
        cache: TwinCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of one step: each model prepares its own, masks and devices included."""
        twin = cache if past_key_values is None else past_key_values
        caches = self.caches(twin)
        prepared: dict[str, Any] = {GENERATION_CACHE: twin, "use_cache": kwargs.get("use_cache")}
        # Kept out of what the models prepare: assisted decoding changes it afterwards.
        if logits_to_keep is not None:
            prepared["logits_to_keep"] = logits_to_keep
        models = [("base_inputs", self.base, caches[0]), ("memory_inputs", self.memory, caches[1])]
        for name, model, own in models if self._memory_enabled else models[:1]:
            prepare = model.prepare_inputs_for_generation
            given = {cache_name(prepare): own, "attention_mask": attention_mask, **kwargs}
            if takes(model, "position_ids"):
                given["position_ids"] = position_ids
            prepared[name] = prepare(input_ids, **given)
        return {"input_ids": prepared["base_inputs"]["input_ids"], **prepared}

    def _valid_auto_compile_criteria(self, *arguments: Any, **named: Any) -> bool:
        valid = super()._valid_auto_compile_criteria(*arguments, **named)
        return valid and all(m._valid_auto_compile_criteria(*arguments, **named) for m in (self.base, self.memory))

    @contextmanager
    def _optimize_model_for_decode(self) -> Iterator[None]:
        with self.base._optimize_model_for_decode(), self.memory._optimize_model_for_decode():
            yield

    # -- a model among models ----------------------------------------------------------------------------------------

    def init_weights(self) -> None:
        """Leaves the weights alone: both models bring theirs."""

    def tie_weights(self, *arguments: Any, **named: Any) -> None:
        """Ties each model's weights as that model does."""
        self.base.tie_weights(*arguments, **named)
        self.memory.tie_weights(*arguments, **named)

    def to(self, *arguments: Any, **named: Any) -> MemoryModel:
        """Moves or casts both models, each in its own way: a spread or quantised base says what it cannot do."""
        self.base.to(*arguments, **named)
        self.memory.to(*arguments, **named)
        return self

    def get_input_embeddings(self) -> nn.Module:
        """The base's embeddings."""
        return cast(nn.Module, self.base.get_input_embeddings())

    def get_output_embeddings(self) -> None:
        """None: the logits of a mixture come from two heads."""
        return None

    def resize_token_embeddings(self, *arguments: Any, **named: Any) -> nn.Module:
        """Refused: the memory knows the tokens that it was trained with."""
        raise MemdecError(
            "the vocabulary of a MemoryModel cannot be changed: its memory was trained with these tokens."
        )

    def save_pretrained(self, save_directory: str | PathLike[str], **kwargs: Any) -> None:
        """Writes the memory, its tokenizer and its card (with the present α as the recommended one); never the base.

        Args:
            save_directory: a folder, made if need be.
            **kwargs: as ``PreTrainedModel.save_pretrained``.

        Raises:
            MemdecError: the tokenizer is not known, so that the memory could not be checked against another base.
        """
        if self.tokenizer is None:
            raise MemdecError(
                "the tokenizer of this MemoryModel is not known, and a memory without it cannot be attached safely; "
                "set model.tokenizer first."
            )
        folder = Path(save_directory)
        self.memory.save_pretrained(folder, **kwargs)
        self.tokenizer.save_pretrained(folder)
        provenance = dict(self.card.provenance) if self.card is not None else {}
        card = MemoryCard(self.alpha, fingerprint(self.tokenizer), self.config.vocab_size, provenance)
        write_model_card(folder, card, title=folder.resolve().name)
        write_memory_card(folder, card)


def checked_alpha(value: float) -> float:
    """`value` as a float.

    Raises:
        ValueError: it is not a number from 0 to 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
        raise ValueError(f"alpha: got {value!r}, wanted a number from 0 (base alone) to 1 (memory alone)")
    return float(value)


def shared_vocabulary(base: Any, memory: Any, tokenizer: Any) -> int:
    """Number of ids that the mixture is over: the tokenizer's width, or without one the two models' common width.

    Raises:
        MemdecError: the widths differ and there is no tokenizer, or a model has fewer columns than the tokenizer ids.
    """
    widths = {"the base": vocabulary_width(base), "the memory": vocabulary_width(memory)}
    if tokenizer is None:
        if widths["the base"] != widths["the memory"]:
            raise MemdecError(
                f"the base has a vocabulary of {widths['the base']} and the memory one of {widths['the memory']}, so "
                "they have different tokenizers, or are padded differently. If the tokenizer is the same, give it: "
                "MemoryModel.from_pretrained(base, memory, alpha, tokenizer=tokenizer)."
            )
        return widths["the base"]
    wanted = width(tokenizer)
    for name, found in widths.items():
        if found < wanted:
            raise MemdecError(
                f"the tokenizer has {wanted} ids, but {name} has a vocabulary of {found}: this is not its tokenizer, "
                "or tokens were added without resizing its embeddings."
            )
    return wanted


def memory_folder(memory: str | PathLike[str]) -> Path | None:
    """The local folder with the card of a memory given as a path or hub id; None where there can be or is none."""
    source, options = locate(memory)
    if options:
        return None
    if Path(source).is_dir():
        return Path(source)
    try:
        found = cached_file(source, CARD_NAME)
    except OSError:  # no such file there, or no such repository: loading the model will say which
        return None
    return None if found is None else Path(found).parent


def agreed_tokenizer(
    tokenizer: Any, memory: Any, folder: Path | None, card: MemoryCard | None, names: tuple[str, ...]
) -> Any:
    """The tokenizer of base and memory, after it was made sure that they have the same; None if neither's is known.

    Raises:
        MemdecError: they differ.
    """
    if isinstance(memory, nn.Module):
        return tokenizer
    try:
        own = load_tokenizer(memory)
    except MemdecError:
        if card is None:
            raise
        own = None  # the card's fingerprint is enough to refuse, if not to explain
    if tokenizer is None:
        return own
    if own is not None:
        compare(tokenizer, own, base_name=f"the base ({names[0]})", memory_name=f"the memory ({names[1]})")
    elif card is not None and card.tokenizer_fingerprint != fingerprint(tokenizer):
        raise MemdecError(
            f"the memory {names[1]} was made with another tokenizer than that of {names[0]}: it has {card.vocab_size} "
            f"tokens, the base's {width(tokenizer)}, and their fingerprints differ. Use a base of the family that the "
            "memory was made for."
        )
    return tokenizer


def positions(attention_mask: Tensor | None, position_ids: Tensor | None, length: int) -> Tensor | None:
    """Positions of the last `length` tokens (B, length), counted over the tokens of a 2-D mask; what is given stays."""
    if position_ids is not None or attention_mask is None or attention_mask.ndim != 2:
        return position_ids
    counted = attention_mask.long().cumsum(-1) - 1
    return counted.masked_fill(attention_mask == 0, 0)[:, -length:]


def keeping(model: nn.Module, logits_to_keep: int | Tensor) -> dict[str, Any]:
    """`logits_to_keep` as an argument, for a model that knows it."""
    return {"logits_to_keep": logits_to_keep} if takes(model, "logits_to_keep") else {}


def arguments_of(model: nn.Module, plain: dict[str, Any], cache: Cache | None) -> dict[str, Any]:
    """The arguments of a plain forward for one of the two models, on its device."""
    device = input_device(model)
    given = {**plain, cache_name(bare(model).forward): cache}
    if not takes(model, "position_ids"):
        given.pop("position_ids")  # a model without positions of its own, such as one with ALiBi
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in given.items()
        if value is not None
    }


def count_tokens(made: Tensor, eos: int | list[int] | None) -> int:
    """Number of tokens in `made` (rows, L) up to each row's first end-of-text token, that one included."""
    if eos is None:
        return made.numel()
    ends = torch.isin(made, torch.as_tensor(eos, device=made.device))
    return int(((ends.cumsum(-1) - ends.long()) == 0).sum())


@contextmanager
def drawing_from(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Makes torch's global generator draw what `generator` would, and moves `generator` on by it.

    transformers samples from the global generator only.
    """
    if generator is None:
        yield
        return
    if generator.device.type != device.type:
        raise ValueError(f"generator: got one on {generator.device}, wanted one on {device}, where the logits are")
    module, where = (torch.cuda, [device]) if device.type == "cuda" else (torch.random, [])
    before = module.get_rng_state(*where)
    module.set_rng_state(generator.get_state(), *where)
    try:
        yield
    finally:
        generator.set_state(module.get_rng_state(*where))
        module.set_rng_state(before, *where)
