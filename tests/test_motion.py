"Tests of motions: scripts within bounds, transfer, files of others."
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from ophav_nb.head import HeadModel, Motion
from ophav_nb.motion import (NAMES, flame_motion, head_angles, is_absolute, limit, liveportrait_motion, read_motion, relative, rest_frame, retarget,
                             scripted, smooth, speak, visemes)
from ophav_nb.run import InputError

FILES = Path(__file__).parents[2]/"shared"/"data"/"motion"


class Portrait:
    motion = Motion(np.full((1, 52), .1), np.concatenate([[[[.1, -.05, 0]]], np.zeros((1, 4, 3))], 1), [[0, 0, -.7]])


def test_names_are_the_heads(): assert NAMES == HeadModel.load().expression_names


@pytest.mark.parametrize("name", ["range", "talk", "turn", "neutral"])
@pytest.mark.parametrize("seconds", [.1, .5, 3, 12])
def test_scripts(name, seconds):
    motion, angles = scripted(name, seconds), None
    angles = np.abs(head_angles(motion.joints[:, 0]))
    assert len(motion) == round(seconds*25) and np.isfinite(motion.joints).all()
    assert motion.expression.min() >= 0 and motion.expression.max() <= 1
    assert angles[:, 0].max() < 26 and angles[:, 1].max() < 16
    np.testing.assert_array_equal(motion.joints, scripted(name, seconds).joints)
    assert np.abs(motion.joints[0, 0]).max() < .03


@pytest.mark.parametrize("seconds, fps", [(0, 25), (-1, 25), (float("nan"), 25), (float("inf"), 25), (1, 0), (1, float("nan"))])
def test_scripts_of_no_length(seconds, fps):
    with pytest.raises(InputError, match="must be above 0"): scripted("talk", seconds, fps)


@pytest.mark.parametrize("seconds", [.1, .3])
def test_words_in_no_time_are_said_in_order(seconds):
    "However short: each viseme comes after the one before, about within the time."
    t = np.linspace(0, 1.5*seconds, 400)
    jaw = speak("mama", t, 0, seconds)[:, 52]
    assert jaw[0] == jaw[-1] == 0 and jaw.max() > .1 and (np.diff(np.sign(np.diff(jaw)[np.abs(np.diff(jaw)) > 1e-6])) != 0).sum() == 3   # open, closed, open


def test_range_covers():
    motion = scripted("range", 12)
    used = motion.expression.max(0)
    free = [i for i, n in enumerate(NAMES) if not n.startswith(("jaw", "eyeLook", "tongue"))]
    assert (used[free] > .2).mean() > .9
    assert np.abs(head_angles(motion.joints[:, 0])[:, 0]).max() > 20
    with pytest.raises(InputError): scripted("dance")


def test_range_holds_lids():
    "Lids are held at any height and unequally, as on films of people, and still mostly up; a laugh narrows the eyes."
    motion = scripted("range", 60)
    lids = motion.expression[:, [NAMES.index("eyeBlinkLeft"), NAMES.index("eyeBlinkRight")]]
    mean, apart = lids.mean(1), np.abs(np.diff(lids, axis=1))[:, 0]
    slow = np.abs(np.gradient(mean))*motion.fps < 1
    assert .35 < (mean < .05).mean() < .65 and (slow & (mean > .1) & (mean < .6)).mean() > .15
    assert .05 < (apart > .1).mean() < .35 and apart.max() > .6
    squint, smile = (motion.expression[:, NAMES.index(n)] for n in ("eyeSquintLeft", "mouthSmileLeft"))
    assert ((squint > .2) & (smile > .3)).mean() > .04


def test_speech():
    assert [n for n, _ in visemes("bob")] == ["closed", "o", "closed"]
    t = np.arange(50)/25
    face = speak("mama", t, 0, 2)
    assert face[:, 52].max() > .1 and np.abs(face[0]).max() == 0


def test_there_and_back():
    film = scripted("talk", 4)
    film = replace(film, expression=film.expression*.8, joints=film.joints*.9, translation=film.translation*.1)
    there = retarget(film, Portrait, keep=1.)
    assert is_absolute(there) and not is_absolute(film)
    back = relative(there, Portrait.motion)
    np.testing.assert_allclose(back.expression, film.expression, atol=1e-5)
    np.testing.assert_allclose(back.joints, film.joints, atol=1e-5)
    np.testing.assert_allclose(back.translation, film.translation, atol=1e-4)
    again = retarget(there, Portrait, neutral=Portrait.motion, keep=1.)
    np.testing.assert_allclose(again.joints, there.joints, atol=1e-5)
    assert len(rest_frame(there)) == 1


def test_limits_and_smoothing():
    film = scripted("range", 6)
    wild = replace(film, joints=film.joints*3)
    angles = np.abs(head_angles(limit(wild, 20, 10).joints[:, 0]))
    assert angles[:, 0].max() <= 20.01 and angles[:, 1].max() <= 10.01
    calm = replace(film, joints=film.joints*.3)
    np.testing.assert_allclose(limit(calm).joints, calm.joints, atol=1e-5)
    lid = NAMES.index("eyeBlinkLeft")
    assert smooth(film).expression[:, lid].max() > .97*film.expression[:, lid].max()
    assert np.abs(np.diff(smooth(film).expression, 2, axis=0)).mean() < np.abs(np.diff(film.expression, 2, axis=0)).mean()


class Evil:
    def __reduce__(self): return (print, ("code ran",))


def test_pickles_do_not_run(tmp_path, capsys):
    (tmp_path/"bad.pkl").write_bytes(pickle.dumps(dict(motion=[Evil()])))
    with pytest.raises(InputError): read_motion(tmp_path/"bad.pkl")
    assert "code ran" not in capsys.readouterr().out


def test_wrong_files(tmp_path):
    for name, content in (("a.npz", b"no"), ("a.txt", b"no"), ("a.mp4", b"no")):
        (tmp_path/name).write_bytes(content)
        with pytest.raises(InputError): read_motion(tmp_path/name)
    np.savez(tmp_path/"b.npz", x=np.zeros(3))
    with pytest.raises(InputError): read_motion(tmp_path/"b.npz")
    with pytest.raises(InputError): read_motion(tmp_path/"none.npz")
    with pytest.raises(InputError): liveportrait_motion({"motion": [1]})


BAD_MOTIONS = dict(nan=dict(expression=np.full((3, 52), np.nan)), inf=dict(translation=np.full((3, 3), np.inf)), empty=dict(expression=np.zeros((0, 52)), joints=np.zeros((0, 5, 3)),
                   translation=np.zeros((0, 3))), rate=dict(fps=0.), no_rate=dict(fps=np.zeros(3)), words=dict(expression=np.full((3, 52), "a")))


@pytest.mark.parametrize("kind", BAD_MOTIONS)
def test_motions_that_cannot_be_played(tmp_path, kind):
    good = dict(expression=np.zeros((3, 52)), joints=np.zeros((3, 5, 3)), translation=np.zeros((3, 3)), fps=25., basis="open")
    np.savez(tmp_path/"good.npz", **good)
    assert len(read_motion(tmp_path/"good.npz")) == 3
    np.savez(tmp_path/"bad.npz", **good | BAD_MOTIONS[kind])
    for read in (read_motion, Motion.load):
        with pytest.raises(InputError): read(tmp_path/"bad.npz")


def test_files_that_are_no_npz_of_arrays(tmp_path):
    good = Motion.still(3)
    with open(tmp_path/"single.npz", "wb") as file: np.save(file, good.expression)
    good.save(tmp_path/"text.npz")
    with zipfile.ZipFile(tmp_path/"text.npz", "a") as z: z.writestr("notes.txt", "Dear sir")
    np.savez(tmp_path/"flat.npz", expression=1., joints=good.joints, translation=good.translation, fps=25., basis="open")
    for name in ("single", "text", "flat"):
        with pytest.raises(InputError): read_motion(tmp_path/f"{name}.npz")
    with pytest.raises(InputError, match="not finite"): replace(good, translation=good.translation + np.nan)


BAD_TEMPLATES = dict(output_fps=None, words=dict(output_fps="x"), c_lip_lst=[[.1]]*5, c_eyes_lst=[[.1, .2]]*2 + [[.1, np.nan]], number=dict(c_lip_lst=.5), ragged=dict(c_lip_lst=[[.1], [.1, .2], [.3]]), scale=0.)


@pytest.mark.parametrize("key", BAD_TEMPLATES)
def test_liveportrait_templates_with_mistakes(tmp_path, key):
    value = BAD_TEMPLATES[key]
    frame = dict(R=np.eye(3), exp=np.zeros((21, 3)), t=np.zeros(3), scale=1.)
    good = dict(motion=[frame]*3, output_fps=25, c_lip_lst=[np.float32([[.1]])]*3, c_eyes_lst=[np.float32([[0, 0]])]*3)
    assert len(liveportrait_motion(good)) == 3
    bad = good | dict(motion=[frame, frame | dict(scale=0.), frame]) if key == "scale" else good | (value if isinstance(value, dict) else {key: value})
    (tmp_path/"bad.pkl").write_bytes(pickle.dumps(bad))
    with pytest.raises(InputError, match="bad.pkl: .*" + ("frames a second" if key in ("output_fps", "words") else dict(number="c_lip_lst", ragged="c_lip_lst").get(key, key))): read_motion(tmp_path/"bad.pkl")


def flame_arrays(T=4):
    turns = .3*np.random.default_rng(0).normal(size=(6, T, 3))
    return dict(expr=np.zeros((T, 100)), rot=turns[0], tra=turns[1], neck_rot=turns[2], jaw_rot=turns[3], eye_rot=turns[4], fps=25.), turns


def test_flame_sequences_in_other_layouts():
    arrays, turns = flame_arrays()
    told = flame_motion(arrays).joints
    matrices = {k: Rotation.from_rotvec(arrays[k]).as_matrix() for k in ("rot", "neck_rot", "jaw_rot", "eye_rot")}
    np.testing.assert_allclose(flame_motion(arrays | matrices).joints, told, atol=1e-5)
    np.testing.assert_allclose(flame_motion(arrays | {k: arrays[k][:, None] for k in ("rot", "tra")}).joints, told, atol=1e-6)
    joints = flame_motion(arrays | dict(eye_rot=np.hstack(turns[4:]))).joints
    for eye in (0, 1): np.testing.assert_allclose(joints[:, 3 + eye], turns[4 + eye] - np.median(turns[4 + eye], 0), atol=1e-6)


BAD_FLAME = dict(rot=np.zeros((4, 4)), jaw_rot=np.zeros((4, 1)), tra=np.full((4, 3), "a"), fps=np.array([25., 30.]), expr=np.float64(1), eye_rot=np.zeros((5, 3)),
                 neck_rot=np.zeros((4, 3, 3)))


@pytest.mark.parametrize("key", BAD_FLAME)
def test_flame_sequences_of_other_shapes(tmp_path, key):
    np.savez(tmp_path/"a.npz", **flame_arrays()[0] | {key: BAD_FLAME[key]})
    with pytest.raises(InputError, match="frames a second" if key == "fps" else f"wants {key}|in {key}|'s {key}"): read_motion(tmp_path/"a.npz")


def test_damaged_and_uneven_files(tmp_path, monkeypatch):
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path))
    np.savez(tmp_path/"whole.npz", expr=np.zeros((5, 100)), rot=np.zeros((5, 3)), tra=np.zeros((5, 3)))
    assert len(read_motion(tmp_path/"whole.npz")) == 5
    data = (tmp_path/"whole.npz").read_bytes()
    (tmp_path/"cut.npz").write_bytes(data[:len(data)//2])
    (tmp_path/"empty.npz").write_bytes(b"")
    np.savez(tmp_path/"uneven.npz", expr=np.zeros((5, 100)), rot=np.zeros((3, 3)), tra=np.zeros((5, 3)))
    for name in ("cut", "empty", "uneven"):
        with pytest.raises(InputError): read_motion(tmp_path/f"{name}.npz")
    frame = dict(R=np.full((3, 3), np.nan), exp=np.zeros((21, 3)), t=np.zeros(3), scale=1.)
    with pytest.raises(InputError, match="no rotation"): liveportrait_motion({"motion": [frame]*3})


def test_liveportrait_file():
    path = FILES/"liveportrait_talking.pkl"
    if not path.exists(): pytest.skip("the shipped motions are not here")
    motion = read_motion(path)
    assert len(motion) == 100 and motion.fps == 20 and 5 < np.degrees(motion.joints[:, 2, 0].max()) < 25
    assert np.abs(motion.joints[0, 0]).max() < 1e-6


def test_flame_file(tmp_path, monkeypatch):
    path = FILES/"cap4d_flame_sequence_00.npz"
    if not path.exists(): pytest.skip("the shipped motions are not here")
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path))                # no FLAME here: pose alone
    motion = read_motion(path)
    assert len(motion) == 384 and motion.fps == 24 and motion.expression.max() == 0 and motion.basis == "open"
    assert .05 < np.abs(motion.joints[:, 3, 1]).max() < .5


def test_a_head_leaves_its_place_less_up_and_down_than_sideways():
    far = replace(Motion.still(3), translation=np.float32([[.5, 0, 0], [0, .5, 0], [0, .01, 0]]))
    moved = retarget(far, Portrait).translation - Portrait.motion.translation[0]
    np.testing.assert_allclose(moved[[0, 1], [0, 1]], (.05, .02), atol=1e-3)
    assert .008 < moved[2, 1] < .01
