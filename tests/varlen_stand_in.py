"""What torch's varlen_attn promises, for a CPU: each document by itself. As opaque to torch.compile, and as strict about what it is given."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from llm.model import varlen


def each_alone(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, window: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor, Tensor]]:
    """Of each document: its tokens, and q, k, v, [heads, tokens, width], and what its queries take of each value. k and v as many as q.

    A query sees `window` keys beside its own, or all before it in its document when that is -1.
    """
    for start, stop in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        q_HTK, k_HTK, v_HTK = (x[start:stop].repeat_interleave(q.shape[1] // x.shape[1], dim=1).transpose(0, 1) for x in (q, k, v))
        place = torch.arange(stop - start)
        behind = place[:, None] - place[None, :]
        seen = (behind >= 0) & ((behind <= window) | (window < 0))
        scores = (q_HTK @ k_HTK.transpose(1, 2) * q.shape[2] ** -0.5).masked_fill(~seen, float("-inf"))
        yield slice(start, stop), q_HTK, k_HTK, v_HTK, scores.softmax(-1)


@torch.library.custom_op("tally_test::varlen", mutates_args=())
def operation(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, window: int) -> Tensor:
    ends = starts.tolist()
    assert starts.dtype == torch.int32 and ends[0] == 0 and ends[-1] == len(q) == len(k) and q.dtype == k.dtype == v.dtype == varlen.DTYPE
    assert all(0 < stop - start <= longest for start, stop in zip(ends, ends[1:], strict=False)), (ends, longest)
    return torch.cat([(share @ v_HTK).transpose(0, 1) for _, _, _, v_HTK, share in each_alone(q, k, v, starts, window)])


@torch.library.custom_op("tally_test::varlen_backward", mutates_args=())
def backward_operation(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x).contiguous() for x in (q, k, v))
    for at, q_HTK, k_HTK, v_HTK, share in each_alone(q, k, v, starts, window):
        d_HTK = gradient[at].transpose(0, 1)
        d_share = d_HTK @ v_HTK.transpose(1, 2)
        d_scores = share * (d_share - (d_share * share).sum(-1, keepdim=True)) * q.shape[2] ** -0.5
        of_keys = d_scores.transpose(1, 2) @ q_HTK, share.transpose(1, 2) @ d_HTK
        dq[at] = (d_scores @ k_HTK).transpose(0, 1)
        dk[at], dv[at] = (x.transpose(0, 1).unflatten(1, (k.shape[1], -1)).sum(2) for x in of_keys)  # over the queries' heads of a group
    return dq, dk, dv


def remember(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.window = inputs[5]


operation.register_fake(lambda q, k, v, starts, longest, window: torch.empty_like(q, memory_format=torch.contiguous_format))
backward_operation.register_fake(lambda gradient, q, k, v, starts, window: tuple(torch.empty_like(x).contiguous() for x in (q, k, v)))
operation.register_autograd(
    lambda ctx, gradient: (*backward_operation(gradient, *ctx.saved_tensors, ctx.window), None, None, None), setup_context=remember
)


def attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window, enable_gqa=False):
    assert cu_seq_q is cu_seq_k and max_q == max_k and type(max_q) is int
    assert query.shape[1] == key.shape[1] or enable_gqa
    return operation(query, key, value, cu_seq_q, max_q, window)


def of_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    assert is_causal
    return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, -1)


def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
    left, right = window_size
    assert right == 0
    return attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, left, enable_gqa)


OF_TORCH = {"2.10": (of_2_10, False, False), "2.11": (of_2_11, True, False), "2.12": (of_2_11, True, True)}


@contextmanager
def stand_in(of_torch: str = "2.12", dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Instead of torch's own, with what it could do in that version. In fp32, which it does not know, results can be compared to the last digits."""
    function, has_window, has_groups = OF_TORCH[of_torch]
    with (
        mock.patch("torch.nn.attention.varlen.varlen_attn", function),
        mock.patch.multiple(varlen, HAS_WINDOW=has_window, HAS_GROUPS=has_groups, DTYPE=dtype),
    ):
        yield
