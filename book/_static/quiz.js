// Makes radio buttons of a question's answers; whoever chooses one is told whether it is right, and why.
(function () {
  "use strict";

  function element(name, attributes, ...children) {
    const node = document.createElement(name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    node.append(...children);
    return node;
  }

  function make(box, number) {
    const question = box.querySelector(".question"), answers = box.querySelector(".answers");
    const fold = box.querySelector("details"), whys = [...fold.querySelectorAll("ol > li")];
    const told = element("div", { class: "told", role: "status", "aria-live": "polite" });
    const form = element("fieldset", {}, element("legend", {}, ...question.childNodes));
    const choices = [...answers.children].map((answer, at) => {
      const radio = element("input", { type: "radio", name: `topk-quiz-${number}` });
      // A paragraph may not stand in a label.
      const words = [...answer.childNodes].flatMap((node) => (node.nodeName === "P" ? [...node.childNodes] : [node]));
      const label = element("label", {}, radio, element("span", {}, ...words));
      radio.addEventListener("change", () => {
        choices.forEach((choice) => choice.classList.remove("right", "wrong"));
        const right = whys[at].classList.contains("right");
        label.classList.add(right ? "right" : "wrong");
        const why = whys[at].cloneNode(true);
        why.querySelectorAll("[id]").forEach((node) => node.removeAttribute("id"));
        told.className = `told ${right ? "right" : "wrong"}`;
        told.replaceChildren(...why.childNodes);
      });
      return label;
    });
    form.append(...choices, told);
    question.replaceWith(form);
    answers.remove();
    fold.hidden = true;
  }

  document.querySelectorAll(".topk-quiz").forEach(make);
})();
