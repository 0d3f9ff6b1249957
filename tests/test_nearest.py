"Nearest triangle against trying them all."
import ophav_nb  # noqa: F401, before torch: it decides about threads
import numpy as np
import pytest
import torch

from meshes import soup
from ophav_nb.lanes import LANES
from ophav_nb.head import HeadModel
from ophav_nb.nearest import TriangleTree, nearest_in_leaves, nearest_reference, triangle_leaves


@pytest.fixture
def rng(): return np.random.default_rng(0)


def test_nearest_is_exact(rng):
    v, f = soup(rng)
    points = np.concatenate([rng.normal(size=(600, 3))*.15, v[:100], v[f[:100]].mean(1), [[50, -80, 20]]]).astype(np.float32)
    tree = TriangleTree(v, f)
    d2, face, bary = tree.nearest(points)
    want, _, _ = nearest_reference(torch.tensor(points).double(), v, f)
    np.testing.assert_allclose(np.sqrt(d2)[:-1], want.sqrt().numpy()[:-1], atol=1e-6)
    np.testing.assert_allclose(np.sqrt(d2[-1]), want[-1].sqrt(), rtol=1e-6)
    assert bary.min() >= -1e-6 and np.abs(bary.sum(1) - 1).max() < 1e-6
    there = np.einsum('nk,nkc->nc', bary, v[f[face]])
    np.testing.assert_allclose(np.linalg.norm(there - points, axis=1)[:-1], np.sqrt(d2)[:-1], atol=1e-6)
    brute = TriangleTree(v, f, backend='torch').nearest(points)
    np.testing.assert_allclose(np.sqrt(brute[0])[:-1], want.sqrt().numpy()[:-1], atol=2e-6)


def test_reference_against_many_samples(rng):
    "The reference itself, against points strewn densely over one triangle."
    v, f = rng.normal(size=(3, 3)), np.array([[0, 1, 2]])
    w = rng.dirichlet([.6, .6, .6], 200000)
    points = rng.normal(size=(20, 3))*1.5
    d2, _, bary = nearest_reference(torch.tensor(points), v, f)
    sampled = ((points[:, None] - (w @ v)[None])**2).sum(-1).min(1)
    assert (d2.numpy() <= sampled + 1e-12).all() and np.abs(np.sqrt(d2.numpy()) - np.sqrt(sampled)).max() < .02
    np.testing.assert_allclose(((bary.numpy() @ v - points)**2).sum(-1), d2.numpy(), atol=1e-12)


def test_refit(rng):
    v, f = soup(rng)
    tree, moved = TriangleTree(v, f), (v*[1.4, .7, 1.1] + rng.normal(size=v.shape)*.02).astype(np.float32)
    points = rng.normal(size=(200, 3)).astype(np.float32)*.2
    d2 = tree.refit(moved).nearest(points)[0]
    np.testing.assert_allclose(np.sqrt(d2), nearest_reference(torch.tensor(points).double(), moved, f)[0].sqrt(), atol=1e-6)


@pytest.mark.parametrize('faces', [1, 15, 16, 17, 255, 256, 257, 800])
def test_every_triangle_is_in_a_leaf(rng, faces):
    v, f = soup(rng)
    leaves = triangle_leaves(v, f[:faces])
    assert set(leaves.ravel()) == set(range(faces)) and leaves.shape[1] == LANES and len(leaves) % LANES == 0
    points = rng.normal(size=(50, 3)).astype(np.float32)
    np.testing.assert_allclose(np.sqrt(TriangleTree(v, f[:faces]).nearest(points)[0]), nearest_reference(torch.tensor(points).double(), v, f[:faces])[0].sqrt(), atol=1e-6)


def test_order_and_threads_change_nothing(rng):
    "A guess makes it faster, not different."
    v, f = soup(rng)
    tree, points = TriangleTree(v, f), rng.normal(size=(1000, 3)).astype(np.float32)*.1
    order = rng.permutation(1000)
    assert (tree.nearest(points)[0][order] == tree.nearest(points[order])[0]).all()


def test_nearest_takes_tensors_and_nonsense(rng):
    v, f = soup(rng, 30, 40)
    tree, points = TriangleTree(torch.tensor(v), f), torch.randn(10, 3)
    d2, face, bary = tree.nearest(points)
    assert face.dtype == torch.int64 and bary.shape == (10, 3) and (tree.nearest(points.numpy())[0] == d2.numpy()).all()
    assert tree.nearest(np.zeros((0, 3)))[0].shape == (0,)
    bad = np.float32([[np.nan, 0, 0], [.1, .1, .1], [np.inf, 0, 0]])
    face = tree.nearest(bad)[1]
    assert face[1] >= 0 and face[0] == -1 and face[2] == -1
    assert TriangleTree(v, f[:1]).nearest(v)[1].max() == 0
    with pytest.raises(ValueError): TriangleTree(v, f[:0])


def in_leaves(points, *trees, **how):
    T, B = (torch.from_numpy(np.stack([getattr(t, k) for t in trees])) for k in 'TB')
    return nearest_in_leaves(torch.as_tensor(points), T, B, torch.from_numpy(trees[0].leaves).long(), **how)


@pytest.fixture(scope='module')
def posed():
    "A head that smiles with open mouth, and points near its skin and anywhere."
    head, rng = HeadModel.load(), np.random.default_rng(0)
    v = head(None, head.expression(mouthSmile=.9, jawOpen=.5, eyeBlink=.8)[None])[0].numpy()
    at, w = rng.integers(0, len(head.faces), 1500), rng.dirichlet([1, 1, 1], 1500)
    near = (v[head.faces[at]]*w[..., None]).sum(1) + rng.normal(0, .006, (1500, 3))
    points = np.concatenate([near, rng.uniform(-.3, .3, (500, 3)), v[:200]]).astype(np.float32)
    return v, head.faces, points, nearest_reference(torch.tensor(points[::20]).double(), v, head.faces)[0].sqrt()


@pytest.mark.parametrize('first, room', [(1, None), (8, None), (8, 2**15), (40, None)])
def test_the_flat_search_is_exact(posed, first, room):
    v, f, points, truth = posed
    tree = TriangleTree(v, f)
    d2, face, bary = in_leaves(points, tree, first=first, room=room)
    np.testing.assert_allclose(d2.sqrt(), np.sqrt(tree.nearest(points)[0]), atol=1e-6)
    np.testing.assert_allclose(d2[::20].sqrt(), truth, atol=1e-6)
    foot = (bary.numpy()[..., None]*v[f[face]]).sum(1)
    np.testing.assert_allclose(np.linalg.norm(foot - points, axis=1), d2.sqrt(), atol=1e-6)
    assert bary.min() >= -1e-6 and (bary.sum(1) - 1).abs().max() < 1e-6


def test_the_flat_search_survives_bad_triangles(rng):
    v, f = soup(rng)
    points = np.concatenate([rng.normal(size=(600, 3))*.15, v[:100], v[f[:100]].mean(1)]).astype(np.float32)
    want = nearest_reference(torch.tensor(points).double(), v, f)[0].sqrt()
    np.testing.assert_allclose(in_leaves(points, TriangleTree(v, f))[0].sqrt(), want, atol=1e-6)
    for n in (1, 17): np.testing.assert_allclose(in_leaves(points, TriangleTree(v, f[:n]))[0].sqrt(), nearest_reference(torch.tensor(points).double(), v, f[:n])[0].sqrt(), atol=1e-6)
    bad = np.float32([[np.nan, 0, 0], [.1, .1, .1], [np.inf, 0, 0]])
    face = in_leaves(bad, TriangleTree(v, f))[1]
    assert face[1] >= 0 and face[0] == -1 and face[2] == -1
    assert [len(a) for a in in_leaves(np.zeros((0, 3), np.float32), TriangleTree(v, f))] == [0, 0, 0]


def test_the_flat_search_takes_several_poses(posed):
    v, f, points, _ = posed
    trees = [TriangleTree(v, f), TriangleTree(v, f).refit(v*np.float32([1.1, .9, 1]))]
    slot = torch.arange(len(points)) % 2
    d2 = in_leaves(points, *trees, slot=slot)[0]
    np.testing.assert_allclose(d2.sqrt(), np.where(slot == 0, *(np.sqrt(t.nearest(points)[0]) for t in trees)), atol=1e-6)
