import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from counting_shards import counting_shards, write_counting

from llm.data import phase as phase_module
from llm.data.ledger import Ledger, LedgerError, new_shards
from llm.data.manifest import find_shards
from llm.data.phase import Phase
from llm.data.seen import seen_by_unit, seen_view

SIZES = [100, 33, 34, 1, 57]
L = 8


@pytest.fixture
def shards(tmp_path):
    return counting_shards(tmp_path, SIZES)


def plan(shards, name="p1", epochs=2, **changes) -> Phase:
    return Phase.plan(**{"name": name, "seed": 3, "epochs": epochs, "seq_len": L, "shards": shards, **changes})


def counted_by_walking(phase: Phase, start: int, stop: int) -> list[int]:
    """Draws of each shard, the slow and plain way."""
    counts = [0] * len(phase.shards)
    for draw in range(start, stop):
        sample = phase.samples_at(np.array([draw])).item()
        counts[int(np.searchsorted(phase.shard_ends, sample, side="right"))] += 1
    return counts


# --- phases -------------------------------------------------------------------------------------------------------------


def test_a_phase_is_planned_by_content_and_never_by_name_or_order(shards):
    assert plan(shards[::-1]) == plan(shards)
    ids = [shard.shard_id for shard in plan(shards).shards]
    assert ids == sorted(ids)


def test_the_same_shard_twice_in_a_phase_is_our_own_mistake(shards):
    with pytest.raises(AssertionError):
        plan([*shards, shards[0]])


def test_validation_shards_are_never_planned(tmp_path):
    shards = find_shards([write_counting(tmp_path, "x", 20, role="val").path], "val")
    with pytest.raises(AssertionError, match="validation"):
        plan(shards)


def test_draws_of_each_shard_are_counted_exactly(shards, monkeypatch):
    monkeypatch.setattr(phase_module, "COUNT_DRAWS", 5)  # so that the count is put together from many pieces
    phase = plan(shards, epochs=4)
    n = phase.samples
    for start, stop in [(0, 0), (0, 1), (3, 17), (0, n), (5, n + 5), (n - 1, 3 * n + 2), (n, 2 * n), (0, phase.total)]:
        assert phase.draw_counts(start, stop).tolist() == counted_by_walking(phase, start, stop), (start, stop)


def test_the_inverse_finds_the_same_samples_as_walking_through_the_draws(shards):
    for consumed in (0, 1, 7, 20, 28, 29, 40):
        phase = replace(plan(shards), consumed=consumed)
        walked = set(phase.samples_at(np.arange(consumed)).tolist())
        found = np.concatenate([phase.seen_samples(index) for index in range(len(phase.shards))])
        assert set(np.flatnonzero(found).tolist()) == walked


# --- the history ----------------------------------------------------------------------------------------------------------


def test_a_phase_opens_advances_and_closes(shards):
    ledger = Ledger()
    assert ledger.open_phase is None
    ledger = ledger.open(plan(shards, epochs=1))
    total = ledger.open_phase.total
    ledger = ledger.advance(4, step=11).advance(4, step=12)
    assert (ledger.open_phase.consumed, ledger.open_phase.first_step, ledger.open_phase.last_step) == (8, 11, 12)
    ledger = ledger.advance(total - 8, step=13)
    assert ledger.open_phase is None
    assert ledger.phases[0].is_done and ledger.phases[0].last_step == 13


def test_advancing_gives_a_new_ledger_and_leaves_the_old_one(shards):
    before = Ledger().open(plan(shards))
    saved = copy.deepcopy(before)
    before.advance(5, step=1)
    assert before == saved


def test_no_more_samples_are_taken_than_there_are(shards):
    ledger = Ledger().open(plan(shards))
    with pytest.raises(AssertionError):
        ledger.advance(ledger.open_phase.total + 1, step=1)
    with pytest.raises(AssertionError):
        Ledger().advance(1, step=1)


def test_an_unfinished_phase_is_not_left_by_accident(shards):
    ledger = Ledger().open(plan(shards[:2], epochs=1)).advance(5, step=1)
    with pytest.raises(LedgerError, match=r"phase p1 still has 12 samples.*before p2"):
        ledger.open(plan(shards[2:], "p2"))


def test_a_phase_name_is_used_once(shards):
    ledger = Ledger().open(plan(shards, epochs=1))
    with pytest.raises(LedgerError, match="phase named p1 already"):
        ledger.advance(ledger.open_phase.total, step=1).open(plan(shards))


def test_a_phase_without_targets_is_refused(shards):
    with pytest.raises(LedgerError, match="nothing to predict"):
        Ledger().open(plan(shards[3:4]))


# --- saved and read back ----------------------------------------------------------------------------------------------------


def some_ledger(shards) -> Ledger:
    ledger = Ledger().open(plan(shards[:2], epochs=1, dataset="books")).advance(17, step=5)
    return ledger.open(plan(shards[2:], "p2")).advance(3, step=6)


def test_a_ledger_reads_back_what_was_saved(shards):
    ledger = some_ledger(shards)
    again = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
    assert again == ledger
    assert again.advance(2, step=7) == ledger.advance(2, step=7)
    assert Ledger.from_json(Ledger().to_json()) == Ledger()


def put(value, path, new):
    for key in path[:-1]:
        value = value[key]
    if new is KeyError:
        del value[path[-1]]
    else:
        value[path[-1]] = new


PHASE, SHARD = ("phases", 1), ("phases", 1, "shards", 0)


@pytest.mark.parametrize(("path", "new", "message"), [
    (("version",), 3, "version 3, this program reads 2"),
    (("version",), KeyError, "version"),
    (("extra",), 1, "extra"),
    (("phases",), {}, "phases"),
    ((*PHASE, "consumed"), KeyError, r"phases\.1\.consumed"),
    ((*PHASE, "consumed"), "3", r"phases\.1\.consumed"),
    ((*PHASE, "consumed"), 3.0, r"phases\.1\.consumed"),
    ((*PHASE, "consumed"), True, r"phases\.1\.consumed"),
    ((*PHASE, "consumed"), -1, r"phases\.1\.consumed"),
    ((*PHASE, "consumed"), 1000, r"p2: 1,000 samples consumed of 24"),
    ((*PHASE, "epochs"), 0, r"phases\.1\.epochs"),
    ((*PHASE, "first_step"), KeyError, r"phases\.1\.first_step"),
    ((*PHASE, "weight"), 1, r"phases\.1\.weight"),
    ((*PHASE, "name"), "p1", "share a name: p1, p1"),
    ((*PHASE, "algorithm"), "other/v2", "p2: ordered by other/v2, this program has feistel"),
    ((*PHASE, "shards"), [], "p2: its shares do not fit its 0 shards"),
    ((*PHASE, "shares"), [], "p2: its shares do not fit its 3 shards"),
    ((*PHASE, "shares", 0, "n_shards"), 2, "p2: its shares do not fit its 3 shards"),
    ((*PHASE, "shares", 0, "is_replay"), True, "p2: its shares do not fit"),
    ((*PHASE, "shares", 0, "weight"), 0, r"phases\.1\.shares\.0\.weight"),
    ((*PHASE, "seq_len"), 9, r"p2: shard text-.* cannot have"),
    ((*SHARD, "shard_id"), "f" * 64, "p2: its shards must be sorted"),
    ((*SHARD, "n_samples"), 9, r"p2: shard text-.* cannot have 9 samples"),
    ((*SHARD, "n_tokens"), KeyError, r"phases\.1\.shards\.0\.n_tokens"),
    ((*SHARD, "unit_ids"), [1], r"phases\.1\.shards\.0\.unit_ids\.0"),
    ((*SHARD, "note"), "x", r"phases\.1\.shards\.0\.note"),
])
def test_anything_else_is_refused_with_its_place(shards, path, new, message):
    value = json.loads(json.dumps(some_ledger(shards).to_json()))
    put(value, path, new)
    with pytest.raises(LedgerError, match=rf"ledger: .*{message}"):
        Ledger.from_json(value)


# --- what is new --------------------------------------------------------------------------------------------------------------


def test_shards_of_no_phase_are_new_and_those_of_any_are_not(shards):
    assert new_shards(Ledger(), shards) == shards
    ledger = Ledger().open(plan(shards[1:3], epochs=1))
    assert new_shards(ledger, shards) == [shards[0], *shards[3:]]
    assert ledger.units_held() == {"unit-100-33", "unit-133-34"}
    done = ledger.advance(ledger.open_phase.total, step=1)
    assert new_shards(done.open(plan(shards[3:], "p2")), shards) == shards[:1]


def test_renamed_and_copied_shards_are_not_new(tmp_path):
    ledger = Ledger().open(plan(counting_shards(tmp_path / "a", [40, 50])))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for path in list((tmp_path / "b").iterdir()):
        path.rename(path.with_name(path.name.replace("text", "other")))
    copies = find_shards(sorted((tmp_path / "b").glob("*.bin")), "train")
    assert [shard.meta.name for shard in copies] == ["other-00000", "other-00001"]
    assert new_shards(ledger, copies) == []


def test_the_same_text_tokenized_again_is_not_new(tmp_path):
    units = [{"unit_id": "u1", "bytes": 1}, {"unit_id": "u2", "bytes": 1}]
    both = find_shards([write_counting(tmp_path, "both", 50, units=units).path], "train")
    other = find_shards([write_counting(tmp_path, "second-half", 25, first=25, units=units[1:]).path], "train")
    assert new_shards(Ledger().open(plan(both)), other) == []
    assert new_shards(Ledger(), both + other) == both


def test_the_same_ids_under_other_units_are_not_new(tmp_path):
    text = find_shards([write_counting(tmp_path, "text", 50).path], "train")
    imported = find_shards([write_counting(tmp_path, "imported", 50, units=[{"unit_id": "ids", "bytes": 0}]).path], "train")
    assert new_shards(Ledger().open(plan(text)), imported) == []


def test_a_shard_of_old_and_new_text_is_refused_by_name(tmp_path):
    old = find_shards([write_counting(tmp_path, "old", 50, units=[{"unit_id": "u1", "bytes": 1}]).path], "train")
    units = [{"unit_id": unit_id, "bytes": 1} for unit_id in ("u1", "u2", "u3")]
    mixed = find_shards([write_counting(tmp_path, "mixed", 90, units=units).path], "train")
    with pytest.raises(LedgerError, match=r"mixed\.meta\.json: 1 of its 3 units of text are known.*Give the new text in a file of its own"):
        new_shards(Ledger().open(plan(old)), mixed)


# --- what was seen --------------------------------------------------------------------------------------------------------------


def test_seen_is_the_exact_fraction_of_a_shards_samples(shards):
    ledger = Ledger().open(plan(shards))
    phase = ledger.open_phase
    for consumed in (0, 1, 7, phase.samples - 1, phase.samples, phase.total):
        now = ledger.advance(consumed, step=1)
        for index, shard in enumerate(phase.shards):
            walked = counted_by_walking(phase, 0, min(consumed, phase.samples))[index]
            assert seen_by_unit(now)[shard.unit_ids[0]] == (walked / shard.n_samples if shard.n_samples else 0.0)
    assert "no such unit" not in seen_by_unit(ledger)


def test_samples_seen_in_several_phases_count_once(shards):
    both = Ledger(tuple(replace(plan(shards, name), consumed=12) for name in ("p1", "p2")))
    union = np.unique(np.concatenate([phase.samples_at(np.arange(12)) for phase in both.phases]))
    assert 12 < len(union) < 24
    ends = both.phases[0].shard_ends
    by_shard = np.bincount(np.searchsorted(ends, union, side="right"), minlength=5)
    for shard, count in zip(both.phases[0].shards, by_shard, strict=True):
        assert seen_by_unit(both)[shard.unit_ids[0]] == count / max(1, shard.n_samples)


def test_the_view_tells_files_percentages_and_steps(shards):
    view = seen_view(some_ledger(shards))
    done, running = view["phases"]
    assert (done["state"], done["percent_done"], done["dataset"]) == ("done", 100.0, "books")
    assert (done["first_step"], done["last_step"]) == (5, 5)
    assert sorted((f["file"], f["percent_seen"], f["tokens"]) for f in done["files"]) == [
        ("text-00000.bin", 100.0, 100), ("text-00001.bin", 100.0, 33),
    ]
    assert (running["state"], running["percent_done"], running["samples_consumed"]) == ("open", 12.5, 3)
    assert sum(f["samples_drawn"] for f in running["files"]) == 3
    json.dumps(view)


def test_percentages_never_round_up_to_all(tmp_path):
    shards = counting_shards(tmp_path, [60_002])
    ledger = Ledger().open(plan(shards, epochs=1, seq_len=1)).advance(60_000, step=1)
    assert seen_view(ledger)["phases"][0]["percent_done"] == 99.99
    assert seen_view(ledger)["phases"][0]["files"][0]["percent_seen"] == 99.99


def test_a_view_that_goes_on_from_an_earlier_one_equals_a_recount(shards):
    ledger, view = Ledger().open(plan(shards[:3])), None
    for step in range(1, 100):
        phase = ledger.open_phase
        ledger = ledger.advance(min(7, phase.total - phase.consumed), step)
        view = seen_view(ledger, view)
        assert view == seen_view(ledger)
        if ledger.open_phase is None:
            break
    ledger = ledger.open(plan(shards[3:], "p2")).advance(5, step)
    assert seen_view(ledger, view) == seen_view(ledger)


def test_a_view_of_another_plan_or_of_a_later_moment_is_not_gone_on_from(shards):
    ledger = Ledger().open(plan(shards))
    now = ledger.advance(9, step=1)
    other_shards, other_seed = Ledger().open(plan(shards[:3])), Ledger().open(plan(shards, seed=4))
    for other in (other_shards.advance(5, step=1), other_seed.advance(5, step=1), ledger.advance(20, step=1)):
        assert seen_view(now, seen_view(other)) == seen_view(now)


# --- skipped samples ----------------------------------------------------------------------------------------------------


def test_a_refused_update_is_booked_with_its_draws_step_and_reason_and_survives_the_round_trip(shards):
    ledger = Ledger().open(plan(shards)).advance(4, 1).advance(3, 2, "the loss was nan").advance(4, 3)
    (skipped,) = ledger.open_phase.skipped
    assert (skipped.start, skipped.stop, skipped.step, skipped.reason) == (4, 7, 2, "the loss was nan")
    assert Ledger.from_json(json.loads(json.dumps(ledger.to_json()))) == ledger
    assert seen_view(ledger)["phases"][0]["samples_skipped"] == [{"start": 4, "stop": 7, "step": 2, "reason": "the loss was nan"}]
    forged = ledger.to_json()
    forged["phases"][0]["skipped"][0]["stop"] = 99
    with pytest.raises(LedgerError, match="skipped"):
        Ledger.from_json(forged)
