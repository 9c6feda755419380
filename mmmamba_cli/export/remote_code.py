"""The model's code as a few flat files that transformers loads without this package.

transformers downloads a repository's code by file name, so relative imports must be in the same
folder. The modules that the model and its processor need are concatenated, one file per top-level
subpackage, each module after those that it imports. If two modules define the same name, one of
them is renamed; nothing else changes.
"""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mmmamba_cli import __version__
from mmmamba_cli.export.source_renaming import (
    Bindings,
    Target,
    apply_edits,
    bound_names,
    rename_edits,
)

PACKAGE = "mmmamba_cli"
# Packages whose modules register themselves: nothing imports all of them by name.
REGISTERED_PACKAGES = (f"{PACKAGE}.architecture.mixers", f"{PACKAGE}.model.mixers")
ENTRY_MODULES = (
    f"{PACKAGE}.model.config",
    f"{PACKAGE}.model.modeling",
    f"{PACKAGE}.processing.processor",
    f"{PACKAGE}.processing.text_processor",
    f"{PACKAGE}.processing.tokenizer",
)
# Files that `auto_map` names; other subpackages have theirs, for example `mmmamba_ops`.
CONFIGURATION, MODELING, PROCESSING = (
    "configuration_mmmamba",
    "modeling_mmmamba",
    "processing_mmmamba",
)
SHARED_FILES = (MODELING, PROCESSING, "mmmamba_ops")
# Allowed imports besides the standard library and the code itself; torch requires jinja2.
DEPENDENCIES = frozenset(
    {"PIL", "jinja2", "numpy", "safetensors", "sentencepiece", "torch", "transformers"}
)


def bundle_files(entries: Iterable[str] | None = None) -> dict[str, str]:
    """Text by file name of the modules `entries` and all modules that they import.

    None is the model with all mixers, and its processor.

    Raises `ValueError`, a bug, for a module that imports more than `DEPENDENCIES`, and for files
    that would import each other.
    """
    if entries is None:
        mixers = (
            f"{package}.{module.name}"
            for package in REGISTERED_PACKAGES
            for module in pkgutil.iter_modules([str(_source(package).parent)])
        )
        entries = (*ENTRY_MODULES, *mixers)
    bundle = _Bundle(_collect(entries))
    return {f"{name}.py": bundle.text(name) for name in sorted(bundle.files)}


def file_of(module: str) -> str:
    """The file, without suffix, for `module`."""
    package = module.split(".")[1] if module.startswith(f"{PACKAGE}.") else module
    named = {"model": MODELING, "processing": PROCESSING}
    if module == f"{PACKAGE}.model.config":
        return CONFIGURATION
    return named.get(package, f"mmmamba_{package}")


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
        """Whether the module reads annotations as values; `__future__` would make them strings."""
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
        """Target of each module-level name; None for names of other packages."""
        found: Bindings = {name: (self.name, name) for name in self.defined}
        for node in _statements(self.tree.body):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found |= bindings_of(node)
        return found


def _collect(entries: Iterable[str]) -> dict[str, _Module]:
    """Modules by name, each after those that it imports at its top level."""
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
    """The modules, their files, and their names in the exported code."""

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
            # The module nearest to the top level keeps the name.
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
        """The file for `module`: its subpackage's, or a separate one.

        Annotations are strings in a subpackage's file, so a module that reads them is separate.
        """
        if self._modules[module].reads_annotations and file_of(module) in SHARED_FILES:
            return "_".join(["mmmamba", *module.split(".")[1:]])
        return file_of(module)

    def text(self, file: str) -> str:
        """The text of a file: imports from other files, then its modules."""
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
                *(
                    f"from .{other} import {', '.join(sorted(names))}"
                    for other, names in sorted(needed.items())
                ),
                *parts,
                "",
            ]
        )

    def exported_name(self, target: Target) -> str:
        """The name of a target in the exported code."""
        return self._exported_names[self._defining_module(target)]

    def _module_text(self, module: _Module, file: str) -> str:
        edits = list(rename_edits(module.tree, module.bindings, bindings_of, self.exported_name))
        replaced: dict[int, tuple[int, str]] = {}
        for statement in _package_imports(module.tree):
            last = statement.end_lineno or statement.lineno
            replaced[statement.lineno] = (last, self._replacement_import(statement, file))
        for node in module.tree.body:
            future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
            listed = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            if future or listed:
                replaced[node.lineno] = (node.end_lineno or node.lineno, "")
        place = module.name.replace(".", "/")
        return f"\n# {place}\n{apply_edits(module.source, edits, replaced)}"

    def _replacement_import(self, node: ast.ImportFrom, file: str) -> str:
        """The replacement of an import of this package; empty at module level."""
        if node.col_offset == 0:
            return ""
        indent = " " * node.col_offset
        others: dict[str, set[str]] = defaultdict(set)
        for target in self._targets(node):
            if self.file_of(target[0]) != file:
                others[self.file_of(target[0])].add(self.exported_name(target))
        lines = [
            indent + f"from .{other} import {', '.join(sorted(names))}"
            for other, names in sorted(others.items())
        ]
        return "\n".join(lines) or f"{indent}pass"

    def _targets(self, node: ast.stmt) -> Iterator[Target]:
        """Targets of an import of this package; for a module, all names that it defines."""
        if not isinstance(node, ast.ImportFrom) or not _is_package_module(node.module):
            return
        for target in bindings_of(node).values():
            assert target is not None
            if target[1] is not None:
                yield self._defining_module(target)
            else:
                yield from ((target[0], name) for name in self._modules[target[0]].defined)

    def _defining_module(self, target: Target) -> Target:
        module, name = target
        while (module, name) not in self._exported_names:
            found = self._modules[module].bindings.get(name or "")
            if found is None or found[1] is None:
                raise ValueError(f"{module} has no {name} that exported code could use")
            module, name = found
        return module, name

    def _check_no_cycle(self, file: str, other: str) -> None:
        """Raise `ValueError` if `other` imports `file` at its top level."""
        for module in self.files[other]:
            for node in module.tree.body:
                if any(self.file_of(target[0]) == file for target in self._targets(node)):
                    raise ValueError(f"{file} and {other} would import each other: {module.name}")


def _check_third_party(file: str, modules: Iterable[_Module]) -> None:
    """Raise `ValueError` if a third-party name differs between two modules of a file."""
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


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements at module level, including those inside `if` and `try`."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            inner = [*node.body, *node.orelse, *getattr(node, "finalbody", [])]
            for handler in getattr(node, "handlers", []):
                inner += handler.body
            yield from _statements(inner)


def bindings_of(node: ast.stmt) -> Bindings:
    """Bindings of an import statement; None for other packages."""
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
    """The names in `from package import name` that are modules, with the full module names.

    A name that the package itself binds is not a module: `ops.ssd` is both a module and a function.
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
    """Names that a package imports from its modules."""
    tree = ast.parse(_source(package).read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module != package
        for alias in node.names
    }


def _check_dependencies(module: str, tree: ast.AST) -> None:
    """Raise `ValueError` for imports besides `DEPENDENCIES`; transformers requires all of them."""
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
