// A map of points on a canvas: hover or arrow keys choose a point, Enter or a click opens it, its picture stands beside.
// State lives in Python (rsir_nb.gallery.scatter); this file draws the points and reports what the user does.

const SIDE = 15, REACH = 16;           // pixels: a stamp's side, and how near the pointer must come

function element(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "class") node.className = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function bytes(view) {                 // a DataView as a copy that any typed array can look at
  return view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength);
}

function outline(pen, shape, x, y, r) {
  const corners = {
    s: [[-1, -1], [1, -1], [1, 1], [-1, 1]], D: [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]],
    "^": [[0, -1.2], [1.15, 0.95], [-1.15, 0.95]], v: [[0, 1.2], [1.15, -0.95], [-1.15, -0.95]],
  }[shape];
  pen.beginPath();
  if (!corners) pen.arc(x, y, r, 0, 2 * Math.PI);
  else corners.forEach(([a, b], i) => (i ? pen.lineTo(x + a * r, y + b * r) : pen.moveTo(x + a * r, y + b * r)));
  pen.closePath();
}

function makeStamp(look, fill, ratio) { // a small canvas with one marker in the middle
  const stamp = document.createElement("canvas");
  stamp.width = stamp.height = SIDE * ratio;
  const pen = stamp.getContext("2d"), c = SIDE / 2, r = look.rest ? 2 : 4;
  pen.scale(ratio, ratio);
  pen.globalAlpha = look.rest ? 0.6 : 1;
  pen.strokeStyle = pen.fillStyle = look.colour;
  pen.lineWidth = look.rest ? 0.8 : 1.4;
  outline(pen, look.shape, c, c, r);
  if (fill === "full") pen.fill();
  else if (fill !== "none") {
    pen.save();
    pen.clip();
    if (fill === "left") pen.fillRect(0, 0, c, SIDE);
    else pen.fillRect(0, c, SIDE, c);
    pen.restore();
    outline(pen, look.shape, c, c, r);
  }
  pen.stroke();
  return stamp;
}

function render({ model, el }) {
  let xy, groups, sensors, count = 0, current = -1, stamps = [], order = [];
  let zoom = 1, middle = [0.5, 0.5], frame = null, timer = null, picture = null, drag = null, gone = false;
  const ratio = window.devicePixelRatio || 1;

  const select = element("select");
  const zooms = [["+", "zoom in", () => zoomBy(2)], ["−", "zoom out", () => zoomBy(0.5)], ["Whole map", "", whole]]
    .map(([text, label, call]) => {
      const button = element("button", label ? { type: "button", "aria-label": label } : { type: "button" }, text);
      button.addEventListener("click", call);
      return button;
    });
  const bar = element("div", { class: "rsir-map-bar" }, element("label", {}, "Label", select), ...zooms);
  const canvas = element("canvas", { "aria-hidden": "true" });
  const plot = element("div", { class: "rsir-map-plot", tabindex: "0", role: "application",
    "aria-roledescription": "map of points" }, canvas);
  const img = element("img", { alt: "" });
  const status = element("p", { class: "rsir-map-said", role: "status", "aria-live": "polite" });
  const open = element("button", { type: "button", class: "rsir-map-card", disabled: "" }, "Search from this patch");
  open.addEventListener("click", openCurrent);
  const side = element("div", { class: "rsir-map-side" }, img, status, element("div", { class: "rsir-map-bar" }, open));
  const legend = element("ul", { class: "rsir-map-legend", "aria-label": "Legend" });
  const box = element("section", { class: "rsir rsir-map" }, bar, plot, side, legend);
  el.append(box);
  img.hidden = true;

  function place(i) {                  // where a point lies on the canvas, in CSS pixels
    const w = plot.clientWidth - 24, h = plot.clientHeight - 24;
    return [12 + w * (0.5 + (xy[2 * i] - middle[0]) * zoom), 12 + h * (0.5 - (xy[2 * i + 1] - middle[1]) * zoom)];
  }

  function draw() {
    frame = null;
    if (gone || !plot.clientWidth) return;
    const [w, h] = [plot.clientWidth, plot.clientHeight];
    canvas.width = w * ratio;
    canvas.height = h * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    for (const i of order) {
      const [x, y] = place(i);
      if (x < -SIDE || y < -SIDE || x > w + SIDE || y > h + SIDE) continue;
      pen.drawImage(stamps[groups[i]][sensors[i]], x - SIDE / 2, y - SIDE / 2, SIDE, SIDE);
    }
    if (current < 0) return;
    const [x, y] = place(current);
    for (const [colour, width, r] of [["#ffffff", 5, 9], ["#1b2027", 2.5, 9]]) {
      pen.strokeStyle = colour;
      pen.lineWidth = width;
      pen.beginPath();
      pen.arc(x, y, r, 0, 2 * Math.PI);
      pen.stroke();
    }
  }

  function redraw() {
    frame ??= requestAnimationFrame(draw);
  }

  function words(i) {
    const name = model.get("names")[i], vocab = model.get("vocab"), some = model.get("labels")[i];
    const labels = some === null ? "not labelled" : some.map((o) => vocab[o]).join(", ") || "no labels";
    return `${name}, ${model.get("sensors")[sensors[i]].toUpperCase()}: ${labels}`;
  }

  function choose(i, follow = false) {
    if (i < 0 || i >= count || i === current) return;
    current = i;
    const text = words(i);
    status.textContent = `${text}. Point ${i + 1} of ${count.toLocaleString("en")}.`;
    open.disabled = !model.get("opens");
    img.alt = `patch ${text}`;
    img.hidden = true;
    clearTimeout(timer);
    timer = setTimeout(() => model.send({ type: "need", point: i }), 60);
    if (follow) keepInView(i);
    redraw();
  }

  function keepInView(i) {
    const [x, y] = place(i);
    if (x >= 0 && y >= 0 && x <= plot.clientWidth && y <= plot.clientHeight) return;
    middle = [xy[2 * i], xy[2 * i + 1]];
  }

  function onMessage(message, buffers) {
    if (message.type !== "picture" || message.point !== current) return;
    if (picture) URL.revokeObjectURL(picture);
    const data = buffers[0] instanceof DataView ? bytes(buffers[0]) : buffers[0];
    picture = URL.createObjectURL(new Blob([data], { type: "image/png" }));
    img.src = picture;
    img.hidden = false;
  }

  function nearest(x, y, allowed = () => true) {
    let best = -1, least = Infinity;
    for (let i = 0; i < count; i++) {
      const [a, b] = place(i), d = (a - x) ** 2 + (b - y) ** 2;
      if (d < least && allowed(i, a - x, b - y)) [best, least] = [i, d];
    }
    return [best, Math.sqrt(least)];
  }

  function step(dx, dy) {              // the nearest point in that direction; within 45 degrees of it
    if (current < 0) return choose(nearest(plot.clientWidth / 2, plot.clientHeight / 2)[0], true);
    const [x, y] = place(current);
    const ahead = (i, a, b) => i !== current && a * dx + b * dy > 1e-6 && a * dx + b * dy >= Math.abs(a * dy - b * dx);
    choose(nearest(x, y, ahead)[0], true);
  }

  function beside(by) {                // through points that lie on one another, in the order of the archive
    if (count) choose(current < 0 ? 0 : (current + by + count) % count, true);
  }

  function zoomBy(factor) {
    zoom = Math.min(64, Math.max(1, zoom * factor));
    if (zoom === 1) middle = [0.5, 0.5];
    else if (current >= 0) middle = [xy[2 * current], xy[2 * current + 1]];
    redraw();
  }

  function whole() {
    zoom = 1;
    middle = [0.5, 0.5];
    redraw();
  }

  function openCurrent() {
    if (current >= 0 && model.get("opens")) model.send({ type: "open", point: current });
  }

  plot.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = {
      ArrowRight: () => step(1, 0), ArrowLeft: () => step(-1, 0), ArrowDown: () => step(0, 1), ArrowUp: () => step(0, -1),
      n: () => beside(1), p: () => beside(-1), Home: () => choose(0, true), End: () => choose(count - 1, true),
      "+": () => zoomBy(2), "=": () => zoomBy(2), "-": () => zoomBy(0.5), 0: whole, Enter: openCurrent,
    };
    if (!(event.key in keys)) return;
    keys[event.key]();
    event.preventDefault();
    event.stopPropagation();           // the notebook has keys of its own
  });
  plot.addEventListener("pointerdown", (event) => {
    drag = { x: event.clientX, y: event.clientY, middle: [...middle], moved: false };
    plot.setPointerCapture(event.pointerId);
  });
  plot.addEventListener("pointermove", (event) => {
    const frameBox = plot.getBoundingClientRect();
    if (drag) {
      const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
      drag.moved ||= Math.hypot(dx, dy) > 5;
      if (!drag.moved || zoom === 1) return;
      middle = [drag.middle[0] - dx / (plot.clientWidth - 24) / zoom, drag.middle[1] + dy / (plot.clientHeight - 24) / zoom];
      return redraw();
    }
    const [i, d] = nearest(event.clientX - frameBox.left, event.clientY - frameBox.top);
    if (d <= REACH) choose(i);
  });
  plot.addEventListener("pointercancel", () => (drag = null));
  plot.addEventListener("pointerup", (event) => {
    const moved = drag?.moved;
    drag = null;
    if (moved) return;
    const frameBox = plot.getBoundingClientRect();
    const [i, d] = nearest(event.clientX - frameBox.left, event.clientY - frameBox.top);
    if (d > REACH) return;
    choose(i);
    openCurrent();
  });

  function makeStamps() {
    const fills = model.get("fills");
    stamps = model.get("looks").map((look) => fills.map((fill) => makeStamp(look, fill, ratio)));
    const rest = model.get("looks").map((o) => o.rest);
    order = Array.from({ length: count }, (_, i) => i);
    order = [...order.filter((i) => rest[groups[i]]), ...order.filter((i) => !rest[groups[i]])];
    const used = new Set(groups), item = (stamp, text) => {
      const copy = element("canvas", { width: SIDE * ratio, height: SIDE * ratio, "aria-hidden": "true",
        style: `width:${SIDE}px;height:${SIDE}px` });
      copy.getContext("2d").drawImage(stamp, 0, 0);
      return element("li", {}, copy, text);
    };
    const items = model.get("looks").map((look, i) => used.has(i) && item(stamps[i][0], look.name));
    const names = model.get("sensors");
    if (names.length > 1) {
      const plain = { ...model.get("looks").at(-1), rest: false };
      items.push(...names.map((o, j) => item(makeStamp(plain, model.get("fills")[j], ratio), o.toUpperCase())));
    }
    legend.replaceChildren(...items.filter(Boolean));
  }

  function load() {
    xy = new Float32Array(bytes(model.get("xy")));
    groups = new Uint8Array(bytes(model.get("groups")));
    sensors = new Uint8Array(bytes(model.get("seen_by")));
    count = Math.min(xy.length / 2, groups.length, sensors.length);
    if (current >= count) current = -1;
    const label = model.get("label"), automatic = element("option", { value: "" }, model.get("automatic"));
    select.replaceChildren(automatic, ...model.get("vocab").map((o) => element("option", { value: o }, o)));
    select.value = label;
    select.disabled = !model.get("vocab").length;
    plot.style.height = `${model.get("height")}px`;
    box.setAttribute("aria-label", model.get("title"));
    plot.setAttribute("aria-label", `${model.get("title")}. Arrow keys go to the nearest point in a direction, `
      + "n and p to the next and the previous one, plus and minus zoom, Enter searches from it.");
    makeStamps();
    redraw();
  }

  select.addEventListener("change", () => {
    model.set("label", select.value);
    model.save_changes();
  });
  const watcher = new ResizeObserver(redraw);
  watcher.observe(plot);
  model.on("change:groups change:looks change:xy change:names change:height change:label", load);
  model.on("msg:custom", onMessage);
  status.textContent = "No point is chosen yet.";
  load();
  return () => {
    gone = true;
    watcher.disconnect();
    clearTimeout(timer);
    if (frame) cancelAnimationFrame(frame);
    if (picture) URL.revokeObjectURL(picture);
    model.off("msg:custom", onMessage);
    model.off("change:groups change:looks change:xy change:names change:height change:label", load);
  };
}

export default { render };
