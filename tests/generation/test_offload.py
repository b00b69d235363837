"""Where a model's parts are during a run: chosen from free memory, told with the reason, without effect on pixels."""

import dataclasses
from contextlib import nullcontext

import accelerate
import pytest
import torch
from fake_cuda import CARD, fake_card
from wan_models import build_pipeline

from slagen.attention.sla.config import SLAConfig
from slagen.cli.main import run as command
from slagen.errors import SlagenError, UsageError
from slagen.formats.layouts import LINEARS_OF_A_BLOCK
from slagen.formats.quantised import Codes
from slagen.formats.quantised_linear import keep_quantised
from slagen.generation import placing
from slagen.generation.config import GenerateConfig
from slagen.generation.offload import Placement, choose, next_setting, of_published
from slagen.generation.resolve import make_plan
from slagen.generation.session import Session
from slagen.wan.caches import read_cache
from slagen.wan.caching import caching
from slagen.wan.install import apply_sla
from slagen.wan.placement import place, release_text_encoder
from slagen.wan.presets import PRESETS

CPU = torch.device("cpu")
GIB = 2**30
is_linear = LINEARS_OF_A_BLOCK.fullmatch
SIZES = {"480p": (832, 480, 81), "720p": (1280, 720, 81)}
# By GB of the card, of which half a GiB is taken: 1.3B at 480p and 720p, 14B at 480p and 720p; + decodes in tiles.
CHOSEN = {
    8: ("group +", "sequential +", "sequential +", "sequential +"),
    12: ("model +", "model +", "group +", "sequential +"),
    24: ("none", "none +", "group", "group +"),
    48: ("none", "none", "none", "model"),
    80: ("none", "none", "none", "none"),
    141: ("none", "none", "none", "none"),
}


@pytest.mark.parametrize("card", CHOSEN)
def test_what_is_chosen_on_a_card(card):
    free = int((card - 0.5) * GIB)
    videos = [(model, size) for model in ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b") for size in SIZES.values()]
    for (model, size), expected in zip(videos, CHOSEN[card], strict=True):
        sizes = of_published(PRESETS[model].shape, size)
        found = choose(sizes, free)
        assert f"{found.offload}{' +' * found.tiling}" == expected
        peak = max(sizes.peaks(found.offload, found.tiling, False).values()) / GIB
        assert f"about {peak:.1f} GiB" in found.reason and f"{card - 0.5} GiB are free" in found.reason
        assert "\n" not in found.reason and ("may not be enough" in found.reason) == (peak + 0.75 > card - 0.5)


def test_what_is_asked_for_is_done():
    sizes = of_published(PRESETS["wan2.1-t2v-14b"].shape, SIZES["480p"])
    asked = choose(sizes, 10 * GIB, "none", "off")
    assert (asked.offload, asked.tiling) == ("none", False) and "may not be enough" in asked.reason
    assert choose(sizes, 80 * GIB, "group", "on").reason.startswith("offload group with VAE tiling (one block")
    assert choose(sizes, 20 * GIB, vae_tiling="off").tiling is False
    assert choose(sizes, 20 * GIB, whole=True).offload == "model"
    known = dataclasses.replace(sizes, text=0, largest=0)  # every prompt is known
    assert max(known.peaks("none", True, False), key=known.peaks("none", True, False).get) != "text"


def test_each_setting_leads_to_the_next():
    said, placement = [], Placement("none", False, "")
    while (advice := next_setting("denoise", placement)).startswith("Try --offload "):
        said.append(advice.removeprefix("Try --offload ").rstrip("."))
        placement = Placement(said[-1], False, "")
    assert said == ["model", "group", "sequential"] and "--num-frames" in advice
    assert next_setting("decode", placement) == "Try --vae-tiling on."
    assert next_setting("text", placement) == "Try --device cpu."
    assert "--offload" not in next_setting("denoise", Placement("none", False, ""), whole=True)


def test_offload_without_a_gpu_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, code, words in (("cpu", 2, "but --device is cpu"), ("auto", 4, "sees none. Leave --offload out")):
        assert command(["generate", "x", "--model", "tiny-wan", "--offload", "group", "--device", device]) == code
        said = " ".join(capsys.readouterr().err.split())
        assert words in said and said.count("error:") == 1
    assert command(["generate", "x", "--vae-tiling", "maybe"]) == 2


@pytest.mark.parametrize(
    ("offload", "quantised", "cached"),
    [("model", False, False), ("group", False, True), ("sequential", False, True), ("group", True, False),
     ("sequential", True, False)],
)  # fmt: skip
def test_moving_parts_changes_no_video(offload, quantised, cached, monkeypatch):
    """With the CPU in the card's place, whose hooks are the same; the text encoder is released in between."""
    layers = accelerate.cpu_offload  # which fails with the name that diffusers has for this device, cpu:0
    monkeypatch.setattr(accelerate, "cpu_offload", lambda part, device, **options: layers(part, CPU, **options))

    def latents(how):
        pipe = build_pipeline()
        apply_sla(pipe, SLAConfig(sparsity=0.6, block_m=16, block_n=16))
        if quantised:
            scale, tensors = torch.tensor(0.01), pipe.transformer.state_dict()
            codes = {name: Codes((x / scale).to(torch.int8), scale) for name, x in tensors.items() if is_linear(name)}
            keep_quantised(pipe.transformer, codes, torch.float32)
        place(pipe, CPU, how)
        embeds, negative = pipe.encode_prompt("a red circle", max_sequence_length=8, device=CPU)
        release_text_encoder(pipe)
        pipe.set_progress_bar_config(disable=True)
        skips = caching(pipe.transformer, read_cache("first-block:threshold=100"), 2) if cached else nullcontext()
        with torch.no_grad(), skips as count:
            found = pipe(
                prompt_embeds=embeds, negative_prompt_embeds=negative, height=64, width=64, num_frames=5,
                num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent",
            ).frames  # fmt: skip
        assert count is None or count.take() == [4, 2]
        return found, pipe.vae.decode(found, return_dict=False)[0]

    for one, other in zip(latents(offload), latents("none"), strict=True):
        assert torch.equal(one, other)


def test_a_video_in_tiles_has_all_its_frames(tmp_path, capsys):
    """On a CPU too, where it is asked for; at 64x64 there is one tile, so nothing else changes."""
    made = []
    for tiling in ("on", "off"):
        options = ["--model", "tiny-wan", "--size", "64x64", "--num-frames", "5", "--steps", "1", "--seed", "1"]
        path = str(tmp_path / f"{tiling}.mp4")
        assert command(["generate", "x", *options, "--device", "cpu", "--vae-tiling", tiling, "-o", path]) == 0
        made.append((tmp_path / f"{tiling}.mp4").read_bytes()[-1000:])
    assert made[0] == made[1]


def plan():
    return make_plan(GenerateConfig("a red circle", seed=1, model="tiny-wan", device="cpu"))


def on_card(plan):
    return dataclasses.replace(plan, weights=dataclasses.replace(plan.weights, device=CARD))


def test_the_model_is_placed_by_the_cards_free_memory(monkeypatch):
    made = plan()
    card, placed, said = fake_card(monkeypatch), [], []
    monkeypatch.setattr(placing, "place", lambda pipe, device, offload: placed.append((device, offload)))
    session = Session(made, pipe=build_pipeline())
    session.several = False
    for card.free_bytes in (80 * GIB, GIB // 2):
        session._place(on_card(made), said.append)
    assert placed == [(CARD, "none"), (CARD, "sequential")] and session.pipe.vae.use_tiling
    told = session.placement.to_record()
    assert (told.offload, told.vae_tiling, told.reason) == ("sequential", True, said[1].text)
    assert told.expected_gib.keys() == {"text", "denoise", "decode"} and min(told.expected_gib.values()) > 0
    assert [event.kind for event in said] == ["note", "note"] and "0.5 GiB are free" in said[1].text
    session._place(made, said.append)
    assert (
        session.placement.to_record().expected_gib is None and session.placement.reason == "the model runs on the CPU"
    )
    assert placed[-1] == (CPU, "none") and len(said) == 2
    compiled = dataclasses.replace(on_card(made), config=dataclasses.replace(made.config, compile=True))
    with pytest.raises(UsageError, match=r"--compile needs whole blocks .* offload sequential .* 0\.5 GiB are free"):
        session._place(compiled, said.append)


def test_out_of_memory_names_the_stage_and_the_next_setting(monkeypatch):
    made = plan()
    fake_card(monkeypatch).free_bytes = 3 * GIB
    session = Session(made, pipe=build_pipeline())
    session.several = False
    with pytest.raises(SlagenError) as told, session._within_memory("decode", on_card(made)):
        raise torch.OutOfMemoryError
    assert str(told.value) == (
        "the GPU ran out of memory in decoding at 128x128, 17 frames; 3.0 GiB were free before it. Try --vae-tiling on."
    )
