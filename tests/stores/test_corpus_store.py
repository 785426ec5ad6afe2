"""The corpus on disk."""

from pathlib import Path

import numpy as np
import pytest
import torch

from memdec import MemdecError
from memdec.stores.corpus import FORMAT, VERSION, Corpus, write_split
from memdec.stores.manifest import Manifest


def test_round_trip(tmp_path: Path) -> None:
    fields = {"vocab_size": 9, "tokenizer_fingerprint": "f", "eos_token_id": 0}
    manifest = Manifest.start(tmp_path, format=FORMAT, version=VERSION, fields=fields)
    names = ["a.txt", "naïve\n.txt", "lone \udcff byte"]
    tokens, starts = np.array([5, 0, 8, 7, 0, 0], np.int32), np.array([0, 2, 5, 6])
    manifest.add(tmp_path, "train.safetensors", write_split(tmp_path, "train", tokens, starts, names))
    for name in ("validation", "test"):
        written = write_split(tmp_path, name, np.zeros(0, np.int32), np.zeros(1, np.int64), [])
        manifest.add(tmp_path, f"{name}.safetensors", written)
    with pytest.raises(MemdecError, match="not finished"):
        Corpus.open(tmp_path)
    manifest.finish(tmp_path)
    corpus = Corpus.open(tmp_path)
    assert (corpus.vocab_size, corpus.tokenizer_fingerprint, corpus.eos_token_id) == (9, "f", 0)
    train = corpus.split("train")
    assert train.tokens.dtype == torch.int32
    assert train.tokens.tolist() == tokens.tolist()
    assert train.document_starts.tolist() == starts.tolist()
    assert train.names == names
    assert train.document(1).tolist() == [8, 7, 0]
    assert (train.num_tokens, train.num_documents, train.num_rows) == (6, 3, 5)
    empty = corpus.split("test")
    assert (empty.num_tokens, empty.num_documents, empty.num_rows, empty.names) == (0, 0, 0, [])
    with pytest.raises(ValueError, match="split"):
        corpus.split("dev")
    with pytest.raises(ValueError, match="do not fit"):
        write_split(tmp_path, "train", tokens, starts[:-1], names)
