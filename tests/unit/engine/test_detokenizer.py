"""Text that grows piece by piece is the text that the tokenizer gives for the whole."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dsserve.engine.detokenizer import TextStream

CORPUS = [
    "the quick brown fox — größer, größte",
    "日本語 日本 🙂🙃🎉 🙂",
    "x = [1, 2, 3]\n\tfor i in x: print(i)\n",
] * 3


def byte_level() -> PreTrainedTokenizerFast:
    """Like GPT-2's and Llama 3's: a token is a run of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def sentencepiece() -> PreTrainedTokenizerFast:
    """Like Llama 2's: words begin with U+2581, the first space is dropped, unknown characters are bytes."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghij.,", "▁ab", "▁cd"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁a", "b"), ("▁c", "d"), ("▁", "a"), ("▁", "c")]
    vocabulary |= {"▁a": len(vocabulary), "▁c": len(vocabulary) + 1}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


TOKENIZERS = {"byte_level": byte_level(), "sentencepiece": sentencepiece()}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
texts = st.text(
    alphabet=st.one_of(st.sampled_from("abcdefghij ., \n日本語🙂🎉ßü"), st.characters(codec="utf-8")), max_size=40
)


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def read(tokenizer: Any, ids: list[int], stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """All pieces, the flushed one last, and whether a stop string was found."""
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, True
    return [*pieces, stream.flush()], stream.stopped


def cut(text: str, stop: tuple[str, ...]) -> str:
    """What is left of `text`, read character by character until a stop string is complete."""
    for end in range(1, len(text) + 1):
        for one in sorted(stop, key=len, reverse=True):
            if text[:end].endswith(one):
                return text[: end - len(one)]
    return text


@each_tokenizer
@given(text=texts)
def test_pieces_join_to_the_whole_and_hold_whole_characters(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    pieces, stopped = read(tokenizer, ids)
    assert "".join(pieces) == decode(tokenizer, ids)
    assert not stopped
    assert "\ufffd" in text or all("\ufffd" not in piece for piece in pieces)


@each_tokenizer
@given(data=st.data())
def test_any_tokens_give_the_text_that_the_tokenizer_gives(tokenizer: Any, data: st.DataObject) -> None:
    """Special tokens and words in any order; bytes of broken characters are the next test's."""
    whole = [i for i in range(len(tokenizer)) if "\ufffd" not in decode(tokenizer, [i])]
    ids = data.draw(st.lists(st.sampled_from(whole), max_size=12))
    pieces, _ = read(tokenizer, ids)
    assert "".join(pieces) == decode(tokenizer, ids)


def test_a_word_after_a_special_token_keeps_its_space() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    word = tokenizer.convert_tokens_to_ids("▁ab")
    ids = [word, tokenizer.eos_token_id, tokenizer.eos_token_id, word]
    assert "".join(read(tokenizer, ids)[0]) == decode(tokenizer, ids) == "ab ab"


@each_tokenizer
@given(ids=st.data())
def test_broken_bytes_end_as_replacement_characters_and_hold_up_nothing(tokenizer: Any, ids: st.DataObject) -> None:
    continuation = tokenizer("ß")["input_ids"][-1] if tokenizer is TOKENIZERS["byte_level"] else 2 + 0x9F
    broken = [continuation] * ids.draw(st.integers(1, 40))
    after = tokenizer("ab ab")["input_ids"]
    pieces, _ = read(tokenizer, [*broken, *after])
    text = "".join(pieces)
    assert text.lstrip("\ufffd").strip() == "ab ab"
    assert text.startswith("\ufffd")


@each_tokenizer
def test_a_character_of_several_tokens_comes_with_its_last_one(tokenizer: Any) -> None:
    ids = tokenizer("a𝄞b")["input_ids"]
    pieces, _ = read(tokenizer, ids)
    assert "𝄞" in pieces
    assert len([piece for piece in pieces if piece]) == 3


@each_tokenizer
@given(text=texts, data=st.data())
def test_stop_strings_are_cut_wherever_tokens_end(tokenizer: Any, text: str, data: st.DataObject) -> None:
    ids = tokenizer(text)["input_ids"]
    whole = decode(tokenizer, ids)
    starts = st.integers(0, max(0, len(whole) - 1))
    inside = st.tuples(starts, st.integers(1, 5)).map(lambda at: whole[at[0] : at[0] + at[1]]).filter(bool)
    choices = st.one_of(inside, st.text("abc ", min_size=1, max_size=4)) if whole else st.text("ab", min_size=1)
    stop = tuple(data.draw(st.lists(choices, min_size=1, max_size=4)))
    pieces, stopped = read(tokenizer, ids, stop)
    assert "".join(pieces) == cut(whole, stop)
    assert stopped == any(one in whole for one in stop)


def test_the_beginning_of_a_stop_string_is_held_until_it_is_none() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    stream = TextStream(tokenizer, ("XYZ",))
    sent = [stream.push(token) for token in tokenizer("aXYbXY")["input_ids"]]
    assert "".join(sent) == "aXYb"
    assert stream.flush() == "XY"


@each_tokenizer
def test_thousands_of_special_tokens_cost_no_more_than_one(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ignore_eos and a bias a client gets nothing else, and every stream waits for the text of this one."""
    word, lengths = tokenizer("ab")["input_ids"], list[int]()
    ids = [*word, *[tokenizer.eos_token_id] * 3000, *tokenizer(" ab")["input_ids"][-len(word) :]]
    original = type(tokenizer).decode

    def count(self: Any, tokens: list[int], **options: Any) -> str:
        lengths.append(len(tokens))
        return original(self, tokens, **options)

    monkeypatch.setattr(type(tokenizer), "decode", count)
    pieces, _ = read(tokenizer, ids)
    assert max(lengths) < 50
    assert "".join(pieces) == original(tokenizer, ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("count", [10, 1000])
def test_a_token_costs_the_same_early_and_late(count: int) -> None:
    """The window that is decoded stays short: nothing is decoded from the beginning again."""
    lengths = []

    class Counting:
        def decode(self, ids: list[int], **_: Any) -> str:
            lengths.append(len(ids))
            return "x" * len(ids)

    read(Counting(), list(range(count)))
    assert max(lengths) <= 2


@each_tokenizer
@given(st.data())
def test_many_tokens_at_once_give_the_text_of_each_alone(tokenizer: Any, data: st.DataObject) -> None:
    ids = tokenizer.encode(data.draw(texts), add_special_tokens=False)
    ids += data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12))
    one, many, at = TextStream(tokenizer), TextStream(tokenizer), 0
    while at < len(ids):
        part = ids[at : at + data.draw(st.integers(1, 20))]
        at += len(part)
        assert many.extend(part) == "".join(map(one.push, part))
    assert many.flush() == one.flush()
