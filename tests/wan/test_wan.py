"""SLA inside a Wan pipeline: in, out, saved, loaded, and refused where it does not fit."""

import dataclasses
import json
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import UMT5EncoderModel
from wan_models import build_pipeline, build_transformer, run, save_pipeline

import slagen
from slagen import errors
from slagen.attention import SparseLinearAttention, registry
from slagen.attention.sla.config import SLAConfig
from slagen.errors import SlagenError, UsageError, WeightsError
from slagen.formats.sla import SLAMetadata, read_sla, weights_hash, write_sla
from slagen.timing import StepRecorder
from slagen.wan.install import load_sla, save_sla
from slagen.wan.loading import load_pipeline
from slagen.wan.models import resolve_model
from slagen.wan.observe import attach_recorder
from slagen.wan.processor import install, installation, processors
from slagen.wan.text_encoder import EMBEDDINGS, load_text_encoder

CONFIG = SLAConfig(sparsity=0.6, block_m=16, block_n=16)
CPU = torch.device("cpu")


def train(transformer, base=True):
    """Move every proj_l, and with `base` a few base tensors, to where training might have taken them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "proj_l" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
            elif base and "attn1.to_q" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


@pytest.fixture
def trained(tmp_path):
    """A pipeline's folder, and an SLA file that was trained from it."""
    folder = save_pipeline(tmp_path / "pipe")
    pipe = build_pipeline()
    base = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    metadata = SLAMetadata(CONFIG, "toy", weights_hash(pipe.transformer), "all", 10)
    slagen.apply_sla(pipe, CONFIG)
    train(pipe.transformer)
    return folder, save_sla(pipe, tmp_path / "sla", metadata, base), pipe


def test_settings_by_name_and_a_warning_that_nothing_is_trained():
    pipe = build_pipeline()
    with pytest.warns(UserWarning, match="without trained weights.*slagen.load_sla") as told:
        slagen.apply_sla(pipe, CONFIG, sparsity=0.25)
    assert told[0].filename == __file__ and "must be trained for it too" in str(told[0].message)
    assert registry.get("sparse").needs.training  # `slagen methods` says the same
    config = dataclasses.replace(CONFIG, sparsity=0.25)
    assert {processor.config for processor in processors(pipe.transformer)} == {config}
    slagen.remove_sla(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slagen.apply_sla(pipe, sparsity=0.9, branches="sparse")  # it has no proj_l to train
    assert {processor.config for processor in processors(pipe.transformer)} == {SLAConfig(sparsity=0.9)}


@pytest.mark.parametrize(
    ("wrong", "kind", "words"),
    [
        ({"sparsity": 2}, UsageError, "sparsity is 2, .* Try sparsity=0.95."),
        ({"block_m": 48}, UsageError, "block_m is 48, .* Try block_m=64."),
        ({"negligible": 0.1}, UsageError, "Try linear_domain='marginal', or negligible=0."),
        ({"sparsty": 0.9}, TypeError, r"apply_sla\(\) has no argument 'sparsty'. Did you mean sparsity\?"),
        ({"topk": 0.1}, TypeError, r"apply_sla\(\) has no argument 'topk'. Give sparsity, which is 1 - topk."),
        (
            {"backend": "foo"},
            UsageError,
            "backend is 'foo', but must be one of auto, reference, torch, triton for sla attention.",
        ),
        ({"branches": "foo"}, UsageError, "branches is 'foo', but must be one of both, sparse, linear."),
        ({"config": 0.9}, UsageError, "config is 0.9, but must be an SLAConfig. Try slagen.SLAConfig"),
    ],
    ids=str,
)
def test_what_apply_sla_does_not_take(wrong, kind, words, monkeypatch):
    monkeypatch.setattr(errors._Reader, "at_command_line", False)
    pipe = build_pipeline()
    with pytest.raises(kind, match=words):
        slagen.apply_sla(pipe, **wrong)
    assert installation(pipe.transformer) is None


def test_weights_of_the_hub(trained, monkeypatch, tmp_path):
    _, file, pipe = trained
    asked = []

    def fetch(repo_id, *, local_files_only, on_note):
        asked.append((repo_id, local_files_only))
        return file

    monkeypatch.setattr("slagen.wan.install.fetch_sla", fetch)
    loaded = build_pipeline()
    load_sla(loaded, "owner/name", local_files_only=True)
    assert asked == [("owner/name", True)]
    state = pipe.transformer.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.transformer.state_dict().items())
    monkeypatch.chdir(tmp_path)
    load_sla(build_pipeline(), file.parent.relative_to(tmp_path))
    with pytest.raises(SlagenError, match="nope/sla.safetensors"):  # a file's name asks no hub
        load_sla(build_pipeline(), "nope/sla.safetensors")
    assert len(asked) == 1


def rewrite(file, change):
    """Write an SLA file anew with other tensors."""
    metadata, tensors = read_sla(file)
    change(tensors)
    write_sla(tensors, file, metadata)


def test_all_blocks_kept_and_zero_proj_make_the_dense_video():
    pipe = build_pipeline()
    dense = run(pipe)
    slagen.apply_sla(pipe, dataclasses.replace(CONFIG, sparsity=0.0))
    torch.testing.assert_close(run(pipe), dense, atol=1e-5, rtol=1e-4)


def test_only_self_attention_is_touched_and_remove_restores_it():
    pipe = build_pipeline()
    dense, names = run(pipe), set(pipe.transformer.state_dict())
    cross = [block.attn2.processor for block in pipe.transformer.blocks]
    own = [block.attn1.processor for block in pipe.transformer.blocks]
    slagen.apply_sla(pipe, CONFIG)
    assert [block.attn2.processor for block in pipe.transformer.blocks] == cross
    assert all(isinstance(p, SparseLinearAttention) for p in processors(pipe.transformer))
    assert len(set(pipe.transformer.state_dict()) - names) == 4  # weight and bias of two layers
    assert not torch.equal(run(pipe), dense)
    slagen.remove_sla(pipe)
    assert [block.attn1.processor for block in pipe.transformer.blocks] == own
    assert set(pipe.transformer.state_dict()) == names
    assert torch.equal(run(pipe), dense)
    slagen.remove_sla(pipe)


def test_applying_twice_is_refused():
    pipe = build_pipeline()
    slagen.apply_sla(pipe, CONFIG)
    with pytest.raises(UsageError, match="remove_sla"):
        slagen.apply_sla(pipe, CONFIG)


def test_true_head_size_saved_in_shards_and_reloaded(tmp_path):
    """Head size and key names of Wan2.1-1.3B; dense when all blocks are kept; equal after saving and loading SLA."""
    pipe = build_pipeline(head_dim=128)
    pipe.save_pretrained(tmp_path / "pipe", max_shard_size="300KB")
    assert (tmp_path / "pipe/transformer/diffusion_pytorch_model.safetensors.index.json").is_file()
    loaded = load_pipeline(resolve_model(str(tmp_path / "pipe"), "cpu"), torch.float32)
    dense = run(loaded)
    torch.testing.assert_close(dense, run(pipe), atol=1e-5, rtol=1e-4)
    base = {name: tensor.clone() for name, tensor in loaded.transformer.state_dict().items()}
    metadata = SLAMetadata(CONFIG, "toy", weights_hash(loaded.transformer), "all", 1)
    slagen.apply_sla(loaded, dataclasses.replace(CONFIG, sparsity=0.0))
    torch.testing.assert_close(run(loaded), dense, atol=1e-5, rtol=1e-4)
    slagen.remove_sla(loaded)
    slagen.apply_sla(loaded, CONFIG)
    train(loaded.transformer)
    expected = run(loaded)
    save_sla(loaded, tmp_path / "sla", metadata, base)
    again = load_pipeline(resolve_model(str(tmp_path / "pipe"), "cpu"), torch.float32)
    assert slagen.load_sla(again, tmp_path / "sla") == metadata
    torch.testing.assert_close(run(again), expected, atol=1e-5, rtol=1e-4)


def test_the_file_holds_what_was_trained_and_nothing_else(trained):
    _, file, pipe = trained
    metadata, tensors = read_sla(file)
    assert metadata.config == CONFIG
    assert sorted(tensors) == sorted(n for n in pipe.transformer.state_dict() if "proj_l" in n or "attn1.to_q" in n)


def test_loading_replaces_the_base_and_removing_puts_it_back(trained):
    folder, file, trained_pipe = trained
    pipe = load_pipeline(resolve_model(str(folder), "cpu"), torch.float32)
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    load_sla(pipe, file)
    torch.testing.assert_close(run(pipe), run(trained_pipe), atol=1e-5, rtol=1e-4)
    load_sla(pipe, file.parent)  # a second time, from the folder
    slagen.remove_sla(pipe)
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_saving_what_is_installed_needs_no_metadata(tmp_path):
    """A caller of apply_sla had to make an SLAMetadata of a hash that nothing told."""
    pipe = build_pipeline()
    slagen.apply_sla(pipe, CONFIG)
    train(pipe.transformer, base=False)
    file = save_sla(pipe, tmp_path)
    loaded = build_pipeline()
    found = load_sla(loaded, file)
    assert (found.config, found.trained, found.sampler_family) == (CONFIG, "proj_l", "flow")
    assert read_sla(save_sla(loaded, tmp_path / "again"))[0] == found  # as the file says that is loaded
    base = {name: tensor.clone() for name, tensor in build_pipeline().transformer.state_dict().items()}
    train(pipe.transformer)
    assert read_sla(save_sla(pipe, tmp_path / "all", base=base))[0].trained == "all"


def test_saving_what_was_trained_needs_its_base(tmp_path):
    """Without it the trained base tensors would be left out of the file without a word."""
    pipe = build_pipeline()
    metadata = SLAMetadata(CONFIG, "toy", weights_hash(pipe.transformer), "all", 1)
    slagen.apply_sla(pipe, CONFIG)
    train(pipe.transformer, base=False)
    assert len(read_sla(save_sla(pipe, tmp_path, metadata))[1]) == 4
    train(pipe.transformer)
    with pytest.raises(UsageError, match="as base"):
        save_sla(pipe, tmp_path, metadata)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("blocks.1.attn1.processor.proj_l.weight"), "proj_l.weight is missing"),
        (lambda t: t.update({"blocks.9.attn1.processor.proj_l.weight": torch.ones(16, 16)}), "not in the model"),
        (lambda t: t.update({"blocks.0.attn1.processor.proj_l.bias": torch.ones(8)}), r"has shape \(8,\)"),
        (lambda t: t["blocks.0.attn1.processor.proj_l.weight"].zero_(), "is all zero"),
        (lambda t: t["blocks.0.attn1.to_q.weight"].fill_(torch.nan), "NaN or Inf"),
    ],
    ids=["missing", "extra", "shape", "zero", "nan"],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(trained, change, words):
    folder, file, _ = trained
    pipe = load_pipeline(resolve_model(str(folder), "cpu"), torch.float32)
    before = run(pipe)
    rewrite(file, change)
    with pytest.raises(WeightsError, match=words):
        load_sla(pipe, file)
    assert torch.equal(run(pipe), before)


def test_all_zero_projections_load_when_allowed(trained):
    folder, file, _ = trained
    rewrite(file, lambda t: t["blocks.0.attn1.processor.proj_l.weight"].zero_())
    pipe = load_pipeline(resolve_model(str(folder), "cpu"), torch.float32)
    load_sla(pipe, file, allow_untrained=True)
    assert not pipe.transformer.blocks[0].attn1.processor.proj_l.weight.any()


def test_another_base_is_refused(trained):
    _, file, _ = trained
    with pytest.raises(WeightsError, match="trained from toy"):
        load_sla(build_pipeline(seed=1), file)


def test_another_block_size_is_refused(trained):
    _, file, _ = trained
    with pytest.raises(WeightsError, match="block_n is 64"):
        load_sla(build_pipeline(), file, config=dataclasses.replace(CONFIG, block_n=64))


def test_files_that_are_no_sla_weights_are_refused(trained, tmp_path):
    _, file, pipe = trained
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(file.read_bytes()[:-100])
    plain = tmp_path / "plain.safetensors"
    save_file({"x": torch.ones(1)}, plain)
    newer = tmp_path / "newer.safetensors"
    save_file({"x": torch.ones(1)}, newer, metadata={"slagen": json.dumps({"format_version": 99})})
    with safe_open(file, "pt") as read:
        fields = json.loads(read.metadata()["slagen"])
    strange = tmp_path / "strange.safetensors"
    save_file({"x": torch.ones(1)}, strange, metadata={"slagen": json.dumps({**fields, "colour": "red"})})
    pickle = tmp_path / "weights.pth"
    torch.save({"x": torch.ones(1)}, pickle)
    for path, words in (
        (strange, "unknown key 'colour'. A newer slagen may"),
        (broken, "corrupt or incomplete"), (plain, "no slagen metadata"), (newer, "version 99"),
        (pickle, "is a pickle"), (tmp_path / "none.safetensors", "does not exist"),
        (tmp_path, "holds no sla.safetensors"),
    ):  # fmt: skip
        with pytest.raises(WeightsError, match=words):
            load_sla(pipe, path)


def test_the_hash_does_not_depend_on_the_load_dtype(tmp_path):
    folder = save_pipeline(tmp_path / "pipe")
    source = resolve_model(str(folder), "cpu")
    full = load_pipeline(source, torch.float32)
    half = load_pipeline(source, torch.bfloat16)
    assert half.transformer.dtype == torch.bfloat16
    assert half.transformer.blocks[0].scale_shift_table.dtype == torch.float32
    assert half.vae.dtype == torch.float32
    assert weights_hash(full.transformer) == weights_hash(half.transformer)


def test_sla_runs_in_a_bfloat16_pipeline_with_float32_projections(trained):
    folder, file, _ = trained
    pipe = load_pipeline(resolve_model(str(folder), "cpu"), torch.bfloat16)
    load_sla(pipe, file)
    assert all(p.proj_l.weight.dtype == torch.float32 for p in processors(pipe.transformer))
    assert torch.isfinite(run(pipe)).all()


def test_gradients_reach_every_projection_under_checkpointing():
    model = build_transformer()
    slagen.apply_sla(model, CONFIG)
    train(model)
    model.enable_gradient_checkpointing()
    model.train()
    out = model(
        hidden_states=torch.randn(1, 4, 3, 8, 8), timestep=torch.tensor([500.0]),
        encoder_hidden_states=torch.randn(1, 8, 32), return_dict=False,
    )[0]  # fmt: skip
    out.square().mean().backward()
    assert all(p.proj_l.weight.grad is not None and p.proj_l.weight.grad.any() for p in processors(model))


def test_context_parallelism_is_refused():
    model = build_transformer()
    slagen.apply_sla(model, CONFIG)
    model.blocks[0].attn1.processor._parallel_config = object()
    with pytest.raises(ValueError, match="context parallelism"):
        model(hidden_states=torch.randn(1, 4, 1, 8, 8), timestep=torch.tensor([1.0]),
              encoder_hidden_states=torch.randn(1, 8, 32))  # fmt: skip


def test_the_recorder_sees_every_layer_of_both_passes():
    pipe = build_pipeline()
    install(pipe.transformer, None)
    dense = run(pipe)
    recorder = StepRecorder("cpu", "layer")
    detach = attach_recorder(pipe.transformer, recorder)
    recorder.begin_step()
    assert torch.equal(run(pipe, steps=1), run(pipe, steps=1))
    step = recorder.end_step(1.0)
    assert len(step.attention_ms) == 4 and len(step.layers_ms) == 2 and step.num_spans == 8
    assert 0 < step.attention_share < 1
    detach()
    assert torch.equal(run(pipe), dense)


@pytest.mark.parametrize("names", ["shared.weight", "encoder.embed_tokens.weight", "both", "whole UMT5"])
def test_the_token_embedding_is_read_by_either_name(tmp_path, names):
    """Some transformers 5 releases load only one of the two; the other stays random, and every prompt becomes noise."""
    folder = build_pipeline().text_encoder
    good = folder.shared.weight.detach().clone()
    folder.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state |= {name: good.clone() for name in EMBEDDINGS}
    for name in EMBEDDINGS:
        if names in EMBEDDINGS and name != names:
            del state[name]
    if names == "whole UMT5":
        state["lm_head.weight"], state["decoder.final_layer_norm.weight"] = torch.zeros(6, 32), torch.zeros(32)
    save_file(state, tmp_path / "model.safetensors")
    encoder = load_text_encoder(tmp_path, torch.float32)
    assert torch.equal(encoder.shared.weight, good)
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight


def test_a_text_encoder_in_half_precision_is_that_of_transformers(tmp_path):
    """What overflows in float16 stays in float32, as in transformers' own loading."""
    build_pipeline().text_encoder.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        own = load_text_encoder(tmp_path, dtype).state_dict()
        other = UMT5EncoderModel.from_pretrained(tmp_path, dtype=dtype).state_dict()
        assert own.keys() == other.keys()
        assert all(own[name].dtype == x.dtype and torch.equal(own[name], x) for name, x in other.items())


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_missing_tensor_is_refused(tmp_path, part):
    """diffusers would fill it with random numbers and only warn."""
    folder = save_pipeline(tmp_path / "pipe")
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"1 faulty tensor\).* is missing"):
        load_pipeline(resolve_model(str(folder), "cpu"), torch.float32)


def test_a_truncated_shard_is_refused(tmp_path):
    folder = save_pipeline(tmp_path / "pipe")
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(WeightsError, match="incomplete"):
        load_pipeline(resolve_model(str(folder), "cpu"), torch.float32)


def test_models_that_are_none_are_refused(tmp_path):
    with pytest.raises(UsageError, match="Try --model wan2.1-t2v-1.3b"):
        resolve_model("wan2.1-1.3", "cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match="no model_index.json"):
        resolve_model(str(tmp_path / "empty"), "cpu")
    (tmp_path / "empty" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(WeightsError, match="FluxPipeline, but slagen runs a WanPipeline"):
        resolve_model(str(tmp_path / "empty"), "cpu")
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="is a file"):
        resolve_model(str(tmp_path / "file"), "cpu")


def test_a_models_own_defaults(tmp_path):
    folder = save_pipeline(tmp_path / "pipe")
    assert resolve_model(str(folder), "cpu").defaults.steps == 50
    (folder / "slagen.json").write_text('{"steps": 7, "vocabulary": ["a", "red"]}')
    defaults = resolve_model(str(folder), "cpu").defaults
    assert defaults.steps == 7 and defaults.unknown_words("A red, blue BLUE fox") == ["blue", "fox"]
    (folder / "slagen.json").write_text('{"step": 7}')
    with pytest.raises(WeightsError, match="step is unknown"):
        resolve_model(str(folder), "cpu")
