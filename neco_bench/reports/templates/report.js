"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const columns = data.columns.map((column, number) => ({ ...column, number })), results = data.results;
const $ = id => document.getElementById(id);
const chosen = { classes: null, classModel: null, quality: null, setting: null, papers: true };  // what the sections' own menus say
const sorting = new Map();  // table -> [column, direction]
const MOST = 40;  // rows of a plot
const at = new Map(results.map(r => [r.column + "\n" + r.model, r]));
const get = (model, column) => at.get(column.number + "\n" + model);
const real = (value, column) => value === null || value === undefined ? null : value / 10 ** column.digits;
const shownAs = (value, column) => value === null ? "" : real(value, column).toFixed(column.digits);
const textOf = result => result.text || shownAs(result.value, columns[result.column]);
const sign = column => column.lower ? -1 : 1;
const distinct = (list, of) => [...new Set(list.map(of))].sort();
const unit = column => column.unit === "percent" ? "%" : column.unit === "ratio" ? "" : column.unit;

function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes))
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value); else if (value !== null) made.setAttribute(name, value);
  made.append(...children.filter(child => child !== null && child !== undefined));
  return made;
}

function breakable(text) {  // may wrap after the marks inside names
  return text.split(/(?<=[_@/:.?&=-])/).flatMap((part, i) => i ? [node("wbr"), part] : [part]);
}

function choice(id, values, value, change) {  // values: [value, text]
  return node("select", { id, onchange: event => { change(event.target.value); show(); } },
    ...values.map(([own, text]) => node("option", { value: own, selected: String(own) === String(value) ? "" : null }, text)));
}

// ---- plots ----

const pen = document.createElement("canvas").getContext("2d");
pen.font = "12px system-ui, sans-serif";

function wrapped(text, width) {  // lines of at most so many pixels: names are never cut
  const lines = [""];
  for (const part of text.split(/(?<=[_@/:.?&=\s-])/)) {
    if (lines.at(-1) && pen.measureText(lines.at(-1) + part).width > width) lines.push("");
    for (const letter of part) {
      if (lines.at(-1) && pen.measureText(lines.at(-1) + letter).width > width) lines.push("");
      lines[lines.length - 1] += letter;
    }
  }
  return lines.join("\n");
}

const watch = new IntersectionObserver(entries => entries.filter(e => e.isIntersecting).forEach(e => e.target.draw()), { rootMargin: "600px" });
const drawAll = () => document.querySelectorAll(".plot").forEach(box => box.draw());
addEventListener("beforeprint", drawAll);
addEventListener("resize", () => document.querySelectorAll(".plot").forEach(box => { if (box.drawn) box.draw(); }));

function plot(make, height) {  // drawn when it comes near the window, and again when its width changes
  const box = node("div", { class: "plot", style: `min-height:${height}px` });
  box.draw = () => {
    const width = Math.floor(box.clientWidth) || 640;
    if (box.drawn === width) return;
    box.drawn = width;
    box.replaceChildren(make(width));
    box.style.minHeight = "";
  };
  watch.observe(box);
  return box;
}

// How a state is drawn: never by colour alone.
const STATES = {
  best: ["first, according to tests", { symbol: "star", fill: "var(--mark)", r: 6 }],
  may: ["may be first: tests do not exclude it", { symbol: "circle", fill: "var(--mark)", r: 4 }],
  rest: ["not first, according to tests", { symbol: "circle", fill: "var(--paper)", stroke: "var(--ink)", r: 4 }],
  plain: ["not tested", { symbol: "square", fill: "var(--ink)", r: 3.5 }],
  paper: ["published", { symbol: "diamond", fill: "var(--paper)", stroke: "var(--faint)", r: 4 }],
  better: ["better than the base (p < 0.05)", { symbol: "triangle", fill: "var(--mark)", r: 5 }],
  worse: ["worse than the base (p < 0.05)", { symbol: "triangle", rotate: 180, fill: "var(--warm)", r: 5 }],
  open: ["no significant difference from the base", { symbol: "circle", fill: "var(--paper)", stroke: "var(--ink)", r: 4 }],
  base: ["the base", { symbol: "cross", fill: "var(--warm)", r: 5 }],
};

function legend(states) {
  const mark = state => Plot.plot({ width: 14, height: 14, margin: 0, axis: null, x: { domain: [-1, 1] }, y: { domain: [-1, 1] }, marks: [Plot.dot([0], { x: 0, y: 0, ...STATES[state][1] })] });
  return node("div", { class: "legend" }, ...states.map(state => { const made = node("span", {}, mark(state), " " + STATES[state][0]); made.firstChild.setAttribute("aria-hidden", "true"); return made; }));
}

function dots(rows, { width, axis, zero, label, papers }) {  // rows: name, value, low, high, state, title
  const text = new Map(), most = Math.min(280, width * 0.45);  // of a name in pixels
  for (const row of rows) if (!text.has(row.name)) text.set(row.name, wrapped(row.label || row.name, most));
  const left = Math.max(30, ...[...text.values()].flatMap(name => name.split("\n")).map(line => pen.measureText(line).width)) + 10;
  let bottom = 0;
  const names = [...text].map(([name, own]) => { const tall = 14 * own.split("\n").length + 6; bottom += tall; return { name, text: own, y: bottom - tall / 2 }; });
  const place = new Map(names.map(name => [name.name, name.y])), y = row => place.get(row.name);
  const ends = rows.flatMap(row => [row.value, row.low, row.high]).filter(value => value !== null && value !== undefined);
  const [low, high] = d3.extent(zero === undefined ? ends : [...ends, zero]), room = (high - low || Math.abs(high) || 1) * 0.06;
  const whiskers = rows.filter(row => row.low !== null && row.low !== undefined && row.high !== null && row.high !== undefined);
  const cap = side => Plot.ruleX(whiskers, { x: side, y1: row => y(row) - 4, y2: row => y(row) + 4, stroke: "var(--ink)", strokeWidth: 1.5 });
  return Plot.plot({
    width, height: bottom + 44, marginLeft: left, marginRight: 14, marginTop: 4, marginBottom: 40, ariaLabel: label,
    style: { background: "transparent", color: "inherit", fontSize: "12px", overflow: "visible" },
    x: { domain: [low - room, high + room], grid: true, label: axis, labelArrow: "none", labelAnchor: "right", ticks: Math.max(2, Math.floor((width - left) / 60)) },
    y: { type: "linear", domain: [bottom, 0], axis: null },
    marks: [
      Plot.text(names, { y: "y", text: "text", frameAnchor: "left", textAnchor: "end", dx: -6 }),
      zero === undefined ? null : Plot.ruleX([zero], { stroke: "var(--ink)" }),
      Plot.ruleY(whiskers, { x1: "low", x2: "high", y, stroke: "var(--ink)", strokeWidth: 1.5 }), cap("low"), cap("high"),
      ...distinct(rows, row => row.state).map(state => Plot.dot(rows.filter(row => row.state === state), { x: "value", y, ...STATES[state][1] })),
      Plot.tip(rows, Plot.pointer({ x: "value", y, title: "title", maxRadius: 25 })),
    ].filter(Boolean),
  });
}

const axisOf = column => [column.metric, unit(column), column.lower ? "lower is better" : ""].filter(Boolean).join(", ");

function stateOf(result) {
  if (data.published || !result.rank || columns[result.column].how === "not tested") return "plain";
  return result.rank[1] === 1 ? "best" : result.rank[0] === 1 ? "may" : "rest";
}

const rankText = result => !result.rank ? null : result.rank[0] === result.rank[1] ? `rank ${result.rank[0]}` : `rank ${result.rank[0]}..${result.rank[1]} left open`;

function intervalText(result) {
  const column = columns[result.column];
  return [result.spread, result.low === null || result.low === undefined ? null : `[${shownAs(result.low, column)}, ${shownAs(result.high, column)}]`].filter(Boolean).join(" ");
}

function columnRows(column, models) {
  const rows = results.filter(r => r.column === column.number && r.value !== null && models.has(r.model)).map(r => ({
    name: r.model, value: real(r.value, column), low: real(r.low, column), high: real(r.high, column), state: stateOf(r),
    title: [r.model, `${textOf(r)} ${intervalText(r)}`, rankText(r), r.over && `over ${r.over}`, r.marks, r.source].filter(Boolean).join("\n"),
  }));
  if (chosen.papers) for (const paper of column.papers || []) if (shownPaper(paper, models))
    rows.push({ name: paper.model, label: rows.some(row => row.name === paper.model) ? null : `${paper.model} (published)`, value: paper.value, low: null, high: null, state: "paper", title: `${paper.model}, ${paper.arch}, published: ${paper.text}\n${paper.source}` });
  rows.sort((a, b) => sign(column) * (b.value - a.value));
  const labels = new Map(rows.filter(row => row.state !== "paper").map(row => [row.name, row.name]));
  for (const row of rows) row.label = labels.get(row.name) || row.label;
  return rows;
}

const shownPaper = (paper, models) => models.has(paper.model) || (!data.models.includes(paper.model) && paper.model.toLowerCase().includes($("search").value.toLowerCase()));

function panel(column, models) {
  const rows = columnRows(column, models), names = [...new Set(rows.map(row => row.name))].slice(0, MOST);
  if (!names.length) return null;
  const part = rows.filter(row => names.includes(row.name)), more = new Set(rows.map(row => row.name)).size - names.length;
  return node("figure", {}, node("figcaption", {}, node("small", {}, `${column.family.replaceAll("_", " ")}: `), ...breakable(column.name), node("small", {}, ` ${column.how || ""}`)),
    plot(width => dots(part, { width, axis: axisOf(column), label: `${column.name}: ${column.metric} of ${names.length} models` }), names.length * 20 + 44),
    more > 0 ? node("p", { class: "note" }, `The first ${MOST}; ${more} more are in the table.`) : null);
}

// ---- sections ----

function standing(shown, models) {  // over all columns: what is printed, and what the tests leave open
  const ranked = shown.filter(column => column.kind === "" && column.how !== null);
  const all = new Map();
  for (const column of ranked) {
    const rows = results.filter(r => r.column === column.number && r.rank && r.value !== null), others = rows.length - 1;
    for (const r of rows) {
      const ahead = d3.sum(rows, o => o === r ? 0 : sign(column) * (o.value - r.value) < 0 ? 1 : o.value === r.value ? 0.5 : 0);
      const own = all.get(r.model) || { share: [], low: [], high: [], first: 0, may: 0 };
      all.set(r.model, own);
      own.share.push(ahead / others); own.low.push((rows.length - r.rank[1]) / others); own.high.push(1 - (r.rank[0] - 1) / others);
      if (r.rank[0] === 1) { if (r.rank[1] === 1) own.first += 1; else own.may += 1; }
    }
  }
  return [...all].filter(([model]) => models.has(model)).map(([name, own]) => ({
    name, value: 100 * d3.mean(own.share), low: 100 * d3.mean(own.low), high: 100 * d3.mean(own.high), first: own.first, may: own.may, number: own.share.length, of: ranked.length,
    state: own.first + own.may === own.share.length ? (own.may ? "may" : "best") : own.first + own.may ? "may" : "rest",
    title: `${name}\nbetter value than ${(100 * d3.mean(own.share)).toFixed(0)} % of the others\nfirst alone in ${own.first}, may be first in ${own.may} more, of ${own.share.length} columns`,
  })).sort((a, b) => b.value - a.value || (a.name < b.name ? -1 : 1));
}

function ranking(shown, models) {
  const parts = [], rows = standing(shown, models);
  if (rows.length > 1) {
    parts.push(node("p", { class: "note" }, "All shown columns together. Dot: the share of the other models with a worse value, averaged over columns (not a test). Whisker: the range that paired tests leave possible, from the share of models shown to be worse to the share not shown to be better. This summarises the columns below, whose tasks differ, and is not a test itself."));
    const part = rows.slice(0, MOST).map(row => ({ ...row, state: "plain" }));
    parts.push(plot(width => dots(part, { width: Math.min(width, 980), axis: "other models with a worse value, %", label: "standing of models over all columns" }), part.length * 20 + 44));
    parts.push(node("div", { class: "wide" }, node("table", { id: "standing" }, node("thead", {}, node("tr", {}, ...["model", "first alone", "may be first (tie)", "columns", "worse values"].map(text => node("th", {}, text)))),
      node("tbody", {}, ...rows.map(row => node("tr", {}, nameCell(row.name), ...[row.first, row.may, `${row.number} of ${row.of}`, `${row.value.toFixed(0)} %`].map(value => node("td", {}, String(value)))))))));
  }
  const made = families(shown).map(([family, kind, own]) => [family, kind, own.map(column => panel(column, models)).filter(Boolean)]).filter(([, , panels]) => panels.length);
  if (!made.length) return null;
  const papers = shown.some(column => (column.papers || []).length);
  parts.push(data.published ? "" : legend(["best", "may", "rest", "plain", ...(papers ? ["paper"] : [])]));
  parts.push(node("div", { class: "panels" }, ...made.flatMap(([, , panels]) => panels)));
  return section("ranking", data.published ? "Numbers" : "Ranking", ...parts);
}

function families(shown) {
  return distinct(shown, c => c.family).flatMap(family => distinct(shown.filter(c => c.family === family), c => c.kind).map(kind => [family, kind, shown.filter(c => c.family === family && c.kind === kind)]));
}

const section = (id, title, ...children) => node("section", { id: "section-" + id, "aria-label": title }, node("h2", { tabindex: "-1" }, title), ...children);
const nameCell = model => node("td", {}, node("a", { href: "#" + encodeURIComponent(model) }, ...breakable(model)));

function heat(shown, models) {
  const own = shown.filter(column => results.some(r => r.column === column.number && models.has(r.model)));
  if (own.length < 2 || own.length > 60 || models.size < 2) return null;
  const order = standing(shown, models).map(row => row.name), rows = [...order, ...[...models].filter(model => !order.includes(model))].filter(model => own.some(column => get(model, column)));
  const scales = new Map(own.map(column => {
    const ends = d3.extent(results.filter(r => r.column === column.number && r.value !== null), r => r.value);
    return [column, d3.scaleSequential(column.lower ? [...ends].reverse() : ends, d3.interpolateCividis)];
  }));
  const shade = (r, column) => {
    if (!r || r.value === null) return node("td", {}, r ? (r.error === "ambiguous" ? "ambiguous" : "failed") : "");
    const colour = d3.color(scales.get(column)(r.value));
    return node("td", { style: `background:${colour.formatRgb()};color:${d3.lab(colour).l > 55 ? "#000" : "#fff"}`, title: [r.model, column.name, intervalText(r), rankText(r)].filter(Boolean).join("\n") }, textOf(r));
  };
  return section("heat", "Heat map", node("p", { class: "note" }, "Each column is coloured from its worst (dark blue) to its best value (yellow) over all its models, independent of the filters. Colours are not a test: the values of a column may differ by one point or by thirty."),
    node("div", { class: "wide heat" }, node("table", {}, node("thead", {}, node("tr", {}, node("th", {}, "model"), ...own.map(column => node("th", {}, ...breakable(column.name), column.legend ? ` (${column.legend})` : "")))),
      node("tbody", {}, ...rows.map(model => node("tr", {}, nameCell(model), ...own.map(column => shade(get(model, column), column))))))));
}

function badges(result) {
  const seen = result.seen && node("span", { class: "badge" + (["seen", "near", "possible"].includes(result.seen) ? " warn" : ""), title: "known overlap of the encoder's training images with those of the data set" }, `overlap: ${result.seen}`);
  const tokens = result.tokens && node("span", { class: "badge", title: "tokens per image" }, `${result.tokens} tok.`);
  const link = result.pictures && node("a", { class: "badge", href: result.pictures }, "pictures");
  return seen || tokens || link ? node("span", { class: "badges" }, seen || null, tokens || null, link || null) : null;
}

function cell(result, papers = []) {
  const published = papers.map(paper => node("span", { class: "paper interval", title: paper.source }, ` published ${paper.text}`));
  if (!result) return node("td", { class: published.length ? "paper" : null }, ...published);
  if (result.value === null) return node("td", { title: result.error || "" }, result.error === "ambiguous" ? "ambiguous" : "failed", ...published);
  const beside = [intervalText(result), result.marks ? "†" : null].filter(Boolean).join(" "), state = stateOf(result);
  const title = [rankText(result), result.over && `interval over ${result.over}`, result.marks, result.source].filter(Boolean).join("; ");
  return node("td", { class: ["best", "may"].includes(state) ? state : null, title: title || null }, textOf(result), beside ? node("span", { class: "interval" }, " " + beside) : null, ...published, badges(result));
}

function leaderboard(family, kind, shown, models) {
  const papers = column => chosen.papers ? column.papers || [] : [];
  const measured = [...models].filter(model => shown.some(column => get(model, column)));
  const printed = [...new Set(shown.flatMap(papers).filter(paper => shownPaper(paper, models)).map(paper => paper.model))].filter(model => !measured.includes(model)).sort();
  if (!measured.length && !printed.length) return null;
  const key = family + kind, [by, direction] = sorting.get(key) || [null, -1], order = new Map(data.orders[key].map((model, i) => [model, i]));
  const score = model => { const r = by === null ? null : get(model, columns[by]); return r && r.value !== null ? sign(columns[by]) * r.value : -Infinity; };
  measured.sort((a, b) => by === "model" ? direction * (a < b ? 1 : -1) : by !== null && score(a) !== score(b) ? direction * (score(a) - score(b)) : order.get(a) - order.get(b));
  const sort = column => () => { sorting.set(key, by === column ? [column, -direction] : [column, -1]); show(); };
  const sorted = column => by === column ? (direction < 0 ? "descending" : "ascending") : null;
  const arrow = column => by === column ? (direction < 0 ? " ↓" : " ↑") : "";
  const head = [node("th", { "aria-sort": sorted("model") }, node("button", { onclick: sort("model") }, "model" + arrow("model"))), ...shown.map(column =>
    node("th", { title: [column.metric, column.legend].filter(Boolean).join(", "), "aria-sort": sorted(column.number) }, node("button", { onclick: sort(column.number) }, ...breakable(column.name), (column.legend ? ` (${column.legend})` : "") + arrow(column.number))))];
  const body = measured.map(model => node("tr", {}, nameCell(model), ...shown.map(column => cell(get(model, column), papers(column).filter(paper => paper.model === model)))));
  const grey = printed.map(model => node("tr", { class: "paper" }, node("td", {}, ...breakable(model), " (published)"), ...shown.map(column => cell(null, papers(column).filter(paper => paper.model === model)))));
  return node("div", { class: "board" }, node("h3", {}, family.replaceAll("_", " ") + (kind ? `: ${kind}` : "")),
    node("div", { class: "wide" }, node("table", {}, node("thead", {}, node("tr", {}, ...head)), node("tbody", {}, ...body, ...grey))));
}

function tables(shown, models) {
  const made = families(shown).map(([family, kind, own]) => leaderboard(family, kind, own, models)).filter(Boolean);
  if (!made.length) return null;
  const papers = columns.some(column => (column.papers || []).length);
  const box = node("input", { type: "checkbox", id: "papers", checked: chosen.papers ? "" : null, onchange: event => { chosen.papers = event.target.checked; show(); } });
  return section("tables", "Tables", data.published ? null : node("p", { class: "note" }, "Coloured: may be first, because tests do not exclude it. Coloured and bold: first (p < 0.05 after Holm against every other model of the column). Badges: tokens per image; overlap of the encoder's training images with the data set: seen, near (found by retrieval from it), possible (a crawl of the web), none known, unknown."),
    papers ? node("div", { class: "picks" }, node("label", {}, box, "published numbers of the same column, in grey")) : null, ...made);
}

function differences(shown, models, base) {
  const b = data.models.indexOf(base);
  if (b < 0) return null;
  const panels = shown.filter(column => get(base, column) && get(base, column).value !== null).map(column => {
    const pairs = new Map((data.differences[column.number] || []).filter(row => row[0] === b || row[1] === b).map(row => [row[0] === b ? row[1] : row[0], row]));
    const rows = results.filter(r => r.column === column.number && r.value !== null && r.model !== base && models.has(r.model)).map(r => difference(r, column, base, b, pairs)).slice(0, MOST);
    if (!rows.length) return null;
    rows.sort((x, y) => sign(column) * (y.value - x.value));
    return node("figure", {}, node("figcaption", {}, ...breakable(column.name), node("small", {}, column.how ? ` ${column.how}` : "")),
      plot(width => dots(rows, { width, zero: 0, axis: `difference in ${axisOf(column)}`, label: `differences to ${base}: ${column.name}` }), rows.length * 20 + 44));
  }).filter(Boolean);
  if (!panels.length) return null;
  return section("differences", `Differences to ${base}`, node("p", { class: "note" }, "Model minus base on the same items, with the 95 % interval of the paired difference; p is adjusted for all pairs of the column (Holm). No whisker: no counts are stored to compute it."), legend(["better", "worse", "open", "plain"]), node("div", { class: "panels" }, ...panels));
}

function difference(r, column, base, b, pairs) {  // of a result and the base: paired where that is known, else of the printed values
  const pair = pairs.get(data.models.indexOf(r.model)), turn = pair && pair[1] === b ? -1 : 1, base_value = get(base, column).value;
  const value = pair ? turn * pair[2] : r.value - base_value, ends = pair && pair[3] !== null && pair[4] !== null ? [turn * pair[3], turn * pair[4]].sort((x, y) => x - y) : [null, null];
  const state = !pair || column.how === "not tested" ? "plain" : !pair[5] ? "open" : sign(column) * value > 0 ? "better" : "worse";
  const text = shownAs(value, column).replace(/^(?=\d)/, "+") + (ends[0] === null ? "" : ` [${shownAs(ends[0], column)}, ${shownAs(ends[1], column)}]`);
  return { name: r.model, value: real(value, column), low: real(ends[0], column), high: real(ends[1], column), state, text, title: `${r.model}\n${text}\n${STATES[state][0]}` };
}

function throughput(shown, models) {
  const own = shown.filter(column => results.some(r => r.column === column.number && r.value !== null));
  if (data.published || !own.length) return null;
  if (!data.speeds.length) return section("throughput", "Quality and throughput", node("p", { class: "note" }, "No throughput is stored with these results: neco-bench speed MODEL measures it."));
  const settings = distinct(data.speeds, s => s.setting), setting = settings.includes(chosen.setting) ? chosen.setting : settings[0];
  const column = own.find(c => c.number === Number(chosen.quality) && chosen.quality !== null) || own[0];
  const rows = data.speeds.filter(s => s.setting === setting && models.has(s.model) && get(s.model, column) && get(s.model, column).value !== null).map(s => {
    const r = get(s.model, column);
    return { ...s, name: s.model, value: real(r.value, column), low: real(r.low, column), high: real(r.high, column), text: `${textOf(r)} ${intervalText(r)}` };
  }).sort((a, b) => b.images - a.images || sign(column) * (b.value - a.value));
  let most = -Infinity;
  for (const row of rows) { row.front = sign(column) * row.value > most; most = Math.max(most, sign(column) * row.value); row.title = `${row.name}\n${row.text}\n${row.images} images/s, ${row.params} M parameters`; }
  const picks = node("div", { class: "picks" }, node("label", {}, "quality: ", choice("quality", own.map(c => [c.number, c.name]), column.number, value => { chosen.quality = value; })),
    node("label", {}, "throughput: ", choice("setting", settings.map(s => [s, s]), setting, value => { chosen.setting = value; })));
  if (!rows.length) return section("throughput", "Quality and throughput", picks, node("p", { class: "note" }, "No model has both numbers."));
  const middle = rows.length > 1 ? Math.sqrt(rows[0].images * rows.at(-1).images) : Infinity, named = rows.length <= 14 ? rows : rows.filter(row => row.front);
  const draw = width => Plot.plot({
    width: Math.min(width, 980), height: 380, marginLeft: 50, marginRight: 20, marginBottom: 44, marginTop: 24, grid: true, ariaLabel: `${column.name} against images per second`,
    style: { background: "transparent", color: "inherit", fontSize: "12px", overflow: "visible" },
    x: { type: "log", label: "images per second, higher is faster", labelArrow: "none", labelAnchor: "center", tickFormat: "~s", nice: true, ticks: 4 }, y: { label: axisOf(column), labelArrow: "none", inset: 14, reverse: column.lower },
    marks: [
      Plot.line(rows.filter(row => row.front), { x: "images", y: "value", stroke: "var(--mark)", strokeDasharray: "5 3" }),
      Plot.ruleX(rows.filter(row => row.low !== null), { x: "images", y1: "low", y2: "high", stroke: "var(--faint)" }),
      Plot.dot(rows.filter(row => !row.front), { x: "images", y: "value", ...STATES.rest[1] }), Plot.dot(rows.filter(row => row.front), { x: "images", y: "value", ...STATES.may[1] }),
      ...[[row => row.images < middle, "start", 9], [row => row.images >= middle, "end", -9]].map(([side, textAnchor, dx]) => Plot.text(named.filter(side), { x: "images", y: "value", text: row => wrapped(row.name, width * 0.35), textAnchor, dx, fill: "currentColor", stroke: "var(--paper)", strokeWidth: 4 })),
      Plot.tip(rows, Plot.pointer({ x: "images", y: "value", title: "title" })),
    ],
  });
  const cells = row => [row.front ? "yes" : "", row.text, row.images, row.gflops, row.params, row.memory].map(value => node("td", {}, String(value)));
  return section("throughput", "Quality and throughput", node("p", { class: "note" }, "Dashed: the Pareto front by printed values, i.e. models that no other model exceeds in both. Whiskers: 95 % interval."), picks, plot(draw, 380),
    node("div", { class: "wide" }, node("table", {}, node("thead", {}, node("tr", {}, ...["model", "on the front", axisOf(column), "images/s", "GFLOP per image", "million parameters", "peak memory, MiB"].map(text => node("th", {}, text)))), node("tbody", {}, ...rows.map(row => node("tr", {}, nameCell(row.model), ...cells(row)))))));
}

function classRows(result, other) {
  const column = columns[result.column], of = (r, i, side) => r.class_ends ? real(r.class_ends[side][i], column) : null;
  const one = (r, state) => column.classes.map((name, i) => ({ name, value: real(r.classes[i], column), low: of(r, i, 0), high: of(r, i, 1), state, title: `${name}\n${r.model}: ${shownAs(r.classes[i], column)}${of(r, i, 0) === null ? "" : ` [${shownAs(r.class_ends[0][i], column)}, ${shownAs(r.class_ends[1][i], column)}]`}` })).filter(row => row.value !== null);
  const rows = one(result, "may").sort((a, b) => sign(column) * (b.value - a.value)), names = new Set(rows.map(row => row.name));
  return other && other.classes ? [...rows, ...one(other, "base").filter(row => names.has(row.name))] : rows;
}

function classPlot(result, base) {
  const column = columns[result.column], rows = classRows(result, base && base !== result.model ? get(base, column) : null);
  return plot(width => dots(rows, { width: Math.min(width, 980), axis: axisOf(column), label: `classes of ${column.name}, ${result.model}` }), new Set(rows.map(row => row.name)).size * 19 + 44);
}

function classes(shown, models, base) {
  const own = shown.filter(column => column.classes && results.some(r => r.column === column.number && r.classes && models.has(r.model)));
  if (!own.length) return null;
  const column = own.find(c => chosen.classes !== null && c.number === Number(chosen.classes)) || own[0];
  const names = data.orders[column.family + column.kind].filter(model => models.has(model) && get(model, column) && get(model, column).classes);
  const model = names.includes(chosen.classModel) ? chosen.classModel : names[0], result = get(model, column);
  const absent = column.classes.filter((_, i) => result.classes[i] === null);
  return section("classes", "Classes", node("div", { class: "picks" }, node("label", {}, "of ", choice("classes", own.map(c => [c.number, c.name]), column.number, value => { chosen.classes = value; })), node("label", {}, "model ", choice("class-model", names.map(name => [name, name]), model, value => { chosen.classModel = value; }))),
    node("p", { class: "note" }, `Whiskers: 95 % interval${result.class_ends ? "" : " (none: no counts are stored)"}.` + (base && base !== model ? ` Cross: ${base}.` : "") + (absent.length ? ` Undefined: ${absent.join(", ")}.` : "")), classPlot(result, base));
}

function curves() {
  if (!(data.curves || []).length) return null;
  const dashes = ["0", "6 3", "2 3", "8 3 2 3"], colours = ["var(--mark)", "var(--warm)", "var(--ink)", "var(--faint)"];
  const names = distinct(data.curves, curve => curve.name), style = name => ({ stroke: colours[names.indexOf(name) % 4], strokeDasharray: dashes[Math.floor(names.indexOf(name) / 4 + names.indexOf(name)) % 4] });
  const groups = [];  // curves of one value whose ranges meet share a plot; losses of different recipes rarely do
  for (const curve of data.curves) {
    const [low, high] = d3.extent(curve.points, point => point[1]), group = groups.find(g => g.value === curve.value && g.low <= high && low <= g.high);
    if (group) { group.own.push(curve); group.low = Math.min(low, group.low); group.high = Math.max(high, group.high); } else groups.push({ value: curve.value, own: [curve], low, high });
  }
  const figures = groups.map(({ value, own }) => {
    const draw = width => Plot.plot({ width, height: 260, marginLeft: 50, marginRight: 14, marginBottom: 40, marginTop: 22, grid: true, ariaLabel: `${value} by step`, style: { background: "transparent", color: "inherit", fontSize: "12px", overflow: "visible" },
      x: { label: "step", labelArrow: "none", labelAnchor: "center" }, y: { label: value, labelArrow: "none" },
      marks: own.map(curve => Plot.line(curve.points, { x: "0", y: "1", ...style(curve.name), title: () => curve.name })) });
    const keys = own.map(curve => { const key = node("span", {}, Plot.plot({ width: 34, height: 14, margin: 0, axis: null, x: { domain: [0, 1] }, y: { domain: [0, 1] }, marks: [Plot.line([[0, 0.5], [1, 0.5]], style(curve.name))] }), " " + curve.name); key.firstChild.style.width = "34px"; return key; });
    return node("figure", {}, node("figcaption", {}, ...breakable(value)), plot(draw, 260), node("div", { class: "legend" }, ...keys));
  });
  return section("curves", "Training curves", node("p", { class: "note" }, "Each curve shows means over at most 200 equal parts of the steps."), node("div", { class: "panels" }, ...figures));
}

function modelPage(model) {
  const mine = results.filter(r => r.model === model).sort((a, b) => a.column - b.column), base = $("base").value === model ? "" : $("base").value, b = data.models.indexOf(base);
  const page = node("section", { id: "section-model" }, node("p", {}, node("a", { href: "#" }, "← all models")), node("h2", { tabindex: "-1" }, ...breakable(model)));
  if (base) {
    const rows = mine.map(r => [r, get(base, columns[r.column])]).filter(([r, o]) => o && r.value !== null && o.value !== null);
    const change = r => { const column = columns[r.column]; return difference(r, column, base, b, new Map((data.differences[column.number] || []).filter(row => row[0] === b || row[1] === b).map(row => [row[0] === b ? row[1] : row[0], row]))); };
    page.append(node("div", { class: "wide" }, node("table", {}, node("thead", {}, node("tr", {}, ...["task", base, model, "difference"].map(t => node("th", {}, ...breakable(t))))),
      node("tbody", {}, ...rows.map(([r, o]) => { const own = change(r); return node("tr", {}, node("td", {}, ...breakable(columns[r.column].name)), cell(o), cell(r), node("td", { title: STATES[own.state][0] }, own.text, own.state === "better" || own.state === "worse" ? node("span", { class: "interval" }, ` ${own.state}`) : null)); })))),
      node("p", { class: "note" }, "In the unit of the metric. Better or worse: p < 0.05 in the paired test, adjusted for all pairs of the column."));
  }
  for (const r of mine) {
    const column = columns[r.column];
    const open = node("details", {}, node("summary", {}, node("strong", {}, ...breakable(column.name)), ` ${column.metric} `, ...cell(r).childNodes, rankText(r) ? ` ${rankText(r)}` : "", r.error ? ` ${r.error}` : "", r.source ? ` ${r.source}` : ""));
    open.addEventListener("toggle", () => {
      if (open.childElementCount > 1) return;
      if (r.classes) { open.append(classPlot(r, base)); open.lastChild.draw(); }
      if (r.own) open.append(node("pre", {}, JSON.stringify({ ...data.provenance[r.provenance], ...r.own }, null, 1)));
    });
    page.append(open);
  }
  return page;
}

function show() {
  const model = decodeURIComponent(location.hash.slice(1)), focused = document.activeElement && document.activeElement.id;
  if (data.models.includes(model)) { $("nav").replaceChildren(); $("main").replaceChildren(modelPage(model)); return; }
  const part = $("search").value.toLowerCase(), models = new Set(data.models.filter(name => name.toLowerCase().includes(part)));
  const [family, dataset, protocol] = ["family", "dataset", "protocol"].map(id => $(id).value), base = $("base").value;
  const shown = columns.filter(column => (!family || column.family === family) && (!dataset || column.dataset === dataset) && (!protocol || column.protocol === protocol));
  const sections = [ranking(shown, models), differences(shown, models, base), heat(shown, models), tables(shown, models), throughput(shown, models), classes(shown, models, base), curves()].filter(Boolean);
  const fits = sections.some(made => ["section-ranking", "section-tables"].includes(made.id));
  $("main").replaceChildren(...(fits ? sections : [node("p", {}, columns.length ? "No results match these filters." : "There are no results."), ...sections.filter(made => made.id === "section-curves")]));
  $("nav").replaceChildren(...(fits ? sections : []).map(made => node("button", { onclick: () => { made.firstChild.scrollIntoView(); made.firstChild.focus(); } }, made.firstChild.textContent)));
  if (focused && $(focused)) $(focused).focus();
}

function options(id, values, first) {
  $(id).replaceChildren(node("option", { value: "" }, first), ...values.map(value => node("option", { value }, value)));
  $(id).addEventListener("change", show);
}

options("family", distinct(columns, c => c.family), "all");
options("dataset", distinct(columns, c => c.dataset), "all");
options("protocol", distinct(columns, c => c.protocol), "all");
options("base", data.models, "nothing");
$("compared").hidden = $("family").parentElement.hidden = data.published;
$("search").addEventListener("input", show);
$("about").textContent = data.published
  ? `${results.length} numbers of papers, model cards and READMEs, ${data.models.length} models, ${columns.length} columns: a protocol, a data set or setting, and a metric. Numbers of different protocols are not comparable. Numbers are percent, and higher is better, unless the column header states otherwise. Point at a number for its source.`
  : `${data.models.length} models, ${columns.length} columns, ${results.length} results. Numbers are percent, and higher is better, unless the column header states otherwise; 95 % intervals are in brackets. † The conditions differ from those of the other numbers: point at the cell for details. Filters hide models and columns, but change no marks. Click a heading to sort, or a model to open it.`;
$("theme").addEventListener("click", () => {
  const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
});
window.addEventListener("hashchange", () => { show(); scrollTo(0, 0); });
show();
