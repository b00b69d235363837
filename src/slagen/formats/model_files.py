"""Read the JSON files of a model's folder, each checked against its form before a library uses it. No torch.

diffusers and transformers build what a config says, be it a billion layers, and import the libraries that an index
names. What is beyond every published Wan, many times over, is refused here, with the file and the name in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slagen.attention.schedule_file import LAYERS
from slagen.errors import WeightsError
from slagen.io import documents
from slagen.io.forms import Kind, one_of, whole
from slagen.io.text import counted

AGAIN = "Download the model again."
MAX_CONFIG = 2**20
MAX_TOKENIZER = 64 * 2**20

_SIZE, _COUNT, _FEW = whole(1, 2**20), whole(1, 1024), whole(1, 64)
_CLASS = Kind(
    "a pair of a library (diffusers or transformers) and one of its classes, or a pair of nulls",
    (str | None, str | None),
    lambda pair: pair == [None, None]
    or (pair[0] in ("diffusers", "transformers") and str(pair[1]).isidentifier()),
)  # fmt: skip
_TEXT = Kind("text of at most 200 characters", str, lambda value: len(value) <= 200)
_POSITIVE = Kind("a list of at most 4096 numbers above 0", [float], lambda x: len(x) <= 4096 and all(n > 0 for n in x))

SETTINGS_KEY = "slagen"  # in a transformer's config.json, where diffusers saved it with attention weights inside
SLA_SETTINGS = {
    "config": dict, "sampler_family": one_of("flow", "rcm"), "trained": str, "defaults?": dict | None, "method?": str,
    "layer_sparsities?": LAYERS,
}  # fmt: skip

FORMS: dict[str, Any] = {
    "model_index.json": {
        "_class_name": _TEXT, "boundary_ratio?": float | None, "expand_timesteps?": bool,
        **{f"{part}?": _CLASS for part in ("scheduler", "text_encoder", "tokenizer", "transformer", "transformer_2",
                                           "vae", "image_encoder", "image_processor")},
    },
    "transformer/config.json": {
        "patch_size?": (_FEW, _FEW, _FEW), "num_attention_heads?": _COUNT, "attention_head_dim?": _COUNT,
        "in_channels?": _COUNT, "out_channels?": _COUNT, "text_dim?": _SIZE, "freq_dim?": _SIZE, "ffn_dim?": _SIZE,
        "num_layers?": _COUNT, "cross_attn_norm?": bool, "qk_norm?": str | None, "eps?": float,
        "image_dim?": int | None, "added_kv_proj_dim?": int | None, "rope_max_seq_len?": _SIZE,
        "pos_embed_seq_len?": int | None, "slagen?": SLA_SETTINGS,
    },
    "vae/config.json": {
        "base_dim?": _COUNT, "decoder_base_dim?": int | None, "z_dim?": _COUNT,
        "dim_mult?": Kind("a list of 1 to 16 whole numbers from 1 to 64", [_FEW], lambda x: 1 <= len(x) <= 16),
        "num_res_blocks?": _FEW, "attn_scales?": [float], "temperal_downsample?": [bool], "dropout?": float,
        "latents_mean?": [float], "latents_std?": _POSITIVE, "is_residual?": bool, "in_channels?": _COUNT,
        "out_channels?": _COUNT, "patch_size?": int | None, "scale_factor_temporal?": _FEW,
        "scale_factor_spatial?": _FEW,
    },
    "text_encoder/config.json": {
        "vocab_size?": whole(1, 2**24), "d_model?": _SIZE, "d_kv?": _SIZE, "d_ff?": _SIZE, "num_layers?": _COUNT,
        "num_decoder_layers?": int | None, "num_heads?": _COUNT, "relative_attention_num_buckets?": _COUNT,
        "relative_attention_max_distance?": _SIZE, "dropout_rate?": float, "layer_norm_epsilon?": float,
        "initializer_factor?": float, "feed_forward_proj?": _TEXT, "model_type?": _TEXT,
        "architectures?": [_TEXT], "tie_word_embeddings?": bool,
    },
    "scheduler/scheduler_config.json": {
        "_class_name?": _TEXT, "num_train_timesteps?": whole(1, 100_000), "beta_start?": float, "beta_end?": float,
        "beta_schedule?": _TEXT, "solver_order?": whole(1, 8), "prediction_type?": _TEXT, "flow_shift?": float,
        "steps_offset?": whole(0, 100_000), "disable_corrector?": [int], "thresholding?": bool,
        "sigma_min?": float | None, "sigma_max?": float | None, "shift_terminal?": float | None,
    },
    "tokenizer/tokenizer_config.json": {"tokenizer_class?": _TEXT, "model_max_length?": float | None},
    "tokenizer/tokenizer.json": {"model": dict, "added_tokens?": [dict] },
}  # fmt: skip


def read_json(path: Path, folder: Path) -> dict[str, Any]:
    """A JSON object in a model's folder, of the form that a file of its name has. Raises WeightsError."""
    try:
        is_there = path.is_file()
    except OSError:
        is_there = False
    if not is_there:
        raise WeightsError(
            f"{folder} has no {path.relative_to(folder)}, so it is not a diffusers pipeline. Give a folder "
            "that WanPipeline.save_pretrained wrote."
        )
    name = path.name if path.name == "model_index.json" else f"{path.parent.name}/{path.name}"
    most = MAX_TOKENIZER if name == "tokenizer/tokenizer.json" else MAX_CONFIG
    content = documents.read_json(path, FORMS.get(name, dict), advice=AGAIN, most=most)
    if name == "vae/config.json" and "z_dim" in content:
        for list_name in ("latents_mean", "latents_std"):
            if (count := len(content.get(list_name, [0] * content["z_dim"]))) != content["z_dim"]:
                raise WeightsError(
                    f'{path} has {counted(count, "number")} in "{list_name}", but must have {content["z_dim"]}, the '
                    f'value of "z_dim". {AGAIN}'
                )
    return content


def check_parts(folder: Path, parts: tuple[str, ...]) -> None:
    """Raise WeightsError unless every small file of some parts of a pipeline is of its form."""
    for part in parts:
        for path in sorted((folder / part).glob("*.json")):
            if not path.name.endswith(".index.json"):
                read_json(path, folder)


SLA_FILE = "sla.safetensors"
