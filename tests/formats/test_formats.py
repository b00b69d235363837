"""Every public form of Wan2.1's and SLA's weights, on small models with the true names: loaded whole, or refused."""

import copy
import dataclasses
import json
import os
import pickle
import random
import re

import lora_forms
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from public_forms import SIZES, fastvideo, projections, quantised, spell, turbo, wan
from safetensors.torch import save_file
from wan_models import build_pipeline, build_transformer, save_pipeline

from slagen.attention.sla.config import SLAConfig
from slagen.errors import UsageError, WeightsError
from slagen.formats.headers import check_weights
from slagen.formats.kinds import identify
from slagen.formats.lora import check_lora, read_lora
from slagen.formats.merge import merge
from slagen.formats.peek import peek
from slagen.formats.published import TURBO_SLA
from slagen.formats.sla import read_metadata
from slagen.formats.transformer import read_checkpoint
from slagen.generation.config import GenerateConfig
from slagen.generation.generate import generate
from slagen.generation.resolve import make_plan
from slagen.wan.convert import convert
from slagen.wan.folder import describe_folder
from slagen.wan.info import info
from slagen.wan.install import install_projections
from slagen.wan.lora import Loras
from slagen.wan.transformer import build_transformer as load
from slagen.wan.transformer import load_transformer
from slagen.wan.vae import load_vae


@pytest.fixture(scope="module")
def model():
    """A transformer whose weights are bfloat16 numbers, and its proj_l."""
    transformer = build_transformer(**SIZES)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.copy_(parameter.bfloat16())
    return transformer


@pytest.fixture(scope="module")
def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The pipeline that the transformers belong to; its own transformer has other weights."""
    folder = tmp_path_factory.mktemp("base") / "wan"
    build_pipeline(**SIZES, seed=9).save_pretrained(folder)
    return folder


def config_of(model):
    return json.loads(model.to_json_string())


def write(path, tensors):
    """A checkpoint in the format that its suffix names."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


def prefixed(prefix):
    return lambda state: {prefix + name: tensor for name, tensor in wan(state).items()}


def wrapped(state):
    return {re.sub(r"^(blocks\.\d\.)", r"\1_checkpoint_wrapped_module.", name): x for name, x in wan(state).items()}


FORMS = {
    "diffusers": dict,
    "original": wan,
    "comfy": prefixed("model.diffusion_model."),
    "net": prefixed("net."),
    "ema": prefixed("net_ema."),
    "ddp-compiled": prefixed("module._orig_mod."),
    "checkpoint-wrapper": wrapped,
    "fastvideo": fastvideo,
    "state-dict": lambda state: {"state_dict": prefixed("net.")(state), "step": 7},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_module(form, suffix, dtype, model, state, tmp_path):
    content = FORMS[form]({name: tensor.to(dtype) for name, tensor in state.items()})
    if suffix == ".safetensors" and "state_dict" in content:
        pytest.skip("safetensors hold no nested containers")
    loaded = load(read_checkpoint(write(tmp_path / f"x{suffix}", content)), config_of(model), torch.float32)
    assert not loaded.training
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, state[name]), name


def test_dtypes_are_those_of_diffusers(model, tmp_path):
    """Loading in bfloat16 keeps in float32 just what from_pretrained(dtype=bfloat16) does."""
    model.save_pretrained(tmp_path)
    theirs = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = load(read_checkpoint(tmp_path), config_of(model), torch.bfloat16)
    expected = theirs.state_dict()
    assert {name: x.dtype for name, x in ours.state_dict().items()} == {name: x.dtype for name, x in expected.items()}
    assert all(torch.equal(x, expected[name]) for name, x in ours.state_dict().items())
    assert len({x.dtype for x in expected.values()}) == 2
    assert ours.rope.freqs_cos.dtype == theirs.rope.freqs_cos.dtype and not ours.rope.freqs_cos.is_meta


def test_shards_are_read_and_checked(model, state, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load(read_checkpoint(tmp_path), config_of(model), torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(tmp_path.glob("*-00001-of-*.safetensors")))
    about, count = info(str(first)).to_dict(), len(list(tmp_path.glob("*.safetensors")))
    assert (about["kind"], about["shard"], about["shards"]) == ("transformer", 1, count)
    assert 0 < about["tensors"] < len(state) and sum(about["dtypes"].values()) == about["tensors"]
    check_weights(first, shard=True)
    with pytest.raises(WeightsError, match=f"one of {count} shards of a model. Give the folder"):
        check_weights(first)
    first.unlink()
    with pytest.raises(WeightsError, match="lacks the shard"):
        read_checkpoint(tmp_path)
    content["weight_map"][next(iter(content["weight_map"]))] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="outside its folder"):
        read_checkpoint(tmp_path)


SPELLINGS = ("self_attn.attn_op.local_attn", "attn1.attn_op.local_attn", "attn1.attn_impl")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_proj_l(spelling, model, state, tmp_path):
    pairs = projections()
    form = wan if spelling.startswith("self") else fastvideo if spelling.endswith("impl") else dict
    path = write(tmp_path / "x.safetensors", {**form(state), **spell(pairs, spelling)})
    checkpoint = read_checkpoint(path)
    loaded = load(checkpoint, config_of(model), torch.float32)
    install_projections(loaded, path, TURBO_SLA)
    for layer, block in enumerate(loaded.blocks):
        assert torch.equal(block.attn1.processor.proj_l.weight, pairs[layer][0])
        assert torch.equal(block.attn1.processor.proj_l.bias, pairs[layer][1])
    assert peek(path).trained_with == TURBO_SLA and peek(path).sampler == "rcm"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_turbo_and_its_int8(dtype, model, state, tmp_path):
    stored = {name: tensor.to(dtype) for name, tensor in state.items()}
    content = turbo(stored, projections())
    assert content["patch_embedding.weight"].ndim == 2
    plain = load(read_checkpoint(write(tmp_path / "turbo.pth", content)), config_of(model), torch.float32).state_dict()
    assert all(torch.equal(plain[name], tensor) for name, tensor in state.items())
    wide = turbo(state, projections())
    path = write(tmp_path / "turbo-quant.pth", quantised(wide))
    checkpoint = read_checkpoint(path, torch.float32)
    assert checkpoint.quantised and len(checkpoint.projections) == 4
    for name, tensor in load(checkpoint, config_of(model), torch.float32).state_dict().items():
        if name.endswith("weight") and tensor.ndim == 2 and name.startswith("blocks."):
            largest = state[name].abs().max()
            assert 0 < (tensor - state[name]).abs().max() <= 1.0 * largest / 128, name  # half a step; one at the top
        else:
            assert torch.equal(tensor, state[name]), name


def corruptions(content, count, seed):
    """Single faults in a checkpoint: (what, the checkpoint with it)."""
    rng = random.Random(seed)
    names = sorted(content)
    for number in range(count):
        name, kind = names[rng.randrange(len(names))], number % 7
        broken = dict(content)
        tensor = broken.pop(name)
        if kind == 0:
            what = "dropped"
        elif kind == 1:
            what, broken[name + "_copy"] = "renamed", tensor
        elif kind == 2:
            what, broken["net." + name] = "prefixed", tensor
        elif kind == 3:
            what, broken[name] = "reshaped", tensor.reshape(-1, 1, 1)
        elif kind == 4:
            what, broken[name] = "integer", tensor.to(torch.int32)
        elif kind == 5:
            what, broken[name] = "float64", tensor.double()
        else:
            what, broken[name] = "float16", tensor.half()
        yield f"{what} {name}", broken


CORRUPTIONS = int(os.environ.get("SLAGEN_SOAK_CORRUPTIONS", 21))  # of each form: three of each kind, more in the soak


@pytest.mark.parametrize("form", ["diffusers", "original", "turbo", "quant", "fastvideo"])
def test_every_single_corruption_is_refused(form, model, state, tmp_path):
    make = {
        "diffusers": dict, "original": wan, "fastvideo": fastvideo, "turbo": lambda s: turbo(s, projections()),
        "quant": lambda s: quantised(turbo(s, projections())),
    }[form]  # fmt: skip
    content = make(state)
    accepted = []
    for what, broken in corruptions(content, CORRUPTIONS, seed=len(form)):
        if form == "quant" and what == "float16 time_projection.1.weight":
            continue  # it is most of what is not int8, so that makes a file in half precision, which may hold float32
        path = write(tmp_path / "x.pth", broken)
        try:
            load(read_checkpoint(path), config_of(model), torch.float32)
            accepted.append(what)
        except WeightsError:
            pass
    assert not accepted


def test_one_layer_in_another_precision_is_refused(model, state, tmp_path):
    content = {name: tensor.bfloat16() for name, tensor in state.items()}
    content["blocks.1.attn1.to_q.weight"] = content["blocks.1.attn1.to_q.weight"].float()
    with pytest.raises(WeightsError, match="unlike the same tensor in other blocks"):
        load(read_checkpoint(write(tmp_path / "x.pth", content)), config_of(model), torch.float32)


@pytest.mark.parametrize("fault", ["zeroed", "missing", "misspelt", "mixed", "nan"])
def test_a_damaged_projection_is_refused(fault, model, state, tmp_path):
    content = turbo(state, projections())
    name = "blocks.1.self_attn.attn_op.local_attn.proj_l.weight"
    if fault == "zeroed":
        content[name] = torch.zeros_like(content[name])
    elif fault == "missing":
        del content[name]
    elif fault == "misspelt":
        content["blocks.1.self_attn.proj_l.weight"] = content.pop(name)
    elif fault == "mixed":
        content["blocks.1.attn1.attn_impl.proj_l.weight"] = content.pop(name)
    else:
        content[name][0, 0] = float("nan")
    with pytest.raises(WeightsError):
        load(read_checkpoint(write(tmp_path / "x.pth", content)), config_of(model), torch.float32)


def test_simpletuners_side_file(base, tmp_path):
    (weight, bias) = projections()[0]
    settings = {"topk": 0.15, "feature_map": "softmax", "blkq": 64, "blkk": 64, "tie_feature_map_qk": True}
    payload = {
        "version": 1, "settings": settings, "state": {"64:bf16": {"proj_l.weight": weight, "proj_l.bias": bias}}
    }  # fmt: skip
    path = tmp_path / "sla_attention.pt"
    torch.save(payload, path)
    found = peek(path)
    assert found.kind == "side-file" and found.trained_with == SLAConfig(0.85)
    transformer = build_transformer(**SIZES)
    install_projections(transformer, path, found.trained_with)
    assert all(torch.equal(block.attn1.processor.proj_l.weight, weight) for block in transformer.blocks)
    with pytest.raises(UsageError, match="does not use SLA weights"):
        make_plan(GenerateConfig(prompt="a red circle", model=str(base), weights=str(path), attention="dense"))
    torch.save({**payload, "settings": {**settings, "blkq": 48}}, path)
    with pytest.raises(WeightsError, match="block_m is 48"):
        peek(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4:UserWarning:torch")
def test_a_pickle_with_code_is_not_run(base, tmp_path):
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"

    class Evil:
        def __reduce__(self):
            return (open, (str(trace), "w"))

    for save in (torch.save, lambda x, p: p.write_bytes(pickle.dumps(x))):
        save({"blocks.0.self_attn.q.weight": Evil()}, path)
        with pytest.raises(WeightsError, match="could run code"):
            make_plan(GenerateConfig(prompt="a red circle", model=str(base), weights=str(path)))
        assert not trace.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files_are_refused(suffix, state, tmp_path):
    path = write(tmp_path / f"x{suffix}", wan(state))
    whole = path.read_bytes()
    for share in (0.0, 0.3, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(WeightsError, match="corrupt or incomplete"):
            read_checkpoint(path)
        with pytest.raises(WeightsError, match="corrupt or incomplete"):
            peek(path)


@pytest.mark.parametrize(
    ("names", "kind", "words"),
    [
        (["blocks.0.self_attn.q.lora_A.weight"], "lora", "LoRA"),
        (["token_embedding.weight", "blocks.0.attn.q.weight"], "text-encoder", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        (["encoder.conv1.weight", "decoder.conv1.weight", "conv1.weight"], "vae", "slagen convert"),
        (["model.layers.0.weight"], "unknown", "no Wan2.1 transformer"),
    ],
    ids=["lora", "t5", "vae", "foreign"],
)
def test_what_is_no_transformer_is_named_and_refused(names, kind, words, tmp_path):
    assert identify(names) == kind
    path = write(tmp_path / "x.safetensors", {name: torch.zeros(2, 2) for name in names})
    with pytest.raises(WeightsError, match=words):
        read_checkpoint(path)
    with pytest.raises(WeightsError, match=words):
        peek(path)


def test_the_original_folder_names_the_way_out(tmp_path):
    """Wan2.1 as first published: its T5 is a pickle with names of its own."""
    (tmp_path / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"")
    with pytest.raises(WeightsError, match="--model wan2.1-t2v-1.3b"):
        describe_folder(tmp_path, "Wan2.1-T2V-1.3B")


def test_another_size_of_model_is_refused(state, tmp_path):
    larger = build_transformer(num_heads=4, head_dim=64, num_layers=3)
    with pytest.raises(WeightsError, match="2 layers of width 128, but the model has 3 layers of width 256"):
        load(read_checkpoint(write(tmp_path / "x.pth", wan(state))), config_of(larger), torch.float32)


def test_the_original_vae(tmp_path):
    """A VAE with the original names; it has two residual blocks a level, as the public one, and few channels."""
    from diffusers import AutoencoderKLWan

    base = save_pipeline(tmp_path / "base")
    AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=2, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).save_pretrained(base / "vae")  # fmt: skip
    vae = AutoencoderKLWan.from_pretrained(base / "vae")
    original = original_vae_names(vae.state_dict())
    path = tmp_path / "Wan2.1_VAE.pth"
    torch.save(original, path)
    loaded = load_vae(path, base / "vae").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in vae.state_dict().items())
    out = convert(str(path), str(tmp_path / "vae"), base=str(base))
    again = AutoencoderKLWan.from_pretrained(out).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in vae.state_dict().items())
    del original["decoder.conv1.bias"]
    torch.save(original, path)
    with pytest.raises(WeightsError, match="missing"):
        load_vae(path, base / "vae")


def original_vae_names(state):
    """diffusers' names of a VAE with two residual blocks a level, as the original repository says them."""
    residual = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6",
                "conv_shortcut": "shortcut"}  # fmt: skip
    plain = [
        (r"quant_conv\.(.*)", r"conv1.\1"), (r"post_quant_conv\.(.*)", r"conv2.\1"),
        (r"(encoder|decoder)\.conv_in\.(.*)", r"\1.conv1.\2"), (r"(encoder|decoder)\.norm_out\.(.*)", r"\1.head.0.\2"),
        (r"(encoder|decoder)\.conv_out\.(.*)", r"\1.head.2.\2"),
        (r"(encoder|decoder)\.mid_block\.attentions\.0\.(.*)", r"\1.middle.1.\2"),
        (r"(encoder|decoder)\.mid_block\.resnets\.0\.(.*)", r"\1.middle.0.\2"),
        (r"(encoder|decoder)\.mid_block\.resnets\.1\.(.*)", r"\1.middle.2.\2"),
        (r"encoder\.down_blocks\.(.*)", r"encoder.downsamples.\1"),
    ]  # fmt: skip
    original = {}
    for name, tensor in state.items():
        up = re.fullmatch(r"decoder\.up_blocks\.(\d)\.(?:resnets\.(\d)|upsamplers\.0)\.(.*)", name)
        if up:
            place = 4 * int(up[1]) + (3 if up[2] is None else int(up[2]))
            new = f"decoder.upsamples.{place}.{up[3]}"
        else:
            new = next(re.sub(pattern, to, name) for pattern, to in plain if re.fullmatch(pattern, name))
        stem, _, kind = new.rpartition(".")
        head, _, last = stem.rpartition(".")
        inside = "samples." in head or "middle." in head
        original[f"{head}.{residual[last]}.{kind}" if inside and last in residual else new] = tensor
    return original


def test_the_vae_table_agrees_with_diffusers():
    """At the public sizes, where diffusers' own conversion is right."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    with torch.device("meta"):
        vae = AutoencoderKLWan()
    original = original_vae_names(vae.state_dict())
    assert len(original) == len(vae.state_dict()) and "decoder.upsamples.4.shortcut.weight" in original
    assert set(convert_wan_vae_to_diffusers(dict(original))) == set(vae.state_dict())


# The commands


def run_short(base, tmp_path, name, **settings):
    config = GenerateConfig(
        prompt="a red circle", model=str(base), width=64, height=64, num_frames=9, seed=3, dtype="fp32", device="cpu",
        output=str(tmp_path / f"{name}.mp4"), **settings,
    )  # fmt: skip
    return generate(config).videos[0].report


def test_turbo_weights_run_as_they_are(base, state, tmp_path):
    path = write(tmp_path / "TurboWan2.1-small.pth", turbo(state, projections()))
    first = run_long(base, tmp_path, "first", weights=str(path), sparsity=0.5)
    assert first["settings"]["sampler"] == "rcm" and first["settings"]["steps"] == 4
    assert first["settings"]["guidance_scale"] == 1.0 and first["attention"]["block_n"] == 64
    assert [step["timestep"] for step in first["steps"]] == [988, 932, 852, 608]


@pytest.mark.slow
def test_converted_weights_make_the_same_video(base, state, tmp_path):
    path = write(tmp_path / "turbo.pth", turbo(state, projections()))
    folder = convert(str(path), str(tmp_path / "converted"), base=str(base), dtype=torch.float32)
    about = info(str(folder))
    assert about.kind == "pipeline" and about.sla_file.metadata["sampler_family"] == "rcm"
    assert about.sla_file.trained_with.sparsity == 0.9 and about.sla_file.trained
    norms = [pair[0].norm().item() for pair in projections().values()]
    assert about.sla_file.proj_l_norms == pytest.approx(norms)
    direct = run_long(base, tmp_path, "direct", weights=str(path))
    from_folder = run_long(folder, tmp_path, "folder")
    as_weights = run_long(base, tmp_path, "weights", weights=str(folder))
    assert direct["latents_hash"] == from_folder["latents_hash"] == as_weights["latents_hash"]
    assert direct["attention"]["mode"] == "sla" and from_folder["settings"]["sampler"] == "rcm"
    dense = run_long(base, tmp_path, "dense", weights=str(path), attention="dense")
    assert dense["weights"]["used"] == "the model file, with full attention"
    assert dense["weights"]["model_hash"] == direct["weights"]["model_hash"]


def run_long(model, tmp_path, name, **settings):
    """192 tokens: three key blocks of 64."""
    config = GenerateConfig(
        prompt="a red circle", model=str(model), width=128, height=128, num_frames=9, seed=3, dtype="fp32",
        device="cpu", output=str(tmp_path / f"{name}.mp4"), **settings,
    )  # fmt: skip
    return generate(config).videos[0].report


def test_a_failed_conversion_leaves_nothing(base, state, tmp_path):
    content = turbo(state, projections())
    del content["head.head.bias"]
    path = write(tmp_path / "turbo.pth", content)
    with pytest.raises(WeightsError, match="proj_out.bias is missing"):
        convert(str(path), str(tmp_path / "out"), base=str(base))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["turbo.pth"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(UsageError, match="exists"):
        convert(str(path), str(tmp_path / "out"), base=str(base))


@pytest.mark.parametrize("form", ["turbo", "quant", "fastvideo"])
def test_conversion_needs_no_base(form, state, tmp_path):
    """Sizes are read off the tensors; what comes out is a transformer for diffusers, and for --weights."""
    content = turbo(state, projections())
    if form == "quant":
        content = quantised(content)
    elif form == "fastvideo":
        content = {**fastvideo(state), **spell(projections(), "attn1.attn_impl")}
    out = convert(str(write(tmp_path / "x.pth", content)), str(tmp_path / "out"), dtype=torch.float32)
    loaded = WanTransformer3DModel.from_pretrained(out, subfolder="transformer")
    assert loaded.config.num_attention_heads == 2 and loaded.config.attention_head_dim == 64
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=0, atol=0 if form != "quant" else 0.01)
    assert read_metadata(out).sampler_family == "rcm" and peek(out).kind == "transformer"


def test_merge_is_the_published_arithmetic(state, tmp_path):
    generator = torch.Generator().manual_seed(0)
    shift = lambda s, size: {n: x + size * torch.randn(x.shape, generator=generator) for n, x in s.items()}  # noqa: E731
    start, before = shift(state, 0.1), state
    after = shift(state, 0.1)
    pairs = projections()
    files = [
        write(tmp_path / "base.pth", turbo(start, {})),
        write(tmp_path / "before.safetensors", wan(before)),
        write(tmp_path / "after.pth", turbo(after, pairs)),
    ]
    # the patch embeddings of the first and the last are matrices, the middle one's is not: the base's value stays
    out = merge(str(files[0]), str(tmp_path / "out.safetensors"), diff_base=str(files[1]), diff_target=str(files[2]),
                weight=0.5)  # fmt: skip
    merged = read_checkpoint(out)
    for name, tensor in merged.tensors.items():
        expected = start[name] + 0.5 * (after[name] - before[name])
        if name == "patch_embedding.weight":
            expected = start[name].flatten(1)
        assert torch.equal(tensor, expected), name
    assert torch.equal(merged.projections["blocks.1.attn1.processor.proj_l.weight"], pairs[1][0])
    with pytest.raises(UsageError, match="exists"):
        merge(str(files[0]), str(out), diff_base=str(files[1]), diff_target=str(files[2]))


def test_a_merge_says_how_many_tensors_changed(state, tmp_path):
    """Of the same model before and after it said that all of them had."""
    base, told = str(write(tmp_path / "base.safetensors", wan(state))), list[str]()
    merge(base, str(tmp_path / "same.safetensors"), diff_base=base, diff_target=base, on_note=told.append)
    assert told == ["the merge changed nothing: all tensors equal those of the base transformer"]
    name = next(name for name, tensor in wan(state).items() if tensor.any())
    after = str(write(tmp_path / "after.safetensors", {**wan(state), name: 2 * wan(state)[name]}))
    merge(base, str(tmp_path / "new.safetensors"), diff_base=base, diff_target=after, on_note=told.append)
    assert (
        told[1] == f"1 tensor changed, {len(state) - 1} kept as in the base, 0 copied from the fine-tuned transformer"
    )


def test_samplers_must_suit_the_weights(base, state, tmp_path):
    path = write(tmp_path / "turbo.pth", turbo(state, projections()))
    common = dict(prompt="a red circle", model=str(base), device="cpu")
    with pytest.raises(WeightsError, match="Leave --sampler out"):
        make_plan(GenerateConfig(**common, weights=str(path), sampler="unipc"))
    with pytest.raises(WeightsError, match="not distilled"):
        make_plan(GenerateConfig(**common, attention="dense", sampler="rcm"))
    with pytest.raises(UsageError, match="Try --steps 4"):
        make_plan(GenerateConfig(**common, weights=str(path), steps=5))
    with pytest.raises(UsageError, match="Leave --flow-shift out"):
        make_plan(GenerateConfig(**common, weights=str(path), flow_shift=3.0))
    with pytest.raises(UsageError, match="for the rcm sampler"):
        make_plan(GenerateConfig(**common, attention="dense", ode=True))
    with pytest.raises(WeightsError, match="not fine-tuned for SLA"):
        make_plan(GenerateConfig(**common))


@pytest.mark.parametrize("sampler", ["unipc", "euler", "dpm++"])
def test_flow_samplers_run(base, tmp_path, sampler):
    report = run_short(base, tmp_path, sampler.strip("+"), attention="dense", sampler=sampler, steps=2)
    assert report["settings"]["sampler"] == sampler and len(report["steps"]) == 2


def test_gguf(base, model, state, tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the extra slagen[gguf]")
    path = tmp_path / "wan-q8.gguf"
    writer = gguf.GGUFWriter(path, "wan")
    for name, tensor in wan(state).items():
        values = tensor.numpy()
        if tensor.ndim == 2 and name.startswith("blocks.") and tensor.shape[1] % 32 == 0:
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = describe_folder(base, "base")
    loaded = load_transformer(dataclasses.replace(source, weights=path), torch.float32)
    x = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
    call = dict(hidden_states=x, timestep=torch.tensor([500.0]), encoder_hidden_states=text, return_dict=False)
    with torch.no_grad():
        exact, rounded = model(**call)[0], loaded(**call)[0]
    assert 0 < ((exact - rounded).norm() / exact.norm()).item() < 0.02
    assert info(str(path)).quantised is True
    file = tmp_path / "style.safetensors"
    save_file({name: x.contiguous() for name, x in lora_forms.comfy(model).items()}, file)
    lora = check_lora(read_lora(file), source.shape, "base")
    merged, live = Loras(pipe_with(copy.deepcopy(model)), [lora], merge=True, keep=False), loaded
    merged.set_scales([1.0])
    Loras(pipe_with(live), [lora], merge=False, keep=False).set_scales([1.0])
    with torch.no_grad():
        exact, rounded = merged.transformer(**call)[0], live(**call)[0]
    assert 0 < ((exact - rounded).norm() / exact.norm()).item() < 0.02
    again = load_transformer(dataclasses.replace(source, weights=path), torch.float32)
    with pytest.raises(WeightsError, match="stays quantised, so a LoRA cannot be added to it"):
        Loras(pipe_with(again), [lora], merge=True, keep=False).set_scales([1.0])


def pipe_with(transformer):
    return WanPipeline(None, None, None, None, transformer=transformer)
