"""What an attention method is: its record, and the inputs of its module at each call. No torch here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from slagen.errors import UsageError
from slagen.io.forms import shown
from slagen.io.text import counted
from slagen.settings import settings_of, to_fields

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from slagen.attention.cost import ModelShape

NO_PASS = (
    "no forward pass has begun. A method that reads the context must be registered with needs=Needs(context=True)."
)

Attend = Callable[..., Any]  # q, k, v, each (B, H, L, D) -> o (B, H, L, D), or what a timed part makes of them
Family = Literal["dense", "sparse", "sla"]


class Unavailable(Exception):
    """A method or one of its backends does not run on this machine; the message says why."""


@dataclass(frozen=True)
class Grid:
    """How the tokens of a clip are arranged: latent frames, rows and columns, the columns counting fastest."""

    num_frames: int
    height: int
    width: int

    @classmethod
    def flat(cls, num_tokens: int) -> Grid:
        """One row of tokens, for those of which no arrangement is known."""
        return cls(1, 1, num_tokens)

    @property
    def num_tokens(self) -> int:
        """L, the tokens of the sequence."""
        return self.num_frames * self.height * self.width


@dataclass(frozen=True)
class Layer:
    """The self-attention layer that a module is built for.

    Args:
        index: of the transformer block, from 0. count: blocks of the transformer.
        num_heads: H. head_dim: D; the hidden states have H * D channels.
    """

    index: int
    count: int
    num_heads: int
    head_dim: int


@dataclass
class StepContext:
    """Where in the denoising of a clip a forward pass stands: one mutable object, which all layers share.

    Whoever runs the denoising loop calls `begin_clip` and `end_step`; a hook on the transformer calls `begin_pass`. All
    of this happens outside compiled code. What compiled code reads here as a Python number it is compiled for anew
    when that changes; a module whose computation depends on the step reads `position`, or decides in `begin_pass`.

    Outside a denoising loop, as in training or a plain `pipe(...)`, nobody says which passes belong together: nothing
    is remembered from one to the next, and none is known to be conditional.

    Args:
        step, num_steps: of the denoising, from 0; None outside a denoising loop.
        passes: forward passes of this step that have begun; 0 before the first, and 1 outside a denoising loop.
        grid: how the tokens are arranged; None where the method does not ask for the context.
        time_embedding: (B, H * D), of the transformer's own embedder; None where no method asks for it.
        position: int64 (2,) on the CPU: the step, and 1 in a conditional pass, otherwise 0; -1 and -1 outside a loop.
        memory: what layers remember, by layer and by whether the pass is conditional; a new clip empties it.
    """

    step: int | None = None
    num_steps: int | None = None
    passes: int = 0
    grid: Grid | None = None
    time_embedding: Tensor | None = None
    position: Tensor | None = None
    memory: dict[tuple[int, bool], dict[str, Any]] = field(default_factory=dict)

    @property
    def conditional(self) -> bool | None:
        """Whether this is the pass with the prompt; with guidance, the second pass of each step is without.

        Returns: None outside a denoising loop. Raises: RuntimeError where no pass has begun.
        """
        if self.passes == 0:
            raise RuntimeError(NO_PASS)
        return None if self.step is None else self.passes == 1

    def memory_of(self, layer: Layer) -> dict[str, Any]:
        """What a layer remembers of the passes of this kind in this clip; empty and forgotten outside a loop."""
        conditional = self.conditional
        return {} if conditional is None else self.memory.setdefault((layer.index, conditional), {})

    def _forget(self) -> None:
        for kept in self.memory.values():
            kept.clear()  # the layers hold it too
        self.memory.clear()

    def begin_clip(self, num_steps: int) -> None:
        """A denoising loop of `num_steps` begins: nothing is remembered of the clip before."""
        self.step, self.num_steps, self.passes = 0, num_steps, 0
        self._forget()

    def end_step(self) -> None:
        """A denoising step has ended, and the next begins."""
        self.step, self.passes = (self.step or 0) + 1, 0

    def end_clip(self) -> None:
        """The denoising loop has ended."""
        self.step = self.num_steps = self.time_embedding = None
        self.passes = 0
        self._forget()

    def begin_pass(self, grid: Grid | None = None) -> None:
        """A forward pass begins, over tokens that are arranged in `grid`."""
        self.passes = 1 if self.step is None else self.passes + 1
        self.grid = grid
        if self.position is not None:
            self.position[0] = -1 if self.step is None else self.step
            self.position[1] = -1 if self.conditional is None else int(self.conditional)


@dataclass(frozen=True)
class Inputs:
    """What a method's module gets at each call, besides q, k and v.

    Args:
        layer: the layer it stands in. Compiled code does not read its `index`: it would be compiled anew for each
            layer, of which torch.compile allows 8.
        context: where in the denoising it is called.
        hidden_states: (B, L, H * D), what q, k and v were projected from; None where the method does not need them and
            they are not at hand, as in a bench.
        block_means: the means of the blocks of q and of k, (B * H, M, D) and (B * H, N, D) float32, of the sizes that
            the module's `block_sizes` names; None where they would cost something.
        kept: `memory`, handed over outside compiled code as a forward pass begins; None where none has begun.
    """

    layer: Layer
    context: StepContext
    hidden_states: Tensor | None = None
    block_means: tuple[Tensor, Tensor] | None = None
    kept: dict[str, Any] | None = None

    @property
    def memory(self) -> dict[str, Any]:
        """What this layer remembers of the passes of this kind in this clip; what is put in stays until its end.

        Outside a denoising loop it is empty in every pass. Raises: RuntimeError where no pass has begun.
        """
        if self.kept is None:
            raise RuntimeError(NO_PASS)
        return self.kept


@dataclass(frozen=True)
class Needs:
    """What a method takes before it gives good videos.

    Args:
        training: the model must be fine-tuned with it. weights: a file with what it learned must be there; one that is
            there is loaded in any case, so that without this need its parameters may stay as the module makes them.
        gpu: a CUDA device.
        context: the grid, pass and time embedding of `StepContext`, which hooks on the transformer fill in, and the
            memory of `Inputs`.
        hidden_states: those of `Inputs`, of all tokens.
        all_heads: q, k and v of all heads of the layer, as where parameters are of one head.
    """

    training: bool = False
    weights: bool = False
    gpu: bool = False
    context: bool = False
    hidden_states: bool = False
    all_heads: bool = False


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that a method adds to each self-attention layer, as training and files know them.

    `--proj-multiplier` is the factor on the learning rate of them all.

    Args:
        name: attribute of the module, a parameter or a module; the keys in files are
            `blocks.{i}.attn1.processor.{name}` and what is below it.
        used: whether this method's output depends on them; what is not used is kept, but not trained.
        identity: whether a matrix starts as the identity in training; otherwise as the module makes it.
        stage: "router" where only that stage of a training reaches them: the module then has `soft`, which is True
            there, and every layer learns to do as dense attention does with the same q, k and v.
    """

    name: str
    used: bool = True
    identity: bool = False
    stage: Literal["router"] | None = None


@dataclass(frozen=True)
class Backend:
    """One implementation of a method, by the name that `--backend` takes.

    Args:
        package: what it is imported from, where that need not be installed.
        backward: whether gradients pass through it.
        error_limit: its largest error to the reference, in units of the largest output; None is that of the dtype.
    """

    name: str
    package: str | None = None
    backward: bool = True
    error_limit: float | None = None


def _own_fields(config: Any, grid: Grid) -> dict[str, Any]:
    return to_fields(config)


def _with_options(config: Any, options: Mapping[str, Any], grid: Grid) -> Any:
    return dataclasses.replace(config, **options)


@dataclass(frozen=True)
class Method:
    """An attention method. `registry.py` holds them all.

    Args:
        name: what `--attention` takes. summary: one line. family: whose numbers it stands beside in a table.
        config: a torch-free frozen dataclass whose fields are its options, each with a default; it raises UsageError
            for what is out of range. A field with a help (`settings.option`) is an option of the command line, of type
            int, float, bool, str or a Literal of strings; with `prompt_line=True` of prompt files too. A field named
            as a setting of `generate` is (sparsity, block_m, block_n) takes that. With `hidden=True` the weights alone
            say it.
        needs: what it takes.
        cost: (config, shape, grid) -> FLOPs of self-attention in one forward pass of one sample, all layers.
        build: (config, layer, backend, device) -> a module with `config`, which may be replaced between clips, and
            `forward(q, k, v, inputs)`: (B, H, L, D) each, and Inputs -> o (B, H, L, D). It may have
            `block_sizes(grid)`, the query rows and key columns of the blocks whose means it takes, or None, and
            `begin_pass(context)`, which is called outside compiled code before each forward pass; and where only the
            inputs decide how much is left out, `take_density()`: the fraction of all query-key pairs attended exactly
            since its last call, or None before any, for the report; and `kept_blocks(q, k, inputs)`: a `BlockMap`, for
            pictures.
        reference: (config, q, k, v, parameters, inputs) -> o by the definition, in float64 for float64; `parameters`
            is the module's state.
        backends: its implementations; the first is "auto".
        choose_backend: (name, head_dim, device, dtype, config) -> the one that runs. Raises EnvironmentProblem where a
            named one cannot; None takes the name as it is.
        check: (backend, head_dim, device, dtype, config): try the kernels. Raises EnvironmentProblem.
        error_limit: config -> its largest error to the reference, in units of the largest output, where it rounds
            coarsely; None is that of the dtype.
        parts: (module, q, k, v, inputs) -> what a forward pass consists of, each to be timed alone; None times none.
        parameters: what it adds to the model.
        options: names beside the config's fields that `configure` understands.
        configure: (config, options by name, grid) -> the config for a clip of so many tokens.
        in_training: config -> the same with all that training adds to the model.
        describe: (config, grid) -> what the report says of it.
        applies: (config, grid) -> whether there is anything to leave out; otherwise the clip is dense. In a model, it
            and `block_sizes` are given a flat grid where the method does not need the context.
        density: (config, grid) -> the fraction of all query-key pairs that is attended exactly.
        note: (config, options, grid) -> one line on what a clip will run with, or None.
        benched: whether `slagen bench` runs it unasked.
        memory: (config, shape, grid, bytes of a number of q) -> the bytes that its layers remember from step to step,
            of one kind of pass; None for a method that remembers nothing. One that does runs in a denoising loop only.
        dense_steps: the denoising steps that run dense where --dense-steps does not say, in its form.
        delta: query rows of which one is attended exactly, where `with_delta` wraps it; see `delta/method.py`.
    """

    name: str
    summary: str
    config: type[Any]
    cost: Callable[[Any, ModelShape, Grid], int]
    build: Callable[[Any, Layer, str, torch.device | str | None], nn.Module]
    reference: Callable[[Any, Tensor, Tensor, Tensor, Mapping[str, Tensor], Inputs | None], Tensor]
    family: Family = "sparse"
    kind: str = "method"
    needs: Needs = Needs()
    backends: tuple[Backend, ...] = (Backend("auto"),)
    choose_backend: Callable[[str, int, torch.device, torch.dtype, Any], str] | None = None
    check: Callable[[str, int, torch.device, torch.dtype, Any], None] | None = None
    error_limit: Callable[[Any], float | None] = lambda config: None
    parts: Callable[[Any, Tensor, Tensor, Tensor, Inputs], dict[str, Attend]] | None = None
    parameters: tuple[ParameterGroup, ...] = ()
    options: tuple[str, ...] = ()
    configure: Callable[[Any, Mapping[str, Any], Grid], Any] = _with_options
    in_training: Callable[[Any], Any] = lambda config: config
    describe: Callable[[Any, Grid], dict[str, Any]] = _own_fields
    applies: Callable[[Any, Grid], bool] = lambda config, grid: True
    density: Callable[[Any, Grid], float] = lambda config, grid: 1.0
    note: Callable[[Any, Mapping[str, Any], Grid], str | None] = lambda config, options, grid: None
    benched: bool = True
    memory: Callable[[Any, ModelShape, Grid, int], int] | None = None
    dense_steps: str | None = None
    delta: int | None = None

    def __deepcopy__(self, memo: Any) -> Method:
        return self  # a record: copies of a transformer share it

    @property
    def option_names(self) -> tuple[str, ...]:
        """The options that it takes."""
        return (*(each.field for each in settings_of(self.config) if not each.about.hidden), *self.options)

    def group(self, key: str) -> ParameterGroup | None:
        """The group of a transformer's parameter, by its key; None for one that is not this method's."""
        return next((group for group in self.parameters if f".processor.{group.name}." in f"{key}."), None)

    def nothing_to_skip(self, num_tokens: int) -> str:
        """What a message says of a clip to which the method does not apply."""
        return f"with these settings, {self.name} attention has nothing to skip in {counted(num_tokens, 'token')}"

    def takes_context(self, config: Any) -> bool:
        """Whether it takes the context with a config: always, or because of the order of the tokens."""
        return self.needs.context or getattr(config, "order", "raster") != "raster"

    def own(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Those of some options that are its own and given."""
        return {name: value for name, value in options.items() if value is not None and name in self.option_names}

    def check_backend(self, name: str) -> None:
        """Raise UsageError unless it has a backend of that name."""
        names = [backend.name for backend in self.backends]
        if name in names:
            return
        if names == ["auto"]:
            raise UsageError(f"{self.name} attention has only one implementation. Leave --backend out.")
        raise UsageError(
            f"backend is {shown(name)}, but must be one of {', '.join(names)} for {self.name} attention. Leave "
            "--backend out for auto."
        )

    def check_context_parallel(
        self, sharing: str = "--context-parallel gives each process", advice: str = "Leave --context-parallel out"
    ) -> None:
        """Raise UsageError where processes that share a clip's tokens, and each layer's heads, cannot run it."""
        missing = ["the hidden states of all tokens"] * self.needs.hidden_states + ["all heads"] * self.needs.all_heads
        if missing:
            raise UsageError(
                f"{self.name} attention needs {' and '.join(missing)} of a layer in one process, but {sharing} only "
                f"some of them. {advice}."
            )

    def pick_backend(self, name: str, head_dim: int, device: torch.device, dtype: torch.dtype, config: Any) -> str:
        """The backend that runs. Raises EnvironmentProblem where a named one cannot."""
        return name if self.choose_backend is None else self.choose_backend(name, head_dim, device, dtype, config)

    def to_dict(self) -> dict[str, Any]:
        """What `slagen methods --json` says of it."""
        return {
            "name": self.name,
            "kind": self.kind,
            "summary": self.summary,
            "needs_training": self.needs.training,
            "needs_weights": self.needs.weights,
            "needs_gpu": self.needs.gpu,
            "options": {each.field: each.default for each in settings_of(self.config) if not each.about.hidden},
            "flags": {f"--{each.name}": each.about.help for each in settings_of(self.config) if each.about.help},
            "backends": [backend.name for backend in self.backends],
        }


@dataclass(frozen=True)
class Addition:
    """What is added to a method and is none itself: a wrapper by the name of its option, or a way to select key blocks.

    Args:
        name: as `slagen methods` lists it. kind: "wrapper", "selector" or "control". summary: one line.
        help: of its option, which is off by default; empty for a value of an option that methods have.
        example: how to give it. beside: a method that takes it.
    """

    name: str
    kind: str
    summary: str
    help: str
    example: str
    beside: str = "sol"

    def to_dict(self) -> dict[str, Any]:
        """What `slagen methods --json` says of it: it needs what the method needs that it is added to."""
        return {
            "name": self.name, "kind": self.kind, "summary": self.summary, "needs_training": False,
            "needs_weights": False, "needs_gpu": False, "options": {self.name: None} if self.help else {},
            "flags": {f"--{self.name}": self.help} if self.help else {}, "backends": [],
        }  # fmt: skip
