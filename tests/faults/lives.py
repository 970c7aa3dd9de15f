"""Lives of a run: ranks forked from a server that has imported everything, so that a life takes a second or two; and what must be true at the end."""

import json
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from counts import done
from little_run import CORPUS, fed_targets, losses, make_run
from ranks import fork

from llm.checkpoint import folder
from llm.checkpoint.resume import newest
from llm.config import load_config
from llm.data.audit import audit_phase, step_problems
from llm.data.ledger import Ledger
from llm.dist import World

LIMIT_S = 90


@dataclass(frozen=True)
class Life:
    codes: list[int]
    """Exit codes by rank."""
    output: str

    @property
    def killed(self) -> bool:
        return -signal.SIGKILL in self.codes


def start(config: Path, ranks: int, *words: str, fault: str = "", **options) -> "Group":
    """Ranks that train in a sitting of this run; `words` change the config, `options` are those of a sitting. `hosts`: one rank on each."""
    place = config.parent / "lives" / str(time.monotonic_ns())
    place.mkdir(parents=True)
    arguments = (ranks, str(place), str(config), words, fault, {"retry_anyway": True} | options)
    processes = [fork(_one_rank, rank, *arguments) for rank in range(ranks)]
    done["lives"] += 1
    return Group(processes, place)


def live(config: Path, ranks: int, *words: str, fault: str = "", **options) -> Life:
    """A whole life, until every rank has ended."""
    life = start(config, ranks, *words, fault=fault, **options).ended()
    done["faults injected"] += bool(fault)
    done["kills"] += life.killed
    return life


class Group:
    """The processes of a life."""

    def __init__(self, processes: list, place: Path):
        self.processes, self.place = processes, place

    def has_reached(self, *ranks: int) -> bool:
        """Whether these ranks are where a fault of the kind `hold` keeps them."""
        return all((self.place / f"reached-{rank}").exists() for rank in ranks)

    def reached(self, *ranks: int) -> list[int]:
        """The pids of these ranks, once they are held."""
        give_up_at = time.monotonic() + LIMIT_S
        while not self.has_reached(*ranks):
            assert time.monotonic() < give_up_at and not self.over(), self.ended(0).output
            time.sleep(0.02)
        return [int((self.place / f"reached-{rank}").read_text()) for rank in ranks]

    def go(self) -> None:
        (self.place / "go").touch()

    def over(self) -> bool:
        return not any(p.is_alive() for p in self.processes)

    def kill(self) -> bool:
        """SIGKILL all of them; False when they had ended before."""
        alive = any(p.is_alive() for p in self.processes)
        for process in self.processes:
            process.kill()
        return alive

    def wait(self, seconds: float) -> None:
        give_up_at = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0, give_up_at - time.monotonic()))

    def ended(self, limit_s: float = LIMIT_S) -> Life:
        self.wait(limit_s)
        hanging = [rank for rank, p in enumerate(self.processes) if p.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        output = "".join(path.read_text(errors="replace") for path in sorted(self.place.glob("out-*")))
        assert not hanging, f"ranks {hanging} still ran after {limit_s} s\n{output}"
        return Life([p.exitcode for p in self.processes], output)


def _one_rank(rank: int, ranks: int, place: str, config: str, words: tuple, fault: str, options: dict) -> None:
    out = os.open(f"{place}/out-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    code = 1
    try:
        code = _train(rank, ranks, place, config, words, fault, options)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)  # as llm.cli does


def _train(rank: int, ranks: int, place: str, config: str, words: tuple, fault: str, options: dict) -> int:
    import points
    import torch
    from little_run import sit

    from llm import dist
    from llm.log import UserError

    torch.set_num_threads(1)
    if hosts := options.pop("hosts", None):
        hosts.enter(rank)
    if options.pop("note_state", False):
        _note_what_was_loaded(Path(config).parent / "loaded.json")
    if fault:
        os.environ["FAULT"] = fault
        points.install(rank, Path(place))
    meeting = {"place": (rank, ranks, 0)} if hosts else {"place": (rank, ranks, rank), "init_method": f"file://{place}/rendezvous"}
    try:
        with dist.joined(**meeting, timeout_minutes=1) as world:
            sit(world, config, list(words), str(Path(config).parent / "fed"), **options)
    except UserError as error:
        print(f"error: {error}", flush=True)
        return error.exit_code
    return 0


def _note_what_was_loaded(path: Path) -> None:
    """The hash of the state that the first step starts from."""
    from llm.checkpoint.slices import state_hash
    from llm.train import run

    train_phase = run.train_phase

    def noting(ready, *rest):
        (state,) = ready.world.sum_ints([state_hash(ready.engine.local_slices())])
        if ready.world.rank == 0:
            path.write_text(json.dumps(state))
        return train_phase(ready, *rest)

    run.train_phase = noting


# ------------------------------------------------------------------ the run that was never stopped, and what must equal it


@dataclass(frozen=True)
class Whole:
    """What an undisturbed run comes to."""

    config: Path
    step: int
    state: int
    chain: str
    losses: dict[int, float]
    seconds: float


def fault_run(root: Path, **changes) -> Path:
    """A little run that saves every second step and prunes."""
    return make_run(root, **({"save_every": 2, "keep_last": 2, "keep_best": 1, "keep_epochs": False} | changes))


def uninterrupted(root: Path, ranks: int, *words: str, **changes) -> Whole:
    config = fault_run(root, **changes)
    live(config, ranks, *words)  # the first one starts the server
    config = fault_run(root / "again", **changes)
    started_at = time.monotonic()
    life = live(config, ranks, *words)
    assert life.codes == [0] * ranks, life.output
    found = newest(World(), load_config(config).run_folder).manifest
    return Whole(config, found.step, found.state_hash, found.chain, losses(config), time.monotonic() - started_at)


def assert_nothing_lost(config: Path, whole: Whole, epochs: int = 1) -> None:
    """The newest checkpoint is sound and bit for bit that of the undisturbed run, every target was fed once an epoch, nothing lies about."""
    assert_same_state(load_config(config).run_folder, whole)
    assert_fed_once(config, whole.step, epochs)
    assert losses(config) == whole.losses


def assert_fed_once(config: Path, steps: int, epochs: int = 1) -> None:
    """Every target was fed once an epoch, the ledger of the newest checkpoint says so, and nothing lies about."""
    run = load_config(config).run_folder
    assert fed_targets(config.parent / "fed") == Counter(dict.fromkeys(CORPUS, epochs))
    ledger = Ledger.from_json(newest(World(), run).manifest.ledger)
    audits = [audit_phase(phase, {}) for phase in ledger.phases]
    assert [a.problems for a in audits] == [[]] * len(audits) and step_problems(ledger, steps) == []
    assert sum(a.targets for a in audits) == epochs * CORPUS.total()
    assert not [p.name for p in run.iterdir() if p.name.startswith((".tmp-", ".trash-"))]


def assert_same_state(run: Path, whole: Whole) -> None:
    manifest = newest(World(), run).manifest
    assert (manifest.step, manifest.state_hash, manifest.chain) == (whole.step, whole.state, whole.chain)
    done["final states compared"] += 1


def committed(config: Path) -> list[int]:
    return [entry.step for entry in folder.entries(load_config(config).run_folder)]


def exit_note(config: Path) -> dict:
    return json.loads((load_config(config).log_folder / "exit.json").read_text())
