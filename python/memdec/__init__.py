"""memdec: a pretrained, plug-and-play memory for language models."""

from __future__ import annotations

__version__ = "0.1.0"

from typing import TYPE_CHECKING, Any

from memdec import ops
from memdec.build import build_info
from memdec.distributions import SparseDistributions
from memdec.errors import MemdecError

if TYPE_CHECKING:
    from memdec.modeling.memory_model import MemoryModel as MemoryModel

__all__ = ["MemdecError", "MemoryModel", "SparseDistributions", "__version__", "build_info", "ops"]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import; someone who wants only the ops does not pay for it.
    if name == "MemoryModel":
        from memdec.modeling.memory_model import MemoryModel

        return MemoryModel
    raise AttributeError(f"module 'memdec' has no attribute {name!r}")
