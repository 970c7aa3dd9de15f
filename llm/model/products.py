"""Products of matrices, each "a times b transposed", by the library that is fastest for them.

For fp32 torch calls MKL, which on AMD's processors keeps to AVX2, half of what they can since Zen 4. oneDNN, which torch carries for bf16,
takes AVX-512 there and is up to twice as fast; benchmarks/kernel_rates.py shows both.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 64  # below it the weight is read for so little that MKL is as fast, as in generating


def _mkl_holds_back() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    is_amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text()
    return is_amd and torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(torch.ops.mkldnn, "_linear_pointwise")


ONEDNN = _mkl_holds_back()  # a fact of the machine, not a measurement: a run that is resumed must compute as before


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear."""
    if _wants_onednn(x, x.numel() // x.shape[-1]):
        y = _Linear.apply(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """a[N, K] and b[M, K], as they lie or transposed, give [N, M]. No gradient."""
    return onednn_times_transposed(a, b) if _wants_onednn(a, len(a)) else a @ b.T


@torch.library.custom_op("tally::onednn_times_transposed", mutates_args=())  # inductor takes the op itself for constant weights only
def onednn_times_transposed(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


@onednn_times_transposed.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(len(a), len(b))


def weight_gradient(grad_NM: Tensor, x_NK: Tensor) -> Tensor:
    """[M, K], contiguous: the gradient of a weight that made N rows of M out of rows of K."""
    if grad_NM.shape[1] > x_NK.shape[1] and _wants_onednn(x_NK, len(x_NK)):
        return times_transposed(x_NK.T, grad_NM.T).T.contiguous()  # oneDNN has to copy its first factor: give it the smaller one
    return times_transposed(grad_NM.T, x_NK.T)


def _wants_onednn(x: Tensor, n_rows: int) -> bool:
    return ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu" and n_rows >= FEW_ROWS and not torch.is_autocast_enabled("cpu")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NK: Tensor, weight_MK: Tensor) -> Tensor:
        ctx.save_for_backward(x_NK, weight_MK)
        return times_transposed(x_NK, weight_MK)

    @staticmethod
    def backward(ctx, grad_NM: Tensor) -> tuple[Tensor, Tensor]:
        x_NK, weight_MK = ctx.saved_tensors
        return times_transposed(grad_NM, weight_MK.T), weight_gradient(grad_NM, x_NK)
