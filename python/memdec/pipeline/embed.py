"""From tokens to the datastore: run the model over the training text once and keep what it holds at every position.

The text is cut into windows (``memdec.stores.windows``), the windows into batches and the batches into shards, all
by position alone, so that a run that was killed computes the missing shards from the very batches that the
undisturbed run would have used, and gets the same bytes: the sums inside a matrix product depend on the shape of the
batch.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memdec.errors import MemdecError
from memdec.modeling.keys import hidden_and_keys
from memdec.modeling.scoring import load_causal_lm, vocabulary_width
from memdec.modeling.structure import head_is_plain, last_mlp, logits_from_hidden, output_head, text_config
from memdec.modeling.tokenizers import fingerprint, load_tokenizer
from memdec.ops import launch, token_log_prob
from memdec.pipeline.progress import progress
from memdec.stores.corpus import Corpus, TokenSplit
from memdec.stores.datastore import Datastore, DatastoreWriter, ValidationRows, to_float16
from memdec.stores.windows import Window, windows

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 << 20  # of keys, at most
SHARD_ROWS = 16384  # at least
DEFAULT_CONTEXT = 512  # tokens in a window
LOGITS_BYTES = 64 << 20  # of logits that exist at once when the validation tokens are scored


def build_datastore(
    model: Any,  # path, hub id or loaded transformers causal LM
    corpus: Corpus | str | Path,
    out: str | Path,
    *,
    context: int | None = None,
    stride: int | None = None,
    layer: str | None = None,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    validation_rows: int = 8192,
    shard_rows: int | None = None,
) -> Datastore:
    """Make the datastore of a corpus's training text; continues where a killed run stopped, with the same bytes in
    the end.

    Args:
        model: the model that makes the keys. Given as a path or id, its tokenizer must be the corpus's.
        corpus: a corpus, or the folder of one.
        out: the folder for the datastore.
        context: tokens in a window; no window may have more inputs than the model has positions. None: 512, or as many
            as the model has positions for.
        stride: see ``memdec.stores.windows.windows``; None makes every token be read once.
        layer: the module whose input is the key; None finds the last block's MLP.
        batch_size: windows that are run at once. It is part of the parameters, because other batches round otherwise.
        device: None is the GPU if there is one; a loaded model stays where it is.
        dtype: "auto" is bfloat16 where the device has it, else float32.
        validation_rows: rows of validation text to keep, with the model's own log-prob, for choosing settings; their
            windows are spread evenly over the validation text. 0 for none.
        shard_rows: rows a shard, rounded up to whole batches; None is a sixteenth of the rows, at least 16384 and at
            most 256 MiB of keys.

    Returns:
        The datastore, opened.

    Raises:
        MemdecError: another tokenizer, too little text, a context beyond the model's positions, hidden states that
            are not finite or do not fit float16, other parameters than those that the folder was begun with, or a
            disk that refuses.
    """
    if not isinstance(corpus, Corpus):
        corpus = Corpus.open(corpus)
    if batch_size < 1 or validation_rows < 0 or (shard_rows is not None and shard_rows < 1):
        raise MemdecError(
            f"batch_size must be at least 1, validation_rows at least 0 and shard_rows at least 1; "
            f"got {batch_size}, {validation_rows} and {shard_rows}"
        )
    train, held_out = corpus.split("train"), corpus.split("validation")
    if train.num_tokens < 2:
        raise MemdecError(f"The training text has {train.num_tokens} tokens; at least 2 are needed. Add text.")
    name = _model_name(model)
    if not isinstance(model, nn.Module):
        found = fingerprint(load_tokenizer(model))
        if found != corpus.tokenizer_fingerprint:
            raise MemdecError(
                f"The corpus in {corpus.folder} was made with another tokenizer than that of {model} "
                f"(fingerprints {corpus.tokenizer_fingerprint[:12]}… and {found[:12]}…). "
                "Make the corpus with this model's tokenizer, in another folder."
            )
        model = load_causal_lm(model, dtype=dtype, device=device if device is not None else default_device())
    elif device is not None:
        model = model.to(device)
    if context is None:
        context = min(DEFAULT_CONTEXT, (_positions(model) or DEFAULT_CONTEXT) + 1)
    cut = windows(train.num_tokens, context, stride)
    validation = _spread(windows(held_out.num_tokens, context, stride), validation_rows)
    check_fits(model, [train, held_out], [*cut[:1], *validation[:1]])
    was_training = model.training
    model.eval()
    try:
        layer_name = last_mlp(model, layer)[0]
        dim = hidden_and_keys(model, train.tokens[:1][None], layer)[1].shape[-1]
        fields: dict[str, Any] = {
            "model": name,
            "model_fingerprint": model_fingerprint(model),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "device": next(model.parameters()).device.type,
            "layer": layer_name,
            "context": context,
            "stride": stride,
            "batch_size": batch_size,
            "validation_rows": validation_rows,
            "shard_rows": shard_rows or max(SHARD_ROWS, min(-(-train.num_rows // 16), SHARD_BYTES // (2 * dim))),
            "corpus": corpus.manifest.checksum,
            "vocab_size": corpus.vocab_size,
            "tokenizer_fingerprint": corpus.tokenizer_fingerprint,
            "eos_token_id": corpus.eos_token_id,
        }
        with DatastoreWriter(
            out, num_rows=train.num_rows, dim=dim, document_starts=train.document_starts, fields=fields
        ) as writer:
            if writer.complete:
                return Datastore.open(out)
            _write_train(model, layer, train, cut, batch_size, fields["shard_rows"], writer)
            if validation and not writer.validation_done:
                writer.write_validation(
                    _validation_rows(model, layer, held_out, validation, batch_size, validation_rows, corpus.vocab_size)
                )
            return writer.finish()
    finally:
        model.train(was_training)


def default_device() -> str:
    """``"cuda"`` where there is a GPU and this build of memdec has kernels for it, else ``"cpu"``."""
    return "cuda" if launch.HAS_CUDA and torch.cuda.is_available() else "cpu"


def _write_train(
    model: nn.Module,
    layer: str | None,
    train: TokenSplit,
    cut: list[Window],
    batch_size: int,
    shard_rows: int,
    writer: DatastoreWriter,
) -> None:
    per_window = max(window.num_rows for window in cut)
    step = -(-shard_rows // (per_window * batch_size)) * batch_size  # windows a shard: whole batches
    with progress(train.num_rows, unit="tokens", label="Embedding", done=writer.rows_done) as advance:
        for first in range(0, len(cut), step):
            shard = cut[first : first + step]
            start, stop = shard[0].score_from, shard[-1].stop - 1
            if stop <= writer.rows_done:
                continue
            if start != writer.rows_done:
                raise MemdecError(
                    f"{writer.folder} holds {writer.rows_done} rows, which is not where a shard ends. "
                    "Delete the folder and run the command again."
                )
            stored = torch.empty(stop - start, writer.dim, dtype=torch.float16)
            done = 0
            for batch in batches(shard, batch_size):
                _, keys = _run(model, layer, train.tokens, batch)
                stored[done : done + len(keys)] = to_float16(keys, first_row=start + done)
                done += len(keys)
                advance(len(keys))
            writer.append(stored, train.tokens[start + 1 : stop + 1])


def batches(cut: Sequence[Window], batch_size: int) -> Iterator[list[Window]]:
    """Consecutive windows of one length, at most ``batch_size`` of them; nothing is padded."""
    batch: list[Window] = []
    for window in cut:
        if batch and (len(batch) == batch_size or window.stop - window.start != batch[0].stop - batch[0].start):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _run(
    model: nn.Module,
    layer: str | None,
    tokens: Tensor,  # (T,) int32
    batch: list[Window],
) -> tuple[Tensor, Tensor]:
    """Final hidden states and keys of the rows that the batch scores, in row order: (n, d) and (n, dim)."""
    inputs = torch.stack([tokens[window.start : window.stop - 1] for window in batch])
    hidden, keys = hidden_and_keys(model, inputs, layer)
    scored = [slice(window.score_from - window.start, window.stop - 1 - window.start) for window in batch]
    return (
        torch.cat([part[rows] for part, rows in zip(hidden, scored, strict=True)]),
        torch.cat([part[rows] for part, rows in zip(keys, scored, strict=True)]),
    )


def _spread(cut: list[Window], rows: int) -> list[Window]:
    """Windows with at least ``rows`` scored rows in all, spread evenly over the text; all windows if there are
    fewer."""
    if sum(window.num_rows for window in cut) <= rows:
        return cut
    if rows == 0:
        return []
    count = min(len(cut), -(-rows // max(1, min(window.num_rows for window in cut[:-1] or cut))))
    return [cut[index * len(cut) // count] for index in range(count)]


@torch.no_grad()
def _validation_rows(
    model: nn.Module,
    layer: str | None,
    held_out: TokenSplit,
    cut: list[Window],
    batch_size: int,
    limit: int,
    vocab_size: int,
) -> ValidationRows:
    plain = head_is_plain(model)
    head = output_head(model)
    keys, log_probs = [], []
    rows = torch.cat([torch.arange(window.score_from, window.stop - 1) for window in cut])
    values = held_out.tokens[rows + 1]
    done = 0
    with progress(len(rows), unit="tokens", label="Embedding validation text") as advance:
        for batch in batches(cut, batch_size):
            hidden, found = _run(model, layer, held_out.tokens, batch)
            keys.append(found.cpu())
            width = vocabulary_width(model)
            for part in torch.split(hidden, max(1, LOGITS_BYTES // (4 * width))):
                logits = head(part) if plain else logits_from_hidden(model, part[None])[0]
                targets = values[done : done + len(part)].long().to(logits.device)
                log_probs.append(token_log_prob(logits[:, :vocab_size], targets).float().cpu())
                done += len(part)
            advance(len(found))
    log_prob = torch.cat(log_probs)
    if not torch.isfinite(log_prob).all():
        raise MemdecError(
            "The model gives no probability (NaN or zero) to some tokens of the validation text. "
            "Its weights are damaged or its number type overflows: check the model, or try --dtype float32."
        )
    return ValidationRows(torch.cat(keys)[:limit], values[:limit], log_prob[:limit], rows[:limit])


def _positions(model: nn.Module) -> int | None:
    """The most tokens that the model can read at once; None where its config does not say."""
    found: int | None = getattr(text_config(model), "max_position_embeddings", None)
    return found


def check_fits(model: nn.Module, splits: list[TokenSplit], longest: list[Window]) -> None:
    """Refuse text that the model cannot read: ids beyond its embedding, windows beyond its positions."""
    positions = _positions(model)
    length = max(window.stop - window.start - 1 for window in longest)
    if positions is not None and length > positions:
        raise MemdecError(
            f"A window of {length + 1} tokens needs {length} positions; the model has {positions}. "
            f"Use --context {positions + 1} or less."
        )
    get = getattr(model, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    if isinstance(embedding, nn.Embedding):
        highest = max(int(split.tokens.max()) for split in splits if split.num_tokens)
        if highest >= embedding.num_embeddings:
            raise MemdecError(
                f"The corpus has token id {highest}, the model only {embedding.num_embeddings} embeddings: "
                "the corpus was made with another tokenizer. Make it with this model's."
            )


def _model_name(model: Any) -> str:
    """The model's name without the place where it lies, which must not be in the artefact."""
    if isinstance(model, nn.Module):
        model = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else str(model)


def model_fingerprint(model: nn.Module, dtype: torch.dtype | None = None) -> str:
    """Sha256 over the names and shapes of the weights and the first and last 1024 numbers of each: another training
    run, another number type or another model gives another one, in milliseconds. With `dtype`, of the weights cast to
    it."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().reshape(-1)
        ends = torch.cat([flat[:1024], flat[-1024:]]).to("cpu", dtype).contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} {ends.dtype} ".encode())
        digest.update(ends.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
