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
  // The notebook's own shortcuts (arrows, 0 0) must not fire while somebody works in the panel.
  const calm = (tries) => {
    const panel = el.closest(".flexmagic-panel");
    if (panel) panel.dataset.lmSuppressShortcuts = "true";
    else if (tries) setTimeout(() => calm(tries - 1), 50);
  };
  calm(100);
  model.on("change:text", show);
  return () => model.off("change:text", show);
}

export default { render };
