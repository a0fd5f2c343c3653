"""The files of MTFL, in its zip or its folder: none outside of it is read, and none too large."""

import hashlib
import lzma
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PureWindowsPath
from typing import Protocol

from fedgradnorm.errors import DataError
from fedgradnorm.federations.cache import file_hash

ANNOTATIONS = {"train": "training.txt", "test": "testing.txt"}
MAX_BYTES = 100_000_000
MAX_ANNOTATION_BYTES = 10_000_000
DAMAGED = (
    *(OSError, EOFError, RuntimeError, ValueError, MemoryError),
    *(struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile),
)
"""The errors of Python's readers on damaged files."""


class Archive(Protocol):
    """MTFL's files by their relative paths."""

    def read(self, name: str, where: str) -> bytes:
        """A file's content.

        Raises:
            DataError: it is missing, damaged or too large. The message begins with ``where``.
        """
        ...

    def fingerprint(self, images: Iterable[tuple[str, str]]) -> str:
        """A hash that changes when the files do.

        Args:
            images: for each image its path, and where the annotations have this path.
        """
        ...


class ZipArchive:
    """The files of a zip, read without unpacking it."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path = path
        self._archive = archive
        entries = archive.infolist()
        self._entries = {inside(info.filename, f"{path}: entry"): info for info in entries}
        self._root = _root_of(self._entries, path)

    def read(self, name: str, where: str) -> bytes:
        """See `Archive`."""
        info = self._entries.get(self._root + name)
        if info is None:
            raise DataError(f"{where}: the zip has no entry {self._root + name!r}")
        _check_bytes(info.file_size, name, where)
        try:
            return self._archive.read(info)
        except DAMAGED as error:
            raise DataError(f"{where}: the entry {info.filename!r} is damaged: {error}") from error

    def fingerprint(self, images: Iterable[tuple[str, str]]) -> str:  # noqa: ARG002
        """The hash of the zip file."""
        return file_hash(self.path)


class FolderArchive:
    """The files of the unpacked folder. A link out of the folder is refused."""

    def __init__(self, path: Path) -> None:
        folders = [path, *sorted(child for child in path.iterdir() if child.is_dir())]
        names = {
            (folder / file).relative_to(path).as_posix()
            for folder in folders
            for file in ANNOTATIONS.values()
            if (folder / file).is_file()
        }
        self.path = path
        self._limit = path.resolve()
        self._root = self._limit / _root_of(names, path)

    def read(self, name: str, where: str) -> bytes:
        """See `Archive`."""
        try:
            file = (self._root / name).resolve(strict=True)
            if not (file.is_relative_to(self._limit) and file.is_file()):
                raise DataError(
                    f"{where}: {name!r}: expected a file inside the folder, "
                    "found none, or a link that leads out of it"
                )
            _check_bytes(file.stat().st_size, name, where)
            return file.read_bytes()
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{where}: cannot read the file {name!r}: {reason}") from error

    def fingerprint(self, images: Iterable[tuple[str, str]]) -> str:
        """A hash of the annotation files, and of the images' names, sizes and times.

        To hash the images' contents, all of them would have to be read.
        """
        digest = hashlib.sha256()
        for annotations in ANNOTATIONS.values():
            digest.update(self.read(annotations, str(self.path)))
        for name, where in images:
            try:
                stat = (self._root / name).stat()
            except OSError as error:
                message = f"{where}: cannot read the file {name!r}: {error.strerror}"
                raise DataError(message) from error
            digest.update(f"\0{name}\0{stat.st_size}\0{stat.st_mtime_ns}".encode())
        return digest.hexdigest()


def _check_bytes(size: int, name: str, where: str) -> None:
    most = min(MAX_BYTES, MAX_ANNOTATION_BYTES) if name in ANNOTATIONS.values() else MAX_BYTES
    if size > most:
        raise DataError(f"{where}: {name!r} has {size} bytes, expected at most {most}")


def inside(name: str, where: str) -> str:
    """The path with ``/`` as its only separator.

    Raises:
        DataError: a path that is absolute, leads upwards, or is empty.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    absolute = name[:1] in ("/", "\\") or PureWindowsPath(name).drive
    if absolute or not parts or ".." in parts or "\0" in name:
        raise DataError(
            f"{where} {name[:80]!r}: expected a path inside the data set, relative and without '..'"
        )
    return "/".join(parts)


def _root_of(names: Collection[str], path: Path) -> str:
    """The folder of the annotation files: ``""``, or the one top folder with its ``/``."""
    folders = {"", *(f"{name.partition('/')[0]}/" for name in names)}
    roots_of = {
        file: {folder for folder in folders if folder + file in names}
        for file in ANNOTATIONS.values()
    }
    for file, roots in roots_of.items():
        if not roots:
            raise DataError(
                f"{path}: expected a file {file!r} in it or in its top folder, found none"
            )
    both = sorted(set.intersection(*roots_of.values()))
    if "" in both:
        return ""
    if len(both) != 1:
        raise DataError(
            f"{path}: expected {' and '.join(roots_of)} together in one folder, "
            f"found {both or 'them apart'}"
        )
    return both[0]


@contextmanager
def opened(path: Path) -> Iterator[Archive]:
    """The zip or the folder, open for reading.

    Raises:
        DataError: it is missing, or cannot be read.
    """
    with ExitStack() as stack:
        try:
            archive: Archive
            if path.is_dir():
                archive = FolderArchive(path)
            else:
                archive = ZipArchive(path, stack.enter_context(zipfile.ZipFile(path)))
        except DataError:
            raise
        except DAMAGED as error:
            expected = "expected MTFL.zip or its unpacked folder"
            if isinstance(error, FileNotFoundError):
                raise DataError(f"{path}: no such file or folder; {expected}") from error
            message = f"{path}: {expected}, but it cannot be read as such: {error}"
            raise DataError(message) from error
        yield archive
