"""Make rsir_nb/natural_earth/lines.npz from the npm package world-atlas 2.0.2 (Natural Earth 1:110 million, public domain).

    npm pack world-atlas@2.0.2 && tar xzf world-atlas-2.0.2.tgz
    python tests/make_world.py package/countries-110m.json

Its TopoJSON has each line once, however many countries it bounds: a line of one country is a coast, a line of
two is a border.
"""
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

STEPS = 90  # a degree; 180 of them fit into 16 bits


def arcs_of(geometry):
    "Numbers of the lines of a country's outline."
    found = geometry.get("arcs", [])
    while found and isinstance(found[0], list): found = [i for part in found for i in part]
    return [i if i >= 0 else ~i for i in found]


def without_cuts(line):
    "The parts of a line that are not the date line or a pole, where the shapes are cut."
    edge = (np.abs(line[:, 0]) > 179.99) | (np.abs(line[:, 1]) > 89.99)
    jump = np.abs(np.diff(line[:, 0])) > 180
    parts = np.split(line, np.flatnonzero((edge[1:] & edge[:-1]) | jump) + 1)
    return [o for o in parts if len(o) > 1]


def main():
    told = json.loads(Path(sys.argv[1]).read_text())
    scale, shift = (np.array(told["transform"][k]) for k in ("scale", "translate"))
    lines = [np.cumsum(o, axis=0)*scale + shift for o in told["arcs"]]
    used = Counter(i for o in told["objects"]["countries"]["geometries"] for i in arcs_of(o))
    lines = [(used[i] > 1, part) for i, o in enumerate(lines) if used[i] for part in without_cuts(o)]
    points = np.round(np.concatenate([o for _, o in lines])*STEPS).astype(np.int16)
    out = Path(__file__).resolve().parents[1]/"rsir_nb"/"natural_earth"/"lines.npz"
    out.parent.mkdir(exist_ok=True)
    np.savez_compressed(out, points=points, lengths=np.array([len(o) for _, o in lines], np.uint16),
                        border=np.array([b for b, _ in lines]), steps=np.int16(STEPS))
    print(f"{len(lines)} lines, {len(points)} points, {out.stat().st_size/1e3:.0f} kB")


if __name__ == "__main__": main()
