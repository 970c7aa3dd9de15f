"""Angles of rotary positions, and how they are stretched to longer rows than a model was first trained with."""
# B rows in a batch · T tokens in a row · S keys attended to (T, or the cache length) · D model width · H query heads
# G kv heads · K width of one head · F MLP width · V vocabulary, padded

import math

import torch
from torch import Tensor

from llm.config import ModelConfig

YARN_FAST, YARN_SLOW = 32.0, 1.0  # turns within the original rows: more stay as they are, fewer are slowed; the paper's choice


def rope_tables(cfg: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles in fp32, [T, 1, R/2], to broadcast over heads; R = d_rotary. Source: RoFormer, arXiv 2104.09864."""
    frequencies = SCALING[cfg.rope_scaling](_plain(cfg), cfg)
    angles = torch.outer(torch.arange(cfg.seq_len, dtype=torch.float32), frequencies)[:, None]
    sharper = 0.1 * math.log(cfg.rope_factor) + 1.0 if cfg.rope_scaling == "yarn" else 1.0  # YaRN's temperature, on q and on k
    return angles.cos() * sharper, angles.sin() * sharper


def _plain(cfg: ModelConfig) -> Tensor:
    return cfg.rope_theta ** -(torch.arange(0, cfg.d_rotary, 2, dtype=torch.float32) / cfg.d_rotary)


def _linear(frequencies: Tensor, cfg: ModelConfig) -> Tensor:
    """Positions are squeezed; arXiv 2306.15595."""
    return frequencies / cfg.rope_factor


def _llama3(frequencies: Tensor, cfg: ModelConfig) -> Tensor:
    """Slow waves are slowed, fast ones stay, with a ramp between; Llama 3.1's reference code."""
    turns = cfg.rope_original_seq_len * frequencies / (2 * math.pi)
    low, high = cfg.rope_low_freq_factor, cfg.rope_high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / cfg.rope_factor)


def _yarn(frequencies: Tensor, cfg: ModelConfig) -> Tensor:
    """The same idea with the ramp over dimensions; arXiv 2309.00071."""

    def dimension(turns: float) -> float:
        """Which pair turns so often within the original rows."""
        return cfg.d_rotary * math.log(cfg.rope_original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))

    first, last = max(math.floor(dimension(YARN_FAST)), 0), min(math.ceil(dimension(YARN_SLOW)), cfg.d_rotary - 1)
    slowed = ((torch.arange(len(frequencies)) - first) / max(last - first, 1e-3)).clamp(0, 1)
    return frequencies * (1 - slowed + slowed / cfg.rope_factor)


SCALING = {"none": lambda frequencies, cfg: frequencies, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
