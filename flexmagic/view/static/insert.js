// A panel's invisible part: puts the cells that Python sends below the panel's own, and says whether it did.

function render({ model, el }) {
  const heard = async ({ text, id }) => {
    if (!el.isConnected) return;
    let done = false;
    try {
      done = await insert(el, text);
    } finally {
      model.send({ id, done });
    }
  };
  model.on("msg:custom", heard);
  return () => model.off("msg:custom", heard);
}

export default { render };
