"""The whole job: text in, memory out.

    corpus ─▶ datastore ─▶ distributions ─▶ training ─▶ memory        (each a folder of that name in `out`;
       └─▶ adapted ─▲  (with adapt_epochs)                             another teacher's is teacher-NAME)

    memdec fit MODEL CORPUS --out DIR

Each stage continues what an earlier run left and does nothing where its artefact stands, so `fit` needs no record of
its own of how far it came: run it again and it goes on. A stage refuses to go on with other parameters than it was
begun with. To train anew with other settings on the same datastore, delete ``training`` and ``memory`` only.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from memdec.errors import MemdecError
from memdec.modeling.scoring import check_device
from memdec.modeling.sources import read_config
from memdec.modeling.tokenizers import compare, load_tokenizer
from memdec.pipeline.adapt import SHARED, adapt_model, choose_teacher
from memdec.pipeline.corpus import build_corpus
from memdec.pipeline.distributions import build_distributions, check_search
from memdec.pipeline.embed import build_datastore, default_device
from memdec.pipeline.initialise import choose_blocks
from memdec.pipeline.search import load_faiss
from memdec.pipeline.teachers import DEFAULT_TOP_K, build_teacher
from memdec.pipeline.train import Settings, train_memory

LOGGER = logging.getLogger(__name__)

FEW_DOCUMENTS = 8  # of validation text: on the PostgreSQL manual four chose otherwise than fifteen (bench/NOTES.md)


def fit(
    model: str | os.PathLike[str],
    corpus: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    init: str | os.PathLike[str] | None = None,
    layers: int | None = None,
    # corpus
    fractions: tuple[float, float, float] = (0.9, 0.05, 0.05),
    seed: int = 0,
    text_field: str = "text",
    workers: int = 1,
    max_tokens: int | None = None,
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    # datastore
    context: int | None = None,
    stride: int | None = None,
    layer: str | None = None,
    # distributions
    k: int | None = None,
    temperature: float | None = None,
    backend: str = "exact",
    exclude_same_document: bool = False,
    min_prob: float = 1e-6,
    codec: str = "log8",
    memory_limit: str | int = "1GiB",
    # teacher
    teacher: str | None = None,
    teacher_model: str | os.PathLike[str] | None = None,
    adapt_epochs: int | None = None,
    top_k: int = DEFAULT_TOP_K,
    # training
    beta: float = 0.5,
    epochs: int = 8,
    max_steps: int | None = None,
    batch_size: int = 4,
    gradient_accumulation: int = 1,
    learning_rate: float = 1e-4,
    schedule: str = "cosine",
    warmup: float = 0.05,
    weight_decay: float = 0.01,
    eval_every: int | None = None,
    patience: int | None = None,
    save_every: int | None = None,
    validation_tokens: int = 32768,
    gradient_checkpointing: bool = False,
    tensorboard: bool = True,
    device: torch.device | str | None = None,
    dtype: str = "auto",
) -> Path:
    """Make a memory of a corpus, from its text; a run that was stopped, however it was, is continued.

    Args:
        model: causal LM that makes the datastore and is mixed with the memory: folder, hub id or ``.gguf`` file.
        corpus: file or folder of text, or a dataset; see :func:`memdec.pipeline.corpus.build_corpus`.
        out: folder for everything: ``corpus``, ``datastore``, ``distributions``, ``training`` and ``memory``, and
            ``adapted`` with `adapt_epochs`.
        init: model that the memory starts from; None is `model`.
        layers: blocks the memory keeps; None keeps all.
        fractions: shares of the text for training, validation and test.
        seed: of that split, of the order in which training reads, and of its dropout.
        text_field: where the text is in .jsonl, Parquet and datasets.
        workers: processes that tokenise.
        max_tokens: take at most so many tokens of the text.
        validation: text of its own to validate on.
        test: text of its own to test on.
        context: tokens in a window; None is 512, or what the model has positions for.
        stride: how far windows are apart; None reads every token once.
        layer: module whose input is the key; None finds the last block's MLP.
        k: neighbours of a row; None is 1024, or as many as there are.
        temperature: T of the neighbours' weights exp(−d/T); None chooses it on validation text.
        backend: how neighbours are searched: "exact" or a faiss index.
        exclude_same_document: neighbours come from other documents only.
        min_prob: probabilities below this are cut; their sum is kept.
        codec: how probabilities are stored: "log8" or "float16".
        memory_limit: memory that the search may take.
        teacher: what the memory imitates: "knn", the retriever; "lm", a language model; "knn-lm", both mixed; or
            "one-hot", the text itself. See :mod:`memdec.pipeline.teachers`. "lm" and "one-hot" need no datastore.
            None: the kNN-LM of an adapted base for a whole copy of it, the base's retriever for a smaller memory; see
            :func:`memdec.pipeline.adapt.choose_teacher`.
        teacher_model: the model that teaches, by its keys ("knn"), its own distributions ("lm") or both ("knn-lm");
            None is `model`. It must have the same tokenizer.
        adapt_epochs: fine-tune a copy of that model on the training text first, so many epochs by plain cross-entropy
            with the settings of the training below, and let it teach; see :mod:`memdec.pipeline.adapt`. 0: as it is.
            None: 3 for a whole copy of the base without a `teacher` or `teacher_model` of yours, else 0.
        top_k: tokens that are kept of its distributions.
        beta: weight of the KL term in the loss, 0 to 1.
        epochs: times that training reads the text.
        max_steps: optimiser steps; overrules `epochs`.
        batch_size: windows in one forward.
        gradient_accumulation: forwards in one step.
        learning_rate: the highest.
        schedule: "cosine", "linear" or "constant".
        warmup: share of the steps in which the rate rises.
        weight_decay: AdamW's, on matrices.
        eval_every: steps between evaluations; None is an epoch, or a quarter of the run if that is less.
        patience: evaluations in a row without a better one after which training ends; None goes on to the last step.
        save_every: steps between checkpoints; None is each evaluation, and every five minutes.
        validation_tokens: at most so many tokens of validation text are scored.
        gradient_checkpointing: compute activations twice instead of keeping them.
        tensorboard: write the curves for TensorBoard too, if it is installed.
        device: None is the first accelerator, else the CPU.
        dtype: "auto" is bfloat16 where the device has it, else float32.

    Returns:
        The memory's folder, ``out/memory``.

    Raises:
        MemdecError: what a stage cannot work with, in words; what is done stays.

    Example:
        >>> fit("SmolLM2-135M", "manuals/", "run")   # doctest: +SKIP
        PosixPath('run/memory')
    """
    out = Path(out)
    training: dict[str, Any] = {
        "beta": beta,
        "layers": layers,
        "epochs": epochs,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "gradient_accumulation": gradient_accumulation,
        "context": context,
        "stride": stride,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "seed": seed,
        "eval_every": eval_every,
        "patience": patience,
        "validation_tokens": validation_tokens,
        "dtype": dtype,
        "gradient_checkpointing": gradient_checkpointing,
    }
    # Not after an hour of embedding.
    Settings(**training).check()
    check_device(device)
    check_search(temperature, backend, memory_limit)
    if backend.lower() != "exact":
        load_faiss()
    teacher, adapt_epochs = choose_teacher(
        {"teacher": teacher, "adapt_epochs": adapt_epochs, "teacher_model": teacher_model, "init": init,
         "layers": layers}
    )  # fmt: skip
    if layers is not None:
        config = read_config(model if init is None else init).get_text_config()
        choose_blocks(int(config.num_hidden_layers), layers)
    if init is not None:
        compare(load_tokenizer(model), load_tokenizer(init), base_name=str(model), memory_name=str(init))
    if temperature is None and validation is None and fractions[1] == 0:
        raise MemdecError(
            "The temperature and alpha are chosen on validation text, and --fractions leaves none. "
            "Give it a share, or a text of its own with --validation."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MemdecError(
            "fit runs in one process. Run the stages before training alone, then "
            "`torchrun --nproc-per-node=N -m memdec train …` or `accelerate launch -m memdec train …`."
        )
    if adapt_epochs and (out / "datastore").exists() and not (out / "adapted").exists():  # not after a training
        raise MemdecError(
            f"{out} holds a run whose teacher was not adapted, and this one would be for {adapt_epochs} epochs. Say "
            "--adapt-epochs 0 (and its --teacher) to continue it, or choose another folder."
        )
    LOGGER.info("teacher: %s%s", teacher, f", of a model adapted for {adapt_epochs} epochs" if adapt_epochs else "")
    stages = iter(range(1, 7))
    of = 2 + bool(adapt_epochs) + {"knn": 2, "knn-lm": 3}.get(teacher, 1)
    LOGGER.info("%d of %d: corpus", next(stages), of)
    text = build_corpus(
        os.fspath(corpus),
        os.fspath(model),
        out / "corpus",
        fractions=fractions,
        seed=seed,
        text_field=text_field,
        workers=workers,
        max_tokens=max_tokens,
        validation=None if validation is None else os.fspath(validation),
        test=None if test is None else os.fspath(test),
    )
    where = default_device() if device is None else device
    taught_by = model if teacher_model is None else teacher_model
    rows = text.split("train").num_rows
    if teacher in ("knn", "knn-lm") and k is not None and k > rows - 1:
        raise MemdecError(
            f"k is {k}, but the training text has {rows} rows, so a row has {rows - 1} neighbours at most. "
            "Take a smaller --k or more text."
        )
    judges = text.split("validation")
    if 0 < judges.num_documents < FEW_DOCUMENTS and validation is None:
        LOGGER.warning(
            "checkpoint and alpha will be chosen on %d %s of validation text (%d tokens), and documents differ; the "
            "second number of --fractions holds out more",
            judges.num_documents, "document" if judges.num_documents == 1 else "documents", judges.num_tokens,
        )  # fmt: skip
    if adapt_epochs:
        LOGGER.info("%d of %d: adapting the model that teaches", next(stages), of)
        taught_by = adapt_model(taught_by, text, out / "adapted", epochs=adapt_epochs, device=device,
                                save_every=save_every, tensorboard=tensorboard,
                                **{name: training[name] for name in SHARED if name in training})  # fmt: skip
    distributions = None
    if teacher in ("knn", "knn-lm"):
        LOGGER.info("%d of %d: datastore (%d rows)", next(stages), of, rows)
        datastore = build_datastore(os.fspath(taught_by), text, out / "datastore", context=context, stride=stride,
                                    layer=layer, device=device, dtype=dtype)  # fmt: skip
        LOGGER.info("%d of %d: distributions", next(stages), of)
        distributions = build_distributions(
            datastore,
            out / "distributions",
            k=k,
            temperature=temperature,
            backend=backend,
            exclude_same_document=exclude_same_document,
            min_prob=min_prob,
            codec=codec,
            memory_limit=memory_limit,
            device=where,
        )
    if teacher != "knn":
        LOGGER.info("%d of %d: the teacher's distributions (%s)", next(stages), of, teacher)
        distributions = build_teacher(teacher, text, out / f"teacher-{teacher}", knn=distributions, top_k=top_k,
                                      model=taught_by, codec=codec,
                                      context=context, stride=stride, device=device, dtype=dtype)  # fmt: skip
    assert distributions is not None
    LOGGER.info("%d of %d: training", next(stages), of)
    return train_memory(model if init is None else init, text, distributions, out, base=model, device=device,
                        save_every=save_every, tensorboard=tensorboard, **training)  # fmt: skip
