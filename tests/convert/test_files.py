"""What a file holds = what the library that made it reads from it, bit for bit, and no file runs code.

Each docstring names the line of `convert/files.py` or `convert/pickled.py` whose deletion breaks the test."""

import collections
import dataclasses
import io
import json
import os
import pickle
import re
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mtp_jax.convert.files import DTYPES, INDEX, PAGE, SINGLE, Entry, open_directory, open_file, write, write_file
from mtp_jax.errors import UserError

SHAPES = ((), (1,), (7,), (3, 5), (2, 3, 4), (0,), (0, 4), (5, 0, 2))
LENGTH = 8
"""Bytes before the header."""


def values(dtype, shape, seed=0):
    """Random bits of a dtype, nan and all; a bool has two values."""
    dtype, size = np.dtype(dtype), int(np.prod(shape, dtype=int))
    raw = np.random.default_rng(seed).integers(0, 2 if dtype.kind == "b" else 256, size * dtype.itemsize, np.uint8)
    return raw.view(dtype).reshape(shape)


def bits(array):
    """dtype, shape and bytes, in which nan equals itself."""
    array = np.asarray(array)
    return array.dtype, array.shape, array.tobytes()


def every_kind():
    return {f"{name}.{i}": values(dtype, shape, i) for name, dtype in DTYPES.items() for i, shape in enumerate(SHAPES)}


def entries(arrays):
    return [Entry(name, one.shape, one.dtype, lambda one=one: one) for name, one in arrays.items()]


def message(call, *args, **kwargs):
    """The one line that a call is refused with."""
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def raw_file(path, header, data=b""):
    """A safetensors file with this header, which may be anything."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(LENGTH, "little") + text + data)
    return path


# Safetensors, read.


def test_every_dtype_and_shape_reads_as_safetensors_reads_it(tmp_path):
    """open_file(f)[n] = safetensors.load_file(f)[n], bitwise. Breaks if a line of DTYPES goes, if `8 + length` is left
    out of the start, or `.reshape(shape)` of the array."""
    save_file(every_kind(), tmp_path / "all.safetensors")
    expected = load_file(tmp_path / "all.safetensors")
    read = open_file(tmp_path / "all.safetensors")
    assert len(expected) == len(DTYPES) * len(SHAPES)
    assert {name: bits(tensor.array) for name, tensor in read.items()} == {n: bits(a) for n, a in expected.items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in read.items()} == {
        name: (array.shape, array.dtype) for name, array in expected.items()
    }


def test_a_released_tensor_reads_the_same_again(tmp_path):
    """array after release() = array before, in full and its neighbours. Breaks if `release` closes the map, or the file
    is mapped copy-on-write and written to."""
    arrays = {name: values(np.float32, (PAGE // 2 + 3,), seed) for seed, name in enumerate("abc")}
    save_file(arrays, tmp_path / "x.safetensors")
    read = open_file(tmp_path / "x.safetensors")
    for _ in range(2):
        for name, tensor in read.items():
            assert bits(tensor.array) == bits(arrays[name])
            tensor.release()
    assert not any(tensor.array.flags.writeable for tensor in read.values())


def test_release_gives_back_the_whole_pages_of_the_tensor_and_no_others(tmp_path):
    """The advised range = the pages that lie wholly inside [start, start + nbytes). Breaks if `first` rounds down."""

    class Mapped:
        def madvise(self, _, start, length):
            advised.append((start, start + length))

    save_file({"a": values(np.uint8, (5,)), "b": values(np.uint8, (3 * PAGE,))}, tmp_path / "x.safetensors")
    for tensor in open_file(tmp_path / "x.safetensors").values():
        advised = []
        dataclasses.replace(tensor, mapped=Mapped()).release()
        pages = range(0, tensor.start + tensor.array.nbytes + PAGE, PAGE)
        inside = [p for p in pages if tensor.start <= p and p + PAGE <= tensor.start + tensor.array.nbytes]
        assert advised == ([(inside[0], inside[-1] + PAGE)] if inside else [])


# Safetensors, written.


def test_a_written_file_reads_back_in_safetensors(tmp_path):
    """safetensors.load_file(write_file(x)) = x, bitwise, and every tensor starts at a multiple of its item size. Breaks
    if `-entry.dtype.itemsize` goes from the sort, or the padding of the header."""
    arrays = every_kind() | {"strided": values(np.float32, (4, 6)).T, "stepped": values(np.int16, (9,))[::2]}
    write_file(tmp_path / SINGLE, entries(arrays))
    read = load_file(tmp_path / SINGLE)
    assert {name: bits(one) for name, one in read.items()} == {name: bits(one) for name, one in arrays.items()}
    for tensor in open_file(tmp_path / SINGLE).values():
        assert tensor.start % tensor.dtype.itemsize == 0, tensor.name
    with safe_open(tmp_path / SINGLE, "np") as opened:
        assert opened.metadata() == {"format": "pt"}  # transformers refuses files without it


@pytest.mark.parametrize("shard_bytes", [1, 40, 100, 10**9])
def test_shards_hold_every_tensor_once_and_as_many_bytes_as_they_may(tmp_path, shard_bytes):
    """Union of shards = x; a shard is at most shard_bytes unless one tensor alone is more; weight_map names the shard
    of each; total_size = sum of bytes. Breaks if `shards[-1] and` goes, or `total +=` counts the last shard only."""
    arrays = {f"t{i}": values(np.float32, (size,), i) for i, size in enumerate([3, 10, 1, 60, 2, 2, 2, 25])}
    write(tmp_path, entries(arrays), shard_bytes)
    files = sorted(tmp_path.glob("*.safetensors"))
    read = {path.name: load_file(path) for path in files}
    together = [(name, bits(one)) for shard in read.values() for name, one in shard.items()]
    assert sorted(together) == sorted((name, bits(one)) for name, one in arrays.items())
    for shard in read.values():
        assert len(shard) == 1 or 0 < sum(one.nbytes for one in shard.values()) <= shard_bytes
    if len(files) == 1:
        assert [path.name for path in tmp_path.iterdir()] == [SINGLE]
    else:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["weight_map"] == {name: file for file, shard in read.items() for name in shard}
        assert index["metadata"]["total_size"] == sum(one.nbytes for one in arrays.values())
        assert list(read) == [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
    again = open_directory(tmp_path)
    assert {name: bits(tensor.array) for name, tensor in again.items()} == {n: bits(a) for n, a in arrays.items()}


def test_a_tensor_of_another_shape_than_announced_is_not_written(tmp_path):
    """A wrong shape would shift what follows. Breaks if the check of `value.shape` goes."""
    with pytest.raises(ValueError, match=r"t was made with shape \(3,\), not \(2,\)"):
        write_file(tmp_path / SINGLE, [Entry("t", (2,), np.dtype(np.int8), lambda: np.zeros(3, np.int8))])


# Damaged safetensors.

GOOD = {"a": values(np.float32, (2, 3)), "b": values(np.int64, ()), "c": values(np.float16, (0, 3))}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a whole file, and a path to write others to."""
    path = tmp_path_factory.mktemp("good") / "x.safetensors"
    save_file(GOOD, path)
    return path.read_bytes(), path


def test_every_truncation_is_refused(good):
    """A file cut anywhere, header or data, never opens. Breaks if `8 + length > size` or `8 + length + last > size`
    goes."""
    whole, path = good
    for size in range(len(whole)):
        path.unlink()
        path.write_bytes(whole[:size])
        assert str(path) in message(open_file, path)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_byte_of_the_header_never_ends_in_a_traceback(good, data):
    """UserError, or arrays that can be read. Breaks if a check of `_header` goes: of types, of signs, of ranges."""
    whole, path = good
    length = int.from_bytes(whole[:LENGTH], "little")
    place = data.draw(st.integers(0, LENGTH + length - 1))
    changed = bytearray(whole)
    changed[place] = data.draw(st.one_of(st.integers(0, 255), st.sampled_from(b'-.0123456789,:[]{}"eE')))
    path.unlink()
    path.write_bytes(changed)
    try:
        for tensor in open_file(path).values():
            bits(tensor.array)
            tensor.release()
    except UserError as error:
        assert str(path) in str(error)


PLACE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"{no JSON", "its header is not JSON"),
        (b"\xff\xfe", "its header is not JSON"),
        (b"[" * 100_000, "its header is not JSON"),
        (b"[1]", "its header is not a JSON object"),
        (b"null", "its header is not a JSON object"),
        ({"t": 3}, "t lacks a valid dtype, shape or data_offsets"),
        ({"t": {"dtype": "F32", "shape": [2]}}, "t lacks a valid dtype, shape or data_offsets"),
        ({"t": PLACE | {"data_offsets": [0, 4, 8]}}, "t lacks a valid dtype, shape or data_offsets"),
        ({"t": PLACE | {"data_offsets": ["0", "8"]}}, "t lacks a valid dtype, shape or data_offsets"),
        ({"t": PLACE | {"data_offsets": [0, 8.0]}}, "t lacks a valid dtype, shape or data_offsets"),
        ({"t": PLACE | {"shape": [2.0]}}, "t lacks a valid dtype, shape or data_offsets"),
        ({"t": PLACE | {"shape": [-2, -1]}}, "t lacks a valid dtype, shape or data_offsets"),
        ({"t": PLACE | {"shape": [True, 2]}}, "t lacks a valid dtype, shape or data_offsets"),
        ({"t": PLACE | {"dtype": ["F32"]}}, "dtype ['F32'], which we do not read"),
        (
            {"t": PLACE | {"dtype": "F8_E4M3"}},
            "dtype F8_E4M3, which we do not read; give the checkpoint before quantisation",
        ),
        ({"t": PLACE | {"data_offsets": [0, 12]}}, "bytes 0 to 12 for F32[2]"),
        ({"t": PLACE | {"data_offsets": [8, 0]}}, "bytes 8 to 0 for F32[2]"),
        ({"t": PLACE | {"data_offsets": [-8, 0]}}, "bytes -8 to 0 for F32[2]"),
        ({"t": PLACE | {"data_offsets": [60, 68]}}, "cut off inside t"),
        ({"t": {"dtype": "F32", "shape": [2**70], "data_offsets": [0, 2**72]}}, "cut off inside t"),
        ({"t": {"dtype": "F32", "shape": [0, 2**70], "data_offsets": [0, 0]}}, f"the shape [0, {2**70}]"),
        ({"t": {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]}}, "the shape [1, 1, "),
        ({"t": PLACE, "u": PLACE | {"data_offsets": [4, 12]}}, "t and u in "),
        (b'{"t":' + json.dumps(PLACE).encode() + b',"t":' + json.dumps(PLACE).encode() + b"}", "holds t twice"),
    ],
)
def test_a_header_that_cannot_be_is_refused(tmp_path, header, says):
    """One line with the file and what is wrong. Each breaks if its check in `_header`, `_once` or `open_file` goes."""
    said = message(open_file, raw_file(tmp_path / "x.safetensors", header, b"\0" * 64))
    assert says in said
    assert str(tmp_path / "x.safetensors") in said


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 73])
def test_a_header_longer_than_the_file_is_refused(tmp_path, length):
    """length > size - 8 is refused before it is read. Breaks if `8 + length > size` goes."""
    (tmp_path / "x.safetensors").write_bytes(length.to_bytes(LENGTH, "little") + b" " * 72)
    assert "80 bytes are too few for its header; fetch it again" in message(open_file, tmp_path / "x.safetensors")


def test_tensors_without_bytes_may_lie_anywhere(tmp_path):
    """Empty tensors overlap nothing. Breaks if `if last > first` goes from the list of taken bytes."""
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}
    read = open_file(raw_file(tmp_path / "x.safetensors", {"e": empty, "f": empty, "t": PLACE}, b"\0" * 8))
    assert {name: tensor.shape for name, tensor in read.items()} == {"e": (0,), "f": (0,), "t": (2,)}


# Torch files.


def torch_tensors():
    """Several dtypes, and three views of one storage at offsets."""
    shared = torch.arange(24, dtype=torch.float32)
    kinds = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    each = {kind: torch.arange(6).reshape(2, 3).to(getattr(torch, kind)) for kind in kinds}
    views = {"head": shared[:4], "middle": shared[5:11].view(2, 3), "tail": shared[23], "none": torch.zeros(0, 3)}
    return each | views


def as_numpy(tensor):
    wide = tensor.dtype == torch.bfloat16
    return tensor.float().numpy().astype(ml_dtypes.bfloat16) if wide else tensor.numpy()


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_state_dict_reads_as_torch_reads_it(tmp_path, suffix, wrapped):
    """open_file(torch.save(x)) = x, bitwise, {"state_dict": x} too. Breaks if the offset is left out of the start, if
    it counts bytes in place of elements, or if `tree.get("state_dict", tree)` goes."""
    path = tmp_path / f"x{suffix}"
    ordered = collections.OrderedDict(torch_tensors())
    torch.save({"state_dict": ordered} if wrapped else ordered, path)
    loaded = torch.load(path, weights_only=True)
    expected = {name: bits(as_numpy(one)) for name, one in (loaded["state_dict"] if wrapped else loaded).items()}
    assert {name: bits(tensor.array) for name, tensor in open_file(path).items()} == expected


def test_a_module_reads_with_its_buffers(tmp_path):
    """open_file(module.state_dict()) = its parameters and buffers, whose dictionary carries metadata of its own."""
    module = torch.nn.BatchNorm1d(3)
    torch.save(module.state_dict(), tmp_path / "x.bin")
    expected = {name: bits(one.numpy()) for name, one in module.state_dict().items()}
    assert {name: bits(tensor.array) for name, tensor in open_file(tmp_path / "x.bin").items()} == expected


@pytest.mark.parametrize("view", [torch.arange(6.0).reshape(2, 3).T, torch.arange(6.0)[::2], torch.ones(1).expand(3)])
def test_a_view_with_strides_is_refused(tmp_path, view):
    """Its bytes in a row are other numbers. Breaks if the comparison of strides in `_rebuild` goes."""
    torch.save({"t": view}, tmp_path / "x.bin")
    said = message(open_file, tmp_path / "x.bin")
    assert said == f"{tmp_path / 'x.bin'} holds a tensor that is a view with strides; save it with .contiguous()"


def test_an_axis_of_length_one_may_have_any_stride(tmp_path):
    """x[:, :1] of one row is contiguous whatever its strides are. Breaks if `if size > 1` goes."""
    view = torch.arange(6.0).reshape(2, 3)[:1, :2]
    torch.save({"t": view}, tmp_path / "x.bin")
    assert bits(open_file(tmp_path / "x.bin")["t"].array) == bits(view.numpy())


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("where", ["top", "value", "nested", "beside"])
@pytest.mark.parametrize("name", ["system", "eval", "open"])
def test_code_in_a_torch_file_is_refused_by_name_and_does_not_run(tmp_path, monkeypatch, name, where, protocol):
    """A file of weights calls nothing. Breaks if the last raise of `find_class` becomes `super().find_class`."""
    monkeypatch.chdir(tmp_path)
    code, tensor = (
        {
            "system": Calls(os.system, "touch ran"),
            "eval": Calls(eval, "open('ran', 'w').close()"),
            "open": Calls(open, "ran", "w"),
        }[name],
        torch.zeros(2),
    )
    tree = {
        "top": code,
        "value": {"t": code},
        "nested": {"state_dict": {"t": tensor, "more": [{"deep": (1, code)}]}},
        "beside": {"state_dict": {"t": tensor}, "optimizer": code},
    }[where]
    torch.save(tree, "x.bin", pickle_protocol=protocol)
    said = message(open_file, tmp_path / "x.bin")
    assert re.search(rf"x\.bin would call \w+\.{name} when it is opened, which is refused", said)
    assert not (tmp_path / "ran").exists()


def pickled_zip(path, tree, members=None):
    """A zip archive as torch makes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", tree if isinstance(tree, bytes) else pickle.dumps(tree, protocol=2))
        for name, data in (members or {}).items():
            archive.writestr(f"x/data/{name}", data)
    return path


def a_tensor(shape=(2,), offset=0, key="0", name="t"):
    """What torch pickles for a float32 tensor, by its opcodes."""

    class Storage:
        def __init__(self):
            self.pid = ("storage", torch.FloatStorage, key, "cpu", 2)

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Storage(), offset, shape, (1,), False, None)

    class Pickler(pickle.Pickler):
        def persistent_id(self, one):
            return getattr(one, "pid", None) if isinstance(one, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump({name: Tensor()})
    return buffer.getvalue()


def test_the_hand_made_torch_file_is_one(tmp_path):
    """a_tensor() with its member reads as its numbers, so that the tests below fail for the reason they name."""
    data = np.array([3.0, 4.0], np.float32)
    read = open_file(pickled_zip(tmp_path / "x.bin", a_tensor(), {"0": data.tobytes()}))
    assert bits(read["t"].array) == bits(data)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (a_tensor(shape=(3,)), "is cut off inside t"),
        (a_tensor(offset=1), "is cut off inside t"),
        (a_tensor(key="1"), "is cut off inside t"),
        (a_tensor(offset=-1), "is not a torch file of tensors (a tensor at -1 "),
        (a_tensor(offset=0.5), "is not a torch file of tensors (a tensor at 0.5 "),
        (a_tensor(shape=(-2,)), "is not a torch file of tensors (a tensor at 0 with the shape (-2,)"),
        (a_tensor(shape=("a",)), "is not a torch file of tensors (a tensor at 0 with the shape ('a',)"),
        (a_tensor(shape=(1, 2)), "is not a torch file of tensors"),
        (a_tensor(name=0), "does not hold a flat dictionary of tensors; save model.state_dict()"),
        (pickle.dumps({0: 1}), "does not hold a flat dictionary of tensors; save model.state_dict()"),
        (pickle.dumps([1, 2]), "does not hold a flat dictionary of tensors; save model.state_dict()"),
        (pickle.dumps({"state_dict": {"a": 1}}), "does not hold a flat dictionary of tensors; save model.state_dict()"),
        (b"", "is not a torch file of tensors"),
        (b"\x80\x02garbage", "is not a torch file of tensors"),
    ],
)
def test_a_torch_file_that_cannot_be_is_refused(tmp_path, tensor, says):
    """A tensor lies within its own storage, at a whole place. Each breaks if its check in `read_pickled` or `_rebuild`
    goes; the storage "after" would lend its bytes to a tensor that is too long."""
    path = pickled_zip(tmp_path / "x.bin", tensor, {"0": bytes(8), "after": bytes(64)})
    said = message(open_file, path)
    assert f"{path} {says}" in said


def test_files_that_are_no_torch_zip_are_refused(tmp_path):
    """Old torch files, cut archives, compressed ones and text: one line each. Breaks if `except Exception` narrows, or
    the check of `compress_type` goes."""
    torch.save(torch_tensors(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    torch.save(torch_tensors(), tmp_path / "x.bin")
    whole = (tmp_path / "x.bin").read_bytes()
    for size in (0, 1, 7, len(whole) // 3, len(whole) - 1):
        (tmp_path / f"{size}.bin").write_bytes(whole[:size])
        assert f"{tmp_path / f'{size}.bin'} " in message(open_file, tmp_path / f"{size}.bin")
    (tmp_path / "text.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name in ("old.bin", "text.bin"):
        said = message(open_file, tmp_path / name)
        assert said.startswith(f"{tmp_path / name} is not a torch file of tensors (")
        assert said.endswith("save it with a recent torch")
    with zipfile.ZipFile(tmp_path / "packed.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}))
    assert "is a compressed archive" in message(open_file, tmp_path / "packed.bin")
