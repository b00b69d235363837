"""Healthy files that are no plain Wan2.1 transformer: 8 bits, containers and prefixes are read, the rest is named."""

import json

import public_forms as forms
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_formats import base, config_of, corruptions, model, run_long, state, write  # noqa: F401 (fixtures)
from wan_models import build_pipeline, build_transformer

import slagen
from slagen.attention.sla.config import SLAConfig
from slagen.cli.main import run
from slagen.errors import UsageError, WeightsError
from slagen.formats.headers import read_header
from slagen.formats.kinds import REFUSALS, identify
from slagen.formats.merge import merge
from slagen.formats.peek import peek
from slagen.formats.published import TURBO_SLA
from slagen.formats.sla import SLAMetadata, read_metadata, weights_hash
from slagen.formats.sla_settings import read_trained_with
from slagen.formats.transformer import read_checkpoint
from slagen.generation.config import GenerateConfig
from slagen.generation.resolve import make_plan
from slagen.wan.convert import convert
from slagen.wan.folder import bundled_folder, describe_folder
from slagen.wan.info import info
from slagen.wan.install import load_sla, save_sla
from slagen.wan.processor import installation, remove
from slagen.wan.transformer import build_transformer as load
from slagen.wan.vae import load_vae

QUIET = ["--device", "cpu"]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
EIGHT_BITS = {  # form: how far a weight may be off, in shares of its tensor's largest
    "turbo-int8": (lambda s: forms.quantised(forms.turbo(s, forms.projections())), 1 / 128),
    "fp8-e4m3fn": (forms.fp8(E4M3), 1 / 16), "fp8-e5m2": (forms.fp8(E5M2), 1 / 8),
    "scaled-fp8-e4m3fn": (forms.scaled_fp8, 1 / 16), "scaled-fp8-e5m2": (lambda s: forms.scaled_fp8(s, E5M2), 1 / 8),
    "comfy-quant": (forms.comfy_quant, 1 / 16), "lightx2v-fp8": (forms.lightx2v(E4M3), 1 / 16),
    "lightx2v-int8": (forms.lightx2v(torch.int8), 1 / 127), "scale-inv": (forms.scale_inv, 1 / 128),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("form", EIGHT_BITS)
def test_weights_of_8_bits_are_multiplied_out(form, dtype, model, state, tmp_path):  # noqa: F811
    """The mixture of kinds was judged after multiplying out, so that float32, the CPU's own, refused all of them."""
    make, share = EIGHT_BITS[form]
    path = write(tmp_path / "x.safetensors", make({name: tensor.bfloat16() for name, tensor in state.items()}))
    checkpoint = read_checkpoint(path, dtype)
    loaded = load(checkpoint, config_of(model), dtype).state_dict()
    assert checkpoint.quantised and identify(read_names(path)) == "transformer"
    off = {}
    for name, tensor in loaded.items():
        bound = state[name].abs().max().item() * (share if name in checkpoint.forms else 0)
        off[name] = (tensor.float() - state[name]).abs().max().item()
        assert off[name] <= bound + 0.008 * state[name].abs().max().item(), name  # half a step of what was bf16 or fp16
    assert max(off[name] for name in checkpoint.forms) > 0
    assert info(str(path)).quantised and peek(path).kind == "transformer"


def read_names(path):
    return {name: entry for name, entry in read_header(path).items() if name != "__metadata__"}


@pytest.mark.parametrize("fault", ["no scale", "scale alone", "shape", "infinite", "wide", "two scales", "integer"])
def test_a_fault_in_8_bits_is_refused(fault, model, state, tmp_path):  # noqa: F811
    content = forms.lightx2v(E4M3)(state)
    stem = "blocks.1.ffn.0.weight"
    if fault == "no scale":
        del content[stem + "_scale"]
    elif fault == "scale alone":
        del content[stem]
    elif fault == "shape":
        content[stem + "_scale"] = content[stem + "_scale"][:-1]
    elif fault == "infinite":
        content[stem + "_scale"][0] = float("inf")
    elif fault == "wide":
        content[stem + "_scale"] = content[stem + "_scale"].double()
    elif fault == "two scales":
        content["blocks.1.ffn.0.scale_weight"] = torch.tensor(1.0)
    else:
        content[stem] = content[stem].float().to(torch.int32)
    with pytest.raises(WeightsError, match=r"blocks\.1\.ffn"):
        load(read_checkpoint(write(tmp_path / "x.pth", content)), config_of(model), torch.float32)


@pytest.mark.parametrize("form", ["scaled-fp8-e4m3fn", "comfy-quant", "lightx2v-int8"])
def test_single_corruptions_in_8_bits_are_refused_or_change_nothing(form, model, state, tmp_path):  # noqa: F811
    """What no number depends on may be amiss: a mark, a scale for activations, one scale in another shape."""
    content = EIGHT_BITS[form][0]({name: tensor.bfloat16() for name, tensor in state.items()})
    path, refused = tmp_path / "x.pth", 0

    def loaded(tensors):
        return load(read_checkpoint(write(path, tensors), torch.float32), config_of(model), torch.float32).state_dict()

    whole = loaded(content)
    for what, broken in corruptions(content, 14, seed=len(form)):
        try:
            found = loaded(broken)
        except WeightsError:
            refused += 1
            continue
        assert all(torch.equal(found[name], tensor) for name, tensor in whole.items()), what
    assert refused >= 7


@pytest.mark.parametrize(
    ("extra", "kind"),
    [({"weight_scale_2": torch.tensor(1.0)}, "nvfp4"), ({"absmax": torch.zeros(4)}, "nf4"),
     ({"comfy_quant": torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)}, "mxfp8"),
     ({"weight._data": torch.zeros(4, dtype=torch.int8), "weight._scale": torch.ones(1)}, "optimum-quanto"),
     ({"_weight_qdata": torch.zeros(4, dtype=torch.int8), "_weight_scale": torch.ones(1)}, "torchao"),
     ({"weight_zero_point": torch.zeros(1, dtype=torch.int8)}, "zero points")],
    ids=["nvfp4", "nf4", "mxfp8", "quanto", "torchao", "zero-point"],
)  # fmt: skip
def test_other_quantisations_are_named(extra, kind, state, tmp_path):  # noqa: F811
    content = {**forms.comfy_quant(state), **{f"blocks.0.ffn.0.{name}": x for name, x in extra.items()}}
    path = write(tmp_path / "x.safetensors", content)
    for read in (peek, read_checkpoint):
        with pytest.raises(
            WeightsError, match=f"(is quantised in an unsupported form|{kind}).*slagen reads GGUF, and fp8 and int8"
        ):
            read(path)


def test_float64_is_read(model, state, tmp_path):  # noqa: F811
    """It was "faulty", every tensor of it; one tensor of another kind than the rest is a fault still."""
    wide = {name: x.double() for name, x in state.items()}
    path = write(tmp_path / "x.safetensors", wide)
    loaded = load(read_checkpoint(path), config_of(model), torch.float32).state_dict()
    assert all(x.dtype == torch.float32 and torch.equal(x, state[name]) for name, x in loaded.items())
    assert not info(str(path)).quantised
    wide["proj_out.weight"][0, 0] = 1e300
    with pytest.raises(WeightsError, match="proj_out.weight contains NaN or Inf"):
        load(read_checkpoint(write(path, wide)), config_of(model), torch.float32)


def nested(**parts):
    return lambda s: {  # noqa: F811
        name: {prefix + key: x for key, x in forms.wan(s).items()} for name, prefix in parts.items()
    }


ONE_OF_MANY = {
    "diffusion_model": lambda s: {"diffusion_model." + name: x for name, x in forms.wan(s).items()},
    "scaled-in-diffusion_model": lambda s: {
        "diffusion_model." + name: x for name, x in forms.scaled_fp8(s).items()
    },
    "all-in-one": forms.all_in_one,
    "generator": nested(generator="model."),
    "generator_ema-fsdp": nested(generator_ema="model._fsdp_wrapped_module."),
    "model-and-optimizer": lambda s: {
        **nested(model="")(s), "optimizer": {"state": {"0": {"exp_avg": torch.zeros(2)}}}, "step": 7
    },
    "beside-a-tensor": lambda s: {**nested(generator="model.")(s), "logvar": torch.zeros(2)},
    "self-forcing-critic": lambda s: {**nested(generator="model.", critic="model.")(s)},
}  # fmt: skip


@pytest.mark.parametrize("form", ONE_OF_MANY)
def test_prefixes_and_containers_are_read(form, model, state, tmp_path):  # noqa: F811
    content = ONE_OF_MANY[form](state)
    path = tmp_path / "x.pt"
    torch.save(content, path)
    loaded = load(read_checkpoint(path, torch.float32), config_of(model), torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items()) or "scaled" in form
    assert ("text_encoders, vae" in "".join(peek(path).notes)) == (form == "all-in-one")


TWO = {
    "generator": (nested(generator="model.", generator_ema="model."), ["generator", "generator_ema"]),
    "model-ema": (nested(model="", ema=""), ["model", "ema"]),
    "net-ema-flat": (
        lambda s: {p + name: x for p in ("net.", "net_ema.") for name, x in forms.wan(s).items()},
        ["net", "net_ema"],
    ),
}


@pytest.mark.parametrize("form", TWO)
def test_of_two_transformers_one_is_asked_for(form, model, state, base, tmp_path, capsys):  # noqa: F811
    make, parts = TWO[form]
    content, path = make(state), tmp_path / "x.pt"
    if form == "net-ema-flat":
        content = {name: x + 1 if name.startswith("net.") else x for name, x in content.items()}
    else:
        content[parts[0]] = {name: x + 1 for name, x in content[parts[0]].items()}
    torch.save(content, path)
    assert run(["generate", "a red circle", "--model", str(base), "--weights", str(path)] + QUIET) == 5
    assert f"slagen convert {path} FOLDER --part {parts[1]}" in capsys.readouterr().err.replace("\n", " ")
    out = convert(str(path), str(tmp_path / "out"), part=parts[1], base=str(base), dtype=torch.float32)
    loaded = load(read_checkpoint(out), config_of(model), torch.float32).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert info(str(path)).parts == parts
    with pytest.raises(UsageError, match=", ".join(parts)):
        convert(str(path), str(tmp_path / "none"), part="nothing")


def test_dictionaries_without_end_are_refused(tmp_path):
    endless = {"state_dict": {}}
    endless["state_dict"]["state_dict"] = endless
    deep: dict = {"weight": torch.zeros(2)}
    for _ in range(20):
        deep = {"model": deep}
    shared: dict = {"nothing": {}}
    for _ in range(7):
        shared = dict.fromkeys(map(str, range(100)), shared)  # 10 ** 14 ways to the end
    for content, words in (
        (endless, "contain themselves"),
        (deep, "contain themselves"),
        (shared, "contain themselves"),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(WeightsError, match=words):
            read_checkpoint(tmp_path / "x.pt")


def other_kinds(state):  # noqa: F811
    """(what, its tensors, its kind)"""
    yield from ((f"lora {pair}", forms.lora(pair), "lora") for pair in forms.LORA_PAIRS)
    for kind, names in {
        "difference": ("blocks.0.self_attn.q.diff", "blocks.0.self_attn.q.diff_b", "head.modulation.diff_m"),
        "lokr": ("lycoris_blocks_0_self_attn_q.lokr_w1", "lycoris_blocks_0_self_attn_q.lokr_w2_a"),
        "loha": ("blocks.0.self_attn.q.hada_w1_a", "blocks.0.self_attn.q.hada_w2_b"),
        "lycoris": ("lora_te_blocks_0_ffn.oft_blocks",),
        "image-encoder": ("visual.transformer.0.attn.proj.weight", "textual.log_scale"),
        "wan2.2-vae": ("encoder.downsamples.0.downsamples.0.residual.0.gamma", "decoder.conv1.weight"),
        "tiny-vae": ("encoder.0.weight", "decoder.1.weight"),
    }.items():
        yield kind, {"diffusion_model." * (kind == "difference") + n: torch.zeros(2, 2) for n in names}, kind
    for kind, names in forms.VARIANTS.items():
        yield kind, {**forms.wan(state), **{name: torch.zeros(2, 2) for name in names}}, kind
    yield "vace module", {name: torch.zeros(2, 2) for name in forms.VARIANTS["vace"]}, "vace"
    yield "Wan2.2 I2V-A14B", forms.with_channels(state, 36, 16), "wan2.2-image-to-video"
    yield "Wan2.2 TI2V-5B", forms.with_channels(state, 48, 48), "ti2v-5b"
    yield "Fun-Control", {**forms.with_channels(state, 48, 16), "img_emb.proj.0.weight": torch.zeros(2)}, "control"
    yield "Wan2.2 Fun-Control", forms.with_channels(state, 52, 16), "control"
    yield "of more channels", forms.with_channels(state, 20, 16), "conditioned"
    base_layer = {name.replace(".weight", ".base_layer.weight"): x for name, x in state.items()}
    yield "unmerged", {**base_layer, **forms.lora(forms.LORA_PAIRS[2])}, "unmerged-lora"


def test_other_kinds_are_named_in_one_sentence(state, base, tmp_path, capsys):  # noqa: F811
    """Healthy files of 14 GB were called damaged, to be got again."""
    small = {name: tensor[:1] if tensor.ndim > 2 else tensor for name, tensor in state.items()}
    for what, content, kind in other_kinds(small):
        path = write(tmp_path / "x.safetensors", content)
        assert identify(content) == identify(read_names(path)) == kind, what
        with pytest.raises(WeightsError) as caught:
            peek(path)
        assert str(caught.value) == f"{path} {REFUSALS[kind]}" and "again" not in str(caught.value), what
        if "vae" not in kind:
            assert "ive " in str(caught.value), what
    assert info(str(path)).meaning.startswith("this is a transformer with a LoRA")
    assert run(["generate", "a red circle", "--model", str(base), "--weights", str(path)] + QUIET) == 5
    assert "not merged into its weights" in capsys.readouterr().err
    vae = write(tmp_path / "vae.pth", {"encoder.downsamples.0.downsamples.0.residual.0.gamma": torch.zeros(2)})
    with pytest.raises(WeightsError, match="TI2V-5B"):
        load_vae(vae, None)
    own = bundled_folder() / "vae"  # is of the residual kind too, and says so in its config
    assert load_vae(own, own).config.is_residual


def test_another_size_of_model_is_named(model, state, tmp_path):  # noqa: F811
    """A healthy 14B file for a 1.3B model was "825 faulty ... Get the file again"."""
    content = {name: x for name, x in state.items() if not name.startswith("blocks.")}
    content["patch_embedding.bias"] = torch.zeros(5120)
    with pytest.raises(WeightsError, match="width 5120.* 2 layers of width 128.* --model wan2.1-t2v-14b"):
        load(read_checkpoint(write(tmp_path / "x.pth", content)), config_of(model), torch.float32)


def test_folders_of_wan22_are_named(base, tmp_path):  # noqa: F811
    (tmp_path / "two" / "transformer_2").mkdir(parents=True)
    with pytest.raises(WeightsError, match=r"Wan2\.2 pipeline with two transformers"):
        peek(tmp_path / "two")
    index = {**json.loads((base / "model_index.json").read_text()), "expand_timesteps": True}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsError, match="TI2V-5B"):
        describe_folder(tmp_path, "ti2v")


@pytest.mark.parametrize(
    ("name", "metadata", "words"),
    [
        ("wan2.2_t2v_high_noise_14B_bf16", {}, "one of the two transformers of Wan2.2 A14B"),
        ("model", {"modelspec.title": "Wan2.2-T2V-A14B low noise"}, "one of the two transformers of Wan2.2 A14B"),
        ("SkyReels-V2-DF-14B-540P", {}, "sampling chunk by chunk"),
        ("wan2.1_t2v_1.3B_lightx2v_4step", {}, "Try --steps 4 --guidance-scale 1"),
        ("self_forcing_dmd", {}, "Try --steps 4 --guidance-scale 1"),
    ],
)
def test_names_and_metadata_give_hints(name, metadata, words, state, base, tmp_path):  # noqa: F811
    path = tmp_path / f"{name}.safetensors"
    save_file(forms.wan(state), path, metadata=metadata)
    common = dict(prompt="a red circle", model=str(base), weights=str(path), device="cpu", attention="dense")
    plan = make_plan(GenerateConfig(**common))
    assert words in " ".join(plan.notes + plan.warnings)
    if "Try" in words:
        assert not make_plan(GenerateConfig(**common, steps=4, guidance_scale=1.0, sampler="euler")).warnings


def test_few_steps_with_guidance_are_told(state, base, tmp_path):  # noqa: F811
    path = write(tmp_path / "mine.safetensors", forms.wan(state))
    common = dict(prompt="a red circle", model=str(base), weights=str(path), device="cpu", attention="dense")
    assert "20 steps or more" in " ".join(make_plan(GenerateConfig(**common, steps=4)).warnings)
    assert not [text for text in make_plan(GenerateConfig(**common)).warnings if "steps" in text]


def test_gguf_says_its_own_kinds(state, tmp_path):  # noqa: F811
    gguf = pytest.importorskip("gguf", reason="needs the extra slagen[gguf]")
    for kind, quantised in (("Q4_0", True), ("F16", False)):
        path = tmp_path / f"wan-{kind}.gguf"
        writer = gguf.GGUFWriter(path, "wan")
        for name, tensor in forms.wan(state).items():
            values = tensor.numpy()
            if tensor.ndim == 2 and name.startswith("blocks.") and tensor.shape[1] % 32 == 0:
                number = getattr(gguf.GGMLQuantizationType, kind)
                packed = gguf.quants.quantize(values, number)
                writer.add_tensor(name, packed, raw_dtype=number)
            else:
                writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        about = info(str(path))
        assert set(about.dtypes) == {kind, "F32"} and about.dtypes[kind] > 10
        assert about.quantised is quantised and about.parameters == sum(x.numel() for x in state.values())


# SLA weights that diffusers saved

OWN = SLAConfig(sparsity=0.5, linear_domain="marginal", feature_map="elu", block_m=16, block_n=16)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline with trained SLA weights inside, as diffusers saves it, and the folder that it came from."""
    folder = tmp_path_factory.mktemp("saved")
    pipe = build_pipeline(**forms.SIZES)
    pipe.save_pretrained(folder / "base")
    defaults = {"width": 64, "height": 64, "num_frames": 9, "steps": 3, "guidance_scale": 2.0, "max_sequence_length": 8}
    (folder / "base" / "slagen.json").write_text(json.dumps(defaults))
    slagen.apply_sla(pipe, OWN)
    with torch.no_grad():
        for block in pipe.transformer.blocks:
            block.attn1.processor.proj_l.weight.add_(0.05 * torch.eye(64))
    bare = build_transformer(**forms.SIZES)
    metadata = SLAMetadata(OWN, "small", weights_hash(bare), "proj_l", 5)
    save_sla(pipe, folder / "base", metadata)
    remove(pipe.transformer)
    load_sla(pipe, folder / "base")
    pipe.save_pretrained(folder / "saved")
    return folder


def plan_of(**settings):
    return make_plan(GenerateConfig(prompt="a red circle", device="cpu", dtype="fp32", **settings))


@pytest.mark.parametrize("way", ["model", "weights", "transformer", "file"])
def test_sla_weights_saved_by_diffusers_keep_their_settings(way, saved):
    """They ran as TurboDiffusion's: rcm, 4 steps, 0.9, blocks of 64; `--model` said they were never tuned."""
    inner = saved / "saved" / "transformer"
    path = {"weights": saved / "saved", "transformer": inner, "file": next(inner.glob("*.safetensors"))}.get(way)
    given = dict(model=str(saved / "saved")) if path is None else dict(model=str(saved / "base"), weights=str(path))
    plan = plan_of(**given)
    assert (
        plan.attention == OWN and plan.config.sampler == "unipc" and plan.config.steps == 3 and plan.config.width == 64
    )
    assert plan.weights.sla_path is not None and not plan.weights.distilled


def test_sla_weights_saved_by_diffusers_make_the_same_video(saved, tmp_path):
    latents = []
    for name in ("base", "saved"):
        report = run_long(saved / name, tmp_path, name, steps=2, save_latents=True)
        latents.append(load_file(tmp_path / f"{name}.latents.safetensors")["latents"])
    assert report["attention"]["block_n"] == 16 and read_trained_with(saved / "saved") == ("sla", OWN, None)
    torch.testing.assert_close(*latents, rtol=0, atol=1e-4)  # other addresses, other order of sums
    pipe = build_pipeline(**forms.SIZES)
    assert load_sla(pipe, saved / "saved").config == OWN  # in Python too
    assert slagen.remove_sla(pipe) is None and "slagen" not in pipe.transformer.config
    other = build_pipeline(**forms.SIZES, seed=3)
    with pytest.raises(WeightsError, match="was trained from saved"):
        load_sla(other, saved / "saved")
    assert installation(other.transformer) is None


def test_sla_weights_without_their_settings_are_asked_for(saved, tmp_path, capsys):
    """Saved by an earlier slagen, or moved away from their config.json: never taken for Turbo's."""
    tensors = read_checkpoint(saved / "saved")
    path = tmp_path / "moved.safetensors"
    save_file({name: x.contiguous() for name, x in {**tensors.tensors, **tensors.projections}.items()}, path)
    found = peek(path)
    assert found.lacks_settings and found.trained_with is None and found.sampler is None
    assert run(["generate", "a red circle", "--model", str(saved / "base"), "--weights", str(path)] + QUIET) == 5
    assert "without the settings that they were trained with" in capsys.readouterr().err.replace("\n", " ")
    assert plan_of(model=str(saved / "base"), weights=str(path), attention="dense").weights.trained_with is None
    with pytest.raises(WeightsError, match="without the settings"):
        convert(str(path), str(tmp_path / "out"))
    assert info(str(path)).sla and "without the settings" in info(str(path)).notes[0]


def test_convert_and_merge_carry_the_settings(saved, state, tmp_path):  # noqa: F811
    out = convert(str(saved / "saved"), str(tmp_path / "out"), dtype=torch.float32)
    assert read_metadata(out).config == OWN and read_metadata(out).sampler_family == "flow"
    merged = merge(
        str(saved / "base" / "transformer"), str(tmp_path / "m.safetensors"),
        diff_base=str(saved / "base" / "transformer"), diff_target=str(saved / "saved"),
    )  # fmt: skip
    assert peek(merged).trained_with == OWN and peek(merged).sampler is None and peek(merged).trained == "proj_l"
    turbo = write(tmp_path / "turbo.pth", forms.turbo(state, forms.projections()))
    merged = merge(str(turbo), str(tmp_path / "t.safetensors"), diff_base=str(turbo), diff_target=str(turbo))
    assert peek(merged).trained_with == TURBO_SLA and peek(merged).sampler == "rcm"
