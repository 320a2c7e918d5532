// Panels of lines that follow sliders. Every frame is already worked out; this only draws.
let clips = document.querySelectorAll(".topk-knobs clipPath").length; // every figure on the page brings this script
const H = 250, T = 26, B = 40;

function ticks(low, high, count) {
  const rough = (high - low) / count, power = Math.pow(10, Math.floor(Math.log10(rough)));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let t = Math.ceil(low / step) * step; t <= high + 1e-9 * step; t += step) found.push(Math.abs(t) < 1e-9 * step ? 0 : t);
  return found;
}

// Powers of ten, every one or every second, ...: at most `count`.
function powers(low, high, count) {
  const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
  const step = Math.ceil((last - first + 1) / count), found = [];
  for (let power = Math.ceil(first / step) * step; power <= last; power += step) found.push(Math.pow(10, power));
  return found;
}

function number(t) {
  const text = String(+t.toPrecision(3));
  return Math.abs(t) < 9e3 ? text : text.replace(/\B(?=(\d{3})+$)/g, ",");
}

// Writes a label; what stands after "_" stands lower, x_y as in formulas.
function words(attributes, parent, label) {
  const node = svg("text", attributes, parent, "");
  label.split(/_(\w)/).forEach((part, i) => {
    if (i % 2) svg("tspan", { dy: 3, "font-size": "75%" }, node, part);
    else if (part) svg("tspan", { dy: i ? -3 : 0 }, node, part);
  });
}

// A line looks like its name in the legend, which all panels share: looks are {name: [colour, dashes]}.
function makePanel(spec, parent, looks, W) {
  const root = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": spec.title }, parent);
  const x0 = Math.min(...spec.x), x1 = Math.max(...spec.x), [y0, y1] = spec.y_range;
  const [log_x, log_y] = spec.log, along = (log, low, high) => log
    ? (place) => Math.log10(place / low) / Math.log10(high / low) : (place) => (place - low) / (high - low);
  const up = log_y ? powers(y0, y1, 6) : ticks(y0, y1, 5), across = log_x ? powers(x0, x1, 4) : ticks(x0, x1, 6);
  const L = log_y ? Math.max(46, 24 + 6.2 * Math.max(...up.map((t) => number(t).length))) : 46, R = log_x ? 28 : 10;
  const to_x = along(log_x, x0, x1), to_y = along(log_y, y0, y1);
  const px = (x) => L + to_x(x) * (W - L - R), py = (y) => H - B - to_y(y) * (H - T - B);
  const clip = "topk-clip-" + (clips += 1);
  svg("rect", { x: L - 5, y: T - 4, width: W - L - R + 10, height: H - T - B + 8 }, svg("clipPath", { id: clip }, root));
  svg("text", { x: L, y: 16, "font-weight": 600, "font-size": 12.5 }, root, spec.title);
  for (const t of up) {
    svg("line", { x1: L, x2: W - R, y1: py(t), y2: py(t), class: "grid" }, root);
    svg("text", { x: L - 6, y: py(t) + 4, "text-anchor": "end", "font-size": 11 }, root, number(t));
  }
  for (const t of across) {
    svg("line", { x1: px(t), x2: px(t), y1: T, y2: H - B, class: "grid" }, root);
    svg("text", { x: px(t), y: H - B + 16, "text-anchor": "middle", "font-size": 11 }, root, number(t));
  }
  words({ x: (L + W - R) / 2, y: H - 6, "text-anchor": "middle", "font-size": 12 }, root, spec.x_label);
  words({ x: 12, y: (T + H - B) / 2, "text-anchor": "middle", "font-size": 12,
    transform: `rotate(-90 12 ${(T + H - B) / 2})` }, root, spec.y_label);
  const marks = spec.lines.map((name) => {
    const group = svg("g", { "clip-path": `url(#${clip})` }, root), [colour, dashes] = looks[name];
    return (values) => {
      group.textContent = "";
      if (spec.points) {
        values.forEach((y, j) => {
          svg("line", { x1: px(spec.x[j]), x2: px(spec.x[j]), y1: py(0), y2: py(y), stroke: colour, "stroke-width": 2 }, group);
          svg("circle", { cx: px(spec.x[j]), cy: py(y), r: 4, fill: colour }, group);
        });
      } else {
        const path = values.map((y, j) => `${j ? "L" : "M"}${px(spec.x[j]).toFixed(1)} ${py(y).toFixed(1)}`).join("");
        svg("path", { d: path, fill: "none", stroke: colour, "stroke-width": 2.2, "stroke-dasharray": dashes }, group);
      }
    };
  });
  return (frame) => frame.forEach((values, i) => marks[i](values));
}

function legend(names, parent, looks) {
  const box = html("div", "legend", parent);
  names.forEach((name) => {
    const item = html("span", "", box);
    const key = svg("svg", { viewBox: "0 0 30 8", width: 30, height: 8, "aria-hidden": "true" }, item);
    svg("line", { x1: 0, x2: 30, y1: 4, y2: 4, stroke: looks[name][0], "stroke-width": 2.2, "stroke-dasharray": looks[name][1] }, key);
    item.appendChild(document.createTextNode(" " + name));
  });
}

function make(box, spec) {
  box.querySelector("img").remove();
  const controls = html("div", "controls", box);
  const place = spec.knobs.map((knob) => knob.start);
  const shown = spec.knobs.map((knob, i) => {
    const label = html("label", "", controls, knob.name + " ");
    const value = html("output", "", label);
    const slider = html("input", "", label);
    slider.setAttribute("aria-label", knob.name); // a label names its first control, which is the output here
    Object.assign(slider, { type: "range", min: 0, max: knob.values.length - 1, step: 1, value: knob.start });
    slider.addEventListener("input", () => { place[i] = +slider.value; draw(); });
    return () => {
      value.textContent = knob.values[place[i]];
      slider.setAttribute("aria-valuetext", `${knob.name} ${knob.values[place[i]]}`);
    };
  });
  const row = html("div", "panels", box);
  const names = [...new Set(spec.panels.flatMap((panel) => (panel.points ? [] : panel.lines)))];
  const narrow = spec.panels.length > 1 || (box.clientWidth && box.clientWidth < 500);
  const width = narrow ? 360 : 640; // a panel alone has the room of two, its letters the same size
  const panels = spec.panels.map((panel) => makePanel(panel, row, spec.looks, width));
  legend(names, box, spec.looks);
  function draw() {
    shown.forEach((show) => show());
    spec.frames[place.join(",")].forEach((frame, i) => panels[i](frame));
  }
  draw();
}

begin("topk-knobs",
  ".topk-knobs{max-width:760px;font-family:inherit}.topk-knobs .panels{display:grid;gap:.5rem;" +
  "grid-template-columns:repeat(auto-fit,minmax(min(280px,100%),1fr))}.topk-knobs svg text{fill:currentColor}" +
  ".topk-knobs .grid{stroke:currentColor;opacity:.15}.topk-knobs .controls{display:flex;flex-wrap:wrap;gap:.4rem 1.5rem}" +
  ".topk-knobs label{display:flex;align-items:center;gap:.5rem;flex:1 1 220px}.topk-knobs input{flex:1;min-width:120px;accent-color:#0072B2}" +
  ".topk-knobs output{min-width:2.5em;font-weight:600}.topk-knobs .legend span{margin-right:1.2rem;white-space:nowrap}",
  make);
