"""Relaxed decoders with a small and a large model: what is gained for what is lost, over their settings; and a moved
state beside the one that it stands for.

    python benchmarks/relaxed.py bild LARGE SMALL [--prompts 8] [--new-tokens 128] [--out results/bild]
    python benchmarks/relaxed.py judge [LARGE SMALL] [--judge DIR] [--questions 60] [--out results/judge]
    python benchmarks/relaxed.py transfer LARGE PART [--out results/transfer]

bild: tokens a forward of the large model, and nats a token that it finds in the text, for each pair of thresholds; a
text coloured by who wrote it. judge: accuracy on held-out questions and tokens a forward, for each delta, and for a
judge whose weights are shuffled; answers by the usual rule and by the judge, tokens marked that the usual rule rejects
(the models: those of the claim). transfer: the cosine between a pseudo state and the real one, layer by layer.
Figures are written as JSON and drawn; they do not depend on the machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from seriatim.data.questions import Question, asked
from seriatim.decoding.loop import decode
from seriatim.evaluation.pictures import ACCENT, INK, write_beside
from seriatim.posttraining.drafting import Base, load_part, ready
from seriatim.posttraining.judge import Judge, train_judge
from seriatim.posttraining.transfer import HiddenTransfer, similarities
from seriatim.systems.decoder import bild, judge_decoding
from seriatim.systems.decoders import Ask, Decoding
from seriatim.systems.draft_model import draft_model
from seriatim.systems.system import Sampling
from seriatim.systems.trials import held_out
from seriatim.training.checkpoint import save_json
from seriatim.verbs.load import load

GREEDY = Sampling(temperature=0)
FALLBACK, ROLLBACK = (0.3, 0.6, 0.8), (0.0, 1.0, 2.0, 5.0)
DELTA = (1.0, 0.99, 0.9, 0.7, 0.5, 0.3)
LAYERS = 256  # tokens of held-out text on which states are compared
COLOURS = {"large": "#f4d6c8", "small": "#d5e8d4", "let stand": "#fff2b3", "taken back": "#e8b4b8"}


# ---- big little decoding ---------------------------------------------------------------------------------------------


def thresholds(large: Any, small: str, prompts: int, new_tokens: int) -> dict[str, dict[str, Any]]:
    """Figures for each pair of thresholds, "fallback rollback"."""
    found = {}
    for fallback in FALLBACK:
        for rollback in ROLLBACK:
            spec = f"bild:{small}+fallback={fallback}+rollback={rollback}"
            found[f"{fallback} {rollback}"] = dict(bild.trial(spec, prompts, new_tokens)(large, 0))
            print(f"fallback {fallback}, rollback {rollback}: {found[f'{fallback} {rollback}']}", flush=True)
    return found


def who_wrote(large: Any, small: Any, prompt: Sequence[int], new_tokens: int) -> list[tuple[str, str]]:
    """A text as (who, token): the large model's, the small one's that the large one would have written too, those that
    it let stand, and those that it took back."""
    way = bild.between(Ask(large, GREEDY, large.stop, None, bild.Options()), small)
    proposed: list[list[int]] = []
    propose = way.proposer.propose  # type: ignore[union-attr]

    def noted(*parts: Any) -> Any:
        guess = propose(*parts)
        proposed.append([] if guess is None else guess.value[0].tolist())
        return guess

    way.proposer.propose = noted  # type: ignore[method-assign, union-attr]
    canvas, known, told = large._begun([prompt], new_tokens), len(prompt), []
    for step in decode(large.target(None, GREEDY), canvas, way.decider, way.proposer):
        now = int(canvas.lengths()[0])
        ids, draft = canvas.value["token"][0, :now].tolist(), proposed[-1]
        best = large.logits(torch.tensor([ids]))[0, known - 1 :].argmax(-1).tolist()
        told += [
            ("small" if x == b else "let stand", x) for x, b in zip(ids[known:][: step.accepted], best, strict=False)
        ]
        told += [("taken back", x) for x in draft[step.accepted :]]
        told += [("large", x) for x in ids[known + step.accepted :]]
        known = now
    return [(who, large.tokenizer.decode([x])) for who, x in told]


# ---- judge decoding --------------------------------------------------------------------------------------------------


def deltas(target: Any, small: Any, judge: Judge, questions: Sequence[Question]) -> dict[str, dict[str, float]]:
    """Accuracy and tokens a forward for each delta, then by the same judge with its weights shuffled."""
    found = {}
    for delta in DELTA:
        found[f"{delta:g}"] = judge_decoding.accuracy(target, _judged(target, small, judge, delta), list(questions))
        print(f"delta {delta:g}: {found[f'{delta:g}']}", flush=True)
    judge.weight.copy_(judge.weight[torch.randperm(len(judge.weight), generator=torch.Generator().manual_seed(0))])
    found["shuffled"] = judge_decoding.accuracy(target, _judged(target, small, judge, 0.5), list(questions))
    print(f"shuffled: {found['shuffled']}", flush=True)
    return found


def _judged(target: Any, small: Any, judge: Any, delta: float) -> Callable[[], Decoding]:
    ask = Ask(target, GREEDY, target.stop, None, judge_decoding.Options(delta=delta))
    return lambda: judge_decoding.between(ask, small, judge)


def answers(target: Any, small: Any, judge: Any, question: Question) -> list[tuple[str, str]]:
    """The answer by the usual rule, then by the judge, tokens marked that the usual rule would have rejected."""
    told: list[tuple[str, str]] = []
    for name, delta in (("usual", 1.0), ("judge", 0.5)):
        made = target.generate(
            question.prompt, _judged(target, small, judge, delta)(), max_new_tokens=48, temperature=0.0, stop=["\n"]
        )
        prompt = target.prompt_ids(question.prompt)
        said = target.logits(torch.tensor([[*prompt, *made.ids]]))[0, len(prompt) - 1 : -1].argmax(-1).tolist()
        told.append(("", f"\n{name} ({made.forwards} forwards):"))
        told += [
            ("large" if x == best else "let stand", target.tokenizer.decode([x]))
            for x, best in zip(made.ids, said, strict=True)
        ]
    return told


# ---- telling ---------------------------------------------------------------------------------------------------------


def draw_pairs(series: Mapping[str, Sequence[tuple[float, float]]], path: Path, x: str, y: str) -> None:
    """One line for each name, a point for each setting."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (name, pairs), colour in zip(series.items(), (INK, ACCENT, "#5b8e7d", "#e0a030"), strict=False):
        axes.plot([p[0] for p in pairs], [p[1] for p in pairs], marker="o", color=colour, label=name)
    axes.set(xlabel=x, ylabel=y)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    write_beside(path, lambda file: figure.savefig(file, format="png", dpi=150))


def draw_text(told: Sequence[tuple[str, str]], path: Path) -> None:
    """A page of coloured tokens."""
    spans = (f'<span style="background:{COLOURS.get(who, "none")}">{escape(text)}</span>' for who, text in told)
    legend = " ".join(f'<span style="background:{c}">{who}</span>' for who, c in COLOURS.items())
    page = f"<meta charset=utf-8><pre>{''.join(spans)}</pre><p>{legend}</p>\n"
    write_beside(path, lambda file: file.write(page.encode()))


def run_bild(options: argparse.Namespace) -> None:
    large = load(options.models[0])
    small = draft_model(options.models[1], large)
    found = thresholds(large, options.models[1], options.prompts, options.new_tokens)
    lines = {
        f"fallback {f}": [
            (found[f"{f} {r}"]["nats_per_token"], found[f"{f} {r}"]["tokens_per_forward"]) for r in ROLLBACK
        ]
        for f in FALLBACK
    }
    draw_pairs(lines, options.out / "thresholds.png", "nats a token, by the large model", "tokens a forward")
    draw_text(who_wrote(large, small, held_out(large, 1)[0], options.new_tokens), options.out / "text.html")
    save_json(found, options.out / "bild.json")


def run_judge(options: argparse.Namespace) -> None:
    if options.models:
        target = load(options.models[0])
        small = draft_model(options.models[1], target)
    else:
        with torch.enable_grad():
            target = judge_decoding.answering("zoo:text-base", *judge_decoding.TARGET)
            small = judge_decoding.answering("zoo:text-draft", *judge_decoding.SMALL)
    base = Base(target)
    if options.judge:
        judge = load_part(options.judge, base, Judge)
    else:
        with torch.enable_grad():
            judge = ready(train_judge(base, judge_decoding.examples(target.tokenizer, 400))[0], base)
    questions = asked(1, options.questions, test=True)
    draw_text([x for q in questions[:8] for x in answers(target, small, judge, q)], options.out / "answers.html")
    found = deltas(target, small, judge, questions)
    pairs = [(found[f"{d:g}"]["tokens_per_forward"], found[f"{d:g}"]["accuracy"]) for d in DELTA]
    blind = [(found["shuffled"]["tokens_per_forward"], found["shuffled"]["accuracy"])]
    draw_pairs({"judge": pairs, "shuffled": blind}, options.out / "delta.png", "tokens a forward", "accuracy")
    save_json(found, options.out / "judge.json")


def run_transfer(options: argparse.Namespace) -> None:
    base = Base(load(options.models[0]))
    part = load_part(options.models[1], base, HiddenTransfer)
    ids = torch.tensor(held_out(base.system, 4, LAYERS // 2))
    found = similarities(part, base, ids)
    lines = {f"{j + 1} ahead": [(float(layer), c) for layer, c in own.items()] for j, own in enumerate(found)}
    draw_pairs(lines, options.out / "cosine.png", "layers behind it", "cosine with the real state")
    save_json(lines, options.out / "transfer.json")
    print(lines)


def main() -> None:
    runs = {"bild": run_bild, "judge": run_judge, "transfer": run_transfer}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=runs)
    parser.add_argument("models", nargs="*", help="the large model, then the small one or the part")
    parser.add_argument("--judge", type=Path)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if len(options.models) != 2 and not (options.what == "judge" and not options.models):
        parser.error(f"{options.what} takes two: the large model, then the small one or the part")
    options.out = options.out or Path("results") / options.what
    options.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        runs[options.what](options)


if __name__ == "__main__":
    main()
