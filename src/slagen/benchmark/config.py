"""BenchConfig: the settings of one call of `slagen bench`, and the shapes it knows by name. No torch here."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from slagen.attention import registry
from slagen.attention.cubes import compact_grid
from slagen.attention.delta.method import DELTA, check_delta
from slagen.attention.dense.config import BACKENDS
from slagen.attention.policy import AttentionPolicy
from slagen.attention.protocol import Grid, Method
from slagen.attention.schedule_file import as_text
from slagen.attention.sla.config import Backend, FeatureMap, LinearDomain, SLAConfig
from slagen.errors import UsageError
from slagen.generation.config import OUTPUT, Dtype, GenerateConfig
from slagen.generation.sizes import check_grid
from slagen.io.forms import shown
from slagen.io.paths import check_folder
from slagen.io.text import read_device
from slagen.settings import option

MAX_ELEMENTS = 2**34  # of q, k and v in a bench
WHAT, HOW = "What to measure", "How to measure"
# Self-attention calls of real models: batch, heads, tokens, head dimension.
SHAPES = {
    "wan-1.3b-480p": (1, 12, Grid(21, 30, 52), 128),  # 832x480, 81 frames: 32760 tokens
    "wan-1.3b-720p": (1, 12, Grid(21, 45, 80), 128),  # 1280x720, 81 frames: 75600 tokens
    "wan-14b-480p": (1, 40, Grid(21, 30, 52), 128),
    "wan-14b-720p": (1, 40, Grid(21, 45, 80), 128),
    "tiny-wan": (1, 4, Grid(5, 8, 8), 64),
}
RandomInit = Literal["wan-1.3b", "wan-14b"]
OTHERS = ("flex", "cudnn-blocks", "flashinfer-blocks", "sla-public")  # other libraries' sparse attention


def _known_methods() -> str:
    own = [method.name for method in registry.METHODS.values() if method.family != "dense" and method.benched]
    names = [*own, *(backend.name for backend in BACKENDS if backend.name != "auto"), *OTHERS]
    return f"{', '.join(names[:-1])} or {names[-1]}"


@dataclass(frozen=True)
class BenchConfig:
    """One call of `slagen bench`.

    Args:
        shapes: names of SHAPES, or "BxHxLxD". Not used with `model` or `random_init`.
        sparsities: which to measure; empty sweeps 0.8, 0.9, 0.95 and 0.97 for a shape, and 0.95 for a model.
        methods: names of `benchmark.registry.all_methods`; empty is all that run here. A model takes slagen's own
            and the dense backends; empty is SLA and every method that needs no weights.
        backend: which implementation of SLA.
        linear_domain, feature_map, block_m, block_n: as in SLAConfig.
        attention_options: (name, value) of options that only some of the methods have.
        delta: correct slagen's own sparse methods by one exact query row of so many; see `attention/delta`.
        sparsity_schedule: of the denoising loop, for every method with a sparsity, as in GenerateConfig.
        dtype: "auto" is bf16 on CUDA and fp32 elsewhere. device: "auto", "cpu", "cuda" or "cuda:N".
        backward: also time the backward pass; None does on CUDA.
        lengths: token counts of the length sweep; None doubles from 1,024 up to the shape's, () sweeps none.
        seconds: time for each measurement, at least three repeats.
        model: time the denoising loop of this preset, folder or hub id instead.
        random_init: the same for a randomly initialised Wan of this size.
        width, height, num_frames, steps: of the denoising loop; None is the model's own size, and 4 steps.
            As `compile`, only with `model` or `random_init`.
        lora, lora_merge: of the denoising loop, as in GenerateConfig.
        compile: run the denoising loop once more with every block of the transformer compiled.
        output: a folder for bench.json, bench.md, bench.png and bench.svg; None writes nothing.
    Raises: UsageError if a value is out of range, or the values do not go together.
    """

    shapes: tuple[str, ...] = option(
        ("wan-1.3b-480p",),
        f"Shape of q, k and v: {', '.join(SHAPES)}, or batch x heads x tokens x head dimension, such as "
        "1x12x8192x128. May be repeated. Default: wan-1.3b-480p.",
        panel=WHAT, name="shape",
    )  # fmt: skip
    sparsities: tuple[float, ...] = option(
        (),
        "Sparsity to measure. May be repeated. Default: 0.8, 0.9, 0.95 and 0.97, or only 0.95 for a denoising loop.",
        panel=WHAT,
        name="sparsity",
        complement="keep",
    )
    methods: tuple[str, ...] = option(
        (),
        f"Method to measure: {_known_methods()}. May be repeated. Default: all.",
        panel=WHAT, name="method",
    )  # fmt: skip
    lengths: tuple[int, ...] | None = option(
        None,
        "Sequence length to measure, in tokens. May be repeated. Default: powers of two from 1,024 to the full length.",
        panel=WHAT, name="length",
    )  # fmt: skip
    model: str | None = option(
        None, "Time this model's denoising loop: a preset, folder or Hugging Face id.", panel=WHAT, short="-m"
    )
    random_init: RandomInit | None = option(
        None, "Time the denoising loop of a Wan model with random weights: wan-1.3b or wan-14b.", panel=WHAT
    )
    width: int | None = option(
        None, "Video size in the denoising loop, in pixels.", panel=WHAT, metavar="WxH", is_size=True
    )
    height: int | None = option(None, "In pixels.", panel=WHAT, hidden=True)
    num_frames: int | None = option(None, "Video frames in the denoising loop.", panel=WHAT)
    steps: int | None = option(None, "Steps of the denoising loop. Default: 4.", panel=WHAT)
    lora: tuple[str, ...] = option(
        (), "A LoRA in the denoising loop, and its scale, as for slagen generate. May be repeated.", panel=WHAT,
        metavar="FILE[:SCALE]",
    )  # fmt: skip
    lora_merge: bool | None = option(
        None, "Merge LoRAs into the weights. Default: merge. With --no-lora-merge, they take time in each step.",
        panel=WHAT,
    )  # fmt: skip
    compile: bool = option(False, "Also time the denoising loop with torch.compile.", panel=WHAT)
    sparsity_schedule: str | None = option(
        None, "Sparsity by step, or by layer, in the denoising loop, as for slagen generate; or a file of slagen tune.",
        panel=WHAT, metavar="STEPS:SPARSITY,...",
    )  # fmt: skip
    backend: Backend = option("auto", "Implementation of SLA: auto, reference, torch or triton.", panel=HOW)
    linear_domain: LinearDomain = option("all", "Key blocks in the linear branch: all or marginal.", panel=HOW)
    feature_map: FeatureMap = option("softmax", "Feature map of the linear branch: softmax, elu or relu.", panel=HOW)
    block_m: int = option(64, "Query rows per block.", panel=HOW)
    block_n: int = option(64, "Key columns per block.", panel=HOW)
    attention_options: tuple[tuple[str, Any], ...] = option((), panel=HOW, of_methods=True)
    delta: int | None = option(None, DELTA.help, panel=HOW)
    dtype: Dtype = option("auto", "auto: bf16 on CUDA, fp32 on a CPU.", panel=HOW)
    device: str = option("auto", "auto, cpu, cuda or cuda:N.", panel=HOW, read=read_device)
    backward: bool | None = option(None, "Also time the backward pass. Default: on CUDA only.", panel=HOW)
    seconds: float = option(2.0, "Seconds per measurement.", panel=HOW)
    output: str | None = option(
        None, "Folder for bench.json, bench.md, bench.png and bench.svg.", panel=OUTPUT, short="-o"
    )

    def __post_init__(self) -> None:
        if self.output is not None:
            check_folder("output", self.output)
        if self.model is not None and self.random_init is not None:
            raise UsageError("--model and --random-init both choose the model to time. Give one of them.")
        for shape in self.shapes:
            self._check_room(shape)
        for sparsity in self.sparsities or (0.95,):
            self.sla(sparsity)  # checks the fraction and the blocks
        self._check_options()
        if not 0 < self.seconds <= 3600:
            raise UsageError(f"seconds is {self.seconds}, but must be above 0, and at most 3600. Try --seconds 2.")
        self._check_loop()

    def _check_options(self) -> None:
        """Raise UsageError for an option of a method that is not measured, and for what a method refuses."""
        if self.is_loop:
            self._check_loop_methods()
        elif lasting := [name for name in self.methods if getattr(registry.METHODS.get(name), "memory", None)]:
            raise UsageError(
                f"{lasting[0]} attention keeps tensors from one denoising step to the next, so single calls cannot be "
                "timed. Add --model or --random-init."
            )
        names = self.methods or [each.name for each in registry.METHODS.values() if each.benched]
        called = [method for name, method in registry.METHODS.items() if name in names]
        measured = self.loop_methods if self.is_loop else called
        options = dict(self.attention_options)
        check_delta(self.delta)
        if self.delta is not None and all(method.family == "dense" for method in measured):
            raise UsageError("--delta is for slagen's sparse methods, and none of them is measured. Leave it out.")
        for name in options:
            if not any(name in method.option_names for method in measured):
                raise UsageError(
                    f"{name} is an option of {registry.takers(name)}, but of none of the methods measured. Leave it "
                    "out."
                )
        for method in measured:
            method.config(**method.own(options))

    def _check_loop(self) -> None:
        """Raise UsageError for a denoising loop that cannot run, and for what only one has where none is timed."""
        loop = GenerateConfig(
            "-", width=self.width, height=self.height, num_frames=self.num_frames, steps=self.steps, lora=self.lora
        )
        object.__setattr__(self, "lora", loop.lora)
        asked: dict[str, Any] = {"--size": self.width, "--num-frames": self.num_frames, "--steps": self.steps}
        asked |= {"--sparsity-schedule": self.sparsity_schedule, "--lora": self.lora or None}
        given = [name for name, value in asked.items() if value is not None] + ["--compile"] * self.compile
        if given and not self.is_loop:
            are = "is" if len(given) == 1 else "are"
            raise UsageError(
                f"{' and '.join(given)} {are} for the denoising loop, which is not timed. Add --model or --random-init."
            )
        if self.width is not None and self.height is not None:
            check_grid(self.width, self.height)
        if self.sparsity_schedule is not None:
            self._check_schedule()

    def _check_schedule(self) -> None:
        """Have the config hold a schedule's content. Raise UsageError for one that does not fit the loop."""
        having = [method.name for method in self.loop_methods if "sparsity" in method.option_names]
        if not having:
            raise UsageError(
                "--sparsity-schedule is for methods with a sparsity, and none of them is measured. Leave it out."
            )
        texts = [as_text(self.sparsity_schedule, name, "--method") for name in having]
        object.__setattr__(self, "sparsity_schedule", texts[0])
        AttentionPolicy(sparsity_schedule=texts[0]).check_steps(self.num_steps)

    def _check_loop_methods(self) -> None:
        """Raise UsageError for a method that only attention calls are timed with."""
        own = [method.name for method in registry.METHODS.values() if method.family != "dense"]
        known = [*own, *(backend.name for backend in BACKENDS if backend.name != "auto")]
        for name in self.methods:
            if name not in known:
                raise UsageError(
                    f"method is {shown(name)}, but the denoising loop can be timed only with {', '.join(known)}. "
                    "Choose one of these, or leave --method out."
                )

    @property
    def is_loop(self) -> bool:
        """Whether a model's denoising loop is timed, and not single attention calls."""
        return self.model is not None or self.random_init is not None

    @property
    def num_steps(self) -> int:
        """Denoising steps of the loop."""
        return self.steps or 4

    @property
    def loop_methods(self) -> list[Method]:
        """What the loop is timed with beside dense attention: the methods named, or SLA and what needs no weights."""
        others = [method for method in registry.METHODS.values() if method.family != "dense"]
        if self.methods:
            return [method for method in others if method.name in self.methods]
        return [method for method in others if method.benched and (method.name == "sla" or not method.needs.weights)]

    def _check_room(self, shape: str) -> None:
        """Raise UsageError for lengths that no machine holds."""
        batch, num_heads, length, head_dim = parse_shape(shape)
        for tokens in (length, *(self.lengths or ())):
            if tokens < 1:
                raise UsageError(f"length is {shown(tokens)}, but must be at least 1. Try --length 4096.")
            if tokens > MAX_ELEMENTS // (batch * num_heads * head_dim):
                raise UsageError(
                    f"{batch} x {num_heads} x {shown(tokens)} x {head_dim} is too large: at most {MAX_ELEMENTS:,} "
                    "elements per tensor are possible. Try --length 4096."
                )

    def sla(self, sparsity: float) -> SLAConfig:
        """The attention that is measured at one sparsity."""
        return SLAConfig(
            sparsity=sparsity,
            linear_domain=self.linear_domain,
            feature_map=self.feature_map,
            block_m=self.block_m,
            block_n=self.block_n,
        )


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """(B, H, L, D) of a name in SHAPES or of "BxHxLxD". Raises UsageError."""
    if text in SHAPES:
        batch, num_heads, grid, head_dim = SHAPES[text]
        return batch, num_heads, grid.num_tokens, head_dim
    match = re.fullmatch(r"(\d{1,4})x(\d{1,4})x(\d{1,7})x(\d{1,4})", text.strip().lower())
    sizes = tuple(int(number) for number in match.groups()) if match else ()
    if len(sizes) != 4 or 0 in sizes:
        raise UsageError(
            f"shape is {shown(text)}, but must be one of {', '.join(SHAPES)}, or batch x heads x tokens x head "
            "dimension. Try --shape 1x12x8192x128."
        )
    return sizes  # type: ignore[return-value]


def grid_of(shape: str, num_tokens: int) -> Grid:
    """How so many tokens are arranged: as in the shape where it is of a model and has as many, otherwise compactly."""
    grid = SHAPES[shape][2] if shape in SHAPES else None
    return grid if grid is not None and grid.num_tokens == num_tokens else compact_grid(num_tokens)
