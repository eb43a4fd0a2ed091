"""How random the ids of pictures are beside those of texts, and how far attention over pictures reaches.

    python benchmarks/token_statistics.py [TOKENIZER] [--text stdlib] [--runs RUN ...] [--out FOLDER]

TOKENIZER (zoo:image-vq) makes ids of glyphs; the text is cut into characters, of which the commonest are ids of as
large a vocabulary. As many pairs of both are counted, beside as many of uniform ids: where a vocabulary is large for
the number of ids, even these are not found uniform. Writes token_statistics.png, and for runs of systems of pictures
(zoo:raster-ar) attention_distance.png; prints the figures.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch

from seriatim.data.base import load_data
from seriatim.evaluation.attention_distance import attention_distance, save_attention_distance, uniform_distance
from seriatim.evaluation.token_statistics import commonest, save_token_statistics, token_statistics
from seriatim.verbs.load import load


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", nargs="?", default="zoo:image-vq")
    parser.add_argument("--text", default="stdlib", help="built-in text data, or a file or folder of texts")
    parser.add_argument("--data", default="glyphs")
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--runs", nargs="*", default=["zoo:raster-ar"])
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args()
    pictures = load_data(options.data, "image")
    tokenizer = load(options.tokenizer).model
    draws = torch.Generator().manual_seed(0)
    index = torch.randint(len(pictures.train), (options.pictures,), generator=draws)
    ids = torch.cat([tokenizer.encode(pictures.train.take(part, draws)["image"]) for part in index.split(200)])
    ids, vocab = ids.flatten(1), int(tokenizer.vocab)
    letters = "".join(load_data(options.text, "text").train.documents)
    shape = tuple(ids.shape)
    if len(letters) < math.prod(shape):
        raise SystemExit(f"the text has {len(letters):,} characters, and {math.prod(shape):,} are needed")
    text = commonest(torch.tensor([ord(c) for c in letters[: math.prod(shape)]]), vocab).view(shape)
    found = {
        "pictures": token_statistics(ids, vocab),
        "text": token_statistics(text, vocab),
        "uniform": token_statistics(torch.randint(vocab, shape, generator=draws), vocab),
    }
    for name, s in found.items():
        print(f"{name:10s} single {s.single:.3f} nats of {math.log(vocab):.3f}, given the one before {s.following:.3f}")
        print(f"{'':10s} a share of {s.randomness:.3f}; from uniform: {s.single_from_uniform:.3f}, pairs "
              f"{s.pair_from_uniform:.3f}")  # fmt: skip
    said = f"{vocab} ids, {shape[0] * (shape[1] - 1) / vocab**2:.1f} pairs a cell"
    print(save_token_statistics(found, options.out / "token_statistics.png", said))
    if options.runs:
        systems = {run.rpartition("/")[2]: load(run) for run in options.runs}
        batch = pictures.test.take(torch.arange(min(64, len(pictures.test))))
        reach = {name: attention_distance(system, batch) for name, system in systems.items()}
        for name, layers in reach.items():
            print(f"{name:10s} distance by layer: {', '.join(f'{float(h.mean()):.2f}' for h in layers)}")
        grid = next(iter(systems.values())).tokenizer.grid
        print(save_attention_distance(reach, options.out / "attention_distance.png", uniform_distance(*grid)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
