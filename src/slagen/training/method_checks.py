"""What an attention method can be trained with, checked before torch is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from slagen.attention.choices import in_all_steps
from slagen.attention.protocol import Method
from slagen.errors import UsageError
from slagen.io.forms import shown
from slagen.wan.defaults import MAX_TRAINING

if TYPE_CHECKING:
    from slagen.training.config import FinetuneConfig

InitFrom = Literal["mean"]
IN_ONE_PROCESS = "--init-from mean runs in a single process only. Start slagen without torchrun."


def check_init_from(config: FinetuneConfig, method: Method) -> None:
    """Raise UsageError where there is no fresh proj_l of SLA to fit."""
    if config.init_from not in get_args(InitFrom):
        raise UsageError(f"init_from is {shown(config.init_from)}, but must be mean. Try --init-from mean.")
    if method.name != "sla":
        raise UsageError(
            f"init_from prepares the linear branch of sla attention, which {method.name} attention does not have. "
            "Leave --init-from out, or give --attention sla."
        )
    if not config.from_dense:
        raise UsageError("init_from replaces trained SLA weights, so it needs --from-dense. Add --from-dense.")
    if config.context_parallel > 1:
        raise UsageError(IN_ONE_PROCESS)


def check_schedule(config: FinetuneConfig) -> None:
    """Raise UsageError for a --sparsity-schedule that is not the same in all steps, or beside another sparsity."""
    text = config.sparsity_schedule
    if text is None:
        return
    if in_all_steps(text) is None:
        raise UsageError(
            f"sparsity_schedule is {shown(text)}, but training draws noise levels and knows no denoising steps, so it "
            "takes one sparsity for each layer, for all steps. Try --sparsity-schedule 0-:0.8/0.95, or a file that "
            "slagen tune wrote without --step-parts."
        )
    if config.sparsity is not None:
        raise UsageError(
            f"--sparsity {config.sparsity:g} and --sparsity-schedule both set the sparsity. Give one of them."
        )


def check_stages(config: FinetuneConfig, method: Method) -> None:
    """Raise UsageError for a stage that the method or the other settings do not have."""
    if config.stages != "all" and not any(group.stage == "router" for group in method.parameters):
        raise UsageError(f"{method.name} attention has no router to train. Leave --stages out.")
    most = MAX_TRAINING["steps"]
    if config.router_steps is not None and not 1 <= config.router_steps <= most:
        raise UsageError(
            f"router_steps is {shown(config.router_steps)}, but must be a whole number from 1 to {most:,}. Try "
            "--router-steps 100."
        )
    if config.router_steps is not None and config.stages != "router,all":
        raise UsageError(
            f"--router-steps is for --stages router,all, but --stages is {config.stages}. Leave --router-steps out."
        )
    if config.stages != "all" and config.backend == "triton":
        raise UsageError("the router stage has no Triton kernels. Leave --backend out, or give --backend torch.")


def check_backward(method: Method, backend: str) -> None:
    """Raise UsageError for an implementation of a method that gradients do not pass through."""
    if next(each.backward for each in method.backends if each.name == backend):
        return
    others = [each.name for each in method.backends if each.backward]
    raise UsageError(
        f"{method.name} attention has no backward pass"
        + (f" on the {backend} backend. Try --backend {others[0]}." if others else ", so it cannot be fine-tuned.")
    )
