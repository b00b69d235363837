"""How much of a CPU's memory a run takes, and how much this process may still have. No torch, for `slagen plan`.

Measured with the bundled model, fp32, at 9 sizes from 128x128 with 17 frames to 1024x1024 with 17 (2026-11-25): from
there to the peak it takes 0.17 to 2.5 GiB, of which decoding is nearly all. What is said to be needed was between 6 %
less and 0.1 GiB more from 512x512 on, with SLA and with full attention alike, for a CPU keeps no scores of it either.
Since then frames are handed on as they are decoded. Decoding alone took 0.40 and 0.48 GiB for 17 and 65 frames of
256x256, 0.70 and 0.82 for 17 and 49 of 512x512 (2026-12-01): of each frame, a CPU's allocator keeps `LEFT_BYTES`.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from slagen.attention.cost import ModelShape
from slagen.errors import SlagenError
from slagen.formats.held import Held, held, transformer_files
from slagen.formats.model_files import read_json
from slagen.io.text import counted
from slagen.wan.folder import ModelSource

GIB = 2**30
DECODER_COPIES = 20  # activations of the decoder's last width, four frames of float32, that are there at once
DECODER_BYTES = GIB // 8  # whatever the size
FRAME_BYTES = 36  # of a pixel of a frame: three colours as the decoder gives them, put together, and rounded
FRAMES = 4  # of a latent frame, which are decoded at a time and handed on
LEFT_BYTES = 16  # of a pixel of each frame: what a CPU's allocator keeps of those that were handed on
SURELY_MEASURED, SURELY = 0.9, 0.5  # of what decoding is said to take: by a decoder as the bundled one, and by another
WAN_VAE = {"base_dim": 96}  # Wan2.1's, as far as it matters here
NO_LIMIT = 2**60
IMAGE_ENCODER = "image_encoder"  # a part of image-to-video models, in float32 on the CPU


@dataclass(frozen=True)
class Need:
    """What a run takes beside what the process has already, in bytes.

    Args:
        weights: of text encoder, transformer and VAE together. fresh: of them, what is no copy of a file, and so cannot
            be dropped and read again.
        denoise, decode: what these stages take beside them. least: what the larger takes without doubt.
    """

    weights: int
    fresh: int
    denoise: int
    decode: int
    least: int

    def keeping(self, num_bytes: int) -> Need:
        """The same where the attention remembers so many bytes from step to step, until the last one."""
        denoise = self.denoise + num_bytes
        return dataclasses.replace(self, denoise=denoise, least=max(self.least, num_bytes))

    @property
    def likely(self) -> int:
        """The peak."""
        return self.weights + max(self.denoise, self.decode)

    @property
    def surely(self) -> int:
        """What no run of this size does without."""
        return self.fresh + self.least


def need(
    source: ModelSource, width: int, height: int, num_frames: int, item_bytes: int, *,
    parts: tuple[str, ...] = ("text_encoder", "transformer", "vae"), merges: bool = False, vae_bytes: int = 4,
) -> Need:  # fmt: skip
    """What a video of this size takes on a CPU.

    Args:
        item_bytes: of one number of text encoder and transformer. vae_bytes: of the VAE.
        parts: that are loaded.
        merges: LoRAs are merged into the transformer, so that none of its weights stays in 8 bits.
    Raises: WeightsError for a folder that is no model.
    """
    weights = fresh = multiplied = 0
    for part in parts:
        found = held_by(source, part, vae_bytes if part == "vae" else item_bytes, merges=merges)
        weights, fresh = weights + found.held, fresh + found.fresh
        multiplied += multiplying_out(source.shape, item_bytes) if found.in_8_bits else 0
    if source.takes_image and "transformer" in parts:
        found = held_by(source, IMAGE_ENCODER, 4)
        weights, fresh = weights + found.held, fresh + found.fresh
    vae = read_json(source.folder / "vae" / "config.json", source.folder)
    tokens = source.token_grid(width, height, num_frames).num_tokens if "transformer" in parts else 0
    denoise, *others = activations(source.shape, tokens, vae, width * height, num_frames, item_bytes, vae_bytes)
    return Need(weights, fresh, denoise + multiplied, *others)


def held_by(source: ModelSource, part: str, item_bytes: int, *, merges: bool = False) -> Held:
    """What one of a model's parts takes in memory; arguments as of `need`."""
    if part != "transformer":
        return held((source.folder / part).glob("*.safetensors"), item_bytes)
    files = transformer_files(source.weights or source.folder / part)
    found = held(files, item_bytes)
    return found.full(item_bytes) if merges and not any(file.suffix == ".gguf" for file in files) else found


def multiplying_out(shape: ModelShape, item_bytes: int) -> int:
    """Bytes that multiplying out the largest weight of 8 bits takes: in float32, and in the dtype computed in."""
    return shape.num_heads * shape.head_dim * shape.ffn_dim * (4 + item_bytes)


def activations(
    shape: ModelShape,
    tokens: int,
    vae: dict[str, Any],
    pixels: int,
    num_frames: int,
    item_bytes: int,
    vae_bytes: int = 4,
    *,
    on_card: bool = False,
) -> tuple[int, int, int]:
    """What denoising and decoding take beside the weights, and what the larger takes without doubt, in bytes.

    Args:
        vae: its config. pixels: of a frame. item_bytes: of one number of the transformer. vae_bytes: of the VAE.
        on_card: of a GPU's memory.
    """
    denoise = denoising(shape, tokens, item_bytes)
    last = (vae.get("decoder_base_dim") or vae.get("base_dim") or 96) / (vae.get("patch_size") or 1) ** 2
    frames = FRAME_BYTES * min(FRAMES, num_frames) + (0 if on_card else LEFT_BYTES * num_frames)
    decode = DECODER_BYTES + int(pixels * (DECODER_COPIES * 4 * vae_bytes * last + frames))
    part = SURELY_MEASURED if vae.get("is_residual") else SURELY
    return denoise, decode, int(max(denoise / 2, part * decode))


def denoising(shape: ModelShape, tokens: int, item_bytes: int) -> int:
    """What denoising takes beside the weights, in bytes, on a CPU or a card."""
    channels = shape.num_heads * shape.head_dim
    return tokens * (8 * channels + item_bytes * (9 * channels + 3 * shape.ffn_dim))  # float32 residual; q, k, v; ffn


def has_card() -> bool:
    """Whether NVIDIA's driver is on this machine; without torch, which only knows the GPUs that it can use."""
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def check(needed: Need, width: int, height: int, num_frames: int, advice: str | None = None) -> str | None:
    """Look whether a run fits: a warning where it may not, None where it does.

    Args:
        advice: what takes less; None: a smaller video, or another dtype.
    Raises: SlagenError where it surely does not, before anything is loaded.
    """
    left, limit = memory_left()
    if needed.likely <= left:
        return None
    text = (
        f"{width}x{height} with {counted(num_frames, 'frame')} needs about {needed.likely / GIB:.1f} GiB of memory "
        f"on a CPU (weights {needed.weights / GIB:.1f}, denoising {needed.denoise / GIB:.1f}, decoding "
        f"{needed.decode / GIB:.1f}), but only {max(0, left) / GIB:.1f} GiB of {limit} is left."
    )
    if advice is None:
        advice = "Try a smaller --size" + (" or a lower --num-frames" if num_frames > 1 else "")
        advice += ", or --dtype bf16" if needed.fresh > needed.decode else ""
    if needed.surely > left:
        raise SlagenError(f"{text} {advice}.")
    return f"{text} If it runs out of memory, {advice[:1].lower()}{advice[1:]}"


def memory_left() -> tuple[int, str]:
    """Bytes that this process may still take, and what sets that limit."""
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    return min([(free, "this machine's memory"), *_group_limits(), *_process_limits()])


def _process_limits() -> Iterator[tuple[int, str]]:
    """What `ulimit` leaves."""
    if sys.platform == "win32":
        return
    import resource

    used = psutil.Process().memory_info()
    for kind, size, name in ((resource.RLIMIT_AS, used.vms, "ulimit -v"), (resource.RLIMIT_DATA, _data(), "ulimit -d")):
        limit = resource.getrlimit(kind)[0]
        if limit != resource.RLIM_INFINITY:
            yield limit - size, f"the {name} limit"


def _data() -> int:
    """Bytes of this process's data segment and private mappings, which RLIMIT_DATA counts."""
    return getattr(psutil.Process().memory_info(), "data", 0)


def _group_limits(
    groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")
) -> Iterator[tuple[int, str]]:
    """What the control groups of Linux leave, of which containers and batch systems make limits; versions 1 and 2."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if controllers not in ("", "memory"):
            continue
        names = ("memory.max", "memory.current", "inactive_file")
        if controllers == "memory":
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        root = mount / controllers
        inside = root / path.lstrip("/")
        for folder in dict.fromkeys([inside, *(parent for parent in inside.parents if root in parent.parents), root]):
            left = _group_left(folder, *names)
            if left is not None:
                yield left, "this container's or control group's limit"


def _group_left(folder: Path, maximum: str, current: str, cache: str) -> int | None:
    """Bytes that a group may still take, what the kernel can drop from its file cache included."""
    try:
        limit, used = (folder / maximum).read_text().strip(), int((folder / current).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
        droppable = sum(int(line.split()[1]) for line in lines if line.split()[0] == cache)
        if limit == "max" or int(limit) >= NO_LIMIT:
            return None
        return int(limit) - used + droppable
    except (OSError, ValueError, IndexError):
        return None
