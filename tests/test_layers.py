"""The direction of imports: jobs -> pipelines -> armd -> torch, never back. Reads the source, imports nothing."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

FORBIDDEN = {
    "armd": {"pipelines", "jobs", "tests", "ray", "deepspeed", "pyarrow", "fsspec", "s3fs", "fastapi", "tyro", "rich"},
    "pipelines": {"jobs", "tests", "tyro", "rich"},
    "jobs": {"tests", "ray", "deepspeed"},  # the cluster is the pipelines' business
    # Narrower rules for single files.
    "pipelines/train_loop.py": {"ray"},
    "pipelines/windows.py": {"ray", "torch"},
}
"""Roots that the files below a folder, or a single file, must not import - inside functions included."""


def imported_roots(source: str) -> Iterator[str]:
    """The first part of every module that `source` imports, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield (node.module or "").partition(".")[0]


def violations(place: str, forbidden: set[str]) -> list[str]:
    path = REPOSITORY / place
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return [
        f"{file.relative_to(REPOSITORY)} imports {root}"
        for file in files
        for root in imported_roots(file.read_text(encoding="utf-8"))
        if root in forbidden
    ]


@pytest.mark.parametrize("place", FORBIDDEN)
def test_nothing_is_imported_against_the_direction(place: str) -> None:
    assert (REPOSITORY / place).exists(), f"{place} was moved: move its rule too"
    assert violations(place, FORBIDDEN[place]) == []


def test_the_graph_is_standard_library_only() -> None:
    roots = set(imported_roots((REPOSITORY / "jobs/graph.py").read_text(encoding="utf-8")))
    assert roots <= sys.stdlib_module_names


@pytest.mark.parametrize(
    "source",
    ["import ray", "import ray.data as data", "from ray.train import report", "def f():\n    from ray import data\n"],
)
def test_every_form_of_import_is_seen(source: str) -> None:
    assert list(imported_roots(source)) == ["ray"]


@pytest.mark.parametrize("package", ["armd", "pipelines", "jobs"])
def test_nothing_happens_at_import(package: str) -> None:
    """Modules define, and do not act: no statement at the top level but definitions, imports and constants."""
    allowed = (
        ast.Import,
        ast.ImportFrom,
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.Assign,
        ast.AnnAssign,
    )
    for file in sorted((REPOSITORY / package).rglob("*.py")):
        if file.name == "__main__.py":
            continue
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            string = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            version = isinstance(node, ast.Try) and file.name == "__init__.py"  # the installed version, if any
            typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            assert isinstance(node, allowed) or string or version or typing_only, (
                f"{file.relative_to(REPOSITORY)}:{node.lineno} acts at import"
            )
