"""`bench`: decoders of a language model side by side: what each takes, and whether it writes what it should."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import seriatim
from seriatim.backbones.quantize import quantize
from seriatim.decoding.filters import Warper
from seriatim.evaluation.bench import Arm, Prompt, Runs, Written, apart, figures, loops, take_turns
from seriatim.evaluation.bench_chart import save_bench
from seriatim.evaluation.cost import DISTURBED, Others, fresh_process, load_average, parameters
from seriatim.evaluation.forward_cost import ForwardCost, measured
from seriatim.evaluation.questions import Question, builtin_questions, read_questions
from seriatim.systems.decoders import decoder_names, forget, named
from seriatim.systems.generation import Generation
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.system import System, evenly
from seriatim.training.checkpoint import save_json
from seriatim.verbs.bench_lossless import Sampled, dtype_of, lossless, sampled
from seriatim.verbs.bench_prompts import asked
from seriatim.verbs.claim import commit, machine
from seriatim.verbs.load import load, number_format
from seriatim.verbs.train import Bar

PLAIN = "ancestral"  # what the others are compared with
SMALL = 30e6  # parameters, below which Python takes as long as the model
Tell = Callable[[int, int], None]


@dataclass(frozen=True)
class Way:
    """How every decoder of a bench generates; JSON holds it."""

    new_tokens: int
    temperature: float
    seed: int
    weights: str | None
    dtype: str | None
    compile: bool


def bench(
    source: str | Path | System,
    decoders: Sequence[str] = (PLAIN, "prompt-lookup"),
    prompts: str | Path = "builtin",
    *,
    count: int | None = None,
    new_tokens: int = 64,
    temperature: float = 0.0,
    weights: str | None = None,
    dtype: torch.dtype | str | None = None,
    compile: bool = False,
    runs: int = 3,
    draws: int = 0,
    memory: bool = True,
    seed: int = 0,
    out: str | Path | None = None,
    bar: Bar | None = None,
) -> dict[str, Any]:
    """Figures of each decoder on the same prompts, as docs/models.md explains them; with `out`, also OUT/bench.json and
    OUT/bench.png.

    prompts: "builtin" or a file (`read_questions`); count: at most so many of them, spread evenly; weights, dtype: as
    `load` takes them; compile: the step of one token; runs: how often each prompt is given to each decoder; draws: for
    a temperature above 0, texts of each decoder for the test of two samples (10,000 are many; 0: no test); memory:
    measure the peak of a fresh process for each decoder. Raises ValueError, OSError that says what is wrong: decoders
    that do not exist, a model of another kind, prompts that are none or too long.
    """
    names, added = decoders_of(decoders)
    _check(count, temperature, runs, draws, out)
    questions = None if str(prompts) == "builtin" else read_questions(prompts)
    kind = number_format(dtype)
    way = Way(new_tokens, temperature, seed, weights, None if kind is None else _name(kind), compile)
    system = opened(source, way)
    size = parameters(system.model)  # of integers none are counted
    made_ready(system, way)
    given, notes = asked(system, _some(questions, system, count), new_tokens, questions is None, _phase(bar, "prompts"))
    arms = {name: arm(system, name, way) for name in names}
    written, around = _timed(arms, given, runs, seed, lambda: forget(system), bar)
    drawn = _drawn(system, names, given, draws, way, bar)
    with _phase(bar, "measuring forwards"):
        cost = measured(system, _context(given, written[PLAIN]))
    told = _decoders(system, given, written, drawn, way, cost)
    held, lacking = _memory(source, names, given, way, bar) if memory else ({}, ["peak memory was not asked for"])
    told = {name: {**own, "peak_memory": held.get(name)} for name, own in told.items()}
    result = {
        "model": str(source) if not isinstance(source, System) else source.meta.key, "system": system.meta.key,
        "parameters": size, "dtype": _name(dtype_of(system)), "weights": weights,
        "compiled": compile, "prompts": _told(prompts, given), "new_tokens": new_tokens, "temperature": temperature,
        "runs": runs, "draws": draws, "seed": seed, "decoders": told, **around, "forward_cost": asdict(cost),
        "by_prompt": _by_prompt(given, written), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "version": seriatim.__version__, "machine": machine(), "commit": commit(),
    }  # fmt: skip
    result["notes"] = [*added, *notes, *lacking, *_says(result)]
    if out is not None:
        save_json(result, Path(out) / "bench.json")
        save_bench(result, Path(out) / "bench.png")
    return result


def _check(count: int | None, temperature: float, runs: int, draws: int, out: str | Path | None) -> None:
    """Refuse settings that mean nothing, before anything is loaded."""
    Warper(temperature)
    if runs < 1 or draws < 0 or (count is not None and count < 1):
        raise ValueError(f"runs and count are at least 1 and draws at least 0, got {runs}, {count} and {draws}")
    if draws and temperature == 0:
        raise ValueError(f"draws ({draws}) test sampling, and at temperature 0 nothing is drawn: set a temperature")
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"{out} is a file; name a folder for the figures")


def decoders_of(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Decoders by name, the plain one first, and what is to be said about that. Raises ValueError for names that do not
    exist, with those that are near."""
    for name in names:
        if named(name)[0] == "own":
            raise ValueError("name decoders: a next-token model's own is ancestral")
    if not names:
        raise ValueError(f"name at least one decoder; there are {', '.join(decoder_names()[1:])}")
    added = [] if PLAIN in names else [f"{PLAIN} was added: it is what the others are compared with"]
    return list(dict.fromkeys([PLAIN, *names])), added


# ---- the model -------------------------------------------------------------------------------------------------------


def opened(source: str | Path | System, way: Way) -> LanguageModel:
    """The model in its number format. Raises ValueError where it is none that continues texts token by token."""
    if isinstance(source, System):
        if way.weights is not None or way.dtype is not None:
            raise ValueError("weights and dtype are for a model that is loaded here: give its folder or name")
        system = source
    else:
        system = load(source, way.dtype)
    if not isinstance(system, LanguageModel) or not system.model.factorization.draftable:
        raise ValueError(f"{system.meta.key} is no next-token language model, and only decoders of these are compared")
    return system


def made_ready(system: LanguageModel, way: Way) -> None:
    """The model as it is to be measured: its weights as integers, its step compiled. Raises ValueError where it
    cannot be."""
    if way.weights is not None:
        quantize(system.model, way.weights)
    if way.compile:
        system.model.compile_decoding()


def arm(system: LanguageModel, decoder: str, way: Way) -> Arm:
    """A decoder as it is measured."""

    def write(prompt: Prompt) -> Written:
        made = system.generate(
            list(prompt.ids), decoder, max_new_tokens=way.new_tokens, temperature=way.temperature, seed=way.seed
        )
        assert isinstance(made, Generation)
        drafts = int(made.drafted), int(made.accepted)
        return Written(tuple(made.ids), made.forwards, *drafts, made.seconds, made.first, made.rows, made.drafting)

    return write


# ---- measuring -------------------------------------------------------------------------------------------------------


def _timed(
    arms: dict[str, Arm], given: Sequence[Prompt], runs: int, seed: int, begin: Callable[[], None], bar: Bar | None
) -> tuple[dict[str, Runs], dict[str, Any]]:
    """What was written, and what else the machine did meanwhile. Before that, each arm writes for the longest prompt
    and the first; what it learns of texts is forgotten at the `begin` of each run."""
    with _phase(bar, "warming up") as tell:
        longest = max(given, key=lambda p: len(p.ids))
        warming = [(write, prompt) for prompt in (longest, given[0]) for write in arms.values()]
        seconds = 0.0
        for n, (write, prompt) in enumerate(warming, 1):
            seconds += write(prompt).seconds
            tell(n, len(warming))
    others = Others()
    with _phase(bar, "decoding") as tell:
        written = take_turns(arms, given, runs, seed, tell, begin)
    used, load = others.share(), load_average()
    disturbed = None if used is None else used > DISTURBED or load > torch.get_num_threads() + 0.5
    around = {"load_average": load, "others": used, "disturbed": disturbed, "warm_up_seconds": seconds}
    return written, around


def _drawn(
    system: LanguageModel, names: Sequence[str], given: Sequence[Prompt], draws: int, way: Way, bar: Bar | None
) -> dict[str, Sampled]:
    """Samples of first tokens for the test, each decoder by seeds of its own; none where none were asked for."""
    if not draws:
        return {}
    with _phase(bar, "drawing") as tell:
        out = {}
        for n, name in enumerate(names):
            out[name] = sampled(system, name, given, draws, way.temperature, way.seed + 1 + n * draws)
            tell(n + 1, len(names))
    return out


def _memory(
    source: str | Path | System, names: Sequence[str], given: Sequence[Prompt], way: Way, bar: Bar | None
) -> tuple[dict[str, int], list[str]]:
    """The most memory that a fresh process holds which loads the model and answers the longest prompt, in bytes; and
    why it is not known of some."""
    if isinstance(source, System):
        return {}, ["peak memory is not measured: the model is in memory already; give its folder or name"]
    longest = max(given, key=lambda p: len(p.ids))
    held, lacking = {}, []
    with _phase(bar, "memory") as tell:
        for n, name in enumerate(names, 1):
            task = {"source": str(source), "decoder": name, "ids": list(longest.ids), "way": asdict(way)}
            try:
                held[name] = fresh_process("seriatim.verbs.bench:once", task).peak
            except RuntimeError as error:
                lacking.append(f"peak memory of {name} is not measured: {str(error).splitlines()[-1]}")
            tell(n, len(names))
    return held, lacking


def once(source: str, decoder: str, ids: list[int], way: dict[str, Any]) -> None:
    """What a fresh process does."""
    settings = Way(**way)
    system = opened(source, settings)
    made_ready(system, settings)
    system.generate(
        ids, decoder, max_new_tokens=settings.new_tokens, temperature=settings.temperature, seed=settings.seed
    )


@contextmanager
def _phase(bar: Bar | None, name: str) -> Iterator[Tell]:
    """A phase on the terminal, if anybody watches."""
    display = bar(name) if bar else None
    try:
        yield lambda step, steps: display.update(step, steps, {}) if display else None
    finally:
        if display:
            display.close()


# ---- telling ---------------------------------------------------------------------------------------------------------


def _some(questions: list[Question] | None, system: LanguageModel, count: int | None) -> list[Question]:
    every = builtin_questions(system.chat is not None) if questions is None else questions
    return every if count is None else [every[n] for n in evenly(len(every), count).tolist()]


def _told(prompts: str | Path, given: Sequence[Prompt]) -> dict[str, Any]:
    """Which prompts these were; `digest` is the same for the same ids."""
    groups = [p.group for p in given]
    digest = hashlib.sha256(json.dumps([p.ids for p in given]).encode()).hexdigest()[:16]
    counts = {g: groups.count(g) for g in dict.fromkeys(groups)}
    longest = max(len(p.ids) for p in given)
    return {"source": str(prompts), "count": len(given), "groups": counts, "longest": longest, "digest": digest}


def _decoders(
    system: LanguageModel, given: Sequence[Prompt], written: dict[str, Runs], drawn: dict[str, Sampled], way: Way,
    cost: ForwardCost,
) -> dict[str, Any]:  # fmt: skip
    """Figures and verdict of each decoder."""
    plain, out = written[PLAIN], {}
    for name, own in written.items():
        said: dict[str, Any] = {"verdict": "baseline", "rule": "what the others are compared with"}
        if name != PLAIN:
            pair = (drawn[name], drawn[PLAIN]) if drawn else None
            said = lossless(system, name, given, own, plain, way.new_tokens, way.temperature, pair)
        out[name] = {**apart(own, plain, given, cost), "lossless": said}
    return out


def _context(given: Sequence[Prompt], plain: Runs) -> int:
    """Known tokens in the middle of a typical answer."""
    return round(statistics.median(len(p.ids) + len(runs[0].ids) / 2 for p, runs in zip(given, plain, strict=True)))


def _by_prompt(given: Sequence[Prompt], written: dict[str, Runs]) -> list[dict[str, Any]]:
    """Prompt by prompt: what each decoder took."""
    kept = ("tokens", "forwards", "seconds", "ratio", "mean_accepted_length", "distinct_share")
    out = []
    for n, (prompt, looping) in enumerate(zip(given, loops(written[PLAIN]), strict=True)):
        own = {name: figures([runs[n]], [written[PLAIN][n]]) for name, runs in written.items()}
        each = {name: {k: f[k] for k in kept} for name, f in own.items()}
        out.append({"group": prompt.group, "tokens": len(prompt.ids), "looping": looping, "decoders": each})
    return out


def _says(result: dict[str, Any]) -> list[str]:
    """What a reader of the figures should know."""
    notes = []
    if result["disturbed"]:
        notes.append(
            f"DISTURBED: other processes used {result['others']:.2f} of a processor (load average "
            f"{result['load_average']:.1f}, {result['threads']} threads here): repeat it on a quiet machine"
        )
    if result["disturbed"] is None:
        notes.append("this system does not say what other processes did: look after a quiet machine yourself")
    looping = sum(p["looping"] for p in result["by_prompt"])
    if looping:
        notes.append(
            f"{looping} of {result['prompts']['count']} outputs repeat themselves (under 30% "
            "distinct tokens), which is easy to draft: they are averaged apart"
        )
    failed = [name for name, own in result["decoders"].items() if own["lossless"]["verdict"] == "fails"]
    if failed and result["temperature"] == 0 and result["dtype"] in ("bfloat16", "float16"):
        notes.append(
            f"{', '.join(failed)} parted from plain decoding by more than {result['dtype']} explains; with --dtype "
            "float32 texts must be equal: if they are, rounding adds up in this model, if not, the decoder is wrong"
        )
    if result["temperature"] == 0:
        notes.append("greedy: sampled text is harder to draft, so look at a temperature of 0.7 beside it")
    if result["parameters"] < SMALL:
        notes.append("a small model: Python takes as long as the arithmetic, so accepted lengths say more than seconds")
    if result["dtype"] == "float32" and result["weights"] is None and len(result["decoders"]) > 1:
        notes.append("float32: on a processor two rows cost twice one, so drafts hardly pay; look at --dtype bfloat16")
    return notes


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
