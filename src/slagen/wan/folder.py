"""A diffusers pipeline's folder: where it lies, what its config files say, and whether it is a Wan2.1 model."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slagen.attention.cost import ModelShape
from slagen.attention.protocol import Grid
from slagen.errors import EnvironmentProblem, SlagenError, UsageError, WeightsError
from slagen.formats.model_files import SETTINGS_KEY, check_parts, read_json
from slagen.io.reading import kind_of_path
from slagen.wan.defaults import ModelDefaults

BUNDLED = "tiny-wan"
IMAGE_TOKENS = 257  # that CLIP makes of an image
TEXT_TOKENS = 512  # of Wan2.1


@dataclass(frozen=True)
class ModelSource:
    """Where a model lies, what to call it, and the settings it was made for.

    Args:
        folder: in diffusers layout; its transformer may hold a config alone where `weights` replaces it.
        weights: a transformer file to use instead of the folder's.
        patch_size: latent frames, rows and columns of a token. spatial_factor: pixels a latent row or column.
        spatial_grid: height and width must be multiples of this many pixels.
        temporal_factor: video frames a latent frame.
        takes_image: whether it is an image-to-video model.
    """

    folder: Path
    name: str
    defaults: ModelDefaults
    shape: ModelShape
    spatial_grid: int = 16
    temporal_factor: int = 4
    weights: Path | None = None
    patch_size: tuple[int, ...] = (1, 2, 2)
    spatial_factor: int = 8
    takes_image: bool = False

    @property
    def head_dim(self) -> int:
        return self.shape.head_dim

    def token_grid(self, width: int, height: int, num_frames: int) -> Grid:
        """The tokens of self-attention; sizes in pixels and video frames."""
        return token_grid(width, height, num_frames, self.patch_size, self.spatial_factor, self.temporal_factor)


def token_grid(
    width: int, height: int, num_frames: int, patch_size: tuple[int, ...] = (1, 2, 2), spatial_factor: int = 8,
    temporal_factor: int = 4,
) -> Grid:  # fmt: skip
    """The token grid of self-attention, by default of Wan2.1; arguments as in ModelSource, sizes in pixels and video
    frames."""
    latent = (num_frames - 1) // temporal_factor + 1, height // spatial_factor, width // spatial_factor
    return Grid(*(size // part for size, part in zip(latent, patch_size, strict=True)))


def bundled_folder() -> Path:
    """The model that travels with slagen: inside the package when installed, in weights/ in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "weights" / BUNDLED, package.parents[1] / "weights" / BUNDLED):
        if (folder / "model_index.json").is_file():
            return folder
    raise EnvironmentProblem(f"the bundled model {BUNDLED} is missing from this installation. Install slagen again.")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form owner/name."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is not None


def describe_folder(folder: Path, name: str) -> ModelSource:
    """Read a pipeline folder's config files. Raises WeightsError if it is not a Wan2.1 pipeline that slagen runs."""
    if not folder.is_dir():
        raise WeightsError(
            f"{folder} {kind_of_path(folder)}, but a model is a folder with a model_index.json in it. Give a diffusers "
            "Wan2.1 folder with --model; give a single transformer file with --weights."
        )
    if not (folder / "model_index.json").is_file() and list(folder.glob("models_t5*.pth")):
        raise WeightsError(
            f"{folder} contains Wan2.1 in its original layout, and diffusers cannot read its T5 text encoder. Use "
            "--model wan2.1-t2v-1.3b (or -14b), and give the transformer file from this folder with --weights."
        )
    index = read_json(folder / "model_index.json", folder)
    kind = index["_class_name"]
    if kind not in ("WanPipeline", "WanImageToVideoPipeline"):
        raise WeightsError(
            f"{folder} contains a {kind}, but slagen runs a WanPipeline or WanImageToVideoPipeline. Give a diffusers "
            "Wan2.1 folder."
        )
    if index.get("expand_timesteps"):
        raise WeightsError(f"{folder} is Wan2.2 TI2V-5B, which uses a different VAE, but slagen runs Wan2.1.")
    if index.get("boundary_ratio") is not None or (index.get("transformer_2") or [None])[0] is not None:
        raise WeightsError(
            f"{folder} is a Wan2.2 pipeline with two transformers, but slagen runs Wan2.1, which has one."
        )
    transformer = read_json(folder / "transformer" / "config.json", folder)
    vae = read_json(folder / "vae" / "config.json", folder)
    check_parts(folder, ("text_encoder", "scheduler"))
    takes_image = kind == "WanImageToVideoPipeline"
    _check_inputs(folder, transformer, takes_image)
    if takes_image:
        check_parts(folder, ("image_encoder", "image_processor"))
    defaults, place = ModelDefaults(), folder / "slagen.json"
    own: dict[str, object] = (transformer.get(SETTINGS_KEY) or {}).get("defaults") or {}
    if place.is_file() or own:
        try:
            defaults = ModelDefaults.from_dict(read_json(place, folder) if place.is_file() else own)
        except WeightsError:
            raise
        except SlagenError as error:
            raise WeightsError(f"{place if place.is_file() else folder / 'transformer'}: {error}") from error
    if takes_image and defaults.max_sequence_length != TEXT_TOKENS:  # behind which diffusers looks for the image's
        raise WeightsError(
            f"{folder} has a max_sequence_length of {defaults.max_sequence_length}, but an image-to-video model needs "
            f"{TEXT_TOKENS}. Change it in {place.name}."
        )
    patch = tuple(transformer.get("patch_size", (1, 2, 2)))
    factor = vae.get("scale_factor_spatial", 8)
    shape = ModelShape(
        transformer.get("num_layers", 30), transformer.get("num_attention_heads", 12),
        transformer.get("attention_head_dim", 128), transformer.get("ffn_dim", 8960),
        defaults.max_sequence_length + (IMAGE_TOKENS if takes_image else 0),
    )  # fmt: skip
    return ModelSource(
        folder, name, defaults, shape, factor * max(patch[1:]), vae.get("scale_factor_temporal", 4),
        patch_size=patch, spatial_factor=factor, takes_image=takes_image,
    )  # fmt: skip


def _check_inputs(folder: Path, transformer: dict[str, Any], takes_image: bool) -> None:
    """Raise WeightsError for a transformer of another input than its pipeline gives it."""
    taken, given = transformer.get("in_channels", 16), transformer.get("out_channels", 16)
    if transformer.get("pos_embed_seq_len") is not None:
        raise WeightsError(
            f"{folder} is Wan2.1 FLF2V, which generates the frames between a first and a last image. slagen runs "
            "Wan2.1 text-to-video and image-to-video."
        )
    wanted = 2 * given + 4 if takes_image else given  # noise; with an image its latents, and a mask
    if taken != wanted or (transformer.get("image_dim") is not None) != takes_image:
        what = "image-to-video" if takes_image else "text-to-video"
        with_encoder = "with" if takes_image else "without"
        raise WeightsError(
            f"{folder / 'transformer'} takes {taken} channels, but the transformer of Wan2.1 {what} takes {wanted}, "
            f"and is one {with_encoder} an image encoder. Give a diffusers Wan2.1 folder."
        )


def check_image_weights(source: ModelSource, path: Path, kind: str) -> None:
    """Raise WeightsError for a transformer file of the other kind of video than its model.

    Args: kind: of the file, one of TRANSFORMERS.
    """
    takes_image = kind == "image-to-video"
    if takes_image != source.takes_image:
        own = "an image-to-video transformer" if takes_image else "a text-to-video transformer"
        raise WeightsError(
            f"{path} is {own}, but {source.name} is no such model. Give one, as with --model "
            f"{'wan2.1-i2v-14b-480p' if takes_image else 'wan2.1-t2v-14b'}."
        )


def check_image(name: str, takes_image: bool, given: bool) -> None:
    """Raise UsageError unless an image is given to a model that takes one, and only to such a model."""
    if given and not takes_image:
        raise UsageError(
            f"{name} is a text-to-video model, which takes no image. Leave --image out, or give an "
            "image-to-video model, such as --model wan2.1-i2v-14b-480p."
        )
    if takes_image and not given:
        raise UsageError(
            f"{name} is an image-to-video model. It runs in slagen generate, batch and plan, with --image FILE."
        )
