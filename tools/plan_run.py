"""Before renting GPUs: will the run fit, how long will it take, what will it cost? Needs no GPU, and no data yet.

  python tools/plan_run.py --config configs/toy.yaml
  python tools/plan_run.py --config configs/gpt-1b.yaml --gpus 8 --gpu h100 --hours-a-day 4 --price 2.5
  python tools/plan_run.py --config configs/gpt-1b.yaml --gpus 1,8,64 --gpu h200 --tokens 20G --json plan.json
  python tools/plan_run.py --config configs/toy.yaml --measure
  python tools/plan_run.py --config configs/toy.yaml --fit-minutes 10

--measure makes a few real steps on this machine, on random ids, and writes nothing: it puts the bytes that were planned beside those that were
counted, and plans with the speed that it found.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from llm import cli
from llm.log import log, progress, result

MEASURED_STEPS = 3


def main() -> None:
    args = _parser().parse_args()

    from llm.config import load_config
    from llm.plan import hardware, work

    numbers = ("mfu", "hours_a_day", "price", "network", "gpus_per_node", "fit_minutes")
    work.positive(**{name: getattr(args, name) for name in numbers})
    cfg = load_config(args.config, args.overrides, preset=args.model)
    data = work.find_data(cfg)
    cfg, assumed = work.settle_vocabulary(cfg, data)
    gpu = args.gpu or hardware.device_here()
    given, (cfg, guessed) = cfg.engine.precision, hardware.resolve_precision(cfg, hardware.find_device(gpu))
    mfu, measured = args.mfu or (1.0 if gpu == "cpu" else 0.4), None
    if args.fit_minutes:
        return _tell_steps(cfg, gpu, given, args.fit_minutes)
    _tell_model(cfg, [assumed, None if args.measure else guessed])
    if args.measure:
        cfg, measured = _measure(cfg, gpu, given)
        mfu = measured.pop("mfu") or mfu
    plans = [_plan(cfg, data, gpu, ranks, mfu, args, measured is not None) for ranks in args.gpus]
    if args.json:
        _write(args.json, cfg, plans, measured)


def _parser() -> cli.Parser:
    parser = cli.parser(__doc__)
    parser.add_config()
    parser.add_argument("--gpus", type=_counts, default=[1], metavar="N[,N]", help="how many GPUs; several numbers are planned one by one (1)")
    parser.add_argument(
        "--gpu", metavar="NAME", help="a100, a100-40gb, h100, h200, b200, l40s, 4090, or cpu, whose number is of processes (what is here)"
    )
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="in one machine (%(default)s)")
    parser.add_argument("--network", type=float, metavar="GB/S", help="between machines, all network cards of one together (as usual with such GPUs)")
    parser.add_argument("--mfu", type=float, metavar="X", help="part of the device's bf16 peak that training reaches (0.4, assumed)")
    parser.add_argument("--tokens", type=cli.amount, metavar="N", help="train on so many, 500M or 20G, instead of what config and data say")
    parser.add_argument("--hours-a-day", type=float, metavar="H", help="to count sittings")
    parser.add_argument("--price", "--price-per-hour", type=float, metavar="P", help="of one GPU for one hour, in your currency")
    parser.add_argument("--measure", action="store_true", help="make a few steps on this machine and plan with what they show")
    parser.add_argument(
        "--fit-minutes", type=float, metavar="M", help="how many steps this machine makes in M minutes, by real ones; --quiet: the number alone"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every row as JSON")
    return parser


def _counts(text: str) -> list[int]:
    import argparse

    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of GPUs; write 8, or 1,8,64")
    return counts


def _tell_model(cfg, notes: list[str | None]) -> None:
    from llm.plan import screen

    for line in [*screen.model_lines(cfg), *filter(None, notes)]:
        result(line)


def _tell_steps(cfg, gpu: str, precision: str, minutes: float) -> None:
    """Print how many steps of the config this machine makes in so many minutes, by real steps."""
    from llm.plan import candidates as cut
    from llm.plan import work

    tokens_per_s = _measured_steps(cfg, gpu, precision)[1]["tokens_per_s"]
    result(work.steps_in(60 * minutes, cfg, cut.global_rows(cfg, 1), tokens_per_s))


def _plan(cfg, data, gpu: str, ranks: int, mfu: float, args, mfu_is_measured: bool) -> dict:
    """Tell all that is known for so many ranks, and give it back as plain data."""
    from llm.plan import candidates as cut
    from llm.plan import screen, work

    network = args.network * 1e9 if args.network else None
    cluster = cut.cluster_of(gpu, ranks, args.gpus_per_node, network)
    everything = cut.candidates(cfg, cluster, mfu)
    configured = cut.as_configured(cfg, everything)
    best, rows = cut.fastest(everything, configured), cut.best_of_each_row(everything)
    rows = [c for c in dict.fromkeys((configured, best)) if c and c not in rows] + rows
    what = f"{ranks} x {gpu}" if gpu != "cpu" else f"{ranks} process{'es' * (ranks > 1)} on this machine's cpu"
    result(f"\n{what}, GiB on each (c: as the config says, >: fits and is fastest, !: does not fit)")
    for line in screen.table(rows, best, configured):
        result(line)
    if configured is None:
        why = "cannot be tried out under ZeRO-3" if cfg.train.batch_size == "auto" else f"does not divide what {ranks} ranks share"
        result(f"   the config's train.batch_size {cfg.train.batch_size} {why}; the rows above do")
    elif cfg.train.batch_size == "auto":
        result(f"   train.batch_size: auto would be {configured.plan.micro_rows}{'' if configured.fits else ', which does not fit'}")
    job = work.work_of(cfg, data, cut.global_rows(cfg, ranks), args.tokens)
    disk = work.disk_of(cfg, job)
    ways = list(cut.what_would_fit(cfg, cluster, mfu)) if best is None else []
    lines = screen.run_lines(best, job, disk, args.hours_a_day, args.price) if best else _refusal(rows, ways)
    for line in [*lines, *job.notes, *screen.assumption_lines(best or rows[0], mfu_is_measured)]:
        result(line)
    return {
        "ranks": ranks, "recommended": screen.as_data(best) if best else None, "rows": [screen.as_data(c) for c in everything],
        "would_fit": ways, "steps": job.steps, "tokens": job.tokens, "passes": job.passes, "disk_bytes": disk.total,
        "checkpoint_bytes": disk.checkpoint, "hours": screen.run_hours(best, job) if best else None, "notes": list(job.notes),
    }  # fmt: skip


def _refusal(rows: list, ways: list[str]) -> list[str]:
    least = min(rows, key=lambda c: c.memory.total)
    gib = 2**30
    state = sum(getattr(least.memory, kind) for kind in ("weights", "masters", "gradients", "moments")) / gib
    text = f"does not fit: the smallest row takes {least.memory.total / gib:,.1f} GiB, {state:,.1f} of it weights, gradients and moments; "
    return [f"{text}there are {least.cluster.device.usable / gib:,.1f}.", *(f"would fit: {way}" for way in ways or ["nothing in the table"])]


def _measure(cfg, gpu: str, precision: str) -> tuple:
    """Make a few steps and print planned beside counted bytes. The config with the precision that they had, and what was found."""
    from llm.model.flops import flops_per_token
    from llm.plan import hardware, screen
    from llm.plan.memory import memory_of

    few, found = _measured_steps(cfg, gpu, precision)
    device, speed = hardware.find_device(gpu), found["tokens_per_s"]
    for line in screen.measured_lines(memory_of(few, 1, device.kind), found["bytes"]):
        result(line)
    rate, how = speed * flops_per_token(cfg.model), f"in {few.engine.precision}, {found['threads']} threads, {found['device']}"
    result(f"{speed:,.0f} tokens/s, {rate / 1e9:,.0f} GFLOP/s {how}")
    return cfg.in_precision(found["precision"]), found | {"mfu": rate / device.flops}


def _measured_steps(cfg, gpu: str, precision: str) -> tuple:
    """A few steps of the config, in this precision, in a process of its own, one rank: the config that was measured, and what was found."""
    from llm.plan import candidates as cut
    from llm.plan import hardware

    here = hardware.device_here()
    if gpu != here:
        raise hardware.PlanError(f"--measure makes real steps, and this machine has {here}, not {gpu}. Leave --gpu out, or go to such a machine.")
    if cfg.engine.offload:
        raise hardware.PlanError("--measure counts what is on the device; with engine.offload it is not told apart. Add engine.offload=false.")
    cluster, micro_rows, accumulation = cut.cluster_of(gpu, 1, 8), cfg.train.batch_size, 2  # two show what accumulates; a whole batch may take long
    if micro_rows == "auto":
        micro_rows = cut.as_configured(cfg, cut.candidates(cfg, cluster, 1.0)).plan.micro_rows
    few = cut.candidate(cfg, cluster, 1.0, micro_rows * accumulation, micro_rows).cfg
    log.info(f"\nmeasuring {MEASURED_STEPS} steps of {accumulation} x {micro_rows} rows on {here}, random ids, one process ...")
    found = _census(few.in_precision(precision).model_dump_json())
    tokens = accumulation * micro_rows * cfg.model.seq_len
    return few.in_precision(found["precision"]), found | {"tokens_per_s": tokens / found["step_seconds"]}


def _census(config: str) -> dict:
    """What a process that makes the steps tells. Raises PlanError when it fails, for want of memory say."""
    from llm.plan.hardware import PlanError

    words, last = [sys.executable, "-m", "llm.engine.census", str(MEASURED_STEPS)], ""
    with tempfile.TemporaryFile("w+") as errors, progress(MEASURED_STEPS + 2, "measuring", "parts") as bar:
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
        process.stdin.write(config)
        process.stdin.close()
        for line in process.stdout:
            last = line
            if line.startswith("census:"):
                bar.advance()
        if process.wait():
            errors.seek(0)
            word = (errors.read().strip() or last.strip() or "no word").splitlines()[-1]
            raise PlanError(f"--measure: the steps ended with code {process.returncode}: {word}. Try a smaller train.batch_size.")
    return json.loads(last)


def _write(path: Path, cfg, plans: list[dict], measured: dict | None) -> None:
    from llm import durable
    from llm.log import UserError
    from llm.model.flops import count_params, flops_per_token

    report = {
        "config": cfg.model_dump(mode="json"), "parameters": count_params(cfg.model), "flops_per_token": flops_per_token(cfg.model),
        "plans": plans, "measured": measured,
    }  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(path, json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: cannot be written ({error.strerror}). Choose another file.") from error
    log.info(f"{path}: every row")


if __name__ == "__main__":
    cli.run(main)
