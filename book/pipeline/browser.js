// What a reader would stumble over on the page that is open, in the theme that is set.
(() => {
  const text = (node) => (node.textContent || "").trim().replace(/\s+/g, " ").slice(0, 60);
  const visible = (node) => node.getClientRects().length > 0;
  const article = document.querySelector(".bd-article, article") || document.body;

  const raw = () => {
    const found = [];
    const walker = document.createTreeWalker(article, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const node = walker.currentNode;
      if (node.parentElement.closest("code, pre, script, style, mjx-container, svg")) continue;
      if (/\$\$|\\(frac|mathbb|sum|tau)\b|\{(eq|cite:p|prf:ref)\}|@[A-Z]{3,}@/.test(node.textContent)) found.push(text(node));
    }
    return found;
  };

  // --- contrast of text, as WCAG 2 counts it -------------------------------------------------------------------------

  const parse = (colour) => {
    const numbers = (colour.match(/[\d.]+/g) || []).map(Number);
    if (!numbers.length || colour === "transparent") return [0, 0, 0, 0];
    if (colour.startsWith("color(")) { // color(srgb r g b / a), parts of 1
      const [r, g, b, a = 1] = numbers.slice(-4).length === 4 && colour.includes("/") ? numbers.slice(-4) : numbers.slice(-3);
      return [255 * r, 255 * g, 255 * b, a];
    }
    return [numbers[0], numbers[1], numbers[2], numbers.length > 3 ? numbers[3] : 1];
  };
  const over = (top, bottom) => top.slice(0, 3).map((v, i) => v * top[3] + bottom[i] * (1 - top[3])).concat(1);
  const luminance = (colour) => {
    const [r, g, b] = colour.map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : Math.pow((v + 0.055) / 1.055, 2.4); });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const once = (of) => { // asked of a node and, through it, of all that hold it
    const known = new Map();
    const ask = (node) => {
      if (!known.has(node)) known.set(node, of(node, ask));
      return known.get(node);
    };
    return ask;
  };
  const behind = once((node, ask) => {
    if (!node) return [255, 255, 255, 1];
    const colour = parse(getComputedStyle(node).backgroundColor);
    return colour[3] === 1 ? colour : colour[3] > 0 ? over(colour, ask(node.parentElement)) : ask(node.parentElement);
  });
  const opacity = once((node, ask) => node ? Number(getComputedStyle(node).opacity) * ask(node.parentElement) : 1);
  const hidden = (node) => {
    const style = getComputedStyle(node), box = node.getBoundingClientRect();
    return !visible(node) || style.visibility === "hidden" || box.width < 2 || box.height < 2 || opacity(node) === 0 ||
      style.clip === "rect(0px, 0px, 0px, 0px)";
  };

  const contrast = () => {
    const found = new Map();
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      const node = walker.currentNode.parentElement;
      if (!walker.currentNode.textContent.trim() || node.closest("script, style, noscript, .headerlink, [disabled], mjx-assistive-mml")) continue;
      if (hidden(node)) continue;
      const style = getComputedStyle(node);
      const ink = parse(node.closest("svg") ? style.fill : style.color), paper = behind(node);
      ink[3] *= opacity(node);
      const a = luminance(over(ink, paper)), b = luminance(paper);
      const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
      const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700);
      if (ratio < (large ? 3 : 4.5)) {
        const where = `${node.tagName.toLowerCase()}.${[...node.classList].join(".")}`;
        const key = `${where} ${style.color}`;
        if (!found.has(key)) found.set(key, `${ratio.toFixed(2)}, ${where}: ${text(node).slice(0, 30)}`);
      }
    }
    return [...found.values()].slice(0, 8);
  };

  // A sign in letters clearly larger than the text around the formula. (Large operators are other signs, not larger letters.)
  const swollen = (formula) => {
    const usual = 1.3 * parseFloat(getComputedStyle(formula.parentElement).fontSize);
    return [...formula.querySelectorAll("mjx-c, mjx-utext")].some((n) => parseFloat(getComputedStyle(n).fontSize) > usual);
  };

  const images = [...article.querySelectorAll("img")];
  return {
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    untypeset: [...document.querySelectorAll(".math")].filter((n) => visible(n) && !n.querySelector("mjx-container")).map(text),
    errors: [...document.querySelectorAll("mjx-merror, [data-mjx-error]")].map(text),
    swollen: [...document.querySelectorAll("mjx-container")].filter((n) => visible(n) && swollen(n)).map(text),
    raw: raw(),
    undescribed: images.filter((n) => !n.alt || /\.(png|svg)$/.test(n.alt)).map((n) => n.src.slice(-60)),
    unsized: images.filter((n) => visible(n) && n.src && !(n.getAttribute("width") && n.getAttribute("height"))).map((n) => n.src.slice(-60)),
    knobs: [...article.querySelectorAll(".topk-knobs")].map((n) => n.querySelectorAll("input[type=range]").length),
    quizzes: [...article.querySelectorAll(".topk-quiz")].map((n) => n.querySelectorAll("fieldset input[type=radio]").length),
    launch: [...document.querySelectorAll("a[href*='colab.research.google.com']")].map((n) => n.href),
    links: [...document.querySelectorAll("a[href]")].map((n) => n.href),
    anchors: [...document.querySelectorAll("[id]")].map((n) => n.id),
    contrast: contrast(),
  };
})()
