"""Attention in rows of several documents, without a mask of all pairs of tokens: torch's varlen_attn (beta), which only this file knows.

It is flash's kernel: CUDA, bf16. Whether it works on this GPU is tried before training (llm/engine/attention_kernel.py).
"""
# B rows in a batch · T tokens in a row · S keys attended to (T, or the cache length) · D model width · H query heads
# G kv heads · K width of one head · F MLP width · V vocabulary, padded · N documents in a batch

import torch
from torch import Tensor

# by the sources of 2.10.0, 2.11.0, 2.12.1 and 2.13.0
HAS_WINDOW = torch.__version__ >= (2, 11)  # window_size, in place of is_causal
HAS_GROUPS = torch.__version__ >= (2, 12)  # enable_gqa
DTYPE = torch.bfloat16


def document_starts(doc_ids_BT: Tensor) -> Tensor:
    """int32[N + 1]: where among the B * T tokens a document or a row begins, and at last B * T; others call it cu_seqlens.

    To be made on the CPU, where batches come from: on a GPU N would have to be waited for.
    """
    is_first_BT = torch.ones_like(doc_ids_BT, dtype=torch.bool)
    is_first_BT[:, 1:] = doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1]
    return torch.cat([is_first_BT.flatten().nonzero().flatten(), torch.tensor([is_first_BT.numel()])]).int()


def let_vary(starts: Tensor) -> None:
    """Have one compiled graph serve any number of documents. Else each number is compiled for, and torch gives up at the ninth."""
    torch._dynamo.maybe_mark_dynamic(starts, 0)


def varlen_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, window: int | None, starts: Tensor) -> Tensor:
    """Causal attention within each of the documents that begin at `starts`; a query sees `window` keys at most, itself included. In bf16."""
    from torch.nn.attention.varlen import varlen_attn  # here, because it takes two seconds in 2.12 and 2.13

    B, H, T, K = q_BHTK.shape
    window = None if window is None or window >= T else window
    assert window is None or HAS_WINDOW
    how = {"window_size": (-1 if window is None else window - 1, 0)} if HAS_WINDOW else {"is_causal": True}  # so many keys beside its own
    if k_BGTK.shape[1] != H:
        if HAS_GROUPS:
            how["enable_gqa"] = True
        else:
            k_BGTK, v_BGTK = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k_BGTK, v_BGTK))
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(DTYPE) for x in (q_BHTK, k_BGTK, v_BGTK))  # autocast does not know this operation
    return varlen_attn(q, k, v, starts, starts, T, T, **how).view(B, T, H, K).transpose(1, 2)
