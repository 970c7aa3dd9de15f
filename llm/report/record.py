"""What a run has written about itself, read leniently: a damaged line is counted and left out, what is missing is left empty."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from llm.log import UserError, log

METRICS = "metrics.jsonl"
FILES = (METRICS, "starts.jsonl", "sittings.jsonl")  # one of them makes a folder a run's logs
Curve = list[tuple[int, float]]


@dataclass
class Run:
    name: str
    logs: Path
    curves: dict[str, Curve]
    """By the names of metrics.jsonl: (step, value) in order of steps. Of steps that were taken again, the last time counts."""
    faults: list[dict]
    """All that were noted, also in steps that were taken again: step, time, kind, why."""
    starts: list[dict]
    sittings: list[dict]
    samples: list[dict]
    ledger: dict
    """seen_datasets.json."""
    end: dict
    """exit.json: how the last sitting ended."""
    evaluations: dict[str, dict] = field(default_factory=dict)
    """checkpoint -> task -> metric -> value."""

    def last(self, key: str) -> float | None:
        return self.curves[key][-1][1] if key in self.curves else None

    @property
    def step(self) -> int | None:
        return max((curve[-1][0] for curve in self.curves.values()), default=None)

    @property
    def tokens(self) -> int | None:
        """Drawn since step 0, over all datasets."""
        counts = [curve[-1][1] for key, curve in self.curves.items() if key.startswith("data/") and key.endswith("_tokens")]
        return round(sum(counts)) if counts else None

    @property
    def config(self) -> dict[str, object]:
        """section.key -> value, as of the newest start."""
        return flat_config(self.starts[-1]) if self.starts else {}


def read_run(given: str) -> Run:
    """The run in the folder `given`, or whose logs lie there. Raises UserError when it is neither."""
    path = Path(given)
    logs = next((p for p in (path / "logs", path) if any((p / name).is_file() for name in FILES)), None)
    if logs is None:
        raise UserError(
            f"{given}: no {METRICS} here or in logs/. Give the folder of a run that has trained, such as checkpoints/toy, or its log.out_dir."
        )
    records = list(_lines(logs / METRICS))
    starts = list(_lines(logs / "starts.jsonl"))
    run = path if logs != path or not starts else _run_folder(starts[-1], path)
    return Run(
        name=run.resolve().name,
        logs=logs,
        curves=_curves([r for r in records if isinstance(r.get("step"), int)]),
        faults=[
            {"step": r.get("step"), "time": r.get("time"), "kind": key.removeprefix("fault/"), "why": why}
            for r in records
            for key, why in r.items()
            if key.startswith("fault/")
        ],
        starts=starts,
        sittings=list(_lines(logs / "sittings.jsonl")),
        samples=list(_lines(logs / "samples.jsonl")),
        ledger=_json(run / "seen_datasets.json"),
        end=_json(logs / "exit.json"),
        evaluations={p.parent.name: _json(p) for p in sorted(run.glob("evaluations/*/results.json"))},
    )


def flat_config(start: dict) -> dict[str, object]:
    sections = start.get("config") if isinstance(start.get("config"), dict) else {}
    return {f"{section}.{key}": value for section, values in sections.items() if isinstance(values, dict) for key, value in values.items()}


def differences(configs: list[dict[str, object]]) -> list[tuple[str, list]]:
    """The keys whose values are not all the same, each with all its values; None where a config lacks it."""
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [(key, [config.get(key) for config in configs]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _run_folder(start: dict, logs: Path) -> Path:
    """Logs may lie apart from their run (log.out_dir)."""
    config = flat_config(start)
    run = Path(str(config.get("checkpoint.checkpoint_dir", "")), str(config.get("checkpoint.run_name", "")))
    return run if (run / "seen_datasets.json").is_file() else logs


def _lines(path: Path) -> Iterator[dict]:
    """The JSON objects of a file, one a line. A killed process may leave the last one cut off."""
    try:
        texts = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    bad = 0
    for text in texts:
        try:
            record = json.loads(text) if text.strip() else {}
        except ValueError:
            record = None
        if isinstance(record, dict) and record:
            yield record
        elif record != {}:
            bad += 1
    if bad:
        log.warning(f"{path}: {bad:,} damaged line{'s' * (bad > 1)} left out.")


def _json(path: Path) -> dict:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning(f"{path}: cannot be read ({error}), so the report goes without.")
        return {}
    return found if isinstance(found, dict) else {}


def _curves(records: list[dict]) -> dict[str, Curve]:
    """From the end backwards, what was noted before it for the same step or later ones was undone by going back to a checkpoint."""
    curves: dict[str, Curve] = {}
    earliest, keys_there = float("inf"), set()
    for record in reversed(records):
        step, values = record["step"], {key: value for key, value in record.items() if "/" in key and isinstance(value, int | float)}
        if step < earliest:
            earliest, keys_there = step, set()
        if step == earliest and not keys_there & values.keys():
            keys_there |= values.keys()
            for key, value in values.items():
                curves.setdefault(key, []).append((step, value))
    return {key: curve[::-1] for key, curve in curves.items()}
