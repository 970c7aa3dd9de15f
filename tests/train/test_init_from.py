"""--init-from takes another run's weights only for a model in which they mean the same."""

import json
from collections.abc import Collection
from pathlib import Path

import pytest
from little_run import make_run, newest_manifest, sit, sit_alone
from ranks import run_ranks

from llm.checkpoint.slices import CheckpointError
from llm.config import ModelConfig, load_config
from llm.log import MISTAKE, UserError
from llm.train.drift import FREE_OF_SOURCE, STRETCH, check_source

# the source: 2 layers, d_model 32, n_heads 4, n_kv_heads 2, d_head 8, seq_len 8
OTHERWISE = {
    "model_name": "another", "n_layers": 3, "d_model": 64, "n_heads": 2, "n_kv_heads": 4, "d_head": 16, "d_ff": 64, "seq_len": 16,
    "vocab_size": 4096, "norm": "layernorm", "norm_eps": 1.0, "positions": "learned", "rope_theta": 500_000.0, "rotary_fraction": 0.5,
    "rope_scaling": "linear", "rope_factor": 2.0, "rope_original_seq_len": 4, "rope_low_freq_factor": 2.0, "rope_high_freq_factor": 8.0,
    "mlp": "gelu", "bias": True, "head_bias": True, "parallel_blocks": True, "qk_norm": True, "sliding_window": 3, "logit_softcap": 2.0,
    "z_loss": 1e-4, "tie_embeddings": True, "init_std": 0.5, "attention": "eager",
}  # fmt: skip
SAME_SHAPES = {  # of each tensor, so that shapes alone tell nothing
    "other head counts": {"n_heads": 2, "n_kv_heads": 1, "d_head": 16},
    "another norm's epsilon": {"norm_eps": 1.0},
    "softened logits": {"logit_softcap": 2.0},
    "a window": {"sliding_window": 3},
    "parallel blocks": {"parallel_blocks": True},
    "part of each head turned": {"rotary_fraction": 0.5},
    "all at once": {"norm_eps": 1e-6, "logit_softcap": 30.0, "sliding_window": 4},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The config of a run of four steps."""
    root = tmp_path_factory.mktemp("source")
    config = make_run(root)
    sit_alone(root, config, [], None, steps_today=4)
    return config


def refusal(source: Path, changes: dict, accepted: Collection[str] = ()) -> str | None:
    """What is said to a run of other settings that wants the source's weights."""
    words = [f"model.{key}={json.dumps(value)}" for key, value in changes.items()]
    saved = newest_manifest(source).config
    cfg = load_config(source, words)
    cfg = cfg.model_copy(update={"model": cfg.model.with_vocab(saved["model"]["vocab_size"])})
    try:
        check_source(source, saved, cfg, accepted)
    except CheckpointError as error:
        return str(error)
    return None


def test_every_setting_of_a_model_is_free_or_stretches_it_or_must_be_the_same(source):
    assert OTHERWISE.keys() == ModelConfig.model_fields.keys(), "a new setting: say what it changes for given weights"
    assert refusal(source, {}) is None
    for key, value in OTHERWISE.items():
        also = {"rope_scaling": {"rope_factor": 2.0}, "n_heads": {"d_head": 16}}.get(key, {})
        text = refusal(source, {key: value} | also)
        if f"model.{key}" in FREE_OF_SOURCE:
            assert text is None, (key, text)
        else:
            assert f"model.{key}: " in text and repr(value) in text, (key, text)
            assert (f"--accept-change model.{key}" in text) == (f"model.{key}" in STRETCH), (key, text)


def test_weights_of_the_same_shapes_but_of_another_model_are_refused_and_no_acceptance_helps(source):
    for name, changes in SAME_SHAPES.items():
        text = refusal(source, changes, [f"model.{key}" for key in changes])
        assert text and all(f"model.{key}: " in text for key in changes), (name, text)


def begin(world, config: str, base: str, place: str, cases: list) -> list:
    """What a run with each case's settings says, its exit code, and its log."""
    told = []
    for n, (changes, accepted) in enumerate(cases):
        words = [f"run_name=new-{n}", f"checkpoint_dir={place}", *(f"model.{key}={json.dumps(value)}" for key, value in changes.items())]
        if "seq_len" in changes:
            words += [f"train.batch_tokens={4 * changes['seq_len']}", "data.rechunk=true"]
        try:
            sit(world, config, words, init_from=base, steps_today=1, accept_change=tuple(accepted))
            said = None
        except UserError as error:
            said = [str(error), error.exit_code]
        run = Path(place, f"new-{n}")
        told.append([said, (run / "logs" / "rank-0.log").read_text() if run.exists() else None])
    return told


def ask(tmp_path: Path, source: Path, *cases: tuple[dict, list]) -> list:
    (told,) = run_ranks(begin, 1, tmp_path, str(source), str(load_config(source).run_folder), str(tmp_path / "runs"), list(cases))
    return told


def test_a_refused_start_leaves_no_folder_whatever_it_was_refused_for(tmp_path, source):
    cases = [{"norm_eps": 1.0}, {"n_heads": 2, "n_kv_heads": 1, "d_head": 16}, {"d_ff": 64}, {"positions": "learned"}, {"rope_theta": 5e5}]
    for said, log in ask(tmp_path, source, *((changes, ["model.norm_eps"]) for changes in cases)):
        assert said[1] == MISTAKE and log is None
    assert not (tmp_path / "runs").exists()


def test_rope_is_stretched_when_told_and_that_is_said(tmp_path, source):
    stretch = {"rope_scaling": "linear", "rope_factor": 2.0, "rope_original_seq_len": 8, "rope_theta": 20_000.0, "seq_len": 16}
    accepted = [f"model.{key}" for key in stretch if key != "seq_len"]
    (text, code), taken = (answer for answer in ask(tmp_path, source, (stretch, accepted[1:]), (stretch, accepted)))
    assert text[1] == MISTAKE and f"--accept-change {accepted[0]}" in text[0] and accepted[1] not in text[0] and code is None
    assert taken[0] is None
    for key, change in (("rope_scaling", "'none' → 'linear'"), ("rope_theta", "10000.0 → 20000.0"), ("seq_len", "8 → 16")):
        assert f"model.{key} {change}" in taken[1], taken[1]
