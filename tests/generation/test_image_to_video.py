"""Image-to-video: the latents are diffusers' own, and an image that is none is refused before anything is loaded."""

import hashlib
import json

import numpy as np
import public_forms as forms
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from wan_models import build_image_pipeline, save_pipeline

from slagen.cli.main import run
from slagen.errors import UsageError, WeightsError
from slagen.formats.kinds import identify
from slagen.generation.config import GenerateConfig
from slagen.generation.generate import generate
from slagen.generation.picture import look_at
from slagen.generation.resolve import find_weights, make_plan
from slagen.generation.session import Session
from slagen.generation.stage_clock import StageClock
from slagen.wan.info import info

CLIP = {"width": 64, "height": 48, "num_frames": 9, "steps": 2, "seed": 3, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image") / "i2v"
    build_image_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """Of another aspect ratio than the clip."""
    path = tmp_path_factory.mktemp("image") / "a b.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 100, 3), dtype=np.uint8)).save(path)
    return path


def config(model, image, **others):
    settings = {"prompt": "a red circle", "model": str(model), "image": str(image), "device": "cpu", "no_cache": True}
    return GenerateConfig(**{**settings, **CLIP, "attention": "dense", **others})


class Runs:
    """The videos of configs, from one session; what it tells."""

    def __init__(self):
        self.session, self.told = None, []

    def latents(self, config):
        plan = make_plan(config)
        self.session = self.session or Session(plan)
        embeds, clock = self.session.encode(plan), StageClock()
        self.session.encode_image(plan, clock, self.told.append)
        return self.session.denoise(plan, embeds, self.told.append)[0]


def test_latents_are_those_of_diffusers(model, image):
    """Two seeds of one image, which is encoded once."""
    pipe = build_image_pipeline()
    pipe.set_progress_bar_config(disable=True)
    picture, runs = look_at(str(image)).cropped(CLIP["width"], CLIP["height"]), Runs()
    for seed in (3, 4):
        theirs = pipe(
            image=picture, prompt="a red circle", negative_prompt="", width=64, height=48, num_frames=9,
            num_inference_steps=2, guidance_scale=3.0, max_sequence_length=512, output_type="latent",
            generator=torch.Generator().manual_seed(seed),
        ).frames  # fmt: skip
        torch.testing.assert_close(runs.latents(config(model, image, seed=seed)), theirs, rtol=1e-4, atol=1e-4)
    assert [event.text for event in runs.told if event.kind == "stage"].count("image") == 1
    sparse = config(model, image, attention="sparse", sparsity=0.0, seed=4, allow_untrained=True)
    torch.testing.assert_close(Runs().latents(sparse), theirs, rtol=1e-4, atol=1e-4)


def test_stages_of_the_report_name_the_image(model, image):
    made = generate(config(model, image, num_videos=2), write=False)
    first, second = (video.record.stages_s for video in made.videos)
    assert first["image"] > 0 and "image" not in second


def test_the_image_changes_the_video_and_replay_wants_the_same(model, image, tmp_path, capsys):
    other = tmp_path / "other.png"
    Image.new("RGB", (100, 60), "red").save(other)
    options = ["--model", str(model), "--attention", "dense", "--size", "64x48", "--num-frames", "9", "--steps", "2"]
    options += ["--seed", "3", "--device", "cpu", "--no-cache"]
    output = tmp_path / "x.mp4"
    assert run(["generate", "a red circle", "--image", str(other), *options, "--output", str(output)]) == 0
    settings = json.loads(output.with_suffix(".json").read_text())["settings"]
    assert settings["image"] == "other.png"
    assert settings["image_sha256"] == hashlib.sha256(other.read_bytes()).hexdigest()
    assert run(["replay", str(output), "--model", str(model)]) == 0
    other.write_bytes(image.read_bytes())
    capsys.readouterr()
    assert run(["replay", str(output), "--model", str(model)]) == 2
    assert "other.png (SHA-256" in capsys.readouterr().err


def test_prompt_lines_have_images_of_their_own(model, image, tmp_path):
    first, other, prompts = (tmp_path / name for name in ("first.png", "other.png", "prompts.txt"))
    first.write_bytes(image.read_bytes())
    Image.new("RGB", (64, 48), "blue").save(other)
    prompts.write_text(f"a red circle --image {first}\na red circle --i {other}\n")
    options = ["--model", str(model), "--attention", "dense", "--size", "64x48", "--num-frames", "9", "--steps", "1"]
    command = ["batch", str(prompts), *options, "--device", "cpu", "--seed", "1", "--output", str(tmp_path / "out")]
    command += ["--cache-dir", str(tmp_path / "cache")]
    assert run(command) == 0
    reports = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("0*.json"))]
    assert [report["settings"]["image"] for report in reports] == ["first.png", "other.png"]
    assert len({report["latents_hash"] for report in reports}) == 2
    moved = tmp_path / "moved.png"
    other.rename(moved)  # the same image by another name is the same video
    prompts.write_text(f"a red circle --image {first}\na red circle --i {moved}\n")
    assert run(command) == 0
    assert len(list((tmp_path / "out").glob("0*.mp4"))) == 2


def test_the_size_is_that_of_the_image(model, image):
    weights = find_weights(config(model, image))
    plan = make_plan(config(model, image, width=None, height=None), weights)
    size = plan.config.width, plan.config.height
    assert size == (816, 480)  # 100 x 60, in the area of 832 x 480
    assert any("enlarged to 816x480" in text for text in plan.warnings)


def test_an_image_is_upright_and_opaque(tmp_path):
    turned, clear, deep = (tmp_path / name for name in ("turned.jpg", "clear.png", "deep.png"))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    left = Image.new("RGB", (64, 32), "black")
    left.paste("white", (0, 0, 32, 32))
    left.save(turned, exif=exif, quality=95)
    picture = look_at(str(turned))
    assert (picture.width, picture.height) == (32, 64)
    pixels = np.asarray(picture.cropped(32, 64))
    assert pixels[:28].mean() > 250 and pixels[36:].mean() < 5
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(clear)
    assert np.asarray(look_at(str(clear)).cropped(16, 16)).min() == 255
    Image.fromarray(np.full((32, 32), 0x8000, np.uint16)).save(deep)
    assert set(np.asarray(look_at(str(deep)).cropped(16, 16)).ravel()) == {128}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is a folder"),
        (lambda path: path.write_text("no image"), "is not an image that can be read"),
        (lambda path: path.write_bytes(b""), "is not an image that can be read"),
        (lambda path: Image.new("RGB", (8, 100)).save(path), "8x100 pixels, but both sides must be at least 16"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(make, words, model, tmp_path, capsys):
    path = tmp_path / "x.png"
    make(path)
    assert run(["generate", "a red circle", "--model", str(model), "--image", str(path)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len([text for text in said if text.startswith("error")]) == 1 and words in said[-1]


def test_a_broken_image_is_refused(image, tmp_path):
    path = tmp_path / "half.png"
    path.write_bytes(image.read_bytes()[:5000])
    with pytest.raises(UsageError, match="is broken"):
        look_at(str(path))


def test_models_and_images_go_together(model, image, tmp_path, capsys):
    text = save_pipeline(tmp_path / "t2v")
    assert run(["generate", "a red circle", "--model", str(text), "--image", str(image)]) == 2
    assert "t2v is a text-to-video model, which takes no image" in capsys.readouterr().err
    for command in (["generate", "x"], ["compare", "x"], ["attention", "x"], ["tune"], ["plan", "x"]):
        assert run([*command, "--model", str(model)]) == 2, command
        assert "i2v is an image-to-video model. It runs in slagen generate" in capsys.readouterr().err, command


def test_transformer_files_of_both_kinds(model, image, tmp_path):
    state = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    original = tmp_path / "wan.safetensors"
    save_file(forms.wan_image(state), original)
    assert identify(load_file(original)) == "image-to-video"
    assert info(str(original)).notes[0].startswith("it generates videos from an image")
    own, given = (Runs().latents(config(model, image, weights=each)) for each in (None, str(original)))
    torch.testing.assert_close(own, given, rtol=1e-4, atol=1e-4)
    text = save_pipeline(tmp_path / "t2v")
    with pytest.raises(WeightsError, match="is a text-to-video transformer, but i2v is no such model"):
        find_weights(config(model, image, weights=str(text / "transformer")))
    with pytest.raises(WeightsError, match="is an image-to-video transformer, but t2v is no such model"):
        find_weights(GenerateConfig("x", model=str(text), weights=str(original), attention="dense", device="cpu"))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("transformer/config.json", {"pos_embed_seq_len": 514}, "is Wan2.1 FLF2V"),
        ("transformer/config.json", {"image_dim": None}, "takes 12 channels, but the transformer of Wan2.1 image-to"),
        ("model_index.json", {"boundary_ratio": 0.9}, "Wan2.2 pipeline with two transformers"),
        ("image_encoder/config.json", {"model_type": "siglip"}, "contains a siglip"),
    ],
)
def test_other_models_are_named(file, changes, words, model, image, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    for path in model.rglob("*"):
        target = folder / path.relative_to(model)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        elif str(path.relative_to(model)) == file:
            target.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        else:
            target.symlink_to(path)
    with pytest.raises(WeightsError, match=words):
        generate(config(folder, image), write=False)


def test_a_lora_for_the_image_branch(model, image, tmp_path):
    """It changes image-to-video models; of a text-to-video model it matches nothing."""
    path, layer = tmp_path / "a.safetensors", "diffusion_model.blocks.0.cross_attn.k_img"
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    save_file({f"{layer}.lora_A.weight": draw(4, 32), f"{layer}.lora_B.weight": draw(32, 4)}, path)
    plain, changed = (Runs().latents(config(model, image, lora=loras)) for loras in ((), (str(path),)))
    assert (plain - changed).abs().max() > 1e-4
    text = save_pipeline(tmp_path / "t2v")
    with pytest.raises(WeightsError, match="changes no layer of t2v"):
        find_weights(GenerateConfig("x", model=str(text), lora=(str(path),), attention="dense", device="cpu"))
