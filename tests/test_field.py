"Density and colour networks."
import pytest
import torch

import ophav_nb  # noqa: F401
from ophav_nb.encoding import device_guard
from ophav_nb.field import Field, FieldConfig, fast_bfloat16, field_config, matrix_type, told


def inputs(n=7, device='cpu'):
    return torch.rand(n, 3, device=device), torch.nn.functional.normalize(torch.randn(n, 3, device=device), dim=-1), torch.randn(n, 16, device=device)


@pytest.mark.parametrize('changes', [dict(), dict(condition='none'), dict(degree=0), dict(bias=False), dict(precision='bfloat16'), dict(precision='float16')])
def test_shapes_and_ranges(changes):
    field = Field(FieldConfig(levels=2, log2_size=8, **changes))
    x, d, c = inputs()
    density, rgb = field(x, d, c)
    assert density.shape == (7,) and rgb.shape == (7, 3) and density.dtype == rgb.dtype == torch.float32
    assert (density > 0).all() and (rgb > 0).all() and (rgb < 1).all()


def test_gradients_reach_everything():
    field = Field(FieldConfig(levels=2, log2_size=8))
    density, rgb = field(*inputs(64))
    (density.sum() + rgb.sum()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in field.parameters())
    assert field.grid.params.grad.abs().sum() > 0


def test_density_falls_with_height():
    field = Field(FieldConfig(levels=2, log2_size=8))
    x, _, c = inputs()
    near, far = (field.density(x, c, torch.full((7,), h))[0] for h in (.005, .035))
    assert torch.allclose(near, field.density(x, c)[0]) and torch.allclose(far, near*torch.exp(torch.tensor(-3.)), rtol=1e-4)


def test_told():
    c, mouth = torch.randn(2, 16), torch.tensor([0., 1.])
    assert torch.equal(told(field_config('lean'), c, mouth), c)
    t = told(field_config('paper'), c, mouth)
    assert torch.equal(t[0], torch.ones(16)) and torch.allclose(t[1], c[1])
    assert told(field_config(condition='none'), c, mouth) is None


def test_paper_is_instas():
    f = Field(field_config('paper'))
    shapes = [tuple(l.weight.shape) for net in (f.density_network, f.colour_network) for l in net if hasattr(l, 'weight')]
    assert shapes == [(64, 144), (64, 64), (16, 64), (64, 32), (64, 64), (64, 64), (3, 64)]
    assert not any('bias' in name for name, _ in f.named_parameters())


def test_no_device_is_mixed():
    def step(device):
        field = Field(FieldConfig(levels=2, log2_size=8, precision='float32')).to(device)
        density, rgb = field(*inputs(5, device), height=torch.rand(5, device=device))
        (density.sum() + rgb.sum()).backward()
    device_guard(step)


def test_precision_is_asked_of_the_hardware(): assert fast_bfloat16('cpu') in (True, False) and not fast_bfloat16('meta')


@pytest.mark.parametrize('capability, expected', [((6, 1), torch.float32), ((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 6), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_precision_follows_the_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: capability)
    assert matrix_type('auto', 'cuda') == expected
    assert matrix_type('float32', 'cuda') == torch.float32 and matrix_type('float16', 'cpu') == torch.float16    # what is asked for stays
    assert matrix_type('auto', 'cpu') in (torch.float32, torch.bfloat16) and matrix_type('auto', 'meta') == torch.float32
