"""Plain next-token generation at batch 1: the general loop against a bare one and Hugging Face, on the same weights.

    python benchmarks/next_token.py [--runs 50] [--tokens 100] [--threads 2] [--out results/next_token_speed.json]

Arms are interleaved in one process, in random order in every run. The figure of an arm is the least time of each
position over all runs, averaged over positions: what is left is not noise of the machine. Gates: the loop takes at most
5% more time than forty lines of plain torch written by hand, under 40 microseconds a step where there is almost no
arithmetic, and generates at least 1.6 times as fast as Hugging Face's eager `generate`. Shown beside them, without a
gate: the same forty lines with this library's norm, which is faster than torch's; what is left then is the loop alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from seriatim.backbones.norm import rms_norm
from seriatim.backbones.rope import RoPE
from seriatim.backbones.transformer import Transformer, TransformerConfig
from seriatim.canvas import Canvas
from seriatim.decoding.filters import Warper
from seriatim.decoding.loop import decode
from seriatim.decoding.sample import SampleAll
from seriatim.decoding.target import Target
from seriatim.embed import TokenEmbed
from seriatim.factorization.line import Line
from seriatim.heads.categorical import CategoricalHead
from seriatim.layout import line
from seriatim.model import Model

SMALL = {"width": 256, "depth": 8, "heads": 4, "hidden": 640, "vocab": 4096}  # 6 million parameters
TINY = {"width": 32, "depth": 8, "heads": 4, "hidden": 32, "vocab": 64}  # the same Python, almost no arithmetic
PROMPT = 32
clock = time.perf_counter  # or, beside other jobs, the processor time of this thread
GATES = {"hugging face": 1.6, "loop": 1.05, "microseconds": 40.0}


def build(size: dict[str, int], length: int, kind: torch.dtype) -> Model:
    """A Llama-shaped model with a tied head and weights that do not fall into a loop at once."""
    torch.manual_seed(0)
    config = TransformerConfig(size["width"], size["depth"], size["heads"], hidden=size["hidden"], rope=RoPE())
    embed, backbone = TokenEmbed(size["vocab"], size["width"]), Transformer(config)
    with torch.no_grad():
        for p in backbone.layers.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn_like(p) * 1.5 / p.shape[1] ** 0.5)
        embed.table.normal_()
    head = CategoricalHead(size["width"], size["vocab"], tied=embed.table)
    model = Model(line(length), Line(), embed, backbone, head)
    return model.to(kind).eval().requires_grad_(False)


# ---- the arms: each returns the tokens and the time at which each was there ------------------------------------------


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Torch's own."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def bare(model: Model, prompt: Tensor, count: int, norm: Callable[..., Tensor] = rms_norm):
    """The same mathematics written by hand, with a float32 cache too; the tokens, and when each was there."""
    c, table, last = model.backbone.config, model.embed.table, model.backbone.norm
    layers = [
        tuple(w[n] for n in ("norm1", "qkv", "out", "norm2", "up", "down"))
        for w in (layer.weights() for layer in model.backbone.layers)
    ]
    heads, dim, total, kind = c.heads, c.dim, prompt.shape[1] + count, table.dtype
    cos, sin = model.backbone.rotary["all"].run(0, total, kind, table.device)
    with torch.inference_mode():
        keys = [torch.zeros(1, heads, total, dim) for _ in layers]
        values = [torch.zeros(1, heads, total, dim) for _ in layers]
        ids, start, out, times = prompt, 0, [], []
        for _ in range(count):
            n = ids.shape[1]
            end = start + n
            cosine, sine = cos[start:end], sin[start:end]
            x = F.embedding(ids, table)
            for i, (norm1, qkv, proj, norm2, up, down) in enumerate(layers):
                y = F.linear(norm(x, norm1, c.eps), qkv).view(1, n, 3 * heads, dim)
                qk = y[:, :, : 2 * heads]
                qk = torch.addcmul(qk * cosine, qk.roll(dim // 2, -1), sine).transpose(1, 2)
                keys[i][:, :, start:end] = qk[:, heads:]
                values[i][:, :, start:end] = y[:, :, 2 * heads :].transpose(1, 2)
                k, v = keys[i][:, :, :end], values[i][:, :, :end]
                y = F.scaled_dot_product_attention(qk[:, :heads].float(), k, v, is_causal=n > 1).to(kind)
                x = x + F.linear(y.transpose(1, 2).reshape(1, n, heads * dim), proj)
                gate, up_ = F.linear(norm(x, norm2, c.eps), up).chunk(2, -1)
                x = x + F.linear(F.silu(gate) * up_, down)
            ids = F.linear(norm(x[:, -1:], last, c.eps), table).argmax(-1)
            start = end
            out.append(ids)
            times.append(clock())
    return torch.cat(out, 1), times


def core(model: Model, prompt: Tensor, count: int) -> tuple[Tensor, list[float]]:
    """`decode` with `SampleAll`, greedy."""
    canvas, target = _start(model, prompt, count)
    with torch.inference_mode():
        times = [clock() for _ in decode(target, canvas, SampleAll())]
    return canvas.value["token"][:, prompt.shape[1] :], times


def _start(model: Model, prompt: Tensor, count: int) -> tuple[Canvas, Target]:
    n = prompt.shape[1]
    canvas = model.canvas({"token": F.pad(prompt, (0, count))}, n, layout=line(n + count))
    return canvas, Target(model, warp=Warper(temperature=0))


def hugging_face(model: Model, length: int):
    """A Hugging Face Llama with the weights of ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    c, table = model.backbone.config, model.embed.table
    config = LlamaConfig(
        vocab_size=table.shape[0], hidden_size=c.width, intermediate_size=c.inner, num_hidden_layers=c.depth,
        num_attention_heads=c.heads, num_key_value_heads=c.groups, head_dim=c.dim, rms_norm_eps=c.eps,
        max_position_embeddings=length, rope_parameters={"rope_type": "default", "rope_theta": c.rope.theta},
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    other = LlamaForCausalLM(config)
    state = {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": model.backbone.norm}
    for i, layer in enumerate(model.backbone.layers):
        name = f"model.layers.{i}."
        for part, x in zip("qkv", layer.qkv.split((c.heads * c.dim, *[c.groups * c.dim] * 2)), strict=True):
            state[f"{name}self_attn.{part}_proj.weight"] = x
        state[name + "mlp.gate_proj.weight"], state[name + "mlp.up_proj.weight"] = layer.up.chunk(2)
        state[name + "self_attn.o_proj.weight"], state[name + "mlp.down_proj.weight"] = layer.out, layer.down
        state[name + "input_layernorm.weight"], state[name + "post_attention_layernorm.weight"] = (
            layer.norm1,
            layer.norm2,
        )
    other.load_state_dict(state)
    return other.to(table.dtype).eval().requires_grad_(False)


class _Clock:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(clock())

    def end(self) -> None:
        """Nothing to flush."""


def hf(other, cache: str, prompt: Tensor, count: int) -> tuple[Tensor, list[float]]:
    """Eager `generate`, greedy."""
    clock = _Clock()
    settings = {"max_new_tokens": count, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    with torch.inference_mode():
        ids = other.generate(prompt, streamer=clock, **settings)
    return ids[:, prompt.shape[1] :], clock.times[1:]


# ---- measuring -------------------------------------------------------------------------------------------------------


def interleaved(arms: dict[str, Callable[[], tuple[Tensor, list[float]]]], runs: int) -> dict[str, dict[str, float]]:
    """Microseconds a token of each arm: the least of each position, and the median run."""
    order = random.Random(0)
    took: dict[str, list[list[float]]] = {name: [] for name in arms}
    for run in range(runs + 1):
        for name in order.sample(list(arms), len(arms)):
            times = arms[name]()[1]
            if run:  # the first warms up
                took[name].append([1e6 * (b - a) for a, b in pairwise(times)])
    best = {name: statistics.fmean(min(p) for p in zip(*rows, strict=True)) for name, rows in took.items()}
    middle = {name: statistics.median(statistics.fmean(row) for row in rows) for name, rows in took.items()}
    return {name: {"least": round(best[name], 1), "median": round(middle[name], 1)} for name in arms}


@contextmanager
def timed(owner, name: str, label: str, spent: dict[str, list[float]]) -> Iterator[None]:
    """Note how long a method takes."""
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        start = clock()
        result = original(*args, **kwargs)
        spent.setdefault(label, []).append(1e6 * (clock() - start))
        return result

    held = name in vars(owner)
    setattr(owner, name, wrapped)
    try:
        yield
    finally:
        if held:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def profile(model: Model, prompt: Tensor, count: int, runs: int) -> dict[str, float]:
    """Microseconds of each part of a step, the 20th percentile; `forward` contains embed, backbone and head."""
    from contextlib import ExitStack

    spent: dict[str, list[float]] = {}
    for _ in range(runs):
        canvas, target = _start(model, prompt, count)
        decider = SampleAll()
        parts = [
            (target, "plan", "plan"), (target, "forward", "forward"), (model.embed, "forward", "embed"),
            (model.backbone, "forward", "backbone"), (model.heads["token"], "dist", "head"),
            (decider, "decide", "decide"), (Canvas, "apply", "apply"), (target, "commit", "commit"),
        ]  # fmt: skip
        with ExitStack() as stack, torch.inference_mode():
            for owner, name, label in parts:
                stack.enter_context(timed(owner, name, label, spent))
            for _ in decode(target, canvas, decider):
                pass
    cost = {label: statistics.quantiles(times, n=5)[0] for label, times in spent.items()}
    cost["check and rest of forward"] = cost["forward"] - cost["embed"] - cost["backbone"] - cost["head"]
    return {label: round(value, 1) for label, value in cost.items()}


class Others:
    """The share of one CPU that other processes used meanwhile (Linux)."""

    def __init__(self) -> None:
        self.before = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float]:
        try:
            fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except OSError:
            return 0.0, 0.0, time.perf_counter()
        busy = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
        mine = os.times()
        return busy, mine.user + mine.system, time.perf_counter()

    def share(self) -> float:
        now = self._read()
        busy, mine, wall = (b - a for a, b in zip(self.before, now, strict=True))
        return max(0.0, (busy - mine) / max(wall, 1e-9))


def measure(size: dict[str, int], runs: int, count: int, with_hf: bool) -> dict:
    """All arms on one size of model, in bf16."""
    model = build(size, PROMPT + count, torch.bfloat16)
    prompt = torch.randint(size["vocab"], (1, PROMPT), generator=torch.Generator().manual_seed(0))
    arms: dict[str, Callable[[], tuple[Tensor, list[float]]]] = {
        "bare loop": lambda: bare(model, prompt, count, plain_norm),
        "bare loop, our norm": lambda: bare(model, prompt, count),
        "seriatim": lambda: core(model, prompt, count),
    }
    if with_hf:
        other = hugging_face(model, PROMPT + count)
        for cache in ("dynamic", "static"):
            arms[f"hugging face, {cache}"] = lambda cache=cache: hf(other, cache, prompt, count)  # type: ignore[misc]
    text = {name: arm()[0] for name, arm in arms.items()}
    assert torch.equal(text["seriatim"], text["bare loop, our norm"]), "the arms generate different texts"
    table = interleaved(arms, runs)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "microseconds a token": table,
        "distinct tokens": round(len(text["bare loop"].unique()) / count, 2),
        "parts": profile(model, prompt, count, max(2, runs // 10)),
    }


def gates(small: dict, tiny: dict) -> dict[str, dict]:
    """Each gate: what was measured, what is demanded, whether it holds."""
    t, little = small["microseconds a token"], tiny["microseconds a token"]
    out = {}
    rivals = [t[name]["least"] for name in t if name.startswith("hugging face")]
    if rivals:
        ratio = min(rivals) / t["seriatim"]["least"]
        out["times Hugging Face's speed"] = {"is": round(ratio, 3), "least": GATES["hugging face"]}
    out["times the bare loop's time"] = {
        "is": round(t["seriatim"]["least"] / t["bare loop"]["least"], 4),
        "most": GATES["loop"],
    }
    out["microseconds a step over the bare loop with our norm, tiny model"] = {
        "is": round(little["seriatim"]["least"] - little["bare loop, our norm"]["least"], 1),
        "most": GATES["microseconds"],
    }
    for gate in out.values():
        gate["holds"] = gate["is"] >= gate["least"] if "least" in gate else gate["is"] <= gate["most"]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-hf", action="store_true", help="leave Hugging Face out")
    parser.add_argument(
        "--busy", action="store_true", help="one thread's processor time, for a machine that is not quiet"
    )
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    if args.busy:
        global clock
        clock, args.threads = time.thread_time, 1
    torch.set_num_threads(args.threads)
    others, load = Others(), os.getloadavg()
    small = measure(SMALL, args.runs, args.tokens, not args.no_hf)
    tiny = measure(TINY, args.runs, args.tokens, False)
    share = others.share()
    result = {
        "key": "next-token-speed", "small": small, "tiny": tiny, "gates": gates(small, tiny), "runs": args.runs,
        "threads": args.threads, "load average": [round(x, 2) for x in load], "others used of a CPU": round(share, 2),
        "clock": clock.__name__, "disturbed": share > 0.2, "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    for name in ("small", "tiny"):
        part = result[name]
        print(f"\n{name}: {part['parameters'] / 1e6:.2f} M parameters, bf16, distinct tokens {part['distinct tokens']}")
        base = part["microseconds a token"]["bare loop"]
        for arm, t in part["microseconds a token"].items():
            ratio = t["least"] / base["least"]
            print(f"  {arm:24s} {t['least']:8.1f} us a token (median run {t['median']:8.1f}), {ratio:5.3f} of bare")
        print("  parts, us:", ", ".join(f"{k} {v}" for k, v in part["parts"].items()))
    print(f"\nload average {load[0]:.2f}; other processes used {share:.2f} of a CPU" + ("  DISTURBED" * (share > 0.2)))
    for name, gate in result["gates"].items():
        limit = f"at least {gate['least']}" if "least" in gate else f"at most {gate['most']}"
        print(f"  {'holds' if gate['holds'] else 'FAILS'}: {name}: {gate['is']} ({limit})")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        temporary = args.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(args.out)


if __name__ == "__main__":
    main()
