"""The command line: exit codes, errors that help, output for machines."""

import json

import pytest

from seriatim.cli.main import main
from seriatim.systems.meta import catalogue


def test_list_as_json_has_a_row_for_each_system(capsys):
    assert main(["list", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"next-token", "raster-ar", "var"} <= {row["key"] for row in rows}
    assert all({"key", "title", "family", "modality", "paper", "likelihood"} <= row.keys() for row in rows)


@pytest.mark.parametrize("columns", (60, 80, 200))
def test_a_list_has_one_line_a_system_however_narrow_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    for key in catalogue():
        assert sum(line.split()[:1] == [key] for line in lines) == 1


def test_laws_of_one_system_hold_and_are_printed(capsys):
    assert main(["laws", "raster-ar", "--json"]) == 0
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {f["law"] for f in findings if f["subject"] == "raster-ar"} == set(range(1, 13))


@pytest.mark.parametrize("command", [["laws", "vr"], ["train", "vr"]])
def test_an_unknown_system_is_named_with_what_is_near(command, capsys):
    assert main(command) == 2
    assert "did you mean 'var'" in capsys.readouterr().err


def test_steps_must_be_positive(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--steps", "0"])
    assert stop.value.code == 2
    assert "at least 1" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_an_error_not_a_traceback(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert main(["demo", "--steps", "1", "--out", str(blocked / "run")]) == 2
    assert "seriatim:" in capsys.readouterr().err


@pytest.mark.slow
def test_a_demo_that_cannot_learn_fails_and_still_draws(tmp_path, capsys):
    assert main(["demo", "--steps", "1", "--out", str(tmp_path)]) == 1
    assert "not recognisable" in capsys.readouterr().out
    for name in ("samples.png", "film.gif", "loss.png", "model.safetensors", "metrics.jsonl", "summary.json"):
        assert (tmp_path / name).stat().st_size > 0
