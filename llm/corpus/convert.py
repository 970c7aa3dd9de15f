"""Documents from any kind of file into one of another kind: .txt, .jsonl, .parquet or .arrow."""

import json
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from llm.corpus.column_files import pyarrow
from llm.corpus.documents import Document
from llm.log import UserError, log

GROUP_BYTES = 32 << 20  # of text in a row group: little enough to hold, and a unit of its own for tokenizing
Writer = Callable[[Path, str], AbstractContextManager[Callable[[Document], None]]]
"""From a path and a separator to a context that gives what writes a document."""


def convert(documents: Iterable[Document], out: Path, separator: str) -> int:
    """`write_documents` to a new file, in the kind that its suffix says."""
    if out.suffix not in WRITERS:
        raise UserError(f"{out}: cannot write files called *{out.suffix}; choose one of {', '.join(WRITERS)}.")
    if out.exists():
        raise UserError(f"{out}: is there already. Delete it, or choose another --out.")
    return write_documents(documents, out, WRITERS[out.suffix], separator)


def write_documents(documents: Iterable[Document], out: Path, writer: Writer, separator: str = "") -> int:
    """Write them to `out`, which appears whole or not at all. Returns how many. Raises UserError, also when there is none."""
    tmp, n_docs = out.with_name(out.name + ".tmp"), 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with writer(tmp, separator) as write:
            for document in documents:
                write(document)
                n_docs += 1
        if not n_docs:
            raise UserError(f"{out}: not written, for no document is left.")
        tmp.replace(out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}. Put that right, or choose another --out, and run again.") from None
    finally:
        with suppress(OSError):  # it is in its place, or there is no folder
            tmp.unlink()
    return n_docs


@contextmanager
def _txt(path: Path, separator: str):
    if not separator:
        raise UserError("--out-separator is empty, so nobody could tell the documents apart again. Give one, or choose another kind of file.")
    with open(path, "w", encoding="utf-8", newline="") as file:
        first = True

        def write(document: Document) -> None:
            nonlocal first
            if (document.text + separator).find(separator) < len(document.text):  # also where its end and the separator make one
                raise UserError(f"{document.source}: a document holds the separator {separator!r}, or ends with the beginning of it, and would be "
                                f"read back otherwise. Choose another --out-separator.")  # fmt: skip
            if first and document.conversation:
                log.warning("conversations become plain text in a .txt file, special tokens too; .jsonl and .parquet keep them conversations")
            file.write(("" if first else separator) + document.text)
            first = False

        yield write


@contextmanager
def jsonl_writer(path: Path, _: str):
    with open(path, "w", encoding="utf-8") as file:
        yield lambda document: file.write(json.dumps({**document.to_json(), "source": document.source}, ensure_ascii=False) + "\n")


@contextmanager
def _table(open_writer):
    """Rows gathered to tables of about GROUP_BYTES. The first document says whether all are texts or conversations."""
    library, rows, held, writer, schema = pyarrow(), [], 0, None, None

    def flush() -> None:
        nonlocal rows, held, writer
        if rows:
            writer = writer or open_writer(schema)
            writer.write_table(library.Table.from_pylist(rows, schema))
        rows, held = [], 0

    def write(document: Document) -> None:
        nonlocal held, schema
        row = {**document.to_json(), "source": document.source}
        schema = schema or _schema(library, "messages" in row)
        if not row.keys() <= set(schema.names):
            raise UserError(f"{document.source}: texts and conversations do not go into one table. Convert them one by one, or into .jsonl.")
        rows.append(row)
        held += len(document.text)
        if held >= GROUP_BYTES:
            flush()

    yield write
    flush()
    if writer:
        writer.close()


def _schema(library, of_conversations: bool):
    text = library.string()
    messages = library.list_(library.struct([("role", text), ("content", text)]))
    return library.schema([("messages", messages) if of_conversations else ("text", text), ("source", text)])


def _parquet(path: Path, _: str):
    return _table(lambda schema: pyarrow().parquet.ParquetWriter(path, schema, compression="zstd"))


def _arrow(path: Path, _: str):
    return _table(lambda schema: pyarrow().ipc.new_file(str(path), schema))


WRITERS: dict[str, Writer] = {".txt": _txt, ".jsonl": jsonl_writer, ".parquet": _parquet, ".arrow": _arrow}
