// What the view draws: boxes, curves and marks. See view.js, with which it makes one module (`page.module_source`).
//
// Boxes are written pixel by pixel into an image, since no two of them overlap: the work is bounded by the number of
// pixels and of boxes, and a second image of box numbers answers what is under the pointer.

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

function largest(series) { // as a list; a spread of the series itself would exhaust the stack
  const out = [0];
  for (let k = 0; k < series.length; k++) if (series[k] > out[0]) out[0] = series[k];
  return out;
}

function niceStep(rough) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, rough)));
  for (const m of [1, 2, 5, 10]) if (m * power >= rough) return m * power;
  return 10 * power;
}

class Drawing {
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
    const dark = this.paper.length === 7 && parseInt(this.paper.slice(1), 16) < 0x808080;
    path(c.live, dark ? PALETTE[0] : "#0072b2", false);
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
      // own allocations are drawn one above another wherever there is room: how far that reaches is nothing's size
      if (lane.pool && bottom - top > 26) context.fillText(bytes(lane.nbytes), plot.x - 6, top + 24);
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
      const wide = context.measureText(text).width, at = x > plot.x + plot.w - wide - 8 ? x - wide - 4 : x + 5;
      context.fillStyle = this.paper; context.globalAlpha = 0.85; context.fillRect(at - 2, 16, wide + 4, 13);
      context.fillStyle = colour; context.globalAlpha = 1; context.textAlign = "left"; context.fillText(text, at, 26);
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
}
