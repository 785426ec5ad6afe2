"""What this build of memdec is and what it runs on."""

from __future__ import annotations

from typing import Any

import torch

from memdec import _C


def build_info() -> dict[str, Any]:
    """Tell what was built and what runs.

    Returns:
        A dict with ``version``; ``cuda`` ("on" or "off": whether it has CUDA kernels), ``arches`` (those it has code
        for: "90-real" is machine code, "120-virtual" what later GPUs compile their own from) and ``nvcc`` (its
        version, or None); ``compiler``; ``simd_levels`` (those built) and ``simd`` (the one in use: the best that the
        machine has, or the one that the environment variable ``MEMDEC_SIMD`` names); ``threads`` (what ops use:
        ``torch.get_num_threads()``); ``torch``.

    Example:
        >>> import memdec
        >>> memdec.build_info()["cuda"] in ("on", "off")
        True
    """
    from memdec import __version__

    return {"version": __version__, **_C.build_info(), "threads": torch.get_num_threads(), "torch": torch.__version__}
