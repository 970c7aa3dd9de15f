"""Which of torch's fused attention kernels is asked first, and which one answers."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm.config import ModelConfig

# torch asks flash first. On Hopper (9.0) cuDNN's is up to twice as fast by others' figures (huggingface/transformers#48163); not measured here
HOPPER_ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def kernels_in_order(device: str) -> Iterator[None]:
    """For the length of training, compilation included: what is compiled has chosen its kernel by then."""
    if device.startswith("cuda") and torch.cuda.get_device_capability(device) == (9, 0):
        with sdpa_kernel(HOPPER_ORDER, set_priority=True):
            yield
    else:
        yield


def attention_kernel(cfg: ModelConfig, precision: str, device: str, is_masked: bool) -> str:
    """The kernel that a training step of this model runs here, in words; call it within `kernels_in_order`."""
    if cfg.attention == "eager":
        return "plain products (eager)"
    if torch.device(device).type not in ("cpu", "cuda"):
        return "sdpa"
    dtype, T = torch.bfloat16 if precision == "bf16" else torch.float32, cfg.seq_len
    q, k = (torch.empty(1, heads, T, cfg.d_head, dtype=dtype, device=device, requires_grad=True) for heads in (cfg.n_heads, cfg.n_kv_heads))
    is_masked = is_masked or (cfg.sliding_window or T) < T
    mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=device) if is_masked else None
    choice = torch._fused_sdp_choice(q, k, k, mask, 0.0, not is_masked, enable_gqa=cfg.n_heads != cfg.n_kv_heads)
    return f"sdpa, {SDPBackend(choice).name.lower().removesuffix('_attention')} kernel" + (", masked" if is_masked else "")
