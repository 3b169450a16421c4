"A Jupyter server and the gallery in a browser, for the tests and for the pictures of the documentation."
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CARDS = "[aria-label='{}'] .rsir-card"


@contextlib.contextmanager
def server(module, folder, *options):
    "A Jupyter server in `folder`; gives its address."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    args = [sys.executable, "-m", module, "--no-browser", f"--port={port}", *options]
    quiet = folder/"settings"/"@jupyterlab"/"apputils-extension"/"notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True, exist_ok=True)
    quiet.write_text('{"fetchNews": "false"}')
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(folder/"config"), "JUPYTER_DATA_DIR": str(folder/"data"),
           "JUPYTERLAB_SETTINGS_DIR": str(folder/"settings")}
    log = open(folder/f"{module}.log", "w")
    process = subprocess.Popen(args, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/", timeout=5)
                break
            if process.poll() is not None: raise AssertionError((folder/f"{module}.log").read_text()[-2000:])
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait(20)
        log.close()


def lab_options(folder):
    "What JupyterLab is started with: no password, and its application within reach of scripts."
    return ("--allow-root", "--IdentityProvider.token=", "--ServerApp.password=",
            "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={folder}")


def open_notebook(browser, address, name, viewport, **options):
    "The notebook `name`, run in JupyterLab, with its gallery on the screen; options are those of a page."
    page = browser.new_page(viewport=viewport, **options)
    page.set_default_timeout(90_000)
    page.goto(f"{address}/lab/tree/{name}?reset")    # no tabs of an earlier page
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_function("document.querySelector('#jp-main-statusbar')?.innerText.includes('| Idle')")
    page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_selector(CARDS.format("Patches to choose from"))
    return page


def cards(page, grid): return page.locator(CARDS.format(grid))


def names(page, grid):
    "The ids of the cards of a grid, in their order."
    keys = cards(page, grid).evaluate_all("all => all.map(o => o.dataset.key)")
    return [o.split("/", 1)[1] for o in keys]


def status(page): return page.locator("[aria-label='Hits'] [role=status]").inner_text()


def wait_for(page, call, seconds=60):
    "Wait until `call` gives something true."
    for _ in range(seconds*10):
        if found := call(): return found
        page.wait_for_timeout(100)
    raise AssertionError(f"nothing came; the gallery says: {status(page)}")
