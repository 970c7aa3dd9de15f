"""Continue a text with a trained model:  python launch/generate.py checkpoints/toy --prompt "def main(" """

import json
import sys
import time
from contextlib import suppress
from itertools import chain
from pathlib import Path

from llm import cli, durable
from llm.log import UserError, log, progress


def main() -> None:
    args = arguments()
    if args.chat:
        raise UserError(f"--chat: chats have a command of their own: python launch/chat.py {args.run}")
    for flag, value in {"--max-tokens": args.max_tokens, "--batch-size": args.batch_size}.items():
        if value < 1:
            raise UserError(f"{flag} is {value}, but should be at least 1.")
    if args.nonstop and not (args.prompt or args.prompt_file):
        raise UserError("--nonstop writes on from one text: give it with --prompt or --prompt-file.")
    if "" in args.stop:
        raise UserError("--stop is empty. Give the text to stop at, for example --stop END.")
    if args.output and not args.output.parent.is_dir():
        raise UserError(f"--output {args.output}: there is no folder {args.output.parent}. Make it first.")
    texts = prompts(args)

    import torch  # only now: --help and a mistyped flag answer at once

    from llm.generate.load import choose_device, choose_dtype, dtype_name, load_run
    from llm.generate.sampling import Sampling
    from llm.model.flops import count_params

    sampling = Sampling(args.temp, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    model, tokenizer, checkpoint = load_run(args.run, args.step, device=device, dtype=dtype, packed=True)
    seed = torch.seed() % 2**32 if args.seed is None else args.seed
    log.info(f"{args.run}, step {checkpoint.manifest.step:,}, on {device} in {dtype_name(dtype)}, seed {seed}")
    log.debug(f"{count_params(model.cfg):,} weights in {model.dtype}, context {model.cfg.seq_len:,}; {sampling}")
    stop_ids = tuple(tokenizer.special_ids.values()) if args.special_tokens else ()
    options = dict(max_tokens=10**15 if args.nonstop else args.max_tokens, sampling=sampling, stop=args.stop, stop_ids=stop_ids)
    if args.interactive:
        interact(args, model, tokenizer, seed, options)
    elif args.prompts:
        write_batches(args, model, tokenizer, texts, seed, options)
    else:
        write_on(args, model, tokenizer, texts[0], seed, options)


def arguments():
    parser = cli.parser(__doc__)
    parser.add_generation_options(max_tokens=200)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text to continue; - reads it from standard input")
    source.add_argument("--prompt-file", type=Path, metavar="FILE", help="a UTF-8 file with the text to continue")
    source.add_argument("--prompts", type=Path, metavar="FILE", help="many texts: one a line, or in .jsonl as strings or 'prompt' or 'text'")
    source.add_argument("--interactive", action="store_true", help="ask for one text after another; Ctrl-C stops the answer, Ctrl-D leaves")
    source.add_argument("--chat", action="store_true", help="see launch/chat.py")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="how many of --prompts are written at once (%(default)s)")
    parser.add_argument("--nonstop", action="store_true", help="write until Ctrl-C, whatever --max-tokens; after each text another")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop before this text; may be given several times")
    parser.add_argument("--special-tokens", action="store_true", help="names such as <|im_end|> in the prompt are tokens, and any ends the text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the text there too; with --prompts as JSON lines")
    parser.add_argument("--no-delay", action="store_true", help="taken, and changes nothing: text is shown as fast as it is made")
    return parser.parse_args()


def prompts(args) -> list[str]:
    """The texts to continue; none for --interactive."""
    if args.interactive:
        return []
    path = args.prompts or args.prompt_file
    try:
        text = path.read_text(encoding="utf-8") if path else sys.stdin.read() if args.prompt == "-" else args.prompt
        lines = [line for line in text.split("\n") if line.strip()] if args.prompts else [text]  # splitlines also cuts at characters of a text
        texts = [_text_of(json.loads(line)) for line in lines] if args.prompts and path.suffix == ".jsonl" else lines
        "".join(texts).encode()  # half a character, which JSON and a command line may hold, is a ValueError
    except (OSError, ValueError) as error:
        raise UserError(f"{path or '--prompt'}: cannot be read as a prompt ({error}).") from None
    if not texts or not all(texts):
        raise UserError(f"{path or '--prompt'}: the prompt is empty. Give the model at least one character to continue.")
    return texts


def _text_of(record) -> str:
    text = record.get("prompt", record.get("text")) if isinstance(record, dict) else record
    if not isinstance(text, str):
        raise ValueError(f"a line is neither a string nor has 'prompt' or 'text': {str(record)[:80]}")
    return text


def encoded(args, model, tokenizer, text: str):
    from llm.generate.generator import prompt_ids

    ids, seq_len = prompt_ids(tokenizer, text, args.special_tokens), model.cfg.seq_len
    if len(ids) > seq_len:
        log.warning(f"the prompt has {len(ids):,} tokens, the model sees {seq_len:,}: only the last {seq_len:,} are used")
    return ids


def write_on(args, model, tokenizer, text: str, seed: int, options: dict) -> None:
    """One text on the screen, or with --nonstop one after another."""
    shown: list[str] = []
    try:
        while True:
            show(args, model, tokenizer, text, seed, options, shown)
            if not args.nonstop:
                break
            seed += 1
            shown.append("\n\n")
            print()
    except KeyboardInterrupt:
        if not args.nonstop:
            raise
        print()
    if args.output:
        save(args.output, "".join(shown))


def show(args, model, tokenizer, text: str, seed: int, options: dict, shown: list[str]) -> None:
    """Print prompt and continuation as it comes; `shown` has all of it, also when Ctrl-C ends it."""
    from llm.generate.generator import Writing

    writing, started_at = Writing(model, tokenizer, encoded(args, model, tokenizer, text), seed=seed, **options), time.monotonic()
    for piece in chain([text], writing):
        shown.append(piece)
        print(as_shown(piece), end="", flush=True)
    print()
    tell_speed(writing.n_tokens, time.monotonic() - started_at, f", ended by {writing.finish_reason}")


def interact(args, model, tokenizer, seed: int, options: dict) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401 - input() then has history and editing
    sys.stdin.reconfigure(errors="replace")  # a key that is no UTF-8 is not the end of it

    while True:
        try:
            text = input("text> ")
            if text:
                show(args, model, tokenizer, text, seed, options, [])
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print("\n(stopped; Ctrl-D leaves)")
        seed += 1


def write_batches(args, model, tokenizer, texts: list[str], seed: int, options: dict) -> None:
    """All of `texts`, a batch at a time, those of like length together; in their own order on the screen and in --output."""
    from llm.generate.generator import generate_rows, stream_text, until_stop

    stops, started_at, n_tokens = options.pop("stop"), time.monotonic(), 0
    ids = [encoded(args, model, tokenizer, text) for text in texts]
    order, written = sorted(range(len(ids)), key=lambda i: len(ids[i])), {}
    with progress(len(ids), "prompts") as bar:
        for first in range(0, len(order), args.batch_size):
            batch = order[first : first + args.batch_size]
            new = [[] for _ in batch]
            for row, token in generate_rows(model, tokenizer, [ids[i] for i in batch], seed=seed + first, **options):
                new[row].append(token)
            written |= {i: "".join(until_stop(stream_text(tokenizer, row), stops)) for i, row in zip(batch, new, strict=True)}
            n_tokens += sum(map(len, new))
            bar.advance(len(batch))
    tell_speed(n_tokens, time.monotonic() - started_at)
    if args.output:
        save(args.output, "".join(json.dumps({"prompt": t, "text": written[i]}, ensure_ascii=False) + "\n" for i, t in enumerate(texts)))
        return
    for i, text in enumerate(texts):
        print(f"--- {i + 1}\n{as_shown(text + written[i])}")


def as_shown(text: str) -> str:
    from llm.generate.generator import visible

    return visible(text) if sys.stdout.isatty() else text


def tell_speed(n_tokens: int, seconds: float, more: str = "") -> None:
    log.debug(f"{n_tokens:,} tokens in {seconds:.1f} s, {n_tokens / seconds:.1f} a second{more}")


def save(path: Path, text: str) -> None:
    try:
        durable.write_text(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}).") from None


if __name__ == "__main__":
    cli.run(main)
