// The panel of a workshop's owner: who is there, what waits, what was taken, what failed; and buttons.

const EVERY_MS = 2000;

/** One guest's row, whose cells change in place so that the focus stays where it is. */
class Row {
  constructor(name, act, say) {
    this.name = name;
    this.cells = [];
    this.sure = false;
    this.drop = make("button", { type: "button", onclick: () => this.press(act, say), onblur: () => this.reset() });
    this.node = make("tr", {});
    this.reset();
  }
  reset() {
    this.sure = false;
    this.drop.textContent = "Drop";
    this.drop.setAttribute("aria-label", `Drop ${this.name}`);
  }
  press(act, say) {
    if (this.sure) return act("drop", this.name);
    this.sure = true;
    this.drop.textContent = "Drop for good?";
    this.drop.setAttribute("aria-label", `Drop ${this.name} for good: hooks and runs go too`);
    return say(`Press again to drop ${this.name}: hooks and runs go too.`);
  }
  show(texts) {
    if (this.cells.length !== texts.length) {
      this.cells = texts.map((_, i) => make(i ? "td" : "th", i ? {} : { scope: "row" }));
      this.node.replaceChildren(...this.cells, make("td", {}, this.drop));
    }
    texts.forEach((text, i) => { if (this.cells[i].textContent !== text) this.cells[i].textContent = text; });
  }
}

class Panel {
  constructor(model, el) {
    this.rows = new Map();
    this.board = new Board(model, el, EVERY_MS, (state) => this.show(state));
    const act = (...what) => this.board.act(...what);
    const button = (text, action, tip) => make("button", { type: "button", title: tip, onclick: action }, text);
    this.title = make("div", { class: "fxm-title" });
    this.state = make("span", { class: "fxm-badge" });
    this.alarm = make("div", { class: "fxm-alarm", role: "alert" });
    this.lines = make("div", { class: "fxm-join" });
    this.pause = button("Pause", () => act("pause"), "Begin no more runs");
    this.resume = button("Resume", () => act("resume"), "Go on with runs");
    this.head = make("tr", {});
    this.body = make("tbody", {});
    this.nobody = make("div", { class: "fxm-soft" }, "Nobody has joined yet.");
    this.limits = make("div", { class: "fxm-soft" });
    const field = (name, hint) => make("input", { type: "text", "aria-label": name, placeholder: hint, spellcheck: "false" });
    this.limit = field("Limits to change", "runs=20 captured=64MB");
    this.hook = make("select", { "aria-label": "Hook to send" });
    this.shown = field("Activation to show", 'run["model.layers.3.mlp"]');
    this.site = field("Site to collect", "model.layers.3.mlp");
    const stats = ["mean", "std", "norm", "rms", "min", "max", "zeros", "nan", "n"];
    this.stat = make("select", { "aria-label": "Statistic" }, ...stats.map((name) => make("option", {}, name)));
    this.collected = make("div", { class: "fxm-collected" });
    this.sent = make("div", { class: "fxm-soft" });
    const line = (text, ...rest) => make("div", { class: "fxm-row" }, make("span", { class: "fxm-what" }, text), ...rest);
    const form = (text, does, action, ...inputs) => {
      const press = button(text, action, does);
      for (const input of inputs) input.addEventListener("keydown", (event) => event.key === "Enter" && input.tagName === "INPUT" && action());
      return [...inputs, press];
    };
    this.root = make("section", { class: "fxm-workshop", "aria-label": "Workshop" },
      make("div", { class: "fxm-row" }, this.title, this.state, this.pause, this.resume), this.alarm, this.lines,
      make("div", { class: "fxm-wide" }, make("table", { "aria-label": "Guests" }, make("thead", {}, this.head), this.body)), this.nobody,
      line("Limits of each", ...form("Change limits", "From now on, for every guest", () => act("limit", this.limit.value), this.limit)), this.limits,
      line("Send a hook", ...form("Send to everyone", "Every guest may take it as a cell of their own", () => act("send", this.hook.value), this.hook)),
      line("Show a view", ...form("Show to everyone", "Guests look at this activation, read-only", () => act("show", this.shown.value), this.shown)),
      line("Collect", ...form("Collect from all", "One statistic of each guest's last run", () => act("collect", this.site.value, this.stat.value), this.site, this.stat)),
      this.collected, this.sent, this.board.said, this.board.late);
    el.append(this.root);
  }
  show(state) {
    this.title.textContent = state.title;
    this.state.textContent = state.state;
    this.state.dataset.state = state.state;
    this.alarm.textContent = state.alarm;
    const closed = state.state === "closed";
    for (const node of this.root.querySelectorAll("button, input, select")) node.disabled = closed;
    this.swap(state.state);
    this.join(state.lines);
    this.limits.textContent = `Now: ${state.limits}`;
    this.guests(state);
    this.options(state.hooks);
    this.collect(state.collected);
    this.sent.textContent = state.sent.length ? `Sent so far: ${state.sent.join(" ")}` : "";
  }
  /** Of Pause and Resume only one can be pressed; whoever pressed the other has the focus on it. */
  swap(now) {
    const had = [this.pause, this.resume].includes(document.activeElement);
    this.pause.disabled = now !== "open";
    this.resume.disabled = now !== "paused";
    const left = now === "open" ? this.pause : this.resume;
    if (had && !left.disabled) left.focus();
  }
  join(lines) {
    const key = JSON.stringify(lines);
    if (this.joined === key) return;
    this.joined = key;
    const texts = lines.filter(([, text]) => text).map(([name, text]) =>
      make("div", {}, name ? `${name}: ` : "For the guests: ", make("code", {}, text)));
    this.lines.replaceChildren(...(texts.length > 2
      ? [make("details", {}, make("summary", {}, `The lines of ${texts.length} guests, each for one alone`), ...texts)] : texts));
  }
  guests({ columns, rows, names }) {
    const heads = [...columns, ""];
    if (this.head.children.length !== heads.length) {
      this.head.replaceChildren(...heads.map((text) => make("th", { scope: "col" }, text)));
    }
    for (const [name, row] of this.rows) {
      if (!names.includes(name)) { row.node.remove(); this.rows.delete(name); }
    }
    names.forEach((name, i) => {
      if (!this.rows.has(name)) {
        const row = new Row(name, (...what) => this.board.act(...what), (text) => this.board.say(text));
        this.rows.set(name, row);
        this.body.append(row.node);
      }
      this.rows.get(name).show(rows[i]);
    });
    this.nobody.hidden = names.length > 0;
    this.head.parentNode.parentNode.hidden = names.length === 0;
  }
  options(names) {
    const now = [...this.hook.options].map((option) => option.value);
    if (JSON.stringify(now) === JSON.stringify(names) && now.length) return;
    const value = this.hook.value;
    this.hook.replaceChildren(...(names.length ? names.map((name) => make("option", { value: name }, name))
      : [make("option", { value: "" }, "no hooks yet")]));
    if (names.includes(value)) this.hook.value = value;
  }
  collect(found) {
    const key = JSON.stringify(found);
    if (this.found === key) return;
    this.found = key;
    this.collected.replaceChildren(...(found ? [make("div", {}, found.title), tableOf(found)] : []));
  }
}

function render({ model, el }) {
  const panel = new Panel(model, el);
  return () => panel.board.close();
}

export default { render };
