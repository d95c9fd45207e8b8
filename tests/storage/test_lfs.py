"""Git LFS pointers, told from files that only resemble them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mixtools import errors
from mixtools.storage import lfs

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 17179869184\n"


def test_a_pointer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(POINTER)
    with pytest.raises(errors.FormatError, match=r"is a Git LFS pointer.*run `git lfs pull`") as caught:
        lfs.refuse_file(path)
    assert caught.value.file == str(path)


def test_what_is_no_pointer_passes(tmp_path: Path) -> None:
    """Among them what no reading would end of."""
    lfs.refuse_file(tmp_path / "nowhere")
    lfs.refuse_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    lfs.refuse_file(tmp_path / "pipe")
    for data in (b"", b"version", b"version https://git-lfs.example.org/", b" " + POINTER, POINTER + bytes(1024)):
        (tmp_path / "x").write_bytes(data)
        lfs.refuse_file(tmp_path / "x")
