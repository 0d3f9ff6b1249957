"The whole way through each backend, with networks whose weights are drawn; what is missing is said before anything is made."
import importlib.util
import json
import shutil
from types import SimpleNamespace

import golden_fill
import numpy as np
import pytest
import safetensors.torch
from test_animators import small

from ophav_nb import evaluate, metrics, pipeline, regions, restore, weights
from ophav_nb.animators import NETWORKS, make_baseline
from ophav_nb.cli import main
from ophav_nb.dataset import HeadDataset
from ophav_nb.detect import Detector
from ophav_nb.head import HeadModel, Motion
from ophav_nb.media import VideoWriter, read_image, read_stored, read_video
from ophav_nb.nets.arcface18 import ArcFace18
from ophav_nb.nets.bisenet import BiSeNet
from ophav_nb.nets.blocks import half_precision
from ophav_nb.nets.deep3d import Deep3D
from ophav_nb.nets.fan import FAN
from ophav_nb.nets.fomm import Fomm
from ophav_nb.nets.mica import Mica
from ophav_nb.nets.pirender import PIRenderer
from ophav_nb.nets.retinaface import RetinaFace
from ophav_nb.nets.rvm import RobustVideoMatting
from ophav_nb.nets.s3fd import S3FD
from ophav_nb.pipeline import Lookers, Preset, create, load_portrait
from ophav_nb.run import InputError, Run
from ophav_nb.track import Track, track_film

TINY = Preset(192, 48, 5, 12, 6, 3, .2, 64)
GOLDEN = dict(rvm=(RobustVideoMatting, 'rvm_mobilenetv3'), bisenet=(BiSeNet, 'bisenet_19'),
              arcface18=(ArcFace18, 'csim_otavatar'), fan=(FAN, 'fan4_2d'), deep3d=(Deep3D, 'deep3dfacerecon_resnet50'),
              fomm=(Fomm, 'fomm_vox256'), mica=(Mica, 'mica'), pirender=(PIRenderer, 'pirender_face'),
              s3fd=(S3FD, 's3fd'), retinaface=(RetinaFace, 'retinaface_r50'))


def keep(name: str, tensors: dict):
    "Tensors into the cache, as `ophav weights add` keeps them."
    folder = weights.weights_folder()
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({k: t.clone().contiguous() for k, t in tensors.items()}, folder/f'{name}.safetensors')


def put(*names: str):
    "Drawn weights of these networks."
    for name in names:
        build, known = GOLDEN[name]
        net = build()
        for part, rules in golden_fill.manifest(known)['parts'].items(): golden_fill.fill(net.get_submodule(part), rules['rules'], rules['gain'])
        keep(name, net.state_dict())


@pytest.fixture(params=['facevid2vid', 'liveportrait'])
def animator(request, monkeypatch):
    "A network animator that is small and cheap, with files in the cache that say it is there."
    for row in weights.BACKENDS['animator'][request.param]: keep(row, {})
    monkeypatch.setattr(NETWORKS[request.param], 'load', staticmethod(lambda device: small(request.param)))
    return request.param


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    "A cache without weights."
    monkeypatch.setenv('OPHAV_HOME', str(tmp_path/'home'))


def up_to_dataset(folder, **options):
    "The run as far as the field's training, which is the same for all backends."
    with pytest.MonkeyPatch.context() as patch:
        for name in ('train_rounds', 'add_film', 'add_views', 'write_run_report'): patch.setattr(pipeline, name, lambda *_: None)
        return create('astronaut', folder, preset=TINY, rounds=0, **options)


@pytest.fixture(scope='module')
def base(tmp_path_factory): return up_to_dataset(tmp_path_factory.mktemp('base')/'run').folder


def again(base, tmp_path, make=up_to_dataset, **options):
    "The same run with other options: what they do not touch is there already."
    shutil.copytree(base, tmp_path/'run')
    return make(tmp_path/'run', **options)


@pytest.mark.parametrize('option, name, licence', [('detector', 's3fd', 'BSD-3'), ('detector', 'retinaface', 'MIT'), ('matte', 'rvm', 'GPL-3.0'), ('parser', 'bisenet', 'CelebAMask-HQ'), ('restorer', 'gfpgan', 'Apache-2.0'), ('restorer', 'gfpgan-parsing', 'Apache-2.0'),
                                                   ('animator', 'facevid2vid', 'CC BY-NC'), ('animator', 'liveportrait', 'MIT')])
def test_missing_weights_are_said_first(tmp_path, capsys, option, name, licence):
    out = tmp_path/'run'
    assert main(['create', 'astronaut', '--out', str(out), f'--{option}', name]) == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and licence in said and 'ophav weights add' in said and not out.exists()
    assert next(w.file for w in weights.WEIGHTS if w.name.startswith(name.split('-')[0])) in said


def test_unknown_and_useless_options(tmp_path):
    for option in ('matte', 'parser', 'detector', 'animator', 'restorer'):
        with pytest.raises(InputError, match=f'unknown {option}.*choose one of'): create('astronaut', tmp_path/'run', **{option: 'other'})
    with pytest.raises(InputError, match='--driving'): create('astronaut', tmp_path/'run', driving='film.mp4')
    assert not (tmp_path/'run').exists()


def test_network_animators(base, tmp_path, animator):
    run = again(base, tmp_path, animator=animator)
    assert len(HeadDataset.load(run.path('rounds', '0', 'dataset'))) == TINY.frames and run.path('coarse', 'track.npz').is_file()
    assert len(list(run.path('coarse', 'frames').glob('*.png'))) == len(read_video(run.path('coarse', 'video.mp4'))[0]) == TINY.frames
    assert not run.path('coarse', 'film').exists()
    assert json.loads(run.path('run.json').read_text())['parameters']['animator'] == animator


@pytest.mark.parametrize('animator', ['facevid2vid'], indirect=True)
def test_driving_film(base, tmp_path, animator):
    "Expressions from a film."
    picture = read_image('astronaut')[:300, 80:380]
    with VideoWriter(tmp_path/'film.mp4', 25) as film:
        for k in range(4): film.add(np.roll(picture, 2*k, 1))
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NETWORKS[animator], 'read_driving', lambda self, frames, track: seen.append((frames, track)))
        run = again(base, tmp_path, animator=animator, driving=tmp_path/'film.mp4')
    frames, track = seen[0]
    assert run.path('coarse', 'track.npz').is_file() and not run.path('coarse', 'film').exists()
    assert isinstance(frames, np.memmap) and frames.shape == (4, TINY.crop, TINY.crop, 3) and len(track) == 4      # stays on disk
    _, square, _, known = track_film(read_video(tmp_path/'film.mp4')[0], Detector(), HeadModel.load(), size=TINY.crop, matte=False)
    np.testing.assert_array_equal(frames, square)
    np.testing.assert_allclose(track.motion.joints, known.motion.joints, atol=1e-5)


def test_parser(base, tmp_path):
    put('bisenet')
    run = again(base, tmp_path, lambda folder, **options: create('astronaut', folder, preset=TINY, rounds=0, **options), parser='bisenet')
    assert run.has('avatar') and run.path('video.mp4').is_file()
    ours, before = (HeadDataset.load(folder/'rounds'/'0'/'dataset') for folder in (run.folder, base))
    assert (ours.parsing != before.parsing).any() and not ours.parsing[ours.alpha < 128].any() and (ours.alpha <= before.alpha).all()
    np.testing.assert_array_equal(ours.depth, before.depth)


def test_matte(base, tmp_path):
    put('rvm')
    run = again(base, tmp_path, matte='rvm')
    mattes = [read_image(folder/'portrait'/'matte.png').astype(float) for folder in (run.folder, base)]
    assert np.abs(mattes[0] - mattes[1]).max() > 10


@pytest.mark.skipif(not importlib.util.find_spec('gfpgan'), reason='the extra [pretrained] is not installed')
@pytest.mark.parametrize('mask', ['', '-parsing'])
def test_restorer(base, tmp_path, monkeypatch, mask):
    "A small GFPGAN from the cache restores the renders of a round."
    monkeypatch.setattr(restore, 'GFPGAN', restore.GFPGAN | dict(out_size=64, num_style_feat=32, channel_multiplier=1, num_mlp=2, narrow=.125))
    keep('gfpgan', restore.gfpgan_network().state_dict())
    run = again(base, tmp_path, lambda folder, **options: create('astronaut', folder, preset=TINY, rounds=1, **options), restorer='gfpgan' + mask, half=True)
    restored, renders = (sorted(run.path('rounds', '1', name).glob('[0-9]*.png')) for name in ('restored', 'renders'))
    assert len(restored) == len(renders) == TINY.round_frames and run.path('video.mp4').is_file()
    assert all((read_stored(a) != read_stored(b)).any() for a, b in zip(restored, renders))
    assert run.manifest('rounds/1/restored')['params']['settings'] == {'half': True}


def test_half_precision_is_one_switch(base, tmp_path):
    "What networks of others had a part in is made anew, and nothing else; the switch is off afterwards."
    put('bisenet')
    whole = again(base, tmp_path, parser='bisenet')
    keys = [whole.manifest(name)['key'] for name in ('portrait', 'coarse', 'rounds/0/dataset')]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        read = regions.bisenet.parse_faces
        patch.setattr(regions.bisenet, 'parse_faces', lambda *a, **how: (seen.append(half_precision()), read(*a, **how))[1])
        half = up_to_dataset(whole.folder, parser='bisenet', half=True)
    assert seen and all(seen) and not half_precision()
    assert [half.manifest(name)['key'] == key for name, key in zip(('portrait', 'coarse', 'rounds/0/dataset'), keys)] == [True, True, False]


def faces(n: int = 2):
    "Pictures, and landmarks that lie in them as a face's do."
    generator = np.random.default_rng(0)
    rows = {**{k: (8*k % 64, 8*(k//8) % 64) for k in range(478)}, 33: (16, 24), 133: (26, 24), 362: (38, 24), 263: (48, 24), 4: (32, 36), 61: (24, 48), 291: (40, 48)}
    points = np.array([[*rows[k], 0] for k in range(478)], np.float32)
    return generator.integers(0, 256, (n, 64, 64, 3), np.uint8), np.repeat(points[None], n, 0)


def test_csim_appears_with_its_weights():
    images, points = faces()
    assert metrics.network_metrics(images, points, images, points) == {} and set(metrics.NETWORKS) <= set(metrics.missing_metrics())
    put('arcface18')
    same, other = (metrics.network_metrics(images, points, truth, points) for truth in (images, images[::-1]))
    assert set(same) == {'csim'} and same['csim'] == pytest.approx(1, abs=1e-5) and other['csim'] < .9999
    moved = [metrics.network_metrics(images, points + 3, images, points, same=how)['csim'] for how in (True, False)]
    assert moved[0] == pytest.approx(1, abs=1e-5) and moved[1] < .9999      # only by their own points are they aligned apart
    assert set(metrics.missing_metrics()) == {'csim100', 'lpips', 'fid', 'aed', 'apd', 'akd'}
    assert 'same person' in metrics.missing_metrics({'psnr_head': 1.})['csim'] and 'csim' not in metrics.missing_metrics(same)


def test_other_network_measures():
    put('fan', 'deep3d', 'mica')
    images, points = faces(1)
    same, other = (metrics.network_metrics(images, points, truth, points) for truth in (images, images[:, ::-1]))
    assert same.pop('csim100') == pytest.approx(1, abs=1e-5) and other['csim100'] < .9999
    assert {'akd', 'aed_sum', 'aed_mean', 'apd_length', 'apd_angles_sum'} <= set(same) and not any(same.values())
    assert other['akd'] > 0 and other['aed_sum'] > other['aed_mean'] > 0
    assert set(metrics.missing_metrics()) == {'lpips', 'fid', 'csim'}


def short_film(base, n=3):
    "The portrait, thrice, as a film that has been followed."
    portrait, motion = load_portrait(Run.open(base)), Motion.load(base/'motion'/'train.npz')[:n]
    still = portrait.track
    track = Track(motion, still.shape, still.camera, np.repeat(still.landmarks, n, 0), np.zeros(n), np.ones(n, bool))
    return SimpleNamespace(frames=np.repeat(portrait.image[None], n, 0), matte=np.repeat(portrait.matte[None], n, 0), track=track)


def test_evaluation_through_a_network(base, tmp_path, animator):
    "The portrait moved as the film moves, expressions from the film itself."
    run = Run(tmp_path/'evaluation', {})
    with run:
        run.make('clip', lambda folder: None)
        coarse = evaluate.add_reenactment(run, short_film(base), SimpleNamespace(size=48), HeadModel.load(), animator)
    assert len(coarse) == 3 and coarse.rgb.shape[1:] == (48, 48, 3) and not run.path('rounds', '0', 'dataset', 'film').exists()


def test_evaluation_reads_regions_in_whole_pictures(base, tmp_path, monkeypatch):
    "The parser sees the film's own frames, and for the mesh animator the head over the portrait's background; only what it touches is redone."
    film, seen = short_film(base), []
    def parser(frames):
        seen.append(frames)
        return np.full(frames.shape[:3], 90 if len(seen) == 1 else 250, np.uint8)
    monkeypatch.setattr(evaluate, 'make_parser', lambda name, device: parser)
    run, size, head = Run(tmp_path/'evaluation', {}), SimpleNamespace(size=48), HeadModel.load()
    with run:
        run.make('clip', lambda folder: None)
        before = [make(run, film, size, head) for make in (evaluate.add_truth, evaluate.add_reenactment)]
        assert not seen and before[0].alpha.max() == 255
        keys = [run.manifest(name)['key'] for name in ('clip', 'truth', 'rounds/0/dataset')]
        truth, coarse = (make(run, film, size, head, lookers=Lookers(parser='bisenet')) for make in (evaluate.add_truth, evaluate.add_reenactment))
        again = [run.manifest(name)['key'] for name in ('clip', 'truth', 'rounds/0/dataset')]
        evaluate.add_reenactment(run, film, size, head, lookers=Lookers(parser='bisenet'))
    assert [a == b for a, b in zip(keys, again)] == [True, False, False] and len(seen) == 2
    np.testing.assert_array_equal(seen[0], film.frames)
    assert not truth.alpha.any()                                     # all of it was called clothes
    assert seen[1].shape == (3, 48, 48, 3) and seen[1][:, 0].std() > 5 and set(np.unique(coarse.parsing)) == {0, 250}


@pytest.mark.parametrize('option, name', [('detector', 's3fd'), ('matte', 'rvm'), ('parser', 'bisenet'), ('restorer', 'gfpgan'), ('animator', 'liveportrait')])
def test_evaluation_says_missing_weights_first(tmp_path, capsys, option, name):
    (tmp_path/'film.mp4').write_bytes(b'no film')
    assert main(['evaluate', '--clip', str(tmp_path/'film.mp4'), '--out', str(tmp_path/'out'), f'--{option}', name]) == 2
    said = capsys.readouterr().err
    assert said.count('\n') == 1 and 'ophav weights add' in said and not (tmp_path/'out').exists()


def test_missing_baselines(tmp_path, capsys):
    "One that is named is an error of one line; of all, those that are missing are listed."
    (tmp_path/'film.mp4').write_bytes(b'no film')
    for name, licence in (('fomm', 'MIT'), ('fomm,pirender', 'MIT'), ('pirender', 'CC BY-NC'), ('liveportrait', 'MIT')):
        assert main(['evaluate', '--clip', str(tmp_path/'film.mp4'), '--out', str(tmp_path/'out'), '--baselines', name]) == 2
        said = capsys.readouterr().err
        assert said.count('\n') == 1 and licence in said and 'https://github.com' in said and 'ophav weights add' in said and not (tmp_path/'out').exists()
    with pytest.raises(InputError, match="unknown baseline 'other'; choose one of fomm"): evaluate.pick_baselines('fomm, other'[6:])
    names, missing = evaluate.pick_baselines('all')
    assert names == [] and list(missing) == ['fomm', 'pirender', 'facevid2vid', 'liveportrait'] and 'vox-cpk.pth.tar' in missing['fomm']
    keep('fomm', {}), keep('pirender', {})
    assert evaluate.pick_baselines('all')[0] == ['fomm'] and 'epoch_20.pth' in evaluate.pick_baselines('all')[1]['pirender']
    assert evaluate.pick_baselines(' fomm,fomm') == (['fomm'], {}) and evaluate.pick_baselines('') == ([], {})


@pytest.mark.parametrize('name', ['s3fd', 'retinaface'])
def test_detectors_with_drawn_weights(name, monkeypatch):
    "The whole way from the cache: what they find means nothing, but is found; AKD takes the boxes of both pictures."
    put(name, 'fan')
    metrics.measuring_network.cache_clear()
    picture = read_image('astronaut')[:200, 130:330]
    assert all(len(f.box) == 4 and f.keypoints.shape == (6, 2) for f in Detector(finder=name).faces(picture))
    images, points = np.stack([picture[::2, ::2]]*3), faces(3)[1]
    found = iter([1, 0, 1, 1, 1, 0])                                   # the second has no face in the picture, the third none in the truth
    box = np.float32([[20, 20, 80, 80, .9]])
    module = getattr(metrics, name)
    find, seen = module.find_faces, []
    def faces_of(net, image, half):
        seen.append(len(find(net, image)))
        return box[:next(found)]
    monkeypatch.setattr(module, 'find_faces', faces_of)
    row = metrics.network_metrics(images, points, images[:, :, ::-1], points, detector=name)
    assert row['akd'] > 0 and row['akd_lost'] == 2 and len(seen) == 6
    plain = metrics.network_metrics(images[:1], points[:1], images[:1, :, ::-1], points[:1])
    assert 'akd_lost' not in plain and plain['akd'] != row['akd']


def test_baselines_are_rows(base, tmp_path):
    "First-order motion and PIRenderer with drawn weights: heads as large as the truth's, rows, table, strip and film; made once."
    put('fomm', 'pirender', 'deep3d')
    film, size, head = short_film(base), SimpleNamespace(size=96, crop=192, every=1, in_a_row=2), HeadModel.load()
    run, detector = Run(tmp_path/'evaluation', {}), Detector()
    with run:
        run.make('clip', lambda folder: None)
        table = evaluate.compare(run, film, evaluate.add_truth(run, film, size, head), size, detector)
        table.add('source', lambda: np.repeat(table.portrait[None], len(table.numbers), 0))
        for name in ('fomm', 'pirender'): evaluate.add_baseline(run, name, film, size, head, table)
        result = evaluate.write_results(run, 'self', table, 'source', missing={'liveportrait': 'why'})
        made = run.path('baselines', 'fomm', '00000.png').stat().st_mtime_ns
        evaluate.add_baseline(run, 'fomm', film, size, head, table)
    assert made == run.path('baselines', 'fomm', '00000.png').stat().st_mtime_ns and not run.path('baselines', 'fomm', 'film').exists()
    assert list(result['rows']) == ['source', 'fomm', 'pirender'] and result['missing']['liveportrait'] == 'why'
    assert all(result['rows'][name]['psnr_head'] > 0 for name in result['rows'])
    assert '| pirender |' in evaluate.results_table(result) and read_image(run.path('strip.png')).shape[0] == 4*96
    assert read_video(run.path('comparison.mp4'))[0].shape[1:3] == (96, 4*96)
    whites = [(images > 250).all(-1).mean() for images, _ in table.rows.values()]
    assert all(abs(w - whites[0]) < .2 for w in whites)              # a head on white, not a whole picture


@pytest.mark.parametrize('animator', ['liveportrait'], indirect=True)
def test_animators_as_baselines(base, tmp_path, animator):
    film, head = short_film(base), HeadModel.load()
    maker = make_baseline(animator, image=film.frames[0], driving=(film.frames, film.track), track=film.track, head=head)
    pictures = list(maker.frames())
    assert len(pictures) == 3 and pictures[0].shape == film.frames[0].shape and maker.name == animator
    assert np.abs(pictures[2].astype(int) - next(maker.frames(start=2))).max() <= 1
