"""Refuse a transformer whose offloading, adapters or quantisation make it unsafe to install, remove or save SLA."""

from __future__ import annotations

from typing import Any

from torch import nn

from slagen.errors import UsageError


def refuse_offloaded(transformer: nn.Module, todo: str) -> None:
    """Raise UsageError where hooks keep the weights of layers elsewhere until their forward pass.

    Weights read there are empty or noise, what is written is lost, and a new layer gets no hook.

    Args:
        todo: what cannot be done, for the message.
    """
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is not None and registry.get_hook("group_offloading") is not None:
            library, advice = "diffusers", "Do this before you enable offloading."
        elif hasattr(module, "_hf_hook") and any(x.is_meta for x in module.parameters(recurse=False)):
            library, advice = (
                "accelerate",
                "Call pipe.remove_all_hooks() first, and enable offloading again afterwards.",
            )
        else:
            continue
        raise UsageError(f"SLA cannot be {todo} while {library} offloads the transformer's layers. {advice}")


def refuse_adapters(pipe: Any, todo: str) -> None:
    """Raise UsageError where a LoRA or the like is loaded into a pipeline's transformer, or fused into its weights.

    Args:
        pipe: a pipeline, which knows what was fused, or a transformer, where only loaded adapters can be seen.
        todo: what cannot be done, for the message.
    """
    transformer = getattr(pipe, "transformer", pipe)
    fused = sorted(getattr(pipe, "fused_loras", ()))
    loaded = sorted(getattr(transformer, "peft_config", None) or ())
    if not loaded and any(".base_layer." in name for name, _ in transformer.named_parameters()):
        loaded = ["an adapter"]
    if fused or loaded:
        state = f"fused ({', '.join(fused)})" if fused else f"loaded ({', '.join(loaded)})"
        steps = "pipe.unfuse_lora() and pipe.unload_lora_weights()" if fused else "pipe.unload_lora_weights()"
        raise UsageError(
            f"SLA weights cannot be {todo} while a LoRA is {state}, because it changes the weights that they "
            f"belong to. Call {steps} first, and load the LoRA again afterwards."
        )


def refuse_fused(transformer: nn.Module, todo: str) -> None:
    """Raise UsageError where an adapter's change has been added to the weights of a layer that still has it."""
    if any(hasattr(module, "base_layer") and getattr(module, "merged", False) for module in transformer.modules()):
        raise UsageError(f"SLA cannot be {todo} while a LoRA is fused into the weights. Call pipe.unfuse_lora() first.")


def refuse_rounded(transformer: nn.Module, todo: str) -> None:
    """Raise UsageError where weights are kept in 8 bits or fewer, quantised or cast layer by layer."""
    for name, x in transformer.named_parameters():
        if type(x) is not nn.Parameter or not x.is_floating_point() or x.element_size() < 2:
            raise UsageError(
                f"SLA weights cannot be {todo} into quantised weights ({name} is {type(x).__name__} of {x.dtype}), "
                "because they are checked against the exact weights that they were trained from. Load them before you "
                "quantise or cast the model."
            )
