"""Names of scripts: Python looks for modules in a script's own folder first, before it looks among its own."""

from __future__ import annotations

import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"


def test_no_script_stands_before_a_module_of_python_s() -> None:
    """bench/gpu/profile.py stood before `profile`, without which PyTorch is not imported."""
    scripts = {path.stem for path in BENCH.rglob("*.py")}
    assert len(scripts) > 10
    assert not scripts & set(sys.stdlib_module_names)
