// Part of the live view: joined with its neighbours into one ES module, ask first and view last.

const UNDER = 0, FIRST = 1, LAST = 249, OVER = 250, MASKED = 251, NAN = 252, POSINF = 253, NEGINF = 254;
const FEW_CLIPPED = 64, LEAST_MARK = 5, MOST_MARKS = 20000;
const FONT = "system-ui, -apple-system, 'Segoe UI', sans-serif";

/** Paints a picture; knows positions and pixels, asks nothing. */
class Painter {
  constructor(canvas) {
    this.canvas = canvas;
    this.patterns = new Map();
  }
  /** Take a new picture: cells become a bitmap, marked cells a list. */
  load(picture, codes, palette) {
    this.picture = picture;
    this.palette = palette;
    this.window = { rows: [...picture.window.rows], cols: [...picture.window.cols] };
    const [rows, cols] = picture.cells;
    const image = new ImageData(cols, rows), pixels = new Uint32Array(image.data.buffer);
    const colors = new Uint32Array(palette.slice().buffer), clipped = [], marks = [];
    // A plain loop: there are up to a million cells, and a redraw waits for it.
    for (let i = 0; i < codes.length; i++) {
      const code = codes[i];
      pixels[i] = colors[code];
      if (code === UNDER || code === OVER) clipped.push(i);
      else if (code >= NAN && code <= NEGINF) marks.push(i);
    }
    this.bitmap = document.createElement("canvas");
    this.bitmap.width = cols;
    this.bitmap.height = rows;
    this.bitmap.getContext("2d").putImageData(image, 0, 0);
    this.marked = [...(clipped.length <= FEW_CLIPPED ? clipped : []), ...marks].slice(0, MOST_MARKS);
    this.codes = codes;
    this.veiled = this.stretches(codes, cols);
  }
  /** Stretches [row, start, stop) of masked cells: there may be very many cells, but few stretches. */
  stretches(codes, cols) {
    const found = [];
    for (let i = codes.indexOf(MASKED); i >= 0; i = codes.indexOf(MASKED, i + 1)) {
      const last = found.at(-1), row = Math.floor(i / cols), col = i % cols;
      if (last && last[0] === row && last[2] === col) last[2] += 1;
      else found.push([row, col, col + 1]);
    }
    return found;
  }
  get layout() { return this.picture.layout; }
  color(code) {
    const [r, g, b] = this.palette.subarray(4 * code, 4 * code + 3);
    return `rgb(${r},${g},${b})`;
  }
  /** Black or white, whichever is readable on the colour of a code. */
  inkOn(code) {
    const [red, green, blue] = [...this.palette.subarray(4 * code, 4 * code + 3)].map((part) => (part / 255) ** 2.2);
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 ? "#000" : "#fff";
  }
  /** Pixel of a position along rows (y) or columns (x), in CSS pixels of the canvas. */
  pixel(along, at) {
    const [start, stop] = this.window[along];
    const [origin, room] = along === "rows"
      ? [this.layout.top, this.layout.map_height] : [this.layout.left, this.layout.map_width];
    return origin + ((at - start) / (stop - start)) * room;
  }
  /** Position at a pixel, fractional. */
  position(along, pixel) {
    const [start, stop] = this.window[along];
    const [origin, room] = along === "rows"
      ? [this.layout.top, this.layout.map_height] : [this.layout.left, this.layout.map_width];
    return start + ((pixel - origin) / room) * (stop - start);
  }
  /** Cell of a position, or of the nearest one inside the picture. */
  cell(along, at) {
    const [start, stop] = this.picture.window[along];
    const count = this.picture.cells[along === "rows" ? 0 : 1];
    return clamp(Math.floor(((at - start) / (stop - start)) * count), 0, count - 1);
  }
  /** Positions [start, stop) covered by a cell. */
  span(along, cell) {
    const [start, stop] = this.picture.window[along];
    const count = this.picture.cells[along === "rows" ? 0 : 1];
    return [start + (cell / count) * (stop - start), start + ((cell + 1) / count) * (stop - start)];
  }
  pattern(context, code) {
    if (!this.patterns.has(code)) {
      const tile = document.createElement("canvas");
      tile.width = tile.height = 8;
      const ink = tile.getContext("2d");
      ink.fillStyle = code === "hole" ? "rgb(186,186,186)" : this.color(code);
      ink.fillRect(0, 0, 8, 8);
      ink.fillStyle = { [NAN]: "rgb(255,221,51)", [MASKED]: "rgb(150,150,158)", hole: "rgb(110,110,110)" }[code] ?? "#fff";
      for (let y = 0; y < 8; y++) {
        for (let x = 0; x < 8; x++) {
          const striped = { [NAN]: (x + y) % 4 < 2, [POSINF]: x % 4 < 2, [NEGINF]: y % 4 < 2, hole: (x + y) % 8 < 2 };
          striped[MASKED] = (x + y) % 8 < 2 && (x - y + 8) % 8 < 2;
          if (striped[code]) ink.fillRect(x, y, 1, 1);
        }
      }
      this.patterns.set(code, tile);
    }
    return context.createPattern(this.patterns.get(code), "repeat");
  }
  paint(cursor, focused) {
    const lay = this.layout, dpr = window.devicePixelRatio || 1, canvas = this.canvas;
    if (canvas.width !== Math.round(lay.width * dpr) || canvas.height !== Math.round(lay.height * dpr)) {
      canvas.width = Math.round(lay.width * dpr);
      canvas.height = Math.round(lay.height * dpr);
      canvas.style.width = `${lay.width}px`;
      canvas.style.height = `${lay.height}px`;
    }
    const context = canvas.getContext("2d");
    context.setTransform(dpr, 0, 0, dpr, 0, 0);
    context.clearRect(0, 0, lay.width, lay.height);
    const style = getComputedStyle(canvas);
    this.ink = style.color;
    this.paper = style.getPropertyValue("--fxm-solid") || "#fff";
    context.save();
    try {
      this.map(context, cursor, focused);
    } finally {
      context.restore(); // or everything after an error would be painted inside the map
    }
    this.frame(context);
    this.ribbon(context, "cols");
    this.ribbon(context, "rows");
    this.labels(context);
  }
  map(context, cursor, focused) {
    const lay = this.layout, drawn = this.picture.window;
    context.beginPath();
    context.rect(lay.left, lay.top, lay.map_width, lay.map_height);
    context.clip();
    context.imageSmoothingEnabled = false;
    const [x0, x1] = drawn.cols.map((at) => this.pixel("cols", at));
    const [y0, y1] = drawn.rows.map((at) => this.pixel("rows", at));
    context.drawImage(this.bitmap, x0, y0, x1 - x0, y1 - y0);
    const [rows, cols] = this.picture.cells;
    const wide = (x1 - x0) / cols, tall = (y1 - y0) / rows;
    const [w, h] = [Math.max(wide, LEAST_MARK), Math.max(tall, LEAST_MARK)];
    context.fillStyle = this.pattern(context, MASKED);
    for (const [row, start, stop] of this.veiled) context.fillRect(x0 + start * wide, y0 + row * tall, (stop - start) * wide, tall);
    for (const i of this.marked) {
      const code = this.codes[i];
      context.fillStyle = code >= NAN ? this.pattern(context, code) : this.color(code);
      context.fillRect(
        x0 + ((i % cols) + 0.5) * wide - w / 2, y0 + (Math.floor(i / cols) + 0.5) * tall - h / 2, w, h);
    }
    this.write(context, wide, tall);
    for (const hole of this.picture.holes) this.hole(context, hole);
    for (const peak of this.picture.peaks) this.ring(context, peak);
    if (cursor) this.outline(context, cursor, focused);
  }
  /** Write what a source has to say in each cell, where there is room to read it. */
  write(context, wide, tall) {
    const { texts, window: drawn } = this.picture;
    if (!texts || wide < 26 || tall < 13) return;
    context.font = `11px ${FONT}`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    texts.forEach((row, r) => row.forEach((text, c) => {
      const code = this.codes[r * this.picture.cells[1] + c];
      context.fillStyle = this.inkOn(code);
      const x = this.pixel("cols", drawn.cols[0] + c + 0.5), y = this.pixel("rows", drawn.rows[0] + r + 0.5);
      context.fillText(this.fit(context, text, wide - 4), x, y);
    }));
  }
  /** A ring around the very place of an outlier, however small the cells are. */
  ring(context, [row, col]) {
    const x = this.pixel("cols", col + 0.5), y = this.pixel("rows", row + 0.5);
    for (const [ink, line] of [["#fff", 4], ["#000", 2]]) {
      context.beginPath();
      context.arc(x, y, 7, 0, 2 * Math.PI);
      context.strokeStyle = ink;
      context.lineWidth = line;
      context.stroke();
    }
    context.lineWidth = 1;
  }
  frame(context) {
    const lay = this.layout;
    context.strokeStyle = this.ink;
    context.globalAlpha = 0.35;
    context.strokeRect(lay.left - 0.5, lay.top - 0.5, lay.map_width + 1, lay.map_height + 1);
    context.globalAlpha = 1;
  }
  hole(context, hole) {
    const [x0, x1] = hole.cols.map((at) => this.pixel("cols", at));
    const [y0, y1] = hole.rows.map((at) => this.pixel("rows", at));
    context.fillStyle = this.pattern(context, "hole");
    context.fillRect(x0, y0, x1 - x0, y1 - y0);
    const lay = this.layout;
    const left = Math.max(x0, lay.left), right = Math.min(x1, lay.left + lay.map_width);
    const top = Math.max(y0, lay.top), bottom = Math.min(y1, lay.top + lay.map_height);
    if (right <= left || bottom <= top) return;
    context.font = `12px ${FONT}`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    const width = context.measureText(hole.text).width + 12;
    context.fillStyle = "#fff";
    context.fillRect((left + right - width) / 2, (top + bottom) / 2 - 10, width, 20);
    context.fillStyle = "#111";
    context.fillText(hole.text, (left + right) / 2, (top + bottom) / 2);
  }
  outline(context, cursor, focused) {
    const [c0, c1] = this.span("cols", cursor.col).map((at) => this.pixel("cols", at));
    const [r0, r1] = this.span("rows", cursor.row).map((at) => this.pixel("rows", at));
    const x = c0 - 1, y = r0 - 1, w = Math.max(c1 - c0, 3) + 2, h = Math.max(r1 - r0, 3) + 2;
    for (const [ink, line, grow] of [["#fff", focused ? 5 : 3, 0], ["#000", focused ? 2.5 : 1, 0]]) {
      context.strokeStyle = ink;
      context.lineWidth = line;
      context.strokeRect(x - grow, y - grow, w + 2 * grow, h + 2 * grow);
    }
    context.lineWidth = 1;
  }
  ribbon(context, along) {
    const lay = this.layout, thick = 15, upright = along === "rows";
    const [low, high] = upright ? [lay.top, lay.top + lay.map_height] : [lay.left, lay.left + lay.map_width];
    context.font = `600 10px ${FONT}`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    for (const segment of this.picture.ribbons[along]) {
      const start = clamp(this.pixel(along, segment.start), low, high);
      const stop = clamp(this.pixel(along, segment.stop), low, high);
      if (stop - start < 0.5) continue;
      const [x, y, w, h] = upright
        ? [lay.left - thick - 3, start, thick, stop - start] : [start, lay.top - thick - 3, stop - start, thick];
      context.fillStyle = segment.missing ? this.pattern(context, "hole") : segment.fill;
      context.fillRect(x, y, Math.max(w - (upright ? 0 : 1), 0.5), Math.max(h - (upright ? 1 : 0), 0.5));
      if (segment.hatched && !segment.missing) this.hatch(context, segment.ink, [x, y, w, h]);
      const room = (upright ? thick : w) - 2;
      const text = [segment.text, segment.short].find((t) => context.measureText(t).width <= room);
      if (text === undefined || (upright && h < 9)) continue;
      if (segment.missing) {
        context.fillStyle = "#fff";
        const width = context.measureText(text).width + 6;
        context.fillRect(x + w / 2 - width / 2, y + h / 2 - 6, width, 12);
      }
      context.fillStyle = segment.missing ? "#111" : segment.ink;
      context.fillText(text, x + w / 2, y + h / 2 + 0.5);
    }
  }
  /** Stripes over a colour that has been used before. */
  hatch(context, ink, [x, y, w, h]) {
    context.save();
    context.beginPath();
    context.rect(x, y, w, h);
    context.clip();
    context.strokeStyle = ink;
    context.globalAlpha = 0.55;
    context.beginPath();
    for (let at = x - h; at < x + w; at += 6) {
      context.moveTo(at, y + h);
      context.lineTo(at + h, y);
    }
    context.stroke();
    context.restore();
  }
  labels(context, { ticks, labels, window: drawn } = this.picture) {
    const lay = this.layout;
    context.font = `11px ${FONT}`;
    context.fillStyle = this.ink;
    context.textBaseline = "middle";
    const right = lay.row_label_space - 6;
    for (const at of ticks.rows) {
      const y = this.pixel("rows", at + 0.5);
      if (y < lay.top || y > lay.top + lay.map_height) continue;
      context.textAlign = "right";
      context.globalAlpha = 0.8;
      context.fillText(String(at), right, y);
      context.globalAlpha = 1;
      if (!labels.rows) continue;
      context.textAlign = "left";
      const room = right - context.measureText(String(drawn.rows[1])).width - 8;
      context.fillText(this.fit(context, labels.rows[at - drawn.rows[0]], room), 0, y);
    }
    context.textAlign = "center";
    context.textBaseline = "top";
    context.globalAlpha = 0.8;
    for (const at of ticks.cols) {
      const x = this.pixel("cols", at + 0.5);
      if (x >= lay.left && x <= lay.left + lay.map_width) {
        context.fillText(String(at), x, lay.top + lay.map_height + 5);
      }
    }
    context.globalAlpha = 1;
    const per = lay.map_width / (this.window.cols[1] - this.window.cols[0]);
    if (!labels.cols || !lay.col_label_space || per < 11) return;
    context.textAlign = "left";
    context.textBaseline = "middle";
    labels.cols.forEach((label, i) => {
      const x = this.pixel("cols", drawn.cols[0] + i + 0.5);
      if (x < lay.left || x > lay.left + lay.map_width) return;
      context.save();
      context.translate(x, lay.col_label_space - 3);
      context.rotate(-Math.PI / 2);
      context.fillText(this.fit(context, label, lay.col_label_space - 6), 0, 0);
      context.restore();
    });
  }
  fit(context, text, room) {
    if (context.measureText(text).width <= room) return text;
    const letters = [...text];
    while (letters.length && context.measureText(letters.join("") + "…").width > room) letters.pop();
    return letters.join("") + "…";
  }
}
