"""Unmasking beside the official code of Fast-dLLM: the same weights, cache and rule, in the same run.

    python benchmarks/canvas_speed.py --official CHECKOUT [--runs 3] [--prompts 2] [--arms ...] [--out FILE]

CHECKOUT is a clone of NVlabs/Fast-dLLM, whose folder `llada` (or `v1/llada`) has LLaDA's modelling file and the
official samplers. A model of LLaDA's shape with random weights (width 512, 8 layers) is written once by the official
class, under SERIATIM_HOME/bench, and read by both sides. Arms: no cache, prefix and dual cache, one token a forward,
and all above a confidence of 0.9. Greedy, 128 new tokens in blocks of 32. Every arm is a process of its own; they take
turns in random order, and wait without using a processor meanwhile. Seconds are medians, ratios those of medians; texts
are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from pathlib import Path
from typing import Any

from decode import THREADS, Arm, answering

from seriatim.evaluation.cost import DISTURBED, Others, load_average
from seriatim.home import HOME

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

BLOCK, MASK, PROMPT = 32, 8191, 64
CONFIG = {
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "activation_type": "silu", "alibi": False,
    "attention_dropout": 0.0, "attention_layer_norm": False, "block_group_size": 1, "block_type": "llama",
    "d_model": 512, "embedding_dropout": 0.0, "embedding_size": 8192, "eos_token_id": 8190, "flash_attention": False,
    "include_bias": False, "include_qkv_bias": False, "init_device": "cpu", "init_fn": "normal", "init_std": 0.02,
    "input_emb_norm": False, "layer_norm_type": "rms", "layer_norm_with_affine": True, "mask_token_id": MASK,
    "max_sequence_length": 1024, "mlp_hidden_size": 1408, "mlp_ratio": 4, "multi_query_attention": None, "n_heads": 8,
    "n_kv_heads": 8, "n_layers": 8, "pad_token_id": 0, "residual_dropout": 0.0, "rms_norm_eps": 1e-5, "rope": True,
    "rope_full_precision": True, "rope_theta": 500000.0, "scale_logits": False, "vocab_size": 8192,
    "weight_tying": False,
}  # fmt: skip
CACHES = ("none", "prefix", "dual")
ARMS = (*CACHES, *(f"{cache} 0.9" for cache in CACHES))


def code_of(checkout: Path) -> Path:
    """The folder of the official samplers."""
    for place in (checkout / "llada", checkout / "v1" / "llada"):
        if (place / "generate.py").is_file():
            return place
    raise SystemExit(f"there is no llada/generate.py in {checkout}: clone https://github.com/NVlabs/Fast-dLLM there")


def official(code: Path) -> tuple[Any, Any]:
    """The official model with fresh weights, and the module of samplers."""
    sys.path.insert(0, str(code))
    import generate
    from model.configuration_llada import LLaDAConfig
    from model.modeling_llada import LLaDAModelLM

    if not hasattr(LLaDAModelLM, "all_tied_weights_keys"):  # asked for by newer versions of transformers
        LLaDAModelLM.all_tied_weights_keys = {}
    config = LLaDAConfig(**{k: v for k, v in CONFIG.items() if k not in ("model_type", "architectures")})
    config.use_cache = False
    return LLaDAModelLM(config, init_params=True).eval(), generate


def folder(code: Path) -> Path:
    """The model's folder, made once."""
    place = HOME / "bench" / "llada-30m"
    if not (place / "config.json").is_file():
        import torch
        from safetensors.torch import save_file

        torch.manual_seed(0)
        model, _ = official(code)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.dim() > 1:  # so that it is sure of some tokens, and texts are no loops
                    last = name.endswith("transformer.ff_out.weight")
                    p.normal_(0, 1.0 if "wte" in name else (8 if last else 1.5) / p.shape[1] ** 0.5)
                    if last:
                        p[MASK] = 0  # the mask is never likeliest: the official samplers would write it
        place.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.contiguous().clone() for k, v in model.state_dict().items()}
        save_file(tensors, str(place / "model.safetensors"), {"format": "pt"})
        (place / "config.json").write_text(json.dumps(CONFIG, indent=1))
    return place


# ---- an arm, in a process of its own ---------------------------------------------------------------------------------


def worker(name: str, place: str, more: str) -> None:
    """Answer requests on standard input, one JSON object a line, until it ends. name: side, cache, threshold."""
    settings = json.loads(more)
    side, cache, *threshold = name.split()
    sure = float(threshold[0]) if threshold else None
    answering((_official if side == "official" else _ours)(place, cache, sure, settings))


def _ours(place: str, cache: str, sure: float | None, settings: dict[str, str]):
    import torch

    import seriatim

    torch.set_num_threads(THREADS)
    model: Any = seriatim.load(place, dtype=getattr(torch, settings["dtype"]))
    way = f"fast-dllm+cache={cache}+block={BLOCK}+threshold={'none' if sure is None else sure}"
    return lambda rows, new: [
        (made.ids, made.forwards)
        for made in (model.generate(row, max_new_tokens=new, decoder=way, temperature=0.0) for row in rows)
    ]


def _official(place: str, cache: str, sure: float | None, settings: dict[str, str]):
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(THREADS)
    model, samplers = official(Path(settings["code"]))
    model.load_state_dict(load_file(f"{place}/model.safetensors"))
    model = model.to(getattr(torch, settings["dtype"]))
    ways = {"none": "generate", "prefix": "generate_with_prefix_cache", "dual": "generate_with_dual_cache"}
    way = getattr(samplers, ways[cache])

    def answer(rows: list[list[int]], new: int) -> Any:
        out = []
        for row in rows:
            ids, forwards = way(
                model, torch.tensor([row]), steps=new, gen_length=new, block_length=BLOCK, mask_id=MASK, threshold=sure
            )
            out.append((ids[0, len(row) :].tolist(), forwards))
        return out

    return answer


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(place: Path, which: list[str], prompts: int, new: int, runs: int, settings: dict[str, str]) -> Any:
    """Seconds, forwards and texts of both sides of each arm."""
    order = random.Random(0)
    asked = [[order.randrange(MASK - 1) for _ in range(PROMPT)] for _ in range(prompts)]
    names = [f"{side} {arm}" for arm in which for side in ("official", "ours")]
    others = Others()
    arms = {name: Arm(name, place, file=__file__, decoder=json.dumps(settings)) for name in names}
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in asked] for name in names}
    texts: dict[str, list[Any]] = {name: [None] * prompts for name in names}
    try:
        for arm in arms.values():
            arm.ask([asked[0]], BLOCK)
        for _ in range(runs):
            for n, prompt in enumerate(asked):
                for name in order.sample(names, len(names)):
                    answer = arms[name].ask([prompt], new)
                    seconds[name][n].append(answer["seconds"])
                    texts[name][n] = answer["ids"][0]
    finally:
        for arm in arms.values():
            arm.close()
    used = others.share()  # of which arms are a part only once they have ended
    out = {}
    for arm in which:
        theirs, ours = (sum(map(statistics.median, seconds[f"{side} {arm}"])) for side in ("official", "ours"))
        pairs = list(zip(texts[f"official {arm}"], texts[f"ours {arm}"], strict=True))
        out[arm] = {
            "official tokens/s": new * prompts / theirs, "ours tokens/s": new * prompts / ours, "ratio": theirs / ours,
            "official forwards": sum(a[1] for a, _ in pairs), "ours forwards": sum(b[1] for _, b in pairs),
            "same texts": sum(a[0] == b[0] for a, b in pairs),
            "distinct tokens": statistics.fmean(len(set(b[0])) / new for _, b in pairs),
        }  # fmt: skip
    disturbed = used is None or used > DISTURBED
    return {"arms": out, "others": used, "load_average": load_average(), "disturbed": disturbed}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, help="a clone of NVlabs/Fast-dLLM")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), help=f"of {', '.join(map(repr, ARMS))}")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--dtype", default="float32", help="in bfloat16 texts may differ where two tokens are as likely"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker)
        return 0
    if options.official is None or set(options.arms) - set(ARMS) or options.new_tokens % BLOCK:
        parser.error(f"give --official; arms are of {', '.join(map(repr, ARMS))}, and blocks hold {BLOCK} tokens")
    code = code_of(options.official.resolve())
    print(f"load {load_average():.2f}")
    settings = {"code": str(code), "dtype": options.dtype}
    result = measure(folder(code), options.arms, options.prompts, options.new_tokens, options.runs, settings)
    for name, row in result["arms"].items():
        print(
            f"{name:12} tokens/s {row['official tokens/s']:6.1f} official {row['ours tokens/s']:6.1f} ours, ratio "
            f"{row['ratio']:.2f}   forwards {row['official forwards']} and {row['ours forwards']}   same texts "
            f"{row['same texts']} of {options.prompts}, distinct {row['distinct tokens']:.2f}"
        )
    print(f"load {result['load_average']:.2f}" + (", DISTURBED: the speed means nothing" * result["disturbed"]))
    if options.out:
        told = {"threads": THREADS, "new tokens": options.new_tokens, "runs": options.runs, "dtype": options.dtype}
        options.out.write_text(json.dumps(told | result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
