"""Every component of a model is held against what it must be: one that is damaged is refused, and nothing is asked."""

import json
import socket
from types import SimpleNamespace

import pytest
import torch
from damage import KINDS, PLACES, damage
from diffusers import UniPCMultistepScheduler
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from wan_models import build_pipeline, build_transformer, save_pipeline

import slagen
from slagen.attention.sla.config import SLAConfig
from slagen.errors import SlagenError, WeightsError
from slagen.formats.folders import component_files
from slagen.formats.sla import SLAMetadata, read_sla, weights_hash
from slagen.generation.config import GenerateConfig
from slagen.generation.resolve import find_weights
from slagen.generation.session import Session
from slagen.generation.stage_clock import StageClock
from slagen.wan.folder import bundled_folder, describe_folder
from slagen.wan.hub import closed_hub
from slagen.wan.info import info as describe
from slagen.wan.install import load_sla, save_sla
from slagen.wan.loading import load_pipeline
from slagen.wan.models import resolve_model
from slagen.wan.text_encoder import load_text_encoder
from slagen.wan.transformer import load_transformer
from slagen.wan.vae import decode_latents, load_vae

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole random pipeline; a test that changes a file puts it back."""
    return save_pipeline(tmp_path_factory.mktemp("strict") / "pipe")


def load(folder):
    return load_pipeline(resolve_model(str(folder), "cpu"), torch.float32)


@pytest.fixture(scope="module")
def components(folder):
    """Of every component its one weight file, and how it is loaded."""
    pipe = build_pipeline()
    metadata = SLAMetadata(SLAConfig(block_m=16, block_n=16), "toy", weights_hash(pipe.transformer), "all", 10)
    base = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    slagen.apply_sla(pipe, metadata.config)
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.add_(0.01)
    file = save_sla(pipe, folder.parent / "sla", metadata, base)
    source = describe_folder(folder, "toy")
    loaders = {
        "transformer": lambda: load_transformer(source, torch.float32),
        "text_encoder": lambda: load_text_encoder(folder / "text_encoder", torch.float32),
        "vae": lambda: load_vae(folder / "vae", folder / "vae"),
    }
    found = {name: (component_files(folder / name)[0], load) for name, load in loaders.items()}
    found["sla"] = file, lambda: load_sla(build_transformer(), file)
    for _, load in found.values():
        load()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("component", ["transformer", "text_encoder", "vae", "sla"])
def test_every_damage_of_every_component_is_refused(components, component, kind):
    """A text encoder that lacked a tensor ran with random weights, and one NaN in the VAE made a black video."""
    file, load = components[component]
    whole = file.read_bytes()
    try:
        for place in range(PLACES):
            damage(file, kind, place)
            assert file.read_bytes() != whole
            with pytest.raises(WeightsError) as refused:
                load()
            assert "\n" not in str(refused.value) and str(file.parent) in str(refused.value)
            file.write_bytes(whole)
    finally:
        file.write_bytes(whole)


def test_a_changed_byte_of_sla_weights_is_refused(components):
    """It is a number as good as the one that was there, which only the hash in the file's metadata can tell."""
    file, load = components["sla"]
    whole = file.read_bytes()
    for place in (len(whole) - 1, len(whole) // 2):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(WeightsError, match="changed since it was written"):
            load()
    file.write_bytes(whole)


def unlisted(file):
    """The tensors and the metadata of an SLA file as slagen wrote it before it listed them."""
    metadata, tensors = read_sla(file)
    fields = {name: value for name, value in vars(metadata).items() if not name.startswith(("tensors", "layer_"))}
    fields |= {"format_version": 1, "config": metadata.config.to_dict()}
    return tensors, {"slagen": json.dumps(fields)}


def test_sla_weights_without_a_list_load_with_a_note(components, folder):
    file, load = components["sla"]
    whole = file.read_bytes()
    config = GenerateConfig("a red circle", model=str(folder), weights=str(file), device="cpu")
    assert not any("list its tensors" in note for note in find_weights(config).notes)
    tensors, metadata = unlisted(file)
    try:
        save_file(tensors, file, metadata=metadata)
        assert load().tensors is None
        assert "tensors_hash" not in describe(str(file)).metadata
        assert any("list its tensors" in note for note in find_weights(config).notes)
        others = find_weights(GenerateConfig("-", device="cpu")).notes
        assert not any("list its tensors" in note for note in others)
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("name", ["blocks.1.attn1.to_q.weight", "blocks.0.ffn.net.2.bias", "proj_out.weight"])
def test_a_gap_in_sla_weights_without_a_list_is_refused(components, name):
    """Of all the tensors of such a file one that is missing would be the base's, without a word."""
    file, load = components["sla"]
    whole = file.read_bytes()
    tensors, metadata = unlisted(file)
    del tensors[name]
    try:
        save_file(tensors, file, metadata=metadata)
        with pytest.raises(WeightsError, match=f"{name} is missing"):
            load()
    finally:
        file.write_bytes(whole)


@pytest.fixture
def hub_requests(monkeypatch):
    """The names that were looked up while a test ran: a request to the hub begins so."""
    asked = []

    def look_up(host, *_, **__):
        asked.append(host)
        raise socket.gaierror("the network is closed")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return asked


@pytest.mark.parametrize("text", ['"x"', "3", "null", "[]", '{"_class_name": 3}', '"owner/name"'])
@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"])
def test_a_damaged_config_asks_no_hub(folder, hub_requests, name, text):
    """diffusers takes a scheduler_config.json of "x" for the hub id x, local_files_only or not."""
    file = folder / name
    whole = file.read_text()
    file.write_text(text)
    try:
        load(folder)
    except WeightsError as error:
        assert name.split("/")[0] in str(error)
    finally:
        file.write_text(whole)
    assert not hub_requests


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated:UserWarning:huggingface_hub")
def test_a_closed_hub_is_not_asked(hub_requests):
    """Whatever else in a file a library may take for a hub id."""
    with closed_hub(), pytest.raises(OSError):
        UniPCMultistepScheduler.load_config("owner/name")
    assert not hub_requests and not constants.is_offline_mode()


def test_a_tokenizer_of_another_model_is_refused(folder):
    """Its words would be looked up beyond the end of the embedding, or be other words."""
    file = folder / "tokenizer" / "tokenizer.json"
    whole = file.read_text()
    file.write_text(whole.replace('"circle": 5', '"circle": 5, "square": 6'))
    try:
        with pytest.raises(WeightsError, match="has 7 tokens, but the text encoder has only 6"):
            load(folder)
    finally:
        file.write_text(whole)


def decoded(vae, latents):
    with torch.no_grad():
        return decode_latents(vae, latents)


def test_a_video_of_one_colour_or_none_is_named():
    """Weights that are finite and of the right shape can be wrong all the same; black may be what was asked for."""
    vae, latents = build_pipeline().vae, torch.zeros(1, 4, 2, 4, 4)
    assert len(decoded(vae, torch.randn(1, 4, 2, 4, 4)).unique()) > 1
    with pytest.raises(SlagenError, match="NaN or Inf") as error:
        decoded(vae, latents + torch.inf)
    assert error.value.exit_code == 1
    torch.nn.init.zeros_(vae.decoder.conv_out.weight)
    with pytest.raises(WeightsError, match="one constant colour"):
        decoded(vae, latents)
    torch.nn.init.constant_(vae.decoder.conv_out.bias, -2.0)
    assert not decoded(vae, latents).any()
    bundled = load_vae(bundled_folder() / "vae", bundled_folder() / "vae")
    torch.nn.init.zeros_(bundled.decoder.conv_out.weight)  # its biases are a pattern of 2 x 2 pixels
    with pytest.raises(WeightsError, match="one constant colour"):
        decoded(bundled, torch.randn(1, 16, 2, 4, 4))


def test_a_black_video_is_told(monkeypatch):
    session = Session.__new__(Session)
    session.pipe, session.about, session.placement = build_pipeline(), None, None
    torch.nn.init.zeros_(session.pipe.vae.decoder.conv_out.weight)
    torch.nn.init.constant_(session.pipe.vae.decoder.conv_out.bias, -2.0)
    monkeypatch.setattr(
        Session, "denoise", lambda *given, **options: (torch.zeros(1, 4, 2, 4, 4), SimpleNamespace(steps=[]))
    )
    told = []
    plan = SimpleNamespace(
        config=GenerateConfig("a red circle", seed=7), schedule=SimpleNamespace(by_step=None),
        weights=SimpleNamespace(device=torch.device("cpu")), picture=None,
    )  # fmt: skip
    session.sample(plan, {}, StageClock(), told.append)
    assert [event.text for event in told if event.kind == "warning"] == [
        "every pixel of the video with seed 7 has the same colour, RGB 0, 0, 0"
    ]


def test_weights_beyond_float16_are_refused_in_float16(folder, components):
    """bfloat16 holds 1e30, and float16 would make infinity of it."""
    for component in ("transformer", "text_encoder"):
        file, _ = components[component]
        whole, tensors = file.read_bytes(), load_file(file)
        next(iter(tensors.values())).view(-1)[0] = 1e30
        save_file(tensors, file, metadata={"format": "pt"})
        try:
            with pytest.raises(WeightsError, match="beyond the range of float16"):
                load_pipeline(describe_folder(folder, "toy"), torch.float16)
        finally:
            file.write_bytes(whole)
