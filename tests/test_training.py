"A step in one pass against the same step in torch; Adam with an average against torch's; determinism."
import ophav_nb  # noqa: F401, before torch: it decides about threads
import logging

import numba
import numpy as np
import pytest
import torch

from ophav_nb import training
from ophav_nb.avatar import AvatarConfig, losses
from ophav_nb.deform import Deformer
from ophav_nb.dense import Packed
from ophav_nb.encoding import harmonics, spherical_harmonics
from ophav_nb.field import Field, field_config
from ophav_nb.head import HeadModel
from ophav_nb.render import band_widths, mouth_amount, shade, studio_camera, surface_band
from ophav_nb.training import AveragedAdam, OnePass, Truth, one_pass_serves, portions

SMALL = dict(levels=3, log2_size=9, precision='float32')
SHAPES = [dict(), dict(condition='mouth', condition_rest=1., degree=4, bias=False, density_layers=2, colour_layers=3, surface=0.),    # lean, paper
          dict(condition='none', degree=0, outputs=15, colour_layers=2), dict(condition='mouth', degree=1, width=20, features=2), dict(degree=2, density_layers=0, bias=False),
          dict(width=320, colour_layers=2)]


@pytest.fixture(scope='module')
def scene():
    head = HeadModel.load()
    still = head()[0].numpy()
    talking = head(None, head.expression(jawOpen=.5)[None])[0].numpy()
    deformer = Deformer(head.canonical().numpy(), head.faces, mouth_amount(head, still))
    camera = studio_camera(64)
    band = surface_band(still, head.faces, band_widths(head, still)[1], camera)
    return deformer, deformer.poses(np.stack([still, talking])), camera, band


def batch(scene, R, S, seed=0):
    "Rays of two frames."
    deformer, poses, camera, band = scene
    rng = np.random.default_rng(seed)
    noise = lambda *s: rng.random(s, np.float32)
    pixels = np.sort(rng.choice(np.flatnonzero(band.mask), R))
    o, d = camera.rays(np.stack([pixels % 64 + .5, pixels//64 + .5], 1).astype(np.float32))
    slot = (np.arange(R) >= R//3).astype(np.int32)
    truth = Truth(noise(R, 3), noise(R)*(noise(R) < .7), noise(R, 3), 1 + 2*noise(R), (noise(R) < .7).astype(np.float32), .75 + .1*noise(R))
    return (poses, slot, o, d, np.stack(band.at(pixels)), noise(R, S), noise(2, 16)[slot]), truth


def noisy(changes):
    torch.manual_seed(0)
    field = Field(field_config(**(SMALL | changes)))
    with torch.no_grad():
        field.grid.params.normal_(0, .3)
        if field.config.bias: field.density_network[-1].bias[0] = 2.
    return field


def by_torch(field, deformer, rays, truth, config):
    poses, slot, o, d, limits, jitter, told = rays
    loss, square = losses(*shade(field, deformer, poses, slot, o, d, limits, jitter, torch.from_numpy(told)), truth, config)
    loss.backward()
    return float(loss.detach()), float(square)


@pytest.mark.parametrize('changes', SHAPES)
@pytest.mark.parametrize('R, S', [(150, 12), (37, 7), (3, 200)])
def test_one_pass_is_torchs(scene, changes, R, S):
    field, config = noisy(changes), AvatarConfig(alpha_weight=.5, depth_weight=.1, empty_weight=.3)
    rays, truth = batch(scene, R, S)
    found = OnePass(field, scene[0], config.huber, config.alpha_weight, config.depth_weight, config.empty_weight)(*rays, truth)
    grads = [p.grad.clone() for p in field.parameters()]
    for p in field.parameters(): p.grad = None
    assert found == pytest.approx(by_torch(field, scene[0], rays, truth, config), rel=1e-5)
    for p, g in zip(field.parameters(), grads): torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=2e-5*float(p.grad.abs().max()))


def test_gradients_add_up_and_follow_the_weights(scene):
    field = noisy({})
    step, (rays, truth) = OnePass(field, scene[0]), batch(scene, 50, 12)
    step(*rays, truth)
    once = [p.grad.clone() for p in field.parameters()]
    step(*rays, truth)
    for p, g in zip(field.parameters(), once): torch.testing.assert_close(p.grad, 2*g)
    with torch.no_grad():
        for p in field.parameters(): p.mul_(.5)
    for p in field.parameters(): p.grad = None
    assert step(*rays, truth) == pytest.approx(by_torch(field, scene[0], rays, truth, AvatarConfig()), rel=1e-4)


def test_gradients_that_are_no_numbers_are_left_out(scene):
    "A loss can be finite where its gradients are not: here a layer's outputs are large, and the next one's weights small."
    field = noisy(dict(bias=False))
    with torch.no_grad():
        for k, factor in ((0, 1e6), (-1, 1e-6)): field.density_network[k].weight.mul_(factor)
    step, (rays, truth) = OnePass(field, scene[0]), batch(scene, 50, 12)
    step(*rays, truth)
    once = [p.grad.clone() for p in field.parameters()]
    huge = truth._replace(weight=np.full(50, 1e38, np.float32))
    assert np.isnan(step(*rays, huge)).all()
    assert all(torch.equal(p.grad, g) for p, g in zip(field.parameters(), once))
    assert np.isfinite(by_torch(field, scene[0], rays, huge, AvatarConfig())[0])


def test_the_number_of_threads_does_not_matter(scene):
    rays, truth = batch(scene, 200, 12)
    before, found = numba.get_num_threads(), []
    try:
        for n in {1, before}:
            numba.set_num_threads(n)
            field = noisy({})
            found.append((OnePass(field, scene[0])(*rays, truth), [p.grad for p in field.parameters()]))
    finally: numba.set_num_threads(before)
    assert all(f[0] == found[0][0] and all(torch.equal(a, b) for a, b in zip(f[1], found[0][1])) for f in found)


def test_portions_cover_every_ray():
    slot = np.repeat([4, 0, 9], [100, 3, 41])
    p = portions(slot, 12)
    assert np.concatenate([np.arange(a, b) for a, b in p]).tolist() == list(range(144))
    assert all(len(set(slot[a:b])) == 1 for a, b in p)


def test_who_is_served(caplog):
    training.say_once.cache_clear()
    assert one_pass_serves(Field(field_config(levels=2, log2_size=8)))
    assert not one_pass_serves(Field(field_config(levels=2, log2_size=8, backend='torch')))
    assert not one_pass_serves(Field(field_config(levels=2, log2_size=8)).to('meta'))
    with caplog.at_level(logging.INFO):
        for _ in range(2): assert not one_pass_serves(Field(field_config(levels=2, log2_size=8, precision='bfloat16')))
    assert sum('bfloat16' in r.message for r in caplog.records) == 1


def test_a_frames_code_is_packed():
    torch.manual_seed(0)
    field, code = Field(field_config(levels=2, log2_size=8, appearance=4)), torch.randn(4)
    packed = Packed(field)
    layer, (b, O) = field.colour_network[0], packed.plan.layers[packed.plan.first, [1, 3]]
    np.testing.assert_allclose(packed.told(np.zeros((1, 16)), code[None])[0, 2, :O], (layer.bias + layer.weight[:, -4:] @ code).detach().numpy(), atol=1e-6)


@pytest.mark.parametrize('degree', [1, 2, 3, 4])
def test_harmonics(degree):
    d = torch.nn.functional.normalize(torch.randn(3), dim=0)
    out = np.full((18, 2), 9, np.float32)
    harmonics(*d.numpy(), degree, out, 1, 1)
    np.testing.assert_allclose(out[1:1 + degree**2, 1], spherical_harmonics(d, degree).numpy(), atol=1e-6)
    assert (out[:, 0] == 9).all() and (out[1 + degree**2:, 1] == 9).all()


def test_averaged_adam_is_adam():
    torch.manual_seed(0)
    start = [torch.randn(20_001), torch.randn(5, 7)]
    theirs, ours = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    averages, followed = [t.clone() for t in start], [t.clone() for t in start]
    groups = lambda ps: [dict(params=[ps[0]], lr=.01), dict(params=[ps[1]], lr=.003)]
    a, b = torch.optim.Adam(groups(theirs), eps=1e-15, betas=(.9, .99)), AveragedAdam(groups(ours), averages, eps=1e-15, betas=(.9, .99))
    for _ in range(30):
        for p, q in zip(theirs, ours): p.grad, q.grad = (g := torch.randn_like(p)), g.clone()
        a.step()
        b.step(.05)
        for f, p in zip(followed, theirs): f.lerp_(p.detach(), .05)
    for mine, other in ((ours, theirs), (averages, followed)):
        for p, q in zip(mine, other): torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
    assert not any(p.grad.any() for p in ours)
    for p, q in zip(ours, theirs):
        assert set(b.state[p]) == set(a.state[q]) and float(b.state[p]['step']) == 30
        torch.testing.assert_close(b.state[p]['exp_avg_sq'], a.state[q]['exp_avg_sq'])
