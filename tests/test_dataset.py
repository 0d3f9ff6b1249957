"Datasets: what follows from a motion, the way to the disk and back, and other people's folders."
import errno
import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest

import ophav_nb  # noqa: F401  (before torch: it decides about threads)
import torch
from ophav_nb.dataset import PARSING, UNKNOWN, HeadDataset, MeetingLips, face_labels, film_dataset, parse_frame
from ophav_nb.detect import parsing
from ophav_nb.geometry import facing_camera, rasterize
from ophav_nb.head import HeadModel, Motion
from ophav_nb.run import InputError
from ophav_nb.track import Track

from meshes import lenses

SIZE, N = 64, 5


@pytest.fixture(scope='module')
def head(): return HeadModel.load()


@pytest.fixture(scope='module')
def motion(head):
    rng = np.random.default_rng(0)
    m = Motion.still(N, head.n_expression)
    m.translation[:] = [.01, -.02, -.8]
    m.joints[:, 0] = rng.normal(size=(N, 3))*.15
    m.joints[:, 2, 0] = np.linspace(0, .25, N)
    m.expression[:, head.expression_names.index('mouthSmileLeft')] = np.linspace(0, .8, N)
    return m


@pytest.fixture(scope='module')
def camera(): return facing_camera(1.6*SIZE, SIZE, SIZE)


@pytest.fixture(scope='module')
def shape(head): return np.random.default_rng(1).normal(size=head.n_shape).astype(np.float32)*.5


@pytest.fixture(scope='module')
def frames(head, motion, camera, shape):
    "Shaded masks of the posed head."
    with torch.no_grad(): v = head(torch.from_numpy(shape)[None], torch.from_numpy(motion.expression), torch.from_numpy(motion.joints), torch.from_numpy(motion.translation)).numpy()
    out = np.zeros((N, SIZE, SIZE, 4), np.uint8)
    for i in range(N):
        r = rasterize(camera.project(v[i]), head.faces, SIZE, SIZE)
        out[i, ..., :3] = (r.face % 200)[..., None] + [0, 20, 40]
        out[i, ..., 3] = r.mask*255
    return out


@pytest.fixture(scope='module')
def data(frames, motion, shape, camera, head): return HeadDataset.from_frames(frames, motion, shape, camera, head, test=2)


def test_mesh_lands_where_the_posed_head_does(data, motion, shape, camera, head):
    with torch.no_grad(): v = head(torch.from_numpy(shape)[None], torch.from_numpy(motion.expression), torch.from_numpy(motion.joints), torch.from_numpy(motion.translation)).numpy()
    posed = np.setdiff1d(np.arange(head.n_vertices), MeetingLips(head, torch.from_numpy(shape)).vertices)
    for i in range(N):
        np.testing.assert_allclose(data.camera(i).project(data.vertices[i])[posed], camera.project(v[i])[posed], atol=2e-3)
        r = rasterize(camera.project(v[i].astype(np.float64)), head.faces, SIZE, SIZE)
        assert (np.abs(data.depth[i] - r.depth) > 1e-3).mean() < .005
        assert ((data.depth[i] > 0) == (data.alpha[i] > 0)).mean() > .995


def test_lips_that_all_but_meet_do(head, camera):
    "What is a slit in the model is closed where a field follows it, smoothly over time; teeth and a mouth that is open stay where they are."
    lips, closing = MeetingLips(head), np.linspace(0, .12, 61, dtype=np.float32)
    m = Motion.still(len(closing), head.n_expression)
    m.expression[:] = closing[:, None]*head.expression(mouthClose=1).numpy()
    before = head.unposed(expression=m.expression)
    after = lips(before)
    gap = lambda v: (lambda marks: marks[:, 13, 1] - marks[:, 14, 1])(head.landmarks(v).numpy())
    apart, then = gap(before), gap(after)
    assert apart[0] > .002 and apart[-1] < -.0005                                                   # from open to pressed
    assert (then[apart < lips.gap] < -lips.over).all()
    assert np.abs(np.diff(after, axis=0)).max() < 5*np.abs(np.diff(before.numpy(), axis=0)).max()   # nothing jumps
    others = np.setdiff1d(np.arange(head.n_vertices), lips.vertices)
    np.testing.assert_array_equal(after[:, others], before.numpy()[:, others])
    assert not head.region_vertices('upper_teeth', 'lower_teeth', 'tongue')[lips.vertices].any()
    ajar = head.unposed(expression=head.expression(jawOpen=.3)[None])
    np.testing.assert_allclose(lips(ajar), ajar.numpy(), atol=3e-4)                                  # but at the corners, where they do meet
    rgba = np.full((len(m), 32, 32, 4), 255, np.uint8)
    m.translation[:, 2] = -.8
    np.testing.assert_allclose(HeadDataset.from_frames(rgba, m, np.zeros(head.n_shape, np.float32), camera, head).vertices, after, atol=1e-6)


def test_parts(data):
    assert data.train.tolist() == [True]*3 + [False]*2 and len(data) == N
    assert np.all(data.joints[:, 0] == 0) and data.condition.shape == (N, 16)
    seen = set(np.unique(data.parsing))
    assert {0, PARSING['skin'], PARSING['hair'], PARSING['nose'], PARSING['upper_lip'], PARSING['lower_lip']} <= seen
    assert np.all(data.parsing[data.alpha < 128] == 0) and np.all(data.parsing[data.alpha >= 128] > 0)


def test_a_persons_own_surface(frames, motion, shape, camera, head, tmp_path):
    "Meshes carry what the model does not know, and every way of keeping a dataset keeps it."
    offset = np.random.default_rng(2).normal(size=(head.n_vertices, 3)).astype(np.float32)*1e-3
    data = HeadDataset.from_frames(frames, motion, shape, camera, head, offset=offset)
    own = head.of_person(offset)
    expected = MeetingLips(own, torch.from_numpy(shape))(own(torch.from_numpy(shape)[None], motion.expression[:1], data.joints[:1]))[0]
    np.testing.assert_allclose(data.vertices[0], expected, atol=1e-6)
    assert head.of_person(None) is head
    HeadDataset.from_frames(frames, motion, shape, camera, head, folder=tmp_path/'arrays', size=SIZE, offset=offset)
    for folder in (tmp_path/'arrays', data.save(tmp_path/'insta')):
        again = HeadDataset.load(folder, head)
        np.testing.assert_array_equal(again.offset, offset)
        np.testing.assert_allclose(again.vertices, data.vertices, atol=1e-6)
    assert HeadDataset.load(HeadDataset.from_frames(frames, motion, shape, camera, head).save(tmp_path/'plain'), head).offset is None


def test_what_the_film_does_not_show_is_unknown(frames, motion, shape, camera, head, data, tmp_path):
    known = np.ones((SIZE, SIZE), bool)
    known[:SIZE//2] = False
    part = HeadDataset.from_frames(frames, motion, shape, camera, head, known=known)
    assert (part.parsing[:, :SIZE//2] == UNKNOWN).all() and (part.parsing[:, SIZE//2:] == data.parsing[:, SIZE//2:]).all()
    again = HeadDataset.load(part.save(tmp_path/'part'), head)
    np.testing.assert_array_equal(again.parsing, part.parsing)


def test_lost_frames_are_not_trained_on(frames, motion, shape, camera, head):
    ok = np.arange(N) != 1
    assert HeadDataset.from_frames(frames, motion, shape, camera, head, ok=ok, test=1).train.tolist() == [True, False, True, True, False]


def test_the_mesh_and_the_landmarks_name_the_same_sides(head):
    "Eyes and brows lie in the same place under the same code, whether the mesh or the landmarks say so; the subject's left is the picture's right."
    size, camera = 256, facing_camera(400, 256, 256)
    v = head().numpy()[0] - np.float32([0, 0, .6])
    labels, _ = parse_frame(v, camera, head.faces, face_labels(head), np.full((size, size), 255, np.uint8))
    points = camera.project(head.landmarks(torch.from_numpy(v)[None])[0].numpy())
    drawn = parsing(points, np.ones((size, size), np.float32))
    middle = lambda codes, name: float(np.nonzero(codes == PARSING[name])[1].mean())
    for part in ('eye', 'brow'):
        for name in (f'left_{part}', f'right_{part}'): assert abs(middle(labels, name) - middle(drawn, name)) < 3
        assert middle(labels, f'right_{part}') < size/2 < middle(labels, f'left_{part}')


def test_hair_is_what_the_mesh_leaves(data, head):
    alpha = np.full((SIZE, SIZE), 255, np.uint8)
    parsing, depth = parse_frame(data.vertices[0], data.camera(0), data.faces, face_labels(head, data.shape), alpha)
    assert np.all(parsing[depth == 0] == PARSING['hair'])


def equal(a, b, depth=6e-4):
    for k in ('rgb', 'alpha', 'parsing', 'faces', 'train'): np.testing.assert_array_equal(getattr(a, k), getattr(b, k), err_msg=k)
    for k in ('vertices', 'condition', 'c2w', 'K', 'canonical'): np.testing.assert_allclose(getattr(a, k), getattr(b, k), atol=2e-6, err_msg=k)
    np.testing.assert_allclose(a.depth, b.depth, atol=depth)


def test_insta_folder_and_back(data, head, tmp_path):
    data.save(tmp_path/'d')
    equal(data, HeadDataset.load(tmp_path/'d', head))
    info = json.loads((tmp_path/'d/transforms_train.json').read_text())
    assert len(info['frames']) == 3 and info['integer_depth_scale'] == .001 and info['fl_x'] == data.K[0, 0]
    assert len((tmp_path/'d/flame/exp/00000.txt').read_text().split()) == 100


def test_a_stopped_save_goes_on(data, head, tmp_path):
    data.save(tmp_path)
    (tmp_path/'transforms.json').unlink()
    (tmp_path/'images/00003.png').unlink()
    before = (tmp_path/'images/00002.png').stat().st_mtime_ns
    data.save(tmp_path)
    assert (tmp_path/'images/00002.png').stat().st_mtime_ns == before
    equal(data, HeadDataset.load(tmp_path, head))


def test_another_programs_folder(data, tmp_path):
    data.save(tmp_path, meshes=True)
    (tmp_path/'head.npz').unlink()
    shutil.rmtree(tmp_path/'depth')
    other = HeadDataset.load(tmp_path)
    assert other.motion is None and other.train.tolist() == data.train.tolist()
    np.testing.assert_allclose(other.vertices, data.vertices, atol=2e-6)
    np.testing.assert_allclose(other.condition, data.condition, atol=1e-6)
    np.testing.assert_array_equal(other.rgb, data.rgb)
    assert not other.depth.any()


def test_arrays_on_disk_resume(frames, motion, shape, camera, head, data, tmp_path):
    asked = []
    def source(start):
        asked.append(start)
        return iter(frames[start:])
    HeadDataset.from_frames(frames, motion, shape, camera, head, folder=tmp_path, test=2)
    (tmp_path/'arrays.json').unlink()
    (tmp_path/'arrays.done').write_text('3')
    HeadDataset.from_frames(source, motion, shape, camera, head, folder=tmp_path, size=SIZE, test=2)
    assert asked == [3]
    (tmp_path/'arrays.json').unlink()
    (tmp_path/'arrays.done').write_bytes(b'\0\xff')            # damaged: none of them is taken for done
    HeadDataset.from_frames(source, motion, shape, camera, head, folder=tmp_path, size=SIZE, test=2)
    assert asked == [3, 0]
    again = HeadDataset.load(tmp_path, head)
    assert isinstance(again.rgb, np.memmap)
    equal(data, again, depth=0)


@pytest.mark.skipif(not hasattr(os, 'posix_fallocate'), reason='no such call here')
def test_a_full_disk_is_said_and_half_a_file_is_made_anew(frames, motion, shape, camera, head, data, tmp_path, monkeypatch):
    def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):   # memory-mapped pages of a full disk would kill the process
        patch.setattr(os, 'posix_fallocate', full)
        HeadDataset.from_frames(frames, motion, shape, camera, head, folder=tmp_path)
    assert not list(tmp_path.glob('*.npy'))
    for half in (b'', b'\x93NUMPY\x01\x00'): (tmp_path/('rgb.npy' if half else 'alpha.npy')).write_bytes(half)
    made = HeadDataset.from_frames(frames, motion, shape, camera, head, folder=tmp_path)
    assert np.array_equal(made.rgb, data.rgb) and np.array_equal(made.alpha, data.alpha)


def test_frames_from_an_iterator(frames, motion, shape, camera, head, data):
    d = HeadDataset.from_frames((f for f in frames), motion, shape, camera, head, size=SIZE, test=2)
    equal(data, d, depth=0)
    part = d.subset(np.array([0, 2]))
    assert len(part) == 2 and len(part.motion) == 2


def test_frames_must_fit_the_motion(frames, motion, shape, camera, head):
    make = lambda f, **k: HeadDataset.from_frames(f, motion, shape, camera, head, **k)
    for few in (frames[:3], iter(frames[:3]), iter([*frames, frames[0]])):
        with pytest.raises(InputError, match='as many frames as the motion has'): make(few, size=SIZE)
    for odd in (frames[:, :, 8:], iter(frames[:, 8:]), frames[..., :3]):
        with pytest.raises(InputError, match='square, straight RGBA'): make(odd, size=SIZE)


def test_lost_frames_of_a_film_are_not_trained_on(motion, shape, camera, head):
    track = Track(motion, shape, camera, np.zeros((N, 478, 3), np.float32), np.zeros(N, np.float32), np.arange(N) != 2)
    told = []
    def regions(heads, start):
        told.append(start)
        return heads
    made = film_dataset(np.zeros((N, SIZE, SIZE, 3), np.uint8), track, np.ones((N, SIZE, SIZE), np.float32), head, SIZE, regions=regions)
    assert made.train.tolist() == (np.arange(N) != 2).tolist() and told == [0]


def test_two_datasets_are_not_mixed_in_a_folder(data, tmp_path):
    data.save(tmp_path)
    for other in (replace(data, rgb=255 - data.rgb), data.subset(np.arange(3))):
        with pytest.raises(InputError, match='holds another dataset'): other.save(tmp_path)
    np.testing.assert_array_equal(HeadDataset.load(tmp_path).rgb, data.rgb)
    (tmp_path/'head.npz').unlink()
    with pytest.raises(InputError, match='holds another dataset'): data.save(tmp_path)


def test_wrong_folders_say_what_is_missing(data, tmp_path):
    with pytest.raises(InputError, match='no dataset'): HeadDataset.load(tmp_path)
    data.save(tmp_path)
    (tmp_path/'images/00001.png').write_bytes(b'')
    with pytest.raises(InputError, match='00001.png'): HeadDataset.load(tmp_path)


def test_what_is_worn_stays_with_a_dataset(frames, motion, shape, camera, head, data, tmp_path):
    "Every way of keeping it keeps that; what the skin says stays, but no depth is told where the thing may be seen."
    worn, n = lenses(head), head.n_vertices
    made = HeadDataset.from_frames(frames, motion, shape, camera, head, test=2, worn=worn)
    np.testing.assert_array_equal(made.vertices[:, :n], data.vertices)
    np.testing.assert_array_equal(made.condition, data.condition)
    there = np.stack([rasterize(made.camera(i).project(made.vertices[i]), made.faces[len(head.faces):], SIZE, SIZE).mask for i in range(N)])
    assert there.any((1, 2)).all() and (made.depth[there & (data.alpha > 0)] == 0).mean() > .9
    np.testing.assert_array_equal(made.depth[~there], data.depth[~there])
    np.testing.assert_array_equal(made.parsing[data.depth > 0], data.parsing[data.depth > 0])
    HeadDataset.from_frames(frames, motion, shape, camera, head, folder=tmp_path/'arrays', size=SIZE, worn=worn, test=2)
    for folder in (tmp_path/'arrays', made.save(tmp_path/'insta')):
        again = HeadDataset.load(folder, head)
        for a, b in zip(again.worn, worn): np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(again.faces, made.faces)
        np.testing.assert_allclose(again.vertices, made.vertices, atol=1e-6)
    assert HeadDataset.load(data.save(tmp_path/'plain'), head).worn is None
