"Tests of the photometric fit: a painted head whose motion is known; its derivative; films that tell nothing."
from dataclasses import replace

import numpy as np
import pytest
import torch

from ophav_nb.geometry import facing_camera, interpolate, rasterize
from ophav_nb.head import HeadModel, Motion
from ophav_nb.photometric import _Skin, detail, photometric_refit, skin_points
from ophav_nb.track import Track, refit

SIZE, COUNT = 160, 8


@pytest.fixture(scope="module")
def head(): return HeadModel.load()


@pytest.fixture(scope="module")
def painted(head):
    "Truth, and its film: a head with spots that blinks, smiles and lifts its brows."
    rng, t = np.random.default_rng(0), np.linspace(0, 1, COUNT)
    motion = Motion.still(COUNT, head.n_expression, basis=head.name)
    for k, name in enumerate(("browInnerUp", "mouthSmile", "cheekPuff")):
        motion.expression[:] += np.outer(.6*np.sin(np.pi*t*(1 + k/2))**2, head.expression(**{name: 1.}).numpy()).astype(np.float32)
    motion.joints[:, 2, 0], motion.joints[:, 0, 1], motion.translation[:, 2] = .08*t, .1*t, -.45
    nothing = np.zeros((COUNT, 478, 3), np.float32)
    truth = Track(motion, np.zeros(head.n_shape, np.float32), facing_camera(1.6*SIZE, SIZE, SIZE), nothing, np.zeros(COUNT, np.float32), np.ones(COUNT, bool))
    truth.landmarks[:] = truth.fitted(head)
    colours, film = rng.uniform(0, 255, (len(head.v_template), 1)).astype(np.float32).repeat(3, 1), []
    for i in range(COUNT):
        raster = rasterize(truth.camera.project(truth.vertices(head, i)), head.faces, SIZE, SIZE)
        film.append(np.where(raster.mask[..., None], interpolate(colours, head.faces, raster), 90))
    return truth, np.stack(film).astype(np.uint8)


def half_seen(truth, head):
    "A track by a detector that sees half of every movement."
    posed = replace(truth, motion=replace(truth.motion, expression=np.zeros_like(truth.motion.expression), joints=truth.motion.joints*np.float32([1, 1, 0, 1, 1])[:, None])).fitted(head)
    return refit(truth, head, posed + .5*(truth.landmarks - posed))


def skin_error(track, truth, head):
    at, (triangles, weights) = range(COUNT), skin_points(truth, head, 0, SIZE)
    place = lambda t, i: t.camera.project((t.vertices(head, i)[head.faces[triangles]]*weights[..., None]).sum(1))[:, :2]
    return np.mean([np.linalg.norm(place(track, i) - place(truth, i), axis=1).mean() for i in at])


def test_the_picture_settles_expressions_that_landmarks_tell_wrongly(head, painted):
    truth, film = painted
    start = half_seen(truth, head)
    out = photometric_refit(start, head, film, size=SIZE)
    assert skin_error(out, truth, head) < .6*skin_error(start, truth, head)
    assert out.info["skin_after"] < out.info["skin_before"]
    assert np.allclose(out.motion.joints[:, :2], start.motion.joints[:, :2], atol=1e-5) and np.allclose(out.motion.translation, start.motion.translation, atol=1e-5)      # the pose stays
    assert np.array_equal(out.landmarks, start.landmarks) and np.array_equal(out.shape, start.shape)


def test_lost_frames_and_a_matte_that_hides_half(head, painted):
    truth, film = painted
    start = half_seen(truth, head)
    start = replace(start, ok=np.arange(COUNT) != 3)
    film, matte = film.copy(), np.ones(film.shape[:3], np.float32)
    film[3], matte[:, :, SIZE//2:] = 0, 0
    out = photometric_refit(start, head, film, matte, size=SIZE)
    assert np.isfinite(out.motion.expression).all() and out.info["skin_after"] < out.info["skin_before"]
    assert np.abs(out.motion.expression[3] - (out.motion.expression[2] + out.motion.expression[4])/2).max() < .25     # bridged


def test_a_film_without_detail_keeps_its_track(head, painted):
    truth, film = painted
    start = half_seen(truth, head)
    assert photometric_refit(start, head, np.full_like(film, 128)) is start
    assert photometric_refit(start, head, film, np.zeros(film.shape[:3], np.float32)) is start


def test_gradient_is_the_objectives(head, painted):
    truth, film = painted
    with torch.no_grad():
        skin = _Skin(half_seen(truth, head), head, film, None, SIZE, 400, 1.)
        skin.settle()
        counts = skin.look(slice(0, COUNT), False)[1]
        def objective():
            e = (skin.look(slice(0, COUNT), False)[0] - skin.mean).abs()/.03
            return ((torch.where(e < 1, e*e/2, e - .5)*counts).sum(1)/counts.sum(1)).double()
        n = skin.fit.z.shape[1]
        g, H = torch.zeros(COUNT, n), torch.zeros(COUNT, n, n)
        skin(g, H)
        for k in (head.expression_names.index("browInnerUp"), n - 6):
            z = skin.fit.z.clone()
            k = skin.fit.model.fitted.index(k) if k < n - 6 else k
            values = []
            for step in (1e-3, -1e-3):
                skin.fit.z = z.clone()
                skin.fit.z[:, k] += step
                values.append(objective())
            skin.fit.z = z
            slope = ((values[0] - values[1])/2e-3).float()
            assert (slope - g[:, k]).abs().median() < .01*g[:, k].abs().max()        # where no point just crosses into another pixel
        assert (torch.linalg.eigvalsh(H) > -1e-3).all()


def test_detail_ignores_light_and_ground(head, painted):
    _, film = painted
    matte = np.zeros(film.shape[:3], np.float32)
    matte[:, 40:120, 40:120] = 1
    a = detail(film//2 + 20, matte, SIZE)[..., 0].astype(np.float32)
    other = film//2 + 60
    other[matte == 0] = 255                          # another ground does not reach inside
    b = detail(other.astype(np.uint8), matte, SIZE)[..., 0].astype(np.float32)
    assert np.abs(a - b)[:, 48:112, 48:112].max() < .02 and a.std() > .01
