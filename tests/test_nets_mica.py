"MICA: recogniser and mapping equal to the public implementation; fails when broken; loads the authors' file."
import golden_fill
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ophav_nb.nets.arcface18 import TEMPLATE
from ophav_nb.nets.mica import ArcFace100, Mapping, Mica, identify, load_mica
from ophav_nb.run import InputError
from ophav_nb.weights import add_weight


@pytest.fixture(scope="module")
def net():
    net = Mica()
    for part in ("arcface", "flameModel"): golden_fill.fill_golden(getattr(net, part), "mica", part)
    return net.eval()


@torch.inference_mode()
def outputs(net):
    x = golden_fill.drawn_picture("mica", (2, 3, 112, 112), -1, 1)
    normalised, shape = net(x)
    return {"embedding": net.arcface(x), "normalised": normalised, "shape": shape}


def test_golden(net): golden_fill.golden_on_threads("mica", lambda: outputs(net))


def test_a_broken_layer_fails(net):
    x = golden_fill.drawn_picture("mica", (2, 3, 112, 112), -1, 1)
    with torch.inference_mode():
        identity = F.normalize(net.arcface(x))
        shape = identity
        for layer in net.flameModel["regressor"].network: shape = F.leaky_relu(layer(shape), .1)
        shape = net.flameModel["regressor"].output(shape)
    assert golden_fill.worst_difference("mica", "shape", shape) > golden_fill.manifest("mica")["outputs"]["shape"]["atol"]


def test_batches(net):
    x = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(1))*2 - 1
    with torch.inference_mode(): together, alone = net(x), [torch.cat(t) for t in zip(*(net(i[None]) for i in x))]
    for a, b in zip(together, alone): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert ArcFace100(64, (1, 1, 1, 1)).eval()(torch.rand(2, 3, 64, 64)).shape == (2, 512)


def test_identify(net):
    images = np.random.default_rng(0).integers(0, 256, (2, 120, 130, 3), np.uint8)
    identity, shape = identify(net, images, np.stack([TEMPLATE, TEMPLATE + 3]), batch=1)
    assert identity.shape == (2, 512) and shape.shape == (2, 300) and np.allclose(np.linalg.norm(identity, axis=1), 1, atol=1e-5)
    x = torch.from_numpy(images[:1, :112, :112]).permute(0, 3, 1, 2)/127.5 - 1     # aligned already: only cut
    with torch.inference_mode(): torch.testing.assert_close(net(x)[1], torch.from_numpy(shape[:1]), rtol=1e-3, atol=1e-3)
    other = identify(net, images, np.stack([TEMPLATE, TEMPLATE + 3]), half=True)[0]
    assert other.dtype == np.float32 and (other*identity).sum(1).min() > .99
    assert identify(net, images[:0], np.zeros((0, 5, 2)))[1].shape == (0, 300)


def test_the_authors_file(net, tmp_path, monkeypatch):
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path))
    with pytest.raises(InputError, match="mica.tar"): load_mica()
    torch.save({"arcface": net.arcface.state_dict(), "flameModel": {**net.flameModel.state_dict(), "generator.v_template": torch.zeros(4, 3)},
                "epoch": 1}, tmp_path/"mica.tar")
    assert add_weight(tmp_path/"mica.tar")[0] == "mica"
    assert all(torch.equal(a, b) for a, b in zip(load_mica().state_dict().values(), net.state_dict().values()))
