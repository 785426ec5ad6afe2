"""Adapting the model that teaches to the corpus: fine-tuning before the datastore is made.

    memdec fit MODEL CORPUS --out DIR --adapt-epochs 3 --teacher knn-lm

A retriever whose keys come from a model that has read the domain is a better teacher than that of the plain base, as
in the paper, whose teacher is a finetuned GPT2-xl. So a copy of the teacher's model is trained on the training text by
plain cross-entropy (domain-adaptive pretraining, Gururangan et al., arXiv 2004.10964), with the memory's own settings;
the checkpoint with the lowest perplexity on validation text is kept. It is `train` with the teacher one-hot and β = 0,
and lies as `train` leaves it:

    OUT/teacher   the text itself as distributions
    OUT/training  training.json, log.jsonl
    OUT/memory    the adapted model, a plain transformers folder
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memdec.errors import MemdecError
from memdec.modeling.sources import read_config
from memdec.pipeline.batches import steps_in_epoch
from memdec.pipeline.embed import DEFAULT_CONTEXT
from memdec.pipeline.teachers import TEACHERS, build_teacher
from memdec.pipeline.train import Settings, train_memory
from memdec.stores.corpus import Corpus
from memdec.stores.windows import windows

# What is the memory's own, and not its teacher's.
OWN = ("beta", "layers", "epochs", "judge", "lora_rank")
# The settings of the training of a memory that the adaptation of its teacher takes over.
SHARED = tuple(name for name in Settings.__dataclass_fields__ if name not in OWN)
DEFAULT_EPOCHS = 3


def choose_teacher(options: Mapping[str, Any]) -> tuple[str, int]:
    """Who teaches, and for how many epochs that model is adapted first, where a user has not said it.

    A memory that is a whole copy of its base is taught by the kNN-LM of an adapted base, the best teacher that was
    found (docs/when_knn_pays.md); that takes one more training of a model of that size. A smaller memory is taught by
    the plain base's retriever: adapting would mean to train a model that is larger than the memory. A teacher or
    teacher's model that is named stands as it is.

    Args:
        options: those of ``fit``, of which ``teacher``, ``adapt_epochs``, ``teacher_model``, ``init`` and ``layers``
            count; None is as good as missing.

    Returns:
        Teacher and epochs.

    Raises:
        MemdecError: there is no such teacher, or nothing would come of the adaptation.
    """
    teacher, epochs = options.get("teacher"), options.get("adapt_epochs")
    if epochs is None:
        said = any(options.get(name) is not None for name in ("teacher", "teacher_model", "init", "layers"))
        epochs = 0 if said else DEFAULT_EPOCHS
    if teacher is None:
        teacher = "knn-lm" if epochs else "knn"
    if teacher not in TEACHERS:
        raise MemdecError(f"--teacher is {teacher!r}; wanted one of {', '.join(TEACHERS)}.")
    if epochs < 0:
        raise MemdecError(f"--adapt-epochs is {epochs}; wanted 0 (take the teacher's model as it is) or more.")
    if epochs and teacher == "one-hot":
        raise MemdecError(
            "--adapt-epochs adapts the model that teaches, and the teacher one-hot asks no model. Leave one of them "
            "out, or take --teacher knn, lm or knn-lm."
        )
    return teacher, epochs


def adaptation_steps(settings: Settings, epochs: int, num_windows: int) -> int:
    """Steps of an adaptation: those of its epochs over the windows, but no more than ``settings.max_steps``."""
    steps = epochs * steps_in_epoch(num_windows, settings.batch_size * settings.gradient_accumulation)
    return min(steps, settings.max_steps or steps)


def adapt_model(
    model: str | os.PathLike[str],
    corpus: Corpus,
    out: str | os.PathLike[str],
    *,
    epochs: int,
    **options: Any,
) -> Path:
    """Fine-tune a copy of a model on a corpus's training text; a run that was stopped is continued.

    Args:
        model: the causal LM: folder, hub id or ``.gguf`` file.
        corpus: the corpus; its validation text chooses the checkpoint.
        out: the folder for it.
        epochs: times that the training text is read.
        options: of :func:`memdec.pipeline.train.train_memory`, those of `SHARED` and ``save_every``, ``tensorboard``
            and ``device``. Without ``context`` it is 512, or what the model has positions for. ``max_steps`` ends the
            adaptation earlier, too.

    Returns:
        The adapted model's folder, ``out/memory``.

    Raises:
        MemdecError: as ``train_memory``.
    """
    out = Path(out)
    context = options.pop("context", None)
    if context is None:
        positions = getattr(read_config(model).get_text_config(), "max_position_embeddings", None)
        context = min(DEFAULT_CONTEXT, int(positions or DEFAULT_CONTEXT) + 1)
    stride = options.pop("stride", None)
    teacher = build_teacher("one-hot", corpus, out / "teacher", context=context, stride=stride)
    if options.get("max_steps"):
        settings = Settings(**{name: options[name] for name in SHARED if name in options})
        number = len(windows(corpus.split("train").num_tokens, context, stride))
        options["max_steps"] = adaptation_steps(settings, epochs, number)
    return train_memory(model, corpus, teacher, out, epochs=epochs, beta=0.0, judge="alone", context=context,
                        stride=stride, **options)  # fmt: skip
