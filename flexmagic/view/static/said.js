// A line for messages that stays on the page while its text changes, so that a screen reader hears of it.

function render({ model, el }) {
  const line = document.createElement("div");
  line.className = "fxm-said";
  line.setAttribute("role", "status");
  line.setAttribute("aria-live", "polite");
  const show = () => {
    line.textContent = model.get("text"); // as text: it may quote what a model or a user named
    line.classList.toggle("fxm-said-something", Boolean(line.textContent));
  };
  show();
  el.append(line);
  // The notebook's own shortcuts (arrows leave the cell, 0 0 restarts a kernel) must not fire while somebody
  // works in the panel; JupyterLab looks for this on what has the focus itself.
  const calm = ({ target }) => {
    if (el.closest(".flexmagic-panel")?.contains(target)) target.dataset.lmSuppressShortcuts = "true";
  };
  document.addEventListener("focusin", calm);
  model.on("change:text", show);
  return () => {
    model.off("change:text", show);
    document.removeEventListener("focusin", calm);
  };
}

export default { render };
