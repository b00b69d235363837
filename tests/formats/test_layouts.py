"""A spelling of the transformer's tensor names is one record in one table."""

import re
from pathlib import Path

import pytest
import torch
from public_forms import SIZES, fastvideo, projections, spell, wan
from safetensors.torch import load_file, save_file
from wan_models import build_transformer

from slagen.errors import WeightsError
from slagen.formats import layouts
from slagen.formats.kinds import identify
from slagen.formats.layouts import LAYOUTS, Layout
from slagen.formats.merge import merge
from slagen.formats.transformer import read_checkpoint
from slagen.wan.convert import convert
from slagen.wan.info import info

TOY = Layout(
    "toy",
    rules=(
        (r"layer(\d+):(.*)", r"blocks.\1.\2"),
        (r"outer:(.*)", r"\1"),
    ),
    starts=(r"layer\d+:", r"outer:"),
)


def toy(state):
    """The tensors under names that no public form has."""
    names = {name: re.sub(r"^blocks\.(\d+)\.", r"layer\1:", name) for name in state}
    return {spelt if spelt != name else f"outer:{name}": state[name] for name, spelt in names.items()}


@pytest.fixture(scope="module")
def state():
    return {name: x.detach().clone() for name, x in build_transformer(**SIZES).state_dict().items()}


@pytest.fixture
def file(state, tmp_path):
    save_file({f"net.{name}": x for name, x in toy(state).items()}, tmp_path / "toy.safetensors")
    return tmp_path / "toy.safetensors"


def test_an_unknown_spelling_is_refused(file):
    with pytest.raises(WeightsError, match="holds no Wan2.1 transformer"):
        read_checkpoint(file)


def test_a_format_is_one_record(file, state, tmp_path, monkeypatch):
    """Nothing but the record tells read, info, merge and convert of it."""
    monkeypatch.setitem(LAYOUTS, "toy", TOY)
    read = read_checkpoint(file)
    assert read.layout == "toy" and read.faults == []
    assert read.tensors.keys() == state.keys() and all(torch.equal(x, state[name]) for name, x in read.tensors.items())
    about = info(str(file))
    assert (about.kind, about.layout, about.layers, about.faults) == ("transformer", "toy", 2, [])
    merged = merge(str(file), str(tmp_path / "m.safetensors"), diff_base=str(file), diff_target=str(file))
    assert all(torch.equal(x, state[name]) for name, x in load_file(merged).items())
    folder = convert(str(file), str(tmp_path / "folder"), dtype=torch.float32)
    (weights,) = (folder / "transformer").glob("*.safetensors")
    assert all(torch.equal(x, state[name]) for name, x in load_file(weights).items())


def test_other_files_are_told_as_before_beside_a_new_format(state, monkeypatch):
    forms = {"diffusers": dict(state), "wan": wan(state), "fastvideo": fastvideo(state)}
    before = {name: identify(form) for name, form in forms.items()}
    monkeypatch.setitem(LAYOUTS, "toy", TOY)
    assert {name: identify(form) for name, form in forms.items()} == before == dict.fromkeys(forms, "transformer")


def test_foreign_names_stand_in_two_files():
    """So that a new form of weights or of LoRAs needs no other; all else speaks of diffusers' names."""
    package = Path(layouts.__file__).parent.parent
    foreign = re.compile(r"self_attn|time_projection|fc_in|time_modulation|attn_impl")
    files = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if foreign.search(path.read_text())}
    assert files == {"formats/layouts.py", "formats/lora.py"}


def test_a_projection_is_found_where_its_form_puts_it():
    for place in ("self_attn.attn_op.local_attn", "attn1.attn_op.local_attn", "attn1.attn_impl", "attn1.processor"):
        names = spell(projections(), place)
        assert {layouts.learned(name)[1] for name in names} == {place}
    assert layouts.learned("blocks.0.attn1.elsewhere.proj_l.weight") is None
