"""A CUDA device that is not there: its functions, and tensors in the host's memory that say they are on it."""

import contextlib
import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

FACTORIES = ("arange", "empty", "full", "ones", "rand", "randint", "randn", "tensor", "zeros")
CARD = torch.device("cuda", 0)


class OnCard(torch.Tensor):
    """A tensor in the CPU's memory that says it is on the card, and whose results say so too."""

    device = property(lambda self: CARD)
    is_cuda = property(lambda self: True)

    def cpu(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def on_card(x: torch.Tensor) -> OnCard:
    return x.as_subclass(OnCard)


def _placing(function: Any) -> Any:
    """A function that makes or moves a tensor: where it is asked for a CUDA device, the tensor says it is there."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> torch.Tensor:
        asked = [torch.device(x).type for x in (*args, kwargs.get("device")) if _names_a_device(x)]
        if not asked:
            return function(*args, **kwargs)
        args = tuple("cpu" if _names_a_device(x) else x for x in args)
        made = function(*args, **({**kwargs, "device": "cpu"} if "device" in kwargs else kwargs))
        return on_card(made) if asked[0] == "cuda" else made.as_subclass(torch.Tensor)

    return call


def _names_a_device(x: Any) -> bool:
    return isinstance(x, torch.device) or (isinstance(x, str) and x.split(":")[0] in ("cuda", "cpu"))


class FakeCard:
    """One card and what was asked of it.

    `calls` are the functions with an effect, in order. Events keep the time of `clock_ms`, which each record moves by
    `step_ms`; as on a card, an event's time can be read only after something waited for it.
    """

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.clock_ms, self.step_ms, self.waited_ms = 0.0, 1.0, -1.0
        self.free_bytes = self.total_bytes = 80 * 2**30
        self.peak_bytes = 0
        self.shared_bytes = 227 * 1024
        self.capability = (9, 0)
        self.capabilities: dict[int, tuple[int, int]] = {}  # of cards that differ
        self.now = 0
        self.capturing = False
        self.count = 1

    def properties(self, device: Any = None) -> SimpleNamespace:
        major, minor = self.capability_of(device)
        return SimpleNamespace(
            name="Fake H100", major=major, minor=minor, total_memory=self.total_bytes, L2_cache_size=50 * 2**20,
            multi_processor_count=132, shared_memory_per_block=48 * 1024,
            shared_memory_per_block_optin=self.shared_bytes,
        )  # fmt: skip

    def capability_of(self, device: Any = None) -> tuple[int, int]:
        index = self.now if device is None else device if isinstance(device, int) else torch.device(device).index or 0
        return self.capabilities.get(index, self.capability)

    @contextlib.contextmanager
    def current(self, device: Any) -> Iterator[None]:
        device = torch.device(device)
        self.calls.append(("device", device))
        before, self.now = self.now, self.now if device.index is None else device.index
        try:
            yield
        finally:
            self.now = before

    def event(self, enable_timing: bool = False) -> "FakeEvent":
        assert enable_timing, "without it elapsed_time raises on a card"
        return FakeEvent(self)

    def synchronize(self, device: Any = None) -> None:
        self.waited_ms = self.clock_ms

    def note(self, name: str, result: Any = None) -> Any:
        """A function that only remembers its call."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, *args))
            return result

        return call


class FakeEvent:
    def __init__(self, card: FakeCard) -> None:
        self.card, self.at_ms = card, None

    def record(self) -> None:
        self.card.clock_ms += self.card.step_ms
        self.at_ms = self.card.clock_ms

    def synchronize(self) -> None:
        assert self.at_ms is not None, "was never recorded"
        self.card.waited_ms = max(self.card.waited_ms, self.at_ms)

    def elapsed_time(self, end: "FakeEvent") -> float:
        if self.at_ms is None or end.at_ms is None or end.at_ms > self.card.waited_ms:
            raise RuntimeError("CUDA error: device not ready")
        return end.at_ms - self.at_ms


def fake_card(monkeypatch: pytest.MonkeyPatch) -> FakeCard:
    """Put a card into torch.cuda and into Triton's driver."""
    card = FakeCard()
    generator = torch.Generator
    functions = {
        "is_available": lambda: True,
        "device_count": lambda: card.count,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: card.properties().name,
        "get_device_capability": card.capability_of,
        "get_device_properties": card.properties,
        "is_bf16_supported": lambda including_emulation=True: including_emulation or card.capability_of() >= (8, 0),
        "mem_get_info": lambda device=None: (card.free_bytes, card.total_bytes),
        "max_memory_allocated": lambda device=None: card.peak_bytes,
        "reset_peak_memory_stats": card.note("reset_peak_memory_stats"),
        "empty_cache": card.note("empty_cache"),
        "set_device": card.note("set_device"),
        "synchronize": card.synchronize,
        "is_current_stream_capturing": lambda: card.capturing,
        "device": card.current,
        "Event": card.event,
    }
    for name, function in functions.items():
        monkeypatch.setattr(torch.cuda, name, function)
    for name in FACTORIES:
        monkeypatch.setattr(torch, name, _placing(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "to", _placing(torch.Tensor.to))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda x, device=None: on_card(x))
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    utils = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": card.shared_bytes})
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    return card
