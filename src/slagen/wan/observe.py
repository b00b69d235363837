"""What is noted of a running transformer's self-attention: its times, its densities, its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from diffusers import WanTransformer3DModel

from slagen.timing import StepRecorder
from slagen.wan.processor import Watch, processors


def take_densities(transformer: WanTransformer3DModel) -> list[float | None]:
    """The fraction of all query-key pairs that each layer attended exactly since the last call of this; None where it
    does not say."""
    return [take() if (take := getattr(each, "take_density", None)) else None for each in processors(transformer)]


def attach_recorder(transformer: WanTransformer3DModel, recorder: StepRecorder) -> Callable[[], None]:
    """Have every forward pass and every self-attention noted by a recorder. Returns what detaches it again."""
    for processor in processors(transformer):
        processor.recorder = recorder
    hook = transformer.register_forward_pre_hook(lambda module, args: recorder.begin_pass())

    def detach() -> None:
        hook.remove()
        for processor in processors(transformer):
            processor.recorder = None

    return detach


@contextmanager
def watching(transformer: WanTransformer3DModel, watch: Watch) -> Iterator[None]:
    """Have every self-attention within the block seen, with what it was given, and its output. It is not timed then."""
    for processor in processors(transformer):
        processor.watch = watch
    try:
        yield
    finally:
        for processor in processors(transformer):
            processor.watch = None
