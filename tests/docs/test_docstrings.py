"""The examples in the docstrings of the public modules run and print what they say."""

import doctest
import importlib
import inspect
import pkgutil
from types import ModuleType

import pytest

import memdec


def modules() -> list[str]:
    """Every module of the package, but the extension and the modules that run the command line when imported."""
    found = [
        m.name for m in pkgutil.walk_packages(memdec.__path__, "memdec.") if not m.name.endswith(("._C", ".__main__"))
    ]
    return ["memdec", *found]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name: str) -> None:
    if name.endswith(".triton_kernels"):
        pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for CUDA only")
    module: ModuleType = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0


def test_ops_have_examples() -> None:
    """Each public op shows a runnable example (house rule)."""
    from memdec import ops

    without = [
        name for name in ops.__all__ if inspect.isfunction(op := getattr(ops, name)) and ">>>" not in (op.__doc__ or "")
    ]
    assert without == []
