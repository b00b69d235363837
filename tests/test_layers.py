"""Who may import whom: the picture of the rooms, held against the imports of every file."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "slagen"
FILES = sorted(SOURCE.rglob("*.py"))

LEAVES = {"errors", "config", "timing", "video", "report", "plot", "machine", "models", "prompts", "manifest", "pages"}
LEAVES |= {"streams", "latents", "memory", "quality", "footage", "interrupts", "packages", "plain", "files"}
LEAVES |= {"video_lists", "deinterlace", "text", "documents", "forms", "model_files", "told"}
LEAVES |= {"paths", "spreadsheet"}
LIBRARY = {"kernels", "attention", "wan"}
TASKS = {"generate", "bench", "finetune", "doctor", "convert", "plan"}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors", "text"},
    "text": {"errors"},
    "paths": {"errors", "text"},
    "spreadsheet": set(),
    "usage": {"errors", "text", "packages"},
    "forms": set(),
    "documents": {"errors", "files", "forms"},
    "model_files": {"errors", "documents", "files", "forms"},
    "config": {"attention", "errors", "forms", "text", "paths"},
    "timing": {"errors", "config"},
    "video": {"errors", "config", "files"},
    "report": {"attention", "errors", "config", "files", "timing", "text"},
    "told": {"errors", "documents", "files", "forms", "report", "video"},
    "models": {"attention", "errors", "config", "files", "model_files", "text"},
    "plot": set(),
    "machine": {"errors", "text"},
    "kernels": set(),
    "attention": {"kernels", "errors", "forms"},
    "wan": {"kernels", "attention"} | LEAVES,
    "prompts": {"errors", "config", "documents", "forms", "text", "spreadsheet"},
    "manifest": {"errors", "files", "documents", "forms", "text"},
    "pages": {"text"},
    "packages": set(),
    "plain": {"text"},
    "quality": {"errors"},
    "interrupts": set(),
    "footage": {"errors", "deinterlace", "documents", "forms", "text", "spreadsheet", "video_lists"},
    "video_lists": {"errors", "documents", "forms", "spreadsheet"},
    "deinterlace": set(),
    "resolve": LIBRARY | LEAVES,
    "methods": LIBRARY | LEAVES,
    "tables": {"text"},
    **{task: {"resolve"} | LIBRARY | LEAVES for task in TASKS},
    "bench": {"methods", "tables", "resolve"} | LIBRARY | LEAVES,
    "finetune": {
        "generate",
        "resolve",
        "dataset",
        "embeddings",
        "parallel",
        "trainer",
        "training_state",
        "training_log",
    }
    | LIBRARY
    | LEAVES,
    "training_log": {"pages", "plot", "files", "video", "errors", "documents", "forms"},
    "selftest": {"doctor", "generate", "bench"} | LIBRARY | LEAVES,
    "replay": {"generate"} | LIBRARY | LEAVES,
    "decode": {"generate"} | LIBRARY | LEAVES,
    "streams": set(),
    "memory": {"attention", "errors", "models", "model_files", "text"},
    "latents": {"errors", "files", "forms", "model_files", "text"},
    "dataset": {"generate", "resolve", "embeddings"} | LIBRARY | LEAVES,
    "parallel": {"errors", "config", "text"},
    "trainer": {"dataset", "parallel"} | LEAVES,
    "training_state": {"trainer", "parallel"} | LEAVES,
    "embeddings": {"generate", "resolve"} | LIBRARY | LEAVES,
    "batch": {"generate", "resolve", "embeddings"} | LIBRARY | LEAVES,
    "cluster": {"generate", "batch"} | LEAVES,
    "console": LEAVES,
    "cli": {"console", "usage", "batch", "cluster", "replay", "decode", "dataset", "selftest"}
    | TASKS
    | LIBRARY
    | LEAVES,
    "__main__": {"cli", "packages", "errors"},
    "__init__": TASKS | LIBRARY | LEAVES,
}
DOORS = {
    "triton": {"kernels"},
    "diffusers": {"wan"},
    "imageio": {"video"},
    "imageio_ffmpeg": {"video"},
    "matplotlib": {"plot"},
    "ray": {"cluster"},
    "av": {"footage", "deinterlace"},
    "peft": {"wan"},
    "PIL": {"quality"},
    "bitsandbytes": {"trainer"},
    "jinja2": {"pages"},
    "typer": {"cli"},
    "rich": {"cli", "console"},
}


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_modules(file: Path, *, top_level_only: bool = False) -> set[str]:
    """Full names of what a file imports, for `from x import y` both x and x.y; not what is for type checkers only."""
    package = ("slagen", *file.relative_to(SOURCE).parent.parts)
    modules: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*parts, *([node.module] if node.module else [])])
            modules.update({base}, (f"{base}.{alias.name}" for alias in node.names))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text(encoding="utf-8")))
    return modules


def imported_rooms(file: Path, **options: bool) -> set[str]:
    """The rooms a file imports from, but for its own, and for the version kept in `slagen/__init__.py`."""
    names = {module.split(".")[1] for module in imported_modules(file, **options) if module.startswith("slagen.")}
    return {name for name in names if (SOURCE / name).is_dir() or (SOURCE / f"{name}.py").is_file()} - {room_of(file)}


def name(file: Path) -> str:
    return str(file.relative_to(SOURCE))


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_point_left(file):
    assert room_of(file) in MAY_IMPORT, f"{name(file)} is in no known room; add it to the picture first"
    assert imported_rooms(file) <= MAY_IMPORT[room_of(file)]


@pytest.mark.parametrize("file", FILES, ids=name)
def test_every_heavy_dependency_has_one_door(file):
    packages = {module.split(".")[0] for module in imported_modules(file)}
    assert {package for package in packages & DOORS.keys() if room_of(file) not in DOORS[package]} == set()


WRITING = {
    "replace", "rename", "unlink", "rmtree", "rmdir", "touch", "write_text", "write_bytes", "mkdtemp", "mkstemp",
    "TemporaryDirectory", "NamedTemporaryFile", "save_file", "save_pretrained", "save_config", "copytree", "savefig",
}  # fmt: skip
OWNERS = {"os", "shutil", "tempfile", "Path"}


def writes(node: ast.AST, within: bool = False) -> list[str]:
    """Calls that write to the disk and stand in no `with` of `files`, by line and name."""
    if isinstance(node, ast.With):
        opened = [item.context_expr for item in node.items]
        names = {call.func.id for call in opened if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}
        within = within or bool(names & {"writing", "staging", "scratch"})
    found = []
    if isinstance(node, ast.Call) and not within:
        function = node.func
        method = isinstance(function, ast.Attribute)
        called = function.attr if method else getattr(function, "id", "")
        on_text = method and called in ("replace", "rename") and getattr(function.value, "id", "") not in OWNERS
        ours = not method and called in {"write_text", "write_bytes", "rename", "replace"}  # of `files`, and renamers
        if called in WRITING and not on_text and not ours:
            found.append(called)
        mode = node.args[1:2] if called == "open" and not method else node.args[:1] if called == "open" else []
        if any(isinstance(arg, ast.Constant) and str(arg.value)[:1] in ("w", "a", "x") for arg in mode):
            found.append("open")
    return found + [name for child in ast.iter_child_nodes(node) for name in writes(child, within)]


def test_files_has_every_write():
    """Or two runs share a temporary name, a link is followed, and a killed run leaves half a file."""
    elsewhere = {
        "batch/ray_workers.py": ["open", "rmtree", "mkdtemp"],  # the null device; a folder for Ray's sockets
        "wan/convert.py": ["save_pretrained", "save_pretrained", "copytree"],  # into the stage that `convert` opens
        "kernels/sass.py": ["TemporaryDirectory", "write_bytes"],  # where nothing else of the package is imported
        "plot.py": ["savefig", "savefig"],  # into the stage that `bench` opens, and into memory
    }
    found = {name(file): writes(ast.parse(file.read_text(encoding="utf-8"))) for file in FILES}
    assert {file: calls for file, calls in found.items() if calls and file != "io/files.py"} == elsewhere


def test_definition_and_kernels_judge_each_other():
    """The reference shares no code with the kernels, nor forward with backward but for the primitives."""
    for file in FILES:
        modules = imported_modules(file)
        if file.match("attention/sla/reference.py"):
            assert not any(module.startswith("slagen.kernels") for module in modules)
        if file.match("kernels/forward.py"):
            assert not any(module.startswith("slagen.kernels.backward") for module in modules)
        if file.match("kernels/backward.py"):
            assert not any(module.startswith("slagen.kernels.forward") for module in modules)


def test_kernels_and_tasks_are_imported_when_needed():
    """So that the reference works without Triton, and `slagen --help` without torch."""
    for file in FILES:
        rooms = imported_rooms(file, top_level_only=True)
        if room_of(file) == "attention":
            assert "kernels" not in rooms, name(file)
        if room_of(file) in {"cli", "console", "__init__", "__main__"}:
            assert not rooms & (TASKS | LIBRARY | {"batch", "cluster", "dataset"}), name(file)


@pytest.mark.parametrize("module", ["slagen", "slagen.config", "slagen.cli.main"])
def test_import_costs_no_torch(module):
    if module == "slagen.cli.main":
        pytest.importorskip("typer", reason="needs typer")
    heavy = "{'torch', 'diffusers', 'transformers', 'triton', 'numpy'}"
    code = f"import sys, {module}; print(*sorted({heavy} & sys.modules.keys()))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SOURCE.parent)},
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
