"""The report of a video, typed: what the JSON beside it says, and how that is read back. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from slagen.device import Device
from slagen.generation.cache_use import StepCacheUse
from slagen.generation.offload import ReportedPlacement
from slagen.io.forms import Kind, matching, sha256, whole
from slagen.io.records import form_of, read_record

SCHEMA_VERSION = 1
BLOCKS = {"critical": float, "marginal": float, "negligible": float, "key_blocks": int, "block_n": int, "backend": str,
          "fractions": {"critical": float}}  # fmt: skip
ATTENTION = Kind(
    "an object with either all of its block counts or none of them",
    {"mode": str, "tokens": int, **{f"{name}?": form for name, form in BLOCKS.items()}},
    lambda value: "critical" not in value or value.keys() >= BLOCKS.keys(),
)


@dataclass(frozen=True)
class VideoFile:
    """A video's file, which may not be there yet, or ever.

    Args:
        file: its name; None in memory. frames_hash: SHA-256 of the decoded frames. sha256: of the file, where it is.
    """

    file: str | None
    frames: int
    width: int
    height: int
    fps: int
    duration_s: float
    frames_hash: str
    sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Its object in the JSON."""
        return {name: value for name, value in vars(self).items() if name != "sha256" or value is not None}


@dataclass(frozen=True)
class UsedLora:
    """A LoRA file by its name and SHA-256, and its scale."""

    file: str
    sha256: str
    scale: float


@dataclass(frozen=True, kw_only=True)
class UsedWeights:
    """The weights that made a video.

    Args:
        model: its name. model_file: what replaced the transformer's own weights; None where nothing did.
        model_hash: of the transformer. sla_file, sla_hash: SLA weights in a file of their own, and its SHA-256.
        used: which they are, in words. trained, trained_steps, trained_sparsity: how those of slagen's files were; the
            sparsity is the mean of the layers.
        parameter_norms: of what an attention method other than SLA learned, by parameter group and layer.
        loras: that changed the weights; None where none did.
        cached_prompt: the prompts were known, so no text encoder was loaded; None where one was.
    """

    model: str
    model_file: str | None = None
    model_hash: str | None = None
    sla_file: str | None = None
    sla_hash: str | None = None
    used: str
    trained: str | None = None
    trained_steps: int | None = None
    trained_sparsity: float | None = None
    parameter_norms: dict[str, list[float]] | None = None
    loras: list[UsedLora] | None = None
    cached_prompt: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Its object in the JSON."""
        known = ("trained", "trained_steps", "trained_sparsity", "parameter_norms", "loras", "cached_prompt")  # of some
        said = {**vars(self), "loras": None if self.loras is None else [dict(vars(lora)) for lora in self.loras]}
        return {name: value for name, value in said.items() if name not in known or value is not None}


@dataclass(frozen=True)
class Blocks:
    """What becomes of the key blocks of each query block, by number, on average where steps or layers differ;
    critical_share: the fraction of them attended to exactly."""

    key_blocks: int
    block_n: int
    critical: float
    marginal: float
    negligible: float
    critical_share: float


@dataclass(frozen=True)
class ReportedAttention:
    """The attention that ran. method: what the attention method says of itself, and what its layers counted. backend:
    None for PyTorch's choice."""

    mode: str
    tokens: int
    method: dict[str, Any]
    backend: str | None

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> ReportedAttention:
        """Of a document that has the form ATTENTION."""
        method = {name: value for name, value in content.items() if name not in ("mode", "tokens", "backend")}
        return cls(content["mode"], content["tokens"], method, content.get("backend"))

    def to_dict(self) -> dict[str, Any]:
        """Its object in the JSON."""
        backend = {} if self.backend is None else {"backend": self.backend}
        return {"mode": self.mode, "tokens": self.tokens, **self.method, **backend}

    @property
    def density(self) -> float | None:
        """The fraction of all query-key pairs that was attended exactly, where it was counted."""
        density = self.method.get("density")
        return density if isinstance(density, float) else None

    @property
    def step_densities(self) -> list[float]:
        """That fraction in each step, where a --sparsity-schedule set the sparsity of steps; otherwise empty."""
        return list(self.method.get("step_densities", ()))

    @property
    def blocks(self) -> Blocks | None:
        """None for a method without blocks."""
        about = self.method
        if "critical" not in about:
            return None
        names = ("key_blocks", "block_n", "critical", "marginal", "negligible")
        return Blocks(**{name: about[name] for name in names}, critical_share=about["fractions"]["critical"])


@dataclass(frozen=True)
class ReportedStep:
    """The times of a denoising step; None where they were not taken. Attention: of both passes, of each, of each layer
    in both passes, and of each of its parts in all of these. latency_ms leaves out what compile_ms was for."""

    step: int
    timestep: float
    latency_ms: float | None
    attention_ms: float | None
    attention_conditional_ms: float | None
    attention_unconditional_ms: float | None
    attention_share: float | None
    layers_ms: list[float] | None = None
    parts_ms: dict[str, float] | None = None
    compile_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Its object in the JSON."""
        rare = ("parts_ms", "compile_ms")
        return {name: value for name, value in vars(self).items() if name not in rare or value is not None}


@dataclass(frozen=True)
class ReportedLayer:
    """Attention time of a layer over all steps and passes."""

    layer: int
    attention_ms: float


@dataclass(frozen=True)
class Ratio:
    """How many times as fast something was: median, least and most."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class MeasuredStep:
    """A denoising step that was run with dense attention too, on the same latents: attention, and all of the step."""

    step: int
    attention_ms: float
    dense_attention_ms: float
    latency_ms: float
    dense_latency_ms: float


@dataclass(frozen=True)
class MeasuredDense:
    """The measured speed-up over dense attention, of attention alone and of the whole step, and its steps."""

    attention_speedup: Ratio
    step_speedup: Ratio
    steps: list[MeasuredStep]


@dataclass(frozen=True)
class Cost:
    """What dense attention would have cost, what was spent, and how near that is to the limit Amdahl's law sets.

    Args:
        forward_passes: of the whole run. The TFLOP are of them all.
        flops_speedup: of the forward passes over dense attention. amdahl_ceiling: that, if attention were free.
        measured_attention_share: of the steps' time. remaining_time_ceiling: how much faster the measured steps would
            be if attention were free. Both None if untimed.
    """

    forward_passes: int
    dense_attention_tflop: float
    attention_tflop: float
    other_tflop: float
    attention_flops_saved: float
    dense_attention_share_of_flops: float
    amdahl_ceiling: float
    flops_speedup: float
    achieved_share_of_ceiling: float
    measured_attention_share: float | None
    remaining_time_ceiling: float | None


@dataclass(frozen=True)
class StagePeaks:
    """The most memory held in each stage, of the card or of the process.

    Args:
        of: "card" or "process". peak_gib: by stage; None where it is not known. unknown: why it is not.
    """

    of: str
    peak_gib: dict[str, float | None]
    unknown: str | None


@dataclass(frozen=True)
class Overhead:
    """How the times were taken, and what taking them cost, as a share of the steps."""

    level: str
    spans: int
    span_cost_ms: float
    overhead_share: float
    attention_means: str


@dataclass(frozen=True)
class ProcessShare:
    """What one of several processes did. Times of all steps, in milliseconds; None where they were not taken.

    Args:
        passes: of each step: "all", "conditional" or "unconditional". heads: of each layer. tokens: outside attention.
        denoise_ms: the steps. attention_ms, communication_ms: the attention in them, and the exchange with other
            processes, which waits for the slowest.
    """

    rank: int
    device: str
    passes: str
    heads: int
    tokens: int
    denoise_ms: float | None
    attention_ms: float | None
    communication_ms: float | None


@dataclass(frozen=True)
class Processes:
    """The processes that made a video together, by rank, and by what they communicate: "gloo" or "nccl"."""

    backend: str
    cfg_parallel: bool
    ranks: list[ProcessShare]


@dataclass(frozen=True)
class Decoded:
    """Where and with what `slagen decode` made the video of saved latents."""

    versions: dict[str, str]
    device: Device


@dataclass(frozen=True)
class VideoReport:
    """What a run measured.

    Args:
        created: time in ISO 8601. settings: by option name, as recorded. versions: of packages.
        stages_s: seconds by stage, and their sum as "total". wall_s: measured by itself, from the start of the process,
            or of this video where it is not the run's first, until the report; None where that is not one run.
        measured_dense: of --measure-dense. stage_memory: None in reports of older versions.
        decoded: of a `slagen decode`. processes: None for one; times are those of the first. cache: what it skipped.
    """

    schema_version: int
    created: str
    video: VideoFile
    settings: dict[str, Any]
    versions: dict[str, str]
    device: Device
    weights: UsedWeights
    latents_hash: str
    attention: ReportedAttention
    stages_s: dict[str, float]
    since_process_start_s: float
    peak_memory_gib: float
    steps: list[ReportedStep]
    layers: list[ReportedLayer]
    cost: Cost
    timing: Overhead
    wall_s: float | None = None
    measured_dense: MeasuredDense | None = None
    stage_memory: StagePeaks | None = None
    placement: ReportedPlacement | None = None
    cache: StepCacheUse | None = None
    decoded: Decoded | None = None
    processes: Processes | None = None

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> VideoReport:
        """Of a document that has the form FORM: a report as `generate` made it."""
        attention = ReportedAttention.from_dict(content["attention"])
        return read_record(cls, {**content, "attention": attention, "decoded": None})

    def to_dict(self) -> dict[str, Any]:
        """What the file beside the video holds."""
        content = {
            **vars(self), "settings": dict(self.settings), "versions": dict(self.versions),
            "stages_s": dict(self.stages_s), "steps": [step.to_dict() for step in self.steps],
            "layers": [dict(vars(layer)) for layer in self.layers], "cost": dict(vars(self.cost)),
            "timing": dict(vars(self.timing)),
            **{name: getattr(self, name).to_dict() for name in ("video", "device", "weights", "attention")},
        }  # fmt: skip
        decoded = content.pop("decoded")
        if self.wall_s is None:
            del content["wall_s"]
        del content["measured_dense"], content["cache"]
        for name in ("stage_memory", "placement", "processes"):
            value = content.pop(name)
            content |= {} if value is None else {name: asdict(value)}
        if self.cache is not None:
            content["cache"] = self.cache.to_dict()
        if self.measured_dense is not None:
            content = {"measured_dense": asdict(self.measured_dense), **content}
        if decoded is None:
            return content
        return {**content, "decoded": {"versions": dict(decoded.versions), "device": decoded.device.to_dict()}}

    @property
    def hashes(self) -> dict[str, str]:
        """By what they are of, as `named_hashes`."""
        weights, video = self.weights, self.video
        return named_hashes(self.latents_hash, weights.model_hash, weights.sla_hash, video.frames_hash, video.sha256)


FORM = {
    **{name: form for name, form in form_of(VideoReport).items() if name != "decoded?"},
    "settings": {
        "prompt": str, "model": str, "vae?": str | None,
        "size": matching(r"\d{1,5}x\d{1,5}", "a size such as 832x480"), "num_frames": whole(1, 10**6),
        "fps": whole(1, 1000), "seed": int,
    },
    "latents_hash": sha256(), "attention": ATTENTION,
}  # fmt: skip


@dataclass(frozen=True)
class RestoredReport:
    """A report without times, of what a video says of itself. weights: their hashes, by the fields of `UsedWeights`."""

    created: str
    video: VideoFile
    settings: dict[str, Any]
    versions: dict[str, str]
    weights: dict[str, Any]
    latents_hash: str

    def to_dict(self) -> dict[str, Any]:
        """What the file beside the video holds."""
        video = self.video.to_dict()
        video["frames_hash"] = video.pop("frames_hash")  # the last one here
        return {
            "schema_version": SCHEMA_VERSION, "created": self.created,
            "restored": "from the metadata of the video, which does not record how long each part took", **vars(self),
            "video": video,
        }  # fmt: skip


def named_hashes(
    latents: str, model: str | None, sla: str | None, frames: str | None, file: str | None
) -> dict[str, str]:
    """Those hashes that are known, by what they are of, as `replay` shows them."""
    found = {"latents": latents, "model weights": model, "SLA weights": sla, "frames": frames, "file": file}
    return {name: value for name, value in found.items() if value is not None}
