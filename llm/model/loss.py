"""The head and its cross-entropy in one, some rows at a time: logits of all rows never exist.

At V 32k they would be the largest tensor of a step by far. Of a chunk of rows the logits are made, read for the loss in slices that stay
in the cache, and followed by their own gradient, which goes on into the gradients of hidden states and weight at once: so the forward
pass does all the work, each exponential is taken once, and the backward pass only scales. What scales a whole row of that gradient, the
softmax's denominator among it, is left to the rows of hidden states, which are far shorter.
"""
# B rows in a batch · T tokens in a row · S keys attended to (T, or the cache length) · D model width · H query heads
# G kv heads · K width of one head · F MLP width · V vocabulary, padded

import torch
from torch import Tensor

from llm.config import ModelConfig
from llm.model.chunks import CPU_CHUNK, CPU_SLICE, GPU_CHUNK, GPU_SLICE
from llm.model.layers import Linear
from llm.model.products import linear, times_transposed, weight_gradient

IGNORE = -100  # a target that is not counted


class Head(Linear):
    """Hidden states in, logits or, with targets, the summed loss out. A module's call, because ZeRO-3 gathers the weight around it."""

    def __init__(self, cfg: ModelConfig):
        super().__init__(cfg.d_model, cfg.vocab_size, bias=cfg.head_bias)
        self.softcap, self.packed = cfg.logit_softcap, None
        self.take_loss = take_loss_in_slices  # or take_loss compiled, which needs no slices

    def forward(self, x: Tensor, targets_BT: Tensor | None = None, z_loss: float = 0.0) -> Tensor:
        """Logits along the last axis of x; or the fp32 sum of cross-entropy over the targets that are not -100.

        With z_loss, so much of the square of ln Z is added for each of them, Z the softmax's denominator; PaLM, arXiv 2204.02311, section 5.
        """
        if targets_BT is None:
            return capped(self.packed(x) if self.packed else super().forward(x), self.softcap)
        return _HeadLoss.apply(x.flatten(0, -2), self.weight, self.bias, targets_BT.flatten(), self, z_loss, torch.is_grad_enabled())


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Held between -softcap and softcap; Gemma 2, arXiv 2408.00118, section 2."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, head: Head, z_loss: float, learns: bool):
        device = x_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_ND.dtype
        weight, bias = weight_VD.to(dtype), None if bias_V is None else bias_V.to(dtype)
        total = torch.zeros((), device=x_ND.device)
        x_grad_ND, weight_grad, bias_grad = torch.empty_like(x_ND) if learns else x_ND, None, None
        n_chunks = -(-len(x_ND) * len(weight) // (CPU_CHUNK if device == "cpu" else GPU_CHUNK))
        with torch.autocast(device, enabled=False):
            for rows, grads, targets in zip(*(whole.chunk(n_chunks) for whole in (x_ND, x_grad_ND, targets_N)), strict=True):
                x = rows.to(dtype)
                logits = linear(x, weight, bias)
                chunk_loss, logits, scales_N1 = head.take_loss(logits, targets, z_loss, head.softcap, learns)
                total += chunk_loss
                if learns:  # logits are their gradient now, and the old ones gone
                    torch.mul(times_transposed(logits, weight.T), scales_N1, out=grads)
                    weight_grad = _plus(weight_grad, weight_gradient(logits, (x * scales_N1).to(dtype)))
                    bias_grad = _plus(bias_grad, (logits.float() * scales_N1).sum(dim=0)) if bias_V is not None else None
                del logits  # or two chunks would be there while the next one is made
        if learns:
            ctx.save_for_backward(x_grad_ND, weight_grad, bias_grad)
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):
        # in place: a second backward would find them changed, and is refused
        return *(g if g is None else g.mul_(scale) for g in ctx.saved_tensors), None, None, None, None


def take_loss(logits_NV: Tensor, targets_N: Tensor, z_loss: float, softcap: float | None, learns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(summed loss of these rows in fp32, grads_NV, scales_N1), from logits of any dtype: if it learns, grads * scales is the logits' gradient;
    compiled the grads are of the logits' dtype, else in fp32.

    Not in place: inductor would make the gradient beside the logits all the same, and then copy it over them.
    """
    bent_NV = logits_NV if softcap is None else softcap * torch.tanh(logits_NV.float() / softcap)
    is_counted_N1, at_N1 = (targets_N != IGNORE)[:, None], targets_N.clamp(min=0)[:, None]
    exps_NV, sums_N1, log_z_N1 = _exponentials(bent_NV, logits_NV.dtype)
    at_target_N1 = bent_NV.gather(1, at_N1).float()
    losses_N1 = log_z_N1 - at_target_N1 + z_loss * log_z_N1.square()
    weights_N1 = 1 + 2 * z_loss * log_z_N1
    grads_NV = logits_NV
    if learns:
        target_grads_N1 = ((at_target_N1 - log_z_N1).exp() - weights_N1.reciprocal()) * sums_N1
        if softcap is not None:
            exps_NV = (exps_NV * (1 - (bent_NV / softcap).square())).to(exps_NV.dtype)
            target_grads_N1 = target_grads_N1 * (1 - (at_target_N1 / softcap).square())
        grads_NV = exps_NV.scatter_(1, at_N1, target_grads_N1.to(exps_NV.dtype))
    return losses_N1.masked_fill(~is_counted_N1, 0.0).sum(), grads_NV, weights_N1 / sums_N1 * is_counted_N1


def _exponentials(logits_NV: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """exps_NV in proportion to the softmax, their sums_N1 and ln Z [N, 1] in fp32."""
    highest_N1 = logits_NV.amax(dim=-1, keepdim=True).float()
    if torch.compiler.is_compiling():
        exps_NV = (logits_NV.float() - highest_N1).exp().to(dtype)  # rounded as they will be kept, or a copy in fp32 would be made to be summed
        sums_N1 = exps_NV.float().sum(dim=-1, keepdim=True)
        return exps_NV, sums_N1, highest_N1 + sums_N1.log()
    probs_NV = torch.softmax(logits_NV, dim=-1, dtype=torch.float32)
    # by the most probable token, whose probability is never too small for a logarithm
    return probs_NV, torch.ones_like(highest_N1), highest_N1 - probs_NV.amax(dim=-1, keepdim=True).log()


def take_loss_in_slices(logits_NV: Tensor, targets_N: Tensor, *how) -> tuple[Tensor, Tensor, Tensor]:
    """take_loss, so few rows at a time that what one operation writes is still in the cache when the next one reads it. In place."""
    rows = max(1, (CPU_SLICE if logits_NV.device.type == "cpu" else GPU_SLICE) // logits_NV.shape[1])
    losses, scales = [], []
    for logits, targets in zip(logits_NV.split(rows), targets_N.split(rows), strict=True):
        loss, grads, scales_N1 = take_loss(logits, targets, *how)
        logits.copy_(grads)
        losses.append(loss)
        scales.append(scales_N1)
    return sum(losses), logits_NV, torch.cat(scales)


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    """A sum in fp32."""
    return part.float() if total is None else total.add_(part)
