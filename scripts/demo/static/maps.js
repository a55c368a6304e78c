// Numbers of saliency maps -> colours. Knows nothing of the model, nor of where a map stands on the page.

const HUE_SHARE = 0.6; // where a map that diverges has the two colours that it lays over an image: its ends are too dark
const LEVELS = 255; // of a colour map: odd, so that zero is one of them

/** The floats of base64: little-endian float32. */
export function decodeFloats(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

/** Numbers of a reply, base64 or nested, as one flat array. */
export const flatten = (numbers) => (typeof numbers === "string" ? decodeFloats(numbers) : Float32Array.from(numbers.flat(Infinity)));

/** Split the axes of an image or a map into height, width and where its channels stand. */
export function layoutOf(shape) {
  if (shape.length === 2) return { height: shape[0], width: shape[1], channels: 1, isLast: true };
  const isLast = shape[2] <= 4;
  const [channels, height, width] = isLast ? [shape[2], shape[0], shape[1]] : shape;
  return { height, width, channels, isLast };
}

const indexOf = ({ height, width, channels, isLast }, pixel, channel) =>
  isLast ? pixel * channels + channel : channel * height * width + pixel;

/** One number a pixel: the sum over its channels. */
export function sumChannels(values, layout) {
  if (layout.channels === 1) return values;
  const summed = new Float32Array(layout.height * layout.width);
  for (let pixel = 0; pixel < summed.length; pixel++) {
    for (let channel = 0; channel < layout.channels; channel++) summed[pixel] += values[indexOf(layout, pixel, channel)];
  }
  return summed;
}

/** The number from which on colours are full: a percentile of all maps' sizes, without zeros. */
export function limitOf(maps, percentile) {
  const sizes = Float32Array.from(maps.flatMap((map) => [...map].filter((value) => value !== 0).map(Math.abs))).sort();
  if (!sizes.length) return 0;
  const place = ((sizes.length - 1) * percentile) / 100;
  const below = Math.floor(place);
  return sizes[below] + (place - below) * ((sizes[below + 1] ?? sizes[below]) - sizes[below]);
}

/** A colour map: share in [-1, 1] -> [r, g, b]. */
export class Colours {
  constructor({ colours, diverging }) {
    this.diverging = diverging;
    const anchors = colours.map((colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)));
    this.table = Array.from({ length: LEVELS }, (_, level) => {
      const place = (level / (LEVELS - 1)) * (anchors.length - 1);
      const below = Math.min(Math.floor(place), anchors.length - 2);
      return anchors[below].map((from, channel) => from + (place - below) * (anchors[below + 1][channel] - from));
    });
  }

  of(share) {
    const middle = (LEVELS - 1) / 2;
    return this.table[Math.round(this.diverging ? middle + middle * share : 2 * middle * Math.abs(share))];
  }

  /** Over an image. */
  over(share) {
    return this.of(this.diverging ? Math.sign(share) * HUE_SHARE : share);
  }
}

/** A number as a share of the limit; what another polarity has counts as zero. */
export function shareOf(value, limit, polarity) {
  if (limit === 0) return 0;
  const share = Math.min(Math.max(value / limit, -1), 1);
  if (polarity === "absolute") return Math.abs(share);
  if (polarity === "positive") return Math.max(share, 0);
  if (polarity === "negative") return Math.min(share, 0);
  return share;
}

/** Whether any number of this polarity is drawn below zero. */
export const hasNegative = (polarity) => polarity !== "absolute" && polarity !== "positive";

/** A map as a canvas of its own pixels, transparent where it is zero. */
export function paintMap(values, layout, { limit, polarity, colours, opacity }) {
  const canvas = document.createElement("canvas");
  canvas.width = layout.width;
  canvas.height = layout.height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(layout.width, layout.height);
  for (let pixel = 0; pixel < layout.width * layout.height; pixel++) {
    const share = shareOf(values[pixel], limit, polarity);
    const [r, g, b] = colours.over(share);
    image.data.set([r, g, b, 255 * opacity * Math.abs(share)], 4 * pixel);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

/** Pixels in [0, 1] as a canvas, grey or in colour. */
export function paintPixels(values, layout) {
  const canvas = document.createElement("canvas");
  canvas.width = layout.width;
  canvas.height = layout.height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(layout.width, layout.height);
  for (let pixel = 0; pixel < layout.width * layout.height; pixel++) {
    const levels = [0, 1, 2].map((channel) => 255 * values[indexOf(layout, pixel, Math.min(channel, layout.channels - 1))]);
    image.data.set([...levels, 255], 4 * pixel);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

/** Enlarge canvases over each other into one, with their pixels as they are. */
export function stack(target, layers, longerSide = 280) {
  const { width, height } = layers[0];
  const zoom = Math.max(1, Math.floor(longerSide / Math.max(width, height)));
  target.width = width * zoom;
  target.height = height * zoom;
  target.style.aspectRatio = `${width} / ${height}`;
  const context = target.getContext("2d");
  context.imageSmoothingEnabled = false;
  for (const layer of layers) context.drawImage(layer, 0, 0, target.width, target.height);
}

/** Where a map is largest and smallest, in words. */
export function summarise(values, layout, format) {
  let high = 0;
  let low = 0;
  for (let at = 1; at < values.length; at++) {
    if (values[at] > values[high]) high = at;
    if (values[at] < values[low]) low = at;
  }
  const place = (at) => `row ${Math.floor(at / layout.width) + 1}, column ${(at % layout.width) + 1}`;
  return `largest ${format(values[high])} at ${place(high)}, smallest ${format(values[low])} at ${place(low)}`;
}
