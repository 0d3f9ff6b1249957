"""Networks against the originals' outputs, faces and points on the astronaut."""
import re
from dataclasses import replace
from pathlib import Path

import ophav_nb  # noqa: F401  (before torch: it sets how threads wait)
import numpy as np
import pytest
import torch

from ophav_nb.detect import (INNER_LIPS, IRIS, LEFT_IRIS, LID_PAIRS, RIGHT_IRIS, Detector, _box, _solve_symmetric, blink, cut, doubts, eye_opening, fill_lost, foreground,
                             guided_filter, head_crop, merge, overlap, parsing, roi_of_landmarks, to_batch, uncut)
from ophav_nb.media import read_image, resize
from ophav_nb.nets.mediapipe import load_networks
from ophav_nb.run import InputError

# What MediaPipe 0.10.21's own calculator graph (its inference calculator with its custom operations) gives for the pieces of the
# astronaut named in PIECES: the boxes only for the 64 best anchors, the matte at every fourth pixel.
GOLDEN = Path(__file__).parent/"golden"/"detector.npz"
PIECES = {"mesh": (slice(20, 212), slice(130, 322)), "full": (slice(20, 212), slice(130, 322)),
          "short": (slice(None, None, 4),)*2, "matte": (slice(None, None, 2),)*2}


@pytest.fixture(scope="module")
def image():
    return read_image("astronaut")


@pytest.fixture(scope="module")
def detector():
    return Detector()


@pytest.fixture(scope="module")
def face(detector, image):
    return detector.one(image)


@pytest.mark.parametrize("name", PIECES)
def test_network_gives_what_the_original_gives(name, image):
    golden, piece = np.load(GOLDEN), to_batch(image[PIECES[name]])
    with torch.inference_mode():
        out = [v[0].numpy() for v in load_networks()[name](piece*2 - 1 if name in ("short", "full") else piece)]
    if name in ("short", "full"): out = [out[0][golden[f"{name}_top"]], out[1][:, 0]]
    if name == "matte": out = [out[0][0, ::4, ::4]]
    for i, value in enumerate(out):
        np.testing.assert_allclose(value.ravel(), golden[f"{name}_{i}"].ravel(), atol=2e-4)


def test_batch_gives_what_single_frames_give(detector, image, face):
    rois = roi_of_landmarks(np.stack([face.landmarks]*3)) + np.float32([[0, 0, 0, 0], [3, 0, 5, .1], [0, 4, 9, -.2]])
    together, _ = detector.landmarks(np.stack([image]*3), rois)
    alone = np.concatenate([detector.landmarks(image, r[None])[0] for r in rois])
    np.testing.assert_allclose(together, alone, atol=1e-2)
    assert np.abs(together[:, :, :2] - face.landmarks[:, :2]).mean() < 1.5


def test_landmarks_lie_where_the_face_is(face):
    left, right = face.landmarks[LEFT_IRIS].mean(0), face.landmarks[RIGHT_IRIS].mean(0)
    assert 38 < right[0] - left[0] < 50                      # read off the picture: 43.5 px
    assert face.presence > .9 and len(face.landmarks) == 478 and face.landmarks[IRIS].std() > 0


def test_cut_and_uncut_are_inverse():
    y, x = np.mgrid[:90, :120]
    picture = torch.tensor(np.stack([x + .5, y + .5, 0*x]), dtype=torch.float32)[None]
    rois = np.float32([[60, 45, 40, .3]])
    square = cut(picture, torch.tensor(rois), 32)[0].numpy()
    u = (np.array([[5, 9]]) + .5)/32
    np.testing.assert_allclose(uncut(u[None].astype(np.float32), rois)[0, 0], square[:2, 9, 5], atol=1e-3)


def test_merge_averages_overlapping_boxes():
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 60, 60]], float)
    found = merge(boxes, np.zeros((3, 6, 2)), np.array([.9, .9, .8]))
    assert len(found) == 2
    np.testing.assert_allclose(found[0].box, [.5, 0, 10.5, 10])
    np.testing.assert_allclose(overlap(boxes[0], boxes), [1, .9, 0])


def test_lost_frames_are_filled_in():
    values = np.array([9, 1, 9, 3, 9], np.float32)[:, None]
    np.testing.assert_allclose(fill_lost(values, np.array([0, 1, 0, 1, 0], bool))[:, 0], [1, 1, 2, 3, 3])


def test_no_face_and_several_faces_say_what_to_do(detector, image):
    with pytest.raises(InputError, match="no face"):
        detector.one(np.full((300, 300, 3), 127, np.uint8))
    two = np.concatenate([image[:, :400], image[:, :400]], 1)
    with pytest.raises(InputError, match="2 faces.*--face"):
        detector.one(two)
    assert detector.one(two, face=2).box[0] > 400
    with pytest.raises(InputError, match="no face 3"):
        detector.one(two, face=3)


def test_a_cat_is_refused(detector):
    from skimage.data import chelsea
    with pytest.raises(InputError, match="human"):
        detector.one(chelsea())


def test_a_small_face_in_a_large_picture_is_found(detector, image):
    large = np.full((1000, 1500, 3), 150, np.uint8)
    large[600:856, 1200:1456] = resize(image, 256)
    face = detector.one(large)
    np.testing.assert_allclose(face.landmarks[:, :2], detector.one(image).landmarks[:, :2]/2 + [1200, 600], atol=3)


def test_a_face_that_fills_the_picture_is_found(detector, image, face):
    points = detector.one(image[85:170, 180:272]).landmarks
    np.testing.assert_allclose(points[:, :2] + [180, 85], face.landmarks[:, :2], atol=4)


@pytest.mark.parametrize("size, fine", [(200, True), (150, False)])
def test_small_portraits(detector, image, size, fine):
    if fine: assert detector.one(resize(image, size)).presence > .9
    else:
        with pytest.raises(InputError, match="only .. px wide"):
            detector.one(resize(image, size))


def test_doubtful_portraits_are_named(detector, image, caplog):
    for picture, said in ((image, None), (image[70:, 200:], "upper and left|left and upper"), (image[:150], "lower"), (image//8, "very dark")):
        caplog.clear()
        with caplog.at_level("WARNING", "ophav_nb"): detector.one(np.ascontiguousarray(picture))
        assert re.search(said, caplog.text) if said else not caplog.text, caplog.text
    with pytest.raises(InputError, match="very dark"): detector.one(image//25)
    face = detector.one(image)
    shut = face.landmarks.copy()
    for upper, lower in LID_PAIRS: shut[upper] = shut[lower] + .1*(shut[upper] - shut[lower])
    assert "eyes are shut" in doubts(image, replace(face, landmarks=shut))[0] and not doubts(image, face)


def test_a_picture_of_one_line(detector):
    with pytest.raises(InputError, match="no face"): detector.one(np.zeros((1, 4096, 3), np.uint8) + 128)


def test_turned_pictures_are_named(detector, image):
    with pytest.raises(InputError, match="on its side"):
        detector.one(np.ascontiguousarray(np.rot90(image)))
    with pytest.raises(InputError, match="on its head"):
        detector.one(np.ascontiguousarray(np.rot90(image, 2)))


def test_a_film_of_two_says_whom_it_follows(detector, image, caplog):
    one = np.ascontiguousarray(image[:280, 90:370])
    both = np.concatenate([resize(one, 200), np.full((80, 200, 3), 255, np.uint8)]), one
    points, ok = detector.film(np.stack([np.concatenate(both, 1)]*2))
    assert ok.all() and points[0, :, 0].mean() > 200 and "shows 2 faces: the widest is followed" in caplog.text
    caplog.clear()
    detector.film(one[None])
    assert "faces" not in caplog.text


def test_film_marks_lost_frames_and_goes_on(detector, image, caplog):
    shifts = [(3*t, -2*t) for t in range(11)]
    film = [np.roll(image, (dy, dx), (0, 1)) for dx, dy in shifts]
    film[4] = np.zeros_like(image)
    with caplog.at_level("WARNING", "ophav_nb"): points, ok = detector.film(film)
    assert np.flatnonzero(~ok).tolist() == [4] and "1 of the film's" in caplog.text
    still = points[:, :468, :2] - np.array(shifts)[:, None]
    assert np.abs(still - still[0]).mean() < .6
    with pytest.raises(InputError, match="film"):
        detector.film([np.zeros_like(image)]*3)


def test_matte_covers_the_head(detector, image, face):
    matte = detector.matte(image)[0]
    assert matte.shape == image.shape[:2] and matte[0, 0] < .05
    y, x = face.landmarks[:, 1].astype(int), face.landmarks[:, 0].astype(int)
    assert np.percentile(matte[y, x], 5) > .9
    assert foreground(image, matte).shape == image.shape


def test_windows_are_means():
    x = torch.rand(2, 3, 40, 53)
    for r in (1, 2, 3, 6, 13):
        right = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(x, (r,)*4, mode="reflect"), 2*r + 1, 1)
        torch.testing.assert_close(_box(x, r), right, atol=3e-6, rtol=0)


def test_matte_follows_its_guide():
    a = torch.rand(4, 3, 3, 5, 6)
    m = torch.einsum("nikhw,njkhw->nijhw", a, a) + .1*torch.eye(3)[None, :, :, None, None]
    v, (i, j) = torch.rand(4, 3, 5, 6), torch.triu_indices(3, 3)
    right = torch.linalg.solve(m.permute(0, 3, 4, 1, 2), v.permute(0, 2, 3, 1)[..., None])[..., 0].permute(0, 3, 1, 2)
    torch.testing.assert_close(_solve_symmetric(m[:, i, j], v), right, atol=1e-4, rtol=1e-3)
    guide = torch.rand(2, 3, 64, 64)
    matte = (guide*torch.tensor([.5, .3, .1])[:, None, None]).sum(1, keepdim=True) + .05      # a linear function of the colours passes
    torch.testing.assert_close(guided_filter(guide, matte), matte, atol=.01, rtol=0)
    torch.testing.assert_close(guided_filter(guide[:1], matte[:1]), guided_filter(guide, matte)[:1], atol=1e-6, rtol=0)


def test_crop_blink_and_parsing(image, face):
    crop = head_crop(face.landmarks, 200)
    assert (crop.points(face.landmarks[:, :2]) > 0).all() and (crop.points(face.landmarks[:, :2]) < 200).all()
    film = np.stack([face.landmarks, face.landmarks + 40])
    assert head_crop(film, 200).side > crop.side
    assert blink(face.landmarks).max() < .1 and eye_opening(face.landmarks).shape == (2,)
    shut = face.landmarks.copy()
    shut[:, 1] = 0
    assert blink(shut).min() > .9
    label = parsing(face.landmarks, np.ones(image.shape[:2], np.float32))
    x, y = face.landmarks[INNER_LIPS, :2].mean(0).astype(int)
    assert label[y, x] == 140 and label[0, 0] == 80


@pytest.mark.parametrize("name", ["s3fd", "retinaface"])
def test_others_detectors(name, image, face, tmp_path, monkeypatch):
    "Boxes (and points) of another network lead to the same landmarks, in pictures and films; large pictures are shown to it smaller."
    from ophav_nb.nets import retinaface, s3fd
    module, seen = dict(s3fd=s3fd, retinaface=retinaface)[name], []
    eyes, nose, mouth = face.keypoints[:2], face.keypoints[2], face.keypoints[3]
    five = np.concatenate([eyes, [nose, mouth - [10, 0], mouth + [10, 0]]]).ravel() if name == "retinaface" else []
    def found(net, picture):
        seen.append(picture.shape[:2])
        scale = picture.shape[1]/512
        return np.float32([[*(np.r_[face.box - [0, 25, 0, 0]]*scale), .99, *(np.array(five)*scale)]])       # reaches higher than ours
    monkeypatch.setattr(module, f"load_{name}", lambda device: None)
    monkeypatch.setattr(module, "find_faces", found)
    detector = Detector(finder=name)
    monkeypatch.setattr(detector, "boxes", lambda images, rois, net="short", least=.5: [[face]]*len(rois))     # the second look of `is_human`
    one = detector.one(image)
    assert np.abs(one.landmarks - face.landmarks)[:, :2].mean() < .5
    large = detector.faces(resize(image, 1536))[0]
    assert seen[-1] == (1024, 1024) and np.abs(large.box/3 - one.box).max() < .1
    points, ok = detector.film(np.stack([image]*3))
    assert ok.all() and np.abs(points[0] - face.landmarks)[:, :2].mean() < 1
    monkeypatch.setattr(module, "find_faces", lambda net, picture: np.zeros((0, 15 if name == "retinaface" else 5), np.float32))
    with pytest.raises(InputError, match="no face"): Detector(finder=name).one(image)
    with pytest.raises(InputError, match="no face"): Detector(finder=name).film(np.stack([image]*2))


def test_a_detector_that_is_not_here(tmp_path, monkeypatch):
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path))
    for name in ("s3fd", "retinaface"):
        with pytest.raises(InputError, match="ophav weights get " + name): Detector(finder=name)
    with pytest.raises(InputError, match="unknown detector"): Detector(finder="other")


@pytest.mark.parametrize("face", [-1, 0, 2])
def test_a_film_has_no_face_of_that_number(detector, image, face):
    with pytest.raises(InputError, match=f"no face {face}: the picture has 1"): detector.film(image[None, :400], face=face)
