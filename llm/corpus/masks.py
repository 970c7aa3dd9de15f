"""Which tokens carry loss, as spans of (start, length): of a document, and of documents and units one after the other."""

from collections.abc import Iterable

import numpy as np

Spans = np.ndarray | None
"""int64[n, 2] in order and apart; None: every token carries loss, as in plain text."""


def document_spans(lengths: list[int], carries: list[bool]) -> np.ndarray:
    """Spans of a document made of pieces of these lengths in tokens, of which some carry loss."""
    spans = np.stack([np.cumsum(lengths) - lengths, lengths], axis=1)
    return _merged(spans[np.array(carries, bool)])


def joined(pieces: Iterable[tuple[Spans, int]]) -> Spans:
    """Spans of (spans, tokens) pieces laid end to end; None when every token of every piece carries loss by None."""
    pieces, found, start = list(pieces), [np.empty((0, 2), np.int64)], 0
    if all(spans is None for spans, _ in pieces):
        return None
    for spans, n_tokens in pieces:
        found.append(np.array([[start, n_tokens]]) if spans is None else spans + [start, 0])
        start += n_tokens
    return _merged(np.concatenate(found).astype(np.int64))


def _merged(spans: np.ndarray) -> np.ndarray:
    """Those that touch become one."""
    spans = spans[spans[:, 1] > 0]
    starts, ends = spans[:, 0], spans.sum(axis=1)
    is_gap = starts[1:] != ends[:-1]
    starts, ends = starts[np.r_[True, is_gap][: len(spans)]], ends[np.r_[is_gap, True][: len(spans)]]
    return np.stack([starts, ends - starts], axis=1)
