"The pipeline's parts that need no network: motions of a person, what an avatar has seen."
import json
import os
from pathlib import Path
from subprocess import TimeoutExpired
from types import SimpleNamespace

import numpy as np
import pytest

import ophav_nb.pipeline as pipeline
from ophav_nb.avatar import Avatar, AvatarConfig
from ophav_nb.dataset import HeadDataset
from ophav_nb.field import field_config
from ophav_nb.geometry import facing_camera
from ophav_nb.head import HeadModel, Motion
from ophav_nb.inspect import write_report
from ophav_nb.layers import head_alpha
from ophav_nb.motion import head_angles, scripted
from ophav_nb.media import read_image, read_video, write_image, write_video
from ophav_nb.pipeline import (PRESETS, VIEWS, add_coarse, add_coarse_film, add_dataset, add_film, add_motion, add_portrait, add_track, add_views, beyond, compiling, load_driven, load_portrait, play, seen_motion,
                               shown_part, trained_range, warn_beyond, warn_of_other_portrait)
from ophav_nb.rounds import mesh_landmarks, write_frames
from ophav_nb.run import InputError, Run, file_hash, write_atomic
from ophav_nb.track import Track, landmark_error

from meshes import lenses

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
    motion = pipeline.resolve_motion(str(tmp_path / "film.mp4"), 1., lookers=pipeline.Lookers("meta", "s3fd"))
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


@pytest.mark.parametrize("worn", [None, lenses(HEAD)])
def test_what_the_animator_wears_reaches_the_dataset(tmp_path, monkeypatch, worn):
    run, still = Run(tmp_path / "run", {}), track_of(3).motion
    maker = SimpleNamespace(worn=worn, person_offset=lambda: np.zeros((HEAD.n_vertices, 3), np.float32), frames=lambda motion: iter(np.full((len(motion), 32, 32, 4), 200, np.uint8)),
                            composite=lambda picture, **_: np.zeros((32, 32, 3), np.float32))
    monkeypatch.setattr(pipeline, "make_animator", lambda *_, **__: maker)
    monkeypatch.setattr(pipeline, "load_portrait", lambda run: SimpleNamespace(image=None, track=None, matte=None))
    run.make("portrait", lambda folder: None)
    run.make("track", lambda folder: track_of().save(folder / "track.npz"))
    run.make("motion", lambda folder: still.save(folder / "train.npz"))
    add_coarse(run, HEAD, film_size=32)
    add_dataset(run, HEAD, 32)
    data = HeadDataset.load(run.path("rounds/0/dataset"))
    assert (data.worn is None) == (worn is None) == (not run.path("coarse", "worn.npz").exists())
    assert data.vertices.shape[1] == HEAD.n_vertices + (len(worn.points) if worn else 0)


def test_views_are_compared_with_the_portrait(filmed, monkeypatch):
    "Not with the avatar's own middle view: an avatar of someone else would look perfect there."
    filmed.path("coarse", "track.npz").unlink()
    views, middle = len(VIEWS["yaw"]) * len(VIEWS["pitch"]), len(VIEWS["yaw"]) * len(VIEWS["pitch"]) // 2
    grey = SimpleNamespace(render=lambda motion, camera: (np.full((camera.height, camera.width, 4), (.2, .2, .2, 1), np.float32) for _ in range(len(motion))))
    monkeypatch.setattr(pipeline, "Avatar", SimpleNamespace(load=lambda *a, **k: grey))
    monkeypatch.setattr(pipeline, "Detector", lambda device: None)
    monkeypatch.setattr(pipeline, "detect_like", lambda detector, images, near: np.asarray(near))
    monkeypatch.setattr(pipeline, "identity_embedding", lambda images, points: np.float32([[image[96, 96, 0] / 255] * 128 for image in images]))
    add_views(filmed)
    data = json.loads(filmed.path("views", "views.json").read_text())
    assert np.allclose(data["identity"], 128**.5 * (128 / 255 - .2), atol=.02) and np.shape(data["identity"]) == (3, 7) and np.allclose(data["landmark"], 0)
    assert np.shape(data["trained"]) == (2, 4) and views == 2 * middle + 1


def test_what_was_not_trained_is_named(caplog):
    known = trained_range(scripted("range", 12.))
    assert not beyond(scripted("turn", 4.), known)
    still = scripted("neutral", 1.)
    neck, lean = scripted("neutral", .4), scripted("neutral", .4)
    neck.joints[:, 1, 1] = np.radians(50)
    lean.joints[:, 0] = np.radians([0, 0, 30])
    assert set(beyond(neck, known)) == {"yaw"} and set(beyond(lean, known)) == {"roll"} and set(beyond(still, known, orbit=40.)) == {"yaw"}
    swing = 40. * np.sin(np.linspace(0, 2 * np.pi, len(still)))
    assert 0 < beyond(still, known, orbit=swing)["yaw"].mean() < 1      # only the frames that the camera is far aside in
    wild = scripted("neutral", 1.)
    wild.expression[:10], wild.joints[:10, 2, 0] = 5., 1.2
    told, train = (HEAD.condition(m.expression, m.joints).numpy() for m in (wild, scripted("range", 12.)))
    far = beyond(wild, known, told=told, clamped=np.clip(told, train.min(0), train.max(0)))
    assert {k: v.sum() for k, v in far.items()} == dict(jaw=10, expression=10)
    warn_beyond({}, known)
    assert not caplog.records
    warn_beyond(far, known)
    assert caplog.messages[0].startswith("40% of the frames leave what the avatar was trained on: jaw (trained from 0 to") and "expression (held" in caplog.messages[0]


def test_another_portrait_in_the_same_folder_is_said(tmp_path, caplog):
    run = Run(tmp_path/"run", dict(portrait="faces/anna.jpg"))
    run.make("part", lambda folder: (folder/"a.txt").write_text("a"))
    warn_of_other_portrait(Run(tmp_path/"run", dict(portrait="elsewhere/anna.jpg")))
    assert "holds" not in caplog.text
    warn_of_other_portrait(Run(tmp_path/"run", dict(portrait="faces/bert.jpg")))
    warn_of_other_portrait(Run(tmp_path/"new", dict(portrait="faces/bert.jpg")))
    assert caplog.text.count("holds the avatar of anna.jpg, which that of bert.jpg replaces") == 1 == caplog.text.count("holds")


def test_python_of_the_readme(filmed, monkeypatch):
    "What README shows runs as it stands there, in a folder with a finished run."
    small = AvatarConfig(field=field_config(levels=4, features=4, log2_size=10, scale=1.6))
    Avatar.create(HEAD, load_driven(filmed, HEAD).track.shape, small).save(filmed.path("avatar"))
    text = (Path(__file__).parents[1]/"README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert '"runs/astronaut"' in text and "resized(256, 256)" in text
    monkeypatch.chdir(filmed.folder)
    exec(text.replace("runs/astronaut", str(filmed.folder)).replace("256, 256", "32, 32"), {})
    assert sorted(p.name for p in Path().glob("view*.png")) == [f"view{i}.png" for i in range(5)]


def test_rounds_below_none(tmp_path):
    with pytest.raises(InputError, match="--rounds -1"): pipeline.create("astronaut", tmp_path / "run", rounds=-1)
    assert not (tmp_path / "run").exists()


def test_kernels_are_waited_for_and_not_left_running(monkeypatch):
    "The run waits for the process that compiles, not for ever, and ends it whatever happens."
    said = []
    class Process:
        def poll(self): return None
        def wait(self, most): said.append('wait'); raise TimeoutExpired('compile', most)
        def kill(self): said.append('kill')
    monkeypatch.setattr(pipeline, 'compile_ahead', Process)
    with pytest.raises(ZeroDivisionError), compiling() as ready:
        ready()
        raise ZeroDivisionError
    assert said == ['wait', 'kill']
    with compiling(False) as ready: ready()
    assert said == ['wait', 'kill']


@pytest.fixture
def filmed(tmp_path):
    "A run whose avatar was trained on a film in which the person has another shape than in the portrait."
    run, own = Run(tmp_path / "run", {}), track_of()
    own.landmarks = mesh_landmarks(HEAD, own.shape, own.motion, own.camera)
    def portrait(folder):
        write_image(folder / "crop.png", np.full((192, 192, 3), 128, np.uint8))
        write_image(folder / "matte.png", np.full((192, 192), 255, np.uint8))
    run.make("portrait", portrait)
    run.make("track", lambda folder: own.save(folder / "track.npz"))
    add_motion(run, "talk", PRESETS["smoke"], own)
    run.make("coarse", lambda folder: track_of(6, seed=3).save(folder / "track.npz"))
    run.make("avatar", lambda folder: None)
    return run


def test_the_film_is_played_in_the_shape_that_was_trained(filmed, monkeypatch):
    "The mesh moves as the portrait's own would, whatever shape it has; without a film nothing changes."
    played = []
    monkeypatch.setattr(pipeline, "play", lambda run, portrait, avatar, motion, path, **k: (played.append(motion), path.write_bytes(b"film")))
    monkeypatch.setattr(pipeline, "Avatar", SimpleNamespace(load=lambda *a, **k: None))
    add_film(filmed, PRESETS["smoke"])
    driven, asked, own = load_driven(filmed, HEAD).track, Motion.load(filmed.path("motion", "film.npz")), Track.load(filmed.path("track", "track.npz"))
    assert np.array_equal(driven.shape, seen_motion(filmed)[0].shape) and not np.array_equal(driven.shape, own.shape)
    first = mesh_landmarks(HEAD, driven.shape, played[0][0], driven.camera)
    assert landmark_error(first, own.landmarks)[0] < landmark_error(mesh_landmarks(HEAD, driven.shape, asked[0], driven.camera), own.landmarks)[0]
    assert np.abs(np.ptp(played[0].joints[:, 0], 0) - np.ptp(asked.joints[:, 0], 0)).max() < .01 and np.abs(np.ptp(played[0].joints[:, 2], 0) - np.ptp(asked.joints[:, 2], 0)).max() < .03
    key = filmed.manifest("film")["key"]
    (filmed.path("coarse", "track.npz")).unlink()
    add_film(filmed, PRESETS["smoke"])
    assert filmed.manifest("film")["key"] != key and (played[1].joints == asked.joints).all()


@pytest.fixture(scope="module")
def tight(tmp_path_factory):
    "A picture that ends above the hair, at the throat and beside the shoulder, up to the fit."
    run = Run(tmp_path_factory.mktemp("tight") / "run", {})
    add_portrait(run, read_image("astronaut")[:212, :330], 160)
    add_track(run, HEAD)
    return run


def test_a_film_shows_what_the_picture_shows(tight, tmp_path):
    portrait, sizes = load_portrait(tight), []
    (x0, y0, x1, y1), (rows, columns) = portrait.shown, shown_part(portrait, HEAD, 160)
    assert y0 > 5 and y1 < 155 and x0 == 0 and x1 < 155                              # made up above, below and on the right
    assert y0 <= rows.start < y0 + 1.1 and y1 - 2.1 < rows.stop <= y1 and columns.start == 0 and x1 - 2.1 < columns.stop <= x1
    render = lambda motion, camera: (np.zeros((96, 96, 4), np.float32) for _ in range(len(motion)))
    for name, background in (("body", "portrait"), ("white", "white")):
        film, _ = read_video(play(tight, portrait, SimpleNamespace(render=render), portrait.track.motion, tmp_path / f"{name}.mp4", 96, background))
        sizes.append(film.shape[1:3])
    assert sizes == [(rows.stop - rows.start, columns.stop - columns.start), (96, 96)] and not any(n % 2 for n in sizes[0])
    larger = shown_part(portrait, HEAD, 481)                                         # at any size the same part, and even
    for a, b in zip((rows, columns), larger): assert abs(b.start - 3 * a.start) < 4 and abs(b.stop - 3 * a.stop) < 8 and (b.stop - b.start) % 2 == 0


def test_a_film_shows_the_whole_head_though_the_picture_does_not(tight):
    portrait = load_portrait(tight)
    eyes = np.linalg.norm(portrait.track.landmarks[0, 468, :2] - portrait.track.landmarks[0, 473, :2])
    top = np.nonzero(portrait.matte > .5)[0].min()
    portrait.shown = np.float32([0, top + 12, 160, portrait.track.landmarks[0, :, 1].max() - 6])     # it cuts hair and chin off
    rows, _ = shown_part(portrait, HEAD, 160)
    assert abs(rows.start - (top - eyes / 4)) < 2 and abs(rows.stop - (portrait.shown[3] + 6 + eyes / 4)) < 3
    across = np.nonzero(head_alpha(portrait.matte, HEAD, portrait.track) > .5)[1]
    portrait.shown[[0, 2]] = across.min() + 3, across.max() - 3                              # and its sides
    _, columns = shown_part(portrait, HEAD, 160)
    assert abs(columns.start - max(across.min() - .6 * eyes, 0)) < 2 and abs(columns.stop - min(across.max() + 1 + .6 * eyes, 160)) < 3      # it will turn
    short = shown_part(portrait, HEAD, 160, portrait.matte * (np.arange(160)[:, None] > top + 8))[0]
    assert abs(short.start - (rows.start + 9)) < 2                                           # what is told of the matte counts


def test_a_run_that_does_not_say_what_the_picture_fills_shows_the_square(tight):
    path = tight.path("portrait", "crop.json")
    told = path.read_text()
    try:
        path.write_text(json.dumps({k: v for k, v in json.loads(told).items() if k != "shown"}))
        assert shown_part(load_portrait(tight), HEAD, 160) == (slice(0, 160),) * 2
        path.unlink()
        assert shown_part(load_portrait(tight), HEAD, 160) == (slice(0, 160),) * 2
    finally: path.write_text(told)


@pytest.mark.parametrize("tidy", [False, True])
def test_a_tidy_run_keeps_all_but_its_training_frames(filmed, monkeypatch, tidy):
    for name in ("add_portrait", "add_track", "add_motion", "add_coarse", "add_film", "add_views", "write_run_report"): monkeypatch.setattr(pipeline, name, lambda *a, **k: None)
    monkeypatch.setattr(pipeline, "compile_ahead", lambda: None)
    built = []
    def rounds(run, *_):
        run.make("rounds/0/dataset", lambda folder: (built.append("dataset"), (folder / "rgb.npy").write_bytes(b"0")))
        run.make("rounds/0/avatar", lambda folder: built.append("avatar"), needs=["rounds/0/dataset"])
        run.make("avatar", lambda folder: built.append("chosen"), needs=["rounds/0/avatar"])
    monkeypatch.setattr(pipeline, "train_rounds", rounds)
    monkeypatch.setattr(pipeline, "add_dataset", lambda *a, **k: None)
    for _ in range(2): run = pipeline.create("astronaut", filmed.folder, preset="smoke", device="cpu", tidy=tidy)
    assert run.path("rounds/0/dataset").exists() != tidy and run.has("rounds/0/avatar") and not run.stale("avatar")
    assert built == ["dataset", "avatar", "chosen"] + ["dataset"] * tidy          # the second time nothing is trained again


def test_a_recipe_reaches_the_rounds(tmp_path, monkeypatch):
    got = {}
    def rounds(run, dataset, portrait, head, config, **_):
        got["config"] = config
        raise InputError("far enough")
    monkeypatch.setattr(pipeline, "run_rounds", rounds)
    monkeypatch.setattr(pipeline, "load_driven", lambda *a: None)
    monkeypatch.setattr(pipeline, "HeadDataset", SimpleNamespace(load=lambda folder: None))
    with pytest.raises(InputError, match="far enough"):
        pipeline.train_rounds(SimpleNamespace(path=lambda *a: tmp_path), None, pipeline.get_preset("smoke"), 1, "detail", "auto", "cpu", 0, dict(mouth_weight=9., condition="mouth"))
    assert got["config"].avatar.mouth_weight == 9 and got["config"].avatar.field.condition == "mouth"
    with pytest.raises(InputError, match="did you mean"): pipeline.create("astronaut", tmp_path / "run", recipe="mouth_wait=3")
    assert not (tmp_path / "run").exists()


def test_a_film_replaces_nothing_that_it_is_made_from(filmed, tmp_path, monkeypatch):
    "Neither the driving film nor a part of the run, and what cannot be written is said before any work; at the run's top it may lie."
    def work(*_): raise ZeroDivisionError
    monkeypatch.setattr(pipeline, "check_avatar", work)
    film, link = tmp_path / "two.mp4", tmp_path / "link.mp4"
    film.write_bytes(b"film")
    link.symlink_to(film)
    (tmp_path / "folder.mp4").mkdir()
    for motion, out, part in ((film, film, "drives"), (film, link, "drives"), ("talk", filmed.path("coarse", "video.mp4"), "part of the run"), ("talk", filmed.path("coarse", "frames", "a.mp4"), "part of the run"),
                              ("talk", tmp_path / "folder.mp4", "is a folder"), ("talk", film / "a.mp4", "not a folder"), ("talk", "/proc/no/a.mp4", "cannot be made"), ("talk", tmp_path / ("a" * 250 + ".mp4"), "too long")):
        with pytest.raises(InputError, match=part): pipeline.animate(filmed.folder, str(motion), out)
    for out in (filmed.path("a.mp4"), filmed.path("films", "a.mp4"), tmp_path / "new" / "a.mp4"):
        with pytest.raises(ZeroDivisionError): pipeline.animate(filmed.folder, str(film), out)
    assert film.read_bytes() == b"film" and not list(tmp_path.rglob("*.partial.*")) and not (tmp_path / "new").exists()


def test_a_portrait_whose_name_is_no_utf8(tmp_path):
    name = os.fsdecode(b"/home/caf\xe9.png")
    run = Run(tmp_path / "run", dict(portrait=name))
    said = pipeline.film_metadata(run)
    assert said["comment"].endswith("Made from: caf?.png") and said["title"].encode()
    run.make("portrait", lambda folder: run.log.warning("%s", name))
    page = write_report(run).read_text(encoding="utf-8")
    assert "Avatar of caf?.png" in page and "caf?.png" in run.path("log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("left", [b"", b"\0" * 200, b"\x89PNG\r\n\x1a\n", "short"])
def test_frames_that_a_power_cut_damaged_are_made_again(tmp_path, left):
    frames, asked = [np.full((8, 8, 4), 10 * i, np.uint8) for i in range(4)], []
    def make(start):
        asked.append(start)
        return iter(frames[start:])
    pipeline.write_coarse(tmp_path, make, 4)
    damaged = tmp_path / "frames" / "00002.png"
    damaged.write_bytes(damaged.read_bytes()[:-5] if left == "short" else left)
    pipeline.write_coarse(tmp_path, make, 4)
    assert asked == [0, 2] and (pipeline.read_stored(damaged) == 20).all()
    damaged.write_bytes(damaged.read_bytes()[:-5] if left == "short" else left)
    write_frames(tmp_path / "frames", 4, lambda missing: (asked.append(missing), [frames[i] for i in missing])[1])
    assert asked[2:] == [[2]] and (pipeline.read_stored(damaged) == 20).all()


def test_a_film_of_few_frames_makes_no_avatar(tmp_path):
    film = write_video(tmp_path / "short.mp4", np.zeros((3, 64, 64, 3), np.uint8))
    run = Run(tmp_path / "run", {})
    for name in ("portrait", "track"): run.make(name, lambda folder: None)
    with pytest.raises(InputError, match="short.mp4 has only 3 frames; an avatar needs some seconds of film"): add_coarse_film(run, film, HEAD, PRESETS["smoke"])
    pipeline.check_length(write_video(tmp_path / "long.mp4", np.zeros((5, 64, 64, 3), np.uint8)), "an avatar")


def test_a_film_of_another_person_is_told(monkeypatch, caplog):
    portrait, track = SimpleNamespace(image=np.zeros((96, 96, 3), np.uint8), track=track_of(yaw=20.)), track_of(8)
    track.motion.joints[:, 0, 1] = np.radians(np.arange(8) * 10)
    track.ok[2] = False
    frames = np.repeat(np.arange(8, dtype=np.uint8), 64 * 64 * 3).reshape(8, 64, 64, 3)
    for far, told in ((.8, True), (.3, False)):
        def embed(images, points):
            assert [int(im[0, 0, 0]) for im in images[1:]] in ([1, 3, 0], [3, 1, 0]) + ([1, 3, 4], [3, 1, 4])     # those that look as the portrait does
            return np.float32([[0.], *[[far]] * 3])
        monkeypatch.setattr(pipeline, "identity_embedding", embed)
        caplog.clear()
        pipeline.warn_of_another(portrait, frames, track, most=3)
        assert ("another person" in caplog.text) == told


@pytest.mark.parametrize("name, text", [("crop.png", ""), ("matte.png", ""), ("crop.json", "[]"), ("matte.png", "no picture")])
def test_damaged_files_of_a_run_are_told_as_its_own(tight, name, text):
    path = tight.path("portrait", name)
    whole = path.read_bytes()
    try:
        path.write_text(text)
        with pytest.raises(InputError, match=f"{name} is .*damaged; delete it and give the command that made this folder"): load_portrait(tight)
        if name != "crop.json":
            with pytest.raises(InputError, match=f"{name} is .*damaged; delete it and give the command that made this folder"): write_report(tight)
    finally: path.write_bytes(whole)


def test_a_damaged_motion_of_a_run_is_told_as_its_own(filmed):
    filmed.path("coarse", "track.npz").unlink()
    filmed.path("motion", "train.npz").write_text("[]")
    with pytest.raises(InputError, match="train.npz is missing or damaged; delete it and give the command that made this folder"): seen_motion(filmed)


def test_an_evaluation_is_not_animated(tmp_path):
    run = Run(tmp_path / "run", dict(clip="a.mp4", protocol="self"))
    run.make("clip", lambda folder: None)
    with pytest.raises(InputError, match="made by `ophav evaluate`.*; give the folder that `ophav create --out` made"): pipeline.check_avatar(run)


def test_a_damaged_avatar_of_a_round_is_not_copied(tmp_path, monkeypatch):
    "Else it would be told of the copy, which comes back as damaged as before."
    run = Run(tmp_path / "run", {})
    def avatar(folder):
        (folder / "avatar.safetensors").write_text("weights")
        write_atomic(folder / "avatar.json", json.dumps(dict(sha256=file_hash(folder / "avatar.safetensors"))))
    run.make("rounds/0/avatar", avatar)
    monkeypatch.setattr(pipeline, "run_rounds", lambda *_, **__: ([], 0))
    monkeypatch.setattr(pipeline, "load_driven", lambda *a: None)
    monkeypatch.setattr(pipeline, "HeadDataset", SimpleNamespace(load=lambda folder: None))
    train = lambda: pipeline.train_rounds(run, None, pipeline.get_preset("smoke"), 1, "detail", "auto", "cpu", 0)
    weights = run.path("rounds", "0", "avatar", "avatar.safetensors")
    weights.write_text("weightz")
    with pytest.raises(InputError, match="rounds/0/avatar/avatar.safetensors is damaged"): train()
    assert not run.has("avatar")
    weights.write_text("weights")
    assert train() == 0 and run.path("avatar", "avatar.safetensors").read_text() == "weights"


def test_what_is_animated_is_whole_and_may_be_read(filmed, monkeypatch):
    filmed.make("avatar", lambda folder: (folder / "avatar.json").write_text("{}"), params=dict(again=1))
    pipeline.check_avatar(filmed)
    for name in ("portrait/crop.png", "track/track.npz", "motion/train.npz", "motion/manifest.json"):
        path, part = filmed.path(name), name.split("/")[0]
        whole = path.read_bytes()
        path.write_text("[]")
        with pytest.raises(InputError, match=f"no finished {part}, or a damaged one; run the `ophav create`"): pipeline.check_avatar(filmed)
        path.write_bytes(whole)
    filmed.path("avatar", "avatar.json").write_text("[]")
    with pytest.raises(InputError, match="avatar.json is damaged"): pipeline.check_avatar(filmed)
    filmed.path("avatar", "avatar.json").write_text("{}")
    access = os.access
    for name in ("avatar.json", "crop.png", "manifest.json"):
        monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and os.path.basename(path) != name)
        with pytest.raises(InputError, match=f"{name} may not be read; change its permissions"): pipeline.check_avatar(filmed)


@pytest.mark.parametrize("option, part", [(dict(rounds="1"), "rounds='1': give a whole number or None"), (dict(seed=-1), "seed=-1: give a whole number from 0 on"), (dict(seed=2**63), "below"), (dict(face="1"), "face='1'"),
                                          (dict(device=0), "device=0: give a text"), (dict(recipe=None), "recipe=None"), (dict(half="no"), "half='no': give True or False"), (dict(seed=True), "seed=True")])
def test_options_of_a_notebook_are_of_their_kind(tmp_path, option, part):
    with pytest.raises(InputError, match=part): pipeline.create("astronaut", tmp_path / "run", **option)
    pipeline.check_kinds(seed=np.int64(3), half=np.bool_(True), rounds=None)
    with pytest.raises(InputError, match="give a text or a path"): pipeline.create({"a": 1}, "o")
    with pytest.raises(InputError, match="unknown preset"): pipeline.get_preset({"a": 1})
    assert not (tmp_path / "run").exists()


def test_a_brief_motion_is_said(tmp_path, caplog):
    for seconds in (.12, 1.):
        scripted("talk", seconds).save(tmp_path / f"{seconds}.npz")
        pipeline.resolve_motion(str(tmp_path / f"{seconds}.npz"), 8.)
    assert caplog.text.count("has only 3 frames, 0.12 s") == caplog.text.count("has only") == 1
