"RetinaFace: heads, anchors and faces equal to the public implementation; fails when broken; loads the authors' file."
import golden_fill
import numpy as np
import pytest
import torch

from ophav_nb.nets.retinaface import MEAN, RetinaFace, anchors, decode, find_faces, load_retinaface
from ophav_nb.run import InputError
from ophav_nb.weights import add_weight

NAME = "retinaface_r50"


@pytest.fixture(scope="module")
def net(): return golden_fill.fill_golden(RetinaFace(), NAME)


@torch.inference_mode()
def outputs(net):
    boxes, faces, points = net(golden_fill.drawn_picture("retinaface", (1, 3, 288, 352), 0, 255) - torch.tensor(MEAN)[:, None, None])
    known = anchors(288, 352).to(boxes.device)
    decoded = decode(boxes[0], points[0], known)
    return {"loc": boxes, "conf": faces, "landms": points, "priors": known, "boxes_decoded": decoded[0], "landms_decoded": decoded[1]}


def test_golden(net): golden_fill.golden_on_threads(NAME, lambda: outputs(net))


def test_a_broken_layer_fails(net):
    layer = net.ssh2.conv5X5_1[2]
    net.ssh2.conv5X5_1[2] = torch.nn.LeakyReLU(.1)
    try: assert max(golden_fill.beyond(NAME, outputs(net)).values()) > 1
    finally: net.ssh2.conv5X5_1[2] = layer


def test_other_sizes_and_batches(net):
    x = torch.randn(2, 3, 100, 130, generator=torch.Generator().manual_seed(1))*60
    with torch.inference_mode(): together, alone = net(x), [net(i[None]) for i in x]
    for i, t in enumerate(together):
        assert t.shape[1] == len(anchors(100, 130))
        torch.testing.assert_close(t, torch.cat([a[i] for a in alone]), rtol=1e-3, atol=1e-4)


def test_finding_faces(net):
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    found = find_faces(net, image, threshold=.55)
    assert found.shape[1] == 15 and len(found) and (found[:, 4] > .55).all() and (np.diff(found[:, 4]) <= 0).all() and found.dtype == np.float32
    assert find_faces(net, image, threshold=.9999).shape == (0, 15)
    assert find_faces(net, image, threshold=.55, half=True).dtype == np.float32


def test_the_authors_file(net, tmp_path, monkeypatch):
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path))
    with pytest.raises(InputError, match="detection_Resnet50_Final.pth"): load_retinaface()
    torch.save({f"module.{k}": v for k, v in net.state_dict().items()}, tmp_path/"a.pth", _use_new_zipfile_serialization=False)
    assert add_weight(tmp_path/"a.pth")[0] == "retinaface"
    assert all(torch.equal(a, b) for a, b in zip(load_retinaface().state_dict().values(), net.state_dict().values()))


@pytest.mark.parametrize("seed, size", [(1, (96, 160)), (2, (101, 70))])
def test_beside_facexlib(seed, size, monkeypatch):
    "Network, anchors and decoding: other weights, other sizes."
    models, retina = pytest.importorskip("torchvision.models"), pytest.importorskip("facexlib.detection.retinaface")
    build = models.resnet50
    monkeypatch.setattr(models, "resnet50", lambda pretrained=False: build(weights=None))
    theirs, ours = retina.RetinaFace("resnet50").eval(), golden_fill.fill_otherwise(RetinaFace(), NAME, seed=seed)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = golden_fill.drawn_picture(f"retinaface {seed}", (1, 3, *size), -110, 140)
    with torch.inference_mode(): found, known = ours(x), theirs(x)
    for a, b in zip(found, known): torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    priors = retina.PriorBox(theirs.cfg, image_size=size).forward()
    torch.testing.assert_close(anchors(*size), priors)
    boxes, points = decode(found[0][0], found[2][0], priors)
    torch.testing.assert_close(boxes, retina.decode(found[0][0], priors, [.1, .2]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(points, retina.decode_landm(found[2][0], priors, [.1, .2]), rtol=1e-4, atol=1e-5)
