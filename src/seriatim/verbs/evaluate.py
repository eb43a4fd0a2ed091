"""`evaluate`: figures of a trained system on held-out data, with what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from seriatim.data.base import Data, Pairs, load_data
from seriatim.data.conversations import Conversations
from seriatim.evaluation.cost import parameters
from seriatim.evaluation.features import FeatureModel, features_for
from seriatim.evaluation.metrics import bits_per_byte, bits_per_dimension, text_statistics
from seriatim.evaluation.quality import picture_quality
from seriatim.home import HOME
from seriatim.systems.image_system import ImageSystem, Pictures
from seriatim.systems.language_model import LanguageModel
from seriatim.systems.published import Published
from seriatim.systems.published_masked import PublishedMasked
from seriatim.systems.series_system import SeriesSystem
from seriatim.systems.system import Sampling, System, evenly
from seriatim.systems.text_system import TextSystem
from seriatim.systems.tokenizer_system import TokenizerSystem
from seriatim.tokenizers.report import report
from seriatim.training.run import RunFolder
from seriatim.verbs.load import ZOO, load, where
from seriatim.verbs.series import series_figures


def evaluate(
    source: str | Path | System,
    data: str | Path | Data | None = None,
    *,
    samples: int = 1000,
    seed: int = 0,
    sampling: Sampling | None = None,
    horizon: int | None = None,
    **data_options: Any,
) -> dict[str, Any]:
    """Figures of a run, `zoo:NAME` or a loaded system, on the data it was trained on or others.

    Text: bits per byte (exact or a bound), and statistics of what it writes. Pictures: bits per dimension of the coded
    picture where the likelihood is tractable, FD-s and its kin on `samples` generated pictures, class accuracy,
    forwards and seconds a sample. A tokenizer: what `samples` held-out pictures lose, and how much of its vocabulary
    they use. Series: errors on all windows of the test part at `horizon` (None: what the system was made for), coverage
    and width of intervals, and the errors of what takes seconds. Names of units and cautions: docs/evaluation.md.
    """
    system = source if isinstance(source, System) else load(source)
    if data is None:
        if isinstance(source, System):
            raise ValueError("say on which data to evaluate: a system in memory does not know")
        if isinstance(system, Published | PublishedMasked) and not RunFolder(str(source)).card.is_file():
            raise ValueError("say on which data to evaluate a published model: --data")
        data, read = RunFolder(where(source)).trained_on()
        data_options = read | data_options
    if horizon is not None and not isinstance(system, SeriesSystem):
        raise ValueError(f"a horizon is of series, and {system.meta.key} forecasts none")
    modality = "text" if isinstance(system, TextSystem) else "series" if isinstance(system, SeriesSystem) else "image"
    loaded = data if isinstance(data, Data) else load_data(data, modality, **data_options)
    if isinstance(system, TextSystem):
        figures = text_figures(system, loaded, seed)
    elif isinstance(system, SeriesSystem):
        figures = series_figures(system, loaded, horizon)  # type: ignore[arg-type]
    elif isinstance(system, TokenizerSystem):
        figures = tokenizer_figures(system, loaded, samples)
    else:
        assert isinstance(system, ImageSystem)
        figures = picture_figures(system, loaded, samples, seed, sampling)[0]
    return {"system": system.meta.key, "data": loaded.name, **figures, "parameters": parameters(system.model)}


@torch.no_grad()
def text_figures(system: TextSystem, data: Data, seed: int) -> dict[str, Any]:
    """Bits per byte of held-out windows, or of the answers in conversations or to prompts, and statistics of four
    continuations: of prompts, where the data have them, of nothing, or, where a model begins no text by itself, of the
    windows' first words."""
    if isinstance(data.test, Conversations):
        if not isinstance(system, LanguageModel):
            raise ValueError(f"{data.name} holds conversations, which {system.meta.key} cannot lead: give texts")
        examples: Any = system.answers(data.test)
    elif isinstance(data.test, Pairs):
        examples = system.answered(data.test)
    else:
        examples = system.examples(data.test.documents)
    nats, ids = system.score(examples)
    size = system.bytes_in(examples)
    kind = "bound" if system.meta.likelihood == "bound" else "exact"
    bits = bits_per_byte(nats, ids, size, kind)  # type: ignore[arg-type]
    starts = [""] * 4
    if isinstance(data.test, Pairs):
        starts = [data.test.pairs[i][0] for i in evenly(len(data.test), 4).tolist()]
    elif not system.begins:
        first = examples.take(evenly(len(examples), 4))["token"][:, :8].tolist()
        starts = [system.tokenizer.decode(ids) for ids in first]
    longest = max(len(system.tokenizer.encode(text)) for text in starts)
    length = min(256, system.model.layout.size - longest)
    texts = [system.write(text, length, seed=seed + i) for i, text in enumerate(starts)]
    written = text_statistics([system.tokenizer.encode(text) for text in texts if text])
    return {
        "bits_per_byte": bits.value, "likelihood": kind, "bytes": size, "distinct_share": written.share,
        "entropy": written.entropy,
    }  # fmt: skip


def tokenizer_figures(system: TokenizerSystem, data: Data, samples: int) -> dict[str, Any]:
    """The tokenizer's report, with the distance on maps of the small classifier that also gives FD-s."""
    index = evenly(len(data.test), samples)
    model = features_of(data)
    maps: Any = model.network.maps
    images = data.test.take(index)["image"]  # type: ignore[union-attr]
    return {**report(system.model, images, maps), "features": str(model.card)}


def features_of(data: Data) -> FeatureModel:
    """The small classifier of these data by whose features pictures are judged, kept under SERIATIM_HOME."""
    name = data.name.replace("/", "_")
    return features_for(data, HOME / "features" / name, shipped=[root / f"features-{name}" for root in ZOO])


def picture_figures(
    system: ImageSystem, data: Data, samples: int, seed: int = 0, sampling: Sampling | None = None
) -> tuple[dict[str, Any], Pictures]:
    """Likelihood, quality on features of a small classifier of these data (kept under SERIATIM_HOME), and cost."""
    figures: dict[str, Any] = {}
    if system.meta.likelihood in ("exact", "bound") and system.tokenizer.vocab is not None:
        with torch.no_grad():
            nats, count = system.score(data.test)
        bits = bits_per_dimension(nats, count, system.meta.likelihood)  # type: ignore[arg-type]
        figures |= {"bits_per_code": bits.value, "likelihood": system.meta.likelihood}
    labels = None
    if data.classes:
        labels = torch.arange(len(data.classes)).repeat_interleave(-(-samples // len(data.classes)))
    pictures = system.draw(labels, samples, sampling, seed)
    figures |= picture_quality(pictures.images, labels, data, features_of(data))
    figures |= {"forwards": pictures.forwards, "seconds": pictures.seconds / len(pictures.images)}
    return figures, pictures
