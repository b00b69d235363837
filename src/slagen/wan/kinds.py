"""What a weight file is, told by the names of its tensors, and what to do with one that slagen does not run."""

from __future__ import annotations

import re
from collections.abc import Iterable

from slagen.wan.names import LAYOUTS, without_prefixes

TEXT_ENCODER_HOME = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def identify(tensors: Iterable[str]) -> str:
    """What a file is, by its keys: "transformer", "sla", "side-file", "vae", "text-encoder", "vsa", "lora" or
    "image-to-video"; "unknown" for all else.
    """
    names = without_prefixes(list(tensors))
    found = set(names)
    if any("to_gate_compress" in name for name in names):
        return "vsa"
    if found == {"settings", "state", "version"}:
        return "side-file"
    if any(re.search(r"\.lora_(A|B|down|up)\b|\.lora\.(down|up)\.", name) for name in names):
        return "lora"
    if any(name.startswith(("img_emb.", "condition_embedder.image_embedder.")) for name in names):
        return "image-to-video"
    if "token_embedding.weight" in found or any(
        name.endswith(("SelfAttention.q.weight", "pos_embedding.embedding.weight")) for name in names
    ):
        return "text-encoder"
    if any(name.startswith(("decoder.", "encoder.")) for name in names):
        return "vae"
    if names and all(".processor.proj_l." in name for name in names):
        return "sla"
    known = sum(any(rename(name) for rename in LAYOUTS.values()) for name in names)
    return "transformer" if known > len(names) / 2 else "unknown"


REFUSALS = {
    "vsa": "holds FastVideo's VSA (to_gate_compress), another sparse attention, whose gates SLA has no place for. "
    "Give SLA weights, or the model it was trained from.",
    "lora": "is a LoRA, not a whole transformer. Merge it into its model first.",
    "image-to-video": "is an image-to-video transformer. slagen runs Wan2.1 text-to-video.",
    "text-encoder": f"is the original T5 text encoder, whose names diffusers does not read. The text encoder of "
    f"{TEXT_ENCODER_HOME} is the same: give that with --model.",
    "vae": "is a video autoencoder, not a transformer. Make a diffusers folder of it: slagen convert FILE FOLDER.",
    "unknown": "holds no Wan2.1 transformer. Give Wan2.1 text-to-video or SLA weights.",
}
