"Network animators with small untrained networks: poses, expressions, films, batches, memory."
import ophav_nb  # noqa: F401, before torch: it decides about threads
import gc
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch

from ophav_nb.animators import (ExpressionBank, FaceVid2VidAnimator, FommReenactment, LivePortraitAnimator, calibration_motion, expression_features,
                                film_heads, head_moves, make_animator, named_expression, stored_pictures, wanted_openness, write_film)
from ophav_nb.encoding import device_guard
from ophav_nb.geometry import facing_camera
from ophav_nb.head import HeadModel, Motion
from ophav_nb.media import read_video
from ophav_nb.motion import NAMES, head_rotation, retarget, scripted
from ophav_nb.nets import facevid2vid as fv
from ophav_nb.nets import liveportrait as lp
from ophav_nb.nets.blocks import DenseMotion, Flow, frames_at_once
from ophav_nb.nets.fomm import Points
from ophav_nb.run import InputError
from ophav_nb.track import Track

SIZE, SIDE = 96, 128


@pytest.fixture(scope='module')
def head(): return HeadModel.load()


@pytest.fixture(scope='module')
def track(head):
    "A portrait that looks a little aside."
    rest = Motion.still(1)
    rest.translation[:, 2] = -.8
    rest.joints[:, 0] = head_rotation(6, -4, 3)
    camera = facing_camera(1.6*SIZE, SIZE, SIZE)
    points = camera.project(head.landmarks(head(np.zeros(head.n_shape), rest.expression, rest.joints, rest.translation))[0].numpy())
    return Track(rest, np.zeros(head.n_shape, np.float32), camera, points[None].astype(np.float32), np.zeros(1), np.ones(1, bool))


def picture(seed=0): return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


class Nearly(DenseMotion):
    "Dense motion that believes all keypoints alike: the rest of the way without the cost."
    def __init__(self): torch.nn.Module.__init__(self)
    def forward(self, volume, driving, source):
        moves = self.proposals(volume.shape[2:], driving, source.expand_as(driving))
        return Flow(None, moves.mean(1), torch.ones(len(driving), 1, *volume.shape[3:], device=driving.device))


def small(kind, whole=False):
    "Untrained networks with few channels; unless they are to be whole, with cheap parts where time goes."
    torch.manual_seed(0)
    net = fv.FaceVid2Vid(width=8, keypoints=4).eval() if kind == 'facevid2vid' else lp.LivePortrait(width=8).eval()
    if whole: return net
    paint = lambda n: torch.nn.Sequential(torch.nn.Conv2d(32, 3*n*n, 1), torch.nn.PixelShuffle(n), torch.nn.Sigmoid())
    if kind == 'facevid2vid': net.generator.resblocks_3d, net.generator.dense_motion_network, net.generator.decoder = torch.nn.Identity(), Nearly(), paint(4)
    else:
        net.appearance_feature_extractor.resblocks_3d, net.warping_module.dense_motion_network = torch.nn.Identity(), Nearly()
        net.spade_generator = paint(8)
    return net


@pytest.fixture(scope='module', params=['facevid2vid', 'liveportrait'])
def animator(request, track, head): return make_animator(request.param, image=picture(), track=track, head=head, network=small(request.param), side=SIDE, batch=2)


def follow(animator, motion):
    with torch.inference_mode(): return animator.follow(motion)


def posed(track, n=1, **to):
    "The portrait's own frame, changed."
    m = Motion.concat([track.motion[:1]]*n)
    turn = to.get('turn', (0, 0, 0))
    from scipy.spatial.transform import Rotation
    joints = m.joints.copy()
    joints[:, 0] = (Rotation.from_rotvec(head_rotation(*turn))*Rotation.from_rotvec(m.joints[:, 0])).as_rotvec()
    return replace(m, joints=joints, translation=m.translation + np.float32(to.get('shift', (0, 0, 0))), expression=m.expression + to.get('face', 0))


def test_own_pose_gives_own_keypoints(animator, track):
    own = follow(animator, track.motion)
    if animator.name == 'liveportrait':   # the portrait's own lids and lips are asked for; what stitching changes is not a matter of pose
        state, calm = animator.stitching, animator.retargeted
        animator.stitching, animator.retargeted = False, lambda *_: 0
        own = follow(animator, track.motion)
        animator.stitching, animator.retargeted = state, calm
    torch.testing.assert_close(own, animator.source, atol=1e-5, rtol=0)


def test_moves_are_the_projection_of_the_head(track, head):
    "The head's centre, moved by our own matrices and projected, is where shift and size say."
    motion = posed(track, turn=(20, 10, -5), shift=(.03, -.02, .1))
    turn, shift, size = head_moves(motion, track, head)
    assert shift[0, 0] > 0 and shift[0, 1] > 0 and size[0] > 1
    nose = turn[0] @ [0, 0, -1.]
    assert nose[0] > .2 and nose[1] > .1
    still = head_moves(posed(track), track, head)
    np.testing.assert_allclose(still[0][0], np.eye(3), atol=1e-6)
    np.testing.assert_allclose(np.r_[still[1][0], still[2] - 1], 0, atol=1e-6)


def test_neck_turns_as_the_root_does(track, head):
    motion = posed(track)
    motion.joints[:, 1] = head_rotation(15, 0, 0)
    turn = head_moves(motion, track, head)[0][0]
    assert (turn @ [0, 0, -1.])[0] > .2


def test_keypoints_turn_with_the_head(track, head):
    "A lean of 90 degrees turns the keypoints' spread in the picture by 90 degrees."
    animator = make_animator('facevid2vid', image=picture(), track=track, head=head, network=small('facevid2vid'), side=SIDE)
    a, b = follow(animator, posed(track))[0], follow(animator, posed(track, turn=(0, 0, -90)))[0]
    a, b = ((x - (animator.state.expression[0] + animator.state.shift)).numpy() for x in (a, b))
    shift = head_moves(posed(track, turn=(0, 0, -90)), track, animator.head)[1][0]
    np.testing.assert_allclose(b[:, :2] - shift, np.stack([-a[:, 1], a[:, 0]], 1), atol=.02)


def test_frames_are_streamed_and_independent(animator, track, caplog):
    animator.warned = False
    motion = retarget(scripted('talk', 1, fps=25, seed=0), track)[:5]
    frames = list(animator.frames(motion))
    assert caplog.text.count('no expressions of its own') == (animator.name == 'facevid2vid')      # three batches, one warning
    assert len(frames) == 5 and all(f.shape == (SIZE, SIZE, 3) and f.dtype == np.uint8 for f in frames)
    again = list(animator.frames(motion, start=3))
    assert all(np.abs(a.astype(int) - b.astype(int)).max() <= 1 for a, b in zip(frames[3:], again, strict=True))
    stream = animator.frames(motion, size=64)
    assert next(stream).shape == (64, 64, 3)
    one = animator.frame(motion.expression[2], motion.joints[2], motion.translation[2])
    assert np.abs(one*255 - frames[2]).max() <= 1.1 and animator.composite(frames[0]).dtype == np.float32


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['facevid2vid', 'liveportrait'])
def test_whole_networks(kind, track, head):
    "Nothing replaced, at the size of the public weights."
    animator = make_animator(kind, image=picture(), track=track, head=head, network=small(kind, whole=True))
    assert [f.shape for f in animator.frames(posed(track, 2, turn=(9, 0, 0)))] == [(SIZE, SIZE, 3)]*2


def test_reenactment(animator):
    film = [picture(i) for i in range(4)]
    states = animator.estimate(iter(film))
    assert len(states) == 4
    frames = list(animator.reenact(film, start=1))
    again = list(animator.reenact(states, start=1))
    assert len(frames) == 4 and all(np.abs(a.astype(int) - b.astype(int)).max() <= 1 for a, b in zip(frames, again))
    how = dict(view=(10., None, 0.)) if animator.name == 'facevid2vid' else dict(region='exp', multiplier=.5, friendly=True)
    assert len(list(animator.reenact(states, **how))) == 4 and len(list(animator.reenact(states, relative=False))) == 4
    with pytest.raises(InputError, match='4 frames'): next(animator.reenact(states, start=9))
    with pytest.raises(InputError, match='no frames'): next(animator.reenact([]))


def test_start_of_relative_driving_shows_the_source(animator):
    if animator.name == 'liveportrait': animator.stitching = False
    states = animator.estimate([picture(i) for i in range(2)])
    with torch.inference_mode(): driven = animator.driven(states[:1], states[0])
    torch.testing.assert_close(driven, animator.source, atol=1e-5, rtol=0)
    if animator.name == 'liveportrait': animator.stitching = True


def test_expression_bank(track, head):
    rng = np.random.default_rng(0)
    film = Motion.still(60)
    film.expression[:, :5] = rng.random((60, 5))
    film.expression[0] = 0
    basis = torch.from_numpy(rng.normal(size=(5, 15*3)).astype(np.float32))
    seen = (torch.from_numpy(film.expression[:, :5]) @ basis).reshape(60, 15, 3) + 3.
    bank = ExpressionBank(expression_features(film), seen)
    exact = bank.nearest(expression_features(film))
    assert (exact - (seen - seen[0])).abs().mean() < .3*(seen - seen[0]).abs().mean()
    assert bank.nearest(expression_features(film[:1])).abs().max() < 1e-4
    with pytest.raises(InputError, match='one film'): ExpressionBank(expression_features(film), seen[:-1])


@pytest.mark.parametrize('kind', ['facevid2vid', 'liveportrait'])
def test_expressions_of_a_driving_film(kind, track, head):
    crops = [picture(i) for i in range(6)]
    motion = Motion.concat([track.motion[:1]]*6)
    motion.expression[:, NAMES.index('mouthSmileLeft')] = np.linspace(0, 1, 6)
    driver = replace(track, motion=motion, landmarks=np.repeat(track.landmarks, 6, 0), error=np.zeros(6), ok=np.ones(6, bool))
    animator = make_animator(kind, image=picture(), track=track, head=head, network=small(kind), driving=(crops, driver), side=SIDE)
    assert animator.bank.features.shape == (6, 57)
    face = np.zeros(52, np.float32)
    face[NAMES.index('mouthSmileLeft')] = .8
    with torch.inference_mode():
        assert animator.expression(posed(track, face=face)).abs().max() > 3*animator.expression(posed(track)).abs().max() > -1
    assert next(animator.frames(posed(track, face=face))).shape == (SIZE, SIZE, 3)


def test_named_expressions():
    motion = Motion.still(3)
    motion.expression[1, NAMES.index('mouthSmileLeft')] = motion.expression[1, NAMES.index('mouthSmileRight')] = 1
    motion.expression[2, [NAMES.index(f'eyeBlink{s}') for s in ('Left', 'Right')]] = 1
    motion.joints[1, 2, 0] = np.radians(20)
    moves = named_expression(motion)
    assert moves[0].abs().max() == 0 and moves[1, 14, 1] < 0
    eyes, lips = wanted_openness(motion, torch.full((1, 2), .3), torch.zeros(1, 1))
    assert eyes[0] == pytest.approx(.3) and eyes[2] == 0 and lips[0] == 0 and lips[1] == pytest.approx(.7, abs=1e-3)


class Signs(FaceVid2VidAnimator):
    "An animator whose network sees yaw the wrong way round, pitch by half, and no roll."
    def estimate(self, frames): return np.stack(frames)
    def turned(self, states): return self.seen


def test_calibration(track, head):
    from scipy.spatial.transform import Rotation
    animator = Signs(image=picture(), track=track, head=head, network=small('facevid2vid'), side=SIDE)
    motion = calibration_motion(track)
    vectors = Rotation.from_matrix(head_moves(motion, track, head)[0]).as_rotvec()
    animator.seen = Rotation.from_rotvec(vectors*[.6, -1.2, 0]).as_matrix()
    np.testing.assert_allclose(animator.calibrate([picture()]*6, motion), [.6, -1.2, 1], atol=.02)
    assert (animator.moves(posed(track, turn=(10, 0, 0)))[0][0].numpy() @ [0, 0, -1.])[0] < -.1


def test_film_is_written_as_it_comes(animator, track, tmp_path):
    motion = retarget(scripted('talk', 1, fps=25, seed=0), track)[:3]
    path = write_film(animator.frames(motion), tmp_path/'film.mp4', 25., 3)
    frames, fps = read_video(path)
    assert frames.shape == (3, SIZE, SIZE, 3) and fps == 25


class Blind:
    "A detector that finds nobody."
    def film(self, frames): raise InputError('no face found in the film; use one that shows one person from the front')


def test_heads_where_no_face_is_found(animator, track, head, tmp_path, caplog):
    "Orders are believed: the track is the motion, the head is where the mesh is."
    motion = retarget(scripted('talk', 1, fps=25, seed=0), track)[:3]
    heads = film_heads(animator, motion, tmp_path, Blind())
    assert 'as it was asked for' in caplog.text and np.array_equal(heads.track.motion.joints, motion.joints)
    frames = list(heads.frames())
    assert len(frames) == 3 and frames[0].shape == (SIZE, SIZE, 4) and .1 < (frames[0][..., 3] > 128).mean() < .9
    x, y = heads.track.landmarks[0, 4, :2]
    assert frames[0][int(y), int(x), 3] == 255
    (tmp_path/'pictures.rgb').open('r+b').truncate(SIZE*SIZE*3 + 100)     # a killed call
    again = film_heads(animator, motion, tmp_path, Blind())
    assert all(np.abs(a.astype(int) - b.astype(int)).max() <= 1 for a, b in zip(frames, again.frames(), strict=True))


def test_stored_pictures_go_on(tmp_path):
    asked = []
    def pictures(start):
        asked.append(start)
        for i in range(start, 5): yield np.full((4, 4), i, np.uint8)
    whole = stored_pictures(tmp_path/'a', pictures, 5, (4, 4))
    assert whole[:, 0, 0].tolist() == [0, 1, 2, 3, 4]
    del whole
    with open(tmp_path/'a', 'r+b') as file: file.truncate(2*16 + 5)
    assert stored_pictures(tmp_path/'a', pictures, 5, (4, 4))[:, 3, 3].tolist() == [0, 1, 2, 3, 4]
    stored_pictures(tmp_path/'a', pictures, 5, (4, 4))
    assert asked == [0, 2]


def test_heads_of_a_film_with_a_face(head, tmp_path):
    "Pictures that show a face are tracked and matted."
    from skimage import data
    from ophav_nb.detect import Detector
    from ophav_nb.track import fit_portrait
    image, detector = np.ascontiguousarray(data.astronaut()[0:300, 60:360]), Detector()
    own = fit_portrait(image, detector.one(image).landmarks, head)
    class Shaking(FaceVid2VidAnimator):
        "What a good network would do."
        def show(self, driving, size=None):
            for k in range(len(driving)): yield np.roll(self.image, int(driving[k, 0, 0].item()*300) % 3, 1)
    animator = Shaking(image=image, track=own, head=head, network=small('facevid2vid'), side=SIDE)
    motion = retarget(scripted('talk', 1, fps=25, seed=0), own)[:6]
    heads = film_heads(animator, motion, tmp_path, detector)
    assert heads.track.ok.all() and np.median(heads.track.error) < 6
    alpha = next(heads.frames())[..., 3]
    assert .1 < (alpha > 128).mean() < .6


@pytest.mark.parametrize('kind', ['facevid2vid', 'liveportrait'])
def test_half_precision(kind, track, head, monkeypatch):
    "Networks at half precision, keypoints at full."
    whole = make_animator(kind, image=picture(), track=track, head=head, network=small(kind), side=SIDE)
    monkeypatch.setattr(type(whole), 'precision', lambda self: torch.autocast('cpu', torch.bfloat16))
    half = make_animator(kind, image=picture(), track=track, head=head, network=small(kind), side=SIDE, half=True)
    with torch.inference_mode(): driving = half.follow(posed(track, turn=(9, 0, 0)))
    assert driving.dtype == half.source.dtype == torch.float32
    one, other = (next(a.frames(posed(track, turn=(9, 0, 0)))).astype(int) for a in (half, whole))
    assert np.abs(one - other).mean() < 8
    assert len(half.estimate([picture(1)])) == 1


def test_memory_does_not_grow_with_the_film(track, head):
    "What is held after 60 frames is what was held after 10."
    class Flat(FaceVid2VidAnimator):
        def render(self, driving): return torch.zeros(len(driving), 3, 64, 64), None
    animator = Flat(image=picture(), track=track, head=head, network=small('facevid2vid'), side=SIDE, batch=2)
    motion = Motion.concat([track.motion[:1]]*62)
    stream = animator.frames(motion, size=64)
    tracemalloc.start()
    for i in range(10): next(stream)
    gc.collect()
    early = tracemalloc.get_traced_memory()[0]
    for i in range(50): next(stream)
    gc.collect()
    late = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert late - early < 40_000


def test_device_guard(track, head):
    "The whole way from a motion's arrays to keypoints stays on the network's device."
    def step(device):
        with device: net = lp.LivePortrait(width=8)
        state = net.motion_extractor(torch.rand(1, 3, 128, 128, device=device))
        animator = LivePortraitAnimator.__new__(LivePortraitAnimator)
        animator.network, animator.device, animator.state, animator.source = net, 'meta', state, lp.keypoints(state)
        animator.track, animator.head, animator.gains, animator.bank, animator.stitching = track, head, np.ones(3), None, True
        animator.open = lp.openness(track.landmarks[:1])
        return animator.follow(track.motion).device.type
    assert device_guard(step) == 'meta'


def test_batches_and_kinds(track, head, monkeypatch, tmp_path):
    assert frames_at_once('cpu', 700) == 4 and frames_at_once('cpu', 700, cpu=1) == 1
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (8 << 30, 8 << 30))
    assert frames_at_once('cuda', 700) == 5 and frames_at_once('cuda', 700, half=True) == 9 and frames_at_once('cuda', 9) == 16 and frames_at_once('cuda', 9e9) == 1
    monkeypatch.setenv('OPHAV_HOME', str(tmp_path))
    for kind in ('facevid2vid', 'liveportrait'):
        with pytest.raises(InputError, match='ophav weights add'): make_animator(kind, image=picture(), track=track)
    with pytest.raises(InputError): make_animator('puppet')
    blind = FaceVid2VidAnimator(image=picture(), network=small('facevid2vid'), side=SIDE)
    with pytest.raises(InputError, match='track'): next(blind.frames(track.motion))


class FakeFomm(torch.nn.Module):
    "In place of first-order motion's networks: the portrait, brighter by the first keypoint."
    def __init__(self):
        super().__init__()
        self.generator, self.seen = self, 0
        self.final = torch.nn.Conv2d(1, 1, 1)

    def kp_detector(self, x):
        self.seen += len(x)
        return Points(x.mean((2, 3))[:, :2, None].expand(-1, -1, 2) + torch.tensor([[0., 1], [.5, -1]]), torch.eye(2).expand(len(x), 2, 2, 2))

    def prepare(self, x): return x
    def generate(self, prepared, source, driving): return prepared.expand(len(driving.value), -1, -1, -1)*.5 + driving.value[:, 0, 0, None, None, None]*.5, None


def test_a_baseline_is_driven_by_the_film(track, head, monkeypatch):
    "Batches and starts change nothing; sizes are the portrait's; the film comes in small parts."
    monkeypatch.setattr('ophav_nb.nets.fomm.hull_area', lambda p: torch.ones(len(p)))
    class Film:
        "Frames that are made when asked for, and how many were asked for at once."
        most = 0
        def __len__(self): return 7
        def __getitem__(self, i):
            if isinstance(i, int): return picture(i)
            some = [picture(k) for k in range(7)[i]]
            Film.most = max(Film.most, len(some))
            return np.stack(some)
    make = lambda **more: FommReenactment(picture(), (Film(), track), track, head, network=FakeFomm(), device='cpu', **more)
    frames = list(make(batch=2).frames())
    assert len(frames) == 7 and frames[0].shape == (SIZE, SIZE, 3) and Film.most == 2
    rest = list(make(batch=3).frames(start=3))
    assert all(np.abs(a.astype(int) - b.astype(int)).max() <= 1 for a, b in zip(frames[3:], rest, strict=True))
    assert next(make().frames(size=50)).shape == (50, 50, 3)
    moving = np.repeat(track.landmarks, 7, 0) + np.random.default_rng(0).normal(0, 4, (7, 478, 3)).astype(np.float32)
    moving[4] = track.landmarks[0]*1.5 + 9                                # the portrait's own face, elsewhere and larger
    best = FommReenactment(picture(), (Film(), replace(track, landmarks=moving)), track, head, network=FakeFomm(), device='cpu', first='best')
    assert best.first == 4 and not np.array_equal(next(best.frames()), frames[0])
    with pytest.raises(InputError, match='no frames'): FommReenactment(picture(), ([], track), network=FakeFomm())
