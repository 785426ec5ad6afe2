"""The distributions stage: datastore in, the teacher's next-token distribution of every training row out.

    memdec distributions run/datastore --out run/distributions

Every row of the datastore is searched against all the others, in row order and in chunks; a chunk's neighbours are
aggregated at once, so that their ids never reach the disk, and go to the store shard by shard. A killed run continues
at the shard where it stopped and ends with the same bytes.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memdec import ops
from memdec.errors import MemdecError
from memdec.pipeline.progress import progress
from memdec.pipeline.search import (
    BACKENDS,
    FaissIndex,
    KeyStore,
    build_index,
    keys_on_device,
    neighbour_tokens,
    parse_bytes,
    recall_at_k,
    search_exact,
)
from memdec.pipeline.temperature import best_weight, choose_temperature, knn_lm_loss, target_probability
from memdec.stores.datastore import Datastore, ValidationRows
from memdec.stores.distribution_store import DistributionStore, DistributionWriter

logger = logging.getLogger(__name__)

DEFAULT_K = 1024
RECALL_ROWS = 256


def build_distributions(
    datastore: Datastore | str | Path,
    out: str | Path,
    *,
    k: int | None = None,
    temperature: float | None = None,
    backend: str = "exact",
    exclude_same_document: bool = False,
    min_prob: float = 1e-6,
    max_tokens: int | None = None,
    codec: str = "log8",
    memory_limit: int | str = "1GiB",
    index: str | Path | None = None,
    index_options: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
) -> DistributionStore:
    """Find every training row's k nearest others and store what tokens followed them, as a distribution.

    q(y) ∝ Σ over the neighbours i of 1[y = vᵢ]·exp(−dᵢ/T), d the squared L2 distance of the keys. A row is kept from
    finding itself by its id, so that duplicates of its text are found and its own label is not leaked.

    Args:
        datastore: the datastore, or its folder.
        out: the folder of the distribution store.
        k: neighbours of a row. None is 1024, or one less than the rows where there are no more than that.
        temperature: T, in the unit of the distances. None chooses it on the datastore's validation rows, by the
            likelihood of the interpolated kNN-LM. What is best for the kNN-LM need not be the best teacher: a smaller T
            makes a sharper one.
        backend: ``"exact"``, or with faiss ``"flat"``, ``"ivfflat"`` or ``"ivfpq"``.
        exclude_same_document: leave out all rows of the row's own document.
        min_prob: probabilities below this are cut; their mass is stored.
        max_tokens: at most so many tokens a row, the most probable. None: all.
        codec: ``"log8"`` or ``"float16"``, see ``memdec.stores.distribution_store``.
        memory_limit: bytes of working memory, such as ``"1GiB"``. It changes the speed, not the result.
        index: the folder of the faiss index; None is beside ``out``, with ``-index`` after its name.
        index_options: ``lists``, ``probes``, ``subquantizers``, ``seed`` of ``memdec.pipeline.search.build_index``.
        device: where exact search makes its products.

    Returns:
        The finished store. The manifest's results hold the temperature, how the kNN-LM does on the validation rows, and
        for faiss the recall against exact search on a sample.

    Raises:
        MemdecError: k is not less than the number of rows, there are no validation rows and no temperature, a key is
            NaN or infinite, ``out`` holds something else, the memory does not suffice.
    """
    if not isinstance(datastore, Datastore):
        datastore = Datastore.open(datastore)
    out = Path(out)
    backend = backend.lower()
    limit = check_search(temperature, backend, memory_limit)
    if not 0 <= min_prob < 1:
        raise MemdecError(f"min_prob: got {min_prob}, wanted a probability below 1")
    if max_tokens is not None and max_tokens < 1:
        raise MemdecError(f"max_tokens: got {max_tokens}, wanted at least 1")
    k = _neighbours(k, datastore.num_rows)
    validation = datastore.validation
    if validation is not None and not len(validation.keys):
        validation = None
    if temperature is None and validation is None:
        raise MemdecError(
            "The temperature cannot be chosen: the datastore has no validation rows. Pass a temperature "
            "(--temperature), or make the datastore of a corpus with a validation split."
        )
    fields = {
        "datastore": datastore.manifest.checksum,
        "model": datastore.model,
        "layer": datastore.layer,
        "context": datastore.context,  # training alone takes its windows from here
        "stride": datastore.stride,
        "tokenizer_fingerprint": datastore.tokenizer_fingerprint,
        "k": k,
        "temperature": temperature,
        "backend": backend,
        "exclude_same_document": exclude_same_document,
        "min_prob": min_prob,
        "max_tokens": max_tokens,
        "index_options": index_options or {},
    }
    with DistributionWriter(
        out, num_rows=datastore.num_rows, vocab_size=datastore.vocab_size, codec=codec, fields=fields
    ) as writer:
        if writer.complete:
            return DistributionStore.open(out)
        found = None
        if backend != "exact":
            folder = out.with_name(f"{out.name}-index") if index is None else Path(index)
            found = build_index(datastore, folder, backend, memory_limit=limit, **(index_options or {}))
        # A faiss index searches alone, but for the few rows that its recall is measured on.
        searched = keys_on_device(datastore, device) if found is None else datastore
        search = _Search(datastore, searched, found, exclude_same_document, limit, device)
        results = writer.manifest.results
        if "temperature" not in results:
            results.update(_measure(search, validation, k, temperature))
            writer.manifest.save(out)
        chosen = float(results["temperature"])
        rows = search.rows_at_once(k)
        with progress(datastore.num_rows, "rows", "Searching", done=writer.rows_done) as advance:
            while writer.next_row < datastore.num_rows:
                start = writer.next_row
                # Chunks end where shards do, so that a run that continues cuts the rows as one that was not disturbed.
                shard_end = writer.rows_done + writer.rows_per_shard
                stop = min(start + rows, shard_end, datastore.num_rows)
                distances, ids = search.train_rows(start, stop, k)
                part = ops.aggregate_neighbors(
                    distances,
                    neighbour_tokens(datastore, ids),
                    temperature=chosen,
                    vocab_size=datastore.vocab_size,
                    min_prob=min_prob,
                    max_tokens=max_tokens,
                )
                writer.append(part)
                advance(stop - start)
        return writer.finish(_recall(search, k) if found is not None else None)


def check_search(temperature: float | None, backend: str, memory_limit: str | int) -> int:
    """The memory limit in bytes.

    Raises:
        MemdecError: a setting of the search that cannot be.
    """
    if backend.lower() not in BACKENDS:
        raise MemdecError(f"backend: got {backend!r}, wanted one of {', '.join(BACKENDS)}")
    if temperature is not None and not (temperature > 0 and math.isfinite(temperature)):
        raise MemdecError(f"temperature: got {temperature}, wanted a number above 0")
    return parse_bytes(memory_limit)


@dataclass(frozen=True)
class _Search:
    """One way to search one datastore."""

    datastore: Datastore
    searched: KeyStore  # the datastore, or its keys where the products are made
    index: FaissIndex | None
    whole_documents: bool
    memory_limit: int
    device: str | torch.device

    def rows_at_once(self, k: int) -> int:
        """Rows whose neighbours are held at once: an eighth of the memory for them, the rest for the search."""
        return max(1, min(4096, self.memory_limit // 8 // (40 * k)))

    def train_rows(self, start: int, stop: int, k: int, *, exact: bool = False) -> tuple[Tensor, Tensor]:
        """The neighbours of rows [start, stop), each but itself."""
        own = torch.arange(start, stop)
        return self.queries(self.searched.keys(start, stop), k, own, exact=exact)

    def queries(self, keys: Tensor, k: int, own: Tensor | None = None, *, exact: bool = False) -> tuple[Tensor, Tensor]:
        if self.index is not None and not exact:
            return self.index.search(keys, self.datastore, k, exclude_rows=own, exclude_documents=self.whole_documents)
        return search_exact(
            keys,
            self.searched,
            k,
            exclude_rows=own,
            exclude_documents=self.whole_documents,
            memory_limit=self.memory_limit - self.memory_limit // 8,
            device=self.device,
        )


def _neighbours(k: int | None, rows: int) -> int:
    if rows < 2:
        raise MemdecError(f"A datastore of {rows} rows has no neighbours to find. Take a larger corpus.")
    if k is None:
        k = min(DEFAULT_K, rows - 1)
        if k < DEFAULT_K:
            logger.info("k = %d neighbours instead of %d: the datastore has only %d rows", k, DEFAULT_K, rows)
        return k
    if k < 1:
        raise MemdecError(f"k must be at least 1, got {k}")
    if k > rows - 1:
        raise MemdecError(
            f"k = {k} neighbours are more than a datastore of {rows} rows can give: a row does not find itself, so "
            f"{rows - 1} is the most. Take a smaller k or a larger corpus."
        )
    return k


def _measure(search: _Search, validation: ValidationRows | None, k: int, temperature: float | None) -> dict[str, Any]:
    """The temperature, chosen where it is not given, and the kNN-LM on the validation rows."""
    if validation is None:
        assert temperature is not None
        return {"temperature": temperature}
    distances, tokens = [], []
    rows = search.rows_at_once(k)
    count = len(validation.keys)
    with progress(count, "rows", "Choosing the temperature" if temperature is None else "Validating") as advance:
        for start in range(0, count, rows):
            some = validation.keys[start : start + rows]
            found, ids = search.queries(some, k)
            distances.append(found)
            tokens.append(neighbour_tokens(search.datastore, ids))
            advance(len(some))
    near, followed = torch.cat(distances), torch.cat(tokens)
    base = validation.base_log_prob
    curve = None
    if temperature is None:
        temperature, weight, curve = choose_temperature(near, followed, validation.values, base)
        q = target_probability(near, followed, validation.values, temperature)
    else:
        q = target_probability(near, followed, validation.values, temperature)
        weight = round(best_weight(q, base), 4)
    base_perplexity = math.exp(-float(base.double().mean()))
    perplexity = math.exp(knn_lm_loss(q, base, weight))
    logger.info(
        "T = %g (%s), λ = %.2f: perplexity on %d validation rows %.2f, of the base alone %.2f",
        temperature, "given" if curve is None else "chosen", weight, count, perplexity, base_perplexity,
    )  # fmt: skip
    knn_lm = {
        "rows": count,
        "weight": weight,
        "perplexity": round(perplexity, 4),
        "base_perplexity": round(base_perplexity, 4),
    }
    return {"temperature": temperature, "knn_lm": knn_lm | ({} if curve is None else {"curve": curve})}


def _recall(search: _Search, k: int) -> dict[str, Any]:
    """The index's recall@k against exact search, on rows from all over the datastore."""
    rows = search.datastore.num_rows
    count = min(RECALL_ROWS, rows)
    own = torch.arange(count) * rows // count
    keys = torch.cat([search.datastore.keys(row, row + 1) for row in own.tolist()])
    _, found = search.queries(keys, k, own)
    _, true = search.queries(keys, k, own, exact=True)
    recall = recall_at_k(found, true)
    logger.info("recall@%d of the index against exact search, on %d rows: %.4f", k, count, recall)
    return {"recall": {"k": k, "rows": count, "value": round(recall, 6)}}
