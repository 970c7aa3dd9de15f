"""engine.precision: auto is resolved once, by what rank 0 measures, and kept with the run."""

import logging

import pytest
from little_run import make_run, newest_manifest, sit
from ranks import run_ranks

from llm.engine import precision
from llm.engine.precision import Rates
from llm.generate.load import choose_dtype, dtype_name
from llm.log import log

FAST = {"fp32": 100e9, "bf16": 200e9}  # AVX-512 with bf16
ALIKE = {"fp32": 100e9, "bf16": 119e9}  # below the 1.2 times that bf16 has to be faster
EMULATED = {"fp32": 100e9, "bf16": 3e9}  # AVX2
MISSING = {"fp32": 100e9, "bf16": 0.0}


@pytest.mark.parametrize(
    ("rates", "chosen"), [(FAST, "bf16"), (ALIKE, "fp32"), (EMULATED, "fp32"), (MISSING, "fp32")]
)
def test_auto_is_bf16_only_where_it_is_a_fifth_faster(rates, chosen):
    assert Rates(**rates).fastest == chosen


def sit_where(world, config: str, rates_of_ranks: list[dict], sessions: list[dict]) -> list[str]:
    """Sessions on machines that multiply at these rates; what each logs as a warning or about precision."""
    heard, handler = [], logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    log.addHandler(handler)
    precision.measure_rates = lambda device: Rates(**rates_of_ranks[world.rank])
    found = []
    for session in sessions:
        heard.clear()
        options = {"steps_today": 2, "accept_change": tuple(session.get("accept", ()))}
        sit(world, config, session["words"], **options)
        found.append("\n".join(line for line in heard if "GFLOP/s" in line))
    return found


def on_ranks(tmp_path, config, rates_of_ranks: list[dict], *sessions: dict) -> list[str]:
    """What rank 0 logs of its precision in each session."""
    ranks = len(rates_of_ranks)
    return run_ranks(sit_where, ranks, tmp_path, str(config), rates_of_ranks, list(sessions))[0]


def precision_of(config) -> str:
    return newest_manifest(config).config["engine"]["precision"]


AUTO = {"words": ["precision=auto"]}


@pytest.mark.parametrize(("rates", "chosen"), [(FAST, "bf16"), (EMULATED, "fp32")])
def test_a_new_run_takes_what_rank_0_measures_and_the_manifest_says_which(tmp_path, rates, chosen):
    config = make_run(tmp_path)
    other = EMULATED if rates is FAST else FAST
    (told,) = on_ranks(tmp_path, config, [rates, other], AUTO)
    assert precision_of(config) == chosen
    assert f"auto is {chosen}" in told and f"{rates['bf16'] / 1e9:.0f} GFLOP/s in bf16" in told


def test_a_resumed_run_keeps_its_precision_and_says_how_slow_it_is_and_what_changes_it(tmp_path):
    config = make_run(tmp_path)
    on_ranks(tmp_path, config, [FAST], AUTO)
    change = {"words": ["precision=fp32"], "accept": ["engine.precision"]}
    kept, changed, after = on_ranks(tmp_path, config, [EMULATED], AUTO, change, AUTO)
    assert "33.3 times as fast" in kept
    assert "engine.precision=fp32 --accept-change engine.precision" in kept
    assert (changed, after) == ("", "") and precision_of(config) == "fp32"


def test_a_run_in_fp32_is_told_of_the_machine_that_is_faster_in_bf16(tmp_path):
    config = make_run(tmp_path)
    on_ranks(tmp_path, config, [EMULATED], AUTO)
    (told,) = on_ranks(tmp_path, config, [FAST], AUTO)
    assert "2 times as fast" in told and precision_of(config) == "fp32"


def test_a_machine_that_is_about_as_fast_in_both_rings_no_alarm_on_resume(tmp_path):
    config = make_run(tmp_path)
    on_ranks(tmp_path, config, [FAST], AUTO)
    assert on_ranks(tmp_path, config, [ALIKE], AUTO, AUTO) == ["", ""]
    assert precision_of(config) == "bf16"


@pytest.mark.parametrize(
    ("rates", "given", "factor"),
    [
        (EMULATED, "bf16", "33.3 times"),
        (ALIKE, "bf16", ""),
        (FAST, "bf16", ""),
        (FAST, "fp32", ""),
    ],
)
def test_a_precision_that_is_asked_for_is_taken_and_a_slow_bf16_warned_of(tmp_path, rates, given, factor):
    config = make_run(tmp_path)
    (told,) = on_ranks(tmp_path, config, [rates], {"words": [f"precision={given}"]})
    assert precision_of(config) == given
    assert factor in told if factor else told == ""


@pytest.mark.parametrize(("rates", "chosen"), [(FAST, "bf16"), (EMULATED, "fp32")])
def test_generation_reads_weights_in_what_is_faster_here(monkeypatch, rates, chosen):
    monkeypatch.setattr("llm.generate.load.measure_rates", lambda device: Rates(**rates))
    assert dtype_name(choose_dtype("auto", "cpu")) == chosen
    assert dtype_name(choose_dtype("fp32", "cpu")) == "fp32"


def test_both_products_are_timed_on_this_machine():
    rates = precision.measure_rates("cpu")
    assert 1e8 < rates.bf16 < 1e15 and 1e9 < rates.fp32 < 1e15
