"""TuneConfig: the settings of one call of `slagen tune`, checked where it is made. No torch here."""

import math
from dataclasses import dataclass

from slagen.attention import registry
from slagen.attention.schedule_file import SUFFIX
from slagen.attention.sla.config import check_fraction
from slagen.comparison.config import read_fractions
from slagen.errors import UsageError
from slagen.generation.config import CACHE, OUTPUT, GenerateConfig
from slagen.io.paths import check_folder
from slagen.settings import option

TUNING = "Tuning"
CANDIDATES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)
MAX_CANDIDATES = 6  # a compiled block has a graph for each, and PyTorch keeps at most 8
MAX_PARTS = 8
TUNABLE = tuple(name for name in registry.with_option("sparsity") if name != "linear")  # which works alike at any


def read_candidates(text: str) -> tuple[float, ...]:
    """The sparsities of a list such as "0.8,0.95". Raises UsageError."""
    return read_fractions(text, "candidates")


@dataclass(frozen=True)
class TuneConfig:
    """One call of `slagen tune`.

    Args:
        base: the video, its sampling and its attention; a prompt of each clip takes the place of its own.
        max_error: bound on the relative L2 error of the velocity to dense attention's, at the latents of dense runs;
            None is the error of the attention as it is, with one sparsity in all layers.
        candidates: sparsities that a layer may get; those that keep as many blocks as another count once.
        step_parts: parts of the denoising steps in which a layer has a sparsity of its own.
        prompts: a file of prompts to measure on; None is a few for the model.
        curve: also measure schedules for several costs, beside one sparsity everywhere, on other prompts.
        held_out: a file of these prompts; None is a few for the model.
        output: a file that ends in .json, or a folder in which it is named by the settings.
        cache_dir: where measurements are kept, so that the next call with the same settings need not repeat them.
    Raises: UsageError if a value is out of range, or the attention has no sparsity.
    """

    base: GenerateConfig
    max_error: float | None = option(
        None,
        "Upper bound on the relative L2 error of the velocity to dense attention. Default: the error with --sparsity "
        "in all layers.",
        panel=TUNING,
    )
    candidates: tuple[float, ...] = option(
        CANDIDATES, "Sparsities to choose from, separated by commas. Default: 0,0.5,0.7,0.8,0.9,0.95.", panel=TUNING,
        kind=str, read=read_candidates, metavar="LIST",
    )  # fmt: skip
    step_parts: int = option(
        1, "Divide the denoising steps into this many equal parts, each with its own sparsity by layer.", panel=TUNING
    )
    prompts: str | None = option(
        None,
        "A file of prompts to measure on, in the same format as for slagen batch. Default: three prompts for the "
        "model.",
        panel=TUNING,
        metavar="FILE",
    )
    curve: bool = option(
        False,
        "Also measure schedules for several costs against one sparsity everywhere, on prompts that were not used for "
        "tuning.",
        panel=TUNING,
    )
    held_out: str | None = option(
        None, "A file of prompts for --curve. Default: three other prompts for the model.", panel=TUNING, metavar="FILE"
    )
    output: str = option("outputs", "A folder, or a file that ends in .json.", panel=OUTPUT, short="-o")
    cache_dir: str = option(
        CACHE,
        "Folder for measurements, which a repeated or interrupted call reads, and for encoded prompts.",
        panel=OUTPUT,
    )

    def __post_init__(self) -> None:
        method = registry.get(self.base.attention)
        if method.name not in TUNABLE:
            raise UsageError(
                f"{method.name} attention has no sparsity to tune. Give --attention {' or '.join(TUNABLE)}."
            )
        if self.base.sparsity_schedule is not None:
            raise UsageError("slagen tune makes a sparsity schedule, so it takes none. Leave --sparsity-schedule out.")
        for sparsity in self.candidates:
            check_fraction("candidates", sparsity, "Try --candidates 0.8,0.95.")
        if not 2 <= len(set(self.candidates)) <= MAX_CANDIDATES:
            raise UsageError(
                f"candidates has {len(set(self.candidates))} different sparsities, but there must be from 2 to "
                f"{MAX_CANDIDATES}. Try --candidates 0.8,0.95."
            )
        if type(self.step_parts) is not int or not 1 <= self.step_parts <= MAX_PARTS:
            raise UsageError(f"step_parts is {self.step_parts}, but must be from 1 to {MAX_PARTS}. Try --step-parts 2.")
        if self.max_error is not None and not (math.isfinite(self.max_error) and self.max_error >= 0):
            raise UsageError(f"max_error is {self.max_error}, but must be a number of at least 0. Try --max-error 0.3.")
        if self.held_out is not None and not self.curve:
            raise UsageError("--held-out is a file of prompts for --curve. Give --curve too, or leave it out.")
        if not self.output.lower().endswith(SUFFIX):
            check_folder("output", self.output, f"a folder, or a file that ends in {SUFFIX}")
