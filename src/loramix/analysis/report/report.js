"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const E = data.experts.length, L = data.layers.length, N = data.pieces.length;
  const leading = new Int16Array(bytes(data.leading).buffer);
  const level = bytes(data.level);
  const confidence = new Uint16Array(bytes(data.confidence).buffer), entropy = new Uint16Array(bytes(data.entropy).buffer);
  const weights = bytes(data.weights), layerWeights = bytes(data.layerWeights);
  const layerTokens = new Int32Array(bytes(data.layerTokens).buffer);
  const layerLeading = new Int16Array(bytes(data.layerLeading).buffer);
  const scaling = (byte) => data.low + (byte / 255) * (data.high - data.low);
  const MOST = 12;          // experts in a list; the others are told as a sum
  const ACROSS = 8;         // experts beside each other in a table of layers, where there are more than MOST
  const PAGE = Math.max(50, Math.ceil(N / 100));   // tokens of a long step
  const AHEAD = "1200px";   // how far outside the window tokens are elements

  const byId = (id) => document.getElementById(id);
  const [text, panel, tip, body] = [byId("text"), byId("panel"), byId("tip"), byId("token")];

  /** An element with classes, and text or children: never markup. */
  const make = (tag, classes = "", ...inside) => {
    const element = document.createElement(tag);
    if (classes) element.className = classes;
    element.append(...inside);
    return element;
  };
  const colour = (expert) => expert < 0 ? "" : `e${data.colours[expert]}`;   // -1: no expert leads
  const name = (expert) => make("bdi", "name", data.experts[expert]);

  // --- where tokens stand -----------------------------------------------------------------------------------------
  const runs = data.runs;   // [first token, its text, its position there, its row in the record]
  /** The last of some sorted things whose number, by `of`, is not above this one; the first where all are. */
  const lastUpTo = (things, number, of) => {
    let low = 0, high = things.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (of(things[middle]) <= number) low = middle; else high = middle - 1;
    }
    return low;
  };
  const runOf = (token) => runs[lastUpTo(runs, token, (run) => run[0])];
  const position = (token) => { const run = runOf(token); return run[2] + token - run[0]; };
  const tokenOfRow = (row) => {
    let found = 0;
    runs.forEach((run, i) => {
      const count = (i + 1 < runs.length ? runs[i + 1][0] : N) - run[0];
      if (run[3] <= row) found = run[0] + Math.min(row - run[3], count - 1);
    });
    return found;
  };

  const chunks = [];        // { first, last, box, built }
  const build = (chunk) => {
    if (chunk.built) return;
    chunk.built = true;
    const spans = [];
    for (let i = chunk.first; i < chunk.last; i++) {
      const span = make("span", `t ${colour(leading[i])} s${level[i]}`, data.pieces[i]);
      span.token = i;
      span.tabIndex = i === current ? 0 : -1;
      span.setAttribute("role", "button");
      span.setAttribute("aria-expanded", String(i === opened));
      const mark = markOf(i);
      if (mark) span.dataset.mark = mark;
      spans.push(span);
    }
    chunk.box.replaceChildren(...spans);
  };
  /** Drawn before a token: tokens that are missing there, half a character, the end of a line. */
  const markOf = (token) => {
    const piece = data.pieces[token], run = runOf(token);
    const gap = run[0] === token && token > 0 && data.texts[run[1]] === data.texts[runOf(token - 1)[1]] ? "⋯" : "";
    return gap + (piece === "" ? "▫" : /^[\r\n]+$/.test(piece) ? "↵" : "");
  };
  const unbuild = (chunk) => {
    if (!chunk.built || (current >= chunk.first && current < chunk.last)) return;
    chunk.built = false;
    chunk.box.replaceChildren(data.pieces.slice(chunk.first, chunk.last).join(""));
  };
  const chunkOf = (token) => chunks[lastUpTo(chunks, token, (chunk) => chunk.first)];
  const element = (token) => {
    const chunk = chunkOf(token);
    build(chunk);
    return chunk.box.children[token - chunk.first];
  };

  // --- the text: plain at first, tokens as elements near the window -------------------------------------------------
  let current = 0, opened = -1;
  const watcher = new IntersectionObserver((seen) => {
    for (const { target, isIntersecting } of seen) (isIntersecting ? build : unbuild)(target.chunk);
  }, { rootMargin: AHEAD });
  const sectionStarts = runs.map((_, r) => r).filter((r) => {
    if (r === 0 || runs[r][1] !== runs[r - 1][1]) return true;
    const here = (r + 1 < runs.length ? runs[r + 1][0] : N) - runs[r][0];
    return here >= 32 && runs[r][0] - runs[r - 1][0] >= 32;
  });
  sectionStarts.forEach((r, s) => {
    const run = runs[r], end = s + 1 < sectionStarts.length ? runs[sectionStarts[s + 1]][0] : N;
    const fork = data.forks[run[1]], begins = run[2] && (r === 0 || runs[r - 1][1] !== run[1]);
    const from = run[2] ? ` · from token ${run[2]}` : "";
    const forked = fork && begins;   // its first tokens may be missing
    const place = !forked ? from : run[2] === fork[1] ? ` · goes on from token ${fork[1]} of ` : `${from}, forked at token ${fork[1]} of `;
    const origin = forked ? [make("bdi", "", fork[0])] : [];
    text.append(make("h3", "", make("bdi", "", data.texts[run[1]] ?? ""), place, ...origin));
    for (let first = run[0]; first < end;) {
      let last = first + 1;
      while (last < end && !(last - first >= 300 && data.pieces[last - 1].endsWith("\n")) && last - first < 1500) last++;
      const box = make("div", "chunk", data.pieces.slice(first, last).join(""));
      const chunk = { first, last, box, built: false };
      box.chunk = chunk;
      chunks.push(chunk);
      text.append(box);
      watcher.observe(box);
      first = last;
    }
  });

  // --- weights ------------------------------------------------------------------------------------------------------
  const number = (value) => value.toFixed(2);
  const weightsOf = (token) => Array.from({ length: E }, (_, e) => scaling(weights[token * E + e]));
  const ordered = (values, first) => {  // weights are rounded: the leading expert is known exactly
    const order = values.map((_, e) => e).sort((a, b) => values[b] - values[a]);
    return first < 0 ? order : [first, ...order.filter((e) => e !== first)];
  };
  const weightList = (token, most) => {
    const values = weightsOf(token), order = ordered(values, leading[token]), list = make("div", "weights");
    for (const e of order.slice(0, most)) {
      const fill = make("i", colour(e));
      fill.style.width = `${(100 * Math.max(0, values[e])) / data.high}%`;
      list.append(make("i", `mark ${colour(e)}`), name(e), make("span", "track", fill), make("span", "number", number(values[e])));
    }
    if (E > most) {
      const rest = order.slice(most).reduce((sum, e) => sum + values[e], 0);
      list.append(make("span", "rest faint", `the ${E - most} others together: ${number(rest)}`));
    }
    return list;
  };
  const shownPiece = (piece) => piece === "" ? "▫ (part of a character)" : JSON.stringify(piece).slice(1, -1);
  const spoken = (token) => {
    const values = weightsOf(token);
    return `${shownPiece(data.pieces[token])}: ` + ordered(values, leading[token]).slice(0, 4).map((e) => `${data.experts[e]} ${number(values[e])}`).join(", ");
  };

  const showTip = (span) => {
    const token = span.token;
    span.setAttribute("aria-label", spoken(token));
    tip.replaceChildren(make("div", "piece", shownPiece(data.pieces[token])), weightList(token, 8));
    tip.hidden = false;
    const at = span.getClientRects()[0] ?? span.getBoundingClientRect(), size = tip.getBoundingClientRect();
    const left = Math.max(8, Math.min(at.left, document.documentElement.clientWidth - size.width - 8));
    const above = at.top - size.height - 8;
    tip.style.left = `${left}px`;
    tip.style.top = `${above < 4 ? at.bottom + 8 : above}px`;
  };
  const hideTip = () => { tip.hidden = true; };

  // --- one token: its weights, and layers × experts -----------------------------------------------------------------
  const layerRow = (token) => {
    const row = lastUpTo(layerTokens, token, (one) => one), next = Math.min(row + 1, layerTokens.length - 1);
    return Math.abs(layerTokens[next] - token) < Math.abs(layerTokens[row] - token) ? next : row;
  };
  const layerTable = (row, columns) => {
    const head = make("tr", "", make("th", "", "layer"));
    for (const e of columns) {
      const upright = columns.length > 5 || matchMedia("(max-width: 40rem)").matches;
      const inside = make("span", upright ? "upright" : "", data.experts[e]);
      head.append(make("th", "", make("i", `mark ${colour(e)}`), " ", inside));
    }
    head.append(make("th", "", "leads"));
    const rows = make("tbody");
    for (let l = 0; l < L; l++) {
      const values = Array.from({ length: E }, (_, e) => scaling(layerWeights[(row * L + l) * E + e]));
      const line = make("tr", "", make("th", "", data.layers[l]));
      line.firstChild.scope = "row";
      for (const e of columns) {
        const cell = make("td", `cell ${colour(e)}`, columns.length > 6 ? number(values[e]).replace(/^(-?)0/, "$1") : number(values[e]));
        cell.style.setProperty("--w", Math.max(0, Math.min(1, values[e] / data.high)).toFixed(3));
        cell.title = `${data.layers[l]}, ${data.experts[e]}: ${number(values[e])}`;
        line.append(cell);
      }
      const first = layerLeading[row * L + l];
      const who = first < 0 ? "no expert" : data.experts[first];
      line.append(make("td", "leads", make("i", `mark ${colour(first)}`), " ", make("bdi", "", who)));
      line.lastChild.title = who;
      rows.append(line);
    }
    return make("table", "layers", make("thead", "", head), rows);
  };
  const layerView = (token) => {
    const found = [make("h3", "", "Layers × experts")];
    if (data.shared) {
      return [...found, make("p", "shared", `One row for all layers: the ${data.adapted} adapted layers share one routing.`)];
    }
    const row = layerRow(token), nearest = layerTokens[row];
    if (nearest !== token) {
      const jump = make("button", "jump", `Go to the nearest token with layers, ${Math.abs(nearest - token)} ${nearest > token ? "on" : "back"}`);
      jump.type = "button";
      jump.addEventListener("click", () => { go(nearest); open(nearest); });
      return [...found, make("p", "", "Layers are here for a sample of the tokens, and this is none of them."), jump];
    }
    const columns = E <= MOST ? data.experts.map((_, e) => e) : ordered(weightsOf(token), leading[token]).slice(0, ACROSS);
    if (E > MOST) found.push(make("p", "faint", `${ACROSS} of ${E} experts: those with the largest weight in this token.`));
    const around = make("div", "across", layerTable(row, columns));
    around.tabIndex = 0;
    around.setAttribute("role", "region");
    around.setAttribute("aria-label", "Scalings by layer and expert");
    return [...found, around];
  };
  const open = (token) => {
    const before = opened;
    opened = token;
    if (before >= 0 && chunkOf(before).built) element(before).setAttribute("aria-expanded", "false");
    element(token).setAttribute("aria-expanded", "true");
    const share = (word) => (word / 65535).toFixed(2);
    body.replaceChildren(
      make("h2", "", make("span", "piece", shownPiece(data.pieces[token]))),
      make("p", "faint", make("bdi", "", data.texts[runOf(token)[1]] ?? ""), `, token ${position(token)}`),
      weightList(token, MOST),
      make("p", "faint", `Confidence ${share(confidence[token])} · entropy ${share(entropy[token])}`),
      ...layerView(token),
    );
    panel.hidden = false;
    document.body.classList.add("open");
    hideTip();
  };
  const close = () => {
    if (panel.hidden) return hideTip();
    if (opened >= 0) element(opened).setAttribute("aria-expanded", "false");
    opened = -1;
    panel.hidden = true;
    document.body.classList.remove("open");
    element(current).focus();
    hideTip();
  };

  // --- moving -------------------------------------------------------------------------------------------------------
  const become = (token) => {
    if (chunkOf(current).built) element(current).tabIndex = -1;
    const left = chunkOf(current);
    current = token;
    element(token).tabIndex = 0;
    if (left !== chunkOf(token)) { watcher.unobserve(left.box); watcher.observe(left.box); }
  };
  const SETTLING = 30;      // frames in which what is built around a token may move it
  let held = -1;            // the token that stays in the window meanwhile
  const hold = (token, frames, before) => {
    if (token !== held || frames === 0) return;
    const span = element(token), at = span.getBoundingClientRect();
    if (before === null || at.top < 0 || at.bottom > innerHeight) span.scrollIntoView({ block: "nearest", behavior: "instant" });
    const top = span.getBoundingClientRect().top;
    if (panel.hidden && (top !== before || tip.hidden)) showTip(span);
    requestAnimationFrame(() => hold(token, frames - 1, top));
  };
  const go = (token) => {
    become(token);
    element(token).focus({ preventScroll: true });
    if (!panel.hidden) open(token);
    held = token;
    still = pointer;
    hold(token, SETTLING, null);
  };
  /** The token of the line above or below whose middle is nearest to the one of this token. */
  const beside = (token, step) => {
    const at = element(token).getClientRects()[0], x = (at.left + at.right) / 2;
    let best = token, distance = Infinity, line = null;
    for (let i = token + step; i >= 0 && i < N && Math.abs(i - token) < 2000; i += step) {
      const box = element(i).getClientRects()[0];
      if (!box || Math.abs(box.top - at.top) < at.height / 2) continue;
      if (line === null) line = box.top;
      if (Math.abs(box.top - line) >= at.height / 2) break;
      const away = Math.abs((box.left + box.right) / 2 - x);
      if (away < distance) { distance = away; best = i; }
    }
    return best;
  };
  const KEYS = {
    ArrowRight: (t) => Math.min(N - 1, t + 1),
    ArrowLeft: (t) => Math.max(0, t - 1),
    ArrowDown: (t) => beside(t, 1),
    ArrowUp: (t) => beside(t, -1),
    Home: () => 0,
    End: () => N - 1,
    PageUp: (t) => Math.max(0, t - PAGE),
    PageDown: (t) => Math.min(N - 1, t + PAGE),
  };

  const tokenAt = (event) => event.target instanceof Element ? event.target.closest(".t") : null;
  let pointer = "", still = null;     // where the pointer is; where it was when the text below it went on
  const point = (event) => {
    pointer = `${event.clientX} ${event.clientY}`;
    if (pointer === still) return false;
    still = null;
    return event.pointerType !== "touch";
  };
  text.addEventListener("pointerover", (event) => {
    const span = tokenAt(event);
    if (point(event) && span) showTip(span);
  });
  document.addEventListener("pointermove", point);
  text.addEventListener("pointerout", () => { if (pointer !== still) hideTip(); });
  text.addEventListener("focusin", (event) => {
    const span = tokenAt(event);
    if (!span) return;
    become(span.token);
    if (panel.hidden && span.matches(":focus-visible")) showTip(span);
  });
  text.addEventListener("focusout", hideTip);
  text.addEventListener("click", (event) => {
    const span = tokenAt(event);
    if (!span) return;
    become(span.token);
    const top = span.getBoundingClientRect().top;
    open(span.token);
    scrollBy({ top: span.getBoundingClientRect().top - top, behavior: "instant" });   // the page has become narrower
    span.scrollIntoView({ block: "nearest", behavior: "instant" });
  });
  text.addEventListener("keydown", (event) => {
    const span = tokenAt(event);
    if (!span || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "Enter" || event.key === " ") open(span.token);
    else if (KEYS[event.key]) go(KEYS[event.key](span.token));
    else return;
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    still = pointer;
    if (event.key === "Escape") { held = -1; close(); }
  });
  for (const moved of ["wheel", "touchmove", "pointerdown"]) addEventListener(moved, () => { held = -1; }, { passive: true });
  byId("close").addEventListener("click", close);
  for (const strip of document.querySelectorAll(".strip")) {
    strip.addEventListener("click", (event) => {
      const box = strip.getBoundingClientRect(), columns = strip.viewBox.baseVal.width;
      go(tokenOfRow(Math.floor(((event.clientX - box.left) / box.width) * columns) * Number(strip.dataset.each)));
    });
  }
  window.addEventListener("scroll", () => {
    const span = document.activeElement, at = span.getBoundingClientRect();
    const inside = at.bottom > 0 && at.top < innerHeight;
    if (panel.hidden && inside && span.matches(".t:focus-visible")) showTip(span); else hideTip();
  }, { passive: true });
  element(current).tabIndex = 0;
})();
