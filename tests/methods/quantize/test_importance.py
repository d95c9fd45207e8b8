"""Importance matrices as files: against llama-imatrix's own (tests/golden/imatrix.md) and the gguf package."""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from mixtools.config import MixtralConfig
from mixtools.errors import FormatError, InputError, MixtoolsError, TensorError
from mixtools.layouts.detect import open_checkpoint
from mixtools.layouts.gguf_files import is_importance
from mixtools.methods.quantize.importance import Importance, encode, read

TESTS = Path(__file__).parents[2]
GGUF, DAT = TESTS / "golden" / "imatrix-tiny.gguf", TESTS / "golden" / "imatrix-tiny.dat"
GATE, QUERY = "blk.0.ffn_gate_exps.weight", "blk.0.attn_q.weight"


def theirs(file: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}


def written(
    file: Path, tensors: Mapping[str, np.ndarray], leave_out: str = "", kind: str = "imatrix", **other: Any
) -> Path:
    """By the gguf package. `other` replaces values, by the last word of their keys."""
    writer = gguf.GGUFWriter(file, "llama")
    del writer.kv_data[0]["general.architecture"]  # which llama-imatrix does not write
    writer.add_type(kind)
    values = {"datasets": ["a.txt", "b.txt"], "chunk_count": 4, "chunk_size": 512, **other}
    for name, value in values.items():
        if name != leave_out:
            add = {list: writer.add_array, int: writer.add_uint32, str: writer.add_string}[type(value)]
            add(f"imatrix.{name}", value)
    for name, array in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def two(experts: int = 3) -> dict[str, np.ndarray]:
    """A dense entry and one of experts, the second of which was sent no token."""
    rng = np.random.default_rng(1)
    counts = np.array([[5], [0], [2]], np.float32)[:experts]
    return {
        f"{GATE}.in_sum2": rng.random((3, 8), np.float32) * (counts > 0), f"{GATE}.counts": counts,
        f"{QUERY}.in_sum2": rng.random((1, 8), np.float32), f"{QUERY}.counts": np.array([[7]], np.float32),
    }  # fmt: skip


def dat(entries: Mapping[str, tuple[int, np.ndarray]], tail: bytes = b"") -> bytes:
    """The older form, byte by byte."""
    parts = [struct.pack("<i", len(entries))]
    for name, (calls, values) in entries.items():
        parts.append(struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, values.size))
        parts.append(values.astype("<f4").tobytes())
    return b"".join(parts) + tail


# --- llama-imatrix's own files ---


def test_a_file_of_llama_imatrix_is_read_as_the_gguf_package_reads_it() -> None:
    found, tensors = read(GGUF), theirs(GGUF)
    assert (found.datasets, found.chunks, found.chunk_size, found.file) == (("text.txt",), 3, 64, GGUF)
    assert {f"{name}{end}" for name in found.sums for end in (".in_sum2", ".counts")} == tensors.keys()
    assert len(found.sums) == 9 and "output.weight" in found.sums and "blk.0.ffn_gate_inp.weight" in found.sums
    for name, sums in found.sums.items():
        np.testing.assert_array_equal(sums, tensors[f"{name}.in_sum2"].reshape(sums.shape))
        np.testing.assert_array_equal(found.counts[name], tensors[f"{name}.counts"].reshape(-1))
    assert found.sums[GATE].shape == (5, 32) and found.counts[GATE].sum() == 2 * 192 and found.counts[GATE][4] == 0


def test_what_is_written_are_llama_imatrix_s_bytes() -> None:
    assert encode(read(GGUF)) == GGUF.read_bytes()


def test_both_forms_of_one_matrix_weigh_alike() -> None:
    """The .dat form holds means times calls, for all experts in one row; an expert without tokens holds ones."""
    new, old = read(GGUF), read(DAT)
    assert (old.datasets, old.chunks, old.chunk_size) == (("text.txt",), 3, 0) and old.sums.keys() == new.sums.keys()
    assert old.sums[GATE].shape == (1, 5 * 32) and old.counts[GATE].shape == (1,)
    for name, sums in new.sums.items():
        rows, columns = sums.shape
        for expert in range(rows):
            which = expert if rows > 1 else None
            ours, other = new.weights(name, which, columns), old.weights(name, which, columns)
            assert ours is not None and other is not None and ours.dtype == np.float32 == other.dtype
            np.testing.assert_allclose(other, ours, rtol=1e-6)


# --- what the encoders take ---


def test_weights_are_means_and_ones_where_no_token_came(tmp_path: Path) -> None:
    tensors = two()
    found = read(written(tmp_path / "i.gguf", tensors))
    assert (found.datasets, found.chunks, found.chunk_size) == (("a.txt", "b.txt"), 4, 512)
    np.testing.assert_array_equal(found.weights(QUERY, None, 8), tensors[f"{QUERY}.in_sum2"][0] / np.float32(7))
    np.testing.assert_array_equal(found.weights(GATE, 0, 8), tensors[f"{GATE}.in_sum2"][0] / np.float32(5))
    np.testing.assert_array_equal(found.weights(GATE, 1, 8), np.ones(8, np.float32))
    np.testing.assert_array_equal(found.weights(GATE, 2, 8), tensors[f"{GATE}.in_sum2"][2] / np.float32(2))
    assert found.weights("blk.0.attn_k.weight", None, 8) is None


def test_counts_are_rounded_as_llama_quantize_rounds_them(tmp_path: Path) -> None:
    tensors = two()
    tensors[f"{GATE}.counts"] = np.array([[5.4], [0.4], [1.6]], np.float32)
    found = read(written(tmp_path / "i.gguf", tensors))
    np.testing.assert_array_equal(found.counts[GATE], [5, 0, 2])


@pytest.mark.parametrize(
    ("name", "expert", "columns"),
    [(QUERY, None, 16), (QUERY, None, 4), (QUERY, 1, 8), (GATE, None, 8), (GATE, None, 24), (GATE, 3, 8), (GATE, 0, 16),
     (GATE, 0, 12), (GATE, 0, 4)],
)  # fmt: skip
def test_a_wrong_size_is_another_model_s(tmp_path: Path, name: str, expert: int | None, columns: int) -> None:
    found = read(written(tmp_path / "i.gguf", two()))
    with pytest.raises(TensorError, match="wrong size; is this the importance matrix of another model") as caught:
        found.weights(name, expert, columns)
    assert caught.value.file == str(tmp_path / "i.gguf") and caught.value.tensor == name
    assert f"{columns} columns" in str(caught.value.expected)


def test_one_count_for_all_experts(tmp_path: Path) -> None:
    """What llama-imatrix makes of a .dat file: experts side by side, or a row each, over a single count."""
    row = np.arange(1, 25, dtype=np.float32)
    for shape in ((24,), (3, 8)):
        file = tmp_path / f"{len(shape)}.gguf"
        tensors = {f"{GATE}.in_sum2": row.reshape(shape), f"{GATE}.counts": np.array([2], np.float32)}
        found = read(written(file, tensors))
        np.testing.assert_array_equal(found.weights(GATE, 2, 8), row[16:] / 2)
        for expert, columns in ((3, 8), (0, 16)):
            with pytest.raises(TensorError, match="wrong size"):
                found.weights(GATE, expert, columns)


@pytest.fixture(scope="module")
def config() -> MixtralConfig:
    return open_checkpoint(TESTS / "data" / "nano-mixtral").config


def fitting(config: MixtralConfig, experts: int = 8, down: int = 256) -> Importance:
    names = {GATE: (experts, config.hidden_size), QUERY: (1, config.hidden_size),
             "blk.1.ffn_down_exps.weight": (8, down)}  # fmt: skip
    sums = {name: np.ones(shape, np.float32) for name, shape in names.items()}
    counts = {name: np.ones(shape[0], np.float32) for name, shape in names.items()}
    return Importance(sums, counts, (), 1, 512, Path("i.gguf"))


def test_the_whole_matrix_is_held_against_the_model(config: MixtralConfig) -> None:
    fits = fitting(config)
    fits.expect_model(config)
    side_by_side = {name: array.reshape(1, -1) for name, array in fits.sums.items()}  # as from a .dat file
    dataclasses.replace(fits, sums=side_by_side, counts=dict.fromkeys(fits.sums, np.ones(1, np.float32))).expect_model(
        config
    )
    for other in (fitting(config, experts=4), fitting(config, experts=16), fitting(config, down=512)):
        with pytest.raises(TensorError, match="wrong size; is this the importance matrix of another model"):
            other.expect_model(config)
    halved = {name: array.reshape(4, -1) if name == GATE else array for name, array in fits.sums.items()}
    with pytest.raises(TensorError, match="expected 256 columns of 8 experts, found 512 columns of 4 experts"):
        dataclasses.replace(fits, sums=halved, counts={**fits.counts, GATE: np.ones(4, np.float32)}).expect_model(
            config
        )
    deeper = dataclasses.replace(config, num_layers=1)
    with pytest.raises(TensorError, match=r"blk\.1\.ffn_down_exps\.weight: the model has no such tensor; is this"):
        fits.expect_model(deeper)


# --- files of 2023, a tensor for each expert ---


def test_experts_of_2023_are_stacked(tmp_path: Path) -> None:
    values = {expert: np.arange(1, 9, dtype=np.float32) * (expert + 1) for expert in (0, 1, 3)}
    entries = {f"blk.7.ffn_down.{expert}.weight": (expert + 2, row) for expert, row in values.items()}
    file = tmp_path / "old.dat"
    file.write_bytes(dat({**entries, QUERY: (2, np.full(8, 3.0))}))
    found = read(file)
    name = "blk.7.ffn_down_exps.weight"
    assert found.sums.keys() == {name, QUERY} and (found.datasets, found.chunks) == ((), 0)
    np.testing.assert_array_equal(found.counts[name], [2, 3, 0, 5])
    for expert, row in values.items():
        np.testing.assert_array_equal(found.weights(name, expert, 8), row / np.float32(expert + 2))
    np.testing.assert_array_equal(found.weights(name, 2, 8), np.ones(8))  # no token, so llama.cpp left it out
    np.testing.assert_array_equal(found.weights(QUERY, None, 8), np.full(8, 1.5))
    (tmp_path / "new.gguf").write_bytes(encode(found))
    again = read(tmp_path / "new.gguf")
    np.testing.assert_array_equal(again.sums[name], found.sums[name])


@pytest.mark.parametrize(
    "entries",
    [
        {"blk.0.ffn_up.0.weight": (1, np.ones(8)), "blk.0.ffn_up.1.weight": (1, np.ones(9))},
        {"blk.0.ffn_up.0.weight": (1, np.ones(8)), "blk.0.ffn_up_exps.weight": (1, np.ones(8))},
        {"blk.0.ffn_up.100000000.weight": (1, np.ones(8))},
    ],
)
def test_experts_that_do_not_go_together(tmp_path: Path, entries: dict[str, tuple[int, np.ndarray]]) -> None:
    (tmp_path / "old.dat").write_bytes(dat(entries))
    with pytest.raises(TensorError, match=r"blk\.0\.ffn_up_exps\.weight: has entries of its experts that contradict"):
        read(tmp_path / "old.dat")


def test_an_expert_s_own_entry_has_one_row(tmp_path: Path) -> None:
    name = "blk.0.ffn_up.0.weight"
    tensors = {f"{name}.in_sum2": np.ones((2, 8), np.float32), f"{name}.counts": np.ones((2, 1), np.float32)}
    with pytest.raises(TensorError, match="contradict each other"):
        read(written(tmp_path / "i.gguf", tensors))


# --- writing ---


def test_what_is_written_the_gguf_package_reads(tmp_path: Path) -> None:
    found = read(written(tmp_path / "theirs.gguf", two()))
    (tmp_path / "ours.gguf").write_bytes(encode(found))
    ours = theirs(tmp_path / "ours.gguf")
    assert [*ours] == [f"{QUERY}.in_sum2", f"{QUERY}.counts", f"{GATE}.in_sum2", f"{GATE}.counts"]  # a before f
    for name, array in two().items():
        np.testing.assert_array_equal(ours[name].reshape(array.shape), array)
    fields = gguf.GGUFReader(tmp_path / "ours.gguf").fields
    told = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    assert told == {
        "general.type": "imatrix", "imatrix.datasets": ["a.txt", "b.txt"], "imatrix.chunk_count": 4,
        "imatrix.chunk_size": 512,
    }  # fmt: skip


def test_the_smallest_file_to_the_byte() -> None:
    one = {"output.weight": np.array([[1.0, 2.0]], np.float32)}
    wanted = b"GGUF" + struct.pack("<IQQ", 3, 2, 4)

    def told(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    wanted += told("general.type") + struct.pack("<I", 8) + told("imatrix")
    wanted += told("imatrix.datasets") + struct.pack("<IIQ", 9, 8, 1) + told("t")
    wanted += told("imatrix.chunk_count") + struct.pack("<II", 4, 3) + told("imatrix.chunk_size")
    wanted += struct.pack("<II", 4, 512)
    wanted += told("output.weight.in_sum2") + struct.pack("<IQIQ", 1, 2, 0, 0)
    wanted += told("output.weight.counts") + struct.pack("<IQIQ", 1, 1, 0, 32)
    wanted += bytes(-len(wanted) % 32)
    wanted += struct.pack("<ff", 1.0, 2.0) + bytes(24) + struct.pack("<f", 1536.0) + bytes(28)
    counts = {"output.weight": np.array([1536], np.float32)}
    assert encode(Importance(one, counts, ("t",), 3, 512, None)) == wanted


# --- what cannot be ---


def test_files_that_are_no_importance_matrix(tmp_path: Path) -> None:
    assert is_importance(GGUF)
    for name, data in {"empty": b"", "short": b"GG", "magic": b"GGUF", "text": b"Call me Ishmael. Some years ago",
                       "zeros": bytes(64), "zip": b"PK\3\4" + bytes(64), "no entries": dat({})}.items():  # fmt: skip
        file = tmp_path / name
        file.write_bytes(data)
        assert not is_importance(file)
        with pytest.raises(FormatError) as caught:
            read(file)
        assert caught.value.file == str(file)
    assert not is_importance(DAT)  # nothing in it says so
    model = written(tmp_path / "model.gguf", two(), kind="model")
    assert not is_importance(model)
    with pytest.raises(FormatError, match="is a GGUF file, but no importance matrix"):
        read(model)
    with pytest.raises(InputError, match="cannot be opened"):
        read(tmp_path / "missing")


@pytest.mark.parametrize("key", ["datasets", "chunk_count", "chunk_size"])
def test_metadata_without_which_llama_quantize_refuses(tmp_path: Path, key: str) -> None:
    with pytest.raises(FormatError, match=rf"without imatrix\.{key}"):
        read(written(tmp_path / "i.gguf", two(), leave_out=key))
    with pytest.raises(FormatError, match=rf"without imatrix\.{key}"):
        read(written(tmp_path / "j.gguf", two(), **{key: "12"}))


def test_entries_that_cannot_be(tmp_path: Path) -> None:
    good = two()
    nan, negative = good[f"{GATE}.in_sum2"].copy(), good[f"{QUERY}.in_sum2"].copy()
    nan[2, 3], negative[0, 1] = np.nan, -1
    infinite = np.array([[np.inf]], np.float32)
    cases: list[tuple[type[MixtoolsError], str, dict[str, Any]]] = [
        (FormatError, f"{QUERY}: lacks its counts", {f"{QUERY}.counts": None}),
        (FormatError, f"{GATE}: lacks its in_sum2", {f"{GATE}.in_sum2": None}),
        (FormatError, "without an entry", dict.fromkeys(good)),
        (FormatError, "is neither in_sum2 nor counts", {QUERY: np.ones(8, np.float32)}),
        (TensorError, "wrong dtype: expected F32, found F16", {f"{QUERY}.in_sum2": np.ones(8, np.float16)}),
        (TensorError, "wrong number of counts: expected 3, found 2", {f"{GATE}.counts": np.ones((2, 1), np.float32)}),
        (TensorError, "wrong number of counts: expected 1, found 8", {f"{QUERY}.counts": np.ones((8, 1), np.float32)}),
        (TensorError, f"{GATE}: holds nan among its sums", {f"{GATE}.in_sum2": nan}),
        (TensorError, f"{QUERY}: holds -1.0 among its sums", {f"{QUERY}.in_sum2": negative}),
        (TensorError, f"{QUERY}: holds inf among its counts", {f"{QUERY}.counts": infinite}),
        (TensorError, f"{QUERY}: holds -7.0 among its counts", {f"{QUERY}.counts": -good[f"{QUERY}.counts"]}),
    ]
    for number, (kind, message, changed) in enumerate(cases):
        tensors = {name: array for name, array in {**good, **changed}.items() if array is not None}
        with pytest.raises(kind) as caught:
            read(written(tmp_path / f"{number}.gguf", tensors))
        assert message in str(caught.value), str(caught.value)


def test_older_files_that_cannot_be(tmp_path: Path) -> None:
    row = np.ones(8)
    cases: list[tuple[type[MixtoolsError], str, bytes]] = [
        (FormatError, "8 values from -1 calls cannot be", dat({QUERY: (-1, row)})),
        (FormatError, "0 values from 1 calls cannot be", dat({QUERY: (1, row[:0])})),
        (FormatError, "is there twice", struct.pack("<i", 2) + 2 * dat({QUERY: (1, row)})[4:]),
        (FormatError, "4 bytes are left over", dat({QUERY: (1, row)}, struct.pack("<ii", 3, 0) + bytes(4))),
        (FormatError, "-3 chunks cannot be", dat({QUERY: (1, row)}, struct.pack("<ii", -3, 0))),
        (FormatError, "the text's name does not fit", dat({QUERY: (1, row)}, struct.pack("<ii", 3, 5) + b"text")),
        (FormatError, "the name of entry 1 of 1 does not fit", struct.pack("<ii", 1, -4) + bytes(40)),
        (FormatError, "the name of entry 1 of 1 does not fit", struct.pack("<ii", 1, 5000) + bytes(6000)),
        (FormatError, f"{QUERY} does not fit", dat({QUERY: (1, row)})[:-4]),
        (FormatError, "a name is not UTF-8", dat({"abc": (1, row)}).replace(b"abc", b"a\xffc")),
        (TensorError, f"{QUERY}: holds nan among its sums", dat({QUERY: (1, row * np.nan)})),
        (TensorError, f"{QUERY}: holds -1.0 among its sums", dat({QUERY: (1, -row)})),
    ]
    for number, (kind, message, data) in enumerate(cases):
        file = tmp_path / f"{number}.dat"
        file.write_bytes(data)
        with pytest.raises(kind) as caught:
            read(file)
        assert message in str(caught.value) and str(file) in str(caught.value), str(caught.value)


def test_values_of_no_calls_are_taken_as_they_are(tmp_path: Path) -> None:
    """As llama-quantize does: it divides by calls only where there are some."""
    (tmp_path / "old.dat").write_bytes(dat({QUERY: (0, np.full(8, 3.0))}))
    np.testing.assert_array_equal(read(tmp_path / "old.dat").weights(QUERY, None, 8), np.full(8, 3.0))


@pytest.mark.parametrize("file", [GGUF, DAT], ids=["gguf", "dat"])
def test_every_cut_is_told(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    # the last four of the .dat form's parts are optional, and the GGUF form ends in 28 bytes of padding
    whole = {len(data) - 16} if file is DAT else set(range(len(data) - 28, len(data)))
    for length in sorted({*range(0, len(data), 23), *range(len(data) - 40, len(data))} - whole):
        cut = tmp_path / "cut"
        cut.write_bytes(data[:length])
        with pytest.raises(FormatError):
            read(cut)


@hypothesis.given(strategies.sampled_from([GGUF, DAT]), strategies.data())
@hypothesis.settings(max_examples=300)
def test_a_changed_byte_is_an_error_of_ours_or_none(
    tmp_path_factory: pytest.TempPathFactory, file: Path, data: strategies.DataObject
) -> None:
    found = bytearray(file.read_bytes())
    for _ in range(data.draw(strategies.integers(1, 4))):
        found[data.draw(strategies.integers(0, len(found) - 1))] = data.draw(strategies.integers(0, 255))
    changed = tmp_path_factory.mktemp("changed") / "file"
    changed.write_bytes(found)
    with contextlib.suppress(MixtoolsError):
        read(changed)
