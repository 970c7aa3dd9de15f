"""Files as documents: what all formats have in common, and the hygiene that all of them get."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llm.corpus.conversations import Conversation, Segment, Template, Turn, render
from llm.corpus.formats import read_records, renamed, shape_of
from llm.corpus.options import ReadOptions
from llm.corpus.records import clean
from llm.corpus.shapes import SHAPES, text_of

MAX_EXAMPLES = 5


@dataclass(frozen=True)
class Document:
    text: str
    """Of a conversation: what its template makes of it."""
    source: str
    index: int
    """Where it starts in the source, in bytes if these are known without reading what stands before."""
    conversation: Conversation | None = None

    def segments(self, template: Template) -> list[Segment]:
        """What to encode: special tokens only where the template puts them, never where somebody has typed their names."""
        return render(self.conversation, template) if self.conversation else [Segment(self.text, False, False)]

    def plain_text(self, template: Template) -> str:
        """The text without its special tokens: what a vocabulary is to be learned from."""
        return "".join(segment.text for segment in self.segments(template) if not segment.is_special)

    def identity(self) -> bytes:
        """What is hashed to recognise it, in whatever file and template."""
        return self.conversation.identity() if self.conversation else self.text.encode()

    def to_json(self) -> dict:
        return self.conversation.to_json() if self.conversation else {"text": self.text}


@dataclass
class Counts:
    """What reading has met, good and bad."""

    records: int = 0
    empty: int = 0
    bad_utf8: int = 0
    malformed: int = 0
    examples: list[str] = field(default_factory=list)
    """The first malformed records: where, and what was wrong."""

    def add(self, other: "Counts") -> None:
        self.records += other.records
        self.empty += other.empty
        self.bad_utf8 += other.bad_utf8
        self.malformed += other.malformed
        self.examples = (self.examples + other.examples)[:MAX_EXAMPLES]


def read_documents(path: Path, name: str, start: int, stop: int, options: ReadOptions, counts: Counts) -> Iterator[Document]:
    """The documents whose records lie in bytes [start, stop), which must be borders. Empty and malformed ones are only counted.

    A record is one document, is empty, or is malformed: the counts add up.
    """
    shape = shape_of(path, options)
    for record in read_records(path, start, stop, options):
        counts.records += 1
        try:
            content, was_bad = _cleaned(_understood(record.content, shape, options))
        except (ValueError, TypeError, LookupError, AttributeError, StopIteration, RecursionError) as error:  # of data that anybody made
            counts.malformed += 1
            what = f"no field {error}" if isinstance(error, KeyError) else f"not {SHAPES[shape].said}" if not str(error) else error
            counts.examples = [*counts.examples, f"{name}, {record.place}: {what}"][:MAX_EXAMPLES]
            continue
        counts.bad_utf8 += was_bad
        if isinstance(content, str):
            if content and not content.isspace():
                yield Document(content, name, record.position)
                continue
        elif any(turn.role == "assistant" and turn.content.strip() for turn in content.turns):
            yield Document("".join(segment.text for segment in render(content, options.template)), name, record.position, content)
            continue
        counts.empty += 1


def _understood(content, shape: str, options: ReadOptions) -> str | Conversation:
    if isinstance(content, dict):
        fields = renamed(content, options)
        return text_of(fields, options.text_field) if shape == "text" else SHAPES[shape].read(fields)
    if isinstance(content, Exception):
        raise content
    return SHAPES[shape].read(content) if shape == "script" and content.strip() else content


def _cleaned(content: str | Conversation) -> tuple[str | Conversation, bool]:
    if isinstance(content, str):
        return clean(content)
    cleaned = [(turn.role, *clean(turn.content)) for turn in content.turns]
    return Conversation(tuple(Turn(role, text) for role, text, _ in cleaned)), any(was_bad for *_, was_bad in cleaned)
