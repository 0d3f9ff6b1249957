"The animators, on a portrait drawn from the open head itself: what is true is known."
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import ophav_nb  # noqa: F401  (before torch: it decides about threads)
import torch
from scipy import ndimage as ndi
from scipy.spatial import cKDTree
from ophav_nb.animate import MeshAnimator, VideoAnimator, as_driven, make_animator
from ophav_nb.body import Body, empty_ground
from ophav_nb.clothes import Clothes
from ophav_nb.dataset import HeadDataset
from ophav_nb.detect import INNER_FACE, INNER_LIPS, INNER_LIPS_LOWER, INNER_LIPS_UPPER, OUTER_LIPS, OVAL
from ophav_nb.layers import EYES, NeckCut, bleed, draw_curve, head_alpha, inflate, parted, polygon_mask, visible_teeth, whole_eyes, without_mouth
from ophav_nb.geometry import axis_angle_to_matrix, facing_camera, interpolate, matrix_to_axis_angle, rasterize, smoothstep, vertex_normals
from ophav_nb.glasses import SIDES, Glasses
from ophav_nb.hair import Hair
from ophav_nb.head import HeadModel, Motion
from ophav_nb.media import resize
from ophav_nb.mouth import Mouth, edge_blur
from ophav_nb.paint import OF_HULL, OF_SKIN, fixed_columns, paint_mesh, paint_sheet
from ophav_nb.portrayed import Portrayed, facing, sampled
from ophav_nb.run import InputError
from ophav_nb.sheet import Sheet
from ophav_nb.track import Track, closing
from ophav_nb.unseen import AT_OUTLINE

SIZE = 192


def drawn(head, shape, motion, camera):
    "A picture of the head in one state, its mask, its landmarks."
    with torch.no_grad():
        v = head(torch.from_numpy(shape)[None], *(torch.from_numpy(a) for a in (motion.expression, motion.joints, motion.translation)))
        landmarks = camera.project(head.landmarks(v)[0].numpy())
    v = v[0].numpy()
    r = rasterize(camera.project(v.astype(np.float64)), head.faces, SIZE, SIZE)
    light = interpolate(vertex_normals(v, head.faces), head.faces, r) @ np.float32([.2, .3, .9])
    image = head.colours()[r.face]*(.5 + .5*np.clip(light, 0, 1))[..., None]
    image[~r.mask] = [.2, .4, .6]
    return (np.clip(image, 0, 1)*255).astype(np.uint8), r.mask.astype(np.float32), landmarks.astype(np.float32)


@pytest.fixture(scope='module')
def head(): return HeadModel.load()


def test_no_person_cut_out(head, portrait):
    with pytest.raises(InputError, match='nothing of a person'): MeshAnimator(*portrait[:2], head, portrait[2]*0)
    with pytest.raises(InputError, match='not where the head is'): MeshAnimator(*portrait[:2], head, portrait[2]*.3)


@pytest.mark.parametrize('size', [12, 20, 40])
def test_a_portrait_of_few_pixels_moves(head, portrait, size):
    "A face of five pixels has eyes of one: nothing to shut, and no error either."
    image, track, matte = portrait
    animator = MeshAnimator(resize(image, size), track, head, resize(matte, size), supersample=1)
    frame = animator.frame(*state(track, head, 10, eyeBlink=1))
    assert frame.shape == (size, size, 4) and np.isfinite(frame).all() and frame[..., 3].max() > .9
    assert np.isfinite(animator.composite(frame)).all()


def test_a_portrait_of_too_few_pixels(head, portrait):
    with pytest.raises(InputError, match='5 x 5 pixels shows no face'): MeshAnimator(resize(portrait[0], 5), portrait[1], head, resize(portrait[2], 5))


def test_no_chin(head, portrait):
    image, track, matte = portrait
    low = replace(track, landmarks=track.landmarks + np.float32([0, SIZE, 0]))
    with pytest.raises(InputError, match='ends above the chin'): MeshAnimator(image, low, head, matte)


@pytest.fixture(scope='module')
def portrait(head):
    camera, shape = facing_camera(1.6*SIZE, SIZE, SIZE), np.zeros(head.n_shape, np.float32)
    motion = Motion.still(1, head.n_expression)
    motion.translation[:] = [0, -.02, -.6]
    image, matte, landmarks = drawn(head, shape, motion, camera)
    track = Track(motion, shape, camera, landmarks[None], np.zeros(1), np.ones(1, bool))
    return image, track, matte


@pytest.fixture(scope='module')
def animator(portrait, head): return MeshAnimator(portrait[0], portrait[1], head, portrait[2], supersample=1)


def state(track, head, yaw=0., jaw=0., **expression):
    e, j, t = (np.array(a[0]) for a in (track.motion.expression, track.motion.joints, track.motion.translation))
    j[0, 1], j[2, 0] = np.radians(yaw), np.radians(jaw)
    for name, value in expression.items(): e[[k for k, n in enumerate(head.expression_names) if n.startswith(name)]] = value
    return e, j, t


def test_lashes_go_with_the_lid(portrait, head):
    "What is dark under the upper lid is there at rest, and stays under the lid when it moves."
    image, track, matte = portrait
    image, p = image.copy(), track.landmarks[0]
    yy, xx = np.mgrid[:SIZE, :SIZE] + .5
    dark = np.zeros((SIZE, SIZE), bool)
    for eye in EYES.values():
        top = p[eye['outline'][:9], :2]
        top = top[np.argsort(top[:, 0])]
        below = yy - np.interp(xx, top[:, 0], top[:, 1])
        dark |= (polygon_mask(p[eye['outline'], :2], SIZE, SIZE) > .5) & (below < 2)
    image[dark] = image[dark]//3
    made = MeshAnimator(image, track, head, matte)
    rest, shut = (made.frame(*state(track, head, **kw))[..., :3].mean(-1) for kw in ({}, dict(eyeBlink=.4)))
    plain = MeshAnimator(portrait[0], track, head, matte)
    rest0, shut0 = (plain.frame(*state(track, head, **kw))[..., :3].mean(-1) for kw in ({}, dict(eyeBlink=.4)))
    assert (rest[dark]/rest0[dark]).mean() < .65
    lower = np.roll(dark, 2, axis=0) & ~dark
    assert (shut[lower]/shut0[lower]).mean() < .9 < (rest[lower]/rest0[lower]).mean() + .1


def test_closed_lips_stay_and_open_ones_get_a_line(portrait, head):
    image, track, matte = portrait
    shut = track.landmarks[0].copy()
    shut[INNER_LIPS_LOWER] = shut[INNER_LIPS_UPPER]
    assert parted(shut) == 0 and (without_mouth(image/255., shut) == np.float32(image/255.)).all()
    motion = replace(track.motion, joints=track.motion.joints + np.float32([[[0]*3, [0]*3, [.25, 0, 0], [0]*3, [0]*3]]))
    image, matte, landmarks = drawn(head, track.shape, motion, track.camera)
    talking = replace(track, motion=motion, landmarks=landmarks[None])
    assert parted(landmarks) == 1
    made = MeshAnimator(image, talking, head, matte)
    closed = made.frame(*state(track, head))[..., :3].mean(-1)
    made.portrayed.parted = 0.
    plain = made.frame(*state(track, head))[..., :3].mean(-1)
    lips = polygon_mask(track.landmarks[0][OUTER_LIPS, :2], SIZE, SIZE, grow=2) > .5
    assert (closed < .9*plain)[lips].sum() > 10 and (closed < .98*plain)[~lips].sum() == 0


def test_at_rest_it_is_the_portrait(animator, portrait, head):
    image, track, matte = portrait
    f = animator.frame(*state(track, head))
    inside = (f[..., 3] > .95) & (matte > 0)
    assert inside.sum() > .15*SIZE**2
    assert np.abs(f[..., :3] - image/255.)[inside].mean() < .02
    a = head_alpha(matte, head, track)
    assert np.abs(f[..., 3] - a).mean() < .01
    assert f.dtype == np.float32 and f.min() >= 0 and f.max() <= 1


def test_a_face_that_is_not_the_models_stays_itself(portrait, head):
    "Landmarks beside the mesh's are the person's own: at rest they stay there, and a correction moves what is driven, not the portrait."
    image, track, matte = portrait
    inner, beside = np.array(INNER_FACE), track.landmarks + np.float32([3, -2, 0])
    moved = np.roll(image, (-2, 3), (0, 1))
    own = MeshAnimator(moved, replace(track, landmarks=beside), head, np.roll(matte, (-2, 3), (0, 1)), supersample=1)
    lies = own.portrayed.camera0.project(own.portrayed.points(own.portrayed.V0, inner))[:, :2]
    assert np.abs(lies - beside[0, inner, :2]).mean() < .5
    f, (x0, y0), (x1, y1) = own.frame(*state(track, head)), *(beside[0, inner, :2].min(0).astype(int) + 12, beside[0, inner, :2].max(0).astype(int) - 12)
    assert np.abs(f[y0:y1, x0:x1, :3] - moved[y0:y1, x0:x1]/255.).mean() < .02
    driven = MeshAnimator(image, replace(track, correction=np.tile(np.float32([.004, 0, 0]), (478, 1))), head, matte, supersample=1).portrayed
    face = inner[np.abs(track.landmarks[0, inner, 1] - track.landmarks[0, 1, 1]) < 15]
    p = [driven.camera0.project(driven.points(v, face))[:, 0] for v in (driven.V0, driven.at(*state(track, head))[0])]
    np.testing.assert_allclose(p[0], track.landmarks[0, face, 0], atol=.5)
    assert 2 < (p[1] - p[0]).mean() < 2.6            # 4 mm are 2.4 pixels here


def test_portrait_as_driven(portrait, head):
    "The portrait is shifted as driven frames are: the same correction in the picture as on the mesh."
    image, track, matte = portrait
    image = image/np.float32(255)
    assert as_driven(image, track, head) is image
    corrected = replace(track, correction=closing(np.tile(np.float32([.004, 0, 0]), (478, 1))))
    shown = as_driven(image, corrected, head)
    driven = MeshAnimator(image, corrected, head, matte, supersample=1).frame(*state(track, head))
    x, y = track.landmarks[0, 1, :2].astype(int)
    window = np.s_[y-20:y+15, x-20:x+20]
    off = lambda picture: np.abs(picture[..., :3] - driven[..., :3])[window].mean()
    assert off(shown) < .5*off(image)
    np.testing.assert_array_equal(shown[:20], image[:20])


def test_it_lands_where_the_mesh_does(animator, portrait, head):
    "A turned frame against a drawing of the turned head."
    image, track, _ = portrait
    e, j, t = state(track, head, yaw=12)
    f = animator.frame(e, j, t)
    m = Motion(e[None], j[None], t[None])
    true, mask, _ = drawn(head, track.shape, m, track.camera)
    inside = (f[..., 3] > .95) & (mask > 0)
    assert inside.sum() > .12*SIZE**2
    assert np.abs(f[..., :3] - true/255.)[inside].mean() < .06
    face = animator.portrayed.cut(track.camera.moved(animator.portrayed.transform(j, t))) > .99
    assert ((f[..., 3] > .5) == (mask > 0))[face].mean() > .94


def test_frames_are_the_frame(animator, portrait, head):
    _, track, _ = portrait
    motion = Motion.concat([track.motion]*3)
    motion.joints[:, 2, 0] = [0, .1, .2]
    motion.joints[:, 0, 1] = [-.2, 0, .2]
    out = list(animator.frames(motion, chunk=2))
    assert len(out) == 3 and out[0].dtype == np.uint8 and out[0].shape == (SIZE, SIZE, 4)
    one = animator.frame(motion.expression[2], motion.joints[2], motion.translation[2])
    assert np.abs(out[2]/255. - one).max() < .003
    assert next(animator.frames(motion, size=96)).shape == (96, 96, 4)


def test_lids_close(animator, portrait, head):
    _, track, _ = portrait
    L = track.landmarks[0]
    open_, shut = animator.frame(*state(track, head)), animator.frame(*state(track, head, eyeBlink=1.))
    skin = animator.portrayed.skin_colour
    for eye in EYES.values():
        x, y = L[eye['iris'][0], :2].astype(int)
        assert np.abs(shut[y, x, :3] - skin).mean() < .6*np.abs(open_[y, x, :3] - skin).mean()


def test_shut_lids_leave_no_specks(animator, portrait, head):
    "What a shut lid does not quite cover of an eye is as dark as lashes; half shut, an eye keeps its light."
    p, eyes = animator.portrayed, animator.eyes
    light = lambda blink: eyes.under_lids(p.vertices(np.float32(state(portrait[1], head, eyeBlink=blink)[0])[None], p.source[1][None])[0])[:, 0]
    assert light(1.).max() < .42 and light(.5).max() > .95


def test_whites_of_eyes_that_show_none(portrait):
    "Where beside the iris there is only skin, an eye that opens wider gets a white; where there is a white, it stays, and at rest all stays."
    image, track, _ = portrait
    skin, points = np.float32([.74, .48, .42]), track.landmarks[0]
    h, w = image.shape[:2]
    colourful = lambda c: (c.max(-1) - c.min(-1))/c.max(-1)
    for ball in ([.72, .47, .42], [.66, .62, .60]):
        picture = np.broadcast_to(skin, image.shape).copy()
        for eye in EYES.values():
            picture[polygon_mask(points[eye['outline'], :2], h, w) > .5] = ball
            iris = np.hypot(*np.moveaxis(np.mgrid[:h, :w] + .5 - points[eye['iris'][0], 1::-1][:, None, None], 0, 0)) < 1.5
            picture[iris] = .1
        rest, wide = whole_eyes(picture, points, skin)
        for eye in EYES.values():
            inside, above = polygon_mask(points[eye['outline'], :2], h, w, grow=-1) > .9, (points[eye['outline'][4], :2] - [0, 2]).astype(int)
            np.testing.assert_allclose(rest[inside], picture[inside], atol=.02)
            made = wide[above[1], above[0]]
            assert colourful(made) < .6*colourful(skin)
            if ball[1] > .6: np.testing.assert_allclose(made, ball, atol=.03)
            assert made.mean() > .8*np.mean(ball)


def test_eyes_opened_wide_show_them(portrait, head):
    "The second texture of the eyes counts as they open or turn, and at rest not at all."
    image, track, matte = portrait
    animator = MeshAnimator(image, track, head, matte, supersample=1)
    animator.eyes.whites = np.zeros_like(animator.eyes.whites) + np.float32([0, 1, 0])
    green = lambda f: int(((f[..., 1] > .5) & (f[..., 0] < .35) & (f[..., 3] > .9)).sum())
    rest, wide = (animator.frame(*state(track, head, **e)) for e in ({}, dict(eyeWide=1.)))
    assert green(rest) == 0 and green(wide) > 20


def test_mouth_opens_dark_and_closes(animator, portrait, head):
    _, track, _ = portrait
    e, j, t = state(track, head, jaw=16)
    f = animator.frame(e, j, t)
    V = animator.portrayed.vertices(e[None], j[None])[0]
    q = animator.portrayed.camera.moved(animator.portrayed.transform(j, t)).project(animator.portrayed.points(V, [13, 14]))
    x, y = q[:, 0].mean(), q[:, 1].mean()
    assert f[int(y), int(x), :3].mean() < .75*animator.portrayed.skin_colour.mean()
    closed = animator.frame(*state(track, head))
    L = track.landmarks[0]
    assert np.abs(closed[int(L[13, 1]), int(L[13, 0]), :3] - f[int(y), int(x), :3]).mean() > .05


def test_made_up_insides_of_a_mouth_are_as_soft_as_the_portrait(animator, portrait, head):
    _, track, _ = portrait
    mouth, (e, j, t) = animator.mouth, state(track, head, jaw=16)
    kept, frames = mouth.blur, []
    for mouth.blur in (.5, 3.):
        frames.append(animator.frame(e, j, t)[..., :3])
    mouth.blur = kept
    V, A, _ = animator.state
    q = animator.portrayed.camera.moved(A).project(animator.portrayed.points(V, INNER_LIPS))[:, :2]
    inside = polygon_mask(q, *frames[0].shape[:2]) > .5
    sharp, soft = (np.abs(np.gradient(f.mean(-1))).max(0) for f in frames)
    assert soft[inside].max() < .8*sharp[inside].max()                                   # no stickers
    far = ndi.distance_transform_edt(~inside) > 20
    assert (frames[0][far] == frames[1][far]).all()
    image = animator.portrayed.image
    assert edge_blur(ndi.gaussian_filter(image, (2, 2, 0)), np.ones(image.shape[:2], bool)) > 1.5*edge_blur(image, np.ones(image.shape[:2], bool))
    assert edge_blur(np.zeros((8, 8, 3)), np.zeros((8, 8), bool)) == 1                   # nothing is known


def open_mouth(portrait, head, moved=0.):
    "The portrait's head with its mouth open and dark, moved to the right by some metres: picture, what is inside the lips, matte, landmarks, track, pose."
    _, track, _ = portrait
    e, j, t = state(track, head, jaw=6)
    t = t + np.float32([moved, 0, 0])
    motion = Motion(e[None], j[None], t[None])
    image, matte, landmarks = drawn(head, track.shape, motion, track.camera)
    inner, image = polygon_mask(landmarks[INNER_LIPS, :2], SIZE, SIZE) > .5, image.copy()
    image[inner] = [60, 15, 15]
    return image, inner, matte, landmarks, Track(motion, track.shape, track.camera, landmarks[None], np.zeros(1), np.ones(1, bool)), j


def test_gums_above_teeth(portrait, head):
    "A lip that rises higher than in the portrait shows gum above the teeth, no second row; between lip and teeth the portrait's own goes on."
    image, inner, matte, landmarks, there, _ = open_mouth(portrait, head)
    image[inner & (np.mgrid[:SIZE, :SIZE][0] < landmarks[[13, 14], 1].mean())] = [240, 235, 225]
    made = MeshAnimator(image, there, head, matte)
    for mouth in (made.mouth, MeshAnimator(image[::2, ::2], there, head, matte[::2, ::2]).mouth):
        assert mouth.risen[mouth.teeth > .9].min() > .15                                  # a tooth of two pixels is a tooth, and no black
    p, x = made.portrayed, int(landmarks[13, 0])
    upper, gums = p.part('upper_teeth'), np.setdiff1d(p.row('upper_teeth'), p.part('upper_teeth'))
    assert len(gums) and p.V0[gums, 1].max() > p.V0[upper, 1].max()
    red = lambda c: c[..., 0] - c[..., 2]
    assert red(made.mouth.colours[gums]).min() > red(made.mouth.colours[upper]).max()
    top = int(np.flatnonzero(p.teeth[:, x] > .6).min())
    shown = np.flatnonzero(made.mouth.teeth[:, x] > .6)
    assert shown.min() < top - 4 and (np.diff(shown) == 1).all()                         # without a gap
    mm = 1e-3*p.camera0.focal/p.camera0.project(p.V0[upper])[:, 2].min()
    above = made.mouth.risen[:, x]
    crowns = p.camera0.project(p.V0[upper].astype(np.float64))
    crowns = crowns[np.abs(crowns[:, 0] - x) < 3*mm, 1].min()
    assert red(above[int(crowns - 2*mm)]) > red(above[top + 1]) + .1                      # gum
    assert np.abs(above[top - 1] - above[top + 1]).max() < .1                             # and still tooth


def teeth_painted(portrait, head, top, bottom, gums=None):
    "Of an open mouth, with teeth from so many rows beneath the lip's middle to so many (`gums`: with gums of that colour above them): what it is made from, and that, and the rows of both in the mouth's middle."
    image, inner, matte, landmarks, there, _ = open_mouth(portrait, head)
    rows, lip = np.mgrid[:SIZE, :SIZE][0], int(landmarks[13, 1])
    teeth = inner & (rows >= lip + top) & (rows < lip + bottom)
    above = inner & (rows < lip + top)
    image[teeth] = [240, 235, 225]
    if gums is not None: image[above] = gums
    p = Portrayed(image, there, head, matte)
    p.teeth = teeth.astype(np.float32)
    x = int(landmarks[13, 0])
    return p, Mouth(p, np.tile(p.skin_colour, (len(p.V0), 1))), *(np.flatnonzero(m[:, x]) for m in (above, teeth)), x


def test_of_teeth_that_hardly_look_out_nothing_is_taken(portrait, head):
    "They are left to the model's: less would be two rows above each other."
    assert teeth_painted(portrait, head, 1, 2)[1].teeth.max() < .1
    assert teeth_painted(portrait, head, 1, 6)[1].teeth.max() > .9


def test_gums_that_the_portrait_shows_stay(portrait, head):
    p, mouth, above, teeth, x = teeth_painted(portrait, head, 5, 9, gums=[190, 120, 115])
    gum = above[2:]                                                                       # without the lip's dark line
    assert len(gum) > 1 and mouth.teeth[gum, x].min() == mouth.teeth[teeth, x].max() > .3
    assert np.abs(mouth.risen[gum, x] - p.image[gum, x]).max() < .02
    _, dark, above, *_ = teeth_painted(portrait, head, 5, 9)                              # where it is the lip's shadow that is above, teeth go on
    assert np.abs(dark.risen[above[-1], x] - dark.risen[teeth[1], x]).max() < .1


def test_a_lip_that_dips_is_no_gum(portrait, head):
    "Of a row of teeth all of them show gums, or none does."
    p, mouth, above, teeth, x = teeth_painted(portrait, head, 2, 9, gums=[190, 120, 115])
    near, columns = slice(x - 2, x + 3), np.flatnonzero((p.teeth > .6).any(0))
    p.teeth[above[-1] + 1:above[-1] + 3, near] = 0                                        # in the middle a little of the lip
    mouth = Mouth(p, np.tile(p.skin_colour, (len(p.V0), 1)))
    red = lambda row, at: (mouth.risen[row, at, 0] - mouth.risen[row, at, 2]).mean()
    row = teeth[0] - 1
    assert len(columns) > 12 and red(row, near) < .15 and red(row, columns[3:-3]) < .15  # teeth go on everywhere


def test_teeth_end_evenly(portrait, head):
    "At their lower edge as they are above it, and beside the last ones there is no upright edge of gum."
    p, mouth, above, teeth, x = teeth_painted(portrait, head, 2, 8)
    p.image = p.image.copy()
    p.image[teeth[-1]] = .4*p.image[teeth[-1]]                                            # what is beneath has given them its colour
    mouth = Mouth(p, np.tile(p.skin_colour, (len(p.V0), 1)))
    assert mouth.risen[teeth[-1], x].min() > .8
    columns = np.flatnonzero((p.teeth > .6).any(0))
    gum = mouth.teeth[teeth[0] - 5, columns]
    assert gum[0] < .8 and gum[-1] < .8 and gum.max() > .95 and (np.diff(gum)[:3] >= 0).all()
    assert mouth.teeth[teeth[:2], x].min() > .95                                          # without a seam where the lip was


def test_under_a_gap_are_lower_teeth(portrait, head):
    image, inner, _, landmarks, *_ = open_mouth(portrait, head)
    rows, (top, low) = np.mgrid[:SIZE, :SIZE][0], landmarks[[13, 14], 1]
    upper = inner & (rows < top + .4*(low - top))
    piece = inner & (rows > top + .6*(low - top)) & (rows < top + .75*(low - top))
    bridge = inner & (rows < top + .75*(low - top)) & (np.abs(np.mgrid[:SIZE, :SIZE][1] - landmarks[13, 0] - 8) < 2)      # they touch at one place
    image[upper | piece | bridge] = [240, 235, 225]
    shown = visible_teeth(image/255., landmarks)
    assert shown[upper].mean() > .8 and shown[piece & ~bridge].max() < .1


def test_teeth_of_a_turned_mouth_reach_its_corners(portrait, head):
    "In the model they lie far behind them, and one would look past the last tooth into the dark."
    image, inner, matte, landmarks, there, _ = open_mouth(portrait, head)
    image[inner] = [240, 235, 225]
    made = MeshAnimator(image, there, head, matte)
    p = made.portrayed
    lips, teeth = (p.camera0.project(q.astype(np.float64)) for q in (p.points(p.V0, INNER_LIPS), made.mouth.points))
    corners = lips[[0, INNER_LIPS.index(308)]]
    near = np.abs(teeth[:, None, 0] - corners[:, 0]).min(1) < 3
    assert near.any() and (teeth[near, 2] - corners[:, 2].min()).max() < .012
    for yaw in (-20, 20):
        e, j, t = state(portrait[1], head, yaw=yaw, jaw=6)
        V, A, _ = p.at(e, j, t)
        q = p.camera.moved(A).project(p.points(V, INNER_LIPS).astype(np.float64))[:, :2]
        inside = polygon_mask(q, SIZE, SIZE, grow=-1.5) > .9
        assert inside.sum() > 20 and made.frame(e, j, t)[..., :3].mean(-1)[inside].min() > .35       # no dark wedge


def test_the_lips_shadow_is_taken_off_teeth():
    deep = np.repeat(np.linspace(-1, 5, 60)[:, None], 20, 1)
    image = np.interp(deep, [0, 1.5], [.5, .75])[..., None]*np.float32([1, .98, .95])
    mouth = SimpleNamespace(portrayed=SimpleNamespace(image=image))
    out = Mouth._unshaded(mouth, deep, deep > 0)
    assert np.ptp(out[deep > 0].mean(-1)) < .3*np.ptp(image[deep > 0].mean(-1))
    assert (out[deep <= 0] == image[deep <= 0].astype(np.float32)).all()                  # not off the lip


def test_what_is_farther_in_is_redder(animator):
    "Lips that the portrait hides; and a tongue has a groove and sides."
    p, mouth, own = animator.portrayed, animator.mouth, animator.unseen.own
    lips = np.setdiff1d(p.part('lips'), np.flatnonzero(mouth.inside))
    share, seen = mouth.colours[lips]/own[lips], np.maximum(p.seen, p.seen[p.twin])[lips]
    assert (seen > .99).sum() > 10
    np.testing.assert_allclose(share[seen > .99], 1, atol=1e-5)
    within = share[share[:, 1] < .8]
    assert len(within) and (within[:, 0] > within[:, 1] + .1).all()
    v = p.part('tongue')
    x, light = np.abs(p.rest[v, 0]), mouth.colours[v].mean(1)
    tip = p.rest[v, 2] > np.median(p.rest[v, 2])
    at = lambda lo, hi: light[tip & (x >= lo*x[tip].max()) & (x <= hi*x[tip].max())].mean()
    assert at(0, .1) < .95*at(.2, .4) and at(.9, 1) < .8*at(.2, .4)


def test_an_ear_stands_beside_a_cheek_that_turns(portrait, head, animator):
    "It is drawn out, too, but beyond the cheek there is nothing else of it. One that hair covers is as the hair beside it."
    image, track, matte = portrait
    for yaw in (-20, 20):
        e, j, t = state(track, head, yaw=yaw)
        V, A, _ = animator.portrayed.at(e, j, t)
        r = rasterize(animator.portrayed.camera.moved(A).project(V.astype(np.float64)), head.faces, SIZE, SIZE)
        ear = r.mask & (head.regions['left_ear'] | head.regions['right_ear'])[np.maximum(r.face, 0)]
        truth, *_ = drawn(head, track.shape, Motion(e[None], j[None], t[None]), track.camera)
        f = animator.frame(e, j, t)
        assert ear.sum() > 100 and f[ear][:, 3].mean() > .8
        assert np.abs(f[..., :3] - truth/255.)[ear & (f[..., 3] > .9)].mean() < .1
    p = animator.portrayed
    ears, covered = p.ear_in_view('left') | p.ear_in_view('right'), image.copy()
    assert animator.sheet.at_ear.max() > .9
    covered[ndi.binary_dilation(ears, iterations=3) & (matte > 0)] = [40, 20, 12]
    assert MeshAnimator(covered, track, head, matte, supersample=1).sheet.at_ear.max() < .1


def test_what_is_left_of_the_sheet(portrait, head, animator):
    "All of it, of a head that comes nearer; of one that turns not what is drawn out, and an ear goes over the cheek only."
    p, sheet = animator.portrayed, animator.sheet
    def left(yaw, nearer=0.):
        e, j, t = state(portrait[1], head, yaw=yaw)
        V, A, _ = p.at(e, j, t + np.float32([0, 0, nearer]))
        camera = p.camera.moved(A)
        return sheet.left(camera.project(sheet.moved(V)), facing(V, vertex_normals(V, p.faces), camera), SIZE)
    keep, yields = left(0, .3)
    assert keep.min() > .95 and yields.max() < .05
    keep, yields = left(25)
    ear = sheet.at_ear > .95
    assert keep[~ear].min() < .1 and yields[ear].max() > .7 and yields[sheet.at_ear == 0].max() < .5
    screen, faces, one = np.float32([[0, 0, 1], [32, 0, 1], [32, 32, 1], [0, 32, 1]]), np.int32([[0, 1, 2], [0, 2, 3]]), np.ones(4, np.float32)
    r, out = rasterize(screen, faces, 32, 32), np.zeros((32, 32, 4), np.float32)
    out[:, 16:] = [0, 1, 0, 1]                                                            # green at the right
    paint_sheet(r.face, r.bary, faces, screen[:, :2].copy(), np.ones((32, 32, 3), np.float32), np.ones((32, 32), np.float32), one, one, out)
    assert np.allclose(out[4:28, 4:14], 1) and np.allclose(out[4:28, 18:28], [0, 1, 0, 1])


@pytest.mark.parametrize('moved', [-.17, .17])
def test_a_mouth_that_the_picture_cuts(portrait, head, moved):
    "Teeth whose row leaves the picture say nothing of how long they are."
    image, inner, matte, landmarks, there, _ = open_mouth(portrait, head, moved)
    image[inner] = [240, 235, 225]
    left, right = np.sort(landmarks[[78, 308], 0])
    assert left < 0 if moved < 0 else left + .7*(right - left) > SIZE
    p = Portrayed(image, there, head, matte)
    p.teeth = np.ones_like(p.teeth)                                                       # some are told, wherever
    assert np.isfinite(p.V0).all() and 0 <= p._teeth_lower(p.V0) <= .008


def test_teeth_reach_as_far_as_the_portraits(portrait, head):
    "An open mouth that is full of teeth: the mesh's upper ones come down to where these end, and what a field is trained on carries them."
    image, inner, matte, landmarks, there, j = open_mouth(portrait, head)
    track, motion = portrait[1], there.motion
    upper = np.unique(head.faces[head.regions['upper_teeth']])
    assert not visible_teeth(image/255., track.landmarks[0]).any()                       # a closed mouth shows none
    bare = MeshAnimator(image, there, head, matte)
    middle = np.mean([landmarks[13, 1], landmarks[14, 1]])
    image[inner & (np.mgrid[:SIZE, :SIZE][0] < middle + .2*(landmarks[14, 1] - middle))] = [240, 235, 225]
    made = MeshAnimator(image, there, head, matte)
    lowest = lambda a: a.portrayed.camera0.project(a.portrayed.V0[upper].astype(np.float64))[:, 1].max()
    assert np.allclose(bare.person_offset()[upper, 1].min(), made.person_offset()[upper, 1].max(), atol=.008) and lowest(made) > lowest(bare) + 1
    seen = np.flatnonzero((made.mouth.teeth > .5).any(1)).max()
    assert abs(lowest(made) - seen) < 3
    np.testing.assert_allclose((made.person_offset() - bare.person_offset())[np.setdiff1d(np.arange(head.n_vertices), made.portrayed.row('upper_teeth'))], 0, atol=1e-6)     # its gums go along
    data = HeadDataset.from_frames(np.zeros((1, 32, 32, 4), np.uint8), motion, track.shape, track.camera.resized(32, 32), head, offset=made.person_offset())
    own = head.of_person(made.person_offset())
    with torch.no_grad(): expected = own(track.shape, motion.expression, np.concatenate([0*j[None, :1], j[None, 1:]], 1))[0].numpy()
    np.testing.assert_allclose(data.vertices[0], expected, atol=1e-6)


def test_the_cut_is_rigid(head, portrait):
    image, track, matte = portrait
    other = replace(track.motion, expression=track.motion.expression + .5)
    a = head_alpha(np.ones_like(matte), head, track)
    b = head_alpha(np.ones_like(matte), head, SimpleNamespace(**{**vars(track), 'motion': other}))
    np.testing.assert_array_equal(a, b)
    assert .05 < a.mean() < .9 and a[-2].max() < .5


def test_body_stays(animator, portrait, head):
    image, track, matte = portrait
    s = state(track, head, yaw=15)
    out = animator.composite(animator.frame(*s), *s)
    corner = np.abs(out - image/255.)
    assert corner[:6].mean() < .02 and corner[:, :6].mean() < .02
    low = corner[-6:][matte[-6:] > .5] if (matte[-6:] > .5).any() else np.zeros(1)
    assert low.mean() < .1


def dressed(head, portrait):
    "The portrait in a dark pullover with a light collar, on a ground with a pattern, a strand of hair beside its matte; and an animator of it."
    image, track, matte = portrait
    y, x = np.mgrid[:SIZE, :SIZE]
    chin = track.landmarks[0, 152, 1] + .06*SIZE
    image = np.where(matte[..., None] > .5, image, (128 + 30*np.sin(x/9)*np.sin(y/7))[..., None].astype(np.uint8))
    image[(matte > .5) & (y > chin)] = [30, 32, 60]
    image[(matte > .5) & (y > chin) & (y < chin + .06*SIZE)] = [235, 240, 250]
    beside = ndi.binary_dilation(matte > .5, iterations=3) & (matte < .5) & (y < .4*SIZE)
    image[beside & (x % 5 < 2)] = [60, 40, 30]
    soft = ndi.gaussian_filter(matte, 1.)
    return image.astype(np.uint8), MeshAnimator(image.astype(np.uint8), track, head, soft, supersample=1)


def test_clothes_hair_and_beard_are_told_apart(portrait, head):
    "A shoulder has the background above it, hair does not; what hangs from a chin in its colours is a beard, under a bare chin it is a pullover."
    image, track, matte = portrait
    L, (y, x) = track.landmarks[0], np.mgrid[:SIZE, :SIZE]
    nose, mouth, chin = L[4, 1], L[[61, 291], 1].mean(), L[152, 1]
    beside = ~ndi.binary_dilation(matte > .5, iterations=2) & (np.abs(x - L[152, 0]) < .46*SIZE)
    def made(where, dark=None):
        picture = image.copy()
        picture[where if dark is None else where | dark] = [30, 22, 18]
        return MeshAnimator(picture, track, head, np.maximum(matte, where).astype(np.float32), supersample=1).clothes
    at = beside & (y > mouth + 4) & (y < chin)
    shoulders, hair = made(beside & (y > .5*(nose + mouth))), made(beside & (y > L[10, 1]))
    assert shoulders.cloth[at].mean() > .9 and not shoulders.hanging[at].any()
    assert hair.cloth[at].mean() < .1 and hair.hanging[at].mean() > .9
    below = (y > chin) & (y < chin + .1*SIZE) & (np.abs(x - L[152, 0]) < .12*SIZE)
    jaw = (matte > .5) & (y > L[17, 1] + .02*SIZE) & (y <= chin + .02*SIZE)
    low = below & (y > chin + .04*SIZE)
    pullover, beard = made(below & (y > chin + .03*SIZE)), made(below, jaw)
    assert pullover.cloth[low].mean() > .8 and not pullover.hanging[low].any()
    assert beard.cloth[low].mean() < .1 and beard.hanging[low].mean() > .9


def test_unmoved_the_whole_picture_is_the_portrait(portrait, head):
    "Outline, strands and clothes, too."
    image, animator = dressed(head, portrait)
    s = state(portrait[1], head)
    out = animator.composite(animator.frame(*s), *s)
    error = ((out - image/255.)**2).mean(-1)
    outline = ndi.binary_dilation(portrait[2] > .5, iterations=4) & ~ndi.binary_erosion(portrait[2] > .5, iterations=3)
    psnr = lambda where: -10*np.log10(error[where].mean())
    assert psnr(error >= 0) > 33 and psnr(outline) > 22.5           # 35.4 and 24.9; 29.9 and 18.6 while nothing was carried


def test_a_neck_fades_in_under_the_jaw(portrait, head):
    "So that a jaw which turns away uncovers no edge, where the model's neck is beneath; at rest the sheet's own pixels make up for it."
    image, animator = dressed(head, portrait)
    body, clothes = animator._settled(), animator.clothes
    beneath = body._neck_beneath()
    fades, there = body._under_jaw(clothes, beneath)
    inner, around = ndi.binary_erosion(there), ndi.binary_dilation(there, iterations=9)          # its edges are soft
    away = ndi.distance_transform_edt(~ndi.binary_erosion(clothes.core))/animator.portrayed.eyes_apart
    assert there.any() and not there[: int(portrait[1].landmarks[0, 4, 1])].any()
    assert fades[inner & (away < .06)].max() < .1 and fades[there & (away > .25)].min() > .8 and (fades[~around] == 1).all()
    bare = np.where(clothes.core, 0, 1)*~ndi.binary_dilation(animator.portrayed.matte < .5, iterations=SIZE//10) > 0
    assert not (there & bare & ~beneath).any() and not body._under_jaw(clothes, np.zeros_like(beneath))[1][bare].any()
    assert (body.flesh_alpha <= fades + 1e-6).all() and (body.slides | ~there | (body.following <= .1)).all()
    s = state(portrait[1], head)
    assert np.abs(animator.composite(animator.frame(*s), *s) - image/255.)[there].mean() < .03


@pytest.mark.parametrize('coat, light', [(False, 1), (True, 1), (False, 1.35), (False, 1.5)])
def test_a_collar_before_a_neck_is_told_by_the_cloth_it_goes_on_from(portrait, head, coat, light):
    "Where its hue alone does not tell it from skin; with a dark coat over it, too."
    image, track, matte = portrait
    (y, x), L = np.mgrid[:SIZE, :SIZE], track.landmarks[0]
    low, plain = L[152, 1] + .06*SIZE, MeshAnimator(image, track, head, matte, supersample=1).portrayed
    neck, shoulders = plain.neck_seen & (y > low), (matte < .5) & (y > low) & (np.abs(x - L[152, 0]) < .4*SIZE)
    skin, inner = np.median(image[plain.raster0.mask & (matte > .5) & (y < L[152, 1])], axis=0), ndi.binary_erosion(neck, iterations=2)
    for grey in np.linspace(.02, .6, 30):                                     # the first of which hue says that it may be either
        picture = image.copy()
        picture[neck | shoulders] = np.clip(light*(skin + grey*(skin.mean() - skin)) + np.random.default_rng(0).normal(0, 2, (int((neck | shoulders).sum()), 3)), 0, 255)
        if coat: picture[shoulders & (np.abs(x - L[152, 0]) > .2*SIZE)] = [14, 16, 30]
        clothes = Clothes(Portrayed(picture, track, head, np.maximum(matte, shoulders).astype(np.float32)))
        if np.median(clothes.portrayed.unlike[inner]) > 2.2: break
    assert inner.sum() > 100 and np.maximum(clothes._other_than_skin(), clothes._light_collars())[inner].mean() < .5
    assert clothes.cloth[inner].mean() > .9 and clothes.cloth[clothes.core].max() < .05
    assert np.abs(clothes.flesh[inner] - picture[inner]/255.).mean() > .03                   # and a neck under it is no cloth


def test_an_overexposed_face_has_clothes_all_the_same(portrait, head):
    "Most of it as white as can be: no number of its lit half fails."
    image, track, matte = portrait
    coat = (np.mgrid[:SIZE, :SIZE][0] > track.landmarks[0, 152, 1] + .12*SIZE)
    white = np.where(coat[..., None], 20, np.where((matte > .5)[..., None], 255, image)).astype(np.uint8)
    cloth = Clothes(Portrayed(white, track, head, np.maximum(matte, coat).astype(np.float32))).cloth
    assert np.isfinite(cloth).all() and cloth[ndi.binary_erosion(coat, iterations=3)].mean() > .8


def test_skin_in_too_much_light_is_no_collar(portrait, head):
    "It turns white by and by, and a white shirt begins beside it; the shirt is cloth, the neck goes along."
    image, track, matte = portrait
    (y, x), L = np.mgrid[:SIZE, :SIZE], track.landmarks[0]
    plain = MeshAnimator(image, track, head, matte, supersample=1).portrayed
    low = L[152, 1] + .1*SIZE
    shirt = (plain.neck_seen | (matte < .5) & (np.abs(x - L[152, 0]) < .4*SIZE)) & (y > low)
    lit = plain.neck_seen & (y <= low) & (x > L[152, 0])
    face = plain.raster0.mask & (matte > .5) & (y < L[152, 1])
    skin = np.array([200, 150, 130])*(image.mean(-1, keepdims=True)/np.percentile(image.mean(-1)[face], 90))
    blotches = ndi.gaussian_filter(np.random.default_rng(0).standard_normal(image.shape), (2, 2, 0))
    picture = np.where((matte > .5)[..., None], skin, image)*(1 + .06*blotches/blotches.std())      # skin's hues differ
    picture[lit] = [222, 194, 186]
    picture[shirt] = 245
    clothes = Clothes(Portrayed(np.clip(picture, 0, 255).astype(np.uint8), track, head, np.maximum(matte, shirt).astype(np.float32)))
    assert clothes.cloth[ndi.binary_erosion(shirt, iterations=3)].mean() > .9
    assert clothes.cloth[lit & (y < low - .02*SIZE)].mean() < .1


def test_a_strip_of_shirt_beside_a_tie_is_no_tie():
    "What is neither a garment's inner colour nor skin nor a mixture of both keeps its own."
    tie, shirt, skin = np.float32([.05, .05, .1]), np.float32([.95, .95, .9]), np.float32([.7, .45, .35])
    image = np.stack([tie, shirt, skin, .5*tie + .5*skin])[None]
    as_if = SimpleNamespace(portrayed=SimpleNamespace(bled=image), flesh=np.broadcast_to(skin, image.shape))
    out = Body._own_seams(as_if, np.broadcast_to(tie, image.shape), np.ones((1, 4), np.float32))
    assert np.abs(out - np.stack([tie, shirt, tie, tie])).max() < .02


def test_beside_a_collar_what_moves_leaves_nothing_behind(portrait, head):
    "What the clothes are given of the portrait's own pixels is nowhere on a neck that goes along."
    _, animator = dressed(head, portrait)
    body, before, p = animator.body, animator.body.clothes[..., 3].copy(), animator.portrayed
    p.image = np.random.default_rng(0).random(p.image.shape).astype(np.float32)                # nothing of which the layers have
    body.slides = np.zeros_like(body.slides)                                                  # not even just beyond the strip beside the collar
    animator.ground
    neck = (before < .5) & (body.following > .1)
    assert neck.any() and (body.clothes[..., 3] - before)[neck].max() < 1e-6


@pytest.mark.parametrize('tint', [[1, 1, 1], [1.12, .98, .8]])
def test_a_white_shirt_is_cloth(portrait, head, tint):
    "By its hue, or where there is none by its light: lighter than the lightest of the face. A patch of shadow on a neck is none."
    image, track, matte = portrait
    (y, x), L = np.mgrid[:SIZE, :SIZE], track.landmarks[0]
    plain = MeshAnimator(image, track, head, matte, supersample=1).portrayed
    low, neck = L[152, 1] + .06*SIZE, plain.neck_seen & (y <= L[152, 1] + .06*SIZE)
    shirt = (plain.neck_seen | (matte < .5) & (np.abs(x - L[152, 0]) < .4*SIZE)) & (y > low)
    grey = np.where(plain.neck_seen[..., None], plain.face_colour*180, image).mean(-1, keepdims=True).repeat(3, -1)
    face = plain.raster0.mask & (matte > .5) & (y < L[152, 1])
    grey = .6*grey/np.median(grey[face])*127                                      # a face in dim light
    spot = neck & (np.hypot(x - L[152, 0], 1.5*(y - L[152, 1] - .03*SIZE)) < .035*SIZE) & (y > L[152, 1] + 2)
    grey = grey*tint*(1 + .03*(tint[0] > 1)*np.random.default_rng(0).standard_normal(grey.shape))       # skin's hues differ, sepia's do not
    grey[shirt], grey[spot] = 235, 12
    clothes = Clothes(Portrayed(np.clip(grey, 0, 255).astype(np.uint8), track, head, np.maximum(matte, shirt).astype(np.float32)))
    inner = ndi.binary_erosion(shirt, iterations=3)
    assert (clothes.portrayed.colourless > .9) == (tint[0] == 1) and inner.sum() > 500 and spot.sum() > 20
    assert clothes.cloth[inner].mean() > .95 and clothes.cloth[neck & ~ndi.binary_dilation(shirt, iterations=3)].mean() < .05
    assert clothes.cloth[ndi.binary_erosion(spot)].max() < .1 and clothes.cloth[clothes.core].max() < .1


def test_a_neck_that_turns_is_round(portrait, head):
    "Its outline in the portrait is left only as long as it is one, at rest and behind; what stays is there anyway."
    image, animator = dressed(head, portrait)
    p, body, sheet = animator.portrayed, animator._settled(), animator.sheet
    points, _, _, side = body.sides
    def left(yaw):
        V, A, _ = p.at(*state(portrait[1], head, yaw=yaw))
        return body.sides_shown(V, A)
    x, mine = sheet.source[points, 0], (side > .9) & (body.follows[points] > .7)
    near, far = (mine & (s*(x - p.landmarks[152, 0]) > 0) for s in (-1, 1))
    assert near.any() and far.any() and (left(0) == 1).all()
    turned = left(25)[points]
    assert min(turned[near].mean(), turned[far].mean()) < .3 and max(turned[near].mean(), turned[far].mean()) > .95
    others = np.ones(len(sheet.source), bool)
    others[points] = False
    assert (left(25)[others] == 1).all()


def test_what_lies_under_a_face_is_no_wider(portrait, head):
    "Or a cheek that turns away had two outlines."
    animator = dressed(head, portrait)[1]
    p, back = animator.portrayed, animator.back
    out = (back.thick[:, 0]*np.sign(p.V0[:, 0]))[p.is_face & (p.facing0 > AT_OUTLINE[1]) & (p.face_mask > .5)]
    assert len(out) > 500 and out.max() < .0005


def test_the_hull_gives_way_to_hair_that_hangs(portrait, head):
    "At its lower end, at the side where something hangs beside the chin; else it stays."
    image, track, matte = portrait
    (y, x), L = np.mgrid[:SIZE, :SIZE], track.landmarks[0]
    beside = (matte < .5) & (y > L[10, 1]) & (x > L[152, 0] + .08*SIZE) & (x < L[152, 0] + .3*SIZE)
    picture = np.where(beside[..., None] | ((matte > .5) & (y < L[10, 1]))[..., None], np.uint8([30, 22, 18]), image).astype(np.uint8)
    long, short = (MeshAnimator(picture, track, head, m.astype(np.float32), supersample=1) for m in (np.maximum(matte, beside), matte))
    way, low = long.back._gives_way(long.clothes, long.hair), (long.portrayed.level < -.01) & (np.abs(long.portrayed.rest[:, 0]) > .05)
    left = long.portrayed.camera0.project(long.portrayed.V0.astype(np.float64))[:, 0] > L[152, 0]
    assert way[low & left].min() > .9 and way[low & ~left].max() < .1 and way[long.portrayed.level > .04].max() == 0
    assert short.back._gives_way(short.clothes, short.hair).max() < .1


def test_hair_that_hangs_does_not_bend(portrait, head):
    "Beside cheek and jaw it follows the head less and less from the eyes down, as far out as it hangs; so does hair of the skin's colour, beside the cheek."
    image, track, matte = portrait
    (y, x), L, unit = np.mgrid[:SIZE, :SIZE], track.landmarks[0], np.linalg.norm(track.landmarks[0, 468, :2] - track.landmarks[0, 473, :2])
    beside = (matte < .5) & (y > L[10, 1]) & (x > L[152, 0] + .08*SIZE) & (x < L[152, 0] + .3*SIZE)
    black, fair = np.uint8([30, 22, 18]), np.median(image[matte > .5], axis=0).astype(np.uint8)
    eyes, mouth, chin, column = *(L[list(index), 1].mean() for index in ((468, 473), (13, 14), (152,))), int(L[152, 0] + .26*SIZE)
    for colour in (black, fair):
        picture = np.where(beside[..., None], colour, np.where(((matte > .5) & (y < L[10, 1]))[..., None], black, image)).astype(np.uint8)
        an = MeshAnimator(picture, track, head, np.maximum(matte, beside).astype(np.float32), supersample=1)
        follows = an.body.following[int(eyes):int(chin + .3*unit) if colour is black else int(mouth), column]
        assert follows[0] > .9 and follows[-1] > .2 and np.abs(np.diff(follows)).max()*unit < 1


def test_long_hair_with_gloss_is_no_cloth(portrait, head):
    "Hair that hangs beside the cheek past the mouth, brown, with strands below that shine blue, is hair as far as it has its colours; a red shirt beneath it is cloth."
    image, track, matte = portrait
    (y, x), L = np.mgrid[:SIZE, :SIZE], track.landmarks[0]
    unit, (eyes, mouth, chin) = np.linalg.norm(L[468, :2] - L[473, :2]), (L[k, 1] for k in (468, 13, 152))
    side = (np.abs(x - L[152, 0]) < 1.7*unit) & (matte < .5)
    hair, shirt = side & (y > eyes - unit) & (y <= chin + .5*unit), side & (y > chin + .5*unit)
    gloss = hair & (y > mouth + .15*unit) & (y < chin + .3*unit) & (np.abs(np.abs(x - L[152, 0]) - 1.2*unit) < .2*unit)
    brown, noise = np.median(image[(matte > .5) & (y < chin)], axis=0)*.5, np.random.default_rng(0).normal(0, 1, (2, SIZE, SIZE, 1))
    picture = np.where(hair[..., None], (brown + .2*noise[1]*([84, 84, 100] - brown))*(1 + .15*noise[0]), image)
    picture[gloss], picture[shirt] = .4*brown + .6*np.array([84, 84, 100]), [170, 20, 25]
    clothes = Clothes(Portrayed(np.clip(picture, 0, 255).astype(np.uint8), track, head, np.maximum(matte, hair | shirt).astype(np.float32)))
    inner = ndi.binary_erosion(gloss, iterations=2)
    assert inner.sum() > 50 and clothes.cloth[inner].mean() < .1 and clothes.hanging[inner].mean() > .9
    assert clothes.cloth[ndi.binary_erosion(shirt, iterations=4)].mean() > .8


def test_a_necks_outline_gives_way_evenly(portrait, head):
    "Of two neighbours on the sheet no one goes and the other stays: that would be stairs on a neck."
    _, animator = dressed(head, portrait)
    points, _, _, share = animator.body.sides
    side = np.zeros(len(animator.body.follows))
    side[points] = share
    corners = side[animator.sheet.person_faces]
    assert share.max() > .3 and (corners.max(1) - corners.min(1)).max() < .5


def test_a_beard_along_the_jaw_is_no_collar(portrait, head):
    "A dark band below the chin with the bare neck beneath it goes with the head; with cloth beneath it, it is cloth."
    image, track, matte = portrait
    y, chin, unit = np.arange(SIZE)[:, None], track.landmarks[0, 152, 1], np.linalg.norm(track.landmarks[0, 468, :2] - track.landmarks[0, 473, :2])
    band, below = (matte > .5) & (y > chin) & (y < chin + .25*unit), (matte > .5) & (y >= chin + .25*unit)
    middle = ndi.binary_erosion(band, iterations=2)
    for worn, likely in ((band, 0), (band | below, 1)):
        picture = np.where(worn[..., None], np.uint8([12, 12, 14]), image)
        assert abs(Clothes(Portrayed(picture, track, head, matte)).cloth[middle].mean() - likely) < .1


def test_what_is_carried_beside_the_outline_fades(portrait, head):
    "Little by little as the head moves: no frame jumps."
    image, animator = dressed(head, portrait)
    rest, seen = state(portrait[1], head), []
    for yaw in (0, 2, 4, 8, 16, 32):
        V, A, jaw = animator.portrayed.at(*state(portrait[1], head, yaw=yaw))
        seen.append(animator.body.in_place(animator.sheet.still, A)[animator.body.follows > .9].mean())
    assert seen[0] == 1 and seen[1] > .95 and seen[-1] < .5 and np.all(np.diff(seen) <= 0)


def test_a_pose_is_whole_or_none(animator, portrait, head):
    e, j, t = state(portrait[1], head)
    rgba = animator.frame(e, j, t)
    with pytest.raises(ValueError, match='together'): animator.composite(rgba, joints=j)
    with pytest.raises(ValueError, match='together'): animator.composite(rgba, expression=e)


def turned_portrait(head, yaw, hood=False):
    "A head that looks to one side, with a dark hood around it or without."
    camera, shape, motion = facing_camera(1.6*SIZE, SIZE, SIZE), np.zeros(head.n_shape, np.float32), Motion.still(1, head.n_expression)
    motion.translation[:], motion.joints[0, 0, 1] = [0, -.02, -.6], np.radians(yaw)
    image, matte, landmarks = drawn(head, shape, motion, camera)
    if hood:
        wide = ndi.binary_dilation(matte > .5, iterations=16)
        image[wide & (matte < .5)], matte = [40, 20, 12], wide.astype(np.float32)
    return MeshAnimator(image, Track(motion, shape, camera, landmarks[None], np.zeros(1), np.ones(1, bool)), head, matte, supersample=1)


def test_a_hood_covers_the_side_turned_away(head):
    def side(an, sign):
        p = an.portrayed
        return an.unseen.own[p.is_face & (an.seen < .1) & (sign*p.V0[:, 0] > .05) & (p.V0[:, 1] > p.joints3[3, 1] - .03)].mean()
    bare, hood = turned_portrait(head, -25), turned_portrait(head, -25, hood=True)
    away = -1 if bare.portrayed.turned_away('right') > .5 else 1
    assert side(hood, away) < .6*side(bare, away)
    assert side(hood, -away) > .8*side(bare, -away)                    # what is in view is not covered
    front = turned_portrait(head, 0, hood=True).portrayed
    assert front.turned_away('left') == front.turned_away('right') == 0


def test_a_side_turned_away_is_as_the_other(head):
    "A mark on the cheek that is shown is on both when the head turns back; on a face seen from the front nothing is copied."
    an = turned_portrait(head, -35)
    p, (y, x) = an.portrayed, np.mgrid[:SIZE, :SIZE] + .5
    away = 1 if p.turned_away('left') > .5 else -1
    assert p.away.max() > .5
    cheek = np.flatnonzero(p.is_face & (away*p.rest[:, 0] < -.025) & (p.facing0 > .8) & (np.abs(p.level + .035) < .01))[0]
    picture = p.image.copy()
    picture[np.hypot(x - p.T0[cheek, 0], y - p.T0[cheek, 1]) < 5] = [.1, .6, .2]
    made, pose = MeshAnimator(picture, p.track, head, p.matte, supersample=1), state(p.track, head, yaw=20)
    frames = made.frame(*pose), an.frame(*pose)
    V, A, _ = p.at(*pose)
    other = np.flatnonzero(p.twin == cheek)
    u, v = p.camera.moved(A).project(V[other].astype(np.float64)).mean(0)[:2].astype(int)
    greener = [f[v - 1:v + 2, u - 1:u + 2, 1].mean() - f[v - 1:v + 2, u - 1:u + 2, 0].mean() for f in frames]
    assert greener[0] > greener[1] + .15, (greener, u, v)
    assert not turned_portrait(head, 0).unseen.copied.any()


def test_sideburns_and_beards_go_on(head, portrait):
    "What is seen of a beard goes on along the jaw up to the hair before the ear, in its colours; without one there is a short sideburn, and beside long hair nothing is made up."
    image, track, matte = portrait
    L, (y, x) = track.landmarks[0], np.mgrid[:SIZE, :SIZE]
    p = MeshAnimator(image, track, head, matte, supersample=1).portrayed
    on = lambda which: (p.raster0.face >= 0) & which[p.faces[np.maximum(p.raster0.face, 0)]].all(-1)
    crown, jaw = ndi.binary_dilation(on(p.scalp), iterations=2) & (matte > .5), on(p.is_face) & (y > L[17, 1])
    long = ndi.binary_dilation(matte > .5, iterations=int(.1*SIZE)) & ~on(~p.scalp) & (y > L[10, 1])
    made = lambda *where: MeshAnimator(np.where(np.any(where, 0)[..., None], np.uint8([40, 34, 30]), image), track, head, np.maximum(matte, np.any(where, 0)), supersample=1)
    shaven, bearded, veiled = made(crown), made(crown, jaw), made(crown, long)
    line = cKDTree(p.points(p.rest, [132, 58, 288, 361])).query(p.rest)[0] < .008
    bare = p.is_face & (p.facing0 < .1) & ~np.isin(np.arange(len(p.rest)), p.part('left_ear', 'right_ear'))
    hidden, high = bare & line, bare & (cKDTree(p.points(p.rest, [127, 356])).query(p.rest)[0] < .008)
    assert hidden.sum() > 3 and high.any()
    assert bearded.hair.beard[hidden].mean() > .55 and shaven.hair.beard[hidden].mean() < .3 and veiled.hair.beard.max() < .2
    assert bearded.unseen.own[hidden].mean() < .75*shaven.unseen.own[hidden].mean()
    assert shaven.hair.beard[high].mean() > shaven.hair.beard[hidden].mean() + .2


@pytest.mark.parametrize('light', [.15, 1.4])
def test_a_strand_before_a_slope_is_no_smudge(head, portrait, light):
    "A dark speck on a cheek's slope, or a light one at its end, is not shown when that turns to the front; on the front it stays."
    image, track, matte = portrait
    plain = MeshAnimator(image, track, head, matte, supersample=1)
    p, (y, x) = plain.portrayed, np.mgrid[:SIZE, :SIZE] + .5
    low = p.is_face & (p.level < -.03) & (p.level > -.06) & (plain.unseen.seen > .5)
    slope = np.flatnonzero(low & (p.facing0 > .25) & (p.facing0 < .31) & (np.abs(p.rest[:, 0]) > .045))
    front = np.flatnonzero(low & (p.facing0 > .75) & (np.abs(p.rest[:, 0]) > .03))
    assert len(slope) and len(front)
    def seen(at):
        there = np.hypot(x - p.T0[at, 0], y - p.T0[at, 1]) < .012*SIZE
        return MeshAnimator(np.where(there[..., None], np.clip(light*image, 0, 255).astype(np.uint8), image), track, head, matte, supersample=1).unseen.seen[at]
    assert seen(slope[0]) < .3*plain.unseen.seen[slope[0]] and seen(front[0]) > .9*plain.unseen.seen[front[0]]


def test_what_lies_between_a_vertex_and_one_that_is_not_shown_is_a_smudge_too(head, portrait):
    "A dark speck halfway along an edge from a slope's vertex outwards; the colours at both ends are those of skin."
    image, track, matte = portrait
    unseen = MeshAnimator(image, track, head, matte, supersample=1).unseen
    p, (y, x) = unseen.portrayed, np.mgrid[:SIZE, :SIZE] + .5
    slope = p.is_face & (p.level < -.03) & (p.level > -.06) & (np.abs(p.rest[:, 0]) > .045) & (p.facing0 < .45)
    i, j = p.skin_faces[:, :2].T
    apart = np.linalg.norm(p.T0[i] - p.T0[j], axis=1)[:, None]
    at = np.argmax(np.where(slope[i] & (p.facing0[i] > .3) & (p.facing0[j] < p.facing0[i]), apart[:, 0], 0))
    i, j, apart = i[at], j[at], apart[at, 0]
    u, v = .5*(p.T0[i] + p.T0[j])[:2]
    p.skin = np.where((np.hypot(x - u, y - v) < .3*apart)[..., None], .2*p.skin, p.skin)
    assert unseen._specks(sampled(p.skin, p.T0))[i] > .6


def test_what_is_shown_ends_evenly_beside_made_up_hair(head):
    "A cheek that meets hair that nobody saw has no teeth: hardly a triangle that is shown at one corner and not at the other."
    an = turned_portrait(head, 20, hood=True)
    p, seen = an.portrayed, an.unseen.seen
    some = p.evened(an.unseen.covered, .05) > .1
    corners = seen[p.skin_faces[some[p.skin_faces].all(1)]]
    assert len(corners) > 1000 and np.quantile(corners.max(1) - corners.min(1), .95) < .6


@pytest.mark.parametrize('light', [.7, .1])
def test_light_hair_is_no_darker_for_its_shadow(light):
    "Light hair whose nearest pixels lie in shadow is lit again farther on, no more than most of it is; dark hair stays as it is."
    bled = np.full((64, 64, 3), light, np.float32)
    bled[:, :12] = 1.25*light                                                        # gloss
    bled[:, 24:32] = .4*light
    core = np.arange(64)[None].repeat(64, 0) < 32
    away = np.maximum(np.arange(64) - 31, 0)[None].repeat(64, 0)
    hair = Hair.__new__(Hair)
    hair.portrayed = SimpleNamespace(bled=bled, eyes_apart=30.)
    made = hair._lit(np.where(core[..., None], bled, .4*light), core, away)
    assert np.allclose(made[:, 31], .4*light)                                        # in the shadow itself
    assert np.allclose(made[:, 60], light if light > .5 else .4*light, atol=.02)


def test_hair_goes_on_where_nothing_is_seen(head):
    an = turned_portrait(head, 0, hood=True)
    p, hair, back, hood = an.portrayed, an.hair, an.back, np.array([40, 20, 12])/255
    face, top = p.face_mask > .9, p.scalp & (p.level > 0)
    assert hair.seen.any() and np.abs(p.image[hair.seen] - hood).max() < .05            # told from the face by its colour
    assert np.abs(hair.mane - hood).mean() < .05                                        # and everywhere
    assert (hair.grown[top] == 1).all() and hair.grown[face & (p.facing0 > .4)].max() < .1
    hidden = top & (p.facing0 < 0)
    high = hidden & (p.level > .04)                                                      # below, the hull gives way to a hood that hangs beside the chin
    weight = (back.fixed[:, 4]*back.back[:, 0])[:len(p.rest)]
    assert (back.back[:len(p.rest)][high, 4] == 1).all() and (weight[hidden] > .42).all()       # opaque, and all hair: `paint_mesh` ends a hairline there
    assert np.allclose(an.sheet.rim_shown(p.facing0), 1)                                # at rest the outline is the portrait's


def test_hair_under_a_hat_is_hair(head):
    "A black hat tells nothing of the light hair under it: what stands beside the head down to the mouth does."
    an = turned_portrait(head, 0, hood=True)
    p, y = an.portrayed, np.arange(SIZE)[:, None]
    light, eyes = np.array([150, 140, 100])/255, p.landmarks[[468, 473], 1].mean()
    hood = (np.abs(p.image - np.array([40, 20, 12])/255).max(-1) < .02) & (p.matte > .5)
    picture = np.where((hood & (y > eyes - .4*p.eyes_apart))[..., None], light, p.image).astype(np.float32)
    hair = MeshAnimator(picture, p.track, head, p.matte, supersample=1).hair
    low = ndi.binary_erosion(hood, iterations=6) & (y > eyes) & (y < p.landmarks[13, 1])
    assert hair.hangs[low].min() > 0 and hair.seen[low].mean() > .9
    assert not hair.seen[p.raster0.mask & (y > eyes)].any()
    assert (an.hair.hangs == -9).all()                                                  # all of one colour is told by its crown


def test_a_hairline_is_sharper_than_its_triangles():
    "Black hair over white skin, its weight 0 at one side of a square and 1 at the other."
    corners, faces, n = np.float32([[0, 0, 1], [64, 0, 1], [64, 64, 1], [0, 64, 1]]), np.int32([[0, 1, 2], [0, 2, 3]]), np.zeros(4)
    skin, hair, full = np.ones((64, 64, 3), np.float32), np.zeros((64, 64, 3), np.float32), np.ones((2, 2), np.float32)
    fixed = fixed_columns(corners[:, :2], corners[:, :2], np.float32([0, 1, 1, 0]), n, corners[:, :2], n, n, n, n, corners[:, :2])
    even = np.stack([np.ones((64, 64)), np.zeros((64, 64))]).astype(np.float32)
    moving = np.float32([[1, 1, 1, 1, 1, 9]]*4)                                         # all that is told is hair; white; opaque; no outline
    r = rasterize(corners, faces, 64, 64)
    grey = []
    for kind in (OF_SKIN, OF_HULL):
        out = np.zeros((64, 64, 4), np.float32)
        paint_mesh(r.face, r.bary, faces, np.full(2, kind, np.int8), fixed, moving, skin, hair, skin, skin, skin, full, even, out)
        row = out[32, :, 0]
        assert row[0] > .95 and row[-1] < .05 and (np.diff(row) < 1e-6).all()
        grey.append(((row > .1) & (row < .9)).mean())
    assert grey[0] > .7 and grey[1] < .3
    grain, edges = np.stack([np.ones((64, 64)), np.random.default_rng(0).standard_normal((64, 64))]).astype(np.float32), {}
    for name, noise in (('plain', even), ('ragged', grain)):
        out = np.zeros((64, 64, 4), np.float32)
        paint_mesh(r.face, r.bary, faces, np.full(2, OF_HULL, np.int8), fixed, moving, skin, hair, skin, skin, skin, full, noise, out)
        edges[name] = (out[4:60, :, 0] > .5).sum(1)
    assert np.ptp(edges['plain']) <= 1 and .6 <= edges['ragged'].std() < 5 and abs(edges['ragged'].mean() - edges['plain'].mean()) < 1.5


def test_hairs_outline_is_as_ragged_as_the_portraits(portrait, head):
    "A hull that turns away to the right: strands end at different places, in place of one edge."
    corners, faces, n = np.float32([[0, 0, 1], [64, 0, 1], [64, 64, 1], [0, 64, 1]]), np.int32([[0, 1, 2], [0, 2, 3]]), np.zeros(4)
    white, full, noise = np.ones((64, 64, 3), np.float32), np.ones((2, 2), np.float32), np.random.default_rng(0).standard_normal((2, 64, 64)).astype(np.float32)
    fixed = fixed_columns(corners[:, :2], corners[:, :2], n + 1, n, corners[:, :2], n, n, n, n, corners[:, :2])
    r, wide = rasterize(corners, faces, 64, 64), {}
    for hairy in (0, 1):
        out = np.zeros((64, 64, 4), np.float32)
        paint_mesh(r.face, r.bary, faces, np.full(2, OF_HULL, np.int8), fixed, np.float32([[hairy, 1, 1, 1, 1, a] for a in (6, 0, 0, 6)]), *[white]*5, full, noise, out)
        wide[hairy] = out[..., 3].sum(1)
    assert (wide[0] == 64).all() and 45 < wide[1].mean() < 60 and wide[1].std() > 1 and np.ptp(wide[1]) < 5        # no comb's teeth (6.1 across the outline)
    image, track, matte = portrait
    top, mattes = int(track.landmarks[0, 10, 1]), [matte, matte.copy()]
    for x in range(0, SIZE, 6): mattes[1][:top, x:x + 3] = ndi.maximum_filter1d(matte[:top, x:x + 3], 9, axis=0)
    frayed = []
    for m in mattes:
        dark = image.copy()
        dark[:top][m[:top] > .5] = 25
        frayed.append(MeshAnimator(dark, track, head, m).hair.frayed)
    assert frayed[1] > 1.5*frayed[0]


def test_edges_have_no_teeth(animator):
    "From vertex to vertex, hair's and a neck's opacity on the hull does not jump from none to all: each triangle would be a tooth."
    p, back = animator.portrayed, animator.back
    edges, n = np.concatenate([p.skin_faces[:, [k, (k + 1) % 3]] for k in range(3)]), len(p.rest)
    jump = lambda of_vertex: np.abs(np.diff(of_vertex[edges], axis=1)).max()
    assert jump(back.fixed[:n, 4]*back.back[:n, 0]) < .3 and jump(back.neck[:n, 4]) < .9


def test_a_hidden_ear_is_like_the_other(head):
    for yaw, hidden, shown in ((-30, 'right', 'left'), (30, 'left', 'right')):
        an = turned_portrait(head, yaw)
        p, hair = an.portrayed, an.hair
        if p.turned_away(hidden) < .5: hidden, shown = shown, hidden
        ear, other = p.part(f'{hidden}_ear'), p.part(f'{shown}_ear')
        assert hair.ears_shown[other].all() and not hair.ears_shown[ear].any()
        assert not hair.thick[ear].any() and hair.thick[other].any()                 # stands; under the sheet, which carries the other, that is pressed flat
        assert hair.ears_copied[ear].mean() > .3 and not hair.ears_copied[other].any()


def test_of_an_ear_shown_as_a_sliver_the_rest_is_like_the_other(head):
    hair = (an := turned_portrait(head, 7)).hair
    sliver, other = (an.portrayed.part(f'{side}_ear') for side in ('left', 'right'))
    assert an.portrayed.turned_away('left') > .5 and hair.ears_shown[sliver].all()
    assert hair.ears_copied[sliver].all() and not hair.thick[sliver].any() and not hair.ears_copied[other].any()


def test_the_hull_has_no_corners(animator):
    p, back = animator.portrayed, animator.back
    (hull, outwards), n = back.hull(p.V0), len(p.V0)
    i, j = back.edges.T
    on = p.scalp & (p.level > .02)
    N = outwards[:n][on]
    assert (N/np.linalg.norm(N, axis=1, keepdims=True)*vertex_normals(hull, back.faces)[:n][on]).sum(1).min() > .95
    flat = p.V0 + back.thick
    assert np.abs(hull[n:] - .5*(hull[i] + hull[j])).max() > .0005     # arcs on the scalp
    rim = p.scalp[i] & p.scalp[j]
    away = lambda q: np.linalg.norm(q - flat[p.scalp].mean(0), axis=-1).mean()
    assert abs(away(np.concatenate([hull[:n][p.scalp], hull[n:][rim]])) - away(np.concatenate([flat[p.scalp], .5*(flat[i] + flat[j])[rim]]))) < 2e-4
    skin = ~p.scalp[i] & ~p.scalp[j]
    assert np.allclose(hull[n:][skin], .5*(flat[i] + flat[j])[skin], atol=1e-6)


def test_a_film_takes_the_place(portrait, head):
    image, track, matte = portrait
    track = SimpleNamespace(**{**vars(track), 'motion': Motion.concat([track.motion]*2)})
    film = make_animator('video', frames=np.stack([image]*2), track=track, head=head, matte=np.stack([matte]*2))
    out = list(film.frames(size=96))
    assert len(out) == 2 and out[0].shape == (96, 96, 4) and 0 < (out[0][..., 3] > 128).mean() < .9
    assert film.composite(film.frame(0), 0).shape == (SIZE, SIZE, 3)
    with pytest.raises(InputError, match='frames'): VideoAnimator(np.stack([image]*3), track, head, np.stack([matte]*3))


def test_names(portrait):
    with pytest.raises(InputError, match='no animator'): make_animator('puppet')
    with pytest.raises(InputError, match='no animator'): make_animator('facevid2vid')


def test_tools():
    mask = polygon_mask(np.array([[10, 10], [30, 10], [30, 20], [10, 20.]]), 40, 50)
    assert abs(mask.sum() - 200) < 12 and mask[15, 20] == 1 and mask[5, 5] == 0
    assert polygon_mask(np.array([[10, 10], [30, 10], [30, 20], [10, 20.]]), 40, 50, grow=2).sum() > 280
    assert polygon_mask(np.array([[10, 10], [30, 10.]]), 40, 50).sum() == 0
    assert abs(polygon_mask(np.array([[10, 10], [20, 10.1], [30, 10.]]), 40, 50, grow=2).sum() - 95) < 12      # a shut eye
    assert not draw_curve(np.array([[-30., -30], [-20, -25]]), 40, 40, np.ones(2)).any()
    y, x = np.mgrid[:41, :41] - 20
    assert abs(inflate(x*x + y*y < 18**2)[20, 20] - 18) < .8
    assert smoothstep(0, 1, np.float32(.5)) == .5
    image, alpha = np.zeros((20, 20, 3), np.float32), np.zeros((20, 20), np.float32)
    image[5:15, 5:15], alpha[5:15, 5:15] = [1, 0, 0], 1
    assert bleed(image, alpha)[5:15, 2:4, 0].min() > .8


def test_a_head_that_the_picture_cuts_off_goes_on(head, portrait):
    "Cut off at the forehead, its border repeated upwards, as a crop does it: not a cone, but the head that was there."
    image, track, matte = portrait
    top, rows = int(track.landmarks[0, 10, 1]) + 4, np.arange(SIZE)[:, None]
    cut, cone = np.where((rows < top)[..., None], image[top], image), np.where(rows < top, matte[top], matte)
    a = MeshAnimator(cut, replace(track, picture=np.float32([0, top, SIZE, SIZE])), head, cone)
    shown = a.frame(*a.portrayed.source)
    above, there = rows.ravel() < top, matte > .5
    alike = lambda alpha: (there & (alpha > .5))[above].sum()/(there | (alpha > .5))[above].sum()
    assert alike(shown[..., 3]) > .85 > .6 > alike(cone)
    assert np.abs(a.composite(shown) - cut/255)[top + 8:].mean() < .02                          # what the picture does show is as it was
    turned = a.frame(*state(track, head, yaw=20))
    assert turned[..., 3].max(1)[top - 12:top + 12].min() > .99                                # and there is no gap where the two meet


def test_a_crown_that_the_picture_cuts_off_has_strands(head, portrait):
    "Of whose hair too little is shown to tell how it runs."
    image, track, matte = portrait
    top = int(track.landmarks[0, 10, 1] + .02*SIZE)
    cut = replace(track, picture=np.float32([0, top, SIZE, SIZE]))
    beside = (matte > .5) & (np.abs(np.arange(SIZE) - track.landmarks[0, 4, 0]) > .27*SIZE) & (np.arange(SIZE)[:, None] < top + .12*SIZE)
    picture = np.where(beside[..., None], np.uint8([60, 42, 30]), image)
    hair = MeshAnimator(picture, cut, head, matte, supersample=1).hair
    assert not hair.bald and hair.seen.any() and hair.seen.sum() < .5*hair.portrayed.eyes_apart**2
    made = np.log(hair.mane[:top - 4].mean(-1) + .01)
    assert .05 < made.std() < .4 and np.abs(np.diff(made, axis=1)).mean() > 2*np.abs(np.diff(made, axis=0)).mean()          # they hang down


def test_a_piece_that_cloth_cuts_off_is_cloth(head, portrait):
    "Of a tie in the skin's colour, at a person's lower border."
    image, animator = dressed(head, portrait)
    image, p = image.copy(), animator.portrayed
    y, x = np.mgrid[:SIZE, :SIZE]
    piece = (np.abs(x - p.landmarks[152, 0]) < 24) & (p.matte > .9)
    piece &= y > np.flatnonzero(piece.any(1)).max() - 9
    image[piece] = 255*p.face_colour
    clothes = MeshAnimator(image, portrait[1], head, p.matte, supersample=1).clothes
    assert piece.sum() > 50 and clothes.cloth[piece].min() > .9
    assert clothes.cloth[clothes.core].max() < .1


def test_shoulders_go_on_beyond_the_picture(portrait, head):
    "As they are at its border, from the mouth's height down; what is beside a head is not a shoulder."
    image, track, matte = portrait
    L, (y, x) = track.landmarks[0], np.mgrid[:SIZE, :SIZE]
    right, high = SIZE - 12, int(.6*L[152, 1] + .4*L[17, 1])
    shoulder = (y > high) & (x > L[152, 0])
    cut = np.where(x < right, np.maximum(matte, shoulder), 0).astype(np.float32)
    p = Portrayed(image, replace(track, picture=np.float32([0, 0, right, SIZE])), head, cut)
    beyond = x >= right
    assert p.matte[beyond & (y > high + 2)].min() > .9 and p.matte[beyond & (y < high - 2)].max() < .1
    assert p.shown[beyond & (y > high + 2)].all() and not p.shown[beyond & (y < L[4, 1])].any()


def test_a_neck_that_is_drawn_out_takes_no_collars_line_along(portrait, head):
    "What the layers lack beside a collar is made up for at rest, and gone, with all of its edges, as soon as the neck slides."
    image, animator = dressed(head, portrait)
    body, sheet = animator._settled(), animator.sheet
    V, A, _ = animator.portrayed.at(*state(portrait[1], head)[:2], portrait[1].motion.translation[0] + np.float32([0, .02, 0]))
    left = body.in_place(sheet.moved(V), A)
    line = body.strands[1]*(ndi.binary_dilation(body.slides & body.covered))*(body.following > .2)
    on = np.zeros((SIZE, SIZE, 4), np.float32)
    screen = np.concatenate([sheet.source, np.ones((len(sheet.source), 1))], 1).astype(np.float64)
    r = rasterize(screen, sheet.person_faces, SIZE, SIZE)
    paint_sheet(r.face, r.bary, sheet.person_faces, sheet.source, np.ones((SIZE, SIZE, 3), np.float32), line.astype(np.float32), left, np.zeros_like(left), on)
    assert line.max() > .3 and on[..., 3].max() < .05


def test_a_sharpened_pictures_glow_is_not_the_grounds():
    away = np.hypot(*np.mgrid[-128:128, -128:128]) - 60                         # pixels beside a disk
    matte, ground = np.clip(.5 - away, 0, 1), np.full((256, 256, 3), .5) + .1*np.mgrid[-1:1:256j][:, None, None]
    ring = ((away > 0) & (away < 4))[..., None]
    made = empty_ground(ground + .15*ring, matte)
    assert np.abs(made - ground).max() < .03
    far = (away > 8) & (np.abs(np.mgrid[-128:128, -128:128]) < 116).all(0)
    assert np.abs(empty_ground(ground, matte) - ground)[far].max() < 1e-6       # without one it stays as it is


def test_a_heads_rim_is_no_cloth(portrait, head):
    "Where the background's colour lies on it, it would stay behind as a line when the head turns."
    image, animator = dressed(head, portrait)
    image, p = image.copy(), animator.portrayed
    y = np.mgrid[:SIZE, :SIZE][0]
    rim = (p.matte > .1) & ndi.binary_dilation(p.matte < .1, iterations=2) & (y > p.landmarks[[61, 291], 1].mean()) & (y < p.landmarks[152, 1])
    image[rim] = [40, 70, 220]
    made = MeshAnimator(image, portrait[1], head, p.matte, supersample=1)
    assert rim.sum() > 40 and (made.clothes.cloth[rim] > .5).mean() > .3                  # told by its hue
    assert made._settled().clothes[..., 3][rim].max() < .1


def test_an_ear_that_nobody_saw_has_hollows(head):
    "Darker ones, and red; not one that the portrait shows, nor where the portrait has no ear to copy."
    an = turned_portrait(head, 30)
    u, p, copied = an.unseen, an.portrayed, an.hair.ears_copied > .9
    shade = u._in_ears(an.hair)
    assert copied.sum() > 50 and shade[copied].min() < .7 and shade[copied].max() > .98
    assert (shade[copied, 0] >= shade[copied, 2] - 1e-6).all()
    assert np.abs(shade[an.hair.ears_shown & p.is_face].max() - 1) < .02 and np.ptp(shade[~np.isin(np.arange(len(shade)), p.part('left_ear', 'right_ear'))]) < .3


def test_a_walls_light_on_a_cheek_is_no_skin(portrait, head):
    image, track, matte = portrait
    plain = MeshAnimator(image, track, head, matte, supersample=1)
    rim = (matte > .5) & (ndi.distance_transform_edt(matte > .5) < 5)
    blue = np.where(rim[..., None], (.6*image + .4*np.array([60, 100, 230])), image).astype(np.uint8)
    lit = MeshAnimator(blue, track, head, matte, supersample=1)
    slope = (plain.unseen._lit_by_ground() < .05) & (lit.unseen._lit_by_ground() > .8)
    assert slope.sum() > 30 and lit.unseen.seen[slope].max() < .25
    assert np.abs(lit.unseen.seen - plain.unseen.seen)[plain.portrayed.facing0 > .8].max() < .05


def test_a_rim_of_light_stays_at_the_outline(portrait, head):
    "A lamp behind the head draws a light line along cheek and jaw: there at rest, it does not come along to the front; a small shine on a cheek does."
    image, track, matte = portrait
    left = (np.arange(SIZE) < track.landmarks[0, 152, 0]) & (np.arange(SIZE)[:, None] > track.landmarks[0, 4, 1] + .02*SIZE)          # below the ear
    edge = (matte > .5) & ~ndi.binary_erosion(matte > .5, iterations=8) & left & (np.arange(SIZE)[:, None] < track.landmarks[0, 152, 1])
    white = np.uint8([225, 238, 255])
    lit, plain = (MeshAnimator(np.where(where[..., None], white, image).astype(np.uint8), track, head, matte, supersample=1) for where in (edge, edge & False))
    assert lit.portrayed.rim_light[ndi.binary_erosion(edge, iterations=2)].mean() > .6 and not plain.portrayed.rim_light.any()
    looks = lambda a, yaw: a.composite(a.frame(*state(track, head, yaw)), *state(track, head, yaw))
    pale = lambda yaw: ((looks(lit, yaw) - looks(plain, yaw)).mean(-1) > .15).sum()
    assert np.abs(looks(lit, 0) - np.where(edge[..., None], white/255, image/255))[edge].mean() < .05
    assert max(pale(25), pale(-25)) < .35*pale(0)                                      # carried along it would be twice as wide
    spot = np.hypot(*(np.mgrid[:SIZE, :SIZE] - track.landmarks[0, 50, [1, 0]][:, None, None])) < .02*SIZE
    assert not MeshAnimator(np.where(spot[..., None], white, image).astype(np.uint8), track, head, matte).portrayed.rim_light.any()


def test_made_up_skin_has_the_faces_grain(portrait, head):
    "Pores and stubble go on where nothing of a skin is shown, as strong as they are; a smooth face stays smooth."
    image, track, matte = portrait
    noise = np.random.default_rng(0).standard_normal((SIZE, SIZE, 1))
    grainy, smooth = (MeshAnimator(np.clip(image*np.exp(by*noise), 0, 255).astype(np.uint8), track, head, matte, supersample=1) for by in (.06, 0))
    made = grainy.unseen
    assert .03 < np.log(made.grain[0]).std() < .08 and np.log(smooth.unseen.grain[0]).std() < .015 and .9 < made.grain[1].std() < 1.1
    at, (h, w) = made.grain_at[grainy.portrayed.skin_vertices], made.grain.shape[1:]
    assert at.min() >= 0 and (at < [w, h]).all()
    assert grainy.hair.bald and smooth.hair.bald                                       # so is the crown's: skin with pores, no plate
    plain = np.ones((2, 2, 2), np.float32)*np.float32([1, 0])[:, None, None]
    both = lambda: np.stack([grainy.frame(*state(track, head, yaw), 2*SIZE)[..., :3].mean(-1) for yaw in (-30, 30)])
    whole = both()
    for part in (made, grainy.back):                                                  # the face, and the head beneath
        grain, part.grain = part.grain, plain
        gone = whole - both()
        part.grain = grain
        assert (np.abs(gone) > .008).sum() > 100 and np.std(gone[np.abs(gone) > 1e-4]) > .002


def test_glasses_and_strands_are_no_grain(portrait, head):
    "Before half of the face, where its grain is looked up on both cheeks."
    image, track, matte = portrait
    y, x = np.mgrid[:SIZE, :SIZE]
    before = (x < track.landmarks[0, 4, 0]) & (y > track.landmarks[0, 168, 1])
    striped = np.where((before & (x//2 % 2 == 0))[..., None], 20, image).astype(np.uint8)
    plain, made = (np.log(MeshAnimator(i, track, head, matte, supersample=1).unseen.grain[0]).std() for i in (image, striped))
    assert made < max(1.5*plain, .015)


def with_glasses(portrait, head, wide, high):
    "The portrait, lenses of that size (half, millimetres) drawn on it where they would stand."
    image, track, matte = portrait
    p, t = Portrayed(image, track, head, matte), np.linspace(0, 2*np.pi, 40)
    g, out = Glasses(p), p.image.copy()
    for u, v in [(s*(32 + wide*np.cos(t)), -5 + high*np.sin(t)) for s in SIDES] + [(np.linspace(-8, 8, 9), np.full(9, 2.))]:
        ink = draw_curve(p.camera0.project(g.before(u, v))[:, :2], SIZE, SIZE, np.full(len(u), .04*p.eyes_apart))[..., None]
        out = out*(1 - ink) + .05*ink
    return (out*255).astype(np.uint8), track, matte


def test_glasses_stand_before_the_face(portrait, head):
    "They are taken off the skin, lids do not move them, and where the head turns they are seen as a thing that is rigid."
    image, track, matte = with_glasses(portrait, head, 25, 19)
    worn, bare = MeshAnimator(image, track, head, matte), MeshAnimator(*portrait[:2], head, matte)
    glasses, there = worn.glasses, np.abs(image.astype(float) - portrait[0]).max(-1) > 60
    assert glasses and not bare.glasses and not MeshAnimator(image, track, head, matte, glasses=False).glasses and bare.worn is None
    off = lambda a: np.abs(a - bare.portrayed.image)[there].mean()
    assert off(worn.portrayed.image) < .2*off(worn.glasses.portrayed.image)
    assert np.abs(worn.frame(*state(track, head, 0))[..., :3] - glasses.portrayed.image)[there].mean() < .2*off(glasses.portrayed.image)
    def rims(**how):
        with_, without = (a.frame(*state(track, head, **how)) for a in (worn, bare))
        return ((with_ - without)[..., :3].mean(-1) < -.2) | (with_[..., 3] > without[..., 3] + .3)
    shut = rims(yaw=0, eyeBlinkLeft=1, eyeBlinkRight=1)
    assert (shut & rims(yaw=0)).sum() > .9*rims(yaw=0).sum() > 100
    p, t, seen = worn.portrayed, np.linspace(0, 2*np.pi, 40), rims(yaw=25)
    ring = p.camera.moved(p.at(*state(track, head, 25))[1]).project(glasses.before(32 + 25*np.cos(t), -5 + 19*np.sin(t)))
    x, y = np.round(ring[:, :2] - .5).astype(int).T                                  # of the far lens: beside the face, too
    assert ndi.binary_dilation(seen)[y, x].mean() > .9 and (bare.frame(*state(track, head, 25))[y, x, 3] < .5).any()


@pytest.mark.parametrize('wide, high', [(14, 7), (9, 9)])
def test_rings_too_small_for_lenses_are_no_glasses(portrait, head, wide, high):
    "Make-up, or bags under eyes."
    image, track, matte = with_glasses(portrait, head, wide, high)
    assert not Glasses(Portrayed(image, track, head, matte)).found


def test_what_moves_a_little_uncovers_more_of_the_same(portrait, head):
    "Beside neck and jaw, where clothes are near, the ground beneath is the portrait's own."
    image, animator = dressed(head, portrait)
    body, p = animator._settled(), animator.portrayed
    there = body.beside_head & ndi.binary_erosion(p.matte > .9, iterations=2) & (np.arange(SIZE)[:, None] > p.landmarks[152, 1] + 2)
    assert there.sum() > 200 and np.median(np.abs(body.ground - p.image)[there]) < .01


def test_a_dark_gap_amid_hair_and_skin_is_no_cloth(animator):
    "Nothing of it stays while all around it moves; but what is near other cloth or the outline may."
    clothes, p = copy(animator.clothes), animator.portrayed
    x, y = p.landmarks[152, :2].astype(int) - [0, 14]
    def enclosed(*boxes):
        clothes.cloth = np.zeros((SIZE, SIZE), np.float32)
        for at in boxes: clothes.cloth[at] = 1
        return clothes._enclosed()
    left = int(np.flatnonzero(p.matte[y] > .5)[0])
    piece, edge = np.s_[y:y + 8, x:x + 6], np.s_[y:y + 8, left:left + 6]
    assert enclosed(piece)[piece].all() and not enclosed(piece, np.s_[y:y + 8, x + 7:x + 40])[piece].any() and not enclosed(edge).any()


def test_nothing_is_carried_beyond_the_picture(head, portrait):
    "No strands above a crown that ends with the picture."
    image, track, matte = portrait
    top = int(np.flatnonzero(matte.max(1) > .5)[0]) + 3
    rows = np.arange(SIZE)[:, None]
    cut = np.where((rows < top)[..., None], image[top], image)
    body = MeshAnimator(cut, replace(track, picture=np.float32([0, top, SIZE, SIZE])), head, np.where(rows < top, matte[top], matte), supersample=1)._settled()
    assert body.strands[1][top + 8:].max() > .3 and body.strands[1][:top].max() == 0


@pytest.mark.parametrize('tone', [1, .25])
def test_a_smooth_chin_in_shadow_is_no_beard(portrait, head, tone):
    "Half as light as the cheeks: smooth it is bare, with the texture of hair it is bearded, on dark skin, too."
    image, track, matte = portrait
    image = np.where(matte[..., None] > .5, image*tone, image)
    L, (y, x) = track.landmarks[0], np.mgrid[:SIZE, :SIZE]
    low = (matte > .5) & (y > L[17, 1] + .01*SIZE)
    noise = np.random.default_rng(0).standard_normal((SIZE, SIZE, 1))
    cheeks = np.median(image[(np.abs(y - L[50, 1]) < 4) & (matte > .5)], axis=0)
    hangs = lambda by: MeshAnimator(np.where(low[..., None], np.clip(.53*cheeks*np.exp(by*noise), 0, 255), image).round().astype(np.uint8), track, head, matte, supersample=1).clothes.hanging[low & (y > L[152, 1] + 2)]
    assert hangs(0).mean() < .1 and hangs(.2).mean() > .3


def above_ears(track, matte):
    "Where a bald head has hair: beside the head, from the eyes up, bool [SIZE, SIZE]."
    L, rows = track.landmarks[0], np.arange(SIZE)[:, None]
    eyes, unit = L[[468, 473], 1].mean(), np.linalg.norm(L[468, :2] - L[473, :2])
    beside = ndi.binary_dilation(matte > .5, iterations=int(.25*unit)) & (polygon_mask(L[OVAL, :2], SIZE, SIZE, grow=0) < .5) & (np.abs(np.arange(SIZE) + .5 - L[4, 0]) > .7*unit)
    return beside & (rows < eyes) & (rows > eyes - .9*unit)


def test_a_bald_heads_outline_is_of_skin_and_of_hair(head, portrait):
    "Each gives way to a turn as its kind does: hair above the ears later than the crown."
    image, track, matte = portrait
    where = above_ears(track, matte)
    a = MeshAnimator(np.where(where[..., None], np.uint8([40, 42, 48]), image), track, head, np.maximum(matte, where), supersample=1)
    x, y = np.clip(a.sheet.source[a.sheet.rim_points].astype(int), 0, SIZE - 1).T
    sure, strong = ndi.binary_erosion(a.hair.seen, iterations=2)[y, x], a.sheet.rim > .3
    crown = strong & (y < a.portrayed.landmarks[[468, 473], 1].mean() - 1.2*a.portrayed.eyes_apart)
    assert a.hair.bald and (strong & sure).sum() > 10 and crown.sum() > 30
    assert a.sheet.rim_hair[strong & sure].mean() > .7 and a.sheet.rim_hair[crown].mean() < .3


def test_a_bald_crown_goes_on_as_it_is(portrait, head):
    "Where a bald head that looks down shows what the portrait did not, that is of the crown's colour, not of the cheeks'."
    image, track, matte = portrait
    y = np.arange(SIZE)[:, None]
    tanned = np.where((y < track.landmarks[0, 10, 1] + .03*SIZE)[..., None] & (matte > .5)[..., None], image*np.array([.8, .86, .92]), image).astype(np.uint8)
    a = MeshAnimator(tanned, track, head, matte, supersample=1)
    p, back = a.portrayed, a.back
    assert a.hair.bald
    top = p.scalp & (p.facing0 < .1) & (p.level > .06)
    crown = p.scalp & (p.facing0 > .6)
    own, shown = back.back[:len(p.rest)][top, 1:4].mean(0), np.array([tanned[int(v), int(u)]/255 for u, v in p.P0[crown, :2]]).mean(0)
    hue = lambda colour: colour/colour.sum()
    assert np.abs(hue(own) - hue(shown)).max() < .6*np.abs(hue(shown) - hue(p.face_colour)).max()


def test_a_bald_head_is_told(head, portrait):
    "The drawn head is bald. With dark hair all over it is not; with some above the ears it is, and has hair there, on both sides, and none on the crown."
    image, track, matte = portrait
    a = MeshAnimator(image, track, head, matte)
    p, hair = a.portrayed, a.hair
    assert hair.bald and not hair.seen.any() and hair.grown[p.scalp].max() < .1
    scalp = ndi.binary_dilation((p.raster0.face >= 0) & p.scalp[p.faces[np.maximum(p.raster0.face, 0)]].all(-1), iterations=2) & (matte > .5)
    dressed = lambda where: MeshAnimator(np.where(where[..., None], np.uint8([40, 42, 48]), image), track, head, np.maximum(matte, where)).hair
    hair = dressed(scalp)
    assert not hair.bald and hair.grown[p.scalp & (p.level > .05)].mean() > .95
    hair = dressed(above_ears(track, matte))
    assert hair.bald and hair.seen.any() and hair.grown[p.scalp & (p.level > .1)].max() < .2
    image = np.repeat(image.mean(-1, keepdims=True), 3, -1).astype(np.uint8)                    # so in grey
    grey = dressed(above_ears(track, matte))
    assert grey.bald and grey.seen.any()
    side = p.scalp & (p.level > .02) & (p.level < .05) & (np.abs(p.rest[:, 0]) > .06)
    assert min(hair.grown[side & (p.rest[:, 0]*sign > 0)].mean() for sign in (-1, 1)) > .5


def test_hair_of_the_skins_colour_is_no_bald_head(head, portrait):
    "Blond hair that is as light and smooth as the face stands off the skull, which skin does not. And a crown on which a lamp shines is skin, though far lighter than the face."
    image, track, matte = portrait
    L, y = track.landmarks[0], np.arange(SIZE)[:, None]
    told = lambda picture, matte: MeshAnimator(picture.astype(np.uint8), track, head, matte, supersample=1).hair
    ring = ndi.binary_dilation(matte > .5, iterations=int(.07*SIZE)) & (y < L[[468, 473], 1].mean())
    blond = told(np.where((ring & (matte < .9))[..., None], np.median(image[(matte > .9) & (y < L[10, 1])], axis=0), image), np.maximum(matte, ring))
    assert not blond.bald and blond.grown[blond.portrayed.scalp & (blond.portrayed.level > .05)].mean() > .9 and blond.close == 0
    shine = ndi.gaussian_filter((np.broadcast_to(y < L[10, 1] + .02*SIZE, matte.shape) & (matte > .5)).astype(float), 3)[..., None]
    lit = told(np.clip(image*(1 + .3*shine), 0, 255), matte)
    assert lit.bald and lit.close == 1 and not lit.seen.any()


def test_each_side_of_a_bald_head_has_its_own_hair(head, portrait):
    "A side that shows little of it is not made up in the other side's colour; and nowhere is the made-up hair darker than what is known, not even beside its thinnest ends."
    image, track, matte = portrait
    x, where = np.arange(SIZE) + .5, above_ears(track, matte)
    middle, unit = track.landmarks[0, 4, 0], np.linalg.norm(track.landmarks[0, 468, :2] - track.landmarks[0, 473, :2])
    thin = where & ((x > middle) | ndi.binary_dilation(matte > .5, iterations=int(.08*unit)))
    colours = np.where((x < middle)[None, :, None], np.uint8([150, 156, 164]), np.uint8([40, 42, 48]))
    hair = MeshAnimator(np.where(thin[..., None], colours, image), replace(track, picture=np.float32([4, 0, SIZE, SIZE])), head, np.maximum(matte, thin), supersample=1).hair
    assert hair.bald and all(hair.seen[:, side].any() for side in (x < middle, x > middle))
    far = hair.mane[int(track.landmarks[0, 10, 1]):int(track.landmarks[0, 152, 1])].mean((0, 2))
    assert far[:SIZE//10].mean() > 2*far[-SIZE//10:].mean() and hair.mane.min() > .5*40/255


def test_shorn_temples_give_way_to_a_turn(head, portrait):
    "Where hair lies close the outline beside the forehead is the skull's, and so are the pixels that a turn would draw out."
    image, track, matte = portrait
    L, y = track.landmarks[0], np.arange(SIZE)[:, None]
    unit, eyes = np.linalg.norm(L[468, :2] - L[473, :2]), L[[468, 473], 1].mean()
    shorn = (matte > .5) & (y < L[10, 1])
    a = MeshAnimator(np.where(shorn[..., None], np.uint8([60, 50, 45]), image), track, head, matte, supersample=1)
    rows = a.sheet.source[a.sheet.rim_points][:, 1]
    temples = (rows > eyes - .75*unit) & (rows < eyes - .4*unit)
    assert not a.hair.bald and a.hair.close == 1 and (a.sheet.rim[temples] > .3).sum() > 20


def test_a_forehead_that_the_picture_cuts_off_goes_on(head, portrait):
    "A made-up hairline is arched above what is shown of the forehead: it is not the picture's border."
    image, track, matte = portrait
    top = int(track.landmarks[0, 10, 1] - .02*SIZE)
    a = MeshAnimator(image, replace(track, picture=np.float32([0, top, SIZE, SIZE])), head, matte, supersample=1)
    p, back = a.portrayed, a.back
    hairy, above = back.fixed[:len(p.rest), 4]*back.back[:len(p.rest), 0], (top - p.P0[:, 1])*np.median(p.P0[p.is_face, 2])/p.camera0.focal
    beyond = p.scalp & (np.abs(p.rest[:, 0]) < .03) & (p.facing0 > .3) & (above > 0) & (above < .01)
    assert beyond.any() and hairy[beyond].mean() < .4 and hairy[p.scalp & (p.facing0 < 0) & (p.level > .06)].min() > .9


def test_too_little_of_a_face(head, portrait):
    image, track, matte = portrait
    with pytest.raises(InputError, match='too little of this face'): MeshAnimator(image, replace(track, picture=np.float32([0, SIZE - 30, SIZE, SIZE])), head, matte)
    with pytest.raises(InputError, match="face in this picture is black"): MeshAnimator(image*0, track, head, matte)


def test_an_ear_that_the_picture_cuts_off_is_not_shown(head, portrait):
    image, track, matte = portrait
    a = MeshAnimator(image, track, head, matte).portrayed
    x = np.nonzero(a.ear_in_view('left'))[1].min() - 4
    hair = MeshAnimator(image, replace(track, picture=np.float32([0, 0, x, SIZE])), head, matte).hair
    assert hair.ear_bare['left'] == 0 and hair.ear_bare['right'] > .5


def test_strands_beside_the_hull_are_as_deep_as_its_rim_without_a_comb(animator):
    "Beyond the hull strands are as deep as its last pixels; these go to and fro, and a turned outline must not have their teeth."
    p, outer = animator.portrayed, animator.hair.outer
    inside = ndi.distance_transform_edt(ndi.binary_dilation(outer.mask, iterations=12))
    depth = np.where(inside > 0, p.V0[:, 2].mean() + .6, 0).astype(np.float32)
    depth[inside == 1] += np.random.default_rng(0).uniform(0, .04, (inside == 1).sum()).astype(np.float32)
    hull = SimpleNamespace(mask=inside > 0, depth=depth)
    alpha = ndi.binary_dilation(inside > 0, iterations=6).astype(np.float32)
    sheet = SimpleNamespace(portrayed=p, lobes=np.zeros_like(outer.mask))
    made = Sheet._depth(sheet, SimpleNamespace(alpha=alpha), SimpleNamespace(outer=outer, hull=hull, hides=hull.mask))
    beside = (inside == 0) & (alpha > 0)
    teeth = np.abs(np.diff(made, axis=0))[beside[1:] & beside[:-1]]
    assert teeth.mean() < .0035
    assert abs(made[beside].mean() - depth[inside == 1].mean()) < .01               # and on the whole as deep
