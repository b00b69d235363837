"""The allocator is set for the command's own process, and not where the user has set it."""

import ctypes
import os
from types import SimpleNamespace

import pytest

from slagen.cli import allocator


@pytest.fixture
def calls(monkeypatch):
    found = []
    library = SimpleNamespace(mallopt=lambda *given: found.append(given))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(allocator.sys, "platform", "linux")
    for name in (*allocator.OF_THE_USER, "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_freed_memory_is_kept_and_pages_are_huge(calls, monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "")  # so that it is put back
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    allocator.keep_freed_memory()
    assert dict(calls) == allocator.SETTINGS and os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


@pytest.mark.parametrize("name", allocator.OF_THE_USER)
def test_what_the_user_has_set_stays(calls, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    allocator.keep_freed_memory()
    assert not calls and "THP_MEM_ALLOC_ENABLE" not in os.environ


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_left_alone(calls, monkeypatch, platform):
    monkeypatch.setattr(allocator.sys, "platform", platform)
    allocator.keep_freed_memory()
    assert not calls


def test_another_c_library_has_no_such_setting(calls, monkeypatch):
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    allocator.keep_freed_memory()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
