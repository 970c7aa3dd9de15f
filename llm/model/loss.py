"""Cross-entropy in fp32 from logits of any dtype, without an fp32 copy of the logits.

At V 32k the logits are the largest tensor of a step. They are read in slices, and the backward pass writes their gradient over them:
nothing else ever reads them again.
"""
# B rows in a batch · T tokens in a row · S keys attended to (T, or the cache length) · D model width · H query heads
# G kv heads · K width of one head · F MLP width · V vocabulary, padded

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that is not counted
CPU_SLICE, GPU_SLICE = 1 << 20, 1 << 26  # elements: 4 MB of fp32 stay in a CPU's cache; a GPU wants few launches and has the memory


def cross_entropy_sum(logits_NV: Tensor, targets_N: Tensor, z_loss: float = 0.0) -> Tensor:
    """Sum over the targets that are not -100, an fp32 scalar. Takes the logits over: backward leaves their gradient in their place.

    With z_loss, so much of the square of ln Z is added for each of them, Z the softmax's denominator; PaLM, arXiv 2204.02311, section 5.
    """
    if not torch.compiler.is_compiling():
        return _CrossEntropySum.apply(logits_NV, targets_N, z_loss)
    logits = logits_NV.float()  # compiled, the plain form is fastest: the conversion is fused, and no fp32 copy is made either
    total = F.cross_entropy(logits, targets_N, ignore_index=IGNORE, reduction="sum")
    return total + z_loss * (_log_z(logits).square() * (targets_N != IGNORE)).sum() if z_loss else total


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV: Tensor, targets_N: Tensor, z_loss: float) -> Tensor:
        ctx.save_for_backward(logits_NV, targets_N)
        ctx.z_loss = z_loss
        total = torch.zeros((), dtype=torch.float32, device=logits_NV.device)
        for logits, targets in _slices(logits_NV, targets_N):
            log_probs = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
            losses = -log_probs.gather(1, targets.clamp(min=0)[:, None])[:, 0]
            if z_loss:
                losses += z_loss * _log_z(logits).square()
            total += losses.masked_fill(targets == IGNORE, 0.0).sum()
        return total

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor, None, None]:
        logits_NV, targets_N = ctx.saved_tensors
        for logits, targets in _slices(logits_NV, targets_N):
            grad = torch.softmax(logits, dim=-1, dtype=torch.float32)
            if ctx.z_loss:
                grad *= 1 + 2 * ctx.z_loss * _log_z(logits)[:, None]
            grad.scatter_add_(1, targets.clamp(min=0)[:, None], grad.new_full((len(targets), 1), -1.0))
            grad *= (scale * (targets != IGNORE))[:, None]
            logits.copy_(grad)
        return logits_NV, None, None


def _log_z(logits: Tensor) -> Tensor:
    return logits.float().logsumexp(dim=-1)


def _slices(logits_NV: Tensor, targets_N: Tensor):
    elements = CPU_SLICE if logits_NV.device.type == "cpu" else GPU_SLICE
    rows = max(1, elements // logits_NV.shape[1])
    return zip(logits_NV.split(rows), targets_N.split(rows), strict=True)
