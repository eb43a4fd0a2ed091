"""Freed memory goes back to the system, and not at every step."""

from __future__ import annotations

import sys

import pytest

from seriatim.serving import memory
from seriatim.serving.memory import Trimmer


def test_memory_is_given_back_from_time_to_time(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(memory.time, "monotonic", lambda: now[0])
    trim = Trimmer(lambda pad: calls.append(now[0]) or 1)
    for step in range(200):
        now[0] = float(step)
        trim()
    assert calls == [30.0, 60.0, 90.0, 120.0, 150.0, 180.0]


def test_another_c_library_is_left_alone(monkeypatch):
    def none_such(name):
        raise OSError(name)

    monkeypatch.setattr(memory.ctypes, "CDLL", none_such)
    monkeypatch.setattr(memory, "EVERY", -1.0)
    trim = Trimmer()
    trim()
    assert trim.trim is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is looked for")
def test_the_c_library_here_is_asked(monkeypatch):
    monkeypatch.setattr(memory, "EVERY", -1.0)
    trim = Trimmer()
    if trim.trim is None:
        pytest.skip("this C library has no malloc_trim")
    trim()
