"""BM25 over a local corpus (the bm25s library): in memory, or built once into a folder and memory-mapped from there.

What it leaves out: stemming and stop words (results would depend on a language and on what is installed), phrase
queries.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from arpo_ext.config import SearchToolConfig
from arpo_ext.errors import ToolError
from arpo_ext.types import Document

if TYPE_CHECKING:
    import bm25s
    import numpy as np

# A title says what a document is about, so its words count this many times.
_TITLE_WEIGHT = 2
# Chinese and Japanese are written without spaces: there every character is a word of its own.
_CJK = "\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
# Changes when the same corpus would make another index.
_FORMAT = "arpo-ext bm25 1"
_READY = "arpo_ext_index.json"


class _Documents(Protocol):
    def __getitem__(self, number: int) -> Document: ...


class Bm25Source:
    """Documents whose title has the very words of the query come first, then the order is by BM25 score.

    Lucene's form, k1 = 1.5, b = 0.75; equal scores keep the order of the corpus. With `index`, a folder, the index is
    built there once per state of the corpus and memory-mapped: several processes share it, and starting takes no
    longer than reading the vocabulary.
    """

    def __init__(self, config: SearchToolConfig) -> None:
        if config.corpus is None:
            raise ToolError(
                "the search tool has no corpus; expected tools.search.corpus to name a .jsonl, .json or .parquet file"
            )
        self._corpus = config.corpus
        self._folder = config.index
        self._index: bm25s.BM25 | None = None
        self._documents: _Documents = ()
        self._titles: _Titles | None = None
        self.identity = ""

    def open(self) -> None:
        if self._index is not None:
            return
        try:
            import bm25s  # noqa: F401 - asked for before any work is done
        except ImportError:
            raise ToolError("the search tool needs the bm25s library: pip install 'arpo-ext[search]'") from None
        self.identity = _state_of(self._corpus)
        if self._folder is None:
            documents = read_corpus(self._corpus)
            self._index = _build(self._corpus, documents)
            self._titles = _Titles.of(documents)
            self._documents = documents
            return
        if not _is_ready(self._folder, self.identity):
            _write_index(self._folder, self._corpus, self.identity)
        self._map(self._folder)

    def _map(self, folder: Path) -> None:
        import bm25s
        import numpy as np

        index = bm25s.BM25.load(folder, mmap=True, show_progress=False)
        self._documents = _MappedDocuments(folder)
        self._titles = _Titles(
            np.load(folder / "title_hashes.npy", mmap_mode="r"), np.load(folder / "title_numbers.npy", mmap_mode="r")
        )
        self._index = index

    def search(self, query: str, top_k: int) -> list[Document]:
        """ValueError if the query holds no word."""
        words = _words(query)
        if not words:
            raise ValueError("the search query is empty")
        return [self._documents[number] for number in self._best(words, top_k)]

    def close(self) -> None:
        self._index = None
        self._documents = ()
        self._titles = None

    def _best(self, query: list[str], top_k: int) -> list[int]:
        """Numbers of at most top_k documents, best first."""
        exact = [n for n in self._titles.find(query) if _words(self._documents[n].title) == query][:top_k]
        word_ids = self._index.get_tokens_ids(query)
        if not word_ids:
            return exact
        scores = self._index.get_scores_from_ids(word_ids)
        scores[exact] = 0
        candidates = scores.nonzero()[0]
        if len(candidates) > top_k:
            # Keep everything that ties with the last place, so that the stable sort decides by corpus order.
            last = -top_k
            bound = scores.copy()
            bound.partition(last)
            candidates = (scores >= bound[last]).nonzero()[0]
        order = candidates[(-scores[candidates]).argsort(kind="stable")]
        return (exact + order.tolist())[:top_k]


class _Titles:
    """Hashes of titles in order, and the numbers of their documents: two arrays, so that they can be mapped."""

    def __init__(self, hashes: np.ndarray, numbers: np.ndarray) -> None:
        self.hashes = hashes
        self.numbers = numbers

    @classmethod
    def of(cls, documents: Sequence[Document]) -> _Titles:
        import numpy as np

        hashes = np.array([_hash(_words(document.title)) for document in documents], dtype=np.uint64)
        numbers = hashes.argsort(kind="stable")
        return cls(hashes[numbers], numbers)

    def find(self, words: list[str]) -> list[int]:
        """Documents whose title may have these words, in the order of the corpus."""
        wanted = self.hashes.dtype.type(_hash(words))
        first, last = self.hashes.searchsorted(wanted), self.hashes.searchsorted(wanted, side="right")
        return self.numbers[first:last].tolist()


class _MappedDocuments:
    """Rows of JSON in one mapped file; `offsets` [documents + 1] says where each begins. Slices need no shared seek."""

    def __init__(self, folder: Path) -> None:
        import numpy as np

        self._offsets = np.load(folder / "document_offsets.npy", mmap_mode="r")
        self._rows = np.memmap(folder / "documents.jsonl", dtype=np.uint8, mode="r")

    @staticmethod
    def write(folder: Path, documents: Sequence[Document]) -> None:
        import numpy as np

        offsets = [0]
        with open(folder / "documents.jsonl", "wb") as file:
            for document in documents:
                file.write(json.dumps([document.title, document.text]).encode() + b"\n")
                offsets.append(file.tell())
        np.save(folder / "document_offsets.npy", np.array(offsets, dtype=np.int64))

    def __getitem__(self, number: int) -> Document:
        first, last = self._offsets[number : number + 2]
        title, text = json.loads(self._rows[first:last].tobytes())
        return Document(text, title)


def _hash(words: list[str]) -> int:
    return int.from_bytes(
        hashlib.blake2b(" ".join(words).encode(errors="surrogatepass"), digest_size=8).digest(), "little"
    )


def _build(path: Path, documents: Sequence[Document]) -> bm25s.BM25:
    import bm25s

    words = [_words(d.title) * _TITLE_WEIGHT + _words(d.text) for d in documents]
    if not any(words):
        raise ToolError(f"search corpus {path} holds no word in any document; expected text")
    index = bm25s.BM25(backend="numpy")
    index.index(words, show_progress=False)
    return index


def _state_of(path: Path) -> str:
    try:
        status = path.stat()
    except OSError as error:
        raise ToolError(f"search corpus {path} cannot be read ({error}); expected a file") from None
    return f"{_FORMAT} {path.resolve()} {status.st_size} {status.st_mtime_ns}"


def _is_ready(folder: Path, identity: str) -> bool:
    """Whether the folder holds the index of this corpus, whole: a machine that went down may leave files cut off."""
    try:
        return json.loads((folder / _READY).read_text(encoding="utf-8")) == _contents(folder, identity)
    except (OSError, ValueError):
        return False


def _contents(folder: Path, identity: str) -> dict[str, Any]:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != _READY}
    return {"identity": identity, "files": files}


def _write_index(folder: Path, corpus: Path, identity: str) -> None:
    """Builds beside `folder` and puts the result in its place, so that no process ever maps half an index."""
    import numpy as np

    documents = read_corpus(corpus)
    index = _build(corpus, documents)
    titles = _Titles.of(documents)
    if folder.exists() and not (folder / _READY).is_file() and any(folder.iterdir()):
        raise ToolError(f"tools.search.index {folder} holds other files; expected an empty folder or an earlier index")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            made = Path(scratch) / "index"
            index.save(made, show_progress=False)
            _MappedDocuments.write(made, documents)
            np.save(made / "title_hashes.npy", titles.hashes)
            np.save(made / "title_numbers.npy", titles.numbers)
            (made / _READY).write_text(json.dumps(_contents(made, identity)), encoding="utf-8")
            if _is_ready(folder, identity):
                return  # another process was faster
            if folder.exists():
                # Who has the old one mapped keeps it: the files live as long as they are open.
                os.replace(folder, Path(scratch) / "old")
            os.replace(made, folder)
    except OSError as error:
        if _is_ready(folder, identity):
            return  # another process was faster
        raise ToolError(
            f"tools.search.index {folder} cannot be written ({error}); expected a writable folder"
        ) from None


def read_corpus(path: Path) -> list[Document]:
    """Documents of a .jsonl or .parquet file (rows with "text" and perhaps "title"), or of a .json map query -> text.

    A text of the map may be nested: all strings in it count, in their order, one a line. ToolError if the file is
    missing, empty or of another form.
    """
    readers = {".jsonl": _read_rows, ".json": _read_map, ".parquet": _read_parquet}
    reader = readers.get(path.suffix)
    if reader is None:
        raise ToolError(f"search corpus {path} has the ending {path.suffix!r}; expected .jsonl, .json or .parquet")
    documents = list(reader(path))
    if not documents:
        raise ToolError(f"search corpus {path} is empty; expected at least one document")
    return documents


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(f"search corpus {path} cannot be read ({error}); expected a UTF-8 file") from None


def _read_rows(path: Path) -> Iterator[Document]:
    # Not splitlines(): JSON strings may hold U+2028 and other line ends as they are.
    for number, line in enumerate(_content(path).split("\n"), start=1):
        if line.strip():
            where = f"line {number} of search corpus {path}"
            yield _document(_parse(line, where), where, line)


def _read_parquet(path: Path) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ToolError(f"search corpus {path} needs the pyarrow library: pip install 'arpo-ext[train]'") from None
    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ToolError(f"search corpus {path} cannot be read ({error}); expected a parquet file") from None
    for number, row in enumerate(rows):
        yield _document(row, f"row {number} of search corpus {path}", str(row))


def _document(row: Any, where: str, shown: str) -> Document:
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ToolError(f'{where} is {shown[:60]!r}; expected an object with a "text"')
    title = row.get("title") or ""
    if not isinstance(title, str):
        raise ToolError(f"{where} has the title {title!r}; expected a string")
    return Document(row["text"], title)


def _read_map(path: Path) -> Iterator[Document]:
    table = _parse(_content(path), f"search corpus {path}")
    if not isinstance(table, dict):
        raise ToolError(f"search corpus {path} holds a {type(table).__name__}; expected a map from query to text")
    for title, value in table.items():
        yield Document("\n".join(_strings(value)), title)


def _parse(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ToolError(f"{what} is not JSON: {error}") from None


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif value is not None:
        yield str(value)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
