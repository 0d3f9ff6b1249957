"Protocols and tables; the whole protocol on a short film that is made here, with a stand-in avatar."
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import ophav_nb.evaluate as evaluate
from ophav_nb.evaluate import (PRESETS, Comparison, EvaluationPreset, compared_frames, comparison, evaluate_clip, evaluate_run, example_film, pick_preset,
                               results_table)
from ophav_nb.pipeline import Preset, create
from ophav_nb.run import InputError, Run

CLIPS = Path(__file__).resolve().parents[2]/'shared/data/clips'


def test_compared_frames():
    numbers, spread = compared_frames(100, 10, 12)
    assert list(numbers[:spread]) == list(range(1, 100, 10)) and (np.diff(numbers[spread:]) == 1).all() and len(numbers) == spread + 12
    numbers, spread = compared_frames(6, 10, 12)
    assert list(numbers) == [1, 1, 2, 3, 4, 5] and spread == 1
    assert list(compared_frames(20, 5, 0)[0]) == [1, 6, 11, 16]
    seen = ~np.isin(np.arange(40), [0, 1, 11, 20])
    numbers, spread = compared_frames(40, 5, 8, 3, seen)
    assert list(numbers[:spread]) == [3, 8, 13, 18, 23, 28, 33, 38] and seen[numbers].all() and (np.diff(numbers[spread:]) == 1).all() and len(numbers) == spread + 8

    with pytest.raises(InputError, match='no face in the frames to compare'): compared_frames(24, 3, 6, 19, np.arange(24) < 19)


def test_a_film_with_nothing_to_compare_is_refused_before_training(tmp_path, monkeypatch):
    film = SimpleNamespace(frames=np.zeros((24, 2, 2, 3)), track=SimpleNamespace(ok=np.arange(24) < 19, first=0, landmarks=np.zeros((24, 478, 3), np.float32)))
    for name, value in dict(Detector=lambda device: None, add_clip=lambda *a: film, add_photometric=lambda run, film, head: film, add_truth=lambda *a: range(24)).items(): monkeypatch.setattr(evaluate, name, value)
    monkeypatch.setattr(evaluate, 'Avatar', None)
    with pytest.raises(InputError, match='no face in the frames'): evaluate.monocular_protocol(Run(tmp_path/'run', {}), 'film.mp4', PRESETS['smoke'], None)


def test_the_portrait_shows_the_face(monkeypatch):
    "A film that fades in: its first frames hold no face."
    track = SimpleNamespace(first=2, frame=lambda i: f'frame {i}')
    film = SimpleNamespace(frames=np.arange(5*12, dtype=np.uint8).reshape(5, 2, 2, 3), matte=np.zeros((5, 2, 2), np.float16), track=track)
    portrait = evaluate.first_frame(film)
    assert portrait.track == 'frame 2' and (portrait.image == film.frames[2]).all()


def test_presets():
    assert pick_preset('smoke') is PRESETS['smoke'] and pick_preset(PRESETS['quick']) is PRESETS['quick']
    with pytest.raises(InputError, match='unknown preset'): pick_preset('fast')
    assert all(p.size <= p.crop for p in PRESETS.values())


def test_errors_come_first(tmp_path):
    "Bad input is refused before anything is written."
    film = tmp_path/'film.mp4'
    film.write_bytes(b'no film')
    out = tmp_path/'out'
    with pytest.raises(InputError, match='unknown protocol'): evaluate_clip(film, out, protocol='other')
    with pytest.raises(InputError, match='unknown preset'): evaluate_clip(film, out, preset='other')
    with pytest.raises(InputError, match='no part in --protocol monocular'): evaluate_clip(film, out, protocol='monocular', restorer='none')
    with pytest.raises(InputError, match='--rounds -1'): evaluate_clip(film, out, rounds=-1)
    with pytest.raises(InputError, match='no such film'): evaluate_clip(tmp_path/'none.mp4', out)
    with pytest.raises(InputError, match='not a run'): evaluate_run(tmp_path, film, out)
    assert not out.exists()
    with pytest.raises(InputError): evaluate_clip(film, out, preset='smoke')
    assert not out.exists()


def test_table():
    row = dict(psnr_head=20.123, ssim_head=.8765, landmark_distance=2., identity_distance=None, sharpness=float('nan'))
    text = results_table(dict(rows=dict(source=row, round1=row), chosen='round1', truth=dict(sharpness=3.)))
    lines = text.splitlines()
    assert len(lines) == 5 and lines[4].startswith('| round1 * |') and '20.12' in lines[3] and '0.876' in lines[3] and '–' in lines[3]


def test_strip():
    pictures = np.zeros((4, 20, 30, 3), np.uint8)
    assert comparison(dict(a=pictures, b=pictures), np.array([0, 3])).shape == (40, 70 + 2*24, 3)


class Measured:
    "In place of metrics.Truth: the mean difference from the truth is the measure."
    made = 0

    def __init__(self, frames, alphas, detector, landmarks, known):
        Measured.made += 1
        self.frames, self.landmarks, self.found, self.seen = frames, landmarks, landmarks, np.ones(len(frames), bool)

    def score(self, images, portrait=None): return dict(psnr_head=float(np.abs(images - self.frames.astype(float)).mean()), sharpness_truth=1.)


@pytest.fixture
def film(monkeypatch):
    monkeypatch.setattr(evaluate, 'Truth', Measured)
    monkeypatch.setattr(evaluate, 'identity_embedding', lambda images, points: np.zeros((len(images), 128)))
    monkeypatch.setattr(evaluate, 'detect_like', lambda detector, images, near: np.broadcast_to(near, (len(images), 478, 3)))
    rgb = np.random.default_rng(0).integers(0, 255, (30, 16, 16, 3), np.uint8)
    rgba = lambda i: np.dstack([rgb[i], np.full((16, 16), 255, np.uint8)])
    return SimpleNamespace(rgb=rgb, alpha=np.full((30, 16, 16), 255, np.uint8), rgba=rgba, landmarks=np.random.default_rng(1).random((30, 478, 3)))


class Real(SimpleNamespace):
    "What of a dataset a comparison asks for."
    def __len__(self): return 30
    def known(self, i): return self.parsing[i] != 255


def test_rows_are_kept(tmp_path, film):
    real, run = Real(**vars(film), parsing=np.zeros(film.alpha.shape, np.uint8)), Run(tmp_path/'run', {})
    run.make('truth', lambda folder: None)
    calls = []
    def images(kind):
        calls.append(kind)
        return table.images if kind == 'same' else 255 - table.images
    table = Comparison(run, real, film.landmarks, None, 5, 6)
    row = table.add('same', lambda: images('same'))
    assert row['psnr_head'] == 0 and row['flicker'] == 1. and row['frames'] == table.spread and 'sharpness_truth' not in row
    assert table.add('negative', lambda: images('negative'))['psnr_head'] > 0
    assert (table.rows['same'][0] == table.images).all()
    again = Comparison(run, real, film.landmarks, None, 5, 6)
    assert again.add('same', lambda: images('same')) == row and calls == ['same', 'negative']
    for name in ('measures.json', '00000.png'):
        path = run.path('rows/same', name)
        whole = path.read_bytes()
        path.write_bytes(bytes(len(whole)))             # as long as before: not seen by its size
        with pytest.raises(InputError, match=f'{name} is .*damaged; delete it and give the command that made this folder .*evaluate'): again.add('same', lambda: images('same'))
        path.write_bytes(whole)


def test_a_lost_face_counts_in_no_landmark_distance(tmp_path, film):
    real, run = Real(**vars(film), parsing=np.zeros(film.alpha.shape, np.uint8)), Run(tmp_path/'run', {})
    table = Comparison(run, real, film.landmarks, None, 5, 6)
    table.truth.found = table.truth.landmarks.copy()
    table.truth.found[1] += 100
    row = table.measure(table.images)
    assert row['landmark_distance_lips'] > 1
    table.truth.seen[1] = False
    row = table.measure(table.images)
    assert row['landmark_distance_lips'] == row['landmark_distance_lids'] == 0


@pytest.mark.clips
@pytest.mark.skipif(not CLIPS.exists(), reason='the development clips are not here')
def test_clip_smoke(tmp_path):
    "The protocol `self` on a real clip at the smallest size, and that a second call does nothing."
    result = evaluate_clip(CLIPS/'glasses_lab.mp4', tmp_path/'out', preset='smoke', rounds=1)
    assert list(result['rows']) == ['source', 'coarse', 'round0', 'round1'] and result['chosen'] in result['rows']
    names = {'psnr_head', 'psnr_interior', 'ssim_head', 'landmark_distance', 'identity_distance', 'sharpness', 'flicker'}
    assert all(names <= set(row) for row in result['rows'].values())
    assert result['rows']['coarse']['landmark_distance'] < result['rows']['source']['landmark_distance']
    assert json.loads((tmp_path/'out/metrics.json').read_text())['protocol'] == 'self'
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/'out').rglob('*.npy')}
    evaluate_clip(CLIPS/'glasses_lab.mp4', tmp_path/'out', preset='smoke', rounds=1)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path/'out').rglob('*.npy')}


def test_an_avatar_driven_by_a_film_is_compared_with_its_animator(tmp_path):
    "The protocol `cross` on a small avatar: its rows, that it follows the animator, and that a second call renders nothing anew."
    run = create('astronaut', tmp_path/'run', preset=Preset(192, 64, 16, 80, 0, 4, .3, 64), rounds=0)
    film, tiny = example_film(tmp_path/'film.mp4', seconds=.7, seed=5), EvaluationPreset(192, 64, 8, 2, 0, 0, 0)
    result = evaluate_run(run, film, tmp_path/'out', tiny)
    coarse, avatar = result['rows']['coarse'], result['rows']['avatar']
    assert result['protocol'] == 'cross' and 'psnr_coarse' not in coarse
    assert avatar['psnr_coarse'] > 12 and avatar['psnr_coarse_interior'] > 15 and coarse['sharpness_of_portrait'] > .7
    assert results_table(result).splitlines()[0].startswith('| row | psnr_coarse |')
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/'out').rglob('*.png') if p.parent.parent.name == 'rows'}
    assert evaluate_run(run, film, tmp_path/'out', tiny)['rows'].keys() == result['rows'].keys() and before
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_mattes_are_written_in_pieces(tmp_path):
    alpha = np.random.default_rng(0).random((10, 4, 4)).astype(np.float32)
    evaluate.write_mattes(tmp_path/'matte.npy', alpha, 3)
    assert np.array_equal(np.load(tmp_path/'matte.npy'), alpha.astype(np.float16))


def test_a_frame_that_breaks_is_seen_without_a_truth(monkeypatch):
    told = np.random.default_rng(0).random((9, 478, 3))*100
    found = told + np.random.default_rng(1).normal(0, .1, told.shape)
    found[4] += 5*np.sin(np.arange(478))[:, None]
    monkeypatch.setattr(evaluate, 'detect_like', lambda detector, images, near: found if len(images) == 9 else near)
    monkeypatch.setattr(evaluate, 'identity_embedding', lambda images, points: np.zeros((len(images), 128)))
    monkeypatch.setattr(evaluate, 'network_metrics', lambda *a, **k: {})
    row = evaluate.measure_driven(np.zeros((9, 32, 32, 3), np.uint8), told, told, np.zeros((32, 32, 3), np.uint8), told[:1], None)
    assert row['landmark_distance_worst'] > 4 and row['landmark_distance'] > 0


def test_a_film_to_try_it_with(tmp_path):
    from ophav_nb.media import clip_info
    info = clip_info(example_film(tmp_path/"film.mp4", seconds=.5))
    assert info.frames == 4 and (info.width, info.height) == (256, 256)
