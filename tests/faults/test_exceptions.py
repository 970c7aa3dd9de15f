"""An exception at any part of a step, on one rank or one of two: what was trained is in a checkpoint, or it is said why not."""

import pytest
from counts import TORTURE, torture
from little_run import make_run
from lives import assert_fed_once, committed, exit_note, live

from llm.config import load_config
from llm.generate.samples import write_samples

pytestmark = pytest.mark.timeout(150)
STEPS = 10
# Part of the third step: fault, the rank of two that it befalls, the checkpoint it leaves alone and with two ranks; None: none, said why.
# An update has two groups of parameters, a step four micro-batches alone and two with two ranks.
PARTS = {
    "data": ("stream:{}:3:crash", 1, 2, 2),
    "digest": ("step:{}:3:crash", 1, 2, 2),
    "forward": ("micro_batch:{}:9:crash", 1, 2, None),
    "loss": ("loss:{}:9:crash", 1, 2, None),
    "backward": ("backward:{}:9:crash", 1, 2, None),
    "reduction": ("reduction:{}:3:crash", 1, 2, None),
    "optimizer": ("optimizer:{}:3:crash", 1, 2, None),
    "half of an update": ("group:{}:6:crash", 1, None, None),
    "after the update": ("updated:{}:3:crash", 1, None, None),
    "validation": ("evaluate:{}:1:crash", 1, 3, 3),
    "metrics": ("metrics:{}:3:crash", 0, 3, 3),
    "TensorBoard": ("board:{}:20:crash", 0, 2, 2),
    "report of validation": ("validated:{}:1:crash", 0, 3, 3),
    "save": ("manifest_of:{}:1:crash", 1, 5, None),
}
SAMPLE = [("data", 2), ("loss", 2), ("half of an update", 1)]


def fault_of(part: str, ranks: int) -> str:
    fault, rank, *_ = PARTS[part]
    nth_with_two = {"micro_batch": 5, "loss": 5, "backward": 5}
    point, _, nth, kind = fault.split(":")
    nth = nth_with_two.get(point, nth) if ranks == 2 else nth
    return f"{point}:{rank if ranks == 2 else 0}:{nth}:{kind}"


@pytest.mark.parametrize(
    ("part", "ranks"), [(p, r) for p in PARTS for r in (1, 2)] if TORTURE else SAMPLE
)
def test_an_exception_leaves_a_checkpoint_or_says_why_not_and_nothing_is_lost(
    tmp_path, part, ranks
):
    config = make_run(
        tmp_path,
        eval_every=3,
        save_every=5 if part == "save" else 0,
        tensorboard=part == "TensorBoard",
    )
    expected = PARTS[part][1 + ranks]
    life = live(config, ranks, fault=fault_of(part, ranks), retry_anyway=False)
    assert life.codes == [1] * ranks, life.output
    log = load_config(config).log_folder / f"rank-{PARTS[part][1] if ranks == 2 else 0}.log"
    assert "ValueError: made for the test\n" in log.read_text()  # the traceback's last line
    assert committed(config) == ([] if expected is None else [expected]), life.output
    assert life.output.count("Nothing could be saved") == (expected is None)
    assert exit_note(config)["code"] == 1 and "made for the test" in exit_note(config)["why"]
    assert live(config, ranks, "eval_every=0", "save_every=0").codes == [0] * ranks
    assert_fed_once(config, STEPS)


@torture
def test_a_sample_text_that_fails_on_rank_0_ends_nothing(tmp_path):
    config = make_run(tmp_path, eval_every=3, sample_prompts=["w1 w2"], sample_tokens=2)
    life = live(config, 2, fault="sample:0:1:crash", write_samples=write_samples)
    assert life.codes == [0, 0] and committed(config) == [STEPS], life.output
    assert "ValueError: made for the test" in life.output
