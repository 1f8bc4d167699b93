// Part of the live view: joined with its neighbours into one ES module, ask first and view last.

/** Paints rows as lines over their columns: values upwards, one colour (and dash) per row. */
class LinePainter extends Painter {
  get low() { return this.picture.curves.low; }
  get high() { return this.picture.curves.high; }
  height(value) {
    const lay = this.layout;
    return lay.top + lay.map_height - ((value - this.low) / (this.high - this.low)) * lay.map_height;
  }
  value(row, col) {
    return this.picture.curves.values[row]?.[col] ?? null;
  }
  /** Of all rows that have a value at a pixel's column, the one whose line is nearest. */
  nearest(x, y) {
    const col = this.cell("cols", this.position("cols", x));
    const far = this.picture.curves.values.map((_, row) => {
      const value = this.value(row, col);
      return value === null ? Infinity : Math.abs(this.height(value) - y);
    });
    return Math.max(far.indexOf(Math.min(...far)), 0) + this.picture.window.rows[0] + 0.5;
  }
  map(context, cursor, focused) {
    const lay = this.layout, { values, inks } = this.picture.curves;
    context.save();
    context.beginPath();
    context.rect(lay.left, lay.top - 3, lay.map_width, lay.map_height + 6);
    context.clip();
    this.grid(context);
    values.forEach((row, r) => this.line(context, row, r, inks[r % inks.length], r >= inks.length));
    context.restore();
    if (!cursor) return;
    const at = this.pixel("cols", cursor.at.cols), value = this.value(cursor.row, cursor.col);
    context.strokeStyle = this.ink;
    context.globalAlpha = 0.5;
    context.strokeRect(at, lay.top, 0.01, lay.map_height);
    context.globalAlpha = 1;
    if (value !== null) this.dot(context, at, this.height(value), this.ink, focused ? 6 : 5);
  }
  line(context, row, r, ink, dashed) {
    context.strokeStyle = ink;
    context.lineWidth = 2;
    context.setLineDash(dashed ? [6, 4] : []);
    context.beginPath();
    let drawing = false;
    row.forEach((value, c) => {
      if (value === null) { drawing = false; return; }
      const x = this.middle(c), y = this.height(value);
      if (drawing) context.lineTo(x, y);
      else context.moveTo(x, y);
      drawing = true;
    });
    context.stroke();
    context.setLineDash([]);
    context.lineWidth = 1;
    const few = row.length * 12 < this.layout.map_width;
    row.forEach((value, c) => {
      const code = this.codes[r * this.picture.cells[1] + c];
      if (value !== null && (few || (row[c - 1] ?? null) === null)) this.dot(context, this.middle(c), this.height(value), ink, 3);
      if (code < NAN || code > NEGINF) return;
      context.fillStyle = this.pattern(context, code); // what is not finite has a mark at the edge
      context.fillRect(this.middle(c) - 4, this.layout.top + (code === NEGINF ? this.layout.map_height - 8 : 0), 8, 8);
    });
  }
  middle(col) {
    const [start, stop] = this.span("cols", col);
    return this.pixel("cols", (start + stop) / 2);
  }
  dot(context, x, y, ink, radius) {
    context.fillStyle = ink;
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
    context.fill();
  }
  grid(context) {
    context.fillStyle = this.ink;
    context.globalAlpha = 0.15;
    for (const [value] of this.picture.curves.ticks) context.fillRect(this.layout.left, Math.round(this.height(value)), this.layout.map_width, 1);
    context.globalAlpha = 1;
  }
  labels(context) {
    const lay = this.layout, { ticks, labels } = this.picture;
    super.labels(context, { ...this.picture, ticks: { rows: [], cols: ticks.cols }, labels: { rows: null, cols: labels.cols } });
    context.font = `11px ${FONT}`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    context.fillStyle = this.ink;
    for (const [value, text] of this.picture.curves.ticks) context.fillText(text, lay.left - 6, this.height(value));
  }
}
