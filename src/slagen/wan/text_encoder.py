"""The UMT5 text encoder of a Wan model: loaded from its folder, whole and in the right dtype."""

from pathlib import Path

import torch
from transformers import UMT5Config, UMT5EncoderModel

from slagen.errors import WeightsError
from slagen.formats.checkpoint import Checkpoint
from slagen.formats.checks import check_fit
from slagen.formats.model_files import read_json
from slagen.formats.tensor_files import read_component
from slagen.wan.building import cast_tensors, no_random_init, reading_from

EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")  # one tensor of the text encoder, by either name or both
UNUSED = ("decoder.", "lm_head.")  # of the whole UMT5, whose encoder alone runs


def load_text_encoder(folder: Path, dtype: torch.dtype) -> UMT5EncoderModel:
    """The text encoder of a pipeline, from its folder, on the CPU and in eval mode.

    Raises: WeightsError unless it is a UMT5 encoder, whole, and of its config's size.
    """
    fields = read_json(folder / "config.json", folder)
    if fields.get("model_type") != "umt5":
        raise WeightsError(f"{folder} contains a {fields.get('model_type')}, but Wan2.1's text encoder is a umt5.")
    tensors = {name: x for name, x in read_component(folder).items() if not name.startswith(UNUSED)}
    with torch.device("meta"), no_random_init(), reading_from(folder / "config.json"):
        model = UMT5EncoderModel(UMT5Config.from_dict(fields))
    found = [tensors[name] for name in EMBEDDINGS if name in tensors]
    if len(found) == 2 and (found[0].shape != found[1].shape or not torch.equal(*found)):
        raise WeightsError(f"{folder} contains two different copies of its token embedding. Download the model again.")
    tensors |= {name: found[0] for name in EMBEDDINGS if found}
    check_fit(Checkpoint(folder, "umt5", tensors, {}), {name: x.shape for name, x in model.state_dict().items()}, 0, 0)
    kept = set(model._keep_in_fp32_modules) if dtype == torch.float16 else set()  # they overflow in float16
    model.load_state_dict(cast_tensors(tensors, dtype, kept, folder), strict=True, assign=True)
    model.encoder.embed_tokens.weight = model.shared.weight
    model.config.dtype = dtype
    return model.eval()
