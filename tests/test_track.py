"Tests of the tracker: the model knows its own landmarks; files; films with lost frames."
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from ophav_nb.detect import INNER_FACE, LEFT_EYE, LID_PAIRS, LIP_PAIRS, OVAL, Detector
from ophav_nb.geometry import facing_camera
from ophav_nb.head import HeadModel
from ophav_nb.media import read_image, read_video
from ophav_nb.run import InputError
from ophav_nb.track import (PIVOT, LandmarkModel, Track, _roomy, closing, constant_offset, fit_film, fit_portrait, landmark_error, refit, track_film,
                            track_portrait, with_shape)

CLIPS = Path(__file__).parents[2]/"shared"/"data"/"clips"


@pytest.fixture(scope="module")
def head(): return HeadModel.load()


def posed(head, frames=1, seed=0):
    "Landmarks of random heads, as a detector would see them, with the truth."
    rng = np.random.default_rng(seed)
    shape = torch.tensor(rng.normal(0, .5, head.n_shape)).float()
    expression = torch.zeros(frames, head.n_expression)
    for name, top in (("eyeBlink", 1.), ("mouthSmile", .6), ("browInnerUp", .6)):
        for i, n in enumerate(head.expression_names):
            if n.startswith(name): expression[:, i] = torch.tensor(np.abs(np.sin(np.linspace(.3, 5 + i % 2*0, frames)))*top).float()
    joints = torch.zeros(frames, 5, 3)
    joints[:, 0] = torch.tensor(np.stack([np.full(frames, .1), np.linspace(-.2, .3, frames), np.full(frames, .05)], 1))
    joints[:, 2, 0] = torch.tensor(np.linspace(.15, .02, frames))
    translation = torch.tensor([[.01, -.02, -.62]]).repeat(frames, 1)
    verts = head(shape, expression, joints, translation)
    camera = facing_camera(1.6*256, 256, 256)
    points = camera.project(head.landmarks(verts).numpy())
    points[..., 2] = (points[..., 2] - points[..., 2].mean())*1.6*256/.62
    return points.astype(np.float32), shape, expression, joints


def test_landmark_model_agrees_with_head(head):
    model, rng = LandmarkModel(head), np.random.default_rng(1)
    shape = torch.tensor(rng.normal(0, .5, model.n_shape)).float()
    z = torch.tensor(np.concatenate([rng.uniform(0, .5, (3, model.n_expression)), rng.uniform(-.1, .2, (3, 6))], 1)).float()
    X, J = model.person(shape).points(z)
    expression, joints = torch.zeros(3, head.n_expression), torch.zeros(3, 5, 3)
    expression[:, model.fitted], joints[:, 2:, :2] = z[:, :model.n_expression], z[:, model.n_expression:].reshape(3, 3, 2)
    torch.testing.assert_close(X, head.landmarks(head(shape, expression, joints)), atol=1e-5, rtol=0)
    for k in (0, 5, model.n_expression, model.n_expression + 2):          # jaw's and eyes' derivatives are to first order in their angle
        step = torch.zeros_like(z)
        step[:, k] = 1e-2
        slope = (model.person(shape).points(z + step, False) - model.person(shape).points(z - step, False))/2e-2
        assert (slope - J[..., k]).abs().max() < .1*slope.abs().max() + 1e-6


def test_portrait_from_own_landmarks(head):
    points, shape, expression, joints = posed(head)
    track = fit_portrait(np.zeros((256, 256, 3), np.uint8), points[0], head)
    assert track.error[0] < 1.
    assert np.abs(np.degrees(track.motion.joints[0, 0] - joints[0, 0].numpy())).max() < 4
    assert track.motion.expression.min() >= 0 and track.motion.expression.max() <= 1


def test_film_of_landmarks_with_a_lost_frame(head):
    points, shape, expression, joints = posed(head, 24)
    ok = np.ones(24, bool)
    ok[7] = False
    points[7] = 1e3
    track = fit_film(None, points, ok, head, size=256)
    assert track.error[ok].mean() < 1.5 and track.info["lids"] > .95 and track.info["lost"] == 1
    assert np.abs(np.degrees(track.motion.joints[:, 0, 1] - joints[:, 0, 1].numpy())).max() < 5
    assert np.isfinite(track.motion.expression).all()
    with pytest.raises(InputError): fit_film(None, points, ok*False, head, size=256)


def test_save_and_load(head, tmp_path):
    points = posed(head)[0]
    track = fit_portrait(np.zeros((256, 256, 3), np.uint8), points[0], head)
    again = Track.load(track.save(tmp_path/"track.npz"))
    np.testing.assert_array_equal(again.motion.expression, track.motion.expression)
    np.testing.assert_allclose(again.camera.K, track.camera.K)
    assert again.info == track.info and again.bias is None and again.correction is None
    corrected = replace(track, correction=np.ones((478, 3), np.float32))
    np.testing.assert_array_equal(Track.load(corrected.save(tmp_path/"track.npz")).correction, corrected.correction)
    part = Track.load(replace(track, picture=np.float32([0, 64, 256, 256])).save(tmp_path/"track.npz"))
    assert again.known(64) is None and part.known(64)[17:].all() and not part.known(64)[:17].any()
    assert part.frame(0).known(64) is not None and replace(track, picture=np.float32([0, 0, 256, 256])).known(64) is None
    whole = (tmp_path/"track.npz").read_bytes()
    middle = len(whole)//2
    for damaged in (b"no", b"", whole[:middle], whole[:middle] + bytes(99) + whole[middle + 99:]):
        (tmp_path/"bad.npz").write_bytes(damaged)
        with pytest.raises(InputError, match="not a track"): Track.load(tmp_path/"bad.npz")


def test_what_is_the_same_in_all_frames(head):
    "A person's offsets, seen in a film whose landmarks also err on their own, and in some frames by far."
    points, shape, expression, joints = posed(head, 24)
    track, rng = fit_film(None, points, np.ones(24, bool), head, size=256), np.random.default_rng(0)
    true = closing(rng.normal(0, .001, (478, 3))*[1, 1, 0])
    for pair in LID_PAIRS + LIP_PAIRS: np.testing.assert_allclose(true[pair[0]], true[pair[1]], atol=1e-9)
    assert not true[OVAL].any() and np.ptp(true[LEFT_EYE], 0).max() < 1e-9
    step = replace(track, bias=true).fitted(head, bias=True) - track.fitted(head)
    noisy = step[..., :2] + rng.normal(0, .1, (24, 478, 2))
    noisy[::8] += 20
    offset, moved = constant_offset(track, head, noisy)
    assert np.abs(offset - true)[INNER_FACE].max() < 5e-4 and np.abs(moved - step[..., :2])[:, INNER_FACE].mean() < .05


def test_a_settled_head_turns_but_stays(head):
    "Where the picture settled the pose, a head follows landmarks by turning about its middle: its outline stays. Where it did not, it goes along."
    points, _, _, _ = posed(head, 24)
    track = fit_film(None, points, np.ones(24, bool), head, size=256)
    def moved(motion, doubt):
        "How a refit after the step that leads to `motion` moves the head: degrees, and its ears, px."
        step = replace(track, motion=motion).fitted(head) - track.fitted(head)
        again = refit(replace(track, doubt=np.full(24, doubt, np.float32)), head, track.landmarks + step, step[..., :2])
        turn = Rotation.from_rotvec(again.motion.joints[:, 0])*Rotation.from_rotvec(track.motion.joints[:, 0]).inv()
        with torch.no_grad(): ears = [head(torch.from_numpy(track.shape), *map(torch.from_numpy, (m.expression, m.joints, m.translation)))[:, head.region_vertices("left_ear")].mean(1).numpy()
                                      for m in (track.motion, again.motion)]
        return np.degrees(turn.magnitude()).mean(), np.linalg.norm(np.diff(track.camera.project(np.stack(ears))[..., :2], axis=0), axis=-1).mean()
    joints, J = track.motion.joints.copy(), head.joint_positions(torch.from_numpy(track.shape)).numpy()
    joints[:, 0] = (Rotation.from_rotvec([0, np.radians(1.), 0])*Rotation.from_rotvec(joints[:, 0])).as_rotvec()
    middle = J[3:].mean(0) - [0, 0, PIVOT] - J[0]                     # relative to the joint that a head turns about
    back = Rotation.from_rotvec(track.motion.joints[:, 0]).apply(middle) - Rotation.from_rotvec(joints[:, 0]).apply(middle)
    angle, ears = moved(replace(track.motion, joints=joints, translation=track.motion.translation + back.astype(np.float32)), 0)
    assert .5 < angle < .9 and ears < .4
    aside = replace(track.motion, translation=track.motion.translation + np.float32([.002, 0, 0]))
    assert moved(aside, 0)[1] < .25 and moved(aside, 1)[1] > .4


def test_a_frame_of_a_film(head):
    points, *_ = posed(head, 4)
    track = replace(fit_film(None, points, np.array([False, True, True, True]), head, size=256), doubt=np.arange(4.))
    assert track.first == 1 and track.frame(2).doubt == [2] and len(track.frame(2)) == 1


def test_portrait_with_the_shape_of_its_film(head):
    "Its own pose does not fit another shape; the one found again does."
    points, *_ = posed(head)
    track, other = fit_portrait(np.zeros((256, 256, 3), np.uint8), points[0], head), np.array(posed(head, seed=5)[1])
    miss = lambda t: landmark_error(t.fitted(head), t.landmarks)[0]
    same = with_shape(track, head, track.shape)
    assert same is track
    track = replace(track, picture=np.float32([0, 5, 100, 100]))
    again = with_shape(track, head, .7*track.shape + .3*other)
    assert (again.picture == track.picture).all()
    assert np.allclose(again.shape, .7*track.shape + .3*other) and miss(again) < .6*miss(replace(track, shape=again.shape))


def test_long_films_lie_on_disk(monkeypatch):
    small, large = _roomy((4, 8, 8, 3), np.uint8), _roomy((4, 8, 8), np.float32, most=100)
    large[:] = 2
    assert not isinstance(small, np.memmap) and isinstance(large, np.memmap) and large.sum() == 512
    def full(*_): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('os.posix_fallocate', full)
    assert not isinstance(_roomy((4, 8, 8), np.float32, most=100), np.memmap)


def test_astronaut(head):
    crop, square, matte, track = track_portrait(read_image("astronaut"), Detector(), head, size=256)
    assert square.shape == (256, 256, 3) and matte.shape == (256, 256) and track.error[0] < 1.8


@pytest.mark.clips
@pytest.mark.parametrize("name", ["glasses_lab", "bedroom"])
def test_clip(head, name):
    if not (CLIPS/f"{name}.mp4").exists(): pytest.skip("the development clips are not here")
    frames, fps = read_video(CLIPS/f"{name}.mp4", max_frames=80)
    info = track_film(frames, Detector(), head, size=256, fps=fps)[-1].info
    assert info["error"] < 3 and info["rigid_after"] < .015 and info["lids"] > .95 and info["lost"] == 0
