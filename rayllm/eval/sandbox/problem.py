"""What a problem's own code defines, and what of it the tests take from a program."""

import ast
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Definitions:
    """`setup`: source for the tests' own process; `names`: what they take from the program."""

    setup: str
    names: frozenset[str]


def of_prompt(prompt: str, entry_point: str) -> Definitions:
    """Of a function to be completed. The tests have the prompt's helpers as the prompt has them, whatever the program
    makes of those, and take its classes, because instances are the program's."""
    body = _top_level(prompt)
    classes = {node.name for node in body if isinstance(node, ast.ClassDef)}
    names = frozenset({entry_point, *classes})
    given: list[ast.stmt] = [node for node in body if getattr(node, "name", None) not in names]
    return Definitions(setup=ast.unparse(ast.Module(given, [])), names=names)


def of_solution(code: str) -> Definitions:
    """Of a reference solution: its imports are given, and all else that it defines is for the program to define."""
    body = _top_level(code)
    imports: list[ast.stmt] = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            names.update(
                child.id for child in ast.walk(node) if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store)
            )
    return Definitions(setup=ast.unparse(ast.Module(imports, [])), names=frozenset(names))


def _top_level(code: str) -> list[ast.stmt]:
    """Nothing, where it does not parse."""
    try:
        return ast.parse(code).body
    except (SyntaxError, ValueError):
        return []
