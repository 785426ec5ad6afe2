"""The demo's text: what is read, what is dropped as a near duplicate, and that the budget is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from memdec.demo import text as demo_text
from memdec.errors import MemdecError

YOUNG = "# Copyright 2025 The Team\n"
OLD = "# Copyright 2023 The Team\n"


def _write(root: Path, name: str, source: str) -> None:
    path = root / "models" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")


def test_docstrings_are_read_in_source_order_and_never_run():
    source = (
        '"""Module."""\nraise SystemExit\nclass A:\n    """Class."""\n'
        '    def f(self):\n        """Method."""\ndef g():\n    "Function."\n'
    )
    assert demo_text.docstrings_of(source) == ["Module.", "Class.", "Method.", "Function."]
    assert demo_text.docstrings_of("def broken(:") == []


def test_only_folders_that_are_young_throughout_are_taken(tmp_path):
    _write(tmp_path, "new/modeling_new.py", YOUNG + '"""New model."""')
    _write(tmp_path, "new/modular_new.py", YOUNG + '"""Source of the generated file."""')
    _write(tmp_path, "new/convert_new_to_hf.py", YOUNG + '"""Conversion."""')
    _write(tmp_path, "old/modeling_old.py", OLD + '"""Old model."""')
    _write(tmp_path, "mixed/modeling_mixed.py", OLD + '"""Old half."""')
    _write(tmp_path, "mixed/processing_mixed.py", YOUNG + '"""New half."""')
    _write(tmp_path, "undated/modeling_undated.py", '"""No licence header."""')
    text = demo_text.transformers_docstrings(root=tmp_path)
    assert text.documents == [("new", "New model.\n")]


def test_near_duplicates_are_dropped_across_documents():
    sentence = "the hidden states of the last layer are returned as a tuple of tensors for every layer of the model"
    near = sentence.replace("model", "network")
    other = (
        "an entirely different remark about byte patches and their entropy in the local encoder of this architecture"
    )
    kept = demo_text.drop_near_duplicates([("a", [sentence]), ("b", [near, other]), ("c", [sentence])])
    assert kept == [("a", [sentence]), ("b", [other]), ("c", [])]


def test_documents_are_cut_between_docstrings_to_fill_the_budget(tmp_path):
    for folder in range(4):
        for part in range(5):
            words = " ".join(f"w{folder}x{part}x{i}" for i in range(20))
            _write(tmp_path, f"m{folder}/part_{part}.py", YOUNG + f'"""{words}"""')
    everything = demo_text.transformers_docstrings(max_characters=10**9, root=tmp_path)
    budget = everything.characters // 2
    half = demo_text.transformers_docstrings(max_characters=budget, root=tmp_path)
    assert [name for name, _ in half.documents] == ["m0", "m1", "m2", "m3"]
    assert budget * 0.7 <= half.characters <= budget * 1.02  # separators between docstrings are not counted
    for (_, whole), (_, cut) in zip(everything.documents, half.documents, strict=True):
        assert whole.startswith(cut.rstrip("\n"))


def test_nothing_young_enough_is_explained(tmp_path):
    _write(tmp_path, "old/modeling_old.py", OLD + '"""Old model."""')
    with pytest.raises(MemdecError, match="or later in transformers"):
        demo_text.transformers_docstrings(root=tmp_path)


def test_documents_are_written_as_plain_text(tmp_path):
    text = demo_text.DomainText([("a", "α text\n"), ("b", "other\n")], 2, 0, 12, "0")
    demo_text.write_documents(text.documents, tmp_path / "text")
    assert sorted(p.name for p in (tmp_path / "text").iterdir()) == ["a.txt", "b.txt"]
    assert (tmp_path / "text" / "a.txt").read_text(encoding="utf-8") == "α text\n"
