"use strict";
// The page asks the API of its own server, and nothing else.
const $ = (id) => document.getElementById(id);
const state = { models: [], tokens: [], chosen: -1, abort: null, runs: 0, draws: 0, text: "", maps: null, layer: 0, head: 0, query: 0 };
const FIELDS = { // of an entry of /predict, by the task of the model: name, label, and whether it may be empty
  classify: [["text", "Text"], ["text_pair", "Second text of a pair (optional)", true]],
  tag: [["text", "Text"]],
  qa: [["question", "Question"], ["context", "Context"]],
  fill: [["text", "Text with a mask"]],
  embed: [["text", "Text"]],
};

function headers() {
  const found = { "Content-Type": "application/json" };
  if ($("key").value) found.Authorization = `Bearer ${$("key").value}`;
  return found;
}

async function ask(path, body, signal) {
  const response = await fetch(path, body === undefined ? { headers: headers(), signal }
    : { method: "POST", headers: headers(), body: JSON.stringify(body), signal });
  if (response.ok) return response;
  if (response.status === 401) $("key-form").hidden = false;
  let text = `${response.status} ${response.statusText}`;
  try { text = (await response.json()).error.message; } catch (error) { /* no JSON: the status says it */ }
  throw new Error(text);
}

function say(text) {
  $("message").hidden = !text;
  $("message").textContent = text || "";
}

const shown = (text) => text === "" ? "∅" : text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");
function percent(value) { // of a probability; other scores, as those of a regression, are shown as they are
  if (value < 0 || value > 1) return value.toFixed(4);
  return value >= 0.001 ? `${(100 * value).toFixed(1)} %` : value.toExponential(1);
}
const current = () => state.models.find((each) => each.id === $("model").value);

// Models

async function loadModels() {
  state.models = (await (await ask("v1/models")).json()).data;
  $("model").replaceChildren(...state.models.map((each) => new Option(each.id)));
  chooseModel();
}

function chooseModel() {
  const model = current();
  if (!model) return;
  state.runs++; // what another model still answers is not shown
  state.abort?.abort();
  const generates = model.task === "generate";
  const fields = generates ? [["prompt", "Prompt"]] : FIELDS[model.task] || [["text", "Text"]];
  $("inputs").replaceChildren(...fields.map(([name, label, optional]) => {
    const box = document.createElement("label");
    box.append(label);
    const area = document.createElement("textarea");
    area.id = `input-${name}`;
    area.name = name;
    area.spellcheck = false;
    area.required = !optional;
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("form").requestSubmit(); }
    });
    if (model.mask_token) area.placeholder = `The tower is ${model.mask_token}.`;
    box.append(area);
    return box;
  }));
  $("sampling").hidden = $("stop").hidden = !generates;
  $("run").textContent = generates ? "Generate" : "Run";
  for (const name of ["tokens-section", "results-section", "attention-section", "attention"]) $(name).hidden = true;
  $("progress").textContent = $("attention-progress").textContent = "";
}

// Generation

async function generate(run) {
  const prompt = $("input-prompt").value;
  Object.assign(state, { tokens: [], chosen: -1, text: prompt, abort: new AbortController() });
  $("tokens").replaceChildren(Object.assign(document.createElement("span"), { className: "prompt", textContent: prompt }));
  $("tokens-section").hidden = false;
  $("attention-section").hidden = true;
  showAlternatives();
  $("run").disabled = true;
  $("stop").disabled = false;
  const started = performance.now();
  try {
    const response = await ask("v1/completions", {
      model: $("model").value, prompt, stream: true, logprobs: 5, max_tokens: Number($("max-tokens").value),
      temperature: Number($("temperature").value), top_p: Number($("top-p").value), seed: Number($("seed").value),
    }, state.abort.signal);
    for await (const data of events(response.body)) {
      if (run !== state.runs) return;
      if (data.error) throw new Error(data.error.message);
      for (const choice of data.choices) addTokens(choice);
      $("progress").textContent = `${state.tokens.length} tokens, ${(1000 * state.tokens.length / (performance.now() - started)).toFixed(1)} a second`;
    }
  } finally {
    $("run").disabled = false;
    $("stop").disabled = true;
    if (run === state.runs) offerAttention();
  }
}

function offerAttention() {
  $("attention-section").hidden = !current().attention;
  $("attention").hidden = true;
  $("attention-progress").textContent = "";
}

async function* events(body) { // of a text/event-stream, until [DONE]
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

function addTokens(choice) {
  state.text += choice.text || "";
  const found = choice.logprobs;
  if (!found) return;
  found.tokens.forEach((text, i) => {
    const token = { text, logprob: found.token_logprobs[i], top: (found.top_logprobs || [])[i] || {} };
    const place = state.tokens.push(token) - 1;
    const span = document.createElement("span");
    const probability = Math.exp(token.logprob ?? 0);
    span.textContent = text.replaceAll("\n", "⏎\n");
    span.setAttribute("role", "option");
    span.id = `token-${place}`;
    span.title = percent(probability);
    span.style.backgroundColor = `rgba(var(--heat), ${(0.6 * (1 - probability)).toFixed(3)})`;
    span.addEventListener("click", () => chooseToken(place));
    $("tokens").append(span);
  });
  if (state.chosen < 0 && state.tokens.length) chooseToken(0);
}

function chooseToken(place) {
  if (place < 0 || place >= state.tokens.length) return;
  $("tokens").querySelector("[aria-selected=true]")?.removeAttribute("aria-selected");
  state.chosen = place;
  $(`token-${place}`).setAttribute("aria-selected", "true");
  $("tokens").setAttribute("aria-activedescendant", `token-${place}`);
  showAlternatives();
}

function showAlternatives() {
  const token = state.tokens[state.chosen];
  $("alternatives").hidden = !token;
  if (!token) return;
  const all = { ...token.top, [token.text]: token.logprob };
  const sorted = Object.entries(all).sort((a, b) => b[1] - a[1]);
  $("alternatives").caption.textContent = `Token ${state.chosen + 1}: ${shown(token.text)}`;
  fill($("alternatives"), sorted.map(([text, logprob]) => [shown(text), Math.exp(logprob)]));
}

function fill(table, rows) {
  table.tBodies[0].replaceChildren(...rows.map(([text, value]) => {
    const row = document.createElement("tr");
    const bar = Object.assign(document.createElement("span"), { className: "bar" });
    bar.style.width = `${Math.max(0, Math.min(1, value)) * 100}%`;
    row.insertCell().textContent = text;
    row.insertCell().textContent = percent(value);
    row.insertCell().append(bar);
    return row;
  }));
}

// Predictions

async function predict(run) {
  const body = {};
  for (const area of $("inputs").querySelectorAll("textarea")) {
    if (area.required || area.value.trim()) body[area.name] = area.value;
  }
  state.text = body.text ?? `${body.question}\n${body.context}`;
  state.pair = body.question !== undefined ? [body.question, body.context] : body.text_pair !== undefined ? [body.text, body.text_pair] : null;
  $("run").disabled = true;
  try {
    const found = await (await ask("predict", { model: $("model").value, data: [body] })).json();
    if (run !== state.runs) return;
    showResult(found.predictions[0], body);
    $("results-section").hidden = false;
    offerAttention();
  } finally {
    $("run").disabled = false;
  }
}

function table(caption, rows) {
  const made = $("weights").cloneNode(true);
  made.removeAttribute("id");
  made.caption.textContent = caption;
  made.tHead.rows[0].cells[0].textContent = "Result";
  made.tHead.rows[0].cells[1].textContent = "Score";
  fill(made, rows);
  return made;
}

function marked(text, spans) { // spans: start and end in characters, and a label
  const box = Object.assign(document.createElement("p"), { id: "marked" });
  const characters = Array.from(text); // offsets count code points
  let place = 0;
  for (const span of [...spans].sort((a, b) => a.start - b.start)) {
    box.append(characters.slice(place, span.start).join(""));
    const mark = document.createElement("mark");
    mark.append(characters.slice(span.start, span.end).join(""));
    if (span.label) mark.append(Object.assign(document.createElement("small"), { textContent: span.label }));
    box.append(mark);
    place = span.end;
  }
  box.append(characters.slice(place).join(""));
  return box;
}

function showResult(found, body) {
  const parts = [];
  if (found.labels) parts.push(table("Labels", found.labels.map((each) => [each.label, each.score])));
  if (found.masks) found.masks.forEach((mask, i) => parts.push(table(`Mask ${i + 1}`, mask.map((each) => [each.text, each.score]))));
  if (found.masks && !found.masks.length) parts.push(`The text has no ${current().mask_token || "mask token"}.`);
  if (found.entities) {
    parts.push(marked(body.text, found.entities.map((each) => ({ ...each, label: each.entity }))));
    parts.push(table("Entities", found.entities.map((each) => [`${each.entity}: ${each.text}`, each.score])));
  }
  if (found.answers) {
    const best = found.answers[0];
    if (best.answer !== null) parts.push(marked(body.context, [best]));
    parts.push(table("Answers", found.answers.map((each) => [each.answer ?? "(no answer)", each.score])));
  }
  if (found.embedding) parts.push(`${found.embedding.length} numbers: ${found.embedding.slice(0, 8).map((x) => x.toFixed(4)).join(", ")}, …`);
  if (found.cut) parts.push(` ${found.cut} tokens did not fit and were left out.`);
  $("results").replaceChildren(...parts);
}

// Attention

async function attend() {
  const run = state.runs;
  $("attention-progress").textContent = "…";
  $("attend").disabled = true;
  try {
    const body = { model: $("model").value, text: state.text };
    if (state.pair && ["qa", "classify"].includes(current().task)) Object.assign(body, { text: state.pair[0], text_pair: state.pair[1] });
    const found = await (await ask("attention", body)).json();
    if (run !== state.runs) return;
    const bytes = Uint8Array.from(atob(found.weights), (c) => c.charCodeAt(0));
    state.maps = { tokens: found.tokens, shape: found.shape, values: new Uint16Array(bytes.buffer) };
    state.layer = state.head = 0;
    state.query = found.tokens.length - 1;
    $("attention-progress").textContent = found.cut ? `the first ${found.tokens.length} tokens; ${found.cut} more are left out` : `${found.tokens.length} tokens`;
    $("attention").hidden = false;
    drawMaps();
    drawMap();
  } catch (error) {
    if (run !== state.runs) return;
    $("attention-progress").textContent = "";
    say(error.message);
  } finally {
    $("attend").disabled = false;
  }
}

function weight(layer, head, query, key) {
  const [, heads, rows, columns] = state.maps.shape;
  return state.maps.values[((layer * heads + head) * rows + query) * columns + key] / 65535;
}

const heatColor = () => getComputedStyle(document.documentElement).getPropertyValue("--heat").split(",").map(Number);

function picture(layer, head) { // one pixel a weight
  const [, , rows, columns] = state.maps.shape;
  const image = new ImageData(columns, rows);
  const [red, green, blue] = heatColor();
  for (let q = 0; q < rows; q++) {
    let most = 1e-9;
    for (let k = 0; k < columns; k++) most = Math.max(most, weight(layer, head, q, k));
    for (let k = 0; k < columns; k++) {
      image.data.set([red, green, blue, Math.round(255 * Math.sqrt(weight(layer, head, q, k) / most))], 4 * (q * columns + k));
    }
  }
  return image;
}

function drawMaps() {
  const [layers, heads, rows, columns] = state.maps.shape;
  $("maps").style.gridTemplateColumns = `repeat(${heads}, minmax(20px, 5rem))`;
  const all = [];
  for (let layer = 0; layer < layers; layer++) {
    for (let head = 0; head < heads; head++) {
      const canvas = Object.assign(document.createElement("canvas"), { width: columns, height: rows, title: `layer ${layer}, head ${head}`, id: `map-${layer}-${head}` });
      canvas.setAttribute("role", "gridcell");
      canvas.getContext("2d").putImageData(picture(layer, head), 0, 0);
      canvas.addEventListener("click", () => chooseMap(layer, head));
      all.push(canvas);
    }
  }
  $("maps").replaceChildren(...all);
}

function chooseMap(layer, head) {
  const [layers, heads] = state.maps.shape;
  state.layer = Math.max(0, Math.min(layers - 1, layer));
  state.head = Math.max(0, Math.min(heads - 1, head));
  drawMap();
}

async function drawMap() {
  const { tokens, shape: [, , rows, columns] } = state.maps;
  $("maps").querySelector("[aria-selected=true]")?.removeAttribute("aria-selected");
  $(`map-${state.layer}-${state.head}`).setAttribute("aria-selected", "true");
  $("maps").setAttribute("aria-activedescendant", `map-${state.layer}-${state.head}`);
  $("map-title").textContent = `Layer ${state.layer}, head ${state.head}`;
  const turn = ++state.draws;
  const image = await createImageBitmap(picture(state.layer, state.head));
  if (turn !== state.draws) return; // a later choice is drawn instead
  const cell = Math.max(8, Math.min(22, Math.floor(640 / Math.max(rows, columns))));
  const label = (text) => shown(text).slice(0, 14);
  const font = `${Math.min(12, cell)}px ui-monospace, monospace`;
  const canvas = $("map");
  const draw = canvas.getContext("2d");
  draw.font = font;
  const edge = Math.ceil(Math.max(...tokens.map((text) => draw.measureText(label(text)).width))) + 10;
  const scale = window.devicePixelRatio || 1;
  canvas.width = (edge + columns * cell) * scale;
  canvas.height = (edge + rows * cell) * scale;
  canvas.style.width = `${edge + columns * cell}px`;
  canvas.setAttribute("aria-label", `Attention weights of layer ${state.layer}, head ${state.head}, ${rows} by ${columns} tokens; the table below has those of the chosen query`);
  const style = getComputedStyle(document.body);
  draw.scale(scale, scale);
  draw.imageSmoothingEnabled = false;
  draw.drawImage(image, edge, edge, columns * cell, rows * cell);
  draw.strokeStyle = style.getPropertyValue("--accent");
  draw.strokeRect(edge, edge + state.query * cell, columns * cell, cell);
  draw.fillStyle = style.color;
  draw.font = font;
  draw.textBaseline = "middle";
  draw.textAlign = "right";
  tokens.forEach((text, i) => { draw.fillText(label(text), edge - 4, edge + (i + 0.5) * cell); });
  draw.textAlign = "left";
  tokens.forEach((text, i) => {
    draw.save();
    draw.translate(edge + (i + 0.5) * cell, edge - 4);
    draw.rotate(-Math.PI / 2);
    draw.fillText(label(text), 0, 0);
    draw.restore();
  });
  canvas.onclick = (event) => {
    const box = canvas.getBoundingClientRect();
    chooseQuery(Math.floor((event.clientY - box.top - edge) / cell));
  };
  const weights = tokens.map((text, k) => [`${k}: ${shown(text)}`, weight(state.layer, state.head, state.query, k)]);
  $("weights").caption.textContent = `Query ${state.query}: ${shown(tokens[state.query])}`;
  fill($("weights"), weights.sort((a, b) => b[1] - a[1]).slice(0, 8));
}

function chooseQuery(query) {
  if (query < 0 || query >= state.maps.shape[2]) return;
  state.query = query;
  drawMap();
}

// The strip

let last = null;
async function refresh() {
  if (document.hidden) return;
  try {
    const text = await (await ask("metrics")).text();
    const sum = (name) => text.split("\n").filter((line) => line.startsWith(name + "{") || line.startsWith(name + " "))
      .reduce((total, line) => total + Number(line.slice(line.lastIndexOf(" "))), 0);
    const made = sum("fastattn_generated_tokens_total");
    const now = performance.now();
    $("running").textContent = sum("fastattn_running");
    $("waiting").textContent = sum("fastattn_waiting");
    $("pages").textContent = `${sum("fastattn_pages_held")} of ${sum("fastattn_pages")}`;
    if (last) $("rate").textContent = Math.max(0, 1000 * (made - last.made) / (now - last.now)).toFixed(1);
    last = { made, now };
  } catch (error) {
    for (const name of ["running", "waiting", "rate", "pages"]) $(name).textContent = "–";
  }
}

// Events

async function run(event) {
  event.preventDefault();
  if ($("run").disabled) return; // Ctrl+Enter comes here also while something runs
  const run = ++state.runs;
  say("");
  $("progress").textContent = "";
  try {
    await (current().task === "generate" ? generate(run) : predict(run));
  } catch (error) {
    if (run !== state.runs) return;
    if (error.name === "AbortError") $("progress").textContent += ", stopped";
    else say(error.message);
  }
}

const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
function onArrows(id, move) {
  $(id).addEventListener("keydown", (event) => {
    const by = step[event.key];
    if (!by) return;
    event.preventDefault();
    move(...by);
  });
}

$("form").addEventListener("submit", run);
$("stop").addEventListener("click", () => state.abort?.abort());
$("model").addEventListener("change", chooseModel);
$("key-form").addEventListener("submit", (event) => { event.preventDefault(); start(); });
$("attend").addEventListener("click", attend);
onArrows("tokens", (down, right) => chooseToken(state.chosen + down + right));
onArrows("maps", (down, right) => chooseMap(state.layer + down, state.head + right));
onArrows("map", (down) => chooseQuery(state.query + down));

async function start() {
  try {
    await loadModels();
    say("");
  } catch (error) {
    say(error.message);
  }
}
start();
refresh();
setInterval(refresh, 1000);
