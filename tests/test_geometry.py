"Camera, rotations, rasteriser and hole filling against independent restatements."
import ophav_nb  # noqa: F401, before torch: it decides about threads
import os
import subprocess
import sys

import numba
import numpy as np
import pytest
import torch

from meshes import soup
from ophav_nb.geometry import (Camera, axis_angle_to_matrix, facing_camera, interpolate, kernel, matrix_to_axis_angle, mesh_laplacian, push_pull, rasterize, sample_bilinear,
                               triangle_frames, vertex_normals)


@pytest.fixture
def rng(): return np.random.default_rng(0)


# rotations

@pytest.mark.parametrize('dtype,eps', [(np.float64, 1e-9), (np.float32, 3e-6)])
def test_rotations_there_and_back(rng, dtype, eps):
    from scipy.spatial.transform import Rotation
    axis = rng.normal(size=(4000, 3))
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    angle = np.concatenate([np.geomspace(1e-9, .1, 1000), np.linspace(.1, 3.1, 2000), np.pi - np.geomspace(1e-7, .1, 1000)])
    v = (axis*angle[:, None]).astype(dtype)
    R = axis_angle_to_matrix(v)
    assert R.dtype == dtype
    np.testing.assert_allclose(R, Rotation.from_rotvec(v.astype(float)).as_matrix(), atol=eps)
    np.testing.assert_allclose(axis_angle_to_matrix(matrix_to_axis_angle(R)), R, atol=3*eps)
    inner = angle < 3.1
    np.testing.assert_allclose(matrix_to_axis_angle(R)[inner], v[inner], atol=10*eps)


def test_half_a_turn_and_none(rng):
    for axis in np.eye(3):
        np.testing.assert_allclose(np.abs(matrix_to_axis_angle(axis_angle_to_matrix(axis*np.pi))), np.pi*axis, atol=1e-6)
    np.testing.assert_array_equal(matrix_to_axis_angle(np.eye(3)), np.zeros(3))
    assert axis_angle_to_matrix(np.zeros((2, 5, 3))).shape == (2, 5, 3, 3) and matrix_to_axis_angle(np.zeros((2, 5, 3, 3)) + np.eye(3)).shape == (2, 5, 3)


def test_rotations_are_differentiable_everywhere():
    for start in (torch.zeros(1, 3), torch.tensor([[1e-5, 0, -1e-5]]), torch.tensor([[.3, -.2, .9]]), torch.tensor([[3.1, .2, 0]])):
        v = start.double().requires_grad_()
        assert torch.autograd.gradcheck(axis_angle_to_matrix, v)
        back = lambda u: matrix_to_axis_angle(axis_angle_to_matrix(u))
        assert torch.isfinite(torch.autograd.functional.jacobian(back, v)).all()
        torch.testing.assert_close(torch.autograd.functional.jacobian(back, v)[0, :, 0], torch.eye(3, dtype=torch.double), atol=1e-5, rtol=0)


# camera

def test_camera(rng):
    K = np.array([[300, .5, 130], [0, 310, 120], [0, 0, 1.]])
    c2w = np.eye(4)
    c2w[:3, :3], c2w[:3, 3] = axis_angle_to_matrix(np.array([.2, -.3, .1])) @ np.diag([1, -1, -1]), [.1, .2, .3]
    camera = Camera(K, c2w, 256, 240)
    p = rng.normal(size=(7, 5, 3))*.2 + [0, 0, -1.5]
    s = camera.project(p)
    h = np.einsum('ij,...j->...i', np.linalg.inv(c2w), np.concatenate([p, np.ones((7, 5, 1))], -1))[..., :3] @ K.T
    np.testing.assert_allclose(s, np.concatenate([h[..., :2]/h[..., 2:], h[..., 2:]], -1), atol=1e-9)
    np.testing.assert_allclose(camera.unproject(s), p, atol=1e-9)
    o, d = camera.rays(s.reshape(-1, 3)[:, :2])
    np.testing.assert_allclose(o + d*s.reshape(-1, 3)[:, 2:], p.reshape(-1, 3), atol=1e-9)
    np.testing.assert_allclose(camera.project(torch.tensor(p)).numpy(), s, atol=1e-9)
    small = camera.resized(128, 60)
    np.testing.assert_allclose(small.project(p), s*[.5, .25, 1], atol=1e-9)
    M = np.eye(4)
    M[:3, :3], M[:3, 3] = axis_angle_to_matrix(np.array([.4, .1, -.2])), [.05, -.1, .2]
    inner = (p - M[:3, 3]) @ M[:3, :3]                                    # the same points, in the moved space
    np.testing.assert_allclose(camera.moved(M).project(inner), s, atol=1e-9)
    assert camera.project(p.astype(np.float32)).dtype == np.float32 and camera.rays()[0].shape == (256*240, 3)


def test_default_camera_and_orbit():
    camera = facing_camera(400, 256, 200)
    np.testing.assert_allclose(camera.project(np.array([.08, .08, -.8])), [128 + 40, 100 - 40, .8], atol=1e-6)
    target = np.array([.01, .02, -.8])
    for yaw, pitch in ((.5, 0), (0, .4), (-.3, -.2)):
        turned = camera.orbit(yaw, pitch, target)
        np.testing.assert_allclose(turned.project(target)[:2], camera.project(target)[:2], atol=1e-6)
    assert camera.orbit(.5).c2w[0, 3] > 0 and camera.orbit(0, .5).c2w[1, 3] > 0
    assert camera.orbit(.3).project(np.array([0, 0, -.7]))[0] < 128       # seen from the subject's left, the nose points to the picture's left


# meshes

def test_frames_and_normals(rng):
    v, f = rng.normal(size=(4, 50, 3)), rng.integers(0, 50, (80, 3))
    f = f[(f[:, 0] != f[:, 1]) & (f[:, 1] != f[:, 2]) & (f[:, 0] != f[:, 2])]
    T = triangle_frames(v, f)
    np.testing.assert_allclose(T.swapaxes(-1, -2) @ T, np.broadcast_to(np.eye(3), T.shape), atol=1e-9)
    np.testing.assert_allclose(np.linalg.det(T), 1, atol=1e-9)
    R = axis_angle_to_matrix(np.array([.3, 1., -.4]))
    np.testing.assert_allclose(triangle_frames(v @ R.T, f), R @ T, atol=1e-9)
    np.testing.assert_allclose(vertex_normals(v @ R.T, f), vertex_normals(v, f) @ R.T, atol=1e-9)
    np.testing.assert_allclose(vertex_normals(torch.tensor(v), f).numpy(), vertex_normals(v, f), atol=1e-9)
    np.testing.assert_allclose(vertex_normals(v[1], f), vertex_normals(v, f)[1], atol=1e-12)
    np.testing.assert_allclose(triangle_frames(torch.tensor(v), f).numpy(), T, atol=1e-9)


# rasteriser

@pytest.mark.parametrize('farthest', [False, True])
@pytest.mark.parametrize('height,width', [(61, 90), (1, 7), (128, 33)])
def test_rasteriser_equals_its_reference(rng, farthest, height, width):
    v, f = soup(rng)
    camera = facing_camera(60, width, height)
    screen = camera.project(v + np.float32([0, 0, -.35]))                 # some corners behind the camera, some outside the picture
    a, b = (rasterize(screen, f, height, width, backend=k, farthest=farthest) for k in ('numba', 'torch'))
    np.testing.assert_array_equal(a.face, b.face)
    np.testing.assert_allclose(a.bary, b.bary, atol=1e-5)
    np.testing.assert_allclose(a.depth, b.depth, rtol=1e-5)
    assert a.mask.any() or height == 1
    np.testing.assert_allclose(a.bary[a.mask].sum(-1), 1, atol=1e-5)


def test_rasteriser_against_rays(rng):
    "What a pixel sees is what its ray meets first."
    v, f = soup(rng, 60, 120)
    v += np.float32([0, 0, -.8])
    camera = facing_camera(120, 48, 40)
    seen, (o, d) = rasterize(camera.project(v), f, 40, 48), camera.rays()
    a, b, c = (v[f[:, k]].astype(np.float64) for k in range(3))
    n = np.cross(b - a, c - a)
    with np.errstate(all='ignore'):
        t = ((a - o[0])*n).sum(1)/(d.astype(np.float64) @ n.T)
        p = o[0] + t[..., None]*d[:, None]
        inside = np.all([(np.cross(q - r, p - r)*n).sum(-1) >= 1e-9 for r, q in ((a, b), (b, c), (c, a))], 0) & (t > 0)
    depth = np.where(inside, t, np.inf).min(1).reshape(40, 48)
    both = np.isfinite(depth) & seen.mask
    assert (np.isfinite(depth) != seen.mask).mean() < .01 and both.sum() > 300
    assert np.mean(np.abs(depth - seen.depth)[both] < 1e-4) > .995


def test_no_seams_and_perspective_interpolation():
    "A grid of triangles in a tilted plane leaves no hole, and interpolates position exactly."
    n = 23
    x, y = np.meshgrid(np.linspace(-1, 1, n), np.linspace(-1, 1, n))
    v = np.stack([x, y, -1.5 + .6*x - .3*y], -1).reshape(-1, 3)
    i = (np.arange(n-1)[:, None]*n + np.arange(n-1)).ravel()
    f = np.concatenate([np.stack([i, i+1, i+n], 1), np.stack([i+1, i+n+1, i+n], 1)])
    camera = facing_camera(64, 100, 100)
    seen = rasterize(camera.project(v), f, 100, 100)
    assert seen.mask[35:65, 35:65].all()
    got = interpolate(v, f, seen)
    o, d = camera.rays()
    want = (o + d*seen.depth.reshape(-1, 1)).reshape(100, 100, 3)
    np.testing.assert_allclose(got[seen.mask], want[seen.mask], atol=1e-5)
    value = torch.tensor(v, requires_grad=True)
    out = interpolate(value, f, seen)
    out.sum().backward()
    np.testing.assert_allclose(out.detach().numpy(), got, atol=1e-6)
    assert float(value.grad.sum()) == pytest.approx(3*seen.mask.sum(), rel=1e-5)


def test_rasteriser_survives_nonsense():
    v = np.float32([[np.nan, 0, 1], [5, 5, 1], [0, 9, 1], [9, 0, -1], [np.inf, 2, 1], [0, 0, 1]])
    f = np.int32([[0, 1, 2], [1, 2, 3], [4, 1, 2], [5, 2, 1]])
    for farthest in (False, True): assert set(np.unique(rasterize(v, f, 10, 10, farthest=farthest).face)) <= {-1, 3}
    assert not rasterize(v, f[:0], 4, 5).mask.any() and not rasterize(v, f[:0], 4, 5, backend='torch').mask.any()


# pictures

def test_sample_bilinear(rng):
    image = rng.random((9, 12, 3)).astype(np.float32)
    j, i = np.meshgrid(np.arange(12), np.arange(9))
    np.testing.assert_allclose(sample_bilinear(image, j + .5, i + .5), image, atol=1e-6)
    np.testing.assert_allclose(sample_bilinear(image, np.array([2.]), np.array([3.])), image[2:4, 1:3].mean((0, 1))[None], atol=1e-6)
    np.testing.assert_allclose(sample_bilinear(image, np.array([-9., 99.]), np.array([-9., 99.])), image[[0, -1], [0, -1]], atol=1e-6)
    x, y = rng.random(50)*14 - 1, rng.random(50)*11 - 1
    got = sample_bilinear(torch.tensor(image), torch.tensor(x).float(), torch.tensor(y).float())
    np.testing.assert_allclose(got.numpy(), sample_bilinear(image, x, y), atol=1e-5)
    assert sample_bilinear(image.mean(-1, keepdims=True)[:1, :1], np.zeros(3), np.ones(3)).shape == (3, 1)
    p = torch.tensor([3.3, 4.4], dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q: sample_bilinear(torch.tensor(image).double(), q[0], q[1]), p)


@pytest.mark.parametrize('shape', [(1, 1), (7, 5), (64, 33), (100, 100)])
def test_push_pull(rng, shape):
    image, mask = rng.random((*shape, 3)).astype(np.float32), (rng.random(shape) < .3).astype(np.float32)
    mask[0, 0] = 1
    out = push_pull(image, mask)
    np.testing.assert_allclose(out[mask == 1], image[mask == 1], atol=1e-6)
    assert out.min() >= image[mask == 1].min() - 1e-5 and out.max() <= image[mask == 1].max() + 1e-5
    np.testing.assert_allclose(push_pull(np.full(shape, .25), mask), .25, atol=1e-5)
    assert push_pull(image[..., 0], mask).shape == shape
    assert np.isfinite(push_pull(image, mask*0)).all()


# compiled loops

def test_kernels_compile_without_a_cache_folder(tmp_path):
    "No folder can be written: the functions work all the same."
    module = tmp_path/'locked'/'some_module.py'
    module.parent.mkdir()
    module.write_text('from ophav_nb.geometry import kernel\n@kernel\ndef double(x): return 2*x\n')
    code = ('import sys; sys.path.insert(0, sys.argv[1])\n'
            'import numba.core.caching as c\n'
            'for l in c.CacheImpl._locator_classes: l.from_function = classmethod(lambda *a: None)\n'
            'import some_module; print(some_module.double(21))')
    done = subprocess.run([sys.executable, '-c', code, str(module.parent)], capture_output=True, text=True, env={**os.environ, 'NUMBA_DISABLE_JIT': '0'})
    assert done.stdout.strip() == '42', done.stderr


def test_kernel_options():
    @kernel(inline=True)
    def one(x): return x + 1
    @kernel(parallel=True)
    def many(x):
        for i in numba.prange(len(x)): x[i] = one(x[i])
    x = np.zeros(3)
    many(x)
    assert (x == 1).all()


def test_laplacian_of_a_mesh():
    L = mesh_laplacian(np.array([[0, 1, 2], [2, 1, 3]]), 5).toarray()
    assert (L == [[2, -1, -1, 0, 0], [-1, 3, -1, -1, 0], [-1, -1, 3, -1, 0], [0, -1, -1, 2, 0], [0]*5]).all()
