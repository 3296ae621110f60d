"""Text to learn from that every Python brings along: the standard library's docstrings."""

from __future__ import annotations

import ast
import contextlib
import sysconfig
from pathlib import Path


def docstrings(pattern: str = "**/*.py") -> list[str]:
    """The docstrings of the standard library's files of such names, tests left out, in order."""
    library = Path(sysconfig.get_path("stdlib"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    texts = []
    for path in sorted(library.glob(pattern)):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        with contextlib.suppress(SyntaxError, UnicodeDecodeError, RecursionError):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
            texts += [text for text in found if text]
    return texts
