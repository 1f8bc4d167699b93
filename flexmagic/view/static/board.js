// Part of a workshop's boards: joined with its neighbours into one ES module. All text is set as text,
// never as markup: names, errors and sites are hostile.

const LOST_MS = 10000, LATE_MS = 4000;

/** Make an element; `on…` attributes are listeners, children are elements or text. */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null) node.setAttribute(name, value);
  }
  // The notebook's own shortcuts must not fire from within; JupyterLab looks for this on what has the focus.
  if (["button", "input", "select", "summary"].includes(tag)) node.dataset.lmSuppressShortcuts = "true";
  node.append(...children);
  return node;
}

/** A table with heads, cells as text; bars are for the eye alone. */
function tableOf({ columns, rows, title }, label) {
  return make("table", { "aria-label": label || title },
    make("thead", {}, make("tr", {}, ...columns.map((text) => make("th", { scope: "col" }, text)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((text) => make("td", { "aria-hidden": text.startsWith("█") ? "true" : null }, text))))));
}

/** Asks Python now and every few seconds while the board is looked at, one question at a time. */
class Board {
  constructor(model, el, every, shown) {
    Object.assign(this, { model, el, every, shown, count: 0, asked: null, next: [], wait: every });
    this.key = model.get("still_key");
    this.said = make("div", { class: "fxm-said", role: "status", "aria-live": "polite" });
    this.late = make("div", { class: "fxm-late" });
    this.receive = (message) => this.answered(message);
    model.on("msg:custom", this.receive);
    this.timer = setInterval(() => this.tick(), 500);
    this.last = 0;
    this.look();
  }
  say(text) {
    if (this.said.textContent !== text) this.said.textContent = text;
    this.said.classList.toggle("fxm-said-something", Boolean(text));
  }
  look() { this.ask({ kind: "look" }); }
  act(action, ...values) { this.ask({ kind: "do", action, values }); }
  ask(question) {
    if (question.kind === "look" ? !this.asked : true) this.next.push(question);
    if (!this.asked) this.send();
  }
  send() {
    const question = this.next.shift();
    this.asked = { id: ++this.count, at: performance.now() };
    this.model.send({ ...question, id: `${this.key}${this.count}` });
  }
  tick() {
    const now = performance.now();
    if (this.asked && now - this.asked.at > LATE_MS && !this.late.textContent) {
      this.late.textContent = "No answer yet: what is shown may be old.";
    }
    if (this.asked && now - this.asked.at > LOST_MS) this.asked = null; // of a kernel that restarted
    if (this.next.length && !this.asked) return this.send();
    const seen = document.visibilityState === "visible" && this.el.offsetParent !== null;
    if (seen && !this.asked && now - this.last > this.wait) this.look();
    return undefined;
  }
  answered(message) {
    this.hide();
    if (message.id === `${this.key}${this.count}`) this.asked = null;
    this.last = performance.now();
    this.late.textContent = "";
    this.wait = message.failed ? 10 * this.every : message.state === "closed" ? Infinity : this.every;
    if (message.said || message.asked === "do" || message.failed) this.say(message.said);
    else if (this.failed) this.say("");
    this.failed = Boolean(message.failed);
    if (!message.failed) this.shown(message);
    if (this.next.length && !this.asked) this.send();
  }
  /** Hide the table that saved notebooks keep beside a board, while the board is live. */
  hide() {
    const own = this.el.closest(".jp-OutputArea-child, .output_area, .output_container");
    let next = own && own.nextElementSibling;
    for (let i = 0; next && i < 3; i++, next = next.nextElementSibling) {
      if (next.querySelector(`.flexmagic-still-${this.key}`) && next.style.display !== "none") next.style.display = "none";
    }
  }
  close() {
    clearInterval(this.timer);
    this.model.off("msg:custom", this.receive);
  }
}
