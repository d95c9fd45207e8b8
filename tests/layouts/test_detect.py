"""Folders that mean harm, contradict themselves or lack something: each is refused by a message that names it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import make
from safetensors.torch import save_file

from mixtools import errors
from mixtools.layouts.detect import open_checkpoint

DIMS = make.Dims()
CANONICAL = make.hf(make.torrent(DIMS), DIMS)
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    document = json.loads(path.read_text())
    changed = change(document)
    path.write_text(json.dumps(document if changed is None else changed))


def place(folder: Path, tensor: str, file: str) -> None:
    edit(folder / make.INDEX, lambda index: index["weight_map"].update({tensor: file}))


@pytest.mark.parametrize(
    "name",
    [
        "../../x.safetensors", "../x", "/etc/passwd", "a/b.safetensors", "./x", "..", ".", "", "dir/", "a\\b",
        "..\\x", "x\0", "C:\\x", "\ud800", "x" * 300, "é" * 200,
    ],
)  # fmt: skip
def test_index_that_leaves_the_folder(tmp_path: Path, name: str) -> None:
    folder = make.write_hf(tmp_path / "model", CANONICAL)
    shutil.copy(folder / "model-00001-of-00003.safetensors", tmp_path / "x.safetensors")
    place(folder, ROUTER, name)
    with pytest.raises(errors.UnsafeError, match="not in its folder") as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(folder / make.INDEX)
    assert caught.value.tensor == ROUTER
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("with_index", [True, False])
def test_missing_shard(tmp_path: Path, with_index: bool) -> None:
    folder = make.write_hf(tmp_path, CANONICAL)
    (folder / "model-00002-of-00003.safetensors").unlink()
    if not with_index:
        (folder / make.INDEX).unlink()
    with pytest.raises(errors.LayoutError, match=r"model-00002-of-00003.*missing" if with_index else "2 shards of 3"):
        open_checkpoint(folder)


def test_only_the_index(tmp_path: Path) -> None:
    folder = make.write_hf(tmp_path, CANONICAL)
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(errors.LayoutError, match="missing"):
        open_checkpoint(folder)


def test_shards_without_index_are_read(tmp_path: Path) -> None:
    folder = make.write_hf(tmp_path, CANONICAL)
    (folder / make.INDEX).unlink()
    make.assert_same(make.read_all(open_checkpoint(folder)), CANONICAL)


def test_shards_of_other_names(tmp_path: Path) -> None:
    """An index may name its shards as it likes, "-of-" included."""
    folder = make.write_hf(tmp_path, CANONICAL, files=1)
    (folder / "model-00001-of-00001.safetensors").rename(folder / "best-of-all.safetensors")
    edit(folder / make.INDEX, lambda index: {"weight_map": dict.fromkeys(CANONICAL, "best-of-all.safetensors")})
    make.assert_same(make.read_all(open_checkpoint(folder)), CANONICAL)


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    folder = make.write_hf(tmp_path, CANONICAL)
    was = json.loads((folder / make.INDEX).read_text())["weight_map"][ROUTER]
    wrong = next(name for name in sorted(path.name for path in folder.glob("*.safetensors")) if name != was)
    place(folder, ROUTER, wrong)
    with pytest.raises(errors.LayoutError, match=f"expected {wrong}, found {was}") as caught:
        open_checkpoint(folder)
    assert caught.value.tensor == ROUTER


def test_index_names_a_tensor_that_is_nowhere(tmp_path: Path) -> None:
    folder = make.write_hf(tmp_path, CANONICAL)
    place(folder, "ghost", "model-00001-of-00003.safetensors")
    with pytest.raises(errors.LayoutError, match="found nowhere"):
        open_checkpoint(folder)


def test_index_that_forgets_a_tensor_forgets_nothing(tmp_path: Path) -> None:
    """The shard still has it, and its coverage is what counts."""
    folder = make.write_hf(tmp_path, CANONICAL)
    edit(folder / make.INDEX, lambda index: index["weight_map"].pop(ROUTER) and None)
    make.assert_same(make.read_all(open_checkpoint(folder)), CANONICAL)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}', "null", "\xff",
        '{"weight_map": {"a": "b", "a": "c"}}', "[" * 100_000, '{"weight_map": {"a": null}}', "1" * 5000,
    ],
)  # fmt: skip
def test_index_that_is_none(tmp_path: Path, text: str) -> None:
    folder = make.write_hf(tmp_path, CANONICAL)
    (folder / make.INDEX).write_text(text, "latin-1")
    with pytest.raises(errors.InputError) as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(folder / make.INDEX)


def without(tensors: make.Tensors, name: str) -> make.Tensors:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def test_missing_tensor(tmp_path: Path) -> None:
    with pytest.raises(errors.LayoutError, match="lacks one tensor") as caught:
        open_checkpoint(make.write_hf(tmp_path, without(CANONICAL, ROUTER)))
    assert caught.value.tensor == ROUTER


def test_extra_tensor(tmp_path: Path) -> None:
    with pytest.raises(errors.LayoutError, match="unknown to layout D") as caught:
        open_checkpoint(make.write_hf(tmp_path, CANONICAL | {"model.extra": torch.ones(3)}))
    assert caught.value.tensor == "model.extra"
    assert caught.value.file is not None
    assert caught.value.file.endswith(".safetensors")


@pytest.mark.parametrize("wrong", [torch.ones(3, 8), torch.ones(7, 3), torch.ones(21), torch.ones(3, 7, 1)])
def test_wrong_shape(tmp_path: Path, wrong: torch.Tensor) -> None:
    with pytest.raises(errors.TensorError, match=r"expected \(3, 7\)") as caught:
        open_checkpoint(make.write_hf(tmp_path, CANONICAL | {ROUTER: wrong}))
    assert caught.value.tensor == ROUTER


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.bool], ids=str)
def test_wrong_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(errors.TensorError, match="expected BF16/F16/F32"):
        open_checkpoint(make.write_hf(tmp_path, CANONICAL | {ROUTER: CANONICAL[ROUTER].to(dtype)}))


def test_problems_are_listed_when_lenient(tmp_path: Path) -> None:
    tensors = without(CANONICAL, ROUTER) | {"x": torch.ones(1), "lm_head.weight": torch.ones(1)}
    problems = open_checkpoint(make.write_hf(tmp_path, tensors), strict=False).problems
    assert [problem.tensor for problem in problems] == [ROUTER, "x", "lm_head.weight"]


def test_one_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = make.write_hf(tmp_path, CANONICAL)
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors")
    with pytest.raises(errors.FormatError, match="stands also in"):
        open_checkpoint(folder)


def test_two_layouts(tmp_path: Path) -> None:
    make.write_a(tmp_path)
    make.write_hf(tmp_path, CANONICAL)
    with pytest.raises(errors.LayoutError, match="two layouts") as caught:
        open_checkpoint(tmp_path)
    for name in ("consolidated.00.pth", make.INDEX):
        assert str(tmp_path / name) in str(caught.value)
        make.assert_same(make.read_all(open_checkpoint(tmp_path / name)), CANONICAL)
    assert open_checkpoint(tmp_path / "consolidated.00.pth").layout.letter == "A"
    assert open_checkpoint(tmp_path / "model-00002-of-00003.safetensors").layout.letter == "D"


@pytest.mark.parametrize("part", [0, 3, 10])
def test_missing_part(tmp_path: Path, part: int) -> None:
    folder = make.write_split(tmp_path)
    (folder / f"consolidated.00.pth-split{part}").unlink()
    # that the last part is missing shows in the zip
    with pytest.raises(errors.InputError, match="truncated" if part == 10 else f"split{part}: a part is missing"):
        open_checkpoint(folder)


def test_swapped_parts(tmp_path: Path) -> None:
    folder = make.write_split(tmp_path, parts=5)
    one, two = folder / "consolidated.00.pth-split1", folder / "consolidated.00.pth-split2"
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)
    with pytest.raises(errors.InputError):
        make.read_all(open_checkpoint(folder))


def test_missing_file_of_layout_b(tmp_path: Path) -> None:
    folder = make.write_b(tmp_path)
    (folder / "consolidated.03.pt").unlink()
    with pytest.raises(errors.LayoutError, match="lacks"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "holds no Mixtral"),
        (["README.md"], "holds no Mixtral"),
        (["model-.safetensors"], "holds no Mixtral"),
        (["consolidated.01.pth"], "holds no Mixtral"),
    ],
)
def test_no_layout(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(errors.LayoutError, match=message):
        open_checkpoint(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(errors.InputError, match="does not exist"):
        open_checkpoint(tmp_path / "x")


def test_path_that_no_disk_takes() -> None:
    with pytest.raises(errors.InputError, match="cannot be read"):
        open_checkpoint(Path("x" * 300))


def test_no_config(tmp_path: Path) -> None:
    folder = make.write_a(tmp_path)
    (folder / "params.json").unlink()
    with pytest.raises(errors.ConfigError, match="missing beside consolidated.00.pth") as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(folder / "params.json")


def test_config_of_another_size(tmp_path: Path) -> None:
    folder = make.write_a(tmp_path)
    edit(folder / "params.json", lambda params: params.update(hidden_dim=12))
    with pytest.raises(errors.TensorError, match=r"expected \(12, 7\), found \(10, 7\)"):
        open_checkpoint(folder)


@pytest.mark.parametrize("quantization", [{"quant_method": "hqq"}, {}, [1], "awq", 3, {"quant_method": [[]]}])
def test_quantized_is_told(tmp_path: Path, quantization: object) -> None:
    folder = make.write_hf(tmp_path, CANONICAL | {"model.layers.0.self_attn.q_proj.qweight": torch.ones(1)})
    edit(folder / "config.json", lambda config: config.update(quantization_config=quantization))
    with pytest.raises(errors.LayoutError, match="quantized"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "mixtools.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_no_regular_file(tmp_path: Path, name: str, kind: str) -> None:
    """A named pipe must not hang the reader."""
    make.write_json(tmp_path / "config.json", DIMS.config())
    save_file(CANONICAL, tmp_path / "model.safetensors")
    (tmp_path / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(errors.InputError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.file == str(tmp_path / name)


@pytest.mark.parametrize("kind", ["pipe", "folder", "link in a circle"])
def test_index_that_is_no_file(tmp_path: Path, kind: str) -> None:
    index = make.write_hf(tmp_path, CANONICAL) / make.INDEX
    index.unlink()
    if kind == "pipe":
        os.mkfifo(index)
    elif kind == "folder":
        index.mkdir()
    else:
        index.symlink_to(index.name)
        make.assert_same(make.read_all(open_checkpoint(tmp_path)), CANONICAL)  # the shards are all there
    for path in (index,) if index.is_symlink() else (tmp_path, index):
        with pytest.raises(errors.InputError) as caught:
            open_checkpoint(path)
        assert caught.value.file == str(index)


def test_index_bomb(tmp_path: Path) -> None:
    folder = make.write_hf(tmp_path, CANONICAL)
    with (folder / make.INDEX).open("wb") as file:
        file.truncate(100 << 20)
    with pytest.raises(errors.ConfigError, match="larger than"):
        open_checkpoint(folder)
