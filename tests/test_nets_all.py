"What must hold for every network of others: one device, single precision, mixed precision by a switch, every parameter used."
import ophav_nb  # noqa: F401, before torch: it decides about threads
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ophav_nb.encoding import device_guard
from ophav_nb.nets import arcface18, bisenet, blocks, deep3d, facevid2vid, fan, fomm, liveportrait, mediapipe, mica, parsenet, pirender, retinaface, rvm, s3fd


def rand(*shape, device): return torch.rand(shape, device=device)


def vid(net, device):
    image = rand(2, 3, 128, 128, device=device)
    canonical, state = net.kp_detector(image), net.he_estimator(image)
    source, moved = facevid2vid.keypoints(canonical, state), facevid2vid.keypoints(canonical, state, yaw=10.)
    picture, flow = net.generator(image, facevid2vid.drive(source, moved, source), source)
    return picture, flow.deformation, flow.occlusion


def portrait(net, device):
    image = rand(2, 3, 128, 128, device=device)
    state = net.motion_extractor(image)
    first, source = state[:1], liveportrait.keypoints(state)
    driving = liveportrait.keypoints(liveportrait.relative_state(first, state, first, 'lip'))
    driving = driving + liveportrait.retarget_eyes(net, source, rand(2, 3, device=device)) + liveportrait.retarget_lips(net, source, rand(2, 2, device=device))
    driving = liveportrait.expression_friendly(source[:1], liveportrait.stitch(net, source, driving), liveportrait.keypoints(liveportrait.absolute_state(first, first)))
    picture, flow = net.render(net.volume(image), driving, source)
    return picture, flow.deformation, flow.occlusion


def first_order(net, device):
    image = rand(2, 3, 128, 128, device=device)
    kp = net.kp_detector(image)
    moved = fomm.Points(kp.value.flip(0), kp.jacobian)
    return net.generator(image, kp, fomm.transfer(kp, moved, kp))


def renderer(net, device): return net(2*rand(2, 3, 64, 64, device=device) - 1, pirender.windows(rand(4, 73, device=device), torch.arange(2, device=device)))


def matting(net, device):
    frames = rand(1, 2, 3, 64, 64, device=device)
    _, _, *states = net(frames, downsample_ratio=.5)
    return net(frames, *states, downsample_ratio=.5), net(frames, segmentation_pass=True)


def parsing(net, device): return net(net.normalise(rand(2, 3, 64, 64, device=device)))


def pasting(net, device):
    scores, image = net(rand(1, 3, 128, 128, device=device))
    return scores, image, parsenet.soften(blocks.constant(parsenet.PASTED, image)[scores.argmax(1)])


def identity(net, device):
    image, points = rand(2, 3, 96, 96, device=device), rand(2, 68, 2, device=device)
    template = torch.from_numpy(arcface18.TEMPLATE).to(device)
    return net(arcface18.grey_of(arcface18.align(image, arcface18.similarity(arcface18.five_points(points), template))))


def small_mica():
    with torch.device('meta'): net = mica.Mica()
    net.arcface, net.flameModel['regressor'] = mica.ArcFace100(64, (2, 2, 2, 2)), mica.Mapping()
    return net


def shape(net, device): return net(2*rand(2, 3, 64, 64, device=device) - 1)
def coefficients(net, device): return net(rand(2, 3, 64, 64, device=device))


def points(net, device):
    maps = net(rand(2, 3, 64, 64, device=device))
    return maps, fan.peaks(maps[-1]), fan.both_ways(net, rand(2, 3, 64, 64, device=device))


def boxes(net, device):
    found = net(255*rand(1, 3, 64, 64, device=device) - 110)
    return found, [s3fd.decode(box, stride) for (_, box), stride in zip(found, s3fd.STRIDES)]


def faces(net, device):
    box, likely, five = net(255*rand(2, 3, 64, 64, device=device) - 110)
    return likely, retinaface.decode(box, five, retinaface.anchors(64, 64, torch.device(device)))


CASES = {   # name -> (the network, what is asked of it, the ends of names of parameters that nothing comes of)
    'facevid2vid': (lambda: facevid2vid.FaceVid2Vid(width=8, keypoints=5), vid, ()),
    'liveportrait': (lambda: liveportrait.LivePortrait(width=8), portrait, ()),
    'fomm': (fomm.Fomm, first_order, ()),
    'pirender': (pirender.PIRenderer, renderer, ('conv1.weight', 'conv1.bias', 'norm1.mlp_shared.0.weight', 'norm1.mlp_shared.0.bias', 'norm1.mlp_gamma.weight',
                                                  'norm1.mlp_gamma.bias', 'norm1.mlp_beta.weight', 'norm1.mlp_beta.bias')),   # of the editing network alone
    'rvm': (rvm.RobustVideoMatting, matting, ()),
    'bisenet': (bisenet.BiSeNet, parsing, ()),
    'parsenet': (lambda: parsenet.ParseNet(width=8, most=16, depth=2), pasting, ()),
    'arcface18': (arcface18.ArcFace18, identity, ()),
    'mica': (small_mica, shape, ()),
    'deep3d': (deep3d.Deep3D, coefficients, ()),
    'fan': (lambda: fan.FAN(stacks=2), points, ()),
    's3fd': (s3fd.S3FD, boxes, ()),
    'retinaface': (retinaface.RetinaFace, faces, ()),
}
every = pytest.mark.parametrize('name', CASES)


def made(name, seed=0):
    torch.manual_seed(seed)
    net = CASES[name][0]()
    for module in net.modules():
        if isinstance(module, liveportrait._ResponseNorm): nn.init.normal_(module.gamma, 0, .2)      # its constructor switches it off
    return net


def floats(answer): return [t for t in tree_leaves(answer if not isinstance(answer, dict) else list(answer.values())) if torch.is_tensor(t) and t.is_floating_point()]


@every
def test_one_device_forward_and_a_training_step(name):
    "Nothing is left on another device; all parameters but those known to be dead learn."
    build, ask, dead = CASES[name]
    def step(device):
        with device: net = build()
        optimiser = torch.optim.Adam(net.train().parameters())
        sum(t.sum() for t in floats(ask(net, device)) if t.requires_grad).backward()
        optimiser.step()
        return {k for k, p in net.named_parameters() if p.grad is None}
    unused = device_guard(step)
    assert unused == {k for k in unused if k.endswith(dead) and k.startswith('editing_net.decoder.res')} and bool(unused) == bool(dead)


def test_mediapipes_networks_stay_on_one_device():
    def step(device):
        for net in mediapipe.load_networks().values():
            image = rand(2, 3, net.size, net.size, device=device).requires_grad_()
            sum(t.sum() for t in net.to(device)(image)).backward()
            assert image.grad.device.type == 'meta'
    device_guard(step)


class Watch(TorchDispatchMode):
    "Notes every operation that answers in double precision."
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(torch.is_tensor(t) and t.dtype == torch.float64 for t in tree_leaves(out)): self.seen.add(str(func))
        return out


@every
def test_no_double_precision_and_constants_are_kept(name):
    "Asked twice, the second time nothing is made from python's numbers any more, and nothing is computed in double precision."
    net, ask = made(name).eval(), CASES[name][1]
    with torch.inference_mode(), Watch() as watch: ask(net, 'cpu')
    assert not watch.seen
    kept = [f for f in (blocks._constant, blocks._coordinates, blocks._triples, retinaface.anchors, s3fd._middles)]
    before = [f.cache_info().misses for f in kept]
    with torch.inference_mode(): ask(net, 'cpu')
    assert before == [f.cache_info().misses for f in kept]


@every
def test_mixed_precision_from_the_start(name):
    "A network that has never been asked before, at half precision: nearly the same answers."
    answers = []
    for half in (False, True):
        net = made(name).eval()
        torch.manual_seed(1)
        with torch.inference_mode(), blocks.precision('cpu', half): answers.append(floats(CASES[name][1](net, 'cpu')))
    far = [float(torch.linalg.vector_norm(b.float() - a)/torch.linalg.vector_norm(a).clamp(min=1e-6)) for a, b in zip(*answers, strict=True)]
    assert max(far) < .1
