"An engine of an outsider: codes that a server of its own would keep, at addresses `toy://...`."
import numpy as np

from rsir_nb.core import INDEXES
from rsir_nb.remote.engines import RemoteIndex
from rsir_nb.retrieval.codes import check_codes
from rsir_nb.retrieval.hamming import HammingIndex

served = {}


@INDEXES.register("toy_server", exact=True, schemes=("toy",))
class ToyIndex(RemoteIndex):
    "Codes in a dictionary of indexes, which plays the server."
    dist_type = np.int32

    def __init__(self, there): self.there, self.n_bits = there, there.n_bits

    @classmethod
    def open(cls, address, n_bits=None, weights_hash=None):
        if n_bits and address not in served: served[address] = HammingIndex(n_bits)
        return cls(served[address])

    ids = property(lambda self: self.there.ids)

    def __len__(self): return len(self.there)

    def _check(self, x, what): return check_codes(x, self.n_bits, what)

    def _add(self, x, ids): return self.there.add(x, ids)

    def _search(self, xq, k, where): return self.there.search(xq, k, where)

    def _range_search(self, xq, radius, where): return self.there.range_search(xq, radius, where)

    def _remove(self, ids): return self.there.remove(ids)

    def save(self, path): return self.there.save(path)
