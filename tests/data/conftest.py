"""Tables of series for tests: written where a test may write, and rows of hours."""

import pytest


@pytest.fixture
def write(tmp_path):
    """Writes rows as a table and says where."""

    def written(rows, head="date,a,b", name="x.csv"):
        path = tmp_path / name
        path.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
        return path

    return written
