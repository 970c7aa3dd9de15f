"""What a run has been trained on, read from the ledger in its newest sound checkpoint; the model is not loaded.

  python tools/ledger.py show checkpoints/toy
  python tools/ledger.py verify checkpoints/toy            recount every sample, and find every shard again
  python tools/ledger.py skipped checkpoints/toy           steps whose update was refused: why, which files and documents
  python tools/ledger.py diff checkpoints/toy checkpoints/other
  python tools/ledger.py seen checkpoints/toy my-text.txt  never, partly or fully; renamed and copied files are recognised
"""

from pathlib import Path

from llm import cli
from llm.log import UserError, log


class NotVerified(UserError):
    """The ledger's claims and the recount, or the data, do not agree."""


def main() -> None:
    parser = cli.parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="show|verify|skipped|diff|seen")
    add = {name: commands.add_parser(name, help=text) for name, text in HELP.items()}
    for name in ("show", "verify", "skipped", "seen"):
        add[name].add_argument("run", help="a run's folder, or one of its checkpoints")
        add[name].add_argument("--step", type=int, help="the checkpoint of this step instead of the newest")
    for name in ("verify", "skipped", "seen"):
        add[name].add_argument("--data", nargs="+", metavar="PATH", help="where its shards lie now, if not where the run's config says")
    add["verify"].add_argument("--quick", action="store_true", help="do not read the shards' tokens; their sizes and records only")
    add["diff"].add_argument("run", metavar="run_a")
    add["diff"].add_argument("other", metavar="run_b")
    add["seen"].add_argument("file", type=Path, help="a raw .txt or .jsonl, or a shard's .bin or .meta.json")
    add["seen"].add_read_options()
    args = parser.parse_args()
    COMMANDS[args.command](args)


HELP = {
    "show": "phases, files, percentages and steps",
    "verify": "recompute the plan, count every sample, and look for the shards; exit code 2 if anything does not agree",
    "skipped": "the steps whose update was not applied: the reason, and the files and documents of their samples",
    "diff": "which text one run has been trained on and the other has not, by content",
    "seen": "whether a raw file or a shard has been trained on, by content",
}


def _open(run: str, step: int | None = None):
    """The checkpoint's manifest, its ledger and a line that says which one it is."""
    from llm.checkpoint.resume import open_checkpoint

    return _described(open_checkpoint(run, step))


def _described(checkpoint):
    from llm.data.ledger import Ledger

    manifest = checkpoint.manifest
    line = f"{checkpoint.folder}: step {manifest.step:,}, {manifest.tokens_seen:,} tokens trained on, data digest {manifest.chain[:16]}"
    return manifest, Ledger.from_json(manifest.ledger), line


def _shards_at_hand(manifest, args):
    from llm.data.at_hand import ShardsAtHand, configured_paths

    return ShardsAtHand(args.data or configured_paths(manifest.config))


def _show(args) -> None:
    from llm.data.seen import seen_view, view_lines

    _, ledger, line = _open(args.run, args.step)
    print("\n".join([line, *view_lines(seen_view(ledger))]))


# ---------------------------------------------------------------- verify


def _verify(args) -> None:
    from llm.checkpoint.invariants import contradictions
    from llm.checkpoint.resume import open_checkpoint
    from llm.data.audit import audit_phase, step_problems
    from llm.log import progress

    checkpoint = open_checkpoint(args.run, args.step, rules={})  # contradictions are told below
    manifest, ledger, line = _described(checkpoint)
    print(line)
    data = _shards_at_hand(manifest, args)
    problems = contradictions(checkpoint.folder, manifest) + step_problems(ledger, manifest.step)
    if data.is_reachable:
        problems += data.problems(ledger, args.quick)
        print(f"shards: {data.count(ledger)} found by content, {'not read (--quick)' if args.quick else 'every byte read'}")
    else:
        print(f"shards: none of {', '.join(data.paths)} is there, so they were not looked for; --data PATH says where they are now")
    with progress(sum(phase.consumed for phase in ledger.phases), "recounting", "draws") as bar:
        audits = [audit_phase(phase, data.shards, bar.advance) for phase in ledger.phases]
    for audit in audits:
        _tell_audit(audit, manifest.global_rows)
        problems += [f"phase {audit.phase.name}: {problem}" for problem in audit.problems]
    problems += _token_problems(manifest.tokens_seen, sum(audit.targets for audit in audits), data.is_whole(ledger))
    if problems:
        told = "\n".join(f"  - {problem}" for problem in problems)
        raise NotVerified(f"{args.run}: this does not agree:\n{told}\nLook at the data first, then at older checkpoints: --step N.")
    print("everything agrees")


def _tell_audit(audit, global_rows: int) -> None:
    phase = audit.phase
    counts = "; ".join(_counts(*counted, named=len(phase.shares) > 1) for counted in audit.draws_each)
    steps = phase.last_step - phase.first_step + 1 if phase.first_step else 0
    skipped = sum(s.stop - s.start for s in phase.skipped)
    print(f"phase {phase.name}: {phase.consumed:,} of {phase.total:,} draws walked: {counts}; {skipped:,} skipped; "
          f"{audit.targets:,} tokens; {steps:,} steps")  # fmt: skip
    if steps != -(-phase.consumed // global_rows):  # only today's batch is known, so this proves nothing wrong
        print(f"  note: {steps:,} steps of {global_rows} samples would be another number of draws: the global batch has changed on the way")


def _counts(share, samples: int, whole: int, once_more: int, named: bool) -> str:
    of = f" of {share.name}" if named else ""
    if once_more:
        return f"{once_more:,} of {samples:,} samples{of} drawn {_times(whole + 1)}, the others {_times(whole)}"
    return f"each of {samples:,} samples{of} drawn {_times(whole)}" if whole else f"none of {samples:,} samples{of} drawn"


def _times(n: int) -> str:
    return {0: "not", 1: "once"}.get(n, f"{n:,} times")


def _token_problems(trained: int, recounted: int, masks_known: bool) -> list[str]:
    if trained == recounted:
        return []
    if trained < recounted and not masks_known:
        print("note: fewer tokens were trained on than the samples have; whether loss masks explain that, only the missing shards can tell")
        return []
    return [f"{trained:,} tokens were trained on, the applied samples have {recounted:,}"]


# ---------------------------------------------------------------- skipped


def _skipped(args) -> None:
    from llm.data.origin import origins

    manifest, ledger, line = _open(args.run, args.step)
    print(line)
    data = _shards_at_hand(manifest, args)
    for phase, skipped in [(p, s) for p in ledger.phases for s in p.skipped]:
        print(f"\nstep {skipped.step:,}, phase {phase.name} ({phase.dataset}), draws {skipped.start:,} to {skipped.stop - 1:,}: {skipped.reason}")
        for draw, origin in enumerate(origins(phase, skipped.start, skipped.stop, data.shards), skipped.start):
            told = ", ".join(f"{file} document {n:,}" for file, n in origin.documents) or "its files are not here; --data PATH says where they are"
            tokens = ", ".join(f"{start:,} to {stop - 1:,}" for start, stop in origin.pieces) or "packed"
            print(f"  draw {draw:,}: {origin.shard.name}, tokens {tokens}: {told}")
    if not any(phase.skipped for phase in ledger.phases):
        print("no step was skipped")


# ---------------------------------------------------------------- diff


def _diff(args) -> None:
    (_, a, line_a), (_, b, line_b) = _open(args.run), _open(args.other)
    print(f"A {line_a}\nB {line_b}")
    from llm.data.seen import seen_by_unit

    units_a, units_b = seen_by_unit(a), seen_by_unit(b)
    both = [unit for unit in units_a if units_a[unit] and units_b.get(unit)]
    print(f"\nseen by both: {len(both):,} units of text, {sum(units_a[u] != units_b[u] for u in both):,} of them not as far by one as by the other")
    _tell_more("A", a, units_a, units_b)
    _tell_more("B", b, units_b, units_a)


def _tell_more(name: str, ledger, mine: dict[str, float], theirs: dict[str, float]) -> None:
    """The shards with text that this run has seen more of than the other."""
    more = {unit for unit, fraction in mine.items() if fraction > theirs.get(unit, 0.0)}
    alone = sum(not theirs.get(unit) for unit in more)
    print(f"\nonly {name} has seen: {alone:,} units of text" + (f"; further than the other: {len(more) - alone:,}" if len(more) > alone else ""))
    for shard in {s.shard_id: s for phase in ledger.phases for s in phase.shards}.values():
        if here := more.intersection(shard.unit_ids):
            unit = next(iter(here))
            print(f"  {_percent(mine[unit]):>8}, the other {_percent(theirs.get(unit, 0.0)):>8}  "
                  f"{len(here):,} of {len(set(shard.unit_ids)):,} units  {shard.n_tokens:>14,} tokens  {shard.name}")  # fmt: skip


# ---------------------------------------------------------------- seen


def _seen(args) -> None:
    from llm.data.seen import seen_by_unit

    manifest, ledger, line = _open(args.run, args.step)
    print(line)
    by_unit = seen_by_unit(ledger)
    is_shard = args.file.name.endswith((".bin", ".meta.json"))
    data = _shards_at_hand(manifest, args)
    weights = _units_of_shard(args.file) if is_shard else _units_of_text(args, data.sources, set(by_unit))
    held_out = sum(u.get("docs", 0) for s in data.shards.values() if s.meta.role == "val" for u in s.meta.units if u["unit_id"] in weights)
    share = sum(weights[unit] * by_unit.get(unit, 0.0) for unit in weights) / max(1, sum(weights.values()))
    whole = all(by_unit.get(unit) == 1.0 for unit in weights)
    answer = "fully" if whole else f"partly ({_percent(share)})" if any(by_unit.get(unit) for unit in weights) else "never"
    print(f"{args.file}: {answer}")
    held = [unit for unit in weights if unit in by_unit]
    print(f"  {len(held):,} of its {len(weights):,} units of text are in the run's data" + ("" if held or is_shard else _hint(args.separator)))
    for phase in ledger.phases:
        _tell_phase(phase, set(weights))
    if held_out and not is_shard:
        print(f"  {held_out:,} of its documents are held out for validation and never trained on")


def _hint(separator: str | None) -> str:
    return "" if separator else "; if it was tokenized with --separator, --text-field or --format, give the same here"


def _tell_phase(phase, units: set[str]) -> None:
    here = [(index, shard) for index, shard in enumerate(phase.shards) if units.intersection(shard.unit_ids)]
    if not here:
        return
    masks = [phase.seen_samples(index) for index, _ in here]
    share = sum(int(mask.sum()) for mask in masks) / max(1, sum(mask.size for mask in masks))
    n_units = len(units.intersection(unit for _, shard in here for unit in shard.unit_ids))
    steps = f"steps {phase.first_step:,} to {phase.last_step:,}" if phase.first_step else "not begun"
    print(f"  phase {phase.name} ({phase.dataset}), {steps}: {n_units:,} units, "
          f"{_percent(share)} of their {len(here):,} shards: {', '.join(shard.name for _, shard in here[:5])}")  # fmt: skip


def _units_of_shard(path: Path) -> dict[str, int]:
    """Its units and their bytes. The shard is read whole: a damaged one proves nothing."""
    from llm.data.manifest import find_shards
    from llm.data.shards import verify_shard
    from llm.log import progress

    (shard,) = find_shards([path], None)
    if shard.meta.role != "train":
        log.warning(f"{path}: a validation shard; those are never trained on")
        return {f"validation {path}": 1}
    with progress(shard.meta.files["bin"]["bytes"], "reading the shard", "bytes") as bar:
        verify_shard(shard, bar)
    return {unit["unit_id"]: max(1, unit["bytes"]) for unit in shard.meta.units}


def _units_of_text(args, sources: list[dict], known: set[str]) -> dict[str, int]:
    from llm.corpus.options import read_options
    from llm.corpus.recognise import units_of_file
    from llm.log import progress

    options = read_options(args)
    with progress(args.file.stat().st_size if args.file.exists() else 0, "reading the file", "bytes") as bar:
        units = units_of_file(args.file, sources, known, options, bar.advance)
    return {unit.unit_id: unit.n_bytes for unit in units}


def _percent(fraction: float) -> str:
    """Rounded down: 100.00 % means all of it."""
    return f"{int(fraction * 10_000) / 100:.2f} %"


COMMANDS = {"show": _show, "verify": _verify, "skipped": _skipped, "diff": _diff, "seen": _seen}

if __name__ == "__main__":
    cli.run(main)
