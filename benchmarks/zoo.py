"""Makes the small trained models that ship with the project: `python benchmarks/zoo.py [NAME...]`.

Each is a training of its own under SERIATIM_HOME/zoo, resumed where it was cut off; a finished one is written to
zoo/NAME as bfloat16 weights with its card. Four to five hours in all on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from rich.console import Console

from seriatim.cli.progress import Bar
from seriatim.data.base import load_data
from seriatim.evaluation.cost import parameters
from seriatim.evaluation.features import features_for
from seriatim.home import HOME
from seriatim.posttraining.drafting import CARD, WEIGHTS, read_card
from seriatim.systems.draft_parts import drafted_lengths
from seriatim.systems.meta import load as load_module
from seriatim.tokenizers.text import PairTokenizer
from seriatim.training.checkpoint import save_json
from seriatim.training.run import RunFolder
from seriatim.training.state import read_safely, write_safely
from seriatim.verbs.drafting import show_part
from seriatim.verbs.evaluate import evaluate
from seriatim.verbs.show import show
from seriatim.verbs.train import train

ROOT = Path(__file__).parents[1] / "zoo"
TEXT = {"data": "stdlib", "tokenizer": "zoo:text-bpe"}
DRAFT = {"length": 1024, "width": 128, "depth": 2, "heads": 2, "hidden": 384, "tied": True}
PICTURES = {"data": "glyphs"}
BRIEF = {"steps": 2000, "dropout": 0.0, "ema": 0.99}

ENTRIES: dict[str, dict[str, Any]] = {
    "text-base": {"key": "next-token", "size": "small", **TEXT, "settings": {"steps": 3000}},
    "image-msvq": {"key": "image-msvq", **PICTURES, "settings": {"steps": 3000}},
    "image-vq": {"key": "image-vq", **PICTURES, "settings": {"steps": 3000}},
    "image-flexvq": {"key": "image-flexvq", **PICTURES, "settings": {"steps": 3000}},
    "image-rings": {"key": "image-rings", **PICTURES, "settings": {"steps": 1500}},
    "image-bae": {"key": "image-bae", **PICTURES, "settings": {"steps": 1500}},
    "image-sequential": {"key": "image-sequential", **PICTURES, "settings": {"steps": 1500}},
    "image-detail": {"key": "image-detail", **PICTURES, "settings": {"steps": 1500}},
    "image-kl": {"key": "image-kl", **PICTURES, "settings": {"steps": 3000}},
    "text-mdlm": {"key": "mdlm", "size": "small", **TEXT, "settings": {"steps": 1200}},
    "text-block": {
        "key": "sdar",
        "data": "stdlib",
        "from_": "zoo:text-base",
        "settings": {"window": 256, "batch": 8, "steps": 3000, "compile": True},
    },
    "text-as-arm": {
        "key": "as-arm",
        "data": "stdlib",
        "from_": "zoo:text-draft",
        "settings": {"length": 256, "batch": 16, "steps": 1500, "learning_rate": 2e-3},
    },
    "text-lists": {
        "key": "mdlm",
        "data": "list-tasks",
        "settings": {
            "width": 128,
            "depth": 4,
            "heads": 4,
            "batch": 64,
            "learning_rate": 1e-3,
            "masking": "count",
            "steps": 4800,
        },
    },
    "text-draft": {"key": "next-token", **TEXT, "settings": {**DRAFT, "steps": 3000, "batch": 8, "compile": True}},
    "var": {"key": "var", "size": "small", **PICTURES, "tokenizer": "zoo:image-msvq", "settings": {"steps": 1500}},
    "hmar": {"key": "hmar", **PICTURES, "tokenizer": "zoo:image-msvq", "settings": BRIEF},
    "flexvar": {"key": "flexvar", **PICTURES, "tokenizer": "zoo:image-flexvq", "settings": BRIEF},
    "raster-ar": {
        "key": "raster-ar",
        "size": "small",
        **PICTURES,
        "tokenizer": "zoo:image-vq",
        "settings": {"steps": 1500},
    },
    "mar": {
        "key": "mar",
        "size": "small",
        **PICTURES,
        "tokenizer": "zoo:image-kl",
        "settings": {"steps": 1500, "batch": 32},
    },
}


# Parts that draft for a model of the zoo, each in a folder beside its base: found by --decoder KEY:zoo.
PARTS: dict[str, dict[str, Any]] = {
    f"text-base/draft-{key}": {
        "key": key, "data": "stdlib", "from_": "zoo:text-base", "settings": {"steps": steps, "tokens": 1_000_000},
    }
    for key, steps in {"medusa": 2000, "hydra": 2000, "eagle-2": 1000, "chimera": 400, "hidden-transfer": 400}.items()
}  # fmt: skip

MADE_APART = ("text-bpe", "features-glyphs")
EVERY = (*MADE_APART, *ENTRIES, *PARTS)
KNOWN = ("system", "data", "parameters")  # of the figures: they stand above


def make(name: str, entry: Mapping[str, Any], console: Console) -> None:
    """Train or go on, then write to the zoo."""
    work, out = HOME / "zoo" / name, ROOT / name
    start = time.monotonic()
    trained = train(
        **{k: v for k, v in entry.items() if k != "tokenizer"}, tokenizer=entry.get("tokenizer"), out=work,
        resume=True, bar=lambda phase: Bar(f"{name} {phase}", console),
    )  # fmt: skip
    show(trained)
    out.mkdir(parents=True, exist_ok=True)
    tensors, about = read_safely(RunFolder(work).weights)
    small = {k: v.bfloat16() if v.is_floating_point() else v for k, v in tensors.items()}
    write_safely(out / "model.safetensors", small, about)
    for part in ("run.json", "tokenizer.json"):
        if (work / part).is_file():
            shutil.copyfile(work / part, out / part)
    if (work / "tokenizer").is_dir():
        shutil.copytree(work / "tokenizer", out / "tokenizer", dirs_exist_ok=True)
    _card(name, trained, evaluate(out), out)  # of the weights as they ship
    console.print(f"{name}: {out} ({time.monotonic() - start:.0f} s in this session)", highlight=False)


def _card(name: str, trained: Any, figures: Mapping[str, Any], out: Path) -> None:
    run = RunFolder(out).read_card()
    seconds = sum(h.get("seconds", 0.0) for h in trained.history)
    lines = [
        f"# {name}", "",
        f"{trained.system.meta.title}; {parameters(trained.system.model):,} parameters, stored as bfloat16.", "",
        f"- data: {run['data']}, built in; its held-out side was not seen",
        f"- steps: {len(trained.history):,} of {run['recipe']['batch']} samples, {seconds / 60:.0f} minutes",
        *(f"- {k}: {v:.4g}" if isinstance(v, float) else f"- {k}: {v}" for k, v in figures.items() if k not in KNOWN),
        f"- made again by: `python benchmarks/zoo.py {name}`", "- license: Apache-2.0, like the project",
    ]  # fmt: skip
    (out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_part(name: str, entry: Mapping[str, Any], console: Console) -> None:
    """Train a part or go on, then write it beside its base."""
    work, out, key = HOME / "zoo" / name, ROOT / name, entry["key"]
    trained = train(**entry, out=work, resume=True, bar=lambda phase: Bar(f"{name} {phase}", console))
    show_part(key, trained.system, work, trained.history)
    out.mkdir(parents=True, exist_ok=True)
    for file in (CARD, WEIGHTS):
        shutil.copyfile(work / file, out / file)
    figures, recipe = drafted_lengths(replace(trained, folder=out)), read_card(out)["training"]["recipe"]
    lines = [
        f"# {name}", "", f"{load_module(key).META.title} for {entry['from_']}: --decoder {key}:zoo.", "",
        f"- data: {entry['data']}, built in; its held-out side was not seen",
        f"- steps: {len(trained.history):,} of {recipe['batch']} windows", f"- parameters: {figures['parameters']:,}",
        f"- tokens a forward on held-out text: {figures['tokens_per_forward']:.2f}",
        f"- made again by: `python benchmarks/zoo.py {name}`", "- license: Apache-2.0, like the project",
    ]  # fmt: skip
    (out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_pairs() -> None:
    """The byte-pair encoding that all text models share: 4,096 ids, 16 of them reserved."""
    if not (ROOT / "text-bpe" / "README.md").is_file():
        learned = PairTokenizer.train(load_data("stdlib", "text").train.documents, 4096)
        save_json(learned.to_json(), ROOT / "text-bpe" / "tokenizer.json")
        said = f"Byte-pair encoding of {learned.vocab:,} ids, 16 of them reserved, for all text models of the zoo."
        _note("text-bpe", f"{said}\n\n- data: stdlib, built in; its held-out side was not seen")


def make_features() -> None:
    """The classifier of glyphs, by which generated glyphs are judged."""
    place = ROOT / "features-glyphs"
    if not (place / "README.md").is_file():
        model = features_for(load_data("glyphs", "image"), place)
        _note("features-glyphs", f"The {model.card}: FD-s and class accuracy of generated glyphs are measured on it.\n")


def _note(name: str, text: str) -> None:
    """The card of a file that no training of a system made."""
    ends = f"- made again by: `python benchmarks/zoo.py {name}`\n- license: Apache-2.0, like the project\n"
    (ROOT / name / "README.md").write_text(f"# {name}\n\n{text}\n{ends}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(EVERY)} (default: what is missing)")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wrong = [n for n in options.names if n not in EVERY]
    if wrong:
        print(f"the zoo has no {', '.join(wrong)}; it has {', '.join(EVERY)}", file=sys.stderr)
        return 2
    for name in options.names:  # what is asked for by name is made again
        (ROOT / name / "README.md").unlink(missing_ok=True)
    make_pairs()
    make_features()
    for name in options.names or (*ENTRIES, *PARTS):
        if name in MADE_APART or (ROOT / name / "README.md").is_file():
            continue
        if name in ENTRIES:
            make(name, ENTRIES[name], Console())
        else:
            make_part(name, PARTS[name], Console())
    sizes = {p.parent.name: p.stat().st_size for p in ROOT.glob("*/model.safetensors")}
    print(json.dumps({k: f"{v / 2**20:.1f} MiB" for k, v in sizes.items()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
