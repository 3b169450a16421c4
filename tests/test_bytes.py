"Whole numbers stay whole numbers until they are on the device, and mean there what the samples say."
import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.transform import from_origin

from rsir_nb.data.base import TensorArchive, concat_archives
from rsir_nb.data.batches import ArchiveRows, collate, to_units
from rsir_nb.data.checks import as_kept, to_square
from rsir_nb.data.folders import ClassFolders
from rsir_nb.data.module import ArchiveData
from rsir_nb.data.packing import Packing
from rsir_nb.data.store import PatchStore, write_store

pytestmark = pytest.mark.filterwarnings("ignore")
RNG = np.random.default_rng(0)


def make(n=8, prefix="p"):
    arrays = dict(s1=RNG.normal(-14, 4, (n, 2, 6, 6)).astype("f4"), s2=RNG.gamma(4, 400, (n, 10, 6, 6)).round().astype("f4"),
                  rgb=RNG.integers(0, 256, (n, 3, 6, 6)).astype("uint8"))
    return TensorArchive(arrays, ids=[f"{prefix}{i}" for i in range(n)])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "A store in which one patch does not fit its compact type."
    archive = make()
    archive.arrays["s2"][5, 0, 0, 0] = 70_000
    path = tmp_path_factory.mktemp("store")/"s"
    write_store(archive, path, size=6, progress=False)
    return PatchStore(path)


def rows(archive, which): return collate([ArchiveRows(archive)[i] for i in which], archive.stored_scales)


def same_as_samples(archive, batch):
    found = to_units(batch, archive.stored_scales)
    for m in archive.sensors:
        assert found[m].dtype == torch.float32 and torch.equal(found[m], torch.stack([archive[i][m] for i in batch["row"].tolist()])), m


def test_a_store_hands_out_what_it_keeps(store):
    batch = rows(store, range(4))
    assert {m: batch[m].dtype for m in store.sensors} == dict(s1=torch.int16, s2=torch.uint16, rgb=torch.uint8)
    assert store.stored_scales == dict(s1=(0.002, 0), s2=(1, -1000), rgb=(1, 0))
    same_as_samples(store, batch)
    kept, floats = (sum(x[m].nbytes for m in store.sensors) for x in (batch, to_units(batch, store.stored_scales)))
    assert kept/floats == (2*2 + 2*10 + 3)/(4*15)


def test_patches_that_do_not_fit_are_floats_with_the_rest_of_their_batch(store):
    assert ArchiveRows(store)[5]["s2"].dtype == torch.float32
    batch = rows(store, range(4, 8))
    assert batch["s2"].dtype == torch.float32 and batch["s1"].dtype == torch.int16
    same_as_samples(store, batch)


def test_every_number_of_16_bits(tmp_path):
    for packing, kind in (Packing("uint16", offset=-1000), "uint16"), (Packing("int16", scale=0.002), "int16"), (Packing("int16", scale=0.1, offset=3), "int16"):
        ends = np.iinfo(kind)
        numbers = np.arange(ends.min, ends.max + 1).astype(kind)
        x = torch.from_numpy(numbers).reshape(1, 1, 256, 256)
        found = to_units(dict(x=x), dict(x=(packing.scale, packing.offset)))["x"]
        assert np.array_equal(found.numpy().ravel(), packing.unpack(numbers)), "bit by bit what the store reads"
        assert np.array_equal(x.numpy().ravel(), numbers), "nothing is changed in place"


def test_parts_and_sums(store, tmp_path):
    part = store.subset([6, 2, 0])
    assert part.stored_scales == store.stored_scales
    same_as_samples(part, rows(part, range(3)))
    write_store(make(4, "q"), tmp_path/"same", size=6, progress=False)
    write_store(make(4, "r"), tmp_path/"other", size=6, progress=False, dtypes=dict(s2=Packing("uint16")))
    same, other = PatchStore(tmp_path/"same"), PatchStore(tmp_path/"other")
    both = concat_archives([store.subset(range(4)), same])
    batch = rows(both, range(8))
    assert batch["s2"].dtype == torch.uint16 and both.stored_scales == store.stored_scales
    same_as_samples(both, batch)
    for odd in other, make(4, "t"):
        mixed = concat_archives([store.subset(range(4)), odd])
        batch = rows(mixed, range(8))
        assert batch["s2"].dtype == torch.float32 and mixed.stored_scales == {}
        same_as_samples(mixed, batch)


@pytest.fixture()
def photos(tmp_path):
    for name in "forest", "river":
        (tmp_path/name).mkdir()
        for i in range(4): Image.fromarray(RNG.integers(1, 256, (64, 64, 3)).astype("uint8")).save(tmp_path/name/f"{i}.png")
    return tmp_path


def test_photographs_stay_bytes(photos):
    archive = ClassFolders(photos)
    sample, modality = archive[0], next(iter(archive.sensors))
    assert sample[modality].dtype == torch.float32, "a sample is always float32"
    batch = rows(archive, range(8))
    assert batch[modality].dtype == torch.uint8 and batch[modality].nbytes*4 == to_units(batch)[modality].nbytes
    same_as_samples(archive, batch)
    assert rows(ClassFolders(photos, img_size=64), range(8))[modality].dtype == torch.uint8, "nothing to resample"
    smaller = ClassFolders(photos, img_size=32)
    assert rows(smaller, range(8))[modality].dtype == torch.float32
    same_as_samples(smaller, rows(smaller, range(8)))


def test_reflectance_of_files_stays_16_bits(tmp_path):
    (tmp_path/"field").mkdir()
    for i in range(3):
        with rasterio.open(tmp_path/"field"/f"{i}.tif", "w", driver="GTiff", height=8, width=8, count=4, dtype="uint16", crs="EPSG:32632",
                           transform=from_origin(690000, 5340000, 10, 10)) as ds:
            x = RNG.integers(1, 3000, (4, 8, 8)).astype("uint16")
            if i == 2: x[:, :2] = 0   # no data
            ds.write(x)
            ds.descriptions = "B02", "B03", "B04", "B08"
    archive = ClassFolders(tmp_path, sensor="s2_rgbn")
    modality = next(iter(archive.sensors))
    assert [ArchiveRows(archive)[i][modality].dtype for i in range(3)] == [torch.uint16, torch.uint16, torch.float32], "filled gaps are means"
    same_as_samples(archive, rows(archive, range(3)))
    shifted = ClassFolders(tmp_path, sensor="s2_rgbn", offset=-1000)
    assert ArchiveRows(shifted)[0][modality].dtype == torch.float32
    same_as_samples(shifted, rows(shifted, range(3)))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_keeps_bytes_and_the_batch_is_floats(photos, workers):
    archive = ClassFolders(photos)
    modality = next(iter(archive.sensors))
    data = ArchiveData(archive, batch_size=4, num_workers=workers, augment=False)
    assert next(iter(data.train_dataloader()))[modality].dtype == torch.uint8
    for batch in data.batches(): same_as_samples(archive, batch)


def test_what_is_kept():
    assert as_kept(np.zeros(2, "int32")).dtype == as_kept(np.zeros(2)).dtype == as_kept(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert to_square(np.zeros((3, 4, 6), "uint8"), 4, "byte").dtype == torch.uint8
    assert to_square(np.zeros((3, 4, 6), "uint8"), 3, "byte").dtype == torch.float32
