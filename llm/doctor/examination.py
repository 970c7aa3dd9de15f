"""All that is looked at, in order: on this machine alone, then by all ranks together."""

import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from llm.config import ModelConfig, RunConfig
from llm.dist import World, is_lost_rank
from llm.doctor import disk, machine
from llm.doctor.line import FAIL, OK, Line, examined, first_words

ALONE = (
    "python", "torch", "gpu", "precision", "attention", "deepspeed", "compiler", "shared-memory", "open-files", "run-folder", "free-space", "loader",
)  # fmt: skip
TOGETHER = ("ranks", "matmul", "all-reduce", "shared-folder", "zero")
ANY_MODEL = ModelConfig(n_layers=1, d_model=512, n_heads=8, d_ff=1024, seq_len=1024)


@dataclass(frozen=True)
class Subject:
    """What is examined."""

    cfg: RunConfig | None
    folder: Path
    """Where checkpoints go."""
    only: frozenset[str] = frozenset(ALONE + TOGETHER)

    @property
    def wants_ranks(self) -> bool:
        return bool(self.only & set(TOGETHER))


def alone(subject: Subject, device: Callable[[], str]) -> Iterator[Line]:
    """The lines of this machine. `device` is asked for only where it matters, for that takes torch."""
    cfg = subject.cfg
    wanted = cfg.engine.precision if cfg else "auto"
    precision = cache(lambda: machine.resolved_precision(wanted, device()))
    model, is_masked = (cfg.model, cfg.data.document_mask) if cfg else (ANY_MODEL, False)
    looks: dict[str, Callable[[], Line]] = {
        "python": machine.python,
        "torch": machine.torch,
        "gpu": machine.gpu,
        "precision": lambda: machine.precision(device(), wanted),
        "attention": lambda: machine.attention(device(), model, precision(), is_masked),
        "deepspeed": machine.deepspeed,
        "compiler": lambda: machine.compiler(device),
        "shared-memory": machine.shared_memory,
        "open-files": machine.open_files,
        "run-folder": lambda: disk.write_speed(subject.folder),
        "free-space": lambda: disk.free_space(subject.folder, *_wanted(cfg)),
        "loader": lambda: _loader(cfg, device(), precision()),
    }
    for name in ALONE:
        if name in subject.only:
            yield examined(name, looks[name])


def together(subject: Subject, world: World) -> Iterator[Line]:
    """The lines of all ranks. Collective. Ends at the first part that raises: the ranks are out of step then, or some are gone."""
    from llm.doctor import ranks

    looks: dict[str, Callable[[], Line]] = {
        "ranks": lambda: ranks.ranks(world),
        "matmul": lambda: ranks.matmul(world),
        "all-reduce": lambda: ranks.all_reduce(world),
        "shared-folder": lambda: disk.shared(subject.folder, world),
        "zero": lambda: ranks.zero(world, subject.cfg),
    }
    for name in TOGETHER:
        if name in subject.only:
            try:
                yield looks[name]()
            except Exception as error:  # whatever a broken network or library raises
                if world.rank:
                    raise
                advice = "Look at the other ranks' output. What comes after this was not looked at."
                lost = "a rank is gone or does not answer. " if is_lost_rank(error) else ""
                yield Line(name, FAIL, f"{lost}{type(error).__name__}: {first_words(str(error))}", advice)
                return


def of_other_hosts(lines: list[Line], world: World) -> list[Line]:
    """What the first ranks of other hosts found that is not ok, on every rank. Collective: each rank brings its own lines, the others none."""
    mine = [asdict(replace(line, host=socket.gethostname())) for line in lines]
    return [Line(**line) for of_rank in world.gather(mine)[1:] for line in of_rank if line["status"] != OK]


def _loader(cfg: RunConfig | None, device: str, precision: str) -> Line:
    from llm.doctor.loader import loader

    return loader(cfg, device, precision)


def _wanted(cfg: RunConfig | None) -> tuple[int | None, int | None]:
    """Parameters of the model, and how many checkpoints the run keeps at least."""
    if cfg is None:
        return None, None
    from llm.model.flops import count_params
    from llm.tokenizer import load_tokenizer

    model = cfg.model
    if model.vocab_size is None:
        model = model.with_vocab(load_tokenizer(cfg.tokenizer.tokenizer_path, cfg.tokenizer.tokenizer_type).vocab_size)
    return count_params(model), cfg.checkpoint.keep_last + cfg.checkpoint.keep_best
