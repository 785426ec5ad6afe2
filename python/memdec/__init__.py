"""memdec: a pretrained, plug-and-play memory for language models."""

__version__ = "0.1.0"

from memdec import ops
from memdec.build import build_info
from memdec.errors import MemdecError

__all__ = ["MemdecError", "__version__", "build_info", "ops"]
