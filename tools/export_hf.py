"""Write a checkpoint as a Hugging Face folder, which transformers loads with no code of ours.

  python tools/export_hf.py checkpoints/toy --out export/toy
  python tools/export_hf.py checkpoints/toy --step 400 --dtype bf16 --out export/toy-400

Any checkpoint will do, saved on whatever number of ranks. Transformers itself is not needed here.
"""

import json
from pathlib import Path

from llm import cli, durable
from llm.log import UserError, log, progress


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or that of one checkpoint")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="must not exist yet")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step; left out: the newest")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the weights (%(default)s: exactly those trained)")
    parser.add_argument("--shard-bytes", type=cli.amount, default=5 * 10**9, metavar="N", help="at most so much in one file (5G)")
    args = parser.parse_args()
    export(args.run, args.out, args.step, args.dtype, args.shard_bytes)


def export(run: str | Path, out: Path, step: int | None = None, dtype: str = "fp32", shard_bytes: int = 5 * 10**9) -> None:
    """Raises UserError; then there is nothing at `out`."""
    import torch
    from safetensors import SafetensorError

    from llm.checkpoint.resume import open_checkpoint
    from llm.config import ModelConfig
    from llm.corpus.conversations import to_jinja
    from llm.data.lineage import write_lineage
    from llm.model.huggingface import to_config_json
    from llm.model.huggingface_weights import parameter_shapes, write_tensors
    from llm.tokenizer import load_tokenizer
    from llm.tokenizer.export import write_tokenizer

    if out.exists():
        raise UserError(f"{out}: is already there. Give another --out, or remove it.")
    checkpoint = open_checkpoint(run, step)
    tokenizer = load_tokenizer(checkpoint.folder / "tokenizer")
    cfg = ModelConfig.model_validate(checkpoint.manifest.config["model"]).with_vocab(tokenizer.vocab_size)
    template = chat_template(checkpoint.folder, tokenizer)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    ids = {"eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    config = to_config_json(cfg) | ids | {"torch_dtype": str(torch_dtype).removeprefix("torch.")}
    try:
        with durable.new_folder(out) as fresh:
            (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            write_tokenizer(tokenizer, fresh, cfg.seq_len, to_jinja(template) if template else None)
            write_generation_config(tokenizer, template, cfg.vocab_size, fresh / "generation_config.json")
            with progress(len(parameter_shapes(cfg)), "writing", "tensors") as bar:
                for _ in write_tensors(fresh, cfg, config["model_type"], checkpoint.reader.read_full, torch_dtype, shard_bytes):
                    bar.advance(1)
            write_lineage(fresh, checkpoint)
    except (OSError, SafetensorError) as error:  # the latter for a disk that is full, too
        raise UserError(f"{out}: cannot be written ({error}).") from None
    log.info(f"{out}: step {checkpoint.manifest.step:,} of {run} as {config['architectures'][0]}, {dtype}")


def chat_template(checkpoint: Path, tokenizer):
    """The one that the model was trained with, or else what came with its tokenizer (None), or ChatML if that has its tokens."""
    from llm.corpus.conversations import CHATML, kept_template

    brought = (checkpoint / "tokenizer" / "tokenizer_config.json").exists()
    fits = not brought and set(CHATML.special) <= tokenizer.special_ids.keys()
    return kept_template(checkpoint) or (CHATML if fits else None)


def write_generation_config(tokenizer, template, vocab_size: int, path: Path) -> None:
    """What the model was imported with, if it was, else greedy decoding. It ends with a text or a turn, and takes no id without a token."""
    from llm.chat.prompt import stop_ids

    ours = {"bos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else ours
    theirs = config.get("eos_token_id") or []
    ends = {tokenizer.eos_id, *(theirs if isinstance(theirs, list) else [theirs])} | (stop_ids(template, tokenizer) if template else set())
    config["eos_token_id"] = sorted(ends)  # a fine-tuned model's turns end with tokens that its base never wrote
    padding = list(range(tokenizer.vocab_size, vocab_size))  # columns that are there for the matmul's sake
    config |= {"suppress_tokens": padding} if padding else {}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
