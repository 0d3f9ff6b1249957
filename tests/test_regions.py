"Mattes and parsings behind one argument: the backends' own answers, streamed, in INSTA's codes; what is missing is said."
import golden_fill
import numpy as np
import pytest
import torch
from scipy import ndimage as ndi

from ophav_nb import regions
from ophav_nb.dataset import PARSING
from ophav_nb.detect import CODES as DRAWN
from ophav_nb.detect import Detector, parsing
from ophav_nb.media import read_image, resize, to_uint8
from ophav_nb.nets.bisenet import BiSeNet, parse_faces
from ophav_nb.nets.rvm import RobustVideoMatting
from ophav_nb.regions import CODE, CODES, clothes, make_matte, make_parser, parsed_heads, shrink_codes, without_clothes
from ophav_nb.run import InputError
from ophav_nb.weights import add_weight


@pytest.fixture(scope="module")
def detector(): return Detector()


@pytest.fixture(scope="module")
def film():
    frame = resize(read_image("astronaut")[:256, 96:352], 64)
    return np.stack([np.roll(frame, k, 1) for k in range(6)])


@pytest.fixture(scope="module")
def filled():
    "Both networks with drawn weights."
    return {name: golden_fill.fill(net(), *[golden_fill.manifest(known)["parts"][""][k] for k in ("rules", "gain")])
            for name, net, known in (("rvm", RobustVideoMatting, "rvm_mobilenetv3"), ("bisenet", BiSeNet, "bisenet_19"))}


@pytest.fixture
def home(filled, tmp_path, monkeypatch):
    "A cache into which the authors' files were added."
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path/"home"))
    for name, net in filled.items():
        torch.save(net.state_dict(), tmp_path/"a.pth")
        assert add_weight(tmp_path/"a.pth")[0] == name


def test_codes_are_the_datasets():
    assert CODE == PARSING and DRAWN.items() <= CODE.items()
    assert CODES.dtype == np.uint8 and CODES.tolist() == [PARSING[k] for k in CODE]


def test_default_matte_is_the_detectors(detector, film):
    matte = make_matte(detector=detector)
    alpha = matte(film)
    np.testing.assert_array_equal(alpha, detector.matte(film))
    np.testing.assert_allclose(matte(list(film[:2])), alpha[:2], atol=1e-5)      # a list, one frame: as the detector takes them
    np.testing.assert_allclose(matte(film[0])[0], alpha[0], atol=1e-5)
    stored = matte(film, out=np.zeros(film.shape[:3], np.uint8))
    np.testing.assert_array_equal(stored, to_uint8(alpha))


def test_matte_stands_in_for_the_detectors(home, film):
    "Set in a detector's place, it is asked as the detector was."
    detector = Detector()
    before = detector.matte(film[:1])
    detector.matte = make_matte("default", detector=detector)
    np.testing.assert_array_equal(detector.matte(film[:1]), before)
    detector.matte = make_matte("rvm")
    assert detector.matte(film[0]).shape == (1, 64, 64) and np.abs(detector.matte(film[:1]) - before).max() > .01


def test_video_matte_remembers(home, filled, film):
    "In pieces as in one, and as the network frame by frame; reset forgets; frames of another size are another film."
    matte = make_matte("rvm")
    whole = matte(film)
    assert whole.shape == film.shape[:3] and whole.dtype == np.float32 and 0 <= whole.min() <= whole.max() <= 1
    matte.reset()
    np.testing.assert_allclose(np.concatenate([matte(film[:1]), matte(film[1:4]), matte(film[4:])]), whole, atol=2e-6)
    states = [None]*4
    with torch.inference_mode():
        for frame, alpha in zip(film, whole):
            _, pha, *states = filled["rvm"](torch.from_numpy(frame).permute(2, 0, 1)[None]/255, *states)
            np.testing.assert_allclose(pha[0, 0], alpha, atol=2e-6)
    assert np.abs(matte(film[:1]) - whole[:1]).max() > 1e-5               # it still remembers the film's end
    matte.reset()
    np.testing.assert_allclose(matte(film[:1]), whole[:1], atol=2e-6)
    other = matte(film[:, :48])
    np.testing.assert_allclose(other, make_matte("rvm")(film[:, :48]), atol=2e-6)


def test_mixed_precision(home, film):
    "One switch; nearly the same, and the caller's precision is not touched."
    mixed = make_matte("rvm", half=True)
    each = mixed.each(film[:2])
    next(each)
    assert not torch.is_autocast_enabled("cpu")
    mixed.reset()
    assert 0 < np.abs(mixed(film) - make_matte("rvm")(film)).max() < .05
    same = make_parser("bisenet", size=64, half=True)(film) == make_parser("bisenet", size=64)(film)
    assert .9 < same.mean() <= 1


def test_face_parser(home, filled, film):
    parser = make_parser("bisenet", size=64)
    codes = parser(film)
    assert codes.shape == film.shape[:3] and codes.dtype == np.uint8
    classes = np.stack(list(parse_faces(filled["bisenet"], film, 64)))
    np.testing.assert_array_equal(codes, np.array([PARSING[k] for k in regions.bisenet.CLASSES])[classes])
    half = np.zeros(film.shape[:3], np.float32)
    half[:, :32] = 1
    cut = parser(film, half)
    assert not cut[:, 32:].any() and (cut[:, :32] == codes[:, :32]).all()
    large = parser(np.repeat(np.repeat(film[:1], 2, 1), 2, 2))
    assert large.shape == (1, 128, 128)


def test_default_parser(detector):
    frame = resize(read_image("astronaut")[:256, 96:352], 192)
    parser = make_parser(detector=detector)
    codes = parser(frame)[0]
    assert set(np.unique(codes)) <= set(CODE.values())
    points, alpha = detector.one(frame).landmarks, detector.matte(frame)
    np.testing.assert_array_equal(parser(frame, alpha, points[None])[0], parsing(points, alpha[0]))
    assert (codes == parsing(points, alpha[0])).mean() > .98


def test_missing_and_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("OPHAV_HOME", str(tmp_path))
    with pytest.raises(InputError, match="GPL-3.0.*ophav weights add"): make_matte("rvm")
    with pytest.raises(InputError, match="CelebAMask-HQ.*ophav weights add"): make_parser("bisenet")
    with pytest.raises(InputError, match="default, rvm"): make_matte("modnet")
    with pytest.raises(InputError, match="default, bisenet"): make_parser("sam")
    with pytest.raises(InputError, match="uint8"): make_matte()(np.zeros((2, 8, 8, 3), np.float32))


def test_clothes_as_insta():
    "A 5x5 median of yes and no, three steps of dilation; specks go."
    codes = np.random.default_rng(0).choice(np.array([0, 90, 250], np.uint8), (2, 40, 40), p=[.2, .55, .25])
    codes[:, :12] = 250
    codes[0, 5, 5] = 90
    worn = np.stack([ndi.binary_dilation(ndi.median_filter((c == 90).astype(np.uint8), 5, mode="nearest"), iterations=3) for c in codes])
    np.testing.assert_array_equal(clothes(codes), worn)
    assert not worn[0, 5, 5]
    alpha = np.random.default_rng(1).integers(0, 256, (2, 40, 40), np.uint8)
    out = without_clothes(alpha, codes)
    smooth = np.stack([ndi.median_filter(a, 5, mode="nearest") for a in alpha])
    np.testing.assert_array_equal(out, np.where(worn, 0, np.where(smooth > 127.5, 255, smooth)))
    np.testing.assert_array_equal(without_clothes(alpha[0], codes[0], solid=False), np.where(worn[0], 0, alpha[0]))


def test_shrink_codes():
    codes = np.arange(16, dtype=np.uint8).reshape(4, 4)
    np.testing.assert_array_equal(shrink_codes(codes, 2), [[5, 7], [13, 15]])
    np.testing.assert_array_equal(shrink_codes(codes, 4), codes)
    assert set(np.unique(shrink_codes(codes, 7))) == set(range(16))


def test_heads_are_parsed_in_chunks(home, film):
    heads = [np.dstack([f[::2, ::2], np.full((32, 32), 255, np.uint8)]) for f in film]
    seen = []

    class Counted(type(make_parser("bisenet"))):
        def __call__(self, frames, *args):
            seen.append(len(frames))
            return super().__call__(frames, *args)

    plain = make_parser("bisenet", size=64)
    out = list(parsed_heads(iter(heads), Counted(plain.net, 64), iter(film), chunk=4))
    assert seen == [4, 2] and len(out) == 6
    for (rgba, codes), head, full in zip(out, heads, plain(film)):
        small = shrink_codes(full, 32)
        np.testing.assert_array_equal(rgba[..., 3], without_clothes(head[..., 3], small, solid=False))
        np.testing.assert_array_equal(codes, np.where(rgba[..., 3] > 127, small, 0))
        assert not rgba[rgba[..., 3] == 0].any()
    assert len(list(parsed_heads(heads[:1], plain))) == 1      # without the frames: on grey
