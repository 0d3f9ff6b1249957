"Detail transfer: on a head with a solid texture, whose appearance in any pose is known."
import numpy as np
import pytest
from scipy import ndimage

from ophav_nb.geometry import axis_angle_to_matrix, facing_camera, interpolate, rasterize
from ophav_nb.head import HeadModel
from ophav_nb.media import on_background, to_float, to_uint8
from ophav_nb.restore import (EYES, DetailConfig, DetailRestorer, oval_mask, frame_context, laplacian,
                              make_restorer, no_restoration)
from ophav_nb.run import InputError

SIZE = 192
SHAPE = np.zeros(4, np.float32)


@pytest.fixture(scope='module')
def head(): return HeadModel.load()


def pose(yaw=0., z=-.8):
    M = np.eye(4)
    M[:3, :3], M[:3, 3] = axis_angle_to_matrix(np.array([0., yaw, 0.])), [0, 0, z]
    return M


def view(head, yaw=0., expression=None, jaw=0.):
    "Context of a frame, and the textured head as it would be photographed, straight RGBA in 0..1."
    joints = np.zeros((5, 3), np.float32)
    joints[2, 0] = jaw
    expression = np.zeros(head.n_expression, np.float32) if expression is None else expression
    context = frame_context(head, SHAPE, expression, joints, facing_camera(1.6*SIZE, SIZE, SIZE).moved(pose(yaw)))
    raster = rasterize(context.camera.project(context.vertices), head.faces, SIZE, SIZE)
    p = interpolate(head.v_template.numpy(), head.faces, raster)
    fine = np.sin(p*900).prod(-1, keepdims=True)*.12 + np.sin(p[..., ::-1]*[400, 500, 600])*.06
    slow = .5 + .2*np.sin(p*40)
    return context, np.concatenate([slow + fine, raster.mask[..., None]], -1).astype(np.float32)


def soften(rgba, sigma=1.3):
    "What a field makes of it."
    w = ndimage.gaussian_filter(rgba[..., 3], sigma)[..., None]
    rgb = ndimage.gaussian_filter(rgba[..., :3]*rgba[..., 3:], (sigma, sigma, 0))/np.maximum(w, 1e-3)
    return to_uint8(np.concatenate([rgb, rgba[..., 3:]], -1))


@pytest.fixture(scope='module')
def portrait(head): return view(head)


@pytest.fixture(scope='module')
def restorer(head, portrait):
    context, rgba = portrait
    made = make_restorer('detail', image=rgba[..., :3], alpha=rgba[..., 3], context=context, head=head)
    made.prepare(soften(rgba))
    return made


def inside(context, rgba, by=6):
    return oval_mask(context.landmarks, rgba.shape[:2], .8) & (ndimage.distance_transform_edt(rgba[..., 3] > .5) > by)


def error(a, b, mask): return float(np.sqrt(((to_float(a)[..., :3] - to_float(b)[..., :3])[mask]**2).mean()))


def test_sheet_in_its_own_view(restorer, portrait):
    context, rgba = portrait
    look = restorer.sheet.look(context)
    y, x = np.mgrid[:SIZE, :SIZE] + .5
    core = ndimage.binary_erosion(rgba[..., 3] > .5, iterations=4)
    assert np.abs(look.x - x)[core].max() < .05 and np.abs(look.y - y)[core].max() < .05
    assert look.weight[core].mean() > .95


def test_own_view_becomes_the_portrait(restorer, portrait):
    context, rgba = portrait
    soft, mask = soften(rgba), inside(*portrait)
    sharp = restorer(soft, context)
    assert error(sharp, rgba, mask) < .35*error(soft, rgba, mask)
    assert (sharp[..., 3] == soft[..., 3]).all()
    assert (sharp[soft[..., 3] == 0] == soft[soft[..., 3] == 0]).all()


@pytest.mark.parametrize('yaw', [-.25, .12, .25])
def test_other_views_come_closer(restorer, head, yaw):
    context, rgba = view(head, yaw)
    soft, mask = soften(rgba), inside(context, rgba)
    sharp = restorer(soft, context)
    assert error(sharp, rgba, mask) < .75*error(soft, rgba, mask)


def test_expressions_come_closer(restorer, head):
    context, rgba = view(head, expression=head.expression(mouthSmile=.7, browInnerUp=.6).numpy(), jaw=.08)
    soft, mask = soften(rgba), inside(context, rgba)
    assert error(restorer(soft, context), rgba, mask) < .75*error(soft, rgba, mask)


def test_never_sharper_than_the_portrait(restorer, portrait):
    context, rgba = portrait
    mask = restorer._target_mask(context.landmarks)
    variance = lambda im: laplacian(on_background(to_float(im)))[mask].var()
    assert variance(restorer(soften(rgba), context)) < 1.03*restorer.target
    over = rgba.copy()
    over[..., :3] = np.clip(.5 + 1.5*(rgba[..., :3] - .5), 0, 1)
    assert (restorer(to_uint8(over), context)[..., :3] == to_uint8(over)[..., :3]).all()    # sharp enough already


def test_blink_silences_the_eyes(restorer, head, portrait):
    shut, _ = view(head, expression=head.expression(eyeBlink=1.).numpy())
    _, open_weight = restorer.layer(portrait[0])
    _, shut_weight = restorer.layer(shut)
    for ring in EYES.values():
        x, y = portrait[0].landmarks[ring].mean(0).astype(int)
        assert open_weight[y, x] > .5 and shut_weight[y, x] < .2


def test_inner_mouth_is_left_out(head):
    context, rgba = view(head, jaw=.3)
    made = make_restorer('detail', image=rgba[..., :3], alpha=rgba[..., 3], context=context, head=head)
    made.prepare(soften(rgba))
    x, y = context.landmarks[[13, 14]].mean(0).astype(int)
    assert made.layer(context)[1][y, x] == 0


def test_another_thing_is_no_detail(head, portrait):
    "A collar before the neck that the head is shown without is not painted on it; elsewhere the detail is the same."
    context, rgba = portrait
    dressed, x, y = rgba.copy(), *context.landmarks[152, :2].astype(int)
    dressed[y - 14:, :, :3] = .5 + .5*(np.indices(rgba.shape[:2]).sum(0)[y - 14:, :, None] % 8 < 4)
    plain, clothed = (make_restorer('detail', image=p[..., :3], alpha=p[..., 3], context=context, head=head) for p in (rgba, dressed))
    for made in (plain, clothed): made.prepare(soften(rgba))
    shown = rgba[..., 3] > .5
    assert np.abs(clothed.detail[y - 8:][shown[y - 8:]]).mean() < .01
    assert np.abs((clothed.detail - plain.detail)[:y - 30]).max() < 1e-3 < np.abs(plain.detail[:y - 30]).max()


def test_settings_and_errors(head, portrait):
    context, rgba = portrait
    made = DetailRestorer(rgba[..., :3], rgba[..., 3], context, head, DetailConfig(gain=0.))
    with pytest.raises(RuntimeError, match='prepare'): made(soften(rgba), context)
    made.prepare(soften(rgba))
    assert (made(soften(rgba), context) == soften(rgba)).all()
    assert make_restorer('none') is no_restoration and make_restorer(max) is max
    with pytest.raises(InputError, match='use detail, gfpgan'): make_restorer('magic')


def test_an_edge_beside_its_place_is_no_detail(head, portrait):
    "A render that lies half a pixel off gets fewer second edges; what is soft in it is found as if it lay right."
    context, rgba = portrait
    mask, size = inside(*portrait), lambda d: float(np.sqrt((d**2).mean()))
    def detail(picture, off, **settings):
        made, moved = make_restorer('detail', image=rgba[..., :3], alpha=rgba[..., 3], context=context, head=head, **settings), to_float(picture).copy()
        moved[..., :3] = ndimage.shift(moved[..., :3], (off, -off/2, 0), order=3, mode='nearest')
        made.prepare(np.clip(moved, 0, 1))
        return made.detail[mask]
    assert size(detail(rgba, 0.)) == 0 and size(detail(rgba, .6)) < .7*size(detail(rgba, .6, away=0.))
    there, off = detail(soften(rgba), 0.), detail(soften(rgba), .6)
    assert size(off - there) < .05*size(there)
