"""memdec: a pretrained, plug-and-play memory for language models."""

from memdec.errors import MemdecError

__version__ = "0.1.0"

__all__ = ["MemdecError", "__version__"]
