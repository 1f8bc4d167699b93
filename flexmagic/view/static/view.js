// Part of the live view: joined with its neighbours into one ES module, ask first and view last.

/** The controls, the canvas and the words around it; turns what a person does into questions. */
class View {
  constructor(model, el) {
    this.el = el;
    this.state = { fixed: {}, reducer: "extremum", scale: "linear" };
    this.twin = new StaticTwin(el, model.get("picture_key"));
    this.panes = [];
    this.active = 0;
    this.build();
    this.asker = new Asker(model, (m, b) => this.answered(m, b), (kind) => this.late(kind), (ranks) => this.ended(ranks));
    this.resized = new ResizeObserver(() => this.room() !== this.asked && this.look());
    this.resized.observe(el);
    this.themed = new MutationObserver(() => this.paint());
    this.themed.observe(document.body, { attributes: true });
    this.dark = matchMedia("(prefers-color-scheme: dark)");
    this.repaint = () => this.paint();
    this.dark.addEventListener("change", this.repaint);
    this.look();
  }
  close() {
    clearTimeout(this.growing);
    this.asker.close();
    this.twin.close();
    this.resized.disconnect();
    this.themed.disconnect();
    this.dark.removeEventListener("change", this.repaint);
  }

  // --- what stands on the page

  build() {
    const button = (text, label, click) =>
      make("button", { type: "button", "aria-label": label, title: label, onclick: click }, text);
    this.title = make("span", { class: "fxm-site" });
    this.facts = make("ul", { class: "fxm-facts" });
    this.notes = make("div", { class: "fxm-notes" });
    this.choices = make("span", { class: "fxm-choices" });
    this.hold = make("input", { type: "checkbox", onchange: () => this.holdLimits() });
    this.pageText = make("span", {});
    this.pages = make("span", { class: "fxm-zoom", role: "group", "aria-label": "Pages" },
      button("‹", "Earlier ones", () => this.page(-1)), this.pageText, button("›", "Later ones", () => this.page(1)));
    this.bar = make("div", { class: "fxm-bar" }, this.choices,
      make("label", { title: "Keep the present colour limits" }, this.hold, " hold limits"),
      make("span", { class: "fxm-zoom", role: "group", "aria-label": "Zoom" },
        button("−", "Zoom out", () => this.zoom(2)), button("+", "Zoom in", () => this.zoom(0.5)),
        button("Whole", "Show all of it", () => this.whole())), this.pages);
    this.stage = make("div", { class: "fxm-stage" });
    this.read = make("div", { class: "fxm-read", role: "status", "aria-live": "polite" });
    this.legend = make("div", { class: "fxm-legend" });
    this.caption = make("div", { class: "fxm-caption" });
    this.owners = make("ul");
    this.owned = make("details", {}, make("summary", {}, "Who owns what"), this.owners);
    this.stats = make("div", { class: "fxm-stats" });
    this.error = make("div", { class: "fxm-error", role: "alert" });
    this.again = button("Try again", "Ask once more", () => this.look());
    this.status = make("div", { class: "fxm-status", role: "status" });
    this.table = new RankTable(() => this.asker.ask("table", { layer: this.state.layer, step: this.state.step, part: this.state.part }));
    this.help = make("div", { class: "fxm-help" });
    this.body = make("div", { class: "fxm-body" }, this.bar, this.stage, this.read, this.legend, this.caption,
      this.owned, this.table.node, this.help);
    this.root = make("section", { class: "fxm" },
      make("header", {}, this.title, this.facts), this.notes, this.stats, this.error, this.body, this.status);
    this.root.hidden = true;
    this.el.append(this.root);
  }
  get pane() { return this.panes[this.active]; }
  get picture() { return this.pane?.picture; }
  get painter() { return this.pane.painter; }
  /** Make as many places for pictures as there are; those that stay keep their focus. */
  arrange(count) {
    while (this.panes.length > count) this.panes.pop().node.remove();
    while (this.panes.length < count) {
      this.panes.push(new Pane(this, this.panes.length));
      this.stage.append(this.panes.at(-1).node);
    }
    this.active = Math.min(this.active, count - 1);
    for (const pane of this.panes) pane.canvas.tabIndex = pane.index === this.active ? 0 : -1;
  }
  activate(pane) {
    if (this.active === pane.index) return;
    this.active = pane.index;
    for (const other of this.panes) other.canvas.tabIndex = other === pane ? 0 : -1;
  }
  room() {
    return Math.floor(this.el.getBoundingClientRect().width) - 26;
  }

  // --- questions and answers

  look() {
    const width = this.room();
    this.asked = width;
    this.asker.ask("look", { ...this.state, width: width > 0 ? width : 800 });
  }
  /** Ranks have ended: look again, if this shows something of theirs or is not known yet to show nothing. */
  ended(ranks) {
    const shown = this.message?.ranks;
    if (!shown || this.asker.waits("look") || ranks.some((rank) => shown.includes(rank))) this.look();
  }
  late(kind) {
    if (kind !== "look") return;
    if (!this.picture && this.twin.find().length) return; // the static picture stands in
    this.root.hidden = false;
    this.status.textContent = "Waiting for the kernel: it is busy, or not running.";
  }
  answered(message, buffers) {
    this.status.textContent = "";
    if (message.kind === "probe") return this.said(message);
    if (message.kind === "check") return this.warn(message.warnings);
    if (message.asked === "table") {
      this.table.show(message.kind === "table" ? message : { rows: [], notes: [message.text] });
      return undefined;
    }
    if (message.asked === "check") return undefined; // its sentence comes with the next look
    this.root.hidden = false;
    this.error.replaceChildren();
    if (message.kind === "error") {
      this.error.append(message.text, this.again);
      this.title.textContent ||= message.title;
      this.body.hidden = !this.picture;
      return undefined;
    }
    this.twin.hide();
    if (message.growing) this.growing = setTimeout(() => this.look(), GROWING_MS);
    this.header(message);
    const nothing = message.empty ?? null;
    this.body.classList.toggle("fxm-nothing", nothing !== null);
    if (nothing !== null) {
      this.status.textContent = nothing;
      this.controls(message); // the way back to what can be drawn
      this.message = null;
      this.root.dataset.look = String(message.id);
      this.body.hidden = !this.choices.children.length;
      return undefined;
    }
    this.body.hidden = false;
    this.take(message, buffers);
    return undefined;
  }
  take(message, buffers) {
    const bytes = (view) => new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
    const wish = this.panes.length && this.picture ? this.painter.window : null;
    const before = this.message;
    this.message = message;
    this.arrange(message.panes.length);
    const spoken = `${message.title}: ${message.caption.join(" ")}`;
    message.panes.forEach((picture, i) =>
      this.panes[i].take(picture, bytes(buffers[2 * i]), new Uint8Array(bytes(buffers[2 * i + 1])), spoken));
    if (this.asker.waits("look")) {
      // A later question is on its way: do not jump back to this one while somebody pans or zooms.
      const same = ["layer", "step", "part", "rows", "cols"].every((name) => this.state[name] === message[name]);
      if (same && this.state.row_window && wish) for (const pane of this.panes) pane.painter.window = wish;
    } else {
      const { layer, step, part, rows, cols, fixed, facet, first } = message, { window: shown } = this.picture;
      // All of it is no window: pictures side by side may be of different size.
      const [row_window, col_window] = ["rows", "cols"].map((along, n) =>
        (shown[along][0] === 0 && shown[along][1] === this.picture.extent[n] ? null : shown[along]));
      Object.assign(this.state, { layer, step, part, rows, cols, fixed, facet, first, row_window, col_window });
    }
    this.controls(message);
    this.colorBar();
    this.caption.replaceChildren(...message.caption.map((text) => make("p", {}, text)));
    this.bar.classList.toggle("fxm-single", this.picture.number !== null);
    this.say(this.panes.length > 1 ? " [ and ] go from picture to picture." : "");
    if (this.cursor) this.move(this.cursor.at);
    else this.paint();
    const { layer, step, part } = message, other = before?.layer !== layer || before?.step !== step;
    // What the table says is of other ranks or values when the header says something else.
    const about = JSON.stringify([message.facts.slice(0, -1), message.stats, message.warnings]);
    if ((other || before?.part !== part || about !== this.about) && this.table.open) this.asker.ask("table", { layer, step, part });
    this.about = about;
    if (message.replicas && other) this.asker.ask("check", { layer, step });
    // Facts about the geometry, for whoever tests or scripts the page.
    this.root.dataset.map = JSON.stringify(this.panes[0].picture.layout);
    this.root.dataset.window = JSON.stringify(this.panes[0].picture.window);
    this.root.dataset.cells = JSON.stringify(this.panes[0].picture.cells);
    this.root.dataset.look = String(message.id);
  }
  say(more) {
    this.help.textContent = "Click the map, then: arrows read, + and − or the wheel zoom, "
      + `Shift+arrows or dragging pan, 0 shows all.${more}`;
  }
  warn(warnings) {
    this.found = warnings;
    this.notes.append(...warnings.map((text) => make("p", { role: "note" }, text)));
  }
  header(message) {
    this.title.textContent = message.title;
    this.facts.replaceChildren(...message.facts.map((text) => make("li", {}, text)));
    if (this.message?.layer !== message.layer || this.message?.step !== message.step) this.found = [];
    this.notes.replaceChildren(...[...message.warnings, ...(this.found ?? [])].map((text) => make("p", { role: "note" }, text)));
    this.owned.hidden = !message.owners.length;
    this.owners.replaceChildren(...message.owners.map((text) => make("li", {}, text)));
    const marked = new Set(["NaN", "+Inf", "-Inf"]);
    this.stats.replaceChildren(...message.stats.map(([name, text]) =>
      make("span", { class: marked.has(name) && text !== "0" ? "fxm-odd" : null }, make("span", {}, `${name} `), text)));
  }
  /** Bring the controls to what an answer says, which has no `panes` where there is nothing to draw. */
  controls(p) {
    const signature = JSON.stringify([p.layers, p.steps, p.parts, p.dims, p.rows, p.cols, p.exact, p.facet]);
    if (signature !== this.signature) {
      this.signature = signature;
      const { name, dim } = this.choices.contains(document.activeElement) ? document.activeElement.dataset : {};
      this.choices.replaceChildren(...this.makeControls(p));
      // Whoever works by keyboard stays where they are.
      if (name ?? dim) this.choices.querySelector(name ? `[data-name='${name}']` : `[data-dim='${dim}']`)?.focus();
    }
    for (const input of this.choices.querySelectorAll("[data-dim]")) {
      if (input !== document.activeElement) input.value = p.fixed[input.dataset.dim];
    }
    const set = (name, value) => {
      const select = this.choices.querySelector(`[data-name='${name}']`);
      if (select) select.value = String(value);
    };
    set("layer", p.layer);
    set("step", p.step);
    set("part", p.part);
    if (!p.panes) return;
    set("facet", p.facet);
    this.pages.hidden = p.count <= p.panes.length;
    this.pageText.textContent = ` ${p.first}–${p.first + p.panes.length - 1} of ${p.count} `;
    set("rows", p.rows);
    set("cols", p.cols);
    set("reducer", p.exact ? "1:1" : this.state.reducer);
    set("scale", this.state.scale);
  }
  makeControls(p) {
    const select = (name, text, options, change) => make("label", {}, `${text} `,
      make("select", { "data-name": name, onchange: (e) => change(e.target.value) },
        ...options.map(([value, shown]) => make("option", { value }, shown))));
    const dims = p.dims.map((dim, i) => [i, `${dim.name} (${dim.size})`]);
    const nodes = [];
    for (const [name, texts] of [["layer", p.layers], ["step", p.steps]]) {
      if (texts.length < 2) continue;
      nodes.push(select(name, name, texts.map((text, i) => [i, text]), (v) => this.change({ [name]: Number(v) })));
    }
    const form = p.panes?.[0].form, map = form === "map";
    if (p.dims.length > 1 && map) {
      nodes.push(select("rows", "rows", dims, (v) => this.turn("rows", Number(v))),
        select("cols", "columns", dims, (v) => this.turn("cols", Number(v))));
    }
    if (p.parts.length > 1) {
      nodes.push(select("part", "show", p.parts, (v) => this.change({ part: Number(v) })));
    }
    if (!p.panes) return nodes;
    if (p.facets.length > 1) {
      nodes.push(select("facet", "side by side", p.facets, (v) => this.change({ facet: Number(v), first: 0 }, false)));
    }
    for (const d of Object.keys(p.fixed)) {
      const last = p.dims[d].size - 1;
      if (last === 0 || Number(d) === p.facet) continue; // nothing to choose; the caption says where one stands
      nodes.push(make("label", {}, `${p.dims[d].name} `, make("input", {
        type: "number", min: 0, max: last, "data-dim": d, "aria-description": `0 to ${last}`,
        onchange: (e) => this.fix(d, clamp(Math.trunc(Number(e.target.value)) || 0, 0, last)),
      }), ` of ${last + 1}`));
    }
    if (p.panes[0].number !== null) return nodes;
    const named = { extremum: "signed extremum", mean: "mean", rms: "rms" };
    const reducers = p.exact ? [["1:1", "none (1:1)"]] : p.reducers.map((r) => [r, named[r]]);
    const reducer = select("reducer", "overview by", reducers, (v) => this.change({ reducer: v }, false));
    reducer.lastChild.disabled = p.exact; // every value has a cell of its own, and nothing is reduced
    if (map || !p.exact) nodes.push(reducer);
    if (form !== "lines") nodes.push(select("scale", "scale", p.scales.map((s) => [s, s]), (v) => this.change({ scale: v }, false)));
    return nodes;
  }
  colorBar() {
    this.legend.hidden = this.picture.form === "lines";
    const swatch = (color) => {
      const node = make("span", { class: "fxm-swatch" });
      node.style.background = color;
      return node;
    };
    const scale = ([{ painter, picture }], text) => {
      const stops = [];
      for (let i = 0; i <= 16; i++) stops.push(painter.color(Math.round(FIRST + ((LAST - FIRST) * i) / 16)));
      const ramp = make("div", { class: "fxm-ramp" });
      ramp.style.background = `linear-gradient(to right, ${stops.join(",")})`;
      return make("div", { class: "fxm-scale" }, ...(text ? [make("div", {}, text)] : []),
        make("div", { class: "fxm-line" }, swatch(painter.color(UNDER)), ramp, swatch(painter.color(OVER))),
        make("div", { class: "fxm-numbers" }, ...picture.bar.map(([, text]) => make("span", {}, text))));
    };
    const stripes = (angle, a, b, width) =>
      `repeating-linear-gradient(${angle}deg, ${a} 0 ${width}px, ${b} ${width}px ${2 * width}px)`;
    const key = (color, text) => make("span", { class: "fxm-key" }, swatch(color), text);
    const colors = this.painter;
    const bars = new Map();
    for (const pane of this.panes) {
      const numbers = JSON.stringify(pane.picture.bar);
      bars.set(numbers, [...(bars.get(numbers) ?? []), pane]);
    }
    const names = (panes) => panes.map((pane) => pane.picture.title).join(" and ");
    this.legend.replaceChildren(
      ...[...bars.values()].map((panes) => scale(panes, bars.size > 1 ? names(panes) : "")),
      make("span", { class: "fxm-keys" },
        make("span", { class: "fxm-key" }, "ends: clipped"),
        key(stripes(135, "#000", "rgb(255,221,51)", 2), "NaN"),
        key(stripes(90, colors.color(POSINF), "#fff", 2), "+Inf"),
        key(stripes(0, colors.color(NEGINF), "#fff", 2), "-Inf"),
        key(`radial-gradient(circle at 3px 3px, rgb(150,150,158) 1.2px, ${colors.color(MASKED)} 1.5px) 0 0 / 6px 6px`, "masked"),
        key(stripes(135, "rgb(186,186,186)", "rgb(110,110,110)", 3), "missing")));
  }
  paint() {
    for (const pane of this.panes) pane.paint(this.cursor?.at, document.activeElement === pane.target);
  }

  // --- what a person changes

  change(part, afresh = true) {
    Object.assign(this.state, part);
    if (afresh) Object.assign(this.state, { row_window: null, col_window: null });
    this.look();
  }
  turn(which, dim) {
    const other = which === "rows" ? "cols" : "rows";
    const part = { [which]: dim };
    if (this.state[other] === dim) part[other] = this.state[which];
    this.change(part);
  }
  fix(dim, at) {
    this.change({ fixed: { ...this.state.fixed, [dim]: at } }, false);
  }
  page(by) {
    const last = Math.max(this.message.count - 1, 0), size = this.message.panes.length;
    this.change({ first: clamp(this.message.first + by * size, 0, last) }, false);
  }
  holdLimits() {
    this.change({ limits: this.hold.checked ? this.message.limits : null }, false);
  }
  whole() {
    this.setWindow([0, this.picture.extent[0]], [0, this.picture.extent[1]]);
  }
  /** Zoom around the cursor (or the middle): first along the dim whose cells are the smaller. */
  zoom(factor) {
    const lay = this.picture.layout, shown = this.painter.window;
    const wide = lay.map_width / (shown.cols[1] - shown.cols[0]);
    const tall = lay.map_height / (shown.rows[1] - shown.rows[0]);
    const only = factor < 1 && wide < 0.8 * tall ? "cols" : factor < 1 && tall < 0.8 * wide ? "rows" : null;
    const next = {};
    for (const [along, n] of [["rows", 0], ["cols", 1]]) {
      const [start, stop] = shown[along], whole = this.picture.extent[n];
      const at = this.cursor ? clamp(this.cursor.at[along], start, stop) : (start + stop) / 2;
      const size = only && only !== along ? stop - start : clamp(Math.round((stop - start) * factor), Math.min(4, whole), whole);
      const from = clamp(Math.round(at - ((at - start) / (stop - start)) * size), 0, whole - size);
      next[along] = [from, from + size];
    }
    this.setWindow(next.rows, next.cols);
  }
  pan(rows, cols) {
    const next = {};
    for (const [along, n, by] of [["rows", 0, rows], ["cols", 1, cols]]) {
      const [start, stop] = this.painter.window[along], size = stop - start;
      const from = clamp(Math.round(start + by), 0, Math.max(this.picture.extent[n] - size, 0));
      next[along] = [from, from + size];
    }
    this.setWindow(next.rows, next.cols);
  }
  /** Show another part: at once from what is here, and properly when the answer comes. */
  setWindow(rows, cols) {
    const shown = this.painter.window;
    if (String([rows, cols]) === String([shown.rows, shown.cols])) return;
    for (const pane of this.panes) pane.painter.window = { rows, cols };
    this.paint();
    this.change({ row_window: rows, col_window: cols }, false);
  }

  // --- pointer and keys

  point(event, pane) {
    this.activate(pane);
    const x = clamp(event.offsetX, this.picture.layout.left, this.picture.layout.left + this.picture.layout.map_width - 0.01);
    const y = clamp(event.offsetY, this.picture.layout.top, this.picture.layout.top + this.picture.layout.map_height - 0.01);
    const rows = this.painter.nearest ? this.painter.nearest(x, y) : this.painter.position("rows", y);
    this.move({ rows, cols: this.painter.position("cols", x) });
  }
  inside(event, pane) {
    const lay = pane.picture.layout;
    return event.offsetX >= lay.left && event.offsetX < lay.left + lay.map_width
      && event.offsetY >= lay.top && event.offsetY < lay.top + lay.map_height;
  }
  hover(event, pane) {
    if (this.held) {
      const { x, y, window: from } = this.held, lay = this.picture.layout;
      this.painter.window = from;
      const cols = ((x - event.offsetX) / lay.map_width) * (from.cols[1] - from.cols[0]);
      const rows = ((y - event.offsetY) / lay.map_height) * (from.rows[1] - from.rows[0]);
      this.pan(rows, cols);
    } else if (this.inside(event, pane)) this.point(event, pane);
  }
  grab(event, pane) {
    if (!this.inside(event, pane)) return;
    this.activate(pane);
    this.held = { x: event.offsetX, y: event.offsetY, window: { ...this.painter.window } };
    pane.canvas.setPointerCapture(event.pointerId);
  }
  release(event, pane) {
    this.held = null;
    pane.canvas.releasePointerCapture(event.pointerId);
  }
  leave() {
    if (document.activeElement === this.pane.target) return;
    this.cursor = null;
    this.paint();
  }
  focus(pane) {
    this.activate(pane);
    const shown = this.painter.window;
    if (!this.cursor) this.move({ rows: shown.rows[0] + 0.5, cols: shown.cols[0] + 0.5 });
    this.paint();
  }
  /** Put the cursor on the cell at a position, and ask what is there. */
  move(at, pane = this.pane) {
    this.activate(pane);
    const row = this.painter.cell("rows", at.rows), col = this.painter.cell("cols", at.cols);
    const [r, c] = [this.painter.span("rows", row), this.painter.span("cols", col)];
    this.cursor = { row, col, at: { rows: (r[0] + r[1]) / 2, cols: (c[0] + c[1]) / 2 } };
    this.paint();
    const asking = `${this.message.id} ${this.active} ${row} ${col}`;
    if (asking === this.asking) return;
    this.asking = asking;
    this.asker.ask("probe", { picture: this.message.id, pane: this.active, row, col });
  }
  said(message) {
    if (!message.text) return; // about a picture that is gone
    this.read.textContent = message.text;
    this.root.dataset.read = JSON.stringify([message.picture, message.row, message.col]);
  }
  wheel(event, pane) {
    // Without focus or Ctrl the wheel belongs to the page.
    if (!this.inside(event, pane) || !(event.ctrlKey || document.activeElement === pane.canvas)) return;
    const shown = this.painter.window, [rows, cols] = this.picture.extent;
    const all = shown.rows[1] - shown.rows[0] >= rows && shown.cols[1] - shown.cols[0] >= cols;
    if (event.deltaY > 0 && all) return;
    event.preventDefault();
    this.point(event, pane);
    this.zoom(event.deltaY < 0 ? 0.7 : 1 / 0.7);
  }
  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [-10, 0], PageDown: [10, 0] };
    const shown = this.painter.window;
    if (event.key in steps) {
      const [down, across] = steps[event.key];
      const far = (along) => (shown[along][1] - shown[along][0]) / 4;
      if (event.shiftKey) this.pan(down * Math.max(far("rows"), 1), across * Math.max(far("cols"), 1));
      else this.step(down, across);
    } else if (event.key === "Home" || event.key === "End") {
      const end = event.key === "Home" ? shown.cols[0] + 0.5 : shown.cols[1] - 0.5;
      this.move({ rows: this.cursor.at.rows, cols: end });
    } else if (event.key === "+" || event.key === "=") this.zoom(0.5);
    else if (event.key === "-" || event.key === "_") this.zoom(2);
    else if (event.key === "0") this.whole();
    else if (event.key === "[" || event.key === "]") this.next(event.key === "]" ? 1 : -1);
    else if (event.key === "Escape") this.pane.target.blur();
    else return;
    event.preventDefault();
    event.stopPropagation();
  }
  /** Go to another of the pictures, the cursor at the same place in it. */
  next(by) {
    const pane = this.panes[(this.active + by + this.panes.length) % this.panes.length];
    this.activate(pane);
    pane.target.focus();
    this.move(this.cursor.at, pane);
  }
  /** Move the cursor by cells; at the edge of what is shown, take the window along. */
  step(down, across) {
    const next = { ...this.cursor.at }, by = { rows: 0, cols: 0 };
    for (const [along, n, cells] of [["rows", 0, down], ["cols", 1, across]]) {
      const [start, stop] = this.painter.window[along];
      const one = (this.picture.window[along][1] - this.picture.window[along][0]) / this.picture.cells[n];
      next[along] = clamp(next[along] + cells * one, 0, this.picture.extent[n] - one / 2);
      if (cells && (next[along] < start || next[along] >= stop)) by[along] = Math.sign(cells) * Math.max((stop - start) / 4, 1);
    }
    if (by.rows || by.cols) {
      this.cursor.at = next;
      this.pan(by.rows, by.cols);
    } else this.move(next);
  }
}

function render({ model, el }) {
  const view = new View(model, el);
  return () => view.close();
}

export default { render };
