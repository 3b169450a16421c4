"""Execute a notebook in place and keep its outputs, as a page of the book: `python tests/run_page.py nbs/03_show.ipynb`.

Cells with `#| eval: false` and flagged ones (slow, gpu, data) are left as they are; `--flags slow,data` runs those too.
Clean afterwards with `nbdev_clean`.
"""
import argparse
import os
import re
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--flags", default="", help="flags to run as well, separated by commas")
    args = parser.parse_args()
    left_out = {"slow", "gpu", "data"} - set(args.flags.split(","))
    skip = re.compile(rf"^#\|\s*(eval:\s*false|{'|'.join(sorted(left_out)) or 'eval:'})\b", re.M)
    os.environ.pop("MPLBACKEND", None)     # the kernel then keeps pictures; with `agg` set it drops them
    nb = nbformat.read(args.page, 4)
    client = NotebookClient(nb, timeout=900, resources={"metadata": {"path": str(args.page.parent)}})
    start = time.time()
    with client.setup_kernel():
        for i, cell in enumerate(nb.cells):
            if cell.cell_type == "code" and not skip.search(cell.source): client.execute_cell(cell, i)
    nbformat.write(nb, args.page)
    print(f"{args.page.name}: {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
