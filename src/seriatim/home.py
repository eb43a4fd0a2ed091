"""Where things are kept between runs: SERIATIM_HOME, else ~/.cache/seriatim."""

from __future__ import annotations

import os
from pathlib import Path

HOME = Path(os.environ.get("SERIATIM_HOME", "~/.cache/seriatim")).expanduser()
