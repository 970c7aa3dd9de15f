"""Where a model meets its hardware: plain torch and DDP, or DeepSpeed's ZeRO, behind the same calls."""

from torch import nn

from llm.config import RunConfig
from llm.dist import World
from llm.engine.attention_kernel import agreed_varlen_trouble
from llm.engine.protocol import Engine, EngineError, Update
from llm.engine.wrap import wrap_model

__all__ = ["Engine", "EngineError", "Update", "build_engine"]


def build_engine(cfg: RunConfig, world: World, model: nn.Module) -> Engine:
    """The engine that `cfg.engine` asks for, holding `model` and its AdamW. Collective: every rank brings equal weights."""
    wrap_model(model, cfg.engine, world.size)
    engine = _built(cfg, world, model)
    engine.no_varlen = agreed_varlen_trouble(cfg, world)
    return engine


def _built(cfg: RunConfig, world: World, model: nn.Module) -> Engine:
    if cfg.engine.zero_stage == 0:
        from llm.engine.torch_engine import TorchEngine

        return TorchEngine(cfg, world, model)
    from llm.engine.deepspeed_engine import DeepSpeedEngine, check_deepspeed
    from llm.engine.ds_check import check_ds_config
    from llm.engine.ds_traps import warn_of_traps

    if cfg.engine.ds_config:
        n_params = sum(p.numel() for p in model.parameters())
        check_ds_config(cfg, world, n_params)
        warn_of_traps(cfg, world, n_params)
    check_deepspeed(cfg, world)
    return DeepSpeedEngine(cfg, world, model)
