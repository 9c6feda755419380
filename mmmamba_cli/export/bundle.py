"""The model's code as flat files that transformers can load without this package.

transformers fetches a repository's code by file name: what a file imports relatively has to lie
beside it, not in a folder. So every module that the model or its processor needs is written out
under a flat name, its imports of our modules made relative, and nothing else changed.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from mmmamba_cli import __version__

PACKAGE = "mmmamba_cli"
# Modules that transformers is told of by name; the others get their dotted name, flattened.
ENTRIES = {
    f"{PACKAGE}.model.config": "configuration_mmmamba",
    f"{PACKAGE}.model.modeling": "modeling_mmmamba",
    f"{PACKAGE}.processing.processor": "processing_mmmamba",
    f"{PACKAGE}.processing.text_processor": "processing_mmmamba_text",
    f"{PACKAGE}.processing.tokenizer": "tokenization_mmmamba",
}
# What the code may import besides Python's own modules and itself; jinja2 comes with torch.
DEPENDENCIES = frozenset(
    {"PIL", "jinja2", "numpy", "safetensors", "sentencepiece", "torch", "transformers"}
)


def bundled_files(entries: Mapping[str, str] = ENTRIES) -> dict[str, str]:
    """File name to text of every module that `entries` need, themselves included.

    Raises `ValueError`, which is our bug, for a module that imports more than `DEPENDENCIES`.
    """
    waiting, found = list(entries), dict[str, str]()
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        text = _source(module).read_text(encoding="utf-8")
        tree = ast.parse(text)
        _check_dependencies(module, tree)
        found[module] = _rewritten(module, text, tree)
        waiting += _needed(tree)
    return {f"{flat_name(module)}.py": text for module, text in sorted(found.items())}


def flat_name(module: str) -> str:
    """`mmmamba_cli.ops.ssd` as `mmmamba_ops_ssd`; entries have names of their own."""
    if module in ENTRIES:
        return ENTRIES[module]
    return "_".join(["mmmamba", *module.split(".")[1:]])


def _source(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def _our_imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
            yield node


def _is_ours(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] == PACKAGE


def _needed(tree: ast.AST) -> set[str]:
    needed = set()
    for node in _our_imports(tree):
        assert node.module is not None
        modules = _imported_modules(node)
        needed |= set(modules.values())
        if len(modules) < len(node.names):
            needed.add(node.module)
    return needed


def _imported_modules(node: ast.ImportFrom) -> dict[str, str]:
    """The names in `from package import name` that are modules, and these modules.

    `ops.ssd` is a module and, in `ops` itself, a function: what the package says comes first.
    """
    assert node.module is not None
    spec = importlib.util.find_spec(node.module)
    if spec is None or spec.submodule_search_locations is None:
        return {}
    said = _bound_names(node.module)
    found = {}
    for alias in node.names:
        module = f"{node.module}.{alias.name}"
        if alias.name not in said and importlib.util.find_spec(module) is not None:
            found[alias.name] = module
    return found


def _bound_names(package: str) -> set[str]:
    """What a package takes over from its modules by name."""
    tree = ast.parse(_source(package).read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module != package
        for alias in node.names
    }


def _rewritten(module: str, text: str, tree: ast.AST) -> str:
    """The text with its imports of ours made relative, and a line that says where it is from."""
    lines = text.splitlines()
    for node in sorted(_our_imports(tree), key=lambda node: node.lineno, reverse=True):
        lines[node.lineno - 1 : node.end_lineno] = _relative(node)
    place = module.replace(".", "/")
    head = f"# {place} of mmmamba {__version__}, written out by `mmmamba export`."
    return "\n".join([head, *lines]) + "\n"


def _relative(node: ast.ImportFrom) -> list[str]:
    indent = " " * node.col_offset
    modules = _imported_modules(node)
    written = []
    plain = [alias for alias in node.names if alias.name not in modules]
    if plain:
        names = ", ".join(ast.unparse(alias) for alias in plain)
        written.append(f"{indent}from .{flat_name(node.module or '')} import {names}")
    for alias in node.names:
        if alias.name in modules:
            flat = flat_name(modules[alias.name])
            # transformers looks for files in lines of the first form only.
            written.append(f"{indent}from .{flat} import __name__ as _  # noqa: F401")
            written.append(f"{indent}from . import {flat} as {alias.asname or alias.name}")
    return written


def _check_dependencies(module: str, tree: ast.AST) -> None:
    """transformers refuses code that imports, anywhere, what is not installed."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            if any(_is_ours(name) for name in names):
                raise ValueError(f"{module} imports {names[0]} whole; import names from it")
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        for name in names:
            top = name.partition(".")[0]
            known = top in DEPENDENCIES or top in sys.stdlib_module_names or top == PACKAGE
            if not known:
                raise ValueError(f"{module} imports {top}, which exported code may not")
