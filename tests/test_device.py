"""What `test_cuda.py` asks of a GPU, asked of the CPU: the same checks through the same torch operations, so that only the device is left to differ.
And a whole training step on the meta device, under the guard that refuses what a GPU would refuse."""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ophav_nb  # noqa: F401
from device_bodies import BODIES, avatar_on, config, recorded, tinycudann, toy, trainer_on
from ophav_nb import avatar, encoding
from ophav_nb.avatar import Avatar, Batch
from ophav_nb.deform import Deformer
from ophav_nb.encoding import device_guard, grid_levels, spherical_harmonics
from ophav_nb.field import Field, field_config
from ophav_nb.nearest import TriangleTree, nearest_in_leaves
from ophav_nb.render import shade


@pytest.mark.parametrize('body', BODIES, ids=lambda b: b.__name__)
def test_on_the_cpu(body, tmp_path): body('cpu', tmp_path, 'torch')


def test_a_stand_in_for_tinycudann():
    "The check itself: it passes with a module that computes as it should, and fails with one that does not."
    class Grid(torch.nn.Module):
        def __init__(self, c):
            super().__init__()
            self.levels = grid_levels(c['n_levels'], c['n_features_per_level'], c['log2_hashmap_size'], c['base_resolution'], c['per_level_scale'])
            self.params = torch.nn.Parameter(torch.zeros(self.levels.entries*self.levels.features))

        def forward(self, x): return encoding._grid_torch(x, self.params.view(-1, self.levels.features), self.levels)

    class Harmonics(torch.nn.Module):
        def forward(self, x): return spherical_harmonics(2*x - 1)

    class Module:
        Encoding = staticmethod(lambda n, c, dtype: Grid(c) if c['otype'] == 'HashGrid' else Harmonics())

    tinycudann('cpu', Module)
    class Other(Grid):
        def forward(self, x): return super().forward(x.flip(1))
    Module.Encoding = staticmethod(lambda n, c, dtype: Other(c))
    with pytest.raises(AssertionError): tinycudann('cpu', Module)


def test_a_recorded_step_is_the_step(tmp_path, monkeypatch):
    "What a GPU records, called anew each time: arrays of 32 bits and fixed shapes, gradients in place of those that torch accumulates, the next batch made ahead."
    class Recorded:
        def __init__(self, function, arrays, device): self.function, self.like = function, [(a.shape, a.dtype) for a in arrays]
        def __call__(self, *arrays):
            assert [(a.shape, a.dtype) for a in arrays] == self.like and all(a.itemsize == 4 for a in arrays)
            return self.function(*map(torch.from_numpy, arrays))
    monkeypatch.setattr(avatar, 'gpu', SimpleNamespace(Recorded=Recorded, NotRecorded=RuntimeError))
    monkeypatch.setattr(avatar.Trainer, 'records', True)
    recorded('cpu', tmp_path, 'torch')


def test_a_step_that_cannot_be_recorded(monkeypatch, caplog):
    "Goes on without, and says so once."
    def refuse(*args): raise RuntimeError('operation not permitted when stream is capturing')
    monkeypatch.setattr(avatar, 'gpu', SimpleNamespace(Recorded=refuse, NotRecorded=RuntimeError))
    monkeypatch.setattr(avatar, 'gpu_kernels', lambda device: True)
    monkeypatch.setattr(avatar, 'resolve_backend', lambda backend, device: 'triton')
    trainer = trainer_on('cpu', avatar_on('cpu', config('torch')), 3)
    assert trainer.records
    for _ in range(3):
        assert np.isfinite(trainer.one())
        trainer.step += 1
    assert not trainer.records and [r.message for r in caplog.records if 'recorded' in r.message][0].count('capturing') == 1
    assert sum('recorded' in r.message for r in caplog.records) == 1


CHANGES = [dict(), dict(mapping='triangle'), dict(occupancy=8), dict(distortion=.01, patch=.1, pose_rate=1e-4, told_rate=1e-3, occupancy=8, alpha_weight=.1)]


@pytest.mark.parametrize('changes', CHANGES, ids=['plain', 'triangle', 'occupancy', 'everything'])
@pytest.mark.parametrize('backend', ['torch', 'auto'])
def test_no_training_step_mixes_devices(changes, backend):
    "March, field, losses, gradients and the update; only the loss's number is not asked for, which the meta device does not have."
    head, film = toy()
    c = config(backend, **changes)
    if len(changes) > 2: c = replace(c, field=replace(c.field, appearance=3, offset=8))
    def step(device):
        avatar = Avatar.create(head, film.shape, c, device=device)
        trainer = trainer_on(device, avatar)
        assert trainer.one_pass is None and trainer.pool.poses.T.device.type == 'meta'
        for k in range(3):                                       # with an occupancy grid: a look, then steps that skip
            loss, square = trainer.by_torch(Batch(trainer.pool, k, 0, None, trainer.rays))
            assert loss.device.type == square.device.type == 'meta' and all(p.grad is not None for _, p in trainer.trained)
            trainer.optimiser.step(.1)
    device_guard(step)


def test_no_view_mixes_devices():
    head, _ = toy()
    def step(device):
        field, deformer = Field(field_config(levels=2, log2_size=8)).to(device), Deformer(head.canonical().numpy(), head.faces)
        n = 20
        o, d = np.zeros((n, 3), np.float32), np.ones((n, 3), np.float32)
        with torch.no_grad():
            return shade(field, deformer, deformer.poses(head()[0].numpy(), device), np.zeros(n, np.int32), o, d, np.ones((3, n), np.float32), np.full((n, 4), .5, np.float32),
                         torch.zeros(n, 16, device=device))[0].rgb.device.type
    assert device_guard(step) == 'meta'


def test_the_guard_sees_the_march():
    "What the guard would say of poses that stayed behind."
    head, _ = toy()
    tree = TriangleTree(head()[0].numpy(), head.faces)
    T, B, leaves = torch.from_numpy(tree.T)[None], torch.from_numpy(tree.B)[None], torch.from_numpy(tree.leaves).long()
    def step(device): nearest_in_leaves(torch.zeros(5, 3, device=device), T, B.to(device), leaves.to(device))
    with pytest.raises(RuntimeError, match='cpu'): device_guard(step)
