"""Text from a model, token by token, as it is made."""

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence

import torch

from llm.generate.sampling import Sampling, pick
from llm.model.kv_cache import KVCache
from llm.model.transformer import Transformer
from llm.tokenizer.protocol import Tokenizer


@torch.inference_mode()
def generate_ids(
    model: Transformer, tokenizer: Tokenizer, prompt: Sequence[int], *, max_tokens: int, sampling: Sampling, seed: int, stop_ids: Sequence[int] = ()
) -> Iterator[int]:
    """Yield up to `max_tokens` ids that continue `prompt`; ends early at end-of-text or one of `stop_ids`, which are not yielded.

    Of a prompt longer than the context the end is used. Text longer than the context goes on from its last half.
    """
    seq_len, weight = model.cfg.seq_len, model.head.weight
    cache = KVCache(model.cfg, 1, weight.device, weight.dtype)
    generator = torch.Generator().manual_seed(seed)  # on the CPU, for the same draws on every device
    history = [int(i) for i in prompt]
    unread = history[-seq_len:]
    for _ in range(max_tokens):
        if cache.length + len(unread) > seq_len:
            cache.length, unread = 0, history[-max(1, seq_len // 2) :]
        last_D = model.hidden(torch.tensor([unread], device=weight.device), cache)[0, -1]
        logits_V = model.logits(last_D)[: tokenizer.vocab_size]  # columns that only pad the vocabulary never win
        chosen = pick(logits_V.float().cpu(), sampling, generator)
        if chosen == tokenizer.eos_id or chosen in stop_ids:
            return
        yield chosen
        history.append(chosen)
        unread = [chosen]


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
