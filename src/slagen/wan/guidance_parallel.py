"""Classifier-free guidance over two processes: one runs the pass with the prompt, the other the pass without."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from diffusers import WanTransformer3DModel
from torch import Tensor

from slagen.timing import communicating
from slagen.wan.sequence_parallel import recorder_of


def split_guidance(transformer: WanTransformer3DModel, pair: dist.ProcessGroup) -> None:
    """Have a transformer with slagen's processors in it share the two passes of each step with another process.

    The pipeline calls it with the prompt, then without, and looks at neither output before it has both. So the first
    process of the pair runs the first of the calls, the second process the second, at the same time; the first call
    hands back a tensor that the second one fills. Both must make the same calls.

    Args:
        pair: a process group of two.
    """
    forward, own, channels = transformer.forward, dist.get_rank(pair), transformer.config.out_channels
    waiting: list[Tensor] = []  # the output of the first call, in the second

    def one_of_two(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        if len(waiting) == own:
            output = forward(hidden_states, *args, **kwargs)[0].contiguous()
        else:
            output = hidden_states.new_empty(len(hidden_states), channels, *hidden_states.shape[2:])
        if not waiting:
            waiting.append(output)
            return (output,)
        both = [waiting.pop(), output]
        with communicating(recorder_of(transformer)):
            dist.all_gather(both, both[own].clone(), group=pair)
        return (output,)

    transformer.forward = one_of_two  # type: ignore[method-assign, assignment]
