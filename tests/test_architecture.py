"""Packages import upwards in one order, without cycles; the files that the training loop rests on are few."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
ORDER = [
    "qatlaw", "errors", "files", "new_folder", "tensor_files", "untrusted", "config", "schedule", "data", "model",
    "quant", "engine", "supervise", "tracking", "train", "study", "export", "inference", "cli", "__main__",
]  # fmt: skip
FILES = {
    ".".join(path.relative_to(ROOT / folder).with_suffix("").parts).removesuffix(".__init__"): path
    for folder, package in (("", "qatscale"), ("analysis", "qatlaw"))
    for path in (ROOT / folder / package).rglob("*.py")
}


def imports(module: str, *, lazy: bool) -> set[str]:
    """The modules of ours that `module` imports; lazy: also inside functions and under TYPE_CHECKING."""
    pending: list[ast.AST] = [ast.parse(FILES[module].read_text())]
    names: set[str] = set()
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            own = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            names |= own or {node.module or ""}
        elif lazy or not (isinstance(node, ast.FunctionDef | ast.Lambda) or is_for_types(node)):
            pending += ast.iter_child_nodes(node)
    return names & FILES.keys() - {module}


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


GRAPH = {module: imports(module, lazy=True) for module in FILES}


def place(module: str) -> int:
    return 0 if module == "qatscale" else ORDER.index(module.removeprefix("qatscale.").split(".")[0])


def test_a_package_imports_only_those_above_it() -> None:
    assert [f"{a} -> {b}" for a in GRAPH for b in GRAPH[a] if place(b) > place(a)] == []


def test_there_is_no_cycle() -> None:
    """Imports inside functions and under TYPE_CHECKING count, so that neither can hide one."""
    TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the modules


def test_types_are_imported_like_everything_else() -> None:
    """But for commands, whose --help must not wait for what they print, and for qatlaw, which draws and fits late."""
    hidden = [module for module, path in FILES.items() if "TYPE_CHECKING" in path.read_text()]
    assert [module for module in hidden if not module.startswith(("qatscale.cli.", "qatlaw"))] == []


def test_a_reader_of_the_training_loop_trusts_few_files() -> None:
    closure: set[str] = set()
    pending = ["qatscale.train.loop"]
    while pending:
        if (module := pending.pop()) not in closure:
            closure.add(module)
            parents = {module[:end] for end, letter in enumerate(module) if letter == "."}
            pending += parents | imports(module, lazy=False)
    lines = sum(len(FILES[module].read_text().splitlines()) for module in closure)
    print(f"\nimport closure of the training loop: {len(closure)} files, {lines} lines")
    assert len(closure) <= 75
    assert lines <= 9000


def test_no_file_exceeds_450_lines() -> None:
    files = [path for folder in ("qatscale", "analysis", "launch", "tests") for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in files if len(path.read_text().splitlines()) > 450] == []


def test_the_product_stays_small() -> None:
    """Lines of code: without blank lines, comments and docstrings."""
    count = 0
    for path in FILES.values():
        text = path.read_text()
        docs = [
            node for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        ]  # fmt: skip
        documented = {line for node in docs for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
        lines = enumerate((line.strip() for line in text.splitlines()), 1)
        count += sum(bool(line) and line[0] != "#" and number not in documented for number, line in lines)
    print(f"\nproduct: {count} lines of code")
    assert count <= 24_392
