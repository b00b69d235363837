"""The command line: what it hands to the task, what it says, and how it exits."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from wan_models import save_pipeline

import slagen
from slagen.cli.main import run
from slagen.cli.progress import NOTHING_KEPT
from slagen.errors import SlagenError, WeightsError
from slagen.generation.config import GenerateConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def seen(monkeypatch):
    """Replace the task and the look at its paths; collects the configs it is called with."""
    import slagen.generation.generate as task

    configs: list[GenerateConfig] = []

    def stub(config, on_event):
        configs.append(config)
        return task.GenerateResult([])

    monkeypatch.setattr(task, "generate", stub)
    monkeypatch.setattr("slagen.generation.preflight.check_run", lambda config: None)
    monkeypatch.setattr("slagen.cli.output.generate.show_videos", lambda *given: None)
    return configs


def test_no_flag_is_needed(seen):
    assert run(["generate", "a red circle"]) == 0
    assert seen == [GenerateConfig("a red circle")]


@pytest.mark.parametrize(
    "command, message",
    [
        ("generate --prompts p.txt --dry-run", "Give one prompt"),
        ("generate --prompts p.txt --overwrite", "Leave --overwrite out"),
        ("generate x --dry-run --verbose", "--verbose prints the steps of a single video. Leave it out."),
        (
            "finetune --model tiny-wan --lr 1 --json data videos --output o",
            "options before data have no effect: --model, --lr, --json",
        ),
        ("generate a --size 0x480", "Try --size 832x480"),
        ("bench --device cpu --output {file}/bench", "Not a directory"),
        ("merge {file} {file}/x.safetensors --diff-base {file} --diff-target {file}", ""),
    ],
)
def test_what_would_have_no_effect_or_no_place_is_refused(tmp_path, capsys, command, message):
    (tmp_path / "file").write_text("")
    assert run(command.format(file=tmp_path / "file").split()) in (1, 2, 5)
    told = " ".join(capsys.readouterr().err.split())
    assert message in told and "a bug in slagen" not in told


def test_every_option_reaches_the_config(seen):
    options = """--negative-prompt blur --model m --weights w --allow-untrained --attention sparse --backend torch
        --sparsity 0.9 --steps 7 --guidance-scale 2.5 --flow-shift 4 --seed 11 --num-frames 17 --size 128x64 --fps 9
        --num-videos 2 --dtype bf16 --device cpu --timing step --save-latents --output o --overwrite"""
    assert run(["generate", "--prompt", "x", *options.split()]) == 0
    assert seen == [
        GenerateConfig(
            "x", model="m", weights="w", allow_untrained=True, attention="sparse", backend="torch", sparsity=0.9,
            negative_prompt="blur", width=128, height=64, num_frames=17, fps=9, steps=7, guidance_scale=2.5,
            flow_shift=4.0, seed=11, num_videos=2, dtype="bf16", device="cpu", timing="step", output="o",
            save_latents=True, overwrite=True,
        )
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--sla_topk 0.1", "sla_topk", 0.1),
        ("--topk 0.1", "sla_topk", 0.1),
        ("--num_inference_steps 9", "steps", 9),
        ("--sample_steps 9", "steps", 9),
        ("--num_steps 9", "steps", 9),
        ("--frame_num 17", "num_frames", 17),
        ("--sample_guide_scale 3", "guidance_scale", 3.0),
        ("--sample_shift 8", "flow_shift", 8.0),
        ("--base_seed 5", "seed", 5),
        ("--attn_mode dense", "attention", "dense"),
        ("--ckpt_dir x", "model", "x"),
        ("--dit_path x", "weights", "x"),
        ("--save_file x.mp4", "output", "x.mp4"),
        ("--size 64*32", "width", 64),
        ("--seed -1", "seed", None),
        ("-n dull", "negative_prompt", "dull"),
    ],
)
def test_the_peers_spellings(seen, words, field, value):
    assert run(["generate", "x", *words.split()]) == 0
    assert getattr(seen[0], field) == value


def test_the_peers_spellings_stay_out_of_the_help(capsys):
    run(["generate", "--help"])
    text = capsys.readouterr().out
    assert "--sparsity" in text and "--num-inference-steps" not in text and "frame_num" not in text


def test_the_prompt_from_stdin(seen, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a blue star\n"))
    assert run(["generate", "-"]) == 0
    assert seen[0].prompt == "a blue star"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "--prompt", "y"], "given twice"),
        (["generate", "   "], "prompt is empty"),
        (["generate", "x", "--sparsity", "1.5"], "sparsity is 1.5"),
        (["generate", "x", "--sparsity", "nan"], "sparsity is nan"),
        (["generate", "x", "--num-frames", "80"], "--num-frames 81"),
        (["generate", "x", "--size", "big"], "--size 832x480"),
        (["generate", "x", "--sparsity", "0.9", "--sla-topk", "0.1"], "Give one of them"),
        (["generate", "x", "--attention", "flash"], "flash"),
        (["generate", "x", "--sparsty", "0.9"], "--sparsity"),
        (["generate", "x", "--steps", "many"], "--steps"),
        (["generat", "x"], "generate"),
        (["generate", "--steps", "5"], "no prompt is given"),
    ],
)
def test_wrong_usage_is_one_message_and_exit_2(seen, capsys, arguments, words):
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert words in re.sub(r"\s+", " ", err) and out == "" and "Traceback" not in err
    assert not seen


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("generate x --seed abc", "--seed is 'abc', but must be a whole number. See slagen generate --help."),
        ("generate x --seed 99999999999999999999999",
         "seed is 99999999999999999999999, but must be from 0 to 2**63 - 1. Try --seed 42."),
        ("generate x --steps 99999999999999999999999",
         "--steps is 99999999999999999999999, but must be between -2**63 and 2**63. See slagen generate --help."),
        ("generate x --cfg inf", "--guidance-scale is inf, but must be a finite number. See slagen generate --help."),
        ("bench --seconds nan", "--seconds is nan, but must be a finite number. See slagen bench --help."),
        ("generate x --cfg much", "--cfg is 'much', but must be a number. See slagen generate --help."),
        ("generate x --backend fast",
         "--backend is 'fast', but must be one of auto, reference, torch, triton, sdpa, sdpa-flash, sdpa-cudnn, "
         "sdpa-efficient, sdpa-math, flash-attn, sage, flashinfer. See slagen generate --help."),
        ("generat x", "No such command 'generat'. Did you mean 'generate'? See slagen --help."),
        ("generate x --sed 3",
         "No such option: --sed. Did you mean --seed? See slagen generate --help."),
        ("generate x --sample_steps abc",
         "--sample_steps is 'abc', but must be a whole number. See slagen generate --help."),
        ("finetune --learning_rate=abc", "--learning_rate is 'abc', but must be a number. See slagen finetune --help."),
        ("generate x --num_steps", "Option '--num_steps' requires an argument. See slagen generate --help."),
        ("generate x --a[ 3", "No such option: --a[. See slagen generate --help."),
        ("batch p.txt --fry 3", "No such option: --fry. See slagen batch --help."),
        ("batch p.txt --lora_configs a",
         "--lora_configs is an option of other tools that slagen does not have: give every LoRA file with its scale: "
         "--lora FILE:SCALE."),
        ("batch p.txt --num-videos 2",
         "slagen batch has no --num-videos. Put --num-videos on a line of the file, or run slagen generate --prompts "
         "FILE --num-videos 2."),
        ("generate x --seed", "Option '--seed' requires an argument. See slagen generate --help."),
        ("generate a b", "Unexpected arguments: b. Put a prompt of several words in quotes."),
        ("models x", "Unexpected arguments: x. See slagen models --help."),
    ],
)  # fmt: skip
def test_wrong_usage_is_told_in_plain_sentences_that_end_once(capsys, command, told):
    """A parser's words leaked ("Value error, 'x' is not one of ...", "unable to parse string"), and "?. See"."""
    assert run(command.split()) == 2
    assert re.sub(r"\s+", " ", capsys.readouterr().err).strip() == f"error: {told}"


def test_a_command_without_arguments_shows_its_help_as_it_is(capsys):
    """It ended with a full stop of its own: "[default: layer].\"."""
    assert run(["batch", "--help"]) == 0
    text = capsys.readouterr().out
    assert run(["batch"]) == 2
    assert capsys.readouterr().err.strip() == text.strip()


def test_the_output_of_a_batch_is_a_folder(capsys):
    run(["batch", "--help"])
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "--output <str> The folder for the videos" in shown and "ends in .mp4" not in shown


@pytest.mark.parametrize(("error", "code"), [(SlagenError("a"), 1), (WeightsError("b"), 5), (KeyError("c"), 1)])
def test_errors_become_a_line_and_a_code(monkeypatch, capsys, error, code):
    def fail(config, on_event):
        raise error

    monkeypatch.setattr("slagen.generation.generate.generate", fail)
    assert run(["generate", "x"]) == code
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("SLAGEN_DEBUG", "1")
    assert run(["generate", "x"]) == code
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_130(monkeypatch, capsys):
    def interrupt(config, on_event):
        raise KeyboardInterrupt

    monkeypatch.setattr("slagen.generation.generate.generate", interrupt)
    assert run(["generate", "x"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "told"), [
    (1, "Videos complete: 0 of 3. To generate the rest, run the same command with --seed 5 --num-videos 3."),
    (2, "Videos complete: 1 of 3. To generate the rest, run the same command with --seed 6 --num-videos 2."),
])  # fmt: skip
def test_an_interrupt_says_what_is_kept_and_how_to_go_on(tmp_path, monkeypatch, capsys, number, told):
    folder, begun = save_pipeline(tmp_path / "pipe"), []

    def interrupt(progress, event):
        begun.extend([event.text] if event.kind == "stage" and event.text == "decode" else [])
        if len(begun) == number:
            raise KeyboardInterrupt

    monkeypatch.setattr("slagen.cli.progress.GenerateProgress.__call__", interrupt)
    flags = ["--size", "64x64", "--num-frames", "9", "--steps", "1", "--allow-untrained", "--seed", "5"]
    arguments = ["generate", "x", "--model", str(folder), *flags, "-o", str(tmp_path / "o"), "--num-videos", "3"]
    assert run(arguments) == 130
    assert told in " ".join(capsys.readouterr().err.split())
    assert len(list((tmp_path / "o").glob("*.mp4"))) == number - 1


INTERRUPTED = {
    "replay": (["replay", "v.mp4"], "generation.replay.replay"),
    "decode": (["decode", "l.safetensors"], "generation.decode.decode"),
    "compare": (["compare", "x"], "comparison.run.compare"),
    "attention": (["attention", "x"], "maps.run.draw"),
    "bench": (["bench"], "benchmark.run.bench"),
    "finetune": (["finetune", "--data", "d"], "training.finetune.finetune"),
}


@pytest.mark.parametrize("command", INTERRUPTED)
def test_every_long_command_tells_of_an_interrupt(monkeypatch, capsys, command):
    """A note of the task says what is kept; without one, nothing is."""
    arguments, task = INTERRUPTED[command]
    for check in (
        "provenance.needed_all_of_torch",
        "latents.read_about",
        "preflight.check_model",
        "preflight.check_steps",
    ):
        monkeypatch.setattr(f"slagen.generation.{check}", lambda *given, **options: None)
    monkeypatch.setattr("slagen.training.preflight.check_training", lambda config: None)
    for kept in ("Step 3 of 9 is saved in o. Run the same command again to resume.", ""):

        def interrupt(*given, kept=kept, **options):
            stop = KeyboardInterrupt()
            stop.__notes__ = [kept] * bool(kept)
            raise stop

        monkeypatch.setattr(f"slagen.{task}", interrupt)
        assert run(arguments) == 130
        err = " ".join(capsys.readouterr().err.split())
        assert f"error: interrupted while starting. {kept or NOTHING_KEPT}" in err and err.count("error:") == 1


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"slagen {slagen.__version__}\n"


def test_result_on_stdout_and_the_rest_on_stderr(tmp_path, capsys):
    folder = save_pipeline(tmp_path / "pipe")
    flags = ["--size", "64x64", "--num-frames", "9", "--steps", "1", "--allow-untrained", "--seed", "3",
             "-n", "a " * 600]  # fmt: skip
    arguments = ["generate", "a red [circle]", "--model", str(folder), *flags, "-o", str(tmp_path / "o")]
    assert run(arguments) == 0
    out, err = capsys.readouterr()
    path = Path(out.strip())
    assert re.fullmatch(r"0001-a-red-circle-s3-[0-9a-f]{8}\.mp4", path.name) and path.is_file()
    assert "uses dense attention" in err and "peak memory" not in err
    what, times, more = err.splitlines()[-3:]
    assert re.fullmatch(rf"{re.escape(out.strip())}: 9 frames, \d\.\d s of 64x64, \d+ KiB, seed 3", what)
    assert re.fullmatch(r"[\d.]+ s: .*denoise [\d.]+ \(measured: \d+% attention\).*", times)
    assert more == f"Details: slagen info {path}. To make it again: slagen replay {path}"
    for file in (path, path.with_suffix(".json")):  # with the times, which are in the report only
        assert run(["info", str(file)]) == 0
        told = capsys.readouterr().out
        assert "attention ms" in told and "peak memory" in told and "settings.seed" in told
    path.with_suffix(".json").unlink()
    assert run(["info", str(path)]) == 0 and "peak memory" not in capsys.readouterr().out
    assert run([*arguments, "--overwrite", "--verbose"]) == 0
    assert "peak memory" in (told := capsys.readouterr().err) and "attention ms" in told
    assert "the negative prompt 'a a" in err and "has 601 tokens, but the model reads only the first 512" in err
    assert run(arguments) == 2  # the same name again
    assert run([*arguments, "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["prompt"] == "a red [circle]"


@pytest.mark.slow
def test_ctrl_c_of_the_installed_command(tmp_path):
    """A real SIGINT while it denoises: one line, exit 130, no file under a final name."""
    folder = save_pipeline(tmp_path / "pipe")
    process = subprocess.Popen(
        [sys.executable, "-m", "slagen", "generate", "a red circle", "--model", str(folder), "--size", "512x512",
         "--num-frames", "33", "--steps", "500", "--allow-untrained", "-o", str(tmp_path / "o")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        # a shell that runs the tests in the background has its children ignore SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    while "key blocks" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=1800)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted" in err and "Traceback" not in err
    assert not list((tmp_path / "o").iterdir())
