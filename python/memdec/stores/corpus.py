"""The corpus on disk: three streams of tokens (train, validation, test), each with the places where its documents
begin.

A folder with ``manifest.json`` (format ``memdec.corpus``) and ``train.safetensors``, ``validation.safetensors``,
``test.safetensors``, each holding ``tokens`` int32 (T,), ``document_starts`` int64 (D+1,) and ``names`` uint8: the
documents' names as a JSON list. Every document ends with the tokenizer's end-of-text token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from memdec.errors import MemdecError
from memdec.stores.atomic import WrittenFile
from memdec.stores.manifest import REMEDY, Manifest
from memdec.stores.tensors import Array, map_tensors, write_tensors

FORMAT = "memdec.corpus"
VERSION = 1
SPLITS = ("train", "validation", "test")


class TokenSplit:
    """One split of a corpus.

    Attributes:
        tokens: int32 (T,), memory-mapped.
        document_starts: int64 (D+1,): document i is tokens[document_starts[i] : document_starts[i + 1]]; the last
            entry is T.
    """

    def __init__(self, tokens: torch.Tensor, document_starts: torch.Tensor, names: Sequence[str] | Array = ()) -> None:
        self.tokens = tokens
        self.document_starts = document_starts
        self._names = names

    @cached_property
    def names(self) -> list[str]:
        """The documents' names: the path within the source, then ``:line`` where a file holds many."""
        if isinstance(self._names, np.ndarray):
            return [str(name) for name in json.loads(self._names.tobytes())]
        return list(self._names)

    @property
    def num_tokens(self) -> int:
        return self.tokens.numel()

    @property
    def num_documents(self) -> int:
        return self.document_starts.numel() - 1

    @property
    def num_rows(self) -> int:
        """Predictions in the split: every token but the first."""
        return max(0, self.num_tokens - 1)

    def document(self, index: int) -> torch.Tensor:
        """The tokens of document ``index``, its end-of-text token included."""
        return self.tokens[int(self.document_starts[index]) : int(self.document_starts[index + 1])]


class Corpus:
    """A corpus folder, opened for reading. Use ``Corpus.open``; ``memdec.pipeline.corpus.build_corpus`` makes one."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._splits: dict[str, TokenSplit] = {}  # those that were read and checked

    @classmethod
    def open(cls, folder: str | Path) -> Corpus:
        """Open a corpus.

        Raises:
            MemdecError: no corpus there, of another version, not finished, or a file missing or truncated.
        """
        folder = Path(folder)
        manifest = Manifest.load_whole(folder, format=FORMAT, version=VERSION)
        return cls(folder, manifest)

    @property
    def vocab_size(self) -> int:
        """The number of token ids the tokenizer has, added tokens included."""
        return int(self.manifest.fields["vocab_size"])

    @property
    def tokenizer_fingerprint(self) -> str:
        return str(self.manifest.fields["tokenizer_fingerprint"])

    @property
    def eos_token_id(self) -> int:
        return int(self.manifest.fields["eos_token_id"])

    def split(self, name: str) -> TokenSplit:
        """The split ``"train"``, ``"validation"`` or ``"test"``; a split may be empty."""
        if name not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {name!r}")
        if name not in self._splits:
            self._splits[name] = self._read_split(name)
        return self._splits[name]

    def _read_split(self, name: str) -> TokenSplit:
        path = self.folder / f"{name}.safetensors"
        arrays = map_tensors(path)
        if not {"tokens", "document_starts", "names"} <= arrays.keys():
            raise MemdecError(f"{path} is not a split of a corpus. {REMEDY}")
        tokens, starts = torch.from_numpy(arrays["tokens"]), torch.from_numpy(arrays["document_starts"])
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            raise MemdecError(f"{path} is damaged: it holds tokens that its vocabulary does not have. {REMEDY}")
        return TokenSplit(tokens, starts, arrays["names"])


def write_split(
    folder: str | Path, name: str, tokens: Array, document_starts: Array, names: Sequence[str]
) -> WrittenFile:
    """Write one split: ``tokens`` int32 (T,), possibly memory-mapped, ``document_starts`` int64 (D+1,), D ``names``."""
    if len(document_starts) != len(names) + 1 or int(document_starts[-1]) != len(tokens):
        raise ValueError(
            f"{len(document_starts)} document starts ending at {document_starts[-1]} do not fit {len(names)} names and "
            f"{len(tokens)} tokens"
        )
    # ASCII with \\u escapes: the names of files may hold what is no valid Unicode.
    encoded = np.frombuffer(json.dumps(list(names), separators=(",", ":")).encode("ascii"), np.uint8)
    arrays: dict[str, Array] = {
        "tokens": tokens.astype(np.int32, copy=False),
        "document_starts": document_starts.astype(np.int64, copy=False),
        "names": encoded,
    }
    return write_tensors(Path(folder) / f"{name}.safetensors", arrays)
