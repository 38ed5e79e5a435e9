// Memory over a step: addresses down, steps across, one lane per pool, live and allocated bytes above.
//
// With drawing.js before it, one plain ES module: used as it is by the notebook widget (default export) and inlined in
// the HTML page (`mount`). Everything that came with the report reaches the page through textContent and fillText alone:
// nothing of it is ever read as HTML.

const STYLE = `
.memplan{font:13px/1.4 system-ui,sans-serif;color:var(--ink);--ink:#1c1c1c;--paper:#fff;--soft:#6a6a6a;--line:#ddd;
background:var(--paper);position:relative}
@media(prefers-color-scheme:dark){.memplan{--ink:#e8e8e8;--paper:#17181a;--soft:#a0a0a0;--line:#3a3b3e}}
.memplan .bar{display:flex;flex-wrap:wrap;gap:6px 12px;align-items:center;margin:0 0 6px}
.memplan .title{font-weight:600}.memplan .soft{color:var(--soft)}
.memplan button,.memplan select,.memplan input{font:inherit;color:inherit;background:var(--paper);
border:1px solid var(--line);border-radius:4px;padding:2px 7px}
.memplan :focus-visible{outline:2px solid #0072b2;outline-offset:1px}
.memplan canvas{display:block;width:100%;touch-action:none;cursor:crosshair}
.memplan .legend{display:flex;flex-wrap:wrap;gap:2px 12px;margin:4px 0;max-height:4.2em;overflow:auto}
.memplan .swatch{display:inline-block;width:11px;height:11px;margin-right:5px;border-radius:2px;vertical-align:-1px}
.memplan .tip{position:absolute;pointer-events:none;background:var(--paper);border:1px solid var(--line);padding:5px 8px;
border-radius:4px;box-shadow:0 2px 8px #0003;max-width:440px;overflow-wrap:anywhere;z-index:5}
.memplan .bottom{container-type:inline-size}.memplan .below{display:grid;grid-template-columns:minmax(240px,1fr) 2fr;gap:14px;margin-top:6px}
.memplan dl{display:grid;grid-template-columns:max-content 1fr;gap:1px 10px;margin:4px 0;overflow-wrap:anywhere}
.memplan dl dt,.memplan dl dd{float:none;width:auto;margin:0;padding:0}.memplan dl dt{color:var(--soft);font-weight:400;white-space:nowrap}
.memplan code{font-size:12px}
.memplan table{border-collapse:collapse;width:100%}.memplan td{padding:2px 10px 2px 0;vertical-align:top}
.memplan td.n{text-align:right;white-space:nowrap}.memplan .contents{overflow-x:auto}.memplan input{width:17em}.memplan tr[tabindex]{cursor:pointer}
.memplan tr:hover{background:#8882}@container(max-width:820px){.memplan .below{grid-template-columns:1fr}}
.memplan-pair{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:18px}
@media(max-width:900px){.memplan-pair{grid-template-columns:1fr}}`;

class View extends Drawing {
  constructor(root, header, buffer) {
    super();
    this.header = header;
    this.c = columns(header, buffer);
    this.s = header.strings;
    this.steps = Math.max(1, header.steps);
    this.count = this.c.birth.length;
    this.x0 = 0; this.x1 = this.steps;
    this.selected = -1; this.at = header.peak; this.query = ""; this.matched = null; this.timings = [];
    this.by = "kind"; this.peers = [];
    this.layoutLanes();
    this.y0 = 0; this.y1 = this.total;
    this.build(root);
    this.recolour();
    this.resize();
    this.list();
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.canvas);
  }

  layoutLanes() {
    // lanes stand under one another on one axis of bytes, an eightieth of the whole apart
    const sum = this.header.lanes.reduce((n, l) => n + Math.max(1, l.nbytes), 0);
    const gap = sum / 80;
    let at = 0;
    this.tops = this.header.lanes.map((l) => { const top = at; at += Math.max(1, l.nbytes) + gap; return top; });
    this.total = Math.max(1, at - gap);
    this.highest = Math.max(1, this.header.measured || 0, ...largest(this.c.allocated), ...largest(this.c.live), ...largest(this.c.measured));
  }

  build(root) {
    this.root = element("section", "memplan");
    this.root.setAttribute("aria-label", `Memory of ${this.header.title}`);
    this.root.append(element("style", "", STYLE));
    const bar = element("div", "bar");
    bar.append(element("span", "title", `${this.header.title}: peak ${bytes(this.header.peak_bytes)}`));
    this.search = element("input"); this.search.type = "search"; this.search.placeholder = "search name, line, module";
    this.search.setAttribute("aria-label", "Search buffers");
    this.search.addEventListener("input", () => this.find(this.search.value));
    const label = element("label", "", "colour by ");
    this.choice = element("select");
    for (const name of Object.keys(COLOUR_BY)) this.choice.append(element("option", "", name));
    this.choice.addEventListener("change", () => { this.by = this.choice.value; this.recolour(); this.draw(); });
    label.append(this.choice);
    bar.append(this.search, label);
    for (const [text, action] of [["whole step", () => this.reset()], ["peak", () => this.toPeak()]]) {
      const b = element("button", "", text); b.type = "button"; b.addEventListener("click", action); bar.append(b);
    }
    bar.append(element("span", "soft", "wheel or + − zoom, drag or arrows pan, [ ] select, Esc clear"));
    this.canvas = element("canvas"); this.canvas.tabIndex = 0; this.canvas.style.height = "560px";
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label",
      `Chart of ${this.count} buffers over ${this.header.steps} steps; peak ${bytes(this.header.peak_bytes)} at step ${this.header.peak}`);
    this.legend = element("div", "legend");
    this.tip = element("div", "tip"); this.tip.hidden = true;
    const bottom = element("div", "bottom"), below = element("div", "below"); // as many columns as its own width allows
    bottom.append(below);
    this.detail = element("div"); this.detail.setAttribute("aria-live", "polite");
    this.contents = element("div", "contents");
    below.append(this.detail, this.contents);
    this.root.append(bar, this.canvas, this.legend, this.tip, bottom);
    root.append(this.root);
    this.listen();
    this.show(-1);
  }

  listen() {
    const canvas = this.canvas;
    let from = null;
    canvas.addEventListener("wheel", (e) => {
      e.preventDefault();
      const [x, y] = this.where(e), factor = Math.exp(Math.sign(e.deltaY) * 0.2);
      this.zoom(factor, e.shiftKey ? 1 : factor, x, y);
    }, { passive: false });
    canvas.addEventListener("pointerdown", (e) => {
      from = { x: e.offsetX, y: e.offsetY, view: [this.x0, this.x1, this.y0, this.y1], moved: false };
      canvas.setPointerCapture(e.pointerId);
    });
    canvas.addEventListener("pointermove", (e) => {
      if (!from) { this.hover(e); return; }
      const dx = e.offsetX - from.x, dy = e.offsetY - from.y;
      if (Math.abs(dx) + Math.abs(dy) > 3) from.moved = true;
      if (!from.moved) return;
      const [x0, x1, y0, y1] = from.view;
      const sx = dx / this.plot.w * (x1 - x0), sy = dy / this.plot.h * (y1 - y0);
      this.look(x0 - sx, x1 - sx, y0 - sy, y1 - sy);
    });
    canvas.addEventListener("pointerup", (e) => {
      if (from && !from.moved) this.click(e);
      from = null;
    });
    canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; });
    canvas.addEventListener("keydown", (e) => this.key(e));
  }

  key(e) {
    const w = (this.x1 - this.x0) * 0.15, h = (this.y1 - this.y0) * 0.15;
    const actions = {
      ArrowLeft: () => this.look(this.x0 - w, this.x1 - w, this.y0, this.y1),
      ArrowRight: () => this.look(this.x0 + w, this.x1 + w, this.y0, this.y1),
      ArrowUp: () => this.look(this.x0, this.x1, this.y0 - h, this.y1 - h),
      ArrowDown: () => this.look(this.x0, this.x1, this.y0 + h, this.y1 + h),
      "+": () => this.zoom(0.8, 0.8), "=": () => this.zoom(0.8, 0.8), "-": () => this.zoom(1.25, 1.25),
      "0": () => this.reset(), p: () => this.toPeak(),
      "]": () => this.next(1), "[": () => this.next(-1), Escape: () => this.select(-1),
    };
    const action = actions[e.key];
    if (action && !e.ctrlKey && !e.metaKey && !e.altKey) { e.preventDefault(); action(); }
  }

  where(e) {
    const x = this.x0 + (e.offsetX - this.plot.x) / this.plot.w * (this.x1 - this.x0);
    const y = this.y0 + (e.offsetY - this.plot.y) / this.plot.h * (this.y1 - this.y0);
    return [x, y];
  }

  look(x0, x1, y0, y1) {
    const w = Math.min(this.steps, Math.max(1, x1 - x0)), h = Math.min(this.total, Math.max(64, y1 - y0));
    this.x0 = Math.min(this.steps - w, Math.max(0, x0)); this.x1 = this.x0 + w;
    this.y0 = Math.min(this.total - h, Math.max(0, y0)); this.y1 = this.y0 + h;
    this.later();
    for (const peer of this.peers) peer.follow(this);
  }

  follow(other) { // the same part of the step and the same addresses
    this.x0 = other.x0 / other.steps * this.steps; this.x1 = other.x1 / other.steps * this.steps;
    this.y0 = other.y0; this.y1 = other.y1;
    this.later();
  }

  zoom(fx, fy, x = (this.x0 + this.x1) / 2, y = (this.y0 + this.y1) / 2) {
    this.look(x - (x - this.x0) * fx, x + (this.x1 - x) * fx, y - (y - this.y0) * fy, y + (this.y1 - y) * fy);
  }

  reset() { this.look(0, this.steps, 0, this.total); }

  toPeak() {
    const w = Math.max(8, this.steps / 20);
    this.at = this.header.peak; this.list();
    this.look(this.header.peak - w / 2, this.header.peak + w / 2, 0, this.total);
  }

  later() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => { this.pending = false; this.draw(); });
  }

  resize() {
    const ratio = Math.min(2, globalThis.devicePixelRatio || 1);
    const w = Math.max(300, this.canvas.clientWidth || 900), h = this.canvas.clientHeight || 560;
    this.ratio = ratio;
    this.canvas.width = Math.round(w * ratio); this.canvas.height = Math.round(h * ratio);
    this.size = { w, h };
    this.plot = { x: LEFT, y: CURVES + GAP, w: w - LEFT - RIGHT, h: h - CURVES - GAP - AXIS };
    this.draw();
  }

  recolour() {
    const column = this.c[COLOUR_BY[this.by]], weight = new Map();
    for (let i = 0; i < this.count; i++) weight.set(column[i], (weight.get(column[i]) || 0) + this.c.nbytes[i]);
    const order = [...weight].sort((a, b) => b[1] - a[1]).map((p) => p[0]);
    const colours = new Map(order.map((id, k) =>
      [id, (this.by === "kind" && KIND[this.s[id]]) || PALETTE[Math.min(k, PALETTE.length - 1)]]));
    this.fill = new Uint32Array(this.count);
    for (let i = 0; i < this.count; i++) this.fill[i] = packed(colours.get(column[i]));
    const shown = this.by === "kind" ? order.length : PALETTE.length - 1;
    this.legend.replaceChildren(...order.slice(0, shown).map((id) => {
      const item = element("span"), swatch = element("span", "swatch");
      swatch.style.background = colours.get(id);
      item.append(swatch, element("span", "", this.s[id] || "(none)"));
      return item;
    }));
    this.legend.append(element("span", "soft", "above: blue line live, grey with rounding and room in pools" +
      (this.c.measured.length ? ", dashed orange measured step by step" : "")));
    if (order.length > shown) this.legend.append(element("span", "soft", `grey: ${order.length - shown} more`));
  }

  find(text) {
    this.query = text.trim().toLowerCase();
    if (!this.query) { this.matched = null; this.draw(); return; }
    const hit = this.s.map((s) => s.toLowerCase().includes(this.query));
    this.matched = new Uint8Array(this.count);
    const looked = [this.c.name, this.c.line, this.c.module, this.c.node, this.c.op, this.c.code];
    for (let i = 0; i < this.count; i++) this.matched[i] = looked.some((column) => hit[column[i]]) ? 1 : 0;
    this.draw();
  }

  draw() {
    const start = performance.now(), context = this.canvas.getContext("2d", { alpha: false });
    const style = getComputedStyle(this.root);
    this.ink = style.getPropertyValue("--ink").trim() || "#000";
    this.paper = style.getPropertyValue("--paper").trim() || "#fff";
    this.soft = style.getPropertyValue("--soft").trim() || "#666";
    context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    context.fillStyle = this.paper;
    context.fillRect(0, 0, this.size.w, this.size.h);
    this.boxes(context);
    this.curves(context);
    this.marks(context);
    this.timings.push(performance.now() - start);
  }

  boxAt(e) {
    const x = Math.floor((e.offsetX - this.plot.x) * this.ratio), y = Math.floor((e.offsetY - this.plot.y) * this.ratio);
    if (x < 0 || y < 0 || x >= this.image.width || y >= this.image.height) return -1;
    return this.under[y * this.image.width + x];
  }

  hover(e) {
    const i = this.boxAt(e), step = Math.floor(this.where(e)[0]);
    const inside = step >= 0 && step < this.header.steps && e.offsetX >= this.plot.x;
    if (i < 0 && !(inside && e.offsetY < this.plot.y)) { this.tip.hidden = true; return; }
    const lines = i >= 0
      ? [this.text("name", i) + "  " + bytes(this.c.nbytes[i]), this.text("line", i), this.text("code", i), this.text("shape", i),
        `${this.text("kind", i)}, FX node ${this.text("node", i) || "-"}, steps ${this.life(i)}`]
      : [`step ${step}: ${this.s[this.c.step_name[step]]}`, this.s[this.c.step_line[step]],
        `live ${bytes(this.c.live[step])}, allocated ${bytes(this.c.allocated[step])}` +
          (this.c.measured[step] >= 0 ? `, measured ${bytes(this.c.measured[step])}` : "")];
    this.tip.replaceChildren(...lines.filter(Boolean).map((t, k) => element("div", k ? "" : "title", t)));
    this.tip.hidden = false;
    const right = e.offsetX + 460 > this.size.w;
    this.tip.style.left = right ? "auto" : `${e.offsetX + 14}px`;
    this.tip.style.right = right ? `${this.size.w - e.offsetX + 14}px` : "auto";
    this.tip.style.top = `${this.canvas.offsetTop + e.offsetY + 14}px`;
  }

  click(e) {
    const step = Math.floor(this.where(e)[0]);
    if (step >= 0 && step < this.header.steps) { this.at = step; this.list(); }
    this.select(this.boxAt(e));
  }

  text(column, i) { return this.s[this.c[column][i]]; }
  life(i) { return `${this.c.birth[i]} to ${this.c.death[i] > this.header.steps ? "the end" : this.c.death[i]}`; }

  select(i) { this.selected = i; this.show(i); this.draw(); }

  next(direction) {
    if (!this.count) return;
    if (!this.order) this.order = [...this.c.nbytes.keys()].sort((a, b) => this.c.nbytes[b] - this.c.nbytes[a] || a - b);
    const order = this.matched ? this.order.filter((i) => this.matched[i]) : this.order;
    if (!order.length) return;
    const at = order.indexOf(this.selected);
    this.select(order[at < 0 ? (direction > 0 ? 0 : order.length - 1) : (at + direction + order.length) % order.length]);
  }

  show(i) {
    if (i < 0) { this.detail.replaceChildren(element("div", "soft", "Nothing selected: click a box, or press ] for the largest.")); return; }
    const facts = element("dl");
    const add = (title, value) => { if (value) facts.append(element("dt", "", title), element("dd", "", value)); };
    add("bytes", `${bytes(this.c.nbytes[i])} (${this.c.nbytes[i]})`);
    for (const [column, title] of FACTS) add(title, this.text(column, i));
    add("steps", this.life(i));
    add("address", `${this.header.lanes[this.c.lane[i]].name} + ${this.c.offset[i]}`);
    const same = [];
    for (let k = 0; k < this.count; k++) if (k !== i && this.c.storage[k] === this.c.storage[i]) same.push(this.text("name", k));
    add("same storage", same.slice(0, 20).join(", "));
    this.detail.replaceChildren(element("div", "title", "Selected"), facts);
  }

  list() {
    const alive = [];
    for (let i = 0; i < this.count; i++) if (this.c.birth[i] <= this.at && this.at < this.c.death[i]) alive.push(i);
    alive.sort((a, b) => this.c.nbytes[b] - this.c.nbytes[a] || a - b);
    const table = element("table");
    for (const i of alive.slice(0, 25)) {
      const row = element("tr"); row.tabIndex = 0;
      const cell = (above, below) => { const td = element("td"); td.append(element("div", "", above), element("div", "soft", below)); return td; };
      row.append(element("td", "n", bytes(this.c.nbytes[i])),
        cell(this.text("line", i) || this.text("module", i) || this.text("node", i), this.text("code", i)),
        cell(this.text("shape", i), this.text("name", i)));
      row.addEventListener("click", () => this.select(i));
      row.addEventListener("keydown", (e) => { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); this.select(i); } });
      table.append(row);
    }
    const of = this.header.steps ? `: ${bytes(this.c.allocated[this.at])} allocated, ${bytes(this.c.live[this.at])} live` : "";
    const title = element("div", "title", `Alive at step ${this.at}${this.at === this.header.peak ? " (the peak)" : ""}${of}`);
    this.contents.replaceChildren(title, table);
    if (alive.length > 25) this.contents.append(element("div", "soft", `and ${alive.length - 25} more`));
  }
}

// One view, or two side by side: on one scale of bytes, zoomed and panned together.
export function mount(root, headers, blocks) {
  const pair = element("div", headers.length > 1 ? "memplan-pair" : "");
  root.append(pair);
  const views = headers.map((header, k) => new View(pair, header, blocks[k]));
  const total = Math.max(...views.map((v) => v.total)), highest = Math.max(...views.map((v) => v.highest));
  for (const view of views) {
    view.peers = views.filter((v) => v !== view);
    view.total = view.y1 = total; view.highest = highest;
    if (view.peers.length) view.draw();
  }
  return views;
}

export function decode(base64) {
  const text = atob(base64), out = new Uint8Array(text.length);
  for (let k = 0; k < text.length; k++) out[k] = text.charCodeAt(k);
  return out.buffer;
}

export default {
  render({ model, el }) {
    let views = [];
    const show = () => {
      views.forEach((v) => v.observer.disconnect());
      el.replaceChildren();
      const data = model.get("data"), headers = JSON.parse(model.get("headers"));
      const blocks = headers.map(({ range: [from, to] }) => data.buffer.slice(data.byteOffset + from, data.byteOffset + to));
      views = mount(el, headers, blocks);
      el.memplan = views;
    };
    show();
    model.on("change:headers", show);
    return () => views.forEach((v) => v.observer.disconnect());
  },
};
