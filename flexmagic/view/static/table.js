// Part of the live view: joined with its neighbours into one ES module, ask first and view last.

/** Statistics by rank and of the whole, asked for when somebody opens it. */
class RankTable {
  constructor(ask) {
    this.box = make("div", { class: "fxm-table" });
    this.node = make("details", { ontoggle: () => this.node.open && ask() },
      make("summary", {}, "Statistics and histograms by rank"), this.box);
  }
  get open() { return this.node.open; }
  show({ head, rows, notes }) {
    const line = ([cells, counts]) => make("tr", {},
      ...cells.map((text, i) => make(i ? "td" : "th", i ? {} : { scope: "row" }, text)),
      make("td", {}, this.histogram(counts)));
    this.box.replaceChildren(
      make("table", {}, make("thead", {}, make("tr", {},
        ...[...(head ?? []), "histogram"].map((text) => make("th", { scope: "col" }, text)))),
      make("tbody", {}, ...rows.map(line))),
      ...notes.map((text) => make("p", {}, text)));
  }
  /** Bars of equal width, the highest full; what is not zero can be seen. */
  histogram(counts) {
    const most = Math.max(...counts, 1);
    const bars = counts.map((count, i) => {
      const bar = make("span", { title: `bin ${i}: ${count}` });
      bar.style.height = count ? `${Math.max((100 * count) / most, 6)}%` : "0";
      return bar;
    });
    const text = `histogram, the highest of ${counts.length} bins has ${most}`;
    return make("span", { class: "fxm-bars", role: "img", "aria-label": text }, ...bars);
  }
}
