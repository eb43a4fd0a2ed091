"""Archives of npm packages: got by npm, or from a folder, and read without being unpacked."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

SECONDS = 1800  # for one package
BROKEN = (tarfile.TarError, EOFError, OSError, zlib.error)


def archives(
    packages: Mapping[str, str], version: str, folder: Path, fetch: bool, tell: Callable[[str], None]
) -> dict[str, Path]:
    """The archive of each package by its own name here: those in a folder; with `fetch`, those that are not there yet
    are put there by npm.

    Raises FileNotFoundError where one is missing, or npm is, with the way by hand; OSError where npm fails.
    """
    found = {}
    for name, package in packages.items():
        file = folder / f"{package}-{version}.tgz"
        if not file.is_file() and fetch:
            tell(f"{package} {version}: by npm")
            _fetch(package, version, folder, packages)
        if not file.is_file() and not fetch:
            other = sorted(folder.glob(f"{package}-[0-9]*.tgz")) if folder.is_dir() else []
            if not other:
                raise FileNotFoundError(f"there is no {file.name} in {folder}. {by_hand(packages, version)}")
            file = other[-1]
        found[name] = file
    return found


def by_hand(packages: Mapping[str, str], version: str) -> str:
    """What to do without npm."""
    links = " and ".join(f"https://registry.npmjs.org/{p}/-/{p}-{version}.tgz" for p in packages.values())
    return f"By hand: put {links} into a folder, then give it as --from FOLDER"


def _fetch(package: str, version: str, folder: Path, packages: Mapping[str, str]) -> None:
    """One package into a folder, whole or not at all."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"npm (of Node.js) is not installed, which gets {package}. {by_hand(packages, version)}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:
        command = [npm, "pack", f"{package}@{version}", "--silent", "--pack-destination", part]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, cwd=part, check=False)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"npm did not get {package} within {SECONDS // 60} minutes; run it again") from None
        made = sorted(Path(part).glob("*.tgz"))
        if done.returncode or not made:
            said = (done.stderr or done.stdout).strip().splitlines()
            why = " ".join(said[-3:]) or f"exit code {done.returncode}"
            raise OSError(f"npm could not get {package} {version}: {why}. {by_hand(packages, version)}")
        os.replace(made[0], folder / f"{package}-{version}.tgz")


def contents(file: Path, wanted: tuple[str, ...]) -> dict[str, bytes]:
    """The files of an archive whose paths begin so. Nothing is written.

    Raises ValueError where the archive is not whole."""
    found = {}
    try:
        # one pass: going back means unpacking again
        with gzip.open(file) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as archive:
            for member in archive:
                if member.isfile() and member.name.startswith(wanted):
                    opened = archive.extractfile(member)
                    assert opened is not None
                    found[member.name] = opened.read()
            while unpacked.read(2**20):  # to its end, where the sum of all is checked
                pass
    except BROKEN as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise ValueError(
            f"{file} is no whole archive ({error or type(error).__name__}): its download was cut short, or it is "
            "something else. Delete it and get it again"
        ) from None
    return found
