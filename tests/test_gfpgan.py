"GFPGAN through its package: the real size against golden data, a tiny one for the ways around it."
import importlib.util
import sys

import golden_fill
import numpy as np
import pytest
import torch

from ophav_nb.encoding import device_guard
from ophav_nb.geometry import facing_camera
from ophav_nb.detect import CODES
from ophav_nb.nets.blocks import at_half_precision
from ophav_nb.nets.parsenet import CLASSES, ParseNet
from ophav_nb.restore import EYES, OVAL, TEMPLATE, FrameContext, GfpganRestorer, gfpgan_network, load_gfpgan, make_restorer, to_template
from ophav_nb.run import InputError

TINY = dict(out_size=64, num_style_feat=32, channel_multiplier=1, num_mlp=2, narrow=.125)
installed = pytest.mark.skipif(not importlib.util.find_spec('gfpgan'), reason='the extra [pretrained] is not installed')


@pytest.fixture(scope='module')
def tiny():
    "Untrained, but with noise that counts."
    torch.manual_seed(0)
    network = gfpgan_network(**TINY)
    with torch.no_grad():
        for name, t in network.named_parameters():
            if 'style_conv' in name and t.shape == (1,): t.fill_(.3)
    return network


def context(size=96, scale=.18):
    "A face whose five points stand as FFHQ's do, in an oval of landmarks."
    points = np.zeros((478, 2), np.float32)
    for ring, eye in zip((EYES['right'], EYES['left']), TEMPLATE[:2]): points[ring] = eye
    points[[468, 473, 4, 61, 291]] = TEMPLATE
    a = np.linspace(0, 2*np.pi, len(OVAL), endpoint=False)
    points[OVAL] = np.c_[256 + 150*np.sin(a), 290 - 190*np.cos(a)]
    return FrameContext(np.zeros((3, 3), np.float32), facing_camera(100., size, size), points*scale)


def render(size=96):
    y, x = np.mgrid[:size, :size]
    head = (x - 46)**2/40**2 + (y - 50)**2/46**2 < 1
    return np.dstack([x*2, y*2, x + y, head*255]).astype(np.uint8)


@installed
@pytest.mark.parametrize('threads', [2, pytest.param(1, marks=pytest.mark.slow)])
def test_golden(threads):
    "The authors' network, filled by rule, gives their outputs."
    known = golden_fill.manifest('gfpgan_v14')
    part = known['parts']['']
    network = gfpgan_network()
    shapes = {k: list(t.shape) for k, t in network.state_dict().items()}
    assert shapes == {k: shape for k, (shape, _) in part['state_dict'].items()}
    golden_fill.fill(network, part['rules'], part['gain'])
    assert golden_fill.fingerprint(network) == part['fill_crc32']
    codes = []
    network.final_linear.register_forward_hook(lambda module, inputs, output: codes.append(output))
    def outputs():
        with torch.no_grad(): image, rgbs = network(golden_fill.drawn_picture('gfpgan', (1, 3, 512, 512), -1, 1), return_rgb=True, randomize_noise=False)
        return {'image': image, 'style_code': codes[-1], **{f'out_rgbs.{k}': t for k, t in enumerate(rgbs)}}
    golden_fill.golden_on_threads('gfpgan_v14', outputs, [threads])


@installed
def test_one_device():
    def step(device):
        with device: network = gfpgan_network(**TINY)
        network(torch.rand(1, 3, 64, 64, device=device), return_rgb=False, randomize_noise=False)[0].sum().backward()
    device_guard(step)


@installed
def test_only_the_face_changes(tiny):
    before, frame = render(), context()
    after = GfpganRestorer(tiny)(before, frame)
    changed = (after != before).any(-1)
    x, y = TEMPLATE[2]*.18
    assert changed[int(y), int(x)] and not changed[:8].any() and not changed[before[..., 3] == 0].any()
    assert (after[..., 3] == before[..., 3]).all()
    assert (GfpganRestorer(tiny, strength=0.)(before, frame) == before).all()


@installed
def test_deterministic(tiny):
    stored, seeded, other = (GfpganRestorer(tiny, seed=seed) for seed in (None, 1, 2))
    torch.manual_seed(5); state = torch.get_rng_state()
    once = [r(render(), context()) for r in (stored, seeded, other)]
    assert torch.equal(torch.get_rng_state(), state)       # nobody else's random numbers are touched
    torch.manual_seed(6)
    again = [r(render(), context()) for r in (stored, seeded, other)]
    assert all((a == b).all() for a, b in zip(once, again))
    assert (once[1] != once[2]).any()


class Same(torch.nn.Module):
    "A network that changes nothing, or paints all grey."
    log_size = 8
    def __init__(self, grey=False): super().__init__(); self.p, self.grey = torch.nn.Parameter(torch.zeros(1)), grey
    def forward(self, x, **_): return x*(not self.grey), []


def test_five_points_come_to_the_template():
    A = to_template(context().landmarks, 256)
    points = np.c_[(TEMPLATE*.18), np.ones(5)] @ A.T
    np.testing.assert_allclose(points, (TEMPLATE + .5)/2, atol=.3)     # pixels of a picture count from 0, of the landmarks from the edge


def painted(**how):
    "Where a grey face is pasted."
    before = render()
    return (GfpganRestorer(Same(grey=True), **how)(before, context()) != before).any(-1), before[..., 3] > 250


def test_masks(monkeypatch):
    "The oval leaves hair alone; our parsing and ParseNet take the head and leave clothes alone."
    from ophav_nb import restore
    oval, inside = painted()
    monkeypatch.setattr(restore, 'parsing', lambda points, alpha: np.where(np.arange(96)[:, None] < 60, CODES['hair'], CODES['cloth'])*(alpha > .5))
    ours, _ = painted(mask='parsing')
    assert oval[50, 46] and ours[50, 46] and not oval[8:12, 46].any() and ours[10:12, 46].all() and not ours[60:].any() and not ours[~inside].any()
    net = ParseNet(width=4, most=4, depth=1).eval()
    scores = torch.zeros(1, 19, 512, 512)
    scores[:, CLASSES.index('hair'), :300] = 1
    scores[:, CLASSES.index('cloth'), 300:] = 1
    monkeypatch.setattr(net.out_mask_conv, 'forward', lambda x: scores)
    theirs, _ = painted(mask='parsenet', parser=net)
    edge = int(300*.18)
    assert theirs[30, 46] and theirs[edge - 8, 46] and not theirs[edge + 10:].any() and not theirs[~inside].any()
    with pytest.raises(InputError, match='oval, parsing, parsenet'): painted(mask='hull')


@installed
def test_half_precision(tiny):
    whole = GfpganRestorer(tiny)(render(), context()).astype(int)
    half = GfpganRestorer(tiny, half=True)(render(), context())
    with at_half_precision(): switched = GfpganRestorer(tiny)(render(), context())
    assert (half == switched).all() and (half != whole).any() and np.abs(half - whole).mean() < 3


def test_other_networks_have_their_place():
    "CodeFormer or RestoreFormer++: one method."
    class Darker(GfpganRestorer):
        def restore_face(self, face): return face*.5
    before = render()
    after = Darker(torch.nn.Linear(1, 1), size=128)(before, context())
    assert after[50, 46, 0] < before[50, 46, 0] and (after[..., 3] == before[..., 3]).all()


@installed
def test_alignment_round_trip(tiny):
    "With a network that changes nothing, the paste gives the render back."
    y, x = np.mgrid[:96, :96]
    smooth = np.dstack([128 + 60*np.sin(x/9), 128 + 60*np.cos(y/9), x + y, 255 + 0*x]).astype(np.uint8)
    assert np.abs(GfpganRestorer(Same())(smooth, context()).astype(int) - smooth).max() <= 4


@installed
def test_checkpoints(tiny, tmp_path):
    good, bad = tmp_path/'good.pth', tmp_path/'bad.pth'
    torch.save({'params_ema': tiny.state_dict()}, good)
    torch.save({'params_ema': {'x': torch.zeros(1)}}, bad)
    loaded = load_gfpgan(good, **TINY)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), tiny.state_dict().values()))
    with pytest.raises(InputError, match='not a GFPGAN'): load_gfpgan(bad, **TINY)
    with pytest.raises(InputError, match='no such file'): make_restorer('gfpgan', checkpoint=tmp_path/'none.pth')


def test_missing_checkpoint_says_where(monkeypatch, tmp_path):
    monkeypatch.setenv('OPHAV_HOME', str(tmp_path))
    with pytest.raises(InputError, match='ophav weights add'): make_restorer('gfpgan')


def test_missing_package_says_what(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gfpgan.archs.gfpganv1_clean_arch', None)
    with pytest.raises(InputError, match=r'3\.11 or 3\.12|pretrained') as caught: gfpgan_network(**TINY)
    assert isinstance(caught.value.__cause__, ImportError)
