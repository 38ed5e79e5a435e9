// Memory over a step: addresses down, steps across, one lane per pool, live and allocated bytes above.
//
// One plain ES module, used as it is by the notebook widget (default export) and inlined in the HTML page (`mount`).
// Boxes are written pixel by pixel into an image, since no two of them overlap: the work is bounded by the number of
// pixels and of boxes, and a second image of box numbers answers what is under the pointer. Everything that came with
// the report reaches the page through textContent and fillText alone: nothing of it is ever read as HTML.

const PALETTE = ["#56b4e9", "#d55e00", "#009e73", "#e69f00", "#cc79a7", "#0072b2", "#f0e442", "#8c8c8c"];
const KIND = { input: "#999999", parameter: "#666666", constant: "#666666", temporary: "#56b4e9", saved: "#d55e00",
  output: "#009e73", workspace: "#f0e442", comm: "#cc79a7" };
const CURVES = 130, GAP = 10, LEFT = 78, RIGHT = 10, AXIS = 22;
const COLOUR_BY = { kind: "kind", module: "layer", dtype: "dtype", pass: "decided", line: "line", graph: "graph" };
const FACTS = [["name", "buffer"], ["line", "your line"], ["code", "code"], ["module", "module"], ["node", "FX node"],
  ["op", "operation"], ["shape", "shape"], ["kind", "kind"], ["decided", "place decided by"], ["note", "place"]];
const TYPES = { f8: Float64Array, i4: Int32Array };

export function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  let unit = 0, value = Math.abs(n);
  while (value >= 1023.995 && unit < units.length - 1) { value /= 1024; unit += 1; }
  if (unit === 0) return `${n} B`;
  return `${n < 0 ? "-" : ""}${value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)} ${units[unit]}`;
}

function columns(header, buffer) {
  const out = {};
  for (const [name, [type, at, length]] of Object.entries(header.columns)) out[name] = new TYPES[type](buffer, at, length);
  return out;
}

function element(tag, className, text) {
  const e = document.createElement(tag);
  if (className) e.className = className;
  if (text !== undefined) e.textContent = text;
  return e;
}

function packed(colour) {
  const v = parseInt(colour.slice(1), 16);
  return (0xff000000 | ((v & 0xff) << 16) | (v & 0xff00) | (v >> 16)) >>> 0;
}

function blend(colour, towards, part) {
  let out = 0xff000000;
  for (const shift of [0, 8, 16]) {
    const a = (colour >>> shift) & 0xff, b = (towards >>> shift) & 0xff;
    out |= Math.round(a + (b - a) * part) << shift;
  }
  return out >>> 0;
}

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
.memplan .below{display:grid;grid-template-columns:minmax(240px,1fr) 2fr;gap:14px;margin-top:6px}
.memplan dl{display:grid;grid-template-columns:max-content 1fr;gap:1px 10px;margin:4px 0;overflow-wrap:anywhere}
.memplan dt{color:var(--soft)}.memplan dd{margin:0}.memplan code{font-size:12px}
.memplan table{border-collapse:collapse;width:100%}.memplan td{padding:1px 8px 1px 0;overflow-wrap:anywhere}
.memplan td.n{text-align:right;white-space:nowrap}.memplan td.place{white-space:nowrap}.memplan input{width:17em}.memplan tr[tabindex]{cursor:pointer}
.memplan tr:hover{background:#8882}@media(max-width:700px){.memplan .below{grid-template-columns:1fr}}`;

class View {
  constructor(root, header, buffer) {
    this.header = header;
    this.c = columns(header, buffer);
    this.s = header.strings;
    this.steps = Math.max(1, header.steps);
    this.count = this.c.birth.length;
    this.x0 = 0; this.x1 = this.steps;
    this.selected = -1; this.at = header.peak; this.query = ""; this.matched = null; this.timings = [];
    this.by = "kind";
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
    this.highest = Math.max(1, this.header.measured || 0, this.header.highest || 0, ...blocks(this.c.allocated), ...blocks(this.c.live), ...blocks(this.c.measured));
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
    const below = element("div", "below");
    this.detail = element("div"); this.detail.setAttribute("aria-live", "polite");
    this.contents = element("div");
    below.append(this.detail, this.contents);
    this.root.append(bar, this.canvas, this.legend, this.tip, below);
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

  boxes(context) {
    const r = this.ratio, px = Math.round(this.plot.x * r), py = Math.round(this.plot.y * r);
    const w = Math.round(this.plot.w * r), h = Math.round(this.plot.h * r);
    if (!this.image || this.image.width !== w || this.image.height !== h) {
      this.image = context.createImageData(w, h);
      this.pixels = new Uint32Array(this.image.data.buffer);
      this.under = new Int32Array(w * h);
    }
    const { pixels, under, c, fill, matched, tops } = this;
    const paper = packed(this.paper.length === 7 ? this.paper : "#ffffff"), ink = packed(this.ink.length === 7 ? this.ink : "#000000");
    const laneColour = blend(paper, ink, 0.06);
    pixels.fill(paper); under.fill(-1);
    const sx = w / (this.x1 - this.x0), sy = h / (this.y1 - this.y0);
    const clampX = (v) => Math.min(w, Math.max(0, Math.round((v - this.x0) * sx)));
    const clampY = (v) => Math.min(h, Math.max(0, Math.round((v - this.y0) * sy)));
    this.header.lanes.forEach((lane, k) => {
      const a = clampX(lane.birth), b = clampX(lane.death), bottom = clampY(tops[k] + lane.nbytes);
      for (let y = clampY(tops[k]); y < bottom; y++) pixels.fill(laneColour, y * w + a, y * w + b);
    });
    this.labels = [];
    for (let i = 0; i < this.count; i++) {
      if (c.birth[i] >= this.x1 || c.death[i] <= this.x0) continue;
      const top = tops[c.lane[i]] + c.offset[i];
      if (top >= this.y1 || top + c.nbytes[i] <= this.y0) continue;
      const a = clampX(c.birth[i]), b = Math.max(a + 1, clampX(c.death[i]));
      const y0 = clampY(top), y1 = Math.max(y0 + 1, clampY(top + c.nbytes[i]));
      if (a >= w || y0 >= h) continue;
      let colour = fill[i];
      if (matched && !matched[i]) colour = blend(colour, paper, 0.82);
      const right = Math.min(w, b), bottom = Math.min(h, y1);
      if (b - a < 2 && y1 - y0 < 2) { // below a pixel: the first box there stands for all
        const at = y0 * w + a;
        if (under[at] < 0 || (matched && matched[i])) { pixels[at] = colour; under[at] = i; }
        continue;
      }
      for (let y = y0; y < bottom; y++) { pixels.fill(colour, y * w + a, y * w + right); under.fill(i, y * w + a, y * w + right); }
      if (b - a > 3 && y1 - y0 > 3) {
        const edge = blend(colour, paper, 0.55);
        pixels.fill(edge, y0 * w + a, y0 * w + right);
        for (let y = y0; y < bottom; y++) pixels[y * w + a] = edge;
        if (b - a > 70 * r && y1 - y0 > 15 * r) this.labels.push([i, px + a, py + y0, right - a, bottom - y0]);
      }
    }
    context.putImageData(this.image, px, py);
  }

  curves(context) {
    const { plot, c } = this, base = CURVES - 4, height = CURVES - 22;
    const scale = height / this.highest, step = (this.x1 - this.x0) / plot.w;
    const path = (series, colour, filled) => {
      context.beginPath();
      context.moveTo(plot.x, base);
      for (let x = 0; x < plot.w; x++) {
        const a = Math.floor(this.x0 + x * step), b = Math.max(a + 1, Math.floor(this.x0 + (x + 1) * step));
        let top = 0;
        for (let k = a; k < b && k < series.length; k++) if (series[k] > top) top = series[k];
        if (!filled && x === 0) context.moveTo(plot.x, base - top * scale);
        context.lineTo(plot.x + x, base - top * scale);
        context.lineTo(plot.x + x + 1, base - top * scale);
      }
      if (filled) { context.lineTo(plot.x + plot.w, base); context.fillStyle = colour; context.fill(); } else {
        context.strokeStyle = colour; context.lineWidth = 1.5; context.stroke();
      }
    };
    path(c.allocated, "rgba(128,128,128,0.35)", true);
    path(c.live, "#0072b2", false);
    if (c.measured.length) this.measured(context, base, scale);
    context.fillStyle = this.soft; context.font = "11px system-ui,sans-serif"; context.textAlign = "right";
    for (const part of [0, 0.5, 1]) {
      context.fillText(bytes(Math.round(this.highest * part)), plot.x - 6, base - height * part + 4);
      context.fillRect(plot.x, base - height * part, plot.w, 0.5);
    }
    if (this.header.measured) {
      const y = base - this.header.measured * scale;
      context.setLineDash([6, 4]); context.strokeStyle = "#d55e00"; context.beginPath();
      context.moveTo(plot.x, y); context.lineTo(plot.x + plot.w, y); context.stroke(); context.setLineDash([]);
      context.textAlign = "left"; context.fillStyle = "#d55e00";
      context.fillText(`measured ${bytes(this.header.measured)}`, plot.x + 4, y - 3);
    }
  }

  measured(context, base, scale) { // what a run held at each step, drawn over the plan; gaps where a step was not seen
    const { plot, c } = this, xOf = (k) => plot.x + (k - this.x0) / (this.x1 - this.x0) * plot.w;
    context.save();
    context.beginPath(); context.rect(plot.x, 0, plot.w, CURVES); context.clip();
    context.beginPath(); context.strokeStyle = "#d55e00"; context.lineWidth = 1.5; context.setLineDash([3, 2]);
    const first = Math.max(0, Math.floor(this.x0)), last = Math.min(c.measured.length, Math.ceil(this.x1));
    const every = Math.max(1, Math.floor((last - first) / (2 * plot.w)));
    let pen = false;
    for (let k = first; k < last; k += every) {
      let top = -1;
      for (let j = k; j < Math.min(last, k + every); j++) if (c.measured[j] > top) top = c.measured[j];
      if (top < 0) { pen = false; continue; }
      const y = base - top * scale;
      if (pen) context.lineTo(xOf(k), y); else context.moveTo(xOf(k), y);
      context.lineTo(xOf(k + every), y); pen = true;
    }
    context.stroke(); context.restore();
  }

  marks(context) {
    const { plot } = this, xOf = (k) => plot.x + (k - this.x0) / (this.x1 - this.x0) * plot.w;
    context.font = "11px system-ui,sans-serif"; context.textAlign = "left"; context.textBaseline = "alphabetic";
    for (const [i, x, y, w, h] of this.labels.slice(0, 400)) {
      const r = this.ratio, text = this.s[this.c.code[i]] || this.s[this.c.name[i]];
      context.save(); context.beginPath(); context.rect(x / r, y / r, w / r - 2, h / r); context.clip();
      context.fillStyle = "#000"; context.fillText(`${text}  ${bytes(this.c.nbytes[i])}`, x / r + 5, y / r + 12); context.restore();
    }
    context.fillStyle = this.soft; context.textAlign = "right";
    this.header.lanes.forEach((lane, k) => {
      const y = plot.y + (this.tops[k] - this.y0) / (this.y1 - this.y0) * plot.h, top = Math.max(plot.y, y);
      const bottom = plot.y + (this.tops[k] + lane.nbytes - this.y0) / (this.y1 - this.y0) * plot.h;
      if (bottom - top < 11 || top > plot.y + plot.h - 8) return;
      context.save(); context.beginPath(); context.rect(0, plot.y, LEFT - 4, plot.h); context.clip();
      context.fillText(lane.short, plot.x - 6, top + 11);
      if (bottom - top > 26) context.fillText(bytes(lane.nbytes), plot.x - 6, top + 24);
      context.restore();
    });
    context.textAlign = "center";
    const every = niceStep((this.x1 - this.x0) / 8), floor = plot.y + plot.h;
    for (let k = Math.ceil(this.x0 / every) * every; k <= this.x1; k += every) context.fillText(String(k), xOf(k), floor + 14);
    for (const boundary of this.header.boundaries) {
      if (boundary.step <= this.x0 || boundary.step >= this.x1) continue;
      context.fillStyle = this.soft; context.fillRect(xOf(boundary.step), 14, 1, floor - 14);
      context.textAlign = "left"; context.fillText(boundary.name, xOf(boundary.step) + 4, 12);
    }
    for (const [step, colour, text] of [[this.at, "#0072b2", `step ${this.at}`], [this.header.peak, this.ink, "peak"]]) {
      const x = xOf(step + 0.5);
      if (step === undefined || x < plot.x || x > plot.x + plot.w || (text !== "peak" && step === this.header.peak)) continue;
      context.fillStyle = colour; context.fillRect(x, 16, 1.5, floor - 16);
      context.textAlign = x > plot.x + plot.w - 40 ? "right" : "left"; context.fillText(text, x + (context.textAlign === "left" ? 4 : -4), 26);
    }
    if (this.selected >= 0) this.outline(context, xOf);
  }

  outline(context, xOf) {
    const { c, plot } = this, storage = c.storage[this.selected];
    context.save(); context.beginPath(); context.rect(plot.x, plot.y, plot.w, plot.h); context.clip();
    context.lineWidth = 2.5; context.strokeStyle = this.ink;
    for (let i = 0; i < this.count; i++) {
      if (c.storage[i] !== storage) continue;
      const top = this.tops[c.lane[i]] + c.offset[i], scale = plot.h / (this.y1 - this.y0);
      context.setLineDash(i === this.selected ? [] : [5, 4]);
      context.strokeRect(xOf(c.birth[i]), plot.y + (top - this.y0) * scale,
        Math.max(2, xOf(c.death[i]) - xOf(c.birth[i])), Math.max(2, c.nbytes[i] * scale));
    }
    context.restore();
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
      row.append(element("td", "n", bytes(this.c.nbytes[i])), element("td", "place", this.text("line", i) || this.text("module", i) || this.text("node", i)),
        element("td", "", this.text("code", i)), element("td", "soft", `${this.text("name", i)} ${this.text("shape", i)}`));
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

function blocks(series) { // maxima of blocks, so that a spread of a long series does not exhaust the stack
  const out = [0];
  for (let k = 0; k < series.length; k++) if (series[k] > out[0]) out[0] = series[k];
  return out;
}

function niceStep(rough) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, rough)));
  for (const m of [1, 2, 5, 10]) if (m * power >= rough) return m * power;
  return 10 * power;
}

export function mount(root, header, buffer) { return new View(root, header, buffer); }

export function decode(base64) {
  const text = atob(base64), out = new Uint8Array(text.length);
  for (let k = 0; k < text.length; k++) out[k] = text.charCodeAt(k);
  return out.buffer;
}

export default {
  render({ model, el }) {
    const views = [];
    const show = () => {
      el.replaceChildren();
      const data = model.get("data"), headers = JSON.parse(model.get("headers"));
      headers.forEach((header, k) => {
        const [from, to] = header.range;
        const bytesOf = data.buffer.slice(data.byteOffset + from, data.byteOffset + to);
        views[k] = mount(el, header, bytesOf);
      });
    };
    show();
    model.on("change:headers", show);
    return () => views.forEach((v) => v.observer.disconnect());
  },
};
