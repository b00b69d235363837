"""Low-rank adapters (LoRA) on self-attention, by peft."""

from typing import Any

import torch

from slagen.errors import EnvironmentProblem

LORA_TARGETS = r"blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)"


def add_lora(transformer: Any, rank: int, seed: int) -> None:
    """Add fresh low-rank adapters, which are zero at the start, to the linear layers of self-attention.

    Raises: EnvironmentProblem where peft is not installed.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer.add_adapter(lora_config(rank))


def lora_config(rank: int = 1) -> Any:
    """The configuration of `add_lora` for peft. Raises EnvironmentProblem where that is not installed."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise EnvironmentProblem("--train lora needs peft. Install it: pip install 'slagen[finetune]'") from error
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS)


LORA_RANK = 32
