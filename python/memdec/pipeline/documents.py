"""Documents out of files: plain text, Markdown, HTML, JSON lines, Parquet, and datasets, always in the same order.

A text, Markdown or HTML file is one document; a line of a ``.jsonl`` file, a row of a Parquet file or of a dataset
is one. Files come sorted by their path within the source, rows in file order, so that the stream is a function of
the content alone.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from memdec.errors import MemdecError
from memdec.stores.manifest import MANIFEST_NAME
from memdec.stores.memory import CARD_NAME

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".md", ".markdown", ".rst")
HTML_SUFFIXES = (".html", ".htm")
ROW_SUFFIXES = (".jsonl", ".parquet")
GZIP_SUFFIXES = tuple(suffix + ".gz" for suffix in (*TEXT_SUFFIXES, *HTML_SUFFIXES, ".jsonl"))
SUFFIXES = (*TEXT_SUFFIXES, *HTML_SUFFIXES, *ROW_SUFFIXES, *GZIP_SUFFIXES)

# What the splits of published datasets are called.
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "dev": "validation", "test": "test"}


class Document(NamedTuple):
    """One document: its ``name`` (path within the source, then ``:row`` where a file holds many), its ``text``, and the
    ``split`` that the source puts it in (None: the source does not say)."""

    name: str
    text: str
    split: str | None = None


def read_documents(source: str | Path, *, text_field: str = "text") -> Callable[[], Iterator[Document]]:
    """Find the documents of ``source``.

    Args:
        source: a file, a folder (searched through, hidden files left out), a folder that ``datasets`` saved, or the
            name of a dataset: ``hf:NAME``, ``hf:NAME:CONFIG``, or a plain NAME where no such file is.
        text_field: the field or column that holds the text, for ``.jsonl``, Parquet and datasets.

    Returns:
        A function that starts reading anew each time it is called.

    Raises:
        MemdecError: nothing is there, or nothing that can be read as text. Broken files raise it while they are read.
    """
    name = str(source)
    if name.startswith("hf:"):
        return _dataset_documents(name.removeprefix("hf:"), text_field)
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return _saved_dataset_documents(path, text_field)
        files = _files_in(path)
        return lambda: (document for file, inner in files for document in _file_documents(file, inner, text_field))
    if path.exists() and not path.is_file():
        raise MemdecError(f"{source} is neither a file nor a folder. Give a file or a folder of text.")
    if path.exists():
        return lambda: _file_documents(path, path.name, text_field)
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", name) and not name.endswith(SUFFIXES):
        logger.info("%s is no file or folder: looking for a dataset of that name", name)
        return _dataset_documents(name, text_field)
    raise MemdecError(
        f"{source} does not exist. Give a file or folder of {', '.join(SUFFIXES[:7])} …, or a dataset as hf:NAME."
    )


def _files_in(folder: Path) -> list[tuple[Path, str]]:
    """The readable files under ``folder``, hidden ones left out, with their names, sorted by name."""
    found: list[tuple[Path, str]] = []
    skipped: dict[str, int] = {}
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise MemdecError(f"Cannot read {error.filename}: {error.strerror}.") from error

    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        if real in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        if _is_ours(Path(place), names):
            logger.warning("%s was made by memdec and is left out", place)
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(place, name)
            if name.startswith("."):
                continue
            if not path.is_file():
                skipped["no file or a broken link"] = skipped.get("no file or a broken link", 0) + 1
                continue
            if name.lower().endswith(SUFFIXES):
                found.append((path, path.relative_to(folder).as_posix()))
            else:
                suffix = path.suffix or "no suffix"
                skipped[suffix] = skipped.get(suffix, 0) + 1
    kinds = ", ".join(f"{count} × {suffix}" for suffix, count in sorted(skipped.items())[:8])
    if not found:
        what = f"only files of other kinds ({kinds})" if skipped else "no files"
        raise MemdecError(f"{folder} holds {what}. A corpus is made of {', '.join(SUFFIXES[:7])} files, or their .gz.")
    if skipped:
        logger.warning("%s: files of other kinds are left out: %s", folder, kinds)
    # By bytes: the order must not depend on the locale.
    return sorted(found, key=lambda entry: os.fsencode(entry[1]))


def _is_ours(folder: Path, names: list[str]) -> bool:
    """Whether memdec made ``folder``: its output may lie within the text that it was made of."""
    if {CARD_NAME, "training.json", "evaluation.json"} & set(names):
        return True
    try:
        return MANIFEST_NAME in names and str(json.loads((folder / MANIFEST_NAME).read_bytes())["format"]).startswith(
            "memdec."
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _file_documents(path: Path, name: str, text_field: str) -> Iterator[Document]:
    lower = path.name.lower()
    if lower.endswith(".parquet"):
        yield from _parquet_documents(path, name, text_field)
    elif lower.endswith((".jsonl", ".jsonl.gz")):
        yield from _json_documents(path, name, text_field)
    else:
        with _open(path) as file:
            text = _decode(_read_all(file, path), path)
        yield Document(name, html_text(text) if lower.removesuffix(".gz").endswith(HTML_SUFFIXES) else text)


def _open(path: Path) -> IO[bytes]:
    try:
        return cast("IO[bytes]", gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else open(path, "rb")
    except OSError as error:
        raise MemdecError(f"Cannot read {path}: {error.strerror}.") from error


def _read_all(file: IO[bytes], path: Path) -> bytes:
    try:
        return file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise MemdecError(f"Cannot read {path}: {error}. The file is damaged or truncated.") from error


def _decode(data: bytes, where: Path | str) -> str:
    if b"\0" in data:
        hint = "it is UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "it is a binary file"
        raise MemdecError(
            f"{where} is not text: it contains zero bytes ({hint}?). Take it out of the corpus, or convert it to UTF-8."
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MemdecError(
            f"{where} is not UTF-8 text (byte {error.start} is 0x{data[error.start]:02x}): it is a binary "
            "file or in another encoding. Convert it, for instance "
            "with `iconv -f LATIN1 -t UTF-8`, or take it out of the corpus."
        ) from None


def _json_documents(path: Path, name: str, text_field: str) -> Iterator[Document]:
    with _open(path) as file:
        number = 0
        while True:
            try:
                line = file.readline()
            except (OSError, EOFError, zlib.error) as error:
                raise MemdecError(f"Cannot read {path}: {error}. The file is damaged or truncated.") from error
            if not line:
                return
            number += 1
            where = f"{path}, line {number}"
            text = _decode(line, where)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise MemdecError(f"{where} is not JSON ({error}). Each line must be one JSON object.") from None
            if not isinstance(row, dict):
                raise MemdecError(
                    f"{where} is not a JSON object but {type(row).__name__}. Each line must be one object."
                )
            if text_field not in row:
                raise MemdecError(_no_field(where, text_field, list(row)))
            yield Document(f"{name}:{number}", _text_of(row[text_field], where, text_field))


def _parquet_documents(path: Path, name: str, text_field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MemdecError(f"Reading {path} needs pyarrow: pip install 'memdec[corpus]'.") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_field not in columns:
                raise MemdecError(_no_field(str(path), text_field, columns))
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield Document(f"{name}:{number}", _text_of(value, f"{path}, row {number}", text_field))
    except (pyarrow.ArrowException, OSError) as error:
        raise MemdecError(f"Cannot read {path} as Parquet: {str(error).splitlines()[0]}.") from error


def _dataset_documents(name: str, text_field: str) -> Callable[[], Iterator[Document]]:
    datasets = _import_datasets(name)

    dataset, _, config = name.partition(":") if not Path(name).exists() else (name, "", "")
    try:
        loaded = datasets.load_dataset(dataset, config or None)
    except Exception as error:  # each loader of datasets raises its own
        raise MemdecError(
            f"{name} is neither a file nor a folder, nor a dataset that could be loaded "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}). "
            "Check the spelling and the network; a dataset is hf:NAME or hf:NAME:CONFIG."
        ) from error
    return _table_documents(loaded, text_field, name)


def _saved_dataset_documents(path: Path, text_field: str) -> Callable[[], Iterator[Document]]:
    datasets = _import_datasets(str(path))
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise MemdecError(f"{path} looks like a saved dataset but cannot be loaded: {error}.") from error
    return _table_documents(loaded, text_field, path.name)


def _import_datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise MemdecError(
            f"{name} is no file or folder; to load a dataset of that name: pip install 'memdec[corpus]'."
        ) from None
    return datasets


def _table_documents(loaded: Any, text_field: str, name: str) -> Callable[[], Iterator[Document]]:
    """The rows of a ``datasets`` table, or of several by split. A dataset with one split says nothing about
    splitting."""
    tables = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    known = {split: SPLIT_NAMES[split] for split in tables if split in SPLIT_NAMES}
    if left_out := sorted(tables.keys() - known.keys()):
        logger.warning("dataset %s: splits of unknown meaning are left out: %s", name, ", ".join(left_out))
    if not known:
        raise MemdecError(
            f"dataset {name} has no split called train, validation or test, only {', '.join(sorted(tables))}."
        )
    for split in known:
        if text_field not in tables[split].column_names:
            raise MemdecError(_no_field(f"dataset {name}, split {split}", text_field, tables[split].column_names))

    def read() -> Iterator[Document]:
        for split in sorted(known):
            # A lone or training split is cut further where validation or test are wanted and missing.
            fixed = known[split] if known[split] != "train" and len(known) > 1 else None
            for number, row in enumerate(tables[split].select_columns([text_field]), 1):
                text = _text_of(row[text_field], f"dataset {name}, {split} row {number}", text_field)
                yield Document(f"{split}:{number}", text, fixed)

    return read


def _text_of(value: object, where: str, text_field: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise MemdecError(f"{where}: {text_field!r} is not text but {type(value).__name__}. Name the text's field.")
    # Half of a surrogate pair, which JSON can spell, is no character and no tokenizer takes it.
    return value.encode("utf-8", "replace").decode()


def _no_field(where: str, text_field: str, fields: list[str]) -> str:
    shown = ", ".join(fields[:12]) + (", …" if len(fields) > 12 else "")
    return f"{where} has no field {text_field!r}; it has {shown or 'none'}. Name the text's field with --text-field."


_BLOCK_TAGS = frozenset(
    [
        "address",
        "article",
        "aside",
        "blockquote",
        "body",
        "br",
        "caption",
        "center",
        "dd",
        "details",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "footer",
        "form",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "header",
        "hr",
        "html",
        "li",
        "main",
        "ol",
        "p",
        "pre",
        "section",
        "summary",
        "table",
        "tbody",
        "td",
        "tfoot",
        "th",
        "thead",
        "title",
        "tr",
        "ul",
    ]
)
_PARAGRAPH_TAGS = frozenset(
    [
        "p",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "pre",
        "table",
        "ul",
        "ol",
        "dl",
        "blockquote",
        "section",
        "article",
        "title",
    ]
)
_SILENT_TAGS = frozenset(["script", "style", "template", "noscript", "nav", "svg"])


class _TextOfHtml(HTMLParser):
    """Collects what a reader of the page would see."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._silent = 0
        self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _SILENT_TAGS:
            self._silent += 1
        self._preformatted += tag == "pre"
        self._break(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in _SILENT_TAGS:
            self._silent = max(0, self._silent - 1)
        if tag == "pre":
            self._preformatted = max(0, self._preformatted - 1)
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(data if self._preformatted else re.sub(r"\s+", " ", data))

    def parse_marked_section(self, i: int, report: bool = True) -> int:
        """``<![x[`` with a word that Python does not know is, as in a browser, a comment up to the next ``>``."""
        try:
            return super().parse_marked_section(i, report)
        except AssertionError:
            end = self.rawdata.find(">", i)
            return end + 1 if end >= 0 else -1

    def _break(self, tag: str) -> None:
        if tag in _BLOCK_TAGS:
            self.parts.append("\n\n" if tag in _PARAGRAPH_TAGS else "\n")


def html_text(page: str) -> str:
    """The visible text of an HTML page: scripts, styles and navigation left out, a line for a block, ``<pre>`` as it
    is.

    >>> html_text("<h1>Title</h1><p>One &amp; <b>two</b>.</p><script>x()</script>")
    'Title\\n\\nOne & two.\\n'
    """
    parser = _TextOfHtml()
    parser.feed(page)
    parser.close()
    text = "".join(parser.parts)
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return text + "\n" if text else ""
