"""What else holds of a checkpoint to go on from: settings, ledger, batch and Adam fit its step."""

from pathlib import Path

from llm.checkpoint.invariants import INVARIANTS, Rule, both_versions
from llm.checkpoint.manifest import Manifest
from llm.config import SECTIONS
from llm.data.audit import step_problems
from llm.data.ledger import Ledger, LedgerError


def _config(path: Path, manifest: Manifest) -> str | None:
    """The sections that the other rules look into."""
    missing = next(
        (name for name in ("model", "train") if not isinstance(manifest.config.get(name), dict)),
        None,
    )
    return f"config has no section {missing}" if missing else None


def _settings(path: Path, manifest: Manifest) -> str | None:
    """One that this version does not know would not be kept to, without a word."""
    for section, fields in manifest.config.items():
        known = SECTIONS[section].model_fields if section in SECTIONS else {}
        unknown = [key for key in fields if key not in known] if isinstance(fields, dict) else []
        if section not in SECTIONS or unknown:
            name = ".".join(["config", section, *unknown[:1]])
            return f"{name} is no setting of this version ({both_versions(manifest)})"
    return None


def _configured_batch(path: Path, manifest: Manifest) -> str | None:
    seq_len = _setting(manifest, "model", "seq_len")
    tokens = _setting(manifest, "train", "batch_tokens")
    if not isinstance(tokens, int) or not isinstance(seq_len, int):
        return None
    if tokens == manifest.global_rows * seq_len:
        return None
    return (
        f"global_rows {manifest.global_rows:,} of {seq_len:,} tokens are not the {tokens:,} of "
        f"config.train.batch_tokens"
    )


def _setting(manifest: Manifest, section: str, key: str):
    fields = manifest.config.get(section)
    return fields.get(key) if isinstance(fields, dict) else None


def _ledger(path: Path, manifest: Manifest) -> str | None:
    """All that is to be said of it, for it is large and is read once."""
    try:
        ledger = Ledger.from_json(manifest.ledger)
    except LedgerError as error:
        return str(error).removesuffix(".")
    problems = [*step_problems(ledger, manifest.step), *_phase_problems(ledger, manifest)]
    if not problems:
        problems = [
            problem
            for rule in (_consumed, _tokens, _optimizer)
            if (problem := rule(ledger, manifest))
        ]
    return "; ".join(problems) or None


def _phase_problems(ledger: Ledger, manifest: Manifest) -> list[str]:
    seq_len = _setting(manifest, "model", "seq_len")
    problems = [
        f"phase {phase.name} has {phase.consumed:,} of {phase.total:,} samples consumed, and yet "
        f"another came after it"
        for phase in ledger.phases[:-1]
        if not phase.is_done
    ]
    odd = [phase for phase in ledger.phases if phase.seq_len != seq_len]
    return problems + [
        f"phase {phase.name} has rows of {phase.seq_len:,}, not of config.model.seq_len {seq_len}"
        for phase in odd
    ]


def _consumed(ledger: Ledger, manifest: Manifest) -> str | None:
    """Each step takes `global_rows` draws, the last of a phase what is left."""
    since, begun = (
        manifest.batch_since,
        [phase for phase in ledger.phases if phase.first_step is not None],
    )
    if since is None or not begun:  # of a checkpoint that is older than this field nothing is known
        return None
    *before, phase = begun
    start, first = since.draws - sum(p.consumed for p in before), since.step + 1
    if phase.first_step > first:
        start, first = 0, phase.first_step
    steps = phase.last_step - first + 1
    expected = min(phase.total, start + steps * manifest.global_rows)
    if phase.consumed == expected:
        return None
    return (
        f"phase {phase.name} has {phase.consumed:,} samples consumed, but {steps:,} steps of "
        f"{manifest.global_rows:,} from {start:,} on are {expected:,}"
    )


def _tokens(ledger: Ledger, manifest: Manifest) -> str | None:
    skipped = sum(
        (s.stop - s.start) * phase.seq_len for phase in ledger.phases for s in phase.skipped
    )
    most = sum(phase.consumed * phase.seq_len for phase in ledger.phases) - skipped
    if manifest.tokens_seen <= most:
        return None
    return (
        f"tokens_seen is {manifest.tokens_seen:,}, but the samples consumed and not skipped have "
        f"{most:,} at most"
    )


def _optimizer(ledger: Ledger, manifest: Manifest) -> str | None:
    applied = manifest.step - sum(len(phase.skipped) for phase in ledger.phases)
    counted = manifest.engine.get("optimizer_step")
    if counted == applied and isinstance(counted, int):
        return None
    steps = f"{applied:,} of {manifest.step:,} steps"
    return f"engine.optimizer_step is {counted!r}, but {steps} were applied"


RESUMABLE: dict[str, Rule] = INVARIANTS | {
    "config": _config,
    "settings": _settings,
    "configured batch": _configured_batch,
    "ledger": _ledger,
}
