"""Image systems after equal training: as many seconds, about as many parameters, the same pictures, one seed.

Systems are worked off one after another, in an order drawn by the seed, so that a machine that slows down meets all
families alike. The figures of each are stored as soon as they stand, under SERIATIM_HOME; a run that was cut off goes
on where it was. Minutes each on small pictures say which ideas learn fast here, not which are best.
"""

from __future__ import annotations

import base64
import json
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from seriatim.data.base import Data, load_data
from seriatim.evaluation.cost import fresh_process, load_average, parameters
from seriatim.evaluation.features import even
from seriatim.evaluation.metrics import nearest_examples
from seriatim.evaluation.pictures import save_grid
from seriatim.evaluation.quality import picture_quality
from seriatim.home import HOME
from seriatim.systems.image_orders import animated, class_of, watched
from seriatim.systems.image_taxonomy import taxonomy
from seriatim.systems.meta import catalogue
from seriatim.systems.system import config_from
from seriatim.tokenizers.files import make_tokenizer
from seriatim.training.checkpoint import save_json

NEAR = 0.05  # of the common number of parameters: a size that is as near needs no other width
WIDTHS = (0.3, 4.0)  # times that of its size: how narrow and wide a system may be made
ELEMENTS = 8_320  # of a step of training, at most (64 small pyramids): one of pixels would take half a minute else
EMA = 0.98  # decay of the averaged weights that draw
NEVER = 1_000_000  # steps between two looks at held-out pictures: they are judged at the end
SHOWN = 20  # pictures of a system in the report
Said = Callable[[str], None]


@dataclass(frozen=True)
class Budget:
    """What every system gets. minutes: of training; size: the named size it begins from; parameters: the common number
    that its width is chosen for; samples: pictures that are judged; tokenizer_steps: of tokenizers that are not shipped
    (None: their recipe's)."""

    data: str = "glyphs"
    minutes: float = 5.0
    size: str = "tiny"
    parameters: int = 745_000
    samples: int = 500
    seed: int = 0
    tokenizer_steps: int | None = None

    def __post_init__(self) -> None:
        if not self.minutes > 0 or self.samples < 2 or self.parameters < 1:
            raise ValueError(
                f"minutes and parameters are positive, samples at least 2; got {self.minutes:g}, {self.parameters}, "
                f"{self.samples}"
            )

    @property
    def folder(self) -> Path:
        """Where its runs and figures stand."""
        name = f"{self.data}-{self.size}-{self.minutes:g}min-{self.parameters}-{self.samples}-{self.seed}"
        return HOME / "comparisons" / (name if self.tokenizer_steps is None else f"{name}-t{self.tokenizer_steps}")


def everybody() -> list[str]:
    """The keys of all image systems."""
    return [key for key, (meta, _) in catalogue().items() if meta.family == "image"]


def shuffled(keys: Sequence[str], seed: int) -> list[str]:
    """The order in which they are trained."""
    return random.Random(seed).sample(sorted(keys), len(keys))


# ---- sizes -----------------------------------------------------------------------------------------------------------


def fitted(key: str, tokenizer: Any, data: Data, budget: Budget) -> tuple[dict[str, int], int]:
    """The change of a system's size (no change, or another width) that brings it nearest to the common number of
    parameters, and how many it then has."""
    cls = class_of(key)
    known = cls.known(tokenizer, data)
    size = budget.size if budget.size in cls.sizes else next(iter(cls.sizes))

    def count(**own: int) -> int:
        with torch.random.fork_rng(devices=[]):
            return parameters(cls(config_from(cls, own, size, **known), tokenizer).model)

    first, config = count(), config_from(cls, {}, size, **known)
    if abs(first / budget.parameters - 1) <= NEAR:
        return {}, first
    unit = 4 * config.heads  # heads of whole pairs of numbers for both axes
    guess = config.width * math.sqrt(budget.parameters / first)  # about: what else there is does not grow with it
    least, most = (round(share * config.width / unit) for share in WIDTHS)
    width = min(max(round(guess / unit), least, 1), most) * unit
    found, direction = {config.width: first}, unit
    while width not in found and max(least, 1) * unit <= width <= most * unit:
        try:
            found[width] = count(width=width)
            direction = unit if found[width] < budget.parameters else -unit
        except ValueError:  # parts of another stride than heads: this width is none of them
            pass
        width += direction
    best = min(found, key=lambda w: abs(math.log(found[w] / budget.parameters)))
    return ({} if best == config.width else {"width": best}), found[best]


def tokenizer_of(key: str, data: Data, budget: Budget, said: Said = print) -> tuple[Any, str | None, str]:
    """The tokenizer of a system, what `train` is told of it, and its kind: shipped where the data are glyphs and there
    is one, else trained once for all that share it."""
    from seriatim.verbs.load import ZOO, load
    from seriatim.verbs.train import train

    cls = class_of(key)
    shape = data.train.take(torch.tensor([0]))["image"].shape
    kind = cls.tokenizer_for(shape[1:])
    if kind not in catalogue():
        pictures = {"side": shape[2], "channels": shape[1]}
        return make_tokenizer(kind, {**pictures, **cls.tokenizer_settings_for(shape[1:])}), None, kind
    shipped = data.name == "glyphs" and any((root / kind / "run.json").is_file() for root in ZOO)
    if shipped and budget.tokenizer_steps is None:
        return load(f"zoo:{kind}").model, f"zoo:{kind}", kind
    steps = budget.tokenizer_steps
    folder = HOME / "comparisons" / "tokenizers" / f"{data.name.replace('/', '_')}-{kind}-{steps or 'recipe'}"
    if not (folder / "finished").is_file():
        said(f"tokenizer {kind}")
        train(kind, data, out=folder, resume=True, settings={"seed": 0} | ({} if steps is None else {"steps": steps}))
        (folder / "finished").touch()
    return load(str(folder)).model, str(folder), kind


# ---- one system ------------------------------------------------------------------------------------------------------


def figures_of(key: str, data: Data, budget: Budget, said: Said = print) -> dict[str, Any]:
    """The figures of a system: found, or trained for and stored."""
    from seriatim.verbs.compare import seconds_of
    from seriatim.verbs.evaluate import picture_figures
    from seriatim.verbs.train import train

    file = budget.folder / key / "figures.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    tokenizer, told, kind = tokenizer_of(key, data, budget, said)
    change, count = fitted(key, tokenizer, data, budget)
    size = budget.size if budget.size in class_of(key).sizes else None
    batch = batch_of(key, tokenizer, data, size)
    said(f"{key}: {count:,} parameters, batch {batch}" + "".join(f", {k} {v}" for k, v in change.items()))
    trained = train(
        key, data, out=budget.folder / key / "run", size=size, tokenizer=told, minutes=budget.minutes, resume=True,
        settings={**change, "seed": budget.seed, "batch": batch, "ema": EMA, "validate_every": NEVER},
    )  # fmt: skip
    system: Any = trained.system
    found, pictures = picture_figures(system, data, budget.samples, budget.seed)
    figures = {
        "key": key, "title": system.meta.title, "tokenizer": kind, "tokenizer_from": _origin(told),
        "size": size or next(iter(system.sizes)), **change, **found, "parameters": parameters(system.model),
        "steps": int(trained.history[-1]["step"]), "batch": batch,
        "training_seconds": seconds_of(trained),
        "seconds_alone": alone(system, budget.seed),
        "memory": fresh_process("seriatim.verbs.compare:generate_once", {"folder": str(trained.folder)}).peak,
        "losses": thinned([(h["step"], h["loss"]) for h in trained.history]), "load": load_average(),
        "strip": strip(pictures.images, system.ink),
    }  # fmt: skip
    save_json(_sound(figures), file)
    return json.loads(file.read_text(encoding="utf-8"))


def alone(system: Any, seed: int, rounds: int = 3) -> float:
    """Seconds of a picture that is drawn by itself, the median of some."""
    return statistics.median(
        system.draw(torch.zeros(1, dtype=torch.long), seed=seed + i).seconds for i in range(rounds)
    )


def _origin(told: str | None) -> str:
    return "needs none" if told is None else told if told.startswith("zoo:") else "trained for the comparison"


def batch_of(key: str, tokenizer: Any, data: Data, size: str | None) -> int:
    """How many pictures a step of training sees: the recipe's, or fewer where they have many elements."""
    cls = class_of(key)
    recipe = cls.recipes.get(size or "") or next(iter(cls.recipes.values()))
    model = cls(config_from(cls, {}, size, **cls.known(tokenizer, data)), tokenizer).model
    return max(1, min(recipe.batch, ELEMENTS // model.layout.size))


def thinned(points: Sequence[tuple[float, float]], most: int = 60) -> list[list[float]]:
    """A curve as means of neighbours, at most so many points."""
    every = -(-len(points) // most) or 1
    parts = [points[i : i + every] for i in range(0, len(points), every)]
    return [
        [round(sum(p[0] for p in part) / len(part), 1), round(sum(p[1] for p in part) / len(part), 5)] for part in parts
    ]


def strip(images: Float[Tensor, "n c h w"], ink: bool) -> str:
    """Some of the pictures in a row, spread over their classes, as PNG in base64."""
    shown = images[even(len(images), SHOWN)]
    with TemporaryDirectory() as folder:
        path = save_grid(shown, Path(folder) / "strip.png", columns=SHOWN // 2, upscale=1, invert=ink)
        return base64.b64encode(path.read_bytes()).decode("ascii")


def _sound(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers that JSON takes: what is no number is nothing."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in figures.items()}


# ---- what it is compared with ----------------------------------------------------------------------------------------


def references(data: Data, budget: Budget) -> dict[str, dict[str, Any]]:
    """What pictures that are no system's score: real ones, means of classes, and copies."""
    from seriatim.data.base import INK
    from seriatim.verbs.evaluate import features_of

    file = budget.folder / "references.json"
    if file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))
    out: dict[str, dict[str, Any]] = {}
    for name, (images, labels) in _reference_pictures(data, budget).items():
        found = picture_quality(images, labels, data, features_of(data))
        out[name] = _sound({**found, "strip": strip(images, data.name in INK)})
    save_json(out, file)
    return json.loads(file.read_text(encoding="utf-8"))


def _reference_pictures(data: Data, budget: Budget) -> dict[str, tuple[Tensor, Tensor | None]]:
    count, g = budget.samples, torch.Generator().manual_seed(budget.seed)

    def drawn(side: Any) -> tuple[Tensor, Tensor | None]:
        index = torch.arange(count) * len(side) // count
        batch = side.take(index, g)
        return batch["image"], batch.get("label")

    out = {"held-out pictures, drawn anew": drawn(data.test), "training pictures, drawn anew": drawn(data.train)}
    every = data.train.take(torch.arange(len(data.train)))
    label = every.get("label", torch.zeros(len(data.train), dtype=torch.long))
    classes = label.unique()
    means = torch.stack([every["image"][label == k].mean(0) for k in classes])
    again = torch.arange(count) * len(classes) // count
    out["mean of the class"] = means[again], classes[again] if "label" in every else None
    real = data.test.take(even(len(data.test), count))
    nearest = nearest_examples(real["image"], data.train)[1]
    out["nearest training picture to held-out ones"] = every["image"][nearest], every.get("label", label)[nearest]
    return out


# ---- all of it -------------------------------------------------------------------------------------------------------


def compare_images(
    keys: Sequence[str], budget: Budget, results: str | Path = "results", said: Said = print
) -> dict[str, Any]:
    """Work off the systems that are not finished and write RESULTS/image_comparison.json, after each of them; what it
    holds. Raises KeyError for systems that there are not."""
    from seriatim.verbs.claim import commit, machine

    unknown = [key for key in keys if key not in everybody()]
    if unknown or not keys:
        raise KeyError(f"no image system is called {', '.join(unknown)}; there are {', '.join(everybody())}")
    data, order = load_data(budget.data, "image"), shuffled(keys, budget.seed)
    if budget.samples < 2 * len(data.classes):
        raise ValueError(
            f"{data.name} has {len(data.classes)} classes, and each is drawn at least twice: judge "
            f"{2 * len(data.classes)} samples or more, not {budget.samples}"
        )
    said(f"order: {', '.join(order)}")
    result: dict[str, Any] = {
        "budget": asdict(budget), "order": order, "references": references(data, budget), "systems": {},
        "pictures": [len(data.train), len(data.test), len(data.classes)],
        "taxonomy": [{f.name: getattr(r, f.name) for f in fields(r)} for r in taxonomy(everybody())],
        "films": {key: animated(watched(key)) for key in everybody()}, "machine": machine(), "commit": commit(),
        "command": f"python benchmarks/image_comparison.py --minutes {budget.minutes:g}",
    }  # fmt: skip
    for n, key in enumerate(order):
        said(f"{key} ({n + 1} of {len(order)})")
        result["systems"][key] = figures_of(key, data, budget, said)
        save_json(result, Path(results) / "image_comparison.json")
    return json.loads((Path(results) / "image_comparison.json").read_text(encoding="utf-8"))
