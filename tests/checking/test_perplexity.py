"""Each protocol against a few independent lines with transformers, on the same text and ids."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from mixtral_oracle import DATA, NANO, read_nano, transformers_model

from mixtools.checking import perplexity
from mixtools.errors import InputError, TensorError, UsageError
from mixtools.inference.stream import Stream
from mixtools.layouts.memory import MemoryReader
from mixtools.names import Role, Slot
from mixtools.scaling import RopeScaling
from mixtools.text import reading
from mixtools.text.tokenizer import Tokenizer

BOS = 1


@pytest.fixture(scope="module")
def nano() -> MemoryReader:
    return read_nano()


@pytest.fixture(scope="module")
def theirs(nano):
    return transformers_model(nano)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(NANO / "tokenizer.model"))
    return [BOS, *pieces.encode((DATA / "text.txt").read_text("utf-8"))]


def ours(nano, ids, protocol, **options) -> perplexity.Perplexity:
    return perplexity.measure(Stream(nano, dtype=torch.float32), perplexity.cut(ids, protocol, bos_id=BOS, **options))


@torch.no_grad()
@pytest.mark.parametrize("ctx", [128, 700])
def test_gptq_is_the_evaluation_of_the_gptq_code(nano, theirs, ids, ctx):
    tokens = torch.tensor([ids])
    losses = []
    for i in range(len(ids) // ctx):
        window = tokens[:, i * ctx : (i + 1) * ctx]
        loss = F.cross_entropy(theirs(window).logits[0, :-1], window[0, 1:])
        losses.append(loss.float() * ctx)
    expected = torch.exp(torch.stack(losses).sum() / (len(losses) * ctx)).item()
    found = ours(nano, ids, "gptq", ctx=ctx)
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert len(found.nll) == len(losses) * (ctx - 1)
    assert found.by_window() == pytest.approx([float(loss) / ctx for loss in losses], rel=1e-4)


@torch.no_grad()
def test_llamacpp_counts_the_second_half_after_a_bos_of_its_own(nano, theirs, ids):
    nll = []
    for start in range(0, len(ids) - 511, 512):
        chunk = [BOS, *ids[start + 1 : start + 512]]
        p = theirs(torch.tensor([chunk])).logits[0].double().log_softmax(-1)
        nll += [-p[position, chunk[position + 1]].item() for position in range(256, 511)]
    mean = sum(nll) / len(nll)
    square = sum(x * x for x in nll) / len(nll) - mean * mean
    found = ours(nano, ids, "llamacpp")
    assert len(found.nll) == len(nll) == len(ids) // 512 * 255
    assert found.perplexity == pytest.approx(math.exp(mean), rel=1e-5)
    # as llama-perplexity reckons it
    assert found.stderr == pytest.approx(math.exp(mean) * math.sqrt(square / (len(nll) - 1)), rel=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(("ctx", "stride"), [(256, None), (256, 100), (300, 300), (2048, 1024)])
def test_hf_slides_as_the_guide_of_transformers_does(nano, theirs, ids, ctx, stride):
    tokens = torch.tensor([ids])
    total, count, previous = 0.0, 0, 0
    for begin in range(0, len(ids), stride or ctx // 2):
        end = min(begin + ctx, len(ids))
        labels = tokens[:, begin:end].clone()
        if previous:
            labels[:, : previous - end] = -100
        logits = theirs(tokens[:, begin:end]).logits[0, :-1]
        total += float(F.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum"))
        count += int((labels[0, 1:] != -100).sum())
        previous = end
        if end == len(ids):
            break
    found = ours(nano, ids, "hf", ctx=ctx, stride=stride)
    assert len(found.nll) == count
    assert found.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_a_stride_below_ctx_predicts_every_token_once(ids):
    windows = perplexity.cut(ids, "hf", bos_id=BOS, ctx=256, stride=77)
    assert torch.equal(windows.targets(), torch.tensor(ids[1:]))
    lengths = [len(sequence) for sequence in windows.sequences]
    assert set(lengths[:-1]) == {256}


def test_max_tokens_takes_the_first_of_the_text(nano, ids):
    short = ours(nano, ids, "gptq", ctx=64, max_tokens=200)
    assert len(short.windows.sequences) == 3
    whole = ours(nano, ids, "gptq", ctx=64)
    assert torch.allclose(short.nll, whole.nll[: len(short.nll)], atol=1e-5)


def test_the_document_holds_what_the_command_line_promises(nano, ids):
    found = ours(nano, ids, "llamacpp", ctx=256).document()
    promised = {
        "perplexity",
        "word_perplexity",
        "byte_perplexity",
        "stderr",
        "tokens",
        "protocol",
        "ctx",
        "seconds",
        "peak_memory_bytes",
    }
    assert found.keys() == promised | {"remarks"}
    assert (found["protocol"], found["ctx"], found["tokens"]) == ("llamacpp", 256, len(ids) // 256 * 127)
    assert 10 < found["perplexity"] < 200
    assert found["peak_memory_bytes"] > 50_000_000


# --- by words and bytes ---


def surfaces(text: str) -> list[str]:
    """Of BOS and every token the part of the text that it stands for, by SentencePiece itself."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(NANO / "tokenizer.model"))
    offsets = pieces.encode_as_offset_mapping(text)["offsets"]
    return ["", *(text[start:end] for start, end in offsets)]


MIXED = "Ein Größenvergleich:\n  naïve 日本語 café 🙂🙂\tund mehr.\n\n" * 12


@pytest.mark.parametrize("text", [(DATA / "text.txt").read_text("utf-8"), MIXED], ids=["text", "mixed"])
@pytest.mark.parametrize(
    ("protocol", "options", "counted"),
    [
        ("gptq", {"ctx": 64}, lambda i, n: i % 64 and i < n // 64 * 64),
        ("llamacpp", {"ctx": 64}, lambda i, n: i % 64 > 32 and i < n // 64 * 64),
        ("hf", {"ctx": 100}, lambda i, n: i),
        ("hf", {"ctx": 100, "stride": 33}, lambda i, n: i),
        ("hf", {"ctx": 50, "stride": 50}, lambda i, n: i % 50),
        ("gptq", {"ctx": 64, "max_tokens": 200}, lambda i, n: i % 64 and i < 192),
    ],
)  # fmt: skip
def test_counted_tokens_spell_what_sentencepiece_says(text, protocol, options, counted):
    tokenizer = Tokenizer.from_folder(NANO)
    ids, parts = tokenizer.encode(text), surfaces(text)
    assert len(ids) == len(parts) and "".join(parts) == text
    windows = perplexity.cut(ids, protocol, bos_id=BOS, **options)
    expected = "".join(part for i, part in enumerate(parts) if counted(i, len(ids)))
    found = perplexity.spell(tokenizer, ids, windows)
    assert found == (len(expected.split()), len(expected.encode("utf-8")))
    places = windows.places()
    assert places == [i for i in range(len(ids)) if counted(i, len(ids))]
    assert [ids[place] for place in places] == windows.targets().tolist()


def test_all_of_a_text_is_its_words_and_bytes_as_lm_evaluation_harness_counts_them(nano, ids):
    """Its word_perplexity is exp(-loglikelihood / len(re.split(r"\\s+", document))), and that of bytes accordingly."""
    text = (DATA / "text.txt").read_text("utf-8").strip()
    tokenizer = Tokenizer.from_folder(NANO)
    ids = tokenizer.encode(text)
    windows = perplexity.cut(ids, "hf", bos_id=BOS, ctx=256)
    found = perplexity.measure(Stream(nano, dtype=torch.float32), windows, perplexity.spell(tokenizer, ids, windows))
    total = float(found.nll.sum())
    assert len(found.nll) == len(ids) - 1
    assert found.word_perplexity == pytest.approx(math.exp(total / len(re.split(r"\s+", text))), rel=1e-12)
    assert found.byte_perplexity == pytest.approx(math.exp(total / len(text.encode("utf-8"))), rel=1e-12)
    assert 1 < found.byte_perplexity < found.perplexity < found.word_perplexity
    document = found.document()
    assert document["word_perplexity"] == found.word_perplexity
    assert document["byte_perplexity"] == found.byte_perplexity


def test_where_nothing_is_spelled_nothing_is_divided_by(nano, ids):
    windows = perplexity.cut(ids, "gptq", bos_id=BOS, ctx=64)
    nll = torch.ones(len(windows.targets()), dtype=torch.float64)
    for spelled in (None, perplexity.Spelled(0, 0)):
        found = perplexity.Perplexity(windows, nll, 1.0, (), spelled)
        assert found.word_perplexity is None and found.byte_perplexity is None
    found = perplexity.Perplexity(windows, nll, 1.0, (), perplexity.Spelled(0, len(nll)))
    assert found.word_perplexity is None and found.byte_perplexity == pytest.approx(math.e)
    found = perplexity.Perplexity(windows, nll, 1.0, (), perplexity.Spelled(1, 1))
    assert found.word_perplexity == math.exp(700)  # and no OverflowError


def test_windows_line_ends_are_told():
    assert reading.line_ends("a\nb\rc\n") is None
    told = reading.line_ends("a\r\nb\n")
    assert "Windows line ends (CRLF)" in told and "tr -d '\\r'" in told


def test_the_same_words_have_another_perplexity_with_windows_line_ends(nano):
    """What the remark is for."""
    tokenizer = Tokenizer.from_folder(NANO)
    text = (DATA / "text.txt").read_text("utf-8")
    plain, other = tokenizer.encode(text), tokenizer.encode(text.replace("\n", "\r\n"))
    assert len(other) > len(plain)
    assert ours(nano, other, "gptq", ctx=256).perplexity > 1.1 * ours(nano, plain, "gptq", ctx=256).perplexity


# --- what the configuration changes ---


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window": 64},
        {"rope_scaling": RopeScaling("linear", 4.0)},
        {"rope_scaling": RopeScaling("dynamic", 2.0), "max_position_embeddings": 100},
        {"experts_per_token": 3},
        {"experts_per_token": 1},
    ],
    ids=str,
)
def test_perplexity_of_a_changed_configuration_is_that_of_transformers(nano, ids, change):
    tensors = {slot: nano.read(slot) for slot in nano.slots()}
    changed = MemoryReader(dataclasses.replace(nano.config, **change), tensors)
    model, total, count = transformers_model(changed), 0.0, 0
    for start in range(0, len(ids) // 256 * 256, 256):
        window = torch.tensor([ids[start : start + 256]])
        total += float(F.cross_entropy(model(window).logits[0, :-1], window[0, 1:], reduction="sum"))
        count += 255
    found = ours(changed, ids, "gptq", ctx=256).perplexity
    assert found == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found != pytest.approx(ours(nano, ids, "gptq", ctx=256).perplexity, rel=1e-3)


# --- texts and options ---


def test_the_tokenizer_gives_the_ids_of_sentencepiece(ids):
    tokenizer = Tokenizer.from_folder(NANO)
    assert tokenizer.encode(reading.read_text(DATA / "text.txt"), bos=True) == ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "gptq"}, "has 1631 tokens, fewer than one window of 2048; --ctx 1631 or less"),
        ({"protocol": "llamacpp", "max_tokens": 3}, "has 3 tokens.*give a longer text"),
        ({"protocol": "hf", "max_tokens": 1}, "has 1 tokens"),
    ],
)
def test_a_text_shorter_than_a_window_says_what_would_fit(ids, options, message):
    with pytest.raises(InputError, match=message):
        perplexity.cut(ids, bos_id=BOS, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "wikitext"}, "not one of gptq, llamacpp, hf"),
        ({"protocol": "gptq", "stride": 5}, "belongs to the protocol hf"),
        ({"protocol": "gptq", "ctx": 1}, "predicts nothing"),
        ({"protocol": "hf", "ctx": 64, "stride": 65}, "take 1 to 64"),
        ({"protocol": "hf", "ctx": 64, "stride": 0}, "take 1 to 64"),
    ],
)
def test_options_that_cannot_be_are_refused(ids, options, message):
    with pytest.raises(UsageError, match=message):
        perplexity.cut(ids, bos_id=BOS, **options)


def test_files_that_are_no_text_are_named(tmp_path: Path):
    file = tmp_path / "text.txt"
    with pytest.raises(InputError, match="text.txt: cannot be read"):
        reading.read_text(file)
    file.write_bytes(b"caf\xe9 noir")
    with pytest.raises(InputError, match="not UTF-8 text: byte 3 is 0xe9"):
        reading.read_text(file)
    file.write_bytes(b" \n")
    with pytest.raises(InputError, match="holds no text"):
        reading.read_text(file)
    file.write_bytes(b"a\r\nb")
    assert reading.read_text(file) == "a\r\nb"


def test_a_model_with_nan_is_refused(nano, ids):
    tensors = {slot: nano.read(slot) for slot in nano.slots()}
    tensors[Slot(Role.O, 1)][3, 5] = math.nan
    with pytest.raises(TensorError, match="gives nan from prediction 0 of"):
        ours(MemoryReader(nano.config, tensors), ids, "gptq", ctx=64)


@pytest.mark.parametrize(("protocol", "least"), [("gptq", 2), ("llamacpp", 4), ("hf", 2)])
def test_the_shortest_window_that_predicts(protocol, least):
    found = perplexity.cut(range(3, 13), protocol, bos_id=1, ctx=least)
    assert min(found.counts()) >= 1
    for ctx in range(least):
        with pytest.raises(UsageError, match="predicts nothing"):
            perplexity.cut(range(3, 13), protocol, bos_id=1, ctx=ctx)
