"""The model's code as a few files that transformers can load without this package.

transformers fetches a repository's code by file name: what a file imports relatively has to lie
beside it, not in a folder. So the modules that the model or its processor needs are written out,
all of a room in one file, each after those that it uses. Where two modules have one name, one of
them gets a longer one; nothing else is changed.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmmamba_cli import __version__
from mmmamba_cli.export.name_scopes import Bindings, Target, apply_edits, bound_names, rename_edits

PACKAGE = "mmmamba_cli"
ENTRY_MODULES = (
    f"{PACKAGE}.model.config",
    f"{PACKAGE}.model.modeling",
    f"{PACKAGE}.processing.processor",
    f"{PACKAGE}.processing.text_processor",
    f"{PACKAGE}.processing.tokenizer",
)
# Files that transformers is given by name; other rooms have theirs, as `mmmamba_ops`.
CONFIGURATION, MODELING, PROCESSING = (
    "configuration_mmmamba",
    "modeling_mmmamba",
    "processing_mmmamba",
)
ROOM_FILES = (MODELING, PROCESSING, "mmmamba_ops")
# What the code may import besides Python's own modules and itself; jinja2 comes with torch.
DEPENDENCIES = frozenset(
    {"PIL", "jinja2", "numpy", "safetensors", "sentencepiece", "torch", "transformers"}
)


def bundle_files(entries: Iterable[str] = ENTRY_MODULES) -> dict[str, str]:
    """File name to text: the modules that `entries` need, themselves included.

    Raises `ValueError`, which is our bug, for a module that imports more than `DEPENDENCIES`, and
    for files that would import each other.
    """
    bundle = _Bundle(_collect(entries))
    return {f"{name}.py": bundle.text(name) for name in sorted(bundle.files)}


def file_of(module: str) -> str:
    """The file, without its suffix, that holds `module`."""
    room = module.split(".")[1] if module.startswith(f"{PACKAGE}.") else module
    named = {"model": MODELING, "processing": PROCESSING}
    if module == f"{PACKAGE}.model.config":
        return CONFIGURATION
    return named.get(room, f"mmmamba_{room}")


@dataclass
class _Module:
    name: str
    source: str
    tree: ast.Module = field(repr=False)

    @cached_property
    def defined(self) -> set[str]:
        return bound_names(self.tree.body) - {"__all__"}

    @cached_property
    def reads_annotations(self) -> bool:
        """Whether annotations are values that the module reads; `__future__` makes them text."""
        future = any(
            isinstance(node, ast.ImportFrom) and node.module == "__future__"
            for node in self.tree.body
        )
        read = any(
            isinstance(node, ast.Attribute) and node.attr == "__annotations__"
            for node in ast.walk(self.tree)
        )
        return read and not future

    @cached_property
    def bindings(self) -> Bindings:
        """What each name of the module level stands for; None for what others provide."""
        found: Bindings = {name: (self.name, name) for name in self.defined}
        for node in _statements(self.tree.body):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found |= imported(node)
        return found


def _collect(entries: Iterable[str]) -> dict[str, _Module]:
    """Modules by name, each behind those that it imports when it is imported itself."""
    found: dict[str, _Module] = {}
    later: list[str] = []
    begun: set[str] = set()

    def add(name: str) -> None:
        if name in begun:
            return
        begun.add(name)
        source = _source(name).read_text(encoding="utf-8")
        module = _Module(name, source, ast.parse(source))
        _check_dependencies(name, module.tree)
        first = {id(node) for node in module.tree.body}
        for node in _package_imports(module.tree):
            needed = _imported_module_names(node)
            if id(node) in first:
                for one in needed:
                    add(one)
            else:
                later.extend(needed)
        found[name] = module

    for entry in entries:
        add(entry)
    while later:
        add(later.pop())
    return found


class _Bundle:
    """The modules, the files that they go into, and the names that they have there."""

    def __init__(self, modules: dict[str, _Module]):
        self._modules = modules
        self.files: dict[str, list[_Module]] = {}
        for module in modules.values():
            self.files.setdefault(self.file_of(module.name), []).append(module)
        owners: dict[str, list[str]] = defaultdict(list)
        for module in modules.values():
            for name in module.defined:
                owners[name].append(module.name)
        foreign = {
            name
            for module in modules.values()
            for name, target in module.bindings.items()
            if target is None
        }
        self._exported_names: dict[Target, str] = {}
        for name, holders in owners.items():
            # The one nearest to the top keeps the name.
            ordered = sorted(holders, key=lambda holder: (holder.count("."), holder))
            for place, holder in enumerate(ordered):
                keeps = place == 0 and name not in foreign
                self._exported_names[(holder, name)] = (
                    name if keeps else _qualified_name(name, holder)
                )
        if len(set(self._exported_names.values())) != len(self._exported_names):
            raise ValueError("two modules' names cannot be told apart in the exported code")
        for name, held in self.files.items():
            _check_third_party(name, held)

    def file_of(self, module: str) -> str:
        """The file that holds `module`: its room's, or one of its own.

        A room's file has annotations as text, so that a module that reads them has its own.
        """
        if self._modules[module].reads_annotations and file_of(module) in ROOM_FILES:
            return "_".join(["mmmamba", *module.split(".")[1:]])
        return file_of(module)

    def text(self, file: str) -> str:
        """One file: what it needs of others, then its modules."""
        parts = [self._module_text(module, file) for module in self.files[file]]
        needed: dict[str, set[str]] = defaultdict(set)
        for module in self.files[file]:
            for node in module.tree.body:
                for target in self._targets(node):
                    if self.file_of(target[0]) != file:
                        needed[self.file_of(target[0])].add(self.exported_name(target))
        for other in needed:
            self._check_no_cycle(file, other)
        plain = any(module.reads_annotations for module in self.files[file])
        return "\n".join(
            [
                f"# Code of mmmamba {__version__}, written out by `mmmamba export`.",
                "" if plain else "from __future__ import annotations\n",
                *(_import_line(other, names) for other, names in sorted(needed.items())),
                *parts,
                "",
            ]
        )

    def exported_name(self, target: Target) -> str:
        """What a thing is called in the exported code."""
        module, name = target
        while (module, name) not in self._exported_names:
            found = self._modules[module].bindings.get(name or "")
            if found is None or found[1] is None:
                raise ValueError(f"{module} has no {name} that exported code could use")
            module, name = found
        return self._exported_names[(module, name)]

    def _module_text(self, module: _Module, file: str) -> str:
        edits = list(rename_edits(module.tree, module.bindings, imported, self.exported_name))
        out: dict[int, tuple[int, str]] = {}
        for ours in _package_imports(module.tree):
            out[ours.lineno] = (
                ours.end_lineno or ours.lineno,
                self._replacement_import(ours, file),
            )
        for node in module.tree.body:
            future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
            listed = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            if future or listed:
                out[node.lineno] = (node.end_lineno or node.lineno, "")
        place = module.name.replace(".", "/")
        return f"\n# {place}\n{apply_edits(module.source, edits, out)}"

    def _replacement_import(self, node: ast.ImportFrom, file: str) -> str:
        """The statement that replaces an import of this package: none at module level."""
        if node.col_offset == 0:
            return ""
        indent = " " * node.col_offset
        others: dict[str, set[str]] = defaultdict(set)
        for target in self._targets(node):
            if self.file_of(target[0]) != file:
                others[self.file_of(target[0])].add(self.exported_name(target))
        lines = [indent + _import_line(other, names) for other, names in sorted(others.items())]
        return "\n".join(lines) or f"{indent}pass"

    def _targets(self, node: ast.stmt) -> Iterator[Target]:
        """The names that an import of this package binds; of a module, those that are used."""
        if not isinstance(node, ast.ImportFrom) or not _is_package_module(node.module):
            return
        for target in imported(node).values():
            assert target is not None
            if target[1] is not None:
                yield self._defining_module(target)
            else:
                yield from ((target[0], name) for name in self._modules[target[0]].defined)

    def _defining_module(self, target: Target) -> Target:
        module, name = target
        while (module, name) not in self._exported_names:
            found = self._modules[module].bindings.get(name or "")
            if found is None:
                raise ValueError(f"{module} has no {name} that exported code could use")
            module, name = found
        return module, name

    def _check_no_cycle(self, file: str, other: str) -> None:
        """Raise `ValueError` if `other` imports `file` in turn, when it is imported."""
        for module in self.files[other]:
            for node in module.tree.body:
                if any(self.file_of(target[0]) == file for target in self._targets(node)):
                    raise ValueError(f"{file} and {other} would import each other: {module.name}")


def _check_third_party(file: str, modules: Iterable[_Module]) -> None:
    """Raise `ValueError` if two modules of a file mean different things by a name of others."""
    meant: dict[str, Any] = {}
    for module in modules:
        for node in _statements(module.tree.body):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            for alias in node.names:
                if isinstance(node, ast.Import):
                    name = alias.asname or alias.name.partition(".")[0]
                    found = importlib.import_module(alias.name if alias.asname else name)
                elif _is_package_module(node.module) or node.module is None:
                    continue
                else:
                    name = alias.asname or alias.name
                    found = _attribute(node.module, alias.name)
                if meant.setdefault(name, found) is not found:
                    raise ValueError(f"{file}: {name} means two things, {found!r:.80} is one")


def _attribute(module: str, name: str) -> Any:
    found = importlib.import_module(module)
    if hasattr(found, name):
        return getattr(found, name)
    return importlib.import_module(f"{module}.{name}")


def _qualified_name(name: str, module: str) -> str:
    suffix = "_".join(module.split(".")[2:] or module.split(".")[-1:])
    return f"{name}_{suffix.upper() if name.isupper() else suffix}"


def _import_line(file: str, names: Iterable[str]) -> str:
    return f"from .{file} import {', '.join(sorted(names))}"


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module level, those inside `if` and `try` too."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            inner = [*node.body, *node.orelse, *getattr(node, "finalbody", [])]
            for handler in getattr(node, "handlers", []):
                inner += handler.body
            yield from _statements(inner)


def imported(node: ast.stmt) -> Bindings:
    """What an import statement binds of this package; None for other packages."""
    assert isinstance(node, ast.Import | ast.ImportFrom)
    if isinstance(node, ast.Import):
        return {alias.asname or alias.name.partition(".")[0]: None for alias in node.names}
    if not _is_package_module(node.module):
        return {alias.asname or alias.name: None for alias in node.names}
    assert node.module is not None
    modules = _imported_modules(node)
    return {
        alias.asname or alias.name: (modules[alias.name], None)
        if alias.name in modules
        else (node.module, alias.name)
        for alias in node.names
    }


def _source(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def _package_imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _is_package_module(node.module):
            yield node


def _is_package_module(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] == PACKAGE


def _imported_module_names(node: ast.ImportFrom) -> list[str]:
    assert node.module is not None
    modules = _imported_modules(node)
    rest = [node.module] if len(modules) < len(node.names) else []
    return [*rest, *modules.values()]


def _imported_modules(node: ast.ImportFrom) -> dict[str, str]:
    """The names in `from package import name` that are modules, and these modules.

    `ops.ssd` is a module and, in `ops` itself, a function: what the package says comes first.
    """
    assert node.module is not None
    spec = importlib.util.find_spec(node.module)
    if spec is None or spec.submodule_search_locations is None:
        return {}
    said = _reexported_names(node.module)
    found = {}
    for alias in node.names:
        module = f"{node.module}.{alias.name}"
        if alias.name not in said and importlib.util.find_spec(module) is not None:
            found[alias.name] = module
    return found


def _reexported_names(package: str) -> set[str]:
    """What a package takes over from its modules by name."""
    tree = ast.parse(_source(package).read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module != package
        for alias in node.names
    }


def _check_dependencies(module: str, tree: ast.AST) -> None:
    """transformers refuses code that imports, anywhere, what is not installed."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            if any(_is_package_module(name) for name in names):
                raise ValueError(f"{module} imports {names[0]} whole; import names from it")
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        for name in names:
            top = name.partition(".")[0]
            known = top in DEPENDENCIES or top in sys.stdlib_module_names or top == PACKAGE
            if not known:
                raise ValueError(f"{module} imports {top}, which exported code may not")
