"""Weight files and numbers that ask for more than there is: refused in one message, before any work."""

import contextlib
import os
import random
import struct

import numpy as np
import pytest
import torch
import typer
from conftest import needs
from safetensors.torch import save_file
from wan_models import build_transformer

from slagen.cli.main import app, run
from slagen.cli.parsing import Help
from slagen.errors import UsageError, WeightsError
from slagen.formats.gguf_files import SCALES, check_values
from slagen.formats.merge import merge
from slagen.formats.peek import peek
from slagen.formats.tensor_files import read_tensors
from slagen.formats.transformer import read_checkpoint


def pickled(name, tmp_path):
    """A pickle that asks for more than it holds."""
    path, content = tmp_path / "x.pth", {}
    if name == "itself":
        content["model"] = content
    elif name == "laughs":  # each twice in the next: 2^40 at the end
        for _ in range(40):
            content = {"model": content, "ema": content}
    elif name == "deep":
        for _ in range(200):
            content = {"model": content}
    else:
        square = torch.zeros(1).expand(10**6, 10**6)
        state = {"64:bf16": {"proj_l.weight": square, "proj_l.bias": torch.zeros(1).expand(10**6)}}
        settings = {"topk": 0.1, "feature_map": "softmax", "blkq": 64, "blkk": 64}
        if name == "side file":
            content = {"version": 1, "settings": settings, "state": state}
        else:
            content = {"blocks.0.self_attn.q.weight": torch.eye(3).to_sparse() if name == "sparse" else square}
    torch.save(content, path)
    return path


@pytest.mark.parametrize("name", ["itself", "laughs", "deep", "side file", "expanded", "sparse"])
def test_a_pickle_that_asks_for_more_than_it_holds_is_refused(tmp_path, name):
    """A dictionary in itself was followed for ever, and a tensor of stride 0 took 4 TB to read."""
    path = pickled(name, tmp_path)
    for read in (peek, read_checkpoint, read_tensors):
        with pytest.raises(WeightsError, match="contain themselves|not stored contiguously and in full"):
            read(path)


@pytest.mark.parametrize(
    "change", [{"feature_map": ["softmax"] * 9}, {"topk": "0.1"}, {"blkq": True}, {"topk": torch.nan}]
)
def test_a_side_file_with_other_settings_is_refused(tmp_path, change):
    settings = {"topk": 0.1, "feature_map": "softmax", "blkq": 64, "blkk": 64} | change
    pair = {"proj_l.weight": torch.ones(4, 4), "proj_l.bias": torch.ones(4)}
    torch.save({"version": 1, "settings": settings, "state": {"4:bf16": pair}}, tmp_path / "sla_attention.pt")
    with pytest.raises(WeightsError, match="sla_attention.pt of SimpleTuner"):
        peek(tmp_path / "sla_attention.pt")


GGUF_STRING, GGUF_ARRAY, GGUF_UINT8 = 8, 9, 0


def gguf(kind, count, rest=b"", tensors=0):
    """A GGUF file with a list of `count` entries of a kind in its metadata."""
    key = b"tokens"
    head = b"GGUF" + struct.pack("<IQQ", 3, tensors, 1) + struct.pack("<Q", len(key)) + key
    return head + struct.pack("<IIQ", GGUF_ARRAY, kind, count) + rest


@pytest.mark.parametrize(
    "content",
    [
        gguf(GGUF_UINT8, 2**40), gguf(GGUF_STRING, 2**63), gguf(GGUF_UINT8, 10**6, bytes(10**6)),
        gguf(GGUF_ARRAY, 1, struct.pack("<IQ", GGUF_ARRAY, 1) * 5000), gguf(GGUF_UINT8, 0, tensors=2**60),
        gguf(GGUF_UINT8, 0, struct.pack("<Q", 1) + b"x" + struct.pack("<IQQ", 2**31, 2, 2), tensors=1), b"GGUF", b"",
    ],
    ids=["bytes", "strings", "long", "nested", "tensors", "dimensions", "short", "empty"],
)  # fmt: skip
def test_a_gguf_that_asks_for_more_than_it_holds_is_refused(tmp_path, content):
    """A list of 2^40 entries was read to the end, far beyond that of the file."""
    needs("gguf", "slagen[gguf]")
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(WeightsError, match="corrupt, incomplete"):
        read_tensors(tmp_path / "x.gguf")


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning:gguf.quants")
@pytest.mark.parametrize("kind", [*SCALES, "F32", "F16", "BF16"])
def test_no_kind_of_gguf_holds_what_is_not_finite(tmp_path, kind):
    """Packed numbers are whole ones, so that their scales tell; diffusers loads them as they are."""
    library = needs("gguf", "slagen[gguf]")
    number = library.GGMLQuantizationType[kind]
    _, size = library.GGML_QUANT_SIZES[number]
    width, first, count = SCALES.get(kind, (size, 0, 1))
    assert width == size
    value = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
    if kind in ("F32", "BF16"):
        value = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)[-size:]
    blocks = np.zeros((2, 3 * size), np.uint8)
    for spoilt in (False, True):
        if spoilt:
            blocks[1, 2 * size + first + 2 * (count - 1) :][: len(value)] = value
        assert np.isfinite(library.quants.dequantize(blocks, number)).all() != spoilt
        writer = library.GGUFWriter(tmp_path / "x.gguf", "wan")
        content = blocks.view({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8))
        writer.add_tensor("x", content, raw_dtype=number)
        for step in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{step}_to_file")()
        writer.close()
        with pytest.raises(WeightsError, match="x in .* NaN or Inf") if spoilt else contextlib.nullcontext():
            check_values(tmp_path / "x.gguf")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".gguf"])
def test_damaged_weight_files_are_refused_or_read(tmp_path, suffix):
    """A byte is changed, or the file cut, at places drawn from a seed: one message that names the file, or it is read.

    Without a hash a changed value cannot be told; that the file has another form can.
    """
    refused = 0
    rng = random.Random(suffix)
    path = tmp_path / f"x{suffix}"
    if suffix == ".gguf":
        gguf_writer = needs("gguf", "slagen[gguf]").GGUFWriter(path, "wan")
        gguf_writer.add_tensor("blocks.0.x", torch.ones(8, 32).numpy())
        gguf_writer.add_array("sizes", [1, 2, 3])
        for step in ("header", "kv_data", "tensors"):
            getattr(gguf_writer, f"write_{step}_to_file")()
        gguf_writer.close()
    elif suffix == ".pth":
        torch.save({"state_dict": {f"blocks.{i}.x": torch.ones(3, i + 1) for i in range(4)}}, path)
    else:
        save_file({f"blocks.{i}.x": torch.ones(3, i + 1) for i in range(4)}, path)
    whole = path.read_bytes()
    for number in range(int(os.environ.get("SLAGEN_SOAK_DAMAGES", 60))):
        spoilt = bytearray(whole[: rng.randrange(len(whole))] if number % 5 == 0 else whole)
        for _ in range(0 if number % 5 == 0 else rng.choice((1, 1, 4))):
            spoilt[rng.randrange(min(len(whole), rng.choice((200, len(whole)))))] = rng.randrange(256)
        path.write_bytes(spoilt)
        for read in (read_tensors, peek):
            try:
                read(path)
            except WeightsError as error:
                assert path.name in str(error)
                refused += 1
    assert refused > number // 5  # those that are cut, at least


@pytest.mark.parametrize("number", ["nan", "-inf", "1e400"])
@pytest.mark.parametrize(
    "command",
    [
        f"generate a --{name}=" for name in ("guidance-scale", "flow-shift", "sparsity", "sla-topk", "sigma-max")
    ] + [
        f"finetune --data x --{name}=" for name in (
            "lr", "sparsity", "negligible", "anneal-from", "layer-loss", "proj-multiplier", "caption-dropout",
            "weight-decay", "max-grad-norm")
    ] + ["bench --seconds=", "bench --sparsity=", "merge a b.safetensors --diff-base c --diff-target d --weight=",
         "batch x --flow-shift=", "plan a --guidance-scale="],
)  # fmt: skip
def test_no_option_takes_a_number_that_is_none(capsys, command, number):
    """merge --weight nan wrote 177 tensors of NaN."""
    assert run(f"{command}{number}".split()) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert f"{command.split()[-1].rstrip('=')} is" in shown or "but must be" in shown


@pytest.mark.parametrize("option", ["--num-frames", "--fps", "--steps", "--num-videos", "--seed"])
@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**100], ids=["2^63", "-2^63-1", "10^100"])
def test_no_option_takes_more_than_64_bits(capsys, option, number):
    assert run(["generate", "a", option, str(number)]) == 2
    assert f"{option.strip('-') if option == '--seed' else option} is" in " ".join(capsys.readouterr().err.split())


def test_every_number_of_every_command_is_looked_at():
    """The check sits in the class of all commands, so none can be forgotten."""
    group = typer.main.get_command(app)
    commands = [group, *group.commands.values(), *group.commands["finetune"].commands.values()]
    assert len(commands) > 12 and all(isinstance(command, Help) for command in commands)


@pytest.mark.parametrize("weight", [torch.nan, torch.inf, -torch.inf, 1e38])
def test_a_merge_writes_finite_numbers_alone(tmp_path, weight):
    state = build_transformer().state_dict()
    save_file(state, tmp_path / "a.safetensors")
    save_file({name: x * 2 + 1e3 for name, x in state.items()}, tmp_path / "b.safetensors")
    a, b = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    with pytest.raises(UsageError, match="weight"):
        merge(a, str(tmp_path / "c.safetensors"), diff_base=a, diff_target=b, weight=weight)
    assert not (tmp_path / "c.safetensors").exists()
