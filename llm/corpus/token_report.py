"""What a tokenizer makes of text, source by source, beside another one."""

from collections.abc import Iterable

from llm.corpus.conversations import Template
from llm.corpus.documents import Document
from llm.log import result
from llm.tokenizer import IM_END, IM_START, Tokenizer
from llm.tokenizer.train import held_out

SOURCE_BYTES = 1 << 20
MAX_SOURCES = 20


def report_tokens(documents: Iterable[Document], template: Template, tokenizer: Tokenizer, other: Tokenizer | None) -> None:
    """Tell bytes per token of each source on text that was not trained on, up to SOURCE_BYTES each; `other`: to compare with."""
    texts: dict[str, list[bytes]] = {}
    for document in documents:
        of_source = texts.setdefault(document.source, [])
        if sum(map(len, of_source)) < SOURCE_BYTES:
            of_source += (piece.encode() for piece in held_out(document.plain_text(template)))
    measured = {source: pieces for source, pieces in texts.items() if pieces}
    shown = sorted(measured, key=lambda source: -sum(map(len, measured[source])))[:MAX_SOURCES]
    for source in shown:
        result(f"  {source}: {_bytes_per_token(measured[source], tokenizer, other)}")
    if len(measured) > 1:
        among = f", the largest {len(shown)} of which are shown" if len(shown) < len(measured) else ""
        result(f"all {len(measured):,} sources{among}: {_bytes_per_token(sum(measured.values(), []), tokenizer, other)}")
    spelled = sum(len(tokenizer.encode(name)) for name in (IM_START, IM_END))
    if {IM_START, IM_END} <= tokenizer.special_ids.keys():
        result(f"chat: a turn is marked by 2 special tokens, which would be {spelled} if spelled out: {spelled - 2} tokens saved each turn")


def _bytes_per_token(pieces: list[bytes], tokenizer: Tokenizer, other: Tokenizer | None) -> str:
    ours = _ratio(pieces, tokenizer)
    if other is None:
        return f"{ours:.2f} bytes per token"
    theirs = _ratio(pieces, other)
    return f"{ours:.2f} bytes per token, the other tokenizer {theirs:.2f} ({ours / theirs - 1:+.0%})"


def _ratio(pieces: list[bytes], tokenizer: Tokenizer) -> float:
    return sum(map(len, pieces)) / sum(len(ids) for ids in tokenizer.encode_batch([piece.decode() for piece in pieces]))
