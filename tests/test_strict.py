"""Every component of a model is held against what it must be: one that is damaged is refused, and nothing is asked."""

import socket

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from huggingface_hub import constants
from wan_models import save_pipeline

from slagen.errors import WeightsError
from slagen.wan.hub import closed_hub
from slagen.wan.loading import load_pipeline, resolve_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole random pipeline; a test that changes a file puts it back."""
    return save_pipeline(tmp_path_factory.mktemp("strict") / "pipe")


def load(folder):
    return load_pipeline(resolve_model(str(folder), "cpu"), CPU, torch.float32)


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
        with pytest.raises(WeightsError, match="knows 7 words, but the text encoder 6"):
            load(folder)
    finally:
        file.write_text(whole)
