"The hash grid against a slow restatement of tiny-cuda-nn's rules, its gradients, its backends; spherical harmonics; the device guard."
import ophav_nb  # noqa: F401, before torch: it decides about threads
import logging
import math
import sys
import types

import numpy as np
import pytest
import torch

import ophav_nb.encoding as encoding
from ophav_nb.encoding import HashGrid, device_guard, grid_levels, resolve_backend, spherical_harmonics

GRIDS = [(3, 2, 10, 4, 1.7), (2, 4, 15, 8, 2.), (4, 1, 8, 2, 1.5), (2, 8, 6, 3, 3.)]
EDGES = [[0, 0, 0], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1], [.5, .5, .5], [.999999, .25, 1e-7], [-.05, .5, 1.2], [3., -2., .1]]


def slow_encode(x, params, levels, features, log2_size, base, scale):
    "One position at a time, in Python's integers: what tiny-cuda-nn's kernel does."
    out, offset = [], 0
    for l in range(levels):
        s = np.float32(np.exp2(np.float32(l)*np.log2(np.float32(scale)))*np.float32(base)) - np.float32(1)
        resolution = math.ceil(s) + 1
        size = min(-(-resolution**3//8)*8, 2**log2_size)
        p = [float(np.float32(float(s)*float(c) + .5)) for c in x]
        cell = [math.floor(c) for c in p]
        value = np.zeros(features)
        for corner in range(8):
            at, weight = [], 1.
            for d in range(3):
                up = (corner >> d) & 1
                at.append((cell[d] + up) % 2**32)
                f = p[d] - cell[d]
                weight *= f if up else 1 - f
            index, stride, dim = 0, 1, 0
            while dim < 3 and stride <= size:
                index, stride, dim = (index + at[dim]*stride) % 2**32, stride*resolution, dim + 1
            if size < stride: index = at[0] ^ (at[1]*2654435761 % 2**32) ^ (at[2]*805459861 % 2**32)
            entry = offset + index % size
            value += weight*params[entry*features:(entry+1)*features]
        out.append(value)
        offset += size
    return np.concatenate(out)


def make(layout, backend, seed=0, **kwargs):
    grid = HashGrid(*layout, backend=backend, **kwargs)
    with torch.no_grad(): grid.params.uniform_(-1, 1, generator=torch.Generator().manual_seed(seed))
    return grid


@pytest.mark.parametrize('layout', GRIDS)
@pytest.mark.parametrize('backend', ['torch', 'numba'])
def test_against_the_rules(layout, backend):
    grid = make(layout, backend)
    points = np.concatenate([np.random.default_rng(0).random((20, 3)), EDGES]).astype(np.float32)
    want = np.stack([slow_encode(p, grid.params.detach().double().numpy(), *layout) for p in points])
    np.testing.assert_allclose(grid(torch.tensor(points)).detach().numpy(), want, atol=3e-6)


def test_layout_of_the_paper_preset():
    levels = grid_levels(16, 8, 18, 16, 1.3819)
    assert levels.resolution[0] == 16 and levels.size[0] == 4096 and levels.size.max() == 2**18
    assert (levels.offset[1:] == np.cumsum(levels.size)[:-1]).all() and not levels.hashed[0] and levels.hashed[-1]


@pytest.mark.parametrize('layout', GRIDS)
def test_gradients_match_autograd(layout):
    x = torch.cat([torch.rand(300, 3, generator=torch.Generator().manual_seed(1)), torch.tensor(EDGES)])
    up = torch.randn(len(x), layout[0]*layout[1], generator=torch.Generator().manual_seed(2))
    grads = []
    for backend, keep in (('torch', True), ('numba', True), ('numba', False)):
        grid = make(layout, backend, persistent_grad=keep)
        (grid(x)*up).sum().backward()
        grads.append(grid.params.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=2e-4, rtol=1e-5)
    torch.testing.assert_close(grads[2], grads[1], atol=0, rtol=0)


def test_gradient_accumulates_and_is_reset():
    grid, x = make(GRIDS[0], 'numba'), torch.rand(50, 3)
    grid(x).sum().backward()
    once = grid.params.grad.clone()
    grid(x).sum().backward()                                   # accumulation
    torch.testing.assert_close(grid.params.grad, 2*once)
    grid.zero_grad(set_to_none=False)
    (grid(x).sum() + grid(x).sum()).backward()                 # two uses in one graph
    torch.testing.assert_close(grid.params.grad, 2*once)
    kept = grid.params.grad
    grid.zero_grad()
    grid(x).sum().backward()                                   # somebody kept the last gradient: it must not change
    torch.testing.assert_close(kept, 2*once)
    torch.testing.assert_close(grid.params.grad, once)
    view = grid.params.grad[:10]
    grid.zero_grad()
    (3*grid(x)).sum().backward()
    torch.testing.assert_close(view, once[:10])


def test_gradient_memory_is_reused():
    grid, x, places = make(GRIDS[1], 'numba'), torch.rand(50, 3), set()
    optimiser = torch.optim.Adam(grid.parameters())
    for _ in range(4):
        optimiser.zero_grad()
        grid(x).square().sum().backward()
        optimiser.step()
        places.add(grid.params.grad.data_ptr())
    assert len(places) == 1


def test_gradient_is_deterministic_for_any_number_of_threads():
    import numba
    x, before, grads = torch.rand(5000, 3), numba.get_num_threads(), []
    try:
        for n in {1, before}:
            numba.set_num_threads(n)
            for _ in range(2):
                grid = make(GRIDS[1], 'numba')
                grid(x).sin().sum().backward()
                grads.append(grid.params.grad)
    finally: numba.set_num_threads(before)
    assert all((g == grads[0]).all() for g in grads)


def test_positions_have_gradients():
    grid, x = make(GRIDS[1], 'numba'), torch.rand(20, 3, requires_grad=True)
    grid(x).sum().backward()
    reference = make(GRIDS[1], 'torch')
    y = x.detach().clone().requires_grad_()
    reference(y).sum().backward()
    assert float(x.grad.abs().max()) > 0
    torch.testing.assert_close(x.grad, y.grad)


def test_a_table_that_is_no_leaf_and_functional_call():
    grid, x = make(GRIDS[0], 'numba'), torch.rand(30, 3)
    other = (grid.params.detach()*2).requires_grad_()
    torch.func.functional_call(grid, {'params': other*1.}, (x,)).sum().backward()
    grid(x).sum().backward()
    torch.testing.assert_close(other.grad, grid.params.grad)


def test_shapes_precisions_and_nothing():
    grid = make(GRIDS[0], 'numba')
    x = torch.rand(4, 5, 3)
    assert grid(x).shape == (4, 5, 6) and grid(x.flatten(0, 1)).shape == (20, 6)
    torch.testing.assert_close(grid(x.double()), grid(x))
    assert grid(torch.zeros(0, 3)).shape == (0, 6)
    grid(torch.zeros(0, 3)).sum().backward()
    assert float(grid.params.grad.abs().max()) == 0
    with torch.autocast('cpu', torch.bfloat16): (grid(x).bfloat16()*2).sum().backward()
    assert torch.isfinite(grid.params.grad).all()
    assert torch.isfinite(make(GRIDS[0], 'numba')(torch.tensor([[1e9, -1e9, .5]]))).all()   # far outside: wraps, no crash


def test_state_pickle_and_copy():
    import copy
    import pickle
    grid, x = make(GRIDS[0], 'auto'), torch.rand(9, 3)
    grid(x).sum().backward()
    for twin in (copy.deepcopy(grid), pickle.loads(pickle.dumps(grid))): torch.testing.assert_close(twin(x), grid(x))
    assert list(grid.state_dict()) == ['params']


def test_backends_are_chosen_and_logged(caplog, monkeypatch):
    assert resolve_backend('auto', 'cpu') == 'numba' and resolve_backend('torch', 'cuda') == 'torch'
    with pytest.raises(ValueError, match='CPU'): resolve_backend('numba', 'cuda')
    with pytest.raises(ValueError, match='choose'): resolve_backend('c++')
    with pytest.raises(ValueError, match='CUDA'): resolve_backend('tcnn', 'cpu')
    cause = OSError('Unknown compute capability. Ensure PyTorch with CUDA support is installed.')
    def broken(name): raise cause
    monkeypatch.setattr(encoding.importlib, 'import_module', broken)
    for name in ('tcnn', 'gpu'): monkeypatch.setattr(encoding, name, encoding._Lazy(name, 'hint'))     # not tried yet
    encoding.say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert resolve_backend('auto', 'cuda') == resolve_backend('auto', 'cuda') == 'torch'
    assert sum('compute capability' in r.message for r in caplog.records) == 1                    # once, with the cause
    with pytest.raises(ImportError, match='compute capability') as caught: resolve_backend('tcnn', 'cuda')
    assert caught.value.__cause__ is cause


def test_tinycudann_is_called_as_it_wants(monkeypatch):
    "A stand-in for the module: it checks the calls, and computes with the reference."
    calls = []

    class Encoding(torch.nn.Module):
        def __init__(self, n_input_dims, encoding_config, seed=1337, dtype=None):
            super().__init__()
            calls.append((n_input_dims, encoding_config, dtype))
            c = encoding_config
            self.levels = grid_levels(c['n_levels'], c['n_features_per_level'], c['log2_hashmap_size'], c['base_resolution'], c['per_level_scale'])
            self.params = torch.nn.Parameter(torch.zeros(self.levels.entries*self.levels.features))

        def forward(self, x):
            assert x.dim() == 2 and x.dtype == torch.float32
            return encoding._grid_torch(x, self.params.view(-1, self.levels.features), self.levels)

    module = types.ModuleType('tinycudann')
    module.Encoding = Encoding
    monkeypatch.setitem(sys.modules, 'tinycudann', module)
    assert resolve_backend('auto', 'cuda') == 'tcnn' and encoding.tcnn
    grid, reference, x = make(GRIDS[0], 'auto'), make(GRIDS[0], 'torch'), torch.rand(3, 7, 3)
    monkeypatch.setattr(encoding, 'resolve_backend', lambda backend, device: 'tcnn')              # the CPU plays the GPU
    torch.testing.assert_close(grid(x), reference._tcnn_forward(x.view(-1, 3)).view(3, 7, -1))
    assert calls[0] == (3, dict(otype='HashGrid', n_levels=3, n_features_per_level=2, log2_hashmap_size=10, base_resolution=4, per_level_scale=1.7), torch.float32)
    grid(x).sum().backward()                                                                      # its gradient lands on our parameters
    assert float(grid.params.grad.abs().max()) > 0
    assert list(grid.state_dict()) == ['params'] and len(list(grid.parameters())) == 1
    grid.load_state_dict({'params': torch.ones_like(grid.params)})
    torch.testing.assert_close(grid(x), torch.ones(3, 7, 6))
    assert grid._native is not None and len(calls) == 2                                           # built once a grid
    grid.to(torch.float32)
    grid.params = torch.nn.Parameter(torch.zeros_like(grid.params))                               # replaced, as `.to(device)` may do
    torch.testing.assert_close(grid(x), torch.zeros(3, 7, 6))


def test_another_layout_of_tinycudann_is_refused(monkeypatch):
    class Encoding(torch.nn.Module):
        def __init__(self, *args, **kwargs):
            super().__init__()
            self.params = torch.nn.Parameter(torch.zeros(7))
    module = types.ModuleType('tinycudann')
    module.Encoding = Encoding
    monkeypatch.setitem(sys.modules, 'tinycudann', module)
    with pytest.raises(RuntimeError, match='lays this grid out'): make(GRIDS[0], 'auto')._tcnn_forward(torch.rand(2, 3))


def test_spherical_harmonics():
    d = torch.nn.functional.normalize(torch.randn(200, 3, dtype=torch.double), dim=-1)
    Y = spherical_harmonics(d)
    norms = torch.stack([(Y[:, b*b:(b+1)**2]**2).sum(1) for b in range(4)], 1)
    torch.testing.assert_close(norms, torch.tensor([(2*b+1)/(4*math.pi) for b in range(4)], dtype=torch.double).expand(200, 4))   # Unsoeld's theorem
    x, y, z = d.T
    torch.testing.assert_close(Y[:, 1:4], math.sqrt(3/(4*math.pi))*torch.stack([-y, z, -x], 1))   # tiny-cuda-nn's signs
    for degree in range(1, 5): torch.testing.assert_close(spherical_harmonics(d, degree), Y[:, :degree**2])
    with pytest.raises(ValueError): spherical_harmonics(d, 5)


@pytest.mark.parametrize('bug', [None, 'constant', 'input', 'index'])
def test_device_guard(bug):
    def step(device):
        grid, net = HashGrid(*GRIDS[0]).to(device), torch.nn.Linear(6, 3).to(device)
        x = torch.rand(8, 3, device='cpu' if bug == 'input' else device)
        if bug == 'index': x = x[torch.zeros(8, dtype=torch.long)]
        y = net(grid(x))
        if bug == 'constant': y = y + torch.ones(3)
        y.sum().backward()
        return grid.params.grad.device.type
    if bug is None: assert device_guard(step) == 'meta'
    else:
        with pytest.raises((RuntimeError, NotImplementedError)): device_guard(step)
