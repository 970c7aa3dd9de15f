"""One run to a folder of logs: two would mix their metrics, TensorBoard curves and exit records."""

import json
import os
from pathlib import Path

from llm import durable
from llm.config import ConfigError, RunConfig

NAME = "run"
"""Holds the path of the run's folder, from the folder of logs: both may move together."""


def check(cfg: RunConfig) -> None:
    """Raise ConfigError when the folder of logs is another run's, which is still there."""
    owner = _noted(cfg.log_folder) or _of_an_earlier_version(cfg)
    if owner is None or not owner.is_dir() or owner.resolve() == cfg.run_folder.resolve():
        return
    raise ConfigError(
        f"log.out_dir: {cfg.log_folder} has the logs of another run, {owner}, and two would write into the same files. Choose another "
        f"log.out_dir, or leave it out: then they are in {cfg.run_folder / 'logs'}."
    )


def sign(cfg: RunConfig) -> None:
    """Make the folder of logs this run's. Raises OSError, and ConfigError when another run was faster."""
    text = os.path.relpath(cfg.run_folder.resolve(), cfg.log_folder.resolve()) + "\n"
    mine = cfg.log_folder / f".{NAME}-{os.getpid()}"
    durable.write_text(mine, text)
    try:
        os.link(mine, cfg.log_folder / NAME)
    except OSError:  # it is there, be it only since `check`, or this file system has no links
        check(cfg)
        durable.write_text(cfg.log_folder / NAME, text)
    finally:
        mine.unlink(missing_ok=True)


def _noted(logs: Path) -> Path | None:
    try:
        return logs.resolve() / (logs / NAME).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None


def _of_an_earlier_version(cfg: RunConfig) -> Path | None:
    """From its last start's config, where no more is noted; a run's own logs folder needs no such proof."""
    if not cfg.log.out_dir:
        return None
    try:
        *_, last = (cfg.log_folder / "starts.jsonl").read_text(encoding="utf-8").splitlines()
        checkpoint = json.loads(last)["config"]["checkpoint"]
        return Path(checkpoint["checkpoint_dir"], checkpoint["run_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
