"""Small Wan2.1 pipelines with the true key names, built in code: no download, well under a second."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)


def build_transformer(num_heads: int = 2, head_dim: int = 16, num_layers: int = 2, seed: int = 0):
    """A random Wan transformer for 4-channel latents; (1, 2, 2) patches as in Wan2.1."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=num_heads, attention_head_dim=head_dim, in_channels=4,
        out_channels=4, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=num_layers, rope_max_seq_len=64,
    )  # fmt: skip
    return model.eval()


def build_pipeline(**transformer) -> WanPipeline:
    """A whole random pipeline: VAE 4x in time and 8x in space, a two-layer text encoder, UniPC."""
    model = build_transformer(**transformer)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "circle": 5}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(words), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
            relative_attention_num_buckets=8,
        )
    )  # fmt: skip
    return WanPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"),
        text_encoder=encoder.eval(),
        vae=vae.eval(),
        transformer=model,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )


def build_image_pipeline() -> WanImageToVideoPipeline:
    """The same for image-to-video, with CLIP of two layers."""
    text, latents = build_pipeline(), 4
    torch.manual_seed(1)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=2 * latents + 4,
        out_channels=latents, text_dim=32, freq_dim=32, ffn_dim=64, num_layers=2, rope_max_seq_len=64, image_dim=24,
        added_kv_proj_dim=32,
    )  # fmt: skip
    clip = CLIPVisionConfig(
        hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    return WanImageToVideoPipeline(
        tokenizer=text.tokenizer, text_encoder=text.text_encoder, vae=text.vae, scheduler=text.scheduler,
        transformer=transformer.eval(), image_encoder=CLIPVisionModel(clip).eval(),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28),
    )  # fmt: skip


def save_pipeline(folder: Path, **transformer) -> Path:
    """Save a random pipeline in diffusers layout."""
    build_pipeline(**transformer).save_pretrained(folder)
    return folder


def run(
    pipe: WanPipeline, seed: int = 0, steps: int = 2, size: int = 64, num_frames: int = 9, **others
) -> torch.Tensor:
    """Final latents of a short guided run. 64 x 64 pixels and 9 frames are 3 x 4 x 4 = 48 tokens."""
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt="a red circle", height=size, width=size, num_frames=num_frames, num_inference_steps=steps,
        guidance_scale=3.0, max_sequence_length=8, output_type="latent",
        generator=torch.Generator().manual_seed(seed), **others,
    ).frames  # fmt: skip
