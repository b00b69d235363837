"""slagen compare: every row is dense attention's own run again but for its attention; the JSON, the clip, bad input."""

import dataclasses
import json
import statistics

import numpy as np
import pytest
import torch
from wan_models import save_pipeline

from slagen.attention import registry
from slagen.cli.main import run as command
from slagen.comparison import quality
from slagen.comparison.config import CompareConfig
from slagen.comparison.result import Row, Runs, interval
from slagen.comparison.run import compare
from slagen.errors import UsageError
from slagen.generation.config import GenerateConfig
from slagen.video import read_mp4

COLUMNS = ["method", "sparsity", "velocity_error", "psnr_db", "ssim", "lpips", "attention_ms", "denoise_s"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return str(save_pipeline(tmp_path_factory.mktemp("toy") / "pipe", num_heads=2, head_dim=16))


def base(toy, folder, **changes):
    """3 x 8 x 8 tokens: twelve blocks of 16, three cubes of 4x4x4 in a frame's row of two."""
    fields = {"prompt": "a red circle", "width": 128, "height": 128, "num_frames": 9, "steps": 2, "seed": 3,
              "device": "cpu", "model": toy, "output": str(folder / "out"), "attention": "dense"}  # fmt: skip
    return GenerateConfig(**{**fields, **changes})


def test_every_registered_method_runs_and_dense_is_itself(toy, tmp_path):
    names = ("dense", *registry.names())
    config = CompareConfig(
        base(toy, tmp_path), names, (0.5,), {"block_m": 16, "block_n": 16, "dense_steps": "0%"}, repeats=1
    )
    result = compare(config)
    found = json.loads(result.path.read_text())
    assert [row["method"] for row in found["methods"]] == list(names)
    assert [row["method"] for row in found["controls"]] == ["random", "other-seed"]
    for row in found["methods"]:
        assert list(row)[:2] == COLUMNS[:2] and set(COLUMNS) <= set(row)
        without = ("linear", "sol", "radial", "nabla", "rettention")
        assert row["sparsity"] == {"dense": 0, **dict.fromkeys(without)}.get(row["method"], 0.5)
        assert row["denoise_s"] > 0 and 0 < row["attention_share"] < 1 and row["lpips"] is None
        assert len(row["layer_errors"]) == 2
        if row["method"] == "dense":
            assert row["velocity_error"] == row["latent_error"] == 0 and row["psnr_db"] is None and row["ssim"] == 1
            assert row["layer_errors"] == [0, 0] and row["density"] == 1
    by_name = {row["method"]: row for row in found["methods"]}
    assert by_name["sparse"]["velocity_error"] > 0 and by_name["sparse"]["latent_error"] > 0
    assert by_name["sparse"]["density"] == 0.5 and by_name["linear"]["density"] == 0
    assert by_name["sla"]["trained"] is False and by_name["sol"]["trained"] is None
    random, other = found["controls"]
    assert random["velocity_error"] > 0 and random["options"] == {"selector": "random", "dense_steps": "0%"}
    assert other["velocity_error"] is None and other["latent_error"] > 0
    clip = read_mp4(result.videos[0])
    assert len(clip) == 9 and clip.shape[2] > 6 * 128  # rows of six


def test_errors_are_those_of_a_hand_written_comparison(toy, tmp_path):
    """The velocity at the dense run's latents, both passes, all steps together."""
    from slagen.generation.resolve import make_plan
    from slagen.generation.session import Session

    config = CompareConfig(base(toy, tmp_path), ("sparse",), (0.75,), {"block_m": 16, "block_n": 16}, True, 1)
    (row,) = compare(config).rows
    plan = make_plan(base(toy, tmp_path))
    session, seen = Session(plan), []
    keep = lambda module, args, kwargs, output: seen.append((kwargs, output[0].clone()))  # noqa: E731
    handle = session.pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    embeds = session.encode(plan)
    dense, _ = session.denoise(plan, embeds, lambda event: None)
    handle.remove()
    sparse = make_plan(
        base(toy, tmp_path, attention="sparse", sparsity=0.75, block_m=16, block_n=16, allow_untrained=True)
    )
    session.use(sparse)
    with torch.no_grad():
        pairs = [(session.pipe.transformer(**kwargs)[0], expected) for kwargs, expected in seen]
    difference = sum((a - b).double().square().sum() for a, b in pairs)
    scale = sum(b.double().square().sum() for _, b in pairs)
    assert len(seen) == 4
    assert row.mean("velocity_error") == pytest.approx(float((difference / scale).sqrt()), rel=1e-5)
    latents, _ = session.denoise(sparse, embeds, lambda event: None)
    assert row.mean("latent_error") == pytest.approx(float((latents - dense).norm() / dense.norm()), rel=1e-5)
    session.use(plan)
    again, _ = session.denoise(plan, embeds, lambda event: None)
    assert torch.equal(again, dense)  # what was installed between has left nothing behind


def test_tuned_weights_run_in_their_rows_and_leave_dense_as_it_was(tmp_path, capsys):
    """The bundled model: its SLA weights overwrite the transformer's own. A control gives no warning."""
    code = command([
        "compare", "a red circle moving right", "--model", "tiny-wan", "--device", "cpu", "--methods", "sla,dense,sla",
        "--steps", "2", "--seed", "1", "--repeats", "1", "--json", "-o", str(tmp_path / "c.mp4"),
        "--size", "64x64", "--num-frames", "5",
    ])  # fmt: skip
    assert code == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    first, dense, again = found["methods"]
    assert [row["method"] for row in found["controls"]] == ["random", "other-seed"] and first["trained"] is True
    assert "selector" not in said.err
    assert dense["velocity_error"] == 0 and dense["latent_error"] == 0
    assert first["velocity_error"] == again["velocity_error"] > 0
    assert (tmp_path / "c.mp4").exists() and json.loads((tmp_path / "c.json").read_text()) == found


def test_a_sparsity_by_step(toy, tmp_path):
    """It is of the methods with a sparsity; delta's exact rows count once."""
    config = CompareConfig(
        base(toy, tmp_path), ("sparse", "mean", "sol"), (0.5,),
        {"block_m": 16, "block_n": 16, "sparsity_schedule": "1:0.75", "delta": 16}, repeats=1, no_controls=True,
    )  # fmt: skip
    assert [row.sparsity_schedule for row in config.rows] == ["1:0.75", "1:0.75", None]
    plain = compare(dataclasses.replace(config, attention={**config.attention, "sparsity_schedule": None}))
    rows, others = (json.loads(each.path.read_text())["methods"] for each in (compare(config), plain))
    assert rows[0]["options"] == {"sparsity_schedule": "1:0.75", "delta": 16}
    for row, other in zip(rows[:2], others[:2], strict=True):
        assert row["density"] == pytest.approx(1 / 16 + 15 / 16 * (0.5 + 0.25) / 2)
        assert other["density"] == pytest.approx(1 / 16 + 15 / 16 * 0.5)
        assert row["velocity_error"] != other["velocity_error"] and row["layer_errors"] != other["layer_errors"]
    assert rows[2]["velocity_error"] == others[2]["velocity_error"]


def test_averages_over_a_file_of_prompts(toy, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle --seed 1\na circle --seed 2 --steps 3\n")
    code = command([
        "compare", "--prompts", str(file), "--model", toy, "--device", "cpu", "--methods", "sparse,mean", "--sparsity",
        "0.5", "--block-m", "16", "--block-n", "16", "--steps", "2", "--size", "128x128", "--num-frames", "9",
        "--json", "-o", str(tmp_path / "out"), "--max-error", "1e-6",
    ])  # fmt: skip
    streams = capsys.readouterr()
    assert code == 6 and "above --max-error 1e-06: sparse 0.5" in streams.err
    found = json.loads(streams.out)
    assert [clip["seed"] for clip in found["prompts"]] == [1, 2]
    assert all((tmp_path / "out" / clip["video"]).exists() for clip in found["prompts"])
    sparse, mean = found["methods"]
    assert sparse["timed_runs"] == 2
    low, high = sparse["intervals"]["velocity_error"]
    assert low <= sparse["velocity_error"] <= high
    less = mean["less_first_sparse"]["velocity_error"]
    assert less["mean"] == pytest.approx(mean["velocity_error"] - sparse["velocity_error"])
    assert "less_first_sparse" not in sparse


def test_reference_is_timed_where_dense_is_no_row(toy, tmp_path):
    result = compare(CompareConfig(base(toy, tmp_path), ("mean",), (), {}, True, 2))
    assert len(result.reference.denoise_s) == 2 and result.reference not in result.rows
    expected = statistics.median(result.reference.denoise_s) / statistics.median(result.rows[0].denoise_s)
    assert result.speedup(result.rows[0]) == expected
    assert read_mp4(result.videos[0]).shape[2] == 128  # the reference is not shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "dense,slo"], "methods contains 'slo', which is not one of sla"),
        (["--methods", ""], "methods contains ''"),
        (["--methods", "dense,delta"], "Try --attention"),
        (["--sparsity", "0.9,x"], "sparsity is '0.9,x', but must be one or more numbers"),
        (["--sparsity", "1"], "sparsity is 1.0, but must be a number of at least 0 and below 1"),
        (["--methods", "dense", "--sparsity", "0.9"], "none of the methods dense has a sparsity"),
        (["--methods", "dense,sla", "--tau", "1"], "tau is an option of sol, but of none of the methods"),
        (["--methods", "dense", "--dense-steps", "0"], "dense_steps does not apply to dense attention"),
        (
            ["--methods", "dense,mean", "--backend", "sage"],
            "backend is 'sage', which none of the methods dense, mean has",
        ),
        (["--repeats", "0"], "repeats is 0, but must be from 1 to 100"),
        (["--max-error", "nan"], "max_error is nan"),
        (["--keep", "0.1", "--sparsity", "0.9"], "keep and sparsities are both given"),
        (["another prompt"], "2 prompts are given"),
        (["--prompts", "file.txt"], "both a prompt and --prompts are given"),
        (["--seed", str(2**63 - 1)], "the control other-seed needs the next higher seed"),
    ],
)
def test_bad_input_is_one_message_before_anything_is_loaded(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(["compare", "a red circle", *arguments]) == 2
    error = capsys.readouterr().err
    assert message.replace("_", "-") in error.replace("_", "-").replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays_unless_it_is_to_be_replaced(toy, tmp_path):
    config = CompareConfig(base(toy, tmp_path, output=str(tmp_path / "a.mp4")), ("mean",), (), {}, True, 1)
    (tmp_path / "a.json").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        compare(config)
    assert (tmp_path / "a.json").read_text() == "mine" and not (tmp_path / "a.mp4").exists()


def test_a_line_sets_no_attention(toy, tmp_path):
    (tmp_path / "p.txt").write_text("a circle --sparsity 0.5\n")
    config = CompareConfig(base(toy, tmp_path), prompts=str(tmp_path / "p.txt"))
    with pytest.raises(UsageError, match=r"p.txt:1: a prompt file for slagen compare cannot set sparsity"):
        compare(config)


def test_quality_of_known_frames():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 200, (3, 32, 32, 3), dtype=np.uint8)
    assert quality.psnr_db(frames, frames) is None and quality.ssim(frames, frames) == 1
    brighter = frames + np.uint8(10)
    assert quality.psnr_db(brighter, frames) == pytest.approx(20 * np.log10(255 / 10))
    noisy = np.clip(frames + rng.normal(0, 30, frames.shape), 0, 255).astype(np.uint8)
    assert quality.ssim(noisy, frames) < quality.ssim(brighter, frames) < 1
    assert quality.ssim(frames[:, :8, :8], brighter[:, :8, :8]) is None
    assert quality.lpips(frames, frames) is None  # its network is not on this machine


def test_intervals_hold_the_mean_and_shrink_with_more_values():
    few, many = interval([0.0, 1.0, 2.0, 3.0]), interval([0.0, 1.0, 2.0, 3.0] * 16)
    assert few[0] < 1.5 < few[1] and many[0] < 1.5 < many[1] and many[1] - many[0] < few[1] - few[0]
    assert interval([1.0]) is None
    a = Row("a", None, {}, None, None, [Runs(0.1), Runs(0.4)])
    b = Row("b", None, {}, None, None, [Runs(0.2), Runs(0.3)])
    assert a.difference(b, "velocity_error")["mean"] == pytest.approx(0.0)
    assert a.difference(b, "psnr_db") is None
