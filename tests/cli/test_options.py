"""Options are fields: one place for each, other tools' words understood, and those that slagen lacks answered."""

import dataclasses

import pytest
import torch
from fresh import import_anew

import slagen
from slagen.batch.config import BatchConfig
from slagen.benchmark.config import BenchConfig
from slagen.cli.main import run
from slagen.errors import UsageError
from slagen.generation import config, peers, sizes
from slagen.generation.config import GenerateConfig
from slagen.generation.prompts import read_prompts
from slagen.settings import changed, option, settings_of
from slagen.training import resume
from slagen.training.config import DataConfig, FinetuneConfig


@dataclasses.dataclass(frozen=True)
class Toy(GenerateConfig):
    """What one more line in config.py makes of GenerateConfig."""

    sparkle: int = option(0, "How much the video sparkles.", panel=config.VIDEO, prompt_line=True)


READERS = (
    "cli.main", "cli.app", "cli.generate", "cli.batch", "cli.info", "cli.finetune", "generation.prompts",
    "generation.report", "generation.resolve", "generation.recorded", "batch.queue",
)  # fmt: skip


@pytest.fixture
def toy(monkeypatch):
    """The modules that read GenerateConfig's fields, as they are where it has one more."""
    anew = import_anew(monkeypatch, *READERS)
    monkeypatch.setattr(config, "GenerateConfig", Toy)
    return anew


def test_a_new_option_of_generate_is_one_field(toy, tmp_path, capsys, monkeypatch):
    """In the help, on the command line, in a prompt file, in replay's list; in a job's key only where it is used."""
    cli = toy("cli.main")
    assert cli.run(["generate", "--help"]) == 0
    assert "How much the video sparkles." in capsys.readouterr().out
    seen = []
    monkeypatch.setattr("slagen.generation.generate.generate", lambda wanted, on_event: seen.append(wanted))
    monkeypatch.setattr("slagen.cli.output.generate.show_videos", lambda *given: None)
    assert cli.run(["generate", "x", "--sparkle", "3"]) == 0
    assert seen == [Toy("x", sparkle=3)]
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle --sparkle 2")
    [request] = toy("generation.prompts").read_prompts(str(file))
    assert request.fields == {"sparkle": 2}
    assert "sparkle" in toy("generation.recorded").AS_THEY_ARE
    resolve, not_in_key = toy("generation.resolve"), toy("batch.queue").NOT_IN_KEY
    for value in (0, 3):
        plan = resolve.make_plan(Toy("a red circle", seed=1, model="tiny-wan", device="cpu", sparkle=value))
        counted = {name: setting for name, setting in plan.settings.items() if name not in not_in_key}
        assert counted.get("sparkle") == (value or None)


def test_a_new_option_does_not_stop_a_training_that_was_begun_without_it(monkeypatch, tmp_path):
    monkeypatch.setitem(resume.DEFAULTS, "sparkle", 0)
    resume.compare_settings({"lr": 1.0}, {"lr": 1.0, "sparkle": 0}, tmp_path, but=())
    with pytest.raises(UsageError, match="sparkle was 0 and is now 3"):
        resume.compare_settings({"lr": 1.0}, {"lr": 1.0, "sparkle": 3}, tmp_path, but=())


def test_every_field_of_a_config_has_a_help_or_is_no_option():
    without = {
        (kind.__name__, setting.field)
        for kind in (GenerateConfig, BatchConfig, BenchConfig, DataConfig, FinetuneConfig)
        for setting in settings_of(kind) if not setting.about.help
    }  # fmt: skip
    assert without == {
        ("GenerateConfig", "prompt"), ("GenerateConfig", "attention_options"), ("BatchConfig", "prompts"),
        ("BatchConfig", "generate"), ("FinetuneConfig", "data"), ("BenchConfig", "attention_options"),
        ("FinetuneConfig", "attention_options"),
    }  # fmt: skip


def test_what_counts_in_a_key():
    assert changed(GenerateConfig("x", seed=3, output="o", steps=4, timing="off")).keys() == {"prompt", "steps"}


SIZES = [
    ({}, (None, None)),
    ({"size": "832x480"}, (832, 480)),
    ({"size": " 832 * 480 "}, (832, 480)),
    ({"size": "480p"}, (832, 480)),
    ({"size": "720P", "aspect_ratio": "9:16"}, (720, 1280)),
    ({"resolution": "480", "aspect_ratio": "1:1"}, (640, 640)),
    ({"resolution": "720p", "aspect_ratio": "4,3"}, (960, 720)),
    ({"width": 64, "height": 32}, (64, 32)),
    ({"width": 64}, (64, None)),  # which the config refuses
]


@pytest.mark.parametrize(("given", "wanted"), SIZES, ids=lambda value: str(value))
def test_sizes(given, wanted):
    assert sizes.clip_size(**given) == wanted


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"size": "832x480", "width": 832}, "--size and --width and --height each set the size"),
        ({"size": "480p", "resolution": "480p"}, "--size and --resolution each set the size"),
        ({"aspect_ratio": "16:9"}, "Add --resolution"),
        ({"size": "832x480", "aspect_ratio": "16:9"}, "Add --resolution"),
        ({"resolution": "1080p"}, "must be 480p or 720p"),
        ({"resolution": "480p", "aspect_ratio": "21:9"}, "must be one of 16:9"),
        ({"size": "big"}, "Try --size 832x480"),
    ],
    ids=str,
)
def test_sizes_that_are_refused(given, words):
    with pytest.raises(UsageError, match=words):
        sizes.clip_size(**given)


def test_sizes_are_such_as_wan_makes():
    """Multiples of 16, landscape and portrait the same, and the ratio and area that the name says."""
    for tier, by_ratio in sizes.RESOLUTIONS.items():
        for ratio, (width, height) in by_ratio.items():
            x, y = map(int, ratio.split(":"))
            assert width % 16 == height % 16 == 0 and abs(width / height - x / y) < 0.05
            assert by_ratio[f"{y}:{x}"] == (height, width)
            assert min(width, height) >= int(tier[:-1])


TAKEN = {"--steps": True, "--seed": True, "--model": True, "--attention": True, "--height": True, "--width": True,
         "--sampler": True, "--dtype": True, "--prompt": True, "-p": True, "--ode": False}  # fmt: skip


def translated(line: str, **options) -> tuple[list[str], list[str]]:
    notes: list[str] = []
    return peers.translate(line.split(), TAKEN, notes.append, **options), notes


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("--num_steps 4 x", "--steps 4 x"),
        ("--num_steps=4", "--steps=4"),
        ("--seed -1 x", "--seed -1 x"),
        ("x -- --num_steps 4", "x -- --num_steps 4"),
        ("--prompt --image x", "--prompt --image x"),
        ("-p --image", "-p --image"),
        ("--ode --attention_type Original", "--ode --attention dense"),
        ("--scheduler UniPC", "--sampler unipc"),
        ("--dtype BFloat16", "--dtype bf16"),
        ("--video_size 480 832 x", "--height 480 --width 832 x"),
        ("--target_shape=480 832", "--height 480 --width 832"),
        ("--task t2v-1.3B x", "--model wan2.1-t2v-1.3b x"),
        ("--task t2v --model_path folder", "--model folder"),
        ("--task t2v-14B --ckpt_dir folder", "--model folder"),
        ("--model Wan2.1-14B", "--model wan2.1-t2v-14b"),
        ("--precision BFloat16 --attn_type sla --num_steps=4", "--dtype bf16 --attention sla --steps=4"),
        ("--steps", "--steps"),
        ("--unheard-of 3", "--unheard-of 3"),
    ],
)
def test_translation(line, wanted):
    assert translated(line) == (wanted.split(), [])


def test_sageattention_is_not_claimed():
    assert translated("--attention_type sagesla") == (
        ["--attention", "sla"],
        ["sagesla runs as sla attention, without SageAttention"],
    )
    assert translated("--attn_mode sageattn") == (
        ["--attention", "dense"],
        ["sageattn runs as dense attention, without SageAttention"],
    )
    notes: list[str] = []
    peers.translate(["--attention_backend", "SAGE_ATTN"], {"--attention": True, "--backend": True}, notes.append)
    said = "sage_attn runs as dense attention, without SageAttention; to use it, give --attention dense --backend sage"
    assert notes == [said]


TRAINER = dict.fromkeys(("--steps", "--lr", "--lora-rank", "--dtype", "--model", "--optimizer", "--batch-size"), True)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("--learning_rate 1e-5 --max_train_steps 9", "--lr 1e-5 --steps 9"),
        ("--mixed_precision bf16", "--dtype bf16"),
        ("--mixed_precision=no --optimizer_type AdamW8bit", "--dtype=fp32 --optimizer adamw8bit"),
        ("--optimizer_type Muon", "--optimizer muon"),
    ],
)
def test_options_of_other_trainers(line, wanted):
    assert peers.translate(line.split(), TRAINER, pytest.fail) == wanted.split()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("max_train_epochs", "set the length of training with --steps"),
        ("network_dim", "--train lora --lora-rank N"),
        ("network_module", "--train selects what is trained"),
        ("lora", "--train lora --lora-rank N"),
        ("dataset_config", "--data names"),
        (
            "gradient_accumulation_steps",
            "--batch-size is the number of clips per step over all processes; --micro-batch",
        ),
        ("lr_scheduler", "rises over --warmup-steps"),
        ("resume", "to resume, run the same command again"),
        ("num_gpus", "torchrun --nproc-per-node N"),
        ("fp8_scaled", "fp8"),
    ],
)
def test_what_fine_tuning_says_of_options_of_other_trainers(option, words):
    with pytest.raises(UsageError, match=words):
        peers.translate([f"--{option}", "3"], TRAINER, pytest.fail)


def test_a_group_leaves_what_is_behind_its_command():
    assert translated("--num_steps 4 data --image x", is_group=True)[0] == ["--steps", "4", "data", "--image", "x"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (
            "--last_frame a.png",
            "is an option of other tools .* FLF2V, with a last image",
        ),
        ("--Offload_Model True", "offloads parts of the model automatically"),
        ("--lora_configs=a", "--lora FILE:SCALE"),
        ("--steps 3 --infer_steps 4", "--steps and --infer-steps are the same option"),
        ("--task i2v-A14B", "Wan2.2, with its two transformers, is not supported"),
        ("--task s2v", "t2v-1.3b or t2v-14b"),
        ("--video_size 480", "needs two numbers"),
        ("--task vace-1.3B", "task is 'vace-1.3B', but VACE is not supported yet. Try --task t2v-1.3b"),
        ("--task t2i-14B", "images are not supported: slagen generates videos"),
        ("--quantization fp8", "fp8 and int8 weight files"),
        ("--sdpa", "--attention dense is full attention"),
        ("--xformers", "xFormers is not used; --attention dense is full attention"),
        ("--flash_attn", "--attention dense --backend flash-attn"),
        ("--STA-mode x", "is not supported; slagen methods"),
        ("--enable-vae-tiling", "in tiles of 256x256 pixels with --vae-tiling on"),
        ("--video in.mp4", "video-to-video"),
        ("--model_type x", "choose the model with --model"),
        ("--nproc 2", "start torchrun --nproc-per-node N -m slagen generate"),
        ("--ulysses-degree 2", "start torchrun --nproc-per-node N -m slagen generate"),
        ("--ring_degree 2", "key blocks are chosen among all of them"),
        ("--dit_fsdp", "each of them holds the whole model"),
        ("--dit-precision bf16", "slagen computes in"),
        ("--vae-precision fp16", "slagen computes in"),
        ("--embedded-cfg-scale 6", "no embedded guidance"),
        ("--enable_model_cpu_offload", "offloads parts of the model automatically"),
        ("--enable_cfg true", "if --guidance-scale is above 1"),
        ("--low_noise_checkpoint x", "Wan2.2"),
        ("--save_merged_model a", "--lora FILE:SCALE"),
    ],
)
def test_what_is_refused_with_the_reason(line, words):
    with pytest.raises(UsageError, match=words):
        translated(line)


def test_a_name_means_one_thing():
    """No refused name is one that is understood, and every name leads to an option of generate."""
    training = {setting.name for setting in settings_of(FinetuneConfig)}
    assert set(peers.TRAINER_NAMES.values()) <= training
    assert not peers.TRAINER_REFUSED.keys() & (training | {*peers.TRAINER_NAMES, *peers.NAMES})
    own = {setting.name for setting in settings_of(GenerateConfig)} | {"prompts"}
    assert not peers.REFUSED.keys() & ({*peers.NAMES, *peers.LETTERS, *peers.HEIGHT_FIRST} | own)
    assert {*peers.NAMES.values(), *peers.LETTERS.values()} <= own
    assert all("." not in reason[-1:] and "\n" not in reason for reason in peers.REFUSED.values())


@pytest.mark.parametrize("command", ["generate x", "batch p.txt", "plan x", "bench", "finetune"])
def test_no_wrong_guess(capsys, command):
    from slagen.cli.main import run

    assert run([*command.split(), "--ulysses_size", "8"]) == 2
    err = capsys.readouterr().err
    assert "to generate one video on N GPUs" in " ".join(err.split()) and "Did you mean" not in err


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("a --w 832 --h 480", {"width": 832, "height": 480}),
        ("a --resolution 480p --aspect_ratio 9:16", {"width": 480, "height": 832}),
        ("a --size 720p", {"width": 1280, "height": 720}),
        ("a --seed -1", {}),
        ("a --ei x", "FLF2V"),
        ("a --i x", {"image": "x"}),
        ("a --size 480p --w 832 --h 480", "each set the size of the video"),
    ],
)
def test_lines_of_a_prompt_file(tmp_path, line, fields):
    from slagen.generation.prompts import read_prompts

    file = tmp_path / "p.txt"
    file.write_text(line)
    if isinstance(fields, str):
        with pytest.raises(UsageError, match=fields):
            read_prompts(str(file))
    else:
        assert read_prompts(str(file))[0].fields == fields


def test_keep_is_one_minus_sparsity(tmp_path):
    """In a prompt file and in Python too; of every method that has a sparsity."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x", "keep": 0.29}\n{"prompt": "x", "sparsity": 0.71}\n{"prompt": "x", "keep": 1}\n')
    assert [request.fields for request in read_prompts(str(file))] == [
        {"sparsity": 0.71}, {"sparsity": 0.71}, {"sparsity": 0.0},
    ]  # fmt: skip
    q, k, v = torch.randn(3, 1, 1, 160, 8, generator=torch.Generator().manual_seed(0))
    kept = slagen.attend("mean", q, k, v, keep=0.34, block_m=16, block_n=16)
    assert torch.equal(kept, slagen.attend("mean", q, k, v, sparsity=0.66, block_m=16, block_n=16))
    with pytest.raises(TypeError, match="no argument 'keep'"):
        slagen.attend("sol", q, k, v, keep=0.1)


@pytest.mark.parametrize("keep", [0, 1.5, float("nan"), True, "a few"])
def test_what_keep_cannot_be(keep):
    with pytest.raises(UsageError, match=r"keep is .*, but must be a number above 0 and at most 1. Try --keep 0.05"):
        slagen.generate("x", keep=keep)


@pytest.mark.parametrize("command", ["generate x", "plan x", "batch p.txt", "bench", "finetune --data d"])
def test_keep_and_sparsity_are_not_both_given(command, capsys):
    assert run([*command.split(), "--keep", "0.1", "--sparsity", "0.9"]) == 2
    assert "are both given, but keep is 1 - " in capsys.readouterr().err


def test_a_prompt_file_says_where_keep_is_wrong(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a circle --keep 0.1 --sparsity 0.9\na circle --keep 0\n")
    with pytest.raises(UsageError, match="keep and sparsity are both given") as caught:
        read_prompts(str(file))
    assert "keep is 0.0, but must be" in str(caught.value)
