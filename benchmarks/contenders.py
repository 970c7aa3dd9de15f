"""Other people's models in the yardstick's loop, with the same dimensions. One that is not installed is left out, with a line that says so."""

import importlib.util
from collections.abc import Callable

import torch
from nanogpt_loop import GPT, Loop

from llm.batch_plan import batch_plan
from llm.config import RunConfig
from llm.dist import World
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


def trainer(cfg: RunConfig, device: str, compiled: bool) -> Callable:
    """Hugging Face's Trainer, its own training step, clipping and optimizer; what its loop does around them, logging for instance, is left out."""
    import tempfile

    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

    from llm.model.huggingface import to_config_json

    t = cfg.train
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(), bf16=cfg.engine.precision == "bf16", use_cpu=device == "cpu", optim="adamw_torch_fused", learning_rate=t.lr,
        weight_decay=t.weight_decay, adam_beta1=t.betas[0], adam_beta2=t.betas[1], max_grad_norm=t.clip_norm or 0.0, torch_compile=compiled,
        gradient_accumulation_steps=batch_plan(cfg, 1).accumulation, report_to=[], lr_scheduler_type="constant",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**to_config_json(cfg.model)), attn_implementation="sdpa")
    its = Trainer(model=model, args=args)
    its.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    its.create_optimizer_and_scheduler(num_training_steps=1_000_000)
    wrapped, optimizer = its.accelerator.prepare(its.model, its.optimizer)
    its.model_wrapped = wrapped
    wrapped.train()

    def step(batches) -> torch.Tensor:
        losses = []
        for x, y in batches:
            losses.append(its.training_step(wrapped, {"input_ids": x, "labels": y, "shift_labels": y}))
        if t.clip_norm:
            its.accelerator.clip_grad_norm_(wrapped.parameters(), t.clip_norm)
        optimizer.step()
        wrapped.zero_grad()
        return sum(losses)

    return step


def deepspeed_defaults(cfg: RunConfig, device: str, compiled: bool) -> Callable:
    """The yardstick's model under ZeRO-1 with nothing set but what has to be: bf16 weights and buckets as they come, and the same fused AdamW."""
    from llm.engine.deepspeed_engine import import_deepspeed

    deepspeed, plan, t = import_deepspeed(World(device=device)), batch_plan(cfg, 1), cfg.train
    loop = Loop(cfg, device, False)
    settings = {
        "train_micro_batch_size_per_gpu": plan.micro_rows, "gradient_accumulation_steps": plan.accumulation, "zero_optimization": {"stage": 1},
        "bf16": {"enabled": cfg.engine.precision == "bf16"}, "gradient_clipping": t.clip_norm or 0.0, "steps_per_print": 2**31,
    }  # fmt: skip
    engine = deepspeed.initialize(model=loop.model, optimizer=loop.optimizer, config=settings, dist_init_required=False)[0]
    if compiled:
        engine.compile()

    def step(batches) -> torch.Tensor:
        for x, y in batches:
            loss = engine(x.to(device, non_blocking=True), y.to(device, non_blocking=True))
            engine.backward(loss)
            engine.step()
        return loss.detach()

    return step


NEEDS: dict[str, tuple[Callable, str]] = {
    "hf": (huggingface, "transformers"), "trainer": (trainer, "accelerate"), "litgpt": (litgpt, "litgpt"), "fsdp2": (fsdp2, "torch"),
    "deepspeed": (deepspeed_defaults, "deepspeed"),
}  # fmt: skip


def others(names: list[str]) -> dict[str, Callable]:
    """Those of `names` that are other people's and installed; such as need a process group last, since Trainer wraps its model where there is one."""
    found = {}
    for name, (build, package) in NEEDS.items():
        if name in names and importlib.util.find_spec(package):
            found[name] = build
        elif name in names:
            log.info(f"{name}: {package} is not installed, so it is left out")
    return found
