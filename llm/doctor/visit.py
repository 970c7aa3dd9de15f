"""An examination from start to end: as a rank of a launcher, as one that was started for it, or with ranks that it starts itself."""

from collections.abc import Iterator
from functools import cache
from itertools import chain

from llm import dist
from llm.dist import World
from llm.doctor import peers
from llm.doctor.examination import Subject, alone, of_other_hosts, together
from llm.doctor.line import FAIL, Line, first_words
from llm.log import UserError


def visit(subject: Subject, place: str | None) -> Iterator[Line]:
    """The lines as they are found; none on ranks other than 0. `place`: of a rank that another visit has started."""
    if place:
        yield from _as_peer(subject, place)
    elif dist.read_environment()[1] > 1:
        yield from _under_a_launcher(subject)
    else:
        yield from _by_itself(subject)


def _by_itself(subject: Subject) -> Iterator[Line]:
    yield from alone(subject, cache(lambda: dist.pick_device(_wanted(subject), World())))
    if not subject.wants_ranks:
        return
    try:
        with peers.joined(max(2, _gpus(subject))) as world:  # only now: while they load torch, nothing else can be measured
            yield from together(subject, _on_a_device(subject, world))
    except Exception as error:  # torch's own classes and RuntimeError
        advice = "Without ranks that meet here, several GPUs or machines cannot train together either."
        yield Line("ranks", FAIL, str(error) if isinstance(error, UserError) else first_words(str(error)), advice)


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
        lines = chain(own if world.rank == 0 else (), of_other_hosts(own, world), together(subject, world.on(device)))
        yield from (line for line in lines if world.rank == 0)
        world.barrier()  # a launcher may end the others as soon as rank 0 leaves with its verdict


def _on_a_device(subject: Subject, world: World) -> World:
    """GPUs where there is one for each rank."""
    return world.on(dist.pick_device(_wanted(subject) if _gpus(subject) >= world.size else "cpu", world))


def _wanted(subject: Subject) -> str:
    return subject.cfg.engine.device if subject.cfg else "auto"


def _gpus(subject: Subject) -> int:
    import torch

    return torch.cuda.device_count() if _wanted(subject) != "cpu" and torch.cuda.is_available() else 0
