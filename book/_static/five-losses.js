// Five losses of one row of scores, for the figure of the front page. x: the scores, y: the right class, k: the guesses.
// Few classes, so the plainest form of each formula will do; tests/test_front.py compares them with the module `topk`.
(function () {
  "use strict";
  const sum = (list) => list.reduce((total, value) => total + value, 0);
  const logSumExp = (list) => { const top = Math.max(...list); return top + Math.log(sum(list.map((v) => Math.exp(v - top)))); };
  const softplus = (v) => Math.max(v, 0) + Math.log1p(Math.exp(-Math.abs(v)));
  const bestFirst = (x) => x.map((_, j) => j).sort((a, b) => x[b] - x[a] || a - b);

  // chances[j]: that j of the independent events happen whose probabilities are given.
  const countOf = (probabilities) => probabilities.reduce(
    (chances, p) => [...chances, 0].map((stay, j) => stay * (1 - p) + (j ? chances[j - 1] * p : 0)), [1]);

  // The standard normal distribution function, by its series.
  function normal(z) {
    if (Math.abs(z) > 7) return z > 0 ? 1 : 0;
    let term = z, total = z;
    for (let i = 3; Math.abs(term) > 1e-17; i += 2) total += term *= (z * z) / i;
    return 0.5 + (total * Math.exp((-z * z) / 2)) / Math.sqrt(2 * Math.PI);
  }

  const bounded = (chance) => Math.log(chance * (1 - 2e-7) + 1e-7);

  const crossEntropy = (x, y) => logSumExp(x) - x[y];

  // softplus(1 + log e_k - log e_{k-1} - x_y / k), with e_j the symmetric polynomials of exp(x / k) of the wrong classes.
  function smooth(x, y, k) {
    const wrong = x.filter((_, j) => j !== y).map((v) => Math.exp(v / k));
    const e = wrong.reduce((all, w) => [...all, 0].map((stay, j) => stay + (j ? all[j - 1] * w : 0)), [1]);
    return softplus(1 + Math.log(e[k] / e[k - 1]) - x[y] / k);
  }

  // (1 - a) CE + a G. The set T and the weight a are read off `fixed`: no derivative goes through them.
  function transition(x, y, k, fixed = x) {
    const order = bestFirst(fixed), top = order.slice(0, k);
    const lead = Math.min(Math.max(fixed[y] - fixed[order[k]], 0), 1), a = lead * lead * (3 - 2 * lead);
    const grouped = top.includes(y) ? logSumExp(x) - logSumExp(top.map((j) => x[j])) : crossEntropy(x, y);
    return (1 - a) * crossEntropy(x, y) + a * grouped;
  }

  // max(0, 1 + E[(x + Z)_[k+1]] - x_y): the mean is the integral of the probability that more than k exceed a level.
  function noised(x, y, k) {
    const low = Math.min(...x) - 7, step = 0.125, steps = Math.ceil((Math.max(...x) + 7 - low) / step);
    const exceeded = Array.from({ length: steps }, (_, i) => {
      const level = low + i * step;
      return sum(countOf(x.map((v) => normal(v - level))).slice(k + 1)) * (i ? 1 : 0.5);
    });
    return Math.max(0, 1 + low + step * sum(exceeded) - x[y]);
  }

  // -log of the probability that the right class lands among the first k of a sorting network that swaps softly.
  function differentiable(x, y, k) {
    let values = [...x], chances = x.map((_, j) => +(j === y));
    if (k === 1) return -bounded(Math.exp(-crossEntropy(x, y)));
    for (let layer = 0; layer < x.length; layer++) {
      for (let a = layer % 2; a + 1 < x.length; a += 2) {
        const stay = 0.5 + Math.atan(values[a + 1] - values[a]) / Math.PI;
        for (const list of [values, chances]) {
          const [low, high] = [list[a], list[a + 1]];
          list[a] = stay * low + (1 - stay) * high;
          list[a + 1] = stay * high + (1 - stay) * low;
        }
      }
    }
    return -bounded(sum(chances.slice(-k)));
  }

  // By central differences: the losses are smooth wherever the figure looks closely.
  function gradient(loss, x, y, k, h = 1e-5) {
    return x.map((_, j) => {
      const moved = (by) => loss(x.map((v, i) => (i === j ? v + by : v)), y, k, x);
      return (moved(h) - moved(-h)) / (2 * h);
    });
  }

  window.topkLosses = {
    gradient, bestFirst,
    five: { "cross-entropy": crossEntropy, smooth, transition, noised, differentiable },
  };
})();
