"""All documents of some inputs, in one process."""

from collections.abc import Iterator

from llm.corpus.documents import Counts, Document, read_documents
from llm.corpus.formats import tell_formats
from llm.corpus.options import ReadOptions
from llm.corpus.plan import Source, find_sources
from llm.log import log, progress

_STEP_BYTES = 1 << 20


def read_all(inputs: list[str], options: ReadOptions) -> Iterator[Document]:
    """The documents one after the other, with a progress bar; tells of those that could not be read."""
    sources, counts = find_sources(inputs, options), Counts()
    tell_formats([source.path for source in sources], options)
    yield from read_sources(sources, options, counts)
    if counts.malformed:
        log.warning(f"{counts.malformed:,} malformed records left out, for example {counts.examples[0]}")


def read_sources(sources: list[Source], options: ReadOptions, counts: Counts) -> Iterator[Document]:
    """The documents of these files, with a progress bar. A compressed file counts when it is done: how far it is nobody knows."""
    with progress(sum(source.size for source in sources), "reading", "bytes") as bar:
        for source in sources:
            told = 0
            for document in read_documents(source.path, source.name, 0, source.size, options, counts):
                if told + _STEP_BYTES <= document.index <= source.size:
                    bar.advance(document.index - told)
                    told = document.index
                yield document
            bar.advance(source.size - told)
