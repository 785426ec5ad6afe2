"""A base, a memory that nobody trained, a corpus and a datastore, all tiny, made once."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class TinyRun:
    """The folders, the models behind them, the memory's alpha and the datastore's context."""

    base: Path
    memory: Path
    corpus: Path
    datastore: Path
    base_model: Any
    memory_model: Any
    tokenizer: Any
    alpha: float = 0.35
    context: int = 48


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory, tiny_tokenizer, tiny_llama, tiny_model_dir) -> TinyRun:
    from memdec.modeling.tokenizers import fingerprint
    from memdec.pipeline.corpus import build_corpus
    from memdec.pipeline.embed import build_datastore
    from memdec.stores.memory import MemoryCard, write_memory_card

    root = tmp_path_factory.mktemp("tiny-run")
    (root / "text").mkdir()
    draw = random.Random(0)
    words = [
        "the",
        "court",
        "a",
        "tenant",
        "judge",
        "clerk",
        "granted",
        "denied",
        "recorded",
        "lease",
        "motion",
        "noon",
    ]
    for index in range(16):
        sentences = [" ".join(draw.choices(words, k=9)).capitalize() + "." for _ in range(6 + index % 7)]
        (root / "text" / f"doc{index:02d}.txt").write_text(" ".join(sentences) + "\n")
    memory_model = tiny_llama(seed=5)
    memory_model.save_pretrained(root / "memory")
    tiny_tokenizer.save_pretrained(root / "memory")
    corpus = build_corpus(root / "text", str(tiny_model_dir), root / "corpus", fractions=(0.6, 0.2, 0.2))
    made_of = {"base": "tiny", "corpus": corpus.manifest.checksum}
    write_memory_card(root / "memory", MemoryCard(TinyRun.alpha, fingerprint(tiny_tokenizer), 384, made_of))
    build_datastore(
        str(tiny_model_dir),
        corpus,
        root / "datastore",
        context=TinyRun.context,
        batch_size=4,
        dtype="float32",
        device="cpu",
    )
    return TinyRun(
        tiny_model_dir, root / "memory", root / "corpus", root / "datastore", tiny_llama(), memory_model, tiny_tokenizer
    )
