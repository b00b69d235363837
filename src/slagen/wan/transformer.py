"""The transformer of a Wan model: built from its config, filled with the weights of a checkpoint."""

from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import GGUFQuantizationConfig, WanTransformer3DModel

from slagen.attention.cost import ModelShape
from slagen.errors import WeightsError
from slagen.formats.checkpoint import Checkpoint
from slagen.formats.checks import check_fit
from slagen.formats.folders import component_files
from slagen.formats.gguf_files import check_values
from slagen.formats.model_files import read_json
from slagen.formats.quantised_linear import keep_quantised
from slagen.formats.transformer import read_checkpoint
from slagen.io.files import scratch
from slagen.wan.building import cast_tensors, no_random_init, reading_from
from slagen.wan.folder import ModelSource
from slagen.wan.hub import closed_hub
from slagen.wan.presets import WAN_1_3B, WAN_14B


def load_transformer(source: ModelSource, dtype: torch.dtype, *, quantised: bool = False) -> WanTransformer3DModel:
    """The transformer of a model, from its folder or from the file that replaces it; on the CPU, in eval mode.

    Args:
        quantised: weights of int8 and fp8 stay so, and are multiplied out as they are used.
    Raises: WeightsError unless every tensor is there, once, in the right shape.
    """
    config = source.folder / "transformer"
    if source.weights is None:
        component_files(config)
    checkpoint = read_checkpoint(source.weights or config, dtype, keep_quantised=quantised)
    if not isinstance(checkpoint, Checkpoint):
        raise WeightsError(
            f"{source.weights} contains only attention weights, not a transformer. Give it with --weights."
        )
    return build_transformer(checkpoint, read_json(config / "config.json", source.folder), dtype)


def build_transformer(checkpoint: Checkpoint, config: dict[str, Any], dtype: torch.dtype) -> WanTransformer3DModel:
    """A transformer with a checkpoint's weights in `dtype`, but for what diffusers keeps in float32, and what is
    kept quantised.

    Args:
        config: as in a transformer's config.json.
    Raises: WeightsError with the list of what does not fit.
    """
    made_of = reading_from(f"the config.json of the transformer for {checkpoint.path}")
    with init_empty_weights(), no_random_init(), made_of:
        model = WanTransformer3DModel.from_config(config)
    state = model.state_dict()
    heads = model.config
    shapes = {name: tensor.shape for name, tensor in state.items()}
    check_fit(checkpoint, shapes, heads.num_layers, heads.attention_head_dim, dtype)
    if checkpoint.path.suffix == ".gguf":  # stays quantised, multiplied out by diffusers as it is used
        check_values(checkpoint.path)
        with scratch() as folder, closed_hub(), reading_from(str(checkpoint.path)):
            model.save_config(folder)
            return WanTransformer3DModel.from_single_file(
                str(checkpoint.path),
                config=str(folder),
                quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
            ).eval()
    kept = set(WanTransformer3DModel._keep_in_fp32_modules)
    model.load_state_dict(cast_tensors(checkpoint.tensors, dtype, kept, checkpoint.path), strict=True, assign=True)
    keep_quantised(model, checkpoint.kept, dtype)
    return model.requires_grad_(not checkpoint.kept).eval()


RANDOM_INIT = {"wan-1.3b": WAN_1_3B, "wan-14b": WAN_14B}


def wan_config(shape: ModelShape) -> dict[str, Any]:
    """The transformer config of the public Wan2.1 text-to-video models, which differ in these sizes alone."""
    return {
        "num_layers": shape.num_layers, "num_attention_heads": shape.num_heads, "attention_head_dim": shape.head_dim,
        "ffn_dim": shape.ffn_dim, "in_channels": 16, "out_channels": 16, "text_dim": 4096, "freq_dim": 256,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "patch_size": (1, 2, 2), "eps": 1e-6,
        "rope_max_seq_len": 1024,
    }  # fmt: skip
