"""What a problem's own code defines: all that its tests may use of a program."""

import ast
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Definitions:
    """Of the top level: `imports` as source, for the tests' own process, and the `names` of all else."""

    imports: str
    names: frozenset[str]


def definitions(code: str) -> Definitions:
    """Of a prompt or a reference solution; nothing, where it does not parse."""
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError):
        return Definitions(imports="", names=frozenset())
    imports: list[ast.stmt] = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            names.update(
                child.id for child in ast.walk(node) if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store)
            )
    return Definitions(imports=ast.unparse(ast.Module(imports, [])), names=frozenset(names))
