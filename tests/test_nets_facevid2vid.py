"face-vid2vid: golden outputs, every tensor, the device guard, checkpoints, driving."
import ophav_nb  # noqa: F401, before torch: it decides about threads
import golden_fill
import numpy as np
import pytest
import torch
from scipy.spatial import ConvexHull

from ophav_nb.nets import blocks
from ophav_nb.nets.facevid2vid import (PARTS, FaceVid2Vid, HeadState, best_start, drive, estimate, head_state, keypoints, load_facevid2vid,
                                       rotation)
from ophav_nb.run import InputError
from ophav_nb.weights import add_weight

NAME = 'facevid2vid_256'
IMAGES = ('source', 'initial', 'driving')


@pytest.fixture(scope='module')
def network():
    net = FaceVid2Vid()
    for part in PARTS: golden_fill.fill_golden(net.get_submodule(part), NAME, part)
    return net


@pytest.fixture(scope='module')
def pictures(): return {k: golden_fill.drawn_picture(f'facevid2vid.{k}', (1, 3, 256, 256)) for k in IMAGES}


def seen_outputs(net, pictures):
    "What the estimators see, by the names of the golden outputs."
    raw = {k: net.he_estimator.scores(x) for k, x in pictures.items()}
    states = {k: head_state(r) for k, r in raw.items()}
    canonical = net.kp_detector(pictures['source'])
    out = {f'he.{k}.{a}': v for k, r in raw.items() for a, v in r.items()} | {'kp_canonical': canonical}
    out |= {f'degrees.{k}': torch.stack([s.yaw, s.pitch, s.roll], 1) for k, s in states.items()}
    kp = {k: keypoints(canonical, s) for k, s in states.items()}
    out |= {f'kp_{k}': v for k, v in kp.items()}
    out['kp_freeview_y20_p5_r-10'] = keypoints(canonical, states['driving'], 20., 5., -10.)
    out['kp_norm_relative_adapt'] = drive(kp['source'], kp['driving'], kp['initial'])
    return out


def formula_outputs():
    "The formulas alone, on fabricated heads."
    pose, shift = golden_fill.drawn_normal('facevid2vid.f_pose', (3, 3, 66), 0, 2.), golden_fill.drawn_normal('facevid2vid.f_t', (3, 3), 0, .1)
    exp, canonical = golden_fill.drawn_normal('facevid2vid.f_exp', (3, 45), 0, .05), golden_fill.drawn_normal('facevid2vid.f_kp', (1, 15, 3), 0, .3)
    s = head_state(dict(yaw=pose[:, 0], pitch=pose[:, 1], roll=pose[:, 2], t=shift, exp=exp))
    kp = dict(zip(IMAGES, keypoints(canonical, s).split(1)))
    out = {f'formula.kp_{k}': v for k, v in kp.items()} | {'formula.degrees': torch.stack([s.yaw, s.pitch, s.roll], 1)}
    out['formula.kp_freeview_y20_p5_r-10'] = keypoints(canonical, s[2], 20., 5., -10.)
    out['formula.kp_freeview_y20_only'] = keypoints(canonical, s[2], yaw=20.)
    out['formula.kp_norm_relative_adapt'] = drive(kp['source'], kp['driving'], kp['initial'])
    out['formula.kp_norm_relative'] = drive(kp['source'], kp['driving'], kp['initial'], adapt=False)
    out['formula.kp_norm_absolute'] = drive(kp['source'], kp['driving'])
    out['rotation_matrix'] = rotation(*torch.tensor([[30., -12, 7], [-20, 5, -33]]).T)
    return out


def made_outputs(net, pictures):
    "What the generator makes."
    source = golden_fill.drawn_uniform('facevid2vid.g_kp_source', (1, 15, 3), -.7, .7)
    driving = source + golden_fill.drawn_normal('facevid2vid.g_kp_driving', (1, 15, 3), 0, .1)
    out, hooks = {}, []
    for name in ['fc', *[f'G_middle_{i}' for i in range(6)], 'up_0', 'up_1']:
        keep = lambda module, inputs, value, name=name: out.__setitem__(f'dec.{name}', value)
        hooks.append(net.generator.decoder.get_submodule(name).register_forward_hook(keep))
    image, flow = net.generator(pictures['source'], driving, source)
    for hook in hooks: hook.remove()
    return out | {'gen.prediction': image, 'gen.mask': flow.mask, 'gen.deformation': flow.deformation, 'gen.occlusion_map': flow.occlusion}


def test_formulas():
    out = formula_outputs()
    shares = {k: golden_fill.worst_difference(NAME, k, v)/golden_fill.manifest(NAME)['outputs'][k]['atol'] for k, v in out.items()}
    assert max(shares.values()) <= 1, shares


@torch.inference_mode()
@pytest.mark.parametrize('threads', [2, pytest.param(1, marks=pytest.mark.slow)])
def test_golden(network, pictures, threads):
    "The authors' networks, filled by rule, give their outputs: all of them."
    golden_fill.golden_on_threads(NAME, lambda: seen_outputs(network, pictures) | formula_outputs() | made_outputs(network, pictures), [threads])


def small(seed=0):
    "The same networks with few channels and keypoints, untrained."
    torch.manual_seed(seed)
    return FaceVid2Vid(width=8, keypoints=4).eval()


@torch.inference_mode()
def test_other_sizes_and_batches():
    net, g = small(), torch.Generator().manual_seed(1)
    kp = torch.rand(2, 4, 3, generator=g) - .5
    image = torch.rand(1, 3, 128, 256, generator=g)
    volume = net.generator.volume(image)
    assert volume.shape == (1, 32, 16, 32, 64)
    pictures, flow = net.generator.render(volume, kp, kp[:1])
    assert pictures.shape == (2, 3, 128, 256) and 0 <= pictures.min() and pictures.max() <= 1
    assert flow.mask.sum(1).sub(1).abs().max() < 1e-5
    some = net.generator(image, kp[1:], kp[:1])[0]       # a frame does not depend on its batch
    torch.testing.assert_close(some, pictures[1:], atol=2e-5, rtol=0)


@torch.no_grad()
def test_broken_layers_show():
    "Any layer that changes changes what comes out, also after the network was used (no stale weight is kept); mended, all is as before."
    net, g = small(), torch.Generator().manual_seed(2)
    image, kp = torch.rand(2, 3, 128, 128, generator=g), torch.rand(2, 4, 3, generator=g) - .5   # torch is slow with one small volume
    ask = {'kp_detector': lambda: net.kp_detector(image), 'he_estimator': lambda: torch.cat(list(net.he_estimator.scores(image).values()), 1),
           'generator': lambda: net.generator(image, kp + .1, kp)[0].logit()}
    before = {k: f() for k, f in ask.items()}
    for part in ('kp_detector.kp.weight', 'kp_detector.down.weight', 'he_estimator.fc_roll.bias', 'he_estimator.block3.b3_1.conv2.weight',
                 'generator.dense_motion_network.mask.weight', 'generator.resblocks_3d.3dr4.conv1.weight', 'generator.third.norm.running_var',
                 'generator.decoder.up_1.conv_s.weight_orig', 'generator.decoder.G_middle_3.conv_1.weight_u', 'generator.decoder.up_0.norm_0.mlp_shared.0.weight'):
        tensor, name = net.state_dict()[part], part.split('.')[0]
        kept = tensor.clone()
        tensor.add_(tensor.abs().mean() + .1)
        assert not torch.allclose(before[name], ask[name](), atol=1e-7, rtol=0), part
        tensor.copy_(kept)
    assert all(torch.equal(before[k], f()) for k, f in ask.items())


def test_hull():
    cloud = torch.randn(20, 15, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(blocks.hull_volume(cloud), torch.tensor([ConvexHull(p).volume for p in cloud.numpy()]), rtol=1e-5, atol=0)


def test_spectral_convolution():
    "As torch's own spectral norm in evaluation; gradients reach the weight; the kept weight follows what it is made of."
    torch.manual_seed(0)
    theirs, x = torch.nn.utils.spectral_norm(torch.nn.Conv2d(5, 7, 3, padding=1)), torch.randn(2, 5, 8, 8)
    for _ in range(50): theirs(x)      # training finds the singular vectors
    theirs.eval()
    ours = blocks.SpectralConv(5, 7).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).sum().backward()
    assert ours.weight_orig.grad is not None
    with torch.inference_mode():
        assert ours.weight is ours.weight
        torch.testing.assert_close(ours(x), theirs(x))
    old = {k: v for k, v in theirs.state_dict().items() if k != 'weight_v'}      # before torch 1.0
    ours.load_state_dict(old, strict=True)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-3, rtol=1e-3)


def test_drive_and_start():
    g = torch.Generator().manual_seed(0)
    source, film = torch.randn(1, 15, 3, generator=g), torch.randn(4, 15, 3, generator=g)
    torch.testing.assert_close(drive(source, film[:1], film[:1]), source)                 # the start is the source
    torch.testing.assert_close(drive(source, film), film)                                 # absolute
    change = drive(source, 4*film, 4*film[:1]) - source                                   # the root of a volume grows faster than a length
    torch.testing.assert_close(2*change, drive(source, film, film[:1]) - source, atol=1e-4, rtol=1e-4)
    points = np.random.default_rng(0).normal(size=(5, 478, 3))
    assert best_start(points[3]*2 + 5, points) == 3


def test_free_view_replaces_single_angles():
    g = torch.Generator().manual_seed(0)
    state, kp = HeadState(*(20*torch.randn(3, 2, generator=g)), torch.zeros(2, 3), torch.zeros(2, 15, 3)), torch.randn(1, 15, 3, generator=g)
    turned = HeadState(torch.full((2,), 30.), state.pitch, state.roll, state.shift, state.expression)
    torch.testing.assert_close(keypoints(kp, state, yaw=30.), keypoints(kp, turned))
    torch.testing.assert_close(keypoints(kp, state, 0., 0., 0.), kp.expand(2, -1, -1))


def test_film_through_the_estimator_in_pieces():
    net = small()
    film = [np.random.default_rng(i).integers(0, 256, (80, 80, 3), np.uint8) for i in range(5)]
    whole, pieces = estimate(net, iter(film), batch=5), estimate(net, iter(film), batch=2)
    for name in HeadState.__dataclass_fields__:
        torch.testing.assert_close(getattr(whole, name), getattr(pieces, name), atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match='no frames'): estimate(net, iter([]))


def test_missing_weights_say_where(monkeypatch, tmp_path):
    monkeypatch.setenv('OPHAV_HOME', str(tmp_path))
    with pytest.raises(InputError, match='ophav weights add'): load_facevid2vid()


@pytest.mark.parametrize('antialias', [True, False])
def test_official_container(monkeypatch, tmp_path, antialias):
    "A checkpoint as its authors write it, half precision, with a discriminator and an optimiser, through the cache into the network."
    monkeypatch.setenv('OPHAV_HOME', str(tmp_path/'home'))
    with torch.device('meta'): shapes = FaceVid2Vid(kp_scale=.25 if antialias else 1.)
    zeros = lambda m: {k: torch.full(t.shape, .5, dtype=torch.float16 if t.is_floating_point() else t.dtype) for k, t in m.state_dict().items()}
    file = tmp_path/'00000189-checkpoint.pth.tar'
    torch.save({**{p: zeros(shapes.get_submodule(p)) for p in PARTS}, 'discriminator': {'x': torch.ones(2)}, 'epoch': 189,
                'optimizer_generator': {'state': {}, 'param_groups': [{'lr': 2e-4, 'params': [0]}]}}, file)
    name, path = add_weight(file)
    assert name == 'facevid2vid'
    net = load_facevid2vid()
    assert net.kp_detector.kp.weight.dtype == torch.float32 and not net.training and (net.generator.fourth.weight == .5).all()
    if not antialias: return
    tensors = {k: v for k, v in __import__('safetensors.torch').torch.load_file(path).items() if k != 'generator.fourth.bias'}
    with pytest.raises(InputError, match='other tensors'):
        torch.save(tensors, tmp_path/'short.pth')
        load_facevid2vid(tmp_path/'short.pth')
