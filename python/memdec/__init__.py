"""memdec: a pretrained, plug-and-play memory for language models."""

from __future__ import annotations

__version__ = "0.1.0"

import importlib
from typing import TYPE_CHECKING, Any

from memdec.errors import MemdecError

if TYPE_CHECKING:
    from memdec import ops as ops
    from memdec.build import build_info as build_info
    from memdec.distributions import SparseDistributions as SparseDistributions
    from memdec.modeling.memory_model import MemoryModel as MemoryModel

__all__ = ["MemdecError", "MemoryModel", "SparseDistributions", "__version__", "build_info", "ops"]

# What is imported when it is first asked for: torch takes a second and transformers more, and `memdec --help` needs
# neither, nor do the ops need transformers.
_LAZY = {
    "ops": "memdec.ops",
    "build_info": "memdec.build",
    "SparseDistributions": "memdec.distributions",
    "MemoryModel": "memdec.modeling.memory_model",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'memdec' has no attribute {name!r}")
    module = importlib.import_module(_LAZY[name])
    value = module if name == "ops" else getattr(module, name)
    globals()[name] = value
    return value
