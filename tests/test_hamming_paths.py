"Every loop of the Hamming scan that this machine can run, against brute force; the other ones as assembly."
import re

import numpy as np
import pytest
from llvmlite import binding, ir
from rsir_nb import machine
from rsir_nb.core import InputError
from rsir_nb.machine import CPU_PATHS, cpu_features, cpu_paths
from rsir_nb.retrieval.codes import hamming_distances
from rsir_nb.retrieval.hamming import HammingIndex

LENGTHS = [*range(8, 257, 8), 264, 512, 520, 2048]  # of 4, 5, 8, 9 and 32 words: all ways to add up


def cases():
    "Codes of more than 31 words differ only where bytes are added up."
    return [(p, n) for n in sorted({-(-o//64) for o in LENGTHS}) for p in cpu_paths() if n < 32 or p in ("avx2", "neon")]


@pytest.mark.parametrize("path, n_words", cases())
def test_every_length_on_every_path(path, n_words):
    "Few different codes, so nearly every result is a tie; the query's complement has the largest distance."
    rng = np.random.default_rng(n_words)
    for n_bits in (n for n in LENGTHS if -(-n//64) == n_words):
        codes = rng.integers(0, 256, (60, n_bits//8), dtype=np.uint8)[rng.integers(0, 60, 4500)]
        codes[1::3] ^= np.packbits(rng.random((1500, n_bits)) < 0.1, axis=1)
        codes[[2, 700, 4499]] = ~codes[0]
        ix = HammingIndex(n_bits, threads=1, scan=path)
        ix.add(codes)
        for xq in codes[:1], np.concatenate([codes[:6], rng.integers(0, 256, (3, n_bits//8), dtype=np.uint8)]):
            d = hamming_distances(xq, codes)
            for k, where in (1, None), (40, None), (len(codes), None), (40, rng.random(len(codes)) < 0.4):
                rows = np.arange(len(codes)) if where is None else np.flatnonzero(where)
                order = np.argsort(d[:, rows], 1, kind="stable")[:, :k]
                dists, ids = ix.search(xq, k, where=where)
                np.testing.assert_array_equal(ids, rows[order])
                np.testing.assert_array_equal(dists, np.take_along_axis(d[:, rows], order, 1))
            for radius in (0, n_bits//3, n_bits - 1, n_bits) if n_words in (1, 4, 5) else ():
                lims, dists, ids = ix.range_search(xq, radius)
                assert np.diff(lims).tolist() == (d <= radius).sum(1).tolist()
                np.testing.assert_array_equal(dists, d[np.repeat(np.arange(len(xq)), np.diff(lims)), ids])


def test_a_path_that_the_machine_lacks_is_one_clear_line(monkeypatch):
    monkeypatch.setattr(machine, "cpu_features", lambda: ("avx2", "popcnt", "bmi"))
    assert machine.cpu_paths() == ("avx2", "portable")
    monkeypatch.setattr("rsir_nb.retrieval.hamming.cpu_paths", machine.cpu_paths)
    for path in "avx512", "neon":
        with pytest.raises(InputError, match=f"cannot run the scan '{path}'.*wanted {CPU_PATHS[path][0]}.*avx2") as e:
            HammingIndex(64, scan=path)
        assert "\n" not in str(e.value)
    assert HammingIndex(64, scan="compiled").path == HammingIndex(64).path == "avx2"


def test_features_are_those_of_the_machine(monkeypatch):
    assert cpu_paths()[-1] == "portable" and set(cpu_features()) <= {o for n in CPU_PATHS.values() for o in n}
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    assert machine.cpu_paths() == ("neon", "portable")


def assembly(path, by_byte, triple, cpu, n_words=2):
    "The compiler's output for one loop, for a processor that need not be this one."
    from rsir_nb.retrieval import paths
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module, u64, pointer = ir.Module("loop"), ir.IntType(64), ir.IntType(64).as_pointer()
    module.triple = triple
    loop = ir.Function(module, ir.FunctionType(u64, [pointer, pointer, u64, u64]), "loop")
    builder = ir.IRBuilder(loop.append_basic_block())
    codes, asked, query, bound = loop.args
    if by_byte:
        planes, asked = (builder.bitcast(o, ir.IntType(8).as_pointer()) for o in (codes, asked))
        found = builder.or_(*paths.emit_by_byte(builder, path, n_words, planes, asked, query, [bound, bound]))
    else: found = paths.emit_direct(builder, path, n_words, codes, ir.Constant(u64, 0), asked, query, bound)
    builder.ret(found)
    machine_ = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, features="", opt=3)
    text = machine_.emit_assembly(binding.parse_assembly(str(module)))
    return set(re.findall(r"^\s+([a-z]\w+)", text, re.M)), text


@pytest.mark.parametrize("path, by_byte, triple, cpu, wanted", [
    ("avx512", False, "x86_64-linux-gnu", "icelake-server", "vpopcntq"),
    ("avx2", False, "x86_64-linux-gnu", "haswell", "vpshufb vpaddb vpsadbw"),
    ("avx2", True, "x86_64-linux-gnu", "haswell", "vpshufb vpaddb vpmovmskb vbroadcasti128"),
    ("neon", False, "aarch64-linux-gnu", "generic", "eor cnt uaddlp addp"),
    ("neon", True, "aarch64-linux-gnu", "generic", "eor cnt ld1r cmhi"),
])
def test_the_compiler_uses_the_instructions_that_the_loop_is_written_for(path, by_byte, triple, cpu, wanted):
    used, text = assembly(path, by_byte, triple, cpu)
    assert set(wanted.split()) <= used
    assert path == "avx512" or "zmm" not in text


def test_a_forced_path_uses_no_more_than_its_instructions():
    "The scan's own code; the wrapper around it is the caller's."
    from rsir_nb.retrieval import kernels
    if "avx2" not in cpu_paths(): pytest.skip("there is nothing to switch off")
    for path, by_byte in ("avx2", True), ("avx2", False), ("portable", False):
        ix = HammingIndex(128, threads=1, scan=path)
        ix.add(np.zeros((100, 16), np.uint8))
        ix.search(ix.codes[:9 if by_byte else 1], 3)
        scan = kernels.make_scan(2, path, by_byte).compiled
        text = scan.inspect_asm(scan.signatures[0])
        own = text[:text.index("cpython")] if "cpython" in text else text
        name = re.search(r"^(_ZN\S*scan\S*):", text, re.M)[1]
        own = re.split(r"\.Lfunc_end|\.size", text[text.index(f"{name}:"):])[0]
        assert "zmm" not in own and (path == "avx2") == ("ymm" in own)
