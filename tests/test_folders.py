"""Folders appear whole, and take another's place whole or not at all."""

from pathlib import Path

import pytest

from qbert.folders import new_folder


def test_new_folder_is_complete_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with pytest.raises(FileNotFoundError), new_folder(target) as folder:
        (folder / "no such folder" / "file").touch()
    assert list(target.parent.iterdir()) == []
    with new_folder(target) as folder:
        (folder / "whole").touch()
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert list(target.parent.iterdir()) == [target]


def test_new_folder_keeps_what_another_process_made_first(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with new_folder(target) as folder:
        (folder / "late").touch()
        target.mkdir()
        (target / "early").touch()
    assert [path.name for path in target.iterdir()] == ["early"]


def test_a_folder_takes_the_place_of_another(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    with pytest.raises(FileNotFoundError), new_folder(target, replace=True) as folder:
        (folder / "no such folder" / "file").touch()
    assert [path.name for path in target.iterdir()] == ["old"]
    with new_folder(target, replace=True) as folder:
        (folder / "new").touch()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]
