"""Who may import whom (docs/design.md): a module imports from its own level and those above it, never from below."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = [
    {"llm.config", "llm.batch_plan", "llm.dist", "llm.log", "llm.cli", "llm.durable", "llm.rank_failures"},
    {"llm.tokenizer", "llm.checkpoint"},
    {"llm.data", "llm.model"},
    {"llm.corpus", "llm.engine"},
    {"llm.train", "llm.generate"},
    {"llm.eval", "llm.chat", "llm.report", "llm.doctor", "llm.plan"},
    {"launch", "tools", "benchmarks"},
]
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names}
APART = [{"llm.data", "llm.model"}, {"llm.train", "llm.corpus"}]  # neither imports the other
FILES = sorted(p for folder in ("llm", "launch", "tools", "benchmarks") for p in (ROOT / folder).rglob("*.py"))


def room(module: str) -> str:
    """llm.data for llm.data.shards, tools for tools.ledger."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "llm" else parts[0]


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, at its top or inside a function."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            found |= {".".join(base)} | {".".join([*base, alias.name]) for alias in node.names if base == ["llm"]}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_from_its_own_level_and_above(path):
    own = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module in imports(path):
        other = room(module)
        if other == own or other == "llm" or other.split(".")[0] not in ("llm", "launch", "tools", "benchmarks"):
            continue
        assert other in LEVEL, f"{path}: {module} is on no level"
        assert own == "llm" or LEVEL[other] <= LEVEL[own], f"{path}: {own} must not import {module}"
        assert {own, other} not in APART, f"{path}: {own} and {other} are kept apart"


@pytest.mark.parametrize("path", [p for p in FILES if p.is_relative_to(ROOT / "llm")], ids=lambda p: str(p.relative_to(ROOT)))
def test_each_library_is_known_only_where_it_belongs(path):
    rooms = {"deepspeed": {"llm.engine"}, "torch.distributed": {"llm.dist", "llm.engine"}, "torch": None}
    own = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for module in imports(path):
        for library, allowed in rooms.items():
            if allowed and (module == library or module.startswith(library + ".")):
                assert own in allowed, f"{path}: {library} is known only in {sorted(allowed)}"


def test_only_dist_reads_the_variables_of_launchers():
    for path in FILES:
        if path.name != "dist.py":
            nodes = list(ast.walk(ast.parse(path.read_text())))
            written = {n.slice.value for n in nodes if isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Store) and is_text(n.slice)}
            names = {n.value for n in nodes if is_text(n)} - written  # telling a library is not reading
            assert not names & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"}, path


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_no_script_is_named_like_a_module_it_may_shadow():
    import sys

    taken = set(sys.stdlib_module_names) | {"torch", "numpy", "datasets", "tokenizers", "deepspeed", "transformers", "evaluate"}
    for folder in ("launch", "tools", "benchmarks"):
        assert not {p.stem for p in (ROOT / folder).glob("*.py")} & taken
