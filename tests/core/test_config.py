"""TOML files of every kind of damage: one error that names the file, and no traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from neco_bench.core.config import parse_value, read_toml
from neco_bench.core.errors import BadInputError, MissingError
from tests.command import neco


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("steps = 3 # é".encode("latin-1"), r"not UTF-8 text \(.* at byte 12\)\. Save it as UTF-8"),
        ("steps = 3".encode("utf-16"), "not UTF-8 text"),
        (b"steps = 3\x00", "not valid TOML"),
        (b'base = "a\x00b"', "not valid TOML"),
        (b"steps = " + b"[" * 100_000, "nested too deeply|not valid TOML"),
        (b"a" + b".a" * 3000 + b" = 1", "nested too deeply|not valid TOML"),
        (b"steps = " + b"9" * 5000, "not valid TOML"),
        (b"steps = 0x" + b"f" * 5000, "an integer has more than 64 bits"),
        (b"steps = [{a = 9223372036854775808}]", "an integer has more than 64 bits"),
        (b"day = 2025-02-31", "not valid TOML"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
    ],
    ids=range(11),
)
def test_what_is_no_toml(content: bytes, told: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(content)
    with pytest.raises(BadInputError, match=told) as error:
        read_toml(file)
    assert str(error.value).startswith(str(file))
    answer = neco("train", "--data", "shapes:4", "--recipe", file, "--out", tmp_path / "run")
    assert (answer.code, answer.out) == (4, "")
    assert answer.err.startswith(f"error: {file}")


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="could not be read"):
        read_toml(tmp_path)
    with pytest.raises(MissingError, match="does not exist"):
        read_toml(tmp_path / "none.toml")


def test_files_that_editors_write(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes('\ufeffsteps = 3\r\nbase = "é"\r\n'.encode())
    assert read_toml(file) == {"steps": 3, "base": "é"}


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, "0x" + "f" * 5000, "1\nother = 2", "2025-02-31"], ids=len)
def test_values_that_are_none_are_texts(text: str) -> None:
    assert parse_value(text) == text
