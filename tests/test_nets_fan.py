"FAN-4: heat maps, points and crops equal to the public implementation; fails when broken; loads the authors' file."
import golden_fill
import numpy as np
import pytest
import torch

from ophav_nb.nets.fan import FAN, MIRRORED, both_ways, cut, find_landmarks, frame_of, landmarks, load_fan, peaks, resize_bytes, to_image
from ophav_nb.run import InputError
from ophav_nb.weights import add_weight

NAME = "fan4_2d"


@pytest.fixture(scope="module")
def net(): return golden_fill.fill_golden(FAN(), NAME)


@torch.inference_mode()
def outputs(net):
    x = golden_fill.drawn_picture("fan", (1, 3, 256, 256))
    points, score = peaks(golden_fill.drawn_picture("fan.heatmaps", (2, 68, 64, 64))[:1])
    in_image = torch.from_numpy(to_image(points.cpu().numpy(), (300.25, 280.5), 1.7, 64)).float()
    photo = golden_fill.drawn_picture("fan.photo", (1, 3, 400, 420), 0, 255)[0].permute(1, 2, 0).cpu().numpy().astype(np.uint8)
    return {f"heatmaps.{i}": t for i, t in enumerate(net(x))} | {
        "heatmap_last_plus_flip": both_ways(net, x), "preds_64": points, "preds_image": in_image, "preds_score": score,
        "crop": torch.from_numpy(cut(photo, (205.3, 190.6), 1.35)).float()}


def test_golden(net): golden_fill.golden_on_threads(NAME, lambda: outputs(net))


def test_a_broken_layer_fails(net):
    before = net.m2.b2_plus_1.conv3.forward
    net.m2.b2_plus_1.conv3.forward = lambda x: before(x)*1.001
    try: shares = golden_fill.beyond(NAME, outputs(net))
    finally: del net.m2.b2_plus_1.conv3.forward
    assert shares["heatmaps.2"] > 1 and shares["heatmaps.1"] <= 1


def test_other_sizes_and_batches(net):
    x = torch.rand(2, 3, 128, 192, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(): together, alone = net(x), [net(i[None]) for i in x]
    for i, t in enumerate(together):
        assert t.shape == (2, 68, 32, 48)
        torch.testing.assert_close(t, torch.cat([a[i] for a in alone]), rtol=1e-3, atol=1e-3)


def test_mirror():
    assert sorted(MIRRORED) == list(range(68)) and [MIRRORED[i] for i in MIRRORED] == list(range(68))
    assert [i for i in range(68) if MIRRORED[i] == i] == [8, 27, 28, 29, 30, 33, 51, 57, 62, 66]


@pytest.mark.parametrize("old", [100, 211, 256, 270, 512, 600, 1])
def test_resizing_like_opencv(old):
    "Equal to the last bit where OpenCV is here; close to plain interpolation everywhere."
    image = np.random.default_rng(old).integers(0, 256, (old, old, 3), np.uint8)
    found = resize_bytes(image, 256)
    plain = torch.nn.functional.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None].double(), (256, 256), mode="bilinear")[0].permute(1, 2, 0)
    assert (torch.from_numpy(found).double() - plain).abs().max() <= 1
    try: import cv2
    except ImportError: return
    assert np.array_equal(found, cv2.resize(image, (256, 256), interpolation=cv2.INTER_LINEAR))


def test_crops_beyond_the_picture():
    image = np.full((50, 60, 3), 255, np.uint8)
    assert cut(image, (-500, 20), 1.).max() == 0 and cut(image, (30, 25), .1).min() == 255
    assert cut(image, (0, 25), 1.)[:, :120].max() == 0 and cut(image, (30, 25), 1e-6).shape == (256, 256, 3)


def test_landmarks():
    net = FAN(stacks=1).eval()
    images = np.random.default_rng(0).integers(0, 256, (3, 120, 100, 3), np.uint8)
    boxes = np.array([[10., 10, 80, 90], [0, 0, 50, 50], [40, 40, 99, 119]])
    points, heat = landmarks(net, images, boxes, batch=2)
    assert points.shape == (3, 68, 2) and points.dtype == np.float32 and heat.shape == (3, 68) and (points == points.round()).all()
    centre, scale = frame_of(boxes[0])
    assert (np.abs(points[0] - centre) <= 100*scale + 1).all()
    assert landmarks(net, images[:1], boxes[:1], mirror=True, half=True)[1].dtype == np.float32
    assert landmarks(net, images[:0], boxes[:0])[0].shape == (0, 68, 2)


def test_finding(monkeypatch):
    net = FAN(stacks=1).eval()
    from ophav_nb.nets import fan
    faces = iter([np.array([[10., 10, 80, 90, .9], [0, 0, 5, 5, .8]], np.float32), np.zeros((0, 5), np.float32)])
    monkeypatch.setattr(fan, "find_faces", lambda detector, image: next(faces))
    points = find_landmarks(net, None, np.zeros((2, 100, 100, 3), np.uint8))
    assert np.isfinite(points[0]).all() and np.isnan(points[1]).all()


def test_the_authors_file(net, tmp_path, monkeypatch):
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path))
    with pytest.raises(InputError, match="2DFAN4-11f355bf06.pth.tar"): load_fan()
    torch.save({k: v for k, v in net.state_dict().items() if not k.endswith("tracked")}, tmp_path/"2DFAN4.pth.tar", _use_new_zipfile_serialization=False)
    assert add_weight(tmp_path/"2DFAN4.pth.tar")[0] == "fan"
    assert all(torch.equal(a, b) for a, b in zip(load_fan().state_dict().values(), net.state_dict().values()))


@pytest.mark.parametrize("seed", [1, 2])
def test_beside_face_alignment(seed):
    "The same network as face_alignment's, with other weights; the same crops and points for other faces."
    theirs = pytest.importorskip("face_alignment.models.fan").FAN(2).eval()
    from face_alignment.utils import crop, flip, get_preds_fromhm
    ours = golden_fill.fill_otherwise(FAN(2), NAME, seed=seed)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = golden_fill.drawn_picture(f"fan {seed}", (2, 3, 128, 128))
    with torch.inference_mode():
        for a, b in zip(ours(x), theirs(x)): torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-5)
        torch.testing.assert_close(both_ways(ours, x), theirs(x)[-1] + flip(theirs(flip(x))[-1], is_label=True), rtol=1e-4, atol=1e-4)
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (170, 150, 3), np.uint8)
    for _ in range(8):
        centre, scale = rng.uniform(-20, 180, 2), rng.uniform(.3, 2.5)
        maps = torch.rand(1, 68, 64, 64, generator=torch.Generator().manual_seed(seed))
        points, heat = peaks(maps)
        known, in_image, score = get_preds_fromhm(maps.numpy(), centre, scale)
        assert np.array_equal(points, known) and np.array_equal(heat, score)
        assert np.array_equal(to_image(points.cpu().numpy(), centre, scale, 64), in_image)
        assert np.array_equal(cut(image, centre, scale), crop(image, torch.tensor(centre), scale))
