"""Take out one safeguard at a time, in a copy, and see that a test fails: python tests/faults/mutations.py [NAME ...]

Exit code 1 when a change goes unnoticed, or when the text to change is not found any more: then bring this list up to date.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAVING = "tests/checkpoint/test_save_and_resume.py"


@dataclass(frozen=True)
class Mutation:
    file: str
    old: str
    new: str
    tests: str
    """What to run: a file or folder, and -k words."""


MUTATIONS = {
    "the vote of all ranks": Mutation(
        "llm/checkpoint/saver.py",
        "        failures = [failure for failure, *_ in votes if failure is not None]",
        "        failures = [outcome[0]] if outcome[0] is not None and self.world.rank == 0 else []",
        f"{SAVING} -k one_rank_that_cannot_write",
    ),
    "the hash of each file": Mutation(
        "llm/checkpoint/resume.py",
        "                if sha256_of(handle) != record.sha256:",
        "                if False:",
        "tests/faults/test_damage.py -k flipped_anywhere_in_a_checkpoint",
    ),
    "reading back what was written": Mutation(
        "llm/checkpoint/direct.py",
        "        if not np.array_equal(ours, bits[at : at + len(ours)]):",
        "        if False:",
        "tests/faults/test_environment.py -k every_second_save",
    ),
    "the rename": Mutation(
        "llm/checkpoint/folder.py",
        "    temporary.rename(final)",
        "    shutil.copytree(temporary, final)",
        f"{SAVING} -k killed_while",
    ),
    "the barrier before the manifest": Mutation(
        "llm/checkpoint/saver.py",
        "        votes = self._vote(self._written)\n",
        "        votes = [self._written[1]] * self.world.size\n",
        f"{SAVING} -k opens_on_another_number",
    ),
    "the wait for the writing thread": Mutation(
        "llm/checkpoint/saver.py",
        "        self.wait()\n        votes",
        "        votes",
        "tests/checkpoint/test_async.py -k training_on_during",
    ),
    "the commit that waits for every rank's files": Mutation(
        "llm/train/loop.py",
        "        if ranks_written == world.size:",
        "        if ranks_written:",
        "tests/train/test_saving.py -k steps_are_taken_while_a_rank_writes",
    ),
    "the lock": Mutation(
        "llm/checkpoint/lock.py",
        "            if held or before:\n                self._judge(before, held, steal)",
        "            pass",
        "tests/faults/test_environment.py -k two_jobs",
    ),
    "the look at the lock before the rename": Mutation(
        "llm/checkpoint/folder.py",
        "    check()\n",
        "",
        "tests/train/test_saving.py -k lost_its_lock",
    ),
    "the fsync of the shards": Mutation(
        "llm/checkpoint/direct.py",
        "            os.fsync(handle)\n",
        "",
        "tests/checkpoint/test_power_cut.py -k at_any_moment",
    ),
    "the fsync of the folder that the rename is in": Mutation(
        "llm/checkpoint/folder.py",
        "    durable.fsync_folder(final.parent)\n",
        "",
        "tests/checkpoint/test_power_cut.py -k at_any_moment",
    ),
    "the state hash after loading": Mutation(
        "llm/train/start.py",
        "    if loaded != checkpoint.manifest.state_hash:",
        "    if False:",
        "tests/train/test_promises.py -k differs_from_what_was_saved",
    ),
    "the Adam step in a checkpoint": Mutation(
        "llm/train/start.py",
        "    engine.load_state(checkpoint.manifest.engine)\n",
        "",
        "tests/faults/test_kills.py -k at_each_point",
    ),
    "the position in the data": Mutation(
        "llm/train/keeper.py",
        "            ledger=at.ledger.to_json(),",
        "            ledger=__import__('dataclasses').replace(at.ledger, phases=tuple(\n"
        "                __import__('dataclasses').replace(p, consumed=max(4, p.consumed - 4)) for p in at.ledger.phases)).to_json(),",
        "tests/faults/test_kills.py -k at_random_times_until_it_is_done",
    ),
    "slices in their place": Mutation(
        "llm/engine/deepspeed_engine.py",
        "yield names[id(p)], flat, begin - first, begin - position, stop - begin",
        "yield names[id(p)], flat, begin - first, begin - position + (begin > position), stop - begin",
        "tests/faults/test_topology.py -k ranks_and_stages",
    ),
    "what cannot be judged stays where it is": Mutation(
        "llm/checkpoint/resume.py",
        "        if not finding.is_damage:",
        "        if False:",
        "tests/checkpoint/test_judging.py",
    ),
    "the table of what holds of every checkpoint": Mutation(
        "llm/checkpoint/resume.py",
        "            check_invariants(path, manifest, rules)\n",
        "",
        "tests/train/test_invariants.py",
    ),
    "the comparison of a base's settings with the model's": Mutation(
        "llm/train/start.py",
        "    world.on_rank_0(lambda: check_source(source.folder, saved, cfg, accepted))",
        "    pass",
        "tests/train/test_init_from.py",
    ),
    "the precision that a run keeps": Mutation(
        "llm/engine/precision.py",
        '    precision = saved if given == "auto" else given',
        "    precision = measure_rates(world.device).fastest",
        "tests/train/test_precision.py",
    ),
    "the bases of a run in its checkpoints": Mutation(
        "llm/train/keeper.py",
        "            bases=self.bases,",
        "            bases=None,",
        "tests/train/test_lineage.py",
    ),
    "the ledger's part of a file of ids that has grown": Mutation(
        "llm/train/start.py",
        "    train_shards, refused = settle_imports(train_shards, position.ledger, world)",
        "    refused = []",
        "tests/train/test_grown_ids.py -k exactly_once",
    ),
    "the comparison of files between ranks": Mutation(
        "llm/dist.py",
        "            if digest != of_ranks[0][0]:",
        "            if False:",
        "tests/faults/test_one_rank_alone.py",
    ),
    "a file beside the old one until it is whole": Mutation(
        "llm/durable.py",
        "        yield fresh\n        _fsync(fresh)",
        "        yield path\n        shutil.copy(path, fresh)",
        "tests/faults/test_whole_files.py",
    ),
    "the end of page-locking before its memory is given back": Mutation(
        "llm/checkpoint/staging.py",
        "    error = int(torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr()))",
        "    error = 0",
        "tests/checkpoint/test_staging.py",
    ),
    "the thread that hears a signal in native code": Mutation(
        "llm/train/faults.py",
        "signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)",
        "-1",
        "tests/faults/test_signals.py -k native_code",
    ),
}


def main() -> int:
    wanted = sys.argv[1:] or list(MUTATIONS)
    unknown = set(wanted) - set(MUTATIONS)
    assert not unknown, f"no such mutation: {sorted(unknown)}. There are {list(MUTATIONS)}"
    survived = 0
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "copy"
        shutil.copytree(ROOT, copy, ignore=_ignored)
        for name in wanted:
            survived += not _is_caught(copy, name, MUTATIONS[name])
    return int(survived > 0)


def _ignored(folder: str, names: list[str]) -> list[str]:
    top = {"data", "checkpoints", ".venv", "build"} if Path(folder) == ROOT else set()
    return [name for name in names if name in top | {".git", "__pycache__", ".pytest_cache", ".ruff_cache"}]


def _is_caught(copy: Path, name: str, mutation: Mutation) -> bool:
    path = copy / mutation.file
    whole = path.read_text()
    if whole.count(mutation.old) != 1:
        print(f"GONE      {name}: {mutation.file} holds the text {whole.count(mutation.old)} times, not once", flush=True)
        return False
    path.write_text(whole.replace(mutation.old, mutation.new))
    started_at = time.monotonic()
    try:
        code, output = _test(copy, mutation.tests)
    finally:
        path.write_text(whole)
    verdict = {0: "SURVIVED", 1: "CAUGHT"}.get(code, f"NO TEST ({code})")  # pytest: 1 some failed, 5 none found
    print(f"{verdict:9} {name}: {mutation.tests} ({time.monotonic() - started_at:.0f} s)", flush=True)
    if code != 1:
        print(output[-1500:], flush=True)
    return code == 1


def _test(copy: Path, tests: str) -> tuple[int, str]:
    where, _, words = tests.partition(" -k ")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", where, *(["-k", words] if words else [])]
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
