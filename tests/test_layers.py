"""Who may import whom: packages on floors, every import downwards, and no circle of modules."""

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "slagen"
FILES = sorted(SOURCE.rglob("*.py"))

# A package or module of the top folder imports from lower floors only; not from its own floor, nor from above.
FLOORS = (
    {"errors", "packages", "interrupts", "device", "torchrun"},
    {"io"},
    {"machine", "timing", "plot", "html", "video", "settings", "events"},
    {"kernels", "processes"},
    {"attention"},
    {"formats"},
    {"wan"},
    {"generation"},
    {"batch", "training", "benchmark", "comparison", "maps"},
    {"doctor", "tuning"},
    {"cli"},
    {"__main__", "__init__"},
)
FLOOR = {package: level for level, packages in enumerate(FLOORS) for package in packages}
IMPORTERS = {
    "triton": {"kernels"},
    "diffusers": {"wan"},
    "imageio": {"video"},
    "imageio_ffmpeg": {"video"},
    "matplotlib": {"plot"},
    "ray": {"batch"},
    "av": {"training"},
    "peft": {"training"},
    "PIL": {"generation"},
    "bitsandbytes": {"training"},
    "torchmetrics": {"comparison"},
    "jinja2": {"html"},
    "typer": {"cli"},
    "rich": {"cli"},
}


def package_of(file: Path) -> str:
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


def imported_packages(file: Path, **options: bool) -> set[str]:
    """The packages a file imports from, but for its own, and for the version kept in `slagen/__init__.py`."""
    names = {module.split(".")[1] for module in imported_modules(file, **options) if module.startswith("slagen.")}
    return {name for name in names if (SOURCE / name).is_dir() or (SOURCE / f"{name}.py").is_file()} - {
        package_of(file)
    }


def name(file: Path) -> str:
    return str(file.relative_to(SOURCE))


@pytest.mark.parametrize("file", FILES, ids=name)
def test_imports_point_down(file):
    assert package_of(file) in FLOOR, f"{name(file)} is on no floor; add it to FLOORS first"
    assert [package for package in imported_packages(file) if FLOOR[package] >= FLOOR[package_of(file)]] == []


def module_of(file: Path) -> str:
    return ".".join(["slagen", *file.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")


def test_modules_import_each_other_in_no_circle():
    """Neither while they are loaded nor later; what a package's `__init__` hands out on first use counts nowhere."""
    known = {module_of(file) for file in FILES if file.name != "__init__.py"}
    graph = {module_of(file): imported_modules(file) & known for file in FILES if file.name != "__init__.py"}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, with the circle


@pytest.mark.parametrize("file", FILES, ids=name)
def test_every_heavy_dependency_is_imported_by_one_package(file):
    packages = {module.split(".")[0] for module in imported_modules(file)}
    assert {package for package in packages & IMPORTERS.keys() if package_of(file) not in IMPORTERS[package]} == set()


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
        "batch/ray_connection.py": ["rmtree", "mkdtemp"],  # a folder for Ray's sockets
        "batch/ray_workers.py": ["open"],  # the null device
        "cli/ranks.py": ["open"],  # the same
        "wan/convert.py": ["save_pretrained", "save_pretrained", "copytree"],  # into the stage that `convert` opens
        "kernels/sass.py": ["TemporaryDirectory", "write_bytes"],  # where nothing else of the package is imported
        "machine.py": ["write_text"],  # to the kernel, that it begins a process's peak memory anew
        "plot.py": ["savefig", "savefig", "savefig"],  # into the stage that `bench` opens, and into memory
    }
    owners = {"io/files.py", "io/stages.py", "io/locks.py"}
    found = {name(file): writes(ast.parse(file.read_text(encoding="utf-8"))) for file in FILES}
    assert {file: calls for file, calls in found.items() if calls and file not in owners} == elsewhere


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
        packages = imported_packages(file, top_level_only=True)
        if package_of(file) == "attention":
            assert "kernels" not in packages, name(file)
        if package_of(file) in {"cli", "__init__", "__main__"}:
            modules = {m for m in imported_modules(file, top_level_only=True) if m.startswith("slagen.")}
            assert not {m for m in modules if m.split(".")[1] in {"kernels", "wan", "doctor"}}, name(file)


@pytest.mark.parametrize("module", ["slagen", "slagen.generation.config", "slagen.training.config", "slagen.cli.main"])
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
        timeout=1800,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
