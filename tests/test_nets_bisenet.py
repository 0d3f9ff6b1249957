"BiSeNet: equal to the authors' network, whatever the threads; fails when broken; loads their file."
import golden_fill
import numpy as np
import pytest
import torch

from ophav_nb.nets.bisenet import CLASSES, BiSeNet, load_bisenet, parse_faces
from ophav_nb.run import InputError
from ophav_nb.weights import add_weight


@pytest.fixture(scope="module")
def net(): return golden_fill.fill_golden(BiSeNet(), "bisenet_19")


def outputs(net):
    x = net.normalise(golden_fill.drawn_picture("bisenet", (1, 3, 512, 512)))
    with torch.inference_mode(): return dict(zip(("logits", "logits16", "logits32"), net(x)))


def test_golden(net): golden_fill.golden_on_threads("bisenet_19", lambda: outputs(net))


def test_a_broken_layer_fails(net):
    before = net.cp.arm16.conv.forward
    net.cp.arm16.conv.forward = lambda x: before(x) + .01
    try: assert max(golden_fill.beyond("bisenet_19", outputs(net)).values()) > 1
    finally: del net.cp.arm16.conv.forward


def test_other_sizes_and_batches(net):
    x = torch.rand(3, 3, 96, 160, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        together = net(x)
        alone = [torch.cat(parts) for parts in zip(*(net(i[None]) for i in x))]
    for a, b in zip(together, alone):
        assert a.shape == (3, 19, 96, 160)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_parse_frames(net):
    frames = np.random.default_rng(0).integers(0, 256, (5, 64, 48, 3), np.uint8)
    labels = np.stack(list(parse_faces(net, frames, size=64, batch=2)))
    assert labels.shape == (5, 64, 48) and labels.dtype == np.uint8 and labels.max() < len(CLASSES)
    assert (labels == np.stack(list(parse_faces(net, frames, size=64, batch=5)))).mean() > .999


def test_the_authors_file(net, tmp_path, monkeypatch):
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path))
    with pytest.raises(InputError, match="79999_iter.pth"): load_bisenet()
    torch.save(net.state_dict(), tmp_path/"79999_iter.pth")
    assert add_weight(tmp_path/"79999_iter.pth")[0] == "bisenet"
    for loaded in (load_bisenet(), load_bisenet(tmp_path/"79999_iter.pth")):
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values()))
    torch.save({"a": torch.zeros(1)}, tmp_path/"other.pth")
    with pytest.raises(InputError, match="other tensors"): load_bisenet(tmp_path/"other.pth")


def shaken(net, seed):
    "Weights that no other test has."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in net.state_dict().items():
            if name.endswith("running_var"): t.copy_(1 + torch.rand(t.shape, generator=g))
            elif t.ndim > 1: t.copy_(torch.randn(t.shape, generator=g)*1.2/t[0].numel()**.5)
            elif t.is_floating_point(): t.add_(.1*torch.randn(t.shape, generator=g))
    return net.eval()


@pytest.mark.parametrize("size", [(96, 160), (130, 100)])
def test_beside_facexlib(size):
    "The same network as facexlib's, other weights, other sizes."
    theirs = pytest.importorskip("facexlib.parsing.bisenet").BiSeNet(19).eval()
    ours = shaken(BiSeNet(), 3)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(4))
    with torch.inference_mode():
        for a, b in zip(ours(x), theirs(x)): torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)
