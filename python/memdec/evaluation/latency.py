"""What a token costs by each method, relative to the base in the same run.

A decoder is called with a prompt (1, L) and a number n, and returns the n token ids (1, n) that it writes greedily;
ends of text are not heeded, so that all write equally many. The decoders take turns on every prompt, and each run is
set against the base's of the same turn, so that a machine that grows slower during the run slows both.

    base, DAPT, merged LoRA   one forward a token
    kNN-LM                    one forward, a search for its key, and the two distributions mixed
    RAG                       a search every 4 tokens; where it finds other passages, they and the text are read anew
    base + memory             as `MemoryModel.generate` decodes

All of ours run with the same caches and, on the CPU, in the same quick steps (`memdec.decoding.stepping`), so that what
is compared is the methods. Times hold the reading of the prompt.

    >>> figures = measure(                                                               # doctest: +SKIP
    ...     {"base": plain_decoder(model), "memory": memory_decoder(pair, "speculative")}, prompts, new_tokens=64
    ... )
    >>> figures["memory"].ratio                                                          # doctest: +SKIP
    0.93
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memdec.decoding.bench import take_turns
from memdec.decoding.engine import Reader, continue_alone, generate_alone, likeliest, reader_alone
from memdec.decoding.stepping import quick_steps
from memdec.errors import MemdecError
from memdec.evaluation.rag import EVERY, QUERY_TOKENS, Retriever, check_room
from memdec.modeling.keys import captured_inputs, hidden_and_keys
from memdec.modeling.scoring import vocabulary_width
from memdec.modeling.structure import input_device, last_mlp, text_config
from memdec.ops import aggregate_neighbors, interpolate_sparse
from memdec.pipeline.search import FaissIndex, keys_on_device, neighbour_tokens, search_exact

Decoder = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class LatencyFigure:
    """What a method takes for a token.

    Attributes:
        ms_per_token: median over prompts and repeats, the prompt's reading included; None where it could not run.
        ratio: median of its times over the base's, each of the same prompt and repeat; None likewise.
        ratio_range: the quartiles of these ratios.
        note: why it could not run.
    """

    ms_per_token: float | None = None
    ratio: float | None = None
    ratio_range: tuple[float, float] | None = None
    note: str = ""


def measure(
    decoders: Mapping[str, Decoder],
    prompts: Sequence[Tensor],
    new_tokens: int,
    repeats: int = 3,
    *,
    reference: str = "base",
    clock: Callable[[], float] = time.perf_counter,
    say: Callable[[str], object] = lambda line: None,
) -> dict[str, LatencyFigure]:
    """Time the decoders in turn, after one run of each that is not counted.

    Args:
        decoders: by name.
        prompts: (1, L) int64 token ids each, where the models are.
        new_tokens: tokens that each run writes.
        repeats: runs of each decoder on each prompt.
        reference: the decoder that the ratios are over.
        clock: seconds that go by.
        say: is told what is being measured.

    Raises:
        MemdecError: the reference is missing or could not run, there is no prompt, or a number is less than 1.
    """
    if reference not in decoders:
        raise MemdecError(f"decode latency is relative to {reference!r}, which is not among {', '.join(decoders)}.")
    if not prompts or new_tokens < 1 or repeats < 1:
        raise MemdecError(
            f"decode latency needs a prompt, a token and a repeat at least; got {len(prompts)} prompts, "
            f"{new_tokens} new tokens, {repeats} repeats."
        )

    def run(decoder: Decoder) -> Callable[[Tensor], None]:
        def decode(prompt: Tensor) -> None:
            made = decoder(prompt, new_tokens)
            if made.shape != (1, new_tokens):
                raise MemdecError(f"wrote {tuple(made.shape)} tokens instead of (1, {new_tokens})")

        return decode

    runs = {name: run(decoder) for name, decoder in decoders.items()}
    seconds, notes = take_turns(runs, prompts, repeats, clock=clock, say=say)
    if reference in notes:
        raise MemdecError(f"{reference} cannot decode, so that nothing can be set against it: {notes[reference]}")
    figures: dict[str, LatencyFigure] = {}
    for name in decoders:
        if name in notes:
            figures[name] = LatencyFigure(note=notes[name])
            continue
        ratios = torch.tensor(seconds[name]).double() / torch.tensor(seconds[reference]).double()
        low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
        figures[name] = LatencyFigure(1000 * statistics.median(seconds[name]) / new_tokens, middle, (low, high))
    return figures


def plain_decoder(model: Any) -> Decoder:
    """One model alone: the base, or the base with other weights.

    Args:
        model: a causal LM.
    """
    width = vocabulary_width(model)

    @torch.no_grad()
    def decode(prompt: Tensor, new_tokens: int) -> Tensor:
        return generate_alone(model, prompt, new_tokens, width)

    return decode


def memory_decoder(model: Any, decoding: str = "speculative", draft_tokens: int | None = None) -> Decoder:
    """Base + memory, by ``model.generate``; its α is what it is when the decoder runs.

    Args:
        model: a MemoryModel.
        decoding: "composite", "parallel", "speculative" or "auto".
        draft_tokens: γ of "speculative"; None is its default.

    Returns:
        A decoder that raises ``MemdecError`` where the pair cannot be decoded in that way.
    """

    @torch.no_grad()
    def decode(prompt: Tensor, new_tokens: int) -> Tensor:
        whole: Tensor = model.generate(
            prompt,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            decoding=decoding,
            draft_tokens=draft_tokens,
        )
        if model.last_decode.reason is not None:
            raise MemdecError(f"not decoded as {decoding}: {model.last_decode.reason}")
        return whole[:, prompt.shape[1] :]

    return decode


def knn_decoder(
    model: Any,
    datastore: Any,
    *,
    k: int,
    temperature: float,
    weight: float,
    index: FaissIndex | None = None,
) -> Decoder:
    """The kNN-LM: the base's step gives logits and key, the key's neighbours in the datastore the other distribution.

    Args:
        model: the base that embedded the datastore.
        datastore: a `memdec.stores.datastore.Datastore`.
        k: neighbours, at most the datastore's rows.
        temperature: T.
        weight: λ, of the kNN distribution.
        index: a faiss index over the datastore; None is exact search.

    Raises:
        MemdecError: the model is not the datastore's.
    """
    width = datastore.vocab_size
    k = min(k, datastore.num_rows)
    dim = hidden_and_keys(model, torch.zeros(1, 1, dtype=torch.long), datastore.layer)[1].shape[-1]
    if dim != datastore.dim:
        raise MemdecError(
            f"The base model's keys have {dim} numbers and the datastore's {datastore.dim}: the datastore was made "
            f"with another model ({datastore.model}). Take that one, or leave knn-lm out."
        )
    module = last_mlp(model, datastore.layer)[1]
    device = input_device(model)
    # A search for every token: what an index would keep in memory, exact search may keep on the device.
    searched = keys_on_device(datastore, device) if index is None else datastore

    @torch.no_grad()
    def decode(prompt: Tensor, new_tokens: int) -> Tensor:
        with quick_steps(model), captured_inputs(module) as captured:
            reader = reader_alone(model, prompt.shape[1] + new_tokens, width)
            step = reader.step
            if step is not None and not step.watch(module):
                reader.step = None  # the key is nothing that it knows of

            def choose(logits: Tensor) -> Tensor:
                # Prompts go by the model's forward, and what it captured is newer then.
                read = captured.pop() if captured or step is None else step.caught
                assert read is not None
                # Some models flatten the positions before their MLP: the last one's key is the last row either way.
                key = read.reshape(-1, dim)[-1:].to(torch.float16)
                if index is None:
                    distances, ids = search_exact(key, searched, k, device=device)
                else:
                    distances, ids = index.search(key, datastore, k)
                teacher = aggregate_neighbors(
                    distances, neighbour_tokens(datastore, ids), temperature=temperature, vocab_size=width
                )
                return interpolate_sparse(logits, teacher.to(logits.device), weight).argmax(-1)

            return continue_alone(reader, prompt, new_tokens, choose)

    return decode


def rag_decoder(
    model: Any,
    retriever: Retriever,
    *,
    query_tokens: int = QUERY_TOKENS,
    every: int = EVERY,
    passages: int = 1,
    most_inputs: int | None = None,
) -> Decoder:
    """In-context retrieval: every few tokens a search, and where it finds other passages, all is read anew.

    Args:
        model: the base.
        retriever: finds the passages.
        query_tokens: ℓ, the last tokens of the text that are searched for.
        every: s, tokens that are written with the same passages.
        passages: how many are read.
        most_inputs: the most tokens that are read at once, passages included: of a longer text the beginning is not
            read. None: as many as the model has positions for.

    Raises:
        MemdecError: a number that is less than 1, or passages that would leave less than half of ``most_inputs``.
    """
    width = vocabulary_width(model)
    if most_inputs is None:
        most_inputs = getattr(text_config(model), "max_position_embeddings", None)
    check_room(retriever, most_inputs, query_tokens=query_tokens, every=every, passages=passages)

    @torch.no_grad()
    def decode(prompt: Tensor, new_tokens: int) -> Tensor:
        text = prompt
        length = prompt.shape[1] + new_tokens
        reader: Reader | None = None
        read: tuple[tuple[int, ...], int] | None = None
        with quick_steps(model):
            while text.shape[1] < length:
                found = retriever.search(text[0, -query_tokens:].cpu(), passages)
                prefix = retriever.prefix(found)[None].to(text.device)
                # The last of the next tokens is predicted from all but itself.
                longest = prefix.shape[1] + text.shape[1] + every - 1
                start = 0 if most_inputs is None else max(0, longest - most_inputs)
                if reader is None or read != (found, start):
                    reader = reader_alone(model, longest - start + 16 * every, width)
                    unread = torch.cat([prefix, text[:, start:]], 1)
                    read = (found, start)
                else:
                    unread = text[:, -1:]
                new = continue_alone(reader, unread, min(every, length - text.shape[1]), likeliest)
                text = torch.cat([text, new], 1)
        return text[:, prompt.shape[1] :]

    return decode
