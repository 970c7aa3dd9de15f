"""What a run has been trained on, read from the ledger in its newest sound checkpoint; the model is not loaded.

  python tools/ledger.py show checkpoints/toy
"""

from llm import cli


def main() -> None:
    parser = cli.parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="show")
    show = commands.add_parser("show", help="phases, files, percentages and steps")
    show.add_argument("run", help="a run's folder, or one of its checkpoints")
    show.add_argument("--step", type=int, help="the checkpoint of this step instead of the newest")
    args = parser.parse_args()
    _show(args.run, args.step)


def _show(run: str, step: int | None) -> None:
    from llm.checkpoint.resume import open_checkpoint
    from llm.data.ledger import Ledger, seen_view

    checkpoint = open_checkpoint(run, step)
    manifest = checkpoint.manifest
    print(f"{checkpoint.folder}: step {manifest.step:,}, {manifest.tokens_seen:,} tokens trained on, data digest {manifest.chain[:16]}")
    for phase in seen_view(Ledger.from_json(manifest.ledger))["phases"]:
        steps = f"steps {phase['first_step']:,} to {phase['last_step']:,}" if phase["first_step"] else "not begun"
        print(f"\nphase {phase['phase']} ({phase['dataset']}), {phase['state']}: {phase['percent_done']:.2f} % of {phase['epochs']} epochs, {steps}")
        for file in phase["files"]:
            print(f"  {file['percent_seen']:6.2f} %  {file['tokens']:>14,} tokens  {file['file']}")


if __name__ == "__main__":
    cli.run(main)
