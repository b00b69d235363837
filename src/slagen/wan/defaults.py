"""The settings that a model was made for, and how it is fine-tuned by default. No torch here."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Any, get_args

from slagen.attention.sla.config import check_fraction
from slagen.errors import UsageError
from slagen.formats.published import Sampler
from slagen.io.forms import shown
from slagen.io.text import counted

# What is beyond these is a slip of the pen, and would keep a machine busy before anybody noticed.
MAX_VIDEOS = 10_000  # of one prompt
MAX_OF_A_CLIP = {"width": 16_384, "height": 16_384, "num_frames": 10_001, "fps": 240, "num_videos": MAX_VIDEOS}
MAX_STRENGTH = 10_000.0  # of guidance, flow shift and the like
MIN_STRENGTH = 0.0001  # of flow shift and the largest noise: below, schedules divide by zero
MAX_TRAINING = {
    "steps": 10_000_000, "warmup_steps": 10_000_000, "batch_size": 65_536, "micro_batch": 65_536, "lora_rank": 4096,
    "context_parallel": 4096, "save_every": 10**9, "validate_every": 10**9, "clips_per_prompt": MAX_VIDEOS,
    "held_out": 1_000_000,
}  # fmt: skip


@dataclass(frozen=True)
class TrainingDefaults:
    """How a model is fine-tuned by default; these values are the published ones for Wan.

    Args:
        steps: of the optimiser.
        lr: learning rate. proj_multiplier: factor on it for `proj_l`.
        warmup_steps: over which it rises from 0, at most a tenth of all steps. decay: fraction of the steps, at the
            end, over which it falls to 0 again.
        batch_size: clips a step, over all processes. micro_batch: clips at a time on one of them.
        log_sigma_mean, log_sigma_std: noise levels are sigma / (1 + sigma), log sigma normal.
        caption_dropout: fraction of the clips that are trained on with the negative prompt for a caption, which is what
            the unconditional pass of guidance sees; 0 leaves that pass untrained.
    Source: TurboDiffusion's SLA training, github.com/thu-ml/TurboDiffusion, whose models sample without guidance and so
    drop no caption; that part is ours.
    """

    steps: int = 2000
    lr: float = 1e-5
    proj_multiplier: float = 1.0
    warmup_steps: int = 100
    decay: float = 0.0
    batch_size: int = 32
    micro_batch: int = 1
    log_sigma_mean: float = 1.5
    log_sigma_std: float = 1.6
    caption_dropout: float = 0.1

    @classmethod
    def from_dict(cls, fields: object) -> "TrainingDefaults":
        """Build from JSON. Raises UsageError for an unknown name or a value that is no number of its type."""
        if not isinstance(fields, dict):
            raise UsageError(f"training is {shown(fields)}, but must be an object.")
        for name, value in fields.items():
            field = cls.__dataclass_fields__.get(name)
            if field is None:
                raise UsageError(
                    f"training.{shown(name)[1:-1]} is unknown. Use one of {', '.join(cls.__dataclass_fields__)}."
                )
            whole = isinstance(field.default, int)
            least = {"log_sigma_mean": -MAX_STRENGTH, "steps": 1, "batch_size": 1, "micro_batch": 1}.get(name, 0)
            is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
            if not is_number or not least <= value <= MAX_TRAINING.get(name, MAX_STRENGTH):
                raise UsageError(
                    f"training.{name} is {shown(value)}, which is not a valid value. Give a value like "
                    f"{field.default!r}."
                )
        if "caption_dropout" in fields:
            check_fraction("training.caption_dropout", fields["caption_dropout"], "Give 0.1.")
        return cls(**fields)


@dataclass(frozen=True)
class ClipSize:
    """The size of a clip: width and height in pixels, and video frames."""

    width: int
    height: int
    num_frames: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height} with {counted(self.num_frames, 'frame')}"

    @classmethod
    def from_dict(cls, fields: Any) -> "ClipSize":
        """Build from JSON. Raises UsageError for anything but three positive whole numbers by name."""
        names = list(cls.__dataclass_fields__)
        good = isinstance(fields, dict) and set(fields) == set(names)
        if not good or not all(type(x) is int and 0 < x <= MAX_OF_A_CLIP[name] for name, x in fields.items()):
            raise UsageError(
                f"trained_sizes contains {str(fields):.200}, but must contain objects with {', '.join(names)}, each a "
                "whole number above 0."
            )
        return cls(**fields)

    def distance(self, other: "ClipSize") -> float:
        """How far two sizes are apart: 0 when equal, symmetric, and the same for twice as wide as for half."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return sum(abs(math.log(a / b)) for a, b in pairs)


@dataclass(frozen=True)
class ModelDefaults:
    """The settings a model was made for; a `slagen.json` beside `model_index.json` names those that are not Wan2.1's.

    Args:
        width, height: in pixels.
        num_frames: video frames, 4k + 1.
        fps: frames a second.
        steps: denoising steps.
        guidance_scale: weight of the prompt; above 1 every step has a second, unconditional pass.
        flow_shift: how far the sampler's steps lean towards noise.
        sampler: "rcm" for weights distilled to a few steps, otherwise "unipc", "euler" or "dpm++".
        max_sequence_length: text tokens; shorter prompts are padded to it, and the padding is attended to.
        negative_prompt: what to steer away from.
        vocabulary: every word the model knows, where that is a closed list.
        example_prompt: a prompt that works, for messages.
        training: how it is fine-tuned.
        trained_sizes: the only sizes it makes well, where there are few; None says nothing about sizes.
    """

    width: int = 832
    height: int = 480
    num_frames: int = 81
    fps: int = 16
    steps: int = 50
    guidance_scale: float = 5.0
    flow_shift: float = 3.0
    sampler: Sampler = "unipc"
    max_sequence_length: int = 512
    negative_prompt: str = ""
    vocabulary: tuple[str, ...] | None = None
    example_prompt: str = "a red fox walking through fresh snow, morning light"
    training: TrainingDefaults = TrainingDefaults()
    trained_sizes: tuple[ClipSize, ...] | None = None

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ModelDefaults":
        """Build from JSON. Raises UsageError for an unknown name or a value of another type."""
        fields = dict(fields)
        if "training" in fields:
            fields["training"] = TrainingDefaults.from_dict(fields["training"])
        sizes = fields.get("trained_sizes")
        if sizes is not None:
            if not isinstance(sizes, list) or not sizes:
                raise UsageError(
                    f"trained_sizes is {shown(sizes)}, but must be a list of objects. Give one, or leave it out."
                )
            fields["trained_sizes"] = tuple(ClipSize.from_dict(size) for size in sizes)
        for name, value in fields.items():
            field = cls.__dataclass_fields__.get(name)
            if field is None:
                raise UsageError(f"{shown(name)[1:-1]} is unknown. Use one of {', '.join(cls.__dataclass_fields__)}.")
            if name in ("training", "trained_sizes"):
                continue
            if name == "vocabulary":
                good = value is None or (isinstance(value, list) and all(isinstance(word, str) for word in value))
            elif name == "sampler":
                good = value in get_args(Sampler)
            elif isinstance(field.default, float):
                good = isinstance(value, int | float) and not isinstance(value, bool)
                good = good and (MIN_STRENGTH if name == "flow_shift" else 0) <= value <= MAX_STRENGTH and value > 0
            elif isinstance(field.default, int):
                most = {**MAX_OF_A_CLIP, "steps": 1000, "max_sequence_length": 8192}[name]
                good = type(value) is int and 0 < value <= most
            else:
                good = isinstance(value, str)
            if not good:
                raise UsageError(
                    f"{name} is {shown(value)}, which is not a valid value. Give a value like {field.default!r}."
                )
        vocabulary = fields.get("vocabulary")
        return cls(**dict(fields, vocabulary=None if vocabulary is None else tuple(vocabulary)))

    def unknown_words(self, prompt: str) -> list[str]:
        """The words of a prompt that the model has never seen, in order, once each."""
        if self.vocabulary is None:
            return []
        words = re.findall(r"[^\W_]+(?:'[^\W_]+)?", prompt.lower())
        return [word for word in dict.fromkeys(words) if word not in self.vocabulary]

    def unknown_words_warning(self, name: str, words: list[str]) -> str:
        """The warning for words of a prompt that the model `name` was not trained on."""
        return (
            f"{name} was not trained on {', '.join(map(repr, words))}, so the video may not match the prompt; try a "
            f'prompt like "{self.example_prompt}"'
        )

    def size_warning(self, name: str, width: int, height: int, num_frames: int) -> str | None:
        """The warning for a clip size that the model `name` was not trained at; None if it was, or may have been.

        The sizes it was trained at are named, and the nearest is given as it is typed.
        """
        size = ClipSize(width, height, num_frames)
        if self.trained_sizes is None or size in self.trained_sizes:
            return None
        nearest = min(self.trained_sizes, key=size.distance)
        return (
            f"{name} was trained only at {', '.join(map(str, self.trained_sizes))}, and gives poor videos at other "
            f"sizes. This video is {size}. Try --size {nearest.width}x{nearest.height} "
            f"--num-frames {nearest.num_frames}"
        )
