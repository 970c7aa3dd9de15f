"""Loss, perplexity and bits per byte on text and on token shards."""

import math
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import torch

from llm.data.manifest import FILE_NAME, check_compatible, find_shards
from llm.data.phase import count_samples
from llm.data.shards import Shard
from llm.data.stream import Batch, eval_batches
from llm.dist import World
from llm.engine.protocol import model_inputs
from llm.eval.likelihood import batch_tokens, score, windows
from llm.log import Progress, UserError, progress
from llm.model.attention import without_cudnn
from llm.model.transformer import Transformer
from llm.tokenizer.protocol import Tokenizer
from llm.train.validate import token_byte_lengths, validate

WINDOWS_AT_A_TIME = 256


def is_shards(path: Path) -> bool:
    return (path / FILE_NAME).is_file() or path.name.endswith((".bin", ".meta.json"))


def of_text(model: Transformer, tokenizer: Tokenizer, texts: Iterable[str], stride: int | None = None) -> dict[str, float]:
    """{"loss", "perplexity", "bits_per_byte", "tokens", "bytes"} over all texts, as `text_sums` reads them."""
    nats, n_tokens, n_bytes = text_sums(model, tokenizer, texts, stride)
    if not n_tokens:
        raise UserError("There is no text to measure: what was given holds no characters.")
    return named(nats, n_tokens, n_bytes) | {"tokens": n_tokens, "bytes": n_bytes}


def text_sums(model: Transformer, tokenizer: Tokenizer, texts: Iterable[str], stride: int | None = None) -> tuple[float, int, int]:
    """(nats, tokens, bytes) of all texts. Each begins behind an end-of-text and counts every token once.

    `stride` (seq_len / 2): how many tokens a window adds; the others of seq_len are only read.
    """
    nats, n_tokens, n_bytes = 0.0, 0, 0
    stride = stride or max(1, model.cfg.seq_len // 2)
    for text in texts:
        n_bytes += len(text.encode())
        pairs = windows(tokenizer.encode(text).tolist(), tokenizer.eos_id, model.cfg.seq_len, stride)
        while some := list(islice(pairs, WINDOWS_AT_A_TIME)):
            nats -= sum(found.log_likelihood for found in score(model, some))
            n_tokens += sum(len(continuation) for _, continuation in some)
    return nats, n_tokens, n_bytes


def named(nats: float, n_tokens: int, n_bytes: int) -> dict[str, float]:
    """{"loss", "perplexity", "bits_per_byte"} of sums."""
    loss = nats / n_tokens
    return {"loss": loss, "perplexity": _perplexity(loss), "bits_per_byte": nats / math.log(2) / n_bytes}


def of_shards(
    model: Transformer, tokenizer: Tokenizer, paths: list[Path], max_rows: int | None = None, document_mask: bool = False, packing: str | None = None
) -> dict[str, float]:
    """{"loss", "perplexity", "bits_per_byte"} of the validation shards, or if there are none the training shards, as training measures them.

    `max_rows`: so many windows spread over all, as train.eval_rows does. `document_mask`, `packing`: as the run's data section has them.
    """
    shards: list[Shard] = find_shards(paths, "val") or find_shards(paths, "train")
    check_compatible(shards, tokenizer.fingerprint, model.cfg.seq_len, rechunk=True)
    rows = max(1, batch_tokens(model) // model.cfg.seq_len)
    byte_lengths = token_byte_lengths(tokenizer, model.cfg.vocab_size)
    n_rows = sum(count_samples(shard, model.cfg.seq_len, packing) for shard in shards)
    with progress(min(n_rows, max_rows or n_rows), "reading", "windows") as bar:
        engine = SimpleNamespace(evaluate=lambda batch: _loss_sum(model, batch, bar))
        found = validate(engine, lambda: eval_batches(shards, model.cfg.seq_len, rows, 0, 1, max_rows, document_mask, packing), byte_lengths, World())
    return found | {"perplexity": _perplexity(found["loss"])}


@without_cudnn()
@torch.inference_mode()
def _loss_sum(model: Transformer, batch: Batch, bar: Progress) -> tuple[float, int]:
    loss = model(**model_inputs(batch, model.device))
    bar.advance(int((batch.samples >= 0).sum()))
    return loss.item(), int((batch.targets_BT >= 0).sum())


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # beyond, a float overflows: a model in training may be as bad as that
