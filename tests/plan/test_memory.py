"""Bytes that are planned against bytes that are counted in the process."""

import json
from pathlib import Path

import torch
from hardware import PACKS_BF16
from ranks import run_ranks

from llm.config import check_config, load_config
from llm.model.flops import count_params
from llm.model.transformer import Transformer
from llm.plan.memory import memory_of

ROOT = Path(__file__).parent.parent.parent
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
STATE = ("weights", "masters", "gradients", "moments")
TOY = ["vocab_size=4224", "n_layers=2", "batch_size=2", "seq_len=128", "batch_tokens=512"]
PRECISION = "bf16" if PACKS_BF16 else "fp32"  # of those that do not say: bf16 where it does not take minutes
FAMILIES = {
    "toy": ["seq_len=256", "batch_size=1"],  # queries of eager attention in two parts
    "fp32": ["precision=fp32", "attention=sdpa"],
    "checkpointed": ["activation_checkpointing=true", "attention=sdpa"],
    "half checkpointed": ["activation_checkpointing=0.5", "attention=sdpa", "n_layers=4"],
    "gpt2": ["norm=layernorm", "mlp=gelu", "bias=true", "positions=learned", "attention=sdpa"],
    "phi": ["norm=layernorm", "mlp=gelu", "bias=true", "parallel_blocks=true", "rotary_fraction=0.5", "attention=sdpa", "tie_embeddings=false"],
    "qwen": ["qk_norm=true", "attention=sdpa", "sliding_window=64", "logit_softcap=30.0"],
    "documents": ["document_mask=true", "attention=sdpa"],
}


def config(*words: str, base: str = "toy"):
    return load_config(ROOT / "configs" / f"{base}.yaml", [f"precision={PRECISION}", *words])


def test_the_parameters_of_every_preset_are_those_of_the_real_model():
    for path in PRESETS:
        model = load_config(path).model
        model = model if model.vocab_size else model.with_vocab(4100)
        with torch.device("meta"):
            assert count_params(model) == sum(p.numel() for p in Transformer(model).parameters()), path


def count_here(world, *configs: str) -> list[dict]:
    from llm.engine import census

    return [census.count(check_config(json.loads(text), "test"), world.on("cpu")) for text in configs]


def counted(tmp_path, configs: list, ranks: int = 1) -> list[dict]:
    return run_ranks(count_here, ranks, tmp_path, *[cfg.model_dump_json() for cfg in configs])[0]


def off(planned: float, real: float) -> float:
    return abs(planned - real) / max(real, 1)


def assert_close(cfg, real: dict, ranks: int, kinds, within: float) -> None:
    planned = memory_of(cfg, ranks, "cpu")
    wrong = {kind: (getattr(planned, kind), real[kind]) for kind in kinds if off(getattr(planned, kind), real[kind]) > within}
    assert not wrong, (cfg.model.model_name, cfg.engine.zero_stage, wrong)


def test_planned_bytes_of_families_and_of_30_million_parameters_are_within_a_tenth_of_those_counted_in_a_process(tmp_path):
    larger = config("n_layers=5", "vocab_size=32768", "seq_len=128", "batch_size=1", "batch_tokens=256", base="my-llm")
    assert 30e6 < count_params(larger.model) < 33e6
    configs = [*(config(*TOY, "zero_stage=0", *words) for words in FAMILIES.values()), larger]
    for cfg, real in zip(configs, counted(tmp_path, configs), strict=True):
        assert_close(cfg, real, 1, (*STATE, "activations"), within=0.10)
        assert off(memory_of(cfg, 1, "cpu").total, real["peak"]) < 0.10, (memory_of(cfg, 1, "cpu"), real)


def test_planned_bytes_of_every_zero_stage_on_two_ranks_are_those_counted(tmp_path):
    """Parameters that lie across the cut between ranks make ZeRO-2's part of the gradients uneven, the more so the smaller the model."""
    configs = [config(*TOY, "tie_embeddings=false", "batch_tokens=1024", f"zero_stage={stage}", "attention=sdpa") for stage in range(4)]
    for stage, (cfg, real) in enumerate(zip(configs, counted(tmp_path, configs, ranks=2), strict=True)):
        kinds = [kind for kind in STATE if (stage, kind) != (2, "gradients")]
        assert_close(cfg, real, 2, (*kinds, "activations"), within=0.10)
        assert off(memory_of(cfg, 2, "cpu").total, real["peak"]) < (0.30 if stage > 1 else 0.10), (stage, memory_of(cfg, 2, "cpu"), real)


def test_more_ranks_higher_stages_and_checkpointing_never_take_more_memory_for_state_and_activations():
    cfg = config(base="gpt-1b")
    for stage in range(4):
        here = cfg.model_copy(update={"engine": cfg.engine.model_copy(update={"zero_stage": stage})})
        states = [sum(getattr(memory_of(here, n, "cuda"), kind) for kind in STATE) for n in (2, 8, 64)]
        assert states == sorted(states, reverse=True)
    shares = [n / cfg.model.n_layers for n in range(cfg.model.n_layers + 1)]
    again = [cfg.model_copy(update={"engine": cfg.engine.model_copy(update={"activation_checkpointing": share})}) for share in shares]
    kept = [memory_of(each, 8, "cuda").activations for each in again]
    assert kept == sorted(kept, reverse=True) and kept[-1] < kept[0] / 5
    totals = [memory_of(each, 8, "cuda").total for each in again[:-1]]
    assert totals == sorted(totals, reverse=True)  # the planner's search builds on it
