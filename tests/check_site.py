"""Checks the processed pages that Quarto would read: `nbdev_proc_nbs && python tests/check_site.py [_proc]`.

Every page in the sidebar and nothing else; links, anchors and pictures resolve; fences are paired; pictures have alt
text; widgets have a static twin; no path of a machine. Prints a line for each problem, and exits with 1 if there is one.
"""
import json
import re
import sys
from functools import cached_property
from pathlib import Path

import yaml

PAGES = ".ipynb", ".md", ".qmd"
WIDGET = "application/vnd.jupyter.widget-view+json"
STATIC = "text/html", "text/markdown", "image/png", "image/svg+xml", "image/jpeg"
MACHINE_PATH = re.compile(r"/home/|/root/|/work/|/tmp/|/Users/|[A-Z]:\\\\")
FENCED = re.compile(r"^(\s*)(`{3,}|~{3,})[^\n]*\n.*?^\s*\2[`~]*\s*$", re.M | re.S)
OUTSIDE = re.compile(r"^([a-z][a-z0-9+.-]*:|//)", re.I)


def joined(text): return text if isinstance(text, str) else "".join(text)


def anchor(heading):
    "The id that pandoc gives a heading."
    if own := re.search(r"\{[^}]*#([\w.-]+)[^}]*\}\s*$", heading): return own[1]
    text = re.sub(r"\s*\{[^}]*\}\s*$", "", heading)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("`", "").replace("*", "")
    text = re.sub(r"[^\w\s.-]", "", text.strip().lower())
    return re.sub(r"^[^a-zäöüß]+", "", re.sub(r"\s+", "-", text))


class Page:
    "A processed page: its prose, its outputs, and what can be pointed at."
    def __init__(self, path, root):
        self.path, self.name = path, str(path.relative_to(root))
        text = path.read_text()
        self.cells = json.loads(text)["cells"] if path.suffix == ".ipynb" else [dict(cell_type="markdown", source=text)]

    @cached_property
    def outputs(self): return [o for c in self.cells for o in c.get("outputs", [])]

    @cached_property
    def front(self):
        "What stands between the first two lines of dashes."
        found = re.match(r"\s*---\n(.*?)\n---", joined(self.cells[0]["source"]) if self.cells else "", re.S)
        return yaml.safe_load(found[1]) if found else {}

    @cached_property
    def raw_prose(self): return "\n\n".join(joined(c["source"]) for c in self.cells if c["cell_type"] == "markdown")

    @cached_property
    def prose(self):
        "Markdown of the page and of its outputs, without code."
        parts = [self.raw_prose, *(joined(o["data"]["text/markdown"]) for o in self.outputs
                                   if "text/markdown" in o.get("data", {}))]
        return FENCED.sub("", re.sub(r"<!--.*?-->", "", "\n\n".join(parts), flags=re.S))

    @cached_property
    def text(self): return re.sub(r"(`+).+?\1", "", self.prose)

    @cached_property
    def html(self):
        "What the page shows as HTML, outputs and markup within prose."
        outputs = [joined(o["data"]["text/html"]) for o in self.outputs if "text/html" in o.get("data", {})]
        return "\n".join([self.text, *outputs])

    @cached_property
    def html_name(self):
        return str(Path(self.name).parent / self.front.get("output-file", Path(self.name).with_suffix(".html").name))

    @cached_property
    def anchors(self):
        seen, out = {}, set(re.findall(r"\bid=[\"']?([^\"'\s>]+)", self.html))
        for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*\s*$", self.prose, re.M):
            name = anchor(heading)
            out.add(f"{name}-{seen[name]}" if name in seen else name)
            seen[name] = seen.get(name, 0) + 1
        return out | set(re.findall(r"\{[^}\n]*#([\w.-]+)[^}\n]*\}", self.text))

    @cached_property
    def links(self):
        "Targets of links and pictures, those that lie outside left out."
        found = re.findall(r"\]\(\s*<?([^)\s>]+)", self.text)
        found += re.findall(r"^\[[^\]^]+\]:\s*(\S+)", self.text, re.M)
        found += re.findall(r"\b(?:href|src)=[\"']([^\"']+)", self.html)
        return [o for o in dict.fromkeys(found) if not o.startswith(("data:", "attachment:", "{{"))]


def read_site(folder):
    "The pages of a folder of processed pages, by their names."
    paths = [p for p in sorted(Path(folder).rglob("*")) if p.suffix in PAGES and ".ipynb_checkpoints" not in p.parts]
    return {page.name: page for page in (Page(p, Path(folder)) for p in paths)}


def entries(part, key="contents"):
    "Every page that a sidebar or navbar names, however deep."
    if isinstance(part, str): return [part]
    if isinstance(part, list): return [o for each in part for o in entries(each, key)]
    if not isinstance(part, dict): return []
    own = [part[o] for o in ("href", "file") if isinstance(part.get(o), str)]
    section = [part["section"]] if str(part.get("section", "")).endswith(PAGES) else []
    return own + section + [o for k in ("contents", "left", "right", "menu", "tools") for o in entries(part.get(k), key)]


def check_navigation(config, pages):
    "The sidebar lists each page once and nothing else; the navbar points at pages."
    site = config["website"]
    listed = entries(site["sidebar"])
    for name in sorted(set(pages) - set(listed)): yield f"_quarto.yml: {name} is not in the sidebar"
    for name in sorted(set(listed) - set(pages)): yield f"_quarto.yml: the sidebar lists {name}, which is no page"
    for name in sorted({o for o in listed if listed.count(o) > 1}): yield f"_quarto.yml: the sidebar lists {name} twice"
    for target in entries(site.get("navbar", {})):
        if not OUTSIDE.match(target) and target.partition("#")[0] not in pages:
            yield f"_quarto.yml: the navbar points at {target}, which is no page"


def check_theme(config, folder):
    "The style sheets that the config names are there."
    theme = config.get("format", {}).get("html", {}).get("theme", [])
    parts = theme.values() if isinstance(theme, dict) else [theme]
    for name in (o for part in parts for o in ([part] if isinstance(part, str) else part)):
        if name.endswith("css") and not (Path(folder) / name).exists(): yield f"_quarto.yml: there is no style sheet {name}"


def check_links(page, pages, folder, host=None):
    "Each link leads to a page or file of the site, and each anchor to a heading."
    by_html = {p.html_name: p for p in pages.values()}
    for link in page.links:
        if host and link.startswith(host): path, base = link.removeprefix(host).lstrip("/"), Path()
        elif OUTSIDE.match(link): continue
        else: path, base = link, Path(page.name).parent
        path, _, place = path.partition("#")
        target = (Path(folder) / base / path).resolve() if path else page.path.resolve()
        if not target.is_relative_to(Path(folder).resolve()):
            yield f"{page.name}: {link} leads out of the site"
            continue
        name = str(target.relative_to(Path(folder).resolve()))
        other = pages.get(name) or by_html.get(name)
        if other is None and not target.is_file(): yield f"{page.name}: there is no {link}"
        elif other is not None and place and place not in other.anchors:
            yield f"{page.name}: {link}: {other.name} has no section #{place}"


def check_fences(page):
    "Each `:::` that opens is closed; so is each fence of code."
    depth = 0
    text = FENCED.sub("", page.raw_prose)
    if re.search(r"^\s*(```|~~~)", text, re.M): yield f"{page.name}: a fence of code stays open"
    for line in text.splitlines():
        if re.match(r":::+\s*\{?\S", line): depth += 1
        elif re.match(r":::+\s*$", line): depth -= 1
        if depth < 0:
            yield f"{page.name}: a fence closes that never opened"
            return
    if depth: yield f"{page.name}: {depth} fences stay open"


def check_alt(page):
    "Pictures in prose and in HTML say what they show."
    if re.search(r"!\[\s*\]\(", page.text): yield f"{page.name}: a picture without alt text"
    for tag in re.findall(r"<img\b[^>]*>", page.html):
        if not re.search(r"\balt\s*=", tag): yield f"{page.name}: a picture without alt text: {tag[:60]}"


def check_captions(page, config):
    "A picture in a paragraph of its own becomes a caption without alternative text, unless Quarto is asked not to, or it has both."
    if "-implicit_figures" in str(config.get("format", {}).get("html", {}).get("from", "")): return
    for text, more in re.findall(r"^!\[([^\]]*)\]\([^)]*\)(\{[^}]*\})?[ \t]*$", page.text, re.M):
        if "fig-alt" not in more: yield f"{page.name}: Quarto makes a caption of the alt text: {text[:60]}"


def check_nested_links(page):
    "A name that nbdev links within a link shows its source: `[[`name`](...)](...)`."
    for found in re.findall(r"\[\[`[^\]\n]*`\]\([^)\n]*\)[^\]\n]*\]\(", page.prose):
        yield f"{page.name}: a link within a link, leave out the backticks: {found[:80]}"


def check_head(config, folder):
    "The icon is there, and the site knows its own address, which its map of pages and previews need."
    site = config["website"]
    if (icon := site.get("favicon")) and not (Path(folder) / icon).is_file(): yield f"_quarto.yml: there is no icon {icon}"
    if site.get("open-graph") and not site.get("site-url"): yield "_quarto.yml: previews need the site's address, site-url"


def check_widgets(page):
    "A widget is dead without a kernel: beside it stands what it shows, as HTML or as a picture."
    for output in page.outputs:
        data = output.get("data", {})
        if WIDGET in data and not set(STATIC) & set(data):
            yield f"{page.name}: a widget without a static twin: {joined(data.get('text/plain', ''))[:60]}"


def check_machine_paths(page):
    "No output tells where it was made."
    for output in page.outputs:
        data = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
        shown = re.sub(r'data:image/[^"]+', "", "\n".join(map(joined, [output.get("text", ""), *map(str, data.values())])))
        if found := MACHINE_PATH.search(shown):
            yield f"{page.name}: a path of a machine: {shown[max(0, found.start() - 30):found.end() + 30]!r}"


def check_site(folder, host=None):
    "All problems of a folder of processed pages, as lines."
    pages, config = read_site(folder), yaml.safe_load((Path(folder) / "_quarto.yml").read_text())
    found = [*check_navigation(config, pages), *check_theme(config, folder), *check_head(config, folder)]
    for page in pages.values():
        found += check_links(page, pages, folder, host)
        found += check_captions(page, config)
        for check in check_fences, check_alt, check_nested_links, check_widgets, check_machine_paths: found += check(page)
    return found


def site_address(settings):
    "Where settings.ini says that the site will be; nbdev writes its own links with it."
    read = dict(re.findall(r"^(doc_host|doc_baseurl)\s*=\s*(\S+)", Path(settings).read_text(), re.M))
    return read["doc_host"] + read["doc_baseurl"]


def main():
    root = Path(__file__).resolve().parent.parent
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else root / "_proc"
    found = check_site(folder, site_address(root / "settings.ini"))
    print(*found or [f"{len(read_site(folder))} pages: links, anchors, pictures, fences, widgets and sidebar are in order"],
          sep="\n")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
