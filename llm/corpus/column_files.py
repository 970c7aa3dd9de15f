"""Readers of tables in columns: Parquet, and Arrow as a file, as a stream, or in the cache of Hugging Face's datasets."""

from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

from llm.corpus.options import ReadOptions
from llm.corpus.records import Record, decoded
from llm.log import UserError

_BATCH_ROWS = 1024
ARROW_MAGIC, PARQUET_MAGIC = b"ARROW1", b"PAR1"


def pyarrow():
    """The library, or what to do without it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError('Parquet and Arrow files need pyarrow: pip install "tally-llm[data]", or pip install pyarrow.') from None
    return pyarrow


def parquet_borders(path: Path, wanted: list[int]) -> list[int]:
    """Row groups are units' atoms: a unit starts with the first group that begins at or after a wanted position."""
    starts = [start for start, _ in _row_groups(path)]
    found = {bisect_left(starts, position) for position in wanted}
    return sorted({0, *(starts[i] for i in found if i < len(starts))})


def parquet_records(path: Path, start: int, stop: int, _: ReadOptions) -> Iterator[Record]:
    """Rows of the row groups that begin in bytes [start, stop). A row's position is that of its group."""
    file, row = _open(path), 0
    for index, (position, n_rows) in enumerate(_row_groups(path)):
        if start <= position < stop:
            yield from _rows(file.iter_batches(_BATCH_ROWS, row_groups=[index]), path, row, position)
        row += n_rows


def _row_groups(path: Path) -> list[tuple[int, int]]:
    """(first byte, rows) of each; the first one owns the head of the file too."""
    metadata, groups = _open(path).metadata, []
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = [group.column(i) for i in range(group.num_columns)]
        first = min((column.dictionary_page_offset or column.data_page_offset for column in columns), default=0)
        groups.append((first if index else 0, group.num_rows))
    return groups


def _open(path: Path):
    library = pyarrow()
    try:
        return library.parquet.ParquetFile(path, memory_map=True)
    except (library.ArrowException, ValueError, OSError) as error:
        raise _damaged(path, error) from None


def arrow_records(path: Path, start: int, stop: int, _: ReadOptions) -> Iterator[Record]:
    library = pyarrow()
    try:
        with library.memory_map(str(path)) as source:
            if source.size() == 0:
                return
            is_file = source.read(len(ARROW_MAGIC)) == ARROW_MAGIC
            source.seek(0)
            reader = library.ipc.open_file(source) if is_file else library.ipc.open_stream(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
            yield from _rows(batches, path, 0, None)
    except (library.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _rows(batches, path: Path, row: int, position: int | None) -> Iterator[Record]:
    library = pyarrow()
    batches = iter(batches)
    while True:
        try:
            batch = next(batches, None)
            _validate(batch)
        except (library.ArrowException, OSError) as error:
            raise _damaged(path, error, f"row {row + 1:,}") from None
        if batch is None:
            return
        batch = batch.select([i for i, field in enumerate(batch.schema) if not library.types.is_temporal(field.type)])  # Python knows fewer times
        for first in range(0, batch.num_rows, _BATCH_ROWS):
            for content in _contents(batch.slice(first, _BATCH_ROWS)):
                row += 1
                yield Record(row if position is None else position, f"row {row:,}", content)


def _validate(batch) -> None:
    """Arrow trusts the offsets in a file, and so would read anywhere; strings that are no UTF-8 are seen to later."""
    try:
        if batch is not None:
            batch.validate(full=True)
    except pyarrow().ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise


def _contents(batch) -> Iterator[dict | ValueError]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # Arrow does not check that strings are UTF-8
        for i in range(batch.num_rows):
            yield _escaped(batch.slice(i, 1))


def _escaped(batch) -> dict | ValueError:
    """The only row of a batch in which some string is no UTF-8."""
    types, fields = pyarrow().types, {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if types.is_string(column.type) or types.is_large_string(column.type):
            raw = column.cast("large_binary")[0].as_py()
            fields[name] = None if raw is None else decoded(raw)
            continue
        try:
            fields[name] = column[0].as_py()
        except UnicodeDecodeError as error:
            return ValueError(f"column {name!r} holds bytes that are no UTF-8 ({error.reason})")
    return fields


def _damaged(path: Path, error: Exception, where: str = "") -> UserError:
    if isinstance(error, OSError) and error.errno:  # of the system; Arrow raises OSError for contents too
        raise error
    at = f", {where}" if where else ""
    what = " ".join(str(error).split()).rstrip(".")
    return UserError(f"{path}{at}: cannot be read as {path.suffix[1:]}: {what}. It is damaged or cut off: fetch it again.")
