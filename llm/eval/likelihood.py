"""How likely a model finds given continuations of given texts, many at a time."""
# B rows in a batch · T tokens in a row · D model width · V vocabulary, padded · N tokens that are scored

import os.path
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from llm.log import UserError
from llm.model.attention import without_cudnn
from llm.model.kv_cache import KVCache
from llm.model.transformer import Transformer
from llm.tokenizer.protocol import Tokenizer

CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 16384  # more overflows a CPU's caches: 8192 cost 1.5 times the time
LOGITS = 1 << 24  # logits held at a time: 64 MB of fp32
WORTH_SHARING = 0.25  # of the longest row: behind a shorter prefix attention's masked kernel costs more than the prefix saves

Pair = tuple[Sequence[int], Sequence[int]]
Row = tuple[int, ...]


class Score(NamedTuple):
    log_likelihood: float
    """Natural logarithm of the probability of the whole continuation."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest there."""


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """The ids of both when they are encoded as one text; spaces between them belong to the continuation.

    As in lm-evaluation-harness. Nothing before the continuation: end-of-text stands there, as between documents in training.
    """
    n_context = len(context.rstrip())
    context, continuation = context[:n_context], context[n_context:] + continuation
    context_ids = tokenizer.encode(context).tolist() if context else []
    whole_ids = tokenizer.encode(context + continuation).tolist()
    return context_ids or [tokenizer.eos_id], whole_ids[len(context_ids) :]


def windows(ids: Sequence[int], before: int, seq_len: int, stride: int) -> Iterator[Pair]:
    """Pairs whose continuations are `ids`, each once; `before` stands in front of the first.

    After the first window each scores `stride` ids with the seq_len - stride before them in view.
    """
    text, start = [before, *ids], 0
    while start < len(ids):
        stop = min(start + (stride if start else seq_len), len(ids))
        yield text[max(0, stop - seq_len) : start + 1], text[start + 1 : stop + 1]
        start = stop


@without_cudnn()
@torch.inference_mode()
def score(model: Transformer, pairs: Sequence[Pair], advance: Callable[[int], None] = lambda n: None) -> list[Score]:
    """One score for each (context ids, continuation ids). Of a context that is too long the end is used.

    Rows of like length go together, equal rows once, and what all contexts begin with is read once. `advance` hears of pairs done.
    """
    requests = [_cut(pair, model.cfg.seq_len) for pair in pairs]
    numbers_of: dict[Row, list[int]] = {}
    for number, (row, _) in enumerate(requests):
        numbers_of.setdefault(row, []).append(number)
    prefix = _shared_prefix(model, requests)
    scores: list[Score | None] = [None] * len(requests)
    for rows in _batches(sorted(numbers_of, key=len, reverse=True), prefix.length if prefix else 0, batch_tokens(model)):
        numbers = [number for row in rows for number in numbers_of[row]]
        found = _score_rows(model, rows, [requests[number] for number in numbers], prefix)
        for number, one in zip(numbers, found, strict=True):
            scores[number] = one
        advance(len(numbers))
    return scores


def _cut(pair: Pair, seq_len: int) -> tuple[Row, Row]:
    """(what the model reads, what it should say of the last tokens of that)"""
    context, continuation = tuple(pair[0]), tuple(pair[1])
    if len(continuation) > seq_len or not context or not continuation:
        raise UserError(f"A continuation of {len(continuation):,} tokens cannot be scored: give 1 to {seq_len:,}, which the model sees.")
    return (context + continuation)[-seq_len - 1 : -1], continuation


def _shared_prefix(model: Transformer, requests: Sequence[tuple[Row, Row]]) -> KVCache | None:
    """A cache of one row with what all rows begin with, where that is worth it."""
    if not requests:
        return None
    shared = os.path.commonprefix([row for row, _ in requests])  # of any sequences, not of paths alone
    shared = shared[: min(len(row) - len(targets) for row, targets in requests)]  # each first answer is read from behind it
    if len(requests) < 2 or len(shared) < WORTH_SHARING * max(len(row) for row, _ in requests):
        return None
    cache = KVCache(model.cfg, 1, model.device, model.dtype, room=len(shared))
    model.hidden(torch.tensor([shared], device=model.device), cache)
    return cache


def batch_tokens(model: Transformer) -> int:
    """How many tokens to read at a time where the model is."""
    return CPU_BATCH_TOKENS if model.device.type == "cpu" else GPU_BATCH_TOKENS


def _batches(rows: list[Row], n_shared: int, n_tokens: int) -> Iterator[list[Row]]:
    """Neighbours of a list that falls in length, up to `n_tokens` in each batch, padding included."""
    at = 0
    while at < len(rows):
        size = max(1, n_tokens // (len(rows[at]) - n_shared))
        yield rows[at : at + size]
        at += size


def _score_rows(model: Transformer, rows: list[Row], requests: list[tuple[Row, Row]], prefix: KVCache | None) -> list[Score]:
    device, n_shared = model.device, prefix.length if prefix else 0
    width = len(rows[0]) - n_shared  # the longest is first; padding stands behind, where no token looks
    tokens_BT = torch.tensor([row[n_shared:] + (0,) * (width - len(row) + n_shared) for row in rows], device=device)
    hidden_BTD = model.hidden(tokens_BT, _repeated(model, prefix, len(rows), width) if prefix else None)
    index = {row: at for at, row in enumerate(rows)}
    places = [(index[row], len(row) - len(targets) - n_shared + i) for row, targets in requests for i in range(len(targets))]
    row_N, place_N = torch.tensor(places, device=device).T
    targets_N = torch.tensor([target for _, targets in requests for target in targets], device=device)
    log_probs, hits = map(iter, _log_probs(model, hidden_BTD[row_N, place_N], targets_N))
    return [Score(sum(islice(log_probs, len(targets))), all(list(islice(hits, len(targets))))) for _, targets in requests]


def _repeated(model: Transformer, prefix: KVCache, rows: int, more: int) -> KVCache:
    """`prefix` for each of so many rows, with room for `more` tokens."""
    cache = KVCache(model.cfg, rows, model.device, model.dtype, room=prefix.length + more)
    cache.k_LBGSK[:, :, :, : prefix.length] = prefix.k_LBGSK[:, :, :, : prefix.length]
    cache.v_LBGSK[:, :, :, : prefix.length] = prefix.v_LBGSK[:, :, :, : prefix.length]
    cache.length = prefix.length
    return cache


def _log_probs(model: Transformer, hidden_ND: Tensor, targets_N: Tensor) -> tuple[list[float], list[bool]]:
    """Log-probability of each target, and whether it is the likeliest. The head reads only what is scored."""
    found, hits = [], []
    size = max(1, LOGITS // model.cfg.vocab_size)
    for hidden, targets in zip(hidden_ND.split(size), targets_N.split(size), strict=True):
        log_probs_NV = model.head(hidden).log_softmax(dim=-1, dtype=torch.float32)
        found += log_probs_NV.gather(1, targets[:, None])[:, 0].tolist()
        hits += (log_probs_NV.argmax(dim=-1) == targets).tolist()
    return found, hits
