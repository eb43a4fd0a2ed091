"""What of each system is shown to work, for `seriatim list`: runs every law, and every system from end to end.

Run: `python benchmarks/status.py [KEY...]`. Writes results/status.json: for each system the hash of its file, whether
all laws hold and its mutant is caught (tokenizers have no order, so no laws), whether training, loading and generating
work through the command line, what decoders answer to every request, and which test, passed just now, holds published
weights to the official code.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from seriatim.cli.main import main as command
from seriatim.data.base import load_data
from seriatim.laws.interface import COLUMNS
from seriatim.laws.interface import cell as said
from seriatim.laws.suite import mutant_finding, system_findings
from seriatim.posttraining.drafting import Base, save_part
from seriatim.posttraining.judge import train_judge
from seriatim.systems.decoder.judge_decoding import examples
from seriatim.systems.decoders import FAMILIES, example_of
from seriatim.systems.meta import catalogue, source_hash
from seriatim.training.checkpoint import save_json
from seriatim.verbs.load import load

ROOT = Path(__file__).parents[1]
LETTERS = 40_000  # of text that a part is trained on for a moment
SHORT = ["--steps", "5", "--batch", "2", "--tokens", "2000", "--window", "64"]
WEIGHTS = {  # what holds published weights to the official code
    "next-token": "tests/interop/test_families.py",
    **dict.fromkeys(("mdlm", "sdar", "fast-dllm-v2", "wedlm"), "tests/interop/test_masked_families.py"),
    "as-arm": "tests/interop/test_xlnet.py",
    **dict.fromkeys(("medusa", "hydra"), "tests/posttraining/test_heads.py"),
    "eagle-2": "tests/posttraining/test_eagle.py",
    "chimera": "tests/posttraining/test_chimera.py",
    "bild": "tests/systems/test_bild_answers.py",
    "var": "tests/interop/test_var.py",
    "m-var": "tests/interop/test_m_var.py",
    "hmar": "tests/interop/test_hmar.py",
    "raster-ar": "tests/interop/test_llamagen.py",
    "mar": "tests/interop/test_mar.py",
    "hi-mar": "tests/interop/test_hi_mar.py",
    "detailflow": "tests/interop/test_detailflow.py",
    "d-ar": "tests/interop/test_d_ar_generator.py",
    "elm": "tests/interop/test_elm_generator.py",
    "nar": "tests/interop/test_nar.py",
    "xar": "tests/interop/test_xar.py",
    "acdit": "tests/interop/test_acdit.py",
    "arflow": "tests/interop/test_arflow.py",
    **dict.fromkeys(("flexvar", "sar"), "tests/interop/test_flexvar.py"),
}


def laws_hold(key: str, family: str) -> bool | None:
    """All twelve, and the system's own mutant; None of tokenizers, which have no order."""
    if family == "tokenizer":
        return None
    return all(f.status != "broken" for f in [*system_findings(key), mutant_finding(key)])


def runs_from_end_to_end(key: str, family: str) -> bool:
    """A short training on built-in data, with its pictures, and generation from the folder."""
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        if family in FAMILIES:
            model = "zoo:text-mdlm" if family == "unmasking" else "zoo:text-base"
            decoder = example_with_part(key, model, Path(place) / "part")
            asked = ["--prompt", "def ", "--length", "40", "--decoder", decoder]
            return command(["generate", model, *asked]) == 0
        run = str(Path(place) / "run")
        short = ["--steps", "20", "--tokenizer-steps", "20"] if family == "image" else ["--steps", "20"]
        if command(["train", key, "--out", run, *short]):
            return False
        if family == "series":
            return command(["forecast", run, "--data", "co2"]) == 0
        return family == "tokenizer" or command(["generate", run, "--count", "1"]) == 0


def example_with_part(key: str, model: str, place: Path) -> str:
    """How a decoder is named on a model of the zoo: where its example names a run, with a part of its own that was
    trained for a moment."""
    example = example_of(key)
    if "runs/" not in example:
        return example
    if key == "judge-decoding":
        base = Base(load(model))
        save_part(train_judge(base, examples(base.system.tokenizer, 20))[0], base, place)
    else:
        text = place.with_name("text.txt")  # a whole library would be tokenised for minutes
        text.write_text("".join(load_data("stdlib", "text").test.documents)[:LETTERS], encoding="utf-8")
        command(["train", key, "--base", model, "--data", str(text), *SHORT, "--out", str(place)])
    return re.sub(r"runs/[^+]+", str(place), example)


def weights_load(key: str) -> str | None:
    """The test that holds published weights to the official code, where there is one and it passes now."""
    return WEIGHTS[key] if key in WEIGHTS and passes(WEIGHTS[key]) else None


@cache
def passes(test: str) -> bool:
    """Whether a file of tests passes."""
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", str(ROOT / test)], cwd=ROOT, capture_output=True)
    return run.returncode == 0


def cell(key: str, column: str) -> str:
    """What a decoder says to a request."""
    try:
        return said(key, column)
    except AssertionError as fault:
        return f"wrong: {fault}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("keys", nargs="*")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "status.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(options.out.read_text(encoding="utf-8")) if options.out.is_file() else {}
    for key in options.keys or catalogue():
        family = catalogue()[key][0].family
        row = {
            "source": source_hash(key),
            "laws": laws_hold(key, family),
            "end_to_end": runs_from_end_to_end(key, family),
            "weights": weights_load(key),
        }
        if family == "decoder":
            row["requests"] = {column: cell(key, column) for column in COLUMNS}
        known[key] = row
        print(
            f"{key:16s} laws {row['laws']}  end to end {row['end_to_end']}  weights {row['weights'] or '-'}", flush=True
        )
        save_json(known, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
