import json
from itertools import pairwise
from pathlib import Path

import pytest

from llm.batch_plan import batch_plan
from llm.config import OWNER, SECTIONS, ConfigError, DataConfig, EngineConfig, interval_steps, load_config

FLAT = dict(
    model_name="custom", n_layers=2, d_model=64, n_heads=4, d_ff=128, seq_len=32, tokenizer_path="t", data_path="d", lr=1e-3, batch_size=2
)  # fmt: skip
ROOT = Path(__file__).parent.parent


def config_file(folder, **changes) -> Path:
    path = folder / "run.json"
    path.write_text(json.dumps({k: v for k, v in (FLAT | changes).items() if v is not ...}))
    return path


def refused(folder, *overrides, **changes) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config_file(folder, **changes), list(overrides))
    return str(caught.value)


def test_a_field_name_belongs_to_one_section_so_that_flat_files_are_unambiguous():
    assert len(OWNER) == sum(len(section.model_fields) for section in SECTIONS.values())


def test_characters_that_json_escapes_in_two_halves_are_read_whole(tmp_path):
    assert load_config(config_file(tmp_path, tokenizer_path="läuft-走-🙂")).tokenizer.tokenizer_path == "läuft-走-🙂"


def test_json_may_be_indented_with_tabs_and_names_nothing_twice(tmp_path):
    path = config_file(tmp_path)
    path.write_text(json.dumps(FLAT, indent="\t"))
    assert load_config(path).model.d_model == 64
    path.write_text('{"lr": 1, "lr": 2}')
    with pytest.raises(ConfigError, match="run.json.*lr is given twice"):
        load_config(path)


@pytest.mark.parametrize("name", ["2026-11-28", "2026-02-30"])
def test_a_run_may_be_named_for_a_day(tmp_path, name):
    assert load_config(config_file(tmp_path), [f"run_name={name}"]).checkpoint.run_name == name


def test_a_flat_json_and_a_yaml_with_sections_give_the_same_run(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model: {n_layers: 2, d_model: 64, n_heads: 4, d_ff: 128, seq_len: 32}\ntokenizer: {tokenizer_path: t}\n"
        "data: {data_path: d}\ntrain: {lr: 1e-3, batch_size: 2}\n"
    )
    assert load_config(tmp_path / "run.yaml") == load_config(config_file(tmp_path))


def test_a_flat_file_with_only_a_model_name_takes_the_dimensions_of_that_preset(tmp_path):
    gone = dict.fromkeys(("n_layers", "d_model", "n_heads", "d_ff"), ...)
    cfg = load_config(config_file(tmp_path, model_name="my-llm", **gone))
    preset = load_config(preset="my-llm")
    assert (cfg.model.n_layers, cfg.model.d_model) == (preset.model.n_layers, preset.model.d_model)
    assert cfg.model.seq_len == 32  # what the file says itself stays
    assert "'my-llmm'" in refused(tmp_path, model_name="my-llmm", **gone) and "'my-llm'" in refused(tmp_path, model_name="my-llmm", **gone)


def test_the_run_is_named_for_its_file_unless_told(tmp_path):
    assert load_config(config_file(tmp_path)).run_folder == Path("checkpoints/run")
    assert load_config(config_file(tmp_path), ["run_name=other", "checkpoint_dir=/x"]).run_folder == Path("/x/other")
    assert load_config(config_file(tmp_path, run_name="other"), ["run_name=null"]).run_folder == Path("checkpoints/run")


def test_overrides_reach_nested_and_flat_names(tmp_path):
    cfg = load_config(config_file(tmp_path), ["train.lr=3e-4", "zero_stage=2", "clip_norm=null", "eval_every=25%"])
    assert (cfg.train.lr, cfg.engine.zero_stage, cfg.train.clip_norm, cfg.train.eval_every) == (3e-4, 2, None, "25%")


def test_activation_checkpointing_is_a_share_of_the_blocks_and_true_or_false_are_all_or_none(tmp_path):
    (tmp_path / "run.yaml").write_text(config_file(tmp_path, activation_checkpointing=True).read_text())
    assert load_config(tmp_path / "run.yaml").engine.recomputed_blocks(2) == [0, 1]
    for word, blocks in (("true", 4), ("false", 0), ("0.5", 2), ("1", 4), ("0", 0), ("0.26", 1), ("1e-1", 0)):
        engine = load_config(tmp_path / "run.yaml", [f"engine.activation_checkpointing={word}"]).engine
        assert len(engine.recomputed_blocks(4)) == blocks, word
    for wrong, words in ((1.5, "less than or equal to 1"), (12, "less than or equal to 1"), (-0.5, "greater than or equal to 0"), ("some", "number")):
        message = refused(tmp_path, activation_checkpointing=wrong)
        assert f"engine.activation_checkpointing is {wrong!r}, but should be" in message and words in message


def test_recomputed_blocks_are_spread_evenly_and_the_last_is_among_them_only_with_all_others():
    assert EngineConfig(activation_checkpointing=0.5).recomputed_blocks(6) == [0, 2, 4]
    for n_layers, blocks in ((n, k) for n in range(1, 130) for k in range(n + 1)):
        found = EngineConfig(activation_checkpointing=blocks / n_layers).recomputed_blocks(n_layers)
        assert len(found) == blocks and (n_layers - 1 in found) == (blocks == n_layers)
        kept = sorted(set(range(n_layers)) - set(found))
        gaps = {after - before for before, after in pairwise([-1, *kept])}  # the last kept block ends the row
        assert not gaps or max(gaps) - min(gaps) <= 1, (n_layers, blocks, found)


def test_every_problem_of_a_file_is_listed_at_once_with_its_value(tmp_path):
    message = refused(tmp_path, lr=-1, d_model=66, batch_size="many", eval_every=1.5, seq_len=...)
    for part in ("5 problems", "train.lr is -1", "d_model 66 is not divisible by n_heads 4", "'many'", "1.5", "'model.seq_len' is missing"):
        assert part in message


def test_an_unknown_key_is_refused_with_the_nearest_name(tmp_path):
    assert "'learning_rat'" in refused(tmp_path, learning_rat=1)
    assert "Did you mean 'n_kv_heads'?" in refused(tmp_path, n_kv_head=2)
    assert "Did you mean 'train.lr'?" in refused(tmp_path, "train.lrr=2")
    (tmp_path / "run.yaml").write_text("model: {n_kv_head: 3}\n")
    with pytest.raises(ConfigError, match="Did you mean 'n_kv_heads'"):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_kv_heads": 3}, "not a multiple"),
        ({"d_head": 5}, "must be even"),
        ({"grad_accum": 2, "batch_tokens": 64}, "not both"),
        ({"offload": True}, "zero_stage"),
        ({"lr": float("nan")}, "train.lr"),
        ({"zero_stage": 4}, "zero_stage is 4"),
        ({"run_name": "../../x"}, "run_name is '../../x', but should match pattern"),
        ({"device": "gpu"}, "engine.device is 'gpu', but should match pattern"),
        ({"betas": [0.9, 1.0]}, "train.betas.1 is 1.0, but should be less than 1"),
        ({"data_path": []}, "data.data_path is []: give a path, a list of paths, or a mapping"),
        ({"data_path": None}, "1 problem:\n  - data.data_path: give a path"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, changes, words):
    assert words in refused(tmp_path, **changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not valid"),
        ("- 1", "mapping"),
        ("lr: 1\nlr: 2", "twice"),
        ("lr: 1\ntrain: {lr: 2}", "train.lr is given twice"),
        ("x: !!python/object:os.system 1", "not valid"),
        ("model: 3", "section"),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_name(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="bad.yaml") as caught:
        load_config(path)
    assert words in str(caught.value)


def test_a_missing_file_and_no_file_say_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="--config"):
        load_config()


def test_the_vocabulary_is_padded_from_the_tokenizer_and_never_too_small(tmp_path):
    model = load_config(config_file(tmp_path)).model
    assert model.with_vocab(4100).vocab_size == 4224
    with pytest.raises(ConfigError, match="4,100"):
        model.model_copy(update={"vocab_size": 4099}).with_vocab(4100)


def test_accumulation_follows_from_the_global_batch_and_the_ranks(tmp_path):
    cfg = load_config(config_file(tmp_path), ["batch_tokens=512"])
    for ranks, accumulation in ((1, 8), (2, 4), (8, 1)):
        plan = batch_plan(cfg, ranks)
        assert (plan.global_rows, plan.accumulation, plan.tokens) == (16, accumulation, 512)


def test_a_batch_that_the_ranks_cannot_share_is_refused_with_what_would_fit(tmp_path):
    cfg = load_config(config_file(tmp_path), ["batch_tokens=512"])
    with pytest.raises(ConfigError, match="2 x 3 = 6 does not divide 16"):
        batch_plan(cfg, 3)
    with pytest.raises(ConfigError, match="can be 1, 2, 4"):
        batch_plan(load_config(config_file(tmp_path), ["batch_tokens=512", "batch_size=3"]), 4)


def test_the_global_batch_of_a_run_stays_when_the_ranks_change(tmp_path):
    cfg = load_config(config_file(tmp_path), ["grad_accum=3"])
    rows = batch_plan(cfg, 2).global_rows
    assert rows == 12 and batch_plan(cfg, 1, rows).accumulation == 6


def test_intervals_are_steps_or_a_share_of_the_phase():
    assert [interval_steps(i, 200) for i in (0, 7, "10%", "0.1%")] == [0, 7, 20, 1]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads_and_opens_with_its_launch_line(path):
    load_config(path)
    assert "launch/train.py" in path.read_text().split("\nmodel:")[0]


def test_datasets_whose_paths_end_alike_are_all_kept():
    paths = ["a/train", "b/train", "c/books"]
    assert DataConfig(data_path=paths).datasets == {"a/train": "a/train", "b/train": "b/train", "books": "c/books"}
