"""The commands and their options, and which function runs each; functions are imported when they run."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Every command, in the order of help."""
    listing = commands.add_parser("list", help="the systems there are, and what of each is shown to work")
    listing.add_argument("--json", action="store_true", help="print a JSON array")
    listing.set_defaults(run=_later("listing", "show_list"))

    show = commands.add_parser("show", help="what a system is, its paper, parts, claim and last result")
    show.add_argument("key", metavar="KEY")
    show.set_defaults(run=_later("listing", "show_system"))

    _train(commands)
    _generate(commands)

    evaluate = commands.add_parser("evaluate", help="figures of a trained system on held-out data")
    evaluate.add_argument("source", metavar="RUN", help="folder of a run, or zoo:NAME")
    _data(evaluate)
    evaluate.add_argument("--samples", type=positive, default=1000, help="pictures to generate (default: 1000)")
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(run=_later("evaluating", "run_evaluate"))

    compare = commands.add_parser("compare", help="train systems on the same data and budget; one HTML report")
    compare.add_argument("keys", nargs="+", metavar="KEY")
    _data(compare)
    compare.add_argument("--minutes", type=float, default=5.0, help="training time of each (default: 5)")
    compare.add_argument("--size", help="size of each system (default: its first)")
    compare.add_argument("--samples", type=positive, default=500, help="pictures to judge (default: 500)")
    compare.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder (default: runs/compare)")
    compare.add_argument("--seed", type=int, default=0)
    compare.set_defaults(run=_later("comparing", "run_compare"))

    export = commands.add_parser("export", help="a language model in Hugging Face's format, for other programs")
    export.add_argument("source", metavar="MODEL", help="folder of a run or of a published model, or zoo:NAME")
    export.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    export.add_argument("--format", default="hf", help="hf (default: hf)")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="number format (default: as it is)")
    export.set_defaults(run=_later("generating", "run_export"))

    claim = commands.add_parser("claim", help="measure the claim of a system here and now")
    claim.add_argument("key", metavar="KEY")
    claim.add_argument("--results", type=Path, default=Path("results"), help="folder of results (default: results)")
    claim.set_defaults(run=_later("claiming", "run_claim"))

    claims = commands.add_parser("claims", help="all claims and their verdicts")
    claims.add_argument("keys", nargs="*", metavar="KEY")
    claims.add_argument("--run", dest="work", action="store_true", help="work off what is not measured yet")
    claims.add_argument("--results", type=Path, default=Path("results"), help="folder of results (default: results)")
    claims.set_defaults(run=_later("claiming", "run_claims"))

    laws = commands.add_parser("laws", help="hold systems to the laws, and the laws to their mutants")
    laws.add_argument("keys", nargs="*", metavar="KEY", help="systems (default: all)")
    laws.add_argument("--json", action="store_true", help="print findings as JSON lines")
    laws.add_argument("--verbose", "-v", action="store_true", help="also print what each law found")
    laws.set_defaults(run=_later("laws", "run_laws"))

    demo = commands.add_parser("demo", help="train VAR on handwritten digits and draw samples, in minutes")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder (default: runs/demo)")
    demo.add_argument("--steps", type=positive, help="training steps of the generator (default: the system's own)")
    demo.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    demo.set_defaults(run=_later("demo", "run_demo"))


def _train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a system, on built-in data or yours",
        epilog="Any other field of the system's config or of its recipe can be set: --width 256 --steps 2000 --batch 8 "
        "(`seriatim show KEY` lists them).",
    )
    train.add_argument("key", metavar="KEY", help="the system, as `seriatim list` names it")
    _data(train)
    train.add_argument("--out", type=Path, help="folder for the results (default: runs/KEY)")
    train.add_argument("--size", help="one of the system's sizes (default: its first)")
    train.add_argument("--tokenizer", help="a kind (bytes, bpe, words, pixels), the run of a tokenizer, or zoo:NAME")
    train.add_argument("--minutes", type=float, help="as many steps as fit, instead of the recipe's")
    train.add_argument("--resume", action="store_true", help="go on with what is in the folder")
    train.add_argument("--tensorboard", action="store_true", help="write events for TensorBoard into the folder, too")
    train.set_defaults(run=_later("training", "run_train"), free=True)


def _generate(commands: Any) -> None:
    generate = commands.add_parser("generate", help="text to the terminal, pictures to PNG and GIF")
    generate.add_argument(
        "source", metavar="MODEL", help="folder of a run or of a published model, zoo:NAME, or a name on the hub"
    )
    generate.add_argument("--prompt", default="", help="what text begins with")
    generate.add_argument("--chat", action="store_true", help="the prompt is what a user says, in the model's template")
    generate.add_argument("--ids", help="the same as ids, for a model without a tokenizer: 1,2,3")
    generate.add_argument(
        "--length", "--max-new-tokens", type=positive, help="tokens of text (default: 200, or what there is room for)"
    )
    generate.add_argument("--label", action="append", help="class of pictures, by number or name; may be repeated")
    generate.add_argument("--count", type=positive, help="pictures of each label, or in all; texts (default: 1)")
    generate.add_argument("--decoder", default="own", help="own, ancestral, ngram, jacobi or beam (default: own)")
    for name, kind, text in (
        ("temperature", float, "0: greedy"), ("top-k", int, "the k likeliest"), ("top-p", float, "nucleus"),
        ("min-p", float, "share of the likeliest"), ("typical", float, "typical mass"),
        ("guidance", float, "weight of the condition"), ("steps", int, "decoding steps, where there is a choice"),
    ):  # fmt: skip
        generate.add_argument(f"--{name}", type=kind, help=f"{text} (default: the system's own)")
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--out", type=Path, help="folder for pictures (default: RUN/generated)")
    generate.add_argument("--json", action="store_true", help="print one JSON object")
    generate.set_defaults(run=_later("generating", "run_generate"))


def _data(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", help="a built-in set by name, or the path of your own (default: the system's)")
    command.add_argument("--image-size", type=positive, help="side of pictures from a folder, in pixels")


def data_options(options: argparse.Namespace) -> dict[str, Any]:
    """What was said about data, as the loader takes it."""
    return {} if options.image_size is None else {"image_size": options.image_size}


def _later(module: str, function: str) -> Callable[..., int]:
    def run(*arguments: Any) -> int:
        return getattr(importlib.import_module(f"seriatim.cli.{module}"), function)(*arguments)

    return run


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value
