"""Linear maps whose weights lie in memory as a CPU reads them fastest, for models that are only read."""

import torch
from torch import Tensor, nn

from llm.model.loss import Head


class PackedLinear(nn.Module):
    """What `linear` computes, by oneDNN on a weight in its own blocked layout. It has no parameters: it can neither be trained nor moved.

    Against F.linear on an AMD EPYC: fp32 2 times as fast for 1 row or 512 and 3 times for 8, bf16 2.5 times for 1 row, the same for 512.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())  # opaque, hence no buffer
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def pack(model: nn.Module) -> None:
    """Put a PackedLinear in the place of every linear map, where this machine can: weights on a CPU, and a torch with oneDNN.

    The head keeps its weight beside the packed one, for losses.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Head) and _can_pack(child.weight):
                child.packed = PackedLinear(child)
            elif isinstance(child, nn.Linear) and _can_pack(child.weight):
                setattr(parent, name, PackedLinear(child))


def _can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
