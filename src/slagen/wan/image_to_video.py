"""Wan2.1 image-to-video: diffusers' pipeline, with the image encoded before the denoising, once for many videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import WanImageToVideoPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from slagen.errors import WeightsError
from slagen.formats.checkpoint import Checkpoint
from slagen.formats.checks import check_fit
from slagen.formats.model_files import read_json
from slagen.formats.tensor_files import read_component
from slagen.wan.building import cast_tensors, no_random_init, reading_from
from slagen.wan.hub import closed_hub

try:  # the one that rounds the same with and without torchvision
    from transformers import CLIPImageProcessorPil as CLIPImageProcessor
except ImportError:  # of transformers before 5
    from transformers import CLIPImageProcessor

PREFIX = "vision_model."  # that some versions of transformers write, and others do not
POSITIONS = "embeddings.position_ids"  # which older files hold, and which only counts


class ImageToVideo(WanImageToVideoPipeline):
    """diffusers' pipeline, in which `encode` prepares an image for any number of calls.

    Attributes:
        embeds: of the image encoder, (1, 257, D). condition: (1, 20, T, h, w), the mask and the latents of a clip that
            begins with the image.
    """

    embeds: Tensor
    condition: Tensor

    def encode(self, encoder: ImageEncoder, image: Any, num_frames: int) -> None:
        """Prepare an image of PIL, of the clip's size. The VAE runs where it is, the image encoder on the CPU."""
        device, (width, height) = self._execution_device, image.size
        self.embeds = encoder(image).to(device)
        pixels = self.video_processor.preprocess(image, height=height, width=width).to(device, torch.float32)
        z_dim = self.vae.config.z_dim
        none = torch.empty(0, device=device)  # in place of noise, which each call draws
        _, self.condition = super().prepare_latents(
            pixels, 1, z_dim, height, width, num_frames, torch.float32, device, latents=none
        )

    def encode_image(self, image: Any, device: torch.device | None = None) -> Tensor:
        """As prepared."""
        return self.embeds

    def prepare_latents(
        self, image: Any, batch_size: int, num_channels_latents: int = 16, height: int = 480, width: int = 832,
        num_frames: int = 81, dtype: torch.dtype | None = None, device: torch.device | None = None,
        generator: torch.Generator | None = None, latents: Tensor | None = None, last_image: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Noise (B, C, T, h, w), drawn where none is given, and the condition as prepared. Sizes go by that."""
        shape = batch_size, num_channels_latents, *self.condition.shape[2:]
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        return latents.to(device, dtype), self.condition


class ImageEncoder:
    """CLIP's vision model and its image processor, in float32 on the CPU: one image takes it 0.4 TFLOP.

    Args: folder: of a pipeline.
    Raises: WeightsError unless it is a CLIP vision model, whole, and of its config's size.
    """

    def __init__(self, folder: Path) -> None:
        own = folder / "image_encoder"
        fields = read_json(own / "config.json", folder)
        if fields.get("model_type") != "clip_vision_model":
            raise WeightsError(
                f"{own} contains a {fields.get('model_type')}, but Wan2.1's image encoder is a clip_vision_model."
            )
        read_json(folder / "image_processor" / "preprocessor_config.json", folder)
        with init_empty_weights(), no_random_init(), reading_from(own / "config.json"):
            model = CLIPVisionModel(CLIPVisionConfig.from_dict(fields))
        expected = {name.removeprefix(PREFIX): name for name in model.state_dict()}
        read = {name.removeprefix(PREFIX): x for name, x in read_component(own).items()}
        tensors = {expected.get(name, name): x for name, x in read.items() if name != POSITIONS}
        check_fit(Checkpoint(own, "clip", tensors, {}), {name: x.shape for name, x in model.state_dict().items()}, 0, 0)
        model.load_state_dict(cast_tensors(tensors, torch.float32, set(), own), strict=True, assign=True)
        self.model = model.eval()
        with closed_hub(), reading_from(folder / "image_processor"):
            self.processor = CLIPImageProcessor.from_pretrained(folder / "image_processor", local_files_only=True)

    @torch.inference_mode()
    def __call__(self, image: Any) -> Tensor:
        """The last hidden states but one, (1, 257, D), as diffusers takes them."""
        inputs = self.processor(images=image, return_tensors="pt")
        return self.model(**inputs, output_hidden_states=True).hidden_states[-2]
