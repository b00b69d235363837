"""Load a Wan2.1 pipeline from a model's folder, every part checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from slagen.errors import WeightsError
from slagen.formats.model_files import check_parts, read_json
from slagen.io.paths import check_utf8
from slagen.wan.building import reading_from
from slagen.wan.folder import ModelSource
from slagen.wan.hub import closed_hub
from slagen.wan.text_encoder import load_text_encoder
from slagen.wan.transformer import RANDOM_INIT, load_transformer, wan_config
from slagen.wan.vae import load_vae


def load_pipeline(
    source: ModelSource,
    dtype: torch.dtype,
    vae: Path | None = None,
    *,
    text_encoder: bool = True,
    transformer: bool = True,
    quantised: bool = False,
    vae_dtype: torch.dtype = torch.float32,
    on_part: Callable[[str, int, int], None] = lambda part, done, total: None,
) -> WanPipeline:
    """Load a pipeline: transformer and text encoder in `dtype`, the VAE in `vae_dtype`, on the CPU.

    Nothing is ever cast after loading: norms, time embedding and rotary tables are float32 from the first.

    Args:
        vae: a file or folder of another VAE, in the original or in diffusers' names.
        text_encoder: False leaves text encoder and tokenizer out. transformer: False leaves it out.
        quantised: the transformer's weights of int8 and fp8 stay so, and are multiplied out as they are used.
        on_part: called with what is loaded next, how many parts are loaded, and of how many, before each.
    Raises: WeightsError if a file is broken, or a component's tensors are not its model's: one is missing or one too
        many, or has another shape, another dtype, or NaN or Inf.
    """
    check_utf8(source.folder)
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    read_json(source.folder / "scheduler" / "scheduler_config.json", source.folder)
    check_parts(source.folder, ("tokenizer",) if text_encoder else ())
    total = 1 + transformer + text_encoder
    parts: dict[str, Any] = {"transformer": None, "text_encoder": None}
    if transformer:
        on_part("the transformer", 0, total)
        parts["transformer"] = load_transformer(source, dtype, quantised=quantised)
    on_part("the VAE", int(transformer), total)
    parts["vae"] = load_vae(vae or source.folder / "vae", source.folder / "vae", vae_dtype)
    if text_encoder:
        on_part("the text encoder", total - 1, total)
        parts["text_encoder"] = load_text_encoder(source.folder / "text_encoder", dtype)
    if not text_encoder:
        parts["tokenizer"] = None
    kind: type[WanPipeline] = WanPipeline
    if source.takes_image:
        from slagen.wan.image_to_video import ImageToVideo  # with CLIP, which no other model needs

        kind, parts = ImageToVideo, {**parts, "image_encoder": None, "image_processor": None}
    with closed_hub(), reading_from(f"the tokenizer or scheduler of {source.folder}"):
        pipe = kind.from_pretrained(source.folder, local_files_only=True, **parts)
    if text_encoder:
        known, words = pipe.text_encoder.config.vocab_size, len(pipe.tokenizer)
        if words > known or pipe.tokenizer.pad_token is None:
            what = (
                f"has {words} tokens, but the text encoder has only {known}"
                if words > known
                else "has no padding token"
            )
            raise WeightsError(f"{source.folder / 'tokenizer'} {what}. Download the model again.")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_pipeline(name: str, device: torch.device, dtype: torch.dtype) -> WanPipeline:
    """A Wan of a true size with random weights and nothing else: what it computes is noise, what it costs is real."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            transformer = WanTransformer3DModel(**wan_config(RANDOM_INIT[name]))
    finally:
        torch.set_default_dtype(before)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    pipe = WanPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer.eval(), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe
