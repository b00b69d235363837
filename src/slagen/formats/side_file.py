"""SimpleTuner's side file (sla_attention.pt): one `proj_l` for all layers, with the settings it was trained with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from slagen.attention.sla.config import SLAConfig
from slagen.errors import UsageError, WeightsError
from slagen.formats.checks import number_faults
from slagen.io.forms import Fault, check


@dataclass(frozen=True)
class SideFile:
    """SimpleTuner's `sla_attention.pt`: one `proj_l` that all layers share, and the settings it was trained with."""

    path: Path
    weight: Tensor
    bias: Tensor
    config: SLAConfig


SIDE_FORM = {
    "version": int, "state": {str: dict},
    "settings": {"topk": float, "feature_map": str, "blkq": int, "blkk": int, "tie_feature_map_qk?": bool},
}  # fmt: skip


def read_side_file(path: Path, content: dict[str, Any]) -> SideFile:
    """SimpleTuner's: {"version": 1, "settings": {topk, feature_map, blkq, blkk, ...}, "state": {"128:bf16": {...}}}."""
    try:
        check(content, SIDE_FORM)
        settings, states = content["settings"], list(content["state"].values())
        if content["version"] != 1:
            raise WeightsError(f"{path} has format version {content['version']}, but slagen reads only version 1.")
        if not settings.get("tie_feature_map_qk", True):
            raise WeightsError(f"{path} has separate feature maps for q and k, which slagen does not support.")
        if len(states) != 1 or set(states[0]) != {"proj_l.weight", "proj_l.bias"}:
            raise WeightsError(f"{path} does not hold exactly one proj_l. Download it again.")
        config = SLAConfig(
            sparsity=round(1 - settings["topk"], 12), feature_map=settings["feature_map"], block_m=settings["blkq"],
            block_n=settings["blkk"],
        )  # fmt: skip
        weight, bias = states[0]["proj_l.weight"], states[0]["proj_l.bias"]
        if weight.ndim != 2 or weight.shape[0] != weight.shape[1] or bias.shape != weight.shape[:1]:
            raise WeightsError(
                f"{path} has a proj_l with a weight of shape {tuple(weight.shape)} and a bias of shape "
                f"{tuple(bias.shape)}, but the weight must be square and the bias of that length. Download it again."
            )
        faults = number_faults({"proj_l.weight": weight, "proj_l.bias": bias})
    except (AttributeError, Fault, UsageError) as error:
        fault = str(error).removesuffix(".")
        raise WeightsError(
            f"{path} is not a valid sla_attention.pt of SimpleTuner ({fault}). Download it again."
        ) from error
    if faults:
        raise WeightsError(f"{path} is corrupt ({'; '.join(faults)}). Download it again.")
    return SideFile(path, weight.float(), bias.float(), config)
