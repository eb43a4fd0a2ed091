"""One's own texts: files, folders and tables, and what a user hears of those that cannot be used."""

import json
import sys

import pytest

from seriatim.data.base import load_data

LINES = [f"line {i} of a text that is long enough\n" for i in range(200)]


def both(data) -> list[str]:
    return [*data.train.documents, *data.test.documents]


# ---- files -----------------------------------------------------------------------------------------------------------
def test_a_file_is_split_by_a_contiguous_tail_at_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(LINES), encoding="utf-8")
    data = load_data(path, "text", held_out=0.25)
    (train,), (test,) = data.train.documents, data.test.documents
    assert train + test == "".join(LINES) and train.endswith("\n")
    assert len(test) / len(train + test) == pytest.approx(0.25, abs=0.01)
    assert (data.name, data.modality, data.classes) == ("a.txt", "text", ())


def test_a_file_of_one_line_is_split_too(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x" * 1000)
    data = load_data(path, "text", held_out=0.1)
    assert [len(d) for d in both(data)] == [900, 100]


def test_a_folder_is_split_by_file(tmp_path):
    for i in range(100):
        (tmp_path / f"{i}.txt").write_text(f"text {i}, not empty")
    data = load_data(tmp_path, "text", held_out=0.2)
    assert sorted(both(data)) == sorted(f"text {i}, not empty" for i in range(100))
    assert 5 < len(data.test) < 40
    assert data.train.documents[1:3] == [data.train.documents[1], data.train.documents[2]]
    (tmp_path / "new.txt").write_text("new")
    assert set(data.test.documents) <= set(load_data(tmp_path, "text", held_out=0.2).test.documents)


def test_files_are_read_when_asked_for(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text("before " * 10)
    data = load_data(tmp_path, "text")
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text("after")
    assert set(both(data)) == {"after"}


def test_a_pattern_chooses_files_and_empty_ones_are_named(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.md").write_text("first " * 50)
    (tmp_path / "b" / "b.md").write_text("second " * 50)
    (tmp_path / "c.md").touch()
    (tmp_path / "d.bin").write_bytes(b"\xff\xfe\x00")
    data = load_data(tmp_path, "text", pattern="*.md")
    assert sorted(d.split()[0] for d in both(data)) == ["first", "second"]
    assert data.notes == ("1 of 3 files are empty: c.md",)


def test_a_folder_with_one_text_is_split_like_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("".join(LINES))
    assert "".join(both(load_data(tmp_path, "text"))) == "".join(LINES)


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "utf-8-sig"])
def test_other_encodings_are_read_if_named(tmp_path, encoding):
    text = "Grüße, " * 100
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    name = "utf-8" if encoding == "utf-8-sig" else encoding  # a byte order mark is no text
    assert "".join(both(load_data(tmp_path / "a.txt", "text", encoding=name))) == text


def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path):
    (tmp_path / "good.txt").write_text("Grüße " * 30, encoding="utf-8")
    (tmp_path / "bad.txt").write_bytes(b"plain text, then Gr\xfc\xdfe " * 9)
    with pytest.raises(ValueError, match=r"bad.txt is not UTF-8: byte 19 is 0xfc .*encoding='latin-1'"):
        load_data(tmp_path, "text")
    (tmp_path / "bad.txt").write_bytes("wide".encode("utf-16"))
    with pytest.raises(ValueError, match=r"bad.txt is not UTF-8: byte 0 .*encoding='utf-16'"):
        load_data(tmp_path, "text")


def test_an_unknown_encoding_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no encoding is called 'utf-9'"):
        load_data(tmp_path, "text", encoding="utf-9")


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="it is empty"):
        load_data(tmp_path, "text")
    (tmp_path / "a.txt").write_text("short")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ValueError, match="holds 5 characters of text, at least 100"):
            load_data(path, "text")
    with pytest.raises(ValueError, match=r"no files in .* match '\*.md'"):
        load_data(tmp_path, "text", pattern="*.md")


# ---- tables ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def datasets(tmp_path_factory, monkeypatch):
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    return library


ROWS = [{"id": i, "text": f"row {i}, with a comma\nand a line"} for i in range(100)]


def table(path, kind: str, rows=ROWS):
    import pandas

    frame = pandas.DataFrame(rows)
    if kind == "csv":
        frame.to_csv(path / "a.csv", index=False)
    elif kind == "tsv":
        frame.to_csv(path / "a.tsv", index=False, sep="\t")
    elif kind == "parquet":
        frame.to_parquet(path / "a.parquet")
    else:
        (path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path / f"a.{kind}"


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_rows_of_a_table_are_documents(tmp_path, datasets, kind):
    data = load_data(table(tmp_path, kind), "text", held_out=0.2)
    assert sorted(both(data)) == sorted(row["text"] for row in ROWS)
    assert 5 < len(data.test) < 40
    assert list(data.train.documents) == [data.train.documents[i] for i in range(len(data.train))]
    assert data.train.documents[:2] == list(data.train.documents)[:2]


def test_a_folder_of_tables_is_one_table(tmp_path, datasets):
    for name, rows in (("a", ROWS[:50]), ("b", ROWS[50:])):
        (tmp_path / name).mkdir()
        table(tmp_path / name, "jsonl", rows)
    assert sorted(both(load_data(tmp_path, "text"))) == sorted(row["text"] for row in ROWS)
    table(tmp_path, "csv")
    with pytest.raises(ValueError, match="different kinds"):
        load_data(tmp_path, "text")


def test_equal_texts_are_on_one_side_and_rows_without_text_are_counted(tmp_path, datasets):
    texts = [f"text {i % 40}" for i in range(400)] + [""] * 5
    data = load_data(table(tmp_path, "csv", [{"text": t} for t in texts]), "text", held_out=0.2)
    assert not set(data.train.documents) & set(data.test.documents)
    assert len(data.train) + len(data.test) == 400
    assert data.notes == ("5 of 405 rows have no text",)


def test_words_that_look_missing_are_text(tmp_path, datasets):
    rows = [{"text": t} for t in ("NA", "null", "None", "nan")]
    assert sorted(both(load_data(table(tmp_path, "csv", rows), "text"))) == ["NA", "None", "nan", "null"]


def test_the_column_is_found_or_named(tmp_path, datasets):
    rows = [{"title": f"t{i}", "story": f"s{i}", "year": i} for i in range(50)]
    path = table(tmp_path, "csv", rows)
    with pytest.raises(ValueError, match=r"several columns hold text \(title, story\); name one with column="):
        load_data(path, "text")
    assert set(both(load_data(path, "text", column="story"))) == {f"s{i}" for i in range(50)}
    with pytest.raises(ValueError, match="no column 'storey'; it has title, story, year"):
        load_data(path, "text", column="storey")
    with pytest.raises(ValueError, match=r"column 'year' .* holds no text; columns that do: title, story"):
        load_data(path, "text", column="year")


def test_a_table_that_is_none_is_refused(tmp_path, datasets):
    (tmp_path / "a.parquet").write_bytes(b"not a parquet file")
    (tmp_path / "b.jsonl").write_text('{"text": "whole"}\n{"text": "cut sho')
    for name, kind in (("a.parquet", "parquet"), ("b.jsonl", "json")):
        with pytest.raises(ValueError, match=f"{name} cannot be read as {kind}: "):
            load_data(tmp_path / name, "text")


def test_a_table_of_one_row_is_refused(tmp_path, datasets):
    with pytest.raises(ValueError, match="holds 1 texts in column 'text', at least 2"):
        load_data(table(tmp_path, "jsonl", ROWS[:1]), "text")


def test_without_the_library_a_table_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("text\nhello\n")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'seriatim\[datasets\]'"):
        load_data(tmp_path / "a.csv", "text")
