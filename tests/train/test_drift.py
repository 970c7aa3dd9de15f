import pytest
from little_run import make_run, sit
from ranks import run_ranks

from llm.checkpoint.slices import CheckpointError
from llm.config import check_config, load_config
from llm.train.drift import check_drift

BASE = {
    "model": dict(n_layers=1, d_model=8, n_heads=2, d_ff=8, seq_len=8),
    "tokenizer": {"tokenizer_path": "t"},
    "data": {"data_path": "d"},
    "train": {"lr": 1.0, "batch_size": 4},
    "checkpoint": {"run_name": "r"},
}


def config(**changes):
    """A config with `section__key` values changed."""
    tree = {section: dict(fields) for section, fields in BASE.items()}
    for path, value in changes.items():
        section, key = path.split("__")
        tree.setdefault(section, {})[key] = value
    return check_config(tree, "test")


def drift(accepted=(), **changes) -> None:
    check_drift(config().model_dump(mode="json"), config(**changes), list(accepted))


@pytest.mark.parametrize("change", [{"model__n_layers": 2}, {"model__seq_len": 16}, {"model__sliding_window": 4}, {"model__rope_factor": 2.0},
                                    {"train__seed": 1}])  # fmt: skip
def test_what_makes_it_another_model_is_refused_even_when_accepted(change):
    (path,) = change
    name = path.replace("__", ".")
    with pytest.raises(CheckpointError, match=name):
        drift(accepted=[name], **change)


def test_what_changes_the_course_is_refused_with_both_values_until_accepted(capsys):
    with pytest.raises(CheckpointError, match=r"train.lr: 1.0 in the checkpoint, 2.0 now(.|\n)*--accept-change train.lr"):
        drift(train__lr=2.0)
    drift(accepted=["train.lr"], train__lr=2.0)
    assert "accepted: train.lr" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change",
    [{"engine__zero_stage": 2}, {"train__batch_size": 2}, {"train__total_step_budget": 9}, {"checkpoint__save_every": 3}, {"engine__compile": True}],
)
def test_the_machine_and_the_intervals_are_free(change):
    drift(**change)


def accept_another_rate(world, config: str) -> None:
    sit(world, config, steps_today=1)
    sit(world, config, ["lr=0.02"], steps_today=1, accept_change=("train.lr",))


def test_a_change_that_is_accepted_is_told_by_one_rank(tmp_path):
    config = make_run(tmp_path)
    run_ranks(accept_another_rate, 2, tmp_path, str(config))
    logs = [(load_config(config).log_folder / f"rank-{rank}.log").read_text() for rank in (0, 1)]
    assert ["WARNING accepted: train.lr: 0.01 in the checkpoint, 0.02 now." in log for log in logs] == [True, False]


def test_z_loss_changes_the_course_and_not_what_the_model_is():
    with pytest.raises(CheckpointError, match="--accept-change model.z_loss"):
        drift(model__z_loss=1e-4)
    drift(accepted=["model.z_loss"], model__z_loss=1e-4)


def test_a_setting_that_the_checkpoint_is_older_than_had_its_default():
    saved = config().model_dump(mode="json")
    del saved["model"]["sliding_window"], saved["model"]["bias"], saved["train"]["clip_norm"]
    check_drift(saved, config(), [])
    with pytest.raises(CheckpointError, match="model.bias: False in the checkpoint, True now"):
        check_drift(saved, config(model__bias=True), [])
