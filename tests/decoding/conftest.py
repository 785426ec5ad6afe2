"""Pairs of tiny models; a second thread would only wait for the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from memdec import MemoryModel


@pytest.fixture(autouse=True)
def one_thread(two_threads: None) -> Iterator[None]:
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)  # what other tests make once for all must not depend on which tests ran before


@pytest.fixture(scope="session")
def make_pair(tiny_llama: Callable[..., Any], tiny_gpt2: Callable[..., Any]) -> Callable[..., MemoryModel]:
    """make_pair(vocab=384, alpha=0.4, close=0.0, …): a MemoryModel of a tiny llama and a memory.

    The memory is a tiny gpt2, or, with `close` above 0, the llama itself with so much noise in its weights: a drafter
    that is often right.
    """

    def make(vocab: int = 384, alpha: float = 0.4, close: float = 0.0, tokenizer: Any = None, **memory: Any) -> Any:
        base = tiny_llama(vocab=vocab, eos_token_id=None)
        if close:
            other = tiny_llama(vocab=vocab, eos_token_id=None)
            torch.manual_seed(9)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter += close * parameter.std() * torch.randn_like(parameter)
        else:
            other = tiny_gpt2(vocab=vocab, seed=2, eos_token_id=None, **memory)
        return MemoryModel.from_pretrained(base, other, alpha=alpha, tokenizer=tokenizer)

    return make
