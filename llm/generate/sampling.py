"""From logits to one token id."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llm.log import UserError


@dataclass(frozen=True)
class Sampling:
    """How to choose among likely tokens. Filters apply in this order: temperature, top_k, top_p."""

    temperature: float = 0.8
    """0 always takes the likeliest."""
    top_k: int | None = None
    """Keep the k likeliest."""
    top_p: float | None = None
    """Keep the fewest that together hold this probability; arXiv 1904.09751."""

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}, but should be 0 (always the likeliest token) or more; 0.8 is common.")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top-k is {self.top_k}, but should be a number of tokens, at least 1; leave it out to keep all.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top-p is {self.top_p}, but should be a probability above 0 and up to 1; leave it out to keep all.")


def pick(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One id drawn from fp32 logits on the generator's device."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / sampling.temperature
    if sampling.top_k is not None:
        weakest = logits_V.topk(min(sampling.top_k, len(logits_V))).values[-1]
        logits_V = logits_V.masked_fill(logits_V < weakest, float("-inf"))
    probs_V = logits_V.softmax(dim=-1)
    if sampling.top_p is not None:
        sorted_probs, order = probs_V.sort(descending=True)
        beyond = sorted_probs.cumsum(dim=-1) - sorted_probs >= sampling.top_p  # the first always stays
        probs_V = probs_V.index_fill(0, order[beyond], 0.0)
    return int(torch.multinomial(probs_V, 1, generator=generator))
