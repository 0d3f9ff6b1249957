"Training, resume, file and animation of an avatar."
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import ophav_nb  # noqa: F401
import ophav_nb.avatar as avatar_module
from ophav_nb.avatar import Avatar, AvatarConfig, Batch, FramePool, Trainer, lids_told, toy_film
from ophav_nb.dataset import UNKNOWN, HeadDataset
from ophav_nb.field import field_config
from ophav_nb.geometry import facing_camera
from ophav_nb.head import HeadModel, Motion
from ophav_nb.run import InputError

from meshes import lenses

SMALL = AvatarConfig(rays=128, samples=4, frames=4, field=field_config(levels=4, features=4, log2_size=10, scale=1.6))
CAMERA = facing_camera(2.2*48, 48, 48)


@pytest.fixture(scope='module')
def head(): return HeadModel.load()


@pytest.fixture(scope='module')
def film(head): return toy_film(head, 8, 48, test=2)


@pytest.fixture(scope='module')
def trained(head, film):
    avatar = Avatar.create(head, film.shape, SMALL)
    return avatar, avatar.fit(film, 60, log_every=10)


def same(a, b): return all(torch.equal(p, q) for x, y in ((a.field, b.field), (a.shown, b.shown)) for p, q in zip(x.parameters(), y.parameters()))


def test_it_learns(trained):
    rows = trained[1]
    assert [r['step'] for r in rows] == list(range(10, 61, 10)) and rows[-1]['loss'] < .9*rows[0]['loss']
    assert set(rows[0]) == {'step', 'loss', 'psnr', 'samples_per_second', 'memory_mb'}


def test_the_last_row_is_a_mean_of_its_own_steps(head, film):
    each, few = (Avatar.create(head, film.shape, SMALL).fit(film, 6, log_every=n) for n in (1, 4))
    assert [r['step'] for r in few] == [4, 6]
    assert [r['loss'] for r in few] == pytest.approx([np.mean([r['loss'] for r in part]) for part in (each[:4], each[4:])], abs=2e-6)


def test_memory_where_the_system_says_nothing(monkeypatch):
    def nothing(*_): raise OSError
    monkeypatch.setattr(avatar_module, 'status_mb', nothing)
    assert avatar_module.memory_mb() > 0
    monkeypatch.setitem(sys.modules, 'resource', None)     # as on Windows
    assert avatar_module.memory_mb() == 0


class Killed(Exception): pass


def test_sixty_steps_are_thirty_and_thirty(head, film, trained, tmp_path):
    def kill(row):
        if row['step'] == 31: raise Killed
    with pytest.raises(Killed): Avatar.create(head, film.shape, SMALL).fit(film, 60, folder=tmp_path, every=0, log_every=1, log=kill)
    again = Avatar.create(head, film.shape, SMALL)
    rows = again.fit(film, 60, folder=tmp_path, every=0, log_every=1)
    assert same(again, trained[0])
    assert [r['step'] for r in rows] == list(range(1, 61)) == [json.loads(line)['step'] for line in open(tmp_path/'log.jsonl')]


def test_speed_after_a_kill(head, film, tmp_path, monkeypatch):
    "Samples of steps before the kill come with their seconds: here each step takes one."
    clock = [0.]
    def step(self, one=Trainer.one):
        clock[0] += 1
        return one(self)
    monkeypatch.setattr(Trainer, 'one', step)
    monkeypatch.setattr(avatar_module.time, 'monotonic', lambda: clock[0])
    def stopped(self, checkpoint=Trainer.checkpoint):
        checkpoint(self)
        if self.step == 7: raise Killed
    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(Trainer, 'checkpoint', stopped)
        Avatar.create(head, film.shape, SMALL).fit(film, 8, folder=tmp_path, every=0, log_every=8)
    rows = Avatar.create(head, film.shape, SMALL).fit(film, 8, folder=tmp_path, every=0, log_every=8)
    assert [r['samples_per_second'] for r in rows] == [SMALL.rays*SMALL.samples]


def test_finished_training_is_not_redone(head, film, tmp_path):
    a = Avatar.create(head, film.shape, SMALL)
    a.fit(film, 3, folder=tmp_path)
    b = Avatar.create(head, film.shape, SMALL)
    b.fit(film, 3, folder=tmp_path, log=lambda row: pytest.fail('a step was done again'))
    assert same(a, b) and b.steps == 3


def test_another_training_in_the_same_folder_starts_anew(head, film, tmp_path, caplog):
    other = replace(film, rgb=255 - film.rgb)
    for data, more in ((film, {}), (other, {}), (other, dict(lr_scale=.5)), (other, dict(lr_scale=.5, samples=3))):
        caplog.clear()
        a, b = (Avatar.create(head, film.shape, SMALL) for _ in range(2))
        a.fit(data, 3, **more, log_every=1)
        b.fit(data, 3, folder=tmp_path, **more, log_every=1)
        assert same(a, b) and ('another training' in caplog.text) == (data is other)
        assert len((tmp_path/'log.jsonl').read_text().splitlines()) == 3


def test_other_first_weights_are_another_training(head, film, tmp_path, caplog):
    "An avatar of another seed does not go on from a killed one's checkpoint."
    def kill(row): raise Killed
    with pytest.raises(Killed): Avatar.create(head, film.shape, SMALL, seed=0).fit(film, 4, folder=tmp_path, every=0, log_every=3, log=kill)
    a, b = (Avatar.create(head, film.shape, SMALL, seed=1) for _ in range(2))
    a.fit(film, 4)
    b.fit(film, 4, folder=tmp_path)
    assert same(a, b) and 'another training' in caplog.text


def test_data_are_the_same_from_disk(head, film, tmp_path):
    "A run that was killed reads the data that its first call had in memory."
    images = np.concatenate([film.rgb, film.alpha[..., None]], -1)
    HeadDataset.from_frames(images, film.motion, film.shape, CAMERA, head, folder=tmp_path, test=2)
    avatar = Avatar.create(head, film.shape, SMALL)
    keys = []
    for data in (film, HeadDataset.load(tmp_path)):
        trainer = Trainer(avatar, data, 3, None, None, 0, 1., 30., 25)
        trainer.before = 0
        keys.append(trainer.identity())
    assert keys[0] == keys[1]


def test_file(trained, tmp_path):
    avatar = trained[0]
    avatar.save(tmp_path)
    again = Avatar.load(tmp_path)
    motion = Motion.still(1)
    motion.translation[:, 2], motion.expression[:, 5] = -.8, .3
    assert np.array_equal(next(avatar.render(motion, CAMERA)), next(again.render(motion, CAMERA)))
    assert same(avatar, again) and again.config == avatar.config and again.steps == 60


def spoiled(folder, name, change):
    "What an avatar with a changed file says."
    path = folder/name
    whole = path.read_bytes()
    path.write_bytes(change(whole))
    try:
        with pytest.raises(InputError) as told: Avatar.load(folder)
    finally: path.write_bytes(whole)
    return str(told.value)


def flipped(at, bit=4):
    "A file's content with one bit changed."
    def change(data):
        data = bytearray(data)
        data[at] ^= bit
        return bytes(data)
    return change


@pytest.mark.parametrize('at', [3, 40, 5000, -9])
def test_a_damaged_file_is_told_whatever_its_size(trained, tmp_path, at):
    "One bit in the header or among the weights; and what to do."
    trained[0].save(tmp_path)
    assert 'avatar.safetensors is damaged' in (told := spoiled(tmp_path, 'avatar.safetensors', flipped(at)))
    assert 'delete it and give the command that made' in told


def test_weights_that_are_missing(trained, tmp_path):
    trained[0].save(tmp_path)
    (tmp_path/'avatar.safetensors').unlink()
    with pytest.raises(InputError, match="avatar.safetensors is missing; .*give the command"): Avatar.load(tmp_path)


@pytest.mark.parametrize('at', range(3))
def test_saving_over_an_old_avatar_leaves_one_of_them(trained, tmp_path, monkeypatch, at):
    "Killed before each of the three renames: the old one before avatar.json is written, then the new one."
    old, new = trained[0], Avatar.create(trained[0].head, np.zeros(0, np.float32), trained[0].config, seed=5)
    old.save(tmp_path)
    count, whole = iter(range(9)), os.replace
    def replace(*paths):
        if next(count) == at: raise KeyboardInterrupt
        whole(*paths)
    monkeypatch.setattr(os, 'replace', replace)
    with pytest.raises(KeyboardInterrupt): new.save(tmp_path)
    monkeypatch.undo()
    assert same(Avatar.load(tmp_path), new if at == 2 else old)
    new.save(tmp_path)
    assert same(Avatar.load(tmp_path), new) and sorted(p.name for p in tmp_path.iterdir()) == ['avatar.json', 'avatar.safetensors']


def test_damage_of_the_description(trained, tmp_path):
    trained[0].save(tmp_path)
    for change in (lambda data: b'[]', lambda data: b'{', lambda data: b'{"format": 1}', lambda data: data.replace(b'"rays"', b'"rats"'), lambda data: data.replace(b'"focus": 0.25', b'"focus": 9.25'), lambda data: data.replace(b'"levels": 4', b'"levels": 5'), lambda data: data.replace(b'"format": 1', b'"format": ""')):
        assert 'damaged' in (told := spoiled(tmp_path, 'avatar.json', change)) and 'delete it and give the command' in told
    assert 'newer version' in spoiled(tmp_path, 'avatar.json', lambda data: data.replace(b'"format": 1', b'"format": 9'))


def test_an_avatar_of_before_its_file_was_hashed(trained, tmp_path):
    "It is loaded; damage of the header, which can be seen all the same, is told."
    trained[0].save(tmp_path)
    about = json.loads((tmp_path/'avatar.json').read_text())
    del about['sha256']
    (tmp_path/'avatar.json').write_text(json.dumps(about))
    assert same(Avatar.load(tmp_path), trained[0])
    for change in (flipped(3), flipped(40), lambda data: data.replace(b'told_range', b'tolt_range'), lambda data: data[:-8], lambda data: b''):
        assert 'is damaged' in (told := spoiled(tmp_path, 'avatar.safetensors', change)) and 'delete it and give the command' in told


def test_a_damaged_checkpoint_is_left(head, film, tmp_path, caplog):
    "Training starts anew, and says so."
    Avatar.create(head, film.shape, SMALL).fit(film, 4, folder=tmp_path, log_every=2)
    path = tmp_path/'checkpoint.safetensors'
    whole = path.read_bytes()
    for left in (flipped(8)(whole), flipped(7, 128)(whole), whole.replace(b'"sums"', b'"sumz"'), whole.replace(b'\\"halved', b'\\"halvee'), b'', bytes(99)):
        assert left != whole
        path.write_bytes(left)
        caplog.clear()
        assert [r['step'] for r in Avatar.create(head, film.shape, SMALL).fit(film, 4, folder=tmp_path, log_every=2)] == [2, 4]
        assert 'checkpoint.safetensors is damaged' in caplog.text


def test_training_goes_on_after_loading(trained, film, tmp_path):
    again = Avatar.load(trained[0].save(tmp_path))
    first = again.fit(film, 10, log_every=10, seed=1, lr_scale=.5)[0]
    assert first['loss'] < trained[1][0]['loss'] and again.steps == 70


def test_render(trained, film):
    frames = list(trained[0].render(film.motion, CAMERA, frames=[0, 3], samples=6))
    assert len(frames) == 2 and frames[0].shape == (48, 48, 4) and frames[0].dtype == np.float32
    assert frames[0][..., 3].max() > .5 and frames[0][0, 0, 3] == 0 and 0 <= frames[0].min() and frames[0].max() <= 1
    white = trained[0].render_image(translation=[0, 0, -.8], camera=CAMERA, background=1.)
    assert (white[0, 0] == 1).all()
    each = list(trained[0].render(film.motion[:2], [CAMERA, CAMERA.orbit(.3)]))
    assert np.abs(each[0] - each[1]).max() > .1


def test_long_films_keep_a_window(head, film):
    avatar = Avatar.create(head, film.shape, AvatarConfig(rays=64, samples=4, frames=2, cache=2, field=SMALL.field))
    pool = FramePool(film, avatar.deformer, avatar.widths, avatar.config, avatar.outer)
    assert pool.room < 6
    seen = {i for step in range(60) for i in Batch(pool, step, 0).frame}
    assert seen == set(np.flatnonzero(film.train))
    fresh = FramePool(film, avatar.deformer, avatar.widths, avatar.config, avatar.outer)
    assert np.array_equal(Batch(pool, 59, 0).truth.rgb, Batch(fresh, 59, 0).truth.rgb)     # a resumed training draws the same


def test_a_short_training_goes_once_around_a_long_film(head, film):
    avatar = Avatar.create(head, film.shape, AvatarConfig(rays=64, samples=4, frames=2, cache=2, field=SMALL.field))
    pool = Trainer(avatar, film, 18, None, None, 0, 1., 1e9, 10**9).pool
    window = lambda step: [pool.content(slot, step) for slot in range(pool.room)]
    assert pool.room == 2
    for i in np.flatnonzero(film.train): assert sum(i in window(step) for step in range(18)) == 18*2//6      # each as long as any other
    assert all(len(set(window(step))) == 2 for step in range(18))


def test_no_rays_beyond_the_films_picture(head, film):
    parsing = film.parsing.copy()
    parsing[:, :24] = UNKNOWN
    part, avatar = replace(film, parsing=parsing), Avatar.create(head, film.shape, SMALL)
    def rows(data):
        pool = FramePool(data, avatar.deformer, avatar.widths, SMALL, avatar.outer, avatar.lids)
        pool.load(0, 0)
        return pool.rays[0][0]//48
    assert rows(film).min() < 24 <= rows(part).min()


def test_divergence_is_survived(head, film, caplog):
    avatar = Avatar.create(head, film.shape, SMALL)
    def poison(row):
        if row['step'] == 2: avatar.field.density_network[0].weight.data[0, 0] = torch.nan
    rows = avatar.fit(film, 6, log=poison, log_every=1)
    assert [r['step'] for r in rows] == [1, 2, 4, 5, 6] and max(r['psnr'] for r in rows) < 50
    assert all(torch.isfinite(p).all() for p in avatar.shown.parameters()) and 'not finite' in caplog.text


@pytest.mark.parametrize('backend', ['auto', 'torch'])
def test_gradients_that_are_no_numbers_are_left_out(head, film, backend, caplog):
    "A step whose loss is finite, but not its gradients, reaches neither the weights nor their average."
    avatar = Avatar.create(head, film.shape, replace(SMALL, field=replace(SMALL.field, backend=backend, precision='float32')))
    trainer = Trainer(avatar, film, 9, None, None, 0, 1., 1e9, 10**9)
    trainer.condition = film.condition
    for trainer.step in range(3): trainer.one()
    average, batch = [p.clone() for p in avatar.shown.parameters()], trainer.batch(3)
    weights = [p.clone() for p in avatar.field.parameters()]
    batch.truth.weight[:] = 1e38
    with torch.no_grad():                                # the same function by large outputs of a layer, and small weights of the next
        for k, factor in ((0, 1e6), (-1, 1e-6)): avatar.field.density_network[k].weight.mul_(factor)
        avatar.field.density_network[0].bias.mul_(1e6)
    trainer.ahead, trainer.step = (3, batch), 3
    assert np.isnan(trainer.one()) and trainer.halved == 1 and 'gradients are not finite' in caplog.text
    assert all(torch.equal(p, q) and torch.equal(p, s) for p, q, s in zip(avatar.field.parameters(), average, avatar.shown.parameters()))
    assert not all(torch.equal(p, q) for p, q in zip(avatar.field.parameters(), weights))
    trainer.step = 4
    assert np.isfinite(trainer.one())
    avatar.shown.density_network[0].weight[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match='averaged weights'): trainer.recover()


def test_frames_are_told_their_expression_with_noise(head, film):
    "All rays of a frame the same, another in each step, the same again when a training is resumed; as much as the film's expressions differ."
    def trainer(noise): return Trainer(Avatar.create(head, film.shape, replace(SMALL, told_noise=noise)), film, 9, None, None, 0, 1., 1e9, 10**9)
    plain, noisy = trainer(0.), trainer(.5)
    a, b = plain.batch(3), noisy.batch(3)
    assert np.array_equal(a.jitter, b.jitter) and np.array_equal(a.frame, b.frame)      # all else is drawn as without
    assert np.array_equal(plain.told(a), plain.condition[a.frame])
    away = noisy.told(b) - noisy.condition[b.frame]
    assert np.array_equal(noisy.told(b), trainer(.5).told(noisy.batch(3))) and not np.array_equal(away, noisy.told(c := noisy.batch(4)) - noisy.condition[c.frame])
    each = len(b.frame)//SMALL.frames
    assert all(np.ptp(away[k:k + each], 0).max() < 1e-6 for k in range(0, len(away), each))
    many = np.concatenate([(noisy.told(c) - noisy.condition[c.frame])[::each] for c in map(noisy.batch, range(40))])
    moved, lids = noisy.spread > 1e-3, lids_told(head)
    assert lids.sum() == 2 and not away[:, lids].any()                                   # lids are told as they are: half shut is not nearly open
    assert np.allclose(many.std(0)[moved]/noisy.spread[moved], .5, rtol=.3) and np.abs(many[:, ~moved]).max(initial=0) < 1e-2


def test_errors(head, film, trained, tmp_path):
    with pytest.raises(InputError, match='holds no avatar'): Avatar.load(tmp_path)
    with pytest.raises(InputError, match='retarget'): next(trained[0].render(Motion.still(1, basis='flame'), CAMERA))
    with pytest.raises(InputError, match='preset'): AvatarConfig.preset('huge')


def test_kernels_are_compiled_ahead(monkeypatch):
    "Once, in a process of its own; not where a cache holds them or none can be kept."
    started = []
    monkeypatch.setattr(avatar_module.subprocess, 'Popen', lambda *a, **k: started.append(a) or 'process')
    for compiled, expected in ((True, None), (None, None), (False, 'process')):
        monkeypatch.setattr(avatar_module, 'view_compiled', lambda: compiled)
        assert avatar_module.compile_ahead() == expected
    assert len(started) == 1 and 'compile_kernels()' in started[0][0][-1]


def test_training_finds_what_was_compiled_ahead(tmp_path):
    "The toy's arrays are of the same types as a run's: nothing is left to compile when this one trains and renders."
    code = f"""
import numba, ophav_nb
from ophav_nb import avatar, render, training, deform, nearest, encoding, geometry
from ophav_nb.avatar import Avatar, compile_kernels, toy_film
from ophav_nb.dataset import HeadDataset
from ophav_nb.head import HeadModel
compile_kernels()
known = lambda: {{(m.__name__, k): len(v.signatures) for m in (avatar, render, training, deform, nearest, encoding, geometry) for k, v in vars(m).items()
                  if isinstance(v, numba.core.dispatcher.Dispatcher)}}
head = HeadModel.load()
film = toy_film(head, 2, 96, 0)
HeadDataset.from_frames(film.rgba(slice(None)), film.motion, film.shape, film.camera(0), head, folder=r'{tmp_path}')
before = known()
data = HeadDataset.load(r'{tmp_path}')
made = Avatar.create(head, data.shape)
made.fit(data, 1)
next(iter(made.render(data.motion[:1], data.camera(0).resized(128, 128))))
assert known() == before, [k for k, n in known().items() if n != before[k]]
assert render.view_compiled() is not False
"""
    subprocess.run([sys.executable, '-c', code], check=True)


HALF = replace(SMALL, field=replace(SMALL.field, precision='float16', backend='torch'))


def test_half_precision_learns_and_resumes(head, film, tmp_path):
    "With scaled gradients, as on an older GPU; the scale is part of the checkpoint."
    one = Avatar.create(head, film.shape, HALF)
    rows = one.fit(film, 30, log_every=10)
    assert rows[-1]['loss'] < .95*rows[0]['loss']
    def kill(row):
        if row['step'] == 21: raise Killed
    with pytest.raises(Killed): Avatar.create(head, film.shape, HALF).fit(film, 30, folder=tmp_path, every=0, log_every=1, log=kill)
    assert avatar_module._read_metadata(tmp_path/'checkpoint.safetensors')['scaler']['scale'] >= 1
    two = Avatar.create(head, film.shape, HALF)
    two.fit(film, 30, folder=tmp_path, every=0, log_every=1)
    assert same(one, two)


def test_a_step_that_overflows_is_left_out(head, film):
    avatar = Avatar.create(head, film.shape, HALF)
    avatar.told_range = np.float32([[-9]*16, [9]*16])
    trainer = Trainer(avatar, film, 3, None, None, 0, 1., 30., 25)
    scale, gradients = trainer.scaler.get_scale(), trainer.gradients
    def too_much(batch):
        found = gradients(batch)
        avatar.field.grid.params.grad[7] = torch.inf
        return found
    before = [p.clone() for p in avatar.field.parameters()]
    trainer.gradients = too_much
    trainer.one()
    assert all(torch.equal(p, q) for p, q in zip(avatar.field.parameters(), before)) and trainer.scaler.get_scale() == scale/2
    trainer.gradients = gradients
    trainer.one()
    assert not torch.equal(avatar.field.grid.params, before[0]) and all(torch.isfinite(p).all() for p in [*avatar.field.parameters(), *avatar.shown.parameters()])


def test_nothing_is_scaled_where_nothing_is_half(head, film):
    assert not any(Trainer(Avatar.create(head, film.shape, c), film, 3, None, None, 0, 1., 30., 25).scaler.is_enabled() for c in (SMALL, replace(SMALL, occupancy=8)))


def test_glasses_are_part_of_an_avatar(head, film, tmp_path):
    "It learns a thing that is worn where it stands, whatever is drawn behind it, and keeps it in its file; a dataset without that is another head's."
    worn = lenses(head)
    data = HeadDataset.from_frames(film.rgba(slice(None)), film.motion, film.shape, CAMERA, head, worn=worn)
    avatar = Avatar.create(head.of_person(data.offset, data.worn), data.shape, SMALL)
    assert len(avatar.deformer.worn) == len(worn.faces) and avatar.deformer.mouth[head.n_vertices:].max() == 0
    np.testing.assert_array_equal(avatar.outer[-len(worn.faces):], avatar.deformer.worn)
    avatar.fit(data, 2)
    again = Avatar.load(avatar.save(tmp_path))
    assert same(avatar, again) and (again.deformer.worn == avatar.deformer.worn).all()
    a, b = (next(iter(x.render(film.motion[:1], CAMERA))) for x in (avatar, again))
    np.testing.assert_array_equal(a, b)
    with pytest.raises(InputError, match='mesh'): avatar.fit(film, 1)
