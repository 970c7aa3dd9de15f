"""What DeepSpeed would not understand in a JSON of the user's, told before it is handed over.

Most keys that it does not know it leaves out without a word.
"""

import difflib
import traceback

from llm.config import RunConfig
from llm.dist import World
from llm.engine.ds_config import complete, ds_config_path, leaves, read_ds_config
from llm.engine.protocol import EngineError


class _Asked(dict):
    """A mapping that remembers which keys it was asked for: those that DeepSpeed knows."""

    def __init__(self, tree: dict):
        super().__init__(
            {
                key: _Asked(value) if isinstance(value, dict) else value
                for key, value in tree.items()
            }
        )
        self.asked: set[str] = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __iter__(self):
        return (
            super().__iter__()
        )  # with one of its own, `**` asks for each key, and does not copy past __getitem__

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)


def check_ds_config(cfg: RunConfig, world: World, n_params: int) -> None:
    """Raise UserError, the same on every rank, when ranks have different files or DeepSpeed refuses them. Collective."""
    path = ds_config_path(cfg.engine)
    given = world.together(lambda: read_ds_config(cfg.engine))
    world.refuse_differences(f"engine.ds_config {path}", repr(given))
    world.together(lambda: _check(given, cfg, world, n_params, str(path)))


def _check(given: dict, cfg: RunConfig, world: World, n_params: int, where: str) -> None:
    from llm.engine.deepspeed_engine import import_deepspeed

    config = _Asked(complete(given, cfg, world, n_params, where))
    deepspeed = import_deepspeed(world)
    deepspeed.init_distributed(
        verbose=False, dist_init_required=False
    )  # its config asks for the number of ranks
    try:
        deepspeed.runtime.config.DeepSpeedConfig(config)
    except Exception as error:
        refuse_if_its_word(error, given, where)
        raise
    if unknown := list(_unknown(given, config)):
        lines = "\n".join(f"  - {line}" for line in unknown)
        raise EngineError(
            f"{where} has keys that DeepSpeed {deepspeed.__version__} does not know, and would leave out:\n{lines}"
        )


def refuse_if_its_word(error: Exception, given: dict, where: str) -> None:
    """Raise EngineError where `error` is how DeepSpeed refuses the config `given`, which was read from `where`."""
    import deepspeed

    # pydantic's error is a ValueError
    its_own = (
        deepspeed.runtime.config.DeepSpeedConfigError,
        ValueError,
        AssertionError,
        TypeError,
        NotImplementedError,
    )
    if isinstance(error, its_own) or type(error) is Exception:
        words = _in_words(error, given)
        raise EngineError(f"DeepSpeed {deepspeed.__version__} refuses {where}: {words}") from None


def _in_words(error: Exception, given: dict) -> str:
    """DeepSpeed's own words, without pydantic's; its line of code where it has none."""
    if not hasattr(error, "errors"):
        words = " ".join(str(error).split())
        if words and not isinstance(error, TypeError):
            return words
        return f"{words or type(error).__name__} in '{traceback.extract_tb(error.__traceback__)[-1].line}'"
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    known = sorted({name for model in _below(DeepSpeedConfigModel) for name in model.model_fields})
    paths, told = [path for path, _ in leaves(given)], []
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"]))
        path = next((p for p in paths if f".{p}".endswith(f".{key}")), key)
        if problem["type"] == "extra_forbidden":
            told.append(
                f"it does not know the key {path}.{_did_you_mean(key.rpartition('.')[2], known)}"
            )
        else:
            told.append(f"{path} is {problem['input']!r}: {problem['msg']}.")
    return " ".join(told)


def _below(model: type) -> list[type]:
    return [found for child in model.__subclasses__() for found in (child, *_below(child))]


def _unknown(given: dict, config: _Asked, prefix: str = ""):
    """A line for each key of `given` that nobody has asked for. pydantic asks for all, and refuses by itself."""
    for key, value in given.items():
        if key.startswith("_") or key not in dict.keys(
            config
        ):  # a comment, or taken out by `complete`
            continue
        if key not in config.asked:
            yield f"{prefix}{key}.{_did_you_mean(key, sorted(config.asked))}"
        elif isinstance(value, dict) and (section := dict.__getitem__(config, key)).asked:
            yield from _unknown(value, section, f"{prefix}{key}.")


def _did_you_mean(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f" Did you mean '{near[0]}'?" if near else ""
