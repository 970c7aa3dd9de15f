"""Make a checkpoint of a Hugging Face folder: to generate with, or to go on training from.

  python tools/import_hf.py ~/TinyLlama-1.1B --out checkpoints/tinyllama
  python launch/generate.py checkpoints/tinyllama --prompt "Once upon a time"
  python launch/train.py --config checkpoints/tinyllama/run.yaml --init-from checkpoints/tinyllama data.data_path=data/my-text

Reads config.json, the safetensors files and tokenizer.json from a folder on this machine; downloads nothing, opens no pickle, and does not
need transformers. Families: Llama, Mistral, Qwen3, Phi (1, 1.5, 2), GPT-2.
"""

import json
import platform
import uuid
from pathlib import Path

import yaml

import llm
from llm import cli, durable
from llm.log import UserError, log

LONG = 16384  # tokens a row that few machines train at


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="config.json, *.safetensors, tokenizer.json")
    parser.add_argument("--out", required=True, type=Path, metavar="RUN", help="a new run's folder; must not exist yet")
    parser.add_argument("--seq-len", type=int, metavar="N", help="rows of N tokens instead of the longest that the model can take")
    args = parser.parse_args()
    import_folder(args.folder, args.out, args.seq_len)


def import_folder(folder: Path, out: Path, seq_len: int | None = None) -> None:
    """Raises UserError; then there is nothing at `out`."""
    from llm.data.lineage import read_lineage
    from llm.model.flops import count_params
    from llm.model.huggingface import from_config_json
    from llm.model.huggingface_weights import Weights
    from llm.tokenizer import load_tokenizer

    if out.exists():
        raise UserError(f"{out}: is already there. Give another --out, or remove it.")
    config = _read_json(folder / "config.json")
    cfg = _shortened(from_config_json(config, str(folder / "config.json")), seq_len)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder}: holds no tokenizer.json, and weights mean nothing without their tokenizer.")
    tokenizer = load_tokenizer(folder, "huggingface")
    cfg = cfg.with_vocab(tokenizer.vocab_size)
    weights = Weights(folder, cfg, config["model_type"])
    bases = read_lineage(folder)
    try:
        with durable.new_folder(out) as fresh:
            _write_checkpoint(fresh, cfg, tokenizer, weights, bases)
            (fresh / "run.yaml").write_text(_recipe(out, cfg), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error}).") from None
    log.info(f"{out}: {config['model_type']} with {count_params(cfg):,} parameters, rows of {cfg.seq_len:,} tokens")
    log.info(f"go on training: python launch/train.py --config {out}/run.yaml --init-from {out} data.data_path=DATA")


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}). Give the folder of a downloaded Hugging Face model.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no JSON object.")
    return found


def _shortened(cfg, seq_len: int | None):
    """`cfg` for rows of `seq_len` tokens. Angles do not depend on it, learned positions would be cut off."""
    longest = cfg.seq_len
    if seq_len is None:
        if longest > LONG:
            log.warning(f"its rows are {longest:,} tokens long, and generating sets aside memory for as many; --seq-len makes them shorter")
        return cfg
    if not 0 < seq_len <= longest or (cfg.positions == "learned" and seq_len != longest):
        allowed = f"{longest:,}, as many as it has learned" if cfg.positions == "learned" else f"1 to {longest:,}"
        raise UserError(f"--seq-len {seq_len}: this model takes {allowed}.")
    return cfg.model_copy(update={"seq_len": seq_len})


def _write_checkpoint(run: Path, cfg, tokenizer, weights, bases: list) -> None:
    import torch

    from llm.checkpoint import folder
    from llm.checkpoint.hashes import tokenizer_records
    from llm.checkpoint.manifest import WEIGHTS_FORMAT, File, Manifest, Parameter
    from llm.checkpoint.weights import write_weights
    from llm.data.ledger import Ledger

    temporary = run / ".tmp-import"
    (temporary / "tokenizer").mkdir(parents=True)
    tokenizer.save(temporary / "tokenizer")
    shapes = list(weights.shapes.items())
    records, state = write_weights(temporary, shapes, weights)
    records += tokenizer_records(temporary)
    manifest = Manifest(
        format=WEIGHTS_FORMAT, run_id=uuid.uuid4().hex, attempt=1, step=0, tokens_seen=0, parent=None, bases=bases, world_size=1, global_rows=0,
        config={"model": cfg.model_dump(mode="json")}, tokenizer_fingerprint=tokenizer.fingerprint, ledger=Ledger(()).to_json(), chain="",
        engine={}, versions={"tally": llm.__version__, "torch": torch.__version__, "python": platform.python_version()}, metrics={},
        epoch_end=False, params=[Parameter(name=name, shape=list(shape)) for name, shape in shapes],
        files=[File.model_validate(record) for record in records], state_hash=state,
    )  # fmt: skip
    assert not manifest.gaps, manifest.gaps
    folder.publish(temporary, run / folder.weights_name(0, 1), manifest.text())


def _recipe(out: Path, cfg) -> str:
    """A run that begins with these weights; what to train on and how is the user's to say."""
    tree = {
        "model": cfg.model_dump(mode="json", exclude_defaults=True),
        "tokenizer": {"tokenizer_path": str(out / "weights-000000000-a1" / "tokenizer")},
        "data": {"data_path": f"data/{out.name}"},
        "train": {"lr": 2e-5, "batch_size": 1, "batch_tokens": cfg.seq_len * max(1, 65536 // cfg.seq_len)},
        "checkpoint": {"checkpoint_dir": str(out.parent), "run_name": f"{out.name}-continued"},
    }
    head = f"# Goes on training the model imported to {out}; lr and batch are cautious guesses, not measured.\n"
    return head + yaml.safe_dump(tree, sort_keys=False)


if __name__ == "__main__":
    cli.run(main)
