"""kNN-LM (Khandelwal et al., arXiv 1911.00172): the retriever that a memory imitates, as a rival on the same tokens.

    p(y|x) = λ·p_kNN(y|x) + (1−λ)·p_base(y|x)
    p_kNN(y|x) ∝ Σ over the k nearest (key, value) of 1[y = value]·exp(−d/T)

with d the squared L2 distance between the base's key of x and the datastore's. Only the probability of the token that
came is needed for perplexity, so no distribution over the vocabulary is built.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memdec.errors import MemdecError
from memdec.modeling.keys import hidden_and_keys
from memdec.modeling.structure import input_device, key_width
from memdec.pipeline.embed import model_fingerprint
from memdec.pipeline.progress import progress as show_progress
from memdec.pipeline.search import keys_on_device, knn_probabilities, neighbour_tokens, search_exact
from memdec.pipeline.temperature import choose_temperature
from memdec.stores.windows import Window

# The search's working memory where the caller names none.
MEMORY_LIMIT = "1GiB"
# Queries whose neighbours are held at once: k = 1024 of them take 12 bytes each, so a chunk takes 50 MB.
QUERY_CHUNK = 4096


@dataclass(frozen=True)
class KnnSettings:
    """How the kNN-LM is set: ``k`` neighbours, ``temperature`` T, ``weight`` λ, and where the last two come from."""

    k: int
    temperature: float
    weight: float
    source: str


def window_keys(
    model: Any,
    tokens: Tensor,  # (T,) int token ids
    cut: list[Window],
    *,
    layer: str | None = None,
    batch_size: int = 8,
    progress: Callable[[int], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """The model's keys at every row that a window scores.

    Args:
        model: the causal LM that made the datastore.
        tokens: the stream that the windows point into.
        cut: the windows; each scored row is scored by one of them.
        layer: the datastore's layer, if it was not found by structure.
        batch_size: windows a forward.
        progress: called with the number of rows done since the last call.

    Returns:
        The row ids, int64 (n,) ascending, and their keys, float16 (n, d), as the datastore holds its own.
    """
    rows: list[Tensor] = []
    keys: list[Tensor] = []
    order = sorted(cut, key=lambda window: window.start - window.stop)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        length = max(window.stop - window.start for window in batch) - 1
        inputs = torch.zeros(len(batch), length, dtype=torch.long)
        for index, window in enumerate(batch):
            inputs[index, : window.stop - window.start - 1] = tokens[window.start : window.stop - 1]
        _, found = hidden_and_keys(model, inputs, layer)
        for index, window in enumerate(batch):
            part = found[index, window.score_from - window.start : window.stop - window.start - 1]
            rows.append(torch.arange(window.score_from, window.stop - 1))
            keys.append(part.to(device="cpu", dtype=torch.float16))
            if progress is not None:
                progress(window.num_rows)
    all_rows, all_keys = torch.cat(rows), torch.cat(keys)
    order_of_rows = all_rows.argsort()
    return all_rows[order_of_rows], all_keys[order_of_rows]


@dataclass(frozen=True)
class KnnScores:
    """What the retriever says of a text.

    Attributes:
        log_prob: float32 (T−1,).
        search_seconds: of the search alone, the base's forward not counted.
    """

    log_prob: Tensor
    search_seconds: float


def knn_log_prob(
    model: Any,
    datastore: Any,
    tokens: Tensor,  # (T,) int token ids
    cut: list[Window],
    *,
    k: int,
    temperature: float,
    batch_size: int = 8,
    memory_limit: str = MEMORY_LIMIT,
    progress: Callable[[int], object] | None = None,
) -> KnnScores:
    """log p_kNN(token r+1) for every row r that a window scores, NaN for the others; −inf where no neighbour holds it.

    Args:
        model: the base model that embedded the datastore; the search is where it is.
        datastore: a `memdec.stores.datastore.Datastore`.
        tokens: held-out tokens; none of them is in the datastore, so no row is excluded.
        cut: windows over them.
        k: neighbours, at most the datastore's rows.
        temperature: T.
        batch_size: windows a forward.
        memory_limit: working memory of the search.
        progress: called with the number of rows embedded since the last call.
    """
    check_made_by(model, datastore)
    rows, keys = window_keys(model, tokens, cut, layer=datastore.layer, batch_size=batch_size, progress=progress)
    begun = time.perf_counter()
    found = knn_probabilities(
        keys,
        tokens[rows + 1],
        datastore,
        k=min(k, datastore.num_rows),
        temperature=temperature,
        memory_limit=memory_limit,
        device=input_device(model),
    )
    search_seconds = time.perf_counter() - begun
    scores = torch.full((int(tokens.numel()) - 1,), math.nan)
    scores[rows] = found.double().log().float()
    return KnnScores(scores, search_seconds)


def is_made_by(model: Any, datastore: Any) -> bool:
    """Whether the datastore's keys are `model`'s; those of another would find neighbours by chance.

    A model in a wider number type than the datastore's is compared as if cast to that one; in a narrower one, by shapes
    alone.
    """
    wanted = getattr(torch, datastore.manifest.fields["dtype"])
    parameters = list(model.parameters())
    own = next(parameter.dtype for parameter in parameters)
    comparable = own == wanted or (own == torch.float32 and wanted.is_floating_point)
    if comparable and all(parameter.is_floating_point() for parameter in parameters):
        fingerprint: str = datastore.manifest.fields["model_fingerprint"]
        return model_fingerprint(model, wanted) == fingerprint
    return bool(key_width(model) == datastore.dim)


def check_made_by(model: Any, datastore: Any) -> None:
    """Raise ``MemdecError`` where the datastore's keys are not `model`'s."""
    if not is_made_by(model, datastore):
        raise MemdecError(
            f"The datastore {datastore.folder} holds keys of another model than the base ({datastore.model}), so the "
            "kNN-LM cannot search it. Make one with `memdec datastore BASE RUN/corpus --out DIR` and give that as "
            "--datastore, or leave knn-lm out."
        )


def tune_knn(
    datastore: Any, *, k: int = 1024, memory_limit: str = MEMORY_LIMIT, device: str | torch.device = "cpu"
) -> KnnSettings:
    """T and λ by the likelihood of the interpolated kNN-LM on the validation rows that the datastore carries, searched
    for on `device`.

    Raises:
        MemdecError: the datastore carries no validation rows.
    """
    validation = datastore.validation
    if validation is None or not len(validation.keys):
        raise MemdecError(
            "The datastore carries no validation rows, so the kNN-LM's temperature and weight cannot be chosen. "
            "Make it again from a corpus with a validation split, or leave knn-lm out of --compare."
        )
    k = min(k, datastore.num_rows)
    searched = keys_on_device(datastore, device)
    distances, neighbours = [], []
    with show_progress(len(validation.keys), "rows", "Choosing the temperature") as advance:
        for some in torch.split(validation.keys, QUERY_CHUNK):
            found, ids = search_exact(some, searched, k, memory_limit=memory_limit, device=device)
            distances.append(found)
            neighbours.append(neighbour_tokens(datastore, ids))
            advance(len(some))
    temperature, weight, _ = choose_temperature(
        torch.cat(distances), torch.cat(neighbours), validation.values, validation.base_log_prob
    )
    return KnnSettings(k, temperature, weight, "chosen on validation text")
