// A label distribution over three classes to drag, and where losses come to rest. Every place is already worked out.
const SHAPES = ["M-6 0A6 6 0 1 0 6 0A6 6 0 1 0-6 0Z", "M-6-6H6V6H-6Z", "M0-8 8 6H-8Z", "M0-8 8 0 0 8-8 0Z"];
const CORNERS = [[40, 300], [360, 300], [200, 23]], W = 400, H = 340;

const at = (p) => [0, 1].map((axis) => p.reduce((sum, share, i) => sum + share * CORNERS[i][axis], 0));

function triangle(parent) {
  const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "triangle of three classes" }, parent);
  svg("path", { d: "M" + CORNERS.map((c) => c.join(" ")).join("L") + "Z", class: "edge" }, root);
  CORNERS.forEach((corner, i) => {
    const [x, y] = at([0, 1, 2].map((j) => (j === i ? 0 : 0.5)));
    svg("line", { x1: corner[0], y1: corner[1], x2: x, y2: y, class: "grid" }, root);
    svg("text", { x: corner[0], y: corner[1] + (i < 2 ? 22 : -8), "text-anchor": "middle", "font-size": 13 }, root, `class ${i + 1}`);
  });
  return root;
}

function make(box, spec) {
  const n = spec.steps;
  box.querySelector("img").remove();
  const controls = html("div", "controls", box), keys = Object.keys(spec.rests);
  const place = { ...spec.start };
  const sliders = ["first", "second", "view"].map((name, i) => {
    const label = html("label", "", controls, ["q of class 1", "q of class 2", spec.knob][i] + " ");
    const value = html("output", "", label), slider = html("input", "", label);
    slider.setAttribute("aria-label", ["q of class 1", "q of class 2", spec.knob][i]);
    Object.assign(slider, { type: "range", min: 0, max: i < 2 ? n : keys.length - 1, step: 1 });
    slider.addEventListener("input", () => { move(name, +slider.value); draw(); });
    return () => {
      slider.value = place[name];
      value.textContent = i < 2 ? (place[name] / n).toFixed(2) : keys[place[name]];
      slider.setAttribute("aria-valuetext", value.textContent);
    };
  });
  const root = triangle(html("div", "panels", box));
  const colours = spec.names.map((name) => spec.looks[name][0]);
  const lines = colours.map((colour) => svg("line", { stroke: colour, "stroke-width": 1.5, opacity: 0.6 }, root));
  const marks = colours.map((colour, i) => svg("path", { d: SHAPES[i], stroke: colour, "stroke-width": 2.5 }, root));
  const handle = svg("g", {}, root);
  svg("circle", { r: 12, class: "handle" }, handle);
  svg("text", { y: -17, "text-anchor": "middle", "font-size": 15, "font-style": "italic" }, handle, "q");
  const legend = html("div", "legend", box), words = spec.names.map((name, i) => {
    const item = html("div", "", legend), key = svg("svg", { viewBox: "-9 -9 18 18", width: 18, height: 18, "aria-hidden": "true" }, item);
    svg("path", { d: SHAPES[i], fill: colours[i] }, key);
    item.appendChild(document.createTextNode(` ${name}: `));
    return html("span", "", item);
  });

  function move(name, value) {
    place[name] = value;
    if (name === "first") place.second = Math.min(place.second, n - value);
    if (name === "second") place.first = Math.min(place.first, n - value);
  }

  function drag(event) {
    const box = root.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * W, y = ((event.clientY - box.top) / box.height) * H;
    const third = (CORNERS[0][1] - y) / (CORNERS[0][1] - CORNERS[2][1]);
    const second = (x - CORNERS[0][0] - third * (CORNERS[2][0] - CORNERS[0][0])) / (CORNERS[1][0] - CORNERS[0][0]);
    const top = Math.min(n, Math.max(0, Math.round(third * n)));
    place.second = Math.min(n - top, Math.max(0, Math.round(second * n)));
    place.first = n - top - place.second;
    draw();
  }
  root.addEventListener("pointerdown", (event) => { root.setPointerCapture(event.pointerId); drag(event); });
  root.addEventListener("pointermove", (event) => { if (event.buttons) drag(event); });

  function draw() {
    sliders.forEach((show) => show());
    const q = [place.first, place.second, n - place.first - place.second].map((count) => count / n), [x, y] = at(q);
    handle.setAttribute("transform", `translate(${x} ${y})`);
    spec.names.forEach((name, i) => {
      const rest = spec.rests[keys[place.view]][i][place.first][place.second], [px, py] = at(rest.p);
      marks[i].setAttribute("transform", `translate(${px} ${py})`);
      marks[i].setAttribute("fill", rest.right ? colours[i] : "none");
      for (const [key, value] of Object.entries({ x1: x, y1: y, x2: px, y2: py })) lines[i].setAttribute(key, value);
      words[i].textContent = rest.right ? "right" : "not right";
    });
  }
  draw();
}

begin("topk-simplex",
  ".topk-simplex{max-width:520px;font-family:inherit}.topk-simplex svg text{fill:currentColor}.topk-simplex .panels svg{touch-action:none;cursor:pointer}" +
  ".topk-simplex .edge{fill:none;stroke:currentColor}.topk-simplex .grid{stroke:currentColor;opacity:.2}" +
  ".topk-simplex .handle{fill:transparent;stroke:currentColor;stroke-width:2.5}.topk-simplex .controls{display:flex;flex-wrap:wrap;gap:.4rem 1.5rem}" +
  ".topk-simplex label{white-space:nowrap;display:flex;align-items:center;gap:.5rem;flex:1 1 220px}.topk-simplex input{flex:1;min-width:120px;accent-color:#0072B2}" +
  ".topk-simplex output{min-width:2.5em;font-weight:600}.topk-simplex .legend svg{vertical-align:middle}",
  make);
