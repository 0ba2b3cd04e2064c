"""A short search of each kind with fixed inputs; ``python -m tests.hostile.fuzz_index`` searches on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hostile.fuzz_index import KINDS, search


@pytest.mark.parametrize("kind", KINDS)
def test_no_input_breaks_the_index(kind: str, tmp_path: Path) -> None:
    outcomes = search(kind, tmp_path, 200)
    assert outcomes[True] >= 10, "what is accepted is checked too"
    assert outcomes[False] >= 10
