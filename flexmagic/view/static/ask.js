// The live view of one tensor. It holds no data: it asks Python for what is looked at, paints the
// one byte per cell that comes back, and says what Python says about it. All text is set as text,
// never as markup, because tokens and names are hostile.

const FIRST_MS = 250, FIRST_TRIES = 3, LATE_MS = 1500, LOST_MS = 10000, GROWING_MS = 200;
const FOCUSED = ["button", "input", "select", "summary"];

/** Make an element; `on…` attributes are listeners, children are elements or text. */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null) node.setAttribute(name, value);
  }
  // The notebook's own shortcuts (arrows leave the cell, 0 0 restarts a kernel) must not fire from within;
  // JupyterLab looks for this on what has the focus itself.
  if (FOCUSED.includes(tag) || "tabindex" in attributes) node.dataset.lmSuppressShortcuts = "true";
  node.append(...children);
  return node;
}

const clamp = (x, low, high) => Math.min(Math.max(x, low), high);

/** Ask Python one question of each kind at a time; of those that pile up only the last is sent. */
class Asker {
  constructor(model, answered, late, ended) {
    this.model = model;
    this.view = Math.random().toString(36).slice(2) + Date.now().toString(36);
    this.count = 0;
    this.tries = 0;
    this.heard = false;
    this.answered = answered;
    this.late = late;
    this.ended = ended;
    this.open = { look: {}, probe: {}, table: {}, check: {} };
    this.receive = this.receive.bind(this);
    model.on("msg:custom", this.receive);
  }
  ask(kind, question) {
    const slot = this.open[kind];
    slot.next = question;
    // A question that was lost (a kernel that restarted) must not block all others for ever.
    if (!slot.id || performance.now() - slot.sent > LOST_MS) this.send(kind);
  }
  waits(kind) {
    return Boolean(this.open[kind].id);
  }
  send(kind) {
    const slot = this.open[kind];
    clearTimeout(slot.timer);
    const question = slot.next;
    Object.assign(slot, { id: ++this.count, sent: performance.now(), next: null });
    // A page's very first question may go out before the notebook has opened the way that stays
    // free while a cell runs; then it waits for that cell, so it is asked again.
    const again = !this.heard && this.tries < FIRST_TRIES;
    slot.timer = setTimeout(() => {
      if (!again) return this.late(kind);
      this.tries += 1;
      slot.next ??= question;
      return this.send(kind);
    }, again ? FIRST_MS * 2 ** this.tries : LATE_MS);
    this.model.send({ ...question, kind, view: this.view, id: slot.id });
  }
  receive(message, buffers) {
    if (message.kind === "ended") return this.ended(message.ranks); // nobody asked, and it is for all views
    const slot = message.view === this.view ? this.open[message.asked] : undefined;
    if (!slot || message.id !== slot.id) return undefined; // another view's, or too late
    clearTimeout(slot.timer);
    this.heard = true;
    slot.id = 0;
    if (slot.next) this.send(message.asked);
    return this.answered(message, buffers);
  }
  close() {
    this.model.off("msg:custom", this.receive);
    for (const slot of Object.values(this.open)) clearTimeout(slot.timer);
  }
}

/** Hide the static picture beside a live view, wherever the notebook keeps it, and keep it hidden. */
class StaticTwin {
  constructor(el, key) {
    this.el = el;
    this.key = key;
    this.observer = new MutationObserver(() => this.hide());
  }
  /** The outputs between this view's own and the picture that carries its key, or none. */
  find() {
    const own = this.el.closest(".jp-OutputArea-child, .output_area, .output_container");
    const found = [];
    let next = own && own.nextElementSibling;
    for (let i = 0; this.key && next && i < 4; i++, next = next.nextElementSibling) {
      found.push(next);
      const image = next.querySelector("img[src^='data:image/png;base64,']");
      if (image && atob(image.src.slice(22, 22 + 1200)).includes(this.key)) return found;
    }
    return [];
  }
  hide() {
    for (const node of this.find()) if (node.style.display !== "none") node.style.display = "none";
    const own = this.el.closest(".jp-OutputArea-child, .output_area, .output_container");
    if (own && own.parentNode && !this.watched) {
      this.watched = own.parentNode;
      this.observer.observe(this.watched, { childList: true, subtree: true });
    }
  }
  close() {
    this.observer.disconnect();
  }
}
