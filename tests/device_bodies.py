"""What must hold on a device: each check takes the device (and a folder, and the grid's backend), and compares with the CPU.

`test_device.py` runs them all on the CPU, through the same torch operations; `test_cuda.py` where there is a GPU."""
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from ophav_nb.avatar import Avatar, AvatarConfig, Batch, FramePool, Trainer, toy_film
from ophav_nb.deform import Deformer
from ophav_nb.encoding import HashGrid, spherical_harmonics
from ophav_nb.field import Field, field_config
from ophav_nb.geometry import facing_camera
from ophav_nb.head import HeadModel
from ophav_nb.nearest import TriangleTree, nearest_in_leaves
from ophav_nb.render import band_widths, mouth_amount, render_view, studio_camera

GRID = dict(levels=4, features=4, log2_size=10, scale=1.6)
SINGLE = AvatarConfig(rays=128, samples=4, frames=4, field=field_config(**GRID, precision='float32'))


@lru_cache(1)
def toy():
    head = HeadModel.load()
    return head, toy_film(head, 8, 48, test=2)


@lru_cache(1)
def scene():
    "Two poses of a head, points around them, and each point's pose."
    head, rng = toy()[0], np.random.default_rng(0)
    poses = np.stack([head()[0].numpy(), head(None, head.expression(mouthSmile=.9, jawOpen=.5)[None])[0].numpy()])
    slot, at, w = np.repeat([0, 1], 400), rng.integers(0, len(head.faces), 800), rng.dirichlet([1, 1, 1], 800)
    points = (poses[slot[:, None], head.faces[at]]*w[..., None]).sum(1) + rng.normal(0, .008, (800, 3))
    return head, poses, points.astype(np.float32), slot


def like(tensor, other, atol, rtol=0.): torch.testing.assert_close(tensor.detach().cpu().float(), other.detach().cpu().float(), atol=atol, rtol=rtol)


def config(backend, **changes): return replace(SINGLE, **changes, field=replace(SINGLE.field, backend=backend))


def avatar_on(device, c):
    head, film = toy()
    return Avatar.create(head, film.shape, c, device=device)


def trainer_on(device, avatar, steps=4, **how):
    "A trainer whose frames are marched through in torch on the device, the CPU too."
    avatar.fit_band(toy()[1])
    avatar.told_range = np.float32([[-9]*16, [9]*16])
    trainer = Trainer(avatar, toy()[1], steps, None, None, 0, 1., 30., 25, **how)
    trainer.pool = FramePool(toy()[1], avatar.deformer, avatar.widths, trainer.config, avatar.outer, avatar.lids, 0, device)
    return trainer


def encoder(device, folder, backend):
    "The grid with the same parameters: features and the table's gradient; then parameters that come back."
    torch.manual_seed(0)
    here, there = HashGrid(*(4, 2, 10, 8, 1.6), backend='numba'), HashGrid(*(4, 2, 10, 8, 1.6), backend=backend).to(device)
    with torch.no_grad(): here.params.normal_()
    there.load_state_dict(here.state_dict())
    x, up = torch.rand(3000, 3), torch.randn(3000, 8)
    a, b = here(x), there(x.to(device))
    like(b, a, 1e-5)
    (a*up).sum().backward()
    (b*up.to(device)).sum().backward()
    like(there.params.grad, here.params.grad, 2e-3, 1e-4)
    with torch.no_grad(): there.params.mul_(2)
    here.load_state_dict(there.state_dict())
    like(here(x), 2*a, 1e-5)


def field(device, folder, backend):
    "Density, colour, and all gradients of a field with the same parameters."
    for changes in (dict(), dict(condition='mouth', bias=False, degree=4, density_layers=2, colour_layers=3), dict(offset=8, appearance=3)):
        torch.manual_seed(0)
        here = Field(field_config(**GRID, precision='float32', backend='torch', **changes))
        there = Field(replace(here.config, backend=backend)).to(device)
        with torch.no_grad():
            for p in here.parameters(): p.add_(.1*torch.randn_like(p))
        there.load_state_dict(here.state_dict())
        x, d, c, height = torch.rand(500, 3), torch.nn.functional.normalize(torch.randn(500, 3), dim=-1), torch.randn(500, 16), .01*torch.rand(500)
        appearance = torch.randn(500, 3) if 'appearance' in changes else None
        out = [f(*(None if a is None else a.to(f.grid.params.device) for a in (x, d, c, appearance, height))) for f in (here, there)]
        for a, b in zip(*out): like(b, a, 1e-4, 1e-4)
        for density, rgb in out: (density.mean() + rgb.mean()).backward()
        for p, q in zip(here.parameters(), there.parameters()): like(q.grad, p.grad, 1e-5 + 1e-3*float(p.grad.abs().max()))


def nearest(device, folder, backend):
    "The flat search against the kernel's tree, two poses at once, and the tree's own way there."
    head, poses, points, slot = scene()
    trees, there = [TriangleTree(poses[0], head.faces).refit(v) for v in poses], lambda a: torch.as_tensor(a).to(device)
    T, B = (there(np.stack([getattr(t, k) for t in trees])) for k in 'TB')
    square, face, bary = nearest_in_leaves(there(points), T, B, there(trees[0].leaves).long(), there(slot))
    want = np.concatenate([t.nearest(points[slot == k])[0] for k, t in enumerate(trees)])
    like(square.sqrt(), torch.from_numpy(want).sqrt(), 1e-6)
    foot = (there(poses)[there(slot)[:, None], there(head.faces).long()[face]]*bary[..., None]).sum(1)
    like((foot - there(points)).norm(dim=1), square.sqrt(), 1e-6)
    like(trees[1].nearest(there(points[slot == 1]))[0].sqrt(), torch.from_numpy(want[slot == 1]).sqrt(), 1e-6)


def march(device, folder, backend):
    "Samples of whole rays by both mappings against the kernel's."
    head, poses, points, slot = scene()
    eyes = head.regions['left_eye_region'] | head.regions['right_eye_region']
    o = np.tile(np.float32([.02, 0, .8]), (len(points), 1))
    rays = slot, o, (points - o)/(o - points)[:, 2:], np.random.default_rng(1).uniform(.68, .76, (len(points), 3))
    for mapping in ('smooth', 'triangle'):
        d = Deformer(head.canonical().numpy(), head.faces, mouth_amount(head, poses[0]), head.regions['face'], eyes, mapping)
        here, there = d.march(d.poses(poses), *rays), d.march(d.poses(poses, device), *rays)
        assert all(t.device.type == torch.device(device).type for t in there)
        like(there.height, here.height, 1e-6)
        same = here.face == there.face.cpu()                                   # the others are ties
        assert same.float().mean() > .8
        for name in ('x', 'mouth', 'direction'): like(getattr(there, name).cpu()[same], getattr(here, name)[same], 1e-5 if name == 'x' else 1e-4)


def step(device, folder, backend):
    "Loss and gradients of one training step, everything in single precision."
    here, there = avatar_on('cpu', config('torch')), avatar_on(device, config(backend))
    for p, q in zip(here.field.parameters(), there.field.parameters()): q.data.copy_(p.data)
    trainers = [trainer_on(None, here), trainer_on(device, there)]             # kernel's march, torch's march
    found = [t.gradients(Batch(t.pool, 0, 0)) for t in trainers]
    np.testing.assert_allclose(*found, rtol=1e-3)
    for p, q in zip(here.field.parameters(), there.field.parameters()): like(q.grad, p.grad, 1e-7 + .02*float(p.grad.abs().max()))
    trainers[1].one()
    assert all(torch.isfinite(p).all() for p in there.field.parameters())


def short_fit(device, folder, backend, **changes):
    "The loss falls."
    trainer = trainer_on(device, avatar_on(device, config(backend, **changes)), 60)
    rows = trainer.run()
    values = [r['loss'] for r in rows]
    assert values[-1] < .9*values[0] and rows[-1]['memory_mb'] > 0


def every_switch(device, folder, backend):
    "Grid, patches, corrections, codes and offsets at once."
    c = config(backend, distortion=.01, patch=.1, pose_rate=1e-4, told_rate=1e-3, occupancy=16)
    trainer = trainer_on(device, avatar_on(device, replace(c, field=replace(c.field, appearance=3, offset=8))), 3)
    for _ in range(3):
        assert np.isfinite(trainer.one())
        trainer.step += 1


def half(device, folder, backend):
    "Half precision with scaled gradients."
    c = config(backend)
    trainer = trainer_on(device, avatar_on(device, replace(c, field=replace(c.field, precision='float16'))), 60)
    assert trainer.scaler.is_enabled()
    values = [r['loss'] for r in trainer.run()]
    assert values[-1] < .9*values[0] and trainer.scaler.get_scale() > 1


def resume(device, folder, backend):
    "A training that was killed there goes on there, from the same weights and moments."
    class Killed(Exception): pass
    def kill(row):
        if row['step'] == 5: raise Killed
    film, c = toy()[1], config(backend, occupancy=16)
    try: avatar_on(device, c).fit(film, 8, folder=folder, every=0, log_every=1, log=kill)
    except Killed: pass
    again = avatar_on(device, c)
    assert [r['step'] for r in again.fit(film, 8, folder=folder, every=0, log_every=1)] == list(range(1, 9))
    assert all(torch.isfinite(p).all() for p in again.shown.parameters())


def file(device, folder, backend):
    "Saved there, loaded here, and the other way round: the same weights, nearly the same picture, and training goes on."
    avatar, film, camera = avatar_on(device, config(backend)), toy()[1], facing_camera(2.2*48, 48, 48)
    avatar.fit(film, 20)
    here = Avatar.load(avatar.save(folder/'there'))
    there = Avatar.load(here.save(folder/'here'), device=device)
    for p, q, r in zip(avatar.shown.parameters(), here.shown.parameters(), there.shown.parameters()):
        assert q.device.type == 'cpu' and r.device.type == torch.device(device).type and torch.equal(p.cpu(), q) and torch.equal(p, r)
    pictures = [next(a.render(film.motion, camera, frames=[3])) for a in (here, there)]
    premultiplied = [p[..., :3]*p[..., 3:] for p in pictures]
    assert pictures[0][..., 3].max() > .3 and np.abs(premultiplied[0] - premultiplied[1]).max() < .02
    for a in (here, there): a.fit(film, 2)


def render(device, folder, backend):
    "A view of an untrained field, by the CPU's kernel and there."
    head, poses, *_ = scene()
    torch.manual_seed(0)
    here = Field(field_config(**GRID, precision='float32'))
    with torch.no_grad():
        here.grid.params.normal_(0, .5)
        here.density_network[-1].bias[0] = 2.
    there = Field(replace(here.config, backend=backend)).to(device)
    there.load_state_dict(here.state_dict())
    deformer, widths = Deformer(head.canonical().numpy(), head.faces, mouth_amount(head, poses[0])), band_widths(head, poses[0])[1]
    see = lambda field, **how: render_view(field, deformer, poses[1], studio_camera(32), widths, np.linspace(-1, 1, 16), **how)
    a, b = see(here, scouts=False), see(there, backend='torch')
    assert a[..., 3].max() > .5 and np.abs(a[..., 3] - b[..., 3]).max() < .01 and np.abs(a[..., :3]*a[..., 3:] - b[..., :3]*b[..., 3:]).max() < .02


def recorded(device, folder, backend):
    "Steps replayed from a recording, and step by step: the same losses."
    trainers = [trainer_on(device, avatar_on(device, config(backend)), 12) for _ in range(2)]
    trainers[1].replayed = trainers[1].by_torch
    losses = []
    for trainer in trainers:
        assert trainer.records
        losses.append([])
        while trainer.step < trainer.steps:
            losses[-1].append(trainer.one())
            trainer.step += 1
    assert trainers[0].recorded and trainers[0].records and trainers[1].recorded is None and len(set(losses[0])) == 12
    np.testing.assert_allclose(*losses, rtol=.01)     # sums in another order


def tinycudann(device, module):
    "tinycudann against the torch reference: our parameters in its module, and its own in ours; features, the table's gradient, and harmonics."
    torch.manual_seed(0)
    reference = HashGrid(*(4, 2, 10, 8, 1.6), backend='torch').to(device)
    with torch.no_grad(): reference.params.normal_()
    native = module.Encoding(3, reference.config, dtype=torch.float32).to(device)
    assert native.params.shape == reference.params.shape
    x, up = torch.rand(2048, 3, device=device), torch.randn(2048, 8, device=device)
    for take, give in ((native, reference), (reference, native)):              # ours there, then what it began with here
        with torch.no_grad(): take.params.copy_(give.params)
        for m in (native, reference):
            m.params.grad = None
            (m(x).float()*up).sum().backward()
        like(native(x), reference(x), 1e-4)
        like(native.params.grad, reference.params.grad, 1e-4*float(reference.params.grad.abs().max()) + 1e-6)
        with torch.no_grad(): native.params.uniform_(-1, 1)
    d = torch.nn.functional.normalize(torch.randn(256, 3, device=device), dim=-1)
    like(module.Encoding(3, dict(otype='SphericalHarmonics', degree=4), dtype=torch.float32).to(device)((d + 1)/2), spherical_harmonics(d), 1e-4)


BODIES = [encoder, field, nearest, march, step, short_fit, every_switch, half, resume, file, render]
