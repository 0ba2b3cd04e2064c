"""Prompts -> tokens. Oracle: figures. What the encoder makes of them is compared in tests/parity."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from ltx_sp.demo import write_demo
from ltx_sp.encode import tokenize
from ltx_sp.errors import WeightsError
from ltx_sp.model.upstream import load_tokenizer

BOS, FIRST_BYTE = 2, 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("demo") / "demo"
    write_demo(folder)
    return load_tokenizer(folder / "gemma")


def test_prompts_are_stripped_started_and_padded_on_the_left(tokenizer: Any) -> None:
    ids, mask = tokenize("  a\tb \n", tokenizer)
    expected = [BOS, *(FIRST_BYTE + byte for byte in b"a\tb")]
    assert ids.shape == mask.shape == (1, 1024)
    assert ids[0, -4:].tolist() == expected
    assert not ids[0, :-4].any()
    assert mask[0].tolist() == [0] * 1020 + [1] * 4


def test_an_empty_prompt_is_a_bos(tokenizer: Any) -> None:
    ids, mask = tokenize("", tokenizer)
    assert ids[0, -2:].tolist() == [0, BOS]
    assert int(mask.sum()) == 1


def test_bos_is_added_where_the_tokenizer_adds_none() -> None:
    class Bare:
        bos_token_id, pad_token_id = 5, 0

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [7] * len(text)}

    assert tokenize("abc", Bare())[0][0, -5:].tolist() == [0, 5, 7, 7, 7]


def test_a_prompt_that_just_fits_is_not_cut(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    ids, mask = tokenize("x" * 1023, tokenizer)
    assert bool(mask.all())
    assert ids[0, 0] == BOS
    assert not caplog.records


def test_what_does_not_fit_is_cut_at_the_end_and_told(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ids, mask = tokenize("x" * 1020 + "yyyyy", tokenizer)
    assert bool(mask.all())
    assert ids[0, 0] == BOS
    assert (ids[0, -3:] == FIRST_BYTE + ord("y")).all()
    assert torch.count_nonzero(ids == FIRST_BYTE + ord("y")) == 3
    assert [record.getMessage() for record in caplog.records] == [
        "The prompt has 1026 tokens; the text encoder takes 1024: the last 2 are cut."
    ]


def test_a_tokenizer_without_bos_or_pad_is_refused() -> None:
    class Bare:
        bos_token_id, pad_token_id = None, 0

    with pytest.raises(WeightsError, match="no <bos>"):
        tokenize("abc", Bare())
