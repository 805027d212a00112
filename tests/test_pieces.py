"""A rank reads its part of each tensor from files in blocks, for all pieces, shapes and dtypes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file

from ndtrain.errors import DamagedError
from ndtrain.storage import pieces
from ndtrain.storage.pieces import pieces_in, read_held
from ndtrain.storage.table import Piece
from tests import tiny
from tests.ranks import get_pool
from tests.test_load import EP, WITH_TP, recipe_for

SHAPES = [(), (0,), (0, 3), (1,), (7,), (3, 5), (5, 1), (4, 3, 6), (2, 3, 1, 4)]


@pytest.mark.parametrize("block", [4, 8, 24, 100, 2**22])
def test_blocks_of_any_size_read_the_same_values(tmp_path: Path, block: int) -> None:
    """Each tensor is stored whole, and also in pieces that are halves along every dim."""
    tensors = {str(shape): torch.randn(shape) for shape in SHAPES}
    stored: dict[str, list[Piece]] = {}
    for key, tensor in tensors.items():
        for cut in {0, 1} if tensor.ndim else {0}:
            halves = [[(0, n)] if not cut or n == 1 else [(0, n // 2), (n // 2, n)] for n in tensor.shape]
            for i, box in enumerate(itertools.product(*halves)):
                file = tmp_path / f"{key}-{cut}-{i}.safetensors"
                save_file({key: tensor[tuple(slice(a, b) for a, b in box)].contiguous()}, file)
                piece = pieces_in(file)[key]._replace(offsets=tuple(a for a, _ in box))
                stored.setdefault(f"{key}-{cut}", []).append(piece)
    for name, found in stored.items():
        wanted = tensors[name.rpartition("-")[0]]
        with mock.patch.object(pieces, "BLOCK_BYTES", block):
            got = torch.full_like(wanted, float("nan"))
            read_held({name: got}, {name: found}, "here")
            assert torch.equal(got, wanted), (name, block)
            got = torch.full_like(wanted, float("nan"), dtype=torch.float64)
            read_held({name: got}, {name: found}, "here", as_weights=True)
            assert torch.equal(got, wanted.double()), (name, block)


def test_other_dtypes_are_cast_only_for_weights_and_only_floats(tmp_path: Path) -> None:
    saved = {
        "bf16": torch.randn(3, 4).bfloat16(),
        "f16": torch.randn(3, 4).half(),
        "f8": torch.randn(3, 4).to(torch.float8_e4m3fn),
        "i32": torch.arange(12, dtype=torch.int32).view(3, 4),
    }
    save_file(saved, tmp_path / "all.safetensors")
    stored = {key: [piece] for key, piece in pieces_in(tmp_path / "all.safetensors").items()}
    for key, tensor in saved.items():
        own = torch.zeros_like(tensor)
        read_held({key: own}, stored, "here")
        assert torch.equal(own.float(), tensor.float())
        with pytest.raises(DamagedError, match=rf"here: {key} is .* not torch\.float32"):
            read_held({key: torch.zeros(3, 4)}, stored, "here")
    for key in ("bf16", "f16"):
        got = torch.zeros(3, 4)
        read_held({key: got}, stored, "here", as_weights=True)
        assert torch.equal(got, saved[key].float())
    for key in ("f8", "i32"):
        with pytest.raises(DamagedError, match=f"here: {key} is"):
            read_held({key: torch.zeros(3, 4)}, stored, "here", as_weights=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_is_refused_in_weights_and_infinities_are_not(tmp_path: Path, dtype: torch.dtype) -> None:
    file = tmp_path / "w.safetensors"
    values = torch.zeros(64, 64, dtype=dtype)
    values[3, 3], values[60, 60] = float("inf"), -float("inf")
    save_file({"w": values}, file)
    stored, got = {"w": [pieces_in(file)["w"]]}, torch.zeros(64, 64)
    read_held({"w": got}, stored, "here", as_weights=True)
    assert torch.equal(got, values.float())
    values[63, 63] = float("nan")
    save_file({"w": values}, file)
    with (
        mock.patch.object(pieces, "BLOCK_BYTES", 1000),
        pytest.raises(DamagedError, match="here: w has NaN"),
    ):
        read_held({"w": got}, stored, "here", as_weights=True)


def _bytes_at(*spans: tuple[float, float]) -> str:
    """Return a header of byte tensors at these offsets."""
    return json.dumps(
        {str(i): {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for i, (a, b) in enumerate(spans)}
    )


DAMAGED = {
    "overlap": _bytes_at((0, 8), (4, 8)),
    "gap": _bytes_at((0, 2), (4, 8)),
    "no whole number": _bytes_at((0, 8)).replace("[0, 8]", "[0.0, 8]"),
    "backwards": _bytes_at((8, 0)).replace("U8", "F4").replace("-8", "8"),
    "nested": "[" * 100_000,
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_header_whose_tensors_overlap_or_have_gaps_is_refused(tmp_path: Path, case: str) -> None:
    file, header = tmp_path / "w.safetensors", DAMAGED[case].encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(DamagedError, match=r"w\.safetensors: damaged tensor file"):
        pieces_in(file)


def _compare_in_blocks(nbytes: int, *args: object) -> list[str]:
    from tests.test_load import _compare

    with mock.patch.multiple(pieces, BLOCK_BYTES=nbytes, _THREAD_BYTES=4 * nbytes):
        return _compare(*args)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["llama", "gpt_oss"])
def test_a_model_read_in_small_blocks_has_the_same_bits(tmp_path: Path, kind: str) -> None:
    """Slices along each dim of weights with two dims, and of experts with three, in blocks smaller than a row."""
    directory = tiny.save_model(kind, tmp_path)
    recipe = {"sharded": recipe_for(tmp_path / "r.toml", mode="sharded", name=str(directory), attn="eager")}
    name = "dp_shard2-tp2-ep4" if kind == "gpt_oss" else "dp_shard2-tp2"
    meshes = {name: (WITH_TP | EP)[name]}
    assert get_pool(4).run(_compare_in_blocks, 100, recipe, str(directory), meshes) == [[]] * 4
