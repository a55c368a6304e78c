// The page: the drawing is asked about while it grows, and the answer is shown over it.

import { Asker, fetchJson, Refusal } from "./ask.js";
import { byId, debounced, element, saveFile, say } from "./dom.js";
import {
  Colours, flatten, hasNegative, layoutOf, limitOf, paintMap, paintPixels, shareOf, stack, summarise, sumChannels,
} from "./maps.js";
import { Options } from "./options.js";
import { Paper } from "./paper.js";
import { curlCommand, decodeStrokes, encodeStrokes, MAX_LINK_CHARACTERS, UnreadableLink } from "./share.js";
import { WhatIf } from "./what_if.js";
import { percent, plain, short, signed, spoken, wordsFor } from "./words.js";

const MANY_CLASSES = 12; // with more, the likeliest are shown
const DRAWN_SIDE = 112; // pixels of the longer side of a drawing that is sent, about: more takes the server longer
const DESCRIBE_AGAIN_MS = 2500;
const SAY_AFTER_MS = 800; // screen readers are told once a drawing rests
const PER_GREY = " per unit of grey level";
const WITHOUT_DESCRIPTION = { polarity: "signed", colormap: "", clip_percentile: 99 };
const GREY = { diverging: true, colours: ["#2166ac", "#f7f7f7", "#b2182b"] }; // where the model does not describe its own

const paper = new Paper(byId("paper"), byId("cursor"));
const options = new Options(byId("main-options"), byId("more-options"), (isAsked) => (isAsked ? ask() : show()));
const whatIf = new WhatIf({ classNames: () => names(), options: () => options.request(), explained: () => explained(), announce, busy: showBusy });
const asker = new Asker(question, {
  answer: answered,
  refused,
  slow: (isSlow) => {
    if (isSlow) showState({ kind: "wait", title: "Waiting for the answer …", text: "The model's server is slow." });
    else if (shownState?.title.startsWith("Waiting")) showState(null);
  },
  busy: showBusy,
});

let settings = { model: "", url: "", curl: ["curl --json", ""] };
let description = null;
let reply = null; // the newest answer
let replyText = "";
let asked = null; // the question that it answers
let rested = null; // the newest answer to a finished stroke: { reply, data }
let before = null; // the answer to the drawing before its last stroke
let chosen = null; // the class that is explained; null for the one that is read
let compared = null;
let shownState = null;

// --- what is asked

const names = () => {
  if (description?.class_names) return description.class_names;
  const count = description?.class_count ?? reply?.logits.length ?? 0;
  return Array.from({ length: count }, (_, index) => String(index));
};

const indexOfLargest = (numbers) => numbers.reduce((best, value, index) => (value > numbers[best] ? index : best), 0);
const read = () => indexOfLargest(reply.logits);
const explained = () => (reply ? chosen ?? read() : null);
const targets = () => (reply ? [reply.explanation.target].flat() : []);

function question() {
  if (paper.isEmpty) return null;
  const body = { data: paper.encode(), ...options.request() };
  const target = chosen ?? "predicted";
  if (compared !== null && compared !== chosen) body.target = [target, compared];
  else if (chosen !== null) body.target = target;
  body.encoding = "base64";
  body.pixels = true;
  return { body, isRest: !paper.isDrawing, size: { width: paper.sent.width, height: paper.sent.height } };
}

function ask(at) {
  if (paper.isEmpty) empty();
  else asker.settle(at);
}

paper.addEventListener("draw", (event) => {
  byId("invitation").hidden = true;
  document.body.classList.add("stale");
  if (!paper.isEmpty) asker.live(event.detail.at);
});
paper.addEventListener("settle", (event) => {
  byId("undo").disabled = !paper.canUndo;
  byId("redo").disabled = !paper.canRedo;
  byId("clear").disabled = paper.isEmpty && !paper.strokes.length;
  byId("invitation").hidden = !paper.isEmpty || paper.strokes.length > 0;
  byId("frame").style.setProperty("--ratio", paper.sent.width / paper.sent.height);
  ask(event.detail.at);
});
paper.addEventListener("say", (event) => announce(event.detail));

// --- what is answered

function answered(content, itsQuestion, text) {
  const isOther = description && content.model?.weights_sha256 !== description.model.weights_sha256;
  const { data } = itsQuestion.body;
  before = rested && rested.data !== data ? rested.reply : null;
  if (itsQuestion.isRest) rested = { reply: content, data };
  [reply, asked, replyText] = [content, itsQuestion, text];
  document.body.classList.remove("stale");
  showState(null);
  show();
  const done = performance.now();
  performance.measure("stroke to map", { start: Math.min(itsQuestion.startedAt, done), end: done });
  say(byId("time"), `Answered in ${Math.max(1, Math.round(done - itsQuestion.startedAt))} ms`);
  if (itsQuestion.isRest) {
    whatIf.setBase(reply);
    announceAnswer();
  }
  if (isOther) describe();
}

function refused(refusal) {
  const words = wordsFor(refusal.state, refusal.message);
  if (words.kind === "you") forget();
  else if (reply) {
    say(byId("time"), "This is the answer to an earlier drawing.");
    say(byId("chip"), "");
  }
  showState(words);
}

/** Nothing is drawn. */
function empty() {
  asker.stop();
  forget();
  showState(null);
}

/** Show no answer rather than one to another drawing. */
function forget() {
  reply = asked = rested = before = null;
  document.body.classList.remove("stale");
  show();
  whatIf.setBase(null);
}

const announceAnswer = debounced(() => {
  if (reply) announce(`The network reads ${names()[read()]}, ${spoken(percent(reply.probabilities[read()]))}.`);
}, SAY_AFTER_MS);

function announce(text) {
  say(byId("announcer"), text);
}

// --- what is shown

function showBusy() {
  document.querySelector("main").setAttribute("aria-busy", String(asker.isBusy || whatIf.asker.isBusy));
}

function showState(words) {
  shownState = words;
  const box = byId("state");
  box.hidden = words === null;
  if (words === null) {
    say(byId("state-title"), "");
    say(byId("state-text"), "");
    return;
  }
  box.dataset.kind = words.kind;
  say(byId("state-title"), words.title);
  say(byId("state-text"), words.text);
}

function show() {
  showAnswer();
  showBars();
  showChoices();
  showMaps();
  showPreparation();
  showLastChange();
  for (const id of ["copy-curl", "save-png", "save-json"]) byId(id).disabled = reply === null;
  byId("copy-link").disabled = paper.isEmpty;
}

function showAnswer() {
  const name = reply ? names()[read()] : "–";
  say(byId("answer"), name);
  byId("answer").parentElement.classList.toggle("long", name.length > 4);
  say(byId("probability"), reply ? percent(reply.probabilities[read()]) : "");
  say(byId("chip"), reply ? `${name} ${percent(reply.probabilities[read()])}` : "");
  if (!reply) say(byId("time"), "");
}

function showBars() {
  const bars = byId("bars");
  const all = names();
  const isLong = all.length > MANY_CLASSES;
  let shown = all.map((_, index) => index);
  if (isLong && reply) {
    shown.sort((one, other) => reply.probabilities[other] - reply.probabilities[one]);
    shown = [...new Set([...shown.slice(0, MANY_CLASSES - 2), chosen, compared])].filter((index) => index !== null);
  } else if (isLong) shown = shown.slice(0, MANY_CLASSES);
  byId("more-classes").hidden = !isLong;
  byId("bars-hint").hidden = all.length === 0;
  if (isLong) say(byId("more-classes"), `The likeliest of ${all.length} classes. Choose any other beside “Explain”.`);
  while (bars.children.length > shown.length) bars.lastChild.remove();
  while (bars.children.length < shown.length) bars.append(makeBar());
  bars.style.setProperty("--rows", Math.ceil(shown.length / 2));
  shown.forEach((index, place) => {
    const item = bars.children[place];
    const button = item.firstChild;
    const probability = reply?.probabilities[index] ?? 0;
    button.dataset.index = index;
    button.classList.toggle("named", all[index].length > 2);
    button.setAttribute("aria-pressed", String(reply !== null && explained() === index));
    item.classList.toggle("read", reply !== null && read() === index);
    say(button.children[0], all[index]);
    button.children[1].firstChild.style.setProperty("--share", probability);
    say(button.children[2], reply ? percent(probability) : "");
  });
}

function makeBar() {
  const button = element("button", { type: "button" },
    element("span", { className: "name" }),
    element("span", { className: "track", "aria-hidden": "true" }, element("span", { className: "fill" })),
    element("span", { className: "value" }));
  button.addEventListener("click", () => {
    const index = Number(button.dataset.index);
    chosen = chosen === index ? null : index;
    showChoices();
    ask();
  });
  return element("li", {}, button);
}

function showChoices() {
  const all = names();
  for (const [id, none, value] of [["chosen", "what it reads", chosen], ["compared", "nothing", compared]]) {
    const select = byId(id);
    if (select.options.length !== all.length + 1 || select.options[1]?.text !== all[0]) {
      select.replaceChildren(new Option(none, ""), ...all.map((name, index) => new Option(name, index)));
    }
    select.value = value === null ? "" : String(value);
  }
}

/** The maps of a reply as they are drawn: one number a pixel; of dark ink by its darkness, as in the service's own drawings. */
function mapsOf({ explanation, preparation }) {
  const count = Array.isArray(explanation.target) ? explanation.target.length : 1;
  const shape = Array.isArray(explanation.target) ? explanation.shape.slice(1) : explanation.shape;
  const layout = layoutOf(shape);
  const all = flatten(explanation.saliency);
  const isTurned = explanation.space === "image" && preparation.inverted && explanation.unit.endsWith(PER_GREY);
  const size = all.length / count;
  const maps = Array.from({ length: count }, (_, index) => {
    const summed = sumChannels(all.subarray(index * size, (index + 1) * size), layout);
    return isTurned ? summed.map((value) => -value) : summed;
  });
  const unit = isTurned ? explanation.unit.replace(PER_GREY, " per unit of darkness") : explanation.unit;
  return { maps, layout: { height: layout.height, width: layout.width, channels: 1, isLast: true }, unit, isTurned };
}

let drawn = null; // maps, layout, unit, limit and window of what is shown, for pointing at

function showMaps() {
  const overlay = byId("overlay");
  Object.assign(overlay, { width: paper.view.width, height: paper.view.height });
  drawn = null;
  byId("legend").hidden = reply === null;
  byId("figure-b").hidden = targets().length < 2;
  if (!reply) {
    for (const id of ["seen", "map-a", "map-b"]) blank(byId(id));
    byId("seen").setAttribute("aria-label", "What the network saw: nothing yet");
    byId("map-a").setAttribute("aria-label", "Saliency map: none yet");
    say(byId("caption-a"), "Saliency map");
    say(byId("map-readout"), "Point at a pixel for its number.");
    say(byId("readout"), "\u00a0");
    return;
  }
  const { polarity, colormap, clip_percentile: percentile } = { ...WITHOUT_DESCRIPTION, ...options.values };
  const colours = new Colours(description?.colormaps?.[colormap] ?? GREY);
  const { maps, layout, unit } = mapsOf(reply);
  const limit = limitOf(maps, percentile);
  const opacity = Number(byId("opacity").value) / 100;
  const style = { limit, polarity, colours, opacity: 0.9 };
  const isImageSpace = reply.explanation.space === "image";
  const { width, height } = asked.size;
  const window = isImageSpace ? [0, 0, width, height] : reply.preparation.window ?? null;
  drawn = { maps, layout, unit, limit, window, polarity, colours, pixels: null };

  if (window) {
    const zoom = overlay.width / width;
    const [left, top, right, bottom] = window.map((place) => place * zoom);
    const context = overlay.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(paintMap(maps[0], layout, { ...style, opacity }), left, top, right - left, bottom - top);
  }
  const seen = byId("seen");
  let base = null;
  if (reply.preparation.pixels !== undefined) {
    const seenLayout = layoutOf(reply.preparation.shape);
    const pixels = flatten(reply.preparation.pixels);
    base = paintPixels(pixels, seenLayout);
    drawn.pixels = { values: sumChannels(pixels, seenLayout), layout: seenLayout };
    stack(seen, [base]);
    say(byId("seen-size"), `(${seenLayout.width}×${seenLayout.height})`);
    seen.setAttribute("aria-label", `What the network saw, ${seenLayout.width} by ${seenLayout.height} pixels`);
  }
  if (isImageSpace) base = paper.sent;
  maps.forEach((map, index) => {
    const canvas = byId(index === 0 ? "map-a" : "map-b");
    if (index > 1) return;
    const name = names()[targets()[index]];
    stack(canvas, [...(base ? [base] : []), paintMap(map, layout, style)]);
    say(byId(index === 0 ? "caption-a" : "caption-b"), `${plain(reply.explanation.method)}, for ${name}`);
    canvas.setAttribute("aria-label", `Saliency map for ${name}: ${summarise(map, layout, short)}, in ${unit}`);
  });
  showLegend(limit, polarity, colours, unit);
}

function blank(canvas) {
  canvas.width = canvas.height = 1;
  canvas.style.aspectRatio = "1";
}

function showLegend(limit, polarity, colours, unit) {
  const low = hasNegative(polarity) ? -limit : 0;
  const high = polarity === "negative" ? 0 : limit;
  const bar = byId("legend-bar");
  const context = bar.getContext("2d");
  for (let x = 0; x < bar.width; x++) {
    const share = limit ? shareOf(low + ((high - low) * x) / (bar.width - 1), limit, polarity) : 0;
    context.fillStyle = `rgb(${colours.of(share).join(" ")})`;
    context.fillRect(x, 0, 1, bar.height);
  }
  say(byId("tick-low"), low === 0 ? "0" : signed(low));
  say(byId("tick-middle"), low < 0 && high > 0 ? "0" : "");
  say(byId("tick-high"), high === 0 ? "0" : signed(high));
  const { output } = reply.explanation;
  const what = output === "logit" ? "score" : output === "cross_entropy" ? "loss" : plain(output);
  const swatch = (share) => {
    const made = element("span", { className: "swatch", "aria-hidden": "true" });
    made.style.background = `rgb(${colours.of(share).join(" ")})`;
    return made;
  };
  const isDerivative = / per unit of /.test(unit) && !unit.includes("^");
  const raises = isDerivative ? `more ink raises the ${what}` : `speaks for a higher ${what}`;
  const lowers = isDerivative ? `lowers it` : `speaks for a lower one`;
  const parts = [];
  if (unit.includes("^")) parts.push(swatch(1), " the score depends more on this pixel. ");
  else if (polarity === "absolute") parts.push(swatch(1), ` changes the ${what} most, either way. `);
  else {
    if (high > 0) parts.push(swatch(0.8), ` ${raises}. `);
    if (low < 0) parts.push(swatch(-0.8), ` ${high > 0 ? lowers : `lowers the ${what}`}. `);
  }
  byId("legend-text").replaceChildren(...parts, `Unit: ${unit}.`);
}

function showPreparation() {
  const warnings = reply?.warnings ?? [];
  byId("warnings").hidden = warnings.length === 0;
  list(byId("warning-list"), warnings.map(({ message }) => message));
  let steps = ["Nothing yet."];
  if (reply) {
    const { steps: done, source } = reply.preparation;
    const photo = paper.photo;
    const scaled = photo && photo.from.width !== photo.canvas.width
      ? [`this page scaled the photograph from ${photo.from.width}×${photo.from.height} to ${photo.canvas.width}×${photo.canvas.height}`] : [];
    steps = [...scaled, `read as ${source}`, ...(done.length ? done : ["sent to the network as it is: it has the framing already"])];
  }
  list(byId("steps"), steps);
}

function list(target, texts) {
  while (target.children.length > texts.length) target.lastChild.remove();
  while (target.children.length < texts.length) target.append(element("li"));
  texts.forEach((text, index) => say(target.children[index], text));
}

/** Beside what the last stroke did to the score: what the map before it said that it would do. */
function showLastChange() {
  const line = byId("last-change");
  const target = explained();
  line.hidden = true;
  if (!reply || !before || before.logits.length !== reply.logits.length) return;
  const name = names()[target];
  const [from, to] = [before.logits[target], reply.logits[target]];
  line.hidden = false;
  let text = `Your last stroke: score of ${name} ${short(from)} → ${short(to)} (${signed(to - from)}).`;
  const explanation = before.explanation;
  const isMapOfIt = [explanation.target].flat()[0] === target && explanation.unit === "logit per unit of intensity";
  const sameShape = String(before.preparation.shape) === String(reply.preparation.shape) && before.preparation.pixels !== undefined;
  if (isMapOfIt && sameShape && explanation.space !== "image") {
    const [map, old, now] = [explanation.saliency, before.preparation.pixels, reply.preparation.pixels].map(flatten);
    let predicted = 0;
    for (let index = 0; index < old.length; index++) predicted += map[index] * (now[index] - old[index]);
    text += ` The map before it predicted ${signed(predicted)}.`;
  }
  say(line, text);
}

// --- pointing at pixels

function tell(x, y) {
  const { maps, layout, unit, pixels } = drawn;
  if (x < 0 || y < 0 || x >= layout.width || y >= layout.height) return "Outside what the network saw.";
  const at = y * layout.width + x;
  const numbers = maps.slice(0, 2).map((map, index) => `${signed(map[at])}${maps.length > 1 ? ` for ${names()[targets()[index]]}` : ""}`);
  const isSame = pixels && pixels.layout.width === layout.width && pixels.layout.height === layout.height;
  const intensity = isSame ? `, intensity ${short(pixels.values[at])}` : "";
  return `Row ${y + 1}, column ${x + 1}: ${numbers.join(", ")} ${unit}${intensity}`;
}

byId("frame").addEventListener("pointermove", (event) => {
  if (!drawn?.window || paper.isDrawing) return;
  const box = byId("paper").getBoundingClientRect();
  const [left, top, right, bottom] = drawn.window;
  const [x, y] = [((event.clientX - box.left) / box.width) * asked.size.width, ((event.clientY - box.top) / box.height) * asked.size.height];
  say(byId("readout"), tell(Math.floor(((x - left) / (right - left)) * drawn.layout.width), Math.floor(((y - top) / (bottom - top)) * drawn.layout.height)));
});
byId("frame").addEventListener("pointerleave", () => say(byId("readout"), "\u00a0"));

for (const id of ["seen", "map-a", "map-b"]) {
  const canvas = byId(id);
  let place = { x: 0, y: 0 };
  const gridOf = () => (id === "seen" && drawn.pixels ? drawn.pixels.layout : drawn.layout);
  const tellAt = (x, y) => {
    const grid = gridOf();
    const isOther = grid.width !== drawn.layout.width;
    say(byId("map-readout"), isOther ? `Row ${y + 1}, column ${x + 1}: intensity ${short(drawn.pixels.values[y * grid.width + x])}` : tell(x, y));
  };
  canvas.addEventListener("pointermove", (event) => {
    if (!drawn) return;
    const box = canvas.getBoundingClientRect();
    const { width, height } = gridOf();
    const clamp = (value, size) => Math.min(Math.max(Math.floor(value), 0), size - 1);
    place = { x: clamp(((event.clientX - box.left) / box.width) * width, width), y: clamp(((event.clientY - box.top) / box.height) * height, height) };
    tellAt(place.x, place.y);
  });
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (!drawn || !moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    const { width, height } = gridOf();
    place = { x: Math.min(Math.max(place.x + moves[event.key][0], 0), width - 1), y: Math.min(Math.max(place.y + moves[event.key][1], 0), height - 1) };
    tellAt(place.x, place.y);
    event.preventDefault();
  });
}

// --- tools

function takeTool(tool) {
  paper.tool = tool;
  for (const name of ["pen", "eraser"]) byId(name).setAttribute("aria-pressed", String(name === tool));
}
const setWidth = () => (paper.penWidth = Number(byId("pen-width").value) / 100);
byId("pen").addEventListener("click", () => takeTool("pen"));
byId("eraser").addEventListener("click", () => takeTool("eraser"));
byId("pen-width").addEventListener("input", setWidth);
byId("undo").addEventListener("click", () => paper.undo());
byId("redo").addEventListener("click", () => paper.redo());
byId("clear").addEventListener("click", () => paper.clear());
byId("opacity").addEventListener("input", () => showMaps());
for (const id of ["chosen", "compared"]) {
  byId(id).addEventListener("change", () => {
    const value = byId(id).value === "" ? null : Number(byId(id).value);
    if (id === "chosen") chosen = value;
    else compared = value;
    ask();
  });
}
for (const id of ["options", "what-if"]) byId(id).addEventListener("submit", (event) => event.preventDefault());

const isTyping = (target) => target.matches?.("input, select, textarea, [contenteditable]");
document.addEventListener("keydown", (event) => {
  const isControl = event.ctrlKey || event.metaKey;
  const key = event.key.toLowerCase();
  if (isTyping(event.target) || event.altKey || byId("camera").open) return;
  if (isControl && key === "z") event.shiftKey ? paper.redo() : paper.undo();
  else if (isControl && key === "y") paper.redo();
  else if (isControl || event.target !== byId("paper")) return;
  else if (key === "z") paper.undo();
  else if (key === "y") paper.redo();
  else if (key === "p") takeTool("pen");
  else if (key === "e") takeTool("eraser");
  else if (key === "[" || key === "]") {
    byId("pen-width").value = Number(byId("pen-width").value) + (key === "[" ? -1 : 1);
    setWidth();
    announce(`Width ${byId("pen-width").value}`);
  } else if (key === "delete" || key === "backspace") paper.clear();
  else return;
  event.preventDefault();
});

// --- photographs

async function takeFile(file) {
  if (!file) {
    showState(wordsFor("NoImageThere"));
    return;
  }
  const { body_bytes: mostBytes, image_pixels_a_request: mostPixels } = description?.limits ?? {};
  if (mostBytes && file.size > mostBytes) {
    showState(wordsFor("TooLarge", `It has ${megabytes(file.size)}, and the model takes at most ${megabytes(mostBytes)}`));
    return;
  }
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    showState(wordsFor("UnreadableFile"));
    return;
  }
  if (mostPixels && bitmap.width * bitmap.height > mostPixels) {
    const [has, most] = [bitmap.width * bitmap.height, mostPixels].map((count) => `${(count / 1e6).toFixed(0)} million pixels`);
    showState(wordsFor("TooLarge", `It has ${has}, and the model takes at most ${most}`));
  } else {
    showState(null);
    paper.setPhoto(bitmap);
  }
  bitmap.close();
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(0)} MB`;
const imageIn = (files) => [...files].find((file) => file.type.startsWith("image/")) ?? files[0];

byId("choose-photo").addEventListener("click", () => byId("photo-file").click());
byId("photo-file").addEventListener("change", () => {
  const [file] = byId("photo-file").files;
  if (file) takeFile(file);
  byId("photo-file").value = "";
});
document.addEventListener("paste", (event) => {
  if (isTyping(event.target)) return;
  event.preventDefault();
  takeFile(imageIn(event.clipboardData.files));
});
for (const type of ["dragenter", "dragover"]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  takeFile(imageIn(event.dataTransfer.files));
});

const camera = byId("camera");
byId("open-camera").addEventListener("click", async () => {
  camera.showModal();
  say(byId("camera-text"), "Waiting for the camera …");
  byId("take-photo").disabled = true;
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    if (!camera.open) stopCamera(stream);
    byId("viewfinder").srcObject = stream;
    byId("take-photo").disabled = false;
    say(byId("camera-text"), "Fill the view with one drawing.");
  } catch (error) {
    const isDenied = error.name === "NotAllowedError";
    say(byId("camera-text"), isDenied ? "The browser does not allow this page the camera." : "No camera was found.");
  }
});
const stopCamera = (stream) => stream?.getTracks().forEach((track) => track.stop());
camera.addEventListener("close", () => {
  stopCamera(byId("viewfinder").srcObject);
  byId("viewfinder").srcObject = null;
});
byId("close-camera").addEventListener("click", () => camera.close());
byId("take-photo").addEventListener("click", async () => {
  const bitmap = await createImageBitmap(byId("viewfinder"));
  camera.close();
  paper.setPhoto(bitmap);
  bitmap.close();
});

// --- sharing

const shownBody = () => {
  const { encoding, pixels, ...body } = asked.body; // these two are how this page is answered
  return body;
};
const tellShared = (text) => say(byId("shared"), text);

async function copy(text, told) {
  const box = byId("to-copy");
  box.value = text;
  box.hidden = false;
  try {
    await navigator.clipboard.writeText(text);
    tellShared(told);
  } catch {
    box.select();
    tellShared("The browser does not let this page copy. Copy the text below.");
  }
}

function linkTo() {
  const values = new URLSearchParams({ d: encodeStrokes(paper.strokes) });
  for (const [name, value] of Object.entries({ ...options.request(), target: chosen, compare: compared })) {
    if (value !== null) values.set(name, value);
  }
  return `${location.origin}${location.pathname}#${values}`;
}

byId("copy-link").addEventListener("click", () => {
  if (paper.photo) {
    tellShared("A link holds drawings alone, and no photograph. Save the PNG instead.");
    return;
  }
  const link = linkTo();
  if (link.length > MAX_LINK_CHARACTERS) tellShared("This drawing is too large for a link. Save the PNG instead.");
  else copy(link, "Link copied. It holds the drawing; nothing was uploaded.");
});
byId("copy-curl").addEventListener("click", () => {
  const { command, file } = curlCommand(settings, shownBody());
  if (file) saveFile("request.json", new Blob([file], { type: "application/json" }));
  copy(command, file ? "Command copied, and its request.json saved." : "Command copied.");
});
byId("save-json").addEventListener("click", () => {
  saveFile("reply.json", new Blob([replyText], { type: "application/json" }));
  tellShared("Reply saved as reply.json.");
});
byId("save-png").addEventListener("click", () => {
  drawSheet().toBlob((blob) => {
    saveFile("explained.png", blob);
    tellShared("Drawing and map saved as explained.png.");
  }, "image/png");
});

/** Drawing, what the network saw and its maps on one sheet, with a caption. */
function drawSheet() {
  const [side, gap, line] = [420, 24, 30];
  const panels = [paper.view, byId("seen"), byId("map-a"), ...(targets().length > 1 ? [byId("map-b")] : [])];
  const captions = ["drawing", "seen", ...targets().slice(0, 2).map((target) => `for ${names()[target]}`)];
  const sheet = element("canvas", { width: panels.length * (side + gap) + gap, height: side + 2 * gap + 5 * line });
  const context = sheet.getContext("2d");
  context.fillStyle = "#fff";
  context.fillRect(0, 0, sheet.width, sheet.height);
  context.fillStyle = "#1a1b1e";
  context.imageSmoothingEnabled = false;
  const write = (text, x, y, font = "18px system-ui, sans-serif") => {
    context.font = font;
    context.fillText(text, x, y, sheet.width - x - gap);
  };
  panels.forEach((panel, index) => {
    const scale = side / Math.max(panel.width, panel.height);
    const [x, y] = [gap + index * (side + gap), gap];
    context.drawImage(panel, x, y, panel.width * scale, panel.height * scale);
    if (index === 0) context.drawImage(byId("overlay"), x, y, panel.width * scale, panel.height * scale);
    write(captions[index], x, side + gap + line - 6);
  });
  const top = side + gap + 2 * line + 8;
  write(`Reads ${names()[read()]} (${percent(reply.probabilities[read()])}), by ${reply.model.name} ${reply.model.version}`, gap, top, "600 22px system-ui, sans-serif");
  const values = Object.entries(reply.explanation.parameters ?? {}).map(([name, value]) => `${plain(name)} ${value}`);
  write(`${[plain(reply.explanation.method), ...values].join(", ")}; ${drawn.unit}`, gap, top + line);
  context.drawImage(byId("legend-bar"), gap, top + line + 16, 300, 14);
  write(`${byId("tick-low").textContent} to ${byId("tick-high").textContent}`, gap + 312, top + line + 29);
  return sheet;
}

let linked = []; // options of the address, until the model has said which it takes

function takeLinked() {
  if (!description) return;
  for (const [name, value] of linked) options.set(name, value);
  linked = [];
}

/** Read a drawing and its choices from the address. */
function readLink() {
  if (location.hash.length < 3 || location.hash === "#paper") return;
  const values = new URLSearchParams(location.hash.slice(1));
  if (!values.has("d")) return;
  let strokes;
  try {
    strokes = decodeStrokes(values.get("d"));
  } catch (error) {
    if (!(error instanceof UnreadableLink)) throw error;
    showState(wordsFor("UnreadableLink"));
    return;
  }
  const classOf = (text) => (/^\d{1,6}$/.test(text ?? "") && Number(text) < (names().length || Infinity) ? Number(text) : null);
  chosen = classOf(values.get("target"));
  compared = classOf(values.get("compare"));
  linked = [...values].filter(([name]) => !["d", "target", "compare"].includes(name));
  takeLinked();
  paper.setStrokes(strokes);
}
addEventListener("hashchange", readLink);

// --- what the model says of itself

let describeTimer = 0;

async function describe() {
  clearTimeout(describeTimer);
  try {
    description = (await fetchJson("description")).content;
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    if (error.state === "Starting" || (paper.isEmpty && error.state !== "NoDescription" && error.status !== 404)) {
      showState(wordsFor(error.state, error.message));
    }
    say(byId("served"), settings.model ? `${settings.model}, at ${settings.url}; its options are not known yet` : "");
    describeTimer = setTimeout(describe, DESCRIBE_AGAIN_MS);
    return false;
  }
  const [height, width] = description.input_shape.slice(-2);
  const zoom = Math.max(1, Math.round(DRAWN_SIDE / Math.max(height, width)));
  options.describe(description);
  takeLinked();
  paper.resize(width * zoom, height * zoom);
  byId("frame").style.setProperty("--ratio", paper.sent.width / paper.sent.height);
  whatIf.offerClasses(names());
  const { name, version, weights_sha256: weights } = description.model;
  say(byId("served"), `${name} ${version}, at ${settings.url}`);
  const versions = Object.entries(description.versions ?? {}).map(([library, number]) => `${library} ${number}`);
  say(byId("versions"), `${name} ${version}, weights ${weights.slice(0, 12)}; ${versions.join(", ")}.`);
  if (chosen !== null && chosen >= names().length) chosen = null;
  if (compared !== null && compared >= names().length) compared = null;
  if (paper.isEmpty) showState(null);
  show();
  if (!paper.isEmpty) ask();
  return true;
}

async function start() {
  setWidth();
  show();
  try {
    settings = (await fetchJson("settings.json")).content;
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    showState(wordsFor(error.state, error.message));
    setTimeout(start, DESCRIBE_AGAIN_MS);
    return;
  }
  await describe();
  readLink();
}

start();
