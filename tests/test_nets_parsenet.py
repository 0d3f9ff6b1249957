"ParseNet: equal to the authors' network; fails when broken; loads their file; the mask that faces are pasted by."
import golden_fill
import numpy as np
import pytest
import torch

from ophav_nb.nets import parsenet
from ophav_nb.nets.parsenet import CLASSES, ParseNet, load_parsenet, paste_mask, soften
from ophav_nb.run import InputError
from ophav_nb.weights import add_weight


@pytest.fixture(scope="module")
def net(): return golden_fill.fill_golden(ParseNet(), "parsenet_512")


def outputs(net):
    x = golden_fill.drawn_picture("parsenet", (1, 3, 512, 512), -1, 1)
    with torch.inference_mode(): return dict(zip(("mask_logits", "image"), net(x)))


@pytest.mark.parametrize("threads", [(2,), pytest.param((1,), marks=pytest.mark.slow)])
def test_golden(net, threads):
    golden_fill.golden_on_threads("parsenet_512", lambda: outputs(net), threads)


def test_a_broken_layer_fails(net):
    net.body[4].conv1.conv2d.padding_mode = "zeros"
    try: assert max(golden_fill.beyond("parsenet_512", outputs(net)).values()) > 1
    finally: net.body[4].conv1.conv2d.padding_mode = "reflect"


def test_other_sizes_and_batches(net):
    x = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))*2 - 1
    with torch.inference_mode():
        together = net(x)
        alone = [torch.cat(parts) for parts in zip(*(net(i[None]) for i in x))]
    assert [list(t.shape) for t in together] == [[2, 19, 64, 96], [2, 3, 64, 96]]
    for a, b in zip(together, alone): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_first_layers_by_the_authors_statistics(net):
    "Mean, deviation and largest value of two early layers, seen in the authors' network: quick, and it sees the border."
    with torch.inference_mode():
        x = net.encoder[0](golden_fill.drawn_picture("parsenet", (1, 3, 512, 512), -1, 1))
        for t, known in ((x, (.001360293, .4271568, 3.018317)), (net.encoder[1].shortcut_func(x), (-.002295076, .5384596, 3.362221))):
            np.testing.assert_allclose([t.mean(), t.std(correction=0), t.abs().max()], known, atol=2e-6)


def test_paste_mask(monkeypatch):
    "Head, but not its hat and clothes; soft, with a clear frame."
    small = ParseNet(width=4, most=4, depth=1).eval()
    small.features = lambda x: x
    scores = torch.zeros(1, 19, 128, 128)
    for name, rows in (("skin", slice(40, 60)), ("hair", slice(20, 40)), ("hat", slice(0, 20)), ("cloth", slice(60, 128))):
        scores[:, CLASSES.index(name), rows] = 1
    small.out_mask_conv.forward = lambda x: scores
    monkeypatch.setattr(parsenet, "soften", lambda mask: soften(mask, (.2,)*5))
    mask, = paste_mask(small, np.zeros((1, 128, 128, 3), np.uint8))
    assert mask.dtype == np.float32 and (mask[25:55, 10:-10] > .999).all()
    assert not mask[:15].any() and not mask[65:].any() and not mask[:, :10].any() and not mask[:, -10:].any()
    assert 0 < mask[60, 64] < 1


def test_soften_is_a_gaussian():
    x = torch.zeros(1, 256, 256)
    x[0, 128, 128] = 1
    y = soften(x)[0].numpy()
    i = np.arange(256) - 128
    gauss = np.exp(-i**2/(2*2*11**2))/np.sqrt(2*np.pi*2*11**2)   # two blurs: variances add
    np.testing.assert_allclose(y, np.outer(gauss, gauss), atol=1e-7)


def test_the_authors_file(net, tmp_path, monkeypatch):
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path))
    torch.save(net.state_dict(), tmp_path/"parsing_parsenet.pth")
    with pytest.raises(InputError, match="parsing_parsenet.pth"): load_parsenet()
    assert add_weight(tmp_path/"parsing_parsenet.pth")[0] == "parsenet"
    load_parsenet()
    loaded = load_parsenet(tmp_path/"parsing_parsenet.pth")
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values()))
    torch.save({"a": torch.zeros(1)}, tmp_path/"other.pth")
    with pytest.raises(InputError, match="other tensors"): load_parsenet(tmp_path/"other.pth")


def test_beside_facexlib():
    "The same network as facexlib's, other weights, another size."
    theirs = pytest.importorskip("facexlib.parsing.parsenet").ParseNet(in_size=512, out_size=512, parsing_ch=19).eval()
    ours, g = ParseNet(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, t in ours.state_dict().items():
            if name.endswith("running_var"): t.copy_(1 + torch.rand(t.shape, generator=g))
            elif t.ndim > 1: t.copy_(torch.randn(t.shape, generator=g)/t[0].numel()**.5)
            elif t.is_floating_point(): t.add_(.1*torch.randn(t.shape, generator=g))
    theirs.load_state_dict(ours.eval().state_dict(), strict=True)
    x = torch.randn(1, 3, 64, 96, generator=g)
    with torch.inference_mode():
        for a, b in zip(ours(x), theirs(x)): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
