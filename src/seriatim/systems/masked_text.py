"""Systems of text whose tokens are decided in any order, of the whole text or of a block: masked diffusion and kin."""

from __future__ import annotations

from seriatim.canvas import Canvas
from seriatim.decoding.loop import Decider
from seriatim.decoding.unmask import Unmask
from seriatim.systems.system import Sampling
from seriatim.systems.text_system import TextSystem


class MaskedText(TextSystem):
    """Decoded by `Unmask`. The config has `rule`, and may have a `threshold`."""

    fills = "known"

    def _settled(self, canvas: Canvas, start: int = 0) -> list[int]:
        ids = super()._settled(canvas, start)
        ends = [i for i, x in enumerate(ids) if x in self.stop]
        if ends and (not canvas.done or ends == [len(ids) - 1]):  # what stands behind an end may yet go
            return ids[: ends[0]]
        return ids

    def decider(self, sampling: Sampling) -> Decider:
        threshold = None if sampling.steps else getattr(self.config, "threshold", None)
        return Unmask(sampling.steps or self.model.layout.size, self.config.rule, threshold, self.stop)
