// What the interactive figures share; each of them is put into one function together with this.
function svg(name, attributes, parent, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  parent.appendChild(node);
  return node;
}

function html(name, className, parent, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  parent.appendChild(node);
  return node;
}

// Every figure of a kind brings its script: only the first one's style is taken, and every box is made once.
function begin(kind, style, make) {
  if (!document.getElementById(`${kind}-style`)) {
    const node = html("style", "", document.head, style);
    node.id = `${kind}-style`;
  }
  document.querySelectorAll(`.${kind}`).forEach((box) => {
    if (box.dataset.ready) return;
    box.dataset.ready = "yes";
    make(box, JSON.parse(box.querySelector("script").textContent));
  });
}
