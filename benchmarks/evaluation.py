"""MMLU here against lm-evaluation-harness with transformers, on the same weights: agreement question by question, and the time of both.

python tools/export_hf.py RUN --out HF-FOLDER
python benchmarks/evaluation.py RUN --hf HF-FOLDER --mmlu FOLDER --shots 5
"""

import tempfile
import time
from pathlib import Path

from llm import cli
from llm.log import log


def main() -> None:
    parser = cli.parser(__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--hf", type=Path, required=True, metavar="FOLDER", help="the run as tools/export_hf.py writes it")
    parser.add_argument("--mmlu", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8, help="of the harness (%(default)s)")
    args = parser.parse_args()

    from lm_eval.models.huggingface import HFLM

    from llm.eval.harness import run_tasks, write_mmlu
    from llm.eval.mmlu import evaluate_subject, read_subjects
    from llm.generate.load import load_run

    subjects = read_subjects(args.mmlu, shots=args.shots)
    model, tokenizer, _ = load_run(args.run, packed=True)
    began, cpu_began = time.perf_counter(), time.process_time()
    ours = {subject.name: evaluate_subject(model, tokenizer, subject, args.shots) for subject in subjects}
    our_s, our_cpu_s = time.perf_counter() - began, time.process_time() - cpu_began

    lm = HFLM(pretrained=str(args.hf), device="cpu", dtype="float32", batch_size=args.batch_size)
    scoring_s, scoring_cpu_s = timed(lm, time.perf_counter), timed(lm, time.process_time)
    with tempfile.TemporaryDirectory() as folder:
        theirs = run_tasks(lm, write_mmlu(subjects, Path(folder)), args.shots)

    for name, found in ours.items():
        samples = sorted(theirs["samples"][f"mmlu_{name}"], key=lambda sample: sample["doc_id"])
        letters = ["ABCD"[max(range(4), key=lambda i: float(sample["filtered_resps"][i][0]))] for sample in samples]
        same = sum(a == b for a, b in zip(found["answers"], letters, strict=True))
        right = sum(int(sample["acc"]) for sample in samples)
        log.info(f"{name}: {sum(found['correct'])} right here, {right} there; the same answer to {same} of {len(letters)}")
    wall, cpu = scoring_s[0] / our_s, scoring_cpu_s[0] / our_cpu_s
    log.info(f"seconds of wall clock: {our_s:.1f} here, {scoring_s[0]:.1f} there for scoring alone, {wall:.2f} times ours")
    log.info(f"seconds of CPU: {our_cpu_s:.1f} here, {scoring_cpu_s[0]:.1f} there for scoring alone, {cpu:.2f} times ours")


def timed(lm, clock) -> list[float]:
    """Where the seconds that `lm` scores add up."""
    seconds, score = [0.0], lm.loglikelihood

    def timing(requests, **options):
        began = clock()
        try:
            return score(requests, **options)
        finally:
            seconds[0] += clock() - began

    lm.loglikelihood = timing
    return seconds


if __name__ == "__main__":
    cli.run(main)
