"""The fused kernels as one PyTorch operator: autograd, torch.compile and CUDA graphs see a single node.

Shapes follow from lengths and the configuration alone, and nothing waits for the device.
"""

import contextlib
import dataclasses
import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from slagen.attention.sla.config import SLAConfig
from slagen.attention.sla.reference import EPSILON, reference_attention
from slagen.errors import KernelProblem

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (16, 32, 64, 128, 256)
WELL_KNOWN = 128  # the largest that every card holds: the states of 256 exceed the shared memory of most


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: SLAConfig,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    scale: float,
    sparse: bool,
    scores: Tensor | None = None,
    block_means: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attend with the Triton kernels; arguments and result as in `reference_attention`. Differentiable once.

    block_means: as in `sparse_linear_attention`.
    """
    verify(q, config)
    given = [x for x in (q, k, v, proj_weight, proj_bias) if x is not None]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return _call(q, k, v, config, proj_weight, proj_bias, scale, sparse, save, block_means, scores)


def unsupported(q: Tensor) -> str | None:
    """Why the kernels cannot take tensors like q; None when they can. On a CPU they do under TRITON_INTERPRET=1."""
    return _why_not(q.device.type, q.dtype, q.shape[-1])


def _why_not(device_type: str, dtype: torch.dtype, head_dim: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with torch's CUDA builds on Linux)"
    if dtype not in DTYPES:
        return f"the kernels compute in {', '.join(map(str, DTYPES))}, not {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"the kernels support head dimensions {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if device_type == "cuda":
        return None
    from slagen.kernels.resources import interpreting

    if device_type == "cpu" and interpreting():
        return None
    return f"the tensors are on {device_type}, and Triton needs a CUDA device"


# What torch.compiler.assume_constant_result does, but that imports the compiler, which takes seconds.
_why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def verify(q: Tensor, config: SLAConfig) -> None:
    """Prove the kernels before their first call on a card, and warn of tiles that failed.

    During capture or compilation nothing is tried: the remembered choice stands.
    Raises: KernelProblem, which is a RuntimeError, when no tile is right, or the card or Triton lacks something.
    """
    if torch.compiler.is_compiling() or not q.is_cuda or torch.cuda.is_current_stream_capturing():
        return
    fault, gave_way = prove(q, config)
    for text in gave_way:
        warnings.warn(f"{text}; using smaller tiles.", stacklevel=2)
    if fault is not None:
        raise KernelProblem(f"the Triton kernels fail on {q.device}: {fault}. Try --backend torch.")


def prove(q: Tensor, config: SLAConfig) -> tuple[str | None, list[str]]:
    """Try the kernels on a tiny input, once for each device, dtype, head dimension, kind of block and set of tiles.

    A tile that a card cannot run, or that computes something else there, gives way to the next smaller one.
    Returns: what is wrong with the smallest tiles, None where some are right; and what was with those that gave way.
    Raises: KernelProblem where no kernel can start, whatever its tile.
    """
    from slagen.kernels import resources

    choices, blocks = resources.current(), (config.block_m, config.block_n)
    kind = q.device, q.dtype, q.shape[-1], *blocks, config.linear_domain, config.feature_map
    gave_way: list[str] = []
    while choices.verified.get(kind) != (tiles := choices.running(q, *blocks)):
        fault, kernel = _attempt(q, config)
        if fault is None:
            choices.verified[kind] = tiles
        elif not choices.demote(q, *blocks, kernel):
            return fault, gave_way
        else:
            gave_way.append(f"{kernel or 'the Triton kernels'} failed on {q.device}: {fault}")
    return None, gave_way


def trial(q: Tensor, config: SLAConfig) -> str | None:
    """Run forward and backward on two heads of a few blocks, with the tiles in use: what is wrong, or None.

    Raises: KernelProblem where no kernel can start.
    """
    return _attempt(q, config)[0]


def _attempt(q: Tensor, config: SLAConfig) -> tuple[str | None, str | None]:
    """What is wrong, and in which kernel where that is known."""
    from slagen.kernels import resources
    from slagen.kernels.failures import LaunchError, launching

    choices = resources.current()
    choices.latest = None
    length, head_dim = 3 * max(config.block_m, config.block_n) + 5, q.shape[-1]
    small = dataclasses.replace(config, sparsity=0.5, negligible=0.0)
    make: dict[str, Any] = {
        "generator": torch.Generator(q.device).manual_seed(0),
        "device": q.device,
        "dtype": torch.float32,
    }
    with autograd_of_its_own():
        drawn = [torch.randn(1, 2, length, head_dim, **make).to(q.dtype) for _ in range(3)]
        drawn += [torch.randn(head_dim, head_dim, **make) * head_dim**-0.5, torch.randn(head_dim, **make)]
        inputs = [x.requires_grad_() for x in drawn]
        do = torch.randn(drawn[0].shape, **make)
        wide = [x.detach().double().requires_grad_() for x in inputs]
        exact = reference_attention(wide[0], wide[1], wide[2], small, wide[3], wide[4], head_dim**-0.5, True)
        truth = [exact.detach(), *torch.autograd.grad(exact, wide, do.double())]
        try:
            with launching():
                o = _call(inputs[0], inputs[1], inputs[2], small, inputs[3], inputs[4], head_dim**-0.5, True, True)
                found = [o.detach(), *torch.autograd.grad(o, inputs, do.to(q.dtype))]
        except LaunchError as error:
            if error.of_tile:
                return error.reason, choices.latest
            advice = f"{error.fix}, or --backend torch" if error.fix else "--backend torch"
            message = f"the Triton kernels cannot run on {q.device}: {error.reason}. Try {advice}."
            raise KernelProblem(message) from error
    return first_fault(found, truth, q.dtype), None


def first_fault(found: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype) -> str | None:
    """What is wrong with o, dq, dk, dv and the gradients of a weight and bias, as far as there are; None if nothing.

    Args:
        found: computed in `dtype`. truth: the same in float64.
    """
    names = ("o", "dq", "dk", "dv", "dweight", "dbias")[: len(truth)]
    for name, actual, expected in zip(names, found, truth, strict=True):
        # What rounding can cause, with room to spare: a wrong tile is wrong by far more.
        if not (actual.double() - expected).abs().max() <= 32 * torch.finfo(dtype).eps * expected.abs().max():
            return f"{name} is wrong"
    return None


@contextlib.contextmanager
def autograd_of_its_own() -> Iterator[None]:
    """Record gradients whatever the caller does: under inference mode or no_grad, or inside a checkpointed block, whose
    hooks would take what is saved here for its own."""
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.inference_mode(False), torch.enable_grad(), hooks:
        yield


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: SLAConfig,
    proj_weight: Tensor | None,
    proj_bias: Tensor | None,
    scale: float,
    sparse: bool,
    save: bool,
    block_means: tuple[Tensor, Tensor] | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    q_means, k_means = block_means or (None, None)
    return _forward(
        q, k, v, proj_weight, proj_bias, config.sparsity, config.negligible, config.linear_domain, config.feature_map,
        config.block_m, config.block_n, scale, sparse, save, q_means, k_means,
        None if scores is None else scores.float().flatten(0, 1),
    )[0]  # fmt: skip


def _options(
    length: int,
    sparsity: float,
    negligible: float,
    linear_domain: str,
    feature_map: str,
    block_m: int,
    block_n: int,
    scale: float,
    sparse: bool,
) -> dict[str, Any]:
    """The settings of an operator's call as the kernels take them."""
    config = SLAConfig(sparsity, negligible, linear_domain, feature_map, block_m, block_n)  # type: ignore[arg-type]
    num_key_blocks = config.num_blocks(length)[1]
    return {
        "block_m": block_m,
        "block_n": block_n,
        "num_critical": config.num_critical(num_key_blocks),
        "num_negligible": config.num_negligible(num_key_blocks),
        "marginal": linear_domain == "marginal",
        "feature_map": feature_map,
        "eps": EPSILON[linear_domain],
        "scale": scale,
        "sparse": sparse,
    }


def _on_device(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """PyTorch's own products of float32 in float32, also where the caller allows TF32, which would choose other blocks.

    PyTorch keeps that setting three times, and refuses to multiply where they differ in some ways; a caller may have
    set one of them, or a general one that these follow while they are "none".
    """
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    if before[0] != "tf32":
        yield
        return
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # only one of the new ones was set
        legacy = "highest"
    torch.set_float32_matmul_precision("highest")  # sets all three
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = "none"
            if setting.fp32_precision != value:
                setting.fp32_precision = value


@contextlib.contextmanager
def alone(x: Tensor) -> Iterator[None]:
    """On x's device, without the caller's autocast and TF32: what is around a call changes nothing in it.

    Autograd runs a backward under the autocast of whoever asks for the gradients.
    """
    with torch.autocast(x.device.type, enabled=False), _on_device(x), _exact_products():
        yield


@torch.library.custom_op("slagen::sla_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sparsity: float,
    negligible: float,
    linear_domain: str,
    feature_map: str,
    block_m: int,
    block_n: int,
    scale: float,
    sparse: bool,
    save: bool,
    q_means: Tensor | None = None,
    k_means: Tensor | None = None,
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from slagen.kernels import sla_forward

    block_means = None if q_means is None or k_means is None else (q_means, k_means)
    options = _options(q.shape[2], sparsity, negligible, linear_domain, feature_map, block_m, block_n, scale, sparse)
    with alone(q):
        return sla_forward(q, k, v, weight, bias, save=save, block_means=block_means, scores=scores, **options)


@_forward.register_fake
def _(
    q, k, v, weight, bias, sparsity, negligible, linear_domain, feature_map, block_m, block_n, scale, sparse, save,
    q_means=None, k_means=None, scores=None,
):  # fmt: skip
    batch, num_heads, length, head_dim = q.shape
    heads = batch * num_heads
    options = _options(length, sparsity, negligible, linear_domain, feature_map, block_m, block_n, scale, sparse)
    num_rows, num_columns = -(-length // block_m), -(-length // block_n)
    topk = options["num_critical"]
    linear, rows = save and weight is not None, save and sparse
    one_state, classes = linear and not options["marginal"], rows or (linear and options["marginal"])
    int32 = {"dtype": torch.int32}
    fp32 = {"dtype": torch.float32}
    return (
        torch.empty_like(q),
        q.new_empty((heads, length) if rows else 0, **fp32),
        q.new_empty((heads, num_rows, topk) if rows else 0, **int32),
        q.new_empty((heads, num_rows, num_columns) if classes else 0, dtype=torch.int8),
        q.new_empty((heads, num_rows * topk) if rows else 0, **int32),
        q.new_empty((heads, num_columns + 1) if rows else 0, **int32),
        q.new_empty((heads, head_dim, head_dim) if one_state else 0, **fp32),
        q.new_empty((heads, head_dim) if one_state else 0, **fp32),
    )


@torch.library.custom_op("slagen::sla_backward", mutates_args=())
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: list[Tensor],
    sparsity: float,
    negligible: float,
    linear_domain: str,
    feature_map: str,
    block_m: int,
    block_n: int,
    scale: float,
    sparse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from slagen.kernels import sla_backward

    options = _options(q.shape[2], sparsity, negligible, linear_domain, feature_map, block_m, block_n, scale, sparse)
    with alone(q):
        return sla_backward(do, q, k, v, weight, bias, *saved, **options)


@_backward.register_fake
def _(
    do, q, k, v, weight, bias, saved, sparsity, negligible, linear_domain, feature_map, block_m, block_n, scale, sparse
):  # fmt: skip
    return (
        torch.empty_like(q),
        torch.empty_like(k),
        torch.empty_like(v),
        q.new_empty(0 if weight is None else weight.shape, dtype=torch.float32),
        q.new_empty(0 if bias is None else bias.shape, dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, weight, bias, *options, _save, _q_means, _k_means, _scores = inputs
    ctx.save_for_backward(q, k, v, weight, bias, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.options = options


def _autograd(ctx: Any, do: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, weight, bias, *saved = ctx.saved_tensors
    dq, dk, dv, dweight, dbias = _backward(do, q, k, v, weight, bias, saved, *ctx.options)
    return (
        dq,
        dk,
        dv,
        None if weight is None else dweight.to(weight.dtype),
        None if bias is None else dbias.to(bias.dtype),
        *(None,) * 12,
    )


_forward.register_autograd(_autograd, setup_context=_setup_context)
