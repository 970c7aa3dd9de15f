"""A run, or several against each other, as one HTML file that opens offline, and its plots as PNG.

python tools/report.py checkpoints/toy
python tools/report.py --compare checkpoints/toy checkpoints/other
"""

from pathlib import Path

from llm import cli
from llm.log import UserError, result


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("run", nargs="?", metavar="RUN", help="a run's folder, or that of its logs")
    parser.add_argument("--compare", nargs="+", metavar="RUN", help="curves over each other, what differs in their configs, final figures")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (logs/report of the first run)")
    args = parser.parse_args()
    if bool(args.run) == bool(args.compare):
        parser.error("give one run's folder, or --compare with two or more")
    named = args.compare or [args.run]
    if args.compare and len({Path(run).resolve() for run in named}) < max(2, len(named)):
        raise UserError(f"--compare {' '.join(named)}: give two different runs or more; for one run leave --compare out.")

    from llm.report.page import write_report
    from llm.report.record import read_run

    runs = [read_run(run) for run in named]
    if len({run.name for run in runs}) < len(runs):
        for run, given in zip(runs, named, strict=True):
            run.name = given
    folder = args.out or runs[0].logs / "report"
    try:
        page = write_report(runs, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}). Choose another folder with --out FOLDER.") from None
    result(f"{page}")


if __name__ == "__main__":
    cli.run(main)
