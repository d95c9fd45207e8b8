"""Which type each tensor gets: as llama-quantize chose, and sizes as the world knows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mixtools
from mixtools.config import MixtralConfig
from mixtools.errors import InputError, UsageError
from mixtools.methods.quantize import gguf_verb, mixtures, verbs
from mixtools.methods.quantize.mixtures import Mixture, choose, needs_imatrix
from mixtools.methods.quantize.run import plan_file
from mixtools.names import Role, Slot
from mixtools.storage.dtypes import DType

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[2] / "golden" / "mixtures.json").read_text())
ROLES = (Role.EMBED, Role.Q, Role.K, Role.V, Role.O, Role.GATE, Role.UP, Role.DOWN, Role.HEAD)  # mixtures.md
NORMS = (Role.ATTENTION_NORM, Role.FFN_NORM, Role.NORM, Role.ROUTER)
# facts: sizes of 8x7B in units of 1e9 bytes
TODAY = {
    "Q2_K": 17.31, "Q3_K_S": 20.43, "Q3_K_M": 22.55, "Q3_K_L": 24.17, "Q4_0": 26.44, "Q4_1": 29.34, "Q4_K_S": 26.75,
    "Q4_K_M": 28.45, "Q5_0": 32.23, "Q5_1": 35.13, "Q5_K_S": 32.23, "Q5_K_M": 33.23, "Q6_K": 38.38, "Q8_0": 49.63,
    "F16": 93.41, "BF16": 93.41,
}  # fmt: skip
CARD = {"Q2_K": 15.64, "Q3_K_M": 20.36, "Q4_0": 26.44, "Q4_K_M": 26.44, "Q5_0": 32.23, "Q5_K_M": 32.23, "Q6_K": 38.38,
        "Q8_0": 49.62}  # fmt: skip
EIGHT = {"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
         "norm_eps": 1e-5, "vocab_size": 32000, "moe": {"num_experts_per_tok": 2, "num_experts": 8}}  # fmt: skip


def config(
    layers: int = 8, *, experts: int = 8, heads: int = 4, kv: int = 2, d: int = 256, f: int = 256
) -> MixtralConfig:
    """As in mixtures.md."""
    return MixtralConfig(d, f, layers, heads, kv, 64, 512, experts)


def told(options: list[str]) -> dict[str, Any]:
    """llama-quantize's options as ours."""
    found: dict[str, Any] = {"tensor_types": [], "output": None, "embedding": None, "rules": "today"}
    pairs = iter([option for option in options if option not in ("--pure", "--imatrix", "IMATRIX")])
    for option in pairs:
        if option == "--tensor-type":
            found["tensor_types"].append(next(pairs))
        else:
            found[{"--output-tensor-type": "output", "--token-embedding-type": "embedding"}[option]] = next(pairs)
    return {**found, "pure": "--pure" in options}


def by_layer(text: str, layers: int) -> list[str]:
    """ "Q5_K*2 Q4_K" -> [Q5_K, Q5_K, Q4_K]; one name alone is of all layers."""
    runs = [run.partition("*")[::2] for run in text.split()]
    names = [name for name, times in runs for _ in range(int(times or 1))]
    return names * layers if len(names) == 1 else names


@pytest.mark.parametrize("case", GOLDEN)
def test_as_llama_quantize_chose(case: str) -> None:
    golden = GOLDEN[case]
    tied = golden["dims"]["tied"]
    model = config(**{name: size for name, size in golden["dims"].items() if name != "tied"})
    imatrix = "--imatrix" in golden["options"]
    for name, expected in golden["types"].items():
        (mixture,) = gguf_verb.mixtures_of([name], **told(golden["options"]))
        found = choose(mixture, model, tied=tied, imatrix=imatrix)
        assert found.keys() == {*model.slots()}
        for role, text in zip(ROLES, expected, strict=True):
            slots = [slot for slot in found if slot.role is role]
            if text is None:
                assert role is Role.HEAD and tied
                continue
            layers = by_layer(text, model.num_layers)
            assert len(layers) == model.num_layers
            for slot in slots:
                assert found[slot].type.value == layers[slot.layer or 0], (name, slot)
        assert all(found[slot].type is DType.F32 for slot in found if slot.role in NORMS)
        refused = name in golden["refused"]
        assert imatrix or bool([*needs_imatrix(mixture, found)]) is refused, name


def test_the_golden_cases_ask_for_every_type() -> None:
    from mixtools.layouts.gguf_config import FILE_TYPES

    whole = [golden for golden in GOLDEN.values() if golden["types"].keys() == FILE_TYPES.keys()]
    layers = {(golden["dims"]["layers"], golden["dims"]["experts"]) for golden in whole}
    assert layers >= {(layers, experts) for layers in (2, 8, 32, 56) for experts in (4, 8, 16)}


# --- sizes ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtures") / "Mixtral-8x7B-v0.1"
    path.mkdir()
    (path / "params.json").write_text(json.dumps(EIGHT))
    return path


@pytest.mark.parametrize(
    ("rules", "sizes", "narrower"),
    [("today", TODAY, 0), ("2023-12", CARD, 32 * 8 * 4096 * 2)],
    ids=["today", "2023-12"],
)
def test_sizes_of_8x7b(tmp_path: Path, folder: Path, rules: str, sizes: dict[str, float], narrower: int) -> None:
    """The world's files have a vocabulary of 0.7 MB, and those of 2023 a `narrower` router, in F16."""
    planned = mixtools.quantize(folder, tmp_path / "out", type=[*sizes], rules=rules, dry_run=True)
    found = {file["type"]: file["bytes"] for file in planned.document["files"]}
    assert {name: round((size + 700_000 - narrower) / 1e9, 2) for name, size in found.items()} == sizes
    assert not (tmp_path / "out").exists()


def test_bits_per_weight(tmp_path: Path, folder: Path) -> None:
    planned = mixtools.quantize(folder, tmp_path, type=["Q8_0", "F16", "Q2_K"], dry_run=True)
    weights = sum(
        4096 * rows * times
        for rows, times in ((32000, 2), (4096, 64), (1024, 64), (14336, 32 * 8 * 3), (8, 32), (1, 65))
    )
    for file in planned.document["files"]:
        assert file["bits_per_weight"] == pytest.approx(8 * file["bytes"] / weights, abs=1e-3)
        assert file["max_ram_bytes"] == file["bytes"] + 2_500_000_000  # as TheBloke's cards tell


# --- December 2023 ---

# facts, "In December 2023": of 8 experts; what is not named has the base type
IN_2023 = {
    "Q2_K": ("Q2_K", "Q3_K"), "Q3_K_S": ("Q3_K", "Q3_K"), "Q3_K_M": ("Q3_K", "Q4_K"), "Q3_K_L": ("Q3_K", "Q5_K"),
    "Q4_0": ("Q4_0", "Q4_0"), "Q4_1": ("Q4_1", "Q4_1"), "Q4_K_S": ("Q4_K", "Q4_K"), "Q4_K_M": ("Q4_K", "Q4_K"),
    "Q5_0": ("Q5_0", "Q5_0"), "Q5_1": ("Q5_1", "Q5_1"), "Q5_K_S": ("Q5_K", "Q5_K"), "Q5_K_M": ("Q5_K", "Q5_K"),
    "Q6_K": ("Q6_K", "Q6_K"), "Q8_0": ("Q8_0", "Q8_0"),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_2023)
@pytest.mark.parametrize("layers", [2, 32])
def test_rules_of_december_2023(name: str, layers: int) -> None:
    base, attention_output = IN_2023[name]
    found = choose(Mixture(name, rules="2023-12"), config(layers), tied=False, imatrix=False)
    head = "Q8_0" if name == "Q8_0" else "Q6_K"
    expected = {Role.K: "Q8_0", Role.V: "Q8_0", Role.O: attention_output, Role.HEAD: head}
    for slot, choice in found.items():
        if slot.role in NORMS:
            assert choice.type is DType.F32
        else:
            assert choice.type.value == expected.get(slot.role, base), slot


@pytest.mark.parametrize("name", ["Q2_K_S", "IQ4_XS", "IQ4_NL", "IQ2_XXS", "MXFP4_MOE", "BF16"])
def test_types_that_came_later(name: str) -> None:
    with pytest.raises(UsageError, match=f"--rules 2023-12: of Q2_K, .*Q8_0; {name} came later"):
        choose(Mixture(name, rules="2023-12"), config(), tied=False, imatrix=True)


# --- overrides ---


def test_order_of_overrides() -> None:
    """Embedding and head by their own options, then the first pattern that is found in the name, then the mixture."""
    mixture = Mixture(
        "Q4_K_M", False, (("attn_[qk]", DType.Q5_0), ("attn_q|exps|embd|output", DType.Q8_0), ("", DType.Q2_K)),
        DType.Q5_1, DType.F16,
    )  # fmt: skip
    found = choose(mixture, config(), tied=False, imatrix=False)
    expected = {
        Role.EMBED: DType.F16, Role.HEAD: DType.Q5_1, Role.Q: DType.Q5_0, Role.K: DType.Q5_0, Role.V: DType.Q2_K,
        Role.O: DType.Q8_0, Role.GATE: DType.Q8_0, Role.UP: DType.Q8_0, Role.DOWN: DType.Q8_0,
    }  # fmt: skip
    for slot, choice in found.items():
        assert choice.type is expected.get(slot.role, DType.F32), slot


def test_a_pattern_may_name_a_layer() -> None:
    mixture = Mixture("Q8_0", tensor_types=((r"^blk\.[0-2]\.ffn_down_exps\.weight$", DType.Q4_K),))
    found = choose(mixture, config(), tied=False, imatrix=False)
    chosen = {slot.layer for slot, choice in found.items() if choice.type is DType.Q4_K}
    assert chosen == {0, 1, 2}
    assert all(choice.type is not DType.Q4_K for slot, choice in found.items() if slot.role is not Role.DOWN)


def test_patterns_reach_dense_types_too() -> None:
    found = choose(Mixture("F16", tensor_types=(("ffn_up", DType.Q8_0),)), config(), tied=False, imatrix=False)
    assert {choice.type for slot, choice in found.items() if slot.role is Role.UP} == {DType.Q8_0}
    assert found[Slot(Role.HEAD)].type is DType.F16


def test_norms_and_router_are_nobodys_choice() -> None:
    mixture = Mixture("Q4_0", True, ((".", DType.Q8_0),))
    found = choose(mixture, config(), tied=False, imatrix=False)
    assert {choice.type for slot, choice in found.items() if slot.role in NORMS} == {DType.F32}
    assert {choice.type for slot, choice in found.items() if slot.role not in NORMS} == {DType.Q8_0}


# --- rows ---


@pytest.mark.parametrize(
    ("wanted", "at_320", "at_80"),
    [(DType.Q2_K, DType.Q4_0, DType.F16), (DType.Q3_K, DType.Q4_0, DType.F16), (DType.Q4_K, DType.Q5_0, DType.F16),
     (DType.Q5_K, DType.Q5_1, DType.F16), (DType.Q6_K, DType.Q8_0, DType.F16), (DType.IQ4_XS, DType.IQ4_NL, DType.F16),
     (DType.IQ3_S, DType.IQ4_NL, DType.F16), (DType.Q8_0, DType.Q8_0, DType.F16), (DType.Q4_1, DType.Q4_1, DType.F16),
     (DType.MXFP4, DType.MXFP4, DType.F16), (DType.F16, DType.F16, DType.F16), (DType.BF16, DType.BF16, DType.BF16),
     (DType.F32, DType.F32, DType.F32)],
)  # fmt: skip
def test_rows_that_do_not_fit(wanted: DType, at_320: DType, at_80: DType) -> None:
    for columns, expected in ((256, wanted), (320, at_320), (80, at_80)):
        mixture = Mixture("Q4_0", tensor_types=(("ffn_down", wanted),))
        found = choose(mixture, config(f=columns), tied=False, imatrix=True)[Slot(Role.DOWN, 3, 1)]
        assert found == (expected, None if expected is wanted else wanted)


def test_fallbacks_are_told_of_each_tensor_once() -> None:
    """Not of each expert."""
    file = plan_file(
        Mixture("Q4_K_S"), config(2, d=256, f=96), {}, "x", tied=False, imatrix=False, max_shard_bytes=None
    )
    assert file.fallbacks == [f"blk.{layer}.ffn_down_exps.weight Q4_K -> Q5_0" for layer in range(2)]


# --- what a user may say ---


@pytest.mark.parametrize(
    ("text", "name"), [("q4_k_m", "Q4_K_M"), ("Q4_K", "Q4_K_M"), ("q3_k", "Q3_K_M"), ("Q5_K", "Q5_K_M"),
                       ("bf16", "BF16"), ("mxfp4_moe", "MXFP4_MOE"), ("Q2_K", "Q2_K")]
)  # fmt: skip
def test_names(text: str, name: str) -> None:
    assert mixtures.type_named(text) == name


@pytest.mark.parametrize("text", ["Q4_K_L", "Q9_0", "", "Q4-K-M", "4", "I8", "MXFP4", "all"])
def test_unknown_names_list_the_known(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        mixtures.type_named(text)
    for name in ("F32", "Q2_K_S", "Q4_K_M", "IQ4_XS", "MXFP4_MOE"):
        assert f"{name}" in str(caught.value)
    assert f"--type {text}" in str(caught.value)


@pytest.mark.parametrize("text", ["Q4_K_M", "I32", "U8", "F64", "float16", ""])
def test_unknown_tensor_types_list_the_known(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        mixtures.dtype_named(text, "--output-tensor-type ")
    before, _, listed = str(caught.value).partition("there are ")
    assert before == f"--output-tensor-type {text}: there is no such type; "
    assert {"F32", "BF16", "Q4_K", "IQ4_XS", "MXFP4"} < {*listed.split(", ")} and "I32" not in listed


def test_tensor_types_in_any_case() -> None:
    assert mixtures.dtype_named("q6_k", "x") is DType.Q6_K
    assert mixtures.dtype_named("bf16", "x") is DType.BF16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": []}, "--type is missing"),
        ({"type": ["Q4_K_M"], "rules": "2024"}, "--rules 2024: there is today, 2023-12"),
        ({"type": ["Q4_K_M"], "tensor_type": ["attn_q"]}, "--tensor-type attn_q: write REGEX=TYPE"),
        ({"type": ["Q4_K_M"], "tensor_type": ["=Q4_K"]}, "--tensor-type =Q4_K: write REGEX=TYPE"),
        ({"type": ["Q4_K_M"], "tensor_type": ["(=Q4_K"]}, r"'\(' is no regular expression"),
        ({"type": ["Q4_K_M"], "tensor_type": ["x=Q4_K_M"]}, "--tensor-type x= ?Q4_K_M: there is no such type"),
        ({"type": ["Q4_K_M"], "output_tensor_type": "Q4_K_M"}, "--output-tensor-type Q4_K_M: there is no such type"),
        ({"type": ["Q4_K_M"], "token_embedding_type": "x"}, "--token-embedding-type x: there is no such type"),
        ({"type": ["Q4_K_M"], "method": "exl2"}, "--method exl2: there is gguf, gptq, awq, nf4, int8"),
        ({"type": ["Q4_K_M"], "max_shard_size": "many"}, "--max-shard-size: 'many' is not a size"),
        ({"type": ["Q4_K_M", "Q6_K"], "out": "x.gguf"}, "several types are several files: name a folder, not x.gguf"),
    ],
)
def test_options_that_cannot_be(folder: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    for ask in (lambda: verbs.preflight(**options), lambda: mixtools.quantize(folder, **{"out": tmp_path, **options})):
        with pytest.raises(UsageError, match=message):
            ask()
    assert [*tmp_path.iterdir()] == []


def test_a_pattern_may_hold_an_equals_sign() -> None:
    (mixture,) = gguf_verb.mixtures_of(["Q8_0"], tensor_types=["a=b=q4_0"], output=None, embedding=None, rules="today")
    assert mixture.tensor_types == (("a=b", DType.Q4_0),)


def test_a_type_asked_for_twice_is_one(folder: Path, tmp_path: Path) -> None:
    planned = mixtools.quantize(folder, tmp_path, type=["Q4_K", "q4_k_m", "Q8_0"], dry_run=True)
    assert [file["type"] for file in planned.document["files"]] == ["Q4_K_M", "Q8_0"]


@pytest.mark.parametrize("name", GOLDEN["tied"]["refused"])
def test_what_needs_an_importance_matrix(folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"--type {name} needs an importance matrix, as in llama.cpp .*blk.0.attn_"):
        mixtools.quantize(folder, tmp_path, type=[name], dry_run=True)
    with pytest.raises(InputError, match="does not exist"):
        mixtools.quantize(folder, tmp_path, type=[name], dry_run=True, imatrix=tmp_path / "theirs.gguf")
    (tmp_path / "theirs.gguf").touch()  # sizes do not depend on what it holds
    planned = mixtools.quantize(folder, tmp_path, type=[name], dry_run=True, imatrix=tmp_path / "theirs.gguf")
    assert planned.document["files"][0]["type"] == name
