"""Forward passes of a run once more with dense attention, on the same inputs, so that both are timed side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import WanTransformer3DModel

from slagen.timing import StepRecorder
from slagen.wan.processor import processors


@contextmanager
def measuring_dense(transformer: WanTransformer3DModel, recorder: StepRecorder, steps: Sequence[int]) -> Iterator[None]:
    """Within it, each pass of these steps runs with dense attention too, whose output is dropped.

    The two take turns in being first, so that neither always finds what the other left in caches. One more dense pass
    comes before them all and is not counted: it compiles and allocates.

    Args:
        recorder: attached already; it keeps the times. steps: by number, from 0.
    """
    dense_first = {step: bool(turn % 2) for turn, step in enumerate(steps)}
    warm, began = False, None

    def run_dense(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal warm
        every = processors(transformer)
        before = [processor.runs_dense for processor in every]
        for processor in every:
            processor.runs_dense = True
        try:
            if not warm:
                with recorder.dense_pass(counted=False):
                    transformer.forward(*args, **kwargs)  # not called as a module: hooks would count a pass
            warm = True
            with recorder.dense_pass():
                transformer.forward(*args, **kwargs)
        finally:
            for processor, dense in zip(every, before, strict=True):
                processor.runs_dense = dense

    def before_pass(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal began
        if (first := dense_first.get(len(recorder.steps))) is not None:
            if first:
                run_dense(args, kwargs)
            began = recorder.clock.mark()

    def after_pass(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if (first := dense_first.get(len(recorder.steps))) is not None:
            recorder.clock.add("pass", began, recorder.clock.mark())
            if not first:
                run_dense(args, kwargs)

    hooks = [
        transformer.register_forward_pre_hook(before_pass, with_kwargs=True),
        transformer.register_forward_hook(after_pass, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
