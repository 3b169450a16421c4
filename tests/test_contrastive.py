"""Contrastive pairs: encoders, fusion, objectives, the classifier, search across sensors, and the archives of such pairs."""
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score, log_loss
from torch.nn import functional as F

from rsir_nb.config import load_config
from rsir_nb.core import InputError, MissingFileError, UnknownNameError
from rsir_nb.data.base import TensorArchive
from rsir_nb.data.bigearthnet_tuples import BenTuplesLmdb, write_tuple_lmdbs
from rsir_nb.data.folders import PairedFolders
from rsir_nb.data.module import ArchiveData
from rsir_nb.engine.encode import encode
from rsir_nb.engine.evaluate import evaluate, evaluate_store
from rsir_nb.engine.evaluation import load_evaluation
from rsir_nb.engine.parts import load_method
from rsir_nb.engine.stages import index_run
from rsir_nb.engine.train import pretrain, read_history
from rsir_nb.losses.contrastive import ntxent_loss
from rsir_nb.losses.duch import similarity_preservation_loss
from rsir_nb.methods.base import Method
from rsir_nb.methods.contrastive import Contrastive
from rsir_nb.methods.cross_modal import CrossModal
from rsir_nb.methods.fusion import FUSIONS
from rsir_nb.methods.pair_encoders import PAIR_ENCODERS
from rsir_nb.metrics.named import score_embeddings
from rsir_nb.models.backbones import timm_backbone
from rsir_nb.simulate.synthetic import SyntheticArchive

SIDE, SENSORS = 32, dict(s1="s1", s2="s2")
TINY = dict(img_size=SIDE, backbone=dict(name="vit", embed_dim=16, depth=1, num_heads=2),
            projection=dict(name="relu", embed_dim=8), norm=None)


def images(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return dict(s1=torch.randn(n, 2, SIDE, SIDE, generator=g), s2=torch.randn(n, 10, SIDE, SIDE, generator=g))


def build(kind=Contrastive, seed=0, **changes):
    torch.manual_seed(seed)
    return kind(SENSORS, **TINY | changes)


# encoders and fusion --------------------------------------------------------------------------------

@pytest.mark.parametrize("backbone", (TINY["backbone"], dict(name="timm", model="resnet10t")))
@pytest.mark.parametrize("fusion", FUSIONS.list())
@pytest.mark.parametrize("encoder", PAIR_ENCODERS.list())
def test_every_form_embeds_saves_and_does_not_look_at_the_rest_of_the_batch(encoder, fusion, backbone, tmp_path):
    method, x = build(encoder=encoder, fusion=fusion, backbone=backbone), images()
    z = method.embed(x)
    assert set(z) == {"s1", "s2", "s1+s2"} and all((o >= 0).all() for o in z.values())
    wide = 16 if fusion == "concat" and encoder != "early" else 8
    assert z["s1+s2"].shape == (6, wide) and z["s1"].shape == (6, 8)
    for m in z:
        part = {k: o[2:3] for k, o in x.items()} if m == "s1+s2" else x[m][2:3]
        assert torch.equal(method.embed(part, m), z[m][2:3])
    again = Method.load(method.save(tmp_path/"method"))
    assert again.weights_hash == method.weights_hash and torch.equal(again.embed(x)["s1+s2"], z["s1+s2"])
    for m in "s1", "s2":   # one sensor is missing
        alone, other = method.embed({m: x[m]}, "s1+s2"), method.embed({m: x[m]}, m)
        factor = dict(sum=2).get(fusion, 1) if encoder != "early" else 1
        assert torch.allclose(alone, torch.cat([other, other], 1) if wide == 16 else factor*other, atol=1e-6)


def test_joint_shares_its_trunk_and_separate_nothing():
    grads = {}
    for encoder in "separate", "joint":
        method = build(encoder=encoder)
        method.encode(images()["s1"], "s1").sum().backward()
        grads[encoder] = {k.split(".")[0] + "." + k.split(".")[1] for k, p in method.encoder.named_parameters()
                          if p.grad is not None and p.grad.abs().sum() > 0}
    assert grads["separate"] == {"nets.s1"} and {"adapters.s1", "net.net"} == grads["joint"]


def test_weights_of_a_file_are_not_needed_again(tmp_path):
    wide = timm_backbone(3, SIDE, "resnet10t").net
    torch.save(wide.state_dict(), tmp_path/"rgb.pth")
    method = build(backbone=dict(name="timm", model="resnet10t", weights=str(tmp_path/"rgb.pth")))
    (tmp_path/"rgb.pth").unlink()
    again = Method.load(method.save(tmp_path/"method"))
    assert torch.equal(again.embed(images()["s2"], "s2"), method.embed(images()["s2"], "s2"))


# objectives -----------------------------------------------------------------------------------------

def labels(n=6): return (torch.rand(n, 3, generator=torch.Generator().manual_seed(1)) > .5).float()


def test_the_contrastive_term_is_ntxent_of_the_projections():
    method, x = build(temperature=.3), images()
    terms = method.losses(x)
    z = {m: method.encode(method.prepare(x[m], m), m) for m in SENSORS}
    assert set(terms) == {"loss", "contrastive"}
    assert terms["loss"].item() == pytest.approx(ntxent_loss(z["s1"], z["s2"], .3).item())


def test_the_classification_term_against_sklearn_and_its_classifier_learns(tmp_path):
    method, x, y = build(loss="classification", vocab=["a", "b", "c"], fusion="max"), images(), labels()
    y[0] = 0   # a place without labels does not count
    terms = method.losses(x | dict(labels=y))
    p = method.classify(x).numpy()
    by_hand = np.mean([log_loss(y[1:, c], p[1:, c], labels=[0, 1]) for c in range(3)])
    assert terms["loss"].item() == pytest.approx(by_hand, rel=1e-4)
    optimizer = torch.optim.Adam([p for p in method.optimisers()["main"][0]], 1e-2)
    was = method.classifier.classifier.weight.clone()
    for _ in range(60):
        optimizer.zero_grad()
        method.losses(x | dict(labels=y))["loss"].backward()
        optimizer.step()
    assert not torch.equal(was, method.classifier.classifier.weight)
    found = method.eval().classify(x)
    assert (((found > .5) == (y > .5))[1:]).float().mean() > .9
    assert torch.equal(Method.load(method.save(tmp_path/"m")).classify(x), found)


def test_in_turn_and_weights():
    x = images() | dict(labels=labels())
    method = build(loss="in_turn", vocab=["a", "b", "c"])
    assert method.switch_epoch == method.optim.epochs//2
    for epoch, name in ((0, "contrastive"), (method.switch_epoch, "classification")):
        method.epoch = epoch
        terms = method.losses(x)
        assert set(terms) == {"loss", name} and terms["loss"].item() == terms[name].item()
    method.epoch = 0
    told = method.eval().losses(x)   # validation: all terms, and the last objective
    assert set(told) == {"loss", "contrastive", "classification"} and told["loss"].item() == told["classification"].item()
    both = build(loss="both", vocab=["a", "b", "c"], contrastive_weight=2., classification_weight=.5).losses(x)
    assert both["loss"].item() == pytest.approx(2*both["contrastive"].item() + .5*both["classification"].item(), rel=1e-5)


def test_three_losses():
    method, x = build(CrossModal, mim_weight=2., msp_weight=.5, projection="mlp").eval(), images()
    z = method.embed(x)
    cosine = F.cosine_similarity(z["s1"], z["s2"])
    terms = method.losses(x)
    assert terms["mde"].item() == pytest.approx(-torch.log1p(cosine.exp()).mean().item(), rel=1e-4)
    assert terms["msp"].item() == pytest.approx(-similarity_preservation_loss(dict(a=z["s1"], b=z["s2"])).item(), rel=1e-4)
    assert terms["loss"].item() == pytest.approx(sum(w*terms[k].item() for k, w in dict(mim=2, mde=1, msp=.5).items()), rel=1e-4)


@pytest.mark.parametrize("changes, error", [
    (dict(loss="contrast"), "contrastive"), (dict(fusion="mean"), "fusion"), (dict(encoder="twin"), "pair encoder"),
    (dict(temperature=0), "positive"), (dict(loss="both"), "needs classes"), (dict(distance="chi"), "chi2"),
    (dict(distance="chi2", projection="projection"), "ends with a ReLU"),
    (dict(distance="chi2", projection="mlp"), "ends with a ReLU")])
def test_what_cannot_be_is_named(changes, error):
    with pytest.raises((InputError, UnknownNameError), match=error): build(**changes)


def test_bad_batches_and_archives():
    method, x = build(), images()
    with pytest.raises(InputError, match="batch of one place"): method.losses({m: o[:1] for m, o in x.items()})
    with pytest.raises(InputError, match="has no s1"): method.losses(dict(s2=x["s2"]))
    classifier = build(loss="classification", vocab=["a"])
    with pytest.raises(InputError, match="labels; found none on p0, p1"): classifier.losses(dict(x, id=["p0", "p1"]))
    with pytest.raises(InputError, match="none on 6 patches"):
        classifier.start_training(TensorArchive(x, sensors=SENSORS))
    with pytest.raises(InputError, match="two sensors"): Contrastive(["s1"], **TINY)
    with pytest.raises(InputError, match="two sensors"): CrossModal(["s1"], **TINY)
    one = Contrastive(["s2"], loss="classification", vocab=["a", "b", "c"], **TINY)
    assert one.losses(dict(s2=x["s2"], labels=labels()))["loss"].item() > 0
    assert set(one.eval().losses(dict(s2=x["s2"], labels=labels()))) == {"loss", "classification"}


# the whole line -------------------------------------------------------------------------------------

QUICK = ["method.backbone={name: vit, embed_dim: 32, depth: 1, num_heads: 2}", "method.projection=relu",
         "optim.epochs=2", "trainer.batch_size=16"]


@pytest.mark.parametrize("encoder", [pytest.param(o, marks=[] if o == "early" else pytest.mark.slow) for o in PAIR_ENCODERS.list()])
def test_train_search_evaluate_by_config(tmp_path, encoder):
    cfg = load_config("contrastive", ["data={name: synthetic, n_places: 16, patches_per_place: 2, img_size: 32}", *QUICK,
                                      f"method.encoder={encoder}", "method.loss=both", "method.distance=chi2",
                                      "method.fusion=sum", f"out={tmp_path/'run'}"])
    run = pretrain(cfg, progress=False)
    history = read_history(run)
    assert {"train/contrastive", "train/classification", "val/partner_r@10"} <= {c if "/" in c else f"train/{c}" for c in history}
    search = index_run(run, progress=False)
    hits = search.query(search.store.ids[0], source="s1", target="s2", k=3)
    fused = search.query(search.store.ids[0], source="s1+s2", target="s1+s2", k=3)
    assert len(hits.ids) == len(fused.ids) == 3 and "fused_of" in fused.table()
    result = evaluate(run, progress=False, baselines=["random"], drawings=50)
    assert "s1+s2" in str(result.table["direction"].unique())
    method = load_method(run)
    assert method.distance == "chi2"
    rows = np.flatnonzero(search.store.table["split"] == "test")
    y = search.store.table["labels"].iloc[rows].map(lambda o: method.vocab and [c in o for c in method.vocab])
    p = method.predict_classes({"s1+s2": torch.from_numpy(search.store.embeddings["s1+s2"][rows].astype("float32"))})
    wanted = f1_score(np.array(y.tolist()), p.numpy() >= .5, average="macro", zero_division=0)
    assert load_evaluation(run/"evaluation"/"csmae").about["classes"]["test"]["class_f1_macro"] == pytest.approx(wanted)


def test_a_training_is_monitored_by_its_classifier(tmp_path):
    few = ["data={name: synthetic, n_places: 12, patches_per_place: 2, img_size: 32}", *QUICK, "method.encoder=early",
           "trainer.monitor=class_ranking_loss", f"out={tmp_path/'run'}"]
    run = pretrain(load_config("contrastive", [*few, "method.loss=both"]), progress=False)
    assert read_history(run)["val/class_ranking_loss"].dropna().between(0, 1).all()
    told = json.loads((run/"finished.json").read_text())
    best = read_history(run)["val/class_ranking_loss"].dropna().min()
    assert told["monitor"] == "val/class_ranking_loss" and told["value"] == pytest.approx(best)
    with pytest.raises(InputError, match="score of a classifier; found a method without one"):
        pretrain(load_config("contrastive", [*few[:-1], f"out={tmp_path/'none'}"]), progress=False)


def test_sensors_are_compared_beside_a_longer_fusion(tmp_path):
    "A fused embedding of twice the length is searched by itself, and takes no direction from the sensors."
    archive, method = SyntheticArchive(n_places=12, patches_per_place=2, img_size=SIDE), build(fusion="concat")
    store = encode(method, archive, tmp_path/"codes", progress=False)
    found = evaluate_store(store, drawings=20, metrics=["m2_wap", "m2_f1_at_rank"])
    ways = {"s1->s1", "s1->s2", "s2->s1", "s2->s2", "s1+s2->s1+s2"}
    assert set(found.table["direction"]) == ways and set(found.partners["direction"]) == {"s1->s2", "s2->s1"}
    assert {"m2_wap", "m2_f1_at_rank"} <= set(found.table["metric"])
    same = encode(build(fusion="sum"), archive, tmp_path/"sum", progress=False)
    assert len(set(evaluate_store(same, drawings=20, metrics=[]).table["direction"])) == 9


def test_sparse_labels_count_where_they_are_known(tmp_path):
    "One labelled patch of ten: no batch loses the labels of the others, and one without any costs nothing."
    x = images(40)
    few = TensorArchive(x, sensors=SENSORS, labels=[["a", "b"] if i % 2 else ["a"] for i in range(40)], split=["train"]*40)
    few.table["labels"] = [o if i < 4 else None for i, o in enumerate(few.table["labels"])]
    method = build(loss="classification", vocab=["a", "b"])
    method.start_training(few)
    data = ArchiveData(few.subset(range(40)), batch_size=8, sampler=dict(name="epoch", shuffle=False), augment=False)
    costs = [method.losses(o)["loss"].item() for o in data.batches()]
    assert costs[0] > 0 and costs[1:] == [0]*4
    first = next(iter(data.batches()))
    part = {k: o[:4] for k, o in first.items() if k != "labelled"}   # eval mode: no statistics of the batch
    assert method.eval().losses(first)["classification"].item() == pytest.approx(method.losses(part)["classification"].item(), rel=1e-5)


def test_a_missing_sensor_is_marked_in_the_store(tmp_path):
    x = images()
    archive = SyntheticArchive(n_places=3, patches_per_place=2, img_size=SIDE)
    class Lacking(type(archive)):
        def read(self, i): return {m: o for m, o in super().read(i).items() if i or m == "s2"}
    for encoder in "separate", "early":
        method = build(encoder=encoder)
        lacking = Lacking(n_places=3, patches_per_place=2, img_size=SIDE)
        store = encode(method, lacking, tmp_path/encoder, progress=False)
        assert store.table["from_s1+s2"].tolist() == ["s2"] + ["s1 and s2"]*5
        z = method.embed({m: lacking[3][m][None] for m in SENSORS}, "s1+s2")
        assert np.allclose(store.embeddings["s1+s2"][3], z[0].numpy(), rtol=2e-3, atol=2e-3)
    found = score_embeddings({m: o.numpy() for m, o in method.embed(x).items()}, TensorArchive(x, sensors=SENSORS), ["partner_r@1"])
    assert 0 <= found["partner_r@1"] <= 1   # fusions are no direction of partners, and no error


# archives -------------------------------------------------------------------------------------------

def write_png(path, x):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x).save(path)


PNG = dict(sar=dict(bands=["amplitude"], unit="byte"), rgb="rgb")


def make_pngs(home, n=24, radar="{i}.png", optical="{i}.png"):
    "Squares of one place, grey in the radar image and coloured in the other."
    rng = np.random.default_rng(0)
    for i in range(n):
        field = np.zeros((SIDE, SIDE), np.uint8)
        a, b = rng.integers(0, 20, 2)
        field[a:a + 4 + i % 9, b:b + 10] = 200
        write_png(home/radar.format(i=i), (field//2 + rng.integers(0, 60, field.shape)).astype(np.uint8))
        write_png(home/optical.format(i=i), np.stack([field//2, 100 - field//3, field//4 + 30], -1).astype(np.uint8))


def test_sen12_names(tmp_path):
    make_pngs(tmp_path, 8, "spring/s1_3/spring_s1_3_p{i}.png", "spring/s2_3/spring_s2_3_p{i}.png")
    make_pngs(tmp_path, 4, "fall/s1_1/fall_s1_1_p{i}.png", "fall/s2_1/fall_s2_1_p{i}.png")
    options = dict(sensors=PNG, tokens=dict(sar="s1", rgb="s2"), pattern="{place}/{sensor}_{part}/{place}_{sensor}_{part}_*")
    archive = PairedFolders(tmp_path, split=dict(train=.6, val=.4), **options)
    assert len(archive) == 12 and archive.has("sar", "rgb").all()
    assert archive.table.groupby("place")["split"].nunique().tolist() == [1, 1] and "fall/1/p2" in archive.ids
    assert archive["fall/1/p2"]["sar"].shape == (1, SIDE, SIDE)
    with pytest.raises(InputError, match="no file of sar fits .* found .*png; wanted s1/"):
        PairedFolders(tmp_path, **options | dict(pattern="{sensor}/*"))
    write_png(tmp_path/"fall/s1_1/fall_s1_1_p0.jpg", np.zeros((SIDE, SIDE), np.uint8))
    with pytest.raises(InputError, match="two files of sar make the pair fall/1/p0; found .*p0.jpg and .*p0.png"):
        PairedFolders(tmp_path, **options)


def test_two_folders_of_other_names(tmp_path):
    make_pngs(tmp_path, 4, "sar_256_oc_0.2/{i}.png", "opt_256_oc_0.2/{i}.png")
    options = dict(sensors=PNG, tokens=dict(rgb="opt"), pattern="{sensor}_256_oc_0.2/*")
    assert PairedFolders(tmp_path, **options).ids == ["0", "1", "2", "3"]
    for path in (tmp_path/"opt_256_oc_0.2").iterdir(): path.rename(path.with_name(f"x{path.name}"))
    with pytest.raises(InputError, match="pairs nothing; found .*sar_256.* and .*opt_256"): PairedFolders(tmp_path, **options)
    with pytest.raises(InputError, match="does not tell sensors apart"): PairedFolders(tmp_path, **options | dict(pattern="*/*"))
    with pytest.raises(UnknownNameError, match="tokens"): PairedFolders(tmp_path, **options | dict(tokens=dict(optical="opt")))
    with pytest.raises(MissingFileError): PairedFolders(tmp_path/"nothing", **options)


def test_pngs_are_learned_from_by_the_config_alone(tmp_path):
    make_pngs(tmp_path/"pairs", 48, "sar/p{i}.png", "rgb/p{i}.png")
    cfg = load_config("contrastive_pairs", [f"data.root={tmp_path/'pairs'}", "data.img_size=32", *QUICK[:2], "optim.epochs=6",
                                            "trainer.batch_size=16", "optim.lr=3e-3", f"out={tmp_path/'run'}"])
    history = read_history(pretrain(cfg, progress=False))
    loss = history["train/loss" if "train/loss" in history else "loss"].dropna()
    assert loss.iloc[-2:].mean() < loss.iloc[:2].mean()
    assert history["val/partner_r@10"].dropna().between(0, 1).all()


def test_tuples(tmp_path):
    land = SyntheticArchive(n_places=4, patches_per_place=2, seed=1)
    home = write_tuple_lmdbs(land, tmp_path/"a")
    archive = BenTuplesLmdb(home/"S2", home/"S1", home/"splits")
    assert len(archive) == 8 and archive.has("s1", "s2").all() and set(archive.table["split"]) == set(land.table["split"])
    for i, name in enumerate(land.table["s2v1_name"]):
        sample = archive[archive.ids.index(name)]
        assert torch.allclose(sample["s1"], land[i]["s1"])
        assert torch.allclose(sample["s2"][:3], land[i]["s2"][:3])   # bands of 10 m; the others are resampled another way
        assert sorted(archive.class_names[archive.ids.index(name)]) == sorted(land.class_names[i])
    with pytest.raises(InputError, match="not the LMDB of s2"): BenTuplesLmdb(home/"S1", home/"S2", home/"splits")
    other = write_tuple_lmdbs(SyntheticArchive(n_places=4, patches_per_place=2, seed=5), tmp_path/"b")
    with pytest.raises(InputError, match="of different archives; found no partner .*S1"):
        BenTuplesLmdb(home/"S2", other/"S1", home/"splits")
    listed = home/"splits"/"test.csv"
    rows = listed.read_text().splitlines()
    s2, s1 = rows[0].split(",")
    listed.write_text("\n".join([f"{s2},{s1[:-1]}x", *rows[1:]]))
    with pytest.raises(InputError, match=f"{s2} lacks its partner"): BenTuplesLmdb(home/"S2", home/"S1", home/"splits")
    left = BenTuplesLmdb(home/"S2", home/"S1", home/"splits", on_error="skip")
    assert len(left) == 7 and any(s2 in o for o in left.skipped["reason"])
    for path in (home/"splits").iterdir(): path.write_text("\n".join(o.split(",")[0] for o in path.read_text().splitlines()))
    with pytest.raises(InputError, match="pairs nothing"): BenTuplesLmdb(home/"S2", home/"S1", home/"splits")
