"""Our safetensors files are safetensors' own; broken ones are refused with a message."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from memdec import MemdecError
from memdec.stores.manifest import file_sha256
from memdec.stores.tensors import map_tensors, write_tensors

DTYPES = ["float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@given(
    st.dictionaries(
        st.text("abc_é", min_size=1, max_size=5),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)),
        max_size=5,
    )
)
@settings(max_examples=60, deadline=None)
def test_safetensors_reads_what_we_write_and_we_read_it_too(
    tmp_path_factory: pytest.TempPathFactory, spec: dict
) -> None:
    draw = np.random.default_rng(0)
    arrays = {name: draw.integers(0, 100, shape).astype(dtype) for name, (dtype, shape) in spec.items()}
    path = tmp_path_factory.mktemp("tensors") / "a.safetensors"
    written = write_tensors(path, arrays)
    assert written.bytes == path.stat().st_size
    assert written.sha256 == file_sha256(path)
    for found in (safetensors.numpy.load_file(path), map_tensors(path)):
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)


def test_we_read_what_safetensors_writes(tmp_path: Path) -> None:
    arrays = {"x": np.arange(12, dtype=np.float32).reshape(3, 4), "y": np.arange(3, dtype=np.int64)}
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = map_tensors(tmp_path / "a.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)


def test_writing_to_a_mapped_array_does_not_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": np.zeros(4, np.int32)})
    before = path.read_bytes()
    map_tensors(path)["x"][:] = 7
    assert path.read_bytes() == before


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": np.arange(5, dtype=np.int32), "y": np.ones((2, 3), np.float16)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(MemdecError, match="damaged"):
            map_tensors(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MemdecError, match=r"none\.safetensors is missing"):
        map_tensors(tmp_path / "none.safetensors")
