"""Teachers other than the retriever: what else a memory may learn to imitate, in the same store.

    memdec distributions run/corpus --teacher lm --model MODEL --out run/teacher-lm
    memdec distributions run/datastore --teacher knn-lm --model MODEL --corpus run/corpus --out run/teacher-knn-lm

======== =========================================================================================================
knn      the nearest neighbours' next tokens (:mod:`memdec.pipeline.distributions`): the paper's
lm       a language model's own next-token distribution, its ``top_k`` most probable tokens: sequence-free knowledge
         distillation (Hinton et al., arXiv 1503.02531), which needs no datastore
knn-lm   λ·knn + (1−λ)·lm, the interpolated kNN-LM (Khandelwal et al., arXiv 1911.00172), λ tuned on validation text
one-hot  the token that came: KL is then the cross-entropy, and the memory a plainly fine-tuned second model
======== =========================================================================================================

All are distribution stores, row r for token r + 1 of the training text, so training does not know which it has. The
mass of the tokens that ``top_k`` leaves out is kept as the row's residual.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memdec.distributions import SparseDistributions
from memdec.errors import MemdecError
from memdec.modeling.scoring import load_causal_lm, vocabulary_width
from memdec.modeling.structure import head_is_plain, input_device, logits_from_hidden, output_head, trunk
from memdec.modeling.tokenizers import fingerprint, load_tokenizer
from memdec.pipeline.embed import DEFAULT_CONTEXT, batches, check_fits, default_device, model_fingerprint
from memdec.pipeline.progress import progress
from memdec.stores.corpus import Corpus
from memdec.stores.distribution_store import DistributionStore, DistributionWriter
from memdec.stores.windows import Window, windows

TEACHERS = ("knn", "lm", "knn-lm", "one-hot")
DEFAULT_TOP_K = 64  # about what a kNN distribution of 1024 neighbours has
LOGITS_BYTES = 64 << 20  # of float32 logits that exist at once


def build_teacher(
    kind: str,
    corpus: Corpus | str | Path,
    out: str | Path,
    *,
    model: str | os.PathLike[str] | None = None,
    knn: DistributionStore | str | Path | None = None,
    weight: float | None = None,
    top_k: int = DEFAULT_TOP_K,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    codec: str = "log8",
    device: str | torch.device | None = None,
    dtype: str = "auto",
) -> DistributionStore:
    """Write the distributions of a teacher that is not the retriever alone; a run that was stopped is continued.

    Args:
        kind: ``"lm"``, ``"knn-lm"`` or ``"one-hot"``.
        corpus: the corpus whose training text is taught.
        out: the folder of the distribution store.
        model: the language model, for "lm" and "knn-lm": folder, hub id or ``.gguf`` file, with the corpus's tokenizer.
        knn: the retriever's distributions, for "knn-lm".
        weight: λ of "knn-lm"; None takes what was tuned when `knn` was made.
        top_k: tokens that are kept of the language model's distribution.
        context: tokens in a window; None is that of `knn`, or 512.
        stride: how far windows are apart; None is that of `knn`, or context − 1.
        batch_size: windows that are run at once; part of the parameters, because other batches round otherwise.
        codec: "log8" or "float16", see :mod:`memdec.stores.distribution_store`.
        device: None is an accelerator if there is one, else the CPU.
        dtype: "auto" is bfloat16 where the device has it, else float32.

    Raises:
        MemdecError: the kind needs what was not given, the parts do not fit, or `out` holds something else.

    Example:
        >>> build_teacher("lm", "run/corpus", "run/teacher-lm", model="SmolLM2-135M").nnz   # doctest: +SKIP
        5242816
    """
    opened = corpus if isinstance(corpus, Corpus) else Corpus.open(corpus)
    train = opened.split("train")
    retriever = knn if isinstance(knn, DistributionStore) or knn is None else DistributionStore.open(knn)
    if kind not in TEACHERS[1:]:
        raise MemdecError(f"--teacher is {kind!r}; wanted one of {', '.join(TEACHERS)}.")
    if train.num_rows < 1:
        raise MemdecError(f"The training text of {opened.folder} has fewer than two tokens; give more text.")
    if kind != "one-hot" and model is None:
        raise MemdecError(f"The teacher {kind} asks a language model; say which with --model.")
    if kind != "one-hot" and not 1 <= top_k <= opened.vocab_size:
        raise MemdecError(f"--top-k is {top_k}; wanted from 1 to the vocabulary's {opened.vocab_size} tokens.")
    fields: dict[str, Any] = {
        "teacher": kind,
        "corpus": opened.manifest.checksum,
        "tokenizer_fingerprint": opened.tokenizer_fingerprint,
        "context": context,
        "stride": stride,
    }
    if kind == "knn-lm":
        if retriever is None:
            raise MemdecError("The teacher knn-lm mixes in the retriever's distributions; say which: a datastore.")
        if retriever.num_rows != train.num_rows or retriever.vocab_size != opened.vocab_size:
            raise MemdecError(
                f"{retriever.folder} has {retriever.num_rows} rows over {retriever.vocab_size} tokens and the training "
                f"text of {opened.folder} {train.num_rows} over {opened.vocab_size}: they do not belong together."
            )
        weight = tuned_weight(retriever) if weight is None else weight
        if not 0 <= weight <= 1:
            raise MemdecError(f"--weight is {weight}; wanted from 0 (the model alone) to 1 (the retriever alone).")
        fields |= {"knn": retriever.manifest.checksum, "weight": weight}
    if retriever is not None:
        fields["context"] = context or retriever.manifest.fields.get("context")
        fields["stride"] = stride if stride is not None or context else retriever.manifest.fields.get("stride")
    fields["context"] = fields["context"] or DEFAULT_CONTEXT
    loaded = None
    if kind != "one-hot":
        assert model is not None
        if fingerprint(load_tokenizer(model)) != opened.tokenizer_fingerprint:
            raise MemdecError(
                f"The corpus in {opened.folder} was made with another tokenizer than that of {model}. "
                "Take a teacher with the corpus's tokenizer."
            )
        loaded = load_causal_lm(model, dtype=dtype, device=default_device() if device is None else device)
        fields |= {
            "model": Path(model).name if Path(model).exists() else str(model),
            "model_fingerprint": model_fingerprint(loaded),
            "dtype": str(next(loaded.parameters()).dtype).removeprefix("torch."),
            "top_k": top_k,
            "batch_size": batch_size,
        }
    with DistributionWriter(
        out, num_rows=train.num_rows, vocab_size=opened.vocab_size, codec=codec, fields=fields
    ) as writer:
        if writer.complete:
            return DistributionStore.open(out)
        if loaded is None:
            labels = train.tokens[writer.rows_done + 1 :]
            for some in torch.split(labels, writer.rows_per_shard):
                writer.append(one_hot(some, opened.vocab_size))
            return writer.finish()
        cut = windows(train.num_tokens, int(fields["context"]), fields["stride"])
        check_fits(loaded, [train], cut[:1])
        begun = writer.rows_done
        with progress(train.num_rows, "tokens", f"Asking {fields['model']}", done=begun) as advance:
            for start, found in lm_distributions(
                loaded, train.tokens, cut, top_k, opened.vocab_size, batch_size, begun
            ):
                if kind == "knn-lm" and retriever is not None and weight is not None:
                    found = interpolated(retriever.slice(start, start + found.num_rows), found, weight)
                writer.append(found)
                advance(found.num_rows)
        return writer.finish()


def tuned_weight(knn: DistributionStore) -> float:
    """λ of the kNN-LM, as it was tuned on validation text when `knn` was made.

    Raises:
        MemdecError: `knn` was made without validation text.
    """
    found = knn.manifest.results.get("knn_lm")
    if found is None:
        raise MemdecError(f"{knn.folder} was made without validation text, so its weight is unknown; give --weight.")
    return float(found["weight"])


def one_hot(labels: Tensor, vocab_size: int) -> SparseDistributions:
    """All mass on the token that came. labels: int (n,)."""
    count = labels.numel()
    return SparseDistributions(torch.arange(count + 1), labels.to(torch.int32), torch.ones(count), vocab_size)


@torch.no_grad()
def lm_distributions(
    model: Any,
    tokens: Tensor,  # (T,) int
    cut: list[Window],
    top_k: int,
    vocab_size: int,
    batch_size: int,
    rows_done: int = 0,
) -> Iterator[tuple[int, SparseDistributions]]:
    """A language model's distributions from row `rows_done` on, as (first row, rows), a batch of windows at a time.

    Batches are cut by position alone, so that a run that goes on gets the bits of one that was not stopped.
    """
    plain, head, body = head_is_plain(model), output_head(model), trunk(model)
    chunk = max(1, LOGITS_BYTES // (4 * vocabulary_width(model)))
    for batch in batches(cut, batch_size):
        start, stop = batch[0].score_from, batch[-1].stop - 1
        if stop <= rows_done:
            continue
        inputs = torch.stack([tokens[window.start : window.stop - 1] for window in batch]).long()
        hidden = body(input_ids=inputs.to(input_device(model)), use_cache=False).last_hidden_state
        rows = torch.cat([part[window.score_from - window.start :] for part, window in zip(hidden, batch, strict=True)])
        parts = []
        for some in torch.split(rows, chunk):
            logits = (head(some) if plain else logits_from_hidden(model, some[None])[0])[:, :vocab_size].float()
            if not bool(torch.isfinite(logits.amax(1)).all()):
                raise MemdecError("The teacher's logits are no numbers; its weights are broken. Try --dtype float32.")
            parts.append(most_probable(logits, top_k))
        found = SparseDistributions.cat(parts)
        skipped = max(0, rows_done - start)
        if skipped:
            found = found.select(torch.arange(skipped, found.num_rows))
        yield start + skipped, found


def most_probable(logits: Tensor, top_k: int) -> SparseDistributions:
    """softmax(logits), its `top_k` most probable tokens; the others' mass is the residual. logits: float32 (n, V)."""
    count, vocab_size = logits.shape
    log_probs, ids = logits.log_softmax(1).topk(min(top_k, vocab_size), dim=1)
    ids, order = ids.sort(1)
    probs = log_probs.gather(1, order).exp().cpu()
    indptr = torch.arange(count + 1) * ids.shape[1]
    residual = (1 - probs.double().sum(1)).clamp(min=0).float()
    return SparseDistributions(indptr, ids.to("cpu", torch.int32).reshape(-1), probs.reshape(-1), vocab_size, residual)


def interpolated(knn: SparseDistributions, lm: SparseDistributions, weight: float) -> SparseDistributions:
    """weight·knn + (1 − weight)·lm, row by row, over the tokens of both; so are the residuals mixed.

    A row that the retriever knows nothing of (no neighbour) is the language model's alone.
    """
    count, vocab_size = lm.num_rows, lm.vocab_size
    weights = torch.where(knn.row_lengths() > 0, weight, 0.0).double()
    places = torch.cat([knn.row_ids() * vocab_size + knn.token_ids, lm.row_ids() * vocab_size + lm.token_ids])
    masses = torch.cat([knn.probs.double() * weights[knn.row_ids()], lm.probs.double() * (1 - weights)[lm.row_ids()]])
    unique, inverse = torch.unique(places, return_inverse=True)
    probs = torch.zeros(unique.numel(), dtype=torch.float64).index_add_(0, inverse, masses)
    kept = probs > 0
    unique, probs = unique[kept], probs[kept]
    indptr = torch.zeros(count + 1, dtype=torch.int64)
    indptr[1:] = torch.bincount(unique // vocab_size, minlength=count).cumsum(0)
    nothing = torch.zeros(count)
    residual = weights * (nothing if knn.residual is None else knn.residual).double()
    residual += (1 - weights) * (nothing if lm.residual is None else lm.residual).double()
    return SparseDistributions(
        indptr, (unique % vocab_size).to(torch.int32), probs.float(), vocab_size, residual.float()
    )
