"First order motion model: equal to the authors' networks and transfer; fails when broken; loads their file; streams."
import golden_fill
import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull

from ophav_nb.nets.fomm import Fomm, Points, animate, hull_area, load_fomm, transfer
from ophav_nb.run import InputError
from ophav_nb.weights import add_weight


@pytest.fixture(scope="module")
def net():
    net = Fomm()
    for part, module in net.named_children(): golden_fill.fill_golden(module, "fomm_vox256", part)
    return net.eval()


def made_points():
    place = golden_fill.drawn_uniform("fomm.g_kp_source", (1, 10, 2), -.7, .7)
    away = {"source": 0, "initial": golden_fill.drawn_normal("fomm.g_kp_initial", (1, 10, 2), 0, .05),
            "driving": golden_fill.drawn_normal("fomm.g_kp_driving", (1, 10, 2), 0, .1)}
    return {k: Points(place + d, torch.eye(2) + golden_fill.drawn_normal(f"fomm.g_jac_{k}", (1, 10, 2, 2), 0, .15)) for k, d in away.items()}


@torch.inference_mode()
def outputs(net):
    image = {k: golden_fill.drawn_picture(f"fomm.{k}", (1, 3, 256, 256)) for k in ("source", "driving")}
    made = made_points()
    new = {"relative_adapt": transfer(**made), "relative": transfer(**made, adapt_scale=False)}
    points = {f"kp.{k}": net.kp_detector(x) for k, x in image.items()} | {f"norm.{k}": p for k, p in new.items()}
    out = {f"{k}.{field}": t for k, p in points.items() for field, t in p._asdict().items()}
    return out | {f"gen.{k}": t for k, t in net.generator(image["source"], made["source"], new["relative_adapt"]).items()}


def test_golden(net): golden_fill.golden_on_threads("fomm_vox256", lambda: outputs(net))


def test_a_broken_layer_fails(net):
    "A keypoint convolution that pads, as most do, moves every keypoint."
    net.kp_detector.kp.padding = (3, 3)
    net.kp_detector.jacobian.padding = (3, 3)
    try: shares = golden_fill.beyond("fomm_vox256", outputs(net))
    finally: net.kp_detector.kp.padding = net.kp_detector.jacobian.padding = (0, 0)
    assert shares["kp.source.value"] > 1 and shares["kp.driving.jacobian"] > 1 and shares["gen.prediction"] <= 1


def test_hull_area_is_scipys():
    points = torch.randn(20, 10, 2, generator=torch.Generator().manual_seed(0))
    np.testing.assert_allclose(hull_area(points), [ConvexHull(p).volume for p in points.numpy()], rtol=1e-5)


def test_transfer():
    "A film that stands still leaves the source alone; absolute driving takes what it is given; size is made up for."
    made = made_points()
    still = transfer(made["source"], made["driving"], made["driving"])
    torch.testing.assert_close(still.value, made["source"].value, rtol=0, atol=1e-6)
    torch.testing.assert_close(still.jacobian, made["source"].jacobian, rtol=0, atol=1e-5)
    assert transfer(**made, relative=False) is made["driving"]
    larger = {k: Points(2*made[k].value + .3, made[k].jacobian) for k in ("initial", "driving")}
    torch.testing.assert_close(transfer(made["source"], **larger).value, transfer(**made).value, rtol=0, atol=1e-5)


def test_other_sizes_and_batches(net):
    g = torch.Generator().manual_seed(1)
    images, source = torch.rand(3, 3, 128, 128, generator=g), torch.rand(1, 3, 128, 128, generator=g)
    with torch.inference_mode():
        kp, own = net.kp_detector(images), net.kp_detector(source)
        together, _ = net.generator.generate(net.generator.prepare(source), own, kp)
        for i in range(3):
            alone = net.generator(source, own, net.kp_detector(images[i:i + 1]))["prediction"]
            torch.testing.assert_close(together[i:i + 1], alone, rtol=1e-4, atol=1e-4)


def test_animate_streams(net):
    "Batches and chunks change nothing; the frame that looks like the source may be any; a still film gives still pictures."
    rng = np.random.default_rng(0)
    source, film = rng.integers(0, 256, (40, 40, 3), np.uint8), rng.integers(0, 256, (2, 60, 60, 3), np.uint8)
    close = lambda a, b: np.abs(a.astype(int) - b).max() <= 1
    whole = np.stack(list(animate(net, source, film, batch=2)))
    assert whole.shape == (2, 256, 256, 3) and whole.dtype == np.uint8
    assert close(whole, np.stack(list(animate(net, source, (film[i:i + 1] for i in range(2))))))
    later, = animate(net, source, film[1:], initial=film[1])
    assert close(whole[0], later)          # both stand at the source's own pose
    absolute, = animate(net, source, film[:1], relative=False)
    assert not close(absolute, whole[0])


def test_the_authors_file(net, tmp_path, monkeypatch):
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path))
    torch.save({part: module.state_dict() for part, module in net.named_children()} | {"discriminator": {"a.weight": torch.zeros(2)}, "epoch": 3,
               "optimizer_generator": {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.}]}}, tmp_path/"vox-cpk.pth.tar")
    with pytest.raises(InputError, match="vox-cpk"): load_fomm()
    assert add_weight(tmp_path/"vox-cpk.pth.tar")[0] == "fomm"
    load_fomm()
    loaded = load_fomm(tmp_path/"vox-cpk.pth.tar")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values()))
    torch.save({"generator": {"a": torch.zeros(1)}}, tmp_path/"other.pth")
    with pytest.raises(InputError, match="other tensors"): load_fomm(tmp_path/"other.pth")
