// A keyboard with three suggestions from each of some next-word models, which run here, in the page.
// One character a number, row after row; every column has its own scale.
function matrix(packed, spec) {
  const level = {};
  [...spec.alphabet].forEach((letter, i) => { level[letter] = i - spec.levels; });
  const columns = packed.scale.length;
  return {
    columns,
    values: Float32Array.from(packed.text, (letter, i) => level[letter] * packed.scale[i % columns]),
  };
}

function scores(model, tokens) {
  const units = model.last.columns - 1, hidden = new Float64Array(units);
  tokens.forEach((token, position) => {
    const start = token * model.tables.columns + position * units;
    for (let i = 0; i < units; i++) hidden[i] += model.tables.values[start + i];
  });
  for (let i = 0; i < units; i++) hidden[i] = Math.tanh(hidden[i]);
  const found = new Float64Array(model.last.values.length / (units + 1));
  for (let word = 0; word < found.length; word++) {
    const start = word * (units + 1);
    let sum = model.last.values[start + units];
    for (let i = 0; i < units; i++) sum += hidden[i] * model.last.values[start + i];
    found[word] = sum;
  }
  return found;
}

// What is written is finished tokens, and perhaps the beginning of a word.
function parse(text) {
  const found = text.toLowerCase().match(/[a-z']+|[^\sa-z']/g) || [];
  const begun = /[a-z']$/i.test(text) ? found.pop() : "";
  return { tokens: found, begun };
}

function suggested(model, spec, number, text) {
  const { tokens, begun } = parse(text), count = spec.words.length;
  const known = tokens.map((token) => (number.has(token) ? number.get(token) : count));
  const context = [...Array(spec.context).fill(count + 1), ...known].slice(-spec.context);
  const score = scores(model, context);
  const open = spec.words.map((word, i) => i).filter((i) => spec.words[i].startsWith(begun));
  return open.sort((a, b) => score[b] - score[a] || a - b).slice(0, spec.shown).map((i) => spec.words[i]);
}

function inserted(text, word) {
  const { begun } = parse(text), before = text.slice(0, text.length - begun.length);
  return (/^[a-z']/.test(word) ? before : before.trimEnd()) + word + " ";
}

function make(box, spec) {
  box.querySelector("table").remove();
  const number = new Map(spec.words.map((word, i) => [word, i]));
  const models = spec.models.map((m) => ({ name: m.name, tables: matrix(m.tables, spec), last: matrix(m.last, spec) }));
  let keys = 0;
  const label = html("label", "", box, "Type, or tap a word. ");
  const field = html("input", "", label);
  Object.assign(field, { type: "text", value: spec.examples[0] + " ", autocomplete: "off", spellcheck: false });
  field.setAttribute("autocapitalize", "off");
  const rows = models.map((model) => {
    const row = html("div", "suggestions", box);
    html("span", "", row, model.name);
    const buttons = Array.from({ length: spec.shown }, () => html("button", "", row));
    buttons.forEach((button) => {
      button.type = "button";
      button.addEventListener("click", () => {
        field.value = inserted(field.value, button.textContent);
        keys += 1;
        draw();
      });
    });
    return () => {
      const found = suggested(model, spec, number, field.value);
      buttons.forEach((button, i) => {
        button.textContent = found[i] || "";
        button.disabled = !found[i];
      });
    };
  });
  const shown = html("div", "keys", box);
  shown.setAttribute("aria-live", "polite");
  field.addEventListener("input", () => { keys += 1; draw(); });
  const starts = html("div", "starts", box, "Begin with: ");
  spec.examples.forEach((text) => {
    const button = html("button", "", starts, text);
    button.type = "button";
    button.addEventListener("click", () => { field.value = text + " "; keys = 0; draw(); });
  });
  function draw() {
    rows.forEach((show) => show());
    shown.textContent = keys ? `${keys} keystroke${keys === 1 ? "" : "s"} since the beginning` : "";
  }
  draw();
}

begin("topk-keyboard",
  ".topk-keyboard{max-width:760px;font-family:inherit}.topk-keyboard label{display:block}" +
  ".topk-keyboard input{width:100%;box-sizing:border-box;font:inherit;padding:.4rem .6rem;margin:.3rem 0 .6rem;" +
  "color:inherit;background:transparent;border:1px solid currentColor;border-radius:.3rem}" +
  ".topk-keyboard .suggestions{display:grid;grid-template-columns:repeat(3,1fr);gap:.3rem;margin:.4rem 0}" +
  ".topk-keyboard .suggestions span{grid-column:1/-1;font-size:.9em}" +
  ".topk-keyboard button{font:inherit;color:inherit;background:transparent;border:1px solid currentColor;" +
  "border-radius:.3rem;padding:.3rem .4rem;min-height:2.2em;cursor:pointer;overflow-wrap:anywhere}" +
  ".topk-keyboard .suggestions button{border-color:#0072B2;border-width:2px}" +
  ".topk-keyboard .starts{margin-top:.6rem;font-size:.9em}.topk-keyboard .starts button{margin:.15rem .3rem .15rem 0}" +
  ".topk-keyboard .keys{min-height:1.5em;font-size:.9em}",
  make);
