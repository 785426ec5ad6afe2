"""The corpus stage: nothing lost, nothing leaked, the same bytes everywhere, a clear word for what is unreadable."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memdec import MemdecError
from memdec.pipeline import corpus as corpus_stage
from memdec.pipeline.corpus import build_corpus, cut_text
from memdec.pipeline.documents import html_text, read_documents
from memdec.stores.corpus import SPLITS, Corpus
from memdec.stores.verify import verify


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decoded(corpus: Corpus, tokenizer: Any) -> dict[str, dict[str, str]]:
    """split → document name → text, with the end-of-text token checked and taken off."""
    result: dict[str, dict[str, str]] = {}
    for split in SPLITS:
        part = corpus.split(split)
        result[split] = {}
        for index, name in enumerate(part.names):
            tokens = part.document(index).tolist()
            assert tokens[-1] == corpus.eos_token_id
            assert corpus.eos_token_id not in tokens[:-1]
            result[split][name] = tokenizer.decode(tokens[:-1])
        assert len(result[split]) == part.num_documents
    return result


def test_no_token_is_lost_and_documents_are_whole(tmp_path: Path, tiny_corpus_dir: Path, tiny_tokenizer: Any) -> None:
    corpus = build_corpus(tiny_corpus_dir, tiny_tokenizer, tmp_path / "out")
    found = decoded(corpus, tiny_tokenizer)
    texts = {path.name: path.read_text() for path in tiny_corpus_dir.iterdir()}
    assert {name: text for split in SPLITS for name, text in found[split].items()} == texts
    for split in SPLITS:
        assert found[split], split
        assert list(found[split]) == sorted(found[split])
    assert corpus.manifest.results["split_by"] == "documents"
    assert corpus.manifest.results["tokens"] == {split: corpus.split(split).num_tokens for split in SPLITS}
    assert corpus.vocab_size == 384
    assert verify(tmp_path / "out") == []


def test_the_bytes_depend_on_the_text_only(
    tmp_path: Path, tiny_corpus_dir: Path, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer()
    build_corpus(tiny_corpus_dir, tokenizer, tmp_path / "a")
    elsewhere = tmp_path / "some" / "where else"
    shutil.copytree(tiny_corpus_dir, elsewhere)
    (elsewhere / ".hidden.txt").write_text("not read")
    truncating = make_tokenizer()
    truncating.backend_tokenizer.enable_truncation(5)
    truncating.backend_tokenizer.enable_padding(length=9)
    build_corpus(elsewhere, truncating, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.slow
def test_workers_do_not_change_the_bytes(
    tmp_path: Path, tiny_corpus_dir: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_stage, "CHUNK_CHARACTERS", 1500)  # many pieces of work
    build_corpus(tiny_corpus_dir, tiny_tokenizer, tmp_path / "a")
    build_corpus(tiny_corpus_dir, tiny_tokenizer, tmp_path / "b", workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_finished_corpus_is_left_and_other_text_is_refused(
    tmp_path: Path, tiny_corpus_dir: Path, tiny_tokenizer: Any
) -> None:
    build_corpus(tiny_corpus_dir, tiny_tokenizer, tmp_path / "out")
    before = contents(tmp_path / "out")
    build_corpus(tiny_corpus_dir, tiny_tokenizer, tmp_path / "out")
    with pytest.raises(MemdecError, match="seed was 0, now 1"):
        build_corpus(tiny_corpus_dir, tiny_tokenizer, tmp_path / "out", seed=1)
    (tiny_corpus_dir / "new.txt").write_text("A new document.")
    with pytest.raises(MemdecError, match="the text has been changed since"):
        build_corpus(tiny_corpus_dir, tiny_tokenizer, tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("moment", ["_tokenise", "_check_splits"])
def test_stopped_and_started_again(
    tmp_path: Path, tiny_corpus_dir: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    build_corpus(tiny_corpus_dir, tiny_tokenizer, tmp_path / "a")

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(corpus_stage, moment, stop)
        build_corpus(tiny_corpus_dir, tiny_tokenizer, tmp_path / "b")
    with pytest.raises(MemdecError, match="not finished"):
        Corpus.open(tmp_path / "b")
    build_corpus(tiny_corpus_dir, tiny_tokenizer, tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_held_out_documents_stay_held_out_when_others_come(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    splits = []
    for count in (300, 400):
        for index in range(count):
            (folder / f"{index:03d}.txt").write_text(f"Document number {index}.")
        corpus = build_corpus(folder, tiny_tokenizer, tmp_path / f"out{count}")
        splits.append({name: split for split in SPLITS for name in corpus.split(split).names})
    assert splits[0].items() <= splits[1].items()
    # 400 draws with probability 0.1 of being held out lie outside 17 … 63 for one seed in 10⁴; this seed is fixed.
    assert 16 < sum(split != "train" for split in splits[1].values()) < 64
    other = build_corpus(folder, tiny_tokenizer, tmp_path / "other", seed=1)
    assert other.split("test").names != [name for name, split in splits[1].items() if split == "test"]


def test_copies_are_dropped_and_never_cross_the_splits(
    tmp_path: Path, tiny_corpus_dir: Path, tiny_tokenizer: Any
) -> None:
    (tiny_corpus_dir / "a-copy.txt").write_text((tiny_corpus_dir / "doc07.txt").read_text())
    (tiny_corpus_dir / "blank.txt").write_text(" \n\n")
    held_out = tmp_path / "held-out.txt"
    held_out.write_text((tiny_corpus_dir / "doc03.txt").read_text())
    corpus = build_corpus(tiny_corpus_dir, tiny_tokenizer, tmp_path / "out", validation=held_out)
    found = decoded(corpus, tiny_tokenizer)
    texts = [text for split in SPLITS for text in found[split].values()]
    assert len(texts) == len(set(texts)) == 40
    assert corpus.manifest.results["duplicates"] == 2
    assert corpus.manifest.results["empty"] == 1
    assert list(found["validation"]) == ["validation:held-out.txt"]
    assert "doc03.txt" not in found["train"] | found["test"]
    assert found["test"]


def test_max_tokens_takes_a_share_of_each_split(tmp_path: Path, tiny_corpus_dir: Path, tiny_tokenizer: Any) -> None:
    thirds = (0.6, 0.2, 0.2)
    whole = build_corpus(tiny_corpus_dir, tiny_tokenizer, tmp_path / "whole", fractions=thirds)
    part = build_corpus(tiny_corpus_dir, tiny_tokenizer, tmp_path / "part", fractions=thirds, max_tokens=1000)
    assert part.manifest.results["tokens"] == {"train": 600, "validation": 200, "test": 200}
    before, after = decoded(whole, tiny_tokenizer), decoded(part, tiny_tokenizer)
    for split in SPLITS:
        cut = [name for name, text in after[split].items() if text != before[split][name]]
        assert len(cut) <= 1  # the last one taken
        assert all(before[split][name].startswith(after[split][name]) for name in cut)
    more = build_corpus(tiny_corpus_dir, tiny_tokenizer, tmp_path / "more", fractions=thirds, max_tokens=10**9)
    assert more.manifest.results == whole.manifest.results


def test_one_document_is_cut_into_three_blocks(tmp_path: Path, tiny_corpus_dir: Path, tiny_tokenizer: Any) -> None:
    text = "\n\n".join(path.read_text().strip() for path in sorted(tiny_corpus_dir.iterdir()))
    (tmp_path / "book.txt").write_text(text)
    corpus = build_corpus(tmp_path / "book.txt", tiny_tokenizer, tmp_path / "out")
    assert corpus.manifest.results["split_by"] == "blocks"
    found = decoded(corpus, tiny_tokenizer)
    blocks = [block for split in SPLITS for block in found[split].values()]
    assert len(blocks) == 3
    assert "".join(blocks) == text
    assert 0.88 < len(blocks[0]) / len(text) < 0.92
    assert all(block.endswith("\n\n") for block in blocks[:2])
    assert corpus.split("test").names == ["book.txt [95%–100%]"]


def test_text_shorter_than_a_window(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "note.txt").write_text("The clerk withdrew seven letters before noon, without delay, in the hearing.")
    corpus = build_corpus(tmp_path / "note.txt", tiny_tokenizer, tmp_path / "out", fractions=(0.6, 0.2, 0.2))
    assert all(corpus.split(split).num_tokens >= 2 for split in SPLITS)


def test_a_few_short_documents_are_split_whole(tmp_path: Path, tiny_tokenizer: Any) -> None:
    lines = [json.dumps({"text": f"Short document {index}."}) for index in range(3)]
    (tmp_path / "three.jsonl").write_text("\n".join(lines))
    corpus = build_corpus(tmp_path / "three.jsonl", tiny_tokenizer, tmp_path / "out")
    assert [corpus.split(split).num_documents for split in SPLITS] == [1, 1, 1]


def test_text_too_short_to_hold_anything_out(tmp_path: Path, tiny_tokenizer: Any) -> None:
    (tmp_path / "word.txt").write_text("a")
    with pytest.raises(MemdecError, match=r"too small: nothing is left for (train|validation|test)\. Add text"):
        build_corpus(tmp_path / "word.txt", tiny_tokenizer, tmp_path / "out")
    corpus = build_corpus(tmp_path / "word.txt", tiny_tokenizer, tmp_path / "all", fractions=(1.0, 0.0, 0.0))
    assert corpus.split("train").num_tokens == 2


def test_cut_text_prefers_paragraphs_then_lines_then_words() -> None:
    text = "word " * 20 + "line.\n" + "word " * 10 + "\n\n" + "word " * 30
    assert text[: cut_text(text, 0.55, tolerance=0.1)].endswith("\n\n")
    assert text[: cut_text(text, 0.35, tolerance=0.03)].endswith("line.\n")
    assert text[cut_text(text, 0.9, tolerance=0.03) :].startswith("word")
    assert cut_text("x" * 100, 0.9) == 90
    assert (cut_text(text, 0.0), cut_text(text, 1.0)) == (0, len(text))


def all_documents(source: Path | str, **options: Any) -> dict[str, str]:
    return {document.name: document.text for document in read_documents(source, **options)()}


def test_all_kinds_of_files_in_one_folder(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    folder = tmp_path / "mixed"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbfwith a mark")
    (folder / "sub" / "a.md").write_text("# Markdown\n")
    (folder / "c.HTML").write_text("<head><title>T</title><style>p{}</style></head><body><p>One</p></body>")
    (folder / "d.jsonl").write_text(
        '{"body": "first"}\n\n{"body": "third", "other": 1}\n{"body": null}\n{"body": "\\ud800"}'
    )
    with gzip.open(folder / "e.jsonl.gz", "wt") as file:
        file.write('{"body": "packed"}\n')
    parquet.write_table(pyarrow.table({"body": ["row one", "row two"], "n": [1, 2]}), folder / "f.parquet")
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    (folder / "sub" / "up").symlink_to(folder)
    found = all_documents(folder, text_field="body")
    assert list(found.items()) == [
        ("b.txt", "with a mark"),
        ("c.HTML", "T\n\nOne\n"),
        ("d.jsonl:1", "first"),
        ("d.jsonl:3", "third"),
        ("d.jsonl:4", ""),
        ("d.jsonl:5", "?"),
        ("e.jsonl.gz:1", "packed"),
        ("f.parquet:1", "row one"),
        ("f.parquet:2", "row two"),
        ("sub/a.md", "# Markdown\n"),
    ]


def test_html_keeps_what_a_reader_sees() -> None:
    page = (
        "<nav>menu</nav><h1>A &lt;b&gt;</h1>\n<p>x\n y<br/>z</p><pre>  keep\n   this</pre>"
        "<ul><li>i<li>j</ul><script>if (1<2) x()</script><!-- no -->"
    )
    assert html_text(page).split("\n\n") == ["A <b>", "x y\nz", "  keep\n   this", "i\nj\n"]
    assert html_text("") == html_text("<script>x</script>") == ""
    assert html_text("<p>a</p><![foo[x]]><p>b</p>") == "a\n\nb\n"  # a browser skips it as a comment


def test_datasets_saved_and_by_name(tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [f"Row {index} of the table." for index in range(30)]
    table = datasets.Dataset.from_dict({"text": rows})
    table.save_to_disk(str(tmp_path / "saved"))
    assert list(all_documents(tmp_path / "saved").values()) == rows
    # The same, with the source's own splits: these are kept, and the missing one is drawn from train.
    datasets.DatasetDict({"train": table.select(range(25)), "test": table.select(range(25, 30))}).save_to_disk(
        str(tmp_path / "split")
    )
    corpus = build_corpus(tmp_path / "split", tiny_tokenizer, tmp_path / "out")
    assert corpus.split("test").names == [f"test:{index}" for index in range(1, 6)]
    assert corpus.split("validation").num_documents >= 1
    assert corpus.split("train").num_documents + corpus.split("validation").num_documents == 25
    # By name: a folder of data files is what a hub repository is.
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "train.jsonl").write_text("\n".join(json.dumps({"text": row}) for row in rows))
    assert list(all_documents(f"hf:{tmp_path / 'named'}").values()) == rows
    with pytest.raises(MemdecError, match="no field 'body'"):
        read_documents(tmp_path / "saved", text_field="body")

    def refuse(*arguments: object, **options: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(MemdecError, match=r"could be loaded \(ConnectionError: no network\)"):
        read_documents("no-such-dataset-anywhere")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"text\0more", r"a\.txt is not text: it contains zero bytes \(it is a binary"),
        ("a.txt", "text".encode("utf-16"), "UTF-16"),
        ("a.md", "naïve".encode("latin-1"), r"not UTF-8 text \(byte 2 is 0xef\).*iconv"),
        ("a.bin", bytes(range(256)), "binary"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'["x"]', "line 1 is not a JSON object"),
        ("a.jsonl", b'{"body": "x"}', "no field 'text'; it has body"),
        ("a.jsonl", b'{"text": 3}', "is not text but int"),
        ("a.jsonl", b"\xff\xfe\x00", "zero bytes"),
        ("a.txt.gz", b"not gzip", "damaged or truncated"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9], "damaged or truncated"),
        ("a.parquet", b"PAR1 no", "as Parquet"),
        ("a.txt", b"", "corpus is empty"),
        ("a.jsonl", b'{"text": ""}\n', "corpus is empty"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, tiny_tokenizer: Any, name: str, data: bytes, message: str) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / name).write_bytes(data)
    with pytest.raises(MemdecError, match=message):
        build_corpus(folder / name, tiny_tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_without_text_and_missing_sources(tmp_path: Path) -> None:
    folder = tmp_path / "binary"
    folder.mkdir()
    with pytest.raises(MemdecError, match="holds no files"):
        read_documents(folder)
    (folder / "a.png").write_bytes(b"\0")
    (folder / "b.png").write_bytes(b"\0")
    with pytest.raises(MemdecError, match=r"only files of other kinds \(2 × \.png\)"):
        read_documents(folder)
    with pytest.raises(MemdecError, match="does not exist"):
        read_documents(tmp_path / "nowhere.txt")
    with pytest.raises(MemdecError, match="does not exist"):
        read_documents("./nowhere/at/all")


def test_settings_and_tokenizers_that_cannot_be(
    tmp_path: Path, tiny_corpus_dir: Path, make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"fractions": (0.9, 0.2, 0.1)}, "fractions"),
        ({"fractions": (0.0, 0.5, 0.5)}, "fractions"),
        ({"workers": 0}, "workers"),
        ({"max_tokens": 1}, "max_tokens"),
    ]
    for options, message in wrong:
        with pytest.raises(MemdecError, match=message):
            build_corpus(tiny_corpus_dir, tokenizer, tmp_path / "out", **options)
    tokenizer.eos_token = None
    with pytest.raises(MemdecError, match="end-of-text"):
        build_corpus(tiny_corpus_dir, tokenizer, tmp_path / "out")


def test_text_that_changes_under_our_hands(
    tmp_path: Path, tiny_corpus_dir: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    survey = corpus_stage._survey

    def survey_then_change(documents: Any) -> Any:
        entries = survey(documents)
        (tiny_corpus_dir / "doc05.txt").write_text("changed")
        return entries

    monkeypatch.setattr(corpus_stage, "_survey", survey_then_change)
    with pytest.raises(MemdecError, match=r"doc05\.txt changed"):
        build_corpus(tiny_corpus_dir, tiny_tokenizer, tmp_path / "out")
