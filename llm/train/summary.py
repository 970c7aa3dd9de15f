"""What a sitting did, as one screen for people and one line of sittings.jsonl for programs."""

import time

from llm.checkpoint import folder
from llm.config import RunConfig
from llm.log import clock, result
from llm.train.budget import Sitting, horizon
from llm.train.lines import note
from llm.train.loop import Progress
from llm.train.metrics import Metrics
from llm.train.phases import use_of


def tell_sitting(
    cfg: RunConfig, at: Progress, sitting: Sitting, metrics: Metrics, first_step: int, reason: str, global_rows: int, begins_with: list[str]
) -> None:
    """Append to the log of sittings and show the summary. `begins_with`: flags that the next one must do without. Rank 0 only."""
    seconds = time.monotonic() - sitting.started_at
    record = {
        "ended": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "from_step": first_step,
        "to_step": at.step,
        "tokens": metrics.targets,
        "tokens_computed": metrics.tokens,
        "minutes": round(seconds / 60, 2),
        "seconds_training": round(metrics.busy_s, 1),
        "seconds_validating": round(sitting.validating_s, 1),
        "seconds_saving": round(sitting.saving_s, 1),
        "loss_first": metrics.first_loss,
        "loss_last": metrics.last_loss,
        "val_loss": at.metrics.get("val_loss"),
        "tokens_per_s": round(metrics.tokens_per_s, 1),
        "target_tokens_per_s": round(metrics.target_tokens_per_s, 1),
        "mfu": round(metrics.mfu(metrics.tokens_per_s), 4) if metrics.peak_flops else None,
        "why": reason,
    }
    note(cfg.log_folder / "sittings.jsonl", record)
    rows = _rows(cfg, at, record, seconds, global_rows) | {"next": _whats_next(cfg, at, reason, begins_with)}
    width = max(map(len, rows))
    result("This sitting:\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in rows.items()))


def _rows(cfg: RunConfig, at: Progress, did: dict, seconds: float, global_rows: int) -> dict[str, str]:
    steps = f"{did['from_step']:,} to {did['to_step']:,}, {did['tokens']:,} tokens ({at.tokens_seen:,} since step 0)"
    rows = {"ended": did["why"], "steps": steps}
    spent = {name: did[f"seconds_{name}"] for name in ("training", "validating", "saving")}
    rest = max(0.0, seconds - sum(spent.values()))
    rows["time"] = f"{clock(seconds)}: " + ", ".join(f"{name} {clock(s)}" for name, s in (spent | {"start-up and the rest": rest}).items())
    mfu = f", MFU {did['mfu']:.1%}" if did["mfu"] else ""
    with_loss = ""
    if did["tokens"] < 0.99 * did["tokens_computed"]:
        with_loss = f", {did['target_tokens_per_s']:,.0f} of them with loss"
    rows["speed"] = f"{did['tokens_per_s']:,.0f} tokens/s{with_loss} while training{mfu}"
    if did["loss_first"] is not None:
        validation = f"; validation {did['val_loss']:.4f}" if did["val_loss"] else ""
        rows["loss"] = f"{did['loss_first']:.4f} to {did['loss_last']:.4f}{validation}"
    rows |= {"data": _data(at), "saved": _saved(cfg)}
    left = _left(cfg, at, did, global_rows)
    return rows | ({"to go": left} if left else {})


def _data(at: Progress) -> str:
    phase = at.ledger.phases[-1]
    skipped = sum(s.stop - s.start for s in phase.skipped)
    noted = f", {skipped:,} of them skipped" if skipped else ""
    return f"{phase.consumed:,} of {phase.total:,} samples of phase {phase.name} ({phase.dataset}), {phase.consumed / phase.total:.1%}{noted}"


def _saved(cfg: RunConfig) -> str:
    found = folder.entries(cfg.run_folder)
    if not found:
        return "nothing"
    size = sum(path.stat().st_size for path in found[-1].path.rglob("*") if path.is_file())
    return f"{found[-1].path}, {size / 1e6:,.1f} MB ({len(found)} kept)"


def _left(cfg: RunConfig, at: Progress, did: dict, global_rows: int) -> str | None:
    """What the schedule still wants, and how long that takes at today's speed."""
    phase, steps = at.ledger.open_phase, did["to_step"] - did["from_step"]
    if not phase or not steps:
        return None
    left = horizon(cfg, phase, global_rows, at.step).end - at.step
    seconds = left * did["seconds_training"] / steps
    return f"{left:,} steps, about {clock(seconds)} of training at today's speed" if left > 0 else None


def _whats_next(cfg: RunConfig, at: Progress, reason: str, begins_with: list[str]) -> str:
    try_it = f"Try the model: {use_of(cfg.run_folder)}"
    if reason == "budget spent":
        return f"The budget of {cfg.train.total_step_budget:,} steps is spent. {try_it}"
    if at.ledger.open_phase is None:
        return f"The chosen data has been trained on. {try_it}"
    without = f", without {' and '.join(begins_with)}," if begins_with else ""
    return f"Run the same command again{without} to go on."
