"""Tokenizing in processes of its own, with units so small that little text has many."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys
from pathlib import Path
from llm import cli
from llm.corpus import mpi, plan
from llm.corpus.tokenize_corpus import Request, tokenize_corpus

def main():
    plan.MIN_UNIT_BYTES = plan.TASK_BYTES = 8 << 10
    if mpi.is_server():
        return mpi.serve()
    try:
        a = json.loads(sys.argv[1])
        tokenize_corpus(Request(tuple(a.pop("inputs")), Path(a.pop("out")), a.pop("tokenizer_path"), 64, **a))
    finally:
        mpi.release()

if __name__ == "__main__":
    cli.run(main)
"""


def launch(request, before=(), **settings):
    """Start tokenizing; `before`: words of the command line before Python's."""
    request.out.parent.mkdir(parents=True, exist_ok=True)
    script = request.out.parent / "script.py"
    script.write_text(SCRIPT)
    arguments = {"inputs": request.inputs, "out": str(request.out), "tokenizer_path": request.tokenizer_path, **settings}
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*before, sys.executable, str(script), json.dumps(arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def workers_of(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]
