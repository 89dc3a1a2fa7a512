"""Folders for output: what could not take files is refused in one line, before anything is made."""

import os

import click
import pytest
from click.testing import CliRunner

from torch_utils.options import FOLDER, about


def refusal(value):
    with pytest.raises(click.BadParameter) as error:
        FOLDER.convert(value, None, None)
    assert "\n" not in error.value.message
    return error.value.message


def test_folders_that_are_there_or_can_be_made(tmp_path, monkeypatch):
    for value in (str(tmp_path), f"{tmp_path}/a/b", f"{tmp_path}/with [1]/x"):
        assert FOLDER.convert(value, None, None) == value
    (tmp_path / "link").symlink_to(tmp_path)
    assert FOLDER.convert(f"{tmp_path}/link/a", None, None)
    monkeypatch.chdir(tmp_path)
    assert FOLDER.convert("new", None, None) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_what_is_no_folder_to_write_to(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "lost").symlink_to(tmp_path / "absent")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for value in ("", "  "):
        assert "it is empty: name a folder" in refusal(value)
    for value in ("file", "file/below"):
        assert f"{tmp_path}/file is a file: name a folder" in refusal(str(tmp_path / value))
    for value in ("lost", "lost/below", "loop"):
        assert "is a link to what does not exist" in refusal(str(tmp_path / value))
    assert "File name too long" in refusal(str(tmp_path / ("x" * 300)))
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert "closed cannot be written to" in refusal(str(tmp_path / "closed/new"))


def test_a_current_folder_that_was_removed(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the current folder was removed" in refusal("new")


def test_what_a_parser_refuses_is_told_of_its_option():
    @click.command()
    @click.option("--number")
    def command(number):
        with about("--number"):
            int(number)

    result = CliRunner().invoke(command, ["--number", "x"], prog_name="door.py")
    assert result.exit_code == 2 and "Usage: door.py" in result.output
    assert "Error: Invalid value for '--number': invalid literal" in result.output
    assert CliRunner().invoke(command, ["--number", "3"]).exit_code == 0
