// Part of the live view: joined with its neighbours into one ES module, ask first and view last.

/** One of the pictures that stand side by side: a canvas, or coloured text, or a single number. */
class Pane {
  constructor(view, index) {
    this.view = view;
    this.index = index;
    const here = (does) => (event) => view.picture && does(event);
    this.canvas = make("canvas", {
      class: "fxm-canvas", tabindex: index ? "-1" : "0", role: "application", "aria-roledescription": "map of values",
      onkeydown: here((e) => view.key(e)), onwheel: here((e) => view.wheel(e, this)),
      onpointerdown: here((e) => view.grab(e, this)), onpointermove: here((e) => view.hover(e, this)),
      onpointerup: here((e) => view.release(e, this)), onpointerleave: here(() => view.leave()),
      ondblclick: here((e) => { view.point(e, this); view.zoom(0.5); }),
      onfocus: here(() => view.focus(this)), onblur: here(() => view.paint()),
    });
    this.strip = make("div", {
      class: "fxm-strip", tabindex: "0", role: "application", "aria-roledescription": "tokens with values",
      onkeydown: here((e) => view.key(e)), onfocus: here(() => view.focus(this)), onblur: here(() => view.paint()),
    });
    this.number = make("output", { class: "fxm-number" });
    this.title = make("figcaption", { class: "fxm-pane-title" });
    this.keys = make("div", { class: "fxm-legend" });
    this.node = make("figure", { class: "fxm-pane" }, this.title, this.canvas, this.strip, this.number, this.keys);
  }
  /** Show a picture. `spoken` is what a screen reader says of it. */
  take(picture, codes, palette, spoken) {
    this.picture = picture;
    const Kind = picture.form === "lines" ? LinePainter : Painter;
    if (!(this.painter instanceof Kind) || (Kind === Painter && this.painter instanceof LinePainter)) {
      this.painter = new Kind(this.canvas);
    }
    this.painter.load(picture, codes, palette);
    const single = picture.number !== null, strip = picture.form === "strip" && !single;
    this.title.textContent = picture.title;
    this.title.hidden = !picture.title;
    this.canvas.hidden = single || strip;
    this.strip.hidden = !strip;
    this.number.textContent = single ? picture.number : "";
    this.target.setAttribute("aria-label", `${picture.title} ${spoken}`.trim());
    if (strip) this.fill(picture);
    this.keys.replaceChildren(...(picture.curves?.names ?? []).map((name, i) => this.key(name, i)));
  }
  /** What gets the focus. */
  get target() {
    return this.picture?.form === "strip" ? this.strip : this.canvas;
  }
  key(name, i) {
    const { inks } = this.picture.curves, line = make("span", { class: "fxm-stroke" });
    line.style.borderTop = `3px ${i >= inks.length ? "dashed" : "solid"} ${inks[i % inks.length]}`;
    return make("span", { class: "fxm-key" }, line, name);
  }
  /** Text with a colour per token. */
  fill(picture) {
    const words = picture.labels.cols ?? [];
    this.strip.replaceChildren(...words.map((text, i) => {
      const code = this.painter.codes[i];
      const node = make("span", { class: "fxm-token", "data-at": i, onpointerenter: () => this.view.move({ rows: 0.5, cols: picture.window.cols[0] + i + 0.5 }, this) }, text);
      node.style.background = this.painter.color(code);
      node.style.color = this.painter.inkOn(code);
      const mark = { [MASKED]: "masked", [NAN]: "NaN", [POSINF]: "+Inf", [NEGINF]: "-Inf" }[code];
      if (mark) node.append(make("sub", {}, mark));
      return node;
    }));
  }
  /** Draw, with the cursor at a position if it lies in this picture. */
  paint(at, focused) {
    if (!this.picture || this.picture.number !== null) return;
    const cursor = at && { row: this.painter.cell("rows", at.rows), col: this.painter.cell("cols", at.cols), at };
    if (this.picture.form !== "strip") {
      this.painter.paint(cursor, focused);
      return;
    }
    [...this.strip.children].forEach((node, i) => node.classList.toggle("fxm-here", Boolean(cursor) && i === cursor.col));
  }
}
