"""From logits to one token id."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm.log import UserError


@dataclass(frozen=True)
class Sampling:
    """How to choose among likely tokens. Filters apply in this order: repetition_penalty, temperature, top_k, top_p, min_p."""

    temperature: float = 0.8
    """0, or so little that logits divided by it are infinite, always takes the likeliest."""
    top_k: int | None = None
    """Keep the k likeliest."""
    top_p: float | None = None
    """Keep the fewest that together hold this probability; arXiv 1904.09751."""
    min_p: float | None = None
    """Keep those at least this times as likely as the likeliest; arXiv 2407.01082."""
    repetition_penalty: float = 1.0
    """Logits of tokens that stand in the text already are divided by it, negative ones multiplied; arXiv 1909.05858."""

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}, but should be 0 (always the likeliest token) or more; 0.8 is common.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k is {self.top_k}, but should be a number of tokens, at least 1; leave it out to keep all.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p}, but should be a probability above 0 and up to 1; leave it out to keep all.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise UserError(f"min-p is {self.min_p}, but should be from 0 to 1; 0.05 is common, leave it out to keep all.")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UserError(f"repetition-penalty is {self.repetition_penalty}, but should be from 0.01 to 100; 1 changes nothing, 1.1 is common.")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < 1e-6


def pick_rows(logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator], written: Sequence[Sequence[int]]) -> list[int]:
    """`pick` for each row. The likeliest tokens are found where the logits are, all at once."""
    if sampling.is_greedy and sampling.repetition_penalty == 1:
        return logits_BV.float().argmax(dim=-1).tolist()  # in bf16 it takes a CPU 10 times as long
    return [pick(logits_V, sampling, *own) for logits_V, *own in zip(logits_BV.float().cpu(), generators, written, strict=True)]


def pick(logits_V: Tensor, sampling: Sampling, generator: torch.Generator, written: Sequence[int] = ()) -> int:
    """One id drawn from fp32 logits on the generator's device. `written`: the text so far, for the repetition penalty."""
    if sampling.repetition_penalty != 1 and len(written):
        ids = torch.tensor(sorted({i for i in written if i < len(logits_V)}))
        seen = logits_V[ids]
        penalty = sampling.repetition_penalty
        logits_V = logits_V.index_copy(0, ids, torch.where(seen > 0, seen / penalty, seen * penalty))
    if sampling.is_greedy:
        return int(logits_V.argmax())
    logits, ids = logits_V / sampling.temperature, None  # from here on of the candidates alone
    if sampling.top_k is not None:
        logits, ids = logits.topk(min(sampling.top_k, len(logits)))
    probs = logits.softmax(dim=-1)
    if sampling.top_p is not None:
        sorted_probs, order = probs.sort(descending=True)
        beyond = sorted_probs.cumsum(dim=-1) - sorted_probs >= sampling.top_p  # the first always stays
        probs = probs.index_fill(0, order[beyond], 0.0)
    if sampling.min_p is not None:
        probs = probs.masked_fill(probs < sampling.min_p * probs.max(), 0.0)
    chosen = torch.multinomial(probs, 1, generator=generator)
    return int(chosen if ids is None else ids[chosen])
