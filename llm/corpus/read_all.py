"""All documents of some inputs, in one process."""

from collections.abc import Iterator

from llm.corpus.documents import Counts, Document, read_documents
from llm.corpus.formats import tell_formats
from llm.corpus.options import ReadOptions
from llm.corpus.plan import find_sources
from llm.log import log, progress


def read_all(inputs: list[str], options: ReadOptions) -> Iterator[Document]:
    """The documents one after the other, with a progress bar; tells of those that could not be read."""
    sources, counts = find_sources(inputs, options), Counts()
    tell_formats([source.path for source in sources], options)
    with progress(sum(source.size for source in sources), "reading", "bytes") as bar:
        for source in sources:
            yield from read_documents(source.path, source.name, 0, source.size, options, counts)
            bar.advance(source.size)
    if counts.malformed:
        log.warning(f"{counts.malformed:,} malformed records left out, for example {counts.examples[0]}")
