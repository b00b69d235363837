"""Fine-tuning a Wan model with SLA: data, trainer, checkpoints, validation, page."""
