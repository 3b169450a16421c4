"Published records are read as their own packages read them, and hostile ones do nothing."
import builtins
import copyreg
import functools
import io
import os
import pickle
import pickletools
import struct
import subprocess

import numpy as np
import pytest
import safetensors.numpy

from rsir_nb.core import CorruptError, RsirError, UnsafeFileError
from rsir_nb.data.encoder import dump_v1_record
from rsir_nb.data.records import (BAND_CLASSES, NUMPY_NAMES, PATCH_CLASSES, load_tuple_record,
                                  load_v1_record, load_v2_record)
from rsir_nb.data.lmdb import LmdbReader

RNG = np.random.default_rng(0)
BANDS = {"VH": RNG.normal(-18, 3, (120, 120)).astype("float32"),
         "VV": RNG.normal(-12, 3, (120, 120)).astype("float32"),
         **{f"B{n}": RNG.integers(0, 4000, (s, s), dtype="uint16")
            for n, s in dict(zip("01 02 03 04 05 06 07 08 8A 09 11 12".split(),
                                 [20, 120, 120, 120, 60, 60, 60, 120, 60, 20, 60, 60], strict=True)).items()}}
RECORD = dump_v1_record(BANDS, ["Pastures", "Sea and ocean"], ["Pastures", "Marine waters"])


class Stub:
    def __setstate__(self, state): self.state = state


class Reference(pickle.Unpickler):
    "Python's own machine, for trusted files: the published classes become stubs, numpy is numpy."
    def find_class(self, module, name):
        return super().find_class(module, name) if module.startswith("numpy") else type(name, (Stub,), {})


def reference(value):
    state = Reference(io.BytesIO(value)).load().state
    bands = {k: v.state["__dict__"]["data"] for part in ("s1_patch", "s2_patch")
             for k, v in state[part].state.items() if k.startswith("band") and k != "bands"}
    return bands, state["labels"], state["new_labels"]


def check(value):
    mine = load_v1_record(value)
    bands, labels, new_labels = reference(value)
    assert (mine["labels"], mine["new_labels"]) == (labels, new_labels)
    assert len(bands) == len(mine["bands"]) == 14
    for key, x in bands.items():
        name = key.removeprefix("band")
        got = mine["bands"]["B" + name if name[0].isdigit() else name]
        assert got.dtype == x.dtype and got.flags.owndata and got.flags.writeable
        np.testing.assert_array_equal(got, x)


def test_the_ten_names():
    assert len(PATCH_CLASSES | BAND_CLASSES) == 7 and len(NUMPY_NAMES) == 4   # one of numpy's three has two spellings


def test_made_record_is_read_by_pickle_itself(): check(RECORD)


def test_real_v1_records(shared):
    reader = LmdbReader(shared / "data/configilm_ben_lmdb/BENv1/BigEarthNetEncoded.lmdb")
    assert len(reader) == 30
    for key in reader.keys(): check(reader.get(key))


def test_real_v1_records_of_numpy_2(shared):
    reader = LmdbReader(shared / "data/configilm_ben_lmdb/BENv1/BigEarthNetEncoded.lmdb")
    value = reader.get(reader.keys()[0])
    old, new = b"\x8c\x15numpy.core.multiarray", b"\x8c\x16numpy._core.multiarray"
    assert value.count(old) == 1
    load_v1_record(value.replace(old, new))   # frames are longer than they say, which no reader minds
    with pytest.raises(UnsafeFileError, match="numpy.eore.multiarray"):
        load_v1_record(value.replace(old, b"\x8c\x15numpy.eore.multiarray"))


def test_real_v2_records(shared):
    reader = LmdbReader(shared / "data/configilm_ben_lmdb/BENv2/BigEarthNet-V2-LMDB")
    sizes = set()
    for key in reader.keys():
        record = reader.use(key, load_v2_record)
        want = safetensors.numpy.load(reader.get(key))
        assert record.keys() == want.keys()
        for name, x in want.items(): np.testing.assert_array_equal(record[name], x)
        sizes.add(len(record))
    assert sizes == {2, 12}


def test_tuple_records():
    s2 = [RNG.normal(size=(n, s, s)).astype("float32") for n, s in ((4, 120), (6, 60), (2, 20))]
    labels = np.eye(19)[3]
    for protocol in (3, 4):
        record = load_tuple_record(pickle.dumps((*s2, labels), protocol))
        assert list(record["bands"]) == ["B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12",
                                         "B01", "B09"]
        np.testing.assert_array_equal(record["bands"]["B8A"], s2[1][3])
        np.testing.assert_array_equal(record["labels"], labels)
    for bad in ((1, 2), [s2[0]], (s2[0], s2[0], labels), {"a": 1}, "text"):
        with pytest.raises(CorruptError): load_tuple_record(pickle.dumps(bad))


@pytest.mark.parametrize("dtype", ["<f4", ">f4", ">u2", "<i8", "|u1", "?", "<f2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_number_types_and_orders(dtype, order):
    x = np.asfortranarray(RNG.integers(0, 2, (1, 5, 7))) if order == "F" else RNG.integers(0, 2, (1, 5, 7))
    x = x.astype(dtype, order="K")
    y = np.asarray(x[:, ::-1])
    got = load_tuple_record(pickle.dumps((x, y, np.zeros(19)), 4))["bands"]
    np.testing.assert_array_equal(got["VV"], x[0])
    np.testing.assert_array_equal(got["VH"], y[0])
    assert got["VV"].dtype.isnative


class Calls:
    "Pickles as a call of `func` with `args`; `state` is set afterwards."
    def __init__(self, func, *args, state=None): self.reduced = (func, args) + (() if state is None else (state,))
    def __reduce__(self): return self.reduced


def object_array(*items):
    out = np.empty(len(items), object)
    out[:] = items
    return out


def spliced(instructions):
    "The made record with `instructions` pushed where its labels are."
    marker = b"X\x06\x00\x00\x00labels"
    head, tail = RECORD.split(marker, 1)
    return head + marker + instructions + tail[tail.index(b"X\x0a\x00\x00\x00new_labels"):]


STACK = lambda module, name: b"\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + \
    name.encode() + b"\x93"
MINE = STACK("bigearthnet_patch_interface.band_interface", "BenS1_Band")
RECONSTRUCT, NDARRAY = STACK("numpy.core.multiarray", "_reconstruct"), STACK("numpy", "ndarray")
DTYPE = STACK("numpy", "dtype")
SENTINEL = "rsir_hostile_sentinel"
TOUCH = f"touch {SENTINEL}"

WRITTEN_BY_PICKLE = {
    "os.system": Calls(os.system, TOUCH),
    "eval": Calls(eval, f"open('{SENTINEL}', 'w')"),
    "exec": Calls(exec, f"open('{SENTINEL}', 'w')"),
    "getattr": Calls(getattr, "", "join"),
    "import": Calls(builtins.__import__, "antigravity"),
    "popen": Calls(subprocess.Popen, ["touch", SENTINEL]),
    "open": Calls(open, SENTINEL, "w"),
    "partial": functools.partial(os.system, TOUCH),
    "in a list": [1, [2, (Calls(os.system, TOUCH),)]],
    "as a key": {Calls(os.getpid): 1},
    "object array": object_array(Calls(os.system, TOUCH)),
    "object array in a patch's place": (object_array(1), object_array(2), np.zeros(19)),
    "numpy scalar": np.float64(1),
    "object scalar": Calls(np._core.multiarray.scalar, np.dtype("O"), b"x"),
    "structured array": np.zeros(3, dtype=[("a", "f4"), ("b", "O")]),
    "structured numbers": np.zeros(3, dtype=[("a", "f4")]),
    "text array": np.array(["a", "b"]),
    "dates": np.array(["2017-07-17"], dtype="M8[D]"),
    "copyreg": Calls(copyreg._reconstructor, Stub, object, None),
    "newobj_ex": Calls(copyreg.__newobj_ex__, Stub, (), {}),
    "memmap": Calls(np.memmap, SENTINEL, "u1", "w+", 0, (1 << 20,)),
    "npz": Calls(np.load, SENTINEL, None, True),
    "protocol 5 buffer": Calls(np._core.numeric._frombuffer, b"abcd", np.dtype("u1"), (4,), "C"),
    "a subclass of ndarray": np.matrix([[1.0]]),
    "masked array": np.ma.zeros(3),
}
WRITTEN_BY_HAND = {
    "INST": b"(S'" + TOUCH.encode() + b"'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'" + TOUCH.encode() + b"'\no.",
    "GLOBAL, protocol 0": b"cos\nsystem\n(S'" + TOUCH.encode() + b"'\ntR.",
    "dotted name": b"\x80\x04" + STACK("numpy", "ndarray.__class__") + b".",
    "attribute of an allowed module": b"\x80\x04" + STACK("numpy", "load") + b".",
    "module of an allowed name": b"\x80\x04" + STACK("bigearthnet_patch_interface", "os.system") + b".",
    "look-alike": b"\x80\x04" + STACK("bigearthnet_patch_interface.band_interface", "BenS1_Band.__init__") + b".",
    "a call of a patch class": spliced(MINE + b")R"),
    "a call of a patch class with arguments": spliced(MINE + b"\x8c\x01a\x85R"),
    "an instance with arguments": spliced(MINE + b"\x8c\x01a\x85\x81"),
    "an instance of ndarray": spliced(NDARRAY + b")\x81"),
    "an instance of dtype": spliced(DTYPE + b"\x8c\x01O\x85\x81"),
    "a call of ndarray": spliced(NDARRAY + b"J\xff\xff\xff\x7f\x85R"),
    "a call of a text": spliced(b"\x8c\x01a)R"),
    "state of a class": spliced(MINE + b"}b"),
    "state of a function": spliced(RECONSTRUCT + b"}\x8c\x0c__defaults__)sb"),
    "slot state of a function": spliced(RECONSTRUCT + b"N}\x8c\x0c__defaults__)s\x86b"),
    "slot state of an object": spliced(MINE + b")\x81N}\x8c\x09__class__\x8c\x01as\x86b"),
    "__setstate__ within a state": spliced(MINE + b")\x81}\x8c\x0c__setstate__" + MINE + b"sb") ,
    "state of a list": spliced(b"]}b"),
    "state of a dict": spliced(b"}}b"),
    "state twice": spliced(MINE + b")\x81}b}b"),
    "reconstruct of another type": spliced(RECONSTRUCT + MINE + b"K\x00\x85C\x01b\x87R"),
    "reconstruct of a huge shape": spliced(RECONSTRUCT + NDARRAY + b"J\xff\xff\xff\x7f\x85C\x01b\x87R"),
    "dtype of a dtype": spliced(DTYPE + DTYPE + b"\x8c\x02f4\x89\x88\x87R\x89\x88\x87R"),
    "dtype of a list": spliced(DTYPE + b"]\x89\x88\x87R"),
    "dtype with fields": spliced(DTYPE + b"\x8c\x02f4\x89\x88\x87R(K\x03\x8c\x01<N}}J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"),
    "array of a list": spliced(RECONSTRUCT + NDARRAY + b"K\x00\x85C\x01b\x87R(K\x01K\x01\x85" + DTYPE +
                               b"\x8c\x02f4\x89\x88\x87R\x89]tb"),
    "persistent id": b"\x80\x04\x8c\x01aQ.",
    "extension registry": b"\x80\x04\x82\x01.",
    "extension registry, 4 bytes": b"\x80\x04\x84\x01\x00\x00\x00.",
    "next buffer": b"\x80\x05\x97.",
    "huge memo": b"\x80\x04Nr\xff\xff\xff\x7f.",
    "huge memo, text": b"\x80\x04Np2147483647\n.",
    "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"abc.",
    "huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"abc.",
    "huge text": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"abc.",
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
    "huge number": b"\x80\x04\x8b" + struct.pack("<I", 1 << 24) + bytes(1 << 24) + b".",
    "text number": b"I" + b"9" * 100_000 + b"\n.",
    "deep nesting": b"\x80\x04" + b"(" * 1_000_000 + b"t" * 1_000_000 + b".",
    "billion laughs as a key": b"\x80\x04}" + b")" + b"\x94h\x00\x86" * 0 + b"K\x01\x85\x94" +
                               b"".join(b"h%c\x86\x94" % i for i in range(60)) + b"Ns.",
    "billion laughs called": b"\x80\x04" + DTYPE + b"K\x01\x85\x94" + b"".join(b"h%c\x86\x94" % i for i in range(60))
                             + b"h\x00\x87R.",
    "itself in itself": b"\x80\x04" + STACK("bigearthnet_patch_interface.merged_interface",
                                            "BigEarthNet_S1_S2_Patch") + b")\x81\x94}\x8c\x08s1_patchh\x00sb.",
    "a list in itself": b"\x80\x04]\x94h\x00a.",
    "empty": b"", "stop": b".", "nothing": b"\x80\x04.", "two values": b"\x80\x04NN.", "garbage": bytes(range(256)),
    "no protocol known": b"\x80\x09N.", "more after the end": RECORD + b"N.",
    "pop of nothing": b"\x80\x040.", "mark without an end": b"\x80\x04(N.", "tuple without a mark": b"\x80\x04t.",
}
CASES = {**{f"pickle: {k}": pickle.dumps(v, 4) for k, v in WRITTEN_BY_PICKLE.items()}, **WRITTEN_BY_HAND}
NAMED = {"pickle: os.system": "system", "pickle: eval": "builtins.eval", "pickle: exec": "builtins.exec",
         "pickle: popen": "subprocess.Popen", "pickle: partial": "functools.partial", "INST": "os.system",
         "pickle: copyreg": "copyreg._reconstructor", "OBJ": "os.system", "GLOBAL, protocol 0": "os.system",
         "pickle: numpy scalar": r"multiarray\.scalar", "dotted name": "numpy.ndarray.__class__",
         "pickle: object array": "numpy.dtype of 'O8'", "attribute of an allowed module": "numpy.load"}


@pytest.mark.parametrize("load", [load_v1_record, load_tuple_record], ids=["v1", "tuple"])
@pytest.mark.parametrize("case", CASES)
def test_hostile_records_are_refused(case, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UnsafeFileError, CorruptError)) as caught: load(CASES[case], "patch_7")
    assert "patch_7" in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert not os.listdir(tmp_path), "something ran"
    if case in NAMED:
        assert isinstance(caught.value, UnsafeFileError)
        pytest.raises(UnsafeFileError, load, CASES[case]).match(NAMED[case])


def test_no_memory_is_asked_for():
    import resource
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case, value in CASES.items():
        if case.startswith("huge"): pytest.raises(RsirError, load_v1_record, value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kB"


def test_the_refusal_does_not_import():
    import sys
    value = b"\x80\x04" + STACK("this", "s") + b"."
    pytest.raises(UnsafeFileError, load_v1_record, value).match("this.s")
    assert "this" not in sys.modules


def test_cut_records_are_damaged():
    for end in [*range(0, 400), *range(400, len(RECORD), 9973), len(RECORD) - 1]:
        pytest.raises((CorruptError, UnsafeFileError), load_v1_record, RECORD[:end])


def test_cut_real_records_are_damaged_not_unsafe(shared):
    reader = LmdbReader(shared / "data/configilm_ben_lmdb/BENv1/BigEarthNetEncoded.lmdb")
    value = reader.get(reader.keys()[0])
    for end in [420, 500, 58_000, 116_000, len(value) - 1]: pytest.raises(CorruptError, load_v1_record, value[:end])


def test_changed_instructions_never_surprise():
    "Any change of the bytes between the pixels gives a record, or one of the two errors."
    payload = {pos + k for op, arg, pos in pickletools.genops(RECORD) if isinstance(arg, bytes) and len(arg) > 1000
               for k in range(5, 5 + len(arg))}
    places = np.array([i for i in range(len(RECORD)) if i not in payload])
    rng = np.random.default_rng(1)
    for _ in range(1500):
        value = bytearray(RECORD)
        for i in rng.choice(places, rng.integers(1, 4)): value[i] = rng.integers(256)
        try: load_v1_record(bytes(value))
        except (CorruptError, UnsafeFileError): continue


def test_damaged_v2_records():
    value = safetensors.numpy.save(BANDS)
    load_v2_record(value)
    for end in (0, 5, 8, 100, len(value) - 1): pytest.raises(CorruptError, load_v2_record, value[:end])
    pytest.raises(CorruptError, load_v2_record, struct.pack("<Q", 1 << 60) + value[8:])
    pytest.raises(CorruptError, load_v2_record, pickle.dumps(Calls(os.system, TOUCH)))
