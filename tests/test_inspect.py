"Widgets over a toy run: what they show, what they show of a run that is not finished, their still pictures; the report."
import ophav_nb  # noqa: F401, before torch: it decides about threads
import base64
import html
import io
import json
import shlex
import shutil

import numpy as np
import pytest
from PIL import Image

from ophav_nb.inspect import (MEANINGS, Curves, RunView, compare_films, compare_runs, example_run, inspect_coarse, inspect_drift, inspect_fit, inspect_run,
                              draw_views, joined, overlay, rounds_strip, training_curves, write_report)
from ophav_nb.media import read_video, write_video
from ophav_nb.rounds import check_numbers
from ophav_nb.run import InputError


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return example_run(tmp_path_factory.mktemp('inspect')/'run', frames=6, size=96, fit=False)


def controls(panel, kind):
    found, todo = [], [panel]
    while todo:
        w = todo.pop(0)
        if type(w).__name__ == kind: found.append(w)
        todo += list(getattr(w, 'children', ()))
    return found


def shown(widget): return np.asarray(Image.open(io.BytesIO(widget.value)))


def test_coarse_frames_follow_the_slider(run):
    panel = inspect_coarse(run)
    image, slider, box = controls(panel, 'Image')[0], controls(panel, 'IntSlider')[0], controls(panel, 'Checkbox')[0]
    assert slider.max == 5 and shown(image).shape[0] == 96
    first = shown(image)
    slider.value = 2
    assert np.abs(shown(image).astype(int) - first).max() > 50
    plain = shown(image)
    box.value = True
    assert np.abs(shown(image).astype(int) - plain).max() > 50


def test_opacity_lays_the_mesh_over_the_frame(run):
    panel = inspect_coarse(run)
    image, box, opacity = controls(panel, 'Image')[0], controls(panel, 'Checkbox')[0], controls(panel, 'FloatSlider')[0]
    plain = shown(image)
    opacity.value = .8                    # a slider that is moved does something, whether the mesh was asked for or not
    assert box.value and np.abs(shown(image).astype(int) - plain).max() > 50


def test_a_damaged_frame_is_said_in_the_pictures_place(run, tmp_path):
    folder = tmp_path/'run'
    shutil.copytree(run, folder)
    panel = inspect_coarse(folder)
    whole = shown(controls(panel, 'Image')[0])
    (folder/'coarse'/'frames'/'00002.png').write_bytes(b'')
    controls(panel, 'IntSlider')[0].value = 2
    said = shown(controls(panel, 'Image')[0])
    assert said.shape != whole.shape and .01 < (said < 128).mean() < .5
    controls(panel, 'IntSlider')[0].value = 0
    assert (shown(controls(panel, 'Image')[0]) == whole).all()


def test_live_plots_mark_rounds_and_the_chosen_one(run):
    "What the texts beside them say: a dashed line where a round begins, a ring around the chosen round."
    lines = training_curves(run).figure.layout.shapes
    assert len(lines) == 4*2 and {line.x0 for line in lines} == {1200, 2400} and lines[0].line.dash == 'dash'
    plot = controls(inspect_drift(run), 'FigureWidget')[0]
    rings = [t for t in plot.data if t.mode == 'markers']
    assert len(rings) == 6 and {t.x[0] for t in rings} == {RunView(run).choice['chosen']}


def test_what_next_can_be_pasted_into_a_shell(run, tmp_path):
    folder = tmp_path/"Ann's portrait"
    shutil.copytree(run, folder)
    (folder/'avatar').mkdir(exist_ok=True)
    (folder/'avatar'/'avatar.safetensors').write_bytes(b'')
    text = html.unescape(write_report(folder).read_text().split('What next')[1].split('<pre>')[1].split('</pre>')[0])
    words = [shlex.split(line, comments=True) for line in text.splitlines()]
    assert [w[:3] for w in words] == [['ophav', 'animate', folder.name]]*2 + [['ophav', 'inspect', folder.name]]
    assert len({line.index('#') for line in text.splitlines()}) == 1


def test_fit_opacity_and_landmarks(run):
    panel = inspect_fit(run)
    image, opacity, box = controls(panel, 'Image')[0], controls(panel, 'FloatSlider')[0], controls(panel, 'Checkbox')[0]
    box.value, opacity.value = False, 0
    plain = RunView(run).portrait()
    assert np.abs(shown(image).astype(int) - plain).mean() < 3
    box.value = True
    red = (shown(image).astype(int) - plain)[..., 0]
    assert (red > 60).sum() > 20
    assert 'landmark error' in controls(panel, 'HTML')[0].value


def test_what_no_picture_showed_is_white(run, tmp_path):
    folder = tmp_path/'run'
    shutil.copytree(run, folder)
    whole = RunView(folder).portrait()
    (folder/'portrait'/'crop.json').write_text(json.dumps(dict(shown=[0, 9.5, 80.2, 96])))
    part = RunView(folder).portrait()
    assert (part[:9] == 255).all() and (part[:, 80:] == 255).all() and (part[10:, :80] == whole[10:, :80]).all() and (whole[:9] != 255).any()
    assert (shown(controls(inspect_coarse(folder), 'Image')[0])[:5, :96] > 245).all() and (shown(controls(inspect_fit(folder), 'Image')[0])[:5] > 245).all()


def test_drift(run):
    view, panel = RunView(run), inspect_drift(run)
    assert rounds_strip(view, 0)[1] == ['coarse', 'round 0', 'round 1', 'round 2']
    images, sliders = controls(panel, 'Image'), controls(panel, 'IntSlider')
    before = [im.value for im in images]
    sliders[0].value = sliders[1].value = 1
    assert all(a != im.value for a, im in zip(before, images))
    border = controls(panel, 'FloatSlider')[0]
    before = images[1].value
    border.value = .9
    assert images[1].value != before
    assert any('18% sharper' in h.value for h in controls(panel, 'HTML'))
    assert len(controls(panel, 'FigureWidget')) == 1


def test_checked_frames_are_known(run):
    assert list(RunView(run).checked()) == list(check_numbers(len(RunView(run).frames('coarse', 'frames')), 8)[0])


def test_still_pictures(run):
    for panel in (inspect_coarse(run), inspect_fit(run), training_curves(run), inspect_drift(run), inspect_run(run)):
        data, _ = panel._repr_mimebundle_()
        assert 'application/vnd.jupyter.widget-view+json' in data
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(data['image/png']))).convert('RGB'))
        assert picture.shape[1] <= 900 and picture.std() > 10 and len(data['image/png']) < 600_000


def test_curves_live():
    curves = Curves(every=0.)
    assert curves.still() is None
    for step in range(1, 6): curves(dict(step=step, loss=1/step, psnr=float(step), samples_per_second=1e5, memory_mb=5.))
    assert list(curves.figure.data[0].x) == [1, 2, 3, 4, 5] and curves.figure.data[1].y[-1] == 5. and 'loss 0.2' in curves.text.value
    slow = Curves(every=1e9)
    slow(dict(step=1, loss=1.))
    slow(dict(step=2, loss=1.))
    assert len(slow.figure.data[0].x or ()) <= 1
    slow.redraw()
    assert len(slow.figure.data[0].x) == 2
    curves(dict(step=6, loss=float('nan'), psnr=None))
    assert curves.still().ndim == 3
    assert joined({0: [], 1: [dict(step=2, psnr=3.)]}, 'psnr') == ([2], [3.])


def test_curves_from_files(run, tmp_path):
    assert len(training_curves(run).rows) == 3
    log = tmp_path/'log.jsonl'
    log.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')       # cut off by a kill
    assert training_curves(log).rows == {0: [dict(step=1, loss=.5)]}


@pytest.mark.parametrize('gone', [['rounds', 'motion'], ['rounds', 'coarse', 'motion', 'track'], ['rounds', 'coarse', 'motion', 'track', 'portrait'],
                                  ['rounds/1', 'rounds/2/restored', 'rounds/choice.json'], ['coarse']])
def test_unfinished_runs_open(run, tmp_path, gone):
    folder = tmp_path/'run'
    shutil.copytree(run, folder)
    for name in gone: (shutil.rmtree if (folder/name).is_dir() else lambda p: p.unlink())(folder/name)
    panel = inspect_run(folder)
    panel.still()
    assert 'Synthetic' in write_report(folder).read_text()


def test_rounds_of_an_earlier_command_are_not_shown(run, tmp_path):
    shutil.copytree(run, tmp_path/'run')
    info = json.loads((run/'run.json').read_text())
    for last in (2, 1, 0):
        info['parameters']['rounds'] = last
        (tmp_path/'run'/'run.json').write_text(json.dumps(info))
        view = RunView(tmp_path/'run')
        assert view.rounds == list(range(last + 1)) == list(view.metrics())


def test_not_a_run(tmp_path):
    with pytest.raises(InputError, match='run.json'): inspect_run(tmp_path)


def test_overlay_draws_the_mesh_where_it_is(run):
    view = RunView(run)
    image = np.full((96, 96, 3), 255, np.uint8)
    out = overlay(image, view.track.vertices(view.head, 0), view.track.camera, view.head, 1.)
    rows, cols = np.nonzero((out != 255).any(-1))
    x, y = view.track.camera.project(view.track.vertices(view.head, 0))[:, :2].T
    assert abs(cols.mean() - np.clip(x, 0, 95).mean()) < 8 and abs(rows.min() - max(y.min(), 0)) < 2


def test_report_is_one_file_and_says_what_it_is(run, tmp_path):
    (run/'video.mp4').write_bytes(b'\0'*100)
    info = json.loads((run/'run.json').read_text())
    info['parameters'].update(portrait='/home/anna/pictures/<b>me & you.jpg', coarse=None)
    (run/'run.json').write_text(json.dumps(info))
    page = write_report(run, tmp_path/'page.html').read_text()
    assert '<meta name="synthetic-media" content="true">' in page and 'not recordings' in page
    assert '<b>me' not in page and '&lt;b&gt;me' in page and '/home/anna' not in page
    assert 'data:video/mp4' in page and page.count('data:image/') == 4
    assert not [line for line in page.split('"') if line.startswith('http')]
    assert 'class=chosen' in page
    assert all(word in page for word in ('What the numbers mean', 'lower is closer')) and page.count('<h2>') == page.count('</h2><p>')   # each part says what it is


def test_views_are_drawn():
    data = dict(yaw=[-10, 0, 10], pitch=[0, 15], landmark=[[1, 0, 2]]*2, identity=[[.5, .3, .6]]*2, trained=[[-20, -10, -5, 0], [20, 10, 5, 12]])
    drawn = draw_views(np.full((40, 60, 3), 255, np.uint8), data)
    red = lambda v: (drawn.astype(int) - draw_views(np.full((40, 60, 3), 255, np.uint8), data | dict(identity=[[v]*3]*2)).astype(int)).any()
    assert drawn.shape[2] == 3 and red(.1)


def test_every_measure_of_a_round_is_explained(run):
    assert {name for row in RunView(run).metrics().values() for name in row} - {'round'} <= set(MEANINGS)


def test_an_axis_does_not_make_much_of_little():
    from ophav_nb.inspect import SPANS, _limits, draw_measures
    low, high = _limits("identity_distance", [.2512, .2479])
    assert high - low > SPANS["identity_distance"] and low < .2479 < .2512 < high
    assert np.allclose(_limits("sharpness", [400., 600.]), (380, 620)) and _limits("flicker", [0., 0.])[0] < 0
    assert draw_measures({0: dict(sharpness=None, flicker=1.), 1: dict(sharpness=None, flicker=1.)}) is not None


def test_runs_side_by_side(run, tmp_path):
    run, other = (shutil.copytree(run, tmp_path/name) for name in ('eins', 'anders, größer'))
    (run/'video.mp4').unlink(missing_ok=True); (other/'video.mp4').unlink(missing_ok=True)
    about = json.loads((other/'run.json').read_text())
    about['parameters'] |= dict(seed=7)
    (other/'run.json').write_text(json.dumps(about))
    head, _, first, second = [[c.strip() for c in line.strip('|').split('|')] for line in compare_runs([run, other]).splitlines()]
    column = lambda name: (first[head.index(name)], second[head.index(name)])
    assert column('seed') == ('0', '7') and 'preset' not in head and column('chosen') == ('1', '1') and column('identity distance') == ('0.32', '0.32')
    assert (first[0], second[0]) == ('eins', 'anders, größer')
    with pytest.raises(InputError, match='stands twice'): compare_runs([run, str(run)])
    with pytest.raises(InputError, match='has no film yet'): compare_films([run, other], tmp_path/'a.mp4')
    for folder, frames in ((run, 5), (other, 3)): write_video(folder/'video.mp4', np.zeros((frames, 64, 48, 3), np.uint8), 25)
    film, fps = read_video(compare_films([run, other], tmp_path/'a.mp4', height=80))
    assert fps == 25 and len(film) == 3 and film.shape[2] == 2*60 + 4
    assert np.abs(film[0][:20, :60].astype(int) - film[0][:20, 64:]).max() > 100           # each has its own name above
