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
    evaluate.add_argument("--horizon", type=positive, help="of series: steps to forecast (default: as it was trained)")
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(run=_later("evaluating", "run_evaluate"))

    _forecast(commands)
    _compare(commands)
    _bench(commands)
    _serve(commands)

    export = commands.add_parser("export", help="a language model in Hugging Face's format, for other programs")
    export.add_argument("source", metavar="MODEL", help="folder of a run or of a published model, or zoo:NAME")
    export.add_argument("out", type=Path, metavar="OUT", help="the folder to write")
    export.add_argument("--format", default="hf", help="hf (default: hf)")
    export.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="number format (default: as it is)")
    export.set_defaults(run=_later("generating", "run_export"))

    _claims(commands)

    data = commands.add_parser("data", help="the built-in data, and those that are made once from downloads")
    data.add_argument("name", nargs="?", metavar="NAME", help="what to make: emoji (default: list what there is)")
    data.add_argument("--from", dest="source", type=Path, metavar="FOLDER", help="where the archives are, without npm")
    data.add_argument("--again", action="store_true", help="make it anew where it is there already")
    data.set_defaults(run=_later("having", "run_data"))

    demo = commands.add_parser("demo", help="train VAR on handwritten digits and draw samples, in minutes")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder (default: runs/demo)")
    demo.add_argument("--steps", type=positive, help="training steps of the generator (default: the system's own)")
    demo.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    demo.set_defaults(run=_later("demo", "run_demo"))


def _claims(commands: Any) -> None:
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
    laws.add_argument("--workers", type=positive, default=1, help="processes (default: 1)")
    laws.add_argument("--json", action="store_true", help="print findings as JSON lines")
    laws.add_argument("--verbose", "-v", action="store_true", help="also print what each law found")
    laws.set_defaults(run=_later("laws", "run_laws"))


def _forecast(commands: Any) -> None:
    forecast = commands.add_parser(
        "forecast",
        help="what comes behind the end of a series, with intervals: a table and a plot",
        epilog="A bare KEY is trained first; fields of its config or recipe can be set: --lookback 336 --width 128.",
    )
    forecast.add_argument("source", metavar="RUN_OR_KEY", help="folder of a run, or a system: dlinear, ...")
    _data(forecast)
    forecast.add_argument("--horizon", type=int, help="steps to forecast (default: what the system was made for)")
    forecast.add_argument("--level", type=float, default=0.9, help="of the intervals (default: %(default)s)")
    forecast.add_argument("--out", type=Path, help="folder (default: the run, or runs/forecast-KEY-DATA)")
    forecast.set_defaults(run=_later("forecasting", "run_forecast"), free=True)


def _compare(commands: Any) -> None:
    compare = commands.add_parser("compare", help="train systems on the same data and budget; one HTML report")
    compare.add_argument("keys", nargs="+", metavar="KEY[:TOKENIZER]", help="as in var:zoo:image-msvq mar:runs/kl")
    _data(compare)
    compare.add_argument(
        "--minutes", type=float, help="training time of each (default: 5; of series: as its recipe says)"
    )
    compare.add_argument("--lookback", type=positive, help="of series: steps that are known (default: their own)")
    compare.add_argument("--horizon", type=positive, help="of series: steps to forecast (default: their own)")
    compare.add_argument(
        "--classical", type=int, default=100, help="of series: windows on which ETS and ARIMA run, too (default: 100)"
    )
    compare.add_argument("--size", help="size of each system (default: its first)")
    compare.add_argument("--samples", type=positive, default=500, help="pictures to judge (default: 500)")
    compare.add_argument("--out", type=Path, default=Path("runs/compare"), help="folder (default: runs/compare)")
    compare.add_argument("--seed", type=int, default=0)
    compare.set_defaults(run=_later("comparing", "run_compare"))


def _train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a system, on built-in data or yours",
        epilog="Any other field of the system's config or of its recipe can be set: --width 256 --steps 2000 --batch 8 "
        "(`seriatim show KEY` lists them).",
    )
    train.add_argument("key", metavar="KEY", help="the system, as `seriatim list` names it")
    _data(train)
    train.add_argument(
        "--from",
        "--base",
        dest="base",
        metavar="MODEL",
        help="train this model further, or a part that drafts for it: a folder, GGUF file, run, zoo:NAME, hub",
    )
    train.add_argument("--lora", type=positive, metavar="RANK", help="train an adapter on it, of this rank")
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
    generate.add_argument(
        "--prompt", default="", help="what text begins with, or what pictures show (several with commas between)"
    )
    generate.add_argument(
        "--infix", metavar="TEXT",
        help="a text with gaps to fill: <mask:12> for so many tokens, <fill> for any number; \\<fill> is text",
    )  # fmt: skip
    generate.add_argument("--chat", action="store_true", help="the prompt is what a user says, in the model's template")
    generate.add_argument("--ids", help="the same as ids, for a model without a tokenizer: 1,2,3")
    generate.add_argument(
        "--length", "--max-new-tokens", type=positive, help="tokens of text (default: 200, or what there is room for)"
    )
    generate.add_argument("--label", action="append", help="class of pictures, by number or name; may be repeated")
    generate.add_argument("--count", type=positive, help="pictures of each label, or in all; texts (default: 1)")
    generate.add_argument(
        "--decoder", default="own", help="how it is decoded: see `seriatim list`, decoder and unmasking (default: own)"
    )
    _sampling(generate)
    generate.add_argument(
        "--size", type=size_of, metavar="48x32", help="width and height of pictures in pixels, where a system draws any"
    )
    generate.add_argument(
        "--scales", type=scales_of, metavar="1,2,4,8", help="maps of a pyramid, by side or rows x columns as in 8x12"
    )
    generate.add_argument(
        "--depth", type=positive, help="layers that the fine scales of a pyramid run, where it learned so"
    )
    generate.add_argument(
        "--image", type=Path, metavar="FILE", help="a picture of which a part is drawn anew (--inpaint)"
    )
    generate.add_argument("--inpaint", type=Path, metavar="MASK", help="a picture, white where --image is drawn anew")
    for name, text in (
        ("suppress-tokens", "is never written"), ("begin-suppress-tokens", "is not written as the first new one"),
        ("keep-tokens", "guidance leaves visible in the prompt"),
    ):  # fmt: skip
        generate.add_argument(
            f"--{name}", metavar="TOKEN", action="append", help=f"a token that {text}: id or text; may be repeated"
        )
    generate.add_argument("--stop", action="append", help="a text that ends what is written; may be repeated")
    form = generate.add_mutually_exclusive_group()
    form.add_argument("--json-schema", metavar="FILE", help="write JSON of this schema")
    form.add_argument("--regex", help="write what this regular expression matches")
    form.add_argument("--grammar", metavar="FILE", help="write what this grammar (Lark) allows")
    generate.add_argument("--adapter", metavar="DIR", help="a LoRA adapter to fold into the weights")
    _formats(generate)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--record", type=Path, metavar="FILE.html", help="write a page that replays how a text came")
    generate.add_argument("--quiet", action="store_true", help="nothing but the text, on a terminal too")
    generate.add_argument("--out", type=Path, help="folder for pictures (default: RUN/generated)")
    generate.add_argument("--json", action="store_true", help="print one JSON object")
    generate.set_defaults(run=_later("generating", "run_generate"))


def _sampling(command: argparse.ArgumentParser) -> None:
    for name, kind, text in (
        ("temperature", float, "0: greedy"), ("top-k", int, "the k likeliest"), ("top-p", float, "nucleus"),
        ("min-p", float, "share of the likeliest"), ("typical", float, "typical mass"),
        ("guidance", float, "weight of the condition, or of the prompt"),
        ("steps", int, "decoding steps, where there is a choice"),
    ):  # fmt: skip
        command.add_argument(f"--{name}", type=kind, help=f"{text} (default: the system's own)")
    for name, text in (
        ("repetition-penalty", "of tokens in the text; 1: none"), ("presence-penalty", "of generated tokens, once"),
        ("frequency-penalty", "of generated tokens, each time"),
    ):  # fmt: skip
        command.add_argument(f"--{name}", type=float, help=f"{text} (default: the model's own)")


def _formats(command: argparse.ArgumentParser) -> None:
    """How the weights of a language model are kept, and its steps computed."""
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="number format (default: as it is)"
    )
    command.add_argument(
        "--weights",
        choices=("packed", "int8", "int4"),
        help="keep matrices laid out for this processor (bfloat16), or as integers: faster",
    )
    command.add_argument("--compile", action="store_true", help="compile steps: seconds at first, then up to 3x faster")


def _bench(commands: Any) -> None:
    bench = commands.add_parser("bench", help="decoders of a language model side by side: speed, memory, losslessness")
    bench.add_argument("source", metavar="MODEL", help="a folder, GGUF file, zoo:NAME, or a name on the hub")
    bench.add_argument("--decoders", default="ancestral,prompt-lookup", metavar="A,B", help="default: %(default)s")
    bench.add_argument(
        "--prompts", default="builtin", metavar="FILE",
        help='JSON lines ({"turns": [...]} or {"prompt": "..."}), text (a prompt a paragraph), or builtin (default)',
    )  # fmt: skip
    bench.add_argument("--count", type=positive, help="at most so many of the prompts, spread evenly (default: all)")
    bench.add_argument("--new-tokens", type=positive, default=64, help="tokens for each prompt (default: 64)")
    bench.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default: 0)")
    _formats(bench)
    bench.add_argument("--runs", type=positive, default=3, help="times that each prompt is given (default: 3)")
    bench.add_argument(
        "--draws", type=int, default=0, help="texts for the test of sampling, such as 10000 (default: 0, no test)"
    )
    bench.add_argument(
        "--no-memory", action="store_true", help="do not measure the memory of a process for each decoder"
    )
    bench.add_argument("--seed", type=int, default=0)
    bench.add_argument("--out", type=Path, help="folder for bench.json and bench.png")
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    bench.set_defaults(run=_later("benching", "run_bench"))


def _serve(commands: Any) -> None:
    serve = commands.add_parser("serve", help="models behind OpenAI's interface, and a page to watch them generate")
    serve.add_argument("sources", nargs="+", metavar="MODEL", help="a folder, GGUF file, run, zoo:NAME, hub; several")
    serve.add_argument(
        "--decoder", action="append", metavar="NAME",
        help="how texts may be written, the first by default; may be repeated (default: ancestral, prompt-lookup, "
        "token-recycling)",
    )  # fmt: skip
    serve.add_argument("--host", default="127.0.0.1", help="address to be reached at (default: %(default)s)")
    serve.add_argument("--port", type=port, default=8000, help="default: %(default)s; 0: any that is free")
    serve.add_argument(
        "--allow-host", action="append", metavar="NAME", help="another name that it may be called by; may be repeated"
    )
    serve.add_argument(
        "--api-key",
        metavar="KEY",
        help="what clients must show (default: SERIATIM_API_KEY, which other users cannot see)",
    )
    serve.add_argument("--rows", type=positive, default=32, help="texts of a model in flight (default: %(default)s)")
    serve.add_argument("--queue", type=positive, default=256, help="requests that may wait (default: %(default)s)")
    serve.add_argument(
        "--max-tokens", type=positive, default=4096, help="new tokens of a text, at most (default: %(default)s)"
    )
    serve.add_argument("--max-seconds", type=positive, default=600, help="of a request (default: %(default)s)")
    _formats(serve)
    serve.set_defaults(run=_later("serving", "run_serve"))


def _data(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", help="a built-in set by name, or the path of your own (default: the system's)")
    command.add_argument("--image-size", type=positive, help="side of pictures from a folder, in pixels")
    command.add_argument("--time", metavar="COLUMN", help="of a series: its column of times (default: found)")
    command.add_argument("--target", metavar="A,B", help="of a series: the columns to forecast (default: all numbers)")
    command.add_argument("--frequency", metavar="1h", help="of a series: its step (default: inferred)")
    command.add_argument("--duplicates", choices=("mean", "last"), help="of a series: what becomes of equal times")


def data_options(options: argparse.Namespace) -> dict[str, Any]:
    """What was said about data, as the loader takes it."""
    names = ("image_size", "time", "target", "frequency", "duplicates")
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def _later(module: str, function: str) -> Callable[..., int]:
    def run(*arguments: Any) -> int:
        return getattr(importlib.import_module(f"seriatim.cli.{module}"), function)(*arguments)

    return run


def size_of(text: str) -> tuple[int, int]:
    """Two whole numbers with an x between them."""
    words = text.lower().split("x")
    if len(words) != 2 or not all(w.isdigit() and int(w) for w in words):
        raise argparse.ArgumentTypeError(f"must be two whole numbers, as in 48x32, not {text!r}")
    return int(words[0]), int(words[1])


def scales_of(text: str) -> tuple[int | tuple[int, int], ...]:
    """Whole numbers, or two with an x between them, separated by commas."""
    return tuple(size_of(word) if "x" in word.lower() else positive(word) for word in text.split(","))


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def port(text: str) -> int:
    """A number of a port."""
    value = int(text)
    if not 0 <= value < 2**16:
        raise argparse.ArgumentTypeError("must be 0 to 65535")
    return value
