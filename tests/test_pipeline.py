"The pipeline's parts that need no network: motions of a person, what an avatar has seen."
from subprocess import TimeoutExpired
from types import SimpleNamespace

import numpy as np
import pytest

import ophav_nb.pipeline as pipeline
from ophav_nb.geometry import facing_camera
from ophav_nb.head import HeadModel, Motion
from ophav_nb.motion import head_angles, scripted
from ophav_nb.pipeline import PRESETS, add_motion, compiling, seen_motion
from ophav_nb.run import Run
from ophav_nb.track import Track

HEAD = HeadModel.load()


def track_of(frames=1, yaw=0., seed=0):
    motion = Motion.still(frames, HEAD.n_expression)
    motion.translation[:, 2] = -.8
    motion.joints[:, 0, 1] = np.radians(yaw)
    shape = np.random.default_rng(seed).normal(0, .3, HEAD.n_shape).astype(np.float32)
    return Track(motion, shape, facing_camera(300, 192, 192), np.zeros((frames, 478, 3), np.float32), np.zeros(frames, np.float32), np.ones(frames, bool))


@pytest.mark.parametrize("fps", [24., 25., 30.])
def test_motion_of_any_frame_rate(tmp_path, fps):
    run = Run(tmp_path / "run", {})
    run.make("track", lambda folder: None)
    scripted("talk", 2., fps=fps).save(tmp_path / "asked.npz")
    add_motion(run, str(tmp_path / "asked.npz"), PRESETS["smoke"], track_of())
    film, train = (Motion.load(run.path("motion", f"{name}.npz")) for name in ("film", "train"))
    assert film.fps == fps and len(film) == round(2 * fps) and train.fps == 25 and len(train) == PRESETS["smoke"].frames


@pytest.mark.parametrize("yaw", [0., 30.])
def test_a_head_that_looks_aside_moves_about_its_own_pose(tmp_path, yaw):
    run = Run(tmp_path / "run", {})
    run.make("track", lambda folder: None)
    add_motion(run, "talk", PRESETS["smoke"], track_of(yaw=yaw))
    angles = head_angles(Motion.load(run.path("motion", "film.npz")).joints[:, 0])[:, 0]
    straight = head_angles(scripted("talk", PRESETS["smoke"].film_seconds).joints[:, 0])[:, 0]
    assert abs(np.ptp(angles) - np.ptp(straight)) < 2 and abs(angles[0] - yaw) < 2


def test_driving_films_are_tracked_as_asked(tmp_path, monkeypatch):
    asked = {}
    class FakeDetector:
        def __init__(self, **kw): asked.update(kw)
    monkeypatch.setattr(pipeline, "Detector", FakeDetector)
    monkeypatch.setattr(pipeline, "Film", lambda path, size: SimpleNamespace(fps=30.))
    track = track_of(4)
    monkeypatch.setattr(pipeline, "track_film", lambda *a, **k: (None, None, None, track))
    monkeypatch.setattr(pipeline, "echo", lambda frames, matte, track, head, detector: track)
    (tmp_path / "film.mp4").write_bytes(b"a film")
    motion = pipeline.resolve_motion(str(tmp_path / "film.mp4"), 1., device="meta", finder="s3fd")
    assert asked == dict(device="meta", finder="s3fd") and len(motion) == 4


def test_an_avatar_knows_the_film_it_was_trained_on(tmp_path):
    run = Run(tmp_path / "run", {})
    run.make("track", lambda folder: track_of().save(folder / "track.npz"))
    run.make("motion", lambda folder: scripted("range", 1.).save(folder / "train.npz"))
    run.make("coarse", lambda folder: None)
    track, motion = seen_motion(run)
    assert len(track) == 1 and len(motion) == 25
    run.make("coarse", lambda folder: track_of(6, seed=3).save(folder / "track.npz"), params=dict(film="another"))
    track, motion = seen_motion(run)
    assert len(track) == len(motion) == 6 and motion is track.motion


def test_kernels_are_waited_for_and_not_left_running(monkeypatch):
    "The run waits for the process that compiles, not for ever, and ends it whatever happens."
    said = []
    class Process:
        def wait(self, most): said.append('wait'); raise TimeoutExpired('compile', most)
        def kill(self): said.append('kill')
    monkeypatch.setattr(pipeline, 'compile_ahead', Process)
    with pytest.raises(ZeroDivisionError), compiling() as ready:
        ready()
        raise ZeroDivisionError
    assert said == ['wait', 'kill']
    with compiling(False) as ready: ready()
    assert said == ['wait', 'kill']
