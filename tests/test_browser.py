"One inspection widget driven in JupyterLab by a real browser: the slider moves, the picture follows, nothing is reported on the console."
import ophav_nb  # noqa: F401, before torch: it decides about threads
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest

from ophav_nb.inspect import example_run

pytestmark = pytest.mark.browser
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
CELL = "from ophav_nb.inspect import inspect_coarse\ninspect_coarse('run')"


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A JupyterLab of its own, in a folder with a run and a notebook."
    if not CHROMIUM: pytest.skip('no Chromium here: apt-get install chromium')
    pytest.importorskip('jupyterlab', reason="no JupyterLab here: pip install 'ophav-nb[notebooks]'")
    pytest.importorskip('playwright', reason="no playwright here: pip install 'ophav-nb[dev]'")
    folder = tmp_path_factory.mktemp('lab')
    example_run(folder/'run', frames=6, size=160, fit=False)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)], metadata={'kernelspec': dict(name='python3', display_name='python3', language='python')})
    nbformat.write(notebook, folder/'look.ipynb')
    port, config = free_port(), folder/'config'
    env = {**os.environ, 'JUPYTER_CONFIG_DIR': str(config), 'JUPYTERLAB_SETTINGS_DIR': str(config/'settings'), 'JUPYTERLAB_WORKSPACES_DIR': str(config/'spaces'),
           'JUPYTER_RUNTIME_DIR': str(config/'runtime'), 'IPYTHONDIR': str(config/'ipython')}
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', f'--port={port}', '--ServerApp.port_retries=0', '--IdentityProvider.token=',
               '--ServerApp.password=', f'--ServerApp.root_dir={folder}', '--LabApp.news_url=', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    with open(folder/'server.log', 'w') as log:
        server = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait(lambda: urllib.request.urlopen(f'http://127.0.0.1:{port}/api', timeout=2).status == 200, 120, lambda: (folder/'server.log').read_text())
            yield f'http://127.0.0.1:{port}/lab/tree/look.ipynb?reset', folder
        finally:
            server.terminate()
            try: server.wait(15)
            except subprocess.TimeoutExpired: server.kill()


def wait(ready, seconds, report=lambda: ''):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if ready(): return
        except OSError: pass
        time.sleep(.3)
    raise AssertionError(f'not ready after {seconds} s\n{report()}')


def test_slider_moves_the_picture(lab):
    from playwright.sync_api import sync_playwright
    url, folder = lab
    errors = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox', '--disable-dev-shm-usage'])
        page = browser.new_page(viewport=dict(width=1280, height=900))
        page.set_default_timeout(240_000)
        page.on('pageerror', lambda e: errors.append(str(e)))
        page.on('console', lambda m: errors.append(m.text) if m.type == 'error' else None)
        page.goto(url)
        cell = page.locator('.jp-Notebook .jp-CodeCell').first
        cell.locator('.cm-content').click()
        page.keyboard.press('Shift+Enter')
        image = page.locator('.jp-OutputArea img.widget-image').first
        image.wait_for(state='visible')
        wait(lambda: image.evaluate('i => i.complete && i.naturalWidth > 0'), 200)
        read = lambda: image.evaluate("""async i => {                   // a picture that is being replaced has no width: wait for the new one
            for (let n = 0; n < 500 && !(i.complete && i.naturalWidth > 0); n++) await new Promise(done => setTimeout(done, 20));
            const c = document.createElement('canvas'); c.width = i.naturalWidth; c.height = i.naturalHeight;
            const g = c.getContext('2d'); g.drawImage(i, 0, 0); return Array.from(g.getImageData(0, 0, c.width, c.height).data) }""")
        before = read()
        slider = page.locator('.jp-OutputArea .noUi-handle').first
        slider.focus()
        for _ in range(2): page.keyboard.press('ArrowRight')
        wait(lambda: page.locator('.jp-OutputArea .widget-readout').first.inner_text().strip() == '2', 200)
        wait(lambda: moved(before, read()) > 1., 200)
        plain = read()                                                    # before the click: the new picture may come at once
        page.locator('.jp-OutputArea input[type=checkbox]').first.check()
        wait(lambda: moved(plain, read()) > 1., 200)                       # the mesh lies over the frame
        shot = os.environ.get('OPHAV_SCREENSHOT') or str(folder/'screenshot.png')
        page.screenshot(path=shot)
        browser.close()
    assert os.path.getsize(shot) > 10_000
    strange = [e for e in errors if 'favicon' not in e]
    assert not strange, json.dumps(strange, indent=1)


def moved(a, b): return sum(abs(x - y) for x, y in zip(a, b))/len(a) if len(a) == len(b) else 255.
