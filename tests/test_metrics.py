"""Each measure against its definition, and a row of the table on the astronaut."""
import json
from pathlib import Path

import ophav_nb  # noqa: F401  (before torch: it sets how threads wait)
import golden_fill
import numpy as np
import pytest
import torch

from ophav_nb import metrics as m
from ophav_nb.detect import LEFT_IRIS, RIGHT_IRIS, Detector, head_crop
from ophav_nb.media import read_image, read_video, resize
from ophav_nb.weights import add_weight

CLIPS = Path(__file__).parents[2]/"shared"/"data"/"clips"


@pytest.fixture(scope="module")
def detector():
    return Detector()


@pytest.fixture(scope="module")
def head(detector):
    picture = read_image("astronaut")
    crop = head_crop(detector.one(picture).landmarks, 160)
    image = crop.apply(picture)
    return image, crop.apply(detector.matte(picture)[0]), detector.one(image).landmarks


def test_psnr_is_what_it_says():
    a = np.zeros((8, 8, 3), np.float32)
    assert m.psnr(a + .1, a) == pytest.approx(20, abs=1e-3)
    assert m.psnr(a, a) == 60
    mask = np.zeros((8, 8), bool)
    assert np.isnan(m.psnr(a, a, mask))
    mask[0] = True
    b = a.copy()
    b[1:] = 1
    assert m.psnr(b, a, mask) == 60


def test_ssim_agrees_with_scikit_image(head):
    from skimage.metrics import structural_similarity
    image = head[0]
    noisy = np.clip(image + np.random.default_rng(0).normal(0, 12, image.shape), 0, 255).astype(np.uint8)
    theirs = structural_similarity(image, noisy, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
                                   data_range=255, full=True)[1].mean(-1)
    np.testing.assert_allclose(m.ssim_map(noisy, image)[6:-6, 6:-6], theirs[6:-6, 6:-6], atol=2e-3)
    mask = np.zeros(image.shape[:2], bool)
    mask[40:90, 50:120] = True
    assert m.ssim(noisy, image, mask) == pytest.approx(theirs[mask].mean(), abs=1e-3)


def test_masks_grow_and_shrink_by_pixels():
    alpha = np.zeros((60, 60), np.float32)
    alpha[20:40, 20:] = 1                                    # touches the right frame
    head, interior = m.head_mask(alpha), m.interior_mask(alpha)
    assert np.flatnonzero(head[30])[[0, -1]].tolist() == [17, 59]
    assert np.flatnonzero(interior[30])[[0, -1]].tolist() == [25, 59]       # the frame is no border of the head
    assert not m.head_mask(np.zeros((5, 5))).any()


def test_distances_are_told_in_inter_ocular_distances(head):
    points = head[2]
    unit = float(m.inter_ocular(points))
    assert unit == pytest.approx(np.linalg.norm(points[LEFT_IRIS[0], :2] - points[RIGHT_IRIS[0], :2]))
    assert m.landmark_distance(points + [.03*unit, .04*unit, 9], points) == pytest.approx(5, abs=1e-3)
    assert m.lid_gap(2*points) == pytest.approx(m.lid_gap(points), rel=1e-5)
    assert 5 < m.lid_gap(points) < 20 and m.mouth_gap(points) > 5           # she smiles with open eyes


def test_a_few_broken_frames_are_seen():
    assert m.worst_over_median(np.array([2., 2., np.nan, 2., 10.])) == 5 and np.isnan(m.worst_over_median(np.array([np.nan])))


def test_what_is_no_number_is_null():
    assert json.loads(m.measures_json(dict(a=np.float32("nan"), b=[1, np.int64(2), None, float("inf")], c="x", d=True))) == dict(a=None, b=[1, 2, None, None], c="x", d=True)


def test_measures_of_a_frame_without_a_head_are_there():
    picture, none = np.zeros((16, 16, 3), np.uint8), dict.fromkeys(m.Truth.REGIONS, np.zeros((16, 16), bool))
    some = dict.fromkeys(m.Truth.REGIONS, np.ones((16, 16), bool))
    empty, full = (m.Truth.score_pixels(m.Truth, picture, picture, masks) for masks in (none, some))
    assert set(empty) == set(full) and np.isnan(empty["ssim_head"]) and full["ssim_head"] == pytest.approx(1)


def test_correlation_of_what_stands_still():
    t = np.linspace(0, 9, 50)
    assert m.correlation(np.sin(t) + 3, 2*np.sin(t)) == pytest.approx(1)
    assert m.correlation(0*t, np.sin(t)) == 0
    assert np.isnan(m.correlation(np.sin(t), 0*t))
    assert m.correlation(np.where(t < 1, np.nan, np.sin(t)), np.sin(t)) == pytest.approx(1)


def test_sharpness_falls_with_blur(head):
    image, _, points = head
    mask = m.sharpness_mask(points, *image.shape[:2])
    assert m.sharpness(resize(resize(image, 80), 160), mask) < .6*m.sharpness(image, mask)


def test_flicker_is_zero_in_steady_motion():
    mask = np.ones((5, 4, 4), bool)
    ramp = np.arange(5)[:, None, None, None]*np.ones((5, 4, 4, 3))*.1
    assert m.flicker(ramp, mask) == pytest.approx(0, abs=1e-6)
    blink = np.arange(5)[:, None, None, None] % 2*np.ones((5, 4, 4, 3))
    assert m.flicker(blink, mask) == pytest.approx(2)


def test_face_chips_put_eyes_where_dlib_wants_them(head):
    image, _, points = head
    roi = m.chip_roi(points[None])[0]
    c, s = np.cos(roi[3]), np.sin(roi[3])
    at = (points[m.FIVE_POINTS, :2] - roi[:2]) @ np.array([[c, -s], [s, c]])/roi[2] + .5
    np.testing.assert_allclose(at, (m.FIVE_PLACES + .25)/1.5, atol=.03)
    assert m.face_chips([image], [points]).shape == (1, 150, 150, 3)


def test_identity_tells_people_apart(detector, head):
    pytest.importorskip("dlib")
    image, _, points = head
    same = np.ascontiguousarray(image[:, ::-1])
    from skimage.data import camera
    other = np.stack([camera()]*3, -1)[60:260, 130:330]
    images = [image, same, resize(resize(image, 70), 160), other]
    places = [points, detector.one(same).landmarks, points, detector.landmarks(other, np.float32([[100, 100, 130, 0]]))[0][0]]
    vectors = m.identity_embedding(images, places)
    far = m.identity_distance(vectors[0], vectors)
    assert far[0] == 0 and far[1] < .45 and far[2] < .45 and far[3] > .6


def test_a_row_of_the_table(detector, head):
    image, alpha, points = head
    truth = m.Truth([image]*3, [alpha]*3, detector, np.stack([points]*3), identities=1)
    perfect = truth.score([np.dstack([image, (255*alpha + .5).astype(np.uint8)])]*3)
    assert perfect["psnr_head"] == 60 and perfect["landmark_distance"] == 0 and perfect["identity_distance"] < 1e-5
    assert perfect["flicker"] is None and perfect["lost"] == 0
    worse = truth.score([np.roll(truth.white(0), 3, 1)]*3)
    assert worse["psnr_head"] < 30 and 3 < worse["landmark_distance"] < 12 and worse["identity_distance"] < .3
    known = np.ones((3, *alpha.shape), bool)
    known[..., :alpha.shape[1]//2] = False
    half, broken = m.Truth([image]*3, [alpha]*3, detector, np.stack([points]*3), identities=1, known=known), truth.white(0).copy()
    broken[:, :alpha.shape[1]//2] = 0
    assert half.score([broken]*3)["psnr_head"] == 60 > truth.score([broken]*3)["psnr_head"]
    assert set(m.missing_metrics()) == {"csim", "csim100", "lpips", "fid", "aed", "apd", "akd"}


def test_frechet_distance():
    "By its definition: with more samples than numbers scipy's root of the product says the same."
    from scipy.linalg import sqrtm
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(30, 5)) @ rng.normal(size=(5, 5)) + .5
    A, B = np.cov(a.T), np.cov(b.T)
    exact = ((a.mean(0) - b.mean(0))**2).sum() + np.trace(A + B - 2*sqrtm(A @ B).real)
    assert m.frechet_distance(a, b) == pytest.approx(exact, rel=1e-9) and m.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    few = rng.normal(size=(4, 300))
    assert m.frechet_distance(few, few + 1) == pytest.approx(300)


def drawn_file(name: str, path: Path) -> Path:
    "Drawn weights with a manifest's names and shapes, as their authors keep them."
    known = golden_fill.manifest(name)["parts"][""]
    shapes = known["state_dict"]
    tensor = lambda k, shape, kind: golden_fill.filled(k, shape, known["rules"], known["gain"], shapes) if kind == "float32" else torch.zeros(shape, dtype=torch.int64)
    torch.save({k: tensor(k, *entry) for k, entry in shapes.items() if not k.startswith("classifier.")}, path)   # what LPIPS does not read is left out
    return path


@pytest.fixture
def offline(tmp_path, monkeypatch):
    "An empty cache, and no way out."
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path/"home"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path/"torch"))
    def refuse(*_, **__): raise AssertionError("something wants to fetch")
    for name in ("connect", "connect_ex"): monkeypatch.setattr("socket.socket." + name, refuse)
    m.measuring_network.cache_clear()
    yield tmp_path
    m.measuring_network.cache_clear()
    assert not (tmp_path/"torch").exists()


def shots(n=3, size=64, seed=0): return (golden_fill.drawn_picture(f"shots{seed}", (n, 3, size, size))*255).byte().permute(0, 2, 3, 1).numpy()


def test_what_is_missing_is_said_with_its_command(offline, monkeypatch):
    said = m.missing_metrics()
    assert "ophav weights get lpips" in said["lpips"] and "epoch_20.pth" in said["aed"] and "ophav weights add FILE" in said["csim"]
    add_weight(drawn_file("alexnet_torchvision", offline/"alexnet-owt-7be5be79.pth"))
    monkeypatch.setattr(m.importlib.util, "find_spec", lambda name: None)
    said = m.missing_metrics()
    assert "weights" not in said["lpips"] and "pip install 'ophav-nb[pretrained]'" in said["lpips"] and "lpips" not in m.present_networks()
    assert "ophav weights get fid" in said["fid"] and "the package torch_fidelity" in said["fid"]


def test_lpips_from_a_local_file(offline):
    "Nothing is fetched; equal pictures are 0 apart; the trunk is the file's, the layers on top the package's."
    lpips = pytest.importorskip("lpips")
    add_weight(drawn_file("alexnet_torchvision", offline/"alexnet-owt-7be5be79.pth"))
    assert "lpips" in m.present_networks() and "lpips" not in m.missing_metrics()
    a, b, points = shots(), shots(seed=1), np.zeros((3, 478, 3))
    same, other = (m.network_metrics(a, points, truth, points) for truth in (a, b))
    assert same == {"lpips": 0} and .01 < other["lpips"] < 3
    assert m.network_metrics(a[:, :50, :50], points, b[:, :50, :50], points) == {}       # smaller than what AlexNet can see
    net = m.load_lpips()
    one = m.lpips_distance(net, a, b, batch=1)
    np.testing.assert_allclose(one, m.lpips_distance(net, a, b), rtol=1e-4)
    assert one.mean() == pytest.approx(other["lpips"], rel=1e-4)
    torch.testing.assert_close(net.net.slice3[1].weight.detach(), golden_fill.filled("features.6.weight", (384, 192, 3, 3), (), 1.4))
    ours = torch.load(Path(lpips.__file__).parent/"weights"/"v0.1"/"alex.pth", map_location="cpu", weights_only=True)
    torch.testing.assert_close(net.lin2.model[1].weight.detach(), ours["lin2.model.1.weight"])


@pytest.mark.slow
def test_fid_from_a_local_file(offline):
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    name, _ = add_weight(drawn_file("inception_fid", offline/"weights-inception-2015-12-05-6726825d.pth"))
    assert name == "fid" and m.present_networks() == ["fid"]
    a, b, points = shots(4), shots(4, seed=1), np.zeros((4, 478, 3))
    same, other = (m.network_metrics(a, points, truth, points) for truth in (a, b))
    assert same["fid"] == pytest.approx(0, abs=1e-6) and other["fid"] > 1e-3 and m.network_metrics(a[:1], points, b[:1], points) == {}
    net = m.measuring_network("fid", m.find_weight("fid"))
    x, y = (m.inception_features(net, f, batch=3)[:, :64] for f in (a, b))               # the package's own root takes long for 2048
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(torch.from_numpy(f)) for f in (x, y)), False)
    assert m.frechet_distance(x, y) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3, abs=1e-5)


@pytest.mark.clips
@pytest.mark.skipif(not CLIPS.is_dir(), reason="the development clips are not there")
def test_identity_separates_the_development_clips(detector):
    people = []
    for path in sorted(CLIPS.glob("*.mp4")):
        frames = read_video(path)[0]
        frames = frames[np.linspace(0, len(frames) - 1, 4).astype(int)]
        people.append(m.identity_embedding(list(frames), detector.film(frames)[0]))
    far = np.linalg.norm(np.stack(people)[:, None, :, None] - np.stack(people)[None, :, None], axis=-1)
    same = np.eye(len(people), dtype=bool)
    assert far[same].max() < .5 < far[~same].min() and np.median(far[~same]) > .75
