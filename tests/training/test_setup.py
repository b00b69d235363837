"""What is refused before a training begins, and the estimate of its memory."""

import dataclasses

import pytest
import torch
from finetune_runs import settings
from wan_models import save_pipeline

from slagen.attention import registry
from slagen.attention.protocol import Needs
from slagen.errors import UsageError, WeightsError
from slagen.generation.config import GenerateConfig
from slagen.generation.resolve import find_weights
from slagen.training import setup
from slagen.training.config import DataConfig, FinetuneConfig
from slagen.training.data.dataset import Dataset
from slagen.training.distributed import Team
from slagen.training.finetune import finetune
from slagen.training.models import build_models
from slagen.training.trainer import Trainer

pytest_plugins = ["finetune_fixtures"]
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plain_pictures")]


def test_what_cannot_train_is_refused(toy, tmp_path, monkeypatch):
    model, data = toy
    given = find_weights(GenerateConfig("-", model=str(model), attention="dense"))
    source = dataclasses.replace(given.source, weights=tmp_path / "wan.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(setup, "find_weights", lambda *_: dataclasses.replace(given, source=source))
        with pytest.raises(UsageError, match="wan.gguf is quantised and cannot be trained"):
            finetune(settings(model, tmp_path / "out", data=data))
    split = Team(0, 2, torch.device("cpu"), "fsdp")
    for optimizer in ("adamw8bit", "muon"):
        with pytest.raises(UsageError, match=f"{optimizer} does not support FSDP.* Leave --optimizer out"):
            setup.check_setup(settings(model, tmp_path, data=data, optimizer=optimizer), tmp_path, split, print)
    alone = Team(0, 1, split.device, "alone")
    with monkeypatch.context() as patch:  # before a model is loaded
        gated = dataclasses.replace(registry.get("sla"), needs=Needs(hidden_states=True))
        patch.setitem(registry.METHODS, "sla", gated)
        assert setup.check_setup(settings(model, tmp_path, data=data), tmp_path, alone, print).method is gated
        with pytest.raises(UsageError, match="hidden states of all tokens of a layer in one .* Leave --context-paral"):
            setup.check_setup(settings(model, tmp_path, data=data, context_parallel=2), tmp_path, alone, print)


def test_settings_without_effect_are_refused():
    data = DataConfig("videos")
    for fields, words in (
        ({"attention": "dense", "loss": "flow", "sparsity": 0.5}, "Leave --sparsity out"),
        ({"attention": "dense", "loss": "flow", "anneal_from": 0.5}, "Leave --anneal-from out"),
        ({"attention": "sparse", "train": "proj"}, "leaves nothing to train"),
        ({"loss": "flow", "layer_loss": 1.0}, "Leave one of them out"),
        ({"lora_rank": 4}, "is for --train lora"),
        ({"attention": "sparse", "proj_multiplier": 2.0}, "has no learned weights"),
        ({"dtype": "fp16"}, "fp16 is not precise enough"), ({"caption_dropout": 1.0}, "caption_dropout is 1.0"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            FinetuneConfig(data, **fields)


def test_data_of_another_vae_and_too_few_tokens(toy, tmp_path):
    model, data = toy
    other = save_pipeline(tmp_path / "other", seed=1)
    (other / "slagen.json").write_bytes((model / "slagen.json").read_bytes())
    with pytest.raises(WeightsError, match="encoded with a VAE or text encoder that is not"):
        finetune(settings(other, tmp_path / "out", data=data))
    with pytest.raises(UsageError, match=r"sla attention has nothing to skip in \d+ tokens.*or a smaller --block-n"):
        finetune(settings(model, tmp_path / "out", data=data, block_n=128))


def test_the_1_3b_is_planned_to_fit_on_80_gb():
    """480p, 81 frames, one clip at a time: 32,760 tokens; the parts it is made of are counted, not measured."""
    from diffusers import WanTransformer3DModel

    from slagen.training.models import memory_plan
    from slagen.training.trainer import Recipe
    from slagen.wan.defaults import TrainingDefaults
    from slagen.wan.transformer import RANDOM_INIT, wan_config

    with torch.device("meta"):
        student = WanTransformer3DModel(**wan_config(RANDOM_INIT["wan-1.3b"]))
        teacher = WanTransformer3DModel(**wan_config(RANDOM_INIT["wan-1.3b"])).bfloat16()
    recipe = Recipe(TrainingDefaults(), "distill", 0.0, 0.01, None, "adamw", 0, torch.bfloat16)

    def gib(recipe=recipe, parts=1, recomputes=True):
        text = memory_plan(student, teacher, recipe, 32760, parts, recomputes)
        return float(text.split("needs an estimated ")[1].split()[0])

    parameters = sum(p.numel() for p in student.parameters())
    assert (20 + 2) * parameters / 2**30 < gib() < 60  # 20 bytes a trained parameter, 2 a teacher's
    assert gib(recomputes=False) > 100 > gib(dataclasses.replace(recipe, optimizer="adamw8bit")) + 45
    assert gib() - 6 < gib(dataclasses.replace(recipe, optimizer="muon")) < gib() - 4
    assert gib(parts=8) < gib() - 15


def test_muon_trains_the_matrices_of_the_blocks(toy, tmp_path):
    """Their updates are the gradients with more equal singular values, as large as AdamW's; all else is AdamW's."""
    model, data = toy
    config = settings(model, tmp_path, data=data, optimizer="muon", lr=0.01, warmup_steps=0, weight_decay=0.0)
    alone = Team(0, 1, torch.device("cpu"), "alone")
    checked = setup.check_setup(config, tmp_path, alone, print)
    models = build_models(checked)
    trainer = Trainer(models.student, models.teacher, Dataset(data), checked.recipe, alone)
    before = {name: p.detach().clone() for name, p in trainer.named.items()}
    trainer.step(0)
    muon, adam = trainer.optimizers
    names = {id(p): name for name, p in trainer.named.items()}
    kinds = [{names[id(p)] for group in one.param_groups for p in group["params"]} for one in (muon, adam)]
    assert kinds[0] | kinds[1] == trainer.named.keys() and not kinds[0] & kinds[1]
    for name in kinds[0]:
        assert name.startswith("blocks.") and "proj_l" not in name
        change = trainer.named[name].detach() - before[name]
        singular, slope = torch.linalg.svdvals(change), torch.linalg.svdvals(trainer.named[name].grad)
        assert change.ndim == 2 and 0.6 < singular[0] / (0.01 * 0.2 * max(change.shape) ** 0.5) < 1.3, name
        assert (singular / singular[0]).square().sum() > 1.2 * (slope / slope[0]).square().sum(), name
    assert any("proj_l" in name for name in kinds[1])
    assert all(p.ndim != 2 or not name.startswith("blocks.") or "proj_l" in name for name, p in trainer.named.items()
               if name in kinds[1])  # fmt: skip
