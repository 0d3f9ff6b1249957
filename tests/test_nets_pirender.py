"PIRenderer: equal to the authors' network, its dead layers dead; fails when broken; loads their file; windows and crops."
import golden_fill
import numpy as np
import pytest
import torch

from ophav_nb.nets.pirender import Fine, PIRenderer, animate, crop_parameters, load_pirender, match_crop, pick_coefficients, warp, windows
from ophav_nb.run import InputError
from ophav_nb.weights import add_weight


@pytest.fixture(scope="module")
def net(): return golden_fill.fill_golden(PIRenderer(), "pirender_face")


@torch.inference_mode()
def outputs(net):
    source, told = golden_fill.drawn_picture("pirender.source", (1, 3, 256, 256), -1, 1), golden_fill.drawn_normal("pirender.coeff", (1, 73, 27), 0, .6)
    return net(source, told) | {"warp_stage_image": net(source, told, "warp")["warp_image"]}


def test_golden(net): golden_fill.golden_on_threads("pirender_face", lambda: outputs(net))


def test_a_living_dead_layer_fails(net, monkeypatch):
    monkeypatch.setattr(Fine, "forward", lambda self, x, z: x + self.norm2(self.conv2(self.norm1(self.conv1(x), z)), z))
    shares = golden_fill.beyond("pirender_face", outputs(net))
    assert shares["fake_image"] > 1 and shares["warp_image"] <= 1


def test_other_sizes_and_batches(net):
    g = torch.Generator().manual_seed(1)
    source, told = torch.rand(2, 3, 64, 128, generator=g)*2 - 1, torch.randn(2, 73, 27, generator=g)*.5
    with torch.inference_mode():
        together = net(source, told)
        for i in range(2):
            alone = net(source[i:i + 1], told[i:i + 1])
            for k, t in alone.items(): torch.testing.assert_close(together[k][i:i + 1], t, rtol=1e-3, atol=2e-4)
    assert together["flow_field"].shape == (2, 2, 16, 32) and together["fake_image"].shape == (2, 3, 64, 128)


def test_flow_is_in_cells():
    "A flow of one cell of a quarter map reads four pixels further."
    x = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    moved = warp(x, torch.tensor([1., 0]).view(1, 2, 1, 1).expand(1, 2, 16, 16))
    torch.testing.assert_close((moved - warp(x, torch.zeros(1, 2, 16, 16)))[:, :, 8:-8, 20:40], torch.full((1, 1, 48, 20), 64/15/63), rtol=1e-3, atol=1e-4)


def test_coefficients():
    rng = np.random.default_rng(0)
    vector, crop = rng.normal(size=(4, 257)), rng.normal(size=(4, 3))
    told = pick_coefficients(vector, crop)
    assert told.shape == (4, 73) and told.dtype == np.float32
    np.testing.assert_array_equal(told, np.hstack([vector[:, 80:144], vector[:, 224:227], vector[:, 254:], crop]).astype(np.float32))
    film = torch.arange(5.)[:, None].expand(5, 73)
    window = windows(film, torch.tensor([0, 4]))
    assert window.shape == (2, 73, 27) and window[0, 0].tolist() == [0]*14 + [1, 2, 3] + [4]*10 and window[1, 0, 13:].tolist() == [4]*14
    portrait = told[2].copy()
    portrait[70] *= 3
    scaled = match_crop(portrait, told)
    np.testing.assert_allclose(scaled[:, 70], 3*told[:, 70], rtol=1e-5)
    np.testing.assert_array_equal(np.delete(scaled, 70, 1), np.delete(told, 70, 1))


def test_crop_parameters():
    "Larger faces are scaled less; their middle is where it is, counted from below."
    five = np.array([[100, 100], [150, 101], [125, 130], [105, 155], [146, 155]], np.float32)
    (s, x, y), (s2, x2, y2) = crop_parameters(np.stack([five, 2*five]), 256)
    assert s2 == pytest.approx(s/2, rel=1e-3) and x2 == pytest.approx(2*x, rel=1e-3) and 255 - y2 == pytest.approx(2*(255 - y), rel=1e-3)
    assert 100 < x < 150 and 100 < 255 - y < 155 and crop_parameters(np.zeros((0, 5, 2))).shape == (0, 3)


def test_animate_streams(net):
    rng = np.random.default_rng(0)
    source, told = rng.integers(0, 256, (40, 40, 3), np.uint8), rng.normal(size=(3, 73)).astype(np.float32)*.5
    whole = np.stack(list(animate(net, source, told, batch=3, size=64)))
    assert whole.shape == (3, 64, 64, 3) and whole.dtype == np.uint8
    single = np.stack(list(animate(net, source, told, batch=1, size=64)))
    assert np.abs(whole.astype(int) - single).max() <= 1
    assert (whole[0] != whole[2]).any()


def test_the_authors_file(net, tmp_path, monkeypatch):
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path))
    torch.save({"net_G": {"other": torch.zeros(2)}, "net_G_ema": net.state_dict(), "opt_G": {"state": {}, "param_groups": []}, "current_epoch": 190},
               tmp_path/"checkpoint.pt")
    with pytest.raises(InputError, match="epoch_00190"): load_pirender()
    assert add_weight(tmp_path/"checkpoint.pt")[0] == "pirender"
    for loaded in (load_pirender(), load_pirender(tmp_path/"checkpoint.pt")):
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values()))
    torch.save({"net_G_ema": {"a": torch.zeros(1)}}, tmp_path/"other.pth")
    with pytest.raises(InputError, match="other tensors"): load_pirender(tmp_path/"other.pth")
