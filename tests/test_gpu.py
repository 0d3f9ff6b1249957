"""The GPU's kernels without a GPU: Triton's interpreter runs them in numpy, in a process of its own (it must be asked for before Triton is imported).
On a GPU the same kernels stand behind `test_cuda.py`."""
import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

needs_triton = pytest.mark.skipif(not importlib.util.find_spec('triton'), reason='needs Triton, which comes with torch for Linux')


def grids():
    "Dense and hashed levels, one to eight numbers an entry, places outside the cube, gradients that lie in memory in any order, nothing at all."
    import torch
    from ophav_nb import gpu
    from ophav_nb.encoding import HashGrid
    torch.manual_seed(0)
    for layout, n in (((4, 2, 10, 8, 1.6), 300), ((3, 1, 8, 4, 1.5), 256), ((2, 8, 6, 5, 2.), 77), ((2, 4, 9, 16, 1.3), 0)):
        grid, width = HashGrid(*layout, backend='torch'), layout[0]*layout[1]
        with torch.no_grad(): grid.params.normal_()
        x = torch.rand(n, 3)*1.4 - .2
        for up in (torch.randn(n, width), torch.randn(width, n).t(), torch.randn(1, 1).expand(n, width)):
            slopes = []
            for features in (grid(x), gpu.grid_features(x, grid.params, layout)):
                slopes.append((features.detach(), *torch.autograd.grad((features*up).sum(), grid.params)))
            for a, b in zip(*slopes): torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-5)


def marches():
    "Two poses of a mesh full of holes, blocks that hold both, a point that is no number."
    import numpy as np
    import torch
    from ophav_nb import gpu
    from ophav_nb.deform import Deformer
    from ophav_nb.head import HeadModel
    head, rng = HeadModel.load(), np.random.default_rng(0)
    faces = np.ascontiguousarray(head.faces[::40])
    poses = np.stack([head()[0].numpy(), head(None, head.expression(mouthSmile=.9, jawOpen=.5)[None])[0].numpy()])
    slot = np.repeat([0, 1], 20)
    points = poses[slot[:, None], faces[rng.integers(0, len(faces), 40)]].mean(1) + rng.normal(0, .008, (40, 3))
    o, depth = np.tile(np.float32([.02, 0, .8]), (40, 1)), rng.uniform(.70, .74, (40, 2)).astype(np.float32)
    d = ((points - o)/(o - points)[:, 2:]).astype(np.float32)
    o[7] = np.nan
    amount, some = rng.random(len(poses[0])), rng.random(len(faces)) < .5
    for mapping in ('smooth', 'triangle'):
        deformer = Deformer(head.canonical().numpy(), faces, amount, some, some, mapping)
        rays, there = (slot, o, d, depth), torch.as_tensor
        wanted = deformer.march(deformer.poses(poses), *rays)
        found = gpu.march(there(o), there(d), there(depth), there(slot), deformer.poses(poses, 'cpu'), deformer.known('cpu'), float(deformer.size), mapping == 'smooth')
        whole = torch.ones(80, dtype=bool)
        whole[14:16] = False
        same = whole & (wanted.face == found[4])                               # the others are ties
        assert same.float().mean() > .7
        for a, b, most in zip(wanted, found, (1e-5, 1e-4, 1e-4, 1e-6)): torch.testing.assert_close(b[same], a[same], atol=most, rtol=0)
        torch.testing.assert_close(found[3][whole], wanted.height[whole], atol=1e-6, rtol=0)
        assert not found[3][~whole].isfinite().any() and ((found[4] >= 0) & (found[4] < len(faces))).all()


@needs_triton
@pytest.mark.parametrize('check', [grids, marches], ids=lambda c: c.__name__)
def test_in_the_interpreter(check):
    out = subprocess.run([sys.executable, __file__, check.__name__], env=os.environ | {'TRITON_INTERPRET': '1'}, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-3000:]


def test_who_computes_on_a_gpu(monkeypatch):
    "Our kernels where there are Triton and a GPU that it compiles for, and where a first one ran; else tinycudann; else torch, which is said."
    import torch
    from ophav_nb import encoding
    assert not encoding.gpu_kernels('cpu') and not encoding.gpu_kernels('meta')
    with pytest.raises(ValueError, match='CUDA'): encoding.resolve_backend('triton', 'cpu')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with monkeypatch.context() as m:                                     # a machine with Triton, but no GPU
        m.setitem(sys.modules, 'ophav_nb.gpu', SimpleNamespace(grid_features=None))
        m.setattr(encoding, 'gpu', encoding._Lazy('ophav_nb.gpu', 'hint'))
        with pytest.raises(ImportError, match='sees no GPU'): encoding.resolve_backend('triton', 'cuda')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    fine, broken = (SimpleNamespace(trial=lambda device, cause=cause: cause, grid_features=None) for cause in (None, OSError('no compiler')))
    for capability, module, expected in (((9, 0), fine, 'triton'), ((6, 1), fine, 'torch'), ((9, 0), broken, 'torch'), ((9, 0), None, 'torch')):
        monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None, c=capability: c)
        if module is None: monkeypatch.setattr(encoding, 'gpu', encoding._Lazy('no_such_module', 'hint'))
        else: monkeypatch.setitem(sys.modules, 'ophav_nb.gpu', module)
        assert encoding.resolve_backend('auto', 'cuda') == expected
        if expected == 'torch':
            with pytest.raises(ImportError, match='hint' if module is None else 'no compiler' if module is broken else 'too old'): encoding.resolve_backend('triton', 'cuda')
        monkeypatch.setattr(encoding, 'gpu', encoding._Lazy('ophav_nb.gpu', 'hint'))


def test_convolutions_are_exact(monkeypatch):
    "Inside `precision`, however many are open at once; what the switch was comes back, after an error, too."
    import torch
    from ophav_nb.nets.blocks import precision
    for before in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', before)
        one, two = precision('cuda', False), precision('cuda', False)
        with pytest.raises(KeyError):
            with one:
                assert not torch.backends.cudnn.allow_tf32
                raise KeyError
        assert torch.backends.cudnn.allow_tf32 == before
        one.__enter__(), two.__enter__(), one.__exit__(None, None, None)
        assert not torch.backends.cudnn.allow_tf32
        two.__exit__(None, None, None)
        assert torch.backends.cudnn.allow_tf32 == before
        with precision('cuda', True): assert torch.backends.cudnn.allow_tf32 == before
        with precision('cpu'): assert torch.backends.cudnn.allow_tf32 == before


def test_a_backend_that_cannot_be_is_said_first(tmp_path):
    from ophav_nb.evaluate import evaluate_clip
    from ophav_nb.pipeline import create
    from ophav_nb.run import InputError
    for backend in ('triton', 'tcnn', 'fast'):
        with pytest.raises(InputError, match=f'--backend {backend}'): create('astronaut', tmp_path/'run', backend=backend, device='cpu')
    assert not (tmp_path/'run').exists()


if __name__ == '__main__': globals()[sys.argv[1]]()
