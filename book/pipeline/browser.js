// What a reader would stumble over on the page that is open.
(() => {
  const facts = () => {
    const text = (node) => (node.textContent || "").trim().slice(0, 60);
    const visible = (node) => node.getClientRects().length > 0;
    const article = document.querySelector(".bd-article, article") || document.body;
    const raw = [];
    const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const node = walker.currentNode;
      if (node.parentElement.closest("code, pre, script, style, mjx-container, svg")) continue;
      if (/\$\$|\\(frac|mathbb|sum|tau)\b|\{(eq|cite:p|prf:ref)\}/.test(node.textContent)) raw.push(text(node));
    }
    return {
      wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
      untypeset: [...document.querySelectorAll(".math")].filter((n) => visible(n) && !n.querySelector("mjx-container")).map(text),
      errors: [...document.querySelectorAll("mjx-merror, [data-mjx-error]")].map(text),
      raw: raw,
      undescribed: [...article.querySelectorAll("img")].filter((n) => !n.alt || /\.(png|svg)$/.test(n.alt)).map((n) => n.src.slice(-60)),
      knobs: [...article.querySelectorAll(".topk-knobs")].map((n) => n.querySelectorAll("input[type=range]").length),
      launch: [...document.querySelectorAll("a[href*='colab.research.google.com']")].map((n) => n.href),
      links: [...document.querySelectorAll("a[href]")].map((n) => n.href),
      anchors: [...document.querySelectorAll("[id]")].map((n) => n.id),
    };
  };

  const contrast = () => {
    const parse = (c) => (c.match(/[\d.]+/g) || []).map(Number);
    const light = (c) => { const f = c.slice(0, 3).map((v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : Math.pow((v + 0.055) / 1.055, 2.4); });
      return 0.2126 * f[0] + 0.7152 * f[1] + 0.0722 * f[2]; };
    const behind = (n) => { for (; n; n = n.parentElement) { const c = parse(getComputedStyle(n).backgroundColor);
      if (c.length && (c.length < 4 || c[3] > 0.5)) return c; } return [255, 255, 255]; };
    const found = [];
    for (const n of document.querySelectorAll(".bd-article p, .bd-article li, .bd-article td, .bd-article th, .bd-article h1, .bd-article h2, .bd-article summary, .bd-article a:not(.headerlink)")) {
      if (!n.getClientRects().length || !(n.textContent || "").trim()) continue;
      const a = light(parse(getComputedStyle(n).color)), b = light(behind(n));
      const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      if (ratio < 4.5) found.push(ratio.toFixed(1) + ": " + n.textContent.trim().slice(0, 40));
    }
    return found.slice(0, 3);
  };

  return { ...facts(), contrast: contrast() };
})()
