"On a GPU: the same losses and codes as on a CPU, the same code whatever the batch, and a run from start to search."
import numpy as np
import pytest
import torch
from engine_run import tiny_config
from rsir_nb.all import import_pages
from rsir_nb.core import METHODS
from rsir_nb.simulate.synthetic import SyntheticArchive
from rsir_nb.engine.encode import encode, encode_run
from rsir_nb.engine.evaluate import evaluate
from rsir_nb.engine.hash import train_hash
from rsir_nb.engine.stages import index_run
from rsir_nb.engine.parts import load_method
from rsir_nb.engine.train import pretrain, read_history
from rsir_nb.methods.hashing import HashHeads
from rsir_nb.models.masking import make_noise
from rsir_nb.retrieval.codes import binarise

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU on this machine")]
SMALL = dict(patch_size=15, embed_dim=64, num_heads=4, specific_depth=1, shared_depth=1, decoder_embed_dim=32,
             decoder_depth=1, decoder_num_heads=2)


@pytest.fixture(scope="module")
def archive():
    import_pages()
    return SyntheticArchive(n_places=12, patches_per_place=8, seed=1)


@pytest.fixture(scope="module")
def method(archive):
    torch.manual_seed(0)
    method = METHODS.create("csmae", sensors=archive.sensors, img_size=120, **SMALL)
    method.heads = HashHeads({m: method.embed_dim for m in archive.sensors}, n_bits=64)
    return method.eval()


@pytest.fixture(scope="module")
def batch(archive): return {m: torch.stack([archive[i][m] for i in range(40)]) for m in archive.sensors}


@pytest.fixture(autouse=True)
def at_home(method):
    yield
    method.to("cpu")


def test_losses_and_gradients_are_those_of_the_cpu(method, batch):
    noises = {m: make_noise(40, method.backbone.n_tokens) for m in batch}
    found = {}
    for device in "cpu", "cuda":
        method.to(device).zero_grad()
        on = lambda o: {k: v.to(device) for k, v in o.items()}
        losses = method.losses(on(batch), on(noises))
        losses["loss"].backward()
        grads = torch.cat([p.grad.flatten().cpu() for p in method.parameters() if p.grad is not None])
        found[device] = {k: v.item() for k, v in losses.items()}, grads
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-4)
    cpu, gpu = (found[o][1] for o in ("cpu", "cuda"))
    assert (cpu - gpu).norm() < 5e-3*cpu.norm()


def test_a_code_does_not_depend_on_the_batch(method, batch):
    method.to("cuda")
    for m, x in batch.items():
        whole = method.hash(method.embed(x, m), m)
        alone = torch.cat([method.hash(method.embed(x[i:i + 1], m), m) for i in range(8)])
        assert torch.equal(alone, whole[:8])


def test_codes_are_those_of_the_cpu(method, batch):
    for m, x in batch.items():
        codes = {}
        for device in "cpu", "cuda":
            method.to(device)
            values = method.hash(method.embed(x, m), m).float().cpu()
            codes[device] = np.asarray(binarise(values)), values
        differ = codes["cpu"][0] != codes["cuda"][0]
        assert differ.mean() < 0.005
        assert np.abs(codes["cpu"][1].numpy()[differ]).max(initial=0) < 1e-2, "only bits at the threshold may turn"


def test_an_archive_is_encoded_alike_in_other_batches(method, archive, tmp_path):
    stores = [encode(method, archive, tmp_path/str(n), batch_size=n, num_workers=w, device="cuda", progress=False)
              for n, w in ((7, 0), (64, 2))]
    assert method.device.type == "cpu", "the method comes back to where it was"
    for m in archive.sensors: assert np.array_equal(stores[0].codes[m], stores[1].codes[m])


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
def test_a_run_from_start_to_search(tmp_path, precision):
    cfg = tiny_config(tmp_path/"run", f"trainer.precision={precision}", "trainer.accelerator=gpu")
    run = pretrain(cfg, progress=False)
    history = read_history(run)
    assert np.isfinite(history.filter(like="loss").to_numpy(float)).any()
    assert all(p.isfinite().all() for p in load_method(run).parameters())
    train_hash(run, progress=False)
    store = encode_run(run, progress=False)
    hits = index_run(run, progress=False).query(store.ids[0], "s1", "s2", k=5)
    assert len(hits) == 5 and len(set(hits.ids)) == 5
    assert evaluate(run, progress=False).table.value.notna().any()
