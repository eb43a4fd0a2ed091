"""A page a system, made when the site is built: from its card, docstring, settings, claim, last result and pictures.

A hook of mkdocs (`hooks` in mkdocs.yml). Nothing that it makes is committed, so nothing can be out of date. Pictures
of a system are the mask of its smallest instance, drawn here, and files named KEY-*.png or KEY-*.gif in docs/images/.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from seriatim.systems.decoders import FAMILIES, example_of
from seriatim.systems.meta import Meta, card_of, catalogue, everything, load, recorded, status_of, studies

IMAGES = Path(__file__).parent / "images"
RESULTS = Path(__file__).parents[1] / "results"
SHOWN = {
    "L": "the laws hold", "E": "runs from end to end", "C": "its claim was measured", "W": "published weights load",
}  # fmt: skip
ORDERLESS = ("tokenizer", "study", "series", *FAMILIES)  # families that have no order of their own


# ---- one page --------------------------------------------------------------------------------------------------------


def page(key: str) -> str:
    """The page of a system as Markdown. Raises KeyError for an unknown one."""
    meta, text, details, result = card_of(key)
    module = load(key)
    parts = [f"# {meta.title}", *_card(meta, details), inspect.cleandoc(text)]
    if meta.family not in ORDERLESS:
        parts += ["## Its order", _order(module), f"![Who sees whom in {meta.title}](images/{key}-mask.png)"]
    parts += ["## Run it", _commands(meta), *_settings(key, module), *_claim(module), *_result(result), *_pictures(key)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _card(meta: Meta, details: Mapping[str, str]) -> Iterator[str]:
    yield f"*{meta.summary}*"
    marks = [text for letter, text in SHOWN.items() if status_of(meta.key)[letter]]
    none = "nothing yet" if meta.family == "study" else "nothing yet, for this state of its file"
    rows = [
        ("key", f"`{meta.key}`"), ("family", meta.family), ("modality", meta.modality), ("paper", _linked(meta.paper)),
        ("likelihood", meta.likelihood), ("shown", "; ".join(marks) or none),
        ("parts", ", ".join(f"`{p}`" for p in details["parts"].split(", ") if p)),
    ]  # fmt: skip
    yield table(("", ""), rows)


def _linked(paper: str) -> str:
    """A paper with its number on arXiv as a link."""
    words = paper.replace("arXiv ", "").split()
    return " ".join(
        f"[arXiv {w}](https://arxiv.org/abs/{w})" if w.replace(".", "", 1).isdigit() and "." in w else w for w in words
    )


def _order(module: ModuleType) -> str:
    case = module.case()
    plan = case.plan(case.sample(1))
    ranks = [int(r) for r in plan.rank[0]]
    packed = case.model.factorization.packed(case.canvas(case.sample(1))) is not None
    which = "All steps of a sample in one forward" if packed else "The first forward of an empty sample"
    return (
        f"{which}, for the smallest instance ({len(ranks)} elements, on which the laws run): {plan.size} slots. A row "
        "is dark where its slot sees the slot of the column; beside it stand the element that is read there, and the "
        "step that decides it."
    )


def mask(key: str) -> bytes:
    """The mask of a system's smallest instance as PNG."""
    from seriatim.evaluation.pictures import draw_mask

    case = load(key).case()
    plan = case.plan(case.sample(1))
    view = next(iter(plan.views.values()))
    reads = {int(s): int(e) for s, e in zip(plan.reads.slot[0], plan.reads.element[0], strict=True) if min(s, e) >= 0}
    step = plan.rank[0].tolist()
    names = [
        f"slot {i}: element {reads[i]}, step {step[reads[i]]}" if i in reads else f"slot {i}" for i in range(plan.size)
    ]
    seen = view.mask()[0]
    with TemporaryDirectory() as folder:
        return draw_mask(seen, Path(folder) / "mask.png", row_labels=names).read_bytes()


def _commands(meta: Meta) -> str:
    if meta.family in FAMILIES:
        spec, free = example_of(meta.key), meta.family == "unmasking"
        lines = [f'seriatim generate zoo:{"text-mdlm" if free else "text-base"} --decoder {spec} --prompt "def "']
        lines += [] if free else [f"seriatim bench zoo:text-base --decoders ancestral,{spec}"]
        lines += [f"seriatim laws {meta.key} --verbose"]
        return "```\n" + "\n".join(lines) + "\n```"
    if meta.family == "study":
        return f"```\nseriatim show {meta.key}\nseriatim claim {meta.key}\n```"
    lines = [f"seriatim show {meta.key}", f"seriatim train {meta.key}"]
    if meta.family == "series":
        lines = [f"seriatim forecast {meta.key} --data my.csv --horizon 96", f"seriatim train {meta.key} --data my.csv"]
        lines += [f"seriatim evaluate runs/{meta.key}", f"seriatim compare {meta.key} dlinear --data my.csv"]
        lines += [f"seriatim laws {meta.key} --verbose"]
    elif meta.family != "tokenizer":
        lines += [f"seriatim generate runs/{meta.key}", f"seriatim evaluate runs/{meta.key}"]
        lines += [f"seriatim laws {meta.key} --verbose"]
    return "```\n" + "\n".join(lines) + "\n```"


def _settings(key: str, module: ModuleType) -> Iterator[str]:
    """Config, sizes and recipes."""
    from seriatim.verbs.load import system_class

    try:
        cls: Any = system_class(key)
    except ValueError:  # a decoder, or composed in Python only
        cls = module
    options = getattr(module, "Options", None)
    if options is not None and fields(options):
        yield from _table_of(options, "Options", "option")
        yield f"Given behind the name: `--decoder {key}+{fields(options)[0].name}=...`"
    config = getattr(cls, "Config", None)
    if config is None:
        return
    yield from _table_of(config, "Settings", "setting")
    sizes: Mapping[str, Any] = getattr(cls, "sizes", {})
    recipes: Mapping[str, Any] = getattr(cls, "recipes", {})
    if recipes:
        yield "A size changes these defaults, and has a recipe of its own:"
        lines = []
        for name, recipe in recipes.items():
            changes = ", ".join(f"{k} {v}" for k, v in sizes.get(name, {}).items()) or "the defaults"
            rate = f"{recipe.learning_rate:g}"
            steps = f"{cls.passes} passes" if recipe.epoch == recipe.steps else f"{recipe.steps:,}"
            lines.append((f"`{name}`", changes, steps, str(recipe.batch), rate))
        yield table(("size", "settings", "steps", "batch", "learning rate"), lines)


def _table_of(config: Any, title: str, what: str) -> Iterator[str]:
    """The fields of a dataclass under a heading."""
    yield f"## {title}"
    text = inspect.cleandoc(config.__doc__ or "")
    yield "" if text.startswith(f"{config.__name__}(") else text  # the one that a dataclass makes up
    rows = [(f"`{f.name}`", f"`{_type(f)}`", _default(f)) for f in fields(config)]
    yield table((what, "type", "default"), rows)


def _type(f: Field[Any]) -> str:
    return f.type if isinstance(f.type, str) else getattr(f.type, "__name__", str(f.type))


def _default(f: Field[Any]) -> str:
    value = f.default if f.default_factory is MISSING else f.default_factory()
    if value is MISSING:
        return ""
    return f"`{type(value).__name__}(...)`" if is_dataclass(value) else f"`{value!r}`"


def _claim(module: ModuleType) -> Iterator[str]:
    claim = getattr(module, "CLAIM", None)
    if isinstance(claim, str):  # stated, and not measurable yet
        yield "## Claim"
        yield claim
    elif claim is not None:
        command = f"`seriatim claim {module.META.key}`"
        yield "## Claim"
        yield claim.text
        yield table(("", ""), [("the paper", claim.paper), ("rule", claim.rule), ("command", command)])


def _result(result: Mapping[str, Any] | None) -> Iterator[str]:
    """What was measured last: verdict, means, every run."""
    if result is None:
        return
    yield "## Last result"
    ours, baseline = (_number(result[k]) for k in ("ours", "baseline"))
    yield f"**{result['verdict']}**: {result['metric']} {ours} against {baseline}{_between(result)}."
    yield f"![Every arm and seed; shaded, the noise of the baseline](images/{result['key']}-claim.png)"
    metric = result["metric"]
    rows = [
        (name, str(run.get("seed", "")), _number(run.get(metric)), _number(run.get("train_seconds")))
        for name, runs in result["arms"].items() for run in runs
    ]  # fmt: skip
    yield table(("arm", "seed", metric, "seconds of training"), rows)
    made = [(name, f"`{result[name]}`") for name in ("command", "machine", "commit") if name in result]
    yield table(("", ""), made)


def _between(result: Mapping[str, Any]) -> str:
    """Where the difference lies, if that is known."""
    ends = result.get("difference_95")
    return "" if ends is None else f"; the difference lies between {_number(ends[0])} and {_number(ends[1])} (95%)"


def chart(result: Mapping[str, Any]) -> bytes:
    """The arms of a claim as PNG."""
    from seriatim.evaluation.claim_chart import save_claim

    with TemporaryDirectory() as folder:
        return save_claim(result, Path(folder) / "claim.png").read_bytes()


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "" if value is None else str(value)


def _pictures(key: str) -> Iterator[str]:
    names = sorted(p.name for end in ("png", "gif") for p in IMAGES.glob(f"{key}-*.{end}"))
    longer = tuple(f"{k}-" for k in catalogue() if k.startswith(f"{key}-"))  # d3pm-pixels is not d3pm
    names = [name for name in names if not (longer and name.startswith(longer))]
    if names:
        yield "## Pictures"
    for name in names:
        yield f"![{key}: {Path(name).stem.removeprefix(f'{key}-')}](../images/{name})"


# ---- the table of all ------------------------------------------------------------------------------------------------


def overview() -> str:
    """Every system in a line, as Markdown: what it is, and which of L, E, C, W is shown."""
    rows = []
    for key, (meta, _) in sorted(catalogue().items(), key=lambda item: (item[1][0].family, item[0])):
        marks = "".join(letter if shown else "–" for letter, shown in status_of(key).items())
        rows.append((f"[`{key}`](systems/{key}.md)", meta.family, meta.likelihood, marks, meta.summary))
    legend = "; ".join(f"{letter}: {text}" for letter, text in SHOWN.items())
    return table(("key", "family", "likelihood", "shown", "what it is"), rows) + f"\n\n{legend}."


def questions() -> str:
    """Every study in a line."""
    rows = [(f"[`{key}`](systems/{key}.md)", meta.modality, meta.summary) for key, (meta, _) in studies().items()]
    return table(("key", "modality", "what it measures"), rows)


def verdicts() -> str:
    """Every claim that was measured: what came out, beside the paper's figure."""
    rows = []
    for key in sorted(everything()):
        _, _, _, result = card_of(key)
        if result is not None:
            ours, baseline = (_number(result[k]) for k in ("ours", "baseline"))
            found = f"{result['metric']} {ours} against {baseline}"
            rows.append((f"[`{key}`](systems/{key}.md)", result["verdict"], found, result["claim"], result["paper"]))
    return table(("key", "verdict", "measured", "claim", "the paper"), rows)


def requests() -> str:
    """What every decoder answers to every request, as it was last run."""
    known = recorded()
    answers = {key: row["requests"] for key, row in sorted(known.items()) if "requests" in row}
    columns = list(dict.fromkeys(column for row in answers.values() for column in row))
    rows = [(f"[`{key}`](systems/{key}.md)", *(row.get(c, "") for c in columns)) for key, row in answers.items()]
    return table(("decoder", *columns), rows)


def speeds() -> str:
    """How fast language models generate here, beside `transformers` and llama.cpp."""
    measured = _measured("decode_speed")
    sizes = {name: part["arms"] for name, part in measured.items() if isinstance(part, dict) and "arms" in part}
    arms = list(dict.fromkeys(arm for own in sizes.values() for arm in own))
    rows = [(arm, *(f"{own[arm]['decode ratio']:.2f}" if arm in own else "" for own in sizes.values())) for arm in arms]
    rate = [f"{own['hugging face']['decode tokens/s']:g} tokens/s" for own in sizes.values()]
    prefill = [f"{max(f['prefill ratio'] for f in own.values()):.2f}" for own in sizes.values()]
    return table(("", *sizes), [("hugging face, bf16", *rate), *rows[1:], ("best prefill of 512", *prefill)])


def _measured(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def drafting() -> str:
    """What decoders gain on SmolLM2, greedily and at a temperature."""
    both = [_measured(f"bench_smollm2_{name}")["decoders"] for name in ("greedy", "temperature07")]
    rows = []
    for name in both[0]:
        cells = (f"{own[name][k]:.2f}" for own in both for k in ("ratio", "mean_accepted_length"))
        rows.append((f"`{name.partition(':')[0]}`", *cells))
    return table(("decoder", "greedy", "tokens a forward", "temperature 0.7", "tokens a forward"), rows)


def assisted() -> str:
    """Drafting beside Hugging Face's."""
    pairs = {name: part["arms"] for name, part in _measured("assisted").items() if isinstance(part, dict)}
    arms = list(dict.fromkeys(arm for own in pairs.values() for arm in own))
    cells = ([own[arm]["varied tokens/s"] if arm in own else "" for own in pairs.values()] for arm in arms)
    return table(("", *pairs), [(arm, *map(str, row)) for arm, row in zip(arms, cells, strict=True)])


COLUMNS = ("order", "groups", "visibility", "feed", "head", "likelihood", "forwards", "growth", "cache")


def image_orders(keys: Sequence[str] | None = None) -> str:
    """The columns of every image system, as it was watched."""
    from seriatim.evaluation.image_survey_page import said_of
    from seriatim.systems.image_taxonomy import taxonomy

    cells = [
        (f"[`{r.key}`](systems/{r.key}.md)", *(said_of(vars(r), name) for name in COLUMNS)) for r in taxonomy(keys)
    ]
    return table(("key", *COLUMNS), cells)


def series() -> str:
    """Published and measured errors of forecasts, from the last run of benchmarks/series_table.py."""
    found = json.loads((RESULTS / "series_table.json").read_text(encoding="utf-8"))
    methods = {"itransformer": 96, "dlinear": 96, "ridge": 96, "last day": 24}
    rows = []
    for row in found["rows"]:
        cells = [f"{row['data']}, {row['horizon']}", "{:.3f} / {:.3f}".format(*row["published"])]
        for method in methods:
            one = row.get(method)
            runs = one.get("runs", []) if one else []
            spread = f" ± {one['mse_spread']:.3f}" if len(runs) > 1 else " (one seed)" if runs else ""
            cells.append(f"{one['mse']:.3f} / {one['mae']:.3f}{spread}" if one else "–")
        rows.append(cells)
    named = {"itransformer": "iTransformer, here", "dlinear": "DLinear", "ridge": "ridge", "last day": "the last day"}
    return table(
        ("set, horizon", "iTransformer, published (96)", *(f"{named[m]} ({n})" for m, n in methods.items())), rows
    )


def horizons() -> str:
    """Errors of long forecasts over their first steps, from the last run of benchmarks/horizons.py."""
    found = json.loads((RESULTS / "horizons.json").read_text(encoding="utf-8"))
    steps = sorted({int(h) for row in found["rows"].values() for h in row["mse"]})
    rows = [
        [f"{name} ({row['lookback']})"]
        + [f"{row['mse'][h]:.3f} / {row['mae'][h]:.3f}" if h in row["mse"] else "–" for h in map(str, steps)]
        for name, row in found["rows"].items()
    ]
    return table(("forecaster (lookback)", *map(str, steps)), rows)


TABLES = {  # what a page writes where it wants one
    "<!-- table of systems -->": overview,
    "<!-- table of studies -->": questions,
    "<!-- table of claims -->": verdicts,
    "<!-- table of requests -->": requests,
    "<!-- table of decoding speed -->": speeds,
    "<!-- table of drafting -->": drafting,
    "<!-- table of assisted generation -->": assisted,
    "<!-- table of series -->": series,
    "<!-- table of horizons -->": horizons,
}
WATCHED = {"<!-- table of image orders -->": image_orders}  # the same, where it takes half a minute


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; bars inside cells are escaped, except in code."""
    safe = [[re.sub(r"(`[^`]*`)|\|", lambda m: m[1] or r"\|", cell) for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *safe]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- hooks -----------------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Add the pages, and list them under "Systems"."""
    from mkdocs.structure.files import File

    section = next(item["Systems"] for item in config.nav if "Systems" in item)
    families: dict[str, list[dict[str, str]]] = {}
    for key, (meta, _) in everything().items():
        files.append(File.generated(config, f"systems/{key}.md", content=page(key)))
        families.setdefault(meta.family, []).append({meta.title: f"systems/{key}.md"})
        if meta.family not in ORDERLESS:
            files.append(File.generated(config, f"systems/images/{key}-mask.png", content=mask(key)))
        if (result := card_of(key)[3]) is not None:
            files.append(File.generated(config, f"systems/images/{key}-claim.png", content=chart(result)))
    section.extend({family.capitalize(): pages} for family, pages in families.items())
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put tables where a page asks for them."""
    for mark, made in (TABLES | WATCHED).items():
        if mark in markdown:
            markdown = markdown.replace(mark, made())
    return markdown
