"LivePortrait: golden outputs, every tensor, the device guard, checkpoints, driving, motion templates."
import ophav_nb  # noqa: F401, before torch: it decides about threads
import pickle
from dataclasses import fields

import golden_fill
import numpy as np
import pytest
import torch

from ophav_nb.nets.liveportrait import (FILES, FaceState, LivePortrait, Template, absolute_state, estimate, expression_friendly, face_angles,
                                        face_rotation, face_state, keypoints, load_liveportrait, motion_multiplier, openness, read_template,
                                        relative_state, retarget_eyes, retarget_lips, stitch, stitching_delta, write_template)
from ophav_nb.run import InputError
from ophav_nb.weights import add_weight

NAME = 'liveportrait'


@pytest.fixture(scope='module')
def network():
    net = LivePortrait()
    for part, module in net.named_children(): golden_fill.fill_golden(module, NAME, part)
    return net


@pytest.fixture(scope='module')
def pictures(): return {k: golden_fill.drawn_picture(f'liveportrait.{k}', (1, 3, 256, 256)) for k in ('source', 'driving')}


def seen_outputs(net, pictures):
    "What the motion extractor sees."
    out = {}
    for k, image in pictures.items():
        raw = net.motion_extractor.scores(image)
        out |= {f'motion_raw.{k}.{a}': v for a, v in raw.items()}
        out |= {f'motion_refined.{k}.{a}': v[:, None] for a, v in zip(('pitch', 'yaw', 'roll'), face_angles(raw).unbind(1))}
        out[f'kp_transformed.{k}'] = keypoints(face_state(raw))
    return out


def formula_outputs(net):
    "Formulas and small networks, on fabricated faces."
    drawn = lambda kind, name, shape, *a: getattr(golden_fill, f'drawn_{kind}')(f'liveportrait.f_{name}', shape, *a)
    rotation = face_rotation(drawn('uniform', 'pose', (3, 3), -25, 25))
    s = FaceState(rotation, drawn('normal', 'exp', (3, 21, 3), 0, .03), drawn('normal', 't', (3, 3), 0, .1), drawn('uniform', 'scale', (3, 1), 1.1, 1.5)[:, 0],
                  drawn('normal', 'kp', (1, 21, 3), 0, .3).expand(3, -1, -1))
    source, start, driving = s[0], s[1], s[2]
    x_s, x_0, x_d = keypoints(source), keypoints(relative_state(source, start, start)), keypoints(relative_state(source, driving, start))
    eyes, lips = openness(drawn('uniform', 'lmk203', (1, 203, 2), 0, 256))
    return {'formula.rotation': rotation, 'formula.x_s': x_s, 'formula.x_driving_absolute_transform': keypoints(driving), 'formula.x_d_relative_frame0': x_0,
            'formula.x_d_relative': x_d, 'formula.motion_multiplier': motion_multiplier(x_s, x_0),
            'formula.x_d_relative_expression_friendly': expression_friendly(x_s, x_d, x_0),
            'formula.motion_multiplier_xs_vs_absolute': motion_multiplier(x_s, keypoints(driving)),
            'formula.x_d_absolute_mode': keypoints(absolute_state(source, driving)), 'formula.stitched': stitch(net, x_s, x_d),
            'net.stitch_delta': stitching_delta(net, x_s, x_d), 'net.eye_delta': retarget_eyes(net, x_s, drawn('uniform', 'eye', (1, 3), 0, .5)),
            'net.lip_delta': retarget_lips(net, x_s, drawn('uniform', 'lip', (1, 2), 0, .5)), 'formula.eye_close_ratio': eyes, 'formula.lip_close_ratio': lips}


def made_outputs(net, pictures):
    "What warping and generator make."
    source = golden_fill.drawn_uniform('liveportrait.g_kp_source', (1, 21, 3), -.7, .7)
    driving = source + golden_fill.drawn_normal('liveportrait.g_kp_driving', (1, 21, 3), 0, .1)
    out, hooks = {}, []
    for name in ['fc', *[f'G_middle_{i}' for i in range(6)], 'up_0', 'up_1']:
        keep = lambda module, inputs, value, name=name: out.__setitem__(f'dec.{name}', value)
        hooks.append(net.spade_generator.get_submodule(name).register_forward_hook(keep))
    volume = net.volume(pictures['source'])
    warped, flow = net.warping_module(volume, driving, source)
    image = net.spade_generator(warped)
    for hook in hooks: hook.remove()
    return out | {'feature_3d': volume, 'warp.out': warped, 'warp.deformation': flow.deformation, 'warp.occlusion_map': flow.occlusion, 'image': image}


@torch.inference_mode()
@pytest.mark.parametrize('threads', [2, pytest.param(1, marks=pytest.mark.slow)])
def test_golden(network, pictures, threads):
    "The authors' networks, filled by rule, give their outputs: all of them."
    golden_fill.golden_on_threads(NAME, lambda: seen_outputs(network, pictures) | formula_outputs(network) | made_outputs(network, pictures), [threads])


def small(seed=0):
    "The same networks with few channels and keypoints, untrained."
    torch.manual_seed(seed)
    net = LivePortrait(5, width=8).eval()
    with torch.no_grad():
        for name, t in net.named_parameters():
            if '.grn.' in name: t.normal_(0, .2)     # its constructor switches it off
    return net


def some_state(n=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g)
    return FaceState(face_rotation(20*r(n, 3)), .03*r(n, 21, 3), .1*r(n, 3), 1.2 + .1*r(n), .3*r(1, 21, 3).expand(n, -1, -1))


@torch.inference_mode()
def test_other_sizes_and_batches():
    net, kp = small(), keypoints(some_state(2))[:, :5]
    volume = net.volume(torch.rand(1, 3, 128, 256, generator=torch.Generator().manual_seed(1)))
    pictures, flow = net.render(volume, kp, kp[:1])
    assert pictures.shape == (2, 3, 256, 512) and 0 <= pictures.min() and pictures.max() <= 1
    torch.testing.assert_close(net.render(volume, kp[1:], kp[:1])[0], pictures[1:], atol=2e-5, rtol=0)


@torch.no_grad()
def test_broken_layers_show():
    "Any layer that changes changes what comes out, also after the network was used; mended, all is as before."
    net, kp, image = small(), keypoints(some_state(2))[:, :5], torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(2))
    ask = {'motion_extractor': lambda: torch.cat(list(net.motion_extractor.scores(image).values()), 1), 'retarget_shoulder': lambda: stitching_delta(net, kp, kp + .1),
           'picture': lambda: net.render(net.volume(image), kp + .1, kp)[0].logit()}
    before = {k: f() for k, f in ask.items()}
    for part in ('motion_extractor.detector.stages.1.2.grn.gamma', 'motion_extractor.detector.fc_exp.weight', 'motion_extractor.detector.norm.bias',
                 'motion_extractor.detector.downsample_layers.2.0.weight', 'appearance_feature_extractor.resblocks_3d.3dr0.norm1.bias',
                 'warping_module.dense_motion_network.occlusion.bias', 'warping_module.fourth.weight', 'spade_generator.conv_img.0.weight',
                 'spade_generator.up_0.norm_s.mlp_gamma.weight', 'retarget_shoulder.mlp.4.weight'):
        tensor, name = net.state_dict()[part], part.split('.')[0]
        kept, f = tensor.clone(), ask.get(name, ask['picture'])
        tensor.add_(tensor.abs().mean() + .1)
        assert not torch.allclose(before.get(name, before['picture']), f(), atol=1e-7, rtol=0), part
        tensor.copy_(kept)
    assert all(torch.equal(before[k], f()) for k, f in ask.items())


def test_regions():
    source, driving = some_state(1), some_state(4, seed=1)
    all_, pose, face, lip, eyes = (relative_state(source, driving, driving[0], r) for r in ('all', 'pose', 'exp', 'lip', 'eyes'))
    assert torch.equal(pose.expression, source.expression.expand(4, -1, -1)) and torch.equal(pose.rotation, all_.rotation)
    assert torch.equal(face.expression, all_.expression) and torch.equal(face.rotation, source.rotation.expand(4, -1, -1))
    moved = lambda s: {k for k in range(21) if not torch.equal(s.expression[1, k], source.expression[0, k])}
    assert moved(lip) == {6, 12, 14, 17, 19, 20} and moved(eyes) == {11, 13, 15, 16, 18} and moved(face) == set(range(21))


def test_openness_of_both_kinds_of_landmarks():
    eyes, lips = openness(np.random.default_rng(0).random((3, 478, 3)))
    assert eyes.shape == (3, 2) and lips.shape == (3, 1)
    points = np.zeros((1, 478, 2))
    points[0, [159, 145, 33, 133]] = [[5, 1], [5, 3], [0, 2], [10, 2]]
    assert openness(points)[0][0, 0] == pytest.approx(.2)
    with pytest.raises(InputError, match='203 or 478'): openness(np.zeros((1, 68, 2)))


def test_template_round_trip(tmp_path):
    state = some_state(5)
    path = write_template(tmp_path/'film.pkl', Template(state, torch.rand(5, 2), torch.rand(5, 1), 30.))
    back = read_template(path)
    for f in fields(FaceState): assert torch.equal(getattr(back.state, f.name), getattr(state, f.name))
    assert back.fps == 30. and back.eyes.shape == (5, 2) and back.lips.shape == (5, 1) and len(back) == 5
    found = pickle.loads(path.read_bytes())      # as LivePortrait reads it
    frame = found['motion'][2]
    assert found['n_frames'] == 5 and frame['R'].shape == (1, 3, 3) and frame['exp'].shape == (1, 21, 3) and frame['scale'].shape == (1, 1) and frame['t'].shape == (1, 3)
    from ophav_nb.motion import read_motion
    assert len(read_motion(path)) == 5


def test_template_of_older_versions_and_hostile_ones(tmp_path):
    rows = [dict(R_d=np.eye(3, dtype=np.float32)[None], exp=np.zeros((1, 21, 3), np.float32), t=np.zeros((1, 3), np.float32), scale=np.ones((1, 1), np.float32))]
    (tmp_path/'old.pkl').write_bytes(pickle.dumps(dict(motion=rows)))
    assert read_template(tmp_path/'old.pkl').fps == 25 and read_template(tmp_path/'old.pkl').lips is None
    class Hostile:
        def __reduce__(self): return (print, ('run',))
    for name, value in dict(code=dict(motion=Hostile()), keys=dict(motion=[dict(R=1)]), kind=[1, 2], shape=dict(motion=[{**rows[0], 'exp': np.zeros(5)}])).items():
        (tmp_path/f'{name}.pkl').write_bytes(pickle.dumps(value))
        with pytest.raises(InputError): read_template(tmp_path/f'{name}.pkl')


def test_film_through_the_extractor_in_pieces():
    net, film = small(), [np.random.default_rng(i).integers(0, 256, (80, 80, 3), np.uint8) for i in range(5)]
    whole, pieces = estimate(net, iter(film), batch=5), estimate(net, iter(film), batch=2)
    for f in fields(FaceState): torch.testing.assert_close(getattr(whole, f.name), getattr(pieces, f.name), atol=1e-4, rtol=1e-4)


def write_official(folder, dtype=torch.float32):
    "Five files as the authors write them, every number a half."
    with torch.device('meta'): shapes = LivePortrait()
    half = lambda m: {k: torch.full(t.shape, .5, dtype=dtype if t.is_floating_point() else t.dtype) for k, t in m.state_dict().items()}
    for part in FILES.values():
        if part.startswith('stitching'):
            value = {k: {f'module.{n}': t for n, t in half(shapes.get_submodule(k)).items()} for k in ('retarget_shoulder', 'retarget_mouth', 'retarget_eye')}
        else: value = half(shapes.get_submodule(part))
        torch.save(value, folder/f'{part}.pth')


def test_official_files(tmp_path):
    "The folder of a release, straight into the networks; a wrong one is refused in one line."
    write_official(tmp_path)
    net = load_liveportrait(tmp_path)
    assert not net.training and (net.retarget_eye.mlp[10].bias == .5).all() and (net.warping_module.fourth.weight == .5).all()
    torch.save({'x': torch.zeros(1)}, tmp_path/'motion_extractor.pth')
    with pytest.raises(InputError, match='other tensors'): load_liveportrait(tmp_path)


def test_official_files_through_the_cache(monkeypatch, tmp_path):
    "Each file recognised by its tensors and kept; then all load."
    monkeypatch.setenv('OPHAV_HOME', str(tmp_path/'home'))
    write_official(tmp_path, torch.float16)
    assert {add_weight(tmp_path/f'{part}.pth')[0] for part in FILES.values()} == set(FILES)
    net = load_liveportrait()
    assert net.spade_generator.fc.weight.dtype == torch.float32 and (net.retarget_mouth.mlp[0].weight == .5).all()


def test_missing_weights_say_where(monkeypatch, tmp_path):
    monkeypatch.setenv('OPHAV_HOME', str(tmp_path))
    with pytest.raises(InputError, match='ophav weights add'): load_liveportrait()
