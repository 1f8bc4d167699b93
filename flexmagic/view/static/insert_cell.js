// Part of whatever puts a new cell below its own, as its keys would: where the front end is JupyterLab or
// Notebook 7. Elsewhere nothing happens.

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

function press(node, key, code, keyCode) {
  const options = { key, code, keyCode, which: keyCode, bubbles: true, cancelable: true, composed: true };
  node.dispatchEvent(new KeyboardEvent("keydown", options));
}

/** The editor of the cell that was inserted below `cell`, or null. */
async function newEditor(cell) {
  const notebook = cell.closest(".jp-Notebook");
  const before = new Set(notebook.querySelectorAll(".jp-Cell"));
  cell.dispatchEvent(new MouseEvent("mousedown", { bubbles: true, button: 0 }));
  cell.dispatchEvent(new MouseEvent("mouseup", { bubbles: true, button: 0 }));
  cell.focus();
  press(document.activeElement, "Escape", "Escape", 27);
  await pause(50);
  const at = notebook.contains(document.activeElement) ? document.activeElement : cell;
  press(at, "b", "KeyB", 66);
  for (let i = 0; i < 40; i++) {
    await pause(25);
    const made = [...notebook.querySelectorAll(".jp-Cell")].find((node) => !before.has(node));
    const editor = made && made.querySelector(".cm-content");
    if (editor) return editor;
  }
  return null;
}

/** Put a cell with a text below the one that holds `el`; whether that was done. */
async function insert(el, text) {
  const cell = el.closest(".jp-Cell");
  if (!cell) return false;
  const editor = await newEditor(cell);
  if (!editor) return false;
  editor.focus();
  return document.execCommand("insertText", false, text);
}
