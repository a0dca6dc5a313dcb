"""Tables that grow line by line: what a kill cuts off, what is written again, and what is no table."""

from __future__ import annotations

from pathlib import Path

import pytest

from neco_bench.core.errors import BadInputError, NecoBenchError
from neco_bench.core.log import StepLog, Table


def test_a_line_that_was_cut_off_is_none(tmp_path: Path) -> None:
    table = Table(tmp_path / "log.csv")
    for step in (1, 2, 12):
        table.append({"step": step, "loss": step / 2})
    whole = table.path.read_text()
    table.path.write_text(whole.removesuffix("2,6.0\n"))  # of step 12, which now reads as 1
    assert table.rows()["step"].tolist() == [1, 2]
    table.begin(2)
    table.append({"step": 3, "loss": 1.5})
    assert table.path.read_text() == "step,loss\n1,0.5\n2,1.0\n3,1.5\n"


def test_rows_after_the_step_are_dropped(tmp_path: Path) -> None:
    table = Table(tmp_path / "log.csv")
    table.begin(3)
    assert table.rows().empty
    for step in (1, 2, 3):
        table.append({"step": step, "loss": 0.5})
    table.begin(2)
    assert table.rows()["step"].tolist() == [1, 2]
    table.begin(0)
    assert not table.path.exists()


@pytest.mark.parametrize("content", [b"step,loss\nx,1\n", b"loss\n1\n", b"step,loss\n\xff,1\n", b"step,loss\n,\n"])
def test_what_is_no_table_is_one_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(BadInputError, match=r"log\.csv is damaged .* Move it away"):
        Table(tmp_path / "log.csv").begin(1)
    (tmp_path / "log.csv").unlink()
    (tmp_path / "log.csv").mkdir()
    with pytest.raises(NecoBenchError, match="could not be written"):
        Table(tmp_path / "log.csv").append({"step": 1})


def test_a_log_has_the_columns_of_all_its_rows(tmp_path: Path) -> None:
    """As when a run goes on where its GPU tells its power and did not before, or the other way round."""
    first = StepLog(tmp_path, 0, False)
    first.write({"step": 1, "loss": 0.5})
    StepLog(tmp_path, 1, False).write({"step": 2, "loss": 0.25, "joules": 3.0})
    assert first.table.path.read_text() == "step,loss,joules\n1,0.5,nan\n2,0.25,3.0\n"
    other = StepLog(tmp_path / "other", 0, False)
    other.table.path.parent.mkdir()
    other.write({"step": 1, "joules": 3.0})
    other.write({"step": 2})
    assert other.table.path.read_text() == "step,joules\n1,3.0\n2,nan\n"
