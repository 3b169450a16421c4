// A grid of pictures: buttons with alternative text, walked by arrow keys, pictures fetched when they come into view.
// State lives in Python (rsir_nb.gallery.grid); this file draws `items` and reports what the user does.

const GONE = "The kernel behind these pictures has stopped. Run the notebook's cells again to go on.";
const SIGNS = { good: "✓", bad: "✗", none: "○" };

function element(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "class") node.className = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function render({ model, el }) {
  const pictures = new Map();          // key -> object URL
  const wanted = new Set();
  let cards = [], current = 0, timer = null, gone = false;

  const list = element("ul", { class: "rsir-grid" });
  const status = element("p", { class: "quiet", role: "status", "aria-live": "polite" });
  const box = element("section", { class: "rsir rsir-gallery" }, status, list);
  el.append(box);

  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) ask(entry.target.dataset.key);
  }, { rootMargin: "300px" });

  function ask(key) {
    if (pictures.has(key) || wanted.has(key)) return;
    wanted.add(key);
    timer ??= setTimeout(() => {
      timer = null;
      model.send({ type: "need", keys: [...wanted] });
      wanted.clear();
    }, 30);
  }

  function onMessage(message, buffers) {
    if (message.type !== "pictures") return;
    message.keys.forEach((key, i) => {
      if (pictures.has(key)) return;   // asked for twice before it came: cards show the first already
      const data = buffers[i] instanceof DataView ? buffers[i].buffer.slice(
        buffers[i].byteOffset, buffers[i].byteOffset + buffers[i].byteLength) : buffers[i];
      pictures.set(key, URL.createObjectURL(new Blob([data], { type: "image/png" })));
    });
    for (const { img, item } of cards) {
      if (img.src || !pictures.has(item.key)) continue;
      img.src = pictures.get(item.key);
    }
  }

  function markButton(item, verdict, index) {
    const words = verdict === "good" ? "good" : "bad";
    const pressed = item.verdict === verdict;
    const button = element("button", {
      type: "button", class: `rsir-verdict rsir-verdict-${verdict}`, "aria-pressed": String(pressed),
      "aria-label": `mark ${item.name} as ${words}`, tabindex: index === current ? "0" : "-1",
    }, verdict === "good" ? "+" : "−");
    button.addEventListener("click", () => mark(item, verdict));
    return button;
  }

  function whyButton(item, index) {
    const button = element("button", {
      type: "button", class: "rsir-verdict rsir-why", "aria-label": `why ${item.name} matches`,
      tabindex: index === current ? "0" : "-1",
    }, "Why?");
    button.addEventListener("click", () => why(item));
    return button;
  }

  function why(item) {
    if (model.get("explainable")) model.send({ type: "why", key: item.key });
  }

  function mark(item, verdict) {
    if (!model.get("markable")) return;
    model.send({ type: "mark", key: item.key, verdict: item.verdict === verdict ? null : verdict });
  }

  function makeCard(item, index) {
    const img = element("img", { alt: item.alt, decoding: "async" });
    if (pictures.has(item.key)) img.src = pictures.get(item.key);
    const caption = element("span", { class: "rsir-caption" });
    if (item.head) caption.append(element("span", { class: "rank" }, item.head));
    if (item.kind in SIGNS) {
      const sign = element("span", { "aria-hidden": "true" }, SIGNS[item.kind] + " ");
      caption.append(element("span", { class: "mark" }, sign, item.words));
    }
    if (item.caption) caption.append(element("span", { class: "rsir-labels" }, item.caption));
    const look = { class: `rsir-card rsir-${item.kind}`, "data-key": item.key };
    if (item.still) {
      const open = element("div", { ...look, class: `${look.class} rsir-still` }, img, caption);
      observer.observe(open);
      return { row: element("li", {}, open), open, img, item };
    }
    const open = element("button", { type: "button", tabindex: index === current ? "0" : "-1", ...look }, img, caption);
    if (item.chosen) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => model.send({ type: "open", key: item.key }));
    open.addEventListener("keydown", (event) => onKey(event, index));
    open.addEventListener("focus", () => setCurrent(index));
    const row = element("li", {}, open);
    const tools = element("div", { class: "rsir-verdicts", role: "group", "aria-label": `what of ${item.name}` });
    if (model.get("markable")) tools.append(markButton(item, "good", index), markButton(item, "bad", index));
    if (model.get("explainable")) tools.append(whyButton(item, index));
    if (tools.children.length) row.append(tools);
    observer.observe(open);
    return { row, open, img, item };
  }

  function setCurrent(index) {
    if (index === current || !cards[index]) return;
    const tab = (card, value) => card?.row.querySelectorAll("button").forEach((o) => (o.tabIndex = value));
    tab(cards[current], -1);
    current = index;
    tab(cards[current], 0);
  }

  function columns() {
    const top = cards[0]?.row.offsetTop;
    const n = cards.findIndex((o) => o.row.offsetTop !== top);
    return n < 0 ? cards.length : n;
  }

  function onKey(event, index) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = {
      ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns(),
      Home: -index, End: cards.length - 1 - index, PageDown: 3 * columns(), PageUp: -3 * columns(),
    };
    if (event.key in steps) {
      const next = Math.max(0, Math.min(cards.length - 1, index + steps[event.key]));
      setCurrent(next);
      cards[next].open.focus();
    } else if (event.key === "g" || event.key === "+") mark(cards[index].item, "good");
    else if (event.key === "b" || event.key === "-") mark(cards[index].item, "bad");
    else if (event.key === "w" || event.key === "?") why(cards[index].item);
    else return;
    event.preventDefault();
    event.stopPropagation();           // the notebook has keys of its own
  }

  function draw() {
    const items = model.get("items"), active = document.activeElement, had = box.contains(active);
    const pressed = had && active.classList.contains("rsir-verdict") ? active.className : null;
    const same = cards.length === items.length && cards.every((o, i) => o.item.key === items[i].key);
    if (!same) current = 0;
    for (const [key, url] of pictures) {
      if (pictures.size <= 2000) break;
      if (items.some((o) => o.key === key)) continue;
      URL.revokeObjectURL(url);
      pictures.delete(key);
    }
    if (same) {
      items.forEach((item, i) => {
        if (JSON.stringify(item) === JSON.stringify(cards[i].item)) return;
        const card = makeCard(item, i);
        cards[i].row.replaceWith(card.row);
        cards[i] = card;
      });
    } else {
      observer.disconnect();
      cards = items.map(makeCard);
      list.replaceChildren(...cards.map((o) => o.row));
    }
    list.style.setProperty("--tile", `${model.get("tile")}px`);
    list.setAttribute("aria-label", model.get("label"));
    box.setAttribute("aria-label", model.get("label"));
    if (!had || !cards.length) return;
    const card = cards[Math.min(current, cards.length - 1)];
    const verdict = pressed && same && [...card.row.querySelectorAll("button")].find((o) => o.className === pressed);
    (verdict || card.open).focus({ preventScroll: same });
  }

  function tell() {
    status.textContent = gone ? GONE : model.get("status");
    status.classList.toggle("rsir-error", gone || model.get("failed"));
  }

  function onKernel() {                // the widget outlives its kernel: what is pressed then would reach nobody
    gone = true;
    tell();
  }

  model.on("change:items change:tile change:label", draw);
  model.on("change:markable change:explainable", () => {
    cards = [];
    draw();
  });
  model.on("change:status change:failed", tell);
  model.on("msg:custom", onMessage);
  model.on("comm_live_update", onKernel);
  draw();
  tell();
  return () => {
    observer.disconnect();
    for (const url of pictures.values()) URL.revokeObjectURL(url);
    model.off("msg:custom", onMessage);
    model.off("comm_live_update", onKernel);
  };
}

export default { render };
