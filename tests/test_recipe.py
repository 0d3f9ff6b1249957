"Every switch of the training recipe does what it says."
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import ophav_nb  # noqa: F401
import ophav_nb.avatar as avatar_module
from ophav_nb.avatar import MORE, PATCH, Avatar, AvatarConfig, Batch, Corrections, FramePool, Trainer, losses, patch_loss, read_recipe, toy_film
from ophav_nb.deform import Deformer
from ophav_nb.field import Field, field_config
from ophav_nb.geometry import facing_camera
from ophav_nb.head import HeadModel
from ophav_nb.render import Occupancy, Rendered, shade, surface_band
from ophav_nb.run import InputError
from ophav_nb.training import Truth, one_pass_serves

SMALL = AvatarConfig(rays=128, samples=4, frames=4, field=field_config(levels=4, log2_size=10))
EVERYTHING = replace(SMALL, distortion=.01, patch=.1, pose_rate=1e-4, told_rate=1e-3, occupancy=32, field=replace(SMALL.field, appearance=3, offset=8))


@pytest.fixture(scope='module')
def head(): return HeadModel.load()


@pytest.fixture(scope='module')
def film(head): return toy_film(head, 8, 48, test=2)


def trainer(head, film, steps=10, **changes):
    avatar = Avatar.create(head, film.shape, replace(SMALL, **changes))
    return Trainer(avatar, film, steps, None, None, 0, 1., 1e9, 10**9)


def batch(head, film, **changes):
    avatar = Avatar.create(head, film.shape, replace(SMALL, **changes))
    pool = FramePool(film, avatar.deformer, avatar.widths, avatar.config, avatar.outer)
    return Batch(pool, 0, 0), pool


def test_the_mouths_weight_starts_late(head, film):
    t, seen = trainer(head, film, mouth_weight=7., mouth_start=.5), []
    t.gradients = lambda batch: seen.append(batch.truth.weight.max()) or (0., 0.)
    for t.step in range(10): t.one()
    assert seen == [1]*5 + [7]*5


def test_background(head, film):
    assert (batch(head, film, background='white')[0].truth.background == 1).all()
    assert batch(head, film)[0].truth.background.std() > .2


def test_canonical_jaw(head, film):
    for jaw in (0., 12., 20.):
        a = Avatar.create(head, film.shape, replace(SMALL, jaw=jaw))
        assert np.allclose(a.deformer.canonical, a.head.canonical(jaw=jaw).numpy())


def test_blending_and_scaling(head, film):
    points, posed = film.vertices[3][::7] + np.float32([0, 0, .004]), film.vertices[3]
    place = lambda **changes: Avatar.create(head, film.shape, replace(SMALL, mapping='triangle', **changes)).deformer.to_canonical(points, posed)
    whole, single, unscaled = place(), place(blend=False), place(eye_scale=False)
    assert 1e-5 < np.abs(whole - single).max() < .01 and 1e-5 < np.abs(whole - unscaled).max() < .01


def test_distortion_wants_matter_in_one_place():
    R, zeros = 5, lambda *s: np.zeros(s, np.float32)
    truth = Truth(zeros(R, 3), zeros(R), zeros(R, 3), zeros(R), zeros(R), zeros(R))
    t = torch.linspace(.7, .73, 4).expand(R, 4)
    cost = lambda w: float(losses(Rendered(torch.zeros(R, 3), torch.zeros(R), torch.tensor([w]).expand(R, 4)), t, truth, AvatarConfig(distortion=1.))[0])
    assert cost([.5, .0, .0, .5]) == pytest.approx(1.5, rel=1e-3) and cost([0., 1, 0, 0]) == 0


def test_patches(head, film):
    b, pool = batch(head, film, patch=1.)
    assert len(b.patches) == 4 and len(b.truth.rgb) == SMALL.rays
    corners = b.d[b.patches].reshape(-1, PATCH, PATCH, 3)
    for step in (np.diff(corners, axis=1), np.diff(corners, axis=2)):       # neighbours in the picture: steps of one pixel
        assert np.allclose(np.linalg.norm(step, axis=-1), 1/film.K[0, 0], rtol=1e-2)
    assert (b.truth.background[b.patches] == b.truth.background[b.patches[:, :1]]).all()
    assert len(batch(head, film)[0].patches) == 0
    flat, edge = torch.zeros(1, PATCH**2, 3), (torch.arange(PATCH**2) % PATCH > 1).float()[None, :, None].expand(1, -1, 3)
    assert patch_loss(flat + .3, flat) == 0 and patch_loss(edge, flat) > .3


def test_corrections_have_no_mean(film):
    c = Corrections(np.flatnonzero(film.train), len(film), EVERYTHING)
    for p in c.parameters(): p.data.normal_()
    for kind, size in dict(pose=6, told=16, code=3).items():
        assert c.of(kind, torch.arange(6)).shape == (6, size)
        assert c.of(kind, torch.arange(6)).mean(0).abs().max() < 1e-6
    assert c.rates == dict(pose=1e-4, told=1e-3, code=1e-2)
    assert Corrections(np.arange(6), 8, SMALL).of('pose', torch.arange(6)) is None


@pytest.fixture(scope='module')
def scene(head):
    "A field that varies slowly, seen at the canonical pose, where the way to canonical space is the identity."
    canonical = head.canonical().numpy()
    deformer, camera = Deformer(canonical, head.faces), facing_camera(100, 48, 48)
    camera.c2w[:3, 3] = [0, 0, .8]
    band = surface_band(canonical, head.faces, np.full(len(canonical), .01, np.float32), camera)
    pixels = np.flatnonzero(band.mask)[::9]
    torch.manual_seed(0)
    field = Field(field_config(levels=1, features=8, base=8, condition='none', degree=0, surface=0., precision='float32'))
    field.grid.params.data.normal_()
    o, d = camera.rays(np.stack([pixels % 48 + .5, pixels//48 + .5], 1).astype(np.float32))
    rest = deformer, deformer.poses(canonical), np.zeros(len(o), np.int32)
    return field, rest, o, d, band.at(pixels), np.full((len(o), 6), .5, np.float32), torch.zeros(len(o), 16)


def test_own_pose_is_a_moved_camera(scene):
    field, rest, o, d, *more = scene
    shown = lambda o, **how: shade(field, *rest, o, d, *more, **how)[0]
    t = torch.tensor([.0, 0, 0, .004, -.003, .002])
    moved, pushed, still = shown(o + t[3:].numpy()), shown(o, pose=t.expand(len(o), 6)), shown(o)
    assert (moved.rgb - pushed.rgb).abs().max() < .1*(moved.rgb - still.rgb).abs().max()
    pose = torch.zeros(len(o), 6, requires_grad=True)
    shown(o, pose=pose).rgb.sum().backward()
    assert pose.grad.abs().min(0).values.shape == (6,) and (pose.grad.abs().max(0).values > 0).all()


def test_occupancy_skips_what_was_empty(scene):
    field, rest, o, d, *more = scene
    shown = lambda g: shade(field, *rest, o, d, *more, occupancy=g)[0]
    g = Occupancy(16)
    whole = shown(g)                                           # a look at everything
    assert torch.equal(whole.alpha, shade(field, *rest, o, d, *more)[0].alpha)
    g.opacity[:] = 1
    assert torch.allclose(shown(g).rgb, whole.rgb)
    g.opacity[:] = 0
    assert shown(g).alpha.max() == 0
    x = torch.tensor([[.1, .1, .1], [.9, .9, .9]])
    g = Occupancy(16)
    for _ in range(20): g.follow(x, torch.tensor([0., .5]))
    assert g.wanted(x).tolist() == [False, True]


def test_slope_by_position(scene):
    field, x = scene[0], (.2 + .6*torch.rand(200, 3)).requires_grad_()
    g = torch.randn(200, 8)
    slopes = [torch.autograd.grad((f(x)*g).sum(), x)[0] for f in (field.asked, field.grid)]     # the grid's own: exact, by torch
    assert torch.equal(field.asked(x), field.grid(x.detach()))
    assert ((slopes[0] - slopes[1]).abs().max(1).values < .02*slopes[1].abs().max()).float().mean() > .85     # but for those whose stretch crosses a cell's wall


def test_offsets_begin_at_nothing(scene):
    field, *_ = scene
    torch.manual_seed(0)
    other = Field(replace(field.config, offset=8))
    x = torch.rand(20, 3)
    assert torch.equal(other.moved(x, None), x)
    for p in other.offset_network.parameters(): p.data.normal_()
    far = (other.moved(x, None) - x).abs()
    assert 0 < far.max() <= .02 + 1e-6


def test_everything_at_once_survives_a_kill(head, film, tmp_path):
    one, two = (Avatar.create(head, film.shape, EVERYTHING) for _ in range(2))
    one.fit(film, 12)
    def kill(row):
        if row['step'] == 7: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): two.fit(film, 12, folder=tmp_path/'state', every=0, log_every=1, log=kill)
    two = Avatar.create(head, film.shape, EVERYTHING)
    two.fit(film, 12, folder=tmp_path/'state', every=0, log_every=1)
    assert all(torch.equal(p, q) for p, q in zip(one.shown.parameters(), two.shown.parameters()))
    assert one.field.offset_network[-1].weight.abs().max() > 0
    again = Avatar.load(one.save(tmp_path/'avatar'))
    assert again.config == one.config
    camera = facing_camera(2.2*48, 48, 48)
    assert np.array_equal(*(next(a.render(film.motion, camera, frames=[7])) for a in (one, again)))


def test_who_needs_torch():
    field = Field(SMALL.field)
    assert one_pass_serves(field, AvatarConfig().beside) and AvatarConfig(background='white', jaw=0., mapping='triangle', blend=False).beside == ''
    for change in (dict(distortion=.1), dict(patch=.1), dict(pose_rate=.1), dict(told_rate=.1), dict(occupancy=8)):
        assert not one_pass_serves(field, AvatarConfig(**change).beside)
    assert not one_pass_serves(Field(replace(SMALL.field, offset=8)))


FILLED = replace(SMALL, occupancy=16)


def test_rays_follow_what_the_grid_leaves(head, film, monkeypatch):
    "A step asks the field about as many samples as without a grid, whatever is skipped."
    avatar, asked = Avatar.create(head, film.shape, FILLED), []
    avatar.told_range = np.float32([[-9]*16, [9]*16])
    trainer, budget, forward = Trainer(avatar, film, 40, None, None, 0, 1., 30., 25), SMALL.rays*SMALL.samples, avatar.field.forward
    monkeypatch.setattr(avatar.field, 'forward', lambda x, *more: (asked.append(len(x)), forward(x, *more))[1])
    def step():
        trainer.one()
        trainer.step += 1
        return asked.pop()
    assert trainer.rays == SMALL.rays and step() == budget                     # a look at everything
    half = torch.arange(16**3) % 16 < 16*.55                                   # along z, which cuts through the face
    trainer.occupancy.opacity[half] = 0
    step()                                                                     # what was left out is measured here
    for _ in range(3):
        assert trainer.rays > 1.1*SMALL.rays and .75*budget < step() < 1.3*budget
    trainer.occupancy.opacity[:] = 0
    trainer.occupancy.opacity[-1] = 1                                          # next to nothing is left
    step()
    assert trainer.rays == MORE*SMALL.rays
    trainer.occupancy.steps = 16
    assert trainer.rays == SMALL.rays and step() == budget
    trainer.config = replace(FILLED, fill=False)
    assert trainer.rays == SMALL.rays


def test_the_number_of_rays_survives_a_kill(head, film, tmp_path, monkeypatch):
    taken = []
    def counted(pool, step, *more):
        batch = Batch(pool, step, *more)
        taken.append((step, len(batch.slot)))
        return batch
    monkeypatch.setattr(avatar_module, 'Batch', counted)
    monkeypatch.setattr(avatar_module, 'Occupancy', partial(Occupancy, every=3, decay=.5))       # learns sooner
    one, two = (Avatar.create(head, film.shape, replace(FILLED, field=replace(SMALL.field, surface=8.))) for _ in range(2))
    one.fit(film, 40)
    whole = taken.copy()
    assert len({n for _, n in whole}) > 1
    def kill(row):
        if row['step'] == 38: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): two.fit(film, 40, folder=tmp_path, every=0, log_every=1, log=kill)
    del taken[:]
    two = Avatar.create(head, film.shape, one.config)
    two.fit(film, 40, folder=tmp_path, every=0, log_every=1)
    assert taken == whole[-len(taken):] and all(torch.equal(p, q) for p, q in zip(one.shown.parameters(), two.shown.parameters()))


def test_a_recipe_in_words():
    told = read_recipe(" mouth_weight=40, occupancy=128,condition=mouth , blend=False, degree=0")
    assert told == dict(mouth_weight=40., occupancy=128, condition="mouth", blend=False, degree=0) and read_recipe("") == {}
    made = AvatarConfig.preset("paper", **told)
    assert made == replace(AvatarConfig.preset("paper"), mouth_weight=40., occupancy=128, blend=False, field=field_config("paper", condition="mouth", degree=0))


@pytest.mark.parametrize("text, said", [
    ("levels=400", "levels=400 cannot be; give levels 1 to 32"), ("width=9999", "give width 1 to 1024"), ("appearance=9999", "give appearance 0 to 256"), ("rays=99999999", "give rays at most 1048576"), ("average=1", "below 1"), ("scale=5", "scale=5 with levels=16 and base=16 makes .* give scale 1 to 1.74, or fewer levels"),
    ("occupancy=4096", "give occupancy 0 to 256"), ("average=2", "give average a number from 0 on, below 1"), ("focus=7", "give focus a number from 0 to 1"),
    ("table_rate=1e9", "give table_rate a number above 0, up to 1"), ("network_rate=0", "give network_rate")])
def test_a_recipe_out_of_bounds(text, said):
    with pytest.raises(InputError, match=said): read_recipe(text)
    for fine in ("levels=32, scale=1", "scale=3, levels=4", "levels=1, scale=50", "occupancy=128", "average=0, focus=1"): read_recipe(fine)


@pytest.mark.parametrize("text, said", [("mouth_wait=4", "did you mean mouth_weight"), ("x", "there are alpha_weight, "), ("rays=0", "from 1 on"), ("rays=1.5", "whole number"), ("decay=nan", "number from 0"),
                                        ("blend=maybe", "true or false"), ("condition=all", "mouth, everywhere, none"), ("backend=torch", "no setting"), ("rays", "whole number"),
                                        ("condition_size=8", "no setting"), ("features=3", "recipe: features=3 .*1, 2, 4 or 8"), ("scale=0", "scale=0.0 .*from 1 on"), ("degree=5", "degree=5 .*0 to 4"),
                                        ("log2_size=64", "log2_size=64 .*1 to 24")])
def test_a_recipe_that_is_none(text, said):
    with pytest.raises(InputError, match=said): read_recipe(text)
