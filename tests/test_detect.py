"""Networks against the originals' outputs, faces and points on the astronaut."""
from pathlib import Path

import numpy as np
import pytest
import torch

from ophav_nb.detect import (IRIS, LEFT_IRIS, RIGHT_IRIS, Detector, Face, cut, fill_lost, head_crop, load_networks, merge, overlap,
                             roi_of_landmarks, to_batch, uncut)
from ophav_nb.media import read_image
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
