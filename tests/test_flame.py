"Tests of FLAME made ready: what is carried over, against a stand-in whose truth is known; motions both ways; MICA; metrical-tracker's files."
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import golden_fill
from ophav_nb import flame as module
from ophav_nb.detect import Detector
from ophav_nb.flame import convert, flame_head, load_head, read_tracker, stand_in_flame
from ophav_nb.head import HeadModel, Motion
from ophav_nb.media import read_image
from ophav_nb.motion import in_basis, read_motion, retarget, scripted
from ophav_nb.nets.mica import Mica
from ophav_nb.run import InputError
from ophav_nb.track import FIVE, fit_film, fit_portrait, mica_shape, track_portrait
from ophav_nb.weights import add_weight
from test_track import posed


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A cache with the stand-in in it, as if FLAME's pickle had been added."
    folder = tmp_path_factory.mktemp("home")
    before, os.environ["OPHAV_HOME"] = os.environ.get("OPHAV_HOME"), str(folder)
    arrays, true = stand_in_flame(1)
    (folder/"generic_model.pkl").write_bytes(pickle.dumps(arrays, protocol=2))
    assert add_weight(folder/"generic_model.pkl")[0] == "flame"
    yield folder, true
    os.environ.pop("OPHAV_HOME") if before is None else os.environ.update(OPHAV_HOME=before)


@pytest.fixture(scope="module")
def flame(home): return flame_head()


@pytest.fixture(scope="module")
def head(): return HeadModel.load()


def millimetres(a, b): return 1000*np.linalg.norm(a - b, axis=-1)


def test_stand_in_has_flames_form(home):
    arrays = np.load(home[0]/"weights"/"flame.npz")
    V = len(arrays["v_template"])
    assert arrays["shapedirs"].shape == (V, 3, 400) and arrays["posedirs"].shape == (V, 3, 36) and arrays["J_regressor"].shape == (5, V)
    plain = HeadModel({**arrays, "n_shape": 300}, "flame")
    np.testing.assert_allclose(plain.weights.sum(1), 1, atol=1e-5)
    assert not plain.has("regions") and not plain.has("landmark_faces")


def test_landmarks_and_regions_against_the_truth(home, flame, head):
    true, f = home[1], head.faces[head.landmark_faces]
    error = millimetres(flame.landmarks(flame.v_template[None])[0].numpy(), (true[f]*head.landmark_bary.numpy()[..., None]).sum(1))
    assert error.mean() < 1.5 and np.quantile(error, .95) < 3.5 and error.max() < 8
    for name in head.regions:                                    # regions stand where they stand on the open head
        there, here = (h.faces[h.regions[name]] for h in (head, flame))
        assert len(here), name
        away = np.linalg.norm(true[there].mean((0, 1)) - flame.v_template.numpy()[here].mean((0, 1)))
        assert away < (.015 if name in ("boundary", "neck", "mouth_interior") else .009 if name in ("upper_teeth", "lower_teeth", "tongue") else .005), (name, away)
    corners, bary, good, _ = flame.match
    off = millimetres((flame.v_template.numpy()[corners]*bary[..., None]).sum(1), true)[good]
    assert good.sum() > 3000 and off.mean() < 1.8


def test_mouth_moves_with_the_jaw(flame):
    joints = torch.zeros(2, 5, 3)
    joints[1, 2, 0] = .3
    v = flame(joints=joints).numpy()
    drop = lambda name: (v[0] - v[1])[flame.region_vertices(name), 1].mean()
    assert abs(drop("upper_teeth")) < 1e-4 and drop("lower_teeth") > .008 and drop("tongue") > .004
    assert np.isfinite(v).all() and flame.regions["lips"].sum() > 50
    eyes = torch.zeros(1, 5, 3)
    eyes[0, 3:, 1] = .4
    turned = flame(joints=eyes)[0].numpy() - v[0]
    assert np.abs(turned[flame.region_vertices("left_eyeball")]).max() > .002


def test_made_once(home, flame, monkeypatch):
    monkeypatch.setattr(module, "transfer", lambda *_: pytest.fail("made again"))
    again = flame_head()
    assert torch.equal(again.v_template, flame.v_template) and np.array_equal(again.faces, flame.faces)
    assert load_head("flame").n_expression == 100 and load_head("open").n_expression == 52
    with pytest.raises(InputError, match="unknown head"): load_head("smpl")


@pytest.mark.slow
def test_without_a_mouth_flame_keeps_its_vertices(home):
    plain = flame_head(mouth=False)
    assert plain.n_vertices == len(np.load(home[0]/"weights"/"flame.npz")["v_template"]) and not plain.regions["tongue"].any()


def test_missing_file_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path))
    with pytest.raises(InputError, match=r"flame \(generic_model.pkl.*licence.*https://flame.is.tue.mpg.de.*ophav weights add"): flame_head()
    from ophav_nb.pipeline import create
    with pytest.raises(InputError, match="ophav weights add"): create("astronaut", tmp_path/"run", head="flame")
    assert not (tmp_path/"run").exists()


def test_a_motion_there_and_back(flame, head):
    motion = scripted("range", 3.)
    there, report = convert(motion, flame, head)
    assert there.basis == "flame" and there.expression.shape == (75, 100)
    assert report["mean"] < .1*report["moved"] and report["regions"]["lips"][0] < .4
    back, again = convert(replace(there, translation=there.translation - np.float32([0, 0, .6])), flame, head)   # as tracked: amounts from nothing to all
    assert back.basis == "open" and again["mean"] < .2
    assert np.abs(back.expression - motion.expression).mean() < .03 and back.expression.min() >= 0
    assert np.degrees(np.abs(back.joints - motion.joints)).max() < 2
    np.testing.assert_array_equal(there.joints[:, [0, 1, 3, 4]], motion.joints[:, [0, 1, 3, 4]])
    with pytest.raises(InputError, match="cannot be converted"): convert(replace(motion, basis="other"), flame, head)


def test_named_shapes(flame):
    with pytest.raises(InputError, match="no expression 'smirk'"): flame.expression(smirk=1)
    shut = flame.landmarks(flame(expression=flame.expression(eyeBlink=1.)))[0].numpy()
    rest = flame.landmarks(flame.v_template[None])[0].numpy()
    gap = lambda p: np.linalg.norm(p[386] - p[374]) + np.linalg.norm(p[159] - p[145])
    assert gap(shut) < .5*gap(rest)


def test_condition_is_the_first_sixteen(flame):
    e = torch.randn(3, 100)
    assert torch.equal(flame.condition(e, torch.zeros(3, 5, 3)), e[:, :16])


def test_fit_to_own_landmarks(flame):
    points = posed(HeadModel.load())[0]
    track = fit_portrait(np.zeros((256, 256, 3), np.uint8), points[0], flame)
    assert track.error[0] < 2 and track.motion.basis == "flame" and track.shape.shape == (300,)
    assert track.motion.expression.min() < 0 and np.abs(track.motion.expression).max() < 4.1


def test_film_of_landmarks(flame):
    points, _, _, joints = posed(HeadModel.load(), 24)
    track = fit_film(None, points, np.ones(24, bool), flame, size=256)
    assert track.error.mean() < 2 and track.info["lids"] > .9
    assert np.abs(np.degrees(track.motion.joints[:, 0, 1] - joints[:, 0, 1].numpy())).max() < 6


def test_retarget_translates(flame):
    track = fit_portrait(np.zeros((256, 256, 3), np.uint8), posed(HeadModel.load())[0][0], flame)
    played = retarget(scripted("talk", 1.), track)
    assert played.basis == "flame" and played.expression.shape == (25, 100) and np.isfinite(played.expression).all()
    assert np.abs(played.expression[0] - track.motion.expression[0]).mean() < .2           # begins at the portrait's own face
    sequence = Motion(np.random.default_rng(0).normal(0, .5, (4, 100)), np.zeros((4, 5, 3)), np.zeros((4, 3)), basis="flame")
    assert retarget(sequence, track).basis == "flame"
    assert in_basis(sequence, "open").expression.shape == (4, 52)
    with pytest.raises(InputError, match="'other'"): in_basis(replace(sequence, basis="other"), "open")


def test_flame_sequences_are_read(home, flame, tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path/"a.npz", expr=rng.normal(0, 1, (6, 65)), rot=np.zeros((6, 3)), tra=np.zeros((6, 3)), fps=24)
    motion = read_motion(tmp_path/"a.npz")
    assert motion.basis == "open" and motion.expression.shape == (6, 52) and np.abs(motion.expression).max() > .1
    assert read_motion(tmp_path/"a.npz", basis="flame").expression.shape[0] == 6


def rows(*turn): return Rotation.from_rotvec(turn).as_matrix()[:2].ravel()[None].astype(np.float32)


def frame_file(path, i, rng):
    "A `.frame` as metrical-tracker writes it."
    flame = dict(exp=rng.normal(0, .5, (1, 100)).astype(np.float32), shape=np.full((1, 300), .1, np.float32), tex=np.zeros((1, 140)), sh=np.zeros((1, 9, 3)),
                 eyes=np.concatenate([rows(0, .1, 0), rows(0, .2, 0)], 1), eyelids=np.float32([[.5, .3]]), jaw=rows(.1, 0, 0))
    cv = dict(R=(np.diag([1., -1, -1]) @ Rotation.from_rotvec([.05, .1*i, 0]).as_matrix())[None], t=np.array([[.01, -.02, .8]]),
              K=np.array([[[1000., 0, 250], [0, 1000, 260], [0, 0, 1]]]))
    torch.save(dict(flame=flame, camera=dict(fl=np.ones((1, 1))), opencv=cv, img_size=np.array([512, 512]), frame_id=f"{i:05d}", global_step=i), path)
    return flame, cv


def test_tracker_frames(flame, tmp_path):
    (tmp_path/"checkpoint").mkdir()
    said = [frame_file(tmp_path/"checkpoint"/f"{i:05d}.frame", i, np.random.default_rng(i)) for i in range(3)]
    track = read_tracker(tmp_path, flame, lids=False)
    assert len(track) == 3 and track.motion.basis == "flame" and (track.camera.width, track.camera.height) == (512, 512)
    for i, (part, cv) in enumerate(said):
        joints = torch.tensor([[[0, 0, 0], [0, 0, 0], [.1, 0, 0], [0, .1, 0], [0, .2, 0]]])
        v = flame(torch.tensor(part["shape"][0]), torch.tensor(part["exp"]), joints)[0].numpy() @ cv["R"][0].T + cv["t"]
        q = v @ cv["K"][0].T
        np.testing.assert_allclose(track.camera.project(track.vertices(flame, i))[:, :2], q[:, :2]/q[:, 2:], atol=.05)
    blinking = read_tracker(tmp_path/"checkpoint", flame)
    assert np.abs(blinking.motion.expression - track.motion.expression).max() > .05


def test_tracker_frames_that_are_not(flame, head, tmp_path):
    with pytest.raises(InputError, match="no .frame files"): read_tracker(tmp_path, flame)
    torch.save(dict(flame={}), tmp_path/"a.frame")
    with pytest.raises(InputError, match="not a frame of metrical-tracker"): read_tracker(tmp_path, flame)
    with pytest.raises(InputError, match="flame_head"): read_tracker(tmp_path, head)
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path/"boom"),)
    torch.save(dict(flame=Bomb()), tmp_path/"a.frame")
    with pytest.raises(InputError, match="run code"): read_tracker(tmp_path, flame)
    assert not (tmp_path/"boom").exists()


@pytest.mark.slow
def test_mica_gives_the_shape(home, flame, tmp_path):
    net = Mica()
    for part in ("arcface", "flameModel"): golden_fill.fill_golden(getattr(net, part), "mica", part)
    net.eval()
    image = read_image("astronaut")
    points = Detector().one(image).landmarks
    shape = mica_shape(image, points, net)
    assert shape.shape == (300,) and np.isfinite(shape).all() and len(FIVE) == 5
    torch.save({"arcface": net.arcface.state_dict(), "flameModel": net.flameModel.state_dict()}, tmp_path/"mica.tar")
    kept = add_weight(tmp_path/"mica.tar")[1]
    try:
        crop, square, _, track = track_portrait(image, Detector(), flame, size=256)
        told = mica_shape(square, track.landmarks[0], net)
        free = fit_portrait(square, track.landmarks[0], flame, shape=np.zeros(300))
        np.testing.assert_allclose(track.shape[80:], told[80:], atol=1e-4)           # what is not fitted is MICA's
        assert np.linalg.norm(track.shape - told) < np.linalg.norm(free.shape - told) + 1e-6
    finally: kept.unlink()


def test_create_with_flame(home, flame, tmp_path):
    from ophav_nb.pipeline import Preset, animate, create
    run = create("astronaut", tmp_path/"run", head="flame", rounds=0, preset=Preset(192, 64, 12, 20, 10, 4, .4, 64))
    assert run.path("video.mp4").stat().st_size > 1000 and Motion.load(run.path("motion", "film.npz")).basis == "flame"
    assert animate(run, "neutral", tmp_path/"clip.mp4", seconds=.2, size=64).stat().st_size > 500


def test_insta_folder_from_tracker(flame, tmp_path):
    from ophav_nb.dataset import HeadDataset, tracker_dataset
    from ophav_nb.media import write_image
    image = read_image("astronaut")
    (tmp_path/"in"/"input").mkdir(parents=True)
    for i in range(3):
        frame_file(tmp_path/"in"/f"{i:05d}.frame", i, np.random.default_rng(i))
        write_image(tmp_path/"in"/"input"/f"{i:05d}.png", image)
    class Plain:                                             # no network: the middle of the picture
        def matte(self, frames): return np.pad(np.ones((1, 256, 256), np.float32), ((0, 0), (128, 128), (128, 128)))
    out = tracker_dataset(tmp_path/"in", tmp_path/"out", Plain(), flame, test=1)
    data = HeadDataset.load(out, flame)
    assert len(data) == 3 and data.train.sum() == 2 and data.width == 512 and {p.name for p in out.iterdir()} >= {"canonical.obj", "meshes", "images", "flame"}
    said = np.random.default_rng(1).normal(0, .5, (1, 100))[0]
    np.testing.assert_allclose(np.loadtxt(out/"flame"/"exp"/"00001.txt"), said, atol=1e-6)
    np.testing.assert_allclose(data.condition[1], said[:16], atol=1e-6)
    np.testing.assert_allclose(data.K, [[1000, 0, 250], [0, 1000, 260], [0, 0, 1]])
    (tmp_path/"in"/"input"/"00002.png").unlink()
    with pytest.raises(InputError, match="2 pictures"): tracker_dataset(tmp_path/"in", tmp_path/"b", Plain(), flame)
