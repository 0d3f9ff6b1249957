"""On a GPU, where there is one: `pytest -m cuda tests`. Each check is one of `device_bodies.py`; `test_device.py` runs the same ones on the CPU."""
import numpy as np
import pytest
import torch

import ophav_nb  # noqa: F401
from device_bodies import BODIES, encoder, field, recorded, short_fit, step, tinycudann
from ophav_nb import deform
from ophav_nb.encoding import gpu, gpu_kernels, tcnn

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU that torch can use')]


@pytest.mark.parametrize('body', BODIES, ids=lambda b: b.__name__)
def test_on_the_gpu(body, tmp_path, monkeypatch):
    "Torch operations alone, the march too."
    monkeypatch.setattr(deform, 'gpu_kernels', lambda device: False)
    body('cuda', tmp_path, 'torch')


@pytest.mark.parametrize('body', [*BODIES, recorded], ids=lambda b: b.__name__)
def test_with_our_kernels(body, tmp_path):
    if not gpu_kernels('cuda'): pytest.skip('Triton is not usable')
    body('cuda', tmp_path, 'triton')


def test_what_cannot_be_recorded():
    "A number that is fetched: said, and torch goes on as before."
    if not gpu_kernels('cuda'): pytest.skip('Triton is not usable')
    here, x = torch.cuda.current_stream(), torch.ones(3, device='cuda')
    with pytest.raises(gpu.NotRecorded): gpu.Recorded(lambda a: a*a.sum().item(), [np.ones(3, np.float32)], 'cuda')
    assert torch.cuda.current_stream() == here and float((2*x).sum()) == 6


@pytest.fixture
def native():
    "tinycudann; imported here, since that fails without a GPU."
    if not tcnn: pytest.skip(f'tinycudann is not usable: {tcnn._cause}')
    return tcnn


def test_tinycudann_is_the_reference(native): tinycudann('cuda', native)


@pytest.mark.parametrize('body', [encoder, field, step, short_fit], ids=lambda b: b.__name__)
def test_with_tinycudann(body, native, tmp_path): body('cuda', tmp_path, 'tcnn')
