"""Converts Natural Earth's coastlines and borders at 1:110 million to the file that maps of hits draw.

    npm pack world-atlas && tar xzf world-atlas-*.tgz
    python benchmarks/coastlines.py package/countries-110m.json rsir_nb/world.json

The source is TopoJSON: arcs of rounded, delta-coded points, which countries share. An arc of one country is
a coast, one of two countries is a border. Written are two lists of lines in hundredths of a degree,
delta-coded again.
"""
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np


def arcs_of(part):
    "The arcs that a geometry uses, without their direction."
    if isinstance(part, int): return [part if part >= 0 else ~part]
    return [o for each in part for o in arcs_of(each)]


def line(arc, transform):
    "An arc in hundredths of a degree: the first point, then differences; repeated points are dropped."
    xy = np.cumsum(arc, axis=0)*transform["scale"] + transform["translate"]
    xy = np.round(100*xy).astype(int)
    xy = xy[np.r_[True, (np.diff(xy, axis=0) != 0).any(1)]]
    return np.diff(xy, axis=0, prepend=0).ravel().tolist() if len(xy) > 1 else None


def convert(topology):
    "Coasts and borders of all countries."
    users = Counter()
    for country in topology["objects"]["countries"]["geometries"]:
        users.update(set(arcs_of(country.get("arcs", []))))
    lines = [line(arc, topology["transform"]) for arc in topology["arcs"]]
    def pick(n): return [lines[i] for i in sorted(users) if users[i] == n and lines[i]]
    source = "Natural Earth 1:110m, public domain, by way of world-atlas"
    return dict(source=source, unit="0.01 degrees", coasts=pick(1), borders=pick(2))


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    made = convert(json.loads(source.read_text()))
    target.write_text(json.dumps(made, separators=(",", ":")) + "\n")
    print(f"{len(made['coasts'])} coasts, {len(made['borders'])} borders, {target.stat().st_size:,} bytes")
