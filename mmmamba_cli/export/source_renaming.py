"""Renaming of a module's top-level names in its source text.

Names are resolved through Python's scopes: parameters and local variables shadow module names.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

# The object a name refers to: (module, name in that module), or (module, None) for the module.
Target = tuple[str, str | None]
Bindings = dict[str, Target | None]
Functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
Comprehensions = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp


@dataclass(frozen=True)
class Edit:
    """Replace `old`, the text of `node` or the name that `node` defines, by `text`."""

    node: ast.AST
    old: str
    text: str


def bound_names(body: list[ast.stmt]) -> set[str]:
    """Names that the statements bind in their scope, without imports."""
    found: set[str] = set()
    waiting: list[ast.AST] = list(body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            continue
        if isinstance(node, ast.Lambda | Comprehensions):
            # An assignment expression binds in the enclosing scope.
            found |= {n.target.id for n in ast.walk(node) if isinstance(n, ast.NamedExpr)}
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            found.add(node.id)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            found.add(node.name)
        waiting += ast.iter_child_nodes(node)
    return found


def rename_edits(
    tree: ast.Module,
    module: Bindings,
    imports: Callable[[ast.stmt], Bindings],
    final: Callable[[Target], str],
) -> Iterator[Edit]:
    """Yield edits that replace references to module-level names by their `final` names.

    `module` maps the module's names to their targets; `imports` returns the bindings of an import
    statement.
    """
    walker = _RenameVisitor(module, imports, final)
    walker.visit(tree)
    yield from walker.edits


class _RenameVisitor(ast.NodeVisitor):
    def __init__(
        self,
        module: Bindings,
        imports: Callable[[ast.stmt], Bindings],
        final: Callable[[Target], str],
    ):
        # Scopes, outermost first, and whether each is a class body.
        self._scopes: list[tuple[Bindings, bool]] = [(module, False)]
        self._imports = imports
        self._final = final
        self.edits: list[Edit] = []

    def _lookup(self, name: str) -> Target | None:
        innermost = len(self._scopes) - 1
        for depth in range(innermost, -1, -1):
            names, is_class = self._scopes[depth]
            if name in names and (not is_class or depth == innermost):
                return names[name]
        return None

    def _rename(self, node: ast.AST, old: str, target: Target) -> None:
        text = self._final(target)
        if text != old:
            self.edits.append(Edit(node, old, text))

    def visit_Name(self, node: ast.Name) -> None:
        target = self._lookup(node.id)
        if target is None:
            return
        if target[1] is None:
            raise ValueError(f"module {target[0]} is used as a value, as {node.id}")
        self._rename(node, node.id, target)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        value = node.value
        target = self._lookup(value.id) if isinstance(value, ast.Name) else None
        if isinstance(value, ast.Name) and target is not None and target[1] is None:
            self._rename(node, f"{value.id}.{node.attr}", (target[0], node.attr))
        else:
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._visit_function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._visit_function(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._rename_definition(node)
        for part in (*node.decorator_list, *node.bases, *node.keywords):
            self.visit(part)
        self._visit_scope(self._bindings(node.body), True, node.body)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._visit_arguments(node.args)
        self._visit_scope(dict.fromkeys(_parameters(node.args)), False, [node.body])

    def _visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._rename_definition(node)
        for part in node.decorator_list:
            self.visit(part)
        self._visit_arguments(node.args)
        if node.returns is not None:
            self.visit(node.returns)
        names = {**dict.fromkeys(_parameters(node.args)), **self._bindings(node.body)}
        for inner in ast.walk(node):
            if isinstance(inner, ast.Global):
                names = {name: found for name, found in names.items() if name not in inner.names}
        self._visit_scope(names, False, node.body)

    def _rename_definition(
        self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    ) -> None:
        target = self._lookup(node.name)
        if target is not None:
            self._rename(node, node.name, target)

    def _visit_arguments(self, arguments: ast.arguments) -> None:
        """Visit defaults and annotations, which are evaluated in the enclosing scope."""
        for part in (*arguments.defaults, *filter(None, arguments.kw_defaults)):
            self.visit(part)
        for argument in _all_arguments(arguments):
            if argument.annotation is not None:
                self.visit(argument.annotation)

    def _bindings(self, body: list[ast.stmt]) -> Bindings:
        found: Bindings = dict.fromkeys(bound_names(body))
        waiting: list[ast.AST] = list(body)
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.Import | ast.ImportFrom):
                found |= self._imports(node)
            elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                waiting += ast.iter_child_nodes(node)
        return found

    def _visit_scope(self, names: Bindings, is_class: bool, body: Sequence[ast.AST]) -> None:
        self._scopes.append((names, is_class))
        for part in body:
            self.visit(part)
        self._scopes.pop()

    def _comprehension(self, node: Comprehensions) -> None:
        targets = [n for part in node.generators for n in ast.walk(part.target)]
        names: Bindings = {n.id: None for n in targets if isinstance(n, ast.Name)}
        self._visit_scope(names, False, list(ast.iter_child_nodes(node)))

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _comprehension


def _all_arguments(arguments: ast.arguments) -> list[ast.arg]:
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [*named, *filter(None, (arguments.vararg, arguments.kwarg))]


def _parameters(arguments: ast.arguments) -> list[str]:
    return [argument.arg for argument in _all_arguments(arguments)]


def apply_edits(text: str, edits: list[Edit], replaced_lines: Mapping[int, tuple[int, str]]) -> str:
    """Apply the edits to the source text.

    `replaced_lines` maps the first line number of a replaced block to its last line number and its
    replacement.

    Raises `ValueError` where the text and the positions of the tree disagree, as they do inside
    f-strings before Python 3.12.
    """
    lines = [line.encode() for line in text.splitlines()]
    spans = []
    for edit in edits:
        node = edit.node
        row, start = node.lineno - 1, node.col_offset  # type: ignore[attr-defined]
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            start = lines[row].index(edit.old.encode(), start)
        spans.append((row, start, edit.old.encode(), edit.text.encode()))
    for row, start, old, new in sorted(set(spans), reverse=True):
        line = lines[row]
        if line[start : start + len(old)] != old:
            raise ValueError(
                f"line {row + 1} has no {old.decode()} at column {start}: {text!r:.60}"
            )
        lines[row] = line[:start] + new + line[start + len(old) :]
    kept: list[str] = []
    row = 0
    while row < len(lines):
        if row + 1 in replaced_lines:
            row, replacement = replaced_lines[row + 1]
            kept += [replacement] if replacement else []
            continue
        kept.append(lines[row].decode())
        row += 1
    return "\n".join(kept)
