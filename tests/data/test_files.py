import pytest

from vlatune.data import files
from vlatune.data.files import json_bytes, quick_digest, write_whole


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "kept.json"
    write_whole(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_bytes_do_not_depend_on_the_order_of_keys():
    assert json_bytes({"a": 1, "b": [2.5]}) == json_bytes({"b": [2.5], "a": 1})


@pytest.mark.parametrize("whole_up_to", [10, 10_000_000], ids=["sampled", "whole"])
def test_quick_digest_sees_first_middle_and_last_bytes(tmp_path, monkeypatch, whole_up_to):
    monkeypatch.setattr(files, "WHOLE_DIGEST_BYTES", whole_up_to)
    content = bytearray(1_000_000)
    path = tmp_path / "recording"
    digests = set()
    for place in (None, 0, 500_000, 999_999):
        changed = bytearray(content)
        if place is not None:
            changed[place] = 1
        path.write_bytes(changed)
        digests.add(quick_digest(path))
    assert len(digests) == 4
    assert all(digest.startswith("1000000:") for digest in digests)
