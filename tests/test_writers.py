"""Every place in the code that writes a file: through llm/durable.py, or listed with a reason."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = [
    p
    for top in ("llm", "launch", "tools", "benchmarks")
    for p in sorted((ROOT / top).rglob("*.py"))
]
WRITING_CALLS = {
    "write_text", "write_bytes", "savefig", "save_file", "tofile", "copyfile", "copy2", "copytree",
    "move", "rename", "link", "export_chrome_trace", "SummaryWriter", "ParquetWriter", "new_file",
    "dump", "mkstemp",
}  # fmt: skip


def test_every_writer_is_durable_or_listed():
    assert set(writers()) == {site for sites in LISTED.values() for site in sites}


def writers() -> Iterator[str]:
    """path:function:call of each call that may write a file in place."""
    for path in FILES:
        if path != ROOT / "llm/durable.py":
            for function, call in _calls(ast.parse(path.read_text()), "module"):
                if name := _writing(call):
                    yield f"{path.relative_to(ROOT)}:{function}:{name}"


def _calls(node: ast.AST, function: str) -> Iterator[tuple[str, ast.Call]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call):
            yield function, child
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _calls(child, child.name if is_function else function)


def _writing(call: ast.Call) -> str | None:
    """The name of what is called, if that may write to a path other than new_file's, `fresh`."""
    words = ast.unparse(call.func).split(".")
    owner, name = words[0] if len(words) > 1 else "", words[-1]
    values = [*call.args, *(keyword.value for keyword in call.keywords)]
    if owner == "durable" or (
        values and isinstance(values[0], ast.Name) and values[0].id == "fresh"
    ):
        return None
    if name in ("open", "memmap"):
        return name if _opens_for_writing(owner, values) else None
    if name == "replace":  # str.replace has two arguments
        return name if owner == "os" or len(values) == 1 else None
    if name in ("save", "copy"):
        return name if owner in ("np", "torch", "dcp", "shutil") else None
    return name if name in WRITING_CALLS else None


def _opens_for_writing(owner: str, values: list[ast.expr]) -> bool:
    if owner == "os":
        return any(
            word in ast.unparse(v)
            for v in values[1:]
            for word in ("O_WRONLY", "O_RDWR", "O_CREAT", "flags")
        )
    texts = [v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)]
    return any(set(text) <= set("rwaxbt+") and set(text) & set("wax+") for text in texts)


WRITING = """
path.write_text(x)          open(path, 'w')             path.open('r+b')         fresh.write_text(x)
gzip.open(path, mode='wb')  os.open(path, os.O_RDWR)    np.save(path, x)         tmp.replace(path)
json.dump(x, file)          figure.savefig(path)        shutil.copy(a, b)        path.rename(other)
"""
NOT_WRITING = """
open(fresh, 'w')      durable.write_text(path, x)  open(path)     open(path, 'rb')
x.replace('a', 'b')   os.open(path, os.O_RDONLY)   file.write(x)  figure.savefig(fresh)
"""


def test_a_new_writer_would_be_noticed():
    for codes, is_noticed in ((WRITING, True), (NOT_WRITING, False)):
        for code in re.split(r"\s{2,}|\n", codes.strip()):
            call = ast.parse(code).body[0].value
            assert (_writing(call) is not None) == is_noticed, code


LISTED = {
    "inside a new folder that is renamed when whole": {
        "llm/checkpoint/saver.py:_write_files:write_text",
        "llm/checkpoint/template.py:write_template:write_text",
        "llm/checkpoint/retention.py:_thin:copytree",
        "llm/corpus/recipes.py:write_mmlu_layout:open",
        "llm/model/huggingface_weights.py:write_tensors:save_file",
        "llm/model/huggingface_weights.py:write_tensors:write_text",
        "llm/tokenizer/export.py:write_tokenizer:write_text",
        "tools/export_hf.py:export:write_text",
        "tools/export_hf.py:write_generation_config:write_text",
        "tools/import_hf.py:import_folder:write_text",
    },
    "counts only with a record that is written last, by durable.write_text": {
        "llm/corpus/parts.py:__init__:open",
        "llm/data/shards.py:__init__:open",
        "llm/data/shards.py:write_shard:replace",
        "llm/data/merge.py:_link_or_copy:link",
        "llm/data/merge.py:_link_or_copy:copyfile",
        "llm/data/merge.py:_link_or_copy:replace",
    },
    "read back and hashed, in a checkpoint's new folder": {"llm/checkpoint/direct.py:_create:open"},
    "moves what is whole": {
        "llm/checkpoint/folder.py:publish:rename",
        "llm/checkpoint/folder.py:quarantine:rename",
        "llm/checkpoint/folder.py:remove:rename",
        "llm/train/start.py:_move_aside:rename",
        "llm/train/exits.py:_write:link",
        "llm/train/exits.py:_take_crash:replace",
        "llm/train/log_owner.py:sign:link",
    },
    "appends; its reader passes over a line that was cut off": {
        "llm/train/lines.py:note:open",
        "llm/corpus/rewrite.py:__init__:open",
        "llm/log.py:route_output:open",
        "llm/train/metrics.py:_tensorboard:SummaryWriter",
        "llm/eval/results.py:add:SummaryWriter",
    },
    "a lock: its content, if any, may be torn": {
        "llm/checkpoint/lock.py:_open:open",
        "llm/corpus/tokenize_corpus.py:_work_folder:open",
        "llm/data/import_ids.py:one_writer:open",
    },
    "stacks for a person, written while the process dies": {"llm/train/exits.py:begin:open"},
    "opened for reading alone": {"llm/checkpoint/plain_files.py:open_plain:open"},
    "a writer that write_documents gives the path of durable.new_file": {
        "llm/corpus/convert.py:_txt:open",
        "llm/corpus/convert.py:write_jsonl:open",
        "llm/corpus/convert.py:_parquet:ParquetWriter",
        "llm/corpus/convert.py:_arrow:new_file",
    },
    "into memory, nowhere, or a temporary file that goes with the process": {
        "llm/report/plots.py:draw:savefig",
        "llm/train/profiler.py:_write_trace:export_chrome_trace",
        "llm/log.py:emit:open",
        "llm/eval/harness.py:_quiet:open",
        "llm/eval/harness.py:write_mmlu:write_text",
        "llm/eval/harness.py:_load:write_text",
        "llm/doctor/disk.py:_write_and_read:open",
        "llm/doctor/disk.py:_mark:mkstemp",
        "llm/doctor/peers.py:_started:open",
        "benchmarks/checkpoint.py:dcp_at_once:save",
        "benchmarks/encode_others.py:yardstick_worker:tofile",
        "benchmarks/encode_others.py:nanogpt:memmap",
        "benchmarks/encode_others.py:one_writer:open",
        "benchmarks/encode_others.py:one_writer:tofile",
        "benchmarks/encode_others.py:datatrove:write_bytes",
        "benchmarks/encode_text.py:gather:open",
        "benchmarks/generation.py:both:write_text",
        "benchmarks/gpu_findings.py:train:write_text",
        "benchmarks/loader.py:write_sparse:open",
    },
}
"""Why a place that does not write through llm/durable.py need not: path:function:call."""
