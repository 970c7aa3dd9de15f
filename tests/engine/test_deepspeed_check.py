"""The start-up check notices a DeepSpeed whose private parts have changed, before a run depends on them."""

import json
from pathlib import Path
from unittest import mock

import pytest
from engine_cases import ENGINES, make_engine, run_config
from ranks import run_ranks

from llm.log import UserError

WAYS = ["offsets of groups", "offsets of parameters", "stale weights", "refusal", "a renamed attribute", "the optimizer's step"]


def shifted(fragments):
    """The same fragments, but said to start one element earlier."""
    return lambda self: ((name, flat, at, max(0, start - 1), n) for name, flat, at, start, n in fragments(self))


def sabotage(world, folder: str) -> dict:
    """The message for each way of breaking what check_deepspeed guards, and for a file with a wrong key."""
    from llm.engine.deepspeed_engine import DeepSpeedEngine as Engine

    replacements = [
        ("zero2", "_fragments_of_groups", shifted(Engine._fragments_of_groups)),
        ("zero3", "_fragments_of_parameters", shifted(Engine._fragments_of_parameters)),
        ("zero1", "_refresh_model", lambda self: None),
        ("zero2", "_spoil_gradients", lambda self: None),
        ("zero3", "_flats", lambda self: self.zero.fp32_partitions),
        ("zero1", "load_state", lambda self, state: None),
    ]
    messages = {}
    for way, (stage, method, replacement) in zip(WAYS, replacements, strict=True):
        with mock.patch.object(Engine, method, replacement):
            messages[way] = refusal(world, ENGINES[stage])
    files = {name: refusal_of_file(world, folder, content) for name, (content, *_) in FILES.items()}
    return messages | files | {"none": refusal(world, ENGINES["zero1"])}


# What a file says beside its stage, 1; what of the refusal names the place; what it names to write instead. No words: it is taken.
ZERO = {"stage": 1}
FILES = {
    "a key misspelt": ({"gradient_cliping": 1.0}, "gradient_cliping", "'gradient_clipping'"),
    "a section misspelt": ({"zero_optimisation": ZERO}, "zero_optimisation", "'zero_optimization'"),
    "a key of a section": ({"flops_profiler": {"enable": True}}, "flops_profiler.enable", "'enabled'"),
    "a key of a section of ours": ({"torch_autocast": {"enabeld": True}}, "torch_autocast.enabeld", "'enabled'"),
    "a key of a list of types": ({"data_types": {"grad_acum_dtype": "fp32"}}, "data_types.grad_acum_dtype", "'grad_accum_dtype'"),
    "a key of ZeRO": ({"zero_optimization": ZERO | {"overlap_com": True}}, "zero_optimization.overlap_com", "'overlap_comm'"),
    "a key below ZeRO": (
        {"zero_optimization": ZERO | {"offload_optimizer": {"pin_memry": True}}}, "zero_optimization.offload_optimizer.pin_memry", "'pin_memory'",
    ),
    "a value of another type": ({"zero_optimization": ZERO | {"reduce_bucket_size": "many"}}, "zero_optimization.reduce_bucket_size", "'many'"),
    "a section that is a switch": ({"zero_optimization": True}, "zero_optimization is true", "zero_optimization.stage"),
    "an optimizer by name": ({"optimizer": "Adam"}, 'optimizer is "Adam"', "optimizer.type"),
    "an old recipe's offload": ({"zero_optimization": ZERO | {"cpu_offload": True}}, "cpu_offload", "offload_optimizer"),
    "an old recipe's amp": ({"amp": {"enabled": True}}, "AMP", "torch_autocast"),
    "an old recipe's elasticity": ({"elasticity": {"enabled": True}}, "elasticity", "train_batch_size"),
    "an old recipe's sparse gradients": ({"sparse_gradients": True}, "sparse_gradients", "removed"),
    "an old recipe's stage 1": ({"zero_optimization": ZERO | {"legacy_stage1": True}}, "ZeRO Stage 1", "not supported"),
    "a type that is none": ({"communication_data_type": "float8"}, "communication_data_type", "'bf16'"),
    "gradients that travel in bf16": ({"communication_data_type": "bf16"},),
    "gradients that travel in fp16": ({"communication_data_type": "fp16"},),
    "a comment": ({"_comment": "of ours", "steps_per_print": 7, "zero_optimization": ZERO | {"round_robin_gradients": True}},),
}  # fmt: skip


def refusal_of_file(world, folder: str, content: dict) -> str | None:
    path = Path(folder, f"mine-{world.rank}.json")
    path.write_text(json.dumps({"zero_optimization": ZERO} | content))
    return refusal(world, {"zero_stage": 1, "ds_config": str(path)})


def refusal(world, engine: dict) -> str | None:
    try:
        make_engine(run_config(world, engine), world)
    except UserError as error:
        return str(error)


@pytest.fixture(scope="module")
def messages(tmp_path_factory) -> list[dict]:
    """By rank."""
    folder = tmp_path_factory.mktemp("sabotage")
    return run_ranks(sabotage, 2, folder, str(folder))


@pytest.mark.parametrize("way", WAYS)
def test_a_sabotage_is_noticed_on_every_rank_and_the_version_is_named(messages, way):
    for rank in messages:
        assert rank["none"] is None
        assert rank[way] and "start-up check" in rank[way] and "deepspeed==0.19" in rank[way] and "engine.zero_stage=0" in rank[way]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_the_users_is_taken_or_refused_with_the_place_in_it_and_never_for_deepspeeds_version(messages, name):
    _, *named = FILES[name]
    for rank in messages:
        told = rank[name]
        assert (told is not None) == bool(named), told
        assert not named or (all(words in told for words in [*named, "mine-"]) and "pip install" not in told and "\n  For further" not in told), told
