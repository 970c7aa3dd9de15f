"""Other people's models in the yardstick's loop, with the same dimensions. One that is not installed is left out, with a line that says so."""

import importlib.util
from collections.abc import Callable

import torch
from nanogpt_loop import GPT, Loop

from llm.config import RunConfig
from llm.log import log


def huggingface(cfg: RunConfig, device: str, compiled: bool) -> Callable:
    from transformers import AutoConfig, AutoModelForCausalLM

    from llm.model.huggingface import to_config_json

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**to_config_json(cfg.model)), attn_implementation="sdpa")

    class MeanLoss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, idx, targets):  # shift_labels: they are the next ids already
            return self.model(idx, labels=targets, shift_labels=targets, use_cache=False).loss

    return Loop(cfg, device, compiled, MeanLoss()).step


def litgpt(cfg: RunConfig, device: str, compiled: bool) -> Callable:
    from litgpt import GPT as LitGPT
    from litgpt import Config
    from litgpt.utils import chunked_cross_entropy

    m = cfg.model
    shape = Config(
        name="benchmark", n_layer=m.n_layers, n_embd=m.d_model, n_head=m.n_heads, n_query_groups=m.n_kv_heads, head_size=m.d_head,
        intermediate_size=m.d_ff, vocab_size=m.vocab_size, padded_vocab_size=m.vocab_size, block_size=m.seq_len, parallel_residual=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", rotary_percentage=1.0, bias=False, lm_head_bias=False, norm_eps=m.norm_eps,
    )  # fmt: skip
    model = LitGPT(shape)
    if m.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight

    class MeanLoss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, idx, targets):
            return chunked_cross_entropy(self.model(idx), targets)

    model.apply(lambda part: torch.nn.init.normal_(part.weight, std=0.02) if isinstance(part, torch.nn.Linear | torch.nn.Embedding) else None)
    return Loop(cfg, device, compiled, MeanLoss()).step


def fsdp2(cfg: RunConfig, device: str, compiled: bool) -> Callable:
    """torchtitan's order: compile each block, shard each block, then the rest. One process here, so nothing travels."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(torch.device(device).type, (1,))
    model = GPT(cfg.model).to(device)
    is_bf16 = cfg.engine.precision == "bf16"
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if is_bf16 else torch.float32, reduce_dtype=torch.float32)
    for block in model.h:
        if compiled:
            block.compile()
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    loop = Loop(cfg, device, False, model)
    loop.autocast = torch.autocast(torch.device(device).type, enabled=False)  # the policy casts
    return loop.step


NEEDS: dict[str, tuple[Callable, str]] = {"hf": (huggingface, "transformers"), "litgpt": (litgpt, "litgpt"), "fsdp2": (fsdp2, "torch")}


def others(names: list[str]) -> dict[str, Callable]:
    """Those of `names` that are installed."""
    found = {}
    for name in names:
        build, package = NEEDS[name]
        if importlib.util.find_spec(package):
            found[name] = build
        else:
            log.info(f"{name}: {package} is not installed, so it is left out")
    return found
