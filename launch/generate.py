"""Continue a text with a trained model:  python launch/generate.py checkpoints/toy --prompt "def main(" """

import sys
from pathlib import Path

from llm import cli
from llm.log import UserError, log


def main() -> None:
    args = arguments()
    text = prompt_text(args)
    if args.max_tokens < 1:
        raise UserError(f"--max-tokens is {args.max_tokens}, but should be at least 1.")

    import torch  # only now: --help and a mistyped flag answer at once

    from llm.generate.generator import generate_ids, prompt_ids, stream_text
    from llm.generate.load import DTYPES, choose_device, load_run
    from llm.generate.sampling import Sampling

    sampling = Sampling(args.temp, args.top_k, args.top_p)
    device = choose_device(args.device)
    dtype = DTYPES[args.dtype or ("fp32" if device == "cpu" else "bf16")]
    model, tokenizer, manifest = load_run(args.run, args.step, device=device, dtype=dtype)
    ids, seq_len = prompt_ids(tokenizer, text, args.special_tokens), model.cfg.seq_len
    if len(ids) > seq_len:
        log.warning(f"the prompt has {len(ids):,} tokens, the model sees {seq_len:,}: only the last {seq_len:,} are used")
    seed = torch.seed() % 2**32 if args.seed is None else args.seed
    log.info(f"{args.run}, step {manifest.step:,}, on {device}, seed {seed}")
    print(text, end="", flush=True)
    stop_ids = tuple(tokenizer.special_ids.values()) if args.special_tokens else ()
    new_ids = generate_ids(model, tokenizer, ids, max_tokens=args.max_tokens, sampling=sampling, seed=seed, stop_ids=stop_ids)
    for piece in stream_text(tokenizer, new_ids):
        print(piece, end="", flush=True)
    print()


def arguments():
    parser = cli.parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or that of one checkpoint")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to continue; - reads it from standard input")
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="a UTF-8 file with the text to continue")
    parser.add_argument("--special-tokens", action="store_true", help="names such as <|im_end|> in the prompt are tokens, and any ends the text")
    parser.add_argument("--max-tokens", type=int, default=200, metavar="N", help="stop after so many new tokens (%(default)s)")
    parser.add_argument("--temp", type=float, default=0.8, metavar="X", help="temperature; 0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="choose among the likeliest tokens that together hold probability P")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same text; left out: another text each time")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (%(default)s: the GPU if there is one)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the weights; left out: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument("--step", type=int, metavar="N", help="use the checkpoint of this step; left out: the newest")
    return parser.parse_args()


def prompt_text(args) -> str:
    source = args.prompt_file or "--prompt"
    try:
        text = args.prompt_file.read_text(encoding="utf-8") if args.prompt_file else sys.stdin.read() if args.prompt == "-" else args.prompt
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{source}: cannot be read as a prompt ({error}).") from None
    if not text:
        raise UserError(f"{source}: the prompt is empty. Give the model at least one character to continue.")
    return text


if __name__ == "__main__":
    cli.run(main)
