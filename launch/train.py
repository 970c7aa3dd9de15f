"""Train a model, or go on training it: the same command again resumes where the run stands.

  python launch/train.py --config configs/toy.yaml
  torchrun --nproc-per-node 2 launch/train.py --config configs/toy.yaml --steps-today 200
  deepspeed --num_gpus 2 launch/train.py --config configs/toy.yaml engine.zero_stage=2

SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 end a sitting: one checkpoint, then out; once more leaves at once. They may go to one
worker or to the launcher. torchrun passes SIGUSR1 on and waits more than 30 s for a large checkpoint only when told (torch 2.11: not at all):
  TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300 torchrun --signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 ...

Exit codes: 0 over, 2 your mistake, 3 needs a person (numbers gone bad, no room, no progress), 75 a hang or a lost rank: run it again.
exit.json in the run's logs says why. With torchrun --max-restarts a run that fails again and again without progress gives up with 3.
"""

import signal
import time

STARTED_AT = time.monotonic()

from llm import cli  # noqa: E402 - the clock above counts imports as well


def main() -> None:
    parser = _parser()
    args = parser.parse_args()
    if args.from_step is not None and (args.fresh or args.init_from):
        parser.error("--from-step goes on from a checkpoint of this very run: leave out --fresh and --init-from")
    if args.anneal is not None and (args.fresh or args.init_from):
        parser.error("--anneal begins with a checkpoint of this very run: leave out --fresh and --init-from")
    if args.anneal is not None and args.anneal <= 0:
        parser.error(f"--anneal {args.anneal}: give the number of tokens to decay over, such as 20M")
    from llm import dist
    from llm.config import load_config
    from llm.train.launcher_watch import watch_launcher

    if dist.has_launcher():
        watch_launcher()  # before torch is imported, which takes seconds
    overrides = [*args.overrides, *([f"engine.device={args.device}"] if args.device else [])]
    if args.rechunk:
        overrides.append("data.rechunk=true")
    if dist.read_environment()[1] > 1:
        # Python's own handler would not run while this process waits in native code for others; training installs its own
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    with dist.joined() as world:
        cfg = world.together(lambda: load_config(args.config, overrides, preset=args.model))
        world = world.on(world.together(lambda: dist.pick_device(cfg.engine.device, world)))

        from llm.train.phases import Wish
        from llm.train.run import Options, train

        wish = world.together(lambda: Wish(args.only_new, args.reset_epoch, args.dataset, args.replay))
        accepted = tuple(args.accept_change or ())
        options = Options(
            STARTED_AT,
            steps_today=args.steps_today,
            minutes_today=args.minutes_today,
            tokens_today=args.tokens_today,
            wish=wish,
            init_from=args.init_from,
            anneal=args.anneal,
            fresh=args.fresh,
            accept_change=accepted,
            from_step=args.from_step,
            steal_lock=args.steal_lock,
            retry_anyway=args.retry_anyway and not dist.is_restarted(),
            write_samples=_write_samples(cfg) if cfg.log.sample_prompts else None,
        )
        train(cfg, world, options, tasks)


def tasks(cfg, world):
    """What eval.tasks asks for, as a function that training calls; their data are read now, so that what is wrong with them is told now."""
    if not cfg.eval.tasks:
        return None
    from llm.eval.in_training import read_tasks

    return read_tasks(cfg.eval, world).measure


def _write_samples(cfg):
    from llm.generate.samples import write_samples  # here, for training does not know generation

    return write_samples


def _parser() -> cli.Parser:
    parser = cli.parser(__doc__)
    parser.add_config()
    today = parser.add_argument_group("this sitting")
    today.add_argument("--steps-today", type=int, metavar="N", help="stop after N steps, save, and go on another day")
    today.add_argument("--minutes-today", type=float, metavar="M", help="stop in time to have saved within M minutes, start-up included")
    today.add_argument("--tokens-today", type=cli.amount, metavar="N", help="stop after the step with which N tokens were trained on: 500k, 20M, 1G")
    data = parser.add_argument_group("which data")
    data.add_argument("--only-new", action="store_true", help="finish the open phase, then train on text the run has not held yet")
    data.add_argument("--replay", type=float, metavar="PART", help="with --only-new: this part of the samples, such as 0.1, from old data again")
    data.add_argument("--dataset", metavar="NAME", help="train on this one of the datasets in data.data_path")
    data.add_argument("--reset-epoch", action="store_true", help="another pass over data that the run has finished")
    data.add_argument("--rechunk", action="store_true", help="allow shards that were made for another seq_len")
    start = parser.add_argument_group("starting and going on")
    start.add_argument("--from-step", type=int, metavar="N", help="go on from the checkpoint of step N; newer ones stay as they are")
    start.add_argument("--anneal", type=cli.amount, metavar="N", help="fork the run and let its learning rate go down to the end over N tokens")
    start.add_argument("--init-from", metavar="RUN|FOLDER", help="start a new run from another one's weights")
    start.add_argument("--fresh", action="store_true", help="move an existing run of this name aside and begin at step 0")
    start.add_argument("--accept-change", action="append", metavar="FIELD", help="go on although this setting has changed, for example train.lr")
    start.add_argument("--steal-lock", action="store_true", help="take over a run whose lock is another host's; be sure that its job is dead")
    start.add_argument("--device", help="cpu, cuda, cuda:N or mps instead of the config's engine.device")
    start.add_argument("--retry-anyway", action="store_true", help="start once more where several sittings have failed without progress")
    parser.add_argument("--local-rank", help="given by the deepspeed launcher; not used")
    return parser


if __name__ == "__main__":
    cli.run(main)
