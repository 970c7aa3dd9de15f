"""Which of torch's fused attention kernels may be taken, which one is, and whether documents need a mask."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from llm.config import ModelConfig, RunConfig
from llm.dist import World
from llm.model import varlen
from llm.model.attention import document_mask, sdpa_attention

TRIED_LENGTHS, TRIED_WINDOW = [1, 130, 61], 50  # documents within a tile of 128 keys and across two
OFF_LIMIT = 5e-2  # bf16 keeps 8 bits; a key too many or too few moves results by more than this


@contextmanager
def training_kernels(cfg: ModelConfig, document_mask: bool) -> Iterator[None]:
    """Which of torch's fused kernels training may take, compilation included.

    Their order is torch's own: it asks cuDNN first on Hopper from cuDNN 9.15.1 on, before which
    some lengths fault (pytorch/pytorch#169849). Rows with a mask do without cuDNN, whose backward
    pass gives NaN for some lengths (pytorch/pytorch#196678). Ends what `leave_cudnn` has begun.
    """
    was_enabled = torch.backends.cuda.cudnn_sdp_enabled()
    is_masked = document_mask or _window(cfg) is not None
    torch.backends.cuda.enable_cudnn_sdp(was_enabled and not is_masked)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_enabled)


def leave_cudnn(cfg: RunConfig, device: str) -> bool:
    """Have other kernels than cuDNN's compute attention from here on; False where none of it was.

    Call it within `training_kernels`. What is compiled is compiled anew.
    """
    if not device.startswith("cuda") or cfg.model.attention == "eager":
        return False
    chosen = _chosen_kernel(cfg.model, cfg.engine.precision, device, is_masked=False)
    if chosen != SDPBackend.CUDNN_ATTENTION:  # nor is it ever with a mask
        return False
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.compiler.reset()
    return True


def attention_kernel(cfg: ModelConfig, precision: str, device: str, is_masked: bool, no_varlen: str | None = "") -> str:
    """The kernel that a training step of this model runs here, in words; call it within `training_kernels`.

    `is_masked`: documents are kept apart. `no_varlen`: `varlen_trouble`, or what all ranks have agreed on.
    """
    if cfg.attention == "eager":
        return "plain products (eager)"
    if is_masked and no_varlen is None:
        return "varlen_attn, flash kernel, each document by itself"
    if torch.device(device).type not in ("cpu", "cuda"):
        return "sdpa"
    why = f" (not varlen_attn: {no_varlen})" if is_masked and no_varlen else ""
    is_masked = is_masked or _window(cfg) is not None
    name = _chosen_kernel(cfg, precision, device, is_masked).name.lower().removesuffix("_attention")
    return f"sdpa, {name} kernel" + (", masked" if is_masked else "") + why


def _chosen_kernel(cfg: ModelConfig, precision: str, device: str, is_masked: bool) -> SDPBackend:
    """What torch takes for a row of this model's in training."""
    dtype, T = torch.bfloat16 if precision == "bf16" else torch.float32, cfg.seq_len
    q, k = (torch.empty(1, heads, T, cfg.d_head, dtype=dtype, device=device, requires_grad=True) for heads in (cfg.n_heads, cfg.n_kv_heads))
    mask = torch.ones(1, 1, T, T, dtype=torch.bool, device=device) if is_masked else None
    return SDPBackend(torch._fused_sdp_choice(q, k, k, mask, 0.0, not is_masked, enable_gqa=cfg.n_heads != cfg.n_kv_heads))


def agreed_varlen_trouble(cfg: RunConfig, world: World) -> str | None:
    """`varlen_trouble` of the first rank that has any: all ranks do alike. Collective."""
    if not cfg.data.document_mask:
        return ""
    if cfg.engine.zero_stage == 3 and cfg.engine.compile:  # its hooks hand a block other tensors, without the mark of `let_vary`
        return "under ZeRO-3 each number of documents would be compiled for"
    troubles = world.gather(varlen_trouble(cfg.model, cfg.engine.precision, world.device, cfg.engine.compile))
    return next((trouble for trouble in troubles if trouble is not None), None)


def varlen_trouble(cfg: ModelConfig, precision: str, device: str, is_compiled: bool = False) -> str | None:
    """Why documents are kept apart by a mask here and not by varlen_attn; None if nothing is against it, "" where that goes without saying."""
    if cfg.attention != "sdpa" or not device.startswith("cuda"):
        return ""
    if precision != "bf16":
        return f"it takes bf16, and engine.precision is {precision}"
    if _window(cfg) and not varlen.HAS_WINDOW:
        return f"in torch {torch.__version__} it has no sliding window"
    try:
        off = varlen_off(cfg, device, is_compiled)
    except Exception as error:  # it is beta, and this GPU may be new to it: whatever it raises, a mask will do
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None if off < OFF_LIMIT else f"it is off by {off:.1e} here"  # false for nan as well


def varlen_off(cfg: ModelConfig, device: str, is_compiled: bool) -> float:
    """How far varlen_attn is from masked SDPA in fp32 for small rows with heads like the model's: relative, of outputs and gradients."""
    heads, window = [cfg.n_heads, cfg.n_kv_heads, cfg.n_kv_heads], _window(cfg)
    window = window and min(window, TRIED_WINDOW)
    row = torch.arange(len(TRIED_LENGTHS)).repeat_interleave(torch.tensor(TRIED_LENGTHS))
    doc_ids_BT = torch.stack([row, torch.zeros_like(row)])
    # a generator of its own, as the run's goes into its checkpoints
    qkv = torch.randn(*doc_ids_BT.shape, sum(heads), cfg.d_head, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)

    def results(attend: Callable, qkv: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        qkv = qkv.clone().requires_grad_()
        y = attend(*(x.transpose(1, 2) for x in qkv.split(heads, dim=2)), window, where).float()
        return y.detach(), torch.autograd.grad(y.square().sum(), qkv)[0].float()

    starts = varlen.document_starts(doc_ids_BT).to(device)
    varlen.let_vary(starts)
    attend = torch.compile(varlen.varlen_attention, fullgraph=True, dynamic=False) if is_compiled else varlen.varlen_attention
    pairs = zip(results(attend, qkv, starts), results(sdpa_attention, qkv.float(), document_mask(doc_ids_BT.to(device))), strict=True)
    return torch.stack([(ours - wanted).abs().max() / wanted.abs().max() for ours, wanted in pairs]).max().item()


def _window(cfg: ModelConfig) -> int | None:
    """The sliding window, where it is shorter than a row."""
    return cfg.sliding_window if (cfg.sliding_window or cfg.seq_len) < cfg.seq_len else None
