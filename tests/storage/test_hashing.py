"""A file's hash, which is remembered while the file stays as it is."""

import hashlib

from flapcli.storage import hashing


def test_a_remembered_hash_follows_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(hashing, "LARGE", 1)
    path, opened = tmp_path / "file", []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: opened.append(1) or digest(*given))
    for content in (b"one", b"two"):
        other = tmp_path / "other"
        other.write_bytes(content)
        other.replace(path)
        assert hashing.sha256(path) == hashing.sha256(path) == hashlib.sha256(content).hexdigest()
    assert len(opened) == 2
