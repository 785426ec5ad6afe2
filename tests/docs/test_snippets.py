"""Every ```python and ```bash block of README.md and docs/ runs, in the order of the page, in one folder a page.

The folder holds what the pages call their own: `my-model` (a tiny causal language model with its tokenizer), `my-docs`
(text files) and, once a page has made it, whatever that page makes. A block under an HTML comment that begins with
``not run:`` is left out, and the comment says why.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(
    r"^(?P<skip><!-- not run:[^\n]*-->\n+)?```(?P<language>python|bash)\n(?P<code>.*?)^```$", re.M | re.S
)


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, code) of each block that is to run."""
    return [(m["language"], m["code"]) for m in BLOCK.finditer(page.read_text("utf-8")) if not m["skip"]]


def as_script(page: Path) -> str:
    """The page as one Python program: bash blocks go through a shell that stops at the first failure."""
    parts = ["import subprocess"]
    for language, code in blocks(page):
        if language == "bash":
            parts.append(f"subprocess.run(['bash', '-euo', 'pipefail', '-c', {code!r}], check=True)")
        else:
            parts.append(code)
    return "\n".join(parts)


def test_the_pages_have_blocks() -> None:
    """Guards the pattern above: a page whose blocks are no longer found would pass unseen."""
    assert len(blocks(ROOT / "README.md")) >= 3


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda p: p.name)
def test_page(page: Path, snippet_folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", as_script(page)],
        cwd=snippet_folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, f"{page.name}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
