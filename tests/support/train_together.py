"""One training step of a tiny Wan in each of some processes; gradients and weights are saved by the first."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from slagen.attention.sla.config import SLAConfig
from slagen.training.checkpoints import RunState, load_state, read_latest, save_state
from slagen.training.data.dataset import Dataset
from slagen.training.distributed import full_tensor, join
from slagen.training.metrics import TeacherErrors, velocity_error
from slagen.training.trainer import Recipe, Trainer
from slagen.wan.defaults import TrainingDefaults
from slagen.wan.folder import describe_folder
from slagen.wan.install import apply_sla
from slagen.wan.processor import install
from slagen.wan.sequence_parallel import split_tokens
from slagen.wan.transformer import load_transformer

SLA = SLAConfig(sparsity=0.6, block_m=16, block_n=16)
SCHEDULE = TrainingDefaults(
    steps=20, lr=1e-3, batch_size=4, micro_batch=1, proj_multiplier=2.0, warmup_steps=0, caption_dropout=0.25
)


def train(model: str, data: str, out: str, parallel: str, context: str) -> None:
    torch.set_num_threads(1)
    source = describe_folder(Path(model), "toy")
    recipe = Recipe(SCHEDULE, "distill", 0.1, 0.01, 1.0, "adamw", 0, torch.float32)
    with join(torch.device("cpu"), parallel, int(context)) as team:  # type: ignore[arg-type]

        def build() -> Trainer:
            student, teacher = (load_transformer(source, torch.float32) for _ in range(2))
            apply_sla(student, SLA)
            install(teacher, None)
            student.enable_gradient_checkpointing()
            if team.context_group is not None:
                split_tokens(student, team.context_group)
                split_tokens(teacher, team.context_group)
            teacher = team.share_frozen(teacher.requires_grad_(False))
            return Trainer(student.train(), teacher, Dataset(Path(data)), recipe, team)

        trainer = build()
        result = trainer.step(0)
        kept = {f"grad/{name}": full_tensor(p.grad) for name, p in trainer.named.items()}
        save_state(trainer, Path(out), RunState(1, 0.0, TeacherErrors(0.0, []), {}))
        team.wait()
        with trainer.averaged():  # a validation in between leaves no trace
            velocity_error(trainer.student, trainer.teacher, [trainer.data.example(trainer.data.held_out[0])], [0.5])
        again = build()  # goes on as if it had never stopped
        load_state(again, read_latest(Path(out)))
        for one in (trainer, again):
            one.step(1)
        for name, parameter in trainer.named.items():
            kept[f"weight/{name}"] = full_tensor(parameter.detach())
            kept[f"resumed/{name}"] = full_tensor(again.named[name].detach())
        if team.first:
            save_file(
                {name: tensor.contiguous().clone() for name, tensor in kept.items()}, Path(out) / "kept.safetensors"
            )
            print(team.kind, team.size, result.loss, result.grad_norm)
