"The way to canonical space: kernels against their references."
import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import ophav_nb  # noqa: F401  before torch's first use: threads
from ophav_nb.deform import Deformer, neighbours, to_canonical_reference, vertex_rotations_reference
from ophav_nb.head import HeadModel
from ophav_nb.nearest import TriangleTree
from ophav_nb.render import mouth_amount

from meshes import lenses


@pytest.fixture(scope='module')
def scene():
    head = HeadModel.load()
    joints = torch.zeros(1, 5, 3)
    joints[0, 2, 0], joints[0, 1, 1] = .15, .1
    posed = head(None, head.expression(mouthSmile=.9, eyeBlink=.8)[None], joints)[0].numpy()
    rng = np.random.default_rng(0)
    at, w = rng.integers(0, len(head.faces), 150), rng.dirichlet([1, 1, 1], 150)
    points = (posed[head.faces[at]]*w[..., None]).sum(1) + rng.normal(0, .008, (150, 3))
    return head, head.canonical().numpy(), posed, points, rng.normal(size=(150, 3))


def march(deformer, posed, points, directions):
    n = len(points)
    return deformer.march(deformer.poses(posed), np.zeros(n), points, directions, np.zeros((n, 1)))


@pytest.mark.parametrize('mapping, quantile', [('smooth', 1.), ('triangle', .9)])   # a tie between triangles moves INSTA's mapping
def test_march_is_the_reference(scene, mapping, quantile):
    head, canonical, posed, points, directions = scene
    eyes = head.regions['left_eye_region'] | head.regions['right_eye_region']
    d = Deformer(canonical, head.faces, blended=head.regions['face'], scaled=eyes, mapping=mapping)
    found = march(d, posed, points, directions)
    x, turned = to_canonical_reference(*(torch.tensor(a) for a in (points, directions, posed)), d)
    assert np.quantile(np.abs(found.x.numpy()*d.size + d.low - x.numpy()).max(1), quantile) < 1e-5
    assert np.quantile(np.abs(found.direction.numpy() - turned.numpy()).max(1), quantile) < 1e-3


def test_march_finds_the_nearest(scene):
    head, canonical, posed, points, directions = scene
    d = Deformer(canonical, head.faces)
    d2, face, _ = TriangleTree(posed, head.faces).nearest(points)
    found = march(d, posed, points, directions)
    assert np.abs(found.height.numpy() - np.sqrt(d2)).max() < 1e-6
    assert (found.face.numpy() == face).mean() > .6      # the others are ties on an edge


def test_rotations(scene):
    head, canonical, posed, *_ = scene
    d = Deformer(canonical, head.faces)
    R = vertex_rotations_reference(torch.tensor(posed), torch.tensor(canonical), head.faces).numpy()
    ours = d.poses(posed).A[0].reshape(-1, 3, 3)
    assert np.quantile(np.abs(ours - R).max((1, 2)), .999) < 1e-3
    assert np.abs(np.linalg.det(ours) - 1).max() < 1e-3


def test_at_rest_nothing_moves(scene):
    head, canonical, _, points, _ = scene
    d = Deformer(canonical, head.faces)
    assert np.abs(d.to_canonical(points, canonical) - np.clip(points, d.low, d.low + d.size)).max() < 1e-5


def test_neighbours_share_an_edge():
    f = np.array([[0, 1, 2], [2, 1, 3], [3, 1, 4]])
    assert [set(row) for row in neighbours(f)] == [{0, 1}, {0, 1, 2}, {1, 2}]


def test_unknown_mapping(scene):
    with pytest.raises(ValueError, match='choose'): Deformer(scene[1], scene[0].faces, mapping='affine')


@pytest.mark.parametrize('mapping', ['smooth', 'triangle'])
def test_march_in_torch_is_the_kernels(scene, mapping):
    "Poses that are tensors are marched through in torch, as on a GPU: two poses, whole rays, everything that comes back."
    head, canonical, posed, *_ = scene
    eyes, rng = head.regions['left_eye_region'] | head.regions['right_eye_region'], np.random.default_rng(1)
    d = Deformer(canonical, head.faces, mouth_amount(head, head()[0].numpy()), head.regions['face'], eyes, mapping)
    vertices = np.stack([posed, head()[0].numpy()])
    slot, aim = np.repeat(np.int32([1, 0]), 100), rng.uniform([-.08, -.1, .05], [.08, .12, .1], (200, 3))
    o = np.tile([.02, 0, .8], (200, 1))
    rays = slot, o, (aim - o)/(o - aim)[:, 2:], rng.uniform(.68, .76, (200, 6))
    kernel, ours = d.march(d.poses(vertices), *rays), d.march(d.poses(vertices, 'cpu'), *rays)
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(kernel, ours))
    assert (kernel.height - ours.height).abs().max() < 1e-6
    error = lambda name: (getattr(kernel, name) - getattr(ours, name)).abs().numpy().reshape(len(kernel.face), -1).max(1)
    same = (kernel.face == ours.face).numpy()                                  # the others are ties: two triangles share the foot, or two feet are as near
    assert same.mean() > .8
    for name, most in dict(x=1e-5, direction=1e-4, mouth=1e-4).items(): assert error(name)[same].max() < most, name
    if mapping == 'smooth': assert all(np.quantile(error(name), .99) < 1e-5 for name in ('x', 'direction', 'mouth'))      # INSTA's jumps where there is a tie
    assert ours.mouth.max() > .9


def test_frames_are_filled_in_their_place(scene):
    head, canonical, posed, *_ = scene
    d = Deformer(canonical, head.faces)
    room = d.fill(d.allocate(3, 'cpu'), posed[None], 1)
    for a, b in zip(room, d.poses(posed)): assert torch.equal(a[1], torch.from_numpy(b[0]))
    assert d.allocate(3, 'cpu').megabytes == d.allocate(3).megabytes


@pytest.mark.parametrize('mapping', ['smooth', 'triangle'])
def test_what_is_worn_is_carried_rigidly(scene, mapping):
    "Whatever lids, brows and cheeks do beneath: by the kernel, by the march in torch, and by the reference."
    head, rng = scene[0], np.random.default_rng(1)
    worn = lenses(head)
    own, n = head.of_person(None, worn), head.n_vertices
    joints = torch.zeros(1, 5, 3)
    joints[0, 1], joints[0, 2, 0] = torch.tensor([.1, -.3, .05]), .2
    posed = own(None, own.expression(mouthSmile=.9, eyeBlink=1., browInnerUp=1., cheekSquint=1.)[None], joints)[0].numpy()
    eyes = own.regions['left_eye_region'] | own.regions['right_eye_region'] | own.regions['glasses']
    d = Deformer(own.canonical().numpy(), own.faces, blended=own.regions['face'], scaled=eyes, mapping=mapping, worn=len(worn.faces))
    R = Rotation.from_rotvec(joints[0, 1].numpy()).as_matrix()
    normal, corners = R @ [0, 0, 1], posed[n:][worn.faces]
    points = (corners*rng.dirichlet([1, 1, 1], len(corners))[..., None]).sum(1) + rng.uniform(-.003, .003, (len(corners), 1))*normal
    J = head.joint_positions()[1].numpy()
    at_rest, along = (points - J) @ R + J, rng.normal(size=points.shape)
    found, slow = march(d, posed, points, along), d.march(d.poses(posed, 'cpu'), np.zeros(len(points)), points, along, np.zeros((len(points), 1)))
    x, turned = to_canonical_reference(*(torch.tensor(a) for a in (points, along, posed)), d)
    mine = found.face.numpy() >= len(head.faces)                                   # others touch a brow
    assert mine.mean() > .9 and found.mouth[mine].max() == 0
    for got, way in ((found.x.numpy()*d.size + d.low, found.direction.numpy()), (slow.x.numpy()*d.size + d.low, slow.direction.numpy()), (x.numpy(), turned.numpy())):
        assert np.abs(got - at_rest)[mine].max() < 2e-5
        assert np.abs(way - along @ R/np.linalg.norm(along, axis=1, keepdims=True))[mine].max() < 1e-3
