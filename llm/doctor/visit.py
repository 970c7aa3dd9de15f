"""An examination from start to end: as a rank of a launcher, as one that was started for it, or with ranks that it starts itself."""

from collections.abc import Iterator
from functools import cache

from llm import dist
from llm.dist import World
from llm.doctor import peers
from llm.doctor.examination import Subject, alone, of_other_hosts, together
from llm.doctor.line import FAIL, Line, first_words
from llm.log import UserError


def visit(subject: Subject, ranks: int | None, place: str | None) -> Iterator[Line]:
    """The lines as they are found; none on ranks other than 0. `ranks`: how many to start; `place`: of a rank that was started so."""
    if place:
        yield from _as_peer(subject, place)
    elif dist.read_environment()[1] > 1:
        yield from _under_a_launcher(subject)
    else:
        yield from _by_itself(subject, ranks)


def _by_itself(subject: Subject, ranks: int | None) -> Iterator[Line]:
    n = (ranks or max(2, _gpus(subject))) if subject.wants_ranks else 1
    with peers.started(n) as others:
        yield from alone(subject, cache(lambda: dist.pick_device(_wanted(subject), World())))
        if not subject.wants_ranks:
            return
        try:
            world = others.join()
        except Exception as error:  # torch's own classes and RuntimeError
            advice = "Without ranks that meet here, several GPUs or machines cannot train together either."
            yield Line("ranks", FAIL, str(error) if isinstance(error, UserError) else first_words(str(error)), advice)
            return
        yield from together(subject, _on_a_device(subject, world))
        dist.stop(world)


def _as_peer(subject: Subject, place: str) -> Iterator[Line]:
    world = peers.join(place)
    for _ in together(subject, _on_a_device(subject, world)):
        pass
    dist.stop(world)
    yield from ()


def _under_a_launcher(subject: Subject) -> Iterator[Line]:
    with dist.joined() as world:
        device = world.together(lambda: dist.pick_device(_wanted(subject), world))
        own = list(alone(subject, lambda: device)) if world.local_rank == 0 else []
        for line in (*(own if world.rank == 0 else ()), *of_other_hosts(own, world)):
            yield from _on_rank_0(line, world)
        for line in together(subject, world.on(device)):
            yield from _on_rank_0(line, world)
        world.barrier()  # a launcher may end the others as soon as rank 0 leaves with its verdict


def _on_rank_0(line: Line, world: World) -> Iterator[Line]:
    if world.rank == 0:
        yield line


def _on_a_device(subject: Subject, world: World) -> World:
    """GPUs where there is one for each rank."""
    return world.on(dist.pick_device(_wanted(subject) if _gpus(subject) >= world.size else "cpu", world))


def _wanted(subject: Subject) -> str:
    return subject.cfg.engine.device if subject.cfg else "auto"


def _gpus(subject: Subject) -> int:
    import torch

    return torch.cuda.device_count() if _wanted(subject) != "cpu" and torch.cuda.is_available() else 0
