"""All image systems after equal training, with the map of the survey: figures, one page, one picture.

    python benchmarks/image_comparison.py [--minutes 5] [--systems all|representatives|KEY,KEY] [--out results]

Systems are worked off one by one, in an order drawn by the seed; the figures of each are stored under SERIATIM_HOME as
soon as they stand, so that a run that was cut off goes on. With 5 minutes each it takes about three hours on two
cores. Writes image_comparison.json, .html and .png; `--report` makes the last two again from the first.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from seriatim.studies.ar_vision_survey import REPRESENTATIVES, report
from seriatim.studies.image_comparison import Budget, compare_images, everybody


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="of training each")
    parser.add_argument("--systems", default="all", help="all, representatives, or keys with commas between")
    parser.add_argument("--data", default="glyphs")
    parser.add_argument("--size", default="tiny", help="the named size that widths are changed from")
    parser.add_argument("--parameters", type=int, default=Budget.parameters, help="about so many each")
    parser.add_argument("--samples", type=int, default=500, help="pictures that are judged")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer-steps", type=int, help="of all tokenizers, in place of the shipped ones")
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--report", action="store_true", help="only page and picture, from what is stored in --out")
    o = parser.parse_args(arguments)
    stored = o.out / "image_comparison.json"
    if o.report:
        if not stored.is_file():
            parser.error(f"there is no {stored}: run it without --report first")
        result = json.loads(stored.read_text(encoding="utf-8"))
    else:
        groups = {"all": everybody(), "representatives": list(REPRESENTATIVES.values())}
        keys = groups.get(o.systems) or [key.strip() for key in o.systems.split(",")]
        try:
            budget = Budget(o.data, o.minutes, o.size, o.parameters, o.samples, o.seed, o.tokenizer_steps)
            result = compare_images(keys, budget, o.out, said=lambda text: print(text, flush=True))
        except (KeyError, ValueError, OSError) as error:
            parser.error(str(error.args[0] if isinstance(error, KeyError) else error))
    print(*report(result, o.out), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
