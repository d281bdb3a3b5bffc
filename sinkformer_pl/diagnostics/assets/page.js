"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const ALL = "all";
const state = { sample: 0, layer: 0, head: ALL, query: ALL, log: false };
const font = { family: 'system-ui, "Segoe UI", "DejaVu Sans", sans-serif', size: 12, color: "#1f2933" };
const quiet = { displayModeBar: false, responsive: true };
const base = { font, margin: { l: 56, r: 12, t: 10, b: 44 }, paper_bgcolor: "#fff", plot_bgcolor: "#fff" };
const axis = (title, more) => ({ title: { text: title, standoff: 10 }, automargin: true, gridcolor: "#eceff2", zeroline: false, ...more });
const legend = { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" };
/** Of an axis of whole numbers: where they are few, plotly would put ticks between them. */
const whole = (count) => (count < 12 ? { dtick: 1 } : {});

// float16 to numbers, by a table of all of them.
const halves = Float32Array.from({ length: 65536 }, (_, bits) => {
  const exponent = (bits >> 10) & 31, fraction = bits & 1023;
  const size = exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
  return bits & 32768 ? -size : size;
});
const decoded = new Map();
function weights(sample, layer) {
  const key = `${sample}/${layer}`;
  if (!decoded.has(key)) {
    const bytes = Uint8Array.from(atob(data.samples[sample].layers[layer].weights), (c) => c.charCodeAt(0));
    decoded.set(key, Float32Array.from(new Uint16Array(bytes.buffer), (bits) => halves[bits]));
  }
  return decoded.get(key);
}

/** The Q x K matrix of the chosen sample, layer and head; the mean over the heads where all are chosen. */
function matrix() {
  const { queries, keys } = data.samples[state.sample].layers[state.layer];
  const all = weights(state.sample, state.layer), heads = data.layers[state.layer].heads;
  const chosen = state.head === ALL ? [...Array(heads).keys()] : [state.head];
  return Array.from({ length: queries }, (_, q) =>
    Float64Array.from({ length: keys }, (_, k) => {
      let sum = 0;
      for (const head of chosen) sum += all[(head * queries + q) * keys + k];
      return sum / chosen.length;
    }));
}
const columnMeans = (rows) => Float64Array.from(rows[0], (_, k) => rows.reduce((sum, row) => sum + row[k], 0) / rows.length);
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
const heaviest = (values) => values.reduce((best, value, place) => (value > values[best] ? place : best), 0);
const short = (value) => (value === null ? "" : value === 0 ? "0" : Math.abs(value) >= 0.001 && Math.abs(value) < 10000 ? String(+value.toPrecision(4)) : value.toExponential(2));

/** What number i of a side of the chosen layer is called. */
function label(kind, i) {
  const tokens = data.samples[state.sample].tokens;
  if (kind !== "token") return `${kind} ${i}`;
  if (i < tokens.leading) return "class token";
  const place = i - tokens.leading;
  if (tokens.kind === "words") return `${i}: ${tokens.words[place].trim() || "␣"}`;
  if (tokens.kind === "patches") return `patch ${Math.floor(place / tokens.grid[1])}, ${place % tokens.grid[1]}`;
  return `${tokens.kind === "points" ? "point" : "token"} ${i}`;
}

function options(select, pairs, value) {
  select.replaceChildren(...pairs.map(([key, text]) => new Option(text, key)));
  select.value = String(value);
}

function choose(change) {
  Object.assign(state, change);
  const sides = data.layers[state.layer], shape = data.samples[state.sample].layers[state.layer];
  if (state.head !== ALL && state.head >= sides.heads) state.head = ALL;
  if (state.query !== ALL && state.query >= shape.queries) state.query = ALL;
  options($("sample"), data.samples.map((sample, i) => [i, `${sample.name} (${sample.target})`]), state.sample);
  options($("layer"), data.layers.map((layer, i) => [i, layer.short]), state.layer);
  options($("head"), [[ALL, "mean of all"], ...[...Array(sides.heads).keys()].map((h) => [h, h])], state.head);
  options($("query"), [[ALL, "mean of all"], ...[...Array(shape.queries).keys()].map((q) => [q, label(sides.queries, q)])], state.query);
  draw();
}

function draw() {
  const rows = matrix(), sides = data.layers[state.layer], sample = data.samples[state.sample];
  const row = state.query === ALL ? columnMeans(rows) : rows[state.query];
  const who = state.query === ALL ? `all ${sides.queries === "token" ? "" : sides.queries + " "}queries (mean)` : label(sides.queries, state.query);
  const verdict = sample.predicted === sample.target ? "right" : "wrong";
  $("prediction").innerHTML = "";
  $("prediction").append(`true class ${sample.target}, predicted `, Object.assign(document.createElement("span"), { className: verdict, textContent: sample.predicted }), ` with probability ${sample.probability.toFixed(3)}`);
  drawMap(rows, sides);
  drawRow(row, who, sides);
  drawInput(rows, row, who, sides, sample.tokens);
  drawTable();
  drawSums(rows);
}

function drawMap(rows, sides) {
  $("map-caption").textContent = `Weights; queries: ${plural(rows.length, sides.queries)}, keys: ${plural(rows[0].length, sides.keys)}. Click a row to choose its query.`;
  const z = rows.map((r) => Array.from(r, (v) => (state.log ? Math.log10(Math.max(v, 1e-7)) : v)));
  const text = rows.map((r, q) => Array.from(r, (v, k) => `${label(sides.queries, q)} → ${label(sides.keys, k)}<br>${short(v)}`));
  const line = state.query === ALL ? [] : [-0.5, 0.5].map((d) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: state.query + d, y1: state.query + d, line: { color: "#d1495b", width: 1.5 } }));
  const low = Math.min(...z.map((r) => Math.min(...r))), zmin = state.log ? low : Math.min(0, low), zmax = Math.max(...z.map((r) => Math.max(...r)));
  const trace = { type: "heatmap", z, text, hoverinfo: "text", colorscale: "Viridis", colorbar: bar(zmin, zmax), zmin, zmax };
  Plotly.react("map", [trace], { ...base, xaxis: axis("key", whole(rows[0].length)), yaxis: axis("query", { autorange: "reversed", ...whole(rows.length) }), shapes: line }, quiet);
  clicked("map", (point) => choose({ query: point.y }));
}

function drawRow(row, who, sides) {
  $("row-caption").textContent = `Weights of ${who} on ${plural(row.length, sides.keys)}; the dashed line is even attention.`;
  const text = Array.from(row, (v, k) => `${label(sides.keys, k)}<br>${short(v)}`);
  const even = { type: "line", xref: "paper", x0: 0, x1: 1, y0: 1 / row.length, y1: 1 / row.length, line: { color: "#66727f", dash: "dash", width: 1 } };
  Plotly.react("row", [{ type: "bar", y: Array.from(row), text, textposition: "none", hoverinfo: "text", marker: { color: "#1b6ca8" } }],
    { ...base, bargap: 0.1, shapes: [even], xaxis: axis("key", whole(row.length)), yaxis: axis("weight", { rangemode: "tozero" }) }, quiet);
  const order = [...row.keys()].sort((a, b) => row[b] - row[a]).slice(0, 8);
  $("heaviest").tBodies[0].replaceChildren(...order.map((k, rank) => cells([rank + 1, label(sides.keys, k), short(row[k]), short(row[k] * row.length)], { key: k })));
}

function cells(values, dataset) {
  const tr = document.createElement("tr");
  Object.assign(tr.dataset, dataset);
  for (const value of values) tr.append(Object.assign(document.createElement("td"), { textContent: value }));
  return tr;
}

/** A value for each token: what it receives, or, where keys are learned, what it gives to the heaviest of them. */
function onTokens(rows, row, who, sides) {
  if (sides.keys === "token") return [row, `weight from ${who}`];
  if (sides.queries !== "token") return [null, ""];
  const key = heaviest(row);
  return [Float64Array.from(rows, (r) => r[key]), `weight on ${label(sides.keys, key)}, the heaviest for ${who}`];
}

function drawInput(rows, row, who, sides, tokens) {
  const [values, meaning] = onTokens(rows, row, who, sides);
  const box = $("input"), canChoose = sides.queries === "token";
  const known = values && values.length === tokens.size && tokens.kind !== "tokens";
  const how = canChoose ? " Click one to choose it as the query." : "";
  $("input-caption").textContent = known ? `${{ points: "Points", patches: "Patches", words: "Tokens" }[tokens.kind]} coloured by ${meaning}.${how}` : "The tokens of this layer aren't parts of the input that can be drawn.";
  const kind = known ? tokens.kind : "none";
  if (box.dataset.kind !== kind) {
    box.dataset.kind = kind;
    box.replaceChildren();
    if (kind === "points" || kind === "patches") box.append(Object.assign(document.createElement("div"), { id: "view", className: "plot" }));
  }
  if (!known) return;
  const pick = (i) => canChoose && choose({ query: state.query === i ? ALL : i });
  const chosen = canChoose && state.query !== ALL ? state.query : null;
  ({ points: drawPoints, patches: drawPatches, words: drawWords })[kind](tokens, values, 1 / row.length, chosen, pick);
}

const colours = (values) => Array.from(values, (v) => (state.log ? Math.log10(Math.max(v, 1e-7)) : v));
/** A bar of weights; on a logarithmic one the ticks say the weights, not their logarithms. */
function bar(low, high) {
  const ticks = [0, 1, 2, 3, 4].map((i) => low + (i * (high - low)) / 4);
  const logarithmic = state.log && { tickvals: ticks, ticktext: ticks.map((v) => String(+(10 ** v).toPrecision(2))) };
  return { thickness: 12, title: { text: "weight<br>&nbsp;", side: "top" }, ...logarithmic };
}
/** From 0, and even attention in the middle of the scale or below it. */
const range = (values, even) => (state.log ? [Math.min(...colours(values)), Math.max(...colours(values))] : [0, Math.max(...values, 2 * even)]);

function drawPoints(tokens, values, even, chosen, pick) {
  const [x, y, z] = [0, 1, 2].map((d) => tokens.points.map((p) => p[d]));
  const text = Array.from(values, (v, i) => `point ${i}<br>${short(v)}`);
  const flat = tokens.points[0].length < 3;
  const type = flat ? "scatter" : "scatter3d", [cmin, cmax] = range(values, even);
  const traces = [{ type, mode: "markers", x, y, ...(flat ? {} : { z }), text, hoverinfo: "text", marker: { size: flat ? 8 : 4.5, color: colours(values), colorscale: "Viridis", colorbar: bar(cmin, cmax), cmin, cmax } }];
  if (chosen !== null) traces.push({ type, mode: "markers", x: [x[chosen]], y: [y[chosen]], ...(flat ? {} : { z: [z[chosen]] }), hoverinfo: "skip", marker: { size: flat ? 14 : 8, color: "#d1495b", symbol: flat ? "circle-open" : "diamond" } });
  Plotly.react("view", traces, { ...base, margin: { l: 0, r: 0, t: 0, b: 0 }, showlegend: false, uirevision: state.sample,
    ...(flat ? { xaxis: { visible: false }, yaxis: { visible: false, scaleanchor: "x" } } : { scene: space(tokens.points, $("view")) }) }, quiet);
  if (flat) clicked("view", (point) => point.curveNumber === 0 && pick(point.pointNumber));
  else clickedHovered($("view"), pick);
}

/** A cube around all points, seen from so far that they stay in the picture however they are turned. */
function space(points, box) {
  const centre = [0, 1, 2].map((d) => (Math.min(...points.map((p) => p[d])) + Math.max(...points.map((p) => p[d]))) / 2);
  const radius = Math.max(...points.map((p) => Math.hypot(...p.map((v, d) => v - centre[d])))) || 1;
  const [xaxis, yaxis, zaxis] = centre.map((v) => ({ visible: false, range: [v - radius, v + radius] }));
  // Plotly opens 45 degrees from top to bottom, whatever the width; 90 pixels are for the colour bar, a tenth for the size of a point.
  const opening = Math.atan(Math.tan(Math.PI / 8) * Math.min(1, (box.clientWidth - 90) / box.clientHeight));
  const far = 0.55 / Math.sin(opening) / Math.hypot(1.1, 1.1, 0.7);
  return { aspectmode: "cube", xaxis, yaxis, zaxis, camera: { eye: { x: 1.1 * far, y: 1.1 * far, z: 0.7 * far } } };
}

/** Plotly reports clicks in space only within 5 pixels of a point; whoever sees its label means it, unless he turns the cloud. */
function clickedHovered(plot, action) {
  let hovered = null, from = [0, 0];
  plot.removeAllListeners("plotly_hover").removeAllListeners("plotly_unhover");
  plot.on("plotly_hover", (event) => { if (event.points[0].curveNumber === 0) hovered = event.points[0].pointNumber; });
  plot.on("plotly_unhover", () => { hovered = null; });
  plot.onpointerdown = (event) => { from = [event.clientX, event.clientY]; };
  plot.onclick = (event) => {
    if (hovered !== null && Math.hypot(event.clientX - from[0], event.clientY - from[1]) < 4) action(hovered);
  };
}

function drawPatches(tokens, values, even, chosen, pick) {
  const [height, width] = tokens.grid, lead = tokens.leading;
  const grid = (list) => Array.from({ length: height }, (_, r) => list.slice(lead + r * width, lead + (r + 1) * width));
  const text = Array.from(values, (v, i) => `${label("token", i)}<br>${short(v)}`);
  const shapes = [];
  if (chosen !== null && chosen >= lead) {
    const r = Math.floor((chosen - lead) / width), c = (chosen - lead) % width;
    shapes.push({ type: "rect", x0: c - 0.5, x1: c + 0.5, y0: r - 0.5, y1: r + 0.5, line: { color: "#1b6ca8", width: 3 } });
  }
  const [zmin, zmax] = range(values, even);
  const reds = [[0, "rgba(217,26,26,0)"], [1, "rgba(217,26,26,0.85)"]];
  const trace = { type: "heatmap", z: grid(colours(values)), text: grid(text), hoverinfo: "text", colorscale: reds, colorbar: bar(zmin, zmax), zmin, zmax };
  // Pale, so that what is dark isn't taken for weight.
  const image = { opacity: 0.35, source: tokens.image, xref: "x", yref: "y", x: -0.5, y: -0.5, sizex: width, sizey: height, sizing: "stretch", layer: "below" };
  const side = { visible: false, constrain: "domain" };
  Plotly.react("view", [trace], { ...base, margin: { l: 0, r: 0, t: 0, b: 30 }, shapes, images: [image], xaxis: { ...side, range: [-0.5, width - 0.5] }, yaxis: { ...side, range: [height - 0.5, -0.5], scaleanchor: "x" },
    annotations: lead ? [{ text: `on the class token itself: ${short(values[0])}`, xref: "paper", yref: "paper", x: 0.5, y: 0, yanchor: "top", showarrow: false }] : [] }, quiet);
  clicked("view", (point) => pick(lead + point.y * width + point.x));
}

function drawWords(tokens, values, even, chosen, pick) {
  const shown = colours(values), [low, high] = range(values, even);
  const all = document.createElement("div");
  all.className = "words";
  shown.forEach((value, i) => {
    const word = document.createElement("span"), other = i < tokens.leading;
    word.textContent = other ? "[class]" : tokens.words[i - tokens.leading].replace(/\n/g, "⏎");
    word.className = `${other ? "other " : ""}${i === chosen ? "chosen" : ""}`;
    word.style.background = `rgba(27,108,168,${0.75 * Math.max(0, (value - low) / (high - low || 1))})`;
    word.title = `${label("token", i)}\n${short(values[i])}`;
    word.dataset.token = i;
    word.onclick = () => pick(i);
    all.append(word);
  });
  const scale = (v) => short(+(state.log ? 10 ** v : v).toPrecision(3));
  $("input-caption").textContent += ` White is ${scale(low)}, the darkest ${scale(high)}.`;
  $("input").replaceChildren(all);
}

function clicked(id, action) {
  const plot = $(id);
  plot.removeAllListeners("plotly_click");
  // After the event: a plot must not be drawn again while it reports it.
  plot.on("plotly_click", (event) => setTimeout(() => action(event.points[0])));
}

function drawTable() {
  const head = $("table").tHead, body = $("table").tBodies[0];
  if (!head.rows.length) {
    const tr = head.insertRow();
    for (const [i, [name, meaning]] of [["layer", ""], ["head", ""], ...data.table.columns].entries()) {
      tr.append(Object.assign(document.createElement("th"), { textContent: name, title: meaning, className: i ? "" : "name" }));
    }
    for (const [layer, number, ...values] of data.table.rows) {
      const tr = cells([data.layers[layer].short, number, ...values.map(short)], { layer, head: number });
      tr.cells[0].className = "name";
      tr.onclick = () => choose({ layer, head: number });
      body.append(tr);
    }
  }
  for (const tr of body.rows) tr.classList.toggle("chosen", +tr.dataset.layer === state.layer && (state.head === ALL || +tr.dataset.head === state.head));
}

function drawSums(rows) {
  const layer = data.layers[state.layer], history = Object.entries(data.history[layer.name] || {}).map(([epoch, sums]) => [+epoch, sums]).sort((a, b) => a[0] - b[0]);
  const last = history.length ? history[history.length - 1][0] : 0;
  const every = Math.ceil(history.length / 8);
  const traces = history.map(([epoch, sums], place) => ({ type: "scatter", mode: "lines", name: `epoch ${epoch}`, showlegend: (history.length - 1 - place) % every === 0, x: sums.map((_, i) => i / (sums.length - 1)), y: sums, line: { width: 1.3, color: `hsl(${60 + (200 * epoch) / Math.max(last, 1)}, 60%, ${72 - (40 * epoch) / Math.max(last, 1)}%)` } }));
  const keys = rows[0].length, own = Array.from(columnMeans(rows), (v) => v * keys).sort((a, b) => a - b);
  if (keys === 1) own.push(own[0]);
  traces.push({ type: "scatter", mode: "lines", name: "this sample", x: own.map((_, i) => i / (own.length - 1)), y: own, line: { width: 2.5, color: "#d1495b" } });
  $("sums-note").textContent = `Attention that each key of ${layer.short} receives, times K/Q, sorted; 1 is even. ` + (history.length ? "A line for each epoch of the training (its probe samples, all heads), and the chosen sample and head." : "For the chosen sample and head. Train with the callback AttentionDiagnostics for a line for each epoch.");
  // At least so much of the axis that rounding errors don't look like attention.
  const seen = [0.9, 1.1, ...traces.flatMap((trace) => trace.y)].filter((v) => v > 0).map(Math.log10);
  const low = Math.min(...seen), high = Math.max(...seen), edge = 0.04 * (high - low);
  // Plotly's own choice, every digit, overlaps here; D2 is 1, 2 and 5.
  const ticks = high - low >= 1 && high - low < 6 ? { dtick: "D2" } : {};
  Plotly.react("sums", traces, { ...base, showlegend: true, legend, xaxis: axis("share of the keys, sorted"), yaxis: axis("attention received (1 = even)", { type: "log", range: [low - edge, high + edge], tickformat: ".6~g", ...ticks }), shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 1, y1: 1, line: { color: "#66727f", dash: "dash", width: 1 } }] }, quiet);
}

function drawTraining() {
  $("no-curves").hidden = Object.keys(data.curves).length > 0;
  for (const name of ["loss", "accuracy"]) {
    const traces = ["train", "val"].filter((part) => data.curves[`${part}/${name}`]).map((part) => ({ type: "scatter", mode: "lines+markers", name: part, x: data.curves[`${part}/${name}`].map((p) => p[0]), y: data.curves[`${part}/${name}`].map((p) => p[1]), line: { color: part === "val" ? "#1b6ca8" : "#9aa5b1" }, marker: { size: 5 } }));
    $(name).hidden = !traces.length;
    if (traces.length) Plotly.react(name, traces, { ...base, showlegend: true, legend, xaxis: axis("epoch", whole(traces[0].x.length)), yaxis: axis(name) }, quiet);
  }
}

$("title").textContent = data.title;
$("subtitle").textContent = data.subtitle;
$("facts").replaceChildren(...data.facts.map(([name, value]) => {
  const box = document.createElement("div");
  box.append(Object.assign(document.createElement("dt"), { textContent: name }), Object.assign(document.createElement("dd"), { textContent: value }));
  return box;
}));
$("table-note").textContent = data.table.note;
const number = (text) => (text === ALL ? ALL : +text);
for (const name of ["sample", "layer", "head", "query"]) $(name).onchange = (event) => choose({ [name]: number(event.target.value) });
$("log").onchange = (event) => choose({ log: event.target.checked });
window.addEventListener("resize", draw);
choose({});
drawTraining();
