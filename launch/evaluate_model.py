"""Measure how good a model is. The same command again goes on where it was.

  python launch/evaluate_model.py checkpoints/toy --tasks mmlu --mmlu data/raw/mmlu --shots 5
  python launch/evaluate_model.py checkpoints/toy --tasks perplexity --text my-text.txt data/toy
  python launch/evaluate_model.py checkpoints/toy --tasks arc_easy,hellaswag,gsm8k --task-data data/tasks

Tasks: mmlu, perplexity, and those of lm-evaluation-harness (extra `eval`). Nothing is fetched: docs/evaluate.md says how data must lie.
Results go to RUN/evaluations/CHECKPOINT as JSON and to the run's TensorBoard (or both to --out), and to the terminal as tables.
"""

from pathlib import Path

from llm import cli
from llm.log import UserError, log, progress


def main() -> None:
    args = _arguments()
    tasks = [task for task in args.tasks.split(",") if task]
    others = [task for task in tasks if task not in ("mmlu", "perplexity")]
    if not tasks:
        raise UserError("--tasks is empty. Name some, for example mmlu,perplexity.")
    if args.shots is not None and args.shots < 0:
        raise UserError(f"--shots is {args.shots}, but should be a number of examples: 0 or 5 are common.")
    for flag, value in (("--stride", args.stride), ("--rows", args.rows)):
        if value is not None and value < 1:
            raise UserError(f"{flag} is {value}, but should be at least 1.")
    if "perplexity" in tasks and not args.text:
        raise UserError("perplexity is measured on something: give --text with text files, dataset folders or shards.")
    if missing := [path for path in args.text or () if not path.exists()]:
        raise UserError(f"--text {missing[0]}: does not exist.")

    import torch  # noqa: F401 - only now: --help and a mistyped flag answer at once

    from llm.checkpoint.folder import step_name
    from llm.checkpoint.manifest import NAME
    from llm.eval.mmlu import read_subjects
    from llm.eval.results import Results
    from llm.generate.load import choose_device, choose_dtype, dtype_name, load_run

    subjects = read_subjects(args.mmlu, args.subjects.split(",") if args.subjects else None, args.shots or 0) if "mmlu" in tasks else []
    task_files = {}
    if others:
        from llm.eval import harness

        task_files = harness.find_data(args.task_data, others)
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    model, tokenizer, checkpoint = load_run(args.run, args.step, device=device, dtype=dtype, packed=True)
    manifest = checkpoint.manifest
    run = args.run.resolve().parent if (args.run / NAME).exists() else args.run
    name = step_name(manifest.step, manifest.attempt)
    logs = manifest.config.get("log", {}).get("out_dir")
    folder = (args.out or run / "evaluations") / name
    results = Results(folder, (args.out or Path(logs or run / "logs")) / "tensorboard", manifest.step)
    log.info(f"{args.run}, step {manifest.step:,}, on {device} in {dtype_name(dtype)}")
    if "mmlu" in tasks:
        identity = [manifest.self_sha256, dtype_name(dtype), args.shots or 0]
        _mmlu(args, model, tokenizer, subjects, results, identity)
    if "perplexity" in tasks:
        _perplexity(args, model, tokenizer, checkpoint, results)
    if others:
        _others(model, tokenizer, task_files, args.shots, results)
    log.info(f"kept in {folder}")


def _arguments():
    parser = cli.parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or that of one checkpoint")
    parser.add_argument("--tasks", required=True, metavar="A,B,...", help="mmlu, perplexity, arc_easy, arc_challenge, hellaswag, gsm8k, ...")
    parser.add_argument("--shots", type=int, metavar="N", help="examples before each question (mmlu: 0; others: what the task says)")
    parser.add_argument("--mmlu", type=Path, default=Path("data/raw/mmlu"), metavar="FOLDER", help="dev/*_dev.csv and test/*_test.csv (%(default)s)")
    parser.add_argument("--subjects", metavar="A,B,...", help="of MMLU, these only")
    parser.add_argument("--text", type=Path, nargs="+", metavar="PATH", help="for perplexity: text in any format, dataset folders, or .bin shards")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens that each window of text adds; the rest is context (half of seq_len)")
    parser.add_argument("--rows", type=int, metavar="N", help="of shards, N windows spread over all, as train.eval_rows in training (all)")
    parser.add_argument("--task-data", type=Path, default=Path("data/tasks"), metavar="FOLDER", help="FOLDER/TASK/SPLIT.jsonl (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go (RUN/evaluations)")
    parser.add_argument("--step", type=int, metavar="N", help="the checkpoint of this step; left out: the newest")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (%(default)s: the GPU if there is one)")
    parser.add_dtype("fp32")  # a result is to be the same on every machine
    parser.add_read_options()
    return parser.parse_args()


def _mmlu(args, model, tokenizer, subjects, results, identity: list) -> None:
    from llm.eval.mmlu import accuracy, evaluate_subject, flat, summary
    from llm.eval.results import Kept, print_table

    shots, found, n_kept = args.shots or 0, {}, 0
    task = f"mmlu-{shots}-shot"
    kept = Kept(results.folder, task)
    with progress(4 * sum(len(subject.questions) for subject in subjects), task, "answers") as bar:
        for subject in subjects:
            part, was_there = kept.get(
                subject.name, [*identity, subject.digest], lambda subject=subject: evaluate_subject(model, tokenizer, subject, shots, bar.advance)
            )
            if was_there:
                bar.advance(4 * len(subject.questions))
            found[subject.name], n_kept = part, n_kept + was_there
    if n_kept:
        log.info(f"{n_kept} of {len(subjects)} subjects were there from before")
    _tell_short(found, model.cfg.seq_len)
    correct = {name: part["correct"] for name, part in found.items()}
    totals = summary(correct)
    lines = [(subject.name, subject.category, accuracy(correct[subject.name])) for subject in subjects]
    lines += [(name, "", values) for name, values in totals.items()]
    print_table([task, "", "accuracy", "±", "questions"], [[n, c, f"{v['acc']:.2%}", f"{v['stderr']:.2%}", f"{v['n']:,}"] for n, c, v in lines])
    results.add(task, flat(totals))


def _tell_short(found: dict[str, dict], seq_len: int) -> None:
    fewer, cut = (sum(part[key] for part in found.values()) for key in ("fewer_shots", "cut"))
    n = sum(len(part["correct"]) for part in found.values())
    if fewer:
        log.warning(f"{fewer:,} of {n:,} questions were asked with fewer examples: with all the model's {seq_len:,} tokens would not do")
    if cut:
        log.warning(f"{cut:,} of {n:,} questions are longer than {seq_len:,} tokens by themselves: only their ends were read")


def _perplexity(args, model, tokenizer, checkpoint, results) -> None:
    from llm.corpus.conversations import kept_template
    from llm.corpus.options import read_options
    from llm.corpus.read_all import read_all
    from llm.eval import perplexity
    from llm.eval.results import print_table

    options = read_options(args, kept_template(checkpoint.folder))
    cut = {key: value for key, value in checkpoint.manifest.config.get("data", {}).items() if key in ("document_mask", "packing")}
    rows = []
    for path in args.text:
        if perplexity.is_shards(path):
            found = perplexity.of_shards(model, tokenizer, [path], args.rows, **cut)
        else:
            documents = (document.text for document in read_all([str(path)], options))
            found = perplexity.of_text(model, tokenizer, documents, args.stride)
        results.add(f"perplexity/{path}", found)
        rows.append([str(path), f"{found['loss']:.4f}", f"{found['perplexity']:,.2f}", f"{found['bits_per_byte']:.4f}"])
    print_table(["perplexity", "loss", "perplexity", "bits per byte"], rows)


def _others(model, tokenizer, task_files, shots: int | None, results) -> None:
    from llm.eval import harness
    from llm.eval.results import print_table

    found = harness.run_tasks(harness.HarnessModel(model, tokenizer), task_files, shots)
    rows = []
    for task in task_files:
        metrics = harness.metrics(found, task)
        results.add(task, {f"{name}{suffix}": value for name, pair in metrics.items() for value, suffix in zip(pair, ("", "_stderr"), strict=True)})
        rows += [[task, name, f"{value:.2%}", f"{stderr:.2%}"] for name, (value, stderr) in metrics.items()]
    print_table(["task", "metric", "value", "±"], rows)


if __name__ == "__main__":
    cli.run(main)
