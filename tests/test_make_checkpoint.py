"""The synthetic model: the same values in every layout, read back by torch and safetensors and rearranged by hand."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file
from torch import Tensor

from mixtools import conversion, job
from mixtools.names import Role, Slot
from mixtools.storage.dtypes import DType

SCRIPTS = Path(__file__).parent.parent / "scripts"
LETTERS = ("A", "A'", "B", "C", "D", "E", "F")
SHAPE = {"hidden_size": 128, "intermediate_size": 192, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
SMALL = {**SHAPE, "vocab_size": 320, "num_experts": 4}
Q, K = Slot(Role.Q, 0), Slot(Role.K, 0)
DOWN = Slot(Role.DOWN, 1, 2)


def load_synthetic() -> ModuleType:
    spec = importlib.util.spec_from_file_location("synthetic", SCRIPTS / "synthetic.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["synthetic"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


synthetic = load_synthetic()


def small(seed: int = 5, **overrides: int) -> synthetic.Model:
    return synthetic.Model(synthetic.configured("tiny", {**SMALL, **overrides}), seed)


def value(model: synthetic.Model, slot: Slot) -> np.ndarray:
    return np.concatenate([block.copy() for block in model.values(slot)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small model in every layout, in shards and in bf16."""
    root = tmp_path_factory.mktemp("layouts")
    for letter in LETTERS:
        layout = synthetic.layout_named(letter)
        synthetic.write(small(), layout, DType.BF16, root / layout.name, max_shard_bytes=300_000)
    return {letter: root / synthetic.layout_named(letter).name for letter in LETTERS}


def torch_files(folder: Path, pattern: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob(pattern)):
        found |= torch.load(path, weights_only=True)
    return found


def safetensors_files(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def torrent(folders: dict[str, Path]) -> dict[str, Tensor]:
    return torch_files(folders["A"], "*.pth")


def to_hf(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """A torrent's tensor as Hugging Face has it."""
    if name.endswith(("wq.weight", "wk.weight")):
        rows, columns = tensor.shape
        tensor = tensor.view(rows // 32, 16, 2, columns).transpose(1, 2).reshape(rows, columns)
    for old, new in {
        "tok_embeddings": "model.embed_tokens", "output.": "lm_head.", "layers.": "model.layers.",
        "attention.w": "self_attn.", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "feed_forward": "block_sparse_moe",
    }.items():  # fmt: skip
        name = name.replace(old, new)
    for letter in "qkvo":
        name = name.replace(f"self_attn.{letter}.", f"self_attn.{letter}_proj.")
    return "model.norm.weight" if name == "norm.weight" else name, tensor


def expect_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def test_split_torrent_is_the_torrent_in_pieces(folders: dict[str, Path]) -> None:
    parts = [folders["A'"] / f"consolidated.00.pth-split{i}" for i in range(11)]
    whole = (folders["A"] / "consolidated.00.pth").read_bytes()
    assert b"".join(part.read_bytes() for part in parts) == whole
    assert {path.name for path in folders["A'"].iterdir()} == {"params.json", *(part.name for part in parts)}


def test_stacked_holds_the_same(folders: dict[str, Path], torrent: dict[str, Tensor]) -> None:
    expected = {name: tensor for name, tensor in torrent.items() if "feed_forward" not in name}
    for layer in range(2):
        old, new = f"layers.{layer}.feed_forward", f"layers.{layer}.block_sparse_moe"
        expected[f"{new}.gate.weight"] = torrent[f"{old}.gate.weight"]
        for part in ("w1", "w2", "w3"):
            experts = [torrent[f"{old}.experts.{expert}.{part}.weight"] for expert in range(4)]
            expected[f"{new}.{part}"] = torch.cat([w.T if part == "w2" else w for w in experts])
    assert len(list(folders["B"].glob("consolidated.0[0-7].pt"))) == 8
    expect_equal(torch_files(folders["B"], "*.pt"), expected)


def test_consolidated_holds_the_same(folders: dict[str, Path], torrent: dict[str, Tensor]) -> None:
    expect_equal(load_file(folders["C"] / "consolidated.safetensors"), torrent)


def test_hugging_face_holds_the_same(folders: dict[str, Path], torrent: dict[str, Tensor]) -> None:
    expected = dict(to_hf(name, tensor) for name, tensor in torrent.items())
    expect_equal(safetensors_files(folders["D"]), expected)
    expect_equal(torch_files(folders["E"], "*.bin"), expected)
    for letter, index in (("D", "model.safetensors"), ("E", "pytorch_model.bin")):
        assert (folders[letter] / f"{index}.index.json").is_file()


def test_fused_holds_the_same(folders: dict[str, Path], torrent: dict[str, Tensor]) -> None:
    expected = dict(to_hf(name, tensor) for name, tensor in torrent.items() if "feed_forward" not in name)
    for layer in range(2):
        old, new = f"layers.{layer}.feed_forward", f"model.layers.{layer}.mlp"
        parts = {
            part: torch.stack([torrent[f"{old}.experts.{expert}.{part}.weight"] for expert in range(4)])
            for part in ("w1", "w2", "w3")
        }
        expected[f"{new}.gate.weight"] = torrent[f"{old}.gate.weight"]
        expected[f"{new}.experts.gate_up_proj"] = torch.cat([parts["w1"], parts["w3"]], dim=1)
        expected[f"{new}.experts.down_proj"] = parts["w2"]
    expect_equal(safetensors_files(folders["F"]), expected)


@pytest.mark.parametrize("dtype", list(conversion.DTYPES.values()), ids=lambda dtype: dtype.value)
def test_values_are_rounded_as_torch_rounds(dtype: DType, tmp_path: Path) -> None:
    model = small(num_layers=1)
    synthetic.write(model, synthetic.layout_named("C"), dtype, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "consolidated.safetensors")
    for name, slot in (("experts.3.w2", Slot(Role.DOWN, 0, 3)), ("gate", Slot(Role.ROUTER, 0))):
        expected = torch.from_numpy(value(model, slot)).to(dtype.torch())
        assert torch.equal(stored[f"layers.0.feed_forward.{name}.weight"], expected)


def test_rounds_ties_to_even_and_keeps_signs() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0xBF808000, 0x3F808001, 0x3F7FFFFF, 0, 0x80000000], np.uint32)
    expected = torch.from_numpy(bits.view(np.float32)).to(torch.bfloat16).view(torch.int16)
    found = synthetic.rounded(bits.view(np.float32), DType.BF16)
    assert np.array_equal(found.view(np.int16), expected.numpy())


def test_the_seed_decides_the_bytes(tmp_path: Path) -> None:
    layout = synthetic.layout_named("hf")
    for name, seed, jobs in (("one", 5, 1), ("two", 5, 3), ("other", 6, 1)):
        synthetic.write(small(seed), layout, DType.BF16, tmp_path / name, how=job.Run(jobs=jobs))
    one, two, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "other"))
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert not [name for name in one if torch.equal(one[name], other[name])]
    assert two.keys() == other.keys()


def test_a_tensor_depends_on_no_other() -> None:
    assert np.array_equal(value(small(), DOWN), value(small(num_layers=7), DOWN))
    distinct = {value(small(), slot).tobytes() for slot in small().config.slots()}
    assert len(distinct) == len(list(small().config.slots()))


@pytest.mark.parametrize("slot", [Slot(Role.EMBED), Q, K])
def test_blocks_are_rows_of_the_whole(slot: Slot) -> None:
    """Wide enough for several blocks; the last is a short one in the embedding."""
    model = small(hidden_size=2048, num_heads=36, num_kv_heads=18, vocab_size=1100)
    blocks = [block.copy() for block in model.blocks(slot, DType.BF16, granule=32)]
    (whole,) = model.blocks(slot, DType.BF16, granule=0)
    assert len(blocks) > 1
    assert np.array_equal(np.concatenate(blocks), whole)
    assert whole.shape == model.config.shape(slot.role)


@pytest.mark.parametrize("role", [Role.UP, Role.DOWN, Role.K, Role.HEAD])
def test_planted_structure_stands_above_the_noise(role: Role) -> None:
    model = small(hidden_size=256, intermediate_size=640)
    slot = next(slot for slot in model.config.slots() if slot.role is role)
    weight = value(model, slot)
    plan, sigma = synthetic.planted(weight.shape), synthetic.noise_std(weight.shape)
    edge = sigma * (weight.shape[0] ** 0.5 + weight.shape[1] ** 0.5)
    spectrum = scipy.linalg.svdvals(weight.astype(np.float64))
    assert plan.rank == min(weight.shape) // 64
    assert spectrum[plan.visible] < 1.05 * edge < 1.3 * edge < spectrum[plan.visible - 1]
    plain = np.delete(weight, model.outlier_columns(slot), axis=1)
    spectrum = scipy.linalg.svdvals(plain.astype(np.float64))
    assert spectrum[plan.rank] < 1.05 * edge < 1.3 * edge < spectrum[plan.rank - 1]


def test_scale_keeps_the_variance_and_marks_outliers() -> None:
    model = small(hidden_size=256, intermediate_size=1280)
    weight = value(model, Slot(Role.GATE, 0, 0))
    outliers = model.outlier_columns(Slot(Role.GATE, 0, 0))
    deviations = weight.std(axis=0)
    assert list(outliers) == [int(deviations.argmax())]
    assert deviations[outliers[0]] == pytest.approx(8 / 16, rel=0.15)
    assert np.delete(weight, outliers, axis=1).std() == pytest.approx(1 / 16, rel=0.03)
    norm = value(model, Slot(Role.NORM))
    assert norm.shape == (1, 256)
    assert norm.mean() == pytest.approx(1, abs=0.05)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "make_checkpoint"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_script_makes_a_model_with_its_tokenizer_and_says_no_in_one_line(tmp_path: Path) -> None:
    small = ("--layers", 1, "--hidden", 128, "--ffn", 64, "--quiet")
    done = run(tmp_path / "out", "--layout", "B", *small)
    assert done.returncode == 0, done.stderr
    assert {"params.json", "tokenizer.model", "consolidated.07.pt"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    tokenizer = SCRIPTS.parent / "tests" / "data" / "nano-mixtral" / "tokenizer.model"
    refused = {
        8: run(tmp_path / "out", "--layout", "B", *small),
        2: run(tmp_path / "two", "--layout", "Z", *small),
        3: run(tmp_path / "three", "--tokenizer", tokenizer, "--vocab", 100, *small),
    }
    for code, process in refused.items():
        assert (process.returncode, process.stderr.count("\n")) == (code, 1), process.stderr
