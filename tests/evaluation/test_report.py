"""The report: valid, self-contained, escaped, honest about bounds, and never half written."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from seriatim.evaluation import save_film, save_grid
from seriatim.evaluation.metrics import bits_per_byte
from seriatim.evaluation.report import LARGE, Result, bytes_text, count_text, seconds_text, write_report

VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = '</pre><script>alert("1")</script><img src=http://example.org/x onerror=alert(1)>&amp;'


class Page(HTMLParser):
    """Checks that elements are closed in order, and keeps attributes, text and table."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        assert len(dict(attributes)) == len(attributes), f"an attribute twice in <{tag}>"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag: str) -> list[str]:
        return [data for name, data in self.texts if name == tag]

    def cells(self, column: str) -> list[str]:
        """The class of each cell of a column, row by row."""
        return [a.get("class") or "" for a in self.named("td") if (a["data-name"] or "").startswith(column)]


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[Path, Path]:
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    grid = save_grid(images, tmp_path / "grid.png", upscale=2)
    return grid, save_film([images * s for s in (0.3, 0.6, 1.0)], tmp_path / "film.gif", upscale=2, pause=0.4)


def full(pictures: tuple[Path, Path]) -> list[Result]:
    grid, film = pictures
    first = Result(
        "var",
        "Next scale",
        {"fd_s": 3.0, "accuracy": 0.97, "forwards": 4, "memory": 312e6, "novelty": 1.5, "parameters": 1_234_567},
        losses={"train": [(1, 2.0), (2, 1.0)]},
        tradeoff=[(4, 3.0), (8, 2.5)],
        grid=grid,
        film=film.read_bytes(),
        settings={"width": 96},
        command="seriatim train var",
        notes=["one note"],
    )
    return [first, Result("ar", figures={"fd_s": 2.0, "accuracy": 0.97, "forwards": 64}, texts=["a\n  b"], grid=grid)]


def test_the_page_is_well_formed_and_shows_everything(tmp_path: Path, pictures: tuple[Path, Path]) -> None:
    page = Page(write_report(tmp_path / "new" / "report.html", "Two systems", full(pictures), ["200 samples"]))
    assert page.text("title")[0] == "Two systems" and page.text("h1") == ["Two systems"]
    assert {"3.00", "97.0%", "312 MB", "1.23 M", "1.5", "2.00", "–"} <= set(page.text("td"))
    assert {"var", "ar"} <= {text.strip() for text in page.text("th")} and "200 samples" in page.text("li")
    assert page.text("pre") == ["a\n  b", "seriatim train var"] and page.text("dd") == ["96"]
    assert len(page.named("polyline")) == 2 and len(page.named("img")) == 3
    assert [a["name"] for a in page.named("meta") if "name" in a] == ["viewport"]


def test_the_page_fetches_nothing_and_runs_nothing(tmp_path: Path, pictures: tuple[Path, Path]) -> None:
    path = write_report(tmp_path / "report.html", "T", full(pictures))
    page = Page(path)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in {"href", "srcset", "action"}, (tag, name)
            assert name != "src" or (value or "").startswith("data:image/")
    style = "".join(page.text("style"))
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    (policy,) = [a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_hostile_text_stays_text_wherever_it_stands(tmp_path: Path) -> None:
    result = Result(
        HOSTILE,
        HOSTILE,
        {HOSTILE: HOSTILE, "fd_s": HOSTILE},
        losses={HOSTILE: [(0, 1.0), (1, 0.5)], "b": [(0, 1.0)]},
        tradeoff=[(1, 2.0)],
        texts=[HOSTILE, "\x00\x1b[31m\ud800\x85é\tx\n"],
        settings={HOSTILE: {"a": HOSTILE}},
        command=HOSTILE,
        notes=[HOSTILE],
    )
    page = Page(write_report(tmp_path / "report.html", HOSTILE, [result], [HOSTILE], quality=HOSTILE))
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert "".join(page.text("h1")) == HOSTILE and HOSTILE in page.text("td") and HOSTILE in page.text("dt")
    assert page.text("pre") == [HOSTILE, "\ufffd\ufffd[31m\ufffd\ufffdé\tx\n", HOSTILE]


def test_the_best_of_a_column_is_marked_by_its_direction(tmp_path: Path, pictures: tuple[Path, Path]) -> None:
    page = Page(write_report(tmp_path / "report.html", "T", full(pictures)))
    assert page.cells("FD-s") == ["", "best"] and page.cells("forwards") == ["best", ""]
    assert page.cells("class accuracy") == ["", ""], "equal values have no best"
    assert page.cells("novelty") == ["", "none"] and page.cells("peak memory") == ["", "none"]
    results = [Result(k, figures={"fd_s": v}) for k, v in (("a", float("nan")), ("b", 2.0), ("c", 3.0))]
    page = Page(write_report(tmp_path / "nan.html", "T", results))
    assert page.cells("FD-s") == ["", "best", ""] and "nan" in page.text("td")


def test_a_bound_is_marked_and_never_ranked_with_an_exact_likelihood(tmp_path: Path) -> None:
    def row(key: str, nats: float, kind: str) -> Result:
        return Result(key, figures={"bits_per_byte": bits_per_byte(nats, 10, 30, kind)})  # type: ignore[arg-type]

    mixed = Page(write_report(tmp_path / "a.html", "T", [row("ar", 30.0, "exact"), row("mdlm", 20.0, "bound")]))
    assert mixed.cells("bits per byte") == ["", ""]
    assert mixed.text("td") == ["1.443", "≤ 0.962"] and "not to be compared" in mixed.text("caption")[0]
    alike = Page(write_report(tmp_path / "b.html", "T", [row("a", 30.0, "bound"), row("b", 20.0, "bound")]))
    assert alike.cells("bits per byte") == ["", "best"] and "compared" not in alike.text("caption")[0]


def embedded(path: Path) -> list[Image.Image]:
    sources = [a["src"] or "" for a in Page(path).named("img")]
    return [Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))) for source in sources]


def test_small_pictures_are_embedded_as_they_are(tmp_path: Path, pictures: tuple[Path, Path]) -> None:
    page = Page(write_report(tmp_path / "report.html", "T", full(pictures)[:1]))
    stored = [base64.b64decode((a["src"] or "").split(",", 1)[1]) for a in page.named("img")]
    assert stored == [path.read_bytes() for path in pictures]
    assert all(a["alt"] and a["width"] and a["height"] for a in page.named("img"))


def test_large_pictures_and_films_become_small_and_keep_their_frames(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    steps = [torch.rand(4, 3, 100, 200, generator=generator) * 2 - 1 for _ in range(3)]
    grid = save_grid(steps[0], tmp_path / "grid.png", upscale=4, columns=2, resample="bicubic")
    film = save_film(steps, tmp_path / "film.gif", upscale=2, columns=2, pause=0.3, final_pause=2.0)
    assert min(grid.stat().st_size, film.stat().st_size) > LARGE
    path = write_report(tmp_path / "report.html", "T", [Result("a", grid=grid, film=film)])
    still, moving = embedded(path)
    assert still.format == moving.format == "WEBP" and still.width == 1200
    assert path.stat().st_size < (grid.stat().st_size + film.stat().st_size) / 2
    durations = []
    for frame in range(moving.n_frames):  # type: ignore[attr-defined]
        moving.seek(frame)
        moving.load()
        durations.append(moving.info["duration"])
    assert durations == [300, 300, 2000] and moving.info["loop"] == 0


def test_nonsense_is_refused_and_leaves_the_old_report(tmp_path: Path, pictures: tuple[Path, Path]) -> None:
    path = write_report(tmp_path / "report.html", "Old", full(pictures))
    before = path.read_bytes()
    (tmp_path / "picture.bmp").write_bytes(b"")
    Image.new("L", (2, 2)).save(tmp_path / "picture.bmp")
    cases = [
        ([], "at least one result"),
        ([Result("a"), Result("a")], "found twice: a"),
        ([Result("a", grid=b"no picture")], "a: samples: not a picture"),
        ([Result("a", grid=pictures[0].read_bytes()[:-200])], "a: samples: not a picture"),
        ([Result("a", film=tmp_path / "picture.bmp")], "BMP is not shown by browsers"),
    ]
    for results, message in cases:
        with pytest.raises(ValueError, match=message):
            write_report(path, "New", results)
    with pytest.raises(FileNotFoundError):
        write_report(path, "New", [Result("a", grid=tmp_path / "missing.png")])
    with pytest.raises(ValueError, match="is a folder"):
        write_report(tmp_path, "New", [Result("a")])
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["film.gif", "grid.png", "picture.bmp", "report.html"]


def test_numbers_are_shown_in_units_people_read() -> None:
    assert [seconds_text(x) for x in (0.0123, 1.25, 119.9, 181, 7500)] == [
        "12.3 ms", "1.25 s", "120 s", "3 min 1 s", "2 h 5 min"
    ]  # fmt: skip
    assert [count_text(x) for x in (4, 45_123, 6.9e6, 1.1e9)] == ["4", "45.1 k", "6.9 M", "1.1 G"]
    assert [bytes_text(x) for x in (312e6, 1.24e9)] == ["312 MB", "1.24 GB"]


def test_narrow_screens_get_one_column(tmp_path: Path) -> None:
    style = "".join(Page(write_report(tmp_path / "r.html", "T", [Result("a")])).text("style"))
    (narrow,) = re.findall(r"@media \(max-width: 600px\) \{(.*)\}", style, flags=re.S)
    assert ".cards { grid-template-columns: 1fr; }" in narrow and "attr(data-name)" in narrow
