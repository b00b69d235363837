"""The sizes that keep a file readable in one sitting; today's larger ones are listed, and the list only shrinks."""

import ast
import statistics
from pathlib import Path

import slagen

ROOT = Path(slagen.__file__).parent
FILE, FUNCTION, CLASS = 400, 60, 250  # lines at most
MEDIAN = 150  # of the files

# Whoever splits one takes it out of the list; nothing is added to it.
LARGE_FILES: set[str] = set()
LARGE_FUNCTIONS: set[str] = set()
LARGE_CLASSES: set[str] = set()


def is_kernel(node: ast.AST) -> bool:
    """Whether a function is compiled by Triton, whose kernels are read top to bottom."""
    return any("triton" in ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ()))


def definitions(node: ast.AST, prefix: str = ""):
    """(qualified name, node) of every function and class below a node."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + child.name, child
            yield from definitions(child, f"{prefix}{child.name}.")
        else:
            yield from definitions(child, prefix)


def too_large(sources: dict[str, str]) -> tuple[set[str], set[str], set[str]]:
    """Files by path, functions and classes as "path:name", that are over the limits; without their decorators."""
    files = {name for name, text in sources.items() if len(text.splitlines()) > FILE}
    functions, classes = set(), set()
    for path, text in sources.items():
        for name, node in definitions(ast.parse(text)):
            lines = node.end_lineno - node.lineno + 1
            if isinstance(node, ast.ClassDef):
                classes |= {f"{path}:{name}"} if lines > CLASS else set()
            elif lines > FUNCTION and not is_kernel(node):
                functions.add(f"{path}:{name}")
    return files, functions, classes


def sources() -> dict[str, str]:
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py")}


def test_nothing_grows_over_the_limits():
    listed = (LARGE_FILES, LARGE_FUNCTIONS, LARGE_CLASSES)
    for kind, found, known in zip(("file", "function", "class"), too_large(sources()), listed, strict=True):
        assert not found - known, f"too large a {kind}: {sorted(found - known)}. Split it."
        assert not known - found, f"no longer too large, or gone: {sorted(known - found)}. Take it out of the list."


def test_the_median_file_is_short():
    assert statistics.median(len(text.splitlines()) for text in sources().values()) <= MEDIAN


def test_what_is_too_large_is_found():
    body = "    x = 1\n"
    text = "@triton.jit\ndef k():\n" + body * 60 + "class C:\n    def f(self):\n" + f"    {body}" * 60 + body * 200
    assert too_large({"a.py": text, "b.py": "x = 1\n" * 401, "c.py": "def g():\n" + body * 59}) == (
        {"b.py"}, {"a.py:C.f"}, {"a.py:C"},
    )  # fmt: skip
