"""What it takes to compile: asked before, so that a machine that cannot is told why and goes on without."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any

import torch

# values that are used many times are computed once and kept: a compiler that sees a norm as a few operations would
# compute it again for each output of the matrix behind it
OPTIONS: dict[str, Any] = {"realize_opcount_threshold": 1}


def compiled(method: Any) -> Callable[..., Any]:
    """A bound method, compiled at its first call, as steps of decoding are. What is compiled is remembered, and
    limited, by code: each gets code of its own, or a few models would use up what one is allowed."""
    code = method.__func__.__code__.replace()
    own = FunctionType(code, method.__globals__, method.__name__, method.__defaults__, method.__closure__)
    return torch.compile(MethodType(own, method.__self__), options=OPTIONS)


def why_not_compiled(device: torch.device) -> str | None:
    """What is missing to compile for a device; None where all is there."""
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "Triton is not installed"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"there is no C++ compiler {compiler} (CXX names another)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers are not installed (on Debian and Ubuntu: apt install python3-dev)"
    return None
