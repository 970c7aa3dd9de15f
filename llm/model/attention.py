"""Causal self-attention with grouped kv heads. Heads lie before tokens where attention is computed, as sdpa wants them."""
# B rows in a batch · T tokens in a row · S keys attended to (T, or the cache length) · D model width · H query heads
# G kv heads · K width of one head · F MLP width · V vocabulary, padded

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm.config import ModelConfig
from llm.model.chunks import EAGER_QUERIES
from llm.model.layers import Linear, RMSNorm, rotate
from llm.model.varlen import varlen_attention


def sdpa_attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, window: int | None = None, mask_B1TS: Tensor | None = None) -> Tensor:
    """torch's fused kernels. The T queries are the last T of the S positions; each sees `window` of them at most, itself included.

    `mask_B1TS`: where they may look, if that is not all up to themselves; or where documents begin (`document_starts`), to do without a mask.
    """
    if mask_B1TS is not None and mask_B1TS.dim() == 1:
        return varlen_attention(q_BHTK, k_BGSK, v_BGSK, window, mask_B1TS)
    T, S = q_BHTK.shape[2], k_BGSK.shape[2]
    all_seen = mask_B1TS is None and (window is None or window >= S)
    # is_causal lines up with the first key, not the last
    mask = None if all_seen and T in (1, S) else _seen(T, S, q_BHTK.device, window, mask_B1TS)
    grouped = q_BHTK.shape[1] != k_BGSK.shape[1]
    return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, mask, is_causal=mask is None and T == S, enable_gqa=grouped)


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Have torch's other kernels compute sdpa_attention. For the whole process, so one thread at a time.

    For rows of many lengths: cuDNN makes a plan for each shape, 0.2 to 0.5 s (sgl-project/sglang#4650),
    and with few kv heads it decodes wrongly on Blackwell (pytorch/pytorch#193893).
    """
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def eager_attention(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, window: int | None = None, mask_B1TS: Tensor | None = None) -> Tensor:
    """The same by definition, with softmax in fp32: the reference that the others are tested against.

    On a CPU in bf16 it beats the fused kernels up to some 512 tokens a row (torch 2.13, AVX512); its scores are rounded to bf16.
    """
    H, T, S = q_BHTK.shape[1], q_BHTK.shape[2], k_BGSK.shape[2]
    k_BHSK, v_BHSK = (x if x.shape[1] == H else x.repeat_interleave(H // x.shape[1], dim=1) for x in (k_BGSK, v_BGSK))
    seen = None if window is None and mask_B1TS is None else _seen(T, S, q_BHTK.device, window, mask_B1TS)
    return _EagerAttention.apply(q_BHTK, k_BHSK, v_BHSK, seen)


class _EagerAttention(torch.autograd.Function):
    """Some queries at a time, which look at no key behind their own end: a third of the work falls away.

    The backward pass is written out, because autograd's own fills up each part's gradients of keys with zeros, and takes sums over
    rows of scores where sums over rows of the output say the same; FlashAttention, arXiv 2205.14135, appendix B.4.
    """
    # Z is B and H in one; what products read is made contiguous first, or they would copy it themselves, more slowly

    @staticmethod
    def forward(ctx, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, seen: Tensor | None) -> Tensor:
        (B, H, T, K), S = q_BHTK.shape, k_BHSK.shape[2]
        q_ZTK, k_ZSK, v_ZSK = (x.flatten(0, 1).contiguous() for x in (q_BHTK * K**-0.5, k_BHSK, v_BHSK))
        ys, kept = [], []
        with torch.autocast(q_BHTK.device.type, enabled=False):
            for start, stop, keys in _parts(T, S):
                scores = q_ZTK[:, start:stop].contiguous() @ k_ZSK[:, :keys].contiguous().transpose(1, 2)
                if seen is None:
                    is_hidden = _behind_each(start + S - T, stop - start, keys, scores.device)
                else:
                    is_hidden, scores = ~seen[..., start:stop, :keys], scores.view(B, H, -1, keys)
                probs_ZTS = scores.masked_fill_(is_hidden, float("-inf")).softmax(dim=-1).view(B * H, -1, keys)
                ys.append(probs_ZTS @ v_ZSK[:, :keys].contiguous())
                kept.append(probs_ZTS)
        y_ZTK = torch.cat(ys, dim=1)
        ctx.save_for_backward(q_ZTK, k_ZSK, v_ZSK, y_ZTK, *kept)
        return y_ZTK.view(B, H, T, K)

    @staticmethod
    def backward(ctx, y_grad_BHTK: Tensor):
        q_ZTK, k_ZSK, v_ZSK, y_ZTK, *kept = ctx.saved_tensors
        (B, H, T, K), S = y_grad_BHTK.shape, k_ZSK.shape[1]
        y_grad_ZTK = y_grad_BHTK.flatten(0, 1).to(y_ZTK.dtype)
        row_sums_ZT1 = (y_grad_ZTK.float() * y_ZTK.float()).sum(dim=-1, keepdim=True)
        q_grads, k_grads, v_grads = [], [], []
        for (start, stop, keys), probs in zip(_parts(T, S), kept, strict=True):
            y_grad = y_grad_ZTK[:, start:stop].contiguous()
            probs_grad = y_grad @ v_ZSK[:, :keys].contiguous().transpose(1, 2)
            scores_grad = probs_grad.float().sub_(row_sums_ZT1[:, start:stop]).mul_(probs).to(probs.dtype)
            q_grads.append(scores_grad @ k_ZSK[:, :keys].contiguous())
            _add_part(k_grads, scores_grad.transpose(1, 2) @ q_ZTK[:, start:stop].contiguous())
            _add_part(v_grads, probs.transpose(1, 2) @ y_grad)
        q_grad, k_grad, v_grad = (torch.cat(parts, dim=1).view(B, H, -1, K) for parts in (q_grads, k_grads, v_grads))
        return q_grad * K**-0.5, k_grad, v_grad, None


def _parts(T: int, S: int) -> list[tuple[int, int, int]]:
    """(first query, stop, keys that they may look at) of each part."""
    stops = [min(start + EAGER_QUERIES, T) for start in range(0, T, EAGER_QUERIES)]
    return [(start, stop, S - T + stop) for start, stop in zip(range(0, T, EAGER_QUERIES), stops, strict=True)]


def _behind_each(first: int, n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """True where a key lies behind the query at position `first` + row; by 32 bits, which compiled code compares faster than the usual 64."""
    places, rows = (torch.arange(n, dtype=torch.int32, device=device) for n in (n_keys, n_queries))
    return places > rows[:, None] + first


def _add_part(gradients: list[Tensor], part_ZSK: Tensor) -> None:
    """Add a part's gradient of keys to those of shorter parts before it; the rest of it is the first for its keys."""
    lengths = [g.shape[1] for g in gradients]
    *seen_before, new = part_ZSK.split([*lengths, part_ZSK.shape[1] - sum(lengths)], dim=1)
    gradients[:] = [g + more for g, more in zip(gradients, seen_before, strict=True)] + [new]


def causal_mask(T: int, S: int, device: torch.device, window: int | None = None) -> Tensor:
    """True where query t, at position S - T + t, may look."""
    seen = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return seen if window is None else seen.triu(S - T - window + 1)


def _seen(T: int, S: int, device: torch.device, window: int | None, mask: Tensor | None) -> Tensor:
    """`mask`, which looks at nothing later already, within the window; without one all up to each query."""
    if mask is None:
        return causal_mask(T, S, device, window)
    return mask if window is None else mask & causal_mask(T, S, device, window)


def document_mask(doc_ids_BT: Tensor) -> Tensor:
    """[B, 1, T, T], True where query and key are of one document and the key is not later."""
    is_same_BTT = doc_ids_BT[:, :, None] == doc_ids_BT[:, None, :]
    T = doc_ids_BT.shape[1]
    return (is_same_BTT & causal_mask(T, T, doc_ids_BT.device))[:, None]


def positions_in_documents(doc_ids_BT: Tensor) -> Tensor:
    """int64[B, T]: each token's place in its document, from 0 where the document, or the row, begins."""
    place_T = torch.arange(doc_ids_BT.shape[1], device=doc_ids_BT.device)
    is_first_BT = torch.ones_like(doc_ids_BT, dtype=torch.bool)
    is_first_BT[:, 1:] = doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1]
    return place_T - torch.where(is_first_BT, place_T, 0).cummax(dim=1).values


ATTENTION = {"sdpa": sdpa_attention, "eager": eager_attention}


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.heads = [cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads]
        self.d_head = cfg.d_head
        self.attend, self.window = ATTENTION[cfg.attention], cfg.sliding_window
        self.qkv = Linear(cfg.d_model, sum(self.heads) * cfg.d_head, bias=cfg.bias)
        self.q_norm = RMSNorm(cfg.d_head, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(cfg.d_head, cfg.norm_eps) if cfg.qk_norm else nn.Identity()
        self.out = Linear(cfg.n_heads * cfg.d_head, cfg.d_model, bias=cfg.bias)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor] | None, remember: Callable | None, mask_B1TT: Tensor | None = None) -> Tensor:
        """rope: tables for these T positions. remember: appends k and v to a cache and gives back all that it holds. mask: of documents."""
        B, T = x_BTD.shape[:2]
        q_BTHK, k_BTGK, v_BTGK = self.qkv(x_BTD).view(B, T, -1, self.d_head).split(self.heads, dim=2)
        q_BTHK, k_BTGK = self.q_norm(q_BTHK), self.k_norm(k_BTGK)
        if rope is not None:
            q_BTHK, k_BTGK = rotate(q_BTHK, *rope), rotate(k_BTGK, *rope)
        q_BHTK, k_BGSK, v_BGSK = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
        if remember is not None:
            k_BGSK, v_BGSK = remember(k_BGSK, v_BGSK)
        y_BHTK = self.attend(q_BHTK.to(k_BGSK.dtype), k_BGSK, v_BGSK, self.window, mask_B1TT)  # a cache may be more exact
        return self.out(y_BHTK.transpose(1, 2).reshape(B, T, -1).to(q_BHTK.dtype))
