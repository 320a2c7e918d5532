// Whether what can be operated with a mouse can be focused, is seen to be focused, and has a name. Marks each thing.
(() => {
  const name = (node) => (node.getAttribute("aria-label") || (node.labels && [...node.labels].map((l) => l.textContent).join(" ")) ||
    (node.tagName === "SUMMARY" ? node.textContent : "") || "").trim();
  const shown = (node) => { const s = getComputedStyle(node); return s.outlineStyle !== "none" || s.boxShadow !== "none"; };
  const article = document.querySelector(".bd-article, article") || document.body;
  article.querySelectorAll("details:has(details)").forEach((outer) => { outer.open = true; });  // a fold within a fold
  const things = [...article.querySelectorAll("details > summary, .topk-knobs input[type=range], .topk-quiz input")].filter((n) => n.getClientRects().length);
  return things.map((node, number) => {
    node.setAttribute("data-thing", number);
    node.focus();
    return { number: number, kind: node.type === "radio" ? "RADIO" : node.tagName, name: name(node).slice(0, 40),
      reached: node.tabIndex >= 0 && document.activeElement === node, seen: shown(node) };
  });
})()
