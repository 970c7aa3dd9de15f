"""Draw a run's loss, validation and learning rate from its metrics.jsonl as one PNG.

  python tools/report.py checkpoints/toy
"""

import json
from pathlib import Path

from llm import cli
from llm.log import UserError, log


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("run", help="a run's folder, or the folder with its metrics.jsonl")
    parser.add_argument("--out", metavar="FILE", help="where to write; default: loss.png beside metrics.jsonl")
    args = parser.parse_args()
    metrics = next((p for p in (Path(args.run, "logs", "metrics.jsonl"), Path(args.run, "metrics.jsonl")) if p.exists()), None)
    if metrics is None:
        raise UserError(f"{args.run}: no metrics.jsonl here or in logs/. Give the folder of a run that has trained, such as checkpoints/toy.")
    out = Path(args.out) if args.out else metrics.with_name("loss.png")
    _draw(_by_step(metrics), out)
    log.info(f"{out}")


def _by_step(path: Path) -> list[dict]:
    """Records in the order of the steps; where a step was taken again after a rollback, only its last record counts."""
    latest: dict[tuple[int, str], dict] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the last line of a killed process may be cut off
        group = "val" if "val/loss" in record else "train"
        latest = {key: r for key, r in latest.items() if key[0] <= record["step"]}
        latest[record["step"], group] = record
    return list(latest.values())


def _draw(records: list[dict], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (losses, rates) = plt.subplots(2, 1, sharex=True, figsize=(9, 6), height_ratios=(3, 1), layout="constrained")
    for key, label, style in (("train/loss", "training", "-"), ("val/loss", "validation", "o-")):
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            losses.plot(*zip(*points, strict=True), style, label=label)
    losses.set_ylabel("loss (nats per token)")
    losses.grid(alpha=0.3)
    losses.legend()
    rates.plot(*zip(*[(r["step"], r["train/lr"]) for r in records if "train/lr" in r], strict=True))
    rates.set_ylabel("learning rate")
    rates.set_xlabel("optimizer step")
    rates.grid(alpha=0.3)
    figure.savefig(out, dpi=120)


if __name__ == "__main__":
    cli.run(main)
