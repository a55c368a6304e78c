// The drawing: strokes on paper or on a photograph, by pointer or keyboard.
//
// What is sent (`sent`) has few pixels, and what is seen (`view`) has many; both are drawn from the same strokes, whose coordinates
// are shares of the longer side. Knows nothing of the model.

const VIEW_SIDE = 720; // pixels of the longer side on the screen
const PHOTO_SIDE = 640; // a photograph is scaled to this before it is sent
const MIN_DISTANCE = 1 / 400; // between two points of a stroke
const KEY_STEP = 1 / 56; // of the longer side; with Shift four times that
const PRESSURE = { least: 0.35, range: 1.3 }; // share of the pen's width, by the pressure of a pen
const PATCH = 12; // pixels around an eraser's first point in which the paper of a photograph is looked for
const MAX_ACTIONS = 2000;

export class Paper extends EventTarget {
  #actions = [];
  #undone = [];
  #stroke = null;
  #pointer = null;
  #key = { x: 0.5, y: 0.5, isShown: false };

  constructor(view, cursor) {
    super();
    this.view = view;
    this.cursor = cursor;
    this.sent = document.createElement("canvas");
    this.tool = "pen";
    this.penWidth = 0.08;
    this.blank = { width: 112, height: 112 };
    this.#listen();
    this.#replay();
  }

  // --- what is drawn

  /** Pixels that are sent of a drawing without a photograph. */
  resize(width, height) {
    this.blank = { width, height };
    this.#replay();
  }

  get photo() {
    const from = this.#actions.findLastIndex((action) => action.kind !== "stroke");
    return from >= 0 && this.#actions[from].kind === "photo" ? this.#actions[from] : null;
  }

  /** The strokes since the last clearing. */
  get strokes() {
    const from = this.#actions.findLastIndex((action) => action.kind !== "stroke");
    return this.#actions.slice(from + 1).concat(this.#stroke ? [this.#stroke] : []);
  }

  get isEmpty() {
    return !this.photo && !this.strokes.some((stroke) => stroke.tool === "pen");
  }

  get canUndo() {
    return this.#actions.length > 0;
  }

  get canRedo() {
    return this.#undone.length > 0;
  }

  get isDrawing() {
    return this.#stroke !== null;
  }

  /** The image as it is sent, as a data URL. */
  encode() {
    return this.photo ? this.sent.toDataURL("image/jpeg", 0.95) : this.sent.toDataURL("image/png");
  }

  setPhoto(bitmap) {
    const scale = Math.min(1, PHOTO_SIDE / Math.max(bitmap.width, bitmap.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    layOver(context, canvas);
    this.#do({ kind: "photo", canvas, context, from: { width: bitmap.width, height: bitmap.height } });
  }

  clear() {
    if (!this.isEmpty || this.strokes.length) this.#do({ kind: "clear" });
  }

  setStrokes(strokes) {
    this.#actions.push({ kind: "clear" }, ...strokes.map((stroke) => ({ kind: "stroke", ...stroke })));
    this.#undone = [];
    this.#replay();
    this.#tell("settle");
  }

  undo() {
    this.#lift();
    const last = this.#actions.pop();
    if (!last) return;
    this.#undone.push(last);
    this.#replay();
    this.#tell("settle");
  }

  redo() {
    const next = this.#undone.pop();
    if (!next) return;
    this.#actions.push(next);
    this.#replay();
    this.#tell("settle");
  }

  #do(action) {
    this.#lift();
    this.#actions.push(action);
    if (this.#actions.length > MAX_ACTIONS) this.#actions.shift();
    this.#undone = [];
    this.#replay();
    this.#tell("settle");
  }

  #tell(type, at = performance.now()) {
    this.dispatchEvent(new CustomEvent(type, { detail: { at } }));
  }

  #replay() {
    const photo = this.photo;
    const { width, height } = photo ? photo.canvas : this.blank;
    const zoom = VIEW_SIDE / Math.max(width, height);
    Object.assign(this.sent, { width, height });
    Object.assign(this.view, { width: Math.round(width * zoom), height: Math.round(height * zoom) });
    this.view.classList.toggle("photo", photo !== null);
    for (const canvas of [this.sent, this.view]) {
      const context = contextOf(canvas);
      context.fillStyle = "#fff";
      context.fillRect(0, 0, canvas.width, canvas.height);
      if (photo) context.drawImage(photo.canvas, 0, 0, canvas.width, canvas.height);
    }
    for (const stroke of this.strokes) this.#draw(stroke, 0);
  }

  /** Draw a stroke from one of its points on. */
  #draw(stroke, from) {
    for (const canvas of [this.sent, this.view]) {
      const scale = Math.max(canvas.width, canvas.height);
      const context = contextOf(canvas);
      context.lineCap = context.lineJoin = "round";
      context.strokeStyle = context.fillStyle = stroke.colour;
      for (let index = from; index < stroke.points.length; index++) {
        const [x, y, width] = stroke.points[index];
        context.beginPath();
        if (index === 0) {
          context.arc(x * scale, y * scale, (width * scale) / 2, 0, 2 * Math.PI);
          context.fill();
          continue;
        }
        const [lastX, lastY, lastWidth] = stroke.points[index - 1];
        context.lineWidth = ((width + lastWidth) / 2) * scale;
        context.moveTo(lastX * scale, lastY * scale);
        context.lineTo(x * scale, y * scale);
        context.stroke();
      }
    }
  }

  #colour(tool, x, y) {
    const photo = this.photo;
    if (!photo) return tool === "pen" ? "#000" : "#fff";
    const scale = Math.max(photo.canvas.width, photo.canvas.height);
    const paper = medianColour(photo, x * scale, y * scale, tool === "pen" ? scale : PATCH);
    if (tool === "eraser") return `rgb(${paper.join(" ")})`;
    return paper[0] + paper[1] + paper[2] > 382 ? "#111" : "#fff";
  }

  // --- strokes

  #start(x, y, width, at) {
    this.#undone = [];
    this.#stroke = { kind: "stroke", tool: this.tool, colour: this.#colour(this.tool, x, y), points: [[x, y, width]] };
    this.#draw(this.#stroke, 0);
    this.#tell("draw", at);
  }

  #extend(x, y, width) {
    const points = this.#stroke.points;
    const [lastX, lastY] = points.at(-1);
    if (Math.hypot(x - lastX, y - lastY) < MIN_DISTANCE) return false;
    points.push([x, y, width]);
    this.#draw(this.#stroke, points.length - 1);
    return true;
  }

  #lift(at) {
    if (!this.#stroke) return;
    this.#actions.push(this.#stroke);
    this.#stroke = null;
    this.#pointer = null;
    this.#showCursor();
    this.#tell("settle", at);
  }

  #place(event) {
    const box = this.view.getBoundingClientRect();
    const scale = Math.max(box.width, box.height);
    return [(event.clientX - box.left) / scale, (event.clientY - box.top) / scale];
  }

  #widthOf(event) {
    if (event.pointerType !== "pen" || !event.pressure) return this.penWidth;
    return this.penWidth * (PRESSURE.least + PRESSURE.range * event.pressure);
  }

  #listen() {
    const view = this.view;
    view.addEventListener("pointerdown", (event) => {
      if (this.#pointer !== null || (event.pointerType === "mouse" && event.button !== 0)) return;
      this.#lift();
      this.#key.isShown = false;
      this.#showCursor();
      this.#pointer = event.pointerId;
      view.setPointerCapture(event.pointerId);
      this.#start(...this.#place(event), this.#widthOf(event), event.timeStamp);
    });
    view.addEventListener("pointermove", (event) => {
      if (event.pointerId !== this.#pointer || !this.#stroke) return;
      const events = event.getCoalescedEvents?.() ?? [];
      const isLonger = (events.length ? events : [event]).map((one) => this.#extend(...this.#place(one), this.#widthOf(one)));
      if (isLonger.includes(true)) this.#tell("draw", event.timeStamp);
    });
    for (const type of ["pointerup", "pointercancel", "lostpointercapture"]) {
      view.addEventListener(type, (event) => {
        if (event.pointerId === this.#pointer) this.#lift(event.timeStamp);
      });
    }
    view.addEventListener("keydown", (event) => this.#keyDown(event));
    view.addEventListener("blur", () => {
      if (this.#pointer === null) this.#lift();
      this.#key.isShown = false;
      this.#showCursor();
    });
    view.addEventListener("focus", () => {
      this.#key.isShown = view.matches(":focus-visible");
      this.#showCursor();
    });
  }

  // --- the keyboard

  #keyDown(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = KEY_STEP * (event.shiftKey ? 4 : 1);
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (moves[event.key]) this.#moveKey(...moves[event.key], event.timeStamp);
    else if (event.key === " " || event.key === "Enter") {
      if (this.#stroke) this.#lift(event.timeStamp);
      else this.#start(this.#key.x, this.#key.y, this.penWidth, event.timeStamp);
      this.#sayKey(this.isDrawing ? "Pen down" : "Pen lifted");
    } else if (event.key === "Escape" && this.#stroke) this.#lift(event.timeStamp);
    else return;
    event.preventDefault();
    this.#key.isShown = true;
    this.#showCursor();
  }

  #moveKey(x, y, at) {
    const { width, height } = this.sent;
    const longer = Math.max(width, height);
    this.#key.x = Math.min(Math.max(this.#key.x + x, 0), width / longer);
    this.#key.y = Math.min(Math.max(this.#key.y + y, 0), height / longer);
    if (this.#stroke && this.#extend(this.#key.x, this.#key.y, this.penWidth)) this.#tell("draw", at);
    const across = Math.round((100 * this.#key.x * longer) / width);
    const down = Math.round((100 * this.#key.y * longer) / height);
    this.#sayKey(`${across} percent across, ${down} percent down`);
  }

  #sayKey(text) {
    this.dispatchEvent(new CustomEvent("say", { detail: text }));
  }

  #showCursor() {
    this.cursor.hidden = !this.#key.isShown;
    const { width, height } = this.sent;
    const longer = Math.max(width, height);
    this.cursor.style.left = `${(100 * this.#key.x * longer) / width}%`;
    this.cursor.style.top = `${(100 * this.#key.y * longer) / height}%`;
    this.cursor.toggleAttribute("data-down", this.#stroke !== null);
  }
}

const contextOf = (canvas) => canvas.getContext("2d", { willReadFrequently: true });

/** Lay a transparent image over white, or over black where what is drawn is bright. */
function layOver(context, { width, height }) {
  const pixels = context.getImageData(0, 0, width, height).data;
  let alphas = 0;
  let light = 0;
  for (let at = 0; at < pixels.length; at += 4) {
    alphas += pixels[at + 3];
    light += pixels[at + 3] * (0.299 * pixels[at] + 0.587 * pixels[at + 1] + 0.114 * pixels[at + 2]);
  }
  const isOpaque = alphas === 255 * width * height;
  if (isOpaque) return;
  context.globalCompositeOperation = "destination-over";
  context.fillStyle = alphas > 0 && light / alphas > 160 ? "#000" : "#fff";
  context.fillRect(0, 0, width, height);
  context.globalCompositeOperation = "source-over";
}

/** The median colour of a photograph around a place: of its paper, as ink is rare. */
function medianColour({ context, canvas }, x, y, reach) {
  const left = Math.max(0, Math.floor(x - reach));
  const top = Math.max(0, Math.floor(y - reach));
  const width = Math.min(canvas.width - left, Math.ceil(2 * reach));
  const height = Math.min(canvas.height - top, Math.ceil(2 * reach));
  const data = context.getImageData(left, top, Math.max(1, width), Math.max(1, height)).data;
  return [0, 1, 2].map((channel) => {
    const levels = data.filter((_, index) => index % 4 === channel).sort();
    return levels[levels.length >> 1];
  });
}
