"""Real text that is on every machine: the documentation strings of Python's standard library, and pydoc's topics.

Everything is read from the source files by `ast`; no module is imported. A module becomes one document, its objects in
the order of the file; a topic of `help()` becomes one document.
"""

import ast
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterator

TOPICS = "pydoc_data/topics.py"
_SKIPPED = {"__pycache__", "dist-packages", "site-packages", "test", "tests", "idle_test"}
_SHORTEST = 200  # characters: below that, a module has a line of its file's purpose and nothing to learn from

_Object = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def source_files() -> list[tuple[str, int]]:
    """(path below the library's folder, size in bytes) of each source file, sorted, tests and packages left out."""
    root = library_folder()
    found = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        paths = [os.path.join(parent, name) for name in names if name.endswith(".py")]
        found += [(os.path.relpath(path, root).replace(os.sep, "/"), os.path.getsize(path)) for path in paths]
    return sorted(found)


def library_folder() -> str:
    """The folder of this Python's standard library."""
    return sysconfig.get_path("stdlib")


def documents(path: str) -> list[str]:
    """The documents of the source file `path`, as `source_files` names it; none where it documents next to nothing."""
    with open(os.path.join(library_folder(), path), "rb") as file:
        source = file.read()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in somebody else's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []  # a template, or a fixture that is no Python 3
    if path == TOPICS:
        return _topics(tree)
    document = module_document(_module_name(path), tree)
    return [document] if len(document) >= _SHORTEST else []


def module_document(name: str, tree: ast.Module) -> str:
    """The module's documentation strings as one text, each below the name, and the arguments, of what it documents."""
    parts = [f"# {name}"]
    text = _documentation(tree)
    if text:
        parts.append(text)
    for qualified_name, node in _objects(tree, ""):
        text = _documentation(node)
        if text:
            arguments = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
            keyword = "class " if isinstance(node, ast.ClassDef) else ""
            parts.append(f"## {keyword}{qualified_name}{arguments}\n\n{text}")
    return "\n\n".join(parts) + "\n" if len(parts) > 1 else ""


def _objects(node: ast.AST, prefix: str) -> Iterator[tuple[str, _Object]]:
    """Classes and functions below `node` with their dotted names, in file order, not those inside functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Object):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from _objects(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.If | ast.Try):  # definitions under `if sys.platform ..` and `try: import`
            yield from _objects(child, prefix)


def _documentation(node: ast.Module | _Object) -> str:
    text = ast.get_docstring(node, clean=False) or ""
    return "\n".join(line.rstrip() for line in inspect.cleandoc(text).strip().split("\n"))


def _topics(tree: ast.Module) -> list[str]:
    """The entries of the dictionary literal `topics`, in alphabetical order."""
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            pairs = zip(node.value.keys, node.value.values, strict=True)
            constants = [(key, value) for key, value in pairs if isinstance(key, ast.Constant)]
            found |= {str(key.value): str(value.value) for key, value in constants if isinstance(value, ast.Constant)}
    return [found[name].strip() + "\n" for name in sorted(found)]


def _module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
