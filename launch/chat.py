"""Talk to a model that was fine-tuned on chats:  python launch/chat.py checkpoints/sft-toy   (--web: a page; --serve: an API)"""

import sys
from contextlib import suppress
from pathlib import Path

from llm import cli
from llm.log import UserError, log, result


def main() -> None:
    args = arguments()
    if args.max_tokens < 1:
        raise UserError(f"--max-tokens is {args.max_tokens}, but should be at least 1.")

    import torch  # only now: --help and a mistyped flag answer at once

    from llm.chat.session import Assistant
    from llm.corpus.conversations import CHATML, kept_template, load_template
    from llm.generate.load import choose_device, choose_dtype, load_run
    from llm.generate.sampling import Sampling

    sampling = Sampling(args.temp, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    given = load_template(args.template) if args.template else None
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)

    def load(path, step) -> Assistant:
        model, tokenizer, checkpoint = load_run(path, step, device=device, dtype=dtype, packed=True)
        return Assistant(model, tokenizer, given or kept_template(checkpoint.folder) or CHATML, checkpoint.manifest.step)

    seed = torch.seed() % 2**32 if args.seed is None else args.seed
    if args.serve or args.web:
        serve(args, load, sampling)
    else:
        talk(args, load, sampling, seed)


def arguments():
    parser = cli.parser(__doc__)
    parser.add_generation_options(max_tokens=512)
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    parser.add_argument("--template", metavar="FILE", help="how conversations are written, as YAML (default: as in the fine-tuning, else ChatML)")
    group = parser.add_argument_group("other ways to talk")
    group.add_argument("--web", action="store_true", help="a page in the browser")
    group.add_argument("--serve", action="store_true", help="only the API that OpenAI's clients speak; --web has it too")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s: reached from this machine only)")
    group.add_argument("--port", type=int, default=8000, help="port to listen at (%(default)s; 0: any free one)")
    group.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a name under which others reach this server")
    group.add_argument("--queue", type=int, default=32, metavar="N", help="how many requests may wait; others are told to try later (%(default)s)")
    return parser.parse_args()


def talk(args, load, sampling, seed: int) -> None:
    from llm.chat.prompt import check
    from llm.chat.session import Session
    from llm.chat.terminal import converse
    from llm.generate.load import dtype_name

    with suppress(ImportError):
        import readline  # noqa: F401 - input() then has history and editing
    sys.stdin.reconfigure(errors="replace")  # a key that is no UTF-8 is not the end of the chat
    assistant = load(args.run, args.step)
    check(assistant.template, assistant.tokenizer)
    model, where = assistant.model, f"{args.run}, step {assistant.step:,}"
    log.info(f"{where}, on {model.device} in {dtype_name(model.dtype)}, seed {seed}. /help lists commands, Ctrl-D leaves.")
    converse(Session(assistant, sampling, args.max_tokens, seed, args.system))


def serve(args, load, sampling) -> None:
    from llm.chat.server import Limits, Server
    from llm.chat.worker import Worker, choices

    worker = Worker(choices(Path(args.run), args.step), load, n_waiting=args.queue)
    limits = Limits(max_tokens=args.max_tokens, seq_len=worker.seq_len)
    try:
        server = Server((args.host, args.port), worker, limits, sampling, args.system, names=args.allow_host, has_page=args.web)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {args.host} --port {args.port}: cannot be listened at ({error}). Try another --host or --port.") from None
    if not server.is_loopback:
        log.warning(f"everybody who reaches {args.host} can use this model, and nothing is encrypted. 127.0.0.1 is for this machine only.")
    result(f"{'page ' if args.web else ''}at {server.url}/ and API at {server.url}/v1, until Ctrl-C")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        log.info("stopped")
    finally:
        server.server_close()
        worker.close()


if __name__ == "__main__":
    cli.run(main)
