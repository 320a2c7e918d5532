// The figure of the front page: scores that can be dragged, and what five losses make of them.
(function () {
  "use strict";
  const { five, gradient, bestFirst } = window.topkLosses;
  const LOW = -4, HIGH = 4, STEP = 0.1, COUNTS = ["one guess", "two guesses", "three guesses"];

  function element(name, attributes, parent, text) {
    const node = document.createElement(name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  }

  const signed = (v) => (Math.abs(v) < 0.005 ? "0" : `${v > 0 ? "+" : "−"}${Math.abs(v).toFixed(2)}`);
  const place = (score) => (100 * (score - LOW)) / (HIGH - LOW);
  const shortened = (v) => +Math.min(Math.max(v, LOW), HIGH).toFixed(1);

  function make(box) {
    const start = JSON.parse(box.querySelector("script").textContent);
    const { classes, right } = start;
    let { scores, k } = start;
    box.querySelector("img").remove();
    box.style.setProperty("--classes", classes.length);

    const controls = element("fieldset", { class: "guesses" }, box);
    element("legend", {}, controls, "The classifier may make");
    COUNTS.forEach((words, i) => {
      const label = element("label", {}, controls);
      const radio = element("input", { type: "radio", name: "topk-front-k" }, label);
      radio.checked = i + 1 === k;
      label.append(words);
      radio.addEventListener("change", () => { k = i + 1; draw(); });
    });
    const reset = element("button", { type: "button" }, controls, "Start again");
    reset.addEventListener("click", () => { scores = start.scores; draw(); });

    const row = element("div", { class: "band scores" }, box);
    element("div", { class: "name" }, row, "Scores: drag them").append(element("small", {}, null, "or use the arrow keys"));
    const columns = classes.map((name, j) => makeColumn(row, name, j));
    const verdict = element("p", { class: "verdict", role: "status" }, box);
    element("p", { class: "moves" }, box, "One step of gradient descent moves each score up or down by:");
    const rows = Object.entries(five).map(([name, loss]) => makeRow(name, loss));

    function makeColumn(parent, name, j) {
      const column = element("div", { class: "column" }, parent);
      const track = element("div", { class: "track" }, column);
      const bar = element("div", { class: "bar" }, track);
      const handle = element("div", { class: "handle", role: "slider", tabindex: 0, "aria-label": `score of ${name}`,
        "aria-orientation": "vertical", "aria-valuemin": LOW, "aria-valuemax": HIGH }, track);
      const label = element("div", { class: "class" }, column, name);
      if (j === right) element("b", {}, label, "right class");
      const set = (score) => { scores = scores.map((v, i) => (i === j ? shortened(score) : v)); draw(); };
      const follow = (event) => {
        const { top, height } = track.getBoundingClientRect();
        set(HIGH - ((event.clientY - top) / height) * (HIGH - LOW));
      };
      track.addEventListener("pointerdown", (event) => { track.setPointerCapture(event.pointerId); handle.focus(); follow(event); });
      track.addEventListener("pointermove", (event) => { if (track.hasPointerCapture(event.pointerId)) follow(event); });
      handle.addEventListener("keydown", (event) => {
        const by = { ArrowUp: STEP, ArrowRight: STEP, ArrowDown: -STEP, ArrowLeft: -STEP, PageUp: 1, PageDown: -1 }[event.key];
        if (by === undefined) return;
        event.preventDefault();
        set(scores[j] + by);
      });
      return (guessed) => {
        const zero = place(0), at = place(scores[j]);
        bar.style.bottom = `${Math.min(zero, at)}%`;
        bar.style.height = `${Math.abs(at - zero)}%`;
        handle.style.bottom = `${at}%`;
        handle.setAttribute("aria-valuenow", scores[j]);
        column.classList.toggle("guessed", guessed);
      };
    }

    function makeRow(name, loss) {
      const line = element("div", { class: "band loss", role: "img" }, box);
      const label = element("div", { class: "name" }, line, name);
      const value = element("span", { class: "value" }, label);
      const bars = classes.map(() => {
        const cell = element("div", { class: "push" }, line);
        return [element("div", { class: "bar" }, cell), element("span", {}, cell)];
      });
      return () => {
        const now = loss(scores, right, k), step = gradient(loss, scores, right, k).map((slope) => -slope);
        value.textContent = now.toFixed(2);
        step.forEach((by, j) => {
          const [bar, number] = bars[j], text = signed(by), size = text === "0" ? 0 : 36 * Math.min(Math.abs(by), 1);
          const up = by > 0 || text === "0", [at, away] = up ? ["bottom", "top"] : ["top", "bottom"];
          bar.className = `bar ${up ? "up" : "down"}`;
          bar.style.height = `${size}%`;
          bar.style[at] = "50%";
          bar.style[away] = "auto";
          number.style[at] = `calc(${50 + size}% + 2px)`;  // beyond the end of its bar
          number.style[away] = "auto";
          number.textContent = text;
        });
        line.setAttribute("aria-label", `${name}: loss ${now.toFixed(2)}; a step moves ` +
          classes.map((word, j) => `${word} by ${signed(step[j])}`).join(", "));
      };
    }

    function draw() {
      const order = bestFirst(scores), rank = order.indexOf(right) + 1;
      columns.forEach((show, j) => show(order.indexOf(j) < k));
      verdict.textContent = `The ${k === 1 ? "guess" : COUNTS[k - 1]}: ${order.slice(0, k).map((j) => classes[j]).join(", ")}. ` +
        (rank <= k ? `The right class is number ${rank}: a hit.` : `The right class is number ${rank}: a miss.`);
      rows.forEach((show) => show());
    }
    draw();
  }

  document.querySelectorAll(".topk-front").forEach(make);
})();
