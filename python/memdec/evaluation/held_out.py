"""Held-out text: the test split of a corpus that memdec built, or any file or folder that `memdec corpus` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from memdec.errors import MemdecError
from memdec.evaluation.perplexity import HeldOutText, count_words, join_documents
from memdec.stores.manifest import MANIFEST_NAME


def load_held_out(source: str | Path, tokenizer: Any, split: str = "test") -> HeldOutText:
    """Documents to measure on, tokenised with ``tokenizer``.

    Args:
        source: a corpus artefact, or a file or folder of text in any format that `memdec corpus` reads.
        tokenizer: the base model's; it has to have an end-of-text token.
        split: of a corpus artefact.

    Raises:
        MemdecError: nothing is there, it holds no text, the split is empty, or the corpus has another tokenizer.
    """
    if (Path(source) / MANIFEST_NAME).is_file():
        return _from_corpus(Path(source), tokenizer, split)
    if tokenizer.eos_token_id is None:
        raise MemdecError(
            "The base model's tokenizer has no end-of-text token, and documents need one to be told apart. "
            "Set eos_token in its tokenizer_config.json."
        )
    from memdec.pipeline.documents import read_documents

    names, texts, ids = [], [], []
    for document in read_documents(source)():
        names.append(document.name)
        texts.append(document.text)
        ids.append(tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"])
    held_out = join_documents(ids, texts, names, int(tokenizer.eos_token_id))
    if held_out.num_tokens < 2 or not any(text.strip() for text in texts):
        raise MemdecError(f"{source} holds no text to measure on ({len(names)} documents, all empty).")
    return held_out


def _from_corpus(folder: Path, tokenizer: Any, split: str) -> HeldOutText:
    from memdec.modeling.tokenizers import fingerprint
    from memdec.stores.corpus import Corpus

    corpus = Corpus.open(folder)
    if corpus.tokenizer_fingerprint != fingerprint(tokenizer):
        raise MemdecError(
            f"The corpus {folder} was tokenised with another tokenizer than the base model's, so its tokens mean "
            "something else to it. Give the text itself (--text FILE), or build a corpus with this model."
        )
    part = corpus.split(split)
    if part.num_documents == 0:
        raise MemdecError(
            f"The {split} split of {folder} is empty: the corpus has too few documents to hold one back. "
            "Give other held-out text with --text FILE, or build the corpus with other --fractions."
        )
    words, num_bytes = [], []
    for index in range(part.num_documents):
        # The tokens are all that a corpus keeps; for a byte-level tokenizer decoding gives back the very text.
        text = tokenizer.decode(part.document(index)[:-1].tolist(), clean_up_tokenization_spaces=False)
        words.append(count_words(text))
        num_bytes.append(len(text.encode("utf-8", "surrogatepass")))
    tokens = torch.as_tensor(part.tokens).clone()
    return HeldOutText(tokens, torch.as_tensor(part.document_starts).clone(), list(part.names), words, num_bytes)
