"""What a model has been trained on, read from the ledger in its newest sound checkpoint; the model is not loaded.

  python tools/ledger.py show checkpoints/toy
  python tools/ledger.py verify checkpoints/toy            recount every sample, and find every shard again
  python tools/ledger.py skipped checkpoints/toy           steps whose update was refused: why, which files and documents
  python tools/ledger.py untrained checkpoints/toy         what is left: samples that no phase has taken, files in no phase
  python tools/ledger.py diff checkpoints/toy checkpoints/other
  python tools/ledger.py seen checkpoints/toy my-text.txt  never, partly or fully, whatever the file is called

`show`, `seen` and `diff` go back through --init-from, --anneal, exports and imports, as far as that is recorded.
`seen` knows whole files by content, and compares other documents by windows of their tokens: cut-outs and single
documents of a test set are found.
"""

import json
from pathlib import Path

from llm import cli, durable
from llm.log import UserError, log


class NotVerified(UserError):
    """The ledger's claims and the recount, or the data, do not agree."""


def main() -> None:
    parser = cli.parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(HELP))
    add = {name: commands.add_parser(name, help=text) for name, text in HELP.items()}
    for name in ("show", "verify", "skipped", "untrained", "seen"):
        add[name].add_argument("run", help="a run's folder, or one of its checkpoints")
        add[name].add_argument("--step", type=int, help="the checkpoint of this step instead of the newest")
    for name in ("verify", "skipped", "untrained", "seen"):
        add[name].add_argument("--data", nargs="+", metavar="PATH", help="where its shards lie now, if not where the run's config says")
    add["verify"].add_argument("--quick", action="store_true", help="do not read the shards' tokens; their sizes and records only")
    add["diff"].add_argument("run", metavar="run_a")
    add["diff"].add_argument("other", metavar="run_b")
    add["seen"].add_argument("file", type=Path, help="raw text, a .jsonl of ids, or a shard's .bin or .meta.json")
    add["seen"].add_argument("--documents", type=Path, metavar="FILE", help="write what was found of each document compared, as JSON lines")
    add["seen"].add_read_options()
    args = parser.parse_args()
    COMMANDS[args.command](args)


HELP = {
    "show": "phases, files, percentages and steps; what a run's base was trained on before",
    "verify": "recompute the plan, count every sample, and look for the shards; exit code 2 if anything does not agree",
    "skipped": "the steps whose update was not applied: the reason, and the files and documents of their samples",
    "untrained": "what no phase has taken: samples and tokens of each shard, and files that are in no phase",
    "diff": "which text one run has been trained on and the other has not, by content",
    "seen": "whether a file, or part of it, has been trained on, by content",
}


def _open(run: str, step: int | None = None):
    """The checkpoint's manifest, its ledger and a line that says which one it is."""
    from llm.checkpoint.resume import open_checkpoint

    return _described(open_checkpoint(run, step))


def _described(checkpoint):
    from llm.data.ledger import Ledger

    manifest = checkpoint.manifest
    digest = f", data digest {manifest.chain[:16]}" if manifest.chain else ""
    line = f"{checkpoint.folder}: step {manifest.step:,}, {manifest.tokens_seen:,} tokens trained on{digest}"
    return checkpoint, Ledger.from_json(manifest.ledger), line


def _shards_at_hand(args, configured: list[str]):
    from llm.data.at_hand import ShardsAtHand

    return ShardsAtHand(args.data or configured)


def _configured(checkpoint) -> list[str]:
    from llm.data.at_hand import configured_paths

    return configured_paths(checkpoint.manifest.config)


def _show(args) -> None:
    from llm.data.lineage import history_of
    from llm.data.seen import seen_view, view_lines

    checkpoint, ledger, line = _open(args.run, args.step)
    history = history_of(checkpoint)
    print("\n".join([line, *history.lines(), *view_lines(seen_view(ledger))]))


# ---------------------------------------------------------------- verify


def _verify(args) -> None:
    from llm.checkpoint.invariants import contradictions
    from llm.checkpoint.resume import open_checkpoint
    from llm.data.audit import audit_phase, step_problems
    from llm.log import progress

    checkpoint = open_checkpoint(args.run, args.step, rules={})  # contradictions are told below
    checkpoint, ledger, line = _described(checkpoint)
    manifest = checkpoint.manifest
    print(line)
    data = _shards_at_hand(args, _configured(checkpoint))
    problems = contradictions(checkpoint.folder, manifest) + step_problems(ledger, manifest.step)
    if data.is_reachable:
        problems += data.problems(ledger, args.quick)
        print(f"shards: {data.count(ledger)} found by content, {'not read (--quick)' if args.quick else 'every byte read'}")
    else:
        print(f"shards: {data.where()}, so they were not looked for; --data PATH says where they are now")
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

    checkpoint, ledger, line = _open(args.run, args.step)
    print(line)
    data = _shards_at_hand(args, _configured(checkpoint))
    for phase, skipped in [(p, s) for p in ledger.phases for s in p.skipped]:
        print(f"\nstep {skipped.step:,}, phase {phase.name} ({phase.dataset}), draws {skipped.start:,} to {skipped.stop - 1:,}: {skipped.reason}")
        for draw, origin in enumerate(origins(phase, skipped.start, skipped.stop, data.shards), skipped.start):
            told = ", ".join(f"{file} document {n:,}" for file, n in origin.documents) or "its files are not here; --data PATH says where they are"
            tokens = ", ".join(f"{start:,} to {stop - 1:,}" for start, stop in origin.pieces) or "packed"
            print(f"  draw {draw:,}: {origin.shard.name}, tokens {tokens}: {told}")
    if not any(phase.skipped for phase in ledger.phases):
        print("no step was skipped")


# ---------------------------------------------------------------- untrained


def _untrained(args) -> None:
    from llm.data.at_hand import configured_ids
    from llm.data.import_ids import import_name
    from llm.data.lineage import history_of
    from llm.data.seen import seen_by_unit
    from llm.data.untrained import files_in_no_phase, untrained

    checkpoint, ledger, line = _open(args.run, args.step)
    print(line)
    manifest, data = checkpoint.manifest, _shards_at_hand(args, _configured(checkpoint))
    files = [path for path in configured_ids(manifest.config) if path.is_file()]
    imports = {import_name(path, manifest.tokenizer_fingerprint, manifest.config["model"]["seq_len"]): path for path in files}
    left = untrained(ledger, data, set(imports))
    *bases, _ = history_of(checkpoint).runs
    by_base = seen_by_unit(*(base.ledger for base in bases))
    for rest in left:
        of = f" ({', '.join(rest.sources[:3])}{' and more' if len(rest.sources) > 3 else ''})" if rest.sources else ""
        where = f"phase {rest.phase}" if rest.phase else "in no phase"
        samples = f"{rest.samples:,} of {rest.of_samples:,} samples, " if rest.phase else ""
        before = ", trained on by a base of the run" if any(by_base.get(unit) for unit in rest.unit_ids) else ""
        print(f"  {samples}{rest.tokens:,} of {rest.of_tokens:,} tokens  {rest.shard}{of}: {where}{before}")
    names = files_in_no_phase(ledger, data)
    print(f"left untrained: {sum(rest.tokens for rest in left):,} tokens in {len(left):,} shards; files in no phase: {', '.join(names) or 'none'}")
    for path in (path for name, path in imports.items() if name not in {s.meta.name for s in data.shards.values()}):
        print(f"not counted: what has changed in {path} since it was imported last")
    if not data.is_reachable:
        print(f"not looked for: shards that no phase holds, for {data.where()}; --data PATH says where they are now")


# ---------------------------------------------------------------- diff


def _diff(args) -> None:
    from llm.data.lineage import history_of
    from llm.data.seen import seen_by_unit

    (a, _, line_a), (b, _, line_b) = _open(args.run), _open(args.other)
    histories = history_of(a), history_of(b)
    for name, line, history in zip("AB", (line_a, line_b), histories, strict=True):
        print("\n".join([f"{name} {line}", *history.lines(with_phases=False)]))
    ledgers_a, ledgers_b = ([run.ledger for run in history.runs] for history in histories)
    units_a, units_b = seen_by_unit(*ledgers_a), seen_by_unit(*ledgers_b)
    both = [unit for unit in units_a if units_a[unit] and units_b.get(unit)]
    print(f"\nseen by both: {len(both):,} units of text, {sum(units_a[u] != units_b[u] for u in both):,} of them not as far by one as by the other")
    _tell_more("A", ledgers_a, units_a, units_b)
    _tell_more("B", ledgers_b, units_b, units_a)


def _tell_more(name: str, ledgers: list, mine: dict[str, float], theirs: dict[str, float]) -> None:
    """The shards with text that this run has seen more of than the other."""
    from llm.data.seen import percent

    more = {unit for unit, fraction in mine.items() if fraction > theirs.get(unit, 0.0)}
    alone = sum(not theirs.get(unit) for unit in more)
    print(f"\nonly {name} has seen: {alone:,} units of text" + (f"; further than the other: {len(more) - alone:,}" if len(more) > alone else ""))
    for shard in {s.shard_id: s for ledger in ledgers for phase in ledger.phases for s in phase.shards}.values():
        if here := more.intersection(shard.unit_ids):
            unit = next(iter(here))
            print(f"  {percent(mine[unit]):>8}, the other {percent(theirs.get(unit, 0.0)):>8}  "
                  f"{len(here):,} of {len(set(shard.unit_ids)):,} units  {shard.n_tokens:>14,} tokens  {shard.name}")  # fmt: skip


# ---------------------------------------------------------------- seen


def _seen(args) -> None:
    from llm.corpus.seen_lines import answer_lines
    from llm.corpus.seen_text import Records, answer
    from llm.data.lineage import history_of
    from llm.log import progress
    from llm.tokenizer import load_tokenizer

    if args.documents and not args.documents.parent.is_dir():
        raise UserError(f"--documents {args.documents}: there is no folder {args.documents.parent}.")
    checkpoint, _, line = _open(args.run, args.step)
    print(line)
    history, tokenizer = history_of(checkpoint), load_tokenizer(checkpoint.folder / "tokenizer")
    configured = list(dict.fromkeys(path for run in history.runs for path in run.data))
    records = Records(history, _shards_at_hand(args, configured), tokenizer.fingerprint)
    asked, found = _asked(args, checkpoint, records, tokenizer), []
    n_tokens = sum(shard.meta.n_tokens for shard in records.shards)
    with progress(n_tokens, "comparing", "tokens") as bar:
        told = answer(asked, records, bar.advance, found.append if args.documents else lambda _: None)
    if args.documents:
        _write_lines(args.documents, found)
    print("\n".join(answer_lines(args.file, asked, told, records)))


def _write_lines(path: Path, records: list[dict]) -> None:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    try:
        durable.write_text(path, "".join(lines))
    except OSError as error:
        raise UserError(f"--documents {path}: cannot be written ({error.strerror}).") from None


def _asked(args, checkpoint, records, tokenizer):
    from llm.corpus.conversations import kept_template
    from llm.corpus.options import read_options
    from llm.corpus.seen_text import asked_ids, asked_shard, asked_text
    from llm.data.import_ids import holds_ids
    from llm.log import progress

    if args.file.name.endswith((".bin", ".meta.json")):
        return asked_shard(_whole_shard(args.file), tokenizer.fingerprint)
    if args.file.name.endswith(".jsonl") and holds_ids(args.file):
        return asked_ids(args.file, records, tokenizer)
    options = read_options(args, kept_template(checkpoint.folder))
    size = args.file.stat().st_size if args.file.exists() else 0
    with progress(size, "reading the file", "bytes") as bar:
        return asked_text(args.file, records, options, tokenizer, bar.advance)


def _whole_shard(path: Path):
    """The shard is read whole: a damaged one proves nothing."""
    from llm.data.manifest import find_shards
    from llm.data.shards import verify_shard
    from llm.log import progress

    (shard,) = find_shards([path], None)
    if shard.meta.role != "train":
        log.warning(f"{path}: a validation shard; those are never trained on, and its documents are looked for in others")
    with progress(shard.meta.files["bin"]["bytes"], "reading the shard", "bytes") as bar:
        verify_shard(shard, bar)
    return shard


COMMANDS = {"show": _show, "verify": _verify, "skipped": _skipped, "untrained": _untrained, "diff": _diff, "seen": _seen}

if __name__ == "__main__":
    cli.run(main)
