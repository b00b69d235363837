"""Refuse a training before torch is imported: data, a model or weights that do not exist."""

from __future__ import annotations

from slagen.generation.preflight import check_model
from slagen.generation.prompts import read_prompts
from slagen.io.paths import user_path
from slagen.training.config import DataConfig, FinetuneConfig
from slagen.training.data.video_lists import check_data_path


def check_training(config: FinetuneConfig) -> None:
    """Look at what one call of `slagen finetune` reads. Raises as `check_model` and `check_data`."""
    check_data(config.data)
    check_model(config.model, config.weights)


def check_data(data: DataConfig) -> None:
    """Raise UsageError for data that are not there, and for a prompt file with faults."""
    if data.path is not None:
        check_data_path(user_path(data.path))
        return
    source = data.self_generate or ""
    path = user_path(source)
    if source != "-" and (path.is_file() or not path.exists()):  # a pipe is read once, when it is used
        read_prompts(source)
