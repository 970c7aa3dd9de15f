"""What befalls one rank alone ends all of them, with one exit code and one message, before anything is written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from counts import TORTURE
from folders import Ranks, host
from little_run import add_shard, make_run

pytestmark = pytest.mark.timeout(120)
LIMIT_S = 60
WORDS = ["--config", "little.json", "--steps-today", "2"]


def two_hosts(root: Path, **changes) -> None:
    """Each host has its own config, tokenizer and data; all share the folder of checkpoints."""
    made = make_run(root / "made", checkpoint_dir=str(root / "shared"))
    config = (
        json.loads(made.read_text())
        | {"tokenizer_path": "tokenizer", "data_path": "data"}
        | changes
    )
    made.write_text(json.dumps(config))
    for rank in (0, 1):
        shutil.copytree(root / "made", host(root, rank))


def ds_config(root: Path, rank: int, **more) -> None:
    content = {"zero_optimization": {"stage": 2}} | more
    (host(root, rank) / "ds.json").write_text(json.dumps(content))


def ds_contradicts_on_both(root: Path) -> None:
    two_hosts(root, zero_stage=2, ds_config="ds.json")
    for rank in (0, 1):
        ds_config(root, rank, gradient_clipping=0.123)


def ds_on_rank_0_alone(root: Path) -> None:
    two_hosts(root, zero_stage=2, ds_config="ds.json")
    ds_config(root, 0)


def ds_on_rank_1_alone(root: Path) -> None:
    two_hosts(root, zero_stage=2, ds_config="ds.json")
    ds_config(root, 1)


def ds_differs(root: Path) -> None:
    ds_on_rank_0_alone(root)
    ds_config(root, 1, steps_per_print=7)


def ds_misspelt_on_rank_1(root: Path) -> None:
    ds_on_rank_0_alone(root)
    (host(root, 1) / "ds.json").write_text("{")


def tokenizer_missing(root: Path) -> None:
    two_hosts(root)
    shutil.rmtree(host(root, 1) / "tokenizer")


def tokenizer_differs(root: Path) -> None:
    two_hosts(root)
    path = host(root, 1) / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"w7":', '"seven":'))


def config_edited(root: Path, **changes) -> None:
    two_hosts(root)
    path = host(root, 1) / "little.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tasks_on_rank_1_alone(root: Path) -> None:
    config_edited(root, tasks=["perplexity"], texts=["little.json"])


def preset_on_rank_0_alone(root: Path) -> list:
    two_hosts(root)
    (host(root, 0) / "configs").mkdir()
    shutil.copy(host(root, 0) / "little.json", host(root, 0) / "configs" / "mine.json")
    return [["--model", "mine"]] * 2


def validation_shard_missing(root: Path) -> None:
    two_hosts(root)
    for path in (host(root, 1) / "data").glob("val-*"):
        path.unlink()


def validation_shard_cut(root: Path) -> None:
    two_hosts(root)
    (path,) = (host(root, 1) / "data").glob("val-*.bin")
    os.truncate(path, path.stat().st_size // 2)


def texts_differ(root: Path) -> None:
    two_hosts(root, tasks=["perplexity"], texts=["text.txt"])
    for rank in (0, 1):
        (host(root, rank) / "text.txt").write_text(f"w1 w2 w{rank}")


def template_differs(root: Path) -> None:
    two_hosts(root)
    for rank in (0, 1):
        shutil.rmtree(host(root, rank) / "data")
        template = {"name": "one" if rank == 0 else "other"}
        add_shard(
            host(root, rank) / "data", host(root, rank) / "tokenizer", 0, 150, template=template
        )


def logs_unwritable(root: Path) -> None:
    two_hosts(root, out_dir="logs")
    (host(root, 1) / "logs").write_text("a file")


def flag_on_rank_1_alone(*flag: str) -> Callable:
    def prepare(root: Path) -> list:
        two_hosts(root)
        return [WORDS, [*WORDS, *flag]]

    return prepare


def weights_differ(root: Path) -> list:
    two_hosts(root)
    for rank in (0, 1):
        alone = root / f"alone-{rank}"
        alone.mkdir()
        (alone / "host-0").symlink_to(host(root, rank))
        assert Ranks(alone, [[*WORDS, "checkpoint_dir=first", f"seed={rank}"]]).ended(
            LIMIT_S
        ).codes == [0]
    return [[*WORDS, "run_name=new", "--init-from", "first/little"]] * 2


def no_memory_for_the_model(rank: int, root: Path) -> None:
    from llm.train import start

    def fail(*args):
        raise MemoryError("made for the test")

    if rank == 1:
        start.build_model = fail


def in_another_collective(rank: int, root: Path) -> None:
    """Rank 1 fails while rank 0 waits in a collective of a library, of a group that rank 1 never joins again."""
    import torch.distributed as dist

    from llm.train import run

    def part(found, *args):
        if rank == 1:
            found.world.together(lambda: 1 / 0)
        dist.barrier()

    run._prepare = part


def crashes(before: Callable) -> Callable:
    def prepare(root: Path) -> tuple:
        two_hosts(root)
        return [WORDS] * 2, before

    return prepare


CASES = {  # what, and the code of all ranks
    "a DeepSpeed JSON that contradicts the run, everywhere": (ds_contradicts_on_both, 2),
    "a DeepSpeed JSON on rank 0's host alone": (ds_on_rank_0_alone, 2),
    "a DeepSpeed JSON on rank 1's host alone": (ds_on_rank_1_alone, 2),
    "another DeepSpeed JSON": (ds_differs, 2),
    "a DeepSpeed JSON that is none": (ds_misspelt_on_rank_1, 2),
    "no tokenizer": (tokenizer_missing, 2),
    "another tokenizer": (tokenizer_differs, 2),
    "an edited config": (lambda root: config_edited(root, lr=0.5), 2),
    "tasks to measure": (tasks_on_rank_1_alone, 2),
    "a preset on rank 0's host alone": (preset_on_rank_0_alone, 2),
    "no validation shard": (validation_shard_missing, 2),
    "half a validation shard": (validation_shard_cut, 2),
    "another text to measure": (texts_differ, 2),
    "another template": (template_differs, 2),
    "no place for its log": (logs_unwritable, 2),
    "--fresh": (flag_on_rank_1_alone("--fresh"), 2),
    "--anneal": (flag_on_rank_1_alone("--anneal", "100"), 2),
    "--accept-change": (flag_on_rank_1_alone("--accept-change", "train.lr"), 2),
    "other weights to start from": (weights_differ, 2),
    "no memory": (crashes(no_memory_for_the_model), 1),
    "a failure while others wait elsewhere": (crashes(in_another_collective), 1),
}
SAMPLE = [
    "a DeepSpeed JSON on rank 0's host alone",
    "tasks to measure",
    "no place for its log",
    "no memory",
]


@pytest.mark.parametrize("case", CASES if TORTURE else SAMPLE)
def test_what_befalls_one_rank_ends_all_with_one_code_and_one_message(tmp_path, case):
    prepare, code = CASES[case]
    prepared = prepare(tmp_path)
    words, before = prepared if isinstance(prepared, tuple) else (prepared or [WORDS] * 2, None)
    ended = Ranks(tmp_path, words, before).ended(LIMIT_S)
    assert ended.codes == [code] * 2, ended.output
    assert ended.output.count("error: ") == 1, ended.output
    assert ended.output.count("Traceback") == (code == 1)
    assert not list((tmp_path / "shared").rglob("step-*"))
