"""Text as a user of the command line sees it: the canvas on a terminal, the text alone anywhere else, gaps, films."""

from __future__ import annotations

import io
import json
import re
import time

import pytest
import torch
from rich.cells import cell_len
from rich.console import Console

from seriatim.cli import generating, watching
from seriatim.cli.main import main
from seriatim.cli.watching import NEW, OPEN, Screen, painted, visible
from seriatim.evaluation.text_film import Frame, Place, Recorder
from seriatim.systems.system import Sampling
from seriatim.systems.text import mdlm
from seriatim.tokenizers.text import ByteTokenizer
from seriatim.verbs.generate import generate
from seriatim.verbs.load import load
from seriatim.verbs.train import train

torch.set_num_threads(1)
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
TINY = {"width": 16, "depth": 1, "heads": 2, "length": 64, "steps": 2, "batch": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    book = folder / "book.txt"
    book.write_text("The quick brown fox jumps over the lazy dog.\n\n" * 200, encoding="utf-8")
    for key in ("mdlm", "sdar", "next-token"):
        train(key, book, out=folder / key, settings=TINY)
    return folder


def console(width=40, height=12, **settings) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=height, color_system="truecolor", **settings
    )


def drawn(recorder: Recorder, on: Console) -> list[str]:
    with on.capture() as capture:
        on.print(Screen(on, recorder).scene())
    return ESCAPES.sub("", capture.get()).rstrip("\n").split("\n")


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    torch.manual_seed(0)
    one = mdlm.MDLM(mdlm.Config(length=160, width=16, depth=1, heads=2, block=8), ByteTokenizer()).eval()
    made = Recorder(one.tokenizer)
    list(one.stream("def read(path):\n", 120, Sampling(steps=60), watch=made))
    return made


# ---- on a terminal ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [8, 20, 40, 200])
@pytest.mark.parametrize("height", [3, 8, 60])
def test_the_canvas_fits_the_terminal_however_small(recorder, width, height):
    for count in (1, 20, len(recorder.frames)):
        part = Recorder(ByteTokenizer())
        part.frames = recorder.frames[:count]
        lines = drawn(part, console(width, height))
        assert len(lines) <= height and max(map(cell_len, lines)) <= width
        assert "tokens" in lines[-1] or width < 12


def test_every_place_is_there_from_the_start_and_appears_out_of_order(recorder):
    first, middle, last = (painted(recorder.frames[k]).plain for k in (0, 30, -1))
    assert first == "def read(path):\n" + "·" * 120
    assert 0 < middle.count("·") < 120 and middle.startswith("def read(path):\n")
    known = middle[16:]
    assert "·" not in last[16:] and known.rstrip("·") != known.replace("·", ""), "unknown places among known ones"


def test_what_is_new_and_what_is_open_look_so_and_the_rest_says_when():
    frame = Frame((
        Place(0, 1, "a", "given"), Place(1, 2, "b", "model", 1), Place(2, None, None, "open"),
        Place(3, 3, "c", "model", 3), Place(4, 4, "d", "draft", 2),
    ), 3)  # fmt: skip
    styles = {painted(frame, 3).plain[s.start : s.end]: s.style for s in painted(frame, 3).spans}
    assert styles["·"] is OPEN and styles["c"] is NEW
    order = [watching.COLOURS.index(styles[x]) for x in "bd"]
    assert order == sorted(order) and order[0] != order[1]
    assert painted(frame, 3, ".").plain == "ab.cd"


def test_a_text_that_is_too_tall_is_shown_where_it_changes(recorder):
    part = Recorder(ByteTokenizer())
    part.frames = recorder.frames[:-1]
    fresh = [p.text for p in part.frames[-1].places if p.frame == len(part.frames) - 1 and p.by == "model"]
    seen = "\n".join(drawn(part, console(12, 6)))
    assert any(visible(text or "") in seen for text in fresh)


def test_nothing_that_was_generated_steers_the_terminal():
    text = "".join(map(chr, range(256)))
    shown = visible(text)
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 for c in shown) and len(shown) == 256
    assert "\x1b" not in painted(Frame((Place(0, 1, "\x1b[2J", "model", 1),))).plain


def test_it_is_drawn_often_enough_and_leaves_nothing_behind(recorder):
    assert 2 <= watching.FRAMES_PER_SECOND <= 20
    on, growing = console(), Recorder(ByteTokenizer())
    with Screen(on, growing):
        for frame in recorder.frames[:12]:
            growing.frames = [*growing.frames, frame]
            time.sleep(0.05)
    out = on.file.getvalue()
    draws = out.count(" forwards")
    assert 2 <= draws <= 20
    assert out.count("\x1b[?25l") == out.count("\x1b[?25h") == 1, "the cursor comes back"
    tail = out[out.rindex("\x1b[?25h") :]
    assert ESCAPES.sub("", tail).strip() == "" and "\x1b[2K" in tail


def test_what_was_there_stays_where_the_work_is_broken_off(recorder):
    on, growing = console(), Recorder(ByteTokenizer())
    with pytest.raises(KeyboardInterrupt), Screen(on, growing):
        growing.frames = recorder.frames[:5]
        raise KeyboardInterrupt
    out = on.file.getvalue()
    assert "def read" in out and "\x1b[2K" not in out[out.rindex("def read") :]


def test_terminals_are_told_from_files_and_from_those_that_draw_nothing():
    assert watching.shows(console())
    assert not watching.shows(Console(file=io.StringIO()))
    assert not watching.shows(Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"}))


@pytest.mark.parametrize("quiet", [False, True])
def test_on_a_terminal_the_text_stands_there_at_the_end(runs, quiet, monkeypatch, capsys):
    on = console(60, 20)
    monkeypatch.setattr(generating, "Console", lambda **_: on)
    arguments = ["generate", str(runs / "mdlm"), "--prompt", "The ", "--length", "20", "--seed", "1"]
    assert main([*arguments, *(["--quiet"] if quiet else [])]) == 0
    shown, said = on.file.getvalue(), capsys.readouterr().out
    if quiet:
        assert shown == "" and said.startswith("The ")
    else:
        assert said == "" and ESCAPES.sub("", shown[shown.rindex("\x1b[2K") :]).startswith("The ")


# ---- anywhere else ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["mdlm", "sdar"])
def test_a_pipe_gets_the_text_and_nothing_else(runs, key, capsys):
    arguments = ["generate", str(runs / key), "--prompt", "The quick", "--length", "16", "--seed", "3"]
    assert main([*arguments, "--json"]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    for more in ([], ["--quiet"]):
        assert main([*arguments, *more]) == 0
        said = capsys.readouterr()
        assert said.out == "The quick" + text + "\n" * (not text.endswith("\n")) and said.err == ""


@pytest.mark.parametrize("text", ["The <mask:6> fox\n", "<mask:3>", r"a \<mask:2> [MASK] <mask> <mask:4>b"])
def test_gaps_are_filled_and_the_text_around_them_comes_as_it_was(runs, text, capsys):
    assert main(["generate", str(runs / "mdlm"), "--infix", text, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["infix"] == text and told["forwards"] > 0
    pattern = re.sub(r"(?<!\\)<mask:\d+>", "\0", text).replace("\\<mask", "<mask")
    assert re.fullmatch(re.escape(pattern).replace("\0", ".*"), told["text"], re.S)
    assert main(["generate", str(runs / "mdlm"), "--infix", text]) == 0
    assert capsys.readouterr().out.removesuffix("\n") == told["text"].removesuffix("\n")
    assert generate(load(runs / "mdlm"), infix=text) == told["text"]


def test_a_gap_at_the_end_is_filled_by_blocks_too(runs, capsys):
    assert main(["generate", str(runs / "sdar"), "--infix", "The quick <mask:9>", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"].startswith("The quick ")


def test_two_letters_for_a_new_line_are_noticed(runs, recwarn):
    for text, noticed in ((r"a:\n <mask:2>", 1), ("a:\\n\n <mask:2>", 0), ("a <mask:2>", 0)):
        assert main(["generate", str(runs / "mdlm"), "--infix", text]) == 0
        assert sum("in --infix is a backslash and an n" in str(w.message) for w in recwarn.list) == noticed
        recwarn.clear()


@pytest.mark.parametrize(("key", "decoder"), [("mdlm", "own"), ("sdar", "own"), ("next-token", "jacobi")])
def test_a_film_is_recorded_beside_the_text(runs, key, decoder, tmp_path, capsys):
    page = tmp_path / "films" / "film.html"
    arguments = ["generate", str(runs / key), "--prompt", "The ", "--length", "12", "--decoder", decoder]
    assert main(arguments) == 0
    plain = capsys.readouterr().out
    assert main([*arguments, "--record", str(page)]) == 0
    said = capsys.readouterr()
    assert said.out == plain and str(page) in said.err
    (data,) = re.findall(r'id="film">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)
    film, text = json.loads(data), {}
    for row in film["frames"]:
        text |= {change[0]: change[1] for change in row[4]}
    assert len(text) == 16 and None not in text.values() and ["decoder", decoder] in film["about"]
    assert film["frames"][-1][0] > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{mdlm}", "--infix", "no gap"], "mark a gap by <mask:12>"),
        (["{mdlm}", "--infix", "a<mask:0>"], "from 1 on"),
        (["{mdlm}", "--infix", "a<mask:1>b<fill>"], "of one kind"),
        (["{mdlm}", "--infix", "a<fill>"], "write <mask:12>"),
        (["{mdlm}", "--infix", "a<mask:99>"], "this model takes 64 in all"),
        (["{mdlm}", "--infix", "<mask:2>", "--prompt", "a", "--length", "3"], "leave --prompt, --length out"),
        (["{mdlm}", "--infix", "<mask:2>", "--decoder", "beam"], "leave --decoder out"),
        (["{sdar}", "--infix", "ab<mask:2>cdefghi"], "sees nothing behind a block"),
        (["{next-token}", "--infix", "a<mask:2>b"], "fills none"),
        (["nowhere", "--record", "{mdlm}"], "is a folder"),
        (["nowhere", "--record", "film.gif"], "name it as film.gif.html"),
        (["nowhere", "--record", "film.html", "--count", "2"], "leave --count out"),
        (["nowhere", "--infix", "no gap"], "mark a gap"),
        (["{mdlm}", "--prompt", "a" * 70], "shorten the prompt or --length"),
        (["zoo:var", "--infix", "a<mask:2>"], "makes none"),
        (["zoo:var", "--record", "film.html"], "makes none"),
    ],
)
def test_mistakes_are_answered_before_anything_is_written(runs, arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {key: str(runs / key) for key in ("mdlm", "sdar", "next-token")}
    filled = [a.format(**names) if a.startswith("{") else a for a in arguments]
    assert main(["generate", *filled]) == 2
    told = capsys.readouterr()
    assert said in told.err and told.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_text_with_gaps_says_all_in_python_too(runs):
    with pytest.raises(ValueError, match="leave prompt"):
        generate(load(runs / "mdlm"), infix="a<mask:2>", length=4)
