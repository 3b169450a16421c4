"A notebook with a gallery over a simulated archive, for the tests in a browser."
import json
from pathlib import Path

SETUP = '''
from pathlib import Path
from rsir_nb.core import METHODS
from rsir_nb.simulate.synthetic import SyntheticArchive
from rsir_nb.engine.encode import encode
from rsir_nb.engine.hash import paired_features
from rsir_nb.engine.retriever import Retriever
from rsir_nb.gallery.app import QueryGallery
from rsir_nb.engine.hash import train_heads

archive = SyntheticArchive(n_places={places}, patches_per_place=4, img_size=60)
home = Path('search').absolute()
if home.is_dir(): retriever = Retriever.load(home, archive=archive)
else:
    method = METHODS.create('band_cca', sensors=archive.sensors, img_size=60).fit(archive.split('train'))
    features = encode(method, archive.split('train'), 'features', progress=False)
    method.heads = train_heads(paired_features(features), n_bits=32, min_steps=50, progress=False).heads
    retriever = Retriever.build(method, archive, home, progress=False)
'''


def notebook(*cells):
    "A notebook of these code cells."
    cells = [dict(cell_type="code", id=f"c{i}", metadata={}, execution_count=None, outputs=[], source=o.strip())
             for i, o in enumerate(cells)]
    kernel = dict(kernelspec=dict(display_name="Python 3", language="python", name="python3"))
    return dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)


POINTS = '''
from rsir_nb.gallery.projection import project
from rsir_nb.gallery.scatter import EmbeddingMap
EmbeddingMap(project(retriever.store), gallery.session.thumbs, on_open=gallery.open)
'''


def write_notebook(path, show="gallery", places=12, k=12, more=()):
    "Write the notebook of a gallery; `show` is the cell that shows it, `more` are further cells."
    cells = [SETUP.format(places=places), f"gallery = QueryGallery(retriever, k={k})", show, *more]
    Path(path).write_text(json.dumps(notebook(*cells)))
    return Path(path)


def build(folder, places=12):
    "Make archive and retriever of the notebook in this process, in `folder`."
    import os
    names, here = {}, os.getcwd()
    os.chdir(folder)
    try: exec(SETUP.format(places=places), names)
    finally: os.chdir(here)
    return names["archive"], names["retriever"]
