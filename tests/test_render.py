"Band, sampling, compositing, and the viewing kernel against the training path."
import numpy as np
import pytest
import torch
from scipy import ndimage as ndi

import ophav_nb  # noqa: F401
from ophav_nb import render
from ophav_nb.deform import Deformer
from ophav_nb.field import Field, field_config
from ophav_nb.geometry import rasterize
from ophav_nb.head import HeadModel
from ophav_nb.render import STRIDE, WORN, _view_fast, along, band_widths, composite, mouth_amount, render_view, sample_depths, studio_camera, surface_band, widen_band

from meshes import lenses


@pytest.fixture(scope='module')
def scene():
    head = HeadModel.load()
    rest = head()[0].numpy()
    loose, widths = band_widths(head, rest)
    return head, rest, loose, widths


def test_band_contains_the_surface(scene):
    from ophav_nb.geometry import rasterize
    head, rest, _, widths = scene
    camera = studio_camera(64, 25)
    band, skin = surface_band(rest, head.faces, widths, camera), rasterize(camera.project(rest.astype(float)), head.faces, 64, 64)
    m = skin.mask
    assert band.mask[m].all() and band.mask.sum() > m.sum()
    assert (band.near[m] < skin.depth[m]).all() and (band.far[m] > skin.depth[m]).all()
    assert ((band.near <= band.knee) & (band.knee < band.far))[band.mask].all()


def test_widths(scene):
    head, rest, loose, widths = scene
    assert widths.min() >= .0099 and widths.max() <= .0451
    assert np.median(widths[head.region_vertices('scalp')]) > .02 > np.median(widths[head.region_vertices('lips')])
    assert mouth_amount(head, rest)[head.region_vertices('tongue')].min() == 1


def test_widening_covers_the_matte(scene):
    head, rest, loose, widths = scene
    camera = studio_camera(96)
    y, x = np.mgrid[:96, :96]
    matte = (255*((x - 48)**2 + (y - 33)**2 < 31**2)).astype(np.uint8)
    wide, before, after = widen_band(widths, loose, [rest], [camera], [matte], head.faces)
    assert after < .02 < before and (wide >= widths).all()
    same, before, _ = widen_band(widths, loose, [rest], [camera], [np.zeros((96, 96), np.uint8)], head.faces)
    assert before == 0 and (same == widths).all()


def test_depths():
    rng = np.random.default_rng(0)
    near = rng.uniform(.5, .6, 50)
    knee, far = near + rng.choice([0, .05], 50), near + .1
    t, step = sample_depths(near, knee, far, rng.random((50, 12), np.float32))
    assert (np.diff(t) > 0).all() and (t >= near[:, None] - 1e-6).all() and (t <= far[:, None] + 1e-6).all()
    assert np.allclose(step.sum(1), far - near, atol=1e-6)


def test_composite_of_constant_matter():
    r = composite(torch.full((1, 8), .7), torch.full((1, 8, 3), .25), torch.tensor([.3]))
    assert torch.allclose(r.alpha, 1 - torch.exp(torch.tensor([-.7*8*.3]))) and torch.allclose(r.rgb, .25*r.alpha[:, None].expand(1, 3))


@pytest.mark.parametrize('changes', [dict(), dict(condition='mouth', condition_rest=1.), dict(condition='none', degree=4, bias=False, density_layers=2, colour_layers=3),
                                     dict(appearance=4, degree=0)])
def test_the_kernel_sees_what_training_sees(scene, changes):
    head, rest, _, widths = scene
    torch.manual_seed(0)
    field = Field(field_config(levels=4, log2_size=10, **changes))
    with torch.no_grad():
        field.grid.params.normal_(0, .5)
        if field.config.bias: field.density_network[-1].bias[0] = 2.
    deformer, appearance = Deformer(head.canonical().numpy(), head.faces, mouth_amount(head, rest)), torch.randn(4) if 'appearance' in changes else None
    a, b = (render_view(field, deformer, rest, studio_camera(32), widths, np.linspace(-1, 1, 16), appearance=appearance, backend=k, scouts=False) for k in ('torch', 'numba'))
    assert a[..., 3].max() > .5
    assert np.abs(a[..., 3] - b[..., 3]).max() < .005 and np.abs(a[..., :3]*a[..., 3:] - b[..., :3]*b[..., 3:]).max() < .02


def test_nothing_in_view(scene):
    head, rest, _, widths = scene
    camera = studio_camera(16)
    camera.c2w[0, 3] += 5
    deformer = Deformer(head.canonical().numpy(), head.faces)
    assert not render_view(Field(field_config(levels=2, log2_size=8)), deformer, rest, camera, widths, np.zeros(16)).any()


def test_scouts_find_the_head(scene):
    "Looking only where scouts found something gives the same picture."
    head, rest, _, widths = scene
    torch.manual_seed(0)
    field = Field(field_config(levels=4, log2_size=10, surface=6.))       # matter near the surface, as in a trained field
    with torch.no_grad():
        field.grid.params.normal_(0, .1)
        field.density_network[-1].bias[0] = 4.
    deformer = Deformer(head.canonical().numpy(), head.faces, mouth_amount(head, rest))
    see = lambda **how: (lambda r: r[..., :3]*r[..., 3:] + 1 - r[..., 3:])(render_view(field, deformer, rest, studio_camera(128), widths, np.zeros(16), **how))
    truth = see(samples=64, scouts=False)
    assert np.square(see(samples=12) - truth).mean() < 1e-4     # 40 dB: scouts overlook a haze of a hundredth
    assert np.square(see(samples=12) - see(samples=24, scouts=False)).mean() < 2e-5   # 47 dB


def test_every_device_looks_as_finely(scene):
    "What torch shows where the kernel cannot has as many samples as a picture by scouts; small pictures, too."
    head, rest, _, widths = scene
    torch.manual_seed(0)
    still = Field(field_config(levels=4, log2_size=10, surface=6., precision='float32'))
    moving = Field(field_config(levels=4, log2_size=10, surface=6., precision='float32', offset=8))     # as long as nothing is learned it moves nothing, but the kernel does not know
    with torch.no_grad():
        still.grid.params.normal_(0, .1)
        still.density_network[-1].bias[0] = 4.
        moving.load_state_dict(still.state_dict(), strict=False)
    deformer = Deformer(head.canonical().numpy(), head.faces, mouth_amount(head, rest))
    see = lambda field, size, **how: (lambda r: r[..., :3]*r[..., 3:] + 1 - r[..., 3:])(render_view(field, deformer, rest, studio_camera(size), widths, np.zeros(16), **how))
    assert np.array_equal(see(moving, 40), see(moving, 40, samples=21, backend='torch')) and np.array_equal(see(still, 40), see(still, 40, samples=21, backend='numba'))
    large = see(moving, 128)
    assert np.array_equal(large, see(moving, 128, samples=21, backend='torch')) and np.square(large - see(still, 128)).mean() < 2e-5


@pytest.mark.parametrize('size', [128, 257, 385])
def test_the_band_widens_at_any_size(scene, size):
    head, rest, loose, widths = scene
    y, x = (np.mgrid[:size, :size] + .5)/size
    matte = np.where((y - .35)**2 + (x - .5)**2 < .33**2, 255, 0).astype(np.uint8)
    _, before, after = widen_band(widths, loose, [rest], [studio_camera(size)], [matte], head.faces)
    assert after < .5*before


def test_interpolated_way_to_canonical_space(scene):
    "Carrying every third sample, and more where the way bends, gives nearly the picture of carrying all."
    head, rest, _, widths = scene
    torch.manual_seed(0)
    field = Field(field_config(levels=4, log2_size=10, surface=6.))
    with torch.no_grad():
        field.grid.params.normal_(0, .1)
        field.density_network[-1].bias[0] = 4.
    deformer, camera = Deformer(head.canonical().numpy(), head.faces), studio_camera(64, 20)
    open_mouth = head(None, head.expression(jawOpen=.6, mouthSmile=.5)[None])[0].numpy()
    band = surface_band(open_mouth, head.faces, widths, camera)
    pixels = np.flatnonzero(band.mask)
    o, d = camera.rays(np.stack([pixels % 64 + .5, pixels//64 + .5], 1).astype(np.float32))
    a, b = (_view_fast(field, deformer, deformer.poses(open_mouth), o, d, band.at(pixels), 24, condition=np.zeros(16), stride=k)[0] for k in (1, STRIDE))
    assert np.square(a - b).mean() < 1e-4 and np.median(np.abs(a - b)) < .002
    late, _ = _view_fast(field, deformer, deformer.poses(open_mouth), o, d, band.at(pixels), 24, np.full(len(o), 14), np.full(len(o), 16), condition=np.zeros(16))
    solid = a[:, 3] > .99
    assert (late[solid, 3] > .9).mean() > .9                # who begins inside matter goes back, who ends inside goes on


@pytest.mark.parametrize('parts', [['left_eyeball', 'right_eyeball'], ['upper_teeth', 'lower_teeth', 'tongue', 'mouth_interior']])
def test_every_sample_in_eyes_and_mouth_is_carried(scene, parts):
    "Between lids or lips a ray meets a sliver of what lies behind: it is not interpolated from lid to lid, as it was (crumbs in eyes that turn, specks on lips)."
    head, rest, _, widths = scene
    joints = np.zeros((1, 5, 3), np.float32)
    joints[0, 3:, 1], joints[0, 2, 0] = .35, .04
    pose = head(None, head.expression(eyeBlink=.15, mouthSmile=.3)[None], torch.from_numpy(joints))[0].numpy()
    eyes, parts = head.regions['left_eye_region'] | head.regions['right_eye_region'], np.any([head.regions[k] for k in parts], 0)
    deformer = Deformer(head.canonical().numpy(), head.faces, mouth_amount(head, rest), scaled=eyes)
    torch.manual_seed(0)
    field, camera = Field(field_config(levels=4, log2_size=10, surface=6.)), studio_camera(192, width=.16, centre=(0, 0, .08))
    with torch.no_grad():
        field.grid.params.normal_(0, .1)
        field.density_network[-1].bias[0] = 4.
    band = surface_band(pose, head.faces, widths, camera)
    skin = rasterize(camera.project(pose.astype(float)), head.faces, 192, 192)
    pixels = np.flatnonzero(skin.mask & np.isin(skin.face, np.flatnonzero(parts)))
    o, d = camera.rays(np.stack([pixels % 192 + .5, pixels//192 + .5], 1).astype(np.float32))
    a, b = (_view_fast(field, deformer, deformer.poses(pose), o, d, band.at(pixels), 21, condition=np.zeros(16, np.float32), stride=n)[0] for n in (1, STRIDE))
    assert len(pixels) > 100 and np.abs(a - b).max() < 2e-4        # .002 where they were interpolated


def test_holes_are_looked_at_again(scene, monkeypatch):
    "Scouts that saw lips do not know how deep the mouth behind them is: what they misjudge inside the head is found nevertheless."
    head, rest, _, widths = scene
    torch.manual_seed(0)
    field = Field(field_config(levels=4, log2_size=10, surface=60.))
    with torch.no_grad(): field.density_network[-1].bias[0] = 6.
    deformer, search = Deformer(head.canonical().numpy(), head.faces, mouth_amount(head, rest)), render._search
    see = lambda: render_view(field, deformer, rest, studio_camera(192, width=.2), widths, np.zeros(16))
    right, region = see(), (slice(90, 100), slice(80, 100))
    assert right[region][..., 3].min() > .95
    def misjudged(*args):
        near, end, *others = search(*args)
        near[region], end[region] = args[2][region] - .0225, args[2][region] - .0205      # in the band, but before the face
        return near, end, *others
    monkeypatch.setattr(render, '_search', misjudged)
    assert np.abs(see() - right).max() < .02


def test_band_reaches_from_what_is_worn_to_the_skin_behind(scene):
    "From any side; beside it nothing changes."
    head, rest, _, widths = scene
    worn, own = lenses(head), head.of_person(None, lenses(head))
    with_, n = own()[0].numpy(), len(worn.faces)
    wide = band_widths(own, with_)[1]
    np.testing.assert_array_equal(wide[:len(rest)], widths)
    for yaw in (-60, 0, 25, 60):
        camera = studio_camera(96, yaw)
        band, bare = surface_band(with_, own.faces, wide, camera, worn=own.faces[-n:]), surface_band(rest, head.faces, widths, camera)
        thing = rasterize(camera.project(with_.astype(float)), own.faces[-n:], 96, 96)
        beside = ~thing.mask
        for a, b in zip(band[:3], bare[:3]): np.testing.assert_array_equal(a[beside], b[beside])
        at = thing.mask & band.worn
        assert at.sum() > .8*thing.mask.sum() > 20 and not band.gap[beside].any() and (band.near[at] <= thing.depth[at] - .99*WORN).all() and (band.far[at] >= thing.depth[at] + .99*WORN).all()
        assert (band.far[at] >= bare.far[at] - 1e-6).all()
        o, d = camera.rays(np.stack(np.nonzero(at)[::-1], 1).astype(np.float32) + .5)
        depth, _ = along(d, band.at(np.flatnonzero(at)), np.full((at.sum(), 12), .5, np.float32))
        assert np.median((np.abs(depth - thing.depth[at][:, None]) < WORN).sum(1)) >= 4         # of twelve samples, a third


def test_rays_through_what_is_worn_look_for_themselves(scene, monkeypatch):
    "Along all of their way, and every sample is carried: scouts and samples that are interpolated overlook a rim that is thinner than the way between them."
    head, looked = scene[0], {}
    own = head.of_person(None, lenses(head))
    with_, n = own()[0].numpy(), int(own.regions['glasses'].sum())
    deformer, widths, camera = Deformer(with_, own.faces, worn=n), band_widths(own, with_)[1], studio_camera(128, 10)
    field, plain = Field(field_config(levels=4, log2_size=10, surface=6.)), render._view_fast
    def seen(*args, begin=None, end=None, stride=1, **how):
        args, ends = args[:7], args[7:] or (begin, end)
        for k, ray in enumerate(args[4]): looked[tuple(ray)] = stride, *(None if e is None else float(e[k]) for e in ends)
        return plain(*args, *ends, stride=stride, **how)
    monkeypatch.setattr(render, '_view_fast', seen)
    picture = render_view(field, deformer, with_, camera, widths, np.zeros(16, np.float32))
    band = surface_band(with_, own.faces, widths, camera, worn=deformer.worn)
    y, x = np.nonzero(band.worn)
    ways = [looked[tuple(d)] for d in camera.rays(np.stack([x, y], 1).astype(np.float32) + .5)[1]]
    assert len(ways) > 50 and set(ways) <= {(1, 0, 21), (1, None, None)} and STRIDE in {w[0] for w in looked.values()}
    assert picture.shape == (128, 128, 4)
