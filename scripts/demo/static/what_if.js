// "What would change it": pixels of what the network saw are changed where the map points, and the score's change is compared with
// what the map predicted.

import { Asker } from "./ask.js";
import { byId, say } from "./dom.js";
import { flatten, layoutOf, paintPixels, stack } from "./maps.js";
import { percent, short, signed, wordsFor } from "./words.js";

const PER_INTENSITY = "per unit of intensity";

export class WhatIf {
  /** @param page { classNames(), options() of the request, explained() class or null, announce(text), busy() } */
  constructor(page) {
    Object.assign(this, { page, base: null, map: null, changed: null, byHand: false, at: 0 });
    this.asker = new Asker(() => this.#question(), {
      answer: (content, question) => this.#answered(content, question),
      refused: (refusal) => this.#verdict(wordsFor(refusal.state, refusal.message)),
      slow: () => {},
      busy: () => page.busy(),
    });
    for (const id of ["goal", "goal-class", "action"]) byId(id).addEventListener("change", () => this.#choose());
    byId("count").addEventListener("input", () => this.#choose());
    byId("restore").addEventListener("click", () => this.reset());
    this.#listenToCanvas();
  }

  /** Offer the classes that a model has; the first choice follows the class that is explained. */
  offerClasses(names) {
    const select = byId("goal-class");
    const former = select.value;
    select.replaceChildren(new Option("the explained class", ""), ...names.map((name, index) => new Option(name, index)));
    if ([...select.options].some((option) => option.value === former)) select.value = former;
  }

  /** Start from another answer; null where there is none. */
  setBase(reply) {
    const pixels = reply?.preparation.pixels;
    this.base = pixels === undefined ? null : {
      layout: layoutOf(reply.preparation.shape), pixels: flatten(pixels), logits: reply.logits, probabilities: reply.probabilities,
    };
    this.map = null;
    this.changed = null;
    this.byHand = false;
    const pixelCount = this.base ? this.base.layout.width * this.base.layout.height : 784;
    byId("count").max = Math.max(10, Math.round(pixelCount / 13));
    if (this.base && Number(byId("count").value) > 0) this.#choose();
    else this.#show();
  }

  reset() {
    byId("count").value = 0;
    this.changed = null;
    this.byHand = false;
    this.asker.stop();
    this.#show();
  }

  get goalClass() {
    const value = byId("goal-class").value;
    return value === "" ? this.page.explained() : Number(value);
  }

  // --- which pixels

  #choose() {
    say(byId("count-value"), byId("count").value);
    this.byHand = false;
    if (!this.base) return;
    if (Number(byId("count").value) === 0) {
      this.reset();
      return;
    }
    this.asker.settle();
  }

  /** What has to be asked next: the map of the goal's class, then the changed image's scores. */
  #question() {
    if (!this.base || this.goalClass === null) return null;
    const key = JSON.stringify([this.goalClass, this.page.options()]);
    const options = { ...this.page.options(), space: undefined, prepare: "none", target: this.goalClass, encoding: "base64" };
    if (this.map?.key !== key) return { kind: "map", key, base: this.base, body: { data: nested(this.base.pixels, this.base.layout), ...options } };
    if (!this.byHand) this.#changeWhereTheMapPoints();
    if (!this.changed) return null;
    return { kind: "scores", base: this.base, changed: this.changed, body: { data: nested(this.changed, this.base.layout), ...options } };
  }

  #answered(content, question) {
    if (question.base !== this.base) return;
    if (question.kind === "map") {
      const layout = layoutOf(content.explanation.shape);
      const { unit, output } = content.explanation;
      this.map = { key: question.key, values: flatten(content.explanation.saliency), layout, unit, output, logits: content.logits };
      this.asker.settle();
      return;
    }
    this.#show(content);
  }

  /** By how much the map says that the score changes where a pixel becomes another; null where such a map does not say. */
  #predict(index, to) {
    const { values, unit } = this.map;
    const from = this.base.pixels[index];
    if (unit.endsWith(PER_INTENSITY)) return values[index] * (to - from);
    if (/\s|\^/.test(unit)) return null; // squares and the like
    return from > 0 ? (values[index] * (to - from)) / from : 0; // shares of the score
  }

  get predicts() {
    return this.map !== null && (this.map.unit.endsWith(PER_INTENSITY) || !/\s|\^/.test(this.map.unit));
  }

  /** Erase (0) or add (1) ink in the pixels of which the map promises most. */
  #changeWhereTheMapPoints() {
    const { layout, pixels } = this.base;
    const goal = Number(byId("goal").value) * (this.map.output === "logit" ? 1 : -1);
    const ends = { erase: [0], add: [1], either: [0, 1] }[byId("action").value];
    const gains = [];
    for (let pixel = 0; pixel < layout.width * layout.height; pixel++) {
      for (const to of ends) {
        let gain = 0;
        for (const index of channelsOf(layout, pixel)) {
          const predicted = this.#predict(index, to);
          const size = Math.abs(this.map.values[index] * (to - pixels[index]));
          gain += predicted === null ? size : goal * predicted;
        }
        if (gain > 0) gains.push({ pixel, to, gain });
      }
    }
    gains.sort((one, other) => other.gain - one.gain);
    this.changed = pixels.slice();
    const done = new Set();
    for (const { pixel, to } of gains) {
      if (done.size >= Number(byId("count").value)) break;
      if (done.has(pixel)) continue;
      done.add(pixel);
      for (const index of channelsOf(layout, pixel)) this.changed[index] = to;
    }
    if (!done.size) this.changed = null;
    if (!done.size) this.#verdict({ title: "The map points at no such pixel.", text: "Choose another way." });
  }

  // --- by hand

  #listenToCanvas() {
    const canvas = byId("changed");
    let isDown = false;
    const paint = (event) => {
      if (!this.base) return;
      const box = canvas.getBoundingClientRect();
      const { width, height } = this.base.layout;
      const x = Math.floor(((event.clientX - box.left) / box.width) * width);
      const y = Math.floor(((event.clientY - box.top) / box.height) * height);
      if (x >= 0 && y >= 0 && x < width && y < height) this.#changeByHand(y * width + x);
    };
    canvas.addEventListener("pointerdown", (event) => {
      isDown = true;
      canvas.setPointerCapture(event.pointerId);
      paint(event);
    });
    canvas.addEventListener("pointermove", (event) => isDown && paint(event));
    for (const type of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(type, () => {
        if (isDown && this.byHand) this.asker.settle();
        isDown = false;
      });
    }
    canvas.addEventListener("keydown", (event) => {
      if (!this.base || event.ctrlKey || event.metaKey || event.altKey) return;
      const { width, height } = this.base.layout;
      const [x, y] = [this.at % width, Math.floor(this.at / width)];
      const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      if (moves[event.key]) {
        const [stepX, stepY] = moves[event.key];
        this.at = Math.min(Math.max(y + stepY, 0), height - 1) * width + Math.min(Math.max(x + stepX, 0), width - 1);
        this.page.announce(`row ${Math.floor(this.at / width) + 1}, column ${(this.at % width) + 1}`);
        this.#draw();
      } else if (event.key === " " || event.key === "Enter") {
        this.#changeByHand(this.at);
        this.asker.settle();
      } else return;
      event.preventDefault();
    });
    for (const type of ["focus", "blur"]) canvas.addEventListener(type, () => this.#draw());
  }

  #changeByHand(pixel) {
    if (!this.base) return;
    const { layout, pixels } = this.base;
    this.changed = (this.changed ?? pixels).slice();
    this.byHand = true;
    const action = byId("action").value;
    for (const index of channelsOf(layout, pixel)) {
      this.changed[index] = action === "erase" ? 0 : action === "add" ? 1 : Math.round(1 - pixels[index]);
    }
    this.#draw();
    this.asker.live();
  }

  // --- what is shown

  #draw() {
    const canvas = byId("changed");
    if (!this.base) {
      canvas.width = canvas.height = 1;
      return 0;
    }
    const { layout, pixels } = this.base;
    const shown = this.changed ?? pixels;
    stack(canvas, [paintPixels(shown, layout)], 560);
    const zoom = canvas.width / layout.width;
    const context = canvas.getContext("2d");
    context.lineWidth = Math.max(1, zoom / 7);
    let count = 0;
    const outline = (pixel, colour, inset) => {
      context.strokeStyle = colour;
      const [x, y] = [pixel % layout.width, Math.floor(pixel / layout.width)];
      context.strokeRect((x + inset) * zoom, (y + inset) * zoom, (1 - 2 * inset) * zoom, (1 - 2 * inset) * zoom);
    };
    for (let pixel = 0; pixel < layout.width * layout.height; pixel++) {
      const change = channelsOf(layout, pixel).reduce((sum, index) => sum + shown[index] - pixels[index], 0);
      if (change === 0) continue;
      count += 1;
      outline(pixel, change > 0 ? "#ffb13d" : "#52a8ff", 0.12);
    }
    if (canvas.matches(":focus-visible")) outline(this.at, "#ff5ad1", 0);
    return count;
  }

  #show(content = null) {
    const count = this.#draw();
    say(byId("count-value"), byId("count").value);
    byId("restore").disabled = count === 0;
    say(byId("changed-caption"), count === 0 ? "Nothing changed" : `${count} pixel${count === 1 ? "" : "s"} changed: blue erased, orange added`);
    if (count === 0 || !content) {
      for (const id of ["score-before", "score-predicted", "score-after"]) say(byId(id), "–");
      if (count === 0) this.#verdict({ title: this.base ? "Move the slider, or paint on the image." : "Draw something first.", text: "" });
      return;
    }
    const goal = this.goalClass;
    const names = this.page.classNames();
    const score = ({ logits }) => (this.map.output === "logit" ? logits[goal] : lossOf(logits, goal));
    const [before, after] = [score(this.map), score(content)];
    let predicted = null;
    if (this.predicts) {
      predicted = 0;
      for (let index = 0; index < this.changed.length; index++) {
        if (this.changed[index] !== this.base.pixels[index]) predicted += this.#predict(index, this.changed[index]);
      }
    }
    say(byId("score-name"), `${this.map.output === "logit" ? "Score" : "Loss"} of ${names[goal]}`);
    say(byId("score-before"), short(before));
    say(byId("score-predicted"), predicted === null ? "nothing" : `${short(before + predicted)} (${signed(predicted)})`);
    say(byId("score-after"), `${short(after)} (${signed(after - before)})`);
    const read = indexOfLargest(content.logits);
    const was = indexOfLargest(this.base.logits);
    const answer = read === was ? `It still reads ${names[read]}` : `Now it reads ${names[read]} instead of ${names[was]}`;
    const verdict = predicted === null ? "Maps of this method have no sign, so they predict no change." : judge(predicted, after - before);
    this.#verdict({ title: `${answer} (${percent(content.probabilities[read])}).`, text: verdict });
  }

  #verdict({ title, text }) {
    say(byId("verdict"), text ? `${title} ${text}` : title);
  }
}

/** Say how well a prediction was met. */
function judge(predicted, happened) {
  if (Math.abs(predicted) < 1e-6) return "The map says nothing of these pixels.";
  if (predicted * happened < 0) return "The map was wrong about the direction: so large a change is beyond where it holds.";
  const share = happened / predicted;
  if (share > 0.8 && share < 1.25) return "The map was about right.";
  return share < 1 ? `The score moved by ${Math.round(100 * share)} % of what the map predicted.` : `The score moved ${share.toFixed(1)} times as far as the map predicted.`;
}

const indexOfLargest = (numbers) => numbers.reduce((best, value, index) => (value > numbers[best] ? index : best), 0);

function lossOf(logits, target) {
  const largest = Math.max(...logits);
  return Math.log(logits.reduce((sum, logit) => sum + Math.exp(logit - largest), 0)) + largest - logits[target];
}

const channelsOf = ({ width, height, channels, isLast }, pixel) =>
  Array.from({ length: channels }, (_, channel) => (isLast ? pixel * channels + channel : channel * width * height + pixel));

const LEAST = 1e-12; // makes an intensity of 0 a float: numbers that are all whole would be levels from 0 to 255

/** Flat pixels -> nested, as the API takes them. */
function nested(given, layout) {
  const { width, height, channels } = layout;
  const pixels = Float32Array.from(given);
  if (pixels.every(Number.isInteger)) pixels[0] = Math.max(pixels[0] - 1e-6, LEAST);
  return Array.from({ length: height }, (_, y) =>
    Array.from({ length: width }, (_, x) => {
      const values = channelsOf(layout, y * width + x).map((index) => pixels[index]);
      return channels === 1 ? values[0] : values;
    }),
  );
}
