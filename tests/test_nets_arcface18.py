"CSIM's ArcFace: equal to the public implementation, alignment included; fails when broken; loads the authors' file."
import golden_fill
import numpy as np
import pytest
import torch

from ophav_nb import restore
from ophav_nb.nets.arcface18 import TEMPLATE, ArcFace18, align, csim, embed, five_points, grey_of, load_arcface18, similarity
from ophav_nb.run import InputError
from ophav_nb.weights import add_weight

NAME = "csim_otavatar"


@pytest.fixture(scope="module")
def net(): return golden_fill.fill_golden(ArcFace18(), NAME)


def landmarks():
    "The 68 points of the manifest's recipe."
    points = golden_fill.named_generator("input:csim.lms68").standard_normal((1, 68, 2))*4 + 128
    for k, places in enumerate(((36, 39), (42, 45), (30,), (48,), (54,))):
        for i in places: points[0, i] += 2*np.float64(TEMPLATE[k]) + (10, 6) - 128
    return torch.as_tensor(points.astype(np.float32))


@torch.inference_mode()
def outputs(net):
    lms5 = five_points(landmarks())
    matrix = similarity(lms5, torch.as_tensor(TEMPLATE))
    warped = align(golden_fill.drawn_picture("csim.image", (1, 3, 256, 256), -1, 1), matrix)
    return {"embedding_of_gray": net(golden_fill.drawn_picture("csim.gray", (2, 1, 128, 128), -1, 1)), "lms5": lms5, "M": matrix,
            "warped": warped, "gray_of_warped": grey_of(warped), "embedding_of_warped": net(grey_of(warped))}


def test_golden(net): golden_fill.golden_on_threads(NAME, lambda: outputs(net))


def test_a_broken_layer_fails(net):
    before = net.layer2[0].prelu.forward
    net.layer2[0].prelu.forward = lambda x: before(x)*1.001
    try: assert max(golden_fill.beyond(NAME, outputs(net)).values()) > 1
    finally: del net.layer2[0].prelu.forward


def test_other_seeds_and_batches(net):
    x = torch.randn(3, 1, 128, 128, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(): torch.testing.assert_close(net(x), torch.cat([net(i[None]) for i in x]), rtol=1e-4, atol=1e-5)
    assert ArcFace18(64).eval()(torch.rand(2, 1, 64, 64)).shape == (2, 512)


def test_alignment_is_exact():
    "Any similarity is undone: against a least-squares solution by numpy."
    rng = np.random.default_rng(0)
    points = (rng.normal(size=(4, 5, 2))*40 + 100).astype(np.float32)
    found = similarity(torch.from_numpy(points), torch.from_numpy(TEMPLATE)).numpy()
    for p, m in zip(points, found):
        rows = np.concatenate([[[x, -y, 1, 0], [y, x, 0, 1]] for x, y in p])
        a, b, x, y = np.linalg.lstsq(rows.astype(float), TEMPLATE.astype(float).ravel(), rcond=None)[0]
        np.testing.assert_allclose(m, [[a, -b, x], [b, a, y]], atol=2e-4)
    same = torch.eye(2, 3)[None]
    image = torch.rand(1, 3, 20, 30)
    torch.testing.assert_close(align(image, same, 20), image[..., :20], atol=1e-5, rtol=0)


def test_csim(net):
    rng = np.random.default_rng(0)
    pictures, points = rng.integers(0, 256, (3, 200, 220, 3), np.uint8), landmarks().numpy().repeat(3, 0)*.8
    assert np.allclose(csim(net, pictures, pictures, points), 1, atol=1e-5)
    one = csim(net, pictures, pictures[:1], points)
    assert one.shape == (3,) and one[0] > .9999 > one[1:].max()
    assert embed(net, pictures[:0], points[:0]).shape == (0, 512)
    assert embed(net, pictures, points, batch=2).dtype == np.float32
    assert (embed(net, pictures, points, half=True)*embed(net, pictures, points)).sum(1).min() > .999


@pytest.mark.parametrize("seed", [1, 2])
def test_beside_gfpgans(seed):
    "The same network comes with the gfpgan package, which trains with it: other weights."
    pytest.importorskip("torchvision")
    restore._provide_functional_tensor()
    theirs = pytest.importorskip("gfpgan.archs.arcface_arch").ResNetArcFace("IRBlock", [2, 2, 2, 2], use_se=False).eval()
    ours = golden_fill.fill_otherwise(ArcFace18(), NAME, seed=seed)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = golden_fill.drawn_picture(f"csim {seed}", (2, 1, 128, 128), -1, 1)
    with torch.inference_mode(): torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_the_authors_file(net, tmp_path, monkeypatch):
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path))
    with pytest.raises(InputError, match="arcface_resnet18.pth"): load_arcface18()
    torch.save({f"module.{k}": v for k, v in net.state_dict().items()}, tmp_path/"resnet18_110.pth")
    assert add_weight(tmp_path/"resnet18_110.pth")[0] == "arcface18"
    for loaded in (load_arcface18(), load_arcface18(tmp_path/"resnet18_110.pth")):
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values()))
