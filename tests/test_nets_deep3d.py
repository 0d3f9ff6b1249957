"Deep3DFaceRecon's network: equal to the public implementation; fails when broken; loads the authors' file; crops as it learned."
import golden_fill
import numpy as np
import pytest
import torch

from ophav_nb.nets.deep3d import (MEAN_FACE, SPLIT, Deep3D, coefficient_distances, coefficients, face_crop, load_deep3d,
                                  orthographic, split_coefficients)
from ophav_nb.run import InputError
from ophav_nb.weights import add_weight

NAME = "deep3dfacerecon_resnet50"


@pytest.fixture(scope="module")
def net(): return golden_fill.fill_golden(Deep3D(), NAME)


@torch.inference_mode()
def outputs(net):
    feature = net.features(golden_fill.drawn_picture("deep3d", (2, 3, 224, 224)))
    return {"coeffs": net.heads(feature), "feature": feature}


def test_golden(net): golden_fill.golden_on_threads(NAME, lambda: outputs(net))


def test_a_broken_layer_fails(net):
    heads = net.final_layers
    net.final_layers = torch.nn.ModuleList([*heads[:5], heads[6], heads[5]])   # z before x and y
    try: assert max(golden_fill.beyond(NAME, outputs(net)).values()) > 1
    finally: net.final_layers = heads


def test_other_seeds_sizes_and_batches(net):
    x = torch.rand(2, 3, 160, 128, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(): torch.testing.assert_close(net(x), torch.cat([net(i[None]) for i in x]), rtol=1e-4, atol=1e-5)


def test_split():
    parts = split_coefficients(torch.arange(257.)[None])
    assert {k: v.shape[1] for k, v in parts.items()} == SPLIT
    known = golden_fill.manifest(NAME)["meta"]["config"]["split"]
    names = dict(id="identity", exp="expression", tex="texture", angle="angles", gamma="light", trans="translation")
    assert all(parts[names[k]][0, 0] == a and parts[names[k]][0, -1] == b - 1 for k, (a, b) in known.items())


def test_camera_of_five_points():
    "A turned, scaled, shifted mean face gives its scale and shift back."
    a = .4
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0]])
    shift, scale = orthographic((70*MEAN_FACE @ turn.T + (30, 40)).astype(np.float32))
    np.testing.assert_allclose([*shift, scale], [30, 40, 70], rtol=1e-3)


def test_crops():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (240, 300, 3), np.uint8)
    points = np.c_[MEAN_FACE[:, 0], -MEAN_FACE[:, 1]]*102 + (150, 119)     # one unit is 102 pixels: nothing is resized
    crop = face_crop(image, points)
    np.testing.assert_allclose(crop.permute(1, 2, 0)*255, image[8:232, 38:262], atol=.01)
    assert face_crop(image, points - (140, 0))[:, :, 0].max() == 0          # beyond the picture
    with pytest.raises(InputError, match="on one spot"): face_crop(image, np.ones((5, 2)))


def test_coefficients(net):
    images = np.random.default_rng(0).integers(0, 256, (3, 120, 120, 3), np.uint8)
    landmarks = np.zeros((3, 68, 2), np.float32)
    for (i, *more), p in zip(((36, 39), (42, 45), (30,), (48,), (54,)), np.c_[MEAN_FACE[:, 0], -MEAN_FACE[:, 1]]*60 + (60, 50)): landmarks[:, [i, *more]] = p
    found = coefficients(net, images, landmarks, batch=2)
    assert found.shape == (3, 257) and found.dtype == np.float32 and coefficients(net, images[:0], landmarks[:0]).shape == (0, 257)
    assert np.abs(coefficients(net, images, landmarks, half=True) - found).max() < .05*np.abs(found).max()
    far = coefficient_distances(found, np.roll(found, 1, 0))
    assert np.allclose(far["aed_sum"], 64*far["aed_mean"], rtol=1e-4) and (far["apd_length"] >= far["apd_angles_length"]).all()
    assert all((v == 0).all() for v in coefficient_distances(found, found).values())


def test_the_authors_file(net, tmp_path, monkeypatch):
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path))
    with pytest.raises(InputError, match="epoch_20.pth"): load_deep3d()
    torch.save({"net_recon": net.state_dict(), "opt_00": {"state": {}}}, tmp_path/"epoch_20.pth")
    assert add_weight(tmp_path/"epoch_20.pth")[0] == "deep3d"
    for loaded in (load_deep3d(), load_deep3d(tmp_path/"epoch_20.pth")):
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values()))


@pytest.mark.parametrize("seed, size", [(1, (224, 224)), (2, (97, 130))])
def test_beside_torchvision(seed, size):
    "The backbone is torchvision's ResNet-50: other weights, other sizes."
    theirs = pytest.importorskip("torchvision.models").resnet50(weights=None)
    theirs.fc = torch.nn.Identity()
    ours = golden_fill.fill_otherwise(Deep3D(), NAME, seed=seed)
    theirs.load_state_dict(ours.backbone.state_dict(), strict=True)
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode(): torch.testing.assert_close(ours.features(x).flatten(1), theirs.eval()(x), rtol=1e-5, atol=1e-5)
