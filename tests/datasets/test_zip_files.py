"""Archives against Python's own reader, and damaged ones."""

import os
import pickle
import zipfile
import zlib

import numpy as np
import pytest

from data.archives import ZipMembers


def everything(name):
    return True


@pytest.fixture
def contents():
    rng = np.random.default_rng(0)
    sizes = [0, 1, 100, 5000, 70_000]
    return {f"folder/{i:03d}-é.bin": rng.integers(0, 9, sizes[i % 5], dtype=np.uint8).tobytes() for i in range(40)}


@pytest.fixture
def archive(tmp_path, contents):
    """An archive of stored and deflated files, with what else may stand in one."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", allowZip64=True) as file:
        file.comment = b"a comment"
        for i, (name, data) in enumerate(reversed(contents.items())):
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED
            info.extra = b"\xfe\xca\x04\x00abcd" * (i % 3)
            with file.open(info, "w", force_zip64=i % 4 == 0) as member:
                member.write(data)
        file.writestr("empty folder/", b"")
    return path


@pytest.mark.parametrize("before", [b"", b"what a self-extracting archive begins with" * 99])
def test_files_are_those_of_pythons_reader(archive, contents, before):
    archive.write_bytes(before + archive.read_bytes())
    members = ZipMembers(str(archive), everything)
    assert members.names == sorted(contents)
    for name in members.names:
        assert members.readable(name) and members.read(name) == contents[name]
        assert members.signature(name) == (len(contents[name]), zlib.crc32(contents[name]))
    with pytest.raises(KeyError, match="there is no nothing"):
        members.read("nothing")


def test_copies_in_other_processes_open_their_own_file(archive, contents):
    members = ZipMembers(str(archive), lambda name: name < "folder/020")
    first = members.names[5]
    members.read(first)
    child = os.fork() if hasattr(os, "fork") else None
    if child == 0:
        os._exit(0 if all(members.read(name) == contents[name] for name in members.names) else 1)
    assert all(members.read(name) == contents[name] for name in members.names)
    assert child is None or os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pickle.loads(pickle.dumps(members.__getstate__()))["_file"] is None
    assert members.read(first) == contents[first]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damage_anywhere_is_noticed(tmp_path, method):
    data = bytes(range(256)) * 20
    path = tmp_path / "one.zip"
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("a", data)
    whole = path.read_bytes()
    directory = whole.index(b"PK\x01\x02")
    for place in [*range(0, 40), *range(40, directory, 97)]:
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        path.write_bytes(damaged)
        try:
            assert ZipMembers(str(path), everything).read("a") == data, place  # a field that nobody needs
        except (zipfile.BadZipFile, EOFError, zlib.error):
            continue
        assert place <= 30
    for field, value in ((20, 1 << 30), (24, 1 << 30), (42, 1 << 30)):  # packed size, size, place
        damaged = bytearray(whole)
        damaged[directory + field : directory + field + 4] = value.to_bytes(4, "little")
        path.write_bytes(damaged)
        with pytest.raises((zipfile.BadZipFile, EOFError)):
            ZipMembers(str(path), everything).read("a")
