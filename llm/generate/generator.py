"""Text from a model, token by token, as it is made."""
# B rows in a batch · D model width · V vocabulary, padded

import codecs
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

import torch

from llm.generate.sampling import Sampling, pick_rows
from llm.model.attention import without_cudnn
from llm.model.kv_cache import KVCache
from llm.model.transformer import Transformer
from llm.tokenizer.protocol import Tokenizer


@torch.inference_mode()
def generate_rows(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling,
    seed: int,
    stop_ids: Collection[int] = (),
) -> Iterator[tuple[int, int]]:
    """Yield (row, id) for up to `max_tokens` ids that continue each of `prompts`; a row ends early at end-of-text or one of `stop_ids`, which
    are not yielded.

    All rows stand at one position: those with longer prompts are still being read when others are written already, so that no row
    needs padding or a mask, and each gets what it would get alone. Row r draws from seed + r.
    Of a prompt longer than the context the end is used, behind one of no tokens a text begins as in training, with an end-of-text. Text longer
    than the context goes on from its last half.
    """
    seq_len = model.cfg.seq_len
    seeds = [(seed + row) % 2**63 for row in range(len(prompts))]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU, for the same draws on every device
    rows = [[int(i) for i in prompt][-seq_len:] or [tokenizer.eos_id] for prompt in prompts]
    ends = [len(row) + max_tokens for row in rows]
    cache = KVCache(model.cfg, len(prompts), model.device, model.dtype, room=min(seq_len, max(ends)))
    unfinished = list(range(len(rows))) if max_tokens > 0 else []
    start, stop = 0, min(map(len, rows))  # what is read next
    while unfinished:
        if cache.length + stop - start > seq_len:
            cache.length, start = 0, stop - max(1, seq_len // 2)
        tokens_BT = torch.tensor([row[start:stop] for row in rows], device=model.device)
        with without_cudnn():
            hidden_BTD = model.hidden(tokens_BT, cache)
        if due := [r for r in unfinished if len(rows[r]) == stop]:  # the prompts of others go on
            logits_BV = model.head(hidden_BTD[due, -1])[:, : tokenizer.vocab_size]  # columns that only pad the vocabulary never win
            picked = pick_rows(logits_BV, sampling, [generators[r] for r in due], [rows[r] for r in due])
            for r, token in zip(due, picked, strict=True):
                rows[r].append(token)
                is_end = token == tokenizer.eos_id or token in stop_ids
                if not is_end:
                    yield r, token
                if is_end or len(rows[r]) == ends[r]:
                    unfinished.remove(r)
        for row in rows:
            if len(row) == stop:  # finished: it is read on with the others, and nobody looks
                row.append(tokenizer.eos_id)
        start, stop = stop, stop + 1


class Writing:
    """The text that continues `prompt`, in pieces as they are made. Afterwards `n_tokens` and `finish_reason` tell how it went.

    `is_cancelled` is asked after each token; the other options are those of `generate_rows`.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        max_tokens: int,
        stop: Sequence[str] = (),
        is_cancelled: Callable[[], bool] = bool,
        **how,
    ):
        self.n_prompt, self.n_tokens, self.finish_reason = len(prompt), 0, "stop"
        self._max_tokens, self._stop, self._is_cancelled = max_tokens, stop, is_cancelled
        self._tokenizer, self._rows = tokenizer, generate_rows(model, tokenizer, [prompt], max_tokens=max_tokens, **how)

    def __iter__(self) -> Iterator[str]:
        return until_stop(stream_text(self._tokenizer, self._counted()), self._stop)

    def _counted(self) -> Iterator[int]:
        for _, token in self._rows:
            self.n_tokens += 1
            yield token
            if self._is_cancelled():
                return
        if self.n_tokens == self._max_tokens:
            self.finish_reason = "length"


def prompt_ids(tokenizer: Tokenizer, text: str, special_tokens: bool) -> list[int]:
    """The ids of a prompt; with `special_tokens`, names of special tokens in it are those tokens: never for text that somebody else may write."""
    if not special_tokens:
        return tokenizer.encode(text).tolist()
    names = "|".join(map(re.escape, sorted(tokenizer.special_ids, key=len, reverse=True)))
    pieces = [piece for piece in re.split(f"({names})", text) if piece]
    return [i for p in pieces for i in ([tokenizer.special_ids[p]] if p in tokenizer.special_ids else tokenizer.encode(p).tolist())]


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of `ids` as they come; a character whose bytes are spread over tokens comes whole, with the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token_id in ids:
        if text := decoder.decode(tokenizer.token_bytes(token_id)):
            yield text
    if rest := decoder.decode(b"", final=True):
        yield rest


def until_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The text of `pieces` up to the first of `stops`, without it; what may be the beginning of one waits for the next piece."""
    held = ""
    for piece in pieces:
        held += piece
        found = [place for stop in stops if (place := held.find(stop)) >= 0]
        shown = min(found) if found else len(held) - max((_begun(held, stop) for stop in stops), default=0)
        if shown:
            yield held[:shown]
        if found:
            return
        held = held[shown:]
    if held:
        yield held


def _begun(text: str, stop: str) -> int:
    """How many characters of `stop` stand at the end of `text`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def visible(text: str) -> str:
    """`text` with control characters shown as pictures (U+2400…): what a model writes must not steer the terminal it is shown on."""
    return text.translate(_PICTURES)


_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | dict.fromkeys(range(0x7F, 0xA0), "\ufffd")
