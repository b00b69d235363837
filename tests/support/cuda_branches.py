"""Every place in the code that depends on a CUDA device, and the test that makes it run without one.

A place is a file, a function and a piece of its source: a comparison with a device's type, `is_cuda`, anything of
`torch.cuda`, an error that only a card raises, the name of a backend for cards. `test_cuda_branches.py` fails when the
code has a place that BRANCHES lacks, when BRANCHES has one that the code lacks, and when a test named here is none;
conftest.py fails a test named here that did not run every line of its places.

To add an entry: run `pytest tests/kernels/test_cuda_branches.py`; it prints the lines that are missing. Write a test
that makes the place run on a CPU (`fake_cuda.py` has a card) and asserts what comes of it, and put its name in the
entry. A test of another file is "test_file.py::test_name". A test in this table has no parameters, for each run must
reach every line; it is traced, so it runs no kernel in the interpreter, which would take minutes then.
"""

import ast
import contextlib
import functools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "slagen"
FILES = {str(path.relative_to(SOURCE)): path for path in sorted(SOURCE.rglob("*.py"))}
FILES["scripts/gpu.py"] = ROOT / "scripts" / "gpu.py"

NAMES = re.compile(r".*cuda.*|OutOf\w+|TritonError|AcceleratorError|get_device_properties", re.IGNORECASE)
STRINGS = re.compile(r"(cuda|nccl|gpu|num_gpus|nvidia-smi)(:\d+)?", re.IGNORECASE)

Place = tuple[str, str]  # "file::function", source text


class _Finder(ast.NodeVisitor):
    """Collects the places of one file: (function, text) -> lines."""

    def __init__(self) -> None:
        self.inside: list[str] = []
        self.found: dict[Place, set[int]] = {}

    def add(self, node: Any) -> None:
        where = ".".join(self.inside) or "<module>"
        self.found.setdefault((where, ast.unparse(node)), set()).add(node.lineno)

    def enter(self, node: Any) -> None:
        self.inside.append(node.name)
        self.generic_visit(node)
        self.inside.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_ClassDef = enter

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Constant):  # a docstring is no place
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func) != "GPUTarget":  # what to compile for takes no device
            self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if any(_device_type(x) or _string(x) for x in ast.walk(node)):
            self.add(node)
        else:
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if any(NAMES.fullmatch(part) for part in ast.unparse(node).split(".")) and _plain(node):
            self.add(node)
        else:
            self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if NAMES.fullmatch(node.id) and isinstance(node.ctx, ast.Load):
            self.add(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if _string(node):
            self.add(node)


def _plain(node: Any) -> bool:
    """Whether it is a name with attributes and no more, read and not written."""
    while isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        node = node.value
    return isinstance(node, ast.Name)


def _device_type(node: Any) -> bool:
    name = getattr(node, "id", getattr(node, "attr", ""))
    return name == "device_type" or (name == "type" and ast.unparse(node).endswith("device.type"))


def _string(node: Any) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and bool(STRINGS.fullmatch(node.value))


def find(text: str) -> dict[Place, set[int]]:
    """The places of a file's text: (function, source) -> lines."""
    finder = _Finder()
    finder.visit(ast.parse(text))
    return finder.found


@functools.cache
def places() -> dict[Place, set[int]]:
    """The places of all files: ("file::function", source) -> lines."""
    return {
        (f"{name}::{where}", text): lines
        for name, path in FILES.items()
        for (where, text), lines in find(path.read_text()).items()
    }


def of_test(name: str) -> dict[Place, set[int]]:
    """The places that a test ("test_file.py::test_name") is named for, with their lines."""
    named = {
        (where, text) for where, tests in BRANCHES.items() for test, texts in tests.items() for text in texts
        if name in (test, f"test_cuda_branches.py::{test}")
    }  # fmt: skip
    return {place: lines for place, lines in places().items() if place in named} if named else {}


@contextlib.contextmanager
def reached(name: str) -> Iterator[None]:
    """Fail unless the block runs every line of the places that the test is named for."""
    expected = of_test(name)
    if not expected:
        yield
        return
    lines: set[tuple[str, int]] = set()
    ours = {str(FILES[where]): where for where in {where.split("::")[0] for where, _ in expected}}

    def in_line(frame: FrameType, event: str, _: Any) -> Any:
        lines.add((ours[frame.f_code.co_filename], frame.f_lineno))
        return in_line

    def in_call(frame: FrameType, event: str, _: Any) -> Any:
        return in_line if frame.f_code.co_filename in ours else None

    before = sys.gettrace()
    sys.settrace(in_call)
    try:
        yield
    finally:
        sys.settrace(before)
    missed = [
        f"{where} {text!r} in line {line}"
        for (where, text), its in expected.items() for line in its if (where.split("::")[0], line) not in lines
    ]  # fmt: skip
    if missed:
        pytest.fail(f"{name} is named in cuda_branches.py for places that it does not run: {'; '.join(missed)}")


# file::function -> {test: pieces of source}
BRANCHES: dict[str, dict[str, tuple[str, ...]]] = {
    "attention/dense/kernels.py::_sdpa": {"test_dense_backends_need_a_card": ("device.type != 'cuda'",)},
    "attention/sla/functional.py::choose_backend": {
        "test_cuda_kernels.py::test_auto_is_triton_on_a_card": ("q.is_cuda",)
    },
    "attention/sla/fused.py::_exact_products": {
        "test_kernels.py::test_products_are_exact_where_the_caller_allows_tf32": ("torch.backends.cuda.matmul",)
    },
    "attention/sla/fused.py::_on_device": {
        "test_cuda_kernels.py::test_launches_are_on_the_tensors_device": ("x.is_cuda", "torch.cuda.device")
    },
    "attention/sla/fused.py::_why_not": {
        "test_cuda_kernels.py::test_auto_is_triton_on_a_card": ("device_type == 'cuda'", "device_type == 'cpu'")
    },
    "attention/sla/fused.py::verify": {
        "test_cuda_kernels.py::test_nothing_is_tried_during_capture": (
            "q.is_cuda",
            "torch.cuda.is_current_stream_capturing",
        )
    },
    "benchmark/clock.py::measure_ceilings": {"test_ceilings_of_a_card": ("device.type == 'cuda'",)},
    "benchmark/clock.py::draw_inputs": {
        "test_a_row_on_a_card": ("device.type == 'cuda'", "torch.cuda.get_device_properties")
    },
    "benchmark/operator.py::_measure": {"test_a_row_on_a_card": ("setting.device.type == 'cuda'",)},
    "benchmark/loop.py::_dense": {"test_models_run_with_the_dense_backends_of_a_card": ("device.type == 'cuda'",)},
    "benchmark/operator.py::_reasons": {"test_a_row_on_a_card": ("torch.OutOfMemoryError",)},
    "generation/estimate.py::_placed": {
        "test_plan.py::test_device_and_dtype_count_in_a_plan": ("device == 'cuda'", "CUDA_DEFAULT")
    },
    "cli/generate.py::_estimated": {"test_a_plan_for_a_card_that_is_not_here": ("'cuda'", "CUDA_DEFAULT")},
    "batch/ray_workers.py::Driver._resources": {
        "test_ray_workers.py::test_workers_fit_the_machines": ("'GPU'", "'num_gpus'")
    },
    "doctor/checks.py::_driver": {"test_driver": ("'nvidia-smi'",)},
    "doctor/checks.py::_gpu": {
        "test_doctor_names_every_card": (
            "torch.cuda.is_available",
            "torch.version.cuda",
            "'gpu'",
            "torch.cuda.device_count",
            "torch.cuda.get_device_properties",
            "'cuda'",
        )
    },
    "doctor/checks.py::_kernels": {
        "test_doctor_tries_the_kernels_of_every_card": ("torch.cuda.device_count", "'cuda'")
    },
    "doctor/checks.py::check_gpu": {"test_doctor_names_every_card": ("finding.name == 'gpu'",)},
    "training/models.py::recomputes": {"test_a_card_recomputes_activations": ("device.type == 'cuda'",)},
    "training/setup.py::default_model": {
        "test_the_model_of_a_card": ("pick_device(device).type == 'cuda'", "DEFAULT_ON_CUDA")
    },
    "training/finetune.py::finetune": {"test_finetune_out_of_memory": ("torch.OutOfMemoryError",)},
    "generation/placing.py::choose_placement": {
        "test_offload.py::test_the_model_is_placed_by_the_cards_free_memory": (
            "device.type != 'cuda'",
            "torch.cuda.mem_get_info",
        ),
    },
    "wan/compiling.py::check_compiler": {
        "test_compiling.py::test_without_a_compiler_nothing_is_loaded": ("device.type == 'cuda'",)
    },
    "wan/compiling.py::compiling": {
        "test_compiling.py::test_what_a_compiler_says_is_one_line": ("torch.OutOfMemoryError",)
    },
    "generation/session.py::Session._within_memory": {
        "test_offload.py::test_out_of_memory_names_the_stage_and_the_next_setting": (
            "device.type == 'cuda'",
            "torch.OutOfMemoryError",
            "torch.cuda.mem_get_info",
        ),
    },
    "generation/session.py::free_memory": {
        "test_memory_is_given_back": ("torch.cuda.is_available", "torch.cuda.empty_cache")
    },
    "generation/decode.py::_write": {"test_decode_out_of_memory": ("torch.OutOfMemoryError",)},
    "generation/memory.py::has_card": {
        "test_a_card_is_found_without_torch": ("shutil.which('nvidia-smi') is not None",)
    },
    "generation/generate.py::enough_gpu_memory": {"test_generate_out_of_memory": ("torch.OutOfMemoryError",)},
    "kernels/failures.py::launching": {
        "test_cuda_kernels.py::test_what_a_launch_raises": ("torch.OutOfMemoryError", "TritonError")
    },
    "kernels/resources.py::shared_memory": {
        "test_cuda_kernels.py::test_tiles_follow_the_cards_shared_memory": (
            "device.type != 'cuda'",
            "triton.runtime.driver.active.utils.get_device_properties",
        )
    },
    "kernels/resources.py::tensor_memory": {
        "test_cuda_kernels.py::test_tiles_follow_the_cards_tensor_memory": (
            "device.type == 'cuda'",
            "torch.cuda.get_device_capability",
        )
    },
    "device.py::Device.to_dict": {"test_reports_name_the_card": ("self.type == 'cuda'", "'cuda'")},
    "machine.py::describe_device": {
        "test_reports_name_the_card": (
            "device.type == 'cuda'",
            "torch.cuda.get_device_properties",
            "'cuda'",
            "torch.version.cuda",
        )
    },
    "machine.py::PeakMemory.__init__": {"test_peaks_of_a_card": ("device.type == 'cuda'",)},
    "machine.py::PeakMemory._forget": {"test_peaks_of_a_card": ("torch.cuda.reset_peak_memory_stats",)},
    "machine.py::peak_memory_gib": {
        "test_reports_name_the_card": ("device.type == 'cuda'", "torch.cuda.max_memory_allocated")
    },
    "machine.py::pick_device": {
        "test_device_and_dtype": (
            "torch.cuda.is_available",
            "'cuda'",
            "device.type == 'cuda'",
            "torch.cuda.device_count",
        )
    },
    "machine.py::pick_dtype": {
        "test_device_and_dtype": ("device.type != 'cuda'", "torch.cuda.device", "torch.cuda.is_bf16_supported")
    },
    "benchmark/other_libraries.py::_flex_tiles": {"test_flex_gets_tiles_on_a_card": ("setting.device.type != 'cuda'",)},
    "training/distributed.py::Team.share": {"test_each_process_takes_its_card": ("self.device.type == 'cuda'",)},
    "processes.py::_check_cards": {"test_more_processes_than_cards": ("torch.cuda.device_count",)},
    "processes.py::joined": {
        "test_each_process_takes_its_card": ("device.type == 'cuda'", "'nccl'", "'cuda'", "torch.cuda.set_device")
    },
    "generation/resolve.py::find_weights": {"test_the_model_of_a_card": ("device.type != 'cuda'",)},
    "scripts/gpu.py::main": {
        "test_gpu_script.py::test_parts_without_a_result_run_in_order": (
            "torch.cuda.is_available",
            "torch.cuda.get_device_name",
        )
    },
    "scripts/gpu.py::measure": {
        "test_gpu_script.py::test_sweep_records_the_tile_that_ran": ("torch.cuda.synchronize",)
    },
    "scripts/gpu.py::save": {"test_gpu_script.py::test_smoke_makes_a_video_with_triton": ("'cuda'",)},
    "scripts/gpu.py::sweep": {
        "test_gpu_script.py::test_sweep_records_the_tile_that_ran": ("'cuda'", "torch.cuda.synchronize")
    },
    "scripts/gpu.py::time_call": {"test_gpu_script.py::test_time_of_a_call": ("torch.cuda.Event",)},
    "doctor/selftest.py::_bench": {"test_selftest_benches_wan_on_a_card": ("device.type == 'cpu'",)},
    "timing.py::SpanClock.__init__": {"test_spans_on_a_card": ("device_type == 'cuda'",)},
    "timing.py::SpanClock.cost_ms": {"test_spans_on_a_card": ("self.on_cuda", "'cuda'")},
    "timing.py::SpanClock.mark": {"test_spans_on_a_card": ("self.on_cuda", "torch.cuda.Event")},
    "timing.py::SpanClock.origin": {"test_spans_on_a_card": ("self.on_cuda",)},
    "timing.py::SpanClock.read": {"test_spans_on_a_card": ("self.on_cuda",)},
    "wan/models.py::resolve_model": {"test_the_model_of_a_card": ("device_type == 'cuda'", "CUDA_DEFAULT")},
    "wan/rotary.py::_is_proven": {
        "test_rotary.py::test_nothing_is_tried_while_a_graph_is_captured": (
            "x.is_cuda",
            "torch.cuda.is_current_stream_capturing",
        )
    },
    "wan/rotary.py::fits": {"test_rotary.py::test_backends_that_take_the_kernel": ("query.is_cuda",)},
    "wan/rotary.py::norm_rotate": {
        "test_rotary.py::test_launches_are_on_the_tensors_device": ("torch.cuda.device_of",)
    },
}
