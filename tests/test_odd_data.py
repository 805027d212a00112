"""100 data files with one fault each end in one line, or give what another reader of the same bytes gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.odd_data import mutated, outcome


@pytest.mark.parametrize("first", range(0, 100, 10))
@pytest.mark.timeout(60)
def test_a_damaged_file_ends_in_one_line_or_is_read_as_another_reader_does(tmp_path: Path, first: int) -> None:
    pytest.importorskip("pyarrow")
    kinds = []
    for seed in range(first, first + 10):
        file, fault, other = mutated(tmp_path, seed)
        kind, text = outcome(file, other)
        assert kind != "wrong", f"seed {seed}, {file.name}, {fault}: {text}"
        kinds.append(kind)
    assert "refused" in kinds
