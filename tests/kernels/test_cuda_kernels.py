"""The kernels' first call on a card, faked: what is tried, what gives way, and which tiles run then."""

import dataclasses
import re
import subprocess
import threading
import warnings

import pytest
import torch
from fake_cuda import CARD, fake_card, on_card
from numerics import make_proj, make_qkv
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="needs Triton, which is for Linux")

from triton.runtime.errors import OutOfResources  # noqa: E402

from slagen.attention import sparse_linear_attention  # noqa: E402
from slagen.attention.sla import fused
from slagen.attention.sla.config import SLAConfig  # noqa: E402
from slagen.attention.sla.functional import choose_backend  # noqa: E402
from slagen.attention.sla.reference import reference_attention  # noqa: E402
from slagen.benchmark import run as bench
from slagen.cli.main import run  # noqa: E402
from slagen.doctor import checks as doctor
from slagen.errors import EnvironmentProblem, KernelProblem  # noqa: E402
from slagen.generation import session  # noqa: E402
from slagen.kernels import failures, forward, resources  # noqa: E402
from slagen.kernels.failures import LaunchError, launching  # noqa: E402
from slagen.kernels.resources import Choices, Tiles  # noqa: E402

if torch.cuda.is_available():
    pytest.skip("needs a machine without CUDA, where a fake takes its place", allow_module_level=True)

SMALL = SLAConfig(0.5, block_m=16, block_n=16)


@pytest.fixture
def card(monkeypatch):
    """A card, and choices of tiles that know nothing yet."""
    with resources.using(Choices()):
        yield fake_card(monkeypatch)


def test_trial_inside_inference_mode():
    """`generate` and `bench` call there, where autograd records nothing until one leaves it."""
    with torch.inference_mode():
        assert fused.trial(torch.zeros(1, 1, 1, 16), SMALL) is None


def test_trial_saves_nothing_for_a_checkpointed_block():
    """finetune recomputes blocks on a card; the first run of one must save what the second does."""
    x = torch.randn(3, requires_grad=True)
    tried = []

    def block(x):
        if not tried:
            tried.append(fused.trial(torch.zeros(1, 1, 1, 16), SMALL))
        return (2 * x).sin()

    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert tried == [None]
    torch.testing.assert_close(x.grad, 2 * (2 * x.detach()).cos())


@pytest.mark.slow
def test_the_first_call_tries_the_kernels(card, monkeypatch):
    """Once for its kind, inside inference mode too; every launch is on the tensors' own device."""
    q, k, v = (on_card(x) for x in make_qkv((1, 1, 40, 16), torch.float32))
    weight, bias = (on_card(x) for x in make_proj(16, torch.float32))
    with torch.inference_mode():
        o = sparse_linear_attention(q, k, v, SMALL, weight, bias)
        launches = len(card.calls)
        sparse_linear_attention(q, k, v, SMALL, weight, bias)
    assert choose_backend(q) == "triton" and o.is_cuda
    expected = sparse_linear_attention(q.cpu(), k.cpu(), v.cpu(), SMALL, weight.cpu(), bias.cpu(), backend="torch")
    torch.testing.assert_close(o.cpu(), expected)
    assert len(resources.current().verified) == 1
    assert launches == 2 and len(card.calls) == launches + 1 and set(card.calls) == {("device", CARD)}
    tried = []
    monkeypatch.setattr(fused, "_attempt", lambda q, config: tried.append((q.dtype, config)) or (None, None))
    other = dataclasses.replace(SMALL, linear_domain="marginal")
    for x, config in ((q, other), (q, dataclasses.replace(SMALL, feature_map="elu")), (q.half(), SMALL)):
        sparse_linear_attention(*(on_card(y.to(x.dtype)) for y in (q, k, v)), config, weight, bias)
    assert len(tried) == 3 and len(resources.current().verified) == 4  # each other kind is tried


def test_launches_are_on_the_tensors_device(card):
    with fused._on_device(torch.zeros(1)):
        assert card.calls == []
    with fused._on_device(on_card(torch.zeros(1))):
        assert card.calls == [("device", CARD)]


def test_a_launch_that_fails_names_its_kernel(monkeypatch):
    """It is the one whose tile was asked for last."""

    def call(q, k, v, *rest):
        resources.tiles("dq", q, 16, 16)
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(fused, "_call", call)
    q = torch.zeros(1, 1, 1, 16)
    fault, kernel = fused._attempt(q, SMALL)
    assert fault.startswith("out of resource: shared memory") and kernel == "dq"
    assert fused.trial(q, SMALL) == fault


NO_COMPILER = RuntimeError(
    "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl."
)
COMPILER_FAILS = subprocess.CalledProcessError(1, ["/usr/bin/gcc", "/tmp/x/cuda_utils.c", "-O3"])
OUTSIDE = {
    "no-compiler": (NO_COMPILER, "there is no C compiler"),
    "compiler-fails": (COMPILER_FAILS, "gcc cannot compile Triton's launcher .exit code 1"),
    "driver": (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), "the driver.*image is invalid"),
    "cache": (PermissionError(13, "Permission denied", "/home/user/.triton"), "/home/user/.triton: Permission denied"),
    "libcuda": (AssertionError("libcuda.so cannot found!\nPlease"), "libcuda.so cannot found!"),
    "launcher": (ImportError("x.so: failed to map segment"), "failed to map segment"),
    "no-driver": (RuntimeError("0 active drivers ([]). There should only be one."), "0 active drivers"),
}


def raising(error):
    def call(*given):
        raise error

    return call


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_the_machine_lacks_is_a_problem_of_the_environment(name, card, monkeypatch, tmp_path):
    """doctor crashed over it and called it a bug in slagen; a call is a RuntimeError still, and no tile gives way."""
    error, words = OUTSIDE[name]
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(failures.sysconfig, "get_path", lambda *given: str(tmp_path))
    monkeypatch.setattr(fused, "_call", raising(error))
    q = on_card(torch.zeros(1, 1, 16, 16))
    with pytest.raises(EnvironmentProblem, match=words) as caught:
        sparse_linear_attention(q, q, q, SMALL)
    assert isinstance(caught.value, RuntimeError) and caught.value.exit_code == 4
    assert "\n" not in str(caught.value) and not resources.current()._steps
    (finding,) = doctor._kernels()
    assert finding.name == "kernels 0" and finding.status == "problem"
    assert re.search(words, finding.found) and "--backend torch" in finding.fix
    assert f"{finding.found}. Try {finding.fix}." == str(caught.value)


def test_missing_headers_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(failures.sysconfig, "get_path", lambda *given: str(tmp_path))
    monkeypatch.setattr(fused, "_call", raising(COMPILER_FAILS))
    message = rf"{re.escape(str(tmp_path))}/Python.h, which .*, is missing. Try apt install python3-dev, or --backend"
    with pytest.raises(KernelProblem, match=message):
        fused.trial(torch.zeros(1, 1, 1, 16), SMALL)


def test_what_a_launch_raises():
    """Of a tile, of the machine, and what passes as it is: a lack of memory, and a bug."""
    tile = {
        "tile": OutOfResources(300_000, 232_448, "shared memory"),
        "passes": RuntimeError("PassManager::run failed"),
    }
    for error, of_tile in ((tile["tile"], True), (tile["passes"], True), (NO_COMPILER, False)):
        with pytest.raises(LaunchError) as caught, launching():
            raise error
        assert caught.value.of_tile == of_tile and caught.value.__cause__ is error
    for error in (torch.OutOfMemoryError("CUDA out of memory."), AssertionError("a bug"), TypeError("a bug")):
        with pytest.raises(type(error)) as caught, launching():
            raise error
        assert caught.value is error


@pytest.mark.parametrize("command", ["bench", "generate"])
def test_a_card_without_a_compiler_ends_the_command(command, card, monkeypatch, capsys, tmp_path):
    """With exit code 4 and one line, before anything is loaded or measured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fused, "_call", raising(NO_COMPILER))
    monkeypatch.setattr(bench, "measure_ceilings", lambda *given: pytest.fail("the measurement began"))
    monkeypatch.setattr(session, "load_pipeline", lambda *given, **options: pytest.fail("the model was loaded"))
    arguments = {
        "bench": ["bench", "--shape", "1x1x64x16", "--dtype", "fp32"],
        "generate": ["generate", "a red circle", "--model", "tiny-wan"],
    }[command]
    assert run([*arguments, "--device", "cuda", "--backend", "triton"]) == 4
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "apt install gcc" in said[0] and "bug" not in said[0]


def test_doctor_names_the_compiler(card, monkeypatch):
    monkeypatch.setattr(fused, "_call", raising(NO_COMPILER))
    (finding,) = doctor._kernels()
    assert finding.status == "problem" and "no C compiler" in finding.found
    assert finding.fix == "apt install gcc, or CC=<compiler>, or --backend torch"


@pytest.mark.parametrize(
    "error",
    [OutOfResources(300_000, 232_448, "shared memory"), RuntimeError("PassManager::run failed")],
    ids=["too-large", "rejected"],
)
def test_doctor_goes_down_to_smaller_tiles_as_a_call_does(error, card, monkeypatch):
    """It said "problem" of a card where calls went on; and a tile that the passes reject ended both."""

    def call(*given):
        if resources.tiles("dq", given[0], 64, 64).stages > 2:
            raise error
        return reference_attention(*given[:3], given[3], *given[4:8])

    monkeypatch.setattr(fused, "_call", call)
    with resources.using(Choices(dict.fromkeys(resources.TABLE, STAGES))) as choices:
        (finding,) = doctor._kernels()
        assert finding.status == "note" and "had to use smaller tiles: dq failed on cuda:0: " in finding.found
        assert len(choices.verified) == 2 and set(choices._steps.values()) == {1}


def test_auto_is_triton_on_a_card(card):
    assert choose_backend(on_card(torch.zeros(1, 1, 16, 16))) == "triton"
    assert choose_backend(on_card(torch.zeros(1, 1, 16, 16, dtype=torch.float64))) == "torch"
    assert choose_backend(on_card(torch.zeros(1, 1, 16, 48))) == "torch"
    assert choose_backend(torch.zeros(1, 1, 16, 16), "triton") == "triton"  # in the interpreter
    assert choose_backend(torch.zeros(1, 1, 16, 16)) == "torch"


def test_nothing_is_tried_during_capture(card, monkeypatch):
    tried = []
    monkeypatch.setattr(fused, "_attempt", lambda q, config: tried.append(q) or (None, None))
    q = on_card(torch.zeros(1, 1, 16, 16))
    card.capturing = True
    fused.verify(q, SMALL)
    assert not tried and not resources.current().verified
    card.capturing = False
    fused.verify(q, SMALL)
    assert len(tried) == 1


STAGES = [(1 << 30, 0, Tiles(16, 16, 4, stages)) for stages in (3, 2, 1)]


class Tight:
    """A kernel on a card where fewer stages fit than the first tile has."""

    def __init__(self, kernel, stages):
        self.kernel, self.stages, self.ran = kernel, stages, []

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.ran.append(options["num_stages"])
            if options["num_stages"] > self.stages:
                raise OutOfResources(300_000, 232_448, "shared memory")
            self.kernel[grid](*args, **options)

        return launch


def test_a_tile_that_does_not_fit_gives_way(card, monkeypatch):
    """The kernel that failed goes down until its tile fits, the others stay; what fits is tried before it is used."""
    attend = Tight(forward.attend_kernel, stages=2)
    monkeypatch.setattr(forward, "attend_kernel", attend)
    q = on_card(make_qkv((1, 1, 40, 16), torch.float32)[0])
    with resources.using(Choices(dict.fromkeys(resources.TABLE, STAGES))) as choices:
        with pytest.warns(UserWarning, match="attend failed on cuda:0: out of resource: shared memory"):
            o = sparse_linear_attention(q, q, q, SMALL)
        assert attend.ran == [3, 2, 2]
        assert choices.tiles("attend", q, 16, 16) == STAGES[1][2]
        assert choices.tiles("dkv", q, 16, 16) == choices.tiles("states", q, 16, 16) == STAGES[0][2]
    torch.testing.assert_close(o.cpu(), sparse_linear_attention(q.cpu(), q.cpu(), q.cpu(), SMALL, backend="torch"))


def test_no_tile_is_right(card, monkeypatch):
    monkeypatch.setattr(fused, "_attempt", lambda q, config: ("dq is wrong", None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(RuntimeError, match=r"fail on cuda:0: dq is wrong. Try --backend torch"):
            fused.verify(on_card(torch.zeros(1, 1, 16, 16)), SMALL)
    assert not resources.current().verified


def test_other_tiles_are_tried_anew(card, monkeypatch):
    tried = []
    monkeypatch.setattr(
        fused, "_attempt", lambda q, config: tried.append(resources.tiles("dq", q, 64, 64)) or (None, None)
    )
    q, config = on_card(torch.zeros(1, 1, 16, 64, dtype=torch.float16)), SLAConfig(block_m=64, block_n=64)
    fused.verify(q, config)
    fused.verify(q, config)
    assert len(tried) == 1
    assert resources.current().demote(q, 64, 64, "dq")
    fused.verify(q, config)
    fused.verify(q, config)
    assert len(tried) == 2 and tried[0] != tried[1]


def test_demotion_is_of_one_kernel_and_one_size_of_row():
    choices = Choices(dict.fromkeys(resources.TABLE, STAGES))
    x, wide = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 32)
    first, second, third = (tile for _, _, tile in STAGES)
    assert choices.demote(x, 32, 32, "dq")
    assert choices.running(x, 16, 16) == (first, first, first, second, first)
    assert choices.demote(x, 16, 16)
    assert choices.running(x, 16, 16) == (second, second, second, third, second)
    assert set(choices.running(wide, 16, 16)) == {first}
    assert choices.demote(x, 16, 16) and not choices.demote(x, 16, 16) and not choices.demote(x, 32, 32, "dq")
    assert set(choices.running(x, 16, 16)) == {third}


def test_demotion_skips_no_tile_of_other_blocks():
    """At blocks of 64 the second is all there is; one failure there must not cost blocks of 128 their first."""
    entries = [(1 << 30, 0, Tiles(128, 64, 8, 2)), (1 << 30, 0, Tiles(64, 64, 4, 2))]
    choices = Choices({"attend": entries, "dq": STAGES})
    x = torch.zeros(1, 1, 1, 16)
    assert choices.demote(x, 64, 64) and choices.demote(x, 64, 64)
    assert choices.tiles("dq", x, 64, 64) == STAGES[2][2]
    assert choices.tiles("attend", x, 128, 64) == entries[0][2]


def test_choices_hold_in_every_thread():
    """Autograd runs a backward on a card in threads of its own."""
    seen = []
    with resources.using(Choices().with_tile("dq", Tiles(16, 16, 1, 7))):
        thread = threading.Thread(target=lambda: seen.append(resources.tiles("dq", torch.zeros(1, 1, 1, 16), 64, 64)))
        thread.start()
        thread.join()
    assert seen == [Tiles(16, 16, 1, 7)]
    assert resources.tiles("dq", torch.zeros(1, 1, 1, 16), 64, 64) != seen[0]


def test_tiles_follow_the_cards_shared_memory(card):
    x = on_card(torch.zeros(1, 1, 16, 128, dtype=torch.float16))
    assert resources.shared_memory(torch.device("cpu")) == 227 * resources.KIB
    large = Choices().tiles("attend", x, 128, 64)
    card.shared_bytes = 99 * resources.KIB
    small = Choices().tiles("attend", x, 128, 64)
    assert large == resources.choose(resources.entries("attend", 256, 227 * resources.KIB), 128, 64)
    assert small == resources.choose(resources.entries("attend", 256, 99 * resources.KIB), 128, 64)
    assert large != small


def test_tiles_follow_the_cards_tensor_memory(card):
    """Only sm_100 sums products there: sm_90, with as much shared memory, and sm_120, the newer one, do not."""
    x = on_card(torch.zeros(1, 1, 16, 128, dtype=torch.float16))
    tiles = {}
    for card.capability in ((9, 0), (10, 0), (12, 0)):
        tiles[card.capability[0]] = Choices().tiles("attend", x, 128, 64)
    assert tiles[10] == resources.choose(resources.entries("attend", 256, 227 * resources.KIB, True), 128, 64)
    assert tiles[9] == tiles[12] == resources.choose(resources.entries("attend", 256, 227 * resources.KIB), 128, 64)
    assert tiles[10] != tiles[9] and not resources.tensor_memory(torch.device("cpu"))
