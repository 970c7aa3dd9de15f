"""Documents from any kind of file into one of another kind: .txt, .jsonl, .parquet or .arrow."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from llm import durable
from llm.corpus.column_files import pyarrow
from llm.corpus.documents import Document
from llm.corpus.plan import handfuls
from llm.log import UserError, log

GROUP_BYTES = 32 << 20  # of text in a row group: little enough to hold, and a unit of its own for tokenizing
Writer = Callable[[Iterable[Document], Path, str], int]
"""Writes documents to a path, with a separator where the kind needs one, and returns how many they were."""


def convert(documents: Iterable[Document], out: Path, separator: str) -> int:
    """`write_documents` to a new file, in the kind that its suffix says."""
    if out.suffix not in WRITERS:
        raise UserError(f"{out}: cannot write files called *{out.suffix}; choose one of {', '.join(WRITERS)}.")
    if out.exists():
        raise UserError(f"{out}: is there already. Delete it, or choose another --out.")
    return write_documents(documents, out, WRITERS[out.suffix], separator)


def write_documents(documents: Iterable[Document], out: Path, writer: Writer, separator: str = "") -> int:
    """Write them to `out`, which appears whole or not at all. Returns how many. Raises UserError, also when there is none."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with durable.new_file(out) as fresh:
            n_docs = writer(documents, fresh, separator)
            if not n_docs:
                raise UserError(f"{out}: not written, for no document is left.")
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}. Put that right, or choose another --out, and run again.") from None
    return n_docs


def _txt(documents: Iterable[Document], path: Path, separator: str) -> int:
    if not separator:
        raise UserError("--out-separator is empty, so nobody could tell the documents apart again. Give one, or choose another kind of file.")
    n_docs, before = 0, ""
    with open(path, "w", encoding="utf-8", newline="") as file:
        for document in documents:
            if separator in document.text or (before + separator).find(separator) < len(before):
                raise UserError(f"{document.source}: a document holds the separator {separator!r}, or the one before ends with the beginning of it, "
                                f"and would be read back otherwise. Choose another --out-separator.")  # fmt: skip
            if not n_docs and document.conversation:
                log.warning("conversations become plain text in a .txt file, special tokens too; .jsonl and .parquet keep them conversations")
            file.write((separator if n_docs else "") + document.text)
            n_docs, before = n_docs + 1, document.text
    return n_docs


def write_jsonl(documents: Iterable[Document], path: Path, _: str) -> int:
    n_docs = 0
    with open(path, "w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps(_row(document), ensure_ascii=False) + "\n")
            n_docs += 1
    return n_docs


def _row(document: Document) -> dict:
    return {**document.to_json(), "source": document.source}


def _table(documents: Iterable[Document], open_writer: Callable) -> int:
    """Tables of about GROUP_BYTES. The first document says whether all are texts or conversations."""
    n_docs, writer, schema = 0, None, None
    for group in handfuls(documents, lambda document: len(document.text), GROUP_BYTES):
        rows = [_row(document) for document in group]
        schema = schema or _schema("messages" in rows[0])
        if odd := next((row for row in rows if not row.keys() <= set(schema.names)), None):
            raise UserError(f"{odd['source']}: texts and conversations do not go into one table. Convert them one by one, or into .jsonl.")
        writer = writer or open_writer(schema)
        writer.write_table(pyarrow().Table.from_pylist(rows, schema))
        n_docs += len(rows)
    if writer:
        writer.close()
    return n_docs


def _schema(of_conversations: bool):
    library, text = pyarrow(), pyarrow().string()
    messages = library.list_(library.struct([("role", text), ("content", text)]))
    return library.schema([("messages", messages) if of_conversations else ("text", text), ("source", text)])


def _parquet(documents: Iterable[Document], path: Path, _: str) -> int:
    return _table(documents, lambda schema: pyarrow().parquet.ParquetWriter(path, schema, compression="zstd"))


def _arrow(documents: Iterable[Document], path: Path, _: str) -> int:
    return _table(documents, lambda schema: pyarrow().ipc.new_file(str(path), schema))


WRITERS: dict[str, Writer] = {".txt": _txt, ".jsonl": write_jsonl, ".parquet": _parquet, ".arrow": _arrow}
