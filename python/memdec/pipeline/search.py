"""The nearest stored rows of many queries: exact, in blocks, and through faiss.

Exact search multiplies a block of queries with a block of keys (``torch.mm``) and lets a filter of ours keep what may
be among each query's nearest (csrc/cpu/topk_filter.cpp, csrc/cuda/topk_filter.cu), so that its memory is set by
``memory_limit`` and not by the corpus. ‖x‖² − 2·q·x loses digits where keys have a large common part, as hidden states
do: the keys' mean is taken from both sides first, a few more candidates than k are kept, and in the end the distance of
each is computed anew as Σ (q − x)². So the distances are those of the stored float16 keys to float32's last digits, a
row's own duplicate is at exactly 0, and neither the block size nor the threads show in the result. Equal distances are
in the order of their ids.

faiss indexes (``flat``, ``ivfflat``, ``ivfpq``) are built once into a folder and reopened; their candidates too get
their distances computed anew, so that only *which* rows were found depends on the index.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from memdec import _C
from memdec.errors import MemdecError
from memdec.ops import launch
from memdec.pipeline.progress import progress
from memdec.stores.atomic import folder_lock, write_file
from memdec.stores.manifest import Manifest

logger = logging.getLogger(__name__)

BACKENDS = ("exact", "flat", "ivfflat", "ivfpq")
INDEX_FORMAT = "memdec.index"
INDEX_VERSION = 1
INDEX_NAME = "index.faiss"

_KEY_BLOCK = 1024  # stored rows in a matrix product: its converted keys and a row of its products stay in cache
_DEVICE_KEY_BLOCK = 16384  # the same on an accelerator, where a small product would leave most of it idle
_QUERY_BLOCK = 4096  # enough queries that converting the keys costs little beside multiplying them
_SPARE = 32  # candidates beyond k that are kept until distances are exact
_ADD_BLOCK = 16384  # stored rows that are converted at once for faiss
_SLACK = 32  # room that the filter wants beyond what it keeps
_DEVICE_SLACK = 1024  # on CUDA, where it takes that many columns at a time
_MAX_ROWS = 2**32  # a candidate holds its id in 32 bits


class KeyStore(Protocol):
    """What is searched: a datastore, or anything else with rows of float16 keys."""

    @property
    def num_rows(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def shard_bounds(self) -> list[tuple[int, int]]: ...
    def keys(self, start: int, stop: int) -> Tensor: ...
    def document_bounds(self, rows: Tensor) -> Tensor: ...


def parse_bytes(size: int | str) -> int:
    """``"1GiB"``, ``"512 MB"`` or a number of bytes, as bytes.

    Raises:
        MemdecError: not a size.

    >>> parse_bytes("1.5KiB"), parse_bytes("2 GB"), parse_bytes(77)
    (1536, 2000000000, 77)
    """
    units = {"": 1, "B": 1} | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
    units |= {f"{p}IB": 1024**i for i, p in enumerate("KMGT", 1)} | {p: 1024**i for i, p in enumerate("KMGT", 1)}
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in units:
        raise MemdecError(f"memory_limit: got {size!r}, wanted a number of bytes or a size such as 512MiB or 2GB")
    return int(float(match[1]) * units[match[2].upper()])


@dataclass(frozen=True)
class _KeysOnDevice:
    """All keys of a datastore in the memory of an accelerator, for many searches that would each send them anew."""

    datastore: KeyStore
    stored: Tensor  # (rows, dim) float16
    mean: Tensor  # (dim,) float32, on the CPU

    @property
    def num_rows(self) -> int:
        return self.datastore.num_rows

    @property
    def dim(self) -> int:
        return self.datastore.dim

    @property
    def shard_bounds(self) -> list[tuple[int, int]]:
        return [(0, self.num_rows)]

    def keys(self, start: int, stop: int) -> Tensor:
        return self.stored[start:stop]

    def document_bounds(self, rows: Tensor) -> Tensor:
        return self.datastore.document_bounds(rows)


def keys_on_device(datastore: KeyStore, device: str | torch.device) -> KeyStore:
    """The datastore as many searches on `device` want it: its keys copied there once, where it is a CUDA device that
    has four times their room free; else itself.

    A search with it finds what a search with the datastore finds. Its keys come on top of the search's memory limit.
    """
    place = _Place.of(torch.device(device))
    if place.filter.type != "cuda":
        return datastore
    if 4 * 2 * datastore.num_rows * datastore.dim > torch.cuda.mem_get_info(place.filter)[0]:
        return datastore
    return _copied_keys(datastore, place.filter)


def _copied_keys(datastore: KeyStore, device: torch.device) -> _KeysOnDevice:
    stored = torch.empty(datastore.num_rows, datastore.dim, dtype=torch.float16, device=device)
    for start in range(0, datastore.num_rows, _DEVICE_KEY_BLOCK):
        stop = min(start + _DEVICE_KEY_BLOCK, datastore.num_rows)
        stored[start:stop] = datastore.keys(start, stop)
    return _KeysOnDevice(datastore, stored, _mean_key(datastore))


def search_exact(
    queries: Tensor,  # (n, dim) any float dtype
    datastore: KeyStore,
    k: int,
    *,
    exclude_rows: Tensor | None = None,  # (n,) int64 ids
    exclude_documents: bool = False,
    memory_limit: int | str = "1GiB",
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:  # (n, k) float32, (n, k) int64
    """The k stored rows with the least squared L2 distance to each query.

    The products are filtered where they are made, on the CPU and (where memdec was built with CUDA) on CUDA, by the
    same steps and with the same result. What another accelerator multiplies is filtered on the CPU.

    Args:
        queries: (n, dim).
        datastore: the rows to search; for many searches on an accelerator see :func:`keys_on_device`.
        k: neighbours, at most ``datastore.num_rows``.
        exclude_rows: for each query the id of the row that must not be found, its own; −1: none. By id, not by place:
            of several rows with the query's key only that one is left out.
        exclude_documents: leave out all rows of the excluded row's document as well.
        memory_limit: bytes of working memory, such as ``"1GiB"``; the result's 12·n·k bytes come on top.
        device: where the products are made.

    Returns:
        distances ascending, and row ids; inf and −1 where exclusion left fewer than k rows.

    Raises:
        MemdecError: k is larger than the corpus, ``memory_limit`` too small for one query, a key or query is NaN or
            infinite.
        ValueError: shapes that do not match.
    """
    _check_search(queries, datastore, k)
    excluded = _excluded_ranges(datastore, exclude_rows, len(queries), exclude_documents)
    place = _Place.of(torch.device(device))
    keep = min(k + _SPARE, datastore.num_rows)
    limit = parse_bytes(memory_limit)
    key_block = min(place.key_block(limit, datastore.dim), datastore.num_rows)
    query_block = _queries_that_fit(limit, datastore.dim, keep, key_block, place)
    mean = datastore.mean if isinstance(datastore, _KeysOnDevice) else _mean_key(datastore)
    distances = torch.empty(len(queries), k)
    ids = torch.empty(len(queries), k, dtype=torch.int64)
    for start in range(0, len(queries), query_block):
        part = slice(start, start + query_block)
        block = queries[part].detach().to(place.filter, torch.float32).contiguous()
        _check_finite(block.sum(1), "query", start)
        ranges = None if excluded is None else excluded[part].to(place.filter)
        buffers = _Buffers.make(len(block), keep, place.filter)
        _filter_blocks(block, datastore, mean, ranges, buffers, key_block, place)
        _finish(block, datastore, buffers, distances[part], ids[part], key_block)
    return distances, ids


@dataclass(frozen=True)
class _Place:
    """Where products are made, and where they are filtered: on the same device if it has a filter, else on the CPU."""

    products: torch.device
    filter: torch.device

    @classmethod
    def of(cls, device: torch.device) -> _Place:
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        has_filter = device.type == "cuda" and launch.HAS_CUDA
        return cls(device, device if has_filter else torch.device("cpu"))

    def key_block(self, limit: int, dim: int) -> int:
        """Stored rows in a product, within an eighth of the memory on an accelerator."""
        if self.products.type == "cpu":
            return _KEY_BLOCK
        return max(_KEY_BLOCK, min(_DEVICE_KEY_BLOCK, limit // (8 * 6 * dim)))


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Products in float32 proper: in TF32 the filter would lose neighbours that are not among the spare ones."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cpu" or before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _check_search(queries: Tensor, datastore: KeyStore, k: int) -> None:
    if queries.dim() != 2 or not queries.is_floating_point() or queries.shape[1] != datastore.dim:
        raise ValueError(
            f"queries: got {queries.dtype} of shape {tuple(queries.shape)}, wanted floats of shape (n, {datastore.dim})"
        )
    if k < 1:
        raise MemdecError(f"k must be at least 1, got {k}")
    if k > datastore.num_rows:
        raise MemdecError(
            f"k = {k} neighbours are more than the {datastore.num_rows} rows of the datastore. "
            "Take a smaller k or a larger corpus."
        )
    if datastore.num_rows >= _MAX_ROWS:
        raise MemdecError(f"The datastore has {datastore.num_rows} rows; search is limited to {_MAX_ROWS - 1}.")


def _excluded_ranges(datastore: KeyStore, rows: Tensor | None, n: int, whole_documents: bool) -> Tensor | None:
    """int64 (n, 2): the ids [from, to) that each query must not find; an empty range where nothing is excluded."""
    if rows is None:
        return None
    if rows.shape != (n,):
        raise ValueError(f"exclude_rows: got shape {tuple(rows.shape)}, wanted ({n},), one id a query")
    rows = rows.to(torch.int64).cpu()
    if n and (int(rows.min()) < -1 or int(rows.max()) >= datastore.num_rows):
        raise ValueError(
            f"exclude_rows: got {int(rows.min())} to {int(rows.max())}, wanted 0 to {datastore.num_rows - 1}, or -1"
        )
    none = rows < 0
    own = torch.stack([rows, rows + 1], dim=1)
    ranges = datastore.document_bounds(rows.clamp(min=0)) if whole_documents else own
    return ranges.masked_fill(none[:, None], 0).contiguous()


def _queries_that_fit(limit: int, dim: int, keep: int, key_block: int, place: _Place) -> int:
    """How many queries can be searched at once within ``limit`` bytes of working memory."""
    # Keys as float32; a query as float32, and once more without the mean; its products; its candidates, and the spare
    # buffer a thread of the CPU needs to cut them. On an accelerator also the keys as they are stored.
    capacity = _capacity(keep, place.filter)
    fixed = 4 * key_block * (dim + 1)
    if place.filter.type == "cpu":
        fixed += 8 * torch.get_num_threads() * capacity
    if place.products.type != "cpu":
        fixed += 2 * key_block * dim
    each = 4 * 2 * dim + 4 * key_block + 8 * capacity + 8
    if limit < fixed + each:
        raise MemdecError(
            f"memory_limit: {limit} bytes are too few for exact search with keys of {dim} numbers and "
            f"{keep - _SPARE} neighbours; {fixed + each} is the least, and {fixed + 1024 * each} goes fast."
        )
    return min(_QUERY_BLOCK, (limit - fixed) // each)


def _mean_key(datastore: KeyStore) -> Tensor:
    """The mean of some thousand keys, float32 (dim,). Distances do not change when it is taken from both sides."""
    rows = datastore.num_rows
    blocks, each = 16, min(256, rows)
    total = torch.zeros(datastore.dim, dtype=torch.float64)
    for block in range(blocks):
        start = (rows - each) * block // (blocks - 1)
        total += datastore.keys(start, start + each).double().sum(0)
    mean = (total / (blocks * each)).float()
    return mean if bool(torch.isfinite(mean).all()) else torch.zeros(datastore.dim)


def _check_finite(sums: Tensor, what: str, first: int) -> None:
    bad = ~torch.isfinite(sums)
    if bool(bad.any()):
        raise MemdecError(
            f"The {what} of row {first + int(bad.nonzero()[0])} holds NaN or infinity, so it has no distance. "
            "The datastore is damaged (see memdec verify) or its model gives such hidden states: make it again."
        )


def _capacity(keep: int, device: torch.device) -> int:
    """Room for a query's candidates: the more, the rarer they are cut."""
    return keep + max(keep + _SLACK, _SLACK if device.type == "cpu" else _DEVICE_SLACK)


@dataclass(frozen=True)
class _Buffers:
    """Candidates of a block of queries, as csrc/memdec.h describes TopkBuffers."""

    keys: Tensor  # (rows, capacity) int64, the bits of unsigned numbers
    counts: Tensor  # (rows,) int32
    thresholds: Tensor  # (rows,) float32
    keep: int

    @classmethod
    def make(cls, rows: int, keep: int, device: torch.device) -> _Buffers:
        keys = torch.empty(rows, _capacity(keep, device), dtype=torch.int64, device=device)
        counts = torch.zeros(rows, dtype=torch.int32, device=device)
        return cls(keys, counts, torch.full((rows,), math.inf, device=device), keep)

    @classmethod
    def of_ids(cls, ids: Tensor) -> _Buffers:
        """Of found ids (rows, k), −1 where there is none."""
        buffers = cls.make(len(ids), ids.shape[1], ids.device)
        order = (ids < 0).to(torch.int8).argsort(dim=1, stable=True)  # what was found first
        buffers.keys[:, : ids.shape[1]] = ids.gather(1, order).clamp(min=0)
        buffers.counts.copy_((ids >= 0).sum(1))
        return buffers

    def described(self) -> tuple[int, int, int, int, int]:
        pointers = (self.keys.data_ptr(), self.counts.data_ptr(), self.thresholds.data_ptr())
        return (*pointers, self.keys.shape[1], self.keep)


def _filter_blocks(
    queries: Tensor,
    datastore: KeyStore,
    mean: Tensor,
    excluded: Tensor | None,
    buffers: _Buffers,
    key_block: int,
    place: _Place,
) -> None:
    """Push the nearest of all stored rows into ``buffers``, by ‖x‖² − 2·q·x of keys and queries without their mean."""
    mean = mean.to(place.filter)
    centred = (queries - mean).to(place.products)
    converted = torch.empty(key_block, datastore.dim, device=place.filter)
    norm_buffer = torch.empty(key_block, device=place.filter)
    products = torch.empty(len(queries), key_block, device=place.products)
    for start in range(0, datastore.num_rows, key_block):
        stop = min(start + key_block, datastore.num_rows)
        keys, norms = converted[: stop - start], norm_buffer[: stop - start]
        stored = datastore.keys(start, stop).to(place.filter)
        launch.run(
            _C.topk_filter_prepare,
            place.filter,
            stored.data_ptr(),
            stored.stride(0),
            mean.data_ptr(),
            stop - start,
            datastore.dim,
            keys.data_ptr(),
            norms.data_ptr(),
        )
        _check_finite(norms, "key", start)
        tile = products[:, : stop - start]
        with _full_precision(place.products):
            torch.mm(centred, keys.to(place.products).t(), out=tile)
        tile = tile.to(place.filter)
        launch.run(
            _C.topk_filter_update,
            place.filter,
            buffers.described(),
            tile.data_ptr(),
            tile.stride(0),
            len(queries),
            stop - start,
            norms.data_ptr(),
            start,
            0 if excluded is None else excluded.data_ptr(),
        )


def _finish(
    queries: Tensor, datastore: KeyStore, buffers: _Buffers, distances: Tensor, ids: Tensor, key_block: int
) -> None:
    """Compute the candidates' distances anew and write the k best of each query."""
    device = buffers.keys.device
    on_cpu = device.type == "cpu"
    for first, last in datastore.shard_bounds:
        # The CPU reads a shard's keys where they are; to a device they go in blocks.
        step = max(1, last - first) if on_cpu else key_block
        for start in range(first, last, step):
            stop = min(last, start + step)
            stored = datastore.keys(start, stop).to(device)
            launch.run(
                _C.topk_filter_refine,
                device,
                buffers.described(),
                queries.data_ptr(),
                stored.data_ptr(),
                stored.stride(0),
                len(queries),
                stop - start,
                datastore.dim,
                start,
            )
    found = distances if on_cpu else torch.empty(distances.shape, device=device)
    found_ids = ids if on_cpu else torch.empty(ids.shape, dtype=torch.int64, device=device)
    launch.run(
        _C.topk_filter_select,
        device,
        buffers.described(),
        len(queries),
        distances.shape[1],
        found.data_ptr(),
        found_ids.data_ptr(),
    )
    if not on_cpu:
        distances.copy_(found)
        ids.copy_(found_ids)


def recall_at_k(found: Tensor, true: Tensor) -> float:
    """The share of the true neighbours' ids (n, k) that were found; −1 in either is nothing."""
    found = found.sort(dim=1).values
    places = torch.searchsorted(found.contiguous(), true.contiguous()).clamp(max=found.shape[1] - 1)
    wanted = true >= 0
    hits = (found.gather(1, places) == true) & wanted
    return float(hits.sum()) / max(1, int(wanted.sum()))


def neighbour_tokens(
    datastore: Any,  # memdec.stores.datastore.Datastore
    ids: Tensor,  # (n, k) int64, −1: none
) -> Tensor:  # (n, k) int32
    """The values of found rows, the tokens that came next there; −1 where there is no row."""
    bounds = datastore.shard_bounds
    if len(bounds) == 1:
        values: Tensor = datastore.values(*bounds[0])
        return values[ids.clamp(min=0)].masked_fill_(ids < 0, -1)
    tokens = torch.full(ids.shape, -1, dtype=torch.int32)
    for start, stop in bounds:
        here = (ids >= start) & (ids < stop)
        tokens[here] = datastore.values(start, stop)[ids[here] - start]
    return tokens


def knn_probabilities(
    queries: Tensor,  # (n, dim) any float dtype
    targets: Tensor,  # (n,) int
    datastore: Any,  # memdec.stores.datastore.Datastore
    *,
    k: int,
    temperature: float,
    index: FaissIndex | None = None,
    memory_limit: int | str = "1GiB",
    device: str | torch.device = "cpu",
) -> Tensor:  # (n,) float32
    """q(target): what the kNN distribution of each query gives to the token that came; nothing is excluded.

    For text that is not in the datastore (validation, test). 0 where no neighbour was followed by that token.

    Args:
        queries: keys of the text's positions, made by the datastore's model at its layer.
        targets: the tokens that came.
        datastore: the rows to search.
        k: neighbours; all rows where there are fewer.
        temperature: T.
        index: a faiss index over the datastore; None is exact search.
        memory_limit: working memory of exact search, and of the results that are held at once.
        device: where exact search makes its products.

    Raises:
        MemdecError: as ``search_exact``.
    """
    from memdec.pipeline.temperature import target_probability

    k = min(k, datastore.num_rows)
    chunk = max(1, min(len(queries), parse_bytes(memory_limit) // (40 * k)))
    searched = keys_on_device(datastore, device) if index is None else datastore
    parts = [torch.empty(0)]
    for start in range(0, len(queries), chunk):
        some = queries[start : start + chunk]
        if index is None:
            distances, ids = search_exact(some, searched, k, memory_limit=memory_limit, device=device)
        else:
            distances, ids = index.search(some, datastore, k)
        tokens = neighbour_tokens(datastore, ids)
        parts.append(target_probability(distances, tokens, targets[start : start + chunk], temperature).float())
    return torch.cat(parts)


# ---------------------------------------------------------------------------------------------------------------- faiss


@dataclass(frozen=True)
class FaissIndex:
    """A built faiss index over a datastore's keys. Make one with ``build_index`` or ``open_index``."""

    folder: Path
    backend: str
    index: Any
    manifest: Manifest

    def search(
        self,
        queries: Tensor,  # (n, dim)
        datastore: KeyStore,
        k: int,
        *,
        exclude_rows: Tensor | None = None,
        exclude_documents: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As ``search_exact``, with the rows that the index finds; their distances are exact."""
        faiss = load_faiss()
        _check_search(queries, datastore, k)
        queries = queries.detach().to("cpu", torch.float32).contiguous()
        _check_finite(queries.sum(1), "query", 0)
        excluded = _excluded_ranges(datastore, exclude_rows, len(queries), exclude_documents)
        # faiss has threads of its own; as many as torch, so that the user's setting counts for both.
        faiss.omp_set_num_threads(torch.get_num_threads())
        array = queries.numpy()
        if excluded is None:
            ids = torch.from_numpy(self.index.search(array, k)[1])
        elif exclude_documents:
            ids = torch.empty(len(queries), k, dtype=torch.int64)
            for start, stop in _runs(excluded):
                first, last = excluded[start].tolist()
                selector = faiss.IDSelectorNot(faiss.IDSelectorRange(first, last))
                ids[start:stop] = torch.from_numpy(
                    self.index.search(array[start:stop], k, params=self._parameters(selector))[1]
                )
        else:  # one more than wanted, of which the query's own row is dropped wherever it stands
            ids = torch.from_numpy(self.index.search(array, min(k + 1, datastore.num_rows))[1])
        if excluded is not None:
            ids = ids.masked_fill((ids >= excluded[:, :1]) & (ids < excluded[:, 1:]), -1)
        distances = torch.empty(len(queries), k)
        found = torch.empty(len(queries), k, dtype=torch.int64)
        _finish(queries, datastore, _Buffers.of_ids(ids), distances, found, _KEY_BLOCK)
        return distances, found

    def _parameters(self, selector: Any) -> Any:
        faiss = load_faiss()
        if self.backend == "flat":
            return faiss.SearchParameters(sel=selector)
        kind = faiss.IVFPQSearchParameters if self.backend == "ivfpq" else faiss.SearchParametersIVF
        return kind(sel=selector, nprobe=self.index.nprobe)


def _runs(ranges: Tensor) -> Iterator[tuple[int, int]]:
    """[start, stop) of each run of equal rows: neighbouring queries of one document are searched together."""
    if not len(ranges):
        return
    breaks = (ranges[1:] != ranges[:-1]).any(1).nonzero()[:, 0].add(1).tolist()
    yield from zip([0, *breaks], [*breaks, len(ranges)], strict=True)


def build_index(
    datastore: Any,  # memdec.stores.datastore.Datastore
    folder: str | Path,
    backend: str,
    *,
    lists: int | None = None,
    probes: int | None = None,
    subquantizers: int | None = None,
    seed: int = 0,
    memory_limit: int | str = "1GiB",
) -> FaissIndex:
    """Build, train and save a faiss index over the datastore's keys; a finished one in ``folder`` is reopened.

    Args:
        datastore: whose keys.
        folder: where the index goes.
        backend: ``"flat"`` (all keys in float32), ``"ivfflat"`` (the same in lists, of which some are looked at) or
            ``"ivfpq"`` (lists of product-quantised keys).
        lists: inverted lists; None is about 4·√rows.
        probes: lists looked at for a query; None is a sixteenth of them, at least 8.
        subquantizers: bytes a key in ``ivfpq``, a divisor of the keys' width; None is about an eighth of it.
        seed: of the training's random draws.
        memory_limit: what the index may take in memory, and its training sample.

    Raises:
        MemdecError: faiss is not installed, the index would not fit, there are too few rows, a key is not finite, or
            ``folder`` holds something else.
    """
    faiss = load_faiss()
    backend = backend.lower()
    if backend not in BACKENDS[1:]:
        raise MemdecError(f"backend: got {backend!r}, wanted one of {', '.join(BACKENDS)}")
    rows, dim = datastore.num_rows, datastore.dim
    lists = lists or max(1, min(int(4 * math.sqrt(rows)), rows // 39))  # faiss wants 39 training keys a list
    probes = min(lists, probes or max(8, lists // 16))
    if subquantizers is None:
        subquantizers = max(m for m in range(1, max(1, dim // 8) + 1) if dim % m == 0)
    fields: dict[str, Any] = {"backend": backend, "datastore": datastore.manifest.checksum, "rows": rows, "dim": dim}
    row_bytes = 4 * dim
    if backend != "flat":
        fields |= {"lists": lists, "probes": probes, "seed": seed}
        row_bytes += 8
    if backend == "ivfpq":
        if rows < 256:
            raise MemdecError(f"ivfpq cannot be trained on {rows} rows; it needs 256. Use the exact backend.")
        if dim % subquantizers:
            raise MemdecError(f"subquantizers: got {subquantizers}, wanted a divisor of the keys' width {dim}")
        fields["subquantizers"] = subquantizers
        row_bytes = subquantizers + 8
    limit = parse_bytes(memory_limit)
    if rows * row_bytes > limit:
        raise MemdecError(
            f"A {backend} index of {rows} rows takes {rows * row_bytes} bytes of memory, memory_limit is {limit}. "
            "Raise it, or use the exact backend, which needs little, or ivfpq."
        )
    folder = Path(folder)
    with folder_lock(folder):
        manifest = Manifest.start(folder, format=INDEX_FORMAT, version=INDEX_VERSION, fields=fields)
        if not manifest.complete:
            faiss.omp_set_num_threads(torch.get_num_threads())
            index = _new_index(faiss, backend, fields)
            if not index.is_trained:
                sample = min(rows, 256 * max(lists, 256 if backend == "ivfpq" else 1), max(256, limit // (4 * dim)))
                logger.info("training a faiss index (%s) on %d keys", backend, sample)
                index.train(_spread_keys(datastore, sample).numpy())
            with progress(rows, "rows", "Indexing") as advance:
                for start in range(0, rows, _ADD_BLOCK):
                    stop = min(start + _ADD_BLOCK, rows)
                    keys = datastore.keys(start, stop).float()
                    _check_finite(keys.sum(1), "key", start)
                    index.add(keys.numpy())
                    advance(stop - start)
            del manifest.shards[:]

            def write(file: BinaryIO) -> None:
                faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))

            manifest.add(folder, INDEX_NAME, write_file(folder / INDEX_NAME, write), rows=rows)
            manifest.finish(folder)
    return open_index(folder, datastore)


def open_index(
    folder: str | Path,
    datastore: Any = None,  # memdec.stores.datastore.Datastore
) -> FaissIndex:
    """Reopen a saved index.

    Raises:
        MemdecError: none there, unfinished, truncated, or made of another datastore than the one given.
    """
    faiss = load_faiss()
    folder = Path(folder)
    manifest = Manifest.load(folder, format=INDEX_FORMAT, version=INDEX_VERSION)
    manifest.check_complete(folder)
    manifest.check_sizes(folder)
    if datastore is not None and manifest.fields["datastore"] != datastore.manifest.checksum:
        raise MemdecError(f"The index in {folder} was made of another datastore. Delete it, or choose another folder.")
    try:
        index = faiss.read_index(str(folder / INDEX_NAME))
    except RuntimeError as error:
        raise MemdecError(f"faiss cannot read {folder / INDEX_NAME}: {error}. Delete the folder {folder}.") from None
    if manifest.fields["backend"] != "flat":
        index.nprobe = manifest.fields["probes"]
    return FaissIndex(folder, manifest.fields["backend"], index, manifest)


def load_faiss() -> Any:
    """The module faiss, which may not be installed."""
    try:
        import faiss
    except ImportError:
        raise MemdecError(
            "This backend needs faiss: pip install 'memdec[faiss]', or use the exact backend, which needs nothing."
        ) from None
    return faiss


def _new_index(faiss: Any, backend: str, fields: dict[str, Any]) -> Any:
    dim = fields["dim"]
    if backend == "flat":
        return faiss.IndexFlatL2(dim)
    quantizer = faiss.IndexFlatL2(dim)
    if backend == "ivfflat":
        index = faiss.IndexIVFFlat(quantizer, dim, fields["lists"])
    else:
        index = faiss.IndexIVFPQ(quantizer, dim, fields["lists"], fields["subquantizers"], 8)
        index.pq.cp.seed = fields["seed"]
    index.cp.seed = fields["seed"]
    index.cp.min_points_per_centroid = 1  # few rows: a poor index, but the user's choice
    if backend == "ivfpq":
        index.pq.cp.min_points_per_centroid = 1
    quantizer.this.disown()
    index.own_fields = True
    return index


def _spread_keys(datastore: KeyStore, count: int) -> Tensor:
    """``count`` keys from all over the datastore, in 64 stretches: float32 (count, dim)."""
    stretches = min(64, count)
    parts = []
    for i in range(stretches):
        size = count * (i + 1) // stretches - count * i // stretches
        start = (datastore.num_rows - size) * i // max(1, stretches - 1)
        parts.append(datastore.keys(start, start + size).float())
    return torch.cat(parts)
