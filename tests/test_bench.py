"The benchmark itself: it takes turns, its reference learns, it compares with an earlier run."
import ophav_nb  # noqa: F401, before torch: it decides about threads
import copy
import json

import pytest
import torch

from ophav_nb.bench import LEAN, NETWORKS, OurStep, NaiveStep, Part, TorchHashGrid, bench, compare_benches, interleaved, measure
from ophav_nb.run import InputError


def test_turns_are_interleaved():
    order = []
    turns = interleaved({k: (lambda k=k: order.append(k)) for k in 'abc'}, seconds=0, repeats=3)
    assert ''.join(order) == 'abc' + 'abc' + 'bca' + 'cab' and all(len(w) == len(c) == 3 for w, c in turns.values())


def test_measure_says_what_was_missed():
    work = lambda n: (lambda: sum(range(n)))
    row = measure(Part('x', dict(ours=work(1000), slow=work(100000)), dict(slow=5., absent=2.), dict(absent='not installed')), 0, 5)
    assert row['ratio']['slow'] > 5 and row['reached'] == {'slow': True} and row['missing'] == {'absent': 'not installed'}
    assert measure(Part('x', dict(ours=work(100000), slow=work(1000)), dict(slow=5.)), 0, 5)['reached'] == {'slow': False}


def test_plain_grid_is_a_grid():
    grid = TorchHashGrid(2, 2, 8, 4, 2.)
    corner = torch.tensor([[.25, .5, .75]])                # a point of both levels: nothing to interpolate
    values = grid(corner).view(2, 2)
    for l, n in enumerate((4, 8)):
        x, y, z = (int(c*n) for c in corner[0])
        torch.testing.assert_close(values[l], grid.params[(x ^ y*2654435761 ^ z*805459861) % 256 + l*256])
    grid(torch.rand(9, 3)).sum().backward()
    assert float(grid.params.grad.abs().sum()) > 0


def test_both_steps_learn():
    for kind in (OurStep, NaiveStep):
        step = kind(LEAN, 32, 4)
        losses = [step() for _ in range(20)]
        assert losses[-1] < losses[0]


def test_command(tmp_path):
    lines = []
    result = bench('raster', out=tmp_path/'bench.json', quick=True, say=lines.append)
    assert json.loads((tmp_path/'bench.json').read_text())['parts']['raster']['error'] == 0 and 'raster' in lines[0]
    before = copy.deepcopy(result)
    before['parts']['raster']['ratio']['torch'] *= 10
    assert [r['lost'] for r in compare_benches(before, result)] == [True] and not compare_benches(result, result)[0]['lost']
    with pytest.raises(InputError, match='no part'): bench(['everything'], out=None)
    for text, said in (('{', 'is damaged; give an earlier'), ('[1]', 'is damaged; give an earlier'), ('{"rows": {}}', 'holds no parts')):
        (tmp_path/'bad.json').write_text(text)
        with pytest.raises(InputError, match=said): bench('raster', compare=tmp_path/'bad.json', out=None)      # before minutes are spent
    with pytest.raises(InputError, match='no such file'): bench('raster', compare=tmp_path/'none.json', out=None)


def test_samples_a_second_and_files_of_before(tmp_path):
    "The networks' part is exact, rates stand beside the times, and a file without them is compared as ever."
    old = dict(format=2, parts=dict(encoder=dict(ratio=dict(plain_torch=1e9, matrix=1.), milliseconds=dict(ours=1.))))
    (tmp_path/'old.json').write_text(json.dumps(old))
    lines = []
    result = bench('mlps,encoder,step_lean', out=None, quick=True, say=lines.append, compare=tmp_path/'old.json')
    assert result['parts']['mlps']['error'] < 1e-4 and result['parts']['mlps']['ratio']['plain_torch'] > 0
    assert all(row['unit'] == 'samples' and row['frames_per_second'] > 0 for row in result['parts'].values())
    assert sum('samples/s' in line for line in lines) == 3 and [(r['part'], r['reference'], r['lost']) for r in result['compared']] == [('encoder', 'plain_torch', True)]


def test_parts_without_reference(tmp_path):
    "Frames a second, work and memory are told, and the matrix product makes them comparable."
    result = bench(['animator', 'network_arcface18'], out=None, quick=True, say=lambda line: None)['parts']
    coarse, network = result['animator'], result['network_arcface18']
    assert coarse['frames_per_second'] > 0 and coarse['ratio']['matrix'] > 0 and coarse['peak_mb'] > 100
    assert network['gflop'] == pytest.approx(4.5, abs=.1) and 0 < network['matrix_share'] < 2
    assert [r['reference'] for r in compare_benches(dict(parts=result), dict(parts=result))] == ['matrix', 'matrix']
    assert len(NETWORKS) == len(bench.__globals__['_chosen']('networks')) < len(bench.__globals__['_chosen']('all'))


def test_both_trainings_come_closer():
    row = bench('fit', out=None, quick=True, say=lambda line: None)['parts']['fit']
    assert all(d > 5 for d in row['decibels'].values()) and row['ratio']['naive'] > 0
