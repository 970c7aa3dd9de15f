"""Look whether this machine, or this group of machines, can train: about twenty seconds, one line a finding, and what to do about it.

  python tools/doctor.py
  python tools/doctor.py --config configs/toy.yaml
  python tools/doctor.py --only compiler,run-folder
  torchrun --nproc-per-node 2 tools/doctor.py --config configs/toy.yaml

Without a launcher it starts two ranks here, or one for each GPU. Exit codes: 0 ok, perhaps with warnings; 1 something fails; 2 your mistake.
"""

import json
import os
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from llm import cli
from llm.log import UserError, log, result

STARTED_AT = time.monotonic()
NAME_WIDTH = 14


def main() -> int:
    args = _arguments()
    from llm.config import load_config
    from llm.doctor.examination import ALONE, TOGETHER, Subject
    from llm.doctor.visit import visit

    cfg = load_config(args.config, args.overrides, preset=args.model) if args.config or args.model else None
    if args.overrides and not cfg:
        raise UserError(f"{' '.join(args.overrides)}: changes a config, but there is none. Give --config FILE or --model NAME.")
    names = frozenset(args.only.split(",")) if args.only else frozenset(ALONE + TOGETHER)
    if unknown := names.difference(ALONE, TOGETHER):
        raise UserError(f"--only {', '.join(sorted(unknown))}: what can be looked at is {', '.join(ALONE + TOGETHER)}.")
    folder = Path(args.folder) if args.folder else cfg.run_folder if cfg else Path("checkpoints")
    if args.json:  # gloo of torch 2.10 greets on standard output, from C++: that goes to standard error
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
    lines = []
    for line in visit(Subject(cfg, folder, names), args.peer):
        lines.append(line)
        if not args.json:
            (log.info if line.status == "ok" else result)(_text(line))
    count = Counter(line.status for line in lines)
    if args.json and lines:
        print(json.dumps([asdict(line) for line in lines], indent=1), file=out, flush=True)
    elif lines:
        result(f"\n{count['ok']} ok, {count['warn']} warn, {count['fail']} fail, in {time.monotonic() - STARTED_AT:.0f} s")
    return 1 if count["fail"] else 0


def _text(line) -> str:
    host = f"{line.host}: " if line.host else ""
    status = line.status.upper() if line.status == "fail" else line.status
    advice = f"\n{'':{NAME_WIDTH + 6}}-> {line.advice}" if line.advice else ""
    return f"{status:5} {line.name:{NAME_WIDTH}}{host}{line.found}{advice}"


def _arguments():
    parser = cli.parser(__doc__)
    parser.add_config()
    parser.add_argument("--folder", metavar="DIR", help="where checkpoints will go (default: the config's run, or checkpoints)")
    parser.add_argument("--only", metavar="NAME,...", help="look at these only: the names of the lines")
    parser.add_argument("--json", action="store_true", help="a list of lines as JSON: name, status, found, advice, host")
    parser.add_argument("--peer", help="given to the ranks that it starts itself; not to be used")
    return parser.parse_args()


if __name__ == "__main__":
    cli.run(main)
