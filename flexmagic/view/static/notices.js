// What the owner of a workshop has sent, in a guest's notebook: it appears by itself, and nothing of it runs
// until the guest takes it as a cell and runs that.

const EVERY_MS = 4000;

function render({ model, el }) {
  const list = make("ul", { class: "fxm-notices", "aria-live": "polite", "aria-label": "From the owner" });
  const none = make("div", { class: "fxm-soft" }, "The owner has sent nothing yet.");
  let known = "";
  const board = new Board(model, el, EVERY_MS, ({ notices }) => {
    none.hidden = notices.length > 0;
    const now = JSON.stringify(notices);
    if (now === known) return;
    known = now;
    const there = new Set([...list.children].map((node) => node.dataset.number));
    const wanted = new Set(notices.map((one) => String(one.number)));
    for (const node of [...list.children]) if (!wanted.has(node.dataset.number)) node.remove();
    for (const one of notices) if (!there.has(String(one.number))) list.append(item(one));
  });
  const item = ({ number, said, cell, does, typed }) => {
    const take = async () => {
      const done = await insert(el, cell).catch(() => false);
      board.ask({ kind: "do", done: Boolean(done) });
    };
    const button = does ? [make("button", { type: "button", onclick: take, "aria-label": `${does}: ${said}` }, does)] : [];
    const code = does && !cell.startsWith("%flexworkshop") ? [make("details", {}, make("summary", {}, "The cell"), make("pre", {}, cell))] : [];
    return make("li", { "data-number": number }, said, " ", ...button, " ",
      make("span", { class: "fxm-soft" }, typed), ...code);
  };
  el.append(make("section", { class: "fxm-workshop", "aria-label": "From the owner of the workshop" },
    make("div", { class: "fxm-title" }, "From the owner of the workshop"), none, list, board.said, board.late));
  return () => board.close();
}

export default { render };
