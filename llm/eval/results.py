"""What an evaluation leaves behind: JSON beside the checkpoints, TensorBoard, a table."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from llm import durable
from llm.log import UserError, log, result


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}). Results go there: give --out FOLDER.") from None


class Results:
    """`folder`/results.json, {task: {metric: value}}, kept from one evaluation of a checkpoint to the next."""

    def __init__(self, folder: Path, board: Path, step: int):
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._board, self._step = folder, board, step

    def add(self, task: str, values: dict[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = self.folder / "results.json"
        with _writing(path):
            durable.write_text(path, json.dumps(_read(path) | {task: values}, indent=1) + "\n")
        with _writing(self._board), SummaryWriter(str(self._board), filename_suffix=".eval") as board:
            for metric, value in values.items():
                board.add_scalar(f"eval/{task}/{metric}", value, self._step)


class Kept:
    """Parts of a task (MMLU's subjects) in `folder`/`task`.json as they are done, so that the same evaluation goes on where it was."""

    def __init__(self, folder: Path, task: str):
        self._path = folder / f"{task}.json"
        self._parts = _read(self._path)

    def get(self, name: str, made_of: list, compute: Callable[[], dict]) -> tuple[dict, bool]:
        """(the part, whether it was there): kept if all that it was made of (weights, dtype, data) is the same."""
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
        part = self._parts.get(name)
        if part and part["key"] == key:
            return part, True
        self._parts[name] = compute() | {"key": key}
        with _writing(self._path):
            durable.write_text(self._path, json.dumps(self._parts) + "\n")
        return self._parts[name], False


def _read(path: Path) -> dict:
    """A damaged file is of no more use than none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning(f"{path}: cannot be read ({error}); its results are computed again")
        return {}


def print_table(heads: list[str], rows: list[list[str]]) -> None:
    """The first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in [heads, ["-" * width for width in widths], *rows]:
        result("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))))
